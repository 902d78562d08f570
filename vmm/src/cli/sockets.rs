//! Where monitors and the console are: `--qmp`, `--serial`.

use std::path::PathBuf;

use block::graph::text;
use qmp::server::Place;

use super::Error;
use super::values::take;
use crate::console::ConsoleSpec;

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
        None if text == "null" => Ok(ConsoleSpec::Null),
        None if text == "none" => Ok(ConsoleSpec::None),
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

#[cfg(test)]
mod tests {
    use super::*;

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
        assert_eq!(serial("null").unwrap(), ConsoleSpec::Null);
        assert_eq!(serial("none").unwrap(), ConsoleSpec::None);
        assert!(serial("file:").is_err());
        assert!(serial("tty").is_err());
    }
}
