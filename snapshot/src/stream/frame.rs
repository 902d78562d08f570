//! Frames: pieces of a stream, each with its length, its number and a checksum.

use std::io::{self, Read, Write};

use super::{FRAME_PAGES, MAGIC, StreamError, VERSION};
use crate::format::ram::MAX_REGIONS;
use crate::format::section::{MAX_KIND, MAX_SECTION};
use crate::units::{PAGE, index};

/// Bytes before the first frame.
const START: usize = 16;
/// Bytes before a payload.
const HEAD: usize = 16;
/// Bytes of a section's frame before its payload.
pub(super) const SECTION_HEAD: usize = MAX_KIND + 8;
/// Bytes of a RAM region in its frame.
pub(super) const REGION: usize = 16;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// One section.
    Section,
    /// The RAM regions.
    Regions,
    /// Pages of RAM.
    Pages,
    /// Pages of zeroes.
    Zero,
    /// The end.
    Done,
}

impl Kind {
    const ALL: [Self; 5] = [Self::Section, Self::Regions, Self::Pages, Self::Zero, Self::Done];

    fn bytes(self) -> [u8; 4] {
        *match self {
            Self::Section => b"SECT",
            Self::Regions => b"RAMR",
            Self::Pages => b"PAGE",
            Self::Zero => b"ZERO",
            Self::Done => b"DONE",
        }
    }

    /// Most bytes of a payload.
    fn longest(self) -> u64 {
        match self {
            Self::Section => SECTION_HEAD as u64 + MAX_SECTION,
            Self::Regions => (MAX_REGIONS * REGION) as u64,
            Self::Pages => 8 + FRAME_PAGES * PAGE,
            Self::Zero | Self::Done => 16,
        }
    }
}

/// Writes frames.
pub(super) struct FrameWriter<W> {
    out: W,
    next: u32,
    /// Bytes written.
    pub(super) bytes: u64,
}

impl<W: Write> FrameWriter<W> {
    /// Begins a stream.
    pub(super) fn new(mut out: W) -> Result<Self, StreamError> {
        let mut start = Vec::with_capacity(START);
        start.extend(MAGIC);
        start.extend(VERSION.to_le_bytes());
        start.extend(crc32fast::hash(&start).to_le_bytes());
        out.write_all(&start).map_err(StreamError::Write)?;
        Ok(Self { out, next: 0, bytes: START as u64 })
    }

    /// Writes a frame, whose payload is `first` and then `second`.
    pub(super) fn frame(
        &mut self,
        kind: Kind,
        first: &[u8],
        second: &[u8],
    ) -> Result<(), StreamError> {
        let len = first.len() + second.len();
        let len = u32::try_from(len).map_err(|_| StreamError::TooLong)?;
        let mut head = Vec::with_capacity(HEAD + first.len());
        head.extend(kind.bytes());
        head.extend(len.to_le_bytes());
        head.extend(self.next.to_le_bytes());
        let mut crc = crc32fast::Hasher::new();
        for part in [&head, first, second] {
            crc.update(part);
        }
        head.extend(crc.finalize().to_le_bytes());
        head.extend(first);
        self.next = self.next.checked_add(1).ok_or(StreamError::TooLong)?;
        self.out.write_all(&head).map_err(StreamError::Write)?;
        if !second.is_empty() {
            self.out.write_all(second).map_err(StreamError::Write)?;
        }
        self.bytes += HEAD as u64 + u64::from(len);
        Ok(())
    }

    /// Writes what may still wait.
    pub(super) fn flush(&mut self) -> Result<(), StreamError> {
        self.out.flush().map_err(StreamError::Write)
    }

    /// Where the frames go.
    pub(super) fn out(&mut self) -> &mut W {
        &mut self.out
    }
}

