//! Crash points of random workloads; see `docs/crash-safety.md`.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::common::have_qemu_img;
use crate::kinds::{Base, KINDS};
use crate::points::{Point, each_point};
use crate::verify::{Depth, verify};
use crate::workload::record;

/// Crash points in the sample of a few seconds.
const SAMPLE: u64 = 4000;
const STEPS: usize = 40;
/// The sample takes one of so many points of a workload, to see more of them.
const SAMPLE_EVERY: usize = 13;
/// One of so many points is worked on after the crash, and shown to qemu-img.
const USE_EVERY: u64 = 5;
const QEMU_EVERY: u64 = 199;

pub(crate) fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable}={text} is not a number")))
}

/// CRASH_POINT=cut.variant
fn wanted_point() -> Option<(usize, usize)> {
    let text = std::env::var("CRASH_POINT").ok()?;
    let (cut, variant) = text.split_once('.').expect("CRASH_POINT is CUT.VARIANT");
    Some((cut.parse().unwrap(), variant.parse().unwrap()))
}

/// Which points of a workload are tried.
#[derive(Clone, Copy)]
enum Choice {
    All,
    Sample,
    One(usize, usize),
}

impl Choice {
    fn takes(self, point: &Point<'_>) -> bool {
        match self {
            Self::All => true,
            Self::Sample => (point.cut * 7 + point.variant).is_multiple_of(SAMPLE_EVERY),
            Self::One(cut, variant) => (cut, variant) == (point.cut, point.variant),
        }
    }
}

#[derive(Default)]
struct Figures {
    /// Whether several threads work at once.
    parallel: bool,
    points: AtomicU64,
    workloads: AtomicU64,
    qemu: AtomicU64,
    used: AtomicU64,
    past_end: AtomicU64,
    cached: AtomicU64,
    by_kind: Mutex<BTreeMap<&'static str, u64>>,
    failed: AtomicBool,
}

/// All points of one workload, or one of them.
fn replay(base: &Base, dir: &Path, seed: u64, choice: Choice, figures: &Figures) {
    let recorded = record(base, seed, STEPS, figures.parallel);
    let mut last = None;
    let mut tried = 0;
    each_point(&recorded.files, &recorded.log, seed, |point| {
        if !choice.takes(&point) {
            return true;
        }
        if last.as_ref().is_none_or(|(cut, _)| *cut != point.cut) {
            last = Some((point.cut, recorded.timeline.expected(point.cut)));
        }
        let Some((_, expected)) = &last else { return true };
        tried += 1;
        let nth = figures.points.fetch_add(1, Ordering::Relaxed);
        let qemu = matches!(choice, Choice::One(..)) || nth.is_multiple_of(QEMU_EVERY);
        let use_it = qemu || nth.is_multiple_of(USE_EVERY);
        figures.qemu.fetch_add(qemu.into(), Ordering::Relaxed);
        figures.used.fetch_add(use_it.into(), Ordering::Relaxed);
        let depth = Depth {
            use_it,
            qemu,
            closed: point.variant == 0 && point.cut == recorded.log.len(),
            repairing: recorded.repairing(point.cut),
        };
        if let Err(e) = verify(base, dir, point.files, expected, depth) {
            fail(base, seed, &point, &e, figures);
        }
        !figures.failed.load(Ordering::Relaxed)
    });
    figures.workloads.fetch_add(1, Ordering::Relaxed);
    figures.past_end.fetch_add(recorded.reached.past_end, Ordering::Relaxed);
    figures.cached.fetch_add(recorded.reached.cached, Ordering::Relaxed);
    *figures.by_kind.lock().unwrap().entry(base.kind.options).or_default() += tried;
}

/// Tells how to run the point again, and keeps its image.
fn fail(base: &Base, seed: u64, point: &Point<'_>, what: &str, figures: &Figures) {
    figures.failed.store(true, Ordering::Relaxed);
    let Point { cut, variant, files } = point;
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("crash-{seed}-{cut}.{variant}"));
    for (n, pages) in files.iter().enumerate() {
        std::fs::write(kept.with_extension(format!("{variant}.{n}")), pages.bytes()).unwrap();
    }
    panic!(
        "workload {seed} ({}), cut before entry {cut} of the log, variant {variant}: {what}\n\
         image: {}.0\n\
         again: CRASH_SEED={seed} CRASH_POINT={cut}.{variant} \
         cargo test -p block --test crash crash_points -- --nocapture",
        base.kind.options,
        kept.display(),
    );
}

#[test]
fn crash_points_leave_sound_images_with_all_that_was_promised() {
    if !have_qemu_img("crash points") {
        return;
    }
    let (long, only_seed) = (number("CRASH_POINTS"), number("CRASH_SEED"));
    let wanted = long.unwrap_or(SAMPLE);
    let choice = match wanted_point() {
        Some((cut, variant)) => Choice::One(cut, variant),
        None if long.is_some() || only_seed.is_some() => Choice::All,
        None => Choice::Sample,
    };
    try_points(wanted, only_seed, choice, &Figures::default());
}

/// The same with threads at once. What fails cannot be run again by its seed; its image is kept.
#[test]
fn crash_points_of_threads_at_once() {
    if have_qemu_img("crash points") {
        let long = number("CRASH_POINTS");
        let choice = if long.is_some() { Choice::All } else { Choice::Sample };
        let wanted = long.map_or(SAMPLE / 4, |points| points / 10);
        try_points(wanted, None, choice, &Figures { parallel: true, ..Figures::default() });
    }
}

fn try_points(wanted: u64, only_seed: Option<u64>, choice: Choice, figures: &Figures) {
    let next = AtomicU64::new(only_seed.unwrap_or(0));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..if only_seed.is_some() { 1 } else { threads } {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    let nth = number("CRASH_KIND").unwrap_or(seed) % KINDS.len() as u64;
                    let kind = KINDS[nth as usize];
                    let dir = tempfile::tempdir().unwrap();
                    let base = Base::create(dir.path(), kind);
                    replay(&base, dir.path(), seed, choice, figures);
                    let enough = figures.points.load(Ordering::Relaxed) >= wanted;
                    if only_seed.is_some() || enough || figures.failed.load(Ordering::Relaxed) {
                        break;
                    }
                }
            });
        }
    });
    let figures_of = |n: &AtomicU64| n.load(Ordering::Relaxed);
    println!(
        "crash points tried{}: {} of {} workloads; {} worked on afterwards, {} shown to qemu-img",
        if figures.parallel { " of threads at once" } else { "" },
        figures_of(&figures.points),
        figures_of(&figures.workloads),
        figures_of(&figures.used),
        figures_of(&figures.qemu),
    );
    let (past_end, cached) = (figures_of(&figures.past_end), figures_of(&figures.cached));
    println!(
        "  {past_end} writes began past the end of the file, {cached} copied what is around them"
    );
    // Neither depends on luck with this many workloads.
    assert!(only_seed.is_some() || (past_end > 0 && cached > 0));
    for (kind, points) in figures.by_kind.lock().unwrap().iter() {
        println!("  {points:>7} {kind}");
    }
}
