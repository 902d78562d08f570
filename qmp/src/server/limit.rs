//! Events that a guest can bring about as often as it likes: at most one a second of each kind and
//! device, as in QEMU. The first is told at once. Of those that come in the second after one was told
//! the last is told at the end of it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::schema::Event;

/// Between two events of one kind and device.
const INTERVAL: Duration = Duration::from_secs(1);

/// What limits an event: its kind, and the device; none where it is always told at once.
pub(super) fn key(event: &Event) -> Option<String> {
    match event {
        Event::BlockIoError { qom_path, .. } => Some(format!("{} {qom_path}", event.name())),
        _ => None,
    }
}

/// An event that was told not long ago.
#[derive(Debug)]
struct Recent {
    /// When the next may be told.
    due: Instant,
    /// The last since.
    kept: Option<Arc<[u8]>>,
}

/// See the module. There are no more keys than devices.
#[derive(Debug, Default)]
pub(super) struct Limiter {
    recent: BTreeMap<String, Recent>,
}

impl Limiter {
    /// An event happens; gives it back if it is to be told now.
    pub(super) fn pass(
        &mut self,
        key: String,
        message: Arc<[u8]>,
        now: Instant,
    ) -> Option<Arc<[u8]>> {
        if let Some(recent) = self.recent.get_mut(&key) {
            recent.kept = Some(message);
            return None;
        }
        self.recent.insert(key, Recent { due: now + INTERVAL, kept: None });
        Some(message)
    }

    /// When [`Limiter::due`] has something to do.
    pub(super) fn next(&self) -> Option<Instant> {
        self.recent.values().map(|recent| recent.due).min()
    }

    /// The events that are to be told now.
    pub(super) fn due(&mut self, now: Instant) -> Vec<Arc<[u8]>> {
        let mut told = Vec::new();
        self.recent.retain(|_, recent| {
            if recent.due > now {
                return true;
            }
            recent.due = now + INTERVAL;
            let kept = recent.kept.take();
            let again = kept.is_some();
            told.extend(kept);
            again
        });
        told
    }

    /// All that was kept, before the end.
    pub(super) fn rest(&mut self) -> Vec<Arc<[u8]>> {
        std::mem::take(&mut self.recent).into_values().filter_map(|recent| recent.kept).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(text: &str) -> Arc<[u8]> {
        text.as_bytes().into()
    }

    #[test]
    fn the_first_is_told_at_once_and_the_last_of_a_second_at_its_end() {
        let mut limiter = Limiter::default();
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut pass = |key: &str, text, ms| limiter.pass(key.into(), message(text), at(ms));
        assert_eq!(pass("a", "a1", 0), Some(message("a1")));
        assert_eq!(pass("a", "a2", 100), None);
        assert_eq!(pass("b", "b1", 200), Some(message("b1")));
        assert_eq!(pass("a", "a3", 300), None);
        assert_eq!(limiter.next(), Some(at(1000)));
        assert_eq!(limiter.due(at(999)), [] as [Arc<[u8]>; 0]);
        assert_eq!(limiter.due(at(1000)), [message("a3")]);
        // That one counts, too.
        assert_eq!(limiter.pass("a".into(), message("a4"), at(1900)), None);
        assert_eq!(limiter.due(at(1900)), [] as [Arc<[u8]>; 0]);
        assert_eq!(limiter.due(at(2000)), [message("a4")]);
        assert_eq!(limiter.due(at(3000)), [] as [Arc<[u8]>; 0]);
        assert_eq!(limiter.next(), None);
        assert_eq!(limiter.pass("a".into(), message("a5"), at(3001)), Some(message("a5")));
    }

    #[test]
    fn at_the_end_nothing_is_kept_back() {
        let mut limiter = Limiter::default();
        let now = Instant::now();
        limiter.pass("a".into(), message("a1"), now);
        limiter.pass("a".into(), message("a2"), now);
        limiter.pass("b".into(), message("b1"), now);
        assert_eq!(limiter.rest(), [message("a2")]);
        assert_eq!(limiter.next(), None);
    }
}
