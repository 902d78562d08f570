//! Everything that changes an image, on images of any contents.
//!
//! An image that the check finds clean must be so afterwards, and small ones are compared with what
//! a model of them says, snapshots and VM state included.

use std::sync::Arc;

use block::qcow2::Qcow2;
use block::qcow2::check::{Options, check};
use block::storage::Storage;
use block::{
    Error, Format, NewSnapshot, Preallocation, Progress, ReadBuf, Result, SnapshotChange, WriteBuf,
};

use super::model::Model;
use super::{Files, limit_of, trace};
use crate::input::{self, Op};
use crate::storage::Sparse;

/// Most operations of an input.
const MAX_OPS: usize = 48;

pub(super) fn run(input: &[u8]) {
    let (ops, image) = input::split_ops(input);
    let files = Files::unpack(image);
    let file = &files.image;
    // The check looks at a longer file.
    let _limit = limit_of(file, (6 << 20) + 2 * usize::try_from(AHEAD).unwrap());
    let clean = is_clean(file);
    let len = files.len();
    // Bitmaps are dropped by who does not know them.
    let mut whole = clean && !has_autoclear(file);
    let Ok(image) = files.open(false) else { return };
    let mut model = if clean { Model::of(&image) } else { None };
    let mut bytes = vec![0; usize::from(u16::MAX) << 3];
    for (index, op) in ops.into_iter().take(MAX_OPS).enumerate() {
        let fill = u8::try_from(index % 255).unwrap() + 1;
        let result = perform(&image, op, fill, &mut bytes, &mut model);
        trace(|| format!("{op:?} on {} bytes: {result:?}", image.size()));
        match result {
            Ok(()) => {}
            Err(Error::OutOfRange { .. } | Error::Invalid(_) | Error::NotSupported(_)) => {}
            Err(e) => {
                // Damage is told by an error; it must not end anything. Half of a request may be
                // there, so the model ends.
                whole = false;
                model = None;
                assert!(!clean || !is_damage(&e), "a clean image: {e}");
            }
        }
    }
    if let Some(model) = &model {
        model.compare(&image);
    }
    drop(image);
    if clean {
        still_clean(file, whole && files.len() <= len + AHEAD);
    }
    if let Some(model) = model {
        let image = files.open(false).expect("the image was clean");
        model.compare_all(&image);
    }
}

/// Bytes past the end of the file that are looked at.
const AHEAD: u64 = 8 << 20;

/// Whether there is nothing wrong with an image, counts of clusters past its end included: those
/// would come to light as it grows.
fn is_clean(file: &Arc<Sparse>) -> bool {
    let longer = file.copy();
    longer.put_len(file.len().expect("memory has a length") + AHEAD);
    check(&longer, &Options::default())
        .is_ok_and(|report| report.exit_code() == 0 && report.overlaps == 0)
}

/// Whether the image has autoclear bits (header bytes 88 to 96).
fn has_autoclear(file: &Sparse) -> bool {
    let mut bits = [0; 8];
    file.read_at(88, &[ReadBuf::new(&mut bits)]).expect("memory is read");
    bits != [0; 8]
}

/// Whether an error tells of damage that the check should have found.
fn is_damage(error: &Error) -> bool {
    matches!(error, Error::Corrupt { reason, .. }
        if !UNCHECKED.iter().any(|text| reason.contains(text)))
}

/// What the check, as QEMU's, does not look at: packed data, a snapshot's table against the size of its
/// disk, where in a data file a cluster is, and the flag of zero clusters in version 2.
const UNCHECKED: &[&str] = &[
    "compressed cluster",
    "the L1 table of snapshot",
    "external data file",
    "zero cluster in a version 2 image",
];

/// Errors of the storage may leak; nothing else may be wrong.
fn still_clean(file: &Arc<Sparse>, whole: bool) {
    let report = check(&**file, &Options::default()).expect("the image was clean");
    assert_eq!(report.corruptions + report.check_errors + report.overlaps, 0, "{report:#?}");
    assert!(!whole || report.leaks == 0, "{report:#?}");
}

