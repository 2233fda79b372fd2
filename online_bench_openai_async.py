#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = [
#     "openai>=1.0",
#     "httptools>=0.6; sys_platform != 'win32'",
#     "uvloop>=0.19; sys_platform != 'win32'",
# ]
# ///
"""How fast is this LLM server, really?  One file; copy it to the box and run it.

Needs Python 3.9+ and `pip install openai`; httptools and uvloop make it truer and cheaper
when they are there.  It keeps N chat completions in flight through AsyncOpenAI, stamps every
arrival (on Linux with the kernel's own clock), and reports latency and throughput.

    python online_bench_openai_async.py --demo
    python online_bench_openai_async.py --api-base http://127.0.0.1:8000/v1 --model MODEL
    python online_bench_openai_async.py --model MODEL --requests-file corpus.jsonl --stream \\
        --results-csv results.csv --summary-jsonl summary.jsonl

stdout carries the results; progress, notes and warnings go to stderr.

Rooms of this file; each uses only rooms above it:

     1. Constants
     2. Types
     3. Arrivals
     4. Workload
     5. Metrics
     6. Text
     7. Sinks
     8. Stopwatch
     9. Senders
    10. Demo server
    11. Runner
    12. Shards
    13. Command line

Columns of --results-csv, one row per request in order of completion; blank = not measured:

    index              job number, from 0
    prompt_tokens      as the server's usage counted them
    completion_tokens  likewise; of a stream without usage: its content chunks
    total_tokens       their sum
    latency_ms         request sent -> last byte (streamed: last token); successes only
    status             success | http_error (the call failed) | decode_error (not a complete answer)
    error              the first 300 characters of what went wrong
    error_kind         its class: http_429, timeout, connect_refused, cut, truncated, ...
    scheduled_s        when the job was due, in seconds from the start; blank in a closed loop
    sent_s             when its last byte was handed to the socket, in seconds from the start
    ttft_ms            sent -> first token (streamed)
    tpot_ms            (last token - first token) / (completion_tokens - 1) (streamed)
    response_ms        due -> completion; blank in a closed loop
    queue_ms           worker free (its last reply had arrived) -> sent: this client's own share; in no latency
    finish_reason      stop, length, ...
    chunks             content chunks received (streamed)
    cached_tokens      prompt tokens that came from the server's prefix cache
    reasoning_tokens   completion tokens spent on reasoning
    new_connection     1 when a connection was opened for it
    http_status        the HTTP status, blank when none came

Exit codes: 0 done; 1 nothing succeeded, or more errors than --max-error-rate; 2 wrong usage;
130 interrupted (what had finished is still reported).
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import contextvars
import csv
import dataclasses
import gc
import heapq
import importlib
import io
import itertools
import json
import math
import os
import random
import re
import secrets
import select
import selectors
import shutil
import signal
import socket
import struct
import sys
import textwrap
import time
import traceback
from array import array
from collections import Counter, deque
from collections.abc import Awaitable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, NamedTuple, Optional, Protocol
from urllib.parse import unquote, urlsplit

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# === 1. Constants ===

__version__ = "0.1.0"
THIS_FILE = os.path.abspath(__file__)

DEFAULT_API_BASE = "http://127.0.0.1:8000/v1"
DEFAULT_API_KEY = "vllm"
PLAIN_KEYS = ("vllm", "EMPTY", "")  # placeholders that hide nothing
LEAST_SECRET_CHARS = 4  # nobody is kept out by less, and words would be blanked

# Defaults of the options; one that is not here is off, absent, or worked out from others.
DEFAULTS: Mapping[str, Any] = {
    "concurrency": 128, "prompt_tokens": 1024, "temperature": 0.0, "max_tokens_field": "auto", "extra_body": {},
    "processes": 1, "transport": "auto", "timeout": 600.0, "connect_timeout": 30.0, "max_error_rate": 1.0,
}  # fmt: skip

WARMUP_OUTPUT_TOKENS = 8
WARMUP_PROMPT_TOKENS = 64  # of a corpus run, whose own prompts must stay unseen
DEMO_OUTPUT_TOKENS = 128  # a demo that ends within seconds
DRAIN_GRACE_S = 5.0
IDENTICAL_FAILURES_TO_STOP = 100

PROGRESS_TTY_S = 0.5
PROGRESS_PIPE_S = 10.0
LAG_SAMPLE_S = 0.05
GC_THRESHOLDS = (5_000, 100, 1000)  # short young passes, no full one

PERCENTILES = (50.0, 90.0, 95.0, 99.0)
FEW_SAMPLES_FOR_P99 = 100
REPORT_COLUMNS = 100
ERROR_GROUPS_SHOWN = 5
ERROR_TEXT_CHARS = 300

READ_BUFFER_BYTES = 256 * 1024
MAX_REPLY_BYTES = 256 * 1024 * 1024
ERROR_BODY_BYTES = 64 * 1024
HELD_READS = 64  # raw reads kept before they are parsed: bounds the length of one parse
HELD_BYTES = 64 * 1024  # and memory
LAZY_STREAMS = 48  # from here on streams are read in ticks
LAZY_TICK_S = 0.002
LEAST_TICK_S = 0.0005
LATE_LOOP_S = 0.02  # a timer this late says that the event loop was held up
TICKS_PER_GAP = 5  # the tick stays this far below the gap between tokens
RATE_WINDOW_S = 0.1
SPARE_DESCRIPTORS = 64
CONNECTS_AT_ONCE = 64  # below the listening queue of the usual servers
SOCKET_BACKLOG = 4096
STREAMS_PER_PROCESS = 256
WHOLE_PER_PROCESS = 512

CLIENT_BUSY_SHARE = 0.90  # of one core, waiting for the core included
CLIENT_DELAY_SHARE = 0.10  # of a request's service time
CLIENT_DELAY_FLOOR_MS = 0.5
TELLING_RUN_S = 0.25  # a shorter run tells nothing of its client's CPU
WAITING_SHARE = 0.03  # of the time, runnable but without a core
LAG_FLOOR_MS = 2.0  # of the event loop, where it holds the clock
LAG_SHARE = 0.02  # of the median latency
MERGED_LIMIT = 0.05
MOST_TOKENS = 1 << 40  # a count beyond it is no count
ERROR_LEVELS = 8  # how deep an error message may hide in an error body
PROMPT_LENGTH_TOLERANCE = 0.10

# === 2. Types ===


@dataclass(frozen=True)
class Request:
    """What is asked: chat messages and the output limit (None: the run's own)."""

    messages: Sequence[Mapping[str, Any]]
    output_tokens: Optional[int] = None


@dataclass(frozen=True)
class Job:
    """One request to make: its number, and when it is due (None: as soon as a worker is free)."""

    index: int
    due_s: Optional[float] = None


class Failure(NamedTuple):
    """Why there is no answer: `status` as in the CSV, a short class, and one line for a person."""

    status: str
    kind: str
    message: str


@dataclass(frozen=True)
class Answer:
    """What the body said: stamps in ns of the perf_counter clock, gaps in ms, tokens as counted by usage."""

    first_ns: Optional[int] = None
    visible_ns: Optional[int] = None
    last_ns: Optional[int] = None
    chunks: Optional[int] = None
    gaps_ms: Sequence[float] = ()
    finish_reason: Optional[str] = None
    prompt_tokens: Optional[int] = None
    completion_tokens: Optional[int] = None
    cached_tokens: Optional[int] = None
    reasoning_tokens: Optional[int] = None
    has_usage: bool = False
    content_reads: int = 0
    merged_reads: int = 0
    failure: Optional[Failure] = None


@dataclass(frozen=True)
class Reply:
    """One finished call: the answer and what the wire saw of it (ns of the perf_counter clock)."""

    answer: Answer
    ready_ns: int
    sent_ns: Optional[int]
    end_ns: int
    http_status: Optional[int] = None
    new_connection: Optional[bool] = None
    reconnects: int = 0
    reads: int = 0
    kernel_reads: int = 0


@dataclass(frozen=True)
class Record:
    """A request that has ended. Stamps in seconds from the start of the run; durations are properties."""

    index: int
    due_s: Optional[float]
    ready_s: float
    sent_s: Optional[float]
    first_s: Optional[float]
    visible_s: Optional[float]
    last_s: Optional[float]
    end_s: float
    status: str
    error_kind: str
    error: str
    http_status: Optional[int]
    prompt_tokens: Optional[int]
    completion_tokens: Optional[int]
    cached_tokens: Optional[int]
    reasoning_tokens: Optional[int]
    has_usage: bool
    finish_reason: Optional[str]
    chunks: Optional[int]
    gaps_ms: Sequence[float]
    new_connection: Optional[bool]
    reconnects: int
    reads: int
    kernel_reads: int
    content_reads: int
    merged_reads: int

    @property
    def ok(self) -> bool:
        return self.status == "success"

    @property
    def done_s(self) -> float:
        """Completion: the last token of a stream, the last byte of anything else."""
        return self.end_s if self.last_s is None else self.last_s

    @property
    def latency_ms(self) -> Optional[float]:
        return _span_ms(self.sent_s, self.done_s) if self.ok else None

    @property
    def ttft_ms(self) -> Optional[float]:
        return _span_ms(self.sent_s, self.first_s) if self.ok else None

    @property
    def visible_ms(self) -> Optional[float]:
        return _span_ms(self.sent_s, self.visible_s) if self.ok else None

    @property
    def tpot_ms(self) -> Optional[float]:
        if not self.ok or self.first_s is None or (self.completion_tokens or 0) < 2:
            return None
        span = _span_ms(self.first_s, self.last_s)
        return None if span is None else span / ((self.completion_tokens or 0) - 1)

    @property
    def response_ms(self) -> Optional[float]:
        return _span_ms(self.due_s, self.done_s) if self.ok else None

    @property
    def queue_ms(self) -> Optional[float]:
        return _span_ms(self.ready_s, self.sent_s)

    @property
    def total_tokens(self) -> Optional[int]:
        if self.prompt_tokens is None and self.completion_tokens is None:
            return None
        return (self.prompt_tokens or 0) + (self.completion_tokens or 0)

    @property
    def tokens_per_s(self) -> Optional[float]:
        """What one user sees: tokens over the whole reply."""
        latency_ms = self.latency_ms
        if not latency_ms or self.completion_tokens is None:
            return None
        return self.completion_tokens / latency_ms * 1e3


def _span_ms(start_s: Optional[float], end_s: Optional[float]) -> Optional[float]:
    return None if start_s is None or end_s is None else (end_s - start_s) * 1e3


@dataclass(frozen=True)
class Distribution:
    """A sample described: absent figures of an empty one are None, never 0."""

    n: int
    mean: Optional[float] = None
    std: Optional[float] = None
    max: Optional[float] = None
    percentiles: Mapping[float, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Health:
    """How this client fared in the timed part, one entry per process."""

    wall_s: float
    cpu_s: float
    waiting_s: float  # runnable, but without a core (Linux)
    lag_p99_ms: float
    lag_max_ms: float
    gc_pause_ms: float
    peak_in_flight: int
    connections: int
    transport: str
    kernel_clock: bool


@dataclass(frozen=True)
class ErrorGroup:
    status: str
    kind: str
    count: int
    first_message: str


@dataclass(frozen=True)
class Summary:
    """Everything a report says, as values."""

    ok: int
    errors: int
    elapsed_s: float
    prompt_tokens: int
    completion_tokens: int
    without_usage: int
    chunk_counted: int
    distributions: Mapping[str, Distribution]
    error_groups: Sequence[ErrorGroup]
    finish_reasons: Mapping[str, int]
    cached_tokens: int
    reads: int
    kernel_reads: int
    content_reads: int
    merged_reads: int
    gap_ends: int  # what the gaps lie between: content chunks, or tokens where every chunk tells its count
    chunked_tokens: int
    new_connections: int
    reconnects: int
    busy_s: float  # sum of all requests' time in flight
    queue_ms_mean: Optional[float]
    service_ms_mean: Optional[float]

    @property
    def requests_per_s(self) -> float:
        return _rate(self.ok, self.elapsed_s)

    @property
    def generated_per_s(self) -> float:
        return _rate(self.completion_tokens, self.elapsed_s)

    @property
    def total_per_s(self) -> float:
        return _rate(self.prompt_tokens + self.completion_tokens, self.elapsed_s)

    @property
    def mean_concurrency(self) -> float:
        return _rate(self.busy_s, self.elapsed_s)


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0


@dataclass(frozen=True)
class Config:
    """Every option in force; field names are option names."""

    api_base: str
    api_key: str
    model: str
    concurrency: int
    total_requests: int
    prompt_tokens: int
    output_tokens: int
    requests_file: Optional[str]
    system_prompt: Optional[str]
    results_csv: Optional[str]
    append: bool
    overwrite: bool
    summary_jsonl: Optional[str]
    warmup: int
    temperature: float
    max_tokens_field: str
    extra_body: Mapping[str, Any]
    stream: bool
    continuous_usage: bool
    processes: int
    transport: str
    ca_file: Optional[str]
    insecure: bool
    seed: int
    timeout: float
    connect_timeout: float
    first_byte_timeout: Optional[float]
    idle_timeout: Optional[float]
    max_error_rate: float
    stop_after_errors: Optional[int]
    no_progress: bool
    demo: bool


class Send(Protocol):
    """Make one call and say how it went; never raises for what a server does."""

    def __call__(self, request: Request) -> Awaitable[Reply]: ...


class Sink(Protocol):
    """Takes each record once, in order of completion; called on the event loop, so it must not block."""

    def add(self, record: Record) -> None: ...


Workload = Callable[[int], Request]  # job number -> what to ask; pure, cheap, called off the measured path


class UserError(Exception):
    """Something the user can mend: one line, exit code 2."""


class RunError(Exception):
    """The run cannot go on: one line, exit code 1."""


# === 3. Arrivals (when) (pure) ===


def closed_loop(count: int, shard: int = 0, shards: int = 1) -> list[Job]:
    """Jobs due as soon as a worker is free; of several processes each takes every `shards`-th.

    >>> [job.index for job in closed_loop(7, shard=1, shards=3)]
    [1, 4]
    """
    return [Job(index) for index in range(shard, count, shards)]


def share(total: int, shard: int, shards: int) -> int:
    """The part of `total` that falls to one of several processes; the parts add up.

    >>> [share(10, i, 4) for i in range(4)]
    [3, 3, 2, 2]
    """
    return total // shards + (shard < total % shards)


# === 4. Workload (what) (parse pure, load not) ===

# 256 common English words, one per byte, each one token (with its space) in the byte-pair vocabularies in wide use.
WORDS = (
    "the of and to in is was for that with on as are by from at this have not but had which one they you were all "
    "their there been has when who will more if out so said what up its about into than them can only other new "
    "some could time these two may then do first any my now such like our over man me even most made after also "
    "did many before must through back years where much your way well down should because each just those people "
    "how too little state good very make world still own see men work long get here between both life being under "
    "never day same another know while last might us great old year off come since against go came right used "
    "take three water small place found house early form large number group point fact hand high part line system "
    "set school city family country company night study question power later name white course war body week "
    "example money public book door road car table paper music light sound story level office class army land "
    "plan map game team north south west summer winter market price board field history science voice heart "
    "friend mother father river window garden letter color nature season bridge mountain village island forest "
    "ocean planet engine train station machine street square circle corner center middle answer reason problem "
    "moment minute hour month morning evening today always often sometimes again together almost around during "
    "without within along toward across behind above"
).split()
SYLLABLES = tuple(consonant + vowel for consonant in "bcdfghjklmnprstvwz" for vowel in "aeiou")
HEAD_TOKENS = 8  # what the two invented words at the start cost, about
WORDS_PER_SENTENCE = 12


def synthetic_prompt(key: str, tokens: int) -> str:
    """About `tokens` tokens of English words, unique from the first characters on; the same `key`, the same text.

    The start is two invented words of four syllables drawn from the key (90**8 pairs), so no two prompts
    share the first block of a prefix cache.
    """
    rng = random.Random(key)
    head = "".join(rng.choices(SYLLABLES, k=8))
    count = max(0, tokens - HEAD_TOKENS)
    words = [WORDS[byte] for byte in rng.randbytes(count - count // (WORDS_PER_SENTENCE + 1))]
    sentences = (
        " ".join(words[start : start + WORDS_PER_SENTENCE]) for start in range(0, len(words), WORDS_PER_SENTENCE)
    )
    body = ". ".join(sentences)
    return f"{head[:8]} {head[8:]}" + (f" {body}" if body else "")


def under_system(system_prompt: Optional[str], messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, the system's own before them where there is one."""
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    return [*system, *messages]


def chat(prompt: str, system_prompt: Optional[str]) -> list[dict[str, Any]]:
    return under_system(system_prompt, [{"role": "user", "content": prompt}])


def synthetic_request(config: Config, index: int) -> Request:
    """The measured request of a job without a corpus."""
    return Request(chat(synthetic_prompt(f"{config.seed}/run/{index}", config.prompt_tokens), config.system_prompt))


def warmup_request(config: Config, index: int) -> Request:
    """A request that no measured one shares a prefix with, short in its answer."""
    tokens = WARMUP_PROMPT_TOKENS if config.requests_file else config.prompt_tokens
    prompt = synthetic_prompt(f"{config.seed}/warmup/{index}", tokens)
    return Request(chat(prompt, config.system_prompt), WARMUP_OUTPUT_TOKENS)


def parse_request(line: str, system_prompt: Optional[str]) -> Request:
    """One corpus line -> Request. Raises ValueError with the reason, in words.

    >>> parse_request('{"text": "hi", "max_tokens": 5}', None)
    Request(messages=[{'role': 'user', 'content': 'hi'}], output_tokens=5)
    """
    try:
        row = json.loads(line, parse_constant=_refuse)
        if "\\ud" in line.lower():
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair: no text that could be sent") from None
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"not a JSON object but {type(row).__name__}")
    return Request(_messages_of(row, system_prompt), _limit_of(row))


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _messages_of(row: Mapping[str, Any], system_prompt: Optional[str]) -> list[dict[str, Any]]:
    messages = row.get("messages")
    if messages is not None:
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise ValueError("'messages' is not a list of messages")
        return under_system(system_prompt, messages)
    prompt = row.get("text", row.get("prompt"))
    if prompt is None:
        raise ValueError("no prompt: neither 'text', 'prompt' nor 'messages'")
    if not isinstance(prompt, str) or not prompt:
        raise ValueError("the prompt is not a text, or an empty one")
    return chat(prompt, system_prompt)


def _limit_of(row: Mapping[str, Any]) -> Optional[int]:
    limit = row.get("max_tokens", row.get("output_tokens"))
    if limit is None:
        return None
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ValueError(f"the output limit is not a whole number of 1 or more: {limit!r:.40}")
    return limit


def load_requests(path: Optional[str], system_prompt: Optional[str]) -> list[Request]:
    """Every prompt of a JSONL corpus, checked before any load. Raises UserError naming the line at fault."""
    requests: list[Request] = []
    if path is None:
        return requests
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                    if line.strip():
                        requests.append(parse_request(line, system_prompt))
                except UnicodeDecodeError:
                    raise UserError(f"{path}, line {number}: not UTF-8; save the corpus as UTF-8") from None
                except ValueError as error:
                    raise UserError(f"{path}, line {number}: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read --requests-file {path}: {error.strerror or error}") from None
    if not requests:
        raise UserError(f"{path} holds no prompt; one JSON object per line with 'text', 'prompt' or 'messages'")
    return requests


def workload_of(config: Config, corpus: Sequence[Request]) -> Workload:
    """Job number -> request: from the corpus, cycled, or made up."""
    if not corpus:
        return partial(synthetic_request, config)
    return lambda index: corpus[index % len(corpus)]


# === 5. Metrics (pure) ===


def percentile(ordered: Sequence[float], rank: float) -> float:
    """Linear interpolation between order statistics of a sorted, non-empty sample (numpy's default).

    >>> percentile([1.0, 2.0, 3.0, 4.0], 50)
    2.5
    >>> percentile([10.0, 20.0], 95)
    19.5
    """
    position = (len(ordered) - 1) * rank / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def describe(sample: Iterable[float]) -> Distribution:
    """Mean, population standard deviation, maximum and percentiles; nothing for an empty sample.

    >>> describe([]).mean is None, describe([3.0]).percentiles[99.0]
    (True, 3.0)
    """
    ordered = sorted(sample)
    if not ordered:
        return Distribution(0)
    mean = math.fsum(ordered) / len(ordered)
    deviation = math.dist(ordered, [mean] * len(ordered)) / math.sqrt(len(ordered))
    ranks = {rank: percentile(ordered, rank) for rank in PERCENTILES}
    return Distribution(len(ordered), mean, deviation, ordered[-1], ranks)


def _one(value: Optional[float]) -> Sequence[float]:
    return () if value is None else (value,)


class Metric(NamedTuple):
    """One distribution: how the console names it, the stems of its keys in result files, and how to read it."""

    key: str
    label: str
    stems: tuple[str, ...]
    read: Callable[[Record], Sequence[float]]
    code: str = "d"  # array type of the kept sample
    console: bool = True


METRICS = (
    Metric("latency", "Latency (ms)", ("e2el_ms", "e2e_latency_ms"), lambda r: _one(r.latency_ms)),
    Metric("ttft", "TTFT (ms)", ("ttft_ms",), lambda r: _one(r.ttft_ms)),
    Metric("visible", "First visible token (ms)", ("ttfv_ms",), lambda r: _one(r.visible_ms)),
    Metric("tpot", "TPOT (ms)", ("tpot_ms",), lambda r: _one(r.tpot_ms)),
    Metric("gap", "Chunk gap (ms)", ("itl_ms",), lambda r: r.gaps_ms if r.ok else (), "f"),
    Metric("response", "Response time (ms)", ("response_ms",), lambda r: _one(r.response_ms)),
    Metric("user_rate", "Tokens/s per user", ("tokens_per_s_per_user",), lambda r: _one(r.tokens_per_s), "f"),
    Metric("output", "Output tokens", ("output_tokens",), lambda r: _one(r.completion_tokens if r.ok else None), "f"),
    Metric("prompt", "Prompt tokens", ("prompt_tokens",), lambda r: _one(r.prompt_tokens if r.ok else None), "f"),
    Metric("queue", "Client queue (ms)", ("client_queue_time_ms",), lambda r: _one(r.queue_ms), "f", console=False),
)

# Sums over all records, whatever their fate: field of the record -> the tally's counter.
COUNTED = ("reads", "kernel_reads", "content_reads", "merged_reads", "reconnects")


class Tally:
    """The running sums and samples of a run, fed one record at a time; keeps numbers, never replies."""

    def __init__(self) -> None:
        self.ok = 0
        self.errors = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.busy_s = 0.0
        self.first_sent_s = math.inf
        self.last_done_s = -math.inf
        self.counts: Counter[str] = Counter()
        self.finish_reasons: Counter[str] = Counter()
        self.samples: dict[str, array[float]] = {metric.key: array(metric.code) for metric in METRICS}
        self._failures: dict[tuple[str, str], list[Any]] = {}

    def add(self, record: Record) -> None:
        for metric in METRICS:
            values = metric.read(record)
            if values:
                self.samples[metric.key].extend(values)
        for name in COUNTED:
            self.counts[name] += getattr(record, name)
        self.counts["new_connections"] += bool(record.new_connection)
        if record.sent_s is not None:
            self.first_sent_s = min(self.first_sent_s, record.sent_s)
            self.last_done_s = max(self.last_done_s, record.done_s)
            self.busy_s += record.end_s - record.sent_s
        if record.ok:
            self._add_success(record)
        else:
            self._add_failure(record)

    def _add_success(self, record: Record) -> None:
        self.ok += 1
        self.prompt_tokens += record.prompt_tokens or 0
        self.completion_tokens += record.completion_tokens or 0
        self.finish_reasons[record.finish_reason or "none"] += 1
        self.counts["cached_tokens"] += record.cached_tokens or 0
        if not record.has_usage:
            self.counts["without_usage"] += 1
            self.counts["chunk_counted"] += record.completion_tokens is not None
        elif record.chunks:
            self.counts["gap_ends"] += len(record.gaps_ms) + 1
            self.counts["chunked_tokens"] += record.completion_tokens or 0

    def _add_failure(self, record: Record) -> None:
        self.errors += 1
        group = self._failures.setdefault((record.status, record.error_kind), [0, record.error])
        group[0] += 1

    @property
    def elapsed_s(self) -> float:
        return max(0.0, self.last_done_s - self.first_sent_s) if self.ok + self.errors else 0.0

    def identical_failures(self) -> int:
        """How many calls failed, if nothing succeeded and all failed alike; else 0."""
        return self.errors if not self.ok and len(self._failures) == 1 else 0

    def first_error(self) -> str:
        return next((f"{kind}: {text}" for (_, kind), (_, text) in self._failures.items()), "no reply")

    def error_groups(self) -> list[ErrorGroup]:
        groups = [ErrorGroup(status, kind, n, text) for (status, kind), (n, text) in self._failures.items()]
        return sorted(groups, key=lambda group: -group.count)

    def summary(self) -> Summary:
        distributions = {key: describe(sample) for key, sample in self.samples.items()}
        counted = {name: self.counts[name] for name in (*COUNTED, "new_connections", "cached_tokens")}
        usage = ("without_usage", "chunk_counted", "gap_ends", "chunked_tokens")
        return Summary(
            ok=self.ok,
            errors=self.errors,
            elapsed_s=self.elapsed_s,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            distributions=distributions,
            error_groups=self.error_groups(),
            finish_reasons=dict(self.finish_reasons),
            busy_s=self.busy_s,
            queue_ms_mean=distributions["queue"].mean,
            service_ms_mean=_rate(self.busy_s * 1e3, self.ok + self.errors) or None,
            **counted,
            **{name: self.counts[name] for name in usage},
        )


def gaps_are_of_tokens(summary: Summary) -> bool:
    """Whether a gap may be called inter-token latency: the gaps lie between as many ends as tokens (within 1 %)."""
    tokens = summary.chunked_tokens
    return tokens > 0 and abs(summary.gap_ends - tokens) <= max(tokens * 0.01, 2 * summary.ok)


def percent(part: float, whole: float) -> float:
    return 100 * part / whole if whole else 0.0


# --- warnings that qualify the figures: each rule looks at the summary and returns one, or None ---


class ReportWarning(NamedTuple):
    """Something that makes a figure mean less than it seems to, and what the user can do about it."""

    text: str
    cure: str = ""


def client_bound(summary: Summary, health: Sequence[Health]) -> Optional[str]:
    """Why the figures may be this client's and not the server's; None when they are the server's."""
    reasons = [reason for rule in CLIENT_RULES for reason in [rule(summary, health)] if reason]
    return "; ".join(reasons) or None


def _busy_core(summary: Summary, health: Sequence[Health]) -> Optional[str]:
    shares = [(h.cpu_s + h.waiting_s) / h.wall_s for h in health if h.wall_s > TELLING_RUN_S]
    if max(shares, default=0) < CLIENT_BUSY_SHARE:
        return None
    return f"it needed {max(shares):.0%} of a core"


def _slow_to_send(summary: Summary, health: Sequence[Health]) -> Optional[str]:
    queue, service = summary.queue_ms_mean, summary.service_ms_mean
    if queue is None or service is None or queue < max(CLIENT_DELAY_SHARE * service, CLIENT_DELAY_FLOOR_MS):
        return None
    return f"it took {queue:.1f} ms to send a request that the server answered in {service:.1f} ms"


def _late_stamps(summary: Summary, health: Sequence[Health]) -> Optional[str]:
    """Without the kernel's clock a late event loop is a late stamp."""
    median = summary.distributions["latency"].percentiles.get(50.0)
    lag = max((h.lag_p99_ms for h in health if not h.kernel_clock), default=0.0)
    if median is None or lag < max(LAG_FLOOR_MS, LAG_SHARE * median):
        return None
    return f"its event loop ran {lag:.1f} ms late (p99), and no kernel clock corrects that"


def _starved(summary: Summary, health: Sequence[Health]) -> Optional[str]:
    waiting = max((h.waiting_s / h.wall_s for h in health if h.wall_s > TELLING_RUN_S), default=0.0)
    return f"it waited for a core {waiting:.0%} of the time" if waiting > WAITING_SHARE else None


CLIENT_RULES = (_busy_core, _starved, _slow_to_send, _late_stamps)


def _client_cure(summary: Summary, health: Sequence[Health]) -> str:
    cores = os.cpu_count() or 1
    cures = ["a core of its own for this client"] if _starved(summary, health) else []
    if any("uvloop" not in h.transport and h.transport.startswith("stopwatch") for h in health):
        cures.append("pip install httptools uvloop")
    if len(health) < cores and not cures:
        cures.append(f"--processes {min(cores, 2 * len(health))}")
    return ", or ".join(cures) or "a machine with more free cores, or a lower --concurrency"


def _warn_client(summary: Summary, config: Config, health: Sequence[Health]) -> Optional[ReportWarning]:
    reason = client_bound(summary, health)
    return ReportWarning(f"client-bound: {reason}", _client_cure(summary, health)) if reason else None


def _warn_usage(summary: Summary, config: Config, health: Sequence[Health]) -> Optional[ReportWarning]:
    if not summary.without_usage:
        return None
    how = "counted by their content chunks" if summary.chunk_counted else "counted as 0 tokens"
    text = f"{summary.without_usage} replies carried no usage: {how}, their prompts as 0"
    return ReportWarning(text, "a server that sends `usage`; Req/s and the latencies are right without it")


def _warn_prompt_length(summary: Summary, config: Config, health: Sequence[Health]) -> Optional[ReportWarning]:
    counted = summary.distributions["prompt"].mean
    if config.requests_file or counted is None:
        return None
    if abs(counted / config.prompt_tokens - 1) <= PROMPT_LENGTH_TOLERANCE:
        return None
    better = max(1, round(config.prompt_tokens**2 / counted))
    text = (
        f"the server counted {counted:.1f} prompt tokens on average, --prompt-tokens asked for {config.prompt_tokens}"
    )
    return ReportWarning(text, f"--prompt-tokens {better}; for exact lengths a corpus by generate_requests.py")


def _warn_short_replies(summary: Summary, config: Config, health: Sequence[Health]) -> Optional[ReportWarning]:
    mean = summary.distributions["output"].mean
    if config.requests_file or mean is None or mean >= 0.95 * config.output_tokens:
        return None
    text = f"replies of {mean:.1f} tokens on average, {config.output_tokens} allowed: the model ended them itself"
    return ReportWarning(text, """--extra-body '{"ignore_eos": true}' fixes the length (vLLM, SGLang)""")


def _warn_cache(summary: Summary, config: Config, health: Sequence[Health]) -> Optional[ReportWarning]:
    hit = percent(summary.cached_tokens, summary.prompt_tokens)
    if hit < 1:
        return None
    cure = "send every prompt of the corpus once only" if config.requests_file else "leave out --seed"
    text = f"{hit:.1f} % of the prompt tokens came from the server's prefix cache"
    return ReportWarning(text, f"{cure}, or switch the server's prefix cache off")


def _warn_merged(summary: Summary, config: Config, health: Sequence[Health]) -> Optional[ReportWarning]:
    if summary.merged_reads <= MERGED_LIMIT * summary.content_reads:
        return None
    merged = percent(summary.merged_reads, summary.content_reads)
    text = f"{merged:.1f} % of the reads held several chunks: their gaps are those of packets, not of tokens"
    return ReportWarning(text, "read TPOT; it does not depend on how tokens are packed")


def _warn_reconnects(summary: Summary, config: Config, health: Sequence[Health]) -> Optional[ReportWarning]:
    if not summary.reconnects:
        return None
    text = f"{summary.reconnects} requests were sent anew: the server had closed the kept connection"
    return ReportWarning(text, "a longer keep-alive time-out on the server (uvicorn: --timeout-keep-alive)")


WARNINGS = (
    _warn_client,
    _warn_usage,
    _warn_prompt_length,
    _warn_short_replies,
    _warn_cache,
    _warn_merged,
    _warn_reconnects,
)


def warnings_of(summary: Summary, config: Config, health: Sequence[Health]) -> list[ReportWarning]:
    found = (rule(summary, config, health) for rule in WARNINGS)
    return [warning for warning in found if warning]


# === 6. Text (pure) ===

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


def plain(text: str, limit: int = ERROR_TEXT_CHARS) -> str:
    """One line that is safe to print: no terminal escapes, no control characters, at most `limit` characters.

    >>> plain("a\\x1b[31mred\\nline")
    'a red line'
    """
    return " ".join(_CONTROL.sub(" ", text[: 4 * limit]).split())[:limit]


_SECRET_NAME = re.compile(r"key|token\b|secret|passw|auth|cookie|credential|bearer|\bsig", re.IGNORECASE)
_LOGIN = re.compile(r"(?<=//)[^/?#]*(?=@)")
_QUERY = re.compile(r"([?&])([^=&#\s]+)=([^&#\s]+)")


class Redactor:
    """Blanks what must not be shown: the API key, logins in URLs, and values whose name looks secret."""

    def __init__(self, words: Iterable[str]) -> None:
        """`words`: the secrets of this run; those too short to keep anybody out are ignored."""
        kept = {plain(word, len(word)) for word in words if len(word) >= LEAST_SECRET_CHARS and word not in PLAIN_KEYS}
        self._words = sorted(kept, key=len, reverse=True)

    @classmethod
    def of(cls, config: Config | argparse.Namespace, environ: Mapping[str, str]) -> Redactor:
        """Every secret that a run can send: key, logins and query values of URLs, body fields, headers."""
        headers = [line.partition(":") for line in environ.get("OPENAI_CUSTOM_HEADERS", "").splitlines()]
        named = secret_values([config.extra_body, {name: value.strip() for name, _, value in headers}])
        proxies = [f"//{value.rpartition('//')[2]}" for name, value in environ.items() if name.lower()[-6:] == "_proxy"]
        urls = [config.api_base, *proxies]
        logins = [login for url in urls for raw in _LOGIN.findall(url) for login in (raw, unquote(raw))]
        basic = [base64.b64encode(login.encode()).decode() for login in logins]
        queries = [text for url in urls for _, name, text in _QUERY.findall(url) if _SECRET_NAME.search(name)]
        words = [config.api_key, *logins, *basic, *queries, *map(unquote, queries), *named]
        return cls(
            [*words, *(login.partition(":")[2] for login in logins), *(word.rpartition(" ")[2] for word in named)]
        )

    def text(self, text: str) -> str:
        """Any text, a server's words above all, with every secret blanked, also one that is cut off at the end.

        >>> Redactor(["sk-1234567890"]).text("no key sk-1234567890, nor sk-1234567")
        'no key ***, nor ***'
        """
        for word in self._words:
            text = text.replace(word, "***")
        for word in self._words:
            lengths = range(min(len(word), len(text)), LEAST_SECRET_CHARS - 1, -1)
            cut = next((length for length in lengths if text.endswith(word[:length])), 0)
            text = f"{text[:-cut]}***" if cut else text
        return text

    @staticmethod
    def fields(value: Any, name: str = "", found: Optional[list[str]] = None) -> Any:
        """A copy of JSON data with every text blanked whose name looks secret, at any depth; `found` gets those.

        >>> Redactor.fields({"a": {"api_key": "x"}, "max_tokens": 5})
        {'a': {'api_key': '***'}, 'max_tokens': 5}
        """
        if isinstance(value, Mapping):
            return {key: Redactor.fields(item, f"{name} {key}", found) for key, item in value.items()}
        if isinstance(value, list):
            return [Redactor.fields(item, name, found) for item in value]
        if not isinstance(value, str) or not _SECRET_NAME.search(name):
            return value
        if found is not None:
            found.append(value)
        return "***"

    @staticmethod
    def url(url: str) -> str:
        """
        >>> Redactor.url("http://me:p@w@host:1/v1?api-version=2&key=abc")
        'http://***@host:1/v1?api-version=2&key=***'
        """
        return _QUERY.sub(
            lambda found: f"{found[1]}{found[2]}={'***' if _SECRET_NAME.search(found[2]) else found[3]}",
            _LOGIN.sub("***", url),
        )

    def argv(self, argv: Sequence[str]) -> list[str]:
        """A command line as given, secrets blanked wherever they stand."""
        masked = []
        for before, word in zip(["", *argv], argv):
            name, equals, value = word.partition("=")
            option, text = (name, value) if equals else (before, word)
            if option == "--api-key":
                text = text if text in PLAIN_KEYS else "***"
            elif option == "--extra-body":
                with contextlib.suppress(ValueError):
                    text = json.dumps(self.fields(json.loads(text)))
            masked.append(self.text(self.url(f"{name}={text}" if equals else text)))
        return masked

    @staticmethod
    def config(config: Config) -> dict[str, Any]:
        """Every option in force, secrets masked."""
        return {
            **{item.name: getattr(config, item.name) for item in dataclasses.fields(config)},
            "api_base": Redactor.url(config.api_base),
            "api_key": config.api_key if config.api_key in PLAIN_KEYS else "***",
            "extra_body": Redactor.fields(config.extra_body),
        }


def secret_values(value: Any) -> list[str]:
    """What Redactor.fields would blank."""
    found: list[str] = []
    Redactor.fields(value, "", found)
    return found


def mask_url(url: str) -> str:
    return Redactor.url(url)


def without_secrets(text: str, words: Iterable[str]) -> str:
    return Redactor(words).text(text)


def split_login(url: str) -> tuple[str, dict[str, str]]:
    """(the URL without `user:password@`, the header that says them)

    >>> split_login("http://me:p%40w@host:1/v1")
    ('http://host:1/v1', {'Authorization': 'Basic bWU6cEB3'})
    """
    login, at, host = urlsplit(url).netloc.rpartition("@")
    if not at:
        return url, {}
    token = base64.b64encode(unquote(login).encode()).decode()
    return url.replace(f"{login}@{host}", host, 1), {"Authorization": f"Basic {token}"}


def _line_length(text: str) -> int:
    """How many characters of this text fit a line of the report; Chinese and Japanese ones take two columns."""
    return REPORT_COLUMNS if max(text, default="") < "\u1100" else REPORT_COLUMNS // 2


def shortened(text: str) -> str:
    return text if len(text) <= _line_length(text) else f"{text[: _line_length(text) - 3]}..."


def wrapped(text: str, indent: int) -> list[str]:
    """The text in lines of the report, the second and later ones indented."""
    return textwrap.wrap(text, _line_length(text), subsequent_indent=" " * indent, break_on_hyphens=False)


def progress_line(tally: Tally, total: int, elapsed_s: float, columns: float = math.inf) -> str:
    """How far the run is, in the longest form that fits; errors and remaining time stand in each of them."""
    done = tally.ok + tally.errors
    share = f"{done}/{total} ({percent(done, total):.1f}%)"
    eta = f"ETA: {elapsed_s / done * (total - done):5.1f}s" if done else "ETA: -"
    requests = f"RPS(avg): {_rate(tally.ok, elapsed_s):.2f}"
    generated = f"Gen tok/s: {_rate(tally.completion_tokens, elapsed_s):.2f}"
    tokens = f"Total tok/s: {_rate(tally.prompt_tokens + tally.completion_tokens, elapsed_s):.2f}"
    end = f"Errors: {tally.errors} | {eta}"
    forms = (
        f"Progress: {share} | {requests} | {generated} | {tokens} | {end}",
        f"{share} | {requests} | {generated} | {end}",
        f"{share} | {end}",
        f"{done}/{total} | {end}",
    )
    return next((form for form in forms if len(form) <= columns), f"{tally.errors} err, {eta}")


def _ms(value: Optional[float]) -> str:
    return "-" if value is None else f"{value:.1f} ms"


def summary_block(summary: Summary, concurrency: int) -> str:
    """The seven lines that scripts read."""
    latency = summary.distributions["latency"]
    return "\n".join(
        (
            f"Requests (ok/err): {summary.ok}/{summary.errors}  Concurrency: {concurrency}"
            f"  Elapsed: {summary.elapsed_s:.3f}s",
            f"Req/s: {summary.requests_per_s:.2f}",
            f"Generated tokens/s: {summary.generated_per_s:.2f}",
            f"Total tokens/s (in+out): {summary.total_per_s:.2f}",
            f"p50 latency: {_ms(latency.percentiles.get(50.0))}",
            f"p95 latency: {_ms(latency.percentiles.get(95.0))}",
            f"Avg latency: {_ms(latency.mean)}",
        )
    )


def detail_lines(
    summary: Summary, config: Config, health: Sequence[Health], notices: Sequence[ReportWarning] = (), truth: str = ""
) -> list[str]:
    """What stands between the seven lines and the configuration: warnings, verdict, table, circumstances.

    `notices`: warnings about the run itself, before those about its figures. `truth`: the demo's own line.
    """
    warnings = [line for item in (*notices, *warnings_of(summary, config, health)) for line in warning_lines(item)]
    verdict = [*wrapped(truth, 0), *wrapped(verdict_line(summary, health), 0)]
    blocks = [warnings, verdict, distribution_table(summary), circumstances(summary, health)]
    return "\n\n".join("\n".join(block) for block in blocks if block).split("\n")


def warning_lines(warning: ReportWarning) -> list[str]:
    indent = len("WARNING: ")
    cure = wrapped(f"{'':{indent}}Cure: {plain(warning.cure)}", indent) if warning.cure else []
    return [*wrapped(f"WARNING: {plain(warning.text, 400)}", indent), *cure]


def verdict_line(summary: Summary, health: Sequence[Health]) -> str:
    """Whether the figures are the server's, in one sentence."""
    if not health or not summary.ok:
        return ""
    if client_bound(summary, health):
        return "Verdict: client-bound. These figures may be this client's and not the server's."
    cpu = max(percent(h.cpu_s, h.wall_s) for h in health)
    if not summary.kernel_reads:
        return f"Verdict: this client kept up (CPU {cpu:.0f} %); arrivals were stamped when read, not by the kernel."
    kernel = percent(summary.kernel_reads, summary.reads)
    return f"Verdict: this client was not the bottleneck (CPU {cpu:.0f} %, kernel clock {kernel:.3g} %)."


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns padded to their widest cell: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    ]


def _metric_label(metric: Metric, summary: Summary) -> str:
    return "ITL (ms)" if metric.key == "gap" and gaps_are_of_tokens(summary) else metric.label


def _shown(metric: Metric, summary: Summary) -> bool:
    if not metric.console or not summary.distributions[metric.key].n:
        return False
    if metric.key == "visible":  # worth a line only where a reply reasons before it speaks
        visible, first = summary.distributions["visible"], summary.distributions["ttft"]
        return (visible.mean or 0) > (first.mean or 0) + 0.001
    return True


def _figure(value: Optional[float]) -> str:
    return "-" if value is None else f"{value:.{2 if value < 1e5 else 0}f}"


def distribution_table(summary: Summary) -> list[str]:
    rows = [["", "mean", *(f"p{rank:g}" for rank in PERCENTILES), "max", "n"]]
    starred = False
    for metric in METRICS:
        if not _shown(metric, summary):
            continue
        sample = summary.distributions[metric.key]
        cells = [_figure(value) for value in sample.percentiles.values()]
        if sample.n < FEW_SAMPLES_FOR_P99:
            cells[-1] += "*"
            starred = True
        rows.append([_metric_label(metric, summary), _figure(sample.mean), *cells, _figure(sample.max), str(sample.n)])
    note = [f"* fewer than {FEW_SAMPLES_FOR_P99} samples: hardly more than the maximum"] if starred else []
    return [*table(rows), *note] if len(rows) > 1 else []


def circumstances(summary: Summary, health: Sequence[Health]) -> list[str]:
    """A few lines on how the run went: concurrency reached, how replies ended, the clock, the client, errors."""
    lines = []
    if health:
        peak = sum(h.peak_in_flight for h in health)
        lines.append(f"In flight: mean {summary.mean_concurrency:.1f}, peak {peak}")
    if summary.finish_reasons:
        reasons = sorted(summary.finish_reasons.items(), key=lambda item: -item[1])
        lines.append(shortened(plain("Finish reasons: " + ", ".join(f"{name} {count}" for name, count in reasons))))
    lines += [line for line in (clock_line(summary, health), client_line(health)) if line]
    for group in summary.error_groups[:ERROR_GROUPS_SHOWN]:
        message = plain(group.first_message)
        lines += wrapped(f"Errors: {group.count} x {group.status}/{group.kind}: {message}", len("Errors: "))
    if len(summary.error_groups) > ERROR_GROUPS_SHOWN:
        lines.append(f"Errors: {len(summary.error_groups) - ERROR_GROUPS_SHOWN} rarer kinds besides")
    return lines


def clock_line(summary: Summary, health: Sequence[Health]) -> str:
    if not summary.reads:
        return ""
    counted = any(h.transport.startswith("stopwatch") for h in health)
    opened = f"; {summary.new_connections} new connections" if counted else ""
    names = "/".join(sorted({h.transport for h in health})) or "-"
    kernel = percent(summary.kernel_reads, summary.reads)
    merged = percent(summary.merged_reads, summary.content_reads)
    return f"Clock: kernel {kernel:.3g} %, merged {merged:.2g} %; transport {names}{opened}"


def client_line(health: Sequence[Health]) -> str:
    if not health:
        return ""
    cpu = max(percent(h.cpu_s, h.wall_s) for h in health)
    lag = max(h.lag_p99_ms for h in health)
    pause = max(h.gc_pause_ms for h in health)
    count = f"{len(health)} process{'es' if len(health) > 1 else ''}"
    return f"Client: {count}, CPU {cpu:.0f} %, loop lag p99 {lag:.1f} ms, gc pause max {pause:.1f} ms"


# Labels of the founding document's configuration block, spaces included: scripts may read it.
CONFIG_LABELS = (
    "     api_base", "      api_key", "        model", "   concurrency", " total_requests", " prompt_tokens",
    " output_tokens",
)  # fmt: skip


def config_block(config: Config) -> str:
    """The seven options that every report shows, then those that differ from their default."""
    values = Redactor.config(config)
    lines = [f"{label}: {_config_cell(values.pop(label.strip()))}" for label in CONFIG_LABELS]
    for name, value in values.items():
        default = config.concurrency if name == "warmup" else DEFAULTS.get(name)
        if value != default and value is not None and value is not False:
            lines.append(f"{name:>14}: {_config_cell(value)}")
    return "\n".join(("=== Benchmark Configuration ===", *map(shortened, lines)))


def _config_cell(value: Any) -> str:
    return plain(json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value))


def truth_line(summary: Summary, truth: Mapping[str, Distribution]) -> str:
    """How far the reported figures are from the simulated server's own."""
    parts = []
    for key, name in (("latency", ""), ("ttft", "TTFT ")):
        ours, theirs = summary.distributions[key], truth.get(key, Distribution(0))
        if ours.n and theirs.n:
            off = [f"p{rank:g} {ours.percentiles[rank] - theirs.percentiles[rank]:+.2f}" for rank in (50.0, 95.0, 99.0)]
            parts.append(f"{name}{', '.join(off)} ms")
    return "Measurement error: " + ("; ".join(parts) or "-")


# --- the summary as one JSON object, in the keys that vLLM's and SGLang's result files use ---


def summary_json(summary: Summary, config: Config, health: Sequence[Health], run: Mapping[str, Any]) -> dict[str, Any]:
    """One strict-JSON object per run; absent figures are null. `run` adds date, argv, versions and the like."""
    requests = {
        "model_id": config.model,
        "num_prompts": config.total_requests,
        "max_concurrency": config.concurrency,
        "completed": summary.ok,
        "failed": summary.errors,
        "duration": summary.elapsed_s,
        "total_input_tokens": summary.prompt_tokens,
        "total_output_tokens": summary.completion_tokens,
        "total_cached_tokens": summary.cached_tokens,
        "request_throughput": summary.requests_per_s,
        "request_goodput": None,
        "input_throughput": _rate(summary.prompt_tokens, summary.elapsed_s),
        "output_throughput": summary.generated_per_s,
        "total_token_throughput": summary.total_per_s,
        "total_throughput": summary.total_per_s,
        "concurrency": summary.mean_concurrency,
        "max_concurrent_requests": sum(h.peak_in_flight for h in health),
    }
    ours = {
        "errors_by_kind": {f"{g.status}/{g.kind}": g.count for g in summary.error_groups},
        "error_messages": {f"{g.status}/{g.kind}": plain(g.first_message) for g in summary.error_groups},
        "finish_reasons": dict(summary.finish_reasons),
        "replies_without_usage": summary.without_usage,
        "gaps_are_of_tokens": gaps_are_of_tokens(summary),
        "kernel_stamped_share": _rate(summary.kernel_reads, summary.reads),
        "merged_read_share": _rate(summary.merged_reads, summary.content_reads),
        "new_connections": summary.new_connections,
        "reconnects": summary.reconnects,
        "client_bound": client_bound(summary, health),
        "client": [dataclasses.asdict(h) for h in health],
        "warnings": [". Cure: ".join(warning) for warning in warnings_of(summary, config, health)],
        "config": Redactor.config(config),
    }
    return {**run, **requests, **_metric_keys(summary), **ours}


def _metric_keys(summary: Summary) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for metric in METRICS:
        sample = summary.distributions[metric.key]
        for stem in metric.stems:
            keys.update({f"mean_{stem}": sample.mean, f"median_{stem}": sample.percentiles.get(50.0)})
            keys.update({f"std_{stem}": sample.std, f"max_{stem}": sample.max, f"n_{stem}": sample.n})
            keys.update({f"p{rank:g}_{stem}": sample.percentiles.get(rank) for rank in PERCENTILES})
    return keys


# === 7. Sinks (the only writers) ===


def _number(value: Optional[float], digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _count(value: Optional[int]) -> str:
    return "" if value is None else str(int(value))


def _cell(text: Optional[str]) -> str:
    """Server text as a cell: one line, and never a formula to a spreadsheet."""
    line = plain(text or "")
    return f"'{line}" if line[:1] in ("=", "+", "-", "@") else line


class Column(NamedTuple):
    """A column of --results-csv: what it says, for --help-columns, and how a record fills it."""

    meaning: str
    cell: Callable[[Record], str]


CSV_COLUMNS: Mapping[str, Column] = {
    "index": Column("number of the request, from 0", lambda r: str(r.index)),
    "prompt_tokens": Column("as the server's usage counted them", lambda r: _count(r.prompt_tokens)),
    "completion_tokens": Column("likewise; a stream without usage: its chunks", lambda r: _count(r.completion_tokens)),
    "total_tokens": Column("their sum", lambda r: _count(r.total_tokens)),
    "latency_ms": Column("sent -> last byte (streamed: last token); successes only", lambda r: _number(r.latency_ms)),
    "status": Column("success, http_error (call failed), decode_error (incomplete answer)", lambda r: r.status),
    "error": Column(f"the first {ERROR_TEXT_CHARS} characters of what went wrong", lambda r: _cell(r.error)),
    "error_kind": Column("its class: http_429, timeout, connect_refused, cut, ...", lambda r: _cell(r.error_kind)),
    "scheduled_s": Column("when it was due, from the start; blank in a closed loop", lambda r: _number(r.due_s, 6)),
    "sent_s": Column("when its last byte was handed to the socket, from the start", lambda r: _number(r.sent_s, 6)),
    "ttft_ms": Column("sent -> first token (streamed)", lambda r: _number(r.ttft_ms)),
    "tpot_ms": Column("(last - first token) / (completion_tokens - 1) (streamed)", lambda r: _number(r.tpot_ms)),
    "response_ms": Column("due -> completion; blank in a closed loop", lambda r: _number(r.response_ms)),
    "queue_ms": Column("worker free -> sent: this client's own share, in no latency", lambda r: _number(r.queue_ms)),
    "finish_reason": Column("stop, length, ...", lambda r: _cell(r.finish_reason)),
    "chunks": Column("content chunks received (streamed)", lambda r: _count(r.chunks)),
    "cached_tokens": Column("prompt tokens from the server's prefix cache", lambda r: _count(r.cached_tokens)),
    "reasoning_tokens": Column("completion tokens spent on reasoning", lambda r: _count(r.reasoning_tokens)),
    "new_connection": Column("1 when a connection was opened for it", lambda r: _count(r.new_connection)),
    "http_status": Column("the HTTP status; blank when none came", lambda r: _count(r.http_status)),
}


@contextlib.contextmanager
def _writing(option: str, path: str) -> Iterator[None]:
    """What the system refuses is the user's to mend: UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {option} {path}: {error.strerror or error}") from None


class OutputFile:
    """A file that is only appended to, in whole lines; several runs may write to it at once.

    Each run holds a shared lock for its whole life (where the system has flock). Whoever gets the exclusive lock is
    alone: only then is a header written, old content dropped, or an empty file removed.
    """

    def __init__(self, path: str, option: str, taken: str = "") -> None:
        """`taken`: the complaint when the file exists; empty: it is appended to. Leaves it locked. Raises UserError."""
        self.path = path
        with _writing(option, path):
            self._open(taken)
            while self.gone():  # another run removed it between our opening and locking
                self._file.close()
                self._open(taken)

    def _open(self, taken: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        try:
            place = os.open(self.path, flags | os.O_EXCL, 0o666)
            self.created = True
        except FileExistsError:
            if taken:
                raise UserError(taken) from None
            place = os.open(self.path, flags, 0o666)
            self.created = False
        self._file = os.fdopen(place, "ab", buffering=0)
        self.alone = self.lock_alone() or self.share()

    def lock_alone(self) -> bool:
        """Take the exclusive lock; False when another run has the file open."""
        try:
            if fcntl:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            pass
        return True

    def share(self) -> bool:
        """Take the shared lock, or go back to it; False, as this run is not alone then."""
        with contextlib.suppress(OSError):
            if fcntl:
                fcntl.flock(self._file, fcntl.LOCK_SH)
        return False

    def size(self) -> int:
        """Bytes that are in it; 0 of a device or a pipe."""
        return os.fstat(self._file.fileno()).st_size

    def write(self, data: bytes, fresh: bool = False) -> None:
        """All of it or, where a disk is full, nothing: half a line would spoil the next one. Raises OSError.

        `fresh`: drop the old content before.
        """
        if fresh:
            self._file.truncate(0)
        view = memoryview(data)
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(self._file.seek(len(view) - len(data), os.SEEK_CUR))
            raise

    def gone(self) -> bool:
        """Whether what was written can no longer be found under its name."""
        try:
            return not os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno()))
        except OSError:
            return True

    def close(self, unused_bytes: int = -1) -> None:
        """Close; remove a file that this run created, nobody else has open, and that holds no more than so much."""
        with contextlib.suppress(OSError, ValueError):
            unused = self.created and self.size() <= unused_bytes and self.lock_alone() and not self.gone()
            if unused and not fcntl:
                self._file.close()  # Windows removes no open file
            if unused:
                os.unlink(self.path)
        with contextlib.suppress(OSError):
            self._file.close()


class CsvSink:
    """A row per record, on the disk as soon as it is known: what kills the run loses no finished row."""

    def __init__(self, path: str, append: bool, overwrite: bool) -> None:
        """Checks everything before any load; rows that are to be replaced stay until `begin`. Raises UserError."""
        self.rows = 0
        self.lost = 0
        self.reason = ""
        self._text = io.StringIO()
        self._writer = csv.writer(self._text, lineterminator="\n")
        self._header = self._line(list(CSV_COLUMNS))
        taken = "" if append or overwrite else "exists; --append adds to it, --overwrite replaces it"
        if taken and os.path.exists(path):  # never opened: a pipe without a reader would wait for one
            raise UserError(f"--results-csv {path} {taken}")
        self._out = OutputFile(path, "--results-csv", taken and f"--results-csv {path} {taken}")
        self._replaces = overwrite and self._out.size() > 0
        try:
            self._prepare()
        except UserError:
            self.discard_if_empty()
            raise

    def _prepare(self) -> None:
        path = self._out.path
        if self._replaces and not self._out.alone:
            raise UserError(f"another run is writing to --results-csv {path}; name another file")
        with _writing("--results-csv", path):
            if self._out.size() == 0:
                self._out.write(self._header)
            elif not self._replaces:
                self._out.write(self._continuation())
        self._out.share()

    def begin(self) -> None:
        """The run is about to measure: now --overwrite drops the old rows. Raises UserError."""
        if not self._replaces:
            return
        self._replaces = False
        if not self._out.lock_alone():
            raise UserError(f"another run has begun to write to --results-csv {self._out.path}; its rows are kept")
        with _writing("--results-csv", self._out.path):
            self._out.write(self._header, fresh=True)
        self._out.share()

    def _continuation(self) -> bytes:
        """What ends the last row, where a run was cut off in it. Raises UserError when the columns are others."""
        path = self._out.path
        try:
            with open(path, "rb") as file:
                header = file.readline().decode().rstrip("\r\n").split(",")
                file.seek(-1, os.SEEK_END)
                last = file.read(1)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot append to --results-csv {path}: {error}") from None
        if header != list(CSV_COLUMNS):
            missing = [name for name in CSV_COLUMNS if name not in header]
            older = header == [name for name in CSV_COLUMNS if name in header]
            what = f"lacks the columns {', '.join(missing)}" if older else "has other columns"
            raise UserError(f"--results-csv {path} {what}; name another file or use --overwrite")
        return b"" if last == b"\n" else b"\n"

    def add(self, record: Record) -> None:
        self.rows += 1
        try:
            self._out.write(self._line([column.cell(record) for column in CSV_COLUMNS.values()]))
        except OSError as error:
            self.lost += 1
            self.reason = error.strerror or str(error)

    def _line(self, row: Sequence[str]) -> bytes:
        self._writer.writerow(row)
        data = self._text.getvalue().encode("utf-8", "replace")
        self._text.seek(0)
        self._text.truncate()
        return data

    def gone(self) -> bool:
        return self._out.gone()

    def close(self) -> None:
        self._out.close()

    def discard_if_empty(self) -> None:
        """A run that measured nothing leaves no file in the way of the next."""
        self._out.close(-1 if self.rows else len(self._header))


class SummarySink:
    """One line appended per run; opened before any load, so that nobody waits an hour for an error."""

    def __init__(self, path: str) -> None:
        self._out = OutputFile(path, "--summary-jsonl")
        self._out.share()

    def write(self, summary: Mapping[str, Any]) -> None:
        """Raises OSError."""
        line = json.dumps(summary, ensure_ascii=False, allow_nan=False) + "\n"
        self._out.write(line.encode("utf-8", "replace"))
        if self._out.gone():
            raise FileNotFoundError(2, "it has been removed or replaced meanwhile")

    def close(self) -> None:
        """A run that measured nothing leaves no file of its own."""
        self._out.close(unused_bytes=0)


class LiveLine:
    """Progress on stderr: a terminal gets one line rewritten, a pipe a line now and then."""

    def __init__(self, tally: Tally, total: int, clock: Callable[[], float]) -> None:
        self._tally = tally
        self._total = total
        self._clock = clock
        self._start_s = clock()
        self._tty = bool(sys.stderr and sys.stderr.isatty())
        self.period_s = PROGRESS_TTY_S if self._tty else PROGRESS_PIPE_S

    async def keep(self) -> None:
        while True:
            self.show()
            await asyncio.sleep(self.period_s)

    def show(self, elapsed_s: Optional[float] = None) -> None:
        elapsed_s = elapsed_s or self._clock() - self._start_s
        if self._tty:
            width = _columns() - 1
            _say("\r" + progress_line(self._tally, self._total, elapsed_s, width)[:width].ljust(width), end="")
        else:
            _say(progress_line(self._tally, self._total, elapsed_s))

    def finish(self) -> None:
        """The last state, over the report's own time, so that a log shows how it ended; an empty line after it."""
        self.show(self._tally.elapsed_s)
        _say("\n" if self._tty else "")


def _columns() -> int:
    """Of the terminal that stderr is; stdout, which the library asks, may be none."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
        if columns:
            return columns
    return shutil.get_terminal_size().columns


def _say(text: str, end: str = "\n") -> None:
    """To stderr, and never the end of a run because nobody reads it."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(text + end)
        sys.stderr.flush()


def note(text: str) -> None:
    _say(f"Note: {plain(text, 500)}")


def report(text: str) -> None:
    """Results to stdout; a reader that has left is no error of the run, a full disk is told."""
    try:
        encoding = sys.stdout.encoding or "utf-8"
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding) + "\n")
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError) as error:
        if not isinstance(error, BrokenPipeError):
            _say(f"WARNING: the report could not be written to stdout: {getattr(error, 'strerror', None) or error}")
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# === 8. Stopwatch (the wire) ===

