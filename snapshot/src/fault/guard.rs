//! Keeping what RAM holds at one moment while the guest goes on writing: userfaultfd's write
//! protection.
//!
//! ```text
//!             arm              take, by whoever writes the image
//!   (free) ─────────> armed ─────────────────────────────────────> taken
//!      ^                │                                            ^
//!      │ a write,       │ a write, after the switch: copied first    │
//!      └ before it ─────┴──────────────> kept ───────────────────────┘ take
//! ```
//!
//! Pages are armed while the guest runs. A write to an armed page waits for a thread of ours. Before the
//! switch it lets the write through: the page is dirty again, and is armed again at the switch, with the
//! guest standing still; these are few. After the switch it copies the page first. The thread takes no
//! lock but the guard's, and waits only where too much is kept already: for whoever writes the image.
//!
//! RAM may not be given back to the host while it is guarded.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::uffd::Uffd;
use crate::memory::{self, Copies};
use crate::track::{PageRun, PageSet};
use crate::units::{PAGE, index};
use crate::{GuestMemory, PAGE_SIZE};

/// Pages that are let go together when one of them is written: whoever writes one often writes the
/// next, and a fault costs more than copying these.
const GROUP: u64 = 8;
/// Pages taken at a time: 1 MiB.
const BATCH: u64 = 256;
/// Pages protected at a time. The guest's faults wait meanwhile.
const STEP: u64 = 16384;
/// Pages kept at most, 64 MiB. A guest that writes faster than the image takes it waits then.
const MOST_KEPT: u64 = 16384;

/// Guards RAM from its making until it is dropped.
pub struct WriteGuard {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// Pages as they were at the switch.
pub struct Kept {
    /// Which.
    pub run: PageRun,
    pub(crate) copies: Copies,
}

struct Shared {
    uffd: Uffd,
    ram: GuestMemory,
    /// Host address and length of each region.
    regions: Vec<(usize, u64)>,
    state: Mutex<State>,
    /// Kept pages were taken, or the guard ends.
    drained: Condvar,
    end: EventFd,
}

struct State {
    armed: PageSet,
    switched: bool,
    kept: Vec<Kept>,
    kept_pages: u64,
    ending: bool,
    /// The host failed: contents may be lost.
    failed: Option<String>,
}

impl WriteGuard {
    /// Guards `ram`; nothing is armed yet.
    ///
    /// # Errors
    /// The host does not let us, or somebody else watches the RAM.
    pub fn start(ram: &GuestMemory) -> io::Result<Self> {
        let uffd = Uffd::open_for_writes()?;
        let slices = memory::slices(ram);
        let regions: Vec<_> =
            slices.iter().map(|slice| (slice.host(0, 0).addr(), slice.len())).collect();
        for (at, (start, len)) in regions.iter().enumerate() {
            if let Err(error) = uffd.register_writes(*start, *len) {
                for (start, len) in &regions[..at] {
                    let _ = uffd.unregister(*start, *len);
                }
                return Err(error);
            }
        }
        let state = State {
            armed: PageSet::of(ram),
            switched: false,
            kept: Vec::new(),
            kept_pages: 0,
            ending: false,
            failed: None,
        };
        let shared = Arc::new(Shared {
            uffd,
            ram: ram.clone(),
            regions,
            state: Mutex::new(state),
            drained: Condvar::new(),
            end: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        });
        let mut guard = Self { shared: Arc::clone(&shared), thread: None };
        let thread = std::thread::Builder::new().name("write-guard".to_owned());
        guard.thread = Some(thread.spawn(move || shared.serve())?);
        Ok(guard)
    }

    /// Arms pages; the guest may run.
    ///
    /// # Errors
    /// The host refuses. Some are armed then.
    pub fn arm(&self, pages: &PageSet) -> io::Result<()> {
        for run in pages.runs().flat_map(|run| run.pieces(STEP)) {
            let mut state = self.shared.state();
            state.armed.insert(run);
            let (start, len) = self.shared.host(run);
            self.shared.uffd.protect(start, len, true)?;
        }
        Ok(())
    }

