//! Dirty bitmaps: QEMU's tools make them and we read and keep them, and the other way round.

use serde_json::{Value, json};

use block::WriteBuf;
use block::bitmap::NewBitmap;

use crate::bitmap_tools::{Daemon, add, close, dirty, one, qemu_dirty, write};
use crate::common::{Random, check, create, have_qemu_img, open, path, qemu_img, qemu_io};

#[test]
fn what_qemu_stored_is_read_followed_and_read_by_qemu_at_all_granularities() {
    if !have_qemu_img("bitmaps of QEMU") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (cluster, granularity) in
        [(512, 512), (4096, 512), (65536, 512), (65536, 65536), (65536, 1 << 20), (2 << 20, 4096)]
    {
        let options = format!("cluster_size={cluster}");
        let image = create(dir.path(), "a.qcow2", "70000K", &options);
        let (at, bytes) = (path(&image), granularity.to_string());
        qemu_img(&["bitmap", "--add", "-g", &bytes, &at, "b0"]);
        qemu_img(&["bitmap", "--add", "--disable", &at, "off"]);
        qemu_io(&image, &["write 1M 64k", "write 33M 3M", "write 69999K 1K"]);
        let before = qemu_dirty(dir.path(), &image, "b0");
        assert!(before.len() > 1);
        let opened = open(&image);
        assert_eq!(dirty(&opened.1, "b0"), before, "{cluster} {granularity}");
        assert_eq!(dirty(&opened.1, "off"), []);
        write(&opened.1, 5 << 20, &[7; 100]);
        opened.1.write_zeroes(40 << 20, 5 << 20, true).unwrap();
        opened.1.discard(50 << 20, 1 << 20).unwrap();
        let ours = dirty(&opened.1, "b0");
        assert!(ours.len() > before.len());
        close(opened);
        check(&image);
        assert_eq!(qemu_dirty(dir.path(), &image, "b0"), ours, "{cluster} {granularity}");
        assert_eq!(qemu_dirty(dir.path(), &image, "off"), []);
        std::fs::remove_file(&image).unwrap();
    }
}

#[test]
fn bitmaps_of_ours_are_stored_and_qemu_goes_on_with_them() {
    if !have_qemu_img("bitmaps of ours") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut random = Random(0x5eed);
    for (cluster, backing) in [(512, false), (65536, false), (65536, true)] {
        let base = create(dir.path(), "base.qcow2", "64M", "");
        let mut options = format!("cluster_size={cluster}");
        if backing {
            options += &format!(",backing_file={},backing_fmt=qcow2", path(&base));
        }
        let image = create(dir.path(), "a.qcow2", "64M", &options);
        let opened = open(&image);
        for shift in [9, 12, 16, 20, 25, 31] {
            add(&opened.1, &format!("g{shift}"), 1 << shift);
        }
        for _ in 0..40 {
            let len = 1 + random.below(300_000);
            write(&opened.1, random.below((64 << 20) - len), &random.bytes(len));
        }
        let ours: Vec<_> = [9, 12, 16, 20, 25, 31]
            .map(|shift| (format!("g{shift}"), dirty(&opened.1, &format!("g{shift}"))))
            .into();
        close(opened);
        check(&image);
        for (name, ranges) in &ours {
            assert_eq!(&qemu_dirty(dir.path(), &image, name), ranges, "{cluster} {name}");
        }
        // QEMU writes, removes one and adds one; we read what it stored, and write over again.
        qemu_img(&["bitmap", "--remove", &path(&image), "g12"]);
        qemu_img(&["bitmap", "--add", &path(&image), "theirs"]);
        qemu_io(&image, &["write 63M 100k"]);
        let opened = open(&image);
        assert!(opened.1.bitmaps().get("g12").is_err());
        assert_eq!(dirty(&opened.1, "theirs").len(), 1);
        opened.1.clear_bitmap("g9").unwrap();
        opened.1.enable_bitmap("g16", false).unwrap();
        write(&opened.1, 512, &[1; 512]);
        assert_eq!(dirty(&opened.1, "g9"), one(512..1024));
        close(opened);
        check(&image);
        assert_eq!(qemu_dirty(dir.path(), &image, "g9"), one(512..1024));
        let mut daemon = Daemon::start(&image, "");
        let told = daemon.bitmaps();
        let g16 = told.as_array().unwrap().iter().find(|b| b["name"] == "g16").unwrap();
        assert_eq!(g16["recording"], false);
        daemon.quit();
        check(&image);
        // The last one takes the directory along.
        let opened = open(&image);
        for name in ["g9", "g16", "g20", "g25", "g31", "theirs"] {
            opened.1.remove_bitmap(name).unwrap();
        }
        close(opened);
        check(&image);
        let info = qemu_img(&["info", "--output=json", &path(&image)]);
        let info: Value = serde_json::from_str(&info).unwrap();
        assert!(info["format-specific"]["data"].get("bitmaps").is_none());
        std::fs::remove_file(&image).unwrap();
    }
}

