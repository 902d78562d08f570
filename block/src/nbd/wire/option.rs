//! The handshake: options of the client, replies of the server.

use super::{GREETING_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, Reader, len32};

/// Option numbers ("Option types").
pub mod code {
    #![allow(missing_docs, reason = "the names are the protocol's")]
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Reply numbers ("Option reply types").
pub mod rep {
    #![allow(missing_docs, reason = "the names are the protocol's")]
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    const ERR: u32 = 1 << 31;
    pub const ERR_UNSUP: u32 = ERR + 1;
    pub const ERR_POLICY: u32 = ERR + 2;
    pub const ERR_INVALID: u32 = ERR + 3;
    pub const ERR_UNKNOWN: u32 = ERR + 6;
    pub const ERR_TOO_BIG: u32 = ERR + 9;
    pub const ERR_EXT_HEADER_REQD: u32 = ERR + 10;
}

/// Kinds of information about an export (`NBD_INFO_*`).
pub mod info {
    #![allow(missing_docs, reason = "the names are the protocol's")]
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Bytes of an option before its data.
pub const HEADER: usize = 16;

/// What the server says first.
pub fn greeting() -> [u8; 18] {
    let mut out = [0; 18];
    out[..8].copy_from_slice(&GREETING_MAGIC.to_be_bytes());
    out[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
    let flags = super::FLAG_FIXED_NEWSTYLE | super::FLAG_NO_ZEROES;
    out[16..].copy_from_slice(&flags.to_be_bytes());
    out
}

/// The start of an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Which option.
    pub option: u32,
    /// Bytes of data that follow, as the client claims.
    pub len: u32,
}

impl Header {
    /// `None` if the magic number is wrong: the client speaks something else.
    pub fn decode(bytes: &[u8; HEADER]) -> Option<Self> {
        let mut reader = Reader::new(bytes);
        if reader.u64()? != OPTION_MAGIC {
            return None;
        }
        Some(Self { option: reader.u32()?, len: reader.u32()? })
    }
}

/// The data of `NBD_OPT_INFO` and `NBD_OPT_GO`.
#[derive(Debug, PartialEq, Eq)]
pub struct InfoRequest<'a> {
    /// The export's name.
    pub name: &'a [u8],
    /// Kinds of information asked for.
    pub wanted: Vec<u16>,
}

impl<'a> InfoRequest<'a> {
    /// `None` if lengths do not fit.
    pub fn decode(data: &'a [u8]) -> Option<Self> {
        let mut reader = Reader::new(data);
        let name = reader.string()?;
        let count = reader.u16()?;
        let wanted = (0..count).map(|_| reader.u16()).collect::<Option<_>>()?;
        reader.is_empty().then_some(Self { name, wanted })
    }

    /// Whether the client asked for this kind of information.
    pub fn wants(&self, kind: u16) -> bool {
        self.wanted.contains(&kind)
    }
}

/// The data of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
#[derive(Debug, PartialEq, Eq)]
pub struct ContextRequest<'a> {
    /// The export's name.
    pub name: &'a [u8],
    /// Names or patterns of contexts.
    pub queries: Vec<&'a [u8]>,
}

impl<'a> ContextRequest<'a> {
    /// `None` if lengths do not fit.
    pub fn decode(data: &'a [u8]) -> Option<Self> {
        let mut reader = Reader::new(data);
        let name = reader.string()?;
        let count = reader.u32()?;
        // Not by the claim: each query must be there, and takes 4 bytes of the data at least.
        let mut queries = Vec::new();
        for _ in 0..count {
            queries.push(reader.string()?);
        }
        reader.is_empty().then_some(Self { name, queries })
    }
}

/// Appends one reply to an option.
pub fn reply(out: &mut Vec<u8>, option: u32, kind: u32, parts: &[&[u8]]) {
    let len = parts.iter().map(|part| part.len()).sum();
    out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&len32(len).to_be_bytes());
    for part in parts {
        out.extend_from_slice(part);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn option_with_another_magic_number_is_refused() {
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
        bytes[11] = 7;
        bytes[15] = 9;
        assert_eq!(Header::decode(&bytes), Some(Header { option: 7, len: 9 }));
        bytes[0] ^= 1;
        assert_eq!(Header::decode(&bytes), None);
    }

    #[test]
    fn info_request_is_decoded_and_wrong_lengths_are_refused() {
        let data = [0, 0, 0, 2, b'a', b'b', 0, 2, 0, 3, 0, 1];
        let request = InfoRequest::decode(&data).unwrap();
        assert_eq!(request, InfoRequest { name: b"ab", wanted: vec![3, 1] });
        for cut in 0..data.len() {
            assert_eq!(InfoRequest::decode(&data[..cut]), None, "{cut} bytes");
        }
        let mut long = data.to_vec();
        long.push(0);
        assert_eq!(InfoRequest::decode(&long), None);
    }

    #[test]
    fn context_request_is_decoded_and_claims_beyond_the_data_are_refused() {
        let data = [0, 0, 0, 1, b'x', 0, 0, 0, 2, 0, 0, 0, 1, b'q', 0, 0, 0, 0];
        let request = ContextRequest::decode(&data).unwrap();
        assert_eq!(request, ContextRequest { name: b"x", queries: vec![b"q", b""] });
        for cut in 0..data.len() {
            assert_eq!(ContextRequest::decode(&data[..cut]), None, "{cut} bytes");
        }
        assert_eq!(ContextRequest::decode(&[0, 0, 0, 0, 255, 255, 255, 255]), None);
        assert_eq!(ContextRequest::decode(&[255, 255, 255, 255, 0, 0, 0, 0]), None);
    }

    #[test]
    fn reply_carries_option_kind_and_length() {
        let mut out = Vec::new();
        reply(&mut out, code::LIST, rep::SERVER, &[&[0, 0, 0, 1], b"e"]);
        let mut reader = Reader::new(&out);
        assert_eq!(reader.u64(), Some(OPTION_REPLY_MAGIC));
        assert_eq!((reader.u32(), reader.u32(), reader.u32()), (Some(3), Some(2), Some(5)));
        assert_eq!(reader.bytes(5), Some(&[0, 0, 0, 1, b'e'][..]));
        assert!(reader.is_empty());
    }
}
