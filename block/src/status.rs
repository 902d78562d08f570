//! How a disk is stored: data, zeroes, and in which image of a chain.

/// A part of a disk that is stored in one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatusExtent {
    /// Length in bytes.
    pub len: u64,
    /// Whether host space is kept for the contents; without it the extent reads as zeroes, or is
    /// not defined.
    pub data: bool,
    /// Whether it reads as zeroes for sure.
    pub zero: bool,
    /// The image that determines the contents: 1 for this one, 2 for its backing file and so on; 0
    /// if none does.
    pub depth: u32,
}

impl StatusExtent {
    /// Stored in this image.
    pub const fn data(len: u64) -> Self {
        Self { len, data: true, zero: false, depth: 1 }
    }

    /// Zeroes by this image's metadata.
    pub const fn zero(len: u64) -> Self {
        Self { len, data: false, zero: true, depth: 1 }
    }

    /// Zeroes because no image has anything.
    pub(crate) const fn unallocated(len: u64) -> Self {
        Self { len, data: false, zero: true, depth: 0 }
    }

    /// Appends it to a list, as a part of the last extent where both are stored in the same way.
    pub fn push_to(self, list: &mut Vec<Self>) {
        match list.last_mut() {
            Some(last) if (Self { len: last.len, ..self }) == *last => last.len += self.len,
            _ if self.len == 0 => {}
            _ => list.push(self),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_neighbours_become_one_and_empty_extents_vanish() {
        let mut list = Vec::new();
        for extent in [
            StatusExtent::data(0),
            StatusExtent::data(5),
            StatusExtent::data(7),
            StatusExtent { depth: 2, ..StatusExtent::data(1) },
            StatusExtent::zero(3),
        ] {
            extent.push_to(&mut list);
        }
        let second = StatusExtent { depth: 2, ..StatusExtent::data(1) };
        assert_eq!(list, [StatusExtent::data(12), second, StatusExtent::zero(3)]);
    }
}
