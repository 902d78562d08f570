//! Many clients, bad clients, vanishing clients; the socket and the shutdown.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

mod common;

use std::io::{ErrorKind, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use common::{Fixture, PATIENCE, Raw, options, within_patience};
use qmp::client::Client;
use qmp::json::Limits;
use qmp::server::ListenError;
use qmp::{Command, Event, Options};
use serde_json::json;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

const QUERY: &str = r#"{"execute":"query-name"}"#;

#[test]
fn clients_negotiate_apart_and_all_of_them_get_events() {
    let fixture = Fixture::answering(options());
    let mut clients: Vec<Raw> = (0..5).map(|_| fixture.negotiated()).collect();
    let mut silent = fixture.connect();
    silent.line();
    clients[3].send(r#"{"execute":"stop"}"#);
    for client in &mut clients {
        assert_eq!(client.line()["event"], "STOP");
    }
    assert_eq!(clients[3].line(), json!({ "return": {} }));
    assert!(silent.error(QUERY).starts_with("Expecting capabilities"));
    drop(clients);
    silent.negotiate();
}

#[test]
fn a_command_under_way_holds_back_its_own_client_only() {
    let (fixture, requests) = Fixture::start(options());
    let (mut slow, mut quick) = (fixture.negotiated(), fixture.negotiated());
    slow.send(r#"{"execute":"snapshot-delete","id":1,"arguments":{"job-id":"j","tag":"t","devices":["d"]}}"#);
    slow.send(r#"{"execute":"cont","id":2}"#);
    let held = requests.wait(PATIENCE).unwrap();
    assert!(matches!(&held.command, Command::SnapshotDelete(delete) if delete.devices == ["d"]));
    quick.send(QUERY);
    let other = requests.wait(PATIENCE).unwrap();
    assert_eq!(other.command, Command::QueryName);
    assert_ne!(other.monitor, held.monitor);
    other.reply.done();
    assert_eq!(quick.line(), json!({ "return": {} }));
    // It was sent before the other client's: it would be here by now.
    assert!(requests.take().is_empty());
    held.reply.done();
    assert_eq!(slow.line()["id"], 1);
    let next = requests.wait(PATIENCE).unwrap();
    assert_eq!(next.command, Command::Cont);
    next.reply.done();
    assert_eq!(slow.line()["id"], 2);
}

#[test]
fn the_requests_event_is_readable_until_they_are_taken() {
    let (fixture, requests) = Fixture::start(options());
    let mut raw = fixture.negotiated();
    raw.send(QUERY);
    // As an event loop does: a request is in the queue before the event says so.
    let epoll = Epoll::new().unwrap();
    let readable = EpollEvent::new(EventSet::IN, 0);
    epoll.ctl(ControlOperation::Add, requests.event().as_raw_fd(), readable).unwrap();
    let patience = i32::try_from(PATIENCE.as_millis()).unwrap();
    assert_eq!(epoll.wait(patience, &mut [EpollEvent::default()]).unwrap(), 1);
    let request = requests.take().pop().unwrap();
    assert_eq!(requests.event().read().unwrap_err().kind(), ErrorKind::WouldBlock);
    request.reply.done();
    raw.line();
}

#[test]
fn a_client_may_vanish_after_any_byte() {
    let fixture = Fixture::answering(options());
    let mut witness = fixture.negotiated();
    let session = format!(r#"{{"execute":"qmp_capabilities"}}{QUERY}{{"execute":"stop"}}[1"#);
    for length in 0..=session.len() {
        let mut raw = fixture.connect();
        raw.send(&session[..length]);
    }
    for _ in 0..20 {
        // Gone while its command is under way.
        fixture.negotiated().send(r#"{"execute":"query-name"}{"execute":"system_reset"}"#);
    }
    witness.send(r#"{"execute":"query-name","id":"alive"}"#);
    loop {
        let line = witness.line();
        if line["event"] != "STOP" {
            break assert_eq!(line["id"], "alive");
        }
    }
}

#[test]
fn what_a_vanished_client_had_sent_whole_is_done() {
    let (fixture, requests) = Fixture::start(options());
    let mut raw = fixture.negotiated();
    raw.send(r#"{"execute":"stop"}{"execute":"cont"}{"execute":"quit""#);
    drop(raw);
    for expected in [Command::Stop, Command::Cont] {
        let request = requests.wait(PATIENCE).unwrap();
        assert_eq!(request.command, expected);
        request.reply.done();
    }
    // The half command is not: the next is another client's.
    fixture.negotiated().send(QUERY);
    assert_eq!(requests.wait(PATIENCE).unwrap().command, Command::QueryName);
}

#[test]
fn an_unreading_client_loses_its_connection_and_the_others_see_every_event() {
    let fixture = Fixture::answering(Options { unread: 100_000, ..options() });
    let (mut deaf, mut good) = (fixture.negotiated(), fixture.negotiated());
    let count = 20_000;
    for id in 0..count {
        let status = qmp::schema::JobStatus::Running;
        fixture.events.emit(&Event::JobStatusChange { id: format!("job{id}"), status });
        if id % 50 == 49 {
            for id in id - 49..=id {
                assert_eq!(good.line()["data"]["id"], format!("job{id}"));
            }
        }
    }
    let mut lines = 0;
    while !deaf.text().is_empty() {
        lines += 1;
    }
    assert!(lines < count, "the connection was kept");
    assert_eq!(fixture.negotiated().ask(QUERY)["return"]["name"], "guest");
}

#[test]
fn a_client_that_does_not_read_its_answers_is_not_read_from() {
    let fixture = Fixture::answering(options());
    let raw = fixture.negotiated();
    raw.stream().set_nonblocking(true).unwrap();
    let started = Instant::now();
    let mut sent = 0;
    // Each of these bytes asks for an answer of 80: without back-pressure this would never block.
    let closers = vec![b'}'; 64 << 10];
    let blocked = loop {
        match raw.stream().write(&closers) {
            Ok(count) => sent += count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                // Blocked for good if another client gets a whole answer and nothing changes.
                let mut other = fixture.negotiated();
                other.ask(QUERY);
                if raw.stream().write(&closers).is_err() {
                    break true;
                }
            }
            Err(error) => panic!("{error}"),
        }
        if sent > 64 << 20 || started.elapsed() > PATIENCE {
            break false;
        }
    };
    assert!(blocked, "{sent} bytes were taken");
}

#[test]
fn clients_beyond_the_limit_are_greeted_when_another_leaves() {
    let fixture = Fixture::answering(Options { clients: 64, ..options() });
    let mut clients: Vec<Raw> = (0..64).map(|_| fixture.negotiated()).collect();
    let mut late: Vec<Raw> = (0..10).map(|_| fixture.connect()).collect();
    late[0].stream().set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    let mut line = String::new();
    let waiting = std::io::BufRead::read_line(&mut late[0].reader, &mut line);
    assert_eq!(waiting.unwrap_err().kind(), ErrorKind::WouldBlock);
    assert_eq!(clients[63].ask(QUERY)["return"]["name"], "guest");
    late[0].stream().set_read_timeout(Some(PATIENCE)).unwrap();
    clients.truncate(54);
    for client in &mut late {
        assert!(client.line()["QMP"].is_object());
        client.negotiate();
    }
}

#[test]
fn a_gibibyte_line_is_one_error_with_bounded_memory_and_the_session_goes_on() {
    let limits = Limits { bytes: 1 << 20, ..Limits::default() };
    let fixture = Fixture::answering(Options { limits, ..options() });
    let mut raw = fixture.negotiated();
    let before = resident();
    let chunk = vec![b'a'; 1 << 20];
    raw.send("{\"execute\":\"");
    for _ in 0..1024 {
        raw.send(&chunk);
    }
    raw.send("\"}\n");
    assert_eq!(raw.line()["error"]["desc"], "JSON token size limit exceeded");
    assert_eq!(raw.ask(QUERY)["return"]["name"], "guest");
    let grown = resident().saturating_sub(before);
    assert!(grown < 64 << 20, "{grown} bytes more");
}

/// Bytes of this process in memory.
fn resident() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

#[test]
fn shutdown_sends_what_was_answered_before_the_end() {
    let (mut fixture, requests) = Fixture::start(options());
    let mut raw = fixture.negotiated();
    let mut idle = fixture.connect();
    idle.line();
    raw.send(r#"{"execute":"quit"}{"execute":"query-name"}"#);
    let request = requests.wait(PATIENCE).unwrap();
    let reason = qmp::schema::ShutdownCause::HostQmpQuit;
    fixture.events.emit(&Event::Shutdown { guest: false, reason });
    request.reply.done();
    let path = fixture.path();
    fixture.server.shutdown();
    assert!(!path.exists());
    let event = raw.line();
    assert_eq!(event["event"], "SHUTDOWN");
    assert_eq!(event["data"], json!({ "guest": false, "reason": "host-qmp-quit" }));
    assert_eq!(raw.line(), json!({ "return": {} }));
    raw.assert_end();
    idle.assert_end();
}

#[test]
fn shutdown_does_not_wait_for_a_client_that_does_not_read() {
    let options = Options { linger: Duration::from_millis(50), ..options() };
    let (fixture, requests) = Fixture::start(options);
    let mut raw = fixture.negotiated();
    raw.send(QUERY);
    let large = "x".repeat(16 << 20);
    requests.wait(PATIENCE).unwrap().reply.value(&large);
    within_patience(move || drop(fixture));
}

#[test]
fn an_answer_larger_than_the_event_limit_arrives_whole() {
    let (fixture, requests) = Fixture::start(Options { unread: 1000, ..options() });
    let mut raw = fixture.negotiated();
    raw.send(QUERY);
    let large = "x".repeat(4 << 20);
    requests.wait(PATIENCE).unwrap().reply.value(&large);
    // Nor does an event that comes while it waits end the connection.
    fixture.events.emit(&Event::Stop);
    assert_eq!(raw.line()["return"], large);
    assert_eq!(raw.line()["event"], "STOP");
}

#[test]
fn the_socket_is_private_and_removed_only_if_it_is_still_ours() {
    let (mut fixture, _requests) = Fixture::start(options());
    let path = fixture.path();
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    std::fs::remove_file(&path).unwrap();
    let theirs = UnixListener::bind(&path).unwrap();
    fixture.server.shutdown();
    assert!(path.exists());
    drop(theirs);
}

#[test]
fn a_stale_socket_is_replaced_a_live_one_or_another_file_is_refused() {
    let (fixture, _requests) = Fixture::start(options());
    let stale = fixture.directory.path().join("stale");
    drop(UnixListener::bind(&stale).unwrap());
    assert!(stale.exists());
    fixture.server.listen(&stale).unwrap();
    assert!(Raw::connect(&stale).line()["QMP"].is_object());

    let live = fixture.server.listen(&fixture.path()).unwrap_err();
    assert!(matches!(live, ListenError::InUse(_)), "{live}");
    assert!(fixture.connect().line()["QMP"].is_object());

    let file = fixture.directory.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    let refused = fixture.server.listen(&file).unwrap_err();
    assert!(matches!(refused, ListenError::NotASocket(_)), "{refused}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");

    let missing = fixture.directory.path().join("no/such/directory");
    assert!(matches!(fixture.server.listen(&missing), Err(ListenError::Io { .. })));
}

#[test]
fn wait_on_returns_with_the_first_client() {
    let (fixture, requests) = Fixture::start(options());
    let path = fixture.directory.path().join("wait");
    let clients = path.clone();
    let client = std::thread::spawn(move || {
        let started = Instant::now();
        while started.elapsed() < PATIENCE {
            if let Ok(client) = Client::connect(&clients) {
                return client;
            }
            std::thread::yield_now();
        }
        panic!("no socket at {}", clients.display());
    });
    fixture.server.listen_and_wait(&path).unwrap();
    let client = client.join().unwrap();
    assert_eq!(client.greeting()["version"]["package"], "test");
    assert!(Client::connect(&path).is_ok(), "and it goes on listening");
    drop(requests);
}
