//! Observers, who are told of every change of a node's contents.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use super::Node;

/// Is told of every change of a node's contents.
pub trait WriteObserver: Send + Sync {
    /// The guest range was written, zeroed or discarded, or that failed halfway. Comes before the
    /// request completes, from the thread that carries it out; must not wait for I/O.
    fn wrote(&self, offset: u64, len: u64);
}

impl Node {
    /// Tells those who watch that a range was changed, or that an attempt failed: part of it may
    /// have been written then. To be called before the request's completion is told to anybody, and
    /// before its [`Access`] is dropped: the image's bitmaps are stored when the image is replaced.
    pub fn note_write(&self, offset: u64, len: u64) {
        if len > 0 {
            self.highest.wrote_up_to(offset.saturating_add(len));
        }
        self.note_change(offset, len);
    }

    /// The same of a discard, which is no write where those are counted.
    pub(super) fn note_change(&self, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        self.details().bitmaps.note(offset, len);
        if self.observed.load(Ordering::Acquire) == 0 {
            return;
        }
        let observers = self.observers.read().unwrap_or_else(PoisonError::into_inner);
        for observer in observers.iter() {
            observer.wrote(offset, len);
        }
    }

    /// Has every later change told to `observer`, until [`Node::unobserve`].
    pub fn observe(&self, observer: Arc<dyn WriteObserver>) {
        let mut observers = self.observers.write().unwrap_or_else(PoisonError::into_inner);
        observers.push(observer);
        self.observed.store(observers.len(), Ordering::Release);
    }

    /// Ends [`Node::observe`].
    pub(crate) fn unobserve(&self, observer: &Arc<dyn WriteObserver>) {
        let mut observers = self.observers.write().unwrap_or_else(PoisonError::into_inner);
        observers.retain(|other| !Arc::ptr_eq(other, observer));
        self.observed.store(observers.len(), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::raw::Raw;
    use crate::storage::memory::MemoryStorage;
    use crate::{ReadBuf, WriteBuf};

    #[derive(Default)]
    struct Seen(Mutex<Vec<(u64, u64)>>);

    impl WriteObserver for Seen {
        fn wrote(&self, offset: u64, len: u64) {
            self.0.lock().unwrap().push((offset, len));
        }
    }

    #[test]
    fn every_change_is_told_and_nothing_after_unobserve() {
        let storage = Arc::new(MemoryStorage::new(vec![0; 8192]));
        let node = Node::new("n", Arc::new(Raw::open(storage, false).unwrap()));
        let seen = Arc::new(Seen::default());
        let observer: Arc<dyn WriteObserver> = seen.clone();
        node.observe(observer.clone());
        node.write(512, &[WriteBuf::new(&[1; 10]), WriteBuf::new(&[2; 5])]).unwrap();
        node.write_zeroes(1024, 512, true).unwrap();
        node.discard(2048, 100).unwrap();
        node.write(8000, &[WriteBuf::new(&[1; 500])]).unwrap_err();
        node.read(0, &[ReadBuf::new(&mut [0; 512])]).unwrap();
        node.flush().unwrap();
        node.unobserve(&observer);
        node.write(0, &[WriteBuf::new(&[1])]).unwrap();
        let told = [(512, 15), (1024, 512), (2048, 100), (8000, 500)];
        assert_eq!(*seen.0.lock().unwrap(), told);
    }
}
