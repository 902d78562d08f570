//! A virtio device as its driver sees it, apart from the transport's register layout: status,
//! feature negotiation, queue set-up, and the machine's pause, state and restore.
//!
//! ```text
//!  status   0 ─> ACKNOWLEDGE ─> DRIVER ─> FEATURES_OK ─> DRIVER_OK ─> NEEDS_RESET
//!           ^                                  queues run here          │
//!           └──────────────── driver writes 0, or machine reset ────────┘
//! ```

use std::sync::Arc;

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use vmm_sys_util::eventfd::EventFd;

use super::error::{Error, Result, StateError};
use super::queue::RunningQueue;
use super::signals::{INTERRUPT_BITS, Signals};
use super::state::{QueueState, VirtioState};
use super::worker::{Positions, RunningQueues, Worker, new_event};
use super::{COMMON_FEATURES, VirtioDevice};
use crate::interrupt::signal;
use crate::{GuestMemory, InterruptLine};

/// Status bits that belong to the driver (section 2.1).
const DRIVER_STATUS: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_DRIVER_OK
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_FAILED;

/// A virtio device without its transport.
pub(super) struct VirtioCore {
    device: Box<dyn VirtioDevice>,
    mem: GuestMemory,
    signals: Arc<Signals>,
    kicks: Vec<EventFd>,
    worker: Worker,
    paused: bool,
    /// Without NEEDS_RESET, which is in `signals`.
    status: u32,
    driver_features: u64,
    config_generation: u32,
    /// Registers; the positions in them are right while nothing runs.
    queues: Vec<QueueState>,
}

impl VirtioCore {
    pub(super) fn new(
        device: Box<dyn VirtioDevice>,
        mem: GuestMemory,
        line: Arc<dyn InterruptLine>,
    ) -> Result<Self> {
        let sizes = device.queue_max_sizes();
        if let Some(&size) =
            sizes.iter().find(|s| !s.is_power_of_two() || **s > virtio_queue_limit())
        {
            return Err(Error::QueueSize { device: device.name().to_owned(), size });
        }
        let kicks =
            sizes.iter().map(|_| new_event()).collect::<std::io::Result<Vec<_>>>().map_err(
                |source| Error::Setup {
                    device: device.name().to_owned(),
                    what: "an eventfd",
                    source,
                },
            )?;
        let signals = Arc::new(Signals::new(line));
        let worker = Worker::start(device.as_ref(), mem.clone(), signals.clone(), &kicks)?;
        Ok(Self {
            queues: sizes.into_iter().map(QueueState::after_reset).collect(),
            device,
            mem,
            signals,
            kicks,
            worker,
            paused: false,
            status: 0,
            driver_features: 0,
            config_generation: 0,
        })
    }

    // What the driver reads.

    pub(super) fn device(&self) -> &dyn VirtioDevice {
        self.device.as_ref()
    }

    pub(super) fn offered_features(&self) -> u64 {
        self.device.device_features() | COMMON_FEATURES
    }

    pub(super) fn status(&self) -> u32 {
        if self.signals.needs_reset() {
            self.status | VIRTIO_CONFIG_S_NEEDS_RESET
        } else {
            self.status
        }
    }

    pub(super) fn interrupt_status(&self) -> u32 {
        self.signals.interrupt_status()
    }

    pub(super) fn config_generation(&self) -> u32 {
        self.config_generation
    }

    pub(super) fn queue(&self, index: u32) -> Option<&QueueState> {
        self.queues.get(usize::try_from(index).ok()?)
    }

    pub(super) fn queue_notify_fds(&self) -> &[EventFd] {
        &self.kicks
    }

    // What the driver writes.

    pub(super) fn acknowledge_interrupt(&self, bits: u32) {
        self.signals.acknowledge(bits);
    }

    pub(super) fn notify(&self, index: u32) {
        let fd = usize::try_from(index).ok().and_then(|i| self.kicks.get(i));
        match fd.map(signal) {
            Some(Ok(())) => {}
            Some(Err(error)) => tracing::error!(%error, "virtio: queue cannot be notified"),
            None => self.refuse("notification of a queue that is not there"),
        }
    }

    /// Writes 32 of the feature bits; `high` says which.
    pub(super) fn write_driver_features(&mut self, high: bool, value: u32) {
        let open = self.has(VIRTIO_CONFIG_S_DRIVER) && !self.has(VIRTIO_CONFIG_S_FEATURES_OK);
        if !open {
            return self.refuse("features written outside negotiation");
        }
        set_half(&mut self.driver_features, high, value);
    }

