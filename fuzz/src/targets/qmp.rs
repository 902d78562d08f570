//! What a client of a monitor sends: to a whole server over a socket, with a machine behind it that
//! answers everything at once.
//!
//! An input that begins with [`STRUCTURED`] is commands of the schema, chosen by its other bytes: right
//! arguments, wrong ones, none. Any other is sent as it is.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::Duration;

use qmp::json::{Limits, Parser};
use qmp::schema::{CommandInfo, Member, Type, VersionInfo, VersionTriple, commands};
use qmp::{Command, Event, Options, Request, Server};
use serde_json::{Map, Value, json};

use super::trace;
use crate::alloc::Limit;

/// The first byte of inputs that choose commands.
pub(crate) const STRUCTURED: u8 = 0;
/// A value within the limits of the parser, and all that a session may hold: a value of many tiny
/// tokens costs a multiple of its text.
const SINGLE: usize = 16 << 20;
const MORE: usize = 192 << 20;
/// Commands of an input at most.
const COMMANDS: usize = 64;

pub(super) fn run(input: &[u8]) {
    let server = server();
    let _limit = Limit::set(SINGLE, MORE);
    match input.split_first() {
        Some((&STRUCTURED, choices)) => structured(server, choices),
        _ => raw(server, input),
    }
}

/// Bytes as they are: whatever they are, all that comes back is messages.
fn raw(server: &Running, input: &[u8]) {
    let answers = server.talk(input);
    assert!(answers.first().is_some_and(|first| first.get("QMP").is_some()), "no greeting");
    for answer in &answers {
        assert!(answer.is_object(), "{answer}");
    }
}

/// Commands: each is answered once, in order.
fn structured(server: &Running, choices: &[u8]) {
    let mut choices = Choices(choices);
    let oob = choices.next().is_multiple_of(2);
    let enable = if oob { json!({ "enable": ["oob"] }) } else { json!({}) };
    let negotiation = json!({ "execute": "qmp_capabilities", "arguments": enable });
    let mut text = negotiation.to_string();
    let all: Vec<&CommandInfo> = commands().collect();
    let mut sent = 0;
    while !choices.0.is_empty() && sent < COMMANDS {
        let info = all[choices.below(all.len())];
        let mut command = json!({ "execute": info.name, "id": sent });
        match choices.below(8) {
            0 => {}
            1 => command["arguments"] = choices.value(&info.arguments_type, 0),
            _ => command["arguments"] = choices.members(info.arguments, 0),
        }
        if choices.below(16) == 0 {
            text.push_str("\n[");
            text.push('\u{1}');
        }
        text.push_str(&command.to_string());
        sent += 1;
    }
    trace(|| text.clone());
    let answers = server.talk(text.as_bytes());
    let answered: Vec<usize> = answers
        .iter()
        .filter_map(|answer| usize::try_from(answer.get("id")?.as_u64()?).ok())
        .collect();
    assert_eq!(answered, (0..sent).collect::<Vec<_>>(), "each command is answered in its turn");
}

/// Bytes that decide.
struct Choices<'a>(&'a [u8]);

