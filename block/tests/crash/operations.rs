//! The operations that are tried with faults, and the image they are tried on.

use std::path::Path;

use block::qcow2::Qcow2;
use block::{Format, Preallocation, Progress, ReadBuf, Result, Together, WriteBuf};

use crate::common::{self, id_of, land, new_snapshot};
use crate::kinds::{Base, Kind};
use crate::record::Host;

/// An operation that is tried with faults.
pub(crate) struct Operation {
    pub(crate) name: &'static str,
    pub(crate) run: fn(&Base, &Qcow2) -> Result<()>,
    /// Whether a failed try has done it all the same: then there is nothing to try again.
    pub(crate) done: fn(&Qcow2) -> bool,
    /// Whether the disk may have changed in part when it failed.
    pub(crate) writes: bool,
}

fn tags(format: &Qcow2) -> Vec<String> {
    format.snapshots().into_iter().map(|s| s.tag).collect()
}

fn cluster(base: &Base) -> u64 {
    base.kind.cluster() as u64
}

fn read(_: &Base, format: &Qcow2) -> Result<()> {
    let mut bytes = vec![0; format.size() as usize];
    format.read(0, &[ReadBuf::new(&mut bytes)])
}

/// The last cluster with data is the active disk's alone, see [`prepared`].
fn write_in_place(base: &Base, format: &Qcow2) -> Result<()> {
    format.write(8 * cluster(base) + 100, &[WriteBuf::new(&[0x11; 300])])
}

fn write_new(base: &Base, format: &Qcow2) -> Result<()> {
    let at = format.size() - 9 * cluster(base);
    format.write(at + 10, &[WriteBuf::new(&vec![0x12; 5 * cluster(base) as usize])])?;
    format.flush()
}

fn write_shared(base: &Base, format: &Qcow2) -> Result<()> {
    format.write(100, &[WriteBuf::new(&vec![0x13; 3 * cluster(base) as usize])])?;
    format.flush()
}

fn zero_keeping(base: &Base, format: &Qcow2) -> Result<()> {
    format.write_zeroes(cluster(base) + 50, 8 * cluster(base), false)?;
    format.flush()
}

fn zero_unmapping(base: &Base, format: &Qcow2) -> Result<()> {
    format.write_zeroes(cluster(base) + 50, 8 * cluster(base), true)?;
    format.flush()
}

fn discard(base: &Base, format: &Qcow2) -> Result<()> {
    format.discard(0, 9 * cluster(base))?;
    format.flush()
}

fn save(base: &Base, format: &Qcow2) -> Result<()> {
    let size = cluster(base);
    let mut change = format.create_snapshot(&new_snapshot("new"))?;
    for n in [0, 1, 3] {
        change.write_vmstate(n * size, &[WriteBuf::new(&vec![9; size as usize])])?;
    }
    change.set_vmstate_size(4 * size);
    change.prepare()?;
    change.publish()?;
    change.finish()
}

/// With requests after the snapshot point, which must not fail because of the snapshot.
fn save_under_writes(base: &Base, format: &Qcow2) -> Result<()> {
    let size = cluster(base);
    let disk = || {
        let mut bytes = vec![0; format.size() as usize];
        format.read(0, &[ReadBuf::new(&mut bytes)]).map(|()| bytes)
    };
    let old = disk()?;
    let mut change = format.create_snapshot(&new_snapshot("new"))?;
    change.switch()?;
    let written = format
        .write(size + 100, &[WriteBuf::new(&vec![0x15; 2 * size as usize])])
        .and_then(|()| format.write_zeroes(8 * size, size, true))
        .and_then(|()| format.flush());
    let made = written.and_then(|()| change.prepare()).and_then(|()| change.publish());
    let made = made.and_then(|()| change.finish());
    drop(change);
    made?;
    // The snapshot has the disk of the switch, and its loading leaves what was written since.
    land(&mut *format.revert_snapshot(&id_of(format, "new"))?)?;
    assert!(disk()? == old);
    Ok(())
}

