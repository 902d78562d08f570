//! Replies of the transmission phase: headers only, data is sent from where it lies.

use super::{Errno, MAX_STRING, Mode, len32};

const SIMPLE_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_MAGIC: u32 = 0x668e_33ef;
const EXTENDED_MAGIC: u32 = 0x6e8a_278c;

const FLAG_DONE: u16 = 1;

/// Kinds of chunks ("Structured reply types").
pub mod kind {
    #![allow(missing_docs, reason = "the names are the protocol's")]
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    pub const BLOCK_STATUS_EXT: u16 = 6;
    pub const ERROR: u16 = (1 << 15) + 1;
}

/// To which request a reply belongs, and how the client wants it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct To {
    /// How replies look.
    pub mode: Mode,
    /// The request's cookie.
    pub cookie: u64,
    /// The request's offset, which extended replies repeat.
    pub offset: u64,
}

/// One descriptor of block status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptor {
    /// Length in bytes.
    pub len: u64,
    /// Flags, or a number, as the context says.
    pub status: u64,
}

impl To {
    fn simple(self, out: &mut Vec<u8>, error: u32) {
        out.extend_from_slice(&SIMPLE_MAGIC.to_be_bytes());
        out.extend_from_slice(&error.to_be_bytes());
        out.extend_from_slice(&self.cookie.to_be_bytes());
    }

    /// Appends the header of a chunk with `len` bytes of payload.
    fn chunk(self, out: &mut Vec<u8>, done: bool, kind: u16, len: usize) {
        let extended = self.mode == Mode::Extended;
        let magic = if extended { EXTENDED_MAGIC } else { STRUCTURED_MAGIC };
        out.extend_from_slice(&magic.to_be_bytes());
        out.extend_from_slice(&(if done { FLAG_DONE } else { 0 }).to_be_bytes());
        out.extend_from_slice(&kind.to_be_bytes());
        out.extend_from_slice(&self.cookie.to_be_bytes());
        if extended {
            out.extend_from_slice(&self.offset.to_be_bytes());
            out.extend_from_slice(&u64::from(len32(len)).to_be_bytes());
        } else {
            out.extend_from_slice(&len32(len).to_be_bytes());
        }
    }

    /// Success of what has no data to return.
    pub fn ok(self, out: &mut Vec<u8>) {
        match self.mode {
            Mode::Extended => self.chunk(out, true, kind::NONE, 0),
            // Allowed where a reply carries no payload, and shorter.
            Mode::Simple | Mode::Structured => self.simple(out, 0),
        }
    }

    /// The end of a reply in chunks.
    pub fn end(self, out: &mut Vec<u8>) {
        self.chunk(out, true, kind::NONE, 0);
    }

    /// Failure. The message is for people and goes where the mode has room for it.
    pub fn error(self, out: &mut Vec<u8>, error: Errno, message: &str) {
        if self.mode == Mode::Simple {
            return self.simple(out, error as u32);
        }
        let mut cut = message.len().min(MAX_STRING);
        while !message.is_char_boundary(cut) {
            cut -= 1;
        }
        let message = &message.as_bytes()[..cut];
        self.chunk(out, true, kind::ERROR, 6 + message.len());
        out.extend_from_slice(&(error as u32).to_be_bytes());
        out.extend_from_slice(&u16::try_from(message.len()).unwrap_or(0).to_be_bytes());
        out.extend_from_slice(message);
    }

    /// The header of `len` bytes of data from `offset`; the bytes must follow. With simple replies
    /// it is the whole reply.
    pub fn data(self, out: &mut Vec<u8>, done: bool, offset: u64, len: usize) {
        if self.mode == Mode::Simple {
            return self.simple(out, 0);
        }
        self.chunk(out, done, kind::OFFSET_DATA, 8 + len);
        out.extend_from_slice(&offset.to_be_bytes());
    }