/// Reads frames. Memory grows with what came, not with what a frame says of itself.
pub(super) struct FrameReader<R> {
    input: R,
    next: u32,
    /// Bytes read before the frame that is being looked at.
    pub(super) at: u64,
    /// Bytes read.
    pub(super) bytes: u64,
    /// The payload of the last frame.
    payload: Vec<u8>,
}

impl<R: Read> FrameReader<R> {
    /// Looks at the start of a stream.
    pub(super) fn new(input: R) -> Result<Self, StreamError> {
        let mut reader = Self { input, next: 0, at: 0, bytes: 0, payload: Vec::new() };
        let magic: [u8; 8] = reader.array()?;
        if magic.starts_with(b"QEVM") {
            return Err(StreamError::MadeByQemu);
        }
        if magic != MAGIC {
            return Err(StreamError::UnknownMagic(magic));
        }
        let (version, crc): ([u8; 4], [u8; 4]) = (reader.array()?, reader.array()?);
        if crc32fast::hash(&[&magic[..], &version].concat()).to_le_bytes() != crc {
            return Err(reader.damaged("the checksum of its start is wrong"));
        }
        match u32::from_le_bytes(version) {
            VERSION => Ok(reader),
            other => Err(StreamError::Version(other)),
        }
    }

    /// The next frame and its payload.
    pub(super) fn next(&mut self) -> Result<(Kind, &[u8]), StreamError> {
        self.at = self.bytes;
        let head: [u8; HEAD] = self.array()?;
        let word =
            |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let Some(kind) = Kind::ALL.into_iter().find(|kind| kind.bytes() == head[..4]) else {
            return Err(self.damaged(format!("a frame of the kind {:02x?}", &head[..4])));
        };
        let len = u64::from(word(4));
        if len > kind.longest() {
            return Err(self.damaged(format!("a {kind:?} frame of {len} bytes")));
        }
        if word(8) != self.next {
            return Err(self.damaged(format!("frame {} follows frame {}", word(8), self.next)));
        }
        self.next = self.next.checked_add(1).ok_or(StreamError::TooLong)?;
        self.payload.clear();
        let read = (&mut self.input).take(len).read_to_end(&mut self.payload);
        self.bytes += self.payload.len() as u64;
        read.map_err(StreamError::Read)?;
        if self.payload.len() != index(len) {
            return Err(StreamError::Truncated(self.bytes));
        }
        let mut crc = crc32fast::Hasher::new();
        crc.update(&head[..12]);
        crc.update(&self.payload);
        if crc.finalize() != word(12) {
            return Err(self.damaged(format!("the checksum of a {kind:?} frame is wrong")));
        }
        Ok((kind, &self.payload))
    }

    /// Nothing may follow.
    pub(super) fn end(&mut self) -> Result<(), StreamError> {
        self.at = self.bytes;
        let mut byte = [0];
        match read_some(&mut self.input, &mut byte)? {
            0 => Ok(()),
            _ => Err(self.damaged("something follows its end")),
        }
    }

    /// Where the frames come from.
    pub(super) fn input(&mut self) -> &mut R {
        &mut self.input
    }

    /// Bytes of memory that payloads have taken.
    #[cfg(test)]
    pub(super) fn capacity(&self) -> usize {
        self.payload.capacity()
    }

    pub(super) fn damaged(&self, reason: impl Into<String>) -> StreamError {
        StreamError::Damaged { at: self.at, reason: reason.into() }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], StreamError> {
        let mut bytes = [0; N];
        let mut have = 0;
        while have < N {
            match read_some(&mut self.input, &mut bytes[have..])? {
                0 => return Err(StreamError::Truncated(self.bytes)),
                more => have += more,
            }
            self.bytes = self.at + have as u64;
        }
        self.at = self.bytes;
        Ok(bytes)
    }
}

fn read_some(input: &mut impl Read, to: &mut [u8]) -> Result<usize, StreamError> {
    loop {
        match input.read(to) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other.map_err(StreamError::Read),
        }
    }
}
