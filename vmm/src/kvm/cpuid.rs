//! What a vCPU is told of itself: the CPUID that KVM supports, with this machine's topology.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use super::{Error, IoctlContext, Result};

/// Leaf 1 ECX: VMX. Leaf 0x8000_0001 ECX: SVM.
const ECX_VMX: u32 = 1 << 5;
const ECX_SVM: u32 = 1 << 2;
/// Leaf 1 ECX: TSC-deadline mode of the APIC timer.
const ECX_TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1 ECX: runs under a hypervisor.
const ECX_HYPERVISOR: u32 = 1 << 31;
/// Leaf 1 EDX: the package has more than one logical processor.
const EDX_HTT: u32 = 1 << 28;
/// Leaf 0x8000_0007 EDX: the TSC runs at one rate, always.
const EDX_INVARIANT_TSC: u32 = 1 << 8;
/// Leaf 0xb, 0x1f ECX[15:8]: level types.
const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// The machine's topology: one package, one thread a core.
#[derive(Debug, Clone, Copy)]
pub struct Topology {
    /// Number of vCPUs.
    pub vcpus: u8,
}

impl Topology {
    /// Bits of the APIC id that number the cores.
    fn core_bits(self) -> u32 {
        u32::from(self.vcpus).next_power_of_two().trailing_zeros()
    }
}

/// What KVM can give guests on this host, without topology.
pub fn supported(kvm: &Kvm) -> Result<CpuId> {
    let mut cpuid =
        kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).ioctl("KVM_GET_SUPPORTED_CPUID")?;
    // KVM has the TSC-deadline timer in its LAPIC but leaves the bit to us (KVM API 4.46).
    if kvm.check_extension(Cap::TscDeadlineTimer) {
        for leaf in cpuid.as_mut_slice().iter_mut().filter(|leaf| leaf.function == 1) {
            leaf.ecx |= ECX_TSC_DEADLINE;
        }
    }
    Ok(cpuid)
}

/// The CPUID of vCPU `index`, whose APIC id is its index.
pub fn for_vcpu(supported: &CpuId, topology: Topology, index: u8) -> Result<CpuId> {
    let mut entries = Vec::with_capacity(supported.as_slice().len() + 2);
    for entry in supported.as_slice() {
        // The topology leaves are written whole below.
        if !matches!(entry.function, 0xb | 0x1f) {
            entries.push(adapt(*entry, topology, u32::from(index)));
        }
    }
    entries.extend(topology_leaves(0xb, topology, u32::from(index)));
    CpuId::from_entries(&entries).map_err(|_| Error::TooManyEntries("CPUID"))
}

fn adapt(mut entry: kvm_cpuid_entry2, topology: Topology, apic_id: u32) -> kvm_cpuid_entry2 {
    let vcpus = u32::from(topology.vcpus);
    match entry.function {
        0x1 => {
            // EBX: initial APIC id, logical processors, CLFLUSH line (8 * 8 bytes).
            entry.ebx = (apic_id << 24) | (vcpus << 16) | (8 << 8) | (entry.ebx & 0xff);
            // A checkpoint has no KVM_GET_NESTED_STATE, so guests run no guests of their own.
            entry.ecx = (entry.ecx | ECX_HYPERVISOR) & !ECX_VMX;
            entry.edx = if vcpus > 1 { entry.edx | EDX_HTT } else { entry.edx & !EDX_HTT };
        }
        // Intel, deterministic caches: EAX[31:26] cores in the package, EAX[25:14] threads that
        // share the cache: the first two levels belong to a core, the rest to the package.
        0x4 if entry.eax & 0x1f != 0 => {
            let level = (entry.eax >> 5) & 0x7;
            let sharing = if level <= 2 { 0 } else { vcpus - 1 };
            entry.eax = (entry.eax & 0x3fff) | (sharing << 14) | ((vcpus - 1) << 26);
        }
        0x8000_0001 => entry.ecx &= !ECX_SVM,
        // A pause stops kvmclock but not the TSC, and another host's TSC has another rate: a guest
        // that trusts the TSC would see time jump, so it is told not to (as QEMU does).
        0x8000_0007 => entry.edx &= !EDX_INVARIANT_TSC,
        // AMD: number of cores, and the bits of the APIC id that number them.
        0x8000_0008 => entry.ecx = (topology.core_bits() << 12) | (vcpus - 1),
        // AMD, cache topology: EAX[25:14] as in leaf 4.
        0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = (entry.eax >> 5) & 0x7;
            let sharing = if level <= 2 { 0 } else { vcpus - 1 };
            entry.eax = (entry.eax & 0x3fff) | (sharing << 14);
        }
        // AMD: extended APIC id, core id with one thread each, one node.
        0x8000_001e => {
            entry.eax = apic_id;
            entry.ebx = apic_id;
            entry.ecx = 0;
        }
        _ => {}
    }
    entry
}

