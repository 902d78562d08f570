//! Exports one node over a unix socket until its standard input ends: for measurements of the data
//! path without a daemon around it.
//!
//! `nbd_server SOCKET driver=qcow2,node-name=d,file.driver=file,file.filename=a.qcow2 [ro]`
#![allow(clippy::unwrap_used, clippy::panic, reason = "an example may fail")]

use std::io::Read;

use block::Graph;
use block::nbd::{Address, ExportOptions, Server, ServerOptions};

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let [_, socket, blockdev, rest @ ..] = &args[..] else {
        panic!("usage: nbd_server SOCKET BLOCKDEV [ro]");
    };
    let writable = rest.is_empty();
    let graph = Graph::new();
    let node = graph.add_text(blockdev).unwrap();
    let attachment = graph.attach_export(node.name(), writable).unwrap();
    let address = Address::Unix(socket.into());
    let mut server = Server::start(&address, ServerOptions::default(), |_| {}).unwrap();
    let export = ExportOptions {
        id: "d".to_owned(),
        name: node.name().to_owned(),
        description: None,
        attachment,
        writable,
        allocation_depth: true,
        bitmaps: Vec::new(),
    };
    server.add_export(export).unwrap();
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
    server.stop();
}
