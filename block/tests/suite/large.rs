//! Sizes and numbers at the far end: 10 TiB of disk, hundreds of snapshots, long backing chains.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::jobs::{Control, Operation, Stream, StreamOptions};
use block::qcow2::check::{self, Options as CheckOptions};
use block::qcow2::create::{CreateOptions, create};
use block::qcow2::{Probe, Qcow2};
use block::storage::memory::MemoryStorage;
use block::storage::{FileOptions, FileStorage, Storage};
use block::{Format, Graph, Node, Preallocation, Progress, ReadBuf, User, WriteBuf};
use serde_json::json;

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

/// A table of theirs has more clusters than a refcount block has counts.
#[test]
fn a_disk_of_small_clusters_with_a_long_l1_table_takes_snapshots_and_grows() {
    if !have_qemu_img("long L1 table") {
        return;
    }
    for options in ["cluster_size=512", "cluster_size=512,refcount_bits=64"] {
        let dir = tempfile::tempdir().unwrap();
        let image = common::create(dir.path(), "small.qcow2", "1G", options);
        let (graph, node) = common::open(&image);
        let disk = node.format();
        let far = (1 << 30) - 512;
        write(&*disk, far, &[1; 512]);
        save(&*disk, "one");
        write(&*disk, far, &[2; 512]);
        disk.resize(4 << 30, Preallocation::Off, &Progress::default()).unwrap();
        write(&*disk, (4 << 30) - 512, &[3; 512]);
        save(&*disk, "two");
        load(&*disk, "one");
        assert_eq!((disk.size(), read(&*disk, far, 512)), (1 << 30, vec![1; 512]));
        load(&*disk, "two");
        assert_eq!(read(&*disk, (4 << 30) - 512, 512), [3; 512]);
        delete(&*disk, "one");
        assert_eq!(read(&*disk, far, 512), [2; 512]);
        drop((disk, node, graph));
        qemu_check(&image);
        // Five L1 tables of 1 MiB at most, and what counts them.
        assert!(std::fs::metadata(&image).unwrap().len() < 40 << 20);
    }
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

const CLUSTER: u64 = 65536;
const SIZE: u64 = 128 << 20;

/// An image at each place of a chain, the lowest first, each with a cluster that only it has.
fn chain(dir: &Path, images: usize) -> Vec<PathBuf> {
    let at = |n: usize| dir.join(format!("{n}.qcow2"));
    for n in 0..images {
        let options = CreateOptions {
            size: SIZE,
            cluster_size: Some(CLUSTER),
            backing_file: (n > 0).then(|| format!("{}.qcow2", n - 1)),
            backing_fmt: (n > 0).then(|| "qcow2".to_owned()),
            ..CreateOptions::default()
        };
        let storage = MemoryStorage::new(Vec::new());
        create(&storage, None, &options, &Progress::default()).unwrap();
        let storage: Arc<dyn Storage> = Arc::new(storage);
        let format = Qcow2::open(Probe::new(storage.clone()).unwrap(), None, false).unwrap();
        write(&format, n as u64 * CLUSTER, &[byte(n); CLUSTER as usize]);
        drop(format);
        let mut bytes = vec![0; storage.len().unwrap() as usize];
        storage.read_at(0, &[ReadBuf::new(&mut bytes)]).unwrap();
        std::fs::write(at(n), bytes).unwrap();
    }
    (0..images).map(at).collect()
}

fn add_top(graph: &Graph, image: &Path) -> block::Result<Arc<Node>> {
    let top = path(image);
    graph.add_text(&format!("driver=qcow2,node-name=d,file.driver=file,file.filename={top}"))
}

/// What the disk of a chain reads as.
fn contents(images: usize) -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    for (n, cluster) in bytes.chunks_mut(CLUSTER as usize).take(images).enumerate() {
        cluster.fill(byte(n));
    }
    bytes
}

/// Runs with a quarter of the stack that threads have.
fn with_little_stack(test: fn()) {
    std::thread::Builder::new().stack_size(512 << 10).spawn(test).unwrap().join().unwrap();
}

/// Opened, read through, written to, told of, streamed and taken apart.
#[test]
fn a_backing_chain_of_1000_images_is_one_disk() {
    if have_qemu_img("long chain") {
        with_little_stack(long_chain);
    }
}

