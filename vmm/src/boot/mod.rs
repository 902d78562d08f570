//! Boot: everything between a kernel file and the first vCPU's registers.

pub mod layout;
