//! Lazy load: the guest runs while its RAM is still in the image.
//!
//! Guest RAM is emptied and watched with userfaultfd. Whoever touches a page that is not there, a
//! vCPU, a device's thread or the kernel on behalf of one, sleeps until a thread of the service has
//! read the unit around it; other threads read the rest in the meantime. When all is there the watch
//! ends by itself. The service takes no lock of the machine, and waits for nothing but the image.
//!
//! ```text
//!             restored()                last unit read
//!   Loading ─────────────> Running ───────────────────────> over
//!      │                    │   ^
//!      │ a read fails       │   │ retry()
//!      v                    v   │
//!     lost <───────────── Failing       a fault cannot be served: told once, the guest is to stop
//!            forfeit()
//! ```
//!
//! While the machine is put together (Loading), and after [`LazyRam::forfeit`], nobody may wait for
//! long: a page that cannot be read becomes zero then, and RAM counts as lost. In between a page
//! that cannot be read stays missing, and who needs it waits.

pub mod guard;
mod order;
mod scratch;
mod service;
mod uffd;
mod units;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use block::snapshot::VmStateRead;
use block::{Format, Progress};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub use order::Orders;

use crate::memory::FormerRam;
use crate::track::Base;
use crate::{GuestMemory, memory};
use order::Order;
use scratch::Scratch;
use uffd::Uffd;
pub(crate) use units::{UNIT, Units};

/// Where the missing pages are.
pub(crate) struct Source {
    pub(crate) format: Arc<dyn Format>,
    /// The snapshot's id.
    pub(crate) id: String,
    /// The checkpoint.
    pub(crate) base: Base,
    /// What was touched first after earlier loads.
    pub(crate) orders: Arc<Orders>,
}

impl Source {
    fn open(&self) -> block::Result<Box<dyn VmStateRead + '_>> {
        self.format.open_vmstate(&self.id)
    }
}

/// What the service has to tell; from a thread of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// A page that someone waits for cannot be read; the text says why. Told once until
    /// [`LazyRam::retry`].
    Failing(String),
    /// A page that could not be read is about to become zero: whatever is made of it is wrong.
    Lost,
    /// Nothing is missing any more.
    Complete,
}

/// Takes notices. Must not wait for anything that touches guest memory.
pub type Notify = Box<dyn Fn(Notice) + Send + Sync>;

/// The host lets us serve page faults.
pub struct LazyHost(Uffd);

impl LazyHost {
    /// Asks the host.
    ///
    /// # Errors
    /// It does not; RAM must be read at once then.
    pub fn open() -> io::Result<Self> {
        Uffd::open().map(Self)
    }

    /// Whether RAM can be emptied and watched: all of it is anonymous memory. What is mapped from a
    /// file would come back.
    pub fn can_serve(ram: &GuestMemory) -> bool {
        memory::slices(ram).iter().all(memory::RamSlice::is_anonymous)
    }
}

/// What is done with a page that cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Policy {
    /// It becomes zero, and RAM is lost.
    Forfeit,
    /// Who needs it waits.
    Hold,
}

#[derive(Debug)]
struct State {
    policy: Policy,
    /// Units that someone waits for and that cannot be read.
    failed: Vec<usize>,
    /// Why, of the first.
    reason: Option<String>,
    /// A failure was told and not taken back.
    told: bool,
    /// Failed units are to be tried again.
    retry: bool,
    /// How often that was asked for: an attempt begun before the last time says nothing.
    retries: u64,
    /// Reading ahead ended with an error, until the next retry.
    stalled: bool,
    lost: bool,
    /// Whoever started the service wants nothing of it any more.
    abandoned: bool,
    /// The threads are to end.
    stop: bool,
    /// The watch has ended.
    over: bool,
}

impl State {
    /// Before anybody was told anything. What is needed to put the machine together cannot wait: nobody could
    /// say when to try again.
    fn at_start() -> Self {
        Self {
            policy: Policy::Forfeit,
            failed: Vec::new(),
            reason: None,
            told: false,
            retry: false,
            retries: 0,
            stalled: false,
            lost: false,
            abandoned: false,
            stop: false,
            over: false,
        }
    }
}

/// What the threads share.
struct Shared {
    uffd: Uffd,
    units: Units,
    /// What is watched: host address and length.
    ranges: Vec<(usize, u64)>,
    source: Source,
    /// What is read ahead first.
    first: Order,
    /// How much of `first` was taken by those who read ahead.
    first_taken: AtomicUsize,
    /// The unit behind the last that somebody waited for: likely to be next.
    behind_fault: AtomicUsize,
    /// What was in their place before: the pages are used again.
    former: FormerRam,
    /// Wakes the thread that serves faults.
    control: EventFd,
    state: Mutex<State>,
    /// Something in `state` changed, or a unit was filled or given back.
    changed: Condvar,
    /// A copy of `state.stop`, to be looked at between two reads.
    stop: AtomicBool,
    notify: Notify,
    /// Keeps guest memory mapped.
    _ram: GuestMemory,
}

