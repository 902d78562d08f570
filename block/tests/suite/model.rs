//! Random work on images of every kind, beside a model in memory, with QEMU's view of it.

use std::path::Path;

use crate::common::{
    self, Random, check, create, delete, have_qemu_img, load, open, path, qemu_contents, save,
};
use block::Format;

/// Not a whole number of clusters.
const SIZE: u64 = (4 << 20) + 5 * 512;

/// What the disk should hold, now and at each snapshot.
struct Model {
    /// Whether compressed clusters may share host clusters: narrow refcounts have no room for that
    /// and snapshots too.
    packs: bool,
    disk: Vec<u8>,
    snapshots: Vec<(String, Vec<u8>)>,
}

fn range(random: &mut Random) -> (usize, usize) {
    let len = match random.below(4) {
        0 => random.below(600) + 1,
        1 => 4096 * (random.below(32) + 1),
        2 => random.below(300_000) + 1,
        _ => 65536 * (random.below(8) + 1),
    };
    let mut start = random.below(SIZE);
    if random.below(2) == 0 {
        start &= !0xfff;
    }
    let len = len.min(SIZE - start);
    (start as usize, len as usize)
}

/// A snapshot that has the disk of its switch, whatever is done to it before the other steps; or none.
fn save_under_requests(random: &mut Random, format: &dyn Format, model: &mut Model) {
    let tag = format!("t{}", random.next());
    let at_switch = model.disk.clone();
    let mut change = format.create_snapshot(&common::new_snapshot(&tag)).unwrap();
    change.switch().unwrap();
    let steps = random.below(8);
    let mut requests = || {
        for _ in 0..random.below(5) {
            request(random, format, model);
        }
    };
    requests();
    if steps > 0 {
        change.prepare().unwrap();
        requests();
    }
    if steps > 1 {
        change.publish().unwrap();
        requests();
    }
    if steps > 2 {
        change.finish().unwrap();
        model.snapshots.push((tag, at_switch));
    } else {
        change.rollback().unwrap();
    }
}

fn step(random: &mut Random, format: &dyn Format, model: &mut Model) {
    match random.below(20) {
        13 if model.snapshots.len() < 4 => save_under_requests(random, format, model),
        14 if model.snapshots.len() < 4 => {
            let tag = format!("t{}", random.next());
            save(format, &tag);
            model.snapshots.push((tag, model.disk.clone()));
        }
        15 if !model.snapshots.is_empty() => {
            let at = random.below(model.snapshots.len() as u64) as usize;
            let (tag, disk) = &model.snapshots[at];
            load(format, tag);
            model.disk.clone_from(disk);
        }
        16 if !model.snapshots.is_empty() => {
            let at = random.below(model.snapshots.len() as u64) as usize;
            let (tag, _) = model.snapshots.swap_remove(at);
            delete(format, &tag);
        }
        _ => request(random, format, model),
    }
}

/// Something that a guest may ask for.
fn request(random: &mut Random, format: &dyn Format, model: &mut Model) {
    let (start, len) = range(random);
    let span = start..start + len;
    match random.below(17) {
        0..9 => {
            let bytes = random.bytes(len as u64);
            common::write(format, start as u64, &bytes);
            model.disk[span].copy_from_slice(&bytes);
        }
        9..12 => {
            format.write_zeroes(start as u64, len as u64, random.below(2) == 0).unwrap();
            model.disk[span].fill(0);
        }
        12 => {
            format.discard(start as u64, len as u64).unwrap();
            // Zeroes or as before, for every byte.
            let now = common::read(format, start as u64, len);
            for (at, byte) in span.zip(now) {
                assert!(byte == 0 || byte == model.disk[at], "discard at {at:#x}");
                model.disk[at] = byte;
            }
        }
        13 => format.flush().unwrap(),
        14 | 15 if model.packs => {
            let cluster = format.compressed_cluster().unwrap();
            let start = start as u64 / cluster * cluster;
            let end = (start + cluster * (1 + random.below(4))).min(SIZE);
            let mut bytes = random.bytes(end - start);
            // Some of it shrinks, some does not.
            let noise = random.below(bytes.len() as u64 / 2) as usize;
            let last = bytes.len();
            bytes[noise..last].fill(random.next() as u8);
            format.write_compressed(start, &[block::WriteBuf::new(&bytes)]).unwrap();
            model.disk[start as usize..end as usize].copy_from_slice(&bytes);
        }
        _ => {
            assert_eq!(common::read(format, start as u64, len), model.disk[span], "at {start:#x}");
        }
    }
}

fn compare_with_qemu(dir: &Path, image: &Path, model: &Model) {
    check(image);
    assert!(qemu_contents(dir, image, None) == model.disk, "QEMU sees another disk");
    for (tag, disk) in &model.snapshots {
        assert!(qemu_contents(dir, image, Some(tag)) == *disk, "QEMU sees another snapshot {tag}");
    }
}

