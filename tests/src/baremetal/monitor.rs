//! The bare-metal guest's monitor, seen from the host: calls of the guest's routines.

use std::fmt;
use std::io::{Read, Write};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use super::image;
use super::layout::{COUNTERS, MAILBOX_SIZE, MAILBOXES};

/// How long the guest may take to answer.
const PATIENCE: Duration = Duration::from_secs(120);

/// The guest's routines, in the order of its table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Routine {
    /// Word at an address.
    Peek64,
    /// Address, word.
    Poke64,
    /// Half word at an address.
    Peek32,
    /// Address, half word.
    Poke32,
    /// RDMSR
    ReadMsr,
    /// WRMSR
    WriteMsr,
    /// A byte from a port.
    PortIn,
    /// A byte to a port.
    PortOut,
    /// Address and length of bytes that follow.
    Receive,
    /// Address and length of bytes to send before the answer.
    Transmit,
    /// Goes to an address.
    Jump,
    /// Calls a routine for CPL 3 with three arguments.
    User,
    /// CPL 3: start, end, seed.
    Fill,
    /// CPL 3: start, end, seed.
    Verify,
    /// CPL 3: start, end.
    FindNonzero,
    /// CPL 3: own counter, shared counter, stop word.
    CountUp,
    /// Until a byte comes; see [`Monitor::watch`].
    WatchTime,
    /// Loads all registers and waits for the dump interrupt; the argument tells whether at CPL 3.
    Hold,
    /// Shuts down the processor.
    TripleFault,
    /// RDTSC
    ReadTsc,
    /// A control register.
    ReadCr,
    /// CR3
    WriteCr3,
    /// A debug register.
    ReadDr,
    /// A debug register and its value.
    WriteDr,
    /// STI
    InterruptsOn,
    /// CLI
    InterruptsOff,
    /// Nanoseconds of the kvmclock page at an address.
    Clock,
    /// As `Transmit`, with REP OUTSB.
    TransmitString,
    /// CPL 3: first page, pages, stop word. Counts in memory; see `guest.s`.
    Chain,
    /// Stop word, [`super::layout::SCRATCH`]. Counts on the disk and in memory; see `guest.s`.
    DiskChain,
    /// CPL 3: start, end, stop word with ticks a page behind it.
    Dirty,
    /// [`Routine::Touch`], start, end. See [`Monitor::trial`].
    Trials,
    /// CPL 3: start, end.
    Touch,
    /// CPL 3: the words of [`super::writer`].
    DiskLoad,
    /// CPL 3: first page, pages, address of four words. Counts looks at random pages; see `guest.s`.
    Look,
}

/// An exception in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Its vector.
    pub vector: u8,
    /// Where it was.
    pub rip: u64,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "exception {} in the guest at {:#x}", self.vector, self.rip)
    }
}

/// A connection to the monitor. One at a time.
pub struct Monitor {
    stream: UnixStream,
}

impl Monitor {
    /// Connects to the serial socket.
    pub fn connect(socket: &Path) -> Self {
        Self::new(UnixStream::connect(socket).unwrap())
    }

    /// Over a connection to the serial socket.
    pub fn new(stream: UnixStream) -> Self {
        assert_eq!(image::routines(), Routine::Look as u64 + 1, "the tables differ");
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { stream }
    }

    /// Calls a routine, which must not fault.
    pub fn call(&mut self, routine: Routine, arguments: &[u64]) -> u64 {
        self.try_call(routine, arguments).unwrap_or_else(|fault| panic!("{routine:?}: {fault}"))
    }

    /// Calls a routine.
    pub fn try_call(&mut self, routine: Routine, arguments: &[u64]) -> Result<u64, Fault> {
        self.start(routine, arguments);
        self.answer()
    }

    /// Starts a routine whose answer comes later, or never.
    pub fn start(&mut self, routine: Routine, arguments: &[u64]) {
        let mut words = [0; 5];
        words[0] = routine as u64;
        words[1..=arguments.len()].copy_from_slice(arguments);
        self.send(words.map(u64::to_le_bytes).as_flattened());
    }

