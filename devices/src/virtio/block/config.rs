//! A disk's configuration space (virtio 1.2 section 5.2.4).

/// Unit of all addresses and sizes in virtio-blk, in bytes.
pub(crate) const SECTOR_SIZE: u64 = 512;

/// Largest size of each queue in descriptors.
pub const QUEUE_SIZE: u16 = 256;

/// Ranges in one discard or write-zeroes request at most.
pub(crate) const MAX_RANGES: u32 = 16;

/// Sectors in one of these ranges at most: 2 GiB.
pub(crate) const MAX_RANGE_SECTORS: u32 = 1 << 22;

/// Segments besides header and status: a chain must not be longer than the queue (section
/// 2.7.5.3.1).
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;

/// Drivers best keep to 4096 bytes: host pages and sectors are that large.
const PHYSICAL_BLOCK_EXP: u8 = 3;
const PHYSICAL_BLOCK: u16 = 1 << PHYSICAL_BLOCK_EXP;

/// The configuration space, up to write_zeroes_may_unmap and its padding.
pub(super) fn space(capacity: u64, num_queues: u16, read_only: bool) -> Vec<u8> {
    let (range_sectors, ranges, alignment) = if read_only {
        (0, 0, 0)
    } else {
        (MAX_RANGE_SECTORS, MAX_RANGES, u32::from(PHYSICAL_BLOCK))
    };
    let mut space = Vec::with_capacity(60);
    space.extend(capacity.to_le_bytes());
    space.extend([0; 4]); // size_max: not offered
    space.extend(SEG_MAX.to_le_bytes());
    space.extend([0; 4]); // geometry: not offered
    space.extend(512u32.to_le_bytes()); // blk_size
    space.extend([PHYSICAL_BLOCK_EXP, 0]); // and alignment_offset
    space.extend(PHYSICAL_BLOCK.to_le_bytes()); // min_io_size
    space.extend([0; 4]); // opt_io_size
    space.extend([0; 2]); // writeback: not offered
    space.extend(num_queues.to_le_bytes());
    space.extend(range_sectors.to_le_bytes()); // max_discard_sectors
    space.extend(ranges.to_le_bytes()); // max_discard_seg
    space.extend(alignment.to_le_bytes()); // discard_sector_alignment
    space.extend(range_sectors.to_le_bytes()); // max_write_zeroes_sectors
    space.extend(ranges.to_le_bytes()); // max_write_zeroes_seg
    space.extend([u8::from(!read_only), 0, 0, 0]); // write_zeroes_may_unmap
    space
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use virtio_bindings::virtio_blk::virtio_blk_config as Layout;

    use super::*;

    #[test]
    fn fields_are_where_the_specification_has_them() {
        let space = space(0x1122_3344_5566, 3, false);
        let u32_at = |at: usize| u32::from_le_bytes(space[at..at + 4].try_into().unwrap());
        let u16_at = |at: usize| u16::from_le_bytes(space[at..at + 2].try_into().unwrap());
        assert_eq!(u32_at(0), 0x3344_5566);
        assert_eq!(u32_at(4), 0x1122);
        assert_eq!(u32_at(offset_of!(Layout, seg_max)), 254);
        assert_eq!(u32_at(offset_of!(Layout, blk_size)), 512);
        assert_eq!(space[offset_of!(Layout, physical_block_exp)], 3);
        assert_eq!(u16_at(offset_of!(Layout, min_io_size)), 8);
        assert_eq!(u16_at(offset_of!(Layout, num_queues)), 3);
        assert_eq!(u32_at(offset_of!(Layout, max_discard_sectors)), MAX_RANGE_SECTORS);
        assert_eq!(u32_at(offset_of!(Layout, max_discard_seg)), MAX_RANGES);
        assert_eq!(u32_at(offset_of!(Layout, discard_sector_alignment)), 8);
        assert_eq!(u32_at(offset_of!(Layout, max_write_zeroes_sectors)), MAX_RANGE_SECTORS);
        assert_eq!(u32_at(offset_of!(Layout, max_write_zeroes_seg)), MAX_RANGES);
        assert_eq!(space[offset_of!(Layout, write_zeroes_may_unmap)], 1);
        assert_eq!(space.len(), offset_of!(Layout, max_secure_erase_sectors));
    }
}
