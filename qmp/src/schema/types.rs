//! The types of what commands take and return.

use super::macros::{enums, objects};
use super::{
    BlockDeviceIoStatus, BlockdevDetectZeroesOptions, Branch, ImageInfoSpecific, Member, Qapi,
    Type, UnionInfo,
};

enums! {
    /// What a client and the server may agree on.
    QmpCapability {
        /// Out-of-band execution of commands.
        Oob = "oob",
    }

    /// What the machine is doing.
    RunState {
        /// Stopped by a debugger.
        Debug = "debug",
        /// Waiting for an incoming migration.
        InMigrate = "inmigrate",
        /// Stopped by an error of the hypervisor.
        InternalError = "internal-error",
        /// Stopped by a disk that failed.
        IoError = "io-error",
        /// Stopped by `stop`.
        Paused = "paused",
        /// Stopped after an outgoing migration.
        PostMigrate = "postmigrate",
        /// Not yet started.
        PreLaunch = "prelaunch",
        /// Stopped to end a migration.
        FinishMigrate = "finish-migrate",
        /// Stopped while, or after, its state was put back.
        RestoreVm = "restore-vm",
        /// Running.
        Running = "running",
        /// Stopped to save its state.
        SaveVm = "save-vm",
        /// Shut down, and the process lives.
        Shutdown = "shutdown",
        /// Asleep.
        Suspended = "suspended",
        /// Stopped by the watchdog.
        Watchdog = "watchdog",
        /// Stopped by its own panic.
        GuestPanicked = "guest-panicked",
        /// Paused to save and load its state in turns.
        Colo = "colo",
    }

    /// An architecture of guests: here there is one.
    SysEmuTarget {
        /// 64-bit PCs.
        X86_64 = "x86_64",
    }

    /// Who asked for a shutdown or a reset.
    ShutdownCause {
        /// No one.
        None = "none",
        /// An error of the host.
        HostError = "host-error",
        /// `quit`.
        HostQmpQuit = "host-qmp-quit",
        /// `system_reset`.
        HostQmpSystemReset = "host-qmp-system-reset",
        /// A signal, such as SIGINT.
        HostSignal = "host-signal",
        /// The user interface.
        HostUi = "host-ui",
        /// The guest powered off.
        GuestShutdown = "guest-shutdown",
        /// The guest reset itself.
        GuestReset = "guest-reset",
        /// The guest panicked.
        GuestPanic = "guest-panic",
        /// A part of the machine was reset, not by the guest.
        SubsystemReset = "subsystem-reset",
        /// A checkpoint is being loaded.
        SnapshotLoad = "snapshot-load",
    }

    /// When `snapshot-load` reads RAM.
    LoadMode {
        /// When it is needed, and in the background: the guest runs at once.
        Lazy = "lazy",
        /// Before the guest runs.
        Eager = "eager",
    }

    /// What a request to a node does.
    IoOperationType {
        /// It reads.
        Read = "read",
        /// It writes.
        Write = "write",
    }

    /// What is done about a failed request.
    BlockErrorAction {
        /// Nothing.
        Ignore = "ignore",
        /// The guest is told.
        Report = "report",
        /// The guest is stopped.
        Stop = "stop",
    }

    /// What a job does.
    JobType {
        /// `block-commit`.
        Commit = "commit",
        /// `block-stream`.
        Stream = "stream",
        /// `blockdev-mirror`.
        Mirror = "mirror",
        /// `blockdev-backup`.
        Backup = "backup",
        /// `blockdev-create`.
        Create = "create",
        /// `x-blockdev-amend`.
        Amend = "amend",
        /// `snapshot-load`.
        SnapshotLoad = "snapshot-load",
        /// `snapshot-save`.
        SnapshotSave = "snapshot-save",
        /// `snapshot-delete`.
        SnapshotDelete = "snapshot-delete",
    }

    /// The state of a job; see [`crate::jobs`].
    JobStatus {
        /// Not yet a job; never seen outside.
        Undefined = "undefined",
        /// Not yet started.
        Created = "created",
        /// At work.
        Running = "running",
        /// At work, but paused.
        Paused = "paused",
        /// At work, and could complete when told to.
        Ready = "ready",
        /// Ready, but paused.
        Standby = "standby",
        /// Done, and waits for the other jobs of its transaction.
        Waiting = "waiting",
        /// Done, and waits to be finalized.
        Pending = "pending",
        /// Failed or cancelled, and cleaning up.
        Aborting = "aborting",
        /// Over; its result can be asked for until it is dismissed.
        Concluded = "concluded",
        /// Gone.
        Null = "null",
    }

    /// Whether the guest runs while it is saved.
    SnapshotSaveMode {
        /// It does, but for a moment.
        Live = "live",
        /// It stands still.
        Stop = "stop",
    }

    /// How a checkpoint's VM state is compressed.
    SnapshotCompression {
        /// Not at all.
        Off = "none",
        /// With deflate.
        Zlib = "zlib",
        /// With Zstandard.
        Zstd = "zstd",
    }

    /// How a node is exported.
    BlockExportType {
        /// Over NBD.
        Nbd = "nbd",
    }

    /// What becomes of an export's clients when it is taken away.
    BlockExportRemoveMode {
        /// It stays if it has any.
        Safe = "safe",
        /// They are disconnected.
        Hard = "hard",
    }

    /// What can be asked of a job.
    JobVerb {
        /// End early.
        Cancel = "cancel",
        /// Rest.
        Pause = "pause",
        /// Go on.
        Resume = "resume",
        /// Change the speed.
        SetSpeed = "set-speed",
        /// Complete what is ready.
        Complete = "complete",
        /// Forget a concluded job.
        Dismiss = "dismiss",
        /// Make the results count.
        Finalize = "finalize",
        /// Change options.
        Change = "change",
    }
}

