//! Limits of disks of a running guest: what waits for a bucket holds nobody else up.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::path::Path;

use qmp::client::Client;
use serde_json::{Value, json};
use tardigrade_tests::baremetal::virtio::{
    DATA, Descriptor, Driver, HEADER, NEXT, REQUEST_STATUS, WRITE,
};
use tardigrade_tests::baremetal::{machine_with_disk, monitor};
use tardigrade_tests::disk::Disk;
use tardigrade_tests::pattern;
use tardigrade_tests::require;

/// Limits the disk to so many bytes a second.
fn limit(qmp: &mut Client, bytes: u64) {
    let arguments = json!({
        "id": "/machine/peripheral-anon/device[0]",
        "bps": bytes, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0,
    });
    qmp.execute("block_set_io_throttle", arguments).unwrap();
}

fn inserted(qmp: &mut Client) -> Value {
    qmp.execute("query-block", json!({})).unwrap()[0]["inserted"].clone()
}

/// A flush's header and status.
const FLUSH: u64 = DATA + 0x600;
const FLUSH_STATUS: u64 = FLUSH + 16;

/// Writes two sectors. A second for each byte: the first is let through, the other waits for minutes. It has
/// come to the disk: a flush behind it, which waits for nothing, is done.
fn write_two(driver: &mut Driver<'_>, sector: u64) {
    driver.monitor().write(DATA, &pattern::bytes(sector, 0, 512));
    assert_eq!(driver.transfer(1, sector), 0);
    driver.monitor().write(DATA, &pattern::bytes(sector + 1, 0, 512));
    let header = |kind: u64, sector: u64| [kind, sector, 0xff].map(u64::to_le_bytes).concat();
    driver.monitor().write(HEADER, &header(1, sector + 1));
    driver.monitor().write(FLUSH, &header(4, 0));
    let entry = |address, length, flags, next| Descriptor { address, length, flags, next };
    driver.describe(&[
        entry(HEADER, 16, NEXT, 1),
        entry(DATA, 512, NEXT, 2),
        entry(REQUEST_STATUS, 1, WRITE, 0),
        entry(FLUSH, 16, NEXT, 4),
        entry(FLUSH_STATUS, 1, WRITE, 0),
    ]);
    driver.submit(0);
    driver.submit(3);
    driver.monitor().wait_word(FLUSH_STATUS, |word| word & 0xff == 0);
    assert_eq!(driver.monitor().peek(REQUEST_STATUS) & 0xff, 0xff, "the write did not wait");
}

/// Waits until the other one is done.
fn wait_written(driver: &mut Driver<'_>) {
    driver.monitor().wait_word(REQUEST_STATUS, |word| word & 0xff == 0);
}

fn disk(dir: &Path) -> Disk {
    Disk { path: dir.join("disk0.qcow2"), format: "qcow2" }
}

#[test]
fn a_request_that_waits_is_done_when_the_limit_goes_the_guest_stops_or_is_saved() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut vm = machine_with_disk(dir.path(), "32M", 1).start();
    let mut qmp = vm.qmp();
    let mut guest = monitor(&vm);
    let mut driver = Driver::start(&mut guest);

    limit(&mut qmp, 1);
    assert_eq!(
        (&inserted(&mut qmp)["bps"], inserted(&mut qmp)["group"].is_string()),
        (&json!(1), true)
    );
    write_two(&mut driver, 10);
    limit(&mut qmp, 0);
    wait_written(&mut driver);
    assert_eq!(
        (&inserted(&mut qmp)["bps"], &inserted(&mut qmp)["group"]),
        (&json!(0), &Value::Null)
    );

    limit(&mut qmp, 1);
    write_two(&mut driver, 20);
    qmp.execute("stop", json!({})).unwrap();
    qmp.execute("cont", json!({})).unwrap();
    wait_written(&mut driver);

    limit(&mut qmp, 1);
    write_two(&mut driver, 30);
    vm.save("waits", &["disk0"]);
    wait_written(&mut driver);

    limit(&mut qmp, 1);
    write_two(&mut driver, 40);
    vm.load("waits", &["disk0"]);
    limit(&mut qmp, 0);
    vm.quit();
    disk(dir.path()).check();
    let saved = disk(dir.path()).read(Some("waits"));
    for sector in [10, 11, 20, 21, 30, 31] {
        let at = usize::try_from(sector).unwrap() * 512;
        assert_eq!(saved[at..at + 512], pattern::bytes(sector, 0, 512), "sector {sector}");
    }
    assert_eq!(saved[40 * 512..42 * 512], [0; 1024]);
}

#[test]
fn a_machine_can_be_quit_while_a_request_waits_and_the_request_is_done() {
    if !require::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let vm = machine_with_disk(dir.path(), "32M", 1).start();
    let mut guest = monitor(&vm);
    let mut driver = Driver::start(&mut guest);
    limit(&mut vm.qmp(), 1);
    write_two(&mut driver, 10);
    vm.quit();
    disk(dir.path()).check();
    let written = disk(dir.path()).read(None);
    for sector in [10, 11] {
        let at = usize::try_from(sector).unwrap() * 512;
        assert_eq!(written[at..at + 512], pattern::bytes(sector, 0, 512), "sector {sector}");
    }
}
