//! Who is told when an image is found damaged.

use std::sync::{Arc, Mutex, PoisonError};

use crate::node::Details;
use crate::qcow2::Corruption;

type Hook = Box<dyn Fn(&str, &Corruption) + Send + Sync>;

/// One place for all nodes of a graph: it can be set after images were opened.
#[derive(Default)]
pub(super) struct Damage(Mutex<Option<Hook>>);

impl Damage {
    pub(super) fn set(&self, hook: Hook) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(hook);
    }

    fn tell(&self, node: &str, corruption: &Corruption) {
        if let Some(hook) = &*self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            hook(node, corruption);
        }
    }

    /// Has damage of the node's image told under the node's name.
    pub(super) fn watch(self: &Arc<Self>, node: &str, details: &Details) {
        if let Some(image) = &details.qcow2 {
            let (damage, node) = (self.clone(), node.to_owned());
            image.on_corruption(move |corruption| damage.tell(&node, corruption));
        }
    }
}
