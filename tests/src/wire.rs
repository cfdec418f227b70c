//! A client of the wire that knows the protocol crate and nothing else, so that it can be as wrong as a test wants.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
};

use bincode::{BorrowDecode, Encode};
use kms_protocol::{
    Add, Added, Bind, Bound, Constraint, Describe, Description, Export, Exported, FRAME_HEAD_LEN, FRAME_MAX,
    Frame, Hello, KeyAndContext, KeyRef, KeyRow, List, Listed, Locking, Material, NewDataKey, NoFields,
    Opcode, PROTOCOL_VERSION, Refusal, RemoteChunks, RemoteStream, Remove, RemoveAll, Removed, RemovedAll,
    Rename, Renamed, Rewrap, Rewrapped, Rotate, Rotated, StatsReply, Status, StatusReply, Verified, Welcome,
    decode_fields, push_frame,
};

use crate::process::PATIENCE;

/// The canonical bytes of a context without pairs.
pub const NO_CONTEXT: &[u8] = &[0; 4];

/// A reply, whole.
#[derive(Clone, Debug)]
pub struct Reply {
    /// Its status.
    pub status: Status,
    /// The request that it answers.
    pub request_id: u32,
    /// Encoded fields.
    pub fields: Vec<u8>,
    /// What is behind them.
    pub payload: Vec<u8>,
    /// All of it as it came.
    pub bytes: Vec<u8>,
}

impl Reply {
    /// Itself if it says `ok`, else the status.
    ///
    /// # Errors
    /// The status of a refusal.
    ///
    /// # Panics
    /// When a refusal does not have the form of one.
    pub fn ok(self) -> Result<Self, Status> {
        if self.status == Status::Ok {
            return Ok(self);
        }
        assert!(self.payload.is_empty(), "a refusal has no payload: {self:?}");
        let wait = self.retry_after_ms();
        assert!(self.status == Status::Busy || wait == 0, "only busy names a time: {self:?}");
        Err(self.status)
    }

    /// The fields, decoded.
    ///
    /// # Panics
    /// When they are not of this type.
    #[must_use]
    pub fn decode<'a, T: BorrowDecode<'a, ()>>(&'a self) -> T {
        decode_fields(&self.fields).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// What a refusal says about when to come again.
    ///
    /// # Panics
    /// When it is no refusal.
    #[must_use]
    pub fn retry_after_ms(&self) -> u32 {
        assert_ne!(self.status, Status::Ok);
        self.decode::<Refusal>().retry_after_ms
    }
}

/// The replies in the payload of the reply to a batch.
///
/// # Panics
/// When they are not whole frames.
#[must_use]
pub fn split_replies(mut payload: &[u8]) -> Vec<Reply> {
    let mut replies = Vec::new();
    while !payload.is_empty() {
        let frame = Frame::parse(payload, FRAME_MAX).expect("a frame").expect("a whole frame");
        let (bytes, rest) = payload.split_at(frame.frame_len());
        replies.push(Reply {
            status: Status::from_code(frame.head.code).expect("a status of the specification"),
            request_id: frame.head.request_id,
            fields: frame.fields.to_vec(),
            payload: frame.payload.to_vec(),
            bytes: bytes.to_vec(),
        });
        payload = rest;
    }
    replies
}

/// A request that puts a key to work, with the fields that its opcode has: a data key has 32 bytes, and what is moved goes to
/// the primary version of its own key.
///
/// # Panics
/// When it does not fit a frame.
#[must_use]
pub fn use_frame(
    opcode: Opcode,
    request_id: u32,
    key: KeyRef<'_>,
    context: &[u8],
    payload: &[u8],
) -> Vec<u8> {
    match opcode {
        Opcode::DataKey | Opcode::DataKeyWrapped => {
            frame(opcode, request_id, &NewDataKey { key, context, length: 32 }, payload)
        }
        Opcode::Rewrap => frame(opcode, request_id, &Rewrap { key, context, to: None }, payload),
        _ => frame(opcode, request_id, &KeyAndContext { key, context }, payload),
    }
}

/// The operations that change, use and count keys, of whatever answers a request: a [`Wire`], or a core without one.
#[expect(clippy::missing_errors_doc, reason = "each gives the status of a refusal")]
pub trait Operations {
    /// Sends a request, as these bytes, and gives its reply.
    fn ask(&mut self, bytes: &[u8]) -> Reply;

    /// Sends a request and gives its reply, unless it is a refusal.
    fn call<T: Encode>(&mut self, opcode: Opcode, fields: &T, payload: &[u8]) -> Result<Reply, Status> {
        self.ask(&frame(opcode, 77, fields, payload)).ok()
    }

