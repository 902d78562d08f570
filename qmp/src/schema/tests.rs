use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::*;

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(object) => object,
        other => panic!("{other} is no object"),
    }
}

/// Objects in each other, arrays of them, enums in both.
const MEMBERS: &[Member] = {
    static INNER: ObjectInfo = ObjectInfo {
        name: "Inner",
        doc: "",
        members: &[
            Member { name: "size", doc: "", ty: Type::Uint, optional: true },
            Member { name: "short", doc: "", ty: Type::Uint32, optional: true },
            Member { name: "kind", doc: "", ty: JobType::TYPE, optional: false },
        ],
    };
    &[
        Member { name: "inner", doc: "", ty: Type::Object(|| &INNER), optional: false },
        Member { name: "list", doc: "", ty: Type::Array(&Type::Object(|| &INNER)), optional: true },
        Member { name: "count", doc: "", ty: Type::Int, optional: true },
        Member { name: "any", doc: "", ty: Type::Any, optional: true },
    ]
};

fn refusal(value: Value) -> String {
    check(MEMBERS, &object(value)).expect_err("it was accepted").desc
}

#[test]
fn arguments_of_the_right_types_are_accepted() {
    let inner = json!({ "kind": "mirror", "size": u64::MAX, "short": u32::MAX });
    for value in [
        json!({ "inner": { "kind": "commit" } }),
        json!({ "inner": inner, "list": [], "count": i64::MIN, "any": null }),
        json!({ "inner": inner, "list": [inner, inner], "any": { "x": [] } }),
    ] {
        assert_eq!(check(MEMBERS, &object(value.clone())), Ok(()), "{value}");
    }
}

#[test]
fn refusals_name_the_path_of_what_is_wrong() {
    let inner = json!({ "kind": "mirror" });
    for (value, text) in [
        (json!({}), "Parameter 'inner' is missing"),
        (json!({ "inner": {} }), "Parameter 'inner.kind' is missing"),
        (json!({ "inner": [] }), "Invalid parameter type for 'inner', expected: object"),
        (
            json!({ "inner": { "kind": 1 } }),
            "Invalid parameter type for 'inner.kind', expected: string",
        ),
        // A value outside its enum has no path.
        (json!({ "inner": { "kind": "x" } }), "Parameter 'kind' does not accept value 'x'"),
        (json!({ "inner": { "kind": "mirror", "zz": 1 } }), "Parameter 'inner.zz' is unexpected"),
        (json!({ "inner": inner, "zz": 1 }), "Parameter 'zz' is unexpected"),
        (
            json!({ "inner": inner, "list": {} }),
            "Invalid parameter type for 'list', expected: array",
        ),
        (
            json!({ "inner": inner, "list": [inner, 1] }),
            "Invalid parameter type for 'list[1]', expected: object",
        ),
        (json!({ "inner": inner, "list": [{}] }), "Parameter 'list[0].kind' is missing"),
        (
            json!({ "inner": { "kind": "mirror", "size": -1 } }),
            "Parameter 'inner.size' expects uint64",
        ),
        (
            json!({ "inner": { "kind": "mirror", "short": 1_u64 << 32 } }),
            "Parameter 'inner.short' expects uint32_t",
        ),
        (
            json!({ "inner": { "kind": "mirror", "short": -1 } }),
            "Parameter 'inner.short' expects uint32_t",
        ),
        (
            json!({ "inner": { "kind": "mirror", "short": "1" } }),
            "Parameter 'inner.short' expects uint64",
        ),
        (
            json!({ "inner": inner, "count": 1.5 }),
            "Invalid parameter type for 'count', expected: integer",
        ),
        (
            json!({ "inner": inner, "count": 1_u64 << 63 }),
            "Invalid parameter type for 'count', expected: integer",
        ),
        // Members are checked as declared, unknown ones last.
        (
            json!({ "aa": 1, "inner": inner, "count": "" }),
            "Invalid parameter type for 'count', expected: integer",
        ),
        (
            json!({ "inner": inner, "count": null }),
            "Invalid parameter type for 'count', expected: integer",
        ),
    ] {
        assert_eq!(refusal(value.clone()), text, "{value}");
    }
}

#[test]
fn a_bad_value_in_an_array_of_enums_is_called_null() {
    let members =
        [Member { name: "list", doc: "", ty: <Vec<JobType> as Qapi>::TYPE, optional: false }];
    let error = check(&members, &object(json!({ "list": ["x"] }))).unwrap_err();
    assert_eq!(error.desc, "Parameter 'null' does not accept value 'x'");
}

