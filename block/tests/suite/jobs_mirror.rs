//! Mirrors: the target is the same as the source when it takes its place, whatever happens before.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};
use std::thread;

use block::jobs::{Control, CopyMode, Mirror, MirrorOptions, Notice, OnError, Operation, Sync};
use block::{Attachment, Error, Graph, Node, ReadBuf, User, WriteBuf};
use serde_json::json;

use crate::common::{self, check, create, have_qemu_img, path, qemu_contents, qemu_img};
use crate::jobs_common::{Hooked, Io, MIB, add, assert_contents, control, finish, guest, pattern};

fn options(sync: Sync) -> MirrorOptions {
    MirrorOptions::new("s", "t", sync)
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

fn wait_for(told: &Receiver<Notice>, wanted: Notice) {
    while told.recv().unwrap() != wanted {}
}

fn device(graph: &Graph) -> Attachment {
    graph.attach("s", User::device("vda", true, false)).unwrap()
}

/// Guests write all the time; the target takes the place under them.
fn pivot_under_writes(source: &Path, target: &Path, copy_mode: CopyMode, granularity: Option<u64>) {
    let graph = Graph::new();
    let s = add(&graph, "s", source, &json!({}));
    add(&graph, "t", target, &json!({}));
    let size = s.size();
    put(&s, 0, &pattern(size, 17));
    let moment: Vec<_> = contents(&s).into_iter().map(Some).collect();
    let user = device(&graph);
    let stripe = size / 3 / 512 * 512;
    let stop = AtomicBool::new(false);
    let (control, told) = control();
    let options = MirrorOptions { copy_mode, granularity, ..options(Sync::Full) };
    let mut mirror = Mirror::new(&graph, options).unwrap();
    let mut known = thread::scope(|scope| {
        let guests: Vec<_> = (0..3)
            .map(|n| {
                let at = n * stripe..(n + 1) * stripe;
                let before = moment[at.start as usize..at.end as usize].to_vec();
                let (link, stop) = (user.link().clone(), &stop);
                scope.spawn(move || guest(link, at, 51 + n, stop, before))
            })
            .collect();
        let job = scope.spawn(|| finish(&mut mirror, &control));
        wait_for(&told, Notice::Ready);
        control.complete();
        job.join().unwrap().unwrap();
        assert_eq!(user.node().name(), "t");
        stop.store(true, Ordering::Release);
        guests.into_iter().flat_map(|guest| guest.join().unwrap()).collect::<Vec<_>>()
    });
    drop(mirror);
    let (done, total) = control.progress();
    assert!(done >= size && done <= total, "{done} of {total}");
    known.extend_from_slice(&moment[known.len()..]);
    assert_contents(&contents(&user.node()), &known, "the disk after the pivot");
    drop((s, user));
    graph.remove("s").unwrap();
    drop(graph);
    for image in [source, target].iter().filter(|i| i.extension().is_some_and(|e| e == "qcow2")) {
        check(image);
    }
}

#[test]
fn a_target_takes_the_place_of_a_disk_that_is_written_all_the_time() {
    if !have_qemu_img("mirror") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let qcow2 = |name, options| create(dir.path(), name, "8M", options);
    let raw = |name: &str| {
        let path = dir.path().join(name);
        std::fs::File::create(&path).unwrap().set_len(8 << 20).unwrap();
        path
    };
    let (background, blocking) = (CopyMode::Background, CopyMode::WriteBlocking);
    pivot_under_writes(&qcow2("a.qcow2", ""), &qcow2("b.qcow2", ""), background, None);
    pivot_under_writes(&qcow2("c.qcow2", ""), &qcow2("d.qcow2", ""), blocking, None);
    let (e, f) = (qcow2("e.qcow2", "cluster_size=4k"), raw("f.raw"));
    pivot_under_writes(&e, &f, background, Some(512));
    let (g, h) = (raw("g.raw"), qcow2("h.qcow2", "cluster_size=2M"));
    pivot_under_writes(&g, &h, blocking, Some(4096));
}

#[test]
fn a_target_is_the_same_once_nobody_writes_any_more() {
    if !have_qemu_img("settled mirror") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (source, target) =
        (create(dir.path(), "s.qcow2", "8M", ""), create(dir.path(), "t.qcow2", "8M", ""));
    let graph = Graph::new();
    let s = add(&graph, "s", &source, &json!({}));
    let t = add(&graph, "t", &target, &json!({}));
    put(&s, 0, &pattern(8 * MIB, 19));
    let user = device(&graph);
    let mut mirror = Mirror::new(&graph, options(Sync::Full)).unwrap();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let (link, open) = (user.link().clone(), vec![None; 8 << 20]);
        let writer = scope.spawn(|| guest(link, 0..8 * MIB, 77, &stop, open));
        let Ready { control, job, .. } = until_ready(scope, &mut mirror);
        for _ in 0..200 {
            thread::yield_now();
        }
        stop.store(true, Ordering::Release);
        let known = writer.join().unwrap();
        control.cancel(false);
        job.join().unwrap().unwrap();
        assert_contents(&contents(&s), &known, "source");
    });
    drop(mirror);
    let expected: Vec<_> = contents(&s).into_iter().map(Some).collect();
    assert_contents(&contents(&t), &expected, "target");
}

