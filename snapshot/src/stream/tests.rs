//! Streams there and back, damaged and forged.

use std::io::{self, Read};

use vm_memory::{Bytes, GuestAddress};

use super::frame::{FrameReader, FrameWriter, Kind};
use super::*;
use crate::config::MachineConfig;
use crate::format::section::Section;
use crate::track::{PageRun, PageSet};
use crate::{About, GuestMemory};

const PAGES: u64 = 200;
const HIGH: u64 = 1 << 32;

fn ram() -> GuestMemory {
    let len = usize::try_from(PAGES * 4096).unwrap();
    GuestMemory::from_ranges(&[(GuestAddress(0), len), (GuestAddress(HIGH), len)]).unwrap()
}

fn all(ram: &GuestMemory) -> PageSet {
    let mut pages = PageSet::of(ram);
    pages.insert_all();
    pages
}

fn contents(ram: &GuestMemory) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(2 * PAGES * 4096).unwrap()];
    let (low, high) = bytes.split_at_mut(usize::try_from(PAGES * 4096).unwrap());
    ram.read_slice(low, GuestAddress(0)).unwrap();
    ram.read_slice(high, GuestAddress(HIGH)).unwrap();
    bytes
}

fn put(ram: &GuestMemory, address: u64, value: u64) {
    ram.write_obj(value, GuestAddress(address)).unwrap();
}

fn sections() -> Vec<Section> {
    vec![
        Section::encode("vcpu", 0, 3, &vec![7_u64; 100]).unwrap(),
        Section::encode("vcpu", 1, 3, "text").unwrap(),
    ]
}

fn machine() -> MachineConfig {
    MachineConfig { machine: "microvm".to_owned(), vcpus: 2, ..MachineConfig::default() }
}

/// A stream of two rounds, between which a page changes, one comes and one becomes zero.
fn stream(ram: &GuestMemory) -> Vec<u8> {
    for page in [0, 1, 2, 63, 64, 65, 199] {
        put(ram, page * 4096 + 8, page + 1);
        put(ram, HIGH + page * 4096 + 4088, page + 2);
    }
    let about = About { description: "d".to_owned(), ..About::default() };
    let mut writer = StreamWriter::begin(Vec::new(), &machine(), about, ram).unwrap();
    let mut told = 0;
    let each = |pages: u64, _: Sent| {
        told += pages;
        Ok(())
    };
    writer.pages(ram, &all(ram), true, each).unwrap();
    assert_eq!(told, 2 * PAGES);
    assert_eq!((writer.sent().pages, writer.sent().zero), (14, 2 * PAGES - 14));
    put(ram, 8, 99);
    put(ram, 4096 + 8, 0);
    put(ram, HIGH + 100 * 4096, 5);
    let mut dirty = PageSet::of(ram);
    dirty.insert(PageRun { region: 0, first: 0, count: 2 });
    dirty.insert(PageRun { region: 1, first: 100, count: 1 });
    writer.pages(ram, &dirty, false, |_, _| Ok(())).unwrap();
    writer.sections(&sections(), "paused").unwrap();
    writer.done().unwrap();
    std::mem::take(writer.out())
}

fn receive(bytes: &[u8], ram: &GuestMemory) -> Result<Received, StreamError> {
    let mut reader = StreamReader::open(bytes)?;
    let received = reader.receive(ram, |_| Ok(()))?;
    reader.end()?;
    Ok(received)
}

#[test]
fn what_is_sent_is_received() {
    let (source, target) = (ram(), ram());
    let bytes = stream(&source);
    let mut reader = StreamReader::open(&*bytes).unwrap();
    assert_eq!(reader.config().machine, machine());
    assert_eq!(reader.config().about.description, "d");
    let mut told = Vec::new();
    let received = reader
        .receive(&target, |bytes| {
            told.push(bytes);
            Ok(())
        })
        .unwrap();
    reader.end().unwrap();
    assert_eq!(received.sections, sections());
    assert_eq!((received.state.as_str(), received.pages), ("paused", 16));
    assert_eq!(received.bytes, bytes.len() as u64);
    assert!(told.is_sorted() && told.len() > 10);
    assert!(contents(&source) == contents(&target));
}

/// Gives a few bytes at a time, and is interrupted now and then.
struct Trickle<'a>(&'a [u8], u64);

