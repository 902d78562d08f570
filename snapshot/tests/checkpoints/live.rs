//! A failure at every step of an incremental save whose guest goes on: every disk is as it was, and the
//! next save has all that was written since the base.

use std::sync::Arc;

use block::Progress;
use ram::MmapRegion;
use snapshot::save::{self, Room, Save, SaveSetup, set_aside};
use snapshot::{Checkpoint, PageSet, SaveError, SaveImages, SaveReport, Section, Tracker};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::fake::Disk;
use crate::support::{MIB, Machine, contents, new_ram, stamp};

struct Live {
    machine: Machine,
    tracker: Tracker,
    writes: u64,
}

impl Live {
    /// A machine with a checkpoint "base", and a guest that has gone on.
    fn new() -> Self {
        let machine = Machine::new(65536);
        let tracker = Tracker::new(&PageSet::of(&machine.ram));
        let mut live = Self { machine, tracker, writes: 0 };
        live.save("base", &Progress::default()).unwrap();
        live
    }

    /// The guest writes here and there, zeroes too.
    fn run(&mut self) {
        for _ in 0..5 {
            self.writes += 1;
            let page = self.writes * 61 % (9 * 256);
            let byte = u8::try_from(self.writes % 3 * 40).unwrap();
            let bytes = [byte; 5000];
            let at = GuestAddress((page * 4096).min(9 * MIB - 5000));
            self.machine.ram.write_slice(&bytes, at).unwrap();
        }
        // A whole granule becomes zero, or no longer is.
        let granule = vec![u8::try_from(self.writes & 1).unwrap(); 65536];
        self.machine.ram.write_slice(&granule, GuestAddress(2 * MIB)).unwrap();
    }

    fn collect(&mut self) -> PageSet {
        let mut written = PageSet::of(&self.machine.ram);
        for (at, region) in self.machine.ram.iter().enumerate() {
            MmapRegion::bitmap(region)
                .written()
                .take(|first, bits| written.insert_words_at(at, first, &[bits]));
        }
        self.tracker.note(&written);
        self.tracker.take()
    }

    /// A live save; gives RAM and disks as they were at the switch.
    fn save(
        &mut self,
        tag: &str,
        progress: &Progress,
    ) -> Result<(Vec<Vec<u8>>, SaveReport), SaveError> {
        let result = self.try_save(tag, progress);
        self.tracker.failed();
        result
    }

    fn try_save(
        &mut self,
        tag: &str,
        progress: &Progress,
    ) -> Result<(Vec<Vec<u8>>, SaveReport), SaveError> {
        let nodes: Vec<_> = self.machine.nodes.iter().map(Arc::clone).collect();
        let images = SaveImages::of(&nodes, "d0");
        let (ram, base) = (self.machine.ram.clone(), self.tracker.base().cloned());
        let stamp = stamp(tag);
        let setup = SaveSetup {
            nodes: &nodes,
            vmstate: "d0",
            stamp: &stamp,
            base: base.as_ref(),
            compress: None,
            absent: false,
            state_bytes: 1000,
            ram: &ram,
            progress,
            threads: 1,
        };
        let mut save = Save::begin(&images, setup)?;
        let mut pages = self.collect();
        if !save.is_incremental() {
            pages.insert_all();
        }
        save.write(&pages)?;
        self.run();
        let pages = self.collect();
        save.write(&pages)?;
        self.run();
        let pages = self.collect();
        save.switch()?;
        let then = contents(&ram);
        let aside = set_aside(&ram, pages, Room::new(1));
        self.run();
        save.write_aside(&aside)?;
        let machine = save::Machine {
            config: &self.machine.config,
            about: snapshot::About::default(),
            sections: vec![Section::encode("vcpu", 0, 1, &7_u64).unwrap()],
            stamp: stamp.clone(),
        };
        let save::Saved { report, base, .. } = save.finish(machine)?;
        self.tracker.saved(base);
        Ok((then, report))
    }

    fn assert_loads(&self, tag: &str, ram: &[Vec<u8>]) {
        let checkpoint = Checkpoint::open(&self.machine.nodes, "d0", tag).unwrap();
        let fresh = new_ram();
        checkpoint.read_ram(&fresh, true, 1, &Progress::default()).unwrap();
        assert!(contents(&fresh) == ram, "RAM of {tag}");
    }

    fn disks(&self) -> Vec<Disk> {
        self.machine.disks()
    }
}

#[test]
fn a_failure_at_any_step_leaves_the_disks_and_loses_nothing_for_the_next_save() {
    let mut failures = 0;
    for (disk, step) in [
        (0, "create"),
        (1, "create"),
        (0, "write_vmstate"),
        (0, "zero_vmstate"),
        (0, "switch"),
        (1, "switch"),
        (0, "prepare"),
        (1, "prepare"),
        (0, "publish"),
        (1, "publish"),
    ] {
        let mut live = Live::new();
        for after in 0.. {
            live.run();
            let before = live.disks();
            live.machine.images[disk].fail(step, after);
            let result = live.save("t", &Progress::default());
            live.machine.images[disk].mend();
            live.machine.assert_no_open_changes();
            match result {
                Ok((ram, _)) => {
                    live.assert_loads("t", &ram);
                    assert!(after > 0, "{step} was never reached");
                    break;
                }
                Err(error) => {
                    let text = error.to_string();
                    assert!(text.contains(&format!("{step} was made to fail")), "{text}");
                    assert_eq!(live.disks(), before, "{step} {after}");
                    failures += 1;
                }
            }
            let tag = format!("after{after}");
            let (ram, report) = live.save(&tag, &Progress::default()).unwrap();
            assert!(report.incremental);
            live.assert_loads(&tag, &ram);
        }
    }
    assert!(failures > 20, "{failures}");
}

#[test]
fn an_area_that_cannot_be_inherited_is_written_wholly() {
    let mut live = Live::new();
    live.run();
    live.machine.images[0].fail("inherit_vmstate", 0);
    let (ram, report) = live.save("t", &Progress::default()).unwrap();
    assert!(!report.incremental);
    live.assert_loads("t", &ram);
}

#[test]
fn a_cancel_at_any_write_leaves_the_disks_and_loses_nothing_for_the_next_save() {
    for after in 0.. {
        let mut live = Live::new();
        live.run();
        let before = live.disks();
        let progress = Arc::new(Progress::default());
        let writes = std::sync::atomic::AtomicUsize::new(0);
        let theirs = Arc::clone(&progress);
        live.machine.images[0].on_write(move || {
            if writes.fetch_add(1, std::sync::atomic::Ordering::Relaxed) == after {
                theirs.cancel();
            }
        });
        match live.save("t", &progress) {
            Err(SaveError::Cancelled) => assert_eq!(live.disks(), before, "{after}"),
            Err(error) => panic!("{error}"),
            Ok((ram, _)) => {
                live.assert_loads("t", &ram);
                assert!(after > 5, "{after}");
                break;
            }
        }
        live.machine.images[0].on_write(|| {});
        live.machine.assert_no_open_changes();
        let (ram, _) = live.save("u", &Progress::default()).unwrap();
        live.assert_loads("u", &ram);
    }
}
