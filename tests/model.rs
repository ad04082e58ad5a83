//! A tracked machine and its replica against a model that remembers what all disks held at each cut.
//!
//! The replica of the model is as simple as can be: bytes, and the list of pieces of the log under way. Whatever happens
//! in between (merges, lost acknowledgements, kills, power cuts), a completed epoch applied to it must give exactly what
//! the disks held at its cut. That covers write order across disks, preserved blocks, and that nothing that differs is
//! ever forgotten: a block that tracking lost shows up as a difference at the next completed epoch.
#![expect(
    clippy::unwrap_used,
    reason = "a test panics on what it does not expect"
)]

mod frames;

use std::{collections::BTreeMap, error::Error, sync::Arc};

use proptest::prelude::*;
use understudy::{
    base::{
        checksum::Digest,
        clock::ManualClock,
        ids::{Lineage, MachineId, Name},
        limits::DELTA_FRAMES_MAX,
        units::{Epoch, Extent, to_u64, to_usize},
    },
    disk::{Access, Disk, Fua, Space, raw::RawDisk},
    storage::{
        Storage,
        ledger::Ledger,
        memory::{MemoryFolder, MemoryStorage, Power},
    },
    track::state::StateDir,
    volume::{
        CopyScope, CutRefused, DiskSource, ImageStamp, Machine, MachineOptions, Piece,
        PieceContent, Reconcile, ReplicaHead, Side, Taken,
    },
};

use crate::swap::host::sift;

pub(crate) type Outcome = Result<(), Box<dyn Error>>;

/// Two disks that do not end at a block.
pub(crate) const SIZES: [u64; 2] = [(3 << 20) + 2560, (1 << 20) + 512];

/// What can happen to a machine.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    Write {
        disk: usize,
        at: u64,
        len: u64,
        fill: u8,
        fua: Fua,
    },
    Zero {
        disk: usize,
        at: u64,
        len: u64,
        space: Space,
    },
    Flush {
        disk: usize,
    },
    Trickle {
        count: usize,
        max: u64,
    },
    Cut,
    Take {
        count: usize,
        max: u64,
    },
    /// Drains and sends the trailer; whether the acknowledgement arrives.
    Finish {
        acknowledged: bool,
    },
    Merge,
    Disconnect,
    Maintain,
    Kill,
    Close,
    /// Ends the power after so many steps; what follows fails at some point.
    CutPowerAfter {
        steps: u64,
    },
    /// Power on again; of what was not synced every `kept`-th change lasts.
    PowerOn {
        kept: u64,
    },
}

/// A host with a machine, and the host of its replica.
pub(crate) struct World {
    pub(crate) power: Arc<Power>,
    images: Vec<Arc<MemoryStorage>>,
    store: Arc<MemoryStorage>,
    state: StateDir,
    boot: u64,
    preserve_bytes_max: u64,
    frames_max: u64,
    /// Nothing only between the end of one process and the start of the next.
    machine: Option<Arc<Machine>>,
    truths: BTreeMap<Epoch, Vec<Vec<u8>>>,
    replica: Vec<Vec<u8>>,
    head: ReplicaHead,
    /// Pieces of the log of the closing epoch, or of the open one if none is closing.
    log: Vec<Piece>,
    chains: u8,
    pub(crate) armed: bool,
    pub(crate) finished: usize,
}

impl World {
    pub(crate) fn new(preserve_bytes_max: u64) -> Self {
        Self::with_frames(preserve_bytes_max, DELTA_FRAMES_MAX)
    }

    /// One whose logs have few frames.
    fn with_frames(preserve_bytes_max: u64, frames_max: u64) -> Self {
        let power = Power::new();
        let images = SIZES.map(|size| {
            let image = MemoryStorage::new(&power);
            image.set_len(size).unwrap();
            image.write_at(8192, &[0xEE; 9000], Fua::No).unwrap();
            image.sync().unwrap();
            image
        });
        let mut world = Self {
            images: images.into(),
            store: MemoryStorage::new(&power),
            state: StateDir::memory(MemoryFolder::new(&power)),
            power,
            boot: 1,
            preserve_bytes_max,
            frames_max,
            machine: None,
            truths: BTreeMap::new(),
            replica: SIZES.map(|size| vec![0; to_usize(size)]).into(),
            head: ReplicaHead::Empty,
            log: Vec::new(),
            chains: 0,
            armed: false,
            finished: 0,
        };
        world.start().unwrap();
        world
    }

