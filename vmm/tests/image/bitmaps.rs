//! `image bitmap` beside `qemu-img bitmap`.

use std::path::Path;

use serde_json::{Value, json};

use crate::{have_qemu_img, ok, ours, refused, run};

/// The bitmaps as `qemu-img info` tells them.
fn stored(dir: &Path, image: &str) -> Value {
    let info = ok(&run(dir, "qemu-img", &["info", "--output", "json", image]));
    let info: Value = serde_json::from_str(&info).unwrap();
    info["format-specific"]["data"]["bitmaps"].clone()
}

/// The dirty bytes of a bitmap of an image that nobody uses, read by QEMU through an NBD export.
fn dirty(dir: &Path, image: &str, bitmap: &str) -> u64 {
    let map = run(
        dir,
        "sh",
        &[
            "-c",
            &format!(
                "qemu-nbd -r -t --fork --pid-file=pid -k \"$PWD/nbd\" -f qcow2 -B {bitmap} {image} && \
             qemu-img map --output=json --image-opts \
             driver=nbd,server.type=unix,server.path=\"$PWD/nbd\",x-dirty-bitmap=qemu:dirty-bitmap:{bitmap}; \
             kill $(cat pid); tail -s 0.05 --pid=$(cat pid) -f /dev/null; rm -f pid nbd"
            ),
        ],
    );
    let map: Vec<Value> = serde_json::from_str(&ok(&map)).unwrap();
    // The map shows what is dirty as holes.
    let dirty = map.iter().filter(|extent| extent["data"] == json!(false));
    dirty.map(|extent| extent["length"].as_u64().unwrap()).sum()
}

#[test]
fn bitmaps_are_made_changed_and_removed_and_qemu_understands_them() {
    if !have_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let bitmap = |args: &[&str]| ok(&ours(dir, &[&["bitmap"], args].concat()));
    let write = |what: &str| ok(&run(dir, "qemu-io", &["-f", "qcow2", "-c", what, "a.q"]));
    ok(&ours(dir, &["create", "-q", "-f", "qcow2", "a.q", "4M"]));
    ok(&run(dir, "qemu-img", &["create", "-q", "-f", "qcow2", "theirs.q", "4M"]));
    bitmap(&["add", "a.q", "b0"]);
    bitmap(&["add", "-g", "4k", "--disabled", "a.q", "b1"]);
    ok(&run(dir, "qemu-img", &["bitmap", "--add", "theirs.q", "b0"]));
    ok(&run(dir, "qemu-img", &["bitmap", "--add", "--disable", "-g", "4k", "theirs.q", "b1"]));
    assert_eq!(stored(dir, "a.q"), stored(dir, "theirs.q"));
    write("write 0 64k");
    assert_eq!((dirty(dir, "a.q", "b0"), dirty(dir, "a.q", "b1")), (65536, 0));
    bitmap(&["enable", "a.q", "b1"]);
    bitmap(&["disable", "a.q", "b0"]);
    write("write 1M 4k");
    assert_eq!((dirty(dir, "a.q", "b0"), dirty(dir, "a.q", "b1")), (65536, 4096));
    bitmap(&["merge", "a.q", "b1", "b0"]);
    assert_eq!(dirty(dir, "a.q", "b1"), 65536 + 4096);
    bitmap(&["merge", "-b", "a.q", "-F", "qcow2", "theirs.q", "b1", "b0"]);
    assert_eq!(dirty(dir, "theirs.q", "b1"), 65536);
    bitmap(&["clear", "a.q", "b1"]);
    assert_eq!(dirty(dir, "a.q", "b1"), 0);
    bitmap(&["remove", "a.q", "b0"]);
    bitmap(&["remove", "a.q", "b1"]);
    assert_eq!(stored(dir, "a.q"), Value::Null);
    ok(&run(dir, "qemu-img", &["check", "a.q"]));
}

#[test]
fn bitmaps_that_cannot_be_are_refused_by_name() {
    if !have_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    ok(&ours(dir, &["create", "-q", "-f", "qcow2", "a.q", "4M"]));
    ok(&ours(dir, &["create", "-q", "r.raw", "4M"]));
    ok(&ours(dir, &["create", "-q", "-f", "qcow2", "none.q", "0"]));
    ok(&ours(dir, &["bitmap", "add", "a.q", "b"]));
    for (args, reason) in [
        (&["add", "a.q", "b"][..], "Bitmap already exists: b"),
        (&["remove", "a.q", "c"], "Dirty bitmap 'c' not found"),
        (&["merge", "a.q", "b", "c"], "Dirty bitmap 'c' not found"),
        (&["add", "-g", "3k", "a.q", "c"], "power of 2"),
        (&["add", "-f", "raw", "r.raw", "c"], "Can't store persistent bitmaps"),
        // It would be gone when the image is closed.
        (&["add", "none.q", "c"], "no bitmap of a disk of 0 bytes can be stored"),
    ] {
        let error = refused(&ours(dir, &[&["bitmap"], args].concat()));
        assert!(error.contains(reason), "{args:?}: {error}");
        assert!(error.contains(&format!("Operation {} on bitmap", args[0])), "{error}");
    }
    assert_eq!(stored(dir, "a.q").as_array().unwrap().len(), 1);
}
