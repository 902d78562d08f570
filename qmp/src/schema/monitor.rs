//! What clients ask at their start, and the human monitor.

use super::SysEmuTarget;
use super::macros::objects;

objects! {
    /// Arguments of `human-monitor-command`.
    HumanMonitorArguments {
        /// The line.
        "command-line" command_line: String,
        /// The vCPU that it is about; no line here is about one.
        "cpu-index" cpu_index: Option<i64>,
    }

    /// A kind of machine.
    MachineInfo {
        /// As in `--machine`.
        "name" name: String,
        /// Whether it is the one that is made without a word.
        "is-default" is_default: Option<bool>,
        /// Most vCPUs.
        "cpu-max" cpu_max: i64,
        /// Whether vCPUs can be plugged in.
        "hotpluggable-cpus" hotpluggable_cpus: bool,
        /// Whether NUMA nodes can have memory by size.
        "numa-mem-supported" numa_mem_supported: bool,
        /// Whether it will go.
        "deprecated" deprecated: bool,
        /// The kind of CPU.
        "default-cpu-type" default_cpu_type: Option<String>,
        /// Whether it can have ACPI.
        "acpi" acpi: bool,
    }

    /// A kind of CPU.
    CpuDefinitionInfo {
        /// As in `--cpu`.
        "name" name: String,
        /// Whether a checkpoint of one loads on another host that has it.
        "migration-safe" migration_safe: Option<bool>,
        /// Whether it is always the same.
        "static" is_static: bool,
        /// What it lacks here.
        "unavailable-features" unavailable_features: Option<Vec<String>>,
        /// The name of its type.
        "typename" typename: String,
        /// Whether it will go.
        "deprecated" deprecated: bool,
    }

    /// A thread for I/O that was asked for by name. Here each device has one without a name.
    IOThreadInfo {
        /// Its name.
        "id" id: String,
        /// The host's number of it.
        "thread-id" thread_id: i64,
        /// Longest time of polling in nanoseconds.
        "poll-max-ns" poll_max_ns: i64,
        /// How that grows.
        "poll-grow" poll_grow: i64,
        /// How it shrinks.
        "poll-shrink" poll_shrink: i64,
        /// Most requests that are handed over at once.
        "aio-max-batch" aio_max_batch: i64,
    }

    /// A character device: a monitor, or what the serial port is connected to.
    ChardevInfo {
        /// Its name.
        "label" label: String,
        /// What it is: `null`, `stdio`, `file`, or the address of a socket, with `disconnected:` before it
        /// while nobody is there.
        "filename" filename: String,
        /// Whether the device that uses it wants its data: always.
        "frontend-open" frontend_open: bool,
    }

    /// From `query-target`.
    TargetInfo {
        /// The architecture of the guest.
        "arch" arch: SysEmuTarget,
    }
}
