//! Who waits for a flush, and who does not.

use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread;

use super::*;
use crate::qcow2::create::{CreateOptions, create};
use crate::qcow2::{Options, Probe};
use crate::queue::Located;
use crate::storage::memory::MemoryStorage;
use crate::{Format, Progress, ReadBuf, WriteBuf};

const CLUSTER: u64 = 65536;

#[test]
fn reads_and_writes_in_place_do_not_wait_for_a_flush_and_new_clusters_do() {
    let storage = Arc::new(MemoryStorage::new(Vec::new()));
    let options = CreateOptions { size: 64 * CLUSTER, ..CreateOptions::default() };
    create(&*storage, None, &options, &Progress::default()).unwrap();
    let probe = Probe::new(storage.clone()).unwrap();
    let image = Qcow2::open_with(probe, None, Options::default()).unwrap();
    image.write(0, &[WriteBuf::new(&[1; 512])]).unwrap();
    let (begin, begun) = channel();
    let (go, gone) = channel::<()>();
    let gone = Mutex::new(gone);
    storage.before_flush(move || {
        // An error when the test is over and the image closes.
        let _ = begin.send(());
        // An error when the test needs no more waiting.
        let _ = gone.lock().unwrap().recv();
    });
    thread::scope(|scope| {
        let flush = scope.spawn(|| image.flush());
        begun.recv().unwrap();
        assert_eq!(read(&image, 0), [1; 512]);
        let mut located = Located::default();
        assert!(image.locate_read(0, 512, &mut located));
        located.clear();
        assert!(image.locate_write(0, 512, &mut located), "in place");
        located.clear();
        image.write(512, &[WriteBuf::new(&[2; 512])]).unwrap();
        assert_eq!(read(&image, 512), [2; 512]);
        assert!(!image.locate_write(CLUSTER, 512, &mut located), "a new cluster");
        assert!(!located.conflict && image.try_meta().is_none());
        let other = scope.spawn(|| image.write(CLUSTER, &[WriteBuf::new(&[7; 512])]));
        // Between the steps too.
        go.send(()).unwrap();
        begun.recv().unwrap();
        assert_eq!(read(&image, 0), [1; 512]);
        assert!(!other.is_finished() && !flush.is_finished());
        drop(go);
        flush.join().unwrap().unwrap();
        other.join().unwrap().unwrap();
    });
    assert_eq!(read(&image, CLUSTER), [7; 512]);
    // Nothing is left frozen after a flush that fails.
    storage.fail_after(Some(0), true);
    image.flush().unwrap_err();
    image.flush().unwrap();
    image.write(2 * CLUSTER, &[WriteBuf::new(&[8; 512])]).unwrap();
}

fn read(image: &Qcow2, at: u64) -> [u8; 512] {
    let mut bytes = [0; 512];
    image.read(at, &[ReadBuf::new(&mut bytes)]).unwrap();
    bytes
}
