//! Values of single options.

use std::path::{Path, PathBuf};

use block::graph::text;
use devices::virtio::block::{ErrorPolicy, OnError};
use qmp::server::Place;
use serde_json::{Map, Value};
use uuid::Uuid;

use super::Error;
use crate::boot::layout;
use crate::console::ConsoleSpec;
use crate::fork::ClockPolicy;
use crate::machine::spec::{DeviceKind, DeviceSpec};
use crate::restore::RestoreSpec;

/// The type of machine that there is.
pub const MACHINE_TYPE: &str = "microvm";
/// Most vCPUs a machine can have: APIC ids are bytes, 255 is broadcast and the IOAPIC takes one.
pub const MAX_VCPUS: u8 = 254;
/// A virtio-blk serial has 20 bytes (virtio 1.2, 5.2.6).
const MAX_SERIAL: usize = 20;
/// Most request queues of a disk.
const MAX_QUEUES: u16 = 16;

/// Where a monitor is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum QmpSpec {
    /// On standard input and output.
    Stdio,
    /// It listens on a socket.
    Listen {
        /// Where.
        place: Place,
        /// Whether the machine is built only once a client is there.
        wait: bool,
    },
    /// It connects to one that listens there.
    Connect(Place),
}

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

/// `--fork-clock`
pub fn fork_clock(text: Option<&str>) -> Result<ClockPolicy, Error> {
    match text {
        None | Some("frozen") => Ok(ClockPolicy::Frozen),
        Some("host") => Ok(ClockPolicy::Host),
        Some(text) => Err(Error::new("fork-clock", text, "is frozen or host")),
    }
}

/// `--uuid`; nil where none is given, as QEMU tells it.
pub fn uuid(text: Option<&str>) -> Result<Uuid, Error> {
    let Some(text) = text else { return Ok(Uuid::nil()) };
    Uuid::parse_str(text).map_err(|error| Error::new("uuid", text, error))
}

/// `--qmp`
pub fn qmp(text: &str) -> Result<QmpSpec, Error> {
    if text == "stdio" {
        return Ok(QmpSpec::Stdio);
    }
    let error = |reason: String| Error::new("qmp", text, reason);
    let (kind, address) = text
        .split_once(':')
        .filter(|(kind, _)| matches!(*kind, "unix" | "tcp"))
        .ok_or_else(|| error("is not stdio, unix:PATH or tcp:HOST:PORT".to_owned()))?;
    let mut options = text::object(address, "path").map_err(|e| error(e.to_string()))?;
    let at = take(&mut options, "path").filter(|path| !path.is_empty());
    let at = at.ok_or_else(|| error("the address is missing".to_owned()))?;
    let place = match kind {
        "unix" => Place::Unix(at.into()),
        _ => tcp_place(&at).map_err(error)?,
    };
    let (server, wait) = (take(&mut options, "server"), take(&mut options, "wait"));
    if let Some(key) = options.keys().next() {
        return Err(error(format!("'{key}' is not an option of a socket")));
    }
    let on = |name: &str, value: Option<String>| match value.as_deref() {
        None => Ok(None),
        Some("on") => Ok(Some(true)),
        Some("off") => Ok(Some(false)),
        Some(_) => Err(error(format!("{name} is on or off"))),
    };
    match (on("server", server)?.unwrap_or(false), on("wait", wait)?) {
        (true, wait) => Ok(QmpSpec::Listen { place, wait: wait.unwrap_or(true) }),
        (false, None) => Ok(QmpSpec::Connect(place)),
        (false, Some(_)) => Err(error("wait is of use with server=on only".to_owned())),
    }
}

/// `HOST:PORT`, where HOST may be `[::1]`.
fn tcp_place(text: &str) -> Result<Place, String> {
    let parts = text.rsplit_once(':').filter(|(host, _)| !host.is_empty());
    let (host, port) = parts.ok_or("the address is not HOST:PORT")?;
    let port = port.parse().map_err(|_| format!("'{port}' is not a port"))?;
    let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    Ok(Place::Tcp { host, port })
}

