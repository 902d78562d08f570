//! What is to be backed up, and how; QMP's rules and texts.

use std::sync::Arc;

use crate::bitmap::Bitmap;
use crate::jobs::OnError;
use crate::{Error, Node, Result};

/// Which part of the source is copied: QMP's `MirrorSyncMode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SyncMode {
    /// All of it.
    Full,
    /// What the source's own image has, not those below.
    Top,
    /// What is about to change, for as long as the job is there.
    None,
    /// What a bitmap says; as `Bitmap` with [`BitmapMode::OnSuccess`].
    Incremental,
    /// What a bitmap says.
    Bitmap,
}

impl SyncMode {
    /// QMP's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Top => "top",
            Self::None => "none",
            Self::Incremental => "incremental",
            Self::Bitmap => "bitmap",
        }
    }
}

impl SyncMode {
    /// Whether all that is read through the source is copied.
    pub(in crate::jobs) fn is_whole(self, source: &Node) -> bool {
        self == Self::Full || (self == Self::Top && source.backing().is_none())
    }
}

/// What becomes of the bitmap: QMP's `BitmapSyncMode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BitmapMode {
    /// After success it has what was written since the start.
    OnSuccess,
    /// It stays as if there had been no backup.
    Never,
    /// It has what was written since the start, and what was not copied.
    Always,
}

impl BitmapMode {
    /// QMP's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::OnSuccess => "on-success",
            Self::Never => "never",
            Self::Always => "always",
        }
    }
}

/// What happens where the old contents cannot be saved before a guest's write: `OnCbwError`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnCbwError {
    /// The guest's write fails; the backup goes on.
    #[default]
    BreakGuestWrite,
    /// The guest's write is carried out; the backup fails.
    BreakSnapshot,
}

/// The arguments of blockdev-backup.
#[derive(Debug, Clone)]
pub struct BackupOptions {
    /// Name of the node that is copied.
    pub source: String,
    /// Name of the node that becomes the copy.
    pub target: String,
    /// Which part.
    pub sync: SyncMode,
    /// Name of a bitmap of the source.
    pub bitmap: Option<String>,
    /// What becomes of the bitmap.
    pub bitmap_mode: Option<BitmapMode>,
    /// Whether data is written compressed.
    pub compress: bool,
    /// What is done when the source cannot be read.
    pub on_source_error: OnError,
    /// What is done when the target cannot be written.
    pub on_target_error: OnError,
    /// What is done when the target cannot be written and a guest's write waits for it.
    pub on_cbw_error: OnCbwError,
}

impl BackupOptions {
    /// All of `source` to `target`, with QMP's defaults.
    pub fn new(source: &str, target: &str, sync: SyncMode) -> Self {
        Self {
            source: source.to_owned(),
            target: target.to_owned(),
            sync,
            bitmap: None,
            bitmap_mode: None,
            compress: false,
            on_source_error: OnError::Report,
            on_target_error: OnError::Report,
            on_cbw_error: OnCbwError::BreakGuestWrite,
        }
    }

    /// The bitmap that is used, and what becomes of it.
    pub(super) fn bitmap_of(&self, source: &Node) -> Result<Option<(Arc<Bitmap>, BitmapMode)>> {
        let refuse = |text: String| Err(Error::Invalid(text));
        let sync = self.sync.name();
        let by_bitmap = matches!(self.sync, SyncMode::Incremental | SyncMode::Bitmap);
        let Some(name) = &self.bitmap else {
            if by_bitmap {
                return refuse(format!("must provide a valid bitmap name for '{sync}' sync mode"));
            }
            if self.bitmap_mode.is_some() {
                return refuse("Cannot specify bitmap sync mode without a bitmap".to_owned());
            }
            return Ok(None);
        };
        let mode = match (self.sync, self.bitmap_mode) {
            (SyncMode::Incremental, None | Some(BitmapMode::OnSuccess)) => BitmapMode::OnSuccess,
            (SyncMode::Incremental, Some(_)) => {
                return refuse(format!(
                    "Bitmap sync mode must be 'on-success' when using sync mode '{sync}'"
                ));
            }
            (_, Some(mode)) => mode,
            (_, None) => {
                // The bitmap is looked for first.
                self.find(source, name)?;
                return refuse("Bitmap sync mode must be given when providing a bitmap".to_owned());
            }
        };
        let bitmap = self.find(source, name)?;
        match (self.sync, mode) {
            (SyncMode::None, _) => {
                refuse(format!("sync mode '{sync}' does not produce meaningful bitmap outputs"))
            }
            (SyncMode::Full | SyncMode::Top, BitmapMode::Never) => refuse(format!(
                "Bitmap sync mode 'never' has no meaningful effect when combined with sync mode '{sync}'"
            )),
            _ => Ok(Some((bitmap, mode))),
        }
    }

    fn find(&self, source: &Node, name: &str) -> Result<Arc<Bitmap>> {
        let missing = |_| Error::Invalid(format!("Bitmap '{name}' could not be found"));
        source.bitmaps().get(name).map_err(missing)
    }
}
