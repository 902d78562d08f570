//! What can be wrong with a kernel, an initrd or a command line. Every text stands alone: it names
//! the file, what is wrong, and what would be right.

use std::fmt;
use std::io;
use std::path::PathBuf;

use vm_memory::GuestMemoryError;

use super::elf::ElfError;
use super::layout::LayoutError;
use super::payload::{Compression, DecodeError};

/// Why a guest cannot be booted from what it was given.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel file is of no use.
    #[error("--kernel {}: {reason}", path.display())]
    Kernel {
        /// As given to `--kernel`.
        path: PathBuf,
        /// What is wrong with it.
        reason: KernelError,
    },
    /// The initrd file is of no use.
    #[error("--initrd {}: {reason}", path.display())]
    Initrd {
        /// As given to `--initrd`.
        path: PathBuf,
        /// What is wrong with it.
        reason: FileError,
    },
    /// The command line cannot be given to this kernel.
    #[error("--append: {0}")]
    Cmdline(#[from] CmdlineError),
    /// Kernel and initrd do not fit below the end of RAM, or below the 32-bit hole.
    #[error(
        "{ram} bytes of RAM are too few: the kernel ends at {kernel_end:#x} and the initrd takes \
         {initrd} bytes, so give the guest {} MiB at least", mib(*needed)
    )]
    RamTooSmall {
        /// RAM of the guest, in bytes.
        ram: u64,
        /// First address behind the kernel, its `.bss` included.
        kernel_end: u64,
        /// Size of the initrd in bytes, 0 if there is none.
        initrd: u64,
        /// RAM that holds both, in bytes.
        needed: u64,
    },
    /// Kernel and initrd would not fit whatever the RAM.
    #[error(
        "kernel and initrd are too large: the kernel ends at {kernel_end:#x} and an initrd of \
         {initrd} bytes must end at or below {limit:#x}"
    )]
    InitrdTooLarge {
        /// First address behind the kernel.
        kernel_end: u64,
        /// Size of the initrd in bytes.
        initrd: u64,
        /// The first address that is too high for an initrd.
        limit: u64,
    },
    /// A RAM size that no guest can have.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The number of vCPUs does not fit the MP table.
    #[error("{0} vCPUs cannot be described to the guest: give it 1 to 254")]
    Vcpus(u8),
    /// Guest memory does not have what its layout promises.
    #[error("guest memory cannot take the {what}: {source}")]
    Memory {
        /// The structure that was being written.
        what: &'static str,
        /// From vm-memory.
        source: GuestMemoryError,
    },
}

/// What is wrong with a kernel file.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// It cannot be read at all.
    #[error(transparent)]
    File(#[from] FileError),
    /// Neither of the two kinds of kernel.
    #[error("not an ELF or bzImage kernel ({first_bytes}){}", hint(*.compression))]
    NotAKernel {
        /// How the file begins.
        first_bytes: FirstBytes,
        /// Set if the whole file is compressed.
        compression: Option<Compression>,
    },
    /// The file ends before what its headers promise.
    #[error("truncated: {what} ends at byte {end}, but the file has {length} bytes")]
    Truncated {
        /// What is cut off.
        what: &'static str,
        /// Where it would end.
        end: u64,
        /// Length of the file in bytes.
        length: u64,
    },
    /// A bzImage from before Linux 2.6.26.
    #[error(
        "a bzImage of boot protocol {}.{:02}, which does not say where its payload is: 2.08 \
         (Linux 2.6.26) is the oldest that can be booted", version >> 8, version & 0xff
    )]
    OldProtocol {
        /// As in the setup header: major in the upper byte.
        version: u16,
    },
    /// A bzImage whose payload has no known magic.
    #[error(
        "a bzImage whose payload is neither an ELF file nor compressed with gzip, xz, zstd, lz4, \
         lzma, bzip2 or lzo ({0})"
    )]
    UnknownPayload(FirstBytes),
    /// A payload that is longer than the guest has RAM.
    #[error("a bzImage with {length} bytes of payload, more than the {limit} that fit the guest")]
    PayloadTooLarge {
        /// Of the payload in the file, in bytes.
        length: u64,
        /// What fits, in bytes.
        limit: u64,
    },
    /// The payload does not decompress.
    #[error("a bzImage whose {compression} payload {reason}")]
    Payload {
        /// By the payload's magic.
        compression: Compression,
        /// What is wrong with it.
        reason: DecodeError,
    },
    /// The ELF file, or the one in a bzImage's payload, is not a kernel for this machine.
    #[error("{}{reason}", if *in_payload { "in the bzImage's payload: " } else { "" })]
    Elf {
        /// Whether the ELF file is a bzImage's payload.
        in_payload: bool,
        /// What is wrong with it.
        reason: ElfError,
    },
}

/// Why a file cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// From opening it.
    #[error("cannot be opened: {0}")]
    Open(#[source] io::Error),
    /// From reading it.
    #[error("cannot be read: {0}")]
    Read(#[source] io::Error),
    /// A directory, device, pipe or socket.
    #[error("not a regular file")]
    NotAFile,
    /// No byte in it.
    #[error("the file is empty")]
    Empty,
    /// It became shorter between looking at it and reading it.
    #[error("the file shrank while it was being read")]
    Shrank,
}

/// What is wrong with a command line.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CmdlineError {
    /// Longer than the kernel's `cmdline_size`.
    #[error("{length} bytes, but this kernel takes {limit} at most")]
    TooLong {
        /// Of the command line, in bytes without the NUL.
        length: usize,
        /// What the kernel takes, in bytes without the NUL.
        limit: usize,
    },
    /// A NUL or a byte above 127.
    #[error("byte {position} is {byte:#04x}, and only ASCII without NUL can be passed")]
    NotAscii {
        /// From 0.
        position: usize,
        /// The first one that is not allowed.
        byte: u8,
    },
}

/// The first bytes of something that was not recognised, for its message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirstBytes(Vec<u8>);

impl FirstBytes {
    /// Keeps the first eight of `bytes`.
    pub(super) fn of(bytes: &[u8]) -> Self {
        Self(bytes.iter().copied().take(8).collect())
    }
}

impl fmt::Display for FirstBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("no bytes");
        }
        f.write_str("first bytes")?;
        self.0.iter().try_for_each(|byte| write!(f, " {byte:02x}"))
    }
}

/// A word for somebody who gave a compressed file.
fn hint(compression: Option<Compression>) -> String {
    compression.map_or_else(String::new, |compression| {
        format!(": the file as a whole is {compression} data, decompress it first")
    })
}

/// `bytes` in MiB, rounded up.
fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}
