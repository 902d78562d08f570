//! virtio-blk requests as drivers write them (virtio 1.2 section 5.2.6): parsing, no execution.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::GuestAddress;

use super::config::{MAX_RANGE_SECTORS, SECTOR_SIZE};
use crate::GuestMemory;
use crate::virtio::chain::{Chain, Malformed};

/// Bytes of a request's header.
const HEADER_SIZE: usize = 16;
/// Bytes of one range of a discard or write-zeroes request.
pub(crate) const RANGE_SIZE: usize = 16;

/// What a request asks for. Its data is what is left in the chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Disk to guest, from a sector.
    Read(u64),
    /// Guest to disk, at a sector.
    Write(u64),
    /// Make writes durable.
    Flush,
    /// Give the serial number.
    GetId,
    /// Ranges that are not needed.
    Discard,
    /// Ranges to read as zeroes.
    WriteZeroes,
    /// A type we do not know.
    Unknown(u32),
}

/// A request and where its status byte goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// What to do.
    pub operation: Operation,
    /// Guest physical address of the status byte.
    pub status: GuestAddress,
}

impl Request {
    /// Takes the header and the status byte off the chain. A chain without room for them cannot be
    /// answered, which is the driver's fault.
    pub fn parse(mem: &GuestMemory, chain: &mut Chain) -> Result<Self, Malformed> {
        let mut header = [0; HEADER_SIZE];
        if !chain.readable.read_front(mem, &mut header)? {
            return Err(Malformed::Short("request header"));
        }
        let status = chain.writable.pop_last_byte().ok_or(Malformed::Short("status byte"))?;
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let operation = match u32::from_le_bytes([t0, t1, t2, t3]) {
            VIRTIO_BLK_T_IN => Operation::Read(sector),
            VIRTIO_BLK_T_OUT => Operation::Write(sector),
            VIRTIO_BLK_T_FLUSH => Operation::Flush,
            VIRTIO_BLK_T_GET_ID => Operation::GetId,
            VIRTIO_BLK_T_DISCARD => Operation::Discard,
            VIRTIO_BLK_T_WRITE_ZEROES => Operation::WriteZeroes,
            other => Operation::Unknown(other),
        };
        Ok(Self { operation, status })
    }
}

/// A part of the disk, in bytes, that lies inside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Offset from the start of the disk in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

impl Extent {
    /// The part of `len` bytes from `sector`; None unless it is whole sectors within `capacity`
    /// sectors.
    pub fn new(sector: u64, len: u64, capacity: u64) -> Option<Self> {
        if !len.is_multiple_of(SECTOR_SIZE) {
            return None;
        }
        let end = sector.checked_add(len / SECTOR_SIZE)?;
        if end > capacity {
            return None;
        }
        Some(Self { offset: sector.checked_mul(SECTOR_SIZE)?, len })
    }
}

/// One range of a discard or write-zeroes request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// First sector.
    pub sector: u64,
    /// Number of sectors.
    pub sectors: u32,
    /// Flags as the driver wrote them.
    pub flags: u32,
}

impl Range {
    /// Decodes a range.
    pub fn parse(bytes: [u8; RANGE_SIZE]) -> Self {
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = bytes;
        Self {
            sector: u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]),
            sectors: u32::from_le_bytes([n0, n1, n2, n3]),
            flags: u32::from_le_bytes(flags),
        }
    }

    /// Where it is; None if it is too large or not inside a disk of `capacity` sectors.
    pub fn extent(&self, capacity: u64) -> Option<Extent> {
        if self.sectors > MAX_RANGE_SECTORS {
            return None;
        }
        Extent::new(self.sector, u64::from(self.sectors) * SECTOR_SIZE, capacity)
    }

    /// Whether the driver lets the space be given back.
    pub fn unmap(&self) -> bool {
        self.flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0
    }

    /// Whether the flags are ones we know; a discard has none (section 5.2.6.2).
    pub(crate) fn flags_are_known(&self, discard: bool) -> bool {
        let known = if discard { 0 } else { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP };
        self.flags & !known == 0
    }
}

#[cfg(test)]
mod tests;
