//! What `query-migrate` tells.

use std::time::Duration;

use qmp::schema::{MigrationInfo, MigrationSocket, MigrationStats, MigrationStatus};

use super::Last;
use crate::control::Controller;
use crate::control::work::migrate::{Numbers, rate};

fn milliseconds(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}

impl Controller {
    /// `query-migrate`
    pub(in crate::control) fn migration_info(&self) -> MigrationInfo {
        let mut info = MigrationInfo {
            status: None,
            ram: None,
            total_time: None,
            expected_downtime: None,
            downtime: None,
            setup_time: None,
            error_desc: None,
            socket_address: None,
        };
        let Some(last) = &self.migration.last else { return info };
        info.status = Some(last.status);
        info.error_desc.clone_from(&last.error);
        if !last.outgoing {
            let waits = last.status == MigrationStatus::Setup;
            info.socket_address = last
                .socket
                .as_ref()
                .filter(|_| waits)
                .map(|path| vec![MigrationSocket::Unix { path: path.display().to_string() }]);
            return info;
        }
        let told = matches!(
            last.status,
            MigrationStatus::Active
                | MigrationStatus::Device
                | MigrationStatus::Cancelling
                | MigrationStatus::Completed
        );
        if !told {
            return info;
        }
        let numbers = last.shared.numbers();
        info.total_time = Some(milliseconds(last.total.unwrap_or(last.began.elapsed())));
        info.setup_time = last.setup.map(milliseconds);
        if last.status == MigrationStatus::Completed {
            info.downtime = last.downtime.map(milliseconds);
        } else {
            let expected = numbers.expected_pause.unwrap_or(last.shared.limits().downtime);
            info.expected_downtime = Some(milliseconds(expected));
        }
        info.ram = Some(self.statistics(last, numbers));
        info
    }

    fn statistics(&self, last: &Last, numbers: Numbers) -> MigrationStats {
        let sent = numbers.sent;
        let time = last.total.unwrap_or(last.began.elapsed());
        let time = time.saturating_sub(last.setup.unwrap_or_default());
        MigrationStats {
            transferred: sent.bytes,
            remaining: numbers.remaining,
            total: self.machine.spec().ram_bytes,
            duplicate: sent.zero,
            normal: sent.pages,
            normal_bytes: sent.pages * snapshot::PAGE_SIZE,
            dirty_pages_rate: numbers.dirty_rate,
            mbps: rate(sent.bytes * 8, time) as f64 / 1e6,
            dirty_sync_count: numbers.rounds,
            postcopy_requests: 0,
            page_size: snapshot::PAGE_SIZE,
            multifd_bytes: 0,
            pages_per_second: rate(sent.pages + sent.zero, time),
            precopy_bytes: sent.bytes.saturating_sub(numbers.in_pause),
            downtime_bytes: numbers.in_pause,
            postcopy_bytes: 0,
            dirty_sync_missed_zero_copy: 0,
        }
    }
}
