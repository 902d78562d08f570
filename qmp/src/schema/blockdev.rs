//! Values whose members depend on one of them: options of nodes by driver, what images tell by
//! format, bitmaps by name or with their node, and the schema itself. Rust sees them as JSON.
//!
//! `block` reads the options of nodes (`graph/options`); what is said here is what it takes. Nothing
//! holds the two together but care.

use serde_json::{Map, Value};

use super::macros::{enums, objects, values};
use super::{AlternateInfo, Branch, Member, OpenInfo, Qapi, Qcow2CompressionType, Type, UnionInfo};

const fn optional(name: &'static str, doc: &'static str, ty: Type) -> Member {
    Member { name, doc, ty, optional: true }
}

const fn mandatory(name: &'static str, doc: &'static str, ty: Type) -> Member {
    Member { name, doc, ty, optional: false }
}

/// Arguments of `blockdev-add`: a flat union by `driver`.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct BlockdevOptions(pub Map<String, Value>);

impl BlockdevOptions {
    /// What is checked before the one who opens the node gets to see it.
    pub(crate) const MEMBERS: &'static [Member] = &[
        mandatory("driver", "The driver; other options depend on it.", Type::Str),
        optional("node-name", "The node's name.", Type::Str),
    ];
}

impl Qapi for BlockdevOptions {
    const TYPE: Type = Type::Open(|| &OPTIONS);
    const OPEN: bool = true;
}

enums! {
    /// What becomes of discards.
    BlockdevDiscardOptions {
        /// Nothing.
        Ignore = "ignore",
        /// They give space back.
        Unmap = "unmap",
    }

    /// What is done with writes of zeroes.
    BlockdevDetectZeroesOptions {
        /// They are writes like others.
        Off = "off",
        /// They become zero clusters.
        On = "on",
        /// They give their space back.
        Unmap = "unmap",
    }

    /// Yes, no, or as is best.
    OnOffAuto {
        /// As is best.
        Auto = "auto",
        /// Yes.
        On = "on",
        /// No.
        Off = "off",
    }

    /// How files are read and written.
    BlockdevAioOptions {
        /// By threads.
        Threads = "threads",
        /// Through `io_uring`, where the kernel has it.
        IoUring = "io_uring",
    }

    /// Which metadata of an image writes are checked against.
    Qcow2OverlapCheckMode {
        /// None.
        None = "none",
        /// What is at a place that does not change.
        Constant = "constant",
        /// What is in memory anyway.
        Cached = "cached",
        /// All.
        All = "all",
    }

    /// What is known of a bitmap that is stored in an image.
    Qcow2BitmapInfoFlags {
        /// It was not stored at the last close.
        InUse = "in-use",
        /// It follows writes.
        Auto = "auto",
    }
}

objects! {
    /// How a node uses the host's cache.
    BlockdevCacheOptions {
        /// Bypass the host's page cache.
        "direct" direct: Option<bool>,
        /// Ignore flushes.
        "no-flush" no_flush: Option<bool>,
    }

    /// A dirty bitmap and its node.
    BlockDirtyBitmap {
        /// The node.
        "node" node: String,
        /// The bitmap.
        "name" name: String,
    }

    /// Each check of writes against metadata.
    Qcow2OverlapCheckFlags {
        /// Where to start from.
        "template" template: Option<Qcow2OverlapCheckMode>,
        /// Against the header.
        "main-header" main_header: Option<bool>,
        /// Against the active L1 table.
        "active-l1" active_l1: Option<bool>,
        /// Against the active L2 tables.
        "active-l2" active_l2: Option<bool>,
        /// Against the refcount table.
        "refcount-table" refcount_table: Option<bool>,
        /// Against refcount blocks.
        "refcount-block" refcount_block: Option<bool>,
        /// Against the snapshot table.
        "snapshot-table" snapshot_table: Option<bool>,
        /// Against the L1 tables of snapshots.
        "inactive-l1" inactive_l1: Option<bool>,
        /// Against the L2 tables of snapshots.
        "inactive-l2" inactive_l2: Option<bool>,
        /// Against the directory of bitmaps.
        "bitmap-directory" bitmap_directory: Option<bool>,
    }

    /// A bitmap that is stored in an image.
    Qcow2BitmapInfo {
        /// Its name.
        "name" name: String,
        /// Bytes that one bit stands for.
        "granularity" granularity: u64,
        /// What is known of it.
        "flags" flags: Vec<Qcow2BitmapInfoFlags>,
    }

    /// What only qcow2 images have.
    ImageInfoSpecificQCow2 {
        /// "0.10" is version 2 of the format, "1.1" version 3.
        "compat" compat: String,
        /// The external data file.
        "data-file" data_file: Option<String>,
        /// Whether it can be read as a raw image.
        "data-file-raw" data_file_raw: Option<bool>,
        /// Whether clusters have subclusters.
        "extended-l2" extended_l2: Option<bool>,
        /// Whether refcounts may be behind.
        "lazy-refcounts" lazy_refcounts: Option<bool>,
        /// Whether it was found damaged.
        "corrupt" corrupt: Option<bool>,
        /// Bits of a refcount.
        "refcount-bits" refcount_bits: i64,
        /// The stored bitmaps.
        "bitmaps" bitmaps: Option<Vec<Qcow2BitmapInfo>>,
        /// How clusters are compressed.
        "compression-type" compression_type: Qcow2CompressionType,
    }

    /// What only files have: nothing.
    ImageInfoSpecificFile {}
}

