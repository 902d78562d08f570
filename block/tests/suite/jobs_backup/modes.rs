//! What is copied: `top`, `none`, and targets that read from their source.

use super::*;

#[test]
fn a_top_backup_has_what_the_image_has_and_with_its_backing_file_is_the_moment() {
    if !have_qemu_img("top backup") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let base = base(dir.path());
    for cluster in ["", ",cluster_size=4k"] {
        let (source, target) = (over(&base, "s.qcow2", cluster), over(&base, "t.qcow2", ""));
        write_over(&source);
        let expected = qemu_contents(dir.path(), &source, None);
        let graph = Graph::new();
        let s = add(&graph, "s", &source, &json!({}));
        let t = add(&graph, "t", &target, &json!({}));
        let mut backup = Backup::new(&graph, options(SyncMode::Top)).unwrap();
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
fn zeroes_are_the_targets_own_where_its_image_names_a_backing_file_that_is_not_open() {
    if !have_qemu_img("backup to an image without its backing file") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let base = base(dir.path());
    for sync in [SyncMode::Top, SyncMode::Full] {
        let (source, target) = (over(&base, "s.qcow2", ""), over(&base, "t.qcow2", ""));
        write_over(&source);
        let graph = Graph::new();
        let s = add(&graph, "s", &source, &json!({}));
        let expected = contents(&s);
        let t = add(&graph, "t", &target, &json!({"backing": null}));
        let mut backup = Backup::new(&graph, options(sync)).unwrap();
        // Writes copy, too.
        put(&s, 3 << 20, &[9; 1000]);
        finish(&mut backup, &Control::default()).unwrap();
        drop((backup, s, t));
        drop(graph);
        check(&target);
        assert!(qemu_contents(dir.path(), &target, None) == expected, "{sync:?}");
    }
}

#[test]
fn zeroes_are_the_targets_own_where_it_gets_a_backing_file_later() {
    if !have_qemu_img("backup to an image that gets a backing file later") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let base = base(dir.path());
    for kind in ["", "cluster_size=4k", "compat=0.10", "extended_l2=on"] {
        let source = over(&base, "s.qcow2", "");
        write_over(&source);
        let target = create(dir.path(), "t.qcow2", "8M", kind);
        let graph = Graph::new();
        let s = add(&graph, "s", &source, &json!({}));
        let expected = contents(&s);
        let t = add(&graph, "t", &target, &json!({}));
        let mut backup = Backup::new(&graph, options(SyncMode::Top)).unwrap();
        // Writes copy, too.
        put(&s, (3 << 20) + 5000, &[9; 1000]);
        finish(&mut backup, &Control::default()).unwrap();
        drop((backup, s, t));
        drop(graph);
        check(&target);
        qemu_img(&["rebase", "-u", "-b", &path(&base), "-F", "qcow2", &path(&target)]);
        assert!(qemu_contents(dir.path(), &target, None) == expected, "{kind}");
    }
}

#[test]
fn a_full_backup_of_zeroes_takes_no_space_for_tables() {
    if !have_qemu_img("full backup of zeroes") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let source = create(dir.path(), "s.qcow2", "64G", "");
    let target = create(dir.path(), "t.qcow2", "64G", "");
    let before = std::fs::metadata(&target).unwrap().len();
    let graph = Graph::new();
    let s = add(&graph, "s", &source, &json!({}));
    let t = add(&graph, "t", &target, &json!({}));
    let mut backup = Backup::new(&graph, options(SyncMode::Full)).unwrap();
    finish(&mut backup, &Control::default()).unwrap();
    drop((backup, s, t));
    drop(graph);
    assert_eq!(std::fs::metadata(&target).unwrap().len(), before);
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
    let backup = Backup::new(&graph, options(SyncMode::None)).unwrap();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let guests = guests(scope, user.link(), (2, 2 * MIB), 40, &stop, &moment);
        let mut random = Random(8);
        for _ in 0..200 {
            let at = random.below(4 * MIB - 65536);
            let mut bytes = vec![0; 65536];
            t.read(at, &[ReadBuf::new(&mut bytes)]).unwrap();
            let place = at as usize..at as usize + 65536;
            assert_contents(&bytes, &moment[place], "a read of the target");
        }
        stop.store(true, Ordering::Release);
        join(guests);
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
    let mut backup = Backup::new(&graph, options(SyncMode::None)).unwrap();
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
