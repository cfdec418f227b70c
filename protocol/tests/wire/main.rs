//! The wire against its specification: `docs/protocol.md`, the vectors in `tests/vectors/protocol`, a second codec, and noise.

#![expect(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::string_slice,
    clippy::unwrap_used,
    reason = "a panic is how a test fails"
)]

mod document;
mod noise;
mod quotes;
mod replies;
mod schema;
#[path = "../support/show.rs"]
mod show;
mod vectors;
mod wincode;

use std::path::{Path, PathBuf};

/// A file of the repository.
fn repository(path: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join(path)
}
