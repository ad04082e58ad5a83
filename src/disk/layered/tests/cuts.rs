//! What a power cut leaves of a fold: after every changing call to the layer's file or to the target, for choices of what
//! was unsynced in either. And the death of the process at the same places, with a power cut soon after it.

use std::sync::atomic::AtomicU64;

use super::*;
use crate::{
    disk::enumeration::Random,
    storage::memory::{Fate, Recorder},
};

/// Choices at random for each cut, besides all, none, each alone and all but each.
const RANDOM_CHOICES: usize = 12;

/// Lets a number of changing calls of several files happen; every later call fails.
#[derive(Debug)]
struct Fuse(AtomicU64);

impl Fuse {
    /// Whether a changing call may happen: so, for the last time, or not.
    fn step(&self) -> io::Result<()> {
        let update = |left: u64| left.checked_sub(1);
        let left = self
            .0
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, update);
        left.map(|_| ()).map_err(|_| io::Error::other("blown"))
    }
}

/// A recorder that is cut off with others.
#[derive(Debug)]
struct Fused {
    recorder: Arc<Recorder>,
    fuse: Arc<Fuse>,
}

impl Storage for Fused {
    fn len(&self) -> io::Result<u64> {
        self.recorder.len()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.recorder.read_at(offset, buf)
    }

    fn write_at(&self, offset: u64, buf: &[u8], fua: Fua) -> io::Result<()> {
        let step = self.fuse.step();
        match (&step, fua) {
            // A forced write is cut short: any part of it may be there.
            (Err(_), Fua::Yes) => self.recorder.write_at(offset, buf, Fua::No)?,
            (Err(_), Fua::No) => {}
            (Ok(()), fua) => self.recorder.write_at(offset, buf, fua)?,
        }
        step
    }

    fn zero(&self, run: Extent, space: Space) -> io::Result<()> {
        self.fuse.step()?;
        self.recorder.zero(run, space)
    }

    fn data_after(&self, offset: u64) -> io::Result<Option<Extent>> {
        self.recorder.data_after(offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.fuse.step()?;
        self.recorder.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.fuse.step()?;
        self.recorder.sync()
    }
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Guest(Act),
    FoldInto,
    Fold,
}

/// The whole story of the guest, some of it unflushed, and then a fold with the guest at work on both sides of it.
fn fold_story() -> Vec<Step> {
    use Act::{Flush, Write, Zero};
    use Step::{Fold, FoldInto, Guest};
    let mut steps: Vec<Step> = story().into_iter().map(Guest).collect();
    steps.extend([
        FoldInto,
        Guest(Write(5, 9, 21, Fua::No)),
        Guest(Write(40, 6, 30, Fua::Yes)),
        Fold,
        Guest(Write(2, 8, 22, Fua::No)),
        Guest(Write(2042, 10, 23, Fua::Yes)),
        Guest(Write(9, 1, 31, Fua::Yes)),
        Guest(Flush),
        Guest(Zero(0, 30, Space::Release, Fua::No)),
        Guest(Write(2052, 10, 32, Fua::No)),
        Fold,
        Guest(Write(2046, 6, 24, Fua::No)),
        Guest(Zero(2041, 20, Space::Keep, Fua::Yes)),
        Guest(Write(32762, 12, 25, Fua::Yes)),
        Guest(Zero(32752, 8, Space::Release, Fua::No)),
        Fold,
        Guest(Flush),
        Guest(Write(32764, 18, 26, Fua::No)),
        Guest(Write(SIZE / SECTOR - 1, 1, 27, Fua::Yes)),
        Fold,
        Fold,
        Guest(Write(0, 5, 28, Fua::Yes)),
        Guest(Zero(2040, 12, Space::Release, Fua::No)),
        Guest(Flush),
        Guest(Write(1, 20, 29, Fua::No)),
    ]);
    steps
}

/// The two files, and the fuse before them.
struct Scene {
    fuse: Arc<Fuse>,
    layer: Arc<Recorder>,
    target: Arc<Recorder>,
}

impl Scene {
    fn new(layer: &MemoryStorage, target: &MemoryStorage, steps: u64) -> Self {
        Self {
            fuse: Arc::new(Fuse(steps.into())),
            layer: Recorder::new(layer),
            target: Recorder::new(target),
        }
    }

    fn fused(&self, recorder: &Arc<Recorder>) -> Arc<dyn Storage> {
        Arc::new(Fused {
            recorder: Arc::clone(recorder),
            fuse: Arc::clone(&self.fuse),
        })
    }

    fn open(&self, boot_number: u128) -> Result<LayeredDisk, LayerError> {
        LayeredDisk::open(base(), self.fused(&self.layer), IDENTITY, boot(boot_number))
    }

    fn target(&self) -> Arc<dyn Disk> {
        raw(self.fused(&self.target))
    }

    /// Tells the story up to the first error.
    fn tell(&self) -> Told {
        let disk = self.open(1).unwrap();
        let mut told = Told::default();
        for step in fold_story() {
            let done = match step {
                Step::Guest(act) => told.act(&disk, act),
                Step::FoldInto => {
                    told.folding = true;
                    disk.fold_into(self.target()).is_ok()
                }
                Step::Fold => disk.fold().is_ok(),
            };
            if !done {
                return told;
            }
        }
        assert_eq!(disk.held(), 0, "the story ends with everything folded");
        told.whole = true;
        told
    }

