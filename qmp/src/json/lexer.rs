//! Bytes to tokens: a state machine that can stop and go on after any byte.

/// Keep a token buffer of this size between tokens; give larger ones back.
const KEEP: usize = 64 << 10;

/// What a token is. Its text is in [`Lexer::token`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    OpenBrace,
    CloseBrace,
    OpenBracket,
    CloseBracket,
    Colon,
    Comma,
    Integer,
    Float,
    Keyword,
    String,
    /// No token starts or goes on like this; the text ends with the offending byte.
    Stray,
    /// The token outgrew its room.
    TooLong,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum State {
    /// Between tokens.
    #[default]
    Start,
    /// In a string that this quote ends.
    InString(u8),
    /// After a backslash in such a string.
    Escape(u8),
    Minus,
    /// After a leading zero: no digit may follow, nor (as in QEMU) an exponent.
    Zero,
    Digits,
    /// After the decimal point.
    Point,
    Fraction,
    /// After the `e`.
    Exponent,
    /// After the sign of the exponent.
    ExponentSign,
    ExponentDigits,
    Keyword,
    /// After a stray byte: until a structural or control character (no tab), FE or FF.
    Recovery,
    /// After a value over the limits: until a control character (no tab), FE or FF.
    Skip,
}

/// What one byte does.
enum Step {
    /// It belongs to the token, which goes on in this state.
    Continue(State),
    /// It is the last of this token.
    Last(Kind),
    /// It is after this token, and to be looked at again.
    After(Kind),
    /// It is in no token.
    Drop,
}

#[derive(Debug, Default)]
pub(super) struct Lexer {
    state: State,
    token: Vec<u8>,
    /// The token was handed out: the next byte starts another.
    complete: bool,
}

impl Lexer {
    /// The text of the token that [`Lexer::next`] gave last.
    pub(super) fn token(&self) -> &[u8] {
        &self.token
    }

    /// Bytes held for tokens.
    #[cfg(test)]
    pub(super) fn capacity(&self) -> usize {
        self.token.capacity()
    }

    /// Forgets the token under way, and everything up to the next control character.
    pub(super) fn skip_to_control(&mut self) {
        self.state = State::Skip;
    }

    /// Takes bytes off `input` up to the end of a token of at most `room` bytes.
    pub(super) fn next(&mut self, input: &mut &[u8], room: usize) -> Option<Kind> {
        if self.complete {
            self.complete = false;
            self.token.clear();
            self.token.shrink_to(KEEP);
        }
        let kind = loop {
            self.take_run(input, room);
            let (&byte, rest) = input.split_first()?;
            if self.token.len() > room {
                break Kind::TooLong;
            }
            match step(self.state, byte) {
                Step::Continue(state) => {
                    self.state = state;
                    self.token.push(byte);
                }
                Step::Last(kind) => {
                    *input = rest;
                    self.token.push(byte);
                    break kind;
                }
                Step::After(kind) => break kind,
                Step::Drop => {}
            }
            *input = rest;
        };
        self.state = if kind == Kind::Stray { State::Recovery } else { State::Start };
        self.complete = true;
        Some(kind)
    }

    /// Takes all leading bytes of `input` that change no state, which is most of a long input.
    fn take_run(&mut self, input: &mut &[u8], room: usize) {
        match self.state {
            State::InString(quote) => {
                let room = room.saturating_add(1).saturating_sub(self.token.len());
                let near = &input[..input.len().min(room)];
                let plain =
                    |&byte: &u8| byte != quote && byte != b'\\' && (0x20..0xfe).contains(&byte);
                let run = near.iter().position(|byte| !plain(byte)).unwrap_or(near.len());
                self.token.extend_from_slice(&near[..run]);
                *input = &input[run..];
            }
            State::Skip | State::Recovery => {
                let structural = self.state == State::Recovery;
                let ends = |&byte: &u8| resets(byte) || (structural && is_structural(byte));
                if let Some(run) = input.iter().position(ends) {
                    *input = &input[run..];
                    self.state = State::Start;
                } else {
                    *input = &[];
                }
            }
            _ => {}
        }
    }
}

/// Whether the byte ends any recovery: control characters other than the tab, FE and FF.
fn resets(byte: u8) -> bool {
    !(0x20..0xfe).contains(&byte) && byte != b'\t'
}

fn is_structural(byte: u8) -> bool {
    matches!(byte, b'{' | b'}' | b'[' | b']' | b':' | b',')
}

fn step(state: State, byte: u8) -> Step {
    use State as S;
    use Step::{After, Continue, Last};
    match (state, byte) {
        (S::Start, _) => start(byte),
        (S::InString(quote), _) if byte == quote => Last(Kind::String),
        (S::InString(quote), b'\\') => Continue(S::Escape(quote)),
        (S::InString(quote) | S::Escape(quote), 0x20..0xfe) => Continue(S::InString(quote)),
        (S::Minus, b'0') => Continue(S::Zero),
        (S::Minus, b'1'..=b'9') | (S::Digits, b'0'..=b'9') => Continue(S::Digits),
        (S::Zero, b'0'..=b'9') => Last(Kind::Stray),
        (S::Zero | S::Digits, b'.') => Continue(S::Point),
        (S::Digits | S::Fraction, b'e' | b'E') => Continue(S::Exponent),
        (S::Zero | S::Digits, _) => After(Kind::Integer),
        (S::Point | S::Fraction, b'0'..=b'9') => Continue(S::Fraction),
        (S::Exponent, b'+' | b'-') => Continue(S::ExponentSign),
        (S::Exponent | S::ExponentSign | S::ExponentDigits, b'0'..=b'9') => {
            Continue(S::ExponentDigits)
        }
        (S::Fraction | S::ExponentDigits, _) => After(Kind::Float),
        (S::Keyword, b'a'..=b'z') => Continue(S::Keyword),
        (S::Keyword, _) => After(Kind::Keyword),
        _ => Last(Kind::Stray),
    }
}

fn start(byte: u8) -> Step {
    match byte {
        b' ' | b'\t' | b'\r' | b'\n' => Step::Drop,
        b'"' | b'\'' => Step::Continue(State::InString(byte)),
        b'-' => Step::Continue(State::Minus),
        b'0' => Step::Continue(State::Zero),
        b'1'..=b'9' => Step::Continue(State::Digits),
        b'a'..=b'z' => Step::Continue(State::Keyword),
        b'{' => Step::Last(Kind::OpenBrace),
        b'}' => Step::Last(Kind::CloseBrace),
        b'[' => Step::Last(Kind::OpenBracket),
        b']' => Step::Last(Kind::CloseBracket),
        b':' => Step::Last(Kind::Colon),
        b',' => Step::Last(Kind::Comma),
        _ => Step::Last(Kind::Stray),
    }
}
