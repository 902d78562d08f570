use std::io::Read;
use std::os::unix::net::UnixStream;
use std::thread;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;

fn outbox() -> (Outbox, UnixStream, Arc<EventFd>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let waits = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    (Outbox::new(Box::new(ours), Arc::clone(&waits)), theirs, waits)
}

/// As a guest writes.
fn write_bytes(outbox: &Outbox, count: usize) -> Vec<u8> {
    let bytes: Vec<u8> = (0..count).map(|at| u8::try_from(at % 251).unwrap()).collect();
    bytes.iter().for_each(|byte| outbox.write(&[*byte]));
    bytes
}

#[test]
fn what_a_reader_takes_at_once_is_not_kept() {
    let (outbox, mut reader, waits) = outbox();
    let bytes = write_bytes(&outbox, 10);
    let mut read = [0; 10];
    reader.read_exact(&mut read).unwrap();
    assert_eq!(read.to_vec(), bytes);
    assert!(waits.read().is_err());
    assert!(!outbox.send_kept());
}

#[test]
fn a_reader_that_comes_late_gets_all_in_order() {
    let (outbox, mut reader, waits) = outbox();
    // More than a socket has room for: it counts some 768 bytes for each.
    let mut bytes = write_bytes(&outbox, 100_000);
    assert_eq!(waits.read().unwrap(), 1);
    bytes.extend(write_bytes(&outbox, 1000));
    // Told once, until all of it is gone.
    assert!(waits.read().is_err());
    let mut read = vec![0; bytes.len()];
    thread::scope(|scope| {
        scope.spawn(|| reader.read_exact(&mut read).unwrap());
        while outbox.send_kept() {
            assert!(writable_within(outbox.fd(), Duration::from_secs(60)));
        }
    });
    assert!(read == bytes);
    assert_eq!(outbox.state().kept.capacity(), 0);
    write_bytes(&outbox, 100_000);
    assert_eq!(waits.read().unwrap(), 1);
}

#[test]
fn what_goes_past_the_room_is_dropped_until_the_reader_reads_again() {
    let (outbox, mut reader, _waits) = outbox();
    outbox.write(&vec![1; 3 * MOST_KEPT]);
    let state = outbox.state();
    assert_eq!((state.kept.len(), state.stuck), (MOST_KEPT, true));
    drop(state);
    // Each of these would wait.
    outbox.write(&vec![2; 1000]);
    for _ in 0..1000 {
        outbox.write(&[2]);
    }
    let mut read = vec![0; MOST_KEPT];
    reader.read_exact(&mut read[..100_000]).unwrap();
    // It fits again, behind what was kept.
    outbox.write(&[3]);
    assert!(!outbox.state().stuck);
    let mut all = Vec::new();
    thread::scope(|scope| {
        scope.spawn(|| {
            while all.last() != Some(&3) {
                let count = reader.read(&mut read).unwrap();
                all.extend_from_slice(&read[..count]);
            }
        });
        outbox.finish();
    });
    assert!(all.len() > MOST_KEPT - 100_000);
    let (last, before) = all.split_last().unwrap();
    assert_eq!(*last, 3);
    assert!(before.iter().all(|byte| *byte == 1));
}

#[test]
fn a_vcpu_that_waits_goes_on_when_the_reader_reads() {
    let (outbox, mut reader, _waits) = outbox();
    outbox.write(&vec![1; MOST_KEPT]);
    while outbox.state().kept.len() < MOST_KEPT {
        outbox.write(&[1; 4096]);
    }
    outbox.state().stuck = false;
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut read = vec![0; MOST_KEPT];
            while reader.read(&mut read).unwrap() > 0 {}
        });
        // It has no room at first, and nobody else hands over.
        outbox.write(&vec![1; 2 * MOST_KEPT]);
        outbox.finish();
        assert!(!outbox.send_kept());
        drop(outbox);
    });
}

#[test]
fn nothing_is_kept_for_a_reader_that_has_gone() {
    let (outbox, reader, _waits) = outbox();
    outbox.write(&vec![1; MOST_KEPT]);
    drop(reader);
    assert!(!outbox.send_kept());
    outbox.write(&vec![1; 2 * MOST_KEPT]);
    assert!(outbox.state().kept.is_empty());
    outbox.finish();
}

#[test]
fn a_pipe_is_written_to_only_when_it_takes_something() {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let waits = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    let writer = std::fs::File::from(std::os::fd::OwnedFd::from(writer));
    let outbox = Outbox::new(Box::new(super::super::Blocking(writer)), waits);
    // A blocking write would never come back.
    let bytes = write_bytes(&outbox, 200_000);
    let mut read = vec![0; bytes.len()];
    thread::scope(|scope| {
        scope.spawn(|| reader.read_exact(&mut read).unwrap());
        outbox.finish();
    });
    assert!(read == bytes);
}
