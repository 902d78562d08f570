//! Images we make, judged by qemu-img and beside its own.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use block::jobs::{Control, Create, Operation as _};
use block::qcow2::create::{CreateOptions, create};
use block::{FileCreateOptions, FileHints, Preallocation, Progress, create_file, create_raw};
use serde_json::{Value, json};

use crate::common::{Start as _, check, have_qemu_img, path, qemu_img, qemu_io, read_all};

/// Makes an image from members of QAPI's BlockdevCreateOptionsQcow2.
fn make(at: &Path, mut options: Value) -> block::Result<()> {
    let data = options.as_object_mut().unwrap().remove("data-file");
    let options: CreateOptions = serde_json::from_value(options).unwrap();
    let file = create_file(at, FileHints::default())?;
    let data = match data {
        Some(name) => Some(create_file(name.as_str().unwrap(), FileHints::default())?),
        None => None,
    };
    let data = data.as_ref().map(|d| d as &dyn block::storage::Storage);
    create(&file, data, &options, &Progress::default())
}

/// What `qemu-img info` tells, but for what differs between any two files.
fn info(image: &Path) -> Value {
    let text = qemu_img(&["info", "--output=json", &path(image)]);
    let mut info: Value = serde_json::from_str(&text).unwrap();
    let members = info.as_object_mut().unwrap();
    for name in ["filename", "actual-size", "children", "full-backing-filename"] {
        members.remove(name);
    }
    info
}

/// The option of qemu-img for a member.
fn qemu_option(name: &str, value: &Value) -> String {
    let text = match value {
        Value::Bool(on) => (if *on { "on" } else { "off" }).to_owned(),
        Value::String(text) if text == "v2" => "0.10".to_owned(),
        Value::String(text) if text == "v3" => "1.1".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let name = if name == "version" { "compat".to_owned() } else { name.replace('-', "_") };
    format!("{name}={text}")
}

/// Where an image of ours and one of QEMU's go, beside a backing file.
struct Pair {
    dir: tempfile::TempDir,
    ours: PathBuf,
    theirs: PathBuf,
    base: PathBuf,
}

impl Pair {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let (ours, theirs, base) = (at("ours.qcow2"), at("theirs.qcow2"), at("base.raw"));
        std::fs::write(&base, vec![7; 1 << 20]).unwrap();
        Self { dir, ours, theirs, base }
    }

    /// Has qemu-img make its own.
    fn make_theirs(&self, case: &Value) -> Output {
        let members = case.as_object().unwrap().iter();
        let options: Vec<_> = members.map(|(name, value)| qemu_option(name, value)).collect();
        Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-o", &options.join(","), &path(&self.theirs)])
            .run()
            .unwrap()
    }
}

#[test]
fn an_image_is_not_its_own_data_file() {
    let dir = tempfile::tempdir().unwrap();
    let (file, data) = (dir.path().join("file"), dir.path().join("data"));
    let graph = std::sync::Arc::new(block::Graph::new());
    let link = dir.path().join("link");
    std::fs::write(&file, "what was there").unwrap();
    std::fs::write(&data, "what was there").unwrap();
    std::fs::hard_link(&file, &link).unwrap();
    for (name, path) in [("f", &file), ("d", &data), ("again", &file), ("link", &link)] {
        graph.add(&json!({"driver": "file", "node-name": name, "filename": path})).unwrap();
    }
    let run = |options: Value| {
        let mut operation = Create::new(&graph, options.as_object().unwrap().clone()).unwrap();
        operation.run(&Control::default()).map_err(|error| error.to_string())
    };
    let options =
        |data: &str| json!({"driver": "qcow2", "size": 1 << 20, "file": "f", "data-file": data});
    for same in ["f", "again", "link"] {
        let error = run(options(same)).unwrap_err();
        assert_eq!(error, "'file' and 'data-file' of an image have to be two files", "{same}");
        assert_eq!(std::fs::read(&file).unwrap(), b"what was there");
    }
    run(options("d")).unwrap();
}

