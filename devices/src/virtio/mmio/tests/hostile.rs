//! Drivers that write nonsense: the device asks for a reset, and works after it.

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::{DISK_SIZE, driver, running};
use crate::virtio::testing::{
    DATA, Desc, Driver, FakeDisk, HEADER, INDIRECT, MEMORY, NEEDS_RESET, NEXT, PAYLOAD, Ring,
    STATUS, blk, readable, store_desc, writable, write_header,
};

/// The device is broken, stays so, and is whole again after a reset.
fn recovers(driver: &mut Driver, rings: Vec<Ring>, case: &str) {
    driver.wait_broken();
    driver.kick(0);
    driver.set(0x70, 15);
    assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET, "{case}");
    driver.rings = rings;
    driver.start();
    assert_eq!(driver.status(), 15, "{case}");
    assert_eq!(blk(driver, 0, 0, &[writable(PAYLOAD, 512)]), 0, "{case}");
}

#[test]
fn queue_set_up_wrongly_needs_reset() {
    type Break = fn(&mut Ring);
    let cases: [(&str, Break); 11] = [
        ("size 0", |r| r.size = 0),
        ("size not a power of two", |r| r.size = 3),
        ("size above the maximum", |r| r.size = 512),
        ("size beyond 16 bits", |r| r.size = 0x1_0100),
        ("table misaligned", |r| r.desc += 8),
        ("available ring misaligned", |r| r.avail += 1),
        ("used ring misaligned", |r| r.used += 2),
        ("table outside memory", |r| r.desc = MEMORY - 16),
        ("available ring at zero", |r| r.avail = 0),
        ("used ring outside memory", |r| r.used = MEMORY),
        ("table at the end of the address space", |r| r.desc = u64::MAX - 15),
    ];
    for (case, break_it) in cases {
        let (mut driver, _) = driver();
        let good = driver.rings.clone();
        break_it(&mut driver.rings[1]);
        driver.start();
        recovers(&mut driver, good, case);
    }
}

#[test]
fn rings_filled_wrongly_need_reset() {
    type Break = fn(&mut Driver);
    fn one(driver: &mut Driver, desc: Desc) {
        store_desc(&driver.mem, driver.rings[0].desc, 0, desc);
        driver.offer(0, 0);
    }
    let cases: [(&str, Break); 9] = [
        ("available index jumps", |d| {
            let at = GuestAddress(d.rings[0].avail + 2);
            d.mem.write_obj(257u16, at).unwrap();
        }),
        ("head outside the table", |d| d.offer(0, 256)),
        ("loop", |d| {
            let flags = NEXT;
            one(d, Desc { flags, ..readable(HEADER, 1) });
        }),
        ("next outside the table", |d| {
            one(d, Desc { flags: NEXT, next: 1000, ..readable(HEADER, 16) });
        }),
        ("address outside memory", |d| one(d, readable(MEMORY, 16))),
        ("length past memory", |d| one(d, readable(HEADER, u32::MAX))),
        ("indirect of an odd length", |d| {
            one(d, Desc { flags: INDIRECT, ..readable(HEADER, 40) });
        }),
        ("no status byte", |d| one(d, readable(HEADER, 16))),
        ("no header", |d| one(d, writable(STATUS, 1))),
    ];
    for (case, break_it) in cases {
        let (mut driver, disk) = running();
        break_it(&mut driver);
        driver.kick(0);
        let rings = driver.rings.clone();
        recovers(&mut driver, rings, case);
        assert_eq!(disk.take_log(), ["read 0 512"], "{case}");
    }
}

#[test]
fn machine_reset_heals_a_broken_device() {
    let (mut driver, _) = running();
    driver.offer(0, 999);
    driver.kick(0);
    driver.wait_broken();
    driver.dev.reset();
    assert_eq!(driver.status(), 0);
    driver.start();
    assert_eq!(blk(&mut driver, 0, 0, &[writable(PAYLOAD, 512)]), 0);
}

