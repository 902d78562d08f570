//! The threads of a lazy load.

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Sender;
use std::thread;

use block::snapshot::VmStateRead;

use super::order::{Order, has_room};
use super::scratch::{Place, Scratch};
use super::units::{self, Claim, Piece};
use super::{Notice, Policy, Shared};
use crate::units::index;

/// Units read at a time when nobody waits for them: a block, so that it can be a huge page.
pub(super) const AHEAD: usize = index(units::BLOCK / units::UNIT);
/// No unit.
pub(super) const NOWHERE: usize = usize::MAX;
/// Threads that read ahead.
const READERS: usize = 2;

/// Serves faults until all is there or the service is to end.
pub(super) fn run(shared: &Shared, opened: &Sender<block::Result<()>>) {
    let opened_all = shared.source.open().and_then(|vmstate| {
        let scratch = Scratch::new().map_err(host_error)?;
        Ok((vmstate, scratch))
    });
    let (vmstate, scratch) = match opened_all {
        Ok(both) => both,
        Err(error) => {
            shared.end();
            // Whoever started the service waits for this.
            let _ = opened.send(Err(error));
            return;
        }
    };
    let _ = opened.send(Ok(()));
    thread::scope(|scope| {
        for n in 0..READERS {
            let reader = thread::Builder::new().name(format!("ram-ahead-{n}"));
            let started = Scratch::new().and_then(|scratch| {
                reader.spawn_scoped(scope, || shared.read_ahead(&*vmstate, scratch))
            });
            // Without them, pages come when they are needed.
            if let Err(error) = started {
                tracing::warn!("RAM is not read ahead: {error}");
            }
        }
        let mut faults =
            Faults { shared, vmstate: &*vmstate, scratch, busy: Vec::new(), touched: Order::new() };
        faults.serve();
        shared.source.orders.learn(&shared.source.base, &faults.touched);
        // Also where serving ended by an error of the host.
        shared.stop.store(true, Ordering::Release);
        shared.change(|state| state.stop = true);
    });
    drop(vmstate);
    shared.end();
}

impl Shared {
    /// Reads a claimed piece and puts it in place.
    pub(super) fn fill(
        &self,
        vmstate: &dyn VmStateRead,
        piece: &Piece,
        scratch: &mut Scratch,
    ) -> block::Result<()> {
        let mut place = Place::of(piece, &self.former, scratch);
        vmstate.read(piece.offset, &[place.buf()])?;
        place.put(&self.uffd, piece.host).map_err(host_error)?;
        if self.units.filled(piece) {
            self.wake();
        }
        Ok(())
    }

    /// What a thread could not read is anyone's again.
    pub(super) fn give_back(&self, piece: &Piece) {
        self.units.give_back(piece);
        drop(self.state());
        self.changed.notify_all();
        // Someone may wait for a unit of it.
        self.wake();
    }

    /// Reads what nobody asked for yet.
    fn read_ahead(&self, vmstate: &dyn VmStateRead, mut scratch: Scratch) {
        let mut from = 0;
        while let Some(attempt) = self.may_read_ahead() {
            match self.next_ahead(&mut from) {
                Some(piece) => self.fill_ahead(vmstate, &piece, &mut scratch, attempt),
                None if from == 0 => self.wait_for_missing(),
                // What others gave back.
                None => from = 0,
            }
        }
    }

    /// Claims what comes next: what was touched after earlier loads, what lies behind the last fault,
    /// then all the rest from unit `from` on.
    fn next_ahead(&self, from: &mut usize) -> Option<Piece> {
        let units = &self.units;
        while let Some(unit) = self.first.get(self.first_taken.fetch_add(1, Ordering::Relaxed)) {
            if let Some(piece) = units.claim_run(*unit, 1) {
                return Some(piece);
            }
        }
        let behind_fault = self.behind_fault.swap(NOWHERE, Ordering::Relaxed);
        if behind_fault < units.len()
            && let Some(piece) = units.claim_run(behind_fault, AHEAD)
        {
            return Some(piece);
        }
        let piece = (*from..units.len()).find_map(|unit| units.claim_run(unit, AHEAD))?;
        *from = piece.unit + piece.count;
        Some(piece)
    }

    fn fill_ahead(
        &self,
        vmstate: &dyn VmStateRead,
        piece: &Piece,
        scratch: &mut Scratch,
        attempt: u64,
    ) {
        if let Err(error) = self.fill(vmstate, piece, scratch) {
            tracing::warn!("RAM cannot be read ahead: {error}");
            let mut state = self.state();
            state.stalled |= state.retries == attempt;
            drop(state);
            self.give_back(piece);
        }
    }