#[test]
fn images_of_every_option_are_clean_and_like_qemus_own() {
    if !have_qemu_img("create") {
        return;
    }
    let pair = Pair::new();
    let Pair { dir, ours, theirs, base } = &pair;
    let data = path(&dir.path().join("data.raw"));
    let cases = [
        json!({"size": 0}),
        json!({"size": 1 << 20}),
        json!({"size": 512}),
        json!({"size": 1u64 << 40}),
        json!({"size": 33 << 20, "version": "v2"}),
        json!({"size": 33 << 20, "version": "v2", "cluster-size": 512}),
        json!({"size": 33 << 20, "cluster-size": 512}),
        json!({"size": 33 << 20, "cluster-size": 2 << 20}),
        json!({"size": 33 << 20, "extended-l2": true}),
        json!({"size": 33 << 20, "extended-l2": true, "cluster-size": 16384}),
        json!({"size": 3 << 20, "refcount-bits": 1}),
        json!({"size": 3 << 20, "refcount-bits": 2, "preallocation": "metadata"}),
        json!({"size": 3 << 20, "refcount-bits": 64, "preallocation": "metadata"}),
        json!({"size": 3 << 20, "lazy-refcounts": true, "compression-type": "zstd"}),
        json!({"size": 1 << 30, "preallocation": "metadata"}),
        json!({"size": 5 << 20, "preallocation": "metadata", "cluster-size": 512}),
        json!({"size": 3 << 20, "preallocation": "metadata", "extended-l2": true}),
        json!({"size": 3 << 20, "preallocation": "metadata", "version": "v2"}),
        json!({"size": 3_000_320, "preallocation": "falloc"}),
        json!({"size": 3_000_320, "preallocation": "full"}),
        json!({"size": 1 << 20, "backing-file": path(base), "backing-fmt": "raw"}),
        json!({"size": 2 << 20, "backing-file": path(base), "backing-fmt": "raw", "version": "v2"}),
        json!({"size": 1 << 20, "backing-file": path(base), "backing-fmt": "raw",
               "extended-l2": true, "preallocation": "metadata"}),
        json!({"size": 3 << 20, "data-file": data}),
        json!({"size": 3 << 20, "data-file": data, "data-file-raw": true}),
        json!({"size": 3 << 20, "data-file": data, "preallocation": "metadata"}),
        json!({"size": 3 << 20, "data-file": data, "preallocation": "full"}),
    ];
    for case in cases {
        let made = pair.make_theirs(&case);
        assert!(made.status.success(), "{case}: {made:?}");
        let wanted = info(theirs);
        make(ours, case.clone()).unwrap_or_else(|e| panic!("{case}: {e}"));
        assert_eq!(info(ours), wanted, "{case}");
        check(ours);
        let found = crate::check::our_check(ours).unwrap();
        assert!(found.is_clean(), "{case}: {found:?}");
        let checked = |image: &Path| {
            let (_, counts, _) = crate::check::qemu_check(image, &[]);
            let counts = counts.unwrap();
            (counts["total-clusters"].clone(), counts["allocated-clusters"].clone())
        };
        assert_eq!(checked(ours), checked(theirs), "{case}");
        if case["size"].as_u64().unwrap() <= 1 << 30 {
            qemu_img(&["compare", &path(ours), &path(theirs)]);
        }
        if case["size"].as_u64().unwrap() > 1 << 19 {
            qemu_io(ours, &["write -P 5 300k 200k", "read -P 5 300k 200k"]);
            check(ours);
        }
    }
}

