//! `wincode` with its defaults writes and reads the same bytes, so that the codec can be exchanged when that is wanted.
//!
//! Each message has a mirror made of tuples; an enumeration of two is a `Result`, whose tags are 0 and 1, and one of more has a mirror of its own.

use std::fmt::Debug;

use bincode::Encode;
use kms_protocol::{
    Add, Added, Bind, Bound, Constraint, Describe, Description, Export, Exported, FRAME_HEAD_LEN, Fact,
    Hello, KeyAndContext, KeyRef, KeyRow, KeyState, List, Listed, LockState, Locking, Material, NewDataKey,
    NoFields, OperationCount, Random, Refusal, RemoteChunks, RemoteStream, Remove, RemoveAll, Removed,
    RemovedAll, Rename, Renamed, Rewrap, Rewrapped, Rotate, Rotated, StatsReply, StatusReply, Value,
    Verified, VersionRow, Welcome, decode_fields, push_frame,
};
use wincode::{SchemaRead, SchemaWrite, config::DefaultConfig};

/// Random messages, over all shapes.
const MESSAGES: usize = 10_000;

/// What random strings and byte strings are cut from.
const TEXT: &str = "backup db/main.2024_x-1 schlüssel ключ 鍵 🔑 \0\u{1b}\u{202e} and some more to cut from, until it is long";

/// The sequence of `SplitMix64`: every run meets the same messages.
struct Seeded(u64);

impl Seeded {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(end).unwrap()).unwrap()
    }
}

/// A value that can be made at random, and said again in the types of `wincode`.
trait Mirror {
    type As;
    fn random(seeded: &mut Seeded) -> Self;
    fn mirror(&self) -> Self::As;
}

macro_rules! mirror_integers {
    ($($type:ty),*) => {
        $(impl Mirror for $type {
            type As = Self;
            fn random(seeded: &mut Seeded) -> Self {
                // Small numbers, large ones, and both ends.
                let shift = seeded.below(9) * 8;
                let bytes = seeded.next().checked_shr(u32::try_from(shift).unwrap()).unwrap_or(0).to_le_bytes();
                let value = Self::from_le_bytes(*bytes.first_chunk().unwrap());
                if seeded.below(8) == 0 { Self::MAX } else { value }
            }
            fn mirror(&self) -> Self {
                *self
            }
        })*
    };
}

mirror_integers!(u16, u32, u64);

impl Mirror for bool {
    type As = Self;
    fn random(seeded: &mut Seeded) -> Self {
        seeded.below(2) == 1
    }
    fn mirror(&self) -> Self {
        *self
    }
}

impl<const N: usize> Mirror for [u8; N] {
    type As = Self;
    fn random(seeded: &mut Seeded) -> Self {
        std::array::from_fn(|_| seeded.next().to_le_bytes()[0])
    }
    fn mirror(&self) -> Self {
        *self
    }
}

impl Mirror for &'static str {
    type As = String;
    fn random(seeded: &mut Seeded) -> Self {
        let ends =
            [seeded.below(TEXT.len()), seeded.below(TEXT.len())].map(|at| TEXT.floor_char_boundary(at));
        &TEXT[ends[0].min(ends[1])..ends[0].max(ends[1])]
    }
    fn mirror(&self) -> String {
        (*self).to_owned()
    }
}

impl Mirror for &'static [u8] {
    type As = Vec<u8>;
    fn random(seeded: &mut Seeded) -> Self {
        let ends = [seeded.below(TEXT.len()), seeded.below(TEXT.len())];
        &TEXT.as_bytes()[ends[0].min(ends[1])..ends[0].max(ends[1])]
    }
    fn mirror(&self) -> Vec<u8> {
        self.to_vec()
    }
}

impl Mirror for String {
    type As = Self;
    fn random(seeded: &mut Seeded) -> Self {
        <&str>::random(seeded).to_owned()
    }
    fn mirror(&self) -> Self {
        self.clone()
    }
}

impl<T: Mirror> Mirror for Vec<T> {
    type As = Vec<T::As>;
    fn random(seeded: &mut Seeded) -> Self {
        (0..seeded.below(5)).map(|_| T::random(seeded)).collect()
    }
    fn mirror(&self) -> Self::As {
        self.iter().map(T::mirror).collect()
    }
}

impl<T: Mirror> Mirror for Option<T> {
    type As = Option<T::As>;
    fn random(seeded: &mut Seeded) -> Self {
        bool::random(seeded).then(|| T::random(seeded))
    }
    fn mirror(&self) -> Self::As {
        self.as_ref().map(T::mirror)
    }
}

