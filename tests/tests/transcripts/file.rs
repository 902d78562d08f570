//! What a transcript's file holds.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::programs::Program;

/// One behaviour.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Transcript {
    /// What it shows.
    pub(crate) about: String,
    pub(crate) program: Program,
    /// Arguments of `qemu-img`, run in `$DIR` before the program starts.
    #[serde(default)]
    pub(crate) images: Vec<String>,
    /// There is a file system of so many bytes at `$DIR/small`, for images that run out of space.
    pub(crate) small: Option<u64>,
    /// More arguments of both programs.
    #[serde(default)]
    pub(crate) args: Vec<String>,
    /// More arguments of QEMU alone.
    #[serde(default)]
    pub(crate) qemu_args: Vec<String>,
    /// More arguments of ours alone.
    #[serde(default)]
    pub(crate) our_args: Vec<String>,
    /// Both run a guest whose disk the steps use: see [`Step::guest`].
    #[serde(default)]
    pub(crate) guest: bool,
    /// The steps begin with the greeting, and `qmp_capabilities` is sent by them.
    #[serde(default)]
    pub(crate) greeting: bool,
    /// Members whose value is not compared, only that they are there.
    #[serde(default)]
    pub(crate) mask: Vec<String>,
    /// Events that are not compared.
    #[serde(default)]
    pub(crate) ignore: Vec<Ignored>,
    pub(crate) play: Vec<Step>,
}

/// Events that one of the two may tell at other times, or not at all.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Ignored {
    pub(crate) event: Value,
    pub(crate) why: String,
}

/// One thing that is sent, and what comes back.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Step {
    /// A command: its name, or name and arguments in an array, or the whole message.
    pub(crate) send: Option<Value>,
    /// Text that is sent as it is.
    pub(crate) raw: Option<String>,
    /// Bytes that are sent as they are.
    pub(crate) hex: Option<String>,
    /// What the guest does with its disk.
    pub(crate) guest: Option<Access>,
    /// How many answers that gives; 1 if not said.
    pub(crate) answers: Option<usize>,
    /// A program and its arguments, run in `$DIR`: exit status and output are compared.
    pub(crate) run: Option<Vec<String>>,
    /// The connection and the program end.
    #[serde(default)]
    pub(crate) end: bool,
    /// The step waits for these events, too; one that is there already counts.
    pub(crate) until: Option<Value>,
    /// Answers and events may come in any order of the one to the other.
    #[serde(default)]
    pub(crate) apart: bool,
    /// Of the objects that are returned, only these members are compared.
    #[serde(default)]
    pub(crate) only: Vec<String>,
    /// As [`Transcript::mask`].
    #[serde(default)]
    pub(crate) mask: Vec<String>,
    /// We answer differently on purpose.
    pub(crate) differs: Option<Differs>,
}

/// What the guest does with a sector.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) enum Access {
    /// Begins to read it.
    Read(u64),
    /// Begins to write it.
    Write(u64),
    /// Waits for the end of what was begun; the status byte that it gives is compared.
    End,
}

/// A difference.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Differs {
    pub(crate) why: String,
    /// What we say: every message, in order.
    pub(crate) ours: Vec<Value>,
}

impl Transcript {
    /// Whether the file makes sense.
    pub(crate) fn check(&self) -> Result<(), String> {
        if self.about.is_empty() || self.play.is_empty() {
            return Err("a transcript says what it is about, and plays something".to_owned());
        }
        if self.play.iter().any(|step| step.guest.is_some()) && !self.guest {
            return Err("a step is of a guest that is not there".to_owned());
        }
        if self.ignore.iter().any(|ignored| ignored.why.is_empty()) {
            return Err("what is ignored has a reason".to_owned());
        }
        for (index, step) in self.play.iter().enumerate() {
            step.check().map_err(|text| format!("step {index}: {text}"))?;
        }
        Ok(())
    }

    /// Things sent and answered.
    pub(crate) fn exchanges(&self) -> usize {
        self.play.iter().map(Step::answers).sum()
    }
}

impl Step {
    fn check(&self) -> Result<(), String> {
        let sent = [self.send.is_some(), self.raw.is_some(), self.hex.is_some()];
        let kinds = sent.iter().filter(|&&is| is).count();
        let kinds = kinds + usize::from(self.run.is_some()) + usize::from(self.end);
        let kinds = kinds + usize::from(self.guest.is_some());
        if kinds > 1 || (kinds == 0 && self.until.is_none()) {
            return Err(
                "it is one of send, raw, hex, guest, run, end, or at least until".to_owned()
            );
        }
        if self.differs.as_ref().is_some_and(|differs| differs.why.is_empty()) {
            return Err("a difference has a reason".to_owned());
        }
        Ok(())
    }

    /// The bytes to send.
    pub(crate) fn bytes(&self) -> Option<Vec<u8>> {
        if let Some(raw) = &self.raw {
            return Some(raw.clone().into_bytes());
        }
        if let Some(hex) = &self.hex {
            let digits: Vec<u8> = hex.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
            let byte = |pair: &[u8]| {
                u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).expect("hexadecimal")
            };
            return Some(digits.chunks(2).map(byte).collect());
        }
        let message = match self.send.as_ref()? {
            Value::String(name) => json!({ "execute": name }),
            Value::Array(parts) => json!({ "execute": parts[0], "arguments": parts[1] }),
            message => message.clone(),
        };
        Some(format!("{message}\n").into_bytes())
    }

    /// The command that it sends, where that is known.
    pub(crate) fn command(&self) -> Option<String> {
        let name = match self.send.as_ref()? {
            Value::Array(parts) => &parts[0],
            Value::Object(message) => message.get("execute").or(message.get("exec-oob"))?,
            name => name,
        };
        name.as_str().map(str::to_owned)
    }

    /// How many answers it gets.
    pub(crate) fn answers(&self) -> usize {
        let sends = self.send.is_some() || self.raw.is_some() || self.hex.is_some();
        self.answers.unwrap_or(usize::from(sends))
    }

    /// The events that it waits for.
    pub(crate) fn awaited(&self) -> Vec<Value> {
        match &self.until {
            None => Vec::new(),
            Some(Value::Array(events)) => events.clone(),
            Some(event) => vec![event.clone()],
        }
    }

    /// For people.
    pub(crate) fn text(&self) -> String {
        if self.end {
            return "(the end)".to_owned();
        }
        if let Some(access) = &self.guest {
            return format!("(the guest: {access:?})");
        }
        if let Some(run) = &self.run {
            return run.join(" ");
        }
        match (self.bytes(), &self.until) {
            (Some(bytes), _) => String::from_utf8_lossy(&bytes).trim_end().to_owned(),
            (None, Some(until)) => format!("(until {until})"),
            (None, None) => String::new(),
        }
    }
}

/// Whether `event` has all that `pattern` has.
pub(crate) fn matches(pattern: &Value, event: &Value) -> bool {
    let within = |pattern: &Map<String, Value>, event: &Map<String, Value>| {
        pattern.iter().all(|(key, value)| event.get(key).is_some_and(|own| matches(value, own)))
    };
    match (pattern, event) {
        (Value::Object(pattern), Value::Object(event)) => within(pattern, event),
        (Value::String(pattern), Value::Object(_)) => event["event"] == *pattern,
        _ => pattern == event,
    }
}
