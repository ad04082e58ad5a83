//! Which codec pays on a link.
//!
//! A frame is packed by `workers` threads and then crosses the link; both go on at the same time, so the slower one sets
//! the pace. In raw bytes per second codec C gives `min(workers * speed(C), link / ratio(C))`, no packing gives `link`.
//! [`Setting::Auto`] measures the three numbers as it goes and takes the codec with the best pace; now and then it tries
//! the others on one frame, since both link and content change. On a link faster than the compressor that is no codec at
//! all (one core packs 0.1 to 0.3 GB/s, a 10 Gbit/s link takes 1.2); on a slow link it is Zstandard.
//!
//! Time is an argument: the monotonic clock.

use std::{fmt, str::FromStr, time::Duration};

use bytes::Bytes;

use super::frame::{Codec, EncodedFrame, encode_data};
use crate::base::units::{DiskIndex, to_u64};

/// Time between two trials of a codec that is not in use.
const TRIAL_INTERVAL: Duration = Duration::from_secs(5);
/// Part of a new measurement in a running mean.
const MEAN_WEIGHT: f64 = 0.2;
/// A codec replaces the one in use if its pace is better by this factor: measurements are noisy.
const CHANGE_FACTOR: f64 = 1.1;
/// Bytes of a sample that tells whether a frame can be packed at all.
const SAMPLE_BYTES: usize = 4096;

/// What the operator asked for.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Setting {
    /// Never pack.
    None,
    /// Always LZ4.
    Lz4,
    /// Always Zstandard.
    Zstd,
    /// What pays.
    #[default]
    Auto,
}

/// A text that names no setting.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown compression {0:?}: use none, lz4, zstd or auto")]
pub struct SettingError(String);

impl FromStr for Setting {
    type Err = SettingError;

    fn from_str(text: &str) -> Result<Self, SettingError> {
        match text {
            "none" => Ok(Self::None),
            "lz4" => Ok(Self::Lz4),
            "zstd" => Ok(Self::Zstd),
            "auto" => Ok(Self::Auto),
            _ => Err(SettingError(text.to_owned())),
        }
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::None => "none",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
            Self::Auto => "auto",
        })
    }
}

/// What was measured of one codec.
#[derive(Clone, Copy, Debug, Default)]
struct Measured {
    /// Raw bytes one thread packs in a second.
    speed: Option<f64>,
    /// Packed bytes per raw byte.
    ratio: f64,
    tried_at: Duration,
}

/// Chooses the codec of each frame on one link. One owner; the choice is handed to the packing threads.
#[derive(Clone, Debug)]
pub struct Policy {
    setting: Setting,
    workers: f64,
    /// Bytes per second that the link took; nothing until it was measured.
    link: Option<f64>,
    lz4: Measured,
    zstd: Measured,
    current: Codec,
}

impl Policy {
    /// A policy for a link fed by `workers` packing threads, at least one.
    pub fn new(setting: Setting, workers: u16) -> Self {
        Self {
            setting,
            workers: f64::from(workers.max(1)),
            link: None,
            lz4: Measured::default(),
            zstd: Measured::default(),
            current: match setting {
                Setting::None | Setting::Auto => Codec::None,
                Setting::Lz4 => Codec::Lz4,
                Setting::Zstd => Codec::Zstd,
            },
        }
    }

    /// The codec for the next frame.
    pub fn choose(&mut self, now: Duration) -> Codec {
        if self.setting != Setting::Auto || self.link.is_none() {
            return self.current;
        }
        for codec in [Codec::Lz4, Codec::Zstd] {
            let in_use = codec == self.current;
            let measured = self.measured(codec);
            let due =
                measured.speed.is_none() || now.saturating_sub(measured.tried_at) >= TRIAL_INTERVAL;
            if due && !in_use {
                measured.tried_at = now;
                return codec;
            }
        }
        let best = Codec::ALL
            .into_iter()
            .max_by(|&a, &b| self.pace(a).total_cmp(&self.pace(b)))
            .unwrap_or(Codec::None);
        if self.pace(best) > self.pace(self.current) * CHANGE_FACTOR {
            tracing::info!(from = ?self.current, to = ?best, "the codec of the link changes");
            self.current = best;
        }
        self.current
    }

    /// Notes that packing a frame of `raw` bytes with `codec` gave `packed` bytes and kept one thread busy for `took`.
    pub fn packed(&mut self, codec: Codec, raw: u64, packed: u64, took: Duration) {
        if codec == Codec::None || raw == 0 {
            return;
        }
        let speed = approximate(raw) / took.as_secs_f64().max(1e-9);
        let ratio = approximate(packed) / approximate(raw);
        let measured = self.measured(codec);
        if let Some(known) = measured.speed {
            measured.speed = Some(mean(known, speed));
            measured.ratio = mean(measured.ratio, ratio);
        } else {
            measured.speed = Some(speed);
            measured.ratio = ratio;
        }
    }

