//! What a client of the NBD server sends: to the parsers alone, and to a whole connection over a
//! socket, with an image behind it.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::{LazyLock, Mutex, mpsc};
use std::time::Duration;

use block::Graph;
use block::nbd::command::Limits;
use block::nbd::negotiate::{Exports, Negotiation, Offered, Step};
use block::nbd::wire::option::{ContextRequest, HEADER, Header, InfoRequest};
use block::nbd::wire::request::Request;
use block::nbd::wire::{Mode, Reader};
use block::nbd::{Address, ExportOptions, RemoveMode, Server, ServerOptions};
use serde_json::json;

use super::trace;
use crate::alloc::Limit;
use crate::seeds;

/// The export's name.
pub(crate) const NAME: &str = "d";
/// A write's payload, and how much more a session may hold at a time.
const SINGLE: usize = 33 << 20;
const MORE: usize = 192 << 20;

pub(super) fn run(input: &[u8]) {
    parse(input);
    // A connection takes a hundred times as long.
    if input.len() > 4 {
        connect(input);
    }
}

/// An export without a disk.
struct Named;

impl Offered for Named {
    fn name(&self) -> &str {
        NAME
    }

    fn description(&self) -> Option<&str> {
        None
    }

    fn size(&self) -> u64 {
        1 << 30
    }

    fn read_only(&self) -> bool {
        false
    }

    fn multi_conn(&self) -> bool {
        true
    }

    fn contexts(&self) -> Vec<String> {
        vec!["base:allocation".to_owned(), "qemu:dirty-bitmap:b".to_owned()]
    }
}

impl Exports for Named {
    type Export = Self;

    fn list(&self) -> Vec<Self> {
        vec![Self]
    }

    fn find(&self, name: &[u8]) -> Option<Self> {
        (name == NAME.as_bytes()).then_some(Self)
    }
}

/// The handshake and the requests after it, without sockets.
fn parse(input: &[u8]) {
    let _limit = Limit::set(1 << 20, 8 << 20);
    let _ = (InfoRequest::decode(input), ContextRequest::decode(input));
    let mut reader = Reader::new(input);
    let mut negotiation = Negotiation::default();
    let Some(true) = reader.u32().map(|flags| negotiation.client_flags(flags)) else { return };
    let mode = loop {
        let Some(header) = reader.array::<HEADER>().and_then(|bytes| Header::decode(&bytes)) else {
            return;
        };
        let Some(data) = reader.bytes(header.len) else { return };
        let mut out = Vec::new();
        let step = negotiation.option(header.option, data, &Named, &mut out);
        assert!(out.len() <= 64 << 10, "{} bytes answer {} of {header:?}", out.len(), data.len());
        match step {
            Step::Continue => {}
            Step::Start(session) => break session.mode,
            Step::Close => return,
        }
    };
    while let Some(bytes) = reader.bytes(u32::from(mode == Mode::Extended) * 4 + 28) {
        let Ok(Some(request)) = Request::decode(bytes, mode) else { return };
        let mut again = Vec::new();
        request.encode(mode, &mut again);
        assert_eq!(again, bytes, "{request:?}");
        let size = 8 << 20;
        for read_only in [false, true] {
            let limits = Limits { size, read_only, mode, contexts: true };
            trace(|| format!("{request:?}: {:?}", limits.check(&request)));
        }
        let payload = u32::try_from(request.payload(mode)).unwrap_or(u32::MAX);
        if reader.bytes(payload).is_none() {
            return;
        }
    }
}

/// The server of this process. One for all inputs: starting and stopping one takes several times as
/// long as a session.
struct Running {
    server: Server,
    address: SocketAddr,
    /// Tells of each export that is gone.
    gone: Mutex<mpsc::Receiver<()>>,
}

fn server() -> &'static Running {
    static SERVER: LazyLock<Running> = LazyLock::new(|| {
        let any = Address::Tcp(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
        // The input ends by itself; a busy host must not look like a slow client.
        let options = ServerOptions { handshake_max: Duration::ZERO, ..ServerOptions::default() };
        let (sender, gone) = mpsc::channel();
        let on_gone = move |_: &str| sender.send(()).expect("the receiver lives as long");
        let server = Server::start(&any, options, on_gone).expect("it can listen");
        let Address::Tcp(address) = *server.address() else { unreachable!("it was made so") };
        Running { server, address, gone: Mutex::new(gone) }
    });
    &SERVER
}

/// The image behind the export, anew for each input.
fn image() -> File {
    static IMAGE: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let seed = seeds::images().into_iter().find(|seed| seed.name == "clusters-64k");
        crate::input::unpack(&seed.expect("the seed is there").input).bytes()
    });
    let mut file = tempfile::tempfile().expect("a temporary file");
    file.write_all(&IMAGE).expect("room for a small image");
    file
}

/// A whole session. The server must end it when the client has.
fn connect(input: &[u8]) {
    let Running { server, address, gone } = server();
    let file = image();
    let _limit = Limit::set(SINGLE, MORE);
    let graph = Graph::new();
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    graph
        .add(&json!({
            "driver": "qcow2", "node-name": NAME, "discard": "unmap", "cache": { "no-flush": true },
            "file": { "driver": "file", "filename": path }
        }))
        .expect("the seed is an image");
    let attachment = graph.attach_export(NAME, true).expect("nobody else uses it");
    server
        .add_export(ExportOptions {
            id: NAME.to_owned(),
            name: NAME.to_owned(),
            description: Some("a disk".to_owned()),
            attachment,
            writable: true,
            allocation_depth: true,
            bitmaps: Vec::new(),
        })
        .expect("the former one is gone");
    let replies = talk(*address, input);
    trace(|| format!("{replies} bytes of replies"));
    server.remove_export(NAME, RemoveMode::Hard).expect("it is there");
    // The client sees the connection close a little before the server lets go of the export.
    gone.lock().expect("no one panics with it").recv().expect("the server lives as long");
}

/// Bytes of the server's greeting.
const GREETING: usize = 18;
/// Sent without a thread of its own: sockets hold that much.
const AT_ONCE: usize = 16 << 10;

/// Sends everything, then reads until the server closes the connection; gives how much came after
/// the greeting.
fn talk(address: SocketAddr, input: &[u8]) -> usize {
    let mut stream = TcpStream::connect(address).expect("the server listens");
    // Before anything is sent: a server that closes on bad input resets the connection, and what
    // the client has not read by then is lost.
    stream.read_exact(&mut [0; GREETING]).expect("the server greets whoever connects");
    let mut sender = stream.try_clone().expect("descriptors are left");
    let mut send = move || {
        // The server may close before it has read everything.
        let _ = sender.write_all(input);
        let _ = sender.shutdown(Shutdown::Write);
    };
    let mut total = 0;
    let mut part = vec![0; 64 << 10];
    let mut receive = || {
        // A reset is what a client gets that sent on after the server had closed.
        while let Ok(n @ 1..) = stream.read(&mut part) {
            total += n;
        }
    };
    if input.len() <= AT_ONCE {
        send();
        receive();
    } else {
        std::thread::scope(|scope| {
            scope.spawn(send);
            receive();
        });
    }
    total
}
