//! The system calls the agent makes, as safe functions where they can be.

use core::arch::asm;
use core::ffi::{CStr, c_void};

/// A system call's error number.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Errno(pub i32);

/// `ENOENT`: no such file or directory.
pub const ENOENT: Errno = Errno(2);
/// `EBUSY`: already mounted, among others.
pub const EBUSY: Errno = Errno(16);

/// A file descriptor that closes itself.
pub struct Fd(i32);

/// The console, which the kernel opened for init.
pub const STDIN: i32 = 0;
/// The console, for output.
pub const STDOUT: i32 = 1;

pub const O_RDONLY: u32 = 0;
pub const O_WRONLY: u32 = 1;
pub const O_RDWR: u32 = 2;
pub const O_CREAT: u32 = 0o100;
pub const O_TRUNC: u32 = 0o1000;
pub const O_DIRECT: u32 = 0o40000;
pub const O_CLOEXEC: u32 = 0o2_000_000;

/// Numbers of the x86-64 system call table.
mod nr {
    pub const READ: usize = 0;
    pub const WRITE: usize = 1;
    pub const OPEN: usize = 2;
    pub const CLOSE: usize = 3;
    pub const MMAP: usize = 9;
    pub const MUNMAP: usize = 11;
    pub const IOCTL: usize = 16;
    pub const PREAD64: usize = 17;
    pub const PWRITE64: usize = 18;
    pub const MADVISE: usize = 28;
    pub const DUP2: usize = 33;
    pub const GETPID: usize = 39;
    pub const FORK: usize = 57;
    pub const EXECVE: usize = 59;
    pub const EXIT: usize = 60;
    pub const WAIT4: usize = 61;
    pub const FSYNC: usize = 74;
    pub const SYSINFO: usize = 99;
    pub const SETSID: usize = 112;
    pub const SETPRIORITY: usize = 141;
    pub const SYNC: usize = 162;
    pub const MOUNT: usize = 165;
    pub const UMOUNT2: usize = 166;
    pub const REBOOT: usize = 169;
    pub const IOPERM: usize = 173;
    pub const SCHED_GETAFFINITY: usize = 204;
    pub const CLOCK_GETTIME: usize = 228;
    pub const PIPE2: usize = 293;
}

