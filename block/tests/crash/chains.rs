//! Crashes while a chain of images gets shorter beside a guest's writes: block-stream, block-commit of a middle
//! image and of the upper one. Whatever the crash leaves, every image is sound, each names the image that it
//! named before the job or the one that it is to name after it, and through these names the disk reads as
//! the timeline of the guest's requests allows.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use block::jobs::{Commit, CommitOptions, Control, Notice, Operation, Stream, StreamOptions};
use block::qcow2::check::{self, Severity};
use block::qcow2::{Options, Probe, Qcow2};
use block::{Attachment, Format, Graph, Node, ReadBuf, User, WriteBuf};

use crate::common::{Random, have_qemu_img, path, qemu_img};
use crate::pages::Pages;
use crate::points::{Point, each_point};
use crate::record::{Entry, Host};
use crate::replay::number;
use crate::timeline::{Event, Timeline, What};
use crate::workload::random_of;

/// Images of a chain, the lowest first.
const IMAGES: usize = 4;
const TOP: usize = IMAGES - 1;
const SIZE: usize = 600 << 10;
/// How often the job rests before it goes on beside the guest.
const PAUSES: usize = 20;
/// Points in the sample of a few seconds, of each job; which it takes of the points of a run.
const SAMPLE: u64 = 700;
const SAMPLE_EVERY: usize = 7;

/// What is done to the chain.
#[derive(Debug, Clone, Copy)]
enum Job {
    Stream,
    StreamTo(usize),
    /// The images from the first to above the second.
    Commit(usize, usize),
    /// The top into the lowest, which the guest uses then.
    Active,
}

impl Job {
    fn start(self, graph: &Graph) -> Box<dyn Operation> {
        let device = node(TOP);
        match self {
            Self::Stream => {
                let options = StreamOptions { device, ..StreamOptions::default() };
                Box::new(Stream::new(graph, &options).unwrap())
            }
            Self::StreamTo(base) => {
                let options = StreamOptions {
                    device,
                    base_node: Some(node(base)),
                    backing_file: Some(file(base)),
                    ..StreamOptions::default()
                };
                Box::new(Stream::new(graph, &options).unwrap())
            }
            Self::Commit(top, base) => {
                let options = CommitOptions {
                    device,
                    top_node: Some(node(top)),
                    base_node: Some(node(base)),
                    backing_file: Some(file(base)),
                    ..CommitOptions::default()
                };
                Box::new(Commit::new(graph, &options).unwrap())
            }
            Self::Active => {
                let options = CommitOptions { device, ..CommitOptions::default() };
                Box::new(Commit::new(graph, &options).unwrap())
            }
        }
    }

    /// The image whose name changes, and what it names then.
    fn renames(self) -> Option<(usize, Option<String>)> {
        match self {
            Self::Stream => Some((TOP, None)),
            Self::StreamTo(base) => Some((TOP, Some(file(base)))),
            Self::Commit(top, base) => Some((top + 1, Some(file(base)))),
            Self::Active => None,
        }
    }
}

fn node(n: usize) -> String {
    format!("n{n}")
}

fn file(n: usize) -> String {
    format!("{n}.qcow2")
}

/// The nodes of a chain whose files are on a host, and its guest.
struct Disk {
    host: Host,
    graph: Graph,
    guest: Attachment,
    model: Vec<u8>,
    events: Vec<Event>,
    random: Random,
}

impl Disk {
    /// The first `count` images, of which the last is the guest's.
    fn open(host: &Host, count: usize, model: Vec<u8>, random: Random) -> Self {
        let graph = Graph::new();
        for n in 0..count {
            let probe = Probe::new(host.file(n)).unwrap();
            let image = Qcow2::open_with(probe, None, Options::default()).unwrap();
            graph.insert(Arc::new(Node::of_qcow2(node(n), Arc::new(image)))).unwrap();
            if n > 0 {
                graph.append(&node(n - 1), &node(n)).unwrap();
            }
        }
        let guest = graph.attach(&node(count - 1), User::device("vda", true, false)).unwrap();
        Self { host: host.clone(), graph, guest, model, events: Vec::new(), random }
    }

