//! Latency by percentile as SVG: one line for each target, both axes logarithmic.
//!
//! The horizontal axis is the share of operations that were slower, from all of them down to one in 10,000, so that
//! the tail, where targets differ, takes as much room as the rest.

use std::fmt::Write;

use super::{
    report::{Figures, Report},
    workload::Workload,
};

/// Size of the picture and of the area between its axes, in pixels.
const WIDTH: f64 = 800.0;
const HEIGHT: f64 = 480.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 50.0;
const BOTTOM: f64 = 50.0;
/// The axis ends at this many powers of ten: one operation in 10,000.
const DECADES: f64 = 4.0;
/// Points of one line.
const POINTS: u32 = 160;
/// Colours that people with any colour vision tell apart (Okabe, Ito 2008).
const COLOURS: [&str; 7] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000",
];

/// The latencies of `workload` on all targets of `report`, or nothing if it was not measured.
pub fn latency_svg(report: &Report, workload: Workload) -> Option<String> {
    let lines: Vec<Line<'_>> = report
        .figures
        .iter()
        .filter(|figures| figures.workload == workload)
        .map(Line::new)
        .collect();
    let values = || {
        lines
            .iter()
            .flat_map(|line| &line.points)
            .map(|point| point.1)
    };
    let low = values().min_by(f64::total_cmp)?.max(1.0).log10().floor();
    let high = values()
        .max_by(f64::total_cmp)?
        .max(1.0)
        .log10()
        .ceil()
        .max(low + 1.0);
    let axis = Axis { low, high };
    let mut svg = String::new();
    frame(&mut svg, workload, &axis).expect("a String takes everything");
    for (index, line) in lines.iter().enumerate() {
        line.draw(&mut svg, index, &axis)
            .expect("a String takes everything");
    }
    svg.push_str("</svg>\n");
    Some(svg)
}

/// The vertical axis: powers of ten of nanoseconds.
struct Axis {
    low: f64,
    high: f64,
}

impl Axis {
    fn y(&self, nanos: f64) -> f64 {
        let share = (nanos.max(1.0).log10() - self.low) / (self.high - self.low);
        HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)
    }
}

/// The horizontal axis: `decades` powers of ten fewer operations were slower.
fn x(decades: f64) -> f64 {
    LEFT + decades / DECADES * (WIDTH - LEFT - RIGHT)
}

fn frame(svg: &mut String, workload: Workload, axis: &Axis) -> std::fmt::Result {
    writeln!(
        svg,
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">"#
    )?;
    writeln!(
        svg,
        r##"<rect width="100%" height="100%" fill="#ffffff"/>"##
    )?;
    writeln!(
        svg,
        r#"<text x="{LEFT}" y="22" font-size="15">Latency by percentile: {}</text>"#,
        escaped(&workload.to_string())
    )?;
    let (left, right, top, bottom) = (LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM);
    for (decades, label) in [
        (0.0, "0"),
        (1.0, "90"),
        (2.0, "99"),
        (3.0, "99.9"),
        (4.0, "99.99"),
    ] {
        let x = x(decades);
        writeln!(
            svg,
            r##"<path d="M{x:.1} {top}V{bottom}" stroke="#dddddd"/><text x="{x:.1}" y="{:.1}" text-anchor="middle">{label} %</text>"##,
            bottom + 20.0
        )?;
    }
    let mut power = axis.low;
    while power <= axis.high {
        let nanos = 10_f64.powf(power);
        let y = axis.y(nanos);
        writeln!(
            svg,
            r##"<path d="M{left} {y:.1}H{right}" stroke="#dddddd"/><text x="{:.1}" y="{:.1}" text-anchor="end">{}</text>"##,
            left - 8.0,
            y + 4.0,
            duration(nanos)
        )?;
        power += 1.0;
    }
    Ok(())
}

/// One target: its label, and (decades, nanoseconds) from left to right.
struct Line<'a> {
    label: &'a str,
    points: Vec<(f64, f64)>,
}

impl<'a> Line<'a> {
    fn new(figures: &'a Figures) -> Self {
        let latency = figures.latency();
        let point = |step| {
            let decades = DECADES * f64::from(step) / f64::from(POINTS);
            let nanos = latency.value_at_quantile(1.0 - 10_f64.powf(-decades));
            (decades, super::report::float(nanos))
        };
        Self {
            label: &figures.target,
            points: (0..=POINTS).map(point).collect(),
        }
    }

    fn draw(&self, svg: &mut String, index: usize, axis: &Axis) -> std::fmt::Result {
        let colour = COLOURS[index % COLOURS.len()];
        write!(
            svg,
            r#"<polyline fill="none" stroke="{colour}" stroke-width="2" points=""#
        )?;
        for (decades, nanos) in &self.points {
            write!(svg, "{:.1},{:.1} ", x(*decades), axis.y(*nanos))?;
        }
        writeln!(svg, r#""/>"#)?;
        let row = f64::from(u32::try_from(index).unwrap_or(u32::MAX));
        let y = TOP + 16.0 + 18.0 * row;
        writeln!(
            svg,
            r#"<path d="M{:.1} {:.1}h24" stroke="{colour}" stroke-width="2"/><text x="{:.1}" y="{y:.1}">{}</text>"#,
            LEFT + 12.0,
            y - 4.0,
            LEFT + 42.0,
            escaped(self.label)
        )
    }
}

fn duration(nanos: f64) -> String {
    let (value, unit) = match nanos {
        nanos if nanos < 1e3 => (nanos, "ns"),
        nanos if nanos < 1e6 => (nanos / 1e3, "us"),
        nanos if nanos < 1e9 => (nanos / 1e6, "ms"),
        nanos => (nanos / 1e9, "s"),
    };
    format!("{value:.0} {unit}")
}

/// Labels come from users: none of them may end the element it stands in.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::bench::{CANONICAL, Plan, Round, engine::histogram};

    #[test]
    fn slower_targets_lie_higher_and_labels_stay_text() {
        let mut report = Report::new(&Plan::canonical(), &[]);
        for (target, nanos) in [("raw", 40_000), ("<mount> & co", 400_000)] {
            let mut latency = histogram();
            latency.record_n(nanos, 1000).unwrap();
            let round = Round {
                operations: 1000,
                elapsed: Duration::from_secs(1),
                latency,
                stolen: None,
            };
            report.add(CANONICAL[4], target, round);
        }
        let svg = latency_svg(&report, CANONICAL[4]).unwrap();
        assert!(svg.contains("&lt;mount&gt; &amp; co"), "{svg}");
        assert_eq!(svg.matches("<polyline").count(), 2);
        let first_y = |index: usize| -> f64 {
            let points = svg.split("points=\"").nth(index + 1).unwrap();
            let (_, y) = points.split_once(',').unwrap();
            y.split_once(' ').unwrap().0.parse().unwrap()
        };
        assert!(first_y(1) < first_y(0), "upwards is towards zero");
        assert_eq!(latency_svg(&report, CANONICAL[0]), None);
        assert_eq!(duration(1e7), "10 ms");
    }
}
