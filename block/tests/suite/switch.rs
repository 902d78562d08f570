//! The snapshot point ahead of `prepare`: what is written after it is not the snapshot's, whoever takes
//! the references.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use block::qcow2::create::{CreateOptions, create as create_image};
use block::qcow2::{Probe, Qcow2};
use block::storage::memory::MemoryStorage;
use block::{Format, Preallocation, Progress};

use crate::common::{
    self, Random, check, create, have_qemu_img, land, load, new_snapshot, open, path,
    qemu_contents, qemu_img,
};

const K: usize = 1024;
const PART: usize = 256 * K;
const WRITERS: usize = 3;

/// What a writer did: zeroes or bytes at a place in its part.
type Op = (Range<usize>, Vec<u8>);

/// Changes a part of the disk until told to stop; gives all it did, in order.
fn writer(
    format: &dyn Format,
    start: usize,
    seed: u64,
    done: &AtomicUsize,
    stop: &AtomicBool,
) -> Vec<Op> {
    let mut random = Random(seed);
    let mut ops = Vec::new();
    while !stop.load(Ordering::Acquire) {
        let at = random.below((PART - 512) as u64) as usize;
        let len = (1 + random.below(20_000) as usize).min(PART - at);
        let (span, guest) = (at..at + len, (start + at) as u64);
        let bytes = match random.below(4) {
            0 => {
                format.write_zeroes(guest, len as u64, random.below(2) == 0).unwrap();
                vec![0; len]
            }
            _ => {
                let bytes = random.bytes(len as u64);
                common::write(format, guest, &bytes);
                bytes
            }
        };
        ops.push((span, bytes));
        done.fetch_add(1, Ordering::AcqRel);
    }
    ops
}

/// The disk at a snapshot point, and how much each writer had done before it and at most.
struct Taken {
    tag: String,
    done: Vec<(usize, usize)>,
}

/// Takes snapshots beside the writers, and gives up some of them at any step.
fn saver(format: &dyn Format, done: &[AtomicUsize], random: &mut Random) -> Vec<Taken> {
    let counts = || done.iter().map(|n| n.load(Ordering::Acquire)).collect::<Vec<_>>();
    // Not before the others have come so far.
    let wait = |more: usize| {
        let from = counts();
        while counts().iter().zip(&from).any(|(now, from)| now < &(from + more)) {
            std::thread::yield_now();
        }
    };
    let mut taken = Vec::new();
    for round in 0..12 {
        wait(2);
        let tag = format!("t{round}");
        let mut change = format.create_snapshot(&new_snapshot(&tag)).unwrap();
        let before = counts();
        change.switch().unwrap();
        // One request of each may have been let in, but not told yet.
        let span = before.into_iter().zip(counts().into_iter().map(|n| n + 1)).collect();
        wait(random.below(4) as usize);
        let steps = random.below(8);
        if steps > 0 {
            change.prepare().unwrap();
            wait(random.below(3) as usize);
        }
        if steps > 1 {
            change.publish().unwrap();
            wait(random.below(3) as usize);
        }
        match steps {
            0..3 => change.rollback().unwrap(),
            _ => {
                change.finish().unwrap();
                taken.push(Taken { tag, done: span });
            }
        }
    }
    taken
}

/// The part after so many operations.
fn after(ops: &[Op], many: usize) -> Vec<u8> {
    let mut part = vec![0; PART];
    for (span, bytes) in &ops[..many] {
        part[span.clone()].copy_from_slice(bytes);
    }
    part
}

/// Whether a part is that after so many operations, with anything of the next: one that is carried out
/// in pieces may have the switch between them.
fn is_of(part: &[u8], ops: &[Op], many: usize) -> bool {
    let mut was = after(ops, many);
    if let Some((span, bytes)) = ops.get(many) {
        for (was, (now, is)) in
            was[span.clone()].iter_mut().zip(bytes.iter().zip(&part[span.clone()]))
        {
            if now == is {
                *was = *now;
            }
        }
    }
    was == part
}

