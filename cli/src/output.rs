//! What the tool prints: words for people, one JSON document for programs, never a mixture.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::process::ExitCode;
use std::sync::OnceLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use evolute_daemon::Outlet;
use serde::Serialize;
use serde_json::json;

use crate::failure::Failure;

/// How the person or program wants to be told.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    pub json: bool,
}

impl Output {
    pub fn new(json: bool) -> Self {
        Self { json }
    }

    /// The answer of a command: `value` with `--json`, else what `words` makes.
    pub fn answer(self, value: &impl Serialize, words: impl FnOnce() -> String) {
        let text = if self.json {
            serde_json::to_string_pretty(value).expect("our own types have string keys and finite numbers")
        } else {
            words()
        };
        say(&text);
    }

    /// One of several things that happen during a command: a line either way.
    pub fn event(self, value: &impl Serialize, words: impl FnOnce() -> String) {
        let text = if self.json {
            serde_json::to_string(value).expect("our own types have string keys and finite numbers")
        } else {
            words()
        };
        say(&text);
    }

    pub fn failure(self, failure: &Failure) -> ExitCode {
        if self.json {
            let error = json!({"error": {
                "word": failure.word(),
                "message": failure.to_string(),
                "next": failure.next(),
                "exit": failure.exit_status(),
            }});
            say_error(&error.to_string());
        } else {
            say_error(&format!("evolute: {failure}"));
            if let Some(next) = failure.next() {
                say_error(&format!("  {next}"));
            }
        }
        ExitCode::from(failure.exit_status())
    }
}

/// Standard output and standard error of a command that looks after processes and waits for nobody who reads.
static UNWAITING: OnceLock<[Outlet; 2]> = OnceLock::new();
/// What was said last gets this long to be written.
const LAST_WORDS_MAX: Duration = Duration::from_secs(1);

/// From now on [`say`] and [`say_error`] wait for nobody. What is said last is written by [`say_nothing_more`].
pub fn wait_for_no_reader() -> io::Result<()> {
    let outlet = |fd: BorrowedFd<'_>| Outlet::new(fd.try_clone_to_owned()?, "output");
    let outlets = [outlet(io::stdout().as_fd())?, outlet(io::stderr().as_fd())?];
    let _ = UNWAITING.set(outlets);
    Ok(())
}

/// Before the process ends: gives what was said a moment to be written.
pub fn say_nothing_more() {
    for outlet in UNWAITING.get().into_iter().flatten() {
        outlet.flush(LAST_WORDS_MAX);
    }
}

/// A line to standard output. A reader that has gone away (`| head`) is no reason to panic.
pub fn say(text: &str) {
    match UNWAITING.get() {
        Some([out, _]) => out.say(format!("{text}\n").as_bytes()),
        None => {
            let mut out = io::stdout().lock();
            let _ = writeln!(out, "{text}").and_then(|()| out.flush());
        }
    }
}

/// The same to standard error.
pub fn say_error(text: &str) {
    match UNWAITING.get() {
        Some([_, error]) => error.say(format!("{text}\n").as_bytes()),
        None => {
            let _ = writeln!(io::stderr(), "{text}");
        }
    }
}

/// Columns as wide as their widest cell. A column whose heading starts with `>` is aligned to the right.
pub fn table(headings: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([headings[column].trim_start_matches('>').len()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..headings.len()).map(width).collect();
    let headings_row: Vec<String> = headings.iter().map(|h| h.trim_start_matches('>').to_owned()).collect();
    let mut text = String::new();
    for row in std::iter::once(&headings_row).chain(rows) {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let width = widths[column];
            if headings[column].starts_with('>') {
                let _ = write!(line, "{cell:>width$}  ");
            } else {
                let _ = write!(line, "{cell:<width$}  ");
            }
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text.truncate(text.trim_end().len());
    text
}

/// `2026-11-22 15:41:42 UTC`, from milliseconds since 1970.
pub fn time(unix_ms: u64) -> String {
    evolute_daemon::utc(unix_ms / 1000).replace('T', " ").replace('Z', " UTC")
}

/// `3 s ago`, `2 h ago`.
pub fn ago(ms: u64) -> String {
    format!("{} ago", span(ms))
}

/// `3 s`, `2 h`.
pub fn span(ms: u64) -> String {
    match ms / 1000 {
        s @ 0..120 => format!("{s} s"),
        s @ 120..7200 => format!("{} min", s / 60),
        s @ 7200..172_800 => format!("{} h", s / 3600),
        s => format!("{} days", s / 86_400),
    }
}

pub fn unix_ms_now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::{ago, table, time};

    #[test]
    fn times_are_those_of_the_calendar() {
        for (ms, text) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_400_000, "2000-02-29 00:00:00 UTC"),
            (1_795_362_102_999, "2026-11-22 15:41:42 UTC"),
            (4_107_542_399_000, "2100-02-28 23:59:59 UTC"),
        ] {
            assert_eq!(time(ms), text);
        }
        assert_eq!((ago(1999).as_str(), ago(7_200_000).as_str()), ("1 s ago", "2 h ago"));
    }

    #[test]
    fn columns_stay_under_their_headings() {
        let rows =
            vec![vec!["a".into(), "1".into(), "x".into()], vec!["long".into(), "100".into(), String::new()]];
        assert_eq!(table(&["NAME", ">N", "Z"], &rows), "NAME    N  Z\na       1  x\nlong  100");
    }
}
