//! What a request asks for, checked against the export: bounds, flags, permission.

use super::wire::request::{Request, cmd, cmd_flag};
use super::wire::{Errno, MAX_PAYLOAD, Mode};

/// A request that can be carried out. Offsets and lengths are bytes inside the export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Send data.
    Read {
        /// Where.
        offset: u64,
        /// How much; at most [`MAX_PAYLOAD`].
        len: u32,
        /// Whether it must come in one chunk.
        whole: bool,
    },
    /// Take the payload, which has [`Command::Write::len`] bytes.
    Write {
        /// Where.
        offset: u64,
        /// How much; at most [`MAX_PAYLOAD`].
        len: u32,
        /// Whether it must be durable before the reply.
        fua: bool,
    },
    /// Make writes durable that were replied to, on any connection.
    Flush,
    /// The range is not needed.
    Trim {
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
        /// Whether it must be durable before the reply.
        fua: bool,
    },
    /// Make the range read as zeroes.
    WriteZeroes {
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
        /// Whether its space may be given back.
        unmap: bool,
        /// Whether to fail rather than take as long as a write.
        fast: bool,
        /// Whether it must be durable before the reply.
        fua: bool,
    },
    /// The range is read soon.
    Cache {
        /// Where.
        offset: u64,
        /// How much; at most [`MAX_PAYLOAD`].
        len: u32,
    },
    /// Tell how the range is stored.
    BlockStatus {
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
        /// Whether one descriptor of each context is enough.
        one: bool,
    },
    /// End the session once everything is replied to.
    Disconnect,
}

/// Why a request is refused; the text is for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal(pub Errno, pub &'static str);

/// What a request is checked against.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Size of the export at this moment, in bytes.
    pub size: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// How replies look.
    pub mode: Mode,
    /// Whether block status was negotiated.
    pub contexts: bool,
}

impl Limits {
    /// Checks a request.
    ///
    /// # Errors
    /// With the error that "Error values" and "Request types" of the protocol ask for.
    pub fn check(&self, request: &Request) -> Result<Command, Refusal> {
        let Request { flags, offset, len, .. } = *request;
        let has = |flag| flags & flag != 0;
        self.check_flags(request)?;
        let fua = has(cmd_flag::FUA);
        Ok(match request.command {
            cmd::DISC => Command::Disconnect,
            cmd::FLUSH => Command::Flush,
            cmd::READ => {
                let len = self.bounded(offset, len, Errno::Inval)?;
                Command::Read { offset, len, whole: has(cmd_flag::DF) }
            }
            cmd::WRITE => {
                self.check_writable()?;
                let len = self.bounded(offset, len, Errno::NoSpc)?;
                Command::Write { offset, len, fua }
            }
            cmd::TRIM => {
                self.check_writable()?;
                self.check_range(offset, len, Errno::Inval)?;
                Command::Trim { offset, len, fua }
            }
            cmd::WRITE_ZEROES => {
                self.check_writable()?;
                self.check_range(offset, len, Errno::NoSpc)?;
                let (unmap, fast) = (!has(cmd_flag::NO_HOLE), has(cmd_flag::FAST_ZERO));
                Command::WriteZeroes { offset, len, unmap, fast, fua }
            }
            cmd::CACHE => {
                let len = self.bounded(offset, len, Errno::Inval)?;
                Command::Cache { offset, len }
            }
            cmd::BLOCK_STATUS => {
                if !self.contexts {
                    return Err(Refusal(Errno::Inval, "block status was not negotiated"));
                }
                self.check_range(offset, len, Errno::Inval)?;
                if len == 0 {
                    return Err(Refusal(Errno::Inval, "block status of no bytes"));
                }
                Command::BlockStatus { offset, len, one: has(cmd_flag::REQ_ONE) }
            }
            _ => return Err(Refusal(Errno::Inval, "unknown command")),
        })
    }

    /// "It also SHOULD return EINVAL if it receives a request with a flag not explicitly documented as
    /// applicable." FUA is for all commands.
    fn check_flags(&self, request: &Request) -> Result<(), Refusal> {
        let allowed = match request.command {
            cmd::READ if self.mode >= Mode::Structured => cmd_flag::DF,
            cmd::WRITE if self.mode == Mode::Extended => cmd_flag::PAYLOAD_LEN,
            cmd::WRITE_ZEROES => cmd_flag::NO_HOLE | cmd_flag::FAST_ZERO,
            cmd::BLOCK_STATUS => cmd_flag::REQ_ONE,
            _ => 0,
        };
        if request.flags & !(allowed | cmd_flag::FUA) != 0 {
            return Err(Refusal(Errno::Inval, "the command does not have this flag"));
        }
        Ok(())
    }

