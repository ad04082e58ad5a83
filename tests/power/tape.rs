//! Everything that happens to the files of a host and in its guest, in one order.
//!
//! Each file is a [`Recorder`]; the tape remembers in which order their calls were made, and what the guest and the replica
//! did in between. Calls on files are put in a row, so that each entry is an instant; a sync begins at one and returns at
//! another, as on a real disk, and what others change meanwhile is not durable by it.
//!
//! Mapped words have no calls. Before each entry the words that changed are noted as writes of their own, so that a cut
//! leaves each word as it was at its last sync or at any instant since, which is what the contract of mapped files says.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use parking_lot::Mutex;
use understudy::{
    base::{
        ids::Lineage,
        units::{Extent, to_u64},
    },
    disk::{Fua, Space},
    storage::{
        Folder, Open, Storage,
        memory::{MemoryStorage, Recorder},
    },
    track::{
        header::HEADER_BYTES,
        state::{StateDir, Words},
    },
    volume::Piece,
};

use super::hot::Change;

/// The image file.
pub(crate) const IMAGE: usize = 0;
/// The node's store.
pub(crate) const STORE: usize = 1;
/// The two maps.
pub(crate) const MAPS: [usize; 2] = [2, 3];
/// The intent log.
pub(crate) const INTENT: usize = 4;
/// All of them.
pub(crate) const FILES: usize = 5;
/// What the tracking files are called.
pub(crate) const NAMES: [(&str, usize); 3] = [
    ("disk-0.map-a", MAPS[0]),
    ("disk-0.map-b", MAPS[1]),
    ("disk-0.intent", INTENT),
];
/// How long a sync takes at least: long enough that other threads do something meanwhile.
const SYNC_TAKES: Duration = Duration::from_micros(500);

/// What one entry of the tape is.
#[derive(Debug)]
pub(crate) enum Entry {
    /// A changing call of a file.
    Call {
        file: usize,
        /// Whether something is durable for certain when it returns: a sync, a forced write.
        settles: bool,
    },
    /// What the call just before made of the hot regions.
    Hot(Change),
    /// The guest said something.
    Note(String),
    /// The sender is about to cut, and has cut.
    Cutting,
    Cut,
    /// All of an epoch is on its way to the replica, which may have it from now on.
    Sent {
        lineage: Lineage,
        log: Vec<Piece>,
    },
    /// The replica has it for certain.
    Held,
}

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Tape {
    pub(crate) recorders: Vec<Arc<Recorder>>,
    order: Mutex<Order>,
}

#[derive(Debug, Default)]
struct Order {
    entries: Vec<Entry>,
    maps: Vec<Watched>,
}

/// A map whose words are looked at before each entry.
#[derive(Debug)]
struct Watched {
    file: usize,
    words: Words,
    seen: Vec<u64>,
}

impl Tape {
    /// A tape of these files, all of them durable, and the files to be used from now on.
    pub(crate) fn new(files: &[Arc<MemoryStorage>]) -> Arc<Self> {
        assert_eq!(files.len(), FILES);
        Arc::new(Self {
            recorders: files.iter().map(|file| Recorder::new(file)).collect(),
            order: Mutex::default(),
        })
    }

    /// The files, whose calls go onto the tape.
    pub(crate) fn files(self: &Arc<Self>) -> Vec<Arc<dyn Storage>> {
        let taped = |file| -> Arc<dyn Storage> {
            Arc::new(Taped {
                tape: Arc::clone(self),
                file,
            })
        };
        (0..FILES).map(taped).collect()
    }

    /// Looks at the words of the maps from now on.
    pub(crate) fn watch(&self, state: &StateDir) -> io::Result<()> {
        let mut order = self.order.lock();
        for (name, file) in NAMES {
            if MAPS.contains(&file) {
                let bytes = self.recorders[file].len()? - HEADER_BYTES;
                let words = state.map(name, HEADER_BYTES, usize::try_from(bytes / 8).unwrap())?;
                let seen = load(&words);
                order.maps.push(Watched { file, words, seen });
            }
        }
        Ok(())
    }

    /// Notes what happened outside of the files.
    pub(crate) fn note(&self, entry: Entry) {
        let mut order = self.order.lock();
        self.note_words(&mut order);
        order.entries.push(entry);
    }

