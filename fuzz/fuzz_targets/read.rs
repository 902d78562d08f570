//! See `tardigrade_fuzz::targets::read`.
#![cfg_attr(feature = "libfuzzer", no_main)]
tardigrade_fuzz::program!("read");
