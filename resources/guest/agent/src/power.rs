//! Power-off and reboot.
//!
//! The guest's kernel has no ACPI, so it does not know how to switch the machine off: it would
//! halt. The agent writes the ACPI sleep control register itself (ACPI 6.5, section 4.8.3.7), at
//! the I/O port where the VMM has it.

use core::arch::asm;

use crate::args::Args;
use crate::command::Agent;
use crate::console::{Console, Reply};
use crate::error::Error;
use crate::sys;

/// The sleep control register.
const SLEEP_CONTROL: u16 = 0x600;
/// SLP_EN (bit 5) with the sleep type of S5, soft off (5, in bits 4:2).
const SOFT_OFF: u8 = 1 << 5 | 5 << 2;

const LINUX_REBOOT_CMD_RESTART: u32 = 0x0123_4567;
const LINUX_REBOOT_CMD_POWER_OFF: u32 = 0x4321_fedc;

/// What to do once an answer is out.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum After {
    /// The next request.
    GoOn,
    /// Power-off.
    PowerOff,
    /// Reboot.
    Reboot,
}

/// `poweroff`
pub fn poweroff(agent: &mut Agent, args: Args, _: &mut Reply) -> Result<(), Error> {
    args.end()?;
    agent.after = After::PowerOff;
    Ok(())
}

/// `reboot`
pub fn reboot(agent: &mut Agent, args: Args, _: &mut Reply) -> Result<(), Error> {
    args.end()?;
    agent.after = After::Reboot;
    Ok(())
}

/// Does what was asked for, now that the answer is on its way.
pub fn act(agent: &mut Agent) {
    match agent.after {
        After::GoOn => {}
        After::PowerOff => off(&agent.console),
        After::Reboot => restart(&agent.console),
    }
}

/// Switches the machine off.
pub fn off(console: &Console) -> ! {
    settle(console);
    if sys::allow_ports(SLEEP_CONTROL, 1).is_ok() {
        // SAFETY: the port is allowed; what is behind it ends the machine or does nothing.
        unsafe { asm!("out dx, al", in("dx") SLEEP_CONTROL, in("al") SOFT_OFF) };
    }
    // No such register: let the kernel do what it knows.
    let _ = sys::reboot(LINUX_REBOOT_CMD_POWER_OFF);
    sys::exit(1)
}

fn restart(console: &Console) -> ! {
    settle(console);
    // The kernel stops the other CPUs and pulls the line its `reboot=` option names.
    let _ = sys::reboot(LINUX_REBOOT_CMD_RESTART);
    sys::exit(1)
}

/// Everything on disk, the last answer sent.
fn settle(console: &Console) {
    // What is not mounted there, or busy, is at least written back.
    let _ = sys::unmount(c"/mnt");
    sys::sync_all();
    console.drain();
}
