//! External snapshots: blockdev-snapshot and blockdev-snapshot-sync, in steps, so that a transaction can
//! make several of them at one moment or none.
//!
//! ```text
//!   prepare ──> commit ──> finish
//!      │           │
//!      └───────────┴─────> abort
//! ```
//!
//! `prepare` does all I/O: the node is flushed, the overlay is created and opened; nobody sees any of it.
//! `commit` changes memory only: the overlay takes the place of the node, requests being held meanwhile.
//! `finish` has the node refuse writes, as far as it can. A crash before `commit` leaves an overlay
//! that nobody uses; after it, the overlay names its backing file since it was created.
//!
//! **Order.** The overlay is durable, with the name of its backing file in it, before it is used.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::build;
use super::open::{Opener, not_found};
use super::options::{NodeOptions, Source};
use super::{Attachment, Graph, Step, User, locks};
use crate::perm::Perm;
use crate::qcow2::create::{CreateOptions, create};
use crate::{Error, Progress, Result, create_file};

/// Where the overlay comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Overlay {
    /// A node that is there (blockdev-snapshot).
    Node(String),
    /// A file (blockdev-snapshot-sync).
    File {
        /// Its path.
        filename: String,
        /// The name of the overlay's node; one is made up without it.
        node_name: Option<String>,
        /// Its format; "qcow2" without it.
        format: Option<String>,
        /// Whether it is there already; otherwise it is created.
        existing: bool,
    },
}

/// An external snapshot that is being made. Dropped before its commit, it is aborted.
pub struct ExternalSnapshot {
    graph: Graph,
    node: String,
    overlay: String,
    was_read_only: bool,
    /// A file that was not there before.
    made: Option<PathBuf>,
    /// Keeps the overlay's node although nobody uses it yet.
    keep: Option<Attachment>,
    committed: bool,
}

impl ExternalSnapshot {
    /// Does everything but putting the overlay in its place. Works on a node that is held
    /// ([`Graph::hold`]), too.
    ///
    /// # Errors
    /// With QEMU's texts; everything is as it was then.
    pub fn prepare(graph: &Graph, node: &str, overlay: &Overlay) -> Result<Self> {
        let old = graph.get(node).ok_or_else(|| not_found(node))?;
        graph.check_unclaimed(node)?;
        graph.state().check_no_overlay(node)?;
        let was_read_only = old.read_only();
        if !was_read_only {
            // Not through the gate, which may be closed: nobody waits for these requests.
            old.format().flush()?;
        }
        let (overlay, made) = match overlay {
            Overlay::Node(name) => {
                graph.get(name).ok_or_else(|| not_found(name))?;
                (name.clone(), None)
            }
            Overlay::File { filename, node_name, format, existing } => {
                let format = format.as_deref().unwrap_or("qcow2");
                let path = check_path(filename)?;
                if let Some(name) = node_name
                    && graph.get(name).is_some()
                {
                    return Err(Error::Invalid("New overlay node-name already in use".to_owned()));
                }
                let made = match existing {
                    true => None,
                    false => create_overlay(&old, path, format)?,
                };
                match graph.open_overlay(&old, path, format, node_name.as_deref()) {
                    Ok(name) => (name, made),
                    Err(error) => {
                        unlink(made);
                        return Err(error);
                    }
                }
            }
        };
        // From here on its drop cleans up.
        let mut snapshot = Self {
            graph: graph.clone(),
            node: node.to_owned(),
            overlay: overlay.clone(),
            was_read_only,
            made,
            keep: None,
            committed: false,
        };
        let keep = graph.attach(&overlay, User::unnamed(Perm::empty(), Perm::all()));
        snapshot.keep = Some(keep?);
        graph.check_overlay(&overlay)?;
        graph.check_change(&append(node, &overlay))?;
        Ok(snapshot)
    }

    /// The name of the overlay's node.
    pub fn overlay(&self) -> &str {
        &self.overlay
    }

    /// Puts the overlay in the place of the node. Only memory changes.
    ///
    /// # Errors
    /// If something came in between that [`ExternalSnapshot::prepare`] did not see; nothing changed then.
    pub fn commit(&mut self) -> Result<()> {
        // Another snapshot of the same transaction may have taken either of them meanwhile.
        self.graph.state().check_no_overlay(&self.node)?;
        self.graph.check_overlay(&self.overlay)?;
        self.graph.change(&append(&self.node, &self.overlay))?;
        self.committed = true;
        Ok(())
    }

    /// After the commit: has the node below refuse writes. Requests must not be held.
    pub fn finish(mut self) {
        self.made = None;
        if !self.was_read_only
            && let Err(error) = self.graph.set_read_only(&self.node, true)
        {
            // It is in nobody's way: who uses it through the overlay does not write to it.
            tracing::debug!(node = self.node, "stays writable below its overlay: {error}");
        }
    }

    /// Undoes everything, the commit too, and removes an overlay that was created.
    pub fn abort(mut self) {
        self.undo();
    }

