//! What we send, read by the types that the `qapi` crate has made from QEMU's own schema.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::io::{self, BufRead, Read, Write};
use std::os::unix::net::UnixStream;

use ::qmp as ours;
use common::{Fixture, Raw, answer, options};
use ours::schema::*;
use ours::{Command, Error, Event, Reply};
use qapi::qmp::{self, QmpMessage};
use serde_json::{Value, json};

/// Answers with our own types, every optional member present.
fn reply(command: &Command, reply: Reply) {
    match command {
        Command::QueryStatus => {
            reply.value(&StatusInfo { status: RunState::Running, running: true });
        }
        Command::QueryUuid => reply.value(&UuidInfo { uuid: "0-0".into() }),
        Command::QueryKvm => reply.value(&KvmInfo { enabled: true, present: true }),
        Command::QueryCpusFast => reply.value(&[cpu()]),
        Command::QueryNamedBlockNodes(_) => reply.value(&[node()]),
        Command::QueryBlock => reply.value(&[BlockInfo {
            device: String::new(),
            qdev: Some("/machine/disk0".into()),
            kind: "unknown".into(),
            removable: false,
            locked: false,
            inserted: Some(node()),
            io_status: Some(BlockDeviceIoStatus::Ok),
        }]),
        Command::QueryJobs => reply.value(&[JobInfo {
            id: "j".into(),
            kind: JobType::SnapshotSave,
            status: JobStatus::Concluded,
            current_progress: 1,
            total_progress: 2,
            error: Some("Operation canceled".into()),
            pause_ns: Some(1),
            bytes_written: None,
            incremental: None,
        }]),
        Command::JobDismiss(_) => reply.error(Error::job_not_found()),
        _ => reply.done(),
    }
}

fn cpu() -> CpuInfoFast {
    CpuInfoFast {
        cpu_index: 0,
        qom_path: "/machine/cpu0".into(),
        thread_id: 1,
        props: Some(CpuInstanceProperties {
            node_id: None,
            socket_id: Some(0),
            core_id: Some(0),
            thread_id: Some(0),
        }),
        target: SysEmuTarget::X86_64,
    }
}

fn no_limits() -> IoLimits {
    IoLimits {
        bps: 0,
        bps_rd: 0,
        bps_wr: 0,
        iops: 0,
        iops_rd: 0,
        iops_wr: 0,
        bps_max: None,
        bps_rd_max: None,
        bps_wr_max: None,
        iops_max: None,
        iops_rd_max: None,
        iops_wr_max: None,
        bps_max_length: None,
        bps_rd_max_length: None,
        bps_wr_max_length: None,
        iops_max_length: None,
        iops_rd_max_length: None,
        iops_wr_max_length: None,
        iops_size: None,
        group: None,
    }
}

fn node() -> BlockDeviceInfo {
    let snapshot = SnapshotInfo {
        id: "1".into(),
        name: "tag".into(),
        vm_state_size: 1,
        date_sec: 2,
        date_nsec: 3,
        vm_clock_sec: 4,
        vm_clock_nsec: 5,
        icount: None,
    };
    let image = |backing_image, snapshots| ImageInfo {
        filename: "f.qcow2".into(),
        format: "qcow2".into(),
        dirty_flag: Some(false),
        actual_size: Some(1),
        virtual_size: 2,
        cluster_size: Some(65536),
        encrypted: None,
        compressed: None,
        backing_filename: Some("b".into()),
        full_backing_filename: Some("/b".into()),
        backing_filename_format: Some("raw".into()),
        snapshots,
        backing_image,
        format_specific: None,
    };
    BlockDeviceInfo {
        file: "f.qcow2".into(),
        node_name: Some("disk0".into()),
        ro: false,
        drv: "qcow2".into(),
        backing_file: None,
        backing_file_depth: 1,
        active: true,
        encrypted: false,
        detect_zeroes: BlockdevDetectZeroesOptions::Off,
        limits: no_limits(),
        image: image(Some(Box::new(image(None, None))), Some(vec![snapshot])),
        cache: BlockdevCacheInfo { writeback: true, direct: false, no_flush: false },
        write_threshold: 0,
        dirty_bitmaps: Some(vec![BlockDirtyInfo {
            name: Some("b0".into()),
            count: 65536,
            granularity: 65536,
            recording: true,
            busy: false,
            persistent: true,
            inconsistent: None,
        }]),
    }
}

