//! How a device asks for an interrupt.

use std::io;

use vmm_sys_util::eventfd::EventFd;

/// An edge-triggered interrupt line.
///
/// `trigger` is called from vCPU threads and from device threads, and must not block.
pub trait InterruptLine: Send + Sync {
    /// Sends one edge. Edges that the guest has not seen yet may merge into one.
    fn trigger(&self) -> io::Result<()>;
}

/// A line whose edges are writes to an eventfd, for the machine to register as an irqfd.
#[derive(Debug)]
pub struct EventFdLine(EventFd);

impl EventFdLine {
    /// Makes the line with a new, non-blocking eventfd.
    pub fn new() -> io::Result<Self> {
        Ok(Self(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?))
    }

    /// The eventfd to register.
    pub fn event_fd(&self) -> &EventFd {
        &self.0
    }
}

impl InterruptLine for EventFdLine {
    fn trigger(&self) -> io::Result<()> {
        signal(&self.0)
    }
}

/// Adds one to an eventfd. A counter that is full has been signalled already.
pub(crate) fn signal(fd: &EventFd) -> io::Result<()> {
    match fd.write(1) {
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trigger_of_a_saturated_eventfd_is_not_an_error() {
        let line = EventFdLine::new().unwrap();
        line.event_fd().write(u64::MAX - 1).unwrap();
        line.trigger().unwrap();
        assert_eq!(line.event_fd().read().unwrap(), u64::MAX - 1);
    }
}