    /// From now on what armed pages hold is kept. The guest stands still, and with it the devices.
    pub fn switch(&self) {
        self.shared.state().switched = true;
    }

    /// The next pages of those that were armed at the switch, each once; `None` when there are no more.
    ///
    /// # Errors
    /// The host failed, and contents are lost.
    pub fn take(&self) -> io::Result<Option<Kept>> {
        let shared = &*self.shared;
        let mut state = shared.state();
        if let Some(reason) = &state.failed {
            return Err(io::Error::other(reason.clone()));
        }
        if let Some(kept) = state.kept.pop() {
            state.kept_pages -= kept.run.count;
            shared.drained.notify_all();
            return Ok(Some(kept));
        }
        let next = state.armed.runs().next();
        let Some(run) = next.and_then(|run| run.pieces(BATCH).next()) else { return Ok(None) };
        let copies = Copies::of(&memory::slices(&shared.ram), run);
        state.armed.remove(run);
        let (start, len) = shared.host(run);
        shared.uffd.protect(start, len, false)?;
        Ok(Some(Kept { run, copies }))
    }
}

impl Drop for WriteGuard {
    fn drop(&mut self) {
        self.shared.state().ending = true;
        self.shared.drained.notify_all();
        // The only way to fail is a counter at its limit, which wakes too.
        let _ = self.shared.end.write(1);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that guards RAM has panicked");
        }
        for (start, len) in &self.shared.regions {
            // It lets all writes through, and wakes who waits for it.
            if let Err(error) = self.shared.uffd.unregister(*start, *len) {
                tracing::error!("RAM stays guarded: {error}");
            }
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Host address and length.
    fn host(&self, run: PageRun) -> (usize, u64) {
        (self.regions[run.region].0 + index(run.offset()), run.len())
    }

    fn serve(&self) {
        let mut faults = Vec::new();
        while self.wait() {
            if let Err(error) = self.uffd.faults(&mut faults) {
                self.fail(&error);
            }
            for address in faults.drain(..) {
                if let Err(error) = self.let_write(address) {
                    self.fail(&error);
                }
            }
        }
    }

    /// Waits for a fault; false when the guard ends.
    fn wait(&self) -> bool {
        let poll = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let mut fds = [poll(self.uffd.as_fd().as_raw_fd()), poll(self.end.as_raw_fd())];
        // SAFETY: the array is that long. Interruptions and errors lead to another look.
        unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) };
        fds[1].revents == 0
    }

