//! A failure, a pause or an end at each request.

use super::*;

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
                    ..options(SyncMode::Full)
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
            let mut mirror = Mirror::new(&graph, options(SyncMode::Full)).unwrap();
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
        MirrorOptions { copy_mode, on_target_error: OnError::Stop, ..options(SyncMode::Full) };
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
    let mut mirror = Mirror::new(&graph, options(SyncMode::Full)).unwrap();
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
