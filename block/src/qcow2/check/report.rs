//! What a check found, as `qemu-img check` counts it.

use std::fmt::Write;

use serde::Serialize;

/// Lines of text that are kept; of the rest there are only the counts.
const MAX_LINES: usize = 1000;

/// What a line is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// Data may be lost, now or by further writes.
    Corruption,
    /// Space is wasted.
    Leak,
    /// A part could not be checked.
    Unchecked,
    /// Something was put right.
    Repaired,
}

/// One thing found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What it means.
    pub severity: Severity,
    /// What and where, for people.
    pub text: String,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands over references")]
fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// The result of a check; serialised, it has the members of QAPI's `ImageCheck` that the format
/// fills in. Counts that are 0 are left out, as QEMU does, except `check-errors`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Report {
    /// Parts that could not be checked.
    pub check_errors: u64,
    /// Bytes of the file up to the last cluster in use.
    #[serde(skip_serializing_if = "is_zero")]
    pub image_end_offset: u64,
    /// Errors that are left.
    #[serde(skip_serializing_if = "is_zero")]
    pub corruptions: u64,
    /// Clusters with a count that is too high that are left.
    #[serde(skip_serializing_if = "is_zero")]
    pub leaks: u64,
    /// Errors that were repaired.
    #[serde(skip_serializing_if = "is_zero")]
    pub corruptions_fixed: u64,
    /// Leaked clusters that were repaired.
    #[serde(skip_serializing_if = "is_zero")]
    pub leaks_fixed: u64,
    /// Clusters of the guest's disk.
    #[serde(skip_serializing_if = "is_zero")]
    pub total_clusters: u64,
    /// Clusters of the guest's disk that the image stores.
    #[serde(skip_serializing_if = "is_zero")]
    pub allocated_clusters: u64,
    /// Stored clusters that do not follow the one before.
    #[serde(skip_serializing_if = "is_zero")]
    pub fragmented_clusters: u64,
    /// Clusters that are stored compressed.
    #[serde(skip_serializing_if = "is_zero")]
    pub compressed_clusters: u64,
    /// Those of the corruptions that QEMU does not see: something else refers to the header, the L1
    /// table or the refcount table, and the refcount takes account of it. A write to either
    /// destroys the other.
    #[serde(skip)]
    pub overlaps: u64,
    /// What was found and repaired, in order, as far as it is kept.
    #[serde(skip)]
    pub findings: Vec<Finding>,
    /// Lines that were not kept.
    #[serde(skip)]
    pub more_findings: u64,
    /// Whether the refcounts are so wrong that only a rebuild helps.
    #[serde(skip)]
    pub(super) rebuild: bool,
    /// Those of the corruptions that are counts which are too low.
    #[serde(skip)]
    pub(super) count_errors: u64,
    /// Those of the corruptions that are wrong COPIED flags.
    #[serde(skip)]
    pub(super) flag_errors: u64,
    /// Whether something else refers to the header, the L1 table or the refcount table, whatever the
    /// refcount says: correct counts alone do not help then.
    #[serde(skip)]
    pub(super) shared: bool,
}

impl Report {
    /// The exit status of `qemu-img check`: 1 could not be checked wholly, 2 errors, 3 only leaks,
    /// 0 clean.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self { check_errors: 1.., .. } => 1,
            Self { corruptions: 1.., .. } => 2,
            Self { leaks: 1.., .. } => 3,
            _ => 0,
        }
    }

    /// Whether neither errors nor leaks are left and everything was looked at.
    pub fn is_clean(&self) -> bool {
        self.exit_code() == 0
    }

    pub(super) fn note(&mut self, severity: Severity, text: impl FnOnce() -> String) {
        if self.findings.len() < MAX_LINES {
            self.findings.push(Finding { severity, text: text() });
        } else {
            self.more_findings += 1;
        }
    }

    /// An error that QEMU would count `times` times.
    pub(super) fn corruption(&mut self, times: u64, text: impl FnOnce() -> String) {
        self.corruptions = self.corruptions.saturating_add(times);
        self.note(Severity::Corruption, text);
    }

    /// A part that could not be checked.
    pub(super) fn unchecked(&mut self, text: impl FnOnce() -> String) {
        self.check_errors += 1;
        self.note(Severity::Unchecked, text);
    }

    /// Something was put right.
    pub(super) fn repaired(&mut self, text: impl FnOnce() -> String) {
        self.note(Severity::Repaired, text);
    }

    /// The text of `qemu-img check` for people.
    pub fn human(&self) -> String {
        let mut out = String::new();
        let mut line = |text: String| {
            let _ = writeln!(out, "{text}");
        };
        if self.is_clean() {
            line("No errors were found on the image.".to_owned());
        }
        if self.corruptions > 0 {
            line(format!(
                "\n{} errors were found on the image.\nData may be corrupted, or further writes to the image may corrupt it.",
                self.corruptions
            ));
        }
        if self.leaks > 0 {
            line(format!(
                "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.",
                self.leaks
            ));
        }
        if self.check_errors > 0 {
            line(format!(
                "\n{} internal errors have occurred during the check.",
                self.check_errors
            ));
        }
        if self.total_clusters > 0 && self.allocated_clusters > 0 {
            line(format!(
                "{}/{} = {}% allocated, {}% fragmented, {}% compressed clusters",
                self.allocated_clusters,
                self.total_clusters,
                percent(self.allocated_clusters, self.total_clusters),
                percent(self.fragmented_clusters, self.allocated_clusters),
                percent(self.compressed_clusters, self.allocated_clusters),
            ));
        }
        if self.image_end_offset > 0 {
            line(format!("Image end offset: {}", self.image_end_offset));
        }
        out
    }
}

/// Two digits after the point, rounded to the nearest; what is between two goes to the even one, as printf does.
fn percent(part: u64, whole: u64) -> String {
    let (part, whole) = (u128::from(part) * 10_000, u128::from(whole));
    let (down, rest) = (part / whole, part % whole * 2);
    let up = rest > whole || (rest == whole && down % 2 == 1);
    let hundredths = down + u128::from(up);
    format!("{}.{:02}", hundredths / 100, hundredths % 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentages_have_two_rounded_digits() {
        assert_eq!(percent(1, 3), "33.33");
        assert_eq!(percent(2, 3), "66.67");
        assert_eq!(percent(16, 16384), "0.10");
        assert_eq!(percent(32, 1024), "3.12");
        assert_eq!(percent(96, 1024), "9.38");
        assert_eq!(percent(5, 5), "100.00");
        assert_eq!(percent(0, 5), "0.00");
    }

    #[test]
    fn a_part_that_was_not_checked_counts_more_than_errors_and_these_more_than_leaks() {
        let mut report = Report { leaks: 1, ..Report::default() };
        assert_eq!(report.exit_code(), 3);
        report.corruption(2, || "x".to_owned());
        assert_eq!((report.exit_code(), report.corruptions), (2, 2));
        report.unchecked(|| "y".to_owned());
        assert_eq!(report.exit_code(), 1);
        for _ in 0..2000 {
            report.corruption(1, || "z".to_owned());
        }
        assert_eq!((report.findings.len(), report.more_findings), (1000, 1002));
    }
}
