//! Opening nodes: files, formats, backing chains.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use super::build::{self, Built, Flags};
use super::check_name;
use super::damage::Damage;
use super::locks;
use super::options::{Backing, Driver, NodeOptions, NodeRef, Source, Window};
use super::permissions::{Edge, Facts, Growing, Parent, Role};
use super::text;
use crate::node::{Details, Node};
use crate::qcow2::Probe;
use crate::stack::deep;
use crate::storage::{Aio, Locking};
use crate::{Error, Result, host_words};

/// Opens one tree of nodes; those made are only handed over when all went well.
pub(super) struct Opener<'a> {
    existing: &'a [Arc<Node>],
    made: Vec<Arc<Node>>,
    /// All nodes and uses, with those that are being opened.
    graph: Growing,
    next: u32,
    /// Device and inode of the images of the chain being opened.
    chain: HashSet<(u64, u64)>,
    damage: Arc<Damage>,
    /// The root is made for others, too.
    implicit_root: bool,
}

/// What an opening leads to.
pub(super) struct Opened {
    pub(super) root: Arc<Node>,
    pub(super) made: Vec<Arc<Node>>,
    pub(super) edges: Vec<Edge>,
    /// Number of the next made-up name.
    pub(super) next: u32,
}

impl<'a> Opener<'a> {
    pub(super) fn new(
        existing: &'a [Arc<Node>],
        edges: Vec<Edge>,
        next: u32,
        damage: Arc<Damage>,
    ) -> Result<Self> {
        let facts = existing.iter().map(|node| (node.name().to_owned(), locks::facts(node)));
        let graph = Growing::new(edges, facts.collect())?;
        let (made, chain) = (Vec::new(), HashSet::new());
        Ok(Self { existing, made, graph, next, chain, damage, implicit_root: false })
    }

    /// Opens the node and all below it. On failure the locks of nodes that were there before may
    /// have been widened.
    pub(super) fn open_root(mut self, options: &NodeOptions, inherited: Flags) -> Result<Opened> {
        let root = self.open(options, inherited, None)?;
        Ok(Opened { root, made: self.made, edges: self.graph.into_edges(), next: self.next })
    }

    /// As [`Opener::open_root`], of a node that goes when nobody uses it any more; what its options do
    /// not say is as `inherited`.
    pub(super) fn open_implicit(
        mut self,
        options: &NodeOptions,
        inherited: Flags,
    ) -> Result<Opened> {
        self.implicit_root = true;
        let root = self.open(options, inherited, None)?;
        Ok(Opened { root, made: self.made, edges: self.graph.into_edges(), next: self.next })
    }

    fn find(&self, name: &str) -> Option<&Arc<Node>> {
        self.existing.iter().chain(&self.made).find(|node| node.name() == name)
    }

    /// A node's name: the one given, or one made up.
    fn name(&mut self, given: Option<&str>) -> Result<String> {
        if let Some(name) = given {
            check_name(name)?;
            if self.graph.has(name) {
                return Err(Error::Invalid(format!("Duplicate nodes with node-name='{name}'")));
            }
            return Ok(name.to_owned());
        }
        let name = format!("#block{:03}", self.next);
        self.next += 1;
        Ok(name)
    }

    /// `above` is the node that these options were part of, if any. Goes down a chain by recursion.
    fn open(
        &mut self,
        options: &NodeOptions,
        inherited: Flags,
        above: Option<&str>,
    ) -> Result<Arc<Node>> {
        deep(|| self.open_here(options, inherited, above))
    }

    fn open_here(
        &mut self,
        options: &NodeOptions,
        inherited: Flags,
        above: Option<&str>,
    ) -> Result<Arc<Node>> {
        let name = self.name(options.node_name.as_deref())?;
        let mut flags = inherited.with(options)?;
        let built = match &options.driver {
            Driver::File { filename, locking, aio, host_device } => {
                let how = (*locking, *aio);
                let storage = build::host_file(filename, how, *host_device, &mut flags)
                    .map_err(|error| self.explain(error))?;
                build::file_node(Arc::new(storage), filename, *host_device, flags)?
            }
            Driver::Raw { file, window } => {
                self.begin(&name, flags)?;
                let role = if window.is_whole() { Role::Filtered } else { Role::Part };
                let file = self.open_child(&name, file, flags, role)?;
                build::raw_node(&file, build::storage_of(&file)?, *window, flags)?
            }
            Driver::Compress { file } => {
                self.begin(&name, flags)?;
                let below = match file {
                    NodeRef::Inline(options) => self.open(options, flags, Some(&name))?,
                    NodeRef::Name(name) => {
                        self.find(name).cloned().ok_or_else(|| not_found(name))?
                    }
                };
                self.connect(&name, &below, "file", Role::Filtered)?;
                build::compress_node(&below, flags)?
            }
            Driver::Qcow2 { .. } => {
                self.begin(&name, flags)?;
                return self.open_qcow2(name, options, flags, above);
            }
        };
        self.add(name, built, options, above, self.made.len())
    }

