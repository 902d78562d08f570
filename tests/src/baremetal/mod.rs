//! A guest without a kernel: a few hundred instructions that do what a test tells them over the
//! serial port. It starts and answers in milliseconds, and can be asked for exact things: registers,
//! interrupts, memory at gigabytes a second, a virtio queue full of nonsense.
//!
//! | module | what it is |
//! |---|---|
//! | `guest.s` | the guest |
//! | [`layout`] | where in its memory it has what |
//! | [`image`] | the guest as an ELF file, with page tables and descriptor tables |
//! | [`monitor`] | calls of the guest's routines |
//! | [`registers`] | all registers of a vCPU at once |
//! | [`chains`] | vCPUs that count on disk and in memory, and notice what is not of one moment |
//! | [`apic`] | interrupts, and the start of other vCPUs |
//! | [`virtio`] | a driver for virtio-blk that can do wrong |
//! | [`writer`] | a vCPU that writes to a disk all the time and knows what must be there |

pub mod apic;
pub mod chains;
pub mod image;
pub mod layout;
pub mod monitor;
pub mod registers;
pub mod virtio;
pub mod writer;

use std::path::Path;

use crate::disk::Disk;
use crate::vm::{Vm, VmSpec};

pub use monitor::{Monitor, Routine};

/// A machine with the bare-metal guest; its files go to `dir`.
pub fn machine(dir: &Path, ram: &str, vcpus: u8) -> VmSpec {
    let kernel = dir.join("guest.elf");
    image::write(&kernel);
    VmSpec::new(ram, vcpus).args(&["--kernel", &kernel.display().to_string()])
}

/// The same with an empty disk, `disk0`, that can hold checkpoints.
pub fn machine_with_disk(dir: &Path, ram: &str, vcpus: u8) -> VmSpec {
    let disk = Disk::qcow2(dir.join("disk0.qcow2"), "16M");
    machine(dir, ram, vcpus).disk(&disk)
}

/// Connects to the guest and waits until it answers.
pub fn monitor(vm: &Vm) -> Monitor {
    let mut monitor = Monitor::connect(vm.serial_path());
    monitor.tsc();
    monitor
}
