//! Commands that overtake others.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

mod common;

use common::{Fixture, PATIENCE, Raw, options};
use qmp::{Command, Request, Requests};
use serde_json::json;

/// A client that has enabled it, and the requests that it makes.
fn fixture() -> (Fixture, Requests, Raw) {
    let (fixture, requests) = Fixture::start(options());
    let mut raw = fixture.connect();
    assert_eq!(raw.line()["QMP"]["capabilities"], json!(["oob"]));
    let enable = r#"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}"#;
    assert_eq!(raw.ask(enable), json!({ "return": {} }));
    (fixture, requests, raw)
}

fn next(requests: &Requests) -> Request {
    requests.wait(PATIENCE).expect("no request")
}

#[test]
fn a_command_out_of_band_is_answered_while_another_works() {
    let (_fixture, requests, mut raw) = fixture();
    raw.send(r#"{"execute":"cont","id":1}"#);
    let slow = next(&requests);
    raw.send(r#"{"execute":"query-name","id":2}{"exec-oob":"query-jobs","id":3}"#);
    let quick = next(&requests);
    assert_eq!(quick.command, Command::QueryJobs);
    quick.reply.value(&json!([]));
    assert_eq!(raw.line(), json!({ "return": [], "id": 3 }));
    // The one in between waits for its turn.
    assert!(requests.take().is_empty());
    slow.reply.done();
    assert_eq!(raw.line()["id"], 1);
    let last = next(&requests);
    assert_eq!(last.command, Command::QueryName);
    last.reply.done();
    assert_eq!(raw.line()["id"], 2);
}

#[test]
fn errors_of_messages_that_wait_come_in_their_turn() {
    let (_fixture, requests, mut raw) = fixture();
    raw.send(r#"{"execute":"cont","id":1}"#);
    let slow = next(&requests);
    raw.send(r#"{"execute":"nosuch","id":2} } {"execute":"query-version","id":3}"#);
    raw.send(r#"{"exec-oob":"nosuch","id":4}"#);
    assert_eq!(raw.line()["id"], 4);
    slow.reply.done();
    assert_eq!(raw.line()["id"], 1);
    assert_eq!(raw.line()["id"], 2);
    assert_eq!(raw.line()["error"]["desc"], "JSON parse error, expecting value");
    assert_eq!(raw.line()["id"], 3);
}

#[test]
fn what_cannot_run_out_of_band_is_refused() {
    let (_fixture, requests, mut raw) = fixture();
    for (input, text) in [
        (r#"{"exec-oob":"cont"}"#, "The command cont does not support OOB"),
        (r#"{"exec-oob":"query-version"}"#, "The command query-version does not support OOB"),
        (r#"{"exec-oob":"nosuch"}"#, "The command nosuch has not been found"),
        (r#"{"exec-oob":1}"#, "QMP input member 'exec-oob' must be a string"),
        (r#"{"exec-oob":"job-cancel"}"#, "Parameter 'id' is missing"),
        (
            r#"{"exec-oob":"stop","execute":"stop"}"#,
            "QMP input member 'execute' clashes with 'exec-oob'",
        ),
    ] {
        assert_eq!(raw.error(input), text, "{input}");
    }
    assert!(requests.take().is_empty());
}

#[test]
fn no_more_than_eight_messages_wait() {
    let (fixture, requests, mut raw) = fixture();
    raw.send(r#"{"execute":"cont","id":"slow"}"#);
    let slow = next(&requests);
    let waiting: String =
        (0..8).map(|id| format!(r#"{{"execute":"query-name","id":{id}}}"#)).collect();
    raw.send(waiting + r#"{"exec-oob":"query-jobs","id":"late"}"#);
    // Another client is served meanwhile, so what could be taken of the first has been.
    let mut other = fixture.negotiated();
    assert_eq!(other.ask(r#"{"execute":"query-commands","id":1}"#)["id"], 1);
    assert!(requests.take().is_empty(), "the queue is full, nothing behind it is read");
    slow.reply.done();
    // One has left the queue: the next that is read may overtake the others.
    let mut taken = vec![next(&requests), next(&requests)];
    taken.sort_by_key(|request| request.command != Command::QueryJobs);
    assert_eq!(taken[0].command, Command::QueryJobs);
    for request in taken {
        request.reply.done();
    }
    assert_eq!(raw.line()["id"], "slow");
    assert_eq!(raw.line()["id"], "late");
    assert_eq!(raw.line()["id"], 0);
    for id in 1..8 {
        next(&requests).reply.done();
        assert_eq!(raw.line()["id"], id);
    }
}

#[test]
fn a_client_that_goes_away_leaves_its_commands_to_be_done() {
    let (fixture, requests, mut raw) = fixture();
    raw.send(r#"{"execute":"cont"}{"execute":"query-name"}{"exec-oob":"stop","id":1}"#);
    let mut first = vec![next(&requests), next(&requests)];
    drop(raw);
    first.sort_by_key(|request| request.command != Command::Stop);
    for request in first {
        request.reply.done();
    }
    assert_eq!(next(&requests).command, Command::QueryName);
    // Nothing of it is left that could disturb others.
    let mut other = fixture.negotiated();
    assert_eq!(other.ask(r#"{"execute":"query-commands","id":1}"#)["id"], 1);
}
