//! The recording, played again, with the power cut at many instants: what each cut may leave, and whether that is right.

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    ops::AddAssign,
    sync::Arc,
    thread,
};

use parking_lot::Mutex;
use understudy::{
    base::{
        checksum::Digest,
        ids::Lineage,
        units::{BLOCK_BYTES, BLOCKS_PER_REGION, MIB, to_u64, to_usize},
    },
    disk::image::{self, Format},
    storage::{
        Storage,
        memory::{Cut, Fate, MemoryStorage, Replay},
    },
    testing::Random,
    track::header::HEADER_BYTES,
    volume::{Machine, Piece, PieceContent, Reconcile, ReplicaHead, Side, Taken},
};

use super::{
    files::{Files, Told, look, sha256},
    host::{Recording, SIZE, open_disk, open_machine, read, stamp},
    tape::{Entry, FILES, IMAGE, MAPS, STORE, Shelf},
};

/// One instant in so many is tried at which nothing becomes durable.
const BETWEEN: usize = 24;
/// Threads that try.
const WORKERS: usize = 2;

/// Blocks of the disk, one flag each.
type Blocks = Vec<bool>;

/// Which of the unsynced changes reached the platter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Nothing,
    Everything,
    /// The image is ahead of what is known of it.
    ImageOnly,
    /// It is behind.
    AllButImage,
    /// Each change is lost, whole, or torn at multiples of 4096 bytes, outside of the image also of 512; of a hundred
    /// so many are whole.
    Mixture(u64),
}

const OUTCOMES: [Outcome; 6] = [
    Outcome::Nothing,
    Outcome::Everything,
    Outcome::ImageOnly,
    Outcome::AllButImage,
    Outcome::Mixture(20),
    Outcome::Mixture(70),
];

/// What was tried, and what it cost.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) instants: u64,
    pub(crate) cuts: u64,
    /// Unsynced changes that may or may not have arrived, at all instants together.
    pub(crate) open: u64,
    /// Different contents of the disk, each looked at with `e2fsck`, twice, and `debugfs`.
    pub(crate) contents: u64,
    /// Files that the guest had been told of, in all cuts together.
    pub(crate) told: u64,
    /// Regions that were hot, and those that were sent again without a mark.
    pub(crate) hot: u64,
    pub(crate) hot_max: u64,
    pub(crate) examined: u64,
    /// Blocks that were marked, sent again, and different from the replica's; and of the last those without a mark.
    pub(crate) marked: u64,
    pub(crate) sent: u64,
    pub(crate) different: u64,
    pub(crate) unmarked: u64,
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.instants += other.instants;
        self.cuts += other.cuts;
        self.open += other.open;
        self.contents += other.contents;
        self.told += other.told;
        self.hot += other.hot;
        self.hot_max = self.hot_max.max(other.hot_max);
        self.examined += other.examined;
        self.marked += other.marked;
        self.sent += other.sent;
        self.different += other.different;
        self.unmarked += other.unmarked;
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} instants with {} open changes, {} cuts, {} contents with 2 e2fsck and 1 debugfs each, {} files looked for; \
             hot regions {} (at most {}), re-examined regions {}; blocks: {} marked, {} sent again, {} different, {} of \
             them known by the intent log alone",
            self.instants,
            self.open,
            self.cuts,
            self.contents,
            self.told,
            self.hot,
            self.hot_max,
            self.examined,
            self.marked,
            self.sent,
            self.different,
            self.unmarked,
        )
    }
}

/// What was found on disks by their content.
#[derive(Default)]
struct Looked(Mutex<HashMap<Digest, Files>>);

impl Looked {
    fn at(&self, content: &[u8], counts: &mut Counts) -> Result<Files, String> {
        let digest = sha256(content);
        if let Some(files) = self.0.lock().get(&digest) {
            return Ok(files.clone());
        }
        let files = look(content)?;
        counts.contents += 1;
        self.0.lock().insert(digest, files.clone());
        Ok(files)
    }
}

/// All instants that are worth a cut: those at which something is about to be durable for certain, and some others.
pub(crate) fn instants(recording: &Recording) -> Vec<usize> {
    let entries = recording.entries.iter().enumerate();
    let worth = entries.filter(|(at, entry)| match entry {
        Entry::Call { settles, .. } => *settles || at % BETWEEN == 0,
        _ => false,
    });
    let worth = worth.map(|(at, _)| at);
    worth.chain([recording.entries.len()]).collect()
}

