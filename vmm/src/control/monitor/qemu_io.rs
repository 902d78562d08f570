//! qemu-io: reads, writes, flushes and discards a node. As in QEMU, what it did is printed on
//! standard output and what went wrong on standard error; the monitor is told nothing.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use block::{Graph, Node, ReadBuf, WriteBuf};

use super::words::Line;
use crate::image::text::parse_size;

/// Bytes that are read or written at once.
const PIECE: u64 = 1 << 20;
/// Most bytes of one command, as in QEMU.
const MOST: u64 = (1 << 31) - (1 << 9);

/// Runs a line; gives what the monitor is told.
pub(crate) fn run(graph: &Graph, line: &str) -> String {
    let line = Line::parse(line);
    let misuse = |wrong: &str| super::misuse("qemu-io", wrong, "qemu-io");
    // With `-d` it is of a device, whose node comes here; only a line that is wrong comes as it is.
    let mut words = line.words.iter();
    if line.words.first().is_some_and(|word| word == "-d") {
        words.next();
    }
    let Some(name) = words.next() else { return misuse("block device name expected") };
    if name.starts_with('-') {
        return misuse(&format!("unsupported option {name}"));
    }
    let (Some(command), false) = (words.next(), line.unterminated) else {
        return misuse("string expected");
    };
    if words.next().is_some() {
        return misuse("extraneous characters at the end of line");
    }
    let Some(node) = graph.get(name) else {
        return format!("Error: Cannot find device='' nor node-name='{name}'\r\n");
    };
    let (mut out, mut err) = (io::stdout().lock(), io::stderr().lock());
    // There may be no one to read it.
    let _ = match execute(&node, command) {
        Ok(text) => out.write_all(text.as_bytes()).and_then(|()| out.flush()),
        Err(text) => writeln!(err, "{text}"),
    };
    String::new()
}

/// What a read or write is told.
#[derive(Debug, Default, PartialEq, Eq)]
struct Request {
    pattern: Option<u8>,
    zeroes: bool,
    unmap: bool,
    dump: bool,
    quiet: bool,
    offset: u64,
    length: u64,
}

/// One command; its output, or its error.
fn execute(node: &Arc<Node>, text: &str) -> Result<String, String> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let Some((command, words)) = words.split_first() else { return Ok(String::new()) };
    match *command {
        "read" | "r" => timed(node, "read", &Request::parse("read", "P:qv", words)?, read),
        "write" | "w" => timed(node, "wrote", &Request::parse("write", "P:quz", words)?, write),
        "discard" | "d" => {
            timed(node, "discard", &Request::parse("discard", "q", words)?, |node, request| {
                node.discard(request.offset, request.length)?;
                Ok(String::new())
            })
        }
        "flush" | "f" => {
            node.flush().map(|()| String::new()).map_err(|error| format!("flush failed: {error}"))
        }
        other => Err(format!("command \"{other}\" not found")),
    }
}

impl Request {
    /// `options` are the letters that may be given; one with `:` behind it takes a word.
    fn parse(command: &str, options: &str, words: &[&str]) -> Result<Self, String> {
        let mut request = Self::default();
        let mut numbers = Vec::new();
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let Some(letter) = word.strip_prefix('-').filter(|rest| !rest.is_empty()) else {
                numbers.push(size(word)?);
                continue;
            };
            if !options.contains(letter) || letter == ":" {
                return Err(format!("invalid option -- '{letter}'"));
            }
            match letter {
                "P" => {
                    let value = words.next().copied().unwrap_or_default();
                    let parsed = match value.strip_prefix("0x") {
                        Some(digits) => u8::from_str_radix(digits, 16),
                        None => value.parse(),
                    };
                    let byte = parsed.map_err(|_| format!("{value} is not a valid pattern byte"));
                    request.pattern = Some(byte?);
                }
                "v" => request.dump = true,
                "q" => request.quiet = true,
                "z" => request.zeroes = true,
                "u" => request.unmap = true,
                _ => return Err(format!("invalid option -- '{letter}'")),
            }
        }
        match numbers[..] {
            [offset, length] if length <= MOST => {
                (request.offset, request.length) = (offset, length);
            }
            [_, length] => {
                return Err(format!("length cannot exceed {MOST}, given {length}"));
            }
            _ => {
                let count = numbers.len();
                return Err(format!(
                    "bad argument count {count} to {command}, expected at least 2 arguments"
                ));
            }
        }
        if request.unmap && !request.zeroes {
            return Err("-u requires -z to be specified".to_owned());
        }
        if request.zeroes && request.pattern.is_some() {
            return Err("-z and -P cannot be specified at the same time".to_owned());
        }
        Ok(request)
    }
}

fn size(word: &str) -> Result<u64, String> {
    let wrong = "Parsing error: non-numeric argument, or extraneous/unrecognized suffix";
    parse_size(word).ok_or_else(|| format!("{wrong} -- {word}"))
}

/// Runs a request and reports how long it took.
fn timed(
    node: &Arc<Node>,
    done: &str,
    request: &Request,
    action: impl FnOnce(&Node, &Request) -> block::Result<String>,
) -> Result<String, String> {
    let started = Instant::now();
    let told = action(node, request).map_err(|error| {
        let what = if done == "wrote" { "write" } else { done };
        format!("{what} failed: {error}")
    })?;
    if request.quiet {
        return Ok(told);
    }
    Ok(told + &report(done, request, started.elapsed()))
}

