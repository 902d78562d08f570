//! The commands there are, and how a request becomes an answer.

use core::ptr::addr_of_mut;

use crate::args::Args;
use crate::buffer::Buffer;
use crate::console::{Console, Reply};
use crate::error::Error;
use crate::load::Load;
use crate::memory::Region;
use crate::power::After;
use crate::{clock, disk, ext4, files, load, memory, power, process};

/// What the agent remembers between requests.
pub struct Agent {
    /// Where data passes through.
    pub buffer: &'static mut Buffer,
    /// The memory of `dirty`.
    pub memory: Option<Region>,
    /// The processes of `load`.
    pub load: Load,
    /// File systems of the kernel that are mounted already.
    pub mounts: files::Mounts,
    /// What to do once the answer is out.
    pub after: After,
    /// The terminal.
    pub console: Console,
}

impl Agent {
    /// The agent of this guest; `run` makes the only one.
    pub fn new(console: Console) -> Self {
        static mut BUFFER: Buffer = Buffer::new();
        // SAFETY: called once, so this is the only reference to it.
        let buffer = unsafe { &mut *addr_of_mut!(BUFFER) };
        Self {
            buffer,
            memory: None,
            load: Load::new(),
            mounts: files::Mounts::default(),
            after: After::GoOn,
            console,
        }
    }
}

type Handler = fn(&mut Agent, Args, &mut Reply) -> Result<(), Error>;

/// Name and handler of every command, in the order of `docs/guest.md`.
const COMMANDS: &[(&str, Handler)] = &[
    ("echo", echo),
    ("help", help),
    ("cpus", clock::cpus),
    ("clock", clock::clock),
    ("uptime", clock::uptime),
    ("rng", disk::rng),
    ("size", disk::size),
    ("sum", disk::sum),
    ("pattern", disk::pattern),
    ("verify", disk::verify),
    ("flush", disk::flush),
    ("discard", disk::discard),
    ("zero", disk::zero),
    ("mkfs", ext4::mkfs),
    ("mount", files::mount),
    ("umount", files::umount),
    ("write-file", files::write_file),
    ("verify-file", files::verify_file),
    ("sum-file", files::sum_file),
    ("write-text", files::write_text),
    ("read-text", files::read_text),
    ("sync", files::sync),
    ("drop-caches", files::drop_caches),
    ("dirty", memory::dirty),
    ("check-memory", memory::check),
    ("load", load::load),
    ("exec", process::exec),
    ("shell", process::shell),
    ("poweroff", power::poweroff),
    ("reboot", power::reboot),
];

/// Answers the request `line`: a token of the client's choice, a command, its arguments.
pub fn answer(agent: &mut Agent, line: &str) {
    let mut args = Args::new(line);
    let token = args.word("").unwrap_or("");
    let mut reply = Reply::new(token);
    if let Err(error) = perform(agent, args, &mut reply) {
        reply.fail(&error);
    }
    reply.send();
    power::act(agent);
}

fn perform(agent: &mut Agent, mut args: Args, reply: &mut Reply) -> Result<(), Error> {
    let name = args.word("command expected after the token")?;
    let handler = COMMANDS.iter().find(|(known, _)| *known == name);
    let (_, handler) = handler.ok_or(Error::Request("unknown command"))?;
    handler(agent, args, reply)
}

fn echo(_: &mut Agent, args: Args, reply: &mut Reply) -> Result<(), Error> {
    reply.push(args.rest());
    Ok(())
}

fn help(_: &mut Agent, args: Args, reply: &mut Reply) -> Result<(), Error> {
    args.end()?;
    for (name, _) in COMMANDS {
        reply.push(name);
        reply.push(" ");
    }
    Ok(())
}
