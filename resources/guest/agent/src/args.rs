//! The words of a request.

use core::ffi::CStr;

use crate::error::Error;

/// Longest path or device name, with its NUL.
const PATH_MAX: usize = 256;

/// What is left of a request line.
pub struct Args<'a>(&'a str);

impl<'a> Args<'a> {
    /// All words of `line`.
    pub fn new(line: &'a str) -> Self {
        Self(line.trim_ascii())
    }

    /// The next word, or `missing` as the error.
    pub fn word(&mut self, missing: &'static str) -> Result<&'a str, Error> {
        let end = self.0.bytes().position(|b| b.is_ascii_whitespace()).unwrap_or(self.0.len());
        let (word, rest) = self.0.split_at(end);
        self.0 = rest.trim_ascii_start();
        if word.is_empty() { Err(Error::Request(missing)) } else { Ok(word) }
    }

    /// The next word as a number: decimal, or hexadecimal after `0x`; `K`, `M` and `G` at the end
    /// of a decimal number are powers of 1024.
    pub fn number(&mut self, missing: &'static str) -> Result<u64, Error> {
        parse(self.word(missing)?).ok_or(Error::Request(missing))
    }

    /// The next word as a path.
    pub fn path(&mut self, missing: &'static str) -> Result<Path, Error> {
        Path::new("", self.word(missing)?)
    }

    /// The next word as a block device: `vda` is `/dev/vda`.
    pub fn device(&mut self) -> Result<Path, Error> {
        let name = self.word("device expected")?;
        Path::new(if name.starts_with('/') { "" } else { "/dev/" }, name)
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Everything that is left.
    pub fn rest(self) -> &'a str {
        self.0
    }

    /// Refuses words nobody asked for.
    pub fn end(self) -> Result<(), Error> {
        if self.0.is_empty() { Ok(()) } else { Err(Error::Request("too many arguments")) }
    }
}

fn parse(word: &str) -> Option<u64> {
    if let Some(hex) = word.strip_prefix("0x") {
        return u64::from_str_radix(hex, 16).ok();
    }
    let shift = match word.as_bytes().last()? {
        b'K' => 10,
        b'M' => 20,
        b'G' => 30,
        _ => return word.parse().ok(),
    };
    word[..word.len() - 1].parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// A path as system calls want it.
pub struct Path {
    bytes: [u8; PATH_MAX],
}

impl Path {
    fn new(prefix: &str, name: &str) -> Result<Self, Error> {
        let mut bytes = [0; PATH_MAX];
        let end = prefix.len() + name.len();
        // The last byte stays NUL, and a NUL inside would cut the name silently.
        if end >= PATH_MAX || name.contains('\0') {
            return Err(Error::Request("path too long"));
        }
        bytes[..prefix.len()].copy_from_slice(prefix.as_bytes());
        bytes[prefix.len()..end].copy_from_slice(name.as_bytes());
        Ok(Self { bytes })
    }

    /// The NUL-terminated path.
    pub fn as_c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.bytes).unwrap_or(c"")
    }
}
