use proptest::prelude::*;
use vm_memory::GuestMemoryMmap;

use super::testing::{BSS, ENTRY, bzimage, code, elf, elf_of, file, headers, payload};
use super::*;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

type Memory = GuestMemoryMmap<()>;

fn memory(ram: u64) -> Memory {
    GuestMemoryMmap::from_ranges(&layout::ram_regions(ram).unwrap()).unwrap()
}

fn spec(kernel: &Path) -> BootSpec<'_> {
    BootSpec { kernel, initrd: None, cmdline: "console=ttyS0", vcpus: 2, acpi: None }
}

fn bytes(mem: &Memory, address: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    mem.read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

fn u32_at(mem: &Memory, address: u64) -> u32 {
    mem.read_obj(GuestAddress(address)).unwrap()
}

#[test]
fn elf_kernel_is_loaded_with_everything_it_is_told() {
    let code = code(10_000);
    let kernel = file(&elf(&code));
    let mem = memory(64 * MIB);
    let info = load(&mem, &spec(kernel.path())).unwrap();

    assert_eq!(info.entry, GuestAddress(ENTRY));
    assert_eq!(info.kernel_end, GuestAddress(ENTRY + 10_000 + BSS));
    assert_eq!(info.initrd, None);
    assert!(bytes(&mem, ENTRY, code.len()) == code);
    assert!(bytes(&mem, ENTRY + 10_000, 0x1000).iter().all(|byte| *byte == 0));
    assert_eq!(bytes(&mem, 0x2_0000, 14), b"console=ttyS0\0");
    let zero_page = info.zero_page.0;
    assert_eq!(bytes(&mem, zero_page + 0x202, 4), b"HdrS");
    assert_eq!(u32_at(&mem, zero_page + 0x228), 0x2_0000, "cmd_line_ptr");
    assert_eq!(bytes(&mem, 0x9_fc00, 4), b"_MP_");
    let table = u64::from(u32_at(&mem, 0x9_fc04));
    assert_eq!(bytes(&mem, table, 4), b"PCMP");
    assert_eq!(bytes(&mem, layout::GDT_ADDR.0 + 0x10, 8), 0x00af_9b00_0000_ffffu64.to_le_bytes());
    assert_eq!(bytes(&mem, layout::PML4_ADDR.0, 8), (layout::PDPT_ADDR.0 | 3).to_le_bytes());
}

#[test]
fn bzimage_is_entered_where_its_elf_file_says() {
    let code = code(10_000);
    for compression in testing::COMPRESSIONS {
        let kernel = file(&bzimage(&payload(compression, &elf(&code))));
        let mem = memory(32 * MIB);
        let info = load(&mem, &spec(kernel.path())).unwrap();
        assert_eq!(info.entry, GuestAddress(ENTRY), "{compression}");
        assert!(bytes(&mem, ENTRY, code.len()) == code, "{compression}");
        assert_eq!(bytes(&mem, info.zero_page.0 + 0x206, 2), [0x0f, 2], "version of the file");
    }
}

#[test]
fn the_kernel_of_this_project_fits_the_smallest_guest() {
    let path = testing::tiny_bzimage();
    let mem = memory(layout::MIN_RAM);
    let info = load(&mem, &spec(&path)).unwrap();
    assert_eq!(info.entry, GuestAddress(0x100_0000));
    assert!(bytes(&mem, info.entry.0, 64).iter().any(|byte| *byte != 0));
    assert!(info.kernel_end.0 > 0x1b0_0000 && info.kernel_end.0 < layout::MIN_RAM);
}

#[test]
fn initrd_ends_at_the_end_of_ram_and_the_zero_page_knows() {
    let kernel = file(&elf(&code(100)));
    let content = code(5000);
    let initrd = file(&content);
    let mem = memory(64 * MIB);
    let spec = BootSpec { initrd: Some(initrd.path()), ..spec(kernel.path()) };
    let info = load(&mem, &spec).unwrap();
    let address = 64 * MIB - 8192;
    assert_eq!(info.initrd, Some((GuestAddress(address), 5000)));
    assert!(bytes(&mem, address, content.len()) == content);
    assert_eq!(u64::from(u32_at(&mem, info.zero_page.0 + 0x218)), address);
    assert_eq!(u32_at(&mem, info.zero_page.0 + 0x21c), 5000);
}

#[test]
fn initrd_stays_below_what_the_kernel_can_reach_and_below_the_hole() {
    let kernel = file(&elf(&code(100)));
    let initrd = file(&[1; 4096]);
    let spec = BootSpec { initrd: Some(initrd.path()), ..spec(kernel.path()) };
    // Address space only: no page but those written is touched.
    let info = load(&memory(5 * GIB), &spec).unwrap();
    assert_eq!(info.initrd, Some((GuestAddress(0x8000_0000 - 4096), 4096)));

    let payload = payload(Compression::Lz4, &elf(&code(100)));
    let header = setup_header { initrd_addr_max: u32::MAX, ..testing::setup(&payload) };
    let kernel = file(&testing::bzimage_of(header, &payload));
    let spec = BootSpec { kernel: kernel.path(), ..spec };
    let info = load(&memory(5 * GIB), &spec).unwrap();
    assert_eq!(info.initrd, Some((GuestAddress(3 * GIB - 4096), 4096)));
}

#[test]
fn initrd_that_just_fits_is_loaded_and_one_byte_more_is_not() {
    let kernel = file(&elf(&code(100)));
    let kernel_end = (ENTRY + 100 + BSS).next_multiple_of(4096);
    let initrd = tempfile::NamedTempFile::new().unwrap();
    let spec = BootSpec { initrd: Some(initrd.path()), ..spec(kernel.path()) };

    initrd.as_file().set_len(32 * MIB - kernel_end).unwrap();
    let mem = memory(32 * MIB);
    assert_eq!(load(&mem, &spec).unwrap().initrd.unwrap().0.0, kernel_end);

    initrd.as_file().set_len(32 * MIB - kernel_end + 1).unwrap();
    let text = Boot::prepare(&spec, 32 * MIB).unwrap_err().to_string();
    assert_eq!(
        text,
        format!(
            "33554432 bytes of RAM are too few: the kernel ends at {:#x} and the initrd takes {} \
             bytes, so give the guest 33 MiB at least",
            ENTRY + 100 + BSS,
            32 * MIB - kernel_end + 1
        )
    );
    Boot::prepare(&spec, 33 * MIB).unwrap();

    initrd.as_file().set_len(3 * GIB).unwrap();
    let text = Boot::prepare(&spec, 8 * GIB).unwrap_err().to_string();
    assert!(text.contains("must end at or below 0x80000000"), "{text}");
}

#[test]
fn kernel_that_is_too_large_for_the_ram_says_what_it_needs() {
    let (header, mut segment) = headers(64);
    segment.p_memsz = 200 * MIB;
    let kernel = file(&elf_of(header, &[segment], &[0x90; 64]));
    let text = Boot::prepare(&spec(kernel.path()), 64 * MIB).unwrap_err().to_string();
    assert!(text.ends_with("so give the guest 216 MiB at least"), "{text}");
    Boot::prepare(&spec(kernel.path()), 216 * MIB).unwrap();
}

#[test]
fn messages_name_the_file_and_what_is_wrong_with_it() {
    let kernel = file(b"MZ is no kernel");
    let text = Boot::prepare(&spec(kernel.path()), 64 * MIB).unwrap_err().to_string();
    let path = kernel.path().display();
    assert_eq!(
        text,
        format!(
            "--kernel {path}: not an ELF or bzImage kernel (first bytes 4d 5a 20 69 73 20 6e 6f)"
        )
    );
    let kernel = file(&elf(&code(100))[..0x1000]);
    let text = Boot::prepare(&spec(kernel.path()), 64 * MIB).unwrap_err().to_string();
    assert!(text.ends_with("truncated: a segment ends at byte 4196, but the file has 4096 bytes"));

    let kernel = file(&elf(&code(100)));
    let missing = Path::new("no/such/initrd");
    let spec = BootSpec { initrd: Some(missing), ..spec(kernel.path()) };
    let text = Boot::prepare(&spec, 64 * MIB).unwrap_err().to_string();
    assert!(text.starts_with("--initrd no/such/initrd: cannot be opened: No such file"), "{text}");
    let empty = file(b"");
    let spec = BootSpec { initrd: Some(empty.path()), ..spec };
    let text = Boot::prepare(&spec, 64 * MIB).unwrap_err().to_string();
    assert!(text.ends_with(": the file is empty"), "{text}");
}

#[test]
fn command_line_is_limited_to_what_the_kernel_takes() {
    let kernel = file(&elf(&code(100)));
    let longest = "x".repeat(2047);
    let mem = memory(32 * MIB);
    load(&mem, &BootSpec { cmdline: &longest, ..spec(kernel.path()) }).unwrap();
    assert_eq!(bytes(&mem, 0x2_0000 + 2046, 2), [b'x', 0]);

    let refused = |cmdline: &str| {
        let spec = BootSpec { cmdline, ..spec(kernel.path()) };
        Boot::prepare(&spec, 32 * MIB).unwrap_err().to_string()
    };
    assert_eq!(
        refused(&"x".repeat(2048)),
        "--append: 2048 bytes, but this kernel takes 2047 at most"
    );
    let nul = refused("a\0b");
    assert_eq!(nul, "--append: byte 1 is 0x00, and only ASCII without NUL can be passed");
    assert!(refused("root=ä").contains("byte 5 is 0xc3"));
}

#[test]
fn command_line_limit_of_a_bzimage_counts_but_not_past_the_room() {
    let payload = payload(Compression::Zstd, &elf(&code(100)));
    let with_limit = |cmdline_size| {
        let header = setup_header { cmdline_size, ..testing::setup(&payload) };
        let kernel = file(&testing::bzimage_of(header, &payload));
        move |length: usize| {
            let cmdline = "y".repeat(length);
            let spec = BootSpec { cmdline: &cmdline, ..spec(kernel.path()) };
            Boot::prepare(&spec, 32 * MIB).is_ok()
        }
    };
    let takes = with_limit(255);
    assert!(takes(255) && !takes(256));
    let takes = with_limit(u32::MAX);
    assert!(takes(65535) && !takes(65536));
}

#[test]
fn vcpu_count_and_ram_size_are_checked() {
    let kernel = file(&elf(&code(100)));
    for vcpus in [0, 255] {
        let spec = BootSpec { vcpus, ..spec(kernel.path()) };
        let text = Boot::prepare(&spec, 32 * MIB).unwrap_err().to_string();
        assert_eq!(
            text,
            format!("{vcpus} vCPUs cannot be described to the guest: give it 1 to 254")
        );
    }
    let text = Boot::prepare(&spec(kernel.path()), 16 * MIB).unwrap_err().to_string();
    assert_eq!(text, "16777216 bytes of RAM are too few: a guest needs 32 MiB at least");
}

#[test]
fn memory_that_is_not_the_layout_is_an_error_not_a_panic() {
    let kernel = file(&elf(&code(100)));
    let boot = Boot::prepare(&spec(kernel.path()), 64 * MIB).unwrap();
    let mem = Memory::from_ranges(&[(GuestAddress(0x20_0000), 64 << 20)]).unwrap();
    let text = boot.load(&mem).unwrap_err().to_string();
    assert!(text.starts_with("guest memory cannot take the command line: "), "{text}");
}

#[test]
fn files_that_shrink_after_they_were_checked_are_errors() {
    let kernel = file(&elf(&code(10_000)));
    let initrd = file(&[1; 10_000]);
    let spec = BootSpec { initrd: Some(initrd.path()), ..spec(kernel.path()) };
    let boot = Boot::prepare(&spec, 32 * MIB).unwrap();
    initrd.as_file().set_len(5000).unwrap();
    let text = boot.load(&memory(32 * MIB)).unwrap_err().to_string();
    assert!(text.starts_with("--initrd "), "{text}");

    let boot = Boot::prepare(&BootSpec { initrd: None, ..spec }, 32 * MIB).unwrap();
    kernel.as_file().set_len(5000).unwrap();
    let text = boot.load(&memory(32 * MIB)).unwrap_err().to_string();
    assert!(text.starts_with("--kernel ") && text.contains("cannot be loaded"), "{text}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn damaged_elf_kernels_never_panic_and_stay_in_ram(
        damage in proptest::collection::vec((0usize..176, any::<u8>()), 1..6),
    ) {
        let (mut header, segment) = headers(1000);
        header.e_phnum = 2;
        let note = linux_loader::elf::Elf64_Phdr { p_type: 4, p_filesz: 40, ..segment };
        let mut kernel = elf_of(header, &[segment, note], &code(1000));
        for (at, value) in damage {
            kernel[at] = value;
        }
        let kernel = file(&kernel);
        let mem = memory(32 * MIB);
        if let Ok(info) = load(&mem, &spec(kernel.path())) {
            prop_assert!(info.kernel_end.0 <= 32 * MIB);
            prop_assert!(info.entry < info.kernel_end);
        }
    }
}