    fn check_writable(&self) -> Result<(), Refusal> {
        if self.read_only {
            return Err(Refusal(Errno::Perm, "the export is read-only"));
        }
        Ok(())
    }

    fn check_range(&self, offset: u64, len: u64, error: Errno) -> Result<(), Refusal> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(Refusal(error, "the request is beyond the end of the export")),
        }
    }

    /// A range whose data is transferred.
    fn bounded(&self, offset: u64, len: u64, error: Errno) -> Result<u32, Refusal> {
        self.check_range(offset, len, error)?;
        match u32::try_from(len) {
            Ok(len) if len <= MAX_PAYLOAD => Ok(len),
            _ => Err(Refusal(Errno::Inval, "the request is longer than 32 MiB")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits =
        Limits { size: 1 << 30, read_only: false, mode: Mode::Structured, contexts: true };

    fn request(command: u16, flags: u16, offset: u64, len: u64) -> Request {
        Request { flags, command, cookie: 0, offset, len }
    }

    fn error(limits: Limits, request: Request) -> Option<Errno> {
        limits.check(&request).err().map(|refusal| refusal.0)
    }

    #[test]
    fn what_lies_beyond_the_end_is_no_space_for_writes_and_invalid_for_the_rest() {
        let size = LIMITS.size;
        for (command, expected) in [
            (cmd::READ, Errno::Inval),
            (cmd::WRITE, Errno::NoSpc),
            (cmd::TRIM, Errno::Inval),
            (cmd::CACHE, Errno::Inval),
            (cmd::WRITE_ZEROES, Errno::NoSpc),
            (cmd::BLOCK_STATUS, Errno::Inval),
        ] {
            assert_eq!(error(LIMITS, request(command, 0, size - 10, 10)), None, "{command}");
            for (offset, len) in [(size - 10, 11), (u64::MAX, 1), (0, size + 1)] {
                let found = error(LIMITS, request(command, 0, offset, len));
                assert_eq!(found, Some(expected), "{command} {offset} {len}");
            }
        }
    }

    #[test]
    fn only_transfers_are_bound_by_the_largest_payload() {
        let len = u64::from(MAX_PAYLOAD);
        for command in [cmd::READ, cmd::WRITE, cmd::CACHE] {
            assert_eq!(error(LIMITS, request(command, 0, 0, len)), None);
            assert_eq!(error(LIMITS, request(command, 0, 0, len + 1)), Some(Errno::Inval));
        }
        for command in [cmd::TRIM, cmd::WRITE_ZEROES, cmd::BLOCK_STATUS] {
            assert_eq!(error(LIMITS, request(command, 0, 0, len + 1)), None);
        }
    }

    #[test]
    fn changes_of_a_read_only_export_are_not_permitted() {
        let limits = Limits { read_only: true, ..LIMITS };
        for command in [cmd::WRITE, cmd::TRIM, cmd::WRITE_ZEROES] {
            assert_eq!(error(limits, request(command, 0, 0, 512)), Some(Errno::Perm));
        }
        for command in [cmd::READ, cmd::FLUSH, cmd::CACHE, cmd::BLOCK_STATUS] {
            assert_eq!(error(limits, request(command, 0, 0, 512)), None);
        }
    }

    #[test]
    fn flags_belong_to_commands_and_fua_to_all() {
        for command in 0..=7 {
            assert_eq!(error(LIMITS, request(command, cmd_flag::FUA, 0, 512)), None);
            for (flag, of) in [
                (cmd_flag::NO_HOLE, cmd::WRITE_ZEROES),
                (cmd_flag::FAST_ZERO, cmd::WRITE_ZEROES),
                (cmd_flag::DF, cmd::READ),
                (cmd_flag::REQ_ONE, cmd::BLOCK_STATUS),
                (1 << 9, 99),
            ] {
                let expected = (command != of).then_some(Errno::Inval);
                assert_eq!(error(LIMITS, request(command, flag, 0, 512)), expected);
            }
        }
        let simple = Limits { mode: Mode::Simple, ..LIMITS };
        assert_eq!(error(simple, request(cmd::READ, cmd_flag::DF, 0, 1)), Some(Errno::Inval));
        let write = request(cmd::WRITE, cmd_flag::PAYLOAD_LEN, 0, 1);
        assert_eq!(error(LIMITS, write), Some(Errno::Inval));
        assert_eq!(error(Limits { mode: Mode::Extended, ..LIMITS }, write), None);
    }

    #[test]
    fn unknown_commands_and_block_status_without_negotiation_are_invalid() {
        assert_eq!(error(LIMITS, request(8, 0, 0, 0)), Some(Errno::Inval));
        let limits = Limits { contexts: false, ..LIMITS };
        assert_eq!(error(limits, request(cmd::BLOCK_STATUS, 0, 0, 1)), Some(Errno::Inval));
    }
}