SO_TIMESTAMPNS = 35  # Linux, the common architectures; the socket module does not name it
_TIMESPEC = struct.Struct("@ll")
_TIMESPEC_BYTES, _unpack_timespec = _TIMESPEC.size, _TIMESPEC.unpack
_ANCILLARY_BYTES = 128 if sys.platform == "win32" else socket.CMSG_SPACE(_TIMESPEC.size)
_SOL_SOCKET = int(socket.SOL_SOCKET)  # an enumeration's member compares at ten times the cost
_READABLE, _WRITABLE = selectors.EVENT_READ, selectors.EVENT_WRITE
_MESSAGE_END = b"\r\n\r\n"
PAIR_LIMIT_NS = 20_000
_TOLD = (b"content-encoding", b"retry-after")


class Reader(Protocol):
    """Takes a reply's body piece by piece, each with the time of its arrival, and says what it was."""

    complete: bool  # nothing that could still come would matter

    def feed(self, stamp_ns: int, data: bytes) -> None: ...

    def answer(self) -> Answer: ...


class WireError(Exception):
    """A call that failed below HTTP, or in it."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.failure = Failure("http_error", kind, message)


@dataclass(frozen=True)
class Timeouts:
    connect_s: float
    first_byte_s: Optional[float]
    idle_s: Optional[float]
    total_s: float


@dataclass(frozen=True)
class Origin:
    """Where requests go, and how TLS is checked on the way."""

    host: str
    port: int
    tls: bool
    ca_file: Optional[str] = None
    insecure: bool = False

    @classmethod
    def of(cls, url: str, ca_file: Optional[str] = None, insecure: bool = False) -> Origin:
        parts = urlsplit(url)
        tls = parts.scheme == "https"
        return cls(parts.hostname or "", parts.port or (443 if tls else 80), tls, ca_file, insecure)


class Exchange:
    """One request under way: what the wire learns of it, in the order it learns it (ns of perf_counter)."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.error_body = bytearray()
        self.ready_ns = time.perf_counter_ns()
        self.sent_ns: Optional[int] = None
        self.last_ns: Optional[int] = None  # the newest arrival
        self.status: Optional[int] = None
        self.retry_after = ""
        self.new_connection: Optional[bool] = None
        self.reconnects = 0
        self.reads = 0
        self.kernel_reads = 0
        self.size = 0
        self.failure: Optional[Failure] = None
        self._inflate: Any = None

    @property
    def settled(self) -> bool:
        """Whether nothing that could still come, or fail to, would matter."""
        return self.reader.complete and self.status == 200

    def head(self, status: int, encoding: str, retry_after: str) -> None:
        self.status = status
        self.retry_after = retry_after
        if encoding in ("gzip", "x-gzip", "deflate"):
            zlib = importlib.import_module("zlib")
            self._inflate = zlib.decompressobj(zlib.MAX_WBITS | 32)

    def body(self, stamp_ns: int, data: bytes) -> None:
        """Raises WireError for a reply that is too large or whose compression is broken."""
        self.size += len(data)
        if self._inflate is not None:
            data = self._inflated(data)
        if self.size > MAX_REPLY_BYTES:
            raise WireError("too_large", f"the reply is larger than {MAX_REPLY_BYTES >> 20} MB")
        if self.status is not None and 200 <= self.status < 300:
            self.reader.feed(stamp_ns, data)
        elif len(self.error_body) < ERROR_BODY_BYTES:
            self.error_body += data[:ERROR_BODY_BYTES]

    def _inflated(self, data: bytes) -> bytes:
        try:
            plain_data: bytes = self._inflate.decompress(data, MAX_REPLY_BYTES - (self.size - len(data)) + 1)
        except Exception as error:  # zlib.error, of a module imported only when a server compresses
            raise WireError("bad_http", f"broken compression: {error}") from None
        self.size += max(0, len(plain_data) - len(data))
        return plain_data


