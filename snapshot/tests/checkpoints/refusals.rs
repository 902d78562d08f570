//! What is refused, in which words, with nothing touched.

use std::sync::Arc;

use block::Node;
use snapshot::{Checkpoint, LoadError, delete, preflight_save, resolve};

use crate::fake::FakeImage;
use crate::support::{MIB, Machine, contents, node};

fn open_error(nodes: &[Arc<Node>], vmstate: &str, tag: &str) -> String {
    Checkpoint::open(nodes, vmstate, tag).err().unwrap().to_string()
}

#[test]
fn names_are_resolved_in_order_and_refused_in_qemus_words() {
    let machine = Machine::new(65536);
    let lookup = |name: &str| machine.nodes.iter().find(|n| n.name() == name).cloned();
    let text = |names: &[&str]| resolve(names, lookup).err().unwrap().to_string();
    assert_eq!(text(&[]), "At least one device is required for snapshot");
    assert_eq!(text(&["d0", "nope"]), "No block device node 'nope'");
    assert_eq!(text(&["d0", "d0"]), "Block device node 'd0' is listed more than once");
    let nodes = resolve(&["d1", "d0"], lookup).unwrap();
    let names: Vec<_> = nodes.iter().map(|n| n.name()).collect();
    assert_eq!(names, ["d1", "d0"]);
}

#[test]
fn nodes_without_snapshots_or_read_only_are_refused_by_all_three() {
    let raw = node("raw", &FakeImage::with(65536, false, false));
    let fixed = node("fixed", &FakeImage::with(65536, true, true));
    for bad in [raw, fixed] {
        let name = bad.name().to_owned();
        let nodes = [node("d0", &FakeImage::new(65536)), bad];
        let text = format!("Device '{name}' is writable but does not support snapshots");
        let save = preflight_save(&nodes, "d0", "t").unwrap_err();
        assert_eq!(save.to_string(), text);
        assert_eq!(open_error(&nodes, "d0", "t"), text);
        assert_eq!(delete(&nodes, "t").unwrap_err().to_string(), text);
    }
    let none = "At least one device is required for snapshot";
    assert_eq!(preflight_save(&[], "d0", "t").unwrap_err().to_string(), none);
    assert_eq!(open_error(&[], "d0", "t"), none);
    assert_eq!(delete(&[], "t").unwrap_err().to_string(), none);
}

#[test]
fn a_vmstate_node_outside_the_devices_is_refused() {
    let machine = Machine::new(65536);
    let text = "vmstate block device 'd9' does not exist";
    let save = preflight_save(&machine.nodes, "d9", "t").unwrap_err();
    assert_eq!(save.to_string(), text);
    machine.save("t").unwrap();
    assert_eq!(open_error(&machine.nodes, "d9", "t"), text);
}

#[test]
fn a_tag_on_any_node_refuses_a_save() {
    let machine = Machine::new(65536);
    machine.save("t").unwrap();
    let exists = "Snapshot 't' already exists in one or more devices";
    let text = machine.save("t").unwrap_err().to_string();
    assert_eq!(text, format!("{exists}: 'd0', 'd1'"));
    machine.images[0].disk().snapshots.clear();
    let text = machine.save("t").unwrap_err().to_string();
    assert_eq!(text, format!("{exists}: 'd1'"));
    assert!(machine.images[0].disk().snapshots.is_empty());
}

#[test]
fn a_tag_with_a_nul_is_refused_and_an_empty_one_is_not() {
    let machine = Machine::new(65536);
    let text = machine.save("a\0b").unwrap_err().to_string();
    assert_eq!(text, r"Snapshot tag 'a\0b' contains a NUL character");
    machine.save("").unwrap();
    Checkpoint::open(&machine.nodes, "d0", "").unwrap();
}

#[test]
fn a_tag_missing_on_any_node_refuses_a_load() {
    let machine = Machine::new(65536);
    let missing = "Snapshot 't' does not exist in one or more devices";
    assert_eq!(open_error(&machine.nodes, "d0", "t"), format!("{missing}: 'd0', 'd1'"));
    machine.save("t").unwrap();
    machine.images[1].disk().snapshots.clear();
    assert_eq!(open_error(&machine.nodes, "d0", "t"), format!("{missing}: 'd1'"));
}

#[test]
fn a_disk_only_snapshot_refuses_a_load_in_qemus_words() {
    let machine = Machine::new(65536);
    machine.save("t").unwrap();
    assert_eq!(
        open_error(&machine.nodes, "d1", "t"),
        "This is a disk-only snapshot. Revert to it  offline using qemu-img"
    );
}

#[test]
fn snapshots_of_two_saves_with_one_tag_are_not_one_checkpoint() {
    let machine = Machine::new(65536);
    machine.save("t").unwrap();
    machine.images[1].disk().snapshots[0].info.date_nsec += 1;
    assert_eq!(
        open_error(&machine.nodes, "d0", "t"),
        "Snapshot 't' on 'd1' was not taken together with the one on 'd0': their times differ"
    );
    // Where the tag is there twice, the one that belongs to the checkpoint is found.
    let mut own = machine.images[1].disk().snapshots[0].clone();
    own.info.date_nsec -= 1;
    own.info.id = "7".to_owned();
    machine.images[1].disk().snapshots.push(own);
    Checkpoint::open(&machine.nodes, "d0", "t").unwrap();
}

