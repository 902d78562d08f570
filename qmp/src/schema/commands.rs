//! The commands.

use super::macros::command_enum;
use super::*;

command_enum! {
    /// The commands that are about the session itself, and answered here.
    pub(crate) enum Control, CONTROL;

    /// Ends the negotiation of capabilities; other commands are accepted from now on.
    Capabilities(CapabilitiesArguments) = "qmp_capabilities" -> ();
    /// The version, as in the greeting.
    QueryVersion = "query-version" -> VersionInfo;
    /// The names of all commands.
    QueryCommands = "query-commands" -> Vec<CommandName>;
    /// This schema: commands, events and their types, whose names are numbers that mean nothing.
    QueryQmpSchema = "query-qmp-schema" -> Vec<SchemaInfo>;
}

command_enum! {
    /// A command for the machine, its arguments checked.
    pub enum Command, MACHINE;

    /// The machine's run state.
    QueryStatus = "query-status" -> StatusInfo;
    /// The machine's name, if it was given one.
    QueryName = "query-name" -> NameInfo;
    /// The machine's UUID, all zeros if it was given none.
    QueryUuid = "query-uuid" -> UuidInfo;
    /// The VM generation id that the guest finds.
    QueryVmGenerationId = "query-vm-generation-id" -> GuidInfo;
    /// Whether KVM is there and used.
    QueryKvm = "query-kvm" -> KvmInfo;
    /// The vCPUs, without interrupting them.
    QueryCpusFast = "query-cpus-fast" -> Vec<CpuInfoFast>;
    /// The block devices, with the node that each one uses.
    QueryBlock = "query-block" -> Vec<BlockInfo>;
    /// What the requests of each block device come to.
    QueryBlockStats(BlockStatsArguments) = "query-blockstats" -> Vec<BlockStats>;
    /// The nodes of the block graph, newest first.
    QueryNamedBlockNodes(NamedNodesArguments) = "query-named-block-nodes" -> Vec<BlockDeviceInfo>;
    /// Opens a node of the block graph and those below it.
    BlockdevAdd(BlockdevOptions) = "blockdev-add" -> ();
    /// Closes a node that nothing uses.
    BlockdevDel(BlockdevDelArguments) = "blockdev-del" -> ();
    /// Gives nodes that may be in use other options: all of them, or none.
    BlockdevReopen(BlockdevReopenArguments) = "blockdev-reopen" -> ();
    /// Gives a disk another size.
    BlockResize(BlockResizeArguments) = "block_resize" -> ();
    /// Limits the I/O of a disk, or of a group of disks together.
    BlockSetIoThrottle(IoThrottleArguments) = "block_set_io_throttle" -> ();
    /// Puts an overlay that is open on top of a node in use: a snapshot of it.
    BlockdevSnapshot(BlockdevSnapshot) = "blockdev-snapshot" -> ();
    /// Creates or opens an overlay and puts it on top of a node in use: a snapshot of it.
    BlockdevSnapshotSync(BlockdevSnapshotSync) = "blockdev-snapshot-sync" -> ();
    /// Has an image name another backing file, the one that is open staying the same.
    ChangeBackingFile(ChangeBackingFileArguments) = "change-backing-file" -> ();
    /// Starts the NBD server.
    NbdServerStart(NbdServerArguments) = "nbd-server-start" -> ();
    /// Ends the NBD server with all its exports: BLOCK_EXPORT_DELETED of each before the reply.
    NbdServerStop = "nbd-server-stop" -> ();
    /// Offers a node to clients of the NBD server.
    BlockExportAdd(BlockExportOptions) = "block-export-add" -> ();
    /// Takes an export away.
    BlockExportDel(BlockExportDelArguments) = "block-export-del" -> ();
    /// The exports, newest first.
    QueryBlockExports = "query-block-exports" -> Vec<BlockExportInfo>;
    /// Starts to note which parts of a node are written.
    BlockDirtyBitmapAdd(BitmapAddArguments) = "block-dirty-bitmap-add" -> ();
    /// Removes a bitmap, from the image too.
    BlockDirtyBitmapRemove(BitmapArguments) = "block-dirty-bitmap-remove" -> ();
    /// Makes all of a bitmap clean.
    BlockDirtyBitmapClear(BitmapArguments) = "block-dirty-bitmap-clear" -> ();
    /// Notes writes from now on.
    BlockDirtyBitmapEnable(BitmapArguments) = "block-dirty-bitmap-enable" -> ();
    /// Notes no writes from now on.
    BlockDirtyBitmapDisable(BitmapArguments) = "block-dirty-bitmap-disable" -> ();
    /// Adds what is dirty in some bitmaps to another; all or nothing.
    BlockDirtyBitmapMerge(BitmapMergeArguments) = "block-dirty-bitmap-merge" -> ();
    /// Stops the guest: STOP before the reply.
    Stop = "stop" -> ();
    /// Lets the guest go on: RESUME before the reply.
    Cont = "cont" -> ();
    /// Ends the process: SHUTDOWN, then the reply, then the end of the connection.
    Quit = "quit" -> ();
    /// Resets the machine: RESET before the reply.
    SystemReset = "system_reset" -> ();
    /// Presses the power button: POWERDOWN before the reply. What comes of it is the guest's matter;
    /// without ACPI it has no button and hears nothing.
    SystemPowerdown = "system_powerdown" -> ();
    /// The architecture of the guest.
    QueryTarget = "query-target" -> TargetInfo;
    /// The kinds of machines.
    QueryMachines = "query-machines" -> Vec<MachineInfo>;
    /// The kinds of CPUs.
    QueryCpuDefinitions = "query-cpu-definitions" -> Vec<CpuDefinitionInfo>;
    /// The threads for I/O that have names: there are none.
    QueryIoThreads = "query-iothreads" -> Vec<IOThreadInfo>;
    /// The monitors in the order of the command line, then the serial port's other end.
    QueryChardev = "query-chardev" -> Vec<ChardevInfo>;
    /// Runs a line of the monitor for people, and returns its output; errors are told there, too.
    /// docs/monitor.md lists the lines.
    HumanMonitorCommand(HumanMonitorArguments) = "human-monitor-command" -> String;
    /// Begins to send the machine to a file, a command or another process: docs/migration.md.
    Migrate(MigrateArguments) = "migrate" -> ();
    /// Makes this machine, which waits for it, what comes from there.
    MigrateIncoming(MigrateIncomingArguments) = "migrate-incoming" -> ();
    /// Ends a migration that is under way; nothing if none is.
    MigrateCancel = "migrate_cancel" -> ();
    /// How far the last migration is.
    QueryMigrate = "query-migrate" -> MigrationInfo;
    /// Says what is wanted of migrations.
    MigrateSetCapabilities(MigrateSetCapabilitiesArguments) = "migrate-set-capabilities" -> ();
    /// What is wanted of migrations.
    QueryMigrateCapabilities = "query-migrate-capabilities" -> Vec<MigrationCapabilityStatus>;
    /// Says what migrations may use, from now on.
    MigrateSetParameters(MigrationParameters) = "migrate-set-parameters" -> ();
    /// What migrations may use.
    QueryMigrateParameters = "query-migrate-parameters" -> MigrationParameters;
    /// Starts a job that saves the machine and its disks as one checkpoint.
    SnapshotSave(SnapshotSaveArguments) = "snapshot-save" -> ();
    /// Starts a job that puts the machine and its disks back to a checkpoint.
    SnapshotLoad(SnapshotLoadArguments) = "snapshot-load" -> ();
    /// Starts a job that deletes a checkpoint.
    SnapshotDelete(SnapshotDeleteArguments) = "snapshot-delete" -> ();
    /// What a lazy load has still to read of RAM, and how many loads were done quickly.
    QueryLoad = "x-query-load" -> LoadInfo;
    /// The checkpoints on the machine's disks, the oldest first, with ancestry and sizes.
    QueryCheckpoints(QueryCheckpointsArguments) = "x-query-checkpoints" -> Vec<CheckpointInfo>;
    /// How long saves kept the guest standing.
    QueryCheckpointStats = "x-query-checkpoint-stats" -> CheckpointStats;
    /// The jobs, newest first.
    QueryJobs = "query-jobs" -> Vec<JobInfo>;
    /// Asks a job to end early.
    JobCancel(JobArguments) = "job-cancel" -> ();
    /// Asks a job to rest.
    JobPause(JobArguments) = "job-pause" -> ();
    /// Lets a paused job go on.
    JobResume(JobArguments) = "job-resume" -> ();
    /// Has a job that is ready complete.
    JobComplete(JobArguments) = "job-complete" -> ();
    /// Makes what a pending job did count, and the jobs that it ends with.
    JobFinalize(JobArguments) = "job-finalize" -> ();
    /// Removes a concluded job from the list.
    JobDismiss(JobArguments) = "job-dismiss" -> ();
    /// Does several things at one moment: all of them, or none.
    Transaction(TransactionArguments) = "transaction" -> ();
    /// Makes an internal snapshot of a disk.
    InternalSnapshot(InternalSnapshotArguments) = "blockdev-snapshot-internal-sync" -> ();
    /// Deletes an internal snapshot of a disk.
    InternalSnapshotDelete(InternalSnapshotDeleteArguments)
        = "blockdev-snapshot-delete-internal-sync" -> SnapshotInfo;
    /// Starts a job that makes an image.
    BlockdevCreate(CreateArguments) = "blockdev-create" -> ();
    /// Starts a job that copies a disk as it is now.
    BlockdevBackup(BackupArguments) = "blockdev-backup" -> ();
    /// Starts a job that copies a node, as it is now, to a file: the older form of `blockdev-backup`.
    DriveBackup(DriveBackupArguments) = "drive-backup" -> ();
    /// Starts a job that keeps a file the same as a node: the older form of `blockdev-mirror`.
    DriveMirror(DriveMirrorArguments) = "drive-mirror" -> ();
    /// Starts a job that makes a node the same as another, and keeps it so.
    BlockdevMirror(MirrorArguments) = "blockdev-mirror" -> ();
    /// Starts a job that copies what an image has into those below it.
    BlockCommit(CommitArguments) = "block-commit" -> ();
    /// Starts a job that copies what is below an image into it.
    BlockStream(StreamArguments) = "block-stream" -> ();
    /// The block jobs, newest first.
    QueryBlockJobs = "query-block-jobs" -> Vec<BlockJobInfo>;
    /// Asks a block job to end early.
    BlockJobCancel(BlockJobCancelArguments) = "block-job-cancel" -> ();
    /// Asks a block job to rest.
    BlockJobPause(BlockJobArguments) = "block-job-pause" -> ();
    /// Lets a paused block job go on.
    BlockJobResume(BlockJobArguments) = "block-job-resume" -> ();
    /// Has a block job that is ready complete.
    BlockJobComplete(BlockJobArguments) = "block-job-complete" -> ();
    /// Makes what a pending block job did count, and the jobs that it ends with.
    BlockJobFinalize(JobArguments) = "block-job-finalize" -> ();
    /// Removes a concluded block job from the list.
    BlockJobDismiss(JobArguments) = "block-job-dismiss" -> ();
    /// Limits the speed of a block job.
    BlockJobSetSpeed(BlockJobSpeedArguments) = "block-job-set-speed" -> ();
    /// Changes options of a block job.
    BlockJobChange(BlockJobChangeArguments) = "block-job-change" -> ();
}

