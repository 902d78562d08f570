//! The crate's own client against the server.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::io::Write;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use common::{Fixture, PATIENCE, options};
use qmp::client::{Client, ClientError};
use qmp::jobs::{Jobs, NewJob, Outcome, Work};
use qmp::schema::JobType;
use qmp::{Command, ErrorClass};
use serde_json::json;

#[test]
fn commands_give_their_result_or_their_error() {
    let fixture = Fixture::answering(options());
    let mut client = Client::connect(&fixture.path()).unwrap();
    assert_eq!(client.execute("query-name", json!({})).unwrap(), json!({ "name": "guest" }));
    let error = client.execute("nope", json!({})).unwrap_err();
    let ClientError::Command(error) = error else { panic!("{error}") };
    assert_eq!(error.class, ErrorClass::CommandNotFound);
    assert_eq!(error.desc, "The command nope has not been found");
}

#[test]
fn events_wait_until_someone_wants_them() {
    let fixture = Fixture::answering(options());
    let mut client = Client::connect(&fixture.path()).unwrap();
    client.execute("stop", json!({})).unwrap();
    client.execute("job-dismiss", json!({ "id": "j" })).unwrap();
    let job = |event: &serde_json::Value| event["data"]["id"] == "j";
    assert_eq!(client.wait_event(PATIENCE, job).unwrap()["event"], "JOB_STATUS_CHANGE");
    assert_eq!(client.take_events().len(), 1);
    let late = client.wait_event(Duration::from_millis(20), job).unwrap_err();
    assert!(matches!(late, ClientError::Timeout(_)), "{late}");
}

#[test]
fn the_end_of_the_server_is_named() {
    let (mut fixture, requests) = Fixture::start(options());
    let path = fixture.path();
    let mut client = Client::connect(&path).unwrap();
    fixture.server.shutdown();
    drop(requests);
    let ended = client.execute("query-name", json!({})).unwrap_err();
    assert!(matches!(ended, ClientError::Closed), "{ended}");
    let refused = Client::connect(&path).unwrap_err();
    assert!(matches!(refused, ClientError::Connect { .. }), "{refused}");
}

#[test]
fn something_that_is_no_qmp_server_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("http");
    let listener = UnixListener::bind(&path).unwrap();
    for (greeting, expected) in [("220 smtp\r\n", "Protocol"), ("{}\n", "Protocol"), ("", "Closed")]
    {
        let server = std::thread::scope(|scope| {
            scope.spawn(|| listener.accept().unwrap().0.write_all(greeting.as_bytes()).unwrap());
            Client::connect_with(&path, PATIENCE).unwrap_err()
        });
        assert!(format!("{server:?}").starts_with(expected), "{greeting}: {server:?}");
    }
}

struct Nothing;

impl Work for Nothing {
    fn progress(&self) -> (u64, u64) {
        (1, 1)
    }
}

#[test]
fn a_job_is_run_to_its_end_and_dismissed() {
    let (fixture, requests) = Fixture::start(options());
    let events = fixture.events.clone();
    std::thread::spawn(move || {
        let mut jobs = Jobs::new(move |event| events.emit(event));
        while let Some(request) = requests.wait(PATIENCE) {
            let reply = request.reply;
            match request.command {
                Command::SnapshotSave(save) => {
                    let kind = JobType::SnapshotSave;
                    let id = save.job_id;
                    if let Err(error) = jobs.create(NewJob::new(&id, kind), Box::new(Nothing)) {
                        reply.error(error);
                        continue;
                    }
                    jobs.start(&id).unwrap();
                    reply.done();
                    let outcome = match save.tag.as_str() {
                        "bad" => Outcome::Failure("no such tag".into()),
                        _ => Outcome::Success,
                    };
                    jobs.finish(&id, outcome).unwrap();
                }
                Command::QueryJobs => reply.value(&jobs.query()),
                Command::JobDismiss(job) => {
                    reply.send(jobs.dismiss(&job.id).map(|()| json!({})));
                }
                _ => reply.done(),
            }
        }
    });
    let mut client = Client::connect(&fixture.path()).unwrap();
    let save = |tag: &str| json!({ "job-id": "j", "tag": tag, "vmstate": "d", "devices": ["d"] });
    client.run_job("snapshot-save", save("good"), PATIENCE).unwrap();
    let states: Vec<String> =
        client.take_events().iter().map(|event| event["data"]["status"].to_string()).collect();
    let expected = ["created", "running", "waiting", "pending", "null"];
    assert_eq!(states, expected.map(|state| format!("\"{state}\"")));
    let failed = client.run_job("snapshot-save", save("bad"), PATIENCE).unwrap_err();
    assert_eq!(failed.to_string(), "job j: no such tag");
    let jobs = client.execute("query-jobs", json!({})).unwrap();
    assert_eq!(jobs, json!([]));
}
