#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = []
# ///
"""A simulated LLM server that knows the truth about its own timing.

It speaks OpenAI's HTTP API (/v1/chat/completions, /v1/completions and /v1/models), answers every prompt with the word
"token", and takes exactly as long as its settings say. It stamps every request and reply, so a benchmark can be
compared with what really happened. One file, standard library only, Python 3.9+; copy it anywhere.

    python demo_server.py --port 8000
    python demo_server.py --port 8000 --ttft-ms 100 --gap-ms 10
    python demo_server.py --port 8000 --step-ms 8 --max-batch 64 --max-waiting 128

The first line on stdout is the base URL, http://127.0.0.1:8000/v1. Ctrl-C ends it.

Two kinds of engine:
    continuous batching (default)   requests join a batch between steps; a step gives each one token, and takes
                                    step_ms + step_ms_per_sequence * batch size + prompt tokens to prefill / rate;
                                    what finds the batch full waits in a queue
    fixed timetable (--ttft-ms)     every request gets its first token after ttft_ms and one more every gap_ms,
                                    however many there are

Pages beside the API:
    GET  /truth                 every finished request with the server's own stamps; ?since_ns=N: arrived since then
    GET  /metrics               Prometheus text with vLLM's names: tokens, queue, prefix cache, histograms
    GET  /health                an empty 200
    POST /reset_prefix_cache    forget all prompts

/truth gives {"fields": [...], "requests": [[...], ...], "in_flight", "peak_in_flight", "connections", "aborted"}.
Stamps are nanoseconds of Python's time.perf_counter_ns(), which on Linux all processes of a machine share:
    number           of the request, from 0            streamed        whether it was a stream
    arrived_ns       its last byte reached the socket (on Linux the kernel's stamp, elsewhere the read)
    first_ns         just before its first token was written (whole replies: when it was generated)
    last_ns          just before its last token was written
    prompt_tokens    by this server's own count        emitted         tokens generated
    cached_tokens    of its prompt, found in the prefix cache
    started_ns       when it left the queue
    first_due_ns     when the first token should have been written; first_ns - first_due_ns is the server's lateness
    last_due_ns      likewise for the last token
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import heapq
import itertools
import json
import math
import os
import re
import select
import selectors
import signal
import socket
import struct
import sys
import threading
import time
from array import array
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Callable, NamedTuple, NoReturn, Optional, Union
from urllib.parse import parse_qs

TOKEN_TEXT = " token"
DEFAULT_MAX_TOKENS = 16
BLOCK_TOKENS = 16  # of the prefix cache, as in vLLM
CHAT_TEMPLATE_TOKENS = 8  # what a chat template would add to the messages
WAVE_NS = 100_000_000  # --first-wave-extra-ms: what arrives this soon after an idle spell is of the first wave
EMISSIONS_PER_TURN = 1024  # then the sockets are read again
SHORTEST_WAIT_S = 200e-6  # waking for every single token of hundreds of streams would cost more than sending it
SOCKET_BACKLOG = 4096
READ_BYTES = 1 << 18
MAX_HEAD_BYTES = 1 << 16
MAX_BODY_BYTES = 1 << 28
READABLE, WRITABLE = selectors.EVENT_READ, selectors.EVENT_WRITE
TRUTH_FIELDS = (
    *("number", "streamed", "arrived_ns", "first_ns", "last_ns", "prompt_tokens", "emitted"),
    *("cached_tokens", "started_ns", "first_due_ns", "last_due_ns"),
)
LATENCY_BUCKETS_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
TTFT_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1),
    *(2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
GAP_BUCKETS_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)


# === Settings ===


@dataclass(frozen=True)
class Engine:
    """How long the simulated engine takes: a fixed timetable with `ttft_ms`, continuous batching without."""

    ttft_ms: Optional[float] = None
    gap_ms: float = 10.0
    prefill_tokens_per_s: float = 200_000.0
    step_ms: float = 4.0
    step_ms_per_sequence: float = 0.02
    max_batch: int = 256

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Engine:
        """From some of its fields. Raises ValueError with the reason."""
        names = [item.name for item in dataclasses.fields(cls)]
        for name, value in values.items():
            if name not in names:
                raise ValueError(f"no engine setting is called {name!r}; there are: {', '.join(names)}")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number, 0 or more")
        if "max_batch" in values and (values["max_batch"] < 1 or values["max_batch"] % 1):
            raise ValueError("max_batch must be a whole number, 1 or more")
        if not values.get("prefill_tokens_per_s", 1):
            raise ValueError("prefill_tokens_per_s must be more than 0")
        if "gap_ms" in values and "ttft_ms" not in values:
            raise ValueError("gap_ms belongs to the fixed timetable: give ttft_ms too")
        batching = sorted(set(values) - {"ttft_ms", "gap_ms"})
        if "ttft_ms" in values and batching:
            raise ValueError(f"ttft_ms asks for the fixed timetable, where there is no {batching[0]}: leave one out")
        return cls(**values)


@dataclass(frozen=True)
class Settings:
    engine: Engine
    model: str = "demo"
    prefix_caching: bool = True
    kv_cache_tokens: int = 1 << 20
    max_waiting: Optional[int] = None
    stall_once_at_s: Optional[float] = None
    stall_s: float = 2.0
    first_wave_extra_ms: float = 0.0


# === Prompts, and which of their blocks are known ===

_TOKEN = re.compile(r"\w+|[^\w\s]")
# A whole block at a time: tokenising costs a sixteenth of one match per token.
_BLOCK = re.compile(rf"(?:\s*(?:\w+|[^\w\s])){{1,{BLOCK_TOKENS}}}")


class BadRequest(Exception):
    """What is wrong with a request, for its sender."""


@dataclass
class Prompt:
    """A prompt as the engine sees it: its length, and a hash for each whole block of 16 tokens.

    A block's hash covers all blocks before it, so equal hashes mean equal beginnings. `tail` is the text after the
    last whole block, None where the prompt came as token ids.
    """

    tokens: int
    hashes: list[int]
    tail: Optional[str]

    @classmethod
    def of_text(cls, text: str, before: int = 0) -> Prompt:
        blocks: list[str] = _BLOCK.findall(text.rstrip())
        last = len(_TOKEN.findall(blocks[-1])) if blocks else 0
        tokens = max(0, len(blocks) - 1) * BLOCK_TOKENS + last
        tail = blocks.pop() if last % BLOCK_TOKENS else ""
        return cls(tokens, _chain(blocks, before), tail)

    @classmethod
    def of_ids(cls, ids: Sequence[int]) -> Prompt:
        whole = range(0, len(ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS)
        return cls(len(ids), _chain([tuple(ids[i : i + BLOCK_TOKENS]) for i in whole], 0), None)

    def answered(self, tokens: int) -> list[int]:
        """The hashes with this many generated tokens appended."""
        if self.tail is None:
            return self.hashes
        before = self.hashes[-1] if self.hashes else 0
        return self.hashes + Prompt.of_text(self.tail + TOKEN_TEXT * tokens, before).hashes


def _chain(blocks: Sequence[Any], before: int) -> list[int]:
    return list(itertools.accumulate(blocks, lambda known, block: hash((known, block)), initial=before))[1:]


class PrefixCache:
    """Which prompt blocks the server has seen, the least recently used forgotten first."""

    def __init__(self, capacity_tokens: int) -> None:
        self._capacity = capacity_tokens // BLOCK_TOKENS
        self._known: OrderedDict[int, None] = OrderedDict()
        self.queried_tokens = 0
        self.hit_tokens = 0

    def look_up(self, prompt: Prompt, tokens: int) -> int:
        """How many tokens of the prompt are known, at least one being left to compute; it is known from now on."""
        usable = prompt.hashes[: (tokens - 1) // BLOCK_TOKENS]
        hits = BLOCK_TOKENS * sum(1 for _ in itertools.takewhile(self._known.__contains__, usable))
        self.add(prompt.hashes)
        self.queried_tokens += tokens
        self.hit_tokens += hits
        return hits

    def add(self, hashes: Sequence[int]) -> None:
        for block in reversed(hashes):  # the beginnings last: they are forgotten last
            self._known[block] = None
            self._known.move_to_end(block)
        while len(self._known) > self._capacity:
            self._known.popitem(last=False)

    def clear(self) -> None:
        self._known.clear()


def _chat_prompt(asked: Mapping[str, Any]) -> Prompt:
    messages = asked["messages"]
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages must be a list with at least one message")
    return Prompt.of_text(" ".join(_message_text(message).strip() for message in messages))


def _message_text(message: Mapping[str, Any]) -> str:
    calls = message.get("tool_calls")
    content = message.get("content", "") if calls else message["content"]
    parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
    texts = [str(part["text"]) if part.get("type") == "text" else _one_token(part) for part in parts]
    return " ".join([*texts, json.dumps(calls)] if calls else texts)


def _one_token(part: Mapping[str, Any]) -> str:
    """An image, say: one token, equal for equal parts."""
    return f"part{hash(json.dumps(part, sort_keys=True)) & 0xFFFFFFFFFFFFFFFF}"


def _plain_prompt(asked: Mapping[str, Any]) -> Prompt:
    prompt = asked["prompt"]
    if isinstance(prompt, str) and prompt:
        return Prompt.of_text(prompt.strip())
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        return Prompt.of_ids(prompt)
    raise BadRequest("prompt must be one text or one list of token ids, and not empty")


# === What replies look like ===


@dataclass(frozen=True)
class Dialect:
    """One of the two generating endpoints: how its prompt is read and its replies are written.

    `role`, `token` and `finish` are the choices of a stream's events; `whole` is a whole reply's, its text in between.
    """

    name: str
    prompt: Callable[[Mapping[str, Any]], Prompt]
    template_tokens: int
    stream_object: str
    whole_object: str
    role: bytes
    token: bytes
    finish: bytes
    whole: tuple[bytes, bytes]


def _delta(delta: bytes, finish: bytes = b"null") -> bytes:
    return b'{"index":0,"delta":{%s},"logprobs":null,"finish_reason":%s}' % (delta, finish)


def _text(text: bytes, finish: bytes = b"null") -> bytes:
    return b'{"index":0,"text":"%s","logprobs":null,"finish_reason":%s}' % (text, finish)


_TOKEN_BYTES = TOKEN_TEXT.encode()
_CHAT = Dialect(
    name="chatcmpl",
    prompt=_chat_prompt,
    template_tokens=CHAT_TEMPLATE_TOKENS,
    stream_object="chat.completion.chunk",
    whole_object="chat.completion",
    role=_delta(b'"role":"assistant","content":""'),
    token=_delta(b'"content":"%s"' % _TOKEN_BYTES),
    finish=_delta(b"", b'"length"'),
    whole=(b'{"index":0,"message":{"role":"assistant","content":"', b'"},"logprobs":null,"finish_reason":"length"}'),
)
_PLAIN = Dialect(
    name="cmpl",
    prompt=_plain_prompt,
    template_tokens=0,
    stream_object="text_completion",
    whole_object="text_completion",
    role=b"",
    token=_text(_TOKEN_BYTES),
    finish=_text(b"", b'"length"'),
    whole=(b'{"index":0,"text":"', b'","logprobs":null,"finish_reason":"length"}'),
)
ENDPOINTS = {"/chat/completions": _CHAT, "/completions": _PLAIN}  # the longer ending first
_STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def _http_chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _http_reply(status: str, body: bytes, content_type: str = "application/json") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Generation:
    """One request being served, and what truly happened to it (ns of perf_counter)."""

    __slots__ = (
        *("arrived_ns", "cached_tokens", "chunk", "dialect", "emitted", "extra_ns", "first_due_ns"),
        *(
            "first_ns",
            "last_due_ns",
            "last_ns",
            "limit",
            "number",
            "peer",
            "prompt",
            "prompt_tokens",
            "started_ns",
            "streamed",
        ),
        *("stub", "usage"),
    )

    def __init__(self, dialect: Dialect, asked: Mapping[str, Any], peer: Peer) -> None:
        """Raises BadRequest, or what reading a misshapen request raises."""
        self.dialect = dialect
        self.peer = peer
        self.prompt = dialect.prompt(asked)
        self.prompt_tokens = dialect.template_tokens + self.prompt.tokens
        self.limit = _token_limit(asked)
        self.streamed = asked.get("stream") is True
        options = asked.get("stream_options") or {}
        if options and not self.streamed:
            raise BadRequest("stream_options need stream: true")
        if asked.get("n") not in (None, 1):
            raise BadRequest("n must be 1: this server gives one answer a request")
        with_usage = bool(options.get("include_usage"))
        self.usage = with_usage + (
            with_usage and bool(options.get("continuous_usage_stats"))
        )  # none, at the end, always
        self.emitted = self.cached_tokens = self.extra_ns = 0
        self.started_ns = self.first_ns = self.last_ns = self.first_due_ns = self.last_due_ns = 0
        self.chunk = b""

    def accepted(self, number: int, arrived_ns: int, model: bytes) -> None:
        """Give it its number and its stamp, and write what will be sent for every token beforehand."""
        self.number = number
        self.arrived_ns = arrived_ns
        kind = self.dialect.stream_object if self.streamed else self.dialect.whole_object
        start = f'{{"id":"{self.dialect.name}-{number}","object":"{kind}","created":{int(time.time())},"model":'
        self.stub = start.encode() + model + b',"choices":['
        if self.streamed:
            self.chunk = _http_chunk(self._event(self.dialect.token, 1))

    def piece(self) -> bytes:
        """What is written for the token just emitted; nothing for a whole reply that is not whole yet."""
        if not self.streamed:
            return self._whole() if self.emitted == self.limit else b""
        data = self.chunk if self.usage < 2 else _http_chunk(self._event(self.dialect.token, self.emitted))
        if self.emitted == 1:
            role = _http_chunk(self._event(self.dialect.role, 0)) if self.dialect.role else b""
            data = _STREAM_HEAD + role + data
        return data + self._end() if self.emitted == self.limit else data

    def _event(self, choice: bytes, emitted: int) -> bytes:
        usage = b',"usage":{%s}' % self._counts(emitted) if self.usage == 2 else b""
        return b"data: %s%s]%s}\n\n" % (self.stub, choice, usage)

    def _end(self) -> bytes:
        events = self._event(self.dialect.finish, self.emitted)
        if self.usage:
            events += b'data: %s],"usage":%s}\n\n' % (self.stub, self._final_usage())
        return _http_chunk(events + b"data: [DONE]\n\n") + b"0\r\n\r\n"

    def _whole(self) -> bytes:
        choice = (_TOKEN_BYTES * self.emitted).join(self.dialect.whole)
        return _http_reply("200 OK", b'%s%s],"usage":%s}' % (self.stub, choice, self._final_usage()))

    def _counts(self, emitted: int) -> bytes:
        counts = (self.prompt_tokens, self.prompt_tokens + emitted, emitted)
        return b'"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d' % counts

    def _final_usage(self) -> bytes:
        details = b'"prompt_tokens_details":{"cached_tokens":%d}' % self.cached_tokens
        return b"{%s,%s}" % (self._counts(self.emitted), details)


def _token_limit(asked: Mapping[str, Any]) -> int:
    given = [asked[name] for name in ("max_completion_tokens", "max_tokens") if asked.get(name) is not None]
    limit = given[0] if given else DEFAULT_MAX_TOKENS
    if type(limit) is not int or limit < 1:
        raise BadRequest("max_tokens must be a whole number, 1 or more")
    least = asked.get("min_tokens") or 0
    if type(least) is not int or not 0 <= least <= limit:
        raise BadRequest("min_tokens must be a whole number, at most max_tokens")
    return limit


# === Engines: when tokens come ===


class Histogram:
    """Counts per bucket, as Prometheus keeps them."""

    def __init__(self, help_text: str, bounds: Sequence[float]) -> None:
        self.help_text = help_text
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe_ns(self, value_ns: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value_ns / 1e9)] += times
        self._sum += value_ns / 1e9 * times

    def lines(self, name: str, labels: str) -> Iterator[str]:
        yield f"# HELP {name} {self.help_text}"
        yield f"# TYPE {name} histogram"
        bounds = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        for bound, count in zip(bounds, itertools.accumulate(self._counts)):
            yield f'{name}_bucket{{{labels},le="{bound}"}} {count}'
        yield f"{name}_count{{{labels}}} {sum(self._counts)}"
        yield f"{name}_sum{{{labels}}} {self._sum}"


class Hooks(NamedTuple):
    """What an engine calls."""

    start: Callable[[Generation, int], None]  # leaves the queue at this time; sets its cached tokens
    emit: Callable[[Generation, int], bool]  # one more token, due at this time; whether there are more to come
    gaps: Histogram  # of the times between the tokens of one request


class FixedTimetable:
    """First token after `ttft_ms`, then one every `gap_ms`, for each request on its own."""

    def __init__(self, engine: Engine, hooks: Hooks) -> None:
        self._ttft_ns = int((engine.ttft_ms or 0) * 1e6)
        self._gap_ns = int(engine.gap_ms * 1e6)
        self._hooks = hooks
        self._not_before_ns = 0
        self._first: list[tuple[int, int, Generation]] = []
        # All gaps are alike, so what is emitted in order is due again in that order: no heap is needed.
        self._later: deque[tuple[int, Generation]] = deque()

    def submit(self, request: Generation) -> None:
        self._hooks.start(request, request.arrived_ns)
        request.first_due_ns = max(request.arrived_ns, self._not_before_ns) + self._ttft_ns + request.extra_ns
        whole_ns = 0 if request.streamed else self._gap_ns * (request.limit - 1)
        heapq.heappush(self._first, (request.first_due_ns + whole_ns, request.number, request))

    def due_ns(self) -> Optional[int]:
        if not self._later:
            return self._first[0][0] if self._first else None
        return min(self._later[0][0], self._first[0][0]) if self._first else self._later[0][0]

    def run(self, now_ns: int) -> None:
        """Emit what is due, a bounded number of tokens at a time."""
        first, later, emit, gap_ns = self._first, self._later, self._hooks.emit, self._gap_ns
        usual_gaps = 0
        for _ in range(EMISSIONS_PER_TURN):
            if later and later[0][0] <= now_ns and not (first and first[0][0] < later[0][0]):
                due_ns, request = later.popleft()
                if due_ns - request.last_due_ns == gap_ns:
                    usual_gaps += 1
                else:  # there was a stall
                    self._hooks.gaps.observe_ns(due_ns - request.last_due_ns)
            elif first and first[0][0] <= now_ns:
                due_ns, _, request = heapq.heappop(first)
                if not request.streamed and request.limit > 1:
                    usual_gaps += request.limit - 1
                    request.first_ns = request.first_due_ns
                    request.emitted = request.limit - 1
            else:
                break
            if emit(request, due_ns):
                later.append((due_ns + gap_ns, request))
        if usual_gaps:
            self._hooks.gaps.observe_ns(gap_ns, usual_gaps)

    def stall(self, begin_ns: int, length_ns: int) -> None:
        self._not_before_ns = begin_ns + length_ns
        self._later = deque((due_ns + length_ns, request) for due_ns, request in self._later)
        self._first = [(due_ns + length_ns, number, request) for due_ns, number, request in self._first]
        for _, _, request in self._first:
            request.first_due_ns += length_ns


class ContinuousBatching:
    """Requests join between steps; a step gives each running one a token and prefills the newcomers."""

    def __init__(self, engine: Engine, hooks: Hooks) -> None:
        self._engine = engine
        self._hooks = hooks
        self._running: list[Generation] = []
        self._waiting: deque[Generation] = deque()
        self._newcomers = 0  # of the running, those without a token yet
        self._step_end_ns: Optional[int] = None
        self._free_ns = 0  # the end of the last step

    def submit(self, request: Generation) -> None:
        self._waiting.append(request)
        if self._step_end_ns is None:
            self._begin(max(request.arrived_ns, self._free_ns))

    def due_ns(self) -> Optional[int]:
        return self._step_end_ns

    def run(self, now_ns: int) -> None:
        end_ns = self._step_end_ns
        if end_ns is None or end_ns > now_ns:
            return
        if len(self._running) > self._newcomers:
            self._hooks.gaps.observe_ns(end_ns - self._free_ns, len(self._running) - self._newcomers)
        emit = self._hooks.emit
        self._running = [request for request in self._running if emit(request, end_ns)]
        self._begin(end_ns)

    def _begin(self, start_ns: int) -> None:
        """Start a step. What arrives after its start, even if the server is late and knows it, has to wait."""
        running, waiting, before = self._running, self._waiting, len(self._running)
        prefill_tokens = extra_ns = 0
        self._free_ns = start_ns
        while waiting and waiting[0].peer.closed:
            waiting.popleft()
        if waiting and not running:
            start_ns = max(start_ns, waiting[0].arrived_ns)
        while waiting and len(running) < self._engine.max_batch and waiting[0].arrived_ns <= start_ns:
            request = waiting.popleft()
            if not request.peer.closed:
                self._hooks.start(request, start_ns)
                prefill_tokens += request.prompt_tokens - request.cached_tokens
                extra_ns = max(extra_ns, request.extra_ns)
                running.append(request)
        self._newcomers = len(running) - before
        if not running:
            self._step_end_ns = None
            return
        step_ms = self._engine.step_ms + self._engine.step_ms_per_sequence * len(running)
        step_ns = step_ms * 1e6 + prefill_tokens / self._engine.prefill_tokens_per_s * 1e9
        self._step_end_ns = start_ns + int(step_ns) + extra_ns

    def stall(self, begin_ns: int, length_ns: int) -> None:
        if self._step_end_ns is None:
            self._free_ns = begin_ns + length_ns
        else:
            self._step_end_ns += length_ns


# === Connections ===


class KernelClock:
    """Reads sockets, and maps the kernel's wall-clock stamps of arrival onto perf_counter."""

    _TIMESTAMPNS = 35  # SO_TIMESTAMPNS on Linux, the common architectures; the socket module does not name it
    _TIMESPEC = struct.Struct("@ll")
    _SPACE = 128

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(READ_BYTES))
        self._stamped = sys.platform == "linux"
        self._offset_ns = 0
        self.pair()

    def stamp(self, listener: socket.socket) -> None:
        """Ask the kernel to stamp what arrives; accepted connections inherit it before their first byte."""
        if self._stamped:
            try:
                listener.setsockopt(socket.SOL_SOCKET, self._TIMESTAMPNS, 1)
            except OSError:
                self._stamped = False

    def pair(self) -> None:
        """Compare the two clocks; again where something came between the two readings."""
        for _ in range(3):
            before = time.perf_counter_ns()
            wall = time.time_ns()
            after = time.perf_counter_ns()
            self._offset_ns = wall - (before + after) // 2
            if after - before < 20_000:
                return

    def receive(self, sock: socket.socket) -> tuple[memoryview, int]:
        """(bytes, valid until the next call; stamp in ns of perf_counter). Raises OSError."""
        if not self._stamped:
            count = sock.recv_into(self._buffer)
            return self._buffer[:count], time.perf_counter_ns()
        count, ancillary, _, _ = sock.recvmsg_into([self._buffer], self._SPACE)
        now_ns = time.perf_counter_ns()
        for _, kind, stamp in ancillary:
            if kind == self._TIMESTAMPNS and len(stamp) == self._TIMESPEC.size:
                seconds, nanoseconds = self._TIMESPEC.unpack(stamp)
                return self._buffer[:count], min(now_ns, seconds * 1_000_000_000 + nanoseconds - self._offset_ns)
        return self._buffer[:count], now_ns


