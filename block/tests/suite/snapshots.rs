//! Snapshots and VM state, made by us and read by QEMU, and the other way round.

use std::path::Path;
use std::sync::Arc;

use block::{Format, ReadBuf, SnapshotCreate, Together, WriteBuf};

use crate::common::{
    self, Random, check, create, delete, have_qemu_img, id_of, land, load, new_snapshot, open,
    path, qemu_contents, qemu_img, qemu_io, save,
};

fn vmstate(change: &dyn SnapshotCreate, offset: u64, bytes: &[u8]) {
    change.write_vmstate(offset, &[WriteBuf::new(bytes)]).unwrap();
}

fn read_vmstate(format: &dyn Format, tag: &str, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xa5; len];
    let state = format.open_vmstate(&id_of(format, tag)).unwrap();
    state.read(offset, &[ReadBuf::new(&mut bytes)]).unwrap();
    bytes
}

/// The VM state as QEMU has it: read with qemu-io from the guest offsets past the disk.
fn qemu_vmstate_pattern(image: &Path, tag: &str, offset: u64, len: u64, byte: u8) {
    let copy = image.with_extension("copy");
    std::fs::copy(image, &copy).unwrap();
    qemu_img(&["snapshot", "-a", tag, &path(&copy)]);
    qemu_io(&copy, &[&format!("read -b -P {byte} {offset} {len}")]);
}

fn save_with_state(format: &dyn Format, tag: &str, parts: &[(u64, Vec<u8>)]) {
    let mut change = format.create_snapshot(&new_snapshot(tag)).unwrap();
    let mut size = 0;
    for (offset, bytes) in parts {
        vmstate(&*change, *offset, bytes);
        size = size.max(offset + bytes.len() as u64);
    }
    change.set_vmstate_size(size);
    change.prepare().unwrap();
    change.publish().unwrap();
    change.finish().unwrap();
}

#[test]
fn vm_state_is_read_back_by_us_and_by_qemu_for_every_cluster_size() {
    if !have_qemu_img("vm state") {
        return;
    }
    for cluster in ["512", "4k", "64k", "2M"] {
        let dir = tempfile::tempdir().unwrap();
        let image = create(dir.path(), "a.qcow2", "3M", &format!("cluster_size={cluster}"));
        let (graph, node) = open(&image);
        let image_format = node.format();
        let format = &*image_format;
        let size = 2 << 20;
        // A hole between two parts.
        let parts = [(0, vec![0x11; size]), (3 * size as u64, vec![0x22; size])];
        save_with_state(format, "vm", &parts);
        assert_eq!(format.snapshots()[0].vm_state_size, 4 * size as u64);
        assert!(read_vmstate(format, "vm", 0, size).iter().all(|b| *b == 0x11));
        assert!(read_vmstate(format, "vm", size as u64, 2 * size).iter().all(|b| *b == 0));
        assert!(read_vmstate(format, "vm", 3 * size as u64, size).iter().all(|b| *b == 0x22));
        let state = format.open_vmstate("1").unwrap();
        let extents = state.extents(0, 4 * size as u64).unwrap();
        let kinds: Vec<_> = extents.iter().map(|e| (e.offset, e.len, e.zero)).collect();
        let part = size as u64;
        assert_eq!(kinds, [(0, part, false), (part, 2 * part, true), (3 * part, part, false)]);
        drop(state);
        drop((graph, node, image_format));
        check(&image);
        qemu_vmstate_pattern(&image, "vm", 0, part, 0x11);
        qemu_vmstate_pattern(&image, "vm", 3 * part, part, 0x22);
    }
}

