//! Verbs of two clients that meet at a job's end: whichever is first, the job ends once, tells so once, and the
//! nodes are those of the end that it tells. Needs no KVM.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use qmp::client::{Client, ClientError};
use serde_json::{Value, json};
use tardigrade_tests::daemon::Daemon;
use tardigrade_tests::disk::{Disk, qemu_img};

const PATIENCE: Duration = Duration::from_secs(120);
const ROUNDS: usize = 40;

/// What a client asks for.
type Verb = (&'static str, fn(&str) -> Value);

const COMPLETE: Verb = ("job-complete", |id| json!({"id": id}));
const CANCEL: Verb = ("job-cancel", |id| json!({"id": id}));
const FINALIZE: Verb = ("job-finalize", |id| json!({"id": id}));
const BLOCK_CANCEL: Verb = ("block-job-cancel", |id| json!({"device": id}));
const PAUSE: Verb = ("job-pause", |id| json!({"id": id}));
const SPEED: Verb = ("block-job-set-speed", |id| json!({"device": id, "speed": 1 << 24}));
const DISMISS: Verb = ("job-dismiss", |id| json!({"id": id}));
const RESUME: &str = "job-resume";

/// A daemon with two images of the same size as nodes, the first of which has data and a reader.
struct Scene {
    daemon: Daemon,
    watcher: Client,
    clients: [Client; 2],
    /// The node that the reader uses, and the other one.
    nodes: [&'static str; 2],
    dir: tempfile::TempDir,
    next: usize,
}

impl Scene {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut daemon = Daemon::start(&[]);
        for node in ["a", "b"] {
            let disk = Disk::qcow2(dir.path().join(node), "1M");
            let file = json!({"driver": "file", "filename": disk.file()});
            let node = json!({"driver": "qcow2", "node-name": node, "file": file});
            daemon.qmp("blockdev-add", node);
        }
        let socket = dir.path().join("nbd").display().to_string();
        let address = json!({"addr": {"type": "unix", "data": {"path": socket}}});
        daemon.qmp("nbd-server-start", address);
        let export =
            json!({"type": "nbd", "id": "e", "node-name": "a", "name": "d", "writable": true});
        daemon.qmp("block-export-add", export);
        let scene = Self {
            watcher: Client::connect(&daemon.path("qmp")).unwrap(),
            clients: [0, 1].map(|_| Client::connect(&daemon.path("qmp")).unwrap()),
            daemon,
            nodes: ["a", "b"],
            dir,
            next: 0,
        };
        let raw = scene.raw();
        std::fs::write(&raw, tardigrade_tests::pattern::bytes(1, 0, 1 << 20)).unwrap();
        qemu_img(&["convert", "-n", "-f", "raw", "-O", "raw", &raw, &scene.url()]);
        scene
    }

    fn raw(&self) -> String {
        self.dir.path().join("raw").display().to_string()
    }

    fn url(&self) -> String {
        format!("nbd+unix:///d?socket={}", self.dir.path().join("nbd").display())
    }

    /// Runs a job up to `until`, has the verbs meet, and ends it by the `last` ones if it is still
    /// there. Gives the name of the event of its end.
    fn round(
        &mut self,
        (command, more, until): (&str, &Value, &str),
        verbs: [Verb; 2],
        last: &[&str],
    ) -> String {
        self.next += 1;
        let id = format!("j{}", self.next);
        let [source, target] = self.nodes;
        let mut arguments =
            json!({"job-id": id, "device": source, "target": target, "sync": "full"});
        arguments.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.daemon.qmp(command, arguments);
        let status = |event: &Value, status: &str| {
            event["data"]["id"] == id.as_str() && event["data"]["status"] == status
        };
        let mut told = Vec::new();
        while !told.last().is_some_and(|event| status(event, until)) {
            told.push(self.watcher.wait_event(PATIENCE, |_| true).unwrap());
        }
        meet(&mut self.clients, &id, verbs);
        for command in last {
            // The verbs may have ended it.
            let _ = self.daemon.try_qmp(command, json!({"id": id}));
        }
        while !told.last().is_some_and(|event| status(event, "null")) {
            told.push(self.watcher.wait_event(PATIENCE, |_| true).unwrap());
        }
        // Nothing comes after the end.
        self.watcher.execute("query-jobs", json!({})).unwrap();
        told.extend(self.watcher.take_events());
        self.check(&id, &told)
    }

    /// The job has told its end once.
    fn check(&mut self, id: &str, told: &[Value]) -> String {
        let count = |status: &str| {
            let data = json!({"id": id, "status": status});
            told.iter().filter(|event| event["data"] == data).count()
        };
        for status in ["created", "concluded", "null"] {
            assert_eq!(count(status), 1, "{id} {status}: {told:?}");
        }
        let ends = ["BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED"];
        let is_end = |event: &&Value| {
            event["data"]["device"] == id && ends.iter().any(|name| event["event"] == *name)
        };
        let ends: Vec<&Value> = told.iter().filter(is_end).collect();
        let [end] = ends.as_slice() else { panic!("{id}: {told:?}") };
        assert_eq!(end["data"]["error"], Value::Null, "{id}: {told:?}");
        assert_eq!(self.daemon.qmp("query-jobs", json!({})), json!([]));
        end["event"].as_str().unwrap().to_owned()
    }

    /// The node that the reader uses; it is the source of the next job.
    fn used(&mut self) -> String {
        let exports = self.daemon.qmp("query-block-exports", json!({}));
        let used = exports[0]["node-name"].as_str().unwrap().to_owned();
        if used != self.nodes[0] {
            self.nodes.reverse();
        }
        assert_eq!(used, self.nodes[0]);
        used
    }

    /// The reader has what was there at the start; both images are without a fault.
    fn finish(self) {
        let raw = self.raw();
        qemu_img(&["compare", "-f", "raw", "-F", "raw", &raw, &self.url()]);
        assert!(self.daemon.quit().success());
        for node in ["a", "b"] {
            Disk { path: self.dir.path().join(node), format: "qcow2" }.check();
        }
    }
}

/// Both verbs at once. One may be refused, because of the state that the other has brought; nothing else.
fn meet(clients: &mut [Client; 2], id: &str, verbs: [Verb; 2]) {
    let barrier = Barrier::new(2);
    thread::scope(|scope| {
        for (client, (command, arguments)) in clients.iter_mut().zip(verbs) {
            let barrier = &barrier;
            scope.spawn(move || {
                barrier.wait();
                match client.execute(command, arguments(id)) {
                    Ok(_) => {}
                    Err(ClientError::Command(error)) => {
                        let known = [
                            "Job not found",
                            "cannot accept command verb",
                            "cannot be completed",
                            "not found",
                        ];
                        let known = known.iter().any(|text| error.desc.contains(text));
                        assert!(known, "{command}: {error}");
                    }
                    Err(error) => panic!("{command}: {error}"),
                }
            });
        }
    });
}

#[test]
fn a_mirror_that_is_completed_while_another_client_does_something_else_ends_once() {
    let mut scene = Scene::start();
    let (none, mut completed, mut cancelled) = (json!({}), 0, 0);
    for round in 0..ROUNDS {
        let other = [CANCEL, BLOCK_CANCEL, PAUSE, SPEED, COMPLETE][round % 5];
        let before = scene.used();
        let end = scene.round(
            ("blockdev-mirror", &none, "ready"),
            [COMPLETE, other],
            &[RESUME, COMPLETE.0],
        );
        let moved = scene.used() != before;
        match end.as_str() {
            "BLOCK_JOB_CANCELLED" => {
                assert!(!moved, "{}: it was cancelled", other.0);
                cancelled += 1;
            }
            // A cancel without force is a success that leaves all in place.
            _ => {
                assert!(moved || other.0 == BLOCK_CANCEL.0, "{}: it was completed", other.0);
                completed += 1;
            }
        }
    }
    println!("{completed} completed, {cancelled} cancelled");
    assert!(completed >= ROUNDS / 5 * 2, "pause, speed and complete cancel nothing");
    scene.finish();
}

#[test]
fn a_job_that_waits_is_finalized_or_cancelled_by_one_of_two_clients() {
    let mut scene = Scene::start();
    let manual = json!({"auto-finalize": false, "auto-dismiss": false});
    for round in 0..ROUNDS {
        let other = [CANCEL, BLOCK_CANCEL, FINALIZE, DISMISS][round % 4];
        let end = scene.round(
            ("blockdev-backup", &manual, "pending"),
            [FINALIZE, other],
            &[FINALIZE.0, DISMISS.0],
        );
        let may_cancel = [CANCEL.0, BLOCK_CANCEL.0].contains(&other.0);
        assert!(may_cancel || end == "BLOCK_JOB_COMPLETED", "{}: {end}", other.0);
    }
    assert_eq!(scene.used(), "a");
    scene.finish();
}

#[test]
fn a_backup_that_ends_by_itself_meets_verbs_at_every_moment() {
    let (mut scene, none) = (Scene::start(), json!({}));
    for round in 0..ROUNDS {
        let verbs = [[CANCEL, PAUSE], [PAUSE, SPEED], [BLOCK_CANCEL, SPEED]][round % 3];
        scene.round(("blockdev-backup", &none, "running"), verbs, &[RESUME]);
    }
    assert_eq!(scene.used(), "a");
    scene.finish();
}
