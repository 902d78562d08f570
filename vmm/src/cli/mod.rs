//! The command line: QEMU's names and values, so that one command line can drive both programs.

pub mod args;
mod dashes;
mod device;
pub mod export;
pub mod help;
pub mod image;
pub mod sockets;
pub mod values;

pub use args::{Cli, MachineArgs, Subcommand};
pub use dashes::doubled;

use std::path::PathBuf;

use crate::blocks::exports::{AddressSpec, ExportSpec, NbdServerSpec};
use crate::console::ConsoleSpec;
use crate::control::migration::Incoming;
use crate::control::work::LoadOptions;
use crate::fork::ForkSpec;
use crate::machine::spec::{DeviceSpec, MachineSpec};
use crate::migration::address::Address;
use crate::restore::RestoreSpec;
use qmp::server::Place;
use sockets::QmpSpec;
use values::MachineType;

/// A value on the command line that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error(
    "{}{option}{}{value}: {reason}",
    if option.len() == 1 { "-" } else { "--" },
    if value.is_empty() { "" } else { " " }
)]
pub struct Error {
    option: &'static str,
    value: String,
    reason: String,
}

impl Error {
    /// An error that names the option and its value.
    pub fn new(option: &'static str, value: &str, reason: impl std::fmt::Display) -> Self {
        Self { option, value: value.to_owned(), reason: reason.to_string() }
    }
}

/// What the command line asks for, checked as far as that is possible without opening anything.
#[derive(Debug)]
pub struct Options {
    /// `--blockdev`
    pub blockdevs: Vec<String>,
    /// `--nbd-server`
    pub nbd_server: Option<NbdServerSpec>,
    /// `--export`
    pub exports: Vec<ExportSpec>,
    /// Where the QMP servers listen.
    pub qmp: Vec<QmpSpec>,
    /// `--pidfile`.
    pub pidfile: Option<PathBuf>,
    /// The guest; none with `--machine none`.
    pub guest: Option<GuestOptions>,
}

impl Options {
    /// Files of sockets that are to be made.
    pub fn sockets(&self) -> Vec<PathBuf> {
        let mut sockets = Vec::new();
        if let Some(GuestOptions { serial: ConsoleSpec::Unix { path, .. }, .. }) = &self.guest {
            sockets.push(path.clone());
        }
        for spec in &self.qmp {
            if let QmpSpec::Listen { place: Place::Unix(path), .. } = spec {
                sockets.push(path.clone());
            }
        }
        if let Some(NbdServerSpec { address: AddressSpec::Unix(path), .. }) = &self.nbd_server {
            sockets.push(path.into());
        }
        sockets
    }
}

/// What is asked for of a guest.
#[derive(Debug)]
pub struct GuestOptions {
    /// The machine.
    pub machine: MachineSpec,
    /// What the serial port is connected to.
    pub serial: ConsoleSpec,
    /// The same as the user wrote it.
    pub serial_text: String,
    /// `-S`: do not start the vCPUs.
    pub start_paused: bool,
    /// `--loadvm`: the checkpoint to revive.
    pub loadvm: Option<String>,
    /// `--load-mode`, `--load-clock`: how that is done.
    pub load: LoadOptions,
    /// `--restore`: the checkpoint to revive as the machine that it records; `machine` has only what
    /// the command line says besides.
    pub restore: Option<RestoreSpec>,
    /// The same as the user wrote it.
    pub restore_text: String,
    /// `--fork`: the checkpoint to fork, in the same way.
    pub fork: Option<ForkSpec>,
    /// The same as the user wrote it.
    pub fork_text: String,
    /// `--incoming`: where the machine comes from.
    pub incoming: Option<Incoming>,
    /// `--no-reboot`: a reset of the guest ends the machine.
    pub no_reboot: bool,
}

