//! `tardigrade console`: this terminal as the terminal of a machine's serial socket.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::Error;
use crate::terminal::RawTerminal;

/// Ctrl-]: leaves the console, as in telnet and virsh.
const ESCAPE: u8 = 0x1d;

/// Connects until the escape key, the end of input, or the end of the machine.
pub(super) fn attach(socket: &Path) -> Result<(), Error> {
    let fail = |source| Error::Console { path: socket.display().to_string(), source };
    let stream = UnixStream::connect(socket).map_err(fail)?;
    eprintln!("Connected to {}; leave with Ctrl-].", socket.display());
    attach_until(stream, None).map_err(fail)
}

/// The same with a connection that is there already; output that contains `mark` ends it, too.
pub(super) fn attach_until(stream: UnixStream, mark: Option<&[u8]>) -> io::Result<()> {
    let keyboard = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let terminal = RawTerminal::enter(&keyboard, false)?;
    let result = relay(stream, keyboard, mark);
    drop(terminal);
    eprintln!();
    result
}

fn relay(mut from_guest: UnixStream, keyboard: File, mark: Option<&[u8]>) -> io::Result<()> {
    let to_guest = from_guest.try_clone()?;
    // Ends with the process where the guest ends first: a read of the keyboard cannot be woken.
    std::thread::Builder::new().name("keyboard".to_owned()).spawn(move || {
        let _ = send_keys(keyboard, &to_guest);
        // Wakes the other direction, which ends the console.
        let _ = to_guest.shutdown(Shutdown::Both);
    })?;
    let mut screen = io::stdout().lock();
    let mut buf = [0; 4096];
    let mut watch = mark.map(Watch::new);
    loop {
        let count = from_guest.read(&mut buf)?;
        let seen = watch.as_mut().and_then(|watch| watch.end_in(&buf[..count]));
        screen.write_all(&buf[..seen.unwrap_or(count)]).and_then(|()| screen.flush())?;
        if count == 0 || seen.is_some() {
            return Ok(());
        }
    }
}

/// Looks for a mark in a stream that comes in pieces.
struct Watch<'a> {
    mark: &'a [u8],
    /// The last bytes of earlier pieces, fewer than the mark has.
    tail: Vec<u8>,
}

impl<'a> Watch<'a> {
    fn new(mark: &'a [u8]) -> Self {
        Self { mark, tail: Vec::new() }
    }

    /// Where in `piece` the mark begins that it completes; 0 if that was in an earlier piece.
    fn end_in(&mut self, piece: &[u8]) -> Option<usize> {
        let before = self.tail.len();
        self.tail.extend_from_slice(piece);
        let found = self.tail.windows(self.mark.len()).position(|window| window == self.mark);
        let keep = self.tail.len().min(self.mark.len().saturating_sub(1));
        self.tail.drain(..self.tail.len() - keep);
        found.map(|at| at.saturating_sub(before))
    }
}

fn send_keys(mut keyboard: File, mut to_guest: &UnixStream) -> io::Result<()> {
    let mut buf = [0; 256];
    loop {
        let count = keyboard.read(&mut buf)?;
        let keys = &buf[..count];
        let end = keys.iter().position(|key| *key == ESCAPE);
        to_guest.write_all(&keys[..end.unwrap_or(count)])?;
        if count == 0 || end.is_some() {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_found_where_it_begins() {
        assert_eq!(Watch::new(b"end ").end_in(b"# exit\r\nend ok"), Some(8));
        assert_eq!(Watch::new(b"end ").end_in(b"# exit\r\nen d"), None);
    }

    #[test]
    fn a_mark_in_pieces_is_found_in_the_last_one() {
        let mut watch = Watch::new(b"end ");
        let pieces: [&[u8]; 5] = [b"exit\r\ne", b"", b"n", b"d", b" ok"];
        assert_eq!(pieces.map(|piece| watch.end_in(piece)), [None, None, None, None, Some(0)]);
    }
}
