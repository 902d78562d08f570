//! A listening server: its exports and its clients.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFlags, eventfd};

use crate::graph::is_well_formed;
use crate::{Error, Result};

use super::connection;
use super::export::{Export, ExportInfo, ExportOptions, OnGone};
use super::negotiate::{Exports, Offered};
use super::socket::{self, Address, Listener, Socket};

/// QMP's `NbdServerOptions`, as far as they are not about TLS, which is refused.
#[derive(Debug, Clone, Copy)]
pub struct ServerOptions {
    /// Clients at the same time; others wait. 0 is no limit. With 1, clients are not told that they
    /// may connect several times.
    pub max_connections: u32,
    /// How long a handshake may take; zero is no limit.
    pub handshake_max: Duration,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self { max_connections: 100, handshake_max: Duration::from_secs(10) }
    }
}

/// QMP's `BlockExportRemoveMode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RemoveMode {
    /// Fail if there are clients.
    #[default]
    Safe,
    /// End the sessions of its clients. Requests under way are completed.
    Hard,
}

/// A server; dropping it stops it.
pub struct Server {
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
    address: Address,
}

/// What the server's threads share.
pub(super) struct Shared {
    options: ServerOptions,
    state: Mutex<State>,
    /// Signalled when a connection ended.
    ended: Condvar,
    /// Wakes the accepting thread.
    wake: OwnedFd,
    on_gone: OnGone,
}

#[derive(Default)]
struct State {
    /// Newest last.
    exports: Vec<Arc<Export>>,
    /// Removed, but a client may still use them; with their ids. Handles are never dropped under the
    /// lock: the last one tells of the export's end.
    closing: Vec<(String, Weak<Export>)>,
    clients: Vec<Client>,
    next_client: u64,
    stopping: bool,
}

struct Client {
    number: u64,
    socket: Arc<Socket>,
    /// Id of the export it uses.
    export: Option<String>,
}

