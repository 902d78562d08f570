//! blockdev-reopen and the commands of bitmaps: with any call failed the graph, what it shows and what is in the
//! files are as before, and a second try succeeds.

use std::collections::BTreeMap;

use block::bitmap::NewBitmap;
use block::{Graph, Result};
use serde_json::{Value, json};

use crate::calls::{Call, Fault, Kind, with_fault};
use crate::images::{Copy, Images, disk, qcow2, write};

/// A graph in which node "top" is over "one", and "two" is there too.
struct Operation {
    name: &'static str,
    /// Whether "top" is read-only before.
    read_only: bool,
    run: fn(&Copy, &Graph) -> Result<()>,
}

fn top(images: &Copy, more: &Value) -> Value {
    qcow2("top", &images.at("top.qcow2"), more)
}

fn reopen(images: &Copy, graph: &Graph, more: &Value) -> Result<()> {
    graph.reopen(&[top(images, more)])
}

fn bitmap(name: &str) -> NewBitmap<'_> {
    NewBitmap { name, granularity: Some(8192), persistent: true, disabled: false }
}

const OPERATIONS: &[Operation] = &[
    Operation {
        name: "read-only to writable",
        read_only: true,
        run: |images, graph| reopen(images, graph, &json!({"backing": "one"})),
    },
    Operation {
        name: "writable to read-only",
        read_only: false,
        run: |images, graph| reopen(images, graph, &json!({"backing": "one", "read-only": true})),
    },
    Operation {
        name: "another backing file",
        read_only: false,
        run: |images, graph| reopen(images, graph, &json!({"backing": "two"})),
    },
    Operation {
        name: "no backing file, past the page cache",
        read_only: false,
        run: |images, graph| {
            reopen(images, graph, &json!({"backing": null, "cache": {"direct": true}}))
        },
    },
    Operation {
        name: "two nodes at once",
        read_only: true,
        run: |images, graph| {
            let two = qcow2("two", &images.at("two.qcow2"), &json!({"read-only": true}));
            graph.reopen(&[two, top(images, &json!({"backing": "two"}))])
        },
    },
    Operation {
        name: "a writable backing file read-only again",
        read_only: false,
        run: |_, graph| graph.set_read_only("one", false),
    },
    Operation {
        name: "bitmap-add, stored",
        read_only: false,
        run: |_, graph| {
            let node = graph.get("top").unwrap();
            if node.bitmaps().get("new").is_err() {
                node.add_bitmap(&bitmap("new"))?;
            }
            drop(node);
            graph.remove("top")
        },
    },
    Operation {
        name: "bitmap-remove",
        read_only: false,
        run: |_, graph| graph.get("top").unwrap().remove_bitmap("follows"),
    },
    Operation {
        name: "bitmap-remove of one that rests",
        read_only: false,
        run: |_, graph| graph.get("top").unwrap().remove_bitmap("rests"),
    },
    Operation {
        name: "bitmap-clear",
        read_only: false,
        run: |_, graph| graph.get("top").unwrap().clear_bitmap("rests"),
    },
    Operation {
        name: "bitmap-enable",
        read_only: false,
        run: |_, graph| graph.get("top").unwrap().enable_bitmap("rests", true),
    },
    Operation {
        name: "bitmap-merge",
        read_only: false,
        run: |_, graph| {
            let node = graph.get("top").unwrap();
            let source = node.bitmaps().get("follows")?;
            node.merge_bitmaps("rests", &[source])
        },
    },
];

fn open(images: &Copy, read_only: bool) -> Graph {
    let graph = Graph::new();
    let below = json!({"read-only": true});
    graph.add(&qcow2("one", &images.at("one.qcow2"), &below)).unwrap();
    graph.add(&qcow2("two", &images.at("two.qcow2"), &json!({}))).unwrap();
    graph.add(&top(images, &json!({"backing": "one", "read-only": read_only}))).unwrap();
    graph
}

/// What the graph tells of its nodes, and what is on their disks. Not how much space they take.
#[derive(Debug, PartialEq)]
struct Picture(BTreeMap<String, (Value, Vec<u8>)>);

