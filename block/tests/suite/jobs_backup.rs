//! Backups: the copy is the moment of its start, whatever is written, fails, rests or ends meanwhile.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread;

use block::bitmap::NewBitmap;
use block::jobs::{
    Action, Backup, BackupOptions, BitmapMode, Control, IoStatus, Notice, OnCbwError, OnError,
    Operation, Sync,
};
use block::{Error, Graph, Node, ReadBuf, User, WriteBuf};
use serde_json::{Value, json};

use crate::common::{self, Random, check, create, have_qemu_img, path, qemu_contents, qemu_img};
use crate::jobs_common::{Hooked, Io, MIB, add, assert_contents, control, finish, guest, pattern};

fn options(sync: Sync) -> BackupOptions {
    BackupOptions::new("s", "t", sync)
}

fn put(node: &Node, offset: u64, bytes: &[u8]) {
    node.write(offset, &[WriteBuf::new(bytes)]).unwrap();
}

fn contents(node: &Node) -> Vec<u8> {
    let mut bytes = vec![0; node.size() as usize];
    node.read(0, &[ReadBuf::new(&mut bytes)]).unwrap();
    bytes
}

fn error_of<T>(result: block::Result<T>) -> String {
    result.err().unwrap().to_string()
}

/// Guests write before, while and after a backup begins; the copy is what there was, byte for byte.
fn backup_under_writes(source: &Path, target: &Path, compress: bool) {
    let graph = Graph::new();
    let s = add(&graph, "s", source, &json!({}));
    let t = add(&graph, "t", target, &json!({}));
    let size = s.size();
    put(&s, 0, &pattern(size, 7));
    let user = graph.attach("s", User::device("vda", true, false)).unwrap();
    let (mut known, stripe) = (Vec::new(), size / 3 / 512 * 512);
    for round in 0..2 {
        let moment: Vec<_> = contents(&s).into_iter().map(Some).collect();
        let stop = AtomicBool::new(false);
        let (control, _told) = control();
        thread::scope(|scope| {
            let mut backup =
                Backup::new(&graph, BackupOptions { compress, ..options(Sync::Full) }).unwrap();
            let guests: Vec<_> = (0..3)
                .map(|n| {
                    let at = n * stripe..(n + 1) * stripe;
                    let before = moment[at.start as usize..at.end as usize].to_vec();
                    let (link, stop) = (user.link().clone(), &stop);
                    scope.spawn(move || guest(link, at, 1 + n + 10 * round, stop, before))
                })
                .collect();
            finish(&mut backup, &control).unwrap();
            drop(backup);
            stop.store(true, Ordering::Release);
            known = guests.into_iter().flat_map(|guest| guest.join().unwrap()).collect();
        });
        let (done, total) = control.progress();
        assert!(done == total && total >= size, "{done} of {total}");
        assert_contents(&contents(&t), &moment, "target");
        known.extend_from_slice(&moment[known.len()..]);
        assert_contents(&contents(&s), &known, "source");
    }
    drop((s, t, user));
    drop(graph);
    for image in [source, target].iter().filter(|i| i.extension().is_some_and(|e| e == "qcow2")) {
        check(image);
    }
}

#[test]
fn a_full_backup_is_the_moment_of_its_start() {
    if !have_qemu_img("full backup") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let qcow2 = |name, options| create(dir.path(), name, "8M", options);
    let raw = |name: &str| {
        let path = dir.path().join(name);
        std::fs::File::create(&path).unwrap().set_len(8 << 20).unwrap();
        path
    };
    backup_under_writes(&qcow2("a.qcow2", ""), &qcow2("b.qcow2", ""), false);
    backup_under_writes(&qcow2("c.qcow2", "cluster_size=4k"), &raw("d.raw"), false);
    backup_under_writes(&raw("e.raw"), &qcow2("f.qcow2", "cluster_size=2M"), false);
    backup_under_writes(&qcow2("g.qcow2", ""), &qcow2("h.qcow2", ""), true);
    backup_under_writes(&qcow2("i.qcow2", ""), &qcow2("j.qcow2", "cluster_size=2M"), true);
}

