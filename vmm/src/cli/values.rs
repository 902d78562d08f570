//! Values of single options of the machine.

use std::path::Path;

use block::graph::text;
use qmp::schema::{LoadClock, LoadMode};
use serde_json::{Map, Value};
use uuid::Uuid;

use super::Error;
use crate::boot::layout;
use crate::restore::RestoreSpec;

/// The type of machine that there is.
pub const MACHINE_TYPE: &str = "microvm";
/// Most vCPUs a machine can have: APIC ids are bytes, 255 is broadcast and the IOAPIC takes one.
pub const MAX_VCPUS: u8 = 254;

/// The values of `--machine`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MachineType {
    /// A guest.
    Microvm {
        /// Whether what the guest writes may be tracked between checkpoints.
        dirty_tracking: bool,
        /// Whether there are ACPI tables, where it was said.
        acpi: Option<bool>,
    },
    /// A storage daemon without one.
    None,
}

/// `--machine`: a type; a microvm can be told not to track what the guest writes.
pub fn machine_type(text: &str) -> Result<MachineType, Error> {
    let error = |reason: &str| Error::new("machine", text, reason);
    let mut options = text::object(text, "type").map_err(|e| error(&e.to_string()))?;
    let machine = match take(&mut options, "type").as_deref() {
        Some(MACHINE_TYPE) => {
            let mut switch = |name: &str| match take(&mut options, name).as_deref() {
                None => Ok(None),
                Some("on" | "true") => Ok(Some(true)),
                Some("off" | "false") => Ok(Some(false)),
                Some(_) => Err(error(&format!("{name} is on or off"))),
            };
            let dirty_tracking = switch("dirty-tracking")?.unwrap_or(true);
            MachineType::Microvm { dirty_tracking, acpi: switch("acpi")? }
        }
        Some("none") => MachineType::None,
        _ => return Err(error("the machine type is microvm or none")),
    };
    match options.keys().next() {
        Some(key) => Err(error(&format!("'{key}' is not a property of this machine type"))),
        None => Ok(machine),
    }
}

/// `--accel`: the machine runs on KVM only.
pub fn check_accel(text: Option<&str>) -> Result<(), Error> {
    match text {
        None | Some("kvm") => Ok(()),
        Some(other) => Err(Error::new("accel", other, "the only accelerator is kvm")),
    }
}

/// `--cpu`: what the host's KVM supports.
pub fn check_cpu(text: &str) -> Result<(), Error> {
    match text {
        "host" => Ok(()),
        _ => Err(Error::new("cpu", text, "the only model is host, without flags")),
    }
}

/// `-m`: bytes of RAM, an amount that a guest can have.
pub fn memory(text: &str) -> Result<u64, Error> {
    let error = |reason: &str| Error::new("m", text, reason);
    let number = text.strip_prefix("size=").unwrap_or(text);
    let (digits, unit) = match number.char_indices().find(|(_, c)| !c.is_ascii_digit()) {
        Some((at, _)) => number.split_at(at),
        None => (number, "M"),
    };
    let shift = match unit.to_ascii_uppercase().as_str() {
        "B" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(error("is not a size such as 256M or 4G")),
    };
    let count: u64 = digits.parse().map_err(|_| error("is not a size such as 256M or 4G"))?;
    let size =
        count.checked_mul(1 << shift).ok_or_else(|| error("is more than any machine has"))?;
    layout::ram_regions(size).map_err(|reason| Error::new("m", text, reason))?;
    Ok(size)
}

/// `--smp`: `N` or `cpus=N`.
pub fn smp(text: &str) -> Result<u8, Error> {
    let number = text.strip_prefix("cpus=").unwrap_or(text);
    match number.parse() {
        Ok(count @ 1..=MAX_VCPUS) => Ok(count),
        _ => Err(Error::new("smp", text, format!("is not a number from 1 to {MAX_VCPUS}"))),
    }
}

/// `--restore` and `--fork`: `IMAGE#TAG`. Both may have a `#`: the longest file name that there is
/// counts.
pub fn checkpoint(option: &'static str, text: &str) -> Result<RestoreSpec, Error> {
    let error = |reason: &str| Error::new(option, text, reason);
    let split = |(at, _): (usize, _)| (Path::new(&text[..at]), &text[at + 1..]);
    let ways: Vec<_> = text.rmatch_indices('#').map(split).collect();
    let there = ways.iter().find(|(image, _)| image.is_file()).or(ways.first());
    match there {
        Some((image, tag)) if !image.as_os_str().is_empty() && !tag.is_empty() => {
            Ok(RestoreSpec { image: image.to_path_buf(), tag: (*tag).to_owned() })
        }
        _ => Err(error("is not IMAGE#TAG")),
    }
}

