//! Which pages of RAM the guest wrote: KVM's dirty log (KVM API, KVM_GET_DIRTY_LOG), together with
//! what the host wrote for it.
//!
//! The log is a flag of the memory slots. It is off until something needs it, as it keeps KVM from
//! using large pages, and costs a fault at the first write to each page after a collection. Parts of
//! RAM may be left without it: all of their pages count as written, whenever it is asked.

use devices::GuestMemory;
use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVMIO, kvm_clear_dirty_log,
    kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_log, kvm_dirty_log__bindgen_ty_1, kvm_enable_cap,
};
use kvm_ioctls::{Kvm, VmFd};
use snapshot::{PageRun, PageSet};
use vm_memory::GuestMemoryBackend;
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::MmapRegion;
use super::slots::{self, Slots, Writes};
use crate::kvm::{self, IoctlContext};

/// kvm-ioctls does not have the one, and allocates for the other each time.
mod ioctl {
    #![allow(missing_docs, reason = "the macro makes a public function")]

    use super::{KVMIO, kvm_clear_dirty_log, kvm_dirty_log};

    vmm_sys_util::ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
    vmm_sys_util::ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
}

/// Pages whose log is cleared in one call: 256 MiB. KVM holds the lock that the guest's page faults
/// want meanwhile.
const CHUNK: u64 = 1 << 16;
const WORD: u64 = 64;

/// What this host's KVM can do, and which slots are logged.
#[derive(Debug)]
pub struct DirtyLog {
    /// Bits of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2; 0 where reading the log clears it too.
    manual: u64,
    on: bool,
    pub(super) slots: Slots,
    /// What is not logged while the log is on.
    untold: PageSet,
    /// The log of one slot.
    words: Vec<u64>,
}

/// What becomes of pages that were found to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protect {
    /// They are write-protected, so that the next write is seen: for the guest it is a fault.
    Again,
    /// Where KVM can, nothing: they count as written the next time too, whether they are or not.
    Not,
}

/// What a slot's log holds when the slot gets it.
///
/// To KVM it is a matter of the machine, and [`Begin::Full`] is to stay while there are slots whose log
/// began so: it protects what it had mapped in large pages only then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Begin {
    /// Every page, where KVM can: no page has to be protected to begin.
    Full,
    /// No page. For a slot that is made anew, this costs nothing.
    Empty,
}

impl DirtyLog {
    /// Asks what KVM can do, and tells it of all RAM, which is not logged.
    ///
    /// # Errors
    /// KVM does not take the memory.
    pub fn new(kvm: &Kvm, vm: &VmFd, memory: &GuestMemory) -> kvm::Result<Self> {
        let bits = kvm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
        let known = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
        let manual = u64::try_from(bits).unwrap_or(0) & u64::from(known);
        let mut slots = Slots::default();
        slots.make(vm, memory, slots::whole(memory, Writes::Untold))?;
        Ok(Self { manual, on: false, slots, untold: PageSet::of(memory), words: Vec::new() })
    }

    /// Whether RAM is logged, if not all of it.
    pub fn is_on(&self) -> bool {
        self.on
    }

    /// What is not logged while the rest is.
    pub fn untold(&self) -> &PageSet {
        &self.untold
    }

    /// All of RAM is logged from now on. The guest may run. The next collection may give all of what was
    /// not logged before.
    ///
    /// # Errors
    /// KVM refuses. What it does not log counts as written.
    pub fn start(&mut self, vm: &VmFd, memory: &GuestMemory) -> kvm::Result<()> {
        if self.on && self.untold.is_empty() {
            return Ok(());
        }
        self.set_begin(vm, Begin::Full)?;
        self.slots.begin(vm, memory)?;
        self.untold.clear();
        self.on = true;
        Ok(())
    }

    /// Makes all slots anew. What was logged is lost; with `logged` RAM is logged afterwards, beginning
    /// with no page. The vCPUs must be paused.
    ///
    /// # Errors
    /// KVM refuses; the guest has no memory then, until this is done again.
    pub(super) fn make_anew(
        &mut self,
        vm: &VmFd,
        memory: &GuestMemory,
        logged: bool,
    ) -> kvm::Result<()> {
        self.slots.remove(vm, memory)?;
        self.on = logged;
        self.untold.clear();
        self.set_begin(vm, Begin::Empty)?;
        let writes = if logged { Writes::Logged } else { Writes::Untold };
        self.slots.make(vm, memory, slots::whole(memory, writes))
    }

