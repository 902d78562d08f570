//! `BlockdevOptions` of QMP, read from JSON or from the command line's `key=value` text.
//!
//! Every member is looked at: one that does not exist is an error, and so is one that exists in
//! QEMU but is not done here. None is ignored.

use std::time::Duration;

use serde_json::{Map, Value};

use crate::qcow2::{self, OverlapCheck, PassDiscard};
use crate::storage::{Aio, Locking};
use crate::{Error, Result};

/// The options of one node, and of those that are opened with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NodeOptions {
    pub(crate) node_name: Option<String>,
    /// `None`: as the parent.
    pub(crate) read_only: Option<bool>,
    pub(crate) auto_read_only: bool,
    /// `None`: as the parent.
    pub(crate) force_share: Option<bool>,
    /// `None`: as the parent.
    pub(crate) direct: Option<bool>,
    /// `None`: as the parent.
    pub(crate) no_flush: Option<bool>,
    /// Whether discards reach the image.
    pub(crate) unmap: bool,
    pub(crate) detect_zeroes: DetectZeroes,
    pub(crate) driver: Driver,
}

/// What is done with writes of zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DetectZeroes {
    /// They are writes like others.
    #[default]
    Off,
    /// They become zero clusters.
    On,
    /// They give their space back.
    Unmap,
}

impl DetectZeroes {
    /// QMP's word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::On => "on",
            Self::Unmap => "unmap",
        }
    }
}

/// The part of a file that a raw node shows, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Window {
    pub(crate) offset: Option<u64>,
    pub(crate) size: Option<u64>,
}

impl Window {
    /// Whether it is the whole file.
    pub(crate) fn is_whole(self) -> bool {
        self.offset.unwrap_or(0) == 0 && self.size.is_none()
    }
}

/// What is particular to a driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Driver {
    File {
        filename: String,
        locking: Locking,
        aio: Aio,
        host_device: bool,
    },
    Raw {
        file: NodeRef,
        window: Window,
    },
    Qcow2 {
        file: NodeRef,
        backing: Backing,
        image: ImageOptions,
    },
    /// What is written through it is compressed.
    Compress {
        file: NodeRef,
    },
}

/// What is particular to a qcow2 image. `None` is the default of each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ImageOptions {
    /// Which metadata writes are checked against.
    pub(crate) overlap_check: Option<OverlapCheck>,
    /// The external data file; by default the one that the image names.
    pub(crate) data_file: Option<NodeRef>,
    pub(crate) lazy_refcounts: Option<bool>,
    pub(crate) cache: Option<u64>,
    pub(crate) l2_cache: Option<u64>,
    pub(crate) l2_cache_entry: Option<u64>,
    pub(crate) refcount_cache: Option<u64>,
    /// In seconds.
    pub(crate) cache_clean_interval: Option<u64>,
    pub(crate) pass_discard_request: Option<bool>,
    pub(crate) pass_discard_snapshot: Option<bool>,
    pub(crate) pass_discard_other: Option<bool>,
    pub(crate) discard_no_unref: Option<bool>,
    /// Id of the internal snapshot that is shown.
    pub(crate) snapshot: Option<String>,
}

impl ImageOptions {
    /// For the format.
    pub(crate) fn to_options(&self) -> qcow2::Options {
        qcow2::Options {
            read_only: false,
            data_file: None,
            overlap_check: self.overlap_check.unwrap_or_default(),
            lazy_refcounts: self.lazy_refcounts,
            cache: self.cache,
            l2_cache: self.l2_cache,
            l2_cache_entry: self.l2_cache_entry,
            refcount_cache: self.refcount_cache,
            cache_clean_interval: self.cache_clean_interval.map(Duration::from_secs),
            pass_discard: PassDiscard {
                request: self.pass_discard_request.unwrap_or(true),
                snapshot: self.pass_discard_snapshot.unwrap_or(true),
                other: self.pass_discard_other.unwrap_or(true),
            },
            discard_no_unref: self.discard_no_unref.unwrap_or(false),
            snapshot: self.snapshot.clone(),
        }
    }
}

/// A node that exists, or one to be opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum NodeRef {
    Name(String),
    Inline(Box<NodeOptions>),
}

/// QMP's `backing`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Backing {
    /// What the image says.
    FromImage,
    /// `null`: none, whatever the image says.
    None,
    Node(NodeRef),
}

impl Driver {
    /// Its name in QMP.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::File { host_device: false, .. } => "file",
            Self::File { host_device: true, .. } => "host_device",
            Self::Raw { .. } => "raw",
            Self::Qcow2 { .. } => "qcow2",
            Self::Compress { .. } => "compress",
        }
    }
}

