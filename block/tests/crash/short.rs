//! A real host that writes a part: the limit of a file's size lies within a write. The kernel writes
//! up to the limit, says how much that was, and fails the rest.

use std::path::Path;
use std::process::Command;

use block::qcow2::check;
use block::storage::FileStorage;
use block::{Graph, WriteBuf};

use crate::common::{self, create, have_qemu_img};
use crate::unlocked;

const IMAGE: &str = "CRASH_LIMITED_IMAGE";
const CLUSTER: usize = 65536;
/// The limit, in units of 512 bytes: within the 11th cluster, off any page.
const LIMIT: usize = 10 * 128 + 77;

fn node(image: &Path) -> (Graph, std::sync::Arc<block::Node>) {
    let graph = Graph::new();
    let file = format!("file.driver=file,file.filename={}", image.display());
    let node = graph.add_text(&format!("driver=qcow2,node-name=d,{file}")).unwrap();
    (graph, node)
}

/// Runs under the limit. Not a test by itself: the parent runs it.
#[test]
#[ignore = "the process that the test of short writes limits"]
fn limited() {
    let Some(image) = std::env::var_os(IMAGE) else { return };
    let (_graph, node) = node(Path::new(&image));
    let written = node.write(0, &[WriteBuf::new(&[1; 12 * CLUSTER])]);
    let error = written.expect_err("a write past the limit").to_string();
    assert!(error.contains("write at offset") && error.contains("File too large"), "{error}");
    assert!(common::read(&*node.format(), 0, 12 * CLUSTER).iter().all(|b| *b == 0), "mapped");
    // What fits goes on, in the clusters that were given back.
    node.write(CLUSTER as u64, &[WriteBuf::new(&[2; CLUSTER])]).unwrap();
    node.flush().unwrap();
    println!("\ndone");
}

#[test]
fn a_write_of_which_the_host_writes_a_part_fails_and_gives_its_clusters_back() {
    if !have_qemu_img("short writes") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "2M", "");
    let me = std::env::current_exe().unwrap();
    // The signal that comes with the error is ignored, also by what is executed.
    let script = format!(
        "trap '' XFSZ; ulimit -f {LIMIT}; \
         exec '{}' --exact short::limited --ignored --nocapture --test-threads=1",
        me.display()
    );
    let output = Command::new("sh").args(["-c", &script]).env(IMAGE, &image).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("\ndone\n"), "{text}{errors}");
    let storage = FileStorage::open(&image, unlocked()).unwrap();
    assert!(check::check(&storage, &check::Options::default()).unwrap().is_clean());
    drop(storage);
    common::check(&image);
    let (_graph, node) = node(&image);
    let disk = common::read_all(&*node.format());
    assert!(disk[..CLUSTER].iter().all(|b| *b == 0));
    assert!(disk[CLUSTER..2 * CLUSTER].iter().all(|b| *b == 2));
    assert!(disk[2 * CLUSTER..].iter().all(|b| *b == 0));
}
