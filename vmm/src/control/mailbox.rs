//! How other threads reach the main one.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::work::WorkMessage;
use crate::vcpu::VcpuEvent;

/// What the main thread is told.
pub enum Message {
    /// A vCPU cannot go on.
    Vcpu(VcpuEvent),
    /// The guest asked for a reset.
    GuestReset,
    /// The guest powered off.
    GuestPowerOff,
    /// A QMP client wants something.
    Qmp(qmp::Request),
    /// A snapshot job needs something, or is over.
    Work(WorkMessage),
}

/// The sending end; clones reach the same main thread.
#[derive(Clone)]
pub struct Mailbox {
    messages: Sender<Message>,
    wake: Arc<EventFd>,
}

/// The main thread's end.
pub struct Inbox {
    messages: Receiver<Message>,
    wake: Arc<EventFd>,
}

/// Makes both ends.
///
/// # Errors
/// The host is out of descriptors.
pub fn mailbox() -> io::Result<(Mailbox, Inbox)> {
    let (sender, receiver) = channel();
    let wake = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
    Ok((Mailbox { messages: sender, wake: Arc::clone(&wake) }, Inbox { messages: receiver, wake }))
}

impl Mailbox {
    /// Leaves a message. Once the main thread has ended nobody reads it, and that is fine: what
    /// a message asks for is of no use then.
    pub fn send(&self, message: Message) {
        if self.messages.send(message).is_ok() {
            // The only way to fail is a counter at its limit, which wakes the reader too.
            let _ = self.wake.write(1);
        }
    }
}

impl Inbox {
    /// The next message, if there is one.
    pub fn next(&self) -> Option<Message> {
        self.messages.try_recv().ok()
    }

    /// Waits for the next message; `None` once nobody can send any.
    pub fn wait(&self) -> Option<Message> {
        self.messages.recv().ok()
    }

    /// Takes back the wake-up. To be called before the messages are read, so that one that comes
    /// meanwhile wakes again.
    pub fn acknowledge(&self) {
        // Empty if it was woken for nothing.
        let _ = self.wake.read();
    }
}

impl AsRawFd for Inbox {
    fn as_raw_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}