/// `--serial`
pub fn serial(text: &str) -> Result<ConsoleSpec, Error> {
    match text.split_once(':') {
        None if text == "stdio" => Ok(ConsoleSpec::Stdio),
        None if matches!(text, "null" | "none") => Ok(ConsoleSpec::Null),
        Some(("file", path)) if !path.is_empty() => Ok(ConsoleSpec::File(path.into())),
        Some(("unix", _)) => {
            let (path, wait) = unix_server("serial", text)?;
            Ok(ConsoleSpec::Unix { path, wait })
        }
        _ => {
            let reason = "is not stdio, null, file:F or unix:PATH,server=on,wait=off";
            Err(Error::new("serial", text, reason))
        }
    }
}

/// `unix:PATH,server=on[,wait=on|off]`; as in QEMU, `wait` is on where it is not given.
fn unix_server(option: &'static str, text: &str) -> Result<(PathBuf, bool), Error> {
    let error = |reason: String| Error::new(option, text, reason);
    let address = text
        .strip_prefix("unix:")
        .ok_or_else(|| error("is not unix:PATH,server=on,wait=off".to_owned()))?;
    let mut options = text::object(address, "path").map_err(|e| error(e.to_string()))?;
    let path = take(&mut options, "path").filter(|path| !path.is_empty());
    let path = path.ok_or_else(|| error("the path is missing".to_owned()))?;
    let server = take(&mut options, "server");
    let wait = take(&mut options, "wait");
    if let Some(key) = options.keys().next() {
        return Err(error(format!("'{key}' is not an option of a socket")));
    }
    if server.as_deref() != Some("on") {
        return Err(error("server=on is needed: the socket is made here".to_owned()));
    }
    match wait.as_deref() {
        Some("off") => Ok((path.into(), false)),
        None | Some("on") => Ok((path.into(), true)),
        Some(_) => Err(error("wait is on or off".to_owned())),
    }
}

/// `--device`
pub fn device(text: &str) -> Result<DeviceSpec, Error> {
    let error = |reason: String| Error::new("device", text, reason);
    let mut options = text::object(text, "driver").map_err(|e| error(e.to_string()))?;
    let driver =
        take(&mut options, "driver").ok_or_else(|| error("the driver is missing".to_owned()))?;
    let id = take(&mut options, "id");
    let kind = match driver.as_str() {
        "virtio-blk-device" => block_device(&mut options).map_err(error)?,
        "virtio-rng-device" => DeviceKind::Rng,
        _ => {
            return Err(error(format!(
                "'{driver}' is not a device here; there are virtio-blk-device and virtio-rng-device"
            )));
        }
    };
    match options.keys().next() {
        Some(key) => Err(error(format!("'{key}' is not an option of {driver}"))),
        None => Ok(DeviceSpec { id, kind }),
    }
}

fn block_device(options: &mut Map<String, Value>) -> Result<DeviceKind, String> {
    let drive = take(options, "drive").ok_or("drive=NODE is missing")?;
    let serial = take(options, "serial").unwrap_or_default();
    if serial.len() > MAX_SERIAL {
        return Err(format!("serial '{serial}' has more than {MAX_SERIAL} bytes"));
    }
    let queues = match take(options, "num-queues") {
        None => 1,
        Some(text) => match text.parse() {
            Ok(count @ 1..=MAX_QUEUES) => count,
            _ => return Err(format!("num-queues '{text}' is not a number from 1 to {MAX_QUEUES}")),
        },
    };
    let share_rw = match take(options, "share-rw").as_deref() {
        None | Some("off" | "false") => false,
        Some("on" | "true") => true,
        Some(_) => return Err("share-rw is on or off".to_owned()),
    };
    let auto = ErrorPolicy::default();
    let on_error = ErrorPolicy {
        read: on_error(options, "rerror", auto.read)?,
        write: on_error(options, "werror", auto.write)?,
    };
    Ok(DeviceKind::Block { drive, serial, queues, share_rw, on_error })
}

