//! A driver and a disk for tests: the driver speaks to a transport as a guest would, through
//! registers and rings in guest memory.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use block::{Error, Format, Node, ReadBuf, WriteBuf};
use vm_memory::{Bytes, GuestAddress};

use super::{BlockDevice, BlockOptions, COMMON_FEATURES, MmioTransport, VirtioDevice};
use crate::{EventFdLine, GuestMemory};

pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;

pub(super) const NEEDS_RESET: u32 = 64;
pub(super) const VERSION_1: u64 = 1 << 32;

/// Two regions side by side, so that buffers can cross from one to the other.
pub(super) const REGION: u64 = 4 << 20;
pub(super) const MEMORY: u64 = 2 * REGION;
/// Where tests may put their data; rings are below.
pub(super) const DATA: u64 = 1 << 20;

pub(super) fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[
        (GuestAddress(0), REGION as usize),
        (GuestAddress(REGION), REGION as usize),
    ])
    .unwrap()
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Desc {
    pub(super) addr: u64,
    pub(super) len: u32,
    pub(super) flags: u16,
    pub(super) next: u16,
}

pub(super) fn readable(addr: u64, len: u32) -> Desc {
    Desc { addr, len, flags: 0, next: 0 }
}

pub(super) fn writable(addr: u64, len: u32) -> Desc {
    Desc { flags: WRITE, ..readable(addr, len) }
}

pub(super) fn store_desc(mem: &GuestMemory, table: u64, index: u16, desc: Desc) {
    let at = GuestAddress(table + u64::from(index) * 16);
    let mut bytes = desc.addr.to_le_bytes().to_vec();
    bytes.extend(desc.len.to_le_bytes());
    bytes.extend(desc.flags.to_le_bytes());
    bytes.extend(desc.next.to_le_bytes());
    mem.write_slice(&bytes, at).unwrap();
}

/// Links the descriptors and stores them from `first` on.
pub(super) fn store_chain(mem: &GuestMemory, table: u64, first: u16, descs: &[Desc]) {
    for (i, desc) in descs.iter().enumerate() {
        let mut desc = *desc;
        let index = first + i as u16;
        if i + 1 < descs.len() {
            desc.flags |= NEXT;
            desc.next = index + 1;
        }
        store_desc(mem, table, index, desc);
    }
}

/// Where one queue's rings are, and how far the driver is.
#[derive(Debug, Clone)]
pub(super) struct Ring {
    pub(super) size: u32,
    pub(super) desc: u64,
    pub(super) avail: u64,
    pub(super) used: u64,
    pub(super) avail_idx: u16,
    pub(super) used_idx: u16,
}

impl Ring {
    pub(super) fn at(base: u64, size: u32) -> Self {
        Self {
            size,
            desc: base,
            avail: base + 0x2000,
            used: base + 0x3000,
            avail_idx: 0,
            used_idx: 0,
        }
    }
}

pub(super) struct Driver {
    pub(super) dev: MmioTransport,
    pub(super) mem: GuestMemory,
    pub(super) line: Arc<EventFdLine>,
    pub(super) rings: Vec<Ring>,
    pub(super) features: u64,
}

impl Driver {
    pub(super) fn new(device: Box<dyn VirtioDevice>) -> Self {
        Self::with_memory(device, memory())
    }

    pub(super) fn with_memory(device: Box<dyn VirtioDevice>, mem: GuestMemory) -> Self {
        let rings = device
            .queue_max_sizes()
            .iter()
            .enumerate()
            .map(|(i, size)| Ring::at(0x10000 * (i as u64 + 1), u32::from(*size)))
            .collect();
        let line = Arc::new(EventFdLine::new().unwrap());
        let features = device.device_features() | COMMON_FEATURES;
        Self {
            dev: MmioTransport::new(device, mem.clone(), line.clone()).unwrap(),
            mem,
            line,
            rings,
            features,
        }
    }

