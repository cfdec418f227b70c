"""A client of kms-agent, written from docs/protocol.md (version 1 of the protocol) with the standard library alone.

    with Client.connect() as kms:                       # section 1.1 finds the socket, section 8 checks who answers
        kms.add("backup", constraints={"memory-only": 0})
        box = kms.encrypt("backup", b"attack at dawn", {"table": "accounts"})
        assert kms.decrypt("backup", box, {"table": "accounts"}) == b"attack at dawn"

A key is named by a `str` (its name), 16 `bytes` (its id) or an `int` (its number from `bind`). An encryption context is a mapping,
or `bytes` in canonical form. What the agent refuses is raised as `Refused`; everything else that goes wrong is another `KmsError`.
Python cannot wipe what it has read: a program that must wipe secrets has to be written in another language.

"Section" means one of docs/protocol.md, "formats" means docs/formats.md. A `Client` belongs to one thread.
"""

from __future__ import annotations

import os
import select
import socket
import stat
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, BinaryIO, NamedTuple

VERSION = 1
HEAD = struct.Struct("<IBBHII")                 # section 2.1: length, version, flags, code, request id, fields length
FRAME_MAX = 1_048_576                           # section 2.2: no frame is ever longer, head included
FRAME_MAX_LEAST = 131_072                       # section 2.2: no agent takes less
BATCH_ITEMS_MAX = 4_096                         # section 4.34
CHUNK, SEALED_CHUNK, TAG = 16_384, 16_400, 16   # formats 6.3
STREAM_HEAD, REWRAP_HEAD = 188, 132             # formats 8; section 4.29


# ---------------------------------------------------------------------------------------------------------------- errors

class KmsError(Exception):
    """Anything that goes wrong between this client and an agent."""

    exit_code = 1


class NoAgent(KmsError):
    """There is no socket, or nobody listens on it."""


class Untrusted(KmsError):
    """Whoever serves the socket is nobody to hand a secret to (section 8)."""


class ConnectionLost(KmsError):
    """The connection ended; whether the requests under way were carried out is not known (section 1)."""


class FrameError(KmsError):
    """A frame that is not one. `outcome` is what section 12 calls it, as in `malformed: fields: bool`."""

    def __init__(self, outcome: str):
        super().__init__(outcome)
        self.outcome = outcome


# Section 3: number -> name, message, exit code. The hints there are for users of kmsctl.
STATUSES = {
    0: ("ok", "", 0),
    1: ("malformed", "the request or the ciphertext does not have the form that it must have", 1),
    2: ("unsupported", "the agent does not have what was asked for", 1),
    3: ("too-large", "beyond a size limit of the agent", 1),
    4: ("denied", "not permitted", 1),
    5: ("locked", "the agent is locked", 3),
    6: ("not-found", "there is no such key", 1),
    7: ("exists", "the name is taken", 1),
    8: ("wrong-key", "the ciphertext was made under another key", 1),
    9: ("disabled", "the version of the key that the ciphertext names cannot be used", 1),
    10: ("invalid-ciphertext", "wrong encryption context, or truncated or changed ciphertext", 1),
    11: ("limit", "a limit of the agent is reached", 1),
    12: ("declined", "this use needs a person's yes, and there was none", 1),
    13: ("busy", "the agent is busy", 75),
    14: ("audit-unavailable", "the agent cannot write its audit log", 75),
    15: ("store-unavailable", "the agent cannot read or write its keystore", 75),
    16: ("internal", "a fault of the agent or of its machine", 1),
}


class Refused(KmsError):
    """The agent said no: `name`, `message` and `exit_code` of section 3, `retry_after_ms` of section 5.2."""

    def __init__(self, status: int, retry_after_ms: int = 0):
        self.status, self.retry_after_ms = status, retry_after_ms
        self.name, self.message, self.exit_code = STATUSES[status]
        super().__init__(f"{self.name}: {self.message}")


# ----------------------------------------------------------------------------------------------- codec of fields, section 2.3

