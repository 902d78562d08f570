//! Any bytes as an image to be checked and repaired. What a repair says is whole is found whole by
//! the next check, and can be opened.

use std::sync::Arc;

use block::qcow2::check::{Options, Repair, Report, check};
use block::{Error, Format as _, Progress};

use super::{Files, limit, limit_of, trace};
use crate::storage::Sparse;

pub(super) fn run(input: &[u8]) {
    let files = Files::unpack(input);
    let file = &files.image;
    let limit = limit(file);
    let Some(before) = inspect(file, Repair::No) else { return };
    if before.exit_code() == 0 && before.overlaps == 0 {
        return can_be_opened(&files);
    }
    let leaks_only = Arc::new(file.copy());
    if let Some(report) = inspect(&leaks_only, Repair::Leaks) {
        assert!(report.leaks <= before.leaks, "{before:#?} became {report:#?}");
    }
    drop(limit);
    // A repair that gives the L1 table another place has all of it in memory: the format's 32 MiB
    // at most, twice while a vector grows.
    let _limit = limit_of(file, 72 << 20);
    if let Some(report) = inspect(file, Repair::All) {
        repaired(&files, &report);
    }
}

/// What is refused at opening though all counts are right: parts of the header that the check does
/// not need, tables that are there twice or begin at the end of the file, on purpose, and bitmaps that
/// do not fit the disk.
const STRICTER: &[&str] = &[
    "backing file name",
    "snapshot table ",
    "is the file truncated?",
    "refers to the L2 table in",
    "bitmaps: ",
];

fn inspect(file: &Arc<Sparse>, repair: Repair) -> Option<Report> {
    let progress = Progress::default();
    let report = check(&**file, &Options { repair, progress: Some(&progress) });
    trace(|| format!("{repair:?}: {report:#?}"));
    let report = report.ok()?;
    let (done, total) = progress.get();
    assert!(done <= total, "{done} of {total} bytes are checked");
    Some(report)
}

fn repaired(files: &Files, report: &Report) {
    let again = inspect(&files.image, Repair::No).expect("it could be checked before");
    assert_eq!(
        (again.check_errors, again.corruptions, again.leaks),
        (report.check_errors, report.corruptions, report.leaks),
        "a repair ends with {report:#?} and the next check says {again:#?}"
    );
    if again.exit_code() == 0 && again.overlaps == 0 {
        can_be_opened(files);
    }
}

/// What is clean can be written to, as far as its features are known.
fn can_be_opened(files: &Files) {
    match files.open(false) {
        Ok(image) => drop(image.flush()),
        Err(Error::Corrupt { reason, .. }) if STRICTER.iter().any(|text| reason.contains(text)) => {
        }
        Err(e) => assert!(!matches!(e, Error::Corrupt { .. }), "no error was found, but: {e}"),
    }
}
