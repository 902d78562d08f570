//! Monitors in all the places where they can be, several at once.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests fail by panicking"
)]

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use tardigrade_tests::process::{Awaited, Watch, wait_for_end};
use tardigrade_tests::vm::binary;

const PATIENCE: Duration = Duration::from_secs(60);

/// A session over any pair of streams.
struct Session<R: Read, W: Write> {
    from: BufReader<R>,
    to: W,
}

impl<R: Read, W: Write> Session<R, W> {
    fn new(from: R, to: W) -> Self {
        let mut session = Self { from: BufReader::new(from), to };
        assert!(session.read()["QMP"].is_object());
        assert_eq!(session.ask("qmp_capabilities"), json!({ "return": {} }));
        session
    }

    fn read(&mut self) -> Value {
        let mut line = String::new();
        self.from.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line:?}: {error}"))
    }

    fn ask(&mut self, command: &str) -> Value {
        // In one piece: after `quit` nobody reads what comes behind the command.
        self.to.write_all(format!("{}\n", json!({ "execute": command })).as_bytes()).unwrap();
        self.read()
    }

    fn check_alive(&mut self) {
        assert_eq!(self.ask("query-jobs"), json!({ "return": [] }));
    }

    /// The first monitors of `query-chardev`.
    fn check_chardevs(&mut self, filenames: &[&str]) {
        let answer = self.ask("query-chardev");
        let chardev = |(number, filename)| {
            let label = format!("compat_monitor{number}");
            json!({ "label": label, "filename": filename, "frontend-open": true })
        };
        let wanted: Vec<Value> = filenames.iter().enumerate().map(chardev).collect();
        assert_eq!(answer["return"].as_array().unwrap()[..filenames.len()], wanted);
    }

    fn check_end(&mut self) {
        let mut rest = Vec::new();
        self.from.read_to_end(&mut rest).unwrap();
        assert_eq!(String::from_utf8_lossy(&rest), "");
    }
}

/// A daemon with these monitors; killed when dropped.
struct Daemon(Child);

impl Daemon {
    fn start(monitors: &[&str]) -> Self {
        let mut command = Command::new(binary());
        command.args(["--machine", "none"]);
        monitors.iter().for_each(|monitor| {
            command.args(["--qmp", monitor]);
        });
        Self(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap())
    }

