//! A command at the other end of a pipe.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::event::PollFlags;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use super::wait::Stopper;

/// A running command, with all that it starts: it is killed and waited for when dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    ended: Option<ExitStatus>,
}

impl Running {
    /// Starts a program, which gets a group of its own: what it starts can be ended with it.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(args: &[String], stdin: Stdio, stdout: Stdio) -> io::Result<Self> {
        let [program, args @ ..] = args else { return Err(io::ErrorKind::InvalidInput.into()) };
        let mut command = Command::new(program);
        command.args(args).stdin(stdin).stdout(stdout).process_group(0);
        Ok(Self { child: command.spawn()?, ended: None })
    }

    /// Its ends of the pipes.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Waits for its end, which must be a good one.
    ///
    /// # Errors
    /// It was told to stop, or the command fails.
    pub fn finish(&mut self, stopper: &Stopper) -> Result<(), String> {
        let told = |error: &dyn std::fmt::Display| format!("waiting for the command: {error}");
        let pid = self.pid().ok_or("the command has no process")?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|e| told(&e))?;
        stopper.wait(&pidfd, PollFlags::IN).map_err(|e| told(&e))?;
        let status = self.child.wait().map_err(|e| told(&e))?;
        self.ended = Some(status);
        if status.success() { Ok(()) } else { Err(describe(status)) }
    }

    /// Ends it; if it had ended badly by itself, in which way.
    pub fn end(&mut self) -> Option<String> {
        use std::os::unix::process::ExitStatusExt;
        if self.ended.is_none() {
            if let Some(pid) = self.pid() {
                // It may have ended already.
                let _ = kill_process_group(pid, Signal::KILL);
            }
            self.ended = self.child.wait().ok();
        }
        let status = self.ended?;
        let killed = status.signal() == Some(Signal::KILL.as_raw());
        (!status.success() && !killed).then(|| describe(status))
    }

    fn pid(&self) -> Option<Pid> {
        Pid::from_raw(i32::try_from(self.child.id()).ok()?)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
    }
}

fn describe(status: ExitStatus) -> String {
    format!("the command ended with {status}")
}
