//! Time and CPUs.

use core::fmt::Write;

use crate::args::Args;
use crate::command::Agent;
use crate::console::Reply;
use crate::error::{During, Error};
use crate::sys;

const REALTIME: usize = 0;
const MONOTONIC: usize = 1;
const BOOTTIME: usize = 7;

/// `clock`: three clocks, read one right after the other.
pub fn clock(_: &mut Agent, args: Args, reply: &mut Reply) -> Result<(), Error> {
    args.end()?;
    let monotonic = sys::clock_ns(MONOTONIC).during("clock")?;
    let realtime = sys::clock_ns(REALTIME).during("clock")?;
    let boottime = sys::clock_ns(BOOTTIME).during("clock")?;
    let _ = write!(reply, "monotonic={monotonic} realtime={realtime} boottime={boottime}");
    Ok(())
}

/// `uptime`: milliseconds since the kernel started its clock.
pub fn uptime(_: &mut Agent, args: Args, reply: &mut Reply) -> Result<(), Error> {
    args.end()?;
    let boottime = sys::clock_ns(BOOTTIME).during("clock")?;
    let _ = write!(reply, "ms={}", boottime / 1_000_000);
    Ok(())
}

/// `cpus`: how many are online.
pub fn cpus(_: &mut Agent, args: Args, reply: &mut Reply) -> Result<(), Error> {
    args.end()?;
    let mask = sys::online_cpus().during("affinity")?;
    let _ = write!(reply, "online={} mask={mask:#x}", mask.count_ones());
    Ok(())
}
