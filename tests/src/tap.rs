//! A QMP socket between a client and a machine, which notes what the client says.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;

use serde_json::Value;

use crate::vm::Vm;

/// Runs `client` with the path of a socket that leads to the machine's QMP server, for one connection;
/// gives what the client gave, and the commands that it sent.
pub fn tapped<T>(vm: &Vm, client: impl FnOnce(&Path) -> T) -> (T, Vec<Value>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tap");
    let listener = UnixListener::bind(&path).unwrap();
    thread::scope(|scope| {
        let relay = scope.spawn(|| relay(&listener.accept().unwrap().0, vm.qmp_path()));
        let given = {
            let _release = Release(&path);
            client(&path)
        };
        let said = relay.join().unwrap();
        let commands = said.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        (given, commands.map(|line| serde_json::from_slice(line).unwrap()).collect())
    })
}

/// A client that fails before it connects leaves nobody waiting for it.
struct Release<'a>(&'a Path);

impl Drop for Release<'_> {
    fn drop(&mut self) {
        drop(UnixStream::connect(self.0));
    }
}

/// Passes everything on in both directions until the client has gone; gives what it said.
fn relay(client: &UnixStream, server: &Path) -> Vec<u8> {
    let server = UnixStream::connect(server).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| io::copy(&mut &server, &mut &*client));
        let mut said = Vec::new();
        let mut chunk = [0; 4096];
        while let Ok(count @ 1..) = (&*client).read(&mut chunk) {
            said.extend_from_slice(&chunk[..count]);
            (&server).write_all(&chunk[..count]).unwrap();
        }
        let _ = server.shutdown(Shutdown::Both);
        said
    })
}
