//! Sizes and numbers at the far end: 10 TiB of disk, hundreds of snapshots, long backing chains.

use std::path::Path;
use std::sync::Arc;

use block::qcow2::check::{self, Options as CheckOptions};
use block::qcow2::create::{CreateOptions, create};
use block::qcow2::{Probe, Qcow2};
use block::storage::memory::MemoryStorage;
use block::storage::{FileOptions, FileStorage, Storage};
use block::{Format, Graph, Progress};

use crate::common::{
    self, Random, check as qemu_check, delete, have_qemu_img, load, path, qemu_img, qemu_io, read,
    save, write,
};

const TIB: u64 = 1 << 40;

fn byte(n: usize) -> u8 {
    (n % 250) as u8 + 1
}

/// The columns id and tag of `qemu-img snapshot -l`.
fn qemu_snapshots(image: &Path) -> Vec<(String, String)> {
    let text = qemu_img(&["snapshot", "-l", &path(image)]);
    let column = |line: &str| {
        let mut words = line.split_whitespace().map(str::to_owned);
        (words.next().unwrap(), words.next().unwrap())
    };
    text.lines().skip(2).map(column).collect()
}

#[test]
fn a_disk_of_10_tib_is_written_at_its_far_end_and_goes_back_to_a_snapshot() {
    if !have_qemu_img("10 TiB") {
        return;
    }
    for (cluster_size, extended_l2) in [(65536, false), (65536, true), (2 << 20, false)] {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("a.qcow2");
        let options = CreateOptions {
            size: 10 * TIB,
            cluster_size: Some(cluster_size),
            extended_l2: Some(extended_l2),
            ..CreateOptions::default()
        };
        std::fs::write(&image, []).unwrap();
        let storage = FileStorage::open(&image, FileOptions::default()).unwrap();
        create(&storage, None, &options, &Progress::default()).unwrap();
        drop(storage);
        let (graph, node) = common::open(&image);
        let format = node.format();
        let far = 10 * TIB - 4096;
        assert_eq!(format.size(), 10 * TIB);
        write(&*format, far, &[1; 4096]);
        write(&*format, 5 * TIB + 512, &[2; 512]);
        save(&*format, "one");
        write(&*format, far, &[3; 4096]);
        write(&*format, 0, &[4; 4096]);
        save(&*format, "two");
        format.flush().unwrap();
        let refused = format.write(far + 512, &[block::WriteBuf::new(&[9; 4096])]);
        assert!(refused.is_err(), "past the end");
        drop(format);
        graph.remove("d").unwrap();
        drop(node);

        qemu_check(&image);
        let far_text = format!("{far}");
        let middle = (5 * TIB + 512).to_string();
        qemu_io(
            &image,
            &[&format!("read -P 3 {far_text} 4096"), &format!("read -P 2 {middle} 512")],
        );
        let tags = [("1".to_owned(), "one".to_owned()), ("2".to_owned(), "two".to_owned())];
        assert_eq!(qemu_snapshots(&image), tags);

        let (graph, node) = common::open(&image);
        let format = node.format();
        load(&*format, "one");
        assert!(read(&*format, far, 4096) == [1; 4096] && read(&*format, 0, 512) == [0; 512]);
        assert!(read(&*format, 5 * TIB, 1024) == [[0; 512], [2; 512]].concat());
        delete(&*format, "one");
        delete(&*format, "two");
        drop(format);
        graph.remove("d").unwrap();
        drop(node);
        qemu_check(&image);
        let storage = FileStorage::open(&image, FileOptions::default()).unwrap();
        assert!(check::check(&storage, &CheckOptions::default()).unwrap().is_clean());
        drop(storage);
        qemu_io(&image, &[&format!("read -P 1 {far_text} 4096")]);
    }
}

