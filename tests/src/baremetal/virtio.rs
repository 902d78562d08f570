//! A driver for a virtio-blk device, run from the host: right where it should be, and wrong where a
//! test wants it. The addresses here are those of the device in slot 0.

use super::layout::SCRATCH;
use super::monitor::{Monitor, Routine};

/// First register of slot 0, and bytes from a slot to the next (`docs/boot.md`).
const DEVICE: u64 = 0xd000_0000;
const SLOT: u64 = 0x1000;
/// Bytes from the structures of a slot to those of the next.
const STRUCTURES: u64 = 0x1_0000;

/// Where QEMU's microvm has its 24 slots, and how far apart; devices go into the last ones first.
const QEMU_DEVICE: u64 = 0xfeb0_0000;
const QEMU_SLOT: u64 = 0x200;

/// Registers (virtio 1.2, table 4.1).
const MAGIC: u64 = 0;
const DEVICE_TYPE: u64 = 8;
const DEVICE_FEATURES: u64 = 0x10;
const DEVICE_FEATURES_SELECT: u64 = 0x14;
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SELECT: u64 = 0x24;
const QUEUE_SELECT: u64 = 0x30;
const QUEUE_SIZE: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const QUEUE_NOTIFY: u64 = 0x50;
const STATUS: u64 = 0x70;
const QUEUE_DESCRIPTORS: u64 = 0x80;
const QUEUE_AVAILABLE: u64 = 0x90;
const QUEUE_USED: u64 = 0xa0;

const MAGIC_VALUE: u32 = 0x7472_6976;

/// Status bits (virtio 1.2, section 2.1).
const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
/// DEVICE_NEEDS_RESET
pub const NEEDS_RESET: u32 = 0x40;

/// Descriptor flags (virtio 1.2, section 2.7.5).
pub const NEXT: u16 = 1;
/// The device writes.
pub const WRITE: u16 = 2;
/// A table of descriptors.
pub const INDIRECT: u16 = 4;

/// Entries of the queue.
pub const SIZE: u16 = 8;

const DESCRIPTORS: u64 = SCRATCH;
const AVAILABLE: u64 = SCRATCH + 0x1000;
const USED: u64 = SCRATCH + 0x2000;
/// A request's header and status byte.
pub const HEADER: u64 = SCRATCH + 0x3000;
/// See [`HEADER`].
pub const REQUEST_STATUS: u64 = HEADER + 16;
/// Room for a sector.
pub const DATA: u64 = SCRATCH + 0x4000;
/// The number that `DiskChain` wrote last.
pub const DISK_COUNT: u64 = SCRATCH + 0x5000;
/// A second header.
const OTHER_HEADER: u64 = HEADER + 0x100;

/// Feature bits (virtio 1.2, sections 5.2.3 and 6): the device's own, in two words.
const FLUSH_AND_ZEROES: u32 = 1 << 9 | 1 << 14;
const INDIRECT_DESC: u32 = 1 << 28;
const VERSION_1: u32 = 1;

/// One entry of a descriptor table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest physical address.
    pub address: u64,
    /// Bytes.
    pub length: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// Index of the next one.
    pub next: u16,
}

/// The driver.
pub struct Driver<'a> {
    monitor: &'a mut Monitor,
    available: u16,
    /// The device's registers.
    device: u64,
    /// What is added to the addresses of slot 0.
    shift: u64,
}

/// The first register of the first disk, of our machine or of QEMU's.
pub fn find(monitor: &mut Monitor) -> u64 {
    let theirs = (0..24).rev().map(|slot| QEMU_DEVICE + slot * QEMU_SLOT);
    let mut places = std::iter::once(DEVICE).chain(theirs);
    let found = places.find(|place| {
        monitor.peek32(place + MAGIC) == MAGIC_VALUE && monitor.peek32(place + DEVICE_TYPE) == 2
    });
    found.expect("there is no disk")
}

impl<'a> Driver<'a> {
    /// Resets the device in slot 0 and sets up its first queue. Of the features only
    /// VIRTIO_F_VERSION_1 and VIRTIO_RING_F_INDIRECT_DESC are taken.
    pub fn start(monitor: &'a mut Monitor) -> Self {
        Self::start_with(monitor, 0, INDIRECT_DESC)
    }

    /// The same for the device in any slot, with flushes and zeroes.
    pub fn start_at(monitor: &'a mut Monitor, slot: u64) -> Self {
        Self::start_with(monitor, slot, INDIRECT_DESC | FLUSH_AND_ZEROES)
    }

