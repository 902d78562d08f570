//! Backups: the copy is the moment of its start, whatever is written, fails, rests or ends meanwhile.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread;

use block::bitmap::NewBitmap;
use block::jobs::{
    Action, Backup, BackupOptions, BitmapMode, Control, IoStatus, Notice, OnCbwError, OnError,
    Operation, SyncMode,
};
use block::{Error, Graph, Node, ReadBuf, User, WriteBuf};
use serde_json::{Value, json};

use crate::common::{Random, check, create, have_qemu_img, path, qemu_contents, qemu_img};
use crate::jobs_common::{
    Hooked, Io, MIB, add, assert_contents, base, contents, control, error_of, finish, guests,
    is_change, is_read, join, nth, over, pattern, put, raw, write_over,
};

mod bitmaps;
mod errors;
mod modes;
mod moment;
mod refused;

fn options(sync: SyncMode) -> BackupOptions {
    BackupOptions::new("s", "t", sync)
}

fn bitmap_bytes(node: &Node) -> u64 {
    node.bitmaps().get("b").unwrap().dirty_bytes()
}

fn add_bitmap(node: &Node, persistent: bool) {
    let new = NewBitmap { name: "b", granularity: Some(65536), persistent, disabled: false };
    node.add_bitmap(&new).unwrap();
}

/// A source of several pieces with data, holes and both, and the number of requests a backup makes.
fn small() -> (Graph, Arc<Hooked>, Arc<Hooked>, Vec<u8>) {
    let graph = Graph::new();
    let bytes = pattern(MIB + 70_000 / 512 * 512, 21);
    let source = Hooked::add(&graph, "s", bytes.clone());
    let target = Hooked::add(&graph, "t", vec![0xee; bytes.len()]);
    (graph, source, target, bytes)
}

/// A write of the source that is held at the `node`'s first write until told to go on.
fn hold_first_write(node: &Hooked) -> (std::sync::mpsc::Receiver<()>, std::sync::mpsc::Sender<()>) {
    let (arrived, arrivals) = channel();
    let (go, goes) = channel::<()>();
    let (first, both) = (AtomicBool::new(true), Mutex::new((arrived, goes)));
    node.hook(move |io| {
        if matches!(io, Io::Write(..)) && first.swap(false, Ordering::SeqCst) {
            let both = both.lock().unwrap();
            both.0.send(()).unwrap();
            both.1.recv().unwrap();
        }
        None
    });
    (arrivals, go)
}
