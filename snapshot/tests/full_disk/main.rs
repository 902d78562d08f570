//! A disk that fills up during a save. Alone in its program: the limit is the whole process's.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers fail the test that calls them"
)]

#[path = "../qcow2/images.rs"]
#[allow(dead_code, reason = "shared with the tests in qcow2, which use all of it")]
mod images;

use std::fs;

use images::{Images, MIB, contents, ram, scribble};
use snapshot::SaveError;

/// Makes writes past `bytes` of any file fail, as on a full disk.
fn limit_file_size(bytes: u64) {
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: no memory is passed; with the signal ignored, the write fails with EFBIG.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    // SAFETY: the limit is read and not kept.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit) }, 0);
}

#[test]
fn a_save_that_fills_the_disk_fails_gives_its_clusters_back_and_can_be_repeated() {
    let mut images = Images::create("cluster_size=64k");
    let memory = ram();
    scribble(&memory, 1);
    images.save("first", &memory).unwrap();
    let first = contents(&memory);
    images.check();

    scribble(&memory, 2);
    let second = contents(&memory);
    let size = fs::metadata(&images.paths[0]).unwrap().len();
    // Five failures that keep what they took would need more than the two that fit.
    for room in [0, MIB, 2 * MIB, 3 * MIB, 3 * MIB] {
        limit_file_size(size + room);
        let error = images.save("second", &memory).unwrap_err();
        assert!(matches!(error, SaveError::Write { .. } | SaveError::Create { .. }), "{error}");
        limit_file_size(libc::RLIM_INFINITY);
        images.check();
    }
    images.save("second", &memory).unwrap();
    images.check();
    assert_eq!(images.load("first", &memory), "first");
    assert!(contents(&memory) == first);
    assert_eq!(images.load("second", &memory), "second");
    assert!(contents(&memory) == second);
}
