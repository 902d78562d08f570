//! A host that transfers a part of what it is asked for. A real one does at the limit of a file's size:
//! the kernel writes up to it, says how much that was, and fails the rest. Everywhere else the calls are
//! given less than is wanted, so that each of them is short.

use std::num::NonZeroU32;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use block::qcow2::check;
use block::queue::{AlignedBuf, Completion, OwnedBufs, Queue, Request};
use block::storage::{Aio, FileOptions, FileStorage};
use block::{Format, Graph, Node, WriteBuf};

use crate::common::{self, Random, Start as _, create, have_qemu_img};
use crate::kinds::{Base, Kind, Start};
use crate::operations::{BITMAPS, CHAINS, OPERATIONS, Operation, RESIZES, View, prepared, view};
use crate::record::Host;
use crate::unlocked;

const IMAGE: &str = "CRASH_LIMITED_IMAGE";
const CLUSTER: usize = 65536;
/// The limit, in units of 512 bytes: within the 11th cluster, off any page.
const LIMIT: usize = 10 * 128 + 77;

fn node(image: &Path) -> (Graph, std::sync::Arc<block::Node>) {
    let graph = Graph::new();
    let file = format!("file.driver=file,file.filename={}", image.display());
    let node = graph.add_text(&format!("driver=qcow2,node-name=d,{file}")).unwrap();
    (graph, node)
}

/// Runs under the limit. Not a test by itself: the parent runs it.
#[test]
#[ignore = "the process that the test of short writes limits"]
fn limited() {
    let Some(image) = std::env::var_os(IMAGE) else { return };
    let (_graph, node) = node(Path::new(&image));
    let written = node.write(0, &[WriteBuf::new(&[1; 12 * CLUSTER])]);
    let error = written.expect_err("a write past the limit").to_string();
    assert!(error.contains("write at offset") && error.contains("File too large"), "{error}");
    assert!(common::read(&*node.format(), 0, 12 * CLUSTER).iter().all(|b| *b == 0), "mapped");
    // What fits goes on, in the clusters that were given back.
    node.write(CLUSTER as u64, &[WriteBuf::new(&[2; CLUSTER])]).unwrap();
    node.flush().unwrap();
    println!("\ndone");
}

#[test]
fn a_write_of_which_the_host_writes_a_part_fails_and_gives_its_clusters_back() {
    if !have_qemu_img("short writes") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "2M", "");
    let me = std::env::current_exe().unwrap();
    // The signal that comes with the error is ignored, also by what is executed.
    let script = format!(
        "trap '' XFSZ; ulimit -f {LIMIT}; \
         exec '{}' --exact short::limited --ignored --nocapture --test-threads=1",
        me.display()
    );
    let output = Command::new("sh").args(["-c", &script]).env(IMAGE, &image).run().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("\ndone\n"), "{text}{errors}");
    let storage = FileStorage::open(&image, unlocked()).unwrap();
    assert!(check::check(&storage, &check::Options::default()).unwrap().is_clean());
    drop(storage);
    common::check(&image);
    let (_graph, node) = node(&image);
    let disk = common::read_all(&*node.format());
    assert!(disk[..CLUSTER].iter().all(|b| *b == 0));
    assert!(disk[CLUSTER..2 * CLUSTER].iter().all(|b| *b == 2));
    assert!(disk[2 * CLUSTER..].iter().all(|b| *b == 0));
}

const K: usize = 1024;

fn limited_to(bytes: u32) -> FileOptions {
    FileOptions { transfer_limit: NonZeroU32::new(bytes), ..unlocked() }
}

/// What an operation makes of an image where every transfer is whole.
fn wanted(base: &Base, operation: &Operation) -> View {
    let host = Host::new(base.files.clone());
    let format = base.open(&host, false).unwrap();
    (operation.run)(base, &format).unwrap();
    view(&format)
}

