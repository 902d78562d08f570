//! Every request of every operation fails once: see `docs/crash-safety.md`.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use block::qcow2::check::{self, Repair, Severity};
use block::qcow2::create::{self, CreateOptions};
use block::qcow2::{Probe, Qcow2};
use block::{Error, Format, Preallocation, Progress, Result, WriteBuf};

use crate::common::{self, have_qemu_img};
use crate::kinds::{Base, Kind, Start};
use crate::operations::{BITMAPS, CHAINS, GROWTH, OPERATIONS, Operation, RESIZES, prepared, view};
use crate::pages::Pages;
use crate::record::{self, Fault, Host};

const K: usize = 1024;

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
            let errno = block::host_words(&std::io::Error::from_raw_os_error(fault.errno));
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
fn open_with_faults(base: &Base, errno: i32, faults: &AtomicU64) {
    let words = block::host_words(&std::io::Error::from_raw_os_error(errno));
    for at in 0.. {
        let host = Host::new(base.files.clone());
        host.set_fault(Some(Fault { at, errno, lasting: false }));
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
        assert!(text.contains(&words) && text.contains("failed"), "{case}: {text}");
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
    for errno in [libc::EIO, libc::ENOSPC] {
        open_with_faults(&base, errno, &faults);
    }
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
    let mut faults = 0;
    for errno in [libc::EIO, libc::ENOSPC] {
        let words = block::host_words(&std::io::Error::from_raw_os_error(errno));
        for at in 0.. {
            let host = make();
            host.set_fault(Some(Fault { at, errno, lasting: false }));
            let result = run(&host);
            let hits = host.hits();
            host.set_fault(None);
            if hits.is_empty() {
                result.unwrap();
                break;
            }
            faults += 1;
            let error = result.err().map(|e| e.to_string());
            if let Some(text) = &error {
                assert!(text.contains(&words), "request {at}: {text}");
            } else {
                assert!(hits.iter().all(|hit| harmless(*hit)), "request {at}: {hits:?} unnoticed");
            }
            after(&host, error);
            run(&host).unwrap_or_else(|e| panic!("request {at}, second try: {e}"));
            done(&host);
        }
    }
    faults
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
    any_fault_of_a_change_of_the_backing_file: "cluster_size=4k", 500 * K, Start::Backed, CHAINS;
    any_fault_on_compressed_clusters: "cluster_size=4k", 1000 * K, Start::Compressed, OPERATIONS;
}
