//! The command line: QEMU's names and values, so that one command line can drive both programs.

pub mod args;
pub mod values;

pub use args::{Cli, MachineArgs, Subcommand};

use crate::console::ConsoleSpec;
use crate::machine::spec::{DeviceSpec, MachineSpec};
use values::QmpSpec;

/// A value on the command line that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{}{option} {value}: {reason}", if option.len() == 1 { "-" } else { "--" })]
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
    /// The machine.
    pub machine: MachineSpec,
    /// `--blockdev`
    pub blockdevs: Vec<String>,
    /// Where the QMP servers listen.
    pub qmp: Vec<QmpSpec>,
    /// What the serial port is connected to.
    pub serial: ConsoleSpec,
    /// `-S`: do not start the vCPUs.
    pub start_paused: bool,
    /// `--loadvm`: the checkpoint to revive.
    pub loadvm: Option<String>,
    /// `--no-reboot`: a reset of the guest ends the machine.
    pub no_reboot: bool,
    /// `--pidfile`.
    pub pidfile: Option<std::path::PathBuf>,
}

impl Options {
    /// Reads the values of the options.
    ///
    /// # Errors
    /// Names the option and the value that cannot be used.
    pub fn from_args(args: &MachineArgs) -> Result<Self, Error> {
        values::check_machine(&args.machine)?;
        values::check_accel(args.accel.as_deref())?;
        values::check_cpu(&args.cpu)?;
        let devices =
            args.device.iter().map(|text| values::device(text)).collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            machine: machine_spec(args, devices)?,
            blockdevs: args.blockdev.clone(),
            qmp: args.qmp.iter().map(|text| values::qmp(text)).collect::<Result<_, _>>()?,
            serial: values::serial(&args.serial)?,
            start_paused: args.start_paused,
            loadvm: args.loadvm.clone(),
            no_reboot: args.no_reboot,
            pidfile: args.pidfile.clone(),
        })
    }
}

fn machine_spec(args: &MachineArgs, devices: Vec<DeviceSpec>) -> Result<MachineSpec, Error> {
    if args.kernel.is_none() && args.loadvm.is_none() {
        return Err(Error::new(
            "kernel",
            "FILE",
            "is missing: name a kernel to boot, or a checkpoint to revive with --loadvm TAG",
        ));
    }
    if args.initrd.is_some() && args.kernel.is_none() {
        let initrd = args.initrd.as_ref().map(|path| path.display().to_string());
        return Err(Error::new("initrd", &initrd.unwrap_or_default(), "needs --kernel"));
    }
    Ok(MachineSpec {
        name: args.name.clone(),
        uuid: values::uuid(args.uuid.as_deref())?,
        vcpus: values::smp(&args.smp)?,
        ram_bytes: values::memory(&args.memory)?,
        kernel: args.kernel.clone(),
        initrd: args.initrd.clone(),
        cmdline: args.append.clone(),
        devices,
    })
}
