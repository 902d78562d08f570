//! The block side of the program: nodes, the NBD server and its exports, and the QMP commands about
//! them. It is the same beside a guest and without one (`--machine none`).
//!
//! ```text
//!   main thread ── block commands ──> worker thread (one, in order) ── graph, NBD server
//!                                          └── answers the client itself
//! ```
//!
//! Opening, flushing and closing images takes as long as the disk takes, so no such command runs on
//! the main thread. A client's next command is read only after its answer, so it sees its commands
//! done in order whichever thread does them.

mod bitmaps;
pub mod exports;
pub mod graph;
pub mod jobs;
pub mod transaction;
pub mod worker;

use std::sync::{Arc, OnceLock};

use block::Graph;
use qmp::schema::{
    BitmapArguments, BlockResizeArguments, Command, Event, QueryCheckpointsArguments,
    TransactionAction, TransactionArguments,
};
use serde_json::{Value, json};

use crate::checkpoints::{self, CurrentLineage};
use crate::control::monitor;
use exports::{ExportSpec, Exports, NbdServerSpec};
use jobs::JobList;

/// What a command comes to.
pub type Answer = Result<Value, qmp::Error>;

/// Nodes and exports.
pub struct Blocks {
    graph: Arc<Graph>,
    exports: Exports,
    jobs: JobList,
    lineage: Arc<CurrentLineage>,
    resized: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

/// Whether a command is for [`Blocks::execute`].
pub fn is_block_command(command: &Command) -> bool {
    matches!(
        command,
        Command::QueryNamedBlockNodes(_)
            | Command::BlockdevAdd(_)
            | Command::BlockdevDel(_)
            | Command::BlockdevReopen(_)
            | Command::BlockResize(_)
            | Command::BlockdevSnapshot(_)
            | Command::BlockdevSnapshotSync(_)
            | Command::ChangeBackingFile(_)
            | Command::NbdServerStart(_)
            | Command::NbdServerStop
            | Command::BlockExportAdd(_)
            | Command::BlockExportDel(_)
            | Command::QueryBlockExports
            | Command::BlockDirtyBitmapAdd(_)
            | Command::BlockDirtyBitmapRemove(_)
            | Command::BlockDirtyBitmapClear(_)
            | Command::BlockDirtyBitmapEnable(_)
            | Command::BlockDirtyBitmapDisable(_)
            | Command::BlockDirtyBitmapMerge(_)
            | Command::QueryCheckpoints(_)
            | Command::BlockdevCreate(_)
            | Command::BlockdevBackup(_)
            | Command::BlockdevMirror(_)
            | Command::DriveBackup(_)
            | Command::DriveMirror(_)
            | Command::BlockCommit(_)
            | Command::BlockStream(_)
            | Command::Transaction(_)
            | Command::InternalSnapshot(_)
            | Command::InternalSnapshotDelete(_)
    )
}

impl Blocks {
    /// The block side with the nodes of `graph`; `events` hears of exports that go and of damage.
    pub fn new(graph: Arc<Graph>, events: qmp::Events) -> Self {
        let damage = events.clone();
        graph.on_corruption(move |node, corruption| {
            damage.emit(&Event::BlockImageCorrupted {
                device: String::new(),
                node_name: Some(node.to_owned()),
                msg: corruption.reason.clone(),
                offset: corruption.offset.and_then(|offset| i64::try_from(offset).ok()),
                size: corruption.size.and_then(|size| i64::try_from(size).ok()),
                fatal: corruption.fatal,
            });
        });
        let exports = Exports::new(Arc::clone(&graph), events.clone());
        Self {
            graph,
            exports,
            jobs: JobList::new(events),
            lineage: Arc::default(),
            resized: OnceLock::new(),
        }
    }

    /// `hook` is called after each block_resize that was made, on the thread that made it. The first
    /// one given counts.
    pub fn on_resize(&self, hook: impl Fn() + Send + Sync + 'static) {
        // There is one machine.
        let _ = self.resized.set(Box::new(hook));
    }

    /// The nodes.
    pub fn graph(&self) -> &Arc<Graph> {
        &self.graph
    }

    /// Where the machine's guest comes from.
    pub fn lineage(&self) -> &Arc<CurrentLineage> {
        &self.lineage
    }

    /// The jobs, those of checkpoints too.
    pub fn jobs(&self) -> &JobList {
        &self.jobs
    }

    /// The NBD server and its exports.
    pub fn exports(&self) -> &Exports {
        &self.exports
    }

