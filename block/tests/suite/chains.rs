//! block-stream, block-commit and change-backing-file: chains that get shorter under their users.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread;

use block::jobs::{
    Action, Commit, CommitOptions, Control, Notice, OnError, Operation, Stream, StreamOptions,
};
use block::{Attachment, Error, Graph, Link, Node, ReadBuf, User, WriteBuf};
use serde_json::{Value, json};

use crate::common::{self, Random, check, create, have_qemu_img, path, qemu_img, qemu_io};

const MIB: usize = 1 << 20;
const SIZE: usize = 5 * MIB;

/// A chain of images, the lowest first, each with something of its own, and what its top reads as.
struct Chain {
    dir: tempfile::TempDir,
    images: Vec<PathBuf>,
    contents: Vec<u8>,
}

/// The sizes of images in the middle are smaller and larger than those of others.
fn chain(layers: usize, options: &str) -> Chain {
    let dir = tempfile::tempdir().unwrap();
    let mut images: Vec<PathBuf> = Vec::new();
    for n in 0..layers {
        let size = match n {
            0 => 3 * MIB,
            1 => 4 * MIB,
            _ => SIZE,
        };
        let mut all = options.to_owned();
        if let Some(below) = images.last() {
            all += &format!(",backing_file={},backing_fmt=qcow2", path(below));
        }
        let name = format!("{n}.qcow2");
        let image = create(dir.path(), &name, &size.to_string(), all.trim_start_matches(','));
        // Data that only this layer has, that it has above others, and zeroes over data of others.
        let value = n + 1;
        let own = 100_000 + n * 250_000;
        qemu_io(
            &image,
            &[
                &format!("write -P {value} {own} 200000"),
                &format!("write -P {value} {} 70000", 2 * MIB + n * 30_000),
                &format!("write -z {} 65536", 2 * MIB + 400_000 + n * 20_000),
                &format!("write -P {value} {} 4096", size - 4096),
            ],
        );
        images.push(image);
    }
    let contents = common::qemu_contents(dir.path(), images.last().unwrap(), None);
    Chain { dir, images, contents }
}

impl Chain {
    fn top(&self) -> &Path {
        self.images.last().unwrap()
    }

    /// A graph with the images as nodes "n0", "n1", ..., all but the last read-only.
    fn open(&self) -> Graph {
        let graph = Graph::new();
        for (n, image) in self.images.iter().enumerate() {
            let mut options = json!({
                "driver": "qcow2", "node-name": format!("n{n}"), "discard": "unmap",
                "read-only": n + 1 != self.images.len(),
                "file": {"driver": "file", "filename": path(image)},
            });
            if n > 0 {
                options["backing"] = json!(format!("n{}", n - 1));
            }
            graph.add(&options).unwrap();
        }
        graph
    }

    /// What the images name as their backing files, from the top down.
    fn names(&self) -> Vec<PathBuf> {
        let chain =
            qemu_img(&["info", "-U", "--backing-chain", "--output", "json", &path(self.top())]);
        let chain: Vec<Value> = serde_json::from_str(&chain).unwrap();
        chain.iter().map(|image| PathBuf::from(image["filename"].as_str().unwrap())).collect()
    }

    /// With nobody using the images: the chain is that of these layers, and it reads as it should.
    fn closed_is(&self, layers: &[usize], contents: &[u8]) {
        let expected: Vec<_> = layers.iter().rev().map(|&n| self.images[n].clone()).collect();
        assert_eq!(self.names(), expected);
        for &layer in layers {
            check(&self.images[layer]);
        }
        assert!(common::qemu_contents(self.dir.path(), self.top(), None) == contents);
    }

