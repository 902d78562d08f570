use super::io::MAX_REQUEST_BYTES;
use super::*;
use crate::virtio::testing::{Driver, PAYLOAD, REGION, readable, writable};

fn running() -> Driver {
    let mut driver = Driver::new(Box::new(RngDevice::new("rng0")));
    driver.start();
    driver
}

#[test]
fn request_is_filled_with_changing_bytes() {
    let mut driver = running();
    let mut seen = Vec::new();
    for _ in 0..2 {
        let len = driver.request(0, &[writable(PAYLOAD, 600), writable(REGION - 50, 100)]);
        assert_eq!(len, 700);
        let mut bytes = driver.bytes(PAYLOAD, 600);
        bytes.extend(driver.bytes(REGION - 50, 100));
        assert!(bytes.chunks(50).all(|c| c.iter().any(|b| *b != 0)));
        seen.push(bytes);
    }
    assert_ne!(seen[0], seen[1]);
}

#[test]
fn large_request_gets_no_more_than_the_bound() {
    let mut driver = running();
    let size = 2 * MAX_REQUEST_BYTES;
    let len = driver.request(0, &[writable(PAYLOAD, size as u32)]);
    assert_eq!(len as usize, MAX_REQUEST_BYTES);
    assert!(driver.bytes(PAYLOAD, size)[MAX_REQUEST_BYTES..].iter().all(|b| *b == 0));
}

#[test]
fn request_without_room_gets_nothing() {
    let mut driver = running();
    assert_eq!(driver.request(0, &[readable(PAYLOAD, 16)]), 0);
}

#[test]
fn save_mutate_restore_save_is_equal() {
    let mut driver = running();
    driver.request(0, &[writable(PAYLOAD, 8)]);
    driver.dev.pause().unwrap();
    let saved = driver.dev.state().unwrap();
    driver.dev.resume().unwrap();
    driver.request(0, &[writable(PAYLOAD, 8)]);
    driver.set(0x70, 0);
    driver.dev.restore(&saved).unwrap();
    assert_eq!(driver.dev.state().unwrap(), saved);
}
