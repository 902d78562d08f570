//! A vCPU that writes to a disk all the time, and keeps in the guest's memory what each of its blocks must
//! have: each is read before it is written, so a block that was lost, is old, is torn or lies elsewhere is
//! found. `disk_load` in `guest.s` is the guest's part.

use super::apic;
use super::layout::FREE;
use super::monitor::{Monitor, Routine};
use super::virtio::Driver;

/// Bytes of a block.
const BLOCK: usize = 4096;
/// Bytes from one block to the next: a cluster, so that not all clusters are soon written.
const SPREAD: usize = 65536;
/// Bytes of guest memory from [`FREE`] on for each slot: a word for each block, then the words of the load.
const ROOM: u64 = 0x2_0000;
const WORDS: u64 = 0x1_0000;
/// Blocks at most: what has a word.
const MOST: u64 = WORDS / 8;
/// From each word of a block to the next.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// Words of the load, in bytes behind [`WORDS`], as far as they are used here; `guest.s` has them all.
const STOP: u64 = 0;
const WHAT: u64 = 8;
const STRUCTURES: u64 = 16;
const REGISTERS: u64 = 24;
const NUMBERS: u64 = 32;
const BLOCKS: u64 = 40;
const STEPS: u64 = 56;
const RANDOM: u64 = 64;
const WRONG: u64 = 72;
const FOUND: u64 = 80;

/// What the vCPU is to do with the blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    /// Read and write any, until it is stopped.
    Write = 0,
    /// Read all.
    Look = 1,
    /// Read all, and take what each has as what it must have.
    Take = 2,
}

/// The load of one disk.
#[derive(Debug)]
pub struct Writer {
    slot: u64,
    blocks: u64,
}

impl Writer {
    /// A vCPU of its own, which is started, for the disk in `slot`, whose first blocks are all zeroes
    /// and will be written to.
    pub fn start(guest: &mut Monitor, slot: u64, blocks: u64) -> Self {
        let writer = Self::prepare(guest, slot, blocks);
        writer.resume(guest);
        writer
    }

    /// The same for a disk that has been written to: each block must be whole.
    pub fn take(guest: &mut Monitor, slot: u64, blocks: u64) -> Self {
        let writer = Self::prepare(guest, slot, blocks);
        writer.walk(guest, What::Take);
        writer.resume(guest);
        writer
    }

    fn prepare(guest: &mut Monitor, slot: u64, blocks: u64) -> Self {
        assert!(blocks <= MOST);
        let writer = Self { slot, blocks };
        apic::start_vcpu(guest, writer.vcpu());
        let (structures, registers) = Driver::start_at(guest, slot).prepare_load();
        for (at, word) in [
            (STRUCTURES, structures),
            (REGISTERS, registers),
            (NUMBERS, writer.numbers()),
            (BLOCKS, blocks),
            (RANDOM, slot + 1),
        ] {
            guest.poke(writer.word(at), word);
        }
        writer
    }

    fn vcpu(&self) -> u64 {
        self.slot + 1
    }

    fn numbers(&self) -> u64 {
        FREE + self.slot * ROOM
    }

    fn word(&self, at: u64) -> u64 {
        self.numbers() + WORDS + at
    }

    fn begin(&self, guest: &mut Monitor, what: What) {
        guest.poke(self.word(STOP), 0);
        guest.poke(self.word(WHAT), what as u64);
        let load = [Routine::DiskLoad as u64, self.word(0)];
        guest.start_on(self.vcpu(), Routine::User, &load);
    }

    fn end(&self, guest: &mut Monitor) {
        let answer = guest.answer_of(self.vcpu());
        if answer != 0 {
            let block = usize::try_from(guest.peek(self.word(WRONG))).unwrap();
            assert_eq!(answer, 1, "disk {}, block {block}: an error of the disk", self.slot);
            let (found, wanted) = (guest.peek(self.word(FOUND)), self.wanted(guest)[block]);
            panic!("disk {}, block {block}: number {found} instead of {wanted}", self.slot);
        }
    }

    fn walk(&self, guest: &mut Monitor, what: What) {
        self.begin(guest, what);
        self.end(guest);
    }

    /// Goes on writing.
    pub fn resume(&self, guest: &mut Monitor) {
        self.begin(guest, What::Write);
    }

    /// Ends the writing. Panics where a block was not as it must be.
    pub fn stop(&self, guest: &mut Monitor) {
        guest.poke(self.word(STOP), 1);
        self.end(guest);
    }

    /// Lets the guest read all blocks while it does not write. Panics where one is not as it must be.
    pub fn check(&self, guest: &mut Monitor) {
        self.walk(guest, What::Look);
    }

    /// How often a block was read and written.
    pub fn steps(&self, guest: &mut Monitor) -> u64 {
        guest.peek(self.word(STEPS))
    }

    /// Waits until it has done `more` steps.
    pub fn goes_on(&self, guest: &mut Monitor, more: u64) {
        let now = self.steps(guest);
        guest.wait_word(self.word(STEPS), |steps| steps >= now + more);
    }

    fn wanted(&self, guest: &mut Monitor) -> Vec<u64> {
        let bytes = guest.bytes(self.numbers(), usize::try_from(self.blocks * 8).unwrap());
        bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect()
    }

    /// What the disk must have, as long as the guest does not write.
    pub fn contents(&self, guest: &mut Monitor) -> Vec<u8> {
        let mut contents = Vec::new();
        for number in self.wanted(guest) {
            contents.extend(block(number));
            contents.resize(contents.len() + SPREAD - BLOCK, 0);
        }
        contents
    }
}

/// The block of that number.
fn block(number: u64) -> Vec<u8> {
    let step = if number == 0 { 0 } else { STEP };
    let words = (0..BLOCK as u64 / 8).map(|k| number.wrapping_add(k.wrapping_mul(step)));
    words.flat_map(u64::to_le_bytes).collect()
}

/// Panics unless every block is one that was written, whole, and nothing else was.
pub fn check_whole(contents: &[u8]) {
    for (at, found) in contents.chunks(SPREAD).enumerate() {
        let (found, behind) = found.split_at(BLOCK);
        let number = u64::from_le_bytes(found[..8].try_into().unwrap());
        assert!(found == block(number), "block {at} is torn, number {number}");
        assert!(behind.iter().all(|byte| *byte == 0), "behind block {at}");
    }
}
