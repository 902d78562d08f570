//! The error of a command, as it goes over the wire, and QEMU's standard texts.

use serde::{Deserialize, Serialize};

/// What kind of error it is; clients may decide on it, unlike on the text (QAPI `QapiErrorClass`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ErrorClass {
    /// Everything without a class of its own.
    GenericError,
    /// The command is not known, or not at this stage of the session.
    CommandNotFound,
    /// A block job command named a device without an active job.
    DeviceNotActive,
    /// A device is not there.
    DeviceNotFound,
    /// The command needs a KVM capability that the host lacks.
    KVMMissingCap,
}

/// The error of a command: `{"class": ..., "desc": ...}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{desc}")]
pub struct Error {
    /// The kind of error.
    pub class: ErrorClass,
    /// For people.
    pub desc: String,
}

impl Error {
    /// An error of class `GenericError`, with the text `desc`.
    pub fn generic(desc: impl Into<String>) -> Self {
        Self { class: ErrorClass::GenericError, desc: desc.into() }
    }

    /// An error of the given class.
    pub fn new(class: ErrorClass, desc: impl Into<String>) -> Self {
        Self { class, desc: desc.into() }
    }

    /// No command of this name.
    pub fn command_not_found(name: &str) -> Self {
        Self::new(ErrorClass::CommandNotFound, format!("The command {name} has not been found"))
    }

    /// A command before `qmp_capabilities`.
    pub(crate) fn expecting_negotiation() -> Self {
        Self::new(
            ErrorClass::CommandNotFound,
            "Expecting capabilities negotiation with 'qmp_capabilities'",
        )
    }

    /// A second `qmp_capabilities`.
    pub(crate) fn negotiation_complete() -> Self {
        Self::new(
            ErrorClass::CommandNotFound,
            "Capabilities negotiation is already complete, command ignored",
        )
    }

    /// `exec-oob` of a command that cannot run out of band.
    pub(crate) fn no_oob(command: &str) -> Self {
        Self::generic(format!("The command {command} does not support OOB"))
    }

    /// A mandatory argument is not there; `path` as in `actions[0].data`.
    pub fn missing_parameter(path: &str) -> Self {
        Self::generic(format!("Parameter '{path}' is missing"))
    }

    /// An argument no one asked for.
    pub fn unexpected_parameter(path: &str) -> Self {
        Self::generic(format!("Parameter '{path}' is unexpected"))
    }

    /// An argument of another JSON type than `expected` ("string", "integer", ...).
    pub fn invalid_type(path: &str, expected: &str) -> Self {
        Self::generic(format!("Invalid parameter type for '{path}', expected: {expected}"))
    }

    /// An enum argument with a value the enum lacks; `name` is the last part of the path only.
    pub(crate) fn bad_value(name: &str, value: &str) -> Self {
        Self::generic(format!("Parameter '{name}' does not accept value '{value}'"))
    }

    /// A number out of its range; `expects` as in "a >0 size".
    pub fn out_of_range(name: &str, expects: &str) -> Self {
        Self::generic(format!("Parameter '{name}' expects {expects}"))
    }

    /// A node that no command can find.
    pub fn no_node(name: &str) -> Self {
        Self::generic(format!("Cannot find device='{name}' nor node-name='{name}'"))
    }

    /// A job that is not there, for the `job-*` commands.
    pub fn job_not_found() -> Self {
        Self::generic("Job not found")
    }

    /// A job whose state does not allow the verb.
    pub(crate) fn job_verb(id: &str, state: &str, verb: &str) -> Self {
        Self::generic(format!("Job '{id}' in state '{state}' cannot accept command verb '{verb}'"))
    }
}
