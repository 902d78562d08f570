//! A process that serves an image is killed under load: see `docs/crash-safety.md`.
//!
//! The process is this program again, which runs [`serve`]: the block engine as the storage daemon
//! has it, with the NBD server and io_uring, and a thread that takes and deletes snapshots.

mod client;
mod ledger;

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use block::nbd::{Address, ExportOptions, Server, ServerOptions};
use block::qcow2::check::{self, Repair};
use block::storage::FileStorage;
use block::storage::memory::MemoryStorage;
use block::{Format, Graph};

use crate::common::{self, Random, Start as _, create, have_qemu_img};
use crate::kinds::{Base, Kind, Start};
use crate::record::Host;
use crate::unlocked;
use client::{Client, Request};
use ledger::Ledger;

const SIZE: usize = 12 << 20;
/// The child's image and socket.
const IMAGE: &str = "CRASH_SERVE_IMAGE";
const SOCKET: &str = "CRASH_SERVE_SOCKET";
/// Requests in flight.
const DEPTH: usize = 12;

/// Serves an image until killed. Not a test by itself: the parent runs it.
#[test]
#[ignore = "the process that the kill tests kill"]
fn serve() {
    let (Ok(image), Ok(socket)) = (std::env::var(IMAGE), std::env::var(SOCKET)) else { return };
    let graph = Graph::new();
    let options =
        format!("driver=qcow2,node-name=d,discard=unmap,file.driver=file,file.filename={image}");
    let node = graph.add_text(&options).unwrap();
    let server = Server::start(&Address::Unix(socket.into()), ServerOptions::default(), |_| {});
    let server = server.unwrap();
    let export = ExportOptions {
        id: "e".to_owned(),
        name: "d".to_owned(),
        description: None,
        attachment: graph.attach_export("d", true).unwrap(),
        writable: true,
        allocation_depth: false,
        bitmaps: Vec::new(),
    };
    server.add_export(export).unwrap();
    println!("\nready");
    let format = node.format();
    for round in 0.. {
        let before = format.snapshots();
        let tag = format!("{}", before.last().map_or(0, |s| s.tag.parse().unwrap_or(0)) + 1);
        common::save(&*format, &tag);
        println!("saved {tag}");
        std::io::stdout().flush().unwrap();
        if before.len() > 3 {
            let old = &before[round % before.len()].tag;
            println!("deleting {old}");
            common::delete(&*format, old);
        }
    }
}

/// The process under test.
struct Victim {
    child: Child,
    said: BufReader<ChildStdout>,
}

impl Victim {
    /// This program as a server that takes snapshots all the while.
    fn start(image: &Path, socket: &Path) -> Self {
        let mut victim = Self::spawn(
            Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "kill::serve", "--ignored", "--nocapture", "--test-threads=1"])
                .env(IMAGE, image)
                .env(SOCKET, socket),
        );
        let mut line = String::new();
        while line != "ready\n" {
            line.clear();
            assert!(victim.said.read_line(&mut line).unwrap() > 0, "the server ended");
        }
        victim
    }

    /// The storage daemon itself.
    fn daemon(program: &Path, image: &Path, socket: &Path) -> Self {
        let disk = "driver=qcow2,node-name=d,discard=unmap,file.driver=file,file.aio=io_uring";
        let mut victim = Self::spawn(
            Command::new(program)
                .args(["--machine", "none"])
                .args(["--blockdev", &format!("{disk},file.filename={}", image.display())])
                .args(["--nbd-server", &format!("addr.type=unix,addr.path={}", socket.display())])
                .args(["--export", "type=nbd,id=e,node-name=d,name=d,writable=on"]),
        );
        // The socket of the last one is there, and refuses.
        while Client::connect(socket, "d").is_err() {
            assert!(victim.child.try_wait().unwrap().is_none(), "the daemon ended");
            std::thread::yield_now();
        }
        victim
    }

    fn spawn(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).start().unwrap();
        let said = BufReader::new(child.stdout.take().unwrap());
        Self { child, said }
    }

    /// Kills it; gives what it said.
    fn kill(mut self) -> Vec<String> {
        // SIGKILL.
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.said.lines().map_while(Result::ok).collect()
    }
}

/// Writes until so many requests were answered, and kills with the others in flight.
fn load_and_kill(
    victim: Victim,
    socket: &Path,
    ledger: &mut Ledger,
    random: &mut Random,
) -> Vec<String> {
    let mut client = Client::connect(socket, "d").unwrap();
    let answers = 20 + random.below(400);
    for _ in 0..answers {
        while ledger.in_flight() < DEPTH {
            let (request, span) = match random.below(15) {
                0 => (Request::Flush, 0..0),
                _ => ledger.request(random),
            };
            let name = client.send(&request).unwrap();
            ledger.sent(name, &request, span);
        }
        ledger.answered(client.receive().unwrap());
    }
    victim.kill()
}

/// Snapshots as they were found first: they stay so.
type Snapshots = HashMap<String, Vec<u8>>;