fn perform(
    image: &Qcow2,
    op: Op,
    fill: u8,
    bytes: &mut [u8],
    model: &mut Option<Model>,
) -> Result<()> {
    let (offset, len) = op.range(image.size());
    let part = &mut bytes[..usize::try_from(len).unwrap()];
    match op.kind % 16 {
        0..5 => {
            part.fill(fill);
            image.write(offset, &[WriteBuf::new(part)])?;
            note(model, |model| model.fill(offset, len, fill));
        }
        5 => {
            image.read(offset, &[ReadBuf::new(part)])?;
            note(model, |model| model.expect(offset, part));
        }
        6 => {
            image.discard(offset, len)?;
            note(model, |model| model.discarded(image, offset, len));
        }
        7 => {
            image.write_zeroes(offset, len, op.small & 4 != 0)?;
            note(model, |model| model.fill(offset, len, 0));
        }
        8 => image.flush()?,
        9 | 10 => create(image, op, fill, bytes, model)?,
        kind @ 11..15 => {
            let Some(id) = nth(image, op) else { return Ok(()) };
            if kind < 13 {
                if steps(&mut *image.delete_snapshot(&id)?, op.small >> 4)? {
                    note(model, |model| model.deleted(&id));
                }
            } else if steps(&mut *image.revert_snapshot(&id)?, op.small >> 4)? {
                *model = model.take().and_then(|model| model.reverted(&id, image));
            }
        }
        _ if op.small & 0x80 != 0 => {
            image.resize(offset, Preallocation::Off, &Progress::default())?;
            *model = model.take().and_then(|model| model.resized(offset));
        }
        _ if op.small & 0x40 != 0 => compress(image, offset, fill, bytes, model)?,
        // A large range at once.
        _ => {
            image.write_zeroes(offset, len << 12, op.small & 4 != 0)?;
            note(model, |model| model.fill(offset, len << 12, 0));
        }
    }
    Ok(())
}

/// Writes the cluster at an offset compressed, up to the end of the disk.
fn compress(
    image: &Qcow2,
    offset: u64,
    fill: u8,
    bytes: &mut [u8],
    model: &mut Option<Model>,
) -> Result<()> {
    let Some(cluster) = image.compressed_cluster() else { return Ok(()) };
    let start = offset / cluster * cluster;
    let len = cluster.min(image.size().saturating_sub(start));
    let Some(part) = bytes.get_mut(..usize::try_from(len).unwrap()) else { return Ok(()) };
    part.fill(fill);
    image.write_compressed(start, &[WriteBuf::new(part)])?;
    note(model, |model| model.fill(start, len, fill));
    Ok(())
}

fn note(model: &mut Option<Model>, change: impl FnOnce(&mut Model)) {
    if let Some(model) = model {
        change(model);
    }
}

fn nth(image: &Qcow2, op: Op) -> Option<String> {
    let snapshots = image.snapshots();
    Some(snapshots.get(usize::from(op.small & 15) % snapshots.len().max(1))?.id.clone())
}

/// Takes a change to its end, or undoes it half-way; says whether it is done.
fn steps(change: &mut (impl SnapshotChange + ?Sized), how: u8) -> Result<bool> {
    if how == 1 {
        return change.rollback().map(|()| false);
    }
    change.prepare()?;
    if how == 2 {
        return change.rollback().map(|()| false);
    }
    change.publish()?;
    if how == 3 {
        return change.rollback().map(|()| false);
    }
    change.finish().map(|()| true)
}

fn create(
    image: &Qcow2,
    op: Op,
    fill: u8,
    bytes: &mut [u8],
    model: &mut Option<Model>,
) -> Result<()> {
    let new =
        NewSnapshot { tag: format!("tag{fill}"), date_sec: 1, date_nsec: 2, vm_clock_nsec: 3 };
    let mut state = None;
    let mut change = image.create_snapshot(&new)?;
    if op.small & 4 != 0 {
        let cluster = change.cluster_size();
        let len = (u64::from(op.len % 8) + 1) * cluster;
        if let Some(part) = bytes.get_mut(..usize::try_from(len).unwrap()) {
            part.fill(fill);
            let at = u64::from(op.offset % 64) * cluster;
            change.write_vmstate(at, &[WriteBuf::new(part)])?;
            change.set_vmstate_size(at + len);
            state = Some((at, part.to_vec()));
        }
    }
    let done = steps(&mut *change, op.small >> 4)?;
    drop(change);
    if done {
        let snapshots = image.snapshots();
        let id = snapshots.last().map(|s| s.id.clone()).expect("one was made");
        note(model, |model| model.created(id, state));
    }
    Ok(())
}