    /// `add` of a key; imported when `key` is given.
    fn add(&mut self, name: &str, key: Option<&[u8]>, constraints: &[(u32, u64)]) -> Result<Added, Status> {
        let material = if key.is_some() { Material::Import } else { Material::Generate };
        let constraints = constraints.iter().map(|(kind, value)| Constraint { kind: *kind, value: *value });
        let constraints = constraints.collect();
        let fields = Add { token: random(), name, material, if_missing: false, constraints };
        Ok(self.call(Opcode::Add, &fields, key.unwrap_or_default())?.decode())
    }

    /// `describe` of a key of this name, its versions above this one.
    fn described(&mut self, name: &str, versions_after: u32) -> Result<Description, Status> {
        let fields = Describe { key: KeyRef::Name(name), versions_after };
        Ok(self.call(Opcode::Describe, &fields, &[])?.decode())
    }

    /// How often the key of this name was used.
    fn uses(&mut self, name: &str) -> u64 {
        self.described(name, 0).unwrap_or_else(|status| panic!("{name}: {status:?}")).key.uses
    }

    /// `rotate`.
    fn rotate(&mut self, name: &str) -> Result<Rotated, Status> {
        let fields = Rotate { token: random(), key: KeyRef::Name(name) };
        Ok(self.call(Opcode::Rotate, &fields, &[])?.decode())
    }

    /// `rename`.
    fn rename(&mut self, name: &str, to: &str) -> Result<Renamed, Status> {
        let fields = Rename { token: random(), key: KeyRef::Name(name), name: to };
        Ok(self.call(Opcode::Rename, &fields, &[])?.decode())
    }

    /// `remove-all`: number of keys.
    fn remove_all(&mut self) -> Result<u64, Status> {
        let reply = self.call(Opcode::RemoveAll, &RemoveAll { token: random() }, &[])?;
        Ok(reply.decode::<RemovedAll>().keys)
    }

    /// `export`: the version, and its bytes.
    fn export(&mut self, name: &str, version: u32, passphrase: &[u8]) -> Result<(Exported, Vec<u8>), Status> {
        let fields = Export { key: KeyRef::Name(name), version };
        let reply = self.call(Opcode::Export, &fields, passphrase)?;
        Ok((reply.decode(), reply.payload))
    }

    /// One of the requests that put a key to work, as [`use_frame`] has it: the payload.
    fn put_to_work(
        &mut self,
        opcode: Opcode,
        key: KeyRef<'_>,
        context: &[u8],
        payload: &[u8],
    ) -> Result<Vec<u8>, Status> {
        Ok(self.ask(&use_frame(opcode, 77, key, context, payload)).ok()?.payload)
    }

    /// `datakey`: plain and wrapped.
    fn data_key(&mut self, name: &str, context: &[u8], length: u32) -> Result<(Vec<u8>, Vec<u8>), Status> {
        let fields = NewDataKey { key: KeyRef::Name(name), context, length };
        let payload = self.call(Opcode::DataKey, &fields, &[])?.payload;
        let (plain, wrapped) = payload.split_at(length as usize);
        Ok((plain.to_vec(), wrapped.to_vec()))
    }

    /// `rewrap`, to another key where one is named.
    fn rewrap(
        &mut self,
        name: &str,
        context: &[u8],
        to: Option<KeyRef<'_>>,
        ciphertext: &[u8],
    ) -> Result<(Rewrapped, Vec<u8>), Status> {
        let fields = Rewrap { key: KeyRef::Name(name), context, to };
        let reply = self.call(Opcode::Rewrap, &fields, ciphertext)?;
        Ok((reply.decode(), reply.payload))
    }

    /// `verify`.
    fn verify(&mut self, name: &str, context: &[u8], ciphertext: &[u8]) -> Result<Verified, Status> {
        let fields = KeyAndContext { key: KeyRef::Name(name), context };
        Ok(self.call(Opcode::Verify, &fields, ciphertext)?.decode())
    }

    /// `random`.
    fn random_bytes(&mut self, length: u32) -> Result<Vec<u8>, Status> {
        Ok(self.call(Opcode::Random, &kms_protocol::Random { length }, &[])?.payload)
    }

    /// `bind`: the id of the key.
    fn bind(&mut self, number: u32, key: KeyRef<'_>) -> Result<[u8; 16], Status> {
        Ok(self.call(Opcode::Bind, &Bind { number, key }, &[])?.decode::<Bound>().id)
    }

