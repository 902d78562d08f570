//! The same random operations by this program on one image and by `qemu-io` on a copy. Both must
//! hold what a plain array holds, read by either program; then the programs change places.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use block::qcow2::{Options, Probe, Qcow2};
use block::raw::Raw;
use block::storage::{FileOptions, FileStorage, Locking, Storage};
use block::{Format, Node};

use crate::common::{self, Random, Start as _, check, create, have_qemu_img, path, qemu_img};

/// Not a whole number of clusters.
const SIZE: usize = (3 << 20) + 3 * 512;

/// What one program does to its image.
#[derive(Debug, Clone)]
enum Op {
    Write(Range<usize>, u8),
    Zero(Range<usize>, bool),
    Discard(Range<usize>),
    Flush,
    Read(Range<usize>),
    Save(String),
    Load(String),
    Delete(String),
}

/// What the disk should hold.
struct Model {
    disk: Vec<u8>,
    /// Bytes that may be zero instead: they were discarded.
    discarded: Vec<bool>,
    snapshots: Vec<(String, Vec<u8>)>,
}

impl Model {
    fn check(&self, disk: &[u8], who: &str) {
        assert_eq!(disk.len(), self.disk.len(), "{who}");
        let wrong = (0..disk.len())
            .find(|at| disk[*at] != self.disk[*at] && !(self.discarded[*at] && disk[*at] == 0));
        if let Some(at) = wrong {
            panic!("{who}: {:#x} instead of {:#x} at {at:#x}", disk[at], self.disk[at]);
        }
    }

    fn set(&mut self, span: Range<usize>, byte: u8) {
        self.disk[span.clone()].fill(byte);
        self.discarded[span].fill(false);
    }
}

fn span(random: &mut Random) -> Range<usize> {
    let len = match random.below(4) {
        0 => random.below(700) + 1,
        1 => 4096 * (random.below(24) + 1),
        2 => random.below(200_000) + 1,
        _ => 65536 * (random.below(5) + 1),
    };
    let mut start = random.below(SIZE as u64);
    if random.below(3) != 0 {
        start &= !0xfff;
    }
    let end = (start + len).min(SIZE as u64);
    start as usize..end as usize
}

/// A session's operations; the model is as after them. Ranges that are discarded are not touched
/// any more until it ends, as their contents are not known.
fn session(random: &mut Random, model: &mut Model, has_snapshots: bool) -> Vec<Op> {
    let mut ops = Vec::new();
    // What was discarded is the same on both again.
    let mut at = 0;
    while let Some(start) = (at..SIZE).find(|at| model.discarded[*at]) {
        let end = (start..SIZE).find(|at| !model.discarded[*at]).unwrap_or(SIZE);
        model.set(start..end, 0);
        ops.push(Op::Zero(start..end, false));
        at = end;
    }
    for _ in 0..25 {
        let span = span(random);
        match random.below(16) {
            0..8 => {
                let byte = random.below(255) as u8 + 1;
                model.set(span.clone(), byte);
                ops.push(Op::Write(span, byte));
            }
            8..11 => {
                model.set(span.clone(), 0);
                ops.push(Op::Zero(span, random.below(2) == 0));
            }
            11 => {
                model.discarded[span.clone()].fill(true);
                ops.push(Op::Discard(span));
            }
            12 => ops.push(Op::Flush),
            _ => ops.push(Op::Read(span)),
        }
    }
    if has_snapshots {
        ops.extend(snapshot_op(random, model));
    }
    ops
}

/// At the end of a session, as `qemu-img` does it: the contents must be known.
fn snapshot_op(random: &mut Random, model: &mut Model) -> Option<Op> {
    let count = model.snapshots.len() as u64;
    let pick = |random: &mut Random| random.below(count) as usize;
    match random.below(4) {
        0 | 1 if count < 4 && !model.discarded.contains(&true) => {
            let tag = format!("t{}", random.next());
            model.snapshots.push((tag.clone(), model.disk.clone()));
            Some(Op::Save(tag))
        }
        2 if count > 0 => {
            let (tag, disk) = &model.snapshots[pick(random)];
            model.disk.clone_from(disk);
            model.discarded.fill(false);
            Some(Op::Load(tag.clone()))
        }
        3 if count > 0 => {
            let at = pick(random);
            Some(Op::Delete(model.snapshots.swap_remove(at).0))
        }
        _ => None,
    }
}

