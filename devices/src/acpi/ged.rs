//! The Generic Event Device (ACPI 6.5, 5.6.9): one interrupt for events that the guest's ACPI
//! interpreter passes on as notifications.
//!
//! ```text
//!   raise ──> pending ──> interrupt ──> _EVT reads the register, which empties it ──> Notify
//! ```
//!
//! An event that is not read yet is part of the state, so that a save in between does not lose it.

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::InterruptLine;

/// Bytes of the register.
pub const REGISTER_LEN: u64 = 4;

/// What a guest can be told. The discriminant is the bit in the register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Event {
    /// The VM generation id is another.
    Generation = 1 << 0,
    /// Somebody pressed the power button.
    PowerButton = 1 << 1,
}

/// All events there are.
const ALL: u32 = Event::Generation as u32 | Event::PowerButton as u32;

/// The device: a register of 32 bits with a bit for each event, emptied when it is read.
pub struct EventDevice {
    pending: u32,
    line: Arc<dyn InterruptLine>,
}

/// What to save.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventState {
    /// Events that the guest has not read.
    pub pending: u32,
}

impl EventState {
    /// Version of the struct.
    pub const VERSION: u32 = 1;
}

/// A state that no machine of this kind can have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("events {0:#x} are pending; there are only {ALL:#x}")]
pub struct UnknownEvents(u32);

impl EventDevice {
    /// A device that asks for its interrupt through `line`.
    pub fn new(line: Arc<dyn InterruptLine>) -> Self {
        Self { pending: 0, line }
    }

    /// Tells the guest of an event.
    ///
    /// # Errors
    /// The interrupt cannot be raised; the event is pending all the same.
    pub fn raise(&mut self, event: Event) -> io::Result<()> {
        self.pending |= event as u32;
        self.line.trigger()
    }

    /// Raises the interrupt again if the guest has not read all events. What was raised before may
    /// have been on its way to the interrupt chip when the state of that was taken.
    ///
    /// # Errors
    /// The interrupt cannot be raised.
    pub fn resume(&self) -> io::Result<()> {
        if self.pending == 0 { Ok(()) } else { self.line.trigger() }
    }

    /// The guest reads from `offset` bytes within the register. A read of its first byte empties it:
    /// guests read it whole.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        let bytes = self.pending.to_le_bytes();
        let from = usize::try_from(offset).ok().and_then(|at| bytes.get(at..)).unwrap_or_default();
        data.fill(0);
        for (byte, register) in data.iter_mut().zip(from) {
            *byte = *register;
        }
        if offset == 0 {
            self.pending = 0;
        }
    }

    /// What to save.
    pub fn state(&self) -> EventState {
        EventState { pending: self.pending }
    }

    /// Takes over a saved state.
    ///
    /// # Errors
    /// It has events that there are not; nothing is changed.
    pub fn restore(&mut self, state: &EventState) -> Result<(), UnknownEvents> {
        if state.pending & !ALL != 0 {
            return Err(UnknownEvents(state.pending));
        }
        self.pending = state.pending;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::EventFdLine;

    fn device() -> (EventDevice, Arc<EventFdLine>) {
        let line = Arc::new(EventFdLine::new().unwrap());
        (EventDevice::new(line.clone()), line)
    }

    fn read(device: &mut EventDevice) -> u32 {
        let mut bytes = [0xff; 4];
        device.read(0, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn events_gather_until_the_guest_reads_them_and_each_raises_the_line() {
        let (mut device, line) = device();
        assert_eq!(read(&mut device), 0);
        device.raise(Event::Generation).unwrap();
        device.raise(Event::PowerButton).unwrap();
        assert_eq!(line.event_fd().read().unwrap(), 2);
        assert_eq!(read(&mut device), 3);
        assert_eq!(read(&mut device), 0);
    }

    #[test]
    fn a_resume_raises_the_line_only_where_something_is_unread() {
        let (mut device, line) = device();
        device.resume().unwrap();
        assert!(line.event_fd().read().is_err());
        device.raise(Event::Generation).unwrap();
        line.event_fd().read().unwrap();
        device.resume().unwrap();
        assert_eq!(line.event_fd().read().unwrap(), 1);
        read(&mut device);
        device.resume().unwrap();
        assert!(line.event_fd().read().is_err());
    }

    #[test]
    fn a_read_of_any_shape_stays_within_the_register() {
        let (mut device, _) = device();
        device.raise(Event::PowerButton).unwrap();
        let mut byte = [0xff];
        device.read(3, &mut byte);
        assert_eq!(byte, [0]);
        let mut long = [0xff; 8];
        device.read(u64::MAX - 3, &mut long[..3]);
        assert_eq!(long[..3], [0; 3]);
        device.read(0, &mut long);
        assert_eq!(long, [2, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn save_mutate_restore_save_is_equal_and_unknown_events_are_refused() {
        let (mut device, _) = device();
        device.raise(Event::Generation).unwrap();
        let saved = device.state();
        read(&mut device);
        device.restore(&saved).unwrap();
        assert_eq!(device.state(), saved);
        let error = device.restore(&EventState { pending: 5 }).unwrap_err();
        assert_eq!(error.to_string(), "events 0x5 are pending; there are only 0x3");
        assert_eq!(device.state(), saved);
    }
}
