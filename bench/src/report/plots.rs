//! Curves: what is drawn, and how.

use plotters::prelude::{
    BindKeyPoints as _, ChartBuilder, Circle, Color as _, IntoDrawingArea as _, IntoLogRange as _,
    LineSeries, PathElement, RGBColor, SVGBackend, SeriesLabelPosition, ShapeStyle, WHITE,
};

use crate::runner::results::{Results, Row, short};

/// One picture.
#[derive(Debug, Clone, PartialEq)]
pub struct Plot {
    pub file: &'static str,
    pub title: &'static str,
    x: &'static str,
    y: &'static str,
    pub lines: Vec<Line>,
}

/// Points in the order of their first coordinate.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    name: String,
    points: Vec<(f64, f64)>,
}

/// Depth and kind of a 4K load, from its name.
pub fn depth_of(row: &Row) -> Option<(&str, u32)> {
    let (kind, depth) = row.work.split_once("-4k-qd")?;
    Some((kind, depth.parse().ok()?))
}

/// Every picture there are at least two points for.
pub fn plots(results: &Results) -> Vec<Plot> {
    let over_depth = |system: &str, kind: &str, y: fn(&Row) -> f64| {
        points(results, |row| {
            let (found, depth) = depth_of(row)?;
            (row.store == "tmpfs" && row.system == system && found == kind).then(|| (depth, y(row)))
        })
    };
    let line = |name: &str, points| Line { name: name.to_owned(), points };
    let latency = |file, title, kind| Plot {
        file,
        title,
        x: "requests in flight",
        y: "µs",
        lines: vec![
            line("Evolute p50", over_depth("evolute", kind, |row| row.p50_us)),
            line("Evolute p99", over_depth("evolute", kind, |row| row.p99_us)),
            line("local qsd p50", over_depth("qsd", kind, |row| row.p50_us)),
            line("local qsd p99", over_depth("qsd", kind, |row| row.p99_us)),
        ],
    };
    let by_kind = |file, title, y, value: fn(&Row) -> f64| Plot {
        file,
        title,
        x: "requests in flight",
        y,
        lines: vec![
            line("Evolute randwrite", over_depth("evolute", "randwrite", value)),
            line("Evolute randread", over_depth("evolute", "randread", value)),
            line("local qsd randwrite", over_depth("qsd", "randwrite", value)),
            line("local qsd randread", over_depth("qsd", "randread", value)),
        ],
    };
    let iops_over =
        |label, of: fn(&Row) -> Option<u32>| line(label, points(results, |row| Some((of(row)?, row.iops))));
    let over = |file, title, x, lines| Plot { file, title, x, y: "IOPS", lines };
    let mut plots = vec![
        latency("randwrite-latency.svg", "4K random writes: latency over depth", "randwrite"),
        latency("randread-latency.svg", "4K random reads: latency over depth", "randread"),
        by_kind("iops.svg", "4K: IOPS over depth", "IOPS", |row| row.iops),
        by_kind("cpu.svg", "4K: CPU of all processes over depth", "CPU µs per I/O", |row| row.cpu_us_per_io),
        over(
            "copysets.svg",
            "4K random writes, depth 32, one volume: IOPS over copysets",
            "copysets of each chunkserver, six of them in use",
            vec![iops_over("Evolute randwrite", |row| row.copysets)],
        ),
        over(
            "volumes.svg",
            "4K random writes, depth 128 in all: IOPS over volumes",
            "volumes that share the depth",
            vec![
                iops_over("Evolute, a backend process each", |row| row.volumes),
                iops_over("Evolute, one backend process", |row| row.volumes_of_one_backend),
            ],
        ),
    ];
    for plot in &mut plots {
        plot.lines.retain(|line| line.points.len() > 1);
    }
    plots.retain(|plot| !plot.lines.is_empty());
    plots
}

fn points(results: &Results, point: impl Fn(&Row) -> Option<(u32, f64)>) -> Vec<(f64, f64)> {
    let mut found: Vec<(u32, f64)> = results.rows.iter().filter_map(point).collect();
    found.sort_by_key(|(x, _)| *x);
    found.into_iter().map(|(x, y)| (f64::from(x), y)).collect()
}

const SIZE: (u32, u32) = (760, 440);
/// Told apart by people who do not see red from green (Okabe and Ito).
const COLOURS: [RGBColor; 4] =
    [RGBColor(0, 114, 178), RGBColor(213, 94, 0), RGBColor(0, 158, 115), RGBColor(204, 121, 167)];

/// Both axes are logarithmic: depths double, and what they do to a number is a factor.
pub fn svg(plot: &Plot) -> Result<String, String> {
    let mut text = String::new();
    draw(plot, &mut text).map_err(|error| error.to_string())?;
    Ok(text)
}

