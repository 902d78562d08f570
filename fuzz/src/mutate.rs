//! Changes to an input that keep its framing: image tables are made of big-endian numbers that
//! point at clusters, and bit flips alone rarely make one that still points somewhere.

use std::ops::Range;

use fastrand::Rng;

use crate::input::{self, OP_LEN};

/// What an input has after its operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body {
    /// An image, without operations before it.
    Image,
    /// Operations, then an image.
    OpsAndImage,
    /// What an NBD client sends.
    Session,
    /// What a QMP client sends.
    Monitor,
}

/// Flags of table entries, and bits of sizes.
const BITS: &[u64] =
    &[1 << 63, 1 << 62, 1, 1 << 61, 1 << 56, 1 << 55, 0x200, 0x1_0000, 1 << 32, 1 << 33];
const NUMBERS: &[u64] = &[0, 1, 2, 7, 0xff, 0x1ff, 0xffff, 0x7fff_ffff, 0xffff_ffff, u64::MAX];

/// Changes an input in a few places.
pub fn mutate(input: &mut Vec<u8>, body: Body, random: &mut Rng) {
    for _ in 0..1 + random.usize(..4) {
        let ops = match body {
            Body::OpsAndImage => {
                let image = input.len() - input::split_ops(input).1.len();
                (image > 0).then_some(image)
            }
            Body::Image | Body::Session | Body::Monitor => None,
        };
        match ops {
            Some(image) if random.bool() => mutate_ops(input, image, random),
            _ => {
                let start = ops.unwrap_or(0);
                let parts = match body {
                    Body::Session | Body::Monitor => std::iter::once(0..input.len()).collect(),
                    Body::Image | Body::OpsAndImage => input::image_parts(&input[start..]),
                };
                let parts: Vec<_> = parts
                    .into_iter()
                    .map(|part| part.start + start..part.end + start)
                    .filter(|part| part.len() >= 8)
                    .collect();
                mutate_words(input, &parts, body, random);
            }
        }
    }
}

/// Changes, adds, repeats or drops an operation. `image` is where the image begins.
fn mutate_ops(input: &mut Vec<u8>, image: usize, random: &mut Rng) {
    let count = (image - 1) / OP_LEN;
    // It may claim more than there are.
    input[0] = u8::try_from(count).unwrap_or(u8::MAX);
    let at = 1 + random.usize(..=count) * OP_LEN;
    let fresh: Vec<u8> = std::iter::repeat_with(|| random.u8(..)).take(OP_LEN).collect();
    match random.u8(..8) {
        0 if at < image => {
            input.drain(at..at + OP_LEN);
            input[0] -= 1;
        }
        1 | 2 if count < usize::from(u8::MAX) => {
            input.splice(at..at, fresh);
            input[0] += 1;
        }
        3 if at < image && count < usize::from(u8::MAX) => {
            let again = input[at..at + OP_LEN].to_vec();
            input.splice(at..at, again);
            input[0] += 1;
        }
        4 if at < image => input[at] = random.u8(..),
        _ if at < image => {
            let byte = at + random.usize(..OP_LEN);
            input[byte] = random.u8(..);
        }
        _ => {}
    }
}

fn word(input: &[u8], at: usize) -> u64 {
    input[at..].first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes))
}

/// A place in one of the parts, aligned to `align` bytes within it, with 8 bytes after it.
fn place(parts: &[Range<usize>], align: usize, random: &mut Rng) -> Option<usize> {
    let part = random.choice(parts)?;
    // Headers and the beginnings of tables matter most.
    let most = if random.bool() { (part.len() - 8).min(128) } else { part.len() - 8 };
    Some(part.start + random.usize(..=most) / align * align)
}

/// A place that holds something: tables are sparse.
fn used_place(input: &[u8], parts: &[Range<usize>], random: &mut Rng) -> Option<usize> {
    let mut at = place(parts, 8, random)?;
    for _ in 0..16 {
        if word(input, at) != 0 {
            break;
        }
        at = place(parts, 8, random)?;
    }
    Some(at)
}

/// Changes one number of the image.
fn mutate_words(input: &mut [u8], parts: &[Range<usize>], body: Body, random: &mut Rng) {
    // Nothing is aligned in what a client sends.
    let aligned = !matches!(body, Body::Session | Body::Monitor);
    let found = if aligned { used_place(input, parts, random) } else { place(parts, 1, random) };
    let Some(at) = found else {
        return;
    };
    let old = word(input, at);
    let new = match random.u8(..10) {
        0 | 1 => used_place(input, parts, random).map_or(old, |other| word(input, other)),
        2 => old ^ random.choice(BITS).unwrap_or(&0),
        3 => old.wrapping_add(0x200 << random.u8(..13)),
        4 => old.wrapping_sub(0x200 << random.u8(..13)),
        5 => *random.choice(NUMBERS).unwrap_or(&0),
        6 => u64::from(random.u16(..)) << 9 | random.choice(BITS).unwrap_or(&0),
        7 => old ^ 1 << random.u8(..64),
        8 => return mutate_small(input, parts, random),
        _ => {
            // Another reference to what some other entry refers to.
            let Some(other) = used_place(input, parts, random) else { return };
            word(input, other) | random.choice(BITS).unwrap_or(&0)
        }
    };
    input[at..at + 8].copy_from_slice(&new.to_be_bytes());
}

/// Changes a 32-bit number or a byte, at any place.
fn mutate_small(input: &mut [u8], parts: &[Range<usize>], random: &mut Rng) {
    if random.bool() {
        if let Some(at) = place(parts, 4, random) {
            let value = match random.u8(..3) {
                0 => u32::from(random.u8(..)),
                1 => 1 << random.u8(..32),
                _ => u32::MAX >> random.u8(..32),
            };
            input[at..at + 4].copy_from_slice(&value.to_be_bytes());
        }
    } else if let Some(at) = place(parts, 1, random) {
        input[at] = random.u8(..);
    }
}