    fn check_end(&mut self) {
        assert!(wait_for_end(&self.0, PATIENCE), "it does not end");
        assert!(self.0.wait().unwrap().success());
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// The file is there a moment before the program listens.
fn unix(path: &Path) -> UnixStream {
    let stream = loop {
        match UnixStream::connect(path) {
            Ok(stream) => break stream,
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => std::thread::yield_now(),
            Err(error) => panic!("{}: {error}", path.display()),
        }
    };
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn refused(monitors: &[&str]) -> String {
    let mut command = Command::new(binary());
    command.args(["--machine", "none"]);
    monitors.iter().for_each(|monitor| {
        command.args(["--qmp", monitor]);
    });
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(!output.status.success(), "{monitors:?}");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn a_session_on_standard_input_and_output_gets_all_answers() {
    let mut daemon = Daemon::start(&["stdio"]);
    let (to, from) = (daemon.0.stdin.take().unwrap(), daemon.0.stdout.take().unwrap());
    let mut session = Session::new(from, to);
    session.check_alive();
    assert_eq!(session.ask("quit"), json!({ "return": {} }));
    session.check_end();
    daemon.check_end();
}

#[test]
fn the_end_of_standard_input_ends_the_session_and_not_the_program() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let mut sockets = Watch::new(dir.path());
    let mut daemon =
        Daemon::start(&["stdio", &format!("unix:{},server=on,wait=off", path.display())]);
    let (to, from) = (daemon.0.stdin.take().unwrap(), daemon.0.stdout.take().unwrap());
    let mut session = Session::new(from, to);
    session.check_alive();
    drop(session);
    assert_eq!(sockets.wait(&path, &daemon.0, PATIENCE), Awaited::File);
    let stream = unix(&path);
    let mut other = Session::new(stream.try_clone().unwrap(), stream);
    other.check_alive();
    assert_eq!(other.ask("quit"), json!({ "return": {} }));
    daemon.check_end();
}

#[test]
fn several_monitors_are_served_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    let port = free_port();
    let mut sockets = Watch::new(dir.path());
    let mut daemon = Daemon::start(&[
        &format!("unix:{},server=on,wait=off", one.display()),
        &format!("tcp:127.0.0.1:{port},server=on,wait=off"),
        // The last one is there when the others are.
        &format!("unix:{},server=on,wait=off", two.display()),
    ]);
    assert_eq!(sockets.wait(&two, &daemon.0, PATIENCE), Awaited::File);
    let (first, second) = (unix(&one), unix(&two));
    let mut first = Session::new(first.try_clone().unwrap(), first);
    let unix_name = |path: &Path| format!("unix:{},server=on", path.display());
    let tcp_name = format!("tcp:127.0.0.1:{port},server=on");
    first.check_chardevs(&[&unix_name(&one), &format!("disconnected:{tcp_name}")]);
    let tcp = TcpStream::connect(("127.0.0.1", port)).unwrap();
    tcp.set_read_timeout(Some(PATIENCE)).unwrap();
    let tcp_name = format!("{tcp_name} <-> {}", tcp.local_addr().unwrap());
    let mut second = Session::new(second.try_clone().unwrap(), second);
    let mut third = Session::new(tcp.try_clone().unwrap(), tcp);
    first.check_alive();
    second.check_alive();
    third.check_alive();
    third.check_chardevs(&[&unix_name(&one), &tcp_name, &unix_name(&two)]);
    drop(first);
    assert_eq!(third.ask("quit"), json!({ "return": {} }));
    second.check_end();
    third.check_end();
    daemon.check_end();
}

#[test]
fn without_server_on_it_connects_to_one_who_listens() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("manager");
    let manager = UnixListener::bind(&path).unwrap();
    let mut daemon = Daemon::start(&[&format!("unix:{}", path.display())]);
    let (stream, _) = manager.accept().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut session = Session::new(stream.try_clone().unwrap(), stream);
    session.check_alive();
    assert_eq!(session.ask("quit"), json!({ "return": {} }));
    daemon.check_end();
}

#[test]
fn wait_on_goes_on_with_the_first_client() {
    let dir = tempfile::tempdir().unwrap();
    let (waited, later) = (dir.path().join("waited"), dir.path().join("later"));
    let mut sockets = Watch::new(dir.path());
    let mut daemon = Daemon::start(&[
        &format!("unix:{},server=on,wait=on", waited.display()),
        &format!("unix:{},server=on,wait=off", later.display()),
    ]);
    assert_eq!(sockets.wait(&waited, &daemon.0, PATIENCE), Awaited::File);
    assert!(!later.exists(), "it did not wait");
    let stream = unix(&waited);
    let mut session = Session::new(stream.try_clone().unwrap(), stream);
    session.check_alive();
    assert_eq!(sockets.wait(&later, &daemon.0, PATIENCE), Awaited::File);
    assert_eq!(session.ask("quit"), json!({ "return": {} }));
    daemon.check_end();
}

#[test]
fn places_that_others_could_reach_and_places_without_anyone_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let nobody = format!("unix:{}", dir.path().join("nobody").display());
    for (monitors, text) in [
        (&["tcp:0.0.0.0:4444,server=on,wait=off"][..], "not an address of this host alone"),
        (&["tcp:[::]:4444,server=on,wait=off"], "not an address of this host alone"),
        (&["tcp:192.0.2.1:4444"], "not an address of this host alone"),
        (&["stdio", "stdio"], "--qmp stdio: can be given once only"),
        (&[&nobody], "cannot connect: No such file or directory"),
        (&["udp:localhost:1"], "is not stdio, unix:PATH or tcp:HOST:PORT"),
        (&["unix:/x,wait=off"], "wait is of use with server=on only"),
    ] {
        let said = refused(monitors);
        assert!(said.contains(text), "{monitors:?}: {said}");
    }
}
