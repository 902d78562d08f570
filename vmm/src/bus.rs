//! Where the guest's port and MMIO accesses go. Fixed once the machine is built, so that vCPUs
//! look devices up without a lock.

use std::sync::{Arc, Mutex, PoisonError};

/// A device on the bus. Offsets count from the start of the device's range.
pub trait BusDevice: Send {
    /// The guest reads `data.len()` bytes.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// The guest writes.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A device that several vCPUs and the machine's own thread use.
pub type SharedDevice = Arc<Mutex<dyn BusDevice>>;

struct Range {
    base: u64,
    len: u64,
    device: SharedDevice,
}

/// Which of the two address spaces of x86.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Space {
    /// IN and OUT.
    Port,
    /// Memory-mapped.
    Mmio,
}

/// All devices the guest can reach.
#[derive(Default)]
pub struct Bus {
    ports: Vec<Range>,
    mmio: Vec<Range>,
}

/// Two devices at the same address.
#[derive(Debug, thiserror::Error)]
#[error("a device at {base:#x} overlaps another one")]
pub struct Overlap {
    base: u64,
}

impl Bus {
    /// Adds a device.
    pub fn insert(
        &mut self,
        space: Space,
        base: u64,
        len: u64,
        device: SharedDevice,
    ) -> Result<(), Overlap> {
        let ranges = match space {
            Space::Port => &mut self.ports,
            Space::Mmio => &mut self.mmio,
        };
        if ranges.iter().any(|range| base < range.base + range.len && range.base < base + len) {
            return Err(Overlap { base });
        }
        ranges.push(Range { base, len, device });
        Ok(())
    }

    /// IN: nobody there reads as all ones, as an empty ISA bus does.
    pub fn pio_read(&self, port: u16, data: &mut [u8]) {
        read(&self.ports, u64::from(port), data);
    }

    /// OUT: nobody there is ignored.
    pub fn pio_write(&self, port: u16, data: &[u8]) {
        write(&self.ports, u64::from(port), data);
    }

    /// A load from an address without memory.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        read(&self.mmio, address, data);
    }

    /// A store to an address without memory.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        write(&self.mmio, address, data);
    }
}

fn find(ranges: &[Range], address: u64) -> Option<(&Range, u64)> {
    ranges.iter().find_map(|range| {
        let offset = address.checked_sub(range.base)?;
        (offset < range.len).then_some((range, offset))
    })
}

fn read(ranges: &[Range], address: u64, data: &mut [u8]) {
    data.fill(0xff);
    if let Some((range, offset)) = find(ranges, address) {
        range.device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
    }
}

fn write(ranges: &[Range], address: u64, data: &[u8]) {
    if let Some((range, offset)) = find(ranges, address) {
        range.device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Recorder(Vec<(u64, Vec<u8>)>);

    impl BusDevice for Recorder {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0.push((offset, data.to_vec()));
        }
    }

    #[test]
    fn an_access_reaches_the_device_with_its_offset() {
        let device = Arc::new(Mutex::new(Recorder::default()));
        let mut bus = Bus::default();
        bus.insert(Space::Mmio, 0x1000, 0x10, device.clone()).unwrap();
        bus.mmio_write(0x1004, &[1, 2]);
        let mut data = [0; 2];
        bus.mmio_read(0x100f, &mut data);
        assert_eq!(device.lock().unwrap().0, [(4, vec![1, 2])]);
        assert_eq!(data, [0xf, 0xf]);
    }

    #[test]
    fn an_empty_address_reads_all_ones() {
        let mut data = [0; 4];
        Bus::default().pio_read(0x1234, &mut data);
        assert_eq!(data, [0xff; 4]);
    }

    #[test]
    fn overlapping_devices_are_refused() {
        let mut bus = Bus::default();
        let device = || Arc::new(Mutex::new(Recorder::default()));
        bus.insert(Space::Port, 0x60, 5, device()).unwrap();
        assert!(bus.insert(Space::Port, 0x64, 1, device()).is_err());
        bus.insert(Space::Port, 0x65, 1, device()).unwrap();
    }
}
