//! The frames of a log, which are few however much is owed.

use super::*;

/// Most frames of a log here.
const FRAMES_MAX: u64 = 64;

impl World {
    /// A machine whose initial copy is done.
    fn copied() -> Self {
        let mut world = Self::with_frames(1 << 20, FRAMES_MAX);
        world.finish(true).unwrap();
        world
    }

    /// Writes a block, or punches a hole where it is.
    fn put(&mut self, disk: usize, block: u64, fill: Option<u8>) {
        let (at, len) = (block * 4096, 4096);
        let op = match fill {
            Some(fill) => Op::Write {
                disk,
                at,
                len,
                fill,
                fua: Fua::No,
            },
            None => Op::Zero {
                disk,
                at,
                len,
                space: Space::Release,
            },
        };
        self.step(&op).unwrap();
    }

    /// Takes all that is owed to one side; the frames that the log has then.
    fn frames(&mut self, side: Side) -> u64 {
        let machine = self.machine();
        let epoch = match side {
            Side::Open => machine.open_epoch(),
            Side::Closing => machine.closing_epoch().unwrap(),
        };
        assert!(self.take(side, epoch, usize::MAX, 1 << 20).unwrap());
        to_u64(self.log.len())
    }
}

/// After an outage more single blocks may be owed than a log may have frames. Neighbours are joined, what lies between them
/// is as of the cut like all else, and not too much is sent ahead.
#[test]
fn a_log_of_very_many_single_blocks_has_few_frames() {
    for ahead in [false, true] {
        let mut world = World::copied();
        for (disk, size) in SIZES.into_iter().enumerate() {
            for block in (0..size / 4096).step_by(2 + disk) {
                world.put(disk, block, Some(7));
            }
        }
        let owed = world.machine().counters().owed_open_blocks;
        assert!(owed > 4 * FRAMES_MAX, "{owed}");
        if ahead {
            assert!(world.frames(Side::Open) <= FRAMES_MAX / 4 + 1);
        }
        world.cut().unwrap();
        // Into blocks that nobody had written before the cut, too.
        for block in 20..40 {
            world.put(0, block, Some(8));
        }
        let frames = world.frames(Side::Closing);
        assert!(frames <= FRAMES_MAX, "{frames}, ahead: {ahead}");
        world.settle();
        assert_eq!(world.finished, 2);
    }
}

/// The same of one long run in which every other block is a hole.
#[test]
fn a_log_of_very_many_holes_has_few_frames() {
    let mut world = World::copied();
    for block in 0..SIZES[0] / 4096 {
        world.put(0, block, (block % 2 == 0).then_some(7));
    }
    world.cut().unwrap();
    let frames = world.frames(Side::Closing);
    assert!(frames <= FRAMES_MAX, "{frames}");
    let is_hole = |piece: &Piece| piece.content == PieceContent::Zero;
    assert!(world.log.iter().any(is_hole), "as long as there are few");
    world.settle();
}
