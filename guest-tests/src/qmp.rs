//! QEMU's control socket: one command, one answer; events in between are skipped.

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

pub struct Qmp {
    stream: BufReader<UnixStream>,
}

impl Qmp {
    /// Over a socket that QEMU has just connected to us.
    pub fn new(stream: UnixStream) -> Result<Qmp> {
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        let mut qmp = Qmp { stream: BufReader::new(stream) };
        qmp.receive()?; // the greeting
        qmp.run("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    pub fn run(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let line = json!({ "execute": command, "arguments": arguments });
        writeln!(self.stream.get_mut(), "{line}").with_context(|| format!("QMP {command}"))?;
        loop {
            let mut answer = self.receive().with_context(|| format!("QMP {command}"))?;
            if let Some(error) = answer.get("error") {
                bail!("QMP {command}: {error}");
            }
            if let Some(result) = answer.get_mut("return") {
                return Ok(result.take());
            }
        }
    }

    fn receive(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        if line.is_empty() {
            bail!("QEMU closed its control socket");
        }
        Ok(serde_json::from_str(&line)?)
    }
}
