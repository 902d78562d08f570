//! savevm, loadvm, delvm and info snapshots: checkpoints of all writable disks, the VM state on the
//! first of them.

use std::fmt::Write;
use std::sync::Arc;

use block::Node;
use block::snapshot::SnapshotInfo;
use snapshot::About;
use time::OffsetDateTime;
use time::macros::format_description;

use super::super::Controller;
use super::super::snapshot_jobs::Line;
use super::super::work::{LoadOptions, SaveMode, SaveOptions, Target, Task};
use crate::image::text::{clock, date, size};

const NO_DISK: &str = "Error: no block device can store vmstate for snapshot\r\n";

impl Controller {
    /// The writable disks of the machine, in the order of their slots.
    fn writable_disks(&self) -> Vec<Arc<Node>> {
        let slots = self.machine.devices().virtio();
        let nodes = slots.filter_map(|slot| slot.disk().map(|(node, _)| Arc::clone(&node)));
        nodes.filter(|node| !node.read_only()).collect()
    }

    /// A checkpoint of that name is deleted first, as in QEMU.
    pub(super) fn savevm(&mut self, tag: Option<&str>, reply: qmp::Reply) {
        let tag = tag.map_or_else(name_of_now, str::to_owned);
        self.run_line(Line::Save(tag), reply);
    }

    pub(super) fn loadvm(&mut self, tag: &str, reply: qmp::Reply) {
        self.run_line(Line::Load(tag.to_owned()), reply);
    }

    pub(super) fn delvm(&mut self, tag: &str, reply: qmp::Reply) {
        self.run_line(Line::Delete(tag.to_owned()), reply);
    }

    /// What a line is to do with the disks that the machine has now, and the line that follows if that
    /// succeeds.
    ///
    /// # Errors
    /// The answer where no disk can have checkpoints.
    pub(in crate::control) fn task_of_line(
        &self,
        line: &Line,
    ) -> Result<(Task, Option<Line>), &'static str> {
        let disks = self.writable_disks();
        let can_have = |node: &&Arc<Node>| node.access().supports_snapshots();
        let Some(first) = disks.iter().find(can_have) else {
            return Err(if matches!(line, Line::Delete(_)) { "" } else { NO_DISK });
        };
        let devices: Vec<String> = disks.iter().map(|node| node.name().to_owned()).collect();
        let target = |tag: &str, vmstate: &Node| Target {
            tag: tag.to_owned(),
            vmstate: vmstate.name().to_owned(),
            devices: devices.clone(),
        };
        Ok(match line {
            Line::Save(tag) if disks.iter().any(|node| has(node, tag)) => {
                (Task::Delete { tag: tag.clone(), devices }, Some(line.clone()))
            }
            Line::Save(tag) => {
                let options = SaveOptions { mode: SaveMode::Live, compress: None };
                let directory = std::env::current_dir().unwrap_or_default().display().to_string();
                let about = About { directory, ..About::default() };
                (Task::Save(target(tag, first), options, about), None)
            }
            Line::Load(tag) => {
                // It is on the disk where it was saved, whichever that is.
                let state = |node: &&Arc<Node>| {
                    let kept = snapshot::kept_tag(tag);
                    node.snapshots().iter().any(|s| s.tag == kept && s.vm_state_size > 0)
                };
                let vmstate = disks.iter().find(state).unwrap_or(first);
                (Task::Load(target(tag, vmstate), LoadOptions::USUAL), None)
            }
            Line::Delete(tag) => (Task::Delete { tag: tag.clone(), devices }, None),
        })
    }

    /// Those on all disks, by tag, then those on some.
    pub(super) fn info_snapshots(&self) -> String {
        let disks = self.writable_disks();
        let Some(vmstate) = disks.iter().find(|node| node.access().supports_snapshots()) else {
            // QEMU tells it in this line without the "Error".
            return NO_DISK.trim_start_matches("Error: ").replace('\r', "");
        };
        if disks.iter().all(|node| node.snapshots().is_empty()) {
            return "There is no snapshot available.\n".to_owned();
        }
        let on_all = |tag: &str| disks.iter().all(|node| has(node, tag));
        let common: Vec<SnapshotInfo> =
            vmstate.snapshots().into_iter().filter(|s| on_all(&s.tag)).collect();
        let mut out = "List of snapshots present on all disks:\n".to_owned();
        if common.is_empty() {
            out.push_str("None\n");
        } else {
            out.push_str(&header());
            common.iter().for_each(|s| out.push_str(&row("--", s)));
        }
        for node in &disks {
            let mut partial = node.snapshots();
            partial.retain(|s| !on_all(&s.tag));
            if partial.is_empty() {
                continue;
            }
            let name = node.name();
            let _ = writeln!(out, "\nList of partial (non-loadable) snapshots on '{name}':");
            out.push_str(&header());
            partial.iter().for_each(|s| out.push_str(&row(&s.id, s)));
        }
        out
    }
}

fn has(node: &Node, tag: &str) -> bool {
    let kept = snapshot::kept_tag(tag);
    node.snapshots().iter().any(|snapshot| snapshot.tag == kept)
}

fn header() -> String {
    line(["ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"])
}

fn row(id: &str, s: &SnapshotInfo) -> String {
    let icount = s.icount.map_or("--".to_owned(), |count| count.to_string());
    let cells =
        [id, &s.tag, &size(s.vm_state_size), &date(s.date_sec), &clock(s.vm_clock_nsec), &icount];
    line(cells)
}

fn line([id, tag, vm_size, date, clock, icount]: [&str; 6]) -> String {
    format!("{id:<7} {tag:<16} {vm_size:>8} {date:>19} {clock:>15} {icount:>10}\n")
}

/// `vm-YYYYMMDDHHMMSS`, in UTC.
fn name_of_now() -> String {
    let format = format_description!("vm-[year][month][day][hour][minute][second]");
    // The format has only what every date has.
    OffsetDateTime::now_utc().format(format).unwrap_or_else(|_| "vm".to_owned())
}
