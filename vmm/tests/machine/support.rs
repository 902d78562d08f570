//! A machine with the bare-metal guest, its console connected to the guest's monitor.

use std::io::Read;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use block::Graph;
use devices::InterruptLine;
use devices::virtio::block::ErrorPolicy;
use tardigrade_tests::baremetal::{Monitor, image};
use tardigrade_tests::disk::Disk;
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};
use vmm::machine::devices::GuestSignals;
use vmm::machine::spec::{DeviceKind, DeviceSpec, MachineSpec};
use vmm::machine::{Machine, prepare_boot};

/// Bytes of the disk.
pub(crate) const DISK: u64 = 16 << 20;
pub(crate) const PAGE: u64 = 4096;

/// A machine that runs, with its files.
pub(crate) struct Running {
    machine: Arc<Mutex<Machine>>,
    pub(crate) guest: Monitor,
    _dir: tempfile::TempDir,
}

struct Nobody;

impl InterruptLine for Nobody {
    fn trigger(&self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Boots a guest with a disk in slot 0 and lets it run.
pub(crate) fn start(ram: u64, vcpus: u8) -> Running {
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("guest.elf");
    image::write(&kernel);
    let disk = Disk::qcow2(dir.path().join("disk0.qcow2"), "16M");
    let graph = Graph::new();
    let file = disk.path.display();
    let node = format!("driver=qcow2,node-name=disk0,file.driver=file,file.filename={file}");
    graph.add_text(&node).unwrap();
    let kind = DeviceKind::Block {
        drive: "disk0".to_owned(),
        serial: String::new(),
        queues: 1,
        share_rw: false,
        on_error: ErrorPolicy::default(),
    };
    let spec = MachineSpec {
        name: None,
        uuid: uuid::Uuid::nil(),
        vcpus,
        ram_bytes: ram,
        kernel: Some(kernel),
        initrd: None,
        cmdline: String::new(),
        dirty_tracking: true,
        acpi: false,
        forked: false,
        devices: vec![DeviceSpec { id: None, kind }],
    };

    let socket = dir.path().join("serial");
    let listener = UnixListener::bind(&socket).unwrap();
    let guest = Monitor::connect(&socket);
    let (console, _) = listener.accept().unwrap();
    let input = console.try_clone().unwrap();
    let signals = GuestSignals {
        reset: Arc::new(Nobody),
        power_off: Arc::new(Nobody),
        disk: Arc::new(|slot, failure| panic!("disk {slot}: {failure:?}")),
    };
    let events: vmm::vcpu::EventSink = Arc::new(|event| panic!("{event:?}"));
    let mut machine =
        Machine::new(spec.clone(), &graph, Box::new(console), signals, &events).unwrap();
    machine.boot(prepare_boot(&spec).unwrap()).unwrap();
    machine.resume().unwrap();
    let machine = Arc::new(Mutex::new(machine));
    pump(input, Arc::clone(&machine));
    Running { machine, guest, _dir: dir }
}

/// Gives the guest what its monitor says, until that hangs up.
fn pump(mut input: std::os::unix::net::UnixStream, machine: Arc<Mutex<Machine>>) {
    thread::spawn(move || {
        let mut bytes = [0; 16];
        while let Ok(count @ 1..) = input.read(&mut bytes) {
            let mut rest = &bytes[..count];
            while !rest.is_empty() {
                let machine = machine.lock().unwrap();
                let now = rest.len().min(machine.devices().console_room());
                machine.devices().console_input(&rest[..now]);
                drop(machine);
                rest = &rest[now..];
                if !rest.is_empty() {
                    thread::sleep(Duration::from_micros(100));
                }
            }
        }
    });
}

impl Running {
    pub(crate) fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap()
    }

    /// All of RAM, region by region.
    pub(crate) fn memory(&self) -> Vec<Vec<u8>> {
        let machine = self.machine();
        let read = |region: &ram::GuestRegion| {
            let mut bytes = vec![0; region.size()];
            machine.memory().read_slice(&mut bytes, region.start_addr()).unwrap();
            bytes
        };
        machine.memory().iter().map(read).collect()
    }
}
