//! The kinds of images that are tried.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::qcow2::{Options, Probe, Qcow2};
use block::raw::Raw;
use block::storage::memory::MemoryStorage;
use block::storage::{FileOptions, FileStorage, Storage};
use block::{Format, Result};

use crate::common::{Random, create, path, qemu_img};
use crate::pages::Pages;
use crate::record::Host;

/// What an image starts with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Start {
    Empty,
    /// Half of it compressed clusters, written by qemu-img.
    Compressed,
    /// Nothing, over a raw backing file that is shorter than the disk.
    Backed,
    /// Empty, with an external data file.
    DataFile,
    /// Empty, with a persistent dirty bitmap that follows writes.
    Bitmap,
}

/// A kind of image.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kind {
    pub(crate) options: &'static str,
    /// Of the disk, in bytes.
    pub(crate) size: usize,
    pub(crate) start: Start,
}

impl Kind {
    /// Whether there can be internal snapshots.
    pub(crate) fn has_snapshots(&self) -> bool {
        self.start != Start::DataFile
    }

    /// Cluster size in bytes.
    pub(crate) fn cluster(&self) -> usize {
        let text = self.options.split(',').find_map(|o| o.strip_prefix("cluster_size="));
        match text.map(|text| text.strip_suffix('k').ok_or(text)) {
            Some(Ok(kib)) => kib.parse::<usize>().unwrap() * K,
            Some(Err(bytes)) => bytes.parse().unwrap(),
            None => 64 * K,
        }
    }
}

const fn kind(options: &'static str, size: usize, start: Start) -> Kind {
    Kind { options, size, start }
}

const K: usize = 1024;

/// Small clusters make many tables of few clusters; sizes are not multiples of clusters.
pub(crate) const KINDS: &[Kind] = &[
    kind("cluster_size=512", 150 * K + 512, Start::Empty),
    kind("cluster_size=4k", 2500 * K + 512, Start::Empty),
    kind("cluster_size=64k", 2048 * K + 1536, Start::Empty),
    // The refcount table is nearly full.
    kind("cluster_size=512,refcount_bits=64,preallocation=metadata", 1750 * K, Start::Empty),
    kind("cluster_size=1k,compat=0.10", 300 * K + 512, Start::Empty),
    kind("cluster_size=2k,refcount_bits=1", 600 * K, Start::Empty),
    kind("cluster_size=1k,refcount_bits=2", 300 * K, Start::Empty),
    kind("cluster_size=4k,refcount_bits=8", 1000 * K, Start::Backed),
    kind("cluster_size=2k,compat=0.10", 700 * K, Start::Backed),
    kind("cluster_size=4k,compression_type=zlib", 1000 * K, Start::Compressed),
    kind("cluster_size=8k,compression_type=zstd", 1000 * K, Start::Compressed),
    kind("cluster_size=16k,lazy_refcounts=on", 1500 * K, Start::Empty),
    kind("cluster_size=1k,preallocation=metadata", 200 * K, Start::Empty),
    kind("cluster_size=16k,extended_l2=on", 1500 * K, Start::Empty),
    kind("cluster_size=32k,extended_l2=on", 1500 * K + 512, Start::Backed),
    kind("cluster_size=4k,data_file_raw=off", 1000 * K + 512, Start::DataFile),
    kind("cluster_size=64k,data_file_raw=on", 1000 * K, Start::DataFile),
    kind("cluster_size=4k", 1000 * K + 512, Start::Bitmap),
    kind("cluster_size=512", 100 * K, Start::Bitmap),
];

/// The name of the bitmap of [`Start::Bitmap`].
pub(crate) const BITMAP: &str = "since the start";

/// An image to start from.
pub(crate) struct Base {
    pub(crate) kind: Kind,
    pub(crate) files: Vec<Pages>,
    backing: Option<Vec<u8>>,
    /// What the disk reads as.
    pub(crate) disk: Vec<u8>,
}

