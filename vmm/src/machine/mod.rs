//! The machine: vCPUs, memory, devices, and the whole of their state.
//!
//! The machine is owned by the main thread. vCPUs and disks have threads of their own that it
//! commands over channels, so there is no lock around the machine.
//!
//! Pausing stops the vCPUs first, then drains the devices: a device gets no new requests from a
//! stopped vCPU. Resuming goes the other way round. State is captured and restored only in between,
//! when nothing moves.

pub mod acpi;
pub mod devices;
pub mod error;
pub mod missing;
pub mod recorded;
pub mod spec;
pub mod state;

use std::sync::Arc;
use std::time::Duration;

use ::devices::GuestMemory;
use ::devices::acpi::Event;
use block::Graph;
use kvm_bindings::CpuId;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use snapshot::{Base, PageSet, Rewinder, Tracker};
use uuid::Uuid;

use crate::boot::{self, Boot, BootSpec};
use crate::bus::Bus;
use crate::kvm::cpuid::{self, Topology};
use crate::kvm::irqchip::{self, ClockState, IrqchipState};
use crate::kvm::vcpu_state::{self, CaptureInfo};
use crate::kvm::{self, IoctlContext, msrs};
use crate::memory;
use crate::memory::dirty_log::{DirtyLog, Protect};
use crate::vcpu::{EventSink, VcpuHandle};
use devices::{DeviceSet, GuestSignals};
pub use error::Error;
use missing::Missing;
use spec::MachineSpec;
use state::{MachineState, Shape};

/// How long a vCPU may take to stop before it is looked whether it can.
const PAUSE_LOOK: Duration = Duration::from_millis(20);

/// Bytes of a checkpoint's header and configuration at most, beside the machine's state.
const STATE_SLACK: u64 = 1 << 20;

