//! [`Storage`](super::Storage) and [`Folder`](super::Folder) in memory, with a power supply that can be cut.
//!
//! Every file and folder of one [`Power`] shares its fate. Each changing call (write, zero, set length, sync, create,
//! rename, remove) is one step; [`Power::cut_after`] lets a number of steps happen and fails every later one, and
//! [`Power::restore`] then throws away what was not synced: of the unsynced steps any subset is kept, writes torn at
//! 512 bytes, as the given choice says. That is exactly what the crash contract of [`super`] allows.
//!
//! Where every outcome is wanted instead of one, a [`Recorder`] remembers the calls of one run, and each [`Cut`] of it
//! makes any image that a power cut at that instant may leave.

mod content;
mod file;
mod folder;
mod recorder;

use std::{
    io,
    sync::{Arc, Weak},
};

use parking_lot::Mutex;

pub use file::MemoryStorage;
pub use folder::MemoryFolder;
pub use recorder::{Cut, Fate, Recorder, Replay};

/// Decides, for each unsynced sector, name or length in turn, whether it reached the platter.
pub type Choice<'a> = dyn FnMut() -> bool + 'a;

/// The power supply of some files and folders, and the place where calls are made to fail.
#[derive(Debug, Default)]
pub struct Power(Mutex<PowerState>);

#[derive(Debug, Default)]
struct PowerState {
    steps: u64,
    /// Steps after which every call fails.
    cut_at: Option<u64>,
    /// The step that fails once, and how.
    fail_at: Option<(u64, io::ErrorKind)>,
    files: Vec<Weak<MemoryStorage>>,
    folders: Vec<Weak<MemoryFolder>>,
}

impl Power {
    /// A supply that is on.
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// Changing calls so far.
    pub fn steps(&self) -> u64 {
        self.0.lock().steps
    }

    /// Lets `steps` more changing calls happen; every call after them fails.
    pub fn cut_after(&self, steps: u64) {
        let mut state = self.0.lock();
        state.cut_at = Some(state.steps + steps);
    }

    /// Lets `steps` more changing calls happen and fails the one after them once.
    pub fn fail_after(&self, steps: u64, kind: io::ErrorKind) {
        let mut state = self.0.lock();
        state.fail_at = Some((state.steps + steps, kind));
    }

    /// Turns the power on again: what was synced is there, of the rest what `kept` says.
    pub fn restore(&self, kept: &mut Choice<'_>) {
        let mut state = self.0.lock();
        state.cut_at = None;
        state.fail_at = None;
        for folder in state.folders.iter().filter_map(Weak::upgrade) {
            folder.lose(kept);
        }
        for file in state.files.iter().filter_map(Weak::upgrade) {
            file.lose(kept);
        }
    }

    fn alive(&self) -> io::Result<()> {
        let state = self.0.lock();
        match state.cut_at {
            Some(cut) if state.steps >= cut => Err(io::Error::other("the power is off")),
            _ => Ok(()),
        }
    }

    fn step(&self) -> io::Result<()> {
        self.alive()?;
        let mut state = self.0.lock();
        let step = state.steps;
        state.steps += 1;
        match state.fail_at {
            Some((at, kind)) if at == step => {
                state.fail_at = None;
                Err(kind.into())
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{Folder, Fua, Open, Storage};

    #[test]
    fn a_forced_write_is_not_undone_by_an_older_one() {
        for keep in [false, true] {
            let power = Power::new();
            let file = MemoryStorage::new(&power);
            file.write_at(0, &[1; 1024], Fua::No).unwrap();
            file.write_at(0, &[2; 512], Fua::Yes).unwrap();
            power.restore(&mut || keep);
            assert_eq!(file.bytes()[..512], [2; 512]);
            file.write_at(0, &[3; 512], Fua::No).unwrap();
            file.write_at(0, &[4; 512], Fua::Yes).unwrap();
            file.sync().unwrap();
            power.restore(&mut || keep);
            assert_eq!(file.bytes()[..512], [4; 512]);
        }
    }

    #[test]
    fn a_power_cut_keeps_what_was_synced_and_any_subset_of_the_rest() {
        let power = Power::new();
        let folder = MemoryFolder::new(&power);
        let file = folder.open("a", Open::CreateNew).unwrap();
        file.write_at(0, &[1; 1024], Fua::No).unwrap();
        file.sync().unwrap();
        folder.sync().unwrap();
        file.write_at(0, &[2; 1024], Fua::No).unwrap();
        file.write_at(1024, &[3; 512], Fua::Yes).unwrap();
        folder.rename("a", "b").unwrap();
        power.cut_after(0);
        assert!(file.sync().is_err(), "a dead file takes no calls");

        // The rename is lost, of the torn write only the second sector arrives.
        let mut choices = [false, false, true].into_iter();
        power.restore(&mut || choices.next().unwrap());
        let file = folder.open("a", Open::Read).unwrap();
        let mut bytes = [0; 1536];
        file.read_at(0, &mut bytes).unwrap();
        assert_eq!(bytes[..512], [1; 512]);
        assert_eq!(bytes[512..1024], [2; 512]);
        assert_eq!(bytes[1024..], [3; 512]);
    }

    #[test]
    fn one_failed_step_is_not_the_end() {
        let power = Power::new();
        let file = MemoryStorage::new(&power);
        power.fail_after(1, io::ErrorKind::StorageFull);
        file.write_at(0, &[1], Fua::No).unwrap();
        assert_eq!(
            file.write_at(0, &[2], Fua::No).unwrap_err().kind(),
            io::ErrorKind::StorageFull
        );
        file.write_at(0, &[3], Fua::No).unwrap();
        assert_eq!(file.bytes(), [3]);
    }
}
