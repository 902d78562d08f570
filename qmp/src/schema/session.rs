//! Commands about the session itself: capabilities, version, list of commands.

use super::macros::{enums, objects};

enums! {
    /// What a client and the server may agree on.
    QmpCapability {
        /// Out-of-band execution of commands.
        Oob = "oob",
    }
}

objects! {
    /// Arguments of `qmp_capabilities`.
    CapabilitiesArguments {
        /// Capabilities to switch on.
        "enable" enable: Option<Vec<QmpCapability>>,
    }

    /// Three numbers of a version.
    VersionTriple {
        /// The third number.
        "micro" micro: i64,
        /// The second number.
        "minor" minor: i64,
        /// The first number.
        "major" major: i64,
    }

    /// The version in the greeting and from `query-version`.
    VersionInfo {
        /// The version of QEMU's protocol and schema that clients may expect.
        "qemu" qemu: VersionTriple,
        /// The program that it is, for people.
        "package" package: String,
    }

    /// An entry of `query-commands`.
    CommandName {
        /// The command.
        "name" name: String,
    }
}