/// Writers count up, each in its own sector, while backups begin. Each copy has a prefix of
/// what each writer did: all that was done before, nothing that was begun after.
#[test]
fn what_is_in_flight_at_the_moment_is_in_the_copy_or_not_and_nothing_later_is() {
    let graph = Graph::new();
    let source = Hooked::add(&graph, "s", vec![0; MIB as usize]);
    Hooked::add(&graph, "t", vec![0; MIB as usize]);
    let s = graph.get("s").unwrap();
    let stop = AtomicBool::new(false);
    let (begun, ended): (Vec<_>, Vec<_>) =
        (0..4).map(|_| (AtomicU64::new(0), AtomicU64::new(0))).unzip();
    thread::scope(|scope| {
        for n in 0..4 {
            let (s, stop, begun, ended) = (&s, &stop, &begun[n], &ended[n]);
            scope.spawn(move || {
                for count in 1.. {
                    if stop.load(Ordering::Acquire) {
                        return;
                    }
                    begun.store(count, Ordering::SeqCst);
                    put(s, n as u64 * 200_000, &count.to_le_bytes());
                    ended.store(count, Ordering::SeqCst);
                }
            });
        }
        for _ in 0..30 {
            let least: Vec<_> = ended.iter().map(|n| n.load(Ordering::SeqCst)).collect();
            let mut backup = Backup::new(&graph, options(Sync::Full)).unwrap();
            let most: Vec<_> = begun.iter().map(|n| n.load(Ordering::SeqCst)).collect();
            finish(&mut backup, &Control::default()).unwrap();
            drop(backup);
            let copy = contents(&graph.get("t").unwrap());
            for n in 0..4 {
                let at = n * 200_000;
                let count = u64::from_le_bytes(copy[at..at + 8].try_into().unwrap());
                assert!((least[n]..=most[n]).contains(&count), "{count}: {least:?} {most:?}");
            }
        }
        stop.store(true, Ordering::Release);
    });
    drop(source);
}

#[test]
fn a_write_waits_until_the_old_contents_are_in_the_target() {
    let graph = Graph::new();
    let source = Hooked::add(&graph, "s", vec![1; MIB as usize]);
    let target = Hooked::add(&graph, "t", vec![0; MIB as usize]);
    let (arrived, arrivals) = channel();
    let (go, goes) = channel::<()>();
    let both = Mutex::new((arrived, goes));
    target.hook(move |io| {
        if let Io::Write(..) = io {
            let both = both.lock().unwrap();
            both.0.send(io).unwrap();
            both.1.recv().unwrap();
        }
        None
    });
    let written = Arc::new(AtomicBool::new(false));
    let seen = written.clone();
    source.hook(move |io| {
        if let Io::Write(..) = io {
            seen.store(true, Ordering::SeqCst);
        }
        None
    });
    let backup = Backup::new(&graph, options(Sync::None)).unwrap();
    let s = graph.get("s").unwrap();
    thread::scope(|scope| {
        let write = scope.spawn(|| put(&s, 65536 + 100, &[2; 100]));
        assert_eq!(arrivals.recv().unwrap(), Io::Write(65536, 65536));
        // A second one of the same part waits for the same copy, one elsewhere makes its own.
        let second = scope.spawn(|| s.write_zeroes(65536, 100, false).unwrap());
        assert!(!written.load(Ordering::SeqCst) && !write.is_finished());
        go.send(()).unwrap();
        write.join().unwrap();
        second.join().unwrap();
        assert!(written.load(Ordering::SeqCst));
        assert!(arrivals.try_recv().is_err(), "copied once");
        // What is copied is written at once.
        put(&s, 65536, &[3; 65536]);
        assert!(arrivals.try_recv().is_err());
    });
    let copy = target.bytes();
    assert!(copy[65536..131072].iter().all(|byte| *byte == 1));
    assert!(copy[..65536].iter().chain(&copy[131072..]).all(|byte| *byte == 0));
    drop(backup);
    put(&s, 0, &[4; 512]);
    assert!(arrivals.try_recv().is_err(), "after its end nothing is copied");
}

