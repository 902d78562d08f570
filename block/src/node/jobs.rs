//! Which jobs work on a node, exclusively ([`crate::graph::Claim`]) or beside others.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Node;
use crate::{Error, Result};

#[derive(Debug, Default)]
struct List {
    next: u64,
    /// Ids and QMP's types.
    jobs: Vec<(u64, &'static str)>,
    /// Whether the one in the list lets no other come.
    alone: bool,
    /// How many snapshots are being made together with the machine's state.
    saves: usize,
}

/// QMP's type of the job that a snapshot must not come in the middle of: it would lose what it reads from
/// the images that the job takes away.
const STREAM: &str = "stream";

/// The jobs of a node.
#[derive(Debug, Default)]
pub(super) struct Jobs(Mutex<List>);

impl Jobs {
    fn list(&self) -> MutexGuard<'_, List> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A job's use of a node; over when dropped.
pub struct Occupied {
    node: Arc<Node>,
    id: u64,
}

impl Drop for Occupied {
    fn drop(&mut self) {
        let mut list = self.node.jobs.list();
        list.jobs.retain(|(id, _)| *id != self.id);
        list.alone = false;
    }
}

/// A snapshot of a node that is being made; over when dropped.
pub struct Saving(Arc<Node>);

impl Drop for Saving {
    fn drop(&mut self) {
        self.0.jobs.list().saves -= 1;
    }
}

impl Node {
    /// Notes that a snapshot is being made, from before it is begun to after it counts. Jobs that copy
    /// the node may go on.
    ///
    /// # Errors
    /// A job takes away what is below the node, or replaces it or its size; with QEMU's text.
    pub fn begin_save(self: &Arc<Self>) -> Result<Saving> {
        let mut list = self.jobs.list();
        let alone = list.alone;
        match list.jobs.iter().find(|(_, job)| alone || *job == STREAM) {
            Some((_, job)) => Err(self.busy(job)),
            None => {
                list.saves += 1;
                Ok(Saving(Arc::clone(self)))
            }
        }
    }

    /// Refuses a node that any job works on, also one that only copies it: for what replaces all of
    /// its contents at once.
    ///
    /// # Errors
    /// With QEMU's text.
    pub fn check_no_job(&self) -> Result<()> {
        match self.jobs.list().jobs.first() {
            Some((_, job)) => Err(self.busy(job)),
            None => Ok(()),
        }
    }

    /// Notes that a job of QMP's type `job` works on the node.
    ///
    /// # Errors
    /// Its contents are being replaced; with QEMU's text.
    pub(crate) fn occupy(self: &Arc<Self>, job: &'static str) -> Result<Occupied> {
        let mut list = self.jobs.list();
        match list.jobs.first() {
            Some((_, other)) if list.alone => Err(self.busy(other)),
            _ if job == STREAM && list.saves > 0 => Err(self.busy("snapshot-save")),
            _ => Ok(list.add(self, job)),
        }
    }

    /// As [`Node::occupy`], for who replaces all of the contents, or the size.
    ///
    /// # Errors
    /// A job works on the node, or a snapshot of it is being made; with QEMU's text.
    pub fn occupy_alone(self: &Arc<Self>, job: &'static str) -> Result<Occupied> {
        let mut list = self.jobs.list();
        match list.jobs.first() {
            Some((_, other)) => Err(self.busy(other)),
            None if list.saves > 0 => Err(self.busy("snapshot-save")),
            None => {
                list.alone = true;
                Ok(list.add(self, job))
            }
        }
    }

    fn busy(&self, job: &str) -> Error {
        Error::Invalid(format!(
            "Node '{}' is busy: block device is in use by block job: {job}",
            self.name()
        ))
    }
}

impl List {
    fn add(&mut self, node: &Arc<Node>, job: &'static str) -> Occupied {
        let id = self.next;
        self.next += 1;
        self.jobs.push((id, job));
        Occupied { node: node.clone(), id }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raw::Raw;
    use crate::storage::memory::MemoryStorage;

    #[test]
    fn jobs_share_a_node_unless_one_replaces_its_contents() {
        let storage = Arc::new(MemoryStorage::new(vec![0; 512]));
        let node = Arc::new(Node::new("n", Arc::new(Raw::open(storage, false).unwrap())));
        let text = "Node 'n' is busy: block device is in use by block job: ";
        let refused = |result: Result<Occupied>| result.err().unwrap().to_string();
        let backups = [node.occupy("backup").unwrap(), node.occupy("backup").unwrap()];
        assert_eq!(refused(node.occupy_alone("snapshot-load")), format!("{text}backup"));
        node.check_no_job().unwrap_err();
        drop(backups);
        node.check_no_job().unwrap();
        let load = node.occupy_alone("snapshot-load").unwrap();
        assert_eq!(refused(node.occupy("backup")), format!("{text}snapshot-load"));
        assert_eq!(refused(node.occupy_alone("snapshot-load")), format!("{text}snapshot-load"));
        drop(load);
        drop(node.occupy("backup").unwrap());
    }

    #[test]
    fn a_stream_and_a_save_keep_each_other_off_and_nothing_else() {
        let storage = Arc::new(MemoryStorage::new(vec![0; 512]));
        let node = Arc::new(Node::new("n", Arc::new(Raw::open(storage, false).unwrap())));
        let text = "Node 'n' is busy: block device is in use by block job: ";
        let backup = node.occupy("backup").unwrap();
        let saves = [node.begin_save().unwrap(), node.begin_save().unwrap()];
        let refused = node.occupy("stream").err().unwrap().to_string();
        assert_eq!(refused, format!("{text}snapshot-save"));
        drop(saves);
        let stream = node.occupy("stream").unwrap();
        assert_eq!(node.begin_save().err().unwrap().to_string(), format!("{text}stream"));
        drop((stream, backup));
        drop(node.begin_save().unwrap());
        node.check_no_job().unwrap();
    }
}
