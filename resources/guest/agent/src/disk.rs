//! Block devices, past the page cache: what a command reads came from the device, and what it
//! wrote has reached it.

use core::fmt::Write;

use crate::args::{Args, Path};
use crate::buffer::SIZE;
use crate::command::Agent;
use crate::console::Reply;
use crate::error::{During, Error};
use crate::pattern;
use crate::sys::{Errno, Fd, O_DIRECT, O_RDONLY, O_RDWR};

const BLKGETSIZE64: u32 = 0x8008_1272;
const BLKDISCARD: u32 = 0x1277;
const BLKZEROOUT: u32 = 0x127f;

/// Sectors, to which O_DIRECT and the device want ranges aligned.
const SECTOR: u64 = 512;

/// A block device opened with O_DIRECT.
pub struct Disk {
    file: Fd,
}

/// A byte range of a device, aligned to sectors.
#[derive(Clone, Copy)]
pub struct Range {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

impl Range {
    fn parse(args: &mut Args) -> Result<Self, Error> {
        let offset = args.number("offset expected")?;
        let length = args.number("length expected")?;
        Self::new(offset, length)
    }

    /// Checks a range that came in a request.
    pub fn new(offset: u64, length: u64) -> Result<Self, Error> {
        if !offset.is_multiple_of(SECTOR) || !length.is_multiple_of(SECTOR) {
            return Err(Error::Request("offset and length must be multiples of 512"));
        }
        match offset.checked_add(length) {
            Some(end) if end <= i64::MAX as u64 => Ok(Self { offset, length }),
            _ => Err(Error::Request("range too long")),
        }
    }

    /// The range in pieces that fit the buffer.
    fn pieces(self) -> impl Iterator<Item = Range> {
        let end = self.offset + self.length;
        (self.offset..end)
            .step_by(SIZE)
            .map(move |offset| Range { offset, length: (end - offset).min(SIZE as u64) })
    }
}

impl Disk {
    /// Opens a device for reading, and for writing if `write`.
    pub fn open(agent: &mut Agent, path: &Path, write: bool) -> Result<Self, Error> {
        agent.mounts.need_dev()?;
        let flags = O_DIRECT | if write { O_RDWR } else { O_RDONLY };
        Ok(Self { file: Fd::open(path.as_c_str(), flags).during("open")? })
    }

    /// The size in bytes.
    pub fn size(&self) -> Result<u64, Error> {
        let mut size = 0u64;
        // SAFETY: BLKGETSIZE64 fills a u64.
        unsafe { self.file.ioctl(BLKGETSIZE64, &mut size) }.during("size")?;
        Ok(size)
    }

    /// Fills `into` from `offset`.
    pub fn read(&self, mut into: &mut [u8], mut offset: u64) -> Result<(), Error> {
        while !into.is_empty() {
            match self.file.read_at(into, offset).during("read")? {
                0 => return Err(Error::State("range past the end of the device")),
                count => {
                    into = &mut into[count..];
                    offset += count as u64;
                }
            }
        }
        Ok(())
    }

    /// Writes all of `from` at `offset`.
    pub fn write(&self, mut from: &[u8], mut offset: u64) -> Result<(), Error> {
        while !from.is_empty() {
            let count = self.file.write_at(from, offset).during("write")?;
            if count == 0 {
                return Err(Error::State("range past the end of the device"));
            }
            from = &from[count..];
            offset += count as u64;
        }
        Ok(())
    }

    /// Zeroes a range: a write-zeroes request where the device has it, else written zeroes.
    pub fn zero(&self, range: Range) -> Result<(), Error> {
        self.range_ioctl(BLKZEROOUT, range).during("zero")
    }

    /// Makes everything written durable: a flush request.
    pub fn flush(&self) -> Result<(), Error> {
        self.file.sync().during("flush")
    }

