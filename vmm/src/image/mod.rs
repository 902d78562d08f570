//! `tardigrade image`: work on images that no machine uses, with qemu-img's options, texts and exit
//! statuses. Images are opened through the block graph, so they are locked as QEMU locks them.

mod bitmap;
mod check;
mod convert;
mod create;
pub(crate) mod info;
mod options;
mod resize;
pub(crate) mod snapshots;
pub(crate) mod text;
mod watch;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use block::{Attachment, Graph, Node, Perm, User};
use qmp::schema::CheckpointInfo;
use serde_json::{Map, Value, json};
use snapshot::Lineage;

use crate::checkpoints::{self, Query};
use crate::cli::image::ImageCommand;

/// The exit status of a check of a format that has none.
const CANNOT_CHECK: u8 = 63;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An image cannot be used as asked.
    #[error("{file}: {source}")]
    Image {
        /// The image.
        file: String,
        /// What the block layer says.
        source: block::Error,
    },
    /// Something on the command line.
    #[error("{0}")]
    Usage(String),
    /// Nothing can be printed.
    #[error("cannot print: {0}")]
    Output(#[from] std::io::Error),
}

impl Error {
    /// Of something that is named elsewhere.
    #[allow(clippy::needless_pass_by_value, reason = "for map_err")]
    fn from_block(error: block::Error) -> Self {
        Self::Usage(error.to_string())
    }
}

type Result<T> = std::result::Result<T, Error>;

/// Does what the command line asks; errors go to stderr.
pub fn run(command: &ImageCommand) -> ExitCode {
    let done = match command {
        ImageCommand::Create(args) => create::run(args),
        ImageCommand::Info(args) => info::run(args),
        ImageCommand::Check(args) => check::run(args),
        ImageCommand::Resize(args) => resize::run(args),
        ImageCommand::Snapshot(command) => snapshots::run(command),
        ImageCommand::Bitmap(command) => bitmap::run(command),
        ImageCommand::Convert(args) => convert::run(args),
    };
    match done {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("tardigrade: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Prints to stdout, which may be gone.
fn say(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// Names the image that a block error is about.
fn of(file: &Path) -> impl FnOnce(block::Error) -> Error {
    let file = file.display().to_string();
    |source| match source {
        // These name the file themselves.
        source @ (block::Error::Open { .. }
        | block::Error::Backing { .. }
        | block::Error::Locked { .. }) => Error::Usage(source.to_string()),
        source => Error::Image { file, source },
    }
}

/// Prints a value as JSON for programs.
fn say_json(value: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Error::Usage(e.to_string()))?;
    say(&format!("{text}\n"))
}

/// The format of an image: the one given, or what its first bytes tell.
fn format_of(file: &Path, given: Option<&str>) -> Result<&'static str> {
    match given {
        Some("qcow2") => Ok("qcow2"),
        Some("raw") => Ok("raw"),
        Some(other) => Err(Error::Usage(format!("Unknown file format '{other}'"))),
        None => block::probe_format(file).map_err(|error| match error {
            // These name the file themselves.
            block::Error::NotSupported(text) => Error::Usage(text),
            error => of(file)(error),
        }),
    }
}

/// What opens an image: the options of its node, which are the name itself if that is `json:` and
/// options, whatever `format` says, as in QEMU.
fn node_options(file: &Path, format: Option<&str>) -> Result<Map<String, Value>> {
    if let Some(text) = file.to_str().and_then(|name| name.strip_prefix("json:")) {
        return block::graph::text::object(text, "driver").map_err(of(file));
    }
    let mut options = Map::new();
    options.insert("driver".to_owned(), format_of(file, format)?.into());
    let below = json!({"driver": "file", "filename": file.display().to_string()});
    options.insert("file".to_owned(), below);
    Ok(options)
}

/// The host file at the bottom of an image's node.
fn host_file(file: &Path, options: &Map<String, Value>) -> PathBuf {
    let mut at = options;
    while let Some(below) = at.get("file").and_then(Value::as_object) {
        at = below;
    }
    match at.get("filename").and_then(Value::as_str) {
        Some(name) => PathBuf::from(name),
        None => file.to_owned(),
    }
}

/// How an image is opened.
#[derive(Debug, Clone, Copy, Default)]
struct Access {
    writable: bool,
    force_share: bool,
    /// Leave the backing file alone.
    alone: bool,
}

/// Opens an image read-only and without its backing file, for a look at its snapshots; until the use
/// that comes with it is dropped nobody writes to it.
///
/// # Errors
/// It is not an image, or somebody writes to it.
pub fn look(file: &Path) -> Result<(Attachment, Arc<Node>)> {
    open(file, None, Access { alone: true, ..Access::default() })
}

/// The checkpoints in images that nobody writes to, each image a disk of the same machine; with their
/// machines where a `tag` is asked for. Their nodes are called by the names of the files.
///
/// # Errors
/// An image cannot be opened or read.
pub fn checkpoints(
    files: &[PathBuf],
    tag: Option<&str>,
    force_share: bool,
) -> Result<Vec<CheckpointInfo>> {
    let access = Access { force_share, alone: true, ..Access::default() };
    let graph = Graph::new();
    let open_one =
        |(at, file): (usize, &PathBuf)| open_in(&graph, &node_name(at), file, None, access);
    let opened = files.iter().enumerate().map(open_one).collect::<Result<Vec<_>>>()?;
    let nodes: Vec<_> = opened.iter().map(|(_, node)| Arc::clone(node)).collect();
    let query = Query { tag, sizes: true };
    let mut found = checkpoints::query(&nodes, &Lineage::default(), query)
        .map_err(|error| Error::Usage(error.to_string()))?;
    let file_of = |name: &str| {
        let at = (0..files.len()).find(|at| node_name(*at) == name);
        at.map_or_else(|| name.to_owned(), |at| files[at].display().to_string())
    };
    for info in &mut found {
        info.vmstate = info.vmstate.as_deref().map(file_of);
        for place in &mut info.places {
            place.node_name = file_of(&place.node_name);
        }
    }
    Ok(found)
}

fn node_name(at: usize) -> String {
    format!("image{at}")
}

/// Opens an image as a node of a graph of its own, which ends with the use that is given back: until
/// then the image and those below it are locked, raw ones too.
fn open(file: &Path, format: Option<&str>, access: Access) -> Result<(Attachment, Arc<Node>)> {
    open_in(&Graph::new(), "image", file, format, access)
}

/// As [`open`], as the node `name` of a graph.
fn open_in(
    graph: &Graph,
    name: &str,
    file: &Path,
    format: Option<&str>,
    access: Access,
) -> Result<(Attachment, Arc<Node>)> {
    let mut options = node_options(file, format)?;
    let mut set = |name: &str, value: Value| options.insert(name.to_owned(), value);
    set("node-name", name.into());
    set("read-only", (!access.writable).into());
    set("force-share", access.force_share.into());
    set("discard", "unmap".into());
    if access.alone && options.get("driver").and_then(Value::as_str) == Some("qcow2") {
        options.insert("backing".to_owned(), Value::Null);
    }
    let node = graph.add(&Value::Object(options)).map_err(of(file))?;
    let mut used = Perm::CONSISTENT_READ;
    used.set(Perm::WRITE | Perm::RESIZE, access.writable);
    let shared = if access.force_share {
        Perm::all()
    } else {
        Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED
    };
    let user = graph.attach(name, User::unnamed(used, shared)).map_err(of(file))?;
    Ok((user, node))
}
