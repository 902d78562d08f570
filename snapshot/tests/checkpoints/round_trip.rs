//! What is saved comes back, whatever the cluster size, and takes no more space than it must.

use block::Progress;
use snapshot::{Checkpoint, delete};

use crate::support::{MIB, Machine, contents, new_ram, stamp};

#[test]
fn memory_and_disks_come_back_in_place_for_every_cluster_size() {
    for cluster in [512, 4096, 65536, 2 << 20] {
        for threads in [1, 3] {
            let machine = Machine::new(cluster);
            let (ram, disks) = (contents(&machine.ram), machine.disks());
            machine.save_with("t", threads).unwrap();
            machine.go_on();

            let checkpoint = Checkpoint::open(&machine.nodes, "d0", "t").unwrap();
            checkpoint.check_machine(&machine.config, &machine.ram).unwrap();
            let progress = Progress::default();
            checkpoint.read_ram(&machine.ram, false, threads, &progress).unwrap();
            checkpoint.revert_disks().unwrap();

            assert!(contents(&machine.ram) == ram, "RAM, clusters of {cluster}");
            for (now, then) in machine.disks().iter().zip(disks) {
                assert_eq!(now.data, then.data);
            }
            let all = 12 * MIB + 4096;
            assert_eq!(progress.get(), (all, all));
            machine.assert_no_open_changes();
        }
    }
}

#[test]
fn memory_comes_back_in_fresh_ram_of_a_new_process() {
    let machine = Machine::new(65536);
    machine.save("t").unwrap();
    let ram = new_ram();
    let checkpoint = Checkpoint::open(&machine.nodes, "d0", "t").unwrap();
    let progress = Progress::default();
    let report = checkpoint.read_ram(&ram, true, 2, &progress).unwrap();
    assert!(contents(&ram) == contents(&machine.ram));
    assert_eq!(report.read + report.zero, 12 * MIB + 4096);
    assert_eq!(progress.get(), (12 * MIB + 4096, 12 * MIB + 4096));
}

#[test]
fn sections_and_configuration_come_back() {
    let machine = Machine::new(65536);
    machine.save("t").unwrap();
    let checkpoint = Checkpoint::open(&machine.nodes, "d0", "t").unwrap();
    assert_eq!(checkpoint.config().machine, machine.config);
    let nodes: Vec<_> = checkpoint.config().nodes.iter().map(|n| n.node.as_str()).collect();
    assert_eq!(nodes, ["d0", "d1"]);
    let mut sections = checkpoint.sections();
    assert_eq!(sections.take::<u64>("vcpu", 0, 1..=1).unwrap(), 0x1234);
    sections.finish().unwrap();
    assert_eq!(checkpoint.section("vcpu", 0).unwrap().version, 1);
    assert!(checkpoint.section("vcpu", 1).is_err());
}

#[test]
fn zero_and_untouched_ram_is_not_stored() {
    let machine = Machine::new(65536);
    let report = machine.save("t").unwrap();
    // First page, last page below the hole, 2 MiB, one byte among zeroes, first page above the
    // hole: a cluster each; the last page is all that its cluster has.
    let stored = 2 * MIB + 4 * 65536 + 4096;
    assert_eq!(report.stored_bytes, stored);
    assert_eq!(report.zero_bytes, 12 * MIB + 4096 - stored);
    assert_eq!(report.state_bytes, 65536);
    assert_eq!(report.bytes_written, stored + 65536);
    let disk = machine.images[0].disk();
    let snapshot = &disk.snapshots[0];
    assert_eq!(snapshot.vmstate.len(), 32 + 5 + 1);
    assert_eq!(snapshot.info.vm_state_size, report.vm_state_size);
}

#[test]
fn all_nodes_get_one_stamp_and_only_one_the_vm_state() {
    let machine = Machine::new(65536);
    machine.save("t").unwrap();
    let wanted = stamp("t");
    for (at, disk) in machine.disks().iter().enumerate() {
        let [snapshot] = &disk.snapshots[..] else { panic!("one snapshot each") };
        let info = &snapshot.info;
        assert_eq!(info.tag, wanted.tag);
        assert_eq!(
            (info.date_sec, info.date_nsec, info.vm_clock_nsec),
            (wanted.date_sec, wanted.date_nsec, wanted.vm_clock_nsec)
        );
        assert_eq!(info.vm_state_size > 0, at == 0);
    }
}

#[test]
fn ram_lies_at_the_same_offset_in_every_checkpoint() {
    let machine = Machine::new(65536);
    machine.save("a").unwrap();
    machine.save("b").unwrap();
    let disk = machine.images[0].disk();
    let [a, b] = &disk.snapshots[..] else { panic!("two snapshots") };
    let ram = |vmstate: &std::collections::BTreeMap<u64, Vec<u8>>| {
        vmstate.range(4 * MIB / 65536..).map(|(k, v)| (*k, v.clone())).collect::<Vec<_>>()
    };
    assert!(ram(&a.vmstate) == ram(&b.vmstate));
}

#[test]
fn delete_removes_the_tag_everywhere_and_an_unknown_tag_is_no_error() {
    let machine = Machine::new(65536);
    machine.save("a").unwrap();
    machine.save("b").unwrap();
    let report = delete(&machine.nodes, "a").unwrap();
    assert_eq!(report.deleted, ["d0", "d1"]);
    for disk in machine.disks() {
        let tags: Vec<_> = disk.snapshots.iter().map(|s| s.info.tag.as_str()).collect();
        assert_eq!(tags, ["b"]);
    }
    let report = delete(&machine.nodes, "a").unwrap();
    assert_eq!((report.deleted.len(), report.absent.len()), (0, 2));
    Checkpoint::open(&machine.nodes, "d0", "b").unwrap();
    machine.assert_no_open_changes();
}

#[test]
fn a_tag_that_looks_like_another_snapshots_id_is_still_a_tag() {
    let machine = Machine::new(65536);
    machine.save("2").unwrap();
    machine.images[0].disk().data.fill(0x22);
    machine.save("1").unwrap();
    machine.go_on();
    // Snapshot "2" has id 1, snapshot "1" has id 2.
    Checkpoint::open(&machine.nodes, "d0", "2").unwrap().revert_disks().unwrap();
    assert_eq!(machine.images[0].disk().data[0], 0x11);
    delete(&machine.nodes, "1").unwrap();
    assert_eq!(machine.images[0].disk().snapshots[0].info.tag, "2");
}

#[test]
fn a_long_tag_is_cut_at_255_bytes_and_found_by_its_whole_length() {
    let machine = Machine::new(65536);
    let tag = "é".repeat(200);
    machine.save(&tag).unwrap();
    assert_eq!(machine.images[1].disk().snapshots[0].info.tag.len(), 254);
    Checkpoint::open(&machine.nodes, "d0", &tag).unwrap();
    assert!(machine.save(&tag).is_err());
    assert_eq!(delete(&machine.nodes, &tag).unwrap().deleted.len(), 2);
}
