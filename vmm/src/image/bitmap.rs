//! `tardigrade image bitmap`: the dirty bitmaps that an image stores. They are changed in memory and
//! stored when the image is closed, in the order that `block`'s bitmaps have.

use block::bitmap::NewBitmap;
use block::{Graph, Node};

use super::text::parse_size;
use super::{Access, Error, Result, of, open_in};
use crate::cli::image::{BitmapArgs, BitmapCommand};

pub(super) fn run(command: &BitmapCommand) -> Result<u8> {
    match command {
        BitmapCommand::Add { granularity, disabled, target } => {
            let granularity = granularity.as_deref().map(bytes).transpose()?;
            let new = NewBitmap {
                name: &target.bitmap,
                granularity,
                persistent: true,
                disabled: *disabled,
            };
            change(target, "add", |_, node| node.add_bitmap(&new).map_err(Error::from_block))?;
        }
        BitmapCommand::Remove(target) => simple(target, "remove", Node::remove_bitmap)?,
        BitmapCommand::Clear(target) => simple(target, "clear", Node::clear_bitmap)?,
        BitmapCommand::Enable(target) => {
            simple(target, "enable", |node, name| node.enable_bitmap(name, true))?;
        }
        BitmapCommand::Disable(target) => {
            simple(target, "disable", |node, name| node.enable_bitmap(name, false))?;
        }
        BitmapCommand::Merge { source_file, source_format, target, source } => {
            change(target, "merge", |graph, node| {
                let other = match source_file {
                    None => node.bitmaps().get(source),
                    Some(file) => {
                        let access = Access { alone: true, ..Access::default() };
                        let format = source_format.as_deref();
                        let (_user, other) = open_in(graph, "source", file, format, access)?;
                        other.bitmaps().get(source)
                    }
                };
                let other = other.map_err(Error::from_block)?;
                node.merge_bitmaps(&target.bitmap, &[other]).map_err(Error::from_block)
            })?;
        }
    }
    Ok(0)
}

fn bytes(text: &str) -> Result<u64> {
    parse_size(text).ok_or_else(|| Error::Usage(format!("Invalid granularity specified: '{text}'")))
}

fn simple(
    target: &BitmapArgs,
    what: &str,
    work: impl FnOnce(&Node, &str) -> block::Result<()>,
) -> Result<()> {
    change(target, what, |_, node| work(node, &target.bitmap).map_err(Error::from_block))
}

/// Does something with the bitmaps of an image and stores them.
fn change(
    target: &BitmapArgs,
    what: &str,
    work: impl FnOnce(&Graph, &Node) -> Result<()>,
) -> Result<()> {
    let graph = Graph::new();
    // Its backing file has no part in this.
    let access = Access { writable: true, alone: true, ..Access::default() };
    let (_user, node) = open_in(&graph, "image", &target.file, target.format.as_deref(), access)?;
    work(&graph, &node).map_err(|error| {
        let file = target.file.display();
        Error::Usage(format!(
            "{file}: Operation {what} on bitmap '{}' failed: {error}",
            target.bitmap
        ))
    })?;
    graph.close_images().map_err(of(&target.file))
}
