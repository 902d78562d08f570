//! Other programs: busybox's.

use core::fmt::Write;
use core::ptr::null;

use crate::args::Args;
use crate::command::Agent;
use crate::console::Reply;
use crate::error::{During, Error};
use crate::sys::{self, Errno, Fd, O_RDWR};

/// Most words of an `exec`.
const WORDS_MAX: usize = 32;
/// Bytes for the words, with a NUL after each.
const TEXT_MAX: usize = 1024;
/// Status of a child that could not become the program; the shells' convention.
const NOT_FOUND: u8 = 127;

const TIOCSCTTY: u32 = 0x540e;

const BUSYBOX: &core::ffi::CStr = c"/bin/busybox";
const ENVIRONMENT: &[&core::ffi::CStr] =
    &[c"PATH=/bin", c"HOME=/", c"TERM=vt100", c"PS1=guest:\\w# "];

/// `exec <words>`: runs `busybox <words>`, sends each line of its output as `<token> | <line>`,
/// then answers with its exit status.
pub fn exec(agent: &mut Agent, args: Args, reply: &mut Reply) -> Result<(), Error> {
    let mut text = [0; TEXT_MAX];
    let argv = split(args, &mut text)?;
    agent.mounts.need_all()?;
    let (output, input) = sys::pipe().during("pipe")?;
    let pid = match sys::fork().during("fork")? {
        None => {
            for stream in [1, 2] {
                let _ = sys::duplicate(input.raw(), stream);
            }
            become_busybox(&argv)
        }
        Some(pid) => pid,
    };
    drop(input);
    relay(agent, &output, reply.token())?;
    let status = sys::wait_for(pid).during("wait")?;
    reap(agent);
    // The wait status: the low seven bits are a signal, else the second byte is the exit status.
    match status & 0x7f {
        0 => write!(reply, "status={}", status >> 8 & 0xff),
        signal => write!(reply, "signal={signal}"),
    }
    .map_err(|_| Error::State("answer too long"))
}

/// Sends what comes from `output` line by line; a line longer than the buffer is sent in parts.
fn relay(agent: &mut Agent, output: &Fd, token: &str) -> Result<(), Error> {
    const LINE: usize = 1024;
    let mut held = 0;
    loop {
        let bytes = agent.buffer.first(LINE as u64);
        let count = output.read(&mut bytes[held..]).during("read")?;
        held += count;
        while held > 0 {
            let newline = bytes[..held].iter().position(|byte| *byte == b'\n');
            let end = match newline {
                Some(end) => end,
                None if count == 0 || held == LINE => held,
                None => break,
            };
            let text = core::str::from_utf8(&bytes[..end]).unwrap_or("(not text)");
            Reply::output(token, text).send();
            let next = end + usize::from(newline.is_some());
            bytes.copy_within(next..held, 0);
            held -= next;
        }
        if count == 0 {
            return Ok(());
        }
    }
}

/// `shell`: hands the console to a busybox shell until it ends.
pub fn shell(agent: &mut Agent, args: Args, reply: &mut Reply) -> Result<(), Error> {
    args.end()?;
    agent.mounts.need_all()?;
    agent.console.for_people();
    let status = run_shell().during("shell");
    agent.console.for_requests();
    reap(agent);
    let _ = write!(reply, "status={}", status? >> 8 & 0xff);
    Ok(())
}

/// Takes note of what programs left behind, unless that would also take a worker's end.
fn reap(agent: &Agent) {
    if agent.load.is_idle() {
        sys::reap_orphans();
    }
}

fn run_shell() -> Result<u32, Errno> {
    let Some(pid) = sys::fork()? else {
        // Job control needs the terminal itself: /dev/console cannot be a controlling terminal.
        let _ = sys::new_session();
        if let Ok(terminal) = Fd::open(c"/dev/ttyS0", O_RDWR) {
            let _ = sys::ioctl_number(terminal.raw(), TIOCSCTTY, 0);
            for stream in 0..3 {
                let _ = sys::duplicate(terminal.raw(), stream);
            }
        }
        become_busybox(&[BUSYBOX.as_ptr().cast(), c"sh".as_ptr().cast(), null()])
    };
    sys::wait_for(pid)
}

fn become_busybox(argv: &[*const u8]) -> ! {
    let mut environment = [null(); ENVIRONMENT.len() + 1];
    for (pointer, variable) in environment.iter_mut().zip(ENVIRONMENT) {
        *pointer = variable.as_ptr().cast();
    }
    // SAFETY: every word is NUL-terminated, and both lists end with a null pointer.
    let _ = unsafe { sys::exec(BUSYBOX, argv, &environment) };
    sys::exit(NOT_FOUND)
}

/// The argument list `busybox <words>`, its text in `text`.
fn split(mut args: Args, text: &mut [u8; TEXT_MAX]) -> Result<[*const u8; WORDS_MAX + 2], Error> {
    let mut argv = [null(); WORDS_MAX + 2];
    argv[0] = BUSYBOX.as_ptr().cast();
    let mut used = 0;
    for slot in argv.iter_mut().take(WORDS_MAX + 1).skip(1) {
        if args.is_empty() {
            break;
        }
        let word = args.word("command expected")?.as_bytes();
        // At least one zero stays behind each word.
        let room = text.get_mut(used..).filter(|room| room.len() > word.len());
        let room = room.ok_or(Error::Request("too long"))?;
        room[..word.len()].copy_from_slice(word);
        *slot = room.as_ptr();
        used += word.len() + 1;
    }
    if used == 0 {
        return Err(Error::Request("command expected"));
    }
    args.end()?;
    Ok(argv)
}
