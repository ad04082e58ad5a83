//! The fault lab: real processes under verified load, with deaths, bad links, full disks and wrong clocks. See
//! `tests/README.md`.
//!
//! `UNDERSTUDY_LAPS` says how many laps are run, `UNDERSTUDY_SEED` what they are drawn from; `scripts/fault-lab` sets both.

mod fault;
mod guest;
mod history;
mod lap;
mod moves;
mod network;
mod stage;

use std::{env, fs, io::Write as _, slice, time::Instant};

use nix::fcntl::OFlag;

use self::{history::History, lap::Lab};
use crate::support::{BLOCK, can_mount, have, open_direct, scratch, sparse_file};

/// Laps of an ordinary run of the tests.
const LAPS: u64 = 30;

fn number(name: &str) -> Option<u64> {
    let text = env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name} is a number, not {text:?}")),
    )
}

fn tell(text: &str) {
    writeln!(std::io::stderr(), "{text}").expect("the test's own output takes a line");
}

/// Says where a lap failed and keeps its folder, whatever panics.
struct Teller {
    lab: Lab,
    seed: u64,
    lap: u64,
}

impl Drop for Teller {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let (seed, lap) = (self.seed, self.lap);
        let folder = self.lab.stage.keep().display().to_string();
        tell(&format!("lap {lap} of seed {seed}: {}", self.lab.plan));
        tell(&format!("its folders are kept in {folder}"));
        tell(&format!(
            "the same faults again: scripts/fault-lab --seed {seed} --laps {lap}"
        ));
    }
}

#[test]
fn every_lap_keeps_the_promises() {
    if !can_mount() || !have(&["mkfs.ext4", "mount", "losetup"]) {
        return;
    }
    let laps = number("UNDERSTUDY_LAPS").unwrap_or(LAPS);
    let seed = number("UNDERSTUDY_SEED").unwrap_or(1);
    let began = Instant::now();
    let mut teller = Teller {
        lab: Lab::new(seed),
        seed,
        lap: 0,
    };
    for lap in 1..=laps {
        teller.lap = lap;
        let began = Instant::now();
        teller.lab.lap();
        tell(&format!(
            "lap {lap}, {:.1} s: {}",
            began.elapsed().as_secs_f32(),
            teller.lab.plan
        ));
    }
    tell(&format!(
        "{laps} laps of seed {seed} in {} s",
        began.elapsed().as_secs()
    ));
    for (what, times) in &teller.lab.counts {
        tell(&format!("{times:>14}  {what}"));
    }
}

/// What the laps are judged by bites: an earlier state is known as such, a mixture of two is none, nor is a block that is
/// in another's place or half of one.
#[test]
fn a_view_that_is_no_prefix_is_noticed() {
    let folder = scratch();
    let path = folder.path().join("disk");
    sparse_file(&path, 4 << 20);
    let disk = open_direct(&path, OFlag::empty()).unwrap();
    let mut history = History::new(1, &[1024], 7);
    let write = |history: &mut History| {
        for _ in 0..50 {
            history.write(slice::from_ref(&disk)).unwrap();
        }
        fs::read(&path).unwrap()
    };
    let (early, late) = (write(&mut history), write(&mut history));
    let view = folder.path().join("view");
    let seen = |bytes: &[u8]| {
        fs::write(&view, bytes).unwrap();
        history.seen(slice::from_ref(&view))
    };
    let shown = seen(&early).unwrap();
    assert_eq!(shown.last, 50);
    assert!(history.holds(shown, 50) && !history.holds(shown, 51));
    assert!(history.holds(seen(&late).unwrap(), 100));

    let differing = |one: &[u8], other: &[u8]| {
        let mut blocks = one.chunks(BLOCK).zip(other.chunks(BLOCK));
        blocks.position(|(one, other)| one != other).unwrap() * BLOCK
    };
    let at = differing(&early, &late);
    let mut mixed = late.clone();
    mixed[at..at + BLOCK].copy_from_slice(&early[at..at + BLOCK]);
    assert!(seen(&mixed).unwrap_err().contains("1 blocks are wrong"));
    let mut torn = late.clone();
    torn[at..at + BLOCK / 2].copy_from_slice(&early[at..at + BLOCK / 2]);
    assert!(seen(&torn).unwrap_err().contains("is not whole"));
    let mut moved = late.clone();
    moved.copy_within(at..at + BLOCK, (at + 8 * BLOCK) % late.len());
    assert!(seen(&moved).unwrap_err().contains("is not whole"));
}