/// `--load-mode`
pub fn load_mode(text: &str) -> Result<LoadMode, Error> {
    let mode = LoadMode::ALL.iter().find(|mode| mode.as_str() == text);
    mode.copied().ok_or_else(|| Error::new("load-mode", text, "must be lazy or eager"))
}

/// `--load-clock`, and `--fork-clock`, which is another name for it.
pub fn load_clock(option: &'static str, text: &str) -> Result<LoadClock, Error> {
    let clock = LoadClock::ALL.iter().find(|clock| clock.as_str() == text);
    clock.copied().ok_or_else(|| Error::new(option, text, "must be frozen or host"))
}

/// `--uuid`; nil where none is given, as QEMU tells it.
pub fn uuid(text: Option<&str>) -> Result<Uuid, Error> {
    let Some(text) = text else { return Ok(Uuid::nil()) };
    Uuid::parse_str(text).map_err(|error| Error::new("uuid", text, error))
}

/// Takes an option out; numbers may come from JSON as numbers.
pub(super) fn take(options: &mut Map<String, Value>, key: &str) -> Option<String> {
    match options.remove(key)? {
        Value::String(text) => Some(text),
        other => Some(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_qemus_units() {
        assert_eq!(memory("256").unwrap(), 256 << 20);
        assert_eq!(memory("256M").unwrap(), 256 << 20);
        assert_eq!(memory("4g").unwrap(), 4 << 30);
        assert_eq!(memory("size=1G").unwrap(), 1 << 30);
        for bad in ["", "M", "1X", "-1", "99999999999999999999", "999999999T"] {
            assert!(memory(bad).is_err(), "{bad}");
        }
        for bad in ["0", "31M", "65T", "33554433B"] {
            let error = memory(bad).unwrap_err().to_string();
            assert!(error.starts_with(&format!("-m {bad}: ")), "{error}");
        }
    }

    #[test]
    fn a_machine_has_a_type_and_may_go_without_dirty_tracking() {
        let microvm = |dirty_tracking| MachineType::Microvm { dirty_tracking, acpi: None };
        let acpi = |acpi| MachineType::Microvm { dirty_tracking: true, acpi: Some(acpi) };
        assert_eq!(machine_type("microvm,acpi=on").unwrap(), acpi(true));
        assert_eq!(machine_type("microvm,acpi=off").unwrap(), acpi(false));
        assert_eq!(machine_type("microvm").unwrap(), microvm(true));
        assert_eq!(machine_type("type=microvm,dirty-tracking=off").unwrap(), microvm(false));
        assert_eq!(machine_type("microvm,dirty-tracking=on").unwrap(), microvm(true));
        assert_eq!(machine_type("none").unwrap(), MachineType::None);
        assert!(machine_type("").unwrap_err().to_string().starts_with("--machine: "));
        for bad in [
            "q35",
            "microvm,dirty-tracking=1",
            "none,dirty-tracking=on",
            "microvm,x=y",
            "microvm,acpi=auto",
            "none,acpi=on",
        ] {
            let error = machine_type(bad).unwrap_err().to_string();
            assert!(error.starts_with(&format!("--machine {bad}: ")), "{error}");
        }
    }

    #[test]
    fn smp_is_bounded() {
        assert_eq!(smp("2").unwrap(), 2);
        assert_eq!(smp("cpus=4").unwrap(), 4);
        for bad in ["0", "255", "x", "-1"] {
            assert!(smp(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_checkpoint_is_named_after_its_image() {
        let spec = |image: &Path, tag: &str| RestoreSpec { image: image.into(), tag: tag.into() };
        let restore = |text: &str| checkpoint("restore", text);
        assert_eq!(restore("a.qcow2#t").unwrap(), spec(Path::new("a.qcow2"), "t"));
        assert_eq!(restore("").unwrap_err().to_string(), "--restore: is not IMAGE#TAG");
        for bad in ["a.qcow2", "#t", "a.qcow2#"] {
            let error = restore(bad).unwrap_err().to_string();
            assert_eq!(error, format!("--restore {bad}: is not IMAGE#TAG"));
        }
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("a#b");
        std::fs::write(&image, "").unwrap();
        let text = format!("{}#c#d", image.display());
        assert_eq!(restore(&text).unwrap(), spec(&image, "c#d"));
    }
}
