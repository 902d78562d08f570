//! query-block.

use serde_json::{Value, json};

use super::disk_errors::io_status;
use super::{Controller, throttle};
use crate::machine::devices::VirtioSlot;

impl Controller {
    /// The disks of the machine, in the order of their slots.
    pub(super) fn block_devices(&self) -> Result<Value, qmp::Error> {
        let disks = self.machine.devices().virtio().filter(|slot| slot.disk().is_some());
        disks.map(block_device).collect()
    }
}

/// One entry of query-block. The backend of a node from `--blockdev` has no name, as in QEMU.
fn block_device(slot: &VirtioSlot) -> Result<Value, qmp::Error> {
    let text = |error: String| qmp::Error::generic(error);
    let mut inserted = match slot.disk() {
        Some((node, _)) => {
            let info = node.info(false).map_err(|error| text(error.to_string()))?;
            serde_json::to_value(info).map_err(|error| text(error.to_string()))?
        }
        None => Value::Null,
    };
    if let Some(throttle) = &slot.throttle {
        throttle::show(throttle, &mut inserted);
    }
    let mut device = json!({
        "device": "",
        "qdev": slot.path,
        "type": "unknown",
        "removable": false,
        "locked": false,
        "inserted": inserted,
    });
    if let Some(status) = slot.errors.as_deref().and_then(io_status) {
        device["io-status"] = json!(status);
    }
    Ok(device)
}
