//! What is refused.

use super::*;

#[test]
fn what_cannot_be_mirrored_is_refused_and_leaves_everything_as_it_was() {
    let graph = Graph::new();
    Hooked::add(&graph, "s", vec![1; MIB as usize]);
    Hooked::add(&graph, "t", vec![0; MIB as usize]);
    Hooked::add(&graph, "small", vec![0; 65536]);
    let new = |options: MirrorOptions| error_of(Mirror::new(&graph, options));
    let to = |source: &str, target: &str| new(MirrorOptions::new(source, target, SyncMode::Full));
    assert_eq!(to("s", "s"), "Can't mirror node into itself");
    assert_eq!(to("x", "t"), "Cannot find device='x' nor node-name='x'");
    assert_eq!(new(options(SyncMode::Incremental)), "Sync mode 'incremental' not supported");
    let granularity =
        |bytes| new(MirrorOptions { granularity: Some(bytes), ..options(SyncMode::Full) });
    let range = "Parameter 'granularity' expects a value in range [512B, 64MB]";
    assert_eq!((granularity(256).as_str(), granularity(128 << 20).as_str()), (range, range));
    assert_eq!(granularity(1000), "Parameter 'granularity' expects a power of 2");
    let buf_size = MirrorOptions { buf_size: -1, ..options(SyncMode::Full) };
    assert_eq!(new(buf_size), "Invalid parameter 'buf-size'");
    let replaces = |name: &str| {
        new(MirrorOptions { replaces: Some(name.to_owned()), ..options(SyncMode::Full) })
    };
    assert_eq!(replaces("x"), "Failed to find node with node-name='x'");
    assert!(replaces("small").starts_with("Cannot replace 'small' by a node mirrored from 's'"));
    // Other sizes are found out by the job, as in QEMU.
    let mut mirror = Mirror::new(&graph, MirrorOptions::new("s", "small", SyncMode::Full)).unwrap();
    let error = finish(&mut mirror, &Control::default()).unwrap_err().to_string();
    assert_eq!(error, "Source and target image have different sizes");
    drop(mirror);

    let mirror = Mirror::new(&graph, options(SyncMode::Full)).unwrap();
    assert_eq!(to("s", "small"), "Need a root block node");
    let busy = "Node 't' is busy: block device is in use by block job: mirror";
    assert_eq!(to("small", "t"), busy);
    assert_eq!(to("t", "small"), "Need a root block node");
    assert_eq!(error_of(graph.remove("s")), busy.replace("'t'", "'s'"));
    assert_eq!(error_of(graph.remove("t")), "Node t is in use");
    let export = error_of(graph.attach_export("t", false).map(drop));
    assert!(export.contains("'consistent read' are both required by"), "{export}");
    drop(mirror);
    drop(graph.attach_export("t", true).unwrap());
    graph.remove("t").unwrap();
}

#[test]
fn what_another_image_is_over_is_no_target() {
    if !have_qemu_img("mirror below an overlay") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let base = base(dir.path());
    let overlay = over(&base, "o.qcow2", "");
    let graph = Graph::new();
    let size = std::fs::metadata(raw(dir.path(), "s.raw")).unwrap().len();
    add(&graph, "s", &dir.path().join("s.raw"), &json!({}));
    let below = add(&graph, "t", &base, &json!({}));
    assert_eq!(below.size(), size);
    let expected = contents(&below);
    drop(below);
    // Nobody uses it: no permission keeps the job off.
    let above = add(&graph, "o", &overlay, &json!({"backing": "t"}));
    let error = error_of(Mirror::new(&graph, options(SyncMode::Full)));
    assert_eq!(error, "Node 't' is busy: node is used as backing hd of 'o'");
    assert!(contents(&above) == expected);
}
