//! The schema as `query-qmp-schema` tells it.
//!
//! As in QEMU, the names of types are hidden behind numbers, so that nobody relies on them, and all
//! integers are one type. What no command or event uses is not told.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::commands::features;
use super::{EVENTS, EnumInfo, FLAT_UNIONS, Member, OUT_OF_BAND, ObjectInfo, Type, commands};

/// The entries: commands but those that `without` names, events, and the types that these use.
pub fn introspect(without: &[&str]) -> Vec<Value> {
    let mut types = Types::default();
    let mut entries = Vec::new();
    for info in commands().filter(|info| !without.contains(&info.name)) {
        let mut entry = json!({
            "meta-type": "command",
            "name": info.name,
            "arg-type": types.name(&info.arguments_type),
            "ret-type": types.name(&info.returns),
        });
        if OUT_OF_BAND.contains(&info.name) {
            entry["allow-oob"] = json!(true);
        }
        let features = features(info.name);
        if !features.is_empty() {
            entry["features"] = json!(features);
        }
        entries.push(entry);
    }
    for info in EVENTS {
        let data = match info.data {
            [] => types.empty(),
            data => types.object(&format!("{}-arg", info.name), data),
        };
        entries.push(json!({ "meta-type": "event", "name": info.name, "arg-type": data }));
    }
    entries.extend(types.entries);
    entries
}

/// The types told so far.
#[derive(Default)]
struct Types {
    /// Numbers of named types, and those without number.
    known: HashMap<String, String>,
    entries: Vec<Value>,
}

impl Types {
    /// The name of a type, which is told if it was not yet.
    fn name(&mut self, ty: &Type) -> String {
        match ty {
            Type::Str => self.builtin("str", "string"),
            Type::Int | Type::Uint | Type::Uint32 => self.builtin("int", "int"),
            Type::Number => self.builtin("number", "number"),
            Type::Bool => self.builtin("bool", "boolean"),
            Type::Any => self.builtin("any", "value"),
            Type::Null => self.builtin("null", "null"),
            Type::Array(element) => {
                let element = self.name(element);
                let name = format!("[{element}]");
                self.fixed(&name, json!({ "meta-type": "array", "element-type": element }))
            }
            Type::Enum(info) => self.enumeration(info),
            Type::Object(info) => {
                let info = info();
                if info.members.is_empty() {
                    return self.empty();
                }
                self.named_object(info)
            }
            Type::Union(info) => self.union(info.name, info.tag, &[], info.branches),
            Type::Open(info) => {
                let info = info();
                self.union(info.name, info.tag, info.base, info.branches)
            }
            Type::Alternate(info) => self.numbered(info.name, |types| {
                let choice = |types: &mut Self, ty| json!({ "type": types.name(ty) });
                let members: Vec<Value> = info.choices.iter().map(|ty| choice(types, ty)).collect();
                json!({ "meta-type": "alternate", "members": members })
            }),
        }
    }

    /// An object type; some are unions.
    fn named_object(&mut self, info: &ObjectInfo) -> String {
        let Some((_, tag, case, own)) = FLAT_UNIONS.iter().find(|(name, ..)| *name == info.name)
        else {
            return self.object(info.name, info.members);
        };
        self.numbered(info.name, |types| {
            let mut part = |of_kind: bool| -> Vec<Value> {
                let is = |member: &&Member| own.contains(&member.name) == of_kind;
                info.members.iter().filter(is).map(|member| types.member(member)).collect()
            };
            let (base, mut own) = (part(false), part(true));
            if info.name == "BlockJobInfo" {
                // A mirror always tells it.
                own.iter_mut().filter_map(Value::as_object_mut).for_each(|member| {
                    member.remove("default");
                });
            }
            let ty = types.numbered(
                &format!("{} {case}", info.name),
                |_| json!({ "meta-type": "object", "members": own }),
            );
            let variants = [json!({ "case": case, "type": ty })];
            json!({ "meta-type": "object", "members": base, "tag": tag, "variants": variants })
        })
    }

    fn builtin(&mut self, name: &str, json_type: &str) -> String {
        self.fixed(name, json!({ "meta-type": "builtin", "json-type": json_type }))
    }

    /// A type whose name is not a number.
    fn fixed(&mut self, name: &str, mut entry: Value) -> String {
        if self.known.insert(name.to_owned(), name.to_owned()).is_none() {
            entry["name"] = json!(name);
            self.entries.push(entry);
        }
        name.to_owned()
    }

