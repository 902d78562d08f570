//! The tree of checkpoints:
//!
//! ```text
//! CHECKPOINT        DATE (UTC)           CLOCK    ALONE     SHARED    DISKS
//! ● booted          2026-01-02 10:00:00  0:00:12  1.1 MiB   40.2 MiB  disk0
//! ○ installed       2026-01-02 10:07:41  0:07:53  80.0 MiB  12.0 MiB  disk0
//! ├─○ try-1         2026-01-02 10:09:00  0:09:12  2.0 MiB   90.0 MiB  disk0
//! └─○ try-2  <-     2026-01-02 10:11:30  0:10:02  4.0 MiB   90.0 MiB  disk0  with the new driver
//! ```
//!
//! `●` begins a tree; `○` follows what is above it in its column.

use std::collections::HashMap;
use std::fmt::Write;

use qmp::schema::{CheckpointInfo, CheckpointPlace, CheckpointRef, CheckpointShare};
use snapshot::tree::{Row, arrange};

use super::text::{clock, safe, size, utc};

/// Columns that are as wide as their widest cell.
const COLUMNS: usize = 6;

/// Draws the checkpoints, the oldest first at each level; ends with a newline.
pub fn tree(all: &[CheckpointInfo]) -> String {
    if all.is_empty() {
        return "No checkpoints.\n".to_owned();
    }
    let place: HashMap<Key<'_>, usize> =
        (0..).zip(all).map(|(at, one)| (key(&one.checkpoint), at)).collect();
    let above =
        |one: &CheckpointInfo| one.nearest.as_ref().and_then(|r| place.get(&key(r)).copied());
    let above: Vec<_> = all.iter().map(above).collect();
    let header = ["CHECKPOINT", "DATE (UTC)", "CLOCK", "ALONE", "SHARED", "DISKS"];
    let mut lines = vec![(header.map(str::to_owned), String::new())];
    for row in arrange(&above) {
        let one = &all[row.index];
        lines.push((cells(one, &row), remark(one)));
    }
    let mut widths = [0; COLUMNS];
    for (cells, _) in &lines {
        for (width, cell) in widths.iter_mut().zip(cells) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut out = String::new();
    for (cells, remark) in lines {
        let mut line = String::new();
        for (cell, width) in cells.iter().zip(widths) {
            // Writing to a string does not fail.
            let _ = write!(line, "{cell:<width$}  ");
        }
        line.push_str(&remark);
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

/// What tells one checkpoint from others.
type Key<'a> = (&'a str, i64, i64, i64, i64);

fn key(one: &CheckpointRef) -> Key<'_> {
    (&one.tag, one.date_sec, one.date_nsec, one.vm_clock_sec, one.vm_clock_nsec)
}

fn cells(one: &CheckpointInfo, row: &Row) -> [String; COLUMNS] {
    let mut name = rail(row);
    name.push_str(&safe(&one.checkpoint.tag));
    if one.current {
        name.push_str("  <-");
    }
    let (alone, shared) = match total(&one.places) {
        Some(share) => (size(share.alone), size(share.shared)),
        None => ("-".to_owned(), "-".to_owned()),
    };
    let nodes: Vec<_> = one.places.iter().map(|place| safe(&place.node_name)).collect();
    let clock = match one.vmstate {
        Some(_) => clock(one.checkpoint.vm_clock_sec),
        None => "disk only".to_owned(),
    };
    [name, utc(one.checkpoint.date_sec), clock, alone, shared, nodes.join(", ")]
}

/// What is to the left of the tag.
fn rail(row: &Row) -> String {
    let mut rail = String::new();
    let own = row.branches.len().saturating_sub(usize::from(row.starts_branch));
    for more in &row.branches[..own] {
        rail.push_str(if *more { "│ " } else { "  " });
    }
    if row.starts_branch {
        rail.push_str(if row.branches.last() == Some(&true) { "├─" } else { "└─" });
    }
    rail.push_str(if row.root { "● " } else { "○ " });
    rail
}

fn remark(one: &CheckpointInfo) -> String {
    if let Some(problem) = &one.problem {
        return format!("({})", safe(problem));
    }
    let mut parts = Vec::new();
    if let (Some(parent), None) = (&one.parent, &one.nearest) {
        parts.push(format!("(from '{}', which is not here)", safe(&parent.tag)));
    } else if let (Some(parent), Some(nearest)) = (&one.parent, &one.nearest)
        && parent != nearest
    {
        parts.push(format!("(from '{}', deleted)", safe(&parent.tag)));
    }
    if !one.description.is_empty() {
        parts.push(safe(&one.description));
    }
    for label in &one.labels {
        parts.push(format!("[{}={}]", safe(&label.key), safe(&label.value)));
    }
    parts.join(" ")
}

/// What all of a checkpoint takes, where it was counted.
pub(super) fn total(places: &[CheckpointPlace]) -> Option<CheckpointShare> {
    let mut sum = CheckpointShare { alone: 0, shared: 0 };
    for place in places {
        for share in [place.disk.as_ref()?, place.vm_state.as_ref()?] {
            sum.alone = sum.alone.saturating_add(share.alone);
            sum.shared = sum.shared.saturating_add(share.shared);
        }
    }
    Some(sum)
}

#[cfg(test)]
mod tests;
