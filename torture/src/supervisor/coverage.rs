//! When a fault counts: it hit what it is about, and enough was at stake meanwhile.
//!
//! A fault's *window* goes from its beginning until [`AFTERMATH_NS`] after it was healed. What nobody wrote cannot be
//! lost, so a fault in whose window too little was acknowledged is no proof of anything: it happened, and it does not
//! count. While some faults last a guest can write nothing at all; the windows of those begin as long before, with the
//! changes that were answered last and those that were under way.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::fault::Fault;
use super::network::Place;
use super::report::Happened;

/// After a fault is healed, elections and reconnections may still be going on.
pub const AFTERMATH_NS: u64 = 3_000_000_000;

/// How many of the copysets whose leader is known were led by the chunkserver that was hit. Of those its replica is
/// (with a cut: the smaller side has) the leader, of the others a follower.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Led {
    pub copysets: u64,
    pub of: u64,
}

impl Led {
    pub fn a_leader(self) -> bool {
        self.copysets > 0
    }

    pub fn a_follower(self) -> bool {
        self.copysets < self.of
    }
}

/// What runs at a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Program {
    Chunkserver,
    Backend,
    Mds,
}

impl Program {
    pub const ALL: [Program; 3] = [Program::Chunkserver, Program::Backend, Program::Mds];

    pub fn at(place: Place) -> Self {
        match place {
            Place::Mds => Program::Mds,
            Place::Backend => Program::Backend,
            Place::Chunkserver(_) => Program::Chunkserver,
        }
    }
}

/// What a fault of this kind must have hit, once at least, for the kind to be covered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wants {
    pub leader: bool,
    pub follower: bool,
}

impl Fault {
    pub fn wants(self) -> Wants {
        let (leader, follower) = match self {
            Fault::KillLeader | Fault::StopLeader | Fault::CutClient => (true, false),
            Fault::KillFollower | Fault::StopFollower => (false, true),
            Fault::RestartChunkserver
            | Fault::CutLeader
            | Fault::CutOneWay
            | Fault::CutBridge
            | Fault::IsolateLeader
            | Fault::PowerOne
            | Fault::SlowDisk
            | Fault::StuckDisk
            | Fault::FailingSync
            | Fault::FullDisk => (true, true),
            // These hit none of the replicas, or all of them.
            Fault::KillChunkservers
            | Fault::KillMds
            | Fault::KillBackend
            | Fault::KillEverything
            | Fault::StopMds
            | Fault::StopBackend
            | Fault::RestartMds
            | Fault::RestartBackend
            | Fault::PowerAll
            | Fault::ZombieBackend
            | Fault::DelayRequests
            | Fault::DuplicateRequests
            | Fault::AllAddressesMoved
            | Fault::RollbackChunkserver
            | Fault::RollbackMds
            | Fault::WrongMds
            | Fault::LogReaderStopped
            | Fault::DescriptorsGone => (false, false),
        };
        Wants { leader, follower }
    }

    /// While it lasts no change can be answered.
    fn silences_the_guest(self) -> bool {
        matches!(
            self,
            Fault::KillChunkservers
                | Fault::KillBackend
                | Fault::KillEverything
                | Fault::StopBackend
                | Fault::RestartBackend
                | Fault::PowerAll
                | Fault::ZombieBackend
                | Fault::AllAddressesMoved
        )
    }
}

/// On the load's clock.
pub fn window(one: &Happened) -> (u64, u64) {
    let before = if one.fault.silences_the_guest() { AFTERMATH_NS } else { 0 };
    (one.began_ns.saturating_sub(before), one.healed_ns + AFTERMATH_NS)
}

/// Faults of one kind that count, and what they hit.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Covered {
    pub faults: usize,
    pub leaders: usize,
    pub followers: usize,
    /// Of faults that hit all programs in turn: which were.
    #[serde(default)]
    pub programs: BTreeSet<Program>,
    /// Acknowledged in all of their windows.
    pub acks: u64,
}

