//! The text of string tokens, and tokens as they are shown in error texts.

use super::SyntaxError;

/// The most of a token that an error text repeats.
const SHOWN: usize = 1023;

/// U+0000, in a form that C strings can hold. C0 is in no UTF-8.
const NUL: [u8; 2] = [0xc0, 0x80];

/// A token for an error text: up to its first NUL, and not longer than QEMU's own buffer. What is not
/// a character is shown as U+FFFD.
pub(super) fn shown(token: &[u8]) -> String {
    let end = token.iter().position(|&byte| byte == 0).unwrap_or(token.len());
    let mut rest = &token[..end.min(SHOWN)];
    let mut text = String::new();
    while let Some(nul) = rest.windows(2).position(|pair| pair == NUL) {
        text += &String::from_utf8_lossy(&rest[..nul]);
        text.push('\0');
        rest = &rest[nul + NUL.len()..];
    }
    text += &String::from_utf8_lossy(rest);
    text.replace(is_noncharacter, "\u{fffd}")
}

/// The text of a string token, its quotes included in `token`.
pub(super) fn decode(token: &[u8]) -> Result<String, SyntaxError> {
    let mut text = String::with_capacity(token.len());
    // The closing quote stays, to be shown as part of a cut-off \u escape, as QEMU does.
    let mut rest = token.get(1..).unwrap_or_default();
    let quoted = |rest: &[u8]| rest.len().saturating_sub(1);
    while quoted(rest) > 0 {
        if rest[0] == b'\\' {
            let (character, used) = escape(rest)?;
            text.push(character);
            rest = &rest[used..];
        } else {
            let inner = &rest[..quoted(rest)];
            let run = inner.iter().position(|&byte| byte == b'\\').unwrap_or(inner.len());
            push_raw(&mut text, &inner[..run])?;
            rest = &rest[run..];
        }
    }
    Ok(text)
}

/// The character of the escape that `rest` starts with, and the bytes it takes.
fn escape(rest: &[u8]) -> Result<(char, usize), SyntaxError> {
    let character = match rest.get(1) {
        Some(b'"') => '"',
        Some(b'\'') => '\'',
        Some(b'\\') => '\\',
        Some(b'/') => '/',
        Some(b'b') => '\u{8}',
        Some(b'f') => '\u{c}',
        Some(b'n') => '\n',
        Some(b'r') => '\r',
        Some(b't') => '\t',
        Some(b'u') => return unicode_escape(rest),
        _ => return Err(SyntaxError::parse("invalid escape sequence in string")),
    };
    Ok((character, 2))
}

/// `\uXXXX`, or two of them that make a surrogate pair.
fn unicode_escape(rest: &[u8]) -> Result<(char, usize), SyntaxError> {
    let decoded = match (hex4(rest, 2), rest.get(6..8)) {
        (Some(high @ 0xd800..0xdc00), Some(b"\\u")) => match hex4(rest, 8) {
            Some(low @ 0xdc00..0xe000) => {
                Some((0x10000 + ((high & 0x3ff) << 10) + (low & 0x3ff), 12))
            }
            _ => None,
        },
        (Some(code), _) => Some((code, 6)),
        (None, _) => None,
    };
    decoded
        .and_then(|(code, used)| Some((char::from_u32(code)?, used)))
        .filter(|&(character, _)| !is_noncharacter(character))
        .ok_or_else(|| {
            let escape = shown(&rest[..rest.len().min(6)]);
            SyntaxError::parse(format_args!("{escape} is not a valid Unicode character"))
        })
}

fn hex4(bytes: &[u8], at: usize) -> Option<u32> {
    let digits = bytes.get(at..at + 4)?;
    digits.iter().try_fold(0, |code, &digit| Some(code << 4 | char::from(digit).to_digit(16)?))
}

/// Appends bytes without escapes: UTF-8, but for U+0000, which is C0 80.
fn push_raw(text: &mut String, run: &[u8]) -> Result<(), SyntaxError> {
    let invalid = || SyntaxError::parse("invalid UTF-8 sequence in string");
    let start = text.len();
    match std::str::from_utf8(run) {
        Ok(run) => text.push_str(run),
        Err(_) => {
            let mut rest = run;
            while let Some(nul) = rest.windows(2).position(|pair| pair == NUL) {
                text.push_str(std::str::from_utf8(&rest[..nul]).map_err(|_| invalid())?);
                text.push('\0');
                rest = &rest[nul + NUL.len()..];
            }
            text.push_str(std::str::from_utf8(rest).map_err(|_| invalid())?);
        }
    }
    // The noncharacters are all above U+FDCF, hence none of them in ASCII.
    let added = &text[start..];
    if !added.is_ascii() && added.chars().any(is_noncharacter) {
        return Err(invalid());
    }
    Ok(())
}

/// The code points that Unicode reserves for internal use, which QEMU refuses.
fn is_noncharacter(character: char) -> bool {
    let code = u32::from(character);
    (0xfdd0..=0xfdef).contains(&code) || code & 0xfffe == 0xfffe
}
