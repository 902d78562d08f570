//! An image in memory that keeps the contract of `block::Format`, checks that its caller does, and
//! fails at any step on demand.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use block::snapshot::{VmStateExtent, VmStateRead};
use block::{
    Error, Format, NewSnapshot, ReadBuf, Result, SnapshotChange, SnapshotCreate, SnapshotInfo,
    WriteBuf,
};

/// VM state by cluster index.
type Clusters = BTreeMap<u64, Vec<u8>>;

/// All that is on the image's "disk".
#[derive(Clone, PartialEq, Debug, Default)]
pub(crate) struct Disk {
    pub(crate) data: Vec<u8>,
    pub(crate) snapshots: Vec<Snapshot>,
}

#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Snapshot {
    pub(crate) info: SnapshotInfo,
    data: Vec<u8>,
    pub(crate) vmstate: Clusters,
}

type Hook = Box<dyn Fn() + Send>;

pub(crate) struct FakeImage {
    cluster: u64,
    read_only: bool,
    snapshots: bool,
    disk: Mutex<Disk>,
    /// Steps that fail, by name, and how often each is let through before.
    faults: Mutex<BTreeMap<&'static str, usize>>,
    on_write: Mutex<Option<Hook>>,
    on_read: Mutex<Option<Hook>>,
    /// Where VM state was read, while someone wants to know.
    reads: Mutex<Option<Vec<u64>>>,
    /// Changes begun and neither finished nor rolled back.
    open_changes: AtomicUsize,
}

impl FakeImage {
    pub(crate) fn new(cluster: u64) -> Arc<Self> {
        Self::with(cluster, false, true)
    }

    pub(crate) fn with(cluster: u64, read_only: bool, snapshots: bool) -> Arc<Self> {
        Arc::new(Self {
            cluster,
            read_only,
            snapshots,
            disk: Mutex::new(Disk { data: vec![0x11; 4096], snapshots: Vec::new() }),
            faults: Mutex::default(),
            on_write: Mutex::default(),
            on_read: Mutex::default(),
            reads: Mutex::default(),
            open_changes: AtomicUsize::new(0),
        })
    }

    pub(crate) fn disk(&self) -> MutexGuard<'_, Disk> {
        self.disk.lock().unwrap()
    }

    /// Fails `step` after letting it through `after` times; other faults are forgotten.
    pub(crate) fn fail(&self, step: &'static str, after: usize) {
        *self.faults.lock().unwrap() = BTreeMap::from([(step, after)]);
    }

    pub(crate) fn fail_too(&self, step: &'static str) {
        self.faults.lock().unwrap().insert(step, 0);
    }

    pub(crate) fn mend(&self) {
        self.faults.lock().unwrap().clear();
    }

    pub(crate) fn on_write(&self, hook: impl Fn() + Send + 'static) {
        *self.on_write.lock().unwrap() = Some(Box::new(hook));
    }

    /// The hook is called before VM state is read.
    pub(crate) fn on_read(&self, hook: impl Fn() + Send + 'static) {
        *self.on_read.lock().unwrap() = Some(Box::new(hook));
    }

    /// The offsets of all reads of VM state during `work`.
    pub(crate) fn reads_of(&self, work: impl FnOnce()) -> Vec<u64> {
        *self.reads.lock().unwrap() = Some(Vec::new());
        work();
        self.reads.lock().unwrap().take().unwrap()
    }

    pub(crate) fn open_changes(&self) -> usize {
        self.open_changes.load(Ordering::Relaxed)
    }

    fn step(&self, step: &'static str) -> Result<()> {
        match self.faults.lock().unwrap().get_mut(step) {
            Some(0) => Err(Error::NotSupported(format!("{step} was made to fail"))),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn begin(&self, step: &'static str, kind: Kind) -> Result<Change<'_>> {
        self.step(step)?;
        self.open_changes.fetch_add(1, Ordering::Relaxed);
        Ok(Change { image: self, kind, stage: Stage::Begun, before: None })
    }

    fn snapshot(&self, id: &str) -> Result<Snapshot> {
        let found = self.disk().snapshots.iter().find(|s| s.info.id == id).cloned();
        found.ok_or_else(|| Error::NotSupported(format!("no id {id}")))
    }
}

impl Format for FakeImage {
    fn driver(&self) -> &'static str {
        "fake"
    }
    fn size(&self) -> u64 {
        self.disk().data.len() as u64
    }
    fn read_only(&self) -> bool {
        self.read_only
    }
    fn read(&self, _offset: u64, _bufs: &[ReadBuf<'_>]) -> Result<()> {
        unreachable!("checkpoints do not read the guest's disk")
    }
    fn write(&self, _offset: u64, _bufs: &[WriteBuf<'_>]) -> Result<()> {
        unreachable!("checkpoints do not write the guest's disk")
    }
    fn flush(&self) -> Result<()> {
        Ok(())
    }
    fn discard(&self, _offset: u64, _len: u64) -> Result<()> {
        Ok(())
    }
    fn write_zeroes(&self, _offset: u64, _len: u64, _unmap: bool) -> Result<()> {
        Ok(())
    }
    fn supports_snapshots(&self) -> bool {
        self.snapshots
    }
    fn snapshots(&self) -> Vec<SnapshotInfo> {
        self.disk().snapshots.iter().map(|s| s.info.clone()).collect()
    }
    fn create_snapshot(&self, new: &NewSnapshot) -> Result<Box<dyn SnapshotCreate + '_>> {
        let (data, ids) = {
            let disk = self.disk();
            let ids = disk.snapshots.iter().filter_map(|s| s.info.id.parse::<u32>().ok());
            (disk.data.clone(), ids.max().unwrap_or(0))
        };
        let snapshot = Snapshot {
            info: SnapshotInfo {
                id: (ids + 1).to_string(),
                tag: new.tag.clone(),
                vm_state_size: 0,
                disk_size: data.len() as u64,
                date_sec: new.date_sec,
                date_nsec: new.date_nsec,
                vm_clock_nsec: new.vm_clock_nsec,
                icount: None,
            },
            data,
            vmstate: Clusters::new(),
        };
        Ok(Box::new(self.begin("create", Kind::Create(Mutex::new(snapshot)))?))
    }
    fn revert_snapshot(&self, id: &str) -> Result<Box<dyn SnapshotChange + '_>> {
        Ok(Box::new(self.begin("revert", Kind::Revert(id.to_owned()))?))
    }
    fn delete_snapshot(&self, id: &str) -> Result<Box<dyn SnapshotChange + '_>> {
        Ok(Box::new(self.begin("delete", Kind::Delete(id.to_owned()))?))
    }
    fn open_vmstate(&self, id: &str) -> Result<Box<dyn VmStateRead + '_>> {
        self.step("open_vmstate")?;
        let snapshot = self.snapshot(id)?;
        Ok(Box::new(Reader { image: self, snapshot }))
    }
}

