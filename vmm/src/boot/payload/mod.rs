//! Kernel files: what kind they are, and the ELF file in them.
//!
//! An ELF file is used where it lies. A bzImage is read as far as its payload, which is
//! decompressed here, so that the guest does not spend its first seconds on it. What a Linux
//! build appends to the ELF file in the payload (relocations) is ignored: the kernel is entered
//! at the address it was linked for.

mod bzimage;
mod decompress;
mod lz4;
mod lzop;

use std::fs::File;
use std::io::{Cursor, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use linux_loader::loader::KernelLoader;
use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::elf::Elf;
use vm_memory::GuestMemoryBackend;

use super::elf::{ElfError, ElfImage};
use super::error::{FileError, FirstBytes, KernelError};
use bzimage::SetupHeader;

pub use decompress::{Compression, DecodeError};
#[cfg(test)]
pub(super) use lzop::adler32 as lzop_adler32;

/// `EI_MAG0` to `EI_MAG3`.
const ELF_MAGIC: [u8; 4] = *b"\x7fELF";

/// A kernel file, read and checked, not yet in guest memory.
#[derive(Debug)]
pub(super) struct Kernel {
    source: Source,
    elf: ElfImage,
    setup: Option<SetupHeader>,
}

/// Where the bytes of the ELF file are.
#[derive(Debug)]
enum Source {
    /// The kernel file is the ELF file.
    File(File),
    /// The decompressed payload of a bzImage.
    Payload(Vec<u8>),
}

impl Kernel {
    /// Reads the kernel in the file `path`.
    ///
    /// A payload may decompress to `limit` bytes at most: what exceeds the RAM of the guest is of
    /// no use to it.
    ///
    /// # Errors
    /// The file cannot be read, is cut off, or is not a kernel for this machine.
    pub(super) fn open(path: &Path, limit: u64) -> Result<Self, KernelError> {
        let (mut file, length) = open_regular(path)?;
        let mut start = Vec::with_capacity(bzimage::SETUP_HEADER_END);
        Read::by_ref(&mut file)
            .take(bzimage::SETUP_HEADER_END as u64)
            .read_to_end(&mut start)
            .map_err(FileError::Read)?;

        if start.starts_with(&ELF_MAGIC) {
            let elf = parse_elf(&mut file, length).map_err(|reason| elf_error(reason, false))?;
            return Ok(Self { source: Source::File(file), elf, setup: None });
        }
        let Some(setup) = SetupHeader::parse(&start, length)? else {
            return Err(KernelError::NotAKernel {
                first_bytes: FirstBytes::of(&start),
                compression: Compression::detect(&start),
            });
        };
        let payload = setup.read_payload(&mut file, length, limit)?;
        let image = unpack(payload, limit)?;
        let elf = parse_elf(&mut Cursor::new(&image), image.len() as u64)
            .map_err(|reason| elf_error(reason, true))?;
        Ok(Self { source: Source::Payload(image), elf, setup: Some(setup) })
    }

    /// Where the ELF file wants to be, and its entry point.
    pub(super) fn elf(&self) -> &ElfImage {
        &self.elf
    }

    /// The setup header that goes to the guest, if the kernel is a bzImage.
    pub(super) fn setup_header(&self) -> Option<setup_header> {
        self.setup.as_ref().map(SetupHeader::for_guest)
    }

    /// Copies the segments into guest memory.
    ///
    /// # Errors
    /// The file cannot be read to the end of a segment, or it has a damaged note.
    pub(super) fn load_into<M: GuestMemoryBackend>(self, mem: &M) -> Result<(), KernelError> {
        let in_payload = matches!(self.source, Source::Payload(_));
        let loaded = match self.source {
            Source::File(mut file) => Elf::load(mem, None, &mut file, None),
            Source::Payload(bytes) => Elf::load(mem, None, &mut Cursor::new(bytes), None),
        };
        match loaded {
            Ok(_) => Ok(()),
            Err(reason) => Err(elf_error(ElfError::Load(reason), in_payload)),
        }
    }
}

/// Opens a file that must be a regular one and not empty; its length in bytes with it.
pub(super) fn open_regular(path: &Path) -> Result<(File, u64), FileError> {
    // O_NONBLOCK: opening a pipe must not wait for somebody to write to it.
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(FileError::Open)?;
    let metadata = file.metadata().map_err(FileError::Read)?;
    if !metadata.is_file() {
        return Err(FileError::NotAFile);
    }
    match metadata.len() {
        0 => Err(FileError::Empty),
        length => Ok((file, length)),
    }
}

/// The ELF file in a bzImage's payload.
fn unpack(payload: Vec<u8>, limit: u64) -> Result<Vec<u8>, KernelError> {
    if payload.starts_with(&ELF_MAGIC) {
        return Ok(payload);
    }
    let compression = Compression::detect(&payload)
        .ok_or_else(|| KernelError::UnknownPayload(FirstBytes::of(&payload)))?;
    let image = decompress::decompress(compression, &payload, limit)
        .map_err(|reason| KernelError::Payload { compression, reason })?;
    if image.starts_with(&ELF_MAGIC) {
        Ok(image)
    } else {
        let reason = DecodeError::NotElf(FirstBytes::of(&image));
        Err(KernelError::Payload { compression, reason })
    }
}

/// The headers of an ELF file of `length` bytes that can be loaded.
fn parse_elf<F: Read + Seek>(file: &mut F, length: u64) -> Result<ElfImage, ElfError> {
    let elf = ElfImage::parse(file, length)?;
    elf.check_placement()?;
    Ok(elf)
}

/// An ELF file that is cut off is a truncated kernel file, unless it came out of a payload.
fn elf_error(reason: ElfError, in_payload: bool) -> KernelError {
    match reason {
        ElfError::Truncated { what, end, length } if !in_payload => {
            KernelError::Truncated { what, end, length }
        }
        reason => KernelError::Elf { in_payload, reason },
    }
}

/// Reads exactly `length` bytes at `offset` into a buffer that grows as they arrive.
fn read_range(file: &mut File, offset: u64, length: u64) -> Result<Vec<u8>, FileError> {
    file.seek(SeekFrom::Start(offset)).map_err(FileError::Read)?;
    let mut bytes = Vec::new();
    let wanted = usize::try_from(length).map_err(|_| FileError::Shrank)?;
    bytes.try_reserve_exact(wanted).map_err(|error| FileError::Read(error.into()))?;
    file.take(length).read_to_end(&mut bytes).map_err(FileError::Read)?;
    if bytes.len() == wanted { Ok(bytes) } else { Err(FileError::Shrank) }
}

#[cfg(test)]
mod tests;
