//! `tardigrade snapshot`

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use qmp::client::{Client, ClientError};
use qmp::schema::CheckpointInfo;
use serde_json::{Map, Value, json};

use super::{Error, connect_to_guest, text};
use crate::checkpoints::text::size;
use crate::checkpoints::{draw, show};
use crate::cli::args::{CheckpointSource, ListArgs, LoadArgs, SaveArgs, ShowArgs, SnapshotArgs};
use crate::cli::image::Output;
use crate::image;

/// How often progress is asked for.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

pub(super) fn save(args: &SaveArgs) -> Result<(), Error> {
    let mut more = Map::new();
    if !args.description.is_empty() {
        more.insert("x-description".to_owned(), json!(args.description));
    }
    if let Some(mode) = &args.mode {
        more.insert("x-mode".to_owned(), json!(mode));
    }
    if let Some(method) = &args.compress {
        more.insert("x-compress".to_owned(), json!(method));
    }
    if !args.labels.is_empty() {
        let labels = args.labels.iter().map(|text| match text.split_once('=') {
            Some((key, value)) => Ok(json!({ "key": key, "value": value })),
            None => Err(Error::Label(text.clone())),
        });
        let labels = labels.collect::<Result<Vec<_>, _>>()?;
        more.insert("x-labels".to_owned(), Value::Array(labels));
    }
    run_job(&args.snapshot, "snapshot-save", "saved", more)
}

pub(super) fn load(args: &LoadArgs) -> Result<(), Error> {
    let mut more = Map::new();
    if let Some(mode) = &args.mode {
        more.insert("x-mode".to_owned(), json!(mode));
    }
    if let Some(clock) = &args.clock {
        more.insert("x-clock".to_owned(), json!(clock));
    }
    run_job(&args.snapshot, "snapshot-load", "loaded", more)
}

pub(super) fn delete(args: &SnapshotArgs) -> Result<(), Error> {
    // QMP takes the deletion of what is not there for done; a person has mistyped.
    let has_tag = |disk: &Disk| {
        let snapshots = disk.snapshots.as_array();
        snapshots.into_iter().flatten().any(|snapshot| snapshot["name"] == json!(args.tag))
    };
    if !disks(&mut connect_to_guest(&args.target)?)?.iter().any(has_tag) {
        return Err(Error::NoCheckpoint(args.tag.clone()));
    }
    run_job(args, "snapshot-delete", "deleted", Map::new())
}

/// Draws the tree of checkpoints.
pub(super) fn list(args: &ListArgs) -> Result<(), Error> {
    let found = checkpoints(&args.source, None)?;
    match args.output {
        Output::Human => print(&draw::tree(&found)),
        Output::Json => print_json(&found),
    }
}

/// Tells all of the checkpoints of a tag; there may be more than one in a table that QEMU wrote.
pub(super) fn show(args: &ShowArgs) -> Result<(), Error> {
    let found = checkpoints(&args.source, Some(&args.tag))?;
    if found.is_empty() {
        return Err(Error::NoCheckpoint(args.tag.clone()));
    }
    match args.output {
        Output::Human => {
            let texts: Vec<_> = found.iter().map(show::checkpoint).collect();
            print(&texts.join("\n"))
        }
        Output::Json => print_json(&found),
    }
}

fn checkpoints(source: &CheckpointSource, tag: Option<&str>) -> Result<Vec<CheckpointInfo>, Error> {
    const COMMAND: &str = "x-query-checkpoints";
    let Some(qmp) = &source.qmp else {
        return Ok(image::checkpoints(&source.image, tag, false)?);
    };
    let arguments = match tag {
        Some(tag) => json!({ "tag": tag }),
        None => json!({}),
    };
    let answer = Client::connect(qmp)?.execute(COMMAND, arguments)?;
    serde_json::from_value(answer).map_err(|source| Error::Unread { command: COMMAND, source })
}

fn print(text: &str) -> Result<(), Error> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Error::Output)
}

fn print_json(found: &[CheckpointInfo]) -> Result<(), Error> {
    let text = serde_json::to_string_pretty(found).map_err(|e| Error::Output(e.into()))?;
    print(&format!("{text}\n"))
}

/// A disk that the machine can write to.
struct Disk {
    node: String,
    snapshots: Value,
}

