//! Whether an image that a crash left keeps the rules of `docs/crash-safety.md`.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use block::qcow2::Qcow2;
use block::qcow2::check::{self, Finding, Repair, Severity};
use block::{Format, Node, ReadBuf, WriteBuf};

use crate::common::{self, Start as _, id_of, land, new_snapshot};
use crate::kinds::{BITMAP, Base, Start};
use crate::pages::Pages;
use crate::points::each_point;
use crate::record::{Entry, Host};
use crate::timeline::{Expected, Snap};

/// How much is looked at besides the disk and the list of snapshots.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Depth {
    /// Each snapshot is gone back to, the image is written to, and must be sound afterwards.
    pub(crate) use_it: bool,
    /// What qemu-img says is asked for.
    pub(crate) qemu: bool,
    /// The image was closed after its last change: its bitmaps are up to date.
    pub(crate) closed: bool,
    /// A repair was cut off: flags may lag behind counts.
    pub(crate) repairing: bool,
}

type Check = Result<(), String>;

/// Tries the rules on an image.
pub(crate) fn verify(
    base: &Base,
    dir: &Path,
    files: &[Pages],
    expected: &Expected,
    depth: Depth,
) -> Check {
    if depth.qemu && !dirty(files) {
        qemu_check(base, dir, files, depth.repairing)?;
    }
    let host = Host::new(files.to_vec());
    let image = open_sound(base, &host, depth.repairing)?;
    let node = Node::of_qcow2("d", Arc::new(image));
    let format = node.format();
    let disk = read(&*format)?;
    expected.check_disk(&disk)?;
    check_bitmap(base, &node, &disk, depth.closed)?;
    let tags: Vec<_> = format.snapshots().into_iter().map(|s| s.tag).collect();
    expected.check_tags(&tags)?;
    let snaps: Vec<_> = tags.iter().filter_map(|tag| expected.snap(tag).cloned()).collect();
    for snap in &snaps {
        check_vm(&*format, snap).map_err(|e| format!("VM state of {}: {e}", snap.tag))?;
    }
    if depth.use_it {
        let before = (host.files(), host.now());
        use_it(base, &*format, &snaps)?;
        drop((format, node));
        // Leaks of the crash are still there, nothing else.
        sound(&host, depth.repairing).map_err(|e| format!("after work on it: {e}"))?;
        second_crash(base, &before.0, &host.log()[before.1..], depth.repairing)?;
        repair(base, &host)?;
        if depth.qemu {
            qemu_check(base, dir, &host.files(), false)
                .map_err(|e| format!("after work on it: {e}"))?;
        }
    }
    Ok(())
}

/// A bitmap that does not say that it is out of date has all that is not as at its start.
fn check_bitmap(base: &Base, node: &Node, disk: &[u8], closed: bool) -> Check {
    let Ok(bitmap) = node.bitmaps().get(BITMAP) else {
        return match base.kind.start {
            Start::Bitmap => Err("the bitmap is missing".to_owned()),
            _ => Ok(()),
        };
    };
    if bitmap.inconsistent() {
        return if closed { Err("the bitmap is out of date".to_owned()) } else { Ok(()) };
    }
    for extent in bitmap.extents(0, disk.len() as u64, usize::MAX) {
        let span = extent.offset as usize..(extent.offset + extent.len) as usize;
        // What a growth added is noted or not; it reads as zeroes.
        let first = &base.disk[span.start.min(base.disk.len())..span.end.min(base.disk.len())];
        if !extent.dirty && !disk[span.clone()].starts_with(first) {
            return Err(format!("the bitmap calls {span:#x?} clean, which is not as at its start"));
        }
    }
    Ok(())
}

/// Opens an image, which the check finds sound before, or, with the dirty bit, once it is open: its
/// counts were behind and are repaired then.
fn open_sound(base: &Base, host: &Host, repairing: bool) -> Result<Qcow2, String> {
    let dirty = dirty(&host.files());
    if !dirty {
        sound(host, repairing)?;
    }
    let image = base.open(host, false).map_err(|e| format!("does not open: {e}"))?;
    if dirty {
        sound(host, false)?;
    }
    Ok(image)
}

/// Whether a version 3 image has the dirty bit.
fn dirty(files: &[Pages]) -> bool {
    let header = files[0].read(0, 80);
    header[7] == 3 && header[79] & 1 != 0
}

/// Our check finds leaks at most; of a repair that was cut off, COPIED flags too.
fn sound(host: &Host, repairing: bool) -> Check {
    let report = check::check(&*host.file(0), &check::Options::default())
        .map_err(|e| format!("check: {e}"))?;
    let flag = |text: &str| repairing && text.contains("OFLAG_COPIED");
    let leak = |found: &&Finding| found.severity == Severity::Leak || flag(&found.text);
    match report.findings.iter().find(|found| !leak(found)) {
        Some(found) => Err(format!("check: {}", found.text)),
        None if report.corruptions > 0 && !repairing => Err(format!("check: {report:?}")),
        None => Ok(()),
    }
}

fn read(format: &dyn Format) -> Result<Vec<u8>, String> {
    let mut disk = vec![0xa5; format.size() as usize];
    format.read(0, &[ReadBuf::new(&mut disk)]).map_err(|e| format!("the disk: {e}"))?;
    Ok(disk)
}

