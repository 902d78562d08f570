//! The one buffer for disk and file data. It is large, so it lives outside the stack, and it is
//! never freed, so that its pages are touched for the first time only once.

/// Data moves in pieces of this many bytes: large, because each system call and each interrupt
/// costs far more than the bytes.
pub const SIZE: usize = 256 << 10;

/// A buffer that O_DIRECT accepts: aligned to a page.
#[repr(C, align(4096))]
pub struct Buffer([u8; SIZE]);

impl Buffer {
    /// A zeroed buffer.
    pub const fn new() -> Self {
        Self([0; SIZE])
    }

    /// Its first `length` bytes, at most all.
    pub fn first(&mut self, length: u64) -> &mut [u8] {
        &mut self.0[..length.min(SIZE as u64) as usize]
    }
}