static OPTIONS: OpenInfo = OpenInfo {
    name: "BlockdevOptions",
    doc: "A node of the block graph, and those below it.",
    tag: "driver",
    base: &[
        optional("node-name", "The node's name.", Type::Str),
        optional("discard", "What becomes of discards.", BlockdevDiscardOptions::TYPE),
        optional("cache", "The use of the host's cache.", BlockdevCacheOptions::TYPE),
        optional("read-only", "Whether nothing is written.", Type::Bool),
        optional("auto-read-only", "Read-only where the file is.", Type::Bool),
        optional("force-share", "Whether others may write meanwhile.", Type::Bool),
        optional("detect-zeroes", "What zeroes become.", BlockdevDetectZeroesOptions::TYPE),
    ],
    branches: &[
        Branch { value: "compress", members: &[FILE] },
        Branch { value: "file", members: FILE_MEMBERS },
        Branch { value: "host_device", members: FILE_MEMBERS },
        Branch {
            value: "qcow2",
            members: &[
                FILE,
                optional("backing", "The backing file; null is none.", REF_OR_NULL),
                optional("lazy-refcounts", "Let refcounts be behind.", Type::Bool),
                optional("pass-discard-request", "Discards by the guest.", Type::Bool),
                optional("pass-discard-snapshot", "Discards by deletions.", Type::Bool),
                optional("pass-discard-other", "Other discards.", Type::Bool),
                optional("discard-no-unref", "Keep discarded clusters.", Type::Bool),
                optional("overlap-check", "Checks of writes.", OVERLAP_CHECK),
                optional("cache-size", "Bytes of all caches.", Type::Uint),
                optional("l2-cache-size", "Bytes of the L2 cache.", Type::Uint),
                optional("l2-cache-entry-size", "Bytes of an entry.", Type::Uint),
                optional("refcount-cache-size", "Bytes of the refcount cache.", Type::Uint),
                optional("cache-clean-interval", "Seconds; 0 is never.", Type::Uint),
                optional("data-file", "The external data file.", REF),
                optional("x-snapshot-id", "Show this internal snapshot.", Type::Str),
                optional("x-snapshot-date", "When it was made: seconds, nine decimals.", Type::Str),
            ],
        },
        Branch {
            value: "raw",
            members: &[
                FILE,
                optional("offset", "Where in the file it begins.", Type::Uint),
                optional("size", "How many bytes of the file it is.", Type::Uint),
            ],
        },
    ],
};

const FILE: Member = mandatory("file", "The file.", REF);

const FILE_MEMBERS: &[Member] = &[
    mandatory("filename", "The file's name.", Type::Str),
    optional("locking", "Whether the file is locked.", OnOffAuto::TYPE),
    optional("aio", "How it is read and written.", BlockdevAioOptions::TYPE),
];

const REF: Type = Type::Alternate(&AlternateInfo {
    name: "BlockdevRef",
    doc: "A node's name, or the options of one to be opened.",
    choices: &[Type::Str, Type::Open(|| &OPTIONS)],
});

const REF_OR_NULL: Type = Type::Alternate(&AlternateInfo {
    name: "BlockdevRefOrNull",
    doc: "A node's name, the options of one to be opened, or none.",
    choices: &[Type::Str, Type::Open(|| &OPTIONS), Type::Null],
});

const OVERLAP_CHECK: Type = Type::Alternate(&AlternateInfo {
    name: "Qcow2OverlapChecks",
    doc: "A set of checks by its name, or one by one.",
    choices: &[Qcow2OverlapCheckMode::TYPE, Qcow2OverlapCheckFlags::TYPE],
});

