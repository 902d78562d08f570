//! Transactions and internal snapshots.

use super::macros::{enums, objects};
use super::{
    BackupArguments, BitmapAddArguments, BitmapArguments, BitmapMergeArguments, BlockdevSnapshot,
    BlockdevSnapshotSync, Branch, CheckpointLabel, DriveBackupArguments, Member, Qapi, Type,
    UnionInfo,
};

enums! {
    /// How the jobs of a transaction end.
    ActionCompletionMode {
        /// Each by itself.
        Individual = "individual",
        /// All of them, or none.
        Grouped = "grouped",
    }
}

objects! {
    /// Nothing: an action that fails.
    Abort {}

    /// Arguments of `blockdev-snapshot-internal-sync`.
    InternalSnapshotArguments {
        /// The node.
        "device" device: String,
        /// The snapshot's name.
        "name" name: String,
    }

    /// Arguments of `blockdev-snapshot-delete-internal-sync`: at least one of `id` and `name`.
    InternalSnapshotDeleteArguments {
        /// The node.
        "device" device: String,
        /// The snapshot's id.
        "id" id: Option<String>,
        /// The snapshot's name.
        "name" name: Option<String>,
    }

    /// The machine's state at the moment of a transaction; see `docs/jobs.md`.
    VmstateSaveArguments {
        /// The node that it is saved to, with a snapshot of its disk.
        "node" node: String,
        /// The checkpoint; internal snapshots of this name in the same transaction belong to it.
        "tag" tag: String,
        /// The job that writes it. Without one the transaction is answered when it is written.
        "job-id" job_id: Option<String>,
        /// What the checkpoint is, for people; at most 4096 bytes.
        "description" description: Option<String>,
        /// What tools know it by.
        "labels" labels: Option<Vec<CheckpointLabel>>,
    }

    /// How a transaction is carried out.
    TransactionProperties {
        /// How its jobs end; `individual` by default.
        "completion-mode" completion_mode: Option<ActionCompletionMode>,
    }

    /// Arguments of `transaction`.
    TransactionArguments {
        /// What is to be done.
        "actions" actions: Vec<TransactionAction>,
        /// How.
        "properties" properties: Option<TransactionProperties>,
    }
}

/// Declares the actions once: their names and the types of their data.
macro_rules! actions {
    ($( $(#[doc = $doc:literal])+ $variant:ident($data:ty) = $wire:literal, )+) => {
        /// A part of a transaction.
        #[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
        #[serde(tag = "type", content = "data")]
        pub enum TransactionAction {
            $( $(#[doc = $doc])+ #[serde(rename = $wire)] $variant($data), )+
        }

        impl TransactionAction {
            /// Its name on the wire.
            pub fn name(&self) -> &'static str {
                match self { $( Self::$variant(_) => $wire, )+ }
            }
        }

        impl Qapi for TransactionAction {
            const TYPE: Type = Type::Union(&UnionInfo {
                name: "TransactionAction",
                doc: "A part of a transaction.",
                tag: "type",
                branches: &[$( Branch { value: $wire, members: &[data::<$data>()] }, )+],
            });
        }
    };
}

actions! {
    /// Fails.
    Abort(Abort) = "abort",
    /// As the command.
    BitmapAdd(BitmapAddArguments) = "block-dirty-bitmap-add",
    /// As the command.
    BitmapRemove(BitmapArguments) = "block-dirty-bitmap-remove",
    /// As the command.
    BitmapClear(BitmapArguments) = "block-dirty-bitmap-clear",
    /// As the command.
    BitmapEnable(BitmapArguments) = "block-dirty-bitmap-enable",
    /// As the command.
    BitmapDisable(BitmapArguments) = "block-dirty-bitmap-disable",
    /// As the command.
    BitmapMerge(BitmapMergeArguments) = "block-dirty-bitmap-merge",
    /// As the command.
    Backup(BackupArguments) = "blockdev-backup",
    /// As the command.
    DriveBackup(DriveBackupArguments) = "drive-backup",
    /// As the command.
    Snapshot(BlockdevSnapshot) = "blockdev-snapshot",
    /// As the command.
    SnapshotSync(BlockdevSnapshotSync) = "blockdev-snapshot-sync",
    /// As the command.
    InternalSnapshot(InternalSnapshotArguments) = "blockdev-snapshot-internal-sync",
    /// The machine's state, at the moment of the transaction.
    VmstateSave(VmstateSaveArguments) = "x-vmstate-save",
}

const fn data<T: Qapi>() -> Member {
    Member { name: "data", doc: "What the action needs.", ty: T::TYPE, optional: false }
}