impl Read for Trickle<'_> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        self.1 += 1;
        if self.1.is_multiple_of(5) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let len = to.len().min(self.0.len()).min(7);
        let (now, rest) = self.0.split_at(len);
        to[..len].copy_from_slice(now);
        self.0 = rest;
        Ok(len)
    }
}

#[test]
fn it_may_come_in_small_pieces() {
    let (source, target) = (ram(), ram());
    let bytes = stream(&source);
    let mut reader = StreamReader::open(Trickle(&bytes, 0)).unwrap();
    reader.receive(&target, |_| Ok(())).unwrap();
    reader.end().unwrap();
    assert!(contents(&source) == contents(&target));
}

#[test]
fn every_truncation_and_any_changed_bit_is_an_error() {
    let bytes = stream(&ram());
    let target = ram();
    for len in (0..bytes.len()).step_by(97).chain(bytes.len() - 200..bytes.len()) {
        let error = receive(&bytes[..len], &target).unwrap_err();
        assert!(matches!(error, StreamError::Truncated(at) if at <= len as u64), "{len}: {error}");
    }
    let mut random = fastrand::Rng::with_seed(4);
    for _ in 0..3000 {
        let mut damaged = bytes.clone();
        let at = match random.bool() {
            // Most bytes are of pages.
            true => random.usize(..bytes.len()),
            false => random.usize(..400),
        };
        damaged[at] ^= 1 << random.u32(..8);
        receive(&damaged, &target).expect_err("a changed bit");
    }
    let longer = [&bytes[..], &[0]].concat();
    let error = receive(&longer, &target).unwrap_err().to_string();
    assert!(error.contains("something follows its end"), "{error}");
}

#[test]
fn other_files_are_told_by_name() {
    let error = |bytes: &[u8]| receive(bytes, &ram()).unwrap_err().to_string();
    assert_eq!(error(b"QEVM0000"), "the migration stream was made by QEMU; only QEMU can load it");
    assert!(error(b"\x7fELF0000").starts_with("this is no migration stream"));
    let mut newer = b"TARDMIG\x1a\x02\0\0\0".to_vec();
    newer.extend(crc32fast::hash(&newer).to_le_bytes());
    assert_eq!(error(&newer), "the migration stream has version 2; this program reads version 1");
}