/// Makes a system call.
///
/// # Safety
/// The arguments must be what the call `number` expects: live pointers, right lengths.
unsafe fn call(number: usize, args: [usize; 6]) -> Result<usize, Errno> {
    let result: isize;
    // SAFETY: the caller vouches for the arguments; the kernel clobbers rcx and r11 only.
    unsafe {
        asm!("syscall", inlateout("rax") number as isize => result,
             in("rdi") args[0], in("rsi") args[1], in("rdx") args[2],
             in("r10") args[3], in("r8") args[4], in("r9") args[5],
             lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    // The kernel returns -errno, and errors are at most 4095.
    match result {
        -4095..=-1 => Err(Errno(-result as i32)),
        _ => Ok(result as usize),
    }
}

fn plain(number: usize, args: [usize; 6]) -> Result<usize, Errno> {
    // SAFETY: used below only with calls whose arguments are numbers or borrowed, live memory.
    unsafe { call(number, args) }
}

fn address<T>(of: &mut T) -> usize {
    core::ptr::from_mut(of) as usize
}

impl Fd {
    /// Opens a file; `flags` are `O_*`, new files get mode 0644.
    pub fn open(path: &CStr, flags: u32) -> Result<Self, Errno> {
        let flags = (flags | O_CLOEXEC) as usize;
        plain(nr::OPEN, [path.as_ptr() as usize, flags, 0o644, 0, 0, 0]).map(|fd| Self(fd as i32))
    }

    /// The number, for calls that take one.
    pub fn raw(&self) -> i32 {
        self.0
    }

    /// Reads up to `into.len()` bytes at `offset`; 0 is the end.
    pub fn read_at(&self, into: &mut [u8], offset: u64) -> Result<usize, Errno> {
        let (at, length) = (into.as_mut_ptr() as usize, into.len());
        plain(nr::PREAD64, [self.0 as usize, at, length, offset as usize, 0, 0])
    }

    /// Writes at `offset` and says how much.
    pub fn write_at(&self, from: &[u8], offset: u64) -> Result<usize, Errno> {
        let (at, length) = (from.as_ptr() as usize, from.len());
        plain(nr::PWRITE64, [self.0 as usize, at, length, offset as usize, 0, 0])
    }

    /// Reads what is next in a stream; 0 is the end.
    pub fn read(&self, into: &mut [u8]) -> Result<usize, Errno> {
        read(self.0, into)
    }

    /// Makes what was written durable.
    pub fn sync(&self) -> Result<(), Errno> {
        plain(nr::FSYNC, [self.0 as usize, 0, 0, 0, 0, 0]).map(drop)
    }

    /// An ioctl that reads or fills `argument`.
    ///
    /// # Safety
    /// `T` must be the type that `request` works on.
    pub unsafe fn ioctl<T>(&self, request: u32, argument: &mut T) -> Result<(), Errno> {
        // SAFETY: the caller vouches for the type.
        unsafe { ioctl(self.0, request, argument) }
    }
}

impl Drop for Fd {
    fn drop(&mut self) {
        // An error of close(2) tells nothing that fsync has not told.
        let _ = plain(nr::CLOSE, [self.0 as usize, 0, 0, 0, 0, 0]);
    }
}

/// Reads from a descriptor by number.
pub fn read(fd: i32, into: &mut [u8]) -> Result<usize, Errno> {
    plain(nr::READ, [fd as usize, into.as_mut_ptr() as usize, into.len(), 0, 0, 0])
}

/// Writes to a descriptor by number and says how much.
pub fn write(fd: i32, from: &[u8]) -> Result<usize, Errno> {
    plain(nr::WRITE, [fd as usize, from.as_ptr() as usize, from.len(), 0, 0, 0])
}

/// An ioctl on a descriptor by number.
///
/// # Safety
/// `T` must be the type that `request` works on.
pub unsafe fn ioctl<T>(fd: i32, request: u32, argument: &mut T) -> Result<(), Errno> {
    // SAFETY: the caller vouches for the type, and the borrow for its life.
    unsafe {
        let argument = core::ptr::from_mut(argument) as usize;
        call(nr::IOCTL, [fd as usize, request as usize, argument, 0, 0, 0]).map(drop)
    }
}

/// An ioctl whose argument is a number.
pub fn ioctl_number(fd: i32, request: u32, argument: usize) -> Result<(), Errno> {
    plain(nr::IOCTL, [fd as usize, request as usize, argument, 0, 0, 0]).map(drop)
}

/// New anonymous memory that later processes share (`shared`) or do not see at all.
pub fn map(length: usize, shared: bool) -> Result<&'static mut [u8], Errno> {
    const READ_WRITE: usize = 1 | 2;
    const ANONYMOUS: usize = 0x20;
    const MADV_DONTFORK: usize = 10;
    let flags = ANONYMOUS | if shared { 1 } else { 2 };
    let at = plain(nr::MMAP, [0, length, READ_WRITE, flags, usize::MAX, 0])?;
    if !shared {
        // A fork would write-protect every page, and each would fault again.
        plain(nr::MADVISE, [at, length, MADV_DONTFORK, 0, 0, 0])?;
    }
    // SAFETY: a new, zeroed mapping of that length, which nothing else refers to.
    Ok(unsafe { core::slice::from_raw_parts_mut(at as *mut u8, length) })
}

/// Gives back memory of `map`.
pub fn unmap(memory: &'static mut [u8]) {
    let (at, length) = (memory.as_mut_ptr() as usize, memory.len());
    // SAFETY: the only reference to it was just given up.
    let _ = unsafe { call(nr::MUNMAP, [at, length, 0, 0, 0, 0]) };
}

/// The calling process.
pub fn getpid() -> usize {
    plain(nr::GETPID, [0; 6]).unwrap_or(0)
}

/// Gives way to every other process (nice 19).
pub fn lowest_priority() {
    let _ = plain(nr::SETPRIORITY, [0, 0, 19, 0, 0, 0]);
}

/// Bytes of memory nobody uses, not even as cache.
pub fn free_memory() -> Result<u64, Errno> {
    // `struct sysinfo` in words: uptime, three load averages, total, free, and more; on 64-bit
    // machines its unit is a byte.
    const FREE: usize = 5;
    let mut info = [0u64; 14];
    plain(nr::SYSINFO, [address(&mut info), 0, 0, 0, 0, 0])?;
    Ok(info[FREE])
}

/// Splits in two: the new process gets `None`, the old one its process id.
pub fn fork() -> Result<Option<usize>, Errno> {
    plain(nr::FORK, [0; 6]).map(|pid| (pid != 0).then_some(pid))
}

/// Ends the process.
pub fn exit(status: u8) -> ! {
    loop {
        let _ = plain(nr::EXIT, [usize::from(status), 0, 0, 0, 0, 0]);
    }
}

/// Waits until the child `pid` has ended and returns its wait status. Other children, orphans
/// that init inherited or workers, stay to be waited for.
pub fn wait_for(pid: usize) -> Result<u32, Errno> {
    let mut status = 0u32;
    plain(nr::WAIT4, [pid, address(&mut status), 0, 0, 0, 0])?;
    Ok(status)
}

/// Takes note of orphans that have ended, as is init's task.
pub fn reap_orphans() {
    const WNOHANG: usize = 1;
    // Zero: there are children, and all of them run.
    while let Ok(1..) = plain(nr::WAIT4, [usize::MAX, 0, WNOHANG, 0, 0, 0]) {}
}

/// Becomes another program. `argv` and `envp` end with a null pointer.
///
/// # Safety
/// All pointers before the null one must be NUL-terminated strings.
pub unsafe fn exec(path: &CStr, argv: &[*const u8], envp: &[*const u8]) -> Errno {
    let args = [path.as_ptr() as usize, argv.as_ptr() as usize, envp.as_ptr() as usize, 0, 0, 0];
    // SAFETY: the caller vouches for the strings; the slices live through the call.
    unsafe { call(nr::EXECVE, args) }.err().unwrap_or(ENOENT)
}

/// Makes `new` a copy of the descriptor `old`.
pub fn duplicate(old: i32, new: i32) -> Result<(), Errno> {
    plain(nr::DUP2, [old as usize, new as usize, 0, 0, 0, 0]).map(drop)
}

/// A pipe: its reading and its writing end.
pub fn pipe() -> Result<(Fd, Fd), Errno> {
    let mut ends = [0i32; 2];
    plain(nr::PIPE2, [ends.as_mut_ptr() as usize, O_CLOEXEC as usize, 0, 0, 0, 0])?;
    Ok((Fd(ends[0]), Fd(ends[1])))
}

/// Starts a new session, without a controlling terminal.
pub fn new_session() -> Result<(), Errno> {
    plain(nr::SETSID, [0; 6]).map(drop)
}

/// Writes everything to the disks.
pub fn sync_all() {
    let _ = plain(nr::SYNC, [0; 6]);
}

/// Mounts a file system without options.
pub fn mount(source: &CStr, target: &CStr, kind: &CStr) -> Result<(), Errno> {
    let no_options: *const c_void = core::ptr::null();
    let [source, target, kind] = [source, target, kind].map(|text| text.as_ptr() as usize);
    plain(nr::MOUNT, [source, target, kind, 0, no_options as usize, 0]).map(drop)
}

/// Unmounts what is mounted at `target`.
pub fn unmount(target: &CStr) -> Result<(), Errno> {
    plain(nr::UMOUNT2, [target.as_ptr() as usize, 0, 0, 0, 0, 0]).map(drop)
}

/// `command` is one of `LINUX_REBOOT_CMD_*`.
pub fn reboot(command: u32) -> Result<(), Errno> {
    let [magic1, magic2] = [0xfee1_deadusize, 672_274_793];
    plain(nr::REBOOT, [magic1, magic2, command as usize, 0, 0, 0]).map(drop)
}

/// Lets this process use `count` I/O ports from `first` on.
pub fn allow_ports(first: u16, count: usize) -> Result<(), Errno> {
    plain(nr::IOPERM, [usize::from(first), count, 1, 0, 0, 0]).map(drop)
}

/// The CPUs this process may run on, one bit each; for init, those that are online.
pub fn online_cpus() -> Result<u64, Errno> {
    let mut mask = [0u64; 1];
    plain(nr::SCHED_GETAFFINITY, [0, 8, address(&mut mask), 0, 0, 0])?;
    Ok(mask[0])
}

/// A clock's time in nanoseconds; `clock` is one of `CLOCK_*`.
pub fn clock_ns(clock: usize) -> Result<u64, Errno> {
    let mut time = [0u64; 2];
    plain(nr::CLOCK_GETTIME, [clock, address(&mut time), 0, 0, 0, 0])?;
    Ok(time[0] * 1_000_000_000 + time[1])
}