impl Base {
    /// Makes an image in an empty directory, which qemu-img needs to look at it later.
    pub(crate) fn create(dir: &Path, kind: Kind) -> Self {
        let size = kind.size.to_string();
        let mut disk = vec![0; kind.size];
        let mut backing = None;
        let image = match kind.start {
            Start::Empty | Start::Bitmap => create(dir, "a.qcow2", &size, kind.options),
            Start::DataFile => {
                let options = format!("{},data_file={}", kind.options, path(&data_file(dir)));
                create(dir, "a.qcow2", &size, &options)
            }
            Start::Compressed => {
                let half = kind.size / 2;
                disk[..half].copy_from_slice(&text(half));
                let raw = dir.join("full.raw");
                std::fs::write(&raw, &disk).unwrap();
                let image = dir.join("a.qcow2");
                let (from, to) = (path(&raw), path(&image));
                let args = ["convert", "-c", "-O", "qcow2", "-o", kind.options, &from, &to];
                qemu_img(&args);
                image
            }
            Start::Backed => {
                let bytes = Random(4711).bytes((kind.size * 2 / 3) as u64);
                std::fs::write(dir.join("base.raw"), &bytes).unwrap();
                disk[..bytes.len()].copy_from_slice(&bytes);
                backing = Some(bytes);
                let options = format!("{},backing_file=base.raw,backing_fmt=raw", kind.options);
                create(dir, "a.qcow2", &size, &options)
            }
        };
        if kind.start == Start::Bitmap {
            qemu_img(&["bitmap", "--add", "-g", "4k", &path(&image), BITMAP]);
        }
        let mut files = vec![Pages::new(&std::fs::read(image).unwrap())];
        if kind.start == Start::DataFile {
            files.push(Pages::new(&std::fs::read(data_file(dir)).unwrap()));
        }
        Self { kind, files, backing, disk }
    }

    /// An image that is there already, of one file.
    pub(crate) fn from_bytes(kind: Kind, bytes: &[u8]) -> Self {
        Self { kind, files: vec![Pages::new(bytes)], backing: None, disk: Vec::new() }
    }

    /// Opens the image on a host.
    pub(crate) fn open(&self, host: &Host, read_only: bool) -> Result<Qcow2> {
        self.open_on(host.file(0), || Ok(host.file(1)), read_only)
    }

    /// Opens the image in a file, with a data file if it has one.
    pub(crate) fn open_on(
        &self,
        image: Arc<dyn Storage>,
        data: impl FnOnce() -> Result<Arc<dyn Storage>>,
        read_only: bool,
    ) -> Result<Qcow2> {
        let backing = self.backing.as_ref().map(|bytes| {
            let storage = Arc::new(MemoryStorage::new(bytes.clone()));
            Raw::open(storage, true).map(|raw| Arc::new(raw) as Arc<dyn Format>)
        });
        let probe = Probe::new(image)?;
        let data_file = probe.needs_data_file().then(data).transpose()?;
        let options = Options { read_only, data_file, ..Options::default() };
        Qcow2::open_with(probe, backing.transpose()?, options)
    }

    /// Opens the image where [`Base::put`] has put it.
    pub(crate) fn open_files(&self, image: &Path, options: FileOptions) -> Result<Qcow2> {
        let open = |path: &Path| {
            FileStorage::open(path, options).map(|file| Arc::new(file) as Arc<dyn Storage>)
        };
        let data = data_file(image.parent().unwrap());
        self.open_on(open(image)?, || open(&data), options.read_only)
    }

    /// Puts the files where qemu-img finds them.
    pub(crate) fn put(&self, dir: &Path, name: &str, files: &[Pages]) -> PathBuf {
        let image = dir.join(name);
        std::fs::write(&image, files[0].bytes()).unwrap();
        if let Some(data) = files.get(1) {
            std::fs::write(data_file(dir), data.bytes()).unwrap();
        }
        image
    }
}

fn data_file(dir: &Path) -> PathBuf {
    dir.join("data.raw")
}

/// Bytes that can be compressed, but not to nothing.
fn text(len: usize) -> Vec<u8> {
    let mut random = Random(99);
    let words: Vec<_> = (0..64).map(|_| random.bytes(12)).collect();
    let mut out = Vec::with_capacity(len + 12);
    while out.len() < len {
        out.extend(&words[random.below(64) as usize]);
    }
    out.truncate(len);
    out
}
