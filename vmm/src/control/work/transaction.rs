//! A transaction with the machine's state in it: `docs/jobs.md` has the order.

use block::Graph;
use qmp::schema::{TransactionAction, TransactionArguments, VmstateSaveArguments};
use qmp::transaction::{self, Action};
use snapshot::About;

use super::save::{self, Point};
use super::{Outcome, SaveMode, SaveOptions, Target, WorkContext, WorkError, WorkMessage};
use crate::blocks::transaction::Resources;

pub(super) fn run(
    arguments: &TransactionArguments,
    about: About,
    context: &WorkContext,
) -> Outcome {
    let (state, joined, others) = split(&arguments.actions)?;
    let devices = std::iter::once(state.node.clone()).chain(joined).collect();
    let target = Target { tag: state.tag.clone(), vmstate: state.node.clone(), devices };
    // What can be told at once is told before anything else is begun.
    let nodes = context.resolve(&target.devices)?;
    snapshot::preflight_save(&nodes, &target.vmstate, &target.tag)?;
    let resources = Resources::new(&context.blocks, &others);
    let mut actions = context.blocks.actions(&others, &resources);
    transaction::prepare_all(&mut actions, || Ok(context.graph.hold_all())).map_err(refused)?;
    let early = state.job_id.is_some();
    let mut together = Together { context, actions, early, ended: false };
    let how = SaveOptions { mode: SaveMode::Live, compress: None };
    save::save(&target, how, about, context, &mut together)
}

/// The machine's state, the nodes whose snapshots belong to its checkpoint, and everything else.
type Parts<'a> = (&'a VmstateSaveArguments, Vec<String>, Vec<TransactionAction>);

fn split(actions: &[TransactionAction]) -> Result<Parts<'_>, WorkError> {
    let mut states = actions.iter().filter_map(|action| match action {
        TransactionAction::VmstateSave(arguments) => Some(arguments),
        _ => None,
    });
    let (Some(state), None) = (states.next(), states.next()) else {
        let text = "A transaction has one x-vmstate-save at most";
        return Err(WorkError::Failed(text.to_owned()));
    };
    let (mut joined, mut others) = (Vec::new(), Vec::new());
    for action in actions {
        match action {
            TransactionAction::VmstateSave(_) => {}
            TransactionAction::InternalSnapshot(snapshot) if snapshot.name == state.tag => {
                // The checkpoint makes the one of the node that keeps the state anyway.
                if snapshot.device != state.node {
                    joined.push(snapshot.device.clone());
                }
            }
            other => others.push(other.clone()),
        }
    }
    Ok((state, joined, others))
}

/// The other actions, done at the moment of the save.
struct Together<'a> {
    context: &'a WorkContext,
    actions: Vec<Box<dyn Action + 'a>>,
    /// The client is answered once the moment has passed.
    early: bool,
    /// The actions are committed or aborted.
    ended: bool,
}

impl Point for Together<'_> {
    fn switch(&mut self, switch: &mut dyn FnMut() -> Outcome) -> Outcome {
        let graph: &Graph = &self.context.graph;
        // The guest stands still already; exports and jobs do now.
        let held = graph.hold_all();
        // A step that fails has aborted all actions.
        self.ended = true;
        transaction::each(&mut self.actions, |action| action.point()).map_err(refused)?;
        if let Err(error) = switch() {
            transaction::abort(&mut self.actions);
            return Err(error);
        }
        // What is not part of the checkpoint counts from here on, whatever becomes of the checkpoint.
        transaction::each(&mut self.actions, |action| action.secure()).map_err(refused)?;
        transaction::each(&mut self.actions, |action| action.publish()).map_err(refused)?;
        for action in self.actions.iter_mut().rev() {
            action.commit();
        }
        drop(held);
        for action in self.actions.iter_mut().rev() {
            action.released();
        }
        Ok(())
    }

    fn passed(&mut self) {
        if self.early {
            self.context.send(WorkMessage::Passed);
        }
    }
}

impl Drop for Together<'_> {
    fn drop(&mut self) {
        if !self.ended {
            transaction::abort(&mut self.actions);
        }
    }
}

fn refused(error: qmp::Error) -> WorkError {
    WorkError::Failed(error.desc)
}
