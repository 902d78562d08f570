//! A socket and nothing else.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::{Value, json};
use tardigrade_tests::vm::Vm;

use crate::session::Untyped;

const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) struct Socket {
    stream: BufReader<UnixStream>,
    /// Events that nobody has waited for.
    events: Vec<Value>,
}

impl Socket {
    pub(crate) fn connect(vm: &Vm) -> Self {
        let stream = UnixStream::connect(vm.qmp_path()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut socket = Self { stream: BufReader::new(stream), events: Vec::new() };
        assert!(socket.message()["QMP"]["version"]["qemu"]["major"].is_u64());
        socket.execute("qmp_capabilities", json!({}));
        socket
    }

    fn message(&mut self) -> Value {
        let mut line = String::new();
        self.stream.read_line(&mut line).unwrap();
        assert!(line.ends_with("\r\n"), "{line:?}");
        serde_json::from_str(&line).unwrap()
    }
}

impl Untyped for Socket {
    fn execute(&mut self, command: &str, arguments: Value) -> Value {
        let message = json!({"execute": command, "arguments": arguments, "id": [command, null]});
        self.stream.get_mut().write_all(message.to_string().as_bytes()).unwrap();
        loop {
            let mut message = self.message();
            if message.get("event").is_some() {
                self.events.push(message);
                continue;
            }
            assert_eq!(message["id"], json!([command, null]));
            assert!(message.get("return").is_some(), "{message}");
            return message["return"].take();
        }
    }

    fn wait_status(&mut self, id: &str, status: &str) {
        let data = json!({"id": id, "status": status});
        loop {
            if let Some(at) = self.events.iter().position(|event| event["data"] == data) {
                self.events.drain(..=at);
                return;
            }
            let event = self.message();
            assert!(event.get("event").is_some(), "{event}");
            self.events.push(event);
        }
    }
}