    fn start_with(monitor: &'a mut Monitor, slot: u64, features: u32) -> Self {
        let (device, shift) = (DEVICE + slot * SLOT, slot * STRUCTURES);
        Self { monitor, available: 0, device, shift }.set_up(features)
    }

    /// The same as [`Self::start`] for the device that [`find`] has found.
    pub fn start_found(monitor: &'a mut Monitor, device: u64) -> Self {
        Self { monitor, available: 0, device, shift: 0 }.set_up(INDIRECT_DESC)
    }

    /// A driver that was started before, with so many requests made so far.
    pub fn resume(monitor: &'a mut Monitor, available: u16) -> Self {
        Self { monitor, available, device: DEVICE, shift: 0 }
    }

    fn set_up(self, features: u32) -> Self {
        let mut driver = self;
        let shift = driver.shift;
        assert_eq!(driver.register(MAGIC), MAGIC_VALUE, "there is no virtio device");
        driver.set(STATUS, 0);
        assert_eq!(driver.register(STATUS), 0);
        for rings in [AVAILABLE, USED] {
            driver.monitor.write(rings + shift, &[0; 8]);
        }
        driver.negotiate(features);
        driver.queue(DESCRIPTORS + shift, AVAILABLE + shift, USED + shift);
        driver.set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        driver
    }

    fn register(&mut self, register: u64) -> u32 {
        self.monitor.peek32(self.device + register)
    }

    fn set(&mut self, register: u64, value: u32) {
        self.monitor.poke32(self.device + register, value);
    }

    fn negotiate(&mut self, features: u32) {
        self.set(STATUS, ACKNOWLEDGE | DRIVER);
        for (word, wanted) in [(0, features), (1, VERSION_1)] {
            self.set(DEVICE_FEATURES_SELECT, word);
            let offered = self.register(DEVICE_FEATURES);
            assert_eq!(offered & wanted, wanted, "features {word}: {offered:#x}");
            self.set(DRIVER_FEATURES_SELECT, word);
            self.set(DRIVER_FEATURES, wanted);
        }
        self.set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert_ne!(self.status() & FEATURES_OK, 0);
    }

    fn queue(&mut self, descriptors: u64, available: u64, used: u64) {
        self.set(QUEUE_SELECT, 0);
        self.set(QUEUE_SIZE, SIZE.into());
        for (register, address) in
            [(QUEUE_DESCRIPTORS, descriptors), (QUEUE_AVAILABLE, available), (QUEUE_USED, used)]
        {
            let [low, high] = halves(address);
            self.set(register, low);
            self.set(register + 4, high);
        }
        self.set(QUEUE_READY, 1);
    }

    /// The guest.
    pub fn monitor(&mut self) -> &mut Monitor {
        self.monitor
    }

    /// The device's status.
    pub fn status(&mut self) -> u32 {
        self.register(STATUS)
    }

    /// Waits until the device says that it needs a reset.
    pub fn wait_needs_reset(&mut self) {
        self.monitor.wait_register(self.device + STATUS, |status| status & NEEDS_RESET != 0);
    }

    /// Writes entries of the descriptor table.
    pub fn describe(&mut self, descriptors: &[Descriptor]) {
        self.describe_at(DESCRIPTORS + self.shift, descriptors);
    }

    /// Writes descriptors to any place.
    pub fn describe_at(&mut self, address: u64, descriptors: &[Descriptor]) {
        let mut bytes = Vec::new();
        for entry in descriptors {
            bytes.extend(entry.address.to_le_bytes());
            bytes.extend(entry.length.to_le_bytes());
            bytes.extend(entry.flags.to_le_bytes());
            bytes.extend(entry.next.to_le_bytes());
        }
        self.monitor.write(address, &bytes);
    }

    /// Makes the chain that begins with descriptor `head` available.
    pub fn submit(&mut self, head: u16) {
        self.offer(head);
        self.set(QUEUE_NOTIFY, 0);
    }

    fn offer(&mut self, head: u16) {
        let slot = self.shift + AVAILABLE + 4 + 2 * u64::from(self.available % SIZE);
        self.monitor.write(slot, &head.to_le_bytes());
        self.claim(self.available.wrapping_add(1));
    }

    /// Claims that all entries below `index` are available, and notifies the device.
    pub fn set_available_index(&mut self, index: u16) {
        self.claim(index);
        self.set(QUEUE_NOTIFY, 0);
    }

    fn claim(&mut self, index: u16) {
        self.available = index;
        self.monitor.write(self.shift + AVAILABLE + 2, &index.to_le_bytes());
    }