fn long_chain() {
    const IMAGES: usize = 1000;
    block::storage::raise_descriptor_limit().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let images = chain(dir.path(), IMAGES);
    let (top, below) = (&images[IMAGES - 1], &images[IMAGES - 2]);
    let graph = Graph::new();
    let node = add_top(&graph, top).unwrap();
    assert_eq!(graph.list().len(), 2 * IMAGES);
    assert_eq!(node.info(true).unwrap().backing_file.unwrap(), path(below));
    let info = node.info(false).unwrap();
    assert_eq!(info.backing_file_depth, IMAGES as u64 - 1);
    let images_told = std::iter::successors(Some(&info.image), |i| i.backing_image.as_deref());
    assert_eq!(images_told.count(), 201);
    // All nodes told of together tell of no more than 10000 within others, whatever the chain's length.
    let infos = graph.infos(false).unwrap();
    assert_eq!(infos.len(), 2 * IMAGES);
    let told = infos.iter().map(|info| {
        let below = info.image.backing_image.as_deref();
        std::iter::successors(below, |image| image.backing_image.as_deref()).count()
    });
    assert_eq!(told.sum::<usize>(), 10_000);
    let deepest = infos.iter().map(|info| info.backing_file_depth).max();
    assert_eq!(deepest, Some(IMAGES as u64 - 1));

    let mut expected = contents(IMAGES);
    assert!(common::read_all(&*node.format()) == expected);
    // A write that copies from the lowest image.
    node.write(512, &[WriteBuf::new(&[0xee; 512])]).unwrap();
    expected[512..1024].fill(0xee);
    let status = node.format().block_status(0, SIZE).unwrap();
    let depths: Vec<_> = status.iter().map(|extent| (extent.len, extent.depth)).collect();
    assert_eq!(depths[..3], [(CLUSTER, 1), (CLUSTER, 999), (CLUSTER, 998)]);
    assert_eq!(depths.len(), IMAGES + 1);

    // A node above all of them while requests come, and a base that takes writes and refuses them.
    let overlay = common::create(dir.path(), "over.qcow2", "128M", "");
    graph
        .add(&json!({"driver": "qcow2", "node-name": "o", "backing": null,
            "file": {"driver": "file", "filename": path(&overlay)}}))
        .unwrap();
    let user = graph.attach("d", User::device("vda", true, false)).unwrap();
    graph.append("d", "o").unwrap();
    user.link().write(0, &[WriteBuf::new(&[0xdd; 512])], false).unwrap();
    assert!(common::read(&*node.format(), 0, 512) == [1; 512]);
    graph.replace("o", "d").unwrap();
    assert_eq!(user.node().name(), "d");
    drop(user);
    graph.remove("o").unwrap();
    let lowest = graph.list()[0].name().to_owned();
    graph.set_read_only(&lowest, true).unwrap();

    // All of it goes into the top, and the images below are closed.
    let options = StreamOptions { device: "d".to_owned(), ..StreamOptions::default() };
    let mut stream = Stream::new(&graph, &options).unwrap();
    stream.run(&Control::default()).unwrap();
    stream.commit().unwrap();
    drop(stream);
    assert_eq!(graph.list().len(), 2);
    assert!(common::read_all(&*node.format()) == expected);
    graph.remove("d").unwrap();
    drop(node);
    qemu_check(top);
    assert!(common::qemu_contents(dir.path(), top, None) == expected);
}

#[test]
fn a_long_chain_that_comes_back_to_itself_is_refused() {
    const IMAGES: usize = 300;
    if !have_qemu_img("long loop") {
        return;
    }
    block::storage::raise_descriptor_limit().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let images = chain(dir.path(), IMAGES);
    let graph = Graph::new();
    for (bottom, to) in [(0, IMAGES - 1), (0, IMAGES / 2), (IMAGES / 2, IMAGES / 2)] {
        qemu_img(&[
            "rebase",
            "-u",
            "-F",
            "qcow2",
            "-b",
            &path(&images[to]),
            &path(&images[bottom]),
        ]);
        let error = add_top(&graph, &images[IMAGES - 1]).unwrap_err().to_string();
        assert!(error.contains(&path(&images[to])) && error.ends_with("infinite loop."), "{error}");
        assert!(graph.list().is_empty());
    }
    // By another name of the same file, and without the name of a format.
    let link = dir.path().join("link.qcow2");
    std::os::unix::fs::symlink(&images[IMAGES - 1], &link).unwrap();
    qemu_img(&["rebase", "-u", "-F", "qcow2", "-b", &path(&link), &path(&images[IMAGES / 2])]);
    let error = add_top(&graph, &images[IMAGES - 1]).unwrap_err().to_string();
    assert!(error.ends_with("infinite loop."), "{error}");
    assert!(graph.list().is_empty());
}

/// Nodes with names of their own, from the lowest up: whoever has the last handle of the uppermost
/// ends them all.
#[test]
fn a_long_chain_of_named_nodes_is_dropped_as_a_whole() {
    with_little_stack(|| {
        const IMAGES: usize = 400;
        block::storage::raise_descriptor_limit().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let graph = Graph::new();
        for (n, image) in chain(dir.path(), IMAGES).iter().enumerate() {
            let below = n.checked_sub(1).map(|below| format!("n{below}"));
            graph
                .add(&json!({"driver": "qcow2", "node-name": format!("n{n}"), "backing": below,
                    "read-only": true, "file": {"driver": "file", "filename": path(image)}}))
                .unwrap();
        }
        let top = graph.get(&format!("n{}", IMAGES - 1)).unwrap();
        drop(graph);
        assert!(common::read_all(&*top.format()) == contents(IMAGES));
    });
}