    /// `batch` of these requests: the reply to each.
    fn batch(&mut self, items: &[Vec<u8>]) -> Result<Vec<Reply>, Status> {
        Ok(split_replies(&self.call(Opcode::Batch, &NoFields {}, &items.concat())?.payload))
    }

    /// `stats`.
    fn stats(&mut self) -> StatsReply {
        self.call(Opcode::Stats, &NoFields {}, &[]).unwrap().decode()
    }

    /// A value of `stats`.
    ///
    /// # Panics
    /// When there is none of this name.
    fn value(&mut self, name: &str) -> u64 {
        let value = self.stats().values.into_iter().find(|value| value.name == name);
        value.unwrap_or_else(|| panic!("no value {name}")).value
    }

    /// `lock` with this passphrase: whether it changed anything.
    fn locks(&mut self, passphrase: &[u8]) -> Result<bool, Status> {
        Ok(self.call(Opcode::Lock, &NoFields {}, passphrase)?.decode::<Locking>().changed)
    }

    /// `unlock` with this passphrase: whether it changed anything.
    fn unlocks(&mut self, passphrase: &[u8]) -> Result<bool, Status> {
        Ok(self.call(Opcode::Unlock, &NoFields {}, passphrase)?.decode::<Locking>().changed)
    }
}

impl Operations for Wire {
    fn ask(&mut self, bytes: &[u8]) -> Reply {
        self.send(bytes).unwrap();
        let reply = self.receive().expect("a reply");
        assert_eq!(reply.request_id.to_le_bytes(), bytes[8..12]);
        reply
    }
}

/// A whole request as it goes over the wire.
///
/// # Panics
/// When it does not fit a frame.
#[must_use]
pub fn frame<T: Encode>(opcode: Opcode, request_id: u32, fields: &T, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    push_frame(&mut bytes, opcode.code(), request_id, fields, payload).unwrap();
    bytes
}

/// Random bytes of the kernel.
///
/// # Panics
/// When there are none.
#[must_use]
pub fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes)).unwrap();
    bytes
}

/// As [`random`], of a length that is not known before.
///
/// # Panics
/// When there are none.
#[must_use]
pub fn random_bytes(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes)).unwrap();
    bytes
}

/// The request that adds a key; imported when `key` is given.
///
/// # Panics
/// When it does not fit a frame.
#[must_use]
pub fn add_frame(request_id: u32, token: [u8; 16], name: &str, key: Option<&[u8]>) -> Vec<u8> {
    let material = if key.is_some() { Material::Import } else { Material::Generate };
    let fields = Add { token, name, material, if_missing: false, constraints: Vec::new() };
    frame(Opcode::Add, request_id, &fields, key.unwrap_or_default())
}

/// One connection.
pub struct Wire {
    /// The socket, for what no method does.
    pub stream: UnixStream,
    last_id: u32,
    received: Vec<u8>,
}

impl Wire {
    /// A connection over this socket, nothing said yet.
    ///
    /// # Panics
    /// When the socket takes no timeout.
    #[must_use]
    pub fn over(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { stream, last_id: 0, received: Vec::new() }
    }

