//! A chain for which a process has too few descriptors. Alone in its program: the limit is the whole
//! process's.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use block::Graph;
use block::qcow2::create::{CreateOptions, create};
use block::storage::{FileOptions, FileStorage, raise_descriptor_limit};

/// Lets the process have that many files open; it may raise the limit again.
fn limit_descriptors(count: u64) {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the limit is written and not kept.
    assert_eq!(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) }, 0);
    limit.rlim_cur = count;
    // SAFETY: the limit is read and not kept.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) }, 0);
}

#[test]
fn a_chain_that_is_too_long_for_the_limit_is_refused_and_leaves_nothing_open() {
    const IMAGES: usize = 60;
    let dir = tempfile::tempdir().unwrap();
    let at = |n: usize| dir.path().join(format!("{n}.qcow2"));
    for n in 0..IMAGES {
        let options = CreateOptions {
            size: 1 << 20,
            backing_file: (n > 0).then(|| format!("{}.qcow2", n - 1)),
            backing_fmt: (n > 0).then(|| "qcow2".to_owned()),
            ..CreateOptions::default()
        };
        std::fs::write(at(n), []).unwrap();
        let storage = FileStorage::open(at(n), FileOptions::default()).unwrap();
        create(&storage, None, &options, &block::Progress::default()).unwrap();
    }
    let graph = Graph::new();
    let top = at(IMAGES - 1).display().to_string();
    let options = format!("driver=qcow2,node-name=d,file.driver=file,file.filename={top}");
    for _ in 0..3 {
        limit_descriptors(64);
        let error = graph.add_text(&options).unwrap_err().to_string();
        assert!(error.contains("Too many open files") && error.contains("ulimit"), "{error}");
        assert!(graph.list().is_empty());
        assert!(raise_descriptor_limit().unwrap() > 64);
        graph.add_text(&options).unwrap();
        assert_eq!(graph.list().len(), 2 * IMAGES);
        graph.remove("d").unwrap();
    }
}
