//! Which parts of RAM a guest touched first after a load: they are read first after the next one.

use std::sync::{Mutex, PoisonError};

use crate::track::Base;

/// Units of a checkpoint that are remembered: 256 MiB.
const MOST_UNITS: usize = 4096;
/// Checkpoints that are remembered.
const MOST_CHECKPOINTS: usize = 16;

/// Units in the order in which they were touched, each once.
pub(super) type Order = Vec<usize>;

/// The orders of the checkpoints that were loaded last. It lives as long as the process.
#[derive(Debug, Default)]
pub struct Orders(Mutex<Vec<(Base, Order)>>);

impl Orders {
    /// What was touched first after earlier loads of a checkpoint; empty if that is not known.
    pub(crate) fn of(&self, base: &Base) -> Order {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known
            .iter()
            .find(|(known, _)| known == base)
            .map(|(_, order)| order.clone())
            .unwrap_or_default()
    }

    /// Remembers what was waited for after a load. What was read ahead in time was not, so it stays
    /// behind what is new.
    pub(super) fn learn(&self, base: &Base, touched: &[usize]) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let at = known.iter().position(|(known, _)| known == base);
        let (_, old) = at.map_or_else(|| (base.clone(), Order::new()), |at| known.remove(at));
        let mut order = touched.to_vec();
        let touched: std::collections::HashSet<_> = touched.iter().copied().collect();
        order.extend(old.into_iter().filter(|unit| !touched.contains(unit)));
        order.truncate(MOST_UNITS);
        known.insert(0, (base.clone(), order));
        known.truncate(MOST_CHECKPOINTS);
    }
}

/// Whether one more touched unit is to be noted.
pub(super) fn has_room(touched: &Order) -> bool {
    touched.len() < MOST_UNITS
}

#[cfg(test)]
mod tests {
    use block::SnapshotInfo;

    use super::*;

    fn base(id: u32) -> Base {
        let snapshot = SnapshotInfo {
            id: id.to_string(),
            tag: "t".to_owned(),
            vm_state_size: 1,
            disk_size: 1,
            date_sec: 0,
            date_nsec: 0,
            vm_clock_nsec: 0,
            icount: None,
        };
        Base { node: "d0".to_owned(), snapshot, ram_offset: 0 }
    }

    #[test]
    fn what_was_waited_for_comes_before_what_was_waited_for_earlier() {
        let orders = Orders::default();
        assert_eq!(orders.of(&base(1)), [0; 0]);
        orders.learn(&base(1), &[3, 1, 2]);
        orders.learn(&base(2), &[9]);
        orders.learn(&base(1), &[7, 2]);
        assert_eq!(orders.of(&base(1)), [7, 2, 3, 1]);
        assert_eq!(orders.of(&base(2)), [9]);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let orders = Orders::default();
        let many: Vec<_> = (0..2 * MOST_UNITS).collect();
        for id in 0..2 * u32::try_from(MOST_CHECKPOINTS).unwrap() {
            orders.learn(&base(id), &many);
        }
        assert_eq!(orders.of(&base(0)), [0; 0]);
        let last = 2 * u32::try_from(MOST_CHECKPOINTS).unwrap() - 1;
        assert_eq!(orders.of(&base(last)).len(), MOST_UNITS);
    }
}
