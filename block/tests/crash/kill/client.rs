//! A client of the NBD protocol that keeps requests in flight and knows which were answered.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;

/// What is asked of the server.
#[derive(Debug, Clone)]
pub(crate) enum Request {
    Write { offset: u64, data: Vec<u8> },
    Trim { offset: u64, len: u32 },
    Zero { offset: u64, len: u32 },
    Flush,
}

/// A session. Its requests are answered in any order.
pub(crate) struct Client {
    socket: UnixStream,
    next: u64,
}

fn bad(what: &str) -> io::Error {
    io::Error::other(what.to_owned())
}

impl Client {
    /// Connects to an export.
    pub(crate) fn connect(socket: &Path, export: &str) -> io::Result<Self> {
        let mut socket = UnixStream::connect(socket)?;
        let mut hello = [0; 18];
        socket.read_exact(&mut hello)?;
        if &hello[..16] != b"NBDMAGICIHAVEOPT" {
            return Err(bad("not an NBD server"));
        }
        // Fixed newstyle, no zeroes.
        socket.write_all(&3u32.to_be_bytes())?;
        let mut go = Vec::new();
        go.extend(OPTION_MAGIC.to_be_bytes());
        go.extend(OPTION_GO.to_be_bytes());
        go.extend((export.len() as u32 + 6).to_be_bytes());
        go.extend((export.len() as u32).to_be_bytes());
        go.extend(export.as_bytes());
        go.extend([0; 2]);
        socket.write_all(&go)?;
        loop {
            let mut head = [0; 20];
            socket.read_exact(&mut head)?;
            let word = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
            if head[..8] != REPLY_MAGIC.to_be_bytes() || word(12) >= 1 << 31 {
                return Err(bad("the export is refused"));
            }
            let mut data = vec![0; word(16) as usize];
            socket.read_exact(&mut data)?;
            if word(12) == REPLY_ACK {
                return Ok(Self { socket, next: 0 });
            }
        }
    }

    /// Sends a request; gives its number.
    pub(crate) fn send(&mut self, request: &Request) -> io::Result<u64> {
        let (kind, offset, len, data) = match request {
            Request::Write { offset, data } => (1u16, *offset, data.len() as u32, data.as_slice()),
            Request::Flush => (3, 0, 0, [].as_slice()),
            Request::Trim { offset, len } => (4, *offset, *len, [].as_slice()),
            Request::Zero { offset, len } => (6, *offset, *len, [].as_slice()),
        };
        let number = self.next;
        self.next += 1;
        let mut bytes = Vec::with_capacity(28 + data.len());
        bytes.extend(REQUEST_MAGIC.to_be_bytes());
        bytes.extend(0u16.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(number.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(len.to_be_bytes());
        bytes.extend(data);
        self.socket.write_all(&bytes)?;
        Ok(number)
    }

    /// Waits for an answer; gives the request's number.
    pub(crate) fn receive(&mut self) -> io::Result<u64> {
        let mut head = [0; 16];
        self.socket.read_exact(&mut head)?;
        let word = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
        if word(0) != SIMPLE_REPLY_MAGIC {
            return Err(bad("not a simple reply"));
        }
        if word(4) != 0 {
            return Err(io::Error::from_raw_os_error(word(4).cast_signed()));
        }
        Ok(u64::from_be_bytes(head[8..].try_into().unwrap()))
    }
}
