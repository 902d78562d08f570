//! Resizing, with snapshots, backing files and preallocation, judged by qemu-img.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use block::qcow2::{Probe, Qcow2, check};
use block::storage::memory::MemoryStorage;
use block::{Format, Preallocation, Progress};
use serde_json::json;

use crate::common::{
    Start as _, check as qemu_check, create, have_qemu_img, open, path, qemu_contents, qemu_img,
    qemu_io, read, read_all, save, write,
};

const OFF: Preallocation = Preallocation::Off;

fn resize(format: &dyn Format, size: u64, mode: Preallocation) -> block::Result<()> {
    format.resize(size, mode, &Progress::default())
}

const KINDS: [&str; 8] = [
    "",
    "cluster_size=512",
    "cluster_size=4096",
    "cluster_size=2M",
    "extended_l2=on",
    "compat=0.10",
    "cluster_size=4096,refcount_bits=1",
    "lazy_refcounts=on,cluster_size=4096",
];

#[test]
fn disks_grow_and_shrink_and_what_is_new_reads_as_zeroes() {
    if !have_qemu_img("resize") {
        return;
    }
    for kind in KINDS {
        let dir = tempfile::tempdir().unwrap();
        let image = create(dir.path(), "d.qcow2", "1000k", kind);
        let mut model = vec![0; 1000 << 10];
        {
            let (_graph, node) = open(&image);
            let disk = node.format();
            for (at, n) in [(0, 100_000), (500_000, 200_000), (1_000_000, 24_000)] {
                write(&*disk, at as u64, &vec![7; n]);
                model[at..at + n].fill(7);
            }
            for size in [2_000_384, 1_010_176, 5_000_192, 300_032, 40 << 20, 40 << 20, 0, 700_416] {
                resize(&*disk, size as u64, OFF).unwrap();
                model.resize(size, 0);
                assert_eq!(disk.size(), size as u64);
                assert!(read_all(&*disk) == model, "{kind} {size}");
                if size > 1 << 20 {
                    write(&*disk, size as u64 - 70_000, &[9; 70_000]);
                    model[size - 70_000..].fill(9);
                }
                disk.flush().unwrap();
            }
            resize(&*disk, 700_417, OFF).unwrap_err();
        }
        qemu_check(&image);
        assert!(qemu_contents(dir.path(), &image, None) == model, "{kind}");
    }
}

#[test]
fn snapshots_keep_their_disk_and_version_2_refuses() {
    if !have_qemu_img("resize") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "d.qcow2", "3M", "cluster_size=4096");
    {
        let (_graph, node) = open(&image);
        let disk = node.format();
        write(&*disk, 0, &vec![1; 3 << 20]);
        save(&*disk, "big");
        resize(&*disk, 1 << 20, OFF).unwrap();
        write(&*disk, 0, &vec![2; 1 << 20]);
        save(&*disk, "small");
        resize(&*disk, 30 << 20, OFF).unwrap();
        assert!(read(&*disk, 1 << 20, 29 << 20).iter().all(|b| *b == 0));
        write(&*disk, 29 << 20, &vec![3; 1 << 20]);
    }
    qemu_check(&image);
    let big = qemu_contents(dir.path(), &image, Some("big"));
    // QEMU shows a snapshot with the size the disk has now.
    assert!(big[..3 << 20].iter().all(|b| *b == 1));
    let small = qemu_contents(dir.path(), &image, Some("small"));
    assert!(small[..1 << 20].iter().all(|b| *b == 2));
    qemu_img(&["snapshot", "-a", "big", &path(&image)]);
    qemu_check(&image);
    let big = qemu_contents(dir.path(), &image, None);
    assert!(big.len() == 3 << 20 && big.iter().all(|b| *b == 1));

    let image = create(dir.path(), "v2.qcow2", "3M", "compat=0.10");
    let (_graph, node) = open(&image);
    save(&*node.format(), "s");
    let error = resize(&*node.format(), 4 << 20, OFF).unwrap_err().to_string();
    assert_eq!(error, "Can't resize a v2 image which has snapshots");
}

