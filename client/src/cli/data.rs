//! The commands that use a key on data: streams, wrapped keys, data keys, tags.

use std::{
    ffi::OsStr,
    io::{self, IoSlice},
};

use kms_envelope::{
    HEADER_LEN, Header, HeaderError, KeyId, MESSAGE_MAX, Purpose, STREAM_HEAD_LEN, message_len,
};
use kms_secret_memory::SecretVec;
use sha2::{Digest, Sha512};

use super::{
    arguments::{DataKey, Decrypt, Encrypt, Global, Mac, Random, Unwrap, Verify, Way, Wrap},
    connect,
    files::{self, Content, Destination},
    forms::{self, Source},
    key_name,
    ui::{Failure, Ui, Verdict},
};
use crate::{
    Client, ContextRef, DIGEST_LEN, Error, INPUT_TAG_LEN, Input, KeyRef, LocalOpening, LocalSealing, Output,
    Progress, RemoteOpening, RemoteSealing, Status,
};

/// Random bytes that are asked for at a time.
const RANDOM_PIECE: u64 = 65_536;

/// Bytes that are hashed at a time.
const HASH_PIECE: usize = 256 << 10;

impl Way {
    /// Whoever may not have a message key may still use it in the agent, unless the user has said which way.
    const EITHER: Self = Self { local: false, remote: false };

    fn may_go_remote(&self, error: &Error) -> bool {
        !self.local && error.status() == Some(Status::Denied)
    }
}

/// A new stream, on the way that the user or the agent permits.
pub(super) enum Sealing<'a> {
    Local(LocalSealing),
    Remote(RemoteSealing<'a>),
}

impl<'a> Sealing<'a> {
    fn new(
        client: &'a mut Client,
        key: KeyRef<'_>,
        context: ContextRef<'_>,
        way: &Way,
    ) -> Result<Self, Error> {
        if !way.remote {
            match client.stream_new(key, context) {
                Err(error) if way.may_go_remote(&error) => {}
                stream => return stream.map(Self::Local),
            }
        }
        client.remote_stream_new(key, context).map(Self::Remote)
    }

    /// On either way.
    pub(super) fn of(
        client: &'a mut Client,
        key: KeyRef<'_>,
        context: ContextRef<'_>,
    ) -> Result<Self, Error> {
        Self::new(client, key, context, &Way::EITHER)
    }

    pub(super) fn run(
        self,
        input: Input<'_>,
        output: Output<'_>,
        progress: &dyn Progress,
    ) -> Result<u64, Error> {
        match self {
            Self::Local(stream) => stream.run(input, output, progress),
            Self::Remote(stream) => stream.run(input, output, progress),
        }
    }
}

/// A stream that is to be opened, as [`Sealing`].
pub(super) enum Opening<'a> {
    Local(LocalOpening),
    Remote(RemoteOpening<'a>),
}

impl<'a> Opening<'a> {
    fn new(
        client: &'a mut Client,
        key: KeyRef<'_>,
        context: ContextRef<'_>,
        head: &[u8; STREAM_HEAD_LEN],
        way: &Way,
    ) -> Result<Self, Error> {
        if !way.remote {
            match client.stream_open(key, context, head) {
                Err(error) if way.may_go_remote(&error) => {}
                stream => return stream.map(Self::Local),
            }
        }
        client.remote_stream_open(key, context, head).map(Self::Remote)
    }

    /// On either way.
    pub(super) fn of(
        client: &'a mut Client,
        key: KeyRef<'_>,
        context: ContextRef<'_>,
        head: &[u8; STREAM_HEAD_LEN],
    ) -> Result<Self, Error> {
        Self::new(client, key, context, head, &Way::EITHER)
    }

    pub(super) fn run(
        self,
        input: Input<'_>,
        output: Output<'_>,
        progress: &dyn Progress,
    ) -> Result<u64, Error> {
        match self {
            Self::Local(stream) => stream.run(input, output, progress),
            Self::Remote(stream) => stream.run(input, output, progress),
        }
    }
}

