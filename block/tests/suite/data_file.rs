//! Images whose data is in a file of its own, with QEMU on the other side.

use std::path::Path;
use std::sync::Arc;

use block::qcow2::{Options, Probe, Qcow2};
use block::storage::memory::MemoryStorage;
use block::storage::{FileOptions, FileStorage, Storage};
use block::{Format, Result};

use crate::common::{self, Random, check, create, have_qemu_img, path, qemu_contents, qemu_io};

const SIZE: u64 = (4 << 20) + 5 * 512;

fn file(path: &Path) -> Arc<dyn Storage> {
    common::wait_for_starts();
    Arc::new(FileStorage::open(path, FileOptions::default()).unwrap())
}

fn open(dir: &Path, image: &Path) -> Qcow2 {
    let probe = Probe::new(file(image)).unwrap();
    assert!(probe.needs_data_file());
    let name = probe.data_file().unwrap();
    let options = Options { data_file: Some(file(&dir.join(name))), ..Options::default() };
    Qcow2::open_with(probe, None, options).unwrap()
}

/// Random work on both sides in turns; what the image is and, if it is kept raw, what the file is.
fn work(options: &str, raw: bool) {
    if !have_qemu_img("data file") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let data = dir.join("data");
    let options = format!(
        "data_file={},data_file_raw={}{options}",
        path(&data),
        if raw { "on" } else { "off" }
    );
    let image = create(dir, "a.qcow2", &SIZE.to_string(), &options);
    let mut random = Random(options.len() as u64 * 77 + 1);
    let mut model = vec![0; SIZE as usize];
    for round in 0..6u8 {
        let format = open(dir, &image);
        assert_eq!(format.info().data_file_raw, Some(raw));
        for _ in 0..40 {
            let len = 1 + random.below(200_000);
            let start = random.below(SIZE - len);
            let (start, len) =
                if random.below(2) == 0 { (start, len) } else { (start & !0xfff, len & !0xfff) };
            let span = start as usize..(start + len) as usize;
            match random.below(4) {
                0 => {
                    format.write_zeroes(start, len, random.below(2) == 0).unwrap();
                    model[span].fill(0);
                }
                1 => {
                    format.discard(start, len).unwrap();
                    let now = common::read(&format, start, span.len());
                    for (at, byte) in span.zip(now) {
                        assert!(byte == 0 || byte == model[at], "discard at {at:#x}");
                        model[at] = byte;
                    }
                }
                _ => {
                    let bytes = random.bytes(len);
                    common::write(&format, start, &bytes);
                    model[span].copy_from_slice(&bytes);
                }
            }
        }
        assert!(common::read_all(&format) == model);
        format.flush().unwrap();
        drop(format);
        check(&image);
        assert!(qemu_contents(dir, &image, None) == model, "QEMU sees another disk");
        let at = random.below(SIZE / 4096 - 64) * 4096;
        let span = at as usize..at as usize + 200_704;
        let command = format!("write -P {round} {at} 200704");
        qemu_io(&image, &[&command, &format!("write -z {at} 12288")]);
        model[span].fill(round);
        model[at as usize..at as usize + 12288].fill(0);
        if raw {
            let bytes = std::fs::read(&data).unwrap();
            let end = bytes.len().min(model.len());
            assert!(bytes[..end] == model[..end], "the data file is not what the guest sees");
            assert!(model[end..].iter().all(|b| *b == 0));
        }
    }
    let format = open(dir, &image);
    assert!(common::read_all(&format) == model, "written by QEMU");
}

#[test]
fn data_goes_to_a_file_of_its_own() {
    work("", false);
    work(",cluster_size=4k", false);
}

#[test]
fn data_goes_to_a_file_of_its_own_by_subclusters() {
    work(",extended_l2=on", false);
    work(",extended_l2=on,cluster_size=16k", true);
}

#[test]
fn a_raw_data_file_is_what_the_guest_sees() {
    work("", true);
    work(",cluster_size=512", true);
}

/// The guest's first cluster is at offset 0 of the file, which elsewhere means "nowhere".
#[test]
fn the_first_cluster_is_stored_and_read() {
    if !have_qemu_img("first cluster") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let image = create(dir.path(), "a.qcow2", "1M", &format!("data_file={}", path(&data)));
    let format = open(dir.path(), &image);
    common::write(&format, 0, &[5; 65536]);
    assert!(common::read(&format, 0, 65536) == [5; 65536]);
    drop(format);
    check(&image);
    assert!(std::fs::read(&data).unwrap()[..65536] == [5; 65536]);
}

