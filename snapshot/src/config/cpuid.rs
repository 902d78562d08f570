//! CPU facts: what a guest was told, and whether this host can go on offering it.
//!
//! A guest probes its CPU once and relies on what it found for the rest of its life, so a feature
//! that was there at the save must be there after the load. One that is there in addition does no
//! harm.

use serde::{Deserialize, Serialize};

use super::Differences;

/// What a guest was told of its CPUs.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CpuFacts {
    /// Vendor string of leaf 0: "GenuineIntel".
    pub vendor: String,
    /// Family, extended family added.
    pub family: u32,
    /// Model, extended model included.
    pub model: u32,
    /// Stepping.
    pub stepping: u32,
    /// The leaves of the first vCPU. Those that differ between vCPUs carry no features.
    pub leaves: Vec<CpuidLeaf>,
}

/// One CPUID leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CpuidLeaf {
    /// EAX on input.
    pub function: u32,
    /// ECX on input; 0 where it does not matter.
    pub index: u32,
    /// Result in EAX.
    pub eax: u32,
    /// Result in EBX.
    pub ebx: u32,
    /// Result in ECX.
    pub ecx: u32,
    /// Result in EDX.
    pub edx: u32,
}

#[derive(Clone, Copy)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// A register whose bits are one feature each.
struct FeatureWord {
    function: u32,
    index: u32,
    register: Register,
    /// Bits that mirror the state of a vCPU and are no features.
    dynamic: u32,
    /// Linux's names of bits that programs look for.
    names: &'static [(u32, &'static str)],
}

const fn word(function: u32, index: u32, register: Register) -> FeatureWord {
    FeatureWord { function, index, register, dynamic: 0, names: &[] }
}

/// The feature words of Intel SDM vol. 2 (CPUID), AMD APM vol. 3 appendix E, and KVM's
/// virt/kvm/x86/cpuid.rst.
const WORDS: &[FeatureWord] = &[
    FeatureWord {
        // OSXSAVE follows CR4.
        dynamic: 1 << 27,
        names: &[
            (0, "sse3"),
            (9, "ssse3"),
            (12, "fma"),
            (13, "cx16"),
            (19, "sse4_1"),
            (20, "sse4_2"),
            (22, "movbe"),
            (23, "popcnt"),
            (25, "aes"),
            (26, "xsave"),
            (28, "avx"),
            (29, "f16c"),
            (30, "rdrand"),
        ],
        ..word(1, 0, Register::Ecx)
    },
    FeatureWord {
        // APIC follows the APIC base register.
        dynamic: 1 << 9,
        ..word(1, 0, Register::Edx)
    },
    FeatureWord {
        names: &[
            (0, "fsgsbase"),
            (3, "bmi1"),
            (5, "avx2"),
            (8, "bmi2"),
            (9, "erms"),
            (16, "avx512f"),
            (17, "avx512dq"),
            (18, "rdseed"),
            (19, "adx"),
            (28, "avx512cd"),
            (29, "sha_ni"),
            (30, "avx512bw"),
            (31, "avx512vl"),
        ],
        ..word(7, 0, Register::Ebx)
    },
    FeatureWord {
        // OSPKE follows CR4.
        dynamic: 1 << 4,
        names: &[
            (1, "avx512vbmi"),
            (3, "pku"),
            (8, "gfni"),
            (9, "vaes"),
            (11, "avx512_vnni"),
            (22, "rdpid"),
        ],
        ..word(7, 0, Register::Ecx)
    },
    FeatureWord {
        names: &[(22, "amx_bf16"), (23, "avx512_fp16"), (24, "amx_tile")],
        ..word(7, 0, Register::Edx)
    },
    FeatureWord { names: &[(4, "avx_vnni"), (5, "avx512_bf16")], ..word(7, 1, Register::Eax) },
    word(7, 1, Register::Edx),
    word(0xd, 0, Register::Eax),
    word(0xd, 1, Register::Eax),
    word(0x4000_0001, 0, Register::Eax),
    word(0x8000_0001, 0, Register::Ecx),
    word(0x8000_0001, 0, Register::Edx),
    FeatureWord { names: &[(8, "constant_tsc")], ..word(0x8000_0007, 0, Register::Edx) },
    word(0x8000_0008, 0, Register::Ebx),
];

/// Names what the saved guest relies on and this machine does not offer.
pub(super) fn compare(saved: &CpuFacts, here: &CpuFacts, out: &mut Differences) {
    let vendor = |cpu: &CpuFacts| format!("'{}'", cpu.vendor);
    out.compare("CPU vendor", vendor(saved), vendor(here));
    out.note("CPU family", saved.family, here.family);
    out.note("CPU model", saved.model, here.model);
    out.note("CPU stepping", saved.stepping, here.stepping);
    for word in WORDS {
        let missing = word.of(saved) & !word.of(here) & !word.dynamic;
        if missing != 0 {
            out.refuse(format!(
                "CPU features: the checkpoint's guest was told of {}, which this machine does not offer",
                word.describe(missing)
            ));
        }
    }
}

impl FeatureWord {
    /// The word's bits; a leaf that is not there has none.
    fn of(&self, cpu: &CpuFacts) -> u32 {
        let leaf = cpu
            .leaves
            .iter()
            .find(|leaf| leaf.function == self.function && leaf.index == self.index);
        leaf.map_or(0, |leaf| match self.register {
            Register::Eax => leaf.eax,
            Register::Ebx => leaf.ebx,
            Register::Ecx => leaf.ecx,
            Register::Edx => leaf.edx,
        })
    }

    /// "avx2, bmi2 (CPUID 0x7.0 EBX, bits 0x120)"
    fn describe(&self, bits: u32) -> String {
        let register = match self.register {
            Register::Eax => "EAX",
            Register::Ebx => "EBX",
            Register::Ecx => "ECX",
            Register::Edx => "EDX",
        };
        let named = self.names.iter().filter(|(bit, _)| bits & (1 << bit) != 0);
        let names: Vec<_> = named.map(|(_, name)| *name).collect();
        let place = format!("CPUID {:#x}.{} {register}, bits {bits:#x}", self.function, self.index);
        if names.is_empty() { place } else { format!("{} ({place})", names.join(", ")) }
    }
}
