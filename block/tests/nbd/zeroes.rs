//! FAST_ZERO: zeroes, or ENOTSUP where they would be written.

use std::path::Path;

use block::nbd::ServerOptions;
use block::nbd::wire::Mode;
use block::nbd::wire::request::{cmd, cmd_flag};

use crate::client::Client;
use crate::common::Setup;

/// ENOTSUP in the protocol.
const NOT_SUPPORTED: u32 = 95;
const AT: u64 = 1 << 20;
const LEN: u64 = 65536;

fn zero(client: &mut Client, flags: u16) -> u32 {
    assert_eq!(client.write(0, AT - 512, &[7; LEN as usize + 1024]), 0);
    let error = client.call(cmd::WRITE_ZEROES, flags, AT, LEN).error;
    let byte = if error == 0 { 0 } else { 7 };
    assert!(client.read(AT, LEN).iter().all(|b| *b == byte), "flags {flags}: error {error}");
    assert_eq!(client.read(AT - 1, 1), [7]);
    assert_eq!(client.read(AT + LEN, 1), [7]);
    error
}

fn fast(client: &mut Client) -> [u32; 2] {
    [cmd_flag::FAST_ZERO | cmd_flag::NO_HOLE, cmd_flag::FAST_ZERO].map(|flags| zero(client, flags))
}

#[test]
fn a_raw_file_is_zeroed_fast() {
    let setup = Setup::with_raw(8 << 20);
    let mut client = setup.client().go("d", Mode::Structured, &[]);
    assert_eq!(fast(&mut client), [0, 0]);
}

#[test]
fn fast_zeroes_are_refused_where_there_are_no_zero_clusters() {
    let setup = Setup::with_image("8M", "compat=0.10");
    let mut client = setup.client().go("d", Mode::Structured, &[]);
    assert_eq!(fast(&mut client), [NOT_SUPPORTED; 2]);
    assert_eq!(zero(&mut client, 0), 0);
}

#[test]
fn fast_zeroes_are_refused_once_a_file_turned_out_to_have_none() {
    // tmpfs has holes, and no call that makes zeroes which keep their space.
    let Ok(dir) = tempfile::tempdir_in("/dev/shm") else {
        eprintln!("SKIPPED: there is no /dev/shm");
        return;
    };
    let path = dir.path().join("d.raw");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(8 << 20).unwrap();
    if !is_tmpfs(dir.path()) {
        eprintln!("SKIPPED: /dev/shm is no tmpfs");
        return;
    }
    let setup = Setup::new(ServerOptions::default());
    let file = format!("file.driver=file,file.filename={}", path.display());
    setup.graph.add_text(&format!("driver=raw,node-name=d,discard=unmap,{file}")).unwrap();
    setup.export("d", true).unwrap();
    let mut client = setup.client().go("d", Mode::Structured, &[]);
    assert_eq!(zero(&mut client, cmd_flag::NO_HOLE), 0);
    assert_eq!(fast(&mut client), [NOT_SUPPORTED; 2]);
    assert_eq!(zero(&mut client, 0), 0);
}

fn is_tmpfs(path: &Path) -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let of = |line: &str| {
        let mut words = line.split(' ').skip(1);
        let (at, kind) = (words.next()?.to_owned(), words.next()?.to_owned());
        path.starts_with(&at).then_some((at.len(), kind))
    };
    mounts.lines().filter_map(of).max().is_some_and(|(_, kind)| kind == "tmpfs")
}
