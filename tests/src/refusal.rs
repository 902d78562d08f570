//! Command lines that the program must refuse.

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::process::wait_for_end;
use crate::vm::binary;

/// How long a refusal may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs the program, which must end with exit status 1; gives what it says on stderr.
pub fn fails(args: &[&str]) -> String {
    let mut child = Command::new(binary())
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let ended = wait_for_end(&child, PATIENCE);
    if !ended {
        child.kill().unwrap();
    }
    let status = child.wait().unwrap();
    let mut stderr = String::new();
    child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert!(ended, "{args:?}: not refused: {stderr}");
    assert_eq!(status.code(), Some(1), "{args:?}: {status}: {stderr}");
    stderr
}
