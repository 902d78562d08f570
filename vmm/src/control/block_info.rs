//! query-block.

use serde_json::{Value, json};

use super::Controller;
use crate::machine::devices::{VirtioSlot, anonymous_path};

impl Controller {
    /// The disks of the machine, in the order of their slots.
    pub(super) fn block_devices(&self) -> Result<Value, qmp::Error> {
        let disks = self.machine.devices().virtio().filter(|slot| slot.disk().is_some());
        disks.enumerate().map(|(index, slot)| block_device(index, slot)).collect()
    }
}

/// One entry of query-block. The backend of a node from `--blockdev` has no name, as in QEMU.
fn block_device(index: usize, slot: &VirtioSlot) -> Result<Value, qmp::Error> {
    let text = |error: String| qmp::Error::generic(error);
    let inserted = match slot.disk() {
        Some((node, _)) => {
            let info = node.info(false).map_err(|error| text(error.to_string()))?;
            serde_json::to_value(info).map_err(|error| text(error.to_string()))?
        }
        None => Value::Null,
    };
    let path = match &slot.spec.id {
        Some(id) => format!("/machine/peripheral/{id}/virtio-backend"),
        None => format!("{}/virtio-backend", anonymous_path(index)),
    };
    Ok(json!({
        "device": "",
        "qdev": path,
        "type": "unknown",
        "removable": false,
        "locked": false,
        "io-status": "ok",
        "inserted": inserted,
    }))
}
