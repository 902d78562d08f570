//! All registers of a vCPU, set at one moment and found again at another.

use super::apic;
use super::layout::{DUMP, DUMP_VECTOR, SET};
use super::monitor::{Monitor, Routine};

/// RFLAGS: carry, parity, adjust, zero, sign, interrupt, direction, overflow, ID, and the bit that
/// is always set. Not the I/O privilege level, which not every KVM gives to CPL 3.
const FLAGS: u64 = 0x20_0ed7;
/// RFLAGS: an instruction that has faulted is tried again. Processors set it in what they push for a
/// fault, and clear it when the instruction is over: it comes and goes where memory comes late.
const RESUME: u64 = 1 << 16;
/// Where RFLAGS is among the general registers.
const FLAGS_AT: usize = 15;
/// XMM and x87 registers in the FXSAVE area: 8 of 10 bytes every 16, then 16 of 16.
const X87: usize = 32;
const XMM: usize = 160;
const XMM_END: usize = 416;
/// Bytes of general registers, RFLAGS and RSP at [`SET`] and [`DUMP`].
const GENERAL: usize = 17 * 8;

/// The privilege level at which the registers are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// CPL 0
    Kernel,
    /// CPL 3
    User,
}

/// General registers, RFLAGS, RSP, x87 and XMM registers.
#[derive(Clone, PartialEq, Eq)]
pub struct Registers {
    general: Vec<u64>,
    fxsave: Vec<u8>,
}

impl std::fmt::Debug for Registers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:x?} fxsave {:x?}", self.general, self.fxsave)
    }
}

impl Registers {
    /// Another value in each register, made of `seed`.
    pub fn of(seed: u64, stack: u64) -> Self {
        let word = |k| crate::pattern::word(seed, k);
        let mut general: Vec<u64> = (0..15).map(word).collect();
        let arithmetic = if seed.is_multiple_of(2) { 0 } else { 0x8d5 };
        general.extend([FLAGS ^ arithmetic, stack]);
        let mut fxsave = vec![0; 512];
        fxsave[..2].copy_from_slice(&0x027f_u16.to_le_bytes()); // double precision
        fxsave[2..4].copy_from_slice(&0x1800_u16.to_le_bytes()); // top of stack 3
        fxsave[4] = 0xff; // no register is empty
        fxsave[24..28].copy_from_slice(&0x3fa0_u32.to_le_bytes()); // MXCSR: another rounding
        for (index, register) in (0u16..).zip(fxsave[X87..XMM].chunks_exact_mut(16)) {
            register[..8].copy_from_slice(&(word(20 + u64::from(index)) | 1 << 63).to_le_bytes());
            register[8..10].copy_from_slice(&(0x3fff + index).to_le_bytes());
        }
        for (index, register) in fxsave[XMM..XMM_END].chunks_exact_mut(8).enumerate() {
            register.copy_from_slice(&word(40 + index as u64).to_le_bytes());
        }
        Self { general, fxsave }
    }

    /// Puts them in vCPU 0, which then does nothing but hold them.
    pub fn hold(&self, monitor: &mut Monitor, level: Level) {
        let words: Vec<u8> = self.general.iter().flat_map(|word| word.to_le_bytes()).collect();
        monitor.write(SET, &words);
        monitor.write(SET + 0x200, &self.fxsave);
        apic::enable(monitor);
        apic::route(monitor, apic::SERIAL_PIN, DUMP_VECTOR);
        monitor.start(Routine::Hold, &[u64::from(level == Level::User)]);
    }

    /// Ends the holding with an interrupt of the serial port; gives the registers as it found them,
    /// and the level.
    pub fn release(monitor: &mut Monitor) -> (Self, Level) {
        monitor.send(b"!");
        monitor.answer().unwrap();
        let bytes = monitor.bytes(DUMP, 0x400);
        let general = bytes[..GENERAL].as_chunks::<8>().0;
        let mut general: Vec<_> = general.iter().map(|word| u64::from_le_bytes(*word)).collect();
        general[FLAGS_AT] &= !RESUME;
        let mut fxsave = bytes[0x200..].to_vec();
        // Not part of what was set: last opcode and addresses, the mask of MXCSR, the free space.
        fxsave[6..24].fill(0);
        fxsave[28..X87].fill(0);
        fxsave[XMM_END..].fill(0);
        let level = if bytes[GENERAL] & 3 == 3 { Level::User } else { Level::Kernel };
        (Self { general, fxsave }, level)
    }
}
