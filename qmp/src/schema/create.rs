//! New images: `blockdev-create`.

use serde_json::{Map, Value};

use super::macros::{enums, objects};
use super::{BlockdevRef, Branch, Qapi, Type, UnionInfo};

enums! {
    /// How much of an image's space is taken when it is made.
    PreallocMode {
        /// None.
        Off = "off",
        /// Its tables.
        Metadata = "metadata",
        /// All, without writing it.
        Falloc = "falloc",
        /// All, by writing it.
        Full = "full",
    }

    /// Versions of the qcow2 format.
    BlockdevQcow2Version {
        /// `compat=0.10`.
        V2 = "v2",
        /// `compat=1.1`.
        V3 = "v3",
    }

    /// How clusters are compressed.
    Qcow2CompressionType {
        /// Deflate.
        Zlib = "zlib",
        /// Zstandard.
        Zstd = "zstd",
    }
}

objects! {
    /// A file, from `blockdev-create`.
    BlockdevCreateOptionsFile {
        /// Its path.
        "filename" filename: String,
        /// Bytes.
        "size" size: u64,
        /// What of its space is taken now.
        "preallocation" preallocation: Option<PreallocMode>,
        /// Whether it is written in place on btrfs.
        "nocow" nocow: Option<bool>,
    }

    /// A qcow2 image, from `blockdev-create`.
    BlockdevCreateOptionsQcow2 {
        /// The node that it is made in, or a file by its `driver` and `filename`.
        "file" file: BlockdevRef,
        /// The same for its data, if that is to be elsewhere.
        "data-file" data_file: Option<BlockdevRef>,
        /// Whether the data file stays a raw image.
        "data-file-raw" data_file_raw: Option<bool>,
        /// Whether clusters have subclusters.
        "extended-l2" extended_l2: Option<bool>,
        /// Bytes of the disk.
        "size" size: u64,
        /// Version of the format; v3 by default.
        "version" version: Option<BlockdevQcow2Version>,
        /// What it is to call its backing file; not looked at.
        "backing-file" backing_file: Option<String>,
        /// The format of it.
        "backing-fmt" backing_fmt: Option<String>,
        /// Encryption; refused.
        "encrypt" encrypt: Option<Value>,
        /// Bytes of a cluster.
        "cluster-size" cluster_size: Option<u64>,
        /// What of its space is taken now.
        "preallocation" preallocation: Option<PreallocMode>,
        /// Whether refcounts may be written late.
        "lazy-refcounts" lazy_refcounts: Option<bool>,
        /// Width of a refcount.
        "refcount-bits" refcount_bits: Option<i64>,
        /// How clusters are compressed.
        "compression-type" compression_type: Option<Qcow2CompressionType>,
    }

    /// Arguments of `blockdev-create`.
    CreateArguments {
        /// The job to create.
        "job-id" job_id: String,
        /// The image.
        "options" options: BlockdevCreateOptions,
    }
}

/// An image to be made: a flat union by `driver`.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct BlockdevCreateOptions(pub Map<String, Value>);

impl Qapi for BlockdevCreateOptions {
    const TYPE: Type = Type::Union(&UnionInfo {
        name: "BlockdevCreateOptions",
        doc: "An image to be made.",
        tag: "driver",
        branches: &[
            Branch { value: "file", members: BlockdevCreateOptionsFile::MEMBERS },
            Branch { value: "qcow2", members: BlockdevCreateOptionsQcow2::MEMBERS },
            // They are there, and make no images.
            Branch { value: "raw", members: &[] },
            Branch { value: "host_device", members: &[] },
            Branch { value: "compress", members: &[] },
        ],
    });
}
