//! Requests told from the tables in memory, without waiting: see [`crate::queue`].
//!
//! What is not in memory, held by another, or needs more than a look at the tables is left to the
//! methods that wait. No lock is held when this returns; the guest's range is, in `Located`.

use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, TryLockError};

use crate::queue::Located;

use super::layout::HostOffset;
use super::meta::Meta;
use super::read::{Source, map};
use super::write::plan;
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
        let Some(held) = self.in_flight.try_shared(self.clusters_of(guest, len)) else {
            out.conflict = true;
            return false;
        };
        let mut targets = Vec::new();
        {
            let Some(mut meta) = self.try_meta() else {
                return false;
            };
            let ready = meta.check_writable().is_ok()
                && !meta.needs_trim()
                && meta.tables_are_here(guest, len);
            if !ready || !matches!(plan(&mut meta, guest, len, &mut targets, false), Ok(true)) {
                return false;
            }
        }
        out.held.push(held);
        for target in &targets {
            out.push_storage(&self.data, target.host.0, target.len);
        }
        true
    }
}
