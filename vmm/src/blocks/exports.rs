//! The NBD server and what it exports: from QMP and from the command line.

use std::net::ToSocketAddrs;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use block::Graph;
use block::bitmap::BitmapHold;
use block::nbd::{Address, ExportOptions, RemoveMode, Server, ServerOptions};
use qmp::schema::{
    BlockExportInfo, BlockExportOptions, BlockExportRemoveMode, BlockExportType, Event,
    NbdServerArguments, SocketAddress,
};
use serde_json::{Map, Value};

use super::text;

type Result<T> = std::result::Result<T, qmp::Error>;

/// Where and how the NBD server is to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NbdServerSpec {
    /// Where.
    pub address: AddressSpec,
    /// Clients at the same time; 0 is no limit.
    pub max_connections: u32,
    /// How long a handshake may take; zero is no limit.
    pub handshake_max: Duration,
}

/// An address that is not resolved yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AddressSpec {
    /// A socket's path.
    Unix(String),
    /// Host and port, as the user wrote them.
    Inet {
        /// Name or address.
        host: String,
        /// Number.
        port: String,
    },
}

/// One export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportSpec {
    /// Its id.
    pub id: String,
    /// The node.
    pub node_name: String,
    /// The name clients ask for.
    pub name: String,
    /// A text for people.
    pub description: Option<String>,
    /// Whether clients may write.
    pub writable: bool,
    /// Whether clients may ask for the depth of allocations.
    pub allocation_depth: bool,
    /// Dirty bitmaps: the node that has it, where one was named, and its name.
    pub bitmaps: Vec<(Option<String>, String)>,
}

impl NbdServerSpec {
    /// From the arguments of nbd-server-start.
    ///
    /// # Errors
    /// Something is asked for that is not done.
    pub fn from_arguments(arguments: NbdServerArguments) -> Result<Self> {
        for (name, given) in [
            ("tls-creds", arguments.tls_creds.is_some()),
            ("tls-authz", arguments.tls_authz.is_some()),
        ] {
            refuse(name, given)?;
        }
        let max_connections = arguments.max_connections.unwrap_or(100);
        let seconds = arguments.handshake_max_seconds.unwrap_or(10);
        let address = match arguments.addr {
            SocketAddress::Unix(unix) => AddressSpec::Unix(unix.path),
            SocketAddress::Inet(inet) => AddressSpec::Inet { host: inet.host, port: inet.port },
        };
        Ok(Self { address, max_connections, handshake_max: Duration::from_secs(seconds.into()) })
    }
}

impl AddressSpec {
    fn resolve(&self) -> Result<Address> {
        match self {
            Self::Unix(path) => Ok(Address::Unix(path.into())),
            Self::Inet { host, port } => {
                let failed =
                    |why: &str| text(format!("address resolution failed for {host}:{port}: {why}"));
                let number: u16 = port.parse().map_err(|_| failed("the port is not a number"))?;
                let mut all = (host.as_str(), number)
                    .to_socket_addrs()
                    .map_err(|error| failed(&error.to_string()))?;
                all.next().map(Address::Tcp).ok_or_else(|| failed("there is no such address"))
            }
        }
    }

    fn bind_error(&self, source: &std::io::Error) -> qmp::Error {
        let why = block::host_words(source);
        match self {
            Self::Unix(path) => text(format!("Failed to bind socket to {path}: {why}")),
            Self::Inet { .. } => text(format!("Failed to find an available port: {why}")),
        }
    }
}

fn refuse(option: &str, given: bool) -> Result<()> {
    if given { Err(text(format!("Parameter '{option}' is not supported"))) } else { Ok(()) }
}

impl ExportSpec {
    /// From the arguments of block-export-add.
    ///
    /// # Errors
    /// Something is asked for that is not done, or a bitmap is not named.
    pub fn from_options(options: BlockExportOptions) -> Result<Self> {
        let BlockExportType::Nbd = options.kind;
        for (name, given) in [
            ("fixed-iothread", options.fixed_iothread == Some(true)),
            ("iothread", options.iothread.is_some()),
            ("writethrough", options.writethrough == Some(true)),
        ] {
            refuse(name, given)?;
        }
        let bitmaps = options.bitmaps.unwrap_or_default();
        let bitmaps = bitmaps.iter().enumerate().map(|(index, value)| bitmap(index, value));
        Ok(Self {
            bitmaps: bitmaps.collect::<Result<_>>()?,
            name: options.name.unwrap_or_else(|| options.node_name.clone()),
            id: options.id,
            node_name: options.node_name,
            description: options.description,
            writable: options.writable.unwrap_or(false),
            allocation_depth: options.allocation_depth.unwrap_or(false),
        })
    }
}

/// A bitmap's name, or an object with its name and that of its node.
fn bitmap(index: usize, value: &Value) -> Result<(Option<String>, String)> {
    let path = format!("bitmaps[{index}]");
    match value {
        Value::String(name) => Ok((None, name.clone())),
        Value::Object(members) => {
            Ok((Some(member(members, &path, "node")?), member(members, &path, "name")?))
        }
        _ => Err(qmp::Error::invalid_type(&path, "BlockDirtyBitmapOrStr")),
    }
}