    /// All that is left is being read by others: waits until they have, or have failed to.
    fn wait_for_missing(&self) {
        let state = self.state();
        // Who gives a unit back takes the lock in between that and telling it.
        let missing = (0..self.units.len()).any(|unit| self.units.is_missing(unit));
        if !missing && !state.stop && self.units.left() > 0 {
            drop(self.changed.wait(state).unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// Waits while there is a reason not to; none if there is nothing to be done any more. Gives the
    /// number of the attempt.
    fn may_read_ahead(&self) -> Option<u64> {
        let mut state = self.state();
        loop {
            if state.stop || self.units.left() == 0 {
                return None;
            }
            if state.policy == Policy::Hold && !state.stalled {
                return Some(state.retries);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Ends the watch. Who still waits finds zeroes.
    fn end(&self) {
        for &(start, len) in &self.ranges {
            if let Err(error) = self.uffd.unregister(start, len) {
                tracing::error!("guest RAM stays watched: {error}");
            }
        }
        self.state().over = true;
        self.changed.notify_all();
        if self.units.left() == 0 {
            (self.notify)(Notice::Complete);
        }
    }
}

/// The thread that serves faults.
struct Faults<'a> {
    shared: &'a Shared,
    vmstate: &'a dyn VmStateRead,
    scratch: Scratch,
    /// Units that someone waits for while another thread reads them.
    busy: Vec<usize>,
    /// Units that faulted and were not there.
    touched: Order,
}

impl Faults<'_> {
    fn serve(&mut self) {
        let shared = self.shared;
        let mut addresses = Vec::new();
        loop {
            // Before `state` is looked at, so that a change that comes meanwhile wakes again.
            let _ = shared.control.read();
            self.look_again();
            if shared.is_stopped() || shared.units.left() == 0 {
                return;
            }
            if let Err(error) = shared.uffd.faults(&mut addresses) {
                tracing::error!("page faults of the guest cannot be read: {error}");
                return;
            }
            if addresses.is_empty() {
                wait(shared.uffd.as_fd().as_raw_fd(), shared.control.as_raw_fd());
            }
            for address in addresses.drain(..) {
                match shared.units.at(address) {
                    Some(unit) => self.unit(unit),
                    None => tracing::error!("a page fault at {address:#x} is not of guest RAM"),
                }
            }
        }
    }

    /// Takes care of the units that somebody waits for and that were not to be had before.
    fn look_again(&mut self) {
        for unit in std::mem::take(&mut self.busy) {
            self.unit(unit);
        }
        let mut state = self.shared.state();
        let forfeit = state.policy == Policy::Forfeit;
        if forfeit || std::mem::take(&mut state.retry) {
            let failed = std::mem::take(&mut state.failed);
            drop(state);
            for unit in failed {
                self.unit(unit);
            }
        }
    }

    fn unit(&mut self, unit: usize) {
        let shared = self.shared;
        let piece = shared.units.piece(unit, 1);
        let attempt = shared.state().retries;
        let done = match shared.units.claim(unit) {
            Claim::Read => match self.read(&piece) {
                Ok(()) => Ok(()),
                Err(error) => return self.failed(&piece, &error, attempt),
            },
            Claim::Zero => {
                let zeroed = shared.uffd.zero(piece.host, piece.len);
                shared.units.zeroed(unit);
                zeroed
            }
            Claim::Present => shared.uffd.wake(piece.host, piece.len),
            Claim::Busy => {
                self.busy.push(unit);
                return;
            }
        };
        if let Err(error) = done {
            tracing::error!("a page fault of the guest cannot be answered: {error}");
        }
    }

    fn read(&mut self, piece: &Piece) -> block::Result<()> {
        self.shared.fill(self.vmstate, piece, &mut self.scratch)?;
        self.shared.behind_fault.store(piece.unit + piece.count, Ordering::Relaxed);
        if has_room(&self.touched) {
            self.touched.push(piece.unit);
        }
        Ok(())
    }

    fn failed(&mut self, piece: &Piece, error: &block::Error, attempt: u64) {
        let shared = self.shared;
        let text = error.to_string();
        let mut state = shared.state();
        state.reason.get_or_insert_with(|| text.clone());
        if state.policy == Policy::Forfeit {
            state.lost = true;
            drop(state);
            tracing::error!("a page of the guest is lost: {text}");
            (shared.notify)(Notice::Lost);
            if let Err(error) = shared.uffd.zero(piece.host, piece.len) {
                tracing::error!("a page fault of the guest cannot be answered: {error}");
            }
            if shared.units.filled(piece) {
                shared.wake();
            }
            return;
        }
        if state.retries != attempt {
            // What made it fail may be mended by now.
            drop(state);
            self.busy.push(piece.unit);
            return shared.give_back(piece);
        }
        state.failed.push(piece.unit);
        let tell = !std::mem::replace(&mut state.told, true);
        if tell {
            state.reason = Some(text.clone());
        }
        drop(state);
        shared.give_back(piece);
        if tell {
            (shared.notify)(Notice::Failing(text));
        }
    }
}

pub(super) fn host_error(source: std::io::Error) -> block::Error {
    let filename = "guest RAM".to_owned();
    block::Error::Io { operation: "filling", filename, offset: 0, source }
}

/// Waits until one of them is readable.
fn wait(one: RawFd, other: RawFd) {
    let poll = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let mut fds = [poll(one), poll(other)];
    // SAFETY: the array has two entries. An error, by a signal say, is looked at by the caller's
    // next round.
    unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) };
}
