//! Seeds for the fuzzer, and images as seeds.
//!
//!     seeds write TARGET DIR      writes the seeds and regressions of a target to DIR
//!     seeds pack IMAGE OUT        makes a packed and compressed image of a file
//!     seeds unpack INPUT OUT      makes the file that an image, or the input of `open`, stands for
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a tool for developers")]

use std::path::Path;

use tardigrade_fuzz::{input, seeds, targets};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["write", target, dir] => write(target, Path::new(dir)),
        ["pack", image, out] => {
            let packed = input::pack(&std::fs::read(image).unwrap()).expect("32 MiB at most");
            std::fs::write(out, zstd::encode_all(&*packed, 19).unwrap()).unwrap();
        }
        ["unpack", image, out] => {
            let bytes = std::fs::read(image).unwrap();
            let packed = zstd::decode_all(&*bytes).unwrap_or(bytes);
            std::fs::write(out, input::unpack(&packed).bytes()).unwrap();
        }
        _ => {
            eprintln!("usage: seeds write TARGET DIR | pack IMAGE OUT | unpack INPUT OUT");
            std::process::exit(1);
        }
    }
}

fn write(name: &str, dir: &Path) {
    let target = targets::by_name(name).expect("the name of a target");
    std::fs::create_dir_all(dir).unwrap();
    let regressions = seeds::regressions(target);
    for seed in seeds::of(target).iter().chain(&regressions) {
        std::fs::write(dir.join(&seed.name), &seed.input).unwrap();
    }
}