enum Kind {
    Create(Mutex<Snapshot>),
    Revert(String),
    Delete(String),
}

#[derive(PartialEq, Clone, Copy, Debug)]
enum Stage {
    Begun,
    Prepared,
    Published,
    Over,
}

struct Change<'a> {
    image: &'a FakeImage,
    kind: Kind,
    stage: Stage,
    before: Option<Disk>,
}

impl SnapshotChange for Change<'_> {
    fn prepare(&mut self) -> Result<()> {
        assert_eq!(self.stage, Stage::Begun);
        self.image.step("prepare")?;
        self.stage = Stage::Prepared;
        Ok(())
    }

    fn publish(&mut self) -> Result<()> {
        assert_eq!(self.stage, Stage::Prepared);
        let wanted = match &self.kind {
            Kind::Revert(id) => self.image.snapshot(id)?.data,
            _ => Vec::new(),
        };
        let mut disk = self.image.disk();
        self.before = Some(disk.clone());
        match &self.kind {
            Kind::Create(snapshot) => disk.snapshots.push(snapshot.lock().unwrap().clone()),
            Kind::Revert(_) => disk.data = wanted,
            Kind::Delete(id) => disk.snapshots.retain(|s| s.info.id != *id),
        }
        drop(disk);
        // The write is on the disk; it is the flush that fails.
        self.image.step("publish")?;
        self.stage = Stage::Published;
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        assert_eq!(self.stage, Stage::Published);
        self.over();
        self.image.step("finish")
    }

    fn rollback(&mut self) -> Result<()> {
        assert_ne!(self.stage, Stage::Over);
        self.over();
        self.image.step("rollback")?;
        if let Some(before) = self.before.take() {
            *self.image.disk() = before;
        }
        Ok(())
    }
}

impl Change<'_> {
    fn over(&mut self) {
        self.stage = Stage::Over;
        self.image.open_changes.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Change<'_> {
    fn new_snapshot(&mut self) -> &mut Snapshot {
        match &mut self.kind {
            Kind::Create(snapshot) => snapshot.get_mut().unwrap(),
            _ => unreachable!("only a new snapshot takes VM state"),
        }
    }

    /// Puts bytes in clusters, which come to be when they are written and go when all of them is
    /// zeroed. `source` gives the bytes from a position on, or none for zeroes.
    fn put<'b>(&self, offset: u64, len: usize, source: impl Fn(usize) -> Option<&'b [u8]>) {
        let cluster = usize::try_from(self.image.cluster).unwrap();
        let unit = cluster.min(4096);
        let offset = usize::try_from(offset).unwrap();
        assert!(offset.is_multiple_of(unit), "offset {offset:#x}");
        assert!(len.is_multiple_of(unit), "length {len:#x}");
        let Kind::Create(snapshot) = &self.kind else {
            unreachable!("only a new snapshot takes VM state")
        };
        let vmstate = &mut snapshot.lock().unwrap().vmstate;
        let mut done = 0;
        while done < len {
            let inside = (offset + done) % cluster;
            let count = (cluster - inside).min(len - done);
            let index = ((offset + done) / cluster) as u64;
            match source(done) {
                Some(bytes) => {
                    let to = vmstate.entry(index).or_insert_with(|| vec![0; cluster]);
                    to[inside..inside + count].copy_from_slice(&bytes[..count]);
                }
                None if count == cluster => drop(vmstate.remove(&index)),
                None => {
                    if let Some(to) = vmstate.get_mut(&index) {
                        to[inside..inside + count].fill(0);
                    }
                }
            }
            done += count;
        }
    }
}