impl Encrypt {
    pub(super) fn run(&self, global: &Global, ui: &Ui) -> Result<(), Failure> {
        let name = &self.key.key;
        let key = key_name(name)?;
        let context = self.context.read()?;
        let destination = Destination::new(self.files.output.as_deref(), ciphertext(self.text))?;
        let mut input = open_input(self.files.file.as_deref())?;
        // Read before the agent is asked: what does not fit one line costs no use of the key.
        let short = match self.text {
            true => Some(input.rest("plaintext", MESSAGE_MAX).map_err(|error| match error {
                Error::TooLong { max, .. } => Failure::LongText { max },
                error => error.into(),
            })?),
            false => None,
        };
        let mut client = connect(global, ui)?;
        let stream = Sealing::new(&mut client, key, context.as_ref(), &self.way);
        let stream = stream.map_err(|error| Failure::of_key(name, error))?;
        if let Some(plaintext) = short {
            let mut sealed = Vec::new();
            let input = Input::from_reader(plaintext.expose_secret());
            stream.run(input, Output::to_writer(&mut sealed), &())?;
            return destination.fill(|output| output.put(&forms::line(&sealed)));
        }
        let progress = ui.progress(input.remaining(), &destination);
        destination.fill(|output| stream.run(input, output, &progress))?;
        Ok(())
    }
}

impl Decrypt {
    pub(super) fn run(&self, global: &Global, ui: &Ui) -> Result<(), Failure> {
        let name = self.which.key.as_deref();
        let _ = name.map(key_name).transpose()?;
        let context = self.context.read()?;
        let destination = Destination::new(self.files.output.as_deref(), Content::Binary)?;
        let mut source = Source::open(self.files.file.as_deref(), self.text)?;
        let header = read_header(&mut source)?;
        let read = match header.purpose {
            Purpose::Message => Read::Message(whole_message(&header, &mut source)?),
            Purpose::Stream => Read::Stream(read_head(&header, &mut source)?),
            Purpose::WrappedKey | Purpose::Tag => return Err(Error::NotData.into()),
            other => return Err(Error::from(HeaderError::Purpose(other.number())).into()),
        };
        let mut client = connect(global, ui)?;
        let subject = Subject::new(&mut client, ui, name, &header)?;
        let key = subject.key();
        match read {
            Read::Message(ciphertext) => {
                let opened = client.decrypt(key, context.as_ref(), ciphertext.expose_secret());
                let plaintext = opened.map_err(|error| subject.refused(&mut client, error))?;
                destination.fill(|output| output.put(plaintext.expose_secret()))
            }
            Read::Stream(head) => {
                let stream = match Opening::new(&mut client, key, context.as_ref(), &head, &self.way) {
                    Ok(stream) => stream,
                    Err(error) => return Err(subject.refused(&mut client, error)),
                };
                let input = source.into_input()?;
                let progress = ui.progress(input.remaining(), &destination);
                destination.fill(|output| stream.run(input, output, &progress))?;
                Ok(())
            }
        }
    }
}

/// What is read of a ciphertext before the agent is asked.
enum Read {
    Message(SecretVec),
    Stream(Box<[u8; STREAM_HEAD_LEN]>),
}

impl Wrap {
    pub(super) fn run(&self, global: &Global, ui: &Ui) -> Result<(), Failure> {
        let name = &self.key.key;
        let key = key_name(name)?;
        let context = self.context.read()?;
        let destination = Destination::new(self.files.output.as_deref(), ciphertext(self.text))?;
        let plaintext = open_input(self.files.file.as_deref())?.rest("key", MESSAGE_MAX)?;
        if plaintext.is_empty() {
            return Err(Failure::NothingToWrap);
        }
        let mut client = connect(global, ui)?;
        let wrapped = client.wrap(key, context.as_ref(), plaintext.expose_secret());
        let wrapped = wrapped.map_err(|error| Failure::of_key(name, error))?;
        put_ciphertext(&destination, &wrapped, self.text)
    }
}