    /// Takes a node in that is going to be opened.
    fn begin(&mut self, name: &str, flags: Flags) -> Result<()> {
        let writable = !flags.read_only;
        self.graph.put(name, Facts { writable, was_writable: writable, ..Facts::default() })
    }

    /// What ends a chain is the number of files that a process may have open.
    fn explain(&self, error: Error) -> Error {
        match error {
            Error::Open { filename, source }
                if matches!(source.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) =>
            {
                Error::Invalid(format!(
                    "Could not open '{filename}': {}; it would be image {} of its backing chain, each of which \
                     takes two descriptors: allow more (ulimit -Hn) or make the chain shorter (block-commit, \
                     block-stream)",
                    host_words(&source),
                    self.chain.len() + 1
                ))
            }
            other => other,
        }
    }

    fn add(
        &mut self,
        name: String,
        built: Built,
        options: &NodeOptions,
        above: Option<&str>,
        place: usize,
    ) -> Result<Arc<Node>> {
        let details = Details {
            implicit: match above {
                Some(_) => options.node_name.is_none(),
                None => self.implicit_root,
            },
            options: Some(options.clone()),
            inherits_from: above.map(str::to_owned),
            ..built.details
        };
        self.damage.watch(&name, &details);
        let node = Arc::new(Node::with_details(name, built.format, details));
        self.graph.put(node.name(), locks::facts(&node))?;
        self.made.insert(place, node.clone());
        Ok(node)
    }

    /// Puts `child` below the node `parent` that is being opened, and takes the file locks that
    /// this use asks for, before anything is read.
    fn connect(
        &mut self,
        parent: &str,
        child: &Arc<Node>,
        label: &'static str,
        role: Role,
    ) -> Result<()> {
        // No loop comes about: the parent is not there yet for others to be over it.
        let edge = Edge {
            parent: Parent::Node(parent.to_owned()),
            child: child.name().to_owned(),
            label,
            role,
        };
        for name in self.graph.connect(edge)? {
            let node = if name == child.name() { Some(child) } else { self.find(&name) };
            if let Some(node) = node {
                locks::widen_one(node, self.graph.of(&name))?;
            }
        }
        Ok(())
    }

    /// The protocol node below a format.
    fn open_child(
        &mut self,
        parent: &str,
        file: &NodeRef,
        flags: Flags,
        role: Role,
    ) -> Result<Arc<Node>> {
        let node = match file {
            NodeRef::Inline(options) => self.open(options, flags, Some(parent))?,
            NodeRef::Name(name) => self.find(name).cloned().ok_or_else(|| not_found(name))?,
        };
        build::storage_of(&node)?;
        self.connect(parent, &node, "file", role)?;
        Ok(node)
    }

    fn open_qcow2(
        &mut self,
        name: String,
        options: &NodeOptions,
        flags: Flags,
        above: Option<&str>,
    ) -> Result<Arc<Node>> {
        let Driver::Qcow2 { file, backing, image } = &options.driver else {
            return Err(Error::Invalid(format!("node '{name}' is not a qcow2 node")));
        };
        let file = self.open_child(&name, file, flags, Role::Image)?;
        self.enter_chain(&file.filename())?;
        let storage = build::storage_of(&file)?;
        let probe = Probe::new(storage.clone())?;
        let full = build::full_backing(&probe, &file)?;
        let data_file = self.open_data_file(&name, image.data_file.as_ref(), &probe, flags)?;
        // The place of this node in the list is before those of its backing chain.
        let place = self.made.len();
        let format = probe.backing_format().map(str::to_owned);
        let below = match (backing, full) {
            (Backing::None, _) | (Backing::FromImage, None) => None,
            (Backing::FromImage, Some(path)) => {
                let below = self.open_backing_file(&name, &path, format.as_deref(), flags);
                Some(below.map_err(|error| of_overlay(error, &file))?)
            }
            (Backing::Node(NodeRef::Name(name)), _) => {
                let missing =
                    || Error::Invalid(format!("Could not open backing file: {}", not_found(name)));
                Some(self.find(name).cloned().ok_or_else(missing)?)
            }
            (Backing::Node(NodeRef::Inline(options)), _) => {
                Some(self.open(options, flags.of_backing(), Some(&name))?)
            }
        };
        if let Some(below) = &below {
            self.connect(&name, below, "backing", Role::Backing)?;
        }
        let options_of_image = image.to_options();
        let built =
            build::qcow2_node(probe, &file, storage, data_file, below, flags, options_of_image)?;
        self.add(name, built, options, above, place)
    }

