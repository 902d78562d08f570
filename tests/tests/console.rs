//! The guest's serial port, and who reads it late.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::time::Duration;

use tardigrade_tests::baremetal::layout::FREE;
use tardigrade_tests::baremetal::{Routine, machine, monitor};
use tardigrade_tests::require;

const PATIENCE: Duration = Duration::from_secs(120);

/// Many times what a socket has room for: that is some 300 bytes that come one by one.
const BYTES: usize = 6000;

/// The keyboard controller's register with the reset line, and what pulls it.
const RESET: [u64; 2] = [0x64, 0xfe];

#[test]
fn output_that_is_read_late_is_whole() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let vm = machine(dir.path(), "32M", 1).start();
    let mut qmp = vm.qmp();
    let mut guest = monitor(&vm);
    let bytes: Vec<u8> = (0..BYTES).map(|at| u8::try_from(at % 251).unwrap()).collect();
    guest.write(FREE, &bytes);
    guest.start(Routine::Transmit, &[FREE, BYTES as u64]);
    // It comes to this when it has sent all of them.
    guest.start(Routine::PortOut, &RESET);
    qmp.wait_event(PATIENCE, |event| event["event"] == "RESET").unwrap();
    assert!(guest.received(BYTES) == bytes);
    assert!(guest.answer().is_ok());
    vm.quit();
}
