//! Writing and zeroing pages of the VM-state area.

use crate::iobuf;
use crate::num::to_usize;
use crate::qcow2::layout::Run;
use crate::queue::AlignedBuf;
use crate::snapshot::VmStateRead;
use crate::{Error, ReadBuf, Result, WriteBuf};

use super::{Area, Slot};

/// File space is taken ahead of VM-state writes: as much as was written so far, within these bounds.
const RESERVE: std::ops::RangeInclusive<u64> = 4 << 20..=256 << 20;
/// Most bytes of VM state that one run of clusters is taken for.
const MAX_RUN: u64 = 256 << 20;
/// VM state is written in pages of so many bytes, or in clusters where these are smaller.
const PAGE: u64 = 4096;

impl Area<'_> {
    fn check_range(&self, offset: u64, len: u64) -> Result<()> {
        let unit = PAGE.min(self.image.geometry.cluster_size());
        if !offset.is_multiple_of(unit) || !len.is_multiple_of(unit) {
            return Err(Error::Invalid(format!(
                "VM state of {len} bytes at {offset:#x} is not made of whole units of {unit} bytes"
            )));
        }
        self.check_mappable(offset.saturating_add(len))
    }

    /// Writes whole pages; callable from many threads at once for ranges that share no cluster.
    pub(crate) fn write(&self, offset: u64, bufs: &[WriteBuf<'_>]) -> Result<()> {
        let len = iobuf::total_len(bufs);
        self.check_range(offset, len)?;
        self.write_range(offset, len, bufs)
    }

    fn write_range(&self, offset: u64, len: u64, bufs: &[WriteBuf<'_>]) -> Result<()> {
        let geometry = self.image.geometry;
        let size = geometry.cluster_size();
        let mut done = 0;
        while done < len {
            let (at, left) = (offset + done, len - done);
            let in_cluster = geometry.in_cluster(at);
            let (slot, many) = self.alike(at >> geometry.cluster_bits, in_cluster + left)?;
            let whole = (many << geometry.cluster_bits) - in_cluster;
            done += match slot {
                Slot::Own(host) => {
                    let n = whole.min(left);
                    let part = iobuf::slice_write(bufs, done, n);
                    self.image.storage.write_bulk(host.0 + in_cluster, &part)?;
                    n
                }
                _ if in_cluster == 0 && left >= size && self.compress => {
                    let n = whole.min(left - left % size);
                    self.write_packed(at, &iobuf::slice_write(bufs, done, n))?
                }
                _ if in_cluster == 0 && left >= size => {
                    let run = self.allocate(many.min(left >> geometry.cluster_bits))?;
                    let n = geometry.bytes_of(run.count);
                    self.write_run(at, run, &iobuf::slice_write(bufs, done, n))?;
                    n
                }
                slot => {
                    let n = (size - in_cluster).min(left);
                    self.write_part(at, n, slot, &iobuf::slice_write(bufs, done, n))?;
                    n
                }
            };
        }
        Ok(())
    }

    /// What a cluster is, and how many from it on can be written as it is at once: own ones in a row
    /// on the host, or such as need a place. `bytes` from the cluster's start on are asked for.
    fn alike(&self, cluster: u64, bytes: u64) -> Result<(Slot, u64)> {
        let geometry = self.image.geometry;
        let most = geometry.clusters(bytes.min(MAX_RUN.max(geometry.cluster_size())));
        let mut state = self.state();
        let first = self.slot(&mut state, cluster)?;
        let mut many = 1;
        while many < most {
            let next = self.slot(&mut state, cluster + many)?;
            let goes_on = match (first, next) {
                (Slot::Own(host), Slot::Own(next)) => next == host + geometry.bytes_of(many),
                (Slot::Own(_), _) | (_, Slot::Own(_)) => false,
                _ => true,
            };
            if !goes_on {
                break;
            }
            many += 1;
        }
        Ok((first, many))
    }

    pub(super) fn allocate(&self, want: u64) -> Result<Run> {
        let mut meta = self.image.meta();
        meta.check_writable()?;
        meta.trim()?;
        meta.allocate(want, false)
    }

    /// Writes a part of a cluster to a new place, with what the rest of it is.
    fn write_part(&self, at: u64, len: u64, slot: Slot, bufs: &[WriteBuf<'_>]) -> Result<()> {
        let geometry = self.image.geometry;
        let (start, in_cluster) = (geometry.cluster_start(at), geometry.in_cluster(at));
        let mut rest = AlignedBuf::new(to_usize(geometry.cluster_size()));
        if let Slot::Packed(packed) = slot {
            rest.copy_from_slice(&self.image.read_compressed(packed.host, packed.len)?);
        }
        if slot == Slot::Inherited
            && let Some(base) = &self.base
        {
            base.read(start, &[ReadBuf::new(&mut rest)])?;
            // The cluster may have anything past the recorded size.
            let end = base.size().saturating_sub(start).min(geometry.cluster_size());
            rest[to_usize(end)..].fill(0);
        }
        let mut all = Vec::with_capacity(bufs.len() + 2);
        all.push(WriteBuf::new(&rest[..to_usize(in_cluster)]));
        all.extend_from_slice(bufs);
        all.push(WriteBuf::new(&rest[to_usize(in_cluster + len)..]));
        all.retain(|buf| !buf.is_empty());
        self.write_run(start, self.allocate(1)?, &all)
    }

    /// Writes whole clusters to a run that was taken for them, which is given back on failure.
    pub(super) fn write_run(&self, at: u64, run: Run, bufs: &[WriteBuf<'_>]) -> Result<()> {
        let geometry = self.image.geometry;
        let start = geometry.offset_of(run.first).0;
        let written = self
            .reserve(run)
            .and_then(|()| self.image.storage.write_bulk(start, bufs))
            .and_then(|()| self.note(at >> geometry.cluster_bits, run));
        if written.is_err() {
            self.image.meta().free_after_error(&[run]);
        }
        written
    }

    fn reserve(&self, run: Run) -> Result<()> {
        let geometry = self.image.geometry;
        let (start, end) = (geometry.offset_of(run.first).0, geometry.offset_of(run.end()).0);
        let storage = &self.image.storage;
        let mut state = self.state();
        if end <= storage.len()? {
            // In the place of something freed: what is around it is another's, or is free and
            // shall take no space.
        } else if end > state.reserved {
            let more = geometry.bytes_of(state.written).clamp(*RESERVE.start(), *RESERVE.end());
            // More than is needed, so that parallel writes find the space there; only what is needed
            // where the disk is nearly full.
            state.reserved = if storage.reserve(start, end - start + more).is_ok() {
                end + more
            } else {
                storage.reserve(start, end - start)?;
                end
            };
        }
        Ok(())
    }

    /// Notes where clusters are, from `cluster` on.
    fn note(&self, cluster: u64, run: Run) -> Result<()> {
        let geometry = self.image.geometry;
        let mut old = Vec::new();
        let mut state = self.state();
        for n in 0..run.count {
            // Also has the table be here.
            old.push(self.slot(&mut state, cluster + n)?);
            let (table, index) = self.index_of(cluster + n);
            let table = self.table_for_write(&mut state, table);
            table.set(index, Some(geometry.offset_of(run.first + n)), geometry);
        }
        state.written += run.count;
        drop(state);
        self.let_go(&old);
        Ok(())
    }

    /// Makes whole pages read as zeroes; whole clusters of them take no space.
    pub(crate) fn zero(&self, offset: u64, len: u64) -> Result<()> {
        self.check_range(offset, len)?;
        self.zero_range(offset, len)
    }

    pub(super) fn zero_range(&self, offset: u64, len: u64) -> Result<()> {
        let geometry = self.image.geometry;
        let size = geometry.cluster_size();
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let n = (size - geometry.in_cluster(at)).min(end - at);
            let cluster = at >> geometry.cluster_bits;
            if n == size {
                self.clear(cluster)?;
            } else {
                let slot = self.slot(&mut self.state(), cluster)?;
                if slot != Slot::Empty {
                    let zeroes = AlignedBuf::new(to_usize(n));
                    self.write_range(at, n, &[WriteBuf::new(&zeroes)])?;
                }
            }
            at += n;
        }
        Ok(())
    }

    /// Empties a cluster.
    fn clear(&self, cluster: u64) -> Result<()> {
        let geometry = self.image.geometry;
        let mut state = self.state();
        let (table, index) = self.index_of(cluster);
        let slot = self.slot(&mut state, cluster)?;
        // An empty cluster may have an entry, too: a place that is reserved for it.
        if let Some(table) = state.tables.get_mut(&table) {
            table.set(index, None, geometry);
        }
        match slot {
            Slot::Own(host) => {
                state.written -= 1;
                let mut meta = self.image.meta();
                let run = meta.cluster_run(host);
                meta.free(run)
            }
            Slot::Packed(packed) => {
                state.written -= 1;
                self.image.meta().free(packed.run)
            }
            Slot::Empty | Slot::Inherited => Ok(()),
        }
    }
}