/// The commands that may be sent with `exec-oob`: they are short, and of use while another runs.
pub(crate) const OUT_OF_BAND: &[&str] = &["job-cancel", "query-jobs", "stop"];

/// What commands can do that their types do not show, in QEMU's words: clients ask before they use it.
/// What QEMU tells besides is not so here: `dynamic-auto-read-only`, as files are not opened anew when the
/// first writer comes.
const FEATURES: &[(&str, &[&str])] = &[
    // The overlay may be what a mirror writes to.
    ("blockdev-snapshot", &["allow-write-only-overlay"]),
    // `blockdev-backup` does the same, to any node.
    ("drive-backup", &["deprecated"]),
    // `savevm` takes the nodes of devices, not those below them.
    ("human-monitor-command", &["savevm-monitor-nodes"]),
];

/// Objects that are flat unions in the schema of which one kind has members of its own: the object,
/// the member that decides, its value, and the kind's members. Here they may simply be left out.
pub(crate) const FLAT_UNIONS: &[(&str, &str, &str, &[&str])] = &[
    ("BlockExportOptions", "type", "nbd", &["name", "description", "bitmaps", "allocation-depth"]),
    ("BlockJobChangeArguments", "type", "mirror", &["copy-mode"]),
    ("BlockJobInfo", "type", "mirror", &["actively-synced"]),
];

/// What is told of a command besides its types.
pub(crate) fn features(name: &str) -> &'static [&'static str] {
    FEATURES.iter().find(|(of, _)| *of == name).map_or(&[], |(_, features)| features)
}

/// Every command there is.
pub fn commands() -> impl Iterator<Item = &'static CommandInfo> {
    CONTROL.iter().chain(MACHINE)
}

/// The command of that name.
pub fn find(name: &str) -> Option<&'static CommandInfo> {
    commands().find(|command| command.name == name)
}