class Turnstile:
    """Admits one costly step per turn of the event loop, so that sockets are read between any two."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[tuple[asyncio.Future[Any], Any]] = deque()
        self._armed = False

    def queue(self, waiter: asyncio.Future[Any], result: Any = None) -> None:
        self._waiting.append((waiter, result))
        if not self._armed:
            self._armed = True
            self._loop.call_soon(self._admit)

    def _admit(self) -> None:
        while self._waiting:
            waiter, result = self._waiting.popleft()
            if not waiter.done():
                if isinstance(result, Exception):
                    waiter.set_exception(result)
                else:
                    waiter.set_result(result)
                break
        self._armed = bool(self._waiting)
        if self._armed:
            self._loop.call_soon(self._admit)


class KernelClock:
    """Maps the kernel's wall-clock stamps onto perf_counter, by a fresh pair of readings per batch."""

    def __init__(self) -> None:
        self.buffer = bytearray(READ_BUFFER_BYTES)
        self._view = memoryview(self.buffer)
        self._buffers = [self._view]
        self.offset_ns = 0
        self.pair()

    def pair(self) -> None:
        """Again where something came between the two readings: it would shift a whole batch of stamps."""
        for _ in range(3):
            before = time.perf_counter_ns()
            wall = time.time_ns()
            after = time.perf_counter_ns()
            self.offset_ns = wall - (before + after) // 2
            if after - before < PAIR_LIMIT_NS:
                return

    def receive(self, sock: socket.socket) -> tuple[bytes, int, bool]:
        """(bytes, stamp in ns of perf_counter, whether the kernel gave it); raises as recvmsg does."""
        count, ancillary, _, _ = sock.recvmsg_into(self._buffers, _ANCILLARY_BYTES)
        now = time.perf_counter_ns()
        data = bytes(self._view[:count])
        for level, kind, stamp in ancillary:
            if kind == SO_TIMESTAMPNS and level == _SOL_SOCKET and len(stamp) == _TIMESPEC_BYTES:
                seconds, nanoseconds = _unpack_timespec(stamp)
                mapped = seconds * 1_000_000_000 + nanoseconds - self.offset_ns
                if mapped <= now:
                    return data, mapped, True
                if mapped <= now + 50_000:  # later still: the clock was stepped
                    return data, now, True
        return data, now, False