    /// Copies of the images as they are on disk, which read as they should: a killed process leaves them.
    fn survives(&self, contents: &[u8]) {
        let copies = tempfile::tempdir().unwrap();
        for image in &self.images {
            std::fs::copy(image, copies.path().join(image.file_name().unwrap())).unwrap();
        }
        let copy = |image: &Path| copies.path().join(image.file_name().unwrap());
        let names = self.names();
        for pair in names.windows(2) {
            qemu_img(&[
                "rebase",
                "-u",
                "-b",
                &path(&copy(&pair[1])),
                "-F",
                "qcow2",
                &path(&copy(&pair[0])),
            ]);
        }
        for name in &names {
            common::check_leaks_only(&copy(name));
        }
        assert!(common::qemu_contents(copies.path(), &copy(self.top()), None) == contents);
    }
}

fn device(graph: &Graph, node: &str) -> Attachment {
    graph.attach(node, User::device("vda", true, false)).unwrap()
}

fn read(link: &Link) -> Vec<u8> {
    let entered = link.enter();
    let mut bytes = vec![0xee; entered.node().size() as usize];
    entered.read(0, &[ReadBuf::new(&mut bytes)]).unwrap();
    bytes
}

/// The nodes with what they are over and what their images name; not how much is in them.
fn picture(graph: &Graph) -> Vec<String> {
    let of = |node: &Arc<Node>| {
        let info = serde_json::to_value(node.info(true).unwrap()).unwrap();
        let image = &info["image"];
        let backing = node.backing().map(|node| node.name().to_owned());
        format!(
            "{} {} {} over {backing:?}, which it calls {} ({})",
            info["node-name"],
            if node.read_only() { "ro" } else { "rw" },
            info["file"],
            image["full-backing-filename"],
            image["backing-filename-format"],
        )
    };
    graph.list().iter().map(of).collect()
}

fn stream(base_node: Option<&str>) -> StreamOptions {
    StreamOptions {
        device: "n3".to_owned(),
        base_node: base_node.map(str::to_owned),
        ..StreamOptions::default()
    }
}

fn commit(top: &str, base: &str) -> CommitOptions {
    CommitOptions {
        device: "n3".to_owned(),
        top_node: Some(top.to_owned()),
        base_node: Some(base.to_owned()),
        ..CommitOptions::default()
    }
}

/// What is done to a chain of four, and which layers are left.
#[derive(Debug, Clone)]
enum Work {
    Stream(StreamOptions),
    Commit(CommitOptions),
}

impl Work {
    fn all() -> Vec<(Self, Vec<usize>)> {
        vec![
            (Self::Stream(stream(None)), vec![3]),
            (Self::Stream(stream(Some("n1"))), vec![0, 1, 3]),
            (Self::Stream(stream(Some("n0"))), vec![0, 3]),
            (Self::Commit(commit("n2", "n1")), vec![0, 1, 3]),
            (Self::Commit(commit("n2", "n0")), vec![0, 3]),
            (Self::Commit(commit("n1", "n0")), vec![0, 2, 3]),
        ]
    }

    fn start(&self, graph: &Graph) -> Box<dyn Operation> {
        match self {
            Self::Stream(options) => Box::new(Stream::new(graph, options).unwrap()),
            Self::Commit(options) => Box::new(Commit::new(graph, options).unwrap()),
        }
    }
}

fn watched() -> (Control, Receiver<Notice>) {
    let (tell, told) = channel();
    let tell = Mutex::new(tell);
    (Control::new(move |notice| tell.lock().unwrap().send(notice).unwrap()), told)
}

/// Writes all over the disk until it is told to stop; gives what the disk has then.
fn write_on(link: &Link, mut model: Vec<u8>, stop: &AtomicBool, wrote: &dyn Fn()) -> Vec<u8> {
    let mut random = Random(99);
    while !stop.load(Ordering::Acquire) {
        let len = 1 + random.below(9000) as usize;
        let at = random.below((model.len() - len) as u64) as usize;
        let bytes = random.bytes(len as u64);
        match random.below(8) {
            0 => {
                model[at..at + len].fill(0);
                link.write_zeroes(at as u64, len as u64, true, false).unwrap();
            }
            1 => link.flush().unwrap(),
            _ => {
                model[at..at + len].copy_from_slice(&bytes);
                link.write(at as u64, &[WriteBuf::new(&bytes)], false).unwrap();
            }
        }
        wrote();
    }
    model
}