class Reader:
    """The fields of one message, taken from the front; every failure is one that section 12 names."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, count: int) -> bytes:
        if count > self.left():
            raise FrameError("malformed: fields: truncated")
        self.at += count
        return self.data[self.at - count:self.at]

    def uint(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def length(self) -> int:
        """A number of bytes or elements; checked against what is left before anything is made of it."""
        count = self.uint(8)
        if count > self.left():
            raise FrameError("malformed: fields: length")
        return count


class UInt:
    def __init__(self, size: int):
        self.size = size

    def write(self, value: int) -> bytes:
        return value.to_bytes(self.size, "little")

    def read(self, reader: Reader) -> int:
        return reader.uint(self.size)


class Bool:
    error = "malformed: fields: bool"

    def write(self, value: bool) -> bytes:
        return b"\1" if value else b"\0"

    def read(self, reader: Reader) -> bool:
        byte = reader.uint(1)
        if byte > 1:
            raise FrameError(self.error)
        return byte == 1


class OptionTag(Bool):
    error = "malformed: fields: option tag"


class Fixed:
    def __init__(self, size: int):
        self.size = size

    def write(self, value: bytes) -> bytes:
        if len(value) != self.size:
            raise ValueError(f"{len(value)} bytes where {self.size} belong")
        return bytes(value)

    def read(self, reader: Reader) -> bytes:
        return reader.take(self.size)


class Bytes:
    def write(self, value: bytes) -> bytes:
        return len(value).to_bytes(8, "little") + value

    def read(self, reader: Reader) -> bytes:
        return reader.take(reader.length())


class String(Bytes):
    def write(self, value: str) -> bytes:
        return super().write(value.encode())

    def read(self, reader: Reader) -> str:
        try:
            return super().read(reader).decode()
        except UnicodeDecodeError:
            raise FrameError("malformed: fields: utf-8") from None


class Vector:
    def __init__(self, element):
        self.element = element

    def write(self, value: list) -> bytes:
        return len(value).to_bytes(8, "little") + b"".join(map(self.element.write, value))

    def read(self, reader: Reader) -> list:
        return [self.element.read(reader) for _ in range(reader.length())]


class Option:
    tag = OptionTag()

    def __init__(self, content):
        self.content = content

    def write(self, value) -> bytes:
        return b"\0" if value is None else b"\1" + self.content.write(value)

    def read(self, reader: Reader):
        return self.content.read(reader) if self.tag.read(reader) else None


class Struct:
    """A structure; its value has its fields as attributes."""

    def __init__(self, **fields):
        self.fields = fields

    def write(self, value: SimpleNamespace) -> bytes:
        values = vars(value)
        if values.keys() != self.fields.keys():
            raise TypeError(f"fields {sorted(values)} where {sorted(self.fields)} belong")
        return b"".join(kind.write(values[name]) for name, kind in self.fields.items())

    def read(self, reader: Reader) -> SimpleNamespace:
        return SimpleNamespace(**{name: kind.read(reader) for name, kind in self.fields.items()})


class Enum:
    """An enumeration; its value is the pair (variant, content), where content is None for a variant without any."""

    def __init__(self, *variants: tuple[str, Any]):
        self.variants = variants

    def write(self, value: tuple[str, Any]) -> bytes:
        for tag, (name, kind) in enumerate(self.variants):
            if name == value[0]:
                return tag.to_bytes(4, "little") + (kind.write(value[1]) if kind else b"")
        raise ValueError(f"no variant {value[0]}")

    def read(self, reader: Reader) -> tuple[str, Any]:
        tag = reader.uint(4)
        if tag >= len(self.variants):
            raise FrameError("malformed: fields: enumeration tag")
        name, kind = self.variants[tag]
        return name, kind.read(reader) if kind else None


# ------------------------------------------------------------------------------------------------- messages, sections 4 and 5

U16, U32, U64 = UInt(2), UInt(4), UInt(8)
ID = TOKEN = Fixed(16)
CHECK = Fixed(8)
KEY_REF = Enum(("name", String()), ("id", ID), ("bound", U32))
# Section 4.2, KeyState. The agent of this release sends the first alone.
KEY_STATE = Enum(("enabled", None), ("staged", None), ("disabled", None), ("removed", None), ("destroyed", None))
LOCK_STATE = Enum(("unlocked", None), ("locked", None))
MATERIAL = Enum(("generate", None), ("import", None))
CONSTRAINT = Struct(kind=U32, value=U64)
CONSTRAINT_KINDS = {"memory-only": 1, "lifetime": 2, "confirm": 3, "max-uses": 4, "exportable": 5}
KEY_AND_CONTEXT = Struct(key=KEY_REF, context=Bytes())
KEY_ROW = Struct(name=String(), id=ID, memory_only=Bool(), state=KEY_STATE, primary=U32, minimum=U32, versions=U32,
                 check_value=CHECK, created=U64, expires_in=Option(U64), uses=U64)
VERSION_ROW = Struct(version=U32, state=KEY_STATE, check_value=CHECK, created=U64, uses=U64)
REFUSAL = Struct(retry_after_ms=U32)
NOTHING = Struct()
CHANGED = Struct(changed=Bool())
KEY_ID = Struct(id=ID)
STREAM = Struct(stream=U32)
DATAKEY = Struct(key=KEY_REF, context=Bytes(), length=U32)
WELCOME = Struct(version=U16, frame_max=U32, message_max=U32, context_max=U32, context_pairs_max=U32, in_flight_max=U32,
                 page_rows_max=U32, remote_streams_max=U32, opcodes=Vector(U16), constraints=Vector(U32), features=U64)


class Op(NamedTuple):
    """What section 4 says of one opcode: the fields, and whether a payload belongs behind them."""

    code: int
    name: str
    request: Struct = NOTHING
    request_payload: bool = False
    reply: Struct = NOTHING
    reply_payload: bool = False


OPS = {op.name: op for op in (
    Op(0x0001, "hello", Struct(version=U16), False, WELCOME),
    Op(0x0002, "ping"),
    Op(0x0003, "status", reply=Struct(state=LOCK_STATE, facts=Vector(Struct(name=String(), value=String())))),
    Op(0x0004, "lock", NOTHING, True, CHANGED),
    Op(0x0005, "unlock", NOTHING, True, CHANGED),
    Op(0x0010, "add", Struct(token=TOKEN, name=String(), material=MATERIAL, if_missing=Bool(), constraints=Vector(CONSTRAINT)),
       True, Struct(id=ID, version=U32, check_value=CHECK, created=Bool())),
    Op(0x0011, "list", Struct(cursor=U64), False, Struct(keys=Vector(KEY_ROW), next=U64)),
    Op(0x0012, "describe", Struct(key=KEY_REF, versions_after=U32), False,
       Struct(key=KEY_ROW, versions=Vector(VERSION_ROW), more=Bool(), constraints=Vector(CONSTRAINT))),
    Op(0x0013, "remove", Struct(token=TOKEN, key=KEY_REF), False, KEY_ID),
    Op(0x0014, "rotate", Struct(token=TOKEN, key=KEY_REF), False, Struct(id=ID, version=U32, check_value=CHECK)),
    Op(0x001B, "rename", Struct(token=TOKEN, key=KEY_REF, name=String()), False, KEY_ID),
    Op(0x001D, "export", Struct(key=KEY_REF, version=U32), True, Struct(id=ID, version=U32), True),
    Op(0x001E, "remove-all", Struct(token=TOKEN), False, Struct(keys=U64)),
    Op(0x0020, "encrypt", KEY_AND_CONTEXT, True, NOTHING, True),
    Op(0x0021, "decrypt", KEY_AND_CONTEXT, True, NOTHING, True),
    Op(0x0022, "stream-new", KEY_AND_CONTEXT, False, NOTHING, True),
    Op(0x0023, "stream-open", KEY_AND_CONTEXT, True, NOTHING, True),
    Op(0x0024, "remote-stream-new", KEY_AND_CONTEXT, False, STREAM, True),
    Op(0x0025, "remote-stream-open", KEY_AND_CONTEXT, True, STREAM),
    Op(0x0026, "remote-stream-encrypt", STREAM, True, NOTHING, True),
    Op(0x0027, "remote-stream-decrypt", Struct(stream=U32, first=U64), True, NOTHING, True),
    Op(0x0028, "remote-stream-close", STREAM),
    Op(0x0029, "wrap", KEY_AND_CONTEXT, True, NOTHING, True),
    Op(0x002A, "unwrap", KEY_AND_CONTEXT, True, NOTHING, True),
    Op(0x002B, "datakey", DATAKEY, False, NOTHING, True),
    Op(0x002C, "datakey-wrapped", DATAKEY, False, NOTHING, True),
    Op(0x002D, "rewrap", Struct(key=KEY_REF, context=Bytes(), to=Option(KEY_REF)), True,
       Struct(changed=Bool(), id=ID, version=U32), True),
    Op(0x002E, "verify", KEY_AND_CONTEXT, True, Struct(id=ID, name=String(), version=U32, primary=U32)),
    Op(0x002F, "mac", KEY_AND_CONTEXT, True, NOTHING, True),
    Op(0x0030, "random", Struct(length=U32), False, NOTHING, True),
    Op(0x0031, "bind", Struct(number=U32, key=KEY_REF), False, KEY_ID),
    Op(0x0032, "batch", NOTHING, True, NOTHING, True),
    Op(0x0033, "mac-verify", KEY_AND_CONTEXT, True),
    Op(0x0050, "stats", reply=Struct(uptime_ms=U64, operations=Vector(Struct(opcode=U16, status=U16, count=U64)),
                                     values=Vector(Struct(name=String(), value=U64)))),
)}
OPS_BY_CODE = {op.code: op for op in OPS.values()}
BATCHABLE = frozenset("encrypt decrypt stream-new stream-open wrap unwrap datakey datakey-wrapped rewrap verify mac mac-verify "
                      "random".split())
# Section 7: any refusal ends the stream, so sending such a request again after `busy` is of no use.
ON_STREAM = frozenset(("remote-stream-encrypt", "remote-stream-decrypt", "remote-stream-close"))


# ---------------------------------------------------------------------------------------------------------- frames, section 2

class Head(NamedTuple):
    length: int
    version: int
    flags: int
    code: int
    request_id: int
    fields_length: int


def encode_frame(code: int, request_id: int, fields: bytes, payload: bytes = b"") -> bytes:
    return HEAD.pack(len(fields) + len(payload), VERSION, 0, code, request_id, len(fields)) + fields + payload


def split_frame(buffer: bytes | bytearray, frame_max: int = FRAME_MAX) -> tuple[Head, bytes] | None:
    """The head and the body of the first frame, None where it is not whole yet. Checks in the order of section 2.1."""
    if len(buffer) < HEAD.size:
        return None
    head = Head(*HEAD.unpack_from(buffer))
    if head.version != VERSION:
        raise FrameError("unsupported: frame version")
    if head.flags:
        raise FrameError("malformed: frame flags")
    if head.length > frame_max - HEAD.size:
        raise FrameError("too-large: frame length")
    if head.fields_length > head.length:
        raise FrameError("malformed: frame fields length")
    end = HEAD.size + head.length
    return (head, bytes(buffer[HEAD.size:end])) if len(buffer) >= end else None


def decode_body(kind: Struct, takes_payload: bool, head: Head, body: bytes) -> tuple[SimpleNamespace, bytes]:
    """The fields and the payload behind a head; one encoding per value, nothing left over."""
    reader = Reader(body[:head.fields_length])
    fields = kind.read(reader)
    if reader.left():
        raise FrameError("malformed: fields: trailing")
    payload = body[head.fields_length:]
    if payload and not takes_payload:
        raise FrameError("malformed: payload")
    return fields, payload


class Reply(NamedTuple):
    fields: SimpleNamespace
    payload: bytes


def decode_reply(op: Op, head: Head, body: bytes) -> Reply:
    """The reply to a request of `op`; raises `Refused` for every status but ok, `FrameError` for what is no reply."""
    if head.code not in STATUSES:
        raise FrameError("malformed: status")
    if head.code:
        fields, _ = decode_body(REFUSAL, False, head, body)
        raise Refused(head.code, fields.retry_after_ms)
    return Reply(*decode_body(op.reply, op.reply_payload, head, body))


# ------------------------------------------------------------------------------------------------- what a caller may write

Key = str | bytes | int
Context = Mapping[str | bytes, str | bytes] | bytes | None


def key_ref(key: Key) -> tuple[str, Any]:
    """Section 4.2, KeyRef."""
    return ("name" if isinstance(key, str) else "bound" if isinstance(key, int) else "id"), key


def canonical_context(context: Context) -> bytes:
    """formats 5. Canonical bytes are passed on as they are."""
    if isinstance(context, bytes):
        return context
    pairs = sorted((_bytes(key), _bytes(value)) for key, value in (context or {}).items())
    if len({key for key, _ in pairs}) != len(pairs) or any(not key for key, _ in pairs):
        raise ValueError("an encryption context has every key once, and no empty key")
    return struct.pack(">I", len(pairs)) + b"".join(
        struct.pack(">I", len(part)) + part for pair in pairs for part in pair)


def _bytes(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


# ---------------------------------------------------------------------------------- finding and judging the agent, 1.1 and 8

def find_socket(path: str | None = None) -> str:
    """Section 1.1. What the user or KMS_AUTH_SOCK names is taken, there or not; nothing is tried after it."""
    named = path or os.environ.get("KMS_AUTH_SOCK")
    if named:
        return named
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    candidates = ([os.path.join(runtime, "kms-agent/agent.sock")] if runtime else []) + ["/run/kms-agent/agent.sock"]
    for candidate in candidates:
        if os.path.lexists(candidate):
            return candidate
    raise NoAgent("no agent: none of " + ", ".join(candidates) + " is there, and KMS_AUTH_SOCK is not set")


def trusted_socket(path: str, trusted: Iterable[int] = ()) -> tuple[str, frozenset[int]]:
    """Checks socket and directory before the connect (section 8). The path without symlinks, and the uids trusted to serve.

    Every directory and symlink on the way is looked at. Where all of them but the last directory are root's alone, nobody but root
    can have put that directory there, so its owner is trusted.
    """
    todo = os.path.abspath(path).split("/")[1:][::-1]
    here, directory, roots_alone, links = "/", os.lstat("/"), True, 0
    while True:
        name = todo.pop()
        if name in ("", ".") and todo:
            continue
        entry = os.lstat(os.path.join(here, name))
        if name not in ("", ".", "..") and not todo and not stat.S_ISLNK(entry.st_mode):
            break
        roots_alone &= directory.st_uid == 0 and not directory.st_mode & 0o022
        if stat.S_ISLNK(entry.st_mode):
            roots_alone &= entry.st_uid == 0
            links += 1
            target = os.readlink(os.path.join(here, name))
            todo += target.split("/")[::-1]
            if target.startswith("/"):
                here, directory = "/", os.lstat("/")
        else:
            here, directory = os.path.normpath(os.path.join(here, name)), entry
        if links > 40 or not todo:
            raise Untrusted(f"{path} is no socket")
    serves = {os.geteuid(), 0, *trusted} | ({directory.st_uid} if roots_alone else set())
    if not stat.S_ISSOCK(entry.st_mode):
        raise Untrusted(f"{path} is no socket")
    if entry.st_uid not in serves:
        raise Untrusted(f"{path} belongs to uid {entry.st_uid}")
    if directory.st_uid not in serves:
        raise Untrusted(f"{here} belongs to uid {directory.st_uid}")
    if directory.st_mode & 0o002 and not directory.st_mode & stat.S_ISVTX:
        raise Untrusted(f"everybody can write to {here}")
    return os.path.join(here, name), frozenset(serves)


_UCRED = struct.Struct("iII")                                   # pid, uid, gid
_SCM_CREDENTIALS = getattr(socket, "SCM_CREDENTIALS", 2)


def receive_from(sock: socket.socket, serves: frozenset[int]) -> bytes:
    """Reads once, and refuses bytes whose sender the kernel does not name, or names as somebody else (section 8)."""
    data, control, flags, _ = sock.recvmsg(65_536, socket.CMSG_SPACE(_UCRED.size))
    if not data:
        return data
    senders = [_UCRED.unpack(content)[1] for level, kind, content in control
               if (level, kind) == (socket.SOL_SOCKET, _SCM_CREDENTIALS) and len(content) == _UCRED.size]
    if flags & socket.MSG_CTRUNC or len(control) != 1 or len(senders) != 1:
        raise Untrusted("the reply to hello came without credentials, or with descriptors")
    if senders[0] not in serves:
        raise Untrusted(f"uid {senders[0]} answers")
    return data


# ------------------------------------------------------------------------------------------------------------------ the client

class Pending:
    """A request that was sent; `Client.wait` has its reply."""

    def __init__(self, op: Op):
        self.op = op
        self.reply: Reply | None = None
        self.error: KmsError | None = None

    def done(self) -> bool:
        return self.reply is not None or self.error is not None


class Client:
    """One connection to an agent. `busy_wait` is how many seconds of `busy` are waited out for one call."""

    def __init__(self, path: str, trusted: Iterable[int] = (), busy_wait: float = 30.0, timeout: float = 60.0):
        self.path, self.trusted, self.busy_wait, self.timeout = path, tuple(trusted), busy_wait, timeout
        self.bindings: dict[int, bytes] = {}
        self._open()

    @classmethod
    def connect(cls, path: str | None = None, **options) -> "Client":
        return cls(find_socket(path), **options)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # -- the connection

    def _open(self) -> None:
        """Connect, check, say hello (sections 6 and 8)."""
        self._pending: dict[int, Pending] = {}
        self._out, self._in, self._last_id = bytearray(), bytearray(), 0
        try:
            path, serves = trusted_socket(self.path, self.trusted)
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            raise NoAgent(f"no agent at {self.path}: {error.strerror}") from None
        try:
            self.sock.settimeout(self.timeout)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            try:
                self.sock.connect(path)
            except OSError as error:
                raise NoAgent(f"no agent at {self.path}: {error.strerror}") from None
            uid = _UCRED.unpack(self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[1]
            if uid not in serves:
                raise Untrusted(f"uid {uid} listens on {self.path}")
            self.hello = self._hello(serves)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
            self.sock.setblocking(False)
        except OSError as error:
            self.close()
            raise ConnectionLost(f"while saying hello: {error}") from None
        except BaseException:
            self.close()
            raise

    def _hello(self, serves: frozenset[int]) -> SimpleNamespace:
        op, received = OPS["hello"], bytearray()
        self.sock.sendall(encode_frame(op.code, 0, op.request.write(SimpleNamespace(version=VERSION))))
        while (frame := split_frame(received)) is None:
            data = receive_from(self.sock, serves)
            if not data:
                raise ConnectionLost("the agent closed the connection instead of a reply to hello")
            received += data
        head, body = frame
        if head.request_id or len(received) != HEAD.size + head.length:
            raise FrameError("malformed: not the reply to hello")
        hello = decode_reply(op, head, body).fields
        if hello.version != VERSION or not FRAME_MAX_LEAST <= hello.frame_max <= FRAME_MAX or not hello.in_flight_max:
            raise FrameError("malformed: hello")
        return hello

    def close(self) -> None:
        self._fail(ConnectionLost("the connection was closed"))

    def _fail(self, error: KmsError) -> None:
        """Ends the connection, and every request under way with it."""
        self.sock.close()
        for pending in self._pending.values():
            pending.error = error
        self._pending.clear()

    # -- requests and replies

    def submit(self, name: str, payload: bytes = b"", /, **fields) -> Pending:
        """Sends a request and does not wait for its reply. Section 6: replies come in any order, found by request id."""
        op = self._op(name)
        return self._submit(op, self._fields(op, fields), payload)

    def _op(self, name: str) -> Op:
        if OPS[name].code not in self.hello.opcodes:                # section 5.1
            raise KmsError(f"this agent does not have {name}")
        return OPS[name]

    def _fields(self, op: Op, fields: dict[str, Any]) -> bytes:
        for name in ("key", "to"):
            if fields.get(name) is not None:
                fields[name] = key_ref(fields[name])
        if "context" in fields:
            fields["context"] = canonical_context(fields["context"])
        return op.request.write(SimpleNamespace(**fields))

    def _submit(self, op: Op, fields: bytes, payload: bytes) -> Pending:
        if HEAD.size + len(fields) + len(payload) > self.hello.frame_max:
            raise KmsError(f"{op.name}: longer than the {self.hello.frame_max} bytes that this agent takes")
        if self.sock.fileno() < 0:
            raise ConnectionLost("the connection is closed")
        while len(self._pending) >= self.hello.in_flight_max:
            self._pump()
        while (request_id := self._next_id()) in self._pending:
            pass
        pending = self._pending[request_id] = Pending(op)
        self._out += encode_frame(op.code, request_id, fields, payload)
        while self._out and not pending.done():                     # reads meanwhile, so that neither side can be stuck
            self._pump()
        return pending

    def _next_id(self) -> int:
        self._last_id = (self._last_id + 1) & 0xFFFF_FFFF
        return self._last_id

    def wait(self, pending: Pending) -> Reply:
        while not pending.done():
            self._pump()
        if pending.error:
            raise pending.error
        return pending.reply

    def _pump(self) -> None:
        """Waits until the socket can be read or, where something is to be sent, written; then does that."""
        if self.sock.fileno() < 0:
            raise ConnectionLost("the connection is closed")
        readable, writable, _ = select.select([self.sock], [self.sock] if self._out else [], [], self.timeout)
        if not readable and not writable:
            return self._fail(ConnectionLost(f"no answer for {self.timeout} seconds"))
        try:
            if writable:
                try:
                    del self._out[:self.sock.send(self._out)]
                except (BrokenPipeError, ConnectionResetError):
                    self._out.clear()                               # why may stand in what is still to be read
            if readable:
                data = self.sock.recv(262_144)
                if not data:
                    return self._fail(ConnectionLost("the agent closed the connection"))
                self._in += data
                self._take_replies()
        except BlockingIOError:
            pass
        except OSError as error:
            self._fail(ConnectionLost(str(error)))
        except FrameError as error:                                 # section 2.2: no part of that reply is used
            self._fail(error)

    def _take_replies(self) -> None:
        while (frame := split_frame(self._in)) is not None:
            head, body = frame
            del self._in[:HEAD.size + head.length]
            pending = self._pending.get(head.request_id)
            if pending is None:
                raise FrameError("malformed: a reply to nothing")
            try:
                pending.reply = decode_reply(pending.op, head, body)
            except Refused as refused:
                pending.error = refused
            del self._pending[head.request_id]

    def call(self, name: str, payload: bytes = b"", /, **fields) -> Reply:
        """Sends a request, waits for its reply; waits `busy` out; repeats a token once where the connection breaks (section 4.2)."""
        op = self._op(name)
        data = self._fields(op, fields)
        deadline = time.monotonic() + self.busy_wait
        again = "token" in op.request.fields
        while True:
            try:
                return self.wait(self._submit(op, data, payload))
            except Refused as refused:
                seconds = refused.retry_after_ms / 1000
                if refused.name != "busy" or name in ON_STREAM or time.monotonic() + seconds > deadline:
                    raise
                time.sleep(seconds)
            except ConnectionLost:
                if not again:
                    raise
                again = False
                self.reconnect()

    def reconnect(self) -> None:
        """A new connection to the same socket, with the same keys bound. Remote streams are gone (section 7)."""
        self.close()
        self._open()
        for number, key in self.bindings.items():
            self.call("bind", number=number, key=key)

    # -- the agent

    def ping(self) -> None:
        self.call("ping")

    def status(self) -> tuple[str, dict[str, str]]:
        """`locked` or `unlocked`, and the facts of section 5.3."""
        fields = self.call("status").fields
        return fields.state[0], {fact.name: fact.value for fact in fields.facts}

    def stats(self) -> SimpleNamespace:
        return self.call("stats").fields

    def lock(self, passphrase: bytes) -> bool:
        return self.call("lock", passphrase).fields.changed

    def unlock(self, passphrase: bytes) -> bool:
        return self.call("unlock", passphrase).fields.changed

    # -- keys. A token can be given to repeat a request that was sent before, with the same arguments.

    def add(self, name: str, key: bytes | None = None, if_missing: bool = False, constraints: Mapping[str, int] | None = None,
            token: bytes | None = None) -> SimpleNamespace:
        """Section 4.8: makes a key, or imports `key`. Constraints by name, such as {"memory-only": 0, "lifetime": 3600}."""
        kinds = [SimpleNamespace(kind=CONSTRAINT_KINDS[kind], value=value) for kind, value in (constraints or {}).items()]
        return self.call("add", key or b"", token=token or os.urandom(16), name=name,
                         material=("generate" if key is None else "import", None), if_missing=if_missing, constraints=kinds).fields

    def keys(self) -> Iterator[SimpleNamespace]:
        """Section 4.9: every key, page by page."""
        cursor = 0
        while True:
            page = self.call("list", cursor=cursor).fields
            yield from page.keys
            if not (cursor := page.next):
                return

    def describe(self, key: Key) -> SimpleNamespace:
        """Section 4.10, with the versions of all pages."""
        found = page = self.call("describe", key=key, versions_after=0).fields
        while page.more and page.versions:
            page = self.call("describe", key=key, versions_after=page.versions[-1].version).fields
            found.versions += page.versions
        found.more = page.more
        return found

    def remove(self, key: Key, token: bytes | None = None) -> bytes:
        return self.call("remove", token=token or os.urandom(16), key=key).fields.id

    def rotate(self, key: Key, token: bytes | None = None) -> SimpleNamespace:
        return self.call("rotate", token=token or os.urandom(16), key=key).fields

    def rename(self, key: Key, name: str, token: bytes | None = None) -> bytes:
        return self.call("rename", token=token or os.urandom(16), key=key, name=name).fields.id

    def remove_all(self, token: bytes | None = None) -> int:
        return self.call("remove-all", token=token or os.urandom(16)).fields.keys

    def export(self, key: Key, version: int = 0, passphrase: bytes = b"") -> Reply:
        """Section 4.14. The passphrase of the last lock where the agent was ever locked, else none: this client cannot know."""
        return self.call("export", passphrase, key=key, version=version)

    def bind(self, number: int, key: Key) -> bytes:
        """Section 4.33. `number` then stands for the key on this connection (and on the next, where this one breaks)."""
        self.bindings[number] = self.call("bind", number=number, key=key).fields.id
        return self.bindings[number]

    # -- data

    def encrypt(self, key: Key, plaintext: bytes, context: Context = None) -> bytes:
        return self.call("encrypt", plaintext, key=key, context=context).payload

    def decrypt(self, key: Key, ciphertext: bytes, context: Context = None) -> bytes:
        return self.call("decrypt", ciphertext, key=key, context=context).payload

    def wrap(self, key: Key, secret: bytes, context: Context = None) -> bytes:
        return self.call("wrap", secret, key=key, context=context).payload

    def unwrap(self, key: Key, wrapped: bytes, context: Context = None) -> bytes:
        return self.call("unwrap", wrapped, key=key, context=context).payload

    def datakey(self, key: Key, context: Context = None, length: int = 32) -> tuple[bytes, bytes]:
        """Section 4.27: the data key, and the same wrapped."""
        payload = self.call("datakey", key=key, context=context, length=length).payload
        return payload[:length], payload[length:]

    def datakey_wrapped(self, key: Key, context: Context = None, length: int = 32) -> bytes:
        return self.call("datakey-wrapped", key=key, context=context, length=length).payload

    def rewrap(self, key: Key, ciphertext: bytes, context: Context = None, to: Key | None = None) -> bytes:
        """Section 4.29: a message or wrapped key anew; of a stream the first 132 bytes or more, of which the rest stays as it is."""
        head = ciphertext
        if ciphertext[5:6] == b"\3":
            head, context = ciphertext[:REWRAP_HEAD], None
        reply = self.call("rewrap", head, key=key, context=context, to=to)
        return reply.payload + ciphertext[len(head):] if reply.fields.changed else ciphertext

    def verify(self, key: Key, ciphertext: bytes, context: Context = None) -> SimpleNamespace:
        """Section 4.30; of a stream its head is enough, and no more is sent."""
        head = ciphertext[:STREAM_HEAD] if ciphertext[5:6] == b"\3" else ciphertext
        return self.call("verify", head, key=key, context=context).fields

    def mac(self, key: Key, digest: bytes, context: Context = None) -> bytes:
        """Section 4.31; `digest` is the SHA-512 of the input."""
        return self.call("mac", digest, key=key, context=context).payload

    def mac_verify(self, key: Key, tag: bytes, digest: bytes, context: Context = None) -> bool:
        try:
            self.call("mac-verify", tag + digest, key=key, context=context)
        except Refused as refused:
            if refused.name != "invalid-ciphertext":
                raise
            return False
        return True

    def random(self, length: int) -> bytes:
        return self.call("random", length=length).payload

    def batch(self, items: list[tuple[str, bytes, dict[str, Any]]]) -> list[Reply | Refused]:
        """Section 4.34. Items are (name, payload, fields); what comes back has a reply or a refusal for each, in order."""
        ops = [self._op(name) for name, _, _ in items]
        if not 1 <= len(items) <= BATCH_ITEMS_MAX or any(op.name not in BATCHABLE for op in ops):
            raise ValueError("a batch has 1 to 4,096 items of certain operations")
        frames = (encode_frame(op.code, number, self._fields(op, dict(fields)), payload)
                  for number, (op, (_, payload, fields)) in enumerate(zip(ops, items)))
        answer, replies = self.call("batch", b"".join(frames)).payload, []
        try:
            for number, op in enumerate(ops):
                head, body = split_frame(answer) or self._broken()
                if head.request_id != number:
                    self._broken()
                try:
                    replies.append(decode_reply(op, head, body))
                except Refused as refused:
                    replies.append(refused)
                answer = answer[HEAD.size + head.length:]
            return replies if not answer else self._broken()
        except FrameError as error:
            self._fail(error)
            raise

    def _broken(self):
        raise FrameError("malformed: not the replies to the items of the batch")

    # -- streams

    def stream_new(self, key: Key, context: Context = None) -> tuple[bytes, bytes, bytes]:
        """Section 4.18: head, message key, base nonce. Each chunk number is sealed at most once, and the key used for this stream only."""
        payload = self.call("stream-new", key=key, context=context).payload
        return payload[:188], payload[188:220], payload[220:]

    def stream_open(self, key: Key, head: bytes, context: Context = None) -> tuple[bytes, bytes]:
        """Section 4.19: message key, base nonce."""
        payload = self.call("stream-open", head, key=key, context=context).payload
        return payload[:32], payload[32:]

    def encrypt_stream(self, key: Key, source: BinaryIO, sink: BinaryIO, context: Context = None) -> None:
        """Section 7: a whole stream that the agent encrypts. After an exception what was written is to be thrown away."""
        reply = self.call("remote-stream-new", key=key, context=context)
        sink.write(reply.payload)
        size = (self.hello.frame_max - HEAD.size) // SEALED_CHUNK * CHUNK
        while True:
            piece = _read_exactly(source, size)
            sink.write(self.call("remote-stream-encrypt", piece, stream=reply.fields.stream).payload)
            if not piece or len(piece) % CHUNK:                     # anything but whole chunks ends the stream
                return

    def decrypt_stream(self, key: Key, source: BinaryIO, sink: BinaryIO, context: Context = None) -> None:
        """Section 7: a whole stream that the agent decrypts. After an exception what was written is not the whole plaintext."""
        stream = self.call("remote-stream-open", _read_exactly(source, STREAM_HEAD), key=key, context=context).fields.stream
        chunks = (self.hello.frame_max - HEAD.size - 12) // SEALED_CHUNK
        first = 0
        while True:
            piece = _read_exactly(source, chunks * SEALED_CHUNK)
            if not piece:                                           # ends with a whole chunk: truncated (formats 6.6)
                self.call("remote-stream-close", stream=stream)
                raise Refused(10)
            sink.write(self.call("remote-stream-decrypt", piece, stream=stream, first=first).payload)
            if len(piece) % SEALED_CHUNK:
                break
            first += len(piece) // SEALED_CHUNK
        self.call("remote-stream-close", stream=stream)


def _read_exactly(source: BinaryIO, size: int) -> bytes:
    """`size` bytes, fewer only at the end."""
    parts = []
    while size and (part := source.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
