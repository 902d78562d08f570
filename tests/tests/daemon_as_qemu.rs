//! The same commands to our storage daemon and to QEMU's: the same answers.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use tardigrade_tests::daemon::{Daemon, have_qemu};

fn images(dir: &Path) {
    for args in [
        &["base.qcow2", "4M"][..],
        &["-b", "base.qcow2", "-F", "qcow2", "top.qcow2"],
        &["other.qcow2", "4M"],
    ] {
        let status = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2"])
            .args(args)
            .current_dir(dir)
            .status()
            .unwrap();
        assert!(status.success());
    }
    std::fs::File::create(dir.join("r.raw")).unwrap().set_len(4 << 20).unwrap();
}

/// The commands in turn; `$` in a file name is the images' directory, that in a socket the daemon's.
fn script() -> Vec<(&'static str, Value)> {
    let file = |name: &str| json!({"driver": "file", "filename": format!("$/{name}")});
    let qcow2 = |node: &str, image: &str| json!({"driver": "qcow2", "node-name": node, "file": file(image)});
    let with = |mut options: Value, more: Value| {
        options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        options
    };
    let reopen = |options: Value| ("blockdev-reopen", json!({"options": [options]}));
    let export = |id: &str, node: &str, writable: bool| {
        (
            "block-export-add",
            json!({"type": "nbd", "id": id, "node-name": node, "writable": writable}),
        )
    };
    let del = |node: &str| ("blockdev-del", json!({"node-name": node}));
    let top = || qcow2("top", "top.qcow2");
    vec![
        ("nbd-server-stop", json!({})),
        ("blockdev-add", json!({"driver": "file", "node-name": "f", "filename": "$/base.qcow2"})),
        ("blockdev-add", json!({"driver": "qcow2", "node-name": "a", "file": "f"})),
        ("blockdev-add", json!({"driver": "qcow2", "node-name": "a2", "file": "f"})),
        (
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "a2", "file": "f", "read-only": true}),
        ),
        ("blockdev-add", json!({"driver": "raw", "node-name": "a3", "file": "f"})),
        ("blockdev-add", with(top(), json!({"backing": "a"}))),
        export("e", "a", true),
        ("nbd-server-start", json!({"addr": {"type": "xx", "data": {}}})),
        ("nbd-server-start", json!({"addr": {"type": "unix", "data": {}}})),
        ("nbd-server-start", json!({"addr": {"type": "inet", "data": {"host": "::1"}}})),
        (
            "nbd-server-start",
            json!({"addr": {"type": "unix", "data": {"path": "@/nbd"}}, "max-connections": -1}),
        ),
        ("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": "@/nbd"}}})),
        ("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": "@/nbd"}}})),
        export("e", "a", true),
        export("e", "a", false),
        export("e2", "f", false),
        export("e3", "f", true),
        export("e4", "top", true),
        export("7e", "top", true),
        export("e5", "zz", true),
        export("e6", "a", true),
        (
            "block-export-add",
            json!({"type": "nbd", "id": "e7", "node-name": "top", "name": "n", "bitmaps": ["zz"]}),
        ),
        ("block-export-add", json!({"type": "nbd", "id": "e7", "node-name": "top", "zz": 1})),
        ("query-block-exports", json!({})),
        ("block_resize", json!({"node-name": "a", "size": 8 << 20})),
        ("block_resize", json!({"node-name": "zz", "size": 8 << 20})),
        ("block_resize", json!({"device": "a", "size": 8 << 20})),
        ("block_resize", json!({"node-name": "a", "size": -1})),
        ("block_resize", json!({"node-name": "f", "size": 8 << 20})),
        ("block-export-del", json!({"id": "zz"})),
        del("top"),
        del("f"),
        del("a"),
        ("block-export-del", json!({"id": "e4"})),
        del("top"),
        ("nbd-server-stop", json!({})),
        del("a"),
        del("a3"),
        del("f"),
        del("f"),
        ("query-named-block-nodes", json!({})),
        ("blockdev-add", with(top(), json!({"read-only": true}))),
        reopen(top()),
        reopen(with(top(), json!({"backing": null}))),
        reopen(with(qcow2("top", "other.qcow2"), json!({"backing": null}))),
        reopen(with(top(), json!({"driver": "raw"}))),
        reopen(json!({"driver": "qcow2", "node-name": "top"})),
        reopen(json!({"driver": "qcow2", "file": "zz"})),
        reopen(json!({"driver": "qcow2", "node-name": "zz", "file": "zz"})),
        ("blockdev-add", qcow2("o", "other.qcow2")),
        reopen(with(top(), json!({"backing": "o"}))),
        reopen(with(top(), json!({"backing": "top"}))),
        reopen(with(top(), json!({"backing": file("r.raw")}))),
        reopen(with(top(), json!({"backing": "o", "force-share": true, "read-only": true}))),
        del("o"),
        (
            "blockdev-add",
            json!({"driver": "file", "node-name": "bf", "filename": "$/base.qcow2", "read-only": true}),
        ),
        (
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "b", "file": "bf", "read-only": true}),
        ),
        reopen(json!({"driver": "qcow2", "node-name": "b", "file": "bf"})),
        (
            "blockdev-reopen",
            json!({"options": [
                {"driver": "file", "node-name": "bf", "filename": "$/base.qcow2"},
                {"driver": "qcow2", "node-name": "b", "file": "bf"},
            ]}),
        ),
        reopen(
            json!({"driver": "file", "node-name": "bf", "filename": "$/base.qcow2", "read-only": true}),
        ),
        reopen(json!({"driver": "file", "node-name": "bf", "filename": "$/other.qcow2"})),
        (
            "blockdev-add",
            json!({"driver": "raw", "node-name": "part", "offset": 512, "size": 1025, "file": file("r.raw")}),
        ),
        (
            "blockdev-add",
            json!({"driver": "raw", "node-name": "part", "offset": 5 << 20, "file": file("r.raw")}),
        ),
        (
            "blockdev-add",
            json!({"driver": "raw", "node-name": "part", "offset": 4096, "size": 4 << 20, "file": file("r.raw")}),
        ),
        (
            "blockdev-add",
            json!({"driver": "host_device", "node-name": "hd", "filename": "$/r.raw"}),
        ),
        ("blockdev-add", json!({"driver": "file", "node-name": "no", "filename": "$/nosuch"})),
        ("blockdev-add", json!({"driver": "file", "node-name": "b", "filename": "$/r.raw"})),
        (
            "blockdev-add",
            json!({"driver": "file", "node-name": "n", "filename": "$/r.raw", "zz": 1}),
        ),
        (
            "blockdev-add",
            json!({"driver": "file", "node-name": "n", "filename": "$/r.raw", "discard": "zz"}),
        ),
        ("blockdev-add", json!({"driver": "file", "filename": "$/r.raw"})),
        (
            "blockdev-add",
            json!({"driver": "raw", "node-name": "z", "detect-zeroes": "unmap", "file": file("r.raw")}),
        ),
        (
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "z", "force-share": true, "file": file("r.raw")}),
        ),
    ]
}