    /// A write, zeroes or a flush of the guest.
    fn request(&mut self) {
        let start = self.host.now();
        let len = 512 * (1 + self.random.below(24) as usize);
        let at = self.random.below(((SIZE - len) / 512) as u64) as usize * 512;
        let (kind, bytes) = (self.random.below(7), self.random.bytes(len as u64));
        let link = self.guest.link();
        let what = match kind {
            0 => {
                link.flush().unwrap();
                What::Flushed { disk: Arc::new(self.model.clone()) }
            }
            1 => {
                link.write_zeroes(at as u64, len as u64, true, false).unwrap();
                What::Changed { at, bytes: vec![0; len] }
            }
            _ => {
                link.write(at as u64, &[WriteBuf::new(&bytes)], false).unwrap();
                What::Changed { at, bytes }
            }
        };
        if let What::Changed { at, bytes } = &what {
            self.model[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        self.events.push(Event { start, end: self.host.now(), what });
    }

    fn read(&self) -> Vec<u8> {
        let mut bytes = vec![0xee; SIZE];
        self.guest.node().read(0, &[ReadBuf::new(&mut bytes)]).unwrap();
        bytes
    }
}

/// A chain in whose images a guest has written one after the other; and what the disk holds.
fn make_chain(dir: &Path, options: &str, seed: u64) -> (Vec<Pages>, Vec<u8>) {
    let mut files = Vec::new();
    for n in 0..IMAGES {
        let mut all = options.to_owned();
        if n > 0 {
            all += &format!(",backing_file={},backing_fmt=qcow2", file(n - 1));
        }
        let image = path(&dir.join(file(n)));
        let args = ["create", "-q", "-u", "-f", "qcow2", "-o", &all, &image, &SIZE.to_string()];
        qemu_img(&args);
        files.push(Pages::new(&std::fs::read(&image).unwrap()));
    }
    let host = Host::new(files);
    let mut model = vec![0; SIZE];
    for n in 0..IMAGES {
        let mut disk = Disk::open(&host, n + 1, model, random_of(seed + n as u64));
        (0..12).for_each(|_| disk.request());
        disk.guest.link().flush().unwrap();
        model = disk.model;
    }
    (host.files(), model)
}

/// A job beside a guest, as it was recorded.
struct Recorded {
    log: Vec<Entry>,
    timeline: Timeline,
    /// The part of the log that the end of the job made.
    end: (usize, usize),
}

/// Runs the job: first piece by piece, with a pause after each in which the guest writes, then with the guest
/// beside it.
fn record(job: Job, files: &[Pages], model: &[u8], seed: u64) -> Recorded {
    let host = Host::new(files.to_vec());
    let mut disk = Disk::open(&host, IMAGES, model.to_vec(), random_of(!seed));
    let mut operation = job.start(&disk.graph);
    let ready = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&ready);
    let control = Control::new(move |notice| {
        told.fetch_or(notice == Notice::Ready, Ordering::AcqRel);
    });
    control.pause();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let running = scope.spawn(|| {
            operation.run(&control).unwrap();
            over.store(true, Ordering::Release);
        });
        for step in 0.. {
            // Not without end, where the job has a host that is busy.
            if step < 3 * PAUSES {
                (0..disk.random.below(3)).for_each(|_| disk.request());
            }
            let ended = || over.load(Ordering::Acquire) || ready.load(Ordering::Acquire);
            let before = control.progress().0;
            control.resume();
            while step < PAUSES && control.progress().0 == before && !ended() {
                thread::yield_now();
            }
            if ended() {
                break;
            }
            match step < PAUSES {
                true => control.pause(),
                false => thread::yield_now(),
            }
        }
        control.resume();
        (0..4).for_each(|_| disk.request());
        control.complete();
        running.join().unwrap();
    });
    (0..4).for_each(|_| disk.request());
    let start = host.now();
    operation.commit().unwrap();
    let end = (start, host.now());
    (0..6).for_each(|_| disk.request());
    assert!(disk.read() == disk.model, "{job:?}, seed {seed}: wrong before any crash");
    let timeline =
        Timeline { events: disk.events, first: Arc::new(model.to_vec()), snaps: Vec::new() };
    Recorded { log: host.log(), timeline, end }
}

/// What an image names as the one below it.
fn backing_name(image: &Pages) -> Option<String> {
    let header = image.read(0, 20);
    let offset = u64::from_be_bytes(header[8..16].try_into().unwrap()) as usize;
    let len = u32::from_be_bytes(header[16..20].try_into().unwrap()) as usize;
    (offset != 0).then(|| String::from_utf8(image.read(offset, len)).unwrap())
}