impl Options {
    /// Reads the values of the options.
    ///
    /// # Errors
    /// Names the option and the value that cannot be used.
    pub fn from_args(args: &MachineArgs) -> Result<Self, Error> {
        let guest = match values::machine_type(&args.machine)? {
            MachineType::Microvm { dirty_tracking, acpi } => {
                Some(guest_options(args, dirty_tracking, acpi)?)
            }
            MachineType::None => {
                no_guest_options(args)?;
                None
            }
        };
        if args.nbd_server.is_none()
            && let Some(export) = args.export.first()
        {
            return Err(Error::new("export", export, "needs --nbd-server"));
        }
        let qmp: Vec<QmpSpec> =
            args.qmp.iter().map(|text| sockets::qmp(text)).collect::<Result<_, _>>()?;
        check_stdio(&qmp, guest.as_ref())?;
        Ok(Self {
            blockdevs: args.blockdev.clone(),
            nbd_server: args.nbd_server.as_deref().map(export::nbd_server).transpose()?,
            exports: args
                .export
                .iter()
                .map(|text| export::export(text))
                .collect::<Result<_, _>>()?,
            qmp,
            pidfile: args.pidfile.clone(),
            guest,
        })
    }
}

/// Standard input can be one thing only.
fn check_stdio(qmp: &[QmpSpec], guest: Option<&GuestOptions>) -> Result<(), Error> {
    let monitors = qmp.iter().filter(|spec| **spec == QmpSpec::Stdio).count();
    if monitors > 1 {
        return Err(Error::new("qmp", "stdio", "can be given once only"));
    }
    if monitors == 1 && guest.is_some_and(|guest| matches!(guest.serial, ConsoleSpec::Stdio)) {
        return Err(Error::new("qmp", "stdio", "is taken by the serial port: give --serial, too"));
    }
    Ok(())
}

fn guest_options(
    args: &MachineArgs,
    dirty_tracking: bool,
    acpi: Option<bool>,
) -> Result<GuestOptions, Error> {
    if acpi.is_some() && (args.restore.is_some() || args.fork.is_some()) {
        let reason = "acpi is taken from the checkpoint";
        return Err(Error::new("machine", &args.machine, reason));
    }
    values::check_accel(args.accel.as_deref())?;
    values::check_cpu(args.cpu.as_deref().unwrap_or("host"))?;
    let devices =
        args.device.iter().map(|text| device::device(text)).collect::<Result<Vec<_>, _>>()?;
    let serial_text = args.serial.as_deref().unwrap_or("stdio");
    Ok(GuestOptions {
        machine: MachineSpec {
            acpi: acpi.unwrap_or(false),
            ..machine_spec(args, devices, dirty_tracking)?
        },
        serial: sockets::serial(serial_text)?,
        serial_text: serial_text.to_owned(),
        start_paused: args.start_paused,
        loadvm: args.loadvm.clone(),
        load: load_options(args)?,
        restore: recorded(args, "restore", args.restore.as_deref())?,
        fork: recorded(args, "fork", args.fork.as_deref())?
            .map(|checkpoint| ForkSpec { checkpoint, overlays: args.fork_overlay.clone() }),
        fork_text: args.fork.clone().unwrap_or_default(),
        restore_text: args.restore.clone().unwrap_or_default(),
        incoming: incoming(args)?,
        no_reboot: args.no_reboot,
    })
}

fn incoming(args: &MachineArgs) -> Result<Option<Incoming>, Error> {
    let Some(text) = args.incoming.as_deref() else { return Ok(None) };
    let others = [("loadvm", &args.loadvm), ("restore", &args.restore), ("fork", &args.fork)];
    for (option, value) in others {
        if value.is_some() {
            return Err(Error::new("incoming", text, format!("cannot go with --{option}")));
        }
    }
    match text {
        "defer" => Ok(Some(Incoming::Defer)),
        text => match Address::parse(text) {
            Ok(address) => Ok(Some(Incoming::From(address))),
            Err(reason) => Err(Error::new("incoming", text, reason)),
        },
    }
}

fn load_options(args: &MachineArgs) -> Result<LoadOptions, Error> {
    let given = [("load-mode", &args.load_mode), ("load-clock", &args.load_clock)];
    if args.loadvm.is_none() && args.restore.is_none() && args.fork.is_none() {
        for (option, text) in given {
            if let Some(text) = text {
                return Err(Error::new(option, text, "needs --loadvm, --restore or --fork"));
            }
        }
    }
    let mode = args.load_mode.as_deref().map(values::load_mode).transpose()?;
    let clock = match (&args.load_clock, &args.fork_clock) {
        (Some(_), Some(text)) => {
            return Err(Error::new("fork-clock", text, "is --load-clock, which is given, too"));
        }
        (Some(text), None) => Some(values::load_clock("load-clock", text)?),
        (None, Some(text)) => Some(values::load_clock("fork-clock", text)?),
        (None, None) => None,
    };
    let usual = LoadOptions::USUAL;
    Ok(LoadOptions { mode: mode.unwrap_or(usual.mode), clock: clock.unwrap_or(usual.clock) })
}