#[test]
fn a_top_backup_has_what_the_image_has_and_with_its_backing_file_is_the_moment() {
    if !have_qemu_img("top backup") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let base = create(dir.path(), "base.qcow2", "8M", "");
    common::qemu_io(&base, &["write -P 1 0 4M", "write -P 2 6M 100k"]);
    let over = |name: &str, options: &str| {
        let options = format!("backing_file={},backing_fmt=qcow2{options}", path(&base));
        create(dir.path(), name, "8M", &options)
    };
    for cluster in ["", ",cluster_size=4k"] {
        let (source, target) = (over("s.qcow2", cluster), over("t.qcow2", ""));
        common::qemu_io(&source, &["write -P 3 1M 70k", "write -z 3M 256k", "write -P 4 7M 1k"]);
        let expected = qemu_contents(dir.path(), &source, None);
        let graph = Graph::new();
        let s = add(&graph, "s", &source, &json!({}));
        let t = add(&graph, "t", &target, &json!({}));
        let mut backup = Backup::new(&graph, options(Sync::Top)).unwrap();
        // Before the work begins: parts that the image has, and that it has not.
        for at in [0, 1 << 20, 2 << 20, 3 << 20, 6 << 20] {
            put(&s, at, &[9; 1000]);
        }
        let (control, _told) = control();
        finish(&mut backup, &control).unwrap();
        drop(backup);
        let (done, total) = control.progress();
        assert!(done == total && total < 2 * MIB, "{done} of {total}");
        assert!(contents(&t) == expected);
        let own: u64 = t
            .access()
            .block_status(0, t.size())
            .unwrap()
            .iter()
            .filter(|extent| extent.depth == 1)
            .map(|extent| extent.len)
            .sum();
        assert!(own <= 640 << 10, "{own}");
        drop((s, t));
        drop(graph);
        check(&target);
        assert!(qemu_contents(dir.path(), &target, None) == expected);
    }
}

#[test]
fn a_target_over_its_source_shows_the_moment_for_as_long_as_the_job_is_there() {
    if !have_qemu_img("fleecing") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let source = create(dir.path(), "s.qcow2", "4M", "");
    let target = create(dir.path(), "t.qcow2", "4M", "");
    let graph = Graph::new();
    let s = add(&graph, "s", &source, &json!({}));
    put(&s, 0, &pattern(4 * MIB, 3));
    let user = graph.attach("s", User::device("vda", true, false)).unwrap();
    let t = add(&graph, "t", &target, &json!({"backing": "s"}));
    let moment: Vec<_> = contents(&s).into_iter().map(Some).collect();
    let backup = Backup::new(&graph, options(Sync::None)).unwrap();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let guests: Vec<_> = (0..2)
            .map(|n| {
                let at = n * 2 * MIB..(n + 1) * 2 * MIB;
                let before = moment[at.start as usize..at.end as usize].to_vec();
                let (link, stop) = (user.link().clone(), &stop);
                scope.spawn(move || guest(link, at, 40 + n, stop, before))
            })
            .collect();
        let mut random = Random(8);
        for _ in 0..200 {
            let at = random.below(4 * MIB - 65536);
            let mut bytes = vec![0; 65536];
            t.read(at, &[ReadBuf::new(&mut bytes)]).unwrap();
            let place = at as usize..at as usize + 65536;
            assert_contents(&bytes, &moment[place], "a read of the target");
        }
        stop.store(true, Ordering::Release);
        for guest in guests {
            guest.join().unwrap();
        }
    });
    assert_contents(&contents(&t), &moment, "target");
    drop(backup);
}

#[test]
fn a_backup_without_end_ends_when_it_is_cancelled() {
    let graph = Graph::new();
    Hooked::add(&graph, "s", vec![1; MIB as usize]);
    let target = Hooked::add(&graph, "t", vec![0; MIB as usize]);
    let s = graph.get("s").unwrap();
    let mut backup = Backup::new(&graph, options(Sync::None)).unwrap();
    put(&s, 0, &[2; 10]);
    let (control, _told) = control();
    thread::scope(|scope| {
        let job = scope.spawn(|| backup.run(&control));
        while control.progress() != (65536, MIB) {
            thread::yield_now();
        }
        put(&s, 5 * 65536 - 1, &[2; 2]);
        assert_eq!(control.progress(), (3 * 65536, MIB));
        control.cancel(true);
        assert!(matches!(job.join().unwrap(), Err(Error::Cancelled)));
    });
    backup.abort();
    put(&s, 10 * 65536, &[2; 10]);
    assert_eq!(target.bytes().iter().filter(|byte| **byte == 1).count(), 3 * 65536);
}

fn bitmap_bytes(node: &Node) -> u64 {
    node.bitmaps().get("b").unwrap().dirty_bytes()
}

fn add_bitmap(node: &Node, persistent: bool) {
    let new = NewBitmap { name: "b", granularity: Some(65536), persistent, disabled: false };
    node.add_bitmap(&new).unwrap();
}

