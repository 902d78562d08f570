//! File storage on real files.

use super::*;

fn storage(options: FileOptions) -> (tempfile::NamedTempFile, FileStorage) {
    // Beside the build's output: a temporary directory may be on tmpfs, without O_DIRECT.
    let file = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let storage = FileStorage::open(file.path(), options).unwrap();
    (file, storage)
}

#[test]
fn more_buffers_than_the_kernel_takes_at_once_are_all_transferred() {
    let (_file, storage) = storage(FileOptions::default());
    let bytes: Vec<u8> = (0..30_000u32).map(|n| n.to_le_bytes()[0]).collect();
    let parts: Vec<_> = bytes.chunks(10).map(WriteBuf::new).collect();
    storage.write_at(7, &parts).unwrap();
    let mut back = vec![0xff; 30_000];
    let parts: Vec<_> = back.chunks_mut(9).map(ReadBuf::new).collect();
    storage.read_at(7, &parts).unwrap();
    assert!(back == bytes);
}

#[test]
fn what_lies_past_the_end_reads_as_zeroes() {
    for direct in [false, true] {
        let (_file, storage) = storage(FileOptions { direct, ..FileOptions::default() });
        storage.write_at(0, &[WriteBuf::new(&[7; 5000])]).unwrap();
        let mut all = vec![0xff; 4096 * 4];
        let skip = all.as_ptr().align_offset(4096);
        let aligned = &mut all[skip..skip + 8192];
        storage.read_bulk(0, &[ReadBuf::new(aligned)]).unwrap();
        assert!(aligned[..5000].iter().all(|b| *b == 7), "direct {direct}");
        assert!(aligned[5000..].iter().all(|b| *b == 0), "direct {direct}");
        storage.read_at(1 << 30, &[ReadBuf::new(&mut aligned[..100])]).unwrap();
        assert!(aligned[..100].iter().all(|b| *b == 0));
    }
}

#[test]
fn bulk_and_plain_transfers_see_each_others_data() {
    let (_file, storage) = storage(FileOptions::default());
    let mut memory = vec![0; 4096 * 4];
    let skip = memory.as_ptr().align_offset(4096);
    let mut round = |n: u8| {
        let part = &mut memory[skip..skip + 8192];
        part.fill(n);
        storage.write_bulk(4096, &[WriteBuf::new(part)]).unwrap();
        storage.write_at(5000, &[WriteBuf::new(&[n + 1; 10])]).unwrap();
        let mut plain = vec![0; 8192];
        storage.read_at(4096, &[ReadBuf::new(&mut plain)]).unwrap();
        storage.read_bulk(4096, &[ReadBuf::new(part)]).unwrap();
        assert!(plain == part);
        assert_eq!(plain[903..906], [n, n + 1, n + 1]);
    };
    for n in 0..20 {
        round(n * 5);
    }
}

#[test]
fn zeroing_and_discarding_keep_the_length() {
    let (_file, storage) = storage(FileOptions::default());
    storage.write_at(0, &[WriteBuf::new(&[7; 300_000])]).unwrap();
    for unmap in [false, true] {
        storage.write_zeroes(1000, 200_000, unmap).unwrap();
        let mut bytes = vec![1; 300_000];
        storage.read_at(0, &[ReadBuf::new(&mut bytes)]).unwrap();
        assert!(bytes[1000..201_000].iter().all(|b| *b == 0));
        assert_eq!((bytes[999], bytes[201_000]), (7, 7));
    }
    storage.discard(0, 4096).unwrap();
    storage.write_zeroes(299_000, 2000, true).unwrap();
    assert_eq!(storage.len().unwrap(), 301_000);
}

#[test]
fn no_flush_is_believed_after_one_that_failed() {
    for direct in [false, true] {
        let (_file, storage) = storage(FileOptions { direct, ..FileOptions::default() });
        storage.flush().unwrap();
        storage.flushed(Err(io::Error::from_raw_os_error(libc::EIO))).unwrap_err();
        let error = storage.flush().unwrap_err().to_string();
        assert!(error.contains("an earlier flush failed"), "direct {direct}: {error}");
    }
}

#[test]
fn a_file_that_took_the_place_of_the_one_opened_is_refused() {
    let (first, _) = storage(FileOptions::default());
    let (second, _) = storage(FileOptions::default());
    let open = |file: &tempfile::NamedTempFile| File::open(file.path()).unwrap();
    same_file(&open(&first), open(&first)).unwrap();
    same_file(&open(&first), open(&second)).unwrap_err();
}

#[test]
fn directories_and_devices_that_are_no_disks_are_refused() {
    let options = FileOptions { read_only: true, ..FileOptions::default() };
    for path in ["/", "/dev/null"] {
        let error = FileStorage::open(path, options).unwrap_err().to_string();
        assert_eq!(error, format!("'file' driver requires '{path}' to be a regular file"));
    }
}
