//! The picture of pauses: RAM in use against the time the guest stands still, both logarithmic.

use std::path::Path;

use plotters::prelude::*;

use super::method::Method;
use super::what;
use crate::report::Report;

/// The rate that is shown, in MB/s.
const RATE: u64 = 100;
const SIZE: (u32, u32) = (720, 420);
/// As many as there are methods.
const COLOURS: [RGBColor; 5] = [BLUE, RGBColor(0, 150, 150), RGBColor(120, 120, 120), RED, MAGENTA];

/// Draws what was measured at 100 MB/s; nothing when that is less than two sizes of RAM.
pub(super) fn write(report: &Report, methods: &[Method], path: &Path) {
    let sizes = report.sizes("live idle");
    let (Some(least), Some(most)) = (sizes.first(), sizes.last()) else { return };
    if least == most {
        return;
    }
    draw(report, methods, (*least as f64, *most as f64), path).unwrap();
}

fn draw(
    report: &Report,
    methods: &[Method],
    (least, most): (f64, f64),
    path: &Path,
) -> Result<(), Box<dyn std::error::Error>> {
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let title = format!("How long a save stops a guest that writes {RATE} MB/s");
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d((least..most * 1.05).log_scale(), (0.5..100_000.0).log_scale())?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_desc("RAM in use, MiB")
        .y_desc("pause, ms")
        .label_style(("sans-serif", 14))
        .draw()?;
    let sizes = report.sizes("live idle");
    for (method, colour) in methods.iter().zip(COLOURS) {
        let points: Vec<(f64, f64)> = sizes
            .iter()
            .filter_map(|&used| {
                let pause = report.median(&what("pause", RATE), method.name(), used)?;
                Some((used as f64, pause))
            })
            .collect();
        chart
            .draw_series(LineSeries::new(points.clone(), colour.stroke_width(2)).point_size(3))?
            .label(method.name())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .label_font(("sans-serif", 14))
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    area.present()?;
    Ok(())
}