class HttpRequest(NamedTuple):
    method: str
    path: str
    query: str
    body: bytes
    arrived_ns: int


class Peer:
    """One client's connection."""

    def __init__(self, server: DemoServer, sock: socket.socket) -> None:
        self._server = server
        self._sock = sock
        self._received = bytearray()
        self._wanted = 0  # bytes that the request under way needs; 0 while its head is incomplete
        self._unsent = memoryview(b"")
        self._last = False  # the client asked to close after this reply
        self.current: Optional[Generation] = None
        self.closed = False

    def ready(self, mask: int) -> None:
        if mask & WRITABLE:
            data, self._unsent = self._unsent, memoryview(b"")
            self._server.selector.modify(self._sock, READABLE, self.ready)
            self.send(data)
            self._close_if_last()
        if mask & READABLE and not self.closed:
            try:
                data, stamp_ns = self._server.clock.receive(self._sock)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                data, stamp_ns = memoryview(b""), 0
            if not data:
                self.close()
                return
            self._received += data
            self.advance(stamp_ns)

    def advance(self, stamp_ns: int) -> None:
        """Answer the whole requests received, one at a time."""
        while not self.current and not self.closed and self._take_next(stamp_ns):
            pass

    def _take_next(self, stamp_ns: int) -> bool:
        """Whether there was a whole request."""
        received = self._received
        if not received or len(received) < self._wanted:
            return False
        end = received.find(b"\r\n\r\n")
        if end < 0 or not received[:1].isalpha():  # not alphabetic: no HTTP, a TLS greeting for instance
            if len(received) > MAX_HEAD_BYTES or not received[:1].isalpha():
                self.close()
            return False
        first, *lines = bytes(received[:end]).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = headers.get("content-length", "0")
        if "transfer-encoding" in headers or not length.isdecimal() or int(length[:12]) > MAX_BODY_BYTES:
            self._last = True
            received.clear()
            self.refuse("411 Length Required", f"a Content-Length of at most {MAX_BODY_BYTES} bytes is needed")
            return False
        self._wanted = end + 4 + int(length)
        if len(received) < self._wanted:
            if headers.get("expect", "").lower() == "100-continue" and len(received) == end + 4:
                self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            return False
        body = bytes(received[end + 4 : self._wanted])
        del received[: self._wanted]
        self._wanted = 0
        self._last = headers.get("connection", "").lower() == "close"
        method, _, target = first.partition(" ")
        path, _, query = target.partition(" ")[0].partition("?")
        self._server.answer(self, HttpRequest(method, path, query, body, stamp_ns))
        return True

    def send(self, data: Union[bytes, memoryview]) -> None:
        if self._unsent:
            self._unsent = memoryview(bytes(self._unsent) + data)
            return
        try:
            sent = self._sock.send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            self.close()
            return
        if sent < len(data):
            self._unsent = memoryview(data)[sent:]
            self._server.selector.modify(self._sock, READABLE | WRITABLE, self.ready)

    def reply(self, status: str, body: bytes, content_type: str = "application/json") -> None:
        self.send(_http_reply(status, body, content_type))
        self.done()

    def refuse(self, status: str, message: str) -> None:
        error = {"message": message, "type": status[4:].replace(" ", "") + "Error", "code": int(status[:3])}
        self.reply(status, json.dumps({"error": error}).encode())

    def done(self) -> None:
        self.current = None
        self._close_if_last()

    def _close_if_last(self) -> None:
        if self._last and not self.current and not self._unsent:
            self.close()

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._server.selector.unregister(self._sock)
            self._sock.close()
            if self.current:
                self._server.aborted(self.current)


