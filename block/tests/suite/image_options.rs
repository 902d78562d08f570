//! qcow2's own options of blockdev-add, through the graph.

use std::path::Path;

use block::{Graph, NodeInfo};
use serde_json::{Value, json};

use crate::common::{self, check, create, have_qemu_img, path, qemu_contents};

fn options(image: &Path, more: &Value) -> Value {
    let mut all = json!({
        "driver": "qcow2", "node-name": "d", "discard": "unmap",
        "file": {"driver": "file", "filename": path(image)},
    });
    let members = all.as_object_mut().unwrap();
    members.extend(more.as_object().unwrap().clone());
    all
}

fn info(graph: &Graph) -> NodeInfo {
    graph.get("d").unwrap().info(true).unwrap()
}

#[test]
fn a_data_file_is_found_by_the_image_or_given() {
    if !have_qemu_img("data-file") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data.raw");
    let image = create(dir.path(), "a.qcow2", "1M", &format!("data_file={}", path(&data)));
    let moved = dir.path().join("moved.raw");
    for (n, (more, at)) in [
        (json!({}), &data),
        (json!({"data-file": {"driver": "file", "filename": path(&moved)}}), &moved),
        (json!({"data-file": "other"}), &moved),
    ]
    .into_iter()
    .enumerate()
    {
        let n = u8::try_from(n + 1).unwrap();
        std::fs::copy(&data, &moved).ok();
        let graph = Graph::new();
        if more["data-file"].is_string() {
            graph
                .add(&json!({"driver": "file", "node-name": "other", "filename": path(&moved)}))
                .unwrap();
        }
        let node = graph.add(&options(&image, &more)).unwrap();
        node.write(0, &[block::WriteBuf::new(&[n; 65536])]).unwrap();
        node.flush().unwrap();
        let specific = info(&graph).image.format_specific.unwrap();
        assert_eq!(specific["data"]["data-file"], path(&data).as_str());
        assert_eq!(specific["data"]["data-file-raw"], false);
        assert!(std::fs::read(at).unwrap()[..65536] == [n; 65536], "{more}");
        if more["data-file"].is_string() {
            let error = graph.remove("other").unwrap_err().to_string();
            assert!(error.contains("in use"), "{error}");
        }
        drop(node);
        graph.remove("d").unwrap();
        let left: Vec<_> = graph.list().iter().map(|n| n.name().to_owned()).collect();
        assert_eq!(left.len(), usize::from(more["data-file"].is_string()), "{left:?}");
        drop(graph);
        check(&image);
    }
    let plain = create(dir.path(), "b.qcow2", "1M", "");
    let more = json!({"data-file": {"driver": "file", "filename": path(&moved)}});
    let error = Graph::new().add(&options(&plain, &more)).err().unwrap().to_string();
    assert_eq!(error, "'data-file' can only be set for images with an external data file");
}

#[test]
fn a_data_file_follows_its_image_when_that_is_reopened() {
    if !have_qemu_img("data-file, reopen") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data.raw");
    let image = create(dir.path(), "a.qcow2", "1M", &format!("data_file={}", path(&data)));
    let graph = Graph::new();
    graph.add(&options(&image, &json!({"read-only": true}))).unwrap();
    graph.reopen(&[options(&image, &json!({"read-only": false}))]).unwrap();
    let node = graph.get("d").unwrap();
    node.write(4096, &[block::WriteBuf::new(&[3; 4096])]).unwrap();
    graph.reopen(&[options(&image, &json!({"read-only": true}))]).unwrap();
    assert!(node.read_only());
    drop((node, graph));
    check(&image);
    assert!(qemu_contents(dir.path(), &image, None)[4096..8192] == [3; 4096]);
}

#[test]
fn a_reopened_image_with_lazy_refcounts_is_whole() {
    if !have_qemu_img("lazy, reopen") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "4M", "");
    let graph = Graph::new();
    let lazy = |on: bool| options(&image, &json!({"lazy-refcounts": on}));
    graph.add(&lazy(true)).unwrap();
    let node = graph.get("d").unwrap();
    for n in 1..6u8 {
        let at = u64::from(n) * 300_000;
        node.write(at, &[block::WriteBuf::new(&[n; 100_000])]).unwrap();
        node.flush().unwrap();
        if n < 5 {
            assert_eq!(std::fs::read(&image).unwrap()[79] & 1, n % 2, "{n}: the dirty bit");
        }
        graph.reopen(&[lazy(n % 2 == 0)]).unwrap();
        assert_eq!(std::fs::read(&image).unwrap()[79] & 1, 0, "{n}: closed");
    }
    drop((node, graph));
    check(&image);
    let disk = qemu_contents(dir.path(), &image, None);
    for n in 1..6u8 {
        assert!(disk[usize::from(n) * 300_000..][..100_000] == [n; 100_000], "{n}");
    }
}

