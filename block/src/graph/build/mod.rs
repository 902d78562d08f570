//! Making the object of one node out of its options and what is below it, for an opening and for a
//! reopening.

use std::sync::Arc;

use super::options::Window;
use crate::compress::CompressFilter;
use crate::format::Format;
use crate::node::{Details, Node};
use crate::qcow2::{self, Probe, Qcow2};
use crate::raw::Raw;
use crate::storage::{Aio, FileOptions, FileStorage, Locking, Storage};
use crate::{Error, Result};

mod below;
mod flags;
mod names;

pub(super) use below::below;
pub(crate) use flags::Flags;
pub use names::backing_path;
pub(crate) use names::name_for_overlay;
pub(super) use names::{full_backing, full_data_file, full_name, name_over};
use names::{is_overridden, shown_name, window_name};

/// A node's object and what the graph keeps with it.
pub(crate) struct Built {
    pub(crate) format: Arc<dyn Format>,
    pub(crate) details: Details,
}

/// Opens a host file, without locks. With `auto-read-only` one that cannot be written is opened
/// for reading.
pub(super) fn host_file(
    filename: &str,
    how: (Locking, Aio),
    host_device: bool,
    flags: &mut Flags,
) -> Result<FileStorage> {
    check_host_name(filename, host_device)?;
    let options = file_options(*flags, how);
    match FileStorage::open_unlocked(filename, options) {
        Err(Error::Open { source, .. })
            if flags.auto_read_only
                && !flags.read_only
                && matches!(
                    source.raw_os_error(),
                    Some(libc::EACCES | libc::EROFS | libc::EPERM)
                ) =>
        {
            flags.read_only = true;
            FileStorage::open_unlocked(filename, FileOptions { read_only: true, ..options })
        }
        other => other,
    }
}

pub(super) fn file_options(flags: Flags, (locking, aio): (Locking, Aio)) -> FileOptions {
    FileOptions {
        read_only: flags.read_only || flags.inactive,
        direct: flags.direct,
        no_flush: flags.no_flush,
        locking,
        aio,
        force_share: flags.force_share,
        transfer_limit: None,
    }
}

/// What can be told of a file by its name. Opening refuses what is no file for the `file` driver.
pub(crate) fn check_host_name(filename: &str, host_device: bool) -> Result<()> {
    use std::os::unix::fs::FileTypeExt;
    let driver = if host_device { "host_device" } else { "file" };
    if filename.is_empty() {
        return Err(Error::Invalid(format!("The '{driver}' block driver requires a file name")));
    }
    if !host_device {
        return Ok(());
    }
    let failed = |source| Error::Open { filename: filename.to_owned(), source };
    let kind = std::fs::metadata(filename).map_err(failed)?.file_type();
    if kind.is_block_device() {
        return Ok(());
    }
    if kind.is_char_device() {
        return Err(Error::NotSupported(format!(
            "'{filename}' is a character device; disks are regular files and block devices"
        )));
    }
    Err(Error::Invalid(format!(
        "'host_device' driver requires '{filename}' to be either a character or block device"
    )))
}

/// The protocol node of a host file.
pub(super) fn file_node(
    storage: Arc<FileStorage>,
    filename: &str,
    host_device: bool,
    flags: Flags,
) -> Result<Built> {
    let driver = if host_device { "host_device" } else { "file" };
    let raw = Raw::protocol(storage.clone(), driver, flags.read_only || flags.inactive)?
        .with_discard(flags.unmap);
    Ok(Built {
        format: Arc::new(raw),
        details: Details {
            filename: filename.to_owned(),
            storage: Some(storage.clone()),
            host: Some(storage),
            flags,
            ..Details::default()
        },
    })
}

/// A raw node on the storage of its child `file`.
pub(super) fn raw_node(
    file: &Arc<Node>,
    storage: Arc<dyn Storage>,
    window: Window,
    flags: Flags,
) -> Result<Built> {
    let read_only = flags.read_only || storage.read_only();
    let raw = Raw::window(storage.clone(), window.offset, window.size, read_only)?;
    let filename = if window.is_whole() { file.filename() } else { window_name(file, window) };
    Ok(Built {
        format: Arc::new(raw.with_discard(flags.unmap)),
        details: Details {
            filename,
            storage: Some(storage),
            file: Some(file.clone()),
            flags: flags.of_format(read_only, file),
            ..Details::default()
        },
    })
}

/// The node of an external data file and what it keeps its bytes in.
pub(super) type DataFile = (Arc<Node>, Arc<dyn Storage>);

/// A qcow2 node; `probe` has read the header from the storage of its child `file` already.
pub(super) fn qcow2_node(
    probe: Probe,
    file: &Arc<Node>,
    storage: Arc<dyn Storage>,
    data_file: Option<DataFile>,
    backing: Option<Arc<Node>>,
    flags: Flags,
    mut options: qcow2::Options,
) -> Result<Built> {
    let (data_file, data) = data_file.unzip();
    let read_only =
        flags.read_only || storage.read_only() || data.as_ref().is_some_and(|s| s.read_only());
    options.read_only = read_only;
    options.data_file = data;
    let full = full_backing(&probe, file)?;
    let overridden = is_overridden(backing.as_deref(), full.as_deref());
    let filename = shown_name(&file.filename(), overridden, backing.as_deref());
    let below = backing.clone().map(below);
    let image = Qcow2::open_with(probe, below, options)?.with_discard(flags.unmap).into_shared();
    Ok(Built {
        format: image.clone(),
        details: Details {
            filename,
            storage: Some(storage),
            bitmaps: image.bitmaps().clone(),
            qcow2: Some(image),
            file: Some(file.clone()),
            data_file,
            backing,
            full_backing: full,
            flags: flags.of_format(read_only, file),
            ..Details::default()
        },
    })
}

/// A filter that compresses what is written to its child.
pub(super) fn compress_node(file: &Arc<Node>, flags: Flags) -> Result<Built> {
    let below = below(file.clone());
    Ok(Built {
        format: Arc::new(CompressFilter::new(below)?),
        details: Details {
            filename: file.filename(),
            file: Some(file.clone()),
            flags: Flags { read_only: flags.read_only || file.read_only(), ..flags },
            ..Details::default()
        },
    })
}

/// The storage that a format may keep its bytes in.
pub(super) fn storage_of(node: &Arc<Node>) -> Result<Arc<dyn Storage>> {
    match node.details().host.clone() {
        Some(storage) => Ok(storage),
        None => Err(Error::NotSupported(format!(
            "Node '{}' is a {} node; a format needs a 'file' node below it",
            node.name(),
            node.driver()
        ))),
    }
}