/// How strict values are typed: JSON has types, the command line only has text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    Json,
    Text,
}

/// QEMU's options that are not done here, by driver; "" for all drivers.
const NOT_DONE: &[(&str, &[&str])] = &[
    ("", &["active"]),
    ("file", &["pr-manager", "aio-max-batch", "drop-cache", "x-check-cache-dropped"]),
    ("qcow2", &["encrypt"]),
];

/// Most levels of nested options.
const MAX_DEPTH: usize = 200;

/// The members of one object, taken out one by one.
struct Members<'a> {
    members: Map<String, Value>,
    path: &'a str,
    source: Source,
}

fn invalid(text: String) -> Error {
    Error::Invalid(text)
}

impl Members<'_> {
    fn path_of(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    fn wrong_type<T>(&self, name: &str, expected: &str) -> Result<T> {
        Err(invalid(format!(
            "Invalid parameter type for '{}', expected: {expected}",
            self.path_of(name)
        )))
    }

    fn string(&mut self, name: &str) -> Result<Option<String>> {
        match self.members.remove(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => self.wrong_type(name, "string"),
        }
    }

    fn bool(&mut self, name: &str) -> Result<Option<bool>> {
        match self.members.remove(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(Value::String(text)) if self.source == Source::Text => match text.as_str() {
                "on" => Ok(Some(true)),
                "off" => Ok(Some(false)),
                _ => Err(invalid(format!(
                    "Parameter '{}' expects 'on' or 'off'",
                    self.path_of(name)
                ))),
            },
            Some(_) => self.wrong_type(name, "boolean"),
        }
    }

    /// A size in bytes; on the command line with a suffix if wanted.
    fn size(&mut self, name: &str) -> Result<Option<u64>> {
        let Some(value) = self.members.remove(name) else { return Ok(None) };
        let read = match &value {
            Value::Number(number) => number.as_u64(),
            Value::String(text) if self.source == Source::Text => parse_size(text),
            _ => None,
        };
        match read {
            Some(size) => Ok(Some(size)),
            None if self.source == Source::Text => {
                Err(invalid(format!("Parameter '{}' expects a size", self.path_of(name))))
            }
            None => self.wrong_type(name, "integer"),
        }
    }

    /// A word of a list; the error names the member without its path, as QEMU does.
    fn word(&mut self, name: &str, words: &[&str]) -> Result<Option<String>> {
        match self.string(name)? {
            Some(word) if !words.contains(&word.as_str()) => {
                Err(invalid(format!("Parameter '{name}' does not accept value '{word}'")))
            }
            other => Ok(other),
        }
    }

    fn object(&mut self, name: &str) -> Result<Option<Map<String, Value>>> {
        match self.members.remove(name) {
            None => Ok(None),
            Some(Value::Object(members)) => Ok(Some(members)),
            Some(_) => self.wrong_type(name, "object"),
        }
    }

    fn missing<T>(&self, name: &str) -> Result<T> {
        Err(invalid(format!("Parameter '{}' is missing", self.path_of(name))))
    }

    /// What is left is unknown, or not done.
    fn end(self, driver: &str) -> Result<()> {
        let Some(name) = self.members.keys().next() else {
            return Ok(());
        };
        let path = self.path_of(name);
        let known = NOT_DONE
            .iter()
            .filter(|(of, _)| of.is_empty() || *of == driver)
            .any(|(_, names)| names.contains(&name.as_str()));
        Err(if known {
            Error::NotSupported(format!("Parameter '{path}' is not supported"))
        } else {
            invalid(format!("Parameter '{path}' is unexpected"))
        })
    }
}

impl NodeOptions {
    /// Options that say nothing but the driver.
    pub(crate) fn of_driver(driver: Driver) -> Self {
        Self {
            node_name: None,
            read_only: None,
            auto_read_only: false,
            force_share: None,
            direct: None,
            no_flush: None,
            unmap: false,
            detect_zeroes: DetectZeroes::Off,
            driver,
        }
    }

    /// Reads the options of a node and those in it.
    pub(crate) fn parse(options: &Value, source: Source) -> Result<Self> {
        Self::parse_in(options, "", source)
    }

    /// As [`NodeOptions::parse`]; `path` is where the options are in the command, for messages.
    pub(crate) fn parse_in(options: &Value, path: &str, source: Source) -> Result<Self> {
        let Value::Object(members) = options else {
            let path = if path.is_empty() { "options" } else { path };
            return Err(invalid(format!("Invalid parameter type for '{path}', expected: object")));
        };
        Self::parse_at(members.clone(), path, source, 0)
    }

