//! Making the object of one node out of its options and what is below it, for an opening and for a
//! reopening.

use std::path::Path;
use std::sync::Arc;

use super::options::{DetectZeroes, NodeOptions, Window};
use crate::compress::CompressFilter;
use crate::format::Format;
use crate::node::{Details, Node};
use crate::qcow2::{self, Probe, Qcow2};
use crate::queue::Located;
use crate::raw::Raw;
use crate::storage::{Aio, FileOptions, FileStorage, Locking, Storage};
use crate::{Error, ReadBuf, Result, StatusExtent};

/// What holds for a node once what it gets from the one above is put to its own options.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Flags {
    pub(crate) read_only: bool,
    pub(crate) auto_read_only: bool,
    pub(crate) force_share: bool,
    /// Opened for reading and without locks whatever the rest says: see `activity.rs`.
    pub(crate) inactive: bool,
    pub(crate) direct: bool,
    pub(crate) no_flush: bool,
    pub(crate) unmap: bool,
    pub(crate) detect_zeroes: DetectZeroes,
}

impl Flags {
    /// The flags of a node with these options below one with the flags `self`. Discard and
    /// detect-zeroes are nobody else's matter.
    pub(super) fn with(self, options: &NodeOptions) -> Result<Self> {
        let flags = Self {
            read_only: options.read_only.unwrap_or(self.read_only),
            auto_read_only: options.auto_read_only || self.auto_read_only,
            force_share: options.force_share.unwrap_or(self.force_share),
            inactive: self.inactive,
            direct: options.direct.unwrap_or(self.direct),
            no_flush: options.no_flush.unwrap_or(self.no_flush),
            unmap: options.unmap,
            detect_zeroes: options.detect_zeroes,
        };
        if flags.force_share && !flags.read_only {
            return Err(Error::Invalid(
                "force-share=on can only be used with read-only images".to_owned(),
            ));
        }
        Ok(flags)
    }

    /// What a backing file gets.
    pub(super) fn of_backing(self) -> Self {
        Self { read_only: true, ..self }
    }

    /// The flags of a format whose image turned out to be `read_only`, with its bytes in `file`. Of one
    /// that is inactive they tell what it will be.
    fn of_format(self, read_only: bool, file: &Node) -> Self {
        let read_only = match self.inactive {
            true => self.read_only || file.read_only(),
            false => read_only,
        };
        Self { read_only, ..self }
    }
}

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
    if host_device {
        check_device(filename)?;
    }
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

