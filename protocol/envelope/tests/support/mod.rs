//! Reads a vector of `docs/formats.md`, section 15, and says what comes of it. Shared by the test and by the generator.

#![expect(
    clippy::indexing_slicing,
    clippy::string_slice,
    clippy::unwrap_used,
    reason = "a panic is how a test fails"
)]

use std::collections::BTreeMap;

use kms_envelope::{
    Body, CHUNK_LEN, ContextError, ContextRef, DIGEST_LEN, EncryptionContext, ExpandKey, Header, HeaderError,
    KeyId, KeyVersion, MESSAGE_MAX, OpenError, Purpose, REWRAP_LEN, SALT_LEN, SEALED_CHUNK_LEN,
    STREAM_HEAD_LEN, TAG_LEN, body_plaintext_len, check_tag, make_tag, message_len, new_stream, open_message,
    open_stream, rewrap_stream, seal_message,
};
use sha2::{Digest, Sha512};

/// All fields there are, and whether they may be repeated. Anything else in a file is an error.
const FIELDS: [(&str, bool); 23] = [
    ("expect", false),
    ("why", false),
    ("operation", false),
    ("kek", false),
    ("key_id", false),
    ("version", false),
    ("context", true),
    ("context_bytes", false),
    ("context_repeat", false),
    ("salt", false),
    ("dek", false),
    ("dek_salt", false),
    ("body_salt", false),
    ("new_kek", false),
    ("new_version", false),
    ("new_dek_salt", false),
    ("plaintext", false),
    ("plaintext_repeat", false),
    ("ciphertext", false),
    ("edit", true),
    ("ciphertext_sha512", false),
    ("result", false),
    ("check_value", false),
];

/// The fields of one file.
pub(crate) struct Vector(BTreeMap<String, Vec<String>>);

pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, b| {
        write!(text, "{b:02x}").unwrap();
        text
    })
}

pub(crate) fn unhex(text: &str) -> Result<Vec<u8>, String> {
    let error = || format!("not hexadecimal: {text}");
    if !text.len().is_multiple_of(2) || !text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
        return Err(error());
    }
    (0..text.len() / 2)
        .map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).map_err(|_| error()))
        .collect()
}

pub(crate) fn sha512(bytes: &[u8]) -> String {
    hex(&Sha512::digest(bytes))
}

fn number(text: &str) -> Result<usize, String> {
    text.parse().map_err(|_| format!("not a number: {text}"))
}

/// A buffer of plaintext in the layout of [`Body::seal_chunks`].
fn strides(plaintext: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    let mut rest = plaintext;
    loop {
        let (piece, after) = rest.split_at(rest.len().min(CHUNK_LEN));
        body.extend_from_slice(piece);
        body.extend_from_slice(&[0; TAG_LEN]);
        if piece.len() < CHUNK_LEN {
            return body;
        }
        rest = after;
    }
}

fn unstride(body: &[u8]) -> Vec<u8> {
    body.chunks(SEALED_CHUNK_LEN).flat_map(|stride| &stride[..stride.len() - TAG_LEN]).copied().collect()
}

fn edit(ciphertext: &mut Vec<u8>, edit: &str, start: usize) -> Result<(), String> {
    let words: Vec<&str> = edit.split(' ').collect();
    let mut chunks: Vec<Vec<u8>> = Vec::new();
    if words[0].ends_with("-chunk") || words[0].ends_with("-chunks") {
        chunks = ciphertext[start..].chunks(SEALED_CHUNK_LEN).map(<[u8]>::to_vec).collect();
    }
    match words[..] {
        ["none"] => return Ok(()),
        ["flip", offset, mask] => ciphertext[number(offset)?] ^= unhex(mask)?[0],
        ["set", offset, bytes] => {
            let (offset, bytes) = (number(offset)?, unhex(bytes)?);
            ciphertext[offset..offset + bytes.len()].copy_from_slice(&bytes);
        }
        ["truncate", len] => ciphertext.truncate(number(len)?),
        ["append", bytes] => ciphertext.extend(unhex(bytes)?),
        ["swap-chunks", i, j] => chunks.swap(number(i)?, number(j)?),
        ["drop-chunk", i] => drop(chunks.remove(number(i)?)),
        ["copy-chunk", i, j] => chunks[number(j)?] = chunks[number(i)?].clone(),
        ["append-chunk", i] => chunks.push(chunks[number(i)?].clone()),
        _ => return Err(format!("unknown edit: {edit}")),
    }
    if !chunks.is_empty() {
        ciphertext.truncate(start);
        ciphertext.extend(chunks.concat());
    }
    Ok(())
}

