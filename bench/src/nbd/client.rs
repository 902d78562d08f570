//! The client that drives both servers: one thread, a number of requests in flight, simple replies,
//! no more system calls than it takes. It looks at no data.

use std::io::{IoSlice, Read, Write};
use std::path::Path;

use block::nbd::wire::option::code;
use block::nbd::wire::request::{Request, cmd};
use block::nbd::wire::{Mode, OPTION_MAGIC};

use super::socket::{Socket, Wait};

/// What a request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    Read,
    Write,
}

const REPLY_HEADER: usize = 16;
/// Largest reply and some more: one call takes many small ones.
const RECEIVE: usize = (1 << 20) + (64 << 10);

/// A client in the transmission phase.
pub(crate) struct Client {
    socket: Socket,
    size: u64,
}

impl Client {
    /// Connects to the export of that name.
    pub(crate) fn connect(socket: &Path, export: &str) -> std::io::Result<Self> {
        let mut socket = Socket::connect(socket)?;
        let stream = socket.stream();
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        let mut hello = 3u32.to_be_bytes().to_vec();
        hello.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        hello.extend_from_slice(&code::EXPORT_NAME.to_be_bytes());
        hello.extend_from_slice(&u32::try_from(export.len()).unwrap().to_be_bytes());
        hello.extend_from_slice(export.as_bytes());
        stream.write_all(&hello)?;
        let mut answer = [0; 10];
        stream.read_exact(&mut answer)?;
        let size = u64::from_be_bytes(answer[..8].try_into().unwrap());
        Ok(Self { socket: socket.polled()?, size })
    }

    /// Size of the export in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Carries out a request at each offset, `depth` at a time, and waits for all of them.
    pub(crate) fn run(
        &mut self,
        direction: Direction,
        offsets: impl IntoIterator<Item = u64>,
        len: u32,
        depth: usize,
        wait: Wait,
    ) {
        let mut offsets = offsets.into_iter();
        let payload: Vec<u8> = (0..len).map(|n| n.to_le_bytes()[0] | 1).collect();
        let mut buf = vec![0; RECEIVE];
        let mut filled = 0;
        let mut in_flight = self.submit(direction, &mut offsets, depth, &payload);
        let reply = REPLY_HEADER + if direction == Direction::Read { payload.len() } else { 0 };
        while in_flight > 0 {
            filled += self.socket.receive(&mut buf[filled..], wait);
            let done = filled / reply;
            for header in buf[..filled].chunks_exact(reply) {
                assert_eq!(header[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0], "a request failed");
            }
            buf.copy_within(done * reply..filled, 0);
            filled -= done * reply;
            in_flight -= done;
            in_flight += self.submit(direction, &mut offsets, done, &payload);
        }
    }

    /// Sends at most `count` requests at once; gives their number.
    fn submit(
        &mut self,
        direction: Direction,
        offsets: &mut impl Iterator<Item = u64>,
        count: usize,
        payload: &[u8],
    ) -> usize {
        let command = if direction == Direction::Read { cmd::READ } else { cmd::WRITE };
        let mut headers = Vec::new();
        let mut sent = 0;
        for offset in offsets.take(count) {
            let len = payload.len() as u64;
            let request = Request { flags: 0, command, cookie: offset, offset, len };
            request.encode(Mode::Simple, &mut headers);
            sent += 1;
        }
        let mut parts = Vec::with_capacity(2 * sent);
        for header in headers.chunks(28) {
            parts.push(IoSlice::new(header));
            if direction == Direction::Write {
                parts.push(IoSlice::new(payload));
            }
        }
        self.socket.send(&mut parts);
        sent
    }

    /// Makes everything durable, so that nothing of one measurement is left for the next.
    pub(crate) fn flush(&mut self) {
        let mut out = Vec::new();
        let request = Request { flags: 0, command: cmd::FLUSH, cookie: 0, offset: 0, len: 0 };
        request.encode(Mode::Simple, &mut out);
        self.socket.send(&mut [IoSlice::new(&out)]);
        let mut reply = [0; REPLY_HEADER];
        let mut filled = 0;
        while filled < REPLY_HEADER {
            filled += self.socket.receive(&mut reply[filled..], Wait::Sleep);
        }
        assert_eq!(reply[4..8], [0; 4], "a flush failed");
    }
}