    pub(crate) fn machine(&self) -> Arc<Machine> {
        Arc::clone(self.machine.as_ref().expect("running"))
    }

    fn start(&mut self) -> Outcome {
        let ledger = Arc::new(Ledger::open(Arc::clone(&self.store) as Arc<dyn Storage>)?);
        let disks = self.images.iter().enumerate().map(|(index, image)| {
            let image = Arc::clone(image) as Arc<dyn Storage>;
            Ok(DiskSource {
                name: Name::new(&format!("disk-{index}"))?,
                disk: Arc::new(RawDisk::open(image, Access::ReadWrite)?),
                stamp: stamp(),
            })
        });
        let options = MachineOptions {
            id: MachineId(uuid::Uuid::from_u128(7)),
            name: Name::new("web-1")?,
            clock: Arc::new(ManualClock::default()),
            boot_id: format!("boot-{}", self.boot),
            preserve_bytes_max: self.preserve_bytes_max,
            hot_regions_max: 2,
            frames_max: self.frames_max,
        };
        let disks = disks.collect::<Result<_, Box<dyn Error>>>()?;
        self.machine = Some(Machine::open(options, disks, &self.state, ledger)?);
        self.connect()
    }

    /// A new connection: what the replica has not completed is gone.
    fn connect(&mut self) -> Outcome {
        self.log.clear();
        if self.machine().reconcile(self.head)? == Reconcile::CopyNeeded {
            let scope = if self.head == ReplicaHead::Empty {
                CopyScope::Allocated
            } else {
                CopyScope::Everything
            };
            self.machine().begin_initial_copy(scope)?;
            self.head = ReplicaHead::Copying;
        }
        Ok(())
    }

    fn contents(&self) -> Vec<Vec<u8>> {
        self.images.iter().map(|image| image.bytes()).collect()
    }

    fn apply(&mut self, pieces: &[Piece]) {
        for piece in pieces {
            let run = to_usize(piece.run.offset)..to_usize(piece.run.end());
            let target = &mut self.replica[piece.disk.index()][run];
            match &piece.content {
                PieceContent::Data(bytes) => target.copy_from_slice(bytes),
                PieceContent::Zero => target.fill(0),
            }
        }
    }

    /// Takes up to `count` pieces; whether the epoch is drained.
    fn take(
        &mut self,
        side: Side,
        epoch: Epoch,
        count: usize,
        max: u64,
    ) -> Result<bool, Box<dyn Error>> {
        let machine = self.machine();
        for _ in 0..count {
            match machine.take(side, epoch, max)? {
                Taken::Piece(piece) => {
                    assert!(piece.run.len <= max.max(4096) && piece.run.len > 0);
                    if epoch == Epoch::INITIAL {
                        self.apply(std::slice::from_ref(&piece));
                        machine.copied(&[(piece.disk, piece.run)]);
                    } else {
                        self.log.push(piece);
                    }
                }
                Taken::Drained => return Ok(true),
                Taken::Superseded => panic!("one thread: {epoch} cannot go away meanwhile"),
            }
        }
        Ok(false)
    }

    fn finish(&mut self, acknowledged: bool) -> Outcome {
        let machine = self.machine();
        let Some(epoch) = machine.closing_epoch() else {
            return Ok(());
        };
        assert!(self.take(Side::Closing, epoch, usize::MAX, 1 << 20)?);
        self.chains = self.chains.wrapping_add(1);
        let lineage = Lineage {
            epoch,
            chain: Digest([self.chains; 32]),
        };
        machine.pending(lineage)?;
        let log = std::mem::take(&mut self.log);
        self.apply(&log);
        self.head = ReplicaHead::At(lineage);
        if epoch != Epoch::INITIAL {
            let truth = &self.truths[&epoch];
            for (disk, (found, want)) in self.replica.iter().zip(truth).enumerate() {
                if let Some(at) = found.iter().zip(want).position(|(a, b)| a != b) {
                    panic!(
                        "epoch {epoch}: disk {disk} differs at {at:#x}: {:#x}, not {:#x}",
                        found[at], want[at]
                    );
                }
            }
            self.finished += 1;
        }
        if acknowledged {
            machine.staged(lineage)?;
            assert_eq!(machine.lineage(), Some(lineage));
            Ok(())
        } else {
            machine.disconnected();
            self.connect()
        }
    }

