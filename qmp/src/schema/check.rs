//! Arguments against the schema, with QEMU's texts.
//!
//! Members are looked at in the order of their declaration; what no one asked for is found last.
//! Texts name an argument by its path (`actions[0].data`), but for a value outside its enum: there
//! only the last member counts, and an element of an array is called 'null'.

use serde_json::{Map, Value};

use super::{CommandInfo, EnumInfo, Member, Type, UnionInfo};
use crate::Error;

/// Checks an object against its members.
pub(crate) fn check(members: &[Member], object: &Map<String, Value>) -> Result<(), Error> {
    check_object(members, object, "")
}

/// Checks the arguments of a command.
pub(crate) fn check_arguments(
    command: &CommandInfo,
    arguments: &Map<String, Value>,
) -> Result<(), Error> {
    if command.open {
        return check_members(command.arguments, arguments, "");
    }
    check(command.arguments, arguments)
}

fn path(parent: &str, name: &str) -> String {
    if parent.is_empty() { name.to_owned() } else { format!("{parent}.{name}") }
}

fn check_object(
    members: &[Member],
    object: &Map<String, Value>,
    parent: &str,
) -> Result<(), Error> {
    check_members(members, object, parent)?;
    no_more_than(object, parent, |key| members.iter().any(|member| member.name == key))
}

fn check_members(
    members: &[Member],
    object: &Map<String, Value>,
    parent: &str,
) -> Result<(), Error> {
    for member in members {
        let path = path(parent, member.name);
        match object.get(member.name) {
            Some(value) => check_value(&member.ty, value, member.name, &path)?,
            None if member.optional => {}
            None => return Err(Error::missing_parameter(&path)),
        }
    }
    Ok(())
}

fn no_more_than(
    object: &Map<String, Value>,
    parent: &str,
    known: impl Fn(&str) -> bool,
) -> Result<(), Error> {
    match object.keys().find(|key| !known(key)) {
        Some(key) => Err(Error::unexpected_parameter(&path(parent, key))),
        None => Ok(()),
    }
}

/// The tag first: it tells which members there are.
fn check_union(info: &UnionInfo, object: &Map<String, Value>, parent: &str) -> Result<(), Error> {
    let at = path(parent, info.tag);
    let tag = object.get(info.tag).ok_or_else(|| Error::missing_parameter(&at))?;
    let tag = tag.as_str().ok_or_else(|| Error::invalid_type(&at, "string"))?;
    let branch = info.branches.iter().find(|branch| branch.value == tag);
    let members = branch.ok_or_else(|| Error::bad_value(info.tag, tag))?.members;
    check_members(members, object, parent)?;
    no_more_than(object, parent, |key| {
        key == info.tag || members.iter().any(|member| member.name == key)
    })
}

fn check_value(ty: &Type, value: &Value, name: &str, path: &str) -> Result<(), Error> {
    let expect = |holds: bool, expected| match holds {
        true => Ok(()),
        false => Err(Error::invalid_type(path, expected)),
    };
    match ty {
        Type::Str => expect(value.is_string(), "string"),
        Type::Int => expect(value.is_i64(), "integer"),
        // QEMU takes negative numbers here too, and wraps them.
        Type::Uint if value.is_u64() => Ok(()),
        Type::Uint32 if value.as_u64().is_some_and(|value| u32::try_from(value).is_ok()) => Ok(()),
        Type::Uint32 if value.is_u64() || value.is_i64() => {
            Err(Error::out_of_range(path, "uint32_t"))
        }
        Type::Uint | Type::Uint32 => Err(Error::out_of_range(path, "uint64")),
        Type::Number => expect(value.is_number(), "number"),
        Type::Bool => expect(value.is_boolean(), "boolean"),
        // Who runs the command looks at open unions.
        Type::Any | Type::Open(_) => Ok(()),
        Type::Null => expect(value.is_null(), "null"),
        Type::Alternate(info) => {
            let choice = info.choices.iter().find(|choice| is_of(choice, value));
            // As of a value outside its enum, the path is left out.
            let choice = choice.ok_or_else(|| Error::invalid_type(name, info.name))?;
            check_value(choice, value, name, path)
        }
        Type::Enum(info) => check_enum(info, value, name, path),
        Type::Array(element) => {
            let items = value.as_array().ok_or_else(|| Error::invalid_type(path, "array"))?;
            items.iter().enumerate().try_for_each(|(index, item)| {
                check_value(element, item, "null", &format!("{path}[{index}]"))
            })
        }
        Type::Object(info) => {
            let object = value.as_object().ok_or_else(|| Error::invalid_type(path, "object"))?;
            check_object(info().members, object, path)
        }
        Type::Union(info) => {
            let object = value.as_object().ok_or_else(|| Error::invalid_type(path, "object"))?;
            check_union(info, object, path)
        }
    }
}

/// Whether a value has the JSON type of `ty`.
fn is_of(ty: &Type, value: &Value) -> bool {
    match ty {
        Type::Str | Type::Enum(_) => value.is_string(),
        Type::Int | Type::Uint | Type::Uint32 | Type::Number => value.is_number(),
        Type::Bool => value.is_boolean(),
        Type::Array(_) => value.is_array(),
        Type::Object(_) | Type::Union(_) | Type::Open(_) => value.is_object(),
        Type::Null => value.is_null(),
        Type::Any | Type::Alternate(_) => true,
    }
}

fn check_enum(info: &EnumInfo, value: &Value, name: &str, path: &str) -> Result<(), Error> {
    let value = value.as_str().ok_or_else(|| Error::invalid_type(path, "string"))?;
    match info.values.contains(&value) {
        true => Ok(()),
        false => Err(Error::bad_value(name, value)),
    }
}
