//! JSON as QEMU's monitor reads and writes it.
//!
//! Input is framed by JSON value: bytes come in any portions, and a value ends where its brackets
//! balance (a bare number or keyword: where something else follows). [`Parser`] takes bytes and
//! gives one value, or one error text, at a time. Nothing is kept of a value once it is known to be
//! wrong, except the counts needed to find its end.
//!
//! Beyond RFC 8259: `'single quotes'`, the escape `\'`, and U+0000 as the bytes C0 80. The texts of
//! the errors and the places where reading starts anew after one are QEMU 10's, but for two
//! limits: see [`Limits`].

mod builder;
mod lexer;
mod string;
mod writer;

#[cfg(test)]
mod tests;

use serde_json::Value;

use builder::Builder;
use lexer::{Kind, Lexer};
pub(crate) use writer::to_message;

/// How much one JSON value may hold. QEMU's limits are the default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of all tokens of one value together.
    pub bytes: usize,
    /// Tokens in one value.
    pub tokens: usize,
    /// Open brackets at once.
    pub depth: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { bytes: 64 << 20, tokens: 2 << 20, depth: 1024 }
    }
}

/// The text of a syntax error; what goes into `desc`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SyntaxError(pub String);

impl SyntaxError {
    fn parse(what: impl std::fmt::Display) -> Self {
        Self(format!("JSON parse error, {what}"))
    }
}

/// An incremental parser over a stream of JSON values.
#[derive(Debug, Default)]
pub struct Parser {
    limits: Limits,
    lexer: Lexer,
    builder: Builder,
    /// Spent by the value being read.
    bytes: usize,
    tokens: usize,
}

impl Parser {
    /// A parser with these limits.
    pub fn new(limits: Limits) -> Self {
        Self { limits, ..Self::default() }
    }

    /// Takes bytes off the front of `input` until a value, or an error, is complete.
    ///
    /// `None` means that all of `input` was taken and more is needed.
    pub fn next(&mut self, input: &mut &[u8]) -> Option<Result<Value, SyntaxError>> {
        loop {
            let room = self.limits.bytes.saturating_sub(self.bytes);
            let kind = self.lexer.next(input, room)?;
            if let Some(outcome) = self.take_token(kind) {
                self.restart();
                return Some(outcome);
            }
        }
    }

    fn take_token(&mut self, kind: Kind) -> Option<Result<Value, SyntaxError>> {
        if kind == Kind::Stray {
            let shown = string::shown(self.lexer.token());
            return Some(Err(SyntaxError::parse(format_args!("stray '{shown}'"))));
        }
        self.bytes += self.lexer.token().len();
        self.tokens += 1;
        if kind == Kind::TooLong || self.bytes > self.limits.bytes {
            return Some(self.over_limit("size"));
        }
        if self.tokens > self.limits.tokens {
            return Some(self.over_limit("count"));
        }
        if self.builder.depth_after(kind) > self.limits.depth {
            return Some(Err(SyntaxError("JSON nesting depth limit exceeded".into())));
        }
        self.builder.token(kind, self.lexer.token())
    }

    /// A value that is too large says nothing of where it ends: QEMU goes on in the middle of it,
    /// and answers each of its remaining tokens. Here the rest is skipped up to the next control
    /// character (a newline, say) or byte FE or FF, QEMU's documented way to start anew.
    fn over_limit(&mut self, what: &str) -> Result<Value, SyntaxError> {
        self.lexer.skip_to_control();
        Err(SyntaxError(format!("JSON token {what} limit exceeded")))
    }

    fn restart(&mut self) {
        self.builder = Builder::default();
        self.bytes = 0;
        self.tokens = 0;
    }
}