#[test]
fn chains_are_shortened_under_writes_and_qemu_finds_the_same_disk_in_them() {
    if !have_qemu_img("chains under writes") {
        return;
    }
    for options in ["cluster_size=4k", "compat=0.10", "extended_l2=on", "cluster_size=2M"] {
        for (work, layers) in Work::all() {
            let chain = chain(4, options);
            let graph = chain.open();
            let user = device(&graph, "n3");
            let stop = AtomicBool::new(false);
            let (wrote, writes) = channel();
            let model = thread::scope(|scope| {
                let writer = scope.spawn(|| {
                    let wrote = || wrote.send(()).unwrap();
                    write_on(user.link(), chain.contents.clone(), &stop, &wrote)
                });
                writes.recv().unwrap();
                let mut operation = work.start(&graph);
                let control = Control::default();
                operation.run(&control).unwrap();
                let (done, total) = control.progress();
                assert!(done == total && total >= 4 * MIB as u64, "{done} of {total}");
                (0..5).for_each(|_| writes.recv().unwrap());
                operation.commit().unwrap();
                drop(operation);
                (0..5).for_each(|_| writes.recv().unwrap());
                stop.store(true, Ordering::Release);
                writer.join().unwrap()
            });
            assert!(read(user.link()) == model, "{options} {work:?}");
            let depth = user.node().info(false).unwrap().backing_file_depth;
            assert_eq!(depth as usize, layers.len() - 1);
            for n in 0..3 {
                assert!(graph.get(&format!("n{n}")).unwrap().read_only(), "n{n}");
            }
            let file = serde_json::to_value(user.node().info(false).unwrap()).unwrap();
            assert_eq!(file["file"], path(chain.top()), "the image names what is below");
            drop(user);
            for n in [3, 2, 1, 0] {
                graph.remove(&format!("n{n}")).unwrap();
            }
            chain.closed_is(&layers, &model);
        }
    }
}

#[test]
fn an_operation_cancelled_at_any_step_leaves_the_chain_as_it_was() {
    if !have_qemu_img("cancelled chains") {
        return;
    }
    for (work, layers) in Work::all() {
        let mut steps = 1;
        loop {
            // Anew, since what was copied before stays copied.
            let chain = chain(4, "cluster_size=64k");
            let graph = chain.open();
            let user = device(&graph, "n3");
            let before = picture(&graph);
            let mut operation = work.start(&graph);
            // So slow that it waits after each piece, until the speed is another one.
            let control = Control::default();
            control.set_speed(1);
            let ended = thread::scope(|scope| {
                let run = scope.spawn(|| operation.run(&control));
                for step in 0..steps {
                    let before = control.progress().0;
                    control.set_speed(2 + step % 2);
                    while control.progress().0 == before && !run.is_finished() {
                        thread::sleep(std::time::Duration::from_millis(1));
                    }
                }
                control.cancel(true);
                run.join().unwrap()
            });
            match ended {
                Err(Error::Cancelled) => {
                    operation.abort();
                    drop(operation);
                    assert_eq!(picture(&graph), before, "{work:?} step {steps}");
                    assert!(read(user.link()) == chain.contents, "{work:?} step {steps}");
                    chain.survives(&chain.contents);
                    steps += 1;
                }
                Ok(()) => {
                    // The whole of it, and still nothing is different until the commit, but that the
                    // base takes writes.
                    let either = |list: Vec<String>| list.join(";").replace(" rw ", " ro ");
                    assert_eq!(either(picture(&graph)), either(before), "{work:?}");
                    chain.survives(&chain.contents);
                    operation.commit().unwrap();
                    chain.survives(&chain.contents);
                    drop((operation, user));
                    for n in [3, 2, 1, 0] {
                        graph.remove(&format!("n{n}")).unwrap();
                    }
                    chain.closed_is(&layers, &chain.contents);
                    break;
                }
                Err(error) => panic!("{work:?} step {steps}: {error}"),
            }
        }
        assert!(steps > 1, "{work:?} has {steps} steps");
    }
}

