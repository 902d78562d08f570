//! Checkpoints in compressed clusters: whole for every reader, whatever they share.

use std::os::unix::fs::MetadataExt;

use block::qcow2::Compression;
use block::{Progress, SnapshotSizes};
use snapshot::save::{Save, SaveSetup};
use snapshot::{Checkpoint, PageSet, SaveImages, Stamp, delete};
use vm_memory::{Bytes, GuestAddress};

use crate::images::{Images, MIB, contents, ram, scribble, text};
use crate::incremental::Chain;

/// Writes what does not shrink over a part of RAM.
fn noise(chain: &mut Chain) {
    let mut bytes = vec![0; chain.random.usize(1..40) * 4096];
    chain.random.fill(&mut bytes);
    let at = GuestAddress(chain.random.u64(0..32 * 256) * 4096);
    chain.memory.write_slice(&bytes, at).unwrap();
}

/// Ten checkpoints built upon each other, compressed and plain in turn, deleted in a mixed order.
fn chain_of_ten(options: &str, method: Compression) {
    let mut chain = Chain::new(options);
    let mut order = [true, true, false, true, false, false, true, true, false, true];
    chain.random.shuffle(&mut order[1..]);
    for (n, compress) in order.into_iter().enumerate() {
        chain.run();
        noise(&mut chain);
        chain.compress = compress.then_some(method);
        let report = chain.save(&format!("t{n}"), n % 3 != 2);
        assert_eq!(report.incremental, n > 0);
        if n == 5 {
            chain.load(2);
        }
    }
    chain.delete_all();
}

#[test]
fn compressed_and_plain_checkpoints_in_turn_are_right_whichever_are_deleted_with_zstd() {
    chain_of_ten("compression_type=zstd", Compression::Zstd);
}

#[test]
fn compressed_and_plain_checkpoints_in_turn_are_right_whichever_are_deleted_with_zlib() {
    chain_of_ten("compression_type=zlib", Compression::Zlib);
}

#[test]
fn compressed_and_plain_checkpoints_in_turn_are_right_with_512_byte_clusters() {
    chain_of_ten("cluster_size=512,compression_type=zstd", Compression::Zstd);
}

#[test]
fn compressed_and_plain_checkpoints_in_turn_are_right_with_2_mib_clusters() {
    chain_of_ten("cluster_size=2M,compression_type=zstd", Compression::Zstd);
}

#[test]
fn compressed_and_plain_checkpoints_in_turn_are_right_with_extended_l2_entries() {
    chain_of_ten("extended_l2=on,compression_type=zstd", Compression::Zstd);
}

#[test]
fn compressed_and_plain_checkpoints_in_turn_are_right_in_version_2_images() {
    chain_of_ten("compat=0.10", Compression::Zlib);
}

fn sizes(images: &Images, tag: &str) -> SnapshotSizes {
    let format = images.nodes[0].format();
    let snapshot = format.snapshots().into_iter().find(|s| s.tag == tag).unwrap();
    format.snapshot_sizes(&snapshot.id).unwrap()
}

#[test]
fn compression_is_told_in_the_bytes_written_and_in_the_size_of_the_checkpoint() {
    let mut chain = Chain::new("compression_type=zstd");
    scribble(&chain.memory, 3);
    chain.save("plain", false);
    chain.memory.write_obj(1_u8, GuestAddress(31 * MIB)).unwrap();
    delete(&chain.images.nodes, "plain").unwrap();
    chain.saved.clear();
    let plain = chain.save("again", false);
    assert_eq!(plain.bytes_written, plain.stored_bytes + plain.state_bytes);
    let size = sizes(&chain.images, "again").vm_state.alone;
    chain.compress = Some(Compression::Zstd);
    delete(&chain.images.nodes, "again").unwrap();
    chain.saved.clear();
    let packed = chain.save("packed", false);
    assert!(!packed.incremental);
    assert_eq!(packed.stored_bytes, plain.stored_bytes);
    assert!(packed.bytes_written < plain.bytes_written / 10, "{packed:?} {plain:?}");
    assert!(sizes(&chain.images, "packed").vm_state.alone < size / 5);
    chain.images.check();
    chain.load(0);
}

