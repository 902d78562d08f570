//! A small blocking client, for command-line tools and tests. It talks to QEMU as well.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::{Error, json::to_message};

/// The longest message that is read.
const LONGEST: usize = 256 << 20;

/// Events kept for [`Client::wait_event`]; the oldest go first.
const KEPT_EVENTS: usize = 10_000;

/// Why a command was not done.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// There is no one to talk to.
    #[error("cannot connect to the QMP socket {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The connection broke.
    #[error("the QMP connection broke")]
    Io(#[from] io::Error),
    /// The server closed the connection.
    #[error("the QMP server closed the connection")]
    Closed,
    /// Nothing came in time.
    #[error("no answer over QMP within {0:?}")]
    Timeout(Duration),
    /// The server does not speak QMP.
    #[error("not a QMP server: {0}")]
    Protocol(String),
    /// The server refused the command.
    #[error("{0}")]
    Command(Error),
    /// The job failed.
    #[error("job {id}: {error}")]
    Job {
        /// The job.
        id: String,
        /// Its error.
        error: String,
    },
}

/// A negotiated session.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    /// Received, and not yet a whole line.
    received: Vec<u8>,
    /// Bytes of `received` that have no line end in them.
    searched: usize,
    events: VecDeque<Value>,
    greeting: Value,
    next_id: u64,
    timeout: Duration,
}

impl Client {
    /// Connects and negotiates; a command may take a minute.
    ///
    /// # Errors
    /// When no one listens there, or does not greet as a QMP server.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        Self::connect_with(path, Duration::from_secs(60))
    }

    /// As [`Client::connect`], with the longest time that any command may take.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub fn connect_with(path: &Path, timeout: Duration) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path)
            .map_err(|source| ClientError::Connect { path: path.to_owned(), source })?;
        let mut client = Self {
            stream,
            received: Vec::new(),
            searched: 0,
            events: VecDeque::new(),
            greeting: Value::Null,
            next_id: 1,
            timeout,
        };
        let greeting = client.receive(Instant::now() + timeout)?;
        client.greeting = greeting
            .get("QMP")
            .cloned()
            .ok_or_else(|| ClientError::Protocol(format!("the greeting is {greeting}")))?;
        client.execute("qmp_capabilities", json!({}))?;
        Ok(client)
    }

    /// The greeting: `version` and `capabilities`.
    pub fn greeting(&self) -> &Value {
        &self.greeting
    }

    /// Runs a command, and gives what it returns. Events that come before are kept.
    ///
    /// # Errors
    /// The command's own ([`ClientError::Command`]), or the connection's.
    #[allow(clippy::needless_pass_by_value, reason = "callers build the arguments in place")]
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, ClientError> {
        let id = self.next_id;
        self.next_id += 1;
        let request = json!({ "execute": command, "arguments": arguments, "id": id });
        self.send(
            &to_message(&request).map_err(|error| ClientError::Protocol(error.to_string()))?,
        )?;
        let deadline = Instant::now() + self.timeout;
        loop {
            let mut message = self.receive(deadline)?;
            if message.get("event").is_some() {
                self.keep_event(message);
            } else if message.get("id") == Some(&json!(id)) {
                return match message.get_mut("error").map(Value::take) {
                    None => Ok(message.get_mut("return").map(Value::take).unwrap_or_default()),
                    Some(error) => Err(serde_json::from_value(error).map_or_else(
                        |error| ClientError::Protocol(error.to_string()),
                        ClientError::Command,
                    )),
                };
            }
        }
    }

    /// The next event that `wanted` accepts, of those kept and then of those that come within
    /// `timeout`. The others stay.
    ///
    /// # Errors
    /// [`ClientError::Timeout`], or the connection's.
    pub fn wait_event(
        &mut self,
        timeout: Duration,
        mut wanted: impl FnMut(&Value) -> bool,
    ) -> Result<Value, ClientError> {
        if let Some(found) = self.events.iter().position(&mut wanted)
            && let Some(event) = self.events.remove(found)
        {
            return Ok(event);
        }
        let deadline = Instant::now() + timeout;
        loop {
            let message = match self.receive(deadline) {
                Err(ClientError::Timeout(_)) => return Err(ClientError::Timeout(timeout)),
                message => message?,
            };
            if message.get("event").is_none() {
                continue;
            }
            if wanted(&message) {
                return Ok(message);
            }
            self.keep_event(message);
        }
    }

    /// Takes the events that came so far and that no one waited for.
    pub fn take_events(&mut self) -> Vec<Value> {
        self.events.drain(..).collect()
    }

    /// Runs a command that starts a job, waits for the job's end, and dismisses it. `arguments` must
    /// have a `job-id`.
    ///
    /// # Errors
    /// [`ClientError::Job`] when the job failed, or as [`Client::execute`].
    pub fn run_job(
        &mut self,
        command: &str,
        arguments: Value,
        timeout: Duration,
    ) -> Result<(), ClientError> {
        let id = arguments.get("job-id").and_then(Value::as_str).unwrap_or_default().to_owned();
        self.execute(command, arguments)?;
        self.wait_event(timeout, |event| {
            event["event"] == "JOB_STATUS_CHANGE"
                && event["data"]["id"] == id.as_str()
                && event["data"]["status"] == "concluded"
        })?;
        let jobs = self.execute("query-jobs", json!({}))?;
        let job = jobs.as_array().and_then(|jobs| jobs.iter().find(|job| job["id"] == id.as_str()));
        let error = job.and_then(|job| job["error"].as_str()).map(str::to_owned);
        self.execute("job-dismiss", json!({ "id": id }))?;
        match error {
            None => Ok(()),
            Some(error) => Err(ClientError::Job { id, error }),
        }
    }

    fn keep_event(&mut self, event: Value) {
        if self.events.len() == KEPT_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    fn send(&mut self, message: &[u8]) -> Result<(), ClientError> {
        self.stream.set_write_timeout(Some(self.timeout))?;
        match self.stream.write_all(message) {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Err(ClientError::Closed),
            Err(error) if is_timeout(&error) => Err(ClientError::Timeout(self.timeout)),
            result => Ok(result?),
        }
    }

    /// The next message.
    fn receive(&mut self, deadline: Instant) -> Result<Value, ClientError> {
        let start = Instant::now();
        loop {
            let unsearched = self.received.get(self.searched..).unwrap_or_default();
            if let Some(end) = unsearched.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.received.drain(..=self.searched + end).collect();
                self.searched = 0;
                return serde_json::from_slice(&line)
                    .map_err(|error| ClientError::Protocol(error.to_string()));
            }
            self.searched = self.received.len();
            if self.searched > LONGEST {
                return Err(ClientError::Protocol("a message without end".into()));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ClientError::Timeout(deadline.saturating_duration_since(start)));
            }
            self.stream.set_read_timeout(Some(left))?;
            let mut chunk = [0; 16 << 10];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(ClientError::Closed),
                Ok(count) => self.received.extend_from_slice(&chunk[..count]),
                Err(error) if is_timeout(&error) || error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => {
                    return Err(ClientError::Closed);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}
