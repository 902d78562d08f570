//! Repairing an image in place.
//!
//! **Order of writes** of [`Repair::All`], so that a crash in between leaves the image no worse:
//!
//! 1. the corrupt bit (version 3), durable: nobody writes to the image before the repair is over. Not where
//!    the dirty bit says so: who opens the image next repairs it, which the corrupt bit would keep away;
//! 2. bad entries are cleared or mended, each within a sector; tables that need a new place get it
//!    behind the end of the file, durable before the header refers to it;
//! 3. flush: what the tables hold from here on is what is counted;
//! 4. COPIED flags of clusters that have other than one reference are taken away, flush;
//! 5. counts are corrected in their blocks, or a new refcount structure is built behind the end of
//!    the file and made valid by one header write; flush;
//! 6. COPIED flags that are missing are set, flush;
//! 7. the image is checked again; if it is without errors, the dirty and corrupt bits are cleared.
//!
//! A flag never promises more than a durable count. Up to step 5 the old counts stand, as wrong as
//! they were. [`Repair::Leaks`] does steps 4 to 7, and of the counts changes only those that are too
//! high; it does nothing where counts cannot be told.

mod append;
mod entries;
mod flags;
mod refcounts;
mod snapshots;

use std::collections::BTreeMap;

use crate::qcow2::header::{field, incompatible};
use crate::storage::Storage;
use crate::{Error, Progress, Result, WriteBuf};

use super::counts::Counts;
use super::image::{BITMAPS_VALID, Image};
use super::refcounts::DiskRefcounts;
use super::report::Report;
use super::snapshots::SnapshotTable;
use super::walk::{Uses, Walk};
use super::{MAX_CLUSTERS, Repair, inspect};
use append::Append;
use entries::Found;
use flags::Change;
use refcounts::Which;

/// Checks an image and repairs what `what` allows; the report has what is left.
pub(super) fn run(storage: &dyn Storage, what: Repair, progress: &Progress) -> Result<Report> {
    if storage.read_only() {
        return Err(Error::ReadOnly(storage.name().to_owned()));
    }
    let image = Image::open(storage)?;
    let mut before = Report::default();
    inspect(&image, &mut before, progress)?;
    if before.is_clean() {
        clear_marks(&image)?;
        return Ok(before);
    }
    if image.clusters() > MAX_CLUSTERS {
        // Counters for all of them would take memory by the file's length, which may cost nothing.
        return Ok(before);
    }
    let mut done = Report::default();
    match what {
        Repair::All => all(&image, &before, &mut done, progress)?,
        _ => leaks(&image, &before, &mut done, progress)?,
    }
    let image = Image::open(storage)?;
    let mut after = Report::default();
    inspect(&image, &mut after, progress)?;
    if after.corruptions == 0 && after.check_errors == 0 {
        clear_marks(&image)?;
    }
    after.corruptions_fixed = before.corruptions.saturating_sub(after.corruptions);
    after.leaks_fixed = before.leaks.saturating_sub(after.leaks);
    let left = std::mem::take(&mut after.findings);
    after.more_findings += before.more_findings + done.more_findings;
    after.findings = before.findings;
    after.findings.extend(done.findings);
    after.findings.extend(left);
    Ok(after)
}

/// The references as they are now; `None` if something could not be read, so that they are not all.
fn count<'a>(
    image: &'a Image<'a>,
    report: &mut Report,
    disk: Option<&DiskRefcounts>,
    progress: &Progress,
) -> Result<Option<(Counts, BTreeMap<u64, Uses>)>> {
    let Some(snapshots) = SnapshotTable::read(image, report)? else {
        return Ok(None);
    };
    let mut walk = Walk::new(image, report, progress);
    let whole = walk.run(&snapshots, disk)?;
    let Walk { counts, l2, .. } = walk;
    Ok((whole && report.check_errors == 0).then_some((counts, l2)))
}

fn leaks(image: &Image<'_>, before: &Report, done: &mut Report, progress: &Progress) -> Result<()> {
    if before.check_errors > 0 || before.rebuild {
        done.repaired(|| "nothing: that needs a repair of all, not of leaks".to_owned());
        return Ok(());
    }
    let mut disk = DiskRefcounts::open(image)?;
    let mut scratch = Report::default();
    let Some((counts, l2)) = count(image, &mut scratch, Some(&disk), progress)? else {
        done.findings.extend(scratch.findings.pop());
        done.repaired(|| "nothing: not all tables can be read".to_owned());
        return Ok(());
    };
    let only_flags = before.corruptions == before.flag_errors;
    let active = active(&l2);
    if only_flags {
        flags::correct(image, &counts, &active, Change::Clear, progress)?;
        image.storage.flush()?;
    }
    refcounts::correct(image, &counts, &mut disk, Which::TooHigh, progress)?;
    image.storage.flush()?;
    done.repaired(|| format!("{} leaked clusters", before.leaks));
    if only_flags {
        flags::correct(image, &counts, &active, Change::Set, progress)?;
        image.storage.flush()?;
    }
    Ok(())
}

