//! Tables in Markdown whose columns are aligned, so that they are tables for a person at a terminal too.

use std::fmt::Write as _;

/// In a cell without a value.
pub const NONE: &str = "–";

/// How a column is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Set {
    Text,
    Number,
}

/// # Panics
/// If a row has not as many cells as there are columns.
pub fn table(columns: &[(&str, Set)], rows: &[Vec<String>]) -> String {
    const WIDTH_MIN: usize = 3;
    let widths: Vec<usize> = columns
        .iter()
        .enumerate()
        .map(|(column, (heading, _))| {
            let lengths = rows.iter().map(|row| row[column].chars().count());
            lengths.chain([heading.chars().count(), WIDTH_MIN]).max().unwrap_or(WIDTH_MIN)
        })
        .collect();
    let mut text = String::new();
    let mut line = |cells: &[String]| {
        assert_eq!(cells.len(), columns.len(), "{cells:?}");
        for ((cell, width), (_, set)) in cells.iter().zip(&widths).zip(columns) {
            let _ = match set {
                Set::Text => write!(text, "| {cell:<width$} "),
                Set::Number => write!(text, "| {cell:>width$} "),
            };
        }
        text.push_str("|\n");
    };
    line(&columns.iter().map(|(heading, _)| (*heading).to_owned()).collect::<Vec<_>>());
    let rule = |(width, (_, set)): (&usize, &(&str, Set))| match set {
        Set::Text => "-".repeat(*width),
        Set::Number => format!("{}:", "-".repeat(width - 1)),
    };
    line(&widths.iter().zip(columns).map(rule).collect::<Vec<_>>());
    for row in rows {
        line(row);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{Set, table};

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [vec!["a long name".to_owned(), "1".to_owned()], vec!["µ".to_owned(), "12.50".to_owned()]];
        let text = table(&[("name", Set::Text), ("n", Set::Number)], &rows);
        let wanted = "\
| name        |     n |
| ----------- | ----: |
| a long name |     1 |
| µ           | 12.50 |
";
        assert_eq!(text, wanted);
    }
}
