"""python3 drive_agent.py SOCKET: drives a running agent through every operation, with kms_client.py alone; asserts every result.

The agent is to be fresh, unlocked, without a keystore (--memory) and in the default configuration. What differs from the text is
printed and counted; the rest goes on. Ciphertexts are also opened and made by kms_decoder.py where `cryptography` is there.
"""

import array
import concurrent.futures
import io
import os
import select
import socket
import sys
import time
import traceback
from types import SimpleNamespace

import kms_client as kms
import kms_decoder as decoder
from kms_client import Client, Refused

PATH = ""
SECRET = bytes(range(32))                                       # the key that is imported, so that kms_decoder can open
CONTEXT = {"table": "accounts", "row": "7"}
EC = kms.canonical_context(CONTEXT)
NONE = kms.canonical_context(None)
SIZES = (0, 1, 14, 16_383, 16_384, 16_385, 65_536)
CHECKS = 0


def same(found, wanted, what=""):
    global CHECKS
    CHECKS += 1
    if found != wanted:
        raise AssertionError(f"{what}: {_short(found)} where {_short(wanted)} was to be")


def _short(value):
    text = repr(value)
    return text if len(text) < 200 else text[:200] + "…"


def refused(names, function, *arguments, **options):
    """Calls, and wants one of these statuses."""
    global CHECKS
    CHECKS += 1
    names = names if isinstance(names, tuple) else (names,)
    try:
        result = function(*arguments, **options)
    except Refused as error:
        if error.name not in names:
            raise AssertionError(f"{error.name} where {' or '.join(names)} was to be") from None
        same(bool(error.retry_after_ms), error.name == "busy", "retry_after_ms")
        return error
    raise AssertionError(f"ok ({_short(result)}) where {' or '.join(names)} was to be")


def new(**options) -> Client:
    return Client.connect(PATH, **options)


def raw(c: Client, op: kms.Op, fields: bytes = b"", payload: bytes = b"") -> kms.Reply:
    return c.wait(c._submit(op, fields, payload))


def fields_of(name, **values) -> bytes:
    return kms.OPS[name].request.write(SimpleNamespace(**values))


def after_end(frames: bytes, hello: bool = True, ends: bool = True) -> list[tuple[int, int]]:
    """Sends bytes on a new connection; status and request id of every reply until the agent ends the connection."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(PATH)
        if hello:
            sock.sendall(kms.encode_frame(1, 77, b"\1\0"))
        sock.sendall(frames)
        data, replies = b"", []
        if not ends:
            sock.shutdown(socket.SHUT_WR)
        try:
            while part := sock.recv(65_536):
                data += part
        except ConnectionResetError:
            pass
    while data:
        head, _ = kms.split_frame(data)
        replies.append((head.code, head.request_id))
        data = data[16 + head.length:]
    return replies[1:] if hello else replies


# ------------------------------------------------------------------------------------------------------------------------

def hello_and_status(c):
    print("   ", vars(c.hello) | {"opcodes": len(c.hello.opcodes)})
    same(c.hello.version, 1, "version")
    same(sorted(set(kms.OPS_BY_CODE) - set(c.hello.opcodes)), [], "opcodes that hello lacks")
    same(sorted(set(c.hello.opcodes) - set(kms.OPS_BY_CODE)), [], "opcodes that the text lacks")
    same(sorted(c.hello.constraints), [1, 2, 3, 4, 5], "constraints")
    same((c.hello.frame_max, c.hello.message_max, c.hello.context_max, c.hello.context_pairs_max), (1_048_576, 65_536, 8_192, 64))
    same(c.hello.features, 0, "features")
    c.ping()
    state, facts = c.status()
    print("   ", facts)
    same(state, "unlocked")
    known = set(
        "version uid secret-memory keystore keys connections panics uptime-ms requests frame-pool lock-passphrase pid dumpable traceable"
        " no-new-privileges core-limit descriptor-limit memory-lock-limit landlock stacks seccomp".split()
    )
    same(known - set(facts), set(), "facts that are missing")
    print("    facts that the text does not have:", sorted(set(facts) - known))
    same(facts["uid"], str(os.geteuid()))
    same(facts["panics"], "0")


def bad_frames(c):
    """Section 2.2."""
    def ping(version=1, flags=0, code=2, length=0, fields=0, body=b""):
        return kms.HEAD.pack(length, version, flags, code, 9, fields) + body

    good = ping()
    for name, frame, status in (
            ("version", ping(version=2), 2), ("flags", ping(flags=128), 1), ("too large", ping(length=1_048_561), 3),
            ("fields length", ping(length=1, fields=2), 1), ("order", ping(version=3, flags=1, length=2**32 - 1), 2),
            ("fields of ping", ping(length=1, fields=1, body=b"\0"), 1), ("payload of ping", ping(length=1, body=b"\0"), 1),
            ("second hello", kms.encode_frame(1, 9, b"\1\0"), 1)):
        same(after_end(frame + good), [(status, 9)], name)
    same(after_end(good + good, hello=False), [(1, 9)], "no hello first")
    same(after_end(ping(code=0xFFFF), hello=False), [(1, 9)], "an unknown opcode first")
    same(after_end(kms.encode_frame(1, 9, b"\2\0"), hello=False), [(2, 9)], "hello of version 2")
    same(after_end(ping(code=0) + ping(code=0x15) + ping(), ends=False), [(2, 9), (2, 9), (0, 9)], "unknown opcodes go on")
    for code in (0, 0x0006, 0x0015, 0x0040, 0xFFFF):
        refused("unsupported", raw, c, kms.Op(code, "reserved"), b"", b"anything")
    c.ping()


def ended(send) -> tuple[bytes, float]:
    """What comes on a new connection on which `send` has sent something, until the agent ends it, and when that was."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(PATH)
        begin, data = time.monotonic(), b""
        send(sock)
        try:
            while part := sock.recv(65_536):
                data += part
        except ConnectionResetError:
            pass
    return data, time.monotonic() - begin


