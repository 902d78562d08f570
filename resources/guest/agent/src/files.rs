//! File systems and files.

use core::fmt::Write;

use crate::args::Args;
use crate::buffer::SIZE;
use crate::command::Agent;
use crate::console::Reply;
use crate::error::{During, Error};
use crate::pattern;
use crate::sys::{self, EBUSY, Fd, O_CREAT, O_RDONLY, O_TRUNC, O_WRONLY};

/// Longest text of `read-text`.
const TEXT_MAX: u64 = 1024;

/// The kernel's own file systems, mounted when a command first needs one.
#[derive(Default)]
pub struct Mounts {
    dev: bool,
    proc: bool,
    sys: bool,
}

impl Mounts {
    /// Makes device nodes appear under `/dev`.
    pub fn need_dev(&mut self) -> Result<(), Error> {
        once(&mut self.dev, c"/dev", c"devtmpfs")
    }

    /// Makes `/proc` appear.
    pub fn need_proc(&mut self) -> Result<(), Error> {
        once(&mut self.proc, c"/proc", c"proc")
    }

    /// Makes all of them appear, for people.
    pub fn need_all(&mut self) -> Result<(), Error> {
        self.need_dev()?;
        self.need_proc()?;
        once(&mut self.sys, c"/sys", c"sysfs")
    }
}

fn once(done: &mut bool, at: &core::ffi::CStr, kind: &core::ffi::CStr) -> Result<(), Error> {
    if !*done {
        match sys::mount(kind, at, kind) {
            Ok(()) | Err(EBUSY) => *done = true,
            Err(errno) => return Err(Error::System("mount", errno)),
        }
    }
    Ok(())
}

/// `mount <device> [directory]`: an ext4 file system, at `/mnt` unless told.
pub fn mount(agent: &mut Agent, mut args: Args, _: &mut Reply) -> Result<(), Error> {
    let device = args.device()?;
    let directory = if args.is_empty() { None } else { Some(args.path("directory expected")?) };
    args.end()?;
    agent.mounts.need_dev()?;
    let directory = directory.as_ref().map_or(c"/mnt", |path| path.as_c_str());
    sys::mount(device.as_c_str(), directory, c"ext4").during("mount")
}

/// `umount [directory]`
pub fn umount(_: &mut Agent, mut args: Args, _: &mut Reply) -> Result<(), Error> {
    let directory = if args.is_empty() { None } else { Some(args.path("directory expected")?) };
    args.end()?;
    let directory = directory.as_ref().map_or(c"/mnt", |path| path.as_c_str());
    sys::unmount(directory).during("umount")
}

/// `write-file <path> <length> <seed>`: a new file with the pattern.
pub fn write_file(agent: &mut Agent, mut args: Args, _: &mut Reply) -> Result<(), Error> {
    let path = args.path("path expected")?;
    let length = args.number("length expected")?;
    let seed = args.number("seed expected")?;
    args.end()?;
    let flags = O_WRONLY | O_CREAT | O_TRUNC;
    let file = Fd::open(path.as_c_str(), flags).during("open")?;
    for offset in (0..length).step_by(SIZE) {
        let bytes = agent.buffer.first(length - offset);
        pattern::fill(bytes, seed, offset);
        write_all(&file, bytes, offset)?;
    }
    Ok(())
}

fn write_all(file: &Fd, mut bytes: &[u8], mut offset: u64) -> Result<(), Error> {
    while !bytes.is_empty() {
        let count = file.write_at(bytes, offset).during("write")?;
        bytes = &bytes[count..];
        offset += count as u64;
    }
    Ok(())
}

/// Hands each piece of a file to `take`, with its offset; returns the length.
fn for_each_piece(
    agent: &mut Agent,
    path: &core::ffi::CStr,
    mut take: impl FnMut(&[u8], u64) -> Result<(), Error>,
) -> Result<u64, Error> {
    let file = Fd::open(path, O_RDONLY).during("open")?;
    let mut offset = 0;
    loop {
        // Whole pieces but for the last: the pattern is taken up at multiples of 8 only.
        let piece = agent.buffer.first(SIZE as u64);
        let mut filled = 0;
        while filled < piece.len() {
            let at = offset + filled as u64;
            match file.read_at(&mut piece[filled..], at).during("read")? {
                0 => break,
                count => filled += count,
            }
        }
        take(&piece[..filled], offset)?;
        offset += filled as u64;
        if filled < SIZE {
            return Ok(offset);
        }
    }
}

/// `sum-file <path>`
pub fn sum_file(agent: &mut Agent, mut args: Args, reply: &mut Reply) -> Result<(), Error> {
    let path = args.path("path expected")?;
    args.end()?;
    let mut sum = pattern::Sum::new();
    let length = for_each_piece(agent, path.as_c_str(), |bytes, _| {
        sum.add(bytes);
        Ok(())
    })?;
    let _ = write!(reply, "sum={:016x} bytes={length}", sum.value());
    Ok(())
}

/// `verify-file <path> <seed>`
pub fn verify_file(agent: &mut Agent, mut args: Args, reply: &mut Reply) -> Result<(), Error> {
    let path = args.path("path expected")?;
    let seed = args.number("seed expected")?;
    args.end()?;
    let length = for_each_piece(agent, path.as_c_str(), |bytes, offset| {
        match pattern::first_difference(bytes, seed, offset) {
            Some(offset) => Err(Error::Mismatch(offset)),
            None => Ok(()),
        }
    })?;
    let _ = write!(reply, "bytes={length}");
    Ok(())
}

/// `write-text <path> <text>`: a new file with one line of text, made durable.
pub fn write_text(_: &mut Agent, mut args: Args, _: &mut Reply) -> Result<(), Error> {
    let path = args.path("path expected")?;
    let flags = O_WRONLY | O_CREAT | O_TRUNC;
    let file = Fd::open(path.as_c_str(), flags).during("open")?;
    write_all(&file, args.rest().as_bytes(), 0)?;
    file.sync().during("sync")
}

/// `read-text <path>`: the first line of a file.
pub fn read_text(agent: &mut Agent, mut args: Args, reply: &mut Reply) -> Result<(), Error> {
    let path = args.path("path expected")?;
    args.end()?;
    let file = Fd::open(path.as_c_str(), O_RDONLY).during("open")?;
    let bytes = agent.buffer.first(TEXT_MAX);
    let count = file.read_at(bytes, 0).during("read")?;
    let text = core::str::from_utf8(&bytes[..count]).map_err(|_| Error::State("not text"))?;
    reply.push(text.lines().next().unwrap_or(""));
    Ok(())
}

/// `sync`: everything to the disks.
pub fn sync(_: &mut Agent, args: Args, _: &mut Reply) -> Result<(), Error> {
    args.end()?;
    sys::sync_all();
    Ok(())
}

/// `drop-caches`: forgets clean file data, so that it is next read from the disk.
pub fn drop_caches(agent: &mut Agent, args: Args, _: &mut Reply) -> Result<(), Error> {
    args.end()?;
    agent.mounts.need_proc()?;
    sys::sync_all();
    let file = Fd::open(c"/proc/sys/vm/drop_caches", O_WRONLY).during("open")?;
    write_all(&file, b"3", 0)
}
