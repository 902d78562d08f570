//! block-commit: what is in the upper images of a chain goes into a lower one, and the upper ones are
//! left out of it.

use std::sync::Arc;

use super::{Control, MirrorHandle, OnError, Operation};
use crate::graph::chain::find_image;
use crate::graph::{Graph, no_such_node};
use crate::{Error, Node, Result};

mod active;
mod middle;

use active::Active;
use middle::Middle;

/// The members of QMP's block-commit that are about the images.
#[derive(Debug, Clone, Default)]
pub struct CommitOptions {
    /// The node at the top of the chain.
    pub device: String,
    /// The highest image that is left out, by the name of its file; by default that of `device`.
    pub top: Option<String>,
    /// The same by the name of its node.
    pub top_node: Option<String>,
    /// The image that gets the data, by the name of its file; by default the lowest.
    pub base: Option<String>,
    /// The same by the name of its node.
    pub base_node: Option<String>,
    /// What the overlay of the top is to name as its backing file; by default that of the base.
    pub backing_file: Option<String>,
    /// What is done about failed reads and writes.
    pub on_error: OnError,
}

/// A commit, of images that are written to (which is ready, and completes when it is told to) or not.
pub struct Commit {
    kind: Kind,
}

enum Kind {
    Middle(Middle),
    Active(Box<Active>),
}

impl Commit {
    /// Finds the images and claims them.
    ///
    /// # Errors
    /// With QEMU's texts.
    pub fn new(graph: &Graph, options: &CommitOptions) -> Result<Self> {
        let CommitOptions { device, backing_file, on_error, .. } = options;
        let chain = graph
            .chain(device)
            .map_err(|_| Error::Invalid(format!("Device '{device}' not found")))?;
        graph.check_root(device)?;
        graph.check_unclaimed(device)?;
        let top = find_top(graph, &chain, options)?;
        let chain = &chain[top..];
        let base = find_base(graph, chain, options)?;
        let names: Vec<&str> = chain[..=base].iter().map(|node| node.name()).collect();
        for name in &names {
            graph.check_unclaimed(name)?;
        }
        if base == 0 {
            return Err(Error::Invalid("cannot commit an image into itself".to_owned()));
        }
        // As in QEMU the uppermost image counts as written to: somebody may come, and clients wait for
        // the job to be ready.
        if top == 0 || graph.is_written(names[0])? {
            if backing_file.is_some() {
                return Err(Error::Invalid(if top == 0 {
                    "'backing-file' specified, but 'top' is the active layer".to_owned()
                } else {
                    "'backing-file' specified, but 'top' has a writer on it".to_owned()
                }));
            }
            let active = Active::new(graph, &names, *on_error)?;
            return Ok(Self { kind: Kind::Active(Box::new(active)) });
        }
        let middle = Middle::new(graph, &names, backing_file.clone(), *on_error)?;
        Ok(Self { kind: Kind::Middle(middle) })
    }
}

impl Commit {
    /// Whether it is ready once, and ends when it is told to.
    pub fn is_active(&self) -> bool {
        self.handle().is_some()
    }

    /// For those who watch one that is ready once.
    pub fn handle(&self) -> Option<MirrorHandle> {
        match &self.kind {
            Kind::Middle(_) => None,
            Kind::Active(active) => Some(active.handle()),
        }
    }

    fn operation(&mut self) -> &mut dyn Operation {
        match &mut self.kind {
            Kind::Middle(middle) => middle,
            Kind::Active(active) => &mut **active,
        }
    }
}

fn refuse<T>(text: String) -> Result<T> {
    Err(Error::Invalid(text))
}

/// The place of a node in a chain.
fn place(graph: &Graph, chain: &[Arc<Node>], name: &str) -> Result<usize> {
    if graph.get(name).is_none() {
        return Err(no_such_node(name));
    }
    match chain.iter().position(|node| node.name() == name) {
        Some(at) => Ok(at),
        None => refuse(format!("'{name}' is not in this backing file chain")),
    }
}

fn find_top(graph: &Graph, chain: &[Arc<Node>], options: &CommitOptions) -> Result<usize> {
    match (&options.top, &options.top_node) {
        (Some(_), Some(_)) => refuse("'top-node' and 'top' are mutually exclusive".to_owned()),
        (None, None) => Ok(0),
        (None, Some(name)) => place(graph, chain, name),
        (Some(file), None) if chain[0].filename() == *file => Ok(0),
        (Some(file), None) => match find_image(chain, file) {
            Some(at) => Ok(at),
            None => refuse(format!("Top image file {file} not found")),
        },
    }
}

fn find_base(graph: &Graph, chain: &[Arc<Node>], options: &CommitOptions) -> Result<usize> {
    match (&options.base, &options.base_node) {
        (Some(_), Some(_)) => refuse("'base-node' and 'base' are mutually exclusive".to_owned()),
        (None, None) => Ok(chain.len() - 1),
        (None, Some(name)) => place(graph, chain, name),
        (Some(file), None) => match find_image(chain, file) {
            Some(at) => Ok(at),
            None => refuse(format!("Can't find '{file}' in the backing chain")),
        },
    }
}

impl Operation for Commit {
    fn run(&mut self, control: &Control) -> Result<()> {
        self.operation().run(control)
    }

    fn commit(&mut self) -> Result<()> {
        self.operation().commit()
    }

    fn abort(&mut self) {
        self.operation().abort();
    }
}