/// The checkpoint of `--restore` or `--fork`. What it records of the machine cannot be said another
/// time.
fn recorded(
    args: &MachineArgs,
    option: &'static str,
    text: Option<&str>,
) -> Result<Option<RestoreSpec>, Error> {
    let Some(text) = text else {
        let overlay = args.fork_overlay.as_ref().map(|dir| dir.display().to_string());
        let of_forks = [("fork-clock", args.fork_clock.clone()), ("fork-overlay", overlay)];
        let given = of_forks.into_iter().find_map(|(name, value)| Some((name, value?)));
        return match given.filter(|_| option == "fork") {
            Some((name, value)) => Err(Error::new(name, &value, "needs --fork")),
            None => Ok(None),
        };
    };
    let said = [
        ("m", args.memory.clone()),
        ("smp", args.smp.clone()),
        ("device", args.device.first().cloned()),
        ("loadvm", args.loadvm.clone()),
        ("restore", args.restore.clone().filter(|_| option != "restore")),
    ];
    for (said, value) in said {
        if let Some(value) = value {
            let reason = format!("--{option} takes it from the checkpoint");
            return Err(Error::new(said, &value, reason));
        }
    }
    values::checkpoint(option, text).map(Some)
}

/// Without a guest, what is said of one would have no effect.
fn no_guest_options(args: &MachineArgs) -> Result<(), Error> {
    let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
    let flag = |on: bool| on.then(String::new);
    let given = [
        ("accel", args.accel.clone()),
        ("cpu", args.cpu.clone()),
        ("smp", args.smp.clone()),
        ("m", args.memory.clone()),
        ("kernel", path(&args.kernel)),
        ("initrd", path(&args.initrd)),
        ("append", args.append.clone()),
        ("device", args.device.first().cloned()),
        ("serial", args.serial.clone()),
        ("S", flag(args.start_paused)),
        ("loadvm", args.loadvm.clone()),
        ("load-mode", args.load_mode.clone()),
        ("load-clock", args.load_clock.clone()),
        ("incoming", args.incoming.clone()),
        ("restore", args.restore.clone()),
        ("fork", args.fork.clone()),
        ("fork-clock", args.fork_clock.clone()),
        ("fork-overlay", path(&args.fork_overlay)),
        ("no-reboot", flag(args.no_reboot)),
        ("name", args.name.clone()),
        ("uuid", args.uuid.clone()),
    ];
    for (option, value) in given {
        if let Some(value) = value {
            return Err(Error::new(option, &value, "there is no guest with --machine none"));
        }
    }
    Ok(())
}

fn machine_spec(
    args: &MachineArgs,
    devices: Vec<DeviceSpec>,
    dirty_tracking: bool,
) -> Result<MachineSpec, Error> {
    let revived = args.loadvm.is_some() || args.restore.is_some() || args.fork.is_some();
    let revived = revived || args.incoming.is_some();
    if args.kernel.is_none() && !revived {
        return Err(Error::new(
            "kernel",
            "FILE",
            "is missing: name a kernel to boot, or a checkpoint to revive with --restore IMAGE#TAG, \
             --fork IMAGE#TAG or --loadvm TAG, or have no guest with --machine none",
        ));
    }
    if args.initrd.is_some() && args.kernel.is_none() {
        let initrd = args.initrd.as_ref().map(|path| path.display().to_string());
        return Err(Error::new("initrd", &initrd.unwrap_or_default(), "needs --kernel"));
    }
    Ok(MachineSpec {
        name: args.name.clone(),
        uuid: values::uuid(args.uuid.as_deref())?,
        vcpus: values::smp(args.smp.as_deref().unwrap_or("1"))?,
        ram_bytes: values::memory(args.memory.as_deref().unwrap_or("128M"))?,
        kernel: args.kernel.clone(),
        initrd: args.initrd.clone(),
        cmdline: args.append.clone().unwrap_or_default(),
        dirty_tracking,
        acpi: false,
        forked: false,
        devices,
    })
}