fn check_vm(format: &dyn Format, snap: &Snap) -> Check {
    let text = |e: block::Error| e.to_string();
    let reader = format.open_vmstate(&id_of(format, &snap.tag)).map_err(text)?;
    if reader.size() != snap.vm.len() as u64 {
        return Err(format!("has {} bytes instead of {}", reader.size(), snap.vm.len()));
    }
    let mut vm = vec![0xa5; snap.vm.len()];
    reader.read(0, &[ReadBuf::new(&mut vm)]).map_err(text)?;
    match (0..vm.len()).find(|n| vm[*n] != snap.vm[*n]) {
        Some(at) => Err(format!("differs at {at:#x}")),
        None => Ok(()),
    }
}

/// Another crash, during the work after the first: the image is sound again.
fn second_crash(base: &Base, files: &[Pages], log: &[Entry], repairing: bool) -> Check {
    let mut result = Ok(());
    each_point(files, log, 1, |point| {
        if (point.cut * 3 + point.variant) % 41 != 0 {
            return true;
        }
        let host = Host::new(point.files.to_vec());
        result = open_sound(base, &host, repairing)
            .map(drop)
            .map_err(|e| format!("second crash, cut {}.{}: {e}", point.cut, point.variant));
        result.is_ok()
    });
    result
}

/// The leaks can be taken back, without harm if the repair is cut off too.
fn repair(base: &Base, host: &Host) -> Check {
    let before = (host.files(), host.now());
    let options = check::Options { repair: Repair::Leaks, progress: None };
    let report = check::check(&*host.file(0), &options).map_err(|e| format!("repair: {e}"))?;
    if !report.is_clean() {
        return Err(format!("the repair leaves {report:?}"));
    }
    let disk = |host: &Host| {
        base.open(host, true).map_err(|e| e.to_string()).and_then(|format| read(&format))
    };
    if disk(&Host::new(before.0.clone()))? != disk(host)? {
        return Err("the repair changed the disk".to_owned());
    }
    second_crash(base, &before.0, &host.log()[before.1..], true).map_err(|e| format!("repair: {e}"))
}

/// Goes back to each snapshot, writes, saves and deletes.
fn use_it(base: &Base, format: &dyn Format, snaps: &[Arc<Snap>]) -> Check {
    let says = |what: &str| {
        let what = what.to_owned();
        move |e: block::Error| format!("{what}: {e}")
    };
    for snap in snaps {
        let revert = format.revert_snapshot(&id_of(format, &snap.tag));
        match revert.and_then(|mut change| land(&mut *change)) {
            Ok(()) => {}
            Err(e) if few_bits(&e) => continue,
            Err(e) => return Err(says("revert")(e)),
        }
        if read(format)? != *snap.disk {
            return Err(format!("snapshot {} is not as it was", snap.tag));
        }
    }
    let before = read(format)?;
    let at = before.len() / 3;
    let bytes = vec![0x5a; before.len() / 5];
    format.write(at as u64, &[WriteBuf::new(&bytes)]).map_err(says("write"))?;
    let create = format.create_snapshot(&new_snapshot("after the crash"));
    let made = match create.and_then(|mut change| land(&mut *change)) {
        Ok(()) => true,
        Err(_) if !base.kind.has_snapshots() => false,
        Err(e) if few_bits(&e) => false,
        Err(e) => return Err(says("save")(e)),
    };
    format.write(0, &[WriteBuf::new(&bytes)]).map_err(says("second write"))?;
    format.flush().map_err(says("flush"))?;
    let mut wanted = before;
    wanted[at..at + bytes.len()].copy_from_slice(&bytes);
    wanted[..bytes.len()].copy_from_slice(&bytes);
    if read(format)? != wanted {
        return Err("what was written after the crash is not there".to_owned());
    }
    let tags: Vec<_> = snaps.iter().map(|snap| snap.tag.as_str()).collect();
    for tag in tags.into_iter().chain(made.then_some("after the crash")) {
        let delete = format.delete_snapshot(&id_of(format, tag));
        delete.and_then(|mut change| land(&mut *change)).map_err(says("delete"))?;
    }
    if read(format)? != wanted {
        return Err("deletions changed the disk".to_owned());
    }
    Ok(())
}

/// One or two bits do not count many references.
pub(crate) fn few_bits(error: &block::Error) -> bool {
    let text = error.to_string();
    text.contains("the refcount of cluster") && text.contains("would exceed")
}

/// qemu-img finds leaks at most; of a repair that was cut off, COPIED flags too.
fn qemu_check(base: &Base, dir: &Path, files: &[Pages], repairing: bool) -> Check {
    let image = base.put(dir, "crash.qcow2", files);
    let args = ["check", "-f", "qcow2", &common::path(&image)];
    let output = Command::new("qemu-img").args(args).run().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    let flag = |line: &str| repairing && line.contains("OFLAG_COPIED");
    match (output.status.code(), text.lines().find(|l| l.starts_with("ERROR") && !flag(l))) {
        (Some(0 | 3), None) => Ok(()),
        (Some(2), None) if repairing => Ok(()),
        (code, _) => Err(format!("qemu-img check ({code:?}): {text}")),
    }
}
