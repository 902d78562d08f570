//! Images that are not what they say: each is refused with what is wrong, and without great memory.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use block::qcow2::check::{self, Repair};
use block::qcow2::{Probe, Qcow2};
use block::storage::Storage;
use block::storage::memory::MemoryStorage;
use block::{Error, Format, Graph, Result, WriteBuf};

use crate::common::{self, Random, Start, create, have_qemu_img, save};

fn open(bytes: Vec<u8>, read_only: bool) -> Result<Qcow2> {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new(bytes));
    Qcow2::open(Probe::new(storage)?, None, read_only)
}

fn good(dir: &Path) -> Vec<u8> {
    let image = create(dir, "a.qcow2", "4M", "");
    let storage = Arc::new(MemoryStorage::new(std::fs::read(image).unwrap()));
    let format = {
        let storage: Arc<dyn Storage> = storage.clone();
        Qcow2::open(Probe::new(storage).unwrap(), None, false).unwrap()
    };
    common::write(&format, 0, &[1; 200_000]);
    save(&format, "s");
    drop(format);
    storage.bytes()
}

fn patched(image: &[u8], at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut image = image.to_vec();
    image[at..at + bytes.len()].copy_from_slice(bytes);
    image
}

#[test]
fn absurd_header_fields_are_named() {
    if !have_qemu_img("headers") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = good(dir.path());
    let cases: &[(usize, &[u8], &str)] = &[
        (0, b"QCOW", "Image is not in qcow2 format"),
        (4, &[0, 0, 0, 1], "version 1"),
        (4, &[0, 0, 0, 9], "version 9"),
        (20, &[0, 0, 0, 8], "cluster_bits is 8"),
        (20, &[0, 0, 0, 22], "cluster_bits is 22"),
        (20, &[0xff; 4], "cluster_bits"),
        (24, &[0xff; 8], "too small for a disk"),
        (24, &[0x7f, 0, 0, 0, 0, 0, 0, 0], "too small for a disk"),
        (32, &[0, 0, 0, 1], "encrypted (AES)"),
        (32, &[0, 0, 0, 2], "encrypted (LUKS)"),
        (36, &[0xff; 4], "l1_size"),
        (36, &[0, 0, 0, 0], "l1_size is 0"),
        (40, &[0, 0, 0, 0, 0, 0, 0, 8], "L1 table offset 0x8"),
        (40, &[0, 0x40, 0, 0, 0, 0, 0, 0], "beyond the end of the file"),
        (40, &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0], "L1 table offset"),
        (48, &[0, 0, 0, 0, 0, 0, 0, 1], "refcount table offset"),
        (48, &[0, 0x40, 0, 0, 0, 0, 0, 0], "refcount table"),
        (56, &[0xff; 4], "refcount table of 4294967295 clusters"),
        (56, &[0; 4], "no refcount table"),
        (60, &[0xff; 4], "snapshots are too many"),
        (60, &[0, 0, 0xff, 0xff], "beyond the end of the file"),
        (64, &[0, 0, 0, 0, 0, 0, 0, 1], "snapshot table offset"),
        (72, &[0, 0, 0, 0, 0, 0, 0, 4], "'data-file' is required"),
        (72, &[0x40, 0, 0, 0, 0, 0, 0, 0], "unknown incompatible feature 62"),
        (72, &[0, 0, 0, 0, 0, 0, 0, 2], "marked as corrupt"),
        (96, &[0, 0, 0, 7], "refcount_order is 7"),
        (100, &[0, 0, 0, 50], "header_length is 50"),
        (100, &[0xff; 4], "header_length"),
        (8, &[0xff; 12], "backing file name"),
    ];
    for (at, bytes, text) in cases {
        let error = open(patched(&image, *at, bytes), false).err();
        let error = error.unwrap_or_else(|| panic!("{text}: opened")).to_string();
        assert!(error.contains(text), "byte {at}: {error}");
    }
}

