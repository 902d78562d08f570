//! Migrations of a guest that writes all the time to memory and disk, and looks whether all it finds is of
//! one moment: see `chain` and `disk_chain` in `guest.s`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use qmp::client::Client;
use serde_json::{Value, json};
use tardigrade_tests::baremetal::chains::Chains;
use tardigrade_tests::baremetal::{Monitor, machine, machine_with_disk, monitor};
use tardigrade_tests::disk::Disk;
use tardigrade_tests::require;
use tardigrade_tests::vm::{Vm, VmSpec};

const CHAINS: Chains = Chains { pages: 2000 };
const PATIENCE: Duration = Duration::from_secs(120);

struct Bench {
    dir: tempfile::TempDir,
    spec: VmSpec,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let spec = machine_with_disk(dir.path(), "64M", 3);
        Self { dir, spec }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn uri(&self, protocol: &str, name: &str) -> String {
        format!("{protocol}:{}", self.path(name).display())
    }

    /// The guest with its chains at work.
    fn start(&self) -> (Vm, Monitor) {
        let vm = self.spec.start();
        let mut guest = monitor(&vm);
        CHAINS.start(&mut guest);
        (vm, guest)
    }

    /// A guest with its chains at work goes to a file of that name and its process ends; gives the file's URI.
    fn migrate_to_file(&self, name: &str) -> String {
        let uri = self.uri("file", name);
        let (vm, guest) = self.start();
        drop(guest);
        let mut qmp = with_events(&vm);
        unlimited(&mut qmp);
        qmp.execute("migrate", json!({ "uri": uri })).unwrap();
        wait_for(&mut qmp, "completed");
        vm.quit();
        uri
    }

    fn incoming(&self, uri: &str) -> Vm {
        self.spec.clone().args(&["--incoming", uri]).start()
    }

    fn check(self) {
        Disk { path: self.path("disk0.qcow2"), format: "qcow2" }.check();
    }
}

/// The machine goes on with all it had.
fn goes_on(vm: &Vm) {
    let mut guest = Monitor::connect(vm.serial_path());
    CHAINS.go_on(&mut guest);
    CHAINS.stop(&mut guest);
}

fn with_events(vm: &Vm) -> Client {
    let mut qmp = vm.qmp();
    let events = json!({ "capabilities": [{ "capability": "events", "state": true }] });
    qmp.execute("migrate-set-capabilities", events).unwrap();
    qmp
}

/// Waits until the migration is in that state; gives the names of the events up to then.
fn wait_for(qmp: &mut Client, status: &str) -> Vec<String> {
    let mut told = Vec::new();
    let over = |event: &Value| {
        let name = event["event"].as_str().unwrap().to_owned();
        let now = event["data"]["status"].as_str().map(str::to_owned);
        let over = name == "MIGRATION" && now.as_deref() == Some(status);
        assert!(over || now.as_deref() != Some("failed"), "it failed: {event}");
        told.push(now.filter(|_| name == "MIGRATION").unwrap_or(name));
        over
    };
    qmp.wait_event(PATIENCE, over).unwrap();
    told.retain(|name| name != "MIGRATION_PASS");
    told
}

fn wait_for_end(vm: &Vm, status: &str) {
    let mut qmp = vm.qmp();
    loop {
        let info = qmp.execute("query-migrate", json!({})).unwrap();
        if info["status"] == status {
            return;
        }
        assert!(info["status"] != "failed", "{info}; {}", vm.stderr());
        std::thread::yield_now();
    }
}

/// As fast as can be; the disk is slow in tests side by side.
fn unlimited(qmp: &mut Client) {
    qmp.execute("migrate-set-parameters", json!({ "max-bandwidth": 0 })).unwrap();
}

fn damage(path: &Path, at: u64) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

#[test]
fn a_guest_goes_on_from_a_file_and_from_a_command_with_its_disk() {
    if !require::kvm() {
        return;
    }
    let bench = Bench::new();
    let ways = [
        (bench.uri("file", "plain"), bench.uri("file", "plain")),
        (
            format!("exec:gzip -1 > {}", bench.path("packed").display()),
            format!("exec:gzip -dc {}", bench.path("packed").display()),
        ),
        (bench.uri("file", "plain") + ",offset=0x3000", bench.uri("file", "plain") + ",offset=12k"),
    ];
    let (mut vm, guest) = bench.start();
    drop(guest);
    for (to, from) in ways {
        let mut qmp = with_events(&vm);
        unlimited(&mut qmp);
        qmp.execute("migrate", json!({ "uri": to })).unwrap();
        let told = wait_for(&mut qmp, "completed");
        assert_eq!(told, ["setup", "active", "STOP", "device", "completed"]);
        assert_eq!(vm.status(), "postmigrate");
        let info = qmp.execute("query-migrate", json!({})).unwrap();
        assert!(info["ram"]["normal"].as_u64().unwrap() > CHAINS.pages, "{info}");
        assert_eq!(info["ram"]["remaining"], 0);
        // The disk is the target's before the source has ended.
        let target = bench.incoming(&from);
        wait_for_end(&target, "completed");
        assert_eq!(target.status(), "running");
        let error = qmp.execute("cont", json!({})).unwrap_err().to_string();
        assert!(error.contains("Failed to get"), "{error}");
        vm.quit();
        let mut guest = Monitor::connect(target.serial_path());
        CHAINS.go_on(&mut guest);
        vm = target;
    }
    goes_on(&vm);
    vm.quit();
    bench.check();
}

