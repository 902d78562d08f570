//! `-o NAME=VALUE,...` of `image create` and `image convert`.

use block::qcow2::create::{CreateOptions, Version};
use block::{FileCreateOptions, FileHints, Preallocation};

use super::text::parse_size;
use super::{Error, Result};

const QCOW2_HELP: &str = "\
Supported qcow2 options:
  backing_file=<str>     - File name of a base image
  backing_fmt=<str>      - Image format of the base image
  cluster_size=<size>    - qcow2 cluster size
  compat=<str>           - Compatibility level (v2 [0.10] or v3 [1.1])
  compression_type=<str> - Compression method used for image cluster compression (zlib or zstd)
  data_file=<str>        - File name of an external data file
  data_file_raw=<bool (on/off)> - The external data file must stay valid as a raw image
  extended_l2=<bool (on/off)> - Extended L2 tables
  extent_size_hint=<size> - Extent size hint for the image file (XFS), 0 to disable
  lazy_refcounts=<bool (on/off)> - Postpone refcount updates
  nocow=<bool (on/off)>  - Turn off copy-on-write (valid only on btrfs)
  preallocation=<str>    - Preallocation mode (allowed values: off, metadata, falloc, full)
  refcount_bits=<num>    - Width of a reference count entry in bits
  size=<size>            - Virtual disk size
";

const RAW_HELP: &str = "\
Supported raw options:
  extent_size_hint=<size> - Extent size hint for the image file (XFS), 0 to disable
  nocow=<bool (on/off)>  - Turn off copy-on-write (valid only on btrfs)
  preallocation=<str>    - Preallocation mode (allowed values: off, falloc, full)
  size=<size>            - Virtual disk size
";

/// Whether `-o help` is among the options.
pub(super) fn asks_for_help(options: &[String]) -> bool {
    options.iter().flat_map(|text| split(text)).any(|option| option == "help" || option == "?")
}

/// What `-o help` prints for a format.
pub(super) fn help(format: &str) -> Result<&'static str> {
    match format {
        "raw" => Ok(RAW_HELP),
        "qcow2" => Ok(QCOW2_HELP),
        other => Err(Error::Usage(format!("Unknown file format '{other}'"))),
    }
}

/// The options of a new image, as given.
#[derive(Debug, Clone, Default)]
pub(super) struct Given {
    pub(super) size: Option<u64>,
    pub(super) backing_file: Option<String>,
    pub(super) backing_fmt: Option<String>,
    pub(super) data_file: Option<String>,
    nocow: Option<bool>,
    extent_size_hint: Option<u64>,
    preallocation: Option<Preallocation>,
    qcow2: CreateOptions,
    /// An option that only qcow2 has.
    only_qcow2: Option<String>,
    /// Names and values as they were written, for the message.
    compat: Option<String>,
}

impl Given {
    /// Reads all `-o`.
    pub(super) fn read(options: &[String]) -> Result<Self> {
        let mut given = Self::default();
        for option in options.iter().flat_map(|text| split(text)) {
            let (name, value) = match option.split_once('=') {
                Some((name, value)) => (name, value),
                // QEMU's short form of a switch.
                None => (option.as_str(), "on"),
            };
            given.set(name, value)?;
        }
        Ok(given)
    }

    fn set(&mut self, name: &str, value: &str) -> Result<()> {
        let wrong = |text: String| Err(Error::Usage(text));
        if !matches!(name, "size" | "nocow" | "preallocation" | "extent_size_hint") {
            self.only_qcow2.get_or_insert_with(|| name.to_owned());
        }
        match name {
            "size" => self.size = Some(bytes(name, value)?),
            "backing_file" => self.backing_file = Some(value.to_owned()),
            "backing_fmt" => self.backing_fmt = Some(value.to_owned()),
            "data_file" => self.data_file = Some(value.to_owned()),
            "extent_size_hint" => self.extent_size_hint = Some(bytes(name, value)?),
            "nocow" => self.nocow = Some(switch(name, value)?),
            "data_file_raw" => self.qcow2.data_file_raw = Some(switch(name, value)?),
            "extended_l2" => self.qcow2.extended_l2 = Some(switch(name, value)?),
            "lazy_refcounts" => self.qcow2.lazy_refcounts = Some(switch(name, value)?),
            "cluster_size" => self.qcow2.cluster_size = Some(bytes(name, value)?),
            "refcount_bits" => match value.parse() {
                Ok(bits) => self.qcow2.refcount_bits = Some(bits),
                Err(_) => return wrong(format!("Parameter '{name}' expects a number")),
            },
            "compat" => {
                self.qcow2.version = Some(match value {
                    "0.10" | "v2" => Version::V2,
                    "1.1" | "v3" => Version::V3,
                    _ => {
                        return wrong(format!(
                            "Parameter 'version' does not accept value '{value}'"
                        ));
                    }
                });
                self.compat = Some(value.to_owned());
            }
            "compression_type" => {
                let found = CreateOptions::compression_of(value);
                self.qcow2.compression_type = Some(found.map_err(|e| Error::Usage(e.to_string()))?);
            }
            "preallocation" => match Preallocation::of_name(value) {
                Some(mode) => self.preallocation = Some(mode),
                None => {
                    return wrong(format!(
                        "Parameter 'preallocation' does not accept value '{value}'"
                    ));
                }
            },
            _ if name == "encryption" || name.starts_with("encrypt.") => {
                return wrong(format!("Encryption ('{name}') of qcow2 images is not supported"));
            }
            _ => return wrong(format!("Invalid parameter '{name}'")),
        }
        Ok(())
    }

