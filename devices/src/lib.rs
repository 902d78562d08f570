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

/// The guest's RAM. A clone is a reference to the same mapping and keeps it alive.
///
/// Each region has a bit for each page, set when the host has written there: by vm-memory itself,
/// after the data is in place, and by [`virtio::mark_filled`] for what it does not see.
pub type GuestMemory = vm_memory::GuestMemoryMmap<vm_memory::bitmap::AtomicBitmap>;
