//! What `make bench` runs.