    /// Sends bytes to the serial port.
    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// Waits for the answer of a routine.
    pub fn answer(&mut self) -> Result<u64, Fault> {
        // The guest says one letter when it starts.
        while self.byte() != 0xa5 {}
        let status = self.byte();
        let mut word = [0; 8];
        self.read(&mut word);
        match status.checked_sub(1) {
            None => Ok(u64::from_le_bytes(word)),
            Some(vector) => Err(Fault { vector, rip: u64::from_le_bytes(word) }),
        }
    }

    /// Makes sure that the next answer is of the next call: `word` is at `address`, and in no answer that may
    /// still come, of a call whose caller is gone.
    pub fn give_up_answers(&mut self, address: u64, word: u64) {
        self.start(Routine::Peek64, &[address]);
        while self.answer() != Ok(word) {}
    }

    /// Waits for the letter that the guest says when it starts.
    pub fn wait_started(&mut self) {
        assert_eq!(self.byte(), b'S');
    }

    fn byte(&mut self) -> u8 {
        let mut byte = [0];
        self.read(&mut byte);
        byte[0]
    }

    fn read(&mut self, bytes: &mut [u8]) {
        self.stream.read_exact(bytes).expect("the guest is silent");
    }

    /// The word at a physical address.
    pub fn peek(&mut self, address: u64) -> u64 {
        self.call(Routine::Peek64, &[address])
    }

    /// Sets the word at a physical address.
    pub fn poke(&mut self, address: u64, word: u64) {
        self.call(Routine::Poke64, &[address, word]);
    }

    /// A device register of 32 bits.
    pub fn peek32(&mut self, address: u64) -> u32 {
        u32::try_from(self.call(Routine::Peek32, &[address])).unwrap()
    }

    /// Sets a device register of 32 bits.
    pub fn poke32(&mut self, address: u64, value: u32) {
        self.call(Routine::Poke32, &[address, value.into()]);
    }

    /// RDMSR
    pub fn msr(&mut self, index: u32) -> u64 {
        self.call(Routine::ReadMsr, &[index.into()])
    }

    /// WRMSR
    pub fn set_msr(&mut self, index: u32, value: u64) {
        self.call(Routine::WriteMsr, &[index.into(), value]);
    }

    /// OUT
    pub fn port_out(&mut self, port: u16, value: u8) {
        self.call(Routine::PortOut, &[port.into(), value.into()]);
    }

    /// RDTSC
    pub fn tsc(&mut self) -> u64 {
        self.call(Routine::ReadTsc, &[])
    }

    /// Copies bytes to guest memory.
    pub fn write(&mut self, address: u64, bytes: &[u8]) {
        self.start(Routine::Receive, &[address, bytes.len() as u64]);
        self.send(bytes);
        self.answer().unwrap();
    }

    /// Copies bytes from guest memory.
    pub fn bytes(&mut self, address: u64, length: usize) -> Vec<u8> {
        self.bytes_by(Routine::Transmit, address, length)
    }

    /// The same with a choice of routine.
    pub fn bytes_by(&mut self, routine: Routine, address: u64, length: usize) -> Vec<u8> {
        // What the guest said when it started would be taken for data.
        self.tsc();
        self.start(routine, &[address, length as u64]);
        let bytes = self.received(length);
        self.answer().unwrap();
        bytes
    }

    /// Bytes that a routine sends before its answer.
    pub fn received(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.read(&mut bytes);
        bytes
    }

    /// Calls a routine at CPL 3.
    pub fn user(&mut self, routine: Routine, arguments: &[u64]) -> u64 {
        let mut all = vec![routine as u64];
        all.extend_from_slice(arguments);
        self.call(Routine::User, &all)
    }

    /// Lets the guest look at the clock all the time while `meanwhile` is done; gives the longest
    /// gap between two looks, in TSC ticks.
    pub fn watch(&mut self, meanwhile: impl FnOnce()) -> u64 {
        self.start(Routine::WatchTime, &[]);
        meanwhile();
        self.end_watch()
    }