/// With VM state that starts as the earlier snapshot's.
fn save_inheriting(base: &Base, format: &Qcow2) -> Result<()> {
    let size = cluster(base);
    let unit = size.min(4096);
    let mut change = format.create_snapshot(&new_snapshot("new"))?;
    change.inherit_vmstate(&id_of(format, "old"))?;
    for at in [0, 2 * size] {
        change.write_vmstate(at, &[WriteBuf::new(&vec![9; unit as usize])])?;
    }
    change.zero_vmstate(size, unit)?;
    change.set_vmstate_size(3 * size);
    change.prepare()?;
    change.publish()?;
    change.finish()
}

/// More clusters than the refcount table has room for.
fn save_large(base: &Base, format: &Qcow2) -> Result<()> {
    let bytes = vec![9; 128 * base.kind.cluster()];
    let mut change = format.create_snapshot(&new_snapshot("new"))?;
    change.write_vmstate(0, &[WriteBuf::new(&bytes)])?;
    change.set_vmstate_size(bytes.len() as u64);
    change.prepare()?;
    change.publish()?;
    change.finish()
}

fn write_compressed(base: &Base, format: &Qcow2) -> Result<()> {
    let bytes = vec![0x14; 3 * base.kind.cluster()];
    format.write_compressed(2 * cluster(base), &[WriteBuf::new(&bytes)])?;
    format.flush()
}

/// To a size that needs a larger L1 table, with small clusters.
fn grow(base: &Base, format: &Qcow2) -> Result<()> {
    let size = (base.kind.size + 90 * base.kind.cluster()) as u64;
    format.resize(size, Preallocation::Metadata, &Progress::default())
}

fn shrink(base: &Base, format: &Qcow2) -> Result<()> {
    format.resize(5 * cluster(base) + 512, Preallocation::Off, &Progress::default())
}

fn store_bitmaps(_: &Base, format: &Qcow2) -> Result<()> {
    format.store_bitmaps()
}

fn revert(_: &Base, format: &Qcow2) -> Result<()> {
    land(&mut *format.revert_snapshot(&id_of(format, "old"))?)
}

/// The guest runs before it is seen and before it is durable.
fn shown_revert(base: &Base, format: &Qcow2) -> Result<()> {
    let size = cluster(base);
    let mut change = format.revert_snapshot(&id_of(format, "old"))?;
    change.prepare()?;
    let written = format.write(size + 100, &[WriteBuf::new(&vec![0x15; 2 * size as usize])]);
    let shown = written.and_then(|()| change.show(&Together::new(1)));
    let made = shown
        .and_then(|()| format.write(3 * size, &[WriteBuf::new(&vec![0x16; size as usize])]))
        .and_then(|()| format.flush())
        .and_then(|()| change.publish())
        .and_then(|()| change.finish());
    drop(change);
    made
}

fn delete(_: &Base, format: &Qcow2) -> Result<()> {
    land(&mut *format.delete_snapshot(&id_of(format, "old"))?)
}

fn read_vmstate(base: &Base, format: &Qcow2) -> Result<()> {
    let state = format.open_vmstate(&id_of(format, "old"))?;
    let mut bytes = vec![0; state.size() as usize];
    state.read(0, &[ReadBuf::new(&mut bytes)])?;
    assert!(bytes == vec![7; 2 * base.kind.cluster()]);
    Ok(())
}

/// Of an image whose tables are as they are on disk.
fn flush(_: &Base, format: &Qcow2) -> Result<()> {
    format.flush()
}

/// What a reopening and a hand-over begin with.
fn settle(base: &Base, format: &Qcow2) -> Result<()> {
    write_in_place(base, format)?;
    format.settle()
}

