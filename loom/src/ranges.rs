//! Models of the ranges in flight.

use std::ops::Range;
use std::sync::Arc;

use loom::cell::UnsafeCell;
use loom::thread;

use crate::explore;
use crate::inflight::InFlight;

/// A disk of two bytes, each of which is used as a request that holds its range may.
#[derive(Default)]
struct Disk {
    ranges: InFlight,
    bytes: [UnsafeCell<u32>; 2],
}

// SAFETY: loom itself watches that nobody reads a byte while another writes it: that is the test.
unsafe impl Sync for Disk {}
// SAFETY: as above.
unsafe impl Send for Disk {}

impl Disk {
    fn write(&self, range: Range<u64>) {
        let _held = self.ranges.exclusive(range.clone());
        self.put(range);
    }

    fn put(&self, range: Range<u64>) {
        for at in range {
            self.bytes[usize::try_from(at).unwrap()].with_mut(|byte| {
                // SAFETY: as for Sync.
                unsafe { *byte += 1 }
            });
        }
    }

    fn read(&self, range: Range<u64>) -> Vec<u32> {
        let _held = self.ranges.shared(range.clone());
        self.get(range)
    }

    fn get(&self, range: Range<u64>) -> Vec<u32> {
        let get = |at: u64| {
            self.bytes[usize::try_from(at).unwrap()].with(|byte| {
                // SAFETY: as for Sync.
                unsafe { *byte }
            })
        };
        range.map(get).collect()
    }
}

/// Writers whose ranges overlap by one byte or lie apart, and a reader of all.
pub fn who_holds_a_range_alone_is_alone() {
    explore(3, || {
        let disk = Arc::new(Disk::default());
        let spawn = |act: fn(&Disk)| {
            let disk = disk.clone();
            thread::spawn(move || act(&disk))
        };
        let writer = spawn(|disk| disk.write(1..2));
        let reader = spawn(|disk| {
            let seen = disk.read(0..2);
            assert!(seen[0] <= 1 && seen[1] <= 2);
        });
        disk.write(0..2);
        writer.join().unwrap();
        reader.join().unwrap();
        assert_eq!(disk.read(0..2), [1, 2]);
    });
}

/// Readers hold a range together while a writer waits, who is woken by the last of them.
pub fn the_last_of_several_lets_the_next_go_on() {
    explore(3, || {
        let disk = Arc::new(Disk::default());
        let threads: Vec<_> = (0..2)
            .map(|n| {
                let disk = disk.clone();
                thread::spawn(move || {
                    let seen = disk.read(n..2);
                    assert!(seen.iter().all(|byte| *byte == seen[0]), "half of a write");
                })
            })
            .collect();
        disk.write(0..2);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(disk.read(0..2), [1, 1]);
    });
}

/// Who only tries gets a range alone or not at all, and whoever waits goes on in either case.
pub fn who_only_tries_gets_all_or_nothing() {
    explore(3, || {
        let disk = Arc::new(Disk::default());
        let trier = {
            let disk = disk.clone();
            thread::spawn(move || {
                let mut written = 0;
                if let Some(_held) = disk.ranges.try_exclusive(0..1) {
                    disk.put(0..1);
                    written += 1;
                }
                if let Some(_held) = disk.ranges.try_shared(0..2) {
                    disk.get(0..2);
                }
                written
            })
        };
        let writer = {
            let disk = disk.clone();
            thread::spawn(move || disk.write(0..2))
        };
        disk.write(1..2);
        writer.join().unwrap();
        let written = trier.join().unwrap();
        assert_eq!(disk.read(0..2), [1 + written, 2]);
    });
}

/// A range that is given up is got by who waits for it, though others wait for others.
pub fn each_who_waits_is_told() {
    explore(3, || {
        let disk = Arc::new(Disk::default());
        let low = disk.ranges.exclusive(0..1);
        let high = disk.ranges.exclusive(1..2);
        let spawn = |range: Range<u64>| {
            let disk = disk.clone();
            thread::spawn(move || disk.write(range))
        };
        let waits_for_high = spawn(1..2);
        let waits_for_low = spawn(0..1);
        drop(low);
        waits_for_low.join().unwrap();
        drop(high);
        waits_for_high.join().unwrap();
        assert_eq!(disk.read(0..2), [1, 1]);
    });
}
