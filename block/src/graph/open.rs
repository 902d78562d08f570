//! Opening nodes: files, formats, backing chains.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use super::check_name;
use super::options::{Backing, Driver, NodeOptions, NodeRef};
use crate::format::Format;
use crate::node::{Details, Node};
use crate::qcow2::{Probe, Qcow2};
use crate::raw::Raw;
use crate::storage::{FileOptions, FileStorage, Locking, Storage};
use crate::{Error, ReadBuf, Result};

/// Most images in a chain.
const MAX_CHAIN: usize = 200;

/// What a node gets from the one above unless it says otherwise.
#[derive(Debug, Clone, Copy, Default)]
struct Inherited {
    read_only: bool,
    auto_read_only: bool,
    force_share: bool,
    direct: bool,
    no_flush: bool,
    unmap: bool,
}

impl Inherited {
    fn with(self, options: &NodeOptions) -> Self {
        Self {
            read_only: options.read_only.unwrap_or(self.read_only),
            auto_read_only: options.auto_read_only || self.auto_read_only,
            force_share: options.force_share.unwrap_or(self.force_share),
            direct: options.direct.unwrap_or(self.direct),
            no_flush: options.no_flush.unwrap_or(self.no_flush),
            unmap: options.unmap,
        }
    }
}

/// Opens one tree of nodes; those made are only handed over when all went well.
pub(super) struct Opener<'a> {
    existing: &'a [Arc<Node>],
    made: Vec<Arc<Node>>,
    next: u32,
    /// Device and inode of the images of the chain being opened.
    chain: HashSet<(u64, u64)>,
}

impl<'a> Opener<'a> {
    pub(super) fn new(existing: &'a [Arc<Node>], next: u32) -> Self {
        Self { existing, made: Vec::new(), next, chain: HashSet::new() }
    }

    /// The nodes made, and the number of the next made-up name.
    pub(super) fn into_made(self) -> (Vec<Arc<Node>>, u32) {
        (self.made, self.next)
    }

    pub(super) fn open_root(&mut self, options: &NodeOptions) -> Result<Arc<Node>> {
        self.open(options, Inherited::default(), false)
    }

    fn find(&self, name: &str) -> Option<&Arc<Node>> {
        self.existing.iter().chain(&self.made).find(|node| node.name() == name)
    }

    /// A node's name: the one given, or one made up.
    fn name(&mut self, given: Option<&str>) -> Result<String> {
        if let Some(name) = given {
            check_name(name)?;
            if self.find(name).is_some() {
                return Err(Error::Invalid(format!("Duplicate nodes with node-name='{name}'")));
            }
            return Ok(name.to_owned());
        }
        let name = format!("#block{:03}", self.next);
        self.next += 1;
        Ok(name)
    }

    fn open(
        &mut self,
        options: &NodeOptions,
        above: Inherited,
        implicit: bool,
    ) -> Result<Arc<Node>> {
        let name = self.name(options.node_name.as_deref())?;
        let flags = above.with(options);
        if flags.force_share && !flags.read_only {
            return Err(Error::Invalid(
                "force-share=on can only be used with read-only images".to_owned(),
            ));
        }
        match &options.driver {
            Driver::File { filename, locking } => {
                let node = open_file(name, filename, *locking, flags, implicit)?;
                self.made.push(node.clone());
                Ok(node)
            }
            Driver::Raw { file } => {
                let (file, storage) = self.open_child(file, flags)?;
                let read_only = flags.read_only || storage.read_only();
                let raw = Raw::open(storage.clone(), read_only)?.with_discard(flags.unmap);
                let details = Details {
                    filename: file.filename().to_owned(),
                    storage: Some(storage),
                    file: Some(file),
                    direct: flags.direct,
                    no_flush: flags.no_flush,
                    implicit,
                    ..Details::default()
                };
                Ok(self.add(name, Arc::new(raw), details))
            }
            Driver::Qcow2 { file, backing } => {
                self.open_qcow2(name, file, backing, flags, implicit)
            }
        }
    }

