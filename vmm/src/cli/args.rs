//! The options and subcommands themselves.

use std::path::PathBuf;

use clap::{Args, Parser};

use super::image::Output;

const EXAMPLES: &str = "\
Examples:
  Boot a kernel with a disk, the console on this terminal:
    tardigrade image create -f qcow2 disk.qcow2 1G
    tardigrade --kernel bzImage --append 'console=ttyS0' -m 256M --smp 2 \\
      --blockdev driver=qcow2,node-name=disk0,file.driver=file,file.filename=disk.qcow2 \\
      --device virtio-blk-device,drive=disk0 --qmp unix:/tmp/vm.qmp,server=on,wait=off

  From another terminal, freeze it, list what is frozen, and go back:
    tardigrade snapshot save   --qmp /tmp/vm.qmp before-upgrade
    tardigrade snapshot list   --qmp /tmp/vm.qmp
    tardigrade snapshot load   --qmp /tmp/vm.qmp before-upgrade

  See what an image holds that no machine uses:
    tardigrade snapshot list   --image disk.qcow2
    tardigrade snapshot show   --image disk.qcow2 before-upgrade

  Revive a checkpoint in a new process, as the machine that it records:
    tardigrade --restore disk.qcow2#before-upgrade --qmp unix:/tmp/vm.qmp,server=on,wait=off

  Serve an image over NBD, without a guest and without /dev/kvm:
    tardigrade --machine none --qmp unix:/tmp/sd.qmp,server=on,wait=off \\
      --blockdev driver=qcow2,node-name=disk0,file.driver=file,file.filename=disk.qcow2 \\
      --nbd-server addr.type=unix,addr.path=/tmp/nbd.sock \\
      --export type=nbd,id=e0,node-name=disk0,name=disk,writable=on
    qemu-img info 'nbd+unix:///disk?socket=/tmp/nbd.sock'";

/// A lightweight KVM hypervisor whose guests can be frozen, copied and revived at any moment.
///
/// Without a subcommand it runs a machine. Options have QEMU's names and values, and as with QEMU one
/// dash is enough for them: -kernel. A value of help tells what an option takes: --device help.
#[derive(Debug, Parser)]
#[command(name = "tardigrade", version, after_help = EXAMPLES, args_conflicts_with_subcommands = true)]
pub struct Cli {
    #[command(subcommand)]
    /// What to do with a machine that runs already.
    pub subcommand: Option<Subcommand>,
    #[command(flatten)]
    /// The machine to run.
    pub machine: MachineArgs,
}

