//! The whole state of one vCPU, as KVM gives and takes it.

use kvm_bindings::{
    Xsave, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use tracing::warn;

use super::msrs::{self, Msr};
use super::{Error, IoctlContext, Result, blob};

/// Bytes of `struct kvm_xsave` without what KVM_CAP_XSAVE2 adds.
const XSAVE_LEGACY_SIZE: usize = size_of::<kvm_xsave>();

/// How far two hosts' TSC rates may be apart to count as one: what KVM takes for the same.
const TSC_TOLERANCE_PPM: u64 = 250;

/// Everything a vCPU is: restoring it on a vCPU of a machine with the same CPUID continues the
/// guest at the very instruction.
#[derive(Clone, Serialize, Deserialize)]
pub struct VcpuState {
    #[serde(with = "blob")]
    mp_state: kvm_mp_state,
    #[serde(with = "blob")]
    regs: kvm_regs,
    #[serde(with = "blob")]
    sregs: kvm_sregs,
    /// The XSAVE area as KVM_GET_XSAVE2 gives it: 4096 bytes or more.
    xsave: ByteBuf,
    #[serde(with = "blob")]
    xcrs: kvm_xcrs,
    #[serde(with = "blob")]
    debugregs: kvm_debugregs,
    #[serde(with = "blob")]
    lapic: kvm_lapic_state,
    #[serde(with = "blob")]
    events: kvm_vcpu_events,
    msrs: Vec<Msr>,
    /// Frequency the guest's TSC had, for a reader on another host.
    tsc_khz: Option<u32>,
}

/// What must be known of the host to capture a vCPU; the same for all vCPUs of a VM.
#[derive(Debug, Clone)]
pub struct CaptureInfo {
    /// MSRs that are state, in the order they are recorded.
    pub msr_indices: Vec<u32>,
    /// Bytes of the XSAVE area.
    pub xsave_size: usize,
}

/// Bytes of the XSAVE area on this VM (KVM API 4.134).
pub fn xsave_size(vm: &VmFd) -> usize {
    usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0).max(XSAVE_LEGACY_SIZE)
}

impl VcpuState {
    /// Version of this layout in a VM state.
    pub const VERSION: u32 = 1;

    /// Reads a vCPU that is stopped with no exit left to complete.
    ///
    /// The MP state goes first, since asking for it makes KVM act on a pending INIT or SIPI. The
    /// events go last, since the calls before may move an exception from "injected" to "pending".
    pub fn capture(vcpu: &VcpuFd, info: &CaptureInfo) -> Result<Self> {
        let mp_state = vcpu.get_mp_state().ioctl("KVM_GET_MP_STATE")?;
        Ok(Self {
            mp_state,
            regs: vcpu.get_regs().ioctl("KVM_GET_REGS")?,
            sregs: vcpu.get_sregs().ioctl("KVM_GET_SREGS")?,
            xsave: ByteBuf::from(get_xsave(vcpu, info.xsave_size)?),
            xcrs: vcpu.get_xcrs().ioctl("KVM_GET_XCRS")?,
            debugregs: vcpu.get_debug_regs().ioctl("KVM_GET_DEBUGREGS")?,
            lapic: vcpu.get_lapic().ioctl("KVM_GET_LAPIC")?,
            msrs: msrs::read(vcpu, &info.msr_indices)?,
            tsc_khz: vcpu.get_tsc_khz().ok(),
            events: vcpu.get_vcpu_events().ioctl("KVM_GET_VCPU_EVENTS")?,
        })
    }

    /// Puts the state on a stopped vCPU.
    ///
    /// SREGS hold the APIC base and mode, so they go before the LAPIC; the LAPIC goes before the
    /// MSRs, since TSC_DEADLINE is taken only in the timer mode the LAPIC is in. RAM must be that of
    /// the state: for a PAE guest, setting SREGS reads the page directory pointers from it.
    pub fn restore(&self, vcpu: &VcpuFd, info: &CaptureInfo) -> Result<()> {
        // An INIT or SIPI that the former guest had sent is in no state that is set below; asking
        // for the MP state makes KVM act on it now.
        vcpu.get_mp_state().ioctl("KVM_GET_MP_STATE")?;
        vcpu.set_mp_state(self.mp_state).ioctl("KVM_SET_MP_STATE")?;
        vcpu.set_regs(&self.regs).ioctl("KVM_SET_REGS")?;
        vcpu.set_sregs(&self.sregs).ioctl("KVM_SET_SREGS")?;
        set_xsave(vcpu, &self.xsave, info.xsave_size)?;
        vcpu.set_xcrs(&self.xcrs).ioctl("KVM_SET_XCRS")?;
        vcpu.set_debug_regs(&self.debugregs).ioctl("KVM_SET_DEBUGREGS")?;
        vcpu.set_lapic(&self.lapic).ioctl("KVM_SET_LAPIC")?;
        self.restore_tsc_rate(vcpu);
        msrs::write(vcpu, &self.msrs)?;
        vcpu.set_vcpu_events(&self.events).ioctl("KVM_SET_VCPU_EVENTS")
    }