def stamped(sock: socket.socket) -> None:
    """Ask the kernel to stamp what arrives; elsewhere than on Linux the time of the read has to do."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)


class Tls:
    """TLS over the same socket: bytes in, bytes out, so that the kernel's stamps serve there too."""

    def __init__(self, context: Any, host: str) -> None:
        ssl = importlib.import_module("ssl")
        self.want_read: type[Exception] = ssl.SSLWantReadError
        self.closed: type[Exception] = ssl.SSLZeroReturnError
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._session = context.wrap_bio(self._in, self._out, server_hostname=host)

    async def handshake(self, loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
        while True:
            try:
                self._session.do_handshake()
            except self.want_read:
                await loop.sock_sendall(sock, self._out.read())
                data = await loop.sock_recv(sock, READ_BUFFER_BYTES)
                if not data:
                    raise WireError("tls_error", "closed during the TLS handshake: does it speak TLS?") from None
                self._in.write(data)
            else:
                await loop.sock_sendall(sock, self._out.read())
                return

    def seal(self, data: bytes) -> bytes:
        self._session.write(data)
        sealed: bytes = self._out.read()
        return sealed

    def open(self, data: bytes) -> tuple[bytes, bool]:
        """(what it says, whether the other side has closed)."""
        self._in.write(data)
        pieces: list[bytes] = []
        try:
            while True:
                piece = self._session.read(READ_BUFFER_BYTES)
                if not piece:
                    return b"".join(pieces), True
                pieces.append(piece)
        except self.want_read:
            return b"".join(pieces), False
        except self.closed:
            return b"".join(pieces), True


def tls_context(origin: Origin) -> Any:
    """The system's trust store, or --ca-file, or no check at all. Raises UserError for a bad file."""
    ssl = importlib.import_module("ssl")
    try:
        context = ssl.create_default_context(cafile=origin.ca_file)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read --ca-file {origin.ca_file}: {error}") from None
    if origin.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class Connection:
    """One kept socket and the reply that is arriving on it.

    The hot path keeps (stamp, bytes) and parses neither HTTP nor JSON; the held reads go through the parser
    when a message may have ended, or when HELD_READS have gathered.
    """

    def __init__(self, wire: StopwatchWire, sock: socket.socket, tls: Optional[Tls]) -> None:
        self._wire = wire
        self.sock = sock
        self._tls = tls
        self._unsent: memoryview = memoryview(b"")
        self._stamps = array("q")
        self._pieces: list[bytes] = []
        self._held_bytes = 0
        self._parser: Any = None
        self._exchange: Optional[Exchange] = None
        self._waiter: Optional[asyncio.Future[bool]] = None
        self._stamp_ns = 0
        self._headers: dict[bytes, bytes] = {}
        self._chunked = False
        self._delimited = False
        self._keep = False
        self.closed = False

    # --- sending ---

    def carry(self, exchange: Exchange, payload: bytes) -> asyncio.Future[bool]:
        """Send; the future says True for a whole reply, False for a stale reuse; raises WireError."""
        self._exchange = exchange
        self._waiter = waiter = self._wire.loop.create_future()
        self._parser = self._wire.new_parser(self)
        self._chunked = self._delimited = self._keep = False
        self._headers = {}
        exchange.status = None
        self._unsent = memoryview(self._tls.seal(payload) if self._tls else payload)
        self._push()
        return waiter

    def _push(self) -> None:
        exchange = self._exchange
        try:
            while self._unsent:
                if exchange:
                    exchange.sent_ns = time.perf_counter_ns()
                self._unsent = self._unsent[self.sock.send(self._unsent) :]
        except (BlockingIOError, InterruptedError):
            self._wire.watch(self, _READABLE | _WRITABLE)
        except ConnectionError:  # it has stopped listening: perhaps it has said why
            self._wire.watch(self, _READABLE)
        except OSError as error:
            self._broken(error)

    # --- receiving ---

    def ready(self, mask: int) -> None:
        if mask & _WRITABLE:
            self._wire.watch(self, _READABLE)
            self._push()
        if mask & _READABLE:
            self.read()

    def read(self) -> None:
        if self.closed:
            return
        try:
            data, stamp, by_kernel = self._wire.clock.receive(self.sock)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._broken(error)
            return
        closed = not data
        if self._tls and data:
            data, closed = self._unseal(self._tls, data)
            if not data and not closed:
                return
        exchange = self._exchange
        if exchange is None:
            self._ended()
            return
        if data:
            if exchange.sent_ns is not None and stamp < exchange.sent_ns:  # the clock was stepped
                stamp, by_kernel = time.perf_counter_ns(), False
            exchange.reads += 1
            exchange.kernel_reads += by_kernel
            exchange.last_ns = stamp = max(stamp, exchange.last_ns or 0)
            self._hold(stamp, data)
        if closed:
            self._ended()

    def _unseal(self, tls: Tls, data: bytes) -> tuple[bytes, bool]:
        """(what was said, whether that was the last); nothing yet of half a record or a session ticket."""
        try:
            return tls.open(data)
        except OSError as error:  # ssl.SSLError is one
            self._broken(error)
            return b"", False

    def _hold(self, stamp: int, data: bytes) -> None:
        self._stamps.append(stamp)
        self._pieces.append(data)
        self._held_bytes += len(data)
        ended = data.endswith(_MESSAGE_END) or len(data) < len(_MESSAGE_END)
        if not self._chunked or ended or len(self._pieces) >= HELD_READS or self._held_bytes >= HELD_BYTES:
            self._digest()

    def _digest(self) -> None:
        stamps, pieces = self._stamps, self._pieces
        self._stamps, self._pieces, self._held_bytes = array("q"), [], 0
        try:
            for self._stamp_ns, piece in zip(stamps, pieces):
                self._parser.feed_data(piece)
        except WireError as error:
            self._finish(error)
        except Exception as error:  # the parser's own errors, of a module that may be absent
            if isinstance(error.__context__, WireError):
                self._finish(error.__context__)
            elif self._exchange is not None:
                self._finish(WireError("bad_http", f"not an HTTP/1 reply: {error}"))
            else:
                self._wire.discard(self)

    # --- what the parser calls ---

    def on_message_begin(self) -> None:
        if self._exchange is None:  # a second reply to one request: the next one would get the rest of it
            self._wire.discard(self)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        exchange, status = self._exchange, self._parser.get_status_code()
        if exchange is None or status < 200:
            return
        headers = self._headers
        self._chunked = b"chunked" in headers.get(b"transfer-encoding", b"").lower()
        self._delimited = self._chunked or b"content-length" in headers or status in (204, 304)
        self._keep = self._delimited and self._parser.should_keep_alive()
        encoding, retry_after = (headers.get(name, b"").decode("latin-1").strip() for name in _TOLD)
        exchange.head(status, encoding.lower(), retry_after)

    def on_body(self, data: bytes) -> None:
        if self._exchange is not None:
            self._exchange.body(self._stamp_ns, data)

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() < 200:
            self._headers = {}
        elif self._exchange is not None:
            self._finish(None)

    # --- ends ---

    def _ended(self) -> None:
        """The other side has closed."""
        if self._exchange is not None and self._pieces:
            self._digest()
        exchange = self._exchange
        if exchange is None:
            self._wire.discard(self)
        elif exchange.status is not None and not self._delimited:
            self._finish(None)
        elif exchange.reads == 0:
            self._finish(WireError("closed", "the server closed the connection without a reply"))
        else:
            self._finish(WireError("cut", f"the connection was closed within the reply, after {exchange.size} bytes"))

    def _broken(self, error: OSError) -> None:
        if self._exchange is None:
            self._wire.discard(self)
            return
        if self._pieces:
            self._digest()
        if self._exchange is not None:
            self._finish(WireError(*classify(error)))

    def _finish(self, error: Optional[WireError]) -> None:
        exchange, waiter = self._exchange, self._waiter
        self._exchange = self._waiter = None
        if error is None and self._keep and not self._unsent:
            self._wire.keep(self)
        else:
            self._wire.discard(self)
        if exchange is None or waiter is None:
            return
        stale = error is not None and error.failure.kind in ("closed", "reset") and not exchange.reads
        result = False if stale and exchange.new_connection is False else error or True
        self._wire.turnstile.queue(waiter, result)

    def give_up(self, kind: str, message: str) -> None:
        """Out of time: whatever has arrived is read, and the connection closed."""
        if self._pieces:
            self._digest()
        if self._exchange is not None:
            self._finish(WireError(kind, message))

    def abandon(self) -> None:
        """The caller has left."""
        self._exchange = self._waiter = None
        self._wire.discard(self)


def _reason(error: BaseException) -> str:
    return f"{getattr(error, 'strerror', None) or str(error) or type(error).__name__}"


class SelectorWatch:
    """Which connections have something to say."""

    def __init__(self) -> None:
        self._selector: Any = selectors.DefaultSelector()
        self.fileno = self._selector.fileno

    def add(self, connection: Connection) -> None:
        self._selector.register(connection.sock, _READABLE, connection)

    def change(self, connection: Connection, mask: int) -> None:
        self._selector.modify(connection.sock, mask, connection)

    def remove(self, connection: Connection) -> None:
        self._selector.unregister(connection.sock)

    def ready(self) -> list[tuple[Connection, int]]:
        return [(key.data, mask) for key, mask in self._selector.select(0)]

    def close(self) -> None:
        self._selector.close()


class EpollWatch:
    """The same on Linux, at half the cost per event; its flags for reading and writing are its own."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._connections: dict[int, Connection] = {}
        self.fileno = self._epoll.fileno

    def add(self, connection: Connection) -> None:
        self._epoll.register(connection.sock, select.EPOLLIN)
        self._connections[connection.sock.fileno()] = connection

    def change(self, connection: Connection, mask: int) -> None:
        flags = (select.EPOLLIN if mask & _READABLE else 0) | (select.EPOLLOUT if mask & _WRITABLE else 0)
        self._epoll.modify(connection.sock, flags)

    def remove(self, connection: Connection) -> None:
        self._epoll.unregister(connection.sock)
        del self._connections[connection.sock.fileno()]

    def ready(self) -> list[tuple[Connection, int]]:
        found = self._connections
        return [(found[fd], _MASK_OF[flags]) for fd, flags in self._epoll.poll(0, len(found) or 1)]

    def close(self) -> None:
        self._epoll.close()


# By epoll's flags, of which 4 is EPOLLOUT; trouble of any kind is found out by reading.
_MASK_OF = tuple((_WRITABLE if flags & 4 else 0) | (_READABLE if flags & ~4 else 0) for flags in range(64))


class StopwatchWire:
    """A transport that lets the kernel hold the stopwatch: no coroutine wakes per packet.

    All sockets hang on one selector of its own. The event loop watches that selector; when many streams
    are in flight it is looked at in ticks instead, because the stamps are the kernel's anyway.
    """

    def __init__(self, origin: Origin, timeouts: Timeouts, streamed: bool) -> None:
        self.loop = asyncio.get_running_loop()
        self.turnstile = Turnstile(self.loop)
        self.clock = KernelClock()
        self.reads = 0
        self.connections = 0
        self._origin = origin
        self._tls_context = tls_context(origin) if origin.tls else None
        self._timeouts = timeouts
        self._streamed = streamed
        self._httptools = importlib.import_module("httptools")
        self._watch = EpollWatch() if hasattr(select, "epoll") else SelectorWatch()
        self._addresses: list[Any] = []
        self._idle: list[Connection] = []
        self._all: set[Connection] = set()
        self._in_flight = 0
        self._tick_s = 0.0
        self._window = (time.perf_counter(), 0)
        self._beat_handle: Optional[asyncio.TimerHandle] = None
        self.loop.add_reader(self._watch.fileno(), self._drain)

    @staticmethod
    def missing() -> str:
        """What it lacks on this machine; empty when it can run."""
        if not hasattr(selectors.DefaultSelector, "fileno") or not hasattr(socket.socket, "recvmsg_into"):
            return "a system with epoll or kqueue"
        try:
            importlib.import_module("httptools")
        except ImportError:
            return "httptools (pip install httptools)"
        return ""

    @property
    def kernel_clock(self) -> bool:
        return sys.platform == "linux"

    def label(self) -> str:
        return f"stopwatch ({type(self.loop).__module__.partition('.')[0]})"

    def new_parser(self, connection: Connection) -> Any:
        return self._httptools.HttpResponseParser(connection)

    # --- one exchange ---

    async def turn(self) -> None:
        """Wait for this caller's turn to do something costly on the event loop."""
        waiter = self.loop.create_future()
        self.turnstile.queue(waiter)
        await waiter

    async def perform(self, exchange: Exchange, payload: bytes) -> None:
        """Send the request and wait for the whole reply. Raises WireError."""
        deadline_s = self.loop.time() + self._timeouts.total_s
        self._in_flight += 1
        try:
            connection = self._idle_connection(exchange) or await self._connect_for(exchange)
            if not await self._carried(connection, exchange, payload, deadline_s):
                exchange.reconnects += 1
                connection = await self._connect_for(exchange)
                await self._carried(connection, exchange, payload, deadline_s)
        finally:
            self._in_flight -= 1

    async def _carried(self, connection: Connection, exchange: Exchange, payload: bytes, deadline_s: float) -> bool:
        future = connection.carry(exchange, payload)
        watchdog = Watchdog(self.loop, self._timeouts, deadline_s, partial(connection.give_up))
        watchdog.watch(exchange)
        try:
            return await future
        except asyncio.CancelledError:
            connection.abandon()
            raise
        finally:
            watchdog.stop()

    def _idle_connection(self, exchange: Exchange) -> Optional[Connection]:
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed:
                exchange.new_connection = False
                return connection
        return None

    async def reserve(self, count: int) -> None:
        """Open what is missing to `count` connections; one that cannot be opened will be missed later."""
        while len(self._all) < count:
            batch = min(count - len(self._all), CONNECTS_AT_ONCE)
            opened = await asyncio.gather(*(self._connect() for _ in range(batch)), return_exceptions=True)
            self._idle[:0] = [connection for connection in opened if isinstance(connection, Connection)]
            if any(isinstance(outcome, BaseException) for outcome in opened):
                return

    async def _connect_for(self, exchange: Exchange) -> Connection:
        exchange.new_connection = True
        return await self._connect()

    async def _connect(self) -> Connection:
        limit_s = min(self._timeouts.connect_s, self._timeouts.total_s)
        try:
            sock, tls = await asyncio.wait_for(self._open(), limit_s)
        except asyncio.TimeoutError:
            raise WireError("connect_timeout", f"no connection within {limit_s:g} s") from None
        except OSError as error:
            raise WireError(*classify(error)) from None
        self.connections += 1
        connection = Connection(self, sock, tls)
        self._all.add(connection)
        self._watch.add(connection)
        return connection

    async def _open(self) -> tuple[socket.socket, Optional[Tls]]:
        if not self._addresses:
            origin = self._origin
            self._addresses = await self.loop.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
        refusal: Optional[OSError] = None
        for family, kind, proto, _, address in self._addresses:
            sock = socket.socket(family, kind, proto)
            try:
                return sock, await self._prepare(sock, address)
            except OSError as error:
                sock.close()
                refusal = error  # the next address may answer
            except BaseException:
                sock.close()
                raise
        raise refusal or OSError("no address")

    async def _prepare(self, sock: socket.socket, address: Any) -> Optional[Tls]:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await self.loop.sock_connect(sock, address)
        tls = None
        if self._tls_context is not None:
            tls = Tls(self._tls_context, self._origin.host)
            await tls.handshake(self.loop, sock)
        stamped(sock)
        return tls

    # --- what connections tell ---

    def watch(self, connection: Connection, mask: int) -> None:
        if not connection.closed:
            self._watch.change(connection, mask)

    def keep(self, connection: Connection) -> None:
        self._idle.append(connection)

    def discard(self, connection: Connection) -> None:
        if connection.closed:
            return
        connection.closed = True
        with contextlib.suppress(KeyError, ValueError, OSError):
            self._watch.remove(connection)
        connection.sock.close()
        self._all.discard(connection)
        with contextlib.suppress(ValueError):
            self._idle.remove(connection)

    # --- reading ---

    def _drain(self) -> None:
        self.clock.pair()
        ready = self._watch.ready()
        self.reads += len(ready)
        for connection, mask in ready:
            if mask == _READABLE:
                connection.read()
            else:
                connection.ready(mask)
        self._adapt()

    def _adapt(self) -> None:
        """Choose between reading at once and reading in ticks, by how often a stream speaks."""
        since, reads = self._window
        now = time.perf_counter()
        if now - since < RATE_WINDOW_S:
            return
        rate = (self.reads - reads) / (now - since)
        self._window = (now, self.reads)
        gap_s = self._in_flight / rate if rate else 0.0
        lazy = self._streamed and self._in_flight >= LAZY_STREAMS
        tick_s = min(LAZY_TICK_S, gap_s / TICKS_PER_GAP) if lazy else 0.0
        self._set_tick(tick_s if tick_s >= LEAST_TICK_S else 0.0)

    def _set_tick(self, tick_s: float) -> None:
        was, self._tick_s = self._tick_s, tick_s
        if tick_s and not was:
            self.loop.remove_reader(self._watch.fileno())
            self._beat_handle = self.loop.call_later(tick_s, self._beat)
        elif was and not tick_s:
            if self._beat_handle:
                self._beat_handle.cancel()
            self.loop.add_reader(self._watch.fileno(), self._drain)

    def _beat(self) -> None:
        self._beat_handle = self.loop.call_later(self._tick_s, self._beat)
        self._drain()

    async def aclose(self) -> None:
        self._set_tick(0.0)
        self.loop.remove_reader(self._watch.fileno())
        for connection in list(self._all):
            self.discard(connection)
        self._watch.close()


class Watchdog:
    """One timer per exchange, re-armed at the nearest of its limits."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        timeouts: Timeouts,
        deadline_s: float,
        give_up: Callable[[str, str], None],
    ) -> None:
        self._loop = loop
        self._limits = timeouts
        self._deadline_s = deadline_s
        self._give_up = give_up
        # A limit that starts to run only later (the idle one, with the first byte) is met by looking again.
        self._look_again_s = min(timeouts.first_byte_s or math.inf, timeouts.idle_s or math.inf)
        self._armed_s = loop.time()
        self._excused_at = -1  # the count of reads when lateness was last excused
        self._handle: Optional[asyncio.TimerHandle] = None

    def watch(self, exchange: Exchange) -> None:
        now_s = self._loop.time()
        at_s, kind, message = self._deadline_s, "timeout", f"no complete reply within {self._limits.total_s:g} s"
        limit_s, since_ns = self._limits.idle_s, exchange.last_ns
        name, what = "idle_timeout", "nothing more"
        if not exchange.reads:
            limit_s, since_ns, name, what = self._limits.first_byte_s, exchange.sent_ns, "first_byte_timeout", "no byte"
        if limit_s is not None and since_ns is not None:
            quiet_s = (time.perf_counter_ns() - since_ns) / 1e9
            if now_s + limit_s - quiet_s < at_s:
                at_s, kind, message = now_s + limit_s - quiet_s, name, f"{what} for {limit_s:g} s"
        late = now_s - self._armed_s > LATE_LOOP_S and self._excused_at != exchange.reads
        if at_s > now_s:
            self._arm(min(at_s, now_s + self._look_again_s), exchange)
        elif late:  # a loop that was held up has not looked at its sockets either, and does so first
            self._excused_at = exchange.reads
            self._arm(now_s + LATE_LOOP_S, exchange)
        else:
            self._give_up(kind, message)

    def _arm(self, at_s: float, exchange: Exchange) -> None:
        self._armed_s = at_s
        self._handle = self._loop.call_at(at_s, self.watch, exchange)

    def stop(self) -> None:
        if self._handle:
            self._handle.cancel()


# How an exception of any transport is called: the first name that fits, walking its causes outwards in.
_OS_ERRORS: tuple[tuple[str, str], ...] = (
    ("gaierror", "dns_error"),
    ("SSLCertVerificationError", "tls_error"),
    ("SSLError", "tls_error"),
    ("SSLZeroReturnError", "tls_error"),
    ("ConnectionRefusedError", "connect_refused"),
    ("ConnectionResetError", "reset"),
    ("BrokenPipeError", "reset"),
    ("ConnectionAbortedError", "reset"),
    ("ConnectTimeout", "connect_timeout"),
    ("ServerDisconnectedError", "closed"),
    ("ClientPayloadError", "cut"),
    ("RemoteProtocolError", "bad_http"),
    ("ClientResponseError", "bad_http"),
    ("ReadTimeout", "idle_timeout"),
    ("WriteTimeout", "timeout"),
    ("PoolTimeout", "timeout"),
    ("TimeoutError", "timeout"),
    ("ReadError", "reset"),
    ("ConnectError", "connect_error"),
)
# What httpx says with one and the same class.
_SAID: tuple[tuple[str, str], ...] = (("disconnected without", "closed"), ("peer closed", "cut"))
_NO_FILE = "no free file descriptor: raise `ulimit -n`"
_CLIENT_LIMITS = {
    "EADDRNOTAVAIL": "no free local port: the machine's ephemeral ports are used up; lower --concurrency",
    "EMFILE": _NO_FILE,
    "ENFILE": _NO_FILE,
    "ENOBUFS": "no buffer space left in this machine's kernel; lower --concurrency",
}
_NO_WAY = ("ENETUNREACH", "EHOSTUNREACH", "ENETDOWN", "EHOSTDOWN")


def classify(error: BaseException) -> tuple[str, str]:
    """(class, one line) of a failed call; the deepest cause with a name of its own decides."""
    kinds = dict(_OS_ERRORS)
    chain: list[BaseException] = []
    seen: Optional[BaseException] = error
    while seen is not None and seen not in chain:
        chain.append(seen)
        seen = seen.__cause__ or seen.__context__
    for cause in chain:
        if isinstance(cause, WireError):
            return cause.failure.kind, cause.failure.message
    if isinstance(chain[-1], (TimeoutError, asyncio.TimeoutError, asyncio.CancelledError)):
        chain = [cause for cause in chain if type(cause).__name__ == "ConnectTimeout"] or chain  # it says which
    for cause in reversed(chain):
        code = importlib.import_module("errno").errorcode.get(getattr(cause, "errno", None) or 0, "")
        if code in _CLIENT_LIMITS:
            return "client_limit", _CLIENT_LIMITS[code]
        if code in _NO_WAY:
            return "unreachable", _reason(cause)
        for base in type(cause).__mro__:
            if base.__name__ in kinds:
                said = next((kind for words, kind in _SAID if words in str(cause)), kinds[base.__name__])
                return said, _reason(cause)
    return "other", f"{type(error).__name__}: {_reason(error)}"


# === 9. Senders (how) (parse pure, send not) ===

ABORTED_REASONS = ("abort", "error", "cancelled")  # finish_reasons that mean: not finished


def _whole_number(value: Any) -> Optional[int]:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_TOKENS else None


def usage_of(usage: Any) -> dict[str, Any]:
    """Token counts of a usage object, as Answer's fields; nothing from one that counts nothing or is malformed."""
    if not isinstance(usage, dict):
        return {}
    prompt = _whole_number(usage.get("prompt_tokens"))
    completion = _whole_number(usage.get("completion_tokens"))
    if not prompt and not completion:
        return {}
    details = usage.get("prompt_tokens_details"), usage.get("completion_tokens_details")
    cached, reasoning = (item if isinstance(item, dict) else {} for item in details)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "cached_tokens": _whole_number(cached.get("cached_tokens")),
        "reasoning_tokens": _whole_number(reasoning.get("reasoning_tokens")),
        "has_usage": prompt is not None and completion is not None,
    }