    /// Carries out a block command; takes as long as it takes.
    ///
    /// # Errors
    /// With QEMU's text where QEMU has one.
    pub fn execute(&self, command: Command) -> Answer {
        match command {
            Command::QueryNamedBlockNodes(arguments) => {
                self.named_nodes(arguments.flat.unwrap_or(false))
            }
            Command::BlockdevAdd(options) => {
                self.graph.add(&Value::Object(options.0)).map_err(failed)?;
                done()
            }
            Command::BlockdevDel(arguments) => {
                self.graph.remove(&arguments.node_name).map_err(failed)?;
                done()
            }
            Command::BlockdevReopen(arguments) => {
                let options: Vec<Value> =
                    arguments.options.into_iter().map(|options| options.0).collect();
                self.graph.reopen(&options).map_err(failed)?;
                done()
            }
            Command::BlockResize(arguments) => self.resize(&arguments),
            Command::BlockdevSnapshot(arguments) => self.snapshot(&arguments).and_then(|()| done()),
            Command::BlockdevSnapshotSync(arguments) => {
                self.snapshot_sync(&arguments).and_then(|()| done())
            }
            Command::ChangeBackingFile(arguments) => {
                self.change_backing_file(&arguments).and_then(|()| done())
            }
            Command::NbdServerStart(arguments) => {
                self.exports.start(&NbdServerSpec::from_arguments(arguments)?)?;
                done()
            }
            Command::NbdServerStop => {
                self.exports.stop()?;
                done()
            }
            Command::BlockExportAdd(options) => {
                self.exports.add(ExportSpec::from_options(options)?)?;
                done()
            }
            Command::BlockExportDel(arguments) => {
                self.exports.remove(&arguments.id, arguments.mode)?;
                done()
            }
            Command::QueryBlockExports => {
                serde_json::to_value(self.exports.list()).map_err(|error| text(error.to_string()))
            }
            Command::BlockDirtyBitmapAdd(arguments) => {
                self.add_bitmap(&arguments).and_then(|()| done())
            }
            Command::BlockDirtyBitmapRemove(BitmapArguments { node, name }) => {
                self.with_bitmaps(&node, |node| node.remove_bitmap(&name)).and_then(|()| done())
            }
            Command::BlockDirtyBitmapClear(BitmapArguments { node, name }) => {
                self.with_bitmaps(&node, |node| node.clear_bitmap(&name)).and_then(|()| done())
            }
            Command::BlockDirtyBitmapEnable(BitmapArguments { node, name }) => self
                .with_bitmaps(&node, |node| node.enable_bitmap(&name, true))
                .and_then(|()| done()),
            Command::BlockDirtyBitmapDisable(BitmapArguments { node, name }) => self
                .with_bitmaps(&node, |node| node.enable_bitmap(&name, false))
                .and_then(|()| done()),
            Command::BlockDirtyBitmapMerge(arguments) => {
                self.merge_bitmaps(&arguments).and_then(|()| done())
            }
            Command::QueryCheckpoints(arguments) => self.checkpoints(&arguments),
            Command::BlockdevBackup(arguments) => self.backup(&arguments).and_then(|()| done()),
            Command::BlockdevMirror(arguments) => self.mirror(arguments).and_then(|()| done()),
            Command::DriveBackup(arguments) => self.drive_backup(&arguments).and_then(|()| done()),
            Command::DriveMirror(arguments) => self.drive_mirror(arguments).and_then(|()| done()),
            Command::BlockCommit(arguments) => self.commit(arguments).and_then(|()| done()),
            Command::BlockStream(arguments) => self.stream(arguments).and_then(|()| done()),
            Command::Transaction(arguments) => self.transaction(&arguments),
            Command::InternalSnapshot(arguments) => self.transaction(&TransactionArguments {
                actions: vec![TransactionAction::InternalSnapshot(arguments)],
                properties: None,
            }),
            Command::InternalSnapshotDelete(arguments) => self.delete_internal_snapshot(&arguments),
            Command::HumanMonitorCommand(arguments) => {
                Ok(Value::from(monitor::qemu_io::run(&self.graph, &arguments.command_line)))
            }
            Command::BlockdevCreate(arguments) => {
                self.create_image(arguments).and_then(|()| done())
            }
            other => Err(qmp::Error::command_not_found(other.name())),
        }
    }

    /// The checkpoints on the nodes that are named, or on all that a save could be made to.
    fn checkpoints(&self, arguments: &QueryCheckpointsArguments) -> Answer {
        let nodes = match &arguments.devices {
            Some(names) => snapshot::resolve(names, |name| self.graph.get(name))
                .map_err(|error| text(error.to_string()))?,
            None => {
                let mut nodes = self.graph.list();
                nodes.retain(|n| !n.read_only() && n.access().supports_snapshots());
                // The list has the newest first.
                nodes.reverse();
                nodes
            }
        };
        let query = checkpoints::Query {
            tag: arguments.tag.as_deref(),
            sizes: arguments.sizes.unwrap_or(true),
        };
        let found = checkpoints::query(&nodes, &self.lineage.get(), query).map_err(failed)?;
        serde_json::to_value(found).map_err(|error| text(error.to_string()))
    }

    /// Backends have no names here, so `device` is never found, as in QEMU for such nodes.
    fn resize(&self, arguments: &BlockResizeArguments) -> Answer {
        let device = arguments.device.as_deref().unwrap_or_default();
        let name = arguments.node_name.as_deref().unwrap_or_default();
        if self.graph.get(name).is_none() {
            let words = format!("Cannot find device='{device}' nor node-name='{name}'");
            return Err(text(words));
        }
        let size = u64::try_from(arguments.size)
            .map_err(|_| qmp::Error::out_of_range("size", "a >0 size"))?;
        self.graph.resize(name, size).map_err(failed)?;
        if let Some(tell) = self.resized.get() {
            tell();
        }
        done()
    }

    /// The nodes, newest first. `flat` leaves out what their images say of backing images.
    fn named_nodes(&self, flat: bool) -> Answer {
        let infos = self.graph.infos(flat).map_err(failed)?;
        serde_json::to_value(infos).map_err(|error| text(error.to_string()))
    }

    /// Ends all exports, then makes every image durable and tells it that it is closed. Nobody else
    /// may use the nodes any more.
    ///
    /// # Errors
    /// An image could not be written; the others are closed all the same.
    pub fn close(&self) -> block::Result<()> {
        // There may be no server.
        let _ = self.exports.stop();
        self.graph.close_images()
    }
}

fn done() -> Answer {
    Ok(json!({}))
}

fn text(text: impl Into<String>) -> qmp::Error {
    qmp::Error::generic(text)
}

/// The error as clients get it.
#[allow(clippy::needless_pass_by_value, reason = "for map_err")]
fn failed(error: block::Error) -> qmp::Error {
    text(error.to_string())
}
