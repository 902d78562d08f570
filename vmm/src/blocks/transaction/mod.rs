//! `transaction`: several actions at one moment, all of them or none. The order of steps is
//! [`qmp::transaction`]'s; here is what the actions do.

mod backup;
mod bitmaps;
mod external;
mod snapshots;

use std::sync::Arc;

use block::Format;
use qmp::jobs::GroupId;
use qmp::schema::{ActionCompletionMode, TransactionAction, TransactionArguments};
use qmp::transaction::{self, Action};

use self::backup::{Backup, DriveBackup};
use self::bitmaps::{BitmapAction, Change};
use self::external::{External, Which};
use self::snapshots::InternalSnapshot;
use super::{Answer, Blocks, done, text};

pub use self::snapshots::Moment;

/// What actions borrow from: it outlives them.
pub struct Resources {
    /// The images of internal snapshots, by the action's place.
    formats: Vec<Option<Arc<dyn Format>>>,
    moment: Moment,
    /// Where the jobs end together.
    group: Option<GroupId>,
}

impl Resources {
    /// What these actions need.
    pub fn new(blocks: &Blocks, actions: &[TransactionAction]) -> Self {
        let format = |action: &TransactionAction| match action {
            TransactionAction::InternalSnapshot(arguments) => {
                blocks.graph().get(&arguments.device).map(|node| node.format())
            }
            _ => None,
        };
        let formats = actions.iter().map(format).collect();
        Self { formats, moment: Moment::now(), group: None }
    }
}

impl Blocks {
    /// Carries out a transaction without the machine.
    pub(super) fn transaction(&self, arguments: &TransactionArguments) -> Answer {
        check_mode(arguments)?;
        let mut resources = Resources::new(self, &arguments.actions);
        if is_grouped(arguments) {
            resources.group = Some(self.jobs().lock().new_group());
        }
        let mut actions = self.actions(&arguments.actions, &resources);
        transaction::run(&mut actions, || Ok(self.graph().hold_all()))?;
        done()
    }

    /// The actions, nothing done yet.
    pub fn actions<'a>(
        &'a self,
        actions: &'a [TransactionAction],
        resources: &'a Resources,
    ) -> Vec<Box<dyn Action + 'a>> {
        let all = actions.iter().zip(&resources.formats);
        all.map(|(action, format)| self.action(action, format.as_ref(), resources)).collect()
    }

    fn action<'a>(
        &'a self,
        action: &'a TransactionAction,
        format: Option<&'a Arc<dyn Format>>,
        resources: &'a Resources,
    ) -> Box<dyn Action + 'a> {
        use TransactionAction as A;
        let change = match action {
            A::Abort(_) => return Box::new(Fails("Transaction aborted using Abort action")),
            // With a machine the main thread carries it out, and it does not come here.
            A::VmstateSave(_) => return Box::new(Fails("There is no machine to be saved")),
            A::InternalSnapshot(arguments) => {
                let moment = &resources.moment;
                return Box::new(InternalSnapshot::new(self, arguments, format, moment));
            }
            A::Backup(arguments) => {
                return Box::new(Backup::new(self, arguments, resources.group));
            }
            A::DriveBackup(arguments) => {
                return Box::new(DriveBackup::new(self, arguments, resources.group));
            }
            A::Snapshot(arguments) => {
                return Box::new(External::new(self, Which::Node(arguments)));
            }
            A::SnapshotSync(arguments) => {
                return Box::new(External::new(self, Which::File(arguments)));
            }
            A::BitmapAdd(arguments) => Change::Add(arguments),
            A::BitmapRemove(arguments) => Change::Remove(arguments),
            A::BitmapClear(arguments) => Change::Clear(arguments),
            A::BitmapEnable(arguments) => Change::Enable(arguments, true),
            A::BitmapDisable(arguments) => Change::Enable(arguments, false),
            A::BitmapMerge(arguments) => Change::Merge(arguments),
        };
        Box::new(BitmapAction::new(self, change))
    }
}

fn is_grouped(arguments: &TransactionArguments) -> bool {
    let mode = arguments.properties.as_ref().and_then(|properties| properties.completion_mode);
    mode == Some(ActionCompletionMode::Grouped)
}

/// Refuses actions whose outcome cannot wait for others.
///
/// # Errors
/// With QEMU's text.
pub fn check_mode(arguments: &TransactionArguments) -> Result<(), qmp::Error> {
    if !is_grouped(arguments) {
        return Ok(());
    }
    let other = |action: &&TransactionAction| {
        !matches!(action, TransactionAction::Backup(_) | TransactionAction::DriveBackup(_))
    };
    match arguments.actions.iter().find(other) {
        Some(action) => Err(text(format!(
            "Action '{}' does not support transaction property completion-mode = grouped",
            action.name()
        ))),
        None => Ok(()),
    }
}

/// An action that fails.
struct Fails(&'static str);

impl Action for Fails {
    fn lets_go_early(&self) -> bool {
        true
    }

    fn prepare(&mut self) -> Result<(), qmp::Error> {
        Err(text(self.0))
    }
}
