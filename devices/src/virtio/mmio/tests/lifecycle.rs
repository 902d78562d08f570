//! Pause, state, restore, reset and shutdown.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::channel;

use super::{driver, running};
use crate::EventFdLine;
use crate::virtio::testing::{
    Driver, FakeDisk, HEADER, NEEDS_RESET, PAYLOAD, STATUS, blk, readable, store_chain,
    wait_readable, writable, write_header,
};
use crate::virtio::{Error, MmioState, MmioTransport, RngDevice, StateError};

/// Sends a flush from queue 0 without waiting for it.
fn send_flush(driver: &mut Driver) {
    write_header(driver, 4, 0);
    driver.send(0, &[readable(HEADER, 16), writable(STATUS, 1)]);
}

fn saved(driver: &mut Driver) -> MmioState {
    driver.dev.pause().unwrap();
    driver.dev.state().unwrap()
}

#[test]
fn pause_ends_the_requests_in_progress_and_resume_takes_the_next() {
    let (mut driver, disk) = running();
    let gate = disk.gate();
    write_header(&driver, 0, 0);
    let read = [readable(HEADER, 16), writable(PAYLOAD, 512), writable(STATUS, 1)];
    store_chain(&driver.mem, driver.rings[0].desc, 0, &read);
    // Both are taken before the first is carried out.
    driver.offer(0, 0);
    driver.offer(0, 0);
    driver.kick(0);
    gate.entered.recv().unwrap();

    let (started, pausing) = channel();
    let release = gate.release.clone();
    let helper = std::thread::spawn(move || {
        pausing.recv().unwrap();
        release.send(()).unwrap();
        release.send(()).unwrap();
    });
    started.send(()).unwrap();
    driver.dev.pause().unwrap();
    helper.join().unwrap();
    gate.entered.recv().unwrap();

    assert_eq!(driver.take_used(0), Some((0, 513)), "done and given back");
    assert_eq!(driver.take_used(0), Some((0, 513)), "done and given back");
    assert_eq!(driver.take_used(0), None);
    let state = driver.dev.state().unwrap();
    let queue = &state.virtio.queues[0];
    assert_eq!((queue.next_avail, queue.next_used), (2, 2));
    assert_eq!(disk.take_log(), ["read 0 512", "read 0 512"]);

    driver.offer(0, 0);
    driver.dev.resume().unwrap();
    gate.entered.recv().unwrap();
    gate.release.send(()).unwrap();
    assert_eq!(driver.wait_used(0), (0, 513));
}

#[test]
fn paused_device_serves_nothing_and_a_kick_is_not_lost() {
    let (mut driver, disk) = running();
    driver.dev.pause().unwrap();
    driver.dev.pause().unwrap();
    send_flush(&mut driver);
    // Taking queue 1 out of use is answered by the thread, after it could have seen the kick.
    driver.set(0x30, 1);
    driver.set(0x44, 0);
    assert_eq!(driver.take_used(0), None);
    assert!(disk.take_log().is_empty());
    driver.dev.resume().unwrap();
    assert_eq!(driver.wait_used(0), (0, 1));
}

#[test]
fn state_of_a_running_device_is_refused() {
    let (driver, _) = running();
    assert!(matches!(driver.dev.state(), Err(Error::NotPaused { .. })));
}

#[test]
fn save_mutate_restore_save_is_equal() {
    let (mut driver, _) = running();
    assert_eq!(blk(&mut driver, 0, 0, &[writable(PAYLOAD, 512)]), 0);
    driver.set(0x14, 1);
    driver.set(0x30, 1);
    let before = saved(&mut driver);
    driver.dev.resume().unwrap();

    for _ in 0..5 {
        assert_eq!(blk(&mut driver, 0, 0, &[writable(PAYLOAD, 512)]), 0);
    }
    driver.set(0x70, 0);
    driver.set(0x14, 0);
    driver.features &= !(1 << 29);
    driver.rings[0].size = 128;
    driver.start();
    driver.dev.restore(&before).unwrap();
    assert_eq!(driver.dev.state().unwrap(), before);
}

