//! A driver for the virtio-blk device in slot 0, run from the host: right where it should be, and
//! wrong where a test wants it.

use super::layout::SCRATCH;
use super::monitor::Monitor;

/// First register of slot 0 (`docs/boot.md`).
const DEVICE: u64 = 0xd000_0000;

/// Registers (virtio 1.2, table 4.1).
const MAGIC: u64 = DEVICE;
const DEVICE_FEATURES: u64 = DEVICE + 0x10;
const DEVICE_FEATURES_SELECT: u64 = DEVICE + 0x14;
const DRIVER_FEATURES: u64 = DEVICE + 0x20;
const DRIVER_FEATURES_SELECT: u64 = DEVICE + 0x24;
const QUEUE_SELECT: u64 = DEVICE + 0x30;
const QUEUE_SIZE: u64 = DEVICE + 0x38;
const QUEUE_READY: u64 = DEVICE + 0x44;
const QUEUE_NOTIFY: u64 = DEVICE + 0x50;
const STATUS: u64 = DEVICE + 0x70;
const QUEUE_DESCRIPTORS: u64 = DEVICE + 0x80;
const QUEUE_AVAILABLE: u64 = DEVICE + 0x90;
const QUEUE_USED: u64 = DEVICE + 0xa0;

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
}

impl<'a> Driver<'a> {
    /// Resets the device and sets up its first queue.
    pub fn start(monitor: &'a mut Monitor) -> Self {
        assert_eq!(monitor.peek32(MAGIC), 0x7472_6976, "there is no virtio device");
        monitor.poke32(STATUS, 0);
        assert_eq!(monitor.peek32(STATUS), 0);
        for rings in [AVAILABLE, USED] {
            monitor.write(rings, &[0; 8]);
        }
        let mut driver = Self { monitor, available: 0 };
        driver.negotiate();
        driver.queue(DESCRIPTORS, AVAILABLE, USED);
        driver.monitor.poke32(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        driver
    }

    /// Of the features only VIRTIO_F_VERSION_1 and VIRTIO_RING_F_INDIRECT_DESC are taken.
    fn negotiate(&mut self) {
        self.monitor.poke32(STATUS, ACKNOWLEDGE | DRIVER);
        for (word, wanted) in [(0, 1 << 28), (1, 1)] {
            self.monitor.poke32(DEVICE_FEATURES_SELECT, word);
            let offered = self.monitor.peek32(DEVICE_FEATURES);
            assert_eq!(offered & wanted, wanted, "features {word}: {offered:#x}");
            self.monitor.poke32(DRIVER_FEATURES_SELECT, word);
            self.monitor.poke32(DRIVER_FEATURES, wanted);
        }
        self.monitor.poke32(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert_ne!(self.status() & FEATURES_OK, 0);
    }

    fn queue(&mut self, descriptors: u64, available: u64, used: u64) {
        self.monitor.poke32(QUEUE_SELECT, 0);
        self.monitor.poke32(QUEUE_SIZE, SIZE.into());
        for (register, address) in
            [(QUEUE_DESCRIPTORS, descriptors), (QUEUE_AVAILABLE, available), (QUEUE_USED, used)]
        {
            let [low, high] = halves(address);
            self.monitor.poke32(register, low);
            self.monitor.poke32(register + 4, high);
        }
        self.monitor.poke32(QUEUE_READY, 1);
    }

    /// The guest.
    pub fn monitor(&mut self) -> &mut Monitor {
        self.monitor
    }

    /// The device's status.
    pub fn status(&mut self) -> u32 {
        self.monitor.peek32(STATUS)
    }

    /// Waits until the device says that it needs a reset.
    pub fn wait_needs_reset(&mut self) {
        self.monitor.wait_register(STATUS, |status| status & NEEDS_RESET != 0);
    }

    /// Writes entries of the descriptor table.
    pub fn describe(&mut self, descriptors: &[Descriptor]) {
        self.describe_at(DESCRIPTORS, descriptors);
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
        let slot = AVAILABLE + 4 + 2 * u64::from(self.available % SIZE);
        self.monitor.write(slot, &head.to_le_bytes());
        let next = self.available.wrapping_add(1);
        self.set_available_index(next);
    }

    /// Claims that all entries below `index` are available, and notifies the device.
    pub fn set_available_index(&mut self, index: u16) {
        self.available = index;
        self.monitor.write(AVAILABLE + 2, &index.to_le_bytes());
        self.monitor.poke32(QUEUE_NOTIFY, 0);
    }

    /// Transfers the sector between [`DATA`] and the disk; gives the request's status byte.
    pub fn transfer(&mut self, kind: u32, sector: u64) -> u8 {
        self.transfer_at(kind, sector, DATA, 512)
    }

    /// The same with memory anywhere, `length` bytes.
    pub fn transfer_at(&mut self, kind: u32, sector: u64, address: u64, length: u32) -> u8 {
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
        let wanted = self.available.wrapping_add(1);
        self.submit(0);
        let index = |word: u64| word >> 16 & 0xffff;
        self.monitor.wait_word(USED, |word| index(word) == u64::from(wanted));
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