impl Vector {
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let mut fields: BTreeMap<String, Vec<String>> = BTreeMap::new();
        if !text.starts_with("expect: ") {
            return Err("the first field is not expect".into());
        }
        for line in text.lines() {
            let (name, value) = line.split_once(':').ok_or_else(|| format!("not a field: {line}"))?;
            let known = FIELDS.iter().find(|(known, _)| *known == name);
            let (_, repeated) = known.ok_or_else(|| format!("unknown field {name}"))?;
            let values = fields.entry(name.to_owned()).or_default();
            if !values.is_empty() && !repeated {
                return Err(format!("field {name} is there twice"));
            }
            values.push(value.strip_prefix(' ').unwrap_or(value).to_owned());
        }
        let vector = Self(fields);
        match (vector.0.contains_key("ciphertext"), vector.0.contains_key("edit")) {
            (true, true) => return Err("both ciphertext and edit".into()),
            (false, true) if !vector.0.contains_key("ciphertext_sha512") => {
                return Err("no ciphertext_sha512".into());
            }
            _ => {}
        }
        if (vector.get("expect")? == "invalid-ciphertext") != vector.0.contains_key("why") {
            return Err("why belongs to invalid-ciphertext, and only there".into());
        }
        Ok(vector)
    }

    fn get(&self, name: &str) -> Result<&str, String> {
        self.0.get(name).and_then(|v| v.first()).map(String::as_str).ok_or_else(|| format!("no field {name}"))
    }

    fn all(&self, name: &str) -> &[String] {
        self.0.get(name).map(Vec::as_slice).unwrap_or_default()
    }

    fn bytes<const N: usize>(&self, name: &str) -> Result<[u8; N], String> {
        unhex(self.get(name)?)?.try_into().map_err(|_| format!("{name} is not {N} bytes"))
    }

    pub(crate) fn expected(&self) -> Result<&str, String> {
        self.get("expect")
    }

    fn purpose(&self) -> Result<Purpose, String> {
        match self.get("operation")? {
            "open-message" => Ok(Purpose::Message),
            "open-wrapped-key" => Ok(Purpose::WrappedKey),
            "open-stream" | "rewrap" => Ok(Purpose::Stream),
            "check-tag" => Ok(Purpose::Tag),
            other => Err(format!("unknown operation {other}")),
        }
    }

    fn version(&self, name: &str) -> Result<KeyVersion, String> {
        let value = u32::try_from(number(self.get(name)?)?).map_err(|_| "version too large")?;
        KeyVersion::new(value).ok_or_else(|| "version 0".into())
    }

    fn header(&self, version: &str) -> Result<Header, String> {
        Ok(Header {
            purpose: self.purpose()?,
            key_id: KeyId::from_bytes(self.bytes("key_id")?),
            key_version: self.version(version)?,
        })
    }

    fn context_bytes(&self) -> Result<Vec<u8>, String> {
        if let Ok(bytes) = self.get("context_bytes") {
            let mut bytes = unhex(bytes)?;
            if let Ok(repeat) = self.get("context_repeat") {
                let (piece, count) = repeat.split_once(' ').ok_or("context_repeat: HEX COUNT")?;
                bytes.extend(unhex(piece)?.repeat(number(count)?));
            }
            return Ok(bytes);
        }
        let pairs = self.all("context").iter().map(|pair| {
            let (key, value) = pair.split_once('=').ok_or("context: KEY=VALUE")?;
            Ok((unhex(key)?, unhex(value)?))
        });
        let pairs = pairs.collect::<Result<Vec<_>, String>>()?;
        let context = EncryptionContext::from_pairs(pairs).map_err(|e| e.to_string())?;
        Ok(context.as_ref().as_bytes().to_vec())
    }

    fn plaintext(&self) -> Result<Vec<u8>, String> {
        match self.get("plaintext_repeat") {
            Ok(repeat) => {
                let (byte, count) = repeat.split_once(' ').ok_or("plaintext_repeat: BYTE COUNT")?;
                Ok(unhex(byte)?.repeat(number(count)?))
            }
            Err(_) => unhex(self.get("plaintext")?),
        }
    }

    /// What stands for the input of a tag.
    fn digest(&self) -> Result<[u8; DIGEST_LEN], String> {
        Ok(Sha512::digest(self.plaintext()?).into())
    }

    /// What a writer makes of the fields.
    pub(crate) fn seal(&self) -> Result<Vec<u8>, String> {
        let kek = ExpandKey::new(&self.bytes("kek")?);
        let header = self.header("version")?;
        let context = self.context_bytes()?;
        let context = ContextRef::parse(&context).map_err(|e| e.to_string())?;
        if header.purpose == Purpose::Tag {
            let tag = make_tag(&kek, &header, context, &self.digest()?);
            return tag.map(Vec::from).map_err(|e| e.to_string());
        }
        let plaintext = self.plaintext()?;
        if header.purpose == Purpose::Stream {
            let (dek, dek_salt) = (self.bytes("dek")?, self.bytes("dek_salt")?);
            let body_salt = self.bytes("body_salt")?;
            let (head, key) =
                new_stream(&kek, &header, context, &dek, &dek_salt, &body_salt).map_err(|e| e.to_string())?;
            let mut body = strides(&plaintext);
            Body::new(key).seal_chunks(0, &mut body).map_err(|e| e.to_string())?;
            return Ok([&head[..], &body].concat());
        }
        let mut message = vec![0; message_len(plaintext.len())];
        let salt: [u8; SALT_LEN] = self.bytes("salt")?;
        seal_message(&kek, &header, context, &salt, &plaintext, &mut message).map_err(|e| e.to_string())?;
        Ok(message)
    }

    /// The ciphertext that the decoder is given.
    pub(crate) fn ciphertext(&self) -> Result<Vec<u8>, String> {
        let ciphertext = if let Ok(ciphertext) = self.get("ciphertext") {
            unhex(ciphertext)?
        } else {
            let start = if self.purpose()? == Purpose::Stream { STREAM_HEAD_LEN } else { 84 };
            let mut ciphertext = self.seal()?;
            for step in self.all("edit") {
                edit(&mut ciphertext, step, start)?;
            }
            ciphertext
        };
        if let Ok(hash) = self.get("ciphertext_sha512")
            && hash != sha512(&ciphertext)
        {
            return Err(format!("ciphertext_sha512 is {}", sha512(&ciphertext)));
        }
        Ok(ciphertext)
    }

    /// Runs the operation: the outcome of section 11, or what is wrong with the file or with the result.
    pub(crate) fn run(&self) -> Result<String, String> {
        match self.get("operation")? {
            "check-value" => {
                let value = hex(&ExpandKey::new(&self.bytes("kek")?).check_value());
                return if value == self.get("check_value")? { Ok("success".into()) } else { Err(value) };
            }
            "parse-context" => {
                return Ok(match ContextRef::parse(&self.context_bytes()?) {
                    Ok(_) => "success".into(),
                    Err(error) => context_outcome(error).into(),
                });
            }
            _ => {}
        }
        let ciphertext = self.ciphertext()?;
        let kek = ExpandKey::new(&self.bytes("kek")?);
        let context = self.context_bytes()?;
        let context = ContextRef::parse(&context).map_err(|e| e.to_string())?;
        let opened = match self.get("operation")? {
            "open-stream" => whole_stream(&kek, &ciphertext, context),
            "rewrap" => self.rewrap(&kek, &ciphertext)?,
            "check-tag" => check_tag(&kek, &ciphertext, context, &self.digest()?).map(|()| Vec::new()),
            _ => {
                let mut out = vec![0; MESSAGE_MAX];
                open_message(&kek, &ciphertext, self.purpose()?, context, &mut out).map(|len| {
                    out.truncate(len);
                    out
                })
            }
        };
        let opened = match opened {
            Ok(opened) => opened,
            Err(error) => {
                let direct = matches!(self.purpose()?, Purpose::Message | Purpose::WrappedKey);
                let longest = if direct { message_len(MESSAGE_MAX) } else { usize::MAX };
                return Ok(outcome(error, ciphertext.len() > longest).into());
            }
        };
        if self.get("operation")? == "rewrap" {
            let result = hex(&opened);
            return if result == self.get("result")? { Ok("success".into()) } else { Err(result) };
        }
        if Header::parse(&ciphertext) != Ok(self.header("version")?) {
            return Err("the header names another key or version".into());
        }
        if self.purpose()? != Purpose::Tag && opened != self.plaintext()? {
            return Err("opened to another plaintext".into());
        }
        if self.get("salt").or(self.get("dek")).is_ok() && self.seal()? != ciphertext {
            return Err("a writer gets other bytes".into());
        }
        Ok("success".into())
    }

    fn rewrap(&self, kek: &ExpandKey, ciphertext: &[u8]) -> Result<Result<Vec<u8>, OpenError>, String> {
        let new_kek = ExpandKey::new(&self.bytes("new_kek")?);
        let new_header = self.header("new_version")?;
        let salt = self.bytes("new_dek_salt")?;
        Ok(checked_head::<REWRAP_LEN>(ciphertext).and_then(|(prefix, rest)| {
            let prefix = rewrap_stream(kek, prefix, &new_kek, &new_header, &salt)?;
            Ok([&prefix[..], rest].concat())
        }))
    }
}

