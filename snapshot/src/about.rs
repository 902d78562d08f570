//! What a checkpoint records besides the machine: where it comes from, and what people said
//! of it.
//!
//! A checkpoint names its parent by tag, date and clock: a tag that was deleted and used again is
//! another checkpoint. It names the parent's parents, too, so that a checkpoint whose parent was
//! deleted still has its place in the tree.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Most ancestors that are recorded.
pub(crate) const MAX_ANCESTORS: usize = 64;
/// Most bytes of a description.
const MAX_DESCRIPTION: usize = 4096;
/// Most labels.
const MAX_LABELS: usize = 64;
/// Most bytes of a label's key.
const MAX_KEY: usize = 63;
/// Most bytes of a label's value.
const MAX_VALUE: usize = 255;

/// What all snapshots of one checkpoint have in common, and no other checkpoint has.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Stamp {
    /// The tag; at most 255 bytes are kept.
    pub tag: String,
    /// Seconds since the epoch.
    pub date_sec: u32,
    /// Nanoseconds within the second.
    pub date_nsec: u32,
    /// Time the guest has been running, in nanoseconds.
    pub vm_clock_nsec: u64,
}

impl Stamp {
    /// The stamp of a snapshot in an image's table.
    pub fn of(snapshot: &block::SnapshotInfo) -> Self {
        Self {
            tag: snapshot.tag.clone(),
            date_sec: snapshot.date_sec,
            date_nsec: snapshot.date_nsec,
            vm_clock_nsec: snapshot.vm_clock_nsec,
        }
    }
}

/// What is recorded of a checkpoint besides the machine and its disks.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct About {
    /// What people said it is.
    pub description: String,
    /// What tools know it by.
    pub labels: BTreeMap<String, String>,
    /// The checkpoints that the guest comes from, the parent first.
    pub ancestors: Vec<Stamp>,
    /// The node with the VM state. A save fills it in.
    pub vmstate: String,
    /// What relative file names of kernel and images are relative to.
    pub directory: String,
}

/// A description or label that cannot be recorded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AboutError {
    /// Too long a description.
    #[error("the description has {0} bytes, at most {MAX_DESCRIPTION} are kept")]
    Description(usize),
    /// Too many labels.
    #[error("there are {0} labels, at most {MAX_LABELS} are kept")]
    Labels(usize),
    /// A key that is empty, too long, or not to be told from its value.
    #[error(
        "label '{}': a key has 1 to {MAX_KEY} bytes, without '=' and control characters",
        .0.escape_debug()
    )]
    Key(String),
    /// Too long a value.
    #[error("label '{key}': the value has {len} bytes, at most {MAX_VALUE} are kept")]
    Value {
        /// The label.
        key: String,
        /// Bytes of the value.
        len: usize,
    },
}

impl About {
    /// Checks what people said.
    ///
    /// # Errors
    /// Names what is too long, too many or malformed.
    pub fn check(&self) -> Result<(), AboutError> {
        if self.description.len() > MAX_DESCRIPTION {
            return Err(AboutError::Description(self.description.len()));
        }
        if self.labels.len() > MAX_LABELS {
            return Err(AboutError::Labels(self.labels.len()));
        }
        for (key, value) in &self.labels {
            let malformed = key.chars().any(|c| c == '=' || c.is_control());
            if malformed || !(1..=MAX_KEY).contains(&key.len()) {
                return Err(AboutError::Key(key.clone()));
            }
            if value.len() > MAX_VALUE {
                return Err(AboutError::Value { key: key.clone(), len: value.len() });
            }
        }
        Ok(())
    }
}

/// The checkpoints that a guest comes from: the one it was saved to or loaded from last, then that
/// one's ancestors.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Lineage(Vec<Stamp>);

impl Lineage {
    /// The lineage of a guest that was just saved as, or loaded from, a checkpoint with these
    /// ancestors.
    pub fn at(checkpoint: Stamp, ancestors: &[Stamp]) -> Self {
        let older = ancestors.iter().take(MAX_ANCESTORS - 1).cloned();
        Self(std::iter::once(checkpoint).chain(older).collect())
    }

    /// The nearest first.
    pub fn stamps(&self) -> &[Stamp] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp(n: u32) -> Stamp {
        Stamp { tag: n.to_string(), date_sec: n, date_nsec: 0, vm_clock_nsec: 0 }
    }

    #[test]
    fn a_lineage_has_the_nearest_first_and_forgets_the_oldest() {
        let mut lineage = Lineage::default();
        for n in 0..100 {
            lineage = Lineage::at(stamp(n), lineage.stamps());
        }
        let dates: Vec<_> = lineage.stamps().iter().map(|s| s.date_sec).collect();
        assert_eq!(dates, (36..100).rev().collect::<Vec<_>>());
    }

    #[test]
    fn what_cannot_be_kept_is_named() {
        let labelled = |key: &str, value: &str| About {
            labels: BTreeMap::from([(key.to_owned(), value.to_owned())]),
            ..About::default()
        };
        assert_eq!(labelled("ci/job", "17 = x").check(), Ok(()));
        for key in ["", "a=b", "a\nb", &"k".repeat(64)] {
            assert_eq!(labelled(key, "").check(), Err(AboutError::Key(key.to_owned())));
        }
        let long = labelled("k", &"v".repeat(256)).check().unwrap_err().to_string();
        assert_eq!(long, "label 'k': the value has 256 bytes, at most 255 are kept");
        let many = (0..65).map(|n| (n.to_string(), String::new())).collect();
        let about = About { labels: many, ..About::default() };
        assert_eq!(about.check(), Err(AboutError::Labels(65)));
        let about = About { description: "d".repeat(4097), ..About::default() };
        assert_eq!(about.check(), Err(AboutError::Description(4097)));
    }
}
