//! The guest's clocks around checkpoints and stops: `docs/checkpoints.md`, "Time".
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::time::{Duration, Instant};

use serde_json::json;
use tardigrade_tests::agent::Agent;
use tardigrade_tests::checkpoint::Booted;
use tardigrade_tests::events::target;
use tardigrade_tests::require;

const ONE: Booted = Booted { vcpus: 1, disks: 1 };
const TWO: Booted = Booted { vcpus: 2, disks: 2 };

/// What the guest's clock may be ahead of the host's over the few seconds of a test: the guest
/// converts cycles to time with its own factor, and reads it after it was asked.
const TOLERANCE: Duration = Duration::from_millis(200);

/// A clock of the guest, and a moment of the host after it was read.
struct Reading {
    monotonic: Duration,
    realtime: Duration,
    asked: Instant,
    answered: Instant,
}

fn read(agent: &mut Agent) -> Reading {
    let asked = Instant::now();
    let clock = agent.fields("clock");
    let answered = Instant::now();
    let nanos = |name: &str| Duration::from_nanos(clock[name].parse().unwrap());
    Reading { monotonic: nanos("monotonic"), realtime: nanos("realtime"), asked, answered }
}

/// Lets the guest run until its clock has gone on by `time`.
fn run_for(agent: &mut Agent, time: Duration) -> Reading {
    let start = read(agent);
    loop {
        let now = read(agent);
        if now.monotonic >= start.monotonic + time {
            return now;
        }
    }
}

/// Panics unless `later` is where a guest's clock is that went on from `earlier` and ran for
/// `ran` at most.
fn assert_went_on(earlier: &Reading, later: &Reading, ran: Duration) {
    for (name, before, after) in [
        ("monotonic", earlier.monotonic, later.monotonic),
        ("realtime", earlier.realtime, later.realtime),
    ] {
        assert!(after > before, "{name} went back from {before:?} to {after:?}");
        let passed = after.checked_sub(before).unwrap();
        assert!(passed <= ran + TOLERANCE, "{name} jumped: {passed:?} passed in {ran:?}");
    }
}

#[test]
fn clocks_go_on_from_the_save_after_a_load() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut vm = TWO.start(dir.path());
    let nodes = ["disk0", "disk1"];
    let mut agent = vm.agent();
    for round in 0..2 {
        let tag = format!("clock{round}");
        let before = read(&mut agent);
        vm.save(&tag, &nodes);
        let until_saved = before.asked.elapsed();
        // The save took time that the guest must not have noticed more than the host.
        let saved = read(&mut agent);
        assert_went_on(&before, &saved, saved.answered - before.asked);

        let ahead = run_for(&mut agent, until_saved + Duration::from_secs(2));
        let loading = Instant::now();
        vm.load(&tag, &nodes);
        let after = read(&mut agent);
        // Between the two readings the guest ran up to the save, and from the load on.
        assert_went_on(&before, &after, until_saved + loading.elapsed());
        assert!(after.monotonic < ahead.monotonic, "the clock was not taken back");
        // Time still passes, on both vCPUs' clocks, at the host's pace.
        let later = run_for(&mut agent, Duration::from_secs(1));
        assert_went_on(&after, &later, later.answered - after.asked);
    }
    vm.quit();
}

#[test]
fn clocks_go_on_from_the_save_in_a_new_process() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut vm = ONE.start(dir.path());
    let mut agent = vm.agent();
    let before = read(&mut agent);
    vm.save("asleep", &["disk0"]);
    let until_saved = before.asked.elapsed();
    run_for(&mut agent, Duration::from_secs(2));
    vm.quit();

    let starting = Instant::now();
    let disks = ONE.disks(dir.path());
    let vm = ONE.machine(&disks).args(&["--loadvm", "asleep"]).start();
    let mut agent = vm.agent();
    let after = read(&mut agent);
    assert_went_on(&before, &after, until_saved + starting.elapsed());
    let later = run_for(&mut agent, Duration::from_secs(1));
    assert_went_on(&after, &later, later.answered - after.asked);
    vm.quit();
}

#[test]
fn the_time_of_day_is_right_after_a_load_that_sets_the_clocks_forward() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut vm = ONE.start(dir.path());
    let mut agent = vm.agent();
    let before = read(&mut agent);
    // The guest stands still for long, which counts too.
    let mut arguments = target("lunch", &["disk0"]);
    arguments["x-mode"] = json!("stop");
    vm.job_with("snapshot-save", arguments.clone()).unwrap();
    run_for(&mut agent, Duration::from_secs(2));
    arguments["x-mode"] = json!("lazy");
    arguments["x-clock"] = json!("host");
    vm.job_with("snapshot-load", arguments).unwrap();
    let after = read(&mut agent);
    let passed = after.realtime.checked_sub(before.realtime).unwrap();
    let least = (after.asked - before.answered).checked_sub(TOLERANCE).unwrap();
    assert!(passed >= least, "{passed:?} passed in {least:?} at least");
    let most = after.answered - before.asked + TOLERANCE;
    assert!(passed <= most, "{passed:?} passed in {most:?} at most");
    // Time goes on as ever.
    let later = run_for(&mut agent, Duration::from_secs(1));
    assert_went_on(&after, &later, later.answered - after.asked);
    vm.quit();
}

#[test]
fn a_stopped_guest_does_not_age() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let vm = TWO.start(dir.path());
    let mut qmp = vm.qmp();
    let mut agent = vm.agent();
    for _ in 0..2 {
        let before = read(&mut agent);
        qmp.execute("stop", json!({})).unwrap();
        let stopped = Instant::now();
        // Not waiting for anything: the time itself is what the guest must not see.
        std::thread::sleep(Duration::from_secs(2));
        let pause = stopped.elapsed();
        qmp.execute("cont", json!({})).unwrap();
        let after = read(&mut agent);
        assert_went_on(&before, &after, after.answered - before.asked - pause);
    }
    vm.quit();
}
