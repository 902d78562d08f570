//! `tardigrade image`: the options of qemu-img, by its names.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

const EXAMPLES: &str = "\
Examples:
  tardigrade image create -f qcow2 disk.qcow2 20G
  tardigrade image create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2
  tardigrade image create -f qcow2 -o cluster_size=4k,lazy_refcounts=on,preallocation=metadata d.qcow2 1G
  tardigrade image check --repair leaks disk.qcow2
  tardigrade image resize disk.qcow2 +10G
  tardigrade image snapshot create disk.qcow2 before-upgrade
  tardigrade image convert -l before-upgrade -O raw disk.qcow2 disk.raw
  tardigrade image bitmap add disk.qcow2 backup0

Images that a machine uses are locked, as by QEMU: stop it, or ask it over QMP.";

/// Work on disk images that no machine uses.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ImageArgs {
    #[command(subcommand)]
    /// What to do.
    pub command: ImageCommand,
}

/// What to do with an image.
#[derive(Debug, clap::Subcommand)]
pub enum ImageCommand {
    /// Make an image
    Create(CreateArgs),
    /// Tell what an image is
    Info(InfoArgs),
    /// Find errors and leaked clusters, and repair them
    ///
    /// Exit status: 0 no errors are left, 1 the check could not be completed, 2 the image has
    /// errors, 3 the image has leaked clusters but no errors, 63 the format cannot be checked.
    Check(CheckArgs),
    /// Make a disk larger or smaller
    Resize(ResizeArgs),
    /// List, make, go back to or delete internal snapshots
    #[command(subcommand)]
    Snapshot(ImageSnapshotCommand),
    /// Make, remove or change the dirty bitmaps that an image stores
    #[command(subcommand)]
    Bitmap(BitmapCommand),
    /// Copy a disk into an image of another format or with other options
    Convert(ConvertArgs),
}

/// The format of output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    Human,
    /// For programs, as QMP's types.
    Json,
}

/// What is repaired.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RepairWhat {
    /// Clusters that are counted and not used
    Leaks,
    /// Everything that can be; what cannot be found any more reads as zeroes
    All,
}

/// `image create`
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Format: qcow2 or raw
    #[arg(short, long, value_name = "FMT", default_value = "raw")]
    pub format: String,
    /// Backing file, relative to the new image's directory
    #[arg(short, long, value_name = "FILE")]
    pub backing: Option<String>,
    /// Format of the backing file
    #[arg(short = 'F', long, value_name = "FMT")]
    pub backing_format: Option<String>,
    /// Do not look at the backing file
    #[arg(short = 'u', long)]
    pub backing_unsafe: bool,
    /// Options NAME=VALUE[,...]; '-o help' lists them
    #[arg(short, long, value_name = "OPTIONS")]
    pub options: Vec<String>,
    /// Print nothing but errors
    #[arg(short, long)]
    pub quiet: bool,
    /// The new image
    #[arg(required_unless_present = "options")]
    pub file: Option<PathBuf>,
    /// Size of the disk: bytes, or with a suffix k, M, G, T, P, E [default: the backing file's]
    #[arg(allow_hyphen_values = true)]
    pub size: Option<String>,
}

/// `image info`
#[derive(Debug, Args)]
pub struct InfoArgs {
    /// Format of the image [default: found out]
    #[arg(short, long, value_name = "FMT")]
    pub format: Option<String>,
    /// How to print
    #[arg(long, value_name = "FMT", default_value = "human")]
    pub output: Output,
    /// All images of the backing chain
    #[arg(long)]
    pub backing_chain: bool,
    /// Also while somebody writes to the image; what is told may be half old
    #[arg(short = 'U', long)]
    pub force_share: bool,
    /// The image
    pub file: PathBuf,
}

/// `image check`
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Format of the image [default: found out]
    #[arg(short, long, value_name = "FMT")]
    pub format: Option<String>,
    /// How to print
    #[arg(long, value_name = "FMT", default_value = "human")]
    pub output: Output,
    /// Repair what is found
    #[arg(short, long, value_name = "WHAT")]
    pub repair: Option<RepairWhat>,
    /// Print nothing but errors
    #[arg(short, long)]
    pub quiet: bool,
    /// Also while somebody writes to the image; errors found may be none
    #[arg(short = 'U', long, conflicts_with = "repair")]
    pub force_share: bool,
    /// The image
    pub file: PathBuf,
}