#[test]
fn nodes_may_have_other_names_where_a_guest_arrives() {
    if !require::kvm() {
        return;
    }
    let bench = Bench::new();
    let uri = bench.migrate_to_file("stream");
    let disk = format!(
        "driver=qcow2,node-name=other,file.driver=file,file.filename={}",
        bench.path("disk0.qcow2").display()
    );
    let args = ["--blockdev", &disk, "--device", "virtio-blk-device,drive=other,serial=disk0"];
    let target = machine(bench.dir.path(), "64M", 3).args(&args).args(&["--incoming", &uri]);
    let target = target.start();
    wait_for_end(&target, "completed");
    goes_on(&target);
    target.quit();
    bench.check();
}

#[test]
fn a_guest_goes_from_process_to_process_and_can_be_saved_there() {
    if !require::kvm() {
        return;
    }
    let bench = Bench::new();
    let (mut vm, guest) = bench.start();
    drop(guest);
    vm.save("before", &["disk0"]);
    for n in 0..3 {
        let target = bench.incoming("defer");
        assert_eq!(target.status(), "inmigrate");
        let refused = target.qmp().execute(
            "blockdev-snapshot-internal-sync",
            json!({ "device": "disk0", "name": "too-early" }),
        );
        refused.unwrap_err();
        let mut there = with_events(&target);
        let socket = bench.path(&format!("socket{n}"));
        let address = json!({ "channels": [{ "channel-type": "main",
            "addr": { "transport": "socket", "type": "unix", "path": socket } }] });
        there.execute("migrate-incoming", address.clone()).unwrap();
        let mut here = with_events(&vm);
        unlimited(&mut here);
        here.execute("migrate", address).unwrap();
        wait_for(&mut here, "completed");
        assert_eq!(wait_for(&mut there, "completed"), ["setup", "active", "RESUME", "completed"]);
        vm.quit();
        vm = target;
        CHAINS.go_on(&mut Monitor::connect(vm.serial_path()));
        vm.save(&format!("t{n}"), &["disk0"]);
    }
    vm.load("t0", &["disk0"]);
    goes_on(&vm);
    vm.quit();
    bench.check();
}

#[test]
fn after_a_failure_or_a_cancel_the_guest_goes_on_as_before() {
    if !require::kvm() {
        return;
    }
    let bench = Bench::new();
    let (mut vm, mut guest) = bench.start();
    vm.save("base", &["disk0"]);
    unlimited(&mut vm.qmp());
    let failing = [
        "exec:false".to_owned(),
        "exec:cat > /dev/null; exit 3".to_owned(),
        "file:/dev/full".to_owned(),
        bench.uri("unix", "nobody"),
    ];
    for uri in failing {
        let mut qmp = with_events(&vm);
        qmp.execute("migrate", json!({ "uri": uri })).unwrap();
        wait_for(&mut qmp, "failed");
        let info = qmp.execute("query-migrate", json!({})).unwrap();
        assert!(info["error-desc"].as_str().is_some_and(|text| !text.is_empty()), "{info}");
        CHAINS.go_on(&mut guest);
        assert_eq!(vm.status(), "running");
    }
    // In the middle: the command reads nothing.
    let mut qmp = with_events(&vm);
    qmp.execute("migrate", json!({ "uri": "exec:sleep 1000" })).unwrap();
    wait_for(&mut qmp, "active");
    let refused = qmp.execute("migrate", json!({ "uri": "exec:true" })).unwrap_err().to_string();
    assert!(refused.contains("There's a migration process in progress"), "{refused}");
    let save = json!({ "job-id": "j", "tag": "x", "vmstate": "disk0", "devices": ["disk0"] });
    qmp.execute("snapshot-save", save).unwrap_err();
    CHAINS.go_on(&mut guest);
    qmp.execute("migrate_cancel", json!({})).unwrap();
    let told = wait_for(&mut qmp, "cancelled");
    assert!(told.ends_with(&["cancelling".to_owned(), "cancelled".to_owned()]), "{told:?}");
    // At the very end: it has read all, and does not end.
    let mut qmp = with_events(&vm);
    qmp.execute("migrate", json!({ "uri": "exec:cat > /dev/null; sleep 1000" })).unwrap();
    wait_for(&mut qmp, "device");
    qmp.execute("migrate_cancel", json!({})).unwrap();
    wait_for(&mut qmp, "cancelled");
    CHAINS.go_on(&mut guest);
    // What was taken from the dirty pages has come back.
    vm.save("after", &["disk0"]);
    vm.load("after", &["disk0"]);
    drop(guest);
    goes_on(&vm);
    vm.quit();
    bench.check();
}

