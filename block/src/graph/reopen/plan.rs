//! Step 1: which nodes get which options, and what is below them then.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::super::State;
use super::super::activity::has_image;
use super::super::build::{self, Flags};
use super::super::open::no_such_node;
use super::super::options::{Backing, Driver, ImageOptions, NodeOptions, NodeRef};
use super::cannot_change;
use crate::node::{Details, Node};
use crate::{Error, Result};

/// Most levels of children that inherit options from one another.
const MAX_DEPTH: usize = 200;

/// What a node is to become.
pub(in crate::graph) struct Plan {
    pub(super) node: Arc<Node>,
    pub(super) options: NodeOptions,
    pub(super) flags: Flags,
    pub(super) file: Option<Arc<Node>>,
    pub(super) data_file: Option<Arc<Node>>,
    pub(super) backing: Option<Arc<Node>>,
}

pub(in crate::graph) struct Planner<'a> {
    pub(super) state: &'a State,
    pub(super) plans: BTreeMap<String, Plan>,
}

impl<'a> Planner<'a> {
    /// Plans for nodes to become inactive, or active, and nothing else.
    pub(in crate::graph) fn of_activity(
        state: &'a State,
        nodes: &[Arc<Node>],
        inactive: bool,
    ) -> Result<BTreeMap<String, Plan>> {
        let mut planner = Self { state, plans: BTreeMap::new() };
        for node in nodes.iter().filter(|node| has_image(node)) {
            let details = node.details();
            let flags = Flags { inactive, ..details.flags };
            planner.options(node, &details, flags.read_only, flags)?;
        }
        planner.finish()
    }

    fn find(&self, name: &str) -> Option<Arc<Node>> {
        self.state.get(name).cloned()
    }

    pub(super) fn finish(mut self) -> Result<BTreeMap<String, Plan>> {
        self.add_formats_of_files()?;
        Ok(self.plans)
    }

    /// The options that a node has, but for `read-only`.
    pub(super) fn access(&mut self, node: &Arc<Node>, read_only: bool) -> Result<()> {
        let details = node.details();
        self.options(node, &details, read_only, details.flags)
    }

    fn options(
        &mut self,
        node: &Arc<Node>,
        details: &Details,
        read_only: bool,
        flags: Flags,
    ) -> Result<()> {
        let Some(mut options) = details.options.clone() else {
            return Err(Error::NotSupported(format!("Node '{}' cannot be reopened", node.name())));
        };
        options.read_only = Some(read_only);
        if let Driver::Qcow2 { backing, .. } = &mut options.driver {
            // Whatever is below it now.
            *backing = Backing::FromImage;
        }
        self.plan_unchecked(node, options, flags, 0)
    }

    /// An entry of the list.
    pub(super) fn root(&mut self, options: &NodeOptions) -> Result<()> {
        let Some(name) = &options.node_name else {
            return Err(Error::Invalid("node-name not specified".to_owned()));
        };
        let Some(node) = self.find(name) else {
            return Err(Error::Invalid(format!("Failed to find node with node-name='{name}'")));
        };
        self.plan(&node, options.clone(), Flags::default(), 0)
    }

    fn plan(
        &mut self,
        node: &Arc<Node>,
        options: NodeOptions,
        inherited: Flags,
        depth: usize,
    ) -> Result<()> {
        let details = node.details();
        let names_backing = match &options.driver {
            Driver::Qcow2 { backing, .. } => *backing != Backing::FromImage,
            _ => false,
        };
        let has_backing = details.backing.is_some() || details.full_backing.is_some();
        // One that was opened with the node above it, and is reopened with it, keeps what it has.
        if has_backing && !names_backing && !details.implicit {
            return Err(Error::Invalid(format!("backing is missing for '{}'", node.name())));
        }
        self.plan_unchecked(node, options, inherited, depth)
    }