/// The machine to run.
#[derive(Debug, Args)]
pub struct MachineArgs {
    /// Machine type: microvm, or none for a storage daemon without a guest; with
    /// microvm,dirty-tracking=off every checkpoint writes all of RAM; with microvm,acpi=on the guest
    /// finds its devices in ACPI tables, not on its command line, and has a VM generation id
    #[arg(long, value_name = "TYPE", default_value = "microvm")]
    pub machine: String,
    /// Accelerator; there is only kvm
    #[arg(long, value_name = "NAME")]
    pub accel: Option<String>,
    /// CPU model: host, what the host's KVM supports [default: host]
    #[arg(long, value_name = "MODEL")]
    pub cpu: Option<String>,
    /// Number of vCPUs [default: 1]
    #[arg(long, value_name = "N")]
    pub smp: Option<String>,
    /// Guest RAM; a plain number is MiB, suffixes are K, M, G, T [default: 128M]
    #[arg(short = 'm', long = "m", value_name = "SIZE")]
    pub memory: Option<String>,
    /// Kernel: an ELF vmlinux or a bzImage
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Initial ramdisk
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub append: Option<String>,
    /// Block node: driver=qcow2|raw,node-name=N,file.driver=file,file.filename=F, then if wanted
    /// ,read-only=on and ,file.cache.direct=on; or JSON
    #[arg(long, value_name = "OPTIONS")]
    pub blockdev: Vec<String>,
    /// NBD server: addr.type=unix,addr.path=P or addr.type=inet,addr.host=H,addr.port=N, then if
    /// wanted ,max-connections=N; or JSON
    #[arg(long, value_name = "OPTIONS")]
    pub nbd_server: Option<String>,
    /// Export of a node: type=nbd,id=I,node-name=N[,name=E][,writable=on][,bitmaps.0=B]; or JSON.
    /// A writable one of a guest's disk needs share-rw=on at the --device
    #[arg(long, value_name = "OPTIONS")]
    pub export: Vec<String>,
    /// Device: virtio-blk-device,drive=NODE[,serial=S][,num-queues=N][,share-rw=on]
    /// [,rerror=R][,werror=W], virtio-rng-device, or JSON. share-rw=on lets exports of the disk
    /// write too; what is done about reads and writes that fail on the host: report, ignore, stop,
    /// enospc, auto
    #[arg(long, value_name = "OPTIONS")]
    pub device: Vec<String>,
    /// Monitor: unix:PATH,server=on,wait=off or tcp:127.0.0.1:PORT,server=on,wait=off listens,
    /// without server=on it connects; or stdio. May be given more than once
    #[arg(long, value_name = "ADDRESS")]
    pub qmp: Vec<String>,
    /// Serial port: stdio, null, file:F or unix:PATH,server=on,wait=off [default: stdio]
    #[arg(long, value_name = "TARGET")]
    pub serial: Option<String>,
    /// Do not start the vCPUs: wait for QMP's cont
    #[arg(short = 'S')]
    pub start_paused: bool,
    /// Revive this checkpoint instead of booting
    #[arg(long, value_name = "TAG")]
    pub loadvm: Option<String>,
    /// Wait for a machine that is migrated here: file:PATH[,offset=BYTES], exec:COMMAND, unix:PATH, or
    /// defer, which leaves it to QMP's migrate-incoming
    #[arg(long, value_name = "ADDRESS")]
    pub incoming: Option<String>,
    /// When --loadvm, --restore and --fork read RAM: lazy, as the guest needs it and in the background, or
    /// eager, before the guest runs [default: lazy]
    #[arg(long, value_name = "MODE")]
    pub load_mode: Option<String>,
    /// What the guest's clocks do with --loadvm, --restore and --fork: they go on from the save (frozen), or are set
    /// forward to the host's time (host) [default: frozen]
    #[arg(long, value_name = "POLICY")]
    pub load_clock: Option<String>,
    /// Revive a checkpoint from the image with its RAM alone: the machine is as it was recorded
    #[arg(long, value_name = "IMAGE#TAG")]
    pub restore: Option<String>,
    /// Run a guest of its own from a checkpoint in an image that is only read; any number at once
    #[arg(long, value_name = "IMAGE#TAG")]
    pub fork: Option<String>,
    /// Keep the fork's disks: as overlays NODE.qcow2 in this directory, which must not be there yet; what
    /// they need of IMAGE is found as long as it is there
    #[arg(long, value_name = "DIR")]
    pub fork_overlay: Option<PathBuf>,
    /// As --load-clock, of a fork
    #[arg(long, value_name = "POLICY")]
    pub fork_clock: Option<String>,
    /// End when the guest resets
    #[arg(long)]
    pub no_reboot: bool,
    /// Name of the machine, for query-name
    #[arg(long, value_name = "TEXT")]
    pub name: Option<String>,
    /// UUID of the machine, for query-uuid
    #[arg(long, value_name = "UUID")]
    pub uuid: Option<String>,
    /// Write the process id here
    #[arg(long, value_name = "FILE")]
    pub pidfile: Option<PathBuf>,
}

/// What to do with a machine that runs already, over its QMP socket.
#[derive(Debug, clap::Subcommand)]
pub enum Subcommand {
    /// Save, load, delete and list checkpoints of a running machine, or see those in an image
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// Make, check, repair, resize and copy disk images, and their snapshots
    Image(super::image::ImageArgs),
    /// Tell what a running machine is doing
    Status(QmpTarget),
    /// See a guest frozen, changed and taken back
    Demo(DemoArgs),
    /// Connect this terminal to a machine's serial socket; leave with Ctrl-]
    Console {
        /// The path given to --serial unix:PATH
        socket: PathBuf,
    },
}

/// The demo.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Directory with the guest's tiny.bzImage and initramfs.cpio
    #[arg(long, value_name = "DIR", default_value = "resources/guest")]
    pub guest: PathBuf,
    /// End with a shell in the guest, on a terminal
    #[arg(long)]
    pub shell: bool,
}

