//! Streams to and from files, commands and sockets that do and do not do their part.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;

use super::address::Address;
use super::connect::try_connect;
use super::input::{self, Input};
use super::output::{self, Output};
use super::wait::Stopper;

const LONG: usize = 1 << 20;

fn shell(command: &str) -> Address {
    Address::parse(&format!("exec:{command}")).unwrap()
}

fn output(address: &Address, stopper: &Stopper) -> Output {
    Output::open(output::prepare(address).unwrap(), stopper.clone()).unwrap()
}

fn input(address: &Address, stopper: &Stopper) -> Input {
    Input::open(input::prepare(address).unwrap(), stopper.clone()).unwrap()
}

#[test]
fn a_file_is_cut_to_the_offset_and_read_from_there() {
    let dir = tempfile::tempdir().unwrap();
    let (path, stopper) = (dir.path().join("f"), Stopper::new().unwrap());
    std::fs::write(&path, b"headGARBAGE").unwrap();
    let address = Address::File { path: path.clone(), offset: 4 };
    let mut out = output(&address, &stopper);
    out.write_all(b"end").unwrap();
    out.finish().unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"headend");
    let mut text = String::new();
    input(&address, &stopper).read_to_string(&mut text).unwrap();
    assert_eq!(text, "end");
    let nowhere = Address::File { path: dir.path().join("no/f"), offset: 0 };
    let error = output::prepare(&nowhere).unwrap_err();
    assert!(
        error.starts_with("Could not create '") && error.ends_with(": No such file or directory")
    );
    let error = input::prepare(&nowhere).unwrap_err();
    assert!(
        error.starts_with("Could not open '") && error.ends_with(": No such file or directory")
    );
}

#[test]
fn a_command_gets_all_and_its_exit_status_counts() {
    let dir = tempfile::tempdir().unwrap();
    let (path, stopper) = (dir.path().join("f"), Stopper::new().unwrap());
    let mut out = output(&shell(&format!("cat > {}", path.display())), &stopper);
    out.write_all(&vec![7; LONG]).unwrap();
    out.finish().unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), vec![7; LONG]);

    let mut out = output(&shell("cat > /dev/null; exit 3"), &stopper);
    out.write_all(&vec![7; LONG]).unwrap();
    assert_eq!(out.finish().unwrap_err(), "the command ended with exit status: 3");

    let mut out = output(&shell("exit 4"), &stopper);
    out.write_all(&vec![7; LONG]).unwrap_err();
    assert_eq!(out.reason().unwrap(), "the command ended with exit status: 4");

    let mut from = input(&shell("echo text; exit 5"), &stopper);
    let mut text = String::new();
    from.read_to_string(&mut text).unwrap();
    assert_eq!(text, "text\n");
    assert_eq!(from.finish().unwrap_err(), "the command ended with exit status: 5");
    let missing = Address::Exec(vec!["/no/such/program".to_owned()]);
    assert!(output::prepare(&missing).unwrap_err().starts_with("cannot run '/no/such/program'"));
}

#[test]
fn a_command_that_does_nothing_is_ended_with_what_it_started() {
    let dir = tempfile::tempdir().unwrap();
    let stopper = Stopper::new().unwrap();
    let pids = dir.path().join("pids");
    let command = format!("sleep 1000 & echo $$ $! > {}; wait", pids.display());
    let mut out = output(&shell(&command), &stopper);
    thread::scope(|scope| {
        let writer = scope.spawn(|| out.write_all(&vec![7; LONG]).unwrap_err());
        while !std::fs::read_to_string(&pids).is_ok_and(|text| text.ends_with('\n')) {
            thread::yield_now();
        }
        stopper.stop();
        assert_eq!(writer.join().unwrap().to_string(), "told to stop");
    });
    drop(out);
    // Whoever adopts the second one may not have reaped it yet.
    for pid in std::fs::read_to_string(&pids).unwrap().split_whitespace() {
        loop {
            match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
                Ok(stat) if !stat.contains(") Z ") => thread::yield_now(),
                _ => break,
            }
        }
    }
}

#[test]
fn a_socket_is_done_when_the_peer_has_read_all() {
    let dir = tempfile::tempdir().unwrap();
    let (path, stopper) = (dir.path().join("s"), Stopper::new().unwrap());
    let address = Address::Unix(path.clone());
    let error = Output::open(output::prepare(&address).unwrap(), stopper.clone()).unwrap_err();
    assert!(error.starts_with("Failed to connect to '"), "{error}");
    // One that somebody left behind.
    drop(UnixListener::bind(&path).unwrap());
    let waiting = input::prepare(&address).unwrap();
    assert!(input::prepare(&address).is_err());
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut from = Input::open(waiting, stopper.clone()).unwrap();
            let mut bytes = Vec::new();
            from.read_to_end(&mut bytes).unwrap();
            bytes.len()
        });
        let mut out = output(&address, &stopper);
        out.write_all(&vec![7; LONG]).unwrap();
        out.finish().unwrap();
        assert_eq!(reader.join().unwrap(), LONG);
    });
    assert!(!path.exists());
    let listener = UnixListener::bind(&path).unwrap();
    let mut out = output(&address, &stopper);
    let (peer, _) = listener.accept().unwrap();
    out.write_all(b"unread").unwrap();
    drop(peer);
    assert!(out.finish().unwrap_err().starts_with("the peer has not read all"));
    let mut out = output(&address, &stopper);
    drop(listener.accept().unwrap());
    assert!(out.write_all(&vec![7; LONG]).is_err());
}

#[test]
fn room_at_a_socket_with_too_many_clients_is_waited_for_until_told_to_stop() {
    let dir = tempfile::tempdir().unwrap();
    let (path, stopper) = (dir.path().join("s"), Stopper::new().unwrap());
    let address = Address::Unix(path.clone());
    let listener = UnixListener::bind(&path).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let fill = || -> Vec<UnixStream> { std::iter::from_fn(|| try_connect(&path).ok()).collect() };
    let clients = fill();
    assert!(!clients.is_empty());
    // Somebody listens there: that is told at once.
    assert!(input::prepare(&address).is_err());
    thread::scope(|scope| {
        let connecting = scope.spawn(|| output(&address, &stopper));
        for _ in &clients {
            drop(listener.accept().unwrap());
        }
        connecting.join().unwrap();
    });
    let clients = fill();
    stopper.stop();
    let error = Output::open(output::prepare(&address).unwrap(), stopper.clone()).unwrap_err();
    assert!(error.ends_with("told to stop"), "{error}");
    drop(clients);
}

#[test]
fn whoever_waits_can_be_told_to_stop() {
    let dir = tempfile::tempdir().unwrap();
    let (path, stopper) = (dir.path().join("s"), Stopper::new().unwrap());
    let waiting = input::prepare(&Address::Unix(path)).unwrap();
    thread::scope(|scope| {
        let reader = scope.spawn(|| Input::open(waiting, stopper.clone()).map(drop));
        stopper.stop();
        assert!(reader.join().unwrap().is_err());
    });
    // And everything afterwards.
    let (_a, b) = UnixStream::pair().unwrap();
    assert!(stopper.wait(&b, rustix::event::PollFlags::OUT).is_err());
}
