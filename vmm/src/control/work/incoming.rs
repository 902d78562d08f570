//! An incoming migration: `docs/migration.md` has the order.

use std::io::BufReader;

use qmp::schema::MigrationStatus;
use snapshot::stream::{StreamError, StreamReader};
use snapshot::{Lineage, SectionReader};
use tracing::{info, warn};

use super::migrate::Step;
use super::{Outcome, WorkContext, WorkError, WorkMessage};
use crate::machine::state::MachineState;
use crate::migration::input::{Input, Prepared};
use crate::migration::wait::Stopper;

/// Read at a time, in bytes.
const CHUNK: usize = 256 << 10;

/// A machine that has come, whose RAM and disks are in place.
pub struct Arrived {
    /// vCPUs and devices.
    pub state: MachineState,
    /// QMP's name of what the source was doing.
    pub doing: String,
}

/// What is to be done with a stream besides reading it.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Ends it.
    pub stopper: Stopper,
    /// The machines must have one UUID.
    pub same_uuid: bool,
}

pub(in crate::control) fn receive(
    from: Prepared,
    wanted: &Wanted,
    context: &WorkContext,
) -> Outcome {
    let failed = |error: std::io::Error| WorkError::Failed(error.to_string());
    let input = Input::open(from, wanted.stopper.clone()).map_err(failed)?;
    context.send(WorkMessage::Migration(Step::Status(MigrationStatus::Active)));
    let mut input = BufReader::with_capacity(CHUNK, input);
    let received = read(&mut input, wanted.same_uuid, context);
    let (state, doing, ancestors) = received.map_err(|error| match error {
        WorkError::Failed(text) => match input.get_mut().reason() {
            Some(reason) => WorkError::Failed(format!("{text}: {reason}")),
            None => WorkError::Failed(text),
        },
        cancelled => cancelled,
    })?;
    input.get_mut().finish().map_err(WorkError::Failed)?;
    // From here on the disks are this process's; the source has let go of them.
    context.graph.activate()?;
    let arrived = Box::new(Arrived { state, doing });
    let restored = context.ask(|reply| WorkMessage::Arrived { arrived, reply });
    if restored.is_err() {
        // Nothing was written yet.
        if let Err(error) = context.graph.inactivate() {
            warn!("the disks stay locked: {error}");
        }
        return restored;
    }
    context.lineage.set(ancestors);
    Ok(())
}

/// Reads and checks all of it, with RAM put in place.
fn read(
    input: &mut BufReader<Input>,
    same_uuid: bool,
    context: &WorkContext,
) -> Result<(MachineState, String, Lineage), WorkError> {
    let ends = input.get_ref().ends();
    let mut stream = StreamReader::open(input)?;
    let (saved, about) = (&stream.config().machine, &stream.config().about);
    let (blocking, told): (Vec<_>, Vec<_>) = context
        .config
        .differences_from_stream(saved)
        .into_iter()
        .partition(|one| one.is_blocking());
    if !blocking.is_empty() {
        let texts: Vec<_> = blocking.iter().map(ToString::to_string).collect();
        let text = format!("the stream is of another machine: {}", texts.join("; "));
        return Err(WorkError::Failed(text));
    }
    if same_uuid && saved.uuid != context.config.uuid {
        let text =
            format!("the UUIDs differ: '{}' there, '{}' here", saved.uuid, context.config.uuid);
        return Err(WorkError::Failed(text));
    }
    for difference in told {
        warn!("incoming migration: {difference}");
    }
    let lineage = match about.ancestors.split_first() {
        Some((nearest, older)) => Lineage::at(nearest.clone(), older),
        None => Lineage::default(),
    };
    let received = stream.receive(&context.memory, |_| {
        context.progress.check().map_err(|error| StreamError::Read(std::io::Error::other(error)))
    })?;
    if ends {
        stream.end()?;
    }
    let state = MachineState::from_sections(SectionReader::new(&received.sections), context.shape)?;
    info!("received {} pages in {} bytes", received.pages, received.bytes);
    Ok((state, received.state, lineage))
}
