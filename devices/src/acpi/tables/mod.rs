//! The tables, for a machine without ACPI's fixed hardware ("hardware-reduced", ACPI 6.5, 4.1).
//!
//! ```text
//!   RSDP ──> XSDT ──┬──> FADT ──> DSDT      the devices, in AML
//!                   └──> MADT               vCPUs and the I/O APIC
//! ```
//!
//! They are one run of bytes for one address: nothing in them is changed once a guest has them.

use acpi_tables::aml::{
    And, Device, EISAName, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO,
    If, Interrupt, Local, Memory32Fixed, Method, Name, Notify, OpRegion, OpRegionSpace, Package,
    Path, ResourceTemplate, Scope, Store, ZERO,
};
use acpi_tables::fadt::{FADT, FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};

use super::ged::{Event, REGISTER_LEN};

const OEM: [u8; 6] = *b"TRDGRD";
const OEM_TABLE: [u8; 8] = *b"MICROVM ";
const OEM_REVISION: u32 = 1;
/// Tables start at multiples of so many bytes; the RSDP's own rule (5.2.5.1) is 16.
const ALIGN: usize = 64;

/// A virtio-mmio device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VirtioPlace {
    /// First register.
    pub address: u32,
    /// Bytes of registers.
    pub len: u32,
    /// Its interrupt, a GSI; edge triggered.
    pub irq: u32,
}

/// What the tables tell of. Interrupts are GSIs and edge triggered.
#[derive(Debug, Clone)]
pub struct Machine<'a> {
    /// vCPUs; their APIC ids are counted from 0.
    pub vcpus: u8,
    /// Address of the local APICs.
    pub lapic: u32,
    /// Address of the I/O APIC, whose id is the number of vCPUs and whose first GSI is 0.
    pub io_apic: u32,
    /// First port and interrupt of the console.
    pub serial: (u16, u32),
    /// Port that resets the machine when the value is written to it.
    pub reset: (u16, u8),
    /// Port of the sleep control register; the sleep status register follows it.
    pub sleep_control: u16,
    /// Sleep type of S5.
    pub sleep_type_s5: u8,
    /// First port of the event device's register, and its interrupt.
    pub events: (u16, u32),
    /// Where in RAM the VM generation id is.
    pub generation: u64,
    /// The virtio devices by slot.
    pub virtio: &'a [VirtioPlace],
}

/// The tables as they are in guest memory, the RSDP first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tables(Vec<u8>);

impl Tables {
    /// Tables to be put at `address`, which is a multiple of 64.
    pub fn new(machine: &Machine<'_>, address: u64) -> Self {
        let mut out = vec![0; Rsdp::len()];
        let mut place = |table: &dyn Aml| {
            out.resize(out.len().next_multiple_of(ALIGN), 0);
            let at = address + out.len() as u64;
            table.to_aml_bytes(&mut out);
            at
        };
        let dsdt = place(&dsdt(machine));
        let fadt = place(&fadt(machine, dsdt));
        let madt = place(&madt(machine));
        let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
        xsdt.add_entry(fadt);
        xsdt.add_entry(madt);
        let xsdt = place(&xsdt);
        let mut rsdp = Vec::new();
        Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
        out[..rsdp.len()].copy_from_slice(&rsdp);
        Self(out)
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

fn port(address: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, address.into())
}

fn fadt(machine: &Machine<'_>, dsdt: u64) -> FADT {
    /// IAPC_BOOT_ARCH (5.2.9.3): there is no VGA, and no CMOS clock.
    const NO_VGA: u16 = 1 << 2;
    const NO_CMOS_CLOCK: u16 = 1 << 5;
    // Both buttons are devices of the DSDT, or are not there.
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::Unspecified)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_CLOCK).into();
    let (reset, value) = machine.reset;
    fadt.reset_reg = port(reset);
    fadt.reset_value = value;
    fadt.sleep_control_reg = port(machine.sleep_control);
    fadt.sleep_status_reg = port(machine.sleep_control + 1);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"TARDIGRD").into();
    fadt.finalize()
}

fn madt(machine: &Machine<'_>) -> MADT {
    let lapic = LocalInterruptController::Address(machine.lapic);
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, lapic);
    for id in 0..machine.vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(machine.vcpus, machine.io_apic, 0));
    madt
}

