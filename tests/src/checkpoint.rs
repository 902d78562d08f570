//! A booted guest in a checkpoint. Booting takes long, loading does not: the guest is booted once
//! for each kind of machine, and every test starts from an overlay of its image.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hasher};
use std::path::{Path, PathBuf};

use crate::disk::{Disk, qemu_img};
use crate::repo;
use crate::vm::{Vm, VmSpec, binary};

/// The tag of the shared checkpoint.
pub const TAG: &str = "booted";

/// Size of the shared guest's disks.
const DISK_SIZE: &str = "64M";

/// A machine whose booted state is shared.
#[derive(Debug, Clone, Copy)]
pub struct Booted {
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Number of disks.
    pub disks: usize,
}

impl Booted {
    /// A machine of that shape in `dir`, with the guest booted: its disks are copies of the shared
    /// ones, checkpoint included.
    pub fn spec(self, dir: &Path) -> VmSpec {
        let base = self.image_dir();
        let disks: Vec<Disk> = (0..self.disks)
            .map(|index| {
                let path = dir.join(format!("disk{index}.qcow2"));
                fs::copy(base.join(format!("disk{index}.qcow2")), &path).unwrap();
                Disk { path, format: "qcow2" }
            })
            .collect();
        self.machine(&disks)
    }

    /// The disks of a machine made by [`Booted::spec`] in `dir`.
    pub fn disks(self, dir: &Path) -> Vec<Disk> {
        let path = |index| dir.join(format!("disk{index}.qcow2"));
        (0..self.disks).map(|index| Disk { path: path(index), format: "qcow2" }).collect()
    }

    /// Starts such a machine from the checkpoint.
    pub fn start(self, dir: &Path) -> Vm {
        self.spec(dir).args(&["--loadvm", TAG]).start()
    }

    /// The machine that the checkpoint is of, with these disks.
    pub fn machine(self, disks: &[Disk]) -> VmSpec {
        let linux = VmSpec::linux("64M", self.vcpus).args(&["--device", "virtio-rng-device"]);
        disks.iter().fold(linux, VmSpec::disk)
    }

    /// Where the shared images are; boots the guest if nobody did for this binary and this guest.
    fn image_dir(self) -> PathBuf {
        let name = format!("booted-{}cpu-{}disk-{:016x}", self.vcpus, self.disks, fingerprint());
        let root = binary().parent().unwrap().join("checkpoints");
        fs::create_dir_all(&root).unwrap();
        let dir = root.join(name);
        // One test makes the images, the others wait for it.
        let lock = File::create(dir.with_extension("lock")).unwrap();
        lock.lock().unwrap();
        if !dir.exists() {
            let making = dir.with_extension("making");
            let _ = fs::remove_dir_all(&making);
            fs::create_dir_all(&making).unwrap();
            self.boot(&making);
            fs::rename(&making, &dir).unwrap();
        }
        dir
    }

    fn boot(self, dir: &Path) {
        let disks: Vec<Disk> = self.disks(dir);
        for disk in &disks {
            qemu_img(&["create", "-q", "-f", "qcow2", &disk.file(), DISK_SIZE]);
        }
        let mut vm = self.machine(&disks).start();
        vm.agent().wait_ready();
        let nodes: Vec<String> = (0..self.disks).map(|index| format!("disk{index}")).collect();
        vm.save(TAG, &nodes.iter().map(String::as_str).collect::<Vec<_>>());
        vm.quit();
        disks.iter().for_each(Disk::check);
    }
}

/// Changes with everything that the checkpoint depends on.
fn fingerprint() -> u64 {
    let mut hasher = DefaultHasher::new();
    let guest = ["resources/guest/tiny.bzImage", "resources/guest/agent.cpio"];
    for path in guest.map(repo).into_iter().chain([binary()]) {
        hasher.write(&fs::read(path).unwrap());
    }
    hasher.finish()
}