    fn add(&mut self, name: String, format: Arc<dyn Format>, details: Details) -> Arc<Node> {
        let node = Arc::new(Node::with_details(name, format, details));
        self.made.push(node.clone());
        node
    }

    /// The protocol node below a format.
    fn open_child(
        &mut self,
        file: &NodeRef,
        flags: Inherited,
    ) -> Result<(Arc<Node>, Arc<dyn Storage>)> {
        let node = match file {
            NodeRef::Inline(options) => {
                let implicit = options.node_name.is_none();
                self.open(options, flags, implicit)?
            }
            NodeRef::Name(name) => {
                let node = self.find(name).cloned().ok_or_else(|| not_found(name))?;
                let taken = |n: &Arc<Node>| {
                    n.details().file.as_ref().is_some_and(|f| Arc::ptr_eq(f, &node))
                };
                if self.existing.iter().chain(&self.made).any(taken) || !node.users().is_empty() {
                    return Err(Error::Invalid(format!("Block device {name} is in use")));
                }
                node
            }
        };
        match node.storage() {
            Some(storage) if node.format().driver() == "file" => {
                let storage = storage.clone();
                Ok((node, storage))
            }
            _ => Err(Error::NotSupported(format!(
                "Node '{}' is a {} node; a format needs a 'file' node below it",
                node.name(),
                node.format().driver()
            ))),
        }
    }

    fn open_qcow2(
        &mut self,
        name: String,
        file: &NodeRef,
        backing: &Backing,
        flags: Inherited,
        implicit: bool,
    ) -> Result<Arc<Node>> {
        let (file, storage) = self.open_child(file, flags)?;
        self.enter_chain(&file.filename())?;
        let read_only = flags.read_only || storage.read_only();
        let probe = Probe::new(storage.clone())?;
        let full = match probe.backing_file() {
            Some(name) => Some(resolve(&file.filename(), name)?),
            None => None,
        };
        // The place of this node in the list is before those of its backing chain.
        let place = self.made.len();
        let backing_format = probe.backing_format().map(str::to_owned);
        let below = match (backing, &full) {
            (Backing::None, _) | (Backing::FromImage, None) => None,
            (Backing::FromImage, Some(path)) => {
                Some(self.open_backing_file(path, backing_format.as_deref(), flags)?)
            }
            (Backing::Node(NodeRef::Name(name)), _) => {
                Some(self.find(name).cloned().ok_or_else(|| not_found(name))?)
            }
            (Backing::Node(NodeRef::Inline(options)), _) => {
                let implicit = options.node_name.is_none();
                let flags = Inherited { read_only: true, ..flags };
                Some(self.open(options, flags, implicit)?)
            }
        };
        let overridden =
            !matches!(backing, Backing::FromImage) && below.as_ref().map(|n| n.filename()) != full;
        let filename = shown_name(&file.filename(), overridden, below.as_deref());
        let format = below.as_ref().map(|node| node.format().clone());
        let image = Qcow2::open(probe, format, read_only)?.with_discard(flags.unmap);
        let image = Arc::new(image);
        let details = Details {
            filename,
            storage: Some(storage),
            bitmaps: image.bitmaps().clone(),
            qcow2: Some(image.clone()),
            file: Some(file),
            backing: below,
            full_backing: full,
            direct: flags.direct,
            no_flush: flags.no_flush,
            implicit,
        };
        let node = Arc::new(Node::with_details(name, image, details));
        self.made.insert(place, node.clone());
        Ok(node)
    }

    /// Notes an image of the chain; one that is met twice is its own backing file.
    fn enter_chain(&mut self, path: &str) -> Result<()> {
        if self.chain.len() >= MAX_CHAIN {
            return Err(Error::NotSupported(format!(
                "Backing chain is longer than {MAX_CHAIN} images at '{path}'"
            )));
        }
        if let Ok(meta) = std::fs::metadata(path)
            && !self.chain.insert((meta.dev(), meta.ino()))
        {
            return Err(Error::Invalid(format!("Backing file '{path}' creates an infinite loop.")));
        }
        Ok(())
    }

