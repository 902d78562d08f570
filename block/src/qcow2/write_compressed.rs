//! Writing compressed clusters, several of which may share host clusters.
//!
//! **Order.** A cluster is packed with no lock held. Bytes for it are taken (in memory, a reference
//! to each host cluster they touch), the packed data is written, then the L2 entry changes in
//! memory; it reaches the disk by [`Meta::sync`], after data and counts. What the entry referred to
//! before is given back after that. A failure gives the bytes' references back.

use crate::iobuf;
use crate::num::{to_u64, to_usize};
use crate::{Error, Result, WriteBuf};

use super::Qcow2;
use super::compressed::compress;
use super::header::Compression;
use super::layout::{HostOffset, Run, compressed_entry};
use super::meta::Meta;

impl Qcow2 {
    /// Compresses whole clusters, or what is left of the disk at its end. One that does not shrink
    /// is stored as it is. Unlike QEMU's, a cluster may be written again: its old place is freed.
    pub(super) fn write_packed(&self, offset: u64, bufs: &[WriteBuf<'_>]) -> Result<()> {
        let len = iobuf::total_len(bufs);
        self.check_range(offset, len)?;
        self.check_packable(offset, len)?;
        let size = self.geometry.cluster_size();
        let mut plain = vec![0; to_usize(size)];
        let mut packed = vec![0; to_usize(size) - 1];
        let mut done = 0;
        while done < len {
            let n = size.min(len - done);
            let part = iobuf::slice_write(bufs, done, n);
            plain[to_usize(n)..].fill(0);
            // The guest may change its memory meanwhile: one copy is what is packed or stored.
            iobuf::copy_out(&part, &mut plain[..to_usize(n)]);
            let shrunk = compress(self.compression, &plain, &mut packed);
            let guest = offset + done;
            let _held = self.in_flight.exclusive(self.clusters_of(guest, n));
            let stored = match shrunk {
                Some(len) => self.store_packed(guest, &packed[..len])?,
                None => false,
            };
            if !stored {
                let plain = WriteBuf::new(&plain[..to_usize(n)]);
                self.write_allocating(guest, n, &[plain])?;
            }
            done += n;
        }
        Ok(())
    }

    /// Checks that what is compressed from now on may be by this method: an image has one for all.
    pub(super) fn check_compresses_with(&self, method: Compression) -> Result<()> {
        if self.compression == method {
            return Ok(());
        }
        Err(Error::NotSupported(format!(
            "Image '{name}' compresses with {own}, not with {method}: ask for {own}, or use an image that \
             was made with compression_type={method}",
            name = self.storage.name(),
            own = self.compression
        )))
    }

    fn check_packable(&self, offset: u64, len: u64) -> Result<()> {
        if self.geometry.external {
            return Err(Error::NotSupported(format!(
                "Image '{}' has an external data file: compressed clusters are not possible with it",
                self.storage.name()
            )));
        }
        let end = offset + len;
        if self.geometry.in_cluster(offset) != 0
            || (self.geometry.in_cluster(end) != 0 && end != self.disk_size())
        {
            return Err(Error::Invalid(format!(
                "compressed write of {len} bytes at {offset:#x} is not made of whole clusters of {} bytes",
                self.geometry.cluster_size()
            )));
        }
        Ok(())
    }

    /// Stores a packed cluster, whose guest cluster the caller holds alone. Says no if there is no
    /// place that an entry for it could name.
    fn store_packed(&self, guest: u64, data: &[u8]) -> Result<bool> {
        let geometry = self.geometry;
        let len = to_u64(data.len());
        let (host, run) = {
            let mut meta = self.meta();
            meta.check_writable()?;
            meta.trim()?;
            // The table must be there (and ours) before data is written, so that lack of space shows.
            meta.l2_for_write(geometry.l1_index(guest))?;
            let most = geometry.max_refcount();
            meta.allocate_bytes(len, most)?
        };
        let result = match compressed_entry(host, len, geometry) {
            Some(entry) => self
                .storage
                .write_at(host.0, &[WriteBuf::new(data)])
                .and_then(|()| point_to(&mut self.meta(), guest, entry))
                .map(|()| true),
            None => Ok(false),
        };
        if !matches!(result, Ok(true)) {
            self.meta().free_after_error(&[run]);
        }
        result
    }
}

/// Changes the entry of a cluster to a compressed one.
fn point_to(meta: &mut Meta, guest: u64, entry: u64) -> Result<()> {
    let geometry = meta.geometry();
    let old = meta.cluster(guest)?;
    let table = meta.l2_for_write(geometry.l1_index(guest))?;
    table.set_both(geometry.l2_index(guest), (entry, 0));
    if let Some(run) = old.mapping.run(geometry) {
        meta.defer_free(run);
    }
    Ok(())
}

impl Meta {
    /// Takes `len` bytes, fewer than a cluster: behind those taken last if they fit that cluster, or
    /// go on in the next. Gives the host clusters that they touch; a reference to each is taken, and a
    /// cluster that has `most` already is left alone.
    pub(super) fn allocate_bytes(&mut self, len: u64, most: u64) -> Result<(HostOffset, Run)> {
        let geometry = self.geometry();
        let mut shared = None;
        if let Some(at) = self.packed_end {
            let cluster = geometry.cluster_of(at);
            // Freed, or with as many users as there may be.
            let users = self.refcounts.get(cluster)?;
            shared = (users > 0 && users < most).then_some((at, Run::one(cluster)));
        }
        let left = |at: HostOffset| geometry.cluster_size() - geometry.in_cluster(at.0);
        let (host, run) = match shared {
            Some((at, run)) if len <= left(at) => {
                self.add_refs(run)?;
                (at, run)
            }
            other => {
                let new = self.allocate(1, true)?;
                match other {
                    Some((at, run)) if run.end() == new.first => {
                        if let Err(e) = self.add_refs(run) {
                            self.free_after_error(&[new]);
                            return Err(e);
                        }
                        (at, Run { first: run.first, count: 2 })
                    }
                    _ => (geometry.offset_of(new.first), new),
                }
            }
        };
        let end = host + len;
        self.packed_end = (geometry.in_cluster(end.0) != 0).then_some(end);
        Ok((host, run))
    }
}
