//! See `tardigrade_fuzz::targets::qmp`.
#![cfg_attr(feature = "libfuzzer", no_main)]
tardigrade_fuzz::program!("qmp");
