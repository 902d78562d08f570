//! What becomes of block jobs when the machine ends or is reset while they work and its guest writes: no image
//! is damaged, every job tells its end, and the process ends.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::path::Path;

use serde_json::{Value, json};
use tardigrade_tests::baremetal::Routine;
use tardigrade_tests::busy::{Busy, SLOW, check_image, check_whole};
use tardigrade_tests::disk::Disk;
use tardigrade_tests::{events, require};

/// A job on each of three disks, in the middle of its work, and what it works on.
struct Scene {
    busy: Busy,
    /// The image that the guest uses, of each disk.
    used: [Disk; 3],
    /// All others.
    others: Vec<Disk>,
    /// Ids of the jobs, of each disk.
    jobs: [&'static str; 3],
}

impl Scene {
    /// A mirror that copies, a stream that copies, and a commit that is ready.
    fn mirror_stream_commit(dir: &Path) -> Self {
        let mut busy = Busy::start(dir, 3);
        let target = busy.add_image("target");
        let base = |n| Disk { path: dir.join(format!("disk{n}.qcow2")), format: "qcow2" };
        let overlays = [busy.add_overlay("disk1", "over1"), busy.add_overlay("disk2", "over2")];
        let mirror = json!({
            "job-id": "mirror", "device": "disk0", "target": "target", "sync": "full", "speed": SLOW,
        });
        busy.run("blockdev-mirror", mirror);
        busy.run("block-stream", json!({"job-id": "stream", "device": "over1", "speed": SLOW}));
        busy.run("block-commit", json!({"job-id": "commit", "device": "over2"}));
        busy.wait_job_event("BLOCK_JOB_READY", "commit");
        let [over1, over2] = overlays;
        Self {
            busy,
            used: [base(0), over1, over2],
            others: vec![target, base(1), base(2)],
            jobs: ["mirror", "stream", "commit"],
        }
    }

    /// A backup that rests, a commit of a middle image that copies, and a mirror that is ready, to which
    /// each write goes at once.
    fn backup_commit_mirror(dir: &Path) -> Self {
        let mut busy = Busy::start(dir, 3);
        let targets = [busy.add_image("copy"), busy.add_image("target")];
        let base = |n| Disk { path: dir.join(format!("disk{n}.qcow2")), format: "qcow2" };
        let middle = busy.add_overlay("disk1", "middle");
        let top = busy.add_overlay("middle", "top");
        let backup = json!({
            "job-id": "backup", "device": "disk0", "target": "copy", "sync": "full", "speed": SLOW,
        });
        busy.run("blockdev-backup", backup);
        busy.run("job-pause", json!({"id": "backup"}));
        busy.wait_status("backup", "paused");
        let commit = json!({
            "job-id": "commit", "device": "top", "top-node": "middle", "speed": SLOW,
        });
        busy.run("block-commit", commit);
        let mirror = json!({
            "job-id": "mirror", "device": "disk2", "target": "target", "sync": "full",
            "copy-mode": "write-blocking",
        });
        busy.run("blockdev-mirror", mirror);
        busy.wait_job_event("BLOCK_JOB_READY", "mirror");
        let [copy, target] = targets;
        Self {
            busy,
            used: [base(0), top, base(2)],
            others: vec![copy, target, base(1), middle],
            jobs: ["backup", "commit", "mirror"],
        }
    }

    /// Three backups: one that waits to be finalized, and two that end together, of which one waits for
    /// the other.
    fn backups_that_wait(dir: &Path) -> Self {
        let mut busy = Busy::start(dir, 3);
        let copies = ["copy0", "copy1", "copy2"].map(|node| busy.add_image(node));
        let base = |n| Disk { path: dir.join(format!("disk{n}.qcow2")), format: "qcow2" };
        let backup = |n: usize, more: Value| {
            let mut all = json!({
                "job-id": format!("b{n}"), "device": format!("disk{n}"), "sync": "full",
                "target": format!("copy{n}"),
            });
            all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            all
        };
        busy.run("blockdev-backup", backup(0, json!({"auto-finalize": false})));
        let action = |data| json!({"type": "blockdev-backup", "data": data});
        let grouped = json!({
            "actions": [action(backup(1, json!({}))), action(backup(2, json!({"speed": SLOW})))],
            "properties": {"completion-mode": "grouped"},
        });
        busy.run("transaction", grouped);
        busy.wait_status("b0", "pending");
        busy.wait_status("b1", "waiting");
        Self {
            busy,
            used: [base(0), base(1), base(2)],
            others: copies.into(),
            jobs: ["b0", "b1", "b2"],
        }
    }

    /// Ends the machine by `how` while its guest writes; gives the events.
    fn end_by(mut self, how: impl FnOnce(&mut Busy)) {
        self.busy.goes_on();
        self.busy.qmp.take_events();
        let names = backing_names(&self.used);
        how(&mut self.busy);
        let told = self.busy.end();
        self.jobs.iter().for_each(|id| check_cancelled(&told, id));
        assert!(told.iter().any(|event| event["event"] == "SHUTDOWN"), "{told:?}");
        self.used.iter().for_each(check_whole);
        self.others.iter().for_each(Disk::check);
        assert_eq!(backing_names(&self.used), names);
    }

