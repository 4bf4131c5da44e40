//! The bytes that changes in flight are about: no two changes of the same bytes are out at a time.
//!
//! A disk owes no order to requests that overlap in flight. But a request that dies with its backend is done again by
//! the next one, although it may have been applied already; had a later change of the same bytes been answered
//! meanwhile, the older one would come over it. So the later one waits until the older is answered, and whatever is
//! done again is the newest that anybody has seen.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::backing::Request;

/// Disjoint ranges of the volume's bytes.
#[derive(Debug, Default)]
pub struct Changing(BTreeMap<u64, u64>);

impl Changing {
    /// Whether a change of these bytes must wait.
    pub fn overlaps(&self, range: &Range<u64>) -> bool {
        self.0.range(..range.end).next_back().is_some_and(|(_, end)| *end > range.start)
    }

    pub fn begin(&mut self, range: Range<u64>) {
        debug_assert!(!self.overlaps(&range), "{range:?} is being changed");
        self.0.insert(range.start, range.end);
    }

    pub fn end(&mut self, range: &Range<u64>) {
        self.0.remove(&range.start);
    }

    pub fn clear(&mut self) {
        self.0.clear();
    }
}

/// The bytes a request changes, if any.
pub fn changed_by(request: &Request) -> Option<Range<u64>> {
    let (offset, len) = match request {
        Request::Read { .. } => return None,
        Request::Write { offset, data } => (*offset, data.len() as u64),
        Request::Discard { offset, len } | Request::WriteZeroes { offset, len, .. } => (*offset, *len),
    };
    (len > 0).then(|| offset..offset + len)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{ProptestConfig, prop, prop_assert_eq, proptest};

    use super::Changing;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn what_waits_is_what_has_bytes_in_common(changes in prop::collection::vec((0u64..60, 1u64..9, 0usize..4), 1..200)) {
            let mut changing = Changing::default();
            let mut out: Vec<std::ops::Range<u64>> = Vec::new();
            for (start, len, answered) in changes {
                let range = start..start + len;
                let common = out.iter().any(|other| other.start < range.end && range.start < other.end);
                prop_assert_eq!(changing.overlaps(&range), common);
                if !common {
                    changing.begin(range.clone());
                    out.push(range);
                }
                if answered == 0 {
                    changing.end(&out.remove(0));
                }
            }
        }
    }
}
