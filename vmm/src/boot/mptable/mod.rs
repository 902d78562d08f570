//! The Intel MultiProcessor table (specification 1.4): how a guest without ACPI finds its vCPUs,
//! the I/O APIC, and which of its pins each interrupt is on.

use super::layout::{IOAPIC_ADDR, LAPIC_ADDR, MP_TABLE_ADDR};

/// Pins of KVM's I/O APIC (`KVM_IOAPIC_NUM_PINS`). Its default routing has GSI n on pin n, the
/// timer's GSI 0 included.
pub const IOAPIC_PINS: u8 = 24;

/// vCPUs at most: their APIC ids start at 0, the I/O APIC has the next one, and 255 is broadcast.
pub const MAX_VCPUS: u8 = 254;

/// Revision 1.4.
const SPEC_REVISION: u8 = 4;
/// What KVM's local APIC gives as its version.
const LAPIC_VERSION: u8 = 0x14;
/// What KVM's I/O APIC gives as its version.
const IOAPIC_VERSION: u8 = 0x11;
/// The only bus; its interrupts are edge triggered and active high unless said otherwise.
const ISA_BUS: u8 = 0;
/// All local APICs, as a destination.
const ALL_LAPICS: u8 = 0xff;

/// Size of the fixed part of the configuration table, section 4.2.
const HEADER_LENGTH: usize = 44;

/// Entry types, section 4.3.
mod entry {
    pub(super) const PROCESSOR: u8 = 0;
    pub(super) const BUS: u8 = 1;
    pub(super) const IO_APIC: u8 = 2;
    pub(super) const IO_INTERRUPT: u8 = 3;
    pub(super) const LOCAL_INTERRUPT: u8 = 4;
}

/// Processor flags, table 4-4: usable, and the one that boots.
mod cpu_flag {
    pub(super) const ENABLED: u8 = 1;
    pub(super) const BOOTSTRAP: u8 = 2;
}

/// CPU signature and features. Guests have CPUID for both, and Linux ignores these.
const CPU_SIGNATURE: u32 = 0x600;
/// FPU and APIC, as in CPUID leaf 1 EDX.
const CPU_FEATURES: u32 = 0x201;

/// Interrupt types, table 4-10.
mod interrupt {
    pub(super) const VECTORED: u8 = 0;
    pub(super) const NMI: u8 = 1;
    pub(super) const EXTINT: u8 = 3;
}

/// The floating pointer structure (section 4.1), 16 bytes.
pub(super) fn floating_pointer() -> [u8; 16] {
    #[expect(clippy::cast_possible_truncation, reason = "below 1 MiB")]
    let table = MP_TABLE_ADDR.0 as u32;
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(b"_MP_");
    bytes[4..8].copy_from_slice(&table.to_le_bytes());
    bytes[8] = 1; // length in units of 16 bytes
    bytes[9] = SPEC_REVISION;
    // The feature bytes stay 0: there is a configuration table, and no IMCR, so the interrupt
    // mode before the guest sets up its APICs is virtual wire.
    bytes[10] = checksum(&bytes);
    bytes
}

/// The configuration table for `vcpus` vCPUs with the APIC ids from 0, vCPU 0 booting.
pub(super) fn configuration_table(vcpus: u8) -> Vec<u8> {
    let io_apic_id = vcpus;
    let mut table = Vec::with_capacity(HEADER_LENGTH + 20 * usize::from(vcpus) + 256);
    table.resize(HEADER_LENGTH, 0);
    let mut entries = 0u16;
    let mut push = |bytes: &[u8]| {
        table.extend_from_slice(bytes);
        entries += 1;
    };

    // In the order of their types, as section 4.3 wants it.
    for id in 0..vcpus {
        let bootstrap = if id == 0 { cpu_flag::BOOTSTRAP } else { 0 };
        let mut processor = [0; 20];
        processor[..4].copy_from_slice(&[
            entry::PROCESSOR,
            id,
            LAPIC_VERSION,
            cpu_flag::ENABLED | bootstrap,
        ]);
        processor[4..8].copy_from_slice(&CPU_SIGNATURE.to_le_bytes());
        processor[8..12].copy_from_slice(&CPU_FEATURES.to_le_bytes());
        push(&processor);
    }
    push(&[entry::BUS, ISA_BUS, b'I', b'S', b'A', b' ', b' ', b' ']);
    let mut io_apic = [entry::IO_APIC, io_apic_id, IOAPIC_VERSION, 1, 0, 0, 0, 0];
    io_apic[4..].copy_from_slice(&IOAPIC_ADDR.to_le_bytes());
    push(&io_apic);
    for pin in 0..IOAPIC_PINS {
        let kind = interrupt::VECTORED;
        push(&[entry::IO_INTERRUPT, kind, 0, 0, ISA_BUS, pin, io_apic_id, pin]);
    }
    // The PIC is behind LINT0 of every local APIC, NMI on LINT1.
    for (pin, kind) in [(0, interrupt::EXTINT), (1, interrupt::NMI)] {
        push(&[entry::LOCAL_INTERRUPT, kind, 0, 0, ISA_BUS, 0, ALL_LAPICS, pin]);
    }
    fill_header(&mut table, entries);
    table
}

/// Fills in the fixed part, with the checksum over all of the table.
fn fill_header(table: &mut [u8], entries: u16) {
    // 254 vCPUs make 5 KiB.
    let length = u16::try_from(table.len()).unwrap_or(u16::MAX);
    table[..4].copy_from_slice(b"PCMP");
    table[4..6].copy_from_slice(&length.to_le_bytes());
    table[6] = SPEC_REVISION;
    table[8..16].copy_from_slice(b"TARDIGRD");
    table[16..28].copy_from_slice(b"TARDIGRADE  ");
    table[34..36].copy_from_slice(&entries.to_le_bytes());
    table[36..40].copy_from_slice(&LAPIC_ADDR.to_le_bytes());
    table[7] = checksum(table);
}

/// The byte that makes the sum of all bytes 0, where it is still 0 itself.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, &byte| sum.wrapping_add(byte)).wrapping_neg()
}

#[cfg(test)]
mod tests;