objects! {
    /// Three numbers of a version.
    VersionTriple {
        /// The third number.
        "micro" micro: i64,
        /// The second number.
        "minor" minor: i64,
        /// The first number.
        "major" major: i64,
    }

    /// The version in the greeting and from `query-version`.
    VersionInfo {
        /// The version of QEMU's protocol and schema that clients may expect.
        "qemu" qemu: VersionTriple,
        /// The program that it is, for people.
        "package" package: String,
    }

    /// An entry of `query-commands`.
    CommandName {
        /// The command.
        "name" name: String,
    }

    /// From `query-status`.
    StatusInfo {
        /// The run state.
        "status" status: RunState,
        /// Whether vCPUs run.
        "running" running: bool,
    }

    /// From `x-query-load`.
    LoadInfo {
        /// Bytes of RAM that are in the image alone; 0 when all is read.
        "missing" missing: u64,
        /// How many loads since the start went back to the checkpoint that the guest ran from, and put
        /// back only what it had written.
        "rewinds" rewinds: u64,
        /// Bytes that they put back, all together.
        "rewound" rewound: u64,
        /// The checkpoint that they are of.
        "tag" tag: Option<String>,
        /// The node that holds it.
        "node-name" node_name: Option<String>,
        /// Why a page that the guest waits for cannot be read.
        "error" error: Option<String>,
    }

    /// From `query-name`.
    NameInfo {
        /// The name.
        "name" name: Option<String>,
    }

    /// From `query-uuid`.
    UuidInfo {
        /// The UUID.
        "UUID" uuid: String,
    }

    /// From `query-vm-generation-id`.
    GuidInfo {
        /// The id.
        "guid" guid: String,
    }

    /// From `query-kvm`.
    KvmInfo {
        /// Whether KVM is used.
        "enabled" enabled: bool,
        /// Whether the host has it.
        "present" present: bool,
    }

    /// A vCPU.
    CpuInfoFast {
        /// Counted from 0.
        "cpu-index" cpu_index: i64,
        /// Its path in the object model.
        "qom-path" qom_path: String,
        /// The host thread that runs it.
        "thread-id" thread_id: i64,
        /// Its place in the topology.
        "props" props: Option<CpuInstanceProperties>,
        /// The architecture.
        "target" target: SysEmuTarget,
    }

    /// A vCPU's place in the topology.
    CpuInstanceProperties {
        /// The NUMA node.
        "node-id" node_id: Option<i64>,
        /// The socket.
        "socket-id" socket_id: Option<i64>,
        /// The core within the socket.
        "core-id" core_id: Option<i64>,
        /// The thread within the core.
        "thread-id" thread_id: Option<i64>,
    }

    /// A job, from `query-jobs`.
    JobInfo {
        /// The job.
        "id" id: String,
        /// What it does.
        "type" kind: JobType,
        /// Its state.
        "status" status: JobStatus,
        /// Done so far; only the ratio to the total has a meaning.
        "current-progress" current_progress: i64,
        /// The expected progress at the end.
        "total-progress" total_progress: i64,
        /// Why it failed; left out while it did not.
        "error" error: Option<String>,
        /// Of a save: nanoseconds that it kept a running guest standing, the longest time in one piece.
        "x-pause-ns" pause_ns: Option<i64>,
        /// Of a save that succeeded: bytes of RAM and machine state that were written.
        "x-bytes-written" bytes_written: Option<i64>,
        /// Of a save that succeeded: whether the rest of RAM is shared with an earlier checkpoint.
        "x-incremental" incremental: Option<bool>,
    }

    /// How long saves kept the guest standing, from `x-query-checkpoint-stats`.
    CheckpointStats {
        /// How many pauses there were.
        "saves" saves: i64,
        /// Nanoseconds of the last one.
        "last-pause-ns" last_pause_ns: i64,
        /// Nanoseconds of the longest.
        "longest-pause-ns" longest_pause_ns: i64,
        /// Nanoseconds of all together.
        "total-pause-ns" total_pause_ns: i64,
        /// How many had which length, the shortest first; where there were none is left out.
        "pauses" pauses: Vec<PauseBucket>,
    }

    /// Pauses of about one length: longer than the bucket before this has, its bound doubled.
    PauseBucket {
        /// Microseconds that no pause of these was longer than; left out where there is no bound.
        "up-to-us" up_to_us: Option<i64>,
        /// How many.
        "count" count: i64,
    }

    /// An internal snapshot of an image.
    SnapshotInfo {
        /// The id, unique in the image.
        "id" id: String,
        /// The tag.
        "name" name: String,
        /// Bytes of machine state; 0 if there is none.
        "vm-state-size" vm_state_size: i64,
        /// When it was taken, in seconds since 1970.
        "date-sec" date_sec: i64,
        /// The nanoseconds of it.
        "date-nsec" date_nsec: i64,
        /// The guest's clock then, seconds.
        "vm-clock-sec" vm_clock_sec: i64,
        /// The nanoseconds of it.
        "vm-clock-nsec" vm_clock_nsec: i64,
        /// Instructions executed, when they are counted.
        "icount" icount: Option<i64>,
    }

    /// An image.
    ImageInfo {
        /// The file.
        "filename" filename: String,
        /// The format's driver.
        "format" format: String,
        /// Whether it was not closed cleanly.
        "dirty-flag" dirty_flag: Option<bool>,
        /// Bytes on the host's disk.
        "actual-size" actual_size: Option<i64>,
        /// Bytes that the guest sees.
        "virtual-size" virtual_size: i64,
        /// Bytes of a cluster.
        "cluster-size" cluster_size: Option<i64>,
        /// Whether it is encrypted.
        "encrypted" encrypted: Option<bool>,
        /// Whether it is compressed.
        "compressed" compressed: Option<bool>,
        /// The backing file, as named in the image.
        "backing-filename" backing_filename: Option<String>,
        /// The backing file, as found.
        "full-backing-filename" full_backing_filename: Option<String>,
        /// The format of the backing file.
        "backing-filename-format" backing_filename_format: Option<String>,
        /// Internal snapshots; left out if there are none.
        "snapshots" snapshots: Option<Vec<SnapshotInfo>>,
        /// The backing image; left out with `flat`.
        "backing-image" backing_image: Option<Box<ImageInfo>>,
        /// What only this format has.
        "format-specific" format_specific: Option<ImageInfoSpecific>,
    }

    /// How a node uses the host's cache.
    BlockdevCacheInfo {
        /// Whether writes may stay in the cache until a flush.
        "writeback" writeback: bool,
        /// Whether the host's page cache is bypassed.
        "direct" direct: bool,
        /// Whether flushes are ignored.
        "no-flush" no_flush: bool,
    }

    /// A block node.
    BlockDeviceInfo {
        /// The file.
        "file" file: String,
        /// The node's name.
        "node-name" node_name: Option<String>,
        /// Whether it is read-only.
        "ro" ro: bool,
        /// The driver.
        "drv" drv: String,
        /// The backing file, if there is one.
        "backing_file" backing_file: Option<String>,
        /// How many backing files there are, one behind the other.
        "backing_file_depth" backing_file_depth: i64,
        /// Whether the image is in use by this process.
        "active" active: bool,
        /// Whether it is encrypted.
        "encrypted" encrypted: bool,
        /// What is done with zeroes written.
        "detect_zeroes" detect_zeroes: BlockdevDetectZeroesOptions,
        /// Limit of bytes per second; 0 is none.
        "bps" bps: i64,
        /// Limit of bytes read per second.
        "bps_rd" bps_rd: i64,
        /// Limit of bytes written per second.
        "bps_wr" bps_wr: i64,
        /// Limit of operations per second.
        "iops" iops: i64,
        /// Limit of reads per second.
        "iops_rd" iops_rd: i64,
        /// Limit of writes per second.
        "iops_wr" iops_wr: i64,
        /// Limit of bytes a second in a burst; left out if there are none.
        "bps_max" bps_max: Option<i64>,
        /// Limit of bytes read a second in a burst; left out if there are none.
        "bps_rd_max" bps_rd_max: Option<i64>,
        /// Limit of bytes written a second in a burst; left out if there are none.
        "bps_wr_max" bps_wr_max: Option<i64>,
        /// Limit of requests a second in a burst; left out if there are none.
        "iops_max" iops_max: Option<i64>,
        /// Limit of reads a second in a burst; left out if there are none.
        "iops_rd_max" iops_rd_max: Option<i64>,
        /// Limit of writes a second in a burst; left out if there are none.
        "iops_wr_max" iops_wr_max: Option<i64>,
        /// Seconds that one may last.
        "bps_max_length" bps_max_length: Option<i64>,
        /// Seconds that one may last.
        "bps_rd_max_length" bps_rd_max_length: Option<i64>,
        /// Seconds that one may last.
        "bps_wr_max_length" bps_wr_max_length: Option<i64>,
        /// Seconds that one may last.
        "iops_max_length" iops_max_length: Option<i64>,
        /// Seconds that one may last.
        "iops_rd_max_length" iops_rd_max_length: Option<i64>,
        /// Seconds that one may last.
        "iops_wr_max_length" iops_wr_max_length: Option<i64>,
        /// Bytes for which a larger request counts as several.
        "iops_size" iops_size: Option<i64>,
        /// The group of disks that share the limits.
        "group" group: Option<String>,
        /// The image.
        "image" image: ImageInfo,
        /// The use of the cache.
        "cache" cache: BlockdevCacheInfo,
        /// Offset above which a write is reported; 0 is off.
        "write_threshold" write_threshold: i64,
        /// Dirty bitmaps; left out if there are none.
        "dirty-bitmaps" dirty_bitmaps: Option<Vec<BlockDirtyInfo>>,
    }

    /// A dirty bitmap.
    BlockDirtyInfo {
        /// Its name.
        "name" name: Option<String>,
        /// Dirty bytes.
        "count" count: i64,
        /// Bytes that one bit stands for.
        "granularity" granularity: u64,
        /// Whether writes are noted.
        "recording" recording: bool,
        /// Whether an export or a job has it: it cannot be changed by commands.
        "busy" busy: bool,
        /// Whether it is stored in the image when that is closed.
        "persistent" persistent: bool,
        /// Set if it was not stored properly: it can only be removed.
        "inconsistent" inconsistent: Option<bool>,
    }

    /// An export.
    BlockExportInfo {
        /// Its id.
        "id" id: String,
        /// How it is exported.
        "type" kind: BlockExportType,
        /// The node.
        "node-name" node_name: String,
        /// Whether it is gone as soon as its last client is.
        "shutting-down" shutting_down: bool,
    }

    /// An internet address to listen on.
    InetSocketAddress {
        /// Host name or address.
        "host" host: String,
        /// Port number; 0 is any.
        "port" port: String,
    }

    /// A unix socket to listen on.
    UnixSocketAddress {
        /// Its path.
        "path" path: String,
    }

    /// A block device.
    BlockInfo {
        /// The backend's name; empty for nodes from `--blockdev`.
        "device" device: String,
        /// The device's path or id.
        "qdev" qdev: Option<String>,
        /// Always "unknown".
        "type" kind: String,
        /// Whether the medium can be removed.
        "removable" removable: bool,
        /// Whether the guest has locked it.
        "locked" locked: bool,
        /// The node that it uses.
        "inserted" inserted: Option<BlockDeviceInfo>,
        /// Whether I/O works.
        "io-status" io_status: Option<BlockDeviceIoStatus>,
    }
}

/// Where a server listens (QAPI `SocketAddressLegacy`, as far as it goes).
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(tag = "type", content = "data", rename_all = "lowercase")]
pub enum SocketAddress {
    /// On a TCP port.
    Inet(InetSocketAddress),
    /// On a unix socket.
    Unix(UnixSocketAddress),
}

impl Qapi for SocketAddress {
    const TYPE: Type = Type::Union(&UnionInfo {
        name: "SocketAddressLegacy",
        doc: "Where a server listens.",
        tag: "type",
        branches: &[
            Branch { value: "inet", members: &[data::<InetSocketAddress>()] },
            Branch { value: "unix", members: &[data::<UnixSocketAddress>()] },
        ],
    });
}

const fn data<T: Qapi>() -> Member {
    Member { name: "data", doc: "The address.", ty: T::TYPE, optional: false }
}