/// A virtual machine.
pub struct Machine {
    // Fields are dropped in this order: vCPUs stop before devices, devices before the VM and its
    // memory.
    vcpus: Vec<VcpuHandle>,
    devices: DeviceSet,
    vm: VmFd,
    memory: GuestMemory,
    log: DirtyLog,
    tracker: Tracker,
    /// Room for a collection of the log.
    written: PageSet,
    spec: MachineSpec,
    cpuid: CpuId,
    info: Arc<CaptureInfo>,
    /// State of the machine before its first instruction, which is what a reset goes back to.
    pristine: MachineState,
    /// The guest's clock while paused; the host's clock does not count it then.
    clock: ClockState,
    /// KVM has no shadow of the guest's page tables.
    nested_paging: bool,
    /// The VM generation id, of a machine with ACPI.
    generation: Option<Uuid>,
    /// RAM that is still in an image.
    missing: Option<Arc<Missing>>,
    /// The vCPUs were told to stop, and those that can have; see [`Machine::halt`].
    halted: bool,
}

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
        let vm = kvm.create_vm().ioctl("KVM_CREATE_VM")?;
        vm.set_identity_map_address(boot::layout::KVM_IDENTITY_MAP_ADDR)
            .ioctl("KVM_SET_IDENTITY_MAP_ADDR")?;
        let tss = usize::try_from(boot::layout::KVM_TSS_ADDR).unwrap_or_default();
        vm.set_tss_address(tss).ioctl("KVM_SET_TSS_ADDR")?;
        irqchip::create(&vm)?;
        let kind = if spec.forked { memory::Kind::Mixed } else { memory::Kind::Anonymous };
        let memory = memory::allocate(spec.ram_bytes, kind)?;
        memory::register(&vm, &memory)?;
        let log = DirtyLog::new(&kvm);
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
        let vcpus = (0..)
            .zip(fds)
            .map(|(index, fd)| {
                VcpuHandle::spawn(
                    index,
                    fd,
                    Arc::clone(&info),
                    Arc::clone(&bus),
                    Arc::clone(events),
                )
            })
            .collect::<Result<Vec<_>, _>>()?;

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
            halted: false,
        })
    }

    /// Puts a prepared kernel in memory and vCPU 0 at its entry; everything else is as at power-on.
    /// The machine must be paused.
    ///
    /// # Errors
    /// It does not load; the machine must not be run then.
    pub fn boot(&mut self, prepared: Boot) -> Result<(), Error> {
        self.tracker.forget();
        self.forget_missing();
        // What an earlier boot left must not be there: the loader writes no zeroes.
        memory::discard(&self.memory)?;
        let info = prepared.load(&self.memory)?;
        if let Some(id) = self.generation {
            acpi::write_id(&self.memory, id)?;
        }
        let mut state = self.pristine.clone();
        state.clock = self.clock;
        if let Some(first) = state.vcpus.first_mut() {
            let entry = boot::initial_registers(&info, *first.sregs_mut());
            *first.regs_mut() = entry.regs;
            *first.sregs_mut() = entry.sregs;
        }
        self.replace(&state, None)
    }

    /// Lets the guest run.
    pub fn resume(&mut self) -> Result<(), Error> {
        if std::mem::take(&mut self.halted) {
            if let Some(missing) = &self.missing {
                missing.ram.retry();
            }
            self.devices.retry()?;
        } else {
            self.devices.resume()?;
        }
        // As late as can be: from here on the guest's clock runs.
        self.clock.restore(&self.vm)?;
        for vcpu in &self.vcpus {
            vcpu.notify_paused()?;
        }
        for vcpu in &self.vcpus {
            vcpu.resume()?;
        }
        Ok(())
    }

    /// Stops the guest: no instruction, no disk request, no interrupt is under way afterwards.
    ///
    /// # Errors
    /// With [`Error::Missing`] the guest is halted; see [`Machine::halt`].
    pub fn pause(&mut self) -> Result<(), Error> {
        let pending = self.vcpus.iter().map(VcpuHandle::pause).collect::<Result<Vec<_>, _>>()?;
        let mut stopped = Ok(());
        for pause in pending {
            // A vCPU that KVM's own access to a page holds up does not come before the page does.
            while stopped.is_ok() && !pause.wait_for(PAUSE_LOOK)? {
                stopped = self.check_missing();
            }
        }
        let stopped = stopped.and_then(|()| self.check_missing());
        if !std::mem::replace(&mut self.halted, stopped.is_err()) {
            self.clock = ClockState::capture(&self.vm)?;
        }
        stopped?;
        self.pause_devices()
    }

    /// Stops the guest whose RAM is about to be replaced, or that is about to end: nobody waits for
    /// memory that cannot be read.
    pub fn pause_for_good(&mut self) -> Result<(), Error> {
        if let Some(missing) = &self.missing {
            missing.ram.forfeit();
        }
        match self.pause() {
            Err(Error::Lost(_)) => Ok(()),
            other => other,
        }
    }

    /// Tells the vCPUs to stop, without waiting: one of them may be held up by a page that cannot be
    /// read, and stops when it gets it. Devices go on with what they were told to do. From here,
    /// [`Machine::resume`] tries to read again, and [`Machine::pause`] stops the guest wholly.
    pub fn halt(&mut self) -> Result<(), Error> {
        for vcpu in &self.vcpus {
            drop(vcpu.pause()?);
        }
        self.clock = ClockState::capture(&self.vm)?;
        self.halted = true;
        Ok(())
    }

    /// Whether the guest is halted.
    pub fn is_halted(&self) -> bool {
        self.halted
    }

    /// Whether a page that somebody waits for cannot be read.
    fn check_missing(&self) -> Result<(), Error> {
        match self.missing.as_ref().and_then(|missing| missing.ram.failing()) {
            Some(reason) => Err(Error::Missing(reason)),
            None => Ok(()),
        }
    }

    /// Drains the devices. Their threads cannot be left waiting for a page that cannot be read, so
    /// it is given up, and a request with it.
    fn pause_devices(&self) -> Result<(), Error> {
        let Some(missing) = &self.missing else { return self.devices.pause() };
        missing.ram.forfeit();
        self.devices.pause()?;
        match missing.ram.lost() {
            Some(reason) => Err(Error::Lost(reason)),
            None => {
                missing.ram.restored();
                Ok(())
            }
        }
    }

    /// The part of RAM that is still in an image, if any is.
    pub fn missing(&self) -> Option<&Arc<Missing>> {
        self.missing.as_ref()
    }

    /// RAM is that of a lazy load, whose vCPUs and devices have been restored.
    ///
    /// # Errors
    /// A page that was needed for that could not be read.
    pub fn set_missing(&mut self, missing: Arc<Missing>) -> Result<(), Error> {
        if let Some(reason) = missing.ram.lost() {
            return Err(Error::Lost(reason));
        }
        missing.ram.restored();
        self.missing = Some(missing);
        Ok(())
    }

    /// Nothing is missing any more, or what is does not matter: it is zero from now on.
    pub fn forget_missing(&mut self) {
        if let Some(missing) = self.missing.take() {
            missing.ram.abandon();
        }
        self.devices.presence().set_whole();
    }

    /// The state of the paused machine, without RAM and disks.
    pub fn capture(&self) -> Result<MachineState, Error> {
        capture(&self.vm, &self.vcpus, &self.devices, self.clock)
    }

    /// Whether a recorded state can be put on this machine. Touches nothing.
    pub fn check_fits(&self, state: &MachineState) -> Result<(), Error> {
        if state.shape() != self.shape() {
            return Err(Error::OtherShape(state.shape(), self.shape()));
        }
        for (index, vcpu) in (0..).zip(&state.vcpus) {
            vcpu.check_fits(&self.info).map_err(|source| Error::VcpuState { index, source })?;
        }
        Ok(())
    }

    /// Replaces the state of the paused machine by that of a checkpoint. RAM must hold that state's memory
    /// already; `base` tells which it is, where saves can be built upon it.
    pub fn restore(&mut self, state: &MachineState, base: Option<Base>) -> Result<(), Error> {
        self.replace(state, base)?;
        self.new_generation()
    }

    /// Has the guest find another VM generation id, and tells it so when it runs.
    fn new_generation(&mut self) -> Result<(), Error> {
        if let Some(events) = self.devices.events() {
            let id = Uuid::new_v4();
            acpi::write_id(&self.memory, id)?;
            events.raise(Event::Generation)?;
            self.generation = Some(id);
        }
        Ok(())
    }

    /// The VM generation id, of a machine with ACPI.
    pub fn generation(&self) -> Option<Uuid> {
        self.generation
    }

    fn replace(&mut self, state: &MachineState, base: Option<Base>) -> Result<(), Error> {
        self.check_fits(state)?;
        let base = base.filter(|_| self.spec.dirty_tracking);
        self.tracker.forget();
        let logged = base.is_some();
        memory::forget_translations(&self.vm, &self.memory, &mut self.log, logged)?;
        if let Some(base) = base {
            self.tracker.loaded(base);
        }
        self.put(state, |_| Ok(()))
    }

    /// Puts back the pages that were written since the base of RAM. The machine must be paused, and
    /// [`Machine::note_written`] have been called since. After an error RAM is as it was.
    ///
    /// # Errors
    /// As [`Rewinder::put_back`].
    pub fn put_back(&self, rewinder: &mut Rewinder) -> block::Result<()> {
        rewinder.put_back(&self.memory, self.tracker.dirty())
    }

    /// Replaces the state of the paused machine after [`Machine::put_back`]: RAM is that of `base`.
    pub fn restore_rewound(&mut self, state: &MachineState, base: Base) -> Result<(), Error> {
        self.tracker.loaded(base);
        let forget = |machine: &Self| match machine.nested_paging {
            true => Ok(()),
            false => memory::forget_shadow_pages(&machine.vm, &machine.memory),
        };
        self.put(state, forget)?;
        self.new_generation()
    }

    /// vCPUs, interrupt chips, devices and clock. While the vCPUs' threads are at it, which take long,
    /// `meanwhile` is done: something that takes long too.
    fn put(
        &mut self,
        state: &MachineState,
        meanwhile: impl FnOnce(&Self) -> Result<(), memory::Error>,
    ) -> Result<(), Error> {
        // The interrupt chips first: restoring a LAPIC or a device can raise interrupts there.
        state.irqchip.restore(&self.vm)?;
        let pairs = self.vcpus.iter().zip(&state.vcpus);
        let pending: Result<Vec<_>, _> = pairs.map(|(vcpu, to)| vcpu.restore(to.clone())).collect();
        meanwhile(self)?;
        for restored in pending? {
            restored.wait()?;
        }
        // A device's interrupt goes to a LAPIC that is in place.
        self.devices.restore(&state.devices)?;
        self.clock = state.clock;
        Ok(())
    }

    /// Lets KVM log what the guest writes, from now on, unless the user does not want it.
    pub fn start_tracking(&mut self) -> Result<(), Error> {
        if self.spec.dirty_tracking {
            memory::start_log(&self.vm, &self.memory, &mut self.log)?;
        }
        Ok(())
    }

    /// Whether what the guest writes is tracked, so that there can be a base.
    pub fn is_tracking(&self) -> bool {
        self.log.is_on()
    }

    /// Tells the tracker of all pages written so far.
    ///
    /// # Errors
    /// KVM does not say what was written. There is no base then.
    pub fn note_written(&mut self, protect: Protect) -> Result<(), Error> {
        self.written.clear();
        match self.log.collect(&self.vm, &self.memory, protect, &mut self.written) {
            Ok(()) => {
                self.tracker.note(&self.written);
                Ok(())
            }
            Err(error) => {
                self.tracker.forget();
                Err(error.into())
            }
        }
    }

    /// Bytes of the state in a checkpoint at most.
    ///
    /// # Errors
    /// The state cannot be stored.
    pub fn most_state_bytes(&self) -> Result<u64, Error> {
        // Numbers take one to nine bytes, and what is many bytes is so before the first instruction.
        let sections = self.pristine.to_sections()?;
        let bytes: usize = sections.iter().map(|section| section.bytes.len()).sum();
        Ok(STATE_SLACK + 4 * bytes as u64)
    }

    /// What was written since which checkpoint. It is right up to the last
    /// [`Machine::note_written`].
    pub fn tracker(&mut self) -> &mut Tracker {
        &mut self.tracker
    }

    /// How many parts the machine has.
    pub fn shape(&self) -> Shape {
        let acpi = self.devices.events().is_some();
        Shape { vcpus: self.vcpus.len(), virtio: self.devices.virtio_count(), acpi }
    }

    /// What the machine is made of.
    pub fn spec(&self) -> &MachineSpec {
        &self.spec
    }

    /// The guest's RAM.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The guest's devices.
    pub fn devices(&self) -> &DeviceSet {
        &self.devices
    }

    /// What the first vCPU is told.
    pub fn cpuid(&self) -> &CpuId {
        &self.cpuid
    }

    /// The vCPUs, by index.
    pub fn vcpus(&self) -> &[VcpuHandle] {
        &self.vcpus
    }

    /// Nanoseconds the guest has been running; valid while paused.
    pub fn clock(&self) -> ClockState {
        self.clock
    }

    /// Stops everything and makes the disks durable.
    ///
    /// # Errors
    /// A disk could not be flushed; the rest is stopped all the same.
    pub fn shutdown(mut self) -> Result<(), Error> {
        if let Some(missing) = &self.missing {
            missing.ram.forfeit();
        }
        self.vcpus.clear();
        let outcome = self.devices.shutdown();
        self.forget_missing();
        outcome
    }
}

