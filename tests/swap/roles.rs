//! Two hosts swap the roles of a machine, planned and unplanned, at random: every epoch that completes gives the replica
//! exactly what the primary's disks held at its cut, on whichever host they are.
//!
//! The hosts meet as nodes would: the replica's part is done by hand, on plain images. A former primary may have died, lost
//! power, or written on for a while; it comes back with what it knows, and the first epoch makes it equal.

use std::collections::VecDeque;

use proptest::prelude::*;
use understudy::{
    base::{
        ids::Lineage,
        units::{Epoch, Extent},
    },
    disk::{Disk, Fua, Space},
    protocol::compare::{Differing, runs_of},
    storage::Storage,
    volume::{
        MachineError, Piece, Reconcile, ReplicaHead, ResyncReason, Side, Standing, Taken,
        Verification, Verify,
    },
};

use super::host::{Host, Outcome, Runs, SIZES, compare, drain, point};

#[derive(Clone, Debug)]
struct Change {
    disk: usize,
    at: u64,
    len: u64,
    /// Nothing: a discard.
    fill: Option<u8>,
}

/// How a process ends.
#[derive(Clone, Copy, Debug)]
enum End {
    Not,
    Killed,
    /// Every so-maniest change that was not synced lasts.
    PowerCut(u64),
}

#[derive(Clone, Copy, Debug)]
enum Reply {
    Staged,
    /// The connection breaks before it; a new one stands at once.
    Lost,
    /// The connection breaks before it and stays away.
    LinkDown,
}

#[derive(Clone, Debug)]
enum Op {
    Write(Change),
    Cut,
    Take(usize),
    /// Sends so many pieces of the open epoch ahead of its cut.
    Ahead(usize),
    /// Asks the replica about some suspects.
    Ask,
    /// The oldest question is answered.
    Answer,
    /// Some blocks are compared with the point that the machine names: they are equal, whatever happened.
    Verify,
    /// Everything is asked and answered.
    Sift,
    /// An operator wants everything compared.
    Demand,
    Finish(Reply),
    Reconnect,
    Maintain,
    Restart(End),
    /// The steps of the last promotion are done once more.
    Again,
    Planned,
    /// The replica is promoted that many points back from its head.
    Unplanned {
        back: usize,
        old: End,
    },
    /// The former primary has not heard of it and writes on.
    Straggle(Change),
    /// The former primary comes back, after this.
    Return {
        old: End,
        greeted_first: bool,
    },
}

/// A point that the replica holds.
struct Point {
    lineage: Lineage,
    disks: Vec<Vec<u8>>,
    /// The extents of the log that led to it.
    log: Runs,
}

struct World {
    hosts: [Host; 2],
    primary: usize,
    /// Whether the other host is a former primary that has not come back.
    away: bool,
    linked: bool,
    /// What the replica continued. Of an unplanned swap it is no point of the replica's.
    base: Lineage,
    points: Vec<Point>,
    /// The epoch of the last cut and what the disks held at it.
    truth: (Epoch, Vec<Vec<u8>>),
    log: Vec<Piece>,
    /// Questions on the way, and what the replica will say.
    asked: VecDeque<(Runs, Differing)>,
    verification: Option<Verification>,
    /// Questions of verifications.
    verified: usize,
    told: Runs,
    chain: u8,
    swaps: usize,
}

impl World {
    fn new(preserve_bytes_max: u64) -> Self {
        let mut hosts = [Host::new(None), Host::new(None)];
        for host in &mut hosts {
            host.preserve_bytes_max = preserve_bytes_max;
        }
        let disks = hosts[0].contents();
        let mut world = Self {
            hosts,
            primary: 0,
            away: false,
            linked: true,
            base: point(0, 0),
            points: Vec::new(),
            truth: (Epoch(0), disks),
            log: Vec::new(),
            asked: VecDeque::new(),
            verification: None,
            verified: 0,
            told: Vec::new(),
            chain: 0,
            swaps: 0,
        };
        world.promote(0, point(0, 0), Vec::new());
        world
    }

    fn host(&self) -> &Host {
        &self.hosts[self.primary]
    }

    fn other(&mut self) -> &mut Host {
        &mut self.hosts[1 - self.primary]
    }

    fn head(&self) -> Lineage {
        self.points.last().map_or(self.base, |point| point.lineage)
    }

