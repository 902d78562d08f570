//! The guest physical address map: where RAM, devices and boot structures lie.
//!
//! Everything here is a promise to checkpoints as well: a guest revived from an image finds its
//! devices and RAM where this map put them, so a constant changes only with the VM-state format.

use vm_memory::GuestAddress;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Page size of the guest, in bytes.
pub const PAGE_SIZE: u64 = 4 * KIB;

/// Least RAM a guest can have, in bytes.
pub const MIN_RAM: u64 = 32 * MIB;

/// Most RAM a guest can have, in bytes: 2^46, all that four-level page tables on a host can map.
pub const MAX_RAM: u64 = 1 << 46;

/// End of the RAM below 4 GiB at most; what does not fit goes on at [`HIGH_RAM_START`].
pub const LOW_RAM_MAX: u64 = 3 * GIB;

/// Where RAM goes on after the 32-bit hole.
pub const HIGH_RAM_START: GuestAddress = GuestAddress(4 * GIB);

/// The first virtio-mmio device; each takes [`MMIO_DEVICE_SIZE`] bytes.
pub const MMIO_START: GuestAddress = GuestAddress(0xd000_0000);

/// Size of one virtio-mmio register window, in bytes.
pub const MMIO_DEVICE_SIZE: u64 = devices::virtio::mmio::MMIO_SIZE;

/// How many virtio-mmio windows the map has room for.
pub const MMIO_DEVICES_MAX: u64 = 4096;

/// The I/O APIC of KVM's in-kernel irqchip (`IOAPIC_DEFAULT_BASE_ADDRESS`).
pub const IOAPIC_ADDR: u32 = 0xfec0_0000;

/// Page for `KVM_SET_IDENTITY_MAP_ADDR`, where QEMU has it too; reserved in the e820 map.
pub const KVM_IDENTITY_MAP_ADDR: u64 = 0xfeff_c000;

/// Three pages for `KVM_SET_TSS_ADDR`, right behind the identity map page; reserved likewise.
pub const KVM_TSS_ADDR: u64 = KVM_IDENTITY_MAP_ADDR + PAGE_SIZE;

/// End of the pages that KVM keeps for itself.
pub const KVM_RESERVED_END: u64 = KVM_TSS_ADDR + 3 * PAGE_SIZE;

/// The local APICs (`APIC_DEFAULT_PHYS_BASE`).
pub const LAPIC_ADDR: u32 = 0xfee0_0000;

/// Global descriptor table of the entry state.
pub const GDT_ADDR: GuestAddress = GuestAddress(0x500);

/// Linux `boot_params` ("zero page"), one page.
pub const ZERO_PAGE_ADDR: GuestAddress = GuestAddress(0x7000);

/// Top of the entry stack, which has the rest of the page at 0x8000.
pub const BOOT_STACK_TOP: GuestAddress = GuestAddress(0x8ff0);

/// Page map level 4.
pub const PML4_ADDR: GuestAddress = GuestAddress(0x9000);

/// Page directory pointer table.
pub const PDPT_ADDR: GuestAddress = GuestAddress(0xa000);

/// The first page directory; one for each identity-mapped GiB follows it.
pub const PAGE_DIRECTORIES_ADDR: GuestAddress = GuestAddress(0xb000);

/// GiB mapped at entry at least, so that every device below 4 GiB is reachable.
pub const IDENTITY_MAP_MIN_GIB: u64 = 4;

/// GiB mapped at entry at most, so that the page directories end below [`CMDLINE_ADDR`].
pub const IDENTITY_MAP_MAX_GIB: u64 = 16;

/// The kernel command line, NUL-terminated.
pub const CMDLINE_ADDR: GuestAddress = GuestAddress(0x2_0000);

/// Room for the command line with its NUL, in bytes.
pub const CMDLINE_ROOM: u64 = 64 * KIB;

/// End of the boot structures in low memory: a kernel's segments start here or above.
pub const BOOT_AREA_END: GuestAddress = GuestAddress(CMDLINE_ADDR.0 + CMDLINE_ROOM);

/// The extended BIOS data area, last KiB of base memory: the MP floating pointer is its start,
/// where the MP specification (1.4, section 4) has an operating system look first.
pub const EBDA_ADDR: GuestAddress = GuestAddress(0x9_fc00);

/// The ACPI tables, the RSDP first, where a PC has BIOS extensions: guests search here from 0xe0000 on.
pub const ACPI_ADDR: GuestAddress = GuestAddress(0xe_0000);

/// Room for the ACPI tables in bytes.
pub const ACPI_ROOM: u64 = GENERATION_ADDR.0 - ACPI_ADDR.0;

/// The VM generation id, in a page of its own: guests map it.
pub const GENERATION_ADDR: GuestAddress = GuestAddress(0xe_f000);

/// The MP configuration table, in what a PC has as BIOS ROM. Not in the EBDA, which has no room
/// for the entries of more than 30 vCPUs.
pub const MP_TABLE_ADDR: GuestAddress = GuestAddress(0xf_0000);

/// Where memory above 1 MiB starts: the area of firmware and video ends here.
pub const HIGH_MEMORY_ADDR: GuestAddress = GuestAddress(MIB);

