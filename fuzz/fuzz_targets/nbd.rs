//! See `tardigrade_fuzz::targets::nbd`.
#![cfg_attr(feature = "libfuzzer", no_main)]
tardigrade_fuzz::program!("nbd");