/// What the disk reads as through an image and those it names.
fn read_through(host: &Host, files: &[Pages], top: usize) -> Result<Vec<u8>, String> {
    let mut chain = vec![top];
    while let Some(name) = backing_name(&files[*chain.last().unwrap()]) {
        let below = (0..IMAGES).find(|n| file(*n) == name).ok_or(format!("names '{name}'"))?;
        chain.push(below);
    }
    let mut format: Option<Arc<dyn Format>> = None;
    for n in chain.into_iter().rev() {
        let mut open = || {
            let options = Options { read_only: true, ..Options::default() };
            Qcow2::open_with(Probe::new(host.file(n))?, format.take(), options)
        };
        format = Some(Arc::new(open().map_err(|error| format!("image {n}: {error}"))?));
    }
    let format = format.unwrap();
    let mut bytes = vec![0xee; SIZE];
    format.read(0, &[ReadBuf::new(&mut bytes)]).map_err(|error| error.to_string())?;
    Ok(bytes)
}

/// Tries the rules on what a crash left. Says whether the name was changed already.
fn verify(job: Job, recorded: &Recorded, point: &Point<'_>) -> Result<bool, String> {
    let host = Host::new(point.files.to_vec());
    for n in 0..IMAGES {
        let report = check::check(&*host.file(n), &check::Options::default());
        let report = report.map_err(|error| format!("image {n}: check: {error}"))?;
        let bad = report.findings.iter().find(|found| found.severity != Severity::Leak);
        if let Some(found) = bad {
            return Err(format!("image {n}: check: {}", found.text));
        }
    }
    let mut renamed = false;
    for (n, image) in point.files.iter().enumerate() {
        let (name, before) = (backing_name(image), n.checked_sub(1).map(file));
        match job.renames() {
            Some((which, after)) if which == n && name == after => renamed = true,
            _ if name == before => {}
            _ => return Err(format!("image {n} names {name:?}")),
        }
    }
    let expected = recorded.timeline.expected(point.cut);
    let right = |top| expected.check_disk(&read_through(&host, point.files, top)?);
    let (start, end) = recorded.end;
    match job {
        // Whoever starts the guest anew takes the image that it used.
        Job::Active if point.cut < start => right(TOP)?,
        Job::Active if point.cut > end => right(0)?,
        Job::Active => right(0).or_else(|_| right(TOP))?,
        _ => right(TOP)?,
    }
    if !renamed && point.cut > end && job.renames().is_some() {
        return Err("the name is as before the job, which has ended".to_owned());
    }
    Ok(renamed)
}

fn crashes_of(job: Job) {
    if !have_qemu_img("crash points of chains") {
        return;
    }
    let long = number("CRASH_POINTS");
    let wanted = long.map_or(SAMPLE, |points| points / 20);
    let (mut tried, mut renamed) = (0, 0);
    let first = number("CRASH_SEED").unwrap_or(1);
    for seed in first.. {
        let options = ["cluster_size=4k", "cluster_size=16k,extended_l2=on", "cluster_size=64k"];
        let dir = tempfile::tempdir().unwrap();
        let options = options[(seed % 3) as usize];
        let (files, model) = make_chain(dir.path(), options, seed);
        let recorded = record(job, &files, &model, seed);
        each_point(&files, &recorded.log, seed, |point| {
            if long.is_none() && !(point.cut * 5 + point.variant).is_multiple_of(SAMPLE_EVERY) {
                return true;
            }
            tried += 1;
            match verify(job, &recorded, &point) {
                Ok(changed) => renamed += u64::from(changed),
                Err(text) => panic!(
                    "{job:?} with {options}, seed {seed}, cut before entry {} of {}, variant {}, end {:?}: {text}",
                    point.cut,
                    recorded.log.len(),
                    point.variant,
                    recorded.end
                ),
            }
            true
        });
        if tried >= wanted && seed > first + 1 {
            break;
        }
    }
    println!("crash points tried of {job:?}: {tried}, in {renamed} the name was changed");
    assert_eq!(renamed > 0, job.renames().is_some());
    assert!(renamed < tried);
}

#[test]
fn a_crash_of_a_stream_of_all_images_leaves_the_disk() {
    crashes_of(Job::Stream);
}

#[test]
fn a_crash_of_a_stream_down_to_a_base_leaves_the_disk() {
    crashes_of(Job::StreamTo(1));
}

#[test]
fn a_crash_of_a_commit_of_middle_images_leaves_the_disk() {
    crashes_of(Job::Commit(2, 0));
}

#[test]
fn a_crash_of_a_commit_of_one_middle_image_leaves_the_disk() {
    crashes_of(Job::Commit(1, 0));
}

#[test]
fn a_crash_of_a_commit_of_the_image_in_use_leaves_the_disk_where_the_guest_had_it() {
    crashes_of(Job::Active);
}
