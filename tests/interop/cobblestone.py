#!/usr/bin/env python3
"""Reads and writes kms-agent's ciphertexts, from docs/formats.md alone.

A second implementation, so that a mistake shared by our own writer and decoder is seen. The sealed bodies are those of
the package `cryptography` (50 or newer); what is ours, headers and contexts and heads, is written here from the text.

    cobblestone.py seal-message --kek HEX --key-id HEX --version N [--context K=V]... < plain > sealed
    cobblestone.py open-message ... ; seal-stream ... ; open-stream ...
    cobblestone.py vectors FOLDER          every vector, its ciphertext rebuilt from its fields where it is described

Exit status: 0 done, 1 invalid-ciphertext, 2 malformed, unsupported or too large, 3 another key or version is named,
64 usage; for `vectors` 1 when any is not as it says. Nothing is written to stdout before all of it was found authentic.
"""

import argparse
import hashlib
import hmac
import os
import pathlib
import shutil
import struct
import sys
import tempfile

from cryptography.cobblestone import Cobblestone256Decryptor, Cobblestone256Encryptor
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

HEADER = struct.Struct(">3sBBBH16sI")
MAGIC, FORMAT, SUITE = b"\x92\x6b\x1c", 1, 1
MESSAGE, WRAPPED_KEY, STREAM, SHARED, INPUT_TAG = 1, 2, 3, 4, 5
MESSAGE_MAX, CHUNK, TAG = 65536, 16384, 16
REWRAP_LEN, HEAD_LEN, INPUT_TAG_LEN = 132, 188, 60
CONTEXT_PAIRS_MAX, CONTEXT_LEN_MAX = 64, 8192
PIECE = 1 << 20


class Refused(Exception):
    """An outcome of section 11."""

    def __init__(self, outcome, status):
        super().__init__(outcome)
        self.status = status


def invalid():
    return Refused("invalid-ciphertext", 1)


def refuse(outcome):
    return Refused(outcome, 2)


# Sections 4 and 5: header and context


def parse_header(data, purposes):
    if len(data) < HEADER.size:
        raise refuse("malformed: header length")
    magic, form, suite, purpose, flags, key_id, version = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise refuse("malformed: magic")
    if form != FORMAT:
        raise refuse("unsupported: format")
    if suite != SUITE:
        raise refuse("unsupported: suite")
    if purpose not in (MESSAGE, WRAPPED_KEY, STREAM, SHARED, INPUT_TAG):
        raise refuse("unsupported: purpose")
    if flags != 0:
        raise refuse("unsupported: flags")
    if version == 0:
        raise refuse("malformed: key version")
    if purpose not in purposes:
        raise refuse("malformed: purpose")
    return purpose, key_id, version


def make_header(purpose, key_id, version):
    return HEADER.pack(MAGIC, FORMAT, SUITE, purpose, 0, key_id, version)


def canonical(pairs):
    keys = [key for key, _ in pairs]
    if len(pairs) > CONTEXT_PAIRS_MAX:
        raise refuse("malformed: context too many pairs")
    if b"" in keys:
        raise refuse("malformed: context empty key")
    if len(set(keys)) != len(keys):
        raise refuse("malformed: context duplicate key")
    out = struct.pack(">I", len(pairs))
    for key, value in sorted(pairs):
        out += struct.pack(">I", len(key)) + key + struct.pack(">I", len(value)) + value
    if len(out) > CONTEXT_LEN_MAX:
        raise refuse("malformed: context too long")
    return out


def check_context(data):
    if len(data) > CONTEXT_LEN_MAX:
        raise refuse("malformed: context too long")
    place = 0

    def take(length):
        nonlocal place
        if len(data) - place < length:
            raise refuse("malformed: context truncated")
        place += length
        return data[place - length : place]

    def number():
        return struct.unpack(">I", take(4))[0]

    count = number()
    if count > CONTEXT_PAIRS_MAX:
        raise refuse("malformed: context too many pairs")
    previous = None
    for _ in range(count):
        key = take(number())
        if not key:
            raise refuse("malformed: context empty key")
        if previous is not None and key == previous:
            raise refuse("malformed: context duplicate key")
        if previous is not None and key < previous:
            raise refuse("malformed: context not sorted")
        take(number())
        previous = key
    if place != len(data):
        raise refuse("malformed: context trailing bytes")


