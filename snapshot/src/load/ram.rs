//! RAM of a checkpoint: comparing it with the machine's, and reading it, at once or when it is needed.

use std::sync::Arc;

use block::Progress;

use super::open::unreadable;
use super::{Checkpoint, Found, LoadError};
use crate::GuestMemory;
use crate::config::{Difference, MachineConfig};
use crate::fault::{LazyHost, LazyRam, Notify, Orders, Source, Units};
use crate::memory;
use crate::revive::{ReviveReport, Stored, revive, stored_parts};
use crate::units::human;

impl Checkpoint {
    /// Refuses a machine on which the saved guest would notice a difference, naming each, and a
    /// checkpoint whose RAM is not mapped soundly. Returns the differences that it would not notice.
    pub fn check_machine(
        &self,
        machine: &MachineConfig,
        ram: &GuestMemory,
    ) -> Result<Vec<Difference>, LoadError> {
        let differences = self.config.differences(machine);
        let (differences, notes): (Vec<_>, Vec<_>) =
            differences.into_iter().partition(Difference::is_blocking);
        if !differences.is_empty() {
            return Err(LoadError::Configuration { tag: self.tag.clone(), differences });
        }
        self.stored(ram)?;
        Ok(notes)
    }

    /// Makes guest RAM what it was. `fresh` memory was never written since it was mapped; other
    /// memory is cleared where the checkpoint has nothing. The vCPUs are stopped meanwhile.
    pub fn read_ram(
        &self,
        ram: &GuestMemory,
        fresh: bool,
        threads: usize,
        progress: &Progress,
    ) -> Result<ReviveReport, LoadError> {
        let stored = self.stored(ram)?;
        let failed = |source| self.unread(source);
        progress.add_total(self.area.layout.ram_bytes());
        let vmstate = self.carrier().open().map_err(failed)?;
        revive(&*vmstate, stored, &self.area.layout, &memory::slices(ram), fresh, threads, progress)
            .map_err(failed)
    }

    /// Empties guest RAM, unless it is `fresh` as for [`Checkpoint::read_ram`], and has its pages
    /// read when they are needed, and ahead of that in the order that `orders` has. The vCPUs are stopped, and the devices' threads too, until this
    /// returns.
    pub fn lend_ram(
        &self,
        host: LazyHost,
        ram: &GuestMemory,
        fresh: bool,
        orders: &Arc<Orders>,
        notify: Notify,
    ) -> Result<LazyRam, LoadError> {
        let units = Units::new(ram, &self.area.layout, self.stored(ram)?);
        LazyRam::start(host, self.source(orders), units, ram, fresh, notify)
            .map_err(|source| self.unread(source))
    }

    /// Where RAM is read from, and in which order ahead.
    pub(crate) fn source(&self, orders: &Arc<Orders>) -> Source {
        let Found { format, snapshot, .. } = self.carrier();
        Source {
            format: format.clone(),
            id: snapshot.id.clone(),
            base: self.base(),
            orders: orders.clone(),
        }
    }

    pub(crate) fn unread(&self, source: block::Error) -> LoadError {
        match source {
            block::Error::Cancelled => LoadError::Cancelled,
            source => LoadError::Ram {
                tag: self.tag.clone(),
                node: self.carrier().node.name().to_owned(),
                source,
            },
        }
    }

    /// What the image stores of RAM, which must be laid out as `ram` is.
    pub(crate) fn stored(&self, ram: &GuestMemory) -> Result<&[Stored], LoadError> {
        self.check_ram(ram)?;
        if let Some(stored) = self.stored.get() {
            return Ok(stored);
        }
        let node = self.carrier().node.name().to_owned();
        let unusable = |source| {
            let source = unreadable("the mapping of RAM")(source);
            LoadError::State { tag: self.tag.clone(), node, source }
        };
        let vmstate = self.carrier().open();
        let stored = vmstate.and_then(|vmstate| stored_parts(&*vmstate, &self.area.layout));
        let stored = stored.map_err(unusable)?;
        Ok(self.stored.get_or_init(|| stored))
    }

    /// Guest memory has the regions that were saved.
    fn check_ram(&self, ram: &GuestMemory) -> Result<(), LoadError> {
        let layout = &self.area.layout;
        let here = memory::ranges(ram);
        let saved = layout.regions().iter().map(|region| (region.start, region.len));
        if here.iter().copied().eq(saved) {
            return Ok(());
        }
        let list = |regions: &mut dyn Iterator<Item = (u64, u64)>| {
            let text = |(start, len)| format!("{} at {start:#x}", human(len));
            regions.map(text).collect::<Vec<_>>().join(", ")
        };
        let saved = list(&mut layout.regions().iter().map(|r| (r.start.0, r.len)));
        let here = list(&mut here.iter().map(|(start, len)| (start.0, *len)));
        let text = format!("RAM regions: the checkpoint has {saved}, this machine {here}");
        Err(LoadError::Configuration {
            tag: self.tag.clone(),
            differences: vec![Difference::blocking(text)],
        })
    }
}