/// `rerror` or `werror`.
fn on_error(options: &mut Map<String, Value>, key: &str, auto: OnError) -> Result<OnError, String> {
    match take(options, key).as_deref() {
        None | Some("auto") => Ok(auto),
        Some(text) => text.parse().map_err(|error| format!("{key} {error}")),
    }
}

/// Takes an option out; numbers may come from JSON as numbers.
fn take(options: &mut Map<String, Value>, key: &str) -> Option<String> {
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

    #[test]
    fn sockets_need_server_on() {
        for bad in ["tcp:1", "unix:,server=on", "unix:/a", "unix:/a,server=on,x=y"] {
            assert!(serial(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn monitors_listen_connect_or_are_on_standard_input() {
        let unix = |path: &str| Place::Unix(path.into());
        let tcp = |host: &str| Place::Tcp { host: host.into(), port: 4444 };
        for (text, spec) in [
            ("stdio", QmpSpec::Stdio),
            ("unix:/a/b,server=on,wait=off", QmpSpec::Listen { place: unix("/a/b"), wait: false }),
            ("unix:/a,server=on", QmpSpec::Listen { place: unix("/a"), wait: true }),
            ("unix:/a", QmpSpec::Connect(unix("/a"))),
            ("unix:/a,server=off", QmpSpec::Connect(unix("/a"))),
            (
                "tcp:localhost:4444,server=on,wait=off",
                QmpSpec::Listen { place: tcp("localhost"), wait: false },
            ),
            ("tcp:[::1]:4444", QmpSpec::Connect(tcp("::1"))),
        ] {
            assert_eq!(qmp(text).unwrap(), spec, "{text}");
        }
        for bad in [
            "/a",
            "tcp:1",
            "tcp::1",
            "tcp:localhost:x",
            "tcp:localhost:70000",
            "unix:,server=on",
            "unix:/a,server=on,x=y",
            "unix:/a,server=yes",
            "unix:/a,wait=off",
        ] {
            assert!(qmp(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn serial_targets() {
        assert_eq!(serial("stdio").unwrap(), ConsoleSpec::Stdio);
        assert_eq!(serial("file:/a:b").unwrap(), ConsoleSpec::File("/a:b".into()));
        assert!(serial("file:").is_err());
        assert!(serial("tty").is_err());
    }

    #[test]
    fn a_device_names_what_it_does_not_know() {
        let spec = device("virtio-blk-device,drive=d,serial=s,num-queues=2,id=x").unwrap();
        let kind = DeviceKind::Block {
            drive: "d".into(),
            serial: "s".into(),
            queues: 2,
            share_rw: false,
            on_error: ErrorPolicy::default(),
        };
        assert_eq!(spec, DeviceSpec { id: Some("x".into()), kind });
        let json = device(r#"{"driver":"virtio-blk-device","drive":"d","num-queues":3}"#).unwrap();
        assert!(matches!(json.kind, DeviceKind::Block { queues: 3, .. }));
        let policy = |text: &str| match device(text).unwrap().kind {
            DeviceKind::Block { on_error, .. } => on_error,
            DeviceKind::Rng => panic!("{text}"),
        };
        let stop = ErrorPolicy { read: OnError::Ignore, write: OnError::Stop };
        assert_eq!(policy("virtio-blk-device,drive=d,rerror=ignore,werror=stop"), stop);
        assert_eq!(
            policy("virtio-blk-device,drive=d,rerror=auto,werror=auto"),
            ErrorPolicy::default()
        );
        let error = device("virtio-blk-device,drive=d,werror=x").unwrap_err().to_string();
        assert!(error.contains("werror 'x' is not report"), "{error}");
        let error = device("virtio-blk-device,drive=d,foo=1").unwrap_err().to_string();
        assert!(error.contains("'foo' is not an option of virtio-blk-device"), "{error}");
        assert!(device("virtio-net-device").unwrap_err().to_string().contains("virtio-net-device"));
        assert!(device("virtio-blk-device").is_err());
    }
}
