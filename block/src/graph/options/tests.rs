//! Options that are refused, with QEMU's texts.

use serde_json::{Value, json};

use super::*;

fn error_of(options: &Value) -> String {
    NodeOptions::parse(options, Source::Json).unwrap_err().to_string()
}

#[test]
fn bad_options_get_the_texts_of_qemu() {
    let file = json!({"driver": "file", "filename": "x"});
    let cases = [
        (json!({"driver": "qcow2"}), "Parameter 'file' is missing"),
        (json!({"node-name": "a"}), "Parameter 'driver' is missing"),
        (json!({"driver": "zz"}), "Parameter 'driver' does not accept value 'zz'"),
        (
            json!({"driver": "qcow2", "file": 5}),
            "Invalid parameter type for 'file', expected: BlockdevRef",
        ),
        (
            json!({"driver": "qcow2", "file": file, "backing": 5}),
            "Invalid parameter type for 'backing', expected: BlockdevRefOrNull",
        ),
        (
            json!({"driver": "raw", "file": {"driver": "file", "filename": "x", "zz": 1}}),
            "Parameter 'file.zz' is unexpected",
        ),
        (
            json!({"driver": "raw", "file": {"driver": "file", "filename": 1}}),
            "Invalid parameter type for 'file.filename', expected: string",
        ),
        (
            json!({"driver": "raw", "file": file, "cache": {"direct": "on"}}),
            "Invalid parameter type for 'cache.direct', expected: boolean",
        ),
        (
            json!({"driver": "file", "filename": "x", "aio": "zz"}),
            "Parameter 'aio' does not accept value 'zz'",
        ),
        (
            json!({"driver": "file", "filename": "x", "aio": "native"}),
            "Parameter 'aio' with value 'native' is not supported, only 'threads' and 'io_uring'",
        ),
        (
            json!({"driver": "qcow2", "file": file, "encrypt": {}}),
            "Parameter 'encrypt' is not supported",
        ),
    ];
    for (options, text) in cases {
        assert_eq!(error_of(&options), text);
    }
}

#[test]
fn node_names_follow_qemus_rule() {
    assert!(is_well_formed("disk-0.a_b"));
    for bad in ["", "0a", "#block1", "a b", "a\u{e9}"] {
        assert!(!is_well_formed(bad), "{bad:?}");
    }
}