#[test]
fn a_mirror_that_is_let_go_is_a_moment_near_its_end_and_the_source_stays() {
    let graph = Graph::new();
    Hooked::add(&graph, "s", vec![1; MIB as usize]);
    let target = Hooked::add(&graph, "t", vec![0; MIB as usize]);
    let s = graph.get("s").unwrap();
    let (begun, ended, stop) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    for copy_mode in [CopyMode::Background, CopyMode::WriteBlocking] {
        stop.store(false, Ordering::Release);
        thread::scope(|scope| {
            scope.spawn(|| {
                for count in ended.load(Ordering::SeqCst) + 1.. {
                    if stop.load(Ordering::Acquire) {
                        return;
                    }
                    begun.store(count, Ordering::SeqCst);
                    put(&s, 65530, &count.to_le_bytes());
                    ended.store(count, Ordering::SeqCst);
                }
            });
            let (control, told) = control();
            let options = MirrorOptions { copy_mode, ..options(Sync::Full) };
            let mut mirror = Mirror::new(&graph, options).unwrap();
            thread::scope(|scope| {
                let run = scope.spawn(|| mirror.run(&control));
                wait_for(&told, Notice::Ready);
                control.cancel(false);
                run.join().unwrap().unwrap();
            });
            let least = ended.load(Ordering::SeqCst);
            mirror.commit().unwrap();
            let most = begun.load(Ordering::SeqCst);
            drop(mirror);
            let copy = target.bytes();
            let count = u64::from_le_bytes(copy[65530..65538].try_into().unwrap());
            assert!((least..=most).contains(&count), "{least} {count} {most}");
            assert!(copy[..65530].iter().chain(&copy[65538..]).all(|byte| *byte == 1));
            stop.store(true, Ordering::Release);
        });
    }
    let changed = ended.load(Ordering::SeqCst) + 1;
    put(&s, 65530, &changed.to_le_bytes());
    assert_ne!(target.bytes()[65530..65538], changed.to_le_bytes());
}

/// A mirror that is ready, in the thread of a scope.
struct Ready<'scope> {
    control: Control,
    told: Receiver<Notice>,
    job: thread::ScopedJoinHandle<'scope, block::Result<()>>,
}

fn until_ready<'scope>(
    scope: &'scope thread::Scope<'scope, '_>,
    mirror: &'scope mut Mirror,
) -> Ready<'scope> {
    let (control, told) = control();
    let clone = control.clone();
    let job = scope.spawn(move || finish(mirror, &clone));
    wait_for(&told, Notice::Ready);
    Ready { control, told, job }
}

