//! snapshot-load, and reviving a checkpoint in a new process.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use block::{Node, Progress};
use devices::{GuestMemory, Presence};
use qmp::schema::LoadMode;
use snapshot::load::PreparedDisks;
use snapshot::{Base, Checkpoint, LazyHost, Lineage, MachineConfig, Orders, Rewinder, Stamp};
use tracing::{info, warn};

use super::{
    Freeze, IO_THREADS, LoadOptions, Loaded, Outcome, Target, WorkContext, WorkError, WorkMessage,
};
use crate::control::mailbox::Mailbox;
use crate::control::rewind::Rewind;
use crate::machine::missing::Missing;
use crate::machine::recorded;
use crate::machine::state::{MachineState, Shape};
use crate::memory;

pub(super) fn load(target: &Target, how: LoadOptions, context: &WorkContext) -> Outcome {
    let nodes = context.resolve(&target.devices)?;
    let revival = Revival::open(&nodes, target, &context.config, &context.memory, context.shape)?;
    let host = lazy_host(how.mode);
    let disks = revival.prepare_disks()?;
    if context.missing.is_none() {
        // KVM has to forget all of RAM, which takes long and would prolong the pause. A slot is only made once
        // no vCPU is in KVM's own access to a page: one that cannot be read would keep it there.
        context.shadows.forget()?;
    }
    context.freeze(Freeze::Load(Box::new(revival.state.clone())))?;
    // From here on a cancel is refused; this is the last one to be heard.
    if context.progress.check().is_err() {
        return Err(WorkError::Cancelled);
    }
    context.memory_lost.store(true, Ordering::Release);
    if let Some(earlier) = &context.missing {
        earlier.ram.abandon();
    }
    // What a fork has mapped of its base would come back, and cannot be watched.
    memory::replace_pieces(&context.memory)?;
    let (presence, orders) = (&context.presence, &context.orders);
    let ram = Ram { memory: &context.memory, fresh: false, presence, orders };
    let missing = revival.revive(ram, host, &context.progress, &context.mailbox)?;
    let disks = disks.show()?;
    let (base, rewinder) = (revival.base(), Rewinder::new(&revival.checkpoint));
    let lineage = revival.lineage();
    let disks_now = recorded::disks_of(&context.config);
    let rewind = Rewind::new(target.clone(), disks_now, base, revival.state.clone(), rewinder);
    let loaded = Box::new(Loaded { rewind, missing, clock: how.clock });
    // A failure takes the disks back to what they were: no guest has seen them.
    context.ask(|reply| WorkMessage::Restore { loaded, reply })?;
    context.lineage.set(lineage);
    // The machine is whole, whatever becomes of the rest.
    context.memory_lost.store(false, Ordering::Release);
    context.send(WorkMessage::Run);
    disks.settle().map_err(|error| {
        WorkError::Failed(format!(
            "The machine is that of '{}', but a host crash could take a disk back: {error}",
            target.tag
        ))
    })
}

/// What lets RAM be read lazily; none if that is not wanted or not allowed.
pub fn lazy_host(mode: LoadMode) -> Option<LazyHost> {
    if mode == LoadMode::Eager {
        return None;
    }
    let host = LazyHost::open();
    host.inspect_err(|error| {
        warn!(
            "RAM is read before the guest runs: this host does not let us serve page faults \
             ({error}); CAP_SYS_PTRACE, access to /dev/userfaultfd or sysctl \
             vm.unprivileged_userfaultfd=1 would"
        );
    })
    .ok()
}

/// Where RAM goes.
pub struct Ram<'a> {
    /// The guest's RAM.
    pub memory: &'a GuestMemory,
    /// It was never used.
    pub fresh: bool,
    /// Tells the devices that pages may be missing.
    pub presence: &'a Presence,
    /// What is read ahead first.
    pub orders: &'a Arc<Orders>,
}

/// A checkpoint on its way into a machine: checked and decoded, nothing touched yet.
pub struct Revival {
    checkpoint: Checkpoint,
    /// What the vCPUs and devices are to be.
    pub state: MachineState,
}

impl Revival {
    /// Where a guest comes from that was revived from it.
    pub fn lineage(&self) -> Lineage {
        self.checkpoint.lineage()
    }

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

    /// When it was saved.
    pub fn stamp(&self) -> Stamp {
        Stamp::of(self.checkpoint.info())
    }

    /// What RAM equals once it has been read.
    pub fn base(&self) -> Base {
        self.checkpoint.base()
    }

    /// Makes RAM that of the checkpoint, at once or, with `host`, as it is needed. The guest must be
    /// stopped. A failure leaves RAM in pieces.
    ///
    /// # Errors
    /// The image cannot be read, or the host refuses.
    pub fn revive(
        &self,
        Ram { memory, fresh, presence, orders }: Ram<'_>,
        host: Option<LazyHost>,
        progress: &Progress,
        mailbox: &Mailbox,
    ) -> Result<Option<Arc<Missing>>, WorkError> {
        let Some(host) = host.filter(|_| LazyHost::can_serve(memory)) else {
            let report = self.checkpoint.read_ram(memory, fresh, IO_THREADS, progress)?;
            info!("loaded {report:?}");
            return Ok(None);
        };
        let lent = Missing::lend(&self.checkpoint, presence, mailbox, |notify| {
            self.checkpoint.lend_ram(host, memory, fresh, orders, notify)
        })?;
        // Pages that are read when they are needed count as done for the job.
        let bytes = self.checkpoint.layout().ram_bytes();
        progress.add_total(bytes);
        progress.advance(bytes);
        Ok(Some(lent))
    }

    /// Does all that can fail of taking the disks back; see [`Checkpoint::prepare_disks`].
    ///
    /// # Errors
    /// Every disk is as it was.
    pub fn prepare_disks(&self) -> Result<PreparedDisks<'_>, WorkError> {
        Ok(self.checkpoint.prepare_disks()?)
    }
}
