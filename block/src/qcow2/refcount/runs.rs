//! Whole runs of clusters: one reference more or less for each, and what is told of many at once.

use std::ops::Range;

use crate::num::{to_u64, to_usize};
use crate::qcow2::cache::Table;
use crate::qcow2::counts::{self, Step, get};
use crate::qcow2::layout::{HostCluster, Run, push_run};
use crate::{Error, Result};

use super::Refcounts;

/// Changes the refcounts of a range of a block by one.
fn change(table: &mut Table, range: &Range<usize>, order: u32, step: Step) {
    let bytes = counts::bytes_of(range, order);
    let at = (bytes.start * 8) >> order;
    counts::step(table.bytes_mut(bytes), &(range.start - at..range.end - at), order, step);
}

impl Refcounts {
    /// Adds one reference to each cluster; all or none.
    ///
    /// # Errors
    /// Among others when the refcounts' width is exhausted, or a cluster has no reference yet,
    /// which a used cluster must have.
    pub(crate) fn add(&mut self, run: Run) -> Result<()> {
        for part in self.by_block(run) {
            if let Err(e) = self.add_part(part) {
                let done = Run { first: run.first, count: part.first.0 - run.first.0 };
                self.sub(done, |_| {})?;
                return Err(e);
            }
        }
        Ok(())
    }

    /// As [`Refcounts::add`], for clusters of one block.
    fn add_part(&mut self, part: Run) -> Result<()> {
        let order = self.geometry.refcount_order;
        let limit = self.geometry.max_refcount();
        // A table may refer to clusters all over the host, each with a block of its own.
        self.trim()?;
        let at = |index: usize, start: usize| part.first + to_u64(index - start);
        let Some((table, start)) = self.block(part.first)? else {
            return Err(self.unused(part.first));
        };
        let range = start..start + to_usize(part.count);
        let (least, most) = counts::bounds(table.bytes(), &range, order);
        if least == 0 {
            let index = counts::find(table.bytes(), &range, order, 0).unwrap_or(start);
            return Err(self.unused(at(index, start)));
        }
        if most >= limit {
            let index = counts::find(table.bytes(), &range, order, most).unwrap_or(start);
            return Err(Error::NotSupported(format!(
                "Image '{}': the refcount of cluster {:#x} would exceed {} bits",
                self.storage.name(),
                at(index, start),
                1u32 << order
            )));
        }
        change(table, &range, order, Step::Up);
        Ok(())
    }

    fn unused(&self, cluster: HostCluster) -> Error {
        self.corrupt(format!("cluster {cluster:#x} is in use but has refcount 0"))
    }

    /// The parts of a run that one block has.
    pub(super) fn by_block(&self, run: Run) -> impl Iterator<Item = Run> + use<> {
        let entries = self.geometry.block_entries();
        let mut at = run.first;
        std::iter::from_fn(move || {
            let left = run.end().0 - at.0;
            let part = Run { first: at, count: left.min(entries - at.0 % entries) };
            at = part.end();
            (left > 0).then_some(part)
        })
    }

    /// Takes one reference from each cluster and tells which have none left, in runs. At an error
    /// the clusters before the one it tells of are done.
    pub(crate) fn sub(&mut self, run: Run, mut freed: impl FnMut(Run)) -> Result<()> {
        for part in self.by_block(run) {
            self.trim()?;
            let done = self.sub_part(part, &mut freed)?;
            if done < part.count {
                return Err(self.corrupt(format!(
                    "cluster {:#x} to be freed has refcount 0",
                    part.first + done
                )));
            }
        }
        Ok(())
    }

    /// As [`Refcounts::sub`], for clusters of one block; says how many are done.
    fn sub_part(&mut self, part: Run, freed: &mut impl FnMut(Run)) -> Result<u64> {
        let order = self.geometry.refcount_order;
        let Some((table, start)) = self.block(part.first)? else {
            return Ok(0);
        };
        let mut range = start..start + to_usize(part.count);
        let (least, most) = counts::bounds(table.bytes(), &range, order);
        if least == 0 {
            range.end = counts::find(table.bytes(), &range, order, 0).unwrap_or(start);
        }
        if range.is_empty() {
            return Ok(0);
        }
        let mut gone = Vec::new();
        if most == 1 {
            gone.push(Run { first: part.first, count: to_u64(range.len()) });
        } else if least <= 1 {
            let mut rest = range.clone();
            while let Some(index) = counts::find(table.bytes(), &rest, order, 1) {
                push_run(&mut gone, Run::one(part.first + to_u64(index - start)));
                rest.start = index + 1;
            }
        }
        change(table, &range, order, Step::Down);
        for run in gone {
            self.hint = self.hint.min(run.first);
            freed(run);
        }
        Ok(to_u64(range.len()))
    }

    /// The parts of a run that nobody refers to.
    pub(crate) fn free_parts(&mut self, run: Run) -> Result<Vec<Run>> {
        let order = self.geometry.refcount_order;
        let mut parts = Vec::new();
        for part in self.by_block(run) {
            self.trim()?;
            let Some((table, start)) = self.block(part.first)? else {
                push_run(&mut parts, part);
                continue;
            };
            let range = start..start + to_usize(part.count);
            if counts::bounds(table.bytes(), &range, order).1 == 0 {
                push_run(&mut parts, part);
                continue;
            }
            for index in range.filter(|index| get(table.bytes(), *index, order) == 0) {
                push_run(&mut parts, Run::one(part.first + to_u64(index - start)));
            }
        }
        Ok(parts)
    }

    /// Tells of each of the clusters whether it has exactly one reference. Neighbours should come
    /// one after another: a block is looked up once for all that follow.
    pub(crate) fn single(&mut self, clusters: &[HostCluster]) -> Result<Vec<bool>> {
        let order = self.geometry.refcount_order;
        let entries = self.geometry.block_entries();
        let mut out = Vec::with_capacity(clusters.len());
        for group in clusters.chunk_by(|a, b| a.0 / entries == b.0 / entries) {
            self.trim()?;
            match self.block(group[0])? {
                Some((table, _)) => {
                    let one =
                        |c: &HostCluster| get(table.bytes(), to_usize(c.0 % entries), order) == 1;
                    out.extend(group.iter().map(one));
                }
                None => out.resize(out.len() + group.len(), false),
            }
        }
        Ok(out)
    }
}