    /// The queue of that index, as long as its registers may be written.
    pub(super) fn queue_to_set_up(&mut self, index: u32) -> Option<&mut QueueState> {
        let found =
            usize::try_from(index).ok().and_then(|i| self.queues.get(i)).is_some_and(|q| !q.ready);
        if !found {
            self.refuse("set-up of a queue that is in use or not there");
            return None;
        }
        self.queues.get_mut(usize::try_from(index).ok()?)
    }

    /// QueueReady. Taking a queue out of use waits for the request it is in (section 4.2.2.2).
    pub(super) fn write_queue_ready(&mut self, index: u32, ready: bool) {
        let running = self.has(VIRTIO_CONFIG_S_DRIVER_OK);
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        let Some(queue) = self.queues.get_mut(index) else {
            return self.refuse("QueueReady of a queue that is not there");
        };
        if ready == queue.ready {
            return;
        }
        if ready && running {
            // Queues are set up before DRIVER_OK (section 3.1.1).
            return self.refuse("QueueReady after DRIVER_OK");
        }
        queue.ready = ready;
        if !ready {
            queue.next_avail = 0;
            queue.next_used = 0;
            queue.held.clear();
        }
        if running && let Err(error) = self.worker.stop_queue(index) {
            self.give_up(&error);
        }
    }

