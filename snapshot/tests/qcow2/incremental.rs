//! Checkpoints that write only what changed, with a guest that goes on writing at any moment.

use block::Progress;
use block::qcow2::Compression;
use ram::MmapRegion;
use snapshot::save::{Machine, Room, Save, SaveSetup, Saved, set_aside};
use snapshot::{
    Checkpoint, GuestMemory, MachineConfig, PageSet, SaveImages, SaveReport, Section, Stamp,
    Tracker, delete,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::images::{Images, MIB, contents, ram, scribble};

/// A guest, and what its RAM was at each checkpoint.
pub(crate) struct Chain {
    pub(crate) images: Images,
    pub(crate) memory: GuestMemory,
    tracker: Tracker,
    pub(crate) saved: Vec<(String, Vec<u8>)>,
    pub(crate) random: fastrand::Rng,
    /// Of the checkpoints that are saved from now on.
    pub(crate) compress: Option<Compression>,
}

impl Chain {
    pub(crate) fn new(options: &str) -> Self {
        let memory = ram();
        Self {
            images: Images::create(options),
            tracker: Tracker::new(&PageSet::of(&memory)),
            memory,
            saved: Vec::new(),
            random: fastrand::Rng::with_seed(11),
            compress: None,
        }
    }

    /// What was written since the last time, as vm-memory noted it.
    fn collect(&mut self) -> PageSet {
        let mut written = PageSet::of(&self.memory);
        for (at, region) in self.memory.iter().enumerate() {
            MmapRegion::bitmap(region)
                .written()
                .take(|first, bits| written.insert_words_at(at, first, &[bits]));
        }
        self.tracker.note(&written);
        self.tracker.take()
    }

    /// The guest runs for a while.
    pub(crate) fn run(&mut self) {
        for _ in 0..self.random.u32(1..4) {
            let at = GuestAddress(self.random.u64(0..33 * 256) * 4096);
            let len =
                self.random.usize(1..3 * 4096).min((33 << 20) - usize::try_from(at.0).unwrap());
            let byte = if self.random.bool() { 0 } else { self.random.u8(1..) };
            self.memory.write_slice(&vec![byte; len], at).unwrap();
        }
        if self.random.u8(0..8) == 0 {
            scribble(&self.memory, self.random.u8(0..50));
        }
        if self.random.u8(0..4) == 0 {
            let at = GuestAddress(self.random.u64(0..31) * MIB);
            self.memory.write_slice(&vec![0; 2 << 20], at).unwrap();
        }
        let tail = GuestAddress((4 << 30) + self.random.u64(0..769) * 4096);
        self.memory.write_obj(self.random.u8(..), tail).unwrap();
    }

    pub(crate) fn save(&mut self, tag: &str, live: bool) -> SaveReport {
        let stamp = Stamp {
            tag: tag.to_owned(),
            date_sec: 1_700_000_000,
            date_nsec: self.random.u32(0..1_000_000_000),
            vm_clock_nsec: 5,
        };
        let base = self.tracker.base().cloned();
        let nodes = self.images.nodes.clone();
        let (images, progress) = (SaveImages::of(&nodes, "d0"), Progress::default());
        let memory = self.memory.clone();
        let setup = SaveSetup {
            nodes: &nodes,
            vmstate: "d0",
            stamp: &stamp,
            base: base.as_ref(),
            compress: self.compress,
            absent: false,
            state_bytes: 1000,
            ram: &memory,
            progress: &progress,
            threads: 3,
        };
        let mut save = Save::begin(&images, setup).unwrap();
        let mut all = !save.is_incremental();
        let rounds = if live { self.random.u32(1..4) } else { 0 };
        for _ in 0..rounds {
            let mut pages = self.collect();
            if std::mem::take(&mut all) {
                pages.insert_all();
            }
            save.write(&pages).unwrap();
            self.run();
        }
        let mut pages = self.collect();
        if all {
            pages.insert_all();
        }
        save.switch().unwrap();
        self.saved.push((tag.to_owned(), contents(&self.memory)));
        let room = Room::new(self.random.u64(0..100));
        let aside = set_aside(&self.memory, pages, room);
        if live {
            self.run();
        }
        save.write_aside(&aside).unwrap();
        let machine = Machine {
            config: &MachineConfig::default(),
            about: snapshot::About::default(),
            sections: vec![Section::encode("vcpu", 0, 1, tag).unwrap()],
            stamp: stamp.clone(),
        };
        let Saved { report, base, .. } = save.finish(machine).unwrap();
        self.tracker.saved(base);
        report
    }

    /// Loads a checkpoint, and looks whether RAM is that of it.
    pub(crate) fn load(&mut self, at: usize) {
        let (tag, ram) = &self.saved[at];
        assert_eq!(&self.images.load(tag, &self.memory), tag);
        assert!(contents(&self.memory) == *ram, "RAM of {tag}");
        let base = Checkpoint::open(&self.images.nodes, "d0", tag).unwrap().base();
        self.collect();
        self.tracker.loaded(base);
    }

    /// Deletes all checkpoints in any order; each is whole until it goes.
    pub(crate) fn delete_all(&mut self) {
        self.images.check();
        while !self.saved.is_empty() {
            for at in 0..self.saved.len() {
                self.load(at);
            }
            let at = self.random.usize(0..self.saved.len());
            let (tag, _) = self.saved.remove(at);
            delete(&self.images.nodes, &tag).unwrap();
            self.images.check();
        }
    }
}

fn chain_of_ten(options: &str) {
    let mut chain = Chain::new(options);
    for n in 0..10 {
        chain.run();
        let report = chain.save(&format!("t{n}"), n % 3 != 2);
        assert_eq!(report.incremental, n > 0);
        if n == 5 {
            chain.load(2);
        }
    }
    chain.delete_all();
}

#[test]
fn ten_checkpoints_are_right_whichever_of_them_are_deleted_with_512_byte_clusters() {
    chain_of_ten("cluster_size=512");
}

#[test]
fn ten_checkpoints_are_right_whichever_of_them_are_deleted_with_64_kib_clusters() {
    chain_of_ten("cluster_size=64k");
}

#[test]
fn ten_checkpoints_are_right_whichever_of_them_are_deleted_with_2_mib_clusters() {
    chain_of_ten("cluster_size=2M");
}

#[test]
fn ten_checkpoints_are_right_whichever_of_them_are_deleted_in_version_2_images() {
    chain_of_ten("compat=0.10");
}

#[test]
fn a_second_checkpoint_writes_only_what_changed_and_zeroes_give_space_back() {
    let mut chain = Chain::new("cluster_size=64k");
    scribble(&chain.memory, 3);
    let first = chain.save("a", false);
    assert!(!first.incremental);
    assert!(first.stored_bytes > 6 * MIB, "{first:?}");
    chain.memory.write_obj(9_u8, GuestAddress(20 * MIB)).unwrap();
    let second = chain.save("b", false);
    assert!(second.incremental);
    // Set aside, so it is the page alone.
    assert_eq!(second.stored_bytes, 4096);
    let third = chain.save("c", false);
    assert_eq!(third.stored_bytes, 0);
    assert_eq!(third.bytes_written, third.state_bytes);
    // What is zero now is released by the next one, and what it held when all the others are gone.
    chain.memory.write_slice(&vec![0; 33 << 20], GuestAddress(0)).unwrap();
    chain.memory.write_slice(&vec![0; (3 << 20) + 4096], GuestAddress(4 << 30)).unwrap();
    let fourth = chain.save("d", true);
    assert!(fourth.incremental);
    let before = chain.images.paths[0].metadata().unwrap();
    for tag in ["a", "b", "c"] {
        delete(&chain.images.nodes, tag).unwrap();
    }
    chain.images.check();
    chain.saved.drain(..3);
    chain.load(0);
    let stored = |meta: &std::fs::Metadata| std::os::unix::fs::MetadataExt::blocks(meta) * 512;
    let after = chain.images.paths[0].metadata().unwrap();
    assert!(stored(&after) + 6 * MIB < stored(&before), "{} {}", stored(&before), stored(&after));
}

/// Breaks the last entry of the last L2 table of the snapshot `id`, which maps RAM.
fn damage_table(path: &std::path::Path, id: &str) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let be64 = |at: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    };
    // The only snapshot: place and entries of its L1 table, and the length of its id.
    let entry = be64(64);
    let (l1, second) = (be64(entry), be64(entry + 8));
    assert_eq!(second & 0xffff, id.len() as u64);
    let tables = (second >> 32).checked_sub(1).unwrap();
    let last = (0..=tables).rev().map(|n| be64(l1 + n * 8)).find(|table| *table != 0).unwrap();
    let table = last & 0x00ff_ffff_ffff_fe00;
    let at = (0..8192).rev().map(|n| table + n * 8).find(|at| be64(*at) != 0).unwrap();
    // Not the start of a cluster.
    file.write_all_at(&(be64(at) | 0x200).to_be_bytes(), at).unwrap();
}

