//! What a client of the NBD server sends: to the parsers alone, and to a whole connection over a
//! socket, with an image behind it.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::LazyLock;

use block::Graph;
use block::nbd::command::Limits;
use block::nbd::negotiate::{Exports, Negotiation, Offered, Step};
use block::nbd::wire::option::{ContextRequest, HEADER, Header, InfoRequest};
use block::nbd::wire::request::Request;
use block::nbd::wire::{Mode, Reader};
use block::nbd::{Address, ExportOptions, Server, ServerOptions};
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

/// A whole session. The server must end it when the client has, and serve the next one.
fn connect(input: &[u8]) {
    static IMAGE: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let seed = seeds::images().into_iter().find(|seed| seed.name == "clusters-64k");
        crate::input::unpack(&seed.expect("the seed is there").input).bytes()
    });
    let dir = tempfile::tempdir().expect("a directory for sockets");
    let path = dir.path().join("image");
    std::fs::write(&path, &*IMAGE).expect("room for a small image");
    let _limit = Limit::set(SINGLE, MORE);
    let graph = Graph::new();
    graph
        .add(&json!({
            "driver": "qcow2", "node-name": NAME, "discard": "unmap", "cache": { "no-flush": true },
            "file": { "driver": "file", "filename": path }
        }))
        .expect("the seed is an image");
    let address = Address::Unix(dir.path().join("nbd"));
    let server = Server::start(&address, ServerOptions::default(), |_| {}).expect("it can listen");
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
        .expect("it is the first");
    talk(&address, input);
    let greeting = talk(&address, &[]);
    assert_eq!(greeting.len(), 18, "the next client is not greeted");
    drop(server);
}

/// Sends everything, then reads until the server closes the connection.
fn talk(address: &Address, input: &[u8]) -> Vec<u8> {
    let Address::Unix(path) = address else { unreachable!("it was made so") };
    let mut stream = UnixStream::connect(path).expect("the server listens");
    let mut sender = stream.try_clone().expect("descriptors are left");
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // The server may close before it has read everything.
            let _ = sender.write_all(input);
            let _ = sender.shutdown(Shutdown::Write);
        });
        let mut total = 0;
        let mut replies = Vec::new();
        let mut part = vec![0; 64 << 10];
        // A reset is what a client gets that sent on after the server had closed.
        while let Ok(n @ 1..) = stream.read(&mut part) {
            total += n;
            if replies.len() < 1024 {
                replies.extend_from_slice(&part[..n]);
            }
        }
        trace(|| format!("{total} bytes of replies"));
        replies
    })
}
