//! Every pair of operations: the output of each, fed to each that takes a ciphertext, alone and in a batch.

use kms_protocol::{KeyRef, Opcode, Status, constraint};
use kms_tests::{
    Agent, Reply,
    canary::Canaries,
    wire::{NO_CONTEXT, Operations, frame, random, use_frame},
};

use crate::made::{may_stand_in_a_batch, opens};

const TAKERS: [Opcode; 7] = [
    Opcode::Decrypt,
    Opcode::Unwrap,
    Opcode::StreamOpen,
    Opcode::RemoteStreamOpen,
    Opcode::Rewrap,
    Opcode::Verify,
    Opcode::MacVerify,
];

/// What an output truthfully is, which says who may open it and what comes out.
#[derive(Clone, PartialEq, Eq)]
enum Is {
    /// A message of this plaintext.
    Message(Vec<u8>),
    /// A wrapped key, and the key if anybody was told.
    Wrapped(Option<Vec<u8>>),
    /// The head of a stream, 188 bytes, and its message key if anybody was told.
    Head(Option<Vec<u8>>),
    /// What is rewrapped of a stream, 132 bytes.
    Prefix,
    /// A tag of an input and behind it the digest.
    TagAndDigest,
    /// Nothing that anybody opens.
    Nothing,
}

struct Output {
    what: String,
    /// The key that it is under.
    under: &'static str,
    is: Is,
    bytes: Vec<u8>,
}

impl Output {
    fn new(what: &str, under: &'static str, is: Is, bytes: Vec<u8>) -> Self {
        Self { what: what.to_owned(), under, is, bytes }
    }

    /// Whether this operation has to do what it is asked with it.
    fn opens_with(&self, opcode: Opcode) -> bool {
        match self.is {
            Is::Message(_) => matches!(opcode, Opcode::Decrypt | Opcode::Rewrap | Opcode::Verify),
            Is::Wrapped(_) => matches!(opcode, Opcode::Unwrap | Opcode::Rewrap | Opcode::Verify),
            Is::Head(_) => {
                matches!(opcode, Opcode::StreamOpen | Opcode::RemoteStreamOpen | Opcode::Verify)
            }
            Is::Prefix => opcode == Opcode::Rewrap,
            Is::TagAndDigest => opcode == Opcode::MacVerify,
            Is::Nothing => false,
        }
    }
}

/// The one secret that a reply may hold: what this operation is there to give out.
fn assert_gives_only_its_own(output: &Output, opcode: Opcode, reply: &Reply, secrets: &Canaries) {
    let own = match (&output.is, opcode) {
        (Is::Message(plaintext), Opcode::Decrypt) => Some(plaintext),
        (Is::Wrapped(key), Opcode::Unwrap) => key.as_ref(),
        (Is::Head(key), Opcode::StreamOpen) => key.as_ref(),
        _ => None,
    };
    let place = format!("the reply of {} to {}", opcode.name(), output.what);
    match own {
        Some(own) if reply.status == Status::Ok => {
            assert!(reply.payload.starts_with(own), "{place}");
            // It stands there once, at its place, and nothing else does.
            secrets.assert_absent(&place, &reply.bytes[..reply.bytes.len() - reply.payload.len()]);
            secrets.assert_absent(&place, &reply.payload[own.len()..]);
        }
        _ => secrets.assert_absent(&place, &reply.bytes),
    }
}

