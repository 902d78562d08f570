//! Marking guest pages that the host wrote without going through vm-memory.

use vm_memory::GuestMemoryBackend;
use vm_memory::bitmap::Bitmap;

use super::Segment;
use crate::GuestMemory;

/// Marks segments that the host has filled through raw buffers (io_uring, preadv) as written. To be
/// called when the data is in place, also where only a part of it may be, and before the driver is
/// told: whoever collects the marks in between copies the page again, and no data is missed.
pub(crate) fn mark_filled(mem: &GuestMemory, segments: &[Segment]) {
    for segment in segments {
        let slices = GuestMemoryBackend::get_slices(mem, segment.addr, segment.len as usize);
        // Segments were checked to be in memory, which does not go away.
        for slice in slices.flatten() {
            slice.bitmap().mark_dirty(0, slice.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;

    #[test]
    fn pages_of_a_segment_are_marked_across_regions_and_no_others() {
        let regions = [(GuestAddress(0), 0x4000), (GuestAddress(0x4000), 0x3000)];
        let mem = GuestMemory::from_ranges(&regions).unwrap();
        mark_filled(&mem, &[Segment { addr: GuestAddress(0x2fff), len: 0x1002 }]);
        mark_filled(&mem, &[Segment { addr: GuestAddress(0x6000), len: 1 }]);
        let mut marked = Vec::new();
        for region in mem.iter() {
            ram::MmapRegion::bitmap(region)
                .written()
                .take(|first, bits| marked.push((first, bits)));
        }
        assert_eq!(marked, [(0, 0b1100), (0, 0b101)]);
    }
}