#[test]
fn vm_state_written_by_many_threads_is_whole() {
    if !have_qemu_img("vm state threads") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "3M", "");
    let (graph, node) = open(&image);
    let image_format = node.format();
    let format = &*image_format;
    let bytes = Random(5).bytes(16 << 20);
    let mut change = format.create_snapshot(&new_snapshot("vm")).unwrap();
    let writer = &*change;
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let bytes = &bytes;
            scope.spawn(move || {
                for (n, part) in bytes.chunks(256 << 10).enumerate() {
                    if n % 4 == thread {
                        vmstate(writer, n as u64 * (256 << 10), part);
                    }
                }
            });
        }
    });
    change.set_vmstate_size(bytes.len() as u64);
    land_create(&mut *change);
    drop(change);
    assert!(read_vmstate(format, "vm", 0, bytes.len()) == bytes);
    drop((graph, node, image_format));
    check(&image);
}

fn land_create(change: &mut dyn SnapshotCreate) {
    change.prepare().unwrap();
    change.publish().unwrap();
    change.finish().unwrap();
}

#[test]
fn qemu_lists_applies_converts_and_deletes_our_snapshots() {
    if !have_qemu_img("qemu on our snapshots") {
        return;
    }
    for options in ["compat=0.10", "cluster_size=4k", "refcount_bits=8"] {
        let dir = tempfile::tempdir().unwrap();
        let image = create(dir.path(), "a.qcow2", "4M", options);
        let (graph, node) = open(&image);
        let image_format = node.format();
        let format = &*image_format;
        common::write(format, 0, &[1; 2 << 20]);
        save_with_state(format, "one", &[(0, vec![7; 1 << 20])]);
        common::write(format, 1 << 20, &[2; 2 << 20]);
        save(format, "two");
        common::write(format, 0, &[3; 4 << 20]);
        drop((graph, node, image_format));
        check(&image);
        let list = qemu_img(&["snapshot", "-l", &path(&image)]);
        assert!(list.contains("one") && list.contains("two") && list.contains("1 MiB"), "{list}");
        let one = [vec![1; 2 << 20], vec![0; 2 << 20]].concat();
        assert!(qemu_contents(dir.path(), &image, Some("one")) == one);
        qemu_img(&["snapshot", "-a", "two", &path(&image)]);
        check(&image);
        let two = [vec![1; 1 << 20], vec![2; 2 << 20], vec![0; 1 << 20]].concat();
        assert!(qemu_contents(dir.path(), &image, None) == two);
        qemu_img(&["snapshot", "-d", "one", &path(&image)]);
        check(&image);
        // And ours again after QEMU's changes.
        let (graph, node) = open(&image);
        let image_format = node.format();
        let format = &*image_format;
        assert!(common::read_all(format) == two);
        delete(format, "two");
        drop((graph, node, image_format));
        check(&image);
        assert!(qemu_contents(dir.path(), &image, None) == two);
    }
}

#[test]
fn we_list_revert_and_delete_snapshots_of_qemu_with_vm_state() {
    if !have_qemu_img("our work on qemu's snapshots") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "4M", "");
    qemu_io(&image, &["write -P 1 0 4M", "write -b -P 9 0 1M"]);
    qemu_img(&["snapshot", "-c", "one", &path(&image)]);
    qemu_io(&image, &["write -P 2 1M 1M"]);
    qemu_img(&["snapshot", "-c", "two", &path(&image)]);
    qemu_io(&image, &["write -P 3 0 2M"]);
    let (graph, node) = open(&image);
    let image_format = node.format();
    let format = &*image_format;
    let tags: Vec<_> = format.snapshots().into_iter().map(|s| (s.id, s.tag)).collect();
    assert_eq!(tags, [("1".into(), "one".into()), ("2".into(), "two".into())]);
    load(format, "two");
    assert!(common::read(format, 1 << 20, 1 << 20).iter().all(|b| *b == 2));
    save(format, "three");
    assert_eq!(id_of(format, "three"), "3");
    load(format, "one");
    assert!(common::read_all(format).iter().all(|b| *b == 1));
    delete(format, "two");
    delete(format, "one");
    common::write(format, 0, &[4; 1 << 20]);
    drop((graph, node, image_format));
    check(&image);
    qemu_img(&["snapshot", "-a", "three", &path(&image)]);
    check(&image);
}

