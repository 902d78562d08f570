//! Mirrors: the target is the same as the source when it takes its place, whatever happens before.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};
use std::thread;

use block::jobs::{Control, CopyMode, Mirror, MirrorOptions, Notice, OnError, Operation, SyncMode};
use block::{Attachment, Error, Graph, ReadBuf, User, WriteBuf};
use serde_json::json;

use crate::common::{check, create, have_qemu_img, path, qemu_contents, qemu_img};
use crate::jobs_common::{
    Hooked, Io, MIB, add, assert_contents, base, contents, control, error_of, finish, guest,
    guests, is_read, join, over, pattern, put, raw, write_over,
};

mod blocking;
mod ends;
mod errors;
mod pivot;
mod refused;

fn options(sync: SyncMode) -> MirrorOptions {
    MirrorOptions::new("s", "t", sync)
}

fn wait_for(told: &Receiver<Notice>, wanted: Notice) {
    while told.recv().unwrap() != wanted {}
}

fn device(graph: &Graph) -> Attachment {
    graph.attach("s", User::device("vda", true, false)).unwrap()
}

/// A mirror that is ready, in the thread of a scope.
struct Ready<'scope> {
    control: Control,
    told: Receiver<Notice>,
    job: thread::ScopedJoinHandle<'scope, block::Result<()>>,
}

fn until_ready<'scope>(
    scope: &'scope thread::Scope<'scope, '_>,
    mirror: &'scope mut Mirror,
) -> Ready<'scope> {
    let (control, told) = control();
    let clone = control.clone();
    let job = scope.spawn(move || finish(mirror, &clone));
    wait_for(&told, Notice::Ready);
    Ready { control, told, job }
}

/// A source of several pieces with data, holes and both.
fn small() -> (Graph, Arc<Hooked>, Arc<Hooked>, Attachment) {
    let graph = Graph::new();
    let bytes = pattern(MIB + 70_000 / 512 * 512, 23);
    let source = Hooked::add(&graph, "s", bytes.clone());
    let target = Hooked::add(&graph, "t", vec![0xee; bytes.len()]);
    let user = device(&graph);
    (graph, source, target, user)
}