    fn range_ioctl(&self, request: u32, range: Range) -> Result<(), Errno> {
        let mut range = [range.offset, range.length];
        // SAFETY: both requests that come here read two u64.
        unsafe { self.file.ioctl(request, &mut range) }
    }
}

/// `size <device>`
pub fn size(agent: &mut Agent, mut args: Args, reply: &mut Reply) -> Result<(), Error> {
    let device = args.device()?;
    args.end()?;
    let size = Disk::open(agent, &device, false)?.size()?;
    let _ = write!(reply, "bytes={size}");
    Ok(())
}

/// `sum <device> <offset> <length>`
pub fn sum(agent: &mut Agent, mut args: Args, reply: &mut Reply) -> Result<(), Error> {
    let (device, range) = (args.device()?, Range::parse(&mut args)?);
    args.end()?;
    let disk = Disk::open(agent, &device, false)?;
    let mut sum = pattern::Sum::new();
    for piece in range.pieces() {
        let bytes = agent.buffer.first(piece.length);
        disk.read(bytes, piece.offset)?;
        sum.add(bytes);
    }
    let _ = write!(reply, "sum={:016x}", sum.value());
    Ok(())
}

/// `pattern <device> <offset> <length> <seed>`
pub fn pattern(agent: &mut Agent, mut args: Args, _: &mut Reply) -> Result<(), Error> {
    let (device, range) = (args.device()?, Range::parse(&mut args)?);
    let seed = args.number("seed expected")?;
    args.end()?;
    let disk = Disk::open(agent, &device, true)?;
    for piece in range.pieces() {
        let bytes = agent.buffer.first(piece.length);
        pattern::fill(bytes, seed, piece.offset);
        disk.write(bytes, piece.offset)?;
    }
    Ok(())
}

/// `verify <device> <offset> <length> <seed>`
pub fn verify(agent: &mut Agent, mut args: Args, _: &mut Reply) -> Result<(), Error> {
    let (device, range) = (args.device()?, Range::parse(&mut args)?);
    let seed = args.number("seed expected")?;
    args.end()?;
    let disk = Disk::open(agent, &device, false)?;
    for piece in range.pieces() {
        let bytes = agent.buffer.first(piece.length);
        disk.read(bytes, piece.offset)?;
        if let Some(offset) = pattern::first_difference(bytes, seed, piece.offset) {
            return Err(Error::Mismatch(offset));
        }
    }
    Ok(())
}

/// `flush <device>`
pub fn flush(agent: &mut Agent, mut args: Args, _: &mut Reply) -> Result<(), Error> {
    let device = args.device()?;
    args.end()?;
    Disk::open(agent, &device, true)?.flush()
}

/// `discard <device> <offset> <length>`
pub fn discard(agent: &mut Agent, mut args: Args, _: &mut Reply) -> Result<(), Error> {
    let (device, range) = (args.device()?, Range::parse(&mut args)?);
    args.end()?;
    Disk::open(agent, &device, true)?.range_ioctl(BLKDISCARD, range).during("discard")
}

/// `zero <device> <offset> <length>`
pub fn zero(agent: &mut Agent, mut args: Args, _: &mut Reply) -> Result<(), Error> {
    let (device, range) = (args.device()?, Range::parse(&mut args)?);
    args.end()?;
    Disk::open(agent, &device, true)?.zero(range)
}

/// `rng <count>`: bytes of the hardware generator, the virtio-rng device.
pub fn rng(agent: &mut Agent, mut args: Args, reply: &mut Reply) -> Result<(), Error> {
    const MOST: u64 = 512;
    let count = args.number("count expected")?;
    args.end()?;
    if count > MOST {
        return Err(Error::Request("at most 512 bytes"));
    }
    agent.mounts.need_dev()?;
    let device = Fd::open(c"/dev/hwrng", O_RDONLY).during("open")?;
    let bytes = agent.buffer.first(count);
    let mut filled = 0;
    while filled < bytes.len() {
        match device.read(&mut bytes[filled..]).during("read")? {
            0 => return Err(Error::State("the generator has ended")),
            count => filled += count,
        }
    }
    reply.push("hex=");
    for byte in bytes {
        let _ = write!(reply, "{byte:02x}");
    }
    Ok(())
}
