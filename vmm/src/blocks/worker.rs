//! The thread that carries out block commands, one after another.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use super::Blocks;

/// The thread; dropping it waits for the command it is at.
pub struct Worker {
    requests: Option<Sender<qmp::Request>>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts the thread.
    ///
    /// # Errors
    /// The host has no thread to give.
    pub fn start(blocks: Arc<Blocks>) -> io::Result<Self> {
        let (sender, requests) = channel::<qmp::Request>();
        let thread = std::thread::Builder::new().name("block".to_owned()).spawn(move || {
            for request in requests {
                request.reply.send(blocks.execute(request.command));
            }
        })?;
        Ok(Self { requests: Some(sender), thread: Some(thread) })
    }

    /// Has a block command carried out and answered. One that comes after the end is answered with
    /// an error by its [`qmp::Reply`].
    pub fn run(&self, request: qmp::Request) {
        if let Some(requests) = &self.requests {
            // The thread ends only with this sender.
            let _ = requests.send(request);
        }
    }

    /// Ends the thread after what it was given.
    pub fn finish(&mut self) {
        self.requests = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the block thread has panicked");
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.finish();
    }
}
