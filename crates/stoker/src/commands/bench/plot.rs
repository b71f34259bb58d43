//! Pictures of rates: one bar for each, with the spread of its runs.

use std::path::Path;

use anyhow::Context as _;
use plotters::prelude::*;
use stoker_types::BytesPerSec;

/// A rate and the spread of its runs.
#[derive(Debug, Clone)]
pub(super) struct Bar {
    pub(super) label: String,
    pub(super) rate: BytesPerSec,
    /// Slowest and fastest run, if there were several.
    pub(super) spread: Option<(BytesPerSec, BytesPerSec)>,
    /// What it is measured against, drawn lighter.
    pub(super) is_limit: bool,
}

/// Pixels of a row, of the column of labels, of the bars, and of the figures behind them.
const ROW: i32 = 34;
const LABELS: i32 = 330;
const BARS: i32 = 420;
const FIGURES: i32 = 130;

/// Draws bars below a title as an SVG file.
///
/// # Errors
/// A file that can't be written.
pub(super) fn bars(path: &Path, title: &str, bars: &[Bar]) -> anyhow::Result<()> {
    let rows = i32::try_from(bars.len()).unwrap_or(i32::MAX / ROW) + 1;
    let size = ((LABELS + BARS + FIGURES).unsigned_abs(), (rows * ROW + 16).unsigned_abs());
    let area = SVGBackend::new(path, size).into_drawing_area();
    let most = bars.iter().map(|bar| bar.spread.map_or(bar.rate.0, |(_, fastest)| fastest.0.max(bar.rate.0)));
    let most = most.fold(f64::MIN_POSITIVE, f64::max);
    #[expect(clippy::cast_possible_truncation, reason = "pixels")]
    let x = |rate: BytesPerSec| LABELS + (f64::from(BARS) * rate.0 / most).round() as i32;
    let text = |size: i32| ("sans-serif", size).into_font().color(&BLACK);
    let draw = || -> Result<(), DrawingAreaErrorKind<std::io::Error>> {
        area.fill(&WHITE)?;
        area.draw(&Text::new(title.to_owned(), (8, 10), text(16)))?;
        for (bar, row) in bars.iter().zip(1..) {
            let (top, middle) = (row * ROW + 6, row * ROW + ROW / 2);
            area.draw(&Text::new(bar.label.clone(), (8, middle - 7), text(13)))?;
            let colour = if bar.is_limit { RGBColor(176, 190, 197) } else { RGBColor(38, 120, 178) };
            let ends = [(LABELS, top), (x(bar.rate), top + ROW - 12)];
            area.draw(&Rectangle::new(ends, colour.filled()))?;
            if let Some((slowest, fastest)) = bar.spread {
                area.draw(&PathElement::new([(x(slowest), middle), (x(fastest), middle)], BLACK))?;
            }
            let behind =
                x(bar.spread.map_or(bar.rate, |(_, fastest)| BytesPerSec(fastest.0.max(bar.rate.0))));
            area.draw(&Text::new(bar.rate.to_string(), (behind + 8, middle - 7), text(13)))?;
        }
        area.present()
    };
    draw().with_context(|| format!("drawing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bar_is_there_with_its_figure() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let bar = |label: &str, rate| Bar {
            label: label.into(),
            rate: BytesPerSec(rate),
            spread: Some((BytesPerSec(rate * 0.9), BytesPerSec(rate * 1.1))),
            is_limit: label == "limit",
        };
        bars(file.path(), "a <title>", &[bar("load", 50e9), bar("limit", 53e9)]).unwrap();
        let svg = std::fs::read_to_string(file.path()).unwrap();
        assert!(svg.contains("a &lt;title&gt;") && svg.matches("<rect").count() == 3, "{svg}");
        for figure in [BytesPerSec(50e9), BytesPerSec(53e9)] {
            assert!(svg.contains(&figure.to_string()), "{svg}");
        }
    }
}
