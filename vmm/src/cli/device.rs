//! `--device`: what there is, and the properties of each.

use block::graph::text;
use devices::virtio::block::{ErrorPolicy, OnError};
use serde_json::{Map, Value};

use super::Error;
use super::values::take;
use crate::machine::spec::{DeviceKind, DeviceSpec};

/// A virtio-blk serial has 20 bytes (virtio 1.2, 5.2.6).
const MAX_SERIAL: usize = 20;
/// Most request queues of a disk.
const MAX_QUEUES: u16 = 16;

/// `--device`
pub(super) fn device(text: &str) -> Result<DeviceSpec, Error> {
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

#[cfg(test)]
mod tests {
    use super::*;

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