/// A value of the type, every optional member present.
fn example(ty: &Type, depth: usize) -> Value {
    match ty {
        Type::Str => json!("text"),
        Type::Int => json!(-1),
        Type::Uint | Type::Uint32 => json!(1),
        Type::Number => json!(0.5),
        Type::Bool => json!(true),
        Type::Any | Type::Open(_) => json!({ "any": 1 }),
        Type::Null => Value::Null,
        Type::Alternate(info) => example(info.choices.last().unwrap(), depth),
        Type::Enum(info) => json!(info.values.last()),
        Type::Array(element) => json!([example(element, depth)]),
        Type::Object(info) => example_object(info().members, depth),
        Type::Union(info) => {
            let branch = &info.branches[0];
            let mut all = object(example_object(branch.members, depth));
            all.insert(info.tag.to_owned(), branch.value.into());
            all.into()
        }
    }
}

fn example_object(members: &[Member], depth: usize) -> Value {
    // An image has a backing image, and so on.
    let kept = members.iter().filter(|member| depth > 0 || !member.optional);
    kept.map(|member| (member.name.to_owned(), example(&member.ty, depth.saturating_sub(1))))
        .collect()
}

#[test]
fn every_command_decodes_from_what_its_table_allows() {
    for info in commands() {
        for depth in [0, 5] {
            let arguments = object(example_object(info.arguments, depth));
            assert_eq!(check(info.arguments, &arguments), Ok(()), "{}", info.name);
            let control = Control::decode(info.name, arguments.clone());
            let machine = Command::decode(info.name, arguments);
            assert!(control.is_some() != machine.is_some(), "{} is in one table", info.name);
            if let Some(decoded) = control {
                assert_eq!(decoded.unwrap().name(), info.name);
            }
            if let Some(decoded) = machine {
                assert_eq!(decoded.unwrap().name(), info.name);
            }
        }
    }
}

#[test]
fn every_event_is_written_as_its_table_says() {
    for info in EVENTS {
        let mut text = json!({ "event": info.name });
        if !info.data.is_empty() {
            text["data"] = example_object(info.data, 5);
        }
        let event: Event = serde_json::from_value(text.clone()).unwrap();
        assert_eq!(event.name(), info.name);
        assert_eq!(serde_json::to_value(&event).unwrap(), text);
    }
}

#[test]
fn what_commands_return_is_read_back_from_what_the_table_says() {
    fn check_type<T: Qapi + serde::Serialize + serde::de::DeserializeOwned>() {
        let text = example(&T::TYPE, 4);
        let value: T = serde_json::from_value(text.clone()).unwrap();
        assert_eq!(serde_json::to_value(&value).unwrap(), text);
    }
    check_type::<VersionInfo>();
    check_type::<StatusInfo>();
    check_type::<NameInfo>();
    check_type::<UuidInfo>();
    check_type::<GuidInfo>();
    check_type::<KvmInfo>();
    check_type::<Vec<CpuInfoFast>>();
    check_type::<Vec<BlockInfo>>();
    check_type::<Vec<BlockDeviceInfo>>();
    check_type::<Vec<JobInfo>>();
    check_type::<Vec<CheckpointInfo>>();
}

#[test]
fn names_are_unique_and_documented() {
    let mut names = BTreeSet::new();
    for info in commands() {
        assert!(names.insert(info.name), "{} twice", info.name);
        assert!(!info.doc.trim().is_empty());
        assert!(info.arguments.iter().all(|member| !member.doc.trim().is_empty()), "{}", info.name);
    }
    assert!(find("snapshot-save").is_some());
    assert!(find("no-such-command").is_none());
}

#[test]
fn optional_members_are_left_out_when_absent() {
    let info = NameInfo { name: None };
    assert_eq!(serde_json::to_value(&info).unwrap(), json!({}));
    assert_eq!(RunState::RestoreVm.to_string(), "restore-vm");
    assert_eq!(serde_json::to_value(RunState::RestoreVm).unwrap(), "restore-vm");
}

#[test]
fn members_of_a_base_stand_where_it_is_named_and_flat_on_the_wire() {
    let names = |members: &[Member]| members.iter().map(|member| member.name).collect::<Vec<_>>();
    let backup = names(BackupArguments::MEMBERS);
    assert_eq!(backup[..2], ["job-id", "device"]);
    assert_eq!(backup[backup.len() - 1], "target");
    assert_eq!(names(IoThrottleArguments::MEMBERS)[..3], ["device", "id", "bps"]);
    let text = json!({ "device": "a", "sync": "full", "speed": 5, "target": "t" });
    let arguments: BackupArguments = serde_json::from_value(text.clone()).unwrap();
    assert_eq!((arguments.common.speed, arguments.target.as_str()), (Some(5), "t"));
    assert_eq!(serde_json::to_value(&arguments).unwrap(), text);
}