fn writers_beside_snapshots(options: &str) {
    if !have_qemu_img("switch under writers") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", &format!("{}", WRITERS * PART), options);
    let (graph, node) = open(&image);
    let image_format = node.format();
    let format: &dyn Format = &*image_format;
    let done: Vec<_> = (0..WRITERS).map(|_| AtomicUsize::new(0)).collect();
    let stop = AtomicBool::new(false);
    let (taken, ops) = std::thread::scope(|scope| {
        let threads: Vec<_> = done
            .iter()
            .enumerate()
            .map(|(n, done)| {
                let stop = &stop;
                scope.spawn(move || writer(format, n * PART, 77 + n as u64, done, stop))
            })
            .collect();
        let flusher = scope.spawn(|| {
            while !stop.load(Ordering::Acquire) {
                format.flush().unwrap();
            }
        });
        let taken = saver(format, &done, &mut Random(0x5eed ^ options.len() as u64));
        stop.store(true, Ordering::Release);
        flusher.join().unwrap();
        (taken, threads.into_iter().map(|t| t.join().unwrap()).collect::<Vec<_>>())
    });
    let now: Vec<u8> = ops.iter().flat_map(|ops| after(ops, ops.len())).collect();
    assert!(common::read_all(format) == now, "the disk is wrong");
    assert!(!taken.is_empty());
    drop((graph, node, image_format));
    check(&image);
    assert!(qemu_contents(dir.path(), &image, None) == now);
    for Taken { tag, done } in &taken {
        let disk = qemu_contents(dir.path(), &image, Some(tag));
        for (n, (ops, (least, most))) in ops.iter().zip(done).enumerate() {
            let part = &disk[n * PART..(n + 1) * PART];
            let fits = (*least..=*most.min(&ops.len())).any(|many| is_of(part, ops, many));
            assert!(fits, "{tag}: part {n} is of no time between {least} and {most} requests");
        }
    }
    // Deleted in another order than made.
    for Taken { tag, .. } in taken.iter().step_by(2).chain(taken.iter().skip(1).step_by(2)) {
        qemu_img(&["snapshot", "-d", tag, &path(&image)]);
        check(&image);
    }
    assert!(qemu_contents(dir.path(), &image, None) == now);
}

macro_rules! kinds {
    ($($name:ident: $options:expr;)*) => {
        $(#[test] fn $name() { writers_beside_snapshots($options); })*
    };
}

kinds! {
    a_snapshot_is_of_its_switch_under_writers_on_clusters_of_512: "cluster_size=512";
    a_snapshot_is_of_its_switch_under_writers_on_clusters_of_4k: "cluster_size=4k";
    a_snapshot_is_of_its_switch_under_writers_on_clusters_of_64k: "";
    a_snapshot_is_of_its_switch_under_writers_with_subclusters: "cluster_size=16k,extended_l2=on";
    a_snapshot_is_of_its_switch_under_writers_with_lazy_refcounts: "cluster_size=1k,lazy_refcounts=on";
}

/// An image in memory, with a disk of `size` bytes in clusters of 512.
fn in_memory(size: u64) -> (Arc<MemoryStorage>, Qcow2) {
    let storage = Arc::new(MemoryStorage::default());
    let options = CreateOptions { size, cluster_size: Some(512), ..CreateOptions::default() };
    create_image(&*storage, None, &options, &Progress::default()).unwrap();
    let image = Qcow2::open(Probe::new(storage.clone()).unwrap(), None, false).unwrap();
    (storage, image)
}

fn put(dir: &Path, storage: &MemoryStorage) -> std::path::PathBuf {
    let image = dir.join("memory.qcow2");
    std::fs::write(&image, storage.bytes()).unwrap();
    image
}

#[test]
fn the_switch_does_no_io_and_can_be_passed_once() {
    let (storage, image) = in_memory(4 << 20);
    common::write(&image, 0, &vec![1; 4 << 20]);
    let mut change = image.create_snapshot(&new_snapshot("s")).unwrap();
    storage.record();
    change.switch().unwrap();
    assert_eq!(storage.recorded(), []);
    let error = change.switch().unwrap_err().to_string();
    assert!(error.contains("passed already"), "{error}");
    let error = image.resize(8 << 20, Preallocation::Off, &Progress::default()).unwrap_err();
    assert!(error.to_string().contains("under way"), "{error}");
    land(&mut *change).unwrap();
}

#[test]
fn what_was_written_since_the_switch_stays_when_the_snapshot_is_given_up() {
    if !have_qemu_img("rollback after the switch") {
        return;
    }
    for steps in 0..3 {
        for flushed in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let (storage, image) = in_memory(1 << 20);
            let mut disk = Random(1).bytes(1 << 20);
            common::write(&image, 0, &disk);
            common::save(&image, "old");
            // A part is shared with a snapshot, a part is the disk's alone.
            common::write(&image, 0, &vec![2; 300_000]);
            disk[..300_000].fill(2);
            image.flush().unwrap();
            let mut change = image.create_snapshot(&new_snapshot("new")).unwrap();
            change.switch().unwrap();
            let mut random = Random(9);
            let mut work = || {
                for _ in 0..20 {
                    let at = random.below((1 << 20) - 9000) as usize;
                    let bytes = random.bytes(1 + at as u64 % 9000);
                    common::write(&image, at as u64, &bytes);
                    disk[at..at + bytes.len()].copy_from_slice(&bytes);
                }
                image.write_zeroes(200_000, 50_000, true).unwrap();
                disk[200_000..250_000].fill(0);
                if flushed {
                    image.flush().unwrap();
                }
            };
            work();
            if steps > 0 {
                change.prepare().unwrap();
                work();
            }
            if steps > 1 {
                change.publish().unwrap();
                work();
            }
            change.rollback().unwrap();
            drop(change);
            assert!(common::read_all(&image) == disk, "{steps} steps");
            drop(image);
            let file = put(dir.path(), &storage);
            check(&file);
            assert!(qemu_contents(dir.path(), &file, None) == disk, "{steps} steps");
            let old = qemu_contents(dir.path(), &file, Some("old"));
            assert!(old == Random(1).bytes(1 << 20), "{steps} steps");
        }
    }
}

