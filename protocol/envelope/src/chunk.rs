//! Where chunks are, and which lengths there can be (`docs/formats.md`, sections 6.3 to 6.5). Numbers only: no bytes, no keys.

/// Plaintext bytes of a full chunk.
pub const CHUNK_LEN: usize = 16384;

/// Bytes of a chunk's tag.
pub const TAG_LEN: usize = 16;

/// Bytes of a full chunk with its tag.
pub const SEALED_CHUNK_LEN: usize = CHUNK_LEN + TAG_LEN;

/// Chunks that a body can have. Numbers are below this, and the last number can only be a final chunk.
//= docs/formats.md#64-nonces
//# A chunk number MUST be less than 2^38, and
//# chunk 2^38 − 1 can only be a final chunk.
pub const COUNT_MAX: u64 = 1 << 38;

/// The longest plaintext of a body: 4 PiB − 1.
pub const PLAINTEXT_MAX: u64 = COUNT_MAX * CHUNK_LEN_U64 - 1;

const CHUNK_LEN_U64: u64 = CHUNK_LEN as u64;
const TAG_LEN_U64: u64 = TAG_LEN as u64;
const SEALED_CHUNK_LEN_U64: u64 = SEALED_CHUNK_LEN as u64;

/// Number of chunks for a plaintext of this length; `None` over [`PLAINTEXT_MAX`].
pub const fn count(plaintext_len: u64) -> Option<u64> {
    if plaintext_len > PLAINTEXT_MAX { None } else { Some(plaintext_len / CHUNK_LEN_U64 + 1) }
}

/// Offset of chunk `number` from the first byte of the chunks (in a stream, add [`STREAM_HEAD_LEN`](crate::STREAM_HEAD_LEN)); `None` for a number that no
/// chunk has.
pub const fn offset(number: u64) -> Option<u64> {
    if number >= COUNT_MAX { None } else { Some(number * SEALED_CHUNK_LEN_U64) }
}

/// Which chunk holds the plaintext byte `position`, and where in it; `None` over [`PLAINTEXT_MAX`].
pub const fn locate(position: u64) -> Option<(u64, u64)> {
    if position > PLAINTEXT_MAX { None } else { Some((position / CHUNK_LEN_U64, position % CHUNK_LEN_U64)) }
}

/// Bytes of all chunks for a plaintext of this length, without the stream's head; `None` over [`PLAINTEXT_MAX`].
//= docs/formats.md#65-lengths
//# With n bytes of plaintext the chunks are n + 16 × (⌊n / 16,384⌋ + 1) bytes long.
pub const fn body_len(plaintext_len: u64) -> Option<u64> {
    match count(plaintext_len) {
        Some(count) => Some(plaintext_len + TAG_LEN_U64 * count),
        None => None,
    }
}

/// The plaintext length of chunks that are this long together, without the stream's head; `None` when no body has this length.
//= docs/formats.md#65-lengths
//# If r < 16 the length is impossible: r = 0 means that the final chunk is missing, and 1 to
//# 15 bytes cannot hold a tag. Otherwise n = 16,384 × q + r − 16.
pub const fn body_plaintext_len(body_len: u64) -> Option<u64> {
    let full = body_len / SEALED_CHUNK_LEN_U64;
    let rest = body_len % SEALED_CHUNK_LEN_U64;
    if full >= COUNT_MAX || rest < TAG_LEN_U64 {
        return None;
    }
    Some(full * CHUNK_LEN_U64 + rest - TAG_LEN_U64)
}
