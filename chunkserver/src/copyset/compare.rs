//! Replicas are compared with each other, as of one point of the log, and the odd one is put right.
//!
//! A checksum tells that a block is what was written; it cannot tell that it is what was written *last*. A write the disk
//! lost together with its checksum, a file put back from an old copy, a replica that applied its log wrongly: only the
//! other replicas know.
//!
//! ```text
//!  scrub ─▶ watch a range ─▶ digests here ─▶ digests of the next replica ─▶ wait until all they may hold is applied here
//!               every block nothing has changed meanwhile is equal on both, or one of them is wrong:
//!  settle ─▶ the block as every replica has it ─▶ the majority is right; who differs from it repairs itself
//! ```
//!
//! Why equal digests are owed: let a be what was applied here of the volume when the watch began, b what is when the
//! answer is looked at. The other replica had applied a before it read, and nothing beyond b when it had read. A block
//! that nothing changed here from a to b is the same as of every entry between them, so also as of the one the other
//! replica read it at. No I/O waits, and the log has no entry for it.
//!
//! Nobody is ever told what to write. A replica that is doubted asks the others itself, under the same rule. Each
//! replica compares itself with the next one, in a ring: whoever differs, at least two of three see it.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use evolute_protocol::checksum::{Checksums, crc32c};
use evolute_protocol::geometry::BLOCK_BYTES;
use evolute_protocol::id::{BlockIndex, ChunkKey, ChunkserverId, CopysetId};
use evolute_protocol::wire::reply::{Freshness, Refusal, Reply};
use evolute_protocol::wire::request::{AskDigests, ChunkRange, Doubt, Read, ReadAtLeast, Request};

use super::repair::{block_range, data_of};
use super::{Caller, Copyset, chunkserver_of};
use crate::chunk_store::Extent;

/// What became of comparisons, since this process started, of all copysets.
#[derive(Default)]
pub struct Comparisons {
    compared: Cell<u64>,
    differing: Cell<u64>,
    skipped: Cell<u64>,
    undecided: RefCell<BTreeMap<(CopysetId, ChunkKey, u16), String>>,
    /// Ranges that are being read because somebody else asked.
    serving: Cell<usize>,
    /// Who gave no answer, and when: asked again after [`SILENCE`].
    silent: RefCell<HashMap<ChunkserverId, Instant>>,
}

/// Each is a MiB in memory. Whoever finds no place asks again.
const SERVED_MAX: usize = 16;
/// Named one by one; there is no use in more.
const UNDECIDED_MAX: usize = 1024;
/// A block that is written all the time, or a replica that is behind, is asked about again in the next round.
const ATTEMPTS: u32 = 5;
const PAUSE: Duration = Duration::from_millis(100);
/// A chunkserver that is gone costs a timeout each time it is asked; rounds must go on with those that are there.
const SILENCE: Duration = Duration::from_secs(5);

impl Comparisons {
    /// Blocks that were the same here as on another replica, or not.
    pub fn compared(&self) -> u64 {
        self.compared.get()
    }

    /// Blocks here against which the other replicas agreed.
    pub fn differing(&self) -> u64 {
        self.differing.get()
    }

    /// Blocks that could not be compared in their turn: they never held still, or nobody answered.
    pub fn skipped(&self) -> u64 {
        self.skipped.get()
    }

    /// Blocks of which the replicas hold different data and no majority agrees, and one of them by name.
    pub fn undecided(&self) -> (usize, Option<String>) {
        let undecided = self.undecided.borrow();
        (undecided.len(), undecided.values().next().cloned())
    }

    /// Where those blocks are.
    pub fn undecided_places(&self) -> Vec<(CopysetId, ChunkKey, BlockIndex)> {
        let undecided = self.undecided.borrow();
        undecided.keys().map(|(copyset, chunk, block)| (*copyset, *chunk, BlockIndex(*block))).collect()
    }

    /// Of replicas that are not here any more nothing is left to be decided.
    pub fn keep(&self, is_here: impl Fn(CopysetId) -> bool) {
        self.undecided.borrow_mut().retain(|(copyset, ..), _| is_here(*copyset));
    }

    fn settled(&self, copyset: CopysetId, chunk: ChunkKey, block: BlockIndex) {
        self.undecided.borrow_mut().remove(&(copyset, chunk, block.0));
    }
}

/// A place among [`SERVED_MAX`].
struct Serving(Rc<super::repair::Repairs>);

impl Drop for Serving {
    fn drop(&mut self) {
        let serving = &self.0.comparisons.serving;
        serving.set(serving.get() - 1);
    }
}

/// What came of a question for digests.
enum Asked {
    Answered(Freshness, Checksums),
    /// Somebody is there and cannot tell now: it is behind, or busy.
    Later,
    Nobody,
}

