//! Many threads on one image.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::common::{
    self, Random, check, create, delete, have_qemu_img, open, qemu_contents, save,
};

const THREADS: u64 = 8;
const PART: u64 = 1 << 20;

/// Threads allocate in parts of their own that share clusters at the borders, while snapshots come
/// and go: each part holds what its thread wrote last.
#[test]
fn threads_that_allocate_beside_one_another_and_snapshots_lose_nothing() {
    if !have_qemu_img("threads") {
        return;
    }
    for options in ["cluster_size=4k", "", "cluster_size=2M"] {
        let dir = tempfile::tempdir().unwrap();
        let image = create(dir.path(), "a.qcow2", "16M", options);
        let (graph, node) = open(&image);
        let image_format = node.format();
        let format = &*image_format;
        let running = AtomicBool::new(true);
        // Not a multiple of any cluster size.
        let start = |thread: u64| thread * (PART + 1000);
        let models: Vec<Vec<u8>> = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..THREADS)
                .map(|thread| {
                    scope.spawn(move || {
                        let mut random = Random(thread + 1);
                        let mut model = vec![0; PART as usize];
                        for _ in 0..60 {
                            let at = random.below(PART - 1);
                            let len = random.below((PART - at).min(100_000)) + 1;
                            let span = at as usize..(at + len) as usize;
                            if random.below(5) == 0 {
                                format.write_zeroes(start(thread) + at, len, true).unwrap();
                                model[span].fill(0);
                            } else {
                                let bytes = random.bytes(len);
                                common::write(format, start(thread) + at, &bytes);
                                model[span.clone()].copy_from_slice(&bytes);
                                let now = common::read(format, start(thread) + at, span.len());
                                assert!(now == bytes, "thread {thread} at {at:#x}");
                            }
                        }
                        model
                    })
                })
                .collect();
            scope.spawn(|| {
                while running.load(Ordering::Acquire) {
                    save(format, "round");
                    format.flush().unwrap();
                    delete(format, "round");
                }
            });
            let models = workers.into_iter().map(|w| w.join()).collect::<Vec<_>>();
            running.store(false, Ordering::Release);
            models.into_iter().map(|m| m.unwrap()).collect()
        });
        drop((graph, node, image_format));
        check(&image);
        let disk = qemu_contents(dir.path(), &image, None);
        for (thread, model) in models.iter().enumerate() {
            let at = start(thread as u64) as usize;
            assert!(disk[at..at + PART as usize] == model[..], "part of thread {thread}");
        }
    }
}
