//! What every client goes through, and what must be true after it.

use std::path::Path;

use serde_json::{Value, json};
use tardigrade_tests::baremetal::layout::FREE;
use tardigrade_tests::busy::{Busy, SIZE, check_image};
use tardigrade_tests::disk::Disk;
use tardigrade_tests::vm::Vm;

/// An entry of `query-jobs`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Job {
    pub(crate) id: String,
    pub(crate) status: String,
    pub(crate) current: i64,
    pub(crate) total: i64,
    pub(crate) error: Option<String>,
}

/// A client. Its commands must work, or it panics.
pub(crate) trait Client {
    fn save(&mut self, id: &str, tag: &str);
    fn load(&mut self, id: &str, tag: &str);
    fn delete(&mut self, id: &str, tag: &str);
    fn cancel(&mut self, id: &str);
    fn dismiss(&mut self, id: &str);
    fn complete(&mut self, id: &str);
    fn jobs(&mut self) -> Vec<Job>;
    fn add_image(&mut self, node: &str, file: &str);
    fn remove_node(&mut self, node: &str);
    /// Backup `id` of disk0 to the node, and an internal snapshot of that tag, at one moment.
    fn backup_and_snapshot(&mut self, id: &str, target: &str, tag: &str);
    /// Mirror `id` of disk0 to the node.
    fn mirror(&mut self, id: &str, target: &str);
    /// Waits for a status of a job that has not gone by when this is called.
    fn wait(&mut self, id: &str, status: &str);
}

/// A client that has names and arguments for everything.
pub(crate) trait Untyped {
    /// Runs a command, which must succeed.
    fn execute(&mut self, command: &str, arguments: Value) -> Value;
    /// The same for actions at one moment.
    fn transaction(&mut self, actions: &[(&str, Value)]) {
        let action = |(kind, data): &(&str, Value)| json!({"type": kind, "data": data});
        let actions: Vec<Value> = actions.iter().map(action).collect();
        self.execute("transaction", json!({"actions": actions}));
    }
    /// See [`Client::wait`].
    fn wait_status(&mut self, id: &str, status: &str);
}

impl<T: Untyped> Client for T {
    fn save(&mut self, id: &str, tag: &str) {
        self.execute("snapshot-save", snapshot(id, tag));
    }

    fn load(&mut self, id: &str, tag: &str) {
        self.execute("snapshot-load", snapshot(id, tag));
    }

    fn delete(&mut self, id: &str, tag: &str) {
        let arguments = json!({"job-id": id, "tag": tag, "devices": ["disk0"]});
        self.execute("snapshot-delete", arguments);
    }

    fn cancel(&mut self, id: &str) {
        self.execute("job-cancel", json!({"id": id}));
    }

    fn dismiss(&mut self, id: &str) {
        self.execute("job-dismiss", json!({"id": id}));
    }

    fn complete(&mut self, id: &str) {
        self.execute("job-complete", json!({"id": id}));
    }

    fn jobs(&mut self) -> Vec<Job> {
        let jobs = self.execute("query-jobs", json!({}));
        let job = |job: &Value| Job {
            id: job["id"].as_str().unwrap().to_owned(),
            status: job["status"].as_str().unwrap().to_owned(),
            current: job["current-progress"].as_i64().unwrap(),
            total: job["total-progress"].as_i64().unwrap(),
            error: job["error"].as_str().map(str::to_owned),
        };
        jobs.as_array().unwrap().iter().map(job).collect()
    }

    fn add_image(&mut self, node: &str, file: &str) {
        let file = json!({"driver": "file", "filename": file});
        let arguments = json!({"driver": "qcow2", "node-name": node, "file": file});
        self.execute("blockdev-add", arguments);
    }

    fn remove_node(&mut self, node: &str) {
        self.execute("blockdev-del", json!({"node-name": node}));
    }

    fn backup_and_snapshot(&mut self, id: &str, target: &str, tag: &str) {
        let backup = json!({"job-id": id, "device": "disk0", "target": target, "sync": "full"});
        let snapshot = json!({"device": "disk0", "name": tag});
        let actions = [("blockdev-snapshot-internal-sync", snapshot), ("blockdev-backup", backup)];
        self.transaction(&actions);
    }