    /// The host begins anew as primary at `point`.
    fn promote(&mut self, host: usize, point: Lineage, runs: Runs) {
        self.primary = host;
        self.base = point;
        self.told = runs;
        self.log.clear();
        self.asked.clear();
        let host = &mut self.hosts[host];
        host.start().unwrap();
        let machine = host.machine();
        assert_eq!(machine.state().standing, Standing::Unprotected);
        assert_eq!(machine.state().resync, None);
        machine.continue_from(point, &self.told).unwrap();
    }

    fn connect(&mut self) {
        self.log.clear();
        self.asked.clear();
        let head = self.head();
        let met = self.host().machine().reconcile(ReplicaHead::At(head));
        let met = met.unwrap();
        assert!(
            matches!(met, Reconcile::InStep | Reconcile::AckLost),
            "the whole disks would have to be sent: {met:?}"
        );
        self.linked = true;
    }

    fn finish(&mut self, reply: Reply) -> Outcome {
        let Some(epoch) = self.host().machine().closing_epoch() else {
            return Ok(());
        };
        let rest = drain(self.host().machine(), Side::Closing, epoch)?;
        let mut log = std::mem::take(&mut self.log);
        log.extend(rest);
        self.chain = self.chain.wrapping_add(1);
        let lineage = point(epoch.0, self.chain);
        self.host().machine().pending(lineage)?;
        self.other().apply(&log);
        assert_eq!(self.truth.0, epoch);
        let found = self.other().contents();
        for (disk, (found, want)) in found.iter().zip(&self.truth.1).enumerate() {
            let differs = found.iter().zip(want).position(|(a, b)| a != b);
            assert_eq!(differs, None, "{epoch}: where disk {disk} differs");
        }
        self.points.push(Point {
            lineage,
            disks: found,
            log: log.iter().map(|piece| (piece.disk, piece.run)).collect(),
        });
        match reply {
            Reply::Staged => self.host().machine().staged(lineage)?,
            Reply::Lost => {
                self.host().machine().disconnected();
                self.connect();
            }
            Reply::LinkDown => self.linked = false,
        }
        Ok(())
    }

    fn ask(&mut self) -> Outcome {
        let samples = self.host().machine().ask()?;
        if !samples.is_empty() {
            let held = self.hosts[1 - self.primary].contents();
            let answer = compare(&samples, &held);
            self.asked.push_back((runs_of(&samples), answer));
        }
        Ok(())
    }

    fn answer(&mut self) {
        if let Some((runs, differing)) = self.asked.pop_front() {
            let sifted = self.host().machine().answered(&runs, &differing);
            sifted.expect("an answer about as many blocks");
        }
    }

    fn verify(&mut self) -> Outcome {
        let running = self.verification.take().map_or_else(
            || self.host().machine().verification(),
            Ok::<_, MachineError>,
        );
        let mut running = running?;
        let next = self.host().machine().verify(&mut running)?;
        if let Verify::Ask(at, samples) = &next
            && let Some(point) = self.points.iter().find(|point| point.lineage == *at)
        {
            let differing = compare(samples, &point.disks);
            assert_eq!(differing, Differing::default(), "a false alarm at {at:?}");
            self.verified += 1;
        }
        self.verification = (next != Verify::Done).then_some(running);
        Ok(())
    }

    /// Compares all suspects, so that a cut is possible.
    fn sift(&mut self) -> Outcome {
        while self.host().machine().counters().suspect_blocks > 0 {
            self.ask()?;
            self.answer();
        }
        Ok(())
    }

    fn cut(&mut self) {
        if let Ok(cut) = self.host().machine().cut() {
            self.truth = (cut.epoch, self.host().contents());
        }
    }

    fn planned(&mut self) -> Outcome {
        self.finish(Reply::Staged)?;
        self.sift()?;
        self.cut();
        self.finish(Reply::Staged)?;
        let head = self.head();
        assert_eq!(self.host().machine().at_rest(), Some(head));
        assert!(self.hosts[0].contents() == self.hosts[1].contents());
        let old = self.primary;
        self.hosts[old].close()?;
        self.hosts[old].forget()?;
        self.promote(1 - old, head, Vec::new());
        let kept = self.points.pop();
        self.points = kept.into_iter().collect();
        assert_eq!(self.host().machine().at_rest(), Some(head));
        self.swaps += 1;
        Ok(())
    }

