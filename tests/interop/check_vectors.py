"""python3 check_vectors.py VECTORS_DIR: every vector of protocol/ and formats/ against kms_client.py and kms_decoder.py."""

import array
import collections
import os
import pathlib
import socket
import sys
import tempfile
import unittest
from types import SimpleNamespace

import kms_client as kms
import kms_decoder as decoder

VECTORS: pathlib.Path
COUNTS: collections.Counter = collections.Counter()


def read(file: pathlib.Path) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """The lines of one vector: by name, and all in order (names may repeat)."""
    pairs = [tuple(line.split(": ", 1)) for line in file.read_text().splitlines() if line and not line.startswith("#")]
    pairs = [(pair[0].rstrip(":"), pair[1] if len(pair) > 1 else "") for pair in pairs]
    return dict(pairs), pairs


class Protocol(unittest.TestCase):
    def test_vectors(self):
        for file in sorted((VECTORS / "protocol").glob("*.txt")):
            with self.subTest(file=file.name):
                one, lines = read(file)
                COUNTS["protocol", "good" if one["expect"] == "success" else "bad"] += 1
                (self.good if one["expect"] == "success" else self.bad)(one, lines)

    def decode(self, one: dict[str, str]) -> decoder.Message:
        """Decodes with the decoder; `message` says whether the frame is a request or a reply, and to what."""
        frame, message = bytes.fromhex(one["frame"]), one["message"]
        if message.startswith("reply to "):
            return decoder.decode_reply(kms.OPS[message.removeprefix("reply to ")], frame)
        return decoder.decode_request(frame)

    def good(self, one, lines):
        message = self.decode(one)
        self.assertIsNone(decoder.broken_rules(message))
        self.assertEqual(message.head.code, int(one["code"], 16))
        self.assertEqual(message.head.request_id, int(one["request-id"]))
        self.assertEqual(one["message"].split()[-1], message.op.name)
        self.assertEqual([f"{path} = {text}" for path, text in message.rows()], [text for name, text in lines if name == "field"])
        self.assertEqual(message.payload, bytes.fromhex(one.get("payload", "")))
        self.assertEqual(message.encode().hex(), one["frame"])
        if message.op.name == "batch":                              # a line `item` for each frame in the payload
            self.assertEqual([frame.hex() for frame in decoder.batch_frames(message.payload)],
                             [text for name, text in lines if name == "item"])
        self.assertNotIn("!", decoder.frame_text(message).replace('= "', "").split("payload:")[0])
        if message.status is not None:                              # the client sees the same
            head, body = kms.split_frame(bytes.fromhex(one["frame"]))
            try:
                self.assertEqual(kms.decode_reply(message.op, head, body), (message.fields, message.payload))
                self.assertEqual(message.status, 0)
            except kms.Refused as refused:
                self.assertEqual((refused.status, refused.retry_after_ms), (message.status, message.fields.retry_after_ms))
                self.assertEqual(refused.name, decoder.STATUSES[message.status][0])

    def bad(self, one, lines):
        then = {"incomplete": "waits", "unsupported: opcode": "stays", "malformed: key name": "stays", "unsupported: constraint": "stays",
                "malformed: batch": "stays"}
        try:
            message = self.decode(one)
            found = decoder.broken_rules(message)
        except kms.FrameError as error:
            found = error.outcome
        self.assertEqual(found, one["expect"])
        self.assertEqual(then.get(found, "closes"), one["then"])
        if one["message"].startswith("reply to "):
            with self.assertRaises(kms.FrameError):
                kms.decode_reply(kms.OPS[one["message"].removeprefix("reply to ")], *kms.split_frame(bytes.fromhex(one["frame"])))