#[test]
fn a_write_that_blocks_is_on_both_sides_when_it_is_done() {
    let graph = Graph::new();
    Hooked::add(&graph, "s", vec![1; MIB as usize]);
    let target = Hooked::add(&graph, "t", vec![0; MIB as usize]);
    let s = graph.get("s").unwrap();
    let copy_mode = CopyMode::WriteBlocking;
    let mut mirror =
        Mirror::new(&graph, MirrorOptions { copy_mode, ..options(Sync::Full) }).unwrap();
    let handle = mirror.handle();
    thread::scope(|scope| {
        let Ready { control, job, .. } = until_ready(scope, &mut mirror);
        assert!(handle.actively_synced());
        for n in 0..20u64 {
            put(&s, n * 30_000, &[n as u8; 40_000]);
            assert!(target.bytes()[n as usize * 30_000..][..40_000].iter().all(|b| *b == n as u8));
            s.write_zeroes(n * 30_000 + 5, 10, n % 2 == 0).unwrap();
            assert_eq!(target.bytes()[n as usize * 30_000 + 5..][..10], [0; 10]);
            assert!(handle.actively_synced());
        }
        // What a discarded part reads as only the source tells: it is copied.
        s.discard(0, 65536).unwrap();
        while !handle.actively_synced() {
            thread::yield_now();
        }
        assert!(target.bytes()[..65536].iter().all(|byte| *byte == 0xdd));
        control.cancel(false);
        job.join().unwrap().unwrap();
    });
    drop(mirror);
    assert!(contents(&s) == target.bytes());
}

#[test]
fn the_mode_can_be_changed_while_it_runs() {
    let graph = Graph::new();
    Hooked::add(&graph, "s", vec![1; MIB as usize]);
    let target = Hooked::add(&graph, "t", vec![0; MIB as usize]);
    let s = graph.get("s").unwrap();
    let mut mirror = Mirror::new(&graph, options(Sync::None)).unwrap();
    let handle = mirror.handle();
    thread::scope(|scope| {
        let Ready { control, job, .. } = until_ready(scope, &mut mirror);
        assert!(!handle.actively_synced());
        put(&s, 0, &[2; 10]);
        handle.set_write_blocking();
        while !handle.actively_synced() || target.bytes()[0] != 2 {
            thread::yield_now();
        }
        assert_eq!(target.bytes()[65535..65537], [1, 0], "only what was written");
        control.cancel(false);
        job.join().unwrap().unwrap();
    });
}

#[test]
fn a_top_mirror_over_the_same_backing_file_is_the_same_disk() {
    if !have_qemu_img("top mirror") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let base = create(dir.path(), "base.qcow2", "8M", "");
    common::qemu_io(&base, &["write -P 1 0 4M", "write -P 2 6M 100k"]);
    let over = |name: &str, options: &str| {
        let options = format!("backing_file={},backing_fmt=qcow2{options}", path(&base));
        create(dir.path(), name, "8M", &options)
    };
    let source = over("s.qcow2", ",cluster_size=4k");
    let target = over("t.qcow2", "");
    common::qemu_io(&source, &["write -P 3 1M 70k", "write -z 3M 256k", "write -P 4 7M 1k"]);
    let graph = Graph::new();
    let s = add(&graph, "s", &source, &json!({}));
    add(&graph, "t", &target, &json!({}));
    let user = device(&graph);
    let mut mirror = Mirror::new(&graph, options(Sync::Top)).unwrap();
    put(&s, 5000, &[9; 1000]);
    thread::scope(|scope| {
        let Ready { control, job, .. } = until_ready(scope, &mut mirror);
        put(&s, 2 << 20, &[9; 100_000]);
        control.complete();
        job.join().unwrap().unwrap();
        assert!(control.progress().1 < 2 * MIB, "{:?}", control.progress());
    });
    drop(mirror);
    let expected = contents(&s);
    assert!(contents(&user.node()) == expected);
    drop((s, user));
    drop(graph);
    check(&target);
    assert!(qemu_contents(dir.path(), &target, None) == expected);
    qemu_img(&["compare", "-f", "qcow2", "-F", "qcow2", &path(&source), &path(&target)]);
}

#[test]
fn a_ready_mirror_rests_and_completes_after_its_rest() {
    let graph = Graph::new();
    Hooked::add(&graph, "s", vec![1; MIB as usize]);
    let target = Hooked::add(&graph, "t", vec![0; MIB as usize]);
    let s = graph.get("s").unwrap();
    let user = device(&graph);
    let mut mirror = Mirror::new(&graph, options(Sync::Full)).unwrap();
    thread::scope(|scope| {
        let Ready { control, told, job } = until_ready(scope, &mut mirror);
        control.pause();
        wait_for(&told, Notice::Paused);
        put(&s, 0, &[2; 10]);
        control.complete();
        assert!(!job.is_finished());
        assert_eq!(target.bytes()[0], 1, "nothing is copied in a rest");
        control.resume();
        job.join().unwrap().unwrap();
        assert_eq!(target.bytes()[..11], [2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1]);
    });
    assert_eq!(user.node().name(), "t");
    drop(mirror);
    assert_eq!(error_of(graph.remove("t")), "Node t is in use");
    graph.remove("s").unwrap();
}