fn check_device(filename: &str) -> Result<()> {
    use std::os::unix::fs::FileTypeExt;
    let failed = |source| Error::Open { filename: filename.to_owned(), source };
    let kind = std::fs::metadata(filename).map_err(failed)?.file_type();
    if kind.is_block_device() || kind.is_char_device() {
        return Ok(());
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
    let image = Qcow2::open_with(probe, below, options)?.with_discard(flags.unmap);
    let image = Arc::new(image);
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
    let below = Arc::new(Below(file.clone()));
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

/// The path of the external data file that the image names: as it is there, so a relative one is
/// relative to the working directory, as in QEMU.
pub(super) fn full_data_file(probe: &Probe) -> Result<String> {
    match probe.data_file() {
        Some(name) => resolve("", &name),
        None => Err(Error::Invalid("'data-file' is required for this image".to_owned())),
    }
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

/// A node as what those above read from.
pub(super) fn below(node: Arc<Node>) -> Arc<dyn Format> {
    Arc::new(Below(node))
}

/// A backing node as what its overlay reads from: whatever the node's image is by then.
struct Below(Arc<Node>);

impl Format for Below {
    fn driver(&self) -> &'static str {
        self.0.driver()
    }

    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_only(&self) -> bool {
        self.0.read_only()
    }

    fn read(&self, offset: u64, bufs: &[ReadBuf<'_>]) -> Result<()> {
        self.0.read(offset, bufs)
    }

    fn fast_zeroes(&self) -> bool {
        self.0.fast_zeroes()
    }

    fn write(&self, offset: u64, bufs: &[crate::WriteBuf<'_>]) -> Result<()> {
        self.0.write(offset, bufs)
    }

    fn compressed_cluster(&self) -> Option<u64> {
        self.0.access().compressed_cluster()
    }

    fn write_compressed(&self, offset: u64, bufs: &[crate::WriteBuf<'_>]) -> Result<()> {
        self.0.write_compressed(offset, bufs)
    }

    /// While the image is being replaced, a request thread waits in the caller's place.
    fn locate_read(&self, offset: u64, len: u64, out: &mut Located) -> bool {
        let Some(access) = self.0.try_access() else {
            return false;
        };
        let found = access.locate_read(offset, len, out);
        out.entered.push(access);
        found
    }

    /// Does not wait for one who waits for the caller: whoever replaces this image has closed the
    /// gate of the overlay before, so no request of it is here then.
    fn block_status(&self, offset: u64, len: u64) -> Result<Vec<StatusExtent>> {
        self.0.access().block_status(offset, len)
    }

    fn flush(&self) -> Result<()> {
        self.0.flush()
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.0.discard(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.0.write_zeroes(offset, len, unmap)
    }
}

/// The backing file's path that the image names: relative to the directory of the overlay.
pub(super) fn full_backing(probe: &Probe, file: &Arc<Node>) -> Result<Option<String>> {
    probe.backing_file().map(|name| resolve(&file.filename(), name)).transpose()
}

fn resolve(overlay: &str, backing: &str) -> Result<String> {
    // A node's options in the place of a name, which QEMU shows and writes where a name does not tell all.
    if backing.starts_with("json:") {
        return Ok(backing.to_owned());
    }
    let before_slash = backing.split('/').next().unwrap_or_default();
    let path = match before_slash.split_once(':') {
        Some(("file", _)) => &backing["file:".len()..],
        Some((protocol, _)) => {
            return Err(Error::NotSupported(format!(
                "Image '{overlay}': backing file '{backing}' has the protocol '{protocol}', which is not supported"
            )));
        }
        None => backing,
    };
    let path = Path::new(path);
    let full = match Path::new(overlay).parent() {
        Some(dir) if path.is_relative() => dir.join(path),
        _ => path.to_owned(),
    };
    Ok(full.to_string_lossy().into_owned())
}

/// The format of a backing file whose overlay does not tell it, by its first bytes as QEMU does.
pub(super) fn probe_format(path: &str) -> Result<&'static str> {
    let options = FileOptions { read_only: true, ..FileOptions::default() };
    let mut magic = [0; 4];
    FileStorage::open_unlocked(path, options)?.read_at(0, &[ReadBuf::new(&mut magic)])?;
    Ok(if &magic == b"QFI\xfb" { "qcow2" } else { "raw" })
}

/// The name that QMP shows for a qcow2 node once it is over `backing`.
pub(super) fn name_over(details: &Details, backing: Option<&Node>) -> String {
    let overridden = is_overridden(backing, details.full_backing.as_deref());
    let file = details.file.as_ref().map(|file| file.filename()).unwrap_or_default();
    shown_name(&file, overridden, backing)
}

/// Whether a node is over another image than the one that it names.
fn is_overridden(backing: Option<&Node>, named: Option<&str>) -> bool {
    match (backing, named) {
        (None, None) => false,
        (Some(node), Some(named)) => !same_file(&node.filename(), named),
        _ => true,
    }
}

/// Whether two names of images are the same, of which one may be relative to the working directory.
fn same_file(a: &str, b: &str) -> bool {
    let absolute = |name: &str| std::path::absolute(name).ok();
    a == b || (!is_json(a) && !is_json(b) && absolute(a) == absolute(b))
}

fn is_json(name: &str) -> bool {
    name.starts_with("json:")
}

/// What an overlay at `path` has to name so that it finds the image of `node` below it wherever it is
/// opened: QEMU takes a name that is not absolute to be relative to the overlay's directory.
pub(crate) fn name_for_overlay(node: &Node, path: &Path) -> String {
    let name = node.filename();
    let beside = path.parent().is_none_or(|dir| dir.as_os_str().is_empty());
    if beside || is_json(&name) || name.starts_with('/') {
        return name;
    }
    match std::path::absolute(&name) {
        Ok(path) => path.to_string_lossy().into_owned(),
        Err(_) => name,
    }
}

/// The path that a name of a backing file means in the image of these details.
pub(super) fn full_name(details: &Details, name: &str) -> Result<String> {
    let file = details.file.as_ref().map(|file| file.filename()).unwrap_or_default();
    resolve(&file, name)
}

/// A node as the options that open it, for `json:` names.
fn as_options(node: &Node) -> serde_json::Value {
    let name = node.filename();
    if let Some(options) = name.strip_prefix("json:")
        && let Ok(options) = serde_json::from_str(options)
    {
        return options;
    }
    let file = node.details().file.as_ref().map_or("file", |file| file.driver());
    serde_json::json!({"driver": node.driver(), "file": {"driver": file, "filename": name}})
}

/// The name QMP shows: the file's, or a json: text if the backing file is not the image's own.
fn shown_name(file: &str, overridden: bool, backing: Option<&Node>) -> String {
    if !overridden {
        return file.to_owned();
    }
    let all = serde_json::json!({
        "backing": backing.map(as_options),
        "driver": "qcow2",
        "file": {"driver": "file", "filename": file},
    });
    format!("json:{}", super::json::spaced(&all))
}

fn window_name(file: &Node, window: Window) -> String {
    let mut all = serde_json::json!({
        "driver": "raw",
        "file": {"driver": file.driver(), "filename": file.filename()},
    });
    if let Some(members) = all.as_object_mut() {
        let numbers = [("offset", window.offset), ("size", window.size)];
        for (name, value) in numbers.into_iter().filter_map(|(name, v)| Some((name, v?))) {
            members.insert(name.to_owned(), value.into());
        }
    }
    format!("json:{}", super::json::spaced(&all))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::MemoryStorage;

    #[test]
    fn a_located_read_of_a_backing_file_holds_it_and_a_closed_gate_is_not_waited_for() {
        let storage = Arc::new(MemoryStorage::new(vec![0; 8192]));
        let node = Arc::new(Node::new("b", Arc::new(Raw::open(storage, true).unwrap())));
        let below = Below(node.clone());
        let mut located = Located::default();
        assert!(below.locate_read(4096, 512, &mut located));
        assert_eq!((located.extents.len(), located.entered.len()), (1, 1));
        let mut beyond = Located::default();
        assert!(!below.locate_read(8192, 512, &mut beyond));
        beyond.clear();
        let closer = {
            let node = node.clone();
            std::thread::spawn(move || node.close_gate())
        };
        while node.try_access().is_some() {
            std::thread::yield_now();
        }
        assert!(!closer.is_finished(), "closed with a read in flight");
        located.clear();
        let closed = closer.join().unwrap();
        assert!(!below.locate_read(4096, 512, &mut located));
        assert!(!located.conflict && located.entered.is_empty());
        drop(closed);
        assert!(below.locate_read(4096, 512, &mut located));
    }
}