/// Guest RAM of which a part is still in the image. Dropping it ends the service: what is missing
/// is zero from then on.
pub struct LazyRam {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl LazyRam {
    /// Empties guest RAM, unless it is `fresh`, and serves its units from `source`.
    pub(crate) fn start(
        LazyHost(uffd): LazyHost,
        source: Source,
        mut units: Units,
        ram: &GuestMemory,
        fresh: bool,
        notify: Notify,
    ) -> block::Result<Self> {
        let host = |operation, source| block::Error::Io {
            operation,
            filename: "guest RAM".to_owned(),
            offset: 0,
            source,
        };
        let ranges = units.ranges();
        let control = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
            .map_err(|source| host("making an event descriptor", source))?;
        let mut former = FormerRam::default();
        if !fresh {
            former =
                FormerRam::take(&memory::slices(ram)).map_err(|source| host("emptying", source))?;
        }
        // Pages that cannot be given would be held beside their copies.
        former = former.keep(if uffd.can_give() { &ranges } else { &[] });
        for &(start, len) in &ranges {
            uffd.register(start, len).map_err(|source| host("watching", source))?;
        }
        let shared = Arc::new(Shared {
            uffd,
            units,
            ranges,
            first: source.orders.of(&source.base),
            first_taken: AtomicUsize::new(0),
            behind_fault: AtomicUsize::new(service::NOWHERE),
            source,
            former,
            control,
            state: Mutex::new(State::at_start()),
            changed: Condvar::new(),
            stop: AtomicBool::new(false),
            notify,
            _ram: ram.clone(),
        });
        let (opened, answer) = channel();
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("ram-faults".to_owned())
            .spawn(move || service::run(&theirs, &opened))
            .map_err(|source| host("starting a thread for", source))?;
        let lazy = Self { shared, thread: Mutex::new(Some(thread)) };
        // No answer is a thread that has panicked.
        answer.recv().unwrap_or(Err(block::Error::Cancelled))?;
        Ok(lazy)
    }

    /// Whether nothing is missing any more.
    pub fn is_complete(&self) -> bool {
        self.shared.state().over
    }

    /// Bytes that are stored in the image and not yet in RAM.
    pub fn missing_bytes(&self) -> u64 {
        self.shared.units.left() as u64 * UNIT
    }

    /// Why a page that someone waits for, and goes on waiting for, cannot be read.
    pub fn failing(&self) -> Option<String> {
        let state = self.shared.state();
        let waits = state.told && !state.over && state.policy == Policy::Hold;
        waits.then(|| state.reason.clone().unwrap_or_default())
    }

    /// Why RAM is not that of the checkpoint and never will be.
    pub fn lost(&self) -> Option<String> {
        let state = self.shared.state();
        state.lost.then(|| state.reason.clone().unwrap_or_default())
    }

    /// Whether it was ended because other contents have taken the place of these, or are about to.
    pub fn is_abandoned(&self) -> bool {
        self.shared.state().abandoned
    }

    /// The machine is put together and can be stopped at any time: reading ahead begins, and a page
    /// that cannot be read stays missing.
    pub fn restored(&self) {
        self.shared.change(|state| state.policy = Policy::Hold);
    }

    /// Tries again to read what failed.
    pub fn retry(&self) {
        self.shared.change(|state| {
            state.retry = true;
            state.retries += 1;
            state.told = false;
            state.stalled = false;
        });
    }

    /// Nobody may wait any more for a page that cannot be read: the contents of RAM are given up.
    pub fn forfeit(&self) {
        self.shared.change(|state| state.policy = Policy::Forfeit);
    }

    /// Reads all that is missing, and waits until the watch has ended. Several may do so at once.
    ///
    /// # Errors
    /// What the image says; pages stay missing then. [`block::Error::Cancelled`] if `progress` was
    /// cancelled. Any error if the service was ended by someone else: see [`LazyRam::is_abandoned`].
    pub fn complete(&self, progress: &Progress) -> block::Result<()> {
        let shared = &*self.shared;
        let vmstate = shared.source.open()?;
        let mut scratch = Scratch::new().map_err(service::host_error)?;
        loop {
            for unit in 0..shared.units.len() {
                if shared.is_stopped() {
                    break;
                }
                let Some(piece) = shared.units.claim_run(unit, service::AHEAD) else { continue };
                let read =
                    progress.check().and_then(|()| shared.fill(&*vmstate, &piece, &mut scratch));
                if let Err(error) = read {
                    shared.give_back(&piece);
                    return Err(error);
                }
            }
            // The rest is being read by others; what they fail to read comes back.
            let mut state = shared.state();
            loop {
                if state.over && shared.units.left() == 0 && !state.lost {
                    return Ok(());
                }
                if state.over {
                    return Err(block::Error::Cancelled);
                }
                if !state.stop && (0..shared.units.len()).any(|unit| shared.units.is_missing(unit))
                {
                    break;
                }
                state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// Ends the service. RAM is as it is: what was missing is zero from now on.
    pub fn abandon(&self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.change(|state| {
            state.abandoned = true;
            state.stop = true;
        });
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that serves page faults has panicked");
        }
    }
}

impl Drop for LazyRam {
    fn drop(&mut self) {
        self.abandon();
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state());
        self.changed.notify_all();
        self.wake();
    }

    /// Has the thread that serves faults look at `state` and `units`.
    fn wake(&self) {
        // The only way to fail is a counter at its limit, which wakes too.
        let _ = self.control.write(1);
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }
}