#[test]
fn a_target_replaces_what_is_below_a_filter() {
    if !have_qemu_img("replaces") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (below, target) =
        (create(dir.path(), "b.qcow2", "1M", ""), create(dir.path(), "t.qcow2", "1M", ""));
    let graph = Graph::new();
    add(&graph, "b", &below, &json!({}));
    graph.add(&json!({"driver": "compress", "node-name": "s", "file": "b"})).unwrap();
    add(&graph, "t", &target, &json!({}));
    let user = device(&graph);
    user.link().write(0, &[WriteBuf::new(&[7; 65536])], false).unwrap();
    let replaces = Some("b".to_owned());
    let mut mirror =
        Mirror::new(&graph, MirrorOptions { replaces, ..options(Sync::Full) }).unwrap();
    thread::scope(|scope| {
        let Ready { control, job, .. } = until_ready(scope, &mut mirror);
        user.link().write(70_000, &[WriteBuf::new(&[8; 65536])], false).unwrap();
        control.complete();
        job.join().unwrap().unwrap();
    });
    drop(mirror);
    assert_eq!(user.node().name(), "s");
    user.link().write(200_000, &[WriteBuf::new(&[9; 65536])], false).unwrap();
    graph.remove("b").unwrap();
    let bytes = contents(&graph.get("t").unwrap());
    assert_eq!([bytes[0], bytes[70_000], bytes[200_000]], [7, 8, 9]);
    assert_eq!(contents(&user.node()), bytes);
}

/// A source of several pieces with data, holes and both.
fn small() -> (Graph, Arc<Hooked>, Arc<Hooked>, Attachment) {
    let graph = Graph::new();
    let bytes = pattern(MIB + 70_000 / 512 * 512, 23);
    let source = Hooked::add(&graph, "s", bytes.clone());
    let target = Hooked::add(&graph, "t", vec![0xee; bytes.len()]);
    let user = device(&graph);
    (graph, source, target, user)
}

/// Runs to the end with writes meanwhile, which `disk` has too, resuming after errors. Completes once
/// it is ready.
fn run_with_writes(
    mirror: &mut Mirror,
    control: &Control,
    told: &Receiver<Notice>,
    user: &Attachment,
    disk: &mut [u8],
) -> block::Result<()> {
    thread::scope(|scope| {
        let job = scope.spawn(|| finish(mirror, control));
        let (mut n, mut completing) = (0u64, false);
        while !job.is_finished() {
            match told.try_recv() {
                Ok(Notice::Ready) => {
                    control.complete();
                    completing = true;
                }
                Ok(Notice::Paused) => control.resume(),
                _ => thread::yield_now(),
            }
            // Later ones may be the target's own, for which requests fail.
            if n < 40 && !completing {
                let at = n * 37_123 % MIB;
                user.link().write(at, &[WriteBuf::new(&[n as u8; 3000])], false).unwrap();
                disk[at as usize..][..3000].fill(n as u8);
                n += 1;
            }
        }
        job.join().unwrap()
    })
}

fn is_read(io: Io) -> bool {
    matches!(io, Io::Read(..))
}