#[test]
fn an_opening_without_writes_leaves_the_stored_bitmap_valid_and_in_place() {
    if !have_qemu_img("bitmaps in place") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "64M", "");
    qemu_img(&["bitmap", "--add", &path(&image), "b"]);
    qemu_io(&image, &["write 1M 64k"]);
    let before = std::fs::read(&image).unwrap();
    let opened = open(&image);
    let marked = std::fs::read(&image).unwrap();
    assert_ne!(marked, before, "marked as in use while it is open for writing");
    close(opened);
    assert!(std::fs::read(&image).unwrap() == before, "the mark is gone, nothing else changed");
}

#[test]
fn an_image_that_was_not_closed_has_its_bitmaps_in_use_and_they_can_be_removed() {
    if !have_qemu_img("bitmaps in use") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "64M", "");
    for (name, flag) in [("b", "--enable"), ("off", "--disable")] {
        qemu_img(&["bitmap", "--add", flag, &path(&image), name]);
    }
    qemu_io(&image, &["write 1M 64k"]);
    // Both programs die: with a copy of the file, as a kill would leave it, and a real kill.
    let opened = open(&image);
    write(&opened.1, 7 << 20, &[1; 512]);
    opened.1.flush().unwrap();
    let killed = dir.path().join("killed.qcow2");
    std::fs::copy(&image, &killed).unwrap();
    close(opened);
    check(&killed);
    // The daemon marks all of them while it has the image, the disabled one too.
    let mut daemon = Daemon::start(&killed, ",read-only=on");
    let told = daemon.bitmaps();
    let of = |name| told.as_array().unwrap().iter().find(|b| b["name"] == name).unwrap();
    assert_eq!(of("b")["inconsistent"], true);
    assert_eq!(of("off").get("inconsistent"), None, "it does not follow writes");
    daemon.quit();
    let opened = open(&killed);
    let infos = serde_json::to_value(opened.1.bitmaps().infos()).unwrap();
    assert_eq!(infos, {
        let mut told = told.clone();
        told.as_array_mut().unwrap().sort_by_key(|b| b["name"] != "off");
        told
    });
    let refused = "Bitmap 'b' is inconsistent and cannot be used";
    assert_eq!(opened.1.clear_bitmap("b").unwrap_err().to_string(), refused);
    assert_eq!(opened.1.enable_bitmap("b", false).unwrap_err().to_string(), refused);
    let b = opened.1.bitmaps().get("b").unwrap();
    assert_eq!(b.hold().unwrap_err().to_string(), refused);
    assert_eq!(opened.1.merge_bitmaps("off", &[b]).unwrap_err().to_string(), refused);
    opened.1.remove_bitmap("b").unwrap();
    close(opened);
    check(&killed);
    assert_eq!(qemu_dirty(dir.path(), &killed, "off"), []);
}

