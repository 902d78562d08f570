//! Kernels made up for tests: small ELF files, and bzImages around any payload.

use std::io::{Read, Write};

use linux_loader::elf::{Elf64_Ehdr, Elf64_Phdr};
use linux_loader::loader::bootparam::setup_header;
use vm_memory::ByteValued;

use super::Compression;
use super::payload::lzop_adler32;

/// Where the segment of [`elf`] goes, which is also its entry point.
pub(super) const ENTRY: u64 = 0x100_0000;

/// Bytes of `.bss` behind the segment of [`elf`].
pub(super) const BSS: u64 = 0x1000;

/// The ELF file and program headers of [`elf`], for tests to spoil.
pub(super) fn headers(code_length: u64) -> (Elf64_Ehdr, Elf64_Phdr) {
    let mut header = Elf64_Ehdr {
        e_type: 2,
        e_machine: 62,
        e_version: 1,
        e_entry: ENTRY,
        e_phoff: 64,
        e_ehsize: 64,
        e_phentsize: 56,
        e_phnum: 1,
        ..Elf64_Ehdr::default()
    };
    header.e_ident[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    let segment = Elf64_Phdr {
        p_type: 1,
        p_flags: 7,
        p_offset: 0x1000,
        p_vaddr: ENTRY,
        p_paddr: ENTRY,
        p_filesz: code_length,
        p_memsz: code_length + BSS,
        p_align: 0x1000,
    };
    (header, segment)
}

/// An ELF file of one header, its program headers, and `code` at 0x1000.
pub(super) fn elf_of(header: Elf64_Ehdr, segments: &[Elf64_Phdr], code: &[u8]) -> Vec<u8> {
    let mut file = header.as_slice().to_vec();
    for segment in segments {
        file.extend_from_slice(segment.as_slice());
    }
    file.resize(0x1000, 0);
    file.extend_from_slice(code);
    file
}

/// A kernel whose only segment is `code`, entered at its first byte.
pub(super) fn elf(code: &[u8]) -> Vec<u8> {
    let (header, segment) = headers(code.len() as u64);
    elf_of(header, &[segment], code)
}

/// Code that neither compresses to nothing nor not at all.
pub(super) fn code(length: usize) -> Vec<u8> {
    let mut state = 1u32;
    let mut byte = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        if state & 0x300 == 0 { state.to_be_bytes()[0] } else { 0x90 }
    };
    (0..length).map(&mut byte).collect()
}

/// The setup header that [`bzimage`] writes.
pub(super) fn setup(payload: &[u8]) -> setup_header {
    setup_header {
        setup_sects: 3,
        boot_flag: 0xaa55,
        jump: 0x6aeb,
        header: u32::from_le_bytes(*b"HdrS"),
        version: 0x020f,
        loadflags: 1,
        code32_start: 0x10_0000,
        initrd_addr_max: 0x7fff_ffff,
        kernel_alignment: 0x20_0000,
        cmdline_size: 2047,
        payload_offset: 0x100,
        payload_length: u32::try_from(payload.len()).unwrap(),
        pref_address: ENTRY,
        init_size: 0x10_0000,
        ..setup_header::default()
    }
}

/// A bzImage of a setup header and a payload, with some decompressor code behind it.
pub(super) fn bzimage_of(setup: setup_header, payload: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 4 * 512 + 0x100];
    file[0x1f1..0x1f1 + size_of::<setup_header>()].copy_from_slice(setup.as_slice());
    file.extend_from_slice(payload);
    file.extend_from_slice(&[0xcc; 512]);
    file
}

/// [`bzimage_of`] with the [`setup`] for the payload.
pub(super) fn bzimage(payload: &[u8]) -> Vec<u8> {
    bzimage_of(setup(payload), payload)
}

/// All the compressions there are.
pub(super) const COMPRESSIONS: [Compression; 7] = [
    Compression::Gzip,
    Compression::Xz,
    Compression::Zstd,
    Compression::Lz4,
    Compression::Lzma,
    Compression::Bzip2,
    Compression::Lzo,
];

/// `plain` compressed as a kernel build does it, with its size at the end.
pub(super) fn payload(compression: Compression, plain: &[u8]) -> Vec<u8> {
    let size = u32::try_from(plain.len()).unwrap().to_le_bytes();
    let mut packed = compress(compression, plain);
    if compression == Compression::Gzip {
        assert_eq!(packed[packed.len() - 4..], size, "gzip's own trailer");
    } else {
        packed.extend_from_slice(&size);
    }
    packed
}

