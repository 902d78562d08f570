//! The program run to its end, for what people type.

use std::process::{Command, Output};

use crate::vm::binary;

fn run(args: &[&str]) -> Output {
    Command::new(binary()).args(args).output().unwrap()
}

/// What it says on standard output; it must succeed.
pub fn succeed(args: &[&str]) -> String {
    let output = run(args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "tardigrade {args:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

/// What it says on standard error; it must fail with status 1.
pub fn fail(args: &[&str]) -> String {
    let output = run(args);
    assert_eq!(output.status.code(), Some(1), "tardigrade {args:?} did not fail");
    String::from_utf8(output.stderr).unwrap()
}
