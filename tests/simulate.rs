//! The deterministic simulator: many seeds, each a whole life of two hosts and their machine. See `tests/README.md`.
//!
//! `UNDERSTUDY_SEED` replays one seed, `UNDERSTUDY_SEEDS` says how many are tried, `UNDERSTUDY_SEEDS_FROM` where they begin.

use std::{env, io::Write};

use understudy::testing::{Bug, Report, run};

/// Seeds of an ordinary run of the tests: what fits beside the other tests.
const SEEDS: u64 = 1000;
/// Seeds within which a bug that was built in must be noticed.
const SEEDS_TO_NOTICE: u64 = 2000;

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

#[test]
fn every_seed_keeps_the_promises() {
    let from = number("UNDERSTUDY_SEEDS_FROM").unwrap_or(0);
    let seeds = number("UNDERSTUDY_SEEDS").unwrap_or(SEEDS);
    let mut sum = Report::default();
    for seed in from..from + seeds {
        match run(seed, None) {
            Ok(report) => sum.add(&report),
            Err(failure) => panic!("{failure}"),
        }
    }
    tell(&format!("{seeds} seeds from {from}: {sum:?}"));
    // Each kind of misfortune happened; otherwise the promises were kept by nobody trying.
    for count in [
        sum.epochs,
        sum.merged,
        sum.kills,
        sum.power_cuts,
        sum.links_lost,
        sum.faults,
        sum.views,
        sum.rescues,
        sum.tests,
        sum.planned,
        sum.commits,
        sum.cancels,
        sum.reversals,
        sum.jobs_ended,
        sum.coordinator_deaths,
        sum.flips_told,
    ] {
        assert!(count > 0, "{sum:?}");
    }
}

/// Seeds that found a fault when they were run first, beyond those that every run of the tests begins with.
#[test]
fn what_was_found_once_is_not_found_again() {
    for seed in [
        21_855, 51_943, 235_556, 408_263, 434_436, 487_729, 748_053, 886_752, 945_557,
    ] {
        if let Err(failure) = run(seed, None) {
            panic!("{failure}");
        }
    }
}

/// One seed, twice: it is kept, and both runs are the same to the last call.
#[test]
fn replay() {
    let seed = number("UNDERSTUDY_SEED").unwrap_or(1);
    let [first, second] = [run(seed, None), run(seed, None)];
    assert_eq!(first, second, "equal seeds give equal runs");
    match first {
        Ok(report) => tell(&format!("seed {seed}: {report:?}")),
        Err(failure) => panic!("{failure}"),
    }
}

/// The oracle bites: what it says of each bug, and in which seed.
#[test]
fn each_bug_that_is_built_in_is_noticed() {
    for bug in Bug::ALL {
        let noticed = (0..SEEDS_TO_NOTICE).find_map(|seed| run(seed, Some(bug)).err());
        let failure = noticed.unwrap_or_else(|| panic!("nobody noticed {bug:?}"));
        tell(&format!("{bug:?}: seed {}: {}", failure.seed, failure.what));
    }
}
