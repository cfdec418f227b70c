//! Everything that can be made under a key that a test knows, without asking the agent.

use kms_envelope::{
    ContextRef, ExpandKey, Header, KeyId, KeyVersion, Purpose, STREAM_HEAD_LEN, make_tag, message_len,
    new_stream, seal_message,
};
use kms_protocol::Opcode;
use kms_tests::wire::random;

/// Every opcode that puts a key to work, `Rewrap` among them.
pub(crate) const USING: &[Opcode] = &[
    Opcode::Encrypt,
    Opcode::Decrypt,
    Opcode::StreamNew,
    Opcode::StreamOpen,
    Opcode::RemoteStreamNew,
    Opcode::RemoteStreamOpen,
    Opcode::Wrap,
    Opcode::Unwrap,
    Opcode::DataKey,
    Opcode::DataKeyWrapped,
    Opcode::Rewrap,
    Opcode::Verify,
    Opcode::Mac,
    Opcode::MacVerify,
];

/// Those of them that may stand in a batch.
pub(crate) fn may_stand_in_a_batch(opcode: Opcode) -> bool {
    USING.contains(&opcode) && !matches!(opcode, Opcode::RemoteStreamNew | Opcode::RemoteStreamOpen)
}

/// The purposes that an opcode opens; none when it opens nothing.
pub(crate) fn opens(opcode: Opcode) -> &'static [u8] {
    match opcode {
        Opcode::Decrypt => &[1],
        Opcode::Unwrap => &[2],
        Opcode::StreamOpen | Opcode::RemoteStreamOpen => &[3],
        Opcode::Rewrap | Opcode::Verify => &[1, 2, 3],
        Opcode::MacVerify => &[5],
        _ => &[],
    }
}

/// What was made under version 1 of one key in one context.
pub(crate) struct Made {
    message: Vec<u8>,
    wrapped: Vec<u8>,
    head: Vec<u8>,
    tag: Vec<u8>,
    digest: [u8; 64],
}

impl Made {
    /// Under this key of this id.
    pub(crate) fn under(secret: &[u8; 32], id: [u8; 16], context: &[u8]) -> Self {
        let (key, context) = (ExpandKey::new(secret), ContextRef::parse(context).unwrap());
        let header =
            |purpose| Header { purpose, key_id: KeyId::from_bytes(id), key_version: KeyVersion::FIRST };
        let seal = |purpose, plaintext: &[u8]| {
            let mut sealed = vec![0; message_len(plaintext.len())];
            seal_message(&key, &header(purpose), context, &random(), plaintext, &mut sealed).unwrap();
            sealed
        };
        let dek = random();
        let (head, _) =
            new_stream(&key, &header(Purpose::Stream), context, &dek, &random(), &random()).unwrap();
        assert_eq!(head.len(), STREAM_HEAD_LEN);
        let digest = random();
        Self {
            message: seal(Purpose::Message, b"a message"),
            wrapped: seal(Purpose::WrappedKey, &random::<32>()),
            head: head.to_vec(),
            tag: make_tag(&key, &header(Purpose::Tag), context, &digest).unwrap().to_vec(),
            digest,
        }
    }

    /// The payloads that this opcode takes, one of each purpose that it opens.
    pub(crate) fn payloads(&self, opcode: Opcode) -> Vec<Vec<u8>> {
        match opcode {
            Opcode::Encrypt | Opcode::Wrap => vec![b"a plaintext".to_vec()],
            Opcode::Decrypt => vec![self.message.clone()],
            Opcode::Unwrap => vec![self.wrapped.clone()],
            Opcode::StreamOpen | Opcode::RemoteStreamOpen => vec![self.head.clone()],
            Opcode::Rewrap => vec![self.message.clone(), self.wrapped.clone(), self.head[..132].to_vec()],
            Opcode::Verify => vec![self.message.clone(), self.wrapped.clone(), self.head.clone()],
            Opcode::Mac => vec![self.digest.to_vec()],
            Opcode::MacVerify => vec![[&self.tag[..], &self.digest].concat()],
            _ => vec![Vec::new()],
        }
    }
}
