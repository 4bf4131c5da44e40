//! The host's end of the agent's line protocol (`images/guest/agent` is the other end, and says how it goes).

use anyhow::{Context, Result, bail};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Output and exit status of one command in the guest.
#[derive(Clone, Debug)]
pub struct Output {
    pub status: i32,
    pub text: String,
}

pub struct Agent {
    stream: UnixStream,
    /// Bytes that came and belong to no answer yet.
    received: Vec<u8>,
    commands: u32,
    /// Everything that went over the line, for whoever reads a failure.
    transcript: File,
}

/// How often a wait is interrupted to look whether the guest is still alive.
const LOOK_EVERY: Duration = Duration::from_millis(200);

impl Agent {
    pub fn new(stream: UnixStream, transcript: File) -> Result<Agent> {
        stream.set_read_timeout(Some(LOOK_EVERY))?;
        Ok(Agent { stream, received: Vec::new(), commands: 0, transcript })
    }

    /// Waits for the agent to take commands: after power-on and after each reboot. Gives the kernel's release.
    pub fn wait_ready(&mut self, deadline: Duration, alive: impl FnMut() -> Result<()>) -> Result<String> {
        const READY: &[u8] = b"\n@ready ";
        let (_, release) = self.receive_line(READY, deadline, alive).context("the guest did not come up")?;
        Ok(release)
    }

    /// Runs a shell script in the guest and waits for its end.
    pub fn run(
        &mut self,
        script: &str,
        deadline: Duration,
        alive: impl FnMut() -> Result<()>,
    ) -> Result<Output> {
        let token = self.send(script)?;
        let end = format!("\n{token} ");
        let (text, status) = self
            .receive_line(end.as_bytes(), deadline, alive)
            .with_context(|| format!("in the guest: {}", script.trim()))?;
        let status = status.trim().parse().with_context(|| format!("the agent's status is {status:?}"))?;
        Ok(Output { status, text })
    }

    /// Sends a script whose end the guest will not live to report. Gives the word that would mark the end.
    pub fn send(&mut self, script: &str) -> Result<String> {
        self.commands += 1;
        // Unlike anything a command prints by chance.
        let token = format!("@end-{}-{:08x}", self.commands, fingerprint(script, self.commands));
        writeln!(self.transcript, "\n$ {}", script.trim())?;
        self.stream.write_all(format!("run {token} {}\n", base64(script.as_bytes())).as_bytes())?;
        Ok(token)
    }

    /// Receives up to and including a line that begins with `mark` (itself beginning with a newline).
    /// Gives what came before it and the rest of that line.
    fn receive_line(
        &mut self,
        mark: &[u8],
        deadline: Duration,
        mut alive: impl FnMut() -> Result<()>,
    ) -> Result<(String, String)> {
        let started = Instant::now();
        let mut looked = 0_usize;
        let mut buffer = [0; 4096];
        loop {
            // The mark may straddle what was there and what came.
            let from = looked.saturating_sub(mark.len());
            if let Some(at) = find(&self.received[from..], mark).map(|at| at + from) {
                let rest = at + mark.len();
                if let Some(length) = find(&self.received[rest..], b"\n") {
                    let before = String::from_utf8_lossy(&self.received[..at]).into_owned();
                    let line = String::from_utf8_lossy(&self.received[rest..rest + length]).into_owned();
                    self.received.drain(..rest + length + 1);
                    return Ok((before, line));
                }
                looked = at;
            } else {
                looked = self.received.len();
            }
            match self.stream.read(&mut buffer) {
                Ok(0) => {
                    alive()?;
                    bail!("QEMU closed the guest's serial line");
                }
                Ok(length) => {
                    self.transcript.write_all(&buffer[..length])?;
                    self.received.extend_from_slice(&buffer[..length]);
                }
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => alive()?,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
            if started.elapsed() > deadline {
                let so_far = String::from_utf8_lossy(&self.received);
                bail!("no answer within {} s; so far it said: {}", deadline.as_secs(), so_far.trim());
            }
        }
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

/// FNV-1a: only to make tokens differ.
fn fingerprint(script: &str, salt: u32) -> u32 {
    script.bytes().fold(0x811c_9dc5 ^ salt, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let bits =
            three.iter().fold(0u32, |bits, &byte| bits << 8 | u32::from(byte)) << (8 * (3 - three.len()));
        for digit in 0..4 {
            let index = (bits >> (18 - 6 * digit)) & 63;
            text.push(if digit <= three.len() { char::from(DIGITS[index as usize]) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_the_one_of_rfc_4648() {
        for (plain, encoded) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(plain.as_bytes()), encoded);
        }
    }

    #[test]
    fn an_answer_that_comes_in_pieces_is_put_together() {
        let (host, mut guest) = UnixStream::pair().unwrap();
        let mut agent = Agent::new(host, tempfile::tempfile().unwrap()).unwrap();
        let writer = std::thread::spawn(move || {
            for piece in ["out\nput\n@e", "nd-7 ", "1", "2\n\n@end-", "8 0\n"] {
                guest.write_all(piece.as_bytes()).unwrap();
                std::thread::yield_now();
            }
            guest
        });
        let within = Duration::from_secs(10);
        let first = agent.receive_line(b"\n@end-7 ", within, || Ok(())).unwrap();
        assert_eq!(first, ("out\nput".into(), "12".into()));
        let second = agent.receive_line(b"\n@end-8 ", within, || Ok(())).unwrap();
        assert_eq!(second, (String::new(), "0".into()));
        drop(writer.join().unwrap());
    }
}