#[test]
fn state_survives_cbor() {
    let (mut driver, _) = running();
    let state = saved(&mut driver);
    let mut bytes = Vec::new();
    ciborium::into_writer(&state, &mut bytes).unwrap();
    let back: MmioState = ciborium::from_reader(bytes.as_slice()).unwrap();
    assert_eq!(back, state);
}

#[test]
fn fresh_device_serves_what_was_waiting_at_the_save() {
    let (mut first, _) = running();
    assert_eq!(blk(&mut first, 0, 0, &[writable(PAYLOAD, 512)]), 0);
    first.dev.pause().unwrap();
    // The notification is lost with the process that was to get it.
    send_flush(&mut first);
    let state = first.dev.state().unwrap();

    let disk = FakeDisk::new(super::DISK_SIZE, false);
    let mut second = Driver::with_memory(disk.device(2), first.mem.clone());
    second.rings = first.rings.clone();
    second.dev.restore(&state).unwrap();
    assert!(disk.take_log().is_empty(), "not before resume");
    second.dev.resume().unwrap();
    assert_eq!(second.wait_used(0), (0, 1));
    assert_eq!(disk.take_log(), ["flush"]);
    assert_eq!(blk(&mut second, 0, 7, &[writable(PAYLOAD, 512)]), 0);
}

#[test]
fn restore_replaces_a_running_device() {
    let (mut driver, _) = running();
    let before = saved(&mut driver);
    driver.dev.resume().unwrap();
    // Go on with rings elsewhere, which the restored device must not touch.
    driver.set(0x70, 0);
    let rings = driver.rings.clone();
    for ring in &mut driver.rings {
        *ring = crate::virtio::testing::Ring::at(ring.desc + 0x40000, 256);
    }
    driver.start();
    assert_eq!(blk(&mut driver, 0, 0, &[writable(PAYLOAD, 512)]), 0);
    driver.dev.restore(&before).unwrap();
    send_flush(&mut driver);
    driver.dev.resume().unwrap();
    driver.rings = rings;
    assert_eq!(blk(&mut driver, 0, 0, &[writable(PAYLOAD, 512)]), 0);
}

#[test]
fn restore_to_before_the_driver_came_stops_the_queues() {
    let (mut driver, disk) = driver();
    let fresh = saved(&mut driver);
    driver.dev.resume().unwrap();
    driver.start();
    assert_eq!(blk(&mut driver, 0, 0, &[writable(PAYLOAD, 512)]), 0);
    driver.dev.restore(&fresh).unwrap();
    disk.take_log();
    send_flush(&mut driver);
    driver.dev.resume().unwrap();
    // Positions of a queue still running would show in the state.
    assert_eq!(saved(&mut driver), fresh);
    assert!(disk.take_log().is_empty());
}

#[test]
fn resume_raises_an_unacknowledged_interrupt_again() {
    let (mut first, disk) = running();
    send_flush(&mut first);
    wait_readable(std::os::fd::AsRawFd::as_raw_fd(first.line.event_fd()));
    let state = saved(&mut first);
    assert_eq!(state.virtio.interrupt_status, 1);

    // The queues go on where they were, so the guest's memory must be the one they were in.
    let mut second = Driver::with_memory(disk.device(2), first.mem.clone());
    second.dev.restore(&state).unwrap();
    assert!(second.line.event_fd().read().is_err());
    second.dev.resume().unwrap();
    assert_eq!(second.wait_interrupt(), 1);
}