def error_text(body: Any, levels: int = ERROR_LEVELS) -> Optional[str]:
    """The message of an error body in any of the forms servers send; None when it is no error.

    >>> error_text({"error": {"message": "no such model"}}), error_text({"detail": [{"msg": "bad"}]})
    ('no such model', 'bad')
    """
    if isinstance(body, list) and levels:
        return next((text for item in body for text in [error_text(item, levels - 1)] if text), None)
    if not isinstance(body, dict) or not levels:
        return None
    keys = ("error",) if body.get("choices") else ("error", "message", "detail", "msg")
    said = next((body[key] for key in keys if body.get(key)), None)
    if said is None or isinstance(said, str):
        return said
    return error_text(said, levels - 1) or glimpse(said)


def glimpse(value: Any) -> str:
    """The start of a value as JSON, however large or deep it is."""
    return "".join(itertools.islice(json.JSONEncoder().iterencode(value), ERROR_TEXT_CHARS))[:ERROR_TEXT_CHARS]


def error_body_text(data: bytes) -> str:
    """One line out of an error body: JSON's message, else its text, tags dropped."""
    text = data.decode("utf-8", "replace")
    try:
        message = error_text(json.loads(text))
    except (ValueError, RecursionError):
        message = None
    return plain(message or re.sub(r"<(script|style).*?</\1>|<[^>]*>", " ", text, flags=re.DOTALL | re.IGNORECASE))


def _failed(kind: str, message: str) -> Failure:
    return Failure("decode_error", kind, plain(message))


def _text_of(delta: Mapping[str, Any]) -> tuple[bool, bool]:
    """(whether a message or delta says anything, whether a reader would see it before the reasoning ends)."""
    visible = any(delta.get(key) for key in ("content", "refusal", "tool_calls", "function_call"))
    return visible or bool(delta.get("reasoning_content") or delta.get("reasoning")), visible


class WholeReader:
    """Reads a reply that comes as one JSON object."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self.complete = False

    def feed(self, stamp_ns: int, data: bytes) -> None:
        self._pieces.append(data)

    def answer(self) -> Answer:
        data = b"".join(self._pieces)
        if not data.strip():
            return Answer(failure=_failed("empty_body", "an empty body"))
        try:
            body = json.loads(data.decode("utf-8"))
        except UnicodeDecodeError:
            return Answer(failure=_failed("not_utf8", "the body is not UTF-8"))
        except (ValueError, RecursionError) as error:
            start = data[:80].decode("utf-8", "replace")
            return Answer(failure=_failed("bad_json", f"the body is not JSON ({error}): {start}"))
        return read_completion(body)


def read_completion(body: Any) -> Answer:
    """A chat completion object -> Answer, its failure said when it is not a complete one."""
    message = error_text(body)
    if message:
        return Answer(failure=_failed("error_body", message))
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return Answer(failure=_failed("no_choices", f"no choices in {glimpse(body)[:120]}"))
    counts = usage_of(body.get("usage"))
    finish = choices[0].get("finish_reason")
    if not isinstance(finish, str):
        finish = None
    said = choices[0].get("message")
    has_text = isinstance(said, dict) and _text_of(said)[0]
    failure = _verdict(finish, has_text, counts) if isinstance(said, dict) else None
    if not isinstance(said, dict):
        failure = _failed("no_choices", "a choice without a message")
    return Answer(finish_reason=finish, failure=failure, **counts)


def _verdict(finish: Optional[str], has_text: bool, counts: Mapping[str, Any]) -> Optional[Failure]:
    if finish in ABORTED_REASONS:
        return _failed("aborted_by_server", f"finish_reason {finish}")
    if not has_text and not counts.get("completion_tokens"):
        return _failed("empty", "a reply without a token")
    return None


_DELTA = b'"delta":'
_FAST_DELTA = _DELTA + b'{"content":"'
_FAST_END = b'"finish_reason":null'
_QUOTE = ord('"')
_TEXT = re.compile(rb'[^"\\\x00-\x1f]+')  # of a JSON string, free of escapes
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
STREAM_HEAD_BYTES = 4096
_NO_TAIL = bytearray()  # never filled: only a tail that is there grows
MOST_TOKENS_PER_CHUNK = 10_000  # a count beyond is a server's mistake, and no reason to run out of memory


def is_plain_content(event: bytes) -> bool:
    """Whether an event is surely a content chunk and nothing else, told without JSON; False when in doubt."""
    at = event.find(_DELTA)
    return (
        at > 0
        and event.startswith(_FAST_DELTA, at)
        and event.startswith(b"data: {")
        and event.endswith(b"}")
        and event[at + len(_FAST_DELTA)] != _QUOTE
        and _FAST_END in event
        and event.rfind(_DELTA) == at  # the only choice
        and b'"usage":{' not in event
        and b'"error"' not in event
        and b"\n" not in event
    )


def event_fields(event: bytes) -> tuple[bytes, bytes]:
    """(data, event name) of one server-sent event whose lines end in LF; comments and other fields are dropped.

    >>> event_fields(b": ping\\nevent: error\\ndata: a\\ndata:b")
    (b'a\\nb', b'error')
    """
    data, name = [], b""
    for line in event.split(b"\n"):
        field_name, _, value = line.partition(b":")
        value = value[1:] if value.startswith(b" ") else value
        if field_name == b"data":
            data.append(value)
        elif field_name == b"event":
            name = value
        elif field_name == b"error":
            data.append(value)
            name = b"error"
    return b"\n".join(data), name


class StreamReader:
    """Reads server-sent events, however they are cut into packets; an event bears its last byte's stamp."""

    def __init__(self) -> None:
        self.complete = False
        self._tail = _NO_TAIL
        self._after_cr = False
        self._stamp_ns = 0
        self._first_ns: Optional[int] = None
        self._visible_ns: Optional[int] = None
        self._last_ns: Optional[int] = None
        self._chunks = 0
        self._gaps_ms = array("f")
        self._finish: Optional[str] = None
        self._counts: dict[str, Any] = {}
        self._counted: Optional[int] = None
        self._failure: Optional[Failure] = None
        self._head = b""
        self._text_at = 0
        self._before = self._behind = b"\0"  # until the first plain event: no event is like this
        self._content_reads = 0
        self._merged_reads = 0
        self._alone = False  # whether the last read's chunk is its only one so far

    def feed(self, stamp_ns: int, data: bytes) -> None:
        self._stamp_ns = stamp_ns
        text = _TEXT.match(data, self._text_at)
        if (
            text
            and data[text.end() :] == self._behind
            and data.startswith(self._before)
            and not self._tail
            and not self._after_cr
        ):  # one event that differs from the last plain one in its text alone
            self._content(stamp_ns, True)
        else:
            self._feed_any(stamp_ns, data)

    def _learn(self, event: bytes) -> None:
        """The next event will most likely differ from this plain one in its text alone."""
        at = event.find(_FAST_DELTA) + len(_FAST_DELTA)
        text = _TEXT.match(event, at)
        if text:
            self._text_at, self._before, self._behind = at, event[:at], event[text.end() :] + b"\n\n"

    def _feed_any(self, stamp_ns: int, data: bytes) -> None:
        if len(self._head) < STREAM_HEAD_BYTES:
            data = self._opened(data)
        if b"\r" in data or self._after_cr:
            data = self._unix(data)
        if self._tail:
            seam = len(self._tail) - 1
            self._tail += data
            if self._tail.find(b"\n\n", seam) < 0:
                return  # so that an event of megabytes is looked through once, not once a packet
            data = bytes(self._tail)
        events = data.split(b"\n\n")
        tail = events.pop()
        self._tail = bytearray(tail) if tail else _NO_TAIL
        for event in events:
            self._event(stamp_ns, event)

    def _opened(self, data: bytes) -> bytes:
        """Keeps the first bytes, to say what came when no event did, and drops a byte order mark."""
        before, self._head = self._head, (self._head + data)[:STREAM_HEAD_BYTES]
        if len(before) >= len(BYTE_ORDER_MARK) or (before and not BYTE_ORDER_MARK.startswith(before)):
            return data
        if len(self._head) < len(BYTE_ORDER_MARK) and BYTE_ORDER_MARK.startswith(self._head):
            return b""  # it may become one
        data = before + data
        return data[len(BYTE_ORDER_MARK) :] if data.startswith(BYTE_ORDER_MARK) else data

    def _unix(self, data: bytes) -> bytes:
        if not data:
            return data
        after_cr, self._after_cr = self._after_cr, data.endswith(b"\r")
        if after_cr and data.startswith(b"\n"):
            data = data[1:]
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _event(self, stamp_ns: int, event: bytes) -> None:
        if event.startswith(b"\n"):
            event = event.lstrip(b"\n")
        if is_plain_content(event):
            self._learn(event)
            self._content(stamp_ns, True)
            return
        data, name = event_fields(event)
        if data == b"[DONE]":
            self.complete = self._finish is not None
        elif data:
            self._payload(stamp_ns, data, name)

    def _payload(self, stamp_ns: int, data: bytes, name: bytes) -> None:
        try:
            body = json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError):
            text = data[:120].decode("utf-8", "replace")
            kind = "stream_error" if name == b"error" else "bad_event"
            self._fail(kind, text if name == b"error" else f"an event that is not JSON: {text}")
            return
        message = error_text(body)
        if message or name == b"error":
            self._fail("stream_error", message or glimpse(body))
        elif not isinstance(body, dict):
            self._fail("bad_event", f"an event that is no JSON object: {data[:120]!r}")
        else:
            usage = usage_of(body.get("usage"))
            self._counts = usage or self._counts
            choices = body.get("choices")
            for choice in choices if isinstance(choices, list) else ():
                if isinstance(choice, dict):
                    self._choice(stamp_ns, choice, usage.get("completion_tokens"))

    def _choice(self, stamp_ns: int, choice: Mapping[str, Any], counted: Optional[int]) -> None:
        """`counted`: completion tokens up to here, where every chunk tells them."""
        delta = choice.get("delta")
        if isinstance(delta, dict):
            says, visible = _text_of(delta)
            if says:
                tokens = 1 if counted is None or self._counted is None else counted - self._counted
                self._content(stamp_ns, visible, max(1, tokens))
                self._counted = counted
        finish = choice.get("finish_reason")
        if isinstance(finish, str):
            self._finish = finish

    def _content(self, stamp_ns: int, visible: bool, tokens: int = 1) -> None:
        """A chunk known to hold several tokens spreads its gap evenly over them; chunks of one stamp, one read."""
        self._chunks += 1
        if stamp_ns != self._last_ns:
            self._content_reads += 1
            self._alone = True
        elif self._alone:
            self._merged_reads += 1
            self._alone = False
        if visible and self._visible_ns is None:
            self._visible_ns = stamp_ns
        if self._last_ns is None:
            self._first_ns = stamp_ns
        else:
            gap_ms = (stamp_ns - self._last_ns) / 1e6
            if tokens == 1:
                self._gaps_ms.append(gap_ms)
            else:
                self._gaps_ms.extend([gap_ms / tokens] * min(tokens, MOST_TOKENS_PER_CHUNK))
        self._last_ns = stamp_ns

    def _fail(self, kind: str, message: str) -> None:
        self._failure = self._failure or _failed(kind, message)

    def answer(self) -> Answer:
        tail, self._tail = bytes(self._tail), _NO_TAIL
        if tail.strip(b"\n"):
            self._last_words(tail)
        failure = self._failure or self._ending()
        counts = dict(self._counts)
        if counts.get("completion_tokens") is None and self._chunks:
            counts["completion_tokens"] = self._chunks
        return Answer(
            first_ns=self._first_ns,
            visible_ns=self._visible_ns,
            last_ns=self._last_ns,
            chunks=self._chunks,
            gaps_ms=self._gaps_ms,
            finish_reason=self._finish,
            content_reads=self._content_reads,
            merged_reads=self._merged_reads,
            failure=failure,
            **counts,
        )

    def _last_words(self, tail: bytes) -> None:
        """What stood before the end without a blank line: kept when it is whole, else the stream was cut."""
        data, name = event_fields(tail)
        try:
            whole = data == b"[DONE]" or isinstance(json.loads(data), dict)
        except (ValueError, RecursionError):
            whole = not data
        if not whole:
            self._fail("truncated", "the stream ended within an event")
        elif data and data != b"[DONE]":
            self._payload(self._stamp_ns, data, name)
        elif data:
            self.complete = self._finish is not None

    def _ending(self) -> Optional[Failure]:
        if self._finish is None and not self._chunks and not self._counts:
            return self._nothing()
        if self._finish is None:
            return _failed("truncated", f"the stream ended without a finish_reason, after {self._chunks} chunks")
        return _verdict(self._finish, self._chunks > 0, self._counts)

    def _nothing(self) -> Failure:
        if not self._head.strip():
            return _failed("empty_body", "an empty body")
        if b"data:" in self._head:
            return _failed("truncated", "a stream without a token and without a finish_reason")
        return _failed("not_a_stream", f"no server-sent events but: {error_body_text(self._head)}")


def read_stream(arrivals: Iterable[tuple[int, bytes]]) -> Answer:
    """(stamp in ns, bytes) as they came -> Answer; the same however the bytes were cut."""
    return _read(StreamReader(), arrivals)


def read_whole(arrivals: Iterable[tuple[int, bytes]]) -> Answer:
    """(stamp in ns, bytes) as they came -> Answer."""
    return _read(WholeReader(), arrivals)


def _read(reader: Reader, arrivals: Iterable[tuple[int, bytes]]) -> Answer:
    for stamp_ns, data in arrivals:
        reader.feed(stamp_ns, data)
    return reader.answer()


READERS: Mapping[bool, Callable[[], Reader]] = {False: WholeReader, True: StreamReader}  # by --stream


@dataclass(frozen=True)
class Dialect:
    """What the server takes, as far as the warm-up has found out."""

    limit_field: str = "max_tokens"
    include_usage: bool = True


def request_body(config: Config, dialect: Dialect, request: Request) -> dict[str, Any]:
    """The JSON that is sent: what was asked for, and no field beyond."""
    body: dict[str, Any] = {
        "model": config.model,
        "messages": request.messages,
        dialect.limit_field: request.output_tokens or config.output_tokens,
        "temperature": config.temperature,
    }
    if config.stream:
        body["stream"] = True
        if dialect.include_usage:
            body["stream_options"] = {"include_usage": True}
            if config.continuous_usage:
                body["stream_options"]["continuous_usage_stats"] = True
    return {**body, **config.extra_body}


def _with_other_limit(dialect: Dialect) -> Dialect:
    return dataclasses.replace(dialect, limit_field="max_completion_tokens")


def _without_usage(dialect: Dialect) -> Dialect:
    return dataclasses.replace(dialect, include_usage=False)


# What a refusal before the load may teach: the word in the message, and the dialect to try then.
CONCESSIONS: tuple[tuple[str, Callable[[Dialect], Dialect]], ...] = (
    ("max_tokens", _with_other_limit),
    ("max_completion_tokens", _with_other_limit),
    ("stream_options", _without_usage),
    ("include_usage", _without_usage),
)


def concede(dialect: Dialect, config: Config, refusals: Sequence[ErrorGroup]) -> Optional[Dialect]:
    """The dialect to try after these refusals; None when they teach nothing."""
    for group in refusals:
        for word, change in CONCESSIONS:
            fixed = change is _with_other_limit and config.max_tokens_field != "auto"
            taught = group.kind in ("http_400", "http_422") and word in group.first_message
            if taught and not fixed and change(dialect) != dialect:
                return change(dialect)
    return None


_EXCHANGE: contextvars.ContextVar[Exchange] = contextvars.ContextVar("exchange")


class Wire(Protocol):
    """A transport: what the SDK's HTTP client hands its requests to."""

    connections: int

    def http_client(self, openai: Any, httpx: ModuleType) -> Any: ...

    async def turn(self) -> None: ...

    async def reserve(self, count: int) -> None: ...

    async def read(self, exchange: Exchange, stream: Any) -> None: ...

    async def limited(self, exchange: Exchange, call: Coroutine[Any, Any, None]) -> None: ...

    @property
    def kernel_clock(self) -> bool: ...

    def label(self) -> str: ...

    async def aclose(self) -> None: ...


class StopwatchTransport(StopwatchWire):
    """The stopwatch behind the SDK's seam: an HTTP client of the SDK's own kind that sends through it."""

    def http_client(self, openai: Any, httpx: ModuleType) -> Any:
        wire = self
        none = httpx.Headers()
        heads: dict[Any, bytes] = {}  # one entry: the last head, which is every request's

        class Message(httpx.Request):  # type: ignore[name-defined, misc]
            """The request as the SDK made it, without a second parse of its parts."""

            def __init__(self, method: str, url: Any, wire_bytes: bytes) -> None:
                self.method, self.url, self.headers = method, url, none
                self.extensions: dict[str, Any] = {}
                self.wire_bytes = wire_bytes

        class Whole(httpx.Response):  # type: ignore[name-defined, misc]
            """A reply that has been read: its status, and its body where it is an error's."""

            def __init__(self, status: int, content: bytes, request: Any) -> None:
                self.status_code, self._content, self._request = status, content, request
                self.headers = none
                self.extensions: dict[str, Any] = {}
                self.history: list[Any] = []
                self.is_closed = self.is_stream_consumed = True
                self.next_request = self.stream = None
                self.default_encoding = "utf-8"

        class Client(httpx.AsyncClient):  # type: ignore[name-defined, misc]
            def build_request(self, method: str, url: Any, **parts: Any) -> Any:
                content, headers = parts.get("content"), parts.get("headers") or {}
                if content is None:
                    content = json.dumps(parts.get("json"), ensure_ascii=False, separators=(",", ":")).encode()
                pairs = headers if isinstance(headers, list) else list(headers.items())
                key = (method, url, tuple(pairs))
                head = heads.get(key)
                if head is None:
                    heads.clear()
                    head = heads[key] = http_head(method, str(url), pairs)
                return Message(method, url, b"%sContent-Length: %d\r\n\r\n%s" % (head, len(content), content))

            async def send(self, request: Any, **_: Any) -> Any:
                exchange = _EXCHANGE.get()
                await wire.perform(exchange, request.wire_bytes)
                return Whole(exchange.status or 0, bytes(exchange.error_body), request)

        return Client(timeout=None, trust_env=False)

    async def read(self, exchange: Exchange, stream: Any) -> None:
        """Nothing is left to read: the call returned when the reply was whole."""

    async def limited(self, exchange: Exchange, call: Coroutine[Any, Any, None]) -> None:
        """Its limits are kept below, by the watchdog of each connection."""
        await call


def http_head(method: str, url: str, headers: Sequence[tuple[str, str]]) -> bytes:
    """The head of an HTTP/1.1 request, all but its Content-Length."""
    parts = urlsplit(url)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    host = parts.netloc.rpartition("@")[2]
    lines = [f"{method.upper()} {target} HTTP/1.1", f"Host: {host}"]
    skipped = ("host", "content-length", "connection", "transfer-encoding")
    lines += [f"{name}: {value}" for name, value in headers if name.lower() not in skipped]
    return "\r\n".join([*lines, ""]).encode("latin-1")


