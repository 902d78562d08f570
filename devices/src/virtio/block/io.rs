//! Carrying out virtio-blk requests, on the disk's thread.

use std::sync::Arc;

use block::{ReadBuf, WriteBuf};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
};
use vm_memory::{Bytes, GuestMemoryBackend};

use super::SERIAL_SIZE;
use super::config::MAX_RANGES;
use super::request::{Extent, Operation, RANGE_SIZE, Range, Request};
use crate::GuestMemory;
use crate::virtio::QueueHandler;
use crate::virtio::chain::{Chain, Malformed, SegmentList, out_of_memory};

/// Data of one request at most, in bytes: bounds how long a request, and so a pause, can take.
pub const MAX_REQUEST_BYTES: u64 = 256 << 20;

/// Why a request fails, as its status byte tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
#[allow(clippy::cast_possible_truncation)] // the constants are 1 and 2
enum Failure {
    IoError = VIRTIO_BLK_S_IOERR as u8,
    Unsupported = VIRTIO_BLK_S_UNSUPP as u8,
}

type Outcome = Result<(), Failure>;

pub(super) struct BlockHandler {
    node: Arc<::block::Node>,
    /// In sectors.
    capacity: u64,
    serial: [u8; SERIAL_SIZE],
    /// The driver knows no flush: every write must be durable when it completes.
    write_through: bool,
}

impl BlockHandler {
    pub(super) fn new(node: Arc<::block::Node>, capacity: u64, serial: &str) -> Self {
        let mut padded = [0; SERIAL_SIZE];
        for (to, from) in padded.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        Self { node, capacity, serial: padded, write_through: true }
    }

    fn execute(&self, operation: Operation, mem: &GuestMemory, chain: &mut Chain) -> Outcome {
        match operation {
            Operation::Read(sector) => self.read(sector, mem, &chain.writable),
            Operation::Write(sector) => self.write(sector, mem, &chain.readable),
            Operation::Flush => self.flush_node(),
            Operation::GetId => self.get_id(mem, &chain.writable),
            Operation::Discard => self.ranges(true, mem, &mut chain.readable),
            Operation::WriteZeroes => self.ranges(false, mem, &mut chain.readable),
            Operation::Unknown(_) => Err(Failure::Unsupported),
        }
    }

    fn read(&self, sector: u64, mem: &GuestMemory, to: &SegmentList) -> Outcome {
        let extent = self.extent(sector, to)?;
        let bufs = read_bufs(mem, to)?;
        self.done("read", self.node.read(extent.offset, &bufs))
    }

    fn write(&self, sector: u64, mem: &GuestMemory, from: &SegmentList) -> Outcome {
        self.writable()?;
        let extent = self.extent(sector, from)?;
        let bufs = write_bufs(mem, from)?;
        self.done("write", self.node.write(extent.offset, &bufs))?;
        self.flush_if_write_through()
    }

    fn get_id(&self, mem: &GuestMemory, to: &SegmentList) -> Outcome {
        let mut rest = self.serial.as_slice();
        for segment in to.segments() {
            let (now, later) = rest.split_at(rest.len().min(segment.len as usize));
            mem.write_slice(now, segment.addr).map_err(|_| Failure::IoError)?;
            rest = later;
        }
        Ok(())
    }

    /// Discard or write-zeroes: every range is checked before the first is carried out.
    fn ranges(&self, discard: bool, mem: &GuestMemory, from: &mut SegmentList) -> Outcome {
        self.writable()?;
        let count = from.len() / RANGE_SIZE as u64;
        if count == 0
            || count > u64::from(MAX_RANGES)
            || !from.len().is_multiple_of(RANGE_SIZE as u64)
        {
            return Err(Failure::IoError);
        }
        let mut todo = Vec::new();
        let mut bytes = [0; RANGE_SIZE];
        while !from.is_empty() {
            match from.read_front(mem, &mut bytes) {
                Ok(true) => {}
                _ => return Err(Failure::IoError),
            }
            let range = Range::parse(bytes);
            if !range.flags_are_known(discard) {
                return Err(Failure::Unsupported);
            }
            let extent = range.extent(self.capacity).ok_or(Failure::IoError)?;
            todo.push((extent, range.unmap()));
        }
        for (Extent { offset, len }, unmap) in todo {
            if len == 0 {
                continue;
            }
            if discard {
                self.done("discard", self.node.discard(offset, len))?;
            } else {
                self.done("write-zeroes", self.node.write_zeroes(offset, len, unmap))?;
            }
        }
        self.flush_if_write_through()
    }

