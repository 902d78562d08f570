//! Compressed clusters written here, with QEMU as reader and judge.

use std::path::Path;
use std::sync::Arc;

use block::compress::CompressFilter;
use block::qcow2::{Options, Probe, Qcow2};
use block::storage::memory::MemoryStorage;
use block::storage::{FileOptions, FileStorage, Storage};
use block::{Error, Format, WriteBuf};

use crate::common::{self, Random, check, create, have_qemu_img, path, qemu_contents, qemu_io};

const SIZE: u64 = (2 << 20) + 512 * 3;

fn open(image: &Path) -> Qcow2 {
    let storage: Arc<dyn Storage> =
        Arc::new(FileStorage::open(image, FileOptions::default()).unwrap());
    Qcow2::open(Probe::new(storage).unwrap(), None, false).unwrap()
}

/// Lines of text, which shrink well, different for each offset.
fn text(len: usize, seed: u64) -> Vec<u8> {
    (0..).flat_map(|n| format!("line {} of {seed}\n", n * 7).into_bytes()).take(len).collect()
}

fn pack(format: &dyn Format, offset: u64, bytes: &[u8]) {
    format.write_compressed(offset, &[WriteBuf::new(bytes)]).unwrap();
}

fn compressed_share(image: &Path) -> String {
    let output = common::qemu_img(&["check", "-f", "qcow2", &path(image)]);
    let line = output.lines().find(|l| l.contains("compressed clusters")).unwrap();
    line.rsplit(", ").next().unwrap().split(' ').next().unwrap().to_owned()
}

#[test]
fn a_whole_disk_is_packed_and_read_by_qemu() {
    if !have_qemu_img("pack") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for kind in ["zlib", "zstd"] {
        for options in [
            "cluster_size=4k",
            "",
            "cluster_size=2M",
            "extended_l2=on",
            "refcount_bits=1",
            "refcount_bits=64,cluster_size=1k",
            "refcount_bits=2,cluster_size=16k",
        ] {
            let options = format!("compression_type={kind},{options}");
            let options = options.trim_end_matches(',');
            let image = create(dir.path(), "a.qcow2", &SIZE.to_string(), options);
            let bytes = text(SIZE as usize, 1);
            let format = open(&image);
            pack(&format, 0, &bytes);
            assert!(common::read_all(&format) == bytes, "{options}");
            drop(format);
            check(&image);
            assert_eq!(compressed_share(&image), "100.00%", "{options}");
            assert!(qemu_contents(dir.path(), &image, None) == bytes, "{options}");
            let packed = std::fs::metadata(&image).unwrap().len();
            // With one user for each host cluster nothing can be shared.
            if !options.contains("refcount_bits=1") && !options.contains("size=2M") {
                assert!(packed < SIZE * 3 / 4, "{options}: {packed} bytes");
            }
            // QEMU writes over some of them, others stay readable, and we read its work.
            qemu_io(&image, &["write -P 9 100000 300000"]);
            check(&image);
            let mut now = bytes.clone();
            now[100_000..400_000].fill(9);
            let format = open(&image);
            assert!(common::read_all(&format) == now, "{options}");
            common::write(&format, 1_000_000, &[8; 70_000]);
            now[1_000_000..1_070_000].fill(8);
            // And once more packed, over all of it.
            let size = format.compressed_cluster().unwrap();
            let end = (SIZE / 2 / size * size) as usize;
            let again = text(end, 2);
            pack(&format, 0, &again);
            now[..end].copy_from_slice(&again);
            drop(format);
            check(&image);
            assert!(qemu_contents(dir.path(), &image, None) == now, "{options}: again");
        }
    }
}

#[test]
fn packed_clusters_share_a_host_cluster_and_free_it_with_the_last() {
    if !have_qemu_img("share") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "64M", "");
    let storage = Arc::new(MemoryStorage::new(std::fs::read(&image).unwrap()));
    let dynamic: Arc<dyn Storage> = storage.clone();
    let format = Qcow2::open(Probe::new(dynamic).unwrap(), None, false).unwrap();
    for n in 0..16u64 {
        pack(&format, n << 16, &[n as u8; 65536]);
    }
    format.flush().unwrap();
    let full = storage.bytes().len();
    assert!(full <= 6 * 65536, "one host cluster holds them all: {full}");
    let save = |name: &str| {
        let file = dir.path().join(name);
        std::fs::write(&file, storage.bytes()).unwrap();
        file
    };
    check(&save("b.qcow2"));
    for n in 0..15u64 {
        format.discard(n << 16, 65536).unwrap();
    }
    format.flush().unwrap();
    assert!(common::read(&format, 15 << 16, 65536) == [15; 65536]);
    check(&save("b.qcow2"));
    format.discard(15 << 16, 65536).unwrap();
    format.flush().unwrap();
    // The place is free: the next ones begin a cluster anew, and nothing leaks.
    pack(&format, 0, &[1; 65536]);
    common::write(&format, 1 << 20, &[2; 65536]);
    pack(&format, 65536, &[3; 65536]);
    assert!(common::read(&format, 1 << 20, 65536) == [2; 65536]);
    drop(format);
    let file = save("b.qcow2");
    check(&file);
    let contents = qemu_contents(dir.path(), &file, None);
    assert!(contents[..65536] == [1; 65536] && contents[65536..131_072] == [3; 65536]);
}