#[test]
fn no_pair_of_operations_opens_what_it_should_not_or_gives_out_a_key() {
    let agent = Agent::start();
    let mut wire = agent.connect();
    let keys: [[u8; 32]; 2] = [random(), random()];
    let mut secrets = Canaries::new();
    let names = ["k", "w"];
    for (name, key) in names.iter().zip(&keys) {
        wire.add(name, Some(key), &[(constraint::EXPORTABLE, 0)]).unwrap();
        secrets.add("a key of the agent's", key);
    }
    let mut outputs = Vec::new();
    for (name, other) in [("k", "w"), ("w", "k")] {
        let key = KeyRef::Name(name);
        let mut work = |opcode, payload: &[u8]| wire.put_to_work(opcode, key, NO_CONTEXT, payload).unwrap();
        let mut has = |what: &str, under, is: Is, bytes: Vec<u8>| {
            outputs.push(Output::new(what, under, is, bytes));
        };
        let plaintext = random::<32>().to_vec();
        secrets.add("a plaintext", &plaintext);
        has("encrypt", name, Is::Message(plaintext.clone()), work(Opcode::Encrypt, &plaintext));
        let callers = random::<32>().to_vec();
        secrets.add("a key of the caller's", &callers);
        has("wrap", name, Is::Wrapped(Some(callers.clone())), work(Opcode::Wrap, &callers));
        has("datakey-wrapped", name, Is::Wrapped(None), work(Opcode::DataKeyWrapped, &[]));
        let new = work(Opcode::StreamNew, &[]);
        secrets.add("a message key", &new[188..220]);
        has("stream-new, head", name, Is::Head(Some(new[188..].to_vec())), new[..188].to_vec());
        has("stream-new, prefix", name, Is::Prefix, new[..132].to_vec());
        has("stream-new, message key and nonce", name, Is::Nothing, new[188..].to_vec());
        has("stream-new, all of it", name, Is::Nothing, new.clone());
        let digest = random::<64>();
        let tag = work(Opcode::Mac, &digest);
        has("mac", name, Is::Nothing, tag.clone());
        has("mac and another digest", name, Is::Nothing, [&tag[..], &random::<64>()].concat());
        has("mac and its digest", name, Is::TagAndDigest, [&tag[..], &digest].concat());

        let (plain, wrapped) = wire.data_key(name, NO_CONTEXT, 32).unwrap();
        secrets.add("a data key", &plain);
        has("datakey, all of it", name, Is::Nothing, [&plain[..], &wrapped].concat());
        has("datakey, plain", name, Is::Nothing, plain.clone());
        has("datakey, wrapped", name, Is::Wrapped(Some(plain)), wrapped);
        has("random", name, Is::Nothing, wire.random_bytes(132).unwrap());
        let (_, exported) = wire.export(name, 0, &[]).unwrap();
        has("export", name, Is::Nothing, exported.clone());
        // A05: a key of the agent's is wrapped by its owner; only unwrap gives it back.
        let wrapped = wire.put_to_work(Opcode::Wrap, KeyRef::Name(other), NO_CONTEXT, &exported).unwrap();
        has("wrap of an export", other, Is::Wrapped(Some(exported)), wrapped);
        let (number, head) = wire.remote_new(name).unwrap();
        let opened = wire.put_to_work(Opcode::StreamOpen, key, NO_CONTEXT, &head).unwrap();
        secrets.add("a message key", &opened[..32]);
        let chunks = wire.remote_encrypt(number, &plaintext).unwrap();
        has("remote-stream-new", name, Is::Head(Some(opened)), head.clone());
        has("remote-stream-encrypt", name, Is::Nothing, chunks.clone());
        has("a whole stream", name, Is::Nothing, [head, chunks].concat());
    }
    // What rewrap makes of them opens as what they were, under the other key alone.
    let mut moved = Vec::new();
    for output in outputs.iter().filter(|output| output.opens_with(Opcode::Rewrap)) {
        let other = if output.under == "k" { "w" } else { "k" };
        let to = Some(KeyRef::Name(other));
        let (_, bytes) = wire.rewrap(output.under, NO_CONTEXT, to, &output.bytes).unwrap();
        assert_eq!(bytes.len(), output.bytes.len());
        secrets.assert_absent("what rewrap made", &bytes);
        let what = format!("rewrap of {}", output.what);
        moved.push(Output { what, under: other, is: output.is.clone(), bytes });
    }
    outputs.append(&mut moved);
    // Each said to be for another purpose, or by another key: whatever it was, that it is not.
    let ids = names.map(|name| *wire.described(name, 0).unwrap().key.id.first_chunk::<16>().unwrap());
    let mut lies = Vec::new();
    for output in outputs.iter().filter(|output| output.bytes.len() >= 28 && output.bytes[0] == 0x92) {
        for purpose in (0..=6).filter(|purpose| *purpose != output.bytes[5]) {
            let mut bytes = output.bytes.clone();
            bytes[5] = purpose;
            let what = format!("{} as purpose {purpose}", output.what);
            lies.push(Output { what, under: output.under, is: Is::Nothing, bytes });
        }
        for (name, id) in names.iter().zip(ids).filter(|(name, _)| **name != output.under) {
            let mut bytes = output.bytes.clone();
            bytes[8..24].copy_from_slice(&id);
            let what = format!("{} as one of {name}", output.what);
            lies.push(Output { what, under: name, is: Is::Nothing, bytes });
        }
    }
    outputs.append(&mut lies);

    let mut opened = [0; TAKERS.len()];
    for output in &outputs {
        for name in names {
            let mut items = Vec::new();
            for (place, opcode) in TAKERS.into_iter().enumerate() {
                let request = use_frame(opcode, 7, KeyRef::Name(name), NO_CONTEXT, &output.bytes);
                let reply = wire.ask(&request);
                let ours = output.under == name && output.opens_with(opcode);
                assert_eq!(
                    reply.status == Status::Ok,
                    ours,
                    "{} under {name}, to {}: {:?}",
                    output.what,
                    opcode.name(),
                    reply.status
                );
                opened[place] += u32::from(ours);
                assert_gives_only_its_own(output, opcode, &reply, &secrets);
                if opcode == Opcode::RemoteStreamOpen && ours {
                    let stream = reply.decode::<kms_protocol::RemoteStream>().stream;
                    wire.remote_close(stream).unwrap();
                }
                if may_stand_in_a_batch(opcode) {
                    items.push((opcode, ours, request));
                }
            }
            let frames: Vec<_> = items.iter().map(|(_, _, request)| request.clone()).collect();
            let replies = wire.batch(&frames).unwrap();
            assert_eq!(replies.len(), items.len());
            for ((opcode, ours, _), reply) in items.iter().zip(&replies) {
                let place = format!("{} under {name}, to {} in a batch", output.what, opcode.name());
                assert_eq!(reply.status == Status::Ok, *ours, "{place}");
                assert_gives_only_its_own(output, *opcode, reply, &secrets);
            }
        }
        // Nothing that was made is a key, a passphrase or a name that opens anything else.
        assert_eq!(wire.unlock(&output.bytes[..output.bytes.len().min(1024)]), Ok(false));
    }
    // The control: what was truthfully asked for was done, by each of them.
    assert_eq!(opens(Opcode::Decrypt), [1]);
    assert!(opened.iter().all(|count| *count >= 2), "{opened:?}");
    // And another: a secret in a reply would have been found.
    let leak = frame(Opcode::Encrypt, 1, &kms_protocol::NoFields {}, &keys[0]);
    assert!(!secrets.find(&leak).is_empty());
}