class SdkTransport:
    """The SDK's own transports, tapped: aiohttp's where it is installed, else httpx."""

    def __init__(self, origin: Origin, timeouts: Timeouts, concurrency: int, trust_env: bool) -> None:
        self.connections = 0
        self._origin = origin
        self._timeouts = timeouts
        self._concurrency = concurrency
        self._trust_env = trust_env
        self._name = ""

    @property
    def kernel_clock(self) -> bool:
        return False

    def label(self) -> str:
        return f"sdk ({self._name})"

    def http_client(self, openai: Any, httpx: ModuleType) -> Any:
        limits = httpx.Limits(
            max_connections=self._concurrency,
            max_keepalive_connections=self._concurrency,
            keepalive_expiry=4.0,  # below the 5 s after which the usual servers close
        )
        options = {
            "limits": limits,
            "trust_env": self._trust_env,
            "follow_redirects": False,
            "verify": tls_context(self._origin) if self._origin.tls else False,
        }
        for self._name, base in (
            ("aiohttp", getattr(openai, "DefaultAioHttpClient", None)),
            ("httpx", httpx.AsyncClient),
        ):
            with contextlib.suppress(RuntimeError, TypeError, ImportError):
                if base is not None:
                    return self._tapped(base, httpx)(**options)
        raise RunError("no usable HTTP client comes with this openai; pip install -U openai")

    def _tapped(self, base: Any, httpx: ModuleType) -> Any:
        # Of its own time-outs only the one to connect: the watchdog has the others, as in the stopwatch.
        limits = {"connect": self._timeouts.connect_s, "read": None, "write": None, "pool": None}

        class Client(base):  # type: ignore[misc]
            async def send(self, request: Any, **options: Any) -> Any:
                exchange = _EXCHANGE.get()
                request.extensions = {**request.extensions, "timeout": limits}
                exchange.sent_ns = time.perf_counter_ns()
                response = await super().send(request, **{**options, "stream": True})
                exchange.last_ns = time.perf_counter_ns()
                exchange.reads += 1
                told = (response.headers.get(name.decode(), "") for name in _TOLD)
                exchange.head(response.status_code, *told)
                if 200 <= response.status_code < 300:
                    return response
                exchange.error_body += await start_of(response)
                return httpx.Response(response.status_code, content=bytes(exchange.error_body), request=request)

        return Client

    async def limited(self, exchange: Exchange, call: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(call)

        def give_up(kind: str, message: str) -> None:
            if not exchange.settled:
                exchange.failure = Failure("http_error", kind, message)
            task.cancel()

        loop = asyncio.get_running_loop()
        watchdog = Watchdog(loop, self._timeouts, loop.time() + self._timeouts.total_s, give_up)
        watchdog.watch(exchange)
        try:
            await task
        finally:
            watchdog.stop()

    async def turn(self) -> None:
        """Its own queue is the event loop's."""

    async def reserve(self, count: int) -> None:
        """It opens connections when it needs them."""

    async def read(self, exchange: Exchange, stream: Any) -> None:
        arrivals = stream.response.aiter_raw()
        try:
            async for data in arrivals:
                stamp = time.perf_counter_ns()
                exchange.reads += 1
                exchange.last_ns = stamp
                exchange.body(stamp, data)
        finally:  # else a reply that is not read to its end keeps its connection
            await arrivals.aclose()
            await stream.response.aclose()

    async def aclose(self) -> None:
        """The SDK's client closes its own."""


async def start_of(response: Any) -> bytes:
    """As much of a body as is kept of an error."""
    body = b""
    pieces = response.aiter_bytes()
    try:
        async for piece in pieces:
            body += piece
            if len(body) >= ERROR_BODY_BYTES:
                break
    finally:
        await pieces.aclose()
        await response.aclose()
    return body[:ERROR_BODY_BYTES]


def proxy_for(url: str) -> Optional[str]:
    """The proxy that the environment names for this URL; never one for a loopback host."""
    request = importlib.import_module("urllib.request")
    parts = urlsplit(url)
    host = parts.hostname or ""
    if is_loopback(host) or request.proxy_bypass(host):
        return None
    proxies: Mapping[str, str] = request.getproxies()
    return proxies.get(parts.scheme) or proxies.get("all")


def is_loopback(host: str) -> bool:
    """
    >>> is_loopback("localhost"), is_loopback("127.8.0.1"), is_loopback("::1"), is_loopback("127.example.org")
    (True, True, True, False)
    """
    if host == "localhost" or host.endswith(".localhost"):
        return True
    ipaddress = importlib.import_module("ipaddress")
    try:
        return bool(ipaddress.ip_address(host).is_loopback)
    except ValueError:
        return False


def open_wire(config: Config, concurrency: int) -> Wire:
    """The transport in force. Raises UserError when the one asked for cannot run here."""
    origin = Origin.of(config.api_base, config.ca_file, config.insecure)
    timeouts = Timeouts(config.connect_timeout, config.first_byte_timeout, config.idle_timeout, config.timeout)
    proxy = proxy_for(config.api_base)
    missing = f"a direct way: {mask_url(proxy)} is the proxy" if proxy else StopwatchWire.missing()
    if config.transport == "stopwatch" and missing:
        raise UserError(f"--transport stopwatch needs {missing}; --transport sdk does without")
    if config.transport == "sdk" or missing:
        return SdkTransport(origin, timeouts, concurrency, trust_env=proxy is not None)
    return StopwatchTransport(origin, timeouts, config.stream)


def the_sdk() -> tuple[Any, ModuleType]:
    """(openai, the HTTP library it is built on: httpx for 1.x and 2.x, httpx2 from 3.x on). Raises UserError."""
    try:
        openai: Any = importlib.import_module("openai")
    except ImportError as error:
        raise UserError(f"cannot import openai ({error}): pip install openai") from None
    return openai, importlib.import_module(openai.Timeout.__init__.__module__.partition(".")[0])


def hidden_words(config: Config, environ: Mapping[str, str]) -> list[str]:
    """What must not come back in a server's words: key, login, secret fields and headers."""
    login = unquote(urlsplit(config.api_base).netloc.rpartition("@")[0])
    headers = [line.partition(":") for line in environ.get("OPENAI_CUSTOM_HEADERS", "").splitlines()]
    words = {
        config.api_key,
        login,
        login.partition(":")[2],
        *(value.partition(" ")[2] for value in split_login(config.api_base)[1].values()),
        *secret_values(config.extra_body),
        *secret_values({name: value.strip() for name, _, value in headers}),
    }
    found = [plain(word) for word in words if len(word) >= LEAST_SECRET_CHARS and word not in PLAIN_KEYS]
    return sorted(found, key=len, reverse=True)


def client_class(openai: Any) -> Any:
    """AsyncOpenAI that works out its URL and its headers once: they are the same for every request of a run.

    Both methods are the SDK's inner ones; in a version without them nothing is kept, and nothing breaks.
    """

    class Client(openai.AsyncOpenAI):  # type: ignore[misc]
        def _prepare_url(self, url: str) -> Any:
            kept = self.__dict__.setdefault("_kept", {})
            if url not in kept:
                kept[url] = super()._prepare_url(url)
            return kept[url]

        def _build_headers(self, options: Any, **more: Any) -> Any:
            if options.headers:
                return super()._build_headers(options, **more)
            kept = self.__dict__.setdefault("_kept", {})
            if "headers" not in kept:
                kept["headers"] = super()._build_headers(options, **more)
            return kept["headers"]

    return Client


class Sender:
    """Makes calls through AsyncOpenAI.chat.completions.create; never raises for what a server does."""

    def __init__(self, config: Config, wire: Wire) -> None:
        openai, httpx = the_sdk()
        api_base, login = split_login(config.api_base)
        self._hidden = hidden_words(config, os.environ)
        self.dialect = Dialect("max_tokens" if config.max_tokens_field == "auto" else config.max_tokens_field)
        self._config = config
        self.wire = wire
        omit = importlib.import_module("openai._types").Omit()
        self._omit = {} if config.stream else {"stream": omit}
        self._absent = {"model": omit, "messages": omit}  # the prepared body has them: typed ones cost 50 us more
        self._client = client_class(openai)(
            api_key=config.api_key or "none",
            base_url=api_base,
            max_retries=0,  # a retry hidden inside a latency is a lie
            timeout=config.timeout,
            http_client=wire.http_client(openai, httpx),
            default_headers={"Accept-Encoding": "identity", **login},
        )
        self._create = self._client.chat.completions.create

    async def __call__(self, request: Request) -> Reply:
        exchange = Exchange(READERS[self._config.stream]())
        body = request_body(self._config, self.dialect, request)
        await self.wire.turn()
        try:
            await self.wire.limited(exchange, self._call(exchange, body))
        except asyncio.CancelledError:
            aborted = Failure("http_error", "aborted", "stopped before the reply had ended")
            exchange.failure = exchange.failure or (None if exchange.settled else aborted)
        except Exception as error:  # whatever a transport raises, the request failed and the run goes on
            if not exchange.settled:
                exchange.failure = self._failure(exchange, error)
        return self._discreet(reply_of(exchange))

    def _discreet(self, reply: Reply) -> Reply:
        """Some servers say which key they did not like."""
        answer, failure = reply.answer, reply.answer.failure
        finish = answer.finish_reason and without_secrets(plain(answer.finish_reason, 40), self._hidden)
        if failure:
            failure = failure._replace(message=without_secrets(failure.message, self._hidden))
        elif finish == answer.finish_reason:
            return reply
        return dataclasses.replace(reply, answer=dataclasses.replace(answer, finish_reason=finish, failure=failure))

    async def _call(self, exchange: Exchange, body: Mapping[str, Any]) -> None:
        """The SDK hands the prepared body on as it is and parses nothing: `stream=True` is its way to say so."""
        _EXCHANGE.set(exchange)
        extra = {**body, **self._omit}
        stream = await self._create(**self._absent, stream=True, extra_body=extra)
        await self.wire.read(exchange, stream)

    def _failure(self, exchange: Exchange, error: Exception) -> Optional[Failure]:
        if exchange.status is not None and not 200 <= exchange.status < 300 and not isinstance(error, WireError):
            return None  # said by the status itself
        kind, message = classify(error)
        if kind == "tls_error":
            message += "; --ca-file FILE trusts a private authority, --insecure trusts anybody"
        return Failure("http_error", kind, plain(message))

    async def aclose(self) -> None:
        await self._client.close()
        await self.wire.aclose()


def reply_of(exchange: Exchange) -> Reply:
    """What an exchange came to, once it has ended."""
    end_ns = time.perf_counter_ns()
    answer = Answer()
    failure = exchange.failure
    if exchange.status is not None and failure is None and not 200 <= exchange.status < 300:
        text = error_body_text(bytes(exchange.error_body)) or "no message"
        later = f" (Retry-After: {plain(exchange.retry_after, 40)})" if exchange.retry_after else ""
        failure = Failure("http_error", f"http_{exchange.status}", plain(f"HTTP {exchange.status}{later}: {text}"))
    elif failure is None:
        answer = exchange.reader.answer()
        end_ns = exchange.last_ns or end_ns
    return Reply(
        answer=answer if failure is None else dataclasses.replace(answer, failure=failure),
        ready_ns=exchange.ready_ns,
        sent_ns=exchange.sent_ns,
        end_ns=end_ns,
        http_status=exchange.status,
        new_connection=exchange.new_connection,
        reconnects=exchange.reconnects,
        reads=exchange.reads,
        kernel_reads=exchange.kernel_reads,
    )


def record_of(job: Job, reply: Reply, origin_ns: int) -> Record:
    """A reply as the record of its job, in seconds from the start of the run."""

    def seconds(stamp_ns: Optional[int]) -> Optional[float]:
        return None if stamp_ns is None else (stamp_ns - origin_ns) / 1e9

    answer, failure = reply.answer, reply.answer.failure
    return Record(
        index=job.index,
        due_s=job.due_s,
        ready_s=(reply.ready_ns - origin_ns) / 1e9,
        sent_s=seconds(reply.sent_ns),
        first_s=seconds(answer.first_ns),
        visible_s=seconds(answer.visible_ns),
        last_s=seconds(answer.last_ns),
        end_s=(reply.end_ns - origin_ns) / 1e9,
        status=failure.status if failure else "success",
        error_kind=failure.kind if failure else "",
        error=failure.message if failure else "",
        http_status=reply.http_status,
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
        cached_tokens=answer.cached_tokens,
        reasoning_tokens=answer.reasoning_tokens,
        has_usage=answer.has_usage,
        finish_reason=answer.finish_reason,
        chunks=answer.chunks,
        gaps_ms=answer.gaps_ms,
        new_connection=reply.new_connection,
        reconnects=reply.reconnects,
        reads=reply.reads,
        kernel_reads=reply.kernel_reads,
        content_reads=answer.content_reads,
        merged_reads=answer.merged_reads,
    )


def lost_record(job: Job, now_s: float, kind: str, message: str) -> Record:
    """The record of a job whose fate nobody saw."""
    failure = Failure("http_error", kind, message)
    stamp = int(now_s * 1e9)
    return record_of(job, Reply(Answer(failure=failure), stamp, None, stamp), 0)


# === 10. Demo server ===


@dataclass(frozen=True)
class Engine:
    """The simulated server's character. With `ttft_ms` every request is served alike, on a fixed timetable;
    without it, continuous batching: a prefill rate, a decode step that grows with the batch, a limit, a queue."""

    prefill_tokens_per_s: float = 200_000.0
    step_ms: float = 4.0
    step_ms_per_sequence: float = 0.02
    max_batch: int = 256
    ttft_ms: Optional[float] = None
    gap_ms: float = 10.0

    @classmethod
    def of(cls, text: str) -> Engine:
        """From a JSON object of its fields. Raises ValueError with the reason."""
        values = json.loads(text)
        names = [item.name for item in dataclasses.fields(cls)]
        if not isinstance(values, dict) or not set(values) <= set(names):
            raise ValueError(f"a JSON object with some of: {', '.join(names)}")
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
                raise ValueError(f"{name} must be a number, 0 or more")
        return cls(**values)


@dataclass
class Generation:
    """One request being served, and what truly happened to it (ns of the perf_counter clock)."""

    peer: Peer
    streamed: bool
    wants_usage: bool
    limit: int
    prompt_tokens: int
    number: int
    arrived_ns: int
    emitted: int = 0
    first_ns: int = 0
    last_ns: int = 0
    chunk: bytes = b""


TRUTH_FIELDS = ("number", "streamed", "arrived_ns", "first_ns", "last_ns", "prompt_tokens", "emitted")
DEMO_MODEL = "demo"
DEMO_TOKEN = " token"


class FixedTimetable:
    """First token after `ttft_ms`, then one every `gap_ms`, for each request on its own."""

    def __init__(self, engine: Engine, emit: Callable[[Generation, int], bool]) -> None:
        self._ttft_ns = int((engine.ttft_ms or 0) * 1e6)
        self._gap_ns = int(engine.gap_ms * 1e6)
        self._emit = emit
        self._due: list[tuple[int, int, Generation]] = []

    def submit(self, sequence: Generation) -> None:
        whole_ns = 0 if sequence.streamed else self._gap_ns * (sequence.limit - 1)
        due_ns = sequence.arrived_ns + self._ttft_ns + whole_ns
        heapq.heappush(self._due, (due_ns, sequence.number, sequence))

    def due_ns(self) -> Optional[int]:
        return self._due[0][0] if self._due else None

    def run(self, now_ns: int) -> None:
        while self._due and self._due[0][0] <= now_ns:
            due_ns, number, sequence = heapq.heappop(self._due)
            if self._emit(sequence, 1 if sequence.streamed else sequence.limit):
                heapq.heappush(self._due, (due_ns + self._gap_ns, number, sequence))

    def counts(self) -> tuple[int, int]:
        return len(self._due), 0


class ContinuousBatching:
    """Sequences join at step boundaries; a step decodes one token for each and prefills the newcomers."""

    def __init__(self, engine: Engine, emit: Callable[[Generation, int], bool]) -> None:
        self._engine = engine
        self._emit = emit
        self._running: list[Generation] = []
        self._waiting: deque[Generation] = deque()
        self._step_end_ns: Optional[int] = None

    def submit(self, sequence: Generation) -> None:
        self._waiting.append(sequence)
        if self._step_end_ns is None:
            self._begin(sequence.arrived_ns)

    def due_ns(self) -> Optional[int]:
        return self._step_end_ns

    def run(self, now_ns: int) -> None:
        if self._step_end_ns is not None and self._step_end_ns <= now_ns:
            self._running = [sequence for sequence in self._running if self._emit(sequence, 1)]
            self._begin(self._step_end_ns)

    def _begin(self, start_ns: int) -> None:
        prefill = 0
        while self._waiting and len(self._running) < self._engine.max_batch:
            sequence = self._waiting.popleft()
            prefill += sequence.prompt_tokens
            self._running.append(sequence)
        if not self._running:
            self._step_end_ns = None
            return
        step_ms = self._engine.step_ms + self._engine.step_ms_per_sequence * len(self._running)
        step_ns = step_ms * 1e6 + prefill / self._engine.prefill_tokens_per_s * 1e9
        self._step_end_ns = start_ns + int(step_ns)

    def counts(self) -> tuple[int, int]:
        return len(self._running), len(self._waiting)


class Peer:
    """One client's connection to the demo server."""

    def __init__(self, server: DemoServer, sock: socket.socket) -> None:
        self._server = server
        self.sock = sock
        self._received = b""
        self._unsent = b""
        self.busy = False
        self.closed = False

    def readable(self) -> None:
        try:
            data, stamp_ns, _ = self._server.clock.receive(self.sock)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        self._received += data
        self.advance(stamp_ns)

    def advance(self, stamp_ns: int) -> None:
        """Take up the next whole request, one at a time."""
        if not self._received[:1].isalpha() and self._received:  # no HTTP: a TLS greeting, say
            self.close()
            return
        if self.busy or b"\r\n\r\n" not in self._received:
            return
        head, _, rest = self._received.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        headers = {
            name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])
        }
        length = headers.get("content-length", "0")
        size = int(length) if length.isdigit() else 0
        if len(rest) < size:
            if headers.get("expect", "").lower() == "100-continue" and not rest:
                self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            return
        self._received = rest[size:]
        method, _, target = lines[0].partition(" ")
        self._server.answer(self, method, target.partition(" ")[0].partition("?")[0], (rest[:size], stamp_ns))

    def send(self, data: bytes) -> None:
        if self._unsent:
            self._unsent += data
            return
        try:
            sent = self.sock.send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            self.close()
            return
        if sent < len(data):
            self._unsent = data[sent:]
            self._server.selector.modify(self.sock, _READABLE | _WRITABLE, self)

    def writable(self) -> None:
        data, self._unsent = self._unsent, b""
        self._server.selector.modify(self.sock, _READABLE, self)
        self.send(data)

    def reply(self, status: str, body: bytes, content_type: str = "application/json") -> None:
        head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
        self.send(head.encode() + body)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._server.selector.unregister(self.sock)
            self.sock.close()


