//! Work in the background, for checkpoints of a guest that is busy: processes that compute or
//! write until they are told to stop, each able to tell whether it was disturbed.

use core::fmt::Write;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use crate::args::{Args, Path};
use crate::command::Agent;
use crate::console::Reply;
use crate::disk::{Disk, Range};
use crate::error::{During, Error};
use crate::pattern;
use crate::sys;

/// Most processes at a time.
const WORKERS_MAX: usize = 8;

/// `disk`: bytes of a write; small, so that many are under way while a checkpoint is taken.
const PIECE: u64 = 64 << 10;

/// What a worker tells; shared between it and init.
struct Progress {
    /// Steps done: additions, or pieces written.
    steps: AtomicU64,
    /// `cpu`: the value reached. `disk`: unused.
    value: AtomicU64,
    /// `disk`: pieces that could not be written, or read back otherwise than written.
    errors: AtomicU64,
}

/// The memory shared with the workers.
struct Shared {
    stop: AtomicBool,
    workers: [Progress; WORKERS_MAX],
}

/// What a worker does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Cpu,
    Disk,
}

/// The workers there are.
pub struct Load {
    shared: Option<&'static Shared>,
    pids: [(usize, Kind); WORKERS_MAX],
    count: usize,
}

impl Load {
    /// No workers.
    pub fn new() -> Self {
        Self { shared: None, pids: [(0, Kind::Cpu); WORKERS_MAX], count: 0 }
    }

    /// Whether there are no workers.
    pub fn is_idle(&self) -> bool {
        self.count == 0
    }

    fn shared(&mut self) -> Result<&'static Shared, Error> {
        if let Some(shared) = self.shared {
            return Ok(shared);
        }
        let memory = sys::map(size_of::<Shared>(), true).during("map")?;
        // SAFETY: zeroed, page-aligned, long enough, never unmapped, and valid as all zeroes:
        // atomics only, which is also what makes it sound to share with other processes.
        let shared = unsafe { &*memory.as_ptr().cast::<Shared>() };
        self.shared = Some(shared);
        Ok(shared)
    }
}

/// `load cpu <count>`, `load disk <device> <offset> <length>`, `load status`, `load stop`
pub fn load(agent: &mut Agent, mut args: Args, reply: &mut Reply) -> Result<(), Error> {
    match args.word("cpu, disk, status or stop expected")? {
        "cpu" => {
            let count = args.number("count expected")?;
            args.end()?;
            for _ in 0..count {
                start(agent, Kind::Cpu, |_, index, shared| compute(shared, index))?;
            }
            Ok(())
        }
        "disk" => {
            let device = args.device()?;
            let offset = args.number("offset expected")?;
            let range = Range::new(offset, args.number("length expected")?)?;
            args.end()?;
            if range.length < PIECE {
                return Err(Error::Request("length must be 64K at least"));
            }
            start(agent, Kind::Disk, |agent, index, shared| {
                write(agent, &device, range, shared, index);
            })
        }
        "status" => {
            args.end()?;
            tell(&mut agent.load, reply)
        }
        "stop" => {
            args.end()?;
            stop(&mut agent.load)?;
            let told = tell(&mut agent.load, reply);
            agent.load.count = 0;
            told
        }
        _ => Err(Error::Request("cpu, disk, status or stop expected")),
    }
}

/// Starts a process that does `work` with its number.
fn start(
    agent: &mut Agent,
    kind: Kind,
    work: impl FnOnce(&mut Agent, usize, &Shared),
) -> Result<(), Error> {
    // Mounted in init, so that the workers find it there.
    agent.mounts.need_dev()?;
    let shared = agent.load.shared()?;
    let index = agent.load.count;
    let progress = shared.workers.get(index).ok_or(Error::State("8 workers at most"))?;
    shared.stop.store(false, Relaxed);
    progress.steps.store(0, Relaxed);
    progress.errors.store(0, Relaxed);
    // Where a computation starts; it may be stopped before its first step.
    progress.value.store(index as u64, Relaxed);
    match sys::fork().during("fork")? {
        None => {
            // Requests are answered promptly all the same.
            sys::lowest_priority();
            work(agent, index, shared);
            sys::exit(0)
        }
        Some(pid) => {
            agent.load.pids[index] = (pid, kind);
            agent.load.count += 1;
            Ok(())
        }
    }
}

