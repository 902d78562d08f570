//! info block.

use serde_json::Value;

use super::super::{Controller, throttle};
use crate::image::info::lines;
use crate::image::snapshots::table;

impl Controller {
    /// The machine's disks; with `-n` the nodes; with `-v` their images, too; with a name that one, by the
    /// name of its node or device.
    pub(super) fn info_block(&self, words: &[String]) -> String {
        let (mut nodes, mut verbose) = (false, false);
        let mut wanted = None;
        for word in words {
            match word.as_str() {
                "-n" => nodes = true,
                "-v" => verbose = true,
                option if option.starts_with('-') => {
                    return format!(
                        "block: unsupported option {option}\n\
                         Try \"help info block\" for more information\n"
                    );
                }
                name => wanted = Some(name),
            }
        }
        let devices = match self.block_devices() {
            Ok(devices) => devices,
            Err(error) => return format!("Error: {}\n", error.desc),
        };
        let mut blocks: Vec<String> = Vec::new();
        if !nodes {
            let all = devices.as_array().map(Vec::as_slice).unwrap_or_default();
            let is_wanted = |device: &&Value| {
                wanted.is_none_or(|name| {
                    device["inserted"]["node-name"] == name || device["qdev"] == name
                })
            };
            let describe = |device: &Value| {
                let node = &device["inserted"];
                block(node, Some(device)) + &self.images(node, verbose)
            };
            blocks.extend(all.iter().filter(is_wanted).map(describe));
        }
        if nodes || (wanted.is_some() && blocks.is_empty()) {
            for node in self.blocks.graph().list() {
                if wanted.is_none_or(|name| node.name() == name)
                    && let Ok(info) = node.info(false)
                    && let Ok(info) = serde_json::to_value(info)
                {
                    blocks.push(block(&info, None) + &self.images(&info, verbose));
                }
            }
        }
        blocks.join("\n")
    }

    /// With `-v`: what `qemu-img info` tells of the images of a node, one behind the other.
    fn images(&self, info: &Value, verbose: bool) -> String {
        if !verbose {
            return String::new();
        }
        let mut out = "\nImages:\n".to_owned();
        let mut node = info["node-name"].as_str().and_then(|name| self.blocks.graph().get(name));
        let mut image = &info["image"];
        while image.is_object() {
            let snapshots = node.as_ref().map_or(String::new(), |node| table(&node.snapshots()));
            for line in lines(image, &snapshots) {
                out.push_str(&line);
                out.push('\n');
            }
            node = node.and_then(|node| node.backing());
            image = &image["backing-image"];
        }
        out
    }
}

/// A node, and the device that it is the disk of.
fn block(node: &Value, device: Option<&Value>) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let read_only = if node["ro"] == true { ", read-only" } else { "" };
    let mut out = format!(
        "{}: {} ({}{read_only})\n",
        text(&node["node-name"]),
        text(&node["file"]),
        text(&node["drv"])
    );
    let mut row = |name: &str, value: String| {
        out.push_str(&format!("    {:<18}{value}\n", format!("{name}:")));
    };
    if let Some(device) = device {
        row("Attached to", text(&device["qdev"]));
        if device["io-status"].as_str().is_some_and(|status| status != "ok") {
            row("I/O status", text(&device["io-status"]));
        }
    }
    let cache = &node["cache"];
    let mode = if cache["writeback"] == true { "writeback" } else { "writethrough" };
    let direct = if cache["direct"] == true { ", direct" } else { "" };
    let no_flush = if cache["no-flush"] == true { ", ignore flushes" } else { "" };
    row("Cache mode", format!("{mode}{direct}{no_flush}"));
    if let Some(backing) = node["backing_file"].as_str() {
        let depth = node["backing_file_depth"].as_i64().unwrap_or(0);
        row("Backing file", format!("{backing} (chain depth: {depth})"));
    }
    if let Some(limits) = throttle::row(node) {
        row("I/O throttling", limits);
    }
    if node["detect_zeroes"].as_str().is_some_and(|mode| mode != "off") {
        row("Detect zeroes", text(&node["detect_zeroes"]));
    }
    out
}
