//! QMP commands. Each either does its thing and answers, or answers with an error.

use std::collections::BTreeMap;

use block::qcow2::Compression;
use qmp::schema::{
    CheckpointLabel, Command, CpuDefinitionInfo, CpuInfoFast, CpuInstanceProperties, GuidInfo,
    IOThreadInfo, KvmInfo, LoadInfo, MachineInfo, NameInfo, ShutdownCause, SnapshotCompression,
    SnapshotSaveMode, StatusInfo, SysEmuTarget, TargetInfo, TransactionAction,
    TransactionArguments, UuidInfo,
};
use serde::Serialize;
use serde_json::json;
use snapshot::About;

use super::work::{LoadOptions, SaveMode, SaveOptions, Target, Task};
use super::{Controller, RunState};
use crate::blocks::jobs::{self, is_job_command};
use crate::blocks::transaction::check_mode;
use crate::blocks::{Answer, is_block_command};
use crate::cli::values::{MACHINE_TYPE, MAX_VCPUS};

/// QEMU's name of the only kind of CPU.
const CPU_TYPE: &str = "host-x86_64-cpu";

impl Controller {
    /// Runs a command and answers it. Events that it causes go out before the answer.
    pub(super) fn command(&mut self, request: qmp::Request) {
        if let Command::HumanMonitorCommand(arguments) = &request.command {
            let arguments = arguments.clone();
            return self.monitor_command(&arguments, request);
        }
        let qmp::Request { command, reply, .. } = match request {
            request if saves_machine(&request.command) => request,
            request if is_block_command(&request.command) => return self.worker.run(request),
            request if is_job_command(&request.command) => {
                return jobs::run(self.blocks.jobs(), request);
            }
            request => request,
        };
        if let Command::Transaction(arguments) = command {
            return self.save_in_transaction(arguments, reply);
        }
        let answer = self.execute(command);
        reply.send(answer);
    }

    fn save_in_transaction(&mut self, arguments: TransactionArguments, reply: qmp::Reply) {
        let about = check_mode(&arguments).and_then(|()| about_state(&arguments));
        match about {
            Ok(about) => self.machine_transaction(arguments, about, reply),
            Err(error) => reply.send(Err(error)),
        }
    }

    fn execute(&mut self, command: Command) -> Answer {
        match command {
            Command::QueryStatus => value(&self.status()),
            Command::QueryName => value(&NameInfo { name: self.machine.spec().name.clone() }),
            Command::QueryUuid => {
                value(&UuidInfo { uuid: self.machine.spec().uuid.hyphenated().to_string() })
            }
            Command::QueryVmGenerationId => match self.machine.generation() {
                Some(id) => value(&GuidInfo { guid: id.hyphenated().to_string() }),
                // QEMU's words.
                None => Err(qmp::Error::generic("VM Generation ID device not found")),
            },
            Command::QueryKvm => value(&KvmInfo { enabled: true, present: true }),
            Command::QueryCpusFast => value(&self.cpus()),
            Command::QueryBlock => self.block_devices(),
            Command::QueryBlockStats(arguments) => value(&self.block_stats(&arguments)),
            Command::BlockSetIoThrottle(arguments) => {
                self.set_io_throttle(&arguments).and_then(|()| done())
            }
            Command::Stop => {
                self.stop();
                done()
            }
            Command::Cont => self.cont().and_then(|()| done()),
            Command::SystemReset => self.system_reset().and_then(|()| done()),
            Command::SystemPowerdown => self.system_powerdown().and_then(|()| done()),
            Command::QueryTarget => value(&TargetInfo { arch: SysEmuTarget::X86_64 }),
            Command::QueryMachines => value(&machines()),
            Command::QueryCpuDefinitions => value(&cpu_definitions()),
            // Devices have threads, but none that was asked for by name.
            Command::QueryIoThreads => value(&Vec::<IOThreadInfo>::new()),
            Command::QueryChardev => {
                let mut all = self.server.chardevs();
                all.extend(self.console.chardev());
                value(&all)
            }
            Command::Quit => {
                self.shutdown(false, ShutdownCause::HostQmpQuit);
                done()
            }
            Command::Migrate(arguments) => self.migrate(&arguments).and_then(|()| done()),
            Command::MigrateIncoming(arguments) => {
                self.migrate_incoming(&arguments).and_then(|()| done())
            }
            Command::MigrateCancel => {
                self.migrate_cancel();
                done()
            }
            Command::QueryMigrate => value(&self.migration_info()),
            Command::MigrateSetCapabilities(arguments) => {
                self.set_capabilities(&arguments.capabilities).and_then(|()| done())
            }
            Command::QueryMigrateCapabilities => value(&self.capabilities()),
            Command::MigrateSetParameters(arguments) => {
                self.set_parameters(&arguments).and_then(|()| done())
            }
            Command::QueryMigrateParameters => value(&self.parameters()),
            Command::SnapshotSave(arguments) => {
                let about = about(arguments.description.as_deref(), arguments.labels.as_deref())?;
                let target = Target {
                    tag: arguments.tag,
                    vmstate: arguments.vmstate,
                    devices: arguments.devices,
                };
                let mode = match arguments.mode {
                    None | Some(SnapshotSaveMode::Live) => SaveMode::Live,
                    Some(SnapshotSaveMode::Stop) => SaveMode::Stop,
                };
                let compress = match arguments.compress {
                    None | Some(SnapshotCompression::Off) => None,
                    Some(SnapshotCompression::Zlib) => Some(Compression::Zlib),
                    Some(SnapshotCompression::Zstd) => Some(Compression::Zstd),
                };
                let how = SaveOptions { mode, compress };
                self.add_job(arguments.job_id, Task::Save(target, how, about))
            }
            Command::SnapshotLoad(arguments) => {
                let target = Target {
                    tag: arguments.tag,
                    vmstate: arguments.vmstate,
                    devices: arguments.devices,
                };
                let how = LoadOptions {
                    mode: arguments.mode.unwrap_or(LoadOptions::USUAL.mode),
                    clock: arguments.clock.unwrap_or(LoadOptions::USUAL.clock),
                };
                self.add_job(arguments.job_id, Task::Load(target, how))
            }
            Command::SnapshotDelete(arguments) => {
                let task = Task::Delete { tag: arguments.tag, devices: arguments.devices };
                self.add_job(arguments.job_id, task)
            }
            Command::QueryLoad => value(&self.load_info()),
            Command::QueryCheckpointStats => value(&self.pauses.stats()),
            // The worker's.
            other => Err(qmp::Error::command_not_found(other.name())),
        }
    }

