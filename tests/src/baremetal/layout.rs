//! Where in guest memory the bare-metal guest has what. Below its image lies what the VMM left for
//! a kernel (`docs/boot.md`), which the guest does not use.

/// The image: code, then the tables below. Also where the file's one segment goes.
pub const IMAGE: u64 = 0x10_0000;
/// Bytes of code at most.
pub const CODE_MAX: u64 = 0x4000;
/// Global descriptor table.
pub const GDT: u64 = IMAGE + CODE_MAX;
/// Interrupt descriptor table.
pub const IDT: u64 = 0x10_5000;
/// Task state segments, one a vCPU, [`TASK_SIZE`] apart.
pub const TASKS: u64 = 0x10_6000;
/// Bytes from one task state segment to the next.
pub const TASK_SIZE: u64 = 0x80;
/// Page map level 4; the directory pointer table and the directories follow.
pub const PML4: u64 = 0x10_8000;
/// How many GiB the page tables map.
pub const MAPPED_GIB: u64 = 16;
/// A second page map, equal to the first.
pub const OTHER_PML4: u64 = PML4 + 0x1000 * (2 + MAPPED_GIB);
/// End of what is in the file; what follows is zero at the start.
pub const IMAGE_END: u64 = OTHER_PML4 + 0x1000;

/// How often each vector was taken: 256 words.
pub const COUNTERS: u64 = 0x12_0000;
/// The monitor's request and answer.
pub const REQUEST: u64 = 0x12_1000;
/// See [`REQUEST`].
pub const ANSWER: u64 = 0x12_1080;
/// Requests to the other vCPUs, by APIC id, [`MAILBOX_SIZE`] apart.
pub const MAILBOXES: u64 = 0x12_1400;
/// Bytes from one mailbox to the next.
pub const MAILBOX_SIZE: u64 = 64;
/// Registers that `hold` is to load: see [`super::registers`].
pub const SET: u64 = 0x12_2000;
/// Registers as the interrupt that ended `hold` found them.
pub const DUMP: u64 = 0x12_3000;
/// Stacks, 16 KiB a vCPU; entry needs a few bytes below.
pub const STACKS: u64 = 0x13_0000;
/// From here to [`FREE`]: for the test's own structures.
pub const SCRATCH: u64 = 0x14_0000;
/// From here on memory is free.
pub const FREE: u64 = 0x20_0000;

/// Where the trampoline of the other vCPUs is copied to; a start-up IPI names its page.
pub const TRAMPOLINE: u64 = 0x4_0000;

/// The vector that ends `hold`.
pub const DUMP_VECTOR: u8 = 0x4f;
/// How many vectors have a handler, from 0.
pub const VECTORS: u64 = 80;

/// End of RAM below the 32-bit hole, and where RAM goes on behind it.
pub const LOW_RAM_MAX: u64 = 3 << 30;
/// See [`LOW_RAM_MAX`].
pub const HIGH_RAM: u64 = 4 << 30;
