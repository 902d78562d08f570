//! The machine's state in a transaction, and pauses of snapshot jobs, with a guest that writes all the time
//! to memory and disk and looks itself whether both are of one moment.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::path::Path;
use std::time::Duration;

use qmp::client::Client;
use serde_json::{Value, json};
use tardigrade_tests::baremetal::chains::Chains;
use tardigrade_tests::baremetal::{Monitor, machine, monitor};
use tardigrade_tests::disk::Disk;
use tardigrade_tests::vm::Vm;
use tardigrade_tests::{events, require};

const CHAINS: Chains = Chains { pages: 2000 };
const PATIENCE: Duration = Duration::from_secs(120);

struct Machine {
    vm: Vm,
    guest: Monitor,
    disks: Vec<Disk>,
}

impl Machine {
    /// Three vCPUs, and so many disks; one vCPU counts on disk0 and another one in memory.
    fn start(dir: &Path, disks: usize) -> Self {
        let path = |n| dir.join(format!("disk{n}.qcow2"));
        let disks: Vec<Disk> = (0..disks).map(|n| Disk::qcow2(path(n), "16M")).collect();
        let vm = disks.iter().fold(machine(dir, "64M", 3), |spec, disk| spec.disk(disk)).start();
        let mut guest = monitor(&vm);
        CHAINS.start(&mut guest);
        Self { vm, guest, disks }
    }

    /// Waits until every page and the disk were looked at and written.
    fn goes_on(&mut self) {
        CHAINS.go_on(&mut self.guest);
    }

    /// Ends the machine; the guest found nothing wrong.
    fn finish(mut self) -> Vec<Disk> {
        self.goes_on();
        CHAINS.stop(&mut self.guest);
        self.vm.quit();
        self.disks.iter().for_each(Disk::check);
        self.disks
    }

    fn tags(&self) -> Vec<Vec<String>> {
        let nodes =
            self.vm.qmp().execute("query-named-block-nodes", json!({"flat": true})).unwrap();
        let tags = |node: &Value| {
            let all = node["image"]["snapshots"].as_array().cloned().unwrap_or_default();
            all.iter().map(|s| s["name"].as_str().unwrap().to_owned()).collect()
        };
        let disk = |n| format!("disk{n}");
        let find = |n| nodes.as_array().unwrap().iter().find(|node| node["node-name"] == disk(n));
        (0..self.disks.len()).map(|n| tags(find(n).unwrap())).collect()
    }
}

#[allow(clippy::needless_pass_by_value, reason = "callers build it in place")]
fn action(kind: &str, data: Value) -> Value {
    json!({"type": kind, "data": data})
}

fn snapshot(disk: usize, name: &str) -> Value {
    action(
        "blockdev-snapshot-internal-sync",
        json!({"device": format!("disk{disk}"), "name": name}),
    )
}

fn transaction(qmp: &mut Client, actions: &[Value]) -> Result<(), String> {
    let result = qmp.execute("transaction", json!({"actions": actions}));
    result.map(drop).map_err(|error| error.to_string())
}

fn wait_status(qmp: &mut Client, id: &str, status: &str) {
    qmp.wait_event(PATIENCE, |event| {
        event["data"]["id"] == id && event["data"]["status"] == status
    })
    .unwrap();
}

fn job(qmp: &mut Client, id: &str) -> Value {
    let jobs = qmp.execute("query-jobs", json!({})).unwrap();
    jobs.as_array().unwrap().iter().find(|job| job["id"] == id).cloned().unwrap_or_default()
}

#[test]
fn the_machine_and_eight_disks_are_of_one_moment_with_one_pause() {
    if !require::kvm() {
        return;
    }
    const DISKS: usize = 8;
    let dir = tempfile::tempdir().unwrap();
    let mut machine = Machine::start(dir.path(), DISKS);
    let mut qmp = machine.vm.qmp();
    for round in 0..3 {
        let (tag, id) = (format!("t{round}"), format!("j{round}"));
        let state = json!({"node": "disk0", "tag": tag, "job-id": id, "description": "group"});
        let mut actions = vec![action("x-vmstate-save", state)];
        actions.extend((1..DISKS).map(|disk| snapshot(disk, &tag)));
        actions.push(action(
            "block-dirty-bitmap-add",
            json!({"node": "disk0", "name": format!("since-{tag}")}),
        ));
        transaction(&mut qmp, &actions).unwrap();
        wait_status(&mut qmp, &id, "concluded");
        let told = events::story(&qmp.take_events(), &id);
        assert_eq!(told, ["created", "running", "STOP", "RESUME", "waiting", "pending"]);
        let done = job(&mut qmp, &id);
        assert_eq!(done["error"], Value::Null, "{done}");
        assert_eq!(done["type"], "snapshot-save");
        let stats = qmp.execute("x-query-checkpoint-stats", json!({})).unwrap();
        assert_eq!(stats["saves"], round + 1, "one pause each: {stats}");
        println!("pause of {DISKS} disks: {} ns", done["x-pause-ns"]);
        machine.goes_on();
    }
    assert!(machine.tags().iter().all(|tags| *tags == ["t0", "t1", "t2"]));
    let names: Vec<String> = (0..DISKS).map(|n| format!("disk{n}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    for tag in ["t1", "t0", "t2"] {
        machine.vm.load(tag, &names);
        machine.goes_on();
    }
    machine.finish();
}

#[test]
fn a_transaction_without_a_job_id_is_answered_when_all_is_written() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut machine = Machine::start(dir.path(), 3);
    let mut qmp = machine.vm.qmp();
    let state = action("x-vmstate-save", json!({"node": "disk0", "tag": "t"}));
    // A snapshot of another name is at the same moment, and no part of the checkpoint.
    // That of the node with the state is the checkpoint's own.
    let disks = [snapshot(0, "t"), snapshot(1, "t"), state, snapshot(2, "apart")];
    transaction(&mut qmp, &disks).unwrap();
    assert_eq!(machine.tags(), [["t"], ["t"], ["apart"]]);
    assert_eq!(qmp.execute("query-jobs", json!({})).unwrap(), json!([]));
    let jobs = qmp.take_events();
    assert!(jobs.iter().all(|event| event["event"] != "JOB_STATUS_CHANGE"), "{jobs:?}");
    machine.vm.load("t", &["disk0", "disk1"]);
    machine.finish();
}