def peers(c):
    """Sections 2.2 and 8: what ends a connection without an answer."""
    hello = kms.encode_frame(1, 0, b"\1\0")
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0]))]

    def a_descriptor(sock):
        """The agent ends the connection, or the kernel does not let the message out: where the receiver has SO_PASSRIGHTS off
        (Linux 6.16), which of the two depends on whether the agent has accepted yet."""
        try:
            sock.sendmsg([hello], rights)
        except PermissionError:
            sock.shutdown(socket.SHUT_WR)

    same(ended(a_descriptor)[0], b"", "a descriptor")

    def another_uid(sock):
        if not (child := os.fork()):
            os.setuid(65_534)
            sock.sendall(hello)
            os._exit(0)
        os.waitpid(child, 0)

    def another_process(sock):
        if not (child := os.fork()):
            sock.sendall(hello)
            os._exit(0)
        os.waitpid(child, 0)
        sock.shutdown(socket.SHUT_WR)

    if not os.geteuid():
        same(ended(another_uid)[0], b"", "the connection was passed to another uid")
    same(len(ended(another_process)[0]) > 16, True, "another process of the same uid")
    with concurrent.futures.ThreadPoolExecutor() as pool:           # all at a time, since each takes its 5 seconds
        late = [pool.submit(ended, send) for send in (
            lambda sock: None, lambda sock: sock.sendall(hello[:-1]),
            lambda sock: (sock.sendall(hello), sock.recv(4_096), sock.sendall(hello[:-1])))]
        for one in late:
            data, seconds = one.result()
            same(data, b"", "not whole within 5 seconds")
            same(4.5 < seconds < 8, True, f"ended after {seconds:.1f} seconds")


def adding(c):
    made = c.add("t/made", constraints={"memory-only": 0})
    same((made.version, made.created), (1, True))
    imported = c.add("t/imported", SECRET, constraints={"exportable": 0, "memory-only": 0})
    same(imported.check_value, decoder.check_value(SECRET), "check value")
    refused("exists", c.add, "t/made")
    again = c.add("t/made", if_missing=True, constraints={"max-uses": 5})
    same((again.id, again.created, again.check_value), (made.id, False, made.check_value), "if_missing")
    for name in ("", "-a", "/a", "a b", "ü", "a\0", "x" * 256):
        refused("malformed", c.add, name)
        refused("malformed", c.describe, name)
    c.add("x" * 255, constraints={"memory-only": 0})
    c.remove("x" * 255)
    for size in (0, 31, 33):
        refused("malformed", c.add, "t/no", bytes(size))

    def add(constraints, material="generate", payload=b""):
        return c.call("add", payload, token=os.urandom(16), name="t/no", material=(material, None), if_missing=False,
                      constraints=[SimpleNamespace(kind=kind, value=value) for kind, value in constraints])

    refused("malformed", add, [], payload=bytes(32))
    refused("unsupported", add, [(6, 0)])
    refused("unsupported", add, [(0, 0)])
    refused("malformed", add, [(1, 0), (1, 0)])
    for kind, value in ((1, 1), (2, 0), (3, 1), (4, 0), (5, 7)):
        refused("malformed", add, [(kind, value)])
    refused("not-found", c.describe, "t/no")
    c.add("t/all", constraints={"lifetime": 3_600, "confirm": 0, "max-uses": 7, "exportable": 0, "memory-only": 0})
    row = c.describe("t/all")
    same({(one.kind, one.value) for one in row.constraints}, {(1, 0), (2, 3_600), (3, 0), (4, 7), (5, 0)}, "constraints")
    same(3_590 <= row.key.expires_in <= 3_600, True, f"expires_in {row.key.expires_in}")
    c.remove("t/all")
    c.add("t/bare")
    row = c.describe("t/bare")
    same(row.key.memory_only, True, "a key that was added without constraints")
    print("    constraints of a key that was added without any:", row.constraints)
    c.remove("t/bare")


