//! Descriptor chains: read strictly from the rings, into lists of segments.
//!
//! The driver may change descriptors while we read them. Each is read once into our own memory and
//! judged there, so what was checked is what is used.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend};

use crate::GuestMemory;

/// Size of a descriptor in bytes (section 2.7.5).
const DESCRIPTOR_SIZE: u32 = 16;

/// A range of guest memory, checked to be inside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Guest physical address.
    pub addr: GuestAddress,
    /// Length in bytes, not 0.
    pub len: u32,
}

/// What is wrong with a queue or a chain. The device needs a reset after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// The available index is further ahead than the queue is long.
    #[error("available index is more than the queue size ahead")]
    AvailIndex,
    /// The head or a next field is not in the descriptor table.
    #[error("descriptor index {0} is outside the table")]
    DescriptorIndex(u32),
    /// A descriptor, its table or a ring is not in guest memory.
    #[error("{len} bytes at guest address {addr:#x} are not in memory")]
    Address {
        /// Guest physical address.
        addr: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The chain is longer than the queue allows, or has a loop.
    #[error("chain has more than {0} descriptors, or a loop")]
    TooLong(u16),
    /// The buffers add up to more than 4 GiB (section 2.7.5).
    #[error("chain has more than 4 GiB")]
    TooLarge,
    /// A readable buffer follows a writable one (section 2.7.4.2).
    #[error("readable descriptor after a writable one")]
    Order,
    /// An indirect descriptor that was not negotiated, is nested, goes on, or has a bad length
    /// (section 2.7.5.3).
    #[error("bad indirect descriptor")]
    Indirect,
    /// The chain has no room for what every request of the device has.
    #[error("chain has no room for the {0}")]
    Short(&'static str),
}

/// Where chains are, and what they may be.
#[derive(Debug, Clone, Copy)]
pub(super) struct ChainRules {
    /// Guest physical address of the descriptor table.
    pub(super) desc_table: u64,
    /// Descriptors in the table.
    pub(super) size: u16,
    /// Descriptors a chain may have, those of an indirect table included.
    pub(super) max_len: u16,
    /// Whether VIRTIO_F_INDIRECT_DESC was negotiated.
    pub(super) indirect: bool,
}

/// A list of segments that is consumed from its ends.
#[derive(Debug, Default)]
pub struct SegmentList {
    segments: Vec<Segment>,
    first: usize,
}

impl SegmentList {
    fn clear(&mut self) {
        self.segments.clear();
        self.first = 0;
    }

    fn push(&mut self, segment: Segment) {
        self.segments.push(segment);
    }

    /// What is left, in order.
    pub fn segments(&self) -> &[Segment] {
        self.segments.get(self.first..).unwrap_or_default()
    }

    /// Bytes left.
    pub fn len(&self) -> u64 {
        self.segments().iter().map(|s| u64::from(s.len)).sum()
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.segments().is_empty()
    }

    /// Takes bytes from the front until `buf` is full; false if there are too few.
    ///
    /// Drivers may cut requests into descriptors anywhere (section 2.7.4).
    pub(crate) fn read_front(
        &mut self,
        mem: &GuestMemory,
        buf: &mut [u8],
    ) -> Result<bool, Malformed> {
        let mut rest = buf;
        while !rest.is_empty() {
            let Some(segment) = self.segments.get_mut(self.first) else {
                return Ok(false);
            };
            let count = rest.len().min(segment.len as usize);
            let (now, later) = rest.split_at_mut(count);
            mem.read_slice(now, segment.addr)
                .map_err(|_| out_of_memory(segment.addr, segment.len))?;
            // count is at most segment.len.
            let count = u32::try_from(count).unwrap_or(segment.len);
            segment.len -= count;
            if segment.len == 0 {
                self.first += 1;
            } else {
                segment.addr = segment.addr.unchecked_add(u64::from(count));
            }
            rest = later;
        }
        Ok(true)
    }

    /// Takes the last byte off and returns where it is.
    pub(crate) fn pop_last_byte(&mut self) -> Option<GuestAddress> {
        if self.is_empty() {
            return None;
        }
        let last = self.segments.last_mut()?;
        last.len -= 1;
        let addr = last.addr.unchecked_add(u64::from(last.len));
        if last.len == 0 {
            self.segments.pop();
        }
        Some(addr)
    }
}

/// One request: what the device may read, then what it may write.
#[derive(Debug, Default)]
pub struct Chain {
    /// Buffers for the device to read.
    pub readable: SegmentList,
    /// Buffers for the device to write.
    pub writable: SegmentList,
}

impl Chain {
    /// Reads the chain that starts at `head`, in place of what was here.
    pub(super) fn load(
        &mut self,
        mem: &GuestMemory,
        rules: &ChainRules,
        head: u16,
    ) -> Result<(), Malformed> {
        self.readable.clear();
        self.writable.clear();
        let mut table =
            Table { addr: rules.desc_table, len: u32::from(rules.size), indirect: false };
        let mut index = head;
        let mut bytes = 0u32;
        let mut left = rules.max_len;
        loop {
            let desc = table.read(mem, index)?;
            if desc.refers_to_indirect_table() {
                // Happens once: a table inside an indirect table is refused.
                table = table.enter(&desc, rules)?;
                index = 0;
                continue;
            }
            left = left.checked_sub(1).ok_or(Malformed::TooLong(rules.max_len))?;
            bytes = bytes.checked_add(desc.len()).ok_or(Malformed::TooLarge)?;
            self.add(mem, &desc)?;
            if !desc.has_next() {
                return Ok(());
            }
            index = desc.next();
        }
    }

    fn add(&mut self, mem: &GuestMemory, desc: &Descriptor) -> Result<(), Malformed> {
        if desc.len() == 0 {
            return Ok(());
        }
        let segment = Segment { addr: desc.addr(), len: desc.len() };
        if !in_memory(mem, segment.addr, segment.len) {
            return Err(out_of_memory(segment.addr, segment.len));
        }
        if desc.is_write_only() {
            self.writable.push(segment);
        } else if self.writable.is_empty() {
            self.readable.push(segment);
        } else {
            return Err(Malformed::Order);
        }
        Ok(())
    }
}

/// A descriptor table: the queue's own, or an indirect one.
struct Table {
    addr: u64,
    len: u32,
    indirect: bool,
}

impl Table {
    fn read(&self, mem: &GuestMemory, index: u16) -> Result<Descriptor, Malformed> {
        let index = u32::from(index);
        if index >= self.len {
            return Err(Malformed::DescriptorIndex(index));
        }
        self.addr
            .checked_add(u64::from(index * DESCRIPTOR_SIZE))
            .and_then(|addr| mem.read_obj(GuestAddress(addr)).ok())
            .ok_or_else(|| out_of_memory(GuestAddress(self.addr), self.len * DESCRIPTOR_SIZE))
    }

    /// The table that `desc`, which is in this one, stands for.
    fn enter(&self, desc: &Descriptor, rules: &ChainRules) -> Result<Self, Malformed> {
        let len = desc.len();
        let good = rules.indirect
            && !self.indirect
            && !desc.has_next()
            && len != 0
            && len.is_multiple_of(DESCRIPTOR_SIZE);
        if !good {
            return Err(Malformed::Indirect);
        }
        Ok(Self { addr: desc.addr().raw_value(), len: len / DESCRIPTOR_SIZE, indirect: true })
    }
}

/// Whether the whole range is guest RAM.
pub(super) fn in_memory(mem: &GuestMemory, addr: GuestAddress, len: u32) -> bool {
    // vm-memory lets a range wrap around the end of the address space; no RAM is there.
    addr.checked_add(u64::from(len)).is_some() && mem.check_range(addr, len as usize)
}

pub(super) fn out_of_memory(addr: GuestAddress, len: u32) -> Malformed {
    Malformed::Address { addr: addr.raw_value(), len: u64::from(len) }
}

#[cfg(test)]
mod tests;
