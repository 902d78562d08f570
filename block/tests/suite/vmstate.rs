//! VM state that starts as an earlier snapshot's: beside a model in memory, with QEMU's view of it.

use std::path::Path;
use std::sync::Arc;

use block::qcow2::create::{CreateOptions, create as create_image};
use block::qcow2::{Probe, Qcow2};
use block::storage::memory::{MemoryStorage, Op};
use block::{Format, Progress, ReadBuf, SnapshotCreate, WriteBuf};

use crate::common::{
    self, Random, check, create, delete, have_qemu_img, id_of, land, new_snapshot, open, path,
    qemu_contents, qemu_img, qemu_io,
};

const PAGE: u64 = 4096;
/// Two L2 tables and more with clusters of 512 bytes to 16 KiB, several clusters with larger ones.
const AREA: u64 = 6 << 20;

struct Snap {
    tag: String,
    disk: Vec<u8>,
    vm: Vec<u8>,
}

fn vm_of(format: &dyn Format, tag: &str) -> Vec<u8> {
    let state = format.open_vmstate(&id_of(format, tag)).unwrap();
    let mut bytes = vec![0xa5; state.size() as usize];
    state.read(0, &[ReadBuf::new(&mut bytes)]).unwrap();
    bytes
}

fn finish(change: &mut dyn SnapshotCreate) {
    change.prepare().unwrap();
    change.publish().unwrap();
    change.finish().unwrap();
}

/// Changes VM state and the model of it alike. What the model lacks at its end is zeroes.
fn scribble(random: &mut Random, change: &dyn SnapshotCreate, vm: &mut Vec<u8>, unit: u64) {
    let at = random.below(AREA / unit) * unit;
    let most = match random.below(4) {
        0 => AREA / 3,
        1 => 300 << 10,
        _ => 3 * unit,
    };
    let len = ((1 + random.below(most / unit)) * unit).min(AREA - at);
    let span = at as usize..(at + len) as usize;
    vm.resize(vm.len().max(span.end), 0);
    if random.below(3) == 0 {
        change.zero_vmstate(at, len).unwrap();
        vm[span].fill(0);
    } else {
        let bytes = random.bytes(len);
        // In buffers that end anywhere.
        let (a, b) = bytes.split_at(random.below(len) as usize);
        change.write_vmstate(at, &[WriteBuf::new(a), WriteBuf::new(b)]).unwrap();
        vm[span].copy_from_slice(&bytes);
    }
}

/// A snapshot that may inherit from one there is; rolled back now and then.
fn save(random: &mut Random, format: &dyn Format, disk: &[u8], snaps: &mut Vec<Snap>) {
    let tag = format!("t{}", random.next());
    let mut change = format.create_snapshot(&new_snapshot(&tag)).unwrap();
    let unit = PAGE.min(change.cluster_size());
    let mut vm = Vec::new();
    if !snaps.is_empty() && random.below(8) != 0 {
        let from = &snaps[random.below(snaps.len() as u64) as usize];
        let size = change.inherit_vmstate(&id_of(format, &from.tag)).unwrap();
        assert_eq!(size, from.vm.len() as u64);
        vm.clone_from(&from.vm);
    }
    let changes = random.below(10);
    for _ in 0..changes {
        scribble(random, &*change, &mut vm, unit);
    }
    // Any number of bytes may be recorded; what is past it is gone, and zeroes if it grows again.
    match random.below(4) {
        _ if changes == 0 => vm.truncate(random.below(vm.len() as u64 + 1) as usize),
        0 => {
            let less = random.below(AREA.min(vm.len() as u64) + 1);
            change.zero_vmstate(less / unit * unit, AREA - less / unit * unit).unwrap();
            vm.truncate((less / unit * unit) as usize);
            vm.resize(less as usize, 0);
        }
        1 => vm.resize(vm.len() + random.below(3 * change.cluster_size()) as usize, 0),
        _ => {}
    }
    change.set_vmstate_size(vm.len() as u64);
    match random.below(8) {
        0 => return change.rollback().unwrap(),
        1 => {
            change.prepare().unwrap();
            return change.rollback().unwrap();
        }
        _ => finish(&mut *change),
    }
    snaps.push(Snap { tag, disk: disk.to_vec(), vm });
}