#[test]
fn a_peer_that_goes_away_and_a_disk_in_use_are_failures() {
    if !require::kvm() {
        return;
    }
    let bench = Bench::new();
    let (vm, mut guest) = bench.start();
    let mut qmp = with_events(&vm);
    let socket = bench.path("s");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    qmp.execute("migrate", json!({ "uri": bench.uri("unix", "s") })).unwrap();
    drop(listener.accept().unwrap());
    wait_for(&mut qmp, "failed");
    CHAINS.go_on(&mut guest);
    // A job works on the disk until it is told to end.
    let mirror = json!({ "job-id": "m", "device": "disk0", "target": "to", "sync": "full" });
    let to = Disk::qcow2(bench.path("to.qcow2"), "16M");
    let node = json!({ "driver": "qcow2", "node-name": "to",
        "file": { "driver": "file", "filename": to.path } });
    qmp.execute("blockdev-add", node).unwrap();
    qmp.execute("blockdev-mirror", mirror).unwrap();
    unlimited(&mut qmp);
    qmp.execute("migrate", json!({ "uri": bench.uri("file", "f") })).unwrap();
    wait_for(&mut qmp, "failed");
    let info = qmp.execute("query-migrate", json!({})).unwrap();
    assert!(info["error-desc"].as_str().unwrap().contains("is busy"), "{info}");
    CHAINS.go_on(&mut guest);
    qmp.execute("job-cancel", json!({ "id": "m" })).unwrap();
    qmp.wait_event(PATIENCE, |event| event["data"]["status"] == "null").unwrap();
    // A stream that is kept: the guest goes on here, too.
    qmp.execute("migrate", json!({ "uri": bench.uri("file", "f") })).unwrap();
    wait_for(&mut qmp, "completed");
    qmp.execute("cont", json!({})).unwrap();
    CHAINS.go_on(&mut guest);
    CHAINS.stop(&mut guest);
    drop(guest);
    vm.quit();
    bench.check();
}

#[test]
fn a_damaged_stream_ends_the_process_with_the_reason_and_the_disk_untouched() {
    if !require::kvm() {
        return;
    }
    let bench = Bench::new();
    let good_uri = bench.migrate_to_file("good");
    let good = bench.path("good");
    let length = std::fs::metadata(&good).unwrap().len();
    let image = std::fs::read(bench.path("disk0.qcow2")).unwrap();
    let bad = bench.path("bad");
    let incoming = |uri: &str, spec: &VmSpec| {
        let (status, stderr) = spec.clone().args(&["--incoming", uri]).run();
        assert_eq!(status.code(), Some(1), "{stderr}");
        stderr
    };
    for at in [3, 20, length / 3, length / 2, length - 1] {
        std::fs::copy(&good, &bad).unwrap();
        damage(&bad, at);
        let stderr = incoming(&bench.uri("file", "bad"), &bench.spec);
        assert_eq!(stderr.matches("migration failed: ").count(), 1, "{at}: {stderr}");
        assert!(stderr.contains("load of migration failed: "), "{at}: {stderr}");
    }
    for len in [0, 10, 1000, length / 2, length - 1] {
        std::fs::copy(&good, &bad).unwrap();
        std::fs::OpenOptions::new().write(true).open(&bad).unwrap().set_len(len).unwrap();
        let stderr = incoming(&bench.uri("file", "bad"), &bench.spec);
        assert_eq!(stderr.matches("ends after").count(), 1, "{len}: {stderr}");
    }
    let stderr = incoming("exec:exit 5", &bench.spec);
    assert!(stderr.contains("exit status: 5"), "{stderr}");
    let stderr = incoming(&format!("exec:cat {}; exit 5", good.display()), &bench.spec);
    assert!(stderr.contains("exit status: 5"), "{stderr}");
    let stderr = incoming("exec:yes", &bench.spec);
    assert!(stderr.contains("this is no migration stream"), "{stderr}");
    let other = bench.spec.clone().args(&["--device", "virtio-rng-device"]);
    let stderr = incoming(&good_uri, &other);
    assert!(stderr.contains("the stream is of another machine"), "{stderr}");
    assert_eq!(std::fs::read(bench.path("disk0.qcow2")).unwrap(), image);

    // The process stays where it is asked to.
    let target = bench.spec.clone().args(&["-S", "--incoming", "defer"]).start();
    let mut there = with_events(&target);
    let arguments = json!({ "uri": bench.uri("file", "bad"), "exit-on-error": false });
    there.execute("migrate-incoming", arguments).unwrap();
    wait_for(&mut there, "failed");
    assert_eq!(target.status(), "inmigrate");
    target.quit();
    // And the good one is still good.
    let target = bench.spec.clone().args(&["-S", "--incoming", &good_uri]).start();
    wait_for_end(&target, "completed");
    assert_eq!(target.status(), "paused");
    target.qmp().execute("cont", json!({})).unwrap();
    goes_on(&target);
    target.quit();
    bench.check();
}
