"""A real-socket chat server for the Locust tests: it remembers what arrived, by content, and what it took.

    python tests/support/locust_server.py [--delay-ms 200] [--together 500] [--fault http_500]

Prints its port, serves loopback until its stdin closes. A prompt may ask for a fault: `[fault:reset] ...`.
GET /truth: what was seen, by the server's own clock. GET /pause: from now on no answers, until GET /resume.
Token counts follow from the text alone.
"""

import argparse
import asyncio
import gzip
import json
import re
import socket
import struct
import sys
import time
from collections import Counter

STREAM_MS = 40.0  # from the first token of a stream to its last
FAULT = re.compile(r"\[fault:(\w+)\]")


def usage_of(text):
    """The tokens that this server counts for a prompt: a test can do the same sum."""
    tokens_in, tokens_out = len(text.split()) + 10, 1 + len(text) % 7
    return {
        "prompt_tokens": tokens_in,
        "completion_tokens": tokens_out,
        "total_tokens": tokens_in + tokens_out,
    }


def head(status, length, extra=""):
    lines = f"HTTP/1.1 {status} Whatever\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n"
    return (lines + extra + "\r\n").encode()


def whole(status, body, extra=""):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return head(status, len(body), extra) + body


def chat(text):
    return {
        "id": "x",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "ok"}, "finish_reason": "stop"}],
        "usage": {**usage_of(text), "prompt_tokens_details": {"cached_tokens": 2}},
    }


def chunks(*events):
    """Events of a stream, each in an HTTP chunk of its own."""
    return b"".join(b"%x\r\n%s\r\n" % (len(event), event) for event in (b"data: %s\n\n" % event for event in events))


def piece(usage=None, finish=None, **delta):
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
    return json.dumps({"id": "x", "choices": [] if usage else choices, "usage": usage}).encode()


STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def error(message):
    return {"error": {"message": message, "type": "x", "code": None}}


def reply(fault, text, key):
    """(bytes, close afterwards) for a fault; None bytes: reset the connection."""
    good = chat(text)
    if fault.startswith("http_"):
        return whole(int(fault[5:]), error(f"refused {key} \x1b[31mred\x1b[0m\nline"), "Retry-After: 7\r\n"), False
    return {
        "": lambda: (whole(200, good), False),
        "reset": lambda: (None, True),
        "closed": lambda: (b"", True),
        "truncated": lambda: (head(200, 5000) + b'{"choices":', True),
        "garbage": lambda: (b"SSH-2.0-nothing\r\n\r\n", True),
        "bad_json": lambda: (whole(200, b"<html>no</html>"), False),
        "not_utf8": lambda: (whole(200, b'{"choices": "\xff\xfe"}'), False),
        "no_choices": lambda: (whole(200, {"choices": []}), False),
        "null": lambda: (whole(200, b"null"), False),
        "error_body": lambda: (whole(200, error("=cmd|' /C calc'!A0")), False),
        "empty": lambda: (whole(200, b""), False),
        "no_usage": lambda: (whole(200, {**good, "usage": None}), False),
        "mad_usage": lambda: (
            whole(200, {**good, "usage": {"prompt_tokens": -1, "total_tokens": "9"}}),
            False,
        ),
        "gzip": lambda: (
            whole(200, gzip.compress(json.dumps(good).encode()), "Content-Encoding: gzip\r\n"),
            False,
        ),
        "no_length": lambda: (b"HTTP/1.0 200 OK\r\n\r\n" + json.dumps(good).encode(), True),
        "interim": lambda: (b"HTTP/1.1 102 Processing\r\n\r\n" + whole(200, good), False),
        "says_close": lambda: (whole(200, good, "Connection: close\r\n"), True),
        "just_closes": lambda: (whole(200, good), True),
    }[fault]()


ANSWERED = ("gzip", "no_length", "interim", "says_close", "just_closes")  # good, in a way of their own


