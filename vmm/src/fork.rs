//! `--fork BASE#TAG`: a guest of its own from a checkpoint that nobody changes; `docs/forks.md`.

use std::cell::Cell;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::qcow2::create::{CreateOptions, create};
use block::{Graph, Progress};
use qmp::schema::LoadMode;
use serde_json::{Value, json};
use snapshot::{Checkpoint, Lineage, LoadError, MappedRam, Stamp};
use uuid::Uuid;

use crate::control::mailbox::Mailbox;
use crate::control::work::{IO_THREADS, LoadOptions, lazy_host};
use crate::image;
use crate::machine::missing::Missing;
use crate::machine::spec::MachineSpec;
use crate::machine::state::MachineState;
use crate::machine::{self, Machine, recorded};
use crate::memory;
use crate::restore::{self, Purpose, RestoreSpec};

/// What the command line says of a fork.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForkSpec {
    /// The checkpoint.
    pub checkpoint: RestoreSpec,
    /// The directory for overlays that are kept.
    pub overlays: Option<PathBuf>,
}

/// Why a checkpoint cannot be forked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The record cannot be had, or disks are missing.
    #[error(transparent)]
    Restore(#[from] restore::Error),
    /// An image cannot be looked at.
    #[error(transparent)]
    Image(#[from] image::Error),
    /// All forks would write to it.
    #[error(
        "disk '{node}' ('{file}') is writable and not in the checkpoint: forks would write to one file"
    )]
    Unsaved {
        /// The disk.
        node: String,
        /// Its file.
        file: String,
    },
    /// A disk has no snapshot of the same save.
    #[error(
        "disk '{node}' ('{file}') has no snapshot that was taken together with checkpoint '{tag}'"
    )]
    NotTogether {
        /// The disk.
        node: String,
        /// Its file.
        file: String,
        /// The checkpoint.
        tag: String,
    },
    /// An overlay cannot be made.
    #[error("cannot make an overlay in '{}': {reason}", .dir.display())]
    Overlay {
        /// The directory.
        dir: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The base cannot be mapped from.
    #[error("cannot open '{file}': {source}")]
    Base {
        /// The file.
        file: String,
        /// What the host says.
        source: std::io::Error,
    },
    /// The base is not what it was a moment ago.
    #[error("the checkpoint was replaced meanwhile")]
    Replaced,
    /// The checkpoint cannot be used.
    #[error(transparent)]
    Load(#[from] snapshot::LoadError),
    /// Its state cannot be used.
    #[error(transparent)]
    Format(#[from] snapshot::FormatError),
    /// It does not fit this host.
    #[error(transparent)]
    Machine(#[from] machine::Error),
}

/// A fork to be made.
#[derive(Debug)]
pub struct Fork {
    /// The machine.
    pub machine: MachineSpec,
    /// Block nodes to open.
    pub blockdevs: Vec<Value>,
    base: PathBuf,
    stamp: Stamp,
    vmstate: String,
    /// Where overlays are kept; none where they are not.
    kept_in: Option<PathBuf>,
    overlays: Vec<Overlay>,
}

impl Fork {
    /// Reads what the checkpoint records and makes an overlay for each disk that the guest may write.
    ///
    /// # Errors
    /// Something is missing, or a disk cannot be shared.
    pub fn plan(spec: &ForkSpec, given: &MachineSpec) -> Result<Self, Error> {
        let plan = restore::plan(&spec.checkpoint, given, &[], Purpose::Fork)?;
        let mut fork = Self {
            machine: plan.machine,
            blockdevs: Vec::new(),
            base: spec.checkpoint.image.clone(),
            stamp: plan.stamp,
            vmstate: plan.vmstate,
            kept_in: spec.overlays.clone(),
            overlays: Vec::new(),
        };
        fork.machine.forked = true;
        if given.uuid.is_nil() {
            fork.machine.uuid = Uuid::new_v4();
        }
        for options in plan.blockdevs {
            let options = match options["read-only"] {
                Value::Bool(false) => fork.overlay(&options, &plan.nodes)?,
                _ => options,
            };
            fork.blockdevs.push(options);
        }
        Ok(fork)
    }

    /// The options of an overlay over the disk with these options, as it was at the checkpoint.
    fn overlay(&mut self, options: &Value, saved: &[String]) -> Result<Value, Error> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (node, file) = (text(&options["node-name"]), text(&options["file"]["filename"]));
        if !saved.contains(&node) {
            return Err(Error::Unsaved { node, file });
        }
        let snapshots = {
            let (_user, node) = image::look(Path::new(&file))?;
            node.snapshots()
        };
        let Some(snapshot) = snapshots.iter().find(|s| Stamp::of(s) == self.stamp) else {
            return Err(Error::NotTogether { node, file, tag: self.stamp.tag.clone() });
        };
        // Absolute: whoever opens an overlay that is kept does it from anywhere.
        let file = std::path::absolute(&file).map_or(file, |path| path.display().to_string());
        let below = json!({
            "driver": options["driver"],
            "read-only": true,
            "x-snapshot-id": snapshot.id,
            "x-snapshot-date": snapshot.date_text(),
            "file": { "driver": "file", "filename": file },
        });
        let size = snapshot.disk_size;
        let overlay = match &self.kept_in {
            Some(dir) => Overlay::keep(dir, &node, size, &below)?,
            None => Overlay::create(self.overlays.len(), size)?,
        };
        let path = overlay.path.display().to_string();
        self.overlays.push(overlay);
        Ok(json!({
            "driver": "qcow2",
            "node-name": node,
            "discard": "unmap",
            "file": { "driver": "file", "filename": path },
            "backing": below,
        }))
    }

    /// The files of overlays that have names.
    pub fn overlays(&self) -> impl Iterator<Item = &Path> {
        self.overlays.iter().map(|overlay| overlay.path.as_path())
    }

    /// The overlays are open: those that are not kept lose their names.
    pub fn overlays_are_open(&mut self) {
        if self.kept_in.is_none() {
            self.overlays.clear();
        }
    }

    /// The guest is about to run: the overlays have what it writes from here on.
    pub fn keep_overlays(&self) {
        self.overlays.iter().for_each(|overlay| overlay.stays.set(true));
    }

    /// Puts the checkpoint on the machine, which was made as [`Fork::machine`] says. Gives where its
    /// guest comes from.
    ///
    /// # Errors
    /// The checkpoint cannot be used; the machine must not be run then.
    pub fn revive(
        &self,
        machine: &mut Machine,
        graph: &Graph,
        how: LoadOptions,
        mailbox: &Mailbox,
    ) -> Result<Lineage, Error> {
        let file = self.base.display().to_string();
        let base = File::open(&self.base).map_err(|source| Error::Base { file, source })?;
        let view = graph.get(&self.vmstate).and_then(|overlay| overlay.backing());
        let view = view.ok_or(Error::Replaced)?;
        let checkpoint = Checkpoint::open_state(&view, &self.stamp.tag)?;
        if Stamp::of(checkpoint.info()) != self.stamp {
            return Err(Error::Replaced);
        }
        let memory = machine.memory().clone();
        for difference in checkpoint.check_machine(&recorded::describe(machine), &memory)? {
            tracing::info!("forking '{}': {difference}", self.stamp.tag);
        }
        let state = MachineState::from_sections(checkpoint.sections(), machine.shape())?;
        let map = |piece| match memory::map_piece(&memory, &base, piece) {
            Ok(()) => true,
            Err(error) => {
                tracing::debug!("{piece:?} is read, not mapped: {error}");
                false
            }
        };
        let mapped = checkpoint.map_ram(&memory, map)?;
        let missing = match mapped.rest_bytes() {
            0 => None,
            _ => unmapped(&checkpoint, &mapped, machine, how.mode, mailbox)?,
        };
        let (bytes, rest) = (mapped.mapped_bytes(), mapped.rest_bytes());
        tracing::info!("forked: {bytes} bytes mapped, {rest} not");
        // The image that RAM is of is no node that this machine saves to: there is no base.
        machine.restore(&state, None)?;
        machine.set_clock(how.clock, &self.stamp);
        if let Some(missing) = missing {
            machine.set_missing(missing)?;
        }
        Ok(checkpoint.lineage())
    }
}

/// Has the RAM that is not mapped read: when it is needed, where that is wanted and the host lets us; else now.
fn unmapped(
    checkpoint: &Checkpoint,
    mapped: &MappedRam,
    machine: &Machine,
    mode: LoadMode,
    mailbox: &Mailbox,
) -> Result<Option<Arc<Missing>>, LoadError> {
    let memory = machine.memory();
    let Some(host) = lazy_host(mode) else {
        checkpoint.read_rest(mapped, memory, IO_THREADS)?;
        return Ok(None);
    };
    let presence = machine.devices().presence();
    Missing::lend(checkpoint, presence, mailbox, |notify| {
        checkpoint.lend_rest(mapped, host, memory, &Arc::default(), notify)
    })
    .map(Some)
}

/// An image for what a fork writes; its name is removed when it is dropped, unless it stays.
#[derive(Debug)]
struct Overlay {
    path: PathBuf,
    stays: Cell<bool>,
}

impl Overlay {
    /// In the directory for temporary files, for this process alone.
    fn create(index: usize, size: u64) -> Result<Self, Error> {
        let dir = std::env::temp_dir();
        let name = format!("tardigrade-fork-{}-{index}.qcow2", Uuid::new_v4().simple());
        Self::make(&dir, &name, &CreateOptions { size, ..CreateOptions::default() })
    }

    /// One that tells what is below it, and can be opened by itself later.
    fn keep(dir: &Path, node: &str, size: u64, below: &Value) -> Result<Self, Error> {
        let failed = |reason: String| Error::Overlay { dir: dir.to_owned(), reason };
        // The name is the image's: it must not lead anywhere else.
        if node.starts_with('.') || node.contains('/') {
            return Err(failed(format!("'{node}' cannot be the name of a file")));
        }
        std::fs::create_dir_all(dir).map_err(|error| failed(error.to_string()))?;
        let options = CreateOptions {
            size,
            backing_file: Some(format!("json:{below}")),
            backing_fmt: below["driver"].as_str().map(str::to_owned),
            ..CreateOptions::default()
        };
        Self::make(dir, &format!("{node}.qcow2"), &options)
    }

    fn make(dir: &Path, name: &str, options: &CreateOptions) -> Result<Self, Error> {
        let path = dir.join(name);
        let failed = |reason: String| Error::Overlay { dir: dir.to_owned(), reason };
        // A new file that nobody else may open: it is to have the guest's data.
        let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        made.map_err(|error| failed(format!("'{name}': {error}")))?;
        let overlay = Self { path, stays: Cell::new(false) };
        block::create_file(&overlay.path, block::FileHints::default())
            .and_then(|file| create(&file, None, options, &Progress::default()))
            .map_err(|error| failed(error.to_string()))?;
        Ok(overlay)
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        if self.stays.get() {
            return;
        }
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!("'{}' is left behind: {error}", self.path.display());
        }
    }
}
