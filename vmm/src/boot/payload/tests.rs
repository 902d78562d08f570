use proptest::prelude::*;

use super::super::layout::MIN_RAM;
use super::super::testing::{self, COMPRESSIONS, bzimage, bzimage_of, code, elf, file, payload};
use super::*;

/// What a guest with the least RAM can hold.
const LIMIT: u64 = MIN_RAM;

fn open(content: &[u8]) -> Result<Kernel, KernelError> {
    Kernel::open(file(content).path(), LIMIT)
}

fn refusal(content: &[u8]) -> String {
    open(content).unwrap_err().to_string()
}

/// The bytes of the ELF file in a kernel that must be a good bzImage.
fn unpacked(content: &[u8]) -> Vec<u8> {
    match open(content).unwrap().source {
        Source::Payload(bytes) => bytes,
        Source::File(_) => panic!("not taken for a bzImage"),
    }
}

#[test]
fn every_compression_gives_back_the_elf_file() {
    // More than one block of lzo.
    let elf = elf(&code(700_000));
    for compression in COMPRESSIONS {
        let payload = payload(compression, &elf);
        assert_eq!(Compression::detect(&payload), Some(compression));
        assert!(payload.len() < elf.len(), "{compression}");
        assert!(unpacked(&bzimage(&payload)) == elf, "{compression}");
    }
}

#[test]
fn elf_file_without_compression_is_a_payload_too() {
    let elf = elf(&code(5000));
    assert!(unpacked(&bzimage(&elf)) == elf);
}

#[test]
fn relocations_behind_the_elf_file_do_no_harm() {
    let mut elf = elf(&code(5000));
    elf.extend_from_slice(&[0x55; 4000]);
    let kernel = open(&bzimage(&payload(Compression::Xz, &elf))).unwrap();
    assert_eq!(kernel.elf().entry(), testing::ENTRY);
}

#[test]
fn large_lz4_payload_of_several_blocks_is_put_together() {
    let elf = elf(&code(9 << 20));
    assert!(unpacked(&bzimage(&payload(Compression::Lz4, &elf))) == elf);
}

#[test]
fn lz4_block_header_that_is_cut_off_is_corrupt() {
    let elf = elf(&code(5000));
    let payload = payload(Compression::Lz4, &elf);
    let (data, size) = payload.split_at(payload.len() - 4);
    let text = refusal(&bzimage(&[data, b"\x01\0", size].concat()));
    assert_eq!(text, "a bzImage whose lz4 payload is corrupt: an lz4 block is cut off");
}

#[test]
fn lz4_frames_behind_one_another_are_one_payload() {
    let elf = elf(&code(5000));
    let frame = |part| {
        let payload = payload(Compression::Lz4, part);
        payload[..payload.len() - 4].to_vec()
    };
    let size = u32::try_from(elf.len()).unwrap().to_le_bytes();
    let payload = [frame(&elf[..3000]), frame(&elf[3000..]), size.to_vec()].concat();
    assert!(unpacked(&bzimage(&payload)) == elf);
}

#[test]
fn incompressible_blocks_of_lzo_are_taken_as_they_are() {
    let mut state = 7u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        state.to_be_bytes()[0]
    })
    .take(300_000)
    .collect();
    let elf = elf(&noise);
    assert!(unpacked(&bzimage(&payload(Compression::Lzo, &elf))) == elf);
}

#[test]
fn the_kernel_of_this_project_is_a_zstd_bzimage_at_16_mib() {
    let kernel = Kernel::open(&testing::tiny_bzimage(), 64 << 20).unwrap();
    assert_eq!(kernel.elf().entry(), 0x100_0000);
    assert!(kernel.elf().end() > 0x180_0000);
    assert_eq!({ kernel.setup_header().unwrap().cmdline_size }, 2047);
}

