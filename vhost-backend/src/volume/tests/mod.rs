//! The volume against scripted chunkservers.
