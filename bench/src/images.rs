//! The images that requests are measured on.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Bytes of the disk of images with data.
pub(crate) const DISK: u64 = 512 << 20;
/// Bytes of the disk of an image that is empty at first: there, requests must last for a while too.
const EMPTY_DISK: u64 = 2 << 30;
/// Bytes of a cluster.
pub(crate) const CLUSTER: u64 = 64 << 10;

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

    /// Bytes of the disk.
    fn disk(self) -> u64 {
        match self {
            Self::Empty => EMPTY_DISK,
            Self::Full | Self::Overlay => DISK,
        }
    }

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

impl Image {
    /// The files it is in.
    pub(crate) fn files(&self) -> impl Iterator<Item = &Path> {
        std::iter::once(&self.path).chain(&self.backing).map(PathBuf::as_path)
    }
}

/// Makes images; all are gone with it.
pub(crate) struct Images {
    dir: tempfile::TempDir,
    /// The clusters of a disk in random order, and of an empty one.
    order: [Vec<u64>; 2],
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
        let order = [DISK, EMPTY_DISK].map(|disk| numbers.shuffled(disk / CLUSTER));
        Self { dir, order }
    }

    /// Where they are.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// An image as it is at the start of a measurement.
    pub(crate) fn fresh(&self, kind: Kind) -> Image {
        let at = |name: &str| self.dir.path().join(name);
        let size = kind.disk().to_string();
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
    pub(crate) fn clusters(&self, kind: Kind) -> u64 {
        kind.disk() / CLUSTER
    }

    /// The guest offset of the cluster that is `n`th in a random order.
    pub(crate) fn shuffled_cluster(&self, kind: Kind, n: u64) -> u64 {
        let order = &self.order[usize::from(kind == Kind::Empty)];
        order[usize::try_from(n).unwrap()] * CLUSTER
    }
}

/// Pseudo-random numbers, the same in every run (splitmix64).
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// The numbers below `count` in random order.
    fn shuffled(&mut self, count: u64) -> Vec<u64> {
        let mut order: Vec<u64> = (0..count).collect();
        for last in (1..order.len()).rev() {
            let other = usize::try_from(self.next() % (last as u64 + 1)).unwrap();
            order.swap(last, other);
        }
        order
    }
}

fn qemu_img(before: &[&str], from: &Path, to: &Path, after: &[&str]) {
    let status = Command::new("qemu-img").args(before).arg(from).arg(to).args(after).status();
    assert!(status.unwrap().success(), "qemu-img {before:?} {}", from.display());
}
