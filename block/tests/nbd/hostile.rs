//! Clients that break the protocol, vanish, or do nothing.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use block::nbd::ServerOptions;
use block::nbd::wire::option::code;
use block::nbd::wire::request::{Request, cmd, cmd_flag};
use block::nbd::wire::{Mode, OPTION_MAGIC};

use crate::client::Client;
use crate::common::{Numbers, Setup};

/// A whole session as the bytes a client sends.
fn session() -> Vec<u8> {
    let mut out = 3u32.to_be_bytes().to_vec();
    let mut option = |option: u32, data: &[u8]| {
        out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        out.extend_from_slice(&option.to_be_bytes());
        out.extend_from_slice(&(data.len() as u32).to_be_bytes());
        out.extend_from_slice(data);
    };
    option(code::STRUCTURED_REPLY, &[]);
    option(code::LIST, &[]);
    option(code::SET_META_CONTEXT, b"\0\0\0\x01d\0\0\0\x01\0\0\0\x0fbase:allocation");
    option(code::GO, b"\0\0\0\x01d\0\x01\0\x03");
    for (command, flags) in [
        (cmd::WRITE, cmd_flag::FUA),
        (cmd::READ, 0),
        (cmd::BLOCK_STATUS, 0),
        (cmd::WRITE_ZEROES, 0),
        (cmd::TRIM, 0),
        (cmd::FLUSH, 0),
        (cmd::DISC, 0),
    ] {
        let len = if command == cmd::FLUSH || command == cmd::DISC { 0 } else { 100 };
        let request = Request { flags, command, cookie: 1, offset: len, len };
        request.encode(Mode::Structured, &mut out);
        if command == cmd::WRITE {
            out.extend_from_slice(&[8; 100]);
        }
    }
    out
}

/// The server still serves.
fn assert_alive(setup: &Setup) {
    let mut client = setup.client().go("d", Mode::Structured, &[]);
    assert_eq!(client.read(0, 100).len(), 100);
}

#[test]
fn a_client_may_vanish_after_any_byte() {
    let setup = Setup::with_image("1M", "");
    let bytes = session();
    for cut in 0..=bytes.len() {
        let mut stream = UnixStream::connect(setup.socket()).unwrap();
        // The server may have ended the session at DISC already.
        let _ = stream.write_all(&bytes[..cut]);
        drop(stream);
    }
    assert_alive(&setup);
    setup.check();
}

#[test]
fn a_session_in_single_bytes_is_understood() {
    let setup = Setup::with_image("1M", "");
    let mut stream = UnixStream::connect(setup.socket()).unwrap();
    for byte in session() {
        stream.write_all(&[byte]).unwrap();
    }
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    // The read, which follows the write at once, may come before it.
    let mut client = setup.client().go("d", Mode::Structured, &[]);
    assert!(client.read(100, 100).iter().all(|byte| *byte == 8 || *byte == 0));
    assert!(all.len() > 18 + 6 * 16);
}

#[test]
fn changed_bytes_never_end_the_server() {
    let setup = Setup::with_image("1M", "");
    let bytes = session();
    let mut numbers = Numbers(3);
    for _ in 0..300 {
        let mut changed = bytes.clone();
        for _ in 0..=numbers.below(3) {
            let at = numbers.below(changed.len() as u64) as usize;
            changed[at] = numbers.next() as u8;
        }
        let mut stream = UnixStream::connect(setup.socket()).unwrap();
        let _ = stream.write_all(&changed);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        // Whatever it understood, it ends the session.
        let mut all = Vec::new();
        match stream.read_to_end(&mut all) {
            Ok(_) => {}
            Err(e) => assert_eq!(e.kind(), std::io::ErrorKind::ConnectionReset),
        }
    }
    assert_alive(&setup);
    setup.check();
}

#[test]
fn a_silent_client_is_sent_away_after_the_time_for_a_handshake() {
    let options =
        ServerOptions { handshake_max: Duration::from_millis(100), ..ServerOptions::default() };
    let setup = Setup::new(options);
    let start = Instant::now();
    let mut client = setup.client();
    assert!(client.is_closed());
    assert!(start.elapsed() >= Duration::from_millis(100));
}

