//! Boot: everything between a kernel file and the first vCPU's registers. `docs/boot.md` has the
//! memory map, the entry state and the order.
//!
//! It goes in two steps. [`Boot::prepare`] reads the files, decompresses the kernel and makes
//! every check; it needs no guest memory and no KVM, so it can run while those are set up, and
//! what is wrong with a file is said first. [`Boot::load`] writes to guest memory.

mod elf;
mod entry;
mod error;
pub mod layout;
mod mptable;
mod payload;
#[cfg(test)]
mod testing;
mod zero_page;

use std::fs::File;
use std::path::{Path, PathBuf};

use devices::acpi::Tables;
use linux_loader::loader::bootparam::setup_header;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

pub use elf::ElfError;
pub use entry::{EntryState, initial_registers};
pub use error::{BootError, CmdlineError, FileError, FirstBytes, KernelError};
pub use mptable::{IOAPIC_PINS, MAX_VCPUS};
pub use payload::{Compression, DecodeError};

use payload::Kernel;

/// What a guest is to be booted with.
#[derive(Debug, Clone, Copy)]
pub struct BootSpec<'a> {
    /// `--kernel`
    pub kernel: &'a Path,
    /// `--initrd`
    pub initrd: Option<&'a Path>,
    /// `--append`, with whatever the machine adds to it; without a NUL.
    pub cmdline: &'a str,
    /// vCPUs, whose APIC ids are counted from 0.
    pub vcpus: u8,
    /// ACPI tables for [`layout::ACPI_ADDR`], if the guest is to find any.
    pub acpi: Option<&'a Tables>,
}

/// What was loaded, as [`initial_registers`] needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BootInfo {
    /// Entry point, physical and, by the identity mapping, virtual.
    pub entry: GuestAddress,
    /// Linux `boot_params`.
    pub zero_page: GuestAddress,
    /// First address behind the kernel.
    pub kernel_end: GuestAddress,
    /// Address and size in bytes of the initrd.
    pub initrd: Option<(GuestAddress, u64)>,
}

/// An initrd with its place.
#[derive(Debug)]
struct Initrd {
    path: PathBuf,
    file: File,
    /// Fits 32 bits, as all of low RAM does.
    address: u32,
    size: u32,
}

/// A boot whose files are read and found to fit: nothing but the writing is left.
#[derive(Debug)]
pub struct Boot {
    path: PathBuf,
    kernel: Kernel,
    header: setup_header,
    initrd: Option<Initrd>,
    cmdline: Vec<u8>,
    vcpus: u8,
    acpi: Option<Tables>,
    ram: u64,
}

impl Boot {
    /// Reads and checks what `spec` names, for a guest with `ram` bytes of RAM.
    ///
    /// # Errors
    /// A file cannot be read or is not what it should be, something does not fit the RAM, or the
    /// command line, the RAM size or the number of vCPUs is not allowed.
    pub fn prepare(spec: &BootSpec<'_>, ram: u64) -> Result<Self, BootError> {
        layout::ram_regions(ram)?;
        if !(1..=MAX_VCPUS).contains(&spec.vcpus) {
            return Err(BootError::Vcpus(spec.vcpus));
        }
        let path = spec.kernel.to_path_buf();
        let kernel = Kernel::open(spec.kernel, layout::low_ram_end(ram))
            .map_err(|reason| BootError::Kernel { path: path.clone(), reason })?;
        let header = zero_page::setup_header_for(kernel.setup_header());
        let cmdline = cmdline_bytes(spec.cmdline, header.cmdline_size)?;
        let initrd = place_initrd(spec.initrd, kernel.elf().end(), header.initrd_addr_max, ram)?;
        let acpi = spec.acpi.cloned();
        Ok(Self { path, kernel, header, initrd, cmdline, vcpus: spec.vcpus, acpi, ram })
    }

