//! info block.

use serde_json::Value;

use super::super::{Controller, throttle};

impl Controller {
    /// The machine's disks; with `-n` the nodes; with a name that one, by the name of its node or
    /// device.
    pub(super) fn info_block(&self, words: &[String]) -> String {
        let mut nodes = false;
        let mut wanted = None;
        for word in words {
            match word.as_str() {
                "-n" => nodes = true,
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
            blocks.extend(all.iter().filter(is_wanted).map(|d| block(&d["inserted"], Some(d))));
        }
        if nodes || (wanted.is_some() && blocks.is_empty()) {
            for node in self.blocks.graph().list() {
                if wanted.is_none_or(|name| node.name() == name)
                    && let Ok(info) = node.info(false)
                    && let Ok(info) = serde_json::to_value(info)
                {
                    blocks.push(block(&info, None));
                }
            }
        }
        blocks.join("\n")
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
