//! File names of images: the files that they stand for, and how QMP shows them.

use std::path::Path;
use std::sync::Arc;

use super::super::json;
use super::super::options::Window;
use crate::node::{Details, Node};
use crate::qcow2::Probe;
use crate::{Error, Result};

const LONGEST_NAME: usize = 4095;
const DOTS: &str = "...";

/// The path of the external data file that the image names: as it is there, so a relative one is
/// relative to the working directory, as in QEMU.
pub(in crate::graph) fn full_data_file(probe: &Probe) -> Result<String> {
    match probe.data_file() {
        Some(name) => backing_path("", &name),
        None => Err(Error::Invalid("'data-file' is required for this image".to_owned())),
    }
}

/// The backing file's path that the image names: relative to the directory of the overlay.
pub(in crate::graph) fn full_backing(probe: &Probe, file: &Arc<Node>) -> Result<Option<String>> {
    probe.backing_file().map(|name| backing_path(&file.filename(), name)).transpose()
}

/// Where the backing file is that the image at `overlay` names `backing`: a path relative to the
/// overlay's directory unless it is absolute, or `json:` and a node's options as they are.
///
/// # Errors
/// The name has a protocol that is not done here.
pub fn backing_path(overlay: &str, backing: &str) -> Result<String> {
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

/// The name that QMP shows for a qcow2 node once it is over `backing`.
pub(in crate::graph) fn name_over(details: &Details, backing: Option<&Node>) -> String {
    let overridden = is_overridden(backing, details.full_backing.as_deref());
    let file = details.file.as_ref().map(|file| file.filename()).unwrap_or_default();
    shown_name(&file, overridden, backing)
}

/// Whether a node is over another image than the one that it names.
pub(super) fn is_overridden(backing: Option<&Node>, named: Option<&str>) -> bool {
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
pub(in crate::graph) fn full_name(details: &Details, name: &str) -> Result<String> {
    let file = details.file.as_ref().map(|file| file.filename()).unwrap_or_default();
    backing_path(&file, name)
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
pub(super) fn shown_name(file: &str, overridden: bool, backing: Option<&Node>) -> String {
    if !overridden {
        return file.to_owned();
    }
    let all = serde_json::json!({
        "backing": backing.map(as_options),
        "driver": "qcow2",
        "file": {"driver": "file", "filename": file},
    });
    cut(format!("json:{}", json::spaced(&all)))
}

/// A name of at most 4095 bytes, as in QEMU: each overlay's has that of the image below in it.
fn cut(mut name: String) -> String {
    if name.len() > LONGEST_NAME {
        name.truncate(name.floor_char_boundary(LONGEST_NAME - DOTS.len()));
        name += DOTS;
    }
    name
}

pub(super) fn window_name(file: &Node, window: Window) -> String {
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
    format!("json:{}", json::spaced(&all))
}
