//! `evolute chunkserver list | show | retire | unretire`.

use std::time::Duration;

use evolute_protocol::rpc::{ChunkserverStatus, ClusterStatus, Decision, ErrorWord};
use serde::Serialize;
use serde_json::json;

use crate::args::Decide;
use crate::failure::Failure;
use crate::mds::Mds;
use crate::output::{Output, ago, span, table, unix_ms_now};
use crate::repair::{RepairView, repair_table};
use crate::size::{both, human};

/// How often `--wait` looks.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A chunkserver as `--json` shows it. The shape is in docs/cli.md.
#[derive(Debug, Serialize)]
pub struct ChunkserverView {
    id: u32,
    address: String,
    pool: String,
    zone: String,
    server: String,
    online: bool,
    retiring: bool,
    dead: bool,
    put_back_replicas: u32,
    last_report_ms_ago: u64,
    capacity_bytes: u64,
    used_bytes: u64,
    free_bytes: u64,
    replicas: u32,
    leaders: u32,
    trouble: Option<String>,
    scrubbed_bytes: u64,
    last_full_scrub_unix_ms: Option<u64>,
    bad_blocks_found: u64,
    bad_blocks_repaired: u64,
    blocks_compared: u64,
    blocks_differing: u64,
    blocks_not_compared: u64,
    blocks_undecided: u64,
    write_latency_us_p50: Option<u64>,
    write_latency_us_p99: Option<u64>,
    version: String,
}

impl From<ChunkserverStatus> for ChunkserverView {
    fn from(c: ChunkserverStatus) -> Self {
        let known = |number: u64| (number != 0).then_some(number);
        Self {
            id: c.id,
            address: c.address,
            pool: c.pool,
            zone: c.zone,
            server: c.server,
            online: c.online,
            retiring: c.retiring,
            dead: c.dead,
            put_back_replicas: c.put_back_replicas,
            last_report_ms_ago: c.last_report_ms_ago,
            capacity_bytes: c.capacity_bytes,
            used_bytes: c.used_bytes,
            free_bytes: c.free_bytes,
            replicas: c.replicas,
            leaders: c.leaders,
            trouble: (!c.trouble.is_empty()).then_some(c.trouble),
            scrubbed_bytes: c.scrubbed_bytes,
            last_full_scrub_unix_ms: known(c.last_full_scrub_unix_ms),
            bad_blocks_found: c.bad_blocks_found,
            bad_blocks_repaired: c.bad_blocks_repaired,
            blocks_compared: c.blocks_compared,
            blocks_differing: c.blocks_differing,
            blocks_not_compared: c.blocks_not_compared,
            blocks_undecided: c.blocks_undecided,
            write_latency_us_p50: known(c.write_latency_us_p50),
            write_latency_us_p99: known(c.write_latency_us_p99),
            version: c.version,
        }
    }
}

impl ChunkserverView {
    fn state(&self) -> String {
        let mut states = Vec::new();
        match (self.online, self.last_report_ms_ago) {
            (true, _) if self.trouble.is_none() => states.push("online".to_owned()),
            (true, _) => states.extend(self.trouble.clone()),
            (false, u64::MAX) => states.push("offline, not heard by this control plane".to_owned()),
            (false, silent) => states.push(format!("offline, last heard {}", ago(silent))),
        }
        if self.dead {
            states.push("declared dead".to_owned());
        }
        if self.put_back_replicas > 0 {
            states
                .push(format!("put back to an older copy: {} replicas do not vote", self.put_back_replicas));
        }
        match (self.retiring, self.replicas) {
            (true, 0) => states.push("retired, empty".to_owned()),
            (true, _) => states.push("retiring".to_owned()),
            (false, _) => {}
        }
        states.join("; ")
    }

    fn bad_blocks(&self) -> String {
        match (self.bad_blocks_found, self.bad_blocks_repaired) {
            (0, _) => "none".to_owned(),
            (found, repaired) => format!("{found} found, {repaired} repaired"),
        }
    }

    fn compared(&self) -> String {
        let (compared, left) = (self.blocks_compared, self.blocks_not_compared);
        let mut words = format!("{compared} blocks with other replicas; {left} could not be in their turn");
        for (count, what) in [
            (self.blocks_differing, "differed here and were put right"),
            (self.blocks_undecided, "differ and no majority can tell which is right"),
        ] {
            if count > 0 {
                words = format!("{words}; {count} {what}");
            }
        }
        words
    }

