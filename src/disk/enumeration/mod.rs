//! What a power cut leaves, for every instant and every choice of the unsynced writes: tests that any image format shares.
//!
//! A [`Subject`] says how its images are made, opened and resized. [`Enumeration`] runs a story, a list of [`Op`]s, on a
//! recording storage once; then, for each [`Cut`] of the recording, it makes the images that the cut may leave, and
//! each must open and hold what it may:
//!
//! ```text
//!   every sector   what the last flush made durable, or what a later write left there, whole
//!   the size       what it was, or what a resize that had begun makes of it
//!   the image      has no error in the eyes of our checker; opens for reading and for writing with the same content;
//!                  goes on working; other programs agree
//! ```
//! Of up to [`WHOLE_SUBSETS_MAX`] unsynced changes every subset is tried. Of more, every subset that keeps or loses up
//! to two, and some at random. Besides, each write is torn at 512 and at 4096 bytes, among all others and among none.

mod model;
mod raw;

use std::{
    fmt,
    ops::{AddAssign, Range},
    path::Path,
    sync::{Arc, Mutex},
};

use model::{Held, Model, read};

use crate::{
    base::{
        checksum::crc32c_of,
        units::{Extent, to_u64, to_usize},
    },
    disk::{Access, Disk, Fua, Space, check::Report},
    storage::{
        Storage,
        memory::{Cut, Fate, MemoryStorage, Power, Recorder},
    },
};

/// Most unsynced changes of which every subset is tried.
const WHOLE_SUBSETS_MAX: usize = 6;
/// Subsets at random of more than that.
const RANDOM_SUBSETS: usize = 24;
/// Largest disk that is shown to another program, in bytes: that reads all of it.
const SHOWN_BYTES_MAX: u64 = 80 << 20;
/// Bytes of the unit in which a disk's content is followed.
pub(crate) const SECTOR: u64 = 512;

/// An image format under test.
pub(crate) trait Subject: Sync {
    /// Its disk.
    type Disk: Disk;

    /// Makes the image, durable, in an empty storage.
    fn create(&self, storage: &dyn Storage);

    /// Opens the image.
    fn open(&self, storage: Arc<dyn Storage>, access: Access) -> Result<Self::Disk, Refused>;

    /// Resizes a disk, durably, and gives back the disk to go on with; as it was if `size` is too small for its data.
    fn resize(&self, disk: Self::Disk, storage: &Arc<dyn Storage>, size: u64) -> Self::Disk;

    /// What our own checker says of the image.
    fn check(&self, storage: &Arc<dyn Storage>) -> Report;

    /// What another program says of the image in `file`, whose disk holds `bytes`. Nothing if there is no such program.
    fn second_opinion(&self, file: &Path, bytes: &[u8]) -> Option<Result<(), String>>;
}

/// Why an image does not open.
#[derive(Debug)]
pub(crate) enum Refused {
    /// There is none: what a cut may leave of one that was being made.
    NoImage,
    /// There is one, and it is damaged.
    Damaged(String),
}

/// What a guest or an administrator does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Write(Extent, Fua),
    Zero(Extent, Space, Fua),
    Flush,
    /// Closes the disk and opens it again.
    Reopen,
    /// The process dies; another one opens the disk.
    Kill,
    Resize(u64),
}

/// What was tried.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) stories: u64,
    pub(crate) cuts: u64,
    pub(crate) subsets: u64,
    pub(crate) torn: u64,
    /// Images after the death of the process alone.
    pub(crate) kills: u64,
    /// Images that another program looked at.
    pub(crate) second_opinions: u64,
}

/// See the module.
pub(crate) struct Enumeration<'a, S> {
    subject: &'a S,
    /// One image in so many goes on: it is written, closed and opened again.
    continued_every: u64,
    /// One image in so many is shown to another program.
    shown_every: u64,
    totals: Mutex<Counts>,
}

/// One operation of a recorded story.
struct Scene {
    /// The changing calls that belong to it.
    steps: Range<usize>,
    /// What may be there while it is under way.
    during: Model,
    /// What may be there after it.
    after: Model,
}

impl<'a, S: Subject> Enumeration<'a, S> {
    pub(crate) fn new(subject: &'a S, continued_every: u64, shown_every: u64) -> Self {
        Self {
            subject,
            continued_every,
            shown_every,
            totals: Mutex::default(),
        }
    }

    /// What was tried so far.
    pub(crate) fn counts(&self) -> Counts {
        *self.totals.lock().unwrap()
    }