    fn undo(&mut self) {
        if std::mem::take(&mut self.committed) {
            let back = [
                Step::Replace { from: self.overlay.clone(), to: self.node.clone() },
                Step::Backing { node: self.overlay.clone(), backing: None },
            ];
            if let Err(error) = self.graph.change(&back) {
                tracing::error!(node = self.node, "the overlay stays in its place: {error}");
                self.made = None;
            }
        }
        // The node goes with its last user.
        self.keep = None;
        unlink(self.made.take());
    }
}

impl Drop for ExternalSnapshot {
    fn drop(&mut self) {
        if !self.committed {
            self.undo();
        }
    }
}

fn append(node: &str, overlay: &str) -> [Step; 2] {
    [
        Step::Backing { node: overlay.to_owned(), backing: Some(node.to_owned()) },
        Step::Replace { from: node.to_owned(), to: overlay.to_owned() },
    ]
}

pub(super) fn unlink(made: Option<PathBuf>) {
    if let Some(path) = made
        && let Err(error) = std::fs::remove_file(&path)
    {
        tracing::warn!(file = %path.display(), "an overlay that is not used stays: {error}");
    }
}

/// The path of a name, which may have the protocol `file:`.
pub(super) fn check_path(filename: &str) -> Result<&Path> {
    let before_slash = filename.split('/').next().unwrap_or_default();
    match before_slash.split_once(':') {
        Some(("file", _)) => Ok(Path::new(&filename["file:".len()..])),
        Some((protocol, _)) => Err(Error::Invalid(format!("Unknown protocol '{protocol}'"))),
        None => Ok(Path::new(filename)),
    }
}

/// Creates an overlay of a node; gives the path if there was no such file before.
fn create_overlay(old: &crate::Node, path: &Path, format: &str) -> Result<Option<PathBuf>> {
    match format {
        "qcow2" => {}
        "raw" => {
            return Err(Error::Invalid(
                "Backing file not supported for file format 'raw'".to_owned(),
            ));
        }
        other => return Err(Error::Invalid(format!("Unknown file format '{other}'"))),
    }
    let backing = build::name_for_overlay(old, path);
    if Path::new(&backing) == path {
        return Err(Error::Invalid(
            "Error: Trying to create an image with the same filename as the backing file"
                .to_owned(),
        ));
    }
    let options = CreateOptions {
        size: old.size(),
        backing_file: Some(backing),
        backing_fmt: Some(old.driver().to_owned()),
        ..CreateOptions::default()
    };
    options.validate(false)?;
    let fresh = !path.exists();
    let storage = create_file(path, crate::FileHints::default())?;
    let made = fresh.then(|| path.to_owned());
    match create(&storage, None, &options, &Progress::default()) {
        Ok(()) => Ok(made),
        Err(error) => {
            unlink(made);
            Err(error)
        }
    }
}

impl Graph {
    /// Opens an overlay without a backing file, writable and cached as the node it is for; gives its
    /// node's name. Nobody uses it yet, and it goes with its last user.
    fn open_overlay(
        &self,
        old: &crate::Node,
        path: &Path,
        format: &str,
        node_name: Option<&str>,
    ) -> Result<String> {
        let mut options = json!({
            "driver": format,
            "file": {"driver": "file", "filename": path.display().to_string()},
        });
        if let Some(name) = node_name {
            options["node-name"] = json!(name);
        }
        if format == "qcow2" {
            options["backing"] = serde_json::Value::Null;
        }
        let flags = old.details().flags;
        let mut options = NodeOptions::parse(&options, Source::Json)?;
        options.unmap = flags.unmap;
        self.open_implicit(&options, flags)
    }

    /// Opens a node that nobody uses yet, and that goes with its last user; gives its name.
    pub(super) fn open_implicit(
        &self,
        options: &NodeOptions,
        flags: build::Flags,
    ) -> Result<String> {
        let mut state = self.state();
        let opener =
            Opener::new(&state.nodes, state.edges.clone(), state.next, state.damage.clone())?;
        match opener.open_implicit(options, flags) {
            Ok(opened) => {
                state.add_nodes(opened.made);
                state.edges = opened.edges;
                state.next = opened.next;
                Ok(opened.root.name().to_owned())
            }
            Err(error) => {
                state.put_locks_back();
                Err(error)
            }
        }
    }

    /// What can be said against a node as an overlay.
    fn check_overlay(&self, overlay: &str) -> Result<()> {
        let refuse = |text: &str| Err(Error::Invalid(text.to_owned()));
        let state = self.state();
        let node = state.get(overlay).ok_or_else(|| not_found(overlay))?;
        let uses = locks::check(&state.edges, &state.nodes)?;
        // A mirror's target may become one: what writes only does not mind what is read.
        if locks::of(node, &uses).used.contains(Perm::CONSISTENT_READ) {
            return refuse("The overlay is already in use");
        }
        if node.driver() == "compress" {
            return refuse("Filters cannot be used as overlays");
        }
        if node.backing().is_some() {
            return refuse("The overlay already has a backing image");
        }
        if node.qcow2().is_none() {
            return refuse("The overlay does not support backing images");
        }
        Ok(())
    }
}
