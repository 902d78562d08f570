//! The dialogue with one client, without its socket.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::json::{Limits, Parser};
use crate::schema::{self, Command, Control, VersionInfo};
use crate::wire::{self, Incoming};
use crate::{Error, json::SyntaxError};

/// What input leads to.
#[derive(Debug, PartialEq)]
pub(super) enum Step {
    /// This is sent back at once.
    Answer(Vec<u8>),
    /// The machine runs this; nothing more is read of the input until it has answered.
    Run {
        /// For the answer.
        id: Option<Value>,
        /// Checked against the schema.
        command: Command,
    },
}

#[derive(Debug)]
pub(super) struct Session {
    parser: Parser,
    negotiated: bool,
    version: Arc<VersionInfo>,
    /// Commands that this program does not have.
    without: &'static [&'static str],
}

impl Session {
    pub(super) fn new(
        limits: Limits,
        version: Arc<VersionInfo>,
        without: &'static [&'static str],
    ) -> Self {
        Self { parser: Parser::new(limits), negotiated: false, version, without }
    }

    pub(super) fn greeting(&self) -> Vec<u8> {
        wire::greeting(&self.version)
    }

    /// Whether `qmp_capabilities` was done: only then are there other commands, and events.
    pub(super) fn negotiated(&self) -> bool {
        self.negotiated
    }

    /// Takes input off the front up to something to do; `None` means that all was taken.
    pub(super) fn next(&mut self, input: &mut &[u8]) -> Option<Step> {
        Some(match self.parser.next(input)? {
            Ok(value) => self.value(value),
            Err(SyntaxError(text)) => answer(None, &Err(Error::generic(text))),
        })
    }

    fn value(&mut self, value: Value) -> Step {
        let Incoming { id, name, arguments } = match wire::parse_request(value) {
            Ok(incoming) => incoming,
            Err((id, error)) => return answer(id.as_ref(), &Err(error)),
        };
        match self.dispatch(&name, arguments) {
            Ok(Dispatched::Control(value)) => answer(id.as_ref(), &Ok(value)),
            Ok(Dispatched::Machine(command)) => Step::Run { id, command },
            Err(error) => answer(id.as_ref(), &Err(error)),
        }
    }

    fn dispatch(&mut self, name: &str, arguments: Map<String, Value>) -> Result<Dispatched, Error> {
        if !self.negotiated && name != "qmp_capabilities" {
            return Err(Error::expecting_negotiation());
        }
        let info = schema::find(name)
            .filter(|info| !self.without.contains(&info.name))
            .ok_or_else(|| Error::command_not_found(name))?;
        schema::check_arguments(info, &arguments)?;
        let mismatch = |error| Error::generic(format!("Invalid arguments of {name}: {error}"));
        if let Some(control) = Control::decode(name, arguments.clone()) {
            return self.control(control.map_err(mismatch)?).map(Dispatched::Control);
        }
        match Command::decode(name, arguments) {
            Some(command) => command.map(Dispatched::Machine).map_err(mismatch),
            None => Err(Error::command_not_found(name)),
        }
    }

    fn control(&mut self, control: Control) -> Result<Value, Error> {
        tracing::trace!(command = control.name(), "QMP");
        match control {
            Control::Capabilities(_) if self.negotiated => Err(Error::negotiation_complete()),
            Control::Capabilities(arguments) => {
                let enable = arguments.enable.unwrap_or_default();
                let missing = enable.iter().filter(|cap| !super::CAPABILITIES.contains(cap));
                let missing: Vec<&str> = missing.map(|capability| capability.as_str()).collect();
                if !missing.is_empty() {
                    let text = format!("Capability {} not available", missing.join(", "));
                    return Err(Error::generic(text));
                }
                self.negotiated = true;
                Ok(json!({}))
            }
            Control::QueryVersion => serde_json::to_value(&*self.version)
                .map_err(|error| Error::generic(error.to_string())),
            Control::QueryCommands => Ok(schema::commands()
                .filter(|info| !self.without.contains(&info.name))
                .map(|info| json!({ "name": info.name }))
                .collect()),
        }
    }
}

enum Dispatched {
    Control(Value),
    Machine(Command),
}

fn answer(id: Option<&Value>, result: &Result<Value, Error>) -> Step {
    Step::Answer(wire::response(id, result))
}