macro_rules! mirror_structures {
    ($($type:ty { $($field:ident: $kind:ty),* })*) => {
        $(#[allow(unused_parens, reason = "one field is no tuple")]
        impl Mirror for $type {
            type As = ($(<$kind as Mirror>::As),*);
            fn random(seeded: &mut Seeded) -> Self {
                Self { $($field: <$kind>::random(seeded)),* }
            }
            fn mirror(&self) -> Self::As {
                let Self { $($field),* } = self;
                ($($field.mirror()),*)
            }
        })*
    };
}

// With one field the parentheses are no tuple, and the structure is written as that field is.
mirror_structures! {
    Hello { version: u16 }
    Welcome {
        version: u16, frame_max: u32, message_max: u32, context_max: u32, context_pairs_max: u32,
        in_flight_max: u32, page_rows_max: u32, remote_streams_max: u32, opcodes: Vec<u16>,
        constraints: Vec<u32>, features: u64
    }
    Refusal { retry_after_ms: u32 }
    KeyAndContext<'static> { key: KeyRef<'static>, context: &'static [u8] }
    Constraint { kind: u32, value: u64 }
    Add<'static> {
        token: [u8; 16], name: &'static str, material: Material, if_missing: bool,
        constraints: Vec<Constraint>
    }
    Added { id: [u8; 16], version: u32, check_value: [u8; 8], created: bool }
    List { cursor: u64 }
    Listed { keys: Vec<KeyRow>, next: u64 }
    KeyRow {
        name: String, id: [u8; 16], memory_only: bool, state: KeyState, primary: u32, minimum: u32,
        versions: u32, check_value: [u8; 8], created: u64, expires_in: Option<u64>, uses: u64
    }
    Describe<'static> { key: KeyRef<'static>, versions_after: u32 }
    Description { key: KeyRow, versions: Vec<VersionRow>, more: bool, constraints: Vec<Constraint> }
    VersionRow { version: u32, state: KeyState, check_value: [u8; 8], created: u64, uses: u64 }
    Remove<'static> { token: [u8; 16], key: KeyRef<'static> }
    Removed { id: [u8; 16] }
    Rotate<'static> { token: [u8; 16], key: KeyRef<'static> }
    Rotated { id: [u8; 16], version: u32, check_value: [u8; 8] }
    Rename<'static> { token: [u8; 16], key: KeyRef<'static>, name: &'static str }
    Renamed { id: [u8; 16] }
    Export<'static> { key: KeyRef<'static>, version: u32 }
    Exported { id: [u8; 16], version: u32 }
    RemoveAll { token: [u8; 16] }
    RemovedAll { keys: u64 }
    NewDataKey<'static> { key: KeyRef<'static>, context: &'static [u8], length: u32 }
    Rewrap<'static> { key: KeyRef<'static>, context: &'static [u8], to: Option<KeyRef<'static>> }
    Rewrapped { changed: bool, id: [u8; 16], version: u32 }
    Verified { id: [u8; 16], name: String, version: u32, primary: u32 }
    Random { length: u32 }
    Bind<'static> { number: u32, key: KeyRef<'static> }
    Bound { id: [u8; 16] }
    StatsReply { uptime_ms: u64, operations: Vec<OperationCount>, values: Vec<Value> }
    OperationCount { opcode: u16, status: u16, count: u64 }
    Value { name: String, value: u64 }
    Locking { changed: bool }
    RemoteStream { stream: u32 }
    RemoteChunks { stream: u32, first: u64 }
    StatusReply { state: LockState, facts: Vec<Fact> }
    Fact { name: String, value: String }
}

impl Mirror for NoFields {
    type As = ();
    fn random(_: &mut Seeded) -> Self {
        Self {}
    }
    fn mirror(&self) {}
}

/// The mirror of [`KeyRef`], an enumeration of more than two.
#[derive(Debug, PartialEq, SchemaRead, SchemaWrite)]
enum KeyRefMirror {
    Name(String),
    Id([u8; 16]),
    Bound(u32),
}

impl Mirror for KeyRef<'static> {
    type As = KeyRefMirror;
    fn random(seeded: &mut Seeded) -> Self {
        match seeded.below(3) {
            0 => Self::Name(<&str>::random(seeded)),
            1 => Self::Id(<[u8; 16]>::random(seeded)),
            _ => Self::Bound(u32::random(seeded)),
        }
    }
    fn mirror(&self) -> Self::As {
        match self {
            Self::Name(name) => KeyRefMirror::Name(name.mirror()),
            Self::Id(id) => KeyRefMirror::Id(*id),
            Self::Bound(number) => KeyRefMirror::Bound(*number),
        }
    }
}