# Sections 7 to 9: what is sealed under what


def message_context(header, context):
    return b"kms-agent/v1\0" + header + context


def dek_context(header):
    return b"kms-agent/v1/dek\0" + header


def body_context(context):
    return b"kms-agent/v1/body\0" + bytes([STREAM]) + context


def possible(chunks_len):
    return chunks_len % (CHUNK + TAG) >= TAG


def decryptor_pieces(key, context, pieces):
    """Opens a sealed body, a piece at a time; nothing is the caller's to use before the last piece has come."""
    try:
        decryptor = Cobblestone256Decryptor(key, context)
        for piece in pieces:
            yield decryptor.update(piece)
        yield decryptor.finalize()
    except Exception as error:  # whatever the package calls it, it is one failure
        raise invalid() from error


def open_body(key, context, body):
    return b"".join(decryptor_pieces(key, context, [body]))


def seal_body(key, context, plaintext):
    encryptor = Cobblestone256Encryptor(key, context)
    return encryptor.update(plaintext) + encryptor.finalize()


def open_message(kek, data, purposes, context):
    parse_header(data, purposes)
    if len(data) > 100 + MESSAGE_MAX + TAG * (MESSAGE_MAX // CHUNK):
        raise refuse("too-large")
    if len(data) < 100 or not possible(len(data) - 84):
        raise invalid()
    header = data[: HEADER.size]
    return open_body(kek, message_context(header, context), data[HEADER.size :])


def unwrap_dek(kek, head):
    if len(head) < REWRAP_LEN:
        raise invalid()
    dek = open_body(kek, dek_context(head[: HEADER.size]), head[HEADER.size : REWRAP_LEN])
    if len(dek) != 32:
        raise invalid()
    return dek


def wrap_dek(kek, header, dek):
    return header + seal_body(kek, dek_context(header), dek)


def open_stream_pieces(kek, head, rest, context):
    """`rest` gives the bytes after the head, in pieces."""
    if len(head) < HEAD_LEN:
        raise invalid()
    dek = unwrap_dek(kek, head)
    yield from decryptor_pieces(dek, body_context(context), iter_chain(head[REWRAP_LEN:], rest))


def iter_chain(first, rest):
    yield first
    yield from rest


def read_pieces(file):
    while piece := file.read(PIECE):
        yield piece


# The vectors of section 15. Their salts are given, and the package draws its own, so bodies are sealed by hand here.


def expand(key, info, length):
    out, block, counter = b"", b"", 1
    while len(out) < length:
        block = hmac.digest(key, block + info + bytes([counter]), hashlib.sha512)
        out += block
        counter += 1
    return out[:length]


def seal_with_salt(key, context, salt, plaintext):
    info = b"c2sp.org/chunked-encryption@v1+AEAD_AES_256_GCM\0" + salt + context
    okm = expand(key, info, 76)
    aead, base = AESGCM(okm[:32]), int.from_bytes(okm[32:44], "big")
    out = salt + okm[44:]
    for number in range(len(plaintext) // CHUNK + 1):
        nonce = (base ^ number).to_bytes(12, "big")
        out += aead.encrypt(nonce, plaintext[number * CHUNK : (number + 1) * CHUNK], None)
    return out


def make_tag(kek, header, context, digest):
    return header + expand(kek, b"kms-agent/v1/mac\0" + header + context + digest, 32)


def check_tag(kek, tag, context, digest):
    parse_header(tag, [INPUT_TAG])
    if len(tag) != INPUT_TAG_LEN:
        raise invalid()
    if not hmac.compare_digest(make_tag(kek, tag[: HEADER.size], context, digest), tag):
        raise invalid()


class Vector:
    PURPOSES = {
        "open-message": MESSAGE,
        "open-wrapped-key": WRAPPED_KEY,
        "open-stream": STREAM,
        "rewrap": STREAM,
        "check-tag": INPUT_TAG,
    }

    def __init__(self, text):
        self.fields = {}
        for line in text.splitlines():
            name, _, value = line.partition(":")
            self.fields.setdefault(name, []).append(value.strip())

    def get(self, name):
        return self.fields[name][0]

    def has(self, name):
        return name in self.fields

    def hex(self, name):
        return bytes.fromhex(self.get(name))

    def context(self):
        if self.has("context_bytes"):
            data = self.hex("context_bytes")
            if self.has("context_repeat"):
                piece, count = self.get("context_repeat").split()
                data += bytes.fromhex(piece) * int(count)
            return data
        pairs = [pair.split("=") for pair in self.fields.get("context", [])]
        return canonical([(bytes.fromhex(key), bytes.fromhex(value)) for key, value in pairs])

    def plaintext(self):
        if self.has("plaintext_repeat"):
            byte, count = self.get("plaintext_repeat").split()
            return bytes.fromhex(byte) * int(count)
        return self.hex("plaintext")

    def digest(self):
        return hashlib.sha512(self.plaintext()).digest()

    def seal(self):
        purpose = self.PURPOSES[self.get("operation")]
        header = make_header(purpose, self.hex("key_id"), int(self.get("version")))
        kek, context = self.hex("kek"), self.context()
        if purpose == INPUT_TAG:
            return make_tag(kek, header, context, self.digest())
        plaintext = self.plaintext()
        if purpose == STREAM:
            dek = self.hex("dek")
            head = header + seal_with_salt(kek, dek_context(header), self.hex("dek_salt"), dek)
            return head + seal_with_salt(dek, body_context(context), self.hex("body_salt"), plaintext)
        return header + seal_with_salt(kek, message_context(header, context), self.hex("salt"), plaintext)

    def ciphertext(self):
        if self.has("ciphertext"):
            return self.hex("ciphertext")
        data = bytearray(self.seal())
        start = HEAD_LEN if self.PURPOSES[self.get("operation")] == STREAM else 84
        for step in self.fields["edit"]:
            word, *args = step.split()
            chunks = [data[i : i + CHUNK + TAG] for i in range(start, len(data), CHUNK + TAG)]
            if word == "flip":
                data[int(args[0])] ^= int(args[1], 16)
            elif word == "set":
                data[int(args[0]) : int(args[0]) + len(args[1]) // 2] = bytes.fromhex(args[1])
            elif word == "truncate":
                del data[int(args[0]) :]
            elif word == "append":
                data += bytes.fromhex(args[0])
            elif word != "none":
                if word == "swap-chunks":
                    i, j = map(int, args)
                    chunks[i], chunks[j] = chunks[j], chunks[i]
                elif word == "drop-chunk":
                    del chunks[int(args[0])]
                elif word == "copy-chunk":
                    chunks[int(args[1])] = chunks[int(args[0])]
                elif word == "append-chunk":
                    chunks.append(chunks[int(args[0])])
                else:
                    raise ValueError(f"unknown edit {step}")
                data[start:] = b"".join(chunks)
        if hashlib.sha512(data).hexdigest() != self.get("ciphertext_sha512"):
            raise ValueError("another ciphertext than the vector's")
        return bytes(data)

    def run(self):
        operation = self.get("operation")
        if operation == "check-value":
            return expand(self.hex("kek"), b"kms-agent/v1/check\0", 8) == self.hex("check_value")
        if operation == "parse-context":
            check_context(self.context())
            return True
        purpose, kek, data = self.PURPOSES[operation], self.hex("kek"), self.ciphertext()
        context = self.context()
        check_context(context)
        if operation == "rewrap":
            parse_header(data, [STREAM])
            dek = unwrap_dek(kek, data[:REWRAP_LEN])
            header = make_header(STREAM, self.hex("key_id"), int(self.get("new_version")))
            wrapped = seal_with_salt(self.hex("new_kek"), dek_context(header), self.hex("new_dek_salt"), dek)
            return header + wrapped + data[REWRAP_LEN:] == self.hex("result")
        if purpose == INPUT_TAG:
            check_tag(kek, data, context, self.digest())
            named = parse_header(data, [purpose]) == (purpose, self.hex("key_id"), int(self.get("version")))
            return named and self.seal() == data
        if purpose == STREAM:
            parse_header(data, [STREAM])
            opened = b"".join(open_stream_pieces(kek, data[:HEAD_LEN], [data[HEAD_LEN:]], context))
        else:
            opened = open_message(kek, data, [purpose], context)
        named = parse_header(data, [purpose]) == (purpose, self.hex("key_id"), int(self.get("version")))
        again = not (self.has("salt") or self.has("dek")) or self.seal() == data
        return named and again and opened == self.plaintext()


def run_vectors(folder):
    failed = count = 0
    for path in sorted(pathlib.Path(folder).glob("*.txt")):
        vector = Vector(path.read_text())
        try:
            outcome = "success" if vector.run() else "another result"
        except Refused as refused:
            outcome = str(refused)
        except (KeyError, ValueError) as error:
            outcome = f"not a vector: {error}"
        count += 1
        if outcome != vector.get("expect"):
            failed += 1
            print(f"{path.name}: expected {vector.get('expect')}, was {outcome}", file=sys.stderr)
    print(f"{count - failed} of {count} vectors")
    return 0 if count and not failed else 1


# Command line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.print_usage(sys.stderr)
        self.exit(64, f"{self.prog}: error: {message}\n")


def hex_of(length):
    def parse(text):
        data = bytes.fromhex(text)
        if len(data) != length:
            raise ValueError
        return data

    parse.__name__ = f"{length} bytes in hexadecimal"
    return parse


def version_number(text):
    number = int(text)
    if not 1 <= number < 1 << 32:
        raise ValueError
    return number


def pair(text):
    key, sign, value = text.partition("=")
    if not key or not sign:
        raise ValueError
    return os.fsencode(key), os.fsencode(value)


def arguments():
    parser = Parser(prog="cobblestone.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name in ("open-message", "open-stream", "seal-message", "seal-stream"):
        command = commands.add_parser(name)
        command.add_argument("--kek", type=hex_of(32), required=True, help="the key version's 32 bytes")
        command.add_argument("--key-id", type=hex_of(16), required=True)
        command.add_argument("--version", type=version_number, required=True)
        command.add_argument("--context", type=pair, action="append", default=[], metavar="K=V")
        if name.endswith("message"):
            command.add_argument("--wrapped-key", action="store_true", help="purpose 2 instead of 1")
    commands.add_parser("vectors").add_argument("folder")
    return parser.parse_args()


def check_named(named, args):
    if named[1:] != (args.key_id, args.version):
        raise Refused(f"wrong key: {named[1].hex()} version {named[2]}", 3)


def run(args):
    if args.command == "vectors":
        return run_vectors(args.folder)
    source, target = sys.stdin.buffer, sys.stdout.buffer
    context = canonical(args.context)
    purpose = STREAM
    if args.command.endswith("message"):
        purpose = WRAPPED_KEY if args.wrapped_key else MESSAGE
    header = make_header(purpose, args.key_id, args.version)
    with tempfile.SpooledTemporaryFile(max_size=64 * PIECE) as held:
        if args.command == "seal-message":
            plaintext = source.read(MESSAGE_MAX + 1)
            if len(plaintext) > MESSAGE_MAX:
                raise refuse("too-large")
            held.write(header + seal_body(args.kek, message_context(header, context), plaintext))
        elif args.command == "seal-stream":
            dek = os.urandom(32)
            held.write(wrap_dek(args.kek, header, dek))
            encryptor = Cobblestone256Encryptor(dek, body_context(context))
            for piece in read_pieces(source):
                held.write(encryptor.update(piece))
            held.write(encryptor.finalize())
        elif args.command == "open-message":
            data = source.read(2 * MESSAGE_MAX)
            check_named(parse_header(data, [purpose]), args)
            held.write(open_message(args.kek, data, [purpose], context))
        else:
            head = source.read(HEAD_LEN)
            check_named(parse_header(head, [STREAM]), args)
            for piece in open_stream_pieces(args.kek, head, read_pieces(source), context):
                held.write(piece)
        held.seek(0)
        shutil.copyfileobj(held, target, PIECE)
        target.flush()
    return 0


def main():
    try:
        return run(arguments())
    except Refused as refused:
        print(f"cobblestone.py: error: {refused}", file=sys.stderr)
        return refused.status


if __name__ == "__main__":
    sys.exit(main())