fn compare(dir: &Path, image: &Path, snaps: &[Snap]) {
    check(image);
    let (_graph, node) = open(image);
    for snap in snaps {
        assert!(vm_of(&*node.format(), &snap.tag) == snap.vm, "VM state of {}", snap.tag);
    }
    drop((_graph, node));
    if let Some(snap) = snaps.first() {
        assert!(qemu_contents(dir, image, Some(&snap.tag)) == snap.disk, "disk of {}", snap.tag);
    }
}

fn random_saves(options: &str) {
    if !have_qemu_img("inherited VM state") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "3M", options);
    let mut random = Random(0x9e37_79b9 ^ (options.len() as u64) << 7);
    let (mut disk, mut snaps) = (vec![0; 3 << 20], Vec::<Snap>::new());
    for round in 0..6 {
        let (graph, node) = open(&image);
        let format = node.format();
        for _ in 0..6 {
            let at = random.below(2 << 20) as usize;
            let bytes = random.bytes(100_000);
            common::write(&*format, at as u64, &bytes);
            disk[at..at + bytes.len()].copy_from_slice(&bytes);
            save(&mut random, &*format, &disk, &mut snaps);
            if snaps.len() > 4 {
                let gone = snaps.swap_remove(random.below(snaps.len() as u64) as usize);
                delete(&*format, &gone.tag);
            }
        }
        drop((graph, node, format));
        compare(dir.path(), &image, &snaps);
        // QEMU deletes one too, of any age.
        if round % 2 == 1 && !snaps.is_empty() {
            let gone = snaps.swap_remove(random.below(snaps.len() as u64) as usize);
            qemu_img(&["snapshot", "-d", &gone.tag, &path(&image)]);
            compare(dir.path(), &image, &snaps);
        }
    }
    while let Some(gone) = snaps.pop() {
        qemu_img(&["snapshot", "-d", &gone.tag, &path(&image)]);
        compare(dir.path(), &image, &snaps);
    }
    assert!(qemu_contents(dir.path(), &image, None) == disk);
}

