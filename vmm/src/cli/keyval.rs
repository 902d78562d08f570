//! QEMU's `key=value,key.sub=value` notation, as a JSON object.
//!
//! Rules of QEMU's keyval syntax: a comma inside a value is doubled; dots make nested objects; the
//! first part may be a bare value, which is then that of an implied key.

use serde_json::{Map, Value};

/// Why an option's value cannot be read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// A part without `=` that is not the first.
    #[error("'{0}' lacks '=value'")]
    NoValue(String),
    /// The same key twice, or both as a value and as an object.
    #[error("'{0}' is given twice")]
    Duplicate(String),
    /// Nothing before the `=`, or between two dots.
    #[error("'{0}' is not a key")]
    BadKey(String),
    /// The JSON form does not parse.
    #[error("{0}")]
    Json(String),
    /// The JSON form is something else.
    #[error("a JSON object is expected")]
    NotAnObject,
}

/// Keys whose values are true or false in QAPI; on the command line they are `on` and `off`.
const BOOLEANS: &[&str] = &["read-only", "auto-read-only", "force-share", "direct", "no-flush"];

/// Reads `text` as keyval, or as JSON where it starts with a brace. `implied` is the key of a bare
/// first value.
///
/// # Errors
/// The text is not of either form.
pub fn parse(text: &str, implied: Option<&str>) -> Result<Map<String, Value>, Error> {
    if text.trim_start().starts_with('{') {
        return match serde_json::from_str(text) {
            Ok(Value::Object(object)) => Ok(object),
            Ok(_) => Err(Error::NotAnObject),
            Err(error) => Err(Error::Json(error.to_string())),
        };
    }
    let mut object = Map::new();
    for (index, part) in split(text).into_iter().enumerate() {
        match (part.split_once('='), implied) {
            (Some((key, value)), _) => insert(&mut object, key, value)?,
            (None, Some(key)) if index == 0 => insert(&mut object, key, &part)?,
            (None, _) => return Err(Error::NoValue(part)),
        }
    }
    Ok(object)
}

/// Splits at single commas; a double one stands for itself.
fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let last = parts.len() - 1;
        match c {
            ',' if chars.next_if_eq(&',').is_some() => parts[last].push(','),
            ',' => parts.push(String::new()),
            c => parts[last].push(c),
        }
    }
    parts
}

fn insert(object: &mut Map<String, Value>, key: &str, value: &str) -> Result<(), Error> {
    let duplicate = || Error::Duplicate(key.to_owned());
    let mut names: Vec<&str> = key.split('.').collect();
    if names.iter().any(|name| name.is_empty()) {
        return Err(Error::BadKey(key.to_owned()));
    }
    let leaf = names.pop().ok_or_else(|| Error::BadKey(key.to_owned()))?;
    let mut at = object;
    for name in names {
        let child = at.entry(name).or_insert_with(|| Value::Object(Map::new()));
        at = child.as_object_mut().ok_or_else(duplicate)?;
    }
    match at.insert(leaf.to_owned(), leaf_value(leaf, value)) {
        None => Ok(()),
        Some(_) => Err(duplicate()),
    }
}

fn leaf_value(key: &str, value: &str) -> Value {
    match value {
        "on" | "true" | "yes" if BOOLEANS.contains(&key) => Value::Bool(true),
        "off" | "false" | "no" if BOOLEANS.contains(&key) => Value::Bool(false),
        _ => Value::String(value.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn value(text: &str) -> Value {
        Value::Object(parse(text, Some("driver")).unwrap())
    }

    #[test]
    fn dots_make_objects_and_switches_make_booleans() {
        let text = "driver=qcow2,node-name=d,file.driver=file,file.filename=a,cache.direct=on";
        let wanted = json!({
            "driver": "qcow2", "node-name": "d", "cache": { "direct": true },
            "file": { "driver": "file", "filename": "a" }
        });
        assert_eq!(value(text), wanted);
    }

    #[test]
    fn a_first_bare_value_takes_the_implied_key() {
        let wanted = json!({ "driver": "virtio-blk-device", "drive": "d" });
        assert_eq!(value("virtio-blk-device,drive=d"), wanted);
    }

    #[test]
    fn a_double_comma_is_one_comma_in_the_value() {
        assert_eq!(value("raw,filename=a,,b=c"), json!({ "driver": "raw", "filename": "a,b=c" }));
    }

    #[test]
    fn json_is_taken_as_it_is() {
        assert_eq!(value(r#" {"a": [1]}"#), json!({ "a": [1] }));
        assert_eq!(
            parse("{", None),
            Err(Error::Json("EOF while parsing an object at line 1 column 1".to_owned()))
        );
    }

    #[test]
    fn malformed_options_are_refused() {
        assert_eq!(parse("a=1,b", None), Err(Error::NoValue("b".to_owned())));
        assert_eq!(parse("a=1,a=2", None), Err(Error::Duplicate("a".to_owned())));
        assert_eq!(parse("a=1,a.b=2", None), Err(Error::Duplicate("a.b".to_owned())));
        assert_eq!(parse("a..b=1", None), Err(Error::BadKey("a..b".to_owned())));
        assert_eq!(parse("=1", None), Err(Error::BadKey(String::new())));
    }
}
