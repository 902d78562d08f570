//! Several QMP clients and several jobs, on a machine at work.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use qmp::client::Client;
use serde_json::{Value, json};
use tardigrade_tests::checkpoint::{Booted, TAG};
use tardigrade_tests::disk::Disk;
use tardigrade_tests::events::story;
use tardigrade_tests::vm::{CMDLINE, Vm, VmSpec};
use tardigrade_tests::{pattern, repo, require};

const ONE: Booted = Booted { vcpus: 1, disks: 1 };
const PATIENCE: Duration = Duration::from_secs(120);

/// Bytes of guest memory that a checkpoint of [`full`] has to write.
const FULL: usize = 192 << 20;

/// A machine whose checkpoint takes a good while, for tests that must be there in the middle of it:
/// an initial ramdisk of noise fills its memory. It runs, in the first steps of its kernel's boot.
fn full(dir: &Path) -> Vm {
    let noise = dir.join("noise");
    std::fs::write(&noise, pattern::bytes(1, 0, FULL)).unwrap();
    let kernel = repo("resources/guest/tiny.bzImage").display().to_string();
    let disk = Disk::qcow2(dir.join("disk0.qcow2"), "64M");
    let args = ["--kernel", &kernel, "--initrd", &noise.display().to_string(), "--append", CMDLINE];
    VmSpec::new("384M", 1).args(&args).disk(&disk).start()
}

fn save(id: &str, tag: &str) -> Value {
    json!({ "job-id": id, "tag": tag, "vmstate": "disk0", "devices": ["disk0"] })
}

fn wait_for(qmp: &mut Client, name: &str) {
    qmp.wait_event(PATIENCE, |event| event["event"] == name).unwrap();
}

/// Waits for the end of job `id`; gives its error.
fn wait_for_job(qmp: &mut Client, id: &str) -> Option<String> {
    loop {
        let jobs = qmp.execute("query-jobs", json!({})).unwrap();
        let job = jobs.as_array().unwrap().iter().find(|job| job["id"] == id).unwrap();
        if job["status"] == "concluded" {
            return job["error"].as_str().map(str::to_owned);
        }
        qmp.wait_event(PATIENCE, |event| {
            event["data"]["id"] == id && event["data"]["status"] == "concluded"
        })
        .unwrap();
    }
}

/// All commands in one write, so that nothing comes between them: the answers, in order.
fn at_once(vm: &Vm, commands: &[Value]) -> Vec<Value> {
    let mut stream = UnixStream::connect(vm.qmp_path()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let negotiation = json!({ "execute": "qmp_capabilities" });
    let lines: String = std::iter::once(&negotiation)
        .chain(commands)
        .map(|command| format!("{command}\n"))
        .collect();
    stream.write_all(lines.as_bytes()).unwrap();
    let messages = BufReader::new(stream).lines().map(|line| line.unwrap());
    let answers = messages
        .map(|line| serde_json::from_str::<Value>(&line).unwrap())
        .filter(|message| message.get("return").is_some() || message.get("error").is_some());
    answers.skip(1).take(commands.len()).collect()
}

#[allow(clippy::needless_pass_by_value, reason = "callers build the arguments in place")]
fn command(name: &str, arguments: Value) -> Value {
    json!({ "execute": name, "arguments": arguments })
}

/// The machine's image at the end.
fn check(dir: &Path, tags: &[&str]) -> Disk {
    let disk = ONE.disks(dir).remove(0);
    assert_eq!(disk.tags(), tags);
    disk.check();
    disk
}

#[test]
fn others_are_answered_at_once_while_a_save_works() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let vm = full(dir.path());
    let (mut saver, mut looker) = (vm.qmp(), vm.qmp());
    let started = Instant::now();
    // A live save stands still too shortly to be watched.
    let mut arguments = save("j", "watched");
    arguments["x-mode"] = json!("stop");
    saver.execute("snapshot-save", arguments).unwrap();
    let mut seen = Vec::new();
    let mut slowest = Duration::ZERO;
    loop {
        let asked = Instant::now();
        let status = looker.execute("query-status", json!({})).unwrap();
        slowest = slowest.max(asked.elapsed());
        let jobs = looker.execute("query-jobs", json!({})).unwrap();
        seen.push((status, jobs[0].clone()));
        if jobs[0]["status"] == "concluded" {
            break;
        }
    }
    let took = started.elapsed();
    let during: Vec<_> = seen.iter().filter(|(status, _)| status["status"] == "save-vm").collect();
    assert!(during.len() >= 2, "save-vm was seen {} times of {}", during.len(), seen.len());
    assert!(during.iter().all(|(status, _)| status["running"] == false));
    assert!(slowest < took, "a query waited {slowest:?}, the whole save took {took:?}");
    // Bytes, more and more of them, up to all.
    let progress: Vec<u64> =
        seen.iter().map(|(_, job)| job["current-progress"].as_u64().unwrap()).collect();
    assert!(progress.is_sorted(), "{progress:?}");
    let last = &seen.last().unwrap().1;
    assert_eq!(last["current-progress"], last["total-progress"]);
    assert!(last["total-progress"].as_u64().unwrap() >= FULL as u64, "{last}");

    // Both have been told the same, in the same order.
    let told = |qmp: &mut Client| {
        let _ = qmp.execute("query-status", json!({})).unwrap();
        story(&qmp.take_events(), "j")
    };
    let expected = ["created", "running", "STOP", "RESUME", "waiting", "pending", "concluded"];
    assert_eq!(told(&mut saver), expected);
    assert_eq!(told(&mut looker), expected);
    // Any client may end what another began; one that comes later sees it as it is.
    drop(saver);
    looker.execute("job-dismiss", json!({ "id": "j" })).unwrap();
    assert_eq!(vm.qmp().execute("query-jobs", json!({})).unwrap(), json!([]));
    vm.quit();
    check(dir.path(), &["watched"]);
}

