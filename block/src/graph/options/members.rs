//! The members of an object of options, taken out one by one, so that what is left is unknown.

use serde_json::{Map, Value};

use crate::{Error, Result};

/// How strict values are typed: JSON has types, the command line only has text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// JSON: numbers and booleans are such.
    Json,
    /// `key=value`: all is text.
    Text,
}

/// The members of one object, taken out one by one.
#[derive(Debug)]
pub struct Members {
    members: Map<String, Value>,
    path: String,
    source: Source,
}

pub(super) fn invalid(text: String) -> Error {
    Error::Invalid(text)
}

impl Members {
    /// The members of an object that is at `path` in the option: nothing, or names with dots between them.
    pub fn new(members: Map<String, Value>, path: String, source: Source) -> Self {
        Self { members, path, source }
    }

    /// Those of an object among the members.
    pub fn inner(&self, name: &str, members: Map<String, Value>) -> Self {
        Self::new(members, self.path_of(name), self.source)
    }

    /// How strict values are typed.
    pub fn source(&self) -> Source {
        self.source
    }

    /// Takes a member as it is.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.members.remove(name)
    }

    /// A member's name in the whole option, for messages.
    pub(crate) fn path_of(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// The error for a member that is of another type.
    ///
    /// # Errors
    /// Always.
    pub fn wrong_type<T>(&self, name: &str, expected: &str) -> Result<T> {
        Err(invalid(format!(
            "Invalid parameter type for '{}', expected: {expected}",
            self.path_of(name)
        )))
    }

    /// Text, if it is there.
    ///
    /// # Errors
    /// It is something else.
    pub fn string(&mut self, name: &str) -> Result<Option<String>> {
        match self.members.remove(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => self.wrong_type(name, "string"),
        }
    }

    /// On or off, if it is there.
    ///
    /// # Errors
    /// It is something else.
    pub fn bool(&mut self, name: &str) -> Result<Option<bool>> {
        match self.members.remove(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(Value::String(text)) if self.source == Source::Text => match text.as_str() {
                "on" => Ok(Some(true)),
                "off" => Ok(Some(false)),
                _ => Err(invalid(format!(
                    "Parameter '{}' expects 'on' or 'off'",
                    self.path_of(name)
                ))),
            },
            Some(_) => self.wrong_type(name, "boolean"),
        }
    }

    /// A size in bytes; on the command line with a suffix if wanted.
    ///
    /// # Errors
    /// It is something else.
    pub fn size(&mut self, name: &str) -> Result<Option<u64>> {
        let Some(value) = self.members.remove(name) else { return Ok(None) };
        let read = match &value {
            Value::Number(number) => number.as_u64(),
            Value::String(text) if self.source == Source::Text => parse_size(text),
            _ => None,
        };
        match read {
            Some(size) => Ok(Some(size)),
            None if self.source == Source::Text => {
                Err(invalid(format!("Parameter '{}' expects a size", self.path_of(name))))
            }
            None => self.wrong_type(name, "integer"),
        }
    }

    /// A number, if it is there.
    ///
    /// # Errors
    /// It is something else.
    pub fn number(&mut self, name: &str) -> Result<Option<i64>> {
        let Some(value) = self.members.remove(name) else { return Ok(None) };
        let read = match &value {
            Value::Number(number) => number.as_i64(),
            Value::String(text) if self.source == Source::Text => text.parse().ok(),
            _ => None,
        };
        match read {
            Some(number) => Ok(Some(number)),
            None if self.source == Source::Text => {
                Err(invalid(format!("Parameter '{}' expects a number", self.path_of(name))))
            }
            None => self.wrong_type(name, "integer"),
        }
    }

    /// Text that must be there.
    ///
    /// # Errors
    /// It is not, or it is something else.
    pub fn needed(&mut self, name: &str) -> Result<String> {
        match self.string(name)? {
            Some(text) => Ok(text),
            None => self.missing(name),
        }
    }

    /// A word of a list; the error names the member without its path, as QEMU does.
    ///
    /// # Errors
    /// It is another word, or something else.
    pub fn word(&mut self, name: &str, words: &[&str]) -> Result<Option<String>> {
        self.string(name)?.map(|word| Self::one_of(name, word, words)).transpose()
    }

    pub(super) fn one_of(name: &str, word: String, words: &[&str]) -> Result<String> {
        if words.contains(&word.as_str()) {
            Ok(word)
        } else {
            Err(invalid(format!("Parameter '{name}' does not accept value '{word}'")))
        }
    }

    /// An object, if it is there.
    ///
    /// # Errors
    /// It is something else.
    pub fn object(&mut self, name: &str) -> Result<Option<Map<String, Value>>> {
        match self.members.remove(name) {
            None => Ok(None),
            Some(Value::Object(members)) => Ok(Some(members)),
            Some(_) => self.wrong_type(name, "object"),
        }
    }

    /// The error for a member that is needed.
    ///
    /// # Errors
    /// Always.
    pub fn missing<T>(&self, name: &str) -> Result<T> {
        Err(invalid(format!("Parameter '{}' is missing", self.path_of(name))))
    }

    /// Nothing may be left; `not_done` are names that QEMU has.
    ///
    /// # Errors
    /// Something is.
    pub fn end(self, not_done: &[&str]) -> Result<()> {
        let Some(name) = self.members.keys().next() else {
            return Ok(());
        };
        let path = self.path_of(name);
        Err(if not_done.contains(&name.as_str()) {
            Error::NotSupported(format!("Parameter '{path}' is not supported"))
        } else {
            invalid(format!("Parameter '{path}' is unexpected"))
        })
    }
}

/// `4096`, `64K`, `1G`: a suffix is a power of 1024.
fn parse_size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}