#[test]
fn files_that_are_no_kernels_are_named_by_their_first_bytes() {
    let text = refusal(b"QFI\xfb\0\0\0\x03 and so on");
    assert_eq!(text, "not an ELF or bzImage kernel (first bytes 51 46 49 fb 00 00 00 03)");
    assert_eq!(refusal(b"x"), "not an ELF or bzImage kernel (first bytes 78)");
    assert_eq!(refusal(b""), "the file is empty");
    // A boot sector, but not one of Linux.
    let mut sector = vec![0; 1024];
    sector[0x1fe] = 0x55;
    sector[0x1ff] = 0xaa;
    assert!(refusal(&sector).starts_with("not an ELF or bzImage kernel"));
}

#[test]
fn kernel_compressed_as_a_whole_is_said_to_be() {
    let text = refusal(&payload(Compression::Gzip, &elf(&code(100))));
    assert!(text.ends_with(": the file as a whole is gzip data, decompress it first"), "{text}");
}

#[test]
fn missing_files_and_directories_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let missing = Kernel::open(&directory.path().join("vmlinux"), LIMIT).unwrap_err();
    assert!(missing.to_string().starts_with("cannot be opened: No such file"), "{missing}");
    let error = Kernel::open(directory.path(), LIMIT).unwrap_err();
    assert_eq!(error.to_string(), "not a regular file");
}

#[test]
fn pipe_is_refused_without_waiting_for_a_writer() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("pipe");
    let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: `name` is a NUL-terminated string.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    assert_eq!(Kernel::open(&path, LIMIT).unwrap_err().to_string(), "not a regular file");
}

#[test]
fn cut_off_bzimage_is_truncated_or_corrupt_at_every_length() {
    let payload = payload(Compression::Gzip, &elf(&code(300)));
    let image = bzimage(&payload);
    let end = image.len() - 512;
    for length in 0x206..end {
        let error = open(&image[..length]).unwrap_err();
        assert!(matches!(error, KernelError::Truncated { .. }), "{length}: {error}");
    }
    let text = refusal(&image[..end - 1]);
    let (has, wants) = (end - 1, end);
    assert_eq!(
        text,
        format!(
            "truncated: the payload of the bzImage ends at byte {wants}, but the file has {has} \
             bytes"
        )
    );
    open(&image[..end]).unwrap();
}

#[test]
fn bzimage_of_an_old_protocol_is_refused_with_its_version() {
    let payload = payload(Compression::Gzip, &elf(&code(100)));
    let old = setup_header { version: 0x0207, ..testing::setup(&payload) };
    let text = refusal(&bzimage_of(old, &payload));
    assert!(text.starts_with("a bzImage of boot protocol 2.07"), "{text}");
}

#[test]
fn no_setup_sectors_are_four_of_them() {
    let elf = elf(&code(5000));
    let payload = payload(Compression::Lz4, &elf);
    let setup = setup_header { setup_sects: 0, ..testing::setup(&payload) };
    let mut image = bzimage_of(setup, &payload);
    // Protected-mode code starts one sector later than after the three that are there.
    image.splice(4 * 512..4 * 512, [0; 512]);
    assert!(unpacked(&image) == elf);
}

#[test]
fn what_is_behind_the_end_of_a_setup_header_is_not_of_it() {
    let payload = payload(Compression::Lz4, &elf(&code(5000)));
    // Ends with setup_data, at 0x258; pref_address and init_size would follow.
    let setup = setup_header {
        version: 0x0209,
        jump: 0x56eb,
        pref_address: 0x6372_6170,
        init_size: 0x6564_6f63,
        ..testing::setup(&payload)
    };
    let header = open(&bzimage_of(setup, &payload)).unwrap().setup_header().unwrap();
    assert_eq!(({ header.pref_address }, { header.init_size }), (0, 0));
    assert_eq!(({ header.version }, { header.cmdline_size }), (0x0209, 2047));
}