#[test]
fn a_longer_backing_file_does_not_show_past_the_old_end() {
    if !have_qemu_img("resize") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.raw");
    std::fs::write(&base, vec![5; 8 << 20]).unwrap();
    for kind in ["compat=1.1", "compat=0.10", "extended_l2=on", "cluster_size=512"] {
        let options = format!("{kind},backing_file={},backing_fmt=raw", path(&base));
        let image = create(dir.path(), "top.qcow2", "1000k", &options);
        {
            let (_graph, node) = open(&image);
            resize(&*node.format(), 9 << 20, OFF).unwrap();
            assert!(read(&*node.format(), 0, 1000 << 10).iter().all(|b| *b == 5), "{kind}");
            let rest = read(&*node.format(), 1000 << 10, (9 << 20) - (1000 << 10));
            assert!(rest.iter().all(|b| *b == 0), "{kind}");
        }
        qemu_check(&image);
        let model = qemu_contents(dir.path(), &image, None);
        assert!(model[1000 << 10..].iter().all(|b| *b == 0), "{kind}");
    }
}

#[test]
fn a_longer_backing_file_that_was_not_open_does_not_show_past_the_old_end() {
    if !have_qemu_img("resize") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.raw");
    std::fs::write(&base, vec![5; 8 << 20]).unwrap();
    // Option, and where zeroes can be said from on. The first has one L2 table for all, the others have new ones.
    let kinds = [
        ("cluster_size=64k", 1 << 20),
        ("extended_l2=on,cluster_size=16k", 1000 << 10),
        ("cluster_size=512", 1000 << 10),
        ("cluster_size=4k", 1000 << 10),
    ];
    for ((kind, end), written) in kinds.into_iter().flat_map(|k| [(k, false), (k, true)]) {
        let options = format!("{kind},backing_file={},backing_fmt=raw", path(&base));
        let image = create(dir.path(), "top.qcow2", "1000k", &options);
        {
            let graph = block::Graph::new();
            let node = graph.add(&json!({"driver": "qcow2", "node-name": "d", "backing": null,
                "file": {"driver": "file", "filename": path(&image)}}));
            let node = node.unwrap();
            if written {
                write(&*node.format(), 0, &vec![7; 1 << 16]);
            }
            resize(&*node.format(), 9 << 20, OFF).unwrap();
            assert!(read(&*node.format(), 1 << 16, 8 << 20).iter().all(|b| *b == 0), "{kind}");
        }
        qemu_check(&image);
        let contents = qemu_contents(dir.path(), &image, None);
        let first = if written { 7 } else { 5 };
        assert!(contents[..1 << 16].iter().all(|b| *b == first), "{kind}");
        assert!(contents[1 << 16..1000 << 10].iter().all(|b| *b == 5), "{kind} {written}");
        assert!(contents[end..].iter().all(|b| *b == 0), "{kind} {written}");
    }
}

#[test]
fn growth_takes_space_as_the_mode_says() {
    use std::os::unix::fs::MetadataExt;
    if !have_qemu_img("resize") {
        return;
    }
    for kind in ["", "extended_l2=on", "compat=0.10,cluster_size=4096"] {
        for mode in [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
            let dir = tempfile::tempdir().unwrap();
            let image = create(dir.path(), "d.qcow2", "1M", kind);
            qemu_io(&image, &["write -P 9 0 1M"]);
            // Space that is free again holds old data, which must not show.
            qemu_io(&image, &["discard 128k 512k"]);
            {
                let (_graph, node) = open(&image);
                resize(&*node.format(), 9 << 20, mode).unwrap();
                assert!(read(&*node.format(), 1 << 20, 8 << 20).iter().all(|b| *b == 0));
            }
            qemu_check(&image);
            let report = crate::check::our_check(&image).unwrap();
            let clusters = (8 << 20) / if kind.contains("4096") { 4096 } else { 65536 };
            assert!(report.allocated_clusters >= clusters, "{kind} {mode:?}: {report:?}");
            let used = std::fs::metadata(&image).unwrap().blocks() * 512;
            assert_eq!(used >= 8 << 20, mode != Preallocation::Metadata, "{kind} {mode:?}: {used}");
            assert!(qemu_contents(dir.path(), &image, None)[1 << 20..].iter().all(|b| *b == 0));
        }
    }
}

#[test]
fn bitmaps_follow_and_raw_disks_too() {
    if !have_qemu_img("resize") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "d.qcow2", "1M", "");
    qemu_img(&["bitmap", "--add", &path(&image), "b0"]);
    {
        let (_graph, node) = open(&image);
        resize(&*node.format(), 64 << 20, OFF).unwrap();
        resize(&*node.format(), 2 << 20, OFF).unwrap();
    }
    qemu_check(&image);
    assert!(qemu_img(&["info", &path(&image)]).contains("b0"));

    let file = dir.path().join("d.raw");
    std::fs::write(&file, vec![4; 1 << 20]).unwrap();
    let graph = block::Graph::new();
    let text = format!("driver=raw,node-name=r,file.driver=file,file.filename={}", path(&file));
    let node = graph.add_text(&text).unwrap();
    resize(&*node.format(), 3 << 20, Preallocation::Falloc).unwrap();
    assert_eq!((node.size(), std::fs::metadata(&file).unwrap().len()), (3 << 20, 3 << 20));
    resize(&*node.format(), 512, OFF).unwrap();
    assert_eq!((node.size(), read_all(&*node.format())), (512, vec![4; 512]));
    resize(&*node.format(), 4096, Preallocation::Metadata).unwrap_err();
}

