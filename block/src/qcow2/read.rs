//! Reading: map under the metadata lock, transfer without it.

use std::sync::atomic::Ordering;

use crate::iobuf;
use crate::num::{to_u64, to_usize};
use crate::{Error, ReadBuf, Result};

use super::Qcow2;
use super::compressed::decompress;
use super::layout::{Geometry, HostOffset, Mapping, table_of};
use super::meta::Meta;

/// A part of a request whose bytes come from one place.
#[derive(Debug, Clone, Copy)]
pub(super) struct Extent {
    pub(crate) guest: u64,
    pub(crate) len: u64,
    pub(crate) source: Source,
}

/// Where the bytes of an extent come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    /// The image file at this offset.
    Host(HostOffset),
    /// Zeroes.
    Zero,
    /// The backing file at the guest offset, or zeroes without one.
    Backing,
    /// A compressed cluster at this host offset, of at most this many bytes.
    Compressed(HostOffset, u64),
}

impl Source {
    fn of(mapping: Mapping, in_cluster: u64) -> Self {
        match mapping {
            Mapping::Unallocated => Self::Backing,
            Mapping::Zero { .. } => Self::Zero,
            Mapping::Data { host, .. } => Self::Host(host + in_cluster),
            Mapping::Compressed { host, len } => Self::Compressed(host, len),
        }
    }

    /// Whether `next` goes on where this ends after `len` bytes.
    fn continues(self, len: u64, next: Self) -> bool {
        match (self, next) {
            (Self::Host(a), Self::Host(b)) => a + len == b,
            (Self::Zero, Self::Zero) | (Self::Backing, Self::Backing) => true,
            _ => false,
        }
    }
}

/// Maps a guest range; `l1` gives the L1 entry of an index.
pub(super) fn map(
    meta: &mut Meta,
    l1: impl Fn(&Meta, u64) -> u64,
    guest: u64,
    len: u64,
) -> Result<Vec<Extent>> {
    let geometry: Geometry = meta.geometry();
    let mut extents: Vec<Extent> = Vec::new();
    let mut at = guest;
    let end = guest + len;
    let push = |extents: &mut Vec<Extent>, guest, len, source| match extents.last_mut() {
        Some(last) if last.source.continues(last.len, source) => last.len += len,
        _ => extents.push(Extent { guest, len, source }),
    };
    while at < end {
        let entry = l1(meta, geometry.l1_index(at));
        if table_of(entry).is_none() {
            // No table: one step for all that it would map.
            let n = (geometry.l2_coverage() - at % geometry.l2_coverage()).min(end - at);
            push(&mut extents, at, n, Source::Backing);
            at += n;
            continue;
        }
        let cluster = meta.cluster_below(entry, at)?;
        let stop = (geometry.cluster_start(at) + geometry.cluster_size()).min(end);
        for index in geometry.touched(at, stop - at) {
            let n = (geometry.subcluster_size() - geometry.in_subcluster(at)).min(stop - at);
            let source = Source::of(cluster.at(index), geometry.in_cluster(at));
            // One compressed cluster is unpacked once, however many subclusters it would have.
            match extents.last_mut() {
                Some(last)
                    if matches!(source, Source::Compressed(..))
                        && last.source == source
                        && geometry.in_cluster(at) != 0 =>
                {
                    last.len += n;
                }
                _ => push(&mut extents, at, n, source),
            }
            at += n;
        }
    }
    Ok(extents)
}

impl Qcow2 {
    /// Maps a range of the active disk.
    pub(super) fn map_active(&self, guest: u64, len: u64) -> Result<Vec<Extent>> {
        let mut meta = self.meta_to_look();
        meta.trim_clean();
        let l1 = |meta: &Meta, index| meta.l1.get(to_usize(index)).copied().unwrap_or(0);
        let extents = map(&mut meta, l1, guest, len);
        meta.noted(extents)
    }