def describing(c):
    key = c.describe("t/imported")
    same((key.key.name, key.key.primary, key.key.minimum, key.key.versions, key.more), ("t/imported", 1, 1, 1, False))
    same(key.key.state, ("enabled", None))
    same(abs(time.time() - key.key.created) < 100, True, "created")
    same(vars(c.describe(key.key.id).key), vars(key.key), "by id")
    same({(one.kind, one.value) for one in key.constraints}, {(1, 0), (5, 0)})
    refused("not-found", c.describe, "t/nobody")
    refused("not-found", c.describe, bytes(16))
    refused("not-found", c.describe, 4_711)
    same(c.call("describe", key="t/made", versions_after=99).fields.versions, [])


def listing(c):
    """More keys than a page has rows; made with many requests under way at a time."""
    wanted = {f"t/page/{number:03}" for number in range(c.hello.page_rows_max + 20)}
    pending = [c.submit("add", token=os.urandom(16), name=name, material=("generate", None), if_missing=False, constraints=[])
               for name in sorted(wanted)]
    same(len({c.wait(one).fields.id for one in pending}), len(wanted), "ids")
    first = c.call("list", cursor=0).fields
    same(len(first.keys) <= c.hello.page_rows_max, True, "rows")
    same(first.next != 0, True, "next")
    names = [row.name for row in c.keys()]
    same(len(names), len(set(names)), "each listed once")
    same(wanted <= set(names), True, "all listed")
    c.call("list", cursor=2**64 - 1)
    for name in sorted(wanted):
        c.submit("remove", token=os.urandom(16), key=name)
    while c._pending:
        c._pump()
    same([row.name for row in c.keys() if row.name in wanted], [])


def tokens(c):
    token = os.urandom(16)
    first = c.add("t/token", token=token)
    same(c.add("t/token", token=token), first, "add again")
    same(c.add("t/other", bytes(32), token=token), first, "other fields are not looked at")
    refused("malformed", c.rotate, "t/token", token=token)
    rotate = os.urandom(16)
    second = c.rotate("t/token", token=rotate)
    same(second.version, 2)
    same(c.rotate("t/token", token=rotate), second, "rotate again")
    same([row.version for row in c.describe("t/token").versions], [1, 2])
    same(c.describe("t/token").key.check_value, second.check_value)
    rename = os.urandom(16)
    same(c.rename("t/token", "t/renamed", token=rename), first.id)
    same(c.rename("t/token", "t/renamed", token=rename), first.id, "rename again")
    same(c.rename("t/renamed", "t/renamed"), first.id, "to the name that it has")
    refused("exists", c.rename, "t/renamed", "t/made")
    refused("malformed", c.rename, "t/renamed", "-")
    refused("not-found", c.describe, "t/token")
    same(c.describe(first.id).key.name, "t/renamed")
    remove = os.urandom(16)
    refused("not-found", c.remove, "t/token", token=remove)
    same(c.remove("t/renamed", token=remove), first.id, "a refused request leaves no token")
    same(c.remove("t/renamed", token=remove), first.id, "remove again")
    refused("not-found", c.remove, "t/renamed")
    # The connection breaks when the request has gone, before the reply was read.
    with new() as broken:
        token = os.urandom(16)
        arguments = dict(token=token, name="t/broken", material=("generate", None), if_missing=False, constraints=[])
        broken.submit("add", **arguments)
        broken.sock.shutdown(socket.SHUT_RDWR)
        reply = broken.call("add", **arguments).fields
        same((reply.created, broken.describe("t/broken").key.id), (True, reply.id), "repeated over a broken connection")
        broken.remove("t/broken")


