//! VM state in compressed clusters.
//!
//! Clusters are packed with no lock held, a piece at a time. Then bytes are taken for all that shrank,
//! so that what lies in a row is written in one request. What does not shrink is stored as it is, and so
//! is what is written in part, or where a plain own cluster is already.

use crate::iobuf;
use crate::num::{to_u64, to_usize};
use crate::qcow2::compressed::compress;
use crate::qcow2::layout::{HostOffset, Run, compressed_entry};
use crate::queue::AlignedBuf;
use crate::{Error, Result, WriteBuf};

use super::{Area, Slot};

/// Bytes that are packed before they are written, or one cluster.
const PIECE: u64 = 1 << 20;
/// How many checkpoints must be able to share a cluster of the file. Each has a reference for each of
/// the packed clusters in it, so these may only be so many.
const SHARERS: u64 = 1024;

/// Packed clusters of a piece.
#[derive(Default)]
struct Packed {
    bytes: Vec<u8>,
    /// Index of the cluster in the area, and how many of the bytes are its.
    clusters: Vec<(u64, usize)>,
}

/// A place taken for a packed cluster.
struct Placed {
    cluster: u64,
    host: HostOffset,
    len: u64,
    entry: u64,
    run: Run,
}

impl Area<'_> {
    /// Bytes that compression has spared.
    pub(crate) fn spared(&self) -> u64 {
        self.state().spared
    }

    /// Writes whole clusters that need a place, compressed. Says how many bytes it did: up to one
    /// that does not shrink, or a piece.
    pub(super) fn write_packed(&self, offset: u64, bufs: &[WriteBuf<'_>]) -> Result<u64> {
        let geometry = self.image.geometry;
        let size = geometry.cluster_size();
        let len = iobuf::total_len(bufs).min(PIECE.max(size));
        let mut plain = AlignedBuf::new(to_usize(size));
        let mut packed = Packed::default();
        let mut done = 0;
        while done < len {
            // One copy is what is packed: memory may change meanwhile.
            iobuf::copy_out(&iobuf::slice_write(bufs, done, size), &mut plain);
            let start = packed.bytes.len();
            packed.bytes.resize(start + plain.len() - 1, 0);
            let shrunk = compress(self.image.compression, &plain, &mut packed.bytes[start..]);
            packed.bytes.truncate(start + shrunk.unwrap_or(0));
            let Some(shrunk) = shrunk else { break };
            packed.clusters.push(((offset + done) >> geometry.cluster_bits, shrunk));
            done += size;
        }
        self.store(&packed)?;
        if done < len {
            let run = self.allocate(1)?;
            self.write_run(offset + done, run, &[WriteBuf::new(&plain)])?;
            done += size;
        }
        Ok(done)
    }

    /// Writes packed clusters and notes them; all, or what was taken is given back.
    fn store(&self, packed: &Packed) -> Result<()> {
        let mut placed = Vec::with_capacity(packed.clusters.len());
        let mut noted = 0;
        let stored =
            self.place(packed, &mut placed).and_then(|()| self.write_rows(packed, &placed));
        let result = stored.and_then(|()| {
            placed.iter().try_for_each(|one| {
                self.note_packed(one)?;
                noted += 1;
                Ok(())
            })
        });
        if result.is_err() {
            // Those that were noted are given back with the area.
            let runs: Vec<_> = placed[noted..].iter().map(|one| one.run).collect();
            self.image.meta().free_after_error(&runs);
        }
        result
    }

    fn place(&self, packed: &Packed, placed: &mut Vec<Placed>) -> Result<()> {
        let geometry = self.image.geometry;
        let most = (geometry.max_refcount() / SHARERS).max(1);
        let mut meta = self.image.meta();
        meta.check_writable()?;
        meta.trim()?;
        for &(cluster, len) in &packed.clusters {
            let len = to_u64(len);
            let (host, run) = meta.allocate_bytes(len, most)?;
            let Some(entry) = compressed_entry(host, len, geometry) else {
                meta.free_after_error(&[run]);
                return Err(Error::NotSupported(format!(
                    "Image '{}' is too large for a compressed cluster at {host:#x}",
                    self.image.storage.name()
                )));
            };
            placed.push(Placed { cluster, host, len, entry, run });
        }
        Ok(())
    }

    /// Writes what lies in a row at once.
    fn write_rows(&self, packed: &Packed, placed: &[Placed]) -> Result<()> {
        let mut rest = packed.bytes.as_slice();
        for row in placed.chunk_by(|a, b| a.host + a.len == b.host) {
            let len = row.iter().map(|one| to_usize(one.len)).sum();
            let (bytes, behind) = rest.split_at(len);
            rest = behind;
            if let Some(first) = row.first() {
                self.image.storage.write_at(first.host.0, &[WriteBuf::new(bytes)])?;
            }
        }
        Ok(())
    }

    fn note_packed(&self, one: &Placed) -> Result<()> {
        let geometry = self.image.geometry;
        let mut state = self.state();
        let old = self.slot(&mut state, one.cluster)?;
        let (table, index) = self.index_of(one.cluster);
        self.table_for_write(&mut state, table).set_packed(index, one.entry, geometry);
        state.written += 1;
        state.spared += geometry.cluster_size() - one.len;
        drop(state);
        self.let_go(&[old]);
        Ok(())
    }

    /// Gives back what clusters of this snapshot were before they got another place. What fails is
    /// leaked: the new place counts.
    pub(super) fn let_go(&self, old: &[Slot]) {
        let run = |slot: &Slot| match slot {
            Slot::Packed(packed) => Some(packed.run),
            // Written in place, or not this snapshot's.
            Slot::Own(_) | Slot::Empty | Slot::Inherited => None,
        };
        let runs: Vec<_> = old.iter().filter_map(run).collect();
        if !runs.is_empty() {
            self.image.meta().free_after_error(&runs);
        }
    }
}
