//! A small machine with disks to save.

use std::sync::Arc;

use block::{Node, Progress};
use snapshot::config::{Bus, DeviceConfig, DiskConfig};
use snapshot::{
    GuestMemory, MachineConfig, SaveError, SaveReport, SaveRequest, Section, Stamp, save,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::fake::{Disk, FakeImage};

pub(crate) const MIB: u64 = 1 << 20;

/// Two disks, `d0` and `d1`; `d0` carries the VM state.
pub(crate) struct Machine {
    pub(crate) images: Vec<Arc<FakeImage>>,
    pub(crate) nodes: Vec<Arc<Node>>,
    pub(crate) ram: GuestMemory,
    pub(crate) config: MachineConfig,
    pub(crate) progress: Arc<Progress>,
}

pub(crate) fn node(name: &str, image: &Arc<FakeImage>) -> Arc<Node> {
    Arc::new(Node::new(name, image.clone()))
}

/// 9 MiB below the hole and 3 MiB and a page above, so that the last cluster is not filled.
pub(crate) fn new_ram() -> GuestMemory {
    let below = (GuestAddress(0), 9 << 20);
    GuestMemory::from_ranges(&[below, (GuestAddress(4 << 30), (3 << 20) + 4096)]).unwrap()
}

impl Machine {
    pub(crate) fn new(cluster: u64) -> Self {
        let images = vec![FakeImage::new(cluster), FakeImage::new(cluster)];
        let names = ["d0", "d1"];
        let nodes = names.iter().zip(&images).map(|(name, image)| node(name, image)).collect();
        let ram = new_ram();
        fill(&ram);
        Self { images, nodes, config: config(&ram, &names), ram, progress: Arc::default() }
    }

    pub(crate) fn save(&self, tag: &str) -> Result<SaveReport, SaveError> {
        self.save_with(tag, 2)
    }

    pub(crate) fn save_with(&self, tag: &str, threads: usize) -> Result<SaveReport, SaveError> {
        save(SaveRequest {
            nodes: &self.nodes,
            vmstate: "d0",
            stamp: stamp(tag),
            about: snapshot::About::default(),
            compress: None,
            config: &self.config,
            sections: vec![Section::encode("vcpu", 0, 1, &0x1234_u64).unwrap()],
            ram: &self.ram,
            progress: &self.progress,
            threads,
        })
    }

    /// What is on all disks.
    pub(crate) fn disks(&self) -> Vec<Disk> {
        self.images.iter().map(|image| image.disk().clone()).collect()
    }

    pub(crate) fn assert_no_open_changes(&self) {
        for image in &self.images {
            assert_eq!(image.open_changes(), 0);
        }
    }

    /// What the guest does after a save: everything is different.
    pub(crate) fn go_on(&self) {
        for image in &self.images {
            image.disk().data.fill(0x77);
        }
        for region in self.ram.iter() {
            let bytes = vec![0x5a; usize::try_from(region.len()).unwrap()];
            self.ram.write_slice(&bytes, region.start_addr()).unwrap();
        }
    }
}

pub(crate) fn stamp(tag: &str) -> Stamp {
    Stamp {
        tag: tag.to_owned(),
        date_sec: 1_700_000_000,
        date_nsec: 5_000,
        vm_clock_nsec: 42_000_000_000,
    }
}

fn config(ram: &GuestMemory, names: &[&str]) -> MachineConfig {
    let device = |(slot, name): (u64, &&str)| DeviceConfig {
        kind: "virtio-blk".to_owned(),
        id: String::new(),
        bus: Bus::Mmio,
        address: 0xd000_0000 + slot * 0x1000,
        irq: Some(5),
        queues: 1,
        disk: Some(DiskConfig {
            node: (*name).to_owned(),
            size: 4096,
            read_only: false,
            serial: String::new(),
            format: "fake".to_owned(),
            filename: String::new(),
            share_rw: false,
            rerror: String::new(),
            werror: String::new(),
        }),
    };
    MachineConfig {
        machine: "microvm".to_owned(),
        ram_bytes: ram.iter().map(GuestMemoryRegion::len).sum(),
        vcpus: 1,
        devices: (0..).zip(names).map(device).collect(),
        ..MachineConfig::default()
    }
}

/// Pages with data, pages written with zeroes and pages never touched, alone and in runs, at the
/// edges of both regions.
fn fill(ram: &GuestMemory) {
    let page = |at: u64, byte: u8| ram.write_slice(&[byte; 4096], GuestAddress(at)).unwrap();
    page(0, 1);
    page(9 * MIB - 4096, 2);
    for at in (MIB..3 * MIB).step_by(4096) {
        page(at, 3);
    }
    for at in (5 * MIB..6 * MIB).step_by(4096) {
        page(at, 0);
    }
    ram.write_obj(1_u8, GuestAddress(5 * MIB + 70_000)).unwrap();
    page(4 << 30, 4);
    page((4 << 30) + 3 * MIB, 5);
}

/// All bytes of RAM.
pub(crate) fn contents(ram: &GuestMemory) -> Vec<Vec<u8>> {
    let of = |region: &ram::GuestRegion| {
        let mut bytes = vec![0; usize::try_from(region.len()).unwrap()];
        ram.read_slice(&mut bytes, region.start_addr()).unwrap();
        bytes
    };
    ram.iter().map(of).collect()
}