#[test]
fn what_does_not_shrink_is_stored_plain_and_what_is_not_whole_is_refused() {
    if !have_qemu_img("pack refusals") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", &SIZE.to_string(), "");
    let format = open(&image);
    let noise = Random(5).bytes(65536);
    pack(&format, 0, &noise);
    // The disk's last cluster is cut short.
    let last = SIZE / 65536 * 65536;
    pack(&format, last, &text((SIZE - last) as usize, 1));
    for (offset, len) in [(512, 65536), (0, 65535), (0, 65536 + 512), (last, 512)] {
        let result = format.write_compressed(offset, &[WriteBuf::new(&vec![0; len])]);
        assert!(matches!(result, Err(Error::Invalid(_))), "{offset} {len}: {result:?}");
    }
    let result = format.write_compressed(SIZE, &[WriteBuf::new(&[0; 512])]);
    assert!(matches!(result, Err(Error::OutOfRange { .. })), "{result:?}");
    drop(format);
    check(&image);
    assert_eq!(compressed_share(&image), "50.00%");
    assert!(qemu_contents(dir.path(), &image, None)[..65536] == noise);

    let data = dir.path().join("data");
    let image = create(dir.path(), "b.qcow2", "1M", &format!("data_file={}", path(&data)));
    let file = |path: &Path| -> Arc<dyn Storage> {
        Arc::new(FileStorage::open(path, FileOptions::default()).unwrap())
    };
    let options = Options { data_file: Some(file(&data)), ..Options::default() };
    let format = Qcow2::open_with(Probe::new(file(&image)).unwrap(), None, options).unwrap();
    assert_eq!(format.compressed_cluster(), None);
    let error = format.write_compressed(0, &[WriteBuf::new(&[0; 65536])]).unwrap_err().to_string();
    assert!(error.contains("external data file"), "{error}");
}

#[test]
fn the_filter_packs_writes_of_any_alignment() {
    if !have_qemu_img("filter") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", &SIZE.to_string(), "cluster_size=16k");
    let filter = CompressFilter::new(Arc::new(open(&image))).unwrap();
    let mut model = text(SIZE as usize, 3);
    common::write(&filter, 0, &model);
    let mut random = Random(11);
    for n in 0..60 {
        let len = 1 + random.below(90_000);
        let start = random.below(SIZE - len);
        let bytes = text(len as usize, n);
        common::write(&filter, start, &bytes);
        model[start as usize..(start + len) as usize].copy_from_slice(&bytes);
    }
    let result = filter.write(SIZE - 1, &[WriteBuf::new(&[0; 2])]);
    assert!(matches!(result, Err(Error::OutOfRange { .. })), "{result:?}");
    assert!(common::read_all(&filter) == model);
    drop(filter);
    check(&image);
    assert_eq!(compressed_share(&image), "100.00%");
    assert!(qemu_contents(dir.path(), &image, None) == model);
    let raw = block::raw::Raw::open(Arc::new(MemoryStorage::new(vec![0; 512])), false).unwrap();
    let error = CompressFilter::new(Arc::new(raw)).err().unwrap().to_string();
    assert!(error.starts_with("Compression is not supported for this drive"), "{error}");
}

/// One failing operation at each place of a packed write leaves nothing that is not counted.
#[test]
fn a_packed_write_that_fails_leaves_a_sound_image() {
    if !have_qemu_img("packed faults") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "1M", "cluster_size=4k");
    let image = std::fs::read(image).unwrap();
    for at in 0.. {
        let storage = Arc::new(MemoryStorage::new(image.clone()));
        let dynamic: Arc<dyn Storage> = storage.clone();
        let format = Qcow2::open(Probe::new(dynamic).unwrap(), None, false).unwrap();
        pack(&format, 0, &text(8192, 1));
        storage.fail_after(Some(at), true);
        let bytes = text(65536, 2);
        let result =
            format.write_compressed(4096, &[WriteBuf::new(&bytes)]).and_then(|()| format.flush());
        let met = storage.failed();
        assert_eq!(result.is_err(), met, "{at}");
        storage.fail_after(None, false);
        pack(&format, 4096, &bytes);
        assert!(common::read(&format, 4096, 65536) == bytes, "{at}: tried again");
        drop(format);
        let file = dir.path().join("b.qcow2");
        std::fs::write(&file, storage.bytes()).unwrap();
        check(&file);
        if !met {
            break;
        }
    }
}
