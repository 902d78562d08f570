//! The machine: what it is and what it does.

use super::macros::{enums, objects};

enums! {
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
}

objects! {
    /// From `query-status`.
    StatusInfo {
        /// The run state.
        "status" status: RunState,
        /// Whether vCPUs run.
        "running" running: bool,
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
}
