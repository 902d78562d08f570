//! How other threads reach the main one.
//!
//! What the guest asks for concerns the guest that asked. One that resets itself tries several ways
//! at once, and a load can come just after; so a message of a guest whose state has been replaced
//! meanwhile is dropped.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use devices::virtio::block::Failure;
use snapshot::Notice;

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
    /// A disk's request failed on the host.
    Disk {
        /// The disk's slot.
        slot: usize,
        /// What failed, and what is done about it.
        failure: Failure,
    },
    /// A disk may have another size.
    DiskSize,
    /// Of the RAM that is missing after a lazy load.
    Missing {
        /// Which load: [`crate::machine::missing::Missing::id`].
        id: u64,
        /// What there is to tell.
        notice: Notice,
    },
    /// A snapshot job needs something, or is over.
    Work(WorkMessage),
}

struct Envelope {
    /// Which guest it is from; none where it is not from the guest.
    guest: Option<u64>,
    message: Message,
}

/// The sending end; clones reach the same main thread.
#[derive(Clone)]
pub struct Mailbox {
    messages: Sender<Envelope>,
    wake: Arc<EventFd>,
    guest: Arc<AtomicU64>,
}

/// The main thread's end.
pub struct Inbox {
    messages: Receiver<Envelope>,
    wake: Arc<EventFd>,
    /// Counts the guests that were put on this machine: boots, resets, loads.
    guest: Arc<AtomicU64>,
}

/// Makes both ends.
///
/// # Errors
/// The host is out of descriptors.
pub fn mailbox() -> io::Result<(Mailbox, Inbox)> {
    let (sender, receiver) = channel();
    let wake = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
    let guest = Arc::new(AtomicU64::new(0));
    let mailbox = Mailbox { messages: sender, wake: Arc::clone(&wake), guest: Arc::clone(&guest) };
    Ok((mailbox, Inbox { messages: receiver, wake, guest }))
}

impl Mailbox {
    /// Leaves a message. Once the main thread has ended nobody reads it, and that is fine: what
    /// a message asks for is of no use then.
    pub fn send(&self, message: Message) {
        self.post(Envelope { guest: None, message });
    }

    /// As [`Mailbox::send`], for the guest that runs now. To be called by a vCPU's thread.
    pub fn send_of_guest(&self, message: Message) {
        self.post(Envelope { guest: Some(self.guest()), message });
    }

    /// Which guest runs now; another number after each boot, reset and load.
    pub fn guest(&self) -> u64 {
        self.guest.load(Ordering::Acquire)
    }

    fn post(&self, envelope: Envelope) {
        if self.messages.send(envelope).is_ok() {
            // The only way to fail is a counter at its limit, which wakes the reader too.
            let _ = self.wake.write(1);
        }
    }
}

impl Inbox {
    /// The next message, if there is one.
    pub fn next(&self) -> Option<Message> {
        while let Ok(envelope) = self.messages.try_recv() {
            if self.is_valid(&envelope) {
                return Some(envelope.message);
            }
        }
        None
    }

    /// Waits for the next message; `None` once nobody can send any.
    pub fn wait(&self) -> Option<Message> {
        while let Ok(envelope) = self.messages.recv() {
            if self.is_valid(&envelope) {
                return Some(envelope.message);
            }
        }
        None
    }

    /// Another guest takes the place of the one there was. To be called while the vCPUs are paused,
    /// so that none of them is sending.
    pub fn guest_replaced(&self) {
        self.guest.fetch_add(1, Ordering::AcqRel);
    }

    fn is_valid(&self, envelope: &Envelope) -> bool {
        envelope.guest.is_none_or(|guest| guest == self.guest.load(Ordering::Acquire))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_former_guest_asked_for_is_dropped_and_the_rest_is_not() {
        let (mailbox, inbox) = mailbox().unwrap();
        mailbox.send_of_guest(Message::GuestReset);
        mailbox.send_of_guest(Message::GuestReset);
        mailbox.send(Message::Vcpu(VcpuEvent::TripleFault));
        assert!(matches!(inbox.next(), Some(Message::GuestReset)));
        inbox.guest_replaced();
        mailbox.send_of_guest(Message::GuestPowerOff);
        assert!(matches!(inbox.next(), Some(Message::Vcpu(VcpuEvent::TripleFault))));
        assert!(matches!(inbox.wait(), Some(Message::GuestPowerOff)));
        assert!(inbox.next().is_none());
    }
}
