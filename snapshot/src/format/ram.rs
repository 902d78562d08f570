//! Where each page of guest RAM lies in the VM-state area.
//!
//! The place depends on the guest's RAM regions and on where the RAM part starts, never on the
//! contents: a page that did not change between two checkpoints lies at the same offset in both,
//! so that its cluster can be shared.

use vm_memory::GuestAddress;

use crate::units::{MIB, PAGE, align_up};

/// Alignment of the RAM part and of each region in it, in bytes: the largest qcow2 cluster, so
/// that one layout fits every image.
pub(crate) const RAM_ALIGN: u64 = 2 * MIB;

/// The RAM part starts at a multiple of this many bytes and never before the first. Sections of
/// usual size stay below it, which keeps RAM in place from one checkpoint to the next.
pub(crate) const STATE_AREA_STEP: u64 = 4 * MIB;

/// Most RAM regions a layout may have.
pub(crate) const MAX_REGIONS: usize = 64;

/// Most bytes of guest RAM: 16 TiB. It bounds the time that a made-up header can cost.
pub const MAX_RAM: u64 = 16 << 40;

/// An offset in bytes from the start of the VM-state area.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct StateOffset(pub u64);

/// One contiguous piece of guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRegion {
    /// Guest physical address of its first byte.
    pub start: GuestAddress,
    /// Length in bytes, a multiple of the page size.
    pub len: u64,
    /// Where its first byte lies.
    pub offset: StateOffset,
}

/// Why a list of regions is not a RAM layout.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// Too many regions.
    #[error("{0} RAM regions, at most {MAX_REGIONS} are possible")]
    TooMany(usize),
    /// A region is empty or not made of whole pages.
    #[error("the RAM region at {start:#x} with {len:#x} bytes is not made of whole pages")]
    NotPages {
        /// Guest physical address.
        start: u64,
        /// Length in bytes.
        len: u64,
    },
    /// A region starts before the end of the one before it.
    #[error("the RAM region at {0:#x} overlaps the one before it or is out of order")]
    Order(u64),
    /// All regions together are larger than [`MAX_RAM`].
    #[error("the RAM is larger than 16 TiB")]
    TooLarge,
    /// A region ends past the end of the address space.
    #[error("the RAM region at {0:#x} ends past the end of the address space")]
    Overflow(u64),
    /// The RAM part does not start at a multiple of [`RAM_ALIGN`].
    #[error("RAM at offset {0:#x} is not aligned to 2 MiB")]
    Unaligned(u64),
}

/// The place of all guest RAM in the VM-state area.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamLayout {
    start: StateOffset,
    regions: Vec<RamRegion>,
    end: StateOffset,
}

impl RamLayout {
    /// Lays out regions (guest physical address, length in bytes), sorted by address, from `start`.
    pub fn new(
        start: StateOffset,
        regions: impl IntoIterator<Item = (GuestAddress, u64)>,
    ) -> Result<Self, LayoutError> {
        if !start.0.is_multiple_of(RAM_ALIGN) {
            return Err(LayoutError::Unaligned(start.0));
        }
        let mut layout = Self { start, regions: Vec::new(), end: start };
        let (mut guest_end, mut ram) = (0, 0);
        for (guest, len) in regions {
            if layout.regions.len() == MAX_REGIONS {
                return Err(LayoutError::TooMany(MAX_REGIONS + 1));
            }
            if len == 0 || !len.is_multiple_of(PAGE) || !guest.0.is_multiple_of(PAGE) {
                return Err(LayoutError::NotPages { start: guest.0, len });
            }
            if guest.0 < guest_end {
                return Err(LayoutError::Order(guest.0));
            }
            let overflow = LayoutError::Overflow(guest.0);
            guest_end = guest.0.checked_add(len).ok_or(overflow.clone())?;
            ram += len.min(MAX_RAM + 1);
            if ram > MAX_RAM {
                return Err(LayoutError::TooLarge);
            }
            let slot_end = layout.end.0.checked_add(len);
            let slot_end = slot_end.and_then(|end| align_up(end, RAM_ALIGN));
            layout.regions.push(RamRegion { start: guest, len, offset: layout.end });
            layout.end = StateOffset(slot_end.ok_or(overflow)?);
        }
        Ok(layout)
    }

    /// Where the RAM part starts when what comes before it ends at `state_end`; `None` past the
    /// end of 64 bits.
    pub(crate) fn start_after(state_end: u64) -> Option<StateOffset> {
        align_up(state_end.max(1), STATE_AREA_STEP).map(StateOffset)
    }

    /// Where the RAM part starts.
    pub fn start(&self) -> StateOffset {
        self.start
    }

    /// The regions by guest physical address.
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    /// Length of the whole VM-state area in bytes: the RAM part is its end.
    pub(crate) fn total_length(&self) -> u64 {
        self.end.0
    }

    /// Bytes of guest RAM.
    pub fn ram_bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.len).sum()
    }

    /// Where the byte at a guest physical address lies; `None` where there is no RAM.
    pub fn offset_of(&self, address: GuestAddress) -> Option<StateOffset> {
        let region = self.regions.iter().rev().find(|r| r.start <= address)?;
        let inside = address.0 - region.start.0;
        (inside < region.len).then(|| StateOffset(region.offset.0 + inside))
    }
}