def chunk_of(data: bytes) -> bytes:
    """One HTTP chunk."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def event_of(payload: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(payload, separators=(",", ":")).encode() + b"\n\n"


class DemoServer:
    """A simulated LLM server on loopback: chat completions whole and streamed, models, health, metrics, truth."""

    def __init__(self, engine: Engine, port: int, leash: Optional[int] = None) -> None:
        """`leash`: a descriptor whose end of file ends the server too. Raises OSError when the port is taken."""
        self.selector = selectors.DefaultSelector()
        self.clock = KernelClock()
        self.truth: list[tuple[Any, ...]] = []
        self.served_tokens = Counter({"prompt": 0, "generation": 0})
        self.ttft_ms: array[float] = array("d")
        self.latency_ms: array[float] = array("d")
        self.in_flight = 0
        self.peak_in_flight = 0
        self.connections = 0
        self._numbers = itertools.count()
        self._engine = (ContinuousBatching if engine.ttft_ms is None else FixedTimetable)(engine, self._emit)
        self._listener = socket.create_server(("127.0.0.1", port), backlog=SOCKET_BACKLOG)
        self._listener.setblocking(False)
        stamped(self._listener)  # inherited by what it accepts, before the first byte
        self.port: int = self._listener.getsockname()[1]
        self.selector.register(self._listener, _READABLE)
        self._leash = leash
        if leash is not None:
            self.selector.register(leash, _READABLE)

    def serve(self) -> None:
        """Until the leash breaks."""
        while True:
            due_ns = self._engine.due_ns()
            wait_s = None if due_ns is None else max(0.0, (due_ns - time.perf_counter_ns()) / 1e9)
            ready = self.selector.select(wait_s)
            self.clock.pair()
            for key, mask in ready:
                if key.data is None:
                    if key.fileobj == self._leash:
                        return
                    self._accept()
                    continue
                peer: Peer = key.data
                if mask & _WRITABLE:
                    peer.writable()
                if mask & _READABLE and not peer.closed:
                    peer.readable()
            self._engine.run(time.perf_counter_ns())

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.connections += 1
                self.selector.register(sock, _READABLE, Peer(self, sock))

    # --- requests ---

    def answer(self, peer: Peer, method: str, path: str, request: tuple[bytes, int]) -> None:
        body, arrived_ns = request
        if method == "POST" and path.endswith("/chat/completions"):
            problem = self._start(peer, body, arrived_ns)
            if problem:
                error = {"error": {"message": problem, "type": "BadRequestError", "code": 400}}
                peer.reply("400 Bad Request", json.dumps(error).encode())
            return
        page = self._pages().get(path) if method == "GET" else None
        if page is None:
            error = {"error": {"message": f"nothing at {method} {path}", "type": "NotFoundError", "code": 404}}
            peer.reply("404 Not Found", json.dumps(error).encode())
        else:
            content, content_type = page()
            peer.reply("200 OK", content.encode(), content_type)

    def _pages(self) -> Mapping[str, Callable[[], tuple[str, str]]]:
        models = {"object": "list", "data": [{"id": DEMO_MODEL, "object": "model", "owned_by": "demo"}]}
        return {
            "/v1/models": lambda: (json.dumps(models), "application/json"),
            "/health": lambda: ("", "text/plain"),
            "/metrics": lambda: (self._metrics(), "text/plain; version=0.0.4"),
            "/truth": lambda: (json.dumps(self.truth_report()), "application/json"),
        }

    def _start(self, peer: Peer, body: bytes, arrived_ns: int) -> str:
        """Take a chat request in; the reason when it is not one."""
        try:
            asked = json.loads(body)
            messages = asked["messages"]
            text = " ".join(str(message["content"]) for message in messages)
            limit = asked.get("max_tokens", asked.get("max_completion_tokens", 16))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            return f"not a chat completion request: {type(error).__name__} {error}"
        if not isinstance(limit, int) or limit < 1:
            return "max_tokens must be a whole number, 1 or more"
        streamed = bool(asked.get("stream"))
        wants_usage = bool((asked.get("stream_options") or {}).get("include_usage"))
        prompt_tokens = 8 + len(re.findall(r"\w+|[^\w\s]", text))
        sequence = Generation(peer, streamed, wants_usage, limit, prompt_tokens, next(self._numbers), arrived_ns)
        peer.busy = True
        self.in_flight += 1
        self.peak_in_flight = max(self.peak_in_flight, self.in_flight)
        sequence.chunk = chunk_of(event_of(self._chunk(sequence, {"content": DEMO_TOKEN})))
        self._engine.submit(sequence)
        return ""

    # --- replies ---

    def _emit(self, sequence: Generation, tokens: int) -> bool:
        """Produce some tokens; whether there are more to come."""
        peer = sequence.peer
        if peer.closed:
            self.in_flight -= 1
            return False
        first = not sequence.emitted
        sequence.emitted += tokens
        last = sequence.emitted >= sequence.limit
        data = sequence.chunk if sequence.streamed else b""
        if sequence.streamed and first:
            data = self._stream_head(sequence) + data
        if sequence.streamed and last:
            data += self._stream_end(sequence)
        now_ns = time.perf_counter_ns()  # the last step before sending: nothing may come between
        if first:
            sequence.first_ns = now_ns
        if data:
            peer.send(data)
        if last:
            sequence.last_ns = now_ns
            self._done(sequence)
        return not last

    def _done(self, sequence: Generation) -> None:
        if not sequence.streamed:
            choice = {
                "index": 0,
                "message": {"role": "assistant", "content": DEMO_TOKEN * sequence.emitted},
                "finish_reason": "length",
            }
            body = {**self._stub(sequence, "chat.completion"), "choices": [choice], "usage": self._usage(sequence)}
            data = json.dumps(body).encode()
            sequence.last_ns = time.perf_counter_ns()
            sequence.peer.reply("200 OK", data)
        self.in_flight -= 1
        self.served_tokens["prompt"] += sequence.prompt_tokens
        self.served_tokens["generation"] += sequence.emitted
        self.ttft_ms.append((sequence.first_ns - sequence.arrived_ns) / 1e6)
        self.latency_ms.append((sequence.last_ns - sequence.arrived_ns) / 1e6)
        self.truth.append(tuple(getattr(sequence, name) for name in TRUTH_FIELDS))
        sequence.peer.busy = False
        if not sequence.peer.closed:
            sequence.peer.advance(time.perf_counter_ns())

    def _stub(self, sequence: Generation, kind: str) -> dict[str, Any]:
        created = int(time.time())
        return {"id": f"chatcmpl-{sequence.number}", "object": kind, "created": created, "model": DEMO_MODEL}

    def _usage(self, sequence: Generation) -> dict[str, int]:
        prompt, completion = sequence.prompt_tokens, sequence.emitted
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _chunk(self, sequence: Generation, delta: Mapping[str, str], finish: Optional[str] = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {**self._stub(sequence, "chat.completion.chunk"), "choices": [choice]}

    def _stream_head(self, sequence: Generation) -> bytes:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        return head + chunk_of(event_of(self._chunk(sequence, {"role": "assistant", "content": ""})))

    def _stream_end(self, sequence: Generation) -> bytes:
        events = event_of(self._chunk(sequence, {}, "length"))
        if sequence.wants_usage:
            stub = self._stub(sequence, "chat.completion.chunk")
            events += event_of({**stub, "choices": [], "usage": self._usage(sequence)})
        return chunk_of(events + b"data: [DONE]\n\n") + b"0\r\n\r\n"

    # --- what it says of itself ---

    def truth_report(self) -> dict[str, Any]:
        """Every finished request with the server's own stamps, in ns of the machine's perf_counter clock."""
        return {
            "fields": TRUTH_FIELDS,
            "requests": self.truth,
            "in_flight": self.in_flight,
            "peak_in_flight": self.peak_in_flight,
            "connections": self.connections,
        }

    def _metrics(self) -> str:
        running, waiting = self._engine.counts()
        label = f'{{model_name="{DEMO_MODEL}"}}'
        lines = [
            f"vllm:num_requests_running{label} {running}",
            f"vllm:num_requests_waiting{label} {waiting}",
            f"vllm:prompt_tokens_total{label} {self.served_tokens['prompt']}",
            f"vllm:generation_tokens_total{label} {self.served_tokens['generation']}",
            f'vllm:request_success_total{{finished_reason="length",model_name="{DEMO_MODEL}"}} {len(self.truth)}',
        ]
        for name, sample in (("time_to_first_token", self.ttft_ms), ("e2e_request_latency", self.latency_ms)):
            lines += [
                f"vllm:{name}_seconds_sum{label} {math.fsum(sample) / 1e3}",
                f"vllm:{name}_seconds_count{label} {len(sample)}",
            ]
        return "\n".join(lines) + "\n"


def serve_demo(engine: Engine, port: int, leashed: bool) -> int:
    """Run the demo server in this process; its first line on stdout is its base URL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN if leashed else signal.default_int_handler)
    try:
        server = DemoServer(engine, port, sys.stdin.fileno() if leashed else None)
    except OSError as error:
        raise UserError(f"cannot serve on port {port}: {error.strerror or error}; 0 takes a free one") from None
    report(f"http://127.0.0.1:{server.port}/v1")
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve()
    return 0


class DemoProcess:
    """The demo server in a process of its own, on a leash: it ends with its parent, however that ends."""

    def __init__(self, engine: Optional[str]) -> None:
        subprocess = importlib.import_module("subprocess")
        options = ["--demo-engine", engine] if engine else []
        try:
            self._process = subprocess.Popen(
                [sys.executable, THIS_FILE, "--demo-server", "0", "--demo-leash", *options],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise RunError(f"cannot start the demo server: {_reason(error)}") from None
        self.api_base: str = self._process.stdout.readline().decode().strip()
        if not self.api_base:
            raise RunError("the demo server did not start")

    def truth(self, since_ns: int) -> dict[str, Distribution]:
        """Latency and TTFT as the server saw them, of the requests that arrived from `since_ns` on."""
        report_ = fetch_json(self.api_base[: -len("/v1")] + "/truth", None)
        rows = [dict(zip(report_["fields"], row)) for row in report_["requests"]]
        measured = [row for row in rows if row["arrived_ns"] >= since_ns]
        streamed = [row for row in measured if row["streamed"]]
        return {
            "latency": describe((row["last_ns"] - row["arrived_ns"]) / 1e6 for row in measured),
            "ttft": describe((row["first_ns"] - row["arrived_ns"]) / 1e6 for row in streamed),
        }

    def stop(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def fetch_json(url: str, api_key: Optional[str], timeout_s: float = 5.0) -> Any:
    """GET with the standard library alone; no redirect is followed, the key is for this server only.

    Raises OSError, ValueError or http.client.HTTPException.
    """
    request = importlib.import_module("urllib.request")
    url, login = split_login(url)
    proxies: Optional[dict[str, str]] = None if proxy_for(url) else {}
    straight = type("Straight", (request.HTTPRedirectHandler,), {"redirect_request": lambda *_: None})
    opener = request.build_opener(request.ProxyHandler(proxies), straight)
    headers = {**({"Authorization": f"Bearer {api_key}"} if api_key else {}), **login}
    with opener.open(request.Request(url, headers=headers), timeout=timeout_s) as response:
        return json.loads(response.read(ERROR_BODY_BYTES * 1024))


# === 11. Runner ===


class Stop:
    """Two stages: first no new jobs and a drain, then the end at once."""

    def __init__(self) -> None:
        self.draining = asyncio.Event()
        self.now = asyncio.Event()
        self.interrupted = False
        self.reason = ""

    def press(self) -> None:
        """Ctrl-C and its kin: the first drains, the second ends."""
        self.interrupted = True
        if self.draining.is_set():
            self.now.set()
        self.draining.set()

    def end(self, reason: str) -> None:
        """The run itself sees no sense in going on."""
        self.reason = self.reason or reason
        self.draining.set()
        self.now.set()


class Breaker:
    """Ends a run that fails everything, or more than was allowed."""

    def __init__(self, tally: Tally, stop: Stop, most_errors: Optional[int]) -> None:
        self._tally = tally
        self._stop = stop
        self._most = most_errors

    def add(self, record: Record) -> None:
        if record.ok:
            return
        if self._most is not None and self._tally.errors >= self._most:
            self._stop.end(f"stopped after {self._tally.errors} errors (--stop-after-errors)")
        elif self._tally.identical_failures() >= IDENTICAL_FAILURES_TO_STOP:
            self._stop.end(f"stopped: the first {self._tally.errors} requests all failed alike")


@dataclass(frozen=True)
class Load:
    """One run of jobs: what to send, through what, how many at once, and who is told."""

    jobs: Iterable[Job]
    workload: Workload
    send: Send
    sinks: Sequence[Sink]
    concurrency: int
    origin_ns: int = 0


class Pool:
    """Workers that drain a queue of jobs, a semaphore bounding what is in flight."""

    def __init__(self, load: Load, stop: Stop) -> None:
        self._load = load
        self._stop = stop
        self._queue: deque[Job] = deque(load.jobs)
        self._gate = asyncio.Semaphore(load.concurrency)
        self._in_flight = 0
        self.peak_in_flight = 0

    async def drain(self) -> None:
        """Until every job is done, or a stop; what a stop leaves unfinished is recorded as aborted."""
        workers = [asyncio.ensure_future(self._work()) for _ in range(min(self._load.concurrency, len(self._queue)))]
        if not workers:
            return
        everything = asyncio.gather(*workers)
        await self._until(everything, self._stop.draining, None)
        await self._until(everything, self._stop.now, DRAIN_GRACE_S)
        for worker in workers:
            worker.cancel()
        outcomes = await asyncio.gather(*workers, return_exceptions=True)
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await everything
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome

    async def _until(self, everything: asyncio.Future[Any], event: asyncio.Event, grace_s: Optional[float]) -> None:
        """Wait for all workers, for the event, or for the time limit."""
        waiting = asyncio.ensure_future(event.wait())
        await asyncio.wait({everything, waiting}, timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()

    async def _work(self) -> None:
        free_ns: Optional[int] = None
        while self._queue and not self._stop.draining.is_set():
            job = self._queue.popleft()
            async with self._gate:
                reply = await self._serve(job)
            # What passed since the last reply had arrived is this client's doing, late wake-ups included.
            ready_ns = reply.ready_ns if free_ns is None else free_ns
            free_ns = reply.end_ns
            record = record_of(job, dataclasses.replace(reply, ready_ns=ready_ns), self._load.origin_ns)
            for sink in self._load.sinks:
                sink.add(record)

    async def _serve(self, job: Job) -> Reply:
        request = self._load.workload(job.index)
        self._in_flight += 1
        self.peak_in_flight = max(self.peak_in_flight, self._in_flight)
        try:
            return await self._load.send(request)
        finally:
            self._in_flight -= 1


class Pulse:
    """Takes this process's own pulse over the timed part: loop lag, CPU, waiting for a core, pauses."""

    def __init__(self) -> None:
        self._lags_ms: array[float] = array("d")
        self._pause_ms = 0.0
        self._gc_start = 0.0
        self._start = (0.0, 0.0, 0.0)
        self._task: Optional[asyncio.Future[None]] = None

    def start(self) -> None:
        """Quiet the garbage collector, too: its full passes are pauses of tens of milliseconds."""
        gc.collect()
        gc.freeze()
        self._thresholds = gc.get_threshold()
        gc.set_threshold(*GC_THRESHOLDS)
        gc.callbacks.append(self._on_gc)
        self._start = (time.perf_counter(), time.process_time(), waiting_for_core_s())
        self._task = asyncio.ensure_future(self._sample())

    async def _sample(self) -> None:
        while True:
            asked = time.perf_counter()
            await asyncio.sleep(LAG_SAMPLE_S)
            self._lags_ms.append(max(0.0, time.perf_counter() - asked - LAG_SAMPLE_S) * 1e3)

    def _on_gc(self, phase: str, _: Mapping[str, Any]) -> None:
        if phase == "start":
            self._gc_start = time.perf_counter()
        else:
            self._pause_ms = max(self._pause_ms, (time.perf_counter() - self._gc_start) * 1e3)

    def stop(self, peak_in_flight: int, wire: Wire) -> Health:
        wall, cpu, waiting = self._start
        health = Health(
            wall_s=time.perf_counter() - wall,
            cpu_s=time.process_time() - cpu,
            waiting_s=waiting_for_core_s() - waiting,
            lag_p99_ms=describe(self._lags_ms).percentiles.get(99.0, 0.0),
            lag_max_ms=max(self._lags_ms, default=0.0),
            gc_pause_ms=self._pause_ms,
            peak_in_flight=peak_in_flight,
            connections=wire.connections,
            transport=wire.label(),
            kernel_clock=wire.kernel_clock,
        )
        if self._task:
            self._task.cancel()
        gc.callbacks.remove(self._on_gc)
        gc.set_threshold(*self._thresholds)
        gc.unfreeze()
        return health


def waiting_for_core_s() -> float:
    """Seconds this process was ready to run but had no core (Linux; else 0)."""
    try:
        with open("/proc/self/schedstat", "rb") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


@dataclass
class Station:
    """One process's part of a run: its jobs, its share of the concurrency, and where records go."""

    config: Config
    workload: Workload
    sinks: Sequence[Sink]
    stop: Stop
    begin: Callable[[int], None]  # told the start of the timed part, in ns of perf_counter
    shard: int = 0
    shards: int = 1

    @property
    def concurrency(self) -> int:
        return max(1, share(self.config.concurrency, self.shard, self.shards))

    def jobs(self) -> Sequence[Job]:
        return closed_loop(self.config.total_requests, self.shard, self.shards)


async def warm_up(station: Station, sender: Sender) -> None:
    """Open every connection, learn what the server takes. Raises RunError when every call fails."""
    count = share(station.config.warmup, station.shard, station.shards)
    tally = await _warm_up_once(station, sender, count)
    while tally.errors and not tally.ok:
        dialect = concede(sender.dialect, station.config, tally.error_groups())
        if dialect is None or station.stop.draining.is_set():
            break
        note(f"the server refused ({tally.first_error()}); trying {dialect}")
        sender.dialect = dialect
        tally = await _warm_up_once(station, sender, count)
    if station.stop.interrupted:
        return
    if tally.errors and not tally.ok:
        raise RunError(f"the warm-up failed, nothing was measured: {tally.first_error()}")
    if count:
        await sender.wire.reserve(min(station.concurrency, len(station.jobs())))
    if tally.errors:
        note(f"{tally.errors} of {count} warm-up requests failed: {tally.first_error()}")


async def _warm_up_once(station: Station, sender: Sender, count: int) -> Tally:
    """All at once, as the measured run will be, so that it finds its connections open."""
    tally = Tally()
    jobs = [Job(station.shard + index * station.shards) for index in range(count)]
    workload = partial(warmup_request, station.config)
    await Pool(Load(jobs, workload, sender, [tally], station.concurrency), station.stop).drain()
    return tally


async def measure(station: Station, released: Optional[Callable[[], Awaitable[int]]] = None) -> Optional[Health]:
    """Warm up, wait for the release if there is one, run; None when it was stopped before the timed part."""
    the_sdk()  # when it is missing, before any socket is opened
    wire = open_wire(station.config, station.concurrency)
    sender = Sender(station.config, wire)
    try:
        await warm_up(station, sender)
        origin_ns = await released() if released else time.perf_counter_ns()
        if station.stop.draining.is_set():
            return None
        station.begin(origin_ns)
        load = Load(station.jobs(), station.workload, sender, station.sinks, station.concurrency, origin_ns)
        pool = Pool(load, station.stop)
        pulse = Pulse()
        wire.connections = 0
        pulse.start()
        try:
            await pool.drain()
        finally:
            health = pulse.stop(pool.peak_in_flight, wire)
        return health
    finally:
        await sender.aclose()


def run_loop(main: Coroutine[Any, Any, Any]) -> Any:
    """asyncio.run on uvloop where it is installed."""
    loop: asyncio.AbstractEventLoop
    try:
        loop = importlib.import_module("uvloop").new_event_loop()
    except ImportError:
        loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(main)
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        asyncio.set_event_loop(None)
        loop.close()


STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    STOP_SIGNALS.remove(signal.SIGHUP)  # nohup: the run is to outlive its terminal


def on_signals(stop: Stop) -> None:
    loop = asyncio.get_running_loop()
    for number in STOP_SIGNALS:
        try:
            loop.add_signal_handler(number, stop.press)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.press))


def spare_one_signal(stop: Stop) -> None:
    """A report is short: the first signal lets it end, the second ends it."""

    def press(number: int, _: Any) -> None:
        stop.press()
        signal.signal(number, signal.SIG_DFL)

    for number in STOP_SIGNALS:
        signal.signal(number, press)


@contextlib.contextmanager
def signals_as_before() -> Iterator[None]:
    """Afterwards; an event loop leaves its own."""
    kept = [(number, signal.getsignal(number)) for number in STOP_SIGNALS]
    try:
        yield
    finally:
        for number, handler in kept:
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


# === 12. Shards ===


class PipeSink:
    """A shard's records, to its parent: one JSON line each, written whole and at once."""

    def add(self, record: Record) -> None:
        row = [getattr(record, name) for name in _RECORD_FIELDS]
        row[_GAPS_AT] = base64.b64encode(array("f", record.gaps_ms).tobytes()).decode()
        tell({"record": row})


_RECORD_FIELDS = [item.name for item in dataclasses.fields(Record)]
_GAPS_AT = _RECORD_FIELDS.index("gaps_ms")


def record_from(row: list[Any]) -> Record:
    """The inverse of what PipeSink writes."""
    gaps = array("f")
    gaps.frombytes(base64.b64decode(row[_GAPS_AT]))
    row[_GAPS_AT] = gaps
    return Record(*row)


def tell(message: Mapping[str, Any]) -> None:
    """A line to the parent; without one there is nobody to work for."""
    try:
        os.write(sys.stdout.fileno(), json.dumps(message).encode() + b"\n")
    except OSError:
        os._exit(1)


async def shard_main(shard: int, shards: int) -> None:
    """One process of several: its configuration and its orders come on stdin, its records go to stdout."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the parent decides
    orders, pipe = await _stdin_lines()
    config = Config(**json.loads(await orders.readline()))
    workload = workload_of(config, load_requests(config.requests_file, config.system_prompt))
    stop = Stop()
    station = Station(config, workload, [PipeSink()], stop, lambda origin_ns: None, shard, shards)
    go: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    listener = asyncio.ensure_future(_obey(orders, stop, go))

    async def released() -> int:
        tell({"ready": shard})
        return await go

    try:
        health = await measure(station, released)
        tell({"health": dataclasses.asdict(health) if health else None})
    except (UserError, RunError) as error:
        tell({"fatal": str(error)})
    finally:
        listener.cancel()
        pipe.close()
        await asyncio.sleep(0)  # it closes a turn later


async def _stdin_lines() -> tuple[asyncio.StreamReader, asyncio.BaseTransport]:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=1 << 26)
    pipe, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader, pipe


async def _obey(orders: asyncio.StreamReader, stop: Stop, go: asyncio.Future[int]) -> None:
    """Orders of the parent: `go ORIGIN_NS`, `press`, `end`; its end of file ends everything."""
    while True:
        words = (await orders.readline()).split()
        if not words:
            os._exit(1)
        if words[0] == b"go":
            if not go.done():
                go.set_result(int(words[1]))
        elif words[0] == b"press":
            stop.press()
            if not go.done():
                go.set_result(0)
        else:
            stop.end("")


class Shard:
    """The parent's view of one of its processes."""

    def __init__(self, number: int, config: Config, station: Station) -> None:
        self.number = number
        self._config = config
        self._station = station
        self._process: Optional[asyncio.subprocess.Process] = None
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.seen: set[int] = set()
        self.health: Optional[Health] = None
        self.done = False
        self.fatal = ""

    async def start(self) -> None:
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                THIS_FILE,
                "--shard",
                f"{self.number}/{self._config.processes}",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,
                limit=1 << 26,
            )
        except OSError as error:
            raise RunError(f"cannot start process {self.number}: {_reason(error)}; lower --processes") from None
        self.order(json.dumps(dataclasses.asdict(self._config)))

    def order(self, line: str) -> None:
        """By pipe, never by argv: the key is among it."""
        if self._process and self._process.stdin and not self._process.stdin.is_closing():
            with contextlib.suppress(OSError, RuntimeError):
                self._process.stdin.write(line.encode() + b"\n")

    async def listen(self) -> None:
        """Until its end; every record goes to the sinks as if it had been made here."""
        assert self._process is not None
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            try:
                message = json.loads(line)
            except ValueError:  # cut by its death
                break
            if "record" in message:
                record = record_from(message["record"])
                self.seen.add(record.index)
                for sink in self._station.sinks:
                    sink.add(record)
            elif "ready" in message:
                self.ready.set_result(None)
            elif "fatal" in message:
                self.fatal = message["fatal"]
            else:
                self.done = True
                self.health = Health(**message["health"]) if message["health"] else None
        if not self.ready.done():
            self.ready.set_result(None)
        await self._process.wait()

    def close(self) -> None:
        if self._process and self._process.stdin:
            self._process.stdin.close()

    def kill(self) -> None:
        if self._process and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    def lost(self) -> list[Job]:
        """Jobs that died with it."""
        jobs = closed_loop(self._config.total_requests, self.number, self._config.processes)
        return [job for job in jobs if job.index not in self.seen]