    /// All stories of one to `len` of the operations, with every cut of each.
    pub(crate) fn all_stories(&self, alphabet: &[Op], len: u32) {
        let total = alphabet.len().pow(len);
        let next = Mutex::new(0..total);
        let threads = std::thread::available_parallelism().map_or(2, usize::from);
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    while let Some(number) = { next.lock().unwrap().next() } {
                        let story: Vec<Op> = (0..len)
                            .rev()
                            .map(|digit| {
                                alphabet[number / alphabet.len().pow(digit) % alphabet.len()]
                            })
                            .collect();
                        // Stories that begin alike have the same cuts there: those belong to the first of them.
                        let first_of = (1..len)
                            .take_while(|&end| number.is_multiple_of(alphabet.len().pow(end)));
                        let own = story.len() - 1 - first_of.count();
                        self.story(&story, own);
                    }
                });
            }
        });
    }

    /// One story, with every cut in the operations from number `from` on.
    pub(crate) fn story(&self, ops: &[Op], from: usize) {
        let image = MemoryStorage::new(&Power::new());
        self.subject.create(image.as_ref());
        let recorder = Recorder::new(&image);
        let mut counts = Counts {
            stories: 1,
            ..Counts::default()
        };
        let scenes = self.record(&recorder, ops, &mut counts);
        for cut in recorder.cuts(scenes[from].steps.start) {
            let scene = scenes.iter().find(|scene| scene.steps.contains(&cut.step));
            let model = match scene {
                Some(scene) => &scene.during,
                None => &scenes.last().expect("a story has operations").after,
            };
            counts.cuts += 1;
            let story = format!("{ops:?}, cut after {} calls", cut.step);
            self.cut(&cut, model, &mut counts, &story);
        }
        *self.totals.lock().unwrap() += counts;
    }

    /// Making the image, with every cut: there is a whole one or none.
    pub(crate) fn creation(&self, size: u64) {
        let recorder = Recorder::new(&MemoryStorage::new(&Power::new()));
        self.subject.create(recorder.as_ref());
        let last = recorder.steps();
        let mut counts = Counts::default();
        for cut in recorder.cuts(0) {
            counts.cuts += 1;
            for fates in fates(&cut, &mut counts) {
                let image = cut.image(|index| fates[index]);
                let story = format!("making it, cut after {} calls, {fates:?}", cut.step);
                match self
                    .subject
                    .open(Arc::clone(&image) as _, Access::ReadWrite)
                {
                    Ok(disk) => {
                        let held = read(&disk, &story);
                        Model::new(size).check(&held, &story);
                        if cut.step == last {
                            self.show(&image, &disk, &mut counts, &story);
                        }
                        self.go_on(&disk, &image, held, &story);
                    }
                    Err(Refused::NoImage) => assert!(cut.step < last, "{story}"),
                    Err(Refused::Damaged(problem)) => panic!("{story}: {problem}"),
                }
            }
        }
        *self.totals.lock().unwrap() += counts;
    }

    fn open(&self, storage: Arc<dyn Storage>, access: Access, story: &str) -> S::Disk {
        match self.subject.open(storage, access) {
            Ok(disk) => disk,
            Err(refused) => panic!("{story}: opening it {access:?}: {refused:?}"),
        }
    }

    fn record(&self, recorder: &Arc<Recorder>, ops: &[Op], counts: &mut Counts) -> Vec<Scene> {
        let storage: Arc<dyn Storage> = Arc::clone(recorder) as _;
        let mut disk = self.open(Arc::clone(&storage), Access::ReadWrite, "a new image");
        let mut model = Model::new(disk.geometry().size);
        let mut scenes = Vec::new();
        for (number, &op) in (1..).zip(ops) {
            let start = recorder.steps();
            disk = self.perform(disk, &storage, op, number);
            let (during, after) = model.with(op, number, disk.geometry().size);
            let story = format!("{ops:?}, killed after operation {number}");
            let killed = self.open(recorder.copy(), Access::ReadOnly, &story);
            after.killed().check(&read(&killed, &story), &story);
            counts.kills += 1;
            model = after.clone();
            scenes.push(Scene {
                steps: start..recorder.steps(),
                during,
                after,
            });
        }
        scenes
    }

    /// Does `op` if the disk is large enough for it.
    fn perform(&self, disk: S::Disk, storage: &Arc<dyn Storage>, op: Op, number: u64) -> S::Disk {
        let size = disk.geometry().size;
        match op {
            Op::Write(run, fua) if run.end() <= size => {
                let bytes = model::content(run, number);
                disk.write_at(run.offset, &bytes, fua).unwrap();
            }
            Op::Zero(run, space, fua) if run.end() <= size => disk.zero(run, space, fua).unwrap(),
            Op::Write(..) | Op::Zero(..) => {}
            Op::Flush => disk.flush().unwrap(),
            Op::Reopen => {
                disk.close().unwrap();
                return self.open(Arc::clone(storage), Access::ReadWrite, "a closed image");
            }
            Op::Kill => {
                drop(disk);
                return self.open(Arc::clone(storage), Access::ReadWrite, "a killed image");
            }
            Op::Resize(size) => return self.subject.resize(disk, storage, size),
        }
        disk
    }

    fn cut(&self, cut: &Cut, model: &Model, counts: &mut Counts, story: &str) {
        let first = u64::from(crc32c_of(&[story.as_bytes()]));
        for (turn, fates) in (first..).zip(fates(cut, counts)) {
            let image = cut.image(|index| fates[index]);
            let story = format!("{story}: {fates:?}");
            self.check(&image, &story);
            let reader = self.open(Arc::clone(&image) as _, Access::ReadOnly, &story);
            let seen = read(&reader, &story);
            model.check(&seen, &story);
            if turn.is_multiple_of(self.shown_every) {
                self.show(&image, &reader, counts, &story);
            }
            drop(reader);
            let disk = self.open(Arc::clone(&image) as _, Access::ReadWrite, &story);
            let held = read(&disk, &story);
            assert!(seen == held, "{story}: it reads otherwise when writable");
            if turn.is_multiple_of(self.continued_every) {
                self.go_on(&disk, &image, held, &story);
            }
        }
    }

    /// Writes a sector here and there and finds exactly that after a clean close.
    fn go_on(&self, disk: &S::Disk, image: &Arc<MemoryStorage>, mut held: Held, story: &str) {
        for at in (0..held.size.min(8 << 20)).step_by(1 << 20) {
            let run = Extent::new(at + 5 * SECTOR, SECTOR);
            if run.end() <= held.size {
                let tag = u64::MAX - at;
                disk.write_at(run.offset, &model::content(run, tag), Fua::No)
                    .unwrap_or_else(|error| panic!("{story}: then writing: {error:?}"));
                held.sectors.insert(run.offset / SECTOR, tag);
            }
        }
        disk.close()
            .unwrap_or_else(|error| panic!("{story}: then closing: {error:?}"));
        let story = format!("{story}, gone on with");
        self.check(image, &story);
        let disk = self.open(Arc::clone(image) as _, Access::ReadOnly, &story);
        assert!(
            read(&disk, &story) == held,
            "{story}: it holds something else"
        );
    }

    fn check(&self, image: &Arc<MemoryStorage>, story: &str) {
        let report = self.subject.check(&(Arc::clone(image) as _));
        assert!(report.is_sound(), "{story}: {report:?}");
    }

    fn show(&self, image: &MemoryStorage, disk: &S::Disk, counts: &mut Counts, story: &str) {
        if disk.geometry().size > SHOWN_BYTES_MAX {
            return;
        }
        let mut file = tempfile::NamedTempFile::new().unwrap();
        image.write_to(file.as_file_mut()).unwrap();
        let mut bytes = vec![0; to_usize(disk.geometry().size)];
        disk.read_at(0, &mut bytes)
            .unwrap_or_else(|error| panic!("{story}: reading it: {error:?}"));
        if let Some(opinion) = self.subject.second_opinion(file.path(), &bytes) {
            opinion.unwrap_or_else(|problem| panic!("{story}: another program: {problem}"));
            counts.second_opinions += 1;
        }
    }
}

