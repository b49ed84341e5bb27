//! The pictures of `compare`: loss curves, and bars of what each method costs.

use crate::compare::Row;
use lowrank::{Error, Result};
use plotters::prelude::*;
use std::path::Path;

const SIZE: (u32, u32) = (900, 520);

/// Writes `losses.svg` and `methods.svg`.
pub fn plot(rows: &[Row], output: &Path) -> Result<()> {
    for (file, draw) in [("losses.svg", losses as fn(&[Row], &Drawing<'_>) -> Drawn), ("methods.svg", bars)] {
        let mut text = String::new();
        {
            let area = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
            let drawn = area.fill(&WHITE).map_err(|e| e.to_string());
            let drawn = drawn
                .and_then(|()| draw(rows, &area))
                .and_then(|()| area.present().map_err(|e| e.to_string()));
            drawn.map_err(|e| Error::format(output.join(file), e))?;
        }
        lowrank::fs::write_atomic_bytes(&output.join(file), text.as_bytes())?;
    }
    Ok(())
}

type Drawing<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type Drawn = std::result::Result<(), String>;

/// Smallest and largest of finite numbers, a little apart.
fn range(values: impl Iterator<Item = f64>) -> std::ops::Range<f64> {
    let (low, high) = values
        .filter(|x| x.is_finite())
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)));
    if low > high { 0.0..1.0 } else { low..high + (high - low).max(1e-6) * 0.05 }
}

fn losses(rows: &[Row], area: &Drawing<'_>) -> Drawn {
    let points = || rows.iter().flat_map(|row| row.curve.iter());
    let (x, y) = (range(points().map(|p| p.0)), range(points().map(|p| p.1)));
    let chart = ChartBuilder::on(area)
        .caption("training loss", ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(52)
        .build_cartesian_2d(x.start..x.end * 1.2, y);
    let mut chart = chart.map_err(|e| e.to_string())?;
    chart.configure_mesh().x_desc("step").y_desc("loss").draw().map_err(|e| e.to_string())?;
    for (i, row) in rows.iter().enumerate() {
        let colour = Palette99::pick(i).to_rgba();
        let line = LineSeries::new(row.curve.iter().copied(), colour.stroke_width(2));
        let drawn = chart.draw_series(line).map_err(|e| e.to_string())?;
        drawn
            .label(row.name.as_str())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2)));
    }
    let mut labels = chart.configure_series_labels();
    labels
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .draw()
        .map_err(|e| e.to_string())
}

/// A panel for each of a few numbers, a bar for each method.
fn bars(rows: &[Row], area: &Drawing<'_>) -> Drawn {
    type Number = fn(&Row) -> f64;
    let panels: [(&str, Number); 4] = [
        ("held-out loss (training loss if none)", |row| row.summary.eval_loss.unwrap_or(row.loss)),
        ("tokens per second", |row| row.summary.tokens as f64 / row.summary.seconds.max(1e-9)),
        ("peak memory, MB", |row| row.summary.peak_memory_bytes as f64 / 1e6),
        ("trained parameters, millions", |row| row.summary.trainable_parameters as f64 / 1e6),
    ];
    for (panel, (title, number)) in area.split_evenly((2, 2)).iter().zip(panels) {
        let highest = rows.iter().map(number).filter(|x| x.is_finite()).fold(0.0, f64::max).max(1e-9);
        let chart = ChartBuilder::on(panel)
            .caption(title, ("sans-serif", 15))
            .margin(8)
            .x_label_area_size(20)
            .y_label_area_size(110)
            .build_cartesian_2d(0.0..highest * 1.05, (0..rows.len()).into_segmented());
        let mut chart = chart.map_err(|e| e.to_string())?;
        let name = |place: &SegmentValue<usize>| match place {
            SegmentValue::CenterOf(i) => rows.get(*i).map_or(String::new(), |row| row.name.clone()),
            _ => String::new(),
        };
        chart
            .configure_mesh()
            .disable_y_mesh()
            .y_labels(rows.len())
            .y_label_formatter(&name)
            .draw()
            .map_err(|e| e.to_string())?;
        let bar = |(i, row): (usize, &Row)| {
            let corners = [(0.0, SegmentValue::Exact(i)), (number(row), SegmentValue::Exact(i + 1))];
            let mut bar = Rectangle::new(corners, Palette99::pick(i).filled());
            bar.set_margin(3, 3, 0, 0);
            bar
        };
        chart.draw_series(rows.iter().enumerate().map(bar)).map_err(|e| e.to_string())?;
    }
    Ok(())
}
