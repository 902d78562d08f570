//! The zero page, Linux's `boot_params` (`Documentation/arch/x86/zero-page.rst`), with the e820
//! memory map in it.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};

use vm_memory::GuestAddress;

use super::layout;

/// `type_of_loader`: one without an assigned id. Linux ignores an initrd if this is 0.
const LOADER_UNDEFINED: u8 = 0xff;

/// `loadflags`: the protected-mode code is at 1 MiB or above.
const LOADED_HIGH: u8 = 1;

/// `boot_flag` and `header` for a kernel that came as an ELF file, without a setup header.
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// The protocol that this loader follows, 2.15.
const PROTOCOL_VERSION: u16 = 0x020f;

/// `COMMAND_LINE_SIZE` of x86 Linux without the NUL, for ELF kernels, which do not say theirs.
const ELF_CMDLINE_MAX: u32 = 2047;

/// `initrd_addr_max` of 64-bit x86 Linux, for ELF kernels likewise.
const ELF_INITRD_ADDR_MAX: u32 = 0x7fff_ffff;

/// Types of memory in the e820 map.
pub(super) const E820_RAM: u32 = 1;
/// See [`E820_RAM`].
pub(super) const E820_RESERVED: u32 = 2;

/// The setup header for a kernel: its own if it has one, or what an ELF kernel is taken for.
pub(super) fn setup_header_for(own: Option<setup_header>) -> setup_header {
    let header = own.unwrap_or(setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        version: PROTOCOL_VERSION,
        cmdline_size: ELF_CMDLINE_MAX,
        initrd_addr_max: ELF_INITRD_ADDR_MAX,
        ..setup_header::default()
    });
    setup_header {
        type_of_loader: LOADER_UNDEFINED,
        loadflags: header.loadflags | LOADED_HIGH,
        ..header
    }
}

/// The zero page for a guest with `ram` bytes of RAM. The initrd is (address, size), below 4 GiB.
pub(super) fn zero_page(header: setup_header, ram: u64, initrd: Option<(u32, u32)>) -> boot_params {
    let (ramdisk_image, ramdisk_size) = initrd.unwrap_or((0, 0));
    #[expect(clippy::cast_possible_truncation, reason = "below 1 MiB")]
    let cmd_line_ptr = layout::CMDLINE_ADDR.0 as u32;
    let hdr = setup_header { cmd_line_ptr, ramdisk_image, ramdisk_size, ..header };
    let mut params = boot_params { hdr, ..boot_params::default() };
    let mut table = params.e820_table;
    let mut entries = 0u8;
    for (slot, entry) in table.iter_mut().zip(e820_map(ram)) {
        *slot = entry;
        entries += 1;
    }
    params.e820_table = table;
    params.e820_entries = entries;
    params
}

/// Tells where the ACPI tables begin: `acpi_rsdp_addr`, of boot protocol 2.14.
pub(super) fn set_rsdp(params: &mut boot_params, address: GuestAddress) {
    params.acpi_rsdp_addr = address.0;
}

/// The memory map, by address: what is RAM, and what is not to be touched. The 32-bit hole with
/// its devices is in no entry, as on a PC.
fn e820_map(ram: u64) -> impl Iterator<Item = boot_e820_entry> {
    let low_end = layout::low_ram_end(ram);
    let ebda = layout::EBDA_ADDR.0;
    let high_memory = layout::HIGH_MEMORY_ADDR.0;
    let high_start = layout::HIGH_RAM_START.0;
    [
        (0, ebda, E820_RAM),
        (ebda, high_memory, E820_RESERVED),
        (high_memory, low_end, E820_RAM),
        (layout::KVM_IDENTITY_MAP_ADDR, layout::KVM_RESERVED_END, E820_RESERVED),
        (high_start, high_start + (ram - low_end), E820_RAM),
    ]
    .into_iter()
    .filter(|(start, end, _)| start < end)
    .map(|(start, end, kind)| boot_e820_entry { addr: start, size: end - start, r#type: kind })
}

#[cfg(test)]
mod tests;
