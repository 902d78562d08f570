//! Reading the options of nodes, each driver's own too.

use serde_json::Value;

use super::members::invalid;
use super::{
    Backing, DetectZeroes, Driver, ImageOptions, Members, NodeOptions, NodeRef, Source, Window,
};
use crate::qcow2::OverlapCheck;
use crate::storage::{Aio, Locking};
use crate::{Error, Result};

/// QEMU's options of a driver that are not done here.
fn not_done(driver: &str) -> &'static [&'static str] {
    match driver {
        "file" => &["active", "pr-manager", "aio-max-batch", "drop-cache", "x-check-cache-dropped"],
        "qcow2" => &["active", "encrypt"],
        _ => &["active"],
    }
}

/// Most levels of nested options.
const MAX_DEPTH: usize = 200;

impl NodeOptions {
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
        let members = Members::new(members.clone(), path.to_owned(), source);
        Self::parse_at(members, 0)
    }

    fn parse_at(mut all: Members, depth: usize) -> Result<Self> {
        if depth > MAX_DEPTH {
            return Err(invalid("block options are nested too deeply".to_owned()));
        }
        let driver_name = all.needed("driver")?;
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
        all.end(not_done(&driver_name))?;
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

fn cache(all: &mut Members) -> Result<(Option<bool>, Option<bool>)> {
    let Some(members) = all.object("cache")? else {
        return Ok((None, None));
    };
    let mut cache = all.inner("cache", members);
    let found = (cache.bool("direct")?, cache.bool("no-flush")?);
    cache.end(&[])?;
    Ok(found)
}

fn file_driver(all: &mut Members, host_device: bool) -> Result<Driver> {
    let filename = all.needed("filename")?;
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

fn image_options(all: &mut Members, depth: usize) -> Result<ImageOptions> {
    Ok(ImageOptions {
        overlap_check: overlap_check(all)?,
        data_file: match all.take("data-file") {
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
        snapshot_date: all.string("x-snapshot-date")?,
    })
}

/// A word for a set of checks, or an object that adds to one or takes away.
fn overlap_check(all: &mut Members) -> Result<Option<OverlapCheck>> {
    const NAME: &str = "overlap-check";
    const TEMPLATES: &[&str] = &["none", "constant", "cached", "all"];
    let members = match all.take(NAME) {
        None => return Ok(None),
        Some(Value::String(word)) => {
            let word = Members::one_of(NAME, word, TEMPLATES)?;
            return Ok(OverlapCheck::template(&word));
        }
        Some(Value::Object(members)) => members,
        Some(_) => return all.wrong_type(NAME, "Qcow2OverlapChecks"),
    };
    let mut flags = all.inner(NAME, members);
    let template = flags.word("template", TEMPLATES)?;
    let mut checks = template.as_deref().and_then(OverlapCheck::template).unwrap_or_default();
    for (name, check) in OverlapCheck::MEMBERS {
        if let Some(on) = flags.bool(name)? {
            checks.set(check, on);
        }
    }
    flags.end(&[])?;
    Ok(Some(checks))
}

fn node_ref(all: &mut Members, name: &str, value: Value, depth: usize) -> Result<NodeRef> {
    match value {
        Value::String(node) => Ok(NodeRef::Name(node)),
        Value::Object(members) => {
            let options = NodeOptions::parse_at(all.inner(name, members), depth + 1)?;
            Ok(NodeRef::Inline(Box::new(options)))
        }
        _ => all.wrong_type(name, "BlockdevRef"),
    }
}

fn file_ref(all: &mut Members, depth: usize) -> Result<NodeRef> {
    match all.take("file") {
        Some(value) => node_ref(all, "file", value, depth),
        None => all.missing("file"),
    }
}

fn backing(all: &mut Members, depth: usize) -> Result<Backing> {
    match all.take("backing") {
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
