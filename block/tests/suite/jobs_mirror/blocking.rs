//! Writes that are made on both sides.

use super::*;

#[test]
fn a_write_that_blocks_is_on_both_sides_when_it_is_done() {
    let graph = Graph::new();
    Hooked::add(&graph, "s", vec![1; MIB as usize]);
    let target = Hooked::add(&graph, "t", vec![0; MIB as usize]);
    let s = graph.get("s").unwrap();
    let copy_mode = CopyMode::WriteBlocking;
    let mut mirror =
        Mirror::new(&graph, MirrorOptions { copy_mode, ..options(SyncMode::Full) }).unwrap();
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
    let mut mirror = Mirror::new(&graph, options(SyncMode::None)).unwrap();
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
        Mirror::new(&graph, MirrorOptions { copy_mode, ..options(SyncMode::Full) }).unwrap();
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
    let mirror =
        Mirror::new(&graph, MirrorOptions { copy_mode, ..options(SyncMode::None) }).unwrap();
    // SAFETY: 512 bytes of atomics that outlive the write.
    let guest = unsafe { WriteBuf::from_raw(memory.as_ptr().cast(), 512) };
    s.write(0, &[guest]).unwrap();
    drop(mirror);
    assert_ne!(source.bytes()[..512], [1; 512]);
    assert_eq!(source.bytes()[..512], target.bytes()[..512]);
}