    /// A part of a read that is zeroes; only in chunks.
    pub(crate) fn hole(self, out: &mut Vec<u8>, done: bool, offset: u64, len: u32) {
        self.chunk(out, done, kind::OFFSET_HOLE, 12);
        out.extend_from_slice(&offset.to_be_bytes());
        out.extend_from_slice(&len.to_be_bytes());
    }

    /// Block status in one context; only in chunks. With 32-bit lengths, descriptors must fit them.
    pub fn status(self, out: &mut Vec<u8>, done: bool, context: u32, extents: &[Descriptor]) {
        if self.mode == Mode::Extended {
            self.chunk(out, done, kind::BLOCK_STATUS_EXT, 8 + extents.len() * 16);
            out.extend_from_slice(&context.to_be_bytes());
            out.extend_from_slice(&len32(extents.len()).to_be_bytes());
            for extent in extents {
                out.extend_from_slice(&extent.len.to_be_bytes());
                out.extend_from_slice(&extent.status.to_be_bytes());
            }
            return;
        }
        self.chunk(out, done, kind::BLOCK_STATUS, 4 + extents.len() * 8);
        out.extend_from_slice(&context.to_be_bytes());
        for extent in extents {
            for number in [extent.len, extent.status] {
                out.extend_from_slice(&u32::try_from(number).unwrap_or(u32::MAX).to_be_bytes());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Reader;
    use super::*;

    fn encoded(mode: Mode, f: impl FnOnce(To, &mut Vec<u8>)) -> Vec<u8> {
        let mut out = Vec::new();
        f(To { mode, cookie: 5, offset: 1024 }, &mut out);
        out
    }

    #[test]
    fn success_is_a_simple_reply_unless_headers_are_extended() {
        for mode in [Mode::Simple, Mode::Structured] {
            let out = encoded(mode, |to, out| to.ok(out));
            assert_eq!(out, [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5]);
        }
        let out = encoded(Mode::Extended, |to, out| to.ok(out));
        let mut reader = Reader::new(&out);
        assert_eq!(reader.u32(), Some(EXTENDED_MAGIC));
        assert_eq!((reader.u16(), reader.u16()), (Some(1), Some(0)));
        let rest = (reader.u64(), reader.u64(), reader.u64());
        assert_eq!(rest, (Some(5), Some(1024), Some(0)));
        assert!(reader.is_empty());
    }

    #[test]
    fn error_has_number_and_message_cut_between_characters() {
        let text = "ü".repeat(MAX_STRING);
        let out = encoded(Mode::Structured, |to, out| to.error(out, Errno::NoSpc, &text));
        let mut reader = Reader::new(&out);
        assert_eq!(reader.u32(), Some(STRUCTURED_MAGIC));
        assert_eq!((reader.u16(), reader.u16()), (Some(1), Some(kind::ERROR)));
        assert_eq!((reader.u64(), reader.u32()), (Some(5), Some(6 + 4096)));
        assert_eq!((reader.u32(), reader.u16()), (Some(28), Some(4096)));
        assert_eq!(std::str::from_utf8(reader.bytes(4096).unwrap()), Ok(&text[..4096]));
        let out = encoded(Mode::Simple, |to, out| to.error(out, Errno::NoSpc, &text));
        assert_eq!((out.len(), out[7]), (16, 28));
    }

    #[test]
    fn chunk_lengths_count_what_follows_the_header() {
        let extents = [Descriptor { len: 7, status: 3 }, Descriptor { len: 9, status: 0 }];
        for (mode, header) in [(Mode::Structured, 20), (Mode::Extended, 32)] {
            let outs = [
                encoded(mode, |to, out| to.hole(out, true, 0, 1)),
                encoded(mode, |to, out| to.status(out, false, 1, &extents)),
                encoded(mode, |to, out| to.data(out, false, 0, 0)),
                encoded(mode, |to, out| to.error(out, Errno::Io, "no")),
            ];
            for out in outs {
                let told = u32::from_be_bytes(out[header - 4..header].try_into().unwrap());
                assert_eq!(told as usize, out.len() - header);
            }
        }
    }
}