/// Names that are made up differ.
fn told(answer: Result<Value, String>, socket_dir: &Path) -> String {
    match answer {
        Ok(Value::Array(list)) => {
            let mut list: Vec<Value> = list;
            for entry in &mut list {
                if let Some(members) = entry.as_object_mut() {
                    members.retain(|key, _| {
                        matches!(key.as_str(), "id" | "node-name" | "type" | "shutting-down")
                    });
                }
            }
            Value::Array(list).to_string()
        }
        Ok(value) => value.to_string(),
        Err(text) => text.replace(&socket_dir.display().to_string(), "@"),
    }
}

#[test]
fn every_answer_is_that_of_qemu() {
    if !have_qemu("comparison with QEMU") {
        return;
    }
    let run = |mut daemon: Daemon| -> Vec<String> {
        let dir = tempfile::tempdir().unwrap();
        images(dir.path());
        let own = daemon.path("");
        let answer = |(command, arguments): (&str, Value)| {
            let text = arguments
                .to_string()
                .replace('$', dir.path().to_str().unwrap())
                .replace("@/", &format!("{}/", own.display()));
            let answer = daemon.try_qmp(command, serde_json::from_str(&text).unwrap());
            let said = told(answer, &own).replace(dir.path().to_str().unwrap(), "$");
            format!("{command} {arguments}: {said}")
        };
        script().into_iter().map(answer).collect()
    };
    let ours = run(Daemon::start(&[]));
    let theirs = run(Daemon::start_qemu(&[]));
    let mut different = Vec::new();
    for (ours, theirs) in ours.iter().zip(&theirs) {
        if ours != theirs {
            different.push(format!("ours:   {ours}\nQEMU's: {theirs}"));
        }
    }
    assert!(
        different.is_empty(),
        "{} of {}:\n{}",
        different.len(),
        ours.len(),
        different.join("\n")
    );
}
