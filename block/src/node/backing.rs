//! What a node reads from below, and what the image calls it.

use std::path::Path;
use std::sync::{Arc, PoisonError};

use super::{Closed, Details, Node};
use crate::format::Format;

impl Node {
    /// The image below this one.
    pub fn backing(&self) -> Option<Arc<Node>> {
        self.details().backing.clone()
    }

    /// Sets what the image reads from where it has nothing itself. The gate must be closed.
    pub(crate) fn set_backing(
        &self,
        _closed: &Closed,
        backing: Option<(Arc<Node>, Arc<dyn Format>)>,
        filename: String,
    ) {
        let mut place = self.live.write().unwrap_or_else(PoisonError::into_inner);
        let (node, format) = backing.unzip();
        let old_details = place.details.clone();
        let Some(image) = &old_details.qcow2 else { return };
        let old_format = image.replace_backing(format);
        place.details =
            Arc::new(Details { backing: node, filename, ..Details::clone(&old_details) });
        drop(place);
        // Outside the lock: the last handle of an image writes what it still has.
        drop((old_format, old_details));
    }

    /// What the image names as its backing file now, as a path, and what QMP shows then: `shown` tells.
    pub(crate) fn set_full_backing(
        &self,
        full_backing: Option<String>,
        shown: impl FnOnce(&Details, Option<&Self>) -> String,
    ) {
        let mut place = self.live.write().unwrap_or_else(PoisonError::into_inner);
        let mut details = Details { full_backing, ..Details::clone(&place.details) };
        details.filename = shown(&details, details.backing.as_deref());
        place.details = Arc::new(details);
    }

    /// What the image names as its backing file, and its format.
    pub(crate) fn recorded_backing(&self) -> Option<(String, String)> {
        let info = self.qcow2()?.info();
        Some((info.backing_file?, info.backing_format.unwrap_or_default()))
    }

    /// What `overlay` has to name so that this image is found below it.
    pub(crate) fn name_for(&self, overlay: &Self) -> String {
        let file = overlay.details().file.as_ref().map(|file| file.filename()).unwrap_or_default();
        crate::graph::name_for_overlay(self, Path::new(&file))
    }
}
