//! QMP commands. Each either does its thing and answers, or answers with an error.

use qmp::schema::{
    BitmapArguments, Command, CpuInfoFast, CpuInstanceProperties, KvmInfo, NameInfo, ShutdownCause,
    StatusInfo, UuidInfo,
};
use serde::Serialize;
use serde_json::{Value, json};

use super::work::{Target, Task};
use super::{Controller, RunState};

type Answer = Result<Value, qmp::Error>;

impl Controller {
    /// Runs a command and answers it. Events that it causes go out before the answer.
    pub(super) fn command(&mut self, request: qmp::Request) {
        let answer = self.execute(request.command);
        request.reply.send(answer);
    }

    fn execute(&mut self, command: Command) -> Answer {
        match command {
            Command::QueryStatus => value(&self.status()),
            Command::QueryName => value(&NameInfo { name: self.machine.spec().name.clone() }),
            Command::QueryUuid => {
                value(&UuidInfo { uuid: self.machine.spec().uuid.hyphenated().to_string() })
            }
            Command::QueryKvm => value(&KvmInfo { enabled: true, present: true }),
            Command::QueryCpusFast => value(&self.cpus()),
            Command::QueryBlock => self.block_devices(),
            Command::QueryNamedBlockNodes(arguments) => {
                self.named_nodes(arguments.flat.unwrap_or(false))
            }
            Command::BlockDirtyBitmapAdd(arguments) => {
                self.add_bitmap(&arguments).and_then(|()| done())
            }
            Command::BlockDirtyBitmapRemove(BitmapArguments { node, name }) => {
                self.with_bitmaps(&node, |node| node.remove_bitmap(&name)).and_then(|()| done())
            }
            Command::BlockDirtyBitmapClear(BitmapArguments { node, name }) => {
                self.with_bitmaps(&node, |node| node.clear_bitmap(&name)).and_then(|()| done())
            }
            Command::BlockDirtyBitmapEnable(BitmapArguments { node, name }) => self
                .with_bitmaps(&node, |node| node.enable_bitmap(&name, true))
                .and_then(|()| done()),
            Command::BlockDirtyBitmapDisable(BitmapArguments { node, name }) => self
                .with_bitmaps(&node, |node| node.enable_bitmap(&name, false))
                .and_then(|()| done()),
            Command::BlockDirtyBitmapMerge(arguments) => {
                self.merge_bitmaps(&arguments).and_then(|()| done())
            }
            Command::Stop => {
                self.stop();
                done()
            }
            Command::Cont => self.cont().and_then(|()| done()),
            Command::SystemReset => self.system_reset().and_then(|()| done()),
            Command::Quit => {
                self.shutdown(false, ShutdownCause::HostQmpQuit);
                done()
            }
            Command::SnapshotSave(arguments) => {
                let target = Target {
                    tag: arguments.tag,
                    vmstate: arguments.vmstate,
                    devices: arguments.devices,
                };
                self.add_job(arguments.job_id, Task::Save(target))
            }
            Command::SnapshotLoad(arguments) => {
                let target = Target {
                    tag: arguments.tag,
                    vmstate: arguments.vmstate,
                    devices: arguments.devices,
                };
                self.add_job(arguments.job_id, Task::Load(target))
            }
            Command::SnapshotDelete(arguments) => {
                let task = Task::Delete { tag: arguments.tag, devices: arguments.devices };
                self.add_job(arguments.job_id, task)
            }
            Command::QueryJobs => value(&self.jobs.query()),
            Command::JobCancel(arguments) => self.cancel_job(&arguments.id).and_then(|()| done()),
            Command::JobDismiss(arguments) => {
                self.jobs.dismiss(&arguments.id).and_then(|()| done())
            }
        }
    }

    fn add_job(&mut self, id: String, task: Task) -> Answer {
        self.create_job(id, task)?;
        done()
    }

    fn status(&self) -> StatusInfo {
        StatusInfo { status: self.state, running: self.state == RunState::Running }
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
                target: "x86_64".to_owned(),
            })
            .collect()
    }
}

fn done() -> Answer {
    Ok(json!({}))
}

fn value(value: &impl Serialize) -> Answer {
    serde_json::to_value(value).map_err(|error| qmp::Error::generic(error.to_string()))
}
