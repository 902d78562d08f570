//! The console: lines in, lines out.

use core::fmt;

use crate::sys::{self, Errno, STDIN, STDOUT};

/// Longest request, with its newline; the kernel's own limit for a line is 4096.
const LINE_MAX: usize = 1024;
/// Longest answer, with its newline.
const REPLY_MAX: usize = 2048;

const TCGETS: u32 = 0x5401;
const TCSETS: u32 = 0x5402;
const TCSBRK: u32 = 0x5409;

/// `c_iflag`: a carriage return reads as a newline.
const ICRNL: u32 = 0o400;
/// `c_lflag`: the kernel collects whole lines, so that the agent wakes once a request.
const ICANON: u32 = 0o2;

/// The kernel's `struct termios`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Termios {
    iflag: u32,
    oflag: u32,
    cflag: u32,
    lflag: u32,
    line: u8,
    control: [u8; 19],
}

/// The console, set up for requests: no echo, no signals, newlines sent as they are.
#[derive(Clone, Copy)]
pub struct Console {
    /// The settings for people, as the kernel had them.
    cooked: Termios,
}

impl Console {
    /// Takes the console over. Without one, answers go nowhere, and that is all.
    pub fn open() -> Self {
        let mut cooked = Termios::default();
        // SAFETY: TCGETS fills a `struct termios`.
        let _ = unsafe { sys::ioctl(STDIN, TCGETS, &mut cooked) };
        let console = Self { cooked };
        console.for_requests();
        console
    }

    /// Settings for requests.
    pub fn for_requests(&self) {
        let mut raw = Termios { iflag: ICRNL, oflag: 0, lflag: ICANON, ..self.cooked };
        // SAFETY: TCSETS reads a `struct termios`.
        let _ = unsafe { sys::ioctl(STDIN, TCSETS, &mut raw) };
    }

    /// Settings for people: echo, line editing, signals.
    pub fn for_people(&self) {
        let mut cooked = self.cooked;
        // SAFETY: TCSETS reads a `struct termios`.
        let _ = unsafe { sys::ioctl(STDIN, TCSETS, &mut cooked) };
    }

    /// Waits until the last byte has left the serial port.
    pub fn drain(&self) {
        let _ = sys::ioctl_number(STDOUT, TCSBRK, 1);
    }
}

/// Prints text as it is.
pub fn print(text: &str) {
    print_bytes(text.as_bytes());
}

fn print_bytes(mut bytes: &[u8]) {
    while let Ok(written @ 1..) = sys::write(STDOUT, bytes) {
        bytes = &bytes[written.min(bytes.len())..];
        if bytes.is_empty() {
            break;
        }
    }
}

/// Collects the bytes of a request.
pub struct Line {
    bytes: [u8; LINE_MAX],
}

impl Line {
    /// An empty line.
    pub const fn new() -> Self {
        Self { bytes: [0; LINE_MAX] }
    }

    /// Waits for a line. `None`: it is empty, too long, or not text.
    pub fn read(&mut self) -> Result<Option<&str>, Errno> {
        let mut length = 0;
        let mut too_long = false;
        // One read returns a whole line, unless it is longer than the buffer.
        loop {
            let count = sys::read(STDIN, &mut self.bytes[length..])?;
            length += count;
            if count == 0 || self.bytes[length - 1] == b'\n' {
                break;
            }
            if length == LINE_MAX {
                (too_long, length) = (true, 0);
            }
        }
        if too_long {
            print("agent: request too long\n");
            return Ok(None);
        }
        let text = core::str::from_utf8(&self.bytes[..length]).unwrap_or("").trim_ascii();
        Ok((!text.is_empty()).then_some(text))
    }
}

/// An answer: the request's token, then `ok` or `error` and what there is to say.
pub struct Reply {
    bytes: [u8; REPLY_MAX],
    token: usize,
    length: usize,
}

impl Reply {
    /// The answer to the request `token`, so far `ok`.
    pub fn new(token: &str) -> Self {
        let mut reply = Self { bytes: [0; REPLY_MAX], token: 0, length: 0 };
        reply.push(token);
        reply.token = reply.length;
        reply.push(" ok ");
        reply
    }

    /// A line of a program's output, on behalf of the request `token`.
    pub fn output(token: &str, text: &str) -> Self {
        let mut line = Self { bytes: [0; REPLY_MAX], token: 0, length: 0 };
        for part in [token, " | ", text] {
            line.push(part);
        }
        line
    }

    /// The token this answers.
    pub fn token(&self) -> &str {
        core::str::from_utf8(&self.bytes[..self.token]).unwrap_or("")
    }

    /// Forgets what was said and answers `error` with `reason`.
    pub fn fail(&mut self, reason: &dyn fmt::Display) {
        self.length = self.token;
        let _ = fmt::Write::write_fmt(self, format_args!(" error {reason}"));
    }

    /// Adds text; what does not fit is cut.
    pub fn push(&mut self, text: &str) {
        let room = REPLY_MAX - 1 - self.length;
        let taken = &text.as_bytes()[..text.len().min(room)];
        self.bytes[self.length..self.length + taken.len()].copy_from_slice(taken);
        self.length += taken.len();
    }

    /// Sends it, as one line in one write.
    pub fn send(&mut self) {
        while self.bytes[..self.length].ends_with(b" ") {
            self.length -= 1;
        }
        self.bytes[self.length] = b'\n';
        print_bytes(&self.bytes[..=self.length]);
    }
}

impl fmt::Write for Reply {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.push(text);
        Ok(())
    }
}