/// Header and purpose come before the length of the head.
fn checked_head<const N: usize>(stream: &[u8]) -> Result<(&[u8; N], &[u8]), OpenError> {
    if Header::parse(stream)?.purpose != Purpose::Stream {
        return Err(OpenError::Purpose);
    }
    stream.split_first_chunk::<N>().ok_or(OpenError::Length)
}

fn whole_stream(kek: &ExpandKey, stream: &[u8], context: ContextRef<'_>) -> Result<Vec<u8>, OpenError> {
    let (head, body) = checked_head::<STREAM_HEAD_LEN>(stream)?;
    body_plaintext_len(body.len() as u64).ok_or(OpenError::Length)?;
    let key = open_stream(kek, head, context)?;
    let mut body = body.to_vec();
    Body::new(key).open_chunks(0, &mut body)?;
    Ok(unstride(&body))
}

fn outcome(error: OpenError, too_large: bool) -> &'static str {
    match error {
        OpenError::Header(HeaderError::Truncated) => "malformed: header length",
        OpenError::Header(HeaderError::NotOurs) => "malformed: magic",
        OpenError::Header(HeaderError::Format(_)) => "unsupported: format",
        OpenError::Header(HeaderError::Suite(_)) => "unsupported: suite",
        OpenError::Header(HeaderError::Purpose(_)) => "unsupported: purpose",
        OpenError::Header(HeaderError::Flags(_)) => "unsupported: flags",
        OpenError::Header(HeaderError::Version) => "malformed: key version",
        OpenError::Purpose => "malformed: purpose",
        OpenError::Length if too_large => "too-large",
        OpenError::Length | OpenError::Invalid => "invalid-ciphertext",
    }
}

fn context_outcome(error: ContextError) -> &'static str {
    match error {
        ContextError::Truncated => "malformed: context truncated",
        ContextError::TrailingBytes => "malformed: context trailing bytes",
        ContextError::NotSorted => "malformed: context not sorted",
        ContextError::DuplicateKey => "malformed: context duplicate key",
        ContextError::EmptyKey => "malformed: context empty key",
        ContextError::TooManyPairs => "malformed: context too many pairs",
        ContextError::TooLong => "malformed: context too long",
    }
}
