//! Checking an image, and repairing it, without opening it as a disk.
//!
//! | file | what |
//! |---|---|
//! | `image` | the header, read tolerantly |
//! | `snapshots`, `refcounts` | those tables as they are in the file |
//! | `entry` | the rules for single entries |
//! | `walk` | counts the references that the tables hold |
//! | `compare` | counts against refcounts, refcounts against flags |
//! | `repair` | puts it right, and the order in which that is written |
//! | `report` | what was found, counted as `qemu-img check` does |
//!
//! Memory is bounded by the size of the file, not by what its tables claim; nothing recurses; what
//! QEMU counts several times, because several tables lead to it, is counted as often here.

mod compare;
mod counts;
mod entry;
mod image;
mod refcounts;
mod repair;
mod report;
mod snapshots;
mod walk;

pub use report::{Finding, Report, Severity};

use crate::storage::Storage;
use crate::{Error, Progress, Result};

use image::Image;
use refcounts::DiskRefcounts;
use snapshots::SnapshotTable;
use walk::Walk;

/// Most clusters of a file that is checked, as in QEMU.
const MAX_CLUSTERS: u64 = i32::MAX as u64;

/// What is repaired; QEMU's `-r`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Repair {
    /// Nothing is written.
    #[default]
    No,
    /// Counts that are too high, and COPIED flags if nothing else is wrong.
    Leaks,
    /// Everything that can be, also where guest data is lost that cannot be found any more.
    All,
}

/// How to check.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options<'a> {
    /// What is repaired.
    pub repair: Repair,
    /// Told how far the check is (bytes of tables read), and can cancel it.
    pub progress: Option<&'a Progress>,
}

/// Checks an image that nobody uses meanwhile, and repairs it if asked to: the report has what is
/// left then. `repair` tells in which order that is written.
///
/// # Errors
/// The image cannot be checked at all: it is none, its header breaks a rule, the host cannot read
/// it (or write, for a repair), or the check was cancelled. What is wrong inside is in the report.
/// A repair that fails or is cut off leaves the image no worse; a version 3 image that has errors
/// stays marked as corrupt until a repair is through.
pub fn check(storage: &dyn Storage, options: &Options<'_>) -> Result<Report> {
    let unwatched = Progress::default();
    let progress = options.progress.unwrap_or(&unwatched);
    if options.repair != Repair::No {
        return repair::run(storage, options.repair, progress);
    }
    let image = Image::open(storage)?;
    let mut report = Report::default();
    inspect(&image, &mut report, progress)?;
    Ok(report)
}

/// Repairs an image with the dirty bit before it is opened for writing: its refcounts were written
/// lazily and may be behind its tables. As QEMU, everything is repaired that can be.
///
/// # Errors
/// Those of [`check`], and [`Error::Corrupt`] if something is left that could not be repaired.
pub fn repair_at_open(storage: &dyn Storage) -> Result<()> {
    let report = check(storage, &Options { repair: Repair::All, progress: None })?;
    tracing::info!(
        image = storage.name(),
        errors = report.corruptions_fixed,
        leaks = report.leaks_fixed,
        "image was not closed properly; its refcounts are repaired"
    );
    if report.check_errors == 0 && report.corruptions == 0 {
        return Ok(());
    }
    let reason = match report.findings.last() {
        Some(finding) => {
            format!("it was not closed properly and cannot be repaired: {}", finding.text)
        }
        None => "it was not closed properly and cannot be repaired".to_owned(),
    };
    Err(Error::Corrupt { filename: storage.name().to_owned(), reason })
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
    if !walk.run(&snapshots, Some(&disk))? {
        return Ok(());
    }
    let overlaps = compare::overlaps(&mut walk);
    walk.report.shared = !overlaps.is_empty();
    let active: Vec<_> = std::mem::take(&mut walk.l2)
        .into_iter()
        .filter(|(_, uses)| uses.active > 0)
        .map(|(at, uses)| (at, uses.active))
        .collect();
    compare::compare(image, walk, &mut disk, &overlaps, progress)?;
    compare::flags(image, report, &mut disk, &active, progress)
}