fn picture(images: &Copy, graph: &Graph) -> Picture {
    let dir = images.at("").display().to_string();
    let of = |node: std::sync::Arc<block::Node>| {
        let info = serde_json::to_string(&node.info(true).unwrap()).unwrap();
        let mut info: Value = serde_json::from_str(&info.replace(&dir, "")).unwrap();
        let image = info["image"].as_object_mut().unwrap();
        image.remove("actual-size");
        if let Some(bitmaps) = info.get_mut("dirty-bitmaps") {
            // Stored once more, one is behind the others.
            bitmaps.as_array_mut().unwrap().sort_by_key(|bitmap| bitmap["name"].to_string());
        }
        let image = info["image"].as_object_mut().unwrap();
        // What is stored of bitmaps is seen when the images are closed: the node has them itself.
        if let Some(data) = image.get_mut("format-specific") {
            data["data"].as_object_mut().unwrap().remove("bitmaps");
        }
        // Of a file its length, which leaks change.
        if info["drv"] == "file" {
            info["image"].as_object_mut().unwrap().remove("virtual-size");
            return (node.name().to_owned(), (info, Vec::new()));
        }
        (node.name().to_owned(), (info, disk(&node)))
    };
    Picture(graph.list().into_iter().map(of).collect())
}

/// Closes all and looks at the files: what is there after a success, or as if nothing had been.
fn closed(images: &Copy, graph: &Graph, case: &str) -> Picture {
    for name in ["top", "two", "one"] {
        if graph.get(name).is_some() {
            graph.remove(name).unwrap_or_else(|e| panic!("{case}: {name}: {e}"));
        }
    }
    images.check(case);
    let graph = open(images, true);
    picture(images, &graph)
}

/// Writes to what is writable, and tells whether all of it works.
fn goes_on(graph: &Graph) -> Result<()> {
    for node in graph.list().iter().filter(|node| node.driver() == "qcow2" && !node.read_only()) {
        write(node, 200_000, 9)?;
        node.flush()?;
    }
    Ok(())
}

/// What is to be seen when nothing fails.
struct Wanted {
    before: Picture,
    after: Picture,
    closed_before: Picture,
    closed_after: Picture,
}

fn wanted(images: &Images, operation: &Operation) -> Wanted {
    let run = |does: bool| {
        let copy = images.copy();
        let graph = open(&copy, operation.read_only);
        if does {
            (operation.run)(&copy, &graph).unwrap();
        }
        let open = picture(&copy, &graph);
        goes_on(&graph).unwrap();
        (open, closed(&copy, &graph, operation.name))
    };
    let ((before, closed_before), (after, closed_after)) = (run(false), run(true));
    Wanted { before, after, closed_before, closed_after }
}