impl Disk {
    /// Whether RAM and devices of the checkpoint are on it.
    fn keeps_state_of(&self, tag: &str) -> bool {
        let keeps = |snapshot: &Value| {
            snapshot["name"] == json!(tag) && snapshot["vm-state-size"].as_u64() > Some(0)
        };
        self.snapshots.as_array().is_some_and(|snapshots| snapshots.iter().any(keeps))
    }
}

fn disks(client: &mut Client) -> Result<Vec<Disk>, Error> {
    let missing = |member| Error::Answer { command: "query-block", member };
    let blocks = client.execute("query-block", json!({}))?;
    let mut disks = Vec::new();
    for block in blocks.as_array().into_iter().flatten() {
        let node = &block["inserted"];
        if node["ro"] == json!(false) {
            let name = node["node-name"].as_str().ok_or(missing("node-name"))?;
            let snapshots = node["image"]["snapshots"].clone();
            disks.push(Disk { node: name.to_owned(), snapshots });
        }
    }
    Ok(disks)
}

/// Runs a snapshot job to its end, with progress on a terminal.
fn run_job(
    args: &SnapshotArgs,
    command: &'static str,
    done: &str,
    more: Map<String, Value>,
) -> Result<(), Error> {
    if args.tag.is_empty() {
        return Err(Error::EmptyTag);
    }
    let mut client = connect_to_guest(&args.target)?;
    let disks = disks(&mut client)?;
    let devices = match args.devices.as_slice() {
        [] => disks.iter().map(|disk| disk.node.clone()).collect(),
        named => named.to_vec(),
    };
    let keeper = || disks.iter().find(|disk| disk.keeps_state_of(&args.tag)).map(|disk| &disk.node);
    let vmstate = args.vmstate.as_ref().or_else(keeper).or(devices.first()).ok_or(Error::NoDisk)?;
    // Unique among clients of this machine that are at work at the same time.
    let id = format!("cli-{}", std::process::id());
    let mut arguments = json!({ "job-id": id, "tag": args.tag, "devices": devices });
    if command != "snapshot-delete" {
        arguments["vmstate"] = json!(vmstate);
    }
    for (name, value) in more {
        arguments[name] = value;
    }
    let started = Instant::now();
    client.execute(command, arguments)?;
    let outcome = wait(&mut client, &id);
    client.execute("job-dismiss", json!({ "id": id }))?;
    outcome?;
    println!("'{}' {done} in {:.2} s", args.tag, started.elapsed().as_secs_f64());
    Ok(())
}

fn wait(client: &mut Client, id: &str) -> Result<(), Error> {
    let show = std::io::stderr().is_terminal();
    let started = Instant::now();
    loop {
        let concluded = client.wait_event(PROGRESS_INTERVAL, |event| {
            event["event"] == json!("JOB_STATUS_CHANGE")
                && event["data"]["id"] == json!(id)
                && event["data"]["status"] == json!("concluded")
        });
        let job = match concluded {
            Ok(_) | Err(ClientError::Timeout(_)) => job(client, id)?,
            Err(error) => return Err(error.into()),
        };
        if text(&job["status"]) == "concluded" {
            if show && started.elapsed() > Duration::from_secs(1) {
                eprintln!();
            }
            return match job["error"].as_str() {
                None => Ok(()),
                Some(error) => {
                    Err(ClientError::Job { id: id.to_owned(), error: error.to_owned() }.into())
                }
            };
        }
        if show && started.elapsed() > Duration::from_secs(1) {
            print_progress(&job)?;
        }
    }
}

fn job(client: &mut Client, id: &str) -> Result<Value, Error> {
    let jobs = client.execute("query-jobs", json!({}))?;
    let mut jobs = jobs.as_array().into_iter().flatten();
    let found = jobs.find(|job| job["id"] == json!(id)).cloned();
    found.ok_or(Error::Answer { command: "query-jobs", member: "the job" })
}

fn print_progress(job: &Value) -> Result<(), Error> {
    let current = job["current-progress"].as_u64().unwrap_or(0);
    let total = job["total-progress"].as_u64().unwrap_or(0).max(1);
    let percent = current.min(total) * 100 / total;
    eprint!("\r{percent:3} %  {} of {}", size(current), size(total));
    std::io::stderr().flush().map_err(Error::Output)
}
