//! The main thread without a machine (`--machine none`): a storage daemon.
//!
//! It is a type of its own and not a controller whose machine may be missing: there is no run state,
//! no console, nothing that could be asked of a guest. As with qemu-storage-daemon the commands
//! about a machine do not exist: [`WITHOUT`].

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use qmp::schema::Command;
use serde_json::json;

use super::block_stats::of_nodes;
use super::{Error, watch};
use crate::blocks::jobs::{self, is_job_command};
use crate::blocks::worker::Worker;
use crate::blocks::{Answer, Blocks, is_block_command};
use crate::early::Early;

/// The commands that need a machine.
pub const WITHOUT: &[&str] = &[
    "query-status",
    "query-name",
    "query-uuid",
    "query-vm-generation-id",
    "query-kvm",
    "query-cpus-fast",
    "stop",
    "cont",
    "system_reset",
    "system_powerdown",
    "query-target",
    "query-machines",
    "query-cpu-definitions",
    "query-iothreads",
    "block_set_io_throttle",
    "human-monitor-command",
    "x-query-load",
    "x-query-checkpoint-stats",
    "snapshot-save",
    "snapshot-load",
    "snapshot-delete",
    "migrate",
    "migrate-incoming",
    "migrate_cancel",
    "query-migrate",
    "migrate-set-capabilities",
    "query-migrate-capabilities",
    "migrate-set-parameters",
    "query-migrate-parameters",
];

/// The main thread's state.
pub struct Daemon {
    blocks: Arc<Blocks>,
    worker: Worker,
    server: qmp::Server,
    requests: qmp::Requests,
    /// Readable after a signal that ends the program.
    signals: UnixStream,
    ending: bool,
}

impl Daemon {
    /// Takes over nodes and monitors.
    ///
    /// # Errors
    /// Signals cannot be received, or the host has no thread to give.
    pub fn new(
        blocks: Arc<Blocks>,
        server: qmp::Server,
        requests: qmp::Requests,
        early: Early,
    ) -> Result<Self, Error> {
        let signals = early.end().map_err(Error::Signals)?;
        let worker = Worker::start(Arc::clone(&blocks)).map_err(Error::Worker)?;
        Ok(Self { blocks, worker, server, requests, signals, ending: false })
    }

    /// Serves until `quit` or a signal, then ends all exports and closes all images.
    ///
    /// # Errors
    /// The event loop fails, or an image cannot be written at the end.
    pub fn run(self) -> Result<(), Error> {
        let mut manager = EventManager::new()?;
        let id = manager.add_subscriber(self);
        while !manager.subscriber_mut(id)?.ending {
            manager.run()?;
        }
        manager.remove_subscriber(id)?.finish()
    }

    fn finish(mut self) -> Result<(), Error> {
        self.worker.finish();
        // The monitors go last: they hear of jobs that end, and BLOCK_EXPORT_DELETED.
        self.blocks.jobs().finish();
        let closed = self.blocks.close();
        self.server.shutdown();
        Ok(closed?)
    }

    fn command(&mut self, request: qmp::Request) {
        if is_block_command(&request.command) {
            return self.worker.run(request);
        }
        if is_job_command(&request.command) {
            return jobs::run(self.blocks.jobs(), request);
        }
        request.reply.send(self.execute(&request.command));
    }

    fn execute(&mut self, command: &Command) -> Answer {
        match command {
            // There are no devices.
            Command::QueryBlock => Ok(json!([])),
            Command::QueryBlockStats(arguments) => match arguments.query_nodes {
                Some(true) => Ok(json!(of_nodes(self.blocks.graph()))),
                _ => Ok(json!([])),
            },
            Command::QueryChardev => Ok(json!(self.server.chardevs())),
            Command::Quit => {
                self.ending = true;
                Ok(json!({}))
            }
            other => Err(qmp::Error::command_not_found(other.name())),
        }
    }
}

impl MutEventSubscriber for Daemon {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, self.requests.event().as_raw_fd());
        watch(ops, self.signals.as_raw_fd());
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        if events.fd() == self.signals.as_raw_fd() {
            self.ending = true;
            return;
        }
        for request in self.requests.take() {
            self.command(request);
        }
    }
}
