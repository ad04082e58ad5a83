//! Which recovery points are being looked at.

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::Mutex;

use crate::base::units::Epoch;

/// Points that views are open on: a merge never goes beyond the oldest.
#[derive(Debug, Default)]
pub(super) struct Pins(Mutex<BTreeMap<Epoch, usize>>);

/// One open view's claim.
#[derive(Debug)]
pub(super) struct Pin {
    pins: Arc<Pins>,
    epoch: Epoch,
}

impl Pins {
    pub(super) fn pin(self: &Arc<Self>, epoch: Epoch) -> Pin {
        *self.0.lock().entry(epoch).or_default() += 1;
        Pin {
            pins: Arc::clone(self),
            epoch,
        }
    }

    pub(super) fn oldest(&self) -> Option<Epoch> {
        self.0.lock().keys().next().copied()
    }

    /// Whether `epoch` is in use.
    pub(super) fn holds(&self, epoch: Epoch) -> bool {
        self.0.lock().contains_key(&epoch)
    }

    /// A point in use other than `epoch`.
    pub(super) fn other_than(&self, epoch: Epoch) -> Option<Epoch> {
        let pins = self.0.lock();
        pins.keys().copied().find(|&pinned| pinned != epoch)
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut pins = self.pins.0.lock();
        if let Some(count) = pins.get_mut(&self.epoch) {
            *count -= 1;
            if *count == 0 {
                pins.remove(&self.epoch);
            }
        }
    }
}