#[test]
fn options_have_qemus_rules_and_texts() {
    if !have_qemu_img("image options") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "1M", "");
    let old = create(dir.path(), "b.qcow2", "1M", "compat=0.10");
    for (image, more, text) in [
        (
            &image,
            json!({"cache-size": 1, "l2-cache-size": 1, "refcount-cache-size": 1}),
            "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
        ),
        (
            &image,
            json!({"cache-size": 1, "l2-cache-size": 2}),
            "l2-cache-size may not exceed cache-size",
        ),
        (
            &image,
            json!({"l2-cache-entry-size": 1000}),
            "L2 cache entry size must be a power of two between 512 and the cluster size (65536)",
        ),
        (&old, json!({"lazy-refcounts": true}), "Lazy refcounts require a qcow2 image"),
        (&old, json!({"discard-no-unref": true}), "discard-no-unref is only supported since"),
        (&image, json!({"lazy-refcounts": 1}), "Invalid parameter type for 'lazy-refcounts'"),
        (&image, json!({"encrypt": {}}), "Parameter 'encrypt' is not supported"),
    ] {
        let error = Graph::new().add(&options(image, &more)).err().unwrap().to_string();
        assert!(error.starts_with(text), "{more}: {error}");
    }
    let all = json!({
        "cache-size": 1 << 20, "refcount-cache-size": 1 << 18, "cache-clean-interval": 1,
        "l2-cache-entry-size": 65536, "pass-discard-other": false, "pass-discard-snapshot": true,
        "pass-discard-request": true, "overlap-check": "all", "lazy-refcounts": true,
    });
    Graph::new().add(&options(&image, &all)).unwrap();
    Graph::new()
        .add_text(&format!(
            "driver=qcow2,node-name=d,l2-cache-size=1M,lazy-refcounts=on,file.driver=file,file.filename={}",
            path(&image)
        ))
        .unwrap();
}

#[test]
fn discarded_clusters_keep_their_place_if_told_and_lose_their_space() {
    if !have_qemu_img("discard-no-unref") {
        return;
    }
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().unwrap();
    for (kind, n) in [("", 65536usize), ("extended_l2=on", 2048)] {
        for pass in [true, false] {
            let image = create(dir.path(), "a.qcow2", "8M", kind);
            let graph = Graph::new();
            let more = json!({"discard-no-unref": true, "pass-discard-request": pass});
            let node = graph.add(&options(&image, &more)).unwrap();
            node.write(0, &[block::WriteBuf::new(&[7; 4 << 20])]).unwrap();
            node.flush().unwrap();
            let before = std::fs::metadata(&image).unwrap();
            node.discard(0, 2 << 20).unwrap();
            node.discard((2 << 20) + 65536, n as u64).unwrap();
            node.flush().unwrap();
            let after = std::fs::metadata(&image).unwrap();
            assert_eq!(after.len(), before.len());
            assert_eq!(after.blocks() + 4000 < before.blocks(), pass, "{kind}");
            // Writing again needs no new place.
            node.write(0, &[block::WriteBuf::new(&[8; 1 << 20])]).unwrap();
            node.flush().unwrap();
            assert_eq!(std::fs::metadata(&image).unwrap().len(), before.len());
            drop((node, graph));
            check(&image);
            let disk = qemu_contents(dir.path(), &image, None);
            assert!(disk[..1 << 20].iter().all(|b| *b == 8));
            assert!(disk[1 << 20..2 << 20].iter().all(|b| *b == 0));
            let part = (2 << 20) + 65536;
            assert!(disk[part..part + n].iter().all(|b| *b == 0) && disk[part + n] == 7);
        }
    }
}

#[test]
fn a_compress_node_packs_what_is_written_to_it() {
    if !have_qemu_img("compress node") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "4M", "compression_type=zstd");
    let graph = Graph::new();
    let mut below = options(&image, &json!({}));
    below.as_object_mut().unwrap().remove("discard");
    graph.add(&below).unwrap();
    let node = graph.add(&json!({"driver": "compress", "node-name": "c", "file": "d"})).unwrap();
    node.write(1000, &[block::WriteBuf::new(&[5; 2 << 20])]).unwrap();
    node.flush().unwrap();
    drop(node);
    let error = graph.remove("d").unwrap_err().to_string();
    assert!(error.contains("in use"), "{error}");
    graph.remove("c").unwrap();
    graph.remove("d").unwrap();
    drop(graph);
    check(&image);
    let output = common::qemu_img(&["check", &path(&image)]);
    assert!(output.contains("100.00% compressed clusters"), "{output}");
    assert!(qemu_contents(dir.path(), &image, None)[1000..1000 + (2 << 20)] == [5; 2 << 20]);
    let raw = dir.path().join("raw");
    std::fs::write(&raw, [0; 4096]).unwrap();
    let raw = json!({"driver": "raw", "file": {"driver": "file", "filename": path(&raw)}});
    let error = graph_error(&json!({"driver": "compress", "node-name": "c", "file": raw}));
    assert!(error.starts_with("Compression is not supported for this drive"), "{error}");
}

fn graph_error(options: &Value) -> String {
    Graph::new().add(options).err().unwrap().to_string()
}
