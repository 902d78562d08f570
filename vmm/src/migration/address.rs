//! The addresses of migrations: `file:`, `exec:`, `unix:`.

use std::path::PathBuf;

use qmp::schema::{MigrationAddress, MigrationChannel};

/// See the module. Error texts are QEMU's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A file, from an offset in bytes.
    File {
        /// The file.
        path: PathBuf,
        /// Where the stream begins.
        offset: u64,
    },
    /// A program and its arguments; the stream is its input, or its output.
    Exec(Vec<String>),
    /// A socket that somebody listens on.
    Unix(PathBuf),
}

impl Address {
    /// `file:PATH[,offset=BYTES]`, `exec:COMMAND`, `unix:PATH`.
    ///
    /// # Errors
    /// It is none of these.
    pub fn parse(uri: &str) -> Result<Self, String> {
        let unknown = || format!("unknown migration protocol: {uri}");
        let (protocol, rest) = uri.split_once(':').ok_or_else(unknown)?;
        match protocol {
            "exec" => Ok(Self::Exec(vec!["/bin/sh".to_owned(), "-c".to_owned(), rest.to_owned()])),
            "unix" => Ok(Self::Unix(rest.into())),
            "file" => {
                let (path, offset) = match rest.split_once(",offset=") {
                    Some((path, text)) => (path, offset(text)?),
                    None => (rest, 0),
                };
                Ok(Self::File { path: path.into(), offset })
            }
            _ => Err(unknown()),
        }
    }

    /// As commands have it: one of the two.
    ///
    /// # Errors
    /// It is none or both, or an address that cannot be used.
    pub fn of_command(
        uri: Option<&str>,
        channels: Option<&[MigrationChannel]>,
    ) -> Result<Self, String> {
        match (uri, channels.unwrap_or_default()) {
            (Some(uri), []) => Self::parse(uri),
            (None, [channel]) => Self::of(&channel.addr),
            // There is one type of channel.
            (None, [_, _, ..]) => Err("Channel list has more than one main entry".to_owned()),
            _ => Err("need either 'uri' or 'channels' argument".to_owned()),
        }
    }

    fn of(address: &MigrationAddress) -> Result<Self, String> {
        Ok(match address {
            MigrationAddress::Socket { path, .. } => Self::Unix(path.into()),
            MigrationAddress::Exec { args } if args.is_empty() => {
                return Err("'args' of transport 'exec' names no program".to_owned());
            }
            MigrationAddress::Exec { args } => Self::Exec(args.clone()),
            MigrationAddress::File { filename, offset } => {
                Self::File { path: filename.into(), offset: *offset }
            }
        })
    }
}

/// Bytes: decimal or 0x and hexadecimal, or decimal with one of the suffixes B, K, M, G, T.
fn offset(text: &str) -> Result<u64, String> {
    let bad = || format!("file URI has bad offset {text}: Invalid argument");
    if let Some(hex) = text.strip_prefix("0x") {
        return u64::from_str_radix(hex, 16).map_err(|_| bad());
    }
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(bad()),
    };
    let number = digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse::<u64>().ok());
    number.flatten().and_then(|n| n.checked_mul(1 << shift)).ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_others_refused_with_qemus_words() {
        let file = |path: &str, offset| Ok(Address::File { path: path.into(), offset });
        assert_eq!(Address::parse("file:/a b,c"), file("/a b,c", 0));
        assert_eq!(Address::parse("file:a,offset=0x1000"), file("a", 4096));
        assert_eq!(Address::parse("file:a,offset=4k"), file("a", 4096));
        assert_eq!(Address::parse("unix:/s"), Ok(Address::Unix("/s".into())));
        let shell = ["/bin/sh", "-c", "cat > 'x:y'"].map(str::to_owned);
        assert_eq!(Address::parse("exec:cat > 'x:y'"), Ok(Address::Exec(shell.into())));
        for uri in ["", "foo", "tcp:host:1", "File:x", "fd:1"] {
            assert_eq!(Address::parse(uri), Err(format!("unknown migration protocol: {uri}")));
        }
        for bad in ["x", "", "-1", "0x", "1kk", "99999999999999999999", "18446744073709551615K"] {
            let text = format!("file URI has bad offset {bad}: Invalid argument");
            assert_eq!(Address::parse(&format!("file:a,offset={bad}")), Err(text));
        }
    }
}
