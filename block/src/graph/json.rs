//! JSON as QEMU writes it in names of images: one line, with a space behind colons and commas.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::ser::Formatter;
use serde_json::{Serializer, Value};

/// The text of a value.
pub(super) fn spaced(value: &Value) -> String {
    let mut text = Vec::new();
    // Writing to memory does not fail, and values are always text.
    let _ = value.serialize(&mut Serializer::with_formatter(&mut text, Spaced));
    String::from_utf8_lossy(&text).into_owned()
}

struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    #[test]
    fn there_is_a_space_behind_colons_and_commas() {
        let text = super::spaced(&json!({"a": [1, "x:y,z"], "b": null}));
        assert_eq!(text, r#"{"a": [1, "x:y,z"], "b": null}"#);
    }
}