macro_rules! mirror_tags {
    ($($type:ty { $first:ident, $second:ident })*) => {
        $(impl Mirror for $type {
            type As = Result<(), ()>;
            fn random(seeded: &mut Seeded) -> Self {
                if bool::random(seeded) { Self::$second } else { Self::$first }
            }
            fn mirror(&self) -> Self::As {
                match self {
                    Self::$first => Ok(()),
                    Self::$second => Err(()),
                }
            }
        })*
    };
}

mirror_tags! {
    Material { Generate, Import }
    LockState { Unlocked, Locked }
}

/// The mirror of [`KeyState`].
#[derive(Debug, PartialEq, SchemaRead, SchemaWrite)]
enum KeyStateMirror {
    Enabled,
    Staged,
    Disabled,
    Removed,
    Destroyed,
}

impl Mirror for KeyState {
    type As = KeyStateMirror;
    fn random(seeded: &mut Seeded) -> Self {
        match seeded.below(5) {
            0 => Self::Enabled,
            1 => Self::Staged,
            2 => Self::Disabled,
            3 => Self::Removed,
            _ => Self::Destroyed,
        }
    }
    fn mirror(&self) -> Self::As {
        match self {
            Self::Enabled => KeyStateMirror::Enabled,
            Self::Staged => KeyStateMirror::Staged,
            Self::Disabled => KeyStateMirror::Disabled,
            Self::Removed => KeyStateMirror::Removed,
            Self::Destroyed => KeyStateMirror::Destroyed,
        }
    }
}

/// The same bytes from both, the same message back, and of spoilt bytes the same opinion.
fn agree<T: Mirror + Encode>(seeded: &mut Seeded, takes: impl Fn(&[u8]) -> bool)
where
    T::As: SchemaWrite<DefaultConfig, Src = T::As>
        + for<'de> SchemaRead<'de, DefaultConfig, Dst = T::As>
        + PartialEq
        + Debug,
{
    let message = T::random(seeded);
    let mirror = message.mirror();
    let mut frame = Vec::new();
    push_frame(&mut frame, 1, 1, &message, &[]).unwrap();
    let mut bytes = frame.split_off(FRAME_HEAD_LEN);
    assert_eq!(wincode::serialize(&mirror).unwrap(), bytes);
    assert_eq!(wincode::deserialize_exact::<T::As>(&bytes).unwrap(), mirror);
    assert!(takes(&bytes));

    match seeded.below(3) {
        0 => bytes.truncate(seeded.below(bytes.len() + 1)),
        1 => bytes.push(seeded.next().to_le_bytes()[0]),
        _ if bytes.is_empty() => {}
        _ => {
            let at = seeded.below(bytes.len());
            bytes[at] = seeded.next().to_le_bytes()[0];
        }
    }
    let mirror_taken = wincode::deserialize_exact::<T::As>(&bytes).is_ok();
    assert_eq!(mirror_taken, takes(&bytes), "{bytes:02x?}");
}

macro_rules! agree_on {
    ($seeded:ident, $which:expr, $($number:literal: $type:ty;)*) => {
        match $which {
            $($number => agree::<$type>($seeded, |bytes| decode_fields::<$type>(bytes).is_ok()),)*
            other => panic!("{other}"),
        }
    };
}

#[test]
fn wincode_writes_and_reads_the_same_bytes() {
    let mut seeded = Seeded(0);
    let seeded = &mut seeded;
    for number in 0..MESSAGES {
        agree_on! { seeded, number % 34,
            0: NoFields;
            1: Hello;
            2: Welcome;
            3: Refusal;
            4: KeyAndContext<'_>;
            5: Add<'_>;
            6: Added;
            7: List;
            8: Listed;
            9: Describe<'_>;
            10: Description;
            11: Remove<'_>;
            12: Removed;
            13: Locking;
            14: RemoteStream;
            15: RemoteChunks;
            16: StatusReply;
            17: Constraint;
            18: Rotate<'_>;
            19: Rotated;
            20: Rename<'_>;
            21: Renamed;
            22: Export<'_>;
            23: Exported;
            24: RemoveAll;
            25: RemovedAll;
            26: NewDataKey<'_>;
            27: Rewrap<'_>;
            28: Rewrapped;
            29: Verified;
            30: Random;
            31: Bind<'_>;
            32: Bound;
            33: StatsReply;
        }
    }
}
