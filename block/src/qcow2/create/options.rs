//! The options of a new image, checked as QEMU checks them.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::preallocation::Preallocation;
use crate::qcow2::header::{Compression, MAX_BACKING_NAME};
use crate::{Error, Result};

use super::maps;

/// A version of the format (QAPI `BlockdevQcow2Version`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Version {
    /// `compat=0.10`.
    V2,
    /// `compat=1.1`.
    #[default]
    V3,
}

/// QAPI `BlockdevCreateOptionsQcow2` but for `file` and `data-file`, which are storages here.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct CreateOptions {
    /// Size of the guest's disk in bytes, a multiple of 512.
    pub size: u64,
    /// Version of the format; v3.
    #[serde(default)]
    pub version: Option<Version>,
    /// Name of the backing file, kept as it is and not looked at.
    #[serde(default)]
    pub backing_file: Option<String>,
    /// Its format.
    #[serde(default)]
    pub backing_fmt: Option<String>,
    /// Encryption, which is refused.
    #[serde(default)]
    pub encrypt: Option<Value>,
    /// Cluster size in bytes; 65536.
    #[serde(default)]
    pub cluster_size: Option<u64>,
    /// What is taken ahead of time; off.
    #[serde(default)]
    pub preallocation: Option<Preallocation>,
    /// Refcounts may be written late; off.
    #[serde(default)]
    pub lazy_refcounts: Option<bool>,
    /// Width of a refcount; 16.
    #[serde(default)]
    pub refcount_bits: Option<u32>,
    /// The data file stays a raw image of the disk; off.
    #[serde(default)]
    pub data_file_raw: Option<bool>,
    /// L2 entries with a bitmap of subclusters; off.
    #[serde(default)]
    pub extended_l2: Option<bool>,
    /// How clusters are compressed; zlib.
    #[serde(default, deserialize_with = "compression")]
    pub compression_type: Option<Compression>,
}

fn compression<'de, D: serde::Deserializer<'de>>(
    from: D,
) -> std::result::Result<Option<Compression>, D::Error> {
    let name: Option<String> = Option::deserialize(from)?;
    name.map(|name| CreateOptions::compression_of(&name).map_err(serde::de::Error::custom))
        .transpose()
}

/// The options, complete and consistent.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) size: u64,
    pub(super) version: Version,
    pub(super) cluster_bits: u32,
    pub(super) refcount_order: u32,
    pub(super) backing_file: Option<String>,
    pub(super) backing_fmt: Option<String>,
    pub(super) lazy_refcounts: bool,
    pub(super) preallocation: Preallocation,
    pub(super) external: bool,
    pub(super) data_file_raw: bool,
    pub(super) extended_l2: bool,
    pub(super) compression: Compression,
}

impl CreateOptions {
    /// The compression of a name.
    pub fn compression_of(name: &str) -> Result<Compression> {
        match name {
            "zlib" => Ok(Compression::Zlib),
            "zstd" => Ok(Compression::Zstd),
            other => Err(Error::Invalid(format!(
                "Parameter 'compression-type' does not accept value '{other}'"
            ))),
        }
    }

    /// Checks what can be checked without a file; `external` tells whether there is a data file.
    ///
    /// # Errors
    /// QEMU's texts.
    pub fn validate(&self, external: bool) -> Result<()> {
        self.check(external).map(|_| ())
    }

    /// Checks what can be checked without a file; `external` tells whether there is a data file.
    ///
    /// # Errors
    /// QEMU's texts.
    pub(super) fn check(&self, external: bool) -> Result<Plan> {
        let mut plan = Plan {
            size: self.size,
            version: self.version.unwrap_or_default(),
            cluster_bits: self.cluster_size().trailing_zeros(),
            refcount_order: self.refcount_bits().trailing_zeros(),
            backing_file: self.backing_file.clone().filter(|name| !name.is_empty()),
            backing_fmt: self.backing_fmt.clone(),
            lazy_refcounts: self.lazy_refcounts.unwrap_or(false),
            preallocation: self.preallocation.unwrap_or_default(),
            external,
            data_file_raw: self.data_file_raw.unwrap_or(false),
            extended_l2: self.extended_l2.unwrap_or(false),
            compression: self.compression_type.unwrap_or(Compression::Zlib),
        };
        if let Some(text) = self.broken_rule(&plan) {
            return Err(Error::Invalid(text.to_owned()));
        }
        if plan.data_file_raw && !maps(plan.preallocation) {
            // The data file is the disk whatever the tables say, so they must say all of it.
            plan.preallocation = Preallocation::Metadata;
        }
        Ok(plan)
    }

    fn cluster_size(&self) -> u64 {
        self.cluster_size.unwrap_or(65536)
    }

    fn refcount_bits(&self) -> u32 {
        self.refcount_bits.unwrap_or(16)
    }

    /// The first of QEMU's rules that is broken, as QEMU says it.
    fn broken_rule(&self, plan: &Plan) -> Option<&'static str> {
        let (cluster_size, refcount_bits) = (self.cluster_size(), self.refcount_bits());
        let v2 = plan.version == Version::V2;
        let backing = plan.backing_file.as_deref();
        let rules = [
            (self.encrypt.is_some(), "Encryption ('encrypt') of qcow2 images is not supported"),
            (!plan.size.is_multiple_of(512), "Image size must be a multiple of 512 bytes"),
            (plan.size > i64::MAX as u64, "The image size is larger than a file can be"),
            (
                !cluster_size.is_power_of_two() || !(512..=2 << 20).contains(&cluster_size),
                "Cluster size must be a power of two between 512 and 2048k",
            ),
            (
                plan.extended_l2 && v2,
                "Extended L2 entries are only supported with compatibility level 1.1 and above (use version=v3 or greater)",
            ),
            (
                plan.extended_l2 && cluster_size < 16384,
                "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
            ),
            (
                maps(plan.preallocation) && backing.is_some() && !plan.extended_l2,
                "Backing file and preallocation can only be used at the same time if extended_l2 is on",
            ),
            (
                plan.backing_fmt.is_some() && backing.is_none(),
                "Backing format cannot be used without backing file",
            ),
            (
                backing.is_some_and(|name| name.len() > MAX_BACKING_NAME as usize),
                "Backing file name too long",
            ),
            (
                plan.lazy_refcounts && v2,
                "Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 or greater)",
            ),
            (
                !refcount_bits.is_power_of_two() || refcount_bits > 64,
                "Refcount width must be a power of two and may not exceed 64 bits",
            ),
            (
                refcount_bits != 16 && v2,
                "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)",
            ),
            (plan.data_file_raw && !plan.external, "data-file-raw requires data-file"),
            (
                plan.data_file_raw && backing.is_some(),
                "Backing file and data-file-raw cannot be used at the same time",
            ),
            (
                plan.external && v2,
                "External data files are only supported with compatibility level 1.1 and above (use version=v3 or greater)",
            ),
            (
                plan.compression != Compression::Zlib && v2,
                "Non-zlib compression type is only supported with compatibility level 1.1 and above (use version=v3 or greater)",
            ),
        ];
        rules.into_iter().find_map(|(broken, text)| broken.then_some(text))
    }
}