#[test]
fn refusals_have_the_texts_of_qemu() {
    if !have_qemu_img("refusals of bitmaps") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "1M", "");
    let other = create(dir.path(), "o.qcow2", "1M", "");
    let old = create(dir.path(), "old.qcow2", "64M", "compat=0.10");
    let mut daemon = Daemon::start(&other, "");
    let opened = open(&image);
    let long = "x".repeat(1024);
    for (name, granularity, persistent) in [
        ("", None, true),
        ("b", Some(1000), false),
        ("b", Some(256), false),
        ("b", None, true),
        ("b", None, false),
        ("b", None, true),
        (&long, None, false),
        (&long, None, true),
        ("g", Some(1 << 31), true),
    ] {
        let mut arguments = json!({"node": "d", "name": name, "persistent": persistent});
        if let Some(granularity) = granularity {
            arguments["granularity"] = granularity.into();
        }
        let theirs = daemon.run("block-dirty-bitmap-add", &arguments);
        let ours =
            opened.1.add_bitmap(&NewBitmap { name, granularity, persistent, disabled: false });
        let ours = ours.err().map(|e| e.to_string());
        assert_eq!(ours.as_deref(), theirs["error"]["desc"].as_str(), "{arguments}");
    }
    let theirs = daemon.bitmaps();
    assert_eq!(serde_json::to_value(opened.1.bitmaps().infos()).unwrap(), theirs);
    for command in ["clear", "remove", "enable", "disable"] {
        let name = format!("block-dirty-bitmap-{command}");
        let theirs = daemon.run(&name, &json!({"node": "d", "name": "no"}));
        let ours = match command {
            "clear" => opened.1.clear_bitmap("no"),
            "remove" => opened.1.remove_bitmap("no"),
            other => opened.1.enable_bitmap("no", other == "enable"),
        };
        assert_eq!(ours.unwrap_err().to_string(), theirs["error"]["desc"].as_str().unwrap());
    }
    daemon.quit();
    let hold = opened.1.bitmaps().get("b").unwrap().hold().unwrap();
    let busy = "Bitmap 'b' is currently in use by another operation and cannot be used";
    assert_eq!(opened.1.remove_bitmap("b").unwrap_err().to_string(), busy);
    assert_eq!(hold.bitmap().hold().unwrap_err().to_string(), busy);
    drop(hold);
    opened.1.remove_bitmap("b").unwrap();
    close(opened);
    check(&image);
    let opened = open(&old);
    let new = NewBitmap { name: "b", persistent: true, ..NewBitmap::default() };
    assert_eq!(
        opened.1.add_bitmap(&new).unwrap_err().to_string(),
        "Can't make bitmap 'b' persistent in 'd': Cannot store dirty bitmaps in qcow2 v2 files"
    );
}

#[test]
fn an_image_with_bitmaps_that_was_found_corrupt_can_be_closed() {
    if !have_qemu_img("bitmaps and damage") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "64M", "");
    qemu_img(&["bitmap", "--add", &path(&image), "b"]);
    qemu_io(&image, &["write 0 64k"]);
    let mut bytes = std::fs::read(&image).unwrap();
    let word = |bytes: &[u8], at: usize| {
        u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) & 0x00ff_ffff_ffff_fe00
    };
    let l2 = usize::try_from(word(&bytes, usize::try_from(word(&bytes, 40)).unwrap())).unwrap();
    // The guest's first cluster is where the refcount table is.
    let entry = word(&bytes, 48) | 1 << 63;
    bytes[l2..l2 + 8].copy_from_slice(&entry.to_be_bytes());
    std::fs::write(&image, &bytes).unwrap();
    let (graph, node) = open(&image);
    write(&node, 1 << 20, &[1; 512]);
    node.write(0, &[WriteBuf::new(&[1; 512])]).unwrap_err();
    drop(node);
    graph.remove("d").unwrap();
    let map = qemu_img(&["info", &path(&image)]);
    assert!(map.contains("in-use") && map.contains("corrupt: true"), "{map}");
}
