//! Two codecs, one encoding: bincode as the protocol uses it, and wincode as it comes.

use std::fmt::Debug;

use kms_protocol::{FRAME_HEAD_LEN, Opcode, Status};
use wincode::{SchemaRead, SchemaWrite, config::DefaultConfig};

use crate::{
    replies,
    script::Script,
    show::parts,
    wire::{make_frame, opcode},
};

#[derive(Debug, PartialEq, SchemaRead, SchemaWrite)]
enum Key {
    Name(String),
    Id([u8; 16]),
    Bound(u32),
}

#[derive(Debug, PartialEq, SchemaRead, SchemaWrite)]
enum State {
    Enabled,
    Staged,
    Disabled,
    Removed,
    Destroyed,
}

/// Of two variants: the tags of a `Result` are 0 and 1.
type Tag = Result<(), ()>;
type Token = [u8; 16];
type Id = [u8; 16];
type Check = [u8; 8];
type Restriction = (u32, u64);
type Row = (String, Id, bool, State, u32, u32, u32, Check, u64, Option<u64>, u64);
type Version = (u32, State, Check, u64, u64);
type Welcome = (u16, u32, u32, u32, u32, u32, u32, u32, Vec<u16>, Vec<u32>, u64);

/// What wincode writes for what it reads, or nothing when it does not take the bytes.
fn again<T>(bytes: &[u8]) -> Option<Vec<u8>>
where
    T: SchemaWrite<DefaultConfig, Src = T> + for<'de> SchemaRead<'de, DefaultConfig, Dst = T> + Debug,
{
    let value = wincode::deserialize_exact::<T>(bytes).ok()?;
    Some(wincode::serialize(&value).unwrap())
}

fn request(opcode: Opcode, bytes: &[u8]) -> Option<Vec<u8>> {
    match opcode {
        Opcode::Hello => again::<u16>(bytes),
        Opcode::Ping | Opcode::Status | Opcode::Lock | Opcode::Unlock | Opcode::Batch | Opcode::Stats => {
            again::<()>(bytes)
        }
        Opcode::Add => again::<(Token, String, Tag, bool, Vec<Restriction>)>(bytes),
        Opcode::List => again::<u64>(bytes),
        Opcode::Describe | Opcode::Export => again::<(Key, u32)>(bytes),
        Opcode::Remove | Opcode::Rotate => again::<(Token, Key)>(bytes),
        Opcode::Rename => again::<(Token, Key, String)>(bytes),
        Opcode::RemoveAll => again::<Token>(bytes),
        Opcode::Encrypt
        | Opcode::Decrypt
        | Opcode::StreamNew
        | Opcode::StreamOpen
        | Opcode::RemoteStreamNew
        | Opcode::RemoteStreamOpen
        | Opcode::Wrap
        | Opcode::Unwrap
        | Opcode::Verify
        | Opcode::Mac
        | Opcode::MacVerify => again::<(Key, Vec<u8>)>(bytes),
        Opcode::RemoteStreamEncrypt | Opcode::RemoteStreamClose | Opcode::Random => again::<u32>(bytes),
        Opcode::RemoteStreamDecrypt => again::<(u32, u64)>(bytes),
        Opcode::DataKey | Opcode::DataKeyWrapped => again::<(Key, Vec<u8>, u32)>(bytes),
        Opcode::Rewrap => again::<(Key, Vec<u8>, Option<Key>)>(bytes),
        Opcode::Bind => again::<(u32, Key)>(bytes),
    }
}

fn reply(opcode: Opcode, bytes: &[u8]) -> Option<Vec<u8>> {
    match opcode {
        Opcode::Hello => again::<Welcome>(bytes),
        Opcode::Status => again::<(Tag, Vec<(String, String)>)>(bytes),
        Opcode::Lock | Opcode::Unlock => again::<bool>(bytes),
        Opcode::Add => again::<(Id, u32, Check, bool)>(bytes),
        Opcode::List => again::<(Vec<Row>, u64)>(bytes),
        Opcode::Describe => again::<(Row, Vec<Version>, bool, Vec<Restriction>)>(bytes),
        Opcode::Remove | Opcode::Rename | Opcode::Bind => again::<Id>(bytes),
        Opcode::Rotate => again::<(Id, u32, Check)>(bytes),
        Opcode::RemoveAll => again::<u64>(bytes),
        Opcode::Export => again::<(Id, u32)>(bytes),
        Opcode::Rewrap => again::<(bool, Id, u32)>(bytes),
        Opcode::Verify => again::<(Id, String, u32, u32)>(bytes),
        Opcode::Stats => again::<(u64, Vec<(u16, u16, u64)>, Vec<(String, u64)>)>(bytes),
        Opcode::RemoteStreamNew | Opcode::RemoteStreamOpen => again::<u32>(bytes),
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
        | Opcode::Batch => again::<()>(bytes),
    }
}

/// An opcode, request or reply, fields.
pub(crate) fn run(input: &[u8]) {
    let mut script = Script(input);
    let (opcode, is_reply) = (opcode(script.byte()), script.byte() & 1 == 1);
    let bytes = script.rest();
    let (ours, theirs) = if is_reply {
        let ours = replies::decode(opcode, Status::Ok, bytes).ok();
        (ours.map(|fields| fields.frame(0, 0, &[]).unwrap().split_off(FRAME_HEAD_LEN)), reply(opcode, bytes))
    } else {
        let frame = make_frame(opcode.code(), 0, bytes, &[]);
        let Ok(Some(frame)) = kms_protocol::Frame::parse(&frame, kms_protocol::FRAME_MAX) else { return };
        let ours = kms_protocol::Request::decode(opcode, &frame).ok();
        let ours = ours.map(|request| parts(&request).1.frame(0, 0, &[]).unwrap().split_off(FRAME_HEAD_LEN));
        (ours, request(opcode, bytes))
    };
    assert_eq!(ours, theirs, "{} as {}", opcode.name(), if is_reply { "reply" } else { "request" });
    assert!(ours.is_none_or(|ours| ours == bytes));
}
