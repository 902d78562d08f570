//! `tardigrade image snapshot`

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use block::graph::snapshot_json;
use block::{Format, NewSnapshot, SnapshotChange, SnapshotInfo};

use super::text::{clock, date, size};
use super::{Access, Error, Result, of, open, say, say_json};
use crate::checkpoints::draw;
use crate::cli::image::{ImageSnapshotArgs, ImageSnapshotCommand, Output};

pub(super) fn run(command: &ImageSnapshotCommand) -> Result<u8> {
    match command {
        ImageSnapshotCommand::List { tree: false, force_share, output, file } => {
            let access = Access { force_share: *force_share, alone: true, ..Access::default() };
            let (_user, node) = open(file, None, access)?;
            let all = node.snapshots();
            match output {
                Output::Human => say(&table(&all))?,
                Output::Json => say_json(&all.iter().map(snapshot_json).collect())?,
            }
        }
        ImageSnapshotCommand::List { tree: true, force_share, output, file } => {
            let found = super::checkpoints(std::slice::from_ref(file), None, *force_share)?;
            match output {
                Output::Human => say(&draw::tree(&found))?,
                Output::Json => say_json(&serde_json::json!(found))?,
            }
        }
        ImageSnapshotCommand::Create(args) => change(args, "create", |format| {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let new = NewSnapshot {
                tag: args.snapshot.clone(),
                date_sec: u32::try_from(now.as_secs()).unwrap_or(u32::MAX),
                date_nsec: now.subsec_nanos(),
                vm_clock_nsec: 0,
            };
            land(&mut *format.create_snapshot(&new)?)
        })?,
        ImageSnapshotCommand::Apply(args) => change(args, "apply", |format| {
            land(&mut *format.revert_snapshot(&id_of(format, &args.snapshot, &args.file)?)?)
        })?,
        ImageSnapshotCommand::Delete(args) => change(args, "delete", |format| {
            land(&mut *format.delete_snapshot(&id_of(format, &args.snapshot, &args.file)?)?)
        })?,
    }
    Ok(0)
}

fn change(
    args: &ImageSnapshotArgs,
    what: &str,
    work: impl FnOnce(&dyn Format) -> block::Result<()>,
) -> Result<()> {
    let access = Access { writable: true, ..Access::default() };
    let (_user, node) = open(&args.file, None, access)?;
    work(&*node.format())
        .map_err(|e| Error::Usage(format!("Could not {what} snapshot '{}': {e}", args.snapshot)))?;
    node.flush().map_err(of(&args.file))
}

/// All steps of a change.
fn land<C: SnapshotChange + ?Sized>(change: &mut C) -> block::Result<()> {
    change.prepare()?;
    change.publish()?;
    change.finish()
}

/// The id of a snapshot that is named by its id or, if there is none, its tag; as in QEMU.
pub(super) fn id_of(format: &dyn Format, name: &str, file: &Path) -> block::Result<String> {
    let all = format.snapshots();
    let by_id = all.iter().find(|s| s.id == name);
    match by_id.or_else(|| all.iter().find(|s| s.tag == name)) {
        Some(found) => Ok(found.id.clone()),
        None => Err(block::Error::NoSuchSnapshot {
            tag: name.to_owned(),
            node: file.display().to_string(),
        }),
    }
}

/// The list as qemu-img prints it; nothing without snapshots. Dates are UTC.
pub(crate) fn table(snapshots: &[SnapshotInfo]) -> String {
    if snapshots.is_empty() {
        return String::new();
    }
    let row = |cells: [&str; 6]| {
        let [id, tag, vm_size, date, clock, icount] = cells;
        format!("{id:<7} {tag:<16} {vm_size:>8} {date:>19} {clock:>15} {icount:>10}\n")
    };
    let mut out = "Snapshot list:\n".to_owned();
    out.push_str(&row(["ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"]));
    for s in snapshots {
        let icount = s.icount.map_or("--".to_owned(), |n| n.to_string());
        let cells = [
            &s.id,
            &s.tag,
            &size(s.vm_state_size),
            &date(s.date_sec),
            &clock(s.vm_clock_nsec),
            &icount,
        ];
        out.push_str(&row(cells.map(|cell| cell.as_str())));
    }
    out
}