    fn flush_node(&self) -> Outcome {
        self.done("flush", self.node.flush())
    }

    fn flush_if_write_through(&self) -> Outcome {
        if self.write_through { self.flush_node() } else { Ok(()) }
    }

    fn writable(&self) -> Outcome {
        if self.node.read_only() {
            return Err(Failure::IoError);
        }
        Ok(())
    }

    /// The part of the disk that the data is for.
    fn extent(&self, sector: u64, data: &SegmentList) -> Result<Extent, Failure> {
        let len = data.len();
        if len > MAX_REQUEST_BYTES {
            return Err(Failure::IoError);
        }
        Extent::new(sector, len, self.capacity).ok_or(Failure::IoError)
    }

    fn done(&self, what: &str, result: ::block::Result<()>) -> Outcome {
        result.map_err(|error| {
            tracing::error!(node = self.node.name(), %error, "{what} of the guest failed");
            Failure::IoError
        })
    }
}

impl QueueHandler for BlockHandler {
    fn start(&mut self, features: u64) {
        self.write_through = features & (1 << VIRTIO_BLK_F_FLUSH) == 0;
    }

    fn serve(
        &mut self,
        _queue: usize,
        mem: &GuestMemory,
        chain: &mut Chain,
    ) -> Result<u32, Malformed> {
        let request = Request::parse(mem, chain)?;
        let outcome = self.execute(request.operation, mem, chain);
        let status = match outcome {
            Ok(()) => 0,
            Err(failure) => failure as u8,
        };
        debug_assert_eq!(VIRTIO_BLK_S_OK, 0);
        mem.write_obj(status, request.status).map_err(|_| out_of_memory(request.status, 1))?;
        // Bytes before the status byte count as written only where they surely are.
        let data = match (request.operation, outcome) {
            (Operation::Read(_), Ok(())) => chain.writable.len(),
            (Operation::GetId, Ok(())) => chain.writable.len().min(SERIAL_SIZE as u64),
            _ => 0,
        };
        Ok(u32::try_from(data).unwrap_or(u32::MAX).saturating_add(1))
    }

    fn flush(&mut self) -> ::block::Result<()> {
        if self.node.read_only() {
            return Ok(());
        }
        self.node.flush()
    }
}

/// The segments as buffers for a read. They live as long as the borrow of `mem`.
fn read_bufs<'m>(mem: &'m GuestMemory, to: &SegmentList) -> Result<Vec<ReadBuf<'m>>, Failure> {
    let mut bufs = Vec::with_capacity(to.segments().len());
    for segment in to.segments() {
        for slice in GuestMemoryBackend::get_slices(mem, segment.addr, segment.len as usize) {
            let slice = slice.map_err(|_| Failure::IoError)?;
            let ptr = slice.ptr_guard_mut().as_ptr();
            // SAFETY: the slice is a part of a mapping of guest RAM, which is writable and stays
            // mapped as long as `mem`, borrowed for 'm, holds it. Guest memory is only ever
            // reached through raw pointers and volatile slices, so no reference to it exists.
            bufs.push(unsafe { ReadBuf::from_raw(ptr, slice.len()) });
        }
    }
    Ok(bufs)
}

/// The segments as buffers for a write. They live as long as the borrow of `mem`.
fn write_bufs<'m>(mem: &'m GuestMemory, from: &SegmentList) -> Result<Vec<WriteBuf<'m>>, Failure> {
    let mut bufs = Vec::with_capacity(from.segments().len());
    for segment in from.segments() {
        for slice in GuestMemoryBackend::get_slices(mem, segment.addr, segment.len as usize) {
            let slice = slice.map_err(|_| Failure::IoError)?;
            let ptr = slice.ptr_guard().as_ptr();
            // SAFETY: the slice is a part of a mapping of guest RAM, which is readable and stays
            // mapped as long as `mem`, borrowed for 'm, holds it.
            bufs.push(unsafe { WriteBuf::from_raw(ptr, slice.len()) });
        }
    }
    Ok(bufs)
}