#[test]
fn payload_outside_the_file_or_the_guest_is_refused() {
    let payload = payload(Compression::Gzip, &elf(&code(100)));
    let setup = testing::setup(&payload);
    for absurd in [
        setup_header { payload_offset: u32::MAX, ..setup },
        setup_header { payload_length: u32::MAX, ..setup },
        setup_header { payload_length: u32::MAX, payload_offset: u32::MAX, ..setup },
    ] {
        assert!(refusal(&bzimage_of(absurd, &payload)).starts_with("truncated: "));
    }
    // A file that is long enough, all hole.
    let kernel = file(&bzimage_of(setup_header { payload_length: 1 << 30, ..setup }, &payload));
    kernel.as_file().set_len(2 << 30).unwrap();
    let text = Kernel::open(kernel.path(), LIMIT).unwrap_err().to_string();
    assert!(text.contains("1073741824 bytes of payload, more than the 33554432"), "{text}");
}

#[test]
fn payload_of_an_unknown_kind_is_refused_with_its_first_bytes() {
    let text = refusal(&bzimage(b"\x04\x22\x4d\x18 an lz4 frame of the newer kind"));
    assert!(text.contains("payload is neither an ELF file nor compressed with"), "{text}");
    assert!(text.ends_with("(first bytes 04 22 4d 18 20 61 6e 20)"), "{text}");
    assert!(refusal(&bzimage(b"")).ends_with("(no bytes)"));
}

#[test]
fn payload_without_an_elf_file_in_it_is_refused() {
    for compression in COMPRESSIONS {
        let text = refusal(&bzimage(&payload(compression, &[b'?'; 1000])));
        let wanted = format!("a bzImage whose {compression} payload does not hold an ELF file");
        assert!(text.starts_with(&wanted), "{text}");
    }
}

#[test]
fn cut_off_payload_is_corrupt_for_every_compression() {
    let elf = elf(&code(20_000));
    for compression in COMPRESSIONS {
        let payload = payload(compression, &elf);
        // The size is at the end nevertheless: what is missing is compressed data.
        let (data, size) = payload.split_at(payload.len() - 4);
        for cut in [1, 7, data.len() / 2, data.len() - 16] {
            let short = [&data[..data.len() - cut], size].concat();
            let text = refusal(&bzimage(&short));
            let wanted = format!("a bzImage whose {compression} payload is corrupt");
            assert!(text.starts_with(&wanted), "{compression} without {cut}: {text}");
        }
    }
}

#[test]
fn size_at_the_end_must_be_the_size_that_comes_out() {
    let elf = elf(&code(20_000));
    for compression in COMPRESSIONS {
        for wrong in [0, elf.len() - 1, elf.len() + 1] {
            let mut payload = payload(compression, &elf);
            let at = payload.len() - 4;
            payload[at..].copy_from_slice(&u32::try_from(wrong).unwrap().to_le_bytes());
            let error = open(&bzimage(&payload)).unwrap_err();
            assert!(
                matches!(error, KernelError::Payload { .. }),
                "{compression} with {wrong}: {error}"
            );
        }
    }
}

#[test]
fn payload_that_claims_more_than_the_guest_has_is_refused_before_work() {
    for compression in COMPRESSIONS {
        let mut payload = payload(compression, &elf(&code(100)));
        let at = payload.len() - 4;
        payload[at..].copy_from_slice(&u32::MAX.to_le_bytes());
        let text = refusal(&bzimage(&payload));
        assert!(
            text.ends_with("payload would decompress to 4294967295 bytes, more than the 33554432 that fit the guest"),
            "{text}"
        );
    }
}

#[test]
fn bomb_stops_at_the_size_that_it_claims() {
    // Two blocks of lz4, and many of lzo, that claim to be 64 KiB of zeroes.
    let bomb = vec![0; 9 << 20];
    for compression in COMPRESSIONS {
        let mut payload = payload(compression, &bomb);
        let at = payload.len() - 4;
        payload[at..].copy_from_slice(&(64u32 << 10).to_le_bytes());
        let error = decompress::decompress(compression, &payload, LIMIT).unwrap_err();
        let text = error.to_string();
        assert!(text.starts_with("is corrupt"), "{compression}: {text}");
    }
}