/// Why an amount of RAM cannot be had.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum LayoutError {
    /// Less than [`MIN_RAM`].
    #[error("{0} bytes of RAM are too few: a guest needs 32 MiB at least")]
    TooSmall(u64),
    /// More than [`MAX_RAM`].
    #[error("{0} bytes of RAM are too many: a guest can have 64 TiB at most")]
    TooLarge(u64),
    /// Not a whole number of pages.
    #[error("{0} bytes of RAM are not a whole number of 4 KiB pages")]
    Unaligned(u64),
}

/// The parts of `size` bytes of RAM as (start, length in bytes), lowest first: one below the
/// 32-bit hole, and one from 4 GiB where there is more.
///
/// # Errors
/// `size` is below [`MIN_RAM`], above [`MAX_RAM`], or not a multiple of [`PAGE_SIZE`].
pub fn ram_regions(size: u64) -> Result<Vec<(GuestAddress, usize)>, LayoutError> {
    if size < MIN_RAM {
        return Err(LayoutError::TooSmall(size));
    }
    if size > MAX_RAM {
        return Err(LayoutError::TooLarge(size));
    }
    if !size.is_multiple_of(PAGE_SIZE) {
        return Err(LayoutError::Unaligned(size));
    }
    let low = low_ram_end(size);
    let mut regions = vec![(GuestAddress(0), bytes(low))];
    if size > low {
        regions.push((HIGH_RAM_START, bytes(size - low)));
    }
    Ok(regions)
}

/// End of the RAM below the 32-bit hole, in bytes from address 0, for `size` bytes of RAM.
#[must_use]
pub fn low_ram_end(size: u64) -> u64 {
    size.min(LOW_RAM_MAX)
}

/// A length of guest RAM as `usize`; the project runs on 64-bit hosts alone.
fn bytes(length: u64) -> usize {
    const { assert!(usize::BITS == 64) };
    #[expect(clippy::cast_possible_truncation, reason = "usize has 64 bits, asserted above")]
    let length = length as usize;
    length
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_below_the_hole_is_one_region() {
        assert_eq!(ram_regions(MIN_RAM).unwrap(), [(GuestAddress(0), 32 << 20)]);
        assert_eq!(ram_regions(3 * GIB).unwrap(), [(GuestAddress(0), 3 << 30)]);
    }

    #[test]
    fn ram_past_the_hole_goes_on_at_4_gib_without_loss() {
        let regions = ram_regions(3 * GIB + 512 * MIB).unwrap();
        assert_eq!(regions, [(GuestAddress(0), 3 << 30), (HIGH_RAM_START, 512 << 20)]);
        let smallest = ram_regions(3 * GIB + PAGE_SIZE).unwrap();
        assert_eq!(smallest[1], (HIGH_RAM_START, 4096));
    }

    #[test]
    fn bad_ram_sizes_are_refused_with_their_reason() {
        assert_eq!(ram_regions(0), Err(LayoutError::TooSmall(0)));
        assert_eq!(ram_regions(MIN_RAM - PAGE_SIZE), Err(LayoutError::TooSmall(MIN_RAM - 4096)));
        assert_eq!(ram_regions(MIN_RAM + 1), Err(LayoutError::Unaligned(MIN_RAM + 1)));
        assert_eq!(ram_regions(u64::MAX), Err(LayoutError::TooLarge(u64::MAX)));
        assert_eq!(ram_regions(MAX_RAM).unwrap()[1].1 as u64, MAX_RAM - LOW_RAM_MAX);
    }

    #[test]
    fn nothing_in_the_map_overlaps() {
        let page_directories = PAGE_DIRECTORIES_ADDR.0 + IDENTITY_MAP_MAX_GIB * PAGE_SIZE;
        let areas = [
            (GDT_ADDR.0, GDT_ADDR.0 + 0x100),
            (ZERO_PAGE_ADDR.0, ZERO_PAGE_ADDR.0 + PAGE_SIZE),
            (0x8000, BOOT_STACK_TOP.0),
            (PML4_ADDR.0, PML4_ADDR.0 + PAGE_SIZE),
            (PDPT_ADDR.0, PDPT_ADDR.0 + PAGE_SIZE),
            (PAGE_DIRECTORIES_ADDR.0, page_directories),
            (CMDLINE_ADDR.0, BOOT_AREA_END.0),
            (EBDA_ADDR.0, 0xa_0000),
            (ACPI_ADDR.0, ACPI_ADDR.0 + ACPI_ROOM),
            (GENERATION_ADDR.0, GENERATION_ADDR.0 + PAGE_SIZE),
            (MP_TABLE_ADDR.0, 0x10_0000),
            (MMIO_START.0, MMIO_START.0 + MMIO_DEVICES_MAX * MMIO_DEVICE_SIZE),
            (u64::from(IOAPIC_ADDR), u64::from(IOAPIC_ADDR) + PAGE_SIZE),
            (u64::from(LAPIC_ADDR), u64::from(LAPIC_ADDR) + PAGE_SIZE),
            (KVM_IDENTITY_MAP_ADDR, KVM_RESERVED_END),
            (HIGH_RAM_START.0, u64::MAX),
        ];
        for pair in areas.windows(2) {
            assert!(pair[0].1 <= pair[1].0, "{:x?} runs into {:x?}", pair[0], pair[1]);
        }
    }
}
