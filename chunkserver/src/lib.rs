//! Skeleton.

pub mod chunk_store;
pub mod disk;
