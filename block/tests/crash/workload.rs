//! Random work on an image, decided by a seed, with a timeline of what was promised.

use std::ops::Range;
use std::sync::Arc;

use block::bitmap::NewBitmap;
use block::qcow2::check::{self, Repair};
use block::queue::{OwnedBufs, Queue, Request};
use block::{
    NewSnapshot, Node, Preallocation, Progress, ReadBuf, Result, SnapshotCreate, Together, WriteBuf,
};

use crate::common::Random;
use crate::kinds::{BITMAP, Base, Start};
use crate::pages::Pages;
use crate::parallel;
use crate::record::{Entry, Host, Reached};
use crate::timeline::{Event, Snap, Timeline, What};

/// What a workload left: the files before it, the log, the promises.
pub(crate) struct Recorded {
    pub(crate) files: Vec<Pages>,
    pub(crate) log: Vec<Entry>,
    pub(crate) timeline: Timeline,
    /// Parts of the log that repairs made.
    repairs: Vec<Range<usize>>,
    pub(crate) reached: Reached,
}

impl Recorded {
    /// Whether a repair was under way at a cut.
    pub(crate) fn repairing(&self, cut: usize) -> bool {
        self.repairs.iter().any(|part| part.start < cut && cut < part.end)
    }
}

/// A workload under way.
struct Work<'a> {
    base: &'a Base,
    host: Host,
    random: Random,
    /// Of the node that is open.
    queue: Option<Queue>,
    disk: Vec<u8>,
    snaps: Vec<Arc<Snap>>,
    events: Vec<Event>,
    /// Makes what is written, and the tags, different from all before.
    count: u64,
}

