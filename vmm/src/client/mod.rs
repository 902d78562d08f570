//! Subcommands: what people do with a machine that runs already, over its sockets.

mod console;
mod demo;
mod snapshots;

use qmp::client::{Client, ClientError};
use serde_json::{Value, json};

pub use demo::DemoError;

use crate::cli::args::{QmpTarget, SnapshotCommand, Subcommand};

/// Why a subcommand failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The machine cannot be reached or refuses.
    #[error("{}", with_cause(.0))]
    Qmp(#[from] ClientError),
    /// The machine answers something unexpected.
    #[error("the machine's answer to {command} lacks '{member}'")]
    Answer {
        /// What was asked.
        command: &'static str,
        /// What is missing.
        member: &'static str,
    },
    /// The machine has nothing to keep a checkpoint on.
    #[error("the machine has no writable disk that could hold a checkpoint")]
    NoDisk,
    /// A subcommand that works without a machine; it has its own entry.
    #[error("this subcommand does not talk to a machine")]
    NotAClient,
    /// Nothing to delete.
    #[error("no disk has a checkpoint '{0}'; 'tardigrade snapshot list' tells which there are")]
    NoCheckpoint(String),
    /// A name that cannot be told from nothing.
    #[error("the name of a checkpoint must not be empty")]
    EmptyTag,
    /// The console's socket cannot be used.
    #[error("console {path}: {source}")]
    Console {
        /// The socket.
        path: String,
        /// What the host said.
        source: std::io::Error,
    },
    /// The demo did not go through.
    #[error(transparent)]
    Demo(#[from] demo::DemoError),
    /// Nothing can be printed.
    #[error("cannot print: {0}")]
    Output(std::io::Error),
}

fn with_cause(error: &ClientError) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

/// Does what the command line asks.
///
/// # Errors
/// See [`Error`].
pub fn run(subcommand: &Subcommand) -> Result<(), Error> {
    match subcommand {
        Subcommand::Snapshot(SnapshotCommand::Save(args)) => snapshots::save(args),
        Subcommand::Snapshot(SnapshotCommand::Load(args)) => snapshots::load(args),
        Subcommand::Snapshot(SnapshotCommand::Delete(args)) => snapshots::delete(args),
        Subcommand::Snapshot(SnapshotCommand::List(target)) => snapshots::list(target),
        Subcommand::Image(_) => Err(Error::NotAClient),
        Subcommand::Status(target) => status(target),
        Subcommand::Console { socket } => console::attach(socket),
        Subcommand::Demo(args) => demo::run(args),
    }
}

fn connect(target: &QmpTarget) -> Result<Client, Error> {
    Ok(Client::connect(&target.qmp)?)
}

fn status(target: &QmpTarget) -> Result<(), Error> {
    let mut client = connect(target)?;
    let mut ask = |command| client.execute(command, json!({}));
    let (name, status) = (ask("query-name")?, ask("query-status")?);
    let (cpus, disks) = (ask("query-cpus-fast")?, ask("query-block")?);
    if let Some(name) = name["name"].as_str() {
        println!("name:   {name}");
    }
    println!("state:  {}", text(&status["status"]));
    println!("vCPUs:  {}", cpus.as_array().map_or(0, Vec::len));
    for disk in disks.as_array().into_iter().flatten() {
        let node = &disk["inserted"];
        let access = if node["ro"] == json!(true) { "read-only" } else { "writable" };
        println!("disk:   {} {access} {}", text(&node["node-name"]), text(&node["file"]));
    }
    for job in ask("query-jobs")?.as_array().into_iter().flatten() {
        println!("job:    {} {} {}", text(&job["id"]), text(&job["type"]), text(&job["status"]));
    }
    Ok(())
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}
