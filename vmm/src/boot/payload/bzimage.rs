//! The setup header of a bzImage (Linux `Documentation/arch/x86/boot.rst`).

use std::fs::File;

use linux_loader::loader::bootparam::setup_header;
use vm_memory::ByteValued;

use super::super::error::KernelError;
use super::read_range;

/// Where the setup header starts, in the file and in `boot_params`.
pub(super) const SETUP_HEADER_START: usize = 0x1f1;

/// Where the longest setup header that is known here ends in the file.
pub(super) const SETUP_HEADER_END: usize = SETUP_HEADER_START + size_of::<setup_header>();

/// `boot_flag`, at 0x1fe.
const BOOT_FLAG: u16 = 0xaa55;

/// `header`, at 0x202: "HdrS".
const HEADER_MAGIC: [u8; 4] = *b"HdrS";

/// The first protocol with `payload_offset` and `payload_length`.
const OLDEST_VERSION: u16 = 0x0208;

/// Sectors of real-mode code where `setup_sects` is 0.
const DEFAULT_SETUP_SECTS: u64 = 4;

/// The byte that says how far the header goes: it ends at 0x202 plus this one, at 0x201.
const HEADER_LENGTH_BYTE: usize = 0x201;

/// Size of a disk sector, the unit of `setup_sects`.
const SECTOR: u64 = 512;

/// A setup header that names a payload.
#[derive(Debug)]
pub(super) struct SetupHeader(setup_header);

impl SetupHeader {
    /// Takes the header from the first [`SETUP_HEADER_END`] bytes of a file (fewer if it is
    /// shorter) of `length` bytes. `None` if the file is not a bzImage.
    pub(super) fn parse(start: &[u8], length: u64) -> Result<Option<Self>, KernelError> {
        if start.get(0x1fe..0x200) != Some(&BOOT_FLAG.to_le_bytes())
            || start.get(0x202..0x206) != Some(&HEADER_MAGIC)
        {
            return Ok(None);
        }
        // The header is as long as it says; newer fields than it has are not garbage but 0.
        let said =
            start.get(HEADER_LENGTH_BYTE).map_or(SETUP_HEADER_END, |&n| 0x202 + usize::from(n));
        let end = said.min(SETUP_HEADER_END);
        let Some(bytes) = start.get(SETUP_HEADER_START..end) else {
            let (what, end) = ("the setup header of the bzImage", end as u64);
            return Err(KernelError::Truncated { what, end, length });
        };
        let mut header = setup_header::default();
        header.as_mut_slice()[..bytes.len()].copy_from_slice(bytes);
        if header.version < OLDEST_VERSION {
            return Err(KernelError::OldProtocol { version: header.version });
        }
        Ok(Some(Self(header)))
    }

    /// Reads the payload, which must lie in the `length` bytes of the file and, compressed as it
    /// is, within `limit` bytes.
    pub(super) fn read_payload(
        &self,
        file: &mut File,
        length: u64,
        limit: u64,
    ) -> Result<Vec<u8>, KernelError> {
        let setup_sects = match self.0.setup_sects {
            0 => DEFAULT_SETUP_SECTS,
            sectors => u64::from(sectors),
        };
        let payload_length = u64::from(self.0.payload_length);
        let start = (setup_sects + 1) * SECTOR + u64::from(self.0.payload_offset);
        let end = start + payload_length;
        if end > length {
            let what = "the payload of the bzImage";
            return Err(KernelError::Truncated { what, end, length });
        }
        if payload_length > limit {
            return Err(KernelError::PayloadTooLarge { length: payload_length, limit });
        }
        Ok(read_range(file, start, payload_length)?)
    }

    /// The header as the zero page gets it: what the file says, without what a boot loader sets.
    pub(super) fn for_guest(&self) -> setup_header {
        setup_header { ramdisk_image: 0, ramdisk_size: 0, cmd_line_ptr: 0, setup_data: 0, ..self.0 }
    }
}