/// Reads and decompresses the kernel of `spec` and checks that it fits. Needs no machine, so it can
/// be done while one is made.
///
/// # Errors
/// There is no kernel, or it cannot be booted.
pub fn prepare_boot(spec: &MachineSpec) -> Result<Boot, Error> {
    let kernel = spec.kernel.as_deref().ok_or(Error::NoKernel)?;
    // Devices that are in the tables would be found twice.
    let unlisted = if spec.acpi { 0 } else { spec.devices.len() };
    let tables = acpi::tables(spec);
    let boot_spec = BootSpec {
        kernel,
        initrd: spec.initrd.as_deref(),
        cmdline: &devices::extend_cmdline(&spec.cmdline, unlisted),
        vcpus: spec.vcpus,
        acpi: tables.as_ref(),
    };
    Ok(Boot::prepare(&boot_spec, spec.ram_bytes)?)
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

fn capture(
    vm: &VmFd,
    vcpus: &[VcpuHandle],
    devices: &DeviceSet,
    clock: ClockState,
) -> Result<MachineState, Error> {
    Ok(MachineState {
        vcpus: vcpus.iter().map(VcpuHandle::capture).collect::<Result<_, _>>()?,
        irqchip: IrqchipState::capture(vm)?,
        clock,
        devices: devices.capture()?,
    })
}
