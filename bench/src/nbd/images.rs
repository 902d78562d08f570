//! The images that are measured on.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{DISK, Numbers};

const CLUSTER: u64 = 64 << 10;

/// What an image has at the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// All clusters, with data.
    Full,
    /// Nothing: each write allocates.
    Empty,
    /// Nothing over a backing file with data: reads go through, writes copy.
    Overlay,
}

impl Kind {
    pub(crate) const ALL: [Self; 3] = [Self::Full, Self::Empty, Self::Overlay];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Full => "preallocated",
            Self::Empty => "allocating",
            Self::Overlay => "over a backing file",
        }
    }
}

/// An image to be opened, with its backing file.
#[derive(Debug)]
pub(crate) struct Image {
    pub(crate) path: PathBuf,
    pub(crate) backing: Option<PathBuf>,
}

/// Makes images; all are gone with it.
pub(crate) struct Images {
    dir: tempfile::TempDir,
    /// The clusters of a disk in random order.
    order: Vec<u64>,
}

impl Images {
    pub(crate) fn make(dir: &Path) -> Self {
        let dir = tempfile::Builder::new().prefix("nbd").tempdir_in(dir).unwrap();
        let raw = dir.path().join("data.raw");
        let mut numbers = Numbers(1);
        let words = DISK / 8;
        let data: Vec<u8> = (0..words).flat_map(|_| (numbers.next() | 1).to_le_bytes()).collect();
        fs::write(&raw, data).unwrap();
        for name in ["full.qcow2", "base.qcow2"] {
            qemu_img(&["convert", "-f", "raw", "-O", "qcow2"], &raw, &dir.path().join(name), &[]);
        }
        fs::remove_file(&raw).unwrap();
        let mut order: Vec<u64> = (0..DISK / CLUSTER).collect();
        for last in (1..order.len()).rev() {
            let other = usize::try_from(numbers.next() % (last as u64 + 1)).unwrap();
            order.swap(last, other);
        }
        Self { dir, order }
    }

    /// An image as it is at the start of a measurement.
    pub(crate) fn fresh(&self, kind: Kind) -> Image {
        let at = |name: &str| self.dir.path().join(name);
        let size = DISK.to_string();
        let new = at("new.qcow2");
        let _ = fs::remove_file(&new);
        match kind {
            Kind::Full => Image { path: at("full.qcow2"), backing: None },
            Kind::Empty => {
                qemu_img(&["create", "-q", "-f", "qcow2"], &new, Path::new(&size), &[]);
                Image { path: new, backing: None }
            }
            Kind::Overlay => {
                let base = at("base.qcow2");
                let from = format!("backing_file={},backing_fmt=qcow2", base.display());
                let options = ["create", "-q", "-f", "qcow2", "-o", &from];
                qemu_img(&options, &new, Path::new(&size), &[]);
                Image { path: new, backing: Some(base) }
            }
        }
    }

    /// Clusters of a disk.
    pub(crate) fn clusters(&self) -> u64 {
        DISK / CLUSTER
    }

    /// The guest offset of the cluster that is `n`th in a random order.
    pub(crate) fn shuffled_cluster(&self, n: u64) -> u64 {
        self.order[usize::try_from(n).unwrap() % self.order.len()] * CLUSTER
    }
}

fn qemu_img(before: &[&str], from: &Path, to: &Path, after: &[&str]) {
    let status = Command::new("qemu-img").args(before).arg(from).arg(to).args(after).status();
    assert!(status.unwrap().success(), "qemu-img {before:?} {}", from.display());
}
