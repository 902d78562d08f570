//! The `compress` filter: what is written through it is compressed by the image below.
//!
//! Compressed clusters are written whole: of one that is written in part, the rest is read first. Such
//! a write has its cluster alone; all others go in parallel. A range of clusters is held before a range
//! of the image below.

use std::ops::Range;
use std::sync::Arc;

use crate::format::Format;
use crate::iobuf;
use crate::num::to_usize;
use crate::qcow2::InFlight;
use crate::status::StatusExtent;
use crate::{Error, ReadBuf, Result, WriteBuf};

/// A filter over a format that can write compressed clusters (QEMU's `compress` driver).
pub struct CompressFilter {
    below: Arc<dyn Format>,
    cluster: u64,
    /// The clusters that writes are at: alone in one that is read and written back.
    in_flight: InFlight,
}

impl CompressFilter {
    /// Puts the filter over `below`.
    ///
    /// # Errors
    /// If `below` cannot write compressed clusters.
    pub fn new(below: Arc<dyn Format>) -> Result<Self> {
        let Some(cluster) = below.compressed_cluster() else {
            return Err(Error::NotSupported(format!(
                "Compression is not supported for this drive {}",
                below.driver()
            )));
        };
        Ok(Self { below, cluster, in_flight: InFlight::default() })
    }

    /// The part of a range that is made of whole clusters; the disk's end counts as one.
    fn whole(&self, offset: u64, len: u64) -> Range<u64> {
        let end = offset + len;
        let stop = if end == self.below.size() { end } else { end - end % self.cluster };
        let start = offset.next_multiple_of(self.cluster);
        start.min(stop)..stop
    }

    /// The clusters that a range touches. Requests may claim any range; the image below refuses it.
    fn clusters_of(&self, offset: u64, len: u64) -> Range<u64> {
        let end = offset.saturating_add(len);
        offset - offset % self.cluster..end.checked_next_multiple_of(self.cluster).unwrap_or(end)
    }

    /// Writes a part of one cluster: the cluster is read and written back.
    fn write_part(&self, offset: u64, bufs: &[WriteBuf<'_>]) -> Result<()> {
        let start = offset - offset % self.cluster;
        let _alone = self.in_flight.exclusive(start..start + self.cluster);
        let end = (start + self.cluster).min(self.below.size());
        let mut bytes = vec![0; to_usize(end.saturating_sub(start))];
        self.below.read(start, &[ReadBuf::new(&mut bytes)])?;
        iobuf::copy_out(bufs, &mut bytes[to_usize(offset - start)..]);
        self.below.write_compressed(start, &[WriteBuf::new(&bytes)])
    }
}

impl Format for CompressFilter {
    fn driver(&self) -> &'static str {
        "compress"
    }

    fn size(&self) -> u64 {
        self.below.size()
    }

    fn read_only(&self) -> bool {
        self.below.read_only()
    }