/// A block as one replica has it.
struct Vote {
    of: ChunkserverId,
    data: Bytes,
}

/// What the replicas' votes on one block say about the first of them, which is ours.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// It is right; these are not.
    Right {
        wrong: Vec<ChunkserverId>,
    },
    /// It should be this.
    Wrong(Bytes),
    Undecided,
}

/// The majority of all voters is right, not of those who answered.
fn judge(votes: &[Vote], voters: usize) -> Verdict {
    let agree = |data: &Bytes| votes.iter().filter(|vote| vote.data == *data).count() > voters / 2;
    match votes.iter().find(|vote| agree(&vote.data)) {
        None => Verdict::Undecided,
        Some(right) if right.data == votes[0].data => {
            let wrong = votes.iter().filter(|vote| vote.data != right.data);
            Verdict::Right { wrong: wrong.map(|vote| vote.of).collect() }
        }
        Some(right) => Verdict::Wrong(right.data.clone()),
    }
}

/// What a range holds, block by block; `None`: cannot be read.
struct Digests {
    digests: Vec<Option<u32>>,
    /// Blocks that are stored here.
    stored: u64,
}

impl Digests {
    fn of(first: u16, count: u16, extents: &[Extent]) -> Self {
        let mut digests = vec![Some(ZERO_BLOCK_DIGEST); usize::from(count)];
        for extent in extents {
            let at = usize::from(extent.first() - first);
            for (n, digest) in digests[at..at + extent.count()].iter_mut().enumerate() {
                *digest = match extent {
                    Extent::Data { crcs, .. } => Some(crcs[n]),
                    Extent::Damaged { .. } => None,
                };
            }
        }
        let stored = extents.iter().map(|extent| extent.count() as u64).sum();
        Self { digests, stored }
    }
}

/// crc32c of a block of zeroes.
const ZERO_BLOCK_DIGEST: u32 = 0x98f9_4189;

fn blocks_of(range: ChunkRange) -> (u16, u16) {
    let number = |bytes: u32| u16::try_from(u64::from(bytes) / BLOCK_BYTES).expect("inside a chunk");
    (number(range.offset()), number(range.length()))
}

