//! Every target with its seeds, its regressions, and mutations of them: the same ones each time.
#![allow(clippy::unwrap_used, reason = "a test")]

use tardigrade_fuzz::mutate::mutate;
use tardigrade_fuzz::{seeds, targets};

/// Mutations of all seeds together; `FUZZ_MUTATIONS` may say more.
const MUTATIONS: usize = 3000;

fn replay(name: &str) {
    let target = targets::by_name(name).unwrap();
    let mut seeds = seeds::of(target);
    assert!(!seeds.is_empty(), "{name} has no seeds");
    seeds.extend(seeds::regressions(target));
    for seed in &seeds {
        eprintln!("{}", seed.name);
        (target.run)(&seed.input);
    }
    let mutations = std::env::var("FUZZ_MUTATIONS").map_or(MUTATIONS, |n| n.parse().unwrap());
    for number in 0..mutations {
        let seed = &seeds[number % seeds.len()];
        let mut random = fastrand::Rng::with_seed(number as u64);
        let mut input = seed.input.clone();
        mutate(&mut input, target.body, &mut random);
        eprintln!("{} mutated, seed {number}", seed.name);
        (target.run)(&input);
    }
}

#[test]
fn opening_survives_seeds_regressions_and_mutations() {
    replay("open");
}

#[test]
fn reading_survives_seeds_regressions_and_mutations() {
    replay("read");
}

#[test]
fn writing_survives_seeds_regressions_and_mutations() {
    replay("write");
}

#[test]
fn checking_survives_seeds_regressions_and_mutations() {
    replay("check");
}

#[test]
fn qmp_sessions_survive_seeds_regressions_and_mutations() {
    replay("qmp");
}

#[test]
fn nbd_sessions_survive_seeds_regressions_and_mutations() {
    replay("nbd");
}