#[test]
fn a_failure_at_any_request_leaves_the_source_or_the_right_target() {
    for copy_mode in [CopyMode::Background, CopyMode::WriteBlocking] {
        for (on_source, policy) in [
            (true, OnError::Stop),
            (false, OnError::Stop),
            (true, OnError::Report),
            (false, OnError::Report),
            (false, OnError::Ignore),
        ] {
            // Every request of the first copy, and some of what comes after.
            for n in (0..).map(|n: usize| if n < 30 { n } else { 30 + (n - 30) * 7 }) {
                let (graph, source, target, user) = small();
                let count = Arc::new(AtomicU64::new(0));
                let counted = count.clone();
                let fails = move |io| {
                    // A write of the guest to the source is no matter of the mirror.
                    let ours = if on_source { is_read(io) } else { !is_read(io) };
                    (ours && counted.fetch_add(1, Ordering::SeqCst) == n as u64)
                        .then_some(libc::EIO)
                };
                if on_source {
                    source.hook(fails);
                } else {
                    target.hook(fails);
                }
                let options = MirrorOptions {
                    copy_mode,
                    on_source_error: policy,
                    on_target_error: policy,
                    ..options(Sync::Full)
                };
                let mut mirror = Mirror::new(&graph, options).unwrap();
                let (control, told) = control();
                let mut disk = source.bytes();
                let result = run_with_writes(&mut mirror, &control, &told, &user, &mut disk);
                drop(mirror);
                let met = count.load(Ordering::SeqCst) > n as u64;
                if result.is_ok() {
                    assert_eq!(user.node().name(), "t");
                    assert!(target.bytes() == disk, "{policy:?} at {n}");
                } else {
                    assert!(source.bytes() == disk);
                    // Requests of the last step, with requests held, fail it whatever the policy.
                    assert!(met, "{result:?}");
                    assert_eq!(user.node().name(), "s");
                }
                target.hook(|_| None);
                // The disk goes on, and nothing of it goes to the other any more.
                let (to, other) =
                    if result.is_ok() { (&target, &source) } else { (&source, &target) };
                user.link().write(99, &[WriteBuf::new(&[0x77; 9])], false).unwrap();
                assert_eq!(to.bytes()[99..108], [0x77; 9]);
                assert_ne!(other.bytes()[99..108], [0x77; 9]);
                if !met {
                    assert!(n > 5, "few requests: {n}");
                    break;
                }
            }
        }
    }
}

#[test]
fn a_pause_or_an_end_at_any_request_spoils_nothing() {
    for cancel in [false, true] {
        for n in (0..).map(|n: usize| if n < 30 { n } else { 30 + (n - 30) * 7 }) {
            let (graph, source, target, user) = small();
            let (control, told) = control();
            let (asks, count) = (control.clone(), Arc::new(AtomicU64::new(0)));
            let counted = count.clone();
            target.hook(move |io| {
                if !is_read(io) && counted.fetch_add(1, Ordering::SeqCst) == n as u64 {
                    if cancel { asks.cancel(true) } else { asks.pause() }
                }
                None
            });
            let mut mirror = Mirror::new(&graph, options(Sync::Full)).unwrap();
            let mut disk = source.bytes();
            let result = run_with_writes(&mut mirror, &control, &told, &user, &mut disk);
            drop(mirror);
            let met = count.load(Ordering::SeqCst) > n as u64;
            match result {
                Ok(()) => {
                    assert_eq!(user.node().name(), "t");
                    assert!(target.bytes() == disk, "at {n}");
                }
                Err(Error::Cancelled) => {
                    assert!(cancel && met);
                    assert_eq!(user.node().name(), "s");
                    graph.remove("t").unwrap();
                }
                Err(error) => panic!("{error}"),
            }
            user.link().write(99, &[WriteBuf::new(&[0x77; 9])], false).unwrap();
            if !met {
                break;
            }
        }
    }
}

#[test]
fn a_write_that_the_target_does_not_take_succeeds_and_the_job_is_told() {
    let graph = Graph::new();
    let source = Hooked::add(&graph, "s", vec![1; MIB as usize]);
    let target = Hooked::add(&graph, "t", vec![0; MIB as usize]);
    let s = graph.get("s").unwrap();
    let copy_mode = CopyMode::WriteBlocking;
    let options =
        MirrorOptions { copy_mode, on_target_error: OnError::Stop, ..options(Sync::Full) };
    let mut mirror = Mirror::new(&graph, options).unwrap();
    thread::scope(|scope| {
        let Ready { control, told, job } = until_ready(scope, &mut mirror);
        target.hook(|io| (!is_read(io)).then_some(libc::ENOSPC));
        put(&s, 65530, &[2; 12]);
        assert_eq!(source.bytes()[65530..65542], [2; 12]);
        let action = block::jobs::Action::Stop;
        wait_for(&told, Notice::Error { read: false, action, nospace: true });
        wait_for(&told, Notice::Paused);
        target.hook(|_| None);
        control.resume();
        control.complete();
        job.join().unwrap().unwrap();
    });
    assert!(source.bytes() == target.bytes());
}

