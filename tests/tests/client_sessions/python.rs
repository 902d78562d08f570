//! qemu.qmp: its library, driven by `python/client.py`, and its qmp-shell, driven by its prompt.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tardigrade_tests::process::poll;
use tardigrade_tests::repo;
use tardigrade_tests::vm::Vm;

use crate::session::Untyped;

const PATIENCE: Duration = Duration::from_secs(120);

/// A process that is told lines and answers with lines.
struct Program {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Program {
    fn start(command: &mut Command) -> Self {
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.env("PYTHONDONTWRITEBYTECODE", "1").spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self { input: child.stdin.take(), output, child }
    }

    fn tell(&mut self, line: &str) {
        writeln!(self.input.as_mut().unwrap(), "{line}").unwrap();
    }

    fn line(&mut self) -> String {
        let fd = self.output.get_ref().as_raw_fd();
        if self.output.buffer().is_empty() {
            assert!(poll(&[fd], Instant::now() + PATIENCE).is_some(), "the program is silent");
        }
        let mut line = String::new();
        assert_ne!(self.output.read_line(&mut line).unwrap(), 0, "the program has ended");
        line
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It ends with its input.
        self.input = None;
        let _ = self.child.wait();
    }
}

/// The library.
pub(crate) struct Library(Program);

impl Library {
    pub(crate) fn start(python: &Path, vm: &Vm) -> Self {
        let script = repo("tests/python/client.py");
        Self(Program::start(Command::new(python).arg(script).arg(vm.qmp_path())))
    }

    fn ask(&mut self, what: &Value) -> Value {
        self.0.tell(&what.to_string());
        serde_json::from_str(&self.0.line()).unwrap()
    }
}

impl Untyped for Library {
    fn execute(&mut self, command: &str, arguments: Value) -> Value {
        let mut answer = self.ask(&json!({"execute": command, "arguments": arguments}));
        assert!(answer.get("return").is_some(), "{command}: {answer}");
        answer["return"].take()
    }

    fn wait_status(&mut self, id: &str, status: &str) {
        let data = json!({"id": id, "status": status});
        let event = self.ask(&json!({"wait": data}));
        assert_eq!(event["data"], data);
    }
}

/// The shell.
pub(crate) struct Shell(Program);

impl Shell {
    pub(crate) fn start(python: &Path, vm: &Vm, dir: &Path) -> Self {
        let mut command = Command::new(python);
        command.args(["-u", "-m", "qemu.qmp.qmp_shell"]).arg(vm.qmp_path());
        // Where it keeps what was typed.
        Self(Program::start(command.env("HOME", dir)))
    }

    /// The next message that it prints, behind its prompts. What it says in greeting is none.
    fn message(&mut self) -> Value {
        loop {
            let line = self.0.line();
            if let Some(at) = line.find('{') {
                return serde_json::from_str(&line[at..]).unwrap();
            }
        }
    }

    fn answer(&mut self, what: &str) -> Value {
        let mut message = self.message();
        assert!(message.get("return").is_some(), "{what}: {message}");
        message["return"].take()
    }
}

/// A command or an action as one types it: values without spaces.
fn typed(name: &str, arguments: &Value) -> String {
    let value = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let arguments = arguments.as_object().unwrap().iter();
    let words = arguments.map(|(name, argument)| format!(" {name}={}", value(argument)));
    format!("{name}{}", words.collect::<String>())
}

impl Untyped for Shell {
    fn execute(&mut self, command: &str, arguments: Value) -> Value {
        let line = typed(command, &arguments);
        self.0.tell(&line);
        self.answer(&line)
    }

    fn transaction(&mut self, actions: &[(&str, Value)]) {
        self.0.tell("transaction(");
        actions.iter().for_each(|(name, data)| self.0.tell(&typed(name, data)));
        self.0.tell(")");
        self.answer("transaction");
    }

    /// It tells events only when it is asked, and whoever types looks at the jobs.
    fn wait_status(&mut self, id: &str, status: &str) {
        loop {
            let jobs = self.execute("query-jobs", json!({}));
            let found = jobs.as_array().unwrap().iter().find(|job| job["id"] == id);
            if found.map_or(status == "null", |job| job["status"] == status) {
                return;
            }
        }
    }
}