    pub(super) fn reg(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.dev.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub(super) fn set(&mut self, offset: u64, value: u32) {
        self.dev.write(offset, &value.to_le_bytes());
    }

    pub(super) fn status(&mut self) -> u32 {
        self.reg(0x70)
    }

    /// Negotiates `self.features`; true if the device took them.
    pub(super) fn negotiate(&mut self) -> bool {
        self.set(0x70, 1);
        self.set(0x70, 3);
        self.set(0x24, 0);
        self.set(0x20, self.features as u32);
        self.set(0x24, 1);
        self.set(0x20, (self.features >> 32) as u32);
        self.set(0x70, 3 | 8);
        self.status() & 8 != 0
    }

    pub(super) fn set_up_queue(&mut self, index: usize) {
        let ring = self.rings[index].clone();
        self.set(0x30, index as u32);
        self.set(0x38, ring.size);
        for (offset, addr) in [(0x80, ring.desc), (0x90, ring.avail), (0xa0, ring.used)] {
            self.set(offset, addr as u32);
            self.set(offset + 4, (addr >> 32) as u32);
        }
        self.set(0x44, 1);
    }

    /// From reset to running, all queues empty.
    pub(super) fn start(&mut self) {
        self.set(0x70, 0);
        assert!(self.negotiate());
        for index in 0..self.rings.len() {
            let ring = &mut self.rings[index];
            (ring.avail_idx, ring.used_idx) = (0, 0);
            if ring.avail + 0x1000 < MEMORY && ring.used + 0x1000 < MEMORY {
                let zeroes = [0; 0x1000];
                self.mem.write_slice(&zeroes, GuestAddress(ring.avail)).unwrap();
                self.mem.write_slice(&zeroes, GuestAddress(ring.used)).unwrap();
            }
            self.set_up_queue(index);
        }
        self.set(0x70, 3 | 8 | 4);
    }

    /// Makes the chain that starts at descriptor `head` available, without a notification.
    pub(super) fn offer(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let slot = u64::from(ring.avail_idx) % u64::from(ring.size);
        self.mem.write_obj(head.to_le(), GuestAddress(ring.avail + 4 + 2 * slot)).unwrap();
        ring.avail_idx = ring.avail_idx.wrapping_add(1);
        fence(Ordering::SeqCst);
        self.mem
            .store(ring.avail_idx.to_le(), GuestAddress(ring.avail + 2), Ordering::Release)
            .unwrap();
    }

    pub(super) fn kick(&mut self, queue: usize) {
        self.set(0x50, queue as u32);
    }

    /// Sends one request from descriptor 0 on.
    pub(super) fn send(&mut self, queue: usize, descs: &[Desc]) {
        store_chain(&self.mem, self.rings[queue].desc, 0, descs);
        self.offer(queue, 0);
        self.kick(queue);
    }

    /// Sends one request and waits for it; returns the length in the used ring.
    pub(super) fn request(&mut self, queue: usize, descs: &[Desc]) -> u32 {
        self.send(queue, descs);
        let (head, len) = self.wait_used(queue);
        assert_eq!(head, 0);
        len
    }

    /// Takes the next entry of the used ring if there is one.
    pub(super) fn take_used(&mut self, queue: usize) -> Option<(u32, u32)> {
        let ring = &mut self.rings[queue];
        let idx: u16 = self.mem.load(GuestAddress(ring.used + 2), Ordering::Acquire).unwrap();
        if u16::from_le(idx) == ring.used_idx {
            return None;
        }
        let slot = u64::from(ring.used_idx) % u64::from(ring.size);
        ring.used_idx = ring.used_idx.wrapping_add(1);
        let entry: [u32; 2] = [0, 4]
            .map(|at| self.mem.read_obj(GuestAddress(ring.used + 4 + 8 * slot + at)).unwrap());
        Some((u32::from_le(entry[0]), u32::from_le(entry[1])))
    }

    /// Waits for an interrupt with an entry in the used ring, as a driver does.
    pub(super) fn wait_used(&mut self, queue: usize) -> (u32, u32) {
        loop {
            let ring = &self.rings[queue];
            let used_event = GuestAddress(ring.avail + 4 + 2 * u64::from(ring.size));
            self.mem.store(ring.used_idx.to_le(), used_event, Ordering::SeqCst).unwrap();
            fence(Ordering::SeqCst);
            if let Some(entry) = self.take_used(queue) {
                return entry;
            }
            self.wait_interrupt();
        }
    }

    /// Waits for an edge, acknowledges it and returns what it was for.
    pub(super) fn wait_interrupt(&mut self) -> u32 {
        wait_readable(self.line.event_fd().as_raw_fd());
        self.line.event_fd().read().unwrap();
        let status = self.reg(0x60);
        self.set(0x64, status);
        status
    }

    /// Waits until the device says it needs a reset.
    pub(super) fn wait_broken(&mut self) {
        while self.wait_interrupt() & 2 == 0 {}
        assert_ne!(self.status() & NEEDS_RESET, 0);
    }

    pub(super) fn write(&self, addr: u64, bytes: &[u8]) {
        self.mem.write_slice(bytes, GuestAddress(addr)).unwrap();
    }

    pub(super) fn bytes(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.mem.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        bytes
    }
}

/// Waits for the descriptor, and fails the test if nothing comes in a time no test needs.
pub(super) fn wait_readable(fd: i32) {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: the pointer is to one pollfd, and the count is one.
    let ready = unsafe { libc::poll(&raw mut poll, 1, 20_000) };
    assert_eq!(ready, 1, "the device gave no interrupt");
}

/// Stops requests until the test lets each go.
pub(super) struct Gate {
    pub(super) entered: Receiver<()>,
    pub(super) release: Sender<()>,
}

/// A disk in memory that logs what is asked of it, and fails or waits on demand.
pub(super) struct FakeDisk {
    pub(super) data: Mutex<Vec<u8>>,
    pub(super) log: Mutex<Vec<String>>,
    pub(super) fail: AtomicBool,
    read_only: bool,
    gate: Mutex<Option<(Sender<()>, Receiver<()>)>>,
}

impl FakeDisk {
    pub(super) fn new(size: usize, read_only: bool) -> Arc<Self> {
        let data = (0..size).map(|i| (i / 512) as u8 ^ i as u8).collect();
        Arc::new(Self {
            data: Mutex::new(data),
            log: Mutex::default(),
            fail: AtomicBool::new(false),
            read_only,
            gate: Mutex::default(),
        })
    }