fn compress(compression: Compression, plain: &[u8]) -> Vec<u8> {
    let mut packed = Vec::new();
    match compression {
        Compression::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(packed, flate2::Compression::best());
            encoder.write_all(plain).unwrap();
            packed = encoder.finish().unwrap();
        }
        Compression::Xz => {
            // As scripts/xz_wrap.sh of Linux: x86 filter, CRC-32.
            use liblzma::stream::{Check, Filters, LzmaOptions, Stream};
            let options = LzmaOptions::new_preset(0).unwrap();
            let mut filters = Filters::new();
            filters.x86().lzma2(&options);
            let stream = Stream::new_stream_encoder(&filters, Check::Crc32).unwrap();
            let mut encoder = liblzma::bufread::XzEncoder::new_stream(plain, stream);
            encoder.read_to_end(&mut packed).unwrap();
        }
        Compression::Lzma => {
            use liblzma::stream::{LzmaOptions, Stream};
            let options = LzmaOptions::new_preset(0).unwrap();
            let stream = Stream::new_lzma_encoder(&options).unwrap();
            let mut encoder = liblzma::bufread::XzEncoder::new_stream(plain, stream);
            encoder.read_to_end(&mut packed).unwrap();
        }
        Compression::Zstd => {
            // Streamed like `zstd -22 --ultra` from a pipe: the frame does not know its size.
            let mut encoder = zstd::stream::write::Encoder::new(packed, 3).unwrap();
            encoder.include_contentsize(false).unwrap();
            encoder.write_all(plain).unwrap();
            packed = encoder.finish().unwrap();
        }
        Compression::Bzip2 => {
            let mut encoder = bzip2::write::BzEncoder::new(packed, bzip2::Compression::best());
            encoder.write_all(plain).unwrap();
            packed = encoder.finish().unwrap();
        }
        Compression::Lz4 => {
            packed.extend_from_slice(&[0x02, 0x21, 0x4c, 0x18]);
            for block in plain.chunks(8 << 20) {
                let block = lz4_flex::block::compress(block);
                packed.extend_from_slice(&u32::try_from(block.len()).unwrap().to_le_bytes());
                packed.extend_from_slice(&block);
            }
        }
        Compression::Lzo => packed = lzop_file(plain),
    }
    packed
}

/// An lzop file as lzop 1.04 writes it: blocks of 256 KiB with Adler-32, stored if they do not
/// become smaller.
fn lzop_file(plain: &[u8]) -> Vec<u8> {
    let mut file = b"\x89LZO\0\r\n\x1a\n".to_vec();
    let mut header = Vec::new();
    header.extend_from_slice(&0x1040u16.to_be_bytes()); // version
    header.extend_from_slice(&0x20a0u16.to_be_bytes()); // library
    header.extend_from_slice(&0x0940u16.to_be_bytes()); // needed to extract
    header.extend_from_slice(&[3, 9]); // LZO1X-999, level 9
    header.extend_from_slice(&0x0300_0001u32.to_be_bytes()); // Unix, Adler-32 of plain data
    header.extend_from_slice(&0o100_644u32.to_be_bytes());
    header.extend_from_slice(&[0; 8]); // modification time
    header.extend_from_slice(b"\x0bvmlinux.bin");
    file.extend_from_slice(&header);
    file.extend_from_slice(&lzop_adler32(&header).to_be_bytes());
    for block in plain.chunks(256 << 10) {
        let packed = lzo1x::compress(block, lzo1x::CompressLevel::default());
        let data = if packed.len() < block.len() { &packed[..] } else { block };
        for number in [block.len(), data.len()] {
            file.extend_from_slice(&u32::try_from(number).unwrap().to_be_bytes());
        }
        file.extend_from_slice(&lzop_adler32(block).to_be_bytes());
        file.extend_from_slice(data);
    }
    file.extend_from_slice(&[0; 4]);
    file
}

/// A file with some content, deleted when dropped.
pub(super) fn file(content: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(content).unwrap();
    file
}

/// The Linux kernel that this project brings along.
pub(super) fn tiny_bzimage() -> std::path::PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "../resources/guest/tiny.bzImage"].iter().collect()
}
