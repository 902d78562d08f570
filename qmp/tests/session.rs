//! One client: negotiation, framing, errors, ids, order.

mod common;

use common::{Fixture, options};
use serde_json::json;

#[test]
fn the_greeting_is_one_crlf_line_of_qemus_shape() {
    let fixture = Fixture::answering(options());
    let expected = r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "#
        .to_owned()
        + r#""package": "test"}, "capabilities": ["oob"]}}"#;
    assert_eq!(fixture.connect().text(), expected);
}

#[test]
fn every_command_is_refused_before_negotiation_and_qmp_capabilities_after_it() {
    let fixture = Fixture::answering(options());
    let mut raw = fixture.connect();
    raw.line();
    for command in ["stop", "query-version", "no-such-command"] {
        let answer = raw.ask(json!({ "execute": command, "id": 1 }).to_string());
        let desc = "Expecting capabilities negotiation with 'qmp_capabilities'";
        let error = json!({ "class": "CommandNotFound", "desc": desc });
        assert_eq!(answer, json!({ "id": 1, "error": error }));
    }
    assert_eq!(raw.error(r#"{"id":1}"#), "QMP input lacks member 'execute'");
    let enable = |value: &str| {
        format!(r#"{{"execute":"qmp_capabilities","arguments":{{"enable":{value}}}}}"#)
    };
    assert_eq!(raw.error(enable(r#"["x"]"#)), "Parameter 'null' does not accept value 'x'");
    assert_eq!(
        raw.error(enable("[1]")),
        "Invalid parameter type for 'enable[0]', expected: string"
    );
    assert_eq!(raw.error(enable("1")), "Invalid parameter type for 'enable', expected: array");
    raw.negotiate();
    let answer = raw.ask(r#"{"execute":"qmp_capabilities"}"#);
    assert_eq!(answer["error"]["class"], "CommandNotFound");
    let desc = "Capabilities negotiation is already complete, command ignored";
    assert_eq!(answer["error"]["desc"], desc);
}

#[test]
fn bad_requests_get_qemus_texts_and_the_session_goes_on() {
    let fixture = Fixture::answering(options());
    let mut raw = fixture.negotiated();
    for (input, desc) in [
        (r#"{"execute":"x"}"#, "The command x has not been found"),
        (r#"{"execute":"job-dismiss"}"#, "Parameter 'id' is missing"),
        (
            r#"{"execute":"job-dismiss","arguments":{"id":1}}"#,
            "Invalid parameter type for 'id', expected: string",
        ),
        (
            r#"{"execute":"job-dismiss","arguments":{"id":"x","y":1}}"#,
            "Parameter 'y' is unexpected",
        ),
        (r#"{"execute":"job-dismiss","arguments":{"y":1}}"#, "Parameter 'id' is missing"),
        (r#"{"execute":"stop","arguments":{"y":1}}"#, "Parameter 'y' is unexpected"),
        (
            r#"{"execute":"query-named-block-nodes","arguments":{"flat":"on"}}"#,
            "Invalid parameter type for 'flat', expected: boolean",
        ),
        (
            r#"{"execute":"stop","arguments":null}"#,
            "QMP input member 'arguments' must be an object",
        ),
        (r#"{"execute":1,"foo":1}"#, "QMP input member 'execute' must be a string"),
        (r#"{"execute":"stop","foo":1}"#, "QMP input member 'foo' is unexpected"),
        (r#"{"exec-oob":"stop"}"#, "QMP input member 'exec-oob' is unexpected"),
        ("{}", "QMP input lacks member 'execute'"),
        ("[]", "QMP input must be a JSON object"),
        ("xyz ", "JSON parse error, invalid keyword 'xyz'"),
        ("{\"a\":}", "JSON parse error, expecting value"),
        ("\u{1}", "JSON parse error, stray '\u{1}'"),
    ] {
        assert_eq!(raw.error(input), desc, "{input}");
    }
    assert_eq!(raw.ask(r#"{"execute":"query-name"}"#), json!({ "return": { "name": "guest" } }));
}

#[test]
fn ids_come_back_by_value_with_answers_and_dispatch_errors() {
    let fixture = Fixture::answering(options());
    let mut raw = fixture.negotiated();
    for id in [
        json!(null),
        json!(false),
        json!("é\0"),
        json!(u64::MAX),
        json!(-1.5),
        json!({ "a": [1, { "b": null }] }),
    ] {
        let answer = raw.ask(json!({ "execute": "cont", "id": id }).to_string());
        assert_eq!(answer, json!({ "return": {}, "id": id }));
        let answer = raw.ask(json!({ "execute": "nope", "id": id }).to_string());
        assert_eq!(answer["id"], id);
        assert_eq!(answer["error"]["class"], "CommandNotFound");
    }
}

#[test]
fn messages_have_qemus_spacing_and_order_of_members() {
    let fixture = Fixture::answering(options());
    let mut raw = fixture.negotiated();
    raw.send(r#"{"execute":"cont","id":"é"}{"execute":"é","id":[1,2]}{"execute":"stop"}"#);
    assert_eq!(raw.text(), r#"{"return": {}, "id": "\u00E9"}"#);
    let desc = r"The command \u00E9 has not been found";
    let error = format!(r#"{{"class": "CommandNotFound", "desc": "{desc}"}}"#);
    assert_eq!(raw.text(), format!(r#"{{"id": [1, 2], "error": {error}}}"#));
    let event = raw.text();
    assert!(event.starts_with(r#"{"timestamp": {"seconds": "#), "{event}");
    assert!(event.ends_with(r#"}, "event": "STOP"}"#), "{event}");
    assert_eq!(raw.text(), r#"{"return": {}}"#);
}

#[test]
fn several_commands_in_one_write_and_one_in_several_are_answered_in_order() {
    let fixture = Fixture::answering(options());
    let mut raw = fixture.negotiated();
    let many: String = (0..50)
        .map(|id| match id % 3 {
            0 => format!(r#"{{"execute":"query-name","id":{id}}}"#),
            1 => format!(" {{'execute':'query-version','id':{id}}}\r\n"),
            _ => format!(r#"{{"execute":"nope","id":{id}}}"#),
        })
        .collect();
    raw.send(&many);
    for id in 0..50 {
        assert_eq!(raw.line()["id"], id);
    }
    for portion in many.as_bytes().chunks(3) {
        raw.send(portion);
    }
    for id in 0..50 {
        assert_eq!(raw.line()["id"], id);
    }
}

#[test]
fn events_come_in_order_with_the_answers() {
    let fixture = Fixture::answering(options());
    let mut raw = fixture.negotiated();
    for _ in 0..20 {
        let event = raw.ask(r#"{"execute":"stop"}{"execute":"query-name"}"#);
        assert_eq!(event["event"], "STOP");
        assert_eq!(event.get("data"), None);
        assert!(event["timestamp"]["seconds"].as_u64() > Some(1_600_000_000));
        assert!(event["timestamp"]["microseconds"].as_u64() < Some(1_000_000));
        assert_eq!(raw.line(), json!({ "return": {} }));
        assert_eq!(raw.line()["return"]["name"], "guest");
    }
    let event = raw.ask(r#"{"execute":"job-dismiss","arguments":{"id":"j"}}"#);
    assert_eq!(event["data"], json!({ "id": "j", "status": "null" }));
    raw.line();
}

#[test]
fn events_are_neither_sent_nor_kept_before_negotiation() {
    let fixture = Fixture::answering(options());
    let (mut early, mut raw) = (fixture.negotiated(), fixture.connect());
    raw.line();
    early.send(r#"{"execute":"stop"}"#);
    assert_eq!(early.line()["event"], "STOP");
    raw.negotiate();
    assert_eq!(raw.ask(r#"{"execute":"query-name"}"#)["return"]["name"], "guest");
}

#[test]
fn a_command_given_up_by_the_machine_is_an_error() {
    let fixture = Fixture::answering(options());
    let mut raw = fixture.negotiated();
    let text = "The command system_reset was given up without a result";
    assert_eq!(raw.error(r#"{"execute":"system_reset"}"#), text);
    // So it is when there is no machine left.
    let (fixture, requests) = Fixture::start(options());
    drop(requests);
    assert!(fixture.negotiated().error(r#"{"execute":"stop"}"#).contains("given up"));
}

#[test]
fn query_commands_and_query_version_are_answered_here() {
    let (fixture, _requests) = Fixture::start(options());
    let mut raw = fixture.negotiated();
    let commands = raw.ask(r#"{"execute":"query-commands"}"#);
    let names: Vec<&str> = commands["return"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c["name"].as_str().unwrap())
        .collect();
    for name in ["qmp_capabilities", "query-commands", "snapshot-save", "job-cancel", "quit"] {
        assert!(names.contains(&name), "{name}");
    }
    let version = raw.ask(r#"{"execute":"query-version"}"#);
    assert_eq!(version["return"]["qemu"], json!({ "major": 10, "minor": 0, "micro": 2 }));
}

#[test]
fn a_client_that_ends_its_side_still_gets_all_answers() {
    let fixture = Fixture::answering(options());
    let mut raw = fixture.connect();
    raw.line();
    raw.send(r#"{"execute":"qmp_capabilities"}{"execute":"query-name"}{"execute":"cont"}{"exe"#);
    raw.stream().shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(raw.line(), json!({ "return": {} }));
    assert_eq!(raw.line()["return"]["name"], "guest");
    assert_eq!(raw.line(), json!({ "return": {} }));
    raw.assert_end();
}