    fn unplanned(&mut self, back: usize, end: End) -> Outcome {
        let Some(newest) = self.points.len().checked_sub(1) else {
            return Ok(());
        };
        let past = self.points.split_off(newest.saturating_sub(back) + 1);
        let rolled_back = past.into_iter().flat_map(|point| point.log).collect();
        let chosen = self.points.pop().expect("at least the oldest is left");
        let old = self.primary;
        match end {
            End::Not => {}
            End::Killed => self.hosts[old].kill(),
            End::PowerCut(kept) => lose_power(&mut self.hosts[old], kept)?,
        }
        for (image, bytes) in self.hosts[1 - old].images.iter().zip(&chosen.disks) {
            image.write_at(0, bytes, Fua::No)?;
            image.sync()?;
        }
        self.points.clear();
        self.promote(1 - old, chosen.lineage, rolled_back);
        self.away = true;
        self.swaps += 1;
        Ok(())
    }

    fn come_back(&mut self, end: End, greeted_first: bool) -> Outcome {
        restart(self.other(), end)?;
        if !self.other().runs() {
            self.other().start()?;
        }
        let differs = self.other().machine().divergence();
        self.away = false;
        if greeted_first {
            self.connect();
        }
        let machine = self.host().machine();
        machine.suspect(&differs, ResyncReason::Reversed)?;
        self.told.extend(differs);
        self.other().forget()?;
        if !greeted_first {
            self.connect();
        }
        Ok(())
    }

    fn step(&mut self, op: &Op) -> Outcome {
        let meets = self.linked && !self.away;
        match *op {
            Op::Write(ref change) => make(self.host(), change)?,
            Op::Cut => self.cut(),
            Op::Take(count) if meets => {
                let machine = self.host().machine().clone();
                let Some(epoch) = machine.closing_epoch() else {
                    return Ok(());
                };
                for _ in 0..count {
                    if let Taken::Piece(piece) = machine.take(Side::Closing, epoch, 12288)? {
                        self.log.push(piece);
                    }
                }
            }
            Op::Ahead(count) if meets => {
                let machine = self.host().machine().clone();
                for _ in 0..count {
                    if machine.closing_epoch().is_none()
                        && let Taken::Piece(piece) =
                            machine.take(Side::Open, machine.open_epoch(), 12288)?
                    {
                        self.log.push(piece);
                    }
                }
            }
            Op::Ask if meets => self.ask()?,
            Op::Verify => self.verify()?,
            Op::Sift if meets => self.sift()?,
            Op::Answer if meets => self.answer(),
            Op::Demand => match self.host().machine().demand_resync() {
                Err(MachineError::Resyncing(_)) => {}
                demanded => demanded?,
            },
            Op::Finish(reply) if meets => self.finish(reply)?,
            Op::Reconnect if !self.away => {
                self.host().machine().disconnected();
                self.connect();
            }
            Op::Maintain => self.host().machine().maintain()?,
            Op::Restart(end) => {
                let primary = self.primary;
                restart(&mut self.hosts[primary], end)?;
                if meets {
                    self.connect();
                }
            }
            Op::Again => {
                let machine = self.host().machine();
                machine.continue_from(self.base, &self.told)?;
                machine.suspect(&self.told, ResyncReason::Reversed)?;
            }
            Op::Planned if meets => self.planned()?,
            Op::Unplanned { back, old } if !self.away => self.unplanned(back, old)?,
            Op::Straggle(ref change) if self.away && self.other().runs() => {
                make(self.other(), change)?;
            }
            Op::Return { old, greeted_first } if self.away => {
                self.come_back(old, greeted_first)?;
            }
            _ => {}
        }
        Ok(())
    }

    fn run(&mut self, ops: &[Op]) {
        for op in ops {
            self.step(op)
                .unwrap_or_else(|error| panic!("{op:?}: {error:?}"));
        }
        if self.away {
            self.come_back(End::Not, true).unwrap();
        }
        self.connect();
        for _ in 0..2 {
            self.finish(Reply::Staged).unwrap();
            self.sift().unwrap();
            self.cut();
        }
        self.finish(Reply::Staged).unwrap();
        assert!(self.hosts[0].contents() == self.hosts[1].contents());
        assert_eq!(self.host().machine().at_rest(), Some(self.head()));
    }
}

fn make(host: &Host, change: &Change) -> Outcome {
    if let Some(fill) = change.fill {
        return host.write(change.disk, change.at, change.len, fill);
    }
    let len = change.len.min(SIZES[change.disk] - change.at);
    let volume = &host.machine().volumes()[change.disk];
    Ok(volume.zero(Extent::new(change.at, len), Space::Release, Fua::No)?)
}

