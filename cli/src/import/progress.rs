//! How far an import is: one line that changes for a person at a terminal, a line now and then for a log, an event for
//! a program.

use std::io::{self, IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use serde_json::json;

use super::copy::Copied;
use crate::output::{Output, say_error};
use crate::size::human;

const ON_TERMINAL: Duration = Duration::from_millis(200);
const IN_LOG: Duration = Duration::from_secs(5);
const AS_EVENT: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub struct Progress {
    output: Output,
    image_bytes: u64,
    begun: Instant,
    told: Instant,
    terminal: bool,
    /// A changing line is on the terminal and wants to be ended.
    line_open: bool,
}

impl Progress {
    pub fn new(output: Output, image_bytes: u64) -> Self {
        let now = Instant::now();
        let terminal = !output.json && io::stderr().is_terminal();
        Self { output, image_bytes, begun: now, told: now, terminal, line_open: false }
    }

    pub fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }

    pub fn at(&mut self, copied: Copied) {
        let every = match (self.output.json, self.terminal) {
            (true, _) => AS_EVENT,
            (_, true) => ON_TERMINAL,
            (_, false) => IN_LOG,
        };
        if self.told.elapsed() < every {
            return;
        }
        self.told = Instant::now();
        let pace = Pace::new(copied, self.image_bytes, self.elapsed());
        if self.output.json {
            self.output.event(
                &json!({
                    "event": "progress",
                    "done_bytes": copied.done_bytes,
                    "image_bytes": self.image_bytes,
                    "written_bytes": copied.written_bytes,
                    "bytes_per_s": pace.bytes_per_s,
                    "eta_s": pace.left.map(|left| left.as_secs()),
                }),
                String::new,
            );
            return;
        }
        let words = pace.words(copied, self.image_bytes);
        let mut err = io::stderr().lock();
        if self.terminal {
            // Back to the start of the line; what the last one had more is wiped.
            let _ = write!(err, "\r{words}\x1b[K").and_then(|()| err.flush());
            self.line_open = true;
        } else {
            let _ = writeln!(err, "{words}");
        }
    }

    /// The next words begin on a line of their own.
    pub fn end_line(&mut self) {
        if std::mem::take(&mut self.line_open) {
            say_error("");
        }
    }
}

/// How fast it goes, and how long it will still take if it stays so.
struct Pace {
    bytes_per_s: u64,
    left: Option<Duration>,
}

impl Pace {
    fn new(copied: Copied, image_bytes: u64, elapsed: Duration) -> Self {
        let ms = elapsed.as_millis().max(1);
        let per_s = |bytes: u64| u64::try_from(u128::from(bytes) * 1000 / ms).unwrap_or(u64::MAX);
        let left = image_bytes.saturating_sub(copied.done_bytes);
        let left =
            u64::try_from(u128::from(left) * ms / u128::from(copied.done_bytes.max(1))).unwrap_or(u64::MAX);
        Self {
            bytes_per_s: per_s(copied.written_bytes),
            left: (copied.done_bytes > 0).then_some(Duration::from_millis(left)),
        }
    }

    fn words(&self, copied: Copied, image_bytes: u64) -> String {
        let percent = u128::from(copied.done_bytes) * 100 / u128::from(image_bytes.max(1));
        let left = self.left.map_or(String::new(), |left| {
            let s = left.as_secs();
            format!(", {}:{:02} left", s / 60, s % 60)
        });
        format!(
            "{percent:>3} %  {} of {}, {} written at {}/s{left}",
            human(copied.done_bytes),
            human(image_bytes),
            human(copied.written_bytes),
            human(self.bytes_per_s)
        )
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Copied, Pace};

    #[test]
    fn the_time_left_follows_from_what_was_done() {
        let copied = Copied { done_bytes: 1 << 30, written_bytes: 512 << 20 };
        let pace = Pace::new(copied, 4 << 30, Duration::from_secs(8));
        assert_eq!((pace.bytes_per_s, pace.left), (64 << 20, Some(Duration::from_secs(24))));
        assert_eq!(
            pace.words(copied, 4 << 30),
            " 25 %  1 GiB of 4 GiB, 512 MiB written at 64 MiB/s, 0:24 left"
        );
        assert_eq!(Pace::new(Copied::default(), 1, Duration::ZERO).left, None);
    }
}
