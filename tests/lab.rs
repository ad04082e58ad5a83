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

use std::{env, io::Write as _, time::Instant};

use self::lap::Lab;
use crate::support::{can_mount, have};

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
