//! QEMU's image locks, against a process of QEMU that holds the image.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};

use block::Graph;

use crate::common::{Start as _, create, have_qemu_img, open, path, qemu_img};

/// A qemu-io that has the image open until it is dropped.
struct Holder {
    child: Child,
    input: Option<ChildStdin>,
}

impl Holder {
    fn start(image: &Path, read_only: bool) -> Self {
        let mut command = Command::new("qemu-io");
        if read_only {
            command.arg("-r");
        }
        let mut child = command
            .args(["-f", "qcow2", &path(image)])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .start()
            .unwrap();
        let mut input = child.stdin.take().unwrap();
        // Its answer tells that the image is open.
        writeln!(input, "length").unwrap();
        input.flush().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        while !line.contains("MiB") {
            line.clear();
            assert!(output.read_line(&mut line).unwrap() > 0, "qemu-io ended");
        }
        Self { child, input: Some(input) }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.input.take();
        self.child.wait().unwrap();
    }
}

fn add(image: &Path, more: &str) -> block::Result<()> {
    let graph = Graph::new();
    let file = format!("file.driver=file,file.filename={}", image.display());
    graph.add_text(&format!("driver=qcow2,node-name=d,{file}{more}")).map(|_| ())
}

#[test]
fn an_image_that_qemu_writes_is_refused_and_one_that_it_reads_is_shared_for_reading() {
    if !have_qemu_img("locks") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "1M", "");
    let holder = Holder::start(&image, false);
    let error = add(&image, "").unwrap_err().to_string();
    assert!(error.starts_with("Failed to get \"write\" lock"), "{error}");
    assert!(error.contains("another process using the image"), "{error}");
    let error = add(&image, ",read-only=on").unwrap_err().to_string();
    assert!(error.starts_with("Failed to get shared \"write\" lock"), "{error}");
    add(&image, ",read-only=on,force-share=on").unwrap();
    drop(holder);
    let holder = Holder::start(&image, true);
    assert!(add(&image, "").is_err());
    add(&image, ",read-only=on").unwrap();
    drop(holder);
    add(&image, "").unwrap();
}

#[test]
fn qemu_is_refused_an_image_that_we_write() {
    if !have_qemu_img("locks") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "1M", "");
    let (graph, node) = open(&image);
    let output = Command::new("qemu-img").args(["info", &path(&image)]).run().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.contains("lock"), "{text}");
    qemu_img(&["info", "-U", &path(&image)]);
    let error = add(&image, "").unwrap_err().to_string();
    assert!(error.contains("lock"), "a second opening by ourselves: {error}");
    drop((graph, node));
    qemu_img(&["info", &path(&image)]);
}

#[test]
fn overlays_share_a_base_and_nobody_may_write_it() {
    if !have_qemu_img("shared base") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let base = create(dir.path(), "base.qcow2", "1M", "");
    let overlay =
        |name| create(dir.path(), name, "1M", "backing_file=base.qcow2,backing_fmt=qcow2");
    let (a, b) = (overlay("a.qcow2"), overlay("b.qcow2"));
    let _first = open(&a);
    let _second = open(&b);
    let error = add(&base, "").unwrap_err().to_string();
    assert!(error.contains("lock"), "{error}");
}

#[test]
fn a_reopen_takes_and_gives_up_locks_that_qemu_sees() {
    if !have_qemu_img("locks of a reopen") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "1M", "");
    let options = |read_only: bool| {
        serde_json::json!({
            "driver": "qcow2", "node-name": "d", "read-only": read_only,
            "file": {"driver": "file", "filename": path(&image)},
        })
    };
    let graph = Graph::new();
    let node = graph.add(&options(true)).unwrap();
    let reader = Holder::start(&image, true);
    let error = graph.reopen(&[options(false)]).unwrap_err().to_string();
    assert!(error.starts_with("Failed to get \"write\" lock"), "{error}");
    assert!(node.read_only());
    // What the attempt locked was given up again: another reader may still come.
    drop(Holder::start(&image, true));
    drop(reader);
    graph.reopen(&[options(false)]).unwrap();
    let output = Command::new("qemu-img").args(["info", &path(&image)]).run().unwrap();
    assert!(!output.status.success(), "QEMU reads an image that is being written");
    graph.reopen(&[options(true)]).unwrap();
    qemu_img(&["info", &path(&image)]);
    drop(Holder::start(&image, true));
    let output = Command::new("qemu-io").args(["-f", "qcow2", "-c", "length", &path(&image)]).run();
    let said = String::from_utf8_lossy(&output.unwrap().stderr).into_owned();
    assert!(said.contains("lock"), "QEMU writes an image that is being read: {said}");
}

#[test]
fn a_raw_node_locks_its_file_only_while_it_is_used() {
    if !have_qemu_img("locks of a raw node") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a.raw");
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let graph = Graph::new();
    graph
        .add_text(&format!(
            "driver=raw,node-name=r,file.driver=file,file.filename={}",
            path(&image)
        ))
        .unwrap();
    let writes = || {
        let args = ["-f", "raw", "-c", "write 0 512", &path(&image)];
        Command::new("qemu-io").args(args).run().unwrap().status.success()
    };
    assert!(writes(), "nobody uses the node");
    let user = graph.attach("r", block::User::device("vda", true, false)).unwrap();
    assert!(!writes(), "two writers");
    drop(user);
    assert!(writes(), "the use has ended");
    let export = graph.attach_export("r", false).unwrap();
    assert!(writes(), "an export lets others write, as in QEMU");
    drop(export);
}
