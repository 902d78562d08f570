//! Incremental backups, and what bitmaps have after them.

use super::*;

#[test]
fn a_chain_of_incremental_backups_is_the_moment_of_the_last() {
    if !have_qemu_img("incremental") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let source = create(dir.path(), "s.qcow2", "8M", "");
    let mut expected = Vec::new();
    let mut below: Option<std::path::PathBuf> = None;
    for round in 0..4u64 {
        let name = format!("t{round}.qcow2");
        let target = match &below {
            None => create(dir.path(), &name, "8M", ""),
            Some(below) => {
                let options = format!("backing_file={},backing_fmt=qcow2", path(below));
                create(dir.path(), &name, "8M", &options)
            }
        };
        // The bitmap is stored in between, as the image is closed.
        let graph = Graph::new();
        let s = add(&graph, "s", &source, &json!({}));
        add(&graph, "t", &target, &json!({}));
        let sync = if round == 0 {
            put(&s, 0, &pattern(8 * MIB, 5));
            add_bitmap(&s, true);
            BackupOptions::new("s", "t", SyncMode::Full)
        } else {
            let dirty = bitmap_bytes(&s);
            assert!(dirty > 0 && dirty < 2 * MIB, "{dirty}");
            let bitmap = Some("b".to_owned());
            BackupOptions { bitmap, ..options(SyncMode::Incremental) }
        };
        expected = contents(&s);
        let mut backup = Backup::new(&graph, sync).unwrap();
        for n in 0..4 {
            put(&s, (round * 7 + n * 13) % 64 * 65536 + 4000, &[100 + n as u8; 70_000]);
        }
        let (control, _told) = control();
        finish(&mut backup, &control).unwrap();
        drop(backup);
        if round > 0 {
            assert!(control.progress().1 < 3 * MIB);
        }
        assert!(bitmap_bytes(&s) >= 4 * 65536);
        drop(s);
        drop(graph);
        check(&target);
        assert!(qemu_contents(dir.path(), &target, None) == expected, "round {round}");
        below = Some(target);
    }
    check(&source);
    let info: Value =
        serde_json::from_str(&qemu_img(&["info", "--output=json", &path(&source)])).unwrap();
    assert_eq!(info["format-specific"]["data"]["bitmaps"][0]["name"], "b");
    assert!(!expected.is_empty());
}

/// Dirty chunks of 64 KiB by number.
fn dirty(node: &Node) -> Vec<u64> {
    let bitmap = node.bitmaps().get("b").unwrap();
    let extents = bitmap.extents(0, u64::MAX, usize::MAX);
    let dirty = extents.iter().filter(|extent| extent.dirty);
    dirty.flat_map(|e| e.offset / 65536..(e.offset + e.len) / 65536).collect()
}

#[test]
fn a_bitmap_has_what_its_mode_says_after_success_failure_and_an_end() {
    // Dirty before: 1, 3, 5; written meanwhile: 3, 8; the target fails at 5.
    let cases = [
        (BitmapMode::OnSuccess, true, vec![3, 8]),
        (BitmapMode::OnSuccess, false, vec![1, 3, 5, 8]),
        (BitmapMode::Never, true, vec![1, 3, 5, 8]),
        (BitmapMode::Never, false, vec![1, 3, 5, 8]),
        (BitmapMode::Always, true, vec![3, 8]),
        (BitmapMode::Always, false, vec![3, 5, 8]),
    ];
    for (mode, success, expected) in cases {
        let graph = Graph::new();
        Hooked::add(&graph, "s", vec![7; MIB as usize]);
        let target = Hooked::add(&graph, "t", vec![0; MIB as usize]);
        let s = graph.get("s").unwrap();
        add_bitmap(&s, false);
        for chunk in [1, 3, 5] {
            put(&s, chunk * 65536, &[1; 65536]);
        }
        let bitmap = Some("b".to_owned());
        let options =
            BackupOptions { bitmap, bitmap_mode: Some(mode), ..options(SyncMode::Bitmap) };
        let mut backup = Backup::new(&graph, options).unwrap();
        assert!(s.bitmaps().get("b").unwrap().info().busy);
        put(&s, 3 * 65536, &[2; 10]);
        put(&s, 8 * 65536, &[2; 10]);
        assert_eq!(dirty(&s), [1, 3, 5, 8], "the bitmap never lacks anything");
        target.hook(move |io| match io {
            Io::Write(at, _) if at == 5 * 65536 && !success => Some(libc::EIO),
            _ => None,
        });
        assert_eq!(finish(&mut backup, &Control::default()).is_ok(), success);
        drop(backup);
        assert!(!s.bitmaps().get("b").unwrap().info().busy);
        assert_eq!(dirty(&s), expected, "{mode:?} {success}");
    }
}

#[test]
fn one_of_a_group_that_is_aborted_after_its_work_leaves_its_bitmap() {
    let graph = Graph::new();
    Hooked::add(&graph, "s", vec![7; MIB as usize]);
    Hooked::add(&graph, "t", vec![0; MIB as usize]);
    let s = graph.get("s").unwrap();
    add_bitmap(&s, false);
    put(&s, 0, &[1; 65536]);
    let bitmap = Some("b".to_owned());
    let mut backup =
        Backup::new(&graph, BackupOptions { bitmap, ..options(SyncMode::Incremental) }).unwrap();
    backup.run(&Control::default()).unwrap();
    assert_eq!(dirty(&s), [0]);
    backup.abort();
    assert_eq!(dirty(&s), [0]);
}

#[test]
fn an_empty_incremental_backup_is_done_at_once() {
    let graph = Graph::new();
    Hooked::add(&graph, "s", vec![7; MIB as usize]);
    let target = Hooked::add(&graph, "t", vec![0; MIB as usize]);
    add_bitmap(&graph.get("s").unwrap(), false);
    let bitmap = Some("b".to_owned());
    let mut backup =
        Backup::new(&graph, BackupOptions { bitmap, ..options(SyncMode::Incremental) }).unwrap();
    let (control, _told) = control();
    finish(&mut backup, &control).unwrap();
    assert_eq!(control.progress(), (0, 0));
    assert!(target.bytes().iter().all(|byte| *byte == 0));
}
