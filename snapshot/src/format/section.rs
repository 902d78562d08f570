//! Sections: one named, versioned piece of machine state each.

use std::fmt;
use std::ops::RangeInclusive;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::FormatError;

/// Most bytes of one section's payload.
pub(crate) const MAX_SECTION: u64 = 64 << 20;

/// Most bytes of a section's kind.
pub(crate) const MAX_KIND: usize = 48;

/// Deepest nesting of a payload that is decoded; state structs nest a few levels.
const MAX_NESTING: usize = 64;

/// What a section is of: a kind ("vcpu", "virtio-blk") and which one of that kind.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SectionName {
    kind: String,
    instance: u32,
}

impl SectionName {
    /// Names the section of the `instance`th thing of `kind`, counted from 0.
    pub fn new(kind: impl Into<String>, instance: u32) -> Self {
        Self { kind: kind.into(), instance }
    }

    /// The kind.
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// Which one of its kind.
    pub(crate) fn instance(&self) -> u32 {
        self.instance
    }

    /// Kinds are lower-case words, so that they can be compared and printed without thought.
    pub(crate) fn is_valid(&self) -> bool {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-._".contains(&b);
        (1..=MAX_KIND).contains(&self.kind.len()) && self.kind.bytes().all(plain)
    }
}

impl fmt::Display for SectionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.kind, self.instance)
    }
}

/// A section as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// What it is of.
    pub name: SectionName,
    /// Version of the payload, counted by the kind's owner from 1.
    pub version: u32,
    /// The payload: one CBOR data item (RFC 8949).
    pub bytes: Vec<u8>,
}

impl Section {
    /// Encodes `state` as the payload of a section.
    pub fn encode<T: Serialize + ?Sized>(
        kind: &str,
        instance: u32,
        version: u32,
        state: &T,
    ) -> Result<Self, FormatError> {
        let name = SectionName::new(kind, instance);
        let mut bytes = Vec::new();
        if let Err(error) = ciborium::into_writer(state, &mut bytes) {
            let reason = error.to_string();
            return Err(FormatError::Encode { name, reason });
        }
        let section = Self { name, version, bytes };
        section.check_writable()?;
        Ok(section)
    }

    /// Decodes the payload, which must be exactly one CBOR item. `versions` are those that `T`
    /// stands for. Memory taken is bounded by the payload's length, not by lengths it claims.
    pub fn decode<T: DeserializeOwned>(
        &self,
        versions: RangeInclusive<u32>,
    ) -> Result<T, FormatError> {
        if !versions.contains(&self.version) {
            return Err(FormatError::SectionVersion {
                name: self.name.clone(),
                found: self.version,
                oldest: *versions.start(),
                newest: *versions.end(),
            });
        }
        let mut rest = self.bytes.as_slice();
        let value = ciborium::de::from_reader_with_recursion_limit(&mut rest, MAX_NESTING)
            .map_err(|error| self.undecodable(error.to_string()))?;
        if rest.is_empty() {
            Ok(value)
        } else {
            Err(self.undecodable(format!("{} bytes are left over", rest.len())))
        }
    }

    pub(crate) fn check_writable(&self) -> Result<(), FormatError> {
        let reason = if !self.name.is_valid() {
            "its kind is not made of 1 to 48 characters a-z 0-9 - . _".to_owned()
        } else if self.bytes.len() as u64 > MAX_SECTION {
            format!("it has {} bytes, at most 64 MiB fit", self.bytes.len())
        } else {
            return Ok(());
        };
        Err(FormatError::Encode { name: self.name.clone(), reason })
    }

    fn undecodable(&self, reason: String) -> FormatError {
        FormatError::Decode { name: self.name.clone(), reason }
    }
}

/// Sections on their way into a machine. Each is taken once; what is left over is an error.
#[derive(Debug)]
pub struct SectionReader<'a> {
    left: Vec<&'a Section>,
}

impl<'a> SectionReader<'a> {
    /// Starts with all of `sections`.
    pub fn new(sections: &'a [Section]) -> Self {
        Self { left: sections.iter().collect() }
    }

    /// Takes and decodes one section.
    pub fn take<T: DeserializeOwned>(
        &mut self,
        kind: &str,
        instance: u32,
        versions: RangeInclusive<u32>,
    ) -> Result<T, FormatError> {
        self.take_raw(kind, instance)?.decode(versions)
    }

    /// Takes one section as it is stored.
    pub(crate) fn take_raw(
        &mut self,
        kind: &str,
        instance: u32,
    ) -> Result<&'a Section, FormatError> {
        let name = SectionName::new(kind, instance);
        match self.left.iter().position(|section| section.name == name) {
            Some(at) => Ok(self.left.remove(at)),
            None => Err(FormatError::Missing(name)),
        }
    }

    /// Ends the reading: a section that nothing took belongs to something this machine lacks.
    pub fn finish(self) -> Result<(), FormatError> {
        match self.left.first() {
            Some(section) => Err(FormatError::Unknown(section.name.clone())),
            None => Ok(()),
        }
    }
}
