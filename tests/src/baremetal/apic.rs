//! Interrupts: the local APIC, the I/O APIC, the PIT; and how another vCPU is started.

use super::image;
use super::layout::{MAILBOX_SIZE, MAILBOXES, TRAMPOLINE};
use super::monitor::Monitor;

const LAPIC: u64 = 0xfee0_0000;
const IOAPIC: u64 = 0xfec0_0000;

/// Local APIC registers (Intel SDM volume 3, table 10-1).
const TASK_PRIORITY: u64 = LAPIC + 0x80;
const SPURIOUS: u64 = LAPIC + 0xf0;
const REQUESTED: u64 = LAPIC + 0x200;
const COMMAND: u64 = LAPIC + 0x300;
const COMMAND_HIGH: u64 = LAPIC + 0x310;
const TIMER: u64 = LAPIC + 0x320;
const TIMER_COUNT: u64 = LAPIC + 0x380;
const TIMER_DIVIDE: u64 = LAPIC + 0x3e0;

/// IA32_TSC_DEADLINE
pub const TSC_DEADLINE: u32 = 0x6e0;

/// I/O APIC pin of the serial port, and of the PIT (`docs/boot.md`).
pub const SERIAL_PIN: u8 = 4;
/// See [`SERIAL_PIN`].
pub const PIT_PIN: u8 = 0;

/// What the local timer does at the end of its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimerMode {
    /// Stops.
    OneShot,
    /// Begins again.
    Periodic,
    /// Compares IA32_TSC_DEADLINE with the TSC.
    TscDeadline,
}

/// Switches the local APIC of vCPU 0 on, and the PICs off.
pub fn enable(monitor: &mut Monitor) {
    for mask in [0x21, 0xa1] {
        monitor.port_out(mask, 0xff);
    }
    monitor.poke32(SPURIOUS, 0x1ff);
    monitor.poke32(TASK_PRIORITY, 0);
}

/// Sends an I/O APIC pin's interrupt to vCPU 0: edge triggered, active high.
pub fn route(monitor: &mut Monitor, pin: u8, vector: u8) {
    for (register, value) in [(0x11, 0), (0x10, vector.into())] {
        monitor.poke32(IOAPIC, register + 2 * u32::from(pin));
        monitor.poke32(IOAPIC + 0x10, value);
    }
}

/// Sets the local timer up. `count` is in bus cycles, and nothing in TSC-deadline mode.
pub fn timer(monitor: &mut Monitor, mode: TimerMode, vector: u8, count: u32) {
    monitor.poke32(TIMER_DIVIDE, 0b1011); // by 1
    let mode = match mode {
        TimerMode::OneShot => 0,
        TimerMode::Periodic => 1 << 17,
        TimerMode::TscDeadline => 2 << 17,
    };
    monitor.poke32(TIMER, mode | u32::from(vector));
    if count > 0 {
        monitor.poke32(TIMER_COUNT, count);
    }
}

/// Lets the PIT's counter 0 interrupt with that divisor of 1193182 Hz, again and again.
pub fn pit(monitor: &mut Monitor, divisor: u16) {
    monitor.port_out(0x43, 0b0011_0100); // counter 0, both bytes, rate generator
    for byte in divisor.to_le_bytes() {
        monitor.port_out(0x40, byte);
    }
}

/// Whether an interrupt waits in the local APIC for the processor to take it.
pub fn is_requested(monitor: &mut Monitor, vector: u8) -> bool {
    let register = REQUESTED + 0x10 * u64::from(vector / 32);
    monitor.peek32(register) & 1 << (vector % 32) != 0
}

/// Starts another vCPU by INIT and start-up IPI, and waits until it takes requests.
pub fn start_vcpu(monitor: &mut Monitor, vcpu: u64) {
    monitor.write(TRAMPOLINE, image::trampoline());
    let page = u32::try_from(TRAMPOLINE >> 12).unwrap();
    // INIT: delivery mode 5, level, assert. Start-up: delivery mode 6, page.
    for command in [0x0000_4500, 0x0000_4600 | page] {
        monitor.poke32(COMMAND_HIGH, u32::try_from(vcpu << 24).unwrap());
        monitor.poke32(COMMAND, command);
    }
    monitor.wait_word(MAILBOXES + vcpu * MAILBOX_SIZE + 40, |state| state == 2);
}
