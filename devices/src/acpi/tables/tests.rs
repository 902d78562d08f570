use std::process::Command;

use super::*;

const ADDRESS: u64 = 0xe_0000;

fn machine(virtio: &[VirtioPlace]) -> Machine<'_> {
    Machine {
        vcpus: 3,
        lapic: 0xfee0_0000,
        io_apic: 0xfec0_0000,
        serial: (0x3f8, 4),
        reset: (0x64, 0xfe),
        sleep_control: 0x600,
        sleep_type_s5: 5,
        events: (0x608, 3),
        generation: 0x1_000e_f000,
        virtio,
    }
}

fn places(count: u32) -> Vec<VirtioPlace> {
    let place = |n| VirtioPlace { address: 0xd000_0000 + n * 0x1000, len: 0x1000, irq: 5 + n };
    (0..count).map(place).collect()
}

/// The tables as a guest finds them, which knows the address of the RSDP only.
struct Walk<'a>(&'a [u8]);

impl<'a> Walk<'a> {
    fn at(&self, address: u64) -> &'a [u8] {
        &self.0[usize::try_from(address - ADDRESS).unwrap()..]
    }

    /// A table by its signature, whole and with a right checksum.
    fn table(&self, address: u64, signature: &str) -> &'a [u8] {
        let bytes = self.at(address);
        assert_eq!(&bytes[..4], signature.as_bytes());
        let table = &bytes[..u32_at(bytes, 4) as usize];
        assert_eq!(sum(table), 0, "checksum of {signature}");
        table
    }

    fn listed(&self) -> Vec<u64> {
        let rsdp = self.at(ADDRESS);
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert_eq!((sum(&rsdp[..20]), sum(&rsdp[..36]), rsdp[15]), (0, 0, 2));
        let xsdt = self.table(u64_at(rsdp, 24), "XSDT");
        xsdt[36..].chunks(8).map(|entry| u64_at(entry, 0)).collect()
    }
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

#[test]
fn every_table_is_found_from_the_rsdp_with_its_checksum() {
    for devices in [0, 1, 19] {
        let places = places(devices);
        let tables = Tables::new(&machine(&places), ADDRESS);
        let walk = Walk(tables.bytes());
        let [fadt, madt] = walk.listed()[..] else { panic!("two tables") };
        let fadt = walk.table(fadt, "FACP");
        // Hardware-reduced, and both buttons are devices.
        assert_eq!(u32_at(fadt, 112), 1 << 20 | 1 << 10 | 1 << 5 | 1 << 4);
        let port = |at: usize| (fadt[at], u64_at(fadt, at + 4));
        assert_eq!((port(116), fadt[128]), ((1, 0x64), 0xfe));
        assert_eq!((port(244), port(256)), ((1, 0x600), (1, 0x601)));
        let madt = walk.table(madt, "APIC");
        assert_eq!(u32_at(madt, 36), 0xfee0_0000);
        let cpus: Vec<_> = madt[44..].chunks(8).take(3).map(|cpu| (cpu[0], cpu[3])).collect();
        assert_eq!(cpus, [(0, 0), (0, 1), (0, 2)]);
        assert_eq!((madt[68], madt[70], u32_at(madt, 72)), (1, 3, 0xfec0_0000));
        let dsdt = walk.table(u64_at(fadt, 140), "DSDT");
        let ids = dsdt.windows(8).filter(|text| *text == b"LNRO0005").count();
        assert_eq!(ids, devices as usize);
        assert!(dsdt.windows(14).any(|text| text == b"VM_Gen_Counter"));
    }
}

/// What Intel's compiler makes of the DSDT; `None` where it is not installed.
fn disassembled(tables: &Tables) -> Option<String> {
    let walk = Walk(tables.bytes());
    let fadt = walk.table(walk.listed()[0], "FACP");
    let dsdt = walk.table(u64_at(fadt, 140), "DSDT");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("dsdt.aml");
    std::fs::write(&path, dsdt).unwrap();
    let output = Command::new("iasl").arg("-d").arg(&path).output().ok()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && !said.contains("Error"), "{said}");
    let source = dir.path().join("dsdt.dsl");
    // It must also be a program: compiled again without an error.
    let again = Command::new("iasl").arg("-p").arg(dir.path().join("again")).arg(&source).output();
    let again = String::from_utf8_lossy(&again.unwrap().stdout).into_owned();
    assert!(again.contains(" 0 Errors"), "{again}");
    Some(std::fs::read_to_string(source).unwrap())
}

#[test]
fn the_dsdt_is_what_intels_compiler_takes_for_it() {
    let places = places(19);
    let tables = Tables::new(&machine(&places), ADDRESS);
    let Some(text) = disassembled(&tables) else {
        let missing = "iasl, of the package acpica-tools, is not installed";
        assert!(std::env::var("CI").as_deref() != Ok("true"), "CI=true, but {missing}");
        eprintln!("SKIPPED: {missing}");
        return;
    };
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    for wanted in [
        "Device (COM1) { Name (_HID, EisaId (\"PNP0501\")",
        "Device (VR12)",
        "Memory32Fixed (ReadWrite, 0xD0012000, // Address Base 0x00001000, // Address Length )",
        "Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive, ,, ) { 0x00000017, }",
        "Name (_CID, Package (0x02) // _CID: Compatible ID { \"VM_Gen_Counter\", \"VMGENCTR\" })",
        "Name (ADDR, Package (0x02) { 0x000EF000, One })",
        "OperationRegion (EREG, SystemIO, 0x0608, 0x04)",
        "Method (_EVT, 1, Serialized) // _EVT: Event { Local0 = EVTS /* \\_SB_.GED_.EVTS */ If ((Local0 & One)) { \
         Notify (VGEN, 0x80) // Status Change } If ((Local0 & 0x02)) { Notify (PWRB, 0x80) // Status \
         Change } }",
        "Name (_S5, Package (0x04) // _S5_: S5 System State { 0x05, Zero, Zero, Zero })",
    ] {
        assert!(text.contains(wanted), "{wanted}\nis not in\n{text}");
    }
}

#[test]
fn tables_of_the_largest_machine_fit_their_room() {
    let places = places(19);
    let machine = Machine { vcpus: 254, ..machine(&places) };
    assert!(Tables::new(&machine, ADDRESS).bytes().len() < 0xf000);
}
