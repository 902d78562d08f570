//! block-stream: a node takes over what is in the images below it, so that these are no longer needed.
//!
//! ```text
//!   top ──> middle ──> bottom ──> base        becomes        top ──> base
//! ```
//!
//! **Order.** `run` copies each range by [`Format::copy_up`], which never undoes a write beside it. `commit`
//! makes all of it durable, then the image names its new backing file, then the node in memory reads
//! from it. A crash before the name is changed leaves the old chain, after it the new one; both read
//! the same.
//!
//! [`Format::copy_up`]: crate::Format::copy_up

use std::sync::Arc;

use super::{Control, OnError, Operation, Side, walk};
use crate::graph::chain::find_image;
use crate::graph::{Attachment, Claim, Graph, Step, User, no_such_node};
use crate::{Error, Node, Perm, Result};

/// The members of QMP's block-stream that are about the images.
#[derive(Debug, Clone, Default)]
pub struct StreamOptions {
    /// The node that takes over.
    pub device: String,
    /// What stays below, by the name of its file.
    pub base: Option<String>,
    /// What stays below, by the name of its node.
    pub base_node: Option<String>,
    /// The last node that is taken over.
    pub bottom: Option<String>,
    /// What the image is to name as its backing file; by default that of `base`.
    pub backing_file: Option<String>,
    /// What is done about failed reads and writes.
    pub on_error: OnError,
}

impl StreamOptions {
    /// Refuses two names of what stays below.
    fn check_alone(&self) -> Result<()> {
        match (&self.base, &self.base_node, &self.bottom) {
            (Some(_), Some(_), _) => together("base", "base-node"),
            (Some(_), _, Some(_)) => together("base", "bottom"),
            (_, Some(_), Some(_)) => together("bottom", "base-node"),
            _ => Ok(()),
        }
    }
}

/// A block-stream operation; the module has its order.
pub struct Stream {
    graph: Graph,
    top: String,
    /// The last node that is taken over; what is below it then is the base.
    bottom: String,
    /// How many images the data is taken from, that of the top included.
    images: u32,
    backing_file: Option<String>,
    on_error: OnError,
    user: Option<Attachment>,
    claim: Option<Claim>,
    was_read_only: bool,
}

impl Stream {
    /// Finds the images and claims them.
    ///
    /// # Errors
    /// With QEMU's texts; besides, a node with internal snapshots is refused: these would lose what
    /// they read from below.
    pub fn new(graph: &Graph, options: &StreamOptions) -> Result<Self> {
        options.check_alone()?;
        let device = options.device.as_str();
        let chain = graph.chain(device)?;
        let last = last_streamed(graph, &chain, options)?;
        let names: Vec<&str> = chain[..=last].iter().map(|node| node.name()).collect();
        for name in &names {
            graph.check_unclaimed(name)?;
        }
        let whole = last + 1 == chain.len();
        if whole && options.backing_file.is_some() {
            return Err(Error::Invalid(
                "backing file specified, but streaming the entire chain".to_owned(),
            ));
        }
        let claim = graph.claim(&names, "stream")?;
        let top = &chain[0];
        let mut stream = Self {
            graph: graph.clone(),
            top: device.to_owned(),
            bottom: chain[last].name().to_owned(),
            images: u32::try_from(last + 1).unwrap_or(u32::MAX),
            backing_file: options.backing_file.clone(),
            on_error: options.on_error,
            user: None,
            claim: Some(claim),
            was_read_only: top.read_only(),
        };
        if stream.images > 1 {
            check_snapshots(top)?;
        }
        if stream.was_read_only && top.backing().is_some() {
            graph.set_read_only(device, false)?;
        }
        let used = match top.backing() {
            Some(_) => Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED,
            None => Perm::CONSISTENT_READ,
        };
        stream.user = Some(graph.attach(device, User::unnamed(used, Perm::all()))?);
        Ok(stream)
    }

