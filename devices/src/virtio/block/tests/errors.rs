//! What becomes of requests that fail on the host.

use std::sync::mpsc::{Receiver, channel};

use super::*;

/// A disk whose failures come to the receiver.
fn failing(
    policy: ErrorPolicy,
    queues: u16,
) -> (Driver, Arc<FakeDisk>, Arc<IoErrors>, Receiver<Failure>) {
    let disk = FakeDisk::new(SECTORS * 512, false);
    let (sender, receiver) = channel();
    let sink = Box::new(move |failure| sender.send(failure).unwrap());
    let errors = Arc::new(IoErrors::new(policy, sink));
    let device = disk.device(queues).with_errors(Arc::clone(&errors));
    let mut driver = Driver::new(Box::new(device));
    driver.start();
    (driver, disk, errors, receiver)
}

const STOP: ErrorPolicy = ErrorPolicy { read: OnError::Stop, write: OnError::Stop };

fn send_write(driver: &mut Driver, sector: u64) {
    write_header(driver, OUT, sector);
    let descs = [readable(HEADER, 16), readable(PAYLOAD, 512), writable(STATUS, 1)];
    driver.send(0, &descs);
}

/// As the machine does it.
fn resume(driver: &mut Driver, errors: &IoErrors) {
    errors.begin_round();
    driver.dev.resume().unwrap();
}

#[test]
fn a_request_that_stops_the_machine_is_done_again_when_it_goes_on() {
    let (mut driver, disk, errors, failures) = failing(STOP, 1);
    driver.write(PAYLOAD, &[7; 512]);
    disk.fail.store(true, Ordering::SeqCst);
    send_write(&mut driver, 3);
    let failure = failures.recv().unwrap();
    assert!(failure.write && failure.action == ErrorAction::Stop && failure.round == 0);
    driver.dev.pause().unwrap();
    assert_eq!(driver.take_used(0), None);
    // Still no good: it waits again.
    resume(&mut driver, &errors);
    assert_eq!(failures.recv().unwrap().round, 1);
    driver.dev.pause().unwrap();
    assert_eq!((driver.take_used(0), errors.status()), (None, IoStatus::Failed));
    disk.fail.store(false, Ordering::SeqCst);
    resume(&mut driver, &errors);
    assert_eq!(driver.wait_used(0), (0, 1));
    assert_eq!((driver.bytes(STATUS, 1)[0], errors.status()), (OK, IoStatus::Ok));
    assert_eq!(disk.data.lock().unwrap()[3 * 512..4 * 512], [7; 512]);
    assert_eq!(disk.take_log().len(), 3);
    // And is no more there.
    driver.dev.pause().unwrap();
    assert!(driver.dev.state().unwrap().virtio.queues[0].held.is_empty());
    resume(&mut driver, &errors);
    assert_eq!(blk(&mut driver, IN, 3, &[writable(PAYLOAD, 512)]), OK);
}

#[test]
fn what_waits_keeps_later_requests_waiting_on_every_queue() {
    let (mut driver, disk, errors, failures) = failing(STOP, 2);
    disk.fail.store(true, Ordering::SeqCst);
    send_write(&mut driver, 3);
    failures.recv().unwrap();
    // The failed one is in its place when the device has gone through a command.
    driver.dev.pause().unwrap();
    let state = driver.dev.state().unwrap();
    assert_eq!((state.virtio.queues[0].held.as_slice(), state.version()), ([0].as_slice(), 2));
    // Sent to a machine that stands still.
    store_chain(&driver.mem, driver.rings[1].desc, 0, &[readable(HEADER, 16), writable(STATUS, 1)]);
    driver.offer(1, 0);
    resume(&mut driver, &errors);
    failures.recv().unwrap();
    driver.dev.pause().unwrap();
    disk.fail.store(false, Ordering::SeqCst);
    resume(&mut driver, &errors);
    assert_eq!(driver.wait_used(0).0, 0);
    assert_eq!(driver.wait_used(1).0, 0);
}

#[test]
fn what_waits_is_in_the_state_and_another_device_does_it() {
    let (mut driver, disk, _, failures) = failing(STOP, 1);
    driver.write(PAYLOAD, &[9; 512]);
    disk.fail.store(true, Ordering::SeqCst);
    send_write(&mut driver, 5);
    failures.recv().unwrap();
    driver.dev.pause().unwrap();
    let state = driver.dev.state().unwrap();

    let (mut other, disk, errors, _failures) = failing(STOP, 1);
    // The memory of the one is that of the other.
    other.mem = driver.mem.clone();
    let device = disk.device(1).with_errors(Arc::clone(&errors));
    let line = other.line.clone();
    other.dev =
        crate::virtio::MmioTransport::new(Box::new(device), driver.mem.clone(), line).unwrap();
    other.dev.restore(&state).unwrap();
    assert_eq!(other.dev.state().unwrap(), state);
    resume(&mut other, &errors);
    other.rings = driver.rings.clone();
    assert_eq!(other.wait_used(0), (0, 1));
    assert_eq!(disk.data.lock().unwrap()[5 * 512..6 * 512], [9; 512]);
}

#[test]
fn a_reset_forgets_what_waits() {
    let (mut driver, disk, errors, failures) = failing(STOP, 1);
    disk.fail.store(true, Ordering::SeqCst);
    send_write(&mut driver, 3);
    failures.recv().unwrap();
    driver.dev.pause().unwrap();
    driver.start();
    disk.fail.store(false, Ordering::SeqCst);
    disk.take_log();
    resume(&mut driver, &errors);
    assert_eq!(blk(&mut driver, IN, 3, &[writable(PAYLOAD, 512)]), OK);
    assert_eq!(disk.take_log(), ["read 1536 512"]);
}

#[test]
fn more_waiting_requests_than_descriptors_are_refused_and_bad_ones_break_the_device() {
    let (mut driver, _, errors, _failures) = failing(STOP, 1);
    driver.dev.pause().unwrap();
    let mut state = driver.dev.state().unwrap();
    let size = state.virtio.queues[0].size as u16;
    state.virtio.queues[0].held = vec![0; usize::from(size) + 1];
    assert!(driver.dev.restore(&state).is_err());
    state.virtio.queues[0].held = vec![size];
    driver.dev.restore(&state).unwrap();
    resume(&mut driver, &errors);
    driver.wait_broken();
}

#[test]
fn ignored_failures_are_successes_and_reported_ones_are_not() {
    let policy = ErrorPolicy { read: OnError::Ignore, write: OnError::Report };
    let (mut driver, disk, errors, failures) = failing(policy, 1);
    disk.fail.store(true, Ordering::SeqCst);
    assert_eq!(blk(&mut driver, IN, 0, &[writable(PAYLOAD, 512)]), OK);
    assert_eq!(blk(&mut driver, OUT, 0, &[readable(PAYLOAD, 512)]), IOERR);
    assert_eq!(blk(&mut driver, FLUSH, 0, &[]), IOERR);
    let told: Vec<_> = failures.try_iter().map(|failure| (failure.write, failure.action)).collect();
    use ErrorAction::{Ignore, Report};
    assert_eq!(told, [(false, Ignore), (true, Report), (true, Report)]);
    assert_eq!(errors.status(), IoStatus::Ok);
}