    /// Transfers the sector between [`DATA`] and the disk; gives the request's status byte.
    pub fn transfer(&mut self, kind: u32, sector: u64) -> u8 {
        self.transfer_at(kind, sector, DATA, 512)
    }

    /// The same with memory anywhere, `length` bytes.
    pub fn transfer_at(&mut self, kind: u32, sector: u64, address: u64, length: u32) -> u8 {
        self.begin(kind, sector, address, length);
        self.end()
    }

    /// Starts a transfer between [`DATA`] and the disk. It may stop the guest: what comes next is
    /// [`Self::end`].
    pub fn begin_transfer(&mut self, kind: u32, sector: u64) {
        self.begin(kind, sector, DATA, 512);
    }

    fn begin(&mut self, kind: u32, sector: u64, address: u64, length: u32) {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        header.push(0xff);
        self.monitor.write(HEADER, &header);
        let to_memory = if kind == 0 { WRITE } else { 0 };
        self.describe(&[
            Descriptor { address: HEADER, length: 16, flags: NEXT, next: 1 },
            Descriptor { address, length, flags: NEXT | to_memory, next: 2 },
            Descriptor { address: REQUEST_STATUS, length: 1, flags: WRITE, next: 0 },
        ]);
        self.offer(0);
        // The guest may stand still before it has answered.
        self.monitor.start(Routine::Poke32, &[self.device + QUEUE_NOTIFY, 0]);
    }

    /// Waits for the end of the transfer that was begun; gives the request's status byte.
    pub fn end(&mut self) -> u8 {
        self.monitor.answer().unwrap();
        self.done()
    }

    /// The same for a guest that has answered, or whose answer was given up.
    pub fn done(&mut self) -> u8 {
        let wanted = self.available;
        let index = |word: u64| word >> 16 & 0xffff;
        self.monitor.wait_word(self.shift + USED, |word| index(word) == u64::from(wanted));
        self.monitor.bytes(REQUEST_STATUS, 1)[0]
    }

    /// Makes everything ready for `DiskChain`.
    pub fn prepare_chain(&mut self) {
        // The disk may have been counted on before.
        assert_eq!(self.transfer(0, 0), 0);
        let count = self.monitor.peek(DATA);
        self.monitor.poke(DISK_COUNT, count);
        for (header, kind) in [(HEADER, 0_u64), (OTHER_HEADER, 1)] {
            self.monitor.poke(header, kind);
            self.monitor.poke(header + 8, 0);
        }
        let entry = |address, length, flags, next| Descriptor { address, length, flags, next };
        self.describe(&[
            entry(HEADER, 16, NEXT, 1),
            entry(DATA, 512, NEXT | WRITE, 2),
            entry(REQUEST_STATUS, 1, WRITE, 0),
            entry(OTHER_HEADER, 16, NEXT, 4),
            entry(DATA, 512, NEXT, 5),
            entry(REQUEST_STATUS, 1, WRITE, 0),
        ]);
    }

    /// Makes everything ready for `DiskLoad`; gives the structures and the registers.
    pub fn prepare_load(&mut self) -> (u64, u64) {
        for (header, kind) in [(HEADER, 0_u64), (OTHER_HEADER, 1)] {
            self.monitor.poke(self.shift + header, kind);
        }
        let entry = |address, length, flags, next| {
            let address = self.shift + address;
            Descriptor { address, length, flags, next }
        };
        self.describe(&[
            entry(HEADER, 16, NEXT, 1),
            entry(DATA, 4096, NEXT | WRITE, 2),
            entry(REQUEST_STATUS, 1, WRITE, 0),
            entry(OTHER_HEADER, 16, NEXT, 4),
            entry(DATA, 4096, NEXT, 5),
            entry(REQUEST_STATUS, 1, WRITE, 0),
        ]);
        (SCRATCH + self.shift, self.device)
    }

    /// Writes a sector and reads it again through the device.
    pub fn prove_it_works(&mut self, sector: u64) {
        let bytes = crate::pattern::bytes(sector, 0, 512);
        self.monitor.write(DATA, &bytes);
        assert_eq!(self.transfer(1, sector), 0);
        self.monitor.write(DATA, &[0; 512]);
        assert_eq!(self.transfer(0, sector), 0);
        assert_eq!(self.monitor.bytes(DATA, 512), bytes);
    }
}

fn halves(address: u64) -> [u32; 2] {
    let bytes = address.to_le_bytes();
    let half =
        |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    [half(0), half(4)]
}
