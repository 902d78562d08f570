//! A failure, a pause or an end at each request; speeds.

use super::*;

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
                ..options(SyncMode::Full)
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
    let mut backup = Backup::new(&graph, options(SyncMode::Full)).unwrap();
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
            let mut backup = Backup::new(&graph, options(SyncMode::Full)).unwrap();
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
    let mut backup = Backup::new(&graph, options(SyncMode::Full)).unwrap();
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
        let all = BackupOptions { on_cbw_error, ..options(SyncMode::Full) };
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
