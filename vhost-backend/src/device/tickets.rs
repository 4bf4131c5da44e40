//! Which request of the backing answers which request of the guest.
//!
//! A guest's request is one or several of the backing's (the ranges of a discard). It keeps its place here until the
//! backing has answered all of them, even when the guest's side is long gone: an *orphan*. So no ticket ever
//! names two requests, a late answer finds an orphan instead of guest memory, and the device knows when nothing of an
//! earlier life can change data any more.

use crate::backing::{Failure, Outcome, Ticket};

use super::completion::Completion;

const PART_BITS: u32 = 8;

/// A guest's request in the hands of the backing.
#[derive(Debug)]
pub struct Pending {
    pub completion: Completion,
    /// The length of a read, 0 for everything else.
    pub asked: u32,
    /// Payload and room for data it holds, counted against the device's bound.
    pub bytes: u64,
    pub changes_data: bool,
    /// It was found in the in-flight region.
    pub replayed: bool,
}

#[derive(Debug)]
enum Place {
    Free { next: Option<u32> },
    Live { pending: Pending, parts_left: u32, failed: Option<Failure> },
    Orphan { parts_left: u32, changes_data: bool },
}

/// What an answer of the backing means.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "it lives for one call")]
pub enum Answered {
    /// Other parts of the same request are still out.
    NotYet,
    /// All of it; the outcome is the first failure, or the last part's.
    Whole(Pending, Outcome),
    /// Its guest is gone.
    Orphan,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Tickets {
    places: Vec<Place>,
    free: Option<u32>,
    live: usize,
    orphans_changing_data: usize,
}

impl Tickets {
    /// Requests whose guest still waits.
    pub fn live(&self) -> usize {
        self.live
    }

    /// Abandoned requests that may still change data.
    pub fn orphans_changing_data(&self) -> usize {
        self.orphans_changing_data
    }

    /// A place for a request that the backing sees as `parts` requests.
    pub fn enter(&mut self, pending: Pending, parts: u32) -> impl Iterator<Item = Ticket> + use<> {
        assert!((1..1 << PART_BITS).contains(&parts), "{parts} parts");
        let place = Place::Live { pending, parts_left: parts, failed: None };
        let at = match self.free {
            Some(at) => {
                let Place::Free { next } = self.places[at as usize] else {
                    unreachable!("place {at} is on the free list and in use")
                };
                self.free = next;
                self.places[at as usize] = place;
                at
            }
            None => {
                self.places.push(place);
                u32::try_from(self.places.len() - 1).expect("bounded by the rings' sizes")
            }
        };
        self.live += 1;
        (0..parts).map(move |part| Ticket(u64::from(at) << PART_BITS | u64::from(part)))
    }

    /// The backing hands a ticket back.
    pub fn answer(&mut self, ticket: Ticket, outcome: Outcome) -> Answered {
        let at = u32::try_from(ticket.0 >> PART_BITS).expect("a ticket of ours");
        let place = &mut self.places[at as usize];
        match place {
            Place::Free { .. } => panic!("{ticket:?} was handed back twice"),
            Place::Orphan { parts_left, changes_data } => {
                *parts_left -= 1;
                if *parts_left == 0 {
                    self.orphans_changing_data -= usize::from(*changes_data);
                    self.release(at);
                }
                Answered::Orphan
            }
            Place::Live { parts_left, failed, .. } => {
                *parts_left -= 1;
                if *parts_left > 0 {
                    if let Outcome::Failed(why) = outcome {
                        failed.get_or_insert(why);
                    }
                    return Answered::NotYet;
                }
                let Place::Live { pending, failed, .. } = self.release(at) else {
                    unreachable!("matched above")
                };
                self.live -= 1;
                Answered::Whole(pending, failed.map_or(outcome, Outcome::Failed))
            }
        }
    }

    fn release(&mut self, at: u32) -> Place {
        let place = std::mem::replace(&mut self.places[at as usize], Place::Free { next: self.free });
        self.free = Some(at);
        place
    }

    /// Takes away every request of these queues; the backing's answers to them will find orphans.
    pub fn orphan(&mut self, of: impl Fn(u16) -> bool) -> Vec<Pending> {
        let mut taken = Vec::new();
        for place in &mut self.places {
            let Place::Live { pending, parts_left, .. } = place else { continue };
            if !of(pending.completion.queue()) {
                continue;
            }
            let orphan = Place::Orphan { parts_left: *parts_left, changes_data: pending.changes_data };
            self.orphans_changing_data += usize::from(pending.changes_data);
            self.live -= 1;
            if let Place::Live { pending, .. } = std::mem::replace(place, orphan) {
                taken.push(pending);
            }
        }
        taken
    }
}