/// Cuts the power at all `instants`, which ascend.
pub(crate) fn cut_at(recording: &Recording, instants: &[usize], seed: u64) -> Counts {
    let looked = Looked::default();
    let work = |worker: usize| {
        let mut counts = Counts::default();
        let mut playback = Playback::new(recording);
        for &at in instants.iter().skip(worker).step_by(WORKERS) {
            playback.play_to(at);
            playback.cut(seed, &looked, &mut counts);
        }
        counts
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..WORKERS)
            .map(|worker| scope.spawn(move || work(worker)))
            .collect();
        let mut counts = Counts::default();
        for worker in workers {
            counts += worker
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
        counts
    })
}

/// Looks at one in `every` of the points that the replica held: each is a state that the guest's disk was in at a cut.
/// Returns how many there were.
pub(crate) fn look_at_points(recording: &Recording, every: usize) -> usize {
    let mut playback = Playback::new(recording);
    let (mut points, mut at_cut) = (0, Told::default());
    for (at, entry) in recording.entries.iter().enumerate() {
        match entry {
            Entry::Cutting => {
                playback.play_to(at);
                at_cut = playback.told.clone();
                let meanwhile = recording.entries[at..].iter();
                for entry in meanwhile.take_while(|entry| !matches!(entry, Entry::Cut)) {
                    if let Entry::Note(note) = entry {
                        at_cut.hear_meanwhile(note);
                    }
                }
            }
            Entry::Held => {
                playback.play_to(at + 1);
                points += 1;
                if points % every == 0 {
                    let point = playback.head.epoch;
                    let found = look(&playback.replica).and_then(|files| at_cut.compare(&files));
                    found.unwrap_or_else(|error| panic!("point {point}: {error}"));
                }
            }
            _ => {}
        }
    }
    assert!(
        playback.replica == recording.disk,
        "the replica ends as the disk"
    );
    assert_eq!(
        playback.told.there(),
        recording.left.iter().cloned().collect()
    );
    points
}

/// The recording up to an instant.
struct Playback<'a> {
    recording: &'a Recording,
    at: usize,
    files: Vec<Replay<'a>>,
    hot: BTreeSet<u64>,
    told: Told,
    /// What the replica holds for certain.
    replica: Vec<u8>,
    head: Lineage,
    /// The epoch that it may hold as well.
    sent: Option<(Lineage, &'a [Piece])>,
}

/// What a cut left, and what is known about it.
struct Left<'a> {
    format: Format,
    files: Vec<Arc<MemoryStorage>>,
    told: &'a Told,
    replica: Vec<u8>,
    head: Lineage,
    /// Regions that were hot for certain, and those that would be if what was being written of the intent log arrived.
    hot: [BTreeSet<u64>; 2],
}

impl<'a> Playback<'a> {
    fn new(recording: &'a Recording) -> Self {
        let recorders = recording.tape.recorders.iter();
        Self {
            recording,
            at: 0,
            files: recorders.map(|recorder| recorder.replay()).collect(),
            hot: BTreeSet::new(),
            told: Told::default(),
            replica: recording.replica.clone(),
            head: recording.head,
            sent: None,
        }
    }

    fn play_to(&mut self, at: usize) {
        for entry in &self.recording.entries[self.at..at] {
            match entry {
                Entry::Call { file, .. } => self.files[*file].advance(),
                Entry::Hot(change) => self.hot = change.apply(&self.hot),
                Entry::Note(note) => self.told.hear(note),
                Entry::Cutting | Entry::Cut => {}
                Entry::Sent { lineage, log } => self.sent = Some((*lineage, log)),
                Entry::Held => {
                    let (lineage, log) = self.sent.take().expect("sent before it is held");
                    for piece in log {
                        apply(piece, &mut self.replica);
                    }
                    self.head = lineage;
                }
            }
        }
        self.at = at;
    }