    fn mirror(&mut self, id: &str, target: &str) {
        let arguments = json!({"job-id": id, "device": "disk0", "target": target, "sync": "full"});
        self.execute("blockdev-mirror", arguments);
    }

    fn wait(&mut self, id: &str, status: &str) {
        self.wait_status(id, status);
    }
}

fn snapshot(id: &str, tag: &str) -> Value {
    json!({"job-id": id, "tag": tag, "vmstate": "disk0", "devices": ["disk0"]})
}

/// Memory that a save has to write, behind what the guest's writing needs.
const NOISE: std::ops::Range<u64> = FREE + (2 << 20)..96 << 20;

/// The whole session of one client.
pub(crate) fn run(connect: impl FnOnce(&Vm, &Path) -> Box<dyn Client>) {
    let dir = tempfile::tempdir().unwrap();
    let mut busy = Busy::start_with(dir.path(), 1, "128M");
    let mut client = connect(&busy.vm, dir.path());
    let client = client.as_mut();
    busy.guest.fill(NOISE, 1);
    watched_save(client);
    busy.goes_on();
    cancelled_save(client, &mut busy);
    client.load("load", "one");
    concluded(client, "load");
    busy.guest.verify(NOISE, 1);
    busy.check();
    client.delete("delete", "one");
    concluded(client, "delete");

    let copy = image(dir.path(), "copy");
    client.add_image("copy", &copy.file());
    client.backup_and_snapshot("backup", "copy", "moment");
    client.wait("backup", "null");
    busy.check();
    let target = image(dir.path(), "target");
    client.add_image("target", &target.file());
    client.mirror("mirror", "target");
    client.wait("mirror", "ready");
    busy.goes_on();
    client.complete("mirror");
    client.wait("mirror", "null");
    client.remove_node("disk0");
    client.remove_node("copy");
    assert_eq!(client.jobs(), []);
    assert_eq!(busy.used_nodes(), ["target"]);

    let contents = busy.finish();
    check_image(&target, &contents[0]);
    let disk = Disk { path: dir.path().join("disk0.qcow2"), format: "qcow2" };
    assert_eq!(disk.tags(), ["moment"], "one and those that were cancelled are gone");
    disk.check();
    copy.check();
    assert!(copy.read(None) == disk.read(Some("moment")), "the backup is not of its moment");
}

fn image(dir: &Path, name: &str) -> Disk {
    Disk::qcow2(dir.join(format!("{name}.qcow2")), SIZE)
}

/// A save with a progress of bytes that only grows, up to all.
fn watched_save(client: &mut dyn Client) {
    client.save("save", "one");
    let mut seen = Vec::new();
    let last = loop {
        let [job] = client.jobs().try_into().unwrap();
        assert_eq!(job.id, "save");
        seen.push(job.current);
        if job.status == "concluded" {
            break job;
        }
    };
    assert!(seen.is_sorted(), "{seen:?}");
    let least = i64::try_from(NOISE.end - NOISE.start).unwrap();
    assert!(last.total >= least && last.current == last.total, "{last:?}");
    assert_eq!(last.error, None);
    client.dismiss("save");
}

/// A save that is cancelled in the middle. One may be too quick for that: another one then.
fn cancelled_save(client: &mut dyn Client, busy: &mut Busy) {
    for seed in 2..50 {
        // What has not changed would not be written again.
        busy.guest.fill(NOISE, seed);
        let id = format!("cancel{seed}");
        client.save(&id, &id);
        let working = loop {
            let [job] = client.jobs().try_into().unwrap();
            if job.status == "concluded" || job.current > 0 {
                break job.status != "concluded";
            }
        };
        if working {
            client.cancel(&id);
            client.wait(&id, "concluded");
        }
        let [job] = client.jobs().try_into().unwrap();
        client.dismiss(&id);
        if let Some(error) = job.error {
            assert_eq!(error, "Operation canceled");
            assert_eq!(busy.vm.status(), "running");
            return;
        }
        client.delete("again", &id);
        concluded(client, "again");
    }
    panic!("no save could be cancelled");
}

/// Waits for a job that must succeed, and dismisses it.
fn concluded(client: &mut dyn Client, id: &str) {
    client.wait(id, "concluded");
    let [job] = client.jobs().try_into().unwrap();
    assert_eq!((job.id.as_str(), job.status.as_str(), &job.error), (id, "concluded", &None));
    client.dismiss(id);
}