    /// As [`DirtyLog::make_anew`], logged but for `untold`.
    pub(super) fn make_anew_without(
        &mut self,
        vm: &VmFd,
        memory: &GuestMemory,
        untold: &PageSet,
    ) -> kvm::Result<()> {
        self.slots.remove(vm, memory)?;
        self.on = true;
        self.untold.clone_from(untold);
        self.set_begin(vm, Begin::Empty)?;
        self.slots.make(vm, memory, slots::cut(untold))
    }

    /// Says how the log of the slots that are set next begins.
    fn set_begin(&self, vm: &VmFd, begin: Begin) -> kvm::Result<()> {
        let enable = u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE);
        if self.manual & enable == 0 {
            return Ok(());
        }
        let bits = if begin == Begin::Full { self.manual } else { enable };
        let cap = kvm_enable_cap {
            cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
            args: [bits, 0, 0, 0],
            ..Default::default()
        };
        vm.enable_cap(&cap).ioctl("KVM_ENABLE_CAP(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)")
    }

    /// Adds the pages that were written since the last time, by the guest or for it, to `written`.
    /// Without the log it is all of RAM. A page that is written meanwhile is among them, or among the
    /// next ones; copy it afterwards, not before.
    ///
    /// # Errors
    /// KVM refuses. What it had logged may be lost then: all of RAM counts as written.
    pub fn collect(
        &mut self,
        vm: &VmFd,
        memory: &GuestMemory,
        protect: Protect,
        written: &mut PageSet,
    ) -> kvm::Result<()> {
        for (at, region) in memory.iter().enumerate() {
            MmapRegion::bitmap(region)
                .written()
                .take(|first, bits| written.insert_words_at(at, first, &[bits]));
        }
        if !self.on {
            written.insert_all();
            return Ok(());
        }
        let Self { slots, words, manual, .. } = self;
        for (number, slot) in slots.iter_mut() {
            let PageRun { region, first, count } = slot.run;
            if slot.writes != Writes::Logged {
                written.insert(slot.run);
            }
            if slot.writes == Writes::Untold {
                continue;
            }
            read(vm, number, count, words)?;
            if *manual != 0 && protect == Protect::Again {
                clear(vm, number, words, count)?;
            }
            slot.writes = Writes::Logged;
            written.insert_words_at(region, first, words);
        }
        Ok(())
    }
}

/// Reads the log of a slot of so many pages into `words`.
fn read(vm: &VmFd, slot: u32, pages: u64, words: &mut Vec<u64>) -> kvm::Result<()> {
    words.resize(usize::try_from(pages.div_ceil(WORD)).unwrap_or(usize::MAX), 0);
    let arguments = kvm_dirty_log {
        slot,
        padding1: 0,
        __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: words.as_mut_ptr().cast() },
    };
    // SAFETY: KVM writes one bit for each page of the slot, rounded up to words of 64 bits, and
    // `words` has them: the slot was made with so many pages.
    let answer = unsafe { ioctl_with_ref(vm, ioctl::KVM_GET_DIRTY_LOG(), &arguments) };
    if answer != 0 {
        return Err(kvm_ioctls::Error::last()).ioctl("KVM_GET_DIRTY_LOG");
    }
    Ok(())
}

/// Protects the pages of `words` again. Bits that came since stay.
fn clear(vm: &VmFd, slot: u32, words: &[u64], pages: u64) -> kvm::Result<()> {
    let whole = PageRun { region: 0, first: 0, count: pages };
    for chunk in whole.pieces(CHUNK) {
        let from = usize::try_from(chunk.first / WORD).unwrap_or(usize::MAX);
        let to = usize::try_from(chunk.end().div_ceil(WORD)).unwrap_or(usize::MAX);
        let Some(words) = words.get(from..to) else { continue };
        // From the first word with a bit to the last.
        let Some(first) = words.iter().position(|word| *word != 0) else { continue };
        let last = words.iter().rposition(|word| *word != 0).unwrap_or(first);
        let words = &words[first..=last];
        let first_page = chunk.first + first as u64 * WORD;
        // Whole words, but at the end of the slot.
        let count = (words.len() as u64 * WORD).min(pages - first_page);
        let arguments = kvm_clear_dirty_log {
            slot,
            num_pages: u32::try_from(count).unwrap_or(u32::MAX),
            first_page,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                dirty_bitmap: words.as_ptr().cast_mut().cast(),
            },
        };
        // SAFETY: KVM reads one bit of the bitmap for each of `count` pages, rounded up to words,
        // and `words` has them; it writes nothing.
        let answer = unsafe { ioctl_with_ref(vm, ioctl::KVM_CLEAR_DIRTY_LOG(), &arguments) };
        if answer != 0 {
            return Err(kvm_ioctls::Error::last()).ioctl("KVM_CLEAR_DIRTY_LOG");
        }
    }
    Ok(())
}