impl Unwrap {
    pub(super) fn run(&self, global: &Global, ui: &Ui) -> Result<(), Failure> {
        let name = self.which.key.as_deref();
        let _ = name.map(key_name).transpose()?;
        let context = self.context.read()?;
        let content = if self.hex { Content::Text } else { Content::Secret };
        let destination = Destination::new(self.files.output.as_deref(), content)?;
        let mut source = Source::open(self.files.file.as_deref(), self.text)?;
        let header = read_header(&mut source)?;
        match header.purpose {
            Purpose::WrappedKey => {}
            Purpose::Message | Purpose::Stream | Purpose::Tag => return Err(Failure::NotAKey),
            other => return Err(Error::from(HeaderError::Purpose(other.number())).into()),
        }
        let wrapped = whole_message(&header, &mut source)?;
        let mut client = connect(global, ui)?;
        let subject = Subject::new(&mut client, ui, name, &header)?;
        let opened = client.unwrap(subject.key(), context.as_ref(), wrapped.expose_secret());
        let plaintext = opened.map_err(|error| subject.refused(&mut client, error))?;
        match self.hex {
            true => {
                let digits = forms::secret_digits(plaintext.expose_secret());
                destination.fill(|output| output.put(digits.expose_secret()))
            }
            false => destination.fill(|output| output.put(plaintext.expose_secret())),
        }
    }
}

impl DataKey {
    pub(super) fn run(&self, global: &Global, ui: &Ui) -> Result<(), Failure> {
        let name = &self.key.key;
        let key = key_name(name)?;
        let context = self.context.read()?;
        let failed = |error| Failure::of_key(name, error);
        let (length, context) = (self.length, context.as_ref());
        if self.wrapped_only {
            let destination =
                Destination::new(self.wrapped.as_deref(), ciphertext(self.text || global.json))?;
            let wrapped = connect(global, ui)?.data_key_wrapped(key, context, length).map_err(failed)?;
            return match global.json {
                true => Ok(Ui::wrapped_data_key(name, version(&wrapped)?, &forms::encode(&wrapped))?),
                false => put_ciphertext(&destination, &wrapped, self.text),
            };
        }
        if global.json {
            let new = connect(global, ui)?.data_key(key, context, length).map_err(failed)?;
            // A name of a key has no character that JSON would escape.
            let before =
                format!("{{\"key\":\"{name}\",\"version\":{},\"plaintext\":\"", version(&new.wrapped)?);
            let behind = format!("\",\"wrapped\":\"{}\"}}\n", forms::encode(&new.wrapped));
            let text = forms::secret_text(&before, new.plaintext.expose_secret(), &behind);
            return Destination::Standard.fill(|output| output.put(text.expose_secret()));
        }
        let to = self.wrapped.as_deref().filter(|name| *name != "-").ok_or(Failure::NoPlaceForWrapped)?;
        let wrapped = Destination::new(Some(to), Content::Text)?;
        let plain = Destination::new(None, Content::Secret)?;
        let new = connect(global, ui)?.data_key(key, context, length).map_err(failed)?;
        // First, and onto the disk: a data key that is used and cannot be had again loses what it sealed.
        put_ciphertext(&wrapped, &new.wrapped, self.text)?;
        match self.hex {
            true => {
                let digits = forms::secret_digits(new.plaintext.expose_secret());
                plain.fill(|output| output.put(digits.expose_secret()))
            }
            false => plain.fill(|output| output.put(new.plaintext.expose_secret())),
        }
    }
}

impl Verify {
    pub(super) fn run(&self, global: &Global, ui: &Ui) -> Result<(), Failure> {
        let name = self.key.as_deref();
        let _ = name.map(key_name).transpose()?;
        let context = self.context.read()?;
        let mut source = Source::open(self.file.as_deref(), self.text)?;
        let header = read_header(&mut source)?;
        let read = match header.purpose {
            Purpose::Message | Purpose::WrappedKey => Read::Message(whole_message(&header, &mut source)?),
            Purpose::Stream => Read::Stream(read_head(&header, &mut source)?),
            Purpose::Tag => return Err(Failure::IsTag),
            other => return Err(Error::from(HeaderError::Purpose(other.number())).into()),
        };
        let mut client = connect(global, ui)?;
        let key = name.map_or(KeyRef::Id(*header.key_id.as_bytes()), KeyRef::Name);
        let opens = self.opens(&mut client, ui, key, context.as_ref(), &read, source);
        let description = match &opens {
            Ok(_) => None,
            // By what the ciphertext names, which need not be what the user names.
            Err(_) => client.describe(KeyRef::Id(*header.key_id.as_bytes())).ok(),
        };
        let verdict = |name: Option<String>, primary, checked| Verdict {
            key: name,
            id: header.key_id,
            version: header.key_version.value(),
            primary,
            checked,
        };
        match opens {
            Ok(verified) => {
                let all = !(self.prefix && matches!(read, Read::Stream(_)));
                Ok(ui.verdict(&verdict(Some(verified.name), Some(verified.primary), Some(all)))?)
            }
            Err(error) => {
                let known = description.map(|description| description.key);
                let name = known.as_ref().map(|key| key.name.clone());
                if is_about_the_ciphertext(&error) {
                    ui.verdict(&verdict(name.clone(), known.map(|key| key.primary), None))?;
                }
                let subject = name.unwrap_or_else(|| header.key_id.to_string());
                Err(match error.status() {
                    Some(Status::WrongKey) => error.into(),
                    _ => Subject { name: None, shown: subject, header }.refused(&mut client, error),
                })
            }
        }
    }

