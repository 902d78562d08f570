//! A failure at every step on every node, and a cancel at any moment, leave all as it was.

use std::sync::Arc;

use block::Progress;
use snapshot::{Checkpoint, LoadError, SaveError, delete};

use crate::support::{Machine, contents};

#[test]
fn a_save_that_fails_at_any_step_on_any_node_leaves_every_disk_as_it_was() {
    let machine = Machine::new(65536);
    machine.save("earlier").unwrap();
    let before = machine.disks();
    for at in 0..2 {
        let node = ["d0", "d1"][at];
        for step in ["create", "prepare", "publish"] {
            machine.images[at].fail(step, 0);
            let error = machine.save("t").unwrap_err();
            assert_eq!(
                error.to_string(),
                format!("Could not create snapshot 't' on '{node}': {step} was made to fail")
            );
            assert!(matches!(error, SaveError::Create { .. }));
            assert_eq!(machine.disks(), before, "{step} on {node}");
            machine.assert_no_open_changes();
            machine.images[at].mend();
        }
    }
    machine.save("t").unwrap();
}

#[test]
fn a_save_whose_vm_state_cannot_be_written_leaves_every_disk_as_it_was() {
    for threads in [1, 4] {
        // RAM has a few extents and the state comes last: every write fails once.
        for after in 0.. {
            let machine = Machine::new(65536);
            let before = machine.disks();
            machine.images[0].fail("write_vmstate", after);
            match machine.save_with("t", threads) {
                Ok(_) => {
                    assert!(after >= 6, "only {after} writes");
                    break;
                }
                Err(error) => assert_eq!(
                    error.to_string(),
                    "Error while writing VM state to 'd0': write_vmstate was made to fail"
                ),
            }
            assert_eq!(machine.disks(), before);
            machine.assert_no_open_changes();
            machine.images[0].mend();
            machine.save("t").unwrap();
        }
    }
}

#[test]
fn a_save_whose_rollback_fails_names_the_node_that_is_not_as_it_was() {
    let machine = Machine::new(65536);
    machine.images[0].fail("publish", 0);
    machine.images[1].fail_too("rollback");
    let text = machine.save("t").unwrap_err().to_string();
    assert_eq!(
        text,
        "Could not create snapshot 't' on 'd0': publish was made to fail; \
         'd1' could not be put back as it was: rollback was made to fail"
    );
    assert_eq!(machine.images[0].disk().snapshots, []);
    // The VM-state node, listed first, was published last.
    assert_eq!(machine.images[1].disk().snapshots.len(), 1);
}

#[test]
fn a_delete_takes_the_vm_state_away_first() {
    let mut machine = Machine::new(65536);
    machine.save("t").unwrap();
    machine.nodes.reverse();
    machine.images[1].fail("publish", 0);
    machine.images[0].fail("rollback", 0);
    delete(&machine.nodes, "t").unwrap_err();
    assert_eq!(machine.images[0].disk().snapshots, []);
    assert_eq!(machine.images[1].disk().snapshots.len(), 1);
}

#[test]
fn a_save_whose_cleanup_fails_is_a_checkpoint() {
    let machine = Machine::new(65536);
    machine.images[1].fail("finish", 0);
    machine.save("t").unwrap();
    Checkpoint::open(&machine.nodes, "d0", "t").unwrap();
}

#[test]
fn a_save_cancelled_while_ram_is_written_leaves_every_disk_as_it_was() {
    let mut machine = Machine::new(65536);
    let before = machine.disks();
    let progress = machine.progress.clone();
    machine.images[0].on_write(move || progress.cancel());
    let error = machine.save("t").unwrap_err();
    assert!(matches!(error, SaveError::Cancelled));
    assert_eq!(error.to_string(), "Operation canceled");
    assert_eq!(machine.disks(), before);
    machine.assert_no_open_changes();

    machine.images[0].on_write(|| ());
    machine.progress = Arc::default();
    machine.save("t").unwrap();
}

#[test]
fn a_disk_that_cannot_be_reverted_leaves_every_disk_as_it_was() {
    let machine = Machine::new(65536);
    machine.save("t").unwrap();
    machine.go_on();
    let before = machine.disks();
    let checkpoint = Checkpoint::open(&machine.nodes, "d0", "t").unwrap();
    for at in 0..2 {
        let node = ["d0", "d1"][at];
        for step in ["revert", "prepare", "publish"] {
            machine.images[at].fail(step, 0);
            let error = checkpoint.revert_disks().unwrap_err();
            assert_eq!(
                error.to_string(),
                format!("Could not load snapshot 't' on '{node}': {step} was made to fail")
            );
            assert_eq!(machine.disks(), before, "{step} on {node}");
            machine.assert_no_open_changes();
            machine.images[at].mend();
        }
    }
    checkpoint.revert_disks().unwrap();
}

#[test]
fn a_delete_that_fails_at_any_step_on_any_node_deletes_nothing() {
    let machine = Machine::new(65536);
    machine.save("t").unwrap();
    let before = machine.disks();
    for at in 0..2 {
        let node = ["d0", "d1"][at];
        for step in ["delete", "prepare", "publish"] {
            machine.images[at].fail(step, 0);
            let error = delete(&machine.nodes, "t").unwrap_err();
            assert_eq!(
                error.to_string(),
                format!("Could not delete snapshot 't' on '{node}': {step} was made to fail")
            );
            assert_eq!(machine.disks(), before, "{step} on {node}");
            machine.assert_no_open_changes();
            machine.images[at].mend();
        }
    }
    delete(&machine.nodes, "t").unwrap();
}

#[test]
fn an_unreadable_header_or_mapping_is_found_before_anything_is_touched() {
    let machine = Machine::new(65536);
    machine.save("t").unwrap();
    machine.go_on();
    let (ram, disks) = (contents(&machine.ram), machine.disks());
    for (step, what) in [
        ("open_vmstate", "the VM state"),
        ("read", "the VM-state header"),
        ("extents", "the mapping of RAM"),
    ] {
        machine.images[0].fail(step, 0);
        let checked = Checkpoint::open(&machine.nodes, "d0", "t")
            .and_then(|checkpoint| checkpoint.check_machine(&machine.config, &machine.ram));
        assert_eq!(
            checked.unwrap_err().to_string(),
            format!("Snapshot 't' on 'd0': {what} could not be read: {step} was made to fail")
        );
        machine.images[0].mend();
    }
    assert!(contents(&machine.ram) == ram);
    assert_eq!(machine.disks(), disks);
}

#[test]
fn ram_that_cannot_be_read_is_told_and_the_disks_are_untouched() {
    let machine = Machine::new(65536);
    machine.save("t").unwrap();
    machine.go_on();
    let disks = machine.disks();
    let checkpoint = Checkpoint::open(&machine.nodes, "d0", "t").unwrap();
    machine.images[0].fail("read", 2);
    let error = checkpoint.read_ram(&machine.ram, false, 2, &Progress::default()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "RAM of snapshot 't' could not be read from 'd0': read was made to fail"
    );
    assert_eq!(machine.disks(), disks);
}

#[test]
fn a_load_cancelled_while_ram_is_read_says_so() {
    let machine = Machine::new(65536);
    machine.save("t").unwrap();
    let checkpoint = Checkpoint::open(&machine.nodes, "d0", "t").unwrap();
    let progress = Progress::default();
    progress.cancel();
    let error = checkpoint.read_ram(&machine.ram, false, 2, &progress).unwrap_err();
    assert!(matches!(error, LoadError::Cancelled));
}
