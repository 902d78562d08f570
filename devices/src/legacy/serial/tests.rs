use std::sync::Mutex;

use super::*;
use crate::EventFdLine;

const DATA: u8 = 0;
const IER: u8 = 1;
const IIR: u8 = 2;
const MCR: u8 = 4;
const LSR: u8 = 5;
const SCRATCH: u8 = 7;

#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Vec<u8>>>);

impl Write for Shared {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(buf);
        Ok(buf.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Broken;

impl Write for Broken {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn serial() -> (Serial, Arc<EventFdLine>, Shared, EventFd) {
    let line = Arc::new(EventFdLine::new().unwrap());
    let out = Shared::default();
    let room = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let serial = Serial::new(line.clone(), Box::new(out.clone()), Some(room.try_clone().unwrap()));
    (serial, line, out, room)
}

fn triggered(line: &EventFdLine) -> bool {
    line.event_fd().read().is_ok()
}

fn read_all(serial: &mut Serial) -> Vec<u8> {
    let mut got = Vec::new();
    while serial.read(LSR) & LSR_DATA_READY != 0 {
        got.push(serial.read(DATA));
        assert!(got.len() <= INPUT_BUFFER_SIZE + FIFO_SIZE);
    }
    got
}

#[test]
fn output_reaches_the_writer() {
    let (mut serial, _, out, _) = serial();
    for byte in b"hello" {
        serial.write(DATA, *byte);
    }
    assert_eq!(*out.0.lock().unwrap(), b"hello");
}

#[test]
fn failing_output_does_not_stop_the_guest() {
    let line = Arc::new(EventFdLine::new().unwrap());
    let mut serial = Serial::new(line.clone(), Box::new(Broken), None);
    serial.write(IER, 0x02);
    assert!(triggered(&line));
    let _ = serial.read(IIR);
    serial.write(DATA, b'x');
    assert!(triggered(&line), "transmitter-empty interrupt still comes");
}

#[test]
fn failing_output_is_told_once_until_a_byte_gets_through() {
    let mut serial = Serial::new(Arc::new(EventFdLine::new().unwrap()), Box::new(Broken), None);
    serial.write(DATA, b'x');
    assert!(serial.uart.writer().failing);
    serial.write(IER, 0);
    serial.write(SCRATCH, 1);
    assert!(serial.uart.writer().failing, "other registers say nothing of the output");
    serial.uart.writer_mut().inner = Box::new(Shared::default());
    serial.write(DATA, b'x');
    assert!(!serial.uart.writer().failing);
}

#[test]
fn input_beyond_the_fifo_arrives_whole_and_in_order() {
    let (mut serial, line, _, _) = serial();
    serial.write(IER, 0x01);
    let input: Vec<u8> = (0..1000u32).map(|i| (i % 251) as u8).collect();
    assert_eq!(serial.enqueue_input(&input), input.len());
    assert!(triggered(&line));
    assert_eq!(read_all(&mut serial), input);
    assert_eq!(serial.input_room(), INPUT_BUFFER_SIZE);
}

#[test]
fn full_input_buffer_takes_no_more_and_tells_when_it_has_room() {
    let (mut serial, _, _, room) = serial();
    let flood = vec![7u8; INPUT_BUFFER_SIZE + FIFO_SIZE];
    assert_eq!(serial.enqueue_input(&flood), INPUT_BUFFER_SIZE);
    // 64 of them went on into the FIFO.
    assert_eq!(serial.input_room(), FIFO_SIZE);
    assert_eq!(serial.enqueue_input(&flood), FIFO_SIZE);
    assert_eq!(serial.enqueue_input(&flood), 0);
    let _ = room.read();
    let _ = serial.read(DATA);
    assert_eq!(room.read().unwrap(), 1);
    assert_eq!(serial.input_room(), 1);
}

#[test]
fn loopback_holds_input_back_until_it_ends() {
    let (mut serial, _, _, _) = serial();
    serial.write(MCR, 0x10);
    assert_eq!(serial.enqueue_input(b"abc"), 3);
    assert_eq!(serial.read(LSR) & LSR_DATA_READY, 0);
    serial.write(MCR, 0x00);
    assert_eq!(read_all(&mut serial), b"abc");
}

#[test]
fn save_mutate_restore_save_is_equal() {
    let (mut serial, _, out, _) = serial();
    serial.write(IER, 0x03);
    serial.write(SCRATCH, 0x5a);
    serial.enqueue_input(&[9; 200]);
    let saved = serial.state();
    assert_eq!(saved.fifo.len() + saved.input.len(), 200);

    serial.write(IER, 0);
    serial.write(SCRATCH, 0);
    serial.write(3, 0x80);
    serial.write(0, 0x42);
    serial.write(3, 0);
    serial.enqueue_input(&[1; 500]);
    let _ = read_all(&mut serial);
    serial.restore(&saved).unwrap();
    assert_eq!(serial.state(), saved);

    serial.write(DATA, b'!');
    assert_eq!(*out.0.lock().unwrap(), b"!", "output is kept");
    assert_eq!(read_all(&mut serial), vec![9; 200]);
}

#[test]
fn restore_raises_a_pending_interrupt_again() {
    let (mut first, line, _, _) = serial();
    first.write(IER, 0x01);
    first.enqueue_input(b"x");
    assert!(triggered(&line));
    let (mut second, line, _, _) = serial();
    second.restore(&first.state()).unwrap();
    assert!(triggered(&line));
    assert_eq!(second.read(IIR) & 0x0f, 0x04);
}

#[test]
fn restore_refuses_impossible_states_and_changes_nothing() {
    let (mut serial, _, _, _) = serial();
    serial.write(SCRATCH, 3);
    let good = serial.state();
    let breaks: [fn(&mut SerialState); 5] = [
        |s| {
            s.fifo = vec![0; FIFO_SIZE + 1];
            s.line_status |= LSR_DATA_READY;
        },
        |s| s.input = vec![0; INPUT_BUFFER_SIZE + 1],
        |s| s.interrupt_enable = 0x10,
        |s| s.line_status |= LSR_DATA_READY,
        |s| s.fifo = vec![1],
    ];
    for (i, break_it) in breaks.iter().enumerate() {
        let mut bad = good.clone();
        break_it(&mut bad);
        assert!(serial.restore(&bad).is_err(), "case {i}");
        assert_eq!(serial.state(), good, "case {i}");
    }
}

#[test]
fn reset_clears_registers_and_keeps_waiting_input() {
    let (mut serial, _, _, _) = serial();
    serial.write(SCRATCH, 3);
    serial.enqueue_input(&[4; 70]);
    serial.reset().unwrap();
    let state = serial.state();
    assert_eq!((state.scratch, state.fifo.len(), state.input.len()), (0, 0, 6));
}
