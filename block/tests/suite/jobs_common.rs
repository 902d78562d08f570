//! What the tests of long operations share: an image whose requests can be failed, held and counted.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, Scope, ScopedJoinHandle};

use block::jobs::{Control, Notice, Operation};
use block::queue::{Op, OwnedBufs, Queue, Request};
use block::raw::Raw;
use block::storage::memory::MemoryStorage;
use block::{Error, Format, Graph, Link, Node, ReadBuf, Result, StatusExtent, WriteBuf};
use serde_json::{Value, json};

use crate::common::{self, Random, path};

pub(crate) const MIB: u64 = 1 << 20;

/// A request as a hook sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Io {
    Read(u64, u64),
    Write(u64, u64),
    Zero(u64, u64),
    Flush,
}

/// Is called before each request; what it says fails it.
type Hook = Box<dyn Fn(Io) -> Option<i32> + Send + Sync>;

/// An image in memory that knows where it has data, with a hook before each request.
pub(crate) struct Hooked {
    below: Raw,
    storage: Arc<MemoryStorage>,
    hook: Mutex<Arc<Hook>>,
}

impl Hooked {
    pub(crate) fn add(graph: &Graph, name: &str, bytes: Vec<u8>) -> Arc<Self> {
        let storage = Arc::new(MemoryStorage::new(bytes));
        let below = Raw::open(storage.clone(), false).unwrap();
        let hook: Hook = Box::new(|_| None);
        let hooked = Arc::new(Self { below, storage, hook: Mutex::new(Arc::new(hook)) });
        graph.insert(Arc::new(Node::new(name, hooked.clone()))).unwrap();
        hooked
    }

    pub(crate) fn hook(&self, hook: impl Fn(Io) -> Option<i32> + Send + Sync + 'static) {
        *self.hook.lock().unwrap() = Arc::new(Box::new(hook));
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.storage.bytes()
    }

    fn call(&self, operation: &'static str, io: Io) -> Result<()> {
        let hook = self.hook.lock().unwrap().clone();
        match hook(io) {
            None => Ok(()),
            Some(errno) => Err(Error::Io {
                operation,
                filename: "hooked".to_owned(),
                offset: 0,
                source: std::io::Error::from_raw_os_error(errno),
            }),
        }
    }
}

fn len<'a>(lens: impl Iterator<Item = usize> + 'a) -> u64 {
    lens.sum::<usize>() as u64
}

impl Format for Hooked {
    fn driver(&self) -> &'static str {
        "hooked"
    }

    fn size(&self) -> u64 {
        self.below.size()
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read(&self, offset: u64, bufs: &[ReadBuf<'_>]) -> Result<()> {
        self.call("read", Io::Read(offset, len(bufs.iter().map(ReadBuf::len))))?;
        self.below.read(offset, bufs)
    }

    fn write(&self, offset: u64, bufs: &[WriteBuf<'_>]) -> Result<()> {
        self.call("write", Io::Write(offset, len(bufs.iter().map(WriteBuf::len))))?;
        self.below.write(offset, bufs)
    }

    fn flush(&self) -> Result<()> {
        self.call("flush", Io::Flush)?;
        self.below.flush()
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        // It may read as anything afterwards.
        self.below.write(offset, &[WriteBuf::new(&vec![0xdd; len as usize])])
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.call("write zeroes", Io::Zero(offset, len))?;
        self.below.write_zeroes(offset, len, unmap)
    }

    /// In steps of 4 KiB, by looking.
    fn block_status(&self, offset: u64, len: u64) -> Result<Vec<StatusExtent>> {
        let mut bytes = vec![0; len as usize];
        self.below.read(offset, &[ReadBuf::new(&mut bytes)])?;
        let mut list = Vec::new();
        for part in bytes.chunks(4096) {
            let zero = part.iter().all(|byte| *byte == 0);
            let len = part.len() as u64;
            let extent = if zero { StatusExtent::zero(len) } else { StatusExtent::data(len) };
            extent.push_to(&mut list);
        }
        Ok(list)
    }
}

/// A control, and what its operation tells.
pub(crate) fn control() -> (Control, Receiver<Notice>) {
    let (tell, told) = channel();
    let tell = Mutex::new(tell);
    // A test that does not listen any more has no use for it.
    (Control::new(move |notice| tell.lock().unwrap().send(notice).unwrap_or_default()), told)
}

/// Runs an operation to its end.
pub(crate) fn finish(operation: &mut dyn Operation, control: &Control) -> Result<()> {
    let result = operation.run(control).and_then(|()| operation.commit());
    if result.is_err() {
        operation.abort();
    }
    result
}

pub(crate) fn add(graph: &Graph, name: &str, image: &Path, more: &Value) -> Arc<Node> {
    let format = if image.extension().is_some_and(|e| e == "raw") { "raw" } else { "qcow2" };
    let mut options = json!({
        "driver": format, "node-name": name, "discard": "unmap",
        "file": {"driver": "file", "filename": path(image), "discard": "unmap"},
    });
    for (key, value) in more.as_object().unwrap() {
        options[key] = value.clone();
    }
    graph.add(&options).unwrap()
}

/// A pattern with data and holes.
pub(crate) fn pattern(size: u64, seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let mut bytes = vec![0; size as usize];
    for chunk in bytes.chunks_mut(48 << 10) {
        if random.below(3) > 0 {
            let data = random.bytes(chunk.len() as u64);
            chunk.copy_from_slice(&data);
        }
    }
    bytes
}

/// A guest with a queue of its own that changes its stripe until it is stopped: writes, writes of
/// several requests at once, zeroes and discards. Gives what the stripe has then; `None` where a
/// discard left it open.
pub(crate) fn guest(
    link: Link,
    stripe: std::ops::Range<u64>,
    seed: u64,
    stop: &AtomicBool,
    mut contents: Vec<Option<u8>>,
) -> Vec<Option<u8>> {
    let mut random = Random(seed);
    let mut queue = Queue::new(link).unwrap();
    let mut done = Vec::new();
    let size = stripe.end - stripe.start;
    while !stop.load(Ordering::Acquire) {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for id in 0..4 {
            let len = 512 * (1 + random.below(200));
            let offset = random.below((size - len) / 512) * 512;
            // Requests in flight together are not ordered.
            if ranges.iter().any(|(o, l)| offset < o + l && *o < offset + len) {
                continue;
            }
            ranges.push((offset, len));
            let at = stripe.start + offset;
            let place = offset as usize..(offset + len) as usize;
            let request = match random.below(8) {
                0 => {
                    contents[place].fill(None);
                    Request::plain(id, Op::Discard { offset: at, len })
                }
                1 | 2 => {
                    contents[place].fill(Some(0));
                    let unmap = random.below(2) == 0;
                    Request::plain(id, Op::WriteZeroes { offset: at, len, unmap, fua: false })
                }
                _ => {
                    let bytes = random.bytes(len);
                    for (now, byte) in contents[place].iter_mut().zip(&bytes) {
                        *now = Some(*byte);
                    }
                    let fua = random.below(16) == 0;
                    Request::write(id, at, fua, OwnedBufs::from_vec(bytes))
                }
            };
            queue.submit(request);
        }
        queue.drain(&mut done);
        for completion in done.drain(..) {
            completion.result.unwrap();
        }
        thread::yield_now();
    }
    contents
}

/// What a guest left.
type Guest<'scope> = ScopedJoinHandle<'scope, Vec<Option<u8>>>;

/// Guests in threads of a scope, each with a stripe of the disk to itself, from its start on.
pub(crate) fn guests<'scope>(
    scope: &'scope Scope<'scope, '_>,
    link: &Link,
    (count, stripe): (u64, u64),
    seed: u64,
    stop: &'scope AtomicBool,
    before: &[Option<u8>],
) -> Vec<Guest<'scope>> {
    let spawn = |n| {
        let at = n * stripe..(n + 1) * stripe;
        let before = before[at.start as usize..at.end as usize].to_vec();
        let link = link.clone();
        scope.spawn(move || guest(link, at, seed + n, stop, before))
    };
    (0..count).map(spawn).collect()
}

