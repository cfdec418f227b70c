//! The one place that knows bincode: fixed-width little-endian integers, a limit, nothing left over
//! (`docs/protocol.md`, section 2.3). `wincode` with its defaults writes the same bytes; a test holds both together.

use bincode::{
    BorrowDecode, Encode,
    config::{Configuration, Fixint, Limit, LittleEndian},
    enc::write::SizeWriter,
};
use thiserror::Error;

use crate::{FRAME_MAX, frame::FRAME_HEAD_LEN};

//= docs/protocol.md#23-encoding-of-fields
//# A length MUST be checked before memory is reserved by it.
/// Without the limit, ten bytes that announce a long vector abort the process.
const CONFIG: Configuration<LittleEndian, Fixint, Limit<FRAME_MAX>> =
    bincode::config::standard().with_fixed_int_encoding().with_limit::<FRAME_MAX>();

/// The fields do not have the form that the opcode gives them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the fields of the message are malformed")]
pub struct Malformed;

//= docs/protocol.md#23-encoding-of-fields
//# A receiver MUST refuse a `bool` or an option tag other than `00` and `01`, a tag that the enumeration does
//# not list, a string that is not UTF-8, and a length that goes beyond the end of the fields.
/// Decodes fields from exactly these bytes; strings and byte strings are borrowed.
///
/// # Errors
/// [`Malformed`] when a field is missing, impossible, or bytes are left over.
pub fn decode_fields<'a, T: BorrowDecode<'a, ()>>(bytes: &'a [u8]) -> Result<T, Malformed> {
    match bincode::borrow_decode_from_slice(bytes, CONFIG) {
        //= docs/protocol.md#23-encoding-of-fields
        //# It MUST refuse fields that end early and fields with bytes left over.
        Ok((fields, used)) if used == bytes.len() => Ok(fields),
        Ok(_) | Err(_) => Err(Malformed),
    }
}

/// Number of bytes that the fields take on the wire.
///
/// # Errors
/// [`Malformed`] when they would not fit a frame.
pub fn encoded_fields_len<T: Encode>(fields: &T) -> Result<usize, Malformed> {
    let mut size = SizeWriter::default();
    bincode::encode_into_writer(fields, &mut size, CONFIG).map_err(|_| Malformed)?;
    // The limit of the codec holds for what is read only.
    if size.bytes_written > FRAME_MAX - FRAME_HEAD_LEN { Err(Malformed) } else { Ok(size.bytes_written) }
}

/// Writes the fields to the front of `out` and says how many bytes they took.
pub(crate) fn encode_fields<T: Encode>(fields: &T, out: &mut [u8]) -> Result<usize, Malformed> {
    bincode::encode_into_slice(fields, out, CONFIG).map_err(|_| Malformed)
}