    fn copy(&self, top: &Node, control: &Control, at: u64, len: u64) -> Result<()> {
        while let Err(error) = top.access().copy_up(at, len) {
            control.failed(self.on_error, Side::Source, error)?;
        }
        Ok(())
    }

    /// The end, however it came.
    fn release(&mut self) {
        self.user = None;
        self.claim = None;
        if self.was_read_only
            && let Err(error) = self.graph.set_read_only(&self.top, true)
        {
            tracing::warn!(node = self.top, "takes writes from now on: {error}");
        }
        self.was_read_only = false;
    }
}

fn refuse<T>(text: String) -> Result<T> {
    Err(Error::Invalid(text))
}

fn together<T>(a: &str, b: &str) -> Result<T> {
    refuse(format!("'{a}' and '{b}' cannot be specified at the same time"))
}

/// The place in the chain of the last node that is taken over.
fn last_streamed(graph: &Graph, chain: &[Arc<Node>], options: &StreamOptions) -> Result<usize> {
    let StreamOptions { device, base, base_node, bottom, .. } = options;
    let place = |name: &str| {
        if graph.get(name).is_none() {
            return Err(no_such_node(name));
        }
        Ok(chain.iter().position(|node| node.name() == name))
    };
    match (base, base_node, bottom) {
        (None, None, None) => Ok(chain.len() - 1),
        (Some(base), ..) => match find_image(chain, base) {
            Some(at) => Ok(at - 1),
            None => refuse(format!("Can't find '{base}' in the backing chain")),
        },
        (_, Some(base), _) => match place(base)? {
            Some(at) if at > 0 => Ok(at - 1),
            _ => refuse(format!("Node '{base}' is not a backing image of '{device}'")),
        },
        (.., Some(bottom)) => match place(bottom)? {
            Some(at) => Ok(at),
            None => refuse(format!("Node '{bottom}' is not in a chain starting from '{device}'")),
        },
    }
}

fn check_snapshots(top: &Node) -> Result<()> {
    if top.snapshots().is_empty() {
        return Ok(());
    }
    Err(Error::Invalid(format!(
        "Node '{}' has internal snapshots, which would lose what they read from the images below; delete them first",
        top.name()
    )))
}

impl Operation for Stream {
    fn run(&mut self, control: &Control) -> Result<()> {
        if self.images == 1 {
            return Ok(());
        }
        let Some(top) = self.user.as_ref().map(Attachment::node) else { return Ok(()) };
        // Not what is its own.
        let depths = 2..=self.images;
        walk::pieces(&top, &depths, (control, self.on_error), |piece| {
            self.copy(&top, control, piece.at, piece.len)
        })
    }

    fn commit(&mut self) -> Result<()> {
        let graph = self.graph.clone();
        let top = graph.chain(&self.top)?.swap_remove(0);
        let Some(old) = top.backing() else {
            self.release();
            return Ok(());
        };
        if self.images > 1 {
            // One may have been made meanwhile.
            check_snapshots(&top)?;
        }
        top.flush()?;
        let bottom = graph.chain(&self.bottom)?.swap_remove(0);
        let base = if self.images == 1 { Some(old) } else { bottom.backing() };
        let named = base.as_ref().map(|base| {
            let name = self.backing_file.clone();
            (name.unwrap_or_else(|| base.name_for(&top)), base.driver())
        });
        let before = top.recorded_backing();
        drop((top, bottom));
        graph.record_backing(
            &self.top,
            named.as_ref().map(|(name, format)| (name.as_str(), *format)),
        )?;
        let backing = base.as_ref().map(|base| base.name().to_owned());
        let step = Step::Backing { node: self.top.clone(), backing };
        if let Err(error) = graph.change(&[step]) {
            let before = before.as_ref().map(|(name, format)| (name.as_str(), format.as_str()));
            graph.record_backing(&self.top, before)?;
            return Err(error);
        }
        self.release();
        Ok(())
    }

    fn abort(&mut self) {
        self.release();
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.release();
    }
}