    fn parse_at(
        members: Map<String, Value>,
        path: &str,
        source: Source,
        depth: usize,
    ) -> Result<Self> {
        if depth > MAX_DEPTH {
            return Err(invalid("block options are nested too deeply".to_owned()));
        }
        let mut all = Members { members, path, source };
        let Some(driver_name) = all.string("driver")? else {
            return all.missing("driver");
        };
        let node_name = all.string("node-name")?;
        let unmap = all.word("discard", &["ignore", "unmap"])?.as_deref() == Some("unmap");
        let (direct, no_flush) = cache(&mut all)?;
        let read_only = all.bool("read-only")?;
        let auto_read_only = all.bool("auto-read-only")?.unwrap_or(false);
        let force_share = all.bool("force-share")?;
        let detect_zeroes = match all.word("detect-zeroes", &["off", "on", "unmap"])?.as_deref() {
            Some("on") => DetectZeroes::On,
            Some("unmap") => DetectZeroes::Unmap,
            _ => DetectZeroes::Off,
        };
        if detect_zeroes == DetectZeroes::Unmap && !unmap {
            return Err(invalid(
                "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap"
                    .to_owned(),
            ));
        }
        let driver = match driver_name.as_str() {
            "file" => file_driver(&mut all, false)?,
            "host_device" => file_driver(&mut all, true)?,
            "raw" => Driver::Raw {
                file: file_ref(&mut all, depth)?,
                window: Window { offset: all.size("offset")?, size: all.size("size")? },
            },
            "qcow2" => Driver::Qcow2 {
                file: file_ref(&mut all, depth)?,
                backing: backing(&mut all, depth)?,
                image: image_options(&mut all, depth)?,
            },
            "compress" => Driver::Compress { file: file_ref(&mut all, depth)? },
            _ => {
                return Err(invalid(format!(
                    "Parameter 'driver' does not accept value '{driver_name}'"
                )));
            }
        };
        all.end(&driver_name)?;
        Ok(Self {
            node_name,
            read_only,
            auto_read_only,
            force_share,
            direct,
            no_flush,
            unmap,
            detect_zeroes,
            driver,
        })
    }
}

/// `4096`, `64K`, `1G`: a suffix is a power of 1024.
fn parse_size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

fn cache(all: &mut Members<'_>) -> Result<(Option<bool>, Option<bool>)> {
    let Some(members) = all.object("cache")? else {
        return Ok((None, None));
    };
    let path = all.path_of("cache");
    let mut cache = Members { members, path: &path, source: all.source };
    let found = (cache.bool("direct")?, cache.bool("no-flush")?);
    cache.end("cache")?;
    Ok(found)
}

fn file_driver(all: &mut Members<'_>, host_device: bool) -> Result<Driver> {
    let Some(filename) = all.string("filename")? else {
        return all.missing("filename");
    };
    let locking = match all.word("locking", &["auto", "on", "off"])?.as_deref() {
        Some("on") => Locking::On,
        Some("off") => Locking::Off,
        _ => Locking::Auto,
    };
    let aio = match all.word("aio", &["threads", "native", "io_uring"])?.as_deref() {
        Some("native") => {
            return Err(Error::NotSupported(format!(
                "Parameter '{}' with value 'native' is not supported, only 'threads' and 'io_uring'",
                all.path_of("aio")
            )));
        }
        Some("threads") => Aio::Threads,
        _ => Aio::IoUring,
    };
    Ok(Driver::File { filename, locking, aio, host_device })
}

fn image_options(all: &mut Members<'_>, depth: usize) -> Result<ImageOptions> {
    Ok(ImageOptions {
        overlap_check: overlap_check(all)?,
        data_file: match all.members.remove("data-file") {
            Some(value) => Some(node_ref(all, "data-file", value, depth)?),
            None => None,
        },
        lazy_refcounts: all.bool("lazy-refcounts")?,
        cache: all.size("cache-size")?,
        l2_cache: all.size("l2-cache-size")?,
        l2_cache_entry: all.size("l2-cache-entry-size")?,
        refcount_cache: all.size("refcount-cache-size")?,
        cache_clean_interval: all.size("cache-clean-interval")?,
        pass_discard_request: all.bool("pass-discard-request")?,
        pass_discard_snapshot: all.bool("pass-discard-snapshot")?,
        pass_discard_other: all.bool("pass-discard-other")?,
        discard_no_unref: all.bool("discard-no-unref")?,
        snapshot: all.string("x-snapshot-id")?,
    })
}

