//! `tardigrade image convert`

use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use block::{DiskRead, Node, Progress, ReadBuf, StatusExtent, WriteBuf};

use super::options::{Given, asks_for_help, help};
use super::snapshots::id_of;
use super::watch::watched;
use super::{Access, Error, Result, create, of, open, say};
use crate::cli::image::ConvertArgs;

/// Bytes that are copied at once.
const CHUNK: u64 = 2 << 20;
/// Bytes that are zeroed at once, so that progress is seen and a cancellation heard.
const ZERO_CHUNK: u64 = 1 << 30;

pub(super) fn run(args: &ConvertArgs) -> Result<u8> {
    if asks_for_help(&args.options) {
        say(help(&args.target_format)?)?;
        return Ok(0);
    }
    let given = Given::read(&args.options)?;
    if given.size.is_some() || given.backing_file.is_some() {
        return Err(Error::Usage(
            "The copy has the size of its source and no backing file: 'size' and 'backing_file' \
             cannot be given"
                .to_owned(),
        ));
    }
    let access = Access { force_share: args.force_share, ..Access::default() };
    let (_user, node) = open(&args.source, args.format.as_deref(), access)?;
    let format = node.format();
    let source: Box<dyn DiskRead + '_> = match &args.snapshot {
        None => Box::new(Present(&node)),
        Some(name) => id_of(&*format, name, &args.source)
            .and_then(|id| format.open_snapshot(&id))
            .map_err(|e| Error::Usage(format!("Failed to load snapshot: {e}")))?,
    };
    if args.compress && args.target_format != "qcow2" {
        return Err(Error::Usage("Compression not supported for this file format".to_owned()));
    }
    if !args.no_create {
        create::make(&args.target, &args.target_format, &given, source.size(), args.quiet)?;
    }
    let access = Access { writable: true, ..Access::default() };
    let (_target_user, target) = open(&args.target, Some(&args.target_format), access)?;
    if target.size() < source.size() {
        return Err(Error::Usage(format!(
            "{}: output file is smaller than input file ({} and {} bytes)",
            args.target.display(),
            target.size(),
            source.size()
        )));
    }
    // A new qcow2 image is empty wherever it is.
    let keeps = args.target_format == "raw" && is_device(&args.target);
    let to = Target { node: &target, blank: !args.no_create && !keeps };
    watched(args.quiet, |progress| match args.compress {
        true => copy_compressed(&*source, &target, progress),
        false => copy(&*source, to, progress),
    })
    .map_err(of(&args.target))?;
    Ok(0)
}

/// Making a raw image in a block device does not empty it.
fn is_device(file: &Path) -> bool {
    std::fs::metadata(file).is_ok_and(|meta| meta.file_type().is_block_device())
}

/// A disk as it is now, as what is copied.
struct Present<'a>(&'a Node);

impl DiskRead for Present<'_> {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read(&self, offset: u64, bufs: &[ReadBuf<'_>]) -> block::Result<()> {
        self.0.read(offset, bufs)
    }

    fn block_status(&self, offset: u64, len: u64) -> block::Result<Vec<StatusExtent>> {
        self.0.format().block_status(offset, len)
    }
}

/// What is copied into.
#[derive(Clone, Copy)]
struct Target<'a> {
    node: &'a Node,
    /// It is new and reads as zeroes, so these need not be written.
    blank: bool,
}

impl Target<'_> {
    fn zero(self, mut at: u64, len: u64, progress: &Progress) -> block::Result<()> {
        let end = at + len;
        while at < end && !self.blank {
            progress.check()?;
            let n = (end - at).min(ZERO_CHUNK);
            self.node.write_zeroes(at, n, true)?;
            at += n;
        }
        Ok(())
    }

    /// Writes bytes; the parts of 4 KiB that are zero as zeroes.
    fn write(self, at: u64, bytes: &[u8], progress: &Progress) -> block::Result<()> {
        const STEP: usize = 4096;
        let mut start = 0;
        while start < bytes.len() {
            let is_zero = |from: usize| {
                bytes[from..bytes.len().min(from + STEP)].iter().all(|byte| *byte == 0)
            };
            let zero = is_zero(start);
            let mut end = bytes.len().min(start + STEP);
            while end < bytes.len() && is_zero(end) == zero {
                end = bytes.len().min(end + STEP);
            }
            let offset = at + to_u64(start);
            if zero {
                self.zero(offset, to_u64(end - start), progress)?;
            } else {
                self.node.write(offset, &[WriteBuf::new(&bytes[start..end])])?;
            }
            start = end;
        }
        Ok(())
    }
}

/// An index in memory.
fn to_u64(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}

fn copy(source: &dyn DiskRead, target: Target<'_>, progress: &Progress) -> block::Result<()> {
    let size = source.size();
    progress.add_total(size);
    let mut buffer = vec![0; usize::try_from(CHUNK).unwrap_or(1 << 20)];
    let mut at = 0;
    while at < size {
        progress.check()?;
        for extent in source.block_status(at, size - at)? {
            let end = at + extent.len;
            if extent.zero {
                target.zero(at, extent.len, progress)?;
                progress.advance(extent.len);
                at = end;
                continue;
            }
            while at < end {
                progress.check()?;
                let n = (end - at).min(CHUNK - at % CHUNK);
                let part = &mut buffer[..usize::try_from(n).unwrap_or(0)];
                source.read(at, &[ReadBuf::new(part)])?;
                target.write(at, part, progress)?;
                progress.advance(n);
                at += n;
            }
        }
    }
    target.node.flush()
}

/// Copies by clusters, each compressed on its own.
fn copy_compressed(source: &dyn DiskRead, target: &Node, progress: &Progress) -> block::Result<()> {
    let (size, format) = (source.size(), target.format());
    progress.add_total(size);
    let cluster = format.compressed_cluster().unwrap_or(CHUNK);
    let mut buffer = vec![0; usize::try_from(cluster).unwrap_or(1 << 16)];
    let mut at = 0;
    while at < size {
        progress.check()?;
        let n = (size - at).min(cluster);
        let status = source.block_status(at, size - at)?;
        if let Some(first) = status.first().filter(|first| first.zero && first.len >= n) {
            let whole =
                if first.len == size - at { first.len } else { first.len / cluster * cluster };
            progress.advance(whole);
            at += whole;
            continue;
        }
        let part = &mut buffer[..usize::try_from(n).unwrap_or(0)];
        source.read(at, &[ReadBuf::new(part)])?;
        if part.iter().any(|byte| *byte != 0) {
            format.write_compressed(at, &[WriteBuf::new(part)])?;
        }
        progress.advance(n);
        at += n;
    }
    target.flush()
}
