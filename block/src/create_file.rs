//! Creating host files: below a new image, or as a raw one.

use std::fs::OpenOptions;
use std::path::Path;

use serde::Deserialize;

use crate::error::host_words;
use crate::preallocation::Preallocation;
use crate::storage::{FileOptions, FileStorage, Storage};
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
}

/// Makes an empty file, or empties one that nobody uses, and opens it with QEMU's image locks.
///
/// # Errors
/// The host cannot make it, or somebody uses the image that was there.
pub fn create_file(path: impl AsRef<Path>, nocow: bool) -> Result<FileStorage> {
    let path = path.as_ref();
    let file =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(
            |e| {
                Error::Invalid(format!("Could not create '{}': {}", path.display(), host_words(&e)))
            },
        )?;
    let storage = FileStorage::open(path, FileOptions::default())?;
    storage.set_len(0)?;
    if nocow {
        set_nocow(&file, path);
    }
    Ok(storage)
}

/// Asks for writes in place. The file system must be one that knows the flag and the file empty; as
/// this is about speed only, others go on without, as in QEMU.
fn set_nocow(file: &std::fs::File, path: &Path) {
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
    let storage = create_file(&options.filename, options.nocow.unwrap_or(false))?;
    mode.take(&storage, 0, options.size, progress)?;
    storage.flush()?;
    Ok(storage)
}
