//! Checking an image, and repairing it, without opening it as a disk.
//!
//! | file | what |
//! |---|---|
//! | `image` | the header, read tolerantly |
//! | `snapshots`, `refcounts` | those tables as they are in the file |
//! | `entry` | the rules for single entries |
//! | `walk` | counts the references that the tables hold |
//! | `compare` | counts against refcounts, refcounts against flags |
//! | `report` | what was found, counted as `qemu-img check` does |
//!
//! Memory is bounded by the size of the file, not by what its tables claim; nothing recurses; what
//! QEMU counts several times, because several tables lead to it, is counted as often here.

mod compare;
mod counts;
mod entry;
mod image;
mod refcounts;
mod report;
mod snapshots;
mod walk;

pub use report::{Finding, Report, Severity};

use crate::storage::Storage;
use crate::{Progress, Result};

use image::Image;
use refcounts::DiskRefcounts;
use snapshots::SnapshotTable;
use walk::Walk;

/// Most clusters of a file that is checked, as in QEMU.
const MAX_CLUSTERS: u64 = i32::MAX as u64;

/// How to check.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options<'a> {
    /// Told how far the check is (bytes of tables read), and can cancel it.
    pub progress: Option<&'a Progress>,
}

/// Checks an image that nobody writes to meanwhile. Nothing is changed.
///
/// # Errors
/// The image cannot be checked at all: it is none, its header breaks a rule, the host cannot read
/// it, or the check was cancelled. What is wrong inside is in the report.
pub fn check(storage: &dyn Storage, options: &Options<'_>) -> Result<Report> {
    let unwatched = Progress::default();
    let progress = options.progress.unwrap_or(&unwatched);
    let image = Image::open(storage)?;
    let mut report = Report::default();
    inspect(&image, &mut report, progress)?;
    Ok(report)
}

/// Everything that is looked at without changing it.
fn inspect(image: &Image<'_>, report: &mut Report, progress: &Progress) -> Result<()> {
    let Some(snapshots) = SnapshotTable::read(image, report)? else {
        return Ok(());
    };
    if image.clusters() > MAX_CLUSTERS {
        report.unchecked(|| format!("the file has more than {MAX_CLUSTERS} clusters"));
        return Ok(());
    }
    // Guests see whole sectors.
    report.total_clusters = (image.size / 512 * 512).div_ceil(image.cluster_size());
    let mut disk = DiskRefcounts::open(image)?;
    let mut walk = Walk::new(image, report, progress);
    if !walk.run(&snapshots, &disk)? {
        return Ok(());
    }
    let overlaps = compare::overlaps(&mut walk);
    let active: Vec<_> = std::mem::take(&mut walk.l2)
        .into_iter()
        .filter(|(_, uses)| uses.active > 0)
        .map(|(at, uses)| (at, uses.active))
        .collect();
    compare::compare(image, walk, &mut disk, &overlaps, progress)?;
    compare::flags(image, report, &mut disk, &active, progress)
}