/// `image resize`
#[derive(Debug, Args)]
pub struct ResizeArgs {
    /// Format of the image [default: found out]
    #[arg(short, long, value_name = "FMT")]
    pub format: Option<String>,
    /// How the new space is taken: off, metadata, falloc or full
    #[arg(long, value_name = "MODE", default_value = "off")]
    pub preallocation: String,
    /// Allow a smaller size: what is past the new end is lost
    #[arg(long)]
    pub shrink: bool,
    /// Print nothing but errors
    #[arg(short, long)]
    pub quiet: bool,
    /// The image
    pub file: PathBuf,
    /// The new size, or with + or - the difference: bytes, or with a suffix k, M, G, T, P, E
    #[arg(allow_hyphen_values = true)]
    pub size: String,
}

/// `image snapshot`
#[derive(Debug, clap::Subcommand)]
pub enum ImageSnapshotCommand {
    /// List the snapshots, as qemu-img does
    #[command(short_flag = 'l')]
    List {
        /// Draw them as a tree, with sizes
        #[arg(long)]
        tree: bool,
        /// Also while somebody writes to the image
        #[arg(short = 'U', long)]
        force_share: bool,
        /// How to print
        #[arg(long, value_name = "FMT", default_value = "human")]
        output: Output,
        /// The image
        file: PathBuf,
    },
    /// Make a snapshot of the disk
    Create(ImageSnapshotArgs),
    /// Go back to a snapshot: what the disk holds now is lost unless it is in another snapshot
    Apply(ImageSnapshotArgs),
    /// Delete a snapshot
    Delete(ImageSnapshotArgs),
}

/// A snapshot of an image.
#[derive(Debug, Args)]
pub struct ImageSnapshotArgs {
    /// The image
    pub file: PathBuf,
    /// The snapshot's name (or, of one that exists, its id)
    pub snapshot: String,
}

/// `image bitmap`
#[derive(Debug, clap::Subcommand)]
pub enum BitmapCommand {
    /// Make a bitmap, which notes writes from then on
    Add {
        /// Bytes that one bit stands for [default: the cluster size, between 4k and 64k]
        #[arg(short, long, value_name = "SIZE")]
        granularity: Option<String>,
        /// Do not note writes until it is enabled
        #[arg(long)]
        disabled: bool,
        #[command(flatten)]
        /// Which.
        target: BitmapArgs,
    },
    /// Remove a bitmap; also one that is inconsistent
    Remove(BitmapArgs),
    /// Forget what a bitmap has noted
    Clear(BitmapArgs),
    /// Note writes from now on
    Enable(BitmapArgs),
    /// Note no more writes
    Disable(BitmapArgs),
    /// Add what another bitmap has noted
    Merge {
        /// Image that has the other bitmap [default: the same]
        #[arg(short = 'b', long, value_name = "FILE")]
        source_file: Option<PathBuf>,
        /// Format of that image [default: found out]
        #[arg(short = 'F', long, value_name = "FMT", requires = "source_file")]
        source_format: Option<String>,
        #[command(flatten)]
        /// Which it is added to.
        target: BitmapArgs,
        /// The other bitmap
        source: String,
    },
}

/// A bitmap of an image.
#[derive(Debug, Args)]
pub struct BitmapArgs {
    /// Format of the image [default: found out]
    #[arg(short, long, value_name = "FMT")]
    pub format: Option<String>,
    /// The image
    pub file: PathBuf,
    /// The bitmap's name
    pub bitmap: String,
}

/// `image convert`
#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// Format of the source [default: found out]
    #[arg(short, long, value_name = "FMT")]
    pub format: Option<String>,
    /// Format of the copy: qcow2 or raw
    #[arg(short = 'O', long, value_name = "FMT", default_value = "raw")]
    pub target_format: String,
    /// Options of the copy, as for create
    #[arg(short, long, value_name = "OPTIONS")]
    pub options: Vec<String>,
    /// Compress the copy
    #[arg(short, long)]
    pub compress: bool,
    /// Copy the disk of this internal snapshot (its id or name)
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    pub snapshot: Option<String>,
    /// Write into an image that is there and large enough, instead of making one
    #[arg(short = 'n', long, conflicts_with_all = ["options", "compress"])]
    pub no_create: bool,
    /// Also while somebody writes to the source; the copy may be of no one moment
    #[arg(short = 'U', long)]
    pub force_share: bool,
    /// Print nothing but errors
    #[arg(short, long)]
    pub quiet: bool,
    /// The image to copy; its backing files are copied into the same image
    pub source: PathBuf,
    /// The new image
    pub target: PathBuf,
}