#[test]
fn a_chain_of_incremental_backups_is_the_moment_of_the_last() {
    if !have_qemu_img("incremental") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let source = create(dir.path(), "s.qcow2", "8M", "");
    let mut expected = Vec::new();
    let mut below: Option<std::path::PathBuf> = None;
    for round in 0..4u64 {
        let name = format!("t{round}.qcow2");
        let target = match &below {
            None => create(dir.path(), &name, "8M", ""),
            Some(below) => {
                let options = format!("backing_file={},backing_fmt=qcow2", path(below));
                create(dir.path(), &name, "8M", &options)
            }
        };
        // The bitmap is stored in between, as the image is closed.
        let graph = Graph::new();
        let s = add(&graph, "s", &source, &json!({}));
        add(&graph, "t", &target, &json!({}));
        let sync = if round == 0 {
            put(&s, 0, &pattern(8 * MIB, 5));
            add_bitmap(&s, true);
            BackupOptions::new("s", "t", Sync::Full)
        } else {
            let dirty = bitmap_bytes(&s);
            assert!(dirty > 0 && dirty < 2 * MIB, "{dirty}");
            let bitmap = Some("b".to_owned());
            BackupOptions { bitmap, ..options(Sync::Incremental) }
        };
        expected = contents(&s);
        let mut backup = Backup::new(&graph, sync).unwrap();
        for n in 0..4 {
            put(&s, (round * 7 + n * 13) % 64 * 65536 + 4000, &[100 + n as u8; 70_000]);
        }
        let (control, _told) = control();
        finish(&mut backup, &control).unwrap();
        drop(backup);
        if round > 0 {
            assert!(control.progress().1 < 3 * MIB);
        }
        assert!(bitmap_bytes(&s) >= 4 * 65536);
        drop(s);
        drop(graph);
        check(&target);
        assert!(qemu_contents(dir.path(), &target, None) == expected, "round {round}");
        below = Some(target);
    }
    check(&source);
    let info: Value =
        serde_json::from_str(&qemu_img(&["info", "--output=json", &path(&source)])).unwrap();
    assert_eq!(info["format-specific"]["data"]["bitmaps"][0]["name"], "b");
    assert!(!expected.is_empty());
}

/// Dirty chunks of 64 KiB by number.
fn dirty(node: &Node) -> Vec<u64> {
    let bitmap = node.bitmaps().get("b").unwrap();
    let extents = bitmap.extents(0, u64::MAX, usize::MAX);
    let dirty = extents.iter().filter(|extent| extent.dirty);
    dirty.flat_map(|e| e.offset / 65536..(e.offset + e.len) / 65536).collect()
}

#[test]
fn a_bitmap_has_what_its_mode_says_after_success_failure_and_an_end() {
    // Dirty before: 1, 3, 5; written meanwhile: 3, 8; the target fails at 5.
    let cases = [
        (BitmapMode::OnSuccess, true, vec![3, 8]),
        (BitmapMode::OnSuccess, false, vec![1, 3, 5, 8]),
        (BitmapMode::Never, true, vec![1, 3, 5, 8]),
        (BitmapMode::Never, false, vec![1, 3, 5, 8]),
        (BitmapMode::Always, true, vec![3, 8]),
        (BitmapMode::Always, false, vec![3, 5, 8]),
    ];
    for (mode, success, expected) in cases {
        let graph = Graph::new();
        Hooked::add(&graph, "s", vec![7; MIB as usize]);
        let target = Hooked::add(&graph, "t", vec![0; MIB as usize]);
        let s = graph.get("s").unwrap();
        add_bitmap(&s, false);
        for chunk in [1, 3, 5] {
            put(&s, chunk * 65536, &[1; 65536]);
        }
        let bitmap = Some("b".to_owned());
        let options = BackupOptions { bitmap, bitmap_mode: Some(mode), ..options(Sync::Bitmap) };
        let mut backup = Backup::new(&graph, options).unwrap();
        assert!(s.bitmaps().get("b").unwrap().info().busy);
        put(&s, 3 * 65536, &[2; 10]);
        put(&s, 8 * 65536, &[2; 10]);
        assert_eq!(dirty(&s), [1, 3, 5, 8], "the bitmap never lacks anything");
        target.hook(move |io| match io {
            Io::Write(at, _) if at == 5 * 65536 && !success => Some(libc::EIO),
            _ => None,
        });
        assert_eq!(finish(&mut backup, &Control::default()).is_ok(), success);
        drop(backup);
        assert!(!s.bitmaps().get("b").unwrap().info().busy);
        assert_eq!(dirty(&s), expected, "{mode:?} {success}");
    }
}