def messages(c):
    for key in ("t/made", "t/imported", c.describe("t/imported").key.id):
        for size in SIZES:
            plaintext = os.urandom(size)
            box = c.encrypt(key, plaintext, CONTEXT)
            same(len(box), 100 + size + 16 * (size // 16_384), "length")
            same(c.decrypt(key, box, CONTEXT), plaintext)
            if key != "t/made" and decoder.AESGCM:
                same(decoder.open_message(SECRET, box, EC), plaintext, "opened by the decoder")
    box = c.encrypt("t/imported", b"attack at dawn", CONTEXT)
    made = decoder.seal_message(SECRET, decoder.Header(1, c.describe("t/imported").key.id, 1), EC, os.urandom(24), b"from outside")
    same(c.decrypt("t/imported", made, CONTEXT), b"from outside")
    refused("too-large", c.encrypt, "t/made", bytes(65_537))
    refused("invalid-ciphertext", c.decrypt, "t/imported", box)
    refused("invalid-ciphertext", c.decrypt, "t/imported", box[:-1], CONTEXT)
    refused("invalid-ciphertext", c.decrypt, "t/imported", box[:28], CONTEXT)
    refused("invalid-ciphertext", c.decrypt, "t/imported", box[:-1] + bytes((box[-1] ^ 1,)), CONTEXT)
    refused("wrong-key", c.decrypt, "t/made", box, CONTEXT)
    refused("not-found", c.decrypt, "t/imported", box[:27] + b"\2" + box[28:], CONTEXT)
    refused("malformed", c.decrypt, "t/nobody", b"", CONTEXT)
    refused("malformed", c.decrypt, "t/nobody", box[:27], CONTEXT)
    refused("malformed", c.decrypt, "t/nobody", b"x" + box[1:], CONTEXT)
    refused("malformed", c.decrypt, "t/imported", box[:24] + bytes(4) + box[28:], CONTEXT)
    for at, status in ((3, "unsupported"), (4, "unsupported"), (6, "unsupported")):
        refused(status, c.decrypt, "t/nobody", box[:at] + b"\7" + box[at + 1:], CONTEXT)
    for purpose, status in ((0, "unsupported"), (2, "malformed"), (3, "malformed"), (4, "malformed"), (5, "malformed"), (6, "unsupported")):
        refused(status, c.decrypt, "t/nobody", box[:5] + bytes((purpose,)) + box[6:], CONTEXT)
    refused("too-large", c.decrypt, "t/imported", box + bytes(65_700), CONTEXT)
    refused("not-found", c.decrypt, "t/nobody", box, CONTEXT)
    refused("not-found", c.encrypt, "t/nobody", b"", CONTEXT)
    contexts = {b"": "malformed", b"\0\0\0": "malformed", NONE + b"\0": "malformed", bytes.fromhex("000000010000000000000000"): "malformed",
                bytes.fromhex("00000002" "0000000161" "00000000" "0000000161" "00000000"): "malformed",
                bytes.fromhex("00000002" "0000000162" "00000000" "0000000161" "00000000"): "malformed",
                kms.canonical_context({str(number): "" for number in range(65)}): "too-large",
                kms.canonical_context({"a": bytes(8_180)}): "too-large"}
    for context, status in contexts.items():
        refused(status, c.encrypt, "t/made", b"", context)
    for context in ({str(number): "" for number in range(64)}, {"a": bytes(8_179)}):
        same(c.decrypt("t/made", c.encrypt("t/made", b"x", context), context), b"x")


def wrapping(c):
    for size in (1, 32, 65_536):
        secret = os.urandom(size)
        box = c.wrap("t/imported", secret, CONTEXT)
        same(c.unwrap("t/imported", box, CONTEXT), secret)
        if decoder.AESGCM:
            same(decoder.open_message(SECRET, box, EC, decoder.WRAPPED_KEY), secret)
    refused("malformed", c.wrap, "t/imported", b"")
    refused("too-large", c.wrap, "t/imported", bytes(65_537))
    refused("malformed", c.decrypt, "t/imported", box, CONTEXT)
    refused("malformed", c.unwrap, "t/imported", c.encrypt("t/imported", b"", CONTEXT), CONTEXT)
    refused("invalid-ciphertext", c.unwrap, "t/imported", box)
    for size in (1, 32, 1_024):
        plain, box = c.datakey("t/imported", CONTEXT, size)
        same((len(plain), c.unwrap("t/imported", box, CONTEXT)), (size, plain))
        same(len(c.unwrap("t/imported", c.datakey_wrapped("t/imported", CONTEXT, size), CONTEXT)), size)
    for function in (c.datakey, c.datakey_wrapped):
        refused("malformed", function, "t/imported", None, 0)
        refused("too-large", function, "t/imported", None, 1_025)
        refused("not-found", function, "t/nobody")


def rewrapping(c):
    c.add("t/old"), c.add("t/to")
    message, wrapped = c.encrypt("t/old", b"message", CONTEXT), c.wrap("t/old", b"wrapped", CONTEXT)
    stream = io.BytesIO()
    c.encrypt_stream("t/old", io.BytesIO(b"stream" * 5_000), stream, CONTEXT)
    stream = stream.getvalue()
    old, to = c.describe("t/old").key.id, c.describe("t/to").key.id

    def opened(key, box):
        if box[5] == 1:
            return c.decrypt(key, box, CONTEXT)
        if box[5] == 2:
            return c.unwrap(key, box, CONTEXT)
        sink = io.BytesIO()
        c.decrypt_stream(key, io.BytesIO(box), sink, CONTEXT)
        return sink.getvalue()

    for box in (message, wrapped, stream):
        head = box[:132] if box is stream else box
        context = None if box is stream else CONTEXT
        plain = opened("t/old", box)
        reply = c.call("rewrap", head, key="t/old", context=context, to=None)
        same((reply.fields.changed, reply.fields.id, reply.fields.version, reply.payload), (False, old, 1, b""), "nothing to change")
        same(c.verify("t/old", box, CONTEXT), SimpleNamespace(id=old, name="t/old", version=1, primary=1), "verify")
        reply = c.call("rewrap", head, key="t/old", context=context, to="t/to")
        same((reply.fields.changed, reply.fields.id, reply.fields.version, len(reply.payload)), (True, to, 1, len(head)), "to another")
        moved = reply.payload + box[len(head):]
        same(opened("t/to", moved), plain)
        refused("wrong-key", opened, "t/old", moved)
        refused("wrong-key", c.rewrap, "t/to", box, CONTEXT)
        refused("not-found", c.rewrap, "t/old", box, CONTEXT, to="t/nobody")
        refused("not-found", c.rewrap, "t/nobody", box, CONTEXT)
        if box is stream:
            refused("malformed", c.call, "rewrap", head, key="t/old", context=CONTEXT, to=None)
            refused("invalid-ciphertext", c.call, "rewrap", box[:188], key="t/old", context=None, to=None)
            refused("invalid-ciphertext", c.call, "rewrap", head[:-1], key="t/old", context=None, to=None)
        else:
            refused("invalid-ciphertext", c.rewrap, "t/old", box)
    same(c.rotate("t/old").version, 2)
    for box in (message, wrapped, stream):
        plain = opened("t/old", box)
        moved = c.rewrap("t/old", box, CONTEXT)
        same((moved[24:28], len(moved)), (bytes((0, 0, 0, 2)), len(box)), "new version")
        same(opened("t/old", moved), plain)
        same(c.rewrap("t/old", moved, CONTEXT), moved, "already there")
        same(c.verify("t/old", box, CONTEXT), SimpleNamespace(id=old, name="t/old", version=1, primary=2), "verify")
        same(c.verify("t/old", moved, CONTEXT).version, 2)
        refused("invalid-ciphertext", c.verify, "t/old", box)
        refused("wrong-key", c.verify, "t/to", box, CONTEXT)
    refused("invalid-ciphertext", c.call, "verify", stream, key="t/old", context=CONTEXT)
    tag = c.mac("t/old", bytes(64))
    refused("malformed", c.verify, "t/old", tag)
    refused("malformed", c.rewrap, "t/old", tag)
    same({row.version for row in c.describe("t/old").versions}, {1, 2})


def macs(c):
    digest = decoder.sha512(b"an input of any length")
    tag = c.mac("t/imported", digest, CONTEXT)
    decoder.check_tag(SECRET, tag, EC, digest)
    same((len(tag), c.mac("t/imported", digest, CONTEXT)), (60, tag), "the same tag")
    same(c.mac_verify("t/imported", tag, digest, CONTEXT), True)
    same(c.mac_verify("t/imported", tag, digest), False)
    same(c.mac_verify("t/imported", tag, bytes(64), CONTEXT), False)
    same(c.mac_verify("t/imported", tag[:-1] + bytes((tag[-1] ^ 1,)), digest, CONTEXT), False)
    refused("wrong-key", c.mac_verify, "t/made", tag, digest, CONTEXT)
    refused("not-found", c.mac_verify, "t/imported", tag[:27] + b"\7" + tag[28:], digest, CONTEXT)
    for size in (0, 63, 65):
        refused("malformed", c.mac, "t/imported", bytes(size))
    for data in (b"", tag, tag + digest[:-1], tag + digest + b"\0", c.encrypt("t/imported", bytes(24))):
        refused("malformed", c.call, "mac-verify", data, key="t/imported", context=CONTEXT)


def randoms(c):
    for size in (1, 32, 65_536):
        same(len(c.random(size)), size)
    same(c.random(32) != c.random(32), True)
    refused("malformed", c.random, 0)
    refused("too-large", c.random, 65_537)


def binding(c):
    made, imported = c.describe("t/made").key.id, c.describe("t/imported").key.id
    refused("not-found", c.encrypt, 5, b"")
    same(c.bind(5, "t/made"), made)
    same(c.bind(2**32 - 1, 5), made, "bound to a bound one")
    same(c.decrypt("t/made", c.encrypt(5, b"x", CONTEXT), CONTEXT), b"x")
    same(c.bind(5, imported), imported, "bound anew")
    same(c.describe(5).key.name, "t/imported")
    refused("not-found", c.bind, 5, "t/nobody")
    refused("malformed", c.bind, 5, "-")
    same(c.describe(5).key.name, "t/imported", "as before")
    with new() as other:
        refused("not-found", other.encrypt, 5, b"")
        other.add("t/bound")
        other.bind(1, "t/bound")
        other.rename(1, "t/bound2"), other.rotate(1)
        same(other.describe(1).key.primary, 2)
        other.sock.shutdown(socket.SHUT_RDWR)
        other.reconnect()
        same(other.describe(1).key.name, "t/bound2", "bound again on the next connection")
        other.remove(1)
        refused("not-found", other.describe, 1)
        other.add("t/bound2")
        refused("not-found", other.describe, 1)
        other.remove("t/bound2")
        other.bindings.clear()
        for number in range(1_024):
            other.bind(number, "t/made")
        refused("limit", other.bind, 1_024, "t/made")
        other.bind(3, "t/imported")


def batches(c):
    boxes = [c.encrypt("t/made", bytes((number,)), CONTEXT) for number in range(20)]
    items = [("decrypt", box, dict(key="t/made", context=CONTEXT)) for box in boxes]
    items[7] = ("decrypt", boxes[7], dict(key="t/imported", context=CONTEXT))
    c.bind(9, "t/made")
    items[8] = ("decrypt", boxes[8], dict(key=9, context=CONTEXT))
    replies = c.batch(items)
    same([reply.name if isinstance(reply, Refused) else reply.payload for reply in replies],
         [bytes((number,)) if number != 7 else "wrong-key" for number in range(20)], "one bad item")
    digest = bytes(64)
    tag = c.mac("t/made", digest)
    stream = c.stream_new("t/made")[0]
    key = dict(key="t/made", context=None)
    wrapped = c.wrap("t/made", b"k")
    kinds = [("encrypt", b"x", key), ("stream-new", b"", key), ("stream-open", stream, key), ("wrap", b"k", key), ("unwrap", wrapped, key),
             ("datakey", b"", key | {"length": 32}), ("datakey-wrapped", b"", key | {"length": 32}), ("rewrap", wrapped, key | {"to": None}),
             ("verify", wrapped, key), ("mac", digest, key), ("mac-verify", tag + digest, key), ("random", b"", {"length": 9})]
    same([type(reply) for reply in c.batch(kinds)], [kms.Reply] * len(kinds), "every kind of item")
    batch, ping = kms.OPS["batch"], kms.encode_frame(2, 1, b"")
    random = kms.encode_frame(0x30, 2, fields_of("random", length=4))
    for payload in (b"", random[:-1], random + b"\0", ping[:4] + b"\2" + ping[5:]):
        refused("malformed", raw, c, batch, b"", payload)
    refused("too-large", raw, c, batch, b"", random * 4_097)

    def statuses(payload):
        answer, found = raw(c, batch, b"", payload).payload, []
        while answer:
            head, _ = kms.split_frame(answer)
            found.append((head.code, head.request_id))
            answer = answer[16 + head.length:]
        return found

    same(statuses(random * 4_096), [(0, 2)] * 4_096, "4,096 items")
    same(statuses(ping + kms.encode_frame(0x30, 3, b"\0") + random + kms.encode_frame(0x30, 4, fields_of("random", length=4), b"payload")),
         [(2, 1), (1, 3), (0, 2), (1, 4)], "items that are none")
    large = kms.encode_frame(0x30, 2, fields_of("random", length=65_536))
    same(statuses(large * 17), [(0, 2)] * 15 + [(3, 2)] * 2, "no room for the reply")


def pipelining(c):
    pending = [c.submit("encrypt", bytes((number & 255,)) * 10_000, key="t/made", context=None) for number in range(600)]
    again = [c.submit("decrypt", c.wait(one).payload, key="t/made", context=None) for one in pending]
    same([c.wait(one).payload[0] for one in again], [number & 255 for number in range(600)], "600 under way")


def streams(c):
    key = c.describe("t/imported").key.id
    for size in (0, 1, 16_384, 32_768, 100_000, 1_032_192, 1_032_193, 2_100_000):
        plaintext = os.urandom(size)
        sink = io.BytesIO()
        c.encrypt_stream("t/imported", io.BytesIO(plaintext), sink, CONTEXT)
        stream = sink.getvalue()
        same(len(stream), 188 + size + 16 * (size // 16_384 + 1), "length of a stream")
        sink = io.BytesIO()
        c.decrypt_stream("t/imported", io.BytesIO(stream), sink, CONTEXT)
        same(sink.getvalue(), plaintext, "through the agent both ways")
        if decoder.AESGCM:
            same(decoder.open_stream(SECRET, stream, EC), plaintext, "opened by the decoder with the key")
            same(decoder.Body(*c.stream_open(key, stream[:188], CONTEXT)).open(stream[188:]), plaintext, "opened locally")
            head, message_key, nonce = c.stream_new("t/imported", CONTEXT)
            local = head + decoder.Body(message_key, nonce).seal(plaintext)
            same(decoder.open_stream(SECRET, local, EC), plaintext, "sealed locally")
            sink = io.BytesIO()
            c.decrypt_stream("t/imported", io.BytesIO(local), sink, CONTEXT)
            same(sink.getvalue(), plaintext, "sealed locally, opened by the agent")
    plaintext = os.urandom(40_000)
    sink = io.BytesIO()
    c.encrypt_stream("t/imported", io.BytesIO(plaintext), sink, CONTEXT)
    stream = sink.getvalue()
    for cut in (188 + 16_400, 188 + 16_400 + 5, len(stream) - 1, 188):
        refused("invalid-ciphertext", c.decrypt_stream, "t/imported", io.BytesIO(stream[:cut]), io.BytesIO(), CONTEXT)
    for more in (b"\0", stream[188:]):
        refused("invalid-ciphertext", c.decrypt_stream, "t/imported", io.BytesIO(stream + more), io.BytesIO(), CONTEXT)
    refused("invalid-ciphertext", c.decrypt_stream, "t/imported", io.BytesIO(stream), io.BytesIO())
    for function in (c.stream_open, lambda key, head, context: c.call("remote-stream-open", head, key=key, context=context)):
        refused("invalid-ciphertext", function, "t/imported", stream[:187], CONTEXT)
        refused("invalid-ciphertext", function, "t/imported", stream[:189], CONTEXT)
        refused("malformed", function, "t/imported", b"", CONTEXT)
        refused("malformed", function, "t/imported", c.encrypt("t/imported", bytes(88), CONTEXT), CONTEXT)

    def opened():
        return c.call("remote-stream-open", stream[:188], key="t/imported", context=CONTEXT).fields.stream

    number = opened()
    chunk = [stream[188:188 + 16_400], stream[188 + 16_400:188 + 32_800], stream[188 + 32_800:]]
    decrypt = lambda number, first, data: c.call("remote-stream-decrypt", data, stream=number, first=first).payload
    same(decrypt(number, 1, chunk[1] + chunk[2]), plaintext[16_384:], "from the middle")
    same(decrypt(number, 0, chunk[0]), plaintext[:16_384], "and back")
    refused("invalid-ciphertext", decrypt, number, 1, chunk[0])
    refused("not-found", decrypt, number, 0, chunk[0])
    refused("not-found", c.call, "remote-stream-close", stream=number)
    number = opened()
    refused("malformed", decrypt, number, 0, b"")
    refused("not-found", decrypt, number, 0, chunk[0])
    number = opened()
    refused("not-found", c.call, "remote-stream-encrypt", b"x", stream=number)
    refused("not-found", decrypt, number, 0, chunk[0])
    number = c.call("remote-stream-new", key="t/imported", context=CONTEXT).fields.stream
    refused("too-large", c.call, "remote-stream-encrypt", bytes(1_048_556), stream=number)
    refused("not-found", c.call, "remote-stream-encrypt", b"", stream=number)
    with new() as other:
        numbers = [other.call("remote-stream-new", key="t/imported", context=None).fields.stream for _ in range(16)]
        same(len(set(numbers)), 16)
        refused("limit", other.call, "remote-stream-new", key="t/imported", context=None)
        refused("limit", other.call, "remote-stream-open", stream[:188], key="t/imported", context=CONTEXT)
        other.call("remote-stream-encrypt", b"end", stream=numbers[0])
        refused("not-found", other.call, "remote-stream-encrypt", b"", stream=numbers[0])
        fresh = other.call("remote-stream-new", key="t/imported", context=None).fields.stream
        same(fresh in numbers, False, "no number twice")
        pieces = [other.submit("remote-stream-encrypt", bytes(16_384), stream=numbers[1]) for _ in range(5)]
        pieces.append(other.submit("remote-stream-encrypt", b"end", stream=numbers[1]))
        same([len(other.wait(one).payload) for one in pieces], [16_400] * 5 + [19], "pieces under way at a time")
        other.call("remote-stream-close", stream=numbers[2])
        other.add("t/gone")
        number = other.call("remote-stream-new", key="t/gone", context=None).fields.stream
        other.remove("t/gone")
        refused("not-found", other.call, "remote-stream-encrypt", b"x", stream=number)


def constraints(c):
    c.add("t/uses", constraints={"max-uses": 3})
    box = c.encrypt("t/uses", b"x")
    refused("invalid-ciphertext", c.decrypt, "t/uses", box, CONTEXT)
    c.rotate("t/uses")
    same(c.decrypt("t/uses", box), b"x")
    refused("limit", c.decrypt, "t/uses", box)
    refused("limit", c.mac, "t/uses", bytes(64))
    same(c.describe("t/uses").key.uses, 3, "uses")
    c.remove("t/uses")
    c.add("t/confirm", constraints={"confirm": 0, "exportable": 0})
    for call in (lambda: c.encrypt("t/confirm", b""), lambda: c.export("t/confirm"), lambda: c.stream_new("t/confirm"),
                 lambda: c.call("remote-stream-new", key="t/confirm", context=None), lambda: c.random(4) and c.mac("t/confirm", bytes(64))):
        refused("declined", call)
    refused("declined", c.rewrap, "t/made", c.encrypt("t/made", b""), None, "t/confirm")
    c.remove("t/confirm")
    c.add("t/short", constraints={"lifetime": 1})
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and any(row.name == "t/short" for row in c.keys()):
        select.select([c.sock], [], [], 0.05)
    refused("not-found", c.describe, "t/short")
    refused("not-found", c.encrypt, "t/short", b"")
    c.add("t/short")
    c.remove("t/short")
    # rewrap counts one use of the key that opens and one of the key that seals
    c.add("t/r"), c.add("t/s")
    box = c.encrypt("t/r", b"")
    c.rewrap("t/r", box, to="t/s")
    same((c.describe("t/r").key.uses, c.describe("t/s").key.uses), (2, 1), "uses of rewrap")
    c.rotate("t/r")
    c.rewrap("t/r", box)
    print("    rewrap under one key:", c.describe("t/r").key.uses - 2, "uses")
    before = c.describe("t/s").key.uses
    c.rewrap("t/s", c.rewrap("t/r", box, to="t/s"))
    print("    rewrap with nothing to change:", c.describe("t/s").key.uses - before - 1, "uses")
    rows = c.describe("t/r")
    same(sum(row.uses for row in rows.versions), rows.key.uses, "uses of the versions")


def exporting(c):
    reply = c.export("t/imported")
    same((reply.payload, reply.fields.version, reply.fields.id), (SECRET, 1, c.describe("t/imported").key.id))
    same(c.export("t/imported", 1).payload, SECRET)
    refused("not-found", c.export, "t/imported", 2)
    refused("not-found", c.export, "t/nobody")
    refused("malformed", c.export, "t/imported", 0, b"no lock was ever")
    refused("denied", c.export, "t/made")
    before = c.describe("t/imported").key.uses
    c.export("t/imported")
    print("    an export is", c.describe("t/imported").key.uses - before, "uses")


def locking(c):
    impatient = new(busy_wait=0)
    refused("malformed", c.lock, b"")
    refused("malformed", c.lock, bytes(1_025))
    refused("malformed", c.unlock, b"")
    same(c.unlock(b"not locked"), False)
    box = c.encrypt("t/made", b"x", CONTEXT)
    c.bind(70, "t/made")
    number = c.call("remote-stream-new", key="t/made", context=None).fields.stream
    phrase = b"correct \xff horse"
    same(c.lock(phrase), True)
    same(c.lock(b"another"), False)
    state, facts = c.status()
    same((state, facts["secret-memory"]), ("locked", "wiped"))
    c.ping()
    with new() as other:
        refused("locked", other.encrypt, "t/made", b"")
        refused("locked", other.encrypt, "-bad", b"")
    for call in (lambda: c.decrypt("t/made", box, CONTEXT), lambda: list(c.keys()), lambda: c.describe("t/made"), lambda: c.random(4),
                 lambda: c.add("t/no"), lambda: c.remove("t/made"), c.remove_all, c.stats, lambda: c.bind(1, "t/made"),
                 lambda: c.batch([("random", b"", {"length": 4})]), lambda: c.export("t/imported", 0, phrase),
                 lambda: c.call("remote-stream-encrypt", b"", stream=number), lambda: raw(c, kms.OPS["batch"], b"", b"")):
        refused("locked", call)
    same(after_end(kms.encode_frame(0x30, 9, b"")), [(1, 9)], "fields that do not decode while locked")
    refused("denied", c.unlock, b"wrong")
    error = refused("busy", impatient.unlock, phrase)
    print("    back-off", error.retry_after_ms, "ms")
    with new() as other:
        same(other.status()[0], "locked")
    same(c.unlock(phrase), True, "busy waited out")
    same(c.unlock(b"any"), False)
    same(c.status()[0], "unlocked")
    same(c.decrypt("t/made", box, CONTEXT), b"x")
    same(c.decrypt(70, box, CONTEXT), b"x", "bindings stay")
    refused("not-found", c.call, "remote-stream-encrypt", b"", stream=number)
    refused("denied", c.export, "t/imported")
    same(c.export("t/imported", 0, phrase).payload, SECRET, "export after a lock")
    refused("denied", c.export, "t/imported", 0, b"wrong")
    refused("busy", impatient.export, "t/imported", 0, phrase)
    same(c.export("t/imported", 0, phrase).payload, SECRET, "export after a back-off")
    refused("denied", c.export, "t/made", 0, phrase)
    impatient.close()


def counting(c):
    before = c.stats()
    c.ping(), c.ping()
    c.batch([("random", b"", {"length": 4})] * 3)
    refused("not-found", c.encrypt, "t/nobody", b"")
    after = c.stats()

    def count(stats, name, status):
        return sum(row.count for row in stats.operations if (row.opcode, row.status) == (kms.OPS[name].code, status))

    same([count(after, *what) - count(before, *what) for what in (("ping", 0), ("batch", 0), ("random", 0), ("encrypt", 6))], [2, 1, 3, 1],
         "counts")
    same(any(row.opcode == 0 for row in after.operations), True, "opcode 0 for what was refused")
    same(all(row.count for row in after.operations), True, "no pair with 0")
    pairs = [(row.opcode, row.status) for row in after.operations]
    same(len(pairs), len(set(pairs)), "each pair once")
    values = {row.name: row.value for row in after.values}
    print("   ", values)
    same(sorted(values), sorted("keys versions key-uses bytes-in bytes-out connections panics".split()), "values")
    same((values["panics"], values["keys"]), (0, len(list(c.keys()))))
    same(after.uptime_ms >= before.uptime_ms, True)


def removing(c):
    keys = len(list(c.keys()))
    same(keys > 3, True)
    same(c.remove("t/made") == c.remove("t/imported"), False)
    token = os.urandom(16)
    same(c.remove_all(token=token), keys - 2, "remove-all")
    c.add("t/after")
    same(c.remove_all(token=token), keys - 2, "remove-all again")
    same([row.name for row in c.keys()], ["t/after"], "was not carried out again")
    same(c.remove_all(), 1)
    same(c.remove_all(), 0)


STEPS = (hello_and_status, bad_frames, peers, adding, describing, listing, tokens, messages, wrapping, rewrapping, macs, randoms, binding, batches,
         pipelining, streams, constraints, exporting, locking, counting, removing)


def main() -> int:
    global PATH
    PATH = sys.argv[1]
    failed = 0
    for step in STEPS:
        begin = time.monotonic()
        print(f"{step.__name__} …", flush=True)
        try:
            with new() as c:
                step(c)
            print(f"  ok, {time.monotonic() - begin:.2f} s")
        except Exception as error:                              # the next steps say more than the end would
            failed += 1
            at = next(frame for frame in reversed(traceback.extract_tb(error.__traceback__)) if frame.name not in ("same", "refused")
                      and frame.filename == __file__)
            print(f"  FAILED, line {at.lineno}: {at.line}\n    {type(error).__name__}: {error}")
    print(f"{CHECKS} checks, {len(STEPS) - failed} of {len(STEPS)} steps passed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