    fn add_job(&mut self, id: String, task: Task) -> Answer {
        self.create_job(id, task)?;
        done()
    }

    fn status(&self) -> StatusInfo {
        StatusInfo { status: self.state, running: self.state == RunState::Running }
    }

    fn load_info(&self) -> LoadInfo {
        let missing = self.machine.missing();
        LoadInfo {
            missing: missing.map_or(0, |missing| missing.ram.missing_bytes()),
            rewinds: self.rewinds,
            rewound: self.rewound_bytes,
            rewound_whole: self.machine.unlogged().bytes(),
            tag: missing.map(|missing| missing.tag.clone()),
            node_name: missing.map(|missing| missing.node.clone()),
            error: missing.and_then(|missing| missing.ram.failing()),
        }
    }

    fn cpus(&self) -> Vec<CpuInfoFast> {
        (0..)
            .zip(self.machine.vcpus())
            .map(|(index, vcpu)| CpuInfoFast {
                cpu_index: index,
                qom_path: format!("/machine/unattached/device[{index}]"),
                thread_id: i64::from(vcpu.thread_id()),
                props: Some(CpuInstanceProperties {
                    node_id: None,
                    socket_id: Some(0),
                    core_id: Some(index),
                    thread_id: Some(0),
                }),
                target: SysEmuTarget::X86_64,
            })
            .collect()
    }
}

/// query-machines
fn machines() -> Vec<MachineInfo> {
    let kind = |name: &str, cpus: u8, cpu: Option<&str>| MachineInfo {
        name: name.to_owned(),
        is_default: cpu.is_some().then_some(true),
        cpu_max: i64::from(cpus),
        hotpluggable_cpus: false,
        numa_mem_supported: false,
        deprecated: false,
        default_cpu_type: cpu.map(str::to_owned),
        acpi: cpu.is_some(),
    };
    vec![kind(MACHINE_TYPE, MAX_VCPUS, Some(CPU_TYPE)), kind("none", 1, None)]
}

/// query-cpu-definitions: there is the host's.
fn cpu_definitions() -> Vec<CpuDefinitionInfo> {
    vec![CpuDefinitionInfo {
        name: "host".to_owned(),
        migration_safe: Some(false),
        is_static: false,
        unavailable_features: Some(Vec::new()),
        typename: CPU_TYPE.to_owned(),
        deprecated: false,
    }]
}

/// Whether the command is a transaction with the machine's state in it.
fn saves_machine(command: &Command) -> bool {
    let Command::Transaction(arguments) = command else { return false };
    arguments.actions.iter().any(|action| matches!(action, TransactionAction::VmstateSave(_)))
}

/// What is said of a checkpoint that a transaction is to make.
fn about_state(arguments: &TransactionArguments) -> Result<About, qmp::Error> {
    let state = arguments.actions.iter().find_map(|action| match action {
        TransactionAction::VmstateSave(arguments) => Some(arguments),
        _ => None,
    });
    let description = state.and_then(|state| state.description.as_deref());
    about(description, state.and_then(|state| state.labels.as_deref()))
}

/// What is said of a checkpoint to be made.
fn about(
    description: Option<&str>,
    given: Option<&[CheckpointLabel]>,
) -> Result<About, qmp::Error> {
    let mut labels = BTreeMap::new();
    for label in given.unwrap_or_default() {
        if labels.insert(label.key.clone(), label.value.clone()).is_some() {
            let words = format!("label '{}' is given twice", label.key.escape_debug());
            return Err(qmp::Error::generic(words));
        }
    }
    // Where it is gone, file names are of no use to anyone anyway.
    let directory = std::env::current_dir().unwrap_or_default();
    let about = About {
        description: description.unwrap_or_default().to_owned(),
        labels,
        directory: directory.display().to_string(),
        ..About::default()
    };
    about.check().map_err(|error| qmp::Error::generic(error.to_string()))?;
    Ok(about)
}

fn done() -> Answer {
    Ok(json!({}))
}

fn value(value: &impl Serialize) -> Answer {
    serde_json::to_value(value).map_err(|error| qmp::Error::generic(error.to_string()))
}
