//! The ways of a migration's stream: files, commands, sockets. `docs/migration.md` has the whole.
//!
//! | module | what it is |
//! |---|---|
//! | [`address`] | `file:`, `exec:`, `unix:` and their form in parts |
//! | [`wait`] | waiting for a descriptor until it is told to stop |
//! | [`command`] | a command at the other end of a pipe |
//! | [`connect`] | connecting to a socket, which may have too many clients |
//! | [`output`], [`input`] | where a stream goes, and where it comes from |

pub mod address;
pub mod command;
mod connect;
pub mod input;
pub mod output;
pub mod wait;

#[cfg(test)]
mod tests;