/// Every operation on files of which each system call moves at most `limit` bytes.
fn every_transfer_short(kind: Kind, limit: u32, lists: &[&[Operation]]) {
    if !have_qemu_img("short transfers") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let base = prepared(dir.path(), kind);
    let mut count = 0;
    for operation in lists.iter().copied().flatten() {
        let case = format!("{} ({}), {limit} bytes at a time", operation.name, kind.options);
        let wanted = wanted(&base, operation);
        let image = base.put(dir.path(), "short.qcow2", &base.files);
        let format = base.open_files(&image, limited_to(limit)).unwrap();
        (operation.run)(&base, &format).unwrap_or_else(|e| panic!("{case}: {e}"));
        assert!(view(&format) == wanted, "{case}: not what it should be");
        drop(format);
        let whole = base.open_files(&image, unlocked()).unwrap();
        assert!(view(&whole) == wanted, "{case}: the file disagrees");
        drop(whole);
        let storage = FileStorage::open(&image, unlocked()).unwrap();
        let report = check::check(&storage, &check::Options::default()).unwrap();
        assert!(report.is_clean(), "{case}: {report:?}");
        drop(storage);
        common::check(&image);
        count += 1;
    }
    println!("operations with short transfers: {count} ({}, {limit} bytes)", kind.options);
}

#[test]
fn operations_with_every_transfer_short_do_the_same() {
    let kind = |options, size, start| Kind { options, size, start };
    let small = kind("cluster_size=512", 50 * K, Start::Empty);
    every_transfer_short(small, 7, &[OPERATIONS, RESIZES]);
    let large = kind("cluster_size=64k", 2048 * K, Start::Empty);
    every_transfer_short(large, 4095, &[OPERATIONS, RESIZES]);
    let subclusters = kind("cluster_size=16k,extended_l2=on", 1000 * K, Start::Backed);
    every_transfer_short(subclusters, 511, &[OPERATIONS, CHAINS]);
    let compressed = kind("cluster_size=4k", 1000 * K, Start::Compressed);
    every_transfer_short(compressed, 333, &[OPERATIONS]);
    let bitmap = kind("cluster_size=4k", 500 * K, Start::Bitmap);
    every_transfer_short(bitmap, 511, &[OPERATIONS, BITMAPS]);
}

/// Random writes and reads through a queue on a limited file, against a model.
fn queue_with_short_transfers(image: &Path, options: FileOptions) {
    let base = Base::from_bytes(Kind { options: "", size: 0, start: Start::Empty }, &[]);
    let format = base.open_files(image, options).unwrap();
    let mut model = vec![0; format.size() as usize];
    let node = Arc::new(Node::of_qcow2("d", Arc::new(format)));
    let mut queue = Queue::new(node.clone()).unwrap();
    let mut random = Random(31);
    let mut done: Vec<Completion> = Vec::new();
    let case = format!("{options:?}");
    for round in 0..60u64 {
        for id in 0..8 {
            // Each has an eighth of the disk, so that they do not meet.
            let part = model.len() as u64 / 8;
            let at = id * part + random.below(part / 4096) * 4096;
            let len = (1 + random.below(24)) * 4096;
            let (at, len) = (at, len.min((id + 1) * part - at));
            let mut buf = AlignedBuf::new(len as usize);
            let span = at as usize..(at + len) as usize;
            if round % 3 == 2 {
                buf.fill(0xa5);
                queue.submit(Request::read(at, at, OwnedBufs::from_aligned(buf)));
            } else {
                buf.copy_from_slice(&random.bytes(len));
                model[span].copy_from_slice(&buf);
                queue.submit(Request::write(at, at, false, OwnedBufs::from_aligned(buf)));
            }
        }
        queue.kick();
        queue.drain(&mut done);
        for completion in done.drain(..) {
            completion.result.unwrap_or_else(|e| panic!("{case}: {e}"));
            let bytes = completion.bufs.as_slice().unwrap();
            let at = completion.id as usize;
            assert!(*bytes == model[at..at + bytes.len()], "{case}, round {round}: at {at:#x}");
        }
    }
    drop((queue, node));
    common::check(image);
    let whole = base.open_files(image, unlocked()).unwrap();
    assert!(common::read_all(&whole) == model, "{case}: the file");
}

#[test]
fn queues_with_every_transfer_short_read_what_they_wrote() {
    if !have_qemu_img("short transfers of queues") {
        return;
    }
    for aio in [Aio::IoUring, Aio::Threads] {
        // With these the ring's transfers are direct, direct at first, and never.
        for (direct, limit) in [(true, 8192), (true, 5000), (false, 1000)] {
            let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
            let image = create(dir.path(), "a.qcow2", "4M", "cluster_size=64k");
            queue_with_short_transfers(&image, FileOptions { direct, aio, ..limited_to(limit) });
        }
    }
}
