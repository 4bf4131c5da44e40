//! A network per process: namespaces on one bridge, and which of them may hear which.
//!
//! A cut is a pair (from, to): what `from` sends, `to` does not hear. It is a packet filter rule in the namespace of the
//! hearer, silent as a pulled cable. Who is muted asks nothing of other chunkservers that they hear, and answers
//! them: a rule for what comes to their port. The rules count what they drop, so that a cut nobody ran into is known.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result, bail};

use super::process::{enter, tool};

/// Who is on the bridge. Chunkservers count from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    Mds,
    Backend,
    Chunkserver(usize),
}

pub type Cut = (Place, Place);

struct Node {
    place: Place,
    name: String,
    namespace: Arc<File>,
    address: Ipv4Addr,
}

pub struct Network {
    hub: String,
    hub_namespace: Arc<File>,
    nodes: Vec<Node>,
    cuts: BTreeSet<Cut>,
    muted: BTreeSet<usize>,
    /// Where chunkservers listen.
    ports: Vec<u16>,
}

/// Names of ours: `evt`, the process id, a number.
const PREFIX: &str = "evt";

impl Network {
    /// Needs root.
    pub fn new(chunkservers: usize, ports: &[u16]) -> Result<Self> {
        clear_leftovers();
        let pid = std::process::id();
        let hub = format!("{PREFIX}{pid}-hub");
        tool("ip", &["netns", "add", &hub])?;
        // From here on drop takes down what exists.
        let mut network = Self {
            hub_namespace: open(&hub)?,
            hub: hub.clone(),
            nodes: Vec::new(),
            cuts: BTreeSet::new(),
            muted: BTreeSet::new(),
            ports: ports.to_vec(),
        };
        for words in ["link set lo up", "link add br0 type bridge", "link set br0 up"] {
            inside(&hub, words)?;
        }
        inside(&hub, "addr add 10.77.0.254/24 dev br0")?;
        let places = [Place::Mds, Place::Backend].into_iter();
        let places = places.chain((0..chunkservers).map(Place::Chunkserver));
        for (number, place) in (1_u8..).zip(places) {
            let name = format!("{PREFIX}{pid}-{number}");
            let address = Ipv4Addr::new(10, 77, 0, number);
            tool("ip", &["netns", "add", &name])?;
            let namespace = open(&name)?;
            network.nodes.push(Node { place, name: name.clone(), namespace, address });
            inside(&hub, &format!("link add port{number} type veth peer name eth0 netns {name}"))?;
            inside(&hub, &format!("link set port{number} master br0 up"))?;
            inside(&name, "link set lo up")?;
            inside(&name, &format!("addr add {address}/24 dev eth0"))?;
            inside(&name, "link set eth0 up")?;
        }
        Ok(network)
    }

    pub fn address(&self, place: Place) -> Ipv4Addr {
        self.node(place).address
    }

    pub fn namespace(&self, place: Place) -> Arc<File> {
        self.node(place).namespace.clone()
    }

    /// Where an operator's tool runs: hears everybody.
    pub fn hub(&self) -> Arc<File> {
        self.hub_namespace.clone()
    }

    /// What this place sends to these goes to ports of its own instead, unless it is marked.
    pub fn redirect(&self, place: Place, to: &[Place], first_port: u16, mark: u32) -> Result<()> {
        let mut rules = format!(
            "add table ip evolute_proxy\nadd chain ip evolute_proxy out {{ type nat hook output priority -100; }}\n\
             add rule ip evolute_proxy out meta mark {mark} accept\n"
        );
        for (&to, port) in to.iter().zip(first_port..) {
            rules.push_str(&format!(
                "add rule ip evolute_proxy out ip daddr {} tcp dport {} redirect to :{port}\n",
                self.address(to),
                self.ports()
            ));
        }
        nft(self.node(place), &["-f", "-"], &rules).map(drop)
    }

    /// As a packet filter's rule has it.
    fn ports(&self) -> String {
        let ports: Vec<_> = self.ports.iter().map(u16::to_string).collect();
        format!("{{ {} }}", ports.join(", "))
    }

