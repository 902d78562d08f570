//! What fuzzing starts from: `seeds/images` holds packed images of every kind, compressed; each
//! target gets all of them with operations of its own before them (`nbd`: [`crate::sessions`]). `regressions/TARGET` holds inputs
//! that were findings once, as they were found.

use std::path::{Path, PathBuf};

use fastrand::Rng;

use crate::input::{self, Op};
use crate::mutate::Body;
use crate::targets::Target;

/// An input and where it is from.
#[derive(Debug, Clone)]
pub struct Seed {
    /// A file's name.
    pub name: String,
    /// The input.
    pub input: Vec<u8>,
}

/// Sequences of operations before each image.
const SEQUENCES: u64 = 3;
/// Operations of each.
const OPS: usize = 12;

fn dir(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// The files of a directory, by name.
fn files(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut paths: Vec<PathBuf> = match std::fs::read_dir(dir) {
        Ok(entries) => entries.map(|entry| entry.unwrap().path()).collect(),
        // A target without any.
        Err(_) => Vec::new(),
    };
    paths.sort();
    let name = |path: &Path| path.file_stem().unwrap().to_string_lossy().into_owned();
    paths.iter().map(|path| (name(path), std::fs::read(path).unwrap())).collect()
}

/// The packed images.
pub fn images() -> Vec<Seed> {
    let unpacked =
        |(name, bytes): (String, Vec<u8>)| Seed { name, input: zstd::decode_all(&*bytes).unwrap() };
    files(&dir("seeds/images")).into_iter().map(unpacked).collect()
}

/// All seeds of a target.
pub fn of(target: &Target) -> Vec<Seed> {
    match target.body {
        Body::Image => images(),
        Body::OpsAndImage => images().iter().flat_map(with_ops).collect(),
        Body::Session => crate::sessions::all(),
        Body::Monitor => crate::monitors::all(),
    }
}

/// Inputs that were findings.
pub fn regressions(target: &Target) -> Vec<Seed> {
    let seed = |(name, input)| Seed { name, input };
    files(&dir("regressions").join(target.name)).into_iter().map(seed).collect()
}

/// The image with sequences of operations before it, the same every time.
fn with_ops(image: &Seed) -> Vec<Seed> {
    let mut random = Rng::with_seed(image.input.len() as u64);
    let sequence = |n| {
        let op = || Op {
            kind: random.u8(..),
            small: random.u8(..) >> (2 * random.u8(..2)),
            len: random.u16(..0x2000),
            offset: random.u32(..),
        };
        let ops: Vec<Op> = std::iter::repeat_with(op).take(OPS).collect();
        Seed { name: format!("{}-{n}", image.name), input: input::join_ops(&ops, &image.input) }
    };
    (0..SEQUENCES).map(sequence).collect()
}
