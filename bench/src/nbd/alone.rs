//! A server that has no disk: it answers at once, from memory, and looks for requests as long as it
//! takes. What it reaches is what the client and the socket cost; no server of a disk is faster.
//!
//! One client, one request in flight, the options that [`super::client`] sends.

use std::io::{IoSlice, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use block::nbd::wire::request::cmd;

const HEADER: usize = 28;
/// Flags and client flags, option header and name, as `EXPORT_NAME` has them.
const HELLO: usize = 4 + 16;

/// Serves one client of an export of `size` bytes, then ends.
pub(crate) fn serve(path: &Path, size: u64) {
    let listener = UnixListener::bind(path).unwrap();
    let (stream, _) = listener.accept().unwrap();
    let mut server = Server { stream };
    server.handshake(size);
    server.transmit();
}

struct Server {
    stream: UnixStream,
}

impl Server {
    fn handshake(&mut self, size: u64) {
        self.stream.write_all(b"NBDMAGICIHAVEOPT\0\x03").unwrap();
        let mut hello = [0; HELLO];
        self.stream.read_exact(&mut hello).unwrap();
        let name = u32::from_be_bytes(hello[16..].try_into().unwrap());
        self.stream.read_exact(&mut vec![0; name as usize]).unwrap();
        let mut answer = size.to_be_bytes().to_vec();
        answer.extend_from_slice(&1u16.to_be_bytes());
        self.stream.write_all(&answer).unwrap();
        self.stream.set_nonblocking(true).unwrap();
    }

    /// Until the client goes.
    fn transmit(&mut self) {
        let mut data = vec![1; 1 << 20];
        let mut header = [0; HEADER];
        while self.receive(&mut header) {
            let command = u16::from_be_bytes([header[6], header[7]]);
            let len = u32::from_be_bytes(header[24..].try_into().unwrap()) as usize;
            if command == cmd::DISC || (command == cmd::WRITE && !self.receive(&mut data[..len])) {
                return;
            }
            let mut reply = [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            reply[8..].copy_from_slice(&header[8..16]);
            let body = if command == cmd::READ { &data[..len] } else { &[] };
            let parts = [IoSlice::new(&reply), IoSlice::new(body)];
            let sent = self.stream.write_vectored(&parts).unwrap();
            assert_eq!(sent, reply.len() + body.len(), "a small reply has room");
        }
    }

    /// Says whether all came.
    fn receive(&mut self, into: &mut [u8]) -> bool {
        let mut filled = 0;
        while filled < into.len() {
            match self.stream.read(&mut into[filled..]) {
                Ok(0) => return false,
                Ok(n) => filled += n,
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => std::thread::yield_now(),
                Err(e) => panic!("{e}"),
            }
        }
        true
    }
}