    pub fn cut(&mut self, cuts: impl IntoIterator<Item = Cut>) -> Result<()> {
        self.change(|network| network.cuts.extend(cuts))
    }

    /// These chunkservers and no others, until the next call.
    pub fn mute(&mut self, chunkservers: &[usize]) -> Result<()> {
        self.change(|network| network.muted = chunkservers.iter().copied().collect())
    }

    /// Mends, and gives how many packets the rules of the hearers had dropped.
    pub fn mend(&mut self, cuts: &[Cut]) -> Result<u64> {
        let mut dropped = 0;
        for node in &self.nodes {
            if cuts.iter().any(|(_, to)| *to == node.place) {
                dropped += self.dropped(node)?;
            }
        }
        self.change(|network| network.cuts.retain(|cut| !cuts.contains(cut)))?;
        Ok(dropped)
    }

    fn change(&mut self, how: impl FnOnce(&mut Self)) -> Result<()> {
        let before: Vec<String> = self.nodes.iter().map(|node| self.rules(node)).collect();
        how(self);
        for (node, before) in self.nodes.iter().zip(before) {
            let rules = self.rules(node);
            if rules != before {
                nft(node, &["-f", "-"], &rules)?;
            }
        }
        Ok(())
    }

    /// One file is one transaction: there is no moment without the rules that stay.
    fn rules(&self, node: &Node) -> String {
        let mut rules = "add table inet evolute\ndelete table inet evolute\nadd table inet evolute\n\
             add chain inet evolute heard { type filter hook input priority 0; }\n"
            .to_owned();
        let mut drop = |what: String| {
            rules.push_str(&format!("add rule inet evolute heard {what} counter drop\n"));
        };
        for (from, _) in self.cuts.iter().filter(|(_, to)| *to == node.place) {
            drop(format!("ip saddr {}", self.address(*from)));
        }
        if matches!(node.place, Place::Chunkserver(_)) {
            for &muted in &self.muted {
                drop(format!(
                    "ip saddr {} tcp dport {}",
                    self.address(Place::Chunkserver(muted)),
                    self.ports()
                ));
            }
        }
        rules
    }

    fn dropped(&self, node: &Node) -> Result<u64> {
        let text = nft(node, &["list", "table", "inet", "evolute"], "")?;
        let mut words = text.split_whitespace();
        let mut sum = 0;
        while let Some(word) = words.next() {
            if word == "packets" {
                sum += words.next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
            }
        }
        Ok(sum)
    }

    fn node(&self, place: Place) -> &Node {
        self.nodes.iter().find(|node| node.place == place).expect("every place has a node")
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in self.nodes.iter().map(|node| &node.name).chain([&self.hub]) {
            let _ = tool("ip", &["netns", "delete", name]);
        }
    }
}

/// What runs of ours left that were killed: their names say which process they belonged to.
fn clear_leftovers() {
    let Ok(names) = std::fs::read_dir("/run/netns") else { return };
    for name in names.flatten() {
        let name = name.file_name().to_string_lossy().into_owned();
        let pid = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next()?.parse::<u32>().ok());
        if pid.is_some_and(|pid| !std::path::Path::new(&format!("/proc/{pid}")).exists()) {
            let _ = tool("ip", &["netns", "delete", &name]);
        }
    }
}

fn open(name: &str) -> Result<Arc<File>> {
    let path = format!("/run/netns/{name}");
    Ok(Arc::new(File::open(&path).with_context(|| format!("cannot open {path}"))?))
}

fn inside(namespace: &str, words: &str) -> Result<()> {
    let mut arguments = vec!["-n", namespace];
    arguments.extend(words.split(' '));
    tool("ip", &arguments).map(drop)
}

fn nft(node: &Node, arguments: &[&str], rules: &str) -> Result<String> {
    let mut command = Command::new("nft");
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    enter(&mut command, Some(node.namespace.clone()));
    let mut child = command.spawn().context("cannot run nft (package nftables)")?;
    // Taken, written and closed; a rule set fits into a pipe.
    child.stdin.take().context("a pipe")?.write_all(rules.as_bytes())?;
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("nft {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
