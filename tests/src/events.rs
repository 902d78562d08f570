//! QMP events in a short form, to be compared with what is expected.

use serde_json::{Value, json};

use crate::vm::Vm;

/// The events' names; a change of job `id` is its new status, those of other jobs are left out.
pub fn story(events: &[Value], id: &str) -> Vec<String> {
    let tell = |event: &Value| {
        let name = event["event"].as_str().unwrap();
        if name != "JOB_STATUS_CHANGE" {
            return Some(name.to_owned());
        }
        let ours = event["data"]["id"] == id;
        ours.then(|| event["data"]["status"].as_str().unwrap().to_owned())
    };
    events.iter().filter_map(tell).collect()
}

/// Runs a job to its end and gives its story, and its error if it failed.
pub fn run(vm: &Vm, command: &str, arguments: Value) -> (Vec<String>, Option<String>) {
    let mut qmp = vm.qmp();
    let mut arguments = arguments;
    arguments["job-id"] = json!("told");
    qmp.execute(command, arguments).unwrap();
    let mut events = Vec::new();
    loop {
        let event = qmp.wait_event(std::time::Duration::from_secs(120), |_| true).unwrap();
        let over = event["data"]["id"] == "told" && event["data"]["status"] == "concluded";
        events.push(event);
        if over {
            break;
        }
    }
    let jobs = qmp.execute("query-jobs", json!({})).unwrap();
    let job = jobs.as_array().unwrap().iter().find(|job| job["id"] == "told").unwrap();
    let error = job["error"].as_str().map(str::to_owned);
    qmp.execute("job-dismiss", json!({ "id": "told" })).unwrap();
    (story(&events, "told"), error)
}

/// The arguments of a save or load over `devices`, the first of which has the VM state.
pub fn target(tag: &str, devices: &[&str]) -> Value {
    json!({ "tag": tag, "vmstate": devices[0], "devices": devices })
}