    /// The status register. Zero resets the device and waits for the request it is in.
    pub(super) fn write_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let value = value & DRIVER_STATUS;
        if value & self.status != self.status {
            return self.refuse("status bits cleared without a reset");
        }
        let mut new = value & !self.status;
        if new & VIRTIO_CONFIG_S_FEATURES_OK != 0
            && !(value & VIRTIO_CONFIG_S_DRIVER != 0 && self.features_are_good())
        {
            self.refuse("features that are not offered, or no VERSION_1");
            new &= !VIRTIO_CONFIG_S_FEATURES_OK;
        }
        if new & VIRTIO_CONFIG_S_DRIVER_OK != 0
            && (self.status | new) & VIRTIO_CONFIG_S_FEATURES_OK == 0
        {
            self.refuse("DRIVER_OK before FEATURES_OK");
            new &= !VIRTIO_CONFIG_S_DRIVER_OK;
        }
        self.status |= new;
        if new & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.activate();
        }
    }

    fn activate(&mut self) {
        match self.running_queues(&self.queues, self.driver_features) {
            Ok(queues) => {
                if let Err(error) = self.worker.activate(queues, self.driver_features) {
                    self.give_up(&error);
                }
            }
            Err(error) => {
                tracing::warn!(
                    device = self.device.name(),
                    %error,
                    "driver broke a rule, device needs reset"
                );
                self.signals.needs_reset_now();
            }
        }
    }

    fn running_queues(
        &self,
        states: &[QueueState],
        features: u64,
    ) -> std::result::Result<RunningQueues, StateError> {
        let build = |(index, state): (usize, &QueueState)| {
            if !state.ready {
                return Ok(None);
            }
            RunningQueue::new(state, features, &self.mem)
                .map(Some)
                .map_err(|e| StateError::Queue { index, reason: e.to_string() })
        };
        states.iter().enumerate().map(build).collect()
    }

    /// Everything as at power-on. The device stays paused if it is.
    pub(super) fn reset(&mut self) {
        if let Err(error) = self.worker.deactivate() {
            return self.give_up(&error);
        }
        self.status = 0;
        self.driver_features = 0;
        self.config_generation = 0;
        self.signals.set(0, false);
        for queue in &mut self.queues {
            *queue = QueueState::after_reset(queue.max_size);
        }
    }

    // What the machine asks.

    pub(super) fn pause(&mut self) -> Result<()> {
        if !self.paused {
            let positions = self.worker.pause()?;
            self.take_positions(&positions);
            self.paused = true;
        }
        Ok(())
    }

    pub(super) fn resume(&mut self) -> Result<()> {
        if self.paused {
            self.signals.raise_again();
            self.worker.resume()?;
            self.paused = false;
        }
        Ok(())
    }

    /// As [`Self::resume`], of a device that the machine did not pause: what is held is served again.
    pub(super) fn retry(&mut self) -> Result<()> {
        if self.paused { self.resume() } else { self.worker.resume() }
    }

    /// What the device waits for may have changed.
    pub(super) fn look(&self) -> Result<()> {
        self.worker.look()
    }

    /// What the configuration space tells may have changed: if it has, the driver is told.
    pub(super) fn refresh_config(&mut self) {
        if !self.device.refresh_config() {
            return;
        }
        self.config_generation = self.config_generation.wrapping_add(1);
        // No notification before the driver is ready (section 3.1.1).
        if self.has(VIRTIO_CONFIG_S_DRIVER_OK) {
            self.signals.config_changed();
        }
    }

    fn take_positions(&mut self, positions: &Positions) {
        for (queue, position) in self.queues.iter_mut().zip(positions) {
            if let Some(position) = position {
                queue.next_avail = position.next_avail;
                queue.next_used = position.next_used;
                queue.held.clone_from(&position.held);
            }
        }
    }

    pub(super) fn state(&self) -> Result<VirtioState> {
        if !self.paused {
            return Err(Error::NotPaused { device: self.device.name().to_owned() });
        }
        Ok(VirtioState {
            device_type: self.device.device_type(),
            driver_features: self.driver_features,
            status: self.status(),
            interrupt_status: self.interrupt_status(),
            config_generation: self.config_generation,
            queues: self.queues.clone(),
            device: self.device.state(),
        })
    }

    /// Takes over a saved state and stays paused. A refused state changes nothing but the pause.
    pub(super) fn restore(&mut self, state: &VirtioState) -> Result<()> {
        let queues = self
            .check(state)
            .map_err(|source| Error::State { device: self.device.name().to_owned(), source })?;
        self.pause()?;
        self.worker.deactivate()?;
        // The guest with this state was told it, or has not asked yet.
        self.device.refresh_config();
        self.status = state.status & DRIVER_STATUS;
        self.driver_features = state.driver_features;
        self.config_generation = state.config_generation;
        self.queues.clone_from(&state.queues);
        self.signals.set(state.interrupt_status, state.status & VIRTIO_CONFIG_S_NEEDS_RESET != 0);
        match queues {
            Some(queues) => self.worker.activate(queues, state.driver_features),
            None => Ok(()),
        }
    }

    /// Whether the state fits this device; the queues to run, if it was running.
    fn check(&self, state: &VirtioState) -> std::result::Result<Option<RunningQueues>, StateError> {
        StateError::unless_equal("device type", &state.device_type, &self.device.device_type())?;
        // At power-on nobody has been told anything.
        if state.status != 0 {
            self.device.check_state(&state.device)?;
        }
        StateError::unless_equal("number of queues", &state.queues.len(), &self.queues.len())?;
        for (saved, present) in state.queues.iter().zip(&self.queues) {
            StateError::unless_equal("largest queue size", &saved.max_size, &present.max_size)?;
        }
        if state.interrupt_status & !INTERRUPT_BITS != 0 {
            return Err(StateError::InterruptStatus(state.interrupt_status));
        }
        let has = |bit| state.status & bit != 0;
        let known = state.status & !(DRIVER_STATUS | VIRTIO_CONFIG_S_NEEDS_RESET) == 0;
        let driver_ok = has(VIRTIO_CONFIG_S_DRIVER_OK);
        let needs_reset = has(VIRTIO_CONFIG_S_NEEDS_RESET);
        if !known || driver_ok && !has(VIRTIO_CONFIG_S_FEATURES_OK) || needs_reset && !driver_ok {
            return Err(StateError::Status(state.status));
        }
        if has(VIRTIO_CONFIG_S_FEATURES_OK) {
            self.check_features(state.driver_features)?;
        }
        if driver_ok && !needs_reset {
            return self.running_queues(&state.queues, state.driver_features).map(Some);
        }
        Ok(None)
    }

    /// Ends the thread after a flush. The device can do nothing afterwards.
    pub(super) fn shutdown(&mut self) -> Result<()> {
        self.worker.stop()
    }

    // Helpers.

    fn has(&self, bit: u32) -> bool {
        self.status & bit != 0
    }

    fn features_are_good(&self) -> bool {
        self.check_features(self.driver_features).is_ok()
    }

    fn check_features(&self, features: u64) -> std::result::Result<(), StateError> {
        let foreign = features & !self.offered_features();
        if foreign != 0 || features & (1 << VIRTIO_F_VERSION_1) == 0 {
            return Err(StateError::Features(features));
        }
        Ok(())
    }

    /// A register access that the specification forbids has no effect.
    pub(super) fn refuse(&self, what: &str) {
        tracing::debug!(device = self.device.name(), "driver: {what}; ignored");
    }

    /// The device's thread is gone, which only a defect of ours can cause.
    fn give_up(&self, error: &Error) {
        tracing::error!(%error, "device is lost");
        self.signals.needs_reset_now();
    }
}

/// Replaces one half of a register that drivers write in two.
pub(super) fn set_half(register: &mut u64, high: bool, value: u32) {
    let value = u64::from(value);
    *register =
        if high { *register & 0xffff_ffff | value << 32 } else { *register & !0xffff_ffff | value };
}

const fn virtio_queue_limit() -> u16 {
    // Section 2.7: a split queue has 32768 descriptors at most.
    32768
}
