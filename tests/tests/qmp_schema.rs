//! Our schema beside QEMU's, which is asked of QEMU itself: whatever a client knows of QEMU's holds
//! for ours, and what is ours alone says so with `x-`.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use tardigrade_tests::daemon::Daemon;
use tardigrade_tests::require;

/// What QEMU has as a union or enum value and we have not is no one's promise; members that differ
/// on purpose are named here, with the reason.
const DELIBERATE: &[(&str, &str)] = &[
    ("blockdev-create.options<qcow2>.encrypt", "is refused, whatever it says"),
    ("blockdev-create.options<qcow2>.backing-fmt", "is only written down"),
    ("migrate.channels[].addr<socket>.path", "QEMU's is a union here, of which there is one kind"),
    ("migrate-incoming.channels[].addr<socket>.path", "as of migrate"),
];

struct Schema {
    entries: BTreeMap<String, Value>,
    types: BTreeMap<String, Value>,
}

impl Schema {
    fn new(entries: &[Value]) -> Self {
        let of = |kinds: bool| {
            let is =
                |entry: &&Value| matches!(text(entry, "meta-type"), "command" | "event") != kinds;
            let named = |entry: &Value| (text(entry, "name").to_owned(), entry.clone());
            entries.iter().filter(is).map(named).collect()
        };
        Self { entries: of(false), types: of(true) }
    }

    fn ty(&self, name: &str) -> &Value {
        &self.types[name]
    }
}

fn text<'a>(entry: &'a Value, member: &str) -> &'a str {
    entry[member].as_str().unwrap_or_else(|| panic!("{entry}: no {member}"))
}

fn list<'a>(entry: &'a Value, member: &str) -> &'a [Value] {
    entry[member].as_array().map_or(&[], Vec::as_slice)
}

/// Which way values go.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Way {
    /// From the client: we may ask for no more than QEMU does.
    In,
    /// To the client: we may tell nothing that it does not expect, and must tell what it relies on.
    Out,
}

struct Comparison<'a> {
    ours: &'a Schema,
    theirs: &'a Schema,
    seen: BTreeSet<(String, String, Way)>,
    wrong: Vec<String>,
}

impl Comparison<'_> {
    fn wrong(&mut self, path: &str, what: impl std::fmt::Display) {
        if !DELIBERATE.iter().any(|(known, _)| *known == path) {
            self.wrong.push(format!("{path}: {what}"));
        }
    }

    fn compare(&mut self, path: &str, ours: &str, theirs: &str, way: Way) {
        if !self.seen.insert((ours.to_owned(), theirs.to_owned(), way)) {
            return;
        }
        let (ours, theirs) = (self.ours.ty(ours).clone(), self.theirs.ty(theirs).clone());
        let kinds = (text(&ours, "meta-type"), text(&theirs, "meta-type"));
        match kinds {
            ("builtin", "builtin") => {
                if text(&ours, "json-type") != text(&theirs, "json-type") {
                    self.wrong(path, format!("{ours} is not {theirs}"));
                }
            }
            ("array", "array") => {
                let (ours, theirs) = (text(&ours, "element-type"), text(&theirs, "element-type"));
                self.compare(&format!("{path}[]"), ours, theirs, way);
            }
            ("enum", "enum") => self.values(path, &ours, &theirs),
            ("object", "object") => self.object(path, &ours, &theirs, way),
            ("alternate", "alternate") => self.alternate(path, &ours, &theirs, way),
            // Where we take less than QEMU does.
            (_, "alternate") if way == Way::In => {
                self.one_of(path, text(&ours, "name"), &theirs, way);
            }
            _ => self.wrong(path, format!("{ours} is not {theirs}")),
        }
    }

    fn values(&mut self, path: &str, ours: &Value, theirs: &Value) {
        let of = |entry: &Value| -> BTreeSet<String> {
            list(entry, "members").iter().map(|value| text(value, "name").to_owned()).collect()
        };
        for value in of(ours).difference(&of(theirs)) {
            if !value.starts_with("x-") {
                self.wrong(path, format!("QEMU has no value '{value}'"));
            }
        }
    }

    fn alternate(&mut self, path: &str, ours: &Value, theirs: &Value, way: Way) {
        for choice in list(ours, "members") {
            self.one_of(path, text(choice, "type"), theirs, way);
        }
    }

    fn one_of(&mut self, path: &str, ours: &str, theirs: &Value, way: Way) {
        let kind = |schema: &Schema, name: &str| {
            let entry = schema.ty(name);
            match text(entry, "meta-type") {
                "builtin" => text(entry, "json-type").to_owned(),
                "enum" => "string".to_owned(),
                other => other.to_owned(),
            }
        };
        let own = kind(self.ours, ours);
        let choices = list(theirs, "members").iter().map(|choice| text(choice, "type"));
        let same = choices.into_iter().find(|name| kind(self.theirs, name) == own);
        match same.map(str::to_owned) {
            Some(name) => self.compare(path, ours, &name, way),
            None => self.wrong(path, format!("QEMU takes no {own} here")),
        }
    }

    fn object(&mut self, path: &str, ours: &Value, theirs: &Value, way: Way) {
        self.members(path, list(ours, "members"), list(theirs, "members"), way);
        if ours.get("tag").is_none() {
            // A union in QEMU, of which we know one kind.
            return;
        }
        if ours["tag"] != theirs["tag"] {
            return self.wrong(path, format!("the tag is {}", theirs["tag"]));
        }
        for variant in list(ours, "variants") {
            let (case, ty) = (text(variant, "case"), text(variant, "type"));
            let path = format!("{path}<{case}>");
            let same = list(theirs, "variants").iter().find(|other| text(other, "case") == case);
            match same {
                Some(other) => self.compare(&path, ty, text(other, "type"), way),
                None if list(self.ours.ty(ty), "members").is_empty() => {}
                None if case.starts_with("x-") => {}
                None => self.wrong(&path, "QEMU has no such kind, or it has no members"),
            }
        }
    }

    fn members(&mut self, path: &str, ours: &[Value], theirs: &[Value], way: Way) {
        let find =
            |all: &[Value], name: &str| all.iter().find(|m| text(m, "name") == name).cloned();
        let optional = |member: &Value| member.get("default").is_some();
        for member in ours {
            let name = text(member, "name");
            let path = format!("{path}.{name}");
            let Some(other) = find(theirs, name) else {
                let additional = name.starts_with("x-") && (way == Way::Out || optional(member));
                if !additional {
                    self.wrong(&path, "QEMU has no such member");
                }
                continue;
            };
            let stricter = match way {
                Way::In => !optional(member) && optional(&other),
                Way::Out => optional(member) && !optional(&other),
            };
            if stricter {
                self.wrong(&path, "may be left out by one of the two only");
            }
            self.compare(&path, text(member, "type"), text(&other, "type"), way);
        }
        for other in theirs.iter().filter(|member| !optional(member)) {
            let name = text(other, "name");
            if find(ours, name).is_none() {
                self.wrong(path, format!("'{name}' is missing, which QEMU always has"));
            }
        }
    }
}

