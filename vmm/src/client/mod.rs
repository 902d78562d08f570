//! Subcommands: what people do with a machine that runs already, over its sockets.

mod console;
mod demo;
mod snapshots;

use qmp::ErrorClass;
use qmp::client::{Client, ClientError};
use serde_json::{Value, json};

pub use demo::DemoError;

use crate::cli::args::{QmpTarget, SnapshotCommand, Subcommand};
use crate::image;

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
    /// The machine answers something of another type.
    #[error("the machine's answer to {command} is not understood: {source}")]
    Unread {
        /// What was asked.
        command: &'static str,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// An image cannot be used.
    #[error(transparent)]
    Image(#[from] image::Error),
    /// A label without a value.
    #[error("--label {0}: is not KEY=VALUE")]
    Label(String),
    /// The machine has nothing to keep a checkpoint on.
    #[error("the machine has no writable disk that could hold a checkpoint")]
    NoDisk,
    /// It has no guest.
    #[error(
        "a storage daemon (--machine none) listens there: it has no guest that could be frozen; \
         'tardigrade image snapshot' has the snapshots of images that nobody uses"
    )]
    NoGuest,
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
        Subcommand::Snapshot(SnapshotCommand::List(args)) => snapshots::list(args),
        Subcommand::Snapshot(SnapshotCommand::Show(args)) => snapshots::show(args),
        Subcommand::Image(_) => Err(Error::NotAClient),
        Subcommand::Status(target) => status(target),
        Subcommand::Console { socket } => console::attach(socket),
        Subcommand::Demo(args) => demo::run(args),
    }
}

fn connect(target: &QmpTarget) -> Result<Client, Error> {
    Ok(Client::connect(&target.qmp)?)
}

/// A client of a machine with a guest, which a storage daemon is not.
fn connect_to_guest(target: &QmpTarget) -> Result<Client, Error> {
    let mut client = connect(target)?;
    match run_state(&mut client)? {
        Some(_) => Ok(client),
        None => Err(Error::NoGuest),
    }
}

/// The guest's run state; `None` where there is no guest, and so no command that asks for it.
fn run_state(client: &mut Client) -> Result<Option<String>, Error> {
    match client.execute("query-status", json!({})) {
        Ok(status) => Ok(Some(text(&status["status"]).to_owned())),
        Err(ClientError::Command(error)) if error.class == ErrorClass::CommandNotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn status(target: &QmpTarget) -> Result<(), Error> {
    let mut client = connect(target)?;
    match run_state(&mut client)? {
        Some(state) => guest_status(&mut client, &state)?,
        None => daemon_status(&mut client)?,
    }
    for export in list(&mut client, "query-block-exports")? {
        println!("export: {} of {}", text(&export["id"]), text(&export["node-name"]));
    }
    for job in list(&mut client, "query-jobs")? {
        println!("job:    {} {} {}", text(&job["id"]), text(&job["type"]), text(&job["status"]));
    }
    Ok(())
}

fn guest_status(client: &mut Client, state: &str) -> Result<(), Error> {
    let name = client.execute("query-name", json!({}))?;
    if let Some(name) = name["name"].as_str() {
        println!("name:   {name}");
    }
    println!("state:  {state}");
    println!("vCPUs:  {}", list(client, "query-cpus-fast")?.len());
    for disk in list(client, "query-block")? {
        print_node("disk", &disk["inserted"]);
    }
    Ok(())
}

fn daemon_status(client: &mut Client) -> Result<(), Error> {
    println!("state:  storage daemon, no guest");
    for node in list(client, "query-named-block-nodes")? {
        // The rest was opened as a part of others.
        if !text(&node["node-name"]).starts_with('#') {
            print_node("node", &node);
        }
    }
    Ok(())
}

fn print_node(what: &str, node: &Value) {
    let access = if node["ro"] == json!(true) { "read-only" } else { "writable" };
    println!("{what}:   {} {access} {}", text(&node["node-name"]), text(&node["file"]));
}

fn list(client: &mut Client, command: &'static str) -> Result<Vec<Value>, Error> {
    match client.execute(command, json!({}))? {
        Value::Array(items) => Ok(items),
        _ => Err(Error::Answer { command, member: "the list" }),
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}
