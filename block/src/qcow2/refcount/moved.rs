//! Blocks and the table in new places, until one header write makes these valid (`meta/switch.rs`).

use crate::num::{be_bytes, to_usize};
use crate::qcow2::counts;
use crate::qcow2::layout::{HostCluster, HostOffset, OFFSET_MASK, Run};
use crate::{Result, WriteBuf};

use super::Refcounts;

impl Refcounts {
    /// Whether the table goes to another place at the next switch.
    pub(crate) fn is_moving(&self) -> bool {
        self.next.is_some()
    }

    /// Where it goes.
    pub(crate) fn next_run(&self) -> Option<Run> {
        self.next
    }

    /// Whether blocks have new places too.
    pub(crate) fn has_moved_blocks(&self) -> bool {
        !self.moved.is_empty()
    }

    /// Has the table move as it is to clusters that nobody uses.
    pub(crate) fn move_table(&mut self, to: Run) {
        self.next = Some(to);
    }

    /// The blocks that have a count of `count` in a run, and are still where the disk has them.
    pub(crate) fn unmoved_with(&mut self, run: Run, count: u64) -> Result<Vec<usize>> {
        let order = self.geometry.refcount_order;
        let mut found = Vec::new();
        for part in self.by_block(run) {
            let index = to_usize(part.first.0 / self.geometry.block_entries());
            if self.moved.contains(&index) {
                continue;
            }
            self.trim()?;
            let Some((table, start)) = self.block(part.first)? else { continue };
            let range = start..start + to_usize(part.count);
            let (least, most) = counts::bounds(table.bytes(), &range, order);
            if (least..=most).contains(&count)
                && counts::find(table.bytes(), &range, order, count).is_some()
            {
                found.push(index);
            }
        }
        Ok(found)
    }

    /// Moves a block to a cluster that nobody else uses; gives the one where it was. The table must
    /// move too.
    pub(crate) fn move_block(&mut self, index: usize, to: HostCluster) -> Result<HostCluster> {
        let from = HostOffset(self.table[index] & OFFSET_MASK);
        self.blocks.load(&*self.storage, from)?;
        let place = self.geometry.offset_of(to);
        self.blocks.rename(from, place);
        self.table[index] = place.0;
        let from = self.geometry.cluster_of(from);
        self.block_set.remove(from);
        self.block_set.insert(to);
        self.moved.insert(index);
        Ok(from)
    }

    /// Writes all blocks and, to its new place, the table. Nothing on disk refers to what is new.
    pub(crate) fn write_moved(&mut self) -> Result<()> {
        self.blocks.write_back(&*self.storage)?;
        if let Some(run) = self.next {
            let at = self.geometry.offset_of(run.first).0;
            self.storage.write_at(at, &[WriteBuf::new(&be_bytes(&self.table))])?;
        }
        if self.blocks.is_over() {
            self.blocks.shrink();
        }
        Ok(())
    }

    /// The new place is the table's, as far as memory is concerned; gives the old one, which must
    /// not be used before the header tells of the new.
    pub(crate) fn adopt(&mut self) -> Option<Run> {
        let next = self.next.take()?;
        self.table_dirty = None;
        self.moved.clear();
        Some(std::mem::replace(&mut self.table_run, next))
    }

    /// Host offset and clusters of the table, as the header has them.
    pub(crate) fn place(&self) -> (u64, u32) {
        let clusters = u32::try_from(self.table_run.count).unwrap_or(u32::MAX);
        (self.geometry.offset_of(self.table_run.first).0, clusters)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::num::{be64, to_u64};
    use crate::qcow2::refcount::tests::small_clusters;

    #[test]
    fn a_moved_block_is_read_from_its_new_place_and_the_old_one_stays_as_it_was() {
        let (storage, header, mut counts) = small_clusters(4);
        let old_table = counts.table_run();
        let holds = |_| None;
        let table = counts.allocate(old_table.count, true, &holds).unwrap();
        let to = counts.allocate(1, true, &holds).unwrap().first;
        counts.write_back().unwrap();
        assert!(counts.unmoved_with(table, 2).unwrap().is_empty());
        let [index] = *counts.unmoved_with(table, 1).unwrap() else { panic!("one block") };

        counts.move_table(table);
        let from = counts.move_block(index, to).unwrap();
        counts.add(table).unwrap();
        counts.write_moved().unwrap();
        assert!(counts.unmoved_with(table, 2).unwrap().is_empty(), "it has moved");
        let old = Refcounts::open(&storage, &header, 1 << 20).unwrap().get(table.first).unwrap();
        assert_eq!((old, counts.get(table.first).unwrap()), (1, 2));
        assert!(counts.has_block_in(Run::one(to)) && !counts.has_block_in(Run::one(from)));
        assert_eq!((counts.adopt(), counts.adopt()), (Some(old_table), None));
        let mut entry = [0; 8];
        let at = counts.place().0 + to_u64(index) * 8;
        storage.read_at(at, &[crate::ReadBuf::new(&mut entry)]).unwrap();
        assert_eq!(be64(&entry, 0), counts.geometry.offset_of(to).0);
    }
}