/// Every operation of a resize fails once: the disk is as before, and a retry succeeds; and the host
/// dies there: the image has no corruption, and one of the two sizes.
#[test]
fn a_resize_that_fails_or_is_cut_off_leaves_the_disk_whole() {
    if !have_qemu_img("resize") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "d.qcow2", "1M", "cluster_size=512");
    qemu_io(&image, &["write -P 6 0 1M"]);
    qemu_img(&["snapshot", "-c", "s", &path(&image)]);
    qemu_io(&image, &["write -P 7 100k 100k"]);
    let bytes = std::fs::read(&image).unwrap();
    let before = qemu_contents(dir.path(), &image, None);
    for size in [12u64 << 20, 300 << 10] {
        let mut after = before.clone();
        after.resize(size as usize, 0);
        let open = |storage: &Arc<MemoryStorage>| {
            let probe = Probe::new(storage.clone()).unwrap();
            Qcow2::open(probe, None, false).unwrap()
        };
        let storage = Arc::new(MemoryStorage::new(bytes.clone()));
        let opened = storage.changes();
        let disk = open(&storage);
        resize(&disk, size, OFF).unwrap();
        let changes = storage.changes() - opened;
        assert!(read_all(&disk) == after);
        drop(disk);
        for cut in 0..changes {
            for once in [false, true] {
                let storage = Arc::new(MemoryStorage::new(bytes.clone()));
                let disk = open(&storage);
                storage.fail_after(Some(cut), once);
                let result = resize(&disk, size, OFF);
                for left in [storage.bytes(), storage.flushed_bytes()] {
                    let found =
                        check::check(&MemoryStorage::new(left.clone()), &Default::default())
                            .unwrap();
                    assert!(
                        matches!(found.exit_code(), 0 | 3),
                        "{size} cut {cut}: {:?}",
                        found.findings
                    );
                    let disk = open(&Arc::new(MemoryStorage::new(left)));
                    let now = read_all(&disk);
                    assert!(now == before || now == after, "{size} cut {cut}");
                }
                storage.fail_after(None, false);
                if once && result.is_err() {
                    assert!([before.len(), after.len()].contains(&(disk.size() as usize)));
                    resize(&disk, size, OFF).unwrap();
                    assert!(read_all(&disk) == after, "{size} cut {cut}");
                    drop(disk);
                    judge(dir.path(), &storage.bytes(), &after);
                }
            }
        }
    }
}

fn judge(dir: &Path, bytes: &[u8], contents: &[u8]) {
    let file = dir.join("judged.qcow2");
    std::fs::write(&file, bytes).unwrap();
    let status = Command::new("qemu-img").args(["check", "-q", &path(&file)]).run().unwrap().status;
    assert!(matches!(status.code(), Some(0 | 3)), "{status}");
    assert!(qemu_contents(dir, &file, None) == contents);
}

#[test]
fn a_node_over_a_block_device_keeps_the_size_of_the_device() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("device");
    std::fs::write(&file, vec![7; 4 << 20]).unwrap();
    let made = Command::new("losetup").args(["-f", "--show"]).arg(&file).run();
    let Some(made) = made.ok().filter(|made| made.status.success()) else {
        eprintln!("SKIPPED: no loop device (root, and losetup, are needed)");
        return;
    };
    let device = String::from_utf8(made.stdout).unwrap().trim().to_owned();
    let tried = std::panic::catch_unwind(|| {
        let graph = block::Graph::new();
        let below = format!("file.driver=host_device,file.filename={device}");
        let node = graph.add_text(&format!("driver=raw,node-name=d,{below}")).unwrap();
        for size in [2 << 20, 8 << 20] {
            let error = graph.resize("d", size).unwrap_err().to_string();
            assert_eq!(error, "Cannot resize device files");
            assert_eq!(node.size(), 4 << 20);
        }
        graph.resize("d", 4 << 20).unwrap();
    });
    assert!(Command::new("losetup").args(["-d", &device]).run().unwrap().status.success());
    tried.unwrap();
}