    /// `quit` while the guest has ended its writing, so that what its disks must have is known.
    fn quit_with_known_contents(mut self) {
        self.busy.goes_on();
        self.busy.stop_writing();
        let contents = self.busy.contents();
        let names = backing_names(&self.used);
        self.busy.qmp.take_events();
        self.busy.run("quit", json!({}));
        let told = self.busy.end();
        self.jobs.iter().for_each(|id| check_cancelled(&told, id));
        for (disk, contents) in self.used.iter().zip(&contents) {
            check_image(disk, contents);
        }
        self.others.iter().for_each(Disk::check);
        assert_eq!(backing_names(&self.used), names);
    }
}

/// What images name as the ones below them. The machine may have them open.
fn backing_names(disks: &[Disk]) -> Vec<Option<String>> {
    let name = |disk: &Disk| {
        let args = ["info", "-U", "--output=json", &disk.file()];
        let info: Value = serde_json::from_str(&tardigrade_tests::disk::qemu_img(&args)).unwrap();
        info["backing-filename"].as_str().map(str::to_owned)
    };
    disks.iter().map(name).collect()
}

/// The job has told that it was cancelled, once, and that it is gone.
fn check_cancelled(told: &[Value], id: &str) {
    let mut story = events::story(told, id);
    // The one that rests may tell that it goes on, to its end.
    story.retain(|event| event != "running");
    let ends = ["aborting", "concluded", "null"];
    story.retain(|event| ends.contains(&event.as_str()));
    assert_eq!(story, ends, "{id}: {told:?}");
    let cancelled =
        |event: &&Value| event["event"] == "BLOCK_JOB_CANCELLED" && event["data"]["device"] == id;
    assert_eq!(told.iter().filter(cancelled).count(), 1, "{id}: {told:?}");
}

#[test]
fn quit_ends_a_mirror_a_stream_and_a_commit_with_every_disk_as_its_guest_wrote_it() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    Scene::mirror_stream_commit(dir.path()).quit_with_known_contents();
}

#[test]
fn quit_ends_a_backup_a_commit_and_a_mirror_that_writes_go_to() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let scene = Scene::backup_commit_mirror(dir.path());
    scene.end_by(|busy| drop(busy.run("quit", json!({}))));
}

#[test]
fn quit_ends_jobs_that_wait_for_their_end() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    Scene::backups_that_wait(dir.path()).quit_with_known_contents();
}

#[test]
fn a_guest_that_powers_off_ends_all_jobs() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let scene = Scene::backup_commit_mirror(dir.path());
    scene.end_by(|busy| busy.guest.start(Routine::PortOut, &[0x600, 0x34]));
}

#[test]
fn a_signal_to_end_ends_all_jobs() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let scene = Scene::mirror_stream_commit(dir.path());
    scene.end_by(|busy| busy.vm.signal(libc::SIGTERM));
}

fn reset(busy: &mut Busy) {
    busy.goes_on();
    busy.run("system_reset", json!({}));
    busy.starts_again();
}

#[test]
fn a_reset_lets_a_mirror_a_stream_and_a_commit_go_on_to_a_good_end() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let Scene { mut busy, used, others, .. } = Scene::mirror_stream_commit(dir.path());
    reset(&mut busy);
    assert_eq!(busy.jobs(), ["commit", "stream", "mirror"]);
    busy.hurry("mirror");
    busy.wait_job_event("BLOCK_JOB_READY", "mirror");
    for id in ["mirror", "commit"] {
        busy.run("job-complete", json!({"id": id}));
        busy.wait_completed(id);
    }
    busy.hurry("stream");
    busy.wait_completed("stream");
    assert_eq!(busy.used_nodes(), ["target", "over1", "disk2"]);
    let contents = busy.finish();
    let [_, over1, over2] = &used;
    let [target, base1, base2] = others.as_slice() else { panic!() };
    check_image(target, &contents[0]);
    check_image(over1, &contents[1]);
    check_image(base2, &contents[2]);
    [base1, over2].iter().for_each(|disk| disk.check());
    assert_eq!(backing_names(std::slice::from_ref(over1)), [None]);
}

#[test]
fn a_reset_lets_a_backup_a_commit_and_a_mirror_go_on_to_a_good_end() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let Scene { mut busy, used, others, .. } = Scene::backup_commit_mirror(dir.path());
    reset(&mut busy);
    assert_eq!(busy.jobs(), ["mirror", "commit", "backup"]);
    busy.run("job-resume", json!({"id": "backup"}));
    for id in ["backup", "commit"] {
        busy.hurry(id);
        busy.wait_completed(id);
    }
    busy.run("job-complete", json!({"id": "mirror"}));
    busy.wait_completed("mirror");
    assert_eq!(busy.used_nodes(), ["disk0", "top", "target"]);
    let contents = busy.finish();
    let [base0, top, old] = &used;
    let [copy, target, base1, middle] = others.as_slice() else { panic!() };
    check_image(base0, &contents[0]);
    check_image(top, &contents[1]);
    check_image(target, &contents[2]);
    check_whole(copy);
    [old, base1, middle].iter().for_each(|disk| disk.check());
    assert_eq!(backing_names(std::slice::from_ref(top)), [Some(base1.file())]);
}
