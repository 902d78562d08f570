//! The `qapi` crate: every command, answer and event by its type.

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use qapi::qmp::{self, JobStatus, MirrorSyncMode};
use qapi::{Command, Qmp, Stream};
use serde_json::json;
use tardigrade_tests::vm::Vm;

use crate::session::{Client, Job};

const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) struct Typed {
    qmp: Qmp<Stream<BufReader<UnixStream>, UnixStream>>,
    /// Statuses that nobody has waited for.
    told: Vec<(String, JobStatus)>,
}

impl Typed {
    pub(crate) fn connect(vm: &Vm) -> Self {
        let stream = UnixStream::connect(vm.qmp_path()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let reader = BufReader::new(stream.try_clone().unwrap());
        let mut qmp = Qmp::new(Stream::new(reader, stream));
        qmp.handshake().unwrap();
        Self { qmp, told: Vec::new() }
    }

    fn execute<C: Command>(&mut self, command: &C) -> C::Ok {
        let result = self.qmp.execute(command);
        for event in self.qmp.events() {
            if let qmp::Event::JOB_STATUS_CHANGE { data, .. } = event {
                self.told.push((data.id, data.status));
            }
        }
        result.unwrap_or_else(|error| panic!("{}: {error}", C::NAME))
    }
}

fn disk() -> Vec<String> {
    vec!["disk0".to_owned()]
}

impl Client for Typed {
    fn save(&mut self, id: &str, tag: &str) {
        let (job_id, tag) = (id.to_owned(), tag.to_owned());
        self.execute(&qmp::snapshot_save { job_id, tag, vmstate: "disk0".into(), devices: disk() });
    }

    fn load(&mut self, id: &str, tag: &str) {
        let (job_id, tag) = (id.to_owned(), tag.to_owned());
        self.execute(&qmp::snapshot_load { job_id, tag, vmstate: "disk0".into(), devices: disk() });
    }

    fn delete(&mut self, id: &str, tag: &str) {
        let (job_id, tag) = (id.to_owned(), tag.to_owned());
        self.execute(&qmp::snapshot_delete { job_id, tag, devices: disk() });
    }

    fn cancel(&mut self, id: &str) {
        self.execute(&qmp::job_cancel { id: id.to_owned() });
    }

    fn dismiss(&mut self, id: &str) {
        self.execute(&qmp::job_dismiss { id: id.to_owned() });
    }

    fn complete(&mut self, id: &str) {
        self.execute(&qmp::job_complete { id: id.to_owned() });
    }

    fn jobs(&mut self) -> Vec<Job> {
        let jobs = self.execute(&qmp::query_jobs {});
        let job = |job: qmp::JobInfo| Job {
            id: job.id,
            status: qapi::Enum::name(&job.status).to_owned(),
            current: job.current_progress,
            total: job.total_progress,
            error: job.error,
        };
        jobs.into_iter().map(job).collect()
    }

    fn add_image(&mut self, node: &str, file: &str) {
        let file = json!({"driver": "file", "filename": file});
        let options = json!({"driver": "qcow2", "node-name": node, "file": file});
        let options: qmp::BlockdevOptions = serde_json::from_value(options).unwrap();
        self.execute(&qmp::blockdev_add::from(options));
    }

    fn remove_node(&mut self, node: &str) {
        self.execute(&qmp::blockdev_del { node_name: node.to_owned() });
    }

    fn backup_and_snapshot(&mut self, id: &str, target: &str, tag: &str) {
        let snapshot = qmp::BlockdevSnapshotInternal { device: "disk0".into(), name: tag.into() };
        let base = qmp::BackupCommon {
            auto_dismiss: None,
            auto_finalize: Some(true),
            bitmap: None,
            bitmap_mode: None,
            compress: Some(false),
            discard_source: None,
            filter_node_name: None,
            job_id: Some(id.to_owned()),
            on_source_error: Some(qmp::BlockdevOnError::report),
            on_target_error: None,
            speed: Some(0),
            x_perf: None,
            device: "disk0".into(),
            sync: MirrorSyncMode::full,
        };
        let backup = qmp::BlockdevBackup { base, target: target.to_owned() };
        let actions = vec![
            qmp::TransactionAction::blockdev_snapshot_internal_sync(snapshot.into()),
            qmp::TransactionAction::blockdev_backup(backup.into()),
        ];
        self.execute(&qmp::transaction { properties: None, actions });
    }

    fn mirror(&mut self, id: &str, target: &str) {
        self.execute(&qmp::blockdev_mirror {
            auto_dismiss: None,
            auto_finalize: None,
            buf_size: None,
            copy_mode: Some(qmp::MirrorCopyMode::background),
            filter_node_name: None,
            granularity: Some(65536),
            job_id: Some(id.to_owned()),
            on_source_error: None,
            on_target_error: None,
            replaces: None,
            speed: None,
            device: "disk0".into(),
            sync: MirrorSyncMode::full,
            target: target.to_owned(),
        });
    }

    fn wait(&mut self, id: &str, status: &str) {
        loop {
            let told =
                |(job, now): &(String, JobStatus)| job == id && qapi::Enum::name(now) == status;
            if let Some(at) = self.told.iter().position(told) {
                self.told.drain(..=at);
                return;
            }
            // The client looks for events only when it executes something: not before there is one.
            self.qmp.inner_mut().fill_buf().unwrap();
            self.execute(&qmp::query_version {});
        }
    }
}