/// What is past the end of the file reads as zeroes, but would be written over.
/// What QEMU does not open for a check either is not called sound.
#[test]
fn a_header_that_cannot_be_opened_cannot_be_checked() {
    if !have_qemu_img("headers and checks") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = good(dir.path());
    let zstd = std::fs::read(create(dir.path(), "z.qcow2", "4M", "compression_type=zstd")).unwrap();
    let (file, bit) = (dir.path().join("bad.qcow2"), 1 << 3);
    let marked = image[79] | bit;
    for (image, at, bytes, reason) in [
        (&image, 8, &[0, 0x10, 0, 0, 0, 0, 0, 0][..], "backing file name at 0x10000000000000"),
        (&image, 8, &[0, 0, 0, 0, 0, 0, 2, 0, 0, 1, 0, 0], "(65536 bytes) does not fit"),
        (&image, 104, &[64], "unknown compression type 64"),
        (&image, 104, &[1], "compression type 1, whose incompatible feature bit must be set"),
        (
            &image,
            79,
            &[marked],
            "compression type 0, whose incompatible feature bit must not be set",
        ),
        (&zstd, 79, &[0], "compression type 1, whose incompatible feature bit must be set"),
    ] {
        let bad = patched(image, at, bytes);
        std::fs::write(&file, &bad).unwrap();
        let args = ["check", "-f", "qcow2", file.to_str().unwrap()];
        let theirs = Command::new("qemu-img").args(args).run().unwrap();
        assert_eq!(theirs.status.code(), Some(1), "{reason}");
        for repair in [Repair::No, Repair::All] {
            let storage = MemoryStorage::new(bad.clone());
            let options = check::Options { repair, progress: None };
            let error = check::check(&storage, &options).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
            assert_eq!(storage.bytes(), bad);
        }
        let error = open(bad, true).err().unwrap().to_string();
        assert!(error.contains(reason), "{error}");
    }
}

#[test]
fn a_refcount_table_that_goes_on_past_the_end_of_the_file_is_refused_for_writing() {
    if !have_qemu_img("refcount table") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut image = good(dir.path());
    let disk = common::read_all(&open(image.clone(), true).unwrap());
    // A copy of the table at the end, so that only the claim is wrong.
    let table = u64::from_be_bytes(image[48..56].try_into().unwrap()) as usize;
    image.resize(image.len().next_multiple_of(65536), 0);
    let end = image.len() as u64;
    image.extend_from_within(table..table + 65536);
    let image = patched(&image, 48, &end.to_be_bytes());
    open(image.clone(), false).unwrap();
    let bad = patched(&image, 56, &[0, 0, 0, 128]);
    let error = open(bad.clone(), false).err().unwrap().to_string();
    assert!(error.contains("has 128 clusters, beyond the end of the file"), "{error}");
    assert!(common::read_all(&open(bad, true).unwrap()) == disk);
}

#[test]
fn a_refcount_block_that_is_there_twice_is_refused_for_writing() {
    if !have_qemu_img("refcount blocks") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = good(dir.path());
    let table = u64::from_be_bytes(image[48..56].try_into().unwrap()) as usize;
    let entry: [u8; 8] = image[table..table + 8].try_into().unwrap();
    let bad = patched(&image, table + 80, &entry);
    let error = open(bad.clone(), false).err().unwrap().to_string();
    assert!(error.contains("two refcount table entries"), "{error}");
    open(bad, true).unwrap();
}

#[test]
fn extended_l2_entries_in_clusters_below_16_kib_are_refused() {
    if !have_qemu_img("extended L2, small clusters") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = std::fs::read(create(dir.path(), "a.qcow2", "1M", "cluster_size=8k")).unwrap();
    let error = open(patched(&image, 79, &[16]), true).err().unwrap().to_string();
    assert!(error.contains("extended L2 entries and clusters of 8192 bytes"), "{error}");
}

#[test]
fn a_vm_state_size_beyond_all_bounds_gets_an_error_when_it_is_read() {
    if !have_qemu_img("vm state size") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = good(dir.path());
    let table = u64::from_be_bytes(image[64..72].try_into().unwrap()) as usize;
    let format = open(patched(&image, table + 40, &[0xff; 8]), false).unwrap();
    assert_eq!(format.snapshots()[0].vm_state_size, u64::MAX);
    let state = format.open_vmstate("1").unwrap();
    for (offset, len) in [(0, 1), (0, u64::MAX), (u64::MAX, u64::MAX), (1 << 60, 1 << 30)] {
        let result = state.extents(offset, len);
        assert!(matches!(result, Err(Error::OutOfRange { .. })), "{offset} {len}: {result:?}");
    }
}

#[test]
fn corrupt_and_dirty_images_can_still_be_read() {
    if !have_qemu_img("marked images") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = good(dir.path());
    for bit in [1, 2] {
        let format = open(patched(&image, 79, &[bit]), true).unwrap();
        assert_eq!(common::read(&format, 0, 1), [1]);
    }
}