impl Server {
    /// Listens. `on_gone` is called with the id of each export when the use of its node has ended, on
    /// whatever thread ended it: also from within [`Server::remove_export`] and [`Server::stop`], so
    /// it must not wait for their caller.
    ///
    /// # Errors
    /// If the address cannot be listened on, or the host gives no thread.
    pub fn start(
        address: &Address,
        options: ServerOptions,
        on_gone: impl Fn(&str) + Send + Sync + 'static,
    ) -> Result<Self> {
        let failed = |source| Error::Io {
            operation: "start of the NBD server",
            filename: format!("{address:?}"),
            offset: 0,
            source,
        };
        let listener = Listener::bind(address)?;
        let address = listener.address().clone();
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| failed(e.into()))?;
        let shared = Arc::new(Shared {
            options,
            state: Mutex::default(),
            ended: Condvar::new(),
            wake,
            on_gone: Arc::new(on_gone),
        });
        let accepting = {
            let shared = shared.clone();
            thread::Builder::new()
                .name("nbd-accept".to_owned())
                .spawn(move || accept_clients(&shared, &listener))
                .map_err(failed)?
        };
        Ok(Self { shared, accepting: Some(accepting), address })
    }

    /// Where it listens; a TCP port of 0 is the real one here.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Offers a node.
    ///
    /// # Errors
    /// If id or name are taken or too long, or a writable export is of a read-only node.
    pub fn add_export(&self, options: ExportOptions) -> Result<()> {
        let multi_conn = self.shared.options.max_connections != 1;
        if !is_well_formed(&options.id) {
            return Err(Error::Invalid("Invalid block export id".to_owned()));
        }
        let mut state = self.shared.state();
        let id = &options.id;
        if state.is_closing(id) || state.exports.iter().any(|export| export.id == *id) {
            let text = format!("Block export id '{}' is already in use", options.id);
            return Err(Error::Invalid(text));
        }
        if state.exports.iter().any(|export| export.name() == options.name) {
            let text = format!("NBD server already has export named '{}'", options.name);
            return Err(Error::Invalid(text));
        }
        let export = Export::new(options, multi_conn, self.shared.on_gone.clone())?;
        state.exports.push(Arc::new(export));
        Ok(())
    }

    /// Takes an export away. Its node is in use until the last client has gone: at once with
    /// [`RemoveMode::Safe`].
    ///
    /// # Errors
    /// If there is no such export, or it has clients and the mode is safe.
    pub fn remove_export(&self, id: &str, mode: RemoveMode) -> Result<()> {
        let mut state = self.shared.state();
        let Some(at) = state.exports.iter().position(|export| export.id == id) else {
            if state.is_closing(id) {
                return Err(Error::Invalid(format!("Export '{id}' is already shutting down")));
            }
            return Err(Error::Invalid(format!("Export '{id}' is not found")));
        };
        if mode == RemoveMode::Safe && state.clients_of(id).next().is_some() {
            return Err(Error::Invalid(format!("export '{id}' still in use")));
        }
        let export = state.exports.remove(at);
        state.close(&export);
        drop(state);
        drop(export);
        Ok(())
    }

    /// All exports, newest first, also those that wait for their last client to go.
    pub fn list(&self) -> Vec<ExportInfo> {
        let all: Vec<_> = {
            let state = self.shared.state();
            let closing = state.closing.iter().filter_map(|(_, export)| export.upgrade());
            closing.chain(state.exports.iter().cloned()).collect()
        };
        all.iter().rev().map(|export| export.info()).collect()
    }

    /// Stops listening, removes all exports, and waits until all sessions have ended.
    pub fn stop(&mut self) {
        let exports = {
            let mut state = self.shared.state();
            state.stopping = true;
            for export in &state.exports {
                export.close();
            }
            state.clients.iter().for_each(|client| client.socket.shutdown());
            std::mem::take(&mut state.exports)
        };
        // The newest goes first, as in QEMU.
        exports.into_iter().rev().for_each(drop);
        self.shared.wake_acceptor();
        if let Some(accepting) = self.accepting.take()
            && accepting.join().is_err()
        {
            tracing::error!("the NBD server's accepting thread panicked");
        }
        let mut state = self.shared.state();
        while !state.clients.is_empty() {
            state = self.shared.ended.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

impl State {
    /// Whether an export was removed and still uses its node.
    fn is_closing(&self, id: &str) -> bool {
        self.closing.iter().any(|(of, export)| of == id && export.strong_count() > 0)
    }

    fn clients_of(&self, id: &str) -> impl Iterator<Item = &Client> {
        self.clients.iter().filter(move |client| client.export.as_deref() == Some(id))
    }

    /// Ends the sessions of a removed export.
    fn close(&mut self, export: &Arc<Export>) {
        export.close();
        self.clients_of(&export.id).for_each(|client| client.socket.shutdown());
        self.closing.retain(|(_, export)| export.strong_count() > 0);
        self.closing.push((export.id.clone(), Arc::downgrade(export)));
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake_acceptor(&self) {
        // The counter can only be full if the thread is about to wake.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Room for another client.
    fn has_room(&self) -> bool {
        let most = self.options.max_connections as usize;
        most == 0 || self.state().clients.len() < most
    }

    /// Enters a client; `None` once the server stops.
    fn enter(self: &Arc<Self>, socket: &Arc<Socket>) -> Option<Entered> {
        let mut state = self.state();
        if state.stopping {
            return None;
        }
        let number = state.next_client;
        state.next_client += 1;
        state.clients.push(Client { number, socket: socket.clone(), export: None });
        Some(Entered { shared: self.clone(), number })
    }
}

/// A client's place among the clients; given up when dropped.
struct Entered {
    shared: Arc<Shared>,
    number: u64,
}

impl Entered {
    /// Notes the export that the client uses; says whether it may.
    fn chose(&self, export: &Arc<Export>) -> bool {
        let mut state = self.shared.state();
        if state.stopping || export.is_closing() {
            return false;
        }
        if let Some(client) = state.clients.iter_mut().find(|c| c.number == self.number) {
            client.export = Some(export.id.clone());
        }
        true
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        state.clients.retain(|client| client.number != self.number);
        drop(state);
        self.shared.ended.notify_all();
        self.shared.wake_acceptor();
    }
}

impl Exports for Shared {
    type Export = Arc<Export>;

    fn list(&self) -> Vec<Arc<Export>> {
        self.state().exports.clone()
    }

    fn find(&self, name: &[u8]) -> Option<Arc<Export>> {
        self.state().exports.iter().find(|export| export.name().as_bytes() == name).cloned()
    }
}

/// The accepting thread.
fn accept_clients(shared: &Arc<Shared>, listener: &Listener) {
    let mut failures = 0;
    while !shared.state().stopping {
        let mut fds = vec![(shared.wake.as_fd(), PollFlags::IN)];
        if shared.has_room() {
            fds.push((listener.as_fd(), PollFlags::IN));
        }
        if let Err(e) = socket::wait(&fds, None) {
            return tracing::error!("the NBD server cannot wait for clients: {e}");
        }
        let mut count = [0; 8];
        let woken = rustix::io::read(&shared.wake, &mut count).is_ok();
        if woken || !shared.has_room() {
            continue;
        }
        match listener.accept() {
            Ok(None) => {}
            Ok(Some(socket)) => {
                failures = 0;
                begin(shared, Arc::new(socket));
            }
            Err(e) => {
                failures += 1;
                tracing::warn!("an NBD client could not be accepted: {e}");
                // No descriptors are left, say: others must be closed first, and each wakes us.
                let until = Instant::now() + Duration::from_millis(100 * failures.min(10));
                if socket::wait(&[(shared.wake.as_fd(), PollFlags::IN)], Some(until)).is_err() {
                    return;
                }
            }
        }
    }
}

/// Starts a client's thread.
fn begin(shared: &Arc<Shared>, socket: Arc<Socket>) {
    let Some(entered) = shared.enter(&socket) else {
        return;
    };
    let limit = shared.options.handshake_max;
    let deadline = (!limit.is_zero()).then(|| Instant::now() + limit);
    let shared = shared.clone();
    let spawned = thread::Builder::new().name("nbd-client".to_owned()).spawn(move || {
        let result = connection::serve(&shared, &socket, deadline, |export| entered.chose(export));
        if let Err(e) = result {
            tracing::debug!("an NBD session ended: {e}");
        }
        // The export is free before the client counts as gone: the session was dropped above.
        socket.shutdown();
        drop(entered);
    });
    if let Err(e) = spawned {
        tracing::warn!("an NBD client gets no thread: {e}");
    }
}