#[test]
fn blocks_are_not_given_more_room_than_the_size_that_is_claimed() {
    let bomb = vec![0; 9 << 20];
    let expected = 64 << 10;
    for (compression, decode) in [
        (Compression::Lz4, lz4::decompress as fn(&[u8], usize, &mut Vec<u8>) -> _),
        (Compression::Lzo, lzop::decompress),
    ] {
        let payload = payload(compression, &bomb);
        let mut out = Vec::with_capacity(expected);
        decode(&payload[..payload.len() - 4], expected, &mut out).unwrap_err();
        assert_eq!(out.capacity(), expected, "{compression}");
    }
}

#[test]
fn lzma_dictionary_of_4_gib_is_refused_without_allocating_it() {
    let mut payload = payload(Compression::Lzma, &elf(&code(100)));
    payload[1..5].copy_from_slice(&u32::MAX.to_le_bytes());
    // The magic says a dictionary size whose low bytes are 0.
    payload[1..3].copy_from_slice(&[0, 0]);
    let text = refusal(&bzimage(&payload));
    assert!(text.starts_with("a bzImage whose lzma payload is corrupt"), "{text}");
}

#[test]
fn damaged_block_of_lzo_is_found_by_its_checksum() {
    let mut payload = payload(Compression::Lzo, &elf(&code(5000)));
    // The literal run of the only block starts behind header, sizes and checksum.
    let at = payload.len() - 100;
    payload[at] ^= 1;
    let text = refusal(&bzimage(&payload));
    assert!(text.starts_with("a bzImage whose lzo payload is corrupt"), "{text}");
}

#[test]
fn adler_32_is_that_of_rfc_1950() {
    assert_eq!(lzop::adler32(b""), 1);
    assert_eq!(lzop::adler32(b"Wikipedia"), 0x11e6_0398);
    // Long enough to need the remainder in between.
    assert_eq!(lzop::adler32(&[0xff; 100_000]), slow_adler32(&[0xff; 100_000]));
}

fn slow_adler32(data: &[u8]) -> u32 {
    let (low, high) = data.iter().fold((1u64, 0u64), |(low, high), &byte| {
        let low = (low + u64::from(byte)) % 65521;
        (low, (high + low) % 65521)
    });
    u32::try_from(high << 16 | low).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Opening must end, with an error or a kernel that stays within the limit.
    #[test]
    fn damaged_bzimage_never_panics_nor_exceeds_the_limit(
        which in 0..COMPRESSIONS.len(),
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        header_too in any::<bool>(),
        cut in proptest::option::of(any::<prop::sample::Index>()),
    ) {
        let mut image = bzimage(&payload(COMPRESSIONS[which], &elf(&code(3000))));
        // Damage to the payload alone, or anywhere.
        let start = if header_too { 0 } else { 4 * 512 + 0x100 };
        for (index, value) in damage {
            let length = image.len();
            image[start + index.index(length - start)] = value;
        }
        if let Some(cut) = cut {
            image.truncate(cut.index(image.len()) + 1);
        }
        if let Ok(kernel) = open(&image)
            && let Source::Payload(bytes) = kernel.source
        {
            prop_assert!(bytes.len() as u64 <= LIMIT);
            prop_assert!(bytes.capacity() as u64 <= LIMIT + 4096);
        }
    }

    #[test]
    fn any_bytes_behind_a_magic_never_panic_a_decoder(
        which in 0..COMPRESSIONS.len(),
        keep in 0usize..40,
        tail in proptest::collection::vec(any::<u8>(), 0..400),
    ) {
        let whole = payload(COMPRESSIONS[which], &elf(&code(500)));
        let mut bytes = whole[..keep.min(whole.len())].to_vec();
        bytes.extend(tail);
        let limit = 1 << 20;
        if let Ok(out) = decompress::decompress(COMPRESSIONS[which], &bytes, limit) {
            prop_assert!(out.len() as u64 <= limit);
        }
    }

    #[test]
    fn damaged_elf_headers_never_panic(
        damage in proptest::collection::vec((0usize..120, any::<u8>()), 1..8),
    ) {
        let mut kernel = elf(&code(1000));
        for (at, value) in damage {
            kernel[at] = value;
        }
        if let Ok(kernel) = open(&kernel) {
            prop_assert!(kernel.elf().end() <= super::super::layout::LOW_RAM_MAX);
        }
    }
}
