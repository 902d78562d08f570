//! See `tardigrade_fuzz::targets::write`.
#![cfg_attr(feature = "libfuzzer", no_main)]
tardigrade_fuzz::program!("write");
