//! Results as they come: told, written to the file, kept for the tables.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use serde::Serialize;

use super::BenchError;
use super::results::{Figure, Results, Row, json_line};

#[derive(Debug, Default)]
pub struct Record {
    out: Option<File>,
    pub results: Results,
    /// What was not measured, or not as it should be.
    pub failures: Vec<String>,
}

impl Record {
    /// With a file, which is made now: a run of many minutes does not end with a path that cannot be written.
    pub fn new(path: Option<&Path>) -> Result<Self, BenchError> {
        let out =
            match path {
                None => None,
                Some(path) => Some(File::create(path).map_err(|source| BenchError::Io {
                    doing: format!("making {}", path.display()),
                    source,
                })?),
            };
        Ok(Self { out, ..Self::default() })
    }

    pub fn row(&mut self, row: Row) -> Result<(), BenchError> {
        println!("  {:<19} {:<8} {}", row.work, row.system, row.words());
        self.write(&row)?;
        self.results.rows.push(row);
        Ok(())
    }

    pub fn figure(&mut self, figure: Figure) -> Result<(), BenchError> {
        println!("  {:<19} {:<8} {}", figure.work, figure.system, figure.words());
        self.write(&figure)?;
        self.results.figures.push(figure);
        Ok(())
    }

    /// Says it now, and again at the end.
    pub fn failed(&mut self, what: String) {
        println!("  FAILED: {what}");
        self.failures.push(what);
    }

    fn write(&mut self, result: &impl Serialize) -> Result<(), BenchError> {
        let Some(file) = &mut self.out else { return Ok(()) };
        let written = writeln!(file, "{}", json_line(result));
        written.map_err(|source| BenchError::Io { doing: "writing the JSON lines".to_owned(), source })
    }
}

#[cfg(test)]
mod tests {
    use super::Record;
    use crate::runner::results::{Figure, Results, tests::row};

    #[test]
    fn what_is_recorded_is_in_the_file_at_once() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("results.jsonl");
        let mut record = Record::new(Some(&path)).expect("a file");
        record.row(row("tmpfs", "randread-4k-qd1")).expect("written");
        record.figure(Figure::new(("idle", "tmpfs", "evolute"), "mds", 0.1, "%")).expect("written");
        let text = std::fs::read_to_string(&path).expect("there");
        assert_eq!(Results::parse(&text).expect("ours"), record.results);
        assert!(Record::new(Some(&dir.path().join("no/such/folder"))).is_err());
    }
}