#[test]
fn one_of_a_group_that_is_aborted_after_its_work_leaves_its_bitmap() {
    let graph = Graph::new();
    Hooked::add(&graph, "s", vec![7; MIB as usize]);
    Hooked::add(&graph, "t", vec![0; MIB as usize]);
    let s = graph.get("s").unwrap();
    add_bitmap(&s, false);
    put(&s, 0, &[1; 65536]);
    let bitmap = Some("b".to_owned());
    let mut backup =
        Backup::new(&graph, BackupOptions { bitmap, ..options(Sync::Incremental) }).unwrap();
    backup.run(&Control::default()).unwrap();
    assert_eq!(dirty(&s), [0]);
    backup.abort();
    assert_eq!(dirty(&s), [0]);
}

#[test]
fn an_empty_incremental_backup_is_done_at_once() {
    let graph = Graph::new();
    Hooked::add(&graph, "s", vec![7; MIB as usize]);
    let target = Hooked::add(&graph, "t", vec![0; MIB as usize]);
    add_bitmap(&graph.get("s").unwrap(), false);
    let bitmap = Some("b".to_owned());
    let mut backup =
        Backup::new(&graph, BackupOptions { bitmap, ..options(Sync::Incremental) }).unwrap();
    let (control, _told) = control();
    finish(&mut backup, &control).unwrap();
    assert_eq!(control.progress(), (0, 0));
    assert!(target.bytes().iter().all(|byte| *byte == 0));
}

/// A source of several pieces with data, holes and both, and the number of requests a backup makes.
fn small() -> (Graph, Arc<Hooked>, Arc<Hooked>, Vec<u8>) {
    let graph = Graph::new();
    let bytes = pattern(MIB + 70_000 / 512 * 512, 21);
    let source = Hooked::add(&graph, "s", bytes.clone());
    let target = Hooked::add(&graph, "t", vec![0xee; bytes.len()]);
    (graph, source, target, bytes)
}

/// A hook that calls `act` at the `n`th request of a kind, once.
fn nth(
    n: usize,
    kind: impl Fn(Io) -> bool + Send + std::marker::Sync + 'static,
    act: impl Fn() -> Option<i32> + Send + std::marker::Sync + 'static,
) -> (impl Fn(Io) -> Option<i32> + Send + std::marker::Sync + 'static, Arc<AtomicU64>) {
    let count = Arc::new(AtomicU64::new(0));
    let counted = count.clone();
    let hook = move |io| {
        if kind(io) && counted.fetch_add(1, Ordering::SeqCst) == n as u64 { act() } else { None }
    };
    (hook, count)
}

fn is_read(io: Io) -> bool {
    matches!(io, Io::Read(..))
}

fn is_change(io: Io) -> bool {
    !is_read(io)
}

#[test]
fn a_failure_at_any_request_is_reported_ignored_or_stops_and_the_copy_is_right_in_the_end() {
    for (on_source, policy) in [OnError::Report, OnError::Ignore, OnError::Stop, OnError::Enospc]
        .map(|p| [(true, p), (false, p)])
        .concat()
    {
        for n in 0.. {
            let (graph, source, target, bytes) = small();
            let errno = if policy == OnError::Enospc { libc::ENOSPC } else { libc::EIO };
            let fail = move || Some(errno);
            let count = if on_source {
                let (hook, count) = nth(n, is_read, fail);
                source.hook(hook);
                count
            } else {
                let (hook, count) = nth(n, is_change, fail);
                target.hook(hook);
                count
            };
            let all = BackupOptions {
                on_source_error: policy,
                on_target_error: policy,
                ..options(Sync::Full)
            };
            let mut backup = Backup::new(&graph, all).unwrap();
            let (control, told) = control();
            let result = thread::scope(|scope| {
                let job = scope.spawn(|| finish(&mut backup, &control));
                while !job.is_finished() {
                    if told.try_recv() == Ok(Notice::Paused) {
                        let nospace = errno == libc::ENOSPC;
                        let expected = if nospace { IoStatus::NoSpace } else { IoStatus::Failed };
                        assert_eq!(control.io_status(), expected);
                        control.resume();
                    }
                    thread::yield_now();
                }
                job.join().unwrap()
            });
            drop(backup);
            let met = count.load(Ordering::SeqCst) > n as u64;
            assert_eq!(result.is_err(), met && policy == OnError::Report, "{policy:?} {n}");
            assert_eq!(source.bytes(), bytes);
            if result.is_ok() {
                assert!(target.bytes() == bytes, "{policy:?} at {n}");
                let (done, total) = control.progress();
                assert!(done == total);
            }
            if !met {
                assert!(n > 5, "few requests: {n}");
                break;
            }
        }
    }
}