# === The server ===


class DemoServer:
    """Accepts connections, hands requests to the engine, writes its tokens, and keeps the truth."""

    def __init__(self, settings: Settings, host: str, port: int) -> None:
        """Raises OSError when the address cannot be listened on."""
        self.selector: Any = selectors.DefaultSelector()
        self.clock = KernelClock()
        self._settings = settings
        self._model = json.dumps(settings.model).encode()
        self._cache = PrefixCache(settings.kv_cache_tokens)
        self._histograms = {name: Histogram(text, bounds) for name, (text, bounds, *_) in HISTOGRAMS.items()}
        hooks = Hooks(self._start, self._emit, self._histograms["inter_token_latency"])
        kind = ContinuousBatching if settings.engine.ttft_ms is None else FixedTimetable
        self._engine: Union[ContinuousBatching, FixedTimetable] = kind(settings.engine, hooks)
        self._in_flight: dict[int, Generation] = {}
        self._peak_in_flight = self._connections = self._accepted = self._aborted = 0
        self._prompt_tokens = self._generation_tokens = 0  # the latter of requests that have ended
        self._truth = array("q")
        self._ends = array("q")  # last_ns of each row of the truth: ascending
        self._wave_ns = 0
        self._stall_at_ns: Optional[int] = None
        self._ran_ns = self._run_took_ns = 0  # when the engine last ran, and for how long
        self._stopped = False
        self._precise = sys.platform == "linux" and self.selector.fileno() < 1024  # the limit of select
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=SOCKET_BACKLOG)
        self._listener.setblocking(False)
        self.clock.stamp(self._listener)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._listener.getsockname()[1]}/v1"
        self.selector.register(self._listener, READABLE, self._accept)

    def stop_when_closed(self, descriptor: int) -> None:
        """Stop serving at the end of file on this descriptor; a thread waits for it, as not all can be polled."""
        ours, theirs = socket.socketpair()

        def wait() -> None:
            with theirs, contextlib.suppress(OSError):
                while os.read(descriptor, 4096):
                    pass

        thread = threading.Thread(target=wait, daemon=True)

        def stop(_: int) -> None:
            self._stopped = True
            thread.join()
            ours.close()

        self.selector.register(ours, READABLE, stop)
        thread.start()

    def serve(self) -> None:
        while not self._stopped:
            for key, mask in self._wait():
                key.data(mask)
                # A wave of arrivals must not hold back tokens that are due, nor the other way round: half and half.
                if time.perf_counter_ns() - self._ran_ns >= self._run_took_ns:
                    self._run()
            self._run()

    def _wait(self) -> list[tuple[selectors.SelectorKey, int]]:
        due_ns = self._engine.due_ns()
        wait_s = None if due_ns is None else min(60.0, max(0.0, (due_ns - time.perf_counter_ns()) / 1e9))
        if wait_s and self._precise:
            # epoll rounds up to a millisecond; select, which keeps to the microsecond, waits for the epoll itself.
            if not select.select([self.selector], [], [], max(wait_s, SHORTEST_WAIT_S))[0]:
                return []
            wait_s = 0.0
        ready: list[tuple[selectors.SelectorKey, int]] = self.selector.select(wait_s)
        if ready:
            self.clock.pair()
        return ready

    def _run(self) -> None:
        now_ns = time.perf_counter_ns()
        if self._stall_at_ns is not None and now_ns >= self._stall_at_ns:
            self._engine.stall(self._stall_at_ns, int(self._settings.stall_s * 1e9))
            self._stall_at_ns = None
        self._engine.run(now_ns)
        self._ran_ns = time.perf_counter_ns()
        self._run_took_ns = self._ran_ns - now_ns

    def _accept(self, _: int) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _address = self._listener.accept()
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._connections += 1
                self.selector.register(sock, READABLE, Peer(self, sock).ready)

    # --- requests ---

    def answer(self, peer: Peer, request: HttpRequest) -> None:
        dialect = next((ENDPOINTS[end] for end in ENDPOINTS if request.path.endswith(end)), None)
        page = PAGES.get((request.method, request.path))
        if request.method == "POST" and dialect:
            self._take(peer, dialect, request)
        elif page:
            try:
                content, content_type = page(self, request)
            except ValueError as error:
                peer.refuse("400 Bad Request", str(error))
            else:
                peer.reply("200 OK", content.encode(), content_type)
        else:
            peer.refuse("404 Not Found", f"nothing at {request.method} {request.path}")

    def _take(self, peer: Peer, dialect: Dialect, http: HttpRequest) -> None:
        """Hand a request for tokens to the engine."""
        limit = self._settings.max_waiting
        if limit is not None and len(self._in_flight) >= self._settings.engine.max_batch + limit:
            peer.refuse("429 Too Many Requests", f"{limit} requests are waiting already")
            return
        try:
            request = Generation(dialect, json.loads(http.body), peer)
        except BadRequest as error:
            peer.refuse("400 Bad Request", str(error))
            return
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            peer.refuse("400 Bad Request", f"not a request for a completion: {type(error).__name__} {error}")
            return
        request.accepted(self._accepted, http.arrived_ns, self._model)
        self._misbehave(request)
        self._accepted += 1
        self._in_flight[request.number] = request
        self._peak_in_flight = max(self._peak_in_flight, len(self._in_flight))
        peer.current = request
        self._engine.submit(request)

    def _misbehave(self, request: Generation) -> None:
        """Apply the settings that make a server slow on purpose."""
        if request.number == 0 and self._settings.stall_once_at_s is not None:
            self._stall_at_ns = request.arrived_ns + int(self._settings.stall_once_at_s * 1e9)
        if not self._in_flight:
            self._wave_ns = request.arrived_ns
        if request.arrived_ns - self._wave_ns < WAVE_NS:
            request.extra_ns = int(self._settings.first_wave_extra_ms * 1e6)

    def _start(self, request: Generation, now_ns: int) -> None:
        request.started_ns = now_ns
        self._prompt_tokens += request.prompt_tokens
        if self._settings.prefix_caching:
            request.cached_tokens = self._cache.look_up(request.prompt, request.prompt_tokens)

    def _emit(self, request: Generation, due_ns: int) -> bool:
        """One more token; whether there are more to come. This is the costly path: once per token."""
        peer = request.peer
        if peer.closed:
            return False
        request.emitted = emitted = request.emitted + 1
        request.last_due_ns = due_ns
        if 1 < emitted < request.limit:
            if request.streamed:
                peer.send(request.chunk if request.usage < 2 else request.piece())
            return True
        data = request.piece()
        now_ns = time.perf_counter_ns()  # the last step before sending: nothing may come between
        if emitted == 1:
            request.first_ns, request.first_due_ns = now_ns, due_ns
        request.last_ns = now_ns
        if data:
            peer.send(data)
        if emitted < request.limit:
            return True
        if not peer.closed:
            self._book(request)
            peer.done()
            peer.advance(now_ns)
        return False

    def _book(self, request: Generation) -> None:
        del self._in_flight[request.number]
        self._generation_tokens += request.emitted
        self._ends.append(request.last_ns)
        self._truth.extend(getattr(request, name) for name in TRUTH_FIELDS)
        for name, (_, _, begin, end) in HISTOGRAMS.items():
            if begin:
                self._histograms[name].observe_ns(getattr(request, end) - getattr(request, begin))
        if request.emitted > 1:
            mean_ns = (request.last_ns - request.first_ns) / (request.emitted - 1)
            self._histograms["request_time_per_output_token"].observe_ns(mean_ns)
        if self._settings.prefix_caching:
            self._cache.add(request.prompt.answered(request.emitted))

    def aborted(self, request: Generation) -> None:
        """Its client went away; the engine drops it when it next comes to it."""
        del self._in_flight[request.number]
        self._aborted += 1
        self._generation_tokens += request.emitted

    # --- pages ---

    def models(self, _: HttpRequest) -> tuple[str, str]:
        model = {"id": self._settings.model, "object": "model", "created": 0, "owned_by": "demo"}
        return json.dumps({"object": "list", "data": [model]}), "application/json"

    def health(self, _: HttpRequest) -> tuple[str, str]:
        return "", "text/plain"

    def reset_prefix_cache(self, _: HttpRequest) -> tuple[str, str]:
        self._cache.clear()
        return "", "text/plain"

    def truth(self, request: HttpRequest) -> tuple[str, str]:
        """The docstring of the file describes it. Costs what it shows, not what was ever served."""
        given = parse_qs(request.query, keep_blank_values=True)
        try:
            since_ns = int(given.pop("since_ns", ["0"])[-1])
        except ValueError:
            raise ValueError("since_ns must be a whole number of nanoseconds") from None
        if given:
            raise ValueError(f"/truth knows since_ns alone, not {', '.join(given)}")
        width = len(TRUTH_FIELDS)
        # What arrived since then ended since then too, and rows stand in the order in which they ended.
        begin = bisect_left(self._ends, since_ns) * width
        rows = [self._truth[i : i + width].tolist() for i in range(begin, len(self._truth), width)]
        shown = [[row[0], bool(row[1]), *row[2:]] for row in rows if row[2] >= since_ns]
        report = {
            "fields": TRUTH_FIELDS,
            "requests": shown,
            "in_flight": len(self._in_flight),
            "peak_in_flight": self._peak_in_flight,
            "connections": self._connections,
            "aborted": self._aborted,
        }
        return json.dumps(report), "application/json"

    def metrics(self, _: HttpRequest) -> tuple[str, str]:
        labels = f'engine="0",model_name={json.dumps(self._settings.model)}'
        lines: list[str] = []
        for name, kind, help_text, values in self._samples():
            lines += [f"# HELP vllm:{name} {help_text}", f"# TYPE vllm:{name} {kind}"]
            lines += [f"vllm:{name}{{{labels}{extra}}} {value}" for extra, value in values.items()]
        for name, histogram in self._histograms.items():
            lines += histogram.lines(f"vllm:{name}_seconds", labels)
        # The name that vLLM gave the times between tokens before it had two of them.
        lines += self._histograms["inter_token_latency"].lines("vllm:time_per_output_token_seconds", labels)
        return "\n".join(lines) + "\n", "text/plain; version=0.0.4; charset=utf-8"

    def _samples(self) -> list[tuple[str, str, str, dict[str, float]]]:
        """(name, type, help, value by additional labels) of everything but the histograms."""
        running = [request for request in self._in_flight.values() if request.started_ns]
        held_tokens = sum(request.prompt_tokens + request.emitted for request in running)
        usage = min(1.0, held_tokens / self._settings.kv_cache_tokens)
        generated = self._generation_tokens + sum(request.emitted for request in running)
        ended = {"stop": 0, "length": len(self._ends), "abort": self._aborted}
        by_reason: dict[str, float] = {f',finished_reason="{reason}"': count for reason, count in ended.items()}
        return [
            ("num_requests_running", "gauge", "Requests in the batch.", {"": len(running)}),
            ("num_requests_waiting", "gauge", "Requests in the queue.", {"": len(self._in_flight) - len(running)}),
            ("kv_cache_usage_perc", "gauge", "Share of the KV cache in use, 0 to 1.", {"": usage}),
            ("num_preemptions_total", "counter", "Always 0: nothing is preempted here.", {"": 0}),
            ("prompt_tokens_total", "counter", "Prompt tokens, cached ones included.", {"": self._prompt_tokens}),
            ("generation_tokens_total", "counter", "Tokens generated.", {"": generated}),
            ("prefix_cache_queries_total", "counter", "Prompt tokens looked up.", {"": self._cache.queried_tokens}),
            ("prefix_cache_hits_total", "counter", "Prompt tokens found cached.", {"": self._cache.hit_tokens}),
            ("request_success_total", "counter", "Requests that have ended, by reason.", by_reason),
        ]


