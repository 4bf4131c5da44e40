//! The last check through every leader: for each replica of each copyset, everything is read while that replica leads.
//!
//! No order to lead exists for operators, and none is needed. A chunkserver that is *muted* hears the others and answers
//! them, and what it asks of them is not heard: it votes and takes entries, and can neither lead nor stay leader. With two
//! chunkservers muted, every copyset that has replicas on both is led by its third one; so all pairs are gone through.
//! Raft does the rest, as it would with a bad cable. The control plane is stopped meanwhile: it would order leaders back
//! to muted chunkservers, and a leader that hands over waits for somebody else to be heard.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::cluster::{Cluster, CopysetSeen};

/// A report of each chunkserver and a look at the control plane, many times over.
const SEEN_WITHIN: Duration = Duration::from_secs(20);
/// How often a pair is tried: a handover that was on its way when it was muted can hold everything up.
pub const ATTEMPTS: usize = 3;
/// Elections are over by then, and what is read after it is read through those that were elected.
pub const ELECTED_AFTER: Duration = Duration::from_secs(4);
/// Longer, and the attempt is given up.
pub const READ_WITHIN: Duration = Duration::from_secs(30);
/// By then followers have what was written last, and a handover that was ordered is over. A replica that lacks something
/// cannot be elected, and muted ones cannot send it what it lacks.
pub const EQUAL_AFTER: Duration = Duration::from_millis(1500);
/// A load that drains.
pub const DRAINED_WITHIN: Duration = Duration::from_secs(30);

/// A copyset and the chunkserver, as we count, whose replica of it leads.
pub type Leader = (u64, usize);

/// All replicas there are.
pub fn all(copysets: &[CopysetSeen]) -> BTreeSet<Leader> {
    copysets.iter().flat_map(|copyset| copyset.replicas.iter().map(|&on| (copyset.id, on))).collect()
}

/// Pairs of chunkservers to mute, one after the other.
pub fn pairs(count: usize) -> impl Iterator<Item = [usize; 2]> {
    (0..count).flat_map(move |one| (one + 1..count).map(move |other| [one, other]))
}

/// Who must lead while these two are muted.
pub fn wanted(copysets: &[CopysetSeen], muted: [usize; 2]) -> BTreeSet<Leader> {
    let on_both = copysets.iter().filter(|copyset| muted.iter().all(|on| copyset.replicas.contains(on)));
    on_both
        .filter_map(|copyset| {
            copyset.replicas.iter().find(|on| !muted.contains(on)).map(|&on| (copyset.id, on))
        })
        .collect()
}

/// Waits until the control plane, asked after now, says that these lead. Those that are muted cannot have led since they
/// are.
pub fn wait_led(cluster: &Cluster, wanted: &BTreeSet<Leader>) -> bool {
    let (deadline, from) = (Instant::now() + SEEN_WITHIN, cluster.view().looks);
    while Instant::now() < deadline {
        let view = cluster.view();
        let leads = |copyset: &CopysetSeen| copyset.leader.map(|on| (copyset.id, on));
        let led: BTreeSet<Leader> = view.copysets.iter().filter_map(leads).collect();
        if view.looks > from + 1 && wanted.is_subset(&led) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    false
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::{all, pairs, wanted};
    use crate::supervisor::cluster::CopysetSeen;

    #[test]
    fn every_replica_is_made_to_lead_once() {
        for count in 3..7 {
            let mut copysets = Vec::new();
            for [one, other] in pairs(count) {
                for third in other + 1..count {
                    let id = copysets.len() as u64;
                    copysets.push(CopysetSeen { id, replicas: vec![third, one, other], leader: None });
                }
            }
            let led: Vec<_> = pairs(count).flat_map(|muted| wanted(&copysets, muted)).collect();
            assert_eq!(led.len(), copysets.len() * 3);
            assert_eq!(led.into_iter().collect::<BTreeSet<_>>(), all(&copysets));
        }
    }
}