class Truth:
    """What the server saw."""

    def __init__(self):
        self.texts: Counter[str] = Counter()
        self.took_ms = {}
        self.first_ms = {}  # of streams: until their first token
        self.usage = {}
        self.tokens: Counter[str] = Counter()
        self.bodies = {}
        self.authorization: Counter[str] = Counter()
        self.connections = self.now_open = self.now = self.most = self.answered = 0
        self.total_ms = 0.0
        self.first_s = None
        self.held = []
        self.paused = False

    def release(self, delay_s):
        """Answer what is held, after the delay."""
        if self.paused:
            return
        held, self.held = self.held, []
        for answer, *request in held:
            asyncio.get_running_loop().call_later(delay_s, answer, *request)

    def as_json(self):
        return json.dumps({name: value for name, value in vars(self).items() if name != "held"}).encode()


class Connection(asyncio.Protocol):
    def __init__(self, options, truth):
        self.options, self.truth, self.buffer = options, truth, b""

    def connection_made(self, transport):
        self.transport = transport
        self.truth.connections += 1
        self.truth.now_open += 1

    def connection_lost(self, error):
        self.truth.now_open -= 1

    def data_received(self, data):
        self.buffer += data
        while True:
            end = self.buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            header = self.buffer[:end].decode("latin-1")
            match = re.search(r"(?i)\r\ncontent-length: *(\d+)", header)
            stop = end + 4 + (int(match.group(1)) if match else 0)
            if len(self.buffer) < stop:
                return
            body, self.buffer = self.buffer[end + 4 : stop], self.buffer[stop:]
            self.request(header, body, time.perf_counter())

    def request(self, header, body, arrived):
        if header.startswith("GET /truth"):
            self.transport.write(whole(200, self.truth.as_json()))
            return
        if header.startswith(("GET /pause", "GET /resume")):
            self.truth.paused = header.startswith("GET /pause")
            self.truth.release(0)
            self.transport.write(whole(200, b"{}"))
            return
        truth, document = self.truth, json.loads(body)
        text = document["messages"][-1]["content"]
        keys = re.findall(r"(?i)\r\nauthorization: *(.*)", header)
        key = keys[0].strip() if keys else "nobody"
        truth.first_s = truth.first_s or time.time()
        truth.texts[text] += 1
        truth.authorization[key] += 1
        truth.bodies[text] = document if len(truth.bodies) < 50 else None
        truth.now += 1
        truth.most = max(truth.most, truth.now)
        named = FAULT.search(text)
        fault = named.group(1) if named else self.options.fault
        if document.get("stream"):
            self.transport.write(STREAM_HEAD + chunks(piece(role="assistant", content="")))
            self.truth.held.append((self.first_token, text, arrived))
        elif fault != "hang":
            self.truth.held.append((self.answer, text, fault, key, arrived))
        if truth.most >= self.options.together:
            truth.release(self.options.delay_ms / 1000)

    def first_token(self, text, arrived):
        self.truth.first_ms[text] = (time.perf_counter() - arrived) * 1000
        self.transport.write(chunks(piece(content="ok")))
        asyncio.get_running_loop().call_later(STREAM_MS / 1000, self.last_token, text, arrived)

    def last_token(self, text, arrived):
        usage = {**usage_of(text), "prompt_tokens_details": {"cached_tokens": 2}}
        self.ended(text, arrived)
        self.transport.write(chunks(piece(content="ok")))
        self.transport.write(chunks(piece(finish="stop"), piece(usage), b"[DONE]") + b"0\r\n\r\n")

    def ended(self, text, arrived, counts=True):
        """The client may have the answer right after."""
        truth, took_ms = self.truth, (time.perf_counter() - arrived) * 1000
        if counts:
            truth.usage[text] = usage_of(text)
            truth.tokens.update(usage_of(text))
        truth.took_ms[text] = took_ms
        truth.now -= 1
        truth.answered += 1
        truth.total_ms += took_ms

    def answer(self, text, fault, key, arrived):
        data, close = reply(fault, text, key)
        if data is None:
            self.truth.now -= 1
            sock = self.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()
            return
        self.ended(text, arrived, counts=not fault or fault in ANSWERED)
        self.transport.write(data)
        if close:
            self.transport.close()


async def main(options):
    loop = asyncio.get_running_loop()
    truth = Truth()
    server = await loop.create_server(lambda: Connection(options, truth), "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--delay-ms", type=float, default=0.0)
    parser.add_argument("--together", type=int, default=1, help="answer none before so many are in flight")
    parser.add_argument("--fault", default="")
    asyncio.run(main(parser.parse_args()))
