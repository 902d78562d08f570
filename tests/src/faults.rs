//! Faults of the host's files in a program that knows nothing of it.
//!
//! The kernel holds each call by which the program reads, writes or flushes a file, and asks here what is
//! to become of it (seccomp's user notification): it goes on, or fails with an error, or the process is
//! killed in front of it. Calls are counted from [`Faults::watch`] on, those of the threads and kinds that are
//! asked for, on images. What goes by io_uring, as a guest's own requests do, is not seen.

use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

use crate::seccomp;

/// What a call does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Takes or gives back space, or changes the file's length.
    Space,
    /// Flushes.
    Flush,
}

/// All that changes a file.
pub const CHANGES: &[Kind] = &[Kind::Write, Kind::Space, Kind::Flush];

/// What is to become of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It fails with this error, and so many calls after it.
    Error(i32, u64),
    /// The process is killed, and the call is not made.
    Kill,
}

/// Which calls are counted, and which of them fail.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// The threads begin with one of these names.
    pub threads: &'static [&'static str],
    /// Kinds of calls.
    pub kinds: &'static [Kind],
    /// What becomes of one, or of some.
    pub fault: Option<Placed>,
}

/// A fault at its place.
#[derive(Debug, Clone, Copy)]
pub struct Placed {
    /// Calls count from the first one of this kind on. How many there are before that is the guest's: pages of RAM.
    pub from: Option<Kind>,
    /// So many that count go well, then comes the fault.
    pub step: u64,
    /// What it is.
    pub fault: Fault,
}

/// A call that was counted.
#[derive(Debug, Clone)]
pub struct Call {
    /// What it does.
    pub kind: Kind,
    /// The file.
    pub file: PathBuf,
    /// Who makes it.
    pub thread: String,
    /// It did not go well.
    pub hit: bool,
}

#[derive(Default)]
struct Watched {
    plan: Option<Plan>,
    calls: Vec<Call>,
}

/// A program that is about to be started.
pub struct Supervisor {
    receiver: UnixStream,
}

/// A program that is supervised. Ends with it.
pub struct Faults {
    watched: Arc<Mutex<Watched>>,
    thread: Option<JoinHandle<()>>,
}

impl Supervisor {
    /// To be called right before the command is spawned.
    pub fn of(command: &mut Command) -> Self {
        let (receiver, sender) = UnixStream::pair().unwrap();
        let hand_over = move || {
            let listener = seccomp::listen()?;
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let listeners = [listener.as_fd()];
            control.push(SendAncillaryMessage::ScmRights(&listeners));
            let byte = [io::IoSlice::new(b"!")];
            rustix::net::sendmsg(&sender, &byte, &mut control, SendFlags::empty())?;
            Ok(())
        };
        // SAFETY: between fork and exec the function only makes system calls: it allocates nothing and
        // takes no lock.
        unsafe { command.pre_exec(hand_over) };
        Self { receiver }
    }

    /// To be called as soon as it runs: it waits for this.
    pub fn start(self) -> Faults {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        let bytes = &mut [io::IoSliceMut::new(&mut byte)];
        rustix::net::recvmsg(&self.receiver, bytes, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
        let listener = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        let listener = listener.expect("the program has not handed over its calls");
        let watched = Arc::default();
        let theirs = Arc::clone(&watched);
        let thread = std::thread::spawn(move || serve(&listener, &theirs));
        Faults { watched, thread: Some(thread) }
    }
}

impl Faults {
    /// Counts from now on.
    pub fn watch(&self, plan: Plan) {
        *self.watched.lock().unwrap() = Watched { plan: Some(plan), calls: Vec::new() };
    }

    /// Ends it; gives the calls that were counted.
    pub fn end(&self) -> Vec<Call> {
        std::mem::take(&mut *self.watched.lock().unwrap()).calls
    }
}

impl Drop for Faults {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Answers until the last thread of the program has ended.
fn serve(listener: &OwnedFd, watched: &Mutex<Watched>) {
    loop {
        let mut polled = [PollFd::new(listener, PollFlags::IN)];
        match rustix::event::poll(&mut polled, None) {
            Err(rustix::io::Errno::INTR) => continue,
            other => drop(other.unwrap()),
        }
        let ready = polled[0].revents();
        if ready.contains(PollFlags::IN) {
            answer(listener, watched);
        } else if ready.contains(PollFlags::HUP) {
            return;
        }
    }
}

/// Takes one call and says what is to become of it. Whoever made it may be gone at any time.
fn answer(listener: &OwnedFd, watched: &Mutex<Watched>) {
    // SAFETY: zero is a value of this struct of numbers, and the one the kernel asks for.
    let mut asked: libc::seccomp_notif = unsafe { std::mem::zeroed() };
    let (fd, receive) = (listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV);
    // SAFETY: the kernel writes one struct of that type, which lives during the call.
    if unsafe { libc::ioctl(fd, receive, &raw mut asked) } != 0 {
        return;
    }
    let mut given = libc::seccomp_notif_resp { id: asked.id, val: 0, error: 0, flags: 0 };
    match judge(&asked, watched) {
        None => given.flags = 1,
        Some(Fault::Error(errno, _)) => given.error = -errno,
        Some(Fault::Kill) => {
            // SAFETY: no memory is passed. The thread waits for an answer, so the id is its own.
            unsafe { libc::kill(i32::try_from(asked.pid).unwrap(), libc::SIGKILL) };
            return;
        }
    }
    // SAFETY: the kernel reads one struct of that type, which lives during the call.
    unsafe { libc::ioctl(fd, libc::SECCOMP_IOCTL_NOTIF_SEND, &raw mut given) };
}

/// What is to become of a call; `None` if it goes on.
fn judge(asked: &libc::seccomp_notif, watched: &Mutex<Watched>) -> Option<Fault> {
    let mut watched = watched.lock().unwrap();
    let plan = watched.plan?;
    let kind = kind_of(asked)?;
    if !plan.kinds.contains(&kind) {
        return None;
    }
    let thread = fs::read_to_string(format!("/proc/{}/comm", asked.pid)).ok()?.trim().to_owned();
    if !plan.threads.iter().any(|name| thread.starts_with(name)) {
        return None;
    }
    let file = fs::read_link(format!("/proc/{}/fd/{}", asked.pid, asked.data.args[0])).ok()?;
    if file.extension()? != "qcow2" {
        return None;
    }
    watched.calls.push(Call { kind, file, thread, hit: false });
    let Placed { from, step, fault } = plan.fault?;
    let first = watched.calls.iter().position(|call| from.is_none_or(|from| call.kind == from))?;
    let at = (watched.calls.len() - 1 - first) as u64;
    let hit = match fault {
        Fault::Error(_, times) => (step..step.saturating_add(times)).contains(&at),
        Fault::Kill => at == step,
    };
    watched.calls.last_mut()?.hit = hit;
    hit.then_some(fault)
}

fn kind_of(asked: &libc::seccomp_notif) -> Option<Kind> {
    match asked.data.nr.into() {
        // What is not in the page cache is read otherwise.
        libc::SYS_preadv2 if asked.data.args[5] & libc::RWF_NOWAIT as u64 != 0 => None,
        libc::SYS_pread64 | libc::SYS_preadv | libc::SYS_preadv2 => Some(Kind::Read),
        libc::SYS_fallocate | libc::SYS_ftruncate => Some(Kind::Space),
        libc::SYS_fsync | libc::SYS_fdatasync | libc::SYS_sync_file_range => Some(Kind::Flush),
        _ => Some(Kind::Write),
    }
}