    pub(super) fn device(self: &Arc<Self>, num_queues: u16) -> Box<BlockDevice> {
        let node = Arc::new(Node::new("disk0", self.clone() as Arc<dyn Format>));
        let options = BlockOptions { serial: "SERIAL-1".into(), num_queues };
        Box::new(BlockDevice::new(node, options).unwrap())
    }

    pub(super) fn gate(&self) -> Gate {
        let (enter, entered) = channel();
        let (release, released) = channel();
        *self.gate.lock().unwrap() = Some((enter, released));
        Gate { entered, release }
    }

    pub(super) fn take_log(&self) -> Vec<String> {
        std::mem::take(&mut self.log.lock().unwrap())
    }

    fn enter(&self, what: String) -> block::Result<()> {
        if let Some((enter, released)) = &*self.gate.lock().unwrap() {
            enter.send(()).unwrap();
            // A test that is over lets everything go.
            let _ = released.recv();
        }
        self.log.lock().unwrap().push(what.clone());
        if self.fail.load(Ordering::SeqCst) {
            return Err(Error::NotSupported(what));
        }
        Ok(())
    }
}

impl Format for FakeDisk {
    fn driver(&self) -> &'static str {
        "fake"
    }

    fn size(&self) -> u64 {
        self.data.lock().unwrap().len() as u64
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read(&self, offset: u64, bufs: &[ReadBuf<'_>]) -> block::Result<()> {
        let len: usize = bufs.iter().map(ReadBuf::len).sum();
        self.enter(format!("read {offset} {len}"))?;
        let data = self.data.lock().unwrap();
        let mut at = offset as usize;
        for buf in bufs {
            let from = &data[at..at + buf.len()];
            // SAFETY: the buffer is writable for its length by its contract, and apart from `data`.
            unsafe { buf.as_mut_ptr().copy_from(from.as_ptr(), from.len()) };
            at += buf.len();
        }
        Ok(())
    }

    fn write(&self, offset: u64, bufs: &[WriteBuf<'_>]) -> block::Result<()> {
        let len: usize = bufs.iter().map(WriteBuf::len).sum();
        self.enter(format!("write {offset} {len}"))?;
        let mut data = self.data.lock().unwrap();
        let mut at = offset as usize;
        for buf in bufs {
            let to = &mut data[at..at + buf.len()];
            // SAFETY: the buffer is readable for its length by its contract, and apart from `data`.
            unsafe { to.as_mut_ptr().copy_from(buf.as_ptr(), to.len()) };
            at += buf.len();
        }
        Ok(())
    }

    fn flush(&self) -> block::Result<()> {
        self.enter("flush".into())
    }

    fn discard(&self, offset: u64, len: u64) -> block::Result<()> {
        self.enter(format!("discard {offset} {len}"))
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> block::Result<()> {
        self.enter(format!("zero {offset} {len} {unmap}"))?;
        self.data.lock().unwrap()[offset as usize..(offset + len) as usize].fill(0);
        Ok(())
    }
}

/// A virtio-blk request's header at DATA; status byte at DATA + 0x100; data from DATA + 0x1000.
pub(super) const HEADER: u64 = DATA;
pub(super) const STATUS: u64 = DATA + 0x100;
pub(super) const PAYLOAD: u64 = DATA + 0x1000;

pub(super) fn write_header(driver: &Driver, kind: u32, sector: u64) {
    let mut header = kind.to_le_bytes().to_vec();
    header.extend([0; 4]);
    header.extend(sector.to_le_bytes());
    driver.write(HEADER, &header);
    driver.write(STATUS, &[0xee]);
}

/// Sends a request with one data segment and returns its status.
pub(super) fn blk(driver: &mut Driver, kind: u32, sector: u64, data: &[Desc]) -> u8 {
    write_header(driver, kind, sector);
    let mut descs = vec![readable(HEADER, 16)];
    descs.extend(data);
    descs.push(writable(STATUS, 1));
    driver.request(0, &descs);
    driver.bytes(STATUS, 1)[0]
}