fn fixture() -> Fixture {
    let (fixture, requests) = Fixture::start(options());
    let events = fixture.events.clone();
    std::thread::spawn(move || {
        while let Some(request) = requests.wait(common::PATIENCE) {
            match request.command {
                Command::Stop => answer(request, &events),
                command => reply(&command, request.reply),
            }
        }
    });
    fixture
}

/// The crate wants one stream for both directions.
struct Duplex(Raw);

impl Read for Duplex {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.reader.read(buffer)
    }
}

impl BufRead for Duplex {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.0.reader.fill_buf()
    }

    fn consume(&mut self, count: usize) {
        self.0.reader.consume(count);
    }
}

impl Write for Duplex {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut stream: &UnixStream = self.0.stream();
        stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_session_of_the_qapi_crate_reads_every_answer() {
    let fixture = fixture();
    let mut session = qapi::Qmp::new(Duplex(fixture.connect()));
    let greeting = session.handshake().unwrap();
    assert_eq!(greeting.version.qemu.major, 10);
    assert_eq!(greeting.capabilities.len(), 1);

    let status = session.execute(&qmp::query_status {}).unwrap();
    assert!(status.running);
    assert_eq!(status.status, qmp::RunState::running);
    assert!(session.execute(&qmp::query_kvm {}).unwrap().enabled);
    assert_eq!(session.execute(&qmp::query_uuid {}).unwrap().UUID, "0-0");
    assert_eq!(session.execute(&qmp::query_name {}).unwrap().name, None);
    assert_eq!(session.execute(&qmp::query_version {}).unwrap().qemu.micro, 2);
    let commands = session.execute(&qmp::query_commands {}).unwrap();
    assert!(commands.iter().any(|command| command.name == "snapshot-load"));

    let jobs = session.execute(&qmp::query_jobs {}).unwrap();
    assert_eq!(jobs[0].type_, qmp::JobType::snapshot_save);
    assert_eq!(jobs[0].status, qmp::JobStatus::concluded);
    assert_eq!(jobs[0].error.as_deref(), Some("Operation canceled"));
    let refused = session.execute(&qmp::job_dismiss { id: "j".into() }).unwrap_err();
    assert!(refused.to_string().contains("Job not found"), "{refused}");
    let cpus = session.execute(&qmp::query_cpus_fast {}).unwrap();
    assert_eq!(cpus.len(), 1);
    let nodes = session.execute(&qmp::query_named_block_nodes { flat: None }).unwrap();
    assert_eq!(nodes[0].node_name.as_deref(), Some("disk0"));
    let snapshots = nodes[0].image.base.snapshots.as_ref().unwrap();
    assert_eq!(snapshots[0].name, "tag");
    let devices = session.execute(&qmp::query_block {}).unwrap();
    assert_eq!(devices[0].inserted.as_ref().unwrap().drv, "qcow2");

    session.execute(&qmp::stop {}).unwrap();
    let events: Vec<qmp::Event> = session.events().collect();
    assert!(matches!(events[..], [qmp::Event::STOP { .. }]), "{events:?}");
}

#[test]
fn every_event_is_read_by_the_qapi_crate() {
    let fixture = fixture();
    let mut raw = fixture.negotiated();
    let reason = ShutdownCause::HostQmpSystemReset;
    for event in [
        Event::Stop,
        Event::Resume,
        Event::Shutdown { guest: true, reason: ShutdownCause::GuestShutdown },
        Event::Reset { guest: false, reason },
        Event::JobStatusChange { id: "j".into(), status: JobStatus::Pending },
    ] {
        fixture.events.emit(&event);
        let text = raw.text();
        let message: QmpMessage<Value> = serde_json::from_str(&text).unwrap();
        assert!(matches!(&message, QmpMessage::Event(_)), "{text}");
        let read: qmp::Event = serde_json::from_str(&text).unwrap();
        let expected = json!(event)["event"].clone();
        assert_eq!(serde_json::to_value(&read).unwrap()["event"], expected, "{text}");
    }
}
