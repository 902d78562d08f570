//! Any bytes as an image: opened both ways, and everything asked that can be asked without I/O by
//! a guest.

use block::{Format, Result};

use super::{Files, limit};

pub(super) fn run(input: &[u8]) {
    let files = Files::unpack(input);
    let _limit = limit(&files.image);
    for read_only in [true, false] {
        // A refusal is as good as an image.
        let _ = look(&files, read_only);
    }
}

fn look(files: &Files, read_only: bool) -> Result<()> {
    let image = files.open(read_only)?;
    let info = image.info();
    assert!(info.cluster_size.is_power_of_two(), "{info:?}");
    assert_eq!(image.read_only(), read_only);
    let _ = image.size();
    for snapshot in image.snapshots() {
        if let Ok(state) = image.open_vmstate(&snapshot.id) {
            let _ = state.extents(0, state.size().min(1 << 20));
        }
    }
    image.block_status(0, image.size())?;
    image.flush()
}