fn run(name: &str, options: &str, disk: Vec<u8>, create: impl Fn(&Path) -> std::path::PathBuf) {
    if !have_qemu_img(name) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path());
    let seed = name.bytes().chain(options.bytes()).fold(0x9e37_79b9, |h: u64, b| {
        h.rotate_left(5) ^ u64::from(b).wrapping_mul(0x2545_f491_4f6c_dd1d)
    });
    let mut random = Random(seed | 1);
    let packs = !["refcount_bits=4", "refcount_bits=8"].iter().any(|o| options.contains(o));
    let mut model = Model { packs, disk, snapshots: Vec::new() };
    for _ in 0..3 {
        let (_graph, node) = open(&image);
        for _ in 0..60 {
            step(&mut random, &*node.format(), &mut model);
        }
        assert!(common::read_all(&*node.format()) == model.disk);
        node.format().flush().unwrap();
        drop((_graph, node));
        compare_with_qemu(dir.path(), &image, &model);
    }
}

fn fresh(name: &str, options: &str) {
    run(name, options, vec![0; SIZE as usize], |dir| {
        create(dir, "a.qcow2", &SIZE.to_string(), options)
    });
}

macro_rules! fresh_images {
    ($($name:ident: $options:expr;)*) => {
        $(#[test] fn $name() { fresh(stringify!($name), $options); })*
    };
}

fresh_images! {
    cluster_512: "cluster_size=512";
    cluster_1k_v2: "cluster_size=1k,compat=0.10";
    cluster_4k: "cluster_size=4k";
    cluster_64k: "";
    cluster_64k_v2: "compat=0.10";
    cluster_256k: "cluster_size=256k";
    cluster_2m: "cluster_size=2M";
    refcount_4: "refcount_bits=4";
    refcount_8: "refcount_bits=8,cluster_size=8k";
    refcount_32: "refcount_bits=32,cluster_size=1k";
    refcount_64: "refcount_bits=64,cluster_size=512";
    extended_16k: "extended_l2=on,cluster_size=16k";
    extended_64k: "extended_l2=on";
    extended_128k: "extended_l2=on,cluster_size=128k,refcount_bits=8";
    extended_2m: "extended_l2=on,cluster_size=2M";
    extended_preallocated: "extended_l2=on,cluster_size=64k,preallocation=metadata";
    lazy_refcounts: "lazy_refcounts=on,cluster_size=16k";
    preallocated: "preallocation=metadata,cluster_size=32k";
}

fn base(dir: &Path, len: u64) -> (std::path::PathBuf, Vec<u8>) {
    let raw = dir.join("base.raw");
    let bytes = Random(99).bytes(len);
    std::fs::write(&raw, &bytes).unwrap();
    (raw, bytes)
}

fn padded(len: u64) -> Vec<u8> {
    let mut bytes = Random(99).bytes(len);
    bytes.resize(SIZE as usize, 0);
    bytes
}

#[test]
fn over_a_short_raw_backing_file() {
    let len = (1 << 20) + 512 * 3;
    for compat in ["0.10", "1.1"] {
        run("raw backing", compat, padded(len), |dir| {
            let (raw, _) = base(dir, len);
            let options = format!("compat={compat},backing_file={},backing_fmt=raw", path(&raw));
            create(dir, "a.qcow2", &SIZE.to_string(), &options)
        });
    }
}

#[test]
fn over_a_qcow2_backing_file_by_relative_name() {
    for kind in ["", "extended_l2=on,cluster_size=16k", "extended_l2=on,cluster_size=1M"] {
        run("qcow2 backing", kind, padded(3 << 20), |dir| {
            let (raw, _) = base(dir, 3 << 20);
            let mid = dir.join("mid.qcow2");
            common::qemu_img(&["convert", "-O", "qcow2", &path(&raw), &path(&mid)]);
            let options = format!("backing_file=mid.qcow2,backing_fmt=qcow2,{kind}");
            create(dir, "a.qcow2", &SIZE.to_string(), options.trim_end_matches(','))
        });
    }
}

#[test]
fn over_compressed_clusters() {
    for kind in ["zlib", "zstd"] {
        for size in ["4k", "64k", "2M", "64k,extended_l2=on"] {
            let options = format!("compression_type={kind},cluster_size={size}");
            let mut bytes = Random(99).bytes(SIZE / 2);
            // Compressible and incompressible parts.
            bytes.resize(SIZE as usize, 7);
            run("compressed", &options, bytes.clone(), |dir| {
                let raw = dir.join("full.raw");
                std::fs::write(&raw, &bytes).unwrap();
                let image = dir.join("a.qcow2");
                common::qemu_img(&[
                    "convert",
                    "-c",
                    "-O",
                    "qcow2",
                    "-o",
                    &options,
                    &path(&raw),
                    &path(&image),
                ]);
                image
            });
        }
    }
}