#[test]
fn states_that_do_not_fit_are_refused_by_name_and_change_nothing() {
    let (mut driver, _) = running();
    let good = saved(&mut driver);
    type Break = fn(&mut MmioState);
    let cases: [(&str, Break); 15] = [
        ("device type", |s| s.virtio.device_type = 4),
        ("number of queues", |s| s.virtio.queues.truncate(1)),
        ("largest queue size", |s| s.virtio.queues[0].max_size = 128),
        ("size 0", |s| s.virtio.queues[0].size = 0),
        ("size 100", |s| s.virtio.queues[0].size = 100),
        ("alignment", |s| s.virtio.queues[1].desc_table += 1),
        ("not in guest memory", |s| s.virtio.queues[1].used_ring = 1 << 40),
        ("features", |s| s.virtio.driver_features |= 1 << 41),
        ("features", |s| s.virtio.driver_features &= !(1 << 32)),
        ("device status", |s| s.virtio.status = 1 | 2 | 4),
        ("device status", |s| s.virtio.status |= 0x100),
        ("interrupt status", |s| s.virtio.interrupt_status = 4),
        ("capacity", |s| block(s).capacity += 1),
        ("read-only", |s| block(s).read_only = true),
        ("serial", |s| block(s).serial = "another".into()),
    ];
    for (word, break_it) in cases {
        let mut bad = good.clone();
        break_it(&mut bad);
        let error = driver.dev.restore(&bad).unwrap_err().to_string();
        assert!(error.contains(word), "{word}: {error}");
        assert!(error.contains("disk0"), "{error}");
        assert_eq!(driver.dev.state().unwrap(), good, "{word}");
    }
    driver.dev.resume().unwrap();
    assert_eq!(blk(&mut driver, 0, 0, &[writable(PAYLOAD, 512)]), 0);
}

fn block(state: &mut MmioState) -> &mut crate::virtio::block::BlockState {
    match &mut state.virtio.device {
        crate::virtio::DeviceState::Block(block) => block,
        other => panic!("{other:?}"),
    }
}

#[test]
fn state_of_another_device_is_refused() {
    let (mut driver, _) = running();
    let state = saved(&mut driver);
    let line = Arc::new(EventFdLine::new().unwrap());
    let rng = Box::new(RngDevice::new("rng0"));
    let mut rng = MmioTransport::new(rng, driver.mem.clone(), line).unwrap();
    let error = rng.restore(&state).unwrap_err();
    assert!(matches!(
        error,
        Error::State { source: StateError::Differs { field: "device type", .. }, .. }
    ));
}

#[test]
fn reset_waits_for_the_request_in_progress_and_forgets_the_rest() {
    let (mut driver, disk) = running();
    let gate = disk.gate();
    send_flush(&mut driver);
    gate.entered.recv().unwrap();
    driver.offer(0, 0);
    let release = gate.release.clone();
    let helper = std::thread::spawn(move || release.send(()).unwrap());
    driver.set(0x70, 0);
    helper.join().unwrap();
    assert_eq!(disk.take_log(), ["flush"], "done when the reset is");
    assert_eq!(driver.reg(0x60), 0);
    gate.release.send(()).unwrap();
    driver.start();
    assert_eq!(blk(&mut driver, 0, 0, &[writable(PAYLOAD, 512)]), 0);
    assert_eq!(disk.take_log(), ["read 0 512"]);
}

#[test]
fn queue_taken_out_of_use_is_left_alone_and_the_other_goes_on() {
    let (mut driver, disk) = running();
    driver.set(0x30, 1);
    driver.set(0x44, 0);
    assert_eq!(driver.reg(0x44), 0);
    write_header(&driver, 4, 0);
    driver.send(1, &[readable(HEADER, 16), writable(STATUS, 1)]);
    assert_eq!(blk(&mut driver, 0, 0, &[writable(PAYLOAD, 512)]), 0);
    assert_eq!(driver.take_used(1), None);
    assert_eq!(disk.take_log(), ["read 0 512"]);
    assert_eq!(driver.status() & NEEDS_RESET, 0);
}

#[test]
fn shutdown_flushes_and_tells_if_that_failed() {
    let (mut driver, disk) = running();
    driver.dev.shutdown().unwrap();
    assert_eq!(disk.take_log(), ["flush"]);
    driver.dev.shutdown().unwrap();
    assert!(disk.take_log().is_empty(), "once");
    assert!(matches!(driver.dev.pause(), Err(Error::ThreadEnded { .. })));

    let (mut driver, disk) = running();
    driver.dev.pause().unwrap();
    disk.fail.store(true, Ordering::SeqCst);
    assert!(matches!(driver.dev.shutdown(), Err(Error::Flush { .. })));
}

#[test]
fn devices_can_be_handed_between_threads() {
    fn sent<T: Send>() {}
    sent::<MmioTransport>();
    sent::<crate::legacy::Serial>();
    sent::<crate::legacy::I8042>();
}

#[test]
fn dropped_device_flushes() {
    let (driver, disk) = running();
    drop(driver);
    assert_eq!(disk.take_log(), ["flush"]);
}