/// Ends all workers and waits for each.
fn stop(load: &mut Load) -> Result<(), Error> {
    let shared = load.shared()?;
    shared.stop.store(true, Relaxed);
    for (index, (pid, kind)) in load.pids[..load.count].iter().enumerate() {
        sys::wait_for(*pid).during("wait")?;
        if *kind == Kind::Cpu {
            let progress = &shared.workers[index];
            let expected = after(index as u64, progress.steps.load(Relaxed));
            if progress.value.load(Relaxed) != expected {
                progress.errors.store(1, Relaxed);
            }
        }
    }
    Ok(())
}

/// Steps and errors of each kind, over all its workers.
fn tell(load: &mut Load, reply: &mut Reply) -> Result<(), Error> {
    let shared = load.shared()?;
    for (kind, name) in [(Kind::Cpu, "cpu"), (Kind::Disk, "disk")] {
        let (mut workers, mut steps, mut errors) = (0, 0, 0);
        for (progress, (_, its_kind)) in shared.workers.iter().zip(&load.pids[..load.count]) {
            if *its_kind == kind {
                workers += 1;
                steps += progress.steps.load(Relaxed);
                errors += progress.errors.load(Relaxed);
            }
        }
        let _ = write!(reply, "{name}={workers} {name}-steps={steps} {name}-errors={errors} ");
    }
    Ok(())
}

/// Knuth's linear congruential generator: each value needs the one before, so a lost or repeated
/// step shows in all that follow, and yet the value after n steps can be computed directly.
const FACTOR: u64 = 6_364_136_223_846_793_005;
const INCREMENT: u64 = 1_442_695_040_888_963_407;

/// `load cpu`: steps of the generator until told to stop.
fn compute(shared: &Shared, index: usize) {
    const BATCH: u64 = 1 << 20;
    let progress = &shared.workers[index];
    let mut value = progress.value.load(Relaxed);
    while !shared.stop.load(Relaxed) {
        for _ in 0..BATCH {
            value = value.wrapping_mul(FACTOR).wrapping_add(INCREMENT);
        }
        progress.value.store(value, Relaxed);
        progress.steps.fetch_add(BATCH, Relaxed);
    }
}

/// The generator's value after `steps` steps from `start`, in the time of their binary digits.
fn after(start: u64, mut steps: u64) -> u64 {
    let (mut factor, mut increment) = (FACTOR, INCREMENT);
    let mut value = start;
    while steps > 0 {
        if steps & 1 == 1 {
            value = value.wrapping_mul(factor).wrapping_add(increment);
        }
        // Twice the step: f(f(x)) for f(x) = factor * x + increment.
        increment = increment.wrapping_mul(factor.wrapping_add(1));
        factor = factor.wrapping_mul(factor);
        steps >>= 1;
    }
    value
}

/// `load disk`: writes pieces here and there in `range` and reads each back, until told to stop.
fn write(agent: &mut Agent, device: &Path, range: Range, shared: &Shared, index: usize) {
    const PLACES: u64 = 0x706c_6163_6573;
    let progress = &shared.workers[index];
    let Ok(disk) = Disk::open(agent, device, true) else {
        progress.errors.fetch_add(1, Relaxed);
        return;
    };
    let places = range.length / PIECE;
    let mut step = 0;
    while !shared.stop.load(Relaxed) {
        let offset = range.offset + pattern::word(PLACES, step) % places * PIECE;
        let bytes = agent.buffer.first(PIECE);
        pattern::fill(bytes, step, offset);
        let written = disk.write(bytes, offset).is_ok();
        bytes.fill(0);
        let read = disk.read(bytes, offset).is_ok();
        if !written || !read || pattern::first_difference(bytes, step, offset).is_some() {
            progress.errors.fetch_add(1, Relaxed);
        }
        step += 1;
        progress.steps.store(step, Relaxed);
    }
}