/// Names that lead to the same file, as what is below stays.
fn set_backing(_: &Base, format: &Qcow2) -> Result<()> {
    format.set_backing(Some("./base.raw"), Some("raw"))?;
    format.set_backing(None, None)?;
    format.set_backing(Some("base.raw"), Some("raw"))
}

const NEVER: fn(&Qcow2) -> bool = |_| false;

fn saved(format: &Qcow2) -> bool {
    tags(format).contains(&"new".to_owned())
}

pub(crate) const GROWTH: &[Operation] =
    &[Operation { name: "large save", run: save_large, done: saved, writes: false }];

/// Not with version 2 and its snapshot.
pub(crate) const RESIZES: &[Operation] = &[
    Operation { name: "grow", run: grow, done: NEVER, writes: true },
    Operation { name: "shrink", run: shrink, done: NEVER, writes: true },
];

pub(crate) const BITMAPS: &[Operation] =
    &[Operation { name: "bitmap store", run: store_bitmaps, done: NEVER, writes: false }];

/// On images with a backing file.
pub(crate) const CHAINS: &[Operation] = &[Operation {
    name: "change of the backing file",
    run: set_backing,
    done: NEVER,
    writes: false,
}];

pub(crate) const OPERATIONS: &[Operation] = &[
    Operation { name: "read", run: read, done: NEVER, writes: false },
    Operation { name: "flush", run: flush, done: NEVER, writes: false },
    Operation { name: "settle", run: settle, done: NEVER, writes: true },
    Operation { name: "write in place", run: write_in_place, done: NEVER, writes: true },
    Operation { name: "allocating write", run: write_new, done: NEVER, writes: true },
    Operation { name: "copy on write", run: write_shared, done: NEVER, writes: true },
    Operation { name: "write-zeroes", run: zero_keeping, done: NEVER, writes: true },
    Operation { name: "write-zeroes with unmap", run: zero_unmapping, done: NEVER, writes: true },
    Operation { name: "discard", run: discard, done: NEVER, writes: true },
    Operation { name: "save", run: save, done: saved, writes: false },
    Operation { name: "save under writes", run: save_under_writes, done: saved, writes: true },
    Operation { name: "inheriting save", run: save_inheriting, done: saved, writes: false },
    Operation { name: "revert", run: revert, done: NEVER, writes: true },
    Operation { name: "shown revert", run: shown_revert, done: NEVER, writes: true },
    Operation {
        name: "delete",
        run: delete,
        done: |format| !tags(format).contains(&"old".to_owned()),
        writes: false,
    },
    Operation { name: "compressed write", run: write_compressed, done: NEVER, writes: true },
    Operation { name: "VM-state read", run: read_vmstate, done: NEVER, writes: false },
];

/// An image with data, a snapshot with VM state, and newer data beside it.
pub(crate) fn prepared(dir: &Path, kind: Kind) -> Base {
    let mut base = Base::create(dir, kind);
    let host = Host::new(base.files.clone());
    let format = base.open(&host, false).unwrap();
    let size = cluster(&base);
    common::write(&format, 0, &vec![1; 8 * size as usize]);
    let mut change = format.create_snapshot(&new_snapshot("old")).unwrap();
    change.write_vmstate(0, &[WriteBuf::new(&vec![7; 2 * size as usize])]).unwrap();
    change.set_vmstate_size(2 * size);
    change.prepare().unwrap();
    change.publish().unwrap();
    change.finish().unwrap();
    drop(change);
    common::write(&format, 7 * size, &vec![2; 3 * size as usize]);
    format.flush().unwrap();
    base.disk = common::read_all(&format);
    drop(format);
    base.files = host.files();
    base
}

/// What an image shows: disk and snapshots.
#[derive(PartialEq)]
pub(crate) struct View {
    pub(crate) disk: Vec<u8>,
    pub(crate) tags: Vec<String>,
}

pub(crate) fn view(format: &Qcow2) -> View {
    View { disk: common::read_all(format), tags: tags(format) }
}