impl Choices<'_> {
    fn next(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn below(&mut self, count: usize) -> usize {
        usize::from(self.next()) % count.max(1)
    }

    /// Most of the members, with some that there are not.
    fn members(&mut self, members: &[Member], depth: usize) -> Value {
        let mut object = Map::new();
        for member in members {
            let left_out = if member.optional { 2 } else { 16 };
            if self.below(left_out) != 0 {
                object.insert(member.name.to_owned(), self.value(&member.ty, depth + 1));
            }
        }
        if self.below(16) == 0 {
            object.insert("extra".to_owned(), Value::Null);
        }
        Value::Object(object)
    }

    /// A value of the type, or something else.
    fn value(&mut self, ty: &Type, depth: usize) -> Value {
        if depth > 6 || self.below(16) == 0 {
            let odd =
                [json!(null), json!([]), json!({}), json!(-1), json!("\u{fffd}x"), json!(1e300)];
            return odd[self.below(odd.len())].clone();
        }
        match ty {
            Type::Str => json!(["a", "", "d", "disk0", "#x", "ä\u{1f600}"][self.below(6)]),
            Type::Int => json!([0, 1, -1, i64::MIN, i64::MAX, 512][self.below(6)]),
            Type::Uint32 => json!([0, 1, u32::MAX, 65536][self.below(4)]),
            Type::Uint => json!([0, 1, u64::MAX, 65536][self.below(4)]),
            Type::Number => json!([0.0, -0.5, 1e308][self.below(3)]),
            Type::Bool => json!(self.below(2) == 0),
            Type::Null => Value::Null,
            Type::Any => json!({ "any": [self.next()] }),
            Type::Array(element) => {
                let count = self.below(4);
                (0..count).map(|_| self.value(element, depth + 1)).collect()
            }
            Type::Enum(info) => json!(info.values[self.below(info.values.len())]),
            Type::Object(info) => self.members(info().members, depth),
            Type::Union(info) => {
                let branch = &info.branches[self.below(info.branches.len())];
                let mut value = self.members(branch.members, depth);
                value[info.tag] = json!(branch.value);
                value
            }
            Type::Open(info) => {
                let info = info();
                let branch = &info.branches[self.below(info.branches.len())];
                let mut value = self.members(branch.members, depth);
                value[info.tag] = json!(branch.value);
                value
            }
            Type::Alternate(info) => {
                let choice = &info.choices[self.below(info.choices.len())];
                self.value(choice, depth + 1)
            }
        }
    }
}

/// The server of this process, for all inputs.
struct Running {
    path: PathBuf,
    _directory: tempfile::TempDir,
    _server: Server,
}

fn server() -> &'static Running {
    static SERVER: LazyLock<Running> = LazyLock::new(|| {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("qmp");
        let qemu = VersionTriple { micro: 0, minor: 0, major: 10 };
        let options = Options::new(VersionInfo { qemu, package: "fuzz".to_owned() });
        let (server, requests) = Server::start(options).expect("it can start");
        server.listen(&path).expect("it can listen");
        let events = server.events();
        std::thread::spawn(move || {
            loop {
                if let Some(request) = requests.wait(Duration::from_secs(3600)) {
                    answer(request, &events);
                }
            }
        });
        Running { path, _directory: directory, _server: server }
    });
    &SERVER
}

/// The machine: answers of every kind, some with an event before them.
fn answer(Request { command, reply, .. }: Request, events: &qmp::Events) {
    match command {
        Command::Stop => {
            events.emit(&Event::Stop);
            reply.done();
        }
        // Given up, which is an answer too.
        Command::SystemReset => drop(reply),
        Command::QueryJobs => reply.value(&json!([])),
        Command::JobCancel(_) => reply.error(qmp::Error::job_not_found()),
        _ => reply.done(),
    }
}

/// Sent without a thread of its own: sockets hold that much.
const AT_ONCE: usize = 16 << 10;

impl Running {
    /// Sends everything and ends its side; gives all messages up to the end of the connection.
    fn talk(&self, input: &[u8]) -> Vec<Value> {
        let mut stream = UnixStream::connect(&self.path).expect("the server listens");
        let mut sender = stream.try_clone().expect("descriptors are left");
        let mut send = move || {
            sender.write_all(input).expect("a monitor is not closed for what is sent");
            let _ = sender.shutdown(Shutdown::Write);
        };
        let mut received = Vec::new();
        if input.len() <= AT_ONCE {
            send();
            stream.read_to_end(&mut received).expect("it ends the connection in order");
        } else {
            std::thread::scope(|scope| {
                scope.spawn(send);
                stream.read_to_end(&mut received).expect("it ends the connection in order");
            });
        }
        messages(&received)
    }
}

/// The lines, each of which must be one value in ASCII.
fn messages(mut text: &[u8]) -> Vec<Value> {
    assert!(text.is_ascii(), "not ASCII");
    let mut all = Vec::new();
    while let Some(end) = text.iter().position(|byte| *byte == b'\n') {
        let (line, rest) = text.split_at(end + 1);
        assert!(line.ends_with(b"\r\n"), "a line without CR");
        let mut parser = Parser::new(Limits::default());
        let mut left = line;
        let value = parser.next(&mut left).expect("a whole value").expect("JSON");
        assert!(left.iter().all(u8::is_ascii_whitespace), "more than one value in a line");
        all.push(value);
        text = rest;
    }
    assert!(text.is_empty(), "the last line has no end");
    all
}
