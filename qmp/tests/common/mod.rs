//! A server with a machine behind it that does nothing but answer, and raw connections to it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]
#![allow(dead_code, reason = "each test file uses its part")]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use qmp::schema::{JobStatus, VersionInfo, VersionTriple};
use qmp::{Command, Error, Event, Events, Options, Request, Requests, Server};
use serde_json::{Value, json};

/// Nothing here takes so long, unless it hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn options() -> Options {
    Options::new(VersionInfo {
        qemu: VersionTriple { micro: 2, minor: 0, major: 10 },
        package: "test".into(),
    })
}

/// A server that listens, its requests not yet served.
pub(crate) struct Fixture {
    pub(crate) server: Server,
    pub(crate) directory: tempfile::TempDir,
    pub(crate) events: Events,
}

impl Fixture {
    pub(crate) fn start(options: Options) -> (Self, Requests) {
        let directory = tempfile::tempdir().unwrap();
        let (server, requests) = Server::start(options).unwrap();
        let events = server.events();
        let fixture = Self { server, directory, events };
        fixture.server.listen(&fixture.path()).unwrap();
        (fixture, requests)
    }

    /// With a thread that answers every command as [`answer`] does.
    pub(crate) fn answering(options: Options) -> Self {
        let (fixture, requests) = Self::start(options);
        let events = fixture.events.clone();
        std::thread::spawn(move || {
            while let Some(request) = requests.wait(PATIENCE) {
                answer(request, &events);
            }
        });
        fixture
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.directory.path().join("qmp.sock")
    }

    pub(crate) fn connect(&self) -> Raw {
        Raw::connect(&self.path())
    }

    /// A connection after greeting and negotiation.
    pub(crate) fn negotiated(&self) -> Raw {
        let mut raw = self.connect();
        raw.line();
        raw.negotiate();
        raw
    }
}

/// Enough of a machine to tell one command from the other.
pub(crate) fn answer(request: Request, events: &Events) {
    match request.command {
        Command::Stop => {
            events.emit(&Event::Stop);
            request.reply.done();
        }
        Command::QueryName => request.reply.value(&json!({ "name": "guest" })),
        Command::SystemReset => drop(request.reply),
        Command::JobDismiss(arguments) => {
            let id = arguments.id;
            events.emit(&Event::JobStatusChange { id, status: JobStatus::Null });
            request.reply.done();
        }
        Command::JobCancel(_) => request.reply.error(Error::job_not_found()),
        _ => request.reply.done(),
    }
}

/// A client that sends what it is told to.
pub(crate) struct Raw {
    pub(crate) reader: BufReader<UnixStream>,
}

impl Raw {
    pub(crate) fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self { reader: BufReader::new(stream) }
    }

    pub(crate) fn stream(&self) -> &UnixStream {
        self.reader.get_ref()
    }

    pub(crate) fn send(&mut self, text: impl AsRef<[u8]>) {
        self.stream().write_all(text.as_ref()).unwrap();
    }

    /// The next line, without its CRLF; empty at the end of the connection.
    pub(crate) fn text(&mut self) -> String {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        match line.strip_suffix("\r\n") {
            Some(line) => line.to_owned(),
            None => {
                assert_eq!(line, "", "a line without CRLF");
                line
            }
        }
    }

    pub(crate) fn line(&mut self) -> Value {
        serde_json::from_str(&self.text()).unwrap()
    }

    pub(crate) fn ask(&mut self, text: impl AsRef<[u8]>) -> Value {
        self.send(text);
        self.line()
    }

    /// The error text that comes back.
    pub(crate) fn error(&mut self, text: impl AsRef<[u8]>) -> String {
        let line = self.ask(text);
        line["error"]["desc"].as_str().unwrap_or_else(|| panic!("{line}")).to_owned()
    }

    pub(crate) fn negotiate(&mut self) {
        assert_eq!(self.ask(r#"{"execute":"qmp_capabilities"}"#), json!({ "return": {} }));
    }

    pub(crate) fn assert_end(&mut self) {
        let mut rest = Vec::new();
        self.reader.read_to_end(&mut rest).unwrap();
        assert_eq!(String::from_utf8_lossy(&rest), "");
    }
}

/// Runs `work` on its own thread; a hang is a failure, not a stuck test.
pub(crate) fn within_patience<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || sender.send(work()));
    receiver.recv_timeout(PATIENCE).expect("it hangs, or has panicked")
}
