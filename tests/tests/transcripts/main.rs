//! Every file of `tests/transcripts` is played to QEMU and to us: the same answers and events, in
//! the same order. `docs/transcripts.md` tells how to write one.
//!
//! `TRANSCRIPT=part-of-a-name cargo nextest run -p tardigrade-tests --test transcripts --no-capture`
//! plays some of them, and shows what was said.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

mod compare;
mod conform;
mod file;
mod play;
mod programs;

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use file::Transcript;
use tardigrade_tests::full::Small;
use tardigrade_tests::{repo, require};

/// Transcripts played at the same time. Most of their time goes into starting and ending programs.
const SIDE_BY_SIDE: usize = 6;

/// The files, by name, or those that `TRANSCRIPT` asks for.
fn files() -> Vec<PathBuf> {
    let wanted = std::env::var("TRANSCRIPT").unwrap_or_default();
    let entries = std::fs::read_dir(repo("tests/transcripts")).unwrap();
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.file_stem().unwrap().to_string_lossy().contains(&wanted));
    files.sort();
    files
}

/// What is wrong with a transcript, or how many exchanges it has; `None` where it cannot be played.
fn check(path: &PathBuf) -> Result<Option<usize>, String> {
    let text = std::fs::read_to_string(path).unwrap();
    let transcript: Transcript = serde_json::from_str(&text).map_err(|error| error.to_string())?;
    transcript.check()?;
    let pair = transcript.program.pair();
    if !require::program(pair.qemu) || (pair.needs_kvm && !require::kvm()) {
        return Ok(None);
    }
    if transcript.small.is_some() && !may_mount() {
        return Ok(None);
    }
    let ours = play::play(&transcript, programs::Side::Ours)?;
    let theirs = play::play(&transcript, programs::Side::Qemu)?;
    conforms(&transcript, &ours)?;
    compare::compare(&transcript, &ours, &theirs)?;
    Ok(Some(transcript.exchanges()))
}

/// Whether what we said is what our schema promises.
fn conforms(transcript: &Transcript, ours: &play::Played) -> Result<(), String> {
    let schema = conform::Schema::ours();
    for (step, messages) in transcript.play.iter().zip(ours) {
        let command = step.command();
        messages.iter().try_for_each(|message| schema.check(message, command.as_deref()))?;
    }
    Ok(())
}

/// Whether this user may mount a file system; says so if not.
fn may_mount() -> bool {
    let dir = tempfile::tempdir().unwrap();
    Small::mount(dir.path().join("small"), 1 << 20).is_some()
}

#[test]
fn every_transcript_is_the_same_with_qemu_and_with_us() {
    let files = files();
    assert!(!files.is_empty(), "no transcript has that name");
    let todo: Mutex<VecDeque<&PathBuf>> = Mutex::new(files.iter().collect());
    let failures = Mutex::new(Vec::new());
    let exchanges = AtomicUsize::new(0);
    let work = || {
        loop {
            let Some(path) = todo.lock().unwrap().pop_front() else { return };
            let name = path.file_stem().unwrap().to_string_lossy().into_owned();
            // A helper's panic is this transcript's failure; the others are played all the same.
            let result = catch_unwind(AssertUnwindSafe(|| check(path)))
                .unwrap_or_else(|_| Err("it panicked, see above".to_owned()));
            match result {
                Ok(Some(count)) => {
                    exchanges.fetch_add(count, Ordering::Relaxed);
                }
                Ok(None) => {}
                Err(text) => failures.lock().unwrap().push(format!("== {name}\n{text}")),
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..SIDE_BY_SIDE.min(files.len()) {
            scope.spawn(work);
        }
    });
    let mut failures = failures.into_inner().unwrap();
    failures.sort();
    println!("{} transcripts, {} exchanges", files.len(), exchanges.into_inner());
    let (failed, all) = (failures.len(), files.len());
    assert!(failures.is_empty(), "{failed} of {all} differ:\n{}", failures.join("\n\n"));
}

#[test]
fn there_are_at_least_300_exchanges() {
    let read = |path: &PathBuf| -> Transcript {
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    };
    let count: usize = files().iter().map(|path| read(path).exchanges()).sum();
    assert!(count >= 300 || std::env::var_os("TRANSCRIPT").is_some(), "{count}");
}
