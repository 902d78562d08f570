//! What an image must hold, beside it.

use block::qcow2::Qcow2;
use block::{Format, ReadBuf};

/// Largest disk that is modelled.
const MAX_SIZE: u64 = 1 << 20;

struct Snapshot {
    id: String,
    disk: Vec<u8>,
    /// Where VM state was written, and what; `None` if it is not known.
    state: Option<(u64, Vec<u8>)>,
}

/// The disk's contents, and those of snapshots made meanwhile.
pub(super) struct Model {
    disk: Vec<u8>,
    snapshots: Vec<Snapshot>,
}

fn to_usize(value: u64) -> usize {
    usize::try_from(value).unwrap()
}

fn read_all(image: &Qcow2) -> block::Result<Vec<u8>> {
    let mut disk = vec![0; to_usize(image.size())];
    image.read(0, &[ReadBuf::new(&mut disk)])?;
    Ok(disk)
}

impl Model {
    /// Of an image as it is; `None` if it is too large, or cannot be read: the check does not
    /// unpack compressed clusters.
    pub(super) fn of(image: &Qcow2) -> Option<Self> {
        if image.size() > MAX_SIZE {
            return None;
        }
        Some(Self { disk: read_all(image).ok()?, snapshots: Vec::new() })
    }

    fn range(&mut self, offset: u64, len: u64) -> &mut [u8] {
        &mut self.disk[to_usize(offset)..to_usize(offset + len)]
    }

    pub(super) fn fill(&mut self, offset: u64, len: u64, value: u8) {
        self.range(offset, len).fill(value);
    }

    pub(super) fn expect(&mut self, offset: u64, bytes: &[u8]) {
        let wanted = self.range(offset, bytes.len() as u64);
        assert!(*wanted == *bytes, "{} bytes at {offset:#x} are not what was written", bytes.len());
    }

    /// What was discarded reads as zeroes or as before.
    pub(super) fn discarded(&mut self, image: &Qcow2, offset: u64, len: u64) {
        let mut now = vec![0; to_usize(len)];
        image.read(offset, &[ReadBuf::new(&mut now)]).expect("it could be discarded");
        let old = self.range(offset, len);
        let wrong = old.iter().zip(&now).position(|(old, now)| *now != 0 && now != old);
        assert_eq!(wrong, None, "discarding {len} bytes at {offset:#x} made other data of them");
        old.copy_from_slice(&now);
    }

    pub(super) fn created(&mut self, id: String, state: Option<(u64, Vec<u8>)>) {
        self.snapshots.push(Snapshot { id, disk: self.disk.clone(), state });
    }

    pub(super) fn deleted(&mut self, id: &str) {
        self.snapshots.retain(|snapshot| snapshot.id != id);
    }

    /// Back to a snapshot. One that was there before has a disk that is not known, of any size.
    pub(super) fn reverted(mut self, id: &str, image: &Qcow2) -> Option<Self> {
        self.disk = match self.snapshots.iter().find(|snapshot| snapshot.id == id) {
            Some(snapshot) => snapshot.disk.clone(),
            None if image.size() <= MAX_SIZE => read_all(image).ok()?,
            None => return None,
        };
        Some(self)
    }

    /// What a larger disk has more reads as zeroes.
    pub(super) fn resized(mut self, size: u64) -> Option<Self> {
        if size > MAX_SIZE {
            return None;
        }
        self.disk.resize(to_usize(size), 0);
        Some(self)
    }

    /// The disk is as it should be.
    pub(super) fn compare(&self, image: &Qcow2) {
        let disk = read_all(image).expect("a clean image is read");
        let wrong = disk.iter().zip(&self.disk).position(|(a, b)| a != b);
        assert_eq!((wrong, disk.len()), (None, self.disk.len()), "the disk differs");
    }

    /// And so are the snapshots; the image is as one of them afterwards.
    pub(super) fn compare_all(mut self, image: &Qcow2) {
        self.compare(image);
        for snapshot in std::mem::take(&mut self.snapshots) {
            if let Some((at, bytes)) = &snapshot.state {
                let state = image.open_vmstate(&snapshot.id).expect("it has VM state");
                let mut now = vec![0; bytes.len()];
                state.read(*at, &[ReadBuf::new(&mut now)]).expect("it was written");
                assert!(now == *bytes, "VM state of snapshot {} differs", snapshot.id);
            }
            let mut change = image.revert_snapshot(&snapshot.id).expect("it is there");
            match change.prepare() {
                // The refcounts' width is exhausted.
                Err(block::Error::NotSupported(_)) => continue,
                other => other.expect("nothing fails"),
            }
            change.publish().expect("nothing fails");
            change.finish().expect("nothing fails");
            drop(change);
            self.disk = snapshot.disk;
            self.compare(image);
        }
    }
}