    fn read(&self, offset: u64, bufs: &[ReadBuf<'_>]) -> Result<()> {
        self.below.read(offset, bufs)
    }

    fn write(&self, offset: u64, bufs: &[WriteBuf<'_>]) -> Result<()> {
        let len = iobuf::total_len(bufs);
        let size = self.size();
        let end = offset.checked_add(len).filter(|end| *end <= size);
        let Some(end) = end else {
            return Err(Error::OutOfRange { offset, len, size });
        };
        let mut at = offset;
        while at < end {
            let whole = self.whole(at, end - at);
            let n = if whole.start == at && whole.end > at {
                whole.end - at
            } else {
                // Up to the end of this cluster only.
                (self.cluster - at % self.cluster).min(end - at)
            };
            let part = iobuf::slice_write(bufs, at - offset, n);
            if whole.start == at && whole.end > at {
                let _others = self.in_flight.shared(self.clusters_of(at, n));
                self.below.write_compressed(at, &part)?;
            } else {
                self.write_part(at, &part)?;
            }
            at += n;
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.below.flush()
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let _others = self.in_flight.shared(self.clusters_of(offset, len));
        self.below.discard(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        let _others = self.in_flight.shared(self.clusters_of(offset, len));
        self.below.write_zeroes(offset, len, unmap)
    }

    fn block_status(&self, offset: u64, len: u64) -> Result<Vec<StatusExtent>> {
        self.below.block_status(offset, len)
    }

    fn fast_zeroes(&self) -> bool {
        self.below.fast_zeroes()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::sync::{Mutex, PoisonError};
    use std::thread;

    use super::*;

    const CLUSTER: usize = 4096;

    /// Clusters in memory, whose reads wait until the test lets each go on.
    struct Slow {
        bytes: Mutex<Vec<u8>>,
        begun: Mutex<Sender<u64>>,
        go: Mutex<Receiver<()>>,
    }

    impl Slow {
        fn bytes(&self) -> std::sync::MutexGuard<'_, Vec<u8>> {
            self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
        }
    }

    impl Format for Slow {
        fn driver(&self) -> &'static str {
            "slow"
        }

        fn size(&self) -> u64 {
            4 * CLUSTER as u64
        }

        fn read_only(&self) -> bool {
            false
        }

        fn read(&self, offset: u64, bufs: &[ReadBuf<'_>]) -> Result<()> {
            iobuf::copy_in(bufs, &self.bytes()[to_usize(offset)..]);
            self.begun.lock().unwrap().send(offset).unwrap();
            self.go.lock().unwrap().recv().unwrap();
            Ok(())
        }

        fn write(&self, offset: u64, bufs: &[WriteBuf<'_>]) -> Result<()> {
            iobuf::copy_out(bufs, &mut self.bytes()[to_usize(offset)..]);
            Ok(())
        }

        fn compressed_cluster(&self) -> Option<u64> {
            Some(CLUSTER as u64)
        }

        fn write_compressed(&self, offset: u64, bufs: &[WriteBuf<'_>]) -> Result<()> {
            self.write(offset, bufs)
        }

        fn flush(&self) -> Result<()> {
            Ok(())
        }

        fn discard(&self, offset: u64, len: u64) -> Result<()> {
            self.write_zeroes(offset, len, true)
        }

        fn write_zeroes(&self, offset: u64, len: u64, _: bool) -> Result<()> {
            self.bytes()[to_usize(offset)..to_usize(offset + len)].fill(0);
            Ok(())
        }
    }

    #[test]
    fn a_write_of_a_part_holds_up_its_own_cluster_alone() {
        let (begun, begins) = channel();
        let (go, goes) = channel();
        let below = Arc::new(Slow {
            bytes: Mutex::new(vec![0; 4 * CLUSTER]),
            begun: Mutex::new(begun),
            go: Mutex::new(goes),
        });
        let filter = CompressFilter::new(below.clone()).unwrap();
        let write = |offset: usize, len: usize, byte: u8| {
            filter.write(offset as u64, &[WriteBuf::new(&vec![byte; len])]).unwrap();
        };
        thread::scope(|scope| {
            let part = scope.spawn(|| write(CLUSTER + 100, 100, 1));
            assert_eq!(begins.recv().unwrap(), CLUSTER as u64);
            // Others pass while it is under way.
            write(2 * CLUSTER, 2 * CLUSTER, 2);
            filter.write_zeroes(0, CLUSTER as u64, true).unwrap();
            filter.discard(3 * CLUSTER as u64, CLUSTER as u64).unwrap();
            // In its cluster the next waits, or its bytes would be lost to what was read before.
            let zero = scope.spawn(|| filter.write_zeroes(CLUSTER as u64, 50, true).unwrap());
            let next = scope.spawn(|| write(CLUSTER + 300, 100, 3));
            assert!(filter.in_flight.try_shared(CLUSTER as u64..CLUSTER as u64 + 1).is_none());
            assert!(begins.try_recv().is_err() && !zero.is_finished() && !next.is_finished());
            go.send(()).unwrap();
            part.join().unwrap();
            assert_eq!(begins.recv().unwrap(), CLUSTER as u64);
            go.send(()).unwrap();
        });
        let bytes = below.bytes();
        assert_eq!(bytes[CLUSTER + 100..CLUSTER + 200], [1; 100]);
        assert_eq!(bytes[CLUSTER + 300..CLUSTER + 400], [3; 100]);
        assert_eq!(bytes[2 * CLUSTER..3 * CLUSTER], [2; CLUSTER]);
        assert_eq!(bytes[3 * CLUSTER..], [0; CLUSTER]);
    }

    #[test]
    fn a_range_past_all_ends_is_refused_below_and_not_by_an_overflow() {
        let (begun, _begins) = channel();
        let (_go, goes) = channel();
        let (begun, go) = (Mutex::new(begun), Mutex::new(goes));
        let below = Slow { bytes: Mutex::new(vec![0; 4 * CLUSTER]), begun, go };
        let filter = CompressFilter::new(Arc::new(below)).unwrap();
        assert_eq!(filter.clusters_of(u64::MAX - 1, u64::MAX), u64::MAX - 4095..u64::MAX);
        assert!(filter.write(u64::MAX - 1, &[WriteBuf::new(&[1; 512])]).is_err());
    }
}
