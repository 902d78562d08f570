//! The target takes the place of the source, which is written all the time.

use super::*;

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
    let options = MirrorOptions { copy_mode, granularity, ..options(SyncMode::Full) };
    let mut mirror = Mirror::new(&graph, options).unwrap();
    let mut known = thread::scope(|scope| {
        let guests = guests(scope, user.link(), (3, stripe), 51, &stop, &moment);
        let job = scope.spawn(|| finish(&mut mirror, &control));
        wait_for(&told, Notice::Ready);
        control.complete();
        job.join().unwrap().unwrap();
        assert_eq!(user.node().name(), "t");
        stop.store(true, Ordering::Release);
        join(guests)
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
    let raw = |name| raw(dir.path(), name);
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
    let mut mirror = Mirror::new(&graph, options(SyncMode::Full)).unwrap();
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
fn the_target_has_everything_before_requests_go_to_it() {
    let (graph, source, target, user) = small();
    let expected = Arc::new(Mutex::new(Vec::new()));
    let (control, told) = control();
    let mut mirror = Mirror::new(&graph, options(SyncMode::Full)).unwrap();
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
