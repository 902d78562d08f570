//! Compares the refcounts of the file with the references that there are, then the COPIED flags of
//! the active disk with the refcounts.

use crate::num::{be64, to_usize};
use crate::{Progress, ReadBuf, Result};

use super::entry::{self, COPIED};
use super::image::Image;
use super::refcounts::{self, Block, DiskRefcounts};
use super::report::{Report, Severity};
use super::walk::Walk;

/// Reports tables that share their clusters with something else; gives the clusters of those that are
/// written in place, in order.
pub(super) fn overlaps(walk: &mut Walk<'_>) -> Vec<u64> {
    let mut found = Vec::new();
    for table in std::mem::take(&mut walk.fixed) {
        for cluster in table.first..table.first.saturating_add(table.count).min(walk.counts.len()) {
            let references = walk.counts.get(cluster);
            if walk.counts.exceeds(cluster, 1) {
                if table.in_place {
                    found.push(cluster);
                }
                let at = cluster << walk.image.cluster_bits;
                walk.report.note(Severity::Corruption, || {
                    format!(
                        "overlap: {} is in the cluster at {at:#x}, which has {} references",
                        table.what,
                        references.max(2)
                    )
                });
            }
        }
    }
    for (at, uses) in &walk.l2 {
        let references = walk.counts.get(at >> walk.image.cluster_bits);
        if references > uses.all {
            let others = references - uses.all;
            walk.report.note(Severity::Corruption, || {
                format!("overlap: something else refers to the L2 table at {at:#x} {others} times")
            });
        }
    }
    found.sort_unstable();
    found.dedup();
    found
}

/// Compares all counts. An overlap whose count on disk agrees is an error too: what is written in
/// place must have one reference.
pub(super) fn compare(
    image: &Image<'_>,
    walk: Walk<'_>,
    disk: &mut DiskRefcounts,
    overlaps: &[u64],
    progress: &Progress,
) -> Result<()> {
    let Walk { counts, report, .. } = walk;
    let entries = image.block_entries();
    let total = counts.len();
    let mut highest = 0;
    let mut at = 0;
    while at < total {
        progress.check()?;
        let index = at / entries;
        let end = ((index + 1) * entries).min(total);
        match disk.block(image, index) {
            Block::None => {
                let mut cluster = at;
                while cluster < end {
                    cluster = counts.next_used(cluster, end);
                    if cluster < end {
                        one(report, cluster, 0, counts.get(cluster), &mut highest, overlaps);
                        cluster += 1;
                    }
                }
            }
            Block::Broken => {
                for cluster in at..end {
                    report.unchecked(|| format!("Can't get refcount for cluster {cluster}"));
                }
            }
            Block::At(block) => match disk.load(image, block) {
                Ok(bytes) => {
                    for cluster in at..end {
                        let stored = refcounts::get(bytes, cluster % entries, image.refcount_order);
                        one(report, cluster, stored, counts.get(cluster), &mut highest, overlaps);
                    }
                }
                Err(e) => {
                    for cluster in at..end {
                        report
                            .unchecked(|| format!("Can't get refcount for cluster {cluster}: {e}"));
                    }
                }
            },
        }
        at = end;
    }
    report.image_end_offset = (highest + 1) << image.cluster_bits;
    Ok(())
}

fn one(
    report: &mut Report,
    cluster: u64,
    stored: u64,
    references: u64,
    highest: &mut u64,
    overlaps: &[u64],
) {
    if stored > 0 || references > 0 {
        *highest = cluster;
    }
    if stored < references {
        report.rebuild |= stored == 0;
        report.count_errors += 1;
        report.corruption(1, || {
            format!("cluster {cluster} refcount={stored} reference={references}")
        });
    } else if stored > references {
        report.leaks += 1;
        report.note(Severity::Leak, || {
            format!("cluster {cluster} refcount={stored} reference={references}")
        });
    } else if references > 1 && overlaps.binary_search(&cluster).is_ok() {
        report.corruptions += 1;
        report.overlaps += 1;
    }
}

/// Checks that exactly those entries of the active disk have the COPIED flag whose cluster has the
/// refcount 1.
pub(super) fn flags(
    image: &Image<'_>,
    report: &mut Report,
    disk: &mut DiskRefcounts,
    active: &[(u64, u64)],
    progress: &Progress,
) -> Result<()> {
    for (index, l1_entry) in
        image.read_table(image.l1_offset, image.l1_size.into())?.into_iter().enumerate()
    {
        let at = l1_entry & entry::OFFSET;
        if at == 0 {
            continue;
        }
        let Some(refcount) = disk.get(image, at >> image.cluster_bits) else {
            continue;
        };
        if (refcount == 1) != (l1_entry & COPIED != 0) {
            report.corruption(1, || {
                format!("OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={l1_entry:x} refcount={refcount}")
            });
        }
    }
    let mut bytes = vec![0; to_usize(image.cluster_size())];
    for (at, times) in active {
        progress.check()?;
        if let Err(e) = image.storage.read_at(*at, &[ReadBuf::new(&mut bytes)]) {
            report.unchecked(|| format!("the L2 table at {at:#x} cannot be read: {e}"));
            continue;
        }
        for words in bytes.chunks_exact(image.l2_entry_len()) {
            let l2_entry = be64(words, 0);
            let Some(host) = entry::flagged(image, l2_entry) else {
                continue;
            };
            let refcount = if image.data_file() {
                Some(1)
            } else {
                disk.get(image, host >> image.cluster_bits)
            };
            let Some(refcount) = refcount else {
                continue;
            };
            if (refcount == 1) != (l2_entry & COPIED != 0) {
                report.flag_errors += *times;
                report.corruption(*times, || {
                    format!("OFLAG_COPIED data cluster: l2_entry={l2_entry:x} refcount={refcount}")
                });
            }
        }
        progress.advance(image.cluster_size());
    }
    Ok(())
}
