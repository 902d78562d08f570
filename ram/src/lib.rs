//! Guest RAM as the host has it: private mappings, with a record of the pages that the host wrote for the guest.

mod record;
mod written;

pub use record::Record;
pub use written::Written;

/// The guest's RAM. A clone is a reference to the same mapping and keeps it alive.
///
/// Each region has a bit for each page, set when the host has written there: by vm-memory itself,
/// after the data is in place, and by whoever fills it where vm-memory does not see it.
pub type GuestMemory = vm_memory::GuestMemoryMmap<Record>;

/// One region of [`GuestMemory`].
pub type GuestRegion = vm_memory::GuestRegionMmap<Record>;

/// The mapping of one region.
pub type MmapRegion = vm_memory::MmapRegion<Record>;
