//! Small models of the protocols that must not be wrong, explored exhaustively by stateright: every order of events
//! within the bounds each test names.
//!
//! [`writers`] is one volume's attach, fence, restart, retry and de-duplication, and the reads of leaders and followers.
//! [`members`] is a copyset whose replicas move away and back.
//!
//! Each model has its broken variants: rules that the real code keeps and a mutant of
//! `reference/reliability.md` §3.3 drops. The tests demand that the rules as they are have no counterexample, and that
//! every broken variant has one; a model that cannot fail proves nothing.
//!
//! Used by nothing but its tests. A rule that changes in `chunkserver/src/copyset/` or `vhost-backend/src/volume/`
//! changes here first.

pub mod members;
pub mod writers;
