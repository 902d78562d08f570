//! KVM's structures inside a VM state: the bytes of their C layout (KVM API, x86_64), as one CBOR
//! byte string whose length must be exactly right.

use std::marker::PhantomData;

use serde::de::{Error as _, Visitor};
use serde::{Deserializer, Serializer};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// For `#[serde(with = "blob")]`.
pub fn serialize<T, S>(value: &T, serializer: S) -> Result<S::Ok, S::Error>
where
    T: IntoBytes + Immutable,
    S: Serializer,
{
    serializer.serialize_bytes(value.as_bytes())
}

/// For `#[serde(with = "blob")]`.
pub fn deserialize<'de, T, D>(deserializer: D) -> Result<T, D::Error>
where
    T: FromBytes + Immutable,
    D: Deserializer<'de>,
{
    struct Exact<T>(PhantomData<T>);

    impl<T: FromBytes> Visitor<'_> for Exact<T> {
        type Value = T;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            write!(f, "a byte string of {} bytes", size_of::<T>())
        }

        fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> Result<T, E> {
            T::read_from_bytes(bytes).map_err(|_| E::invalid_length(bytes.len(), &self))
        }

        fn visit_byte_buf<E: serde::de::Error>(self, bytes: Vec<u8>) -> Result<T, E> {
            self.visit_bytes(&bytes)
        }
    }

    deserializer.deserialize_bytes(Exact(PhantomData)).map_err(D::Error::custom)
}