/// Extended topology: one thread per core, then all cores of the package.
fn topology_leaves(function: u32, topology: Topology, apic_id: u32) -> [kvm_cpuid_entry2; 2] {
    let level = |index: u32, kind: u32, shift: u32, processors: u32| kvm_cpuid_entry2 {
        function,
        index,
        flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: processors,
        ecx: (kind << 8) | index,
        edx: apic_id,
        ..Default::default()
    };
    [
        level(0, LEVEL_SMT, 0, 1),
        level(1, LEVEL_CORE, topology.core_bits(), u32::from(topology.vcpus)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, ebx: 0x00ff_ff12, ..Default::default() }
    }

    #[test]
    fn leaf_1_carries_the_apic_id_and_the_processor_count() {
        let base = CpuId::from_entries(&[leaf(1, 0)]).unwrap();
        let cpuid = for_vcpu(&base, Topology { vcpus: 4 }, 3).unwrap();
        let leaf = cpuid.as_slice()[0];
        assert_eq!(leaf.ebx, (3 << 24) | (4 << 16) | (8 << 8) | 0x12);
        assert_ne!(leaf.edx & EDX_HTT, 0);
        assert_ne!(leaf.ecx & ECX_HYPERVISOR, 0);
    }

    #[test]
    fn what_a_checkpoint_cannot_keep_is_not_offered() {
        let all = |function| kvm_cpuid_entry2 {
            function,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        };
        let base = CpuId::from_entries(&[1, 0x8000_0001, 0x8000_0007].map(all)).unwrap();
        let cpuid = for_vcpu(&base, Topology { vcpus: 1 }, 0).unwrap();
        let leaves = cpuid.as_slice();
        assert_eq!(leaves[0].ecx, !ECX_VMX);
        assert_eq!(leaves[1].ecx, !ECX_SVM);
        assert_eq!(leaves[2].edx, !EDX_INVARIANT_TSC);
    }

    #[test]
    fn one_vcpu_has_no_htt_bit() {
        let mut one = leaf(1, 0);
        one.edx = EDX_HTT;
        let base = CpuId::from_entries(&[one]).unwrap();
        let cpuid = for_vcpu(&base, Topology { vcpus: 1 }, 0).unwrap();
        assert_eq!(cpuid.as_slice()[0].edx & EDX_HTT, 0);
    }

    #[test]
    fn topology_leaves_of_the_host_are_replaced() {
        let base = CpuId::from_entries(&[leaf(0xb, 0), leaf(0xb, 7), leaf(0x1f, 0)]).unwrap();
        let cpuid = for_vcpu(&base, Topology { vcpus: 3 }, 2).unwrap();
        let levels: Vec<_> = cpuid.as_slice().iter().map(|l| (l.function, l.eax, l.ebx)).collect();
        assert_eq!(levels, [(0xb, 0, 1), (0xb, 2, 3)]);
        assert!(cpuid.as_slice().iter().all(|l| l.edx == 2));
    }
}