static SPECIFIC: UnionInfo = UnionInfo {
    name: "ImageInfoSpecific",
    doc: "What only this format has.",
    tag: "type",
    branches: &[
        Branch { value: "qcow2", members: &[data(ImageInfoSpecificQCow2::TYPE)] },
        Branch { value: "file", members: &[data(ImageInfoSpecificFile::TYPE)] },
    ],
};

const fn data(ty: Type) -> Member {
    mandatory("data", "What the format tells.", ty)
}

values! {
    /// The options of a node of `blockdev-reopen`.
    BlockdevOptionsRef: Type::Open(|| &OPTIONS);

    /// A node's name, or the options of one to be opened.
    BlockdevRef: REF;

    /// A bitmap's name, or an object with its name and that of its node.
    BlockDirtyBitmapOrStr: Type::Alternate(&AlternateInfo {
        name: "BlockDirtyBitmapOrStr",
        doc: "A bitmap by its name, or with its node.",
        choices: &[Type::Str, BlockDirtyBitmap::TYPE],
    });

    /// What only this format has.
    ImageInfoSpecific: Type::Union(&SPECIFIC);
}

/// An entry of `query-qmp-schema`: see [`super::introspect`].
static SCHEMA: OpenInfo = OpenInfo {
    name: "SchemaInfo",
    doc: "A command, an event or a type.",
    tag: "meta-type",
    base: &[
        mandatory("name", "Its name; of types a number.", Type::Str),
        optional("features", "What it can do besides.", Type::Array(&Type::Str)),
    ],
    branches: &[
        Branch {
            value: "builtin",
            members: &[mandatory("json-type", "Its JSON type.", JsonType::TYPE)],
        },
        Branch {
            value: "enum",
            members: &[
                mandatory("members", "Its values.", Type::Array(&SchemaInfoEnumMember::TYPE)),
                mandatory("values", "The same.", Type::Array(&Type::Str)),
            ],
        },
        Branch {
            value: "array",
            members: &[mandatory("element-type", "The type of its elements.", Type::Str)],
        },
        Branch {
            value: "object",
            members: &[
                mandatory("members", "Its members.", Type::Array(&SchemaInfoObjectMember::TYPE)),
                optional("tag", "The member that decides on others.", Type::Str),
                optional("variants", "The others.", Type::Array(&SchemaInfoObjectVariant::TYPE)),
            ],
        },
        Branch {
            value: "alternate",
            members: &[mandatory(
                "members",
                "What it can be.",
                Type::Array(&SchemaInfoAlternateMember::TYPE),
            )],
        },
        Branch {
            value: "command",
            members: &[
                mandatory("arg-type", "Its arguments.", Type::Str),
                mandatory("ret-type", "What it returns.", Type::Str),
                optional("allow-oob", "Whether it may run out of band.", Type::Bool),
            ],
        },
        Branch { value: "event", members: &[mandatory("arg-type", "Its data.", Type::Str)] },
    ],
};

enums! {
    /// Types of JSON.
    JsonType {
        /// A string.
        String = "string",
        /// A number.
        Number = "number",
        /// A number without a fraction.
        Int = "int",
        /// `true` or `false`.
        Boolean = "boolean",
        /// `null`.
        Null = "null",
        /// An object.
        Object = "object",
        /// An array.
        Array = "array",
        /// Any of them.
        Value = "value",
    }
}

objects! {
    /// A value of an enum.
    SchemaInfoEnumMember {
        /// The value.
        "name" name: String,
    }

    /// A type of an alternate.
    SchemaInfoAlternateMember {
        /// The type.
        "type" kind: String,
    }

    /// The members that come with a value of the tag.
    SchemaInfoObjectVariant {
        /// The value.
        "case" case: String,
        /// An object type with them.
        "type" kind: String,
    }
}

/// A member of an object type: its `default` is there, and `null`, where it may be left out.
struct SchemaInfoObjectMember;

impl Qapi for SchemaInfoObjectMember {
    const TYPE: Type = Type::Object(|| {
        static INFO: super::ObjectInfo = super::ObjectInfo {
            name: "SchemaInfoObjectMember",
            doc: "A member of an object.",
            members: &[
                mandatory("name", "Its name.", Type::Str),
                mandatory("type", "Its type.", Type::Str),
                optional("default", "null, where it may be left out.", Type::Any),
            ],
        };
        &INFO
    });
}

values! {
    /// An entry of `query-qmp-schema`.
    SchemaInfo: Type::Open(|| &SCHEMA);
}