async def measure_sharded(station: Station) -> list[Health]:
    """The same run by several processes, released together. Raises RunError when none could begin."""
    shards = [Shard(number, station.config, station) for number in range(station.config.processes)]
    listeners: list[asyncio.Future[None]] = []
    pressing = asyncio.ensure_future(_pass_on(station.stop, shards))
    try:
        for shard in shards:
            await shard.start()
            listeners.append(asyncio.ensure_future(shard.listen()))
        await asyncio.gather(*(shard.ready for shard in shards))
        fatal = next((shard.fatal for shard in shards if shard.fatal), "")
        if fatal:
            raise RunError(fatal)
        origin_ns = time.perf_counter_ns()
        if not station.stop.draining.is_set():
            station.begin(origin_ns)
        for shard in shards:
            shard.order(f"go {origin_ns}")
        await asyncio.gather(*listeners)
        _count_the_lost(shards, station, origin_ns)
    finally:
        pressing.cancel()
        for shard in shards:
            shard.close()
        await asyncio.gather(*listeners, return_exceptions=True)
    return [shard.health for shard in shards if shard.health]


async def _pass_on(stop: Stop, shards: Sequence[Shard]) -> None:
    for stage in (stop.draining, stop.now):
        await stage.wait()
        for shard in shards:
            shard.order("press" if stop.interrupted else "end")
    await asyncio.sleep(DRAIN_GRACE_S)
    for shard in shards:
        shard.kill()  # it does not obey


def _count_the_lost(shards: Sequence[Shard], station: Station, origin_ns: int) -> None:
    for shard in shards:
        if shard.done:
            continue
        now_s = (time.perf_counter_ns() - origin_ns) / 1e9
        jobs = shard.lost()
        note(f"process {shard.number} died; its {len(jobs)} unfinished requests count as errors")
        for job in jobs:
            record = lost_record(job, now_s, "process_lost", "the client process that had this request died")
            for sink in station.sinks:
                sink.add(record)


# === 13. Command line (build pure, run not) ===


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Names what it does not know without the value: a mistyped --api-key has one, too."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            names = [word.partition("=")[0] for word in unknown if word.startswith("--")]
            self.error(f"unrecognized arguments: {', '.join(names) or 'a word that belongs to no option'}")
        return options

    def error(self, message: str) -> Any:
        raise UserError(f"{message}; --help lists the options")


def _checked(kind: Callable[[str], Any], holds: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise argparse.ArgumentTypeError(f"takes {wanted}, not {plain(text, 60)!r}")
        return value

    return parse


_positive = _checked(int, lambda n: n >= 1, "a whole number, 1 or more")
_count_or_none = _checked(int, lambda n: n >= 0, "a whole number, 0 or more")
_seconds = _checked(float, lambda x: 0 < x < math.inf, "a number of seconds above 0")
_fraction = _checked(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")
_temperature = _checked(float, lambda x: 0 <= x < math.inf, "a number, 0 or more")
_port = _checked(int, lambda n: 0 <= n <= 65535, "a port, 0 to 65535; 0 takes a free one")
_processes = _checked(lambda text: 0 if text == "auto" else int(text), lambda n: 0 <= n <= 256, "a number or auto")


def _text(text: str) -> str:
    """What was typed, as UTF-8 also where the locale is not."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _path(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("takes a file name, not '': is a shell variable unset?")
    return text


def _url(text: str) -> str:
    try:
        parts = urlsplit(text)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        valid = False
    if not valid or re.search(r"\s", text):
        raise argparse.ArgumentTypeError(
            f"takes a URL like {DEFAULT_API_BASE}, not {plain(Redactor.url(re.sub('.*@', '***@', text)), 80)!r}"
        )
    return text.rstrip("/")


def _api_key(text: str) -> str:
    if not text.isascii() or not text.isprintable():
        raise argparse.ArgumentTypeError("takes printable ASCII characters only")
    return text.strip()


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(_text(text))
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f'takes a JSON object like {{"ignore_eos": true}} ({error})') from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError('takes a JSON object like {"ignore_eos": true}')
    return value


def _engine(text: str) -> str:
    if not all(isinstance(value, (int, float)) and value >= 0 for value in _json_object(text).values()):
        raise argparse.ArgumentTypeError('takes a JSON object of numbers like {"ttft_ms": 200}')
    return text


def _shard(text: str) -> tuple[int, int]:
    shard, shards = map(int, text.split("/"))
    return shard, shards


TOKEN_FIELDS = ("auto", "max_tokens", "max_completion_tokens")
TRANSPORTS = ("auto", "stopwatch", "sdk")


def columns_help() -> str:
    """What --help-columns prints."""
    width = max(map(len, CSV_COLUMNS))
    return "\n".join(
        (
            "Columns of --results-csv: one row per request, in order of completion; blank = not measured.\n",
            *(f"  {name:{width}}  {column.meaning}" for name, column in CSV_COLUMNS.items()),
            "\nExit codes:\n",
            "  0    done",
            "  1    nothing succeeded, more errors than --max-error-rate, or the run stopped itself",
            "  2    wrong usage; one line says what to do",
            "  130  interrupted; what had finished is reported",
        )
    )


EXAMPLES = """\
examples:
  %(prog)s --demo --stream
  %(prog)s --model MODEL --concurrency 256 --stream --results-csv results.csv
  %(prog)s --api-base https://api.openai.com/v1 --model gpt-4o-mini \\
      --requests-file prompts.jsonl --concurrency 32 --summary-jsonl runs.jsonl

Results go to stdout; progress, notes and errors to stderr."""


def build_parser() -> Parser:
    """Every option, in the order of the README's table."""
    parser = Parser(
        prog=Path(__file__).name,
        usage="%(prog)s --model MODEL [options]",
        description="Measure the latency and throughput of an OpenAI-compatible LLM server under load.",
        epilog=EXAMPLES,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=30),
        allow_abbrev=False,
    )
    add = parser.add_argument_group("Server").add_argument
    add("--api-base", type=_url, metavar="URL", help=f"base URL (default: $OPENAI_BASE_URL, else {DEFAULT_API_BASE})")
    add(
        "--api-key",
        type=_api_key,
        metavar="KEY",
        help="bearer token, never shown (default: $OPENAI_API_KEY, else vllm)",
    )
    add("--model", type=_text, help="model name; required unless --demo is given")
    add("--ca-file", type=_path, metavar="FILE", help="trust the certificate authority in this PEM file")
    add("--insecure", action="store_true", help="do not check the server's TLS certificate")
    add = parser.add_argument_group("Load").add_argument
    add("--concurrency", type=_positive, metavar="N", help="requests in flight (default: %(default)s)")
    add(
        "--total-requests",
        type=_positive,
        metavar="N",
        help="requests to make (default: 1024, or one per prompt given)",
    )
    add("--warmup", type=_count_or_none, metavar="N", help="unmeasured requests before (default: the concurrency)")
    add("--stream", action="store_true", help="stream the replies: adds TTFT, TPOT and gaps between chunks")
    add("--continuous-usage", action="store_true", help="with --stream: token counts in every chunk (vLLM, SGLang)")
    add("--temperature", type=_temperature, metavar="T", help="sampling temperature (default: %(default)s)")
    add(
        "--max-tokens-field",
        choices=TOKEN_FIELDS,
        help="name of the output limit (auto: whichever the warm-up accepts)",
    )
    add("--extra-body", type=_json_object, metavar="JSON", help="object merged into every request body")
    add = parser.add_argument_group("Prompts").add_argument
    add(
        "--prompt-tokens",
        type=_positive,
        metavar="N",
        help="about so long are generated prompts (default: %(default)s)",
    )
    add("--output-tokens", type=_positive, metavar="N", help="most tokens of a reply (default: 1024; with --demo 128)")
    add("--requests-file", type=_path, metavar="FILE", help="JSONL, per line: text, prompt or messages; max_tokens")
    add("--system-prompt", type=_text, metavar="TEXT", help="system message before every prompt")
    add("--seed", type=int, metavar="N", help="makes generated prompts repeatable (default: random, reported)")
    add = parser.add_argument_group("Output").add_argument
    add("--results-csv", type=_path, metavar="FILE", help="write one row per request; see --help-columns")
    add("--append", action="store_true", help="add to an existing --results-csv")
    add("--overwrite", action="store_true", help="replace an existing --results-csv, once the warm-up has succeeded")
    add("--summary-jsonl", type=_path, metavar="FILE", help="append the results of the run as one line of JSON")
    add("--no-progress", action="store_true", help="do not show the progress line")
    add = parser.add_argument_group("Client").add_argument
    add("--processes", type=_processes, metavar="N", help="client processes, or auto (default: %(default)s)")
    add("--transport", choices=TRANSPORTS, help="stopwatch: arrivals stamped by the kernel; sdk: openai's HTTP client")
    add = parser.add_argument_group("Limits").add_argument
    add("--timeout", type=_seconds, metavar="S", help="seconds for one whole request (default: %(default)s)")
    add("--connect-timeout", type=_seconds, metavar="S", help="seconds to connect (default: %(default)s)")
    add("--first-byte-timeout", type=_seconds, metavar="S", help="seconds until a reply begins (default: no limit)")
    add("--idle-timeout", type=_seconds, metavar="S", help="seconds between two reads of a reply (default: no limit)")
    add(
        "--max-error-rate", type=_fraction, metavar="F", help="exit 1 above this share of errors (default: %(default)s)"
    )
    add("--stop-after-errors", type=_positive, metavar="N", help="stop the run at this many errors")
    add = parser.add_argument_group("Demo").add_argument
    add("--demo", action="store_true", help="start a simulated server and measure it")
    add("--demo-engine", type=_engine, metavar="JSON", help='its speed, e.g. {"ttft_ms": 200, "gap_ms": 10}')
    add = parser.add_argument
    add("--help-columns", action="version", version=columns_help(), help="explain CSV columns and exit codes, and exit")
    add("--debug", action="store_true", help="show the traceback of an internal error")
    add("--version", action="version", version=f"%(prog)s {__version__}")
    add("--demo-server", type=_port, help=argparse.SUPPRESS)
    add("--demo-leash", action="store_true", help=argparse.SUPPRESS)
    add("--shard", type=_shard, help=argparse.SUPPRESS)
    parser.set_defaults(**DEFAULTS)
    return parser


def build_config(options: argparse.Namespace, prompts: int) -> Config:
    """Options and what follows from them. `prompts`: of the corpus, 0 without one."""
    given = vars(options)
    total = options.total_requests or prompts or 1024
    concurrency = options.concurrency
    derived: dict[str, Any] = {
        "total_requests": total,
        "output_tokens": options.output_tokens or (DEMO_OUTPUT_TOKENS if options.demo else 1024),
        "warmup": concurrency if options.warmup is None else options.warmup,
        "seed": secrets.randbelow(1 << 32) if options.seed is None else options.seed,
        "processes": min(concurrency, options.processes or enough_processes(concurrency, options.stream)),
    }
    names = [item.name for item in dataclasses.fields(Config)]
    values: dict[str, Any] = {**{name: given.get(name) for name in names}, **derived}
    return Config(**values)


def enough_processes(concurrency: int, streamed: bool) -> int:
    """What --processes auto means: enough for the load, never more than the cores."""
    each = STREAMS_PER_PROCESS if streamed else WHOLE_PER_PROCESS
    return max(1, min(os.cpu_count() or 1, math.ceil(concurrency / each)))


def resolve_server(options: argparse.Namespace, environ: Mapping[str, str]) -> None:
    """Fill in base URL and key from the environment. Raises UserError for unusable values there."""
    try:
        options.api_base = options.api_base or _url(environ.get("OPENAI_BASE_URL") or DEFAULT_API_BASE)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"$OPENAI_BASE_URL {error}") from None
    try:
        if options.api_key is None:
            options.api_key = _api_key(environ.get("OPENAI_API_KEY") or DEFAULT_API_KEY)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"$OPENAI_API_KEY {error}") from None


def require_model(options: argparse.Namespace) -> None:
    if options.model:
        return
    base = Redactor.url(options.api_base)
    redactor = Redactor.of(options, os.environ)
    try:
        listed = fetch_json(f"{options.api_base}/models", options.api_key)
        names = ", ".join(str(model["id"]) for model in listed["data"][:20])
    except Exception as error:  # whatever a server may answer there, the user's way out is the same
        reason = redactor.text(plain(_reason(error), 100))
        raise UserError(f"--model is missing, and {base} does not tell its models ({reason})") from None
    raise UserError(f"--model is missing; {base} serves: {redactor.text(plain(names))}")


def keep_files_apart(options: argparse.Namespace) -> None:
    """Raises UserError when one file is named twice: the corpus would be overwritten, or results mixed."""
    named: dict[str, str] = {}
    for option in ("--requests-file", "--results-csv", "--summary-jsonl"):
        path = getattr(options, option[2:].replace("-", "_"))
        other = named.setdefault(os.path.realpath(path), option) if path else option
        if other != option and os.path.realpath(path) != os.devnull:
            raise UserError(f"{option} and {other} name the same file: {path}")


def need_descriptors(concurrency: int) -> None:
    """Raise the soft limit on open files as far as needed. Raises UserError with the cure when that is too low."""
    try:
        resource = importlib.import_module("resource")
    except ImportError:  # Windows
        return
    needed = concurrency + SPARE_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft in (resource.RLIM_INFINITY, -1) or soft >= needed:
        return
    if hard not in (resource.RLIM_INFINITY, -1) and hard < needed:
        most = hard - SPARE_DESCRIPTORS
        raise UserError(
            f"--concurrency {concurrency} needs {needed} open files, {hard} are allowed:"
            f" `ulimit -Hn {needed}` as root, or --concurrency {max(1, most)}"
        )
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def notes_before(config: Config, prompts: int) -> Iterator[str]:
    """What a user should know before the figures come."""
    if prompts and config.total_requests > prompts:
        yield (
            f"{config.total_requests} requests cycle through {prompts} prompts: repeated prompts"
            " are answered from the server's prefix cache and measure that"
        )
    proxy = proxy_for(config.api_base)
    if proxy:
        yield f"via proxy {Redactor.url(proxy)}"
    if config.insecure:
        yield "--insecure: the server's certificate is not checked"
    if config.transport == "auto" and not proxy and StopwatchWire.missing():
        yield f"no kernel clock without {StopwatchWire.missing()}; measuring with the SDK's own transport"


def versions() -> dict[str, str]:
    """What a result depends on, as far as it is installed and imported."""
    found = {"python": sys.version.split()[0], "online_bench": __version__}
    for name in ("openai", "httptools", "uvloop", "aiohttp"):
        with contextlib.suppress(Exception):
            found[name] = importlib.import_module("importlib.metadata").version(name)
    return found


def masked_argv(argv: Sequence[str], hidden: Sequence[str]) -> list[str]:
    return Redactor(hidden).argv(argv)


class Session:
    """One benchmark: outputs opened first, load in the middle, report last."""

    def __init__(self, config: Config, workload: Workload, argv: Sequence[str]) -> None:
        """Raises UserError when an output cannot be opened."""
        self.config = config
        self._workload = workload
        self._argv = argv
        self._tally = Tally()
        self._csv: Optional[CsvSink] = None
        self._jsonl: Optional[SummarySink] = None
        self._live: Optional[asyncio.Future[None]] = None
        self._line: Optional[LiveLine] = None
        self._origin_ns = 0
        self._started = time.strftime("%Y%m%d-%H%M%S")
        if config.results_csv:
            self._csv = CsvSink(config.results_csv, config.append, config.overwrite)
        try:
            if config.summary_jsonl:
                self._jsonl = SummarySink(config.summary_jsonl)
        except UserError:
            self.close()
            raise

    def close(self) -> None:
        if self._csv:
            self._csv.discard_if_empty()
        if self._jsonl:
            self._jsonl.close()

    def _begin(self, origin_ns: int) -> None:
        self._origin_ns = origin_ns
        if self._csv:
            self._csv.begin()
        if not self.config.no_progress:
            self._line = LiveLine(self._tally, self.config.total_requests, time.perf_counter)
            self._live = asyncio.ensure_future(self._line.keep())

    async def load(self) -> tuple[Sequence[Health], Stop]:
        stop = Stop()
        on_signals(stop)
        breaker = Breaker(self._tally, stop, self.config.stop_after_errors)  # last: it judges by the tally
        sinks: list[Sink] = [self._tally, *([self._csv] if self._csv else []), breaker]
        station = Station(self.config, self._workload, sinks, stop, self._begin)
        try:
            if self.config.processes > 1:
                return await measure_sharded(station), stop
            health = await measure(station)
            return [health] if health else [], stop
        finally:
            if self._live:
                self._live.cancel()
            if self._line:
                self._line.finish()

    def finish(self, health: Sequence[Health], stop: Stop, demo: Optional[DemoProcess]) -> int:
        """Report; the exit code."""
        summary = self._tally.summary()
        if not summary.ok + summary.errors:
            _say("Interrupted before the first measured request had ended: nothing to report.")
            return 130
        details = detail_lines(summary, self.config, health)
        if demo:
            details.insert(0, self._truth(summary, demo))
        details += [f"WARNING: {line}" for line in self._lost_lines(stop)]
        report(summary_block(summary, self.config.concurrency))
        report("\n" + "\n".join(details) + "\n")
        report(config_block(self.config))
        self._write_summary(summary, health, stop)
        if stop.interrupted:
            return 130
        error_rate = summary.errors / (summary.ok + summary.errors)
        failed = summary.ok == 0 or bool(stop.reason) or error_rate > self.config.max_error_rate
        return 1 if failed else 0

    def _truth(self, summary: Summary, demo: DemoProcess) -> str:
        try:
            return truth_line(summary, demo.truth(self._origin_ns))
        except Exception as error:  # it is dead or drowned: the report stands without it
            return f"WARNING: the demo server does not tell the truth: {plain(_reason(error))}"

    def _lost_lines(self, stop: Stop) -> Iterator[str]:
        done = self._tally.ok + self._tally.errors
        if stop.interrupted or stop.reason:
            why = stop.reason or "interrupted"
            yield f"{why}: {done} of {self.config.total_requests} requests were made"
        if self._csv and self._csv.lost:
            yield f"{self._csv.lost} rows could not be written to {self.config.results_csv}: {self._csv.reason}"
        if self._csv and self._csv.gone():
            yield f"{self.config.results_csv} has been removed or replaced: its {self._csv.rows} rows are lost"

    def _write_summary(self, summary: Summary, health: Sequence[Health], stop: Stop) -> None:
        if not self._jsonl:
            return
        run = {
            "date": self._started,
            "endpoint_type": "openai-chat",
            "backend": "openai-chat",
            "label": None,
            "tag": None,
            "tokenizer_id": None,
            "dataset_name": "custom" if self.config.requests_file else "random",
            "request_rate": "inf",
            "burstiness": 1.0,
            "interrupted": stop.interrupted,
            "stop_reason": stop.reason or None,
            "versions": versions(),
            "argv": masked_argv(self._argv, hidden_words(self.config, os.environ)),
        }
        try:
            self._jsonl.write(summary_json(summary, self.config, health, run))
        except OSError as error:
            _say(f"WARNING: the summary could not be written to {self.config.summary_jsonl}: {_reason(error)}")


def benchmark(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Check everything, then load, then report. Raises UserError and RunError."""
    if options.append and options.overwrite:
        raise UserError("--append and --overwrite exclude each other")
    if options.demo_engine and not options.demo:
        raise UserError("--demo-engine needs --demo")
    resolve_server(options, os.environ)
    if options.demo:
        options.model = options.model or DEMO_MODEL
    require_model(options)
    if options.ca_file or options.insecure:
        tls_context(Origin.of("https://localhost", options.ca_file, options.insecure))
    keep_files_apart(options)
    corpus = load_requests(options.requests_file, options.system_prompt)
    config = build_config(options, len(corpus))
    # The simulated server inherits the limit and has every connection.
    need_descriptors(config.concurrency if config.demo else -(-config.concurrency // config.processes))
    session = Session(config, workload_of(config, corpus), argv)
    demo = None
    try:
        if config.demo:
            demo = DemoProcess(options.demo_engine)
            session.config = config = dataclasses.replace(config, api_base=demo.api_base)
        for line in notes_before(config, len(corpus)):
            note(line)
        with signals_as_before():
            health, stop = run_loop(session.load())
            spare_one_signal(stop)
            return session.finish(health, stop, demo)
    finally:
        session.close()
        if demo:
            demo.stop()


def fill_standard_places() -> None:
    """Where standard streams were closed, so that no file or socket takes a place that others write to."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def run(argv: Sequence[str]) -> int:
    """Raises UserError and RunError."""
    fill_standard_places()
    options = build_parser().parse_args(argv)
    if options.shard:
        run_loop(shard_main(*options.shard))
        return 0
    if options.demo_server is not None:
        return serve_demo(Engine.of(options.demo_engine or "{}"), options.demo_server, options.demo_leash)
    return benchmark(options, argv)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; the exit code."""
    words = sys.argv[1:] if argv is None else argv
    try:
        return run(words)
    except UserError as error:
        _say(f"{Path(__file__).name}: error: {plain(str(error), 500)}")
        return 2
    except RunError as error:
        _say(f"{Path(__file__).name}: {plain(str(error), 500)}")
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # a defect of ours; what has been measured is on the disk
        if "--debug" in words:
            _say(traceback.format_exc(), end="")
        way = "" if "--debug" in words else " (--debug shows where)"
        _say(f"{Path(__file__).name}: internal error: {type(error).__name__}: {plain(str(error), 300)}{way}")
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