fn read(node: &Node, request: &Request) -> block::Result<String> {
    let mut told = String::new();
    let mut differs = false;
    pieces(request, |offset, length| {
        let mut bytes = vec![0; length];
        node.read(offset, &[ReadBuf::new(&mut bytes)])?;
        differs |= request.pattern.is_some_and(|byte| bytes.iter().any(|own| *own != byte));
        if request.dump {
            dump(offset, &bytes, &mut told);
        }
        Ok(())
    })?;
    if differs {
        let (offset, length) = (request.offset, request.length);
        told = format!("Pattern verification failed at offset {offset}, {length} bytes\n{told}");
    }
    Ok(told)
}

fn write(node: &Node, request: &Request) -> block::Result<String> {
    if request.zeroes {
        node.write_zeroes(request.offset, request.length, request.unmap)?;
        return Ok(String::new());
    }
    // QEMU's pattern where none is given.
    let byte = request.pattern.unwrap_or(0xcd);
    pieces(request, |offset, length| node.write(offset, &[WriteBuf::new(&vec![byte; length])]))?;
    Ok(String::new())
}

/// Does something with each piece of a request.
fn pieces(
    request: &Request,
    mut action: impl FnMut(u64, usize) -> block::Result<()>,
) -> block::Result<()> {
    let end = request.offset.saturating_add(request.length);
    let mut at = request.offset;
    while at < end {
        let length = PIECE.min(end - at);
        action(at, usize::try_from(length).unwrap_or(usize::MAX))?;
        at += length;
    }
    Ok(())
}

/// 16 bytes a line, as numbers and as characters.
fn dump(offset: u64, bytes: &[u8], out: &mut String) {
    for (at, line) in (offset..).step_by(16).zip(bytes.chunks(16)) {
        let numbers: Vec<String> = line.iter().map(|byte| format!("{byte:02x}")).collect();
        let show = |byte: &u8| if byte.is_ascii_graphic() { char::from(*byte) } else { '.' };
        let characters: String = line.iter().map(show).collect();
        out.push_str(&format!("{at:08x}:  {:<47}  {characters}\n", numbers.join(" ")));
    }
}

fn report(done: &str, request: &Request, took: Duration) -> String {
    let Request { offset, length, .. } = request;
    // Nothing takes no time at all.
    let seconds = took.as_secs_f64().max(1e-9);
    let (whole, cents) = (took.as_secs(), took.subsec_millis() / 10);
    #[allow(clippy::cast_precision_loss, reason = "a figure for people")]
    let rate = units(*length as f64 / seconds);
    #[allow(clippy::cast_precision_loss, reason = "a figure for people")]
    let total = units(*length as f64);
    let rest = whole % 60;
    format!(
        "{done} {length}/{length} bytes at offset {offset}\n\
         {total}, 1 ops; {:02}.{cents:02} sec ({rate}/sec and {:.4} ops/sec)\n",
        rest,
        1.0 / seconds
    )
}

/// Bytes with the unit that suits; three digits after the point unless there are none.
fn units(bytes: f64) -> String {
    const UNITS: [&str; 7] = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = bytes;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if value.fract() == 0.0 {
        format!("{value:.0} {}", UNITS[unit])
    } else {
        format!("{value:.3} {}", UNITS[unit])
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node(dir: &std::path::Path) -> (Graph, Arc<Node>) {
        let file = dir.join("d");
        std::fs::write(&file, vec![0; 1 << 20]).unwrap();
        let graph = Graph::new();
        let options = json!({"driver": "raw", "node-name": "d", "file": {"driver": "file", "filename": file}});
        let node = graph.add(&options).unwrap();
        (graph, node)
    }

    #[test]
    fn what_is_written_is_read_and_compared() {
        let dir = tempfile::tempdir().unwrap();
        let (graph, node) = node(dir.path());
        let say = |text: &str| execute(&node, text).unwrap();
        assert!(
            say("write -P 0x41 512 1k")
                .starts_with("wrote 1024/1024 bytes at offset 512\n1 KiB, 1 ops; 00.")
        );
        assert!(say("read -P 65 512 1k").starts_with("read 1024/1024 bytes at offset 512\n"));
        assert!(
            say("read -P 65 0 1k")
                .starts_with("Pattern verification failed at offset 0, 1024 bytes\n")
        );
        assert_eq!(
            say("read -v -q 1528 16"),
            "000005f8:  41 41 41 41 41 41 41 41 00 00 00 00 00 00 00 00  AAAAAAAA........\n"
        );
        say("write -z 0 64k");
        assert!(!say("read -P 0 0 64k").contains("failed"));
        assert_eq!(say("flush"), "");
        assert_eq!(run(&graph, "qemu-io d flush"), "");
    }

    #[test]
    fn what_cannot_be_done_is_told_in_qemus_words() {
        let dir = tempfile::tempdir().unwrap();
        let (graph, node) = node(dir.path());
        for (text, wanted) in [
            ("nosuch", "command \"nosuch\" not found"),
            ("write 0", "bad argument count 1 to write, expected at least 2 arguments"),
            (
                "write 0 x",
                "Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- x",
            ),
            ("write -u 0 1", "-u requires -z to be specified"),
            ("read 0 2G", "length cannot exceed 2147483136, given 2147483648"),
            ("read -P 256 0 1", "256 is not a valid pattern byte"),
        ] {
            assert_eq!(execute(&node, text).unwrap_err(), wanted, "{text}");
        }
        assert!(execute(&node, "read 100G 64k").unwrap_err().starts_with("read failed: "));
        for (line, wanted) in [
            (
                "qemu-io",
                "qemu-io: block device name expected\r\nTry \"help qemu-io\" for more information\r\n",
            ),
            (
                "qemu-io d",
                "qemu-io: string expected\r\nTry \"help qemu-io\" for more information\r\n",
            ),
            ("qemu-io x flush", "Error: Cannot find device='' nor node-name='x'\r\n"),
        ] {
            assert_eq!(run(&graph, line), wanted, "{line}");
        }
    }
}
