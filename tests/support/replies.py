"""What the answers of a chat server are made of: HTTP heads, JSON bodies, server-sent events, chunks."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Optional

import online_bench_openai_async as bench

USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}


def completion(**changes: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": "one two three"}, "finish_reason": "stop"}
    return {"id": "c", "object": "chat.completion", "choices": [choice], "usage": USAGE, **changes}


def as_json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def head(status: str = "200 OK", *headers: str) -> bytes:
    return "\r\n".join((f"HTTP/1.1 {status}", *headers, "", "")).encode("latin-1")


def reply(status: str, body: bytes, *headers: str) -> bytes:
    return head(status, f"Content-Length: {len(body)}", *headers) + body


def piece(choices: Any, **more: Any) -> bytes:
    """A streamed chunk as an event."""
    return b"data: " + as_json({"id": "c", "object": "chat.completion.chunk", "choices": choices, **more}) + b"\n\n"


def delta(finish: Optional[str] = None, **said: Any) -> list[Any]:
    return [{"index": 0, "delta": said, "finish_reason": finish}]


ROLE = piece(delta(role="assistant", content=""))
ONE, TWO, THREE = (piece(delta(content=word)) for word in ("one", " two", " three"))
FINISH = piece(delta(finish="stop"))
COUNTS = piece([], usage=USAGE)
DONE = b"data: [DONE]\n\n"
STREAM_HEAD = head("200 OK", "Content-Type: text/event-stream", "Transfer-Encoding: chunked")
LAST_CHUNK = b"0\r\n\r\n"
GOOD_EVENTS = (ROLE, ONE, TWO, THREE, FINISH, COUNTS, DONE)
ANSWER = as_json(completion())


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def read_reply(streamed: bool, arrivals: Iterable[tuple[int, bytes]]) -> bench.Reply:
    """(stamp in ns, bytes) of a body as they came -> Reply; the same however the bytes were cut."""
    reply = bench.Reply()
    reader = bench.READERS[streamed](reply)
    for stamp_ns, data in arrivals:
        reader.feed([stamp_ns], [data])
    reader.finish()
    return reply