#[test]
fn an_error_is_told_with_its_side_and_what_is_done() {
    let (graph, source, _target, _) = small();
    source.hook(nth(0, is_read, || Some(libc::EIO)).0);
    let mut backup = Backup::new(&graph, options(Sync::Full)).unwrap();
    let (control, told) = control();
    let error = finish(&mut backup, &control).unwrap_err();
    assert_eq!(error.errno(), libc::EIO);
    let notice = Notice::Error { read: true, action: Action::Report, nospace: false };
    assert_eq!(told.try_iter().collect::<Vec<_>>(), [notice]);
}

#[test]
fn a_pause_or_an_end_at_any_request_comes_with_nothing_under_way_and_spoils_nothing() {
    for cancel in [false, true] {
        for n in 0.. {
            let (graph, source, target, bytes) = small();
            let (control, told) = control();
            let asks = control.clone();
            let (hook, count) = nth(n, is_change, move || {
                if cancel {
                    asks.cancel(true);
                } else {
                    asks.pause();
                }
                None
            });
            let busy = Arc::new(AtomicU64::new(0));
            let at = busy.clone();
            target.hook(move |io| {
                at.fetch_add(1, Ordering::SeqCst);
                let result = hook(io);
                thread::yield_now();
                at.fetch_sub(1, Ordering::SeqCst);
                result
            });
            let s = graph.get("s").unwrap();
            let mut backup = Backup::new(&graph, options(Sync::Full)).unwrap();
            let result = thread::scope(|scope| {
                let job = scope.spawn(|| finish(&mut backup, &control));
                if count_reaches(&count, n, &job) && !cancel {
                    loop {
                        match told.try_recv() {
                            Ok(notice) => {
                                assert_eq!(notice, Notice::Paused);
                                assert_eq!(busy.load(Ordering::SeqCst), 0, "at work in a pause");
                                let before = target.bytes();
                                // The guest goes on in a pause, and its writes are kept apart.
                                put(&s, 100, &[0xaa; 100]);
                                assert!(target.bytes()[65536..] == before[65536..]);
                                control.resume();
                                break;
                            }
                            Err(_) if job.is_finished() => break,
                            Err(_) => thread::yield_now(),
                        }
                    }
                }
                job.join().unwrap()
            });
            drop(backup);
            let met = count.load(Ordering::SeqCst) > n as u64;
            match result {
                Ok(()) => assert!(target.bytes() == bytes, "at {n}"),
                Err(Error::Cancelled) => assert!(cancel && met),
                Err(error) => panic!("{error}"),
            }
            put(&s, 200, &[0xbb; 100]);
            assert_eq!(source.bytes()[200..300], [0xbb; 100]);
            if !met {
                break;
            }
        }
    }
}

#[test]
fn a_speed_holds_the_job_back_and_not_the_guests_writes() {
    let graph = Graph::new();
    Hooked::add(&graph, "s", vec![1; 4 * MIB as usize]);
    let target = Hooked::add(&graph, "t", vec![0; 4 * MIB as usize]);
    let s = graph.get("s").unwrap();
    let mut backup = Backup::new(&graph, options(Sync::Full)).unwrap();
    let (control, _told) = control();
    control.set_speed(1);
    thread::scope(|scope| {
        let job = scope.spawn(|| finish(&mut backup, &control));
        // One piece is let through and has to be paid for.
        while control.progress().0 != MIB {
            thread::yield_now();
        }
        for n in 1..4 {
            put(&s, n * MIB, &[2; 1000]);
            assert_eq!(control.progress().0, MIB + n * 65536);
        }
        assert!(!job.is_finished());
        control.set_speed(0);
        job.join().unwrap().unwrap();
    });
    assert!(target.bytes().iter().all(|byte| *byte == 1));
}

fn count_reaches<T>(count: &AtomicU64, n: usize, job: &thread::ScopedJoinHandle<'_, T>) -> bool {
    while count.load(Ordering::SeqCst) <= n as u64 {
        if job.is_finished() {
            return count.load(Ordering::SeqCst) > n as u64;
        }
        thread::yield_now();
    }
    true
}

