//! The fuzz targets on stable, as properties: a few hundred inputs each, around the seeds and out of nothing, and every
//! file of the committed corpus. `scripts/fuzz` runs the same bodies for as long as wanted; see `tests/fuzz`.

use std::{fs, path::Path};

use proptest::{
    collection::vec,
    prelude::*,
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};

use self::bodies::{TARGETS, Target, target};

mod bodies;

/// Inputs for each target.
const CASES: u32 = 300;

/// Bytes out of nothing, or a seed of which some are changed.
fn inputs(seeds: Vec<Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
    let changes = vec((any::<prop::sample::Index>(), any::<u8>()), 0..8);
    let near = (prop::sample::select(seeds), changes).prop_map(|(mut input, changes)| {
        for (at, byte) in changes {
            let at = at.index(input.len());
            input[at] = byte;
        }
        input
    });
    prop_oneof![1 => vec(any::<u8>(), 0..400), 2 => near]
}

/// Runs seeds, corpus and properties of one target.
fn check(target: &Target) {
    for seed in target.seeds() {
        target.run(&seed);
    }
    let config = Config {
        cases: CASES,
        failure_persistence: None,
        ..Config::default()
    };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(config, rng);
    let outcome = runner.run(&inputs(target.seeds()), |input| {
        target.run(&input);
        Ok(())
    });
    outcome.unwrap();
}

#[test]
fn any_bytes_open_as_vhdx_or_do_not() {
    check(target("vhdx_open"));
}

#[test]
fn changed_vhdx_images_open_or_do_not() {
    check(target("vhdx_structured"));
}

#[test]
fn any_vhdx_log_is_replayed_or_refused() {
    check(target("vhdx_log"));
}

#[test]
fn any_vhd_opens_or_does_not() {
    check(target("vhd"));
}

#[test]
fn any_delta_log_is_decoded_or_refused() {
    check(target("delta"));
}

/// Inputs that reached something new, and those that once failed.
#[test]
fn the_corpus_holds() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus");
    for target in TARGETS {
        let mut files = 0;
        for entry in fs::read_dir(corpus.join(target.name)).unwrap() {
            let path = entry.unwrap().path();
            eprintln!("{}", path.display());
            target.run(&fs::read(path).unwrap());
            files += 1;
        }
        assert!(files > 0, "{} has no corpus", target.name);
    }
}
