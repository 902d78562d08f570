//! The 16550 console: vm-superio's UART behind our interrupt line, with an input buffer in front of
//! the FIFO and a state that serialises.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_superio::serial::{Error as UartError, NoEvents};
use vmm_sys_util::eventfd::EventFd;

use super::Line;
use crate::InterruptLine;
use crate::interrupt::signal;

/// Where the guest's output goes.
pub type Output = Box<dyn Write + Send>;

/// Bytes of input kept while the guest does not read.
pub(crate) const INPUT_BUFFER_SIZE: usize = 4096;

/// Bytes of the UART's own FIFO in vm-superio.
const FIFO_SIZE: usize = 64;

const LSR_DATA_READY: u8 = 0x01;
const IER_VALID: u8 = 0x0f;

/// Why a serial port could not do something. Only [`SerialError::State`] comes from outside.
#[derive(Debug, thiserror::Error)]
pub enum SerialError {
    /// The interrupt line failed.
    #[error("serial: interrupt cannot be triggered: {0}")]
    Interrupt(#[source] io::Error),
    /// The output failed; the byte is lost.
    #[error("serial: output cannot be written: {0}")]
    Output(#[source] io::Error),
    /// A saved state breaks a rule of the device.
    #[error("serial state: {0}")]
    State(&'static str),
}

impl From<UartError<io::Error>> for SerialError {
    fn from(e: UartError<io::Error>) -> Self {
        match e {
            UartError::Trigger(e) => Self::Interrupt(e),
            UartError::IOError(e) => Self::Output(e),
            UartError::FullFifo => Self::State("FIFO holds more than it can"),
        }
    }
}

/// The registers of a 16550 and the input it holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names are the data sheet's")]
pub struct SerialState {
    pub baud_divisor_low: u8,
    pub baud_divisor_high: u8,
    pub interrupt_enable: u8,
    pub interrupt_identification: u8,
    pub line_control: u8,
    pub line_status: u8,
    pub modem_control: u8,
    pub modem_status: u8,
    pub scratch: u8,
    /// The receive FIFO, oldest byte first.
    #[serde(with = "serde_bytes")]
    pub fifo: Vec<u8>,
    /// Input that the FIFO had no room for, oldest byte first.
    #[serde(with = "serde_bytes")]
    pub input: Vec<u8>,
}

impl SerialState {
    /// Version of the struct.
    pub const VERSION: u32 = 1;

    fn check(&self) -> Result<(), SerialError> {
        let rules = [
            (self.fifo.len() <= FIFO_SIZE, "FIFO holds more than it can"),
            (self.input.len() <= INPUT_BUFFER_SIZE, "more input waits than the buffer holds"),
            (self.interrupt_enable & !IER_VALID == 0, "reserved interrupt enable bits are set"),
            (
                (self.line_status & LSR_DATA_READY != 0) != self.fifo.is_empty(),
                "data-ready bit does not agree with the FIFO",
            ),
        ];
        match rules.iter().find(|(holds, _)| !holds) {
            Some((_, rule)) => Err(SerialError::State(rule)),
            None => Ok(()),
        }
    }

    fn uart(&self) -> vm_superio::SerialState {
        vm_superio::SerialState {
            baud_divisor_low: self.baud_divisor_low,
            baud_divisor_high: self.baud_divisor_high,
            interrupt_enable: self.interrupt_enable,
            interrupt_identification: self.interrupt_identification,
            line_control: self.line_control,
            line_status: self.line_status,
            modem_control: self.modem_control,
            modem_status: self.modem_status,
            scratch: self.scratch,
            in_buffer: self.fifo.clone(),
        }
    }
}

/// A serial port. Offsets are bytes from its base I/O port (0x3f8 for the first).
///
/// Input that the FIFO cannot take waits in a buffer of [`INPUT_BUFFER_SIZE`] bytes and moves on as
/// the guest reads. Output is written by the thread that calls [`Serial::write`], which is a vCPU:
/// the writer must not block for long.
pub struct Serial {
    uart: vm_superio::Serial<Line, NoEvents, WatchedOutput>,
    line: Line,
    input: VecDeque<u8>,
    room: Option<EventFd>,
}

/// Output that logs its first failure, and the next only after it has worked again: a guest must
/// not be able to fill the log.
struct WatchedOutput {
    inner: Output,
    failing: bool,
}

impl WatchedOutput {
    fn new(inner: Output) -> Self {
        Self { inner, failing: false }
    }

    fn watch<T>(&mut self, result: io::Result<T>) -> io::Result<T> {
        if let Err(error) = &result
            && !self.failing
        {
            tracing::warn!(%error, "guest output is lost");
        }
        self.failing = result.is_err();
        result
    }
}

impl Write for WatchedOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let result = self.inner.write(bytes);
        self.watch(result)
    }

    fn flush(&mut self) -> io::Result<()> {
        // What a flush says of an output that fails is no sign that it works again.
        let result = self.inner.flush();
        if self.failing { result } else { self.watch(result) }
    }
}

impl Serial {
    /// A port in its reset state. `room` is signalled whenever a full input buffer has room again.
    pub fn new(line: Arc<dyn InterruptLine>, output: Output, room: Option<EventFd>) -> Self {
        let line = Line(line);
        Self {
            uart: vm_superio::Serial::new(line.clone(), WatchedOutput::new(output)),
            line,
            input: VecDeque::new(),
            room,
        }
    }

