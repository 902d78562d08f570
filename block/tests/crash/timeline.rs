//! What was promised when: the requests of a workload beside its log, and what a crash may leave.

use std::sync::Arc;

pub(crate) const SECTOR: usize = 512;

/// An internal snapshot as it must be found again.
#[derive(Debug)]
pub(crate) struct Snap {
    pub(crate) tag: String,
    pub(crate) disk: Arc<Vec<u8>>,
    pub(crate) vm: Vec<u8>,
}

/// What a request did.
#[derive(Debug, Clone)]
pub(crate) enum What {
    /// The disk's bytes from `at` on are these, once the next flush returned.
    Changed {
        at: usize,
        bytes: Vec<u8>,
    },
    /// All before is durable; the disk as it was.
    Flushed {
        disk: Arc<Vec<u8>>,
    },
    /// The disk is another one at once.
    Reverted {
        disk: Arc<Vec<u8>>,
    },
    /// The disk is another one, which will be there or not.
    Shown {
        disk: Arc<Vec<u8>>,
    },
    Resized {
        size: usize,
    },
    Added {
        snap: Arc<Snap>,
    },
    Removed {
        tag: String,
    },
}

/// A request and the part of the log that it made: entries `start..end`.
#[derive(Debug, Clone)]
pub(crate) struct Event {
    pub(crate) start: usize,
    pub(crate) end: usize,
    pub(crate) what: What,
}

impl Event {
    /// Whether the request had returned before the cut, so that its promise holds.
    fn over(&self, cut: usize) -> bool {
        self.end <= cut
    }

    /// Whether anything of it may be on disk.
    fn begun(&self, cut: usize) -> bool {
        self.start < cut
    }
}

/// The requests in order.
#[derive(Debug)]
pub(crate) struct Timeline {
    pub(crate) events: Vec<Event>,
    /// The disk at the start, durable.
    pub(crate) first: Arc<Vec<u8>>,
    /// The snapshots at the start.
    pub(crate) snaps: Vec<Arc<Snap>>,
}

/// A state of the disk that a crash may leave.
#[derive(Debug)]
struct World {
    /// What is durable at least.
    base: Arc<Vec<u8>>,
    size: usize,
    /// Later changes, each of which may or may not be there, sector by sector.
    pending: Vec<(usize, Vec<u8>)>,
}

/// What may be found after a crash.
#[derive(Debug)]
pub(crate) struct Expected {
    worlds: Vec<World>,
    pub(crate) there: Vec<Arc<Snap>>,
    pub(crate) perhaps: Vec<Arc<Snap>>,
}

impl Timeline {
    /// What may be found if the host stopped before log entry `cut`.
    pub(crate) fn expected(&self, cut: usize) -> Expected {
        let mut worlds =
            vec![World { base: self.first.clone(), size: self.first.len(), pending: Vec::new() }];
        let mut there = self.snaps.clone();
        let mut perhaps = Vec::new();
        for event in self.events.iter().filter(|e| e.begun(cut) || e.over(cut)) {
            let over = event.over(cut);
            match &event.what {
                What::Changed { at, bytes } => {
                    for world in &mut worlds {
                        world.pending.push((*at, bytes.clone()));
                    }
                }
                What::Flushed { disk } | What::Reverted { disk } => {
                    let world = World { base: disk.clone(), size: disk.len(), pending: Vec::new() };
                    if over {
                        worlds = vec![world];
                    } else if matches!(event.what, What::Reverted { .. }) {
                        worlds.push(world);
                    }
                }
                What::Shown { disk } => {
                    let (base, size) = (disk.clone(), disk.len());
                    worlds.push(World { base, size, pending: Vec::new() });
                }
                What::Resized { size } => {
                    let resized: Vec<_> = worlds.iter().map(|w| w.resized(*size)).collect();
                    if over {
                        worlds.clear();
                    }
                    worlds.extend(resized);
                }
                What::Added { snap } if over => there.push(snap.clone()),
                What::Added { snap } => perhaps.push(snap.clone()),
                What::Removed { tag } => {
                    let at = there.iter().position(|s| s.tag == *tag);
                    let snap = at.map(|at| there.remove(at));
                    if !over {
                        perhaps.extend(snap);
                    }
                }
            }
        }
        Expected { worlds, there, perhaps }
    }
}

impl World {
    fn resized(&self, size: usize) -> Self {
        let mut base = (*self.base).clone();
        // What was cut off does not come back when the disk grows again.
        base.truncate(size);
        base.resize(size, 0);
        let clip = |(at, bytes): &(usize, Vec<u8>)| {
            (*at, bytes[..bytes.len().min(size.saturating_sub(*at))].to_vec())
        };
        Self { base: Arc::new(base), size, pending: self.pending.iter().map(clip).collect() }
    }