#[test]
fn truncated_images_are_refused_or_read_as_zeroes_but_never_panic() {
    if !have_qemu_img("truncated images") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = good(dir.path());
    for len in [0, 1, 3, 4, 71, 72, 103, 104, 512, 65536, 65537, 131_072, 200_000, 262_144] {
        let result = open(image[..len].to_vec(), false);
        assert!(result.is_err(), "{len} bytes");
    }
    for n in 0..image.len() / 4096 {
        let _ = open(image[..n * 4096].to_vec(), true);
    }
}

/// Random damage: any answer but a panic or a hang is right.
#[test]
fn random_damage_gets_answers() {
    if !have_qemu_img("random damage") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = good(dir.path());
    let mut random = Random(77);
    let metadata = [0..4096u64, 65536..65600, 131_072..131_200, 196_608..196_700];
    for _ in 0..600 {
        let mut bytes = image.clone();
        for _ in 0..=random.below(3) {
            let area = &metadata[random.below(4) as usize];
            let at = area.start + random.below(area.end - area.start);
            bytes[at as usize] = random.next() as u8;
        }
        let storage = Arc::new(MemoryStorage::new(bytes));
        // Host offsets may be anything; a real file would be sparse.
        storage.set_capacity(Some(64 << 20));
        let dynamic: Arc<dyn Storage> = storage.clone();
        let opened = Probe::new(dynamic).and_then(|probe| Qcow2::open(probe, None, false));
        let Ok(format) = opened else { continue };
        let mut buf = vec![0; 65536];
        let _ = format.read(0, &[block::ReadBuf::new(&mut buf)]);
        let _ = format.write(1 << 20, &[WriteBuf::new(&buf)]);
        let _ = format.create_snapshot(&common::new_snapshot("x")).and_then(|mut c| {
            c.prepare()?;
            c.publish()?;
            c.finish()
        });
        for snapshot in format.snapshots() {
            let _ = format.open_vmstate(&snapshot.id).and_then(|s| s.extents(0, 65536));
            let _ = format.revert_snapshot(&snapshot.id).and_then(|mut c| common::land(&mut *c));
            let _ = format.delete_snapshot(&snapshot.id).and_then(|mut c| common::land(&mut *c));
        }
        let _ = format.flush();
    }
}

/// A cut image is never taken for one with zeroes in it.
#[test]
fn a_truncated_image_gives_its_data_or_an_error_that_says_so() {
    if !have_qemu_img("truncated data") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "4M", "");
    let storage = Arc::new(MemoryStorage::new(std::fs::read(&image).unwrap()));
    let dynamic: Arc<dyn Storage> = storage.clone();
    let format = Qcow2::open(Probe::new(dynamic).unwrap(), None, false).unwrap();
    common::write(&format, 0, &[1; 1 << 20]);
    drop(format);
    let image = storage.bytes();
    for clusters in 1..image.len().div_ceil(65536) {
        for read_only in [true, false] {
            let bytes = image[..clusters * 65536].to_vec();
            let mut all = vec![0; 1 << 20];
            let result = open(bytes, read_only)
                .and_then(|format| format.read(0, &[block::ReadBuf::new(&mut all)]));
            let error = result.unwrap_err().to_string();
            assert!(error.contains("is the file truncated?"), "{clusters}: {error}");
        }
    }
}

#[test]
fn an_l2_table_that_is_there_twice_is_refused() {
    if !have_qemu_img("L2 twice") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "2M", "cluster_size=512");
    common::qemu_io(&image, &["write 0 64k"]);
    let mut bytes = std::fs::read(&image).unwrap();
    let l1 = u64::from_be_bytes(bytes[40..48].try_into().unwrap()) as usize;
    bytes.copy_within(l1..l1 + 8, l1 + 80);
    let error = open(bytes, false).err().unwrap().to_string();
    assert!(error.contains("twice"), "{error}");
}

