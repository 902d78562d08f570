//! `tardigrade image info`

use std::collections::HashSet;
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::snapshots::table;
use super::text::size;
use super::{Access, Error, Result, host_file, node_options, of, open, say, say_json};
use crate::cli::image::{InfoArgs, Output};

pub(super) fn run(args: &InfoArgs) -> Result<u8> {
    let mut chain = Vec::new();
    let mut seen = HashSet::new();
    let mut next = Some((args.file.clone(), args.format.clone()));
    while let Some((file, format)) = next.take() {
        let path = host_file(&file, &node_options(&file, format.as_deref())?);
        if let Ok(meta) = std::fs::metadata(&path)
            && !seen.insert((meta.dev(), meta.ino()))
        {
            let file = file.display();
            return Err(Error::Usage(format!("Backing file '{file}' creates an infinite loop.")));
        }
        let one = inspect(&file, format.as_deref(), args.force_share)?;
        if args.backing_chain {
            let text = |name: &str| one.json[name].as_str().map(str::to_owned);
            next = text("full-backing-filename")
                .map(|name| (PathBuf::from(name), text("backing-filename-format")));
        }
        chain.push(one);
    }
    match args.output {
        Output::Human => {
            let texts: Vec<_> = chain.iter().map(human).collect();
            say(&texts.join("\n"))?;
        }
        Output::Json => {
            let mut all: Vec<_> = chain.into_iter().map(|one| one.json).collect();
            let value = if args.backing_chain { Value::Array(all) } else { all.remove(0) };
            say_json(&value)?;
        }
    }
    Ok(0)
}

/// One image.
struct Image {
    /// QAPI's `BlockNodeInfo` / `ImageInfo`.
    json: Value,
    snapshots: String,
}

fn inspect(file: &Path, format: Option<&str>, force_share: bool) -> Result<Image> {
    let access = Access { force_share, alone: true, ..Access::default() };
    let (_user, node) = open(file, format, access)?;
    let info = node.info(true).map_err(of(file))?;
    let options = node_options(file, format)?;
    let host = host_file(file, &options);
    // A part of a file has no other name than its options.
    let whole = !options.contains_key("offset") && !options.contains_key("size");
    let name = if whole { &host } else { file }.display().to_string();
    let mut json = serde_json::to_value(&info.image).map_err(|e| Error::Usage(e.to_string()))?;
    // The node was opened without its backing file, which QMP shows in the name.
    json["filename"] = json!(name);
    // Not what stat tells, which is nothing of a block device.
    let length = File::open(&host).and_then(|mut f| f.seek(SeekFrom::End(0)));
    let length = length.map_err(Error::Output)?;
    json["children"] = json!([{
        "name": "file",
        "info": {
            "children": [],
            "virtual-size": length.next_multiple_of(512),
            "filename": host.display().to_string(),
            "format": "file",
            "actual-size": json["actual-size"],
            "format-specific": {"type": "file", "data": {}},
            "dirty-flag": false,
        },
    }]);
    Ok(Image { json, snapshots: table(&node.snapshots()) })
}

fn human(image: &Image) -> String {
    let json = &image.json;
    let number = |value: &Value| value.as_u64().unwrap_or(0);
    let mut out = lines(json, &image.snapshots);
    let child = &json["children"][0]["info"];
    let length = number(&child["virtual-size"]);
    out.push("Child node '/file':".to_owned());
    out.push(format!("    filename: {}", child["filename"].as_str().unwrap_or_default()));
    out.push("    protocol type: file".to_owned());
    out.push(format!("    file length: {} ({length} bytes)", size(length)));
    out.push(format!("    disk size: {}", size(number(&child["actual-size"]))));
    out.push(String::new());
    out.join("\n")
}

/// QAPI's `BlockNodeInfo` for people, and the table of its snapshots.
pub(crate) fn lines(json: &Value, snapshots: &str) -> Vec<String> {
    let text = |name: &str| json[name].as_str().unwrap_or_default();
    let number = |value: &Value| value.as_u64().unwrap_or(0);
    let mut out = Vec::new();
    out.push(format!("image: {}", text("filename")));
    out.push(format!("file format: {}", text("format")));
    let virtual_size = number(&json["virtual-size"]);
    out.push(format!("virtual size: {} ({virtual_size} bytes)", size(virtual_size)));
    out.push(format!("disk size: {}", size(number(&json["actual-size"]))));
    if let Some(cluster) = json["cluster-size"].as_u64() {
        out.push(format!("cluster_size: {cluster}"));
    }
    if json["dirty-flag"] == json!(true) {
        out.push("cleanly shut down: no".to_owned());
    }
    if let Some(name) = json["backing-filename"].as_str() {
        let full = json["full-backing-filename"].as_str().filter(|full| *full != name);
        let actual = full.map_or(String::new(), |full| format!(" (actual path: {full})"));
        out.push(format!("backing file: {name}{actual}"));
    }
    if let Some(format) = json["backing-filename-format"].as_str() {
        out.push(format!("backing file format: {format}"));
    }
    if !snapshots.is_empty() {
        out.push(snapshots.trim_end().to_owned());
    }
    if let Some(data) = json["format-specific"]["data"].as_object().filter(|d| !d.is_empty()) {
        out.push("Format specific information:".to_owned());
        for name in specific_order(data) {
            print_value(&mut out, 4, &name.replace('-', " "), &data[&name]);
        }
    }
    out
}

/// The members of the format's information in the order of QAPI's type; others after them.
fn specific_order(data: &serde_json::Map<String, Value>) -> Vec<String> {
    const ORDER: [&str; 9] = [
        "compat",
        "compression-type",
        "lazy-refcounts",
        "bitmaps",
        "refcount-bits",
        "data-file",
        "data-file-raw",
        "corrupt",
        "extended-l2",
    ];
    let known =
        ORDER.iter().filter(|name| data.contains_key(**name)).map(|name| (*name).to_owned());
    let rest = data.keys().filter(|name| !ORDER.contains(&name.as_str())).cloned();
    known.chain(rest).collect()
}

/// A value as qemu-img prints it: lists and objects below their name, indented.
fn print_value(out: &mut Vec<String>, indent: usize, name: &str, value: &Value) {
    let pad = " ".repeat(indent);
    match value {
        Value::Array(items) => {
            out.push(format!("{pad}{name}:"));
            for (index, item) in items.iter().enumerate() {
                print_value(out, indent + 4, &format!("[{index}]"), item);
            }
        }
        Value::Object(members) => {
            out.push(format!("{pad}{name}:"));
            let mut names: Vec<_> = members.keys().collect();
            // QAPI's Qcow2BitmapInfo has the flags before the granularity.
            names.sort_by_key(|n| ["flags", "name", "granularity"].iter().position(|k| k == n));
            for member in names {
                print_value(out, indent + 4, &member.replace('-', " "), &members[member]);
            }
        }
        Value::String(text) => out.push(format!("{pad}{name}: {text}")),
        other => out.push(format!("{pad}{name}: {other}")),
    }
}
