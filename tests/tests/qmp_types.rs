//! Answers and events of a real machine, read by the types that the `qapi` crate has made from
//! QEMU's own schema.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::time::Duration;

use ::qmp::client::Client;
use qapi::qmp;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tardigrade_tests::checkpoint::{Booted, TAG};
use tardigrade_tests::disk::Disk;
use tardigrade_tests::require;
use tardigrade_tests::vm::Vm;

const PATIENCE: Duration = Duration::from_secs(120);

fn parse<T: DeserializeOwned>(value: &Value) -> T {
    T::deserialize(value).unwrap_or_else(|error| panic!("{error}: {value}"))
}

fn ask(client: &mut Client, command: &str, arguments: Value) -> Value {
    client.execute(command, arguments).unwrap()
}

#[test]
fn a_machines_answers_and_events_are_those_of_qemus_schema() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let booted = Booted { vcpus: 2, disks: 2 };
    let mut vm = booted.start(dir.path());
    let disks = booted.disks(dir.path());
    vm.save("typed", &["disk0", "disk1"]);
    let mut client = vm.qmp();

    let status: qmp::StatusInfo = parse(&ask(&mut client, "query-status", json!({})));
    assert_eq!((status.running, status.status), (true, qmp::RunState::running));

    let cpus: Vec<qmp::CpuInfoFast> = parse(&ask(&mut client, "query-cpus-fast", json!({})));
    for (index, cpu) in (0..).zip(&cpus) {
        let base = match cpu {
            qmp::CpuInfoFast::x86_64(base) => base,
            other => panic!("{other:?}"),
        };
        assert_eq!(base.cpu_index, index);
        let task = format!("/proc/{}/task/{}", vm.pid(), base.thread_id);
        assert!(std::path::Path::new(&task).exists(), "{task}");
    }
    assert_eq!(cpus.len(), 2);

    let blocks: Vec<qmp::BlockInfo> = parse(&ask(&mut client, "query-block", json!({})));
    assert_eq!(blocks.len(), 2);
    for (index, (block, disk)) in blocks.iter().zip(&disks).enumerate() {
        assert!(block.device.is_empty() && !block.removable && !block.locked);
        let inserted = block.inserted.as_ref().unwrap();
        assert_eq!(inserted.node_name.as_deref(), Some(format!("disk{index}").as_str()));
        check_node(inserted, disk);
    }

    check_statistics(&vm, &mut client);

    let nodes: Vec<qmp::BlockDeviceInfo> =
        parse(&ask(&mut client, "query-named-block-nodes", json!({ "flat": true })));
    for (index, disk) in disks.iter().enumerate() {
        let name = format!("disk{index}");
        let node = nodes.iter().find(|node| node.node_name.as_deref() == Some(&name)).unwrap();
        check_node(node, disk);
    }

    check_job(&mut client);

    for (command, arguments) in [("stop", json!({})), ("cont", json!({})), ("quit", json!({}))] {
        ask(&mut client, command, arguments);
    }
    let events: Vec<qmp::Event> = client.take_events().iter().map(parse).collect();
    let [stop, resume, shutdown, gone @ ..] = events.as_slice() else { panic!("{events:?}") };
    assert!(matches!(stop, qmp::Event::STOP { .. }), "{stop:?}");
    assert!(matches!(resume, qmp::Event::RESUME { .. }), "{resume:?}");
    let qmp::Event::SHUTDOWN { data, .. } = shutdown else { panic!("{shutdown:?}") };
    assert_eq!((data.guest, data.reason), (false, qmp::ShutdownCause::host_qmp_quit));
    assert!(gone.iter().all(|event| matches!(event, qmp::Event::JOB_STATUS_CHANGE { .. })));
    assert!(vm.wait().success());
}

/// What the guest does with a disk is in its statistics.
fn check_statistics(vm: &Vm, client: &mut Client) {
    let mut stats = || -> qmp::BlockDeviceStats {
        let all: Vec<qmp::BlockStats> = parse(&ask(client, "query-blockstats", json!({})));
        assert_eq!(all.len(), 2);
        all.into_iter().find(|one| one.node_name.as_deref() == Some("disk1")).unwrap().stats
    };
    let before = stats();
    let mut agent = vm.agent();
    agent.ask("pattern vdb 65536 131072 7");
    agent.ask("flush vdb");
    agent.ask("drop-caches");
    agent.ask("verify vdb 65536 131072 7");
    let after = stats();
    assert!(after.wr_bytes >= before.wr_bytes + 131_072, "{before:?} {after:?}");
    assert!(after.wr_operations > before.wr_operations && after.wr_total_time_ns > 0);
    assert!(after.flush_operations > before.flush_operations, "{before:?} {after:?}");
    assert!(after.rd_bytes >= before.rd_bytes + 131_072, "{before:?} {after:?}");
    assert!(after.wr_highest_offset >= 65_536 + 131_072);
    assert!(after.idle_time_ns.is_some());
    assert_eq!((after.failed_rd_operations, after.invalid_wr_operations), (0, 0));
}

/// A job from its first event to its place in the list.
fn check_job(client: &mut Client) {
    let delete = json!({ "job-id": "typed", "tag": "typed", "devices": ["disk0", "disk1"] });
    ask(client, "snapshot-delete", delete);
    let mut events = Vec::new();
    loop {
        let event = client.wait_event(PATIENCE, |_| true).unwrap();
        match parse::<qmp::Event>(&event) {
            qmp::Event::JOB_STATUS_CHANGE { data, .. } if data.id == "typed" => {
                events.push(data.status);
                if data.status == qmp::JobStatus::concluded {
                    break;
                }
            }
            other => panic!("{other:?}"),
        }
    }
    use qmp::JobStatus::{concluded, created, pending, running, waiting};
    assert_eq!(events, [created, running, waiting, pending, concluded]);
    let jobs: Vec<qmp::JobInfo> = parse(&ask(client, "query-jobs", json!({})));
    assert_eq!(jobs.len(), 1);
    assert_eq!((jobs[0].type_, jobs[0].status), (qmp::JobType::snapshot_delete, concluded));
    assert_eq!(jobs[0].error, None);
}

/// What a node tells of itself is what `qemu-img` says of its image.
fn check_node(node: &qmp::BlockDeviceInfo, disk: &Disk) {
    assert_eq!((node.drv.as_str(), node.ro, node.encrypted), ("qcow2", false, false));
    assert_eq!(node.file, disk.file());
    let image = &node.image.base;
    assert_eq!(image.virtual_size, 64 << 20);
    assert_eq!(image.cluster_size, Some(65536));
    // With force-share: the machine has the image locked.
    let info = tardigrade_tests::disk::qemu_img(&["info", "-U", "--output=json", &disk.file()]);
    let info: qmp::ImageInfo = serde_json::from_str(&info).unwrap();
    assert_eq!(image.format, info.base.format);
    let snapshots = image.snapshots.as_ref().unwrap();
    let tags: Vec<&str> = snapshots.iter().map(|snapshot| snapshot.name.as_str()).collect();
    assert_eq!(tags, [TAG, "typed"]);
    for (ours, theirs) in snapshots.iter().zip(info.base.snapshots.as_ref().unwrap()) {
        assert_eq!(serde_json::to_value(ours).unwrap(), serde_json::to_value(theirs).unwrap());
    }
}
