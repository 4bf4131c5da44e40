//! Why I/O is held: what is known of each chunkserver that could answer, in one line for an operator.

use evolute_protocol::wire::reply::Refusal;

use super::Volume;
use super::peers::Peer;
use super::routing::RouteIndex;
use crate::connections::PeerIndex;

impl Volume {
    /// Kept until something is answered there.
    pub(super) fn note_refusal(&mut self, index: RouteIndex, from: PeerIndex, refusal: Refusal) {
        let refusals = &mut self.routing[index].refusals;
        refusals.retain(|(peer, _)| *peer != from);
        refusals.push((from, refusal));
    }

    pub(super) fn why_held(&self, index: RouteIndex) -> String {
        let route = &self.routing[index];
        let all = route.replicas.len();
        let reached = route.replicas.iter().filter(|peer| self.peers[**peer].is_open()).count();
        let each = route.replicas.iter().map(|&of| {
            let said = route.refusals.iter().find(|(from, _)| *from == of).map(|(_, refusal)| *refusal);
            self.words(&self.peers[of], said)
        });
        let each = each.collect::<Vec<_>>().join("; ");
        if reached <= all / 2 {
            format!(
                "only {reached} of its {all} chunkservers can be reached, more than half are needed: {each}"
            )
        } else {
            each
        }
    }

    fn words(&self, peer: &Peer, said: Option<Refusal>) -> String {
        let id = peer.id;
        if !peer.is_open() {
            return format!("{id} cannot be reached");
        }
        if peer.is_mute(self.now) {
            return format!("{id} is connected and does not answer");
        }
        match said {
            Some(Refusal::NotLeader { leader: Some(leader) }) if leader == id => {
                format!("{id} leads, and too few others confirm it")
            }
            Some(Refusal::NotLeader { leader: Some(leader) }) => format!("{id} says that {leader} leads"),
            Some(Refusal::NotLeader { leader: None }) => format!("{id} says that nobody leads"),
            Some(refusal) => format!("{id} answers: {refusal}"),
            None => format!("{id} is connected"),
        }
    }
}
