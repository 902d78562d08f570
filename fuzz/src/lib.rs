//! What the fuzzers do, as plain functions: [`targets`] take any bytes and panic where a promise of
//! the block engine is broken. `fuzz_targets/` hands them to libFuzzer, `tests/replay.rs` runs all
//! seeds, regressions and some mutations of them in an ordinary test. See `docs/fuzzing.md`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a finding is a panic")]

pub mod alloc;
pub mod input;
#[cfg(feature = "libfuzzer")]
pub mod libfuzzer;
mod monitors;
pub mod mutate;
pub mod seeds;
mod sessions;
pub mod storage;
pub mod targets;

/// Every program of this crate allocates through it, so that a claim that is believed is a finding.
#[global_allocator]
static ALLOCATOR: alloc::Limited = alloc::Limited;

/// `main` of a target that was not built for libFuzzer: runs the inputs named on the command line,
/// which is how a finding is looked at in a debugger.
pub fn replay(name: &str) {
    let target = targets::by_name(name).unwrap();
    let files: Vec<_> = std::env::args_os().skip(1).collect();
    if files.is_empty() {
        eprintln!("usage: {name} INPUT...   (make fuzz builds the fuzzer)");
    }
    for file in files {
        let bytes = std::fs::read(&file).unwrap();
        eprintln!("{}: {} bytes", file.display(), bytes.len());
        (target.run)(&bytes);
    }
}

/// The program of a target: libFuzzer's, or one that runs the inputs it is given.
#[macro_export]
macro_rules! program {
    ($name:literal) => {
        #[cfg(feature = "libfuzzer")]
        mod fuzzer {
            libfuzzer_sys::fuzz_target!(|data: &[u8]| {
                $crate::libfuzzer::run($name, data);
            });
            libfuzzer_sys::fuzz_mutator!(|data: &mut [u8],
                                          size: usize,
                                          max_size: usize,
                                          seed: u32| {
                $crate::libfuzzer::mutate($name, data, size, max_size, seed)
            });
        }

        #[cfg(not(feature = "libfuzzer"))]
        fn main() {
            $crate::replay($name);
        }
    };
}
