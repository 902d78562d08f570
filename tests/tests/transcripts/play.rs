//! Playing a transcript to one program.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use tardigrade_tests::baremetal::virtio::{self, Driver};
use tardigrade_tests::full::Small;

use crate::file::{Access, Step, Transcript, matches};
use crate::programs::{Running, Side, patience};

/// What came back in each step: messages, in order.
pub(crate) type Played = Vec<Vec<Value>>;

/// Plays all steps; gives what came, with `$DIR` for the directory.
pub(crate) fn play(transcript: &Transcript, side: Side) -> Result<Played, String> {
    let dir = tempfile::tempdir().unwrap();
    let _small = match transcript.small {
        None => None,
        Some(bytes) => Some(Small::mount(dir.path().join("small"), bytes).ok_or("cannot mount")?),
    };
    for image in &transcript.images {
        let args: Vec<String> = image.split(' ').map(|arg| own(arg, dir.path())).collect();
        let output = Command::new("qemu-img").args(&args).current_dir(&dir).output();
        let output = output.map_err(|error| format!("qemu-img: {error}"))?;
        if !output.status.success() {
            return Err(format!("qemu-img {image}: {}", String::from_utf8_lossy(&output.stderr)));
        }
    }
    let (program, stream) = Running::start(transcript, side, dir.path())?;
    let mut player = Player::new(program, stream, dir.path());
    if !transcript.greeting {
        player
            .negotiate()
            .map_err(|text| format!("{side:?}: {text}: {}", player.program.stderr()))?;
    }
    let mut played = Vec::new();
    for (index, step) in transcript.play.iter().enumerate() {
        let messages = player.step(transcript, step).map_err(|text| {
            let stderr = player.program.stderr();
            format!("{side:?}, step {index}: {}\n  {text}\n  {stderr}", step.text())
        })?;
        played.push(messages);
    }
    Ok(played)
}

/// Text for one program.
fn own(text: &str, dir: &Path) -> String {
    text.replace("$DIR", dir.to_str().unwrap())
}

struct Player<'a> {
    program: Running,
    stream: BufReader<UnixStream>,
    dir: &'a Path,
    greeted: bool,
    driver: Option<Driver<'static>>,
}

impl<'a> Player<'a> {
    fn new(program: Running, stream: UnixStream, dir: &'a Path) -> Self {
        stream.set_read_timeout(Some(patience())).unwrap();
        let stream = BufReader::new(stream);
        Self { program, stream, dir, greeted: false, driver: None }
    }

    fn negotiate(&mut self) -> Result<(), String> {
        self.message()?;
        self.send(b"{\"execute\": \"qmp_capabilities\"}\n")?;
        self.message().map(|_| ())
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), String> {
        // What cannot be text has no directory in it either.
        let bytes = match std::str::from_utf8(bytes) {
            Ok(text) => own(text, self.dir).into_bytes(),
            Err(_) => bytes.to_vec(),
        };
        self.stream.get_mut().write_all(&bytes).map_err(|error| format!("send: {error}"))
    }

    /// The next message; `None` at the end of the connection.
    fn next(&mut self) -> Result<Option<Value>, String> {
        let mut line = String::new();
        let count = match self.stream.read_line(&mut line) {
            // QEMU ends with input unread.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => 0,
            count => count.map_err(|error| format!("no message: {error}"))?,
        };
        if count == 0 {
            return Ok(None);
        }
        if !line.ends_with("\r\n") {
            return Err(format!("a message without CRLF: {line:?}"));
        }
        let line = line.replace(self.dir.to_str().unwrap(), "$DIR");
        let mut message: Value =
            serde_json::from_str(&line).map_err(|error| format!("{line}: {error}"))?;
        if let Some(members) = message.as_object_mut()
            && let Some(time) = members.remove("timestamp")
            && !(time["seconds"].is_u64() && time["microseconds"].is_u64())
        {
            return Err(format!("a strange timestamp: {time}"));
        }
        if message.get("QMP").is_some() && std::mem::replace(&mut self.greeted, true) {
            // QEMU greets twice whom it finds connected when its monitor begins.
            return self.next();
        }
        Ok(Some(message))
    }

    fn message(&mut self) -> Result<Value, String> {
        self.next()?.ok_or_else(|| "the connection is closed".to_owned())
    }

    fn step(&mut self, transcript: &Transcript, step: &Step) -> Result<Vec<Value>, String> {
        if let Some(run) = &step.run {
            return self.run(run);
        }
        if let Some(access) = step.guest {
            let ended = self.access(access);
            if step.until.is_none() {
                return Ok(ended);
            }
        }
        if let Some(bytes) = step.bytes() {
            self.send(&bytes)?;
        }
        let ignored = |message: &Value| {
            transcript.ignore.iter().any(|ignored| matches(&ignored.event, message))
        };
        let mut came = Vec::new();
        if step.end {
            while let Some(message) = self.next()? {
                came.push(message);
            }
            came.retain(|message| !ignored(message));
            let status = self.program.end()?;
            came.push(json!({ "exit": status.code() }));
            return Ok(came);
        }
        let mut answers = step.answers();
        let mut awaited = step.awaited();
        while answers > 0 || !awaited.is_empty() {
            let message = self.message().map_err(|text| {
                format!("{text}; {answers} answers and {awaited:?} missing after {came:?}")
            })?;
            match message.get("event") {
                Some(_) => awaited = without(awaited, &message),
                None => answers = answers.checked_sub(1).ok_or("an answer that no one wants")?,
            }
            came.push(message);
        }
        came.retain(|message| !ignored(message));
        Ok(came)
    }

    /// What the guest does; its status byte where it ends.
    fn access(&mut self, access: Access) -> Vec<Value> {
        let driver = self.driver.get_or_insert_with(|| {
            let guest = self.program.guest.take().expect("the transcript has a guest");
            // It lives as long as the test.
            let monitor = Box::leak(Box::new(guest));
            let disk = virtio::find(monitor);
            Driver::start_found(monitor, disk)
        });
        match access {
            Access::Read(sector) => driver.begin_transfer(0, sector),
            Access::Write(sector) => driver.begin_transfer(1, sector),
            Access::End => return vec![json!({ "status": driver.end() })],
        }
        Vec::new()
    }

    fn run(&self, words: &[String]) -> Result<Vec<Value>, String> {
        let words: Vec<String> = words.iter().map(|word| own(word, self.dir)).collect();
        let (program, args) = words.split_first().ok_or("nothing to run")?;
        if !program.starts_with("qemu-") && !program.starts_with("nbd") {
            return Err(format!("{program} is no tool for a transcript"));
        }
        let output = Command::new(program).args(args).current_dir(self.dir).output();
        let output = output.map_err(|error| format!("{program}: {error}"))?;
        let text = |bytes: &[u8]| {
            String::from_utf8_lossy(bytes).replace(self.dir.to_str().unwrap(), "$DIR")
        };
        Ok(vec![json!({
            "exit": output.status.code(),
            "stdout": text(&output.stdout),
            "stderr": text(&output.stderr),
        })])
    }
}

/// The patterns without the first one that this event has.
fn without(mut awaited: Vec<Value>, event: &Value) -> Vec<Value> {
    if let Some(at) = awaited.iter().position(|pattern| matches(pattern, event)) {
        awaited.remove(at);
    }
    awaited
}
