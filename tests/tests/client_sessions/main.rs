//! Stock clients, each through a whole session beside a guest that writes its disk all the time: a save that is
//! watched, one that is cancelled, a load, a deletion, a transaction whose backup is compared with its
//! moment byte for byte, a mirror with pivot.
//!
//! | client | |
//! |---|---|
//! | `socket` | lines of JSON on a socket |
//! | `typed` | the `qapi` crate, with types made from QEMU's own schema |
//! | `python` | qemu.qmp, and its qmp-shell |
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

mod python;
mod session;
mod socket;
mod typed;

use session::run;
use tardigrade_tests::require;

#[test]
fn a_socket_with_lines_of_json_does_all_of_a_session() {
    if require::kvm() {
        run(|vm, _| Box::new(socket::Socket::connect(vm)));
    }
}

#[test]
fn the_qapi_crates_typed_client_does_all_of_a_session() {
    if require::kvm() {
        run(|vm, _| Box::new(typed::Typed::connect(vm)));
    }
}

#[test]
fn qemus_python_client_does_all_of_a_session() {
    if require::kvm()
        && let Some(python) = require::python()
    {
        run(|vm, _| Box::new(python::Library::start(&python, vm)));
    }
}

#[test]
fn qmp_shell_does_all_of_a_session() {
    if require::kvm()
        && let Some(python) = require::python()
    {
        run(|vm, dir| Box::new(python::Shell::start(&python, vm, dir)));
    }
}
