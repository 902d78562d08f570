//! Probing: the format of an image by its first bytes, as in QEMU, where nobody says which it is.
//!
//! Those that this program cannot read are refused by name: taken for raw, a guest would get the bytes
//! of the container, and its first write would destroy it.

use std::path::Path;

use crate::storage::{FileOptions, FileStorage, Locking, Storage};
use crate::{Error, ReadBuf, Result};

/// Bytes at the beginning that tell a format: as many as QEMU looks at.
const LOOKED_AT: usize = 512;

/// The format of an image file whose user does not tell it: `qcow2`, or `raw` where no format is known.
/// Takes no locks, as a format does not change with what is written.
///
/// # Errors
/// The file cannot be read; [`Error::NotSupported`] if it is of a format that is not done here.
pub fn probe_format(path: impl AsRef<Path>) -> Result<&'static str> {
    let path = path.as_ref();
    let options = FileOptions { read_only: true, locking: Locking::Off, ..FileOptions::default() };
    let mut head = [0; LOOKED_AT];
    FileStorage::open_unlocked(path, options)?.read_at(0, &[ReadBuf::new(&mut head)])?;
    if head.starts_with(b"QFI\xfb") && head[4..8] != 1u32.to_be_bytes() {
        return Ok("qcow2");
    }
    match foreign(&head) {
        None => Ok("raw"),
        Some(name) => Err(Error::NotSupported(format!(
            "'{}' is a {name}, which is not supported; to use its bytes as they are, tell that its format is raw",
            path.display()
        ))),
    }
}

/// The name of a format of others.
fn foreign(head: &[u8; LOOKED_AT]) -> Option<&'static str> {
    const MAGICS: [(usize, &[u8], &str); 12] = [
        (0, b"QFI\xfb", "qcow image of version 1"),
        // Of LUKS only version 1, as in QEMU: of any other, the header is the guest's.
        (0, b"LUKS\xba\xbe\0\x01", "LUKS container"),
        (0, b"KDMV", "VMDK image"),
        (0, b"COWD", "VMDK image"),
        (0, b"# Disk DescriptorFile", "VMDK image"),
        (0, b"QED\0", "QED image"),
        (64, b"\x7f\x10\xda\xbe", "VDI image"),
        (0, b"vhdxfile", "VHDX image"),
        (0, b"conectix", "VHD (vpc) image"),
        (0, b"WithoutFreeSpace\x02\0\0\0", "Parallels image"),
        (0, b"WithouFreSpacExt\x02\0\0\0", "Parallels image"),
        (0, b"Bochs Virtual HD Image", "Bochs image"),
    ];
    let known = MAGICS.iter().find(|(at, magic, _)| head[*at..].starts_with(magic));
    match known {
        Some((_, _, name)) => Some(*name),
        None if describes_vmdk(head) => Some("VMDK image"),
        None => None,
    }
}

/// A VMDK descriptor is a text: comments and blank lines, then its version.
fn describes_vmdk(head: &[u8]) -> bool {
    let mut lines = head.split_inclusive(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
    let first = lines.find(|line| !line.is_empty() && !line.starts_with(b"#"));
    matches!(first, Some(b"version=1" | b"version=2" | b"version=3"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probed(bytes: &[u8]) -> Result<&'static str> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        probe_format(file.path())
    }

    #[test]
    fn formats_are_told_by_their_first_bytes_and_those_of_others_refused_by_name() {
        assert_eq!(probed(b"QFI\xfb\0\0\0\x03").unwrap(), "qcow2");
        for raw in [&b""[..], b"KDM", b"LUKS\xba\xbe\0\x02", b"# a script\nversion=4\n", b"\n\n"] {
            assert_eq!(probed(raw).unwrap(), "raw", "{raw:?}");
        }
        for (bytes, name) in [
            (&b"QFI\xfb\0\0\0\x01"[..], "qcow image of version 1"),
            (b"LUKS\xba\xbe\0\x01", "LUKS container"),
            (b"KDMV\x01", "VMDK image"),
            (b"# Disk DescriptorFile\nversion=1\n", "VMDK image"),
            (b"# of another kind\n\nversion=3\r\nCID=1\n", "VMDK image"),
            (b"conectix", "VHD (vpc) image"),
        ] {
            let error = probed(bytes).unwrap_err();
            assert!(matches!(error, Error::NotSupported(_)), "{error:?}");
            assert!(error.to_string().contains(&format!("is a {name}, which")), "{error}");
        }
    }
}