#[test]
fn rollback_at_every_step_leaves_the_image_as_it_was() {
    if !have_qemu_img("rollback") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "8M", "");
    let (graph, node) = open(&image);
    let image_format = node.format();
    let format = &*image_format;
    let before = Random(3).bytes(4 << 20);
    common::write(format, 0, &before);
    save_with_state(format, "keep", &[(0, vec![1; 1 << 20])]);
    let now = Random(4).bytes(2 << 20);
    common::write(format, 0, &now);
    format.flush().unwrap();
    let len = std::fs::metadata(&image).unwrap().len();
    let listed = format.snapshots();
    for steps in 0..4 {
        for dropped in [false, true] {
            let mut create = format.create_snapshot(&new_snapshot("new")).unwrap();
            vmstate(&*create, 0, &vec![5; 3 << 20]);
            create.set_vmstate_size(3 << 20);
            take(&mut *create, steps, dropped);
            drop(create);
            let mut delete = format.delete_snapshot("1").unwrap();
            take(&mut *delete, steps, dropped);
            drop(delete);
            let mut revert = format.revert_snapshot("1").unwrap();
            take(&mut *revert, steps, dropped);
            drop(revert);
            assert_eq!(format.snapshots(), listed, "after {steps} steps");
            assert!(common::read(format, 0, now.len()) == now);
            assert!(read_vmstate(format, "keep", 0, 1 << 20).iter().all(|b| *b == 1));
            assert_eq!(std::fs::metadata(&image).unwrap().len(), len, "after {steps} steps");
        }
    }
    drop((graph, node, image_format));
    check(&image);
}

fn take<C: block::SnapshotChange + ?Sized>(change: &mut C, steps: usize, dropped: bool) {
    if steps > 0 {
        change.prepare().unwrap();
    }
    if steps > 2 {
        change.show(&Together::new(1)).unwrap();
    } else if steps > 1 {
        change.publish().unwrap();
    }
    if !dropped {
        change.rollback().unwrap();
    }
}

#[test]
fn save_and_delete_rounds_do_not_grow_the_file() {
    if !have_qemu_img("rounds") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "8M", "");
    let (graph, node) = open(&image);
    let image_format = node.format();
    let format = &*image_format;
    let mut sizes = Vec::new();
    for round in 0..6u8 {
        common::write(format, 0, &vec![round; 8 << 20]);
        save_with_state(format, "round", &[(0, vec![round | 1; 8 << 20])]);
        common::write(format, 4 << 20, &vec![round; 1 << 20]);
        delete(format, "round");
        format.flush().unwrap();
        sizes.push(std::fs::metadata(&image).unwrap().len());
    }
    assert!(sizes[5] <= sizes[1], "{sizes:?}");
    drop((graph, node, image_format));
    check(&image);
}

#[test]
fn two_images_change_together_or_not_at_all() {
    if !have_qemu_img("two images") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let images = ["a.qcow2", "b.qcow2"].map(|name| create(dir.path(), name, "4M", ""));
    let opened = images.each_ref().map(|image| open(image));
    let formats: Vec<Arc<dyn Format>> = opened.iter().map(|(_, n)| n.format().clone()).collect();
    for format in &formats {
        common::write(&**format, 0, &[1; 4096]);
    }
    for publish in 0..=2 {
        let mut changes: Vec<_> =
            formats.iter().map(|f| f.create_snapshot(&new_snapshot("both")).unwrap()).collect();
        for change in &mut changes {
            change.prepare().unwrap();
        }
        for change in changes.iter_mut().take(publish) {
            change.publish().unwrap();
        }
        if publish == 2 {
            for change in &mut changes {
                change.finish().unwrap();
            }
        }
        drop(changes);
        let tags: Vec<_> = formats.iter().map(|f| f.snapshots().len()).collect();
        assert_eq!(tags, if publish == 2 { [1, 1] } else { [0, 0] });
    }
    drop((formats, opened));
    images.iter().for_each(|image| check(image));
}