    /// A type known by `key`, which gets a number before it is described: it may use itself.
    fn numbered(&mut self, key: &str, describe: impl FnOnce(&mut Self) -> Value) -> String {
        let key = format!("type {key}");
        if let Some(name) = self.known.get(&key) {
            return name.clone();
        }
        let name = self.known.keys().filter(|key| key.starts_with("type ")).count().to_string();
        self.known.insert(key, name.clone());
        let at = self.entries.len();
        self.entries.push(Value::Null);
        let mut entry = describe(self);
        entry["name"] = json!(name);
        if let Some(place) = self.entries.get_mut(at) {
            *place = entry;
        }
        name
    }

    fn empty(&mut self) -> String {
        self.object("nothing", &[])
    }

    fn enumeration(&mut self, info: &EnumInfo) -> String {
        self.values(info.name, info.values.iter().copied())
    }

    fn values(&mut self, key: &str, values: impl Iterator<Item = &'static str>) -> String {
        self.numbered(key, |_| {
            let values: Vec<&str> = values.collect();
            let members: Vec<Value> = values.iter().map(|name| json!({ "name": name })).collect();
            json!({ "meta-type": "enum", "members": members, "values": values })
        })
    }

    fn object(&mut self, key: &str, members: &[Member]) -> String {
        self.numbered(key, |types| {
            let members = types.members(members);
            json!({ "meta-type": "object", "members": members })
        })
    }

    fn members(&mut self, members: &[Member]) -> Vec<Value> {
        members.iter().map(|member| self.member(member)).collect()
    }

    fn member(&mut self, member: &Member) -> Value {
        let mut entry = Map::new();
        entry.insert("name".to_owned(), json!(member.name));
        entry.insert("type".to_owned(), json!(self.name(&member.ty)));
        if member.optional {
            entry.insert("default".to_owned(), Value::Null);
        }
        Value::Object(entry)
    }

    fn union(
        &mut self,
        name: &str,
        tag: &str,
        base: &[Member],
        branches: &'static [super::Branch],
    ) -> String {
        self.numbered(name, |types| {
            let kinds = branches.iter().map(|branch| branch.value);
            let kind = types.values(&format!("{name} {tag}"), kinds);
            let mut members = vec![json!({ "name": tag, "type": kind })];
            members.extend(types.members(base));
            let variant = |branch: &super::Branch| {
                let ty = types.object(&format!("{name} {}", branch.value), branch.members);
                json!({ "case": branch.value, "type": ty })
            };
            let variants: Vec<Value> = branches.iter().map(variant).collect();
            json!({ "meta-type": "object", "members": members, "tag": tag, "variants": variants })
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn strings<'a>(entry: &'a Value, member: &str) -> Vec<&'a str> {
        entry[member].as_str().into_iter().collect()
    }

    #[test]
    fn every_type_that_is_used_is_told_once_and_nothing_else() {
        let entries = introspect(&[]);
        let types =
            |entry: &&Value| !["command", "event"].contains(&entry["meta-type"].as_str().unwrap());
        let names: Vec<&str> =
            entries.iter().filter(types).map(|entry| entry["name"].as_str().unwrap()).collect();
        let told: BTreeSet<&str> = names.iter().copied().collect();
        assert_eq!(names.len(), told.len(), "a type is told twice");
        let mut used = BTreeSet::new();
        for entry in &entries {
            for member in ["arg-type", "ret-type", "element-type"] {
                used.extend(strings(entry, member));
            }
            for list in ["members", "variants"] {
                for member in entry[list].as_array().into_iter().flatten() {
                    used.extend(strings(member, "type"));
                }
            }
        }
        assert_eq!(used, told);
    }

    #[test]
    fn commands_that_are_not_there_and_their_types_are_not_told() {
        let told = |without: &[&str], name: &str| {
            introspect(without).iter().any(|entry| {
                entry["name"] == name
                    || entry["members"]
                        .as_array()
                        .is_some_and(|all| all.iter().any(|member| member["name"] == name))
            })
        };
        // The command, and a member of a type that only its answer has.
        for name in ["query-blockstats", "rd_total_time_ns"] {
            assert!(told(&[], name), "{name}");
            assert!(!told(&["query-blockstats"], name), "{name}");
        }
    }
}