/// One operation with one fault; gives what it met.
fn try_one(
    images: &Images,
    operation: &Operation,
    wanted: &Wanted,
    fault: Fault,
    again: bool,
) -> Vec<Call> {
    let case = format!("{}, {fault:?}, tried again: {again}", operation.name);
    let copy = images.copy();
    let graph = open(&copy, operation.read_only);
    let (result, hits) = with_fault(fault, || (operation.run)(&copy, &graph));
    if hits.is_empty() || result.is_ok() {
        result.unwrap_or_else(|e| panic!("{case}: without a fault: {e}"));
        // The page cache need not have it, space need not be taken ahead or given back.
        let small =
            [Call::OpenDirect, Call::ReadCached, Call::Allocate, Call::Truncate, Call::Stat];
        // Where the clusters of a bitmap cannot be found out they are leaked: it can be removed all the same.
        let leaks = |hit: Call| hit == Call::Read && operation.name.starts_with("bitmap-remove");
        let unnoticed = hits.iter().find(|hit| !small.contains(hit) && !leaks(**hit));
        let short = fault.kind == Kind::Short;
        assert!(short || unnoticed.is_none(), "{case}: goes unnoticed: {hits:?}");
        assert!(picture(&copy, &graph) == wanted.after, "{case}: {hits:?}");
        goes_on(&graph).unwrap_or_else(|e| panic!("{case}: {e}"));
        assert!(closed(&copy, &graph, &case) == wanted.closed_after, "{case}: {hits:?}, closed");
        return hits;
    }
    let text = result.unwrap_err().to_string();
    if let Kind::Errno(errno) = fault.kind {
        let words = block::host_words(&std::io::Error::from_raw_os_error(errno));
        assert!(text.contains(&words) && text.contains(".qcow2'"), "{case}: {text}");
    }
    // Adding a bitmap is done when what fails is its being stored. A fault that lasts may keep the bitmaps from
    // being marked again, which the next write does, and nothing does after a failed flush: until then the node
    // says that it takes no writes.
    let stays = !fault.lasting && !hits.contains(&Call::Flush);
    if stays && graph.get("top").unwrap().bitmaps().get("new").is_err() {
        let now = picture(&copy, &graph);
        assert!(now == wanted.before, "{case}: {text}\n{:?}", differs(&now, &wanted.before));
    }
    if hits.contains(&Call::Flush) {
        // What the kernel may have dropped is lost: no later flush of that file is believed while a node has it.
        let again = (operation.run)(&copy, &graph).and_then(|()| goes_on(&graph));
        let Err(error) = again else { panic!("{case}: a flush is believed") };
        let text = error.to_string();
        assert!(text.contains("earlier flush failed"), "{case}: {text}");
        drop(graph);
        copy.check(&case);
        let seen = picture(&copy, &open(&copy, true)).0.remove("top").unwrap().1;
        let all = [&wanted.before, &wanted.closed_before, &wanted.after, &wanted.closed_after];
        assert!(all.iter().any(|wanted| wanted.0["top"].1 == seen), "{case}");
        return hits;
    }
    if again {
        (operation.run)(&copy, &graph).unwrap_or_else(|e| panic!("{case}: again: {e}"));
        assert!(picture(&copy, &graph) == wanted.after, "{case}: again");
        goes_on(&graph).unwrap_or_else(|e| panic!("{case}: {e}"));
        assert!(closed(&copy, &graph, &case) == wanted.closed_after, "{case}: closed");
        return hits;
    }
    goes_on(&graph).unwrap_or_else(|e| panic!("{case}: afterwards: {e}"));
    let left = closed(&copy, &graph, &case);
    if operation.name != "bitmap-add, stored" {
        let differs = differs(&left, &wanted.closed_before);
        assert!(left == wanted.closed_before, "{case}: closed\n{differs:?}");
    }
    hits
}

fn differs(now: &Picture, wanted: &Picture) -> Vec<(Value, Value)> {
    let pairs = now.0.iter().map(|(name, seen)| (seen, wanted.0.get(name)));
    pairs
        .filter(|(seen, wanted)| Some(*seen) != *wanted)
        .map(|(seen, wanted)| (seen.0.clone(), wanted.map(|w| w.0.clone()).unwrap_or_default()))
        .collect()
}

fn fail_everywhere(operations: &[Operation]) {
    let images = Images::make();
    let long = std::env::var_os("CRASH_POINTS").is_some();
    let (mut count, mut met) = (0, Vec::new());
    for operation in operations {
        let wanted = wanted(&images, operation);
        for (kind, lasting) in [
            (Kind::Errno(libc::EIO), false),
            (Kind::Errno(libc::EIO), true),
            (Kind::Errno(libc::ENOSPC), true),
            (Kind::Short, false),
        ] {
            // A fault that lasts differs from one that does not in a few places only.
            let every = if lasting && !long { 3 } else { 1 };
            for at in (0..).step_by(every) {
                let fault = Fault { at, kind, lasting };
                let hits = try_one(&images, operation, &wanted, fault, false);
                if hits.is_empty() {
                    break;
                }
                if kind != Kind::Short {
                    try_one(&images, operation, &wanted, fault, true);
                }
                count += 1;
                met.extend(hits);
            }
        }
    }
    for call in [Call::Open, Call::OpenDirect, Call::Read, Call::Write, Call::Flush, Call::Stat] {
        // Bitmaps are changed in files that are open.
        let opens = matches!(call, Call::Open | Call::OpenDirect);
        let reopens = operations[0].name.contains("writable");
        assert!(met.contains(&call) || (opens && !reopens), "{call:?} was never met");
    }
    println!("faults injected: {count} (calls of the host, {} operations)", operations.len());
}

#[test]
fn any_fault_of_a_reopen_leaves_the_nodes_as_they_were() {
    fail_everywhere(&OPERATIONS[..6]);
}

#[test]
fn any_fault_of_a_change_of_bitmaps_leaves_them_as_they_were() {
    fail_everywhere(&OPERATIONS[6..]);
}
