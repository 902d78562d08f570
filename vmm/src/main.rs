//! The `tardigrade` binary.

fn main() {}
