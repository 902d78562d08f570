//! Migration.

use super::macros::{enums, objects};
use super::{Branch, Member, Qapi, Type, UnionInfo};

enums! {
    /// How far a migration is.
    MigrationStatus {
        /// None was asked for.
        None = "none",
        /// It is being prepared.
        Setup = "setup",
        /// It is being cancelled.
        Cancelling = "cancelling",
        /// It was cancelled.
        Cancelled = "cancelled",
        /// RAM is under way.
        Active = "active",
        /// It is over.
        Completed = "completed",
        /// It failed.
        Failed = "failed",
        /// The guest stands still and the last of its state is under way.
        Device = "device",
    }

    /// What can be wanted of a migration.
    MigrationCapability {
        /// Events tell how far it is.
        Events = "events",
        /// The target compares the machines' UUIDs.
        ValidateUuid = "validate-uuid",
    }

    /// What a channel carries.
    MigrationChannelType {
        /// All of it.
        Main = "main",
    }
}

objects! {
    /// Whether a capability is wanted.
    MigrationCapabilityStatus {
        /// Which one.
        "capability" capability: MigrationCapability,
        /// Whether it is.
        "state" state: bool,
    }

    /// Arguments of `migrate-set-capabilities`.
    MigrateSetCapabilitiesArguments {
        /// Those that are to change.
        "capabilities" capabilities: Vec<MigrationCapabilityStatus>,
    }

    /// What a migration may use; arguments of `migrate-set-parameters`, where what is left out stays.
    MigrationParameters {
        /// Bytes a second while the guest runs; 0 for no limit.
        "max-bandwidth" max_bandwidth: Option<u64>,
        /// Bytes a second that are counted on while the guest stands still; 0: as many as before.
        "avail-switchover-bandwidth" avail_switchover_bandwidth: Option<u64>,
        /// Milliseconds that the guest may stand still for the last of RAM.
        "downtime-limit" downtime_limit: Option<u64>,
    }

    /// A way for a part of the stream.
    MigrationChannel {
        /// Which part.
        "channel-type" channel_type: MigrationChannelType,
        /// Where to, or where from.
        "addr" addr: MigrationAddress,
    }

    /// Arguments of `migrate`: one of `uri` and `channels`.
    MigrateArguments {
        /// Where to: `file:PATH[,offset=BYTES]`, `exec:COMMAND` or `unix:PATH`.
        "uri" uri: Option<String>,
        /// The same in parts: one, of type `main`.
        "channels" channels: Option<Vec<MigrationChannel>>,
        /// The answer comes at once in any case, as in QEMU.
        "detach" detach: Option<bool>,
        /// Whether one that was interrupted is to go on: none can be.
        "resume" resume: Option<bool>,
    }

    /// Arguments of `migrate-incoming`: one of `uri` and `channels`.
    MigrateIncomingArguments {
        /// Where from, as for `migrate`; with `unix:` somebody is waited for there.
        "uri" uri: Option<String>,
        /// The same in parts: one, of type `main`.
        "channels" channels: Option<Vec<MigrationChannel>>,
        /// Whether the process ends if it fails; it does by default.
        "exit-on-error" exit_on_error: Option<bool>,
    }

    /// How much of RAM was sent. What is not done here is 0.
    MigrationStats {
        /// Bytes of the stream.
        "transferred" transferred: u64,
        /// Bytes of RAM that are still to be sent.
        "remaining" remaining: u64,
        /// Bytes of RAM.
        "total" total: u64,
        /// Pages of zeroes.
        "duplicate" duplicate: u64,
        /// Pages with contents.
        "normal" normal: u64,
        /// Their bytes.
        "normal-bytes" normal_bytes: u64,
        /// Pages a second that the guest writes.
        "dirty-pages-rate" dirty_pages_rate: u64,
        /// Megabits a second.
        "mbps" mbps: f64,
        /// How often what was written was asked for.
        "dirty-sync-count" dirty_sync_count: u64,
        /// Not done here.
        "postcopy-requests" postcopy_requests: u64,
        /// Bytes of a page.
        "page-size" page_size: u64,
        /// Not done here.
        "multifd-bytes" multifd_bytes: u64,
        /// Pages a second.
        "pages-per-second" pages_per_second: u64,
        /// Bytes sent while the guest ran.
        "precopy-bytes" precopy_bytes: u64,
        /// Bytes sent while it stood still.
        "downtime-bytes" downtime_bytes: u64,
        /// Not done here.
        "postcopy-bytes" postcopy_bytes: u64,
        /// Not done here.
        "dirty-sync-missed-zero-copy" dirty_sync_missed_zero_copy: u64,
    }

    /// From `query-migrate`.
    MigrationInfo {
        /// How far it is; nothing if none was asked for.
        "status" status: Option<MigrationStatus>,
        /// What was sent.
        "ram" ram: Option<MigrationStats>,
        /// Milliseconds since it began, or that it took.
        "total-time" total_time: Option<i64>,
        /// Milliseconds that the guest is going to stand still.
        "expected-downtime" expected_downtime: Option<i64>,
        /// Milliseconds that the guest stood still.
        "downtime" downtime: Option<i64>,
        /// Milliseconds before RAM was begun with.
        "setup-time" setup_time: Option<i64>,
        /// Why it failed.
        "error-desc" error_desc: Option<String>,
        /// Where the source is waited for.
        "socket-address" socket_address: Option<Vec<MigrationSocket>>,
    }
}

enums! {
    /// Kinds of sockets.
    SocketAddressType {
        /// A file.
        Unix = "unix",
    }
}

/// Where a migration goes, or comes from.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(tag = "transport", rename_all = "kebab-case")]
pub enum MigrationAddress {
    /// A socket.
    Socket {
        /// Its kind.
        #[serde(rename = "type")]
        kind: SocketAddressType,
        /// Where it is.
        path: String,
    },
    /// A command's input or output.
    Exec {
        /// The program and its arguments.
        args: Vec<String>,
    },
    /// A file.
    File {
        /// Where it is.
        filename: String,
        /// Where the stream begins in it.
        offset: u64,
    },
}

/// A socket that is listened on.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum MigrationSocket {
    /// A file.
    Unix {
        /// Where it is.
        path: String,
    },
}

impl Qapi for MigrationSocket {
    const TYPE: Type = Type::Union(&UnionInfo {
        name: "MigrationSocket",
        doc: "A socket that is listened on.",
        tag: "type",
        branches: &[Branch {
            value: "unix",
            members: &[member("path", "Where it is.", String::TYPE)],
        }],
    });
}

const fn member(name: &'static str, doc: &'static str, ty: Type) -> Member {
    Member { name, doc, ty, optional: false }
}

impl Qapi for MigrationAddress {
    const TYPE: Type = Type::Union(&UnionInfo {
        name: "MigrationAddress",
        doc: "Where a migration goes, or comes from.",
        tag: "transport",
        branches: &[
            Branch {
                value: "socket",
                members: &[
                    member("type", "Its kind.", SocketAddressType::TYPE),
                    member("path", "Where it is.", String::TYPE),
                ],
            },
            Branch {
                value: "exec",
                members: &[member(
                    "args",
                    "The program and its arguments.",
                    <Vec<String> as Qapi>::TYPE,
                )],
            },
            Branch {
                value: "file",
                members: &[
                    member("filename", "Where it is.", String::TYPE),
                    member("offset", "Where the stream begins in it.", u64::TYPE),
                ],
            },
        ],
    });
}
