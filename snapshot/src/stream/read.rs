//! Reading a stream.

use std::io::Read;

use super::frame::{FrameReader, Kind, REGION, SECTION_HEAD};
use super::{RUN_KIND, RUN_VERSION, Run, StreamError};
use crate::config::{CONFIG_KIND, CheckpointConfig, decode_config};
use crate::format::header::{MAX_PAYLOAD, MAX_SECTIONS};
use crate::format::section::{MAX_KIND, Section, SectionName};
use crate::memory::RamSlice;
use crate::units::PAGE;
use crate::{GuestMemory, memory};

/// A machine that has come, whose RAM is in place.
#[derive(Debug)]
pub struct Received {
    /// The state of vCPUs and devices.
    pub sections: Vec<Section>,
    /// QMP's name of what the source was doing.
    pub state: String,
    /// Pages with contents, those that came again counted again.
    pub pages: u64,
    /// Bytes of the stream.
    pub bytes: u64,
}

/// Reads a stream. The order: [`StreamReader::open`], [`StreamReader::receive`], [`StreamReader::end`].
pub struct StreamReader<R> {
    frames: FrameReader<R>,
    config: CheckpointConfig,
}

impl<R: Read> StreamReader<R> {
    /// Reads up to the configuration of the machine that was sent.
    ///
    /// # Errors
    /// It is no stream, or damaged, as with all of these.
    pub fn open(input: R) -> Result<Self, StreamError> {
        let mut frames = FrameReader::new(input)?;
        let section = match frames.next()? {
            (Kind::Section, payload) => section(payload),
            (kind, _) => return Err(frames.damaged(format!("it begins with a {kind:?} frame"))),
        };
        let section = section.map_err(|reason| frames.damaged(reason))?;
        if section.name != SectionName::new(CONFIG_KIND, 0) {
            return Err(frames.damaged(format!("it begins with section '{}'", section.name)));
        }
        let config = decode_config(&[section])?;
        Ok(Self { frames, config })
    }

    /// The machine that was sent.
    pub fn config(&self) -> &CheckpointConfig {
        &self.config
    }

    /// Where it comes from.
    pub fn input(&mut self) -> &mut R {
        self.frames.input()
    }

    /// Reads up to the end, pages into `ram`, which was never written. After each frame `each` is told the
    /// bytes so far, and can end it.
    ///
    /// # Errors
    /// Also that of `each`. RAM is in pieces then.
    pub fn receive(
        &mut self,
        ram: &GuestMemory,
        mut each: impl FnMut(u64) -> Result<(), StreamError>,
    ) -> Result<Received, StreamError> {
        self.regions(ram)?;
        let slices = memory::slices(ram);
        let ranges: Vec<_> = memory::ranges(ram).iter().map(|&(at, len)| (at.0, len)).collect();
        let target = Target { slices, ranges };
        let (mut sections, mut payload, mut pages) = (Vec::<Section>::new(), 0, 0);
        loop {
            let before = self.frames.bytes;
            let (kind, bytes) = self.frames.next()?;
            let applied = match kind {
                Kind::Pages if sections.is_empty() => target.put(bytes).map(|count| pages += count),
                Kind::Zero if sections.is_empty() => target.clear(bytes),
                Kind::Section => {
                    payload += bytes.len() as u64;
                    section(bytes).map(|section| sections.push(section))
                }
                Kind::Done => {
                    let [told_pages, told_bytes] = words(bytes).unwrap_or_default();
                    match (told_pages, told_bytes) == (pages, before) {
                        true => break,
                        false => Err(format!(
                            "its end tells of {told_pages} pages and {told_bytes} bytes, there were \
                             {pages} and {before}"
                        )),
                    }
                }
                kind => Err(format!("a {kind:?} frame in the wrong place")),
            };
            applied.map_err(|reason| self.frames.damaged(reason))?;
            if let Some((last, others)) = sections.split_last()
                && kind == Kind::Section
                && others.iter().any(|other| other.name == last.name)
            {
                return Err(StreamError::Twice(last.name.clone()));
            }
            if sections.len() > MAX_SECTIONS || payload > MAX_PAYLOAD {
                return Err(self.frames.damaged("there are more sections than the format allows"));
            }
            each(self.frames.bytes)?;
        }
        let name = SectionName::new(RUN_KIND, 0);
        let Some(at) = sections.iter().position(|section| section.name == name) else {
            return Err(crate::FormatError::Missing(name).into());
        };
        let run: Run = sections.remove(at).decode(RUN_VERSION..=RUN_VERSION)?;
        Ok(Received { sections, state: run.state, pages, bytes: self.frames.bytes })
    }