    /// Cuts the power now, with every outcome that differs from the others.
    fn cut(&self, seed: u64, looked: &Looked, counts: &mut Counts) {
        let called = match self.recording.entries.get(self.at) {
            Some(Entry::Call { file, .. }) => Some(*file),
            _ => None,
        };
        let cuts = (0..FILES).map(|file| self.files[file].cut(called == Some(file)));
        let cuts: Vec<Cut> = cuts.collect();
        let image = cuts[IMAGE].open();
        let other = cuts.iter().map(Cut::open).sum::<usize>() - image;
        counts.instants += 1;
        counts.open += to_u64(image + other);
        for outcome in OUTCOMES {
            let same = match outcome {
                Outcome::Nothing => false,
                Outcome::Everything => image + other == 0,
                Outcome::ImageOnly | Outcome::AllButImage => image == 0 || other == 0,
                Outcome::Mixture(_) => image + other < 2,
            };
            if same {
                continue;
            }
            let mut random = Random::new(seed ^ (to_u64(self.at) << 8) ^ outcome.percent());
            let left = self.leave(&cuts, outcome, &mut random);
            counts.cuts += 1;
            left.check(looked, counts).unwrap_or_else(|error| {
                panic!(
                    "{}, seed {seed}, instant {} of {}, {outcome:?} of {image} open changes of the image and {other} \
                     others: {error}",
                    self.recording.format,
                    self.at,
                    self.recording.entries.len(),
                )
            });
        }
    }

    fn leave(&self, cuts: &[Cut], outcome: Outcome, random: &mut Random) -> Left<'_> {
        let files = cuts.iter().enumerate();
        let files = files
            .map(|(file, cut)| cut.image(|_| outcome.fate(file, random)))
            .collect();
        let (mut replica, mut head) = (self.replica.clone(), self.head);
        // The trailer is on its way: it arrives in one half of the cuts.
        if let Some((lineage, log)) = self.sent.filter(|_| random.percent(50)) {
            for piece in log {
                apply(piece, &mut replica);
            }
            head = lineage;
        }
        let arriving = match self.recording.entries.get(self.at + 1) {
            Some(Entry::Hot(change)) => change.apply(&self.hot),
            _ => self.hot.clone(),
        };
        Left {
            format: self.recording.format,
            files,
            told: &self.told,
            replica,
            head,
            hot: [self.hot.clone(), arriving],
        }
    }
}

impl Outcome {
    fn percent(self) -> u64 {
        match self {
            Self::Mixture(percent) => percent,
            _ => 0,
        }
    }

    fn fate(self, file: usize, random: &mut Random) -> Fate {
        let arrived = match self {
            Self::Nothing => false,
            Self::Everything => true,
            Self::ImageOnly => file == IMAGE,
            Self::AllButImage => file != IMAGE,
            Self::Mixture(percent) => {
                if random.percent(30) {
                    // A file system writes its superblock of two sectors in place, and has no answer to one half of it.
                    let units: &[u64] = if file == IMAGE { &[4096] } else { &[512, 4096] };
                    return Fate::Torn {
                        unit: random.pick(units),
                        pieces: random.next(),
                    };
                }
                random.percent(percent)
            }
        };
        if arrived { Fate::Whole } else { Fate::Lost }
    }
}