    /// Notes that the link, always having something to send, took `bytes` in `took`.
    pub fn sent(&mut self, bytes: u64, took: Duration) {
        if bytes > 0 && !took.is_zero() {
            let rate = approximate(bytes) / took.as_secs_f64();
            self.link = Some(self.link.map_or(rate, |known| mean(known, rate)));
        }
    }

    fn measured(&mut self, codec: Codec) -> &mut Measured {
        match codec {
            Codec::None | Codec::Lz4 => &mut self.lz4,
            Codec::Zstd => &mut self.zstd,
        }
    }

    /// Raw bytes per second with `codec`.
    fn pace(&self, codec: Codec) -> f64 {
        let link = self.link.unwrap_or(f64::INFINITY);
        let measured = match codec {
            Codec::None => return link,
            Codec::Lz4 => &self.lz4,
            Codec::Zstd => &self.zstd,
        };
        let speed = measured.speed.unwrap_or(0.0) * self.workers;
        speed.min(link / measured.ratio.max(1e-3))
    }
}

/// Packs a frame with `codec`, but leaves it as it is where a sample from its middle shows that packing is in vain.
pub fn encode_sampled(disk: DiskIndex, offset: u64, raw: Bytes, codec: Codec) -> EncodedFrame {
    let worth = codec == Codec::None || raw.len() < 8 * SAMPLE_BYTES || {
        let sample = &raw[raw.len() / 2..][..SAMPLE_BYTES];
        lz4_flex::block::compress(sample).len() < SAMPLE_BYTES / 16 * 15 || is_narrow(sample)
    };
    encode_data(disk, offset, raw, if worth { codec } else { Codec::None })
}

/// Whether the bytes of a sample are few enough different ones that entropy coding gains although nothing repeats.
fn is_narrow(sample: &[u8]) -> bool {
    let mut counts = [0u64; 256];
    for &byte in sample {
        counts[usize::from(byte)] += 1;
    }
    // Evenly spread bytes give a sum of squares near n * n / 256 + n; an eighth more is one bit in about twenty.
    let n = to_u64(sample.len());
    let squares: u64 = counts.iter().map(|count| count * count).sum();
    squares > (n * n / 256 + n) / 8 * 9
}

fn mean(known: f64, new: f64) -> f64 {
    known + (new - known) * MEAN_WEIGHT
}

