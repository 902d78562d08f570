//! `tardigrade image check`

use block::qcow2::check::{self, Options, Repair, Report, Severity};
use block::storage::{FileOptions, FileStorage};
use serde_json::{Value, json};

use super::watch::watched;
use super::{CANNOT_CHECK, Error, Result, format_of, of, say, say_json};
use crate::cli::image::{CheckArgs, Output, RepairWhat};

pub(super) fn run(args: &CheckArgs) -> Result<u8> {
    let format = format_of(&args.file, args.format.as_deref())?;
    if format != "qcow2" {
        eprintln!("tardigrade: This image format does not support checks");
        return Ok(CANNOT_CHECK);
    }
    let repair = match args.repair {
        None => Repair::No,
        Some(RepairWhat::Leaks) => Repair::Leaks,
        Some(RepairWhat::All) => Repair::All,
    };
    let options = FileOptions {
        read_only: repair == Repair::No,
        force_share: args.force_share,
        ..FileOptions::default()
    };
    let storage = FileStorage::open(&args.file, options).map_err(of(&args.file))?;
    let report = watched(args.quiet, |progress| {
        check::check(&storage, &Options { repair, progress: Some(progress) })
    })
    .map_err(of(&args.file))?;
    print_findings(&report);
    match args.output {
        Output::Json => {
            say_json(&json_of(args, format, &report)?)?;
        }
        Output::Human if !args.quiet => say(&human(&report))?,
        Output::Human => {}
    }
    if report.check_errors > 0 {
        eprintln!("tardigrade: Check failed");
    }
    Ok(report.exit_code())
}

fn print_findings(report: &Report) {
    for finding in &report.findings {
        let what = match finding.severity {
            Severity::Corruption | Severity::Unchecked => "ERROR",
            Severity::Leak => "Leaked",
            Severity::Repaired => "Repaired",
        };
        eprintln!("{what} {}", finding.text);
    }
    if report.more_findings > 0 {
        eprintln!("... and {} more", report.more_findings);
    }
}

fn human(report: &Report) -> String {
    let fixed = if report.corruptions_fixed + report.leaks_fixed > 0 {
        format!(
            "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    \
             {} corruptions\n\nDouble checking the fixed image now...\n",
            report.leaks_fixed, report.corruptions_fixed
        )
    } else {
        String::new()
    };
    fixed + &report.human()
}

/// QAPI's `ImageCheck`.
fn json_of(args: &CheckArgs, format: &str, report: &Report) -> Result<Value> {
    let mut value = serde_json::to_value(report).map_err(|e| Error::Usage(e.to_string()))?;
    value["filename"] = json!(args.file.display().to_string());
    value["format"] = json!(format);
    Ok(value)
}
