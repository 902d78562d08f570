//! Comparing what the two programs said.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use crate::file::{Step, Transcript};
use crate::play::Played;

/// Names all differences that are not listed, and listed ones that are no more.
pub(crate) fn compare(
    transcript: &Transcript,
    ours: &Played,
    theirs: &Played,
) -> Result<(), String> {
    let verbose = std::env::var_os("TRANSCRIPT").is_some();
    let mut different = Vec::new();
    for (index, step) in transcript.play.iter().enumerate() {
        let (ours, theirs) =
            (shown(transcript, step, &ours[index]), shown(transcript, step, &theirs[index]));
        if verbose {
            println!("-> {}\n{}", step.text(), listed("<- ", &theirs));
        }
        let text = match &step.differs {
            None if ours == theirs => continue,
            None => "",
            Some(differs) if ours == theirs => {
                different.push(format!(
                    "step {index}: {}\n  is no longer different: remove 'differs' ({})",
                    step.text(),
                    differs.why
                ));
                continue;
            }
            Some(differs) if ours == shown(transcript, step, &differs.ours) => continue,
            Some(_) => "  ours is not what 'differs' says\n",
        };
        different.push(format!("step {index}: {}\n{text}{}", step.text(), told(&ours, &theirs)));
    }
    if different.is_empty() { Ok(()) } else { Err(different.join("\n")) }
}

/// Long messages are told by what differs in them.
const LONG: usize = 1000;

fn told(ours: &[Value], theirs: &[Value]) -> String {
    let all = format!("{}\n{}", listed("  ours:   ", ours), listed("  QEMU's: ", theirs));
    if all.len() < LONG || ours.len() != theirs.len() {
        return all;
    }
    let mut lines = Vec::new();
    for (ours, theirs) in ours.iter().zip(theirs) {
        differences("", ours, theirs, &mut lines);
    }
    lines.join("\n")
}

/// One line for each place where the two are different.
fn differences(path: &str, ours: &Value, theirs: &Value, lines: &mut Vec<String>) {
    match (ours, theirs) {
        (Value::Object(a), Value::Object(b)) => {
            let keys: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
            for key in keys {
                let of = |object: &Map<String, Value>| object.get(key).cloned().unwrap_or_default();
                differences(&format!("{path}/{key}"), &of(a), &of(b), lines);
            }
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            for (index, (a, b)) in a.iter().zip(b).enumerate() {
                differences(&format!("{path}/{index}"), a, b, lines);
            }
        }
        (a, b) if a == b => {}
        (a, b) => lines.push(format!("  {path}\n    ours:   {a}\n    QEMU's: {b}")),
    }
}

fn listed(head: &str, messages: &[Value]) -> String {
    let lines: Vec<String> = messages.iter().map(|message| format!("{head}{message}")).collect();
    if lines.is_empty() { format!("{head}nothing") } else { lines.join("\n") }
}

/// The messages of a step as they are compared.
fn shown(transcript: &Transcript, step: &Step, messages: &[Value]) -> Vec<Value> {
    let mut messages = messages.to_vec();
    for message in &mut messages {
        if !step.only.is_empty() {
            keep_only(&step.only, message);
        }
        for path in transcript.mask.iter().chain(&step.mask) {
            let segments: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
            mask(message, &segments);
        }
        unname(message);
    }
    if step.apart {
        // Stable: the order among answers, and among events, stays.
        messages.sort_by_key(|message| message.get("event").is_some());
    }
    messages
}

fn keep_only(only: &[String], message: &mut Value) {
    let keep = |object: &mut Value| {
        if let Some(members) = object.as_object_mut() {
            members.retain(|key, _| only.contains(key));
        }
    };
    match message.get_mut("return") {
        Some(Value::Array(list)) => list.iter_mut().for_each(keep),
        Some(object) => keep(object),
        None => {}
    }
}

/// Replaces what is at a path; `*` is every member or element.
fn mask(value: &mut Value, path: &[&str]) {
    let Some((first, rest)) = path.split_first() else {
        *value = Value::from("(masked)");
        return;
    };
    match value {
        Value::Object(members) if *first == "*" => {
            members.values_mut().for_each(|member| mask(member, rest));
        }
        Value::Array(list) if *first == "*" => list.iter_mut().for_each(|item| mask(item, rest)),
        Value::Array(list) => {
            if let Some(item) = first.parse().ok().and_then(|index: usize| list.get_mut(index)) {
                mask(item, rest);
            }
        }
        Value::Object(members) => {
            if let Some(member) = members.get_mut(*first) {
                mask(member, rest);
            }
        }
        _ => {}
    }
}

/// Names that are made up for nodes without one differ from run to run.
fn unname(value: &mut Value) {
    match value {
        Value::String(text) => {
            while let Some(at) = text.find("#block") {
                let digits = text[at + 6..].bytes().take_while(u8::is_ascii_digit).count();
                if digits == 0 {
                    return;
                }
                text.replace_range(at..at + 6 + digits, "(unnamed)");
            }
        }
        Value::Array(list) => list.iter_mut().for_each(unname),
        Value::Object(members) => members.values_mut().for_each(unname),
        _ => {}
    }
}