impl SnapshotCreate for Change<'_> {
    fn write_vmstate(&self, offset: u64, bufs: &[WriteBuf<'_>]) -> Result<()> {
        self.image.step("write_vmstate")?;
        if let Some(hook) = &*self.image.on_write.lock().unwrap() {
            hook();
        }
        let mut bytes = Vec::new();
        for buf in bufs {
            // SAFETY: the buffer's maker vouched for it, and the test does not change it now.
            bytes.extend_from_slice(unsafe { std::slice::from_raw_parts(buf.as_ptr(), buf.len()) });
        }
        self.put(offset, bytes.len(), |at| Some(&bytes[at..]));
        Ok(())
    }

    fn inherit_vmstate(&mut self, id: &str) -> Result<u64> {
        self.image.step("inherit_vmstate")?;
        let base = self.image.snapshot(id)?;
        let snapshot = self.new_snapshot();
        assert!(snapshot.vmstate.is_empty(), "VM state was written before it was inherited");
        snapshot.vmstate = base.vmstate;
        snapshot.info.vm_state_size = base.info.vm_state_size;
        Ok(base.info.vm_state_size)
    }

    fn zero_vmstate(&self, offset: u64, len: u64) -> Result<()> {
        self.image.step("zero_vmstate")?;
        self.put(offset, usize::try_from(len).unwrap(), |_| None);
        Ok(())
    }

    fn set_vmstate_size(&mut self, size: u64) {
        let cluster = self.image.cluster;
        if let Kind::Create(snapshot) = &self.kind {
            let snapshot = &mut *snapshot.lock().unwrap();
            let last = snapshot.vmstate.keys().last().map_or(0, |last| last + 1);
            assert!(size >= last * cluster, "a write lies past {size}");
            snapshot.info.vm_state_size = size;
        }
    }

    fn switch(&self) -> Result<()> {
        self.image.step("switch")?;
        if let Kind::Create(snapshot) = &self.kind {
            snapshot.lock().unwrap().data = self.image.disk().data.clone();
        }
        Ok(())
    }

    fn set_time(&mut self, date_sec: u32, date_nsec: u32, vm_clock_nsec: u64) {
        if let Kind::Create(snapshot) = &self.kind {
            let info = &mut snapshot.lock().unwrap().info;
            *info = SnapshotInfo { date_sec, date_nsec, vm_clock_nsec, ..info.clone() };
        }
    }

    fn cluster_size(&self) -> u64 {
        self.image.cluster
    }
}

struct Reader<'a> {
    image: &'a FakeImage,
    snapshot: Snapshot,
}

impl VmStateRead for Reader<'_> {
    fn size(&self) -> u64 {
        self.snapshot.info.vm_state_size
    }

    fn read(&self, offset: u64, bufs: &[ReadBuf<'_>]) -> Result<()> {
        self.image.step("read")?;
        if let Some(hook) = &*self.image.on_read.lock().unwrap() {
            hook();
        }
        if let Some(reads) = &mut *self.image.reads.lock().unwrap() {
            reads.push(offset);
        }
        let cluster = self.image.cluster;
        let mut at = offset;
        for buf in bufs {
            let mut done = 0;
            while done < buf.len() {
                let inside = usize::try_from(at % cluster).unwrap();
                let size = usize::try_from(cluster).unwrap();
                let len = (size - inside).min(buf.len() - done);
                let zeroes = vec![0; size];
                let bytes = self.snapshot.vmstate.get(&(at / cluster)).unwrap_or(&zeroes);
                let to = buf.as_mut_ptr().wrapping_add(done);
                // SAFETY: the buffer's maker vouched for `len` more bytes from `done` on.
                unsafe { to.copy_from(bytes[inside..].as_ptr(), len) };
                done += len;
                at += len as u64;
            }
        }
        Ok(())
    }

    fn extents(&self, offset: u64, len: u64) -> Result<Vec<VmStateExtent>> {
        self.image.step("extents")?;
        let cluster = self.image.cluster;
        let mut extents: Vec<VmStateExtent> = Vec::new();
        let mut at = offset;
        while at < offset + len {
            let end = ((at / cluster + 1) * cluster).min(offset + len);
            let zero = !self.snapshot.vmstate.contains_key(&(at / cluster));
            match extents.last_mut() {
                Some(last) if last.zero == zero => last.len += end - at,
                _ => extents.push(VmStateExtent { offset: at, len: end - at, zero }),
            }
            at = end;
        }
        Ok(extents)
    }
}
