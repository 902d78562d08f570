//! The monitors as character devices, for `query-chardev`: where each is, and who is there.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::socket::Listener;
use super::stream::Stream;
use crate::schema::ChardevInfo;

/// Where a monitor is.
#[derive(Debug)]
pub(super) enum Kind {
    /// Standard input and output.
    Stdio,
    /// A socket: its address as QEMU writes it.
    Socket(String),
}

impl Kind {
    /// A socket that is listened on.
    pub(super) fn listening(listener: &Listener) -> Self {
        Self::Socket(format!("{},server=on", listener.address()))
    }
}

/// A monitor of the command line.
#[derive(Debug)]
struct Chardev {
    kind: Kind,
    clients: Vec<Client>,
}

/// Who is there.
#[derive(Debug)]
struct Client {
    /// The token of its connection.
    token: u64,
    /// Its address, where it has one.
    peer: Option<SocketAddr>,
}

impl Chardev {
    /// As QEMU names it. QEMU has one client each; of several the first is told.
    fn filename(&self) -> String {
        let Kind::Socket(address) = &self.kind else { return "stdio".to_owned() };
        match self.clients.first() {
            None => format!("disconnected:{address}"),
            Some(Client { peer: None, .. }) => address.clone(),
            Some(Client { peer: Some(peer), .. }) => format!("{address} <-> {peer}"),
        }
    }
}

/// The list, shared by the server's handle and its thread. Its lock is held for memory only, and no
/// other is taken meanwhile.
#[derive(Debug, Clone, Default)]
pub(super) struct Chardevs(Arc<Mutex<Vec<Chardev>>>);

impl Chardevs {
    fn list(&self) -> MutexGuard<'_, Vec<Chardev>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a monitor; gives its number.
    pub(super) fn add(&self, kind: Kind) -> usize {
        let mut list = self.list();
        list.push(Chardev { kind, clients: Vec::new() });
        list.len() - 1
    }

    /// A client has come.
    pub(super) fn connected(&self, number: usize, token: u64, stream: &Stream) {
        if let Some(chardev) = self.list().get_mut(number) {
            chardev.clients.push(Client { token, peer: stream.peer() });
        }
    }

    /// A client is gone.
    pub(super) fn gone(&self, token: u64) {
        for chardev in self.list().iter_mut() {
            chardev.clients.retain(|client| client.token != token);
        }
    }

    /// What `query-chardev` tells of them, in the order of the command line, with QEMU's labels.
    pub(super) fn infos(&self) -> Vec<ChardevInfo> {
        let info = |(number, chardev): (usize, &Chardev)| ChardevInfo {
            label: format!("compat_monitor{number}"),
            filename: chardev.filename(),
            frontend_open: true,
        };
        self.list().iter().enumerate().map(info).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_socket_tells_whether_somebody_is_there_and_stdio_always_is() {
        let chardevs = Chardevs::default();
        let names =
            || -> Vec<String> { chardevs.infos().into_iter().map(|i| i.filename).collect() };
        let stdio = chardevs.add(Kind::Stdio);
        let unix = chardevs.add(Kind::Socket("unix:/a,server=on".to_owned()));
        let stream = Stream::Unix(UnixStream::pair().unwrap().0);
        chardevs.connected(stdio, 6, &stream);
        assert_eq!(names(), ["stdio", "disconnected:unix:/a,server=on"]);
        chardevs.connected(unix, 7, &stream);
        chardevs.connected(unix, 8, &stream);
        chardevs.gone(7);
        assert_eq!(names(), ["stdio", "unix:/a,server=on"]);
        chardevs.gone(6);
        chardevs.gone(8);
        assert_eq!(names(), ["stdio", "disconnected:unix:/a,server=on"]);
        let labels: Vec<String> = chardevs.infos().into_iter().map(|info| info.label).collect();
        assert_eq!(labels, ["compat_monitor0", "compat_monitor1"]);
    }

    #[test]
    fn of_several_clients_of_a_port_the_first_is_told() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let connect = || TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (first, second) = (connect(), connect());
        let chardevs = Chardevs::default();
        let tcp = chardevs.add(Kind::Socket("tcp:h:1,server=on".to_owned()));
        let accept = || Stream::Tcp(listener.accept().unwrap().0);
        chardevs.connected(tcp, 1, &accept());
        chardevs.connected(tcp, 2, &accept());
        let told = |client: &TcpStream| {
            let filename = format!("tcp:h:1,server=on <-> {}", client.local_addr().unwrap());
            assert_eq!(chardevs.infos()[0].filename, filename);
        };
        told(&first);
        chardevs.gone(1);
        told(&second);
    }
}
