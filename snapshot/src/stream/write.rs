//! Writing a stream.

use std::io::Write;

use super::frame::{FrameWriter, Kind};
use super::{FRAME_PAGES, RUN_KIND, RUN_VERSION, Run, StreamError};
use crate::about::About;
use crate::config::{CheckpointConfig, MachineConfig, encode_config};
use crate::format::section::{MAX_KIND, Section};
use crate::memory::{Copies, Pagemap, RamSlice};
use crate::track::{PageRun, PageSet};
use crate::units::{PAGE, index};
use crate::{GuestMemory, memory};

/// Pages whose contents are asked for at a time.
const LOOK_PAGES: u64 = 512;

/// What was sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sent {
    /// Pages with contents.
    pub pages: u64,
    /// Pages of zeroes.
    pub zero: u64,
    /// Bytes of the stream.
    pub bytes: u64,
}

/// Writes a stream. The order: [`StreamWriter::begin`], [`StreamWriter::pages`] as often as it takes,
/// [`StreamWriter::sections`], [`StreamWriter::done`].
pub struct StreamWriter<W> {
    frames: FrameWriter<W>,
    sent: Sent,
    copies: Copies,
    pagemap: Option<Pagemap>,
}

impl<W: Write> StreamWriter<W> {
    /// Begins a stream of a machine with this configuration and RAM.
    ///
    /// # Errors
    /// It cannot be written, as with all of these.
    pub fn begin(
        out: W,
        machine: &MachineConfig,
        about: About,
        ram: &GuestMemory,
    ) -> Result<Self, StreamError> {
        let frames = FrameWriter::new(out)?;
        let pagemap = Pagemap::open().ok();
        let copies = Copies::room(FRAME_PAGES);
        let mut writer = Self { frames, sent: Sent::default(), copies, pagemap };
        let config = CheckpointConfig { machine: machine.clone(), nodes: Vec::new(), about };
        writer.section(&encode_config(&config)?)?;
        let mut regions = Vec::new();
        for (start, len) in memory::ranges(ram) {
            regions.extend(start.0.to_le_bytes());
            regions.extend(len.to_le_bytes());
        }
        writer.frames.frame(Kind::Regions, &regions, &[])?;
        Ok(writer)
    }

    /// What was sent so far.
    pub fn sent(&self) -> Sent {
        Sent { bytes: self.frames.bytes, ..self.sent }
    }

    /// What is written to it besides is forged.
    #[cfg(test)]
    pub(super) fn frames(&mut self) -> &mut FrameWriter<W> {
        &mut self.frames
    }

    /// Where it goes.
    pub fn out(&mut self) -> &mut W {
        self.frames.out()
    }

    /// Sends what pages hold now, of which none may be missing. `first`: none of them was sent before,
    /// so zeroes need no word. After each piece of at most [`FRAME_PAGES`] pages `each` is told how many
    /// pages it was of, and can end it.
    ///
    /// # Errors
    /// Also that of `each`.
    pub fn pages(
        &mut self,
        ram: &GuestMemory,
        pages: &PageSet,
        first: bool,
        mut each: impl FnMut(u64, Sent) -> Result<(), StreamError>,
    ) -> Result<(), StreamError> {
        let slices = memory::slices(ram);
        let starts: Vec<u64> = memory::ranges(ram).iter().map(|(start, _)| start.0).collect();
        for run in pages.runs() {
            for look in run.pieces(LOOK_PAGES) {
                let touched = self.touched(&slices[look.region], look);
                for piece in look.pieces(FRAME_PAGES) {
                    let at = index(piece.first - look.first);
                    let touched = touched.as_ref().map(|t| &t[at..at + index(piece.count)]);
                    self.piece(&slices, starts[piece.region], piece, touched, first)?;
                    each(piece.count, self.sent())?;
                }
            }
        }
        Ok(())
    }

    /// Which pages may be other than zero; `None` if any may.
    fn touched(&self, region: &RamSlice<'_>, run: PageRun) -> Option<Vec<bool>> {
        let pagemap = self.pagemap.as_ref().filter(|_| region.is_anonymous())?;
        pagemap.touched(region.host(run.offset(), run.len()), run.count).ok()
    }

    fn piece(
        &mut self,
        slices: &[RamSlice<'_>],
        start: u64,
        piece: PageRun,
        touched: Option<&[bool]>,
        first: bool,
    ) -> Result<(), StreamError> {
        let untouched = touched.is_some_and(|touched| !touched.contains(&true));
        let zero: Vec<bool> = if untouched {
            vec![true; index(piece.count)]
        } else {
            // The guest may run: what is checked and sent is one copy.
            self.copies.fill(0, slices, piece);
            let pages = self.copies.bytes_of(0, piece.count).chunks(index(PAGE));
            pages.map(is_zero).collect()
        };
        let mut at = 0;
        for same in zero.chunk_by(|a, b| a == b) {
            let (from, count) = (at, same.len() as u64);
            at += count;
            let address = (start + (piece.first + from) * PAGE).to_le_bytes();
            if !same[0] {
                let bytes = self.copies.bytes_of(from, count);
                self.frames.frame(Kind::Pages, &address, bytes)?;
                self.sent.pages += count;
                continue;
            }
            self.sent.zero += count;
            if !first {
                self.frames.frame(Kind::Zero, &address, &(count * PAGE).to_le_bytes())?;
            }
        }
        Ok(())
    }

    /// Sends the state of vCPUs and devices, and QMP's name of what the machine was doing.
    pub fn sections(&mut self, sections: &[Section], state: &str) -> Result<(), StreamError> {
        for section in sections {
            self.section(section)?;
        }
        let run = Run { state: state.to_owned() };
        self.section(&Section::encode(RUN_KIND, 0, RUN_VERSION, &run)?)?;
        self.frames.flush()
    }

    fn section(&mut self, section: &Section) -> Result<(), StreamError> {
        section.check_writable()?;
        let mut head = section.name.kind().as_bytes().to_vec();
        head.resize(MAX_KIND, 0);
        head.extend(section.name.instance().to_le_bytes());
        head.extend(section.version.to_le_bytes());
        self.frames.frame(Kind::Section, &head, &section.bytes)
    }

    /// Ends the stream: from here on the reader may have a whole machine.
    pub fn done(&mut self) -> Result<(), StreamError> {
        let (pages, bytes) = (self.sent.pages.to_le_bytes(), self.frames.bytes.to_le_bytes());
        self.frames.frame(Kind::Done, &[pages, bytes].concat(), &[])?;
        self.frames.flush()
    }
}

fn is_zero(page: &[u8]) -> bool {
    let (words, rest) = page.as_chunks::<16>();
    let none = |words: &[[u8; 16]]| {
        words.iter().fold(0, |all, word| all | u128::from_ne_bytes(*word)) == 0
    };
    words.chunks(16).all(none) && rest.iter().all(|&byte| byte == 0)
}
