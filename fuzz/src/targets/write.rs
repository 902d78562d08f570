//! Everything that changes an image, on images of any contents.

use block::qcow2::Qcow2;
use block::{Format, NewSnapshot, ReadBuf, Result, SnapshotChange, WriteBuf};

use super::{limit, open};
use crate::input::{self, Op};

/// Most operations of an input.
const MAX_OPS: usize = 48;

pub(super) fn run(input: &[u8]) {
    let (ops, image) = input::split_ops(input);
    let file = input::unpack(image);
    let _limit = limit(&file);
    let Ok(image) = open(&file, false) else { return };
    let mut bytes = vec![0; usize::from(u16::MAX) << 3];
    for (index, op) in ops.into_iter().take(MAX_OPS).enumerate() {
        let fill = u8::try_from(index % 255).unwrap() + 1;
        let _ = perform(&image, op, fill, &mut bytes);
    }
    drop(image);
    // Whatever became of it, it can be opened or is refused.
    if let Ok(image) = open(&file, true) {
        let len = image.size().min(64 << 10);
        let _ = image.read(0, &[ReadBuf::new(&mut bytes[..usize::try_from(len).unwrap()])]);
    }
}

fn perform(image: &Qcow2, op: Op, fill: u8, bytes: &mut [u8]) -> Result<()> {
    let (offset, len) = op.range(image.size());
    let part = &mut bytes[..usize::try_from(len).unwrap()];
    match op.kind % 16 {
        0..5 => {
            part.fill(fill);
            image.write(offset, &[WriteBuf::new(part)])
        }
        5 => image.read(offset, &[ReadBuf::new(part)]),
        6 => image.discard(offset, len),
        7 => image.write_zeroes(offset, len, op.small & 4 != 0),
        8 => image.flush(),
        9 | 10 => create(image, op, fill, bytes),
        11 | 12 => match nth(image, op) {
            Some(id) => steps(&mut *image.delete_snapshot(&id)?, op.small >> 4),
            None => Ok(()),
        },
        13 | 14 => match nth(image, op) {
            Some(id) => steps(&mut *image.revert_snapshot(&id)?, op.small >> 4),
            None => Ok(()),
        },
        // A large range at once.
        _ => image.write_zeroes(offset, len << 12, op.small & 4 != 0),
    }
}

fn nth(image: &Qcow2, op: Op) -> Option<String> {
    let snapshots = image.snapshots();
    Some(snapshots.get(usize::from(op.small & 15) % snapshots.len().max(1))?.id.clone())
}

/// Takes a change to its end, or undoes it half-way.
fn steps(change: &mut (impl SnapshotChange + ?Sized), how: u8) -> Result<()> {
    if how == 1 {
        return change.rollback();
    }
    change.prepare()?;
    if how == 2 {
        return change.rollback();
    }
    change.publish()?;
    if how == 3 {
        return change.rollback();
    }
    change.finish()
}

fn create(image: &Qcow2, op: Op, fill: u8, bytes: &mut [u8]) -> Result<()> {
    let new =
        NewSnapshot { tag: format!("tag{fill}"), date_sec: 1, date_nsec: 2, vm_clock_nsec: 3 };
    let mut change = image.create_snapshot(&new)?;
    if op.small & 4 != 0 {
        let cluster = change.cluster_size();
        let clusters = u64::from(op.len % 8) + 1;
        if let Some(part) = bytes.get_mut(..usize::try_from(clusters * cluster).unwrap()) {
            part.fill(fill);
            let at = u64::from(op.offset % 64) * cluster;
            change.write_vmstate(at, &[WriteBuf::new(part)])?;
            change.set_vmstate_size(at + clusters * cluster);
        }
    }
    steps(&mut *change, op.small >> 4)
}
