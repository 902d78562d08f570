//! A machine from its description: vCPUs paused at reset, nothing in memory.

use std::sync::Arc;

use block::Graph;
use kvm_bindings::CpuId;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use snapshot::{PageSet, Tracker};
use uuid::Uuid;

use super::devices::{DeviceSet, GuestSignals};
use super::restore::capture;
use super::spec::MachineSpec;
use super::{Error, Machine};
use crate::boot::layout;
use crate::bus::Bus;
use crate::kvm::cpuid::{self, Topology};
use crate::kvm::irqchip::{self, ClockState};
use crate::kvm::vcpu_state::{self, CaptureInfo};
use crate::kvm::{self, IoctlContext, msrs};
use crate::memory;
use crate::memory::dirty_log::DirtyLog;
use crate::memory::shadows::Shadows;
use crate::vcpu::{EventSink, VcpuHandle};

impl Machine {
    /// Builds a machine whose vCPUs are paused at reset, with nothing in memory.
    ///
    /// Its disks are nodes of `graph`; `events` gets what vCPUs have to tell.
    ///
    /// # Errors
    /// KVM, memory, a device or a node that is not there.
    pub fn new(
        spec: MachineSpec,
        graph: &Graph,
        console: Box<dyn std::io::Write + Send>,
        signals: GuestSignals,
        events: &EventSink,
    ) -> Result<Self, Error> {
        let kvm = kvm::open()?;
        let vm = Arc::new(new_vm(&kvm)?);
        let kind = if spec.forked { memory::Kind::Mixed } else { memory::Kind::Anonymous };
        let memory = memory::allocate(spec.ram_bytes, kind)?;
        let log = DirtyLog::new(&kvm, &vm, &memory)?;
        let shadows = Arc::new(Shadows::new(&kvm, Arc::clone(&vm))?);
        let written = PageSet::of(&memory);
        let tracker = Tracker::new(&written);

        let mut bus = Bus::default();
        let devices = DeviceSet::attach(&spec, &vm, &memory, &mut bus, graph, console, signals)?;
        let bus = Arc::new(bus);

        let cpuid = cpuid::supported(&kvm)?;
        let fds = (0..spec.vcpus)
            .map(|index| new_vcpu(&vm, &cpuid, spec.vcpus, index))
            .collect::<Result<Vec<_>, _>>()?;
        let info = Arc::new(capture_info(&kvm, &vm, &fds)?);
        let spawn = |(index, fd)| {
            VcpuHandle::spawn(index, fd, Arc::clone(&info), Arc::clone(&bus), Arc::clone(events))
        };
        let vcpus = (0..).zip(fds).map(spawn).collect::<Result<Vec<_>, _>>()?;

        // Their state is captured only while paused; the machine starts with a resume.
        devices.pause()?;
        let clock = ClockState { kvmclock_ns: 0 };
        let pristine = capture(&vm, &vcpus, &devices, clock)?;
        let cpuid = cpuid::for_vcpu(&cpuid, Topology { vcpus: spec.vcpus }, 0)?;
        let generation = spec.acpi.then(Uuid::new_v4);
        Ok(Self {
            vcpus,
            devices,
            vm,
            memory,
            log,
            shadows,
            tracker,
            written,
            spec,
            cpuid,
            info,
            pristine,
            clock,
            generation,
            nested_paging: kvm::nested_paging(),
            missing: None,
            orders: Arc::default(),
            halted: false,
        })
    }
}

/// A VM with its interrupt chips, without memory and vCPUs.
fn new_vm(kvm: &Kvm) -> Result<VmFd, Error> {
    let vm = kvm.create_vm().ioctl("KVM_CREATE_VM")?;
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP_ADDR)
        .ioctl("KVM_SET_IDENTITY_MAP_ADDR")?;
    let tss = usize::try_from(layout::KVM_TSS_ADDR).unwrap_or_default();
    vm.set_tss_address(tss).ioctl("KVM_SET_TSS_ADDR")?;
    irqchip::create(&vm)?;
    Ok(vm)
}

fn new_vcpu(vm: &VmFd, supported: &CpuId, vcpus: u8, index: u8) -> Result<VcpuFd, Error> {
    let vcpu = vm.create_vcpu(u64::from(index)).ioctl("KVM_CREATE_VCPU")?;
    let cpuid = cpuid::for_vcpu(supported, Topology { vcpus }, index)?;
    vcpu.set_cpuid2(&cpuid).ioctl("KVM_SET_CPUID2")?;
    msrs::set_boot_values(&vcpu)?;
    Ok(vcpu)
}

fn capture_info(kvm: &Kvm, vm: &VmFd, vcpus: &[VcpuFd]) -> Result<CaptureInfo, Error> {
    let msr_indices = match vcpus.first() {
        Some(vcpu) => msrs::readable(kvm, vcpu)?,
        None => Vec::new(),
    };
    Ok(CaptureInfo { msr_indices, xsave_size: vcpu_state::xsave_size(vm) })
}