    /// What a power cut may leave now.
    fn images(&self, random: &mut Random) -> Vec<[Arc<MemoryStorage>; 2]> {
        let cut = |recorder: &Recorder| recorder.cuts(recorder.steps()).pop().unwrap();
        let (layer, target) = (cut(&self.layer), cut(&self.target));
        choices(layer.open(), layer.open() + target.open(), random)
            .into_iter()
            .map(|fates| {
                [
                    layer.image(|index| fates[index]),
                    target.image(|index| fates[layer.open() + index]),
                ]
            })
            .collect()
    }
}

/// What became of `count` unsynced changes, the first `layer` of them the layer's.
fn choices(layer: usize, count: usize, random: &mut Random) -> Vec<Vec<Fate>> {
    let of = |kept: &dyn Fn(usize) -> bool| -> Vec<Fate> {
        let fate = |index| if kept(index) { Fate::Whole } else { Fate::Lost };
        (0..count).map(fate).collect()
    };
    let mut chosen = vec![
        of(&|_| true),
        of(&|_| false),
        of(&|index| index < layer),
        of(&|index| index >= layer),
    ];
    for one in 0..count {
        chosen.push(of(&|index| index == one));
        chosen.push(of(&|index| index != one));
    }
    for _ in 0..RANDOM_CHOICES {
        let fates = (0..count).map(|_| match random.below(3) {
            0 => Fate::Lost,
            1 => Fate::Whole,
            _ => Fate::Torn {
                unit: 512,
                pieces: random.below(u64::MAX),
            },
        });
        chosen.push(fates.collect());
    }
    chosen
}

#[derive(Default)]
struct Told {
    /// What is certain, and what the page cache shows.
    certain: Model,
    shown: Model,
    /// A fold began, or may have begun.
    folding: bool,
    whole: bool,
}

impl Told {
    /// Whether it was done.
    fn act(&mut self, disk: &LayeredDisk, act: Act) -> bool {
        self.certain.may(act);
        let mut after = self.shown.clone();
        self.shown.may(act);
        if act.run(disk).is_err() {
            return false;
        }
        after.did(act);
        self.shown = after;
        match act {
            Act::Flush => self.certain = self.shown.clone(),
            _ if act.is_durable() => self.certain.did(act),
            _ => {}
        }
        true
    }
}

/// The layer and the target after a cut: the disk holds what it may, folds on, and keeps what is written meanwhile.
fn go_on(images: &[Arc<MemoryStorage>; 2], told: &Told, what: &str) {
    let scene = Scene::new(&images[0], &images[1], u64::MAX);
    let disk = scene
        .open(2)
        .unwrap_or_else(|error| panic!("{what}: {error}"));
    if !told.folding {
        told.certain.check(&disk, what);
        Model::default().check(&*scene.target(), "the target before any fold");
        return;
    }
    disk.fold_into(scene.target()).unwrap();
    told.certain.check(&disk, what);
    let mut after = Told {
        certain: told.certain.clone(),
        shown: told.certain.clone(),
        ..Told::default()
    };
    assert!(after.act(&disk, Act::Write(5, 9, 77, Fua::Yes)));
    disk.fold().unwrap();
    assert!(after.act(&disk, Act::Write(6, 40, 78, Fua::Yes)));
    assert!(after.act(&disk, Act::Write(2044, 9, 79, Fua::Yes)));
    // All of the unsynced is lost.
    let [_, nothing, ..] = &scene.images(&mut Random(1))[..] else {
        unreachable!("there is a choice of nothing");
    };
    let scene = Scene::new(&nothing[0], &nothing[1], u64::MAX);
    let disk = scene.open(3).unwrap();
    disk.fold_into(scene.target()).unwrap();
    after.certain.check(&disk, what);
    while disk.fold().unwrap().is_some() {}
    assert_eq!(disk.held(), 0, "{what}");
    after.certain.check(&disk, what);
    disk.close().unwrap();
    after.certain.check(&*scene.target(), what);
}

fn files() -> [Arc<MemoryStorage>; 2] {
    let layer = MemoryStorage::new(&Power::new());
    drop(open(&layer, 1).unwrap());
    [layer, image(&Power::new())]
}

#[test]
fn a_power_cut_at_any_step_of_a_fold_leaves_what_was_flushed() {
    let [layer, target] = files();
    let (mut cuts, mut images) = (0, 0);
    for steps in 0.. {
        let scene = Scene::new(&layer, &target, steps);
        let told = scene.tell();
        for (number, left) in scene.images(&mut Random(steps)).iter().enumerate() {
            go_on(
                left,
                &told,
                &format!("cut after step {steps}, choice {number}"),
            );
            images += 1;
        }
        cuts += 1;
        if told.whole {
            break;
        }
    }
    eprintln!("{cuts} cuts, {images} images");
    assert!(cuts > 100, "the cuts reach into the fold: {cuts}");
}

/// The process dies after every step, another one goes on in the same boot with what is in the page cache, and acknowledges
/// a forced write before the power fails as well.
#[test]
fn a_killed_process_leaves_a_fold_that_goes_on() {
    let [layer, target] = files();
    for steps in 0.. {
        let scene = Scene::new(&layer, &target, steps);
        let mut told = scene.tell();
        scene.fuse.0.store(u64::MAX, Ordering::SeqCst);
        let what = format!("killed after step {steps}");
        let disk = scene.open(1).unwrap();
        if told.folding {
            disk.fold_into(scene.target()).unwrap();
        }
        told.shown.check(&disk, &what);
        for start in [7, 40, 2044, 2053, 32762] {
            assert!(told.act(&disk, Act::Write(start, 9, 81, Fua::Yes)));
        }
        for (number, left) in scene.images(&mut Random(steps)).iter().enumerate() {
            go_on(left, &told, &format!("{what}, cut, choice {number}"));
        }
        while told.folding && disk.fold().unwrap().is_some() {}
        told.shown.check(&disk, &what);
        if told.whole {
            break;
        }
    }
}