    /// Ends a watch that goes on because the guest was revived in the middle of it.
    pub fn end_watch(&mut self) -> u64 {
        self.send(b"!");
        self.answer().unwrap()
    }

    /// Fills memory with words made of their address and the seed, at native speed.
    pub fn fill(&mut self, range: Range<u64>, seed: u64) {
        self.user(Routine::Fill, &[range.start, range.end, seed]);
    }

    /// Lets the guest do trials on a range of memory: one for each byte that it is sent, until that is 0.
    /// The second word of the range tells how many TSC ticks the last one took.
    pub fn start_trials(&mut self, range: Range<u64>) {
        self.start(Routine::Trials, &[Routine::Touch as u64, range.start, range.end]);
    }

    /// Waits until the guest has done a trial: has written to all pages of the range. Gives how many of
    /// them were zero before.
    pub fn trial(&mut self) -> u16 {
        let mut pages = [0; 2];
        self.read(&mut pages);
        u16::from_le_bytes(pages)
    }

    /// Panics unless memory is as [`Monitor::fill`] left it.
    pub fn verify(&mut self, range: Range<u64>, seed: u64) {
        let wrong = self.user(Routine::Verify, &[range.start, range.end, seed]);
        if wrong != 0 {
            panic!("not the pattern of {seed} at {wrong:#x}: {:#x}", self.peek(wrong));
        }
    }

    /// Panics unless memory is zero.
    pub fn verify_zero(&mut self, range: Range<u64>) {
        let wrong = self.user(Routine::FindNonzero, &[range.start, range.end]);
        if wrong != 0 {
            panic!("not zero at {wrong:#x}: {:#x}", self.peek(wrong));
        }
    }

    /// How often an interrupt vector was taken.
    pub fn interrupts(&mut self, vector: u8) -> u64 {
        self.peek(COUNTERS + 8 * u64::from(vector))
    }

    /// Waits until an interrupt vector was taken more than `count` times; gives how often.
    pub fn wait_interrupts(&mut self, vector: u8, count: u64) -> u64 {
        self.wait_word(COUNTERS + 8 * u64::from(vector), |taken| taken > count)
    }

    /// Waits until the word at an address is as wanted; gives it.
    pub fn wait_word(&mut self, address: u64, wanted: impl Fn(u64) -> bool) -> u64 {
        self.wait_value(|monitor| monitor.peek(address), wanted)
    }

    /// Waits until a device register is as wanted.
    pub fn wait_register(&mut self, address: u64, wanted: impl Fn(u32) -> bool) {
        self.wait_value(|monitor| monitor.peek32(address), wanted);
    }

    fn wait_value<T: Copy + fmt::LowerHex>(
        &mut self,
        read: impl Fn(&mut Self) -> T,
        wanted: impl Fn(T) -> bool,
    ) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let value = read(self);
            if wanted(value) {
                return value;
            }
            assert!(Instant::now() < deadline, "what should change stays {value:#x}");
        }
    }

    /// Asks another vCPU to call a routine.
    pub fn start_on(&mut self, vcpu: u64, routine: Routine, arguments: &[u64]) {
        let mailbox = MAILBOXES + vcpu * MAILBOX_SIZE;
        assert_eq!(self.peek(mailbox + 40), 2, "vCPU {vcpu} does not wait for a request");
        let words = std::iter::once(routine as u64).chain(arguments.iter().copied());
        for (address, word) in (mailbox..).step_by(8).zip(words) {
            self.poke(address, word);
        }
        self.poke(mailbox + 40, 1);
    }

    /// Waits for the answer of another vCPU.
    pub fn answer_of(&mut self, vcpu: u64) -> u64 {
        let mailbox = MAILBOXES + vcpu * MAILBOX_SIZE;
        let state = self.wait_word(mailbox + 40, |state| state > 1);
        let value = self.peek(mailbox + 48);
        assert_eq!(state, 2, "vCPU {vcpu}: exception {} at {value:#x}", state & 0xff);
        value
    }
}