/// A word for a set of checks, or an object that adds to one or takes away.
fn overlap_check(all: &mut Members<'_>) -> Result<Option<OverlapCheck>> {
    const NAME: &str = "overlap-check";
    const TEMPLATES: &[&str] = &["none", "constant", "cached", "all"];
    let members = match all.members.remove(NAME) {
        None => return Ok(None),
        Some(word @ Value::String(_)) => {
            all.members.insert(NAME.to_owned(), word);
            return Ok(all.word(NAME, TEMPLATES)?.as_deref().and_then(OverlapCheck::template));
        }
        Some(Value::Object(members)) => members,
        Some(_) => return all.wrong_type(NAME, "Qcow2OverlapChecks"),
    };
    let path = all.path_of(NAME);
    let mut flags = Members { members, path: &path, source: all.source };
    let template = flags.word("template", TEMPLATES)?;
    let mut checks = template.as_deref().and_then(OverlapCheck::template).unwrap_or_default();
    for (name, check) in OverlapCheck::MEMBERS {
        if let Some(on) = flags.bool(name)? {
            checks.set(check, on);
        }
    }
    flags.end("overlap-check")?;
    Ok(Some(checks))
}

fn node_ref(all: &mut Members<'_>, name: &str, value: Value, depth: usize) -> Result<NodeRef> {
    match value {
        Value::String(node) => Ok(NodeRef::Name(node)),
        Value::Object(members) => {
            let path = all.path_of(name);
            let options = NodeOptions::parse_at(members, &path, all.source, depth + 1)?;
            Ok(NodeRef::Inline(Box::new(options)))
        }
        _ => all.wrong_type(name, "BlockdevRef"),
    }
}

fn file_ref(all: &mut Members<'_>, depth: usize) -> Result<NodeRef> {
    match all.members.remove("file") {
        Some(value) => node_ref(all, "file", value, depth),
        None => all.missing("file"),
    }
}

fn backing(all: &mut Members<'_>, depth: usize) -> Result<Backing> {
    match all.members.remove("backing") {
        None => Ok(Backing::FromImage),
        Some(Value::Null) => Ok(Backing::None),
        // QEMU's own spelling of null on the command line.
        Some(Value::String(text)) if text.is_empty() => Ok(Backing::None),
        Some(value @ (Value::String(_) | Value::Object(_))) => {
            Ok(Backing::Node(node_ref(all, "backing", value, depth)?))
        }
        Some(_) => all.wrong_type("backing", "BlockdevRefOrNull"),
    }
}

/// Whether QEMU takes a name for a node, a job or an export.
pub fn is_well_formed(name: &str) -> bool {
    let mut chars = name.chars();
    chars.next().is_some_and(|c| c.is_ascii_alphabetic())
        && chars.all(|c| c.is_ascii_alphanumeric() || "-._".contains(c))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn error_of(options: &Value) -> String {
        NodeOptions::parse(options, Source::Json).unwrap_err().to_string()
    }

    #[test]
    fn bad_options_get_the_texts_of_qemu() {
        let file = json!({"driver": "file", "filename": "x"});
        let cases = [
            (json!({"driver": "qcow2"}), "Parameter 'file' is missing"),
            (json!({"node-name": "a"}), "Parameter 'driver' is missing"),
            (json!({"driver": "zz"}), "Parameter 'driver' does not accept value 'zz'"),
            (
                json!({"driver": "qcow2", "file": 5}),
                "Invalid parameter type for 'file', expected: BlockdevRef",
            ),
            (
                json!({"driver": "qcow2", "file": file, "backing": 5}),
                "Invalid parameter type for 'backing', expected: BlockdevRefOrNull",
            ),
            (
                json!({"driver": "raw", "file": {"driver": "file", "filename": "x", "zz": 1}}),
                "Parameter 'file.zz' is unexpected",
            ),
            (
                json!({"driver": "raw", "file": {"driver": "file", "filename": 1}}),
                "Invalid parameter type for 'file.filename', expected: string",
            ),
            (
                json!({"driver": "raw", "file": file, "cache": {"direct": "on"}}),
                "Invalid parameter type for 'cache.direct', expected: boolean",
            ),
            (
                json!({"driver": "file", "filename": "x", "aio": "zz"}),
                "Parameter 'aio' does not accept value 'zz'",
            ),
            (
                json!({"driver": "file", "filename": "x", "aio": "native"}),
                "Parameter 'aio' with value 'native' is not supported, only 'threads' and 'io_uring'",
            ),
            (
                json!({"driver": "qcow2", "file": file, "encrypt": {}}),
                "Parameter 'encrypt' is not supported",
            ),
        ];
        for (options, text) in cases {
            assert_eq!(error_of(&options), text);
        }
    }

    #[test]
    fn node_names_follow_qemus_rule() {
        assert!(is_well_formed("disk-0.a_b"));
        for bad in ["", "0a", "#block1", "a b", "a\u{e9}"] {
            assert!(!is_well_formed(bad), "{bad:?}");
        }
    }
}