    fn latency(&self) -> String {
        match (self.write_latency_us_p50, self.write_latency_us_p99) {
            (Some(p50), Some(p99)) => format!("{p50} µs median, {p99} µs at the 99th percentile"),
            _ => "not known".to_owned(),
        }
    }

    fn row(&self) -> Vec<String> {
        vec![
            self.id.to_string(),
            self.address.clone(),
            self.zone.clone(),
            self.server.clone(),
            human(self.capacity_bytes),
            human(self.used_bytes),
            human(self.free_bytes),
            self.replicas.to_string(),
            self.leaders.to_string(),
            self.bad_blocks(),
            self.state(),
        ]
    }

    fn words(&self) -> String {
        let scrubbed = match self.last_full_scrub_unix_ms {
            Some(at) => format!(
                "{} since it started; everything last {}",
                both(self.scrubbed_bytes),
                ago(unix_ms_now().saturating_sub(at))
            ),
            None => format!("{} since it started; not everything yet", both(self.scrubbed_bytes)),
        };
        let rows = [
            ("id", self.id.to_string()),
            ("state", self.state()),
            ("address", self.address.clone()),
            ("zone", self.zone.clone()),
            ("server", self.server.clone()),
            ("pool", self.pool.clone()),
            ("capacity", both(self.capacity_bytes)),
            ("used", both(self.used_bytes)),
            ("free", both(self.free_bytes)),
            ("replicas", format!("{}, leads {}", self.replicas, self.leaders)),
            ("scrubbed", scrubbed),
            ("compared", self.compared()),
            ("bad blocks", self.bad_blocks()),
            ("log write", self.latency()),
            ("version", self.version.clone()),
        ];
        rows.map(|(key, value)| format!("{key:<10} {value}")).join("\n")
    }
}

/// The table of `chunkserver list` and of `cluster status`.
pub fn chunkserver_table(chunkservers: &[ChunkserverView]) -> String {
    let headings = [
        ">ID",
        "ADDRESS",
        "ZONE",
        "SERVER",
        ">CAPACITY",
        ">USED",
        ">FREE",
        ">REPLICAS",
        ">LEADERS",
        "BAD BLOCKS",
        "STATE",
    ];
    table(&headings, &chunkservers.iter().map(ChunkserverView::row).collect::<Vec<_>>())
}

pub async fn list(mds: &mut Mds, output: Output) -> Result<(), Failure> {
    let status = mds.status().await?;
    let chunkservers: Vec<_> = status.chunkservers.into_iter().map(ChunkserverView::from).collect();
    output.answer(&json!({"chunkservers": chunkservers}), || {
        if chunkservers.is_empty() {
            "no chunkservers have registered; `evolute-chunkserver --help` says how one is started".to_owned()
        } else {
            chunkserver_table(&chunkservers)
        }
    });
    Ok(())
}

/// One chunkserver, and what moves from and to it.
#[derive(Debug, Serialize)]
struct Shown {
    #[serde(flatten)]
    chunkserver: ChunkserverView,
    copysets: Vec<u32>,
    repairs: Vec<RepairView>,
}

impl Shown {
    fn of(id: u32, status: ClusterStatus) -> Result<Self, Failure> {
        let known = status.chunkservers.into_iter().find(|c| c.id == id);
        let chunkserver = ChunkserverView::from(known.ok_or(Failure::NoChunkserver { id })?);
        let mine = status.copysets.into_iter().filter(|c| c.replicas.iter().any(|r| r.chunkserver == id));
        let repairs = status.repairs.into_iter().map(RepairView::from);
        Ok(Self {
            chunkserver,
            copysets: mine.map(|copyset| copyset.id).collect(),
            repairs: repairs.filter(|r| r.old_chunkserver == id || r.new_chunkserver == id).collect(),
        })
    }

    fn words(&self) -> String {
        let copysets: Vec<_> = self.copysets.iter().map(u32::to_string).collect();
        let copysets = if copysets.is_empty() { "none".to_owned() } else { copysets.join(" ") };
        let mut words = format!("{}\n{:<10} {copysets}", self.chunkserver.words(), "copysets");
        if !self.repairs.is_empty() {
            words = format!("{words}\n\nReplicas on their way\n{}", repair_table(&self.repairs));
        }
        words
    }