    fn opens(
        &self,
        client: &mut Client,
        ui: &Ui,
        key: KeyRef<'_>,
        context: ContextRef<'_>,
        read: &Read,
        source: Source,
    ) -> Result<crate::Verified, Error> {
        let head = match read {
            Read::Message(ciphertext) => return client.verify(key, context, ciphertext.expose_secret()),
            Read::Stream(head) => head,
        };
        let verified = client.verify(key, context, head.as_slice())?;
        if !self.prefix {
            let input = source.into_input()?;
            let progress = ui.progress(input.remaining(), &Destination::Standard);
            let stream = Opening::of(client, key, context, head)?;
            stream.run(input, Output::to_writer(io::sink()), &progress).map_err(|error| match error {
                // Into nothing.
                Error::Released { source } => *source,
                error => error,
            })?;
        }
        Ok(verified)
    }
}

/// Whether this says what is the matter with the ciphertext, and not with the way to the agent.
fn is_about_the_ciphertext(error: &Error) -> bool {
    match error {
        Error::InvalidCiphertext => true,
        Error::Refused { status, .. } => matches!(
            status,
            Status::InvalidCiphertext | Status::WrongKey | Status::NotFound | Status::Disabled
        ),
        _ => false,
    }
}

impl Mac {
    pub(super) fn run(&self, global: &Global, ui: &Ui) -> Result<(), Failure> {
        let name = &self.key.key;
        let key = key_name(name)?;
        let context = self.context.read()?;
        let tag = self.check.as_deref().map(tag).transpose()?;
        let digest = digest(Source::open(self.file.as_deref(), false)?)?;
        let mut client = connect(global, ui)?;
        let failed = |error| Failure::of_key(name, error);
        match tag {
            Some(tag) => {
                client.mac_verify(key, context.as_ref(), &tag, &digest).map_err(failed)?;
                Ok(ui.right_tag(name, version(&tag)?)?)
            }
            None => {
                let tag = client.mac(key, context.as_ref(), &digest).map_err(failed)?;
                Ok(ui.tag(name, version(&tag)?, &forms::encode(&tag))?)
            }
        }
    }
}

fn tag(text: &str) -> Result<[u8; INPUT_TAG_LEN], Failure> {
    let bytes = forms::decode(text.as_bytes()).ok_or(Failure::NotATag)?;
    match Header::parse(&bytes) {
        Ok(Header { purpose: Purpose::Tag, .. }) => bytes.try_into().map_err(|_| Failure::NotATag),
        _ => Err(Failure::NotATag),
    }
}

/// SHA-512 of all that is there.
fn digest(mut source: Source) -> Result<[u8; DIGEST_LEN], Failure> {
    let mut hash = Sha512::new();
    let mut piece = SecretVec::with_capacity(HASH_PIECE);
    loop {
        let piece = piece.as_mut_slice();
        match source.take(piece)? {
            0 => return Ok(hash.finalize().into()),
            got => hash.update(piece.get(..got).unwrap_or_default()),
        }
    }
}