#[test]
fn a_base_with_a_damaged_table_is_not_built_upon_and_the_next_checkpoint_is_whole() {
    let mut chain = Chain::new("cluster_size=64k");
    scribble(&chain.memory, 3);
    chain.save("a", false);
    chain.run();
    chain.images.close();
    damage_table(&chain.images.paths[0], "1");
    chain.images.open();
    let report = chain.save("b", true);
    assert!(!report.incremental);
    // The damaged one fails alone.
    assert!(Checkpoint::open(&chain.images.nodes, "d0", "b").is_ok());
    chain.load(1);
    chain.run();
    assert!(chain.save("c", true).incremental);
    chain.load(2);
}

#[test]
fn a_base_that_was_deleted_or_is_elsewhere_is_not_built_upon() {
    let mut chain = Chain::new("cluster_size=64k");
    chain.run();
    chain.save("a", false);
    chain.run();
    delete(&chain.images.nodes, "a").unwrap();
    // The id is used again, by another.
    assert!(!chain.save("b", true).incremental);
    let mut base = chain.tracker.base().cloned().unwrap();
    base.snapshot.date_nsec ^= 1;
    chain.collect();
    chain.tracker.saved(base.clone());
    assert!(!chain.save("c", false).incremental);
    base.node = "d1".to_owned();
    chain.collect();
    chain.tracker.saved(base);
    assert!(!chain.save("d", false).incremental);
    chain.images.check();
    chain.saved.remove(0);
    for at in 0..3 {
        chain.load(at);
    }
}