#[test]
fn a_client_that_leaves_does_not_end_its_job() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let vm = ONE.start(dir.path());
    let mut saver = vm.qmp();
    saver.execute("snapshot-save", save("j", "orphan")).unwrap();
    drop(saver);
    let mut other = vm.qmp();
    assert_eq!(wait_for_job(&mut other, "j"), None);
    vm.quit();
    check(dir.path(), &[TAG, "orphan"]);
}

#[test]
fn stop_and_cont_during_a_save_decide_how_it_ends() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let vm = ONE.start(dir.path());
    let (mut saver, mut other) = (vm.qmp(), vm.qmp());
    for (tag, commands, end) in [
        ("stopped", vec!["stop"], "paused"),
        ("resumed", vec!["cont"], "running"),
        ("both", vec!["stop", "cont"], "running"),
        ("halted", vec!["cont", "stop"], "paused"),
    ] {
        let before = vm.status();
        saver.execute("snapshot-save", save("j", tag)).unwrap();
        if before == "running" {
            wait_for(&mut other, "STOP");
        }
        for command in commands {
            assert_eq!(other.execute(command, json!({})).unwrap(), json!({}));
        }
        assert_eq!(wait_for_job(&mut saver, "j"), None);
        saver.execute("job-dismiss", json!({ "id": "j" })).unwrap();
        assert_eq!(vm.status(), end, "{tag}: it was {before}");
        // As many stops as changes need, whatever happened in between.
        let events = story(&saver.take_events(), "j");
        let count = |name: &str| events.iter().filter(|event| *event == name).count();
        let (stops, resumes) = (count("STOP"), count("RESUME"));
        let runs = |status: &str| usize::from(status == "running");
        assert_eq!(runs(&before) + resumes, runs(end) + stops, "{tag}: {events:?}");
        other.take_events();
    }
    other.execute("cont", json!({})).unwrap();
    assert_eq!(vm.agent().ask("echo alive"), "alive");
    vm.quit();
    check(dir.path(), &[TAG, "stopped", "resumed", "both", "halted"]);
}

