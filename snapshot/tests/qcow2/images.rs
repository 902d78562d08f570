//! Two real qcow2 images and guest memory to save into them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use block::graph::Graph;
use block::{Node, Progress, ReadBuf, WriteBuf};
use snapshot::{
    Checkpoint, GuestMemory, MachineConfig, SaveError, SaveReport, SaveRequest, Section, Stamp,
    save,
};
use vm_memory::{Bytes, GuestAddress};

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const DISK: u64 = 64 * MIB;

pub(crate) struct Images {
    _dir: tempfile::TempDir,
    pub(crate) paths: Vec<PathBuf>,
    graph: Graph,
    pub(crate) nodes: Vec<Arc<Node>>,
}

pub(crate) fn qemu_img(arguments: &[&str]) -> String {
    let output = Command::new("qemu-img").args(arguments).output();
    let output = output.expect("qemu-img, of the package qemu-utils, is needed by these tests");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "qemu-img {arguments:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

impl Images {
    /// Images d0 and d1 made by qemu-img with these `-o` options.
    pub(crate) fn create(options: &str) -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = |name: &str| dir.path().join(name);
        let paths = vec![path("d0.qcow2"), path("d1.qcow2")];
        for path in &paths {
            let size = DISK.to_string();
            qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, text(path), &size]);
        }
        let mut images = Self { _dir: dir, paths, graph: Graph::new(), nodes: Vec::new() };
        images.open();
        images
    }

    pub(crate) fn open(&mut self) {
        for (at, path) in self.paths.iter().enumerate() {
            let path = text(path);
            let options =
                format!("driver=qcow2,node-name=d{at},file.driver=file,file.filename={path}");
            self.nodes.push(self.graph.add_text(&options).unwrap());
        }
    }

    pub(crate) fn close(&mut self) {
        self.nodes.clear();
        self.graph = Graph::new();
    }

    /// Closes the images, has them checked, and opens them again.
    pub(crate) fn check(&mut self) {
        self.close();
        for path in &self.paths {
            let said = qemu_img(&["check", text(path)]);
            assert!(said.contains("No errors were found"), "{said}");
        }
        self.open();
    }

    pub(crate) fn write(&self, disk: usize, byte: u8) {
        let bytes = vec![byte; 3 << 20];
        let format = self.nodes[disk].format();
        format.write(5 * MIB + 512, &[WriteBuf::new(&bytes)]).unwrap();
    }

    pub(crate) fn read(&self, disk: usize) -> u8 {
        let mut bytes = vec![0; 3 << 20];
        let format = self.nodes[disk].format();
        format.read(5 * MIB + 512, &[ReadBuf::new(&mut bytes)]).unwrap();
        assert!(bytes.iter().all(|byte| *byte == bytes[0]));
        bytes[0]
    }

    pub(crate) fn save(&self, tag: &str, ram: &GuestMemory) -> Result<SaveReport, SaveError> {
        save(SaveRequest {
            nodes: &self.nodes,
            vmstate: "d0",
            stamp: Stamp {
                tag: tag.to_owned(),
                date_sec: 1_700_000_000,
                date_nsec: 123_000,
                vm_clock_nsec: 3_723_000_000_000,
            },
            about: snapshot::About::default(),
            compress: None,
            config: &MachineConfig::default(),
            sections: vec![Section::encode("vcpu", 0, 1, tag).unwrap()],
            ram,
            progress: &Progress::default(),
            threads: 3,
        })
    }

    /// Loads `tag` into used memory and the disks; returns what its section says.
    pub(crate) fn load(&self, tag: &str, ram: &GuestMemory) -> String {
        let checkpoint = Checkpoint::open(&self.nodes, "d0", tag).unwrap();
        checkpoint.read_ram(ram, false, 3, &Progress::default()).unwrap();
        checkpoint.revert_disks().unwrap();
        checkpoint.sections().take("vcpu", 0, 1..=1).unwrap()
    }
}

/// 33 MiB below the hole and 3 MiB and a page above.
pub(crate) fn ram() -> GuestMemory {
    let above = (GuestAddress(4 << 30), (3 << 20) + 4096);
    GuestMemory::from_ranges(&[(GuestAddress(0), 33 << 20), above]).unwrap()
}

/// Writes a pattern of its own over parts of RAM: `seed` says which and what.
pub(crate) fn scribble(ram: &GuestMemory, seed: u8) {
    for n in 0..40_u64 {
        let page = vec![seed ^ u8::try_from(n).unwrap() | 0x80; 4096];
        let at = (n * 211 + u64::from(seed) * 37) % (33 * 256) * 4096;
        ram.write_slice(&page, GuestAddress(at)).unwrap();
    }
    let run = vec![seed | 0x40; 6 << 20];
    ram.write_slice(&run, GuestAddress(u64::from(seed % 20) * MIB)).unwrap();
    ram.write_obj(seed, GuestAddress((4 << 30) + 3 * MIB + 4095)).unwrap();
}

pub(crate) fn contents(ram: &GuestMemory) -> Vec<u8> {
    let mut bytes = vec![0; (36 << 20) + 4096];
    let (below, above) = bytes.split_at_mut(33 << 20);
    ram.read_slice(below, GuestAddress(0)).unwrap();
    ram.read_slice(above, GuestAddress(4 << 30)).unwrap();
    bytes
}
