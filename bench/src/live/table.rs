//! Tables of saves of a running guest.

use std::fmt::Write;

use super::method::Method;
use super::{RATES, what};
use crate::report::{Report, number};

/// All of them.
pub(super) fn all(report: &Report, methods: &[Method]) -> String {
    let mut text = pauses(report, methods);
    text += &ours(report, methods);
    text
}

/// The longest gap that the guest saw, by method.
fn pauses(report: &Report, methods: &[Method]) -> String {
    let mut text = "| Pause of a save, ms: RAM in use | the guest writes, MB/s |".to_owned();
    for method in methods {
        let _ = write!(text, " {} |", method.name());
    }
    text += " no save |\n|---|---:|";
    text += &"---:|".repeat(methods.len() + 1);
    text += "\n";
    for used in report.sizes("live idle") {
        for rate in RATES {
            let _ = write!(text, "| {used} MiB | {rate} |");
            for method in methods {
                let pause = report.median(&what("pause", *rate), method.name(), used);
                let _ = write!(text, " {} |", number(pause, 1));
            }
            let idle = report.median("live idle", Method::Live.name(), used);
            let _ = writeln!(text, " {} |", number(idle, 1));
        }
    }
    text + "\n"
}

/// What else is known of ours: the spread of pauses, and what the first save and those after it cost.
fn ours(report: &Report, methods: &[Method]) -> String {
    let mut text = String::from(
        "| Saves of a running guest, ours: RAM in use | it writes, MB/s | saves | pause p50, ms | p99 | longest | by its own count p50 | longest | \
         first, MiB | s | each next, MiB | ms |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n",
    );
    for used in report.sizes("live idle") {
        for method in methods.iter().filter(|method| method.is_live()) {
            for rate in RATES {
                text += &row(report, *method, used, *rate);
            }
        }
    }
    text + "\n"
}

fn row(report: &Report, method: Method, used: u64, rate: u64) -> String {
    let name = method.name();
    let pause = what("pause", rate);
    let part = |part| number(report.quantile(&pause, name, used, part), 1);
    let told = |part| number(report.quantile(&what("told pause", rate), name, used, part), 1);
    let value = |of: &str| report.median(&what(of, rate), name, used);
    let packed = if method == Method::Compressed { ", zstd" } else { "" };
    format!(
        "| {used} MiB{packed} | {rate} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |\n",
        report.count(&pause, name, used),
        part(0.5),
        part(0.99),
        part(1.0),
        told(0.5),
        told(1.0),
        number(value("first MiB"), 0),
        number(value("first ms").map(|ms| ms / 1e3), 2),
        number(value("next MiB"), 1),
        number(value("next ms"), 0),
    )
}
