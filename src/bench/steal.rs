//! What the hypervisor took: the `steal` column of /proc/stat (proc(5)).

use std::fs;

/// A share of stolen time from which on a round counts as noisy.
pub(super) const NOISY: f64 = 0.05;

/// Processor time since boot, in ticks over all processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ticks {
    all: u64,
    stolen: u64,
}

impl Ticks {
    /// The host's counters, or nothing where there are none.
    pub(super) fn now() -> Option<Self> {
        Self::parse(&fs::read_to_string("/proc/stat").ok()?)
    }

    /// The first line is `cpu user nice system idle iowait irq softirq steal guest guest_nice`; guest time is already
    /// in user time.
    fn parse(stat: &str) -> Option<Self> {
        let line = stat.lines().find(|line| line.starts_with("cpu "))?;
        let columns: Vec<u64> = line
            .split_ascii_whitespace()
            .skip(1)
            .map_while(|column| column.parse().ok())
            .collect();
        Some(Self {
            all: columns.iter().take(8).sum(),
            stolen: *columns.get(7)?,
        })
    }

    /// The share of processor time that was stolen since `earlier`, 0 to 1.
    #[expect(clippy::cast_precision_loss, reason = "two digits are shown")]
    pub(super) fn stolen_since(self, earlier: Self) -> f64 {
        let all = self.all.saturating_sub(earlier.all);
        let stolen = self.stolen.saturating_sub(earlier.stolen);
        stolen as f64 / all.max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stolen_time_is_a_share_of_all_time() {
        let parse = |text| Ticks::parse(text).unwrap();
        let before = parse("cpu  10 0 10 70 0 0 0 10 3 0\ncpu0 1 1\n");
        let after = parse("cpu  20 0 20 130 0 0 0 30 9 0\n");
        assert!((after.stolen_since(before) - 0.2).abs() < 1e-9);
        assert!(
            before.stolen_since(after).abs() < 1e-9,
            "a counter that went back is no time"
        );
        assert_eq!(Ticks::parse("intr 1 2 3\n"), None);
        assert_eq!(Ticks::parse("cpu 1 2 3\n"), None);
    }
}
