//! NBD server: nodes of the graph as named exports over unix and TCP sockets.
//!
//! ```text
//! Server ── accept thread
//!   ├── Export (node, name) ...
//!   └── connection thread ...   handshake (negotiate) ──> Transmission ── Queue ── node
//! ```
//!
//! | file | what |
//! |---|---|
//! | `wire` | the protocol's bytes, parsed and encoded |
//! | `negotiate` | the handshake as a state machine, without sockets |
//! | `command` | requests checked against the export |
//! | `extents` | block status as descriptors of contexts |
//! | `export`, `server` | what is exported; who is connected |
//! | `socket`, `inbox`, `outbox`, `pool` | bytes in, bytes out, memory for data |
//! | `connection`, `transmit` | one client |
//!
//! Lock order: the server's state is locked alone, never while an export is dropped or data moves.

pub mod command;
mod connection;
mod export;
mod extents;
mod inbox;
pub mod negotiate;
mod outbox;
mod pool;
mod server;
mod socket;
mod transmit;
pub mod wire;

pub use export::{ExportInfo, ExportOptions};
pub use server::{RemoveMode, Server, ServerOptions};
pub use socket::Address;
