//! Creating host files: below a new image, or as a raw one.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::path::Path;

use serde::Deserialize;

use crate::error::host_words;
use crate::preallocation::Preallocation;
use crate::storage::{FileOptions, FileStorage, Storage, sys};
use crate::{Error, Progress, Result};

/// QAPI `BlockdevCreateOptionsFile`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct FileCreateOptions {
    /// The file's path; one that exists loses its contents.
    pub filename: String,
    /// Bytes.
    pub size: u64,
    /// What is taken ahead of time: off, falloc or full.
    #[serde(default)]
    pub preallocation: Option<Preallocation>,
    /// Writes in place where the file system would copy (btrfs); off.
    #[serde(default)]
    pub nocow: Option<bool>,
    /// Bytes of which the file system takes space at once (XFS): 1 MiB, 0 for its own choice.
    #[serde(default)]
    pub extent_size_hint: Option<u64>,
}

/// What the file system may do with a new file. It is about speed only: one that cannot goes on without,
/// as in QEMU.
#[derive(Debug, Clone, Copy, Default)]
pub struct FileHints {
    /// Writes in place where it would copy (btrfs).
    pub nocow: bool,
    /// Bytes of which it takes space at once (XFS), so that images that grow cluster by cluster are not
    /// scattered; 0 for its own choice, [`DEFAULT_EXTENT_SIZE`] where nobody says it.
    pub extent_size: Option<u32>,
}

/// QEMU's, in bytes.
pub const DEFAULT_EXTENT_SIZE: u32 = 1 << 20;

impl FileHints {
    /// The hints of options; the size is in bytes.
    ///
    /// # Errors
    /// The size is larger than the host's call can say; with QEMU's text.
    pub fn new(nocow: Option<bool>, extent_size: Option<u64>) -> Result<Self> {
        let extent_size = extent_size.map(u32::try_from).transpose();
        let extent_size =
            extent_size.map_err(|_| Error::Invalid("Extent size hint is too large".to_owned()))?;
        Ok(Self { nocow: nocow.unwrap_or(false), extent_size })
    }

    fn ask(self, file: &File, path: &Path) {
        if self.nocow {
            set_nocow(file, path);
        }
        let bytes = self.extent_size.unwrap_or(DEFAULT_EXTENT_SIZE);
        if bytes == 0 {
            return;
        }
        match sys::set_extent_size(file.as_fd(), bytes) {
            // Who asked for it is told.
            Err(e) if self.extent_size.is_some() => {
                tracing::warn!(file = %path.display(), "Failed to set extent size hint: {}", host_words(&e));
            }
            Err(e) => tracing::debug!(file = %path.display(), "no extent size hint here: {e}"),
            Ok(()) => {}
        }
    }
}

/// Makes an empty file, or empties one that nobody uses, and opens it with QEMU's image locks.
///
/// # Errors
/// The host cannot make it, or somebody uses the image that was there.
pub fn create_file(path: impl AsRef<Path>, hints: FileHints) -> Result<FileStorage> {
    let path = path.as_ref();
    let file =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(
            |e| {
                Error::Invalid(format!("Could not create '{}': {}", path.display(), host_words(&e)))
            },
        )?;
    let storage = FileStorage::open(path, FileOptions::default())?;
    storage.set_len(0)?;
    // Only of an empty file can they be changed.
    hints.ask(&file, path);
    Ok(storage)
}

/// Asks for writes in place. The file system must be one that knows the flag and the file empty; as
/// this is about speed only, others go on without, as in QEMU.
fn set_nocow(file: &File, path: &Path) {
    use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};
    let set = ioctl_getflags(file).and_then(|flags| ioctl_setflags(file, flags | IFlags::NOCOW));
    if let Err(e) = set {
        tracing::debug!(file = %path.display(), "nocow has no effect here: {e}");
    }
}

/// Makes a file of a size: a raw image.
///
/// # Errors
/// As [`create_file`]; a mode that a file does not have; no space.
pub fn create_raw(options: &FileCreateOptions, progress: &Progress) -> Result<FileStorage> {
    let mode = options.preallocation.unwrap_or_default();
    if mode == Preallocation::Metadata {
        return Err(Error::Invalid("Unsupported preallocation mode 'metadata'".to_owned()));
    }
    let hints = FileHints::new(options.nocow, options.extent_size_hint)?;
    let storage = create_file(&options.filename, hints)?;
    mode.take(&storage, 0, options.size, progress)?;
    storage.flush()?;
    Ok(storage)
}