#[test]
fn a_save_that_is_dropped_at_any_step_leaves_the_images_as_they_were() {
    let mut chain = Chain::new("cluster_size=64k");
    chain.run();
    chain.save("a", false);
    for step in 0..4 {
        chain.run();
        let stamp = Stamp { tag: "x".into(), date_sec: 1, date_nsec: 2, vm_clock_nsec: 3 };
        let base = chain.tracker.base().cloned();
        let nodes = chain.images.nodes.clone();
        let (images, progress) = (SaveImages::of(&nodes, "d0"), Progress::default());
        let memory = chain.memory.clone();
        let setup = SaveSetup {
            nodes: &nodes,
            vmstate: "d0",
            stamp: &stamp,
            base: base.as_ref(),
            compress: chain.compress,
            absent: false,
            state_bytes: 1000,
            ram: &memory,
            progress: &progress,
            threads: 2,
        };
        let mut save = Save::begin(&images, setup).unwrap();
        let pages = chain.collect();
        if step > 0 {
            save.write(&pages).unwrap();
        }
        if step > 1 {
            save.switch().unwrap();
            chain.images.write(1, 7);
        }
        if step > 2 {
            save.write_aside(&set_aside(&memory, pages, Room::new(0))).unwrap();
        }
        drop(save);
        chain.tracker.failed();
        drop(images);
        drop(nodes);
        chain.images.check();
        chain.save(&format!("b{step}"), true);
        let last = chain.saved.len() - 1;
        chain.load(last);
        chain.load(0);
    }
}
