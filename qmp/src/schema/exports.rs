//! The NBD server and its exports.

use super::macros::{enums, objects};
use super::{BlockDirtyBitmapOrStr, Branch, Member, Qapi, Type, UnionInfo};

enums! {
    /// How a node is exported.
    BlockExportType {
        /// Over NBD.
        Nbd = "nbd",
    }

    /// What becomes of an export's clients when it is taken away.
    BlockExportRemoveMode {
        /// It stays if it has any.
        Safe = "safe",
        /// They are disconnected.
        Hard = "hard",
    }
}

objects! {
    /// Arguments of `nbd-server-start`.
    NbdServerArguments {
        /// Where it listens.
        "addr" addr: SocketAddress,
        /// Seconds that a handshake may take; 0 is no limit. Default 10.
        "handshake-max-seconds" handshake_max_seconds: Option<u32>,
        /// Credentials for TLS; refused, there is none.
        "tls-creds" tls_creds: Option<String>,
        /// Authorization of TLS clients; refused.
        "tls-authz" tls_authz: Option<String>,
        /// Clients at the same time; 0 is no limit. Default 100.
        "max-connections" max_connections: Option<u32>,
    }

    /// Arguments of `block-export-add`: a flat union by `type`, of which there is one.
    BlockExportOptions {
        /// The protocol.
        "type" kind: BlockExportType,
        /// The export's id.
        "id" id: String,
        /// Whether the export stays with its thread; refused where it asks for anything.
        "fixed-iothread" fixed_iothread: Option<bool>,
        /// The thread it is to run on; refused.
        "iothread" iothread: Option<String>,
        /// The node.
        "node-name" node_name: String,
        /// Whether clients may write.
        "writable" writable: Option<bool>,
        /// Whether each write is durable when it is answered; refused where it is on.
        "writethrough" writethrough: Option<bool>,
        /// The name clients ask for; default the node's.
        "name" name: Option<String>,
        /// A text for people.
        "description" description: Option<String>,
        /// Dirty bitmaps that clients may ask for.
        "bitmaps" bitmaps: Option<Vec<BlockDirtyBitmapOrStr>>,
        /// Whether clients may ask how deep in the chain a range is.
        "allocation-depth" allocation_depth: Option<bool>,
    }

    /// Arguments of `block-export-del`.
    BlockExportDelArguments {
        /// The export.
        "id" id: String,
        /// What becomes of its clients; default "safe".
        "mode" mode: Option<BlockExportRemoveMode>,
    }

    /// An export.
    BlockExportInfo {
        /// Its id.
        "id" id: String,
        /// How it is exported.
        "type" kind: BlockExportType,
        /// The node.
        "node-name" node_name: String,
        /// Whether it is gone as soon as its last client is.
        "shutting-down" shutting_down: bool,
    }

    /// An internet address to listen on.
    InetSocketAddress {
        /// Host name or address.
        "host" host: String,
        /// Port number; 0 is any.
        "port" port: String,
    }

    /// A unix socket to listen on.
    UnixSocketAddress {
        /// Its path.
        "path" path: String,
    }
}

/// Where a server listens (QAPI `SocketAddressLegacy`, as far as it goes).
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(tag = "type", content = "data", rename_all = "lowercase")]
pub enum SocketAddress {
    /// On a TCP port.
    Inet(InetSocketAddress),
    /// On a unix socket.
    Unix(UnixSocketAddress),
}

impl Qapi for SocketAddress {
    const TYPE: Type = Type::Union(&UnionInfo {
        name: "SocketAddressLegacy",
        doc: "Where a server listens.",
        tag: "type",
        branches: &[
            Branch { value: "inet", members: &[data::<InetSocketAddress>()] },
            Branch { value: "unix", members: &[data::<UnixSocketAddress>()] },
        ],
    });
}

const fn data<T: Qapi>() -> Member {
    Member { name: "data", doc: "The address.", ty: T::TYPE, optional: false }
}
