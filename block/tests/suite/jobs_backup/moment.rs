//! The copy is the moment of the start: under writes, with writes in flight, of several disks.

use super::*;

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
                Backup::new(&graph, BackupOptions { compress, ..options(SyncMode::Full) }).unwrap();
            let guests = guests(scope, user.link(), (3, stripe), 1 + 10 * round, &stop, &moment);
            finish(&mut backup, &control).unwrap();
            drop(backup);
            stop.store(true, Ordering::Release);
            known = join(guests);
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
    let raw = |name| raw(dir.path(), name);
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
            let mut backup = Backup::new(&graph, options(SyncMode::Full)).unwrap();
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
    let backup = Backup::new(&graph, options(SyncMode::None)).unwrap();
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
fn two_backups_of_one_disk_are_of_the_moments_of_their_starts() {
    let graph = Graph::new();
    Hooked::add(&graph, "s", vec![1; MIB as usize]);
    let first_target = Hooked::add(&graph, "t", vec![0; MIB as usize]);
    let second_target = Hooked::add(&graph, "u", vec![0; MIB as usize]);
    let s = graph.get("s").unwrap();
    let mut first = Backup::new(&graph, options(SyncMode::Full)).unwrap();
    put(&s, 0, &[2; 1000]);
    let mut second = Backup::new(&graph, BackupOptions::new("s", "u", SyncMode::Full)).unwrap();
    put(&s, 0, &[3; 2000]);
    finish(&mut second, &Control::default()).unwrap();
    put(&s, 300_000, &[4; 2000]);
    finish(&mut first, &Control::default()).unwrap();
    assert!(first_target.bytes().iter().all(|byte| *byte == 1));
    let copy = second_target.bytes();
    assert!(copy[..1000].iter().all(|byte| *byte == 2) && copy[1000..].iter().all(|b| *b == 1));
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
        let first = copied.then(|| Backup::new(&graph, options(SyncMode::None)).unwrap());
        let (arrivals, go) = hold_first_write(if copied { &first_target } else { &source });
        thread::scope(|scope| {
            let write = scope.spawn(|| put(&s, 0, &[2; 65536]));
            arrivals.recv().unwrap();
            let begin =
                scope.spawn(|| Backup::new(&graph, BackupOptions::new("s", "u", SyncMode::Full)));
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
                Backup::new(&graph, BackupOptions::new(source, target, SyncMode::Full)).unwrap()
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
