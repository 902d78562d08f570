//! Arguments against the schema, with QEMU's texts.
//!
//! Members are looked at in the order of their declaration; what no one asked for is found last.
//! Texts name an argument by its path (`actions[0].data`), but for a value outside its enum: there
//! only the last member counts, and an element of an array is called 'null'.

use serde_json::{Map, Value};

use super::{EnumInfo, Member, Type};
use crate::Error;

/// Checks an object against its members.
pub(crate) fn check(members: &[Member], object: &Map<String, Value>) -> Result<(), Error> {
    check_object(members, object, "")
}

fn check_object(
    members: &[Member],
    object: &Map<String, Value>,
    parent: &str,
) -> Result<(), Error> {
    let path = |name: &str| match parent {
        "" => name.to_owned(),
        _ => format!("{parent}.{name}"),
    };
    for member in members {
        match object.get(member.name) {
            Some(value) => check_value(&member.ty, value, member.name, &path(member.name))?,
            None if member.optional => {}
            None => return Err(Error::missing_parameter(&path(member.name))),
        }
    }
    match object.keys().find(|key| members.iter().all(|member| member.name != key.as_str())) {
        Some(key) => Err(Error::unexpected_parameter(&path(key))),
        None => Ok(()),
    }
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
        Type::Uint => expect(value.is_u64(), "uint64"),
        Type::Bool => expect(value.is_boolean(), "boolean"),
        Type::Any => Ok(()),
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
    }
}

fn check_enum(info: &EnumInfo, value: &Value, name: &str, path: &str) -> Result<(), Error> {
    let value = value.as_str().ok_or_else(|| Error::invalid_type(path, "string"))?;
    match info.values.contains(&value) {
        true => Ok(()),
        false => Err(Error::bad_value(name, value)),
    }
}
