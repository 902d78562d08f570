//! How much of a snapshot is its own, and looks at VM state that may be deleted meanwhile.

use block::snapshot::Share;
use block::{Format, ReadBuf, WriteBuf};

use crate::common::{self, create, delete, have_qemu_img, id_of, land, new_snapshot, open, save};

const CLUSTER: u64 = 64 << 10;
const MIB: usize = 1 << 20;

/// A snapshot with a MiB of VM state.
fn save_with_state(format: &dyn Format, tag: &str) {
    let mut change = format.create_snapshot(&new_snapshot(tag)).unwrap();
    change.write_vmstate(0, &[WriteBuf::new(&vec![7; MIB])]).unwrap();
    change.set_vmstate_size(MIB as u64);
    land(&mut *change).unwrap();
}

fn allocated(path: &std::path::Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn what_is_alone_is_what_a_deletion_gives_back() {
    if !have_qemu_img("sizes") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "8M", "");
    let (_graph, node) = open(&image);
    let format = &*node.format();
    common::write(format, 0, &vec![1; 2 * MIB]);
    save_with_state(format, "one");
    let sizes = |tag: &str| format.snapshot_sizes(&id_of(format, tag)).unwrap();
    // L1 and L2 table: the disk went on with a table of its own. The 32 clusters are the disk's, too.
    assert_eq!(sizes("one").disk, Share { alone: 2 * CLUSTER, shared: 32 * CLUSTER });
    // 16 clusters and their L2 table.
    assert_eq!(sizes("one").vm_state, Share { alone: 17 * CLUSTER, shared: 0 });

    common::write(format, 0, &vec![2; MIB / 2]);
    save(format, "two");
    common::write(format, MIB as u64, &vec![3; MIB]);
    // Until then the old tables keep what they refer to.
    format.flush().unwrap();
    // 8 clusters were overwritten before "two", the other 24 are in it; L1 and L2 table.
    assert_eq!(sizes("one").disk, Share { alone: 10 * CLUSTER, shared: 24 * CLUSTER });
    assert_eq!(sizes("two").disk, Share { alone: 2 * CLUSTER, shared: 32 * CLUSTER });
    assert_eq!(sizes("two").vm_state, Share::default());

    let (before, alone) = (allocated(&image), sizes("one"));
    delete(format, "one");
    let given_back = before - allocated(&image);
    // The file system counts blocks: a moved table takes some of those of its cluster, not all.
    let apart = given_back.abs_diff(alone.disk.alone + alone.vm_state.alone);
    assert!(apart < CLUSTER, "{given_back} bytes given back, {alone:?}");
    // What "one" and "two" shared without the active disk is now "two"'s alone.
    assert_eq!(sizes("two").disk, Share { alone: 18 * CLUSTER, shared: 16 * CLUSTER });
    assert!(format.snapshot_sizes("one").is_err(), "a tag is no id");
}

#[test]
fn clusters_that_hold_only_compressed_data_of_one_snapshot_are_its_own() {
    if !have_qemu_img("sizes compressed") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "8M", "");
    let (_graph, node) = open(&image);
    let format = &*node.format();
    format.write_compressed(0, &[WriteBuf::new(&vec![1; MIB])]).unwrap();
    save(format, "packed");
    format.write_zeroes(0, MIB as u64, true).unwrap();
    format.flush().unwrap();
    let sizes = format.snapshot_sizes("1").unwrap();
    assert_eq!(sizes.disk.shared, 0);
    // 16 clusters of one byte value fit in one; L1 and L2 table.
    assert_eq!(sizes.disk.alone, 3 * CLUSTER);
}

#[test]
fn a_look_at_vm_state_does_not_keep_the_snapshot_and_sees_its_end() {
    if !have_qemu_img("look") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "1M", "");
    let (_graph, node) = open(&image);
    let format = &*node.format();
    save_with_state(format, "vm");
    let look = format.look_at_vmstate("1").unwrap();
    let mut bytes = vec![0; 4096];
    look.read(0, &[ReadBuf::new(&mut bytes)]).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 7));
    delete(format, "vm");
    // Another takes its id and its clusters.
    save_with_state(format, "other");
    assert_eq!(id_of(format, "other"), "1");
    let error = look.read(0, &[ReadBuf::new(&mut bytes)]).unwrap_err();
    assert!(matches!(error, block::Error::NoSuchSnapshot { .. }), "{error}");
    assert!(look.extents(0, 4096).is_err());
}
