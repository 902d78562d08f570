//! Tokens to one value.
//!
//! A wrong value is reported where it ends, not where it goes wrong, so that one mistake gives one
//! error: the first mistake is kept, what was built is dropped, and brackets are counted on. The end
//! is where as many braces and as many brackets were closed as opened, or one more of either.

use serde_json::{Map, Number, Value};

use super::lexer::Kind;
use super::{SyntaxError, string};

/// What may come next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Expect {
    #[default]
    Value,
    FirstItem,
    ItemSeparator,
    FirstKey,
    Key,
    Colon,
    PairSeparator,
}

#[derive(Debug)]
enum Open {
    Array(Vec<Value>),
    /// With the key whose value is awaited.
    Object(Map<String, Value>, Option<String>),
}

#[derive(Debug, Default)]
pub(super) struct Builder {
    /// Opened less closed.
    braces: isize,
    brackets: isize,
    expect: Expect,
    open: Vec<Open>,
    value: Option<Value>,
    error: Option<SyntaxError>,
}

impl Builder {
    /// How many braces and brackets are open with this token.
    pub(super) fn depth_after(&self, kind: Kind) -> usize {
        let (braces, brackets) = self.counts_after(kind);
        usize::try_from(braces + brackets).unwrap_or(0)
    }

    fn counts_after(&self, kind: Kind) -> (isize, isize) {
        match kind {
            Kind::OpenBrace => (self.braces + 1, self.brackets),
            Kind::CloseBrace => (self.braces - 1, self.brackets),
            Kind::OpenBracket => (self.braces, self.brackets + 1),
            Kind::CloseBracket => (self.braces, self.brackets - 1),
            _ => (self.braces, self.brackets),
        }
    }

    /// Takes a token; gives the outcome if it is the last one of the value.
    pub(super) fn token(&mut self, kind: Kind, text: &[u8]) -> Option<Result<Value, SyntaxError>> {
        (self.braces, self.brackets) = self.counts_after(kind);
        if self.error.is_none()
            && let Err(error) = self.accept(kind, text)
        {
            self.open.clear();
            self.error = Some(error);
        }
        let unbalanced = self.braces < 0 || self.brackets < 0;
        if !unbalanced && (self.braces > 0 || self.brackets > 0) {
            return None;
        }
        Some(match (self.error.take(), self.value.take()) {
            (None, Some(value)) => Ok(value),
            (Some(error), _) => Err(error),
            (None, None) => Err(SyntaxError::parse("expecting value")),
        })
    }

    fn accept(&mut self, kind: Kind, text: &[u8]) -> Result<(), SyntaxError> {
        match (self.expect, kind) {
            (Expect::FirstItem, Kind::CloseBracket)
            | (Expect::FirstKey, Kind::CloseBrace)
            | (Expect::ItemSeparator, Kind::CloseBracket)
            | (Expect::PairSeparator, Kind::CloseBrace) => self.close(),
            (Expect::ItemSeparator, Kind::Comma) => {
                self.expect = Expect::Value;
                Ok(())
            }
            (Expect::PairSeparator, Kind::Comma) => {
                self.expect = Expect::Key;
                Ok(())
            }
            (Expect::Colon, Kind::Colon) => {
                self.expect = Expect::Value;
                Ok(())
            }
            (Expect::ItemSeparator, _) => Err(SyntaxError::parse("expected separator in list")),
            (Expect::PairSeparator, _) => Err(SyntaxError::parse("expected separator in dict")),
            (Expect::Colon, _) => Err(SyntaxError::parse("missing : in object pair")),
            (Expect::Value | Expect::FirstItem | Expect::FirstKey | Expect::Key, _) => {
                self.value_token(kind, text)
            }
        }
    }

    /// A token that starts a value. A key is first read as a value of any type.
    fn value_token(&mut self, kind: Kind, text: &[u8]) -> Result<(), SyntaxError> {
        match kind {
            Kind::OpenBrace => {
                self.open.push(Open::Object(Map::new(), None));
                self.expect = Expect::FirstKey;
                Ok(())
            }
            Kind::OpenBracket => {
                self.open.push(Open::Array(Vec::new()));
                self.expect = Expect::FirstItem;
                Ok(())
            }
            _ => self.complete(scalar(kind, text)?),
        }
    }

    fn close(&mut self) -> Result<(), SyntaxError> {
        match self.open.pop() {
            Some(Open::Array(items)) => self.complete(Value::Array(items)),
            Some(Open::Object(pairs, _)) => self.complete(Value::Object(pairs)),
            None => Err(SyntaxError::parse("expecting value")),
        }
    }

    /// Puts a complete value where it belongs.
    fn complete(&mut self, value: Value) -> Result<(), SyntaxError> {
        match self.open.last_mut() {
            None => self.value = Some(value),
            Some(Open::Array(items)) => {
                items.push(value);
                self.expect = Expect::ItemSeparator;
            }
            Some(Open::Object(pairs, key)) => match (key.take(), value) {
                (None, Value::String(text)) => {
                    *key = Some(text);
                    self.expect = Expect::Colon;
                }
                (None, _) => return Err(SyntaxError::parse("key is not a string in object")),
                (Some(key), value) => {
                    if pairs.insert(key, value).is_some() {
                        return Err(SyntaxError::parse("duplicate key"));
                    }
                    self.expect = Expect::PairSeparator;
                }
            },
        }
        Ok(())
    }
}

fn scalar(kind: Kind, text: &[u8]) -> Result<Value, SyntaxError> {
    match kind {
        Kind::String => string::decode(text).map(Value::String),
        Kind::Integer | Kind::Float => number(kind, text),
        Kind::Keyword => match text {
            b"true" => Ok(Value::Bool(true)),
            b"false" => Ok(Value::Bool(false)),
            b"null" => Ok(Value::Null),
            _ => {
                let shown = string::shown(text);
                Err(SyntaxError::parse(format_args!("invalid keyword '{shown}'")))
            }
        },
        _ => Err(SyntaxError::parse("expecting value")),
    }
}

/// A number in the smallest of int64, uint64 and double that holds it.
fn number(kind: Kind, text: &[u8]) -> Result<Value, SyntaxError> {
    let out_of_range = || SyntaxError::parse("number out of range");
    let text = std::str::from_utf8(text).map_err(|_| out_of_range())?;
    if kind == Kind::Integer {
        if let Ok(number) = text.parse::<i64>() {
            return Ok(number.into());
        }
        if let Ok(number) = text.parse::<u64>() {
            return Ok(number.into());
        }
    }
    // JSON has no infinity to echo it with; QEMU sends back the word "inf".
    let number = text.parse().ok().and_then(Number::from_f64).ok_or_else(out_of_range)?;
    Ok(Value::Number(number))
}
