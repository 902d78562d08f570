//! QMP clients that send nonsense, too much, or vanish: the server answers, its memory is bounded,
//! and the guest does not notice.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use qmp::client::Client;
use serde_json::{Value, json};
use tardigrade_tests::counter::{self, Running, snapshot};
use tardigrade_tests::disk::Disk;
use tardigrade_tests::require;
use tardigrade_tests::vm::Vm;

/// A connection without manners.
struct Raw(BufReader<UnixStream>);

impl Raw {
    fn connect(vm: &Vm) -> Self {
        let stream = UnixStream::connect(vm.qmp_path()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut raw = Self(BufReader::new(stream));
        assert!(raw.read()["QMP"].is_object());
        raw.write(b"{'execute':'qmp_capabilities'}");
        assert_eq!(raw.read(), json!({ "return": {} }));
        raw
    }

    fn write(&mut self, bytes: &[u8]) {
        self.0.get_mut().write_all(bytes).unwrap();
    }

    fn read(&mut self) -> Value {
        let mut line = String::new();
        assert!(self.0.read_line(&mut line).unwrap() > 0, "the connection is closed");
        serde_json::from_str(&line).unwrap()
    }

    /// The next error's text.
    fn error(&mut self) -> String {
        let answer = self.read();
        answer["error"]["desc"].as_str().unwrap_or_else(|| panic!("{answer}")).to_owned()
    }

    /// The parser has found its way back.
    fn check_alive(&mut self) {
        self.write(b"\n{'execute':'query-status','id':'alive'}\n");
        loop {
            let answer = self.read();
            if answer["id"] == "alive" {
                assert_eq!(answer["return"]["running"], true);
                return;
            }
        }
    }
}

/// "VmRSS" or "VmHWM", in MiB.
fn memory(vm: &Vm, field: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", vm.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

#[test]
fn garbage_gets_errors_and_the_connection_stays() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut vm = Running::start(&counter::spec(dir.path(), 0));
    let mut raw = Raw::connect(&vm.vm);
    let cases: [(&[u8], &str); 10] = [
        (b"xyz ", "JSON parse error, invalid keyword 'xyz'"),
        (b"{'a':}", "JSON parse error, expecting value"),
        (b"[1,2]\n", "QMP input must be a JSON object"),
        (b"{}", "QMP input lacks member 'execute'"),
        (b"{'execute':1}", "QMP input member 'execute' must be a string"),
        (b"{'execute':'stop','zz':1}", "QMP input member 'zz' is unexpected"),
        (b"{'execute':'stop','arguments':[]}", "QMP input member 'arguments' must be an object"),
        (b"{'execute':'nothing'}", "The command nothing has not been found"),
        (b"{'a':1,'a':2}", "JSON parse error, duplicate key"),
        (b"{'execute':'\\x'}", "JSON parse error, invalid escape sequence in string"),
    ];
    for (bytes, wanted) in cases {
        raw.write(bytes);
        assert_eq!(raw.error(), wanted, "{}", String::from_utf8_lossy(bytes));
        raw.check_alive();
    }
    // Every byte, and noise.
    let noise: Vec<u8> = (0..=255).chain(tardigrade_tests::pattern::bytes(3, 0, 65536)).collect();
    for part in noise.chunks(512) {
        raw.write(part);
        // What a string or bracket of the noise leaves open, a control character ends.
        raw.write(b"\x01\xff");
        raw.check_alive();
    }
    vm.check_alive();
    vm.vm.quit();
}

#[test]
fn deep_nesting_is_an_error_and_costs_no_stack() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut vm = Running::start(&counter::spec(dir.path(), 0));
    let mut raw = Raw::connect(&vm.vm);
    let deep = |depth: usize| {
        let mut text = b"{'execute':'query-name','id':".to_vec();
        text.extend(vec![b'['; depth - 1]);
        text.extend(vec![b']'; depth - 1]);
        text.push(b'}');
        text
    };
    raw.write(&deep(1024));
    // serde_json, which reads the answers here, has a lower limit.
    let mut line = String::new();
    raw.0.read_line(&mut line).unwrap();
    assert!(line.starts_with("{\"return\""), "{line}");
    raw.write(&deep(1025));
    assert_eq!(raw.error(), "JSON nesting depth limit exceeded");
    raw.write(b"\x01");
    raw.check_alive();
    let mut other = Raw::connect(&vm.vm);
    let million = vec![b'['; 1 << 20];
    // Nobody reads the answers meanwhile, so it may be slow; it must not be the end.
    let stream = other.0.get_ref().try_clone().unwrap();
    let writer = std::thread::spawn(move || (&stream).write_all(&million));
    assert_eq!(other.error(), "JSON nesting depth limit exceeded");
    vm.check_alive();
    drop(other);
    let _ = writer.join().unwrap();
    vm.check_alive();
    vm.vm.quit();
}