    /// The first byte that neither was there at the last flush nor was written since.
    fn wrong(&self, disk: &[u8]) -> Option<usize> {
        if disk.len() != self.size {
            return Some(disk.len().min(self.size));
        }
        let chunk = 64 * SECTOR;
        for start in (0..disk.len()).step_by(chunk) {
            let end = (start + chunk).min(disk.len());
            if disk[start..end] == self.base[start..end] {
                continue;
            }
            for at in (start..end).step_by(SECTOR) {
                let end = (at + SECTOR).min(disk.len());
                if disk[at..end] != self.base[at..end]
                    && let Some(at) = self.wrong_in_sector(disk, at, end)
                {
                    return Some(at);
                }
            }
        }
        None
    }

    fn wrong_in_sector(&self, disk: &[u8], start: usize, end: usize) -> Option<usize> {
        let mut in_parts = false;
        for (at, bytes) in &self.pending {
            let last = at + bytes.len();
            if *at <= start && end <= last {
                if disk[start..end] == bytes[start - at..end - at] {
                    return None;
                }
            } else if *at < end && start < last {
                in_parts = true;
            }
        }
        if !in_parts {
            return Some(start);
        }
        (start..end).find(|n| {
            let written = |(at, bytes): &(usize, Vec<u8>)| {
                n.checked_sub(*at).and_then(|skip| bytes.get(skip)) == Some(&disk[*n])
            };
            disk[*n] != self.base[*n] && !self.pending.iter().any(written)
        })
    }
}

impl Expected {
    /// Whether the disk is one that the crash may leave.
    pub(crate) fn check_disk(&self, disk: &[u8]) -> Result<(), String> {
        let wrong: Vec<_> = self.worlds.iter().map(|world| (world, world.wrong(disk))).collect();
        if wrong.iter().any(|(_, wrong)| wrong.is_none()) {
            return Ok(());
        }
        let mut text = format!("the disk ({} bytes) is none that may be:", disk.len());
        for (world, at) in wrong {
            let at = at.unwrap_or(0);
            let show = |bytes: &[u8]| {
                bytes.get(at..).map(|rest| format!("{:02x?}", &rest[..rest.len().min(16)]))
            };
            text += &format!(
                "\n  size {}, {} unflushed changes: differs at {at:#x}: is {:?}, flushed was {:?}",
                world.size,
                world.pending.len(),
                show(disk),
                show(&world.base),
            );
        }
        Err(text)
    }

    /// Checks the tags that are there, in any order.
    pub(crate) fn check_tags(&self, tags: &[String]) -> Result<(), String> {
        let missing = self.there.iter().find(|s| !tags.contains(&s.tag));
        if let Some(snap) = missing {
            return Err(format!("snapshot {} is missing, there are {tags:?}", snap.tag));
        }
        match tags.iter().find(|tag| self.snap(tag).is_none()) {
            Some(tag) => Err(format!("snapshot {tag} should not be there")),
            None => Ok(()),
        }
    }

    pub(crate) fn snap(&self, tag: &str) -> Option<&Arc<Snap>> {
        self.there.iter().chain(&self.perhaps).find(|s| s.tag == tag)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timeline() -> Timeline {
        let event = |start, end, what| Event { start, end, what };
        Timeline {
            events: vec![
                event(0, 1, What::Changed { at: 0, bytes: vec![1; 512] }),
                event(
                    1,
                    3,
                    What::Flushed { disk: Arc::new([vec![1; 512], vec![0; 512]].concat()) },
                ),
                event(3, 4, What::Changed { at: 100, bytes: vec![2; 100] }),
                event(4, 5, What::Changed { at: 512, bytes: vec![3; 512] }),
            ],
            first: Arc::new(vec![0; 1024]),
            snaps: Vec::new(),
        }
    }

    #[test]
    fn what_was_flushed_may_not_be_lost() {
        let timeline = timeline();
        let lost = vec![0; 1024];
        assert!(timeline.expected(2).check_disk(&lost).is_ok(), "the flush has not returned");
        assert!(timeline.expected(3).check_disk(&lost).is_err());
    }

    #[test]
    fn what_was_not_flushed_may_be_there_or_not() {
        let timeline = timeline();
        let mut disk = [vec![1; 512], vec![0; 512]].concat();
        assert!(timeline.expected(5).check_disk(&disk).is_ok());
        disk[512..].fill(3);
        assert!(timeline.expected(5).check_disk(&disk).is_ok());
        disk[150..170].fill(2);
        assert!(timeline.expected(5).check_disk(&disk).is_ok(), "a part of a part of a sector");
        disk[512] = 0;
        assert!(timeline.expected(5).check_disk(&disk).is_err(), "a part of a whole sector");
        disk[512] = 3;
        disk[150] = 9;
        assert!(timeline.expected(5).check_disk(&disk).is_err(), "never written");
    }
}