    /// Nothing may follow what was received.
    pub fn end(&mut self) -> Result<(), StreamError> {
        self.frames.end()
    }

    fn regions(&mut self, ram: &GuestMemory) -> Result<(), StreamError> {
        let told: Option<Vec<(u64, u64)>> = match self.frames.next()? {
            (Kind::Regions, bytes) if bytes.len().is_multiple_of(REGION) => Some(
                bytes.chunks(REGION).filter_map(words).map(|[start, len]| (start, len)).collect(),
            ),
            _ => None,
        };
        let told = told.ok_or_else(|| self.frames.damaged("RAM regions are expected"))?;
        let ours = memory::ranges(ram).into_iter().map(|(start, len)| (start.0, len));
        if told.into_iter().eq(ours) { Ok(()) } else { Err(StreamError::Regions) }
    }
}

/// RAM that is filled.
struct Target<'a> {
    slices: Vec<RamSlice<'a>>,
    /// Address and length of each region.
    ranges: Vec<(u64, u64)>,
}

impl Target<'_> {
    fn put(&self, payload: &[u8]) -> Result<u64, String> {
        let Some((address, pages)) = payload.split_first_chunk::<8>() else {
            return Err("pages without an address".to_owned());
        };
        let (slice, offset) = self.find(u64::from_le_bytes(*address), pages.len() as u64)?;
        slice.put(offset, pages);
        Ok(pages.len() as u64 / PAGE)
    }

    fn clear(&self, payload: &[u8]) -> Result<(), String> {
        let [address, len] = words(payload).ok_or("zeroes without a place")?;
        let (slice, offset) = self.find(address, len)?;
        slice.clear(offset, len);
        Ok(())
    }

    /// The region with all of a range of whole pages, and where in it.
    fn find(&self, address: u64, len: u64) -> Result<(&RamSlice<'_>, u64), String> {
        let wrong = || format!("{len:#x} bytes at {address:#x} are not whole pages of RAM");
        if len == 0 || !len.is_multiple_of(PAGE) || !address.is_multiple_of(PAGE) {
            return Err(wrong());
        }
        let inside = |(start, size): &(u64, u64)| {
            let offset = address.checked_sub(*start)?;
            let end = offset.checked_add(len)?;
            (end <= *size).then_some(offset)
        };
        let mut regions = self.slices.iter().zip(&self.ranges);
        regions.find_map(|(slice, range)| Some((slice, inside(range)?))).ok_or_else(wrong)
    }
}

/// A section out of its frame.
fn section(payload: &[u8]) -> Result<Section, String> {
    let Some((head, bytes)) = payload.split_at_checked(SECTION_HEAD) else {
        return Err("a section without a name".to_owned());
    };
    let (kind, numbers) = head.split_at(MAX_KIND);
    let len = kind.iter().position(|&byte| byte == 0).unwrap_or(MAX_KIND);
    let padded = kind[len..].iter().all(|&byte| byte == 0);
    let word = |at: usize| {
        u32::from_le_bytes([numbers[at], numbers[at + 1], numbers[at + 2], numbers[at + 3]])
    };
    let name = SectionName::new(String::from_utf8_lossy(&kind[..len]), word(0));
    if !padded || !name.is_valid() {
        return Err(format!("a section with the name {:?}", name.to_string()));
    }
    Ok(Section { name, version: word(4), bytes: bytes.to_vec() })
}

/// Two numbers; `None` if it is another length.
fn words(bytes: &[u8]) -> Option<[u64; 2]> {
    let (words, []) = bytes.as_chunks::<8>() else { return None };
    let words: &[[u8; 8]; 2] = words.try_into().ok()?;
    Some(words.map(u64::from_le_bytes))
}
