//! What is refused.

use super::*;

#[test]
fn what_cannot_be_backed_up_is_refused_and_leaves_everything_as_it_was() {
    let graph = Graph::new();
    Hooked::add(&graph, "s", vec![1; MIB as usize]);
    Hooked::add(&graph, "t", vec![0; MIB as usize]);
    Hooked::add(&graph, "small", vec![0; 65536]);
    let s = graph.get("s").unwrap();
    add_bitmap(&s, false);
    let new = |options: BackupOptions| error_of(Backup::new(&graph, options));
    let to = |source: &str, target: &str| new(BackupOptions::new(source, target, SyncMode::Full));
    assert_eq!(to("s", "s"), "Source and target cannot be the same");
    assert_eq!(to("x", "t"), "Cannot find device='x' nor node-name='x'");
    assert_eq!(to("s", "small"), "Source and target image have different sizes");
    let with = |sync, bitmap: Option<&str>, bitmap_mode| {
        new(BackupOptions { bitmap: bitmap.map(str::to_owned), bitmap_mode, ..options(sync) })
    };
    let need = "must provide a valid bitmap name for 'incremental' sync mode";
    assert_eq!(with(SyncMode::Incremental, None, None), need);
    assert_eq!(with(SyncMode::Bitmap, Some("x"), None), "Bitmap 'x' could not be found");
    let given = "Bitmap sync mode must be given when providing a bitmap";
    assert_eq!(with(SyncMode::Bitmap, Some("b"), None), given);
    let mode = Some(BitmapMode::Never);
    let success = "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'";
    assert_eq!(with(SyncMode::Incremental, Some("b"), mode), success);
    let without = "Cannot specify bitmap sync mode without a bitmap";
    assert_eq!(with(SyncMode::Full, None, mode), without);
    assert!(with(SyncMode::Full, Some("b"), mode).contains("no meaningful effect"));
    assert!(with(SyncMode::None, Some("b"), mode).contains("meaningful bitmap outputs"));
    let compress = BackupOptions { compress: true, ..options(SyncMode::Full) };
    assert_eq!(new(compress), "Compression is not supported for this drive ");

    let backup = Backup::new(&graph, options(SyncMode::Full)).unwrap();
    let busy = "Node 't' is busy: block device is in use by block job: backup";
    assert_eq!(to("s", "t"), busy);
    assert_eq!(to("t", "small"), busy);
    assert_eq!(error_of(graph.remove("t")), busy);
    assert_eq!(error_of(graph.resize("t", 512)), busy);
    assert_eq!(error_of(graph.remove("s")), "Block device s is in use");
    let conflict = error_of(graph.resize("s", 512));
    assert!(conflict.contains("'resize' are both required by"), "{conflict}");
    assert_eq!(error_of(s.check_no_job()), busy.replace("'t'", "'s'"));
    drop(backup);
    assert!(error_of(graph.resize("t", 512)).ends_with("does not support resize"));
    graph.remove("t").unwrap();
    s.check_no_job().unwrap();
    assert!(!s.bitmaps().get("b").unwrap().info().busy);
}