    /// Opens the file that an image names as its backing file.
    fn open_backing_file(
        &mut self,
        path: &str,
        format: Option<&str>,
        above: Inherited,
    ) -> Result<Arc<Node>> {
        let file = NodeRef::Inline(Box::new(bare(Driver::File {
            filename: path.to_owned(),
            locking: Locking::Auto,
        })));
        let format = match format {
            Some(format) => format.to_owned(),
            None => probe_format(path)?.to_owned(),
        };
        let driver = match format.as_str() {
            "qcow2" => Driver::Qcow2 { file, backing: Backing::FromImage },
            "raw" | "file" => Driver::Raw { file },
            other => {
                return Err(Error::NotSupported(format!(
                    "Backing file '{path}' has format '{other}', which is not supported"
                )));
            }
        };
        // A base may be loaded many times over a chain; only a loop may meet a file twice.
        let flags = Inherited { read_only: true, ..above };
        self.open(&bare(driver), flags, true)
    }
}

fn not_found(name: &str) -> Error {
    Error::Invalid(format!("Cannot find device='{name}' nor node-name='{name}'"))
}

/// Options that say nothing but the driver.
fn bare(driver: Driver) -> NodeOptions {
    NodeOptions {
        node_name: None,
        read_only: None,
        auto_read_only: false,
        force_share: None,
        direct: None,
        no_flush: None,
        unmap: false,
        driver,
    }
}

fn open_file(
    name: String,
    filename: &str,
    locking: Locking,
    flags: Inherited,
    implicit: bool,
) -> Result<Arc<Node>> {
    let mut options = FileOptions {
        read_only: flags.read_only,
        direct: flags.direct,
        no_flush: flags.no_flush,
        locking,
        force_share: flags.force_share,
    };
    let storage = match FileStorage::open(filename, options) {
        Err(Error::Open { source, .. })
            if flags.auto_read_only
                && !flags.read_only
                && matches!(
                    source.raw_os_error(),
                    Some(libc::EACCES | libc::EROFS | libc::EPERM)
                ) =>
        {
            options.read_only = true;
            FileStorage::open(filename, options)?
        }
        other => other?,
    };
    let storage: Arc<dyn Storage> = Arc::new(storage);
    let read_only = options.read_only;
    let raw = Raw::protocol(storage.clone(), read_only)?.with_discard(flags.unmap);
    let details = Details {
        filename: filename.to_owned(),
        storage: Some(storage),
        direct: flags.direct,
        no_flush: flags.no_flush,
        implicit,
        ..Details::default()
    };
    Ok(Arc::new(Node::with_details(name, Arc::new(raw), details)))
}

/// A backing file's path: relative to the directory of its overlay.
fn resolve(overlay: &str, backing: &str) -> Result<String> {
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
fn probe_format(path: &str) -> Result<&'static str> {
    let options = FileOptions { read_only: true, locking: Locking::Off, ..FileOptions::default() };
    let mut magic = [0; 4];
    FileStorage::open(path, options)?.read_at(0, &[ReadBuf::new(&mut magic)])?;
    Ok(if &magic == b"QFI\xfb" { "qcow2" } else { "raw" })
}

/// The name QMP shows: the file's, or a json: text if the backing file is not the image's own.
fn shown_name(file: &str, overridden: bool, backing: Option<&Node>) -> String {
    if !overridden {
        return file.to_owned();
    }
    let backing = match backing {
        Some(node) => serde_json::json!({
            "driver": node.format().driver(),
            "file": {"driver": "file", "filename": node.filename()},
        }),
        None => serde_json::Value::Null,
    };
    let all = serde_json::json!({
        "backing": backing,
        "driver": "qcow2",
        "file": {"driver": "file", "filename": file},
    });
    format!("json:{all}")
}
