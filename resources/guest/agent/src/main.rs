//! Init of the test and demo guest.
//!
//! It answers one-line commands on the console, so that a test on the host can ask the guest
//! things: what is on this disk, is that memory still what it was, what time is it. The protocol
//! is described in `docs/guest.md`.
//!
//! It is built to be started quickly by a CPU that is slow in kernel mode: no C library (whose
//! start-up costs page faults and picks AVX code by CPUID, which this guest's kernel does not
//! save), few pages, few system calls, and file systems mounted only when a command needs them.

#![no_std]
#![no_main]

mod args;
mod buffer;
mod clock;
mod command;
mod console;
mod disk;
mod error;
mod ext4;
mod files;
mod intrinsics;
mod load;
mod memory;
mod pattern;
mod power;
mod process;
mod start;
mod sys;

use core::panic::PanicInfo;

use command::Agent;
use console::{Console, Line};

/// Runs the agent. `shell` says that the kernel's command line asked for a shell first
/// (the word `shell` in it), for people at a terminal.
fn run(shell: bool) -> ! {
    let mut agent = Agent::new(Console::open());
    if shell {
        command::answer(&mut agent, "agent: shell");
    }
    console::print("agent: ready\n");

    let mut line = Line::new();
    loop {
        match line.read() {
            Ok(Some(request)) => command::answer(&mut agent, request),
            // An empty line: people press return to see whether anyone is there.
            Ok(None) => {}
            // Without a console nobody can ask for anything any more.
            Err(_) => power::off(&agent.console),
        }
    }
}

#[panic_handler]
fn panic(_: &PanicInfo) -> ! {
    // Nothing to clean up: say so and let the kernel report the death of init.
    console::print("agent: panic\n");
    sys::exit(1);
}