    /// Writes everything to guest memory, which must have the regions that
    /// [`layout::ram_regions`] gives for the RAM size that [`Boot::prepare`] was told, and must
    /// read as zero: `.bss` is not written. After a reset, discard the old memory first.
    ///
    /// # Errors
    /// The memory has other regions, or a file changed since it was checked.
    pub fn load<M: GuestMemoryBackend>(self, mem: &M) -> Result<BootInfo, BootError> {
        let entry = GuestAddress(self.kernel.elf().entry());
        let kernel_end = GuestAddress(self.kernel.elf().end());
        let path = self.path;
        self.kernel.load_into(mem).map_err(|reason| BootError::Kernel { path, reason })?;
        let mut initrd_range = None;
        if let Some(initrd) = self.initrd {
            initrd_range = Some((initrd.address, initrd.size));
            load_initrd(mem, initrd)?;
        }

        let mut params = zero_page::zero_page(self.header, self.ram, initrd_range);
        let acpi = self.acpi.as_ref().map(Tables::bytes).unwrap_or_default();
        if !acpi.is_empty() {
            zero_page::set_rsdp(&mut params, layout::ACPI_ADDR);
        }
        let ram_end = mem.last_addr().0.saturating_add(1);
        let tables = entry::page_tables(entry::identity_mapped_gib(ram_end));
        let writes: [(&'static str, GuestAddress, &[u8]); 7] = [
            ("command line", layout::CMDLINE_ADDR, &self.cmdline),
            ("zero page", layout::ZERO_PAGE_ADDR, params.as_slice()),
            ("MP floating pointer", layout::EBDA_ADDR, &mptable::floating_pointer()),
            ("MP table", layout::MP_TABLE_ADDR, &mptable::configuration_table(self.vcpus)),
            ("ACPI tables", layout::ACPI_ADDR, acpi),
            ("GDT", layout::GDT_ADDR, &entry::gdt()),
            ("page tables", layout::PML4_ADDR, &tables),
        ];
        for (what, address, bytes) in writes {
            mem.write_slice(bytes, address).map_err(|source| BootError::Memory { what, source })?;
        }
        Ok(BootInfo {
            entry,
            zero_page: layout::ZERO_PAGE_ADDR,
            kernel_end,
            initrd: initrd_range
                .map(|(address, size)| (GuestAddress(u64::from(address)), u64::from(size))),
        })
    }
}

/// [`Boot::prepare`] and [`Boot::load`] in one, the RAM size taken from `mem`.
///
/// # Errors
/// As those two.
pub fn load<M: GuestMemoryBackend>(mem: &M, spec: &BootSpec<'_>) -> Result<BootInfo, BootError> {
    let ram = mem.iter().map(GuestMemoryRegion::len).sum();
    Boot::prepare(spec, ram)?.load(mem)
}

/// The command line as the guest gets it, with its NUL.
fn cmdline_bytes(cmdline: &str, kernel_limit: u32) -> Result<Vec<u8>, CmdlineError> {
    let room = usize::try_from(layout::CMDLINE_ROOM).unwrap_or(usize::MAX) - 1;
    let limit = usize::try_from(kernel_limit).unwrap_or(usize::MAX).min(room);
    if cmdline.len() > limit {
        return Err(CmdlineError::TooLong { length: cmdline.len(), limit });
    }
    let bad = cmdline.bytes().enumerate().find(|(_, byte)| *byte == 0 || !byte.is_ascii());
    if let Some((position, byte)) = bad {
        return Err(CmdlineError::NotAscii { position, byte });
    }
    Ok([cmdline.as_bytes(), &[0]].concat())
}

/// Finds room for the initrd: page aligned, as high in low RAM as the kernel allows, where it is
/// out of the way of the kernel's early allocations.
fn place_initrd(
    path: Option<&Path>,
    kernel_end: u64,
    address_max: u32,
    ram: u64,
) -> Result<Option<Initrd>, BootError> {
    let low_end = layout::low_ram_end(ram);
    let limit = layout::LOW_RAM_MAX.min(u64::from(address_max) + 1);
    let Some(path) = path else {
        return match kernel_end <= low_end {
            true => Ok(None),
            false => Err(BootError::RamTooSmall { ram, kernel_end, initrd: 0, needed: kernel_end }),
        };
    };
    let (file, size) = payload::open_regular(path)
        .map_err(|reason| BootError::Initrd { path: path.to_path_buf(), reason })?;
    // The least end of RAM that leaves the initrd whole pages behind the kernel.
    let needed = kernel_end
        .next_multiple_of(layout::PAGE_SIZE)
        .saturating_add(size)
        .checked_next_multiple_of(layout::PAGE_SIZE)
        .unwrap_or(u64::MAX);
    if needed > limit {
        return Err(BootError::InitrdTooLarge { kernel_end, initrd: size, limit });
    }
    if needed > low_end {
        return Err(BootError::RamTooSmall { ram, kernel_end, initrd: size, needed });
    }
    let address = (limit.min(low_end) - size) & !(layout::PAGE_SIZE - 1);
    match (u32::try_from(address), u32::try_from(size)) {
        (Ok(address), Ok(size)) => {
            Ok(Some(Initrd { path: path.to_path_buf(), file, address, size }))
        }
        _ => Err(BootError::InitrdTooLarge { kernel_end, initrd: size, limit }),
    }
}

/// Reads the initrd straight into guest memory.
fn load_initrd<M: GuestMemoryBackend>(mem: &M, initrd: Initrd) -> Result<(), BootError> {
    let Initrd { path, mut file, address, size } = initrd;
    let address = GuestAddress(u64::from(address));
    mem.read_exact_volatile_from(address, &mut file, size as usize).map_err(|error| {
        let reason = match error {
            vm_memory::GuestMemoryError::IOError(error) => FileError::Read(error),
            _ => FileError::Shrank,
        };
        BootError::Initrd { path, reason }
    })
}

#[cfg(test)]
mod tests;
