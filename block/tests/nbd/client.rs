//! A client that speaks every mode and does as it is told, also what it should not.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use block::nbd::wire::option::code;
use block::nbd::wire::request::{Request, cmd};
use block::nbd::wire::{Mode, OPTION_MAGIC, Reader};

/// A reply, put together from its chunks.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Reply {
    pub(crate) cookie: u64,
    pub(crate) error: u32,
    /// Data by offset; holes as zeroes.
    pub(crate) data: Vec<(u64, Vec<u8>)>,
    pub(crate) holes: usize,
    /// Context, then length and status of each extent.
    pub(crate) status: Vec<(u32, Vec<(u64, u64)>)>,
}

pub(crate) struct Client {
    pub(crate) stream: UnixStream,
    pub(crate) mode: Mode,
    cookie: u64,
    /// Replies of which some chunks have come.
    begun: HashMap<u64, Reply>,
}

impl Client {
    /// Connects and exchanges flags.
    pub(crate) fn connect(socket: &Path) -> Self {
        Self::try_connect(socket).unwrap()
    }

    pub(crate) fn try_connect(socket: &Path) -> io::Result<Self> {
        let mut stream = UnixStream::connect(socket)?;
        // A test fails then, rather than wait for ever.
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        stream.write_all(&3u32.to_be_bytes())?;
        Ok(Self { stream, mode: Mode::Simple, cookie: 0, begun: HashMap::new() })
    }

    /// Sends an option; gives kind and data of the replies up to the last.
    pub(crate) fn option(&mut self, option: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        let mut out = OPTION_MAGIC.to_be_bytes().to_vec();
        out.extend_from_slice(&option.to_be_bytes());
        out.extend_from_slice(&(data.len() as u32).to_be_bytes());
        out.extend_from_slice(data);
        self.stream.write_all(&out).unwrap();
        let mut replies = Vec::new();
        loop {
            let header: [u8; 20] = self.array();
            let mut reader = Reader::new(&header);
            assert_eq!(reader.u64(), Some(0x0003_e889_0455_65a9));
            assert_eq!(reader.u32(), Some(option));
            let (kind, len) = (reader.u32().unwrap(), reader.u32().unwrap());
            replies.push((kind, self.bytes(len as usize)));
            // Acknowledged, or an error.
            if kind == 1 || kind >> 31 == 1 {
                return replies;
            }
        }
    }

    /// Goes to the transmission phase of the export in that mode, with those contexts.
    pub(crate) fn go(mut self, export: &str, mode: Mode, contexts: &[&str]) -> Self {
        match mode {
            Mode::Simple => {}
            Mode::Structured => assert_eq!(self.option(code::STRUCTURED_REPLY, &[])[0].0, 1),
            Mode::Extended => assert_eq!(self.option(code::EXTENDED_HEADERS, &[])[0].0, 1),
        }
        self.mode = mode;
        let name = [&(export.len() as u32).to_be_bytes(), export.as_bytes()].concat();
        if !contexts.is_empty() {
            let mut data = name.clone();
            data.extend_from_slice(&(contexts.len() as u32).to_be_bytes());
            for context in contexts {
                data.extend_from_slice(&(context.len() as u32).to_be_bytes());
                data.extend_from_slice(context.as_bytes());
            }
            let replies = self.option(code::SET_META_CONTEXT, &data);
            assert_eq!(replies.len(), contexts.len() + 1, "{replies:?}");
        }
        let replies = self.option(code::GO, &[&name[..], &[0, 0]].concat());
        assert_eq!(replies.last().unwrap().0, 1, "{replies:?}");
        self
    }

    /// Sends a request; gives its cookie.
    pub(crate) fn send(&mut self, command: u16, flags: u16, offset: u64, len: u64) -> u64 {
        self.cookie += 1;
        let request = Request { flags, command, cookie: self.cookie, offset, len };
        let mut out = Vec::new();
        request.encode(self.mode, &mut out);
        self.stream.write_all(&out).unwrap();
        self.cookie
    }

    /// Sends a write; gives its cookie.
    pub(crate) fn send_write(&mut self, flags: u16, offset: u64, data: &[u8]) -> u64 {
        let cookie = self.send(cmd::WRITE, flags, offset, data.len() as u64);
        self.stream.write_all(data).unwrap();
        cookie
    }