    /// Reads extents into the buffers, which start at the first extent. `bulk` bypasses the host's
    /// page cache where possible.
    pub(super) fn read_extents(
        &self,
        extents: &[Extent],
        bufs: &[ReadBuf<'_>],
        bulk: bool,
    ) -> Result<()> {
        let mut done = 0;
        for extent in extents {
            let part = iobuf::slice_read(bufs, done, extent.len);
            self.check_stored(extent.source, extent.len)?;
            match extent.source {
                Source::Zero => iobuf::fill_zero(&part),
                Source::Backing => self.read_backing(extent.guest, extent.len, &part)?,
                Source::Host(host) if bulk => self.data.read_bulk(host.0, &part)?,
                Source::Host(host) => self.data.read_at(host.0, &part)?,
                Source::Compressed(host, len) => {
                    let cluster = self.read_compressed(host, len)?;
                    let skip = to_usize(self.geometry.in_cluster(extent.guest));
                    iobuf::copy_in(&part, &cluster[skip..]);
                }
            }
            done += extent.len;
        }
        Ok(())
    }

    /// Refuses clusters that start past the end of the file, where a truncated image would read as
    /// zeroes. A file may end within a cluster.
    pub(super) fn check_stored(&self, source: Source, len: u64) -> Result<()> {
        let end = match source {
            Source::Host(host) => host + len,
            Source::Compressed(host, _) => host + 1,
            Source::Zero | Source::Backing => return Ok(()),
        };
        let last = self.geometry.cluster_start(end.0.saturating_sub(1));
        if last < self.known_len.load(Ordering::Acquire) {
            return Ok(());
        }
        let file_len = self.data.len()?;
        self.known_len.store(file_len, Ordering::Release);
        if last < file_len {
            return Ok(());
        }
        Err(Error::Corrupt {
            filename: self.data.name().to_owned(),
            reason: format!(
                "a data cluster is at {last:#x}, beyond the end of the file ({file_len} bytes); is the file truncated?"
            ),
        })
    }

    /// Reads from the backing file; zeroes past its end, or without one.
    fn read_backing(&self, guest: u64, len: u64, bufs: &[ReadBuf<'_>]) -> Result<()> {
        let Some(backing) = self.backing() else {
            iobuf::fill_zero(bufs);
            return Ok(());
        };
        let inside = backing.size().saturating_sub(guest).min(len);
        if inside > 0 {
            backing.read(guest, &iobuf::slice_read(bufs, 0, inside))?;
        }
        iobuf::fill_zero(&iobuf::slice_read(bufs, inside, len - inside));
        Ok(())
    }

    /// Reads and unpacks a compressed cluster. At most two clusters are read, whatever the entry
    /// says.
    pub(super) fn read_compressed(&self, host: HostOffset, len: u64) -> Result<Vec<u8>> {
        let size = self.geometry.cluster_size();
        let mut data = vec![0; to_usize(len.min(size * 2))];
        self.storage.read_at(host.0, &[ReadBuf::new(&mut data)])?;
        let mut out = vec![0; to_usize(size)];
        decompress(self.compression, &data, &mut out).map_err(|reason| Error::Corrupt {
            filename: self.storage.name().to_owned(),
            reason: format!("{reason} at host offset {host:#x}"),
        })?;
        debug_assert_eq!(to_u64(out.len()), size);
        Ok(out)
    }

    pub(super) fn read_disk(&self, offset: u64, bufs: &[ReadBuf<'_>]) -> Result<()> {
        let len = iobuf::total_len(bufs);
        self.check_range(offset, len)?;
        let mut done = 0;
        while done < len {
            let at = offset + done;
            let n = self.piece(at, len - done);
            let held = self.in_flight.shared(self.clusters_of(at, n));
            let extents = self.map_active(at, n)?;
            self.read_extents(&extents, &iobuf::slice_read(bufs, done, n), false)?;
            drop(held);
            done += n;
        }
        Ok(())
    }
}
