//! From the command line to a machine, or a storage daemon, that has ended.

use std::fs;
use std::io::Write;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use block::{Graph, Node, Progress};
use devices::InterruptLine;
use serde_json::Value;
use snapshot::Lineage;

use crate::blocks::Blocks;
use crate::cli::sockets::QmpSpec;
use crate::cli::{self, GuestOptions, MachineArgs, Options};
use crate::console::Console;
use crate::control::daemon::{self, Daemon};
use crate::control::mailbox::{Mailbox, Message, mailbox};
use crate::control::work::{LoadOptions, Ram, Revival, Target, WorkError, lazy_host};
use crate::control::{self, Controller, Parts};
use crate::early::Early;
use crate::fork::{self, Fork};
use crate::machine::devices::GuestSignals;
use crate::machine::spec::MachineSpec;
use crate::machine::{self, Machine, recorded};
use crate::restore::{self, Plan, Purpose};
use crate::vcpu::EventSink;
use crate::version;

/// Why a machine did not run, or did not end well.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An option cannot be used.
    #[error(transparent)]
    Option(#[from] cli::Error),
    /// The machine cannot be built or booted.
    #[error(transparent)]
    Machine(#[from] machine::Error),
    /// The main thread failed.
    #[error(transparent)]
    Control(#[from] control::Error),
    /// A checkpoint cannot be revived from its image.
    #[error("--restore {text}: {source}")]
    Restore {
        /// Image and tag.
        text: String,
        /// Why not.
        source: restore::Error,
    },
    /// A checkpoint cannot be forked.
    #[error("--fork {text}: {source}")]
    Fork {
        /// Image and tag.
        text: String,
        /// Why not.
        source: Box<fork::Error>,
    },
    /// A checkpoint cannot be revived.
    #[error("{option}: {reason}")]
    Revive {
        /// The option that names it, with its value.
        option: String,
        /// Why not.
        reason: String,
    },
    /// The host is out of something.
    #[error("{what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the host said.
        source: std::io::Error,
    },
}

/// Runs what `args` ask for, a machine or a storage daemon, until it ends.
///
/// # Errors
/// It cannot be started, or a disk cannot be flushed at its end.
pub fn run(args: &MachineArgs) -> Result<(), Error> {
    let options = Options::from_args(args)?;
    let early = Early::begin(options.sockets())
        .map_err(|source| Error::Host { what: "cannot take signals", source })?;
    let pidfile = options.pidfile.as_deref().map(PidFile::create).transpose()?;
    pidfile.iter().for_each(|file| early.made(&file.0));
    match &options.guest {
        Some(guest) => run_machine(&options, guest, args, early),
        None => run_daemon(&options, args, early),
    }
}

fn run_machine(
    options: &Options,
    guest: &GuestOptions,
    args: &MachineArgs,
    early: Early,
) -> Result<(), Error> {
    let mut start = Start::new(options, guest)?;
    if let Start::Fork { fork, .. } = &start {
        fork.overlays().for_each(|path| early.made(path));
    }
    let graph = open_nodes(options, guest.incoming.is_some())?;
    match &mut start {
        Start::Boot(_) | Start::Load { .. } | Start::Wait(_) => {}
        Start::Restore { plan, text, .. } => {
            open_recorded(&graph, &plan.blockdevs, "restore", text)?;
        }
        Start::Fork { fork, text } => {
            open_recorded(&graph, &fork.blockdevs, "fork", text)?;
            fork.overlays_are_open();
        }
    }
    let host = |what| move |source| Error::Host { what, source };
    let (mailbox, inbox) = mailbox().map_err(host("cannot make event descriptors"))?;
    let console = Console::open(&guest.serial)
        .map_err(|error| cli::Error::new("serial", &guest.serial_text, error))?;
    let output = console.output().map_err(host("cannot use the serial port's target"))?;
    let mut services = None;
    let mut serve = || {
        services = Some(start_services(options, args, Arc::clone(&graph), &[])?);
        Ok(())
    };
    let (machine, lineage) =
        make_machine(&start, guest.load, &graph, output, &mailbox, &mut serve)?;
    let (blocks, server, requests) = match services {
        Some(services) => services,
        None => start_services(options, args, graph, &[])?,
    };
    if let Start::Fork { fork, .. } = &start {
        fork.overlays().for_each(|path| early.keep(path));
        fork.keep_overlays();
    }
    blocks.lineage().set(lineage);
    let to_main = mailbox.clone();
    blocks.on_resize(move || to_main.send(Message::DiskSize));
    let controller = Controller::new(Parts {
        machine,
        blocks,
        console,
        inbox,
        mailbox,
        early,
        server,
        requests,
        no_reboot: guest.no_reboot,
        incoming: guest.incoming.clone(),
        start: !guest.start_paused,
    })?;
    Ok(controller.run()?)
}

/// How the machine begins.
enum Start<'a> {
    /// With a kernel.
    Boot(&'a MachineSpec),
    /// With what comes from elsewhere.
    Wait(&'a MachineSpec),
    /// From a checkpoint of a machine as the command line tells it.
    Load { machine: &'a MachineSpec, tag: &'a str },
    /// From a checkpoint of a machine as the checkpoint tells it.
    Restore { plan: Box<Plan>, tag: &'a str, text: &'a str },
    /// From a checkpoint in an image that others fork, too.
    Fork { fork: Box<Fork>, text: &'a str },
}

impl<'a> Start<'a> {
    fn new(options: &Options, guest: &'a GuestOptions) -> Result<Self, Error> {
        let machine = &guest.machine;
        if let Some(spec) = &guest.fork {
            let fork = Fork::plan(spec, machine).map_err(|e| fork_error(&guest.fork_text, e))?;
            return Ok(Self::Fork { fork: Box::new(fork), text: &guest.fork_text });
        }
        Ok(match (&guest.restore, &guest.loadvm) {
            (Some(spec), _) => {
                let plan =
                    restore::plan(spec, machine, &options.blockdevs, Purpose::Restore).map_err(
                        |source| Error::Restore { text: guest.restore_text.clone(), source },
                    )?;
                Self::Restore { plan: Box::new(plan), tag: &spec.tag, text: &guest.restore_text }
            }
            (None, Some(tag)) => Self::Load { machine, tag },
            (None, None) if guest.incoming.is_some() => Self::Wait(machine),
            (None, None) => Self::Boot(machine),
        })
    }

    fn machine(&self) -> &MachineSpec {
        match self {
            Self::Boot(machine) | Self::Wait(machine) | Self::Load { machine, .. } => machine,
            Self::Restore { plan, .. } => &plan.machine,
            Self::Fork { fork, .. } => &fork.machine,
        }
    }
}

fn fork_error(text: &str, source: fork::Error) -> Error {
    Error::Fork { text: text.to_owned(), source: Box::new(source) }
}

/// Opens the disks that the checkpoint records.
fn open_recorded(
    graph: &Graph,
    blockdevs: &[Value],
    option: &'static str,
    text: &str,
) -> Result<(), Error> {
    for options in blockdevs {
        graph.add(options).map_err(|error| cli::Error::new(option, text, error))?;
    }
    Ok(())
}

fn run_daemon(options: &Options, args: &MachineArgs, early: Early) -> Result<(), Error> {
    if options.qmp.is_empty() && options.nbd_server.is_none() {
        // As in QEMU it is no error: it holds the images until a signal ends it.
        tracing::warn!(
            "without --qmp and --nbd-server nobody can talk to this; it ends by SIGTERM"
        );
    }
    let graph = open_nodes(options, false)?;
    let (blocks, server, requests) = start_services(options, args, graph, daemon::WITHOUT)?;
    Ok(Daemon::new(blocks, server, requests, early)?.run()?)
}

/// Starts the NBD server with its exports, then the QMP server: who waits for its socket finds all
/// there.
fn start_services(
    options: &Options,
    args: &MachineArgs,
    graph: Arc<Graph>,
    without: &'static [&'static str],
) -> Result<(Arc<Blocks>, qmp::Server, qmp::Requests), Error> {
    let qmp_options = qmp::Options { without, ..qmp::Options::new(version::qmp_version()) };
    let (mut server, requests) = qmp::Server::start(qmp_options)
        .map_err(|source| Error::Host { what: "cannot start the QMP server", source })?;
    let blocks = Arc::new(Blocks::new(graph, server.events()));
    if let (Some(spec), Some(text)) = (&options.nbd_server, &args.nbd_server) {
        let started = blocks.exports().start(spec);
        started.map_err(|error| cli::Error::new("nbd-server", text, error))?;
    }
    for (spec, text) in options.exports.iter().zip(&args.export) {
        let added = blocks.exports().add(spec.clone());
        added.map_err(|error| cli::Error::new("export", text, error))?;
    }
    for (spec, text) in options.qmp.iter().zip(&args.qmp) {
        serve(&mut server, spec).map_err(|error| cli::Error::new("qmp", text, error))?;
    }
    Ok((blocks, server, requests))
}

fn serve(server: &mut qmp::Server, spec: &QmpSpec) -> Result<(), String> {
    let told = |error: qmp::server::ListenError| error.to_string();
    match spec {
        QmpSpec::Stdio => server.serve_stdio().map_err(|error| error.to_string()),
        QmpSpec::Listen { place, wait } => server.listen_at(place, *wait).map_err(told),
        QmpSpec::Connect(place) => server.connect_to(place).map_err(told),
    }
}

/// What else can fail before a machine runs; called when one has been revived, and before its disks go back
/// for good: whatever keeps it from running leaves them as they were.
type Rest<'a> = &'a mut dyn FnMut() -> Result<(), Error>;

/// Makes the machine, and boots or revives it. The kernel is decompressed meanwhile.
fn make_machine(
    start: &Start<'_>,
    how: LoadOptions,
    graph: &Graph,
    console: Box<dyn Write + Send>,
    mailbox: &Mailbox,
    rest: Rest<'_>,
) -> Result<(Machine, Lineage), Error> {
    let spec = start.machine();
    let (signals, events) = (guest_signals(mailbox), vcpu_events(mailbox));
    let make = || Machine::new(spec.clone(), graph, console, signals, &events);
    match start {
        Start::Wait(_) => Ok((make()?, Lineage::default())),
        Start::Load { tag, .. } => {
            let mut machine = make()?;
            let target = writable_disks(&machine, tag)?;
            let option = format!("--loadvm {tag}");
            let ways = Ways { how, mailbox, rest };
            let lineage = revive(&mut machine, graph, &target, &option, ways)?;
            Ok((machine, lineage))
        }
        Start::Restore { plan, tag, text } => {
            let mut machine = make()?;
            let target = Target {
                tag: (*tag).to_owned(),
                vmstate: plan.vmstate.clone(),
                devices: plan.nodes.clone(),
            };
            let option = format!("--restore {text}");
            let ways = Ways { how, mailbox, rest };
            let lineage = revive(&mut machine, graph, &target, &option, ways)?;
            Ok((machine, lineage))
        }
        Start::Fork { fork, text } => {
            let mut machine = make()?;
            let lineage = fork.revive(&mut machine, graph, how, mailbox);
            let lineage = lineage.map_err(|e| fork_error(text, e))?;
            Ok((machine, lineage))
        }
        Start::Boot(_) => thread::scope(|scope| {
            let preparing = thread::Builder::new()
                .name("kernel".to_owned())
                .spawn_scoped(scope, || machine::prepare_boot(spec))
                .map_err(|source| Error::Host { what: "cannot start a thread", source })?;
            let machine = make();
            // What is wrong with the kernel is said first: it is the likelier mistake.
            let prepared = preparing.join().unwrap_or_else(|panic| resume_unwind(panic))?;
            let mut machine = machine?;
            machine.boot(prepared)?;
            Ok((machine, Lineage::default()))
        }),
    }
}

/// Opens the nodes; another process may still have the images of a machine that is to come.
fn open_nodes(options: &Options, incoming: bool) -> Result<Arc<Graph>, Error> {
    let graph = Graph::new();
    if incoming {
        graph.open_inactive();
    }
    for blockdev in &options.blockdevs {
        graph.add_text(blockdev).map_err(|error| cli::Error::new("blockdev", blockdev, error))?;
    }
    Ok(Arc::new(graph))
}

/// Where the checkpoint `tag` of `--loadvm` is: on every writable disk of the machine; the VM state is
/// on the one of them that has it.
fn writable_disks(machine: &Machine, tag: &str) -> Result<Target, Error> {
    let nodes: Vec<Arc<Node>> = machine
        .devices()
        .virtio()
        .filter_map(|slot| slot.disk().map(|(node, _)| node))
        .filter(|node| !node.read_only())
        .collect();
    if nodes.is_empty() {
        let reason = "the machine has no writable disk that could hold a checkpoint".to_owned();
        return Err(Error::Revive { option: format!("--loadvm {tag}"), reason });
    }
    let kept = snapshot::kept_tag(tag);
    let has_state = |node: &&Arc<Node>| {
        let mut snapshots = node.snapshots().into_iter();
        snapshots.any(|snapshot| snapshot.tag == kept && snapshot.vm_state_size > 0)
    };
    let vmstate = nodes.iter().find(has_state).or(nodes.first()).map(|node| node.name().to_owned());
    Ok(Target {
        tag: tag.to_owned(),
        vmstate: vmstate.unwrap_or_default(),
        devices: nodes.iter().map(|node| node.name().to_owned()).collect(),
    })
}

/// How a checkpoint is put on a machine.
struct Ways<'a> {
    how: LoadOptions,
    mailbox: &'a Mailbox,
    rest: Rest<'a>,
}

/// Puts a checkpoint on a machine that has not run, as `option` asks. Gives where its guest comes from.
fn revive(
    machine: &mut Machine,
    graph: &Graph,
    target: &Target,
    option: &str,
    Ways { how, mailbox, rest }: Ways<'_>,
) -> Result<Lineage, Error> {
    let fail = |reason: String| Error::Revive { option: option.to_owned(), reason };
    let nodes = snapshot::resolve(&target.devices, |name| graph.get(name))
        .map_err(|error| fail(error.to_string()))?;
    let config = recorded::describe(machine);
    let memory = machine.memory().clone();
    let text = |error| match error {
        WorkError::Failed(text) => fail(text),
        WorkError::Cancelled => fail("it was cancelled".to_owned()),
    };
    let revival = Revival::open(&nodes, target, &config, &memory, machine.shape()).map_err(text)?;
    let disks = revival.prepare_disks().map_err(text)?;
    let (presence, orders) = (machine.devices().presence(), machine.orders());
    let ram = Ram { memory: &memory, fresh: true, presence, orders };
    let missing =
        revival.revive(ram, lazy_host(how.mode), &Progress::default(), mailbox).map_err(text)?;
    let disks = disks.show().map_err(|error| fail(error.to_string()))?;
    // A state that KVM or a device refuses leaves the disks as they were.
    let restored = machine.restore(&revival.state, Some(revival.base()));
    let restored = restored.and_then(|()| missing.map_or(Ok(()), |m| machine.set_missing(m)));
    restored.map_err(|error| fail(error.to_string()))?;
    machine.set_clock(how.clock, &revival.stamp());
    rest()?;
    disks.settle().map_err(|error| fail(error.to_string()))?;
    Ok(revival.lineage())
}

/// Sends a message when the guest pulls the line: one for each guest, as a guest that pulls it in a
/// loop must not fill our memory.
struct MessageLine {
    mailbox: Mailbox,
    message: fn() -> Message,
    /// The guest that pulled it last, plus one.
    pulled_by: AtomicU64,
}

impl InterruptLine for MessageLine {
    fn trigger(&self) -> std::io::Result<()> {
        let guest = self.mailbox.guest() + 1;
        if self.pulled_by.swap(guest, Ordering::AcqRel) != guest {
            self.mailbox.send_of_guest((self.message)());
        }
        Ok(())
    }
}

fn guest_signals(mailbox: &Mailbox) -> GuestSignals {
    let line = |message| {
        let line: Arc<dyn InterruptLine> = Arc::new(MessageLine {
            mailbox: mailbox.clone(),
            message,
            pulled_by: AtomicU64::new(0),
        });
        line
    };
    let to_main = mailbox.clone();
    GuestSignals {
        reset: line(|| Message::GuestReset),
        power_off: line(|| Message::GuestPowerOff),
        // Not tied to one guest, as a reset is: the failure is real whichever guest runs by then.
        disk: Arc::new(move |slot, failure| to_main.send(Message::Disk { slot, failure })),
    }
}

fn vcpu_events(mailbox: &Mailbox) -> EventSink {
    let mailbox = mailbox.clone();
    Arc::new(move |event| mailbox.send_of_guest(Message::Vcpu(event)))
}

/// The file with the process id; removed at the end.
struct PidFile(PathBuf);

impl PidFile {
    fn create(path: &Path) -> Result<Self, Error> {
        fs::write(path, format!("{}\n", std::process::id()))
            .map_err(|error| cli::Error::new("pidfile", &path.display().to_string(), error))?;
        Ok(Self(path.to_owned()))
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // Someone may have removed it already.
        let _ = fs::remove_file(&self.0);
    }
}
