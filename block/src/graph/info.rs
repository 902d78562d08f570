//! What QMP tells of a node: `BlockDeviceInfo` and `ImageInfo`, with QMP's member names.

use std::sync::Arc;

use serde::Serialize;
use serde_json::{Value, json};

use super::Graph;
use crate::Result;
use crate::bitmap::BitmapInfo;
use crate::node::Node;
use crate::qcow2::{Compression, Qcow2, Qcow2Info, StoredBitmap};
use crate::snapshot::SnapshotInfo;

/// Most images that are told of one in the other: parsers of JSON refuse to go much deeper, and as each
/// node tells of all below it, the answer would grow with the square of the chain.
const MOST_NESTED: usize = 200;

/// Most images that one answer about all nodes tells of within others.
const MOST_IN_ALL: usize = 10_000;

/// `BlockDeviceInfo`: an element of query-named-block-nodes, and `inserted` of query-block.
#[derive(Debug, Clone, Serialize)]
pub struct NodeInfo {
    /// The node's name.
    #[serde(rename = "node-name")]
    pub node_name: String,
    /// Its driver.
    pub drv: String,
    /// The file it is in.
    pub file: String,
    /// Whether writes are refused.
    pub ro: bool,
    /// Whether the image is this process's: not once a migration has given it to another one.
    pub active: bool,
    /// Never: encrypted images are refused.
    pub encrypted: bool,
    /// What is done with writes of zeroes: "off", "on" or "unmap".
    pub detect_zeroes: String,
    /// The backing file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_file: Option<String>,
    /// How many images are below.
    pub backing_file_depth: u64,
    /// Throttling: none.
    pub bps: u64,
    /// Throttling: none.
    pub bps_rd: u64,
    /// Throttling: none.
    pub bps_wr: u64,
    /// Throttling: none.
    pub iops: u64,
    /// Throttling: none.
    pub iops_rd: u64,
    /// Throttling: none.
    pub iops_wr: u64,
    /// Cache options.
    pub cache: CacheInfo,
    /// Write threshold events: none.
    pub write_threshold: u64,
    /// Dirty bitmaps, the newest first.
    #[serde(rename = "dirty-bitmaps", skip_serializing_if = "Vec::is_empty")]
    pub dirty_bitmaps: Vec<BitmapInfo>,
    /// The image.
    pub image: ImageInfo,
}

/// `BlockdevCacheInfo`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct CacheInfo {
    /// Writes are durable after a flush only.
    pub writeback: bool,
    /// The host's page cache is bypassed.
    pub direct: bool,
    /// Flushes are ignored.
    pub no_flush: bool,
}

/// `ImageInfo`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ImageInfo {
    /// The file it is in.
    pub filename: String,
    /// Its format.
    pub format: String,
    /// Bytes of the guest's disk.
    pub virtual_size: u64,
    /// Bytes of host space.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub actual_size: Option<u64>,
    /// Bytes of a cluster.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_size: Option<u64>,
    /// Not closed properly.
    pub dirty_flag: bool,
    /// `ImageInfoSpecific`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format_specific: Option<Value>,
    /// Internal snapshots.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub snapshots: Vec<Value>,
    /// Backing file as the image has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_filename: Option<String>,
    /// Backing file with its directory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub full_backing_filename: Option<String>,
    /// Backing format as the image has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_filename_format: Option<String>,
    /// The backing image. Below the 200th there is none, and where all nodes are told of together none
    /// once 10000 have been; `backing_file_depth` counts all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_image: Option<Box<ImageInfo>>,
}

/// `SnapshotInfo` of QMP.
pub fn snapshot_json(info: &SnapshotInfo) -> Value {
    let mut value = json!({
        "id": info.id,
        "name": info.tag,
        "vm-state-size": info.vm_state_size,
        "date-sec": info.date_sec,
        "date-nsec": info.date_nsec,
        "vm-clock-sec": info.vm_clock_nsec / 1_000_000_000,
        "vm-clock-nsec": info.vm_clock_nsec % 1_000_000_000,
    });
    if let (Some(icount), Some(members)) = (info.icount, value.as_object_mut()) {
        members.insert("icount".to_owned(), icount.into());
    }
    value
}

/// `Qcow2BitmapInfo` of QMP.
fn stored_json(bitmap: &StoredBitmap) -> Value {
    let mut flags = Vec::new();
    if bitmap.in_use {
        flags.push("in-use");
    }
    if bitmap.auto {
        flags.push("auto");
    }
    json!({"name": bitmap.name, "granularity": bitmap.granularity, "flags": flags})
}

impl ImageInfo {
    /// How many images it tells of below its own.
    fn nested(&self) -> usize {
        std::iter::successors(self.backing_image.as_deref(), |info| info.backing_image.as_deref())
            .count()
    }
}