#[test]
fn where_old_contents_cannot_be_saved_the_write_fails_or_the_backup_does() {
    for on_cbw_error in [OnCbwError::BreakGuestWrite, OnCbwError::BreakSnapshot] {
        let graph = Graph::new();
        let source = Hooked::add(&graph, "s", vec![1; MIB as usize]);
        let target = Hooked::add(&graph, "t", vec![0; MIB as usize]);
        target.hook(nth(0, is_change, || Some(libc::EIO)).0);
        let s = graph.get("s").unwrap();
        let all = BackupOptions { on_cbw_error, ..options(Sync::Full) };
        let mut backup = Backup::new(&graph, all).unwrap();
        let written = s.write(0, &[WriteBuf::new(&[2; 512])]);
        let result = finish(&mut backup, &Control::default());
        drop(backup);
        if on_cbw_error == OnCbwError::BreakGuestWrite {
            assert_eq!(written.unwrap_err().errno(), libc::EIO);
            assert_eq!(source.bytes()[0], 1);
            result.unwrap();
            assert!(target.bytes().iter().all(|byte| *byte == 1));
        } else {
            written.unwrap();
            assert_eq!(source.bytes()[0], 2);
            assert_eq!(result.unwrap_err().errno(), libc::EIO);
        }
        put(&s, 0, &[3; 512]);
    }
}

#[test]
fn two_backups_of_one_disk_are_of_the_moments_of_their_starts() {
    let graph = Graph::new();
    Hooked::add(&graph, "s", vec![1; MIB as usize]);
    let first_target = Hooked::add(&graph, "t", vec![0; MIB as usize]);
    let second_target = Hooked::add(&graph, "u", vec![0; MIB as usize]);
    let s = graph.get("s").unwrap();
    let mut first = Backup::new(&graph, options(Sync::Full)).unwrap();
    put(&s, 0, &[2; 1000]);
    let mut second = Backup::new(&graph, BackupOptions::new("s", "u", Sync::Full)).unwrap();
    put(&s, 0, &[3; 2000]);
    finish(&mut second, &Control::default()).unwrap();
    put(&s, 300_000, &[4; 2000]);
    finish(&mut first, &Control::default()).unwrap();
    assert!(first_target.bytes().iter().all(|byte| *byte == 1));
    let copy = second_target.bytes();
    assert!(copy[..1000].iter().all(|byte| *byte == 2) && copy[1000..].iter().all(|b| *b == 1));
}

/// A write of the source that is held at the `node`'s first write until told to go on.
fn hold_first_write(node: &Hooked) -> (std::sync::mpsc::Receiver<()>, std::sync::mpsc::Sender<()>) {
    let (arrived, arrivals) = channel();
    let (go, goes) = channel::<()>();
    let (first, both) = (AtomicBool::new(true), Mutex::new((arrived, goes)));
    node.hook(move |io| {
        if matches!(io, Io::Write(..)) && first.swap(false, Ordering::SeqCst) {
            let both = both.lock().unwrap();
            both.0.send(()).unwrap();
            both.1.recv().unwrap();
        }
        None
    });
    (arrivals, go)
}

#[test]
fn the_moment_waits_for_writes_in_flight_and_for_those_that_others_act_before() {
    // In flight at the source itself, and held up by the copying of another backup.
    for copied in [false, true] {
        let graph = Graph::new();
        let source = Hooked::add(&graph, "s", vec![1; MIB as usize]);
        let first_target = Hooked::add(&graph, "t", vec![0; MIB as usize]);
        let target = Hooked::add(&graph, "u", vec![0; MIB as usize]);
        let s = graph.get("s").unwrap();
        let first = copied.then(|| Backup::new(&graph, options(Sync::None)).unwrap());
        let (arrivals, go) = hold_first_write(if copied { &first_target } else { &source });
        thread::scope(|scope| {
            let write = scope.spawn(|| put(&s, 0, &[2; 65536]));
            arrivals.recv().unwrap();
            let begin =
                scope.spawn(|| Backup::new(&graph, BackupOptions::new("s", "u", Sync::Full)));
            for _ in 0..2000 {
                thread::yield_now();
            }
            assert!(!begin.is_finished());
            go.send(()).unwrap();
            write.join().unwrap();
            let mut second = begin.join().unwrap().unwrap();
            finish(&mut second, &Control::default()).unwrap();
        });
        drop(first);
        assert!(target.bytes()[..65536].iter().all(|byte| *byte == 2));
        assert!(target.bytes()[65536..].iter().all(|byte| *byte == 1));
    }
}

