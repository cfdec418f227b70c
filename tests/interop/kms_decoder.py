"""What the frames and the ciphertexts of kms-agent say, written from docs/protocol.md and docs/formats.md.

    kms_decoder.py request FILE             a frame that a client sent
    kms_decoder.py reply OPCODE FILE        a frame that an agent sent, to a request of that name
    kms_decoder.py ciphertext FILE          a message, wrapped key, stream (or its head), or tag

FILE is binary, `-` is standard input. Payloads that may be secret are counted, not shown; --hex shows them all.

As a module it opens ciphertexts, too, where the package `cryptography` is there (AES-GCM is all that is taken from it).
"Section" means one of docs/protocol.md, "formats" means docs/formats.md.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import struct
import sys
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import kms_client as kms
from kms_client import CHUNK, HEAD, SEALED_CHUNK, STATUSES, TAG, FrameError, Head, Op

try:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
except ImportError:
    AESGCM = None


# ------------------------------------------------------------------------------------------------------------------- frames

KEY_NAME = re.compile(r"[A-Za-z0-9._][A-Za-z0-9._/-]{0,254}")            # section 4.1
CONSTRAINT_NAMES = {number: name for name, number in kms.CONSTRAINT_KINDS.items()}


class Message(NamedTuple):
    """A decoded frame. `op` is None for a reply whose request is not known; `status` is None for a request."""

    op: Op
    head: Head
    status: int | None
    kind: kms.Struct
    fields: SimpleNamespace
    payload: bytes

    def encode(self) -> bytes:
        return kms.encode_frame(self.head.code, self.head.request_id, self.kind.write(self.fields), self.payload)

    def rows(self) -> list[tuple[str, str]]:
        """Path and text of every value, as the vectors of section 12 have them."""
        return [row for name, kind in self.kind.fields.items() for row in flatten(kind, getattr(self.fields, name), name)]


def whole_frame(data: bytes, frame_max: int) -> tuple[Head, bytes]:
    frame = kms.split_frame(data, frame_max)
    if frame is None:
        raise FrameError("incomplete")
    if len(data) > HEAD.size + frame[0].length:
        raise FrameError("more than one frame")
    return frame


def decode_request(data: bytes, frame_max: int = kms.FRAME_MAX) -> Message:
    """One whole request, in the order of sections 2.1 and 3: the head, the opcode, the fields, the payload."""
    head, body = whole_frame(data, frame_max)
    op = kms.OPS_BY_CODE.get(head.code)
    if op is None:
        raise FrameError("unsupported: opcode")
    return Message(op, head, None, op.request, *kms.decode_body(op.request, op.request_payload, head, body))


def decode_reply(op: Op, data: bytes, frame_max: int = kms.FRAME_MAX) -> Message:
    """One whole reply to a request of `op`; a refusal is decoded like any other."""
    head, body = whole_frame(data, frame_max)
    if head.code not in STATUSES:
        raise FrameError("malformed: status")
    kind, payload = (kms.REFUSAL, False) if head.code else (op.reply, op.reply_payload)
    return Message(op, head, head.code, kind, *kms.decode_body(kind, payload, head, body))


def batch_frames(payload: bytes) -> list[bytes]:
    """The frames of a batch or of the reply to one (section 4.34); raises `FrameError` where one is cut short or has a bad head."""
    frames = []
    while payload:
        frame = kms.split_frame(payload)
        if frame is None:
            raise FrameError("incomplete")
        frames.append(payload[:HEAD.size + frame[0].length])
        payload = payload[len(frames[-1]):]
    return frames


def broken_rules(message: Message, kinds: Iterable[int] = tuple(CONSTRAINT_NAMES)) -> str | None:
    """What section 4 does not allow though it decodes, as far as a frame alone shows it (the last rows of section 12)."""
    if message.op.name == "batch":
        try:
            items = len(batch_frames(message.payload))
        except FrameError:
            return "malformed: batch"
        if message.status is None:
            return "malformed: batch" if not items else "too-large: batch" if items > kms.BATCH_ITEMS_MAX else None
    fields = vars(message.fields)
    refs = [fields.get("key"), fields.get("to")] if message.status is None else []
    names = [ref[1] for ref in refs if ref and ref[0] == "name"]
    if message.status is None and "name" in fields:
        names.append(fields["name"])
    if any(not KEY_NAME.fullmatch(name) for name in names):
        return "malformed: key name"
    if message.status is None and any(row.kind not in kinds for row in fields.get("constraints", ())):
        return "unsupported: constraint"
    return None


def flatten(kind: Any, value: Any, path: str) -> Iterator[tuple[str, str]]:
    match kind:
        case kms.Struct():
            for name, inner in kind.fields.items():
                yield from flatten(inner, getattr(value, name), f"{path}.{name}")
        case kms.Vector():
            yield path, f"{len(value)} elements"
            for index, element in enumerate(value):
                yield from flatten(kind.element, element, f"{path}[{index}]")
        case kms.Option():
            yield path, "none" if value is None else "some"
            if value is not None:
                yield from flatten(kind.content, value, path + ".some")
        case kms.Enum():
            variant, content = value
            yield path, variant
            if inner := dict(kind.variants)[variant]:
                yield from flatten(inner, content, f"{path}.{variant}")
        case kms.Bool():
            yield path, "true" if value else "false"
        case kms.String():
            yield path, '"' + "".join(c if c.isprintable() else ascii(c)[1:-1] for c in value) + '"'
        case kms.Bytes() | kms.Fixed():
            yield path, value.hex() or "empty"
        case _:
            yield path, str(value)


def frame_text(message: Message, show_payload: bool = False) -> str:
    """A frame as a person reads it."""
    head, op = message.head, message.op
    what = f"request {op.name} (0x{op.code:04x})"
    if message.status is not None:
        name, text = STATUSES[message.status][:2]
        what = f"reply to {op.name}: {name}" + (f" ({text})" if text else "")
    lines = [what, f"  request id {head.request_id}, {head.length} bytes: {head.fields_length} of fields, {len(message.payload)} of payload"]
    for path, text in message.rows():
        lines.append(f"  {path} = {text}{_remark(path, text)}")
    if message.payload:
        lines += [f"  payload: {len(message.payload)} bytes"] + ["    " + line for line in _payload_lines(message)]
        if show_payload:
            lines.append("    " + message.payload.hex())
    if broken := broken_rules(message):
        lines.append(f"  ! {broken}")
    return "\n".join(lines)


def _remark(path: str, text: str) -> str:
    if path == "context":
        try:
            pairs = parse_context(b"" if text == "empty" else bytes.fromhex(text))
            return "  " + (", ".join(f"{key!r} = {value!r}" for key, value in pairs) or "no pairs")
        except CipherError as error:
            return f"  ! {error}"
    if path.startswith("opcodes[") or path.endswith(".opcode"):
        op = kms.OPS_BY_CODE.get(int(text))
        return f"  {op.name}" if op else ""
    if path.startswith("constraints["):
        return f"  {CONSTRAINT_NAMES.get(int(text), '?')}" if not path.endswith(".value") else ""
    if path.endswith(".status"):
        return f"  {STATUSES[int(text)][0]}" if int(text) in STATUSES else ""
    return ""


def _payload_lines(message: Message) -> list[str]:
    """The ciphertext in a payload, or the frames in a batch."""
    payload = message.payload
    if message.op.name == "batch":
        lines = []
        try:
            frames = batch_frames(payload)
        except FrameError as error:
            return [f"! {error}"]
        for frame in frames:
            head = Head(*HEAD.unpack_from(frame))
            try:
                if message.status is None:
                    lines += frame_text(decode_request(frame)).split("\n")
                else:                                                # of which operation each is, only the request says
                    lines.append(f"reply to item {head.request_id}: {STATUSES.get(head.code, ('?',))[0]}, {head.length} bytes")
            except FrameError as error:
                lines.append(f"item {head.request_id}: ! {error}")
        return lines
    at = max(payload.find(MAGIC), 0) if message.op.name == "datakey" else 0
    return ciphertext_text(payload[at:]).split("\n") if payload[at:].startswith(MAGIC) else []


# -------------------------------------------------------------------------------------------------------------- ciphertexts

MAGIC = bytes.fromhex("926b1c")
MESSAGE, WRAPPED_KEY, STREAM, TAG_OF_INPUT = 1, 2, 3, 5
PURPOSES = {1: "message", 2: "wrapped key", 3: "stream", 4: "message under a shared data key", 5: "tag of an input"}
MESSAGE_MAX, MESSAGE_LONGEST = 65_536, 65_700
CHUNKS_MAX = 2**38


class CipherError(Exception):
    """Not a ciphertext, or not one that opens. `outcome` is that of formats 11."""

    def __init__(self, outcome: str = "invalid-ciphertext"):
        super().__init__(outcome)
        self.outcome = outcome


class Header(NamedTuple):
    purpose: int
    key_id: bytes
    version: int

    def encode(self) -> bytes:
        return MAGIC + bytes((1, 1, self.purpose, 0, 0)) + self.key_id + struct.pack(">I", self.version)


def parse_header(data: bytes, takes: Iterable[int] = tuple(PURPOSES)) -> Header:
    """formats 4 and 12, steps 1 and 2."""
    if len(data) < 28:
        raise CipherError("malformed: header length")
    magic, form, suite, purpose, flags, key_id, version = struct.unpack(">3sBBBH16sI", data[:28])
    for wrong, outcome in ((magic != MAGIC, "malformed: magic"), (form != 1, "unsupported: format"), (suite != 1, "unsupported: suite"),
                           (purpose not in PURPOSES, "unsupported: purpose"), (flags, "unsupported: flags"),
                           (version == 0, "malformed: key version"), (purpose not in takes, "malformed: purpose")):
        if wrong:
            raise CipherError(outcome)
    return Header(purpose, key_id, version)


def parse_context(data: bytes) -> list[tuple[bytes, bytes]]:
    """formats 5: canonical bytes, neither sorted nor repaired."""
    if len(data) > 8_192:
        raise CipherError("malformed: context too long")
    at, pairs = 0, []

    def part(size: int) -> bytes:
        nonlocal at
        if size > len(data) - at:
            raise CipherError("malformed: context truncated")
        at += size
        return data[at - size:at]

    def number() -> int:
        return struct.unpack(">I", part(4))[0]

    count = number()
    if count > 64:
        raise CipherError("malformed: context too many pairs")
    for _ in range(count):
        pair = part(number()), part(number())
        if not pair[0]:
            raise CipherError("malformed: context empty key")
        if pairs and pair[0] <= pairs[-1][0]:
            raise CipherError(f"malformed: context {'duplicate key' if pair[0] == pairs[-1][0] else 'not sorted'}")
        pairs.append(pair)
    if at < len(data):
        raise CipherError("malformed: context trailing bytes")
    return pairs


def plaintext_length(chunks: int) -> int:
    """formats 6.5, from the number of bytes of the chunks."""
    whole, rest = divmod(chunks, SEALED_CHUNK)
    if rest < TAG or whole >= CHUNKS_MAX:
        raise CipherError
    return CHUNK * whole + rest - TAG


def ciphertext_text(data: bytes) -> str:
    """What everybody can see of a ciphertext."""
    try:
        header = parse_header(data)
    except CipherError as error:
        return f"! {error}"
    lines = [f"{PURPOSES[header.purpose]}, {len(data)} bytes", f"  key id {header.key_id.hex()}, version {header.version}"]
    first = {MESSAGE: 84, WRAPPED_KEY: 84, STREAM: 188}.get(header.purpose)
    if header.purpose == TAG_OF_INPUT:
        lines.append(f"  tag {data[28:60].hex()}" if len(data) == 60 else "  ! not 60 bytes long")
    elif header.purpose == STREAM and len(data) in (132, 188):
        lines.append(f"  {'header and wrapped data key' if len(data) == 132 else 'head'} alone")
    elif first:
        try:
            if header.purpose != STREAM and len(data) > MESSAGE_LONGEST:
                raise CipherError("too-large")
            if len(data) < first:
                raise CipherError
            size = plaintext_length(len(data) - first)
            lines.append(f"  {(len(data) - first) // SEALED_CHUNK + 1} chunks, {size} bytes of plaintext")
        except CipherError as error:
            lines.append(f"  ! {error}")
    if header.purpose != TAG_OF_INPUT:
        for name, begin, end in (("salt", 28, 52), ("commitment", 52, 84)) + (
                (("wrapped data key", 84, 132), ("body salt", 132, 156), ("body commitment", 156, 188)) if header.purpose == STREAM else ()):
            if len(data) >= end:
                lines.append(f"  {name} {data[begin:end].hex()}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------- suite 1, formats 6 to 9

def hkdf_expand(key: bytes, info: bytes, size: int) -> bytes:
    okm = block = b""
    for number in range(1, -(-size // 64) + 1):
        block = hmac.digest(key, block + info + bytes((number,)), "sha512")
        okm += block
    return okm[:size]


def check_value(kek: bytes) -> bytes:
    return hkdf_expand(kek, b"kms-agent/v1/check\0", 8)


class Body(NamedTuple):
    """What formats 6.2 derives: message key, base nonce, commitment."""

    key: bytes
    base_nonce: bytes
    commitment: bytes = b""

    @classmethod
    def derive(cls, input_key: bytes, salt: bytes, context_string: bytes) -> "Body":
        okm = hkdf_expand(input_key, b"c2sp.org/chunked-encryption@v1+AEAD_AES_256_GCM\0" + salt + context_string, 76)
        return cls(okm[:32], okm[32:44], okm[44:])

    @classmethod
    def committed(cls, input_key: bytes, salt: bytes, commitment: bytes, context_string: bytes) -> "Body":
        body = cls.derive(input_key, salt, context_string)
        if not hmac.compare_digest(body.commitment, commitment):
            raise CipherError
        return body

    def nonce(self, number: int) -> bytes:
        return (int.from_bytes(self.base_nonce, "big") ^ number).to_bytes(12, "big")

    def seal(self, plaintext: bytes) -> bytes:
        """All chunks of a plaintext, from number 0 to the final one (formats 6.3)."""
        gcm = _gcm(self.key)
        return b"".join(gcm.encrypt(self.nonce(number), plaintext[CHUNK * number:CHUNK * (number + 1)], None)
                        for number in range(len(plaintext) // CHUNK + 1))

    def open(self, chunks: bytes) -> bytes:
        """All chunks; the length is checked first, so that the last one is a final one and nothing stands behind it."""
        plaintext_length(len(chunks))
        gcm = _gcm(self.key)
        try:
            return b"".join(gcm.decrypt(self.nonce(number), chunks[SEALED_CHUNK * number:SEALED_CHUNK * (number + 1)], None)
                            for number in range(len(chunks) // SEALED_CHUNK + 1))
        except InvalidTag:
            raise CipherError from None


def _gcm(key: bytes):
    if AESGCM is None:
        raise RuntimeError("the package `cryptography` is needed to open or seal")
    return AESGCM(key)


def _message_string(header: bytes, context: bytes) -> bytes:
    return b"kms-agent/v1\0" + header + context


def _dek_string(header: bytes) -> bytes:
    return b"kms-agent/v1/dek\0" + header


def _body_string(context: bytes) -> bytes:
    return b"kms-agent/v1/body\0\3" + context


def seal_message(kek: bytes, header: Header, context: bytes, salt: bytes, plaintext: bytes) -> bytes:
    """formats 7. For tests: a writer takes a fresh salt."""
    body = Body.derive(kek, salt, _message_string(header.encode(), context))
    return header.encode() + salt + body.commitment + body.seal(plaintext)


def open_message(kek: bytes, data: bytes, context: bytes, purpose: int = MESSAGE) -> bytes:
    """formats 7 and 12."""
    parse_header(data, (purpose,))
    if len(data) > MESSAGE_LONGEST:
        raise CipherError("too-large")
    if len(data) < 84:
        raise CipherError
    plaintext_length(len(data) - 84)
    parse_context(context)
    return Body.committed(kek, data[28:52], data[52:84], _message_string(data[:28], context)).open(data[84:])


def _wrap_dek(kek: bytes, header: Header, salt: bytes, dek: bytes) -> bytes:
    body = Body.derive(kek, salt, _dek_string(header.encode()))
    return header.encode() + salt + body.commitment + body.seal(dek)


def _unwrap_dek(kek: bytes, data: bytes) -> bytes:
    return Body.committed(kek, data[28:52], data[52:84], _dek_string(data[:28])).open(data[84:132])


def seal_stream(kek: bytes, header: Header, context: bytes, dek: bytes, dek_salt: bytes, body_salt: bytes, plaintext: bytes) -> bytes:
    """formats 8. For tests."""
    body = Body.derive(dek, body_salt, _body_string(context))
    return _wrap_dek(kek, header, dek_salt, dek) + body_salt + body.commitment + body.seal(plaintext)


def stream_body(kek: bytes, head: bytes, context: bytes) -> Body:
    """formats 8.3: message key and base nonce, once both commitments and the tag of the wrapped data key are right."""
    parse_header(head, (STREAM,))
    if len(head) != 188:
        raise CipherError
    parse_context(context)
    return Body.committed(_unwrap_dek(kek, head), head[132:156], head[156:188], _body_string(context))


def open_stream(kek: bytes, data: bytes, context: bytes) -> bytes:
    """formats 8, of a stream that is in memory."""
    return stream_body(kek, data[:188], context).open(data[188:])


def rewrap_stream(kek: bytes, data: bytes, new_kek: bytes, new_header: Header, new_salt: bytes) -> bytes:
    """formats 8.4."""
    parse_header(data, (STREAM,))
    if len(data) < 132:
        raise CipherError
    return _wrap_dek(new_kek, new_header, new_salt, _unwrap_dek(kek, data)) + data[132:]


def make_tag(kek: bytes, header: Header, context: bytes, digest: bytes) -> bytes:
    """formats 9.1; `digest` is the SHA-512 of the input."""
    return header.encode() + hkdf_expand(kek, b"kms-agent/v1/mac\0" + header.encode() + context + digest, 32)


def check_tag(kek: bytes, tag: bytes, context: bytes, digest: bytes) -> None:
    header = parse_header(tag, (TAG_OF_INPUT,))
    if len(tag) != 60:
        raise CipherError
    parse_context(context)
    if not hmac.compare_digest(make_tag(kek, header, context, digest), tag):
        raise CipherError


def sha512(data: bytes) -> bytes:
    return hashlib.sha512(data).digest()


def main(arguments: list[str]) -> int:
    show = "--hex" in arguments
    arguments = [argument for argument in arguments if argument != "--hex"]
    if len(arguments) != {"request": 2, "reply": 3, "ciphertext": 2}.get(arguments[0] if arguments else ""):
        print(__doc__, file=sys.stderr)
        return 2
    file = arguments[-1]
    data = sys.stdin.buffer.read() if file == "-" else open(file, "rb").read()
    try:
        if arguments[0] == "ciphertext":
            print(ciphertext_text(data))
        else:
            message = decode_request(data) if arguments[0] == "request" else decode_reply(kms.OPS[arguments[1]], data)
            print(frame_text(message, show))
    except (FrameError, KeyError) as error:
        print(f"! {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