fn kill_rounds(options: &'static str, rounds: u64, start: impl Fn(&Path, &Path) -> Victim) {
    let dir = tempfile::tempdir().unwrap();
    let kind = Kind { options, size: SIZE, start: Start::Empty };
    let image = create(dir.path(), "a.qcow2", &SIZE.to_string(), options);
    let socket = dir.path().join("nbd");
    let mut random = Random(0x51 + options.len() as u64);
    let mut ledger = Ledger::new(SIZE);
    let mut snapshots = Snapshots::new();
    for round in 0..rounds {
        let victim = start(&image, &socket);
        let said = load_and_kill(victim, &socket, &mut ledger, &mut random);
        let case = format!("{options}, round {round}");
        look(kind, &image, &case, &mut ledger, &mut snapshots, &said);
        if round % 10 == 9 {
            let storage = FileStorage::open(&image, unlocked()).unwrap();
            let repair = check::Options { repair: repair_of(&image), progress: None };
            assert!(check::check(&storage, &repair).unwrap().is_clean(), "{case}");
            drop(storage);
            common::check(&image);
        }
    }
    println!("processes killed: {rounds} ({options}), {} snapshots compared", snapshots.len());
}

/// What an image needs: with the dirty bit its counts are behind until it is opened again.
fn repair_of(image: &Path) -> Repair {
    let mut header = [0; 80];
    std::fs::File::open(image).unwrap().read_exact(&mut header).unwrap();
    if header[79] & 1 != 0 { Repair::All } else { Repair::Leaks }
}

/// What the kill left, looked at in memory.
fn look(
    kind: Kind,
    image: &Path,
    case: &str,
    ledger: &mut Ledger,
    snapshots: &mut Snapshots,
    said: &[String],
) {
    let bytes = std::fs::read(image).unwrap();
    let storage = MemoryStorage::new(bytes.clone());
    let lazily = repair_of(image) == Repair::All;
    let repair = if lazily { Repair::All } else { Repair::No };
    let options = check::Options { repair, progress: None };
    let report = check::check(&storage, &options).unwrap();
    let wrong = |found: &&check::Finding| !lazily && found.severity != check::Severity::Leak;
    assert_eq!(report.findings.iter().find(wrong), None, "{case}");
    assert!(report.check_errors == 0 && (!lazily || report.is_clean()), "{case}");
    let base = Base::from_bytes(kind, &bytes);
    let host = Host::new(base.files.clone());
    let format = base.open(&host, false).unwrap_or_else(|e| panic!("{case}: {e}"));
    ledger.settle(&common::read_all(&format)).unwrap_or_else(|e| panic!("{case}: {e}"));
    let there: Vec<_> = format.snapshots().into_iter().map(|s| s.tag).collect();
    let told = |what: &str| {
        said.iter().filter_map(|l| l.strip_prefix(what)).map(str::to_owned).collect::<Vec<_>>()
    };
    let (saved, deleted) = (told("saved "), told("deleting "));
    for tag in saved.iter().chain(snapshots.keys()) {
        assert!(there.contains(tag) || deleted.contains(tag), "{case}: snapshot {tag} is lost");
    }
    snapshots.retain(|tag, _| there.contains(tag));
    for tag in there {
        common::load(&format, &tag);
        let now = common::read_all(&format);
        let first = snapshots.entry(tag.clone()).or_insert_with(|| now.clone());
        assert!(*first == now, "{case}: snapshot {tag} changed");
    }
}

fn rounds(few: u64) -> u64 {
    match std::env::var_os("CRASH_POINTS") {
        // The long run: 200 of all kinds.
        Some(_) => 50,
        None => few,
    }
}

#[test]
fn killed_while_it_serves_clusters_of_64k() {
    if have_qemu_img("kill") {
        kill_rounds("cluster_size=64k", rounds(3), Victim::start);
    }
}

#[test]
fn killed_while_it_serves_clusters_of_4k() {
    if have_qemu_img("kill") {
        kill_rounds("cluster_size=4k", rounds(3), Victim::start);
    }
}

#[test]
fn killed_while_it_serves_subclusters() {
    if have_qemu_img("kill") {
        kill_rounds("cluster_size=32k,extended_l2=on", rounds(2), Victim::start);
    }
}

/// The binary beside the directory of the tests, where `cargo build` puts it, or `TARDIGRADE`.
fn daemon() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("TARDIGRADE") {
        return Some(path.into());
    }
    let me = std::env::current_exe().unwrap();
    me.ancestors().map(|dir| dir.join("tardigrade")).find(|path| path.is_file())
}

#[test]
fn killed_as_the_storage_daemon() {
    let Some(program) = daemon() else {
        assert!(std::env::var("CI").as_deref() != Ok("true"), "CI=true, but nothing is built");
        eprintln!("SKIPPED: tardigrade is not built: run 'cargo build' first, or 'make test'");
        return;
    };
    if have_qemu_img("kill") {
        let start = |image: &Path, socket: &Path| Victim::daemon(&program, image, socket);
        kill_rounds("cluster_size=64k,lazy_refcounts=on", rounds(3), start);
        kill_rounds("cluster_size=8k", rounds(2), start);
    }
}
