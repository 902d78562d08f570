//! `--fork BASE#TAG`: a guest of its own from a checkpoint that nobody changes; `docs/forks.md`.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use block::qcow2::create::{CreateOptions, create};
use block::{Graph, Progress};
use serde_json::{Value, json};
use snapshot::{Checkpoint, Lineage, Stamp};
use uuid::Uuid;

use crate::control::work::IO_THREADS;
use crate::image;
use crate::machine::spec::MachineSpec;
use crate::machine::state::MachineState;
use crate::machine::{self, Machine, recorded};
use crate::memory;
use crate::restore::{self, Purpose, RestoreSpec};

/// What the guest's clocks do about the time between save and fork.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClockPolicy {
    /// They go on from the save.
    Frozen,
    /// They are set forward by it.
    Host,
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
        /// The directory for temporary files.
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
    clock: ClockPolicy,
    overlays: Vec<Overlay>,
}

impl Fork {
    /// Reads what the checkpoint records and makes an overlay for each disk that the guest may write.
    ///
    /// # Errors
    /// Something is missing, or a disk cannot be shared.
    pub fn plan(
        spec: &RestoreSpec,
        clock: ClockPolicy,
        given: &MachineSpec,
    ) -> Result<Self, Error> {
        let plan = restore::plan(spec, given, &[], Purpose::Fork)?;
        let mut fork = Self {
            machine: plan.machine,
            blockdevs: Vec::new(),
            base: spec.image.clone(),
            stamp: plan.stamp,
            vmstate: plan.vmstate,
            clock,
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
        let overlay = Overlay::create(self.overlays.len(), snapshot.disk_size)?;
        let path = overlay.0.display().to_string();
        self.overlays.push(overlay);
        Ok(json!({
            "driver": "qcow2",
            "node-name": node,
            "discard": "unmap",
            "file": { "driver": "file", "filename": path },
            "backing": {
                "driver": options["driver"],
                "read-only": true,
                "x-snapshot-id": snapshot.id,
                "file": { "driver": "file", "filename": file },
            },
        }))
    }

    /// Takes the overlays' names away, once they are open.
    pub fn forget_overlays(&mut self) {
        self.overlays.clear();
    }

    /// Puts the checkpoint on the machine, which was made as [`Fork::machine`] says. Gives where its
    /// guest comes from.
    ///
    /// # Errors
    /// The checkpoint cannot be used; the machine must not be run then.
    pub fn revive(&self, machine: &mut Machine, graph: &Graph) -> Result<Lineage, Error> {
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
        let mut state = MachineState::from_sections(checkpoint.sections(), machine.shape())?;
        let map = |piece| match memory::map_piece(&memory, &base, piece) {
            Ok(()) => true,
            Err(error) => {
                tracing::debug!("{piece:?} is read, not mapped: {error}");
                false
            }
        };
        let report = checkpoint.map_ram(&memory, IO_THREADS, &Progress::default(), map)?;
        tracing::info!("forked: {report:?}");
        if self.clock == ClockPolicy::Host {
            state.clock.kvmclock_ns = state.clock.kvmclock_ns.saturating_add(since(&self.stamp));
        }
        // The image that RAM is of is no node that this machine saves to: there is no base.
        machine.restore(&state, None)?;
        Ok(checkpoint.lineage())
    }
}

/// Nanoseconds of the host's time since a save; none if its clock was set back.
fn since(stamp: &Stamp) -> u64 {
    let then = std::time::Duration::new(stamp.date_sec.into(), stamp.date_nsec);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.saturating_sub(then).as_nanos()).unwrap_or(u64::MAX)
}

/// An image in the directory for temporary files; its name is removed when it is dropped.
#[derive(Debug)]
struct Overlay(PathBuf);

impl Overlay {
    fn create(index: usize, size: u64) -> Result<Self, Error> {
        let dir = std::env::temp_dir();
        let path = dir.join(format!("tardigrade-fork-{}-{index}.qcow2", Uuid::new_v4().simple()));
        let failed = |reason: String| Error::Overlay { dir: dir.clone(), reason };
        // A new file that nobody else may open: it is to have the guest's data.
        let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        made.map_err(|error| failed(error.to_string()))?;
        let overlay = Self(path);
        let options = CreateOptions { size, ..CreateOptions::default() };
        block::create_file(&overlay.0, false)
            .and_then(|file| create(&file, None, &options, &Progress::default()))
            .map_err(|error| failed(error.to_string()))?;
        Ok(overlay)
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            tracing::warn!("'{}' is left behind: {error}", self.0.display());
        }
    }
}