impl Left<'_> {
    fn check(mut self, looked: &Looked, counts: &mut Counts) -> Result<(), String> {
        let files: Vec<Arc<dyn Storage>> = self
            .files
            .iter()
            .map(|file| Arc::clone(file) as _)
            .collect();
        self.check_image()?;
        let marked = self.marked();
        let disk = open_disk(Arc::clone(&files[IMAGE]), self.format)?;
        let content = read(&*disk).map_err(|error| format!("reading the disk: {error:?}"))?;
        let found = looked.at(&content, counts)?;
        self.told.compare(&found)?;
        counts.told += to_u64(self.told.count());

        let state = Shelf::state(&files);
        let machine = open_machine(disk, Arc::clone(&files[STORE]), &state, "two")?;
        let before = self.replica.clone();
        let sent = self.catch_up(&machine)?;
        self.compare(&before, &content, &marked, &sent)?;
        self.count(&before, &content, &marked, &sent, counts);

        let closed = machine.close(&mut |_| Ok(stamp()));
        closed.map_err(|error| format!("closing: {error:?}"))?;
        self.check_image()
    }

    fn check_image(&self) -> Result<(), String> {
        let image: Arc<dyn Storage> = Arc::clone(&self.files[IMAGE]) as _;
        let report = image::check(&image, self.format);
        if report.is_sound() {
            Ok(())
        } else {
            Err(format!("the checker of images: {report:?}"))
        }
    }

    /// The blocks that are marked in the maps, read without the product.
    fn marked(&self) -> Blocks {
        let mut blocks = vec![false; to_usize(SIZE / BLOCK_BYTES)];
        for map in MAPS {
            let bytes = self.files[map].bytes();
            for (index, block) in blocks.iter_mut().enumerate() {
                *block |= bytes[to_usize(HEADER_BYTES) + index / 8] >> (index % 8) & 1 == 1;
            }
        }
        blocks
    }

    /// The machine meets its replica again and sends all it owes. Returns what that was.
    fn catch_up(&mut self, machine: &Machine) -> Result<Blocks, String> {
        let found = machine
            .reconcile(ReplicaHead::At(self.head))
            .map_err(|error| format!("meeting the replica: {error:?}"))?;
        if found == Reconcile::CopyNeeded {
            return Err("the replica's point is not known".into());
        }
        let state = machine.state();
        if state.resync.is_some() || state.tracking_lost.is_some() {
            return Err(format!("everything is compared again: {state:?}"));
        }
        let mut sent = vec![false; to_usize(SIZE / BLOCK_BYTES)];
        loop {
            match machine.take(Side::Open, machine.open_epoch(), MIB) {
                Ok(Taken::Piece(piece)) => {
                    let blocks = piece.run.blocks();
                    sent[to_usize(blocks.start)..to_usize(blocks.end)].fill(true);
                    apply(&piece, &mut self.replica);
                }
                Ok(Taken::Drained) => return Ok(sent),
                other => return Err(format!("sending what is owed: {other:?}")),
            }
        }
    }

    /// Nothing that differs is missing, and nothing is sent that was neither marked nor hot.
    fn compare(
        &self,
        before: &[u8],
        content: &[u8],
        marked: &Blocks,
        sent: &Blocks,
    ) -> Result<(), String> {
        if let Some(block) = differing(&self.replica, content).position(|differs| differs) {
            let differed = differing(before, content).nth(block);
            return Err(format!(
                "block {block} of region {} differs from the replica's and is not known: sent {}, marked {}, differed \
                 {differed:?}; hot are {:?}",
                to_u64(block) / BLOCKS_PER_REGION,
                sent[block],
                marked[block],
                self.hot,
            ));
        }
        let owed = self.hot.each_ref().map(|hot| {
            let mut owed = marked.clone();
            for (block, owed) in (0..).zip(&mut owed) {
                *owed |= hot.contains(&(block / BLOCKS_PER_REGION));
            }
            owed
        });
        if owed.contains(sent) {
            return Ok(());
        }
        let count = |blocks: &Blocks| blocks.iter().filter(|&&block| block).count();
        Err(format!(
            "{} blocks are sent again, {} are marked, {:?} are marked or hot: {:?}",
            count(sent),
            count(marked),
            owed.each_ref().map(count),
            self.hot
        ))
    }

    fn count(
        &self,
        before: &[u8],
        content: &[u8],
        marked: &Blocks,
        sent: &Blocks,
        counts: &mut Counts,
    ) {
        let hot = to_u64(self.hot[0].len());
        counts.hot += hot;
        counts.hot_max = counts.hot_max.max(hot);
        let mut examined = BTreeSet::new();
        let different = differing(before, content);
        for (block, ((&marked, &sent), different)) in
            marked.iter().zip(sent).zip(different).enumerate()
        {
            counts.marked += u64::from(marked);
            counts.sent += u64::from(sent);
            counts.different += u64::from(different);
            counts.unmarked += u64::from(different && !marked);
            if sent && !marked {
                examined.insert(to_u64(block) / BLOCKS_PER_REGION);
            }
        }
        counts.examined += to_u64(examined.len());
    }
}

/// Block by block, whether two disks differ.
fn differing(one: &[u8], other: &[u8]) -> impl Iterator<Item = bool> {
    let blocks = one.chunks(to_usize(BLOCK_BYTES));
    blocks
        .zip(other.chunks(to_usize(BLOCK_BYTES)))
        .map(|(one, other)| one != other)
}

fn apply(piece: &Piece, disk: &mut [u8]) {
    let run = to_usize(piece.run.offset)..to_usize(piece.run.end());
    match &piece.content {
        PieceContent::Data(bytes) => disk[run].copy_from_slice(bytes),
        PieceContent::Zero => disk[run].fill(0),
    }
}