impl Covered {
    /// Of the faults of one kind.
    pub fn of<'a>(all: impl Iterator<Item = &'a Happened>, least_acks: u64) -> Self {
        let mut covered = Self::default();
        for one in all.filter(|one| one.happened) {
            let Some(acks) = one.acks.filter(|&acks| acks >= least_acks) else { continue };
            covered.faults += 1;
            covered.acks += acks;
            covered.programs.extend(one.program);
            covered.leaders += usize::from(one.led.is_some_and(Led::a_leader));
            covered.followers += usize::from(one.led.is_some_and(Led::a_follower));
        }
        covered
    }

    /// What is not covered of such a fault, in words.
    pub fn lacks(&self, fault: Fault, least_acks: u64) -> Option<String> {
        let wants = fault.wants();
        if self.faults == 0 {
            Some(format!("{fault} happened, and never with {least_acks} acknowledged changes around it"))
        } else if wants.leader && self.leaders == 0 {
            Some(format!("{fault} never hit the leader of a copyset for sure"))
        } else if wants.follower && self.followers == 0 {
            Some(format!("{fault} never hit a follower for sure"))
        } else if fault.takes_turns() {
            let missing = Program::ALL.into_iter().find(|program| !self.programs.contains(program))?;
            Some(format!("{fault} never hit a {missing:?}"))
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{AFTERMATH_NS, Covered, Led, Program, window};
    use crate::supervisor::fault::Fault;
    use crate::supervisor::report::Happened;

    fn hit(fault: Fault, copysets: u64, acks: u64) -> Happened {
        let led = Some(Led { copysets, of: 6 });
        Happened { led, acks: Some(acks), ..Happened::new(fault, 10_000_000_000, 11_000_000_000) }
    }

    fn lacks(fault: Fault, all: &[Happened]) -> Option<String> {
        Covered::of(all.iter(), 100).lacks(fault, 100)
    }

    #[test]
    fn a_fault_that_nobody_wrote_through_is_no_proof() {
        assert!(lacks(Fault::KillMds, &[hit(Fault::KillMds, 0, 99)]).is_some());
        assert_eq!(lacks(Fault::KillMds, &[hit(Fault::KillMds, 0, 99), hit(Fault::KillMds, 0, 100)]), None);
    }

    #[test]
    fn leader_and_follower_must_both_have_been_hit() {
        let (idle, some, all) =
            (hit(Fault::PowerOne, 0, 500), hit(Fault::PowerOne, 2, 500), hit(Fault::PowerOne, 6, 500));
        let thin = hit(Fault::PowerOne, 2, 5);
        assert!(
            lacks(Fault::PowerOne, std::slice::from_ref(&idle)).is_some_and(|why| why.contains("leader"))
        );
        assert!(
            lacks(Fault::PowerOne, std::slice::from_ref(&all)).is_some_and(|why| why.contains("follower"))
        );
        assert!(lacks(Fault::PowerOne, &[idle.clone(), thin]).is_some());
        assert_eq!(lacks(Fault::PowerOne, &[some]), None);
        assert_eq!(lacks(Fault::PowerOne, &[idle, all]), None);
    }

    #[test]
    fn what_hits_all_programs_in_turn_must_have_hit_each() {
        let hit = |program| {
            let happened = hit(Fault::DescriptorsGone, 0, 500);
            Happened { led: None, program: Some(program), ..happened }
        };
        let two = [hit(Program::Chunkserver), hit(Program::Mds)];
        assert!(lacks(Fault::DescriptorsGone, &two).is_some_and(|why| why.contains("Backend")));
        assert_eq!(lacks(Fault::DescriptorsGone, &Program::ALL.map(hit)), None);
    }

    #[test]
    fn where_nothing_can_be_written_what_came_before_counts() {
        assert_eq!(window(&hit(Fault::KillMds, 0, 0)), (10_000_000_000, 11_000_000_000 + AFTERMATH_NS));
        assert_eq!(window(&hit(Fault::PowerAll, 0, 0)).0, 10_000_000_000 - AFTERMATH_NS);
    }
}
