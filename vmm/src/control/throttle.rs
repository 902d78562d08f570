//! block_set_io_throttle: limits of disks, and groups of disks that share them. See `docs/devices.md`.

use std::sync::Arc;

use block::throttle::{Kind, Limits, Rate, ThrottleGroup, monotonic};
use devices::virtio::block::IoThrottle;
use qmp::schema::{IoLimits, IoThrottleArguments};
use serde_json::{Value, json};

use super::Controller;
use crate::machine::devices::VirtioSlot;

impl Controller {
    /// `block_set_io_throttle`
    ///
    /// # Errors
    /// With QEMU's texts.
    pub(super) fn set_io_throttle(
        &mut self,
        arguments: &IoThrottleArguments,
    ) -> Result<(), qmp::Error> {
        let (slot, throttle) = self.throttled_disk(arguments)?;
        let limits = limits(&arguments.limits);
        limits.check().map_err(|error| qmp::Error::generic(error.to_string()))?;
        if !limits.any() {
            throttle.set_group(None);
            return look(slot);
        }
        let current = throttle.group();
        let name = match (&arguments.limits.group, &current) {
            (Some(name), _) => name.clone(),
            (None, Some(group)) => group.name().to_owned(),
            (None, None) => slot.path.clone(),
        };
        let group = self
            .group(&name)
            .unwrap_or_else(|| Arc::new(ThrottleGroup::new(&name, limits, monotonic())));
        group.set_limits(limits);
        if !current.is_some_and(|current| Arc::ptr_eq(&current, &group)) {
            throttle.set_group(Some(Arc::clone(&group)));
        }
        // Who waits in the group, or in the one that the disk has left, has another time to wait.
        self.machine.devices().virtio().filter(|slot| slot.throttle.is_some()).try_for_each(look)
    }

    fn throttled_disk(
        &self,
        arguments: &IoThrottleArguments,
    ) -> Result<(&VirtioSlot, &IoThrottle), qmp::Error> {
        let id = match (&arguments.device, &arguments.id) {
            (None, Some(id)) => id,
            // No backend has a name.
            (Some(device), None) => return Err(not_found(device)),
            _ => {
                return Err(qmp::Error::generic("Need exactly one of 'device' and 'id'"));
            }
        };
        let named = self.machine.devices().virtio().find(|slot| {
            // As in QEMU the path is good for one that has an id, too.
            slot.path == *id || slot.qom_path == *id
        });
        let slot = named.ok_or_else(|| not_found(id))?;
        match &slot.throttle {
            Some(throttle) => Ok((slot, throttle)),
            None => Err(not_found(id)),
        }
    }

    /// The group of that name: one that a disk is in.
    fn group(&self, name: &str) -> Option<Arc<ThrottleGroup>> {
        let groups = self.machine.devices().virtio().filter_map(|s| s.throttle.as_ref()?.group());
        groups.into_iter().find(|group| group.name() == name)
    }
}

fn not_found(device: &str) -> qmp::Error {
    qmp::Error::new(qmp::ErrorClass::DeviceNotFound, format!("Device '{device}' not found"))
}

fn look(slot: &VirtioSlot) -> Result<(), qmp::Error> {
    slot.look().map_err(|error| qmp::Error::generic(error.to_string()))
}

/// The limits that are asked for. Negative numbers are out of range as QEMU has it: far too large.
fn limits(arguments: &IoLimits) -> Limits {
    let rate = |average: i64, max: Option<i64>, length: Option<i64>| Rate {
        average: average.cast_unsigned(),
        max: max.unwrap_or(0).cast_unsigned(),
        burst_secs: length.unwrap_or(1).cast_unsigned(),
    };
    Limits {
        bytes: Kind {
            total: rate(arguments.bps, arguments.bps_max, arguments.bps_max_length),
            read: rate(arguments.bps_rd, arguments.bps_rd_max, arguments.bps_rd_max_length),
            write: rate(arguments.bps_wr, arguments.bps_wr_max, arguments.bps_wr_max_length),
        },
        requests: Kind {
            total: rate(arguments.iops, arguments.iops_max, arguments.iops_max_length),
            read: rate(arguments.iops_rd, arguments.iops_rd_max, arguments.iops_rd_max_length),
            write: rate(arguments.iops_wr, arguments.iops_wr_max, arguments.iops_wr_max_length),
        },
        request_size: arguments.iops_size.unwrap_or(0).cast_unsigned(),
    }
}

/// Puts a disk's limits into what query-block tells of its node.
pub(super) fn show(throttle: &IoThrottle, inserted: &mut Value) {
    let Some(group) = throttle.group() else { return };
    let limits = group.limits();
    let mut put = |name: &str, value: u64| inserted[name] = json!(value.cast_signed());
    for (name, kind) in [("bps", limits.bytes), ("iops", limits.requests)] {
        for (suffix, rate) in [("", kind.total), ("_rd", kind.read), ("_wr", kind.write)] {
            put(&format!("{name}{suffix}"), rate.average);
            if rate.max > 0 {
                put(&format!("{name}{suffix}_max"), rate.max);
                put(&format!("{name}{suffix}_max_length"), rate.burst_secs);
            }
        }
    }
    if limits.request_size > 0 {
        put("iops_size", limits.request_size);
    }
    inserted["group"] = json!(group.name());
}

/// The row of `info block`; `None` where nothing is limited.
pub(super) fn row(node: &Value) -> Option<String> {
    let group = node["group"].as_str()?;
    let mut row = String::new();
    for name in ["bps", "iops"] {
        for suffix in ["", "_rd", "_wr", "_max", "_rd_max", "_wr_max"] {
            let key = format!("{name}{suffix}");
            let value = node[&key].as_i64().unwrap_or(0);
            row.push_str(&format!("{key}={value} "));
        }
    }
    let size = node["iops_size"].as_i64().unwrap_or(0);
    Some(format!("{row}iops_size={size} group={group}"))
}