#[test]
fn a_client_that_never_pauses_is_sent_away_after_the_time_for_a_handshake() {
    let options =
        ServerOptions { handshake_max: Duration::from_millis(100), ..ServerOptions::default() };
    let setup = Setup::new(options);
    let mut client = setup.client();
    let mut many = OPTION_MAGIC.to_be_bytes().to_vec();
    many.extend_from_slice(&code::LIST.to_be_bytes());
    many.extend_from_slice(&[0; 4]);
    let many = many.repeat(4096);
    let mut replies = client.stream.try_clone().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut some = [0; 1 << 16];
            while matches!(replies.read(&mut some), Ok(1..)) {}
        });
        let start = Instant::now();
        while client.stream.write_all(&many).is_ok() {
            assert!(start.elapsed() < Duration::from_secs(60), "the server goes on listening");
        }
    });
}

#[test]
fn an_option_that_is_too_long_is_skipped_and_one_of_gigabytes_ends_the_session() {
    let setup = Setup::with_image("1M", "");
    let mut client = setup.client();
    let replies = client.option(code::INFO, &vec![0; 100_000]);
    assert_eq!(replies[0].0, 0x8000_0009);
    assert_eq!(client.option(code::LIST, &[]).last().unwrap().0, 1);
    let mut out = OPTION_MAGIC.to_be_bytes().to_vec();
    out.extend_from_slice(&code::GO.to_be_bytes());
    out.extend_from_slice(&u32::MAX.to_be_bytes());
    client.stream.write_all(&out).unwrap();
    assert!(client.is_closed());
}

#[test]
fn the_payload_of_a_refused_write_is_skipped() {
    for mode in [Mode::Simple, Mode::Structured, Mode::Extended] {
        let setup = Setup::with_image("1M", "");
        let mut client = setup.client().go("d", mode, &[]);
        assert_eq!(client.write(0, (1 << 20) - 10, &[1; 100_000]), 28);
        assert_eq!(client.write(0, 0, &vec![1; (32 << 20) + 1]), 28);
        assert_eq!(client.write(1 << 12, 0, &[1; 1000]), 22);
        assert_eq!(client.read(0, 1 << 20), vec![0; 1 << 20]);
    }
}

#[test]
fn another_protocol_is_hung_up_on() {
    let setup = Setup::with_image("1M", "");
    let mut stream = UnixStream::connect(setup.socket()).unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let mut all = Vec::new();
    let _ = stream.read_to_end(&mut all);
    assert_eq!(all.len(), 18);
    let mut client = setup.client().go("d", Mode::Structured, &[]);
    client.stream.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    assert!(client.is_closed());
    assert_alive(&setup);
}

/// Memory that the process has touched, in bytes.
fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

#[test]
fn a_client_that_takes_no_replies_costs_bounded_memory_and_disturbs_nobody() {
    let setup = Setup::with_image("64M", "");
    let mut client = setup.client().go("d", Mode::Simple, &[]);
    let before = resident();
    client.stream.set_nonblocking(true).unwrap();
    let mut out = Vec::new();
    let request = Request { flags: 0, command: cmd::READ, cookie: 1, offset: 0, len: 1 << 20 };
    for _ in 0..10_000 {
        request.encode(Mode::Simple, &mut out);
    }
    // 10 GB are asked for; the server stops taking requests.
    let taken = client.stream.write(&out).unwrap();
    assert!(taken > 200 * 28);
    for _ in 0..20 {
        assert_alive(&setup);
    }
    assert!(resident() - before < 300 << 20, "{} bytes", resident() - before);
    // Those that were sent are answered once somebody listens.
    client.stream.set_nonblocking(false).unwrap();
    for _ in 0..taken / 28 {
        assert_eq!(client.receive(1 << 20).error, 0);
    }
}

#[test]
fn hundreds_of_clients_come_and_go() {
    let setup = Setup::with_image("1M", "");
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..30 {
                    let mut client = setup.client().go("d", Mode::Extended, &[]);
                    assert_eq!(client.read(5, 10).len(), 10);
                }
            });
        }
    });
    let mut last = Client::connect(&setup.socket());
    assert_eq!(last.option(code::ABORT, &[])[0].0, 1);
    assert!(last.is_closed());
}
