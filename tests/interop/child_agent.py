"""python3 child_agent.py AGENT: starts the agent as a child with --stdio and speaks with it over two pipes (kms_client.py has the frames)."""

import subprocess
import sys
from types import SimpleNamespace

import kms_client as kms


def ask(agent, name, request_id, payload=b"", **fields):
    """One request, and its reply."""
    op = kms.OPS[name]
    agent.stdin.write(kms.encode_frame(op.code, request_id, op.request.write(SimpleNamespace(**fields)), payload))
    agent.stdin.flush()
    received = bytearray()
    while (frame := kms.split_frame(received)) is None:
        data = agent.stdout.read1(65_536)
        assert data, "the agent closed its end"
        received += data
    head, body = frame
    assert head.request_id == request_id and len(received) == kms.HEAD.size + head.length, head
    return kms.decode_reply(op, head, body)


def main(program):
    with subprocess.Popen([program, "--memory", "--stdio"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as agent:
        hello = ask(agent, "hello", 1, version=kms.VERSION).fields
        assert hello.version == kms.VERSION
        # More than one buffer of the pump in one reply.
        assert len(ask(agent, "random", 2, length=65_536).payload) == 65_536
        ask(agent, "ping", 3)
        agent.stdin.close()
        assert agent.stdout.read() == b"", "something that was not asked for"
        assert agent.wait(60) == 0


main(sys.argv[1])
