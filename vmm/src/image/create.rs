//! `tardigrade image create`

use std::path::Path;

use block::qcow2::create::create;
use block::storage::{FileStorage, Storage};
use block::{create_file, create_raw};

use super::options::{Given, asks_for_help, help};
use super::text::parse_size;
use super::watch::watched;
use super::{Access, Error, Result, of, open, say};
use crate::cli::image::CreateArgs;

pub(super) fn run(args: &CreateArgs) -> Result<u8> {
    if asks_for_help(&args.options) {
        say(help(&args.format)?)?;
        return Ok(0);
    }
    let usage = |text: &str| Err(Error::Usage(text.to_owned()));
    let Some(file) = &args.file else {
        return usage("Expecting image file name");
    };
    if !matches!(args.format.as_str(), "raw" | "qcow2") {
        return named(file, &format!("Unknown file format '{}'", args.format));
    }
    let mut given = Given::read(&args.options)?;
    if let Some(backing) = &args.backing {
        given =
            Given::read(&[args.options.clone(), vec![escaped("backing_file", backing)]].concat())?;
    }
    if let Some(format) = &args.backing_format {
        given.backing_fmt = Some(format.clone());
    }
    if args.format == "raw" && (given.backing_file.is_some() || given.backing_fmt.is_some()) {
        let what = if given.backing_file.is_some() { "file" } else { "format" };
        return named(file, &format!("Backing {what} not supported for file format 'raw'"));
    }
    let size = match (&args.size, given.size) {
        (Some(_), Some(_)) => {
            return named(file, "The image size must be specified only once");
        }
        (Some(text), None) => Some(
            parse_size(text)
                .ok_or_else(|| Error::Usage(format!("Invalid image size specified: '{text}'.")))?,
        ),
        (None, size) => size,
    };
    let size = match (size, backing_size(args, file, &given)?) {
        (Some(size), _) | (None, Some(size)) => size,
        (None, None) => return named(file, "Image creation needs a size parameter"),
    };
    if size > i64::MAX as u64 - 511 {
        return usage("Invalid image size specified. Must be between 0 and 9223372036854775807.");
    }
    if !args.quiet {
        let words = given.describe(&args.format, size);
        say(&format!("Formatting '{}', {words}\n", file.display()))?;
    }
    make(file, &args.format, &given, size.next_multiple_of(512), args.quiet)?;
    Ok(0)
}

/// An option with a value in which commas are part of it.
fn escaped(name: &str, value: &str) -> String {
    format!("{name}={}", value.replace(',', ",,"))
}

fn named<T>(file: &Path, text: &str) -> Result<T> {
    Err(Error::Usage(format!("{}: {text}", file.display())))
}

/// The size of the backing file, which must be there, unless nobody is to look at it.
fn backing_size(args: &CreateArgs, file: &Path, given: &Given) -> Result<Option<u64>> {
    let Some(backing) = &given.backing_file else {
        return Ok(None);
    };
    if backing.is_empty() {
        return named(file, "Expected backing file name, got empty string");
    }
    if Path::new(backing) == file {
        return named(
            file,
            "Error: Trying to create an image with the same filename as the backing file",
        );
    }
    if given.backing_fmt.is_none() {
        return named(file, "Backing file specified without backing format");
    }
    if args.backing_unsafe {
        return Ok(None);
    }
    let path = block::graph::backing_path(&file.display().to_string(), backing);
    let path = path.or_else(|e| named(file, &format!("{e}\nCould not open backing image.")))?;
    // Whoever writes to it meanwhile does not change its size.
    let access = Access { force_share: true, ..Access::default() };
    let opened = open(Path::new(&path), given.backing_fmt.as_deref(), access);
    match opened {
        Ok((_graph, node)) => Ok(Some(node.size())),
        Err(e) => named(file, &format!("{e}\nCould not open backing image.")),
    }
}

/// Makes an image; what failed midway is removed, if it was not there before.
pub(super) fn make(file: &Path, format: &str, given: &Given, size: u64, quiet: bool) -> Result<()> {
    let was_there = file.exists();
    let made = match format {
        "raw" => {
            let options = given.raw(&file.display().to_string(), size)?;
            watched(quiet, |progress| create_raw(&options, progress)).map(|_| ())
        }
        "qcow2" => {
            let options = given.qcow2(size);
            options.validate(given.data_file.is_some()).map_err(of(file))?;
            given.hints().map_err(of(file))?;
            files(file, given).and_then(|(storage, data)| {
                let data = data.as_ref().map(|data| data as &dyn Storage);
                watched(quiet, |progress| create(&storage, data, &options, progress))
            })
        }
        other => return named(file, &format!("Unknown file format '{other}'")),
    };
    if made.is_err() && !was_there {
        // The error that counts is the one of the making.
        let _ = std::fs::remove_file(file);
    }
    made.map_err(of(file))
}

/// The files of a qcow2 image.
fn files(file: &Path, given: &Given) -> block::Result<(FileStorage, Option<FileStorage>)> {
    let hints = given.hints()?;
    let storage = create_file(file, hints)?;
    let data = match &given.data_file {
        Some(name) => Some(create_file(name, hints)?),
        None => None,
    };
    Ok((storage, data))
}
