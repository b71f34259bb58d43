//! What the commands print: tables and lines for people, JSON for programs, progress bars on long work.
#![expect(clippy::print_stdout, reason = "this is the module that prints")]

use std::{
    io::{IsTerminal as _, Write as _},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

/// How to print.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    pub(crate) json: bool,
}

/// Rows under a head, columns as wide as their widest cell.
#[derive(Debug)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

// === impl Output ===

impl Output {
    /// Prints `value` as JSON, or what `text` makes of it.
    ///
    /// # Errors
    /// When the value has no JSON form or standard output is closed.
    pub(crate) fn show<T: Serialize>(
        &self,
        value: &T,
        text: impl FnOnce(&T) -> String,
    ) -> anyhow::Result<()> {
        let shown = if self.json { serde_json::to_string_pretty(value)? } else { text(value) };
        let mut out = std::io::stdout().lock();
        out.write_all(shown.as_bytes())?;
        if !shown.ends_with('\n') && !shown.is_empty() {
            out.write_all(b"\n")?;
        }
        Ok(out.flush()?)
    }

    /// A line for people; nothing in JSON mode.
    pub(crate) fn line(&self, text: &str) {
        if !self.json {
            println!("{text}");
        }
    }

    /// Text as it comes, without a line's end; nothing in JSON mode.
    pub(crate) fn stream(&self, text: &str) {
        if !self.json {
            print!("{text}");
            // A closed terminal is noticed by the next line that matters.
            let _ = std::io::stdout().flush();
        }
    }

    /// A line about what goes on, on standard error; nothing in JSON mode.
    #[expect(clippy::print_stderr, reason = "this is the module that prints")]
    pub(crate) fn note(&self, text: &str) {
        if !self.json {
            eprintln!("{text}");
        }
    }

    /// A bar for `total` bytes on standard error, hidden in JSON mode and where standard error is no terminal.
    pub(crate) fn bytes_bar(&self, total: u64, message: String) -> ProgressBar {
        let bar = ProgressBar::new(total).with_message(message);
        let style = ProgressStyle::with_template(
            "{msg}  {bar:30} {bytes:>10} / {total_bytes}  {bytes_per_sec:>12}  {eta:>4}",
        );
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        if self.json || !std::io::stderr().is_terminal() {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        bar
    }
}

/// Milliseconds with a precision that fits their size.
pub(crate) fn ms(time: Duration) -> String {
    let ms = time.as_secs_f64() * 1e3;
    if ms < 10.0 { format!("{ms:.2} ms") } else { format!("{ms:.0} ms") }
}

// === impl Table ===

impl Table {
    pub(crate) fn new<const N: usize>(head: [&str; N]) -> Self {
        Self { rows: vec![head.iter().map(|h| (*h).to_owned()).collect()] }
    }

    pub(crate) fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.into());
    }

    pub(crate) fn render(&self) -> String {
        let columns = self.rows[0].len();
        let width = |c: usize| self.rows.iter().map(|r| r[c].chars().count()).max().unwrap_or_default();
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                line.push_str(&format!("{cell:width$}  "));
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(["NAME", "SIZE"]);
        table.row(["smollm2:135m".into(), "94 MiB".into()]);
        assert_eq!(table.render(), "NAME          SIZE\nsmollm2:135m  94 MiB\n");
    }

    #[test]
    fn small_times_keep_their_digits() {
        assert_eq!(ms(Duration::from_micros(1234)), "1.23 ms");
        assert_eq!(ms(Duration::from_millis(250)), "250 ms");
    }
}
