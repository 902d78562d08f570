//! The dialogue with one client, without its socket.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::json::{Limits, Parser};
use crate::schema::{self, Command, Control, QmpCapability, VersionInfo};
use crate::wire::{self, Incoming};
use crate::{Error, json::SyntaxError};

/// A message of the client, or what is wrong with it and its id.
pub(super) type Message = Result<Incoming, (Option<Value>, Error)>;

/// What a message leads to.
#[derive(Debug, PartialEq)]
pub(super) enum Step {
    /// This is sent back at once.
    Answer(Vec<u8>),
    /// The machine runs this. Unless it is out of band, the next message waits for the answer.
    Run {
        /// For the answer.
        id: Option<Value>,
        /// Checked against the schema.
        command: Box<Command>,
    },
}

#[derive(Debug)]
pub(super) struct Session {
    parser: Parser,
    negotiated: bool,
    /// The client may use `exec-oob`.
    oob: bool,
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
        Self { parser: Parser::new(limits), negotiated: false, oob: false, version, without }
    }

    pub(super) fn greeting(&self) -> Vec<u8> {
        wire::greeting(&self.version)
    }

    /// Whether `qmp_capabilities` was done: only then are there other commands, and events.
    pub(super) fn negotiated(&self) -> bool {
        self.negotiated
    }

    /// Whether out-of-band execution was enabled.
    pub(super) fn oob(&self) -> bool {
        self.oob
    }

    /// Takes input off the front up to the end of a message; `None` means that all was taken.
    pub(super) fn next(&mut self, input: &mut &[u8]) -> Option<Message> {
        Some(match self.parser.next(input)? {
            Ok(value) => wire::parse_request(value, self.oob),
            Err(SyntaxError(text)) => Err((None, Error::generic(text))),
        })
    }

    /// What is to be done about a message, when it is its turn.
    pub(super) fn step(&mut self, message: Message) -> Step {
        let Incoming { id, name, arguments, oob } = match message {
            Ok(incoming) => incoming,
            Err((id, error)) => return answer(id.as_ref(), &Err(error)),
        };
        match self.dispatch(&name, arguments, oob) {
            Ok(Dispatched::Control(value)) => answer(id.as_ref(), &Ok(value)),
            Ok(Dispatched::Machine(command)) => Step::Run { id, command },
            Err(error) => answer(id.as_ref(), &Err(error)),
        }
    }

    fn dispatch(
        &mut self,
        name: &str,
        arguments: Map<String, Value>,
        oob: bool,
    ) -> Result<Dispatched, Error> {
        if !self.negotiated && name != "qmp_capabilities" {
            return Err(Error::expecting_negotiation());
        }
        let info = schema::find(name)
            .filter(|info| !self.without.contains(&info.name))
            .ok_or_else(|| Error::command_not_found(name))?;
        if oob && !schema::OUT_OF_BAND.contains(&info.name) {
            return Err(Error::no_oob(name));
        }
        schema::check_arguments(info, &arguments)?;
        let mismatch = |error| Error::generic(format!("Invalid arguments of {name}: {error}"));
        if let Some(control) = Control::decode(name, arguments.clone()) {
            return self.control(control.map_err(mismatch)?).map(Dispatched::Control);
        }
        match Command::decode(name, arguments) {
            Some(command) => {
                command.map(|command| Dispatched::Machine(Box::new(command))).map_err(mismatch)
            }
            None => Err(Error::command_not_found(name)),
        }
    }

    fn control(&mut self, control: Control) -> Result<Value, Error> {
        tracing::trace!(command = control.name(), "QMP");
        match control {
            Control::Capabilities(_) if self.negotiated => Err(Error::negotiation_complete()),
            Control::Capabilities(arguments) => {
                let enable = arguments.enable.unwrap_or_default();
                self.oob = enable.contains(&QmpCapability::Oob);
                self.negotiated = true;
                Ok(json!({}))
            }
            Control::QueryVersion => serde_json::to_value(&*self.version)
                .map_err(|error| Error::generic(error.to_string())),
            Control::QueryQmpSchema => Ok(Value::Array(schema::introspect(self.without))),
            Control::QueryCommands => Ok(schema::commands()
                .filter(|info| !self.without.contains(&info.name))
                .map(|info| json!({ "name": info.name }))
                .collect()),
        }
    }
}

enum Dispatched {
    Control(Value),
    Machine(Box<Command>),
}

fn answer(id: Option<&Value>, result: &Result<Value, Error>) -> Step {
    Step::Answer(wire::response(id, result))
}
