//! Checkpoints: the VM-state format, capture and revival of RAM, and the order that makes a change
//! to several disks land on all of them or on none.
//!
//! A checkpoint lives in the guest's own images: each disk as an internal snapshot, RAM and devices
//! in the VM-state area of one of them. [`save()`] makes one, [`Checkpoint`] opens and revives one,
//! [`delete()`] removes one. What the sections contain is the machine's business: this crate knows
//! neither KVM nor QMP. `docs/checkpoints.md` tells the order of operations and what can fail,
//! `docs/vm-state-format.md` what is stored.

pub mod about;
pub mod config;
pub mod delete;
pub mod fault;
pub mod format;
pub mod load;
pub mod map;
mod memory;
pub mod nodes;
pub mod order;
mod parallel;
mod revive;
pub mod rewind;
pub mod save;
pub mod stream;
pub mod track;
pub mod tree;
mod units;

/// Size of a page of guest RAM in bytes.
pub const PAGE_SIZE: u64 = units::PAGE;

pub use about::{About, Lineage, Stamp};
pub use block::Progress;
pub use config::MachineConfig;
pub use delete::{DeleteError, DeleteReport, delete, delete_unless};
pub use fault::{LazyHost, LazyRam, Notice, Notify, Orders};
pub use format::FormatError;
pub use format::section::{Section, SectionName, SectionReader};
pub use load::{Checkpoint, LoadError, ReviveReport};
pub use map::{MappedRam, Piece};
pub use nodes::{NodesError, kept_tag, resolve};
pub use ram::GuestMemory;
pub use rewind::Rewinder;
pub use save::{Save, SaveError, SaveImages, SaveReport, SaveRequest, preflight_save, save};
pub use track::{Base, PageRun, PageSet, Tracker};
