//! snapshot-save: the guest stands still while RAM and disks are saved.

use std::time::{SystemTime, UNIX_EPOCH};

use snapshot::{About, Lineage, SaveRequest, Stamp};
use tracing::info;

use super::{Freeze, Frozen, IO_THREADS, Outcome, Target, WorkContext, WorkError};

pub(super) fn save(target: Target, about: About, context: &WorkContext) -> Outcome {
    let Target { tag, vmstate, devices } = target;
    let nodes = context.resolve(&devices)?;
    snapshot::preflight_save(&nodes, &vmstate, &tag)?;
    // A page that is not there would be taken for one of zeroes.
    context.read_missing()?;
    let Frozen { state } = context.freeze(Freeze::Save)?;
    let stamp = stamp(tag, state.clock.kvmclock_ns);
    let ancestors = context.lineage.get();
    let about = About { ancestors: ancestors.stamps().to_vec(), ..about };
    let request = SaveRequest {
        nodes: &nodes,
        vmstate: &vmstate,
        stamp: stamp.clone(),
        about,
        config: &context.config,
        sections: state.to_sections()?,
        ram: &context.memory,
        progress: &context.progress,
        threads: IO_THREADS,
    };
    match snapshot::save(request) {
        Ok(report) => {
            info!("saved {report:?}");
            context.lineage.set(Lineage::at(stamp, ancestors.stamps()));
            Ok(())
        }
        Err(snapshot::SaveError::Cancelled) => Err(WorkError::Cancelled),
        Err(error) => Err(error.into()),
    }
}

/// Date and clock of a checkpoint: microseconds, as QEMU's.
fn stamp(tag: String, vm_clock_nsec: u64) -> Stamp {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Stamp {
        tag,
        date_sec: u32::try_from(now.as_secs()).unwrap_or(u32::MAX),
        date_nsec: now.subsec_micros() * 1000,
        vm_clock_nsec,
    }
}
