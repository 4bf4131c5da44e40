//! Of which programs, on which machine, by which command: what a figure is worth nothing without.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};

use super::process::run;

const PROGRAMS: [&str; 4] = ["evolute-chunkserver", "evolute-mds", "evolute-vhost", "evolute"];

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct About {
    pub began_unix_s: u64,
    pub command: Vec<String>,
    /// As `--commit` said; programs do not know theirs.
    pub commit: Option<String>,
    /// By program: what `--version` prints, and the crc32c of the file, which tells two builds of one version apart.
    pub programs: BTreeMap<String, String>,
    pub cores: usize,
    pub processor: String,
    pub memory_mib: u64,
    pub kernel: String,
}

impl About {
    /// What cannot be found out is left empty: a run is not refused for it.
    pub fn gather(programs: &Path, commit: Option<&str>) -> Self {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let field = |file: &str, name: &str| {
            let text = std::fs::read_to_string(file).unwrap_or_default();
            let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default().to_owned();
            line.split_once(':').map(|(_, rest)| rest.trim().to_owned()).unwrap_or_default()
        };
        let memory = field("/proc/meminfo", "MemTotal");
        let kib = memory.split(' ').next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0);
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let mut files: Vec<PathBuf> = PROGRAMS.iter().map(|name| programs.join(name)).collect();
        files.extend(std::env::current_exe());
        let name = |file: &PathBuf| file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Self {
            began_unix_s: now.map_or(0, |since| since.as_secs()),
            command: std::env::args().collect(),
            commit: commit.map(str::to_owned),
            programs: files.iter().map(|file| (name(file), identity(file))).collect(),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            processor: field("/proc/cpuinfo", "model name"),
            memory_mib: kib / 1024,
            kernel: kernel.trim().to_owned(),
        }
    }
}

fn identity(program: &Path) -> String {
    let words = run(Command::new(program).arg("--version"));
    let version = words.ok().and_then(|words| words.split_whitespace().last().map(str::to_owned));
    let bytes = std::fs::read(program).unwrap_or_default();
    let sum = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, &bytes);
    format!("{} ({sum:08x})", version.as_deref().unwrap_or("unknown"))
}
