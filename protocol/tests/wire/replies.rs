//! Which fields answer which opcode.

use bincode::{BorrowDecode, Decode, de::BorrowDecoder, error::DecodeError};
use kms_protocol::{
    Added, Bound, Description, Exported, Listed, Locking, Malformed, NoFields, Opcode, Refusal, RemoteStream,
    Removed, RemovedAll, Renamed, Rewrapped, Rotated, StatsReply, Status, StatusReply, Verified, Welcome,
    decode_fields,
};

use crate::show::Fields;

/// The fields of a reply to `opcode`.
pub(crate) fn decode(opcode: Opcode, status: Status, bytes: &[u8]) -> Result<Box<dyn Fields>, Malformed> {
    if status != Status::Ok {
        return owned::<Refusal>(bytes);
    }
    match opcode {
        Opcode::Hello => owned::<Welcome>(bytes),
        Opcode::Status => owned::<StatusReply>(bytes),
        Opcode::Lock | Opcode::Unlock => owned::<Locking>(bytes),
        Opcode::Add => owned::<Added>(bytes),
        Opcode::List => owned::<Listed>(bytes),
        Opcode::Describe => owned::<Description>(bytes),
        Opcode::Remove => owned::<Removed>(bytes),
        Opcode::RemoteStreamNew | Opcode::RemoteStreamOpen => owned::<RemoteStream>(bytes),
        Opcode::Rotate => owned::<Rotated>(bytes),
        Opcode::Rename => owned::<Renamed>(bytes),
        Opcode::RemoveAll => owned::<RemovedAll>(bytes),
        Opcode::Export => owned::<Exported>(bytes),
        Opcode::Rewrap => owned::<Rewrapped>(bytes),
        Opcode::Verify => owned::<Verified>(bytes),
        Opcode::Bind => owned::<Bound>(bytes),
        Opcode::Stats => owned::<StatsReply>(bytes),
        Opcode::Ping
        | Opcode::Encrypt
        | Opcode::Decrypt
        | Opcode::StreamNew
        | Opcode::StreamOpen
        | Opcode::RemoteStreamEncrypt
        | Opcode::RemoteStreamDecrypt
        | Opcode::RemoteStreamClose
        | Opcode::Wrap
        | Opcode::Unwrap
        | Opcode::DataKey
        | Opcode::DataKeyWrapped
        | Opcode::Mac
        | Opcode::MacVerify
        | Opcode::Random
        | Opcode::Batch => owned::<NoFields>(bytes),
    }
}

fn owned<T: Fields + Decode<()> + 'static>(bytes: &[u8]) -> Result<Box<dyn Fields>, Malformed> {
    decode_fields(bytes).map(|Owned(fields): Owned<T>| Box::new(fields) as Box<dyn Fields>)
}

/// Lets a type that borrows nothing be decoded by what borrows, for any lifetime.
struct Owned<T>(T);

impl<'de, T: Decode<()>> BorrowDecode<'de, ()> for Owned<T> {
    fn borrow_decode<D: BorrowDecoder<'de, Context = ()>>(decoder: &mut D) -> Result<Self, DecodeError> {
        T::decode(decoder).map(Self)
    }
}