    /// Gives the guest's TSC the rate it had, where this host's is another. A host that cannot scale
    /// runs the guest's deadline timers at a wrong rate, which is worth a warning but no refusal:
    /// the guest's clock is kvmclock, which knows the rate.
    fn restore_tsc_rate(&self, vcpu: &VcpuFd) {
        let (Some(saved), Ok(here)) = (self.tsc_khz, vcpu.get_tsc_khz()) else { return };
        let apart = saved.abs_diff(here);
        let tolerated = u64::from(here) * TSC_TOLERANCE_PPM / 1_000_000;
        if u64::from(apart) > tolerated && vcpu.set_tsc_khz(saved).is_err() {
            warn!("the guest's TSC ran at {saved} kHz, this host's runs at {here} kHz");
        }
    }

    /// Guest physical addresses to which KVM writes the time of day as this is restored; 0 is none.
    pub fn wall_clocks(&self) -> impl Iterator<Item = u64> {
        self.msrs.iter().filter(|msr| msrs::WALL_CLOCKS.contains(&msr.index)).map(|msr| msr.value)
    }

    /// Whether the recorded state can be put on vCPUs of this host.
    pub fn check_fits(&self, info: &CaptureInfo) -> Result<()> {
        check_xsave(&self.xsave, info.xsave_size)
    }

    /// General registers, to be changed before the state is restored.
    pub fn regs_mut(&mut self) -> &mut kvm_regs {
        &mut self.regs
    }

    /// Special registers, to be changed before the state is restored.
    pub fn sregs_mut(&mut self) -> &mut kvm_sregs {
        &mut self.sregs
    }
}

fn new_xsave(size: usize) -> Result<Xsave> {
    let extra = size.saturating_sub(XSAVE_LEGACY_SIZE).div_ceil(size_of::<u32>());
    Xsave::new(extra).map_err(|_| Error::TooManyEntries("XSAVE area"))
}

fn get_xsave(vcpu: &VcpuFd, size: usize) -> Result<Vec<u8>> {
    if size <= XSAVE_LEGACY_SIZE {
        let xsave = vcpu.get_xsave().ioctl("KVM_GET_XSAVE")?;
        return Ok(words_to_bytes(&xsave.region));
    }
    let mut xsave = new_xsave(size)?;
    // SAFETY: `new_xsave` made room for the size that KVM_CHECK_EXTENSION(KVM_CAP_XSAVE2) told for
    // this VM, and that is what the kernel writes.
    unsafe { vcpu.get_xsave2(&mut xsave) }.ioctl("KVM_GET_XSAVE2")?;
    let mut bytes = words_to_bytes(&xsave.as_fam_struct_ref().xsave.region);
    bytes.extend(words_to_bytes(xsave.as_slice()));
    Ok(bytes)
}

fn check_xsave(bytes: &[u8], size: usize) -> Result<()> {
    // A larger area has components this host cannot load. A smaller one is padded with zeroes,
    // which say "initial state" for the components it lacks.
    if bytes.len() < XSAVE_LEGACY_SIZE || bytes.len() > size || !bytes.len().is_multiple_of(4) {
        return Err(Error::Unfit {
            what: "XSAVE area",
            why: format!(
                "it has {} bytes, this host takes {XSAVE_LEGACY_SIZE} to {size}",
                bytes.len()
            ),
        });
    }
    Ok(())
}

fn set_xsave(vcpu: &VcpuFd, bytes: &[u8], size: usize) -> Result<()> {
    check_xsave(bytes, size)?;
    let mut xsave = new_xsave(size)?;
    let (legacy, extra) = bytes.split_at(XSAVE_LEGACY_SIZE);
    for (word, raw) in xsave.as_mut_slice().iter_mut().zip(extra.chunks_exact(4)) {
        *word = u32::from_ne_bytes([raw[0], raw[1], raw[2], raw[3]]);
    }
    // SAFETY: only the fixed-size region is written; the length of the flexible array stays.
    let region = unsafe { &mut xsave.as_mut_fam_struct().xsave.region };
    for (word, raw) in region.iter_mut().zip(legacy.chunks_exact(4)) {
        *word = u32::from_ne_bytes([raw[0], raw[1], raw[2], raw[3]]);
    }
    // SAFETY: the structure is as large as the kernel reads: the size it told for this VM.
    unsafe { vcpu.set_xsave2(&xsave) }.ioctl("KVM_SET_XSAVE")
}

fn words_to_bytes(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}