#[test]
fn a_line_of_1_gib_costs_bounded_memory_and_one_error() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut vm = Running::start(&counter::spec(dir.path(), 0));
    let before = memory(&vm.vm, "VmRSS");
    let mut raw = Raw::connect(&vm.vm);
    raw.write(b"{'execute':'query-name','id':'");
    let piece = vec![b'a'; 1 << 20];
    for _ in 0..1024 {
        raw.write(&piece);
    }
    raw.write(b"'}\n");
    assert_eq!(raw.error(), "JSON token size limit exceeded");
    raw.check_alive();
    let most = memory(&vm.vm, "VmHWM");
    assert!(most < before + 300, "{before} MiB before, {most} MiB at most");
    drop(raw);
    vm.check_alive();
    let after = memory(&vm.vm, "VmRSS");
    assert!(after < before + 100, "{before} MiB before, {after} MiB after");
    vm.vm.quit();
}

#[test]
fn clients_that_vanish_or_come_by_the_hundred_do_no_harm() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::qcow2(dir.path().join("disk0.qcow2"), "16M");
    let mut vm = Running::start(&counter::spec(dir.path(), 8 << 20).disk(&disk));
    // Mid-greeting, mid-command, with an answer on its way, and with a job at work.
    drop(UnixStream::connect(vm.vm.qmp_path()).unwrap());
    let mut raw = Raw::connect(&vm.vm);
    raw.write(b"{'execute':'sto");
    drop(raw);
    let mut raw = Raw::connect(&vm.vm);
    for _ in 0..100 {
        raw.write(b"{'execute':'query-named-block-nodes'}");
    }
    drop(raw);
    vm.check_alive();
    let mut raw = Raw::connect(&vm.vm);
    let mut arguments = snapshot("left", &["disk0"]);
    arguments["job-id"] = json!("left");
    let command = json!({ "execute": "snapshot-save", "arguments": arguments });
    raw.write(command.to_string().as_bytes());
    drop(raw);
    let concluded =
        |event: &Value| event["data"]["id"] == "left" && event["data"]["status"] == "concluded";
    vm.qmp.wait_event(Duration::from_secs(60), concluded).unwrap();
    let jobs = vm.qmp.execute("query-jobs", json!({})).unwrap();
    assert_eq!(jobs[0]["error"], Value::Null, "{jobs}");
    vm.check_alive();

    // More than are served at once: the rest is greeted when others leave.
    let streams: Vec<_> =
        (0..100).map(|_| UnixStream::connect(vm.vm.qmp_path()).unwrap()).collect();
    vm.check_alive();
    let served: Vec<_> = (0..40).map(|at| streams[at].try_clone().unwrap()).collect();
    for stream in served {
        let mut line = String::new();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        assert!(BufReader::new(stream).read_line(&mut line).unwrap() > 0);
    }
    drop(streams);
    let mut client = Client::connect(vm.vm.qmp_path()).unwrap();
    assert_eq!(client.execute("query-status", json!({})).unwrap()["running"], true);
    vm.check_alive();
    vm.vm.quit();
    disk.check();
    assert_eq!(disk.tags(), ["left"]);
}