/// QEMU's own answer.
fn of_qemu() -> Schema {
    let mut child = Command::new("qemu-system-x86_64")
        .args(["-M", "none", "-nodefaults", "-display", "none", "-qmp", "stdio"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let commands = ["qmp_capabilities", "query-qmp-schema", "quit"];
    let lines = commands.map(|name| format!("{}\n", json!({ "execute": name })));
    child.stdin.take().unwrap().write_all(lines.concat().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let answers = String::from_utf8(output.stdout).unwrap();
    let mut answers = answers.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let entries = answers.find_map(|answer| answer["return"].as_array().cloned());
    Schema::new(&entries.unwrap())
}

#[test]
fn what_a_client_knows_of_qemu_holds_for_us() {
    if !require::program("qemu-system-x86_64") {
        return;
    }
    let (ours, theirs) = (Schema::new(&qmp::schema::introspect(&[])), of_qemu());
    let mut comparison =
        Comparison { ours: &ours, theirs: &theirs, seen: BTreeSet::new(), wrong: Vec::new() };
    for (name, entry) in &ours.entries {
        let Some(other) = theirs.entries.get(name) else {
            if !name.starts_with("x-") {
                comparison.wrong(name, "QEMU has no such command or event");
            }
            continue;
        };
        assert_eq!(entry["meta-type"], other["meta-type"], "{name}");
        // Clients ask for them by name before they rely on what they stand for.
        assert_eq!(entry["features"], other["features"], "{name}");
        let way = if entry["meta-type"] == "command" { Way::In } else { Way::Out };
        comparison.compare(name, text(entry, "arg-type"), text(other, "arg-type"), way);
        if entry["meta-type"] == "command" {
            let (ours, theirs) = (text(entry, "ret-type"), text(other, "ret-type"));
            comparison.compare(&format!("{name} returns"), ours, theirs, Way::Out);
        }
    }
    let wrong = &comparison.wrong;
    assert!(wrong.is_empty(), "{} differences:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn a_daemon_tells_its_schema_and_commands_alike() {
    let mut daemon = Daemon::start(&[]);
    let schema = daemon.qmp("query-qmp-schema", json!({}));
    let commands = daemon.qmp("query-commands", json!({}));
    let names = |list: &Value, kind: Option<&str>| -> BTreeSet<String> {
        let is = |entry: &&Value| kind.is_none_or(|kind| entry["meta-type"] == kind);
        let all = list.as_array().unwrap().iter().filter(is);
        all.map(|entry| text(entry, "name").to_owned()).collect()
    };
    assert_eq!(names(&schema, Some("command")), names(&commands, None));
    assert!(!names(&commands, None).contains("cont"));
    assert!(daemon.quit().success());
}
