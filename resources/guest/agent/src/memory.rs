//! Memory with known contents, to be found again after a checkpoint.

use core::fmt::Write;

use crate::args::Args;
use crate::command::Agent;
use crate::console::Reply;
use crate::error::{During, Error};
use crate::pattern;
use crate::sys;

/// Memory that carries a pattern.
pub struct Region {
    bytes: &'static mut [u8],
    seed: u64,
}

/// Filling and summing go through memory in steps of this many bytes.
const STEP: usize = 4096;

/// Memory that `dirty` leaves to the kernel, for page tables and everything else.
const RESERVE: u64 = 4 << 20;

/// `dirty <MiB> <seed>`: memory of that size with the pattern. The same size again overwrites it
/// in place, another size replaces it, 0 gives it back.
pub fn dirty(agent: &mut Agent, mut args: Args, _: &mut Reply) -> Result<(), Error> {
    let mebibytes = args.number("size in MiB expected")?;
    let seed = args.number("seed expected")?;
    args.end()?;
    let length = mebibytes.checked_mul(1 << 20).and_then(|length| usize::try_from(length).ok());
    let length = length.ok_or(Error::Request("size too large"))?;
    if agent.memory.as_ref().is_none_or(|region| region.bytes.len() != length) {
        if let Some(region) = agent.memory.take() {
            sys::unmap(region.bytes);
        }
        if length == 0 {
            return Ok(());
        }
        // Nobody would survive the kernel running out of memory in the middle.
        if length as u64 > sys::free_memory().during("sysinfo")?.saturating_sub(RESERVE) {
            return Err(Error::State("not that much memory is free"));
        }
        let bytes = sys::map(length, false).during("map")?;
        agent.memory = Some(Region { bytes, seed });
    }
    if let Some(region) = &mut agent.memory {
        region.seed = seed;
        for (index, page) in region.bytes.chunks_mut(STEP).enumerate() {
            pattern::fill(page, seed, (index * STEP) as u64);
        }
    }
    Ok(())
}

/// `check-memory`: whether every byte is still what `dirty` wrote, and the sum of what is there.
pub fn check(agent: &mut Agent, args: Args, reply: &mut Reply) -> Result<(), Error> {
    args.end()?;
    let region = agent.memory.as_ref().ok_or(Error::State("nothing dirtied yet"))?;
    let mut sum = pattern::Sum::new();
    for (index, page) in region.bytes.chunks(STEP).enumerate() {
        if let Some(at) = pattern::first_difference(page, region.seed, (index * STEP) as u64) {
            return Err(Error::Mismatch(at));
        }
        sum.add(page);
    }
    let (length, seed) = (region.bytes.len(), region.seed);
    let _ = write!(reply, "sum={:016x} bytes={length} seed={seed}", sum.value());
    Ok(())
}