    /// Receives until a reply is whole; chunks of others may come between its
    /// own. `read` is the length of the read it may answer in simple mode.
    pub(crate) fn receive(&mut self, read: usize) -> Reply {
        loop {
            let magic = u32::from_be_bytes(self.array());
            match magic {
                0x6744_6698 => {
                    assert_ne!(self.mode, Mode::Extended);
                    let error = u32::from_be_bytes(self.array());
                    let cookie = u64::from_be_bytes(self.array());
                    let mut reply = Reply { error, cookie, ..Reply::default() };
                    if reply.error == 0 && read > 0 {
                        assert_eq!(self.mode, Mode::Simple);
                        let data = self.bytes(read);
                        reply.data.push((0, data));
                    }
                    return reply;
                }
                0x668e_33ef | 0x6e8a_278c => {
                    let extended = magic == 0x6e8a_278c;
                    assert_eq!(extended, self.mode == Mode::Extended);
                    assert_ne!(self.mode, Mode::Simple);
                    let flags = u16::from_be_bytes(self.array());
                    let kind = u16::from_be_bytes(self.array());
                    let cookie = u64::from_be_bytes(self.array());
                    let len = if extended {
                        let _offset: [u8; 8] = self.array();
                        u64::from_be_bytes(self.array())
                    } else {
                        u64::from(u32::from_be_bytes(self.array()))
                    };
                    let payload = self.bytes(len as usize);
                    let reply = self.begun.entry(cookie).or_default();
                    reply.cookie = cookie;
                    reply.chunk(kind, &payload);
                    if flags & 1 != 0 {
                        return self.begun.remove(&cookie).unwrap();
                    }
                }
                other => panic!("a reply has the magic number {other:#x}"),
            }
        }
    }

    /// Sends a request without payload and receives its reply.
    pub(crate) fn call(&mut self, command: u16, flags: u16, offset: u64, len: u64) -> Reply {
        let cookie = self.send(command, flags, offset, len);
        let reply = self.receive(if command == cmd::READ { len as usize } else { 0 });
        assert_eq!(reply.cookie, cookie);
        reply
    }

    /// Reads; gives the data in one piece.
    pub(crate) fn read(&mut self, offset: u64, len: u64) -> Vec<u8> {
        let reply = self.call(cmd::READ, 0, offset, len);
        assert_eq!(reply.error, 0);
        reply.assemble(offset, len)
    }

    /// Writes; gives the error.
    pub(crate) fn write(&mut self, flags: u16, offset: u64, data: &[u8]) -> u32 {
        let cookie = self.send_write(flags, offset, data);
        let reply = self.receive(0);
        assert_eq!(reply.cookie, cookie);
        reply.error
    }

    /// Whether the server has closed the connection.
    pub(crate) fn is_closed(&mut self) -> bool {
        match self.stream.read(&mut [0; 1]) {
            Ok(n) => n == 0,
            Err(e) => e.kind() == io::ErrorKind::ConnectionReset,
        }
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }
}

impl Reply {
    fn chunk(&mut self, kind: u16, payload: &[u8]) {
        let mut reader = Reader::new(payload);
        match kind {
            0 => assert!(payload.is_empty()),
            1 => {
                let offset = reader.u64().unwrap();
                self.data.push((offset, payload[8..].to_vec()));
            }
            2 => {
                let offset = reader.u64().unwrap();
                let len = reader.u32().unwrap();
                assert!(len > 0 && reader.is_empty());
                self.holes += 1;
                self.data.push((offset, vec![0; len as usize]));
            }
            5 | 6 => {
                let context = reader.u32().unwrap();
                let mut list = Vec::new();
                if kind == 6 {
                    assert_eq!(reader.u32(), Some(((payload.len() - 8) / 16) as u32));
                }
                while !reader.is_empty() {
                    list.push(if kind == 6 {
                        (reader.u64().unwrap(), reader.u64().unwrap())
                    } else {
                        let (len, status) = (reader.u32().unwrap(), reader.u32().unwrap());
                        (u64::from(len), u64::from(status))
                    });
                }
                self.status.push((context, list));
            }
            0x8001 => {
                self.error = reader.u32().unwrap();
                assert_ne!(self.error, 0);
            }
            other => panic!("a chunk of kind {other}"),
        }
    }

    /// The data of a read: the chunks must cover it, without overlap.
    pub(crate) fn assemble(&self, offset: u64, len: u64) -> Vec<u8> {
        if let [(0, data)] = &self.data[..]
            && data.len() as u64 == len
        {
            return data.clone();
        }
        let mut data = self.data.clone();
        data.sort();
        let mut out = Vec::new();
        for (at, part) in data {
            assert_eq!(at, offset + out.len() as u64, "chunks overlap or leave a gap");
            out.extend_from_slice(&part);
        }
        assert_eq!(out.len() as u64, len);
        out
    }
}