impl Copyset {
    /// Reads a range of whole blocks, repairs what cannot be read, and compares all of it with another replica. How many
    /// bytes were read here. Cancel-safe.
    pub async fn scrub(&self, chunk: ChunkKey, range: ChunkRange) -> u64 {
        let (first, count) = blocks_of(range);
        let mut left: BTreeSet<BlockIndex> = (first..first + count).map(BlockIndex).collect();
        let mut read = 0;
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                tokio::time::sleep(PAUSE).await;
            }
            // No await between the two: the question is about what the watch begins with.
            let watch = self.store.borrow().watch(chunk, range.offset(), range.length());
            let question = self.question(chunk, range).filter(|_| self.group.consistent_from().is_none());
            let reading = self.store.borrow().extents_of_disk(chunk, first, count);
            let here = Digests::of(first, count, &reading.await);
            read += here.stored * BLOCK_BYTES;
            let damaged: Vec<_> = (first..).map(BlockIndex).zip(&here.digests).collect();
            for (block, _) in damaged.into_iter().filter(|(_, digest)| digest.is_none()) {
                self.repair(chunk, block).await;
            }
            // Nobody to ask, or nothing to ask about yet.
            let Some(of) = question else { break };
            let (fresh, there) = match self.ask_next(AskDigests { of }).await {
                Asked::Answered(fresh, there) => (fresh, there),
                Asked::Later => continue,
                Asked::Nobody => break,
            };
            if !self.has_applied(chunk, fresh).await {
                continue;
            }
            let mut differing = Vec::new();
            for ((block, here), there) in (first..).map(BlockIndex).zip(&here.digests).zip(&there) {
                let Some(here) = here else { continue };
                if !watch.is_untouched(block) || !left.remove(&block) {
                    continue;
                }
                self.repairs.comparisons.compared.set(self.repairs.comparisons.compared.get() + 1);
                if here == there {
                    self.repairs.comparisons.settled(self.id, chunk, block);
                } else {
                    differing.push(block);
                }
            }
            drop(watch);
            self.settle_all(chunk, range, differing).await;
            if left.is_empty() {
                break;
            }
        }
        let skipped = &self.repairs.comparisons.skipped;
        skipped.set(skipped.get() + left.len() as u64);
        read
    }

    /// Looks once more at a block that could not be decided: a replica may be back, or it was written since.
    pub async fn settle_again(&self, chunk: ChunkKey, block: BlockIndex) {
        self.settle_all(chunk, block_range(block), vec![block]).await;
    }

    async fn settle_all(&self, chunk: ChunkKey, range: ChunkRange, differing: Vec<BlockIndex>) {
        let mut doubted = BTreeSet::new();
        for block in differing {
            doubted.extend(self.settle(chunk, block).await);
        }
        for other in doubted {
            let Some(question) = self.question(chunk, range) else { return };
            let doubt = Request::Doubt(Doubt { of: question.read });
            // It may be away or busy: then it finds out in its own round.
            let _ = self.hear(other, doubt).await;
        }
    }

    /// Finds out who is right about a block, and puts it right here if that is not us. Who else is wrong.
    async fn settle(&self, chunk: ChunkKey, block: BlockIndex) -> Vec<ChunkserverId> {
        let mut heard = Vec::new();
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                tokio::time::sleep(PAUSE).await;
            }
            let Some(repair) = self.store.borrow().begin_repair(self.id, chunk, block) else {
                return Vec::new();
            };
            let Some((votes, voters)) = self.votes(chunk, block).await else { continue };
            if !repair.is_untouched() {
                continue;
            }
            match judge(&votes, voters) {
                Verdict::Right { wrong } => {
                    self.repairs.comparisons.settled(self.id, chunk, block);
                    if !wrong.is_empty() {
                        tracing::warn!(copyset = %self.id, %chunk, %block, ?wrong, "another replica holds something else than the majority");
                    }
                    return wrong;
                }
                Verdict::Wrong(right) => {
                    if repair.finish(right) {
                        self.repairs.note_found(chunk, block);
                        self.repairs.note_repaired(chunk, block);
                        let comparisons = &self.repairs.comparisons;
                        comparisons.differing.set(comparisons.differing.get() + 1);
                        comparisons.settled(self.id, chunk, block);
                        tracing::warn!(copyset = %self.id, %chunk, %block, "a block that was not what the other replicas hold is repaired");
                        return Vec::new();
                    }
                }
                Verdict::Undecided => {
                    let all = votes.len() == voters;
                    heard = votes;
                    if all {
                        break;
                    }
                }
            }
        }
        if heard.len() > 1 {
            self.undecided(chunk, block, &heard);
        }
        Vec::new()
    }

    /// The block as each replica that answers has it, ours first, and how many replicas have a vote. `None`: ours cannot
    /// be told.
    async fn votes(&self, chunk: ChunkKey, block: BlockIndex) -> Option<(Vec<Vote>, usize)> {
        let range = block_range(block);
        let question = self.question(chunk, range).filter(|_| self.group.consistent_from().is_none())?;
        let reading = self.store.borrow().extents(chunk, block.0, 1);
        let data = match reading.await.into_iter().next() {
            None => Bytes::from(vec![0; range.length() as usize]),
            Some(Extent::Data { data, .. }) => data,
            Some(Extent::Damaged { .. }) => return None,
        };
        let others = self.ring();
        let voters = others.len() + 1;
        let mut votes = vec![Vote { of: chunkserver_of(self.group.me()), data }];
        for of in others {
            let reply = self.hear(of, Request::ReadAtLeast(question)).await;
            let Some((fresh, data)) = reply.and_then(|reply| data_of(range, reply)) else { continue };
            if self.has_applied(chunk, fresh).await {
                votes.push(Vote { of, data });
            }
        }
        Some((votes, voters))
    }

    fn undecided(&self, chunk: ChunkKey, block: BlockIndex, votes: &[Vote]) {
        let held: Vec<_> =
            votes.iter().map(|vote| format!("{} {:08x}", vote.of, crc32c(&vote.data))).collect();
        let what = format!("{}, {chunk}, {block}: {}", self.id, held.join(", "));
        tracing::error!(
            what,
            "replicas hold different data and no majority of them agrees; nothing is changed"
        );
        let mut undecided = self.repairs.comparisons.undecided.borrow_mut();
        if undecided.len() < UNDECIDED_MAX {
            undecided.insert((self.id, chunk, block.0), what);
        }
    }

    /// The other voters, the next one by number first.
    fn ring(&self) -> Vec<ChunkserverId> {
        let status = self.group.status();
        let me = status.me.replica;
        let mut others: Vec<_> =
            status.members.iter().filter(|m| m.voter && m.member.replica != me).map(|m| m.member).collect();
        others.sort_by_key(|other| (other.replica < me, other.replica));
        others.into_iter().map(chunkserver_of).collect()
    }

    /// The digests of the first replica in the ring that can tell them.
    async fn ask_next(&self, ask: AskDigests) -> Asked {
        let count = ask.of.read.range.piece_count();
        let mut asked = Asked::Nobody;
        for of in self.ring() {
            match self.hear(of, Request::Digests(ask)).await {
                Some(Reply::Digests { fresh, digests }) if digests.len() as u64 == count => {
                    return Asked::Answered(fresh, digests);
                }
                Some(_) => asked = Asked::Later,
                None => {}
            }
        }
        asked
    }

    /// Asks another replica, unless it was silent just now.
    async fn hear(&self, of: ChunkserverId, request: Request) -> Option<Reply> {
        let silent = &self.repairs.comparisons.silent;
        if silent.borrow().get(&of).is_some_and(|since| since.elapsed() < SILENCE) {
            return None;
        }
        let reply = self.repairs.neighbours.ask(of, self.id, request).await;
        match reply {
            Some(_) => silent.borrow_mut().remove(&of),
            None => silent.borrow_mut().insert(of, Instant::now()),
        };
        reply
    }

    pub(super) fn digests(self: &Rc<Self>, ask: AskDigests, caller: Caller) {
        let serving = match self.may_read_at_least(&ask.of).and_then(|()| self.serve()) {
            Ok(serving) => serving,
            Err(refusal) => return self.answer(&caller, &Reply::Refused(refusal)),
        };
        let (chunk, (first, count)) = (ask.of.read.chunk, blocks_of(ask.of.read.range));
        let reading = self.store.borrow().extents_of_disk(chunk, first, count);
        let copyset = Rc::clone(self);
        tokio::task::spawn_local(async move {
            let here = Digests::of(first, count, &reading.await);
            let reply = match here.digests.iter().copied().collect::<Option<Checksums>>() {
                Some(digests) => copyset.read_by(chunk.volume).map(|fresh| Reply::Digests { fresh, digests }),
                None => Err(Refusal::Busy),
            };
            copyset.answer(&caller, &reply.unwrap_or_else(Reply::Refused));
            drop(serving);
            // Only now: whoever asked waits for nobody's repair.
            for (block, _) in (first..).zip(here.digests).filter(|(_, digest)| digest.is_none()) {
                copyset.repair(chunk, BlockIndex(block)).await;
            }
        });
    }

    pub(super) fn doubted(self: &Rc<Self>, Doubt { of }: Doubt, caller: &Caller) {
        let Read { chunk, range, .. } = of;
        let of = ReadAtLeast { read: of, index: 0, term: ReadAtLeast::APPLIED_ONLY };
        let serving = match self.may_read_at_least(&of).and_then(|()| self.serve()) {
            Ok(serving) => serving,
            Err(refusal) => return self.answer(caller, &Reply::Refused(refusal)),
        };
        let copyset = Rc::clone(self);
        tokio::task::spawn_local(async move {
            copyset.scrub(chunk, range).await;
            drop(serving);
        });
        self.answer(caller, &Reply::Done(self.applied_of(chunk.volume)));
    }

    fn serve(&self) -> Result<Serving, Refusal> {
        let serving = &self.repairs.comparisons.serving;
        if serving.get() >= SERVED_MAX {
            return Err(Refusal::Busy);
        }
        serving.set(serving.get() + 1);
        Ok(Serving(Rc::clone(&self.repairs)))
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use evolute_protocol::checksum::crc32c;
    use evolute_protocol::id::ChunkserverId;

    use super::{Verdict, Vote, ZERO_BLOCK_DIGEST, judge};

    fn votes(all: &[&'static str]) -> Vec<Vote> {
        let vote = |(n, data): (u32, &&'static str)| Vote {
            of: ChunkserverId(n),
            data: Bytes::from_static(data.as_bytes()),
        };
        (1..).zip(all).map(vote).collect()
    }

    #[test]
    fn a_majority_of_all_replicas_is_right_and_nobody_else() {
        let wrong = |of: &[u32]| Verdict::Right { wrong: of.iter().map(|n| ChunkserverId(*n)).collect() };
        let should_be = |data: &'static str| Verdict::Wrong(Bytes::from_static(data.as_bytes()));
        for (held, voters, verdict) in [
            (&["new", "new", "new"][..], 3, wrong(&[])),
            (&["new", "old", "new"], 3, wrong(&[2])),
            (&["old", "new", "new"], 3, should_be("new")),
            (&["a", "b", "c"], 3, Verdict::Undecided),
            // One does not answer: two that agree are a majority, two that do not are none.
            (&["new", "new"], 3, wrong(&[])),
            (&["old", "new"], 3, Verdict::Undecided),
            (&["new"], 3, Verdict::Undecided),
            // While a member is replaced there are four.
            (&["a", "a", "b", "b"], 4, Verdict::Undecided),
            (&["old", "new", "new", "new"], 4, should_be("new")),
        ] {
            assert_eq!(judge(&votes(held), voters), verdict, "{held:?} of {voters}");
        }
    }

    #[test]
    fn zeroes_have_the_same_digest_wherever_they_are_stored() {
        assert_eq!(crc32c(&[0; 4096]), ZERO_BLOCK_DIGEST);
    }
}
