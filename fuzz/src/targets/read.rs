//! Reads of an image of any contents, read-only.

use block::{Format, ReadBuf, Result};

use super::{Files, limit};
use crate::input::{self, Op};

/// Most operations of an input.
const MAX_OPS: usize = 64;

pub(super) fn run(input: &[u8]) {
    let (ops, image) = input::split_ops(input);
    let files = Files::unpack(image);
    let _limit = limit(&files.image);
    let Ok(image) = files.open(true) else { return };
    let mut bytes = vec![0; usize::from(u16::MAX) << 3];
    for op in ops.into_iter().take(MAX_OPS) {
        // Damage is told by an error; it must not end anything.
        let _ = perform(&image, op, &mut bytes);
    }
}

fn perform(image: &block::qcow2::Qcow2, op: Op, bytes: &mut [u8]) -> Result<()> {
    let (offset, len) = op.range(image.size());
    let part = &mut bytes[..usize::try_from(len).unwrap()];
    match op.kind % 4 {
        0 | 1 => {
            let middle = part.len() / 3;
            let (first, second) = part.split_at_mut(middle);
            image.read(offset, &[ReadBuf::new(first), ReadBuf::new(second)])?;
            twice(image, offset, part)
        }
        2 => status(image, offset, part),
        _ => {
            let snapshots = image.snapshots();
            let Some(snapshot) = snapshots.get(usize::from(op.small >> 2) % snapshots.len().max(1))
            else {
                return Ok(());
            };
            let state = image.open_vmstate(&snapshot.id)?;
            let (offset, _) = op.range(state.size());
            let extents = state.extents(offset, len)?;
            assert_eq!(extents.iter().map(|e| e.len).sum::<u64>(), len, "{extents:?}");
            state.read(offset, &[ReadBuf::new(part)])
        }
    }
}

/// Nothing changes, so the same is read again.
fn twice(image: &block::qcow2::Qcow2, offset: u64, first: &[u8]) -> Result<()> {
    let mut again = vec![0xaa; first.len()];
    image.read(offset, &[ReadBuf::new(&mut again)])?;
    assert!(again == first, "two reads at {offset:#x} differ");
    Ok(())
}

/// The status covers the start of the range, and what it calls zero is.
fn status(image: &block::qcow2::Qcow2, offset: u64, part: &mut [u8]) -> Result<()> {
    let extents = image.block_status(offset, part.len() as u64)?;
    image.read(offset, &[ReadBuf::new(part)])?;
    let mut rest = &*part;
    for extent in &extents {
        let len = usize::try_from(extent.len).unwrap();
        assert!(len > 0 && len <= rest.len(), "{extents:?}");
        let (this, after) = rest.split_at(len);
        assert!(!extent.zero || this.iter().all(|byte| *byte == 0), "{extents:?} at {offset:#x}");
        rest = after;
    }
    assert!(part.is_empty() || !extents.is_empty(), "no status at {offset:#x}");
    Ok(())
}
