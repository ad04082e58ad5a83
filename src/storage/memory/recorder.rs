//! Every image that a power cut may leave, from one run.
//!
//! What reaches the platter matters only at the instants before something becomes durable for certain: earlier cuts
//! leave a subset of what these leave. So there is one [`Cut`] before each sync, one at each write with forced unit
//! access, and one at the end, and each makes the image for any choice of its unsynced changes. Files whose power is cut
//! together are played again side by side: a [`Replay`] makes a cut at any instant.

use std::{io, sync::Arc};

use parking_lot::Mutex;

use super::{
    super::{Fua, Space, Storage},
    MemoryStorage,
    content::{Bytes, Change, pieces},
};
use crate::base::units::Extent;

/// A file in memory that remembers its changes.
#[derive(Debug)]
pub struct Recorder {
    file: Arc<MemoryStorage>,
    start: Bytes,
    steps: Mutex<Vec<Step>>,
}

#[derive(Debug)]
enum Step {
    Change(Change),
    /// A sync that had begun after so many steps: what was changed while it was under way is not durable by it.
    Sync {
        begun: usize,
    },
}

/// A recording that is played again, call by call.
#[derive(Debug)]
pub struct Replay<'a> {
    recorder: &'a Recorder,
    step: usize,
    durable: Bytes,
    pending: Vec<Pending>,
}

/// An instant at which the power may be cut, and what was not durable then.
#[derive(Debug)]
pub struct Cut {
    /// Changing calls, syncs included, that had returned.
    pub step: usize,
    durable: Bytes,
    pending: Vec<Pending>,
}

#[derive(Clone, Debug)]
struct Pending {
    /// Its number among the calls.
    step: usize,
    change: Change,
    /// Forced, and it had returned: it is there whatever becomes of older changes.
    certain: bool,
}

/// What becomes of one unsynced change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It never reached the platter.
    Lost,
    /// It did.
    Whole,
    /// Of a write, only some pieces between multiples of `unit` bytes did: number n if bit n modulo 64 is set. Other
    /// changes are whole or not at all.
    Torn {
        /// Bytes that are old or new together.
        unit: u64,
        /// Which pieces arrived.
        pieces: u64,
    },
}

impl Recorder {
    /// A copy of `file` as it is now, all of it durable, with nothing remembered.
    pub fn new(file: &MemoryStorage) -> Arc<Self> {
        let start = file.content();
        Arc::new(Self {
            file: MemoryStorage::with_content(start.clone()),
            start,
            steps: Mutex::default(),
        })
    }

    /// Changing calls so far, syncs included.
    pub fn steps(&self) -> usize {
        self.steps.lock().len()
    }

    /// The file as it is now: what the death of the process would leave.
    pub fn copy(&self) -> Arc<MemoryStorage> {
        MemoryStorage::with_content(self.file.content())
    }

    /// All instants from `from` changing calls on at which a cut leaves something that no other instant does.
    pub fn cuts(&self, from: usize) -> Vec<Cut> {
        let mut replay = self.replay();
        let mut cuts = Vec::new();
        for number in 0..=self.steps() {
            let tells = match self.steps.lock().get(number) {
                Some(Step::Change(change)) => matches!(change, Change::Forced(..)),
                Some(Step::Sync { .. }) | None => true,
            };
            if tells && number >= from {
                cuts.push(replay.cut(true));
            }
            replay.advance();
        }
        cuts
    }

    /// From the start, with no call made.
    pub fn replay(&self) -> Replay<'_> {
        Replay {
            recorder: self,
            step: 0,
            durable: self.start.clone(),
            pending: Vec::new(),
        }
    }

    /// Notes a sync that returns now and had begun after `begun` changing calls: for a file that several threads change
    /// while it is being synced.
    pub fn synced(&self, begun: usize) {
        self.note(Step::Sync { begun });
    }

    fn note(&self, step: Step) {
        self.steps.lock().push(step);
    }
}

impl Replay<'_> {
    /// One call more has returned, if there is one.
    pub fn advance(&mut self) {
        match self.recorder.steps.lock().get(self.step) {
            Some(Step::Change(change)) => self.pending.push(Pending {
                step: self.step,
                change: change.clone(),
                certain: matches!(change, Change::Forced(..)),
            }),
            Some(&Step::Sync { begun }) => {
                for pending in self.pending.extract_if(.., |pending| pending.step < begun) {
                    self.durable.apply(&pending.change);
                }
            }
            None => return,
        }
        self.step += 1;
    }

    /// The power is cut now; with `under_way` while the next call is being made.
    pub fn cut(&self, under_way: bool) -> Cut {
        let mut pending = self.pending.clone();
        if under_way && let Some(Step::Change(change)) = self.recorder.steps.lock().get(self.step) {
            pending.push(Pending {
                step: self.step,
                change: change.clone(),
                certain: false,
            });
        }
        Cut {
            step: self.step,
            durable: self.durable.clone(),
            pending,
        }
    }
}

impl Cut {
    /// How many changes may or may not have reached the platter.
    pub fn open(&self) -> usize {
        self.pending
            .iter()
            .filter(|pending| !pending.certain)
            .count()
    }