    /// Reads a register.
    pub fn read(&mut self, offset: u8) -> u8 {
        let value = self.uart.read(offset);
        self.fill_fifo();
        value
    }

    /// Writes a register. A failing output or interrupt line is logged: the guest cannot do anything
    /// about it.
    pub fn write(&mut self, offset: u8, value: u8) {
        match self.uart.write(offset, value).map_err(SerialError::from) {
            // The output has told of its failure.
            Ok(()) | Err(SerialError::Output(_)) => {}
            Err(error) => tracing::error!(%error, "serial: register write"),
        }
        self.fill_fifo();
    }

    /// How many bytes [`Serial::enqueue_input`] takes now.
    pub fn input_room(&self) -> usize {
        INPUT_BUFFER_SIZE.saturating_sub(self.input.len())
    }

    /// Takes input for the guest; returns how many bytes were taken. Offer the rest when the `room`
    /// event fires.
    pub fn enqueue_input(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(self.input_room());
        self.input.extend(bytes.iter().take(taken));
        self.fill_fifo();
        taken
    }

    /// Moves input into the FIFO as far as it has room. In loopback mode it takes none.
    fn fill_fifo(&mut self) {
        if self.input.is_empty() {
            return;
        }
        let was_full = self.input_room() == 0;
        while self.uart.fifo_capacity() > 0 && !self.input.is_empty() {
            // A ring buffer is at most two slices, so this ends after two rounds.
            let (first, _) = self.input.as_slices();
            let taken = match self.uart.enqueue_raw_bytes(first) {
                Ok(taken) => taken,
                Err(UartError::Trigger(error)) => {
                    // The bytes are in the FIFO, the guest has just not been told.
                    tracing::warn!(%error, "serial: interrupt cannot be triggered");
                    break;
                }
                Err(_) => break,
            };
            if taken == 0 {
                break;
            }
            self.input.drain(..taken);
        }
        if was_full && self.input_room() > 0 {
            self.signal_room();
        }
    }

    fn signal_room(&self) {
        if let Some(Err(error)) = self.room.as_ref().map(signal) {
            tracing::warn!(%error, "serial: input event cannot be signalled");
        }
    }

    /// What to save.
    pub fn state(&self) -> SerialState {
        let uart = self.uart.state();
        SerialState {
            baud_divisor_low: uart.baud_divisor_low,
            baud_divisor_high: uart.baud_divisor_high,
            interrupt_enable: uart.interrupt_enable,
            interrupt_identification: uart.interrupt_identification,
            line_control: uart.line_control,
            line_status: uart.line_status,
            modem_control: uart.modem_control,
            modem_status: uart.modem_status,
            scratch: uart.scratch,
            fifo: uart.in_buffer,
            input: self.input.iter().copied().collect(),
        }
    }

    /// Replaces everything but the output, and raises a pending interrupt again: its injection may
    /// have been under way when the state was taken. A refused state changes nothing.
    pub fn restore(&mut self, state: &SerialState) -> Result<(), SerialError> {
        state.check()?;
        self.replace_uart(&state.uart())?;
        let was_full = self.input_room() == 0;
        self.input = state.input.iter().copied().collect();
        if was_full && self.input_room() > 0 {
            self.signal_room();
        }
        Ok(())
    }

    /// Machine reset: registers and FIFO as at power-on. Input still in the buffer is kept, as the
    /// other end of a real line would keep what it has not sent yet.
    pub fn reset(&mut self) -> Result<(), SerialError> {
        self.replace_uart(&vm_superio::SerialState::default())
    }

    fn replace_uart(&mut self, state: &vm_superio::SerialState) -> Result<(), SerialError> {
        // Triggers the interrupt if the state has one pending and enabled.
        let sink = WatchedOutput::new(Box::new(io::sink()));
        let mut uart = vm_superio::Serial::from_state(state, self.line.clone(), NoEvents, sink)?;
        std::mem::swap(uart.writer_mut(), self.uart.writer_mut());
        self.uart = uart;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