fn all(image: &Image<'_>, before: &Report, done: &mut Report, progress: &Progress) -> Result<()> {
    if before.corruptions > 0 && image.incompatible & incompatible::DIRTY == 0 {
        mark(image)?;
    }
    let others = before.corruptions > before.count_errors + before.flag_errors;
    if before.check_errors > 0 || before.shared || others {
        mend(image, done, progress)?;
        image.storage.flush()?;
    }
    let storage = image.storage;
    let image = &Image::open(storage)?;
    let mut disk = DiskRefcounts::open(image)?;
    let mut scratch = Report::default();
    let Some((mut counts, l2)) = count(image, &mut scratch, Some(&disk), progress)? else {
        done.findings.extend(scratch.findings.pop());
        done.repaired(|| "no counts: not all tables can be read".to_owned());
        return Ok(());
    };
    let active = active(&l2);
    drop(l2);
    flags::correct(image, &counts, &active, Change::Clear, progress)?;
    storage.flush()?;
    let table = image.reftable_offset >> image.cluster_bits;
    let in_place = !scratch.rebuild
        && !image.is_outside(image.reftable_offset, image.reftable_bytes())
        && (table..table + u64::from(image.reftable_clusters))
            .all(|c| counts.get(c) == 1 && !counts.exceeds(c, 1))
        && refcounts::blocks_suffice(image, &counts, &disk);
    if in_place {
        refcounts::correct(image, &counts, &mut disk, Which::All, progress)?;
        done.repaired(|| "counts and flags".to_owned());
    } else {
        drop(disk);
        let Some((fresh, _)) = count(image, &mut Report::default(), None, progress)? else {
            return Ok(());
        };
        counts = fresh;
        refcounts::rebuild(image, &mut counts, progress)?;
        done.repaired(|| "Rebuilding refcount structure".to_owned());
    }
    storage.flush()?;
    flags::correct(image, &counts, &active, Change::Set, progress)?;
    storage.flush()
}

/// The L2 tables of the active disk.
fn active(l2: &BTreeMap<u64, Uses>) -> Vec<u64> {
    l2.iter().filter(|(_, uses)| uses.active > 0).map(|(at, _)| *at).collect()
}

/// Step 2 of the module's order.
fn mend(image: &Image<'_>, done: &mut Report, progress: &Progress) -> Result<()> {
    if let Some(bitmaps) = image.bitmaps {
        let mut scratch = Report::default();
        let whole = Walk::new(image, &mut scratch, progress).bitmaps(bitmaps)?;
        if !whole || scratch.corruptions > 0 {
            drop_bitmaps(image)?;
            done.repaired(|| "bitmaps are damaged; they count as out of date now".to_owned());
        }
    }
    let mut scratch = Report::default();
    let disk = DiskRefcounts::open(image)?;
    let tables = snapshots::l1_tables(image)?;
    let table = SnapshotTable { l1: tables, ..SnapshotTable::default() };
    let mut walk = Walk::new(image, &mut scratch, progress);
    walk.run(&table, Some(&disk))?;
    let Walk { counts, l2, .. } = walk;
    if scratch.check_errors > 0 && l2.is_empty() {
        return Ok(());
    }
    let found = Found { counts: &counts, l2: &l2 };
    let mut append = Append::new(image, counts.len());
    let bogus = entries::l2_tables(image, &found, done, progress)?;
    entries::active_l1(image, &found, &bogus, &mut append, done)?;
    let lost = entries::snapshot_l1(image, &found, &table.distinct(), &bogus, done)?;
    snapshots::mend(image, &lost, &mut append, done)
}

/// Makes the bitmaps count as out of date, durably.
fn drop_bitmaps(image: &Image<'_>) -> Result<()> {
    let bits = image.autoclear & !BITMAPS_VALID;
    image.storage.write_at(field::AUTOCLEAR, &[WriteBuf::new(&bits.to_be_bytes())])?;
    image.storage.flush()
}

/// Sets the corrupt bit, durably, where there is one.
fn mark(image: &Image<'_>) -> Result<()> {
    write_features(image, image.incompatible | incompatible::CORRUPT)
}

/// Clears the dirty and the corrupt bit.
fn clear_marks(image: &Image<'_>) -> Result<()> {
    // The repair is durable before the image says so.
    image.storage.flush()?;
    write_features(image, image.incompatible & !(incompatible::CORRUPT | incompatible::DIRTY))
}

fn write_features(image: &Image<'_>, bits: u64) -> Result<()> {
    if image.version < 3 || bits == image.incompatible {
        return Ok(());
    }
    image.storage.write_at(field::INCOMPATIBLE, &[WriteBuf::new(&bits.to_be_bytes())])?;
    image.storage.flush()
}
