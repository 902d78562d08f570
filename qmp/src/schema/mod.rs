//! What can be said over the wire: commands, events and their types, declared once.
//!
//! The tables behind [`commands()`] and [`EVENTS`] are the only list of what exists. From them come
//! the Rust types that handlers work with, the check of arguments before dispatch, and what
//! introspection tells. A command that is not in the table is not found; one that is in the table is
//! a variant of [`Command`], so that the machine's `match` does not compile without it.

mod bitmaps;
mod block_jobs;
mod block_stats;
mod blockdev;
mod check;
mod checkpoints;
mod commands;
mod copies;
mod create;
mod events;
mod exports;
mod graph;
mod introspect;
mod jobs;
mod machine;
mod macros;
mod migration;
mod monitor;
mod nodes;
mod reference;
mod session;
mod throttle;
mod transaction;

#[cfg(test)]
mod tests;

pub use bitmaps::*;
pub use block_jobs::*;
pub use block_stats::*;
pub use blockdev::*;
#[cfg(test)]
pub(crate) use check::check;
pub(crate) use check::check_arguments;
pub use checkpoints::*;
pub use commands::{Command, commands, find};
pub(crate) use commands::{Control, FLAT_UNIONS, OUT_OF_BAND};
pub use copies::*;
pub use create::*;
pub use events::{EVENTS, Event};
pub use exports::*;
pub use graph::*;
pub use introspect::introspect;
pub use jobs::*;
pub use machine::*;
pub use migration::*;
pub use monitor::*;
pub use nodes::*;
pub use reference::reference;
pub use session::*;
pub use throttle::*;
pub use transaction::*;

use serde_json::Value;

/// A type of the schema.
#[derive(Debug, Clone, Copy)]
pub enum Type {
    /// A string (QAPI `str`).
    Str,
    /// A signed 64-bit integer (`int`).
    Int,
    /// An unsigned 64-bit integer (`uint64`, `size`).
    Uint,
    /// An unsigned 32-bit integer (`uint32`).
    Uint32,
    /// A number (`number`).
    Number,
    /// `true` or `false` (`bool`).
    Bool,
    /// Any JSON value (`any`).
    Any,
    /// An array of one type.
    Array(&'static Type),
    /// One of a list of strings.
    Enum(&'static EnumInfo),
    /// An object with known members.
    Object(fn() -> &'static ObjectInfo),
    /// An object whose members depend on one of them (QAPI's unions).
    Union(&'static UnionInfo),
    /// The same with members that all kinds have, and looked at by who runs the command.
    Open(fn() -> &'static OpenInfo),
    /// One of several types, told apart by their JSON type (QAPI's alternates).
    Alternate(&'static AlternateInfo),
    /// `null`; only in alternates.
    Null,
}

/// A union that is not checked here but by who knows what its members come to.
#[derive(Debug)]
pub struct OpenInfo {
    /// Its name in the schema.
    pub name: &'static str,
    /// What it is for.
    pub doc: &'static str,
    /// The member that decides.
    pub tag: &'static str,
    /// The members of every kind, besides the tag.
    pub base: &'static [Member],
    /// The tag's values, each with the members that come with it.
    pub branches: &'static [Branch],
}

/// Types of which a value has one.
#[derive(Debug)]
pub struct AlternateInfo {
    /// Its name in the schema, and in error texts.
    pub name: &'static str,
    /// What it is for.
    pub doc: &'static str,
    /// The types: at most one of each JSON type.
    pub choices: &'static [Type],
}

/// A union: an object with a member that tells which other members there are.
#[derive(Debug)]
pub struct UnionInfo {
    /// Its name in the schema.
    pub name: &'static str,
    /// What it is for.
    pub doc: &'static str,
    /// The member that decides.
    pub tag: &'static str,
    /// Its values, each with the members that come with it.
    pub branches: &'static [Branch],
}

/// One kind of a union.
#[derive(Debug)]
pub struct Branch {
    /// The value of the tag.
    pub value: &'static str,
    /// The members besides the tag.
    pub members: &'static [Member],
}

/// An enumeration.
#[derive(Debug)]
pub struct EnumInfo {
    /// Its name in the schema.
    pub name: &'static str,
    /// What it is for.
    pub doc: &'static str,
    /// Its values.
    pub values: &'static [&'static str],
}

/// An object type.
#[derive(Debug)]
pub struct ObjectInfo {
    /// Its name in the schema.
    pub name: &'static str,
    /// What it is for.
    pub doc: &'static str,
    /// Its members, in the order in which they are checked.
    pub members: &'static [Member],
}

/// A member of an object.
#[derive(Debug, Clone, Copy)]
pub struct Member {
    /// Its name on the wire.
    pub name: &'static str,
    /// What it is for.
    pub doc: &'static str,
    /// Its type.
    pub ty: Type,
    /// Whether it may be left out.
    pub optional: bool,
}

/// A command.
#[derive(Debug)]
pub struct CommandInfo {
    /// Its name on the wire.
    pub name: &'static str,
    /// What it does.
    pub doc: &'static str,
    /// Its arguments, in the order in which they are checked.
    pub arguments: &'static [Member],
    /// All that can be an argument, as a type.
    pub arguments_type: Type,
    /// Further arguments depend on the value of one of these, and are checked by who runs it.
    pub open: bool,
    /// The type of what it returns.
    pub returns: Type,
}

/// An event.
#[derive(Debug)]
pub struct EventInfo {
    /// Its name on the wire.
    pub name: &'static str,
    /// When it is sent.
    pub doc: &'static str,
    /// Its data; none means that the event has no `data` at all.
    pub data: &'static [Member],
}

/// A Rust type that stands for a type of the schema.
pub trait Qapi {
    /// The type that it stands for.
    const TYPE: Type;
    /// Whether a member of this type may be left out.
    const OPTIONAL: bool = false;
    /// Whether there are more members than the table knows; see [`CommandInfo::open`].
    const OPEN: bool = false;

    /// Whether this value is left out of its object.
    fn is_absent(&self) -> bool {
        false
    }
}

impl Qapi for String {
    const TYPE: Type = Type::Str;
}

impl Qapi for i64 {
    const TYPE: Type = Type::Int;
}

impl Qapi for u32 {
    const TYPE: Type = Type::Uint32;
}

impl Qapi for u64 {
    const TYPE: Type = Type::Uint;
}

impl Qapi for f64 {
    const TYPE: Type = Type::Number;
}

impl Qapi for bool {
    const TYPE: Type = Type::Bool;
}

impl Qapi for Value {
    const TYPE: Type = Type::Any;
}

impl<T: Qapi> Qapi for Vec<T> {
    const TYPE: Type = Type::Array(&T::TYPE);
}

impl<T: Qapi> Qapi for Box<T> {
    const TYPE: Type = T::TYPE;
}

impl<T: Qapi> Qapi for Option<T> {
    const TYPE: Type = T::TYPE;
    const OPTIONAL: bool = true;

    fn is_absent(&self) -> bool {
        self.is_none()
    }
}

/// What a command returns that returns nothing: `{}`.
impl Qapi for () {
    const TYPE: Type = Type::Object(|| {
        static INFO: ObjectInfo = ObjectInfo { name: "q_empty", doc: "Nothing.", members: &[] };
        &INFO
    });
}