    /// As [`Planner::plan`]; without a word of what is below, it stays there.
    fn plan_unchecked(
        &mut self,
        node: &Arc<Node>,
        options: NodeOptions,
        inherited: Flags,
        depth: usize,
    ) -> Result<()> {
        let details = node.details();
        let Some(old) = details.options.as_ref().filter(|_| depth < MAX_DEPTH) else {
            return Err(Error::NotSupported(format!("Node '{}' cannot be reopened", node.name())));
        };
        if options.driver.name() != old.driver.name() {
            return cannot_change("driver");
        }
        if options.node_name.as_deref().is_some_and(|name| name != node.name()) {
            return cannot_change("node-name");
        }
        let flags = inherited.with(&options)?;
        if flags.force_share != details.flags.force_share {
            return cannot_change("force-share");
        }
        let (mut file, mut data_file, mut backing) = (None, None, None);
        match (&options.driver, &old.driver) {
            (
                Driver::File { filename, locking, .. },
                Driver::File { filename: old_filename, locking: old_locking, .. },
            ) => {
                if filename != old_filename {
                    return cannot_change("filename");
                }
                if locking != old_locking {
                    return cannot_change("locking");
                }
            }
            (Driver::Raw { file: wanted, .. }, _) => {
                file = Some(self.file(node, &details, wanted, flags, depth)?);
            }
            (Driver::Compress { .. }, _) => {
                return Err(Error::NotSupported(format!(
                    "Node '{}' cannot be reopened: it is a compress filter",
                    node.name()
                )));
            }
            (Driver::Qcow2 { file: wanted, backing: below, image }, _) => {
                data_file = self.data_file(node, &details, image, flags, depth)?;
                backing = self.backing(node, &details, below, flags, depth)?;
                file = Some(self.file(node, &details, wanted, flags, depth)?);
            }
            _ => return cannot_change("driver"),
        }
        let plan = Plan { node: node.clone(), options, flags, file, data_file, backing };
        self.plans.insert(node.name().to_owned(), plan);
        Ok(())
    }

    fn file(
        &mut self,
        node: &Arc<Node>,
        details: &Details,
        wanted: &NodeRef,
        flags: Flags,
        depth: usize,
    ) -> Result<Arc<Node>> {
        let child = self.child(node, details.file.as_ref(), "file", wanted, flags, depth)?;
        build::storage_of(&child)?;
        Ok(child)
    }

    /// Without a word the one there is stays, and follows the image where it was opened with it.
    fn data_file(
        &mut self,
        node: &Arc<Node>,
        details: &Details,
        image: &ImageOptions,
        flags: Flags,
        depth: usize,
    ) -> Result<Option<Arc<Node>>> {
        let current = details.data_file.as_ref();
        let there = current.map(|node| NodeRef::Name(node.name().to_owned()));
        let Some(wanted) = image.data_file.clone().or(there) else { return Ok(None) };
        let child = self.child(node, current, "data-file", &wanted, flags, depth)?;
        build::storage_of(&child)?;
        Ok(Some(child))
    }

    fn backing(
        &mut self,
        node: &Arc<Node>,
        details: &Details,
        wanted: &Backing,
        flags: Flags,
        depth: usize,
    ) -> Result<Option<Arc<Node>>> {
        let current = details.backing.as_ref();
        match wanted {
            Backing::None => Ok(None),
            Backing::Node(wanted) => {
                let flags = flags.of_backing();
                self.child(node, current, "backing", wanted, flags, depth).map(Some)
            }
            Backing::FromImage => Ok(current.cloned()),
        }
    }

    /// A child: another node, or the one there is. That one gets options only if it was opened as a
    /// part of `node`: nodes with a life of their own are reopened by their own names.
    fn child(
        &mut self,
        node: &Arc<Node>,
        current: Option<&Arc<Node>>,
        label: &str,
        wanted: &NodeRef,
        flags: Flags,
        depth: usize,
    ) -> Result<Arc<Node>> {
        let inherits =
            |child: &Arc<Node>| child.details().inherits_from.as_deref() == Some(node.name());
        match wanted {
            NodeRef::Name(name) => {
                let child = self.find(name).ok_or_else(|| no_such_node(name))?;
                let same = current.is_some_and(|current| Arc::ptr_eq(current, &child));
                if same && inherits(&child) && !self.plans.contains_key(child.name()) {
                    let options = child.details().options.clone();
                    if let Some(options) = options {
                        self.plan(&child, options, flags, depth + 1)?;
                    }
                }
                Ok(child)
            }
            NodeRef::Inline(options) => match current.filter(|child| inherits(child)) {
                Some(child) => {
                    self.plan(child, (**options).clone(), flags, depth + 1)?;
                    Ok(child.clone())
                }
                None => cannot_change(&format!("{label}.driver")),
            },
        }
    }

    /// A format holds the storage of its file: where the file's node gets another, the format is
    /// opened again too, with the options it has.
    fn add_formats_of_files(&mut self) -> Result<()> {
        for node in &self.state.nodes {
            let details = node.details();
            let mut files = details.file.iter().chain(&details.data_file);
            if self.plans.contains_key(node.name())
                || matches!(
                    details.options,
                    Some(NodeOptions { driver: Driver::Compress { .. }, .. })
                )
                || !files.any(|file| self.plans.contains_key(file.name()))
            {
                continue;
            }
            let Some(options) = details.options.clone() else { continue };
            let plan = Plan {
                node: node.clone(),
                options,
                flags: details.flags,
                file: details.file.clone(),
                data_file: details.data_file.clone(),
                backing: details.backing.clone(),
            };
            self.plans.insert(node.name().to_owned(), plan);
        }
        Ok(())
    }
}