#[test]
fn options_that_do_not_fit_are_refused_with_qemus_texts() {
    if !have_qemu_img("create") {
        return;
    }
    let pair = Pair::new();
    let Pair { dir, ours, base, .. } = &pair;
    let data = path(&dir.path().join("data.raw"));
    let cases = [
        json!({"size": 1 << 20, "cluster-size": 300}),
        json!({"size": 1 << 20, "cluster-size": 4 << 20}),
        json!({"size": 1 << 20, "refcount-bits": 3}),
        json!({"size": 1 << 20, "refcount-bits": 128}),
        json!({"size": 1 << 20, "refcount-bits": 8, "version": "v2"}),
        json!({"size": 1 << 20, "lazy-refcounts": true, "version": "v2"}),
        json!({"size": 1 << 20, "extended-l2": true, "version": "v2"}),
        json!({"size": 1 << 20, "extended-l2": true, "cluster-size": 8192}),
        json!({"size": 1 << 20, "compression-type": "zstd", "version": "v2"}),
        json!({"size": 1 << 20, "data-file-raw": true}),
        json!({"size": 1 << 20, "data-file": data, "version": "v2"}),
        json!({"size": 1 << 20, "data-file": data, "data-file-raw": true,
               "backing-file": path(base), "backing-fmt": "raw"}),
        json!({"size": 1 << 20, "preallocation": "metadata",
               "backing-file": path(base), "backing-fmt": "raw"}),
        json!({"size": 1 << 20, "backing-fmt": "raw"}),
        json!({"size": 3u64 << 40, "cluster-size": 512}),
    ];
    for case in cases {
        let output = pair.make_theirs(&case);
        let text = String::from_utf8(output.stderr).unwrap();
        let error = make(ours, case.clone()).unwrap_err().to_string();
        assert!(text.contains(&error), "{case}: ours: {error}\nQEMU: {text}");
    }
    let error = make(ours, json!({"size": 512, "encrypt": {"format": "luks"}})).unwrap_err();
    assert!(error.to_string().contains("Encryption"), "{error}");
}

#[test]
fn a_file_whose_making_was_cut_off_is_no_image() {
    use block::storage::memory::MemoryStorage;
    let options: CreateOptions = serde_json::from_value(
        json!({"size": 3 << 20, "cluster-size": 4096, "preallocation": "metadata"}),
    )
    .unwrap();
    let progress = Progress::default();
    let whole = MemoryStorage::default();
    create(&whole, None, &options, &progress).unwrap();
    let changes = whole.changes();
    for cut in 0..changes {
        let storage = MemoryStorage::default();
        storage.fail_after(Some(cut), false);
        create(&storage, None, &options, &progress).unwrap_err();
        // All writes but the last two, the header and its flush, leave no magic.
        if cut < changes - 2 {
            assert!(!storage.bytes().starts_with(b"QFI"), "cut {cut}");
        }
        assert!(!storage.flushed_bytes().starts_with(b"QFI"), "cut {cut}");
    }
    let image = block::qcow2::check::check(&whole, &Default::default()).unwrap();
    assert!(image.is_clean() && image.allocated_clusters == 768, "{image:?}");
    create(&whole, None, &options, &progress).unwrap_err();
}

#[test]
fn raw_files_have_their_size_and_space() {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let file = dir.path().join("disk.raw");
    let mut options = FileCreateOptions {
        filename: path(&file),
        size: 3 << 20,
        nocow: Some(true),
        // Where the file system has no such thing the file is made all the same.
        extent_size_hint: Some(1 << 20),
        ..FileCreateOptions::default()
    };
    for (mode, allocated) in
        [(Preallocation::Off, false), (Preallocation::Falloc, true), (Preallocation::Full, true)]
    {
        options.preallocation = Some(mode);
        let storage = create_raw(&options, &Progress::default()).unwrap();
        let meta = std::fs::metadata(&file).unwrap();
        assert_eq!(meta.len(), 3 << 20);
        assert_eq!(meta.blocks() * 512 >= 3 << 20, allocated, "{mode:?}");
        let raw = block::raw::Raw::open(std::sync::Arc::new(storage), true).unwrap();
        assert!(read_all(&raw).iter().all(|b| *b == 0));
    }
    options.extent_size_hint = Some(1 << 32);
    let error = create_raw(&options, &Progress::default()).unwrap_err().to_string();
    assert_eq!(error, "Extent size hint is too large");
    options.extent_size_hint = None;
    options.preallocation = Some(Preallocation::Metadata);
    create_raw(&options, &Progress::default()).unwrap_err();
    options.filename = path(&dir.path().join("none/disk.raw"));
    options.preallocation = None;
    let error = create_raw(&options, &Progress::default()).unwrap_err().to_string();
    assert!(error.ends_with("disk.raw': No such file or directory"), "{error}");
}