    /// How far a retirement is, in one line.
    fn progress(&self) -> String {
        let leaving = self.repairs.iter().filter(|r| r.old_chunkserver == self.chunkserver.id);
        let (count, longest) = (leaving.clone().count(), leaving.filter_map(|r| r.eta_ms()).max());
        let eta =
            longest.map_or(String::new(), |eta| format!(", the slowest of them done in about {}", span(eta)));
        format!("{} replicas left, {count} on their way{eta}", self.chunkserver.replicas)
    }
}

pub async fn show(mds: &mut Mds, output: Output, id: u32) -> Result<(), Failure> {
    let shown = Shown::of(id, mds.status().await?)?;
    output.answer(&shown, || shown.words());
    Ok(())
}

pub async fn retire(mds: &mut Mds, output: Output, id: u32, wait: bool) -> Result<(), Failure> {
    let answer = known(id, mds.retire(id, true).await)?;
    let shown = Shown::of(id, mds.status().await?)?;
    let event = json!({"event": "retiring", "chunkserver": shown, "obstacles": answer.obstacles});
    output.event(&event, || {
        let mut words = format!("chunkserver-{id} is retiring: {}", shown.progress());
        for obstacle in &answer.obstacles {
            words = format!("{words}\n  - {obstacle}");
        }
        if !wait && shown.chunkserver.replicas > 0 {
            words =
                format!("{words}\n`evolute chunkserver show {id}` shows how far it is; unretire stops it");
        }
        words
    });
    if !wait {
        return Ok(());
    }
    let mut said = shown.progress();
    loop {
        let shown = Shown::of(id, mds.status().await?)?;
        if !shown.chunkserver.retiring {
            return Err(Failure::NotRetiring { id });
        }
        if shown.chunkserver.replicas == 0 && shown.repairs.is_empty() {
            output.event(&json!({"event": "empty", "chunkserver": shown}), || {
                format!("chunkserver-{id} is empty: it can be stopped for good")
            });
            return Ok(());
        }
        if shown.progress() != said {
            said = shown.progress();
            output.event(&json!({"event": "progress", "chunkserver": shown}), || said.clone());
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

pub async fn unretire(mds: &mut Mds, output: Output, id: u32) -> Result<(), Failure> {
    known(id, mds.retire(id, false).await)?;
    let shown = Shown::of(id, mds.status().await?)?;
    output.answer(&shown, || {
        format!(
            "chunkserver-{id} stays, with {} replicas; it gets its share again",
            shown.chunkserver.replicas
        )
    });
    Ok(())
}

/// Decisions that cannot be taken back are asked for, by a person or with `--yes`.
pub async fn decide(mds: &mut Mds, output: Output, said: &Decide, decision: Decision) -> Result<(), Failure> {
    let id = said.id;
    let (question, answer) = match decision {
        Decision::Accept => (
            format!(
                "What chunkserver-{id} acknowledged after its copy was made is lost, as far as no other chunkserver has it. \
                 Disks that are attached and have seen more wait; those attached anew show what the copy holds."
            ),
            format!("chunkserver-{id} counts again, as it is"),
        ),
        Decision::Dead => (
            format!(
                "The replicas of chunkserver-{id} are made anew elsewhere; do so only if it does not come back."
            ),
            format!("chunkserver-{id} is declared dead"),
        ),
        Decision::Remove | Decision::Unknown => (
            format!("chunkserver-{id} leaves the list for good; its directory is of no use any more."),
            format!("chunkserver-{id} is removed"),
        ),
    };
    if !said.yes {
        confirm(&question)?;
    }
    let decided = known(id, mds.decide(id, decision).await)?;
    output.answer(&json!({"chunkserver": id, "obstacles": decided.obstacles}), || {
        decided.obstacles.iter().fold(answer, |words, obstacle| format!("{words}\n  - {obstacle}"))
    });
    Ok(())
}

fn confirm(question: &str) -> Result<(), Failure> {
    eprint!("{question}\nGo on? [y/N] ");
    let mut line = String::new();
    let read = std::io::stdin().read_line(&mut line);
    match (read, line.trim()) {
        (Ok(_), "y" | "Y" | "yes") => Ok(()),
        _ => {
            Err(Failure::Usage { what: "not done".to_owned(), next: Some("say y, or give --yes".to_owned()) })
        }
    }
}

/// The advice for a thing that is not there names volumes; this is none.
fn known<T>(id: u32, answer: Result<T, Failure>) -> Result<T, Failure> {
    answer.map_err(|failure| match failure {
        Failure::Refused { word: ErrorWord::NotFound, .. } => Failure::NoChunkserver { id },
        other => other,
    })
}
