//! Other ways to an end, and what a mirror is of.

use super::*;

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
            let options = MirrorOptions { copy_mode, ..options(SyncMode::Full) };
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

#[test]
fn a_top_mirror_over_the_same_backing_file_is_the_same_disk() {
    if !have_qemu_img("top mirror") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let base = base(dir.path());
    let source = over(&base, "s.qcow2", ",cluster_size=4k");
    let target = over(&base, "t.qcow2", "");
    write_over(&source);
    let graph = Graph::new();
    let s = add(&graph, "s", &source, &json!({}));
    add(&graph, "t", &target, &json!({}));
    let user = device(&graph);
    let mut mirror = Mirror::new(&graph, options(SyncMode::Top)).unwrap();
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
    let mut mirror = Mirror::new(&graph, options(SyncMode::Full)).unwrap();
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
        Mirror::new(&graph, MirrorOptions { replaces, ..options(SyncMode::Full) }).unwrap();
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

#[test]
fn zeroes_are_the_targets_own_where_its_image_names_a_backing_file_that_is_not_open() {
    if !have_qemu_img("mirror to an image without its backing file") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let base = base(dir.path());
    for (sync, copy_mode) in [
        (SyncMode::Top, CopyMode::Background),
        (SyncMode::Full, CopyMode::Background),
        (SyncMode::Full, CopyMode::WriteBlocking),
    ] {
        let (source, target) = (over(&base, "s.qcow2", ""), over(&base, "t.qcow2", ""));
        write_over(&source);
        let graph = Graph::new();
        let s = add(&graph, "s", &source, &json!({}));
        let t = add(&graph, "t", &target, &json!({"backing": null}));
        let mirror = MirrorOptions { copy_mode, ..options(sync) };
        let mut mirror = Mirror::new(&graph, mirror).unwrap();
        thread::scope(|scope| {
            let Ready { control, job, .. } = until_ready(scope, &mut mirror);
            s.write_zeroes(64 << 10, 64 << 10, false).unwrap();
            control.cancel(false);
            job.join().unwrap().unwrap();
        });
        let expected = contents(&s);
        drop((mirror, s, t));
        drop(graph);
        check(&target);
        assert!(qemu_contents(dir.path(), &target, None) == expected, "{sync:?}, {copy_mode:?}");
    }
}

#[test]
fn zeroes_are_the_targets_own_where_it_gets_a_backing_file_later() {
    if !have_qemu_img("mirror to an image that gets a backing file later") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let base = base(dir.path());
    for (sync, copy_mode, kind) in [
        (SyncMode::Top, CopyMode::Background, ""),
        (SyncMode::Top, CopyMode::WriteBlocking, "cluster_size=4k"),
        (SyncMode::Top, CopyMode::Background, "compat=0.10"),
        (SyncMode::None, CopyMode::Background, "extended_l2=on"),
        (SyncMode::None, CopyMode::WriteBlocking, "compat=0.10"),
    ] {
        let source = over(&base, "s.qcow2", "");
        // What the target is not given must be the backing file's.
        if sync == SyncMode::Top {
            write_over(&source);
        }
        let target = create(dir.path(), "t.qcow2", "8M", kind);
        let graph = Graph::new();
        let s = add(&graph, "s", &source, &json!({}));
        let t = add(&graph, "t", &target, &json!({}));
        let mirror = MirrorOptions { copy_mode, ..options(sync) };
        let mut mirror = Mirror::new(&graph, mirror).unwrap();
        thread::scope(|scope| {
            let Ready { control, job, .. } = until_ready(scope, &mut mirror);
            s.write_zeroes(64 << 10, 64 << 10, false).unwrap();
            s.write_zeroes((2 << 20) + 512, 1024, true).unwrap();
            control.cancel(false);
            job.join().unwrap().unwrap();
        });
        let expected = contents(&s);
        drop((mirror, s, t));
        drop(graph);
        check(&target);
        qemu_img(&["rebase", "-u", "-b", &path(&base), "-F", "qcow2", &path(&target)]);
        let found = qemu_contents(dir.path(), &target, None);
        assert!(found == expected, "{sync:?}, {copy_mode:?}, {kind}");
    }
}
