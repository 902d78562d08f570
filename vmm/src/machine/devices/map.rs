//! Where the devices are.
//!
//! | device | where | interrupt |
//! |---|---|---|
//! | serial console (16550) | ports 0x3f8 to 0x3ff | 4 |
//! | i8042, reset line only | ports 0x60 to 0x64 | - |
//! | sleep control register, power-off only | port 0x600 | - |
//! | sleep status register, event device: with ACPI | port 0x601, ports 0x608 to 0x60b | -, 3 |
//! | virtio-mmio, by slot | 4 KiB each from `boot::layout::MMIO_START` | from 5 |

use crate::boot::{IOAPIC_PINS, layout};

/// First port of the console.
pub const SERIAL_PORT: u64 = 0x3f8;
/// Interrupt of the console.
pub const SERIAL_IRQ: u32 = 4;
/// First port of the keyboard controller.
pub const I8042_PORT: u64 = 0x60;
/// ACPI's SLEEP_CONTROL register of hardware-reduced machines (ACPI 6.5, 4.8.3.7).
pub const SLEEP_CONTROL_PORT: u64 = 0x600;
/// The sleep type that means power-off here.
pub const SLEEP_TYPE_S5_VALUE: u8 = 5;
/// What pulls the reset line when it is written to port 0x64.
pub const RESET_VALUE: u8 = 0xfe;
/// Interrupt of the first virtio device; those below belong to the PC's own devices.
const FIRST_VIRTIO_IRQ: u32 = 5;
/// As many as there are IOAPIC pins left.
pub const MAX_VIRTIO_DEVICES: usize = (IOAPIC_PINS as u32 - FIRST_VIRTIO_IRQ) as usize;

/// Guest physical address of a slot's registers.
pub fn slot_address(index: usize) -> u64 {
    layout::MMIO_START.0 + index as u64 * layout::MMIO_DEVICE_SIZE
}

/// Interrupt of a slot.
pub fn slot_irq(index: usize) -> u32 {
    // At most MAX_VIRTIO_DEVICES.
    FIRST_VIRTIO_IRQ + u32::try_from(index).unwrap_or(0)
}

/// The kernel command line with what tells Linux of the virtio devices. What follows a lone `--`
/// is for init, so they go before it.
pub fn extend_cmdline(cmdline: &str, devices: usize) -> String {
    let size = layout::MMIO_DEVICE_SIZE >> 10;
    let parameter =
        |slot| format!("virtio_mmio.device={size}K@{:#x}:{}", slot_address(slot), slot_irq(slot));
    let parameters = (0..devices).map(parameter).collect::<Vec<_>>().join(" ");
    let (kernel, init) = match cmdline.split_once(" -- ") {
        Some((kernel, init)) => (kernel, Some(init)),
        None => match cmdline.strip_prefix("-- ") {
            Some(init) => ("", Some(init)),
            None => (cmdline, None),
        },
    };
    let init = init.map(|init| format!("-- {init}")).unwrap_or_default();
    let parts = [kernel, &parameters, &init];
    parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_before_what_is_for_init() {
        let devices = "virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6";
        assert_eq!(extend_cmdline("", 2), devices);
        assert_eq!(extend_cmdline("quiet -- shell", 2), format!("quiet {devices} -- shell"));
        assert_eq!(extend_cmdline("-- shell", 2), format!("{devices} -- shell"));
        assert_eq!(extend_cmdline("a=\"b  c\"", 0), "a=\"b  c\"");
    }
}