class Formats(unittest.TestCase):
    def test_vectors(self):
        for file in sorted((VECTORS / "formats").glob("*.txt")):
            with self.subTest(file=file.name):
                one, lines = read(file)
                COUNTS["formats", one["operation"]] += 1
                try:
                    outcome = "success"
                    getattr(self, one["operation"].replace("-", "_"))(one, lines)
                except decoder.CipherError as error:
                    outcome = error.outcome
                self.assertEqual(outcome, one["expect"])

    @staticmethod
    def context(one, lines) -> bytes:
        if "context_bytes" in one:
            extra = one.get("context_repeat", "00 0").split()
            return bytes.fromhex(one["context_bytes"]) + bytes.fromhex(extra[0]) * int(extra[1])
        pairs = [text.split("=") for name, text in lines if name == "context"]
        return kms.canonical_context({bytes.fromhex(key): bytes.fromhex(value) for key, value in pairs})

    @staticmethod
    def plaintext(one) -> bytes | None:
        if "plaintext_repeat" in one:
            byte, count = one["plaintext_repeat"].split()
            return bytes.fromhex(byte) * int(count)
        return bytes.fromhex(one["plaintext"]) if "plaintext" in one else None

    def make(self, one, lines, purpose) -> bytes:
        kek, context = bytes.fromhex(one["kek"]), self.context(one, lines)
        header = decoder.Header(purpose, bytes.fromhex(one["key_id"]), int(one["version"]))
        if purpose == decoder.STREAM:
            parts = [bytes.fromhex(one[name]) for name in ("dek", "dek_salt", "body_salt")]
            return decoder.seal_stream(kek, header, context, *parts, self.plaintext(one))
        if purpose == decoder.TAG_OF_INPUT:
            return decoder.make_tag(kek, header, context, decoder.sha512(self.plaintext(one)))
        return decoder.seal_message(kek, header, context, bytes.fromhex(one["salt"]), self.plaintext(one))

    def ciphertext(self, one, lines, purpose) -> bytes:
        """As it stands, or made and edited; where it stands and can be made, both have to be the same."""
        if "edit" not in one:
            data = bytes.fromhex(one["ciphertext"])
            if one["expect"] == "success" and ("salt" in one or "dek" in one or purpose == decoder.TAG_OF_INPUT):
                COUNTS["formats", "made again"] += 1
                self.assertEqual(self.make(one, lines, purpose).hex(), data.hex())
            return data
        data = bytearray(self.make(one, lines, purpose))
        for name, edit in lines:
            if name == "edit":
                self.edit(data, *edit.split(), first=188 if purpose == decoder.STREAM else 84)
        self.assertEqual(decoder.sha512(data).hex(), one["ciphertext_sha512"])
        return bytes(data)

    @staticmethod
    def edit(data: bytearray, what: str, *arguments: str, first: int):
        def chunk(number: str) -> slice:
            begin = first + 16_400 * int(number)
            return slice(begin, begin + 16_400)

        match what, *arguments:
            case "flip", offset, mask:
                data[int(offset)] ^= int(mask, 16)
            case "set", offset, text:
                data[int(offset):int(offset) + len(text) // 2] = bytes.fromhex(text)
            case "truncate", length:
                del data[int(length):]
            case "append", text:
                data += bytes.fromhex(text)
            case "swap-chunks", one, other:
                data[chunk(one)], data[chunk(other)] = data[chunk(other)], data[chunk(one)]
            case "drop-chunk", one:
                del data[chunk(one)]
            case "copy-chunk", one, other:
                data[chunk(other)] = data[chunk(one)]
            case "append-chunk", one:
                data += data[chunk(one)]
            case "none",:
                pass
            case _:
                raise ValueError(what)

    def open_message(self, one, lines, purpose=decoder.MESSAGE):
        data = self.ciphertext(one, lines, purpose)
        self.text(one, data)
        plaintext = decoder.open_message(bytes.fromhex(one["kek"]), data, self.context(one, lines), purpose)
        self.assertEqual(plaintext, self.plaintext(one))

    def open_wrapped_key(self, one, lines):
        self.open_message(one, lines, decoder.WRAPPED_KEY)

    def open_stream(self, one, lines):
        data = self.ciphertext(one, lines, decoder.STREAM)
        self.text(one, data)
        self.assertEqual(decoder.open_stream(bytes.fromhex(one["kek"]), data, self.context(one, lines)), self.plaintext(one))

    def text(self, one, data):
        """The readable text finds the same lengths."""
        text = decoder.ciphertext_text(data)
        if one["expect"] == "success":
            self.assertNotIn("!", text)
            self.assertIn(f" {len(self.plaintext(one))} bytes of plaintext", text)
            self.assertIn(one["key_id"], text)

    def rewrap(self, one, lines):
        header = decoder.Header(decoder.STREAM, bytes.fromhex(one["key_id"]), int(one["new_version"]))
        result = decoder.rewrap_stream(bytes.fromhex(one["kek"]), self.ciphertext(one, lines, decoder.STREAM),
                                       bytes.fromhex(one["new_kek"]), header, bytes.fromhex(one["new_dek_salt"]))
        self.assertEqual(result.hex(), one["result"])

    def check_tag(self, one, lines):
        data = self.ciphertext(one, lines, decoder.TAG_OF_INPUT)
        decoder.check_tag(bytes.fromhex(one["kek"]), data, self.context(one, lines), decoder.sha512(self.plaintext(one)))

    def check_value(self, one, lines):
        self.assertEqual(decoder.check_value(bytes.fromhex(one["kek"])).hex(), one["check_value"])

    def parse_context(self, one, lines):
        data = self.context(one, lines)
        self.assertEqual(kms.canonical_context(dict(decoder.parse_context(data))), data)


class Server(unittest.TestCase):
    """What the client does with an agent that is wrong: section 8, and section 2.2 for what it cannot decode."""

    HELLO = kms.WELCOME.write(SimpleNamespace(
        version=1, frame_max=kms.FRAME_MAX, message_max=65_536, context_max=8_192, context_pairs_max=64, in_flight_max=4, page_rows_max=256,
        remote_streams_max=16, opcodes=sorted(kms.OPS_BY_CODE), constraints=[1], features=0))

    def setUp(self):
        COUNTS["server", "checks"] += 1
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.path = str(self.folder / "agent.sock")
        self.listener = socket.socket(socket.AF_UNIX)
        self.addCleanup(self.listener.close)
        self.listener.bind(self.path)
        self.listener.listen()
        self.listener.settimeout(20)

    def serve(self, serve, uid=None):
        """A process that accepts one connection, reads the hello and goes on with `serve`; as another user, perhaps."""
        child = os.fork()
        if child:
            self.addCleanup(os.waitpid, child, 0)
            return
        try:
            sock, _ = self.listener.accept()
            if uid is not None:
                os.setuid(uid)
            sock.recv(100)
            serve(sock)
        finally:
            os._exit(0)

    def hello(self, sock, request_id=0):
        sock.sendall(kms.encode_frame(0, request_id, self.HELLO))

    def client(self, **options) -> kms.Client:
        client = kms.Client.connect(self.path, **options)
        self.addCleanup(client.close)
        return client

    def wrong(self, error, serve, uid=None, call=lambda client: client.ping()):
        self.serve(serve, uid)
        with self.assertRaises(error):
            call(self.client())

    def test_a_reply_in_many_pieces(self):
        def serve(sock):
            for byte in kms.encode_frame(0, 0, self.HELLO):
                sock.sendall(bytes((byte,)))
            for reply in kms.encode_frame(0, 1, b""), kms.encode_frame(13, 2, b"\1\0\0\0"), kms.encode_frame(0, 3, b""):
                sock.recv(100)
                for byte in reply:
                    sock.sendall(bytes((byte,)))
        self.serve(serve)
        client = self.client()
        client.ping()
        client.ping()                                               # busy for a millisecond, then ok

    def test_replies_in_any_order(self):
        def serve(sock):
            self.hello(sock)
            data = b""
            while len(data) < 48:
                data += sock.recv(100)
            sock.sendall(b"".join(kms.encode_frame(0, number, b"") for number in (3, 1, 2)))
        self.serve(serve)
        client = self.client()
        for pending in [client.submit("ping") for _ in range(3)]:
            client.wait(pending)

    def test_frames_that_are_none(self):
        for bad in (kms.encode_frame(0, 9, b""), kms.encode_frame(17, 1, b"\0\0\0\0"), kms.encode_frame(0, 1, b"\0"),
                    kms.encode_frame(0, 1, b"", b"payload"), kms.encode_frame(6, 1, b""), b"\0\0\0\0\2" + bytes(11), b"\xf1\xff\x0f\0\1" + bytes(11)):
            with self.subTest(bad=bad):
                self.wrong(kms.FrameError, lambda sock: (self.hello(sock), sock.recv(100), sock.sendall(bad)))

    def test_a_connection_that_ends(self):
        self.wrong(kms.ConnectionLost, lambda sock: None)
        self.wrong(kms.ConnectionLost, lambda sock: (self.hello(sock), sock.recv(100)))

    def test_another_request_id_for_hello(self):
        self.wrong(kms.FrameError, lambda sock: self.hello(sock, 1))

    def test_an_unsupported_version(self):
        self.wrong(kms.Refused, lambda sock: sock.sendall(kms.encode_frame(2, 0, bytes(4))))

    def test_descriptors_with_hello(self):
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0]))]
        self.wrong(kms.Untrusted, lambda sock: sock.sendmsg([kms.encode_frame(0, 0, self.HELLO)], rights))

    def test_no_socket(self):
        with self.assertRaises(kms.NoAgent):
            kms.Client.connect(self.path + "-")
        (self.folder / "file").touch()
        with self.assertRaises(kms.Untrusted):
            kms.Client.connect(str(self.folder / "file"))

    def test_a_folder_that_everybody_can_write_to(self):
        self.folder.chmod(0o777)
        with self.assertRaises(kms.Untrusted):
            self.client()
        self.folder.chmod(0o1777)
        self.serve(self.hello)
        self.client()

    def test_symlinks(self):
        (self.folder / "below").mkdir()
        (self.folder / "below" / "link").symlink_to("../agent.sock")
        (self.folder / "loop").symlink_to("loop")
        self.assertEqual(kms.trusted_socket(str(self.folder / "below/link"))[0], os.path.realpath(self.path))
        with self.assertRaises(kms.Untrusted):
            kms.trusted_socket(str(self.folder / "loop"))

    def test_other_users(self):
        self.assertEqual(os.geteuid(), 0, "this test becomes other users, so it needs root")
        self.wrong(kms.Untrusted, self.hello, uid=65_534)           # the kernel says who sent the reply
        self.serve(self.hello, uid=65_534)
        self.client(trusted=(65_534,))
        os.chown(self.path, 65_534, -1)
        with self.assertRaises(kms.Untrusted):
            self.client()
        os.chown(self.folder, 65_534, -1)                           # below /tmp, which others can write to
        with self.assertRaises(kms.Untrusted):
            self.client()
        with tempfile.TemporaryDirectory(dir="/run") as folder:     # root's alone: its owner is trusted
            os.chmod(folder, 0o755)
            below = pathlib.Path(folder) / "kms-agent"
            below.mkdir()
            os.chown(below, 65_534, -1)
            with socket.socket(socket.AF_UNIX) as other:
                other.bind(str(below / "agent.sock"))
            os.chown(below / "agent.sock", 65_534, -1)
            self.assertIn(65_534, kms.trusted_socket(str(below / "agent.sock"))[1])


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    VECTORS = pathlib.Path(sys.argv.pop(1))
    outcome = unittest.main(exit=False).result
    for (folder, what), count in sorted(COUNTS.items()):
        print(f"{folder}: {count} {what}")
    sys.exit(not outcome.wasSuccessful())