fn dsdt(machine: &Machine<'_>) -> Sdt {
    let mut aml = Vec::new();
    let serial = serial(machine);
    let virtio: Vec<_> = (0..).zip(machine.virtio).map(|(slot, at)| virtio(slot, at)).collect();
    let (generation, button, events) = (generation(machine), power_button(), events(machine));
    let mut devices: Vec<&dyn Aml> = vec![&serial];
    devices.extend(virtio.iter().map(|device| device as &dyn Aml));
    devices.extend([&generation as &dyn Aml, &button, &events]);
    Scope::new(Path::new("_SB_"), devices).to_aml_bytes(&mut aml);
    // Power-off is all that a guest can go to.
    let s5 = Package::new(vec![&machine.sleep_type_s5, &0u8, &0u8, &0u8]);
    Name::new(Path::new("_S5_"), &s5).to_aml_bytes(&mut aml);
    // Revision 2: integers have 64 bits.
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&aml);
    dsdt
}

/// A piece of AML.
struct Code(Vec<u8>);

impl Aml for Code {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// A device with these objects.
fn device(name: &str, objects: Vec<&dyn Aml>) -> Code {
    let mut code = Vec::new();
    Device::new(Path::new(name), objects).to_aml_bytes(&mut code);
    Code(code)
}

fn name(name: &str, value: &dyn Aml) -> Name {
    Name::new(Path::new(name), value)
}

/// Registers and an interrupt.
fn resources(registers: &dyn Aml, irq: u32) -> Code {
    let mut code = Vec::new();
    ResourceTemplate::new(vec![registers, &interrupt(irq)]).to_aml_bytes(&mut code);
    Code(code)
}

fn interrupt(irq: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, irq)
}

fn serial(machine: &Machine<'_>) -> Code {
    let (port, irq) = machine.serial;
    let resources = resources(&IO::new(port, port, 0, 8), irq);
    device(
        "COM1",
        vec![
            &name("_HID", &EISAName::new("PNP0501")),
            &name("_UID", &ZERO),
            &name("_STA", &0x0fu8),
            &name("_CRS", &resources),
        ],
    )
}

fn virtio(slot: u8, place: &VirtioPlace) -> Code {
    let resources = resources(&Memory32Fixed::new(true, place.address, place.len), place.irq);
    device(
        &format!("VR{slot:02X}"),
        vec![
            &name("_HID", &"LNRO0005"),
            &name("_UID", &slot),
            &name("_CCA", &1u8),
            &name("_CRS", &resources),
        ],
    )
}

/// The VM generation id ("Virtual Machine Generation ID", Microsoft). Linux knows the short
/// compatible id, the specification has the long one.
fn generation(machine: &Machine<'_>) -> Code {
    let halves = [machine.generation & 0xffff_ffff, machine.generation >> 32];
    device(
        "VGEN",
        vec![
            &name("_HID", &"TRDG0001"),
            &name("_CID", &Package::new(vec![&"VM_Gen_Counter", &"VMGENCTR"])),
            &name("_DDN", &"VM_Gen_Counter"),
            &name("ADDR", &Package::new(vec![&halves[0], &halves[1]])),
        ],
    )
}

fn power_button() -> Code {
    device("PWRB", vec![&name("_HID", &EISAName::new("PNP0C0C")), &name("_UID", &ZERO)])
}

fn events(machine: &Machine<'_>) -> Code {
    let (port, irq) = machine.events;
    let register = Name::new_field_name("EVTS");
    let notify = |event: Event, device: &str, code: &mut Vec<u8>| {
        let bit = event as u32;
        let path = Path::new(device);
        If::new(&And::new(&ZERO, &Local(0), &bit), vec![&Notify::new(&path, &0x80u8)])
            .to_aml_bytes(code);
    };
    let mut body = Vec::new();
    // Reading empties the register.
    Store::new(&Local(0), &register).to_aml_bytes(&mut body);
    notify(Event::Generation, "VGEN", &mut body);
    notify(Event::PowerButton, "PWRB", &mut body);
    device(
        "GED_",
        vec![
            &name("_HID", &"ACPI0013"),
            &name("_UID", &ZERO),
            &name("_CRS", &ResourceTemplate::new(vec![&interrupt(irq)])),
            &OpRegion::new(Path::new("EREG"), OpRegionSpace::SystemIO, &port, &REGISTER_LEN),
            &Field::new(
                Path::new("EREG"),
                FieldAccessType::DWord,
                FieldLockRule::NoLock,
                FieldUpdateRule::WriteAsZeroes,
                vec![FieldEntry::Named(*b"EVTS", 32)],
            ),
            &Method::new(Path::new("_EVT"), 1, true, vec![&Code(body)]),
        ],
    )
}

#[cfg(test)]
mod tests;
