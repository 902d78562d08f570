//! What is to be mirrored, and how; QMP's rules and texts.

use std::sync::Arc;

use crate::bitmap::Granularity;
use crate::jobs::{OnError, SyncMode};
use crate::{Error, Graph, Node, Result};

/// Bytes of pieces under way together, unless something else is asked for, as in QEMU.
const DEFAULT_BUF_SIZE: u64 = 16 << 20;

/// How writes of the guest come to the target: QMP's `MirrorCopyMode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CopyMode {
    /// Some time after they were made.
    #[default]
    Background,
    /// Before they are completed.
    WriteBlocking,
}

/// The arguments of blockdev-mirror.
#[derive(Debug, Clone)]
pub struct MirrorOptions {
    /// Name of the node that is copied.
    pub source: String,
    /// Name of the node that becomes the same.
    pub target: String,
    /// Name of the node that the target takes the place of; the source without it.
    pub replaces: Option<String>,
    /// What is copied of the contents that there are: [`SyncMode::Full`], [`SyncMode::Top`] or [`SyncMode::None`].
    pub sync: SyncMode,
    /// How writes come to the target.
    pub copy_mode: CopyMode,
    /// Bytes of the parts that are copied as a whole; a target with larger clusters has these.
    pub granularity: Option<u64>,
    /// Bytes of pieces that are under way together; 0 for the default. Refused below that.
    pub buf_size: i64,
    /// Whether zeroes may give the target's space back.
    pub unmap: bool,
    /// What is done when the source cannot be read.
    pub on_source_error: OnError,
    /// What is done when the target cannot be written.
    pub on_target_error: OnError,
}

impl MirrorOptions {
    /// `source` to `target`, with QMP's defaults.
    pub fn new(source: &str, target: &str, sync: SyncMode) -> Self {
        Self {
            source: source.to_owned(),
            target: target.to_owned(),
            replaces: None,
            sync,
            copy_mode: CopyMode::Background,
            granularity: None,
            buf_size: 0,
            unmap: true,
            on_source_error: OnError::Report,
            on_target_error: OnError::Report,
        }
    }

    pub(super) fn check_granularity(&self) -> Result<()> {
        let refuse = |text: String| Err(Error::Invalid(text));
        if let Some(granularity) = self.granularity.filter(|bytes| *bytes > 0) {
            if !(512..=64 << 20).contains(&granularity) {
                return refuse(
                    "Parameter 'granularity' expects a value in range [512B, 64MB]".to_owned(),
                );
            }
            if !granularity.is_power_of_two() {
                return refuse("Parameter 'granularity' expects a power of 2".to_owned());
            }
        }
        Ok(())
    }

    pub(super) fn check_way(&self) -> Result<()> {
        let refuse = |text: String| Err(Error::Invalid(text));
        match self.sync {
            SyncMode::Incremental | SyncMode::Bitmap => {
                refuse(format!("Sync mode '{}' not supported", self.sync.name()))
            }
            _ if self.buf_size < 0 => refuse("Invalid parameter 'buf-size'".to_owned()),
            _ => Ok(()),
        }
    }

    /// Bytes of a part. One of a smaller size than the target's clusters would leave the rest of a
    /// cluster to what is below the target.
    pub(super) fn unit(&self, target: &Node) -> u64 {
        let cluster = target.copy_unit();
        let asked = self.granularity.filter(|bytes| *bytes > 0);
        let default = Granularity::default_for(Some(cluster).filter(|bytes| *bytes > 0));
        asked.unwrap_or(default.bytes()).max(cluster)
    }

    pub(super) fn buf_size(&self) -> u64 {
        if self.buf_size == 0 { DEFAULT_BUF_SIZE } else { self.buf_size.unsigned_abs() }
    }

    /// Refuses a node that does not show what the source does.
    pub(super) fn check_replaces(&self, graph: &Graph, source: &Arc<Node>) -> Result<()> {
        let Some(name) = &self.replaces else { return Ok(()) };
        let missing = || Error::Invalid(format!("Failed to find node with node-name='{name}'"));
        let replaced = graph.get(name).ok_or_else(missing)?;
        let mut node = Some(source.clone());
        while let Some(at) = node {
            if Arc::ptr_eq(&at, &replaced) {
                return Ok(());
            }
            node = at.filtered();
        }
        Err(Error::Invalid(format!(
            "Cannot replace '{name}' by a node mirrored from '{}', because it cannot be guaranteed that doing so would not lead to an abrupt change of visible data",
            self.source
        )))
    }
}
