//! Histories in which every value is written at most once: Gibbons and Korach's zones, O(n log n).
//!
//! A write and the reads that show it are a cluster, and in every order that explains the history a cluster stands
//! together. Let `f` be the earliest answer in it and `s` the latest invocation. Cluster X cannot come wholly before
//! Y exactly when Y has an operation answered before one of X began: `f(Y) < s(X)`. So two clusters conflict exactly
//! when `f(Y) < s(X)` and `f(X) < s(Y)`, and a history without conflicting pairs has an order.
//!
//! With `f < s` the cluster's zone `[f, s]` is forward, else `[s, f]` is backward. The condition above never holds for
//! two backward zones, for two forward ones when they overlap, and for one of each when the backward lies strictly
//! inside the forward one. Forward zones that do not overlap can be searched by bisection.

use super::{History, NEVER, Read, Time, Value, Violation, ZERO, by_value};
use std::collections::HashMap;

#[derive(Debug, Clone, Copy)]
struct Cluster {
    value: Value,
    /// Earliest answer; -1 for what was there before the first operation.
    first_answer: i128,
    latest_invoked: i128,
}

pub fn check(history: &History) -> Result<(), Violation> {
    let clusters = clusters(history)?;
    let mut forward: Vec<Cluster> =
        clusters.iter().filter(|c| c.first_answer < c.latest_invoked).copied().collect();
    forward.sort_unstable_by_key(|c| (c.first_answer, c.latest_invoked));
    for pair in forward.windows(2) {
        // Disjoint so far, so the one before ends last.
        if pair[1].first_answer < pair[0].latest_invoked {
            return Err(stale(pair[0], pair[1]));
        }
    }
    for backward in clusters.iter().filter(|c| c.first_answer >= c.latest_invoked) {
        let begun = forward.partition_point(|c| c.first_answer < backward.latest_invoked);
        if begun > 0 && backward.first_answer < forward[begun - 1].latest_invoked {
            return Err(stale(forward[begun - 1], *backward));
        }
    }
    Ok(())
}

fn clusters(history: &History) -> Result<Vec<Cluster>, Violation> {
    let writes = by_value(history);
    let mut clusters: HashMap<Value, Cluster> = HashMap::with_capacity(writes.len());
    for write in history.writes.iter().filter(|write| write.certain) {
        clusters.insert(
            write.value,
            Cluster {
                value: write.value,
                first_answer: write.answered.into(),
                latest_invoked: write.invoked.into(),
            },
        );
    }
    for read in &history.reads {
        let fresh = source(history, &writes, read)?;
        let cluster = clusters.entry(read.value).or_insert(fresh);
        cluster.first_answer = cluster.first_answer.min(read.answered.into());
        cluster.latest_invoked = cluster.latest_invoked.max(read.invoked.into());
    }
    Ok(clusters.into_values().collect())
}

/// The cluster of what the read shows, without reads.
fn source(
    history: &History,
    writes: &HashMap<Value, &super::Write>,
    read: &Read,
) -> Result<Cluster, Violation> {
    if let Some(write) = writes.get(&read.value) {
        if read.answered < write.invoked {
            return Err(Violation::FromTheFuture { value: read.value, read: *read });
        }
        return Ok(Cluster {
            value: read.value,
            first_answer: write.answered.into(),
            latest_invoked: write.invoked.into(),
        });
    }
    if read.value == history.initial {
        return Ok(Cluster { value: read.value, first_answer: -1, latest_invoked: -1 });
    }
    Err(Violation::NeverWritten { value: read.value, read: *read })
}

/// Names the pair so that a person can follow it: `older` is the one that was seen too late.
fn stale(one: Cluster, other: Cluster) -> Violation {
    let (older, newer) = if one.latest_invoked >= other.latest_invoked { (one, other) } else { (other, one) };
    let time = |at: i128| Time::try_from(at).unwrap_or(if at < 0 { 0 } else { NEVER });
    let named = |value: Value| if value >= super::NAMED_ZERO { ZERO } else { value };
    Violation::Stale {
        older: named(older.value),
        older_seen_until: time(older.latest_invoked),
        newer: named(newer.value),
        newer_from: time(newer.first_answer),
    }
}