PAGES: dict[tuple[str, str], Callable[[DemoServer, HttpRequest], tuple[str, str]]] = {
    ("GET", "/v1/models"): DemoServer.models,
    ("GET", "/health"): DemoServer.health,
    ("GET", "/metrics"): DemoServer.metrics,
    ("GET", "/truth"): DemoServer.truth,
    ("POST", "/reset_prefix_cache"): DemoServer.reset_prefix_cache,
}
HISTOGRAMS = {  # name without vllm: and _seconds -> (help, bounds in seconds, the stamps it lies between)
    "time_to_first_token": ("From arrival to first token.", TTFT_BUCKETS_S, "arrived_ns", "first_ns"),
    "inter_token_latency": ("From one token of a request to its next.", GAP_BUCKETS_S, "", ""),
    "request_time_per_output_token": ("Mean time between the tokens of a request.", GAP_BUCKETS_S, "", ""),
    "e2e_request_latency": ("From arrival to last token.", LATENCY_BUCKETS_S, "arrived_ns", "last_ns"),
    "request_queue_time": ("From arrival to the batch.", LATENCY_BUCKETS_S, "arrived_ns", "started_ns"),
    "request_prefill_time": ("From the batch to the first token.", LATENCY_BUCKETS_S, "started_ns", "first_ns"),
    "request_decode_time": ("From first to last token.", LATENCY_BUCKETS_S, "first_ns", "last_ns"),
}


