//! The declarations of the schema, as macros that make a Rust type and its description at once.

use super::{Member, Type};

/// Enumerations: `Name { Variant = "wire-value", ... }`.
macro_rules! enums {
    ($(
        $(#[doc = $doc:literal])+
        $name:ident { $( $(#[doc = $vdoc:literal])+ $variant:ident = $wire:literal ),+ $(,)? }
    )+) => {$(
        $(#[doc = $doc])+
        #[derive(
            Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize,
        )]
        pub enum $name {
            $( $(#[doc = $vdoc])+ #[serde(rename = $wire)] $variant, )+
        }

        impl $name {
            /// Every value there is.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// The value as it is on the wire.
            pub fn as_str(self) -> &'static str {
                match self { $( Self::$variant => $wire, )+ }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                out.write_str(self.as_str())
            }
        }

        impl $crate::schema::Qapi for $name {
            const TYPE: $crate::schema::Type = {
                static INFO: $crate::schema::EnumInfo = $crate::schema::EnumInfo {
                    name: stringify!($name),
                    doc: concat!($($doc, "\n"),+),
                    values: &[$($wire),+],
                };
                $crate::schema::Type::Enum(&INFO)
            };
        }
    )+};
}

/// Objects: `Name { "wire-name" field: Type, ... }`; a member of type `Option` may be left out. Members
/// that another object has, too, are named with it, `..field: Object`, before or after the braces.
macro_rules! objects {
    ($(
        $(#[doc = $doc:literal])+
        $name:ident $(..$first:ident : $first_ty:ident)? {
            $( $(#[doc = $mdoc:literal])+ $wire:literal $field:ident : $ty:ty ),* $(,)?
        } $(..$last:ident : $last_ty:ident)?
    )+) => {$(
        $(#[doc = $doc])+
        #[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
        pub struct $name {
            $(
                /// Members that other objects have, too.
                #[serde(flatten)]
                pub $first: $first_ty,
            )?
            $(
                $(#[doc = $mdoc])+
                #[serde(rename = $wire, skip_serializing_if = "crate::schema::Qapi::is_absent")]
                pub $field: $ty,
            )*
            $(
                /// Members that other objects have, too.
                #[serde(flatten)]
                pub $last: $last_ty,
            )?
        }

        impl $name {
            /// The members, for the tables.
            pub(crate) const MEMBERS: &'static [$crate::schema::Member] = {
                const OWN: &[$crate::schema::Member] = &[$(
                    $crate::schema::Member {
                        name: $wire,
                        doc: concat!($($mdoc, "\n"),+),
                        ty: <$ty as $crate::schema::Qapi>::TYPE,
                        optional: <$ty as $crate::schema::Qapi>::OPTIONAL,
                    },
                )*];
                const PARTS: &[&[$crate::schema::Member]] =
                    &[$($first_ty::MEMBERS,)? OWN, $($last_ty::MEMBERS,)?];
                const ALL: [$crate::schema::Member; $crate::schema::macros::count(PARTS)] =
                    $crate::schema::macros::join(PARTS);
                &ALL
            };
        }

        impl $crate::schema::Qapi for $name {
            // A function, not a constant: an object may have itself as a member.
            const TYPE: $crate::schema::Type = $crate::schema::Type::Object(|| {
                static INFO: $crate::schema::ObjectInfo = $crate::schema::ObjectInfo {
                    name: stringify!($name),
                    doc: concat!($($doc, "\n"),+),
                    members: $name::MEMBERS,
                };
                &INFO
            });
        }
    )+};
}

/// How many members lists have together.
pub(crate) const fn count(parts: &[&[Member]]) -> usize {
    let (mut sum, mut part) = (0, 0);
    while part < parts.len() {
        sum += parts[part].len();
        part += 1;
    }
    sum
}

/// The lists as one, of `N` members: their [`count`].
pub(crate) const fn join<const N: usize>(parts: &[&[Member]]) -> [Member; N] {
    let mut all = [Member { name: "", doc: "", ty: Type::Null, optional: false }; N];
    let (mut part, mut at) = (0, 0);
    while part < parts.len() {
        let mut member = 0;
        while member < parts[part].len() {
            all[at] = parts[part][member];
            member += 1;
            at += 1;
        }
        part += 1;
    }
    all
}

/// Commands: `Variant(Arguments) = "wire-name" -> Returned`, as an enum and its table.
macro_rules! command_enum {
    (
        $(#[doc = $edoc:literal])+
        $visibility:vis enum $enum:ident, $table:ident;
        $(
            $(#[doc = $doc:literal])+
            $variant:ident $(($arguments:ident))? = $wire:literal -> $returned:ty;
        )+
    ) => {
        static $table: &[$crate::schema::CommandInfo] = &[$(
            $crate::schema::CommandInfo {
                name: $wire,
                doc: concat!($($doc, "\n"),+),
                arguments: $crate::schema::macros::members!($($arguments)?),
                arguments_type: $crate::schema::macros::type_of!($($arguments)?),
                open: $crate::schema::macros::open!($($arguments)?),
                returns: <$returned as $crate::schema::Qapi>::TYPE,
            },
        )+];

        $(#[doc = $edoc])+
        #[derive(Debug, Clone, PartialEq)]
        $visibility enum $enum {
            $( $(#[doc = $doc])+ $variant $(($arguments))?, )+
        }

        impl $enum {
            /// The command's name on the wire.
            $visibility fn name(&self) -> &'static str {
                match self { $( Self::$variant { .. } => $wire, )+ }
            }

            /// The command of that name with these arguments, once they were checked against the
            /// table; `None` if it is not in this table.
            pub(crate) fn decode(
                name: &str,
                arguments: serde_json::Map<String, serde_json::Value>,
            ) -> Option<Result<Self, serde_json::Error>> {
                match name {
                    $(
                        $wire => Some(
                            $crate::schema::macros::decode!($enum, $variant, arguments $(, $arguments)?),
                        ),
                    )+
                    _ => None,
                }
            }
        }
    };
}

/// One arm of `decode`: with or without arguments.
macro_rules! decode {
    ($enum:ident, $variant:ident, $arguments:ident) => {{
        drop($arguments);
        Ok($enum::$variant)
    }};
    ($enum:ident, $variant:ident, $arguments:ident, $ty:ident) => {
        serde_json::from_value::<$ty>(serde_json::Value::Object($arguments)).map($enum::$variant)
    };
}

/// The members of a command's arguments, if it has any.
macro_rules! members {
    () => {
        &[]
    };
    ($ty:ident) => {
        $ty::MEMBERS
    };
}

/// The type of a command's arguments.
macro_rules! type_of {
    () => {
        <() as $crate::schema::Qapi>::TYPE
    };
    ($ty:ident) => {
        <$ty as $crate::schema::Qapi>::TYPE
    };
}

/// Values that a type of the schema describes and Rust types do not: `Name: type expression`.
macro_rules! values {
    ($(
        $(#[doc = $doc:literal])+
        $name:ident : $ty:expr;
    )+) => {$(
        $(#[doc = $doc])+
        #[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub serde_json::Value);

        impl std::ops::Deref for $name {
            type Target = serde_json::Value;

            fn deref(&self) -> &serde_json::Value {
                &self.0
            }
        }

        impl $crate::schema::Qapi for $name {
            const TYPE: $crate::schema::Type = $ty;
        }
    )+};
}

/// Whether a command's arguments are an open set.
macro_rules! open {
    () => {
        false
    };
    ($ty:ident) => {
        <$ty as $crate::schema::Qapi>::OPEN
    };
}

/// Events: `Variant { "wire-name" field: Type, ... } = "WIRE_NAME"`, as an enum and its table.
macro_rules! event_enum {
    ($(
        $(#[doc = $doc:literal])+
        $variant:ident $({ $( $(#[doc = $mdoc:literal])+ $wire:literal $field:ident : $ty:ty ),+ $(,)? })?
            = $name:literal;
    )+) => {
        /// Every event there is.
        pub static EVENTS: &[$crate::schema::EventInfo] = &[$(
            $crate::schema::EventInfo {
                name: $name,
                doc: concat!($($doc, "\n"),+),
                data: &[$($(
                    $crate::schema::Member {
                        name: $wire,
                        doc: concat!($($mdoc, "\n"),+),
                        ty: <$ty as $crate::schema::Qapi>::TYPE,
                        optional: <$ty as $crate::schema::Qapi>::OPTIONAL,
                    },
                )+)?],
            },
        )+];

        /// Something that happened, told to every negotiated monitor.
        #[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
        #[serde(tag = "event", content = "data")]
        pub enum Event {$(
            $(#[doc = $doc])+
            #[serde(rename = $name)]
            $variant $({$(
                $(#[doc = $mdoc])+
                #[serde(rename = $wire, skip_serializing_if = "crate::schema::Qapi::is_absent")]
                $field: $ty,
            )+})?,
        )+}

        impl Event {
            /// The event's name on the wire.
            pub fn name(&self) -> &'static str {
                match self { $( Self::$variant { .. } => $name, )+ }
            }
        }
    };
}

pub(crate) use {command_enum, decode, enums, event_enum, members, objects, open, type_of, values};
