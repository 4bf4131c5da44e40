//! `evolute`: the one tool an operator or a script needs.
//!
//! - [`args`]: what may be typed; [`size`]: sizes as people write them.
//! - [`mds`]: a client of the control plane that knows several addresses and finds the one that leads.
//! - [`volume`], [`chunkserver`], [`cluster`] (with [`repair`]): one question to the control plane each, printed by
//!   [`output`].
//! - [`import`]: a raw disk image becomes a volume.
//! - [`dev`]: a whole cluster under one directory, for trying and for tests.
//! - [`failure`]: everything that can go wrong, what to do next, and the exit status.
//!
//! What `--json` prints is a promise to scripts and lives in `docs/cli.md`.

pub mod args;
pub mod chunkserver;
pub mod cluster;
pub mod dev;
pub mod failure;
pub mod import;
pub mod mds;
pub mod output;
pub mod repair;
pub mod size;
pub mod volume;
