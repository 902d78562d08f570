//! What QEMU refuses, with its texts, and what must not be done to a base that others read.

use super::*;

/// A chain of four whose top a device uses, and an image "o" that is not in it.
struct Beside {
    user: Attachment,
    graph: Graph,
    before: Vec<String>,
    chain: Chain,
}

/// `below` is what "o" is over, if anything.
fn beside(below: Option<&str>) -> Beside {
    let chain = chain(4, "");
    let graph = chain.open();
    let user = device(&graph, "n3");
    let options =
        below.map(|_| format!("backing_file={},backing_fmt=qcow2", path(&chain.images[0])));
    let other = create(chain.dir.path(), "other.qcow2", "1M", &options.unwrap_or_default());
    graph
        .add(&json!({"driver": "qcow2", "node-name": "o", "backing": below,
            "file": {"driver": "file", "filename": path(&other)}}))
        .unwrap();
    let before = picture(&graph);
    Beside { user, graph, before, chain }
}

#[test]
fn refusals_of_stream_have_the_texts_of_qemu_and_leave_nothing_claimed() {
    if !have_qemu_img("stream refusals") {
        return;
    }
    let Beside { chain, graph, user, before } = beside(None);
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
    // QEMU has a filter above it.
    let error = Commit::new(&graph, &commit("n2", "n0")).err().unwrap().to_string();
    assert_eq!(error, "Need a root block node");
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
    let Beside { chain: _chain, graph, user, before } = beside(None);
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
    let Beside { chain, graph, user, .. } = beside(Some("n0"));
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