/// The machine's QMP socket.
#[derive(Debug, Args)]
pub struct QmpTarget {
    /// The path given to --qmp unix:PATH
    #[arg(long, value_name = "PATH")]
    pub qmp: PathBuf,
}

/// Checkpoints of a running machine, or in images.
#[derive(Debug, clap::Subcommand)]
pub enum SnapshotCommand {
    /// Freeze the whole machine under a name; the guest goes on afterwards
    Save(SaveArgs),
    /// Take the machine back to a checkpoint
    Load(LoadArgs),
    /// Delete a checkpoint; its space can be used again
    Delete(SnapshotArgs),
    /// Draw the tree of checkpoints
    ///
    /// ALONE is what deleting a checkpoint gives back, SHARED what others hold, too. "<-" marks the
    /// one that the machine was saved to or loaded from last.
    List(ListArgs),
    /// Tell all of one checkpoint: its machine, its parent, its labels, its size
    Show(ShowArgs),
}

/// `snapshot save`
#[derive(Debug, Args)]
pub struct SaveArgs {
    #[command(flatten)]
    /// The checkpoint.
    pub snapshot: SnapshotArgs,
    /// Whether the guest runs meanwhile: it does, but for milliseconds (live), or it stands still until all is
    /// written (stop) [default: live]
    #[arg(long, value_name = "MODE", value_parser = ["live", "stop"], hide_possible_values = true)]
    pub mode: Option<String>,
    /// What the checkpoint is
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub description: String,
    /// Compress RAM and state, by the method of the image that holds them (its compression_type)
    #[arg(long, value_name = "METHOD", value_parser = ["none", "zlib", "zstd"])]
    pub compress: Option<String>,
    /// A label for tools; may be given more than once
    #[arg(long = "label", value_name = "KEY=VALUE")]
    pub labels: Vec<String>,
}

/// `snapshot load`
#[derive(Debug, Args)]
pub struct LoadArgs {
    #[command(flatten)]
    /// The checkpoint.
    pub snapshot: SnapshotArgs,
    /// When RAM is read: as the guest, which runs at once, needs it, and in the background (lazy), or all of it
    /// before the guest runs (eager) [default: lazy]
    #[arg(long, value_name = "MODE", value_parser = ["lazy", "eager"], hide_possible_values = true)]
    pub mode: Option<String>,
    /// What the guest's clocks do: they go on from the save (frozen), or are set forward to the host's time (host)
    /// [default: frozen]
    #[arg(long, value_name = "POLICY", value_parser = ["frozen", "host"], hide_possible_values = true)]
    pub clock: Option<String>,
}

/// A running machine, or images that nobody uses.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct CheckpointSource {
    /// The path given to --qmp unix:PATH
    #[arg(long, value_name = "PATH")]
    pub qmp: Option<PathBuf>,
    /// A disk image; of a machine with several disks, each
    #[arg(long, value_name = "FILE")]
    pub image: Vec<PathBuf>,
}

/// `snapshot list`
#[derive(Debug, Args)]
pub struct ListArgs {
    #[command(flatten)]
    /// Where they are.
    pub source: CheckpointSource,
    /// How to print
    #[arg(long, value_name = "FMT", default_value = "human")]
    pub output: Output,
}

/// `snapshot show`
#[derive(Debug, Args)]
pub struct ShowArgs {
    #[command(flatten)]
    /// Where it is.
    pub source: CheckpointSource,
    /// Name of the checkpoint
    pub tag: String,
    /// How to print
    #[arg(long, value_name = "FMT", default_value = "human")]
    pub output: Output,
}

/// Which checkpoint, and where.
#[derive(Debug, Args)]
pub struct SnapshotArgs {
    #[command(flatten)]
    /// The machine.
    pub target: QmpTarget,
    /// Name of the checkpoint
    pub tag: String,
    /// Disk (node name) that keeps RAM and devices [default: the one that has them, else the first writable disk]
    #[arg(long, value_name = "NODE")]
    pub vmstate: Option<String>,
    /// Disks (node names) to include [default: all writable disks]
    #[arg(long, value_name = "NODE", value_delimiter = ',')]
    pub devices: Vec<String>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_kernel_command_line_may_start_with_a_dash() {
        let cli = Cli::parse_from(["tardigrade", "--kernel", "k", "--append", "-x y"]);
        assert_eq!(cli.machine.append.as_deref(), Some("-x y"));
    }
}
