//! A server with one export, and the programs that ask it.

use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex, mpsc};

use block::nbd::{Address, ExportOptions, Server, ServerOptions};
use block::{Graph, Node};
use tempfile::TempDir;

use crate::client::Client;

/// Whether a program can be run; says so where it cannot.
pub(crate) fn have(test: &str, program: &str) -> bool {
    let found = command(program).arg("--version").output().is_ok_and(|out| out.status.success());
    if !found {
        eprintln!("SKIPPED {test}: {program} is not installed (scripts/setup.sh test installs it)");
    }
    found
}

/// Runs a program, which must succeed; gives what it prints.
#[track_caller]
pub(crate) fn run(program: &str, args: &[&str]) -> String {
    let output = try_run(program, args);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {text}{errors}");
    text
}

pub(crate) fn try_run(program: &str, args: &[&str]) -> Output {
    command(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"))
}

/// The system's own Python comes first: it has libnbd's module, which nbdsh needs.
fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("/usr/bin:{path}"));
    command
}

/// A directory, a graph and a server on a unix socket. What is exported is node "d".
pub(crate) struct Setup {
    // Dropped first: sessions end before the graph goes.
    pub(crate) server: Server,
    pub(crate) graph: Graph,
    pub(crate) dir: TempDir,
    pub(crate) gone: Mutex<mpsc::Receiver<String>>,
}

impl Setup {
    pub(crate) fn new(options: ServerOptions) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (tell, gone) = mpsc::channel();
        let tell = Mutex::new(tell);
        let address = Address::Unix(dir.path().join("nbd"));
        let on_gone = move |id: &str| {
            let _ = tell.lock().unwrap().send(id.to_owned());
        };
        let server = Server::start(&address, options, on_gone).unwrap();
        Self { server, graph: Graph::new(), dir, gone: Mutex::new(gone) }
    }

    /// With a writable export of a new image; `options` are those of `qemu-img create`.
    pub(crate) fn with_image(size: &str, options: &str) -> Self {
        let setup = Self::new(ServerOptions::default());
        let image = setup.create("d.qcow2", size, options);
        setup.open("d", &image);
        setup.export("d", true).unwrap();
        setup
    }

    /// With a writable export of a raw file of zeroes.
    pub(crate) fn with_raw(size: u64) -> Self {
        let setup = Self::new(ServerOptions::default());
        let path = setup.dir.path().join("d.raw");
        std::fs::File::create(&path).unwrap().set_len(size).unwrap();
        let options = format!(
            "driver=raw,node-name=d,discard=unmap,file.driver=file,file.filename={}",
            path.display()
        );
        setup.graph.add_text(&options).unwrap();
        setup.export("d", true).unwrap();
        setup
    }

    pub(crate) fn create(&self, name: &str, size: &str, options: &str) -> PathBuf {
        let image = self.dir.path().join(name);
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        args.extend([image.to_str().unwrap(), size]);
        run("qemu-img", &args);
        image
    }

    pub(crate) fn open(&self, name: &str, image: &std::path::Path) -> Arc<Node> {
        let options = format!(
            "driver=qcow2,node-name={name},discard=unmap,file.driver=file,file.filename={}",
            image.display()
        );
        self.graph.add_text(&options).unwrap()
    }

    /// Exports a node under its name, with that id too.
    pub(crate) fn export(&self, node: &str, writable: bool) -> block::Result<()> {
        self.server.add_export(ExportOptions {
            id: node.to_owned(),
            name: node.to_owned(),
            description: Some("a disk".to_owned()),
            attachment: self.graph.attach_export(node, writable)?,
            writable,
            allocation_depth: true,
            bitmaps: Vec::new(),
        })
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("nbd")
    }

    pub(crate) fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket().display())
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    pub(crate) fn client(&self) -> Client {
        Client::connect(&self.socket())
    }

    /// Ends everything and lets `qemu-img check` look at the image.
    pub(crate) fn check(mut self) {
        self.server.stop();
        self.graph.remove("d").unwrap();
        run("qemu-img", &["check", "-f", "qcow2", &self.path("d.qcow2")]);
    }
}

/// Pseudo-random numbers (splitmix64).
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}