#[test]
fn a_read_error_stops_fails_or_is_waited_out() {
    if !have_qemu_img("errors in chains") {
        return;
    }
    for work in [Work::Stream(stream(None)), Work::Commit(commit("n2", "n0"))] {
        for policy in [OnError::Report, OnError::Stop, OnError::Ignore] {
            let chain = chain(4, "cluster_size=64k");
            // The last data cluster of an image in the middle is missing for a while.
            let image = &chain.images[2];
            let whole = std::fs::read(image).unwrap();
            let file = std::fs::OpenOptions::new().write(true).open(image).unwrap();
            let graph = chain.open();
            let user = device(&graph, "n3");
            file.set_len(whole.len() as u64 - 200_000).unwrap();
            let work = match &work {
                Work::Stream(o) => Work::Stream(StreamOptions { on_error: policy, ..o.clone() }),
                Work::Commit(o) => Work::Commit(CommitOptions { on_error: policy, ..o.clone() }),
            };
            let mut operation = work.start(&graph);
            let (control, told) = watched();
            let result = thread::scope(|scope| {
                let run = scope.spawn(|| operation.run(&control));
                let action = match policy {
                    OnError::Report => Action::Report,
                    OnError::Ignore => Action::Ignore,
                    _ => Action::Stop,
                };
                let expected = Notice::Error { read: true, action, nospace: false };
                assert_eq!(told.recv().unwrap(), expected);
                if policy != OnError::Report {
                    std::fs::write(image, &whole).unwrap();
                }
                if policy == OnError::Stop {
                    assert_eq!(told.recv().unwrap(), Notice::Paused);
                    control.resume();
                }
                run.join().unwrap()
            });
            if policy == OnError::Report {
                let error = result.unwrap_err().to_string();
                assert!(error.contains("beyond the end of the file"), "{error}");
                operation.abort();
                std::fs::write(image, &whole).unwrap();
            } else {
                result.unwrap();
                operation.commit().unwrap();
            }
            drop(operation);
            assert!(read(user.link()) == chain.contents, "{work:?}");
        }
    }
}

#[test]
fn refusals_of_stream_have_the_texts_of_qemu_and_leave_nothing_claimed() {
    if !have_qemu_img("stream refusals") {
        return;
    }
    let chain = chain(4, "");
    let graph = chain.open();
    let user = device(&graph, "n3");
    let other = create(chain.dir.path(), "other.qcow2", "1M", "");
    graph
        .add(&json!({"driver": "qcow2", "node-name": "o",
            "file": {"driver": "file", "filename": path(&other)}}))
        .unwrap();
    let before = picture(&graph);
    let some = |text: &str| Some(text.to_owned());
    let with = |change: &dyn Fn(&mut StreamOptions)| {
        let mut options = stream(None);
        change(&mut options);
        Stream::new(&graph, &options).err().map(|error| error.to_string()).unwrap_or_default()
    };
    let base = path(&chain.images[0]);
    for (told, text) in [
        (with(&|o| o.device = "zz".to_owned()), "Cannot find device='zz' nor node-name='zz'"),
        (with(&|o| o.base = some("zz")), "Can't find 'zz' in the backing chain"),
        (
            with(&|o| (o.base, o.base_node) = (some("zz"), some("n2"))),
            "'base' and 'base-node' cannot be specified at the same time",
        ),
        (
            with(&|o| (o.base, o.bottom) = (some(&base), some("n2"))),
            "'base' and 'bottom' cannot be specified at the same time",
        ),
        (
            with(&|o| (o.base_node, o.bottom) = (some("n0"), some("n2"))),
            "'bottom' and 'base-node' cannot be specified at the same time",
        ),
        (with(&|o| o.base_node = some("o")), "Node 'o' is not a backing image of 'n3'"),
        (with(&|o| o.base_node = some("n3")), "Node 'n3' is not a backing image of 'n3'"),
        (with(&|o| o.base_node = some("zz")), "Cannot find device='' nor node-name='zz'"),
        (with(&|o| o.bottom = some("o")), "Node 'o' is not in a chain starting from 'n3'"),
        (with(&|o| o.bottom = some("zz")), "Cannot find device='' nor node-name='zz'"),
        (
            with(&|o| o.backing_file = some("x")),
            "backing file specified, but streaming the entire chain",
        ),
    ] {
        assert_eq!(told, text);
        assert_eq!(picture(&graph), before, "{text}");
    }
    // By the name of a file, in each of its forms.
    for base in [base.as_str(), "0.qcow2"] {
        drop(Stream::new(&graph, &StreamOptions { base: some(base), ..stream(None) }).unwrap());
    }
    let held = graph.claim(&["n1"], "backup").unwrap();
    let busy = "Node 'n1' is busy: block device is in use by block job: backup";
    assert_eq!(with(&|_| ()), busy);
    drop(held);
    let running = Stream::new(&graph, &stream(Some("n1"))).unwrap();
    let busy = "Node 'n3' is busy: block device is in use by block job: stream";
    assert_eq!(Commit::new(&graph, &commit("n2", "n0")).err().unwrap().to_string(), busy);
    drop(running);
    common::save(&*user.node().format(), "snap");
    let told = with(&|_| ());
    assert!(told.starts_with("Node 'n3' has internal snapshots"), "{told}");
}

