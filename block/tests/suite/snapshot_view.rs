//! A disk shown as it was at a snapshot, and VM state found in the image's file.

use std::os::unix::fs::FileExt;

use block::{Graph, ReadBuf, WriteBuf};
use serde_json::{Value, json};

use crate::common::{self, create, have_qemu_img, land, new_snapshot, open, path, save};

const MIB: usize = 1 << 20;

fn options(image: &std::path::Path, more: &Value) -> Value {
    let mut options = json!({
        "driver": "qcow2", "node-name": "view", "read-only": true,
        "file": { "driver": "file", "filename": path(image) },
    });
    options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    options
}

fn read(node: &block::Node, offset: u64) -> u8 {
    let mut bytes = vec![0xa5; 4096];
    node.read(offset, &[ReadBuf::new(&mut bytes)]).unwrap();
    assert!(bytes.iter().all(|byte| *byte == bytes[0]));
    bytes[0]
}

#[test]
fn a_disk_is_shown_as_it_was_at_each_snapshot_with_its_size_then() {
    if !have_qemu_img("views") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "4M", "");
    {
        let (_graph, node) = open(&image);
        common::write(&*node.format(), 0, &vec![1; MIB]);
        save(&*node.format(), "one");
        common::write(&*node.format(), 0, &vec![2; MIB / 2]);
        node.resize(8 << 20, block::Preallocation::Off, &block::Progress::default()).unwrap();
        common::write(&*node.format(), 6 << 20, &[3; 4096]);
        save(&*node.format(), "two");
        common::write(&*node.format(), 0, &vec![4; MIB]);
    }
    let before = std::fs::read(&image).unwrap();
    let graphs: Vec<_> = ["1", "2"]
        .map(|id| {
            // Both at once, as two processes would.
            let graph = Graph::new();
            let node = graph.add(&options(&image, &json!({ "x-snapshot-id": id }))).unwrap();
            (graph, node)
        })
        .into();
    let (one, two) = (&graphs[0].1, &graphs[1].1);
    assert_eq!((one.size(), two.size()), (4 << 20, 8 << 20));
    assert_eq!((read(one, 0), read(one, 3 * MIB as u64 / 4), read(one, 2 << 20)), (1, 1, 0));
    assert_eq!((read(two, 0), read(two, 3 * MIB as u64 / 4), read(two, 6 << 20)), (2, 1, 3));
    assert_eq!(one.snapshots().len(), 2, "they are all still listed");
    assert!(one.write(0, &[WriteBuf::new(&[9; 512])]).is_err());
    drop(graphs);
    assert!(std::fs::read(&image).unwrap() == before, "a view changes nothing");
}

#[test]
fn an_overlay_over_a_view_has_its_writes_and_the_snapshots_rest() {
    if !have_qemu_img("overlay on view") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "4M", "");
    {
        let (_graph, node) = open(&image);
        common::write(&*node.format(), 0, &vec![1; MIB]);
        save(&*node.format(), "one");
        common::write(&*node.format(), 0, &vec![2; MIB]);
    }
    let overlay = create(dir.path(), "overlay.qcow2", "4M", "");
    let graph = Graph::new();
    let below = options(&image, &json!({ "x-snapshot-id": "1" }));
    let top = json!({
        "driver": "qcow2", "node-name": "top", "backing": below,
        "file": { "driver": "file", "filename": path(&overlay) },
    });
    let node = graph.add(&top).unwrap();
    // A part of a cluster: the rest of it is copied up.
    node.write(4096, &[WriteBuf::new(&[7; 4096])]).unwrap();
    assert_eq!((read(&node, 0), read(&node, 4096), read(&node, 8192)), (1, 7, 1));
    save(&*node.format(), "in the overlay");
    assert_eq!(node.backing().unwrap().snapshots()[0].tag, "one");
}

#[test]
fn a_view_that_is_writable_or_of_no_snapshot_is_refused() {
    if !have_qemu_img("view refusals") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "4M", "");
    save(&*open(&image).1.format(), "one");
    let refused = |more: Value| Graph::new().add(&options(&image, &more)).unwrap_err().to_string();
    let error = refused(json!({ "x-snapshot-id": "1", "read-only": false }));
    assert!(error.contains("'x-snapshot-id'") && error.contains("read-only=on"), "{error}");
    // A tag is no id.
    let error = refused(json!({ "x-snapshot-id": "one" }));
    assert!(error.contains("one"), "{error}");
    let error = refused(json!({ "x-snapshot-id": 1 }));
    assert_eq!(error, "Invalid parameter type for 'x-snapshot-id', expected: string");
}

#[test]
fn places_are_where_the_file_has_what_reads_give() {
    if !have_qemu_img("places") {
        return;
    }
    for cluster in ["512", "64k", "2M"] {
        let dir = tempfile::tempdir().unwrap();
        let image = create(dir.path(), "a.qcow2", "4M", &format!("cluster_size={cluster}"));
        let (_graph, node) = open(&image);
        let format = node.format();
        let size = 4 * MIB as u64;
        let mut change = format.create_snapshot(&new_snapshot("vm")).unwrap();
        let state: Vec<u8> = (0..=250).cycle().take(2 * MIB).collect();
        change.write_vmstate(size, &[WriteBuf::new(&state)]).unwrap();
        change.set_vmstate_size(4 * size);
        land(&mut *change).unwrap();
        drop(change);
        let read = format.open_vmstate("1").unwrap();
        let places = read.places(0, 4 * size).unwrap();
        assert_eq!(places.iter().map(|p| p.len).sum::<u64>(), 2 * MIB as u64, "zeroes have none");
        let file = std::fs::File::open(&image).unwrap();
        for place in places {
            assert!((size..size + 2 * MIB as u64).contains(&place.offset));
            let start = usize::try_from(place.offset - size).unwrap();
            let mut bytes = vec![0; usize::try_from(place.len).unwrap()];
            file.read_exact_at(&mut bytes, place.host).unwrap();
            assert!(bytes == state[start..start + bytes.len()], "{cluster} {place:?}");
        }
    }
}

#[test]
fn a_view_with_a_date_is_of_that_snapshot_alone_whoever_has_its_id_now() {
    if !have_qemu_img("views with a date") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "4M", "");
    let date = {
        let (_graph, node) = open(&image);
        save(&*node.format(), "one");
        node.snapshots()[0].date_text()
    };
    let view = |date: &str| {
        let more = json!({ "x-snapshot-id": "1", "x-snapshot-date": date });
        Graph::new().add(&options(&image, &more)).map(drop)
    };
    view(&date).unwrap();
    common::qemu_img(&["snapshot", "-d", "one", &path(&image)]);
    common::qemu_img(&["snapshot", "-c", "other", &path(&image)]);
    let error = view(&date).unwrap_err().to_string();
    let wanted =
        format!("the snapshot of {date} that had id '1' was deleted; it is the id of 'other'");
    assert!(error.contains(&wanted), "{error}");
}