#[test]
fn a_commit_that_fails_leaves_the_source_in_its_place() {
    let (graph, source, target, user) = small();
    let (control, told) = control();
    let mut mirror = Mirror::new(&graph, options(Sync::Full)).unwrap();
    thread::scope(|scope| {
        let run = scope.spawn(|| mirror.run(&control));
        wait_for(&told, Notice::Ready);
        control.complete();
        run.join().unwrap().unwrap();
    });
    // Between its work and its end, as when it waits for job-finalize, writes are followed.
    user.link().write(70_000, &[WriteBuf::new(&[5; 3000])], false).unwrap();
    target.hook(|io| (io == Io::Flush).then_some(libc::EIO));
    assert_eq!(mirror.commit().unwrap_err().errno(), libc::EIO);
    assert_eq!(user.node().name(), "s");
    target.hook(|_| None);
    mirror.commit().unwrap();
    assert_eq!(user.node().name(), "t");
    assert!(source.bytes() == target.bytes());
    // The source is nobody's but who writes to it, also while the job is still there.
    put(&graph.get("s").unwrap(), 0, &[0x99; 100]);
    assert_ne!(target.bytes()[..100], [0x99; 100]);
    drop(mirror);
}

/// Lets other threads go on, so that what must not happen would have.
fn let_others_run() {
    for _ in 0..2000 {
        thread::yield_now();
    }
}

#[test]
fn a_write_that_blocks_comes_after_the_piece_that_the_job_is_at() {
    let graph = Graph::new();
    let source = Hooked::add(&graph, "s", vec![1; 65536]);
    let target = Hooked::add(&graph, "t", vec![0; 65536]);
    let s = graph.get("s").unwrap();
    let (arrived, arrivals) = std::sync::mpsc::channel();
    let (go, goes) = std::sync::mpsc::channel::<()>();
    let (first, both) = (AtomicBool::new(true), Mutex::new((arrived, goes)));
    target.hook(move |io| {
        if !is_read(io) && first.swap(false, Ordering::SeqCst) {
            let both = both.lock().unwrap();
            both.0.send(()).unwrap();
            both.1.recv().unwrap();
        }
        None
    });
    let copy_mode = CopyMode::WriteBlocking;
    let mut mirror =
        Mirror::new(&graph, MirrorOptions { copy_mode, ..options(Sync::Full) }).unwrap();
    let (control, told) = control();
    thread::scope(|scope| {
        let job = scope.spawn(|| finish(&mut mirror, &control));
        arrivals.recv().unwrap();
        let write = scope.spawn(|| put(&s, 100, &[2; 100]));
        let_others_run();
        assert!(!write.is_finished() && source.bytes()[100] == 1);
        go.send(()).unwrap();
        write.join().unwrap();
        assert_eq!(target.bytes()[100..200], [2; 100]);
        wait_for(&told, Notice::Ready);
        control.cancel(false);
        job.join().unwrap().unwrap();
    });
    assert!(source.bytes() == target.bytes());
}

#[test]
fn both_sides_get_the_same_bytes_from_memory_that_changes() {
    let graph = Graph::new();
    let source = Hooked::add(&graph, "s", vec![1; 65536]);
    let target = Hooked::add(&graph, "t", vec![1; 65536]);
    let s = graph.get("s").unwrap();
    let memory: Arc<Vec<AtomicU64>> = Arc::new((0..64).map(AtomicU64::new).collect());
    for side in [&source, &target] {
        let memory = memory.clone();
        side.hook(move |io| {
            if matches!(io, Io::Write(_, 512)) {
                for word in memory.iter() {
                    word.fetch_add(1, Ordering::Relaxed);
                }
            }
            None
        });
    }
    let copy_mode = CopyMode::WriteBlocking;
    let mirror = Mirror::new(&graph, MirrorOptions { copy_mode, ..options(Sync::None) }).unwrap();
    // SAFETY: 512 bytes of atomics that outlive the write.
    let guest = unsafe { WriteBuf::from_raw(memory.as_ptr().cast(), 512) };
    s.write(0, &[guest]).unwrap();
    drop(mirror);
    assert_ne!(source.bytes()[..512], [1; 512]);
    assert_eq!(source.bytes()[..512], target.bytes()[..512]);
}

