//! What the bytes of an input mean. Any bytes mean something.
//!
//! An image is either plain (first byte 0, the file's bytes after it) or packed, so that small
//! inputs make large sparse files: first byte not 0, then the file's length in sectors of 512 bytes
//! (u24), then extents: first sector (u16), number of sectors (u8), the sectors. Numbers are
//! little-endian. What is in no extent reads as zeroes.
//!
//! Targets that do something with the image have their operations before it: how many (u8), then
//! [`OP_LEN`] bytes each.

use std::sync::Arc;

use crate::storage::Sparse;

/// Bytes of a sector.
pub const SECTOR: usize = 512;
/// Longest file in sectors: 32 MiB, enough for clusters of 2 MiB.
const MAX_SECTORS: u32 = 65536;
/// Bytes of an operation.
pub const OP_LEN: usize = 8;

/// One operation: what, and numbers that the target brings into range.
#[derive(Debug, Clone, Copy)]
pub struct Op {
    /// What to do.
    pub kind: u8,
    /// A small argument.
    pub small: u8,
    /// Usually a length.
    pub len: u16,
    /// Usually an offset.
    pub offset: u32,
}

impl Op {
    fn decode(bytes: &[u8; OP_LEN]) -> Self {
        let [kind, small, l0, l1, o0, o1, o2, o3] = *bytes;
        Self {
            kind,
            small,
            len: u16::from_le_bytes([l0, l1]),
            offset: u32::from_le_bytes([o0, o1, o2, o3]),
        }
    }

    /// The bytes that mean this operation.
    pub fn encode(self) -> [u8; OP_LEN] {
        let ([l0, l1], [o0, o1, o2, o3]) = (self.len.to_le_bytes(), self.offset.to_le_bytes());
        [self.kind, self.small, l0, l1, o0, o1, o2, o3]
    }

    /// Offset and length of a request, mostly within `size` bytes, sometimes past them. Small disks
    /// are addressed by the byte, large ones in steps that reach their end.
    pub fn range(self, size: u64) -> (u64, u64) {
        let span = size.saturating_add(size / 16).saturating_add(1 << 10);
        let offset = match (u128::from(self.offset) * u128::from(span)) >> 32 {
            // A whole disk above 4 GiB cannot be reached byte by byte.
            scaled if span > 1 << 32 => u64::try_from(scaled).unwrap_or(u64::MAX),
            _ => u64::from(self.offset) % span,
        };
        (offset, u64::from(self.len) << (self.small & 3))
    }
}

/// The operations in front of an image, and the image.
pub fn split_ops(input: &[u8]) -> (Vec<Op>, &[u8]) {
    let Some((count, rest)) = input.split_first() else {
        return (Vec::new(), &[]);
    };
    let (ops, _) = rest.as_chunks::<OP_LEN>();
    let ops = &ops[..ops.len().min(usize::from(*count))];
    (ops.iter().map(Op::decode).collect(), &rest[ops.len() * OP_LEN..])
}

/// Puts operations in front of an image.
pub fn join_ops(ops: &[Op], image: &[u8]) -> Vec<u8> {
    let ops = &ops[..ops.len().min(usize::from(u8::MAX))];
    let mut input = vec![u8::try_from(ops.len()).unwrap_or(u8::MAX)];
    input.extend(ops.iter().flat_map(|op| op.encode()));
    input.extend(image);
    input
}

/// Where the image's own bytes lie in an input without operations: everything that is not the
/// framing of extents.
pub fn image_parts(image: &[u8]) -> Vec<std::ops::Range<usize>> {
    match image.first() {
        None => Vec::new(),
        Some(0) => std::iter::once(1..image.len()).collect(),
        Some(_) => extents(image).map(|(_, range)| range).collect(),
    }
}

/// The extents of a packed image: first sector, and where in the input its bytes are.
fn extents(image: &[u8]) -> impl Iterator<Item = (u64, std::ops::Range<usize>)> {
    let mut at = 4;
    std::iter::from_fn(move || {
        let [s0, s1, count] = *image.get(at..)?.first_chunk::<3>()?;
        let start = at + 3;
        at = (start + usize::from(count) * SECTOR).min(image.len());
        Some((u64::from(u16::from_le_bytes([s0, s1])), start..at))
    })
}

/// The file that an input stands for.
pub fn unpack(image: &[u8]) -> Arc<Sparse> {
    let file = Sparse::default();
    match image.split_first() {
        None => {}
        Some((0, bytes)) => file.put(0, bytes),
        Some((_, rest)) => {
            let length = rest
                .first_chunk::<3>()
                .map_or(0, |[a, b, c]| u32::from_le_bytes([*a, *b, *c, 0]).min(MAX_SECTORS));
            let length = u64::from(length) * 512;
            for (sector, range) in extents(image) {
                let at = sector * 512;
                let most = usize::try_from(length.saturating_sub(at)).unwrap_or(usize::MAX);
                let bytes = &image[range];
                file.put(at, &bytes[..bytes.len().min(most)]);
            }
            file.put_len(length);
        }
    }
    Arc::new(file)
}

/// The packed form of a file; `None` if it is too long for it.
pub fn pack(file: &[u8]) -> Option<Vec<u8>> {
    let sectors = u32::try_from(file.len().div_ceil(SECTOR)).ok().filter(|n| *n <= MAX_SECTORS)?;
    let mut image = vec![1];
    image.extend(&sectors.to_le_bytes()[..3]);
    let mut open: Option<usize> = None;
    for (index, sector) in file.chunks(SECTOR).enumerate() {
        if sector.iter().all(|byte| *byte == 0) {
            open = None;
            continue;
        }
        let header = *open.get_or_insert_with(|| {
            let start = u16::try_from(index).unwrap_or(u16::MAX);
            image.extend(start.to_le_bytes());
            image.push(0);
            image.len() - 1
        });
        image.extend(sector);
        image.resize(image.len() + SECTOR - sector.len(), 0);
        image[header] += 1;
        if image[header] == u8::MAX {
            open = None;
        }
    }
    Some(image)
}

#[cfg(test)]
mod tests {
    use block::storage::Storage;

    use super::*;

    #[test]
    fn a_packed_file_is_unpacked_as_it_was() {
        let mut random = fastrand::Rng::with_seed(1);
        for sectors in [0, 1, 7, 300, 1000] {
            let mut file = vec![0; sectors * SECTOR];
            for sector in file.chunks_mut(SECTOR) {
                if random.u8(..8) != 0 {
                    sector.fill_with(|| random.u8(..));
                }
            }
            let unpacked = unpack(&pack(&file).unwrap());
            assert_eq!(unpacked.len().unwrap(), file.len() as u64);
            assert!(unpacked.bytes() == file, "{sectors} sectors");
        }
    }

    #[test]
    fn operations_are_read_back_as_they_were_joined() {
        let op = Op { kind: 3, small: 4, len: 0x1234, offset: 0xdead_beef };
        let input = join_ops(&[op; 3], &[9, 8, 7]);
        let (ops, image) = split_ops(&input);
        assert_eq!(image, [9, 8, 7]);
        assert_eq!(ops.len(), 3);
        assert!(ops.iter().all(|back| back.encode() == op.encode()));
    }
}
