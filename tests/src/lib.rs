//! What the end-to-end tests share: the real binary on real KVM with a real Linux guest.
//!
//! | module | what it is |
//! |---|---|
//! | [`vm`] | a `tardigrade` process with its QMP and serial sockets |
//! | [`agent`] | the guest's agent, asked over the serial port |
//! | [`baremetal`] | a guest without a kernel, told over the serial port what to do |
//! | [`busy`] | a machine whose guest writes its disks all the time, and jobs beside that |
//! | [`cli`] | the program run to its end |
//! | [`daemon`] | a storage daemon, ours or QEMU's |
//! | [`disk`] | images, made and judged by `qemu-img` |
//! | [`full`] | a host that is out of space |
//! | [`events`] | QMP events, told in short |
//! | [`faults`] | a program whose reads, writes and flushes of files fail when a test wants it |
//! | [`counter`] | a guest of a few instructions that counts, for jobs that are refused |
//! | [`vmstate`] | finding and damaging the VM state in an image |
//! | [`checkpoint`] | a booted guest in a checkpoint that all tests share |
//! | [`pattern`] | the bytes that the agent writes |
//! | [`process`] | waiting for a process and its files |
//! | [`pty`] | a terminal for the program |
//! | [`refusal`] | command lines that the program must refuse |
//! | [`site`] | a guest whose host fails, or whose process is killed, at any step of a job |
//! | [`tap`] | what a client says over QMP |
//! | [`seccomp`] | processes that the kernel refuses something |
//! | [`require`] | what a test needs of the host, and what happens without it |
//!
//! Helpers panic with what went wrong: they are the tests' hands.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

pub mod agent;
pub mod baremetal;
pub mod busy;
pub mod checkpoint;
pub mod cli;
pub mod counter;
pub mod daemon;
pub mod disk;
pub mod events;
pub mod faults;
pub mod full;
pub mod pattern;
pub mod process;
pub mod pty;
pub mod refusal;
pub mod require;
pub mod seccomp;
pub mod site;
pub mod tap;
pub mod vm;
pub mod vmstate;

use std::path::PathBuf;

/// A file of the repository.
pub fn repo(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}