#[test]
fn a_reset_during_a_save_comes_after_it() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut vm = ONE.start(dir.path());
    let mut agent = vm.agent();
    agent.ask("dirty 1 3");
    let (mut saver, mut other) = (vm.qmp(), vm.qmp());
    saver.execute("snapshot-save", save("j", "kept")).unwrap();
    wait_for(&mut other, "STOP");
    other.execute("system_reset", json!({})).unwrap();
    assert_eq!(wait_for_job(&mut saver, "j"), None);
    let reset = other.wait_event(PATIENCE, |event| event["event"] == "RESET").unwrap();
    assert_eq!(reset["data"], json!({ "guest": false, "reason": "host-qmp-system-reset" }));
    assert_eq!(vm.status(), "running");
    // What was saved is the guest before the reset.
    vm.load("kept", &["disk0"]);
    assert_eq!(agent.number("check-memory", "seed"), 3);
    vm.quit();
    check(dir.path(), &[TAG, "kept"]);
}

#[test]
fn a_cancelled_save_leaves_no_snapshot_and_no_cluster_behind() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let vm = full(dir.path());
    let mut qmp = vm.qmp();
    // At once: cancelled before the guest is even stopped, or just then.
    let answers = at_once(
        &vm,
        &[
            command("snapshot-save", save("j", "never")),
            command("job-cancel", json!({ "id": "j" })),
        ],
    );
    assert_eq!(answers, [json!({ "return": {} }), json!({ "return": {} })]);
    assert_eq!(wait_for_job(&mut qmp, "j").as_deref(), Some("Operation canceled"));
    // Waiting for the job took `concluded`. Whether the guest was stopped is a matter of luck.
    let mut events = story(&qmp.take_events(), "j");
    events.retain(|event| event != "STOP" && event != "RESUME");
    assert_eq!(events, ["created", "running", "aborting"]);
    qmp.execute("job-dismiss", json!({ "id": "j" })).unwrap();
    assert_eq!(vm.status(), "running");

    // In the middle of writing: when the guest has been stopped for it.
    qmp.execute("snapshot-save", save("j", "never")).unwrap();
    wait_for(&mut qmp, "STOP");
    qmp.execute("job-cancel", json!({ "id": "j" })).unwrap();
    assert_eq!(wait_for_job(&mut qmp, "j").as_deref(), Some("Operation canceled"));
    wait_for(&mut qmp, "RESUME");
    let refused = qmp.execute("job-cancel", json!({ "id": "j" })).unwrap_err().to_string();
    assert!(
        refused.contains("in state 'concluded' cannot accept command verb 'cancel'"),
        "{refused}"
    );
    qmp.execute("job-dismiss", json!({ "id": "j" })).unwrap();
    assert_eq!(vm.status(), "running");
    vm.quit();
    let disk = check(dir.path(), &[]);
    // Nothing of what was written is kept: the image is as small as a new one.
    assert!(disk.allocated() < 4 << 20, "{} bytes", disk.allocated());
}

#[test]
fn jobs_wait_for_each_other_and_a_waiting_one_can_be_cancelled() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let vm = full(dir.path());
    let mut qmp = vm.qmp();
    let answers = at_once(
        &vm,
        &[
            command("snapshot-save", save("first", "one")),
            command("snapshot-save", save("second", "two")),
            command("snapshot-save", save("third", "one")),
            command("snapshot-save", save("second", "other")),
            command("job-cancel", json!({ "id": "second" })),
            command("query-jobs", json!({})),
        ],
    );
    assert_eq!(answers[3]["error"]["desc"], "Job ID 'second' already in use");
    assert_eq!(answers[4], json!({ "return": {} }));
    let jobs = answers[5]["return"].as_array().unwrap();
    let states: Vec<_> = jobs
        .iter()
        .map(|job| (job["id"].as_str().unwrap(), job["status"].as_str().unwrap()))
        .collect();
    // Newest first.
    assert_eq!(states, [("third", "created"), ("second", "concluded"), ("first", "running")]);
    assert_eq!(wait_for_job(&mut qmp, "first"), None);
    assert_eq!(wait_for_job(&mut qmp, "second").as_deref(), Some("Operation canceled"));
    // Checked when its turn comes: by then the tag is taken.
    let error = wait_for_job(&mut qmp, "third").unwrap();
    assert_eq!(error, "Snapshot 'one' already exists in one or more devices: 'disk0'");
    assert_eq!(vm.status(), "running");
    vm.quit();
    check(dir.path(), &["one"]);
}