/// The choices to be tried of what became of the open changes.
fn fates(cut: &Cut, counts: &mut Counts) -> Vec<Vec<Fate>> {
    let open = cut.open();
    let mut random = Random(to_u64(cut.step));
    let mut chosen = subsets(open, &mut random);
    counts.subsets += to_u64(chosen.len());
    for index in 0..open {
        for unit in [512, 4096] {
            let count = cut.pieces(index, unit);
            if count < 2 {
                continue;
            }
            let half = (1 << (count / 2).min(63)) - 1;
            for pieces in [half, !half, random.below(u64::MAX)] {
                for others in [Fate::Lost, Fate::Whole] {
                    let mut fates = vec![others; open];
                    fates[index] = Fate::Torn { unit, pieces };
                    chosen.push(fates);
                    counts.torn += 1;
                }
            }
        }
    }
    chosen
}

/// Subsets of `count` changes.
fn subsets(count: usize, random: &mut Random) -> Vec<Vec<Fate>> {
    let of = |kept: &dyn Fn(usize) -> bool| -> Vec<Fate> {
        let fate = |index| if kept(index) { Fate::Whole } else { Fate::Lost };
        (0..count).map(fate).collect()
    };
    if count <= WHOLE_SUBSETS_MAX {
        return (0..1u64 << count)
            .map(|mask| of(&|index| mask >> index & 1 == 1))
            .collect();
    }
    let mut chosen = vec![of(&|_| true), of(&|_| false)];
    for first in 0..count {
        for second in first..count {
            let pair = |index: usize| index == first || index == second;
            chosen.push(of(&pair));
            chosen.push(of(&|index| !pair(index)));
        }
    }
    for _ in 0..RANDOM_SUBSETS {
        let bits: Vec<bool> = (0..count).map(|_| random.below(2) == 0).collect();
        chosen.push(of(&|index| bits[index]));
    }
    chosen
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.stories += other.stories;
        self.cuts += other.cuts;
        self.subsets += other.subsets;
        self.torn += other.torn;
        self.kills += other.kills;
        self.second_opinions += other.second_opinions;
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            stories,
            cuts,
            subsets,
            torn,
            kills,
            second_opinions,
        } = self;
        let images = subsets + torn;
        write!(
            f,
            "{stories} stories, {cuts} cuts, {images} images after a cut ({subsets} subsets, {torn} with a torn write), \
             {kills} after a killed process, {second_opinions} shown to another program"
        )
    }
}

/// `SplitMix64`.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % limit
    }
}
