//! What clients ask at their start, and the old way to ask: lines for people.

use super::macros::objects;
use super::types::SysEmuTarget;

objects! {
    /// Arguments of `human-monitor-command`.
    HumanMonitorArguments {
        /// The line.
        "command-line" command_line: String,
        /// The vCPU that it is about; no line here is about one.
        "cpu-index" cpu_index: Option<i64>,
    }

    /// From `query-target`.
    TargetInfo {
        /// The architecture of the guest.
        "arch" arch: SysEmuTarget,
    }
}
