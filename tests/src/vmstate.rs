//! The VM state of a snapshot, found in the image file without the program under test: through the
//! tables of qcow2, and by what `docs/vm-state-format.md` says.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bits of a table entry that are a host offset.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// An image whose VM state is looked at and damaged; no process may have it open.
pub struct VmState {
    file: File,
    cluster: u64,
    /// Host offset of the snapshot's entry in the snapshot table.
    entry: u64,
    /// Host offset of the snapshot's L1 table.
    l1: u64,
    /// Index of the first L1 entry of the VM state.
    first: u64,
}

/// A section of the VM state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// "vcpu.0"
    pub name: String,
    /// Of its payload in the area.
    pub offset: u64,
    /// Of its payload.
    pub length: u64,
    /// Of its entry in the section table.
    pub entry: u64,
}

impl VmState {
    /// Opens the VM state of the only snapshot in the image.
    pub fn open(image: &Path) -> Self {
        let file = OpenOptions::new().read(true).write(true).open(image).unwrap();
        let mut state = Self { file, cluster: 0, entry: 0, l1: 0, first: 0 };
        assert_eq!(state.host_u32(60), 1, "the image must have one snapshot");
        state.cluster = 1 << state.host_u32(20);
        state.entry = state.host_u64(64);
        state.l1 = state.host_u64(state.entry);
        let of_l2 = state.cluster / 8 * state.cluster;
        state.first = state.host_u64(24).div_ceil(of_l2);
        state
    }

    /// The sections, as the table says.
    pub fn sections(&self) -> Vec<Section> {
        let word = |at| u64::from(u32::from_le_bytes(self.read(at, 4).try_into().unwrap()));
        let long = |at| u64::from_le_bytes(self.read(at, 8).try_into().unwrap());
        let (regions, sections) = (word(32), word(36));
        let table = 64 + 24 * regions;
        let section = |index| {
            let entry = table + 80 * index;
            let kind = self.read(entry, 48);
            let kind = String::from_utf8(kind).unwrap().trim_end_matches('\0').to_owned();
            let name = format!("{kind}.{}", word(entry + 48));
            Section { name, offset: long(entry + 56), length: long(entry + 64), entry }
        };
        (0..sections).map(section).collect()
    }

    /// Bytes of the area.
    pub fn read(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        for (index, byte) in bytes.iter_mut().enumerate() {
            let at = offset + index as u64;
            let cluster = self.host_u64(self.l2_entry(at)) & OFFSET;
            if cluster != 0 {
                let host = cluster + at % self.cluster;
                self.file.read_exact_at(std::slice::from_mut(byte), host).unwrap();
            }
        }
        bytes
    }

    /// Replaces stored bytes of the area.
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        for (at, byte) in (offset..).zip(bytes) {
            self.file.write_all_at(&[*byte], self.host(at)).unwrap();
        }
    }

    /// Turns over the bits of a byte.
    pub fn flip(&self, offset: u64) {
        let byte = self.read(offset, 1)[0];
        self.write(offset, &[!byte]);
    }

    /// Computes the header's checksum anew, so that what is wrong inside is found by its own rule.
    pub fn seal(&self) {
        let length = u32::from_le_bytes(self.read(12, 4).try_into().unwrap());
        self.write(60, &[0; 4]);
        let sum = crc32(&self.read(0, length as usize));
        self.write(60, &sum.to_le_bytes());
    }

    /// Computes a section's checksum anew; the header's has to follow.
    pub fn seal_section(&self, section: &Section) {
        let length = usize::try_from(section.length).unwrap();
        let sum = crc32(&self.read(section.offset, length));
        self.write(section.entry + 72, &sum.to_le_bytes());
    }

    /// Host offset of a byte that is stored.
    pub fn host(&self, offset: u64) -> u64 {
        let cluster = self.host_u64(self.l2_entry(offset)) & OFFSET;
        assert_ne!(cluster, 0, "nothing is stored at {offset:#x} of the VM state");
        cluster + offset % self.cluster
    }

    /// Sets the L2 entry of the cluster at `offset`; gives the one before.
    pub fn map(&self, offset: u64, entry: u64) -> u64 {
        let at = self.l2_entry(offset);
        let before = self.host_u64(at);
        self.file.write_all_at(&entry.to_be_bytes(), at).unwrap();
        before
    }

    /// The length that the snapshot table tells.
    pub fn size(&self) -> u64 {
        self.host_u64(self.entry + 40)
    }

    /// Changes that length.
    pub fn set_size(&self, size: u64) {
        let small = u32::try_from(size).unwrap_or(0);
        self.file.write_all_at(&small.to_be_bytes(), self.entry + 32).unwrap();
        self.file.write_all_at(&size.to_be_bytes(), self.entry + 40).unwrap();
    }

    /// Host offset of the L2 entry for an offset of the area.
    fn l2_entry(&self, offset: u64) -> u64 {
        let cluster = offset / self.cluster;
        let per_table = self.cluster / 8;
        let l2 = self.host_u64(self.l1 + 8 * (self.first + cluster / per_table)) & OFFSET;
        assert_ne!(l2, 0, "no L2 table for {offset:#x} of the VM state");
        l2 + 8 * (cluster % per_table)
    }

    fn host_u32(&self, at: u64) -> u32 {
        let mut bytes = [0; 4];
        self.file.read_exact_at(&mut bytes, at).unwrap();
        u32::from_be_bytes(bytes)
    }

    fn host_u64(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    }
}

/// CRC-32 of IEEE 802.3, bit by bit.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32| if crc & 1 == 0 { crc >> 1 } else { (crc >> 1) ^ 0xedb8_8320 };
    let byte = |crc: u32, byte: &u8| (0..8).fold(crc ^ u32::from(*byte), |crc, _| step(crc));
    !bytes.iter().fold(u32::MAX, byte)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_checksum_is_crc_32() {
        // The check value of CRC-32/ISO-HDLC.
        assert_eq!(super::crc32(b"123456789"), 0xcbf4_3926);
    }
}