#[test]
fn refusals_of_commit_have_the_texts_of_qemu() {
    if !have_qemu_img("commit refusals") {
        return;
    }
    let chain = chain(4, "");
    let graph = chain.open();
    let user = device(&graph, "n3");
    let other = create(chain.dir.path(), "other.qcow2", "1M", "");
    graph
        .add(&json!({"driver": "qcow2", "node-name": "o",
            "file": {"driver": "file", "filename": path(&other)}}))
        .unwrap();
    let before = picture(&graph);
    let some = |text: &str| Some(text.to_owned());
    let with = |change: &dyn Fn(&mut CommitOptions)| {
        let mut options = CommitOptions { device: "n3".to_owned(), ..CommitOptions::default() };
        change(&mut options);
        Commit::new(&graph, &options).err().map(|error| error.to_string()).unwrap_or_default()
    };
    for (told, text) in [
        (with(&|o| o.device = "zz".to_owned()), "Device 'zz' not found"),
        (with(&|o| o.device = "n2".to_owned()), "Need a root block node"),
        (with(&|o| o.top = some("zz")), "Top image file zz not found"),
        (with(&|o| o.base = some("zz")), "Can't find 'zz' in the backing chain"),
        (with(&|o| o.top_node = some("zz")), "Cannot find device='' nor node-name='zz'"),
        (with(&|o| o.base_node = some("zz")), "Cannot find device='' nor node-name='zz'"),
        (with(&|o| o.top_node = some("o")), "'o' is not in this backing file chain"),
        (with(&|o| o.base_node = some("o")), "'o' is not in this backing file chain"),
        (
            with(&|o| (o.top_node, o.top) = (some("n2"), some("zz"))),
            "'top-node' and 'top' are mutually exclusive",
        ),
        (
            with(&|o| (o.base_node, o.base) = (some("n2"), some("zz"))),
            "'base-node' and 'base' are mutually exclusive",
        ),
        (with(&|o| o.base_node = some("n3")), "cannot commit an image into itself"),
        (with(&|o| o.device = "o".to_owned()), "cannot commit an image into itself"),
        (with(&|o| o.top_node = some("n0")), "cannot commit an image into itself"),
        (
            with(&|o| o.backing_file = some("x")),
            "'backing-file' specified, but 'top' is the active layer",
        ),
    ] {
        assert_eq!(told, text);
        assert_eq!(picture(&graph), before, "{text}");
    }
    drop(user);
}

