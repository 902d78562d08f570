//! `tardigrade image convert`

use block::{Node, Progress, ReadBuf, WriteBuf};

use super::options::Given;
use super::watch::watched;
use super::{Access, Error, Result, create, of, open};
use crate::cli::image::ConvertArgs;

/// Bytes that are copied at once.
const CHUNK: u64 = 2 << 20;

pub(super) fn run(args: &ConvertArgs) -> Result<u8> {
    let given = Given::read(&args.options)?;
    if given.size.is_some() || given.backing_file.is_some() {
        return Err(Error::Usage(
            "The copy has the size of its source and no backing file: 'size' and 'backing_file' \
             cannot be given"
                .to_owned(),
        ));
    }
    let (_user, source) = open(&args.source, args.format.as_deref(), Access::default())?;
    if args.compress && args.target_format != "qcow2" {
        return Err(Error::Usage("Compression not supported for this file format".to_owned()));
    }
    create::make(&args.target, &args.target_format, &given, source.size(), args.quiet)?;
    let access = Access { writable: true, ..Access::default() };
    let (_target_user, target) = open(&args.target, Some(&args.target_format), access)?;
    watched(args.quiet, |progress| copy(&source, &target, args.compress, progress))
        .map_err(of(&args.target))?;
    Ok(0)
}

/// Copies what is not zero; a new image reads as zeroes elsewhere.
fn copy(source: &Node, target: &Node, compress: bool, progress: &Progress) -> block::Result<()> {
    let size = source.size();
    progress.add_total(size);
    if compress {
        return copy_compressed(source, target, progress);
    }
    let mut buffer = vec![0; usize::try_from(CHUNK).unwrap_or(1 << 20)];
    let mut at = 0;
    while at < size {
        progress.check()?;
        for extent in source.format().block_status(at, size - at)? {
            let end = at + extent.len;
            if extent.zero {
                progress.advance(extent.len);
                at = end;
                continue;
            }
            while at < end {
                progress.check()?;
                let n = (end - at).min(CHUNK - at % CHUNK);
                let part = &mut buffer[..usize::try_from(n).unwrap_or(0)];
                source.read(at, &[ReadBuf::new(part)])?;
                write_used(target, at, part)?;
                progress.advance(n);
                at += n;
            }
        }
    }
    target.flush()
}

/// Copies by clusters, each compressed on its own.
fn copy_compressed(source: &Node, target: &Node, progress: &Progress) -> block::Result<()> {
    let (size, format) = (source.size(), target.format());
    let cluster = format.compressed_cluster().unwrap_or(CHUNK);
    let mut buffer = vec![0; usize::try_from(cluster).unwrap_or(1 << 16)];
    let mut at = 0;
    while at < size {
        progress.check()?;
        let n = (size - at).min(cluster);
        let status = source.format().block_status(at, size - at)?;
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

/// Writes the parts that are not zero, in steps of 4 KiB.
fn write_used(target: &Node, at: u64, bytes: &[u8]) -> block::Result<()> {
    const STEP: usize = 4096;
    let mut start = 0;
    while start < bytes.len() {
        let is_zero =
            |from: usize| bytes[from..bytes.len().min(from + STEP)].iter().all(|byte| *byte == 0);
        let zero = is_zero(start);
        let mut end = bytes.len().min(start + STEP);
        while end < bytes.len() && is_zero(end) == zero {
            end = bytes.len().min(end + STEP);
        }
        if !zero {
            let offset = at + u64::try_from(start).unwrap_or(0);
            target.write(offset, &[WriteBuf::new(&bytes[start..end])])?;
        }
        start = end;
    }
    Ok(())
}
