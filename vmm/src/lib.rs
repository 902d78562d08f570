//! vmm

pub mod boot;
