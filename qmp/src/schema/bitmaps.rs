//! Dirty bitmaps.

use super::BlockDirtyBitmapOrStr;
use super::macros::objects;

objects! {
    /// Arguments of the commands about one dirty bitmap.
    BitmapArguments {
        /// The node.
        "node" node: String,
        /// The bitmap.
        "name" name: String,
    }

    /// Arguments of `block-dirty-bitmap-add`.
    BitmapAddArguments {
        /// The node.
        "node" node: String,
        /// The bitmap's name.
        "name" name: String,
        /// Bytes that one bit stands for; the cluster size, within 4 KiB and 64 KiB, without it.
        "granularity" granularity: Option<u32>,
        /// Store it in the image when that is closed.
        "persistent" persistent: Option<bool>,
        /// Do not note writes yet.
        "disabled" disabled: Option<bool>,
    }

    /// Arguments of `block-dirty-bitmap-merge`.
    BitmapMergeArguments {
        /// The node of the target.
        "node" node: String,
        /// The bitmap that is added to.
        "target" target: String,
        /// The sources: each a bitmap's name on the same node, or an object of `node` and `name`.
        "bitmaps" bitmaps: Vec<BlockDirtyBitmapOrStr>,
    }

    /// A dirty bitmap.
    BlockDirtyInfo {
        /// Its name.
        "name" name: Option<String>,
        /// Dirty bytes.
        "count" count: i64,
        /// Bytes that one bit stands for.
        "granularity" granularity: u64,
        /// Whether writes are noted.
        "recording" recording: bool,
        /// Whether an export or a job has it: it cannot be changed by commands.
        "busy" busy: bool,
        /// Whether it is stored in the image when that is closed.
        "persistent" persistent: bool,
        /// Set if it was not stored properly: it can only be removed.
        "inconsistent" inconsistent: Option<bool>,
    }
}
