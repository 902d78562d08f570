//! Options as JSON, with what QEMU's dialect has besides: strings in single quotes, in which a double
//! quote stands for itself, and `\'` in strings of either kind. Its `%` for values of a program is not
//! for texts from outside, neither there nor here.

use std::borrow::Cow;
use std::fmt;
use std::iter::Peekable;
use std::str::Chars;

use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use crate::{Error, Result};

/// Reads a value.
pub(in crate::graph) fn json(text: &str) -> Result<Value> {
    let plain = plain(text);
    let read = serde_json::from_str(&plain);
    let Unique(value) = read.map_err(|e| Error::Invalid(json_error(&e)))?;
    Ok(value)
}

/// The same as JSON has it. What is wrong in it is wrong in the outcome.
fn plain(text: &str) -> Cow<'_, str> {
    if !text.contains('\'') {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '"' | '\'' => plain_string(c, &mut chars, &mut out),
            _ => out.push(c),
        }
    }
    Cow::Owned(out)
}

/// The rest of a string, up to its closing quote if there is one.
fn plain_string(quote: char, chars: &mut Peekable<Chars<'_>>, out: &mut String) {
    out.push('"');
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next_if_eq(&'\'') {
                Some(apostrophe) => out.push(apostrophe),
                None => {
                    out.push(c);
                    out.extend(chars.next());
                }
            },
            _ if c == quote => {
                out.push('"');
                return;
            }
            '"' => out.push_str("\\\""),
            _ => out.push(c),
        }
    }
}

/// A value in which no object has a key twice.
struct Unique(Value);

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(from: D) -> std::result::Result<Self, D::Error> {
        from.deserialize_any(UniqueVisitor).map(Self)
    }
}

struct UniqueVisitor;

impl<'de> Visitor<'de> for UniqueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E: de::Error>(self) -> std::result::Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> std::result::Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> std::result::Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> std::result::Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> std::result::Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E: de::Error>(self, value: &str) -> std::result::Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut all: A) -> std::result::Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(Unique(value)) = all.next_element()? {
            list.push(value);
        }
        Ok(list.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut all: A) -> std::result::Result<Value, A::Error> {
        let mut members = Map::new();
        while let Some((key, Unique(value))) = all.next_entry::<String, Unique>()? {
            if members.insert(key, value).is_some() {
                return Err(de::Error::custom("duplicate key"));
            }
        }
        Ok(members.into())
    }
}

fn json_error(error: &serde_json::Error) -> String {
    if error.is_eof() {
        return "JSON parse error, premature end: a quote, bracket or brace is not closed"
            .to_owned();
    }
    format!("JSON parse error, {error}")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::parse;

    #[test]
    fn json_that_is_not_closed_is_called_that() {
        for text in ["{", r#"{"driver":"raw""#, r#"{"driver":"raw"#, r#"{"a":[1"#] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains("a quote, bracket or brace is not closed"), "{text}: {error}");
        }
        let error = parse(r#"{"driver":}"#).unwrap_err().to_string();
        assert_eq!(error, "JSON parse error, expected value at line 1 column 11");
    }

    #[test]
    fn a_key_that_is_there_twice_in_json_is_refused_and_in_text_the_last_wins() {
        for text in [r#"{"a":1,"a":2}"#, r#"{"driver":"raw","file":{"b":[{"c":1,"c":1}]}}"#] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.starts_with("JSON parse error, duplicate key at line 1"), "{error}");
        }
        let all = json!({"a": [1, -1, 1.5, "x", null, true, {"b": {}}], "c": u64::MAX});
        assert_eq!(parse(&all.to_string()).unwrap().0, all);
        assert_eq!(parse("driver=raw,driver=file").unwrap().0, json!({"driver": "file"}));
    }

    #[test]
    fn strings_in_single_quotes_are_those_that_qemu_reads() {
        let read = |text: &str| super::json(text).unwrap();
        let options = r#"{'driver':'qcow2', "file": {'driver' :"file",'filename':'a b.qcow2'}}"#;
        let expected =
            json!({"driver": "qcow2", "file": {"driver": "file", "filename": "a b.qcow2"}});
        assert_eq!(parse(options).unwrap().0, expected);
        for (text, expected) in [
            (r#"''"#, ""),
            (r#"'say "hi"'"#, r#"say "hi""#),
            (r#"'it\'s'"#, "it's"),
            (r#""it\'s, it's""#, "it's, it's"),
            (r#"'\"\\\/\b\f\n\r\t'"#, "\"\\/\u{8}\u{c}\n\r\t"),
            (r#"'\u00e9\ud83d\ude00é'"#, "é😀é"),
            (r#"'\\'"#, "\\"),
            (r#"'100%s %% {[,:'"#, "100%s %% {[,:"),
        ] {
            assert_eq!(read(text), json!(expected), "{text}");
        }
    }

    #[test]
    fn single_quotes_excuse_nothing_else() {
        for text in [
            "{'a':1",
            "{'a",
            r#"{'a":1}"#,
            r#"{"a':1}"#,
            r#"'\x'"#,
            "'\\u12'",
            "'\n'",
            "{a:'b'}",
            "'a' 'b'",
            "{'a':%s}",
            "['a',]",
            "'a",
            r#"'\ud83d'"#,
            "{'a':1,\"a\":2}",
        ] {
            let error = super::json(text).unwrap_err().to_string();
            assert!(error.starts_with("JSON parse error, "), "{text}: {error}");
        }
    }
}
