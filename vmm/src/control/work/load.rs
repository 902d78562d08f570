//! snapshot-load, and reviving a checkpoint in a new process.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use block::{Node, Progress};
use devices::GuestMemory;
use snapshot::{Base, Checkpoint, MachineConfig};
use tracing::{info, warn};

use super::{Freeze, IO_THREADS, Outcome, Target, WorkContext, WorkError};
use crate::machine::state::{MachineState, Shape};

pub(super) fn load(target: &Target, context: &WorkContext) -> Outcome {
    let nodes = context.resolve(&target.devices)?;
    let revival = Revival::open(&nodes, target, &context.config, &context.memory, context.shape)?;
    context.freeze(Freeze::Load(Box::new(revival.state.clone())))?;
    // From here on a cancel is refused; this is the last one to be heard.
    if context.progress.check().is_err() {
        return Err(WorkError::Cancelled);
    }
    revival.read(&context.memory, false, &context.progress, &context.memory_lost)?;
    let base = revival.base();
    context.restore(revival.state, base)
}

/// A checkpoint on its way into a machine: checked and decoded, nothing touched yet.
pub struct Revival {
    checkpoint: Checkpoint,
    /// What the vCPUs and devices are to be.
    pub state: MachineState,
}

impl Revival {
    /// Finds the checkpoint and checks all that can be checked without touching the guest.
    ///
    /// # Errors
    /// It is not there, not whole, or of another machine.
    pub fn open(
        nodes: &[Arc<Node>],
        target: &Target,
        config: &MachineConfig,
        memory: &GuestMemory,
        shape: Shape,
    ) -> Result<Self, WorkError> {
        let checkpoint = Checkpoint::open(nodes, &target.vmstate, &target.tag)?;
        for difference in checkpoint.check_machine(config, memory)? {
            warn!("loading '{}': {difference}", target.tag);
        }
        let unfit = |error| {
            let Target { tag, vmstate, .. } = target;
            WorkError::Failed(format!("Snapshot '{tag}' on '{vmstate}': {error}"))
        };
        let state = MachineState::from_sections(checkpoint.sections(), shape).map_err(unfit)?;
        Ok(Self { checkpoint, state })
    }

    /// What RAM equals once it has been read.
    pub fn base(&self) -> Base {
        self.checkpoint.base()
    }

    /// Reads RAM and takes the disks back. The guest must be stopped. `memory_lost` is set when its
    /// memory begins to be replaced; a failure before that leaves the guest whole, one after it
    /// the disks. `fresh` memory was never used.
    pub fn read(
        &self,
        memory: &GuestMemory,
        fresh: bool,
        progress: &Progress,
        memory_lost: &AtomicBool,
    ) -> Outcome {
        let disks = self.checkpoint.prepare_disks()?;
        memory_lost.store(true, Ordering::Release);
        let report = self.checkpoint.read_ram(memory, fresh, IO_THREADS, progress)?;
        info!("loaded {report:?}");
        disks.revert()?;
        Ok(())
    }
}
