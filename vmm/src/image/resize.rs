//! `tardigrade image resize`

use block::Preallocation;

use super::text::parse_size;
use super::watch::watched;
use super::{Access, Error, Result, of, open, say};
use crate::cli::image::ResizeArgs;

pub(super) fn run(args: &ResizeArgs) -> Result<u8> {
    let usage = |text: &str| Err(Error::Usage(text.to_owned()));
    let Some(mode) = Preallocation::of_name(&args.preallocation) else {
        return Err(Error::Usage(format!("Invalid preallocation mode '{}'", args.preallocation)));
    };
    let (sign, number) = match args.size.split_at_checked(1) {
        Some(("+", rest)) => (1, rest),
        Some(("-", rest)) => (-1, rest),
        _ => (0, args.size.as_str()),
    };
    let Some(number) = parse_size(number) else {
        return Err(Error::Usage(format!("Invalid image size specified: '{}'", args.size)));
    };
    let access = Access { writable: true, ..Access::default() };
    let (_user, node) = open(&args.file, args.format.as_deref(), access)?;
    if args.format.is_none() && node.driver() == "raw" {
        eprintln!(
            "WARNING: Image format was not specified for '{}' and probing guessed raw.\n         \
             Automatically detecting the format is dangerous for raw images: whoever writes to \
             the disk decides it.\n         \
             Specify the 'raw' format explicitly with '-f raw'.",
            args.file.display()
        );
    }
    let old = node.size();
    let new = match sign {
        0 => Some(number),
        1 => old.checked_add(number),
        _ => old.checked_sub(number),
    };
    let Some(new) = new.filter(|new| *new > 0) else {
        return usage("New image size must be positive");
    };
    // A qcow2 image takes whole sectors only, and says so; of a file's last one nobody keeps a part.
    let whole = if node.driver() == "raw" { new.checked_next_multiple_of(512) } else { Some(new) };
    let Some(new) = whole else {
        return usage("The image size is larger than a file can be");
    };
    if new <= old && mode != Preallocation::Off {
        return usage("Preallocation can only be used for growing images");
    }
    if new < old && !args.shrink {
        return Err(Error::Usage(
            "Use the --shrink option to perform a shrink operation.\n\
             tardigrade: warning: Shrinking an image will delete all data beyond the shrunken \
             image's end. Before performing such an operation, make sure there is no important \
             data there."
                .to_owned(),
        ));
    }
    watched(args.quiet, |progress| node.resize(new, mode, progress)).map_err(of(&args.file))?;
    node.flush().map_err(of(&args.file))?;
    if !args.quiet {
        say("Image resized.\n")?;
    }
    Ok(0)
}
