//! The one queue to the monitors' thread, and the handles that fill it.

use std::io;
use std::sync::{Arc, mpsc};

use serde::Serialize;
use serde_json::Value;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::socket::Listener;
use super::stream::Stream;
use super::{MonitorId, limit};
use crate::schema::Event;
use crate::{Error, wire};

/// What the monitors' thread is told.
#[derive(Debug)]
pub(super) enum Output {
    /// To one client, which may then send its next command.
    Reply {
        /// The client.
        monitor: MonitorId,
        /// The answer.
        message: Vec<u8>,
        /// The command was out of band.
        oob: bool,
    },
    /// To every negotiated client.
    Event {
        /// The event.
        message: Vec<u8>,
        /// What it is limited by: see [`super::limit`].
        limit: Option<String>,
    },
    /// Serve this socket too, and the client that is already there.
    Listen {
        /// The socket.
        listener: Listener,
        /// The client.
        first: Option<Stream>,
        /// Its number in [`super::chardevs`].
        chardev: usize,
    },
    /// Serve this client, of the character device of that number.
    Serve(Stream, usize),
    /// Flush, close and end.
    Shutdown,
}

/// The sending end of the queue.
#[derive(Debug, Clone)]
pub(super) struct Outbox {
    queue: mpsc::Sender<Output>,
    wake: Arc<EventFd>,
}

/// The receiving end.
#[derive(Debug)]
pub(super) struct Outputs {
    queue: mpsc::Receiver<Output>,
    wake: Arc<EventFd>,
}

impl Outbox {
    pub(super) fn new() -> io::Result<(Self, Outputs)> {
        let (sender, receiver) = mpsc::channel();
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        Ok((Self { queue: sender, wake: wake.clone() }, Outputs { queue: receiver, wake }))
    }

    /// After the shutdown there is no one to tell anything: then this does nothing.
    pub(super) fn send(&self, output: Output) {
        if self.queue.send(output).is_ok()
            && let Err(error) = self.wake.write(1)
        {
            // Only a counter at its maximum refuses, and then the thread is awake anyway.
            tracing::debug!(%error, "the QMP thread was already woken");
        }
    }
}

impl Outputs {
    pub(super) fn event(&self) -> &EventFd {
        &self.wake
    }

    /// Resets the event. Before the queue is emptied, not after.
    pub(super) fn acknowledge(&self) {
        // Nothing to read is no error here.
        let _ = self.wake.read();
    }

    pub(super) fn next(&self) -> Option<Output> {
        self.queue.try_recv().ok()
    }
}

/// Tells events to every negotiated monitor. For any thread; never blocks.
#[derive(Debug, Clone)]
pub struct Events {
    outbox: Outbox,
}

impl Events {
    pub(super) fn new(outbox: Outbox) -> Self {
        Self { outbox }
    }

    /// Tells that `event` happened now.
    pub fn emit(&self, event: &Event) {
        let output = Output::Event { message: wire::event(event), limit: limit::key(event) };
        self.outbox.send(output);
    }
}

/// Answers one command, from any thread. Dropped unused, it answers with an error.
#[derive(Debug)]
pub struct Reply {
    outbox: Outbox,
    monitor: MonitorId,
    id: Option<Value>,
    command: &'static str,
    oob: bool,
    sent: bool,
}

impl Reply {
    pub(super) fn new(
        outbox: Outbox,
        monitor: MonitorId,
        id: Option<Value>,
        command: &'static str,
        oob: bool,
    ) -> Self {
        Self { outbox, monitor, id, command, oob, sent: false }
    }

    /// The command was done; it returns nothing, which is `{}`.
    pub fn done(self) {
        self.send(Ok(Value::Object(serde_json::Map::new())));
    }

    /// The command was done, and returns this.
    pub fn value(self, value: &impl Serialize) {
        let result = serde_json::to_value(value).map_err(|error| {
            Error::generic(format!("The result of {} cannot be sent: {error}", self.command))
        });
        self.send(result);
    }

    /// The command failed.
    pub fn error(self, error: Error) {
        self.send(Err(error));
    }

    /// The command's outcome.
    #[allow(clippy::needless_pass_by_value, reason = "what handlers return is passed on as it is")]
    pub fn send(mut self, result: Result<Value, Error>) {
        self.respond(&result);
    }

    fn respond(&mut self, result: &Result<Value, Error>) {
        self.sent = true;
        let message = wire::response(self.id.as_ref(), result);
        let (monitor, oob) = (self.monitor, self.oob);
        self.outbox.send(Output::Reply { monitor, message, oob });
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if !self.sent {
            let text = format!("The command {} was given up without a result", self.command);
            self.respond(&Err(Error::generic(text)));
        }
    }
}
