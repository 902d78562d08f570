//! The targets. Each takes any bytes; it returns, or panics where the block engine broke a promise.

use std::sync::{Arc, LazyLock};

use block::qcow2::{Options, Probe, Qcow2};
use block::raw::Raw;
use block::storage::Storage;
use block::{Format, Result};

use crate::alloc::Limit;
use crate::input;
use crate::mutate::Body;
use crate::storage::Sparse;

mod check;
mod model;
mod nbd;
mod open;
pub(crate) mod qmp;
mod read;
mod write;

/// A target.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its program's name.
    pub name: &'static str,
    /// What it does with an input.
    pub run: fn(&[u8]),
    /// What its inputs are made of.
    pub body: Body,
}

/// All targets.
pub const ALL: &[Target] = &[
    Target { name: "open", run: open::run, body: Body::Image },
    Target { name: "read", run: read::run, body: Body::OpsAndImage },
    Target { name: "write", run: write::run, body: Body::OpsAndImage },
    Target { name: "check", run: check::run, body: Body::Image },
    Target { name: "nbd", run: nbd::run, body: Body::Session },
    Target { name: "qmp", run: qmp::run, body: Body::Monitor },
];

pub(crate) use nbd::NAME as NBD_NAME;

/// The target of a name.
pub fn by_name(name: &str) -> Option<&'static Target> {
    ALL.iter().find(|target| target.name == name)
}

/// Bytes of the backing file that images get which name one.
const BACKING: u64 = 96 << 10;

/// Length of the data file of images that need one: as good as endless.
const DATA: u64 = 1 << 40;

/// The backing file: every sector tells its number.
fn backing() -> Result<Arc<dyn Format>> {
    let file = Sparse::default();
    for sector in 0..BACKING / 512 {
        file.put(sector * 512, &[u8::try_from(sector % 251).unwrap_or(0) + 1; 512]);
    }
    Ok(Arc::new(Raw::open(Arc::new(file), true)?))
}

/// An image's file, and the data file that it gets if it needs one.
struct Files {
    image: Arc<Sparse>,
    data: Arc<Sparse>,
}

impl Files {
    fn unpack(image: &[u8]) -> Self {
        let data = Arc::new(Sparse::default());
        data.put_len(DATA);
        Self { image: input::unpack(image), data }
    }

    /// Opens the image as a node would be: with a backing file if it names one.
    fn open(&self, read_only: bool) -> Result<Qcow2> {
        let storage: Arc<dyn Storage> = self.image.clone();
        let probe = Probe::new(storage)?;
        let backing = match probe.backing_file() {
            Some(_) => Some(backing()?),
            None => None,
        };
        let data: Option<Arc<dyn Storage>> =
            if probe.needs_data_file() { Some(self.data.clone()) } else { None };
        let options = Options { read_only, data_file: data, ..Options::default() };
        Qcow2::open_with(probe, backing, options)
    }

    fn len(&self) -> u64 {
        self.image.len().expect("memory has a length")
    }
}

/// The limits of memory for work on a file: tables and caches have fixed bounds, everything else
/// that is allocated at once must be in the file.
fn limit(file: &Sparse) -> Limit {
    limit_of(file, 6 << 20)
}

/// As [`limit`], with the bound of what need not be in the file.
fn limit_of(file: &Sparse, single: usize) -> Limit {
    let len = usize::try_from(file.len().unwrap_or(0)).unwrap_or(0).min(64 << 20);
    Limit::set(single + 2 * len, (224 << 20) + 2 * len)
}

/// Tells what is done, if FUZZ_TRACE is in the environment.
fn trace(text: impl FnOnce() -> String) {
    static WANTED: LazyLock<bool> = LazyLock::new(|| std::env::var_os("FUZZ_TRACE").is_some());
    if *WANTED {
        eprintln!("{}", text());
    }
}
