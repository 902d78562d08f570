//! What the depth of a backing chain costs: `chain_depth DIR IMAGES...`.
//!
//! For each number of images, each of which has a cluster of its own: how long it takes to open the
//! chain, to read 4 KiB that only the lowest image has and 4 KiB that none has, the whole disk, and to
//! close it.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a tool for developers")]

use std::path::Path;
use std::time::Instant;

use block::qcow2::create::{CreateOptions, create};
use block::qcow2::{Probe, Qcow2};
use block::storage::{FileOptions, FileStorage, Storage};
use block::{Format, Graph, Progress, ReadBuf, WriteBuf};

const CLUSTER: usize = 65536;
const SIZE: u64 = 1 << 30;

fn make(dir: &Path, n: usize) {
    let image = dir.join(format!("{n}.qcow2"));
    let options = CreateOptions {
        size: SIZE,
        backing_file: n.checked_sub(1).map(|below| format!("{below}.qcow2")),
        backing_fmt: (n > 0).then(|| "qcow2".to_owned()),
        ..CreateOptions::default()
    };
    std::fs::write(&image, []).unwrap();
    let options_of_file = FileOptions { no_flush: true, ..FileOptions::default() };
    let storage: std::sync::Arc<dyn Storage> =
        std::sync::Arc::new(FileStorage::open(&image, options_of_file).unwrap());
    create(&*storage, None, &options, &Progress::default()).unwrap();
    let image = Qcow2::open(Probe::new(storage).unwrap(), None, false).unwrap();
    let place = u64::try_from(n * CLUSTER).unwrap();
    image.write(place, &[WriteBuf::new(&[7; CLUSTER])]).unwrap();
}

fn timed<T>(what: &str, act: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = act();
    println!("  {what}: {:.3} ms", start.elapsed().as_secs_f64() * 1e3);
    result
}

fn main() {
    let mut args = std::env::args().skip(1);
    let dir = args.next().expect("a directory");
    let dir = tempfile::tempdir_in(dir).unwrap();
    let mut made = 0;
    for images in args {
        let images: usize = images.parse().expect("a number of images");
        (made..images).for_each(|n| make(dir.path(), n));
        made = made.max(images);
        println!("{images} images");
        let top = dir.path().join(format!("{}.qcow2", images - 1));
        let graph = Graph::new();
        let options =
            format!("driver=qcow2,node-name=d,file.driver=file,file.filename={}", top.display());
        let node = timed("open", || graph.add_text(&options)).unwrap();
        let mut bytes = vec![0; 4096];
        let mut read = |what: &str, at: u64| {
            timed(what, || node.read(at, &[ReadBuf::new(&mut bytes)])).unwrap();
        };
        read("4 KiB of the lowest, first", 0);
        read("4 KiB of the lowest, again", 4096);
        read("4 KiB of none, first", SIZE - 8192);
        read("4 KiB of none, again", SIZE - 4096);
        let mut all = vec![0; 1 << 20];
        timed("the whole disk", || {
            for at in (0..SIZE).step_by(all.len()) {
                node.read(at, &[ReadBuf::new(&mut all)]).unwrap();
            }
        });
        drop(node);
        timed("close", || graph.remove("d")).unwrap();
    }
}
