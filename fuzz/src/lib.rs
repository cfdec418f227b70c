//! What is fuzzed: one function for each target, for libFuzzer (`tests/run fuzz`) and for replay (`cargo test -p kms-fuzz`).
//!
//! A target takes any bytes and panics when something does not hold; most say what comes out, and not only that nothing breaks.
//! Seeds are made from the vectors in `tests/vectors`, read where they lie; `corpus/TARGET` holds what a fuzzer found beyond
//! them. Nothing here is random, so that an input always takes the same way.

#![forbid(unsafe_code)]
#![expect(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::string_slice,
    clippy::unwrap_used,
    reason = "a panic is what a fuzzer looks for"
)]

mod answers;
mod codecs;
mod handler;
#[path = "../../protocol/tests/wire/replies.rs"]
mod replies;
mod script;
mod sealed;
mod seeds;
#[expect(dead_code, reason = "shared with the tests of the protocol, which use more of it")]
#[path = "../../protocol/tests/support/show.rs"]
mod show;
mod wire;

/// A target.
pub struct Target {
    /// Its name, and that of its corpus.
    pub name: &'static str,
    /// Takes any input; panics when something does not hold.
    pub run: fn(&[u8]),
    /// What a fuzzer begins with.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target { name: "frame", run: wire::frame, seeds: seeds::frames },
    Target { name: "request", run: wire::request, seeds: seeds::requests },
    Target { name: "reply", run: wire::reply, seeds: seeds::replies },
    Target { name: "codecs", run: codecs::run, seeds: seeds::codecs },
    Target { name: "constraints", run: wire::constraints, seeds: seeds::constraints },
    Target { name: "context", run: sealed::context, seeds: seeds::contexts },
    Target { name: "ciphertext", run: sealed::ciphertext, seeds: seeds::ciphertexts },
    Target { name: "handler", run: handler::run, seeds: seeds::handler },
    Target { name: "client", run: answers::run, seeds: seeds::answers },
];

/// The target of this name.
#[must_use]
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}
