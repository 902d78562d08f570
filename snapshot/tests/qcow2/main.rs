//! Checkpoints on real qcow2 images, with `qemu-img` as the judge.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers fail the test that calls them"
)]

mod compressed;
mod images;
mod incremental;
mod qemu_img;

use block::Progress;
use serde::Deserialize;
use snapshot::{Checkpoint, delete};

use vm_memory::{Bytes, GuestAddress};

use images::{DISK, Images, MIB, contents, qemu_img, ram, scribble, text};

/// Saves five states, goes to each in a mixed order, deletes some; the images are right throughout.
fn tree_of_checkpoints(options: &str) {
    let mut images = Images::create(options);
    let memory = ram();
    let mut states = Vec::new();
    for n in 1..=5_u8 {
        scribble(&memory, n);
        images.write(0, n);
        images.write(1, n + 100);
        images.save(&format!("t{n}"), &memory).unwrap();
        states.push(contents(&memory));
    }
    images.check();
    for n in [3, 1, 5, 2, 4_u8] {
        let tag = format!("t{n}");
        assert_eq!(images.load(&tag, &memory), tag);
        assert!(contents(&memory) == states[usize::from(n) - 1], "RAM of {tag}");
        assert_eq!((images.read(0), images.read(1)), (n, n + 100));
        images.write(0, 99);
    }
    images.check();
    for n in [2, 5] {
        delete(&images.nodes, &format!("t{n}")).unwrap();
    }
    images.check();
    let fresh = ram();
    let checkpoint = Checkpoint::open(&images.nodes, "d0", "t3").unwrap();
    checkpoint.read_ram(&fresh, true, 2, &Progress::default()).unwrap();
    assert!(contents(&fresh) == states[2]);
    drop(checkpoint);
    for n in [1, 3, 4] {
        delete(&images.nodes, &format!("t{n}")).unwrap();
    }
    images.check();
}

#[test]
fn a_tree_of_checkpoints_is_right_with_512_byte_clusters() {
    tree_of_checkpoints("cluster_size=512");
}

#[test]
fn a_tree_of_checkpoints_is_right_with_64_kib_clusters() {
    tree_of_checkpoints("cluster_size=64k");
}

#[test]
fn a_tree_of_checkpoints_is_right_with_2_mib_clusters() {
    tree_of_checkpoints("cluster_size=2M");
}

#[test]
fn a_tree_of_checkpoints_is_right_in_version_2_images() {
    tree_of_checkpoints("compat=0.10");
}

#[test]
fn ram_that_ends_in_zeroes_and_ram_of_zeroes_come_back() {
    for options in ["cluster_size=512", "cluster_size=64k", "cluster_size=2M"] {
        let mut images = Images::create(options);
        let memory = ram();
        images.save("nothing", &memory).unwrap();
        memory.write_obj(7_u8, GuestAddress(MIB)).unwrap();
        let before = contents(&memory);
        images.save("a byte", &memory).unwrap();
        images.check();
        scribble(&memory, 4);
        images.load("a byte", &memory);
        assert!(contents(&memory) == before);
        images.load("nothing", &memory);
        assert!(contents(&memory).iter().all(|byte| *byte == 0));
        images.check();
    }
}

#[derive(Deserialize)]
struct Info {
    snapshots: Vec<Listed>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Listed {
    name: String,
    vm_state_size: u64,
    date_sec: u64,
    vm_clock_sec: u64,
}

#[test]
fn qemu_img_lists_the_checkpoint_and_reads_its_disk() {
    let mut images = Images::create("cluster_size=64k");
    let memory = ram();
    scribble(&memory, 9);
    images.write(1, 0x33);
    let report = images.save("base", &memory).unwrap();
    images.write(1, 0x44);
    images.check();
    for (at, path) in images.paths.iter().enumerate() {
        let json = qemu_img(&["info", "-U", "--output=json", text(path)]);
        let info: Info = serde_json::from_str(&json).unwrap();
        let [listed] = &info.snapshots[..] else { panic!("one snapshot: {json}") };
        assert_eq!(listed.name, "base");
        assert_eq!((listed.date_sec, listed.vm_clock_sec), (1_700_000_000, 3723));
        let size = if at == 0 { report.vm_state_size } else { 0 };
        assert_eq!(listed.vm_state_size, size);
    }
    images.close();
    let raw = images.paths[1].with_extension("raw");
    qemu_img(&[
        "convert",
        "-O",
        "raw",
        "-l",
        "snapshot.name=base",
        text(&images.paths[1]),
        text(&raw),
    ]);
    let bytes = std::fs::read(raw).unwrap();
    assert_eq!(bytes.len() as u64, DISK);
    assert_eq!(bytes[(5 << 20) + 512], 0x33);
}

#[test]
fn checkpoints_and_qemu_imgs_snapshots_live_side_by_side() {
    let mut images = Images::create("cluster_size=64k");
    let memory = ram();
    scribble(&memory, 9);
    let before = contents(&memory);
    for disk in 0..2 {
        images.write(disk, 0x33);
    }
    images.save("ours", &memory).unwrap();
    for disk in 0..2 {
        images.write(disk, 0x44);
    }
    let snapshot = |images: &mut Images, option: &str, tag: &str| {
        images.close();
        for path in &images.paths {
            qemu_img(&["snapshot", option, tag, text(path)]);
        }
        images.check();
    };
    snapshot(&mut images, "-c", "theirs");
    let error = Checkpoint::open(&images.nodes, "d0", "theirs").err().unwrap();
    assert_eq!(
        error.to_string(),
        "This is a disk-only snapshot. Revert to it  offline using qemu-img"
    );

    scribble(&memory, 5);
    images.load("ours", &memory);
    assert!(contents(&memory) == before);
    assert_eq!((images.read(0), images.read(1)), (0x33, 0x33));

    snapshot(&mut images, "-a", "theirs");
    assert_eq!((images.read(0), images.read(1)), (0x44, 0x44));
    snapshot(&mut images, "-a", "ours");
    assert_eq!((images.read(0), images.read(1)), (0x33, 0x33));
    assert_eq!(delete(&images.nodes, "theirs").unwrap().deleted, ["d0", "d1"]);
    images.load("ours", &memory);
    snapshot(&mut images, "-d", "ours");
    assert!(images.nodes.iter().all(|node| node.format().snapshots().is_empty()));
}