    /// The options of a raw image.
    pub(super) fn raw(&self, filename: &str, size: u64) -> Result<FileCreateOptions> {
        if let Some(name) = &self.only_qcow2 {
            return Err(Error::Usage(match name.as_str() {
                "backing_file" => "Backing file not supported for file format 'raw'".to_owned(),
                name => format!("Invalid parameter '{name}'"),
            }));
        }
        Ok(FileCreateOptions {
            filename: filename.to_owned(),
            size,
            preallocation: self.preallocation,
            nocow: self.nocow,
            extent_size_hint: self.extent_size_hint,
        })
    }

    /// What the file system may do with the image's files.
    pub(super) fn hints(&self) -> block::Result<FileHints> {
        FileHints::new(self.nocow, self.extent_size_hint)
    }

    /// The options of a qcow2 image.
    pub(super) fn qcow2(&self, size: u64) -> CreateOptions {
        CreateOptions {
            size,
            backing_file: self.backing_file.clone(),
            backing_fmt: self.backing_fmt.clone(),
            preallocation: self.preallocation,
            ..self.qcow2.clone()
        }
    }

    /// What `create` says it makes, in QEMU's words and order.
    pub(super) fn describe(&self, format: &str, size: u64) -> String {
        let on = |set: Option<bool>| if set.unwrap_or(false) { "on" } else { "off" };
        let mut words = vec![format!("fmt={format}")];
        let mut say = |name: &str, value: Option<String>| {
            words.extend(value.map(|value| format!("{name}={value}")));
        };
        let preallocation = self.preallocation.and_then(|mode| {
            let known = Preallocation::NAMES.iter().find(|(_, m)| *m == mode);
            known.map(|(name, _)| (*name).to_owned())
        });
        let nocow = self.nocow.map(|set| on(Some(set)).to_owned());
        let extent_size_hint = self.extent_size_hint.map(|bytes| bytes.to_string());
        if format == "raw" {
            say("size", Some(size.to_string()));
            say("nocow", nocow);
            say("preallocation", preallocation);
            say("extent_size_hint", extent_size_hint);
            return words.join(" ");
        }
        let q = &self.qcow2;
        say("cluster_size", Some(q.cluster_size.unwrap_or(65536).to_string()));
        say("extended_l2", Some(on(q.extended_l2).to_owned()));
        say("preallocation", preallocation);
        let zstd = q.compression_type == Some(block::qcow2::Compression::Zstd);
        say("compression_type", Some(if zstd { "zstd" } else { "zlib" }.to_owned()));
        say("size", Some(size.to_string()));
        say("compat", self.compat.clone());
        say("backing_file", self.backing_file.clone());
        say("backing_fmt", self.backing_fmt.clone());
        say("data_file", self.data_file.clone());
        say("data_file_raw", q.data_file_raw.map(|set| on(Some(set)).to_owned()));
        say("lazy_refcounts", Some(on(q.lazy_refcounts).to_owned()));
        say("refcount_bits", Some(q.refcount_bits.unwrap_or(16).to_string()));
        say("nocow", nocow);
        say("extent_size_hint", extent_size_hint);
        words.join(" ")
    }
}

/// The options of one `-o`; a doubled comma is one that is part of a value.
fn split(text: &str) -> Vec<String> {
    let whole = text.replace(",,", "\0");
    whole.split(',').filter(|o| !o.is_empty()).map(|o| o.replace('\0', ",")).collect()
}

fn switch(name: &str, value: &str) -> Result<bool> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(Error::Usage(format!("Parameter '{name}' expects 'on' or 'off'"))),
    }
}

fn bytes(name: &str, value: &str) -> Result<u64> {
    parse_size(value).ok_or_else(|| {
        Error::Usage(format!(
            "Parameter '{name}' expects a non-negative number below 2^64\n\
             Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n\
             and exabytes, respectively."
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Given> {
        Given::read(&[text.to_owned()])
    }

    #[test]
    fn options_are_read_and_described_in_qemus_words() {
        let text = "cluster_size=4k,lazy_refcounts,backing_file=a,,b.q,compat=v3,nocow=off";
        let given = read(text).unwrap();
        assert_eq!(given.backing_file.as_deref(), Some("a,b.q"));
        assert_eq!(
            given.describe("qcow2", 1 << 20),
            "fmt=qcow2 cluster_size=4096 extended_l2=off compression_type=zlib size=1048576 \
             compat=v3 backing_file=a,b.q lazy_refcounts=on refcount_bits=16 nocow=off"
        );
        assert_eq!(given.qcow2(512).size, 512);
        assert!(given.raw("x", 512).is_err());
        let raw = read("extent_size_hint=2M,preallocation=off,nocow=on").unwrap();
        let raw = raw.describe("raw", 512);
        assert_eq!(raw, "fmt=raw size=512 nocow=on preallocation=off extent_size_hint=2097152");
    }

    #[test]
    fn options_that_cannot_be_are_refused_with_qemus_texts() {
        for (text, error) in [
            ("zz=1", "Invalid parameter 'zz'"),
            ("lazy_refcounts=maybe", "Parameter 'lazy_refcounts' expects 'on' or 'off'"),
            ("compat=0.9", "Parameter 'version' does not accept value '0.9'"),
            ("compression_type=foo", "Parameter 'compression-type' does not accept value 'foo'"),
            ("preallocation=foo", "Parameter 'preallocation' does not accept value 'foo'"),
            (
                "encrypt.format=luks",
                "Encryption ('encrypt.format') of qcow2 images is not supported",
            ),
        ] {
            assert_eq!(read(text).unwrap_err().to_string(), error);
        }
        let error = read("cluster_size=abc").unwrap_err().to_string();
        assert!(error.starts_with("Parameter 'cluster_size' expects a non-negative number"));
    }
}
