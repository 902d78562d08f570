//! QEMU's block permissions: what a user of a node does, and what it lets other users do.

use std::fmt;

bitflags::bitflags! {
    /// QEMU's BLK_PERM_* bits.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub struct Perm: u32 {
        /// The node's contents make sense while they are read.
        const CONSISTENT_READ = 1;
        /// Writes that change what is read.
        const WRITE = 2;
        /// Writes that change nothing a reader sees.
        const WRITE_UNCHANGED = 4;
        /// Changes of the size.
        const RESIZE = 8;
    }
}

/// Every permission with its bit in QEMU's file locks and its name in messages.
pub(crate) const BITS: [(Perm, u64, &str); 4] = [
    (Perm::CONSISTENT_READ, 0, "consistent read"),
    (Perm::WRITE, 1, "write"),
    (Perm::WRITE_UNCHANGED, 2, "write unchanged"),
    (Perm::RESIZE, 3, "resize"),
];

impl fmt::Display for Perm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = BITS
            .iter()
            .filter(|(perm, _, _)| self.contains(*perm))
            .map(|(_, _, name)| *name)
            .collect();
        f.write_str(&names.join(", "))
    }
}

/// What a user does with a node and what it lets others do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Permissions {
    /// What it does.
    pub used: Perm,
    /// What others may do meanwhile.
    pub shared: Perm,
}

impl Permissions {
    /// Nothing is done, everything is allowed.
    pub const NONE: Self = Self { used: Perm::empty(), shared: Perm::all() };

    /// What QEMU takes for an image in a format with metadata: others may read, never write.
    pub(crate) fn of_image(writable: bool, force_share: bool) -> Self {
        let mut used = Perm::CONSISTENT_READ;
        let mut shared = Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED;
        if writable {
            used |= Perm::WRITE | Perm::RESIZE;
        } else if force_share {
            used = Perm::empty();
            shared = Perm::all();
        }
        Self { used, shared }
    }

    /// Both together.
    #[must_use]
    pub(crate) fn and(self, other: Self) -> Self {
        Self { used: self.used | other.used, shared: self.shared & other.shared }
    }
}
