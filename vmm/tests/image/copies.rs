//! `image convert` of snapshots, of images in use and into images that are there.

use crate::{Holder, have_qemu_img, ok, ours, refused, run};

#[test]
fn a_snapshot_is_copied_as_qemu_copies_it_over_its_backing_file() {
    if !have_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    ok(&ours(dir, &["create", "-q", "-f", "qcow2", "base.q", "3M"]));
    ok(&run(dir, "qemu-io", &["-c", "write -P 1 0 3M", "base.q"]));
    let make = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k"];
    ok(&ours(dir, &[&make[..], &["-b", "base.q", "-F", "qcow2", "a.q", "4M"]].concat()));
    let write = |what: &str| ok(&run(dir, "qemu-io", &["-c", what, "a.q"]));
    write("write -P 2 100k 1M");
    write("write -z 2M 64k");
    ok(&ours(dir, &["snapshot", "create", "a.q", "before"]));
    write("write -P 3 0 4M");
    ok(&ours(dir, &["resize", "-q", "a.q", "6M"]));
    ok(&run(dir, "qemu-img", &["convert", "-l", "before", "-O", "raw", "a.q", "theirs"]));
    for (name, format, flags) in
        [("before", "raw", &[][..]), ("1", "qcow2", &[]), ("before", "qcow2", &["-c"])]
    {
        let args = [&["convert", "-l", name, "-O", format], flags, &["a.q", "copy"]].concat();
        ok(&ours(dir, &args));
        // QEMU's copy is as large as the disk is now, with zeroes past the end it had.
        assert!(ok(&ours(dir, &["info", "copy"])).contains("virtual size: 4 MiB"));
        ok(&run(dir, "qemu-img", &["compare", "-f", "raw", "-F", format, "theirs", "copy"]));
    }
    let error = refused(&ours(dir, &["convert", "-l", "none", "a.q", "never"]));
    assert!(error.contains("Failed to load snapshot") && error.contains("'none'"), "{error}");
    assert!(!dir.join("never").exists());
    let all = ok(&ours(dir, &["snapshot", "list", "--output", "json", "a.q"]));
    let all: serde_json::Value = serde_json::from_str(&all).unwrap();
    let info = ok(&run(dir, "qemu-img", &["info", "--output", "json", "a.q"]));
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(all, info["snapshots"]);
}

#[test]
fn a_copy_into_an_image_that_is_there_overwrites_what_it_held() {
    if !have_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    ok(&ours(dir, &["create", "-q", "-f", "qcow2", "a.q", "2M"]));
    ok(&run(dir, "qemu-io", &["-c", "write -P 5 68k 100k", "a.q"]));
    for format in ["qcow2", "raw"] {
        ok(&ours(dir, &["create", "-q", "-f", format, "there", "2M"]));
        ok(&run(dir, "qemu-io", &["-f", format, "-c", "write -P 9 0 2M", "there"]));
        ok(&ours(dir, &["convert", "-n", "-O", format, "a.q", "there"]));
        ok(&run(dir, "qemu-img", &["compare", "-F", format, "a.q", "there"]));
    }
    ok(&ours(dir, &["create", "-q", "small.raw", "1M"]));
    let error = refused(&ours(dir, &["convert", "-n", "-O", "raw", "a.q", "small.raw"]));
    assert!(error.contains("output file is smaller than input file"), "{error}");
    assert!(!refused(&ours(dir, &["convert", "-n", "-O", "raw", "a.q", "none.raw"])).is_empty());
    assert!(!dir.join("none.raw").exists());
}

#[test]
fn an_image_in_use_is_copied_only_if_asked_for() {
    if !have_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    ok(&ours(dir, &["create", "-q", "-f", "qcow2", "a.q", "2M"]));
    ok(&run(dir, "qemu-io", &["-c", "write -P 5 0 1M", "a.q"]));
    let holder = Holder::of(dir, &["-f", "qcow2", "a.q"]);
    assert!(refused(&ours(dir, &["convert", "a.q", "copy"])).contains("lock"));
    ok(&ours(dir, &["convert", "-U", "a.q", "copy"]));
    drop(holder);
    ok(&run(dir, "qemu-img", &["compare", "-F", "raw", "a.q", "copy"]));
}
