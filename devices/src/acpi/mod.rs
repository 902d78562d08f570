//! ACPI: what a guest is told of the machine, and the device through which it is told of events.
//!
//! `docs/acpi.md` says what is in the tables, and how a guest learns that it was revived.

pub mod ged;
pub mod tables;

pub use ged::{Event, EventDevice, EventState};
pub use tables::{Machine, Tables, VirtioPlace};