/// What is wrong below a snapshot is an error of the snapshot: the running guest keeps its disk.
#[test]
fn a_damaged_snapshot_is_refused_and_the_disk_goes_on() {
    if !have_qemu_img("damaged snapshot") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = good(dir.path());
    let table = u64::from_be_bytes(image[64..72].try_into().unwrap()) as usize;
    let l1 = u64::from_be_bytes(image[table..table + 8].try_into().unwrap()) as usize;
    for (at, bytes) in [
        (table, [0x7f; 8]),
        (table + 4, [0xff; 8]),
        (l1, 0x1_0200u64.to_be_bytes()),
        (l1, (1u64 << 50).to_be_bytes()),
    ] {
        let storage = Arc::new(MemoryStorage::new(patched(&image, at, &bytes)));
        let dynamic: Arc<dyn Storage> = storage.clone();
        let format = Qcow2::open(Probe::new(dynamic).unwrap(), None, false).unwrap();
        let reverted = format.revert_snapshot("1").and_then(|mut change| change.prepare());
        assert!(matches!(reverted, Err(Error::Corrupt { .. })), "{at}: {reverted:?}");
        common::write(&format, 0, &[4; 65536]);
        assert_eq!(common::read(&format, 0, 1), [4]);
        drop(format);
        assert_eq!(storage.bytes()[79] & 2, 0, "not marked as corrupt");
    }
}

#[test]
fn a_backing_name_right_behind_a_version_2_header_is_read() {
    if !have_qemu_img("old header") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "1M", "compat=0.10");
    let mut bytes = std::fs::read(image).unwrap();
    bytes[8..16].copy_from_slice(&72u64.to_be_bytes());
    bytes[16..20].copy_from_slice(&9u32.to_be_bytes());
    bytes[72..96].fill(0xff);
    bytes[72..81].copy_from_slice(b"base.imgX");
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new(bytes));
    let probe = Probe::new(storage).unwrap();
    assert_eq!(probe.backing_file(), Some("base.imgX"));
    assert_eq!(probe.backing_format(), None);
}

#[test]
fn autoclear_bits_are_gone_for_good_before_anything_is_written() {
    use block::storage::memory::Op;
    if !have_qemu_img("autoclear") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = good(dir.path());
    let storage = Arc::new(MemoryStorage::new(patched(&image, 95, &[1])));
    storage.record();
    let dynamic: Arc<dyn Storage> = storage.clone();
    let _format = Qcow2::open(Probe::new(dynamic).unwrap(), None, false).unwrap();
    let mut ops = storage.recorded();
    ops.retain(|op| !matches!(op, Op::Read(..)));
    assert_eq!(ops, [Op::Write(88, 8), Op::Flush]);
}

#[test]
fn a_bad_table_entry_marks_the_image_and_ends_writes() {
    if !have_qemu_img("bad entry") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(dir.path(), "a.qcow2", "4M", "");
    let mut bytes = std::fs::read(&image).unwrap();
    let l1 = u64::from_be_bytes(bytes[40..48].try_into().unwrap()) as usize;
    // The L1 entry points to the header's cluster plus a bit that no cluster offset has.
    bytes[l1..l1 + 8].copy_from_slice(&(1u64 << 63 | 0x200).to_be_bytes());
    let storage = Arc::new(MemoryStorage::new(bytes));
    let dynamic: Arc<dyn Storage> = storage.clone();
    let format = Qcow2::open(Probe::new(dynamic).unwrap(), None, false).unwrap();
    let error = format.write(0, &[WriteBuf::new(&[1; 512])]).unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
    assert!(format.write(2 << 20, &[WriteBuf::new(&[1; 512])]).is_err());
    drop(format);
    assert_eq!(storage.bytes()[79] & 2, 2, "the corrupt bit");
}

#[test]
fn files_that_are_no_images_say_what_was_found() {
    let dir = tempfile::tempdir().unwrap();
    let cases = [
        ("empty", Vec::new(), "is empty"),
        ("short", b"QFI\xfb\0\0\0\x03".to_vec(), "is truncated: 8 bytes"),
        ("other", vec![0x7f; 4096], "starts with [7f, 7f, 7f, 7f]"),
    ];
    for (name, bytes, text) in cases {
        let file = dir.path().join(name);
        std::fs::write(&file, bytes).unwrap();
        let options =
            format!("driver=qcow2,node-name=d,file.driver=file,file.filename={}", file.display());
        let error = Graph::new().add_text(&options).err().unwrap().to_string();
        assert!(error.starts_with("Image is not in qcow2 format"), "{error}");
        assert!(error.contains(text), "{error}");
    }
    let error = Graph::new()
        .add_text("driver=qcow2,node-name=d,file.driver=file,file.filename=/no/such/file")
        .err()
        .unwrap();
    let text = "Could not open '/no/such/file': No such file or directory";
    assert_eq!(error.to_string(), text);
}