    /// The node of an image's external data file: the one given, or the file that the image names.
    fn open_data_file(
        &mut self,
        parent: &str,
        given: Option<&NodeRef>,
        probe: &Probe,
        flags: Flags,
    ) -> Result<Option<build::DataFile>> {
        let node = match given {
            Some(NodeRef::Name(name)) => self.find(name).cloned().ok_or_else(|| not_found(name))?,
            Some(NodeRef::Inline(options)) => self.open(options, flags, Some(parent))?,
            None if probe.needs_data_file() => {
                let options = NodeOptions::of_driver(Driver::File {
                    filename: build::full_data_file(probe)?,
                    locking: Locking::Auto,
                    aio: Aio::default(),
                    host_device: false,
                });
                self.open(&options, flags, Some(parent))?
            }
            None => return Ok(None),
        };
        let storage = build::storage_of(&node)?;
        self.connect(parent, &node, "data-file", Role::Data)?;
        Ok(Some((node, storage)))
    }

    /// Notes an image of the chain; one that is met twice is its own backing file.
    fn enter_chain(&mut self, path: &str) -> Result<()> {
        match std::fs::metadata(path) {
            Ok(meta) if !self.chain.insert((meta.dev(), meta.ino())) => Err(loops(path)),
            _ => Ok(()),
        }
    }

    /// Opens the file that an image names as its backing file.
    fn open_backing_file(
        &mut self,
        overlay: &str,
        path: &str,
        format: Option<&str>,
        above: Flags,
    ) -> Result<Arc<Node>> {
        let file = NodeRef::Inline(Box::new(NodeOptions::of_driver(Driver::File {
            filename: path.to_owned(),
            locking: Locking::Auto,
            aio: Aio::default(),
            host_device: false,
        })));
        if let Some(json) = path.strip_prefix("json:") {
            let options = NodeOptions::parse(&text::json(json)?, Source::Json)?;
            return self.open(&options, above.of_backing(), Some(overlay));
        }
        let format = match format {
            Some(format) => format.to_owned(),
            None => crate::probe_format(path)?.to_owned(),
        };
        let driver = match format.as_str() {
            "qcow2" => {
                // Before it is opened: locks would say that another process uses the image.
                if std::fs::metadata(path)
                    .is_ok_and(|meta| self.chain.contains(&(meta.dev(), meta.ino())))
                {
                    return Err(loops(path));
                }
                Driver::Qcow2 { file, backing: Backing::FromImage, image: Default::default() }
            }
            "raw" | "file" | "host_device" => Driver::Raw { file, window: Window::default() },
            other => {
                return Err(Error::NotSupported(format!(
                    "Backing file '{path}' has format '{other}', which is not supported"
                )));
            }
        };
        // A base may be loaded many times over a chain; only a loop may meet a file twice.
        self.open(&NodeOptions::of_driver(driver), above.of_backing(), Some(overlay))
    }
}

/// A file that nobody named to the user says whose backing file it is.
fn of_overlay(error: Error, overlay: &Node) -> Error {
    match error {
        error @ (Error::Open { .. } | Error::NotSupported(_)) => {
            Error::Backing { overlay: overlay.filename(), source: Box::new(error) }
        }
        other => other,
    }
}

fn loops(path: &str) -> Error {
    Error::Invalid(format!("Backing file '{path}' creates an infinite loop."))
}

/// No node has that name, where a device's name would do, too.
pub(crate) fn not_found(name: &str) -> Error {
    Error::Invalid(format!("Cannot find device='{name}' nor node-name='{name}'"))
}

/// No node has that name.
pub(crate) fn no_such_node(name: &str) -> Error {
    Error::Invalid(format!("Cannot find device='' nor node-name='{name}'"))
}
