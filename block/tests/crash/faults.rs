//! Every request of every operation fails once: see `docs/crash-safety.md`.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use block::qcow2::check::{self, Repair, Severity};
use block::qcow2::create::{self, CreateOptions};
use block::qcow2::{Probe, Qcow2};
use block::{Error, Format, Preallocation, Progress, ReadBuf, Result, WriteBuf};

use crate::common::{self, have_qemu_img, id_of, land, new_snapshot};
use crate::kinds::{Base, Kind, Start};
use crate::pages::Pages;
use crate::record::{self, Fault, Host};

const K: usize = 1024;

/// An operation that is tried with faults.
struct Operation {
    name: &'static str,
    run: fn(&Base, &Qcow2) -> Result<()>,
    /// Whether a failed try has done it all the same: then there is nothing to try again.
    done: fn(&Qcow2) -> bool,
    /// Whether the disk may have changed in part when it failed.
    writes: bool,
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

const NEVER: fn(&Qcow2) -> bool = |_| false;

fn saved(format: &Qcow2) -> bool {
    tags(format).contains(&"new".to_owned())
}

const GROWTH: &[Operation] =
    &[Operation { name: "large save", run: save_large, done: saved, writes: false }];

/// Not with version 2 and its snapshot.
const RESIZES: &[Operation] = &[
    Operation { name: "grow", run: grow, done: NEVER, writes: true },
    Operation { name: "shrink", run: shrink, done: NEVER, writes: true },
];

const BITMAPS: &[Operation] =
    &[Operation { name: "bitmap store", run: store_bitmaps, done: NEVER, writes: false }];

const OPERATIONS: &[Operation] = &[
    Operation { name: "read", run: read, done: NEVER, writes: false },
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
fn prepared(dir: &Path, kind: Kind) -> Base {
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
struct View {
    disk: Vec<u8>,
    tags: Vec<String>,
}

fn view(format: &Qcow2) -> View {
    View { disk: common::read_all(format), tags: tags(format) }
}

/// Failures of these may be of no consequence: space is not given back or not taken ahead, a file
/// stays longer.
fn harmless(kind: record::Kind) -> bool {
    use record::Kind::{Discard, Len, Reserve, SetLen};
    matches!(kind, Discard | SetLen | Len | Reserve)
}

/// One operation with one fault.
fn with_fault(base: &Base, dir: &Path, operation: &Operation, fault: Fault) -> bool {
    let case = format!("{} ({}), {fault:?}", operation.name, base.kind.options);
    let host = Host::new(base.files.clone());
    let format = base.open(&host, false).unwrap();
    host.set_fault(Some(fault));
    let result = (operation.run)(base, &format);
    let hits = host.hits();
    host.set_fault(None);
    if hits.is_empty() {
        result.unwrap_or_else(|e| panic!("{case}: fails without a fault: {e}"));
        return false;
    }
    match &result {
        Ok(()) => {
            let unnoticed = hits.iter().find(|hit| !harmless(**hit));
            assert_eq!(unnoticed, None, "{case}: the failure goes unnoticed");
        }
        Err(e) => {
            let text = e.to_string();
            let errno = std::io::Error::from_raw_os_error(fault.errno).to_string();
            assert!(text.contains(&errno) && text.contains("'memory"), "{case}: {text}");
            assert!(text.contains("failed"), "{case}: {text}");
        }
    }
    let now = view(&format);
    assert!(operation.writes || now.disk == base.disk, "{case}: the disk changed");
    // Memory and disk agree.
    format.flush().unwrap_or_else(|e| panic!("{case}: flush afterwards: {e}"));
    let copy = Host::new(host.files());
    let again = base.open(&copy, false).unwrap_or_else(|e| panic!("{case}: reopen: {e}"));
    assert!(view(&again) == now, "{case}: the open image and the file disagree");
    drop(again);
    if !(operation.done)(&format) {
        (operation.run)(base, &format).unwrap_or_else(|e| panic!("{case}: second try: {e}"));
    }
    let now = view(&format);
    drop(format);
    repair(base, dir, &host, fault.at.is_multiple_of(7), &case);
    let format = base.open(&host, false).unwrap();
    let closed = view(&format);
    assert_eq!(closed.tags, now.tags, "{case}: closed");
    assert_eq!(closed.disk.len(), now.disk.len(), "{case}: closed");
    let differs = (0..now.disk.len()).find(|at| closed.disk[*at] != now.disk[*at]);
    assert_eq!(differs, None, "{case}: closed, it is another");
    true
}

/// The check finds leaks at most, and a repair takes them back. On a sample qemu-img is asked too:
/// not to repair, as it drops the snapshots of an image that has bitmaps (10.0).
fn repair(base: &Base, dir: &Path, host: &Host, sample: bool, case: &str) {
    let checked = |repair| {
        let options = check::Options { repair, progress: None };
        check::check(&*host.file(0), &options).unwrap()
    };
    let report = checked(Repair::No);
    let found = (report.corruptions, report.check_errors);
    assert_eq!(found, (0, 0), "{case}: {:?}", report.findings);
    let report = checked(Repair::Leaks);
    assert!(report.is_clean(), "{case}: {report:?}");
    if sample {
        common::check(&base.put(dir, "after.qcow2", &host.files()));
    }
}

/// Opening fails with each of its requests, and works again afterwards.
fn open_with_faults(base: &Base, faults: &AtomicU64) {
    for at in 0.. {
        let host = Host::new(base.files.clone());
        host.set_fault(Some(Fault { at, errno: libc::EIO, lasting: false }));
        let opened = base.open(&host, false);
        let hits = host.hits();
        host.set_fault(None);
        if hits.is_empty() {
            opened.unwrap();
            return;
        }
        faults.fetch_add(1, Ordering::Relaxed);
        let case = format!("open ({}), request {at}", base.kind.options);
        let Err(error) = opened else { panic!("{case}: failed {hits:?} go unnoticed") };
        let text = error.to_string();
        assert!(text.contains("Input/output error") && text.contains("failed"), "{case}: {text}");
        let format = base.open(&host, false).unwrap_or_else(|e| panic!("{case}: again: {e}"));
        assert!(view(&format).disk == base.disk, "{case}");
    }
}

fn fail_everywhere(kind: Kind, operations: &[Operation]) {
    if !have_qemu_img("faults") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let base = prepared(dir.path(), kind);
    let faults = Arc::new(AtomicU64::new(0));
    open_with_faults(&base, &faults);
    let long = std::env::var_os("CRASH_POINTS").is_some();
    for operation in operations {
        for (errno, lasting) in [(libc::EIO, false), (libc::EIO, true), (libc::ENOSPC, true)] {
            // A fault that lasts differs from one that does not in a few places only.
            let every = if lasting && !long { 5 } else { 1 };
            for at in (0..).step_by(every) {
                if !with_fault(&base, dir.path(), operation, Fault { at, errno, lasting }) {
                    break;
                }
                faults.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
    println!("faults injected: {} ({})", faults.load(Ordering::Relaxed), kind.options);
}

/// Operations on images that nobody has open.
#[test]
fn any_fault_of_create_check_and_repair() {
    let create = |host: &Host| {
        let options = CreateOptions {
            size: 1 << 20,
            cluster_size: Some(4096),
            preallocation: Some(Preallocation::Full),
            ..CreateOptions::default()
        };
        create::create(&*host.file(0), None, &options, &Progress::default())
    };
    let checked = |host: &Host, repair| {
        check::check(&*host.file(0), &check::Options { repair, progress: None })
    };
    let clean = |host: &Host| assert!(checked(host, Repair::No).unwrap().is_clean());
    let empty = || Host::new(vec![Pages::default()]);
    let mut faults = each_fault(
        empty,
        create,
        |host, error| {
            assert!(error.is_some());
            let format = Probe::new(host.file(0)).and_then(|p| Qcow2::open(p, None, false));
            assert!(format.is_err() || checked(host, Repair::No).unwrap().is_clean());
            host.file(0).set_len(0).unwrap();
        },
        clean,
    );
    // An image of clusters that nobody refers to: its tables are gone.
    let leaking = || {
        let host = empty();
        create(&host).unwrap();
        let entry = host.files()[0].read(40, 8);
        let l1 = u64::from_be_bytes(entry.try_into().unwrap());
        host.file(0).write_at(l1, &[WriteBuf::new(&[0; 8])]).unwrap();
        host
    };
    // A table that cannot be read is told in the report.
    let whole = |host: &Host, repair| {
        let report = checked(host, repair)?;
        match report.findings.iter().find(|found| found.severity == Severity::Unchecked) {
            Some(found) => Err(Error::Invalid(found.text.clone())),
            None => Ok(report),
        }
    };
    let check = |host: &Host| whole(host, Repair::No).map(|report| assert!(report.leaks > 200));
    faults += each_fault(leaking, check, |_, error| assert!(error.is_some()), |_| {});
    let repair = |host: &Host| match whole(host, Repair::Leaks)? {
        report if report.is_clean() => Ok(()),
        report => Err(Error::Invalid(format!("{:?}", report.findings))),
    };
    let no_worse = |host: &Host, _: Option<String>| {
        assert_eq!(checked(host, Repair::No).unwrap().corruptions, 0);
    };
    faults += each_fault(leaking, repair, no_worse, clean);
    println!("faults injected: {faults} (create, check, repair)");
}

/// Fails each request of an operation; `after` looks at what is left, then it must succeed and be
/// as `done` wants. Gives how many faults there were.
fn each_fault(
    make: impl Fn() -> Host,
    run: impl Fn(&Host) -> Result<()>,
    after: impl Fn(&Host, Option<String>),
    done: impl Fn(&Host),
) -> u64 {
    for at in 0.. {
        let host = make();
        host.set_fault(Some(Fault { at, errno: libc::EIO, lasting: false }));
        let result = run(&host);
        let hits = host.hits();
        host.set_fault(None);
        if hits.is_empty() {
            result.unwrap();
            return at;
        }
        let error = result.err().map(|e| e.to_string());
        if let Some(text) = &error {
            assert!(text.contains("Input/output error"), "request {at}: {text}");
        } else {
            assert!(hits.iter().all(|hit| harmless(*hit)), "request {at}: {hits:?} unnoticed");
        }
        after(&host, error);
        run(&host).unwrap_or_else(|e| panic!("request {at}, second try: {e}"));
        done(&host);
    }
    unreachable!("an operation has an end")
}

macro_rules! kinds {
    ($($name:ident: $options:expr, $size:expr, $start:expr, $operations:expr;)*) => {
        $(#[test] fn $name() {
            fail_everywhere(Kind { options: $options, size: $size, start: $start }, $operations);
        })*
    };
}

kinds! {
    any_fault_on_clusters_of_512: "cluster_size=512", 50 * K, Start::Empty, OPERATIONS;
    any_fault_on_clusters_of_64k: "cluster_size=64k", 2048 * K, Start::Empty, OPERATIONS;
    any_fault_on_version_2: "cluster_size=1k,compat=0.10", 300 * K, Start::Empty, OPERATIONS;
    any_fault_as_the_refcount_table_grows:
        "cluster_size=512,refcount_bits=64,preallocation=metadata", 1960 * K, Start::Empty, GROWTH;
    any_fault_of_a_resize: "cluster_size=512", 50 * K, Start::Empty, RESIZES;
    any_fault_of_a_resize_of_clusters_of_64k: "cluster_size=64k", 2048 * K, Start::Empty, RESIZES;
    any_fault_of_a_resize_over_a_backing_file: "cluster_size=4k", 500 * K, Start::Backed, RESIZES;
    any_fault_with_bitmaps: "cluster_size=4k", 500 * K, Start::Bitmap, BITMAPS;
    any_fault_of_writes_with_bitmaps: "cluster_size=1k", 300 * K, Start::Bitmap, OPERATIONS;
    any_fault_on_subclusters: "cluster_size=16k,extended_l2=on", 1000 * K, Start::Empty, OPERATIONS;
    any_fault_with_lazy_refcounts: "cluster_size=4k,lazy_refcounts=on", 1000 * K, Start::Empty, OPERATIONS;
    any_fault_over_a_backing_file: "cluster_size=4k", 1000 * K, Start::Backed, OPERATIONS;
    any_fault_on_compressed_clusters: "cluster_size=4k", 1000 * K, Start::Compressed, OPERATIONS;
}
