//! See `tardigrade_fuzz::targets::open`.
#![cfg_attr(feature = "libfuzzer", no_main)]
tardigrade_fuzz::program!("open");
