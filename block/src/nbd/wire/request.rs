//! Requests of the transmission phase.

use super::{Mode, Reader};

const MAGIC: u32 = 0x2560_9513;
const EXTENDED_MAGIC: u32 = 0x21e4_1c71;

/// Bytes of a request's header with 32-bit lengths.
pub const HEADER: usize = 28;
/// Bytes of a request's header with 64-bit lengths.
pub const EXTENDED_HEADER: usize = 32;

/// Command numbers ("Request types").
pub mod cmd {
    #![allow(missing_docs, reason = "the names are the protocol's")]
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Command flags.
pub mod cmd_flag {
    #![allow(missing_docs, reason = "the names are the protocol's")]
    pub const FUA: u16 = 1 << 0;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const REQ_ONE: u16 = 1 << 3;
    pub const FAST_ZERO: u16 = 1 << 4;
    /// With extended headers: the length is that of a payload that follows.
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// A request as the client sent it; nothing is checked but the magic number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Command flags.
    pub flags: u16,
    /// Command number.
    pub command: u16,
    /// What the client knows the request by; comes back in replies.
    pub cookie: u64,
    /// Byte offset in the export.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

/// The client sent something that is no request: what follows cannot be understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a request has the magic number {0:#x}")]
pub struct BadMagic(pub u32);

/// Bytes of a request's header.
pub fn header_len(mode: Mode) -> usize {
    if mode == Mode::Extended { EXTENDED_HEADER } else { HEADER }
}

impl Request {
    /// Decodes a header from the front of `bytes`; `None` if it is not there wholly.
    ///
    /// # Errors
    /// As soon as the first four bytes are there and are not the magic number.
    pub fn decode(bytes: &[u8], mode: Mode) -> Result<Option<Self>, BadMagic> {
        let mut reader = Reader::new(bytes);
        let expected = if mode == Mode::Extended { EXTENDED_MAGIC } else { MAGIC };
        match reader.u32() {
            Some(magic) if magic != expected => Err(BadMagic(magic)),
            _ => Ok(Self::decode_rest(reader, mode)),
        }
    }

    fn decode_rest(mut reader: Reader<'_>, mode: Mode) -> Option<Self> {
        Some(Self {
            flags: reader.u16()?,
            command: reader.u16()?,
            cookie: reader.u64()?,
            offset: reader.u64()?,
            len: if mode == Mode::Extended { reader.u64()? } else { u64::from(reader.u32()?) },
        })
    }

    /// Bytes that follow the header and belong to the request.
    pub fn payload(&self, mode: Mode) -> u64 {
        let carries = self.command == cmd::WRITE
            || (mode == Mode::Extended && self.flags & cmd_flag::PAYLOAD_LEN != 0);
        if carries { self.len } else { 0 }
    }

    /// Appends the header: for clients.
    pub fn encode(&self, mode: Mode, out: &mut Vec<u8>) {
        let magic = if mode == Mode::Extended { EXTENDED_MAGIC } else { MAGIC };
        out.extend_from_slice(&magic.to_be_bytes());
        out.extend_from_slice(&self.flags.to_be_bytes());
        out.extend_from_slice(&self.command.to_be_bytes());
        out.extend_from_slice(&self.cookie.to_be_bytes());
        out.extend_from_slice(&self.offset.to_be_bytes());
        if mode == Mode::Extended {
            out.extend_from_slice(&self.len.to_be_bytes());
        } else {
            let len = u32::try_from(self.len).unwrap_or(u32::MAX);
            out.extend_from_slice(&len.to_be_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REQUEST: Request =
        Request { flags: 1, command: cmd::WRITE, cookie: 77, offset: 1 << 40, len: 4096 };

    #[test]
    fn request_survives_encoding_and_a_part_of_it_is_not_taken_for_one() {
        for (mode, len) in [(Mode::Simple, HEADER), (Mode::Extended, EXTENDED_HEADER)] {
            let mut bytes = Vec::new();
            REQUEST.encode(mode, &mut bytes);
            assert_eq!(bytes.len(), len);
            assert_eq!(Request::decode(&bytes, mode), Ok(Some(REQUEST)));
            for cut in 0..len {
                assert_eq!(Request::decode(&bytes[..cut], mode), Ok(None), "{cut} bytes");
            }
        }
    }

    #[test]
    fn wrong_magic_number_shows_before_the_header_is_whole() {
        assert_eq!(Request::decode(b"GET / HTTP", Mode::Simple), Err(BadMagic(0x4745_5420)));
        let mut bytes = Vec::new();
        REQUEST.encode(Mode::Extended, &mut bytes);
        assert_eq!(Request::decode(&bytes, Mode::Simple), Err(BadMagic(EXTENDED_MAGIC)));
    }

    #[test]
    fn payload_follows_writes_and_what_says_so_with_extended_headers() {
        assert_eq!(REQUEST.payload(Mode::Simple), 4096);
        let read = Request { command: cmd::READ, flags: cmd_flag::PAYLOAD_LEN, ..REQUEST };
        assert_eq!(read.payload(Mode::Structured), 0);
        assert_eq!(read.payload(Mode::Extended), 4096);
    }
}