#[expect(clippy::cast_precision_loss, reason = "rates need three digits")]
fn approximate(value: u64) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::units::MIB;

    /// What a policy settles on with compressors as fast as measured and content that packs to a half.
    fn settles_on(link_bytes_per_second: u64, packs: bool) -> Codec {
        let mut policy = Policy::new(Setting::Auto, 1);
        let mut now = Duration::ZERO;
        for _ in 0..200 {
            let codec = policy.choose(now);
            let (speed, percent) = match codec {
                Codec::None => (0, 100),
                Codec::Lz4 => (250 * MIB, if packs { 60 } else { 100 }),
                Codec::Zstd => (120 * MIB, if packs { 45 } else { 100 }),
            };
            let packed = MIB * percent / 100;
            if let Some(micros) = (MIB * 1_000_000).checked_div(speed) {
                policy.packed(codec, MIB, packed, Duration::from_micros(micros));
            }
            let took = Duration::from_micros(packed * 1_000_000 / link_bytes_per_second);
            policy.sent(packed, took);
            now += Duration::from_millis(100);
        }
        policy.current
    }

    #[test]
    fn the_codec_follows_the_link_and_the_content() {
        assert_eq!(settles_on(1200 * MIB, true), Codec::None);
        assert_eq!(settles_on(110 * MIB, true), Codec::Lz4);
        assert_eq!(settles_on(12 * MIB, true), Codec::Zstd);
        assert_eq!(settles_on(12 * MIB, false), Codec::None);
    }

    #[test]
    fn a_fixed_setting_stays() {
        for (text, codec) in [
            ("none", Codec::None),
            ("lz4", Codec::Lz4),
            ("zstd", Codec::Zstd),
        ] {
            let setting: Setting = text.parse().unwrap();
            assert_eq!(setting.to_string(), text);
            let mut policy = Policy::new(setting, 2);
            policy.sent(MIB, Duration::from_millis(1));
            assert_eq!(policy.choose(Duration::from_mins(1)), codec);
        }
        assert_eq!("auto".parse(), Ok(Setting::Auto));
        assert!("gzip".parse::<Setting>().is_err());
    }

    /// A link of 100 bytes in a second, and Zstandard tried just now: so fast, and leaving all as it is.
    fn measured(speed: u64) -> Policy {
        let second = Duration::from_secs(1);
        let mut policy = Policy::new(Setting::Auto, 1);
        policy.sent(100, second);
        policy.packed(Codec::Lz4, 1, 1, second);
        policy.packed(Codec::Zstd, speed, speed / 2, second);
        policy
    }

    #[test]
    fn a_codec_that_is_hardly_better_is_not_taken() {
        for (speed, codec) in [(108, Codec::None), (112, Codec::Zstd)] {
            assert_eq!(measured(speed).choose(Duration::ZERO), codec, "{speed}");
        }
    }

    #[test]
    fn codecs_are_tried_at_once_and_every_few_seconds() {
        let mut new = Policy::new(Setting::Auto, 1);
        new.sent(100, Duration::from_secs(1));
        assert_eq!(new.choose(Duration::ZERO), Codec::Lz4);
        let mut policy = measured(112);
        let before = TRIAL_INTERVAL.saturating_sub(Duration::from_millis(1));
        assert_eq!(policy.choose(before), Codec::Zstd);
        let tried = [(); 2].map(|()| policy.choose(TRIAL_INTERVAL));
        assert_eq!(tried, [Codec::Lz4, Codec::Zstd], "the other one, once");
    }

    #[test]
    fn what_tells_nothing_changes_no_measurement() {
        let second = Duration::from_secs(1);
        let mut policy = measured(112);
        policy.packed(Codec::None, 1000, 1000, second);
        policy.packed(Codec::Zstd, 0, 100, second);
        policy.sent(0, second);
        policy.sent(1 << 40, Duration::ZERO);
        let before = measured(112);
        for codec in [Codec::None, Codec::Lz4, Codec::Zstd] {
            assert!((policy.pace(codec) - before.pace(codec)).abs() < 1e-9);
        }
    }

    #[test]
    fn a_hopeless_frame_is_not_packed() {
        let mut state = 1u64;
        let noise: Vec<u8> = (0..65536)
            .map(|_| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                state.to_be_bytes()[0]
            })
            .collect();
        let hex: Vec<u8> = noise
            .iter()
            .map(|byte| b"0123456789abcdef"[usize::from(byte % 16)])
            .collect();
        let codec = |raw: &[u8]| {
            let frame = encode_sampled(DiskIndex(0), 0, Bytes::copy_from_slice(raw), Codec::Zstd);
            frame.header().codec
        };
        assert_eq!(codec(&noise), Codec::None);
        assert_eq!(
            codec(&hex),
            Codec::Zstd,
            "nothing repeats, yet it packs to a half"
        );
        assert_eq!(codec(&vec![7; 65536]), Codec::Zstd);
    }

    #[test]
    fn a_frame_too_short_for_a_sample_is_packed() {
        let raw = Bytes::from(vec![7; SAMPLE_BYTES]);
        let frame = encode_sampled(DiskIndex(0), 0, raw, Codec::Lz4);
        assert_eq!(frame.header().codec, Codec::Lz4);
    }

    #[test]
    fn workers_pack_side_by_side() {
        let pace = |workers| {
            let mut policy = Policy::new(Setting::Auto, workers);
            policy.measured(Codec::Zstd).speed = Some(100.0);
            policy.pace(Codec::Zstd)
        };
        assert!((pace(4) - 4.0 * pace(1)).abs() < 1.0);
    }

    #[test]
    fn a_sample_is_narrow_when_some_bytes_are_an_eighth_more_often_there() {
        // Each byte 16 times, but of some ten more and of as many ten fewer: the sum of squares is 65536 + 200 for each.
        let sample = |pairs: usize| -> Vec<u8> {
            let count = |byte: usize| match byte {
                byte if byte < pairs => 26,
                byte if byte < 2 * pairs => 6,
                _ => 16,
            };
            (0..=255u8)
                .flat_map(|byte| vec![byte; count(usize::from(byte))])
                .collect()
        };
        assert_eq!(sample(64).len(), SAMPLE_BYTES);
        assert!(!is_narrow(&sample(64)));
        assert!(is_narrow(&sample(65)));
    }

    #[test]
    fn a_mean_follows_what_is_measured() {
        assert!((mean(10.0, 20.0) - 12.0).abs() < 1e-9);
        assert!((mean(20.0, 10.0) - 18.0).abs() < 1e-9);
    }
}
