//! Model-specific registers as part of a vCPU's state.

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::{Error, IoctlContext, Result};

/// IA32_TIME_STAMP_COUNTER.
pub const TSC: u32 = 0x10;
/// IA32_TSC_DEADLINE: compared with the TSC, and armed only while the APIC timer is in that mode.
const TSC_DEADLINE: u32 = 0x6e0;
/// MSR_KVM_WALL_CLOCK_NEW and MSR_KVM_WALL_CLOCK: where KVM writes the time of day.
pub const WALL_CLOCKS: [u32; 2] = [0x4b56_4d00, 0x11];
/// IA32_MISC_ENABLE.
const MISC_ENABLE: u32 = 0x1a0;
/// IA32_MISC_ENABLE bit 0: fast strings.
const MISC_ENABLE_FAST_STRING: u64 = 1;
/// IA32_MTRR_DEF_TYPE.
const MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs enabled, default type write-back.
const MTRR_ENABLE_WRITE_BACK: u64 = (1 << 11) | 6;

/// Registers in one call: KVM_GET_MSRS and KVM_SET_MSRS refuse KVM_MAX_MSR_ENTRIES with E2BIG.
const BATCH: usize = KVM_MAX_MSR_ENTRIES - 1;

/// One register and its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Msr {
    /// The register's number.
    pub index: u32,
    /// Its value.
    pub value: u64,
}

impl From<Msr> for kvm_msr_entry {
    fn from(msr: Msr) -> Self {
        kvm_msr_entry { index: msr.index, data: msr.value, ..Default::default() }
    }
}

/// The registers KVM lists as state and that can be read on this vCPU. KVM lists some that it then
/// refuses; those carry no state.
pub fn readable(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Vec<u32>> {
    let list = kvm.get_msr_index_list().ioctl("KVM_GET_MSR_INDEX_LIST")?;
    let mut indices = list.as_slice().to_vec();
    if !indices.contains(&TSC_DEADLINE) {
        indices.push(TSC_DEADLINE);
    }
    let mut readable = Vec::with_capacity(indices.len());
    let mut rest = indices.as_slice();
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(BATCH)];
        let read = read_batch(vcpu, batch)?.len();
        readable.extend_from_slice(&batch[..read]);
        // The kernel stops at the first register it refuses.
        rest = &rest[read + usize::from(read < batch.len())..];
    }
    Ok(readable)
}

/// Reads the registers of `indices`, all of which must be [`readable`].
pub fn read(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>> {
    let mut values = Vec::with_capacity(indices.len());
    for batch in indices.chunks(BATCH) {
        let read = read_batch(vcpu, batch)?;
        if let Some(index) = batch.get(read.len()) {
            return Err(Error::Unfit {
                what: "MSR list",
                why: format!("MSR {index:#x} can no longer be read"),
            });
        }
        values.extend(read);
    }
    Ok(values)
}

fn read_batch(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>> {
    let entries: Vec<_> =
        indices.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
    let mut msrs = Msrs::from_entries(&entries).map_err(|_| Error::TooManyEntries("MSR list"))?;
    let read = vcpu.get_msrs(&mut msrs).ioctl("KVM_GET_MSRS")?;
    Ok(msrs.as_slice()[..read].iter().map(|e| Msr { index: e.index, value: e.data }).collect())
}

/// Writes the registers. TSC_DEADLINE goes last: the kernel compares it with the TSC and the APIC
/// timer mode of the state it belongs to.
///
/// Some registers that KVM lists cannot be written by the host, or only with the value they have
/// (IA32_ARCH_CAPABILITIES, for one). A refused register that already holds the value is as good
/// as written; any other refusal is told and passed over, as the register does not exist here.
pub fn write(vcpu: &VcpuFd, msrs: &[Msr]) -> Result<()> {
    let (last, first): (Vec<Msr>, Vec<Msr>) =
        msrs.iter().partition(|msr| msr.index == TSC_DEADLINE);
    let ordered: Vec<Msr> = first.into_iter().chain(last).collect();
    let mut rest = ordered.as_slice();
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(BATCH)];
        let written = write_batch(vcpu, batch)?;
        if let Some(refused) = batch.get(written) {
            let holds = read_batch(vcpu, &[refused.index])?.first().map(|msr| msr.value);
            if holds != Some(refused.value) {
                warn!("MSR {:#x} cannot be set to {:#x} here", refused.index, refused.value);
            }
        }
        rest = &rest[written + usize::from(written < batch.len())..];
    }
    Ok(())
}

fn write_batch(vcpu: &VcpuFd, batch: &[Msr]) -> Result<usize> {
    let entries: Vec<_> = batch.iter().map(|&msr| msr.into()).collect();
    let msrs = Msrs::from_entries(&entries).map_err(|_| Error::TooManyEntries("MSR list"))?;
    vcpu.set_msrs(&msrs).ioctl("KVM_SET_MSRS")
}

/// What firmware would have left: fast string operations on, all memory write-back.
pub fn set_boot_values(vcpu: &VcpuFd) -> Result<()> {
    write(
        vcpu,
        &[
            Msr { index: MISC_ENABLE, value: MISC_ENABLE_FAST_STRING },
            Msr { index: MTRR_DEF_TYPE, value: MTRR_ENABLE_WRITE_BACK },
        ],
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_registers_than_one_call_takes_are_read_and_written() {
        let Ok(kvm) = Kvm::new() else {
            return eprintln!("SKIPPED: no /dev/kvm");
        };
        let vm = kvm.create_vm().unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let indices = vec![MISC_ENABLE; 2 * KVM_MAX_MSR_ENTRIES];
        let values = read(&vcpu, &indices).unwrap();
        assert_eq!(values.len(), indices.len());
        write(&vcpu, &values).unwrap();
        assert!(read_batch(&vcpu, &indices[..KVM_MAX_MSR_ENTRIES]).is_err());
    }
}
