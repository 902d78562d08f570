//! `--nbd-server` and `--export`, with qemu-storage-daemon's options.

use block::graph::text::{self, Members};
use qmp::schema::{
    BlockDirtyBitmapOrStr, BlockExportOptions, BlockExportType, InetSocketAddress,
    NbdServerArguments, SocketAddress, UnixSocketAddress,
};
use serde_json::Value;

use super::Error;
use crate::blocks::exports::{ExportSpec, NbdServerSpec};

type Result<T> = block::Result<T>;

fn invalid<T>(text: String) -> Result<T> {
    Err(block::Error::Invalid(text))
}

/// `--nbd-server`
pub fn nbd_server(text: &str) -> std::result::Result<NbdServerSpec, Error> {
    read_nbd_server(text).map_err(|e| Error::new("nbd-server", text, e.to_string()))
}

fn read_nbd_server(text: &str) -> Result<NbdServerSpec> {
    let mut all = text::members(text, "addr")?;
    let addr = match all.take("addr") {
        Some(Value::Object(members)) => address(all.inner("addr", members))?,
        _ => return all.missing("addr.type"),
    };
    let arguments = NbdServerArguments {
        addr,
        handshake_max_seconds: short(&mut all, "handshake-max-seconds")?,
        tls_creds: all.string("tls-creds")?,
        tls_authz: all.string("tls-authz")?,
        max_connections: short(&mut all, "max-connections")?,
    };
    all.end(&[])?;
    NbdServerSpec::from_arguments(arguments).or_else(|error| invalid(error.desc))
}

/// A number of 32 bits.
fn short(all: &mut Members, name: &str) -> Result<Option<u32>> {
    let number = all.number(name)?.map(u32::try_from).transpose();
    number.or_else(|_| invalid(format!("Parameter '{name}' expects uint32_t")))
}

fn address(mut all: Members) -> Result<SocketAddress> {
    let kind = all.needed("type")?;
    let address = match kind.as_str() {
        "unix" => SocketAddress::Unix(UnixSocketAddress { path: all.needed("path")? }),
        "inet" => SocketAddress::Inet(InetSocketAddress {
            host: all.needed("host")?,
            port: all.needed("port")?,
        }),
        _ => return invalid(format!("Parameter 'type' does not accept value '{kind}'")),
    };
    all.end(&[])?;
    Ok(address)
}

/// `--export`
pub fn export(text: &str) -> std::result::Result<ExportSpec, Error> {
    read_export(text).map_err(|e| Error::new("export", text, e.to_string()))
}

fn read_export(text: &str) -> Result<ExportSpec> {
    let mut all = text::members(text, "type")?;
    let kind = all.needed("type")?;
    if kind != BlockExportType::Nbd.as_str() {
        return invalid(format!("Parameter 'type' does not accept value '{kind}'"));
    }
    let options = BlockExportOptions {
        kind: BlockExportType::Nbd,
        id: all.needed("id")?,
        node_name: all.needed("node-name")?,
        fixed_iothread: all.bool("fixed-iothread")?,
        iothread: all.string("iothread")?,
        writable: all.bool("writable")?,
        writethrough: all.bool("writethrough")?,
        name: all.string("name")?,
        description: all.string("description")?,
        bitmaps: list(&mut all, "bitmaps")?
            .map(|list| list.into_iter().map(BlockDirtyBitmapOrStr).collect()),
        allocation_depth: all.bool("allocation-depth")?,
    };
    all.end(&[])?;
    ExportSpec::from_options(options).or_else(|error| invalid(error.desc))
}

/// A JSON array, or `name.0=..,name.1=..`.
fn list(all: &mut Members, name: &str) -> Result<Option<Vec<Value>>> {
    match all.take(name) {
        None => Ok(None),
        Some(Value::Array(list)) => Ok(Some(list)),
        Some(Value::Object(mut members)) => {
            let take = |index: usize| members.remove(&index.to_string());
            let list: Vec<_> = (0..).map_while(take).collect();
            match members.keys().next() {
                Some(key) => invalid(format!("Parameter '{name}.{key}' is unexpected")),
                None => Ok(Some(list)),
            }
        }
        Some(_) => all.wrong_type(name, "array"),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::blocks::exports::AddressSpec;

    #[test]
    fn a_server_is_read_from_text_and_json() {
        let spec = nbd_server("addr.type=unix,addr.path=/a,,b,max-connections=7").unwrap();
        let address = AddressSpec::Unix("/a,b".to_owned());
        let handshake_max = Duration::from_secs(10);
        assert_eq!(spec, NbdServerSpec { address, max_connections: 7, handshake_max });
        let spec = nbd_server(r#"{"addr":{"type":"inet","host":"::1","port":"0"}}"#).unwrap();
        let address = AddressSpec::Inet { host: "::1".to_owned(), port: "0".to_owned() };
        assert_eq!(spec, NbdServerSpec { address, max_connections: 100, handshake_max });
    }

    #[test]
    fn an_export_is_read_with_its_bitmaps() {
        let text =
            "type=nbd,id=e,node-name=n,writable=on,bitmaps.0=b,bitmaps.1.node=x,bitmaps.1.name=c";
        let spec = export(text).unwrap();
        assert_eq!((spec.id.as_str(), spec.name.as_str(), spec.writable), ("e", "n", true));
        let bitmaps = [(None, "b".to_owned()), (Some("x".to_owned()), "c".to_owned())];
        assert_eq!(spec.bitmaps, bitmaps);
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        let cases = [
            ("type=fuse,id=e,node-name=n", "Parameter 'type' does not accept value 'fuse'"),
            ("type=nbd,id=e", "Parameter 'node-name' is missing"),
            ("type=nbd,id=e,node-name=n,zz=1", "Parameter 'zz' is unexpected"),
            (
                "type=nbd,id=e,node-name=n,writable=yes",
                "Parameter 'writable' expects 'on' or 'off'",
            ),
            ("type=nbd,id=e,node-name=n,iothread=t", "Parameter 'iothread' is not supported"),
        ];
        for (text, reason) in cases {
            assert_eq!(export(text).unwrap_err().to_string(), format!("--export {text}: {reason}"));
        }
        let cases = [
            ("addr.type=vsock,addr.cid=1", "Parameter 'type' does not accept value 'vsock'"),
            ("addr.type=unix", "Parameter 'addr.path' is missing"),
            ("max-connections=1", "Parameter 'addr.type' is missing"),
            (
                "addr.type=unix,addr.path=p,max-connections=-1",
                "Parameter 'max-connections' expects uint32_t",
            ),
            ("addr.type=unix,addr.path=p,tls-creds=t", "Parameter 'tls-creds' is not supported"),
        ];
        for (text, reason) in cases {
            let error = nbd_server(text).unwrap_err().to_string();
            assert_eq!(error, format!("--nbd-server {text}: {reason}"));
        }
    }
}
