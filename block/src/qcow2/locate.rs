//! Requests told from the tables in memory, without waiting: see [`crate::queue`].
//!
//! What is not in memory, held by another, or needs more than a look at the tables is left to the
//! methods that wait. No lock is held when this returns; the guest's range is, in `Located`.

use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, TryLockError};

use crate::Result;
use crate::queue::{Extent, Located, Place};

use super::layout::HostOffset;
use super::meta::Meta;
use super::read::{Source, map};
use super::write::{Target, commit, plan};
use super::{PIECE, Qcow2};

impl Qcow2 {
    /// The metadata, unless another has it.
    fn try_meta(&self) -> Option<MutexGuard<'_, Meta>> {
        match self.meta.try_lock() {
            Ok(meta) => Some(meta),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Whether a range of a file surely starts before the file's end.
    fn is_stored(&self, host: HostOffset, len: u64) -> bool {
        let last = self.geometry.cluster_start((host.0 + len).saturating_sub(1));
        last < self.known_len.load(Ordering::Acquire)
    }

    pub(super) fn locate_disk_read(&self, guest: u64, len: u64, out: &mut Located) -> bool {
        if len > PIECE || self.check_range(guest, len).is_err() {
            return false;
        }
        let Some(held) = self.in_flight.try_shared(self.clusters_of(guest, len)) else {
            out.conflict = true;
            return false;
        };
        let extents = {
            let Some(mut meta) = self.try_meta() else {
                return false;
            };
            if !meta.tables_are_here(guest, len) {
                return false;
            }
            match map(&mut meta, Meta::active_l1, guest, len) {
                Ok(extents) => extents,
                // Found again, and told, by the method that waits.
                Err(_) => return false,
            }
        };
        out.held.push(held);
        for extent in extents {
            match extent.source {
                Source::Zero => out.push_zero(extent.len),
                Source::Host(host) if self.is_stored(host, extent.len) => {
                    out.push_storage(&self.data, host.0, extent.len);
                }
                Source::Backing => {
                    let Some(backing) = &self.backing else {
                        out.push_zero(extent.len);
                        continue;
                    };
                    let inside = backing.size().saturating_sub(extent.guest).min(extent.len);
                    if inside > 0 && !backing.locate_read(extent.guest, inside, out) {
                        return false;
                    }
                    out.push_zero(extent.len - inside);
                }
                _ => return false,
            }
        }
        true
    }

    pub(super) fn locate_disk_write(&self, guest: u64, len: u64, out: &mut Located) -> bool {
        if len > PIECE || self.check_range(guest, len).is_err() {
            return false;
        }
        self.locate_in_place(guest, len, out).unwrap_or_else(|| self.locate_new(guest, len, out))
    }

    /// Locates a write to clusters that are ours alone; `None` if some are not.
    fn locate_in_place(&self, guest: u64, len: u64, out: &mut Located) -> Option<bool> {
        let Some(held) = self.in_flight.try_shared(self.clusters_of(guest, len)) else {
            out.conflict = true;
            return Some(false);
        };
        let mut targets = Vec::new();
        {
            let Some(mut meta) = self.try_meta() else {
                return Some(false);
            };
            if !self.can_plan(&meta, guest, len) {
                return Some(false);
            }
            match plan(&mut meta, guest, len, &mut targets, false) {
                Ok(true) => {}
                Ok(false) => return None,
                Err(_) => return Some(false),
            }
        }
        out.held.push(held);
        for target in &targets {
            out.push_storage(&self.data, target.host.0, target.len);
        }
        Some(true)
    }

    /// Locates a write that needs new places, where nothing has to be copied to them.
    ///
    /// Order, as in [`Qcow2::write_allocating`]: clusters are taken in memory; the request's bytes
    /// are written, and zeroes around them; [`Qcow2::finish_disk_write`] changes the L2 entries in
    /// memory, which reach the disk after the data. In a cluster past the end of the file the
    /// zeroes are there already: the file grows over it with a hole. That also holds after a power
    /// cut, because the entry comes to the disk after a flush of data and length; and a cluster that
    /// a cut left behind within the file is no longer past its end, so it gets its zeroes.
    fn locate_new(&self, guest: u64, len: u64, out: &mut Located) -> bool {
        let whole = self.clusters_of(guest, len);
        let Some(held) = self.in_flight.try_exclusive(whole.clone()) else {
            out.conflict = true;
            return false;
        };
        let Some(mut meta) = self.try_meta() else {
            return false;
        };
        let clusters = self.geometry.clusters(whole.end - whole.start);
        let ready = self.can_plan(&meta, guest, len)
            // An L2 table may be needed beside each cluster.
            && (self.geometry.external || meta.refcounts.has_room_here(2 * clusters))
            && self.holds_zeroes(&mut meta, whole.start, guest - whole.start)
            && self.holds_zeroes(&mut meta, guest + len, whole.end - (guest + len));
        let Ok(file_len) = self.data.len() else {
            return false;
        };
        if !ready {
            return false;
        }
        if !matches!(plan(&mut meta, guest, len, &mut out.targets, true), Ok(true)) {
            drop(meta);
            self.give_back(&out.targets);
            return false;
        }
        drop(meta);
        out.held.push(held);
        for target in &out.targets {
            let hole =
                self.data.zero_past_end() && self.geometry.cluster_start(target.host.0) >= file_len;
            let (before, behind) = if hole { (0, 0) } else { (target.head, target.tail) };
            let (storage, offset) = (self.data.clone(), target.host.0);
            let place = Place::Storage { storage, offset, before, behind };
            out.extents.push(Extent { len: target.len, place });
        }
        true
    }

    /// Whether a write may look at the tables without waiting for the disk.
    fn can_plan(&self, meta: &Meta, guest: u64, len: u64) -> bool {
        meta.check_writable().is_ok() && !meta.needs_trim() && meta.tables_are_here(guest, len)
    }

    /// Whether a range reads as zeroes without a look at data. It may go past the end of the disk.
    fn holds_zeroes(&self, meta: &mut Meta, guest: u64, len: u64) -> bool {
        let backing = self.backing.as_ref().map_or(0, |backing| backing.size());
        let extents = match map(meta, Meta::active_l1, guest, len) {
            Ok(extents) => extents,
            Err(_) => return false,
        };
        extents.iter().all(|extent| match extent.source {
            Source::Zero => true,
            Source::Backing => backing <= extent.guest,
            _ => false,
        })
    }

    /// Puts the new places of a located write into the tables, or gives them back.
    pub(super) fn finish_disk_write(
        &self,
        targets: &[Target],
        written: bool,
        wait: bool,
    ) -> Option<Result<()>> {
        let mut committed = 0;
        let mut result = Ok(());
        if written {
            let mut meta = if wait { self.meta() } else { self.try_meta()? };
            for target in targets {
                result = commit(&mut meta, target);
                if result.is_err() {
                    break;
                }
                committed += 1;
            }
        } else if !wait {
            // Giving back may have to read refcounts.
            return None;
        }
        self.give_back(&targets[committed..]);
        Some(result)
    }
}