impl Random {
    pub(super) fn run(&self, global: &Global, ui: &Ui) -> Result<(), Failure> {
        let length = self.length.get();
        let is_text = self.hex || self.text;
        if is_text && length > RANDOM_PIECE {
            return Err(Failure::LongText { max: MESSAGE_MAX });
        }
        let content = if is_text { Content::Text } else { Content::Secret };
        let destination = Destination::new(self.output.as_deref(), content)?;
        let mut client = connect(global, ui)?;
        destination.fill(|output| {
            let mut done = 0_u64;
            while done < length {
                let piece = length.saturating_sub(done).min(RANDOM_PIECE);
                let bytes = client.random(u32::try_from(piece).unwrap_or(u32::MAX))?;
                let bytes = match (self.hex, self.text) {
                    (true, _) => forms::secret_digits(bytes.expose_secret()),
                    (_, true) => forms::secret_text("", bytes.expose_secret(), "\n"),
                    _ => bytes,
                };
                output.write(done, &mut [IoSlice::new(bytes.expose_secret())])?;
                done = done.saturating_add(piece);
            }
            output.finish()
        })
    }
}

/// The key that a ciphertext is to be opened with.
struct Subject<'a> {
    name: Option<&'a str>,
    /// As the user knows it.
    shown: String,
    header: Header,
}

impl<'a> Subject<'a> {
    /// The one that the user names, else the one that the header names, and then says which that is.
    fn new(client: &mut Client, ui: &Ui, name: Option<&'a str>, header: &Header) -> Result<Self, Failure> {
        let shown = match name {
            Some(name) => name.to_owned(),
            None => named_key(client, ui, header.key_id)?,
        };
        Ok(Self { name, shown, header: *header })
    }

    fn key(&self) -> KeyRef<'a> {
        self.name.map_or(KeyRef::Id(*self.header.key_id.as_bytes()), KeyRef::Name)
    }

    fn refused(&self, client: &mut Client, error: Error) -> Failure {
        // The agent says the same of a key and of a version that it does not have.
        let is_version = error.status() == Some(Status::NotFound) && client.describe(self.key()).is_ok();
        match is_version {
            true => Failure::NoVersion { name: self.shown.clone(), version: self.header.key_version.value() },
            false => Failure::of_key(&self.shown, error),
        }
    }
}

/// Says which key a ciphertext names, by the name that the agent knows it by.
pub(super) fn named_key(client: &mut Client, ui: &Ui, id: KeyId) -> Result<String, Failure> {
    match client.describe(KeyRef::Id(*id.as_bytes())) {
        Ok(description) => {
            ui.key_used(Some(&description.key.name), id);
            Ok(description.key.name)
        }
        // To use a key and to see its name are two rights.
        Err(Error::Refused { status: Status::Denied | Status::NotFound, .. }) => {
            ui.key_used(None, id);
            Ok(id.to_string())
        }
        Err(error) => Err(error.into()),
    }
}

fn open_input(name: Option<&OsStr>) -> Result<Input<'static>, Failure> {
    Ok(Input::from_file(files::open(name)?)?)
}

/// What a ciphertext is to a terminal.
fn ciphertext(text: bool) -> Content {
    if text { Content::Text } else { Content::Binary }
}

pub(super) fn put_ciphertext(destination: &Destination, bytes: &[u8], text: bool) -> Result<(), Failure> {
    match text {
        true => destination.fill(|output| output.put(&forms::line(bytes))),
        false => destination.fill(|output| output.put(bytes)),
    }
}

/// The key version that a ciphertext or a tag names.
fn version(bytes: &[u8]) -> Result<u32, Failure> {
    Ok(Header::parse(bytes).map_err(Error::from)?.key_version.value())
}

pub(super) fn read_header(source: &mut Source) -> Result<Header, Failure> {
    let mut bytes = [0; HEADER_LEN];
    let got = source.take(&mut bytes)?;
    Ok(Header::parse(bytes.get(..got).unwrap_or_default()).map_err(Error::from)?)
}

/// The head of a stream whose header was read.
pub(super) fn read_head(header: &Header, source: &mut Source) -> Result<Box<[u8; STREAM_HEAD_LEN]>, Failure> {
    let mut bytes = Box::new([0; STREAM_HEAD_LEN]);
    let (front, rest) = bytes.split_at_mut(HEADER_LEN);
    front.copy_from_slice(&header.to_bytes());
    match source.take(rest)? {
        got if got == rest.len() => Ok(bytes),
        _ => Err(Error::InvalidCiphertext.into()),
    }
}

/// The whole of a message or wrapped key whose header was read.
pub(super) fn whole_message(header: &Header, source: &mut Source) -> Result<SecretVec, Failure> {
    source.rest(&header.to_bytes(), message_len(MESSAGE_MAX))
}
