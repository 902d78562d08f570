//! Device models: the serial console, the i8042 reset line, virtio devices over MMIO, and what ACPI tells
//! of them.
//!
//! A device knows guest memory, eventfds and [`block::Node`]; it knows nothing of KVM, QMP or file
//! formats. Each has a plain, versioned state struct. `docs/devices.md` tells threads, lock order,
//! the pause protocol and what happens when a driver misbehaves.

#![cfg_attr(
    test,
    allow(clippy::cast_possible_truncation, reason = "tests cast numbers they chose themselves")
)]

pub mod acpi;
pub mod interrupt;
pub mod legacy;
pub mod presence;
pub mod virtio;

pub use interrupt::{EventFdLine, InterruptLine};
pub use presence::Presence;

/// What vm-memory does not see being written is marked by [`virtio::mark_filled`].
pub use ram::GuestMemory;
