//! Checkpoints: what can be said of one that is made, and what is told of those there are. QEMU has
//! no such types: commands and members have names with `x-`.

use super::macros::{enums, objects};

enums! {
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

    /// When `snapshot-load` reads RAM.
    LoadMode {
        /// When it is needed, and in the background: the guest runs at once.
        Lazy = "lazy",
        /// Before the guest runs.
        Eager = "eager",
    }

    /// What the guest's clocks do about the time between save and load.
    LoadClock {
        /// They go on from the save: no time has passed for the guest.
        Frozen = "frozen",
        /// They are set forward by what passed of the host's time of day.
        Host = "host",
    }
}

objects! {
    /// A label of a checkpoint.
    CheckpointLabel {
        /// Its name.
        "key" key: String,
        /// Its value.
        "value" value: String,
    }

    /// Arguments of `snapshot-save`.
    SnapshotSaveArguments {
        /// The job to create.
        "job-id" job_id: String,
        /// The checkpoint.
        "tag" tag: String,
        /// The node that holds the machine's state: one of `devices`.
        "vmstate" vmstate: String,
        /// The nodes whose disks are in the checkpoint.
        "devices" devices: Vec<String>,
        /// Whether the guest runs meanwhile; `live` if left out.
        "x-mode" mode: Option<SnapshotSaveMode>,
        /// How VM state is compressed: by the method of the VM-state node's image, or, if left out,
        /// not at all.
        "x-compress" compress: Option<SnapshotCompression>,
        /// What the checkpoint is, for people; at most 4096 bytes.
        "x-description" description: Option<String>,
        /// What tools know it by: at most 64, keys of 1 to 63 bytes, values of up to 255.
        "x-labels" labels: Option<Vec<CheckpointLabel>>,
    }

    /// Arguments of `snapshot-load`.
    SnapshotLoadArguments {
        /// The job to create.
        "job-id" job_id: String,
        /// The checkpoint.
        "tag" tag: String,
        /// The node that holds the machine's state: one of `devices`.
        "vmstate" vmstate: String,
        /// The nodes whose disks are in the checkpoint.
        "devices" devices: Vec<String>,
        /// When RAM is read; lazy if absent.
        "x-mode" mode: Option<LoadMode>,
        /// What the guest's clocks do; `frozen` if left out.
        "x-clock" clock: Option<LoadClock>,
    }

    /// Arguments of `snapshot-delete`.
    SnapshotDeleteArguments {
        /// The job to create.
        "job-id" job_id: String,
        /// The checkpoint.
        "tag" tag: String,
        /// The nodes to delete it from.
        "devices" devices: Vec<String>,
    }

    /// Arguments of `x-query-checkpoints`.
    QueryCheckpointsArguments {
        /// The nodes to look at; by default all that are writable and can have snapshots.
        "devices" devices: Option<Vec<String>>,
        /// Only the checkpoints of this tag, and with the machine that they record.
        "tag" tag: Option<String>,
        /// Whether to count clusters, for which all of the snapshots' tables are read; by default
        /// they are.
        "sizes" sizes: Option<bool>,
    }

    /// What tells one checkpoint from all others.
    CheckpointRef {
        /// Its tag.
        "tag" tag: String,
        /// When it was saved: seconds since the epoch.
        "date-sec" date_sec: i64,
        /// Nanoseconds within the second.
        "date-nsec" date_nsec: i64,
        /// How long the guest had been running: seconds.
        "vm-clock-sec" vm_clock_sec: i64,
        /// Nanoseconds within the second.
        "vm-clock-nsec" vm_clock_nsec: i64,
    }

    /// What a part of a checkpoint takes, in bytes of whole clusters, tables included.
    CheckpointShare {
        /// What nothing else refers to: what a deletion gives back.
        "alone" alone: u64,
        /// What other checkpoints or the disk as it is now refer to, too.
        "shared" shared: u64,
    }

    /// A checkpoint's snapshot on one node.
    CheckpointPlace {
        /// The node.
        "node-name" node_name: String,
        /// The snapshot's id there.
        "id" id: String,
        /// What its disk takes.
        "disk" disk: Option<CheckpointShare>,
        /// What its VM state takes.
        "vm-state" vm_state: Option<CheckpointShare>,
    }

    /// A checkpoint.
    CheckpointInfo {
        /// Tag, date and clock.
        "checkpoint" checkpoint: CheckpointRef,
        /// Where it is.
        "places" places: Vec<CheckpointPlace>,
        /// The node with the VM state; none for a snapshot of disks only.
        "vmstate" vmstate: Option<String>,
        /// Bytes of the VM-state area, holes counted.
        "vm-state-size" vm_state_size: u64,
        /// The checkpoint that the guest had been saved to or loaded from last, where there was one.
        "parent" parent: Option<CheckpointRef>,
        /// The nearest of its ancestors that is in the same list.
        "nearest" nearest: Option<CheckpointRef>,
        /// Whether the machine was saved to or loaded from it last, or it is the nearest that is
        /// left of those before.
        "current" current: bool,
        /// What it is, for people.
        "description" description: String,
        /// What tools know it by.
        "labels" labels: Vec<CheckpointLabel>,
        /// Why its record cannot be told; it cannot be loaded either.
        "problem" problem: Option<String>,
        /// The machine; only where `tag` was given.
        "machine" machine: Option<CheckpointMachine>,
    }

    /// The machine that a checkpoint is of.
    CheckpointMachine {
        /// Its type.
        "type" kind: String,
        /// Its name.
        "name" name: Option<String>,
        /// Its UUID.
        "uuid" uuid: Option<String>,
        /// Bytes of RAM.
        "ram-bytes" ram_bytes: u64,
        /// Number of vCPUs.
        "vcpus" vcpus: i64,
        /// Vendor of its CPUs, as CPUID tells it.
        "cpu-vendor" cpu_vendor: String,
        /// Family of its CPUs.
        "cpu-family" cpu_family: i64,
        /// Model of its CPUs.
        "cpu-model" cpu_model: i64,
        /// Stepping of its CPUs.
        "cpu-stepping" cpu_stepping: i64,
        /// The kernel it was booted from.
        "kernel" kernel: Option<String>,
        /// The initial ramdisk.
        "initrd" initrd: Option<String>,
        /// The kernel's command line.
        "command-line" command_line: String,
        /// What relative file names are relative to.
        "directory" directory: Option<String>,
        /// The devices that the guest finds.
        "devices" devices: Vec<CheckpointDevice>,
    }

    /// A device that a checkpoint is of.
    CheckpointDevice {
        /// Its model.
        "model" model: String,
        /// Its id.
        "id" id: Option<String>,
        /// "mmio" or "pio".
        "bus" bus: String,
        /// Its first register.
        "address" address: u64,
        /// Its interrupt.
        "irq" irq: Option<i64>,
        /// Number of its request queues.
        "queues" queues: i64,
        /// The disk, if it is one.
        "disk" disk: Option<CheckpointDisk>,
    }

    /// A disk that a checkpoint is of.
    CheckpointDisk {
        /// Its node.
        "node-name" node_name: String,
        /// Its size in bytes.
        "size" size: u64,
        /// Whether the guest may not write.
        "read-only" read_only: bool,
        /// Whether it is in the checkpoint; one that is not stays as it is at a load.
        "saved" saved: bool,
        /// Its serial number.
        "serial" serial: String,
        /// Format of the image.
        "format" format: String,
        /// File name of the image.
        "filename" filename: String,
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
        /// Bytes of RAM in which the guest writes so much between such loads that all of them are put
        /// back each time, written or not, and writes to them cost the guest less.
        "rewound-whole" rewound_whole: u64,
        /// The checkpoint that they are of.
        "tag" tag: Option<String>,
        /// The node that holds it.
        "node-name" node_name: Option<String>,
        /// Why a page that the guest waits for cannot be read.
        "error" error: Option<String>,
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
}
