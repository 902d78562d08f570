//! `human-monitor-command`: the lines that older tools send. `docs/monitor.md` has them.
//!
//! The texts are QEMU's. What is wrong with a line is told as its output, never as a QMP error.

pub(crate) mod qemu_io;
mod show;
mod snapshots;
mod words;

use qmp::schema::{Command, HumanMonitorArguments, IoThrottleArguments, RunState, ShutdownCause};

use serde_json::json;

use super::Controller;
use crate::machine::devices::VirtioSlot;
use crate::version;
use words::Line;

/// A command: its names, as QEMU's errors give them, how many words it takes, and what `help` says.
struct Spec {
    names: &'static str,
    least: usize,
    most: usize,
    words: &'static str,
    about: &'static str,
}

const fn spec(
    names: &'static str,
    (least, most): (usize, usize),
    words: &'static str,
    about: &'static str,
) -> Spec {
    Spec { names, least, most, words, about }
}

const NONE: (usize, usize) = (0, 0);

const COMMANDS: &[Spec] = &[
    spec(
        "block_set_io_throttle",
        (0, 7),
        "device bps bps_rd bps_wr iops iops_rd iops_wr",
        "change I/O throttle limits for a block drive",
    ),
    spec("cont|c", NONE, "", "resume emulation"),
    spec("delvm", (1, 1), "tag", "delete a checkpoint"),
    spec("help|?", (0, usize::MAX), "[cmd]", "show the help"),
    spec("loadvm", (1, 1), "tag", "take the machine back to a checkpoint"),
    spec("quit|q", NONE, "", "end the machine"),
    spec("savevm", (0, 1), "[tag]", "save a checkpoint; one of that name is replaced"),
    spec("stop|s", NONE, "", "stop emulation"),
    spec("system_powerdown", NONE, "", "send system power down event"),
    spec("system_reset", NONE, "", "reset the system"),
];

const INFO: &[Spec] = &[
    spec("block", (0, 3), "[-n] [-v] [device]", "show the disks, or all nodes"),
    spec("cpus", NONE, "", "show the vCPUs"),
    spec("kvm", NONE, "", "show KVM information"),
    spec("name", NONE, "", "show the machine's name"),
    spec("snapshots", NONE, "", "show the checkpoints on the disks"),
    spec("status", NONE, "", "show the current VM status (running|paused)"),
    spec("uuid", NONE, "", "show the machine's UUID"),
    spec("version", NONE, "", "show the version"),
];

/// Not one of [`COMMANDS`]: what is wrong with its words is told where it runs.
const QEMU_IO: Spec =
    spec("qemu-io", (2, 3), "[-d] device \"command\"", "run an I/O command on a node or a device");

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
            return match self.of_device(&line) {
                Ok(None) => self.worker.run(request),
                // It reads and writes: the block thread's.
                Ok(Some(command_line)) => {
                    let arguments = HumanMonitorArguments { command_line, ..arguments.clone() };
                    let command = Command::HumanMonitorCommand(arguments);
                    self.worker.run(qmp::Request { command, ..request });
                }
                Err(text) => request.reply.value(&text),
            };
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
            ("block_set_io_throttle", _) => self.throttle_line(&line.words),
            ("info", Some(what)) => self.info(what, &line.words[1..]),
            ("help" | "?", _) => help(&line.words),
            _ => unknown(&line.command),
        };
        request.reply.value(&text.replace('\n', "\r\n"));
    }

    /// `qemu-io -d DEVICE COMMAND` as the line for its node; `None` for any other line of `qemu-io`.
    ///
    /// # Errors
    /// What the monitor is told: there is no such device.
    fn of_device(&self, line: &Line) -> Result<Option<String>, String> {
        let ([option, device, command], false) = (&line.words[..], line.unterminated) else {
            return Ok(None);
        };
        if option != "-d" {
            return Ok(None);
        }
        let mut slots = self.machine.devices().virtio();
        let slot = slots.find(|slot| slot.path == *device || slot.qom_path == *device);
        match slot.and_then(VirtioSlot::disk) {
            Some((node, _)) => {
                Ok(Some(format!("qemu-io {} {}", quoted(node.name()), quoted(command))))
            }
            None => Err(format!("Error: Device '{device}' not found\r\n")),
        }
    }

    /// `block_set_io_throttle`: the limits without bursts.
    fn throttle_line(&mut self, words: &[String]) -> String {
        const NAME: &str = "block_set_io_throttle";
        let misuse = |wrong: &str| format!("{wrong}\nTry \"help {NAME}\" for more information\n");
        let Some((device, words)) = words.split_first() else {
            return misuse(&format!("{NAME}: block device name expected"));
        };
        let mut arguments = json!({ "id": device });
        let names = ["bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"];
        for (index, name) in names.into_iter().enumerate() {
            let Some(word) = words.get(index) else {
                return misuse("unexpected end of expression");
            };
            match word.parse::<i64>() {
                Ok(number) => arguments[name] = json!(number),
                Err(_) => return misuse(&format!("invalid number '{word}'")),
            }
        }
        let parsed = serde_json::from_value::<IoThrottleArguments>(arguments);
        let parsed = parsed.map_err(|error| qmp::Error::generic(error.to_string()));
        output(parsed.and_then(|arguments| self.set_io_throttle(&arguments)))
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
            None => return Some(help(&["info".to_owned()]).replace('\n', "\r\n")),
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

/// A word that [`Line::parse`] takes for this one.
fn quoted(word: &str) -> String {
    let escape = |character| match character {
        '"' | '\\' => vec!['\\', character],
        '\n' => vec!['\\', 'n'],
        '\r' => vec!['\\', 'r'],
        other => vec![other],
    };
    format!("\"{}\"", word.chars().flat_map(escape).collect::<String>())
}

fn misuse(names: &str, wrong: &str, typed: &str) -> String {
    format!("{names}: {wrong}\r\nTry \"help {typed}\" for more information\r\n")
}

/// A line for each command, for one, or for each or one of `info`, as QEMU's.
fn help(words: &[String]) -> String {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let named = |spec: &&Spec, name: &str| spec.names.split('|').any(|own| own == name);
    let commands = || COMMANDS.iter().chain(std::iter::once(&QEMU_IO));
    let text = |prefix: &str, specs: Vec<&Spec>| {
        specs.iter().fold(String::new(), |out, spec| {
            out + &format!("{prefix}{} {} -- {}\n", spec.names, spec.words, spec.about)
        })
    };
    let found = match words[..] {
        ["info"] => text("info ", INFO.iter().collect()),
        ["info", what, ..] => text("info ", INFO.iter().filter(|spec| named(spec, what)).collect()),
        [name, ..] => text("", commands().filter(|spec| named(spec, name)).collect()),
        [] => {
            let mut all: Vec<&Spec> = commands().collect();
            all.sort_by_key(|spec| spec.names);
            text("", all) + "info [subcommand] -- show various information about the system state\n"
        }
    };
    match words.split_first() {
        Some((&"info", [what, ..])) if found.is_empty() => unknown(&format!("info {what}")),
        Some((name, _)) if found.is_empty() => unknown(name),
        _ => found,
    }
}

fn unknown(command: &str) -> String {
    format!("unknown command: '{command}'\n")
}

fn output(result: Result<(), qmp::Error>) -> String {
    result.map_or_else(|error| format!("Error: {}\n", error.desc), |()| String::new())
}
