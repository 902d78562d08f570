//! Sessions of NBD clients to start from: each handshake, and every request after it.

use block::nbd::wire::option::code;
use block::nbd::wire::request::{Request, cmd, cmd_flag};
use block::nbd::wire::{Mode, OPTION_MAGIC};

use crate::seeds::Seed;
use crate::targets::NBD_NAME as NAME;

/// One session for each mode and way to choose an export, and some that end in the handshake.
pub(crate) fn all() -> Vec<Seed> {
    let mut seeds = Vec::new();
    for mode in [Mode::Simple, Mode::Structured, Mode::Extended] {
        for by_name in [false, true] {
            let mut input = begin();
            match mode {
                Mode::Simple => {}
                Mode::Structured => option(&mut input, code::STRUCTURED_REPLY, &[]),
                Mode::Extended => option(&mut input, code::EXTENDED_HEADERS, &[]),
            }
            if mode != Mode::Simple {
                option(&mut input, code::SET_META_CONTEXT, &contexts(&["base:", "qemu:"]));
            }
            if by_name {
                option(&mut input, code::EXPORT_NAME, NAME.as_bytes());
            } else {
                option(&mut input, code::GO, &info(&[0, 1, 2, 3]));
            }
            requests(&mut input, mode);
            seeds.push(Seed { name: format!("session-{mode:?}-{by_name}"), input });
        }
    }
    let mut input = begin();
    option(&mut input, code::LIST, &[]);
    option(&mut input, code::STARTTLS, &[]);
    option(&mut input, code::INFO, &info(&[3]));
    option(&mut input, code::LIST_META_CONTEXT, &contexts(&[]));
    option(&mut input, 0x1234, b"what");
    option(&mut input, code::ABORT, &[]);
    seeds.push(Seed { name: "handshake".to_owned(), input });
    seeds
}

/// Flags "fixed newstyle" and "no zeroes".
fn begin() -> Vec<u8> {
    3u32.to_be_bytes().to_vec()
}

fn option(out: &mut Vec<u8>, option: u32, data: &[u8]) {
    out.extend(OPTION_MAGIC.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
    out.extend(data);
}

fn string(text: &str) -> Vec<u8> {
    let len = u32::try_from(text.len()).unwrap_or(u32::MAX);
    [&len.to_be_bytes(), text.as_bytes()].concat()
}

fn info(wanted: &[u16]) -> Vec<u8> {
    let mut data = string(NAME);
    data.extend(u16::try_from(wanted.len()).unwrap_or(u16::MAX).to_be_bytes());
    data.extend(wanted.iter().flat_map(|n| n.to_be_bytes()));
    data
}

fn contexts(queries: &[&str]) -> Vec<u8> {
    let mut data = string(NAME);
    data.extend(u32::try_from(queries.len()).unwrap_or(u32::MAX).to_be_bytes());
    data.extend(queries.iter().flat_map(|query| string(query)));
    data
}

fn requests(out: &mut Vec<u8>, mode: Mode) {
    let payload_len = if mode == Mode::Extended { cmd_flag::PAYLOAD_LEN } else { 0 };
    let all = [
        (cmd::READ, 0, 0, 4096),
        (cmd::READ, cmd_flag::DF, 5 << 20, 100_000),
        (cmd::WRITE, payload_len | cmd_flag::FUA, 70_000, 600),
        (cmd::WRITE, payload_len, 1 << 20, 20_000),
        (cmd::WRITE_ZEROES, cmd_flag::NO_HOLE, 1 << 20, 70_000),
        (cmd::WRITE_ZEROES, cmd_flag::FAST_ZERO, 2 << 20, 3 << 20),
        (cmd::TRIM, 0, 0, 128 << 10),
        (cmd::BLOCK_STATUS, 0, 0, 8 << 20),
        (cmd::BLOCK_STATUS, cmd_flag::REQ_ONE, 1 << 20, 1 << 20),
        (cmd::CACHE, 0, 0, 4096),
        (cmd::READ, 0, 8 << 20, 1),
        (cmd::FLUSH, 0, 0, 0),
        (cmd::DISC, 0, 0, 0),
    ];
    for (cookie, (command, flags, offset, len)) in (0..).zip(all) {
        let request = Request { flags, command, cookie, offset, len };
        request.encode(mode, out);
        let payload = usize::try_from(request.payload(mode)).unwrap_or(0);
        out.resize(out.len() + payload, 0x5a);
    }
}