    /// Connects and says nothing.
    ///
    /// # Panics
    /// When nobody listens.
    #[must_use]
    pub fn mute(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket);
        Self::over(stream.unwrap_or_else(|error| panic!("{}: {error}", socket.display())))
    }

    /// Connects and says hello.
    ///
    /// # Panics
    /// When the agent does not welcome it.
    #[must_use]
    pub fn connect(socket: &Path) -> Self {
        let mut wire = Self::mute(socket);
        wire.hello();
        wire
    }

    /// Says hello.
    ///
    /// # Panics
    /// When the agent does not welcome it.
    pub fn hello(&mut self) -> Welcome {
        let reply = self.request(Opcode::Hello, &Hello { version: PROTOCOL_VERSION }, &[]);
        reply.ok().unwrap().decode()
    }

    /// Sends bytes as they are.
    ///
    /// # Errors
    /// Of the socket.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// The next reply; nothing when the agent ended the connection between two replies.
    ///
    /// # Panics
    /// When the agent answers in pieces of replies, impossibly, or not at all.
    pub fn receive(&mut self) -> Option<Reply> {
        loop {
            if let Some(frame) = Frame::parse(&self.received, FRAME_MAX).expect("a frame") {
                let status = Status::from_code(frame.head.code).expect("a status of the specification");
                let (fields, payload) = (frame.fields.to_vec(), frame.payload.to_vec());
                let request_id = frame.head.request_id;
                let bytes = self.received.drain(..frame.frame_len()).collect();
                return Some(Reply { status, request_id, fields, payload, bytes });
            }
            let mut chunk = [0; 65536];
            match self.stream.read(&mut chunk) {
                Ok(0) => {
                    assert!(self.received.is_empty(), "the connection ended within a reply");
                    return None;
                }
                Ok(count) => self.received.extend_from_slice(&chunk[..count]),
                // A read with a deadline is not taken up again after a signal.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // What stands unread at the other end makes the end of the connection an error at this one.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("no reply: {error}"),
            }
        }
    }

    /// An id for a request that is new on this connection.
    pub fn next_id(&mut self) -> u32 {
        self.last_id += 1;
        self.last_id
    }

    /// Sends a request and gives its reply.
    ///
    /// # Panics
    /// When the connection ends instead, or the reply is another request's.
    pub fn request<T: Encode>(&mut self, opcode: Opcode, fields: &T, payload: &[u8]) -> Reply {
        let request_id = self.next_id();
        self.send(&frame(opcode, request_id, fields, payload)).unwrap();
        let reply = self.receive().unwrap_or_else(|| panic!("no reply to {}", opcode.name()));
        assert_eq!(reply.request_id, request_id);
        reply
    }

    /// True when the agent has ended the connection without another byte.
    ///
    /// # Panics
    /// When it says something first.
    pub fn is_closed(&mut self) -> bool {
        match self.receive() {
            None => true,
            Some(reply) => panic!("a byte came: {reply:?}"),
        }
    }

    /// `ping`.
    ///
    /// # Errors
    /// The status of a refusal.
    pub fn ping(&mut self) -> Result<(), Status> {
        let reply = self.request(Opcode::Ping, &NoFields {}, &[]).ok()?;
        assert_eq!((reply.fields.len(), reply.payload.len()), (0, 0));
        Ok(())
    }

    /// `status`.
    ///
    /// # Panics
    /// When it is refused, which it never is.
    pub fn status(&mut self) -> StatusReply {
        self.request(Opcode::Status, &NoFields {}, &[]).ok().unwrap().decode()
    }

    /// A fact of `status`.
    ///
    /// # Panics
    /// When there is none of this name.
    pub fn fact(&mut self, name: &str) -> String {
        let status = self.status();
        let fact = status.facts.into_iter().find(|fact| fact.name == name);
        fact.unwrap_or_else(|| panic!("no fact {name}")).value
    }

    /// `add` with everything as asked.
    ///
    /// # Errors
    /// The status of a refusal.
    pub fn add_as(&mut self, fields: &Add<'_>, key: &[u8]) -> Result<Added, Status> {
        Ok(self.request(Opcode::Add, fields, key).ok()?.decode())
    }

    /// `add` of a generated key.
    ///
    /// # Errors
    /// The status of a refusal.
    pub fn generate(&mut self, name: &str) -> Result<Added, Status> {
        self.generate_with(name, Vec::new())
    }

    /// `add` of a generated key with constraints.
    ///
    /// # Errors
    /// The status of a refusal.
    pub fn generate_with(&mut self, name: &str, constraints: Vec<Constraint>) -> Result<Added, Status> {
        let fields =
            Add { token: random(), name, material: Material::Generate, if_missing: false, constraints };
        self.add_as(&fields, &[])
    }

    /// `add` of an imported key.
    ///
    /// # Errors
    /// The status of a refusal.
    pub fn import(&mut self, name: &str, key: &[u8]) -> Result<Added, Status> {
        let (material, constraints) = (Material::Import, Vec::new());
        self.add_as(&Add { token: random(), name, material, if_missing: false, constraints }, key)
    }

    /// Every page of `list`.
    ///
    /// # Errors
    /// The status of a refusal.
    pub fn list(&mut self) -> Result<Vec<KeyRow>, Status> {
        let (mut rows, mut cursor) = (Vec::new(), 0);
        loop {
            let reply = self.request(Opcode::List, &List { cursor }, &[]).ok()?;
            let page: Listed = reply.decode();
            assert!(page.keys.len() <= 256, "a page of {}", page.keys.len());
            rows.extend(page.keys);
            cursor = page.next;
            if cursor == 0 {
                return Ok(rows);
            }
        }
    }

    /// `describe`.
    ///
    /// # Errors
    /// The status of a refusal.
    pub fn describe(&mut self, key: KeyRef<'_>) -> Result<Description, Status> {
        Ok(self.request(Opcode::Describe, &Describe { key, versions_after: 0 }, &[]).ok()?.decode())
    }

    /// `remove`.
    ///
    /// # Errors
    /// The status of a refusal.
    pub fn remove(&mut self, name: &str) -> Result<Removed, Status> {
        let fields = Remove { token: random(), key: KeyRef::Name(name) };
        Ok(self.request(Opcode::Remove, &fields, &[]).ok()?.decode())
    }

    /// One of the requests whose fields are key and context; the reply.
    ///
    /// # Errors
    /// The status of a refusal.
    pub fn with_key(
        &mut self,
        opcode: Opcode,
        key: KeyRef<'_>,
        context: &[u8],
        payload: &[u8],
    ) -> Result<Reply, Status> {
        self.request(opcode, &KeyAndContext { key, context }, payload).ok()
    }

    /// `encrypt` under the key of this name.
    ///
    /// # Errors
    /// The status of a refusal.
    pub fn encrypt(&mut self, name: &str, context: &[u8], plaintext: &[u8]) -> Result<Vec<u8>, Status> {
        Ok(self.with_key(Opcode::Encrypt, KeyRef::Name(name), context, plaintext)?.payload)
    }

    /// `decrypt` under the key of this name.
    ///
    /// # Errors
    /// The status of a refusal.
    pub fn decrypt(&mut self, name: &str, context: &[u8], ciphertext: &[u8]) -> Result<Vec<u8>, Status> {
        Ok(self.with_key(Opcode::Decrypt, KeyRef::Name(name), context, ciphertext)?.payload)
    }

    /// `remote-stream-new`: number and head.
    ///
    /// # Errors
    /// The status of a refusal.
    pub fn remote_new(&mut self, name: &str) -> Result<(u32, Vec<u8>), Status> {
        let reply = self.with_key(Opcode::RemoteStreamNew, KeyRef::Name(name), NO_CONTEXT, &[])?;
        Ok((reply.decode::<RemoteStream>().stream, reply.payload))
    }

    /// `remote-stream-open`: number.
    ///
    /// # Errors
    /// The status of a refusal.
    pub fn remote_open(&mut self, name: &str, head: &[u8]) -> Result<u32, Status> {
        let reply = self.with_key(Opcode::RemoteStreamOpen, KeyRef::Name(name), NO_CONTEXT, head)?;
        Ok(reply.decode::<RemoteStream>().stream)
    }

    /// `remote-stream-encrypt`.
    ///
    /// # Errors
    /// The status of a refusal.
    pub fn remote_encrypt(&mut self, stream: u32, plaintext: &[u8]) -> Result<Vec<u8>, Status> {
        Ok(self.request(Opcode::RemoteStreamEncrypt, &RemoteStream { stream }, plaintext).ok()?.payload)
    }

    /// `remote-stream-decrypt`.
    ///
    /// # Errors
    /// The status of a refusal.
    pub fn remote_decrypt(&mut self, stream: u32, first: u64, chunks: &[u8]) -> Result<Vec<u8>, Status> {
        Ok(self.request(Opcode::RemoteStreamDecrypt, &RemoteChunks { stream, first }, chunks).ok()?.payload)
    }

    /// `remote-stream-close`.
    ///
    /// # Errors
    /// The status of a refusal.
    pub fn remote_close(&mut self, stream: u32) -> Result<(), Status> {
        self.request(Opcode::RemoteStreamClose, &RemoteStream { stream }, &[]).ok().map(|_| ())
    }

    /// `lock`: whether it changed anything.
    ///
    /// # Errors
    /// The status of a refusal.
    pub fn lock(&mut self, passphrase: &[u8]) -> Result<bool, Status> {
        Ok(self.request(Opcode::Lock, &NoFields {}, passphrase).ok()?.decode::<Locking>().changed)
    }

    /// `unlock`: whether it changed anything.
    ///
    /// # Errors
    /// The status of a refusal.
    pub fn unlock(&mut self, passphrase: &[u8]) -> Result<bool, Status> {
        Ok(self.request(Opcode::Unlock, &NoFields {}, passphrase).ok()?.decode::<Locking>().changed)
    }
}

/// Sends many requests while their replies are read, in batches that fit both buffers of a socket, and gives the
/// replies in the order of the requests.
///
/// # Panics
/// When the connection ends, or replies come in another order.
pub fn pipeline(wire: &mut Wire, frames: &[Vec<u8>]) -> Vec<Reply> {
    let mut replies = Vec::with_capacity(frames.len());
    for batch in frames.chunks(64) {
        wire.send(&batch.concat()).unwrap();
        for sent in batch {
            let reply = wire.receive().expect("a reply to each request");
            assert_eq!(reply.request_id.to_le_bytes(), sent[8..12], "{FRAME_HEAD_LEN} bytes of head");
            replies.push(reply);
        }
    }
    replies
}
