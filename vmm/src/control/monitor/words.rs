//! A line taken apart: words, or strings in double quotes.

/// A line of the monitor.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Line {
    /// The first word; empty if there is none.
    pub(super) command: String,
    /// Those after it.
    pub(super) words: Vec<String>,
    /// A string is not ended.
    pub(super) unterminated: bool,
}

impl Line {
    pub(super) fn parse(text: &str) -> Self {
        let mut line = Self::default();
        let mut rest = text.trim_start();
        let end = rest.find(char::is_whitespace).unwrap_or(rest.len());
        line.command = rest[..end].to_owned();
        rest = rest[end..].trim_start();
        while !rest.is_empty() {
            match next(rest) {
                Some((word, after)) => {
                    line.words.push(word);
                    rest = after.trim_start();
                }
                None => {
                    line.unterminated = true;
                    break;
                }
            }
        }
        line
    }
}

/// The first word and what is behind it; `None` for a string without an end.
fn next(text: &str) -> Option<(String, &str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find(char::is_whitespace).unwrap_or(text.len());
        return Some((text[..end].to_owned(), &text[end..]));
    };
    let mut word = String::new();
    let mut characters = quoted.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((word, &quoted[at + 1..])),
            '\\' => word.push(match characters.next()?.1 {
                'n' => '\n',
                'r' => '\r',
                other => other,
            }),
            other => word.push(other),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_strings_are_told_apart() {
        let parse = |text: &str| {
            let line = Line::parse(text);
            assert!(!line.unterminated, "{text}");
            (line.command, line.words)
        };
        assert_eq!(parse("  "), (String::new(), vec![]));
        assert_eq!(parse(" info  status "), ("info".into(), vec!["status".into()]));
        let words = vec!["d".into(), "write -P 5 0 64k".into()];
        assert_eq!(parse("qemu-io d \"write -P 5 0 64k\""), ("qemu-io".into(), words));
        assert_eq!(parse(r#"x "a\"b\\c\n""#), ("x".into(), vec!["a\"b\\c\n".into()]));
        for text in ["x \"a", "x \"", "x a \"b\\"] {
            assert!(Line::parse(text).unterminated, "{text}");
        }
    }
}
