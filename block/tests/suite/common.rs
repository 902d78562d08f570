//! What the tests share: qemu-img as oracle, and short ways to read and write images.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use block::{Format, Graph, NewSnapshot, Node, ReadBuf, Result, SnapshotChange, WriteBuf};

/// Held while a program is being started: until it is executed it has our files, and with them our
/// locks of images, which another test may have closed by then.
static STARTING: Mutex<()> = Mutex::new(());

/// Waits until no program has files of ours: those closed before are free for others, and for us.
pub(crate) fn wait_for_starts() {
    drop(STARTING.lock().unwrap_or_else(PoisonError::into_inner));
}

/// Starting programs beside other tests that open and close images in this process.
pub(crate) trait Start {
    /// As `spawn`.
    fn start(&mut self) -> std::io::Result<Child>;

    /// As `output`.
    fn run(&mut self) -> std::io::Result<Output>;
}

impl Start for Command {
    fn start(&mut self) -> std::io::Result<Child> {
        let _starting = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
        // It returns once the program is executed.
        self.spawn()
    }

    fn run(&mut self) -> std::io::Result<Output> {
        self.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        self.start()?.wait_with_output()
    }
}

/// Whether qemu-img can be run; says so where it cannot.
pub(crate) fn have_qemu_img(test: &str) -> bool {
    let found = Command::new("qemu-img").arg("--version").run().is_ok();
    if !found {
        eprintln!("SKIPPED {test}: qemu-img is not installed (apt-get install qemu-utils)");
    }
    found
}

fn run(program: &str, args: &[&str]) -> Output {
    Command::new(program).args(args).run().unwrap_or_else(|e| panic!("{program}: {e}"))
}

/// Runs qemu-img, which must succeed; gives its output.
pub(crate) fn qemu_img(args: &[&str]) -> String {
    let output = run("qemu-img", args);
    assert!(
        output.status.success(),
        "qemu-img {args:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Runs qemu-io commands on an image, which must succeed.
pub(crate) fn qemu_io(image: &Path, commands: &[&str]) -> String {
    let mut args = vec!["-f", "qcow2"];
    for command in commands {
        args.extend(["-c", command]);
    }
    let image = path(image);
    args.push(&image);
    let output = run("qemu-io", &args);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success() && !text.contains("error"),
        "qemu-io {args:?}: {text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

pub(crate) fn path(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// qemu-img finds neither corruption nor leaks.
#[track_caller]
pub(crate) fn check(image: &Path) {
    let output = run("qemu-img", &["check", "-f", "qcow2", &path(image)]);
    assert!(
        output.status.success(),
        "qemu-img check: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// qemu-img finds no corruption; leaks may be.
#[track_caller]
pub(crate) fn check_leaks_only(image: &Path) {
    let output = run("qemu-img", &["check", "-f", "qcow2", &path(image)]);
    assert!(
        matches!(output.status.code(), Some(0 | 3)),
        "qemu-img check: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// The disk as QEMU sees it, or as it was at a snapshot.
pub(crate) fn qemu_contents(dir: &Path, image: &Path, snapshot: Option<&str>) -> Vec<u8> {
    let raw = dir.join("oracle.raw");
    let (from, to) = (path(image), path(&raw));
    let mut args = vec!["convert", "-O", "raw"];
    let tag;
    if let Some(snapshot) = snapshot {
        tag = format!("snapshot.name={snapshot}");
        args.extend(["-l", &tag]);
    }
    args.extend([from.as_str(), to.as_str()]);
    qemu_img(&args);
    std::fs::read(&raw).unwrap()
}

/// Creates a qcow2 image.
pub(crate) fn create(dir: &Path, name: &str, size: &str, options: &str) -> PathBuf {
    let image = dir.join(name);
    let mut args = vec!["create", "-q", "-f", "qcow2"];
    if !options.is_empty() {
        args.extend(["-o", options]);
    }
    let at = path(&image);
    args.extend([at.as_str(), size]);
    qemu_img(&args);
    image
}

/// A graph with the image as node "d".
pub(crate) fn open(image: &Path) -> (Graph, Arc<Node>) {
    wait_for_starts();
    let graph = Graph::new();
    let node = graph
        .add_text(&format!(
            "driver=qcow2,node-name=d,discard=unmap,file.driver=file,file.filename={}",
            image.display()
        ))
        .unwrap();
    (graph, node)
}

pub(crate) fn read(format: &dyn Format, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xa5; len];
    format.read(offset, &[ReadBuf::new(&mut bytes)]).unwrap();
    bytes
}

pub(crate) fn read_all(format: &dyn Format) -> Vec<u8> {
    read(format, 0, usize::try_from(format.size()).unwrap())
}

pub(crate) fn write(format: &dyn Format, offset: u64, bytes: &[u8]) {
    format.write(offset, &[WriteBuf::new(bytes)]).unwrap();
}

pub(crate) fn new_snapshot(tag: &str) -> NewSnapshot {
    NewSnapshot { tag: tag.to_owned(), date_sec: 1_700_000_000, date_nsec: 5000, vm_clock_nsec: 77 }
}

/// All steps of a change.
pub(crate) fn land(change: &mut dyn SnapshotChange) -> Result<()> {
    change.prepare()?;
    change.publish()?;
    change.finish()
}

pub(crate) fn id_of(format: &dyn Format, tag: &str) -> String {
    format.snapshots().into_iter().find(|s| s.tag == tag).unwrap().id
}

/// A disk-only snapshot.
pub(crate) fn save(format: &dyn Format, tag: &str) {
    let mut change = format.create_snapshot(&new_snapshot(tag)).unwrap();
    land(&mut *change).unwrap();
}

pub(crate) fn load(format: &dyn Format, tag: &str) {
    let mut change = format.revert_snapshot(&id_of(format, tag)).unwrap();
    land(&mut *change).unwrap();
}

pub(crate) fn delete(format: &dyn Format, tag: &str) {
    let mut change = format.delete_snapshot(&id_of(format, tag)).unwrap();
    land(&mut *change).unwrap();
}

/// Repeatable pseudo-random numbers (xorshift).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub(crate) fn bytes(&mut self, len: u64) -> Vec<u8> {
        (0..len.div_ceil(8))
            .flat_map(|_| self.next().to_le_bytes())
            .take(usize::try_from(len).unwrap())
            .collect()
    }
}