#[test]
fn a_cluster_of_the_file_has_no_more_packed_clusters_than_later_checkpoints_can_refer_to() {
    // At most 255 references: fifty packed clusters in one place would be too many by the sixth.
    let mut chain = Chain::new("refcount_bits=8,compression_type=zstd");
    chain.compress = Some(Compression::Zstd);
    for page in 0..33 * 256 {
        chain.memory.write_obj(7_u8, GuestAddress(page * 4096)).unwrap();
    }
    for n in 0..8 {
        chain.memory.write_obj(n, GuestAddress(20 * MIB)).unwrap();
        let report = chain.save(&format!("t{n}"), true);
        assert_eq!(report.incremental, n > 0);
    }
    chain.images.check();
    for n in 0..8 {
        chain.load(n);
    }
}

#[test]
fn a_method_that_the_image_does_not_have_is_refused_and_leaves_nothing() {
    let mut images = Images::create("compression_type=zlib");
    let memory = ram();
    scribble(&memory, 1);
    let refused = |images: &Images, method| {
        let nodes = images.nodes.clone();
        let targets = SaveImages::of(&nodes, "d0");
        let stamp = Stamp { tag: "x".into(), date_sec: 1, date_nsec: 2, vm_clock_nsec: 3 };
        let setup = SaveSetup {
            nodes: &nodes,
            vmstate: "d0",
            stamp: &stamp,
            base: None,
            compress: Some(method),
            absent: false,
            state_bytes: 1000,
            ram: &memory,
            progress: &Progress::default(),
            threads: 2,
        };
        Save::begin(&targets, setup).err().unwrap().to_string()
    };
    let error = refused(&images, Compression::Zstd);
    let wanted = format!(
        "VM state on 'd0' cannot be compressed: Image '{}' compresses with zlib, not with zstd: ask \
         for zlib, or use an image that was made with compression_type=zstd",
        text(&images.paths[0])
    );
    assert_eq!(error, wanted);
    images.check();
    images.save("x", &memory).unwrap();
}

#[test]
fn a_compressed_save_that_is_dropped_or_cancelled_leaves_the_images_as_they_were() {
    let mut chain = Chain::new("compression_type=zstd");
    chain.compress = Some(Compression::Zstd);
    chain.run();
    chain.save("a", false);
    let used = |chain: &Chain| chain.images.paths[0].metadata().unwrap().blocks();
    let before = used(&chain);
    let fresh = ram();
    scribble(&fresh, 9);
    for cancel in [false, true] {
        let nodes = chain.images.nodes.clone();
        let (images, progress) = (SaveImages::of(&nodes, "d0"), Progress::default());
        let stamp = Stamp { tag: "x".into(), date_sec: 1, date_nsec: 2, vm_clock_nsec: 3 };
        let setup = SaveSetup {
            nodes: &nodes,
            vmstate: "d0",
            stamp: &stamp,
            base: None,
            compress: chain.compress,
            absent: false,
            state_bytes: 1000,
            ram: &fresh,
            progress: &progress,
            threads: 3,
        };
        let mut save = Save::begin(&images, setup).unwrap();
        let mut all = PageSet::of(&fresh);
        all.insert_all();
        save.write(&all).unwrap();
        // Again: what is packed gets another place.
        save.write(&all).unwrap();
        if cancel {
            progress.cancel();
            save.write(&all).unwrap_err();
        }
        drop(save);
        drop(images);
        drop(nodes);
        chain.images.check();
        assert!(used(&chain) <= before, "space is given back");
    }
    chain.load(0);
    let checkpoint = Checkpoint::open(&chain.images.nodes, "d0", "a").unwrap();
    let memory = ram();
    checkpoint.read_ram(&memory, true, 2, &Progress::default()).unwrap();
    assert!(contents(&memory) == chain.saved[0].1);
}
