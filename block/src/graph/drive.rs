//! Targets of copies that are named by a file: what QEMU's older commands (drive-backup, drive-mirror) do
//! before they copy.
//!
//! The image is made or found, and opened as a node that nobody else uses and that goes with its last user.
//! A file that was made for a copy that does not begin is removed again.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::build;
use super::external::{check_path, unlink};
use super::open::not_found;
use super::options::{NodeOptions, Source};
use super::{Attachment, Graph, User};
use crate::create_file::{FileCreateOptions, FileHints, create_file, create_raw};
use crate::perm::Perm;
use crate::qcow2::create::{CreateOptions, create};
use crate::{Error, Node, Progress, Result};

/// What the target reads where it has nothing itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Below {
    /// Nothing; an image that is there already keeps what it names.
    Named,
    /// Nothing, whatever it names.
    Nothing,
    /// What the source has below it.
    SourceBacking,
    /// The source.
    Source,
}

/// A target that is named by its file.
#[derive(Debug, Clone, Copy)]
pub struct TargetFile<'a> {
    /// The node that is copied.
    pub source: &'a str,
    /// The file.
    pub filename: &'a str,
    /// Its format; that of the source, or of the file if it is there, without it.
    pub format: Option<&'a str>,
    /// Whether it is there already; otherwise it is created.
    pub existing: bool,
    /// The name of its node; one is made up without it.
    pub node_name: Option<&'a str>,
    /// What is below it.
    pub below: Below,
}

/// An open target. Dropped before [`OpenTarget::taken`], it is closed, and removed if it was made.
pub struct OpenTarget {
    name: String,
    keep: Option<Attachment>,
    made: Option<PathBuf>,
}

impl OpenTarget {
    /// The name of its node.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Somebody uses the node by now.
    pub fn taken(mut self) {
        self.made = None;
    }
}

impl Drop for OpenTarget {
    fn drop(&mut self) {
        // The node goes first, with its last user.
        self.keep = None;
        unlink(self.made.take());
    }
}

impl Graph {
    /// Makes the target of a copy, if it is not there, and opens it.
    ///
    /// # Errors
    /// With QEMU's texts; nothing is left then.
    pub fn open_target(&self, target: &TargetFile<'_>) -> Result<OpenTarget> {
        let source = self.get(target.source).ok_or_else(|| not_found(target.source))?;
        let path = check_path(target.filename)?;
        if let Some(name) = target.node_name
            && self.get(name).is_some()
        {
            return Err(Error::Invalid(format!("Duplicate nodes with node-name='{name}'")));
        }
        let format = match target.format {
            Some(format) => format.to_owned(),
            None if target.existing => crate::probe_format(path)?.to_owned(),
            None => source.driver().to_owned(),
        };
        let fresh = !path.exists();
        if !target.existing {
            let made = make(&source, target, &format);
            made.inspect_err(|_| unlink(fresh.then(|| path.to_owned())))?;
        }
        let made = (fresh && !target.existing).then(|| path.to_owned());
        let opened = self.open_named(&source, target, &format);
        let name = opened.inspect_err(|_| unlink(made.clone()))?;
        let mut open = OpenTarget { name: name.clone(), keep: None, made };
        open.keep = Some(self.attach(&name, User::unnamed(Perm::empty(), Perm::all()))?);
        Ok(open)
    }

    fn open_named(&self, source: &Node, target: &TargetFile<'_>, format: &str) -> Result<String> {
        let mut options = json!({
            "driver": format,
            "file": {"driver": "file", "filename": check_path(target.filename)?.display().to_string()},
        });
        if let Some(name) = target.node_name {
            options["node-name"] = json!(name);
        }
        match target.below {
            _ if format != "qcow2" => {}
            Below::Named | Below::SourceBacking => {}
            Below::Nothing => options["backing"] = Value::Null,
            Below::Source => options["backing"] = json!(source.name()),
        }
        let mut flags = source.details().flags;
        flags.read_only = false;
        let mut options = NodeOptions::parse(&options, Source::Json)?;
        options.unmap = true;
        self.open_implicit(&options, flags)
    }
}

/// Makes the image.
fn make(source: &Node, target: &TargetFile<'_>, format: &str) -> Result<()> {
    let path = check_path(target.filename)?;
    let backing = match target.below {
        Below::Named | Below::Nothing => None,
        Below::SourceBacking => source
            .backing()
            .map(|backing| (build::name_for_overlay(&backing, path), backing.driver().to_owned())),
        Below::Source => Some((build::name_for_overlay(source, path), source.driver().to_owned())),
    };
    match format {
        "qcow2" => {
            let (backing_file, backing_fmt) = backing.unzip();
            if backing_file.as_ref().is_some_and(|name| std::path::Path::new(name) == path) {
                let text = "Error: Trying to create an image with the same filename as the \
                            backing file";
                return Err(Error::Invalid(text.to_owned()));
            }
            let options = CreateOptions {
                size: source.size(),
                backing_file,
                backing_fmt,
                ..CreateOptions::default()
            };
            options.validate(false)?;
            create(&create_file(path, FileHints::default())?, None, &options, &Progress::default())
        }
        "raw" if backing.is_some() => {
            Err(Error::Invalid("Backing file not supported for file format 'raw'".to_owned()))
        }
        "raw" => {
            let filename = path.display().to_string();
            let options =
                FileCreateOptions { filename, size: source.size(), ..FileCreateOptions::default() };
            create_raw(&options, &Progress::default()).map(drop)
        }
        other => Err(Error::Invalid(format!("Unknown file format '{other}'"))),
    }
}
