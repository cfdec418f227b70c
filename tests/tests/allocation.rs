//! No length on the wire makes the decoder reserve more than a frame can hold (`docs/protocol.md`, section 2.3).

use std::fs;

use bincode::Decode;
use kms_protocol::{
    Add, Description, FRAME_HEAD_LEN, FRAME_MAX, Frame, Listed, Opcode, Request, StatusReply, Welcome,
    decode_fields, push_frame,
};
use kms_tests::sys::{Counting, allocated_during};

#[global_allocator]
static COUNTING: Counting = Counting;

fn decode_reply<T: Decode<()> + for<'de> bincode::BorrowDecode<'de, ()>>(fields: &[u8]) -> usize {
    let (largest, held) = allocated_during(|| drop(decode_fields::<T>(fields)));
    assert!(largest <= FRAME_MAX, "{largest} bytes at once");
    held
}

/// What decoding takes: as every request, and as every reply that is more than a few numbers.
fn decode_all(fields: &[u8]) {
    for opcode in Opcode::ALL {
        let mut empty = Vec::new();
        push_frame(&mut empty, opcode.code(), 1, &kms_protocol::NoFields {}, &[]).unwrap();
        let frame = Frame { fields, ..Frame::parse(&empty, FRAME_MAX).unwrap().unwrap() };
        let (_, held) = allocated_during(|| drop(Request::decode(*opcode, &frame)));
        assert!(held <= FRAME_MAX, "{opcode:?} holds {held} bytes");
    }
    // Vectors of replies hold strings of their own, whose bytes are all there: a frame for the one, a frame for the others.
    for held in [
        decode_reply::<Welcome>(fields),
        decode_reply::<StatusReply>(fields),
        decode_reply::<Listed>(fields),
        decode_reply::<Description>(fields),
    ] {
        assert!(held <= 2 * FRAME_MAX, "{held} bytes held");
    }
}

/// One test: the numbers are those of the whole process.
#[test]
fn a_length_reserves_no_more_than_a_frame() {
    let hostile = [
        u64::MAX,
        u64::MAX / 2,
        1 << 63,
        1 << 48,
        (1 << 40) + 1,
        u64::from(u32::MAX),
        1 << 31,
        1 << 21,
        (1 << 20) + 1,
        1 << 20,
        (1 << 20) - 1,
        1 << 17,
        65_536,
        65_535,
        43_690,
        21_845,
        7_710,
        4_096,
    ];
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/vectors/protocol");
    let mut tried = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "txt") {
            continue;
        }
        let text = fs::read_to_string(path).unwrap();
        let digits = text.lines().find_map(|line| line.strip_prefix("frame: ")).unwrap();
        let pairs = digits.as_bytes().chunks_exact(2);
        let frame: Vec<u8> =
            pairs.map(|pair| u8::from_str_radix(str::from_utf8(pair).unwrap(), 16).unwrap()).collect();
        let fields = frame.get(FRAME_HEAD_LEN..).unwrap_or_default();
        for at in 0..fields.len().saturating_sub(7) {
            for length in hostile {
                let mut fields = fields.to_vec();
                fields[at..at + 8].copy_from_slice(&length.to_le_bytes());
                decode_all(&fields);
                tried += 1;
            }
        }
    }
    assert!(tried > 10_000);

    // As many elements as a whole frame can carry.
    let room = FRAME_MAX - FRAME_HEAD_LEN;
    for count in [room / 12, room / 16, room / 74, room] {
        let mut fields = vec![0; 34];
        fields.extend((count as u64).to_le_bytes());
        fields.resize(room, 0);
        decode_all(&fields);
        decode_all(&fields[34..]);
    }
    // The counter counts: what a full request holds is seen.
    let constraints = vec![kms_protocol::Constraint { kind: 1, value: 0 }; 10_000];
    let material = kms_protocol::Material::Generate;
    let add = Add { token: [0; 16], name: "a", material, if_missing: false, constraints };
    let mut frame = Vec::new();
    push_frame(&mut frame, 0x10, 1, &add, &[]).unwrap();
    let (largest, held) = allocated_during(|| drop(decode_fields::<Add<'_>>(&frame[FRAME_HEAD_LEN..])));
    assert!(largest >= 160_000 && held >= largest);
}