/// The image as a node, with its data file if it has one.
fn opened(image: &Path) -> Node {
    // A lock lives on in programs that other tests are about to start, until they are executed.
    let unlocked = FileOptions { locking: Locking::Off, ..FileOptions::default() };
    let file = |path: &Path| {
        let storage = FileStorage::open(path, unlocked).unwrap();
        Arc::new(storage) as Arc<dyn Storage>
    };
    let probe = Probe::new(file(image)).unwrap();
    let backing = probe.backing_file().map(|name| {
        let options = FileOptions { read_only: true, ..unlocked };
        let storage = FileStorage::open(image.with_file_name(name), options).unwrap();
        Arc::new(Raw::open(Arc::new(storage), true).unwrap()) as Arc<dyn Format>
    });
    let data_file = probe.data_file().map(|name| file(Path::new(&name)));
    let options = Options { data_file, ..Options::default() };
    Node::of_qcow2("d", Arc::new(Qcow2::open_with(probe, backing, options).unwrap()))
}

fn ours(image: &Path, ops: &[Op]) {
    let node = opened(image);
    for op in ops {
        match op {
            Op::Write(span, byte) => {
                let bytes = vec![*byte; span.len()];
                node.write(span.start as u64, &[block::WriteBuf::new(&bytes)]).unwrap();
            }
            Op::Zero(span, unmap) => {
                node.write_zeroes(span.start as u64, span.len() as u64, *unmap).unwrap();
            }
            Op::Discard(span) => node.discard(span.start as u64, span.len() as u64).unwrap(),
            Op::Flush => node.flush().unwrap(),
            Op::Read(span) => drop(common::read(&*node.format(), span.start as u64, span.len())),
            Op::Save(tag) => common::save(&*node.format(), tag),
            Op::Load(tag) => common::load(&*node.format(), tag),
            Op::Delete(tag) => common::delete(&*node.format(), tag),
        }
    }
}

fn qemus(image: &Path, ops: &[Op]) {
    let mut args = vec!["-f".to_owned(), "qcow2".to_owned(), "-d".to_owned(), "unmap".to_owned()];
    for op in ops {
        let text = match op {
            Op::Write(span, byte) => format!("write -P {byte} {} {}", span.start, span.len()),
            Op::Zero(span, false) => format!("write -z {} {}", span.start, span.len()),
            Op::Zero(span, true) => format!("write -z -u {} {}", span.start, span.len()),
            Op::Discard(span) => format!("discard {} {}", span.start, span.len()),
            Op::Flush => "flush".to_owned(),
            Op::Read(span) => format!("read {} {}", span.start, span.len()),
            _ => continue,
        };
        args.extend(["-c".to_owned(), text]);
    }
    let output = Command::new("qemu-io").args(&args).arg(image).run().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    // Version 2 cannot discard over a backing file.
    let fails = text.lines().find(|line| {
        line.contains("failed") && !(line.contains("discard") && line.contains("not supported"))
    });
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && fails.is_none(), "qemu-io: {fails:?} {errors}");
    for op in ops {
        let (flag, tag) = match op {
            Op::Save(tag) => ("-c", tag),
            Op::Load(tag) => ("-a", tag),
            Op::Delete(tag) => ("-d", tag),
            _ => continue,
        };
        qemu_img(&["snapshot", flag, tag, &path(image)]);
    }
}

/// The disk as QEMU reads it, or as it was at a snapshot.
fn by_qemu(dir: &Path, image: &Path, snapshot: Option<&str>) -> Vec<u8> {
    common::qemu_contents(dir, image, snapshot)
}