fn member(members: &Map<String, Value>, path: &str, name: &str) -> Result<String> {
    let path = format!("{path}.{name}");
    match members.get(name) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(_) => Err(qmp::Error::invalid_type(&path, "string")),
        None => Err(qmp::Error::missing_parameter(&path)),
    }
}

/// The NBD server, where there is one, and its exports.
pub struct Exports {
    graph: Arc<Graph>,
    events: qmp::Events,
    server: Mutex<Option<Server>>,
}

impl Exports {
    pub(super) fn new(graph: Arc<Graph>, events: qmp::Events) -> Self {
        Self { graph, events, server: Mutex::default() }
    }

    fn server(&self) -> MutexGuard<'_, Option<Server>> {
        self.server.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the server.
    ///
    /// # Errors
    /// It runs already, or the address cannot be had.
    pub fn start(&self, spec: &NbdServerSpec) -> Result<()> {
        let mut server = self.server();
        if server.is_some() {
            return Err(text("NBD server already running"));
        }
        let address = spec.address.resolve()?;
        let options = ServerOptions {
            max_connections: spec.max_connections,
            handshake_max: spec.handshake_max,
        };
        let events = self.events.clone();
        let gone = move |id: &str| events.emit(&Event::BlockExportDeleted { id: id.to_owned() });
        *server = Some(Server::start(&address, options, gone).map_err(|error| match &error {
            block::Error::Io { source, .. } => spec.address.bind_error(source),
            other => text(other.to_string()),
        })?);
        Ok(())
    }

    /// Ends the server and its exports; waits until requests under way are completed.
    ///
    /// # Errors
    /// There is none.
    pub fn stop(&self) -> Result<()> {
        let server = self.server().take();
        let mut server = server.ok_or_else(|| text("NBD server not running"))?;
        server.stop();
        Ok(())
    }

    /// Exports a node.
    ///
    /// # Errors
    /// With QEMU's texts, in QEMU's order: id, node, server, name.
    pub fn add(&self, spec: ExportSpec) -> Result<()> {
        if !block::graph::is_well_formed(&spec.id) {
            return Err(text("Invalid block export id"));
        }
        let server = self.server();
        if let Some(server) = server.as_ref()
            && server.list().iter().any(|export| export.id == spec.id)
        {
            return Err(text(format!("Block export id '{}' is already in use", spec.id)));
        }
        let failed = super::failed;
        self.graph.check_export(&spec.node_name, spec.writable).map_err(failed)?;
        let server = server.as_ref().ok_or_else(|| text("NBD server not running"))?;
        let attachment =
            self.graph.attach_export(&spec.node_name, spec.writable).map_err(failed)?;
        let bitmaps = spec.bitmaps.iter().map(|(node, name)| {
            let start = node.as_deref().unwrap_or(&spec.node_name);
            self.hold_bitmap(start, name, node.is_none(), spec.writable)
        });
        let options = ExportOptions {
            bitmaps: bitmaps.collect::<Result<_>>()?,
            id: spec.id,
            name: spec.name,
            description: spec.description,
            attachment,
            writable: spec.writable,
            allocation_depth: spec.allocation_depth,
        };
        server.add_export(options).map_err(failed)
    }

    /// The bitmap of a node; without a node named, of the first in the backing chain that has it.
    fn hold_bitmap(
        &self,
        node: &str,
        name: &str,
        chain: bool,
        writable: bool,
    ) -> Result<BitmapHold> {
        let missing = || text(format!("Node '{node}' not found"));
        let mut next = Some(self.graph.get(node).ok_or_else(missing)?);
        while let Some(node) = next {
            if let Ok(bitmap) = node.bitmaps().get(name) {
                let hold = bitmap.hold().map_err(super::failed)?;
                // It would change under clients that were promised a disk that does not.
                if !writable && !node.read_only() && bitmap.enabled() {
                    return Err(text(format!(
                        "Enabled bitmap '{name}' incompatible with readonly export"
                    )));
                }
                return Ok(hold);
            }
            next = node.backing().filter(|_| chain);
        }
        Err(text(format!("Bitmap '{name}' is not found")))
    }

    /// Takes an export away.
    ///
    /// # Errors
    /// It is not there, or has clients and `mode` spares them.
    pub fn remove(&self, id: &str, mode: Option<BlockExportRemoveMode>) -> Result<()> {
        let mode = match mode {
            Some(BlockExportRemoveMode::Hard) => RemoveMode::Hard,
            Some(BlockExportRemoveMode::Safe) | None => RemoveMode::Safe,
        };
        match self.server().as_ref() {
            Some(server) => server.remove_export(id, mode).map_err(super::failed),
            None => Err(text(format!("Export '{id}' is not found"))),
        }
    }

    /// The exports, newest first.
    pub fn list(&self) -> Vec<BlockExportInfo> {
        let all = self.server().as_ref().map(Server::list).unwrap_or_default();
        let info = |export: block::nbd::ExportInfo| BlockExportInfo {
            id: export.id,
            kind: BlockExportType::Nbd,
            node_name: export.node_name,
            shutting_down: export.shutting_down,
        };
        all.into_iter().map(info).collect()
    }
}
