//! The headers of an ELF kernel: checked as a whole before anything is written to the guest.

use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;

use linux_loader::elf::{Elf64_Ehdr, Elf64_Phdr};
use vm_memory::ByteValued;

use super::layout;

/// Program headers that a kernel may have. Linux has 5; a table read by its claim alone could
/// have 65535.
const MAX_PROGRAM_HEADERS: u16 = 64;

/// `EI_CLASS` and its value for 64 bits.
const CLASS: (usize, u8) = (4, 2);
/// `EI_DATA` and its value for little endian.
const DATA: (usize, u8) = (5, 1);
/// `e_machine` of x86-64.
const EM_X86_64: u16 = 62;
/// `e_type` of what can be entered: linked for fixed addresses, or position independent.
const EXECUTABLE: [u16; 2] = [2, 3];
/// `p_type` of a segment that is loaded.
const PT_LOAD: u32 = 1;

/// What is wrong with an ELF file that should be a kernel.
#[derive(Debug, thiserror::Error)]
pub enum ElfError {
    /// 32-bit, or big endian.
    #[error("not a 64-bit little-endian ELF file")]
    NotElf64,
    /// For another processor.
    #[error("an ELF file for machine {0}, not for x86-64 (62)")]
    Machine(u16),
    /// An object file, core dump or the like.
    #[error("an ELF file of type {0}, not an executable (2 or 3)")]
    NotExecutable(u16),
    /// Program headers of another size, or inside the file header.
    #[error("bad ELF header: {count} program headers of {size} bytes at {offset:#x}")]
    ProgramHeaders {
        /// `e_phnum`
        count: u16,
        /// `e_phentsize`
        size: u16,
        /// `e_phoff`
        offset: u64,
    },
    /// The file ends within something.
    #[error("truncated: {what} ends at byte {end}, but there are {length} bytes")]
    Truncated {
        /// What is cut off.
        what: &'static str,
        /// Where it would end.
        end: u64,
        /// Length of the file in bytes.
        length: u64,
    },
    /// No `PT_LOAD` with any memory.
    #[error("no segment to load")]
    NoSegments,
    /// `p_filesz` is larger than `p_memsz`.
    #[error("segment {index} has {file} bytes in the file for {memory} bytes of memory")]
    FileLarger {
        /// Of the program header, from 0.
        index: usize,
        /// `p_filesz`
        file: u64,
        /// `p_memsz`
        memory: u64,
    },
    /// The segment's end does not fit 64 bits.
    #[error("segment {index} at {start:#x} with {length:#x} bytes goes past the address space")]
    Wraps {
        /// Of the program header, from 0.
        index: usize,
        /// `p_paddr` or `p_offset`
        start: u64,
        /// `p_memsz` or `p_filesz`
        length: u64,
    },
    /// The segment cannot be in guest memory whatever its size.
    #[error(
        "segment {index} at {:#x}-{:#x} is not below the end of low RAM at {:#x}",
        range.start, range.end, layout::LOW_RAM_MAX
    )]
    OutsideRam {
        /// Of the program header, from 0.
        index: usize,
        /// Where it wants to be.
        range: Range<u64>,
    },
    /// The segment would overwrite what the guest is told at boot.
    #[error(
        "segment {index} at {:#x}-{:#x} overlaps the {what} at {:#x}-{:#x}",
        range.start, range.end, taken.start, taken.end
    )]
    Overlaps {
        /// Of the program header, from 0.
        index: usize,
        /// Where it wants to be.
        range: Range<u64>,
        /// What is there.
        what: &'static str,
        /// And where that is.
        taken: Range<u64>,
    },
    /// The entry point is not in what is loaded from the file.
    #[error("the entry point {0:#x} is in no loaded segment")]
    Entry(u64),
    /// The headers cannot be read.
    #[error("the headers cannot be read: {0}")]
    Read(#[source] io::Error),
    /// The segments cannot be copied to the guest.
    #[error("the segments cannot be loaded: {0}")]
    Load(#[source] linux_loader::loader::Error),
}

/// What the boot code needs to know of an ELF kernel.
#[derive(Debug)]
pub(super) struct ElfImage {
    entry: u64,
    /// With the index of the program header; none is empty.
    segments: Vec<(usize, Range<u64>)>,
}

impl ElfImage {
    /// Reads and checks the headers of an ELF file of `length` bytes.
    ///
    /// # Errors
    /// It is not an x86-64 executable, or its headers contradict each other or the length.
    pub(super) fn parse<F: Read + Seek>(file: &mut F, length: u64) -> Result<Self, ElfError> {
        let header: Elf64_Ehdr = read_at(file, 0, length, "the ELF header")?;
        check_header(&header)?;

        let mut image = Self { entry: header.e_entry, segments: Vec::new() };
        let mut entry_loaded = false;
        let size = size_of::<Elf64_Phdr>() as u64;
        for index in 0..usize::from(header.e_phnum) {
            let offset = header.e_phoff.saturating_add(index as u64 * size);
            let segment: Elf64_Phdr = read_at(file, offset, length, "the program header table")?;
            // Notes are read too, by the loader.
            check_in_file(index, &segment, length)?;
            if segment.p_type != PT_LOAD || segment.p_memsz == 0 {
                continue;
            }
            let range = memory_range(index, &segment)?;
            // No overflow: the file's part is not longer than the range.
            entry_loaded |= (range.start..range.start + segment.p_filesz).contains(&header.e_entry);
            image.segments.push((index, range));
        }
        match (image.segments.is_empty(), entry_loaded) {
            (true, _) => Err(ElfError::NoSegments),
            (false, false) => Err(ElfError::Entry(header.e_entry)),
            (false, true) => Ok(image),
        }
    }

    /// Physical address of the entry point.
    pub(super) fn entry(&self) -> u64 {
        self.entry
    }

    /// First address behind all segments, what is not in the file (`.bss`) included.
    pub(super) fn end(&self) -> u64 {
        self.segments.iter().map(|(_, range)| range.end).max().unwrap_or(0)
    }

    /// Checks that no segment lies on a boot structure, in the area of video and firmware, or
    /// above where low RAM can end.
    ///
    /// # Errors
    /// The first segment that does, and on what.
    pub(super) fn check_placement(&self) -> Result<(), ElfError> {
        let taken = [
            ("boot structures", 0..layout::BOOT_AREA_END.0),
            ("BIOS area with the MP table", layout::EBDA_ADDR.0..layout::HIGH_MEMORY_ADDR.0),
        ];
        for (index, range) in &self.segments {
            let (index, range) = (*index, range.clone());
            for (what, taken) in taken.clone() {
                if range.start < taken.end && taken.start < range.end {
                    return Err(ElfError::Overlaps { index, range, what, taken });
                }
            }
            if range.end > layout::LOW_RAM_MAX {
                return Err(ElfError::OutsideRam { index, range });
            }
        }
        Ok(())
    }
}

/// Checks all of the file header but the entry point.
fn check_header(header: &Elf64_Ehdr) -> Result<(), ElfError> {
    let ident = &header.e_ident;
    if ident[CLASS.0] != CLASS.1 || ident[DATA.0] != DATA.1 {
        return Err(ElfError::NotElf64);
    }
    if header.e_machine != EM_X86_64 {
        return Err(ElfError::Machine(header.e_machine));
    }
    if !EXECUTABLE.contains(&header.e_type) {
        return Err(ElfError::NotExecutable(header.e_type));
    }
    if header.e_phnum == 0 {
        return Err(ElfError::NoSegments);
    }
    if usize::from(header.e_phentsize) != size_of::<Elf64_Phdr>()
        || header.e_phnum > MAX_PROGRAM_HEADERS
        || header.e_phoff < size_of::<Elf64_Ehdr>() as u64
    {
        return Err(ElfError::ProgramHeaders {
            count: header.e_phnum,
            size: header.e_phentsize,
            offset: header.e_phoff,
        });
    }
    Ok(())
}

/// Checks that the part of a segment which is in the file is there.
fn check_in_file(index: usize, segment: &Elf64_Phdr, length: u64) -> Result<(), ElfError> {
    let (start, size) = (segment.p_offset, segment.p_filesz);
    let end = start.checked_add(size).ok_or(ElfError::Wraps { index, start, length: size })?;
    if end > length {
        return Err(ElfError::Truncated { what: "a segment", end, length });
    }
    Ok(())
}

/// Where in guest memory a segment goes.
fn memory_range(index: usize, segment: &Elf64_Phdr) -> Result<Range<u64>, ElfError> {
    let (start, memory, file) = (segment.p_paddr, segment.p_memsz, segment.p_filesz);
    if file > memory {
        return Err(ElfError::FileLarger { index, file, memory });
    }
    let end = start.checked_add(memory).ok_or(ElfError::Wraps { index, start, length: memory })?;
    Ok(start..end)
}

/// Reads a structure that must lie within the `length` bytes of the file.
fn read_at<F: Read + Seek, T: ByteValued + Default>(
    file: &mut F,
    offset: u64,
    length: u64,
    what: &'static str,
) -> Result<T, ElfError> {
    let end = offset.saturating_add(size_of::<T>() as u64);
    if end > length {
        return Err(ElfError::Truncated { what, end, length });
    }
    let mut value = T::default();
    file.seek(SeekFrom::Start(offset)).map_err(ElfError::Read)?;
    file.read_exact(value.as_mut_slice()).map_err(ElfError::Read)?;
    Ok(value)
}

#[cfg(test)]
mod tests;
