//! `human-monitor-command`: the lines for people that older tools send. `docs/monitor.md` has them.
//!
//! The texts are QEMU's. What is wrong with a line is told as its output, never as a QMP error.

pub(crate) mod qemu_io;
mod show;
mod snapshots;
mod words;

use qmp::schema::{HumanMonitorArguments, RunState, ShutdownCause};

use super::Controller;
use crate::version;
use words::Line;

/// A command: its names, as QEMU's errors give them, and how many words it takes.
struct Spec {
    names: &'static str,
    least: usize,
    most: usize,
}

const fn spec(names: &'static str, least: usize, most: usize) -> Spec {
    Spec { names, least, most }
}

const COMMANDS: &[Spec] = &[
    spec("cont|c", 0, 0),
    spec("delvm", 1, 1),
    spec("loadvm", 1, 1),
    spec("quit|q", 0, 0),
    spec("savevm", 0, 1),
    spec("stop|s", 0, 0),
    spec("system_powerdown", 0, 0),
    spec("system_reset", 0, 0),
];

const INFO: &[Spec] = &[
    spec("block", 0, 2),
    spec("cpus", 0, 0),
    spec("kvm", 0, 0),
    spec("name", 0, 0),
    spec("snapshots", 0, 0),
    spec("status", 0, 0),
    spec("uuid", 0, 0),
    spec("version", 0, 0),
];

impl Controller {
    /// Runs a line and answers with its output, perhaps later.
    pub(super) fn monitor_command(
        &mut self,
        arguments: &HumanMonitorArguments,
        request: qmp::Request,
    ) {
        if let Some(index) = arguments.cpu_index {
            let vcpus = self.machine.vcpus().len();
            if usize::try_from(index).map_or(true, |index| index >= vcpus) {
                let error = qmp::Error::out_of_range("cpu-index", "a CPU number");
                return request.reply.error(error);
            }
        }
        let line = Line::parse(&arguments.command_line);
        if line.command == "qemu-io" {
            // It reads and writes: the block thread's.
            return self.worker.run(request);
        }
        if let Some(refusal) = refusal(&line) {
            return request.reply.value(&refusal);
        }
        let first = line.words.first().map(String::as_str);
        let text = match (line.command.as_str(), first) {
            ("", _) => String::new(),
            ("savevm", tag) => return self.savevm(tag, request.reply),
            ("loadvm", Some(tag)) => return self.loadvm(tag, request.reply),
            ("delvm", Some(tag)) => return self.delvm(tag, request.reply),
            ("stop" | "s", _) => {
                self.stop();
                String::new()
            }
            ("cont" | "c", _) => output(self.cont()),
            ("system_reset", _) => output(self.system_reset()),
            ("system_powerdown", _) => output(self.system_powerdown()),
            ("quit" | "q", _) => {
                self.shutdown(false, ShutdownCause::HostQmpQuit);
                String::new()
            }
            ("info", Some(what)) => self.info(what, &line.words[1..]),
            _ => unknown(&line.command),
        };
        request.reply.value(&text.replace('\n', "\r\n"));
    }

    fn info(&self, what: &str, words: &[String]) -> String {
        match what {
            "block" => self.info_block(words),
            "snapshots" => self.info_snapshots(),
            "cpus" => {
                let vcpus = self.machine.vcpus().iter().enumerate();
                vcpus.fold(String::new(), |out, (index, vcpu)| {
                    let mark = if index == 0 { '*' } else { ' ' };
                    out + &format!("{mark} CPU #{index}: thread_id={}\n", vcpu.thread_id())
                })
            }
            "kvm" => "kvm support: enabled\n".to_owned(),
            "name" => {
                self.machine.spec().name.as_ref().map_or(String::new(), |name| format!("{name}\n"))
            }
            "status" => self.info_status(),
            "uuid" => format!("{}\n", self.machine.spec().uuid.hyphenated()),
            "version" => {
                let version = version::qmp_version();
                let qemu = version.qemu;
                format!("{}.{}.{}{}\n", qemu.major, qemu.minor, qemu.micro, version.package)
            }
            _ => unknown(&format!("info {what}")),
        }
    }

    fn info_status(&self) -> String {
        let running = if self.state == RunState::Running { "running" } else { "paused" };
        match self.state {
            RunState::Running | RunState::Paused => format!("VM status: {running}\n"),
            state => format!("VM status: {running} ({state})\n"),
        }
    }
}

/// What is wrong with a line, if its command is known and its words are too few or too many.
fn refusal(line: &Line) -> Option<String> {
    let (specs, name, words) = match line.command.as_str() {
        "info" => match line.words.split_first() {
            Some((what, rest)) => (INFO, what.as_str(), rest),
            None => return Some(help()),
        },
        command => (COMMANDS, command, &line.words[..]),
    };
    let spec = specs.iter().find(|spec| spec.names.split('|').any(|own| own == name))?;
    let wrong = if line.unterminated || words.len() < spec.least {
        "string expected"
    } else if words.len() > spec.most {
        "extraneous characters at the end of line"
    } else {
        return None;
    };
    let typed = if specs.as_ptr() == INFO.as_ptr() { format!("info {name}") } else { name.into() };
    Some(misuse(spec.names, wrong, &typed))
}

fn misuse(names: &str, wrong: &str, typed: &str) -> String {
    format!("{names}: {wrong}\r\nTry \"help {typed}\" for more information\r\n")
}

fn help() -> String {
    INFO.iter().map(|spec| format!("info {}\r\n", spec.names)).collect()
}

fn unknown(command: &str) -> String {
    format!("unknown command: '{command}'\n")
}

fn output(result: Result<(), qmp::Error>) -> String {
    result.map_or_else(|error| format!("Error: {}\n", error.desc), |()| String::new())
}
