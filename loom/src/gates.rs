//! Models of the gate of a node.

use std::sync::Arc;

use loom::cell::UnsafeCell;
use loom::thread;

use crate::explore;
use crate::gate::Gate;

/// A node whose contents only the owner of its closed gate changes.
#[derive(Default)]
struct Node {
    gate: Arc<Gate>,
    contents: UnsafeCell<u32>,
}

// SAFETY: loom itself watches that nobody reads `contents` while another writes it: that is the test.
unsafe impl Sync for Node {}
// SAFETY: as above.
unsafe impl Send for Node {}

impl Node {
    fn request(&self) -> u32 {
        let _passage = self.gate.enter();
        self.look()
    }

    fn look(&self) -> u32 {
        self.contents.with(|contents| {
            // SAFETY: as for Sync.
            unsafe { *contents }
        })
    }

    fn change(&self) {
        let _closed = self.gate.close();
        self.contents.with_mut(|contents| {
            // SAFETY: as for Sync.
            unsafe { *contents += 1 }
        });
    }
}

/// Requests and an owner: each request sees the node before the change or after it, and all end.
pub fn requests_never_meet_a_change() {
    explore(3, || {
        let node = Arc::new(Node::default());
        let threads: Vec<_> = (0..2)
            .map(|_| {
                let node = node.clone();
                thread::spawn(move || {
                    let first = node.request();
                    assert!(first <= 1 && node.request() >= first);
                })
            })
            .collect();
        node.change();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(node.request(), 1);
    });
}

/// Two owners: one after the other, and a request gets through between or after them.
pub fn owners_come_one_after_the_other() {
    explore(3, || {
        let node = Arc::new(Node::default());
        let owner = {
            let node = node.clone();
            thread::spawn(move || node.change())
        };
        let requester = {
            let node = node.clone();
            thread::spawn(move || assert!(node.request() <= 2))
        };
        node.change();
        owner.join().unwrap();
        requester.join().unwrap();
        assert_eq!(node.request(), 2);
    });
}

/// Who only tries is let in or not, and in neither case keeps an owner waiting for ever.
pub fn who_only_tries_does_not_hold_an_owner_up() {
    explore(3, || {
        let node = Arc::new(Node::default());
        let threads: Vec<_> = (0..2)
            .map(|_| {
                let node = node.clone();
                thread::spawn(move || {
                    for _ in 0..2 {
                        if let Some(_passage) = node.gate.try_enter() {
                            node.look();
                        }
                    }
                })
            })
            .collect();
        node.change();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert!(node.gate.try_enter().is_some(), "left closed");
    });
}