macro_rules! kinds {
    ($($name:ident: $options:expr;)*) => { $(#[test] fn $name() { random_saves($options); })* };
}

kinds! {
    saves_that_inherit_are_whole_on_clusters_of_512: "cluster_size=512";
    saves_that_inherit_are_whole_on_clusters_of_4k: "cluster_size=4k";
    saves_that_inherit_are_whole_on_clusters_of_64k: "cluster_size=64k";
    saves_that_inherit_are_whole_on_clusters_of_2m: "cluster_size=2M";
    saves_that_inherit_are_whole_in_version_2: "cluster_size=16k,compat=0.10";
    saves_that_inherit_are_whole_with_subclusters: "cluster_size=32k,extended_l2=on";
    saves_that_inherit_are_whole_with_lazy_refcounts: "cluster_size=8k,lazy_refcounts=on";
}

#[test]
fn threads_change_inherited_vm_state_page_by_page() {
    if !have_qemu_img("inherited VM state, threads") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "3M", "");
    let (graph, node) = open(&image);
    let format = node.format();
    let mut vm = Random(7).bytes(16 << 20);
    let mut change = format.create_snapshot(&new_snapshot("first")).unwrap();
    change.write_vmstate(0, &[WriteBuf::new(&vm)]).unwrap();
    change.set_vmstate_size(vm.len() as u64);
    finish(&mut *change);
    drop(change);
    let first = vm.clone();
    let mut change = format.create_snapshot(&new_snapshot("second")).unwrap();
    change.inherit_vmstate("1").unwrap();
    let writer = &*change;
    std::thread::scope(|scope| {
        // Parts of whole clusters for each.
        for (thread, part) in vm.chunks_mut(4 << 20).enumerate() {
            scope.spawn(move || {
                let start = thread as u64 * (4 << 20);
                let mut random = Random(thread as u64 + 1);
                for _ in 0..300 {
                    let page = random.below(part.len() as u64 / PAGE) * PAGE;
                    let span = page as usize..(page + PAGE) as usize;
                    if random.below(4) == 0 {
                        writer.zero_vmstate(start + page, PAGE).unwrap();
                        part[span].fill(0);
                    } else {
                        let bytes = random.bytes(PAGE);
                        writer.write_vmstate(start + page, &[WriteBuf::new(&bytes)]).unwrap();
                        part[span].copy_from_slice(&bytes);
                    }
                }
            });
        }
    });
    finish(&mut *change);
    drop(change);
    assert!(vm_of(&*format, "first") == first);
    assert!(vm_of(&*format, "second") == vm);
    delete(&*format, "first");
    assert!(vm_of(&*format, "second") == vm);
    drop((graph, node, format));
    check(&image);
}

#[test]
fn vm_state_of_qemu_is_inherited_and_read_back_by_qemu() {
    if !have_qemu_img("VM state of QEMU") {
        return;
    }
    for options in ["", "cluster_size=4k", "cluster_size=2M", "compat=0.10", "extended_l2=on"] {
        let dir = tempfile::tempdir().unwrap();
        let image = create(dir.path(), "a.qcow2", "3M", options);
        qemu_io(&image, &["write -P 1 0 1M", "write -b -P 9 0 5M"]);
        qemu_img(&["snapshot", "-c", "old", &path(&image)]);
        let (graph, node) = open(&image);
        let format = node.format();
        // qemu-io records no length.
        assert_eq!(format.snapshots()[0].vm_state_size, 0, "{options}");
        drop((graph, node, format));
        set_vm_size(&image, (5 << 20) - 1024);
        let (graph, node) = open(&image);
        let format = node.format();
        let mut change = format.create_snapshot(&new_snapshot("new")).unwrap();
        assert_eq!(change.inherit_vmstate("1").unwrap(), (5 << 20) - 1024, "{options}");
        change.write_vmstate(1 << 20, &[WriteBuf::new(&[5; 4096])]).unwrap();
        change.zero_vmstate((1 << 20) + 4096, 8192).unwrap();
        change.set_vmstate_size(6 << 20);
        finish(&mut *change);
        drop(change);
        delete(&*format, "old");
        drop((graph, node, format));
        check(&image);
        qemu_img(&["snapshot", "-a", "new", &path(&image)]);
        let reads = [
            "read -b -P 9 0 1M".to_owned(),
            "read -b -P 5 1M 4k".to_owned(),
            format!("read -b -P 0 {} 8k", (1 << 20) + 4096),
            format!("read -b -P 9 {} {}", (1 << 20) + 12288, (4 << 20) - 12288 - 1024),
            // Past the recorded length nothing is inherited.
            format!("read -b -P 0 {} {}", (5 << 20) - 1024, (1 << 20) + 1024),
            "read -P 1 0 1M".to_owned(),
        ];
        qemu_io(&image, &reads.each_ref().map(|read| &**read));
        check(&image);
        qemu_img(&["snapshot", "-d", "new", &path(&image)]);
        check(&image);
    }
}

/// Sets the length of the VM state of the only snapshot, as savevm would.
fn set_vm_size(image: &Path, size: u64) {
    let mut bytes = std::fs::read(image).unwrap();
    let be64 = |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let table = be64(&bytes, 64) as usize;
    bytes[table + 32..table + 36].copy_from_slice(&(size as u32).to_be_bytes());
    bytes[table + 40..table + 48].copy_from_slice(&size.to_be_bytes());
    std::fs::write(image, bytes).unwrap();
}

fn in_memory(size: u64) -> (Arc<MemoryStorage>, Qcow2) {
    let storage = Arc::new(MemoryStorage::default());
    let options = CreateOptions { size, ..CreateOptions::default() };
    create_image(&*storage, None, &options, &Progress::default()).unwrap();
    let image = Qcow2::open(Probe::new(storage.clone()).unwrap(), None, false).unwrap();
    (storage, image)
}

#[test]
fn what_an_inheriting_save_writes_follows_what_changed() {
    let (storage, image) = in_memory(1 << 20);
    // 1 GiB in two L2 tables, of which a part is stored.
    let size = 1 << 30;
    let mut change = image.create_snapshot(&new_snapshot("first")).unwrap();
    for at in [0, 300 << 20, 700 << 20] {
        change.write_vmstate(at, &[WriteBuf::new(&vec![3; 16 << 20])]).unwrap();
    }
    change.set_vmstate_size(size);
    finish(&mut *change);
    drop(change);
    let written = |storage: &MemoryStorage| {
        let bytes = |op: &Op| if let Op::Write(_, len) = op { *len } else { 0 };
        storage.recorded().iter().map(bytes).sum::<u64>()
    };
    storage.record();
    let mut change = image.create_snapshot(&new_snapshot("same")).unwrap();
    change.inherit_vmstate("1").unwrap();
    finish(&mut *change);
    drop(change);
    // L1 table, snapshot table, counts.
    let same = written(&storage);
    assert!(same < 256 << 10, "{same} bytes for nothing");
    storage.record();
    let mut change = image.create_snapshot(&new_snapshot("some")).unwrap();
    change.inherit_vmstate("2").unwrap();
    for at in [0, 300 << 20, 701 << 20] {
        for page in 0..4 {
            change.write_vmstate(at + page * PAGE, &[WriteBuf::new(&[4; 4096])]).unwrap();
        }
    }
    finish(&mut *change);
    drop(change);
    // Beside that two L2 tables, three clusters, and three pages of each once more.
    let some = written(&storage) - same;
    assert!(some < (2 + 3 + 3) * (64 << 10), "{some} bytes for twelve pages");
    assert!(size / some > 2000);
}

#[test]
fn pages_that_became_zero_give_their_clusters_back() {
    let (_, image) = in_memory(1 << 20);
    let mut change = image.create_snapshot(&new_snapshot("first")).unwrap();
    change.write_vmstate(0, &[WriteBuf::new(&vec![3; 4 << 20])]).unwrap();
    change.zero_vmstate(1 << 20, 1 << 20).unwrap();
    change.set_vmstate_size(4 << 20);
    finish(&mut *change);
    drop(change);
    let mut change = image.create_snapshot(&new_snapshot("second")).unwrap();
    change.inherit_vmstate("1").unwrap();
    change.zero_vmstate(0, 1 << 20).unwrap();
    change.write_vmstate(1 << 20, &[WriteBuf::new(&vec![5; 1 << 20])]).unwrap();
    finish(&mut *change);
    drop(change);
    let stored = |id: &str| {
        let extents = image.open_vmstate(id).unwrap().extents(0, 4 << 20).unwrap();
        extents.iter().map(|e| (e.offset >> 20, e.len >> 20, e.zero)).collect::<Vec<_>>()
    };
    assert_eq!(stored("1"), [(0, 1, false), (1, 1, true), (2, 2, false)]);
    assert_eq!(stored("2"), [(0, 1, true), (1, 3, false)]);
}

#[test]
fn vm_state_that_cannot_be_inherited_is_refused_and_the_image_stays_whole() {
    if !have_qemu_img("refused inheritance") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "3M", "");
    let (graph, node) = open(&image);
    let format = node.format();
    let mut change = format.create_snapshot(&new_snapshot("first")).unwrap();
    change.write_vmstate(0, &[WriteBuf::new(&vec![1; 1 << 20])]).unwrap();
    change.set_vmstate_size(1 << 20);
    finish(&mut *change);
    drop(change);
    let mut change = format.create_snapshot(&new_snapshot("second")).unwrap();
    let error = change.inherit_vmstate("7").unwrap_err().to_string();
    assert!(error.contains('7'), "{error}");
    let error = change.write_vmstate(512, &[WriteBuf::new(&[1; 4096])]).unwrap_err().to_string();
    assert!(error.contains("whole units of 4096"), "{error}");
    assert!(change.zero_vmstate(0, 100).is_err());
    change.write_vmstate(0, &[WriteBuf::new(&[2; 4096])]).unwrap();
    let error = change.inherit_vmstate("1").unwrap_err().to_string();
    assert!(error.contains("before any is written"), "{error}");
    change.set_vmstate_size(0);
    let error = change.prepare().unwrap_err().to_string();
    assert!(error.contains("below what was written"), "{error}");
    drop(change);
    let mut change = format.create_snapshot(&new_snapshot("third")).unwrap();
    change.inherit_vmstate("1").unwrap();
    assert!(change.inherit_vmstate("1").is_err());
    change.set_time(5, 6, 7);
    // The earlier one can go as soon as the change has ended, before it is dropped.
    finish(&mut *change);
    land(&mut *format.delete_snapshot("1").unwrap()).unwrap();
    drop(change);
    let info = &format.snapshots()[0];
    assert_eq!((info.date_sec, info.date_nsec, info.vm_clock_nsec), (5, 6, 7));
    assert!(vm_of(&*format, "third") == vec![1; 1 << 20]);
    drop((graph, node, format));
    check(&image);
}