#[test]
fn memory_is_taken_for_what_came_not_for_what_is_claimed() {
    let mut bytes = Vec::new();
    FrameWriter::new(&mut bytes).unwrap();
    bytes.extend(b"SECT");
    bytes.extend((64_u32 << 20).to_le_bytes());
    bytes.extend([0; 8]);
    let mut reader = FrameReader::new(&*bytes).unwrap();
    assert!(matches!(reader.next(), Err(StreamError::Truncated(_))));
    assert!(reader.capacity() < 1 << 20);
    let at = bytes.len() - 12;
    bytes[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
    let error = FrameReader::new(&*bytes).unwrap().next().unwrap_err().to_string();
    assert!(error.contains("a Section frame of 4294967295 bytes"), "{error}");
}

/// A stream whose frames after the regions are forged, with right checksums.
fn forged(forge: impl FnOnce(&mut FrameWriter<&mut Vec<u8>>)) -> String {
    let (source, mut bytes) = (ram(), Vec::new());
    let mut writer =
        StreamWriter::begin(&mut bytes, &machine(), About::default(), &source).unwrap();
    forge(writer.frames());
    drop(writer);
    receive(&bytes, &ram()).expect_err("a forged stream").to_string()
}

fn section_payload(kind: &str, state: &str) -> Vec<u8> {
    let section = Section::encode("any", 0, 1, state).unwrap();
    let mut payload = kind.as_bytes().to_vec();
    payload.resize(48, 0);
    payload.extend([0, 0, 0, 0, 1, 0, 0, 0]);
    payload.extend(section.bytes);
    payload
}

#[test]
fn frames_that_break_a_rule_are_refused_whatever_their_checksum() {
    let words = |a: u64, b: u64| [a.to_le_bytes(), b.to_le_bytes()].concat();
    let page = [1; 4096];
    for address in [1, PAGES * 4096, HIGH - 4096, HIGH + PAGES * 4096, u64::MAX - 4095] {
        let text = forged(|out| out.frame(Kind::Pages, &address.to_le_bytes(), &page).unwrap());
        assert!(text.contains("are not whole pages of RAM"), "{text}");
        let text = forged(|out| out.frame(Kind::Zero, &words(address, 4096), &[]).unwrap());
        assert!(text.contains("are not whole pages of RAM"), "{text}");
    }
    for len in [0, 1, u64::MAX, (PAGES + 1) * 4096] {
        let text = forged(|out| out.frame(Kind::Zero, &words(0, len), &[]).unwrap());
        assert!(text.contains("are not whole pages of RAM"), "{len}: {text}");
    }
    type Case = (&'static str, fn(&mut FrameWriter<&mut Vec<u8>>));
    let cases: [Case; 8] = [
        ("pages without an address", |out| out.frame(Kind::Pages, &[1; 7], &[]).unwrap()),
        ("a Regions frame in the wrong place", |out| out.frame(Kind::Regions, &[], &[]).unwrap()),
        ("a Pages frame in the wrong place", |out| {
            out.frame(Kind::Section, &section_payload("a", ""), &[]).unwrap();
            out.frame(Kind::Pages, &[0; 8], &[0; 4096]).unwrap();
        }),
        ("section 'a.0' of the migration stream is there twice", |out| {
            for _ in 0..2 {
                out.frame(Kind::Section, &section_payload("a", ""), &[]).unwrap();
            }
        }),
        ("a section with the name", |out| {
            out.frame(Kind::Section, &section_payload("A!", "")[..56], &[]).unwrap();
        }),
        ("its end tells of 1 pages and 5 bytes", |out| {
            out.frame(Kind::Done, &[1, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0], &[]).unwrap();
        }),
        ("section 'run.0' is missing", |out| {
            let end = [0_u64.to_le_bytes(), out.bytes.to_le_bytes()].concat();
            out.frame(Kind::Done, &end, &[]).unwrap();
        }),
        ("section 'run.0' cannot be decoded", |out| {
            out.frame(Kind::Section, &section_payload("run", "x"), &[]).unwrap();
            let end = [0_u64.to_le_bytes(), out.bytes.to_le_bytes()].concat();
            out.frame(Kind::Done, &end, &[]).unwrap();
        }),
    ];
    for (words, forge) in cases {
        let text = forged(forge);
        assert!(text.contains(words), "{words}: {text}");
    }
}

#[test]
fn other_ram_and_other_beginnings_are_refused() {
    let bytes = stream(&ram());
    let other = GuestMemory::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
    assert!(matches!(receive(&bytes, &other), Err(StreamError::Regions)));
    let mut bytes = Vec::new();
    FrameWriter::new(&mut bytes).unwrap().frame(Kind::Done, &[0; 16], &[]).unwrap();
    let text = receive(&bytes, &ram()).unwrap_err().to_string();
    assert!(text.contains("it begins with a Done frame"), "{text}");
}

#[test]
fn both_ends_can_be_told_to_stop() {
    let (source, target) = (ram(), ram());
    let bytes = stream(&source);
    let stop = || StreamError::Read(io::Error::other("enough"));
    let mut reader = StreamReader::open(&*bytes).unwrap();
    assert!(reader.receive(&target, |_| Err(stop())).is_err());
    let mut writer =
        StreamWriter::begin(io::sink(), &machine(), About::default(), &source).unwrap();
    let mut pieces = 0;
    let stopped = writer.pages(&source, &all(&source), true, |_, _| {
        pieces += 1;
        if pieces == 2 { Err(stop()) } else { Ok(()) }
    });
    assert!(stopped.is_err() && pieces == 2);
}

/// A target that is full after some bytes.
struct Full(usize);

impl io::Write for Full {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0 == 0 {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let len = bytes.len().min(self.0);
        self.0 -= len;
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_target_that_takes_no_more_is_an_error_at_every_byte() {
    let source = ram();
    let whole = stream(&source).len();
    for room in (0..whole).step_by(1009) {
        let send = || {
            let out = Full(room);
            let mut writer = StreamWriter::begin(out, &machine(), About::default(), &source)?;
            writer.pages(&source, &all(&source), true, |_, _| Ok(()))?;
            writer.sections(&sections(), "running")?;
            // What the first stream has besides.
            writer.pages(&source, &all(&source), false, |_, _| Ok(()))?;
            writer.done()
        };
        assert!(matches!(send(), Err(StreamError::Write(_))), "{room}");
    }
}