fn lose_power(host: &mut Host, kept: u64) -> Outcome {
    let mut turn = 0;
    host.lose_power(&mut || {
        turn += 1;
        kept > 0 && turn % kept == 0
    })?;
    Ok(())
}

fn restart(host: &mut Host, end: End) -> Outcome {
    match end {
        End::Not => return Ok(()),
        End::Killed => host.kill(),
        End::PowerCut(kept) => lose_power(host, kept)?,
    }
    host.start()
}

fn change() -> impl Strategy<Value = Change> {
    (0..2_usize).prop_flat_map(|disk| {
        let sectors = SIZES[disk] / 512;
        let at = prop_oneof![3 => 0..64_u64, 2 => 0..sectors, 1 => Just(sectors - 1)];
        let len = prop_oneof![5 => 1..32_u64, 1 => 32..2000_u64];
        let fill = prop::option::weighted(0.85, any::<u8>());
        (at, len, fill).prop_map(move |(at, len, fill)| Change {
            disk,
            at: at * 512,
            len: len * 512,
            fill,
        })
    })
}

fn end() -> impl Strategy<Value = End> {
    prop_oneof![
        Just(End::Not),
        Just(End::Killed),
        (0..4_u64).prop_map(End::PowerCut)
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let reply = prop_oneof![
        6 => Just(Reply::Staged),
        1 => Just(Reply::Lost),
        1 => Just(Reply::LinkDown),
    ];
    prop_oneof![
        10 => change().prop_map(Op::Write),
        5 => Just(Op::Cut),
        2 => (1..4_usize).prop_map(Op::Take),
        2 => (1..4_usize).prop_map(Op::Ahead),
        3 => Just(Op::Ask),
        3 => Just(Op::Answer),
        2 => Just(Op::Sift),
        4 => Just(Op::Verify),
        1 => Just(Op::Demand),
        5 => reply.prop_map(Op::Finish),
        1 => Just(Op::Reconnect),
        1 => Just(Op::Maintain),
        2 => end().prop_map(Op::Restart),
        1 => Just(Op::Again),
        1 => Just(Op::Planned),
        2 => (0..3_usize, end()).prop_map(|(back, old)| Op::Unplanned { back, old }),
        3 => change().prop_map(Op::Straggle),
        2 => (end(), any::<bool>()).prop_map(|(old, greeted_first)| Op::Return { old, greeted_first }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn hosts_that_swap_roles_end_equal(
        ops in prop::collection::vec(op(), 1..80),
        preserve_blocks in prop_oneof![Just(0_u64), Just(6), Just(4000)],
    ) {
        World::new(preserve_blocks * (4096 + 128)).run(&ops);
    }
}

/// There and back, several times, in each way a primary can end, from the newest point and from older ones.
#[test]
fn a_machine_goes_there_and_back_from_any_point() {
    let write = |at, fill| {
        Op::Write(Change {
            disk: 0,
            at,
            len: 4096,
            fill: Some(fill),
        })
    };
    let staged = || [Op::Cut, Op::Finish(Reply::Staged)];
    let mut ops = Vec::new();
    let mut fill = 0;
    for old in [End::Not, End::Killed, End::PowerCut(0), End::PowerCut(2)] {
        for back in 0..3 {
            for at in 0..3 {
                fill += 1;
                ops.push(write(at * (1 << 20), fill));
                ops.extend(staged());
                ops.push(Op::Verify);
            }
            // One block in the open epoch, one in a closing epoch, and one that the primary writes when it is none.
            ops.push(write(40_960, fill));
            ops.push(Op::Cut);
            ops.push(write(81_920, fill));
            ops.push(Op::Unplanned { back, old });
            ops.push(Op::Straggle(Change {
                disk: 1,
                at: 4096,
                len: 512,
                fill: Some(fill),
            }));
            ops.push(write(122_880, fill));
            ops.push(Op::Cut);
            ops.push(Op::Restart(End::PowerCut(0)));
            ops.push(Op::Return {
                old,
                greeted_first: back == 1,
            });
            ops.push(Op::Restart(End::PowerCut(0)));
            ops.extend(staged());
            ops.push(Op::Planned);
        }
    }
    let mut world = World::new(1 << 20);
    world.run(&ops);
    assert_eq!(world.swaps, 24);
    assert!(world.verified > 10, "{}", world.verified);
}
