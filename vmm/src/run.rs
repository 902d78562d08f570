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
use qmp::schema::LoadMode;

use crate::blocks::Blocks;
use crate::cli::{self, GuestOptions, MachineArgs, Options};
use crate::console::Console;
use crate::control::daemon::{self, Daemon};
use crate::control::mailbox::{Mailbox, Message, mailbox};
use crate::control::work::{Ram, Revival, Target, WorkError, lazy_host};
use crate::control::{self, Controller, Parts};
use crate::machine::devices::GuestSignals;
use crate::machine::{self, Machine, recorded};
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
    /// A checkpoint cannot be revived.
    #[error("--loadvm {tag}: {reason}")]
    Revive {
        /// Its tag.
        tag: String,
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
    let _pidfile = options.pidfile.as_deref().map(PidFile::create).transpose()?;
    match &options.guest {
        Some(guest) => run_machine(&options, guest, args),
        None => run_daemon(&options, args),
    }
}

fn run_machine(options: &Options, guest: &GuestOptions, args: &MachineArgs) -> Result<(), Error> {
    let graph = open_nodes(options)?;
    let host = |what| move |source| Error::Host { what, source };
    let (mailbox, inbox) = mailbox().map_err(host("cannot make event descriptors"))?;
    let console = Console::open(&guest.serial)
        .map_err(|error| cli::Error::new("serial", &guest.serial_text, error))?;
    let output = console.output().map_err(host("cannot use the serial port's target"))?;
    let machine = make_machine(guest, &graph, output, &mailbox)?;
    let (blocks, server, requests) = start_services(options, args, graph, &[])?;
    let controller = Controller::new(Parts {
        machine,
        blocks,
        console,
        inbox,
        mailbox,
        server,
        requests,
        no_reboot: guest.no_reboot,
    })?;
    Ok(controller.run(!guest.start_paused)?)
}

fn run_daemon(options: &Options, args: &MachineArgs) -> Result<(), Error> {
    let graph = open_nodes(options)?;
    let (blocks, server, requests) = start_services(options, args, graph, daemon::WITHOUT)?;
    Ok(Daemon::new(blocks, server, requests)?.run()?)
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
    let (server, requests) = qmp::Server::start(qmp_options)
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
        let listening =
            if spec.wait { server.listen_and_wait(&spec.path) } else { server.listen(&spec.path) };
        listening.map_err(|error| cli::Error::new("qmp", text, error))?;
    }
    Ok((blocks, server, requests))
}

/// Makes the machine, and boots or revives it. The kernel is decompressed meanwhile.
fn make_machine(
    options: &GuestOptions,
    graph: &Graph,
    console: Box<dyn Write + Send>,
    mailbox: &Mailbox,
) -> Result<Machine, Error> {
    let spec = &options.machine;
    let (signals, events) = (guest_signals(mailbox), vcpu_events(mailbox));
    let make = || Machine::new(spec.clone(), graph, console, signals, &events);
    match &options.loadvm {
        Some(tag) => {
            let mut machine = make()?;
            revive(&mut machine, tag, options.load_mode, mailbox)?;
            Ok(machine)
        }
        None => thread::scope(|scope| {
            let preparing = thread::Builder::new()
                .name("kernel".to_owned())
                .spawn_scoped(scope, || machine::prepare_boot(spec))
                .map_err(|source| Error::Host { what: "cannot start a thread", source })?;
            let machine = make();
            // What is wrong with the kernel is said first: it is the likelier mistake.
            let prepared = preparing.join().unwrap_or_else(|panic| resume_unwind(panic))?;
            let mut machine = machine?;
            machine.boot(prepared)?;
            Ok(machine)
        }),
    }
}

fn open_nodes(options: &Options) -> Result<Arc<Graph>, Error> {
    let graph = Graph::new();
    for blockdev in &options.blockdevs {
        graph.add_text(blockdev).map_err(|error| cli::Error::new("blockdev", blockdev, error))?;
    }
    Ok(Arc::new(graph))
}

/// Puts the checkpoint `tag` on a machine that has not run. It must be on every writable disk of
/// the machine; the VM state is on the one of them that has it.
fn revive(
    machine: &mut Machine,
    tag: &str,
    mode: LoadMode,
    mailbox: &Mailbox,
) -> Result<(), Error> {
    let fail = |reason: String| Error::Revive { tag: tag.to_owned(), reason };
    let nodes: Vec<Arc<Node>> = machine
        .devices()
        .virtio()
        .filter_map(|slot| slot.disk().map(|(node, _)| Arc::clone(node)))
        .filter(|node| !node.read_only())
        .collect();
    if nodes.is_empty() {
        return Err(fail(
            "the machine has no writable disk that could hold a checkpoint".to_owned(),
        ));
    }
    let has_state = |node: &&Arc<Node>| {
        let mut snapshots = node.snapshots().into_iter();
        snapshots.any(|snapshot| snapshot.tag == tag && snapshot.vm_state_size > 0)
    };
    let vmstate = nodes.iter().find(has_state).or(nodes.first()).map(|node| node.name().to_owned());
    let target = Target {
        tag: tag.to_owned(),
        vmstate: vmstate.unwrap_or_default(),
        devices: nodes.iter().map(|node| node.name().to_owned()).collect(),
    };
    let config = recorded::describe(machine);
    let memory = machine.memory().clone();
    let text = |error| match error {
        WorkError::Failed(text) => fail(text),
        WorkError::Cancelled => fail("it was cancelled".to_owned()),
    };
    let revival =
        Revival::open(&nodes, &target, &config, &memory, machine.shape()).map_err(text)?;
    let ram = Ram { memory: &memory, fresh: true, presence: machine.devices().presence() };
    let missing =
        revival.revive(ram, lazy_host(mode), &Progress::default(), mailbox).map_err(text)?;
    revival.revert_disks().map_err(text)?;
    machine.restore(&revival.state, Some(revival.base()))?;
    if let Some(missing) = missing {
        machine.set_missing(missing)?;
    }
    Ok(())
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
    GuestSignals { reset: line(|| Message::GuestReset), power_off: line(|| Message::GuestPowerOff) }
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
