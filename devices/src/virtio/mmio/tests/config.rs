//! A disk that gets another size while a driver uses it.

use super::{DISK_SIZE, driver, running};
use crate::virtio::testing::{Driver, FakeDisk, PAYLOAD, blk, writable};

const GENERATION: u64 = 0xfc;
const CONFIG_INTERRUPT: u32 = 2;

fn capacity(driver: &mut Driver) -> u64 {
    let mut capacity = [0; 8];
    driver.dev.read(0x100, &mut capacity);
    u64::from_le_bytes(capacity) * 512
}

fn resize(disk: &FakeDisk, size: usize) {
    disk.data.lock().unwrap().resize(size, 0);
}

/// Status of a read of the sector.
fn read(driver: &mut Driver, sector: u64) -> u8 {
    blk(driver, 0, sector, &[writable(PAYLOAD, 512)])
}

#[test]
fn a_driver_is_told_of_another_size_and_reaches_all_of_it() {
    let (mut driver, disk) = running();
    let first_beyond = DISK_SIZE as u64 / 512;
    assert_eq!(read(&mut driver, first_beyond), 1);

    driver.dev.refresh_config();
    assert_eq!(driver.reg(GENERATION), 0, "nothing has changed");
    resize(&disk, 2 * DISK_SIZE);
    assert_eq!(capacity(&mut driver), DISK_SIZE as u64, "told before it was looked at");
    driver.dev.refresh_config();
    assert_eq!(driver.wait_interrupt(), CONFIG_INTERRUPT);
    assert_eq!(driver.reg(GENERATION), 1);
    assert_eq!(capacity(&mut driver), 2 * DISK_SIZE as u64);
    assert_eq!(read(&mut driver, first_beyond), 0);

    resize(&disk, DISK_SIZE);
    driver.dev.refresh_config();
    assert_eq!(driver.reg(GENERATION), 2);
    assert_eq!(read(&mut driver, first_beyond), 1);
}

#[test]
fn a_driver_that_is_not_ready_is_not_interrupted() {
    let (mut driver, disk) = driver();
    resize(&disk, 2 * DISK_SIZE);
    driver.dev.refresh_config();
    assert_eq!(driver.reg(0x60), 0);
    assert!(driver.line.event_fd().read().is_err());
    assert_eq!(capacity(&mut driver), 2 * DISK_SIZE as u64);
}

#[test]
fn a_state_goes_back_with_the_disk_to_its_size_and_not_without() {
    let (mut driver, disk) = running();
    driver.dev.pause().unwrap();
    let state = driver.dev.state().unwrap();
    resize(&disk, 2 * DISK_SIZE);
    driver.dev.refresh_config();
    let error = driver.dev.restore(&state).unwrap_err().to_string();
    assert!(error.contains("capacity"), "{error}");

    resize(&disk, DISK_SIZE);
    driver.dev.restore(&state).unwrap();
    assert_eq!(capacity(&mut driver), DISK_SIZE as u64);
    assert_eq!(driver.reg(GENERATION), 0);
    driver.dev.resume().unwrap();
    assert_eq!(read(&mut driver, DISK_SIZE as u64 / 512), 1);
}

#[test]
fn a_state_of_power_on_takes_the_disk_as_it_is() {
    let (mut driver, disk) = driver();
    driver.dev.pause().unwrap();
    let pristine = driver.dev.state().unwrap();
    resize(&disk, 2 * DISK_SIZE);
    driver.dev.restore(&pristine).unwrap();
    assert_eq!(capacity(&mut driver), 2 * DISK_SIZE as u64);
    driver.dev.resume().unwrap();
    driver.start();
    assert_eq!(read(&mut driver, DISK_SIZE as u64 / 512), 0);
}
