//! Capabilities and parameters.

use std::time::Duration;

use qmp::schema::{MigrationCapability, MigrationCapabilityStatus, MigrationParameters, RunState};

use super::{IN_PROGRESS, generic};
use crate::control::Controller;
use crate::control::work::migrate::lock;

/// Longest `downtime-limit` in milliseconds, as in QEMU.
const MAX_DOWNTIME_MS: u64 = 2000 * 1000;

impl Controller {
    /// `migrate-set-capabilities`
    pub(in crate::control) fn set_capabilities(
        &mut self,
        given: &[MigrationCapabilityStatus],
    ) -> Result<(), qmp::Error> {
        // What waits for another machine may be told late, as in QEMU.
        if self.migration.is_active() && self.state != RunState::InMigrate {
            return Err(generic(IN_PROGRESS));
        }
        for MigrationCapabilityStatus { capability, state } in given {
            self.migration.capabilities.retain(|other| other != capability);
            if *state {
                self.migration.capabilities.push(*capability);
            }
        }
        Ok(())
    }

    /// `query-migrate-capabilities`
    pub(in crate::control) fn capabilities(&self) -> Vec<MigrationCapabilityStatus> {
        let of = |&capability: &MigrationCapability| MigrationCapabilityStatus {
            capability,
            state: self.migration.is_wanted(capability),
        };
        MigrationCapability::ALL.iter().map(of).collect()
    }

    /// `migrate-set-parameters`
    pub(in crate::control) fn set_parameters(
        &mut self,
        given: &MigrationParameters,
    ) -> Result<(), qmp::Error> {
        if given.downtime_limit.is_some_and(|limit| limit > MAX_DOWNTIME_MS) {
            let text = "Parameter 'downtime_limit' expects an integer in the range of 0 to \
                        (2000 * 1000) ms";
            return Err(generic(text));
        }
        let mut limits = lock(&self.migration.limits);
        limits.bandwidth = given.max_bandwidth.unwrap_or(limits.bandwidth);
        limits.switchover = given.avail_switchover_bandwidth.unwrap_or(limits.switchover);
        limits.downtime = given.downtime_limit.map_or(limits.downtime, Duration::from_millis);
        Ok(())
    }

    /// `query-migrate-parameters`
    pub(in crate::control) fn parameters(&self) -> MigrationParameters {
        let limits = *lock(&self.migration.limits);
        MigrationParameters {
            max_bandwidth: Some(limits.bandwidth),
            avail_switchover_bandwidth: Some(limits.switchover),
            downtime_limit: u64::try_from(limits.downtime.as_millis()).ok(),
        }
    }
}
