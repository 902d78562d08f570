//! What we say is what our schema promises: each answer and event of ours, by `query-qmp-schema`.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

/// The schema, by name: of commands and events, and of types.
pub(crate) struct Schema {
    entries: BTreeMap<String, Value>,
    types: BTreeMap<String, Value>,
}

impl Schema {
    /// Ours, of a program that has all commands.
    pub(crate) fn ours() -> Self {
        let (mut entries, mut types) = (BTreeMap::new(), BTreeMap::new());
        for entry in qmp::schema::introspect(&[]) {
            let kind = entry["meta-type"].as_str().unwrap();
            let list = if matches!(kind, "command" | "event") { &mut entries } else { &mut types };
            list.insert(entry["name"].as_str().unwrap().to_owned(), entry);
        }
        Self { entries, types }
    }

    /// What is wrong with a message: an event, or the answer to `command`. Errors have no type.
    pub(crate) fn check(&self, message: &Value, command: Option<&str>) -> Result<(), String> {
        let (name, member, value) = match (message["event"].as_str(), command) {
            (Some(event), _) => (event, "arg-type", message.get("data")),
            (None, Some(command)) => match message.get("return") {
                Some(value) => (command, "ret-type", Some(value)),
                None => return Ok(()),
            },
            (None, None) => return Ok(()),
        };
        let entry = self.entries.get(name).ok_or_else(|| format!("{name} is not in the schema"))?;
        let nothing = Value::Object(Map::new());
        let ty = entry[member].as_str().unwrap();
        self.is(ty, value.unwrap_or(&nothing)).map_err(|text| format!("{name}{text}: {message}"))
    }

    /// Whether a value is of a type; where not, the place in it and what is wrong there.
    fn is(&self, ty: &str, value: &Value) -> Result<(), String> {
        let entry = &self.types[ty];
        let of = |member: &str| entry[member].as_array().map_or(&[][..], Vec::as_slice);
        match entry["meta-type"].as_str().unwrap() {
            "builtin" => is_builtin(entry["json-type"].as_str().unwrap(), value),
            "enum" => match of("members").iter().any(|member| member["name"] == *value) {
                true => Ok(()),
                false => Err(format!(" is {value}, which is no value of the enumeration")),
            },
            "array" => {
                let element = entry["element-type"].as_str().unwrap();
                let list = value.as_array().ok_or_else(|| format!(" is {value}, not an array"))?;
                list.iter().enumerate().try_for_each(|(index, value)| {
                    self.is(element, value).map_err(|text| format!("[{index}]{text}"))
                })
            }
            "alternate" => {
                let fits =
                    |member: &Value| self.is(member["type"].as_str().unwrap(), value).is_ok();
                match of("members").iter().any(fits) {
                    true => Ok(()),
                    false => Err(format!(" is {value}, which is none of the alternatives")),
                }
            }
            "object" => {
                let object = value.as_object();
                self.is_object(entry, object.ok_or_else(|| format!(" is {value}, not an object"))?)
            }
            other => Err(format!(" has the meta-type {other}")),
        }
    }

    fn is_object(&self, entry: &Value, object: &Map<String, Value>) -> Result<(), String> {
        let members = self.members(entry, object);
        for member in &members {
            let name = member["name"].as_str().unwrap();
            match object.get(name) {
                Some(value) => self
                    .is(member["type"].as_str().unwrap(), value)
                    .map_err(|text| format!(".{name}{text}"))?,
                None if member.get("default").is_some() => {}
                None => return Err(format!(" has no '{name}'")),
            }
        }
        match object.keys().find(|key| members.iter().all(|member| member["name"] != key.as_str()))
        {
            Some(key) => Err(format!(" has '{key}', which the type has not")),
            None => Ok(()),
        }
    }

    /// The members of a type, with those of the kind that the object is.
    fn members(&self, entry: &Value, object: &Map<String, Value>) -> Vec<Value> {
        let of = |entry: &Value| entry["members"].as_array().cloned().unwrap_or_default();
        let mut members = of(entry);
        if let Some(kind) = entry["tag"].as_str().and_then(|tag| object.get(tag))
            && let Some(variants) = entry["variants"].as_array()
            && let Some(variant) = variants.iter().find(|variant| variant["case"] == *kind)
        {
            members.extend(of(&self.types[variant["type"].as_str().unwrap()]));
        }
        members
    }
}

fn is_builtin(json_type: &str, value: &Value) -> Result<(), String> {
    let is = match json_type {
        "string" => value.is_string(),
        "int" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        "value" => true,
        _ => false,
    };
    if is { Ok(()) } else { Err(format!(" is {value}, not {json_type}")) }
}

#[test]
fn what_the_schema_does_not_promise_is_found() {
    use serde_json::json;

    let schema = Schema::ours();
    let said = |message: Value, command| schema.check(&message, Some(command)).err();
    let status = |value: Value| said(json!({ "return": value }), "query-status");
    assert_eq!(status(json!({ "status": "running", "running": true })), None);
    for (value, wrong) in [
        (json!({ "status": "running" }), "has no 'running'"),
        (json!({ "status": "running", "running": 1 }), ".running is 1, not boolean"),
        (json!({ "status": "x", "running": true }), ".status is \"x\""),
        (json!({ "status": "running", "running": true, "z": 1 }), "has 'z'"),
        (json!([]), "not an object"),
    ] {
        assert!(status(value).unwrap().contains(wrong), "{wrong}");
    }
    assert!(said(json!({ "event": "NONE" }), "stop").unwrap().contains("is not in the schema"));
    assert_eq!(said(json!({ "event": "STOP" }), "query-status"), None);
    assert_eq!(said(json!({ "error": {} }), "query-status"), None);
}
