//! Between libFuzzer and the targets.

use crate::{mutate, targets};

/// Runs one input.
pub fn run(name: &str, data: &[u8]) {
    (targets::by_name(name).unwrap().run)(data);
}

/// Changes an input in place: as libFuzzer would, or with knowledge of what images are made of.
pub fn mutate(name: &str, data: &mut [u8], size: usize, max_size: usize, seed: u32) -> usize {
    let mut random = fastrand::Rng::with_seed(seed.into());
    if random.u8(..4) == 0 {
        return libfuzzer_sys::fuzzer_mutate(data, size, max_size);
    }
    let mut input = data[..size].to_vec();
    let target = targets::by_name(name).unwrap();
    mutate::mutate(&mut input, target.body, &mut random);
    input.truncate(max_size);
    data[..input.len()].copy_from_slice(&input);
    input.len()
}
