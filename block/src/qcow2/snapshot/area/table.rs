//! An L2 table of the VM-state area in memory.

use crate::num::{be64, to_usize};
use crate::qcow2::layout::{COPIED, Geometry, HostOffset, Mapping, Run, push_run};
use crate::qcow2::subcluster::{Cluster, mask};

/// What a cluster of the area is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Slot {
    /// Reads as zeroes.
    Empty,
    /// Stored, and an earlier snapshot's.
    Inherited,
    /// Taken for this snapshot.
    Own(HostOffset),
    /// The same, compressed.
    Packed(PackedAt),
}

/// Where a compressed cluster is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PackedAt {
    pub(super) host: HostOffset,
    /// Most bytes it takes.
    pub(super) len: u64,
    /// The clusters of the file that it is in; it has a reference to each.
    pub(super) run: Run,
}

/// The compressed cluster of an own entry, if it is one.
fn packed(word: u64, geometry: Geometry) -> Option<PackedAt> {
    match Mapping::decode(word, geometry) {
        Ok(mapping @ Mapping::Compressed { host, len }) => {
            Some(PackedAt { host, len, run: mapping.run(geometry)? })
        }
        _ => None,
    }
}

/// An L2 table of the area in memory.
#[derive(Debug)]
pub(super) struct Table {
    /// Words as in the image, without COPIED flags.
    pub(super) words: Vec<u64>,
    pub(super) own: Vec<bool>,
}

impl Table {
    pub(super) fn empty(geometry: Geometry) -> Self {
        let entries = to_usize(geometry.l2_entries());
        Self { words: vec![0; entries * geometry.entry_words()], own: vec![false; entries] }
    }

    fn cluster(&self, index: usize, geometry: Geometry) -> std::result::Result<Cluster, String> {
        let at = index * geometry.entry_words();
        let bitmap = if geometry.extended { self.words[at + 1] } else { 0 };
        Cluster::decode(self.words[at], bitmap, 0, geometry)
            .map_err(|reason| format!("L2 entry {:#x}: {reason}", self.words[at]))
    }

    /// Takes the first `kept` entries of a table of an earlier snapshot.
    pub(super) fn inherit(&mut self, bytes: &[u8], kept: usize, geometry: Geometry) {
        for index in 0..kept * geometry.entry_words() {
            // The second word of an extended entry has no flags.
            let flags = if index % geometry.entry_words() == 0 { COPIED } else { 0 };
            self.words[index] = be64(bytes, index) & !flags;
        }
    }

    /// What an entry's cluster is; the error says which rule it breaks.
    pub(super) fn slot(
        &self,
        index: usize,
        geometry: Geometry,
    ) -> std::result::Result<Slot, String> {
        if self.own[index] {
            let word = self.words[index * geometry.entry_words()];
            return Ok(packed(word, geometry).map_or(Slot::Own(HostOffset(word)), Slot::Packed));
        }
        let zero = self.cluster(index, geometry)?.reads_zero(mask(0..geometry.subclusters()), true);
        Ok(if zero { Slot::Empty } else { Slot::Inherited })
    }

    /// Gives an entry new words; those of a cluster of VM state that is stored, or none.
    pub(super) fn set(&mut self, index: usize, own: Option<HostOffset>, geometry: Geometry) {
        let at = index * geometry.entry_words();
        self.own[index] = own.is_some();
        self.words[at] = own.map_or(0, |host| host.0);
        if geometry.extended {
            // All subclusters are allocated: clusters of the area are written whole.
            self.words[at + 1] = if own.is_some() { u64::from(u32::MAX) } else { 0 };
        }
    }

    /// Has an entry be that of a compressed cluster of this snapshot.
    pub(super) fn set_packed(&mut self, index: usize, entry: u64, geometry: Geometry) {
        self.set(index, None, geometry);
        self.own[index] = true;
        self.words[index * geometry.entry_words()] = entry;
    }

    pub(super) fn own_runs(&self, geometry: Geometry) -> Vec<Run> {
        let mut runs = Vec::new();
        for (words, own) in self.words.chunks_exact(geometry.entry_words()).zip(&self.own) {
            if *own {
                let plain = || Run::one(geometry.cluster_of(HostOffset(words[0])));
                push_run(&mut runs, packed(words[0], geometry).map_or_else(plain, |at| at.run));
            }
        }
        runs
    }

    /// The clusters that this table shares with an earlier snapshot, as often as it refers to them.
    pub(super) fn inherited_runs(
        &self,
        geometry: Geometry,
    ) -> std::result::Result<Vec<Run>, String> {
        let mut runs = Vec::new();
        for index in (0..self.own.len()).filter(|index| !self.own[*index]) {
            if let Some(run) = self.cluster(index, geometry)?.mapping.run(geometry) {
                push_run(&mut runs, run);
            }
        }
        Ok(runs)
    }
}