#[test]
fn a_write_goes_on_where_the_snapshot_cannot() {
    if !have_qemu_img("failed snapshot point") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "1M", "cluster_size=512,refcount_bits=1");
    let (graph, node) = open(&image);
    let format = node.format();
    common::write(&*format, 0, &[1; 1 << 20]);
    let mut change = format.create_snapshot(&new_snapshot("x")).unwrap();
    change.switch().unwrap();
    common::write(&*format, 100_000, &[2; 100_000]);
    let error = change.prepare().unwrap_err().to_string();
    assert!(error.contains("when the disk was written to"), "{error}");
    assert!(error.contains("would exceed 1 bits"), "{error}");
    common::write(&*format, 150_000, &[3; 100_000]);
    drop(change);
    let disk = common::read_all(&*format);
    assert!(disk[..100_000] == [1; 100_000] && disk[100_000..150_000] == [2; 50_000]);
    assert!(disk[150_000..250_000] == [3; 100_000]);
    drop((graph, node, format));
    check(&image);
}

#[test]
fn several_images_have_one_point_or_no_snapshot() {
    if !have_qemu_img("switch of several images") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let images = ["a", "b", "c"].map(|name| create(dir.path(), name, "4M", "cluster_size=4k"));
    let opened = images.each_ref().map(|image| open(image));
    let formats: Vec<_> = opened.iter().map(|(_, node)| node.format()).collect();
    let fill = |byte: u8| formats.iter().for_each(|f| common::write(&**f, 0, &vec![byte; 2 << 20]));
    fill(1);
    for landed in [false, true] {
        let mut changes: Vec<_> =
            formats.iter().map(|f| f.create_snapshot(&new_snapshot("all")).unwrap()).collect();
        changes.iter().for_each(|change| change.switch().unwrap());
        fill(2);
        for change in changes.iter_mut().take(if landed { 3 } else { 2 }) {
            change.prepare().unwrap();
        }
        fill(3);
        if landed {
            changes.iter_mut().for_each(|change| change.publish().unwrap());
            changes.iter_mut().for_each(|change| change.finish().unwrap());
        }
        drop(changes);
        for format in &formats {
            assert!(common::read(&**format, 0, 2 << 20) == vec![3; 2 << 20]);
            if landed {
                load(&**format, "all");
                assert!(common::read(&**format, 0, 2 << 20) == vec![1; 2 << 20]);
            }
        }
        fill(1);
    }
    drop((formats, opened));
    images.iter().for_each(|image| check(image));
}