#[test]
fn snapshots_and_a_missing_data_file_are_refused_by_name() {
    if !have_qemu_img("data file refusals") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let image = create(dir.path(), "a.qcow2", "1M", &format!("data_file={}", path(&data)));
    let format = open(dir.path(), &image);
    assert!(!format.supports_snapshots());
    let error = format.create_snapshot(&common::new_snapshot("s")).err().unwrap().to_string();
    assert!(error.contains("external data file"), "{error}");
    drop(format);
    let open = |image: &Path, data_file| -> Result<Qcow2> {
        Qcow2::open_with(
            Probe::new(file(image))?,
            None,
            Options { data_file, ..Options::default() },
        )
    };
    let error = open(&image, None).err().unwrap().to_string();
    assert_eq!(error, "'data-file' is required for this image");
    let plain = create(dir.path(), "b.qcow2", "1M", "");
    let other: Arc<dyn Storage> = Arc::new(MemoryStorage::default());
    let error = open(&plain, Some(other)).err().unwrap().to_string();
    assert_eq!(error, "'data-file' can only be set for images with an external data file");
}

/// What was flushed is in both files; a crash before leaves entries that tell the truth.
#[test]
fn power_failure_keeps_flushed_data_in_both_files() {
    if !have_qemu_img("data file, power failure") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let image = create(dir.path(), "a.qcow2", "1M", &format!("data_file={}", path(&data)));
    let image = std::fs::read(image).unwrap();
    for at in 0.. {
        let (meta, data) =
            (Arc::new(MemoryStorage::new(image.clone())), Arc::new(MemoryStorage::default()));
        let open = |meta: Vec<u8>, data: Vec<u8>| {
            let (meta, data) =
                (Arc::new(MemoryStorage::new(meta)), Arc::new(MemoryStorage::new(data)));
            let options = Options { data_file: Some(data), ..Options::default() };
            Qcow2::open_with(Probe::new(meta).unwrap(), None, options).unwrap()
        };
        let options = Options { data_file: Some(data.clone()), ..Options::default() };
        let format = Qcow2::open_with(Probe::new(meta.clone()).unwrap(), None, options).unwrap();
        common::write(&format, 100_000, &[1; 100_000]);
        format.flush().unwrap();
        // From here on nothing reaches the data file.
        data.fail_after(Some(at), false);
        let result = format
            .write(400_000, &[block::WriteBuf::new(&[2; 100_000])])
            .and_then(|()| format.flush());
        let met = data.failed();
        assert_eq!(result.is_err(), met, "{at}");
        drop(format);
        let format = open(meta.flushed_bytes(), data.flushed_bytes());
        assert!(common::read(&format, 100_000, 100_000) == [1; 100_000], "{at}");
        let now = common::read(&format, 400_000, 100_000);
        assert!(now == [if met { 0 } else { 2 }; 100_000], "{at}");
        if !met {
            break;
        }
    }
}

/// The node opens the data file itself. Both files follow the disk's size.
#[test]
fn a_disk_with_a_data_file_grows_and_shrinks_and_what_is_new_reads_as_zeroes() {
    if !have_qemu_img("resize of a data file") {
        return;
    }
    for raw in ["off", "on"] {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        let options = format!("data_file={},data_file_raw={raw}", path(&data));
        let image = create(dir.path(), "a.qcow2", "4M", &options);
        let (graph, node) = common::open(&image);
        let format = node.format();
        common::write(&*format, (4 << 20) - 4096, &[1; 4096]);
        let sizes: [u64; 4] = [6 << 20, 3 << 20, (5 << 20) + 512, 7 << 20];
        let mut model = vec![0; 4 << 20];
        model[(4 << 20) - 4096..].fill(1);
        for (n, size) in sizes.into_iter().enumerate() {
            format.resize(size, block::Preallocation::Off, &block::Progress::default()).unwrap();
            model.resize(size as usize, 0);
            assert_eq!(format.size(), size);
            assert!(common::read_all(&*format) == model, "{raw}, {size}: after the resize");
            let last = size - 512;
            common::write(&*format, last, &[n as u8 + 2; 512]);
            model[last as usize..].fill(n as u8 + 2);
            if raw == "on" {
                format.flush().unwrap();
                assert!(std::fs::read(&data).unwrap() == model, "{size}: the raw data file");
            }
        }
        drop(format);
        graph.remove("d").unwrap();
        drop(node);
        check(&image);
        assert!(qemu_contents(dir.path(), &image, None) == model, "{raw}: as QEMU sees it");
    }
}
