//! A host with the images of one machine, tracked while it is the primary.

use std::{collections::BTreeSet, io, sync::Arc};

use understudy::{
    base::{
        checksum::Digest,
        clock::ManualClock,
        ids::{Lineage, MachineId, Name},
        limits::DELTA_FRAMES_MAX,
        units::{BLOCK_BYTES, DiskIndex, Epoch, Extent, to_usize},
    },
    disk::{Access, Disk, Fua, raw::RawDisk},
    protocol::compare::{BlockHash, Differing, Sample, runs_of},
    storage::{
        Storage,
        ledger::Ledger,
        memory::{MemoryFolder, MemoryStorage, Power},
    },
    track::state::StateDir,
    volume::{
        DiskSource, ImageStamp, Machine, MachineOptions, Piece, PieceContent, Side, Taken, forget,
    },
};

pub(crate) type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;
pub(crate) type Runs = Vec<(DiskIndex, Extent)>;
/// Blocks as (disk, index).
pub(crate) type Blocks = BTreeSet<(usize, u64)>;

/// Two disks that do not end at a block.
pub(crate) const SIZES: [u64; 2] = [(3 << 20) + 2560, (1 << 20) + 512];

pub(crate) struct Host {
    pub(crate) power: Arc<Power>,
    pub(crate) images: Vec<Arc<MemoryStorage>>,
    pub(crate) state: StateDir,
    store: Arc<MemoryStorage>,
    boot: u64,
    /// Time of the last change of the images, as their stamp says.
    pub(crate) changed: i64,
    pub(crate) preserve_bytes_max: u64,
    machine: Option<Arc<Machine>>,
}

impl Host {
    /// A host with empty images; its tracking files are in `state`, or in memory on the host's own power.
    pub(crate) fn new(state: Option<StateDir>) -> Self {
        let power = Power::new();
        let images = SIZES.map(|size| {
            let image = MemoryStorage::new(&power);
            image.set_len(size).unwrap();
            image.sync().unwrap();
            image
        });
        Self {
            images: images.into(),
            state: state.unwrap_or_else(|| StateDir::memory(MemoryFolder::new(&power))),
            store: MemoryStorage::new(&power),
            power,
            boot: 1,
            changed: 1,
            preserve_bytes_max: 1 << 20,
            machine: None,
        }
    }

    /// A host that has opened its machine.
    pub(crate) fn running(state: Option<StateDir>) -> Self {
        let mut host = Self::new(state);
        host.start().unwrap();
        host
    }

    pub(crate) fn machine(&self) -> &Arc<Machine> {
        self.machine.as_ref().expect("the machine runs here")
    }

    pub(crate) fn runs(&self) -> bool {
        self.machine.is_some()
    }

    fn ledger(&self) -> Outcome<Arc<Ledger>> {
        let store = Arc::clone(&self.store) as Arc<dyn Storage>;
        Ok(Arc::new(Ledger::open(store)?))
    }

    fn stamp(&self) -> ImageStamp {
        ImageStamp {
            inode: 1,
            bytes: 2,
            modified: (self.changed, 0),
        }
    }

    pub(crate) fn start(&mut self) -> Outcome {
        let disks = self.images.iter().enumerate().map(|(index, image)| {
            let image = Arc::clone(image) as Arc<dyn Storage>;
            Ok(DiskSource {
                name: Name::new(&format!("disk-{index}"))?,
                disk: Arc::new(RawDisk::open(image, Access::ReadWrite)?),
                stamp: self.stamp(),
            })
        });
        let disks = disks.collect::<Outcome<_>>()?;
        let options = MachineOptions {
            id: id(),
            name: Name::new("web-1")?,
            clock: Arc::new(ManualClock::default()),
            boot_id: format!("boot-{}", self.boot),
            preserve_bytes_max: self.preserve_bytes_max,
            hot_regions_max: 2,
            frames_max: DELTA_FRAMES_MAX,
        };
        self.machine = Some(Machine::open(options, disks, &self.state, self.ledger()?)?);
        Ok(())
    }

    /// The process is killed.
    pub(crate) fn kill(&mut self) {
        self.machine = None;
    }

    /// The process ends in good order.
    pub(crate) fn close(&mut self) -> Outcome {
        let machine = self.machine.take().expect("the machine runs here");
        machine.close(&mut |_| Ok(self.stamp()))?;
        Ok(())
    }

    /// Power off and on again; `kept` says of each change that was not synced whether it lasts.
    pub(crate) fn lose_power(&mut self, kept: &mut dyn FnMut() -> bool) -> io::Result<()> {
        self.machine = None;
        self.power.restore(kept);
        self.boot += 1;
        self.state.lose(kept)
    }