impl Graph {
    /// What QMP tells of all nodes, the newest first.
    ///
    /// # Errors
    /// A file cannot be looked at.
    pub fn infos(&self, flat: bool) -> Result<Vec<NodeInfo>> {
        let mut left = MOST_IN_ALL;
        let info = |node: &Arc<Node>| {
            let info = node.info_with(flat, left)?;
            left -= info.image.nested();
            Ok(info)
        };
        self.list().iter().map(info).collect()
    }
}

impl Node {
    /// What QMP tells of the node; `flat` leaves out the images below.
    pub fn info(&self, flat: bool) -> Result<NodeInfo> {
        self.info_with(flat, MOST_NESTED)
    }

    /// As [`Node::info`], with `most` images below at most.
    fn info_with(&self, flat: bool, most: usize) -> Result<NodeInfo> {
        let flags = self.details().flags;
        let backing_file = self.backing().map(|b| b.filename());
        Ok(NodeInfo {
            node_name: self.name().to_owned(),
            drv: self.format().driver().to_owned(),
            file: self.filename(),
            ro: self.refuses_writes(),
            active: !self.is_inactive(),
            encrypted: false,
            detect_zeroes: flags.detect_zeroes.as_str().to_owned(),
            backing_file,
            backing_file_depth: if flat { 0 } else { self.backing_depth() },
            bps: 0,
            bps_rd: 0,
            bps_wr: 0,
            iops: 0,
            iops_rd: 0,
            iops_wr: 0,
            cache: CacheInfo { writeback: true, direct: flags.direct, no_flush: flags.no_flush },
            write_threshold: 0,
            dirty_bitmaps: self.bitmaps().infos(),
            image: self.image_info(if flat { 0 } else { most.min(MOST_NESTED) })?,
        })
    }

    /// How many images are below this one.
    fn backing_depth(&self) -> u64 {
        let mut depth = 0;
        let mut node = self.backing();
        while let Some(below) = node {
            depth += 1;
            node = below.backing();
        }
        depth
    }

    /// With `most` of the images below.
    fn image_info(&self, most: usize) -> Result<ImageInfo> {
        let below = std::iter::successors(self.backing(), |node| node.backing()).take(most);
        let below: Vec<_> = below.map(|node| node.own_info()).collect::<Result<_>>()?;
        let mut info = self.own_info()?;
        info.backing_image = below.into_iter().rev().fold(None, |below, mut info| {
            info.backing_image = below;
            Some(Box::new(info))
        });
        Ok(info)
    }

    fn own_info(&self) -> Result<ImageInfo> {
        let format = self.format();
        let mut info = ImageInfo {
            filename: self.filename(),
            format: format.driver().to_owned(),
            virtual_size: format.size(),
            actual_size: match self.storage() {
                Some(storage) => Some(storage.allocated()?),
                None => None,
            },
            cluster_size: None,
            dirty_flag: false,
            format_specific: None,
            snapshots: format.snapshots().iter().map(snapshot_json).collect(),
            backing_filename: None,
            full_backing_filename: None,
            backing_filename_format: None,
            backing_image: None,
        };
        if matches!(format.driver(), "file" | "host_device") {
            info.format_specific = Some(json!({"type": format.driver(), "data": {}}));
        }
        if let Some(qcow2) = self.qcow2() {
            let own = qcow2.info();
            info.format_specific = Some(qcow2_specific(&qcow2, &own));
            info.cluster_size = Some(own.cluster_size);
            info.dirty_flag = own.dirty;
            info.backing_filename = own.backing_file;
            info.backing_filename_format = own.backing_format;
            info.full_backing_filename = self.details().full_backing.clone();
        }
        Ok(info)
    }
}

/// `ImageInfoSpecific` of a qcow2 image.
fn qcow2_specific(image: &Qcow2, own: &Qcow2Info) -> Value {
    let mut data = json!({
        "compat": own.compat,
        "compression-type": match own.compression {
            Compression::Zlib => "zlib",
            Compression::Zstd => "zstd",
        },
        "refcount-bits": own.refcount_bits,
    });
    // Version 2 knows nothing of these, and QEMU says nothing of them.
    if own.compat != "0.10" {
        data["lazy-refcounts"] = own.lazy_refcounts.into();
        data["corrupt"] = own.corrupt.into();
        data["extended-l2"] = own.extended_l2.into();
    }
    if let Some(raw) = own.data_file_raw {
        data["data-file-raw"] = raw.into();
        if let Some(name) = &own.data_file {
            data["data-file"] = name.as_str().into();
        }
    }
    let bitmaps: Vec<Value> = image.stored_bitmaps().iter().map(stored_json).collect();
    if !bitmaps.is_empty() {
        data["bitmaps"] = bitmaps.into();
    }
    json!({"type": "qcow2", "data": data})
}