fn compare(dir: &Path, image: &Path, model: &Model, who: &str) {
    check(image);
    model.check(&by_qemu(dir, image, None), &format!("{who}, read by QEMU"));
    model.check(&common::read_all(&*opened(image).format()), &format!("{who}, read by us"));
    for (tag, disk) in &model.snapshots {
        assert!(by_qemu(dir, image, Some(tag)) == *disk, "{who}: snapshot {tag}");
    }
}

/// Rounds of work on two copies of an image that starts with `disk`.
fn twins(name: &str, disk: Vec<u8>, make: impl Fn(&Path, &str) -> PathBuf) {
    if !have_qemu_img(name) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut images = [make(dir.path(), "a.qcow2"), make(dir.path(), "b.qcow2")];
    let seed = name.bytes().fold(77, |hash: u64, byte| hash.wrapping_mul(31) + u64::from(byte));
    let mut random = Random(seed | 1);
    let discarded = vec![false; SIZE];
    let mut model = Model { disk, discarded, snapshots: Vec::new() };
    let has_snapshots = !name.contains("data_file");
    let rounds = if std::env::var_os("CRASH_POINTS").is_some() { 40 } else { 4 };
    for round in 0..rounds {
        let ops = session(&mut random, &mut model, has_snapshots);
        ours(&images[0], &ops);
        qemus(&images[1], &ops);
        compare(dir.path(), &images[0], &model, &format!("{name}: ours, round {round}"));
        compare(dir.path(), &images[1], &model, &format!("{name}: QEMU's, round {round}"));
        images.swap(0, 1);
    }
}

fn fresh(options: &str) {
    twins(options, vec![0; SIZE], |dir, name| create(dir, name, &SIZE.to_string(), options));
}

#[test]
fn twins_of_every_cluster_size() {
    for options in ["cluster_size=512", "cluster_size=4k", "cluster_size=64k", "cluster_size=2M"] {
        fresh(options);
    }
}

#[test]
fn twins_of_every_refcount_width_and_version() {
    for bits in [4, 8, 32, 64] {
        fresh(&format!("refcount_bits={bits},cluster_size=8k"));
    }
    fresh("compat=0.10,cluster_size=4k");
    fresh("compat=0.10,cluster_size=64k");
}

#[test]
fn twins_with_optional_features() {
    fresh("lazy_refcounts=on,cluster_size=16k");
    fresh("extended_l2=on,cluster_size=16k");
    fresh("extended_l2=on,cluster_size=128k");
    fresh("preallocation=metadata,cluster_size=32k");
}

#[test]
fn twins_with_data_files() {
    for raw in ["on", "off"] {
        let options = format!("data_file_raw={raw}");
        twins(&format!("data_file {raw}"), vec![0; SIZE], |dir, name| {
            let file = path(&dir.join(name.replace("qcow2", "data")));
            let options = format!("{options},data_file={file}");
            create(dir, name, &SIZE.to_string(), &options)
        });
    }
}

#[test]
fn twins_over_backing_files() {
    let mut disk = Random(5).bytes((2 << 20) + 512);
    let base = disk.clone();
    disk.resize(SIZE, 0);
    for options in ["cluster_size=64k", "cluster_size=4k,compat=0.10", "extended_l2=on"] {
        twins(&format!("backing {options}"), disk.clone(), |dir, name| {
            std::fs::write(dir.join("base.raw"), &base).unwrap();
            let options = format!("{options},backing_file=base.raw,backing_fmt=raw");
            create(dir, name, &SIZE.to_string(), &options)
        });
    }
}

#[test]
fn twins_of_compressed_images() {
    let mut disk: Vec<u8> = (0..1_500_000u32).map(|n| n.div_ceil(5000).to_le_bytes()[0]).collect();
    disk.resize(SIZE, 0);
    for kind in ["zlib", "zstd"] {
        twins(kind, disk.clone(), |dir, name| {
            let (raw, image) = (dir.join("full.raw"), dir.join(name));
            std::fs::write(&raw, &disk).unwrap();
            let options = format!("compression_type={kind},cluster_size=16k");
            let (from, to) = (path(&raw), path(&image));
            qemu_img(&["convert", "-c", "-O", "qcow2", "-o", &options, &from, &to]);
            image
        });
    }
}
