//! Taking a new image's space ahead of time: QEMU's `PreallocMode`.

use serde::{Deserialize, Serialize};

use crate::num::{to_u64, to_usize};
use crate::storage::Storage;
use crate::{Progress, Result, WriteBuf};

/// Bytes of zeroes that are written at once.
const CHUNK: u64 = 1 << 20;

/// How much of an image's space is taken when it is made or grows (QAPI `PreallocMode`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Preallocation {
    /// None: space is taken by writes.
    #[default]
    Off,
    /// Tables only: clusters have their places, the host's space is taken by writes.
    Metadata,
    /// The host takes the space without writing it.
    Falloc,
    /// Zeroes are written.
    Full,
}

impl Preallocation {
    /// All, by QEMU's names.
    pub const NAMES: [(&'static str, Self); 4] = [
        ("off", Self::Off),
        ("metadata", Self::Metadata),
        ("falloc", Self::Falloc),
        ("full", Self::Full),
    ];

    /// The mode of a name.
    pub fn of_name(name: &str) -> Option<Self> {
        Self::NAMES.iter().find(|(known, _)| *known == name).map(|(_, mode)| *mode)
    }

    /// Takes the host's space of a range past the end of a storage, which reaches to the range's end
    /// afterwards.
    ///
    /// # Errors
    /// The host's; among them that there is no space left. The storage may have grown then.
    pub(crate) fn take(
        self,
        storage: &dyn Storage,
        offset: u64,
        len: u64,
        progress: &Progress,
    ) -> Result<()> {
        let end = offset + len;
        match self {
            Self::Off | Self::Metadata => {}
            Self::Falloc => storage.reserve(offset, len)?,
            Self::Full => {
                progress.add_total(len);
                let zeroes = vec![0; to_usize(len.min(CHUNK))];
                let mut at = offset;
                while at < end {
                    progress.check()?;
                    let n = (end - at).min(to_u64(zeroes.len()));
                    storage.write_at(at, &[WriteBuf::new(&zeroes[..to_usize(n)])])?;
                    progress.advance(n);
                    at += n;
                }
            }
        }
        if storage.len()? < end {
            storage.set_len(end)?;
        }
        Ok(())
    }
}
