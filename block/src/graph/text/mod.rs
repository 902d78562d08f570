//! Options as the command line has them: `driver=qcow2,file.driver=file,...` (QEMU's keyval), or JSON.

use serde_json::{Map, Value};

use crate::{Error, Result};

mod json;

pub use super::options::{Members, Source};
pub(super) use json::json;

/// Reads the value of `--blockdev`. All values of `key=value` text are strings.
pub(crate) fn parse(text: &str) -> Result<(Value, Source)> {
    parse_as(text, "driver")
}

/// Reads an option's value, whose bare first part is the value of the key `implied`.
///
/// # Errors
/// It is neither `key=value` text nor a JSON object.
pub fn object(text: &str, implied: &str) -> Result<Map<String, Value>> {
    typed_object(text, implied).map(|(object, _)| object)
}

/// As [`object`], to take the members out one by one.
///
/// # Errors
/// As for [`object`].
pub fn members(text: &str, implied: &str) -> Result<Members> {
    let (object, source) = typed_object(text, implied)?;
    Ok(Members::new(object, String::new(), source))
}

fn typed_object(text: &str, implied: &str) -> Result<(Map<String, Value>, Source)> {
    match parse_as(text, implied)? {
        (Value::Object(object), source) => Ok((object, source)),
        _ => Err(Error::Invalid("a JSON object is expected".to_owned())),
    }
}

fn parse_as(text: &str, implied: &str) -> Result<(Value, Source)> {
    if text.trim_start().starts_with('{') {
        return Ok((json(text)?, Source::Json));
    }
    let mut all = Map::new();
    for (index, part) in split(text).iter().enumerate() {
        let (key, value) = match part.split_once('=') {
            Some(pair) => pair,
            None if index == 0 && !part.is_empty() => (implied, part.as_str()),
            None => {
                return Err(Error::Invalid(format!("Expected '=' after parameter '{part}'")));
            }
        };
        insert(&mut all, key, key, value)?;
    }
    Ok((Value::Object(all), Source::Text))
}

/// Splits at commas; a double comma is a comma of the value.
fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let end = c == ',' && chars.next_if_eq(&',').is_none();
        match parts.last_mut() {
            Some(last) if !end => last.push(c),
            _ => parts.push(String::new()),
        }
    }
    if parts.len() > 1 && parts.last().is_some_and(String::is_empty) {
        parts.pop();
    }
    parts
}

/// Puts a value at a dotted key; the last of several wins.
fn insert(into: &mut Map<String, Value>, whole: &str, key: &str, value: &str) -> Result<()> {
    let inconsistent = || {
        Err(Error::Invalid(format!(
            "Parameters '{}.*' used inconsistently",
            whole.split('.').next().unwrap_or_default()
        )))
    };
    let (first, rest) = match key.split_once('.') {
        Some((first, rest)) => (first, Some(rest)),
        None => (key, None),
    };
    if first.is_empty() {
        return Err(Error::Invalid(format!("Invalid parameter '{whole}'")));
    }
    match rest {
        None => match into.insert(first.to_owned(), Value::String(value.to_owned())) {
            Some(Value::Object(_)) => inconsistent(),
            _ => Ok(()),
        },
        Some(rest) => {
            let slot = into.entry(first).or_insert_with(|| Value::Object(Map::new()));
            match slot {
                Value::Object(inner) => insert(inner, whole, rest, value),
                _ => inconsistent(),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn dotted_keys_nest_and_double_commas_stay() {
        let (value, source) =
            parse("qcow2,node-name=d,file.driver=file,file.filename=a,,b,file.cache.direct=on")
                .unwrap();
        assert_eq!(source, Source::Text);
        assert_eq!(
            value,
            json!({"driver": "qcow2", "node-name": "d", "file":
                {"driver": "file", "filename": "a,b", "cache": {"direct": "on"}}})
        );
    }

    #[test]
    fn a_key_used_as_value_and_as_object_is_refused() {
        for text in ["driver=raw,file=x,file.driver=file", "driver=raw,file.a=1,file=x"] {
            let error = parse(text).unwrap_err().to_string();
            assert_eq!(error, "Parameters 'file.*' used inconsistently");
        }
    }
}