#[test]
fn backups_that_begin_with_all_requests_held_are_of_one_moment() {
    let graph = Graph::new();
    for name in ["s", "s2", "t", "t2"] {
        Hooked::add(&graph, name, vec![0; MIB as usize]);
    }
    let (one, two) = (graph.get("s").unwrap(), graph.get("s2").unwrap());
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        // The second is always written after the first.
        scope.spawn(|| {
            for count in 1u64.. {
                if stop.load(Ordering::Acquire) {
                    return;
                }
                put(&one, 0, &count.to_le_bytes());
                put(&two, 0, &count.to_le_bytes());
            }
        });
        for _ in 0..20 {
            let held = graph.hold(&["s", "s2"]).unwrap();
            let backups = [("s", "t"), ("s2", "t2")].map(|(source, target)| {
                Backup::new(&graph, BackupOptions::new(source, target, Sync::Full)).unwrap()
            });
            drop(held);
            for mut backup in backups {
                finish(&mut backup, &Control::default()).unwrap();
            }
            let [a, b] = ["t", "t2"].map(|name| {
                let bytes = contents(&graph.get(name).unwrap());
                u64::from_le_bytes(bytes[..8].try_into().unwrap())
            });
            assert!(a == b || a == b + 1, "{a} {b}");
        }
        stop.store(true, Ordering::Release);
    });
}

#[test]
fn what_cannot_be_backed_up_is_refused_and_leaves_everything_as_it_was() {
    let graph = Graph::new();
    Hooked::add(&graph, "s", vec![1; MIB as usize]);
    Hooked::add(&graph, "t", vec![0; MIB as usize]);
    Hooked::add(&graph, "small", vec![0; 65536]);
    let s = graph.get("s").unwrap();
    add_bitmap(&s, false);
    let new = |options: BackupOptions| error_of(Backup::new(&graph, options));
    let to = |source: &str, target: &str| new(BackupOptions::new(source, target, Sync::Full));
    assert_eq!(to("s", "s"), "Source and target cannot be the same");
    assert_eq!(to("x", "t"), "Cannot find device='x' nor node-name='x'");
    assert_eq!(to("s", "small"), "Source and target image have different sizes");
    let with = |sync, bitmap: Option<&str>, bitmap_mode| {
        new(BackupOptions { bitmap: bitmap.map(str::to_owned), bitmap_mode, ..options(sync) })
    };
    let need = "must provide a valid bitmap name for 'incremental' sync mode";
    assert_eq!(with(Sync::Incremental, None, None), need);
    assert_eq!(with(Sync::Bitmap, Some("x"), None), "Bitmap 'x' could not be found");
    let given = "Bitmap sync mode must be given when providing a bitmap";
    assert_eq!(with(Sync::Bitmap, Some("b"), None), given);
    let mode = Some(BitmapMode::Never);
    let success = "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'";
    assert_eq!(with(Sync::Incremental, Some("b"), mode), success);
    let without = "Cannot specify bitmap sync mode without a bitmap";
    assert_eq!(with(Sync::Full, None, mode), without);
    assert!(with(Sync::Full, Some("b"), mode).contains("no meaningful effect"));
    assert!(with(Sync::None, Some("b"), mode).contains("meaningful bitmap outputs"));
    let compress = BackupOptions { compress: true, ..options(Sync::Full) };
    assert_eq!(new(compress), "Compression is not supported for this drive ");

    let backup = Backup::new(&graph, options(Sync::Full)).unwrap();
    let busy = "Node 't' is busy: block device is in use by block job: backup";
    assert_eq!(to("s", "t"), busy);
    assert_eq!(to("t", "small"), busy);
    assert_eq!(error_of(graph.remove("t")), busy);
    assert_eq!(error_of(graph.resize("t", 512)), busy);
    assert_eq!(error_of(graph.remove("s")), "Block device s is in use");
    let conflict = error_of(graph.resize("s", 512));
    assert!(conflict.contains("'resize' are both required by"), "{conflict}");
    assert_eq!(error_of(s.check_no_job()), busy.replace("'t'", "'s'"));
    drop(backup);
    assert!(error_of(graph.resize("t", 512)).ends_with("does not support resize"));
    graph.remove("t").unwrap();
    s.check_no_job().unwrap();
    assert!(!s.bitmaps().get("b").unwrap().info().busy);
}