    /// Lets a write to the page at a host address happen.
    fn let_write(&self, address: usize) -> io::Result<()> {
        let place = |(region, (start, len)): (usize, &(usize, u64))| {
            let offset = address.checked_sub(*start)? as u64;
            (offset < *len).then_some((region, offset / PAGE_SIZE))
        };
        let Some((region, page)) = self.regions.iter().enumerate().find_map(place) else {
            return Ok(());
        };
        let mut state = self.state();
        while state.switched && state.kept_pages >= MOST_KEPT && !state.ending {
            state = self.drained.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let alone = PageRun { region, first: page, count: 1 };
        let switched = state.switched;
        let part = if switched {
            PageRun { first: page / GROUP * GROUP, count: GROUP, ..alone }
        } else {
            alone
        };
        let runs: Vec<_> = state.armed.runs_in(part).collect();
        for run in runs {
            if switched && !state.ending {
                let copies = Copies::of(&memory::slices(&self.ram), run);
                state.kept.push(Kept { run, copies });
                state.kept_pages += run.count;
            }
            state.armed.remove(run);
            let (start, len) = self.host(run);
            self.uffd.protect(start, len, false)?;
        }
        // Also where it is not armed any more: someone may have begun to wait just before.
        self.uffd.wake(address / index(PAGE) * index(PAGE), PAGE)
    }

    fn fail(&self, error: &io::Error) {
        tracing::error!("RAM cannot be guarded: {error}");
        let mut state = self.state();
        state.failed.get_or_insert_with(|| format!("RAM cannot be guarded: {error}"));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    const PAGES: u64 = 4096;

    fn word(ram: &GuestMemory, page: u64) -> u64 {
        ram.read_obj(GuestAddress(page * PAGE)).unwrap()
    }

    fn all(ram: &GuestMemory) -> PageSet {
        let mut pages = PageSet::of(ram);
        pages.insert_all();
        pages
    }

    /// Takes everything; gives the first word of each page.
    fn take_all(guard: &WriteGuard) -> Vec<Option<u64>> {
        let mut words = vec![None; index(PAGES)];
        while let Some(kept) = guard.take().unwrap() {
            for (page, bytes) in (kept.run.first..).zip(kept.copies.bytes().chunks(index(PAGE))) {
                let before =
                    words[index(page)].replace(u64::from_le_bytes(*bytes.first_chunk().unwrap()));
                assert_eq!(before, None, "page {page} is taken twice");
            }
        }
        words
    }

    fn guarded() -> Option<(GuestMemory, WriteGuard)> {
        let ram = GuestMemory::from_ranges(&[(GuestAddress(0), index(PAGES * PAGE))]).unwrap();
        for page in 0..PAGES {
            ram.write_obj(page + 1, GuestAddress(page * PAGE)).unwrap();
        }
        match WriteGuard::start(&ram) {
            Ok(guard) => Some((ram, guard)),
            Err(error) => {
                eprintln!("skipped: this host has no userfaultfd for us: {error}");
                None
            }
        }
    }

    #[test]
    fn pages_are_taken_as_they_were_at_the_switch_while_others_write_them() {
        let Some((ram, guard)) = guarded() else { return };
        guard.arm(&all(&ram)).unwrap();
        // Before the switch, writes go through.
        for page in (0..PAGES).step_by(7) {
            ram.write_obj(page + 1_000_000, GuestAddress(page * PAGE)).unwrap();
        }
        let mut again = PageSet::of(&ram);
        for first in (0..PAGES).step_by(7) {
            again.insert(PageRun { region: 0, first, count: 1 });
        }
        guard.arm(&again).unwrap();
        guard.switch();
        let stop = AtomicBool::new(false);
        let taken = thread::scope(|scope| {
            for seed in 0..2 {
                let (ram, stop) = (&ram, &stop);
                scope.spawn(move || {
                    let mut random = fastrand::Rng::with_seed(seed);
                    while !stop.load(Ordering::Relaxed) {
                        let page = random.u64(0..PAGES);
                        ram.write_obj(u64::MAX, GuestAddress(page * PAGE)).unwrap();
                    }
                });
            }
            let taken = take_all(&guard);
            stop.store(true, Ordering::Relaxed);
            taken
        });
        for (page, word) in (0..PAGES).zip(taken) {
            let expected = if page % 7 == 0 { page + 1_000_000 } else { page + 1 };
            assert_eq!(word, Some(expected), "page {page}");
        }
    }

    #[test]
    fn only_armed_pages_are_taken_and_a_dropped_guard_lets_all_writes_through() {
        let Some((ram, guard)) = guarded() else { return };
        let mut some = PageSet::of(&ram);
        some.insert(PageRun { region: 0, first: 10, count: 300 });
        guard.arm(&some).unwrap();
        guard.switch();
        let writer = {
            let ram = ram.clone();
            thread::spawn(move || {
                for page in 0..PAGES {
                    ram.write_obj(7_u64, GuestAddress(page * PAGE)).unwrap();
                }
            })
        };
        let first = guard.take().unwrap().unwrap();
        assert!((10..310).contains(&first.run.first));
        drop(guard);
        writer.join().unwrap();
        assert!((0..PAGES).all(|page| word(&ram, page) == 7));
    }

    #[test]
    fn pages_that_were_never_touched_are_kept_as_zeroes() {
        let ram = GuestMemory::from_ranges(&[(GuestAddress(0), index(PAGES * PAGE))]).unwrap();
        let Ok(guard) = WriteGuard::start(&ram) else { return };
        guard.arm(&all(&ram)).unwrap();
        guard.switch();
        for page in 0..PAGES {
            ram.write_obj(1_u64, GuestAddress(page * PAGE)).unwrap();
            if page == PAGES / 2 {
                break;
            }
        }
        assert!(take_all(&guard).iter().all(|word| *word == Some(0)));
    }
}
