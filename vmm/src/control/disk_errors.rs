//! Requests of disks that fail on the host: who is told, and whether the machine stops. See
//! `docs/devices.md`.

use devices::virtio::block::{ErrorAction, Failure, IoErrors, IoStatus};
use qmp::schema::{BlockDeviceIoStatus, BlockErrorAction, Event, IoOperationType, RunState};

use super::Controller;

impl Controller {
    /// A request has failed. The event comes before STOP.
    pub(super) fn disk_failed(&mut self, slot: usize, failure: &Failure) {
        let Some(disk) = self.machine.devices().virtio().nth(slot) else { return };
        let errors = disk.errors.as_ref();
        let shown = errors.is_some_and(|errors| errors.policy().shows_status());
        // A machine that was resumed since has tried again.
        let waits = errors.is_some_and(|errors| errors.round() == failure.round);
        let event = Event::BlockIoError {
            qom_path: disk.qom_path.clone(),
            device: String::new(),
            node_name: disk.disk().map(|(node, _)| node.name().to_owned()),
            operation: match failure.write {
                true => IoOperationType::Write,
                false => IoOperationType::Read,
            },
            action: match failure.action {
                ErrorAction::Report => BlockErrorAction::Report,
                ErrorAction::Ignore => BlockErrorAction::Ignore,
                ErrorAction::Stop => BlockErrorAction::Stop,
            },
            nospace: shown.then_some(failure.no_space),
            reason: failure.reason.clone(),
        };
        self.emit(&event);
        if failure.action == ErrorAction::Stop && waits {
            self.stop_for_error();
        }
    }

    /// Stops the guest until `cont`, also one that a job keeps stopped for a while.
    fn stop_for_error(&mut self) {
        match &mut self.hold {
            Some(hold) => hold.fail(),
            None => self.stop_in(RunState::IoError),
        }
    }
}

/// For query-block; `None` where no error stops the machine.
pub(super) fn io_status(errors: &IoErrors) -> Option<BlockDeviceIoStatus> {
    errors.policy().shows_status().then(|| match errors.status() {
        IoStatus::Ok => BlockDeviceIoStatus::Ok,
        IoStatus::Failed => BlockDeviceIoStatus::Failed,
        IoStatus::NoSpace => BlockDeviceIoStatus::Nospace,
    })
}
