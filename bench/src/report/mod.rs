//! A report from the JSON lines of `make bench`, without measuring again: tables and plots for docs/performance.md.
//!
//! ```text
//!  lines ──▶ Results ──▶ sections ──▶ between their markers in the document
//!                   └──▶ plots ─────▶ FILE.svg beside it
//! ```
//!
//! What stands outside the markers is written by people, and stays as it is.

mod document;
mod plots;
mod sections;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use self::document::{NotOurs, filled, skeleton};
use self::plots::{plots, svg};
use self::sections::{NAMES, sections};
use crate::runner::results::{NotAResult, Results};

/// Makes tables and plots of the JSON lines of an earlier run; measures nothing
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  evolute-bench --out results.jsonl && evolute-bench report results.jsonl
  evolute-bench report results.jsonl profile.jsonl

What is between <!-- generated: NAME --> and <!-- end of NAME --> in the document is replaced; everything else stays.
Where there is no document, one with all sections is made. The plots go to a folder beside it, of its name.")]
pub struct Options {
    /// What `evolute-bench --out` and `evolute-bench profile --out` wrote; where several measured the same, the last
    /// counts
    #[arg(required = true)]
    pub results: Vec<PathBuf>,
    /// The document
    #[arg(long, value_name = "FILE", default_value = "docs/performance.md")]
    pub out: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    #[error("{doing} {}: {source}", path.display())]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
    #[error("{}: {source}", path.display())]
    NotResults { path: PathBuf, source: NotAResult },
    #[error("{} holds no result", path.display())]
    Empty { path: PathBuf },
    #[error("{}: {source}", path.display())]
    Document { path: PathBuf, source: NotOurs },
    #[error("{} names no file", path.display())]
    NoName { path: PathBuf },
    #[error("drawing {file}: {why}")]
    Plot { file: &'static str, why: String },
}

/// Writes the document and its plots. Gives the files that were written.
pub fn run(options: &Options) -> Result<Vec<PathBuf>, ReportError> {
    let mut results = Results::default();
    for path in &options.results {
        let text = fs::read_to_string(path).map_err(io_error("reading", path))?;
        results.add(&text).map_err(|source| ReportError::NotResults { path: path.clone(), source })?;
        if text.trim().is_empty() {
            return Err(ReportError::Empty { path: path.clone() });
        }
    }
    let out = &options.out;
    let folder = match out.file_stem() {
        Some(stem) => out.with_file_name(stem),
        None => return Err(ReportError::NoName { path: out.clone() }),
    };
    let document = match fs::read_to_string(out) {
        Ok(document) => document,
        Err(error) if error.kind() == io::ErrorKind::NotFound => skeleton(&NAMES),
        Err(source) => return Err(io_error("reading", out)(source)),
    };
    let plots = plots(&results);
    let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let sections = sections(&results, &plots, &name);
    let document =
        filled(&document, &sections).map_err(|source| ReportError::Document { path: out.clone(), source })?;
    fs::create_dir_all(&folder).map_err(io_error("making", &folder))?;
    let mut written = Vec::new();
    for plot in &plots {
        let path = folder.join(plot.file);
        let drawn = svg(plot).map_err(|why| ReportError::Plot { file: plot.file, why })?;
        fs::write(&path, drawn).map_err(io_error("writing", &path))?;
        written.push(path);
    }
    fs::write(out, document).map_err(io_error("writing", out))?;
    written.push(out.clone());
    Ok(written)
}

fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ReportError + use<> {
    let path = path.to_owned();
    move |source| ReportError::Io { doing, path, source }
}

#[cfg(test)]
mod tests {
    use super::{Options, run};
    use crate::runner::results::{Row, json_line, tests::row};

    #[test]
    fn a_report_keeps_what_people_wrote_and_can_be_made_again() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (results, out) = (dir.path().join("r.jsonl"), dir.path().join("performance.md"));
        let rows = [1, 32].map(|depth| row("tmpfs", &format!("randwrite-4k-qd{depth}")));
        let lines: Vec<String> = rows.iter().map(json_line).collect();
        std::fs::write(&results, lines.join("\n")).expect("written");
        let options = Options { results: vec![results.clone()], out: out.clone() };
        let written = run(&options).expect("made");
        assert!(
            written.iter().any(|path| path.ends_with("performance/randwrite-latency.svg")),
            "{written:?}"
        );
        let first = std::fs::read_to_string(&out).expect("there");
        std::fs::write(&out, format!("By hand.\n{first}")).expect("written");
        let faster = json_line(&Row { iops: 777_777.0, ..row("tmpfs", "randwrite-4k-qd32") });
        std::fs::write(&results, faster).expect("written");
        run(&options).expect("made again");
        let second = std::fs::read_to_string(&out).expect("there");
        assert!(second.starts_with("By hand.\n") && second.contains("777777"), "{second}");
        assert!(!second.contains("25000"), "{second}");
    }

    #[test]
    fn what_cannot_be_reported_is_named() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (results, out) = (dir.path().join("r.jsonl"), dir.path().join("p.md"));
        let refused = |text: Option<&str>, document: Option<&str>| {
            let _ = text.map(|text| std::fs::write(&results, text).expect("written"));
            let _ = document.map(|text| std::fs::write(&out, text).expect("written"));
            let options = Options { results: vec![results.clone()], out: out.clone() };
            run(&options).expect_err("not a report").to_string()
        };
        assert!(refused(None, None).contains("r.jsonl"));
        assert!(refused(Some(""), None).contains("no result"));
        assert!(refused(Some("{}"), None).contains("line 1"));
        let line = json_line(&row("tmpfs", "randread-4k-qd1"));
        assert!(refused(Some(&line), Some("<!-- generated: goals -->")).contains("end of goals"));
        assert!(!dir.path().join("p").exists(), "nothing was written");
    }
}
