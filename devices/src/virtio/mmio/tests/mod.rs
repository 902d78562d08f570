mod config;
mod hostile;
mod lifecycle;
mod registers;

use std::sync::Arc;

use crate::virtio::testing::{Driver, FakeDisk};

const DISK_SIZE: usize = 1 << 20;

fn driver() -> (Driver, Arc<FakeDisk>) {
    let disk = FakeDisk::new(DISK_SIZE, false);
    let driver = Driver::new(disk.device(2));
    (driver, disk)
}

fn running() -> (Driver, Arc<FakeDisk>) {
    let (mut driver, disk) = driver();
    driver.start();
    (driver, disk)
}