/// The generator for a seed: neighbouring seeds shall have nothing in common.
pub(crate) fn random_of(seed: u64) -> Random {
    let mut random = Random(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    random.next();
    random
}

/// Runs a workload of so many steps; with `parallel`, steps of several threads among them.
pub(crate) fn record(base: &Base, seed: u64, steps: usize, parallel: bool) -> Recorded {
    let mut work = Work {
        base,
        host: Host::new(base.files.clone()),
        random: random_of(seed),
        queue: None,
        disk: base.disk.clone(),
        snaps: Vec::new(),
        events: Vec::new(),
        count: 0,
    };
    let (mut done, mut repairs) = (0, Vec::new());
    while done < steps {
        if work.random.below(4) == 0 {
            let repair = check::Options { repair: Repair::Leaks, progress: None };
            let start = work.host.now();
            let report = check::check(&*work.host.file(0), &repair).unwrap();
            assert!(report.is_clean(), "seed {seed}: {report:?}");
            repairs.push(start..work.host.now());
        }
        let image = Arc::new(base.open(&work.host, false).unwrap());
        let node = Arc::new(Node::of_qcow2("d", image));
        work.queue = Some(Queue::new(node.clone()).unwrap());
        // Opened and closed a few times: closing writes tables too.
        let until = steps.min(done + 10 + work.random.below(30) as usize);
        for _ in done..until {
            match parallel && work.random.below(6) == 0 {
                true => work.parallel(&node),
                false => work.step(&node),
            }
        }
        done = until;
        let mut now = vec![0; node.size() as usize];
        node.read(0, &[ReadBuf::new(&mut now)]).unwrap();
        assert!(now == work.disk, "seed {seed}: the disk is wrong before any crash");
        work.queue = None;
    }
    let timeline =
        Timeline { events: work.events, first: Arc::new(base.disk.clone()), snaps: Vec::new() };
    Recorded {
        files: base.files.clone(),
        log: work.host.log(),
        timeline,
        repairs,
        reached: work.host.reached(),
    }
}

impl Work<'_> {
    fn range(&mut self) -> Range<usize> {
        let size = self.disk.len() as u64;
        let len = match self.random.below(8) {
            0 => self.random.below(600) + 1,
            1..4 => 512 * (self.random.below(16) + 1),
            4..6 => 4096 * (self.random.below(6) + 1),
            6 => self.random.below(size / 8) + 1,
            _ => 65536 * (self.random.below(3) + 1),
        };
        // Often near the same places, so that clusters are overwritten.
        let mut start = match self.random.below(3) {
            0 => self.random.below(size),
            1 => self.random.below(8) * (size / 8),
            _ => self.random.below(size.min(40_000)),
        };
        if self.random.below(4) != 0 {
            start &= !511;
        }
        let len = len.min(size - start);
        start as usize..(start + len) as usize
    }

    /// Bytes that were never written before, different in each 16 of them.
    fn bytes(&mut self, len: usize) -> Vec<u8> {
        self.count += 1;
        let of = |n: usize| [self.count.to_be_bytes(), (n as u64 + 1).to_be_bytes()].concat();
        (0..len.div_ceil(16)).flat_map(of).take(len).collect()
    }

    /// Does something and notes which part of the log it made. Nothing is noted of what failed.
    fn note<T>(&mut self, act: impl FnOnce() -> Result<T>, what: What) -> Result<T> {
        let start = self.host.now();
        let done = act()?;
        self.events.push(Event { start, end: self.host.now(), what });
        Ok(done)
    }

    fn step(&mut self, node: &Node) {
        match self.random.below(40) {
            0..16 => self.write(node),
            16..20 => self.zero(node),
            20..22 => self.discard(node),
            22..27 => self.flush(node),
            27..32 if self.base.kind.has_snapshots() => self.create(node),
            32..34 => self.revert(node),
            34..37 => self.delete(node),
            37 if self.base.kind.start == Start::Bitmap => self.bitmap(node),
            37 => self.resize(node),
            38 => self.write_compressed(node),
            _ => self.read(node),
        }
    }

    fn resize(&mut self, node: &Node) {
        let first = self.base.disk.len() as u64 / 512;
        let size = 512 * (first / 2 + self.random.below(first)) as usize;
        let mode = match self.random.below(3) {
            0 if size >= self.disk.len() => Preallocation::Metadata,
            1 if size >= self.disk.len() => Preallocation::Full,
            _ => Preallocation::Off,
        };
        let progress = Progress::default();
        let act = || node.format().resize(size as u64, mode, &progress);
        match self.note(act, What::Resized { size }) {
            Ok(()) => self.disk.resize(size, 0),
            // Version 2 has no place for the size of a snapshot.
            Err(e) if self.base.kind.options.contains("compat=0.10") => {
                assert!(e.to_string().contains("snapshots"), "{e}");
            }
            Err(e) => panic!("{e}"),
        }
    }

    fn write_compressed(&mut self, node: &Node) {
        let Some(cluster) = node.format().compressed_cluster() else { return };
        let cluster = cluster as usize;
        let start = self.range().start / cluster * cluster;
        let clusters = 1 + self.random.below(4) as usize;
        let end = (start + clusters * cluster).min(self.disk.len());
        let bytes = self.bytes(end - start);
        self.disk[start..end].copy_from_slice(&bytes);
        let what = What::Changed { at: start, bytes: bytes.clone() };
        let format = node.format();
        let act = || format.write_compressed(start as u64, &[WriteBuf::new(&bytes)]);
        self.note(act, what).unwrap();
        node.note_write(start as u64, bytes.len() as u64);
    }

    /// A bitmap more, or one less.
    fn bitmap(&mut self, node: &Node) {
        let names: Vec<_> = node.bitmaps().infos().into_iter().map(|info| info.name).collect();
        match names.iter().find(|name| *name != BITMAP) {
            Some(name) if self.random.below(2) == 0 => node.remove_bitmap(name).unwrap(),
            _ => {
                self.count += 1;
                // Long ones make a directory of many sectors.
                let name = format!(
                    "bitmap {} {}",
                    self.count,
                    "x".repeat(self.random.below(900) as usize)
                );
                let granularity = Some(512 << self.random.below(4));
                let new = NewBitmap { name: &name, granularity, persistent: true, disabled: false };
                node.add_bitmap(&new).unwrap();
            }
        }
    }

    fn parallel(&mut self, node: &Node) {
        let seed = self.random.next();
        self.events.extend(parallel::run(node, &self.host, &mut self.disk, seed));
    }

    fn write(&mut self, node: &Node) {
        let span = self.range();
        let bytes = self.bytes(span.len());
        self.disk[span.clone()].copy_from_slice(&bytes);
        let what = What::Changed { at: span.start, bytes: bytes.clone() };
        let at = span.start as u64;
        match self.queue.take() {
            // As a device does it. One request at a time, so that the log follows from the seed.
            Some(mut queue) if self.random.below(2) == 0 => {
                let write = || {
                    queue.submit(Request::write(0, at, false, OwnedBufs::from_vec(bytes)));
                    let mut done = Vec::new();
                    queue.drain(&mut done);
                    done.pop().map_or(Ok(()), |completion| completion.result)
                };
                self.note(write, what).unwrap();
                self.queue = Some(queue);
            }
            queue => {
                self.queue = queue;
                self.note(|| node.write(at, &[WriteBuf::new(&bytes)]), what).unwrap();
            }
        }
    }

    fn zero(&mut self, node: &Node) {
        let span = self.range();
        let unmap = self.random.below(2) == 0;
        self.disk[span.clone()].fill(0);
        let what = What::Changed { at: span.start, bytes: vec![0; span.len()] };
        let (at, len) = (span.start as u64, span.len() as u64);
        self.note(|| node.write_zeroes(at, len, unmap), what).unwrap();
    }

    fn discard(&mut self, node: &Node) {
        let span = self.range();
        let start = self.host.now();
        node.discard(span.start as u64, span.len() as u64).unwrap();
        // Zeroes or as before, for every byte.
        let mut bytes = vec![1; span.len()];
        node.read(span.start as u64, &[ReadBuf::new(&mut bytes)]).unwrap();
        for (now, before) in bytes.iter().zip(&self.disk[span.clone()]) {
            assert!(*now == 0 || now == before, "discarded at {span:#x?}");
        }
        self.disk[span.clone()].copy_from_slice(&bytes);
        let what = What::Changed { at: span.start, bytes };
        self.events.push(Event { start, end: self.host.now(), what });
    }

    fn flush(&mut self, node: &Node) {
        let what = What::Flushed { disk: Arc::new(self.disk.clone()) };
        self.note(|| node.flush(), what).unwrap();
    }

    fn read(&mut self, node: &Node) {
        let span = self.range();
        let mut bytes = vec![1; span.len()];
        node.read(span.start as u64, &[ReadBuf::new(&mut bytes)]).unwrap();
        assert!(bytes == self.disk[span.clone()], "read at {span:#x?}");
    }

    /// What a guest does while a change of the snapshots is under way.
    fn between(&mut self, node: &Node) {
        for _ in 0..self.random.below(4) {
            match self.random.below(4) {
                0 => self.flush(node),
                1 => self.zero(node),
                _ => self.write(node),
            }
        }
    }

    fn create(&mut self, node: &Node) {
        self.count += 1;
        let new = NewSnapshot {
            tag: format!("tag {}", self.count),
            date_sec: 1_700_000_000,
            date_nsec: 5000,
            vm_clock_nsec: self.count,
        };
        let format = node.format();
        let mut change = format.create_snapshot(&new).unwrap();
        let cluster = change.cluster_size() as usize;
        let mut vm = Vec::new();
        if self.random.below(2) == 0
            && let Some((id, from)) = self.pick(node)
        {
            assert_eq!(change.inherit_vmstate(&id).unwrap(), from.vm.len() as u64);
            vm.clone_from(&from.vm);
            self.rewrite(&*change, &mut vm);
        }
        for _ in 0..self.random.below(4) {
            // A hole, then a part.
            vm.resize(vm.len() + cluster * self.random.below(3) as usize, 0);
            let clusters = 1 + self.random.below(3) as usize;
            let bytes = self.bytes(cluster * clusters);
            change.write_vmstate(vm.len() as u64, &[WriteBuf::new(&bytes)]).unwrap();
            vm.extend(bytes);
            self.between(node);
        }
        change.set_vmstate_size(vm.len() as u64);
        if self.random.below(8) == 0 {
            return change.rollback().unwrap();
        }
        let snap = Arc::new(Snap { tag: new.tag, disk: Arc::new(self.disk.clone()), vm });
        // From the switch on the guest's own changes of tables take the snapshot's references.
        let early = self.random.below(2) == 0;
        if early {
            change.switch().unwrap();
            self.between(node);
        }
        let prepared = match early && self.random.below(8) == 0 {
            true => None,
            false => Some(change.prepare()),
        };
        match prepared {
            Some(Ok(())) => {}
            None => return change.rollback().unwrap(),
            // One or two bits do not count many references.
            Some(Err(e)) if e.to_string().contains("the refcount of cluster") => {
                assert!(self.base.kind.options.contains("refcount_bits"), "{e}");
                return change.rollback().unwrap();
            }
            Some(Err(e)) => panic!("{e}"),
        }
        self.between(node);
        if self.random.below(8) == 0 {
            return change.rollback().unwrap();
        }
        self.note(|| change.publish(), What::Added { snap: snap.clone() }).unwrap();
        self.between(node);
        if self.random.below(8) == 0 {
            let what = What::Removed { tag: snap.tag.clone() };
            return self.note(|| change.rollback(), what).unwrap();
        }
        change.finish().unwrap();
        self.snaps.push(snap);
    }

    /// Changes pages of VM state, some of them twice.
    fn rewrite(&mut self, change: &dyn SnapshotCreate, vm: &mut [u8]) {
        let unit = change.cluster_size().min(4096) as usize;
        for _ in 0..if vm.is_empty() { 0 } else { self.random.below(5) } {
            let at = self.random.below((vm.len() / unit) as u64) as usize * unit;
            let len = (unit * (1 + self.random.below(3) as usize)).min(vm.len() - at);
            if self.random.below(3) == 0 {
                change.zero_vmstate(at as u64, len as u64).unwrap();
                vm[at..at + len].fill(0);
            } else {
                let bytes = self.bytes(len);
                change.write_vmstate(at as u64, &[WriteBuf::new(&bytes)]).unwrap();
                vm[at..at + len].copy_from_slice(&bytes);
            }
        }
    }

    fn delete(&mut self, node: &Node) {
        let Some((id, snap)) = self.pick(node) else { return };
        let format = node.format();
        let mut change = format.delete_snapshot(&id).unwrap();
        change.prepare().unwrap();
        self.between(node);
        if self.random.below(8) == 0 {
            return change.rollback().unwrap();
        }
        self.note(|| change.publish(), What::Removed { tag: snap.tag.clone() }).unwrap();
        self.between(node);
        if self.random.below(8) == 0 {
            return self.note(|| change.rollback(), What::Added { snap }).unwrap();
        }
        self.snaps.retain(|s| s.tag != snap.tag);
        change.finish().unwrap();
    }

    fn revert(&mut self, node: &Node) {
        let Some((id, snap)) = self.pick(node) else { return };
        let format = node.format();
        let mut change = format.revert_snapshot(&id).unwrap();
        let refused = |e: &block::Error| {
            e.to_string().contains("the refcount of cluster")
                && self.base.kind.options.contains("refcount_bits")
        };
        match change.prepare() {
            Ok(()) => {}
            Err(e) if refused(&e) => return,
            Err(e) => panic!("{e}"),
        }
        self.between(node);
        if self.random.below(8) == 0 {
            return change.rollback().unwrap();
        }
        let old = Arc::new(self.disk.clone());
        if self.random.below(2) == 0 {
            self.note(|| change.show(&Together::new(1)), What::Shown { disk: snap.disk.clone() })
                .unwrap();
            self.disk.clone_from(&snap.disk);
            self.between(node);
            if self.random.below(8) == 0 {
                self.disk.clone_from(&old);
                return self.note(|| change.rollback(), What::Reverted { disk: old }).unwrap();
            }
            let what = What::Flushed { disk: Arc::new(self.disk.clone()) };
            self.note(|| change.publish(), what).unwrap();
        } else {
            self.note(|| change.publish(), What::Reverted { disk: snap.disk.clone() }).unwrap();
            self.disk.clone_from(&snap.disk);
        }
        self.between(node);
        if self.random.below(8) == 0 {
            self.disk.clone_from(&old);
            return self.note(|| change.rollback(), What::Reverted { disk: old }).unwrap();
        }
        change.finish().unwrap();
    }

    fn pick(&mut self, node: &Node) -> Option<(String, Arc<Snap>)> {
        if self.snaps.is_empty() {
            return None;
        }
        let at = self.random.below(self.snaps.len() as u64) as usize;
        let snap = self.snaps[at].clone();
        let id = crate::common::id_of(&*node.format(), &snap.tag);
        Some((id, snap))
    }
}
