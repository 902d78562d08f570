//! Exports that come and go, and what clients and callers learn of it.

use std::time::Duration;

use block::nbd::wire::Mode;
use block::nbd::wire::option::code;
use block::nbd::wire::request::cmd;
use block::nbd::{Address, RemoveMode, Server, ServerOptions};
use block::{Preallocation, Progress};

use crate::client::Client;
use crate::common::Setup;

const WAIT: Duration = Duration::from_secs(60);

fn gone(setup: &Setup) -> String {
    setup.gone.lock().unwrap().recv_timeout(WAIT).unwrap()
}

#[test]
fn an_export_that_is_taken_has_qemus_texts() {
    let setup = Setup::with_image("1M", "");
    let error = setup.export("d", false).unwrap_err().to_string();
    assert_eq!(error, "Block export id 'd' is already in use");
    let error = setup.server.remove_export("x", RemoveMode::Safe).unwrap_err().to_string();
    assert_eq!(error, "Export 'x' is not found");
}

#[test]
fn safe_removal_waits_for_no_client_and_hard_removal_ends_them() {
    let setup = Setup::with_image("1M", "");
    let mut client = setup.client().go("d", Mode::Structured, &[]);
    assert_eq!(client.read(0, 512), [0; 512]);
    let error = setup.server.remove_export("d", RemoveMode::Safe).unwrap_err().to_string();
    assert_eq!(error, "export 'd' still in use");
    setup.server.remove_export("d", RemoveMode::Hard).unwrap();
    assert!(client.is_closed());
    assert_eq!(gone(&setup), "d");
    assert_eq!(setup.server.list(), []);
    // The node is free.
    setup.graph.remove("d").unwrap();
}

#[test]
fn an_export_without_clients_is_gone_at_once() {
    let setup = Setup::with_image("1M", "");
    setup.server.remove_export("d", RemoveMode::Safe).unwrap();
    assert_eq!(setup.gone.lock().unwrap().try_recv().as_deref(), Ok("d"));
    let replies = setup.client().option(code::GO, b"\0\0\0\x01d\0\0");
    assert_eq!(replies, [(0x8000_0006, b"export 'd' not present".to_vec())]);
}

#[test]
fn a_client_in_the_handshake_does_not_get_an_export_that_was_removed() {
    let setup = Setup::with_image("1M", "");
    let mut client = setup.client();
    assert_eq!(client.option(code::INFO, b"\0\0\0\x01d\0\0").last().unwrap().0, 1);
    setup.server.remove_export("d", RemoveMode::Safe).unwrap();
    assert_eq!(client.option(code::GO, b"\0\0\0\x01d\0\0")[0].0, 0x8000_0006);
}

#[test]
fn stop_ends_all_sessions_and_removes_the_socket() {
    let mut setup = Setup::with_image("1M", "");
    let mut clients = [setup.client().go("d", Mode::Simple, &[]), setup.client()];
    setup.server.stop();
    assert!(clients.iter_mut().all(Client::is_closed));
    assert_eq!(gone(&setup), "d");
    assert!(!setup.socket().exists());
    assert!(Client::try_connect(&setup.socket()).is_err());
}

#[test]
fn the_list_is_newest_first() {
    let setup = Setup::with_image("1M", "");
    let other = setup.create("e.qcow2", "1M", "");
    setup.open("e", &other);
    setup.export("e", false).unwrap();
    let list = setup.server.list();
    let seen: Vec<_> = list.iter().map(|e| (e.id.as_str(), e.shutting_down)).collect();
    assert_eq!(seen, [("e", false), ("d", false)]);
}

#[test]
fn clients_beyond_the_limit_wait_for_their_turn() {
    let options = ServerOptions { max_connections: 2, ..ServerOptions::default() };
    let setup = Setup::new(options);
    let image = setup.create("d.qcow2", "1M", "");
    setup.open("d", &image);
    setup.export("d", true).unwrap();
    let first = setup.client();
    let _second = setup.client();
    let socket = setup.socket();
    std::thread::scope(|scope| {
        let third = scope.spawn(move || {
            let mut client = Client::connect(&socket).go("d", Mode::Simple, &[]);
            client.read(0, 512)
        });
        // It is greeted only once a place is free.
        drop(first);
        assert_eq!(third.join().unwrap(), [0; 512]);
    });
}

#[test]
fn a_server_for_one_client_does_not_tell_of_several_connections() {
    for (max_connections, expected) in [(1, 0), (0, 1 << 8)] {
        let setup = Setup::new(ServerOptions { max_connections, ..ServerOptions::default() });
        let image = setup.create("d.qcow2", "1M", "");
        setup.open("d", &image);
        setup.export("d", true).unwrap();
        let replies = setup.client().option(code::INFO, b"\0\0\0\x01d\0\0");
        let export = replies.iter().find(|(kind, data)| *kind == 3 && data[..2] == [0, 0]).unwrap();
        let flags = u16::from_be_bytes(export.1[10..12].try_into().unwrap());
        assert_eq!(flags & (1 << 8), expected);
    }
}

#[test]
fn a_server_listens_on_tcp_and_tells_the_port() {
    let at = Address::Tcp("127.0.0.1:0".parse().unwrap());
    let server = Server::start(&at, ServerOptions::default(), |_| {}).unwrap();
    let Address::Tcp(at) = server.address() else { panic!("not TCP") };
    let mut stream = std::net::TcpStream::connect(at).unwrap();
    let mut greeting = [0; 18];
    std::io::Read::read_exact(&mut stream, &mut greeting).unwrap();
    assert_eq!(&greeting, b"NBDMAGICIHAVEOPT\0\x03");
}

#[test]
fn a_path_that_is_no_socket_is_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, "precious").unwrap();
    let at = Address::Unix(path.clone());
    assert!(Server::start(&at, ServerOptions::default(), |_| {}).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

#[test]
fn requests_are_checked_against_the_size_at_their_time() {
    let setup = Setup::with_image("1M", "");
    let mut client = setup.client().go("d", Mode::Structured, &["base:allocation"]);
    let node = setup.graph.get("d").unwrap();
    let mut asks = |at: u64| {
        [
            client.call(cmd::READ, 0, at, 512).error,
            client.call(cmd::BLOCK_STATUS, 0, at, 512).error,
            client.call(cmd::TRIM, 0, at, 512).error,
            client.write(0, at, &[9; 512]),
            client.call(cmd::WRITE_ZEROES, 0, at, 512).error,
        ]
    };
    let (fit, beyond) = ([0; 5], [22, 22, 22, 28, 28]);
    assert_eq!(asks((1 << 20) - 512), fit);
    assert_eq!(asks((1 << 20) - 511), beyond);
    node.resize(2 << 20, Preallocation::Off, &Progress::default()).unwrap();
    assert_eq!(asks((2 << 20) - 512), fit);
    assert_eq!(asks(2 << 20), beyond);
    node.resize(1 << 20, Preallocation::Off, &Progress::default()).unwrap();
    assert_eq!(asks((1 << 20) - 512), fit);
    assert_eq!(asks(1 << 20), beyond);
    drop(node);
    setup.check();
}