# === Command line ===


ENGINE_HELP = {
    "ttft_ms": "fixed timetable: time from a request's arrival to its first token (default: batching)",
    "gap_ms": "fixed timetable: time from one token to the next (10)",
    "prefill_tokens_per_s": "batching: prompt tokens processed per second; cached ones cost nothing (200000)",
    "step_ms": "batching: duration of a step, which gives each running request one token (4)",
    "step_ms_per_sequence": "batching: added to the step for each running request (0.02)",
    "max_batch": "batching: requests that run at the same time; more wait in a queue (256)",
}


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _within(kind: Callable[[str], Any], least: float, most: float = math.inf) -> Callable[[str], Any]:
    """A reader of numbers for argparse."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most or value == math.inf:
            range_text = f"{least:g} or more" if most == math.inf else f"{least:g} to {most:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {_KINDS[kind]}, {range_text}")
        return value

    return read


_KINDS: dict[Any, str] = {int: "whole number", float: "number"}


def build_parser() -> argparse.ArgumentParser:
    description = (
        "A simulated LLM server that knows the truth about its own timing. The pages /truth and /metrics tell it."
    )
    parser = OneLineParser(prog="demo_server.py", description=description, epilog=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument_group("server").add_argument
    add("--port", type=_within(int, 0, 65535), default=8000, help="port to listen on (8000); 0 takes a free one")
    add("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only)")
    add("--model", default="demo", metavar="NAME", help="model name that it serves (demo); requests may name any")
    add(
        "--until-stdin-closes",
        action="store_true",
        help="serve until end of file on stdin, and ignore Ctrl-C: for a program that starts this one through a pipe",
    )
    add = parser.add_argument_group("engine: how long replies take").add_argument
    for name, text in ENGINE_HELP.items():
        add("--" + name.replace("_", "-"), type=_within(float, 0), metavar="N", help=text)
    add("--engine", metavar="JSON", default="{}", help='the same as JSON: {"ttft_ms": 100, "gap_ms": 10}; options win')
    add = parser.add_argument_group("prefix cache").add_argument
    add(
        "--no-enable-prefix-caching",
        action="store_true",
        help="compute every prompt anew (default: the beginning of a prompt seen before costs nothing)",
    )
    add(
        "--kv-cache-tokens",
        type=_within(int, BLOCK_TOKENS),
        default=Settings.kv_cache_tokens,
        metavar="N",
        help=f"tokens that the prefix cache holds, the least recently used leave first ({Settings.kv_cache_tokens})",
    )
    _add_faults(parser)
    return parser


def _add_faults(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("trouble on purpose").add_argument
    add("--max-waiting", type=_within(int, 0), metavar="N", help="batching: refuse with HTTP 429 when N are queued")
    add(
        "--stall-once-at",
        type=_within(float, 0),
        metavar="S",
        help="stop emitting tokens once, S seconds after the first request arrived",
    )
    add("--stall-s", type=_within(float, 0), default=2.0, metavar="S", help="how long that stall lasts (2)")
    add(
        "--first-wave-extra-ms",
        type=_within(float, 0),
        default=0.0,
        metavar="N",
        help="first token N ms later for requests that find the server idle, or follow such a one within 100 ms (0)",
    )


def settings_of(options: argparse.Namespace) -> Settings:
    """Raises ValueError with the reason."""
    try:
        values = json.loads(options.engine)
    except ValueError as error:
        raise ValueError(f"--engine is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError('--engine must be a JSON object, like {"ttft_ms": 100, "gap_ms": 10}')
    given = {name: getattr(options, name) for name in ENGINE_HELP}
    engine = Engine.of({**values, **{name: value for name, value in given.items() if value is not None}})
    if options.max_waiting is not None and engine.ttft_ms is not None:
        raise ValueError("--max-waiting needs the batching engine: the fixed timetable has no queue")
    return Settings(
        engine=engine,
        model=options.model,
        prefix_caching=not options.no_enable_prefix_caching,
        kv_cache_tokens=options.kv_cache_tokens,
        max_waiting=options.max_waiting,
        stall_once_at_s=options.stall_once_at,
        stall_s=options.stall_s,
        first_wave_extra_ms=options.first_wave_extra_ms,
    )


def allow_many_connections() -> None:
    """Raise the limit of open files as far as this user may: a connection is one."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # Unix only

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (65536 if hard == resource.RLIM_INFINITY else hard, hard))


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Serve until interrupted; 0. Exits with 2 and one line on stderr where an option or the address is wrong."""
    parser = build_parser()
    options = parser.parse_args(argv)
    try:
        settings = settings_of(options)
        allow_many_connections()
        server = DemoServer(settings, options.host, options.port)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        reason = error.strerror or error
        parser.error(f"cannot listen on {options.host}, port {options.port}: {reason}; --port 0 takes a free port")
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):  # who started it has gone before it could serve
        signal.signal(signal.SIGINT, signal.SIG_IGN if options.until_stdin_closes else signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        if options.until_stdin_closes:
            server.stop_when_closed(sys.stdin.fileno())
        print(server.url, flush=True)
        gc.collect()
        gc.freeze()
        gc.set_threshold(100_000, 50, 100)  # a collection in the middle of a step would make tokens late
        server.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