#[test]
fn a_transaction_that_fails_leaves_guest_disks_and_bitmaps_as_they_were() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let machine = Machine::start(dir.path(), 2);
    let mut qmp = machine.vm.qmp();
    let bitmap =
        |name: &str| action("block-dirty-bitmap-add", json!({"node": "disk1", "name": name}));
    let state = |id: Option<&str>| {
        let mut data = json!({"node": "disk0", "tag": "t"});
        if let Some(id) = id {
            data["job-id"] = json!(id);
        }
        action("x-vmstate-save", data)
    };
    transaction(&mut qmp, &[bitmap("taken")]).unwrap();
    for id in [None, Some("j")] {
        for (actions, text) in [
            (vec![snapshot(1, "t"), state(id), action("abort", json!({}))], "Abort action"),
            (vec![state(id), snapshot(1, "other"), snapshot(1, "")], "Name is empty"),
            (vec![bitmap("b"), snapshot(1, "x"), state(id), bitmap("taken")], "already exists"),
            (vec![state(id), state(id)], "one x-vmstate-save"),
            (vec![state(id), snapshot(7, "t")], "disk7"),
        ] {
            let error = transaction(&mut qmp, &actions).unwrap_err();
            assert!(error.contains(text), "{error}");
            assert_eq!(machine.tags(), [[""; 0]; 2]);
            assert_eq!(qmp.execute("query-jobs", json!({})).unwrap(), json!([]));
            assert_eq!(machine.vm.status(), "running");
        }
    }
    let grouped = json!({"actions": [state(None)], "properties": {"completion-mode": "grouped"}});
    let error = qmp.execute("transaction", grouped).unwrap_err().to_string();
    assert!(error.contains("does not support transaction property"), "{error}");
    let nodes = qmp.execute("query-named-block-nodes", json!({"flat": true})).unwrap();
    let disk1 = nodes.as_array().unwrap().iter().find(|n| n["node-name"] == "disk1").unwrap();
    assert_eq!(disk1["dirty-bitmaps"].as_array().unwrap().len(), 1, "{disk1}");
    machine.finish();
}

/// Starts a save and has it rest, the guest running; tries again where it was too quick.
fn paused_save(machine: &Machine, qmp: &mut Client, name: &str) -> String {
    for round in 0..200 {
        let id = format!("{name}{round}");
        let mut arguments = events::target(&id, &["disk0"]);
        arguments["job-id"] = json!(id);
        qmp.execute("snapshot-save", arguments).unwrap();
        let paused = qmp.execute("job-pause", json!({"id": id}));
        let ends = |event: &Value| {
            event["data"]["id"] == id.as_str()
                && (event["data"]["status"] == "paused" || event["data"]["status"] == "concluded")
        };
        let event = qmp.wait_event(PATIENCE, ends).unwrap();
        if paused.is_ok() && event["data"]["status"] == "paused" {
            return id;
        }
        qmp.execute("job-dismiss", json!({"id": id})).unwrap();
    }
    panic!("no save could be paused: {}", machine.vm.stderr());
}

#[test]
fn a_save_rests_and_goes_on_or_ends_with_the_guest_running() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut machine = Machine::start(dir.path(), 1);
    let mut qmp = machine.vm.qmp();
    let id = paused_save(&machine, &mut qmp, "p");
    assert_eq!(job(&mut qmp, &id)["status"], "paused");
    machine.goes_on();
    assert_eq!(machine.vm.status(), "running");
    assert!(qmp.execute("job-pause", json!({"id": id})).is_err(), "it is paused already");
    qmp.execute("job-resume", json!({"id": id})).unwrap();
    wait_status(&mut qmp, &id, "concluded");
    assert_eq!(job(&mut qmp, &id)["error"], Value::Null);
    machine.vm.load(&id, &["disk0"]);
    machine.goes_on();
    let before = machine.tags();
    let id = paused_save(&machine, &mut qmp, "q");
    qmp.execute("job-cancel", json!({"id": id})).unwrap();
    wait_status(&mut qmp, &id, "concluded");
    assert_eq!(job(&mut qmp, &id)["error"], "Operation canceled");
    let after = machine.tags();
    assert!(after[0].starts_with(&before[0]) && !after[0].contains(&id), "{after:?}");
    machine.finish();
}
