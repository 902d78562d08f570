//! The QEMU Machine Protocol: the wire, the schema and its checks, events, and the job state machine.
//!
//! What a command does is not known here: [`server::Server`] checks a command against the
//! [`schema`], hands it as a [`Command`] to whoever owns the machine, and sends the answer back.
//!
//! | module | what it is |
//! |---|---|
//! | [`json`] | QEMU's JSON dialect: incremental parser with its error texts, ASCII writer |
//! | [`schema`] | the one list of commands, events and types; arguments are checked against it |
//! | [`server`] | sockets, sessions, the order of answers and events, flow control |
//! | [`jobs`] | the states of a job and the list of jobs |
//! | [`transaction`] | several actions at one moment: the order of their steps |
//! | [`client`] | a small blocking client |
//! | [`error`] | the error of a command and the standard texts |
#![forbid(unsafe_code)]

pub mod client;
pub mod error;
pub mod jobs;
pub mod json;
pub mod schema;
pub mod server;
pub mod transaction;
mod wire;

pub use error::{Error, ErrorClass};
pub use schema::{Command, Event};
pub use server::{Events, Options, Reply, Request, Requests, Server};