/// Waits for guests that were told to stop; what their stripes have, one after another.
pub(crate) fn join(guests: Vec<Guest<'_>>) -> Vec<Option<u8>> {
    guests.into_iter().flat_map(|guest| guest.join().unwrap()).collect()
}

/// Whether a disk has what the guests left.
pub(crate) fn assert_contents(bytes: &[u8], expected: &[Option<u8>], what: &str) {
    assert_eq!(bytes.len(), expected.len());
    let wrong = bytes.iter().zip(expected).position(|(byte, e)| e.is_some_and(|e| e != *byte));
    assert_eq!(wrong, None, "{what}: the first wrong byte");
}

pub(crate) fn put(node: &Node, offset: u64, bytes: &[u8]) {
    node.write(offset, &[WriteBuf::new(bytes)]).unwrap();
}

pub(crate) fn contents(node: &Node) -> Vec<u8> {
    let mut bytes = vec![0; node.size() as usize];
    node.read(0, &[ReadBuf::new(&mut bytes)]).unwrap();
    bytes
}

pub(crate) fn error_of<T>(result: Result<T>) -> String {
    result.err().unwrap().to_string()
}

/// A hook that calls `act` at the `n`th request of a kind, once, and the number of these requests.
pub(crate) fn nth(
    n: usize,
    kind: impl Fn(Io) -> bool + Send + Sync + 'static,
    act: impl Fn() -> Option<i32> + Send + Sync + 'static,
) -> (impl Fn(Io) -> Option<i32> + Send + Sync + 'static, Arc<AtomicU64>) {
    let count = Arc::new(AtomicU64::new(0));
    let counted = count.clone();
    let hook = move |io| {
        if kind(io) && counted.fetch_add(1, Ordering::SeqCst) == n as u64 { act() } else { None }
    };
    (hook, count)
}

pub(crate) fn is_read(io: Io) -> bool {
    matches!(io, Io::Read(..))
}

pub(crate) fn is_change(io: Io) -> bool {
    !is_read(io)
}

/// A raw image of 8 MiB without data.
pub(crate) fn raw(dir: &Path, name: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::File::create(&path).unwrap().set_len(8 << 20).unwrap();
    path
}

/// An image of 8 MiB with data in two places, for others to be over.
pub(crate) fn base(dir: &Path) -> PathBuf {
    let base = common::create(dir, "base.qcow2", "8M", "");
    common::qemu_io(&base, &["write -P 1 0 4M", "write -P 2 6M 100k"]);
    base
}

/// An overlay of [`base`], with more options if there are any (",...").
pub(crate) fn over(base: &Path, name: &str, options: &str) -> PathBuf {
    let options = format!("backing_file={},backing_fmt=qcow2{options}", path(base));
    common::create(base.parent().unwrap(), name, "8M", &options)
}

/// Has an overlay hide and zero some of what [`base`] has.
pub(crate) fn write_over(overlay: &Path) {
    common::qemu_io(overlay, &["write -P 3 1M 70k", "write -z 3M 256k", "write -P 4 7M 1k"]);
}
