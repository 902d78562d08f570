//! What was measured, and the tables made of it.

use std::fmt::Write;

use serde_json::{Value, json};

/// All measurements.
#[derive(Default)]
pub(crate) struct Report {
    values: Vec<Measured>,
    notes: Vec<String>,
    sections: Vec<Section>,
}

/// Makes a table of another module's measurements.
type Section = Box<dyn Fn(&Report) -> String>;

struct Measured {
    what: String,
    who: String,
    /// MiB
    size: u64,
    value: f64,
}

const OURS: &str = "Tardigrade";
const QEMU: &str = "QEMU";
const QEMU_DIRECT: &str = "QEMU direct";

impl Report {
    pub(crate) fn add(&mut self, what: &str, who: &str, size: u64, value: f64) {
        self.values.push(Measured { what: what.to_owned(), who: who.to_owned(), size, value });
    }

    pub(crate) fn note(&mut self, text: &str) {
        self.notes.push(text.to_owned());
    }

    /// As [`Report::note`], unless it was said.
    pub(crate) fn note_once(&mut self, text: &str) {
        if !self.notes.iter().any(|note| note == text) {
            self.note(text);
        }
    }

    /// A row for rates of two programs that took turns: medians, the median of the ratios of single
    /// rounds, and the least and the greatest of them.
    pub(crate) fn compared(&self, title: &str, what: &str, ours: &str, theirs: &str) -> String {
        let rates = |who: &str| -> Vec<f64> {
            let is_it = |m: &&Measured| m.what == what && m.who == who;
            self.values.iter().filter(is_it).map(|measured| measured.value).collect()
        };
        let (ours, theirs) = (rates(ours), rates(theirs));
        let mut ratios: Vec<f64> = ours.iter().zip(&theirs).map(|(a, b)| a / b).collect();
        ratios.sort_by(f64::total_cmp);
        let range = match ratios[..] {
            [least, .., greatest] => format!("{least:.2} to {greatest:.2}"),
            _ => "-".to_owned(),
        };
        format!(
            "| {title} | {} | {} | {} | {range} |",
            number(middle(ours), 0),
            number(middle(theirs), 0),
            number(middle(ratios), 2),
        )
    }

    /// Adds a table that is made once everything is measured.
    pub(crate) fn section(&mut self, section: impl Fn(&Self) -> String + 'static) {
        self.sections.push(Box::new(section));
    }

    /// The median, if anything was measured.
    pub(crate) fn median(&self, what: &str, who: &str, size: u64) -> Option<f64> {
        middle(self.values(what, who, size))
    }

    /// The least value that so many parts of 1 of the values do not exceed; 1 is the greatest.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index")]
    pub(crate) fn quantile(&self, what: &str, who: &str, size: u64, part: f64) -> Option<f64> {
        let mut values = self.values(what, who, size);
        values.sort_by(f64::total_cmp);
        let rank = (part * values.len() as f64).ceil() as usize;
        values.get(rank.saturating_sub(1)).copied()
    }

    /// How often it was measured.
    pub(crate) fn count(&self, what: &str, who: &str, size: u64) -> usize {
        self.values(what, who, size).len()
    }

    fn values(&self, what: &str, who: &str, size: u64) -> Vec<f64> {
        let is_it = |m: &&Measured| m.what == what && m.who == who && m.size == size;
        self.values.iter().filter(is_it).map(|measured| measured.value).collect()
    }

    pub(crate) fn sizes(&self, what: &str) -> Vec<u64> {
        let mut sizes: Vec<u64> =
            self.values.iter().filter(|m| m.what == what).map(|m| m.size).collect();
        sizes.sort_unstable();
        sizes.dedup();
        sizes
    }

    /// Every measurement.
    pub(crate) fn json(&self) -> String {
        let one =
            |m: &Measured| json!({ "what": m.what, "who": m.who, "mib": m.size, "value": m.value });
        let all: Vec<Value> = self.values.iter().map(one).collect();
        serde_json::to_string_pretty(&json!({ "notes": self.notes, "measured": all })).unwrap()
    }

    fn machine_tables(&self, text: &mut String) {
        self.disk_table(text);
        let write = self.disk_rate("dd write s");
        let read = self.disk_rate("dd read s");
        self.rate_table(text, "Save", "save s", write);
        self.rate_table(text, "Load in the running process", "load s", read);
        self.rate_table(text, "Revive in a new process", "revive s", read);
        self.pause_table(text);
        self.load_table(text);
        self.start_table(text);
    }

    /// The tables.
    pub(crate) fn markdown(&self) -> String {
        let mut text = String::new();
        // Nothing of machines was measured otherwise.
        if self.values.iter().any(|measured| measured.what == "dd write s") {
            self.machine_tables(&mut text);
        }
        for section in &self.sections {
            text += &section(self);
        }
        for note in &self.notes {
            let _ = writeln!(text, "{note}\n");
        }
        text
    }