    pub(crate) fn boot_again(&mut self) {
        self.machine = None;
        self.boot += 1;
    }

    /// This host is a replica now. What it writes into the images from here on changes their time.
    pub(crate) fn forget(&mut self) -> Outcome {
        self.machine = None;
        forget(&*self.ledger()?, id(), &self.state)?;
        self.changed += 1;
        Ok(())
    }

    pub(crate) fn contents(&self) -> Vec<Vec<u8>> {
        self.images.iter().map(|image| image.bytes()).collect()
    }

    /// The replica's part, by hand.
    pub(crate) fn apply(&self, log: &[Piece]) {
        for piece in log {
            let zeros;
            let bytes = match &piece.content {
                PieceContent::Data(bytes) => &bytes[..],
                PieceContent::Zero => {
                    zeros = vec![0; to_usize(piece.run.len)];
                    &zeros
                }
            };
            let image = &self.images[piece.disk.index()];
            image.write_at(piece.run.offset, bytes, Fua::No).unwrap();
        }
        self.sync();
    }

    /// Makes the images durable without the machine's knowledge.
    pub(crate) fn sync(&self) {
        for image in &self.images {
            image.sync().unwrap();
        }
    }

    pub(crate) fn write(&self, disk: usize, at: u64, len: u64, fill: u8) -> Outcome {
        let bytes = vec![fill; to_usize(len.min(SIZES[disk] - at))];
        self.machine().volumes()[disk].write_at(at, &bytes, Fua::No)?;
        Ok(())
    }
}

pub(crate) fn id() -> MachineId {
    MachineId(uuid::Uuid::from_u128(9))
}

pub(crate) fn point(epoch: u64, chain: u8) -> Lineage {
    Lineage {
        epoch: Epoch(epoch),
        chain: Digest([chain; 32]),
    }
}

/// What a replica that holds these bytes answers to a question.
pub(crate) fn compare(samples: &[Sample], replica: &[Vec<u8>]) -> Differing {
    let mut differing = Differing::default();
    let mut number = 0;
    for sample in samples {
        let run = to_usize(sample.offset)..to_usize(sample.run().end());
        let blocks = replica[sample.disk.index()][run].chunks(4096);
        for (index, block) in blocks.enumerate() {
            let same = match &sample.hashes {
                Some(hashes) => hashes.0[index] == BlockHash::of(block),
                None => block.iter().all(|&byte| byte == 0),
            };
            if !same {
                differing.push(number);
            }
            number += 1;
        }
    }
    differing
}

/// Has all suspects compared with a replica that holds these bytes.
pub(crate) fn sift(machine: &Machine, replica: &[Vec<u8>]) -> Outcome {
    loop {
        let samples = machine.ask()?;
        if samples.is_empty() {
            return Ok(());
        }
        let differing = compare(&samples, replica);
        machine.answered(&runs_of(&samples), &differing).unwrap();
    }
}

/// Has all suspects found to differ.
pub(crate) fn sift_nothing(machine: &Machine) -> Outcome {
    let other = SIZES.map(|size| vec![0xA5; to_usize(size)]);
    sift(machine, &other)
}

/// Everything owed to `epoch`.
pub(crate) fn drain(machine: &Machine, side: Side, epoch: Epoch) -> Outcome<Vec<Piece>> {
    let mut log = Vec::new();
    loop {
        match machine.take(side, epoch, 1 << 20)? {
            Taken::Piece(piece) => log.push(piece),
            Taken::Drained => return Ok(log),
            Taken::Superseded => panic!("{epoch} is not there"),
        }
    }
}

pub(crate) fn run(disk: u16, offset: u64, len: u64) -> (DiskIndex, Extent) {
    (DiskIndex(disk), Extent::new(offset, len))
}

pub(crate) fn blocks_of(runs: &[(DiskIndex, Extent)]) -> Blocks {
    let blocks = runs
        .iter()
        .flat_map(|(disk, run)| run.blocks().map(|block| (disk.index(), block)));
    blocks.collect()
}

pub(crate) fn blocks_in(log: &[Piece]) -> Blocks {
    let runs: Runs = log.iter().map(|piece| (piece.disk, piece.run)).collect();
    blocks_of(&runs)
}

/// The blocks of the regions that `blocks` lie in.
pub(crate) fn regions_of(blocks: &Blocks) -> Blocks {
    let around = |&(disk, block): &(usize, u64)| {
        let first = block / 256 * 256;
        let end = (first + 256).min(SIZES[disk].div_ceil(BLOCK_BYTES));
        (first..end).map(move |block| (disk, block))
    };
    blocks.iter().flat_map(around).collect()
}