#[test]
fn writes_after_the_snapshot_point_stay_out_of_the_snapshot() {
    if !have_qemu_img("snapshot point") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "4M", "");
    let (graph, node) = open(&image);
    let image_format = node.format();
    let format = &*image_format;
    common::write(format, 0, &[1; 1 << 20]);
    for landed in [false, true] {
        let mut change = format.create_snapshot(&new_snapshot("point")).unwrap();
        change.prepare().unwrap();
        common::write(format, 0, &[2; 1 << 20]);
        if landed {
            change.publish().unwrap();
            change.finish().unwrap();
        }
        drop(change);
        assert!(common::read(format, 0, 1 << 20).iter().all(|b| *b == 2));
        if landed {
            load(format, "point");
            assert!(common::read(format, 0, 1 << 20).iter().all(|b| *b == 1));
        } else {
            common::write(format, 0, &[1; 1 << 20]);
        }
    }
    drop((graph, node, image_format));
    check(&image);
}

#[test]
fn tags_are_cut_at_255_bytes_between_characters() {
    if !have_qemu_img("tags") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "1M", "");
    let (graph, node) = open(&image);
    let image_format = node.format();
    let format = &*image_format;
    save(format, &"\u{e9}".repeat(200));
    assert_eq!(format.snapshots()[0].tag, "\u{e9}".repeat(127));
    drop((graph, node, image_format));
    let (_graph, node) = open(&image);
    assert_eq!(node.format().snapshots()[0].tag, "\u{e9}".repeat(127));
    assert_eq!(node.format().snapshots()[0].vm_clock_nsec, 77);
}

#[test]
fn a_second_change_and_the_deletion_of_a_snapshot_being_read_are_refused() {
    if !have_qemu_img("refusals") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "1M", "");
    let (_graph, node) = open(&image);
    let format = &*node.format();
    save_with_state(format, "vm", &[(0, vec![1; 65536])]);
    let change = format.create_snapshot(&new_snapshot("x")).unwrap();
    let error = format.delete_snapshot("1").err().unwrap().to_string();
    assert!(error.contains("another change"), "{error}");
    drop(change);
    let state = format.open_vmstate("1").unwrap();
    let error = format.delete_snapshot("1").err().unwrap().to_string();
    assert!(error.contains("in use"), "{error}");
    drop(state);
    land(&mut *format.delete_snapshot("1").unwrap()).unwrap();
    assert!(format.revert_snapshot("1").is_err());
}

#[test]
fn one_bit_refcounts_refuse_a_snapshot_of_data_and_stay_clean() {
    if !have_qemu_img("one bit") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "1M", "refcount_bits=1");
    let (graph, node) = open(&image);
    let image_format = node.format();
    let format = &*image_format;
    common::write(format, 0, &[1; 1 << 20]);
    let mut change = format.create_snapshot(&new_snapshot("x")).unwrap();
    let error = change.prepare().unwrap_err().to_string();
    assert!(error.contains("would exceed 1 bits"), "{error}");
    drop(change);
    common::write(format, 0, &[2; 1 << 20]);
    drop((graph, node, image_format));
    check(&image);
}

#[test]
fn a_disk_without_bytes_has_snapshots_that_leak_nothing() {
    if !have_qemu_img("empty disk") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "0", "");
    let (graph, node) = open(&image);
    let image_format = node.format();
    let format = &*image_format;
    save(format, "plain");
    save_with_state(format, "vm", &[(0, vec![3; 65536])]);
    load(format, "vm");
    assert!(read_vmstate(format, "vm", 0, 65536).iter().all(|b| *b == 3));
    delete(format, "plain");
    drop((graph, node, image_format));
    check(&image);
}