#[test]
fn a_base_that_somebody_else_reads_is_not_written_to() {
    if !have_qemu_img("commit beside others") {
        return;
    }
    let chain = chain(4, "");
    let graph = chain.open();
    let user = device(&graph, "n3");
    let other = create(
        chain.dir.path(),
        "other.qcow2",
        "1M",
        &format!("backing_file={},backing_fmt=qcow2", path(&chain.images[0])),
    );
    graph
        .add(&json!({"driver": "qcow2", "node-name": "o", "backing": "n0",
            "file": {"driver": "file", "filename": path(&other)}}))
        .unwrap();
    let reader = graph.attach("o", User::device("vdb", false, false)).unwrap();
    let before = picture(&graph);
    let error = Commit::new(&graph, &commit("n2", "n0")).err().unwrap().to_string();
    assert!(error.starts_with("Permission conflict on node 'n0': permissions 'write"), "{error}");
    assert_eq!(picture(&graph), before);
    drop(reader);
    // And the other way round.
    let running = Commit::new(&graph, &commit("n2", "n0")).unwrap();
    let error = graph.attach("o", User::device("vdb", false, false)).err().unwrap().to_string();
    assert!(error.starts_with("Permission conflict on node 'n0': permissions 'write"), "{error}");
    let reopen = json!({"driver": "qcow2", "node-name": "n1", "backing": "n0", "read-only": true,
        "file": {"driver": "file", "filename": path(&chain.images[1])}});
    assert_eq!(
        graph.reopen(&[reopen]).unwrap_err().to_string(),
        "Node 'n1' is busy: block device is in use by block job: commit"
    );
    drop(running);
    assert_eq!(picture(&graph), before);
    drop(graph.attach("o", User::device("vdb", false, false)).unwrap());
    drop(user);
}

#[test]
fn a_commit_of_the_uppermost_image_is_ready_first_and_moves_readers_to_the_base() {
    if !have_qemu_img("commit of the top") {
        return;
    }
    let chain = chain(3, "");
    let graph = chain.open();
    let options = CommitOptions { device: "n2".to_owned(), ..CommitOptions::default() };
    let reader = graph.attach("n2", User::device("vda", false, false)).unwrap();
    let mut operation = Commit::new(&graph, &options).unwrap();
    assert!(operation.is_active());
    let control = Control::default();
    control.complete();
    operation.run(&control).unwrap();
    assert_eq!(reader.node().name(), "n2", "nothing took effect yet");
    operation.commit().unwrap();
    assert_eq!(reader.node().name(), "n0");
    assert_eq!(reader.node().size() as usize, SIZE, "the base has grown");
    assert!(read(reader.link()) == chain.contents);
}