#[test]
fn a_disk_missing_extra_or_of_a_snapshot_of_another_size_is_named() {
    let machine = Machine::new(65536);
    machine.save("t").unwrap();
    assert_eq!(
        open_error(&machine.nodes[..1], "d0", "t"),
        "Snapshot 't' is of other disks: 'd1' belongs to it and is not given"
    );
    // A third disk whose snapshot has the same tag and times.
    let extra = FakeImage::new(65536);
    *extra.disk() = machine.images[1].disk().clone();
    let mut nodes = machine.nodes.clone();
    nodes.push(node("d2", &extra));
    assert_eq!(
        open_error(&nodes, "d0", "t"),
        "Snapshot 't' is of other disks: 'd2' does not belong to it"
    );
    // It goes back to the size it had.
    machine.images[1].disk().data.resize(8192, 0);
    Checkpoint::open(&machine.nodes, "d0", "t").unwrap();
    machine.images[1].disk().snapshots[0].info.disk_size = 8192;
    assert_eq!(
        open_error(&machine.nodes, "d0", "t"),
        "Snapshot 't' is of other disks: 'd1' has a snapshot of 8 KiB, in the checkpoint 4 KiB"
    );
}

#[test]
fn a_disk_that_a_block_job_copies_does_not_go_back_under_it() {
    let machine = Machine::new(65536);
    machine.save("t").unwrap();
    let busy = "Node 'd1' is busy: block device is in use by block job: backup";
    let job = machine.nodes[1].occupy_alone("backup").unwrap();
    assert_eq!(open_error(&machine.nodes, "d0", "t"), busy);
    drop(job);
    let checkpoint = Checkpoint::open(&machine.nodes, "d0", "t").unwrap();
    // One that begins between the checks and the change.
    let job = machine.nodes[1].occupy_alone("backup").unwrap();
    let error = checkpoint.revert_disks().err().unwrap().to_string();
    assert!(error.contains(busy), "{error}");
    drop(job);
    let prepared = checkpoint.prepare_disks().unwrap();
    assert!(machine.nodes[1].occupy_alone("backup").is_err());
    prepared.revert().unwrap();
    machine.nodes[1].check_no_job().unwrap();
}

#[test]
fn a_machine_that_differs_is_refused_with_each_difference_and_stays_untouched() {
    let machine = Machine::new(65536);
    machine.save("t").unwrap();
    machine.go_on();
    let before = contents(&machine.ram);
    let checkpoint = Checkpoint::open(&machine.nodes, "d0", "t").unwrap();
    let mut other = machine.config.clone();
    other.vcpus = 2;
    other.ram_bytes = 16 * MIB;
    other.kernel = "another".to_owned();
    let error = checkpoint.check_machine(&other, &machine.ram).unwrap_err();
    assert_eq!(
        error.to_string(),
        "Snapshot 't' is of another configuration: \
         RAM: the checkpoint has 12292 KiB, this machine 16 MiB; \
         vCPUs: the checkpoint has 1, this machine 2"
    );
    assert!(contents(&machine.ram) == before);

    let mut alike = machine.config.clone();
    alike.kernel = "another".to_owned();
    let notes = checkpoint.check_machine(&alike, &machine.ram).unwrap();
    assert_eq!(notes.len(), 1);
}

#[test]
fn ram_with_other_regions_is_refused_even_with_one_size() {
    let machine = Machine::new(65536);
    machine.save("t").unwrap();
    let checkpoint = Checkpoint::open(&machine.nodes, "d0", "t").unwrap();
    let len = usize::try_from(12 * MIB + 4096).unwrap();
    let flat = snapshot::GuestMemory::from_ranges(&[(vm_memory::GuestAddress(0), len)]);
    let flat = flat.unwrap();
    let error = checkpoint.check_machine(&machine.config, &flat).unwrap_err();
    assert!(matches!(error, LoadError::Configuration { .. }));
    assert_eq!(
        error.to_string(),
        "Snapshot 't' is of another configuration: RAM regions: the checkpoint has \
         9 MiB at 0x0, 3076 KiB at 0x100000000, this machine 12292 KiB at 0x0"
    );
    assert!(checkpoint.read_ram(&flat, true, 1, &block::Progress::default()).is_err());
}

#[test]
fn damaged_and_foreign_vm_state_is_named_at_open() {
    let damage = |change: fn(&mut Vec<u8>)| {
        let machine = Machine::new(65536);
        machine.save("t").unwrap();
        {
            let mut disk = machine.images[0].disk();
            change(disk.snapshots[0].vmstate.get_mut(&0).unwrap());
        }
        open_error(&machine.nodes, "d0", "t")
    };
    assert_eq!(
        damage(|state| state[..4].copy_from_slice(b"QEVM")),
        "Snapshot 't' on 'd0': the VM state was made by QEMU; only QEMU can load it"
    );
    assert_eq!(
        damage(|state| state[20] ^= 1),
        "Snapshot 't' on 'd0': the VM-state header is damaged: its checksum is wrong"
    );
    // The payload of the last section ends where the stored bytes end.
    assert_eq!(
        damage(|state| {
            let last = state.iter().rposition(|&byte| byte != 0).unwrap();
            state[last] ^= 1;
        }),
        "Snapshot 't' on 'd0': VM-state section 'vcpu.0' is damaged: its checksum is wrong"
    );

    let machine = Machine::new(65536);
    machine.save("t").unwrap();
    machine.images[0].disk().snapshots[0].info.vm_state_size -= 1;
    let text = open_error(&machine.nodes, "d0", "t");
    assert!(text.contains("the VM state is truncated"), "{text}");
}