#[test]
fn the_target_has_everything_before_requests_go_to_it() {
    let (graph, source, target, user) = small();
    let expected = Arc::new(Mutex::new(Vec::new()));
    let (control, told) = control();
    let mut mirror = Mirror::new(&graph, options(Sync::Full)).unwrap();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        // Each write reads its own before the next.
        let writer = scope.spawn(|| {
            for n in 0u64.. {
                if stop.load(Ordering::Acquire) {
                    return n;
                }
                let at = n * 7919 % 1000 * 1024;
                let bytes = n.to_le_bytes();
                user.link().write(at, &[WriteBuf::new(&bytes)], n % 5 == 0).unwrap();
                let mut now = [0; 8];
                user.link().read(at, &[ReadBuf::new(&mut now)]).unwrap();
                assert_eq!(now, bytes);
                expected.lock().unwrap().push((at, bytes));
            }
            0
        });
        let job = scope.spawn(|| finish(&mut mirror, &control));
        wait_for(&told, Notice::Ready);
        control.complete();
        job.join().unwrap().unwrap();
        let before = expected.lock().unwrap().len();
        while expected.lock().unwrap().len() < before + 10 {
            thread::yield_now();
        }
        stop.store(true, Ordering::Release);
        assert!(writer.join().unwrap() > 0);
    });
    let bytes = target.bytes();
    let mut last = std::collections::BTreeMap::new();
    last.extend(expected.lock().unwrap().iter().copied());
    for (at, value) in last {
        assert_eq!(bytes[at as usize..][..8], value);
    }
    assert!(source.bytes() != bytes, "the source is left behind");
}

#[test]
fn what_cannot_be_mirrored_is_refused_and_leaves_everything_as_it_was() {
    let graph = Graph::new();
    Hooked::add(&graph, "s", vec![1; MIB as usize]);
    Hooked::add(&graph, "t", vec![0; MIB as usize]);
    Hooked::add(&graph, "small", vec![0; 65536]);
    let new = |options: MirrorOptions| error_of(Mirror::new(&graph, options));
    let to = |source: &str, target: &str| new(MirrorOptions::new(source, target, Sync::Full));
    assert_eq!(to("s", "s"), "Can't mirror node into itself");
    assert_eq!(to("x", "t"), "Cannot find device='x' nor node-name='x'");
    assert_eq!(new(options(Sync::Incremental)), "Sync mode 'incremental' not supported");
    let granularity =
        |bytes| new(MirrorOptions { granularity: Some(bytes), ..options(Sync::Full) });
    let range = "Parameter 'granularity' expects a value in range [512B, 64MB]";
    assert_eq!((granularity(256).as_str(), granularity(128 << 20).as_str()), (range, range));
    assert_eq!(granularity(1000), "Parameter 'granularity' expects a power of 2");
    let replaces =
        |name: &str| new(MirrorOptions { replaces: Some(name.to_owned()), ..options(Sync::Full) });
    assert_eq!(replaces("x"), "Failed to find node with node-name='x'");
    assert!(replaces("small").starts_with("Cannot replace 'small' by a node mirrored from 's'"));
    // Other sizes are found out by the job, as in QEMU.
    let mut mirror = Mirror::new(&graph, MirrorOptions::new("s", "small", Sync::Full)).unwrap();
    let error = finish(&mut mirror, &Control::default()).unwrap_err().to_string();
    assert_eq!(error, "Source and target image have different sizes");
    drop(mirror);

    let mirror = Mirror::new(&graph, options(Sync::Full)).unwrap();
    assert_eq!(to("s", "small"), "Need a root block node");
    let busy = "Node 't' is busy: block device is in use by block job: mirror";
    assert_eq!(to("small", "t"), busy);
    assert_eq!(error_of(graph.remove("t")), busy);
    let export = error_of(graph.attach_export("t", false).map(drop));
    assert!(export.contains("'consistent read' are both required by"), "{export}");
    drop(mirror);
    drop(graph.attach_export("t", true).unwrap());
    graph.remove("t").unwrap();
}
