use std::sync::Mutex;
use std::sync::mpsc::channel;
use std::thread;

use super::*;
use crate::format::Format;
use crate::raw::Raw;
use crate::storage::memory::MemoryStorage;
use crate::{ReadBuf, WriteBuf};

fn queue(bytes: Vec<u8>) -> (Arc<MemoryStorage>, Queue) {
    let storage = Arc::new(MemoryStorage::new(bytes));
    let raw = Raw::open(storage.clone(), false).unwrap();
    let node = Arc::new(Node::new("d", Arc::new(raw)));
    (storage, Queue::new(node).unwrap())
}

fn drained(queue: &mut Queue) -> Vec<Completion> {
    let mut out = Vec::new();
    queue.drain(&mut out);
    out.sort_by_key(|c| c.id);
    out
}

#[test]
fn every_request_is_completed_once_with_its_buffers() {
    let (storage, mut queue) = queue(vec![1; 8192]);
    queue.submit(Request::read(1, 0, OwnedBufs::from_vec(vec![0; 512])));
    queue.submit(Request::write(2, 4096, true, OwnedBufs::from_vec(vec![9; 512])));
    queue.submit(Request::plain(3, Op::Flush));
    queue.submit(Request::plain(
        4,
        Op::WriteZeroes { offset: 1024, len: 512, unmap: true, fua: false },
    ));
    queue.submit(Request::plain(5, Op::Discard { offset: 2048, len: 512 }));
    assert_eq!(queue.in_flight(), 5);
    let done = drained(&mut queue);
    assert_eq!(queue.in_flight(), 0);
    assert_eq!(done.iter().map(|c| c.id).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
    assert!(done.iter().all(|c| c.result.is_ok()));
    assert_eq!(done[0].bufs.as_slice().unwrap(), [1; 512]);
    let bytes = storage.flushed_bytes();
    assert_eq!(bytes[4096..4608], [9; 512]);
}

#[test]
fn a_failed_request_gives_its_errno_and_its_buffers_back() {
    let (storage, mut queue) = queue(vec![0; 4096]);
    queue.submit(Request::read(1, 4096, OwnedBufs::from_vec(vec![0; 512])));
    let done = drained(&mut queue);
    assert_eq!(done[0].result.as_ref().unwrap_err().errno(), libc::EINVAL);
    storage.set_capacity(Some(0));
    storage.fail_after(Some(0), false);
    queue.submit(Request::write(2, 0, false, OwnedBufs::from_vec(vec![1; 512])));
    let done = drained(&mut queue);
    assert_eq!(done[0].result.as_ref().unwrap_err().errno(), libc::EIO);
    assert_eq!(done[0].bufs.len(), 512);
}

#[test]
fn a_durable_write_needs_no_thread_of_those_that_wait_at_a_gate() {
    let (_, mut waiting) = queue(vec![0; 4096]);
    let closed = waiting.node().close_gate();
    for id in 0..64 {
        waiting.submit(Request::read(id, 0, OwnedBufs::from_vec(vec![0; 512])));
    }
    waiting.kick();
    let (storage, mut queue) = queue(vec![0; 4096]);
    queue.submit(Request::write(1, 0, true, OwnedBufs::from_vec(vec![9; 512])));
    assert!(drained(&mut queue)[0].result.is_ok());
    assert_eq!(storage.flushed_bytes()[..512], [9; 512]);
    assert_eq!((waiting.reap(&mut Vec::new()), waiting.in_flight()), (0, 64));
    drop(closed);
    assert_eq!(drained(&mut waiting).len(), 64);
}

/// An image with a fault: its code panics.
struct Panics;

impl Format for Panics {
    fn driver(&self) -> &'static str {
        "panics"
    }

    fn size(&self) -> u64 {
        4096
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read(&self, _: u64, bufs: &[ReadBuf<'_>]) -> Result<()> {
        crate::iobuf::fill_zero(bufs);
        Ok(())
    }

    fn write(&self, _: u64, _: &[WriteBuf<'_>]) -> Result<()> {
        panic!("write")
    }

    fn flush(&self) -> Result<()> {
        panic!("flush")
    }

    fn discard(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<()> {
        panic!("zeroes")
    }
}

#[test]
fn a_panic_completes_its_request_with_an_error_and_costs_no_thread() {
    let mut queue = Queue::new(Arc::new(Node::new("d", Arc::new(Panics)))).unwrap();
    // More panics than there are threads.
    for id in 0..100 {
        queue.submit(Request::write(id, 0, false, OwnedBufs::from_vec(vec![1; 512])));
    }
    queue.submit(Request::plain(100, Op::Flush));
    let zeroes = Op::WriteZeroes { offset: 0, len: 512, unmap: true, fua: true };
    queue.submit(Request::plain(101, zeroes));
    let done = drained(&mut queue);
    assert_eq!(done.len(), 102);
    assert!(done.iter().all(|c| c.result.is_err()));
    assert!(done[..100].iter().all(|c| c.bufs.len() == 512), "memory comes back");
    queue.submit(Request::read(1, 0, OwnedBufs::from_vec(vec![1; 512])));
    let done = drained(&mut queue);
    assert!(done[0].result.is_ok());
    assert_eq!(done[0].bufs.as_slice().unwrap(), [0; 512]);
}

fn durable_write(id: u8) -> Request {
    let bytes = vec![id; 512];
    Request::write(u64::from(id), u64::from(id) * 512, true, OwnedBufs::from_vec(bytes))
}

#[test]
fn durable_writes_that_wait_share_one_flush_that_begins_after_all_of_them() {
    for works in [true, false] {
        let (begin, begun) = channel();
        let (go, gone) = channel::<bool>();
        let (storage, mut queue) = queue(vec![0; 64 * 512]);
        let (of_flush, gone) = (Arc::downgrade(&storage), Mutex::new(gone));
        storage.before_flush(move || {
            let storage = of_flush.upgrade().unwrap();
            begin.send(storage.bytes()).unwrap();
            if !gone.lock().unwrap().recv().unwrap() {
                storage.fail_after(Some(0), true);
            }
        });
        queue.submit(durable_write(0));
        queue.kick();
        let mut out = Vec::new();
        let written = loop {
            queue.reap(&mut out);
            if let Ok(written) = begun.try_recv() {
                break written;
            }
            thread::yield_now();
        };
        assert_eq!(written[..512], [0; 512]);
        // While it is under way, many more are written; none is told to be durable by it.
        (1..=40).for_each(|id| queue.submit(durable_write(id)));
        queue.kick();
        while queue.engine.waiting_for_flush() < 40 {
            queue.reap(&mut out);
            thread::yield_now();
        }
        assert!(out.is_empty() && begun.try_recv().is_err(), "one flush at a time");
        go.send(true).unwrap();
        queue.wait();
        queue.reap(&mut out);
        assert_eq!(out.iter().map(|c| (c.id, c.result.is_ok())).collect::<Vec<_>>(), [(0, true)]);
        go.send(works).unwrap();
        queue.drain(&mut out);
        let written = begun.recv().unwrap();
        assert!((1..=40).all(|id| written[usize::from(id) * 512] == id));
        assert!(begun.try_recv().is_err(), "one flush for all");
        assert_eq!(out.len(), 41);
        assert!(out[1..].iter().all(|c| c.result.is_ok() == works));
        assert!(!works || storage.flushed_bytes() == written);
    }
}
