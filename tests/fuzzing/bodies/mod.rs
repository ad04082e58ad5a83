//! What the fuzz targets do with an input, in one place: `tests/fuzz` runs these under cargo-fuzz, and the properties next
//! door run them on stable.
//!
//! Reading order: `plan` reads an input, `sparse` is a file, `exercise` does with an image what a host does; `vhdx`, `log`,
//! `vhd` and `delta` turn an input into something worth opening. All of it is deterministic: an input that fails once
//! fails again.

mod delta;
mod exercise;
mod log;
mod plan;
mod sparse;
mod vhd;
mod vhdx;

/// One target.
pub(crate) struct Target {
    pub(crate) name: &'static str,
    body: fn(&[u8]),
    seeds: fn() -> Vec<Vec<u8>>,
}

impl Target {
    /// Runs an input; what must not be panics.
    pub(crate) fn run(&self, input: &[u8]) {
        (self.body)(input);
    }

    /// Inputs to start from.
    pub(crate) fn seeds(&self) -> Vec<Vec<u8>> {
        (self.seeds)()
    }
}

/// Finds a target.
pub(crate) fn target(name: &str) -> &'static Target {
    let mut targets = TARGETS.iter();
    let found = targets.find(|target| target.name == name);
    found.expect("the name stands in the table")
}

/// All targets.
pub(crate) const TARGETS: &[Target] = &[
    Target {
        name: "vhdx_open",
        body: vhdx::open,
        seeds: vhdx::open_seeds,
    },
    Target {
        name: "vhdx_structured",
        body: vhdx::structured,
        seeds: vhdx::structured_seeds,
    },
    Target {
        name: "vhdx_log",
        body: log::replay,
        seeds: log::seeds,
    },
    Target {
        name: "vhd",
        body: vhd::open,
        seeds: vhd::seeds,
    },
    Target {
        name: "delta",
        body: delta::decode,
        seeds: delta::seeds,
    },
];