    /// How many pieces of `unit` bytes the open change number `index` has: one if it is no write.
    pub fn pieces(&self, index: usize, unit: u64) -> usize {
        let open = self.pending.iter().filter(|pending| !pending.certain);
        match open.map(|pending| &pending.change).nth(index) {
            Some(Change::Write(offset, data) | Change::Forced(offset, data)) => {
                pieces(*offset, data.len(), unit).count()
            }
            _ => 1,
        }
    }

    /// The file after the cut, if each open change, in the order of the calls, had the fate that `fate` gives it.
    pub fn image(&self, mut fate: impl FnMut(usize) -> Fate) -> Arc<MemoryStorage> {
        let mut content = self.durable.clone();
        let mut index = 0;
        for Pending {
            change, certain, ..
        } in &self.pending
        {
            let fate = if *certain {
                Fate::Whole
            } else {
                index += 1;
                fate(index - 1)
            };
            match (fate, change) {
                (Fate::Lost, _) => {}
                (
                    Fate::Torn {
                        unit,
                        pieces: arrived,
                    },
                    Change::Write(offset, data) | Change::Forced(offset, data),
                ) => {
                    for (number, (at, range)) in pieces(*offset, data.len(), unit).enumerate() {
                        if arrived >> (number % 64) & 1 == 1 {
                            content.write(at, &data[range]);
                        }
                    }
                }
                (Fate::Whole | Fate::Torn { .. }, change) => content.apply(change),
            }
        }
        MemoryStorage::with_content(content)
    }
}

impl Storage for Recorder {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_at(offset, buf)
    }

    fn write_at(&self, offset: u64, buf: &[u8], fua: Fua) -> io::Result<()> {
        let data = buf.into();
        self.note(Step::Change(match fua {
            Fua::No => Change::Write(offset, data),
            Fua::Yes => Change::Forced(offset, data),
        }));
        self.file.write_at(offset, buf, fua)
    }

    fn zero(&self, run: Extent, space: Space) -> io::Result<()> {
        self.note(Step::Change(Change::Zero(run, space)));
        self.file.zero(run, space)
    }

    fn data_after(&self, offset: u64) -> io::Result<Option<Extent>> {
        self.file.data_after(offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.note(Step::Change(Change::SetLen(len)));
        self.file.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        let begun = self.steps();
        self.file.sync()?;
        self.synced(begun);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Fate::{Lost, Whole};
    use super::*;
    use crate::storage::memory::Power;

    #[test]
    fn each_cut_makes_every_image_and_no_other() {
        let file = MemoryStorage::new(&Power::new());
        file.write_at(0, &[1; 1024], Fua::No).unwrap();
        let recorder = Recorder::new(&file);
        recorder.write_at(0, &[2; 1024], Fua::No).unwrap();
        recorder.write_at(512, &[3; 512], Fua::Yes).unwrap();
        recorder.set_len(512).unwrap();
        recorder.sync().unwrap();
        let cuts = recorder.cuts(0);
        let told: Vec<_> = cuts.iter().map(|cut| (cut.step, cut.open())).collect();
        assert_eq!(told, [(1, 2), (3, 2), (4, 0)]);
        let halves = |cut: &Cut, fates: [Fate; 2]| {
            let bytes = cut.image(|index| fates[index]).bytes();
            bytes
                .chunks_exact(512)
                .map(|half| half[0])
                .collect::<Vec<_>>()
        };
        let second = Fate::Torn {
            unit: 512,
            pieces: 0b10,
        };
        assert_eq!(halves(&cuts[0], [Lost, Lost]), [1, 1]);
        assert_eq!(halves(&cuts[0], [Lost, Whole]), [1, 3]);
        assert_eq!(halves(&cuts[0], [second, Lost]), [1, 2]);
        assert_eq!(halves(&cuts[1], [Whole, Lost]), [2, 3]);
        assert_eq!(halves(&cuts[1], [Lost, Whole]), [1]);
        assert_eq!(cuts[0].pieces(0, 512), 2);
        assert_eq!(cuts[0].pieces(0, 4096), 1);
        assert_eq!(recorder.cuts(4).len(), 1);
    }

    #[test]
    fn what_is_changed_while_a_sync_is_under_way_is_not_durable_by_it() {
        let recorder = Recorder::new(&MemoryStorage::new(&Power::new()));
        recorder.write_at(0, &[1; 512], Fua::No).unwrap();
        let begun = recorder.steps();
        recorder.write_at(512, &[2; 512], Fua::No).unwrap();
        recorder.synced(begun);
        let mut replay = recorder.replay();
        let open =
            |replay: &Replay<'_>| [false, true].map(|under_way| replay.cut(under_way).open());
        assert_eq!(open(&replay), [0, 1]);
        replay.advance();
        replay.advance();
        assert_eq!(open(&replay), [2, 2]);
        replay.advance();
        assert_eq!(open(&replay), [1, 1]);
        assert_eq!(replay.cut(false).image(|_| Lost).bytes(), [1; 512]);
        replay.advance();
        assert_eq!(open(&replay), [1, 1], "there are no more calls");
    }
}
