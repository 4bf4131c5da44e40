//! A request to an HTTP API at a UNIX socket, and its answer.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// A VMM that writes its guest to a file, on a busy machine.
const ANSWERED_WITHIN: Duration = Duration::from_secs(60);
/// Longer answers than a VM's description are none.
const BODY_BYTES_MAX: usize = 1 << 20;

/// One that has been sent.
pub struct Asked {
    what: String,
    stream: BufReader<UnixStream>,
}

/// Sends a request. With a body it is a PUT, as is everything that changes something.
pub fn ask(socket: &Path, method: &str, what: &str, body: &Value) -> Result<Asked> {
    let at = || format!("{what} of the API at {}", socket.display());
    let mut stream = UnixStream::connect(socket).with_context(at)?;
    stream.set_read_timeout(Some(ANSWERED_WITHIN))?;
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let head =
        format!("{method} /api/v1/{what} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json");
    write!(stream, "{head}\r\nContent-Length: {}\r\n\r\n{body}", body.len()).with_context(at)?;
    Ok(Asked { what: what.to_string(), stream: BufReader::new(stream) })
}

impl Asked {
    /// Waits for the answer. One that is not of success is an error with what it says.
    pub fn answer(mut self) -> Result<Value> {
        let what = std::mem::take(&mut self.what);
        let (status, body) = self.read().with_context(|| format!("no answer to {what}"))?;
        ensure!(
            status.split(' ').nth(1).is_some_and(|code| code.starts_with('2')),
            "{what}: {status} {body}"
        );
        if body.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_str(&body).with_context(|| format!("{what}: {body}"))
    }

    fn read(&mut self) -> Result<(String, String)> {
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            ensure!(self.stream.read_line(&mut line)? > 0, "it ends after {lines:?}");
            match line.trim_end() {
                "" => break,
                line => lines.push(line.to_string()),
            }
        }
        let length = lines.iter().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse().ok())?
        });
        let length = length.unwrap_or(0);
        ensure!(length <= BODY_BYTES_MAX, "it has {length} bytes");
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body)?;
        Ok((lines.swap_remove(0), String::from_utf8_lossy(&body).into_owned()))
    }
}
