//! What the host's KVM gives: capabilities, CPUID, and the state of vCPUs and interrupt chips.

pub mod blob;
pub mod cpuid;
pub mod irqchip;
pub mod msrs;
pub mod vcpu_state;

use kvm_ioctls::{Cap, Kvm};

/// The only version of the KVM API there is (KVM API section 4.1).
const KVM_API_VERSION: i32 = 12;

/// Capabilities the machine cannot do without.
const REQUIRED: &[(Cap, &str)] = &[
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
];

/// Why KVM or a part of it could not be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `/dev/kvm` cannot be opened.
    #[error(
        "cannot open /dev/kvm: {0}. Is KVM enabled (in a virtual machine: nested virtualisation), \
         and may this user open the device (group kvm)?"
    )]
    Open(kvm_ioctls::Error),
    /// The kernel speaks another version of the API.
    #[error("the host's KVM has API version {0}, version {KVM_API_VERSION} is needed")]
    ApiVersion(i32),
    /// A capability is missing.
    #[error("the host's KVM lacks {0}")]
    MissingCapability(&'static str),
    /// An ioctl failed.
    #[error("{call} failed: {source}")]
    Ioctl {
        /// The ioctl and what it was called for.
        call: &'static str,
        /// The kernel's answer.
        source: kvm_ioctls::Error,
    },
    /// A list handed to the kernel could not be built.
    #[error("{0} has too many entries for KVM")]
    TooManyEntries(&'static str),
    /// A recorded state does not fit this host.
    #[error("the recorded {what} does not fit this host: {why}")]
    Unfit {
        /// Which part of the state.
        what: &'static str,
        /// What is different.
        why: String,
    },
}

/// The result of a KVM operation.
pub type Result<T> = std::result::Result<T, Error>;

/// Turns the kernel's answer into an [`Error`] that names the call.
pub(crate) trait IoctlContext<T> {
    fn ioctl(self, call: &'static str) -> Result<T>;
}

impl<T> IoctlContext<T> for std::result::Result<T, kvm_ioctls::Error> {
    fn ioctl(self, call: &'static str) -> Result<T> {
        self.map_err(|source| Error::Ioctl { call, source })
    }
}

/// Whether KVM is known to let the processor walk the guest's page tables, and so to need no shadow
/// of them. There is no capability for that, only the parameters of Intel's and AMD's modules.
pub fn nested_paging() -> bool {
    ["kvm_intel/parameters/ept", "kvm_amd/parameters/npt"].iter().any(|parameter| {
        let text = std::fs::read_to_string(format!("/sys/module/{parameter}"));
        text.is_ok_and(|text| matches!(text.trim(), "Y" | "1"))
    })
}

/// Opens KVM and checks that it has what the machine needs.
pub fn open() -> Result<Kvm> {
    let kvm = Kvm::new().map_err(Error::Open)?;
    let version = kvm.get_api_version();
    if version != KVM_API_VERSION {
        return Err(Error::ApiVersion(version));
    }
    match REQUIRED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        Some((_, name)) => Err(Error::MissingCapability(name)),
        None => Ok(kvm),
    }
}
