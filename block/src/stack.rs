//! Recursion down a chain of backing files, which may have any length.

/// What is needed at most from one image of a chain to the next, and what is taken where less is left.
const LEFT: usize = 128 << 10;
const MORE: usize = 1 << 20;

/// Goes one image further down: on another stack if there is little left of this one.
pub(crate) fn deep<T>(step: impl FnOnce() -> T) -> T {
    stacker::maybe_grow(LEFT, MORE, step)
}
