//! The keyboard controller, of which only the CPU reset line is there.
//!
//! Reads of the status register answer "output buffer full, input buffer empty" for ever. Linux's
//! probe (i8042_flush) then finds no controller after 16 reads, where an idle controller without
//! keyboard costs it seconds of timeouts; its reboot code (kb_wait) goes on at once because the
//! input buffer is empty.

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_superio::I8042Device;

use super::Line;
use crate::InterruptLine;

/// Offset of the status register from the base port 0x60.
const STATUS: u8 = 4;
/// All bits but bit 1, "input buffer full".
const STATUS_VALUE: u8 = 0xfd;
/// What a port without a device reads as.
const FLOATING: u8 = 0xff;

/// The i8042. Ports 0x60 and 0x64 are its offsets 0 and 4.
pub struct I8042 {
    inner: I8042Device<Line>,
}

/// The i8042 has nothing to save; the struct is here for what it may get.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct I8042State {}

impl I8042State {
    /// Version of the struct.
    pub const VERSION: u32 = 1;
}

impl I8042 {
    /// `reset` is triggered, on the vCPU's thread, when the guest pulls the reset line.
    pub fn new(reset: Arc<dyn InterruptLine>) -> Self {
        Self { inner: I8042Device::new(Line(reset)) }
    }

    /// Reads the register at `offset` bytes from port 0x60.
    pub fn read(&self, offset: u8) -> u8 {
        if offset == STATUS { STATUS_VALUE } else { FLOATING }
    }

    /// Writes the register at `offset` bytes from port 0x60. Fails only if `reset` cannot be
    /// triggered.
    pub fn write(&mut self, offset: u8, value: u8) -> io::Result<()> {
        self.inner.write(offset, value)
    }

    /// What to save.
    pub fn state(&self) -> I8042State {
        I8042State {}
    }

    /// Takes over a saved state.
    pub fn restore(&mut self, _state: &I8042State) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::EventFdLine;

    fn device() -> (I8042, Arc<EventFdLine>) {
        let line = Arc::new(EventFdLine::new().unwrap());
        (I8042::new(line.clone()), line)
    }

    #[test]
    fn reset_command_triggers_the_line_and_nothing_else_does() {
        let (mut dev, line) = device();
        for value in 0..=u8::MAX {
            dev.write(0, value).unwrap();
            if value != 0xfe {
                dev.write(4, value).unwrap();
            }
        }
        assert!(line.event_fd().read().is_err());
        dev.write(4, 0xfe).unwrap();
        assert_eq!(line.event_fd().read().unwrap(), 1);
    }

    #[test]
    fn probe_sees_a_stuck_controller_and_reboot_sees_an_empty_input_buffer() {
        let (dev, _) = device();
        for _ in 0..32 {
            assert_eq!(dev.read(4) & 0x01, 0x01);
            assert_eq!(dev.read(0), 0xff);
        }
        assert_eq!(dev.read(4) & 0x02, 0);
    }

    #[test]
    fn save_mutate_restore_save_is_equal() {
        let (mut dev, _) = device();
        let saved = dev.state();
        dev.write(4, 0xd1).unwrap();
        dev.restore(&saved);
        assert_eq!(dev.state(), saved);
    }
}
