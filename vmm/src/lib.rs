//! The Tardigrade virtual machine monitor: the machine itself, the QMP command handlers and the
//! command line of the binary `tardigrade`. `docs/architecture.md` tells how its threads work together.

pub mod blocks;
pub mod boot;
pub mod bus;
pub mod checkpoints;
pub mod cli;
pub mod client;
pub mod console;
pub mod control;
pub mod early;
pub mod fork;
pub mod image;
pub mod kvm;
pub mod machine;
pub mod memory;
pub mod migration;
pub mod restore;
pub mod run;
pub mod terminal;
pub mod vcpu;
pub mod version;
