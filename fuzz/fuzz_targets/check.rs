//! See `tardigrade_fuzz::targets::check`.
#![cfg_attr(feature = "libfuzzer", no_main)]
tardigrade_fuzz::program!("check");
