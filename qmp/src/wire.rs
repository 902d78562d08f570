//! The messages: greeting, request, response, event.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::{Map, Value};

use crate::Error;
use crate::json::to_message;
use crate::schema::{Event, QmpCapability, VersionInfo};

/// A request, its arguments not yet looked at.
#[derive(Debug, PartialEq)]
pub(crate) struct Incoming {
    pub(crate) id: Option<Value>,
    pub(crate) name: String,
    pub(crate) arguments: Map<String, Value>,
    /// It was sent with `exec-oob`.
    pub(crate) oob: bool,
}

/// The members of a request, or the id, if it has one, and what is wrong. `oob` tells whether the
/// client has enabled out-of-band execution.
pub(crate) fn parse_request(value: Value, oob: bool) -> Result<Incoming, (Option<Value>, Error)> {
    let Value::Object(mut members) = value else {
        return Err((None, Error::generic("QMP input must be a JSON object")));
    };
    let id = members.remove("id");
    match request_members(members, oob) {
        Ok(incoming) => Ok(Incoming { id, ..incoming }),
        Err(text) => Err((id, Error::generic(text))),
    }
}

fn request_members(members: Map<String, Value>, oob: bool) -> Result<Incoming, String> {
    let mut command = None;
    let mut arguments = Map::new();
    for (member, value) in members {
        match (member.as_str(), value) {
            ("execute", _) if command.is_some() => {
                return Err("QMP input member 'execute' clashes with 'exec-oob'".into());
            }
            ("execute", Value::String(text)) => command = Some((text, false)),
            ("exec-oob", Value::String(text)) if oob => command = Some((text, true)),
            ("execute", _) => return Err("QMP input member 'execute' must be a string".into()),
            ("exec-oob", _) if oob => {
                return Err("QMP input member 'exec-oob' must be a string".into());
            }
            ("arguments", Value::Object(object)) => arguments = object,
            ("arguments", _) => {
                return Err("QMP input member 'arguments' must be an object".into());
            }
            _ => return Err(format!("QMP input member '{member}' is unexpected")),
        }
    }
    match command {
        Some((name, oob)) => Ok(Incoming { id: None, name, arguments, oob }),
        None => Err("QMP input lacks member 'execute'".into()),
    }
}

#[derive(Serialize)]
struct Greeting<'a> {
    #[serde(rename = "QMP")]
    qmp: Qmp<'a>,
}

#[derive(Serialize)]
struct Qmp<'a> {
    version: &'a VersionInfo,
    capabilities: &'a [QmpCapability],
}

#[derive(Serialize)]
struct Success<'a> {
    #[serde(rename = "return")]
    value: &'a Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a Value>,
}

#[derive(Serialize)]
struct Failure<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a Value>,
    error: &'a Error,
}

#[derive(Serialize)]
struct Timestamp {
    seconds: u64,
    microseconds: u32,
}

#[derive(Serialize)]
struct TimedEvent<'a> {
    timestamp: Timestamp,
    #[serde(flatten)]
    event: &'a Event,
}

/// What a client is told first.
pub(crate) fn greeting(version: &VersionInfo) -> Vec<u8> {
    message(&Greeting { qmp: Qmp { version, capabilities: crate::server::CAPABILITIES } })
}

/// The response to the request with this id.
pub(crate) fn response(id: Option<&Value>, result: &Result<Value, Error>) -> Vec<u8> {
    match result {
        Ok(value) => message(&Success { value, id }),
        Err(error) => message(&Failure { id, error }),
    }
}

/// An event that happened now.
pub(crate) fn event(event: &Event) -> Vec<u8> {
    // A clock set before 1970 is no reason to lose the event.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let timestamp = Timestamp { seconds: now.as_secs(), microseconds: now.subsec_micros() };
    message(&TimedEvent { timestamp, event })
}

/// Only strings are keys in these types, so that they always serialise; should that change, the
/// client gets an error instead of silence.
fn message(value: &impl Serialize) -> Vec<u8> {
    to_message(value).unwrap_or_else(|error| {
        tracing::error!(%error, "a QMP message does not serialise");
        b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"internal error\"}}\r\n".to_vec()
    })
}