    /// MiB/s of `dd` with O_DIRECT.
    fn disk_rate(&self, what: &str) -> Option<f64> {
        let size = *self.sizes(what).first()?;
        Some(size as f64 / self.median(what, "direct", size)?)
    }

    fn disk_table(&self, text: &mut String) {
        let _ = writeln!(text, "| `dd` of 1 GiB, `bs=1M` | MiB/s |\n|---|---:|");
        for (what, who, name) in [
            ("dd write s", "direct", "write, `oflag=direct`"),
            ("dd write s", "fdatasync", "write, `conv=fdatasync`"),
            ("dd read s", "direct", "read, `iflag=direct`"),
        ] {
            for size in self.sizes(what) {
                let rate = self.median(what, who, size).map(|time| size as f64 / time);
                let _ = writeln!(text, "| {name} | {} |", number(rate, 0));
            }
        }
        let _ = writeln!(text);
    }

    fn rate_table(&self, text: &mut String, title: &str, what: &str, disk: Option<f64>) {
        let _ = writeln!(
            text,
            "| {title}: RAM in use | ours, s | QEMU, s | QEMU direct, s | ours, MiB/s | times QEMU | times QEMU direct | of the disk |\n\
             |---|---:|---:|---:|---:|---:|---:|---:|"
        );
        for size in self.sizes(what) {
            let (ours, qemu) = (self.median(what, OURS, size), self.median(what, QEMU, size));
            let rate = ours.map(|time| size as f64 / time);
            let direct = self.median(what, QEMU_DIRECT, size);
            let times = |peer: Option<f64>| ours.zip(peer).map(|(ours, peer)| peer / ours);
            let share = rate.zip(disk).map(|(rate, disk)| 100.0 * rate / disk);
            let _ = writeln!(
                text,
                "| {size} MiB | {} | {} | {} | {} | {} | {} | {} % |",
                number(ours, 3),
                number(qemu, 3),
                number(direct, 3),
                number(rate, 0),
                number(times(qemu), 1),
                number(times(direct), 1),
                number(share, 0)
            );
        }
        let _ = writeln!(text);
    }

    fn pause_table(&self, text: &mut String) {
        let _ = writeln!(
            text,
            "| Pause the guest sees: RAM in use | ours, ms | QEMU, ms | QEMU direct, ms | idle, ours, ms |\n\
             |---|---:|---:|---:|---:|"
        );
        for size in self.sizes("pause ms") {
            let value = |what, who| number(self.median(what, who, size), 1);
            let _ = writeln!(
                text,
                "| {size} MiB | {} | {} | {} | {} |",
                value("pause ms", OURS),
                value("pause ms", QEMU),
                value("pause ms", QEMU_DIRECT),
                value("idle gap ms", OURS)
            );
        }
        let _ = writeln!(text);
    }

    fn load_table(&self, text: &mut String) {
        let _ = writeln!(
            text,
            "| After a load: RAM in use | answer, ours, ms | QEMU, ms | load and look, ours, s | QEMU, s | look alone, ours, s |\n\
             |---|---:|---:|---:|---:|---:|"
        );
        for size in self.sizes("load answer ms") {
            let value = |what, who, digits| number(self.median(what, who, size), digits);
            let _ = writeln!(
                text,
                "| {size} MiB | {} | {} | {} | {} | {} |",
                value("load answer ms", OURS, 1),
                value("load answer ms", QEMU, 1),
                value("load look s", OURS, 3),
                value("load look s", QEMU, 3),
                value("look s", OURS, 3)
            );
        }
        let _ = writeln!(text);
    }

    fn start_table(&self, text: &mut String) {
        let _ = writeln!(text, "| Start, 256 MiB of RAM | ours | QEMU |\n|---|---:|---:|");
        for (what, name) in [
            ("first instruction ms", "process start to first guest instruction, ms"),
            ("guest loaded ms", "the same guest ready to run (`-S`), ms"),
            ("Linux loaded ms", "Linux bzImage ready to run (`-S`), ms"),
            ("memory MiB", "memory beside guest RAM, MiB"),
            (
                "private MiB",
                "of it each machine's own (not program files, which machines share), MiB",
            ),
        ] {
            for size in self.sizes(what) {
                let value = |who| number(self.median(what, who, size), 1);
                let _ = writeln!(text, "| {name} | {} | {} |", value(OURS), value(QEMU));
            }
        }
        let _ = writeln!(text);
    }
}

pub(crate) fn number(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
}

/// The median.
fn middle(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}
