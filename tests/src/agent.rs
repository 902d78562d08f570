//! The guest's agent, asked over the serial port; `docs/guest.md` has the protocol.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long the guest may take to answer. Much longer than it does: hosts may be busy.
const PATIENCE: Duration = Duration::from_secs(300);

/// How long it may take to boot.
const BOOT_PATIENCE: Duration = Duration::from_secs(600);

/// A connection to the agent of one guest.
pub struct Agent {
    stream: UnixStream,
    pending: Vec<u8>,
    /// Everything the guest said, for the message of a failure.
    transcript: String,
    next_token: u32,
}

impl Agent {
    /// Connects to the serial socket.
    pub fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        // Tokens of one process must not be those of another that was saved with the guest.
        let next_token = std::process::id() % 1_000_000 * 100;
        Self { stream, pending: Vec::new(), transcript: String::new(), next_token }
    }

    /// Waits until the guest has booted.
    pub fn wait_ready(&mut self) {
        self.wait_line(BOOT_PATIENCE, |line| line == "agent: ready");
    }

    /// Asks, and gives the fields of the answer. Panics if the guest answers with an error.
    pub fn ask(&mut self, request: &str) -> String {
        match self.try_ask(request) {
            Ok(answer) => answer,
            Err(error) => panic!("the guest answers to '{request}': {error}"),
        }
    }

    /// Asks, and gives the answer or the guest's error.
    pub fn try_ask(&mut self, request: &str) -> Result<String, String> {
        let token = self.send(request);
        self.answer(&token)
    }

    /// Asks without waiting for the answer; gives the token to wait for.
    pub fn send(&mut self, request: &str) -> String {
        self.next_token += 1;
        let token = format!("t{}", self.next_token);
        self.stream.write_all(format!("{token} {request}\n").as_bytes()).unwrap();
        token
    }

    /// Waits for the answer to what was sent.
    pub fn answer(&mut self, token: &str) -> Result<String, String> {
        let is_answer = |line: &str| {
            let rest = line.strip_prefix(token)?.strip_prefix(' ')?;
            let answer = rest.strip_prefix("ok").map(|rest| Ok(rest.trim_start().to_owned()));
            answer.or_else(|| rest.strip_prefix("error ").map(|text| Err(text.to_owned())))
        };
        let line = self.wait_line(PATIENCE, |line| is_answer(line).is_some());
        is_answer(&line).unwrap()
    }

    /// Asks, and gives the answer's `name=value` fields.
    pub fn fields(&mut self, request: &str) -> HashMap<String, String> {
        let answer = self.ask(request);
        let fields = answer.split_whitespace().filter_map(|field| field.split_once('='));
        fields.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    /// One number of the answer's fields.
    pub fn number(&mut self, request: &str, field: &str) -> u64 {
        self.fields(request)[field].parse().unwrap()
    }

    /// What the guest said so far.
    pub fn transcript(&self) -> &str {
        &self.transcript
    }

    fn wait_line(&mut self, patience: Duration, wanted: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + patience;
        loop {
            while let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=end).collect();
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                self.transcript.push_str(&line);
                self.transcript.push('\n');
                if wanted(&line) {
                    return line;
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "the guest is silent; it said:\n{}", self.transcript);
            self.stream.set_read_timeout(Some(left)).unwrap();
            let mut buf = [0; 4096];
            match self.stream.read(&mut buf) {
                Ok(0) => panic!("the guest is gone; it said:\n{}", self.transcript),
                Ok(count) => self.pending.extend_from_slice(&buf[..count]),
                Err(_) => {}
            }
        }
    }
}