fn draw(plot: &Plot, text: &mut String) -> Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::with_string(text, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let xs = plot.lines.iter().flat_map(|line| line.points.iter().map(|point| point.0));
    let (x_min, x_max) = range(xs);
    let (y_min, y_max) = range(plot.lines.iter().flat_map(|line| line.points.iter().map(|point| point.1)));
    let mut chart = ChartBuilder::on(&root)
        .caption(plot.title, ("sans-serif", 18))
        .margin(14)
        .x_label_area_size(44)
        .y_label_area_size(70)
        .build_cartesian_2d(
            (x_min..x_max).log_scale().base(2.0).with_key_points(x_points(plot)),
            (y_min / 1.3..y_max * 1.3).log_scale().with_key_points(y_points(y_min, y_max)),
        )?;
    let label = |value: &f64| short_axis(*value);
    chart
        .configure_mesh()
        .x_desc(plot.x)
        .y_desc(plot.y)
        .x_label_formatter(&label)
        .y_label_formatter(&label)
        .light_line_style(WHITE)
        .draw()?;
    for (line, colour) in plot.lines.iter().zip(COLOURS) {
        let style = ShapeStyle { color: colour.to_rgba(), filled: true, stroke_width: 2 };
        chart
            .draw_series(LineSeries::new(line.points.iter().copied(), style))?
            .label(&line.name)
            .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 18, y)], style));
        chart.draw_series(line.points.iter().map(|point| Circle::new(*point, 3, style)))?;
    }
    chart
        .configure_series_labels()
        .position(if falls(plot) { SeriesLabelPosition::UpperRight } else { SeriesLabelPosition::UpperLeft })
        .background_style(WHITE.mix(0.8))
        .border_style(WHITE)
        .draw()?;
    root.present()?;
    Ok(())
}

/// Where a curve falls there is room for its name at the other end.
fn falls(plot: &Plot) -> bool {
    let ends = plot.lines.first().and_then(|line| Some((line.points.first()?.1, line.points.last()?.1)));
    ends.is_some_and(|(first, last)| last < first)
}

/// What is on the x axis is what was measured.
fn x_points(plot: &Plot) -> Vec<f64> {
    let mut xs: Vec<f64> =
        plot.lines.iter().flat_map(|line| line.points.iter().map(|point| point.0)).collect();
    xs.sort_by(f64::total_cmp);
    xs.dedup();
    xs
}

/// 1, 2 and 5 of every power of ten.
fn y_points(min: f64, max: f64) -> Vec<f64> {
    let steps = (-3..9).flat_map(|power| [1.0, 2.0, 5.0].map(|step| step * 10_f64.powi(power)));
    steps.filter(|value| (min / 1.3..max * 1.3).contains(value)).collect()
}

fn range(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    // A logarithm needs something above zero.
    const LEAST: f64 = 1e-3;
    let min = values.clone().fold(f64::MAX, f64::min).max(LEAST);
    let max = values.fold(LEAST, f64::max).max(min * 1.01);
    (min, max)
}

fn short_axis(value: f64) -> String {
    if value >= 1000.0 { format!("{}k", value / 1000.0) } else { short(value) }
}

#[cfg(test)]
mod tests {
    use super::{depth_of, plots, short_axis, svg, y_points};
    use crate::runner::results::{Results, Row, tests::row};

    fn results() -> Results {
        let depth = |depth: u32| Row {
            p50_us: 70.0 * f64::from(depth),
            ..row("tmpfs", &format!("randwrite-4k-qd{depth}"))
        };
        let volumes = |n: u32| Row { volumes: Some(n), ..row("tmpfs", &format!("volumes-{n}")) };
        let rows =
            vec![depth(32), depth(1), depth(4), volumes(1), volumes(32), row("disk", "randwrite-4k-qd8")];
        Results { rows, ..Results::default() }
    }

    #[test]
    fn a_curve_has_the_points_of_its_store_and_kind_in_order() {
        let plots = plots(&results());
        let files: Vec<&str> = plots.iter().map(|plot| plot.file).collect();
        assert_eq!(files, ["randwrite-latency.svg", "iops.svg", "cpu.svg", "volumes.svg"]);
        assert_eq!(plots[0].lines.len(), 2, "only Evolute was measured");
        assert_eq!(plots[0].lines[0].points, [(1.0, 70.0), (4.0, 280.0), (32.0, 2240.0)]);
    }

    #[test]
    fn a_picture_is_svg_with_its_names() {
        for plot in plots(&results()) {
            let text = svg(&plot).expect("drawn");
            assert!(text.starts_with("<svg") && text.trim_end().ends_with("</svg>"), "{text}");
            assert!(text.contains(plot.title) && text.contains("Evolute"), "{text}");
            assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
        }
    }

    #[test]
    fn names_and_axes_are_read_by_people() {
        let depth = |work: &str| depth_of(&row("tmpfs", work)).map(|(kind, depth)| (kind.to_owned(), depth));
        assert_eq!(depth("randread-4k-qd256"), Some(("randread".to_owned(), 256)));
        assert_eq!(depth("volumes-32"), None);
        assert_eq!([1.0, 0.05, 2500.0, 20_000.0].map(short_axis), ["1", "0.050", "2.5k", "20k"]);
        assert_eq!(y_points(60.0, 600.0), [50.0, 100.0, 200.0, 500.0]);
    }
}