#[test]
fn broken_device_is_saved_and_revived_broken() {
    let (mut first, _) = running();
    first.offer(0, 999);
    first.kick(0);
    first.wait_broken();
    first.dev.pause().unwrap();
    let state = first.dev.state().unwrap();
    let (mut second, _) = driver();
    second.dev.restore(&state).unwrap();
    second.dev.resume().unwrap();
    assert_eq!(second.status(), 15 | NEEDS_RESET);
    second.start();
    assert_eq!(blk(&mut second, 0, 0, &[writable(PAYLOAD, 512)]), 0);
}

/// Descriptors that are often almost right.
fn descs() -> impl Strategy<Value = Vec<Desc>> {
    let addr = prop_oneof![
        4 => DATA..DATA + 0x4000,
        1 => MEMORY - 64..MEMORY + 64,
        1 => any::<u64>(),
        1 => 0x10000u64..0x14000,
    ];
    let len = prop_oneof![
        3 => Just(16u32),
        2 => Just(1u32),
        2 => Just(512u32),
        2 => 0u32..2048,
        1 => any::<u32>(),
    ];
    let desc = (addr, len, 0u16..8, 0u16..10).prop_map(|(addr, len, flags, next)| Desc {
        addr,
        len,
        flags,
        next,
    });
    proptest::collection::vec(desc, 8)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever is in the rings, the device ends what it does, and works after a reset.
    #[test]
    fn random_rings_never_stop_the_machine(
        descs in descs(),
        heads in proptest::collection::vec(0u16..10, 1..8),
        jump in prop_oneof![9 => Just(0u16), 1 => any::<u16>()],
        kind in prop_oneof![4 => 0u32..16, 1 => any::<u32>()],
        sector in prop_oneof![4 => 0u64..64, 1 => any::<u64>()],
        data in any::<[u8; 32]>(),
        event_idx in any::<bool>(),
    ) {
        let disk = FakeDisk::new(DISK_SIZE, false);
        let mut driver = Driver::new(disk.device(1));
        if !event_idx {
            driver.features &= !(1 << 29);
        }
        driver.start();
        write_header(&driver, kind, sector);
        driver.write(DATA + 0x10, &data);
        for (i, desc) in descs.iter().enumerate() {
            store_desc(&driver.mem, driver.rings[0].desc, i as u16, *desc);
        }
        for head in heads {
            driver.offer(0, head);
        }
        let avail = GuestAddress(driver.rings[0].avail + 2);
        let idx: u16 = driver.mem.read_obj(avail).unwrap();
        driver.mem.write_obj(idx.wrapping_add(jump), avail).unwrap();
        driver.kick(0);

        // Returns only if the thread is alive and responds.
        driver.dev.pause().unwrap();
        let state = driver.dev.state().unwrap();
        prop_assert_eq!(state.virtio.status & !NEEDS_RESET, 15);
        driver.dev.resume().unwrap();
        driver.dev.pause().unwrap();
        driver.dev.resume().unwrap();

        driver.start();
        prop_assert_eq!(driver.status(), 15);
        while driver.line.event_fd().read().is_ok() {}
        prop_assert_eq!(blk(&mut driver, 0, 0, &[writable(PAYLOAD, 512)]), 0);
        driver.dev.shutdown().unwrap();
    }

    /// Whatever a driver writes to registers, the machine lives.
    #[test]
    fn random_register_writes_never_stop_the_machine(
        writes in proptest::collection::vec(
            (0u64..0x28, prop_oneof![4 => 0u32..16, 1 => any::<u32>()]),
            1..80,
        ),
    ) {
        let (mut driver, _) = driver();
        for (register, value) in writes {
            driver.set(register * 8, value);
            driver.set(register * 8 + 4, value);
        }
        driver.dev.pause().unwrap();
        let saved = driver.dev.state().unwrap();
        driver.dev.restore(&saved).unwrap();
        prop_assert_eq!(driver.dev.state().unwrap(), saved);
        driver.dev.resume().unwrap();
        driver.start();
        prop_assert_eq!(blk(&mut driver, 0, 0, &[writable(PAYLOAD, 512)]), 0);
    }
}
