//! `tardigrade snapshot`

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use qmp::client::{Client, ClientError};
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::macros::format_description;

use super::{Error, connect_to_guest, text};
use crate::cli::args::{ListArgs, SnapshotArgs};
use crate::cli::image::Output;

/// How often progress is asked for.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

pub(super) fn save(args: &SnapshotArgs) -> Result<(), Error> {
    run_job(args, "snapshot-save", "saved")
}

pub(super) fn load(args: &SnapshotArgs) -> Result<(), Error> {
    run_job(args, "snapshot-load", "loaded")
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
    run_job(args, "snapshot-delete", "deleted")
}

/// Lists each checkpoint once, with the disks it is on, oldest first.
pub(super) fn list(args: &ListArgs) -> Result<(), Error> {
    let mut client = connect_to_guest(&args.target)?;
    let rows = checkpoints(&disks(&mut client)?);
    match args.output {
        Output::Human => print_table(&rows),
        Output::Json => print_json(&rows)?,
    }
    Ok(())
}

/// All checkpoints by date and tag.
type Rows = BTreeMap<(u64, String), Row>;

fn checkpoints(disks: &[Disk]) -> Rows {
    let mut rows = Rows::new();
    for disk in disks {
        for snapshot in disk.snapshots.as_array().into_iter().flatten() {
            let date = snapshot["date-sec"].as_u64().unwrap_or(0);
            let row = rows.entry((date, text(&snapshot["name"]).to_owned())).or_default();
            row.vm_state = row.vm_state.max(snapshot["vm-state-size"].as_u64().unwrap_or(0));
            row.clock = snapshot["vm-clock-sec"].as_u64().unwrap_or(0);
            row.disks.push(disk.node.clone());
        }
    }
    rows
}

/// The names are those of QMP's SnapshotInfo, and of snapshot-save's arguments.
fn print_json(rows: &Rows) -> Result<(), Error> {
    let object = |((date, tag), row): (&(u64, String), &Row)| {
        json!({
            "name": tag,
            "date-sec": date,
            "vm-state-size": row.vm_state,
            "vm-clock-sec": row.clock,
            "devices": row.disks,
        })
    };
    let list: Vec<Value> = rows.iter().map(object).collect();
    let mut out = std::io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, &list).map_err(|e| Error::Output(e.into()))?;
    writeln!(out).map_err(Error::Output)
}

fn print_table(rows: &Rows) {
    if rows.is_empty() {
        println!("No checkpoints.");
        return;
    }
    println!("{:<24} {:<20} {:>10} {:>10}  DISKS", "TAG", "DATE (UTC)", "STATE", "CLOCK");
    for ((date, tag), row) in rows {
        let state = if row.vm_state == 0 { "disk only".into() } else { size(row.vm_state) };
        let clock =
            format!("{}:{:02}:{:02}", row.clock / 3600, row.clock / 60 % 60, row.clock % 60);
        println!("{tag:<24} {:<20} {state:>10} {clock:>10}  {}", utc(*date), row.disks.join(", "));
    }
}

#[derive(Default)]
struct Row {
    vm_state: u64,
    clock: u64,
    disks: Vec<String>,
}

/// A disk that the machine can write to.
struct Disk {
    node: String,
    snapshots: Value,
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
fn run_job(args: &SnapshotArgs, command: &'static str, done: &str) -> Result<(), Error> {
    if args.tag.is_empty() {
        return Err(Error::EmptyTag);
    }
    let mut client = connect_to_guest(&args.target)?;
    let devices = match args.devices.as_slice() {
        [] => disks(&mut client)?.into_iter().map(|disk| disk.node).collect(),
        named => named.to_vec(),
    };
    let vmstate = match (&args.vmstate, devices.first()) {
        (Some(node), _) => node.clone(),
        (None, Some(first)) => first.clone(),
        (None, None) => return Err(Error::NoDisk),
    };
    // Unique among clients of this machine that are at work at the same time.
    let id = format!("cli-{}", std::process::id());
    let mut arguments = json!({ "job-id": id, "tag": args.tag, "devices": devices });
    if command != "snapshot-delete" {
        arguments["vmstate"] = json!(vmstate);
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

fn size(bytes: u64) -> String {
    let units = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    match units.into_iter().find(|(_, shift)| bytes >> shift > 0) {
        Some((unit, shift)) => format!("{:.1} {unit}", bytes as f64 / (1_u64 << shift) as f64),
        None => format!("{bytes} B"),
    }
}

/// `YYYY-MM-DD HH:MM:SS` of seconds since the epoch.
fn utc(seconds: u64) -> String {
    let format = format_description!("[year]-[month]-[day] [hour]:[minute]:[second]");
    let date =
        i64::try_from(seconds).ok().and_then(|s| OffsetDateTime::from_unix_timestamp(s).ok());
    date.and_then(|date| date.format(format).ok()).unwrap_or_else(|| seconds.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(utc(0), "1970-01-01 00:00:00");
        assert_eq!(utc(951_782_400), "2000-02-29 00:00:00");
        assert_eq!(utc(1_735_689_599), "2024-12-31 23:59:59");
    }

    #[test]
    fn sizes_have_the_largest_fitting_unit() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(1536), "1.5 KiB");
        assert_eq!(size(4 << 30), "4.0 GiB");
    }
}