    /// What may differ is compared first, as the replica would do it.
    fn cut(&mut self) -> Outcome {
        sift(&self.machine(), &self.replica)?;
        match self.machine().cut() {
            Ok(cut) => {
                self.truths.insert(cut.epoch, self.contents());
                Ok(())
            }
            Err(CutRefused::Closing(_) | CutRefused::NoCopy) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn restart(&mut self) -> Outcome {
        self.machine = None;
        self.start()
    }

    pub(crate) fn power_on(&mut self, kept: u64) -> Outcome {
        let mut turn = 0;
        self.power_on_with(&mut || {
            turn += 1;
            kept > 0 && turn % kept == 0
        })
    }

    /// Power on again; `choice` says of each change that was not synced whether it lasts.
    pub(crate) fn power_on_with(&mut self, choice: &mut dyn FnMut() -> bool) -> Outcome {
        self.machine = None;
        self.power.restore(choice);
        self.state.lose(choice)?;
        self.boot += 1;
        self.armed = false;
        self.start()
    }

    /// Does `op`; with the power about to go, or gone, it may fail.
    pub(crate) fn step(&mut self, op: &Op) -> Outcome {
        let machine = self.machine();
        match *op {
            Op::Write {
                disk,
                at,
                len,
                fill,
                fua,
            } => {
                let len = len.min(SIZES[disk] - at);
                machine.volumes()[disk].write_at(at, &vec![fill; to_usize(len)], fua)?;
            }
            Op::Zero {
                disk,
                at,
                len,
                space,
            } => {
                let run = Extent::new(at, len.min(SIZES[disk] - at));
                machine.volumes()[disk].zero(run, space, Fua::No)?;
            }
            Op::Flush { disk } => machine.volumes()[disk].flush()?,
            Op::Trickle { count, max } => {
                let copying = machine.closing_epoch() == Some(Epoch::INITIAL);
                if copying || machine.closing_epoch().is_none() && machine.lineage().is_some() {
                    self.take(Side::Open, machine.open_epoch(), count, max)?;
                } else {
                    // A second log, which a merge drops; here it is dropped at once, as after a slow start.
                    let kept = self.log.len();
                    self.take(Side::Open, machine.open_epoch(), count, max)?;
                    self.log.truncate(kept);
                    let merged = machine.counters().merged_epochs;
                    machine.merge();
                    if machine.counters().merged_epochs == merged {
                        self.log.clear();
                        machine.disconnected();
                    }
                }
            }
            Op::Cut => self.cut()?,
            Op::Take { count, max } => {
                if let Some(epoch) = machine.closing_epoch() {
                    self.take(Side::Closing, epoch, count, max)?;
                }
            }
            Op::Finish { acknowledged } => self.finish(acknowledged)?,
            Op::Merge => machine.merge(),
            Op::Disconnect => {
                machine.disconnected();
                self.connect()?;
            }
            Op::Maintain => machine.maintain()?,
            Op::Kill => {
                drop(machine);
                self.restart()?;
            }
            Op::Close => {
                machine.close(&mut |_| Ok(stamp()))?;
                drop(machine);
                self.restart()?;
            }
            Op::CutPowerAfter { steps } => {
                self.power.cut_after(steps);
                self.armed = true;
            }
            Op::PowerOn { kept } => {
                drop(machine);
                self.power_on(kept)?;
            }
        }
        Ok(())
    }

    /// Lets the replica catch up completely and compares it with the disks as they are now.
    pub(crate) fn settle(&mut self) {
        self.finish(true).unwrap();
        self.cut().unwrap();
        self.finish(true).unwrap();
        assert!(self.replica == self.contents(), "the replica has caught up");
        let counters = self.machine().counters();
        assert_eq!(counters.open_blocks + counters.closing_blocks, 0);
        assert_eq!(counters.preserve_bytes, 0);
    }

    pub(crate) fn run(&mut self, ops: &[Op]) {
        for op in ops {
            if let Err(error) = self.step(op) {
                assert!(self.armed, "{op:?}: {error:?}");
                self.power_on(3).unwrap();
            }
        }
        if self.armed {
            self.power_on(2).unwrap();
        }
        self.settle();
    }
}

fn stamp() -> ImageStamp {
    ImageStamp {
        inode: 1,
        bytes: 2,
        modified: (3, 4),
    }
}

fn place() -> impl Strategy<Value = (usize, u64, u64)> {
    (0..2_usize).prop_flat_map(|disk| {
        let sectors = SIZES[disk] / 512;
        // Often the same few blocks, so that cuts meet rewrites; sometimes anywhere, and long.
        let at =
            prop_oneof![3 => 0..64_u64, 2 => 0..sectors, 1 => Just(sectors - 1), 1 => Just(2040)];
        let len = prop_oneof![4 => 1..32_u64, 1 => 32..4000_u64];
        (
            Just(disk),
            at.prop_map(|at| at * 512),
            len.prop_map(|len| len * 512),
        )
    })
}

fn op() -> impl Strategy<Value = Op> {
    let max = prop_oneof![Just(4096_u64), Just(12288), Just(1 << 20)];
    prop_oneof![
        12 => (place(), any::<u8>(), prop::bool::weighted(0.2)).prop_map(|((disk, at, len), fill, fua)| {
            let fua = if fua { Fua::Yes } else { Fua::No };
            Op::Write { disk, at, len, fill, fua }
        }),
        3 => (place(), any::<bool>()).prop_map(|((disk, at, len), release)| {
            let space = if release { Space::Release } else { Space::Keep };
            Op::Zero { disk, at, len, space }
        }),
        2 => (0..2_usize).prop_map(|disk| Op::Flush { disk }),
        3 => (1..6_usize, max.clone()).prop_map(|(count, max)| Op::Trickle { count, max }),
        6 => Just(Op::Cut),
        4 => (1..6_usize, max).prop_map(|(count, max)| Op::Take { count, max }),
        5 => prop::bool::weighted(0.8).prop_map(|acknowledged| Op::Finish { acknowledged }),
        1 => Just(Op::Merge),
        1 => Just(Op::Disconnect),
        2 => Just(Op::Maintain),
        1 => Just(Op::Kill),
        1 => Just(Op::Close),
        1 => (0..40_u64).prop_map(|steps| Op::CutPowerAfter { steps }),
        1 => (0..4_u64).prop_map(|kept| Op::PowerOn { kept }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn every_completed_epoch_is_what_all_disks_held_at_its_cut(
        ops in prop::collection::vec(op(), 1..60),
        preserve_blocks in prop_oneof![Just(0_u64), Just(6), Just(4000)],
        frames_max in prop_oneof![3 => Just(DELTA_FRAMES_MAX), 1 => Just(4), 1 => Just(32)],
    ) {
        World::with_frames(preserve_blocks * (4096 + 128), frames_max).run(&ops);
    }
}

/// The side store has room for two blocks; the guest rewrites five of a cut epoch. It goes on, the epoch is merged, and
/// the log goes on as that of the next one.
#[test]
fn a_full_side_store_merges_the_epoch_and_the_guest_goes_on() {
    let mut world = World::new(2 * (4096 + 128));
    let write = |fill| Op::Write {
        disk: 0,
        at: 0,
        len: 5 * 4096,
        fill,
        fua: Fua::No,
    };
    for op in [
        Op::Finish { acknowledged: true },
        write(1),
        Op::Cut,
        Op::Take {
            count: 1,
            max: 4096,
        },
        write(2),
    ] {
        world.step(&op).unwrap();
    }
    let machine = world.machine();
    assert_eq!(machine.counters().merged_epochs, 1);
    assert_eq!(
        (machine.closing_epoch(), machine.open_epoch()),
        (None, Epoch(2))
    );
    assert_eq!(
        machine.take(Side::Closing, Epoch(1), 4096).unwrap(),
        Taken::Superseded,
        "the sender must not take this for the end of epoch 1"
    );
    let late = Lineage {
        epoch: Epoch(1),
        chain: Digest([9; 32]),
    };
    assert!(machine.pending(late).is_err() && machine.staged(late).is_err());
    drop(machine);
    world.settle();
    assert_eq!(world.finished, 1);
}

/// A discard of blocks that were cut and not sent keeps what they held; holes are kept without memory.
#[test]
fn a_discard_after_the_cut_belongs_to_the_next_epoch() {
    let mut world = World::new(64 * 4096);
    let zero = |at, len| Op::Zero {
        disk: 0,
        at,
        len,
        space: Space::Release,
    };
    for op in [
        Op::Finish { acknowledged: true },
        Op::Write {
            disk: 0,
            at: 0,
            len: 4096,
            fill: 5,
            fua: Fua::No,
        },
        zero(1 << 20, 1 << 20),
        Op::Cut,
        zero(0, 3 << 20),
    ] {
        world.step(&op).unwrap();
    }
    let counters = world.machine().counters();
    assert_eq!(counters.merged_epochs, 0);
    assert_eq!(counters.preserved_blocks, 257);
    assert_eq!(counters.preserve_bytes, 4096 + 257 * 128);
    world.settle();
    assert_eq!(to_u64(world.finished), 2);
}