#[test]
fn an_image_in_use_is_committed_left_or_given_up_under_writes() {
    if !have_qemu_img("active commit") {
        return;
    }
    #[derive(Debug, Clone, Copy, PartialEq)]
    enum End {
        Complete,
        Leave,
        Cancel,
    }
    for options in ["cluster_size=4k", "compat=0.10", "extended_l2=on"] {
        for base in ["n0", "n2"] {
            for end in [End::Complete, End::Leave, End::Cancel] {
                let chain = chain(4, options);
                let graph = chain.open();
                let user = device(&graph, "n3");
                let before = picture(&graph);
                let stop = AtomicBool::new(false);
                let (wrote, writes) = channel();
                let (control, told) = watched();
                let model = thread::scope(|scope| {
                    let writer = scope.spawn(|| {
                        let wrote = || wrote.send(()).unwrap();
                        write_on(user.link(), chain.contents.clone(), &stop, &wrote)
                    });
                    writes.recv().unwrap();
                    let mut operation = Commit::new(&graph, &commit("n3", base)).unwrap();
                    assert!(operation.is_active());
                    let error = Commit::new(&graph, &commit("n2", "n1")).err().unwrap().to_string();
                    assert!(error.ends_with("is in use by block job: commit"), "{error}");
                    let run = scope.spawn(|| {
                        let result = operation.run(&control);
                        (operation, result)
                    });
                    assert_eq!(told.recv().unwrap(), Notice::Ready);
                    (0..20).for_each(|_| writes.recv().unwrap());
                    match end {
                        End::Complete => control.complete(),
                        End::Leave => control.cancel(false),
                        End::Cancel => control.cancel(true),
                    }
                    let (mut operation, result) = run.join().unwrap();
                    assert_eq!(user.node().name(), "n3", "nothing took effect yet");
                    if end == End::Cancel {
                        assert!(matches!(result, Err(Error::Cancelled)));
                        operation.abort();
                    } else {
                        result.unwrap();
                        operation.commit().unwrap();
                    }
                    drop(operation);
                    (0..20).for_each(|_| writes.recv().unwrap());
                    stop.store(true, Ordering::Release);
                    writer.join().unwrap()
                });
                let now = if end == End::Complete { base } else { "n3" };
                assert_eq!(user.node().name(), now);
                let found = read(user.link());
                assert_eq!(found.len(), model.len(), "{options} {base} {end:?}");
                let wrong = found.iter().zip(&model).position(|(a, b)| a != b);
                assert_eq!(wrong, None, "{options} {base} {end:?}: the first byte that differs");
                if end != End::Complete {
                    assert_eq!(picture(&graph), before);
                }
                drop(user);
                for n in [3, 2, 1, 0] {
                    graph.remove(&format!("n{n}")).unwrap();
                }
                let image = |name: &str| &chain.images[name[1..].parse::<usize>().unwrap()];
                chain.images.iter().for_each(|image| check(image));
                assert!(common::qemu_contents(chain.dir.path(), image(now), None) == model);
            }
        }
    }
}

#[test]
fn another_name_of_the_backing_file_is_written_and_told() {
    if !have_qemu_img("change-backing-file") {
        return;
    }
    let chain = chain(3, "");
    let graph = chain.open();
    let user = device(&graph, "n2");
    let before = picture(&graph);
    let refusal = |device: &str, node: &str, name: &str| {
        graph.change_backing_file(device, node, name).unwrap_err().to_string()
    };
    assert_eq!(refusal("zz", "n2", "x"), "Cannot find device='zz' nor node-name='zz'");
    assert_eq!(refusal("n2", "zz", "x"), "Cannot find device='' nor node-name='zz'");
    assert_eq!(refusal("n1", "n1", "x"), "Need a root block node");
    assert_eq!(
        refusal("n2", "n0", "x"),
        "not allowing backing file change on an image without a backing file"
    );
    let long = "y".repeat(1100);
    let error = refusal("n2", "n1", &long);
    assert!(error.starts_with("Could not change backing file to 'yyy"), "{error}");
    let held = graph.claim(&["n2"], "mirror").unwrap();
    assert_eq!(
        refusal("n2", "n1", "x"),
        "Node 'n2' is busy: block device is in use by block job: mirror"
    );
    drop(held);
    assert_eq!(picture(&graph), before);
    graph.change_backing_file("n2", "n1", "0.qcow2").unwrap();
    let n1 = graph.get("n1").unwrap();
    assert!(n1.read_only());
    let info = serde_json::to_value(n1.info(false).unwrap()).unwrap();
    assert_eq!(info["image"]["backing-filename"], "0.qcow2");
    assert_eq!(info["image"]["full-backing-filename"], path(&chain.images[0]));
    assert_eq!(info["image"]["backing-filename-format"], "qcow2");
    assert_eq!(info["file"], path(&chain.images[1]));
    graph.change_backing_file("n2", "n2", "elsewhere.qcow2").unwrap();
    let info = serde_json::to_value(user.node().info(false).unwrap()).unwrap();
    assert!(info["file"].as_str().unwrap().starts_with("json:"), "{info}");
    graph.change_backing_file("n2", "n2", "1.qcow2").unwrap();
    assert!(read(user.link()) == chain.contents);
    drop((user, n1));
    for n in [2, 1, 0] {
        graph.remove(&format!("n{n}")).unwrap();
    }
    assert!(common::qemu_contents(chain.dir.path(), chain.top(), None) == chain.contents);
}