    /// What is on the tape. Nothing may use the files any more.
    pub(crate) fn take(&self) -> Vec<Entry> {
        let mut order = self.order.lock();
        order.maps.clear();
        std::mem::take(&mut order.entries)
    }

    fn note_words(&self, order: &mut Order) {
        let Order { entries, maps } = order;
        for Watched { file, words, seen } in maps {
            for (index, (word, seen)) in words.iter().zip(seen).enumerate() {
                let now = word.load(Ordering::SeqCst);
                if now != *seen {
                    *seen = now;
                    let at = HEADER_BYTES + 8 * to_u64(index);
                    let noted = self.recorders[*file].write_at(at, &now.to_le_bytes(), Fua::No);
                    noted.expect("memory takes all writes");
                    entries.push(Entry::Call {
                        file: *file,
                        settles: false,
                    });
                }
            }
        }
    }

    fn call(
        &self,
        file: usize,
        settles: bool,
        hot: Option<Change>,
        call: impl FnOnce(&Recorder) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut order = self.order.lock();
        self.note_words(&mut order);
        order.entries.push(Entry::Call { file, settles });
        order.entries.extend(hot.map(Entry::Hot));
        call(&self.recorders[file])
    }
}

fn load(words: &[AtomicU64]) -> Vec<u64> {
    let words = words.iter().map(|word| word.load(Ordering::SeqCst));
    words.collect()
}

/// One file of a tape.
#[derive(Debug)]
struct Taped {
    tape: Arc<Tape>,
    file: usize,
}

impl Taped {
    fn recorder(&self) -> &Recorder {
        &self.tape.recorders[self.file]
    }

    fn change(&self, call: impl FnOnce(&Recorder) -> io::Result<()>) -> io::Result<()> {
        self.tape.call(self.file, false, None, call)
    }
}

impl Storage for Taped {
    fn len(&self) -> io::Result<u64> {
        self.recorder().len()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.recorder().read_at(offset, buf)
    }

    fn write_at(&self, offset: u64, buf: &[u8], fua: Fua) -> io::Result<()> {
        let body = self.file == INTENT && offset >= HEADER_BYTES;
        let hot = body.then(|| Change::parse(buf));
        self.tape.call(self.file, fua == Fua::Yes, hot, |file| {
            file.write_at(offset, buf, fua)
        })
    }

    fn zero(&self, run: Extent, space: Space) -> io::Result<()> {
        self.change(|file| file.zero(run, space))
    }

    fn data_after(&self, offset: u64) -> io::Result<Option<Extent>> {
        self.recorder().data_after(offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(|file| file.set_len(len))
    }

    fn sync(&self) -> io::Result<()> {
        let begun = {
            let mut order = self.tape.order.lock();
            self.tape.note_words(&mut order);
            self.recorder().steps()
        };
        thread::sleep(SYNC_TAKES);
        self.tape.call(self.file, true, None, |file| {
            file.synced(begun);
            Ok(())
        })
    }
}

/// The state folder: its files are there, and no other one is made.
#[derive(Debug)]
pub(crate) struct Shelf(Vec<Arc<dyn Storage>>);

impl Shelf {
    /// The tracking files among all `files`.
    pub(crate) fn state(files: &[Arc<dyn Storage>]) -> StateDir {
        StateDir::memory(Arc::new(Self(files.to_vec())))
    }
}

impl Folder for Shelf {
    fn open(&self, name: &str, how: Open) -> io::Result<Arc<dyn Storage>> {
        let found = NAMES.iter().find(|(known, _)| *known == name);
        match (found, how) {
            (Some(&(_, file)), Open::Read | Open::Write) => Ok(Arc::clone(&self.0[file])),
            _ => Err(io::Error::other(format!("{name} is opened: {how:?}"))),
        }
    }

    fn rename(&self, from: &str, _to: &str) -> io::Result<()> {
        Err(io::Error::other(format!("{from} is renamed")))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        Err(io::Error::other(format!("{name} is removed")))
    }

    fn names(&self) -> io::Result<Vec<String>> {
        Ok(NAMES.map(|(name, _)| name.to_owned()).into())
    }

    fn folder(&self, name: &str) -> io::Result<Arc<dyn Folder>> {
        Err(io::Error::other(format!("folder {name} is opened")))
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}