#[test]
fn hundreds_of_snapshots_are_listed_as_by_qemu_and_deleted_in_any_order() {
    const SNAPSHOTS: usize = 300;
    const CLUSTER: u64 = 4096;
    if !have_qemu_img("hundreds of snapshots") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = common::create(dir.path(), "a.qcow2", "4M", "cluster_size=4k");
    let storage = Arc::new(MemoryStorage::new(std::fs::read(&image).unwrap()));
    let open = || {
        let storage: Arc<dyn Storage> = storage.clone();
        Qcow2::open(Probe::new(storage).unwrap(), None, false).unwrap()
    };
    let mut random = Random(300);
    let mut format = open();
    let place = |n: usize| n as u64 % 200 * CLUSTER;
    for n in 0..SNAPSHOTS {
        write(&format, place(n), &[byte(n); CLUSTER as usize]);
        save(&format, &format!("tag{n}"));
    }
    let mut left: Vec<usize> = (0..SNAPSHOTS).collect();
    loop {
        if left.len().is_multiple_of(60) {
            // Opened anew: the list is what the image has.
            drop(format);
            std::fs::write(&image, storage.bytes()).unwrap();
            qemu_check(&image);
            format = open();
            let listed: Vec<_> =
                format.snapshots().into_iter().map(|info| (info.id, info.tag)).collect();
            let wanted: Vec<_> =
                left.iter().map(|n| ((n + 1).to_string(), format!("tag{n}"))).collect();
            assert_eq!(listed, wanted);
            assert_eq!(qemu_snapshots(&image), wanted);
        }
        if left.is_empty() {
            break;
        }
        let n = left.remove(random.below(left.len() as u64) as usize);
        if random.below(20) == 0 {
            let now = common::read_all(&format);
            load(&format, &format!("tag{n}"));
            assert!(read(&format, place(n), 4096) == [byte(n); 4096], "tag{n}");
            write(&format, 0, &now);
        }
        delete(&format, &format!("tag{n}"));
        assert!(format.snapshots().iter().all(|info| info.tag != format!("tag{n}")));
    }
    let last = SNAPSHOTS - 1;
    assert!(read(&format, place(last), 4096) == [byte(last); 4096]);
}

/// The longest chain, a cluster of which each image has: opened, read through, told of and taken
/// apart with half of the stack that threads have.
#[test]
fn a_backing_chain_of_200_images_is_opened_read_and_removed_and_one_more_is_refused() {
    if have_qemu_img("long chain") {
        let thread = std::thread::Builder::new().stack_size(1 << 20).spawn(long_chain);
        thread.unwrap().join().unwrap();
    }
}

fn long_chain() {
    const IMAGES: usize = 200;
    const SIZE: u64 = 64 << 20;
    let dir = tempfile::tempdir().unwrap();
    let at = |n: usize| dir.path().join(format!("{n}.qcow2"));
    for n in 0..=IMAGES {
        let options = CreateOptions {
            size: SIZE,
            cluster_size: Some(65536),
            backing_file: (n > 0).then(|| format!("{}.qcow2", n - 1)),
            backing_fmt: (n > 0).then(|| "qcow2".to_owned()),
            ..CreateOptions::default()
        };
        std::fs::write(at(n), []).unwrap();
        let storage: Arc<dyn Storage> =
            Arc::new(FileStorage::open(at(n), FileOptions::default()).unwrap());
        create(&*storage, None, &options, &Progress::default()).unwrap();
        let format = Qcow2::open(Probe::new(storage).unwrap(), None, false).unwrap();
        write(&format, n as u64 * 65536, &[byte(n); 65536]);
    }
    let graph = Graph::new();
    let add = |n: usize| {
        let top = path(&at(n));
        graph.add_text(&format!("driver=qcow2,node-name=d,file.driver=file,file.filename={top}"))
    };
    let error = add(IMAGES).unwrap_err().to_string();
    assert!(error.contains("longer than 200 images"), "{error}");
    let top = at(IMAGES - 1);
    let node = add(IMAGES - 1).unwrap();
    assert_eq!(node.info(true).unwrap().backing_file.unwrap(), path(&at(IMAGES - 2)));
    assert_eq!(node.info(false).unwrap().backing_file_depth, IMAGES as u64 - 1);
    for n in [0, 1, IMAGES / 2, IMAGES - 2, IMAGES - 1] {
        let bytes = common::read(&*node.format(), n as u64 * 65536, 65536);
        assert!(bytes == [byte(n); 65536], "of image {n}");
    }
    // What no image has, and a write that copies from the lowest one.
    assert!(common::read(&*node.format(), SIZE - 512, 512) == [0; 512]);
    write(&*node.format(), 512, &[0xee; 512]);
    let first = common::read(&*node.format(), 0, 1536);
    assert!(first == [[1; 512], [0xee; 512], [1; 512]].concat());
    let status = node.format().block_status(0, SIZE).unwrap();
    assert_eq!(status.iter().map(|extent| extent.len).sum::<u64>(), SIZE);
    graph.remove("d").unwrap();
    drop(node);
    assert!(graph.list().is_empty());
    qemu_check(&top);
    qemu_io(&top, &["read -P 1 0 512", "read -P 0xee 512 512", "read -P 1 1024 512"]);
}
