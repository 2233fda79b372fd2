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

Needs Python 3.9+ and `pip install openai`; httptools and uvloop, where installed, lower its
CPU cost.  It keeps N chat completions in flight through AsyncOpenAI, stamps every
arrival (on Linux with the kernel's own clock), and reports latency and throughput.

    python online_bench_openai_async.py --demo
    python online_bench_openai_async.py --api-base http://127.0.0.1:8000/v1 --model MODEL
    python online_bench_openai_async.py --model MODEL --requests-file corpus.jsonl --stream \\
        --results-csv results.csv --summary-jsonl summary.jsonl

stdout carries the results; progress, notes and warnings go to stderr.

Sections of this file; each uses only sections above it:

     1. Constants
     2. Types
     3. Schedule
     4. Workload
     5. Replies
     6. Metrics
     7. Text
     8. Sinks
     9. Stopwatch
    10. Sender
    11. Server's own figures
    12. Runner
    13. Shards
    14. Sweep
    15. Command line

--help-columns explains the columns of --results-csv and the exit codes.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import bisect
import contextlib
import contextvars
import csv
import dataclasses
import difflib
import errno
import gc
import heapq
import importlib
import importlib.util
import io
import ipaddress
import itertools
import json
import math
import operator
import os
import queue
import random
import re
import secrets
import select
import selectors
import shutil
import signal
import socket
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import zlib
from array import array
from collections import Counter, deque
from collections.abc import Awaitable, Coroutine, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, NamedTuple, Optional, Protocol, Union
from urllib.parse import parse_qsl, unquote, urlsplit, urlunsplit

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# === 1. Constants ===

__version__ = "0.2.0"
THIS_FILE = os.path.abspath(__file__)

DEFAULT_API_BASE = "http://127.0.0.1:8000/v1"
DEFAULT_API_KEY = "vllm"
PLAIN_KEYS = ("vllm", "EMPTY", "")  # placeholders that hide nothing
LEAST_SECRET_CHARS = 4  # nobody is kept out by less, and words would be blanked

# Defaults of the options; one that is not here is off, absent, or worked out from others.
DEFAULTS: Mapping[str, Any] = {
    "concurrency": 128, "prompt_tokens": 1024, "temperature": 0.0, "max_tokens_field": "auto", "extra_body": {},
    "endpoint_type": "chat", "history": "server", "processes": 1, "transport": "auto", "timeout": 600.0,
    "connect_timeout": 30.0, "max_error_rate": 0.5, "request_rate": math.inf, "burstiness": 1.0, "speed": 1.0,
    "metrics_interval": 1.0, "repeat": 1, "cooldown": 0.0,
}  # fmt: skip

WARMUP_OUTPUT_TOKENS = 8
WARMUP_PROMPT_TOKENS = 64  # of a corpus run, whose own prompts must stay unseen
LEAST_WARMUP = 3  # two lengths that calibrate prompts, and one as it will be measured
LENGTHS_TURN = 4  # of so many warm-up prompts two are there to calibrate
LEAST_TOKENS_PER_WORD = 0.5  # a slope below it is no count of words
REQUESTS_PER_SLOT = 8  # of each level of a sweep,
LEAST_PER_LEVEL = 64  # but so many at least
DEMO_OUTPUT_TOKENS = 128  # a demo that ends within seconds
DRAIN_GRACE_S = 5.0
PREPARED_AHEAD = 128  # requests that wait for their due times with their bytes ready
WARMUP_WITHOUT_CAP = 16  # requests, where a schedule has no --concurrency
START_LEAD_S = 0.1  # from the order to start to the first due time, so that all processes stand ready
TIMER_ERROR_S = 0.0016  # an event loop's timers are up to 1.5 ms early or late
NAP_S = 0.0001  # between two such turns that had nothing to do,
IDLE_TURN_NS = 50_000  # as they took no longer than this
HELD_BACK_MS = 1.0  # a permit that came so much later than the due time has held the request back
READY_POLL_S = 0.5
REFUSALS = ("http_400", "http_401", "http_403", "http_422")  # of a server that is ready
IDENTICAL_FAILURES_TO_STOP = 100
TELLING_ERROR_SHARE = 0.01  # from here on errors are the first thing that a report says

METRICS_BYTES = 8 << 20  # of a metrics page: beyond it is none
METRICS_TIMEOUT_S = 3.0
METRICS_SETTLE_S = 1.0  # for the server's counters to catch up with what it has answered
METRICS_RETRY_S = 0.1
METRICS_PATIENCE_S = 10.0  # for the process that reads them

PROGRESS_TTY_S = 0.5
PROGRESS_PIPE_S = 10.0
LAG_SAMPLE_S = 0.05
GC_THRESHOLDS = (5_000, 100, 1000)  # short young passes, no full one

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)
SHOWN_PERCENTILES = PERCENTILES[:-1]
# The least n at which the second-largest value is above the percentile with 99 % confidence.
LEAST_SAMPLES: Mapping[float, int] = {90.0: 64, 95.0: 130, 99.0: 662, 99.9: 6_636}
INTERVALS_SHOWN = (50.0, 95.0, 99.0)
INTERVAL_TAIL = 0.025  # outside a confidence interval, on either side
EXACT_SAMPLES = 2_000_000  # values of one metric kept as they are; those beyond are counted in buckets
BUCKET_BITS = 14  # of a float's 32 that tell no buckets apart: 9 of its fraction do
BUCKET_ERROR = 0.001  # how far a bucket's value may be from those in it, as a share of them: 2**-10
REPORT_COLUMNS = 100
ERROR_GROUPS_SHOWN = 5
ERROR_TEXT_CHARS = 300

READ_BUFFER_BYTES = 256 * 1024
LABEL_CHARS = 80
MAX_REPLY_BYTES = 256 * 1024 * 1024
ERROR_BODY_BYTES = 64 * 1024
HELD_READS = 32  # reads of one stream kept before HTTP is parsed
LARGE_READ_BYTES = 16 * 1024  # parsed at once: bounds memory
UNREAD_PIECES = 512  # pieces of a body kept before its events are read
LAZY_STREAMS = 48  # from here on streams are read in ticks
LAZY_TICK_S = 0.002
LEAST_TICK_S = 0.0005
BEAT_S = 0.002  # how often the event loop shows that it is in time
LATE_READ_NS = 4_000_000  # without such a sign for longer: what is read now may have queued up
LATE_LOOP_S = 0.02  # a timer this late says that the event loop was held up
END_GRACE_S = 0.5  # for the last chunk of a reply that has said everything
TICKS_PER_GAP = 5  # the tick stays this far below the gap between tokens
RATE_WINDOW_S = 0.1
SPARE_DESCRIPTORS = 64
CONNECTS_AT_ONCE = 64  # below the listening queue of the usual servers
NEXT_ADDRESS_S = 0.25  # until the next address of a name is tried as well (RFC 8305, Connection Attempt Delay)
STALE_S = 1.0  # a kept connection that is reset later than this after the sending had not been closed before it
AUTO_TOKENS_PER_S = 100  # of each stream, where --processes auto reckons
AUTO_CORE_SHARE = 0.5  # of a core that a process is to need at most
READS_PER_REQUEST = 60  # what sending a request through the SDK costs, in reads of a chunk (benchmarks/client_cost.py)

CLIENT_BUSY_SHARE = 0.90  # of one core, waiting for the core included
CLIENT_DELAY_SHARE = 0.05  # of a request's service time
CLIENT_DELAY_FLOOR_MS = 0.5
TELLING_RUN_S = 0.25  # a shorter run tells nothing of its client's CPU
WAITING_SHARE = 0.03  # of the time, runnable but without a core
LAG_FLOOR_MS = 2.0  # of the event loop, where it holds the clock
LAG_SHARE = 0.02  # of the median latency, or of the mean TTFT
LATE_SHARE = 0.1  # of the first tokens or the gaps, left out
HELD_UP_SHARE = 0.01  # of the time, where the event loop holds the clock
LONG_PAUSE_MS = 250.0
MERGED_LIMIT = 0.05
LITTLE_TOLERANCE = 0.02
CORPUS_TOLERANCE = 0.005
TRACE_BLOCK_TOKENS = 512  # that one hash of a Mooncake trace stands for
MOST_TOKENS = 1 << 40  # a count beyond it is no count
ERROR_LEVELS = 8  # how deep an error message may hide in an error body
PROMPT_LENGTH_TOLERANCE = 0.02  # or one word
HIT_TOLERANCE = 2.0  # percentage points of prefix cache hits above what the corpus shares
SERVER_QUEUE_SHARE = 0.05  # of the server's own latency, or of its requests
KV_CACHE_FULL = 0.99
SEARCH_PRECISION = 0.04  # of the level that holds: how near the one that fails must be
BOUND_REPEATS = 2.0  # times as many requests where this client was the limit
SEARCH_REPEATS = 2  # of a level whose verdict chance could turn, with more requests each time,
SEARCH_MOST = 16  # times the usual number of requests: what is not sure by then stays unresolved
DRIFT = 0.10  # of a mean, from the first to the last third of the steady window
NORMAL_95 = 1.96  # standard errors to either side of a mean
DRIFT_ERRORS = 3.0  # in standard errors: what is less may be chance
KNEE_GROWTH = 0.05  # of throughput, per doubling of the load

# === 2. Types ===


class SessionTurn(NamedTuple):
    """What the user says in one turn of a session; the answer is the corpus's own, where it has one."""

    content: Any
    output_tokens: Optional[int] = None
    delay_ms: float = 0.0  # think time before it, from the end of the turn before
    answer: Optional[str] = None


@dataclass(frozen=True)
class Request:
    """What is asked: fields of the body, the prompt among them, and the output limit (None: the run's own)."""

    fields: Mapping[str, Any]
    output_tokens: Optional[int] = None
    input_tokens: Optional[int] = None  # of the prompt, as the corpus itself counted them
    prefix_tokens: Optional[int] = None  # of them shared with other prompts
    timestamp: Optional[float] = None  # when a trace has it sent, in the trace's own unit
    hash_ids: Optional[Sequence[Any]] = None  # of a trace's line without a text: what its blocks are known by
    whole: bool = False  # the fields are the body: only a missing model and what streams are added
    label: Optional[str] = None
    unknown: Sequence[str] = ()  # keys of its corpus line that are not sent
    turns: Sequence[SessionTurn] = ()  # of a session, the first one included
    session: Optional[int] = None
    turn: Optional[int] = None  # from 1

    @property
    def messages(self) -> Sequence[Mapping[str, Any]]:
        """Of a chat."""
        return self.fields["messages"]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Job:
    """One request to make: its number, and when it is due (None: as soon as a permit is free)."""

    index: int
    due_s: Optional[float] = None


class Failure(NamedTuple):
    """Why there is no answer: `status` as in the CSV, a short class, and one line for a person."""

    status: str
    kind: str
    message: str


@dataclass
class Reply:
    """One call as it went: filled in while it is under way, complete when `Transport.exchange` returns it.

    Stamps are ns of the perf_counter clock, each written once, where it is taken; None: it did not happen.
    Token counts are the server's usage; of a stream without usage, `completion_tokens` is its content chunks.
    """

    free_ns: Optional[int] = None  # its permit became free: the reply before it had arrived
    ready_ns: Optional[int] = None  # its first byte was about to be written, on an open connection
    connect_ns: Optional[int] = None  # how long opening a connection for it took; a duration
    sent_ns: Optional[int] = None  # its last byte was handed to the socket
    first_ns: Optional[int] = None  # first token
    visible_ns: Optional[int] = None  # first token that is not reasoning
    last_ns: Optional[int] = None  # last token
    end_ns: Optional[int] = None  # last byte
    http_status: Optional[int] = None
    new_connection: Optional[bool] = None
    reconnects: int = 0  # sent again, because the server had closed the kept connection
    reads: int = 0
    kernel_reads: int = 0  # reads with the kernel's stamp
    content_reads: int = 0
    merged_reads: int = 0  # content reads of more than one chunk
    with_first: int = 0  # later chunks that came in one read with the first token
    late_gaps: int = 0  # gaps left out: their chunks queued up while this client was held up
    syn_resent: int = 0  # how often its connection's first packet had to be repeated
    chunks: Optional[int] = None
    gaps_ms: Sequence[float] = ()
    finish_reason: Optional[str] = None
    prompt_tokens: Optional[int] = None
    completion_tokens: Optional[int] = None
    cached_tokens: Optional[int] = None
    reasoning_tokens: Optional[int] = None
    has_usage: bool = False
    failure: Optional[Failure] = None
    label: Optional[str] = None  # of the corpus line that asked
    server: Optional[str] = None  # which one was asked, where there are several
    session: Optional[int] = None
    turn: Optional[int] = None  # of its session, from 1
    later_turns: int = 0
    text: Optional[str] = None  # the answer's content, where the next turn is to hold it


@dataclass(frozen=True)
class Record:
    """A request that has ended: its job, its reply, and the run's start (ns of perf_counter). Durations follow."""

    job: Job
    reply: Reply
    origin_ns: int

    def _at_s(self, stamp_ns: Optional[int]) -> Optional[float]:
        """A stamp in seconds from the start of the run."""
        return None if stamp_ns is None else (stamp_ns - self.origin_ns) / 1e9

    @property
    def ok(self) -> bool:
        return self.reply.failure is None

    @property
    def aborted(self) -> bool:
        """Cut off by the run's own stop: neither completed nor failed."""
        return self.error_kind == "aborted"

    @property
    def status(self) -> str:
        return self.reply.failure.status if self.reply.failure else "success"

    @property
    def error_kind(self) -> str:
        return self.reply.failure.kind if self.reply.failure else ""

    @property
    def error(self) -> str:
        return self.reply.failure.message if self.reply.failure else ""

    @property
    def done_ns(self) -> Optional[int]:
        """Completion: the last token of a stream, the last byte of anything else."""
        return self.reply.end_ns if self.reply.last_ns is None else self.reply.last_ns

    @property
    def sent_s(self) -> Optional[float]:
        return self._at_s(self.reply.sent_ns)

    @property
    def done_s(self) -> Optional[float]:
        return self._at_s(self.done_ns)

    @property
    def ended_s(self) -> Optional[float]:
        return self._at_s(self.reply.end_ns)

    @property
    def busy_ms(self) -> Optional[float]:
        """How long it was in flight, whatever its fate."""
        return _span_ms(self.reply.sent_ns, self.reply.end_ns)

    @property
    def latency_ms(self) -> Optional[float]:
        return _span_ms(self.reply.sent_ns, self.done_ns) if self.ok else None

    @property
    def ttft_ms(self) -> Optional[float]:
        return _span_ms(self.reply.sent_ns, self.reply.first_ns) if self.ok else None

    @property
    def visible_ms(self) -> Optional[float]:
        return _span_ms(self.reply.sent_ns, self.reply.visible_ns) if self.ok else None

    @property
    def tpot_ms(self) -> Optional[float]:
        """None, too, where all tokens came at once: nothing was seen of the time between them."""
        tokens = self.reply.completion_tokens or 0
        span = _span_ms(self.reply.first_ns, self.reply.last_ns) if self.ok and tokens > 1 else None
        return span / (tokens - 1) if span else None

    @property
    def tail_ms(self) -> Optional[float]:
        """From the last token of a stream to the end of the reply; the request keeps its permit as long."""
        return _span_ms(self.reply.last_ns, self.reply.end_ns) if self.ok else None

    @property
    def connect_ms(self) -> Optional[float]:
        return _span_ms(0, self.reply.connect_ns)

    @property
    def response_ms(self) -> Optional[float]:
        done_s, due_s = self.done_s, self.job.due_s
        return None if not self.ok or done_s is None or due_s is None else (done_s - due_s) * 1e3

    @property
    def late_ms(self) -> Optional[float]:
        """From the due time to the sending: connecting, and waiting for a permit where there is a cap, included."""
        sent_s, due_s = self.sent_s, self.job.due_s
        return None if sent_s is None or due_s is None else (sent_s - due_s) * 1e3

    @property
    def held_back_ms(self) -> float:
        """From the due time to a free permit; 0 without a schedule or a cap."""
        free_s, due_s = self._at_s(self.reply.free_ns), self.job.due_s
        return 0.0 if free_s is None or due_s is None else max(0.0, free_s - due_s) * 1e3

    @property
    def start_ns(self) -> Optional[int]:
        """From when on it could have been sent: its permit was free and, with a schedule, it was due."""
        free_ns, due_s = self.reply.free_ns, self.job.due_s
        return free_ns if free_ns is None or due_s is None else max(free_ns, self.origin_ns + int(due_s * 1e9))

    @property
    def queue_ms(self) -> Optional[float]:
        """What this client itself added before it could write, connecting excluded; in no latency."""
        span = _span_ms(self.start_ns, self.reply.ready_ns)
        return None if span is None else max(0.0, span - (self.reply.connect_ns or 0) / 1e6)

    @property
    def e2e_ms(self) -> Optional[float]:
        """What whoever asks this client has to wait: from the permit, or the due time if that is later."""
        return _span_ms(self.start_ns, self.done_ns) if self.ok else None

    @property
    def total_tokens(self) -> Optional[int]:
        if self.reply.prompt_tokens is None and self.reply.completion_tokens is None:
            return None
        return (self.reply.prompt_tokens or 0) + (self.reply.completion_tokens or 0)

    @property
    def tokens_per_s(self) -> Optional[float]:
        """What one user sees: tokens over the whole reply."""
        latency_ms, tokens = self.latency_ms, self.reply.completion_tokens
        return tokens / latency_ms * 1e3 if latency_ms and tokens is not None else None


def _span_ms(start_ns: Optional[int], end_ns: Optional[int]) -> Optional[float]:
    return None if start_ns is None or end_ns is None else (end_ns - start_ns) / 1e6


@dataclass(frozen=True)
class Distribution:
    """A sample described: absent figures of an empty one are None, never 0."""

    n: int
    mean: Optional[float] = None
    std: Optional[float] = None
    max: Optional[float] = None
    percentiles: Mapping[float, float] = field(default_factory=dict)
    # Of each percentile, where it lies with 95 % confidence; an infinite end: too few values to say.
    intervals: Mapping[float, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Health:
    """How this client fared in the timed part, one entry per process."""

    wall_s: float
    cpu_s: float
    waiting_s: float  # runnable, but without a core (Linux)
    lag_p99_ms: float
    lag_max_ms: float
    held_up_s: float  # sum of the event loop's longer pauses
    gc_pause_ms: float
    peak_in_flight: int
    in_flight_s: float  # requests sent and unanswered, summed up over the time, from the counter
    unread_s: float  # of it between a reply's arrival and its end here
    flight_window_s: float  # from the first send to the last answer
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
class Steady:
    """The steady window, from the end of the first wave to the last send; in seconds from the start.

    Distributions are of the requests sent in it, rates of the successes that ended in it.
    """

    start_s: float
    end_s: float
    sent: int
    ok: int
    prompt_tokens: int
    completion_tokens: int
    distributions: Mapping[str, Distribution]
    opening: Mapping[str, Distribution]  # of the requests sent before it
    drifts: Mapping[str, float]  # by how much a mean changed from its first to its last third, where that is no chance

    @property
    def rates(self) -> tuple[float, float, float]:
        """Requests, generated tokens, and all tokens per second."""
        amounts = (self.ok, self.completion_tokens, self.prompt_tokens + self.completion_tokens)
        requests, generated, total = (_rate(amount, self.end_s - self.start_s) for amount in amounts)
        return requests, generated, total


@dataclass(frozen=True)
class GroupSummary:
    ok: int
    errors: int
    first_error: str
    cached_share: Optional[float]  # of the prompt tokens; None: no reply tells
    distributions: Mapping[str, Distribution]


@dataclass(frozen=True)
class Summary:
    """Everything a report says, as values."""

    ok: int
    errors: int
    aborted: int
    elapsed_s: float
    prompt_tokens: int
    completion_tokens: int
    without_usage: int
    chunk_counted: int
    distributions: Mapping[str, Distribution]
    error_groups: Sequence[ErrorGroup]
    groups: Mapping[str, Mapping[str, GroupSummary]]  # grouping -> group
    finish_reasons: Mapping[str, int]
    cached_tokens: int
    reads: int
    kernel_reads: int
    content_reads: int
    merged_reads: int
    first_merged: int  # successes whose first token came in one read with later chunks
    with_first: int  # those chunks
    late_read: int  # requests of which chunks queued up while this client was held up
    late_first: int  # of them, those of which even the first token's arrival is not known
    late_gaps: int
    syn_resent: int  # repeated first packets of connections
    one_piece: int  # successes of several tokens that all came at once
    streams: int  # successes that were streamed
    corpus_tokens: int  # prompt tokens by the corpus's own count, and by the server's, of the same requests
    corpus_counted: int
    prefix_tokens: int  # of corpus_tokens shared with other prompts of the corpus
    cache_told: int  # successes whose usage says how many tokens were cached
    gap_ends: int  # what the gaps lie between: content chunks, or tokens where every chunk tells its count
    chunked_tokens: int
    new_connections: int
    reconnects: int
    busy_s: float  # sum of all requests' time from sending to their end
    sessions: int  # that were begun
    unsent_turns: int  # of them
    held_back: int  # requests that were due before a permit was free
    due_rate: Optional[float]  # requests a second, between the first and the last due time, and as they were sent
    issued_rate: Optional[float]
    first_error_s: Optional[float]  # when the first failure had ended, from the start
    good: Mapping[str, int]  # successes within each limit of --goodput, and "all": within all of them
    steady: Optional[Steady]  # None: too few requests were sent after the first wave
    server: Mapping[str, Any] = field(default_factory=dict)  # `server_*` and `gpu_*`, as the JSON has them

    @property
    def error_share(self) -> float:
        return self.errors / ((self.ok + self.errors) or 1)

    @property
    def requests_per_s(self) -> float:
        return _rate(self.ok, self.elapsed_s)

    @property
    def generated_per_s(self) -> float:
        return _rate(self.completion_tokens, self.elapsed_s)

    @property
    def total_per_s(self) -> float:
        return _rate(self.prompt_tokens + self.completion_tokens, self.elapsed_s)


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0


@dataclass(frozen=True)
class Config:
    """Every option in force; field names are option names."""

    api_base: str
    servers: Sequence[str]  # all base URLs, asked in turn
    api_key: str
    headers: Mapping[str, str]
    model: str
    endpoint_type: str
    concurrency: Optional[int]  # None: a schedule without a cap
    request_rate: float
    burstiness: float
    ramp_up: Optional[float]
    timestamp_unit: Optional[str]  # None: the corpus is no trace, or its times are left aside
    speed: float
    total_requests: Optional[int]  # None: as many as --duration has time for
    duration: Optional[float]
    grace: Optional[float]
    prompt_tokens: int
    output_tokens: int
    requests_file: Optional[str]
    corpus: Mapping[str, Any]  # what its lines ask for: `Corpus.asked`
    history: str
    system_prompt: Optional[str]
    prompt_calibration: Optional[Sequence[float]]  # the fields of Calibration: given, or found by the warm-up
    results_csv: Optional[str]
    append: bool
    overwrite: bool
    summary_jsonl: Optional[str]
    summary_json: Optional[str]
    save_detailed: bool
    report: Optional[str]
    metadata: Optional[Mapping[str, str]]
    warmup: int
    temperature: float
    max_tokens_field: str
    extra_body: Mapping[str, Any]
    stream: bool
    continuous_usage: bool
    processes: int
    transport: str
    server_metrics: Optional[Sequence[str]]  # URLs, or off; None: of a loopback server
    metrics_interval: float
    gpu_metrics: Optional[str]
    ca_file: Optional[str]
    insecure: bool
    seed: int
    timeout: float
    connect_timeout: float
    first_byte_timeout: Optional[float]
    idle_timeout: Optional[float]
    wait_ready: Optional[float]
    max_error_rate: float
    stop_after_errors: Optional[int]
    no_progress: bool
    verbose: bool
    demo: bool
    requests_per_slot: Optional[int]
    repeat: int
    cooldown: float
    find_max: Optional[Sequence[float]]
    slo: Sequence[str]
    asserts: Sequence[str]
    goodput: Mapping[str, float]  # key of a metric -> limit in ms
    gpus: Optional[int]
    gpu_hour: Optional[float]


# Makes one call when its turn comes and says how it went; never raises for what a server does.
Send = Callable[[Request, "Turn"], Awaitable[Reply]]


class Sink(Protocol):
    """Takes each record once, in order of completion; called on the event loop, so it must not block."""

    def add(self, record: Record) -> None: ...


Workload = Callable[[int], Request]  # job number -> what to ask; pure, cheap, called off the measured path


class UserError(Exception):
    """Something the user can mend: one line, exit code 2."""


class RunError(Exception):
    """The run cannot go on: one line, exit code 1."""


# === 3. Schedule (when) (pure) ===


class Sessions:
    """Requests that follow from replies: which, when, and with what history.

    Jobs are numbered through: the turns of a session follow each other, and a corpus that is cycled begins anew.
    """

    def __init__(self, lines: Sequence[Request], starts: Sequence[int], history: str) -> None:
        """`starts`: how many turns stand before each line, and in all of them; `history`: of whose answers."""
        self._lines = lines
        self._starts = starts
        self._history = history
        self._open: dict[int, tuple[Request, list[Mapping[str, Any]]]] = {}  # its line, and all that was said

    def first(self, number: int) -> int:
        """The job that begins a session."""
        rounds, line = divmod(number, len(self._lines))
        return rounds * self._starts[-1] + self._starts[line]

    def place(self, index: int) -> tuple[int, int]:
        """(session, turn from 0) of a job."""
        rounds, at = divmod(index, self._starts[-1])
        line = bisect.bisect_right(self._starts, at) - 1
        return rounds * len(self._lines) + line, at - self._starts[line]

    def goes_on(self, index: int) -> bool:
        return self.place(index + 1)[1] > 0

    def request(self, index: int) -> Request:
        """The line's own; of a session with all that was said before."""
        number, turn = self.place(index)
        if not turn:
            line = self._lines[number % len(self._lines)]
            if not line.turns:
                return line
            self._open[number] = line, list(line.messages)
        line, said = self._open[number]
        content, limit, *_ = line.turns[turn]
        said += [{"role": "user", "content": content}] if turn else []
        fields, limit = {**line.fields, "messages": list(said)}, limit or line.output_tokens
        return dataclasses.replace(line, fields=fields, output_tokens=limit, session=number, turn=turn + 1)

    def after(self, record: Record) -> Optional[Job]:
        """The next turn; None after the last one, and after one that failed."""
        number, turn = self.place(record.job.index)
        line, said = self._open.pop(number, (None, []))
        if line is None or not record.ok or turn + 1 == len(line.turns):
            return None
        answer = line.turns[turn].answer if self._history == "corpus" else record.reply.text
        sendable = (answer or "").encode("utf-8", "replace").decode()  # no half of a surrogate pair
        self._open[number] = line, [*said, {"role": "assistant", "content": sendable}]
        delay_ms = line.turns[turn + 1].delay_ms
        return Job(record.job.index + 1, (record.ended_s or 0.0) + delay_ms / 1e3 if delay_ms else None)


HISTORIES = ("server", "corpus")


@dataclass(frozen=True)
class Schedule:
    """Which jobs there are and when each is due, in seconds from the start; of several processes, each has its part.

    Jobs are made as they are taken, so their number costs nothing. Without `count` there is no end but `duration_s`.

    >>> [job.index for job in Schedule(7).part(1, 3)]
    [1, 4]
    >>> [job.due_s for job in Schedule(4, "rate", rate=10, burstiness=math.inf)]
    [0.0, 0.1, 0.2, 0.3]
    """

    count: Optional[int] = None
    kind: str = "closed"  # of SCHEDULES
    duration_s: float = math.inf
    rate: float = math.inf
    burstiness: float = 1.0
    ramp_up_s: float = 0.0
    seed: int = 0
    stamp_s: Callable[[int], float] = float  # the due time of a trace's request
    sessions: Optional[Sessions] = None  # then `count` is theirs, and times are those of their first turns
    shard: int = 0
    shards: int = 1
    first: int = 0  # number of the first job: the points of a sweep go on counting, so that no prompt comes twice

    @classmethod
    def of(cls, config: Config, stamp: Callable[[int], float] = float, sessions: Optional[Sessions] = None) -> Schedule:
        """`stamp`: the time of a trace's request, by its number, as the trace has it."""
        kind = "trace" if config.timestamp_unit else "closed" if math.isinf(config.request_rate) else "rate"
        per_s = config.speed * TIMESTAMP_UNITS[config.timestamp_unit or "s"]
        total = config.total_requests
        return cls(
            total if total is None or sessions is None else sessions.place(total)[0],
            kind,
            config.duration or math.inf,
            config.request_rate,
            config.burstiness,
            config.ramp_up or 0.0,
            config.seed,
            lambda index: (stamp(index) - stamp(0)) / per_s,
            sessions,
        )

    @property
    def is_timed(self) -> bool:
        return self.kind != "closed"

    def part(self, shard: int, shards: int) -> Schedule:
        """One process's share of these jobs: every `shards`-th."""
        return dataclasses.replace(self, shard=shard, shards=shards)

    def own(self, all_of_them: Iterable[Any]) -> Iterator[Any]:
        return itertools.islice(all_of_them, self.shard, None, self.shards)

    @property
    def start(self) -> int:
        """The number of the first job, or of its session: one that points before have begun is left to them."""
        number, turn = self.sessions.place(self.first) if self.sessions else (self.first, 0)
        return number + (turn > 0)

    def __iter__(self) -> Iterator[Job]:
        numbers = itertools.count() if self.count is None else range(self.count)
        first = self.sessions.first if self.sessions else int
        own = map(self.start.__add__, self.own(numbers))
        jobs = map(Job, map(first, own), SCHEDULES[self.kind](self))
        return itertools.takewhile(lambda job: (job.due_s or 0.0) < self.duration_s, jobs)

    def permits_s(self, total: int) -> Iterator[float]:
        """When each of this process's permits may be used first: one after the other where the concurrency grows."""
        ramp_s = 0.0 if self.is_timed else self.ramp_up_s
        return (ramp_s * (number * self.shards + self.shard) / (total * self.shards) for number in range(total))

    def ended(self, record: Record) -> Optional[Job]:
        """Told of each record; the job that follows from it and takes over its place, due later, where there is one."""
        return self.sessions.after(record) if self.sessions else None

    def goes_on(self, job: Job) -> bool:
        return self.sessions is not None and self.sessions.goes_on(job.index)

    def number(self, job: Job) -> int:
        """Of the job, or of its session: those of a process are every `shards`-th."""
        return self.sessions.place(job.index)[0] if self.sessions else job.index


def rate_times(schedule: Schedule) -> Iterator[float]:
    """Gaps by a gamma distribution whose shape is the burstiness: 1 a Poisson process, infinite evenly spaced.

    While the rate grows, the time that a given sum of gaps stands for is that at which so many requests are due.
    """
    rate, ramp_s, shape = schedule.rate, schedule.ramp_up_s, schedule.burstiness
    draw = random.Random(f"{schedule.seed}/arrivals{f'/{schedule.first}' * (schedule.first > 0)}").gammavariate
    gaps = itertools.repeat(1.0) if math.isinf(shape) else (draw(shape, 1 / shape) for _ in itertools.count())
    in_ramp = rate * ramp_s / 2  # requests due until the full rate is reached
    for requests in schedule.own(itertools.accumulate(gaps, initial=0.0)):
        yield math.sqrt(2 * requests * ramp_s / rate) if requests < in_ramp else ramp_s / 2 + requests / rate


# kind -> the due times of a schedule's own jobs, ascending; None: as soon as a permit is free.
SCHEDULES: Mapping[str, Callable[[Schedule], Iterator[Optional[float]]]] = {
    "closed": lambda schedule: itertools.repeat(None),
    "rate": rate_times,
    "trace": lambda schedule: map(schedule.stamp_s, schedule.own(itertools.count())),
}
TIMESTAMP_UNITS = {"ms": 1000.0, "s": 1.0}  # in a second


def share(total: int, shard: int, shards: int) -> int:
    """The part of `total` that falls to one of several processes; the parts add up.

    >>> [share(10, i, 4) for i in range(4)]
    [3, 3, 2, 2]
    """
    return total // shards + (shard < total % shards)


def default_warmup(concurrency: Optional[int], total_requests: Optional[int]) -> int:
    """A warm-up request for each connection, but no more than will be measured."""
    warmup = max(concurrency or WARMUP_WITHOUT_CAP, LEAST_WARMUP)
    return warmup if total_requests is None else min(warmup, total_requests)


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
WORDS_PER_SENTENCE = 12


class Calibration(NamedTuple):
    """What a server counts for a synthetic prompt: tokens per word, full stops included, and a constant besides.

    The constant holds the chat template, the system prompt and the invented words at the start.
    """

    tokens_per_word: float
    constant_tokens: float

    def words(self, tokens: int) -> int:
        """How many words make a prompt of so many tokens.

        >>> Calibration(1.25, 10).words(110)
        80
        """
        return max(0, round((tokens - self.constant_tokens) / self.tokens_per_word))


# Without the server's counts: words of one token, a full stop per sentence, the start, and no template.
UNCALIBRATED = Calibration((WORDS_PER_SENTENCE + 1) / WORDS_PER_SENTENCE, 8)


def calibration_of(config: Config) -> Calibration:
    return Calibration(*config.prompt_calibration) if config.prompt_calibration else UNCALIBRATED


def fitted(counted: Sequence[Sequence[int]]) -> Optional[Calibration]:
    """The least-squares line through (words, tokens counted) of prompts of two lengths; None where there is none.

    >>> fitted([(0, 10), (16, 30), (16, 30)])
    Calibration(tokens_per_word=1.25, constant_tokens=10.0)
    """
    words_mean = sum(words for words, _ in counted) / max(1, len(counted))
    tokens_mean = sum(tokens for _, tokens in counted) / max(1, len(counted))
    spread = sum((words - words_mean) ** 2 for words, _ in counted)
    slope = sum((words - words_mean) * (tokens - tokens_mean) for words, tokens in counted) / (spread or 1)
    if slope < LEAST_TOKENS_PER_WORD:  # it counts something else, or always the same
        return None
    return Calibration(round(slope, 4), round(tokens_mean - slope * words_mean, 2))


def calibrated(config: Config, counted: Sequence[Sequence[int]]) -> Config:
    """The configuration with what the warm-up's counts tell, where it has synthetic prompts and was not told itself."""
    if config.requests_file or config.prompt_calibration:
        return config
    return dataclasses.replace(config, prompt_calibration=fitted(counted))


def synthetic_prompt(key: str, count: int, evenly: bool = False) -> str:
    """So many English words in sentences, unique from the first characters on; the same `key`, the same text.

    Before them stand two invented words of four syllables drawn from the key (90**8 pairs), so no two prompts
    share the first block of a prefix cache. `evenly`: each word as often as any other, so that one prompt costs as
    many tokens as the mean of many.
    """
    rng = random.Random(key)
    head = "".join(rng.choices(SYLLABLES, k=8))
    drawn = itertools.islice(itertools.cycle(rng.sample(range(256), 256)), count) if evenly else rng.randbytes(count)
    body = sentences(drawn)
    return f"{head[:8]} {head[8:]}" + (f" {body}" if body else "")


def sentences(drawn: Iterable[int]) -> str:
    """The words of these bytes. The first sentence is half as long as the others: then the full stops, too, are
    proportional to the words, to the nearest one.
    """
    words = [WORDS[byte] for byte in drawn]
    starts = range(-WORDS_PER_SENTENCE // 2, len(words), WORDS_PER_SENTENCE)
    return ". ".join(" ".join(words[max(0, start) : start + WORDS_PER_SENTENCE]) for start in starts)


def under_system(system_prompt: Optional[str], messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages after a system message, where one is wanted and they do not begin with one of their own."""
    if not system_prompt or messages[0].get("role") in ("system", "developer"):
        return list(messages)
    return [{"role": "system", "content": system_prompt}, *messages]


def chat(prompt: str, system_prompt: Optional[str]) -> list[dict[str, Any]]:
    return under_system(system_prompt, [{"role": "user", "content": prompt}])


class EndpointType(NamedTuple):
    """A resource of the API: its path, the field that holds the prompt, a plain prompt's form, and the SDK's call."""

    path: str
    prompt_field: str
    form: Callable[[str, Optional[str]], Any]
    create: Callable[[Any], Callable[..., Awaitable[Any]]]


ENDPOINT_TYPES: Mapping[str, EndpointType] = {
    "chat": EndpointType("/chat/completions", "messages", chat, lambda sdk: sdk.chat.completions.create),
    "completions": EndpointType("/completions", "prompt", lambda text, _: text, lambda sdk: sdk.completions.create),
}


def plain_request(config: Config, prompt: str, output_tokens: Optional[int] = None) -> Request:
    endpoint = ENDPOINT_TYPES[config.endpoint_type]
    return Request({endpoint.prompt_field: endpoint.form(prompt, config.system_prompt)}, output_tokens)


def synthetic_request(config: Config, index: int) -> Request:
    """The measured request of a job without a corpus."""
    words = calibration_of(config).words(config.prompt_tokens)
    return plain_request(config, synthetic_prompt(f"{config.seed}/run/{index}", words))


def warmup_request(config: Config, index: int) -> Request:
    """A request that no measured one shares a prefix with, short in its answer, by turns for each model."""
    prompt = synthetic_prompt(f"{config.seed}/warmup/{index}", warmup_words(config, index), evenly=True)
    request = plain_request(config, prompt, warmup_limit(config))
    models = config.corpus.get("models") or [config.model]
    turn = index // config.processes // len(config.servers)  # each process asks one server after the other
    model = {"model": models[turn % len(models)]}
    whole = bool(config.corpus.get("whole"))
    return dataclasses.replace(request, fields={**request.fields, **model}, whole=whole)


def warmup_words(config: Config, index: int) -> int:
    """Those of a measured prompt; where lengths are to be calibrated, by turns also each word once, and none.

    Where words cost many tokens, those of a measured prompt are too long for the server until they are calibrated.
    Where they are few, their cost is no mean of all words': each word once is then the least.
    """
    if config.requests_file:
        return UNCALIBRATED.words(WARMUP_PROMPT_TOKENS)
    words = calibration_of(config).words(config.prompt_tokens)
    if config.prompt_calibration:
        return words
    return {0: len(WORDS), 1: 0}.get(index % LENGTHS_TURN, max(words, len(WORDS)))


OUTPUT_LIMITS = ("max_tokens", "max_completion_tokens")  # fields of a body
OUTPUT_MINIMA = ("min_tokens", "min_new_tokens", "min_completion_tokens")


def warmup_limit(config: Config) -> int:
    """Output tokens of a warm-up reply: few, but as many as the body demands, and no more than the run allows."""

    def asked(names: Sequence[str]) -> list[int]:
        values = (config.extra_body.get(name) for name in names)
        return [value for value in values if isinstance(value, int) and value > 0]

    return min(max(WARMUP_OUTPUT_TOKENS, *asked(OUTPUT_MINIMA), 0), *(asked(OUTPUT_LIMITS) or [config.output_tokens]))


# What a line may say of its request beside its prompt and limit: the SDK's create(), then vLLM and SGLang.
BODY_KEYS = frozenset(
    "audio best_of echo frequency_penalty function_call functions logit_bias logprobs metadata modalities model "
    "moderation parallel_tool_calls prediction presence_penalty prompt_cache_key prompt_cache_options "
    "prompt_cache_retention reasoning_effort response_format safety_identifier seed service_tier stop store suffix "
    "temperature tool_choice tools top_logprobs top_p user verbosity web_search_options "
    "add_generation_prompt add_special_tokens allowed_token_ids bad_words cache_salt chat_template "
    "chat_template_kwargs continue_final_message custom_logit_processor custom_params data_parallel_rank documents "
    "ebnf guided_choice guided_decoding_backend guided_grammar guided_json guided_regex guided_whitespace_pattern "
    "ignore_eos include_reasoning include_stop_str_in_output json_schema kv_transfer_params length_penalty lora_path "
    "min_p min_tokens mm_processor_kwargs no_stop_trim priority prompt_logprobs regex repetition_penalty "
    "return_hidden_states return_token_ids return_tokens_as_token_ids separate_reasoning session_params "
    "skip_special_tokens spaces_between_special_tokens stop_regex stop_token_ids stream_reasoning structured_outputs "
    "thinking_token_budget top_k truncate_prompt_tokens use_beam_search vllm_xargs".split()
)
PROMPT_KEYS = ("messages", "turns", "conversations", "text", "prompt")
# Keys that mean something here, or to the scripts that write corpora, and are never sent.
OWN_KEYS = frozenset(
    "text prompt messages turns conversations max_tokens max_completion_tokens output_tokens input_tokens "
    "prefix_tokens prefix_group turn_tokens label custom_id method url body n timestamp input_length "
    "output_length hash_ids".split()
)


def parse_request(line: str, system_prompt: Optional[str], endpoint_type: str = "chat") -> Request:
    """One corpus line -> Request. Raises ValueError with the reason, in words.

    >>> parse_request('{"text": "hi", "max_tokens": 5, "top_k": 1, "id": 7}', None).fields
    {'top_k': 1, 'messages': [{'role': 'user', 'content': 'hi'}]}
    """
    try:
        row = json.loads(line, parse_constant=_refuse, parse_float=_finite)
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
    row = {key: value for key, value in row.items() if value is not None}  # a key whose value is null is absent
    return _asked_by(row, system_prompt, ENDPOINT_TYPES[endpoint_type])


def _asked_by(row: Mapping[str, Any], system_prompt: Optional[str], endpoint: EndpointType) -> Request:
    """A `body` without a prompt beside it, as in OpenAI's batch lines, is the whole request."""
    body = row.get("body", {})
    if not isinstance(body, dict):
        raise ValueError("'body' is not a JSON object")
    _refuse_fields({**row, **body})
    said: dict[str, Any] = {name: _whole_number(row.get(name)) for name in ("input_tokens", "prefix_tokens")}
    if not isinstance(body.get("model", row.get("model", "")), str):
        raise ValueError("'model' is not a text")
    label = row.get("label", row.get("custom_id"))
    said["timestamp"] = float(_not_negative(row["timestamp"], "the timestamp")) if "timestamp" in row else None
    said["label"] = None if label is None else str(label)[:LABEL_CHARS]
    fields = {key: value for key, value in row.items() if key in BODY_KEYS}
    has_prompt = any(key in row for key in PROMPT_KEYS)
    if not has_prompt and "input_length" in row and "timestamp" in row:
        said["input_tokens"], tokens, said["hash_ids"] = _trace_line(row)
        return Request({**fields, **body}, tokens, **said)
    if "body" in row and not has_prompt:
        _check_whole(row, body, endpoint)
        return Request(body, whole=True, **said)
    if next(key for key in (*PROMPT_KEYS, "") if key in row or not key) in ("turns", "conversations"):
        said["turns"], system = _session_of(row)
        row = {key: value for key, value in row.items() if key != "system"}
        row["messages"] = [{"role": "user", "content": said["turns"][0].content}]
        system_prompt = system or system_prompt
    fields = {**fields, endpoint.prompt_field: _prompt_of(row, system_prompt, endpoint), **body}
    limit = _limit_of(row)
    said["unknown"] = [key for key in row if key not in BODY_KEYS and key not in OWN_KEYS]
    return Request(fields, None if any(name in body for name in OUTPUT_LIMITS) else limit, **said)


ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def _session_of(row: Mapping[str, Any]) -> tuple[list[SessionTurn], Optional[str]]:
    """(turns, system prompt) of `turns`, or of ShareGPT's `conversations`; what an assistant says answers the turn."""
    turns: list[SessionTurn] = []
    system, said = row.get("system"), row.get("turns", row.get("conversations"))
    if not isinstance(said, list) or not all(isinstance(item, dict) for item in said):
        raise ValueError("turns or conversations are not a list of objects")
    for item in said:
        role = ROLES.get(str(item.get("from", item.get("role", "user"))))
        content = item.get("value", item.get("content"))
        if role == "user":
            turns.append(_turn_of(item, content))
        elif role == "assistant" and turns and isinstance(content, str):
            turns[-1] = turns[-1]._replace(answer=content)
        elif role == "system":
            system = content
    if not turns:
        raise ValueError("a session without turns")
    return turns, system if isinstance(system, str) and system else None


def _turn_of(item: Mapping[str, Any], content: Any) -> SessionTurn:
    if not content or not isinstance(content, (str, list)):
        raise ValueError("a turn without content")
    delay_ms = _not_negative(item.get("delay_ms") or 0, "delay_ms")
    limit = _limit_of({key: value for key, value in item.items() if value is not None})
    return SessionTurn(content, limit, delay_ms)


def _check_whole(row: Mapping[str, Any], body: Mapping[str, Any], endpoint: EndpointType) -> None:
    url = str(row.get("url", endpoint.path))
    if not re.search(rf"(^|/v\d+){endpoint.path}$", url):
        raise ValueError(f"'url' is {url:.80}, and this run asks {endpoint.path}")
    if endpoint.prompt_field == "messages":
        _prompt_of({"messages": body.get("messages", ())}, None, endpoint)
    elif not body.get("prompt"):
        raise ValueError("'body' has no 'prompt'")


def _refuse_fields(fields: Mapping[str, Any]) -> None:
    for name in ("stream", "stream_options"):
        if fields.get(name) is not None:
            raise ValueError(f"'{name}' in a line: the replies of a run are all streamed, or all whole")
    if fields.get("n") not in (None, 1):
        raise ValueError("'n' in a line: the times of several answers in one reply would mix")


def _not_negative(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise ValueError(f"{what} is not a number of 0 or more: {value!r:.40}")
    return value


def _trace_line(row: Mapping[str, Any]) -> tuple[int, int, Sequence[Any]]:
    """Of a Mooncake trace: both lengths, and a hash for each block of the prompt, perhaps not for the last one."""
    tokens, limit = (_whole_number(row.get(name)) for name in ("input_length", "output_length"))
    if not tokens or limit is None:
        raise ValueError("input_length and output_length are not whole numbers, of 1 and of 0 or more")
    blocks, names = -(-tokens // TRACE_BLOCK_TOKENS), row.get("hash_ids") or []
    if not isinstance(names, list) or (names and not blocks - 1 <= len(names) <= blocks):
        raise ValueError(f"hash_ids is no list of the {blocks} blocks of {TRACE_BLOCK_TOKENS} in {tokens} tokens")
    return tokens, max(1, limit), names


def _whole_number(value: Any) -> Optional[int]:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_TOKENS else None


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _finite(text: str) -> float:
    if math.isinf(float(text)):
        raise ValueError(f"{text:.40} is too large a number")
    return float(text)


def _prompt_of(row: Mapping[str, Any], system_prompt: Optional[str], endpoint: EndpointType) -> Any:
    """`messages` comes before `text` and `prompt`."""
    key = next((key for key in ("messages", "text", "prompt") if key in row), None)
    if key is None:
        raise ValueError("no prompt: neither 'messages', 'text' nor 'prompt'")
    if key == "messages" and endpoint.prompt_field != key:
        raise ValueError(f"messages or turns are a chat, and {endpoint.path} takes plain prompts: 'text' or 'prompt'")
    if key != "messages":
        if not isinstance(row[key], str) or not row[key]:
            raise ValueError("the prompt is not a text, or an empty one")
        return endpoint.form(row[key], system_prompt)
    messages = row[key]
    if not isinstance(messages, list) or not messages or not all(isinstance(item, dict) for item in messages):
        raise ValueError("'messages' is not a list of messages")
    return under_system(system_prompt, messages)


def _limit_of(row: Mapping[str, Any]) -> Optional[int]:
    limit = next((row[name] for name in (*OUTPUT_LIMITS, "output_tokens") if name in row), None)
    if limit is None:
        return None
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ValueError(f"the output limit is not a whole number of 1 or more: {limit!r:.40}")
    return limit


_READ_ONLY = os.O_RDONLY | getattr(os, "O_BINARY", 0)


class Corpus(Sequence[Request]):
    """The prompts of a JSONL file, all checked before any load, then read and parsed one by one as they are needed.

    Kept are offsets only, so that several processes hold no copy of the file each. What can be read only once, as a
    pipe, goes to a temporary file, without a name or removed by `close`; `path` is where another process finds it.
    """

    def __init__(
        self, name: str, system_prompt: Optional[str], endpoint_type: str = "chat", history: str = "server"
    ) -> None:
        """`name`: the file, as the user calls it."""
        self.path = os.path.realpath(name)
        self._name = name
        self._parse = partial(parse_request, system_prompt=system_prompt, endpoint_type=endpoint_type)
        self._keys: Counter[str] = Counter()  # of bodies, by the lines that have them
        self._unknown: Counter[str] = Counter()
        self._models: Counter[Optional[str]] = Counter()
        self._whole = self._with_turns = self.unanswered = 0
        self._turn_starts = array("Q", [0])  # how many turns are before each line, and in all of them
        self._sessions = Sessions(self, self._turn_starts, history)
        self._starts = array("Q")  # of each prompt's line, and where the file ends
        self._timestamps = array("d")
        self.own_tokens = array("Q")  # of each prompt its length and its shared prefix, as the line says; 0: unsaid
        self._file = -1
        self._copy = ""

    def open(self, check: bool = True) -> Corpus:
        """Find the lines and, unless another process has done it, check each. Raises UserError naming the line."""
        at = number = 0
        try:
            self._file = os.open(self._name, _READ_ONLY)
            if check and not self._can_be_read_again():
                self._copy_to_disk()
            with open(self._file, "rb", closefd=False) as file:
                for raw in file:
                    number += 1
                    line = raw.decode("utf-8" if at else "utf-8-sig")
                    if line.strip():
                        self._starts.append(at)
                        if check:
                            asked = self._parse(line)
                            self._note(asked)
                            self.own_tokens.extend((asked.input_tokens or 0, asked.prefix_tokens or 0))
                            self.own_tokens.extend((0, 0) * (len(asked.turns) - 1))  # with what the server answers
                            self._add_timestamp(asked.timestamp)
                    at += len(raw)
        except UnicodeDecodeError:
            raise UserError(f"{self._name}, line {number}: not UTF-8; save the corpus as UTF-8") from None
        except ValueError as error:
            raise UserError(f"{self._name}, line {number}: {error}") from None
        except OSError as error:
            raise UserError(f"cannot read --requests-file {self._name}: {error.strerror or error}") from None
        self._starts.append(at)
        return self

    def _add_timestamp(self, stamp: Optional[float]) -> None:
        stamps = self._timestamps
        if (stamp is None) != (not stamps) and len(self._starts) > 1:
            said = "no" if stamp is None else "a"
            raise ValueError(f"{said} timestamp, unlike the lines above: all have one or none")
        if stamp is not None and stamps and stamp < stamps[-1]:
            raise ValueError(f"its timestamp is before that of the line above, {stamps[-1]:g}: sort the trace")
        stamps.extend(() if stamp is None else (stamp,))

    @property
    def is_trace(self) -> bool:
        """Whether its lines say when they are to be sent; known where they were checked."""
        return bool(self._timestamps)

    def timestamp(self, number: int) -> float:
        """In the trace's own unit."""
        return self._timestamps[number] if self._timestamps else self[number].timestamp or 0.0

    def _note(self, request: Request) -> None:
        self._keys.update(request.fields.keys())
        self._unknown.update(request.unknown)
        self._models[request.fields.get("model")] += 1
        self._whole += request.whole
        self._with_turns += bool(request.turns)
        self.unanswered += any(turn.answer is None for turn in request.turns[:-1])
        self._turn_starts.append(self._turn_starts[-1] + max(1, len(request.turns)))

    @property
    def requests(self) -> int:
        """With the later turns of sessions."""
        return self._turn_starts[-1]

    @property
    def sessions(self) -> Optional[Sessions]:
        """Where there are any; known where the lines were checked."""
        return self._sessions if self._with_turns else None

    def asked(self, model: str) -> dict[str, Any]:
        """What the lines put into the bodies: how many which key, those not sent, all models, whether nothing is added.

        `model`: of the lines that name none.
        """
        models = [name or model for name in self._models]
        whole = self._whole == len(self)
        named = {"keys": dict(self._keys), "not_sent": [*self._unknown], "models": [*dict.fromkeys(models)]}
        return {**named, "whole": whole, "sessions": self._with_turns}

    @property
    def own_model(self) -> Optional[str]:
        """A model's name where every line has one."""
        return None if None in self._models else next(iter(self._models), None)

    def _can_be_read_again(self) -> bool:
        opened = os.fstat(self._file)
        with contextlib.suppress(OSError):
            return not stat.S_ISFIFO(opened.st_mode) and os.path.samestat(os.stat(self.path), opened)
        return False

    def _copy_to_disk(self) -> None:
        place, self.path = tempfile.mkstemp(prefix="online-bench-", suffix=".jsonl")
        by_number = f"/proc/{os.getpid()}/fd/{place}"
        if os.path.exists(by_number):  # then it needs no name, and none is left behind however this process ends
            os.unlink(self.path)
            self.path = by_number
        else:
            self._copy = self.path
        with open(self._file, "rb") as source, open(place, "wb", closefd=False) as target:
            self._file = place
            shutil.copyfileobj(source, target)
        os.lseek(place, 0, os.SEEK_SET)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: Any) -> Any:
        """Raises RunError when the file is no longer what it was."""
        start, end = self._starts[number], self._starts[number + 1]
        try:
            os.lseek(self._file, start, os.SEEK_SET)
            line = os.read(self._file, end - start).decode("utf-8" if start else "utf-8-sig")
            return self._parse(line.strip())
        except (OSError, ValueError) as error:
            raise RunError(f"{self._name} has changed during the run: {error}") from None

    def close(self) -> None:
        file, self._file, copy, self._copy = self._file, -1, self._copy, ""
        if file >= 0:
            os.close(file)
        if copy:
            with contextlib.suppress(OSError):
                os.unlink(copy)


def load_requests(
    path: str, system_prompt: Optional[str], endpoint_type: str = "chat", history: str = "server"
) -> Corpus:
    """Every prompt of a JSONL corpus, checked before any load. Raises UserError naming the line at fault."""
    corpus = Corpus(path, system_prompt, endpoint_type, history)
    try:
        if not corpus.open():
            keys = "one JSON object per line with 'text', 'prompt' or 'messages'"
            raise UserError(f"{path} holds no prompt; {keys}")
        if history == "corpus" and corpus.unanswered:
            raise UserError(f"--history corpus: {corpus.unanswered} sessions of {path} lack the answer to a turn")
        return corpus
    except BaseException:
        corpus.close()
        raise


def workload_of(config: Config, corpus: Optional[Sequence[Request]]) -> Workload:
    """Job number -> request: from the corpus, cycled, or made up."""
    if not corpus:
        return partial(synthetic_request, config)
    sessions = corpus.sessions if isinstance(corpus, Corpus) else None
    if sessions:
        return sessions.request
    return lambda index: with_text(corpus[index % len(corpus)], config, index)


def with_text(asked: Request, config: Config, index: int) -> Request:
    """A trace's request that has only a length and the names of its blocks, with a prompt of that length.

    Blocks of one name are one text, and no others; those without a name are this request's own. As the first one is
    shorter by what stands around a prompt, all blocks end where the server's count is a multiple of their length.
    """
    if asked.hash_ids is None or asked.input_tokens is None:
        return asked
    per_word, begin = calibration_of(config)
    ends = range(TRACE_BLOCK_TOKENS, asked.input_tokens + TRACE_BLOCK_TOKENS, TRACE_BLOCK_TOKENS)
    own = (f"own {index} {place}" for place in itertools.count(len(asked.hash_ids)))
    texts: list[str] = []
    for end, name in zip(ends, itertools.chain(map(json.dumps, asked.hash_ids), own)):
        words = max(not texts, round((min(end, asked.input_tokens) - begin) / per_word))
        # Whole fours: of those, fewer are the beginning of more.
        drawn = random.Random(f"{config.seed}/block/{name}").randbytes(-(-words // 4) * 4)
        texts += [sentences(drawn[:words])] if words > 0 else []
        begin = end
    return dataclasses.replace(asked, fields={**asked.fields, **plain_request(config, " ".join(texts)).fields})


def schedule_of(config: Config, corpus: Optional[Corpus]) -> Schedule:
    """The whole schedule of a run; a trace's times are those of its lines."""
    return Schedule.of(config, corpus.timestamp, corpus.sessions) if corpus else Schedule.of(config)


# === 5. Replies (pure) ===

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


def plain(text: str, limit: int = ERROR_TEXT_CHARS) -> str:
    """One line that is safe to print: no terminal escapes, no control characters, at most `limit` characters.

    >>> plain("a\\x1b[31mred\\nline")
    'a red line'
    """
    return " ".join(_CONTROL.sub(" ", text[: 4 * limit]).split())[:limit]


SEVERAL_CHOICES = "several answers in one reply, whose times would mix: ask for one (n = 1)"
ABORTED_REASONS = ("abort", "error", "cancelled")  # finish_reasons that mean: not finished


def usage_of(usage: Any) -> dict[str, Any]:
    """Token counts of a usage object, by Reply's field names; empty when it counts nothing or is malformed."""
    if not isinstance(usage, dict):
        return {}
    prompt, completion = (_whole_number(usage.get(name)) for name in ("prompt_tokens", "completion_tokens"))
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


def _said(choice: Mapping[str, Any], field_name: str) -> Any:
    """A choice's message or delta; of a plain completion its `text`, as if a delta had said it."""
    said, text = choice.get(field_name), choice.get("text")
    return {"content": text} if said is None and isinstance(text, str) else said


def _text_of(delta: Mapping[str, Any]) -> tuple[bool, bool]:
    """(whether a message or delta says anything, whether a reader would see it before the reasoning ends)."""
    visible = any(delta.get(key) for key in ("content", "refusal", "tool_calls", "function_call"))
    return visible or bool(delta.get("reasoning_content") or delta.get("reasoning")), visible


class WholeReader:
    """Reads a reply that comes as one JSON object."""

    def __init__(self, reply: Reply, keeps_text: bool = False) -> None:
        """`keeps_text`: what it says is to be known afterwards."""
        self._reply = reply
        self._keeps_text = keeps_text
        self._pieces: list[bytes] = []
        self.complete = False  # whether nothing that could still come would matter
        self.late: set[int] = set()  # stamps of reads whose bytes may have queued up; each is that of the last byte

    def feed(self, stamps_ns: Sequence[int], pieces: Sequence[bytes]) -> None:
        """Takes the body in pieces, each with the time of its arrival."""
        self._pieces += pieces

    def chunks_so_far(self, unread: int) -> int:
        """Content chunks, as far as is known with so many pieces not yet fed."""
        return 0

    def finish(self) -> None:
        """The body has ended: write what it said into the reply, a failure where it is not a complete answer."""
        self._reply.failure = self._read(b"".join(self._pieces))

    def _read(self, data: bytes) -> Optional[Failure]:
        if not data.strip():
            return _failed("empty_body", "an empty body")
        try:
            return read_completion(json.loads(data.decode("utf-8")), self._reply, self._keeps_text)
        except UnicodeDecodeError:
            return _failed("not_utf8", "the body is not UTF-8")
        except (ValueError, RecursionError) as error:
            return _failed("bad_json", f"the body is not JSON ({error}): {data[:80].decode('utf-8', 'replace')}")


def read_completion(body: Any, reply: Reply, keeps_text: bool = False) -> Optional[Failure]:
    """Fill in a reply from a chat completion object; the failure where it is not a complete one."""
    message = error_text(body)
    if message:
        return _failed("error_body", message)
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return _failed("no_choices", f"no choices in {glimpse(body)[:120]}")
    if len(choices) > 1:
        return _failed("several_choices", SEVERAL_CHOICES)
    vars(reply).update(usage_of(body.get("usage")))
    finish, said = choices[0].get("finish_reason"), _said(choices[0], "message")
    reply.finish_reason = finish if finish and isinstance(finish, str) else None
    if not isinstance(said, dict):
        return _failed("no_choices", "a choice without a message")
    has_text = _text_of(said)[0]
    reply.text = str(said.get("content") or "") if keeps_text else None
    if has_text and not reply.completion_tokens:
        reply.completion_tokens, reply.has_usage = None, False
    return _verdict(reply.finish_reason, has_text, reply.completion_tokens)


def _verdict(finish: Optional[str], has_text: bool, tokens: Optional[int]) -> Optional[Failure]:
    if finish in ABORTED_REASONS:
        return _failed("aborted_by_server", f"finish_reason {finish}")
    if not has_text and not tokens:
        return _failed("empty", "a reply without a token")
    return None


_DELTA, _COMPLETION = b'"delta":', b'"text":'  # of a chat's chunk, and of a plain completion's
_OPENINGS = {_DELTA: _DELTA + b'{"content":"', _COMPLETION: _COMPLETION + b'"'}
_FAST_END = b'"finish_reason":null'
_FIRST_CHOICE = b'"index":0'
_QUOTE = ord('"')
_TEXT = re.compile(rb'[^"\\\x00-\x1f]+')  # of a JSON string, free of escapes
# Texts of JSON strings, none empty, each closed by a byte that none can hold.
_PLAIN_TEXTS = re.compile(rb'(?:(?!\x01)[^"\\\x00-\x1f]*(?:\\[^\x00-\x1f][^"\\\x00-\x1f]*)*\x01)*')
_JSON_TEXT = re.compile(rb'(?:[^"\\]|\\.)*')  # up to the quote that ends it
PLAIN_RUN = 64  # pieces compared at once
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
STREAM_HEAD_BYTES = 4096
_NO_TAIL = bytearray()  # never filled: only a tail that is there grows
MOST_TOKENS_PER_CHUNK = 10_000  # a count beyond is a server's mistake, and no reason to run out of memory


def text_at(event: bytes) -> int:
    """Where the text begins of an event that is surely a content chunk and nothing else, told without JSON; else 0."""
    key = _DELTA if _DELTA in event else _COMPLETION
    at = event.find(key)
    start = at + len(_OPENINGS[key])
    plain_content = (
        at > 0
        and event.startswith(_OPENINGS[key], at)
        and event.startswith(b"data: {")
        and event.endswith(b"}")
        and event[start] != _QUOTE
        and _FAST_END in event
        and event.rfind(key) == at  # the only choice
        and (_FIRST_CHOICE in event or b'"index":' not in event)
        and b'"usage":{' not in event
        and b'"error"' not in event
        and b"\n" not in event
    )
    return start if plain_content else 0


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

    def __init__(self, reply: Reply, keeps_text: bool = False) -> None:
        self._reply = reply
        self._texts: Optional[list[bytes]] = [] if keeps_text else None  # as they stand in JSON
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
        self._before = self._behind = b"\0"  # until the first plain event: no event is like this
        self._content_reads = 0
        self._merged_reads = 0
        self._alone = False  # whether the last read's chunk is its only one so far
        self.late: set[int] = set()
        self._gaps_before = 0  # how many gaps there were before the last read
        self._packed: set[int] = set()  # stamps of late reads of several chunks
        self._late_gaps = 0
        self._with_first = 0
        self._choice_index: Any = None

    def feed(self, stamps_ns: Sequence[int], pieces: Sequence[bytes]) -> None:
        at = 0
        while at < len(pieces):
            ready = pieces[at].startswith(self._before) and not self._tail and not self._after_cr
            plain = self._plain_run(pieces[at : at + PLAIN_RUN]) if ready else 0
            if plain:
                self._content_run(stamps_ns[at : at + plain])
            else:
                self._stamp_ns = stamps_ns[at]
                self._feed_any(stamps_ns[at], pieces[at])
            at += plain or 1

    def _plain_run(self, pieces: Sequence[bytes]) -> int:
        """How many pieces at the start are one event each that differs from the last plain one in its text alone.

        Told for all of them by one join, one split and one match: a twentieth of the cost of reading them one by
        one. A NUL marks where pieces meet; no plain text holds one, so a piece that holds more or less than one
        event does not match.
        """
        before, behind = self._before, self._behind
        joined = b"\0".join([*pieces, b""])
        texts = joined[len(before) :].split(behind + b"\0" + before)
        texts[-1:] = texts[-1].partition(behind + b"\0")[:2]
        ending = texts.pop()
        if not ending:  # what looked like the last text has no plain end
            texts.pop()
        found = _PLAIN_TEXTS.match(b"\1".join([*texts, b""]))
        count = found[0].count(b"\1") if found else 0
        if self._texts is not None:
            self._texts += texts[:count]
        return count

    def _content_run(self, stamps_ns: Sequence[int]) -> None:
        """The same as `_content` for each of them, visible and one token."""
        if len(set(stamps_ns)) < len(stamps_ns):
            for stamp_ns in stamps_ns:
                self._content(stamp_ns, True)
            return
        self._content(stamps_ns[0], True)
        more = len(stamps_ns) - 1
        if more:
            self._gaps_ms.extend([(after - before) / 1e6 for before, after in zip(stamps_ns, stamps_ns[1:])])
            self._gaps_before = len(self._gaps_ms) - 1
            self._chunks += more
            self._content_reads += more
            self._alone = True
            self._last_ns = stamps_ns[-1]

    def chunks_so_far(self, unread: int) -> int:
        return self._chunks + unread

    def _of_one_choice(self, index: Any) -> None:
        if self._choice_index is None:
            self._choice_index = index
        elif index != self._choice_index:
            self._fail("several_choices", SEVERAL_CHOICES)

    def _learn(self, event: bytes, at: int) -> None:
        """The next event will most likely differ from this plain one in its text alone."""
        self._of_one_choice(0)
        text = _TEXT.match(event, at)
        if text:
            self._before, self._behind = event[:at], event[text.end() :] + b"\n\n"

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
        at = text_at(event)
        if at:
            self._learn(event, at)
            if self._texts is not None:
                self._texts.append(_JSON_TEXT.match(event, at)[0])  # type: ignore[index]
            self._content(stamp_ns, True)
            return
        self._payload(stamp_ns, *event_fields(event))

    def _payload(self, stamp_ns: int, data: bytes, name: bytes) -> None:
        if data == b"[DONE]":
            self.complete = self._finish is not None
        if data in (b"", b"[DONE]"):
            return
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
            if usage and self._finish is not None:
                self.complete = True  # some servers never send [DONE]

    def _choice(self, stamp_ns: int, choice: Mapping[str, Any], counted: Optional[int]) -> None:
        """`counted`: completion tokens up to here, where every chunk tells them."""
        self._of_one_choice(choice.get("index") or 0)
        delta = _said(choice, "delta")
        if isinstance(delta, dict):
            says, visible = _text_of(delta)
            if self._texts is not None and isinstance(delta.get("content"), str):
                self._texts.append(json.dumps(delta["content"])[1:-1].encode())
            if says:
                tokens = 1 if counted is None or self._counted is None else counted - self._counted
                self._content(stamp_ns, visible, max(1, tokens))
                self._counted = counted
        finish = choice.get("finish_reason")
        if finish and isinstance(finish, str):
            self._finish = finish

    def _content(self, stamp_ns: int, visible: bool, tokens: int = 1) -> None:
        """A chunk known to hold several tokens spreads its gap evenly over them; chunks of one stamp, one read."""
        self._chunks += 1
        if stamp_ns != self._last_ns:
            self._content_reads += 1
            self._alone = True
            self._gaps_before = len(self._gaps_ms)
        else:
            self._with_first += stamp_ns == self._first_ns
            if self._alone:
                self._alone = False
                self._several(stamp_ns)
        if visible and self._visible_ns is None:
            self._visible_ns = stamp_ns
        if self._last_ns is None:
            self._first_ns = stamp_ns
        elif stamp_ns in self._packed:
            self._late_gaps += 1
        else:
            gap_ms = (stamp_ns - self._last_ns) / 1e6
            if tokens == 1:
                self._gaps_ms.append(gap_ms)
            else:
                self._gaps_ms.extend([gap_ms / tokens] * min(tokens, MOST_TOKENS_PER_CHUNK))
        self._last_ns = stamp_ns

    def _several(self, stamp_ns: int) -> None:
        """The last read holds several chunks. Of a late one the gaps are this client's doing, and left out."""
        if stamp_ns in self.late:
            self._packed.add(stamp_ns)
            self._late_gaps += len(self._gaps_ms) > self._gaps_before
            del self._gaps_ms[self._gaps_before :]
        else:
            self._merged_reads += 1

    def _fail(self, kind: str, message: str) -> None:
        self._failure = self._failure or _failed(kind, message)

    def finish(self) -> None:
        tail, self._tail = bytes(self._tail), _NO_TAIL
        if tail.strip(b"\n"):
            self._last_words(tail)
        reply = self._reply
        seen = self._first_ns, self._visible_ns
        reply.first_ns, reply.visible_ns = (None if stamp_ns in self._packed else stamp_ns for stamp_ns in seen)
        reply.last_ns, reply.late_gaps = self._last_ns, self._late_gaps
        reply.with_first = 0 if reply.first_ns is None else self._with_first
        reply.chunks, reply.gaps_ms, reply.finish_reason = self._chunks, self._gaps_ms, self._finish
        reply.content_reads, reply.merged_reads = self._content_reads, self._merged_reads
        vars(reply).update(self._counts)
        if self._texts is not None:
            with contextlib.suppress(ValueError):
                reply.text = json.loads(b'"%s"' % b"".join(self._texts), strict=False)
        if self._chunks and not reply.completion_tokens:  # none, or a count of 0 beside text
            reply.completion_tokens, reply.has_usage = self._chunks, False
        reply.failure = self._failure or self._ending()

    def _last_words(self, tail: bytes) -> None:
        """What stood before the end without a blank line: kept when it is whole, else the stream was cut."""
        data, name = event_fields(tail)
        try:
            whole = data == b"[DONE]" or isinstance(json.loads(data), dict)
        except (ValueError, RecursionError):
            whole = not data
        if whole:
            self._payload(self._stamp_ns, data, name)
        else:
            self._fail("truncated", "the stream ended within an event")

    def _ending(self) -> Optional[Failure]:
        if self._finish is None and not self._chunks and not self._counts:
            return self._nothing()
        if self._finish is None:
            return _failed("truncated", f"the stream ended without a finish_reason, after {self._chunks} chunks")
        return _verdict(self._finish, self._chunks > 0, self._counts.get("completion_tokens"))

    def _nothing(self) -> Failure:
        if not self._head.strip():
            return _failed("empty_body", "an empty body")
        if b"data:" in self._head:
            return _failed("truncated", "a stream without a token and without a finish_reason")
        return _failed("not_a_stream", f"no server-sent events but: {error_body_text(self._head)}")


Reader = Union[WholeReader, StreamReader]
READERS: Mapping[bool, Callable[..., Reader]] = {False: WholeReader, True: StreamReader}  # by --stream


def reader_of(config: Config) -> Callable[[Reply], Reader]:
    keeps_text = bool(config.corpus.get("sessions")) and config.history == "server"
    return partial(READERS[config.stream], keeps_text=keeps_text)


# === 6. Metrics (pure) ===


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
    return Distribution(len(ordered), mean, deviation, ordered[-1], *ranked(ordered))


def ranked(ordered: Sequence[float]) -> tuple[dict[float, float], dict[float, tuple[float, float]]]:
    """(percentiles, their confidence intervals) of a sorted, non-empty sample."""
    intervals = {}
    for rank in PERCENTILES:
        low, high = interval_places(len(ordered), rank / 100)
        least = ordered[low - 1] if low else -math.inf
        intervals[rank] = (least, ordered[high - 1] if high <= len(ordered) else math.inf)
    return {rank: percentile(ordered, rank) for rank in PERCENTILES}, intervals


def interval_places(n: int, share: float) -> tuple[int, int]:
    """Which order statistics, from 1, enclose a quantile with 95 % confidence; 0 and n + 1: there is none.

    How many of n values lie below the quantile is binomial, whatever their law; each tail has at most INTERVAL_TAIL.

    >>> interval_places(100, 0.5), interval_places(100, 0.99)
    ((40, 61), (97, 101))
    """
    width = 8 * math.sqrt(n * share * (1 - share)) + 1  # what lies further off has no weight
    first = max(0, math.floor(n * share - width))
    ways = math.lgamma(n + 1) - math.lgamma(first + 1) - math.lgamma(n - first + 1)
    weight = math.exp(ways + first * math.log(share) + (n - first) * math.log1p(-share))
    low, below = 0, 0.0  # the probability that fewer than `place` values lie below
    for place in range(first, n + 1):
        if below <= INTERVAL_TAIL:
            low = place
        if 1 - below <= INTERVAL_TAIL:
            return low, place
        below += weight
        weight *= (n - place) / (place + 1) * share / (1 - share)
    return low, n + 1


class Sample:
    """The values of one metric: the first EXACT_SAMPLES as they are, those beyond counted in buckets.

    The buckets are HdrHistogram's (hdrhistogram.org): each power of two is cut into 512 equal parts, and a bucket
    stands for its middle, within BUCKET_ERROR of all that it holds. Its number is what a value has in the upper bits
    as a float of 32 bits, as which values are kept, too. So memory does not grow with the run; mean, deviation, maximum
    and n stay exact.
    """

    def __init__(self, most: int = EXACT_SAMPLES) -> None:
        self.exact = array("f")
        self._most = most
        self._buckets: Counter[int] = Counter()
        self._n = 0  # of values in the buckets, with their sum, and the largest
        self._sum = 0.0
        self._max = -math.inf
        self._near = 0.0  # one of them, and the sum of their squared distances to it: for precision
        self._squares = 0.0

    def extend(self, values: Sequence[float]) -> None:
        if len(self.exact) < self._most:
            self.exact.extend(values)
        elif values:
            self._count(values)

    def place(self, row: int, value: float) -> None:
        """The value of the request of that row; NaN stands in the rows that have none."""
        if row < self._most:
            self.exact.extend(itertools.repeat(math.nan, row - len(self.exact)))
            self.exact.append(value)
        else:
            self._count((value,))

    def of_rows(self, rows: Iterable[int]) -> Iterator[float]:
        values = (self.exact[row] for row in rows if row < len(self.exact))
        return (value for value in values if value == value)

    def _count(self, values: Sequence[float]) -> None:
        self._near = self._near if self._n else values[0]
        bits = memoryview(array("f", values)).cast("B").cast("I")
        self._buckets.update(map(operator.rshift, bits, itertools.repeat(BUCKET_BITS)))
        self._n += len(values)
        self._sum += math.fsum(values)
        self._squares += math.dist(values, [self._near] * len(values)) ** 2
        self._max = max(self._max, max(values))

    def describe(self) -> Distribution:
        """Call it once, when nothing more comes: it counts what was kept, where there is more than that."""
        if not self._n:
            return describe(self.of_rows(range(len(self.exact))))
        for start in range(0, len(self.exact), 1 << 16):
            kept = list(self.of_rows(range(start, start + (1 << 16))))
            if kept:
                self._count(kept)
        self.exact = self.exact[:0]
        mean = self._sum / self._n
        deviation = math.sqrt(max(0.0, self._squares / self._n - (mean - self._near) ** 2))
        ordered = BucketValues(self._buckets, self._max)
        return Distribution(self._n, mean, deviation, self._max, *ranked(ordered))


class BucketValues(Sequence[float]):
    """The order statistics of counted buckets, each as the middle of its bucket and none above the maximum."""

    def __init__(self, buckets: Mapping[int, int], most: float) -> None:
        bits = array("I", [number << BUCKET_BITS | 1 << BUCKET_BITS - 1 for number in buckets])
        counted = sorted(zip(memoryview(bits).cast("B").cast("f"), buckets.values()))
        self._values = [min(most, value) for value, _ in counted]
        self._ends = list(itertools.accumulate(count for _, count in counted))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, at: Any) -> Any:
        return self._values[bisect.bisect_right(self._ends, at)]


def _one(value: Optional[float]) -> Sequence[float]:
    return () if value is None else (value,)


class Metric(NamedTuple):
    """One distribution: how the console names it, the stems of its keys in result files, and how to read it."""

    key: str
    label: str
    stems: tuple[str, ...]
    read: Callable[[Record], Sequence[float]]
    above: tuple[str, float] = ("", 0.0)  # has its line only where its mean is above this share of that metric's
    pooled: bool = False  # many values a request: not in the steady window


METRICS = (
    Metric("latency", "Latency (ms)", ("e2el_ms", "e2e_latency_ms", "latency_ms"), lambda r: _one(r.latency_ms)),
    Metric("ttft", "TTFT (ms)", ("ttft_ms",), lambda r: _one(r.ttft_ms)),
    Metric("visible", "First visible token (ms)", ("ttfv_ms",), lambda r: _one(r.visible_ms), ("ttft", 1.0001)),
    Metric("tpot", "TPOT (ms)", ("tpot_ms",), lambda r: _one(r.tpot_ms)),
    Metric("gap", "Chunk gap (ms)", ("itl_ms",), lambda r: r.reply.gaps_ms if r.ok else (), pooled=True),
    Metric("tail", "Tail (ms)", ("tail_ms",), lambda r: _one(r.tail_ms), ("latency", 0.01)),
    Metric("response", "Response time (ms)", ("response_ms",), lambda r: _one(r.response_ms)),
    Metric("late", "Late sends (ms)", ("late_send_ms",), lambda r: _one(r.late_ms)),
    Metric("e2e", "E2E (ms)", ("e2e_ms",), lambda r: _one(r.e2e_ms), ("latency", 1.01)),
    Metric("connect", "Connect (ms)", ("connect_ms",), lambda r: _one(r.connect_ms), ("latency", 0.01)),
    Metric("queue", "Client queue (ms)", ("client_queue_time_ms",), lambda r: _one(r.queue_ms if r.ok else None),
           ("latency", 0.01)),
    Metric("user_rate", "Tokens/s per user", ("tokens_per_s_per_user",), lambda r: _one(r.tokens_per_s)),
    Metric("output", "Output tokens", ("output_tokens",), lambda r: _one(r.reply.completion_tokens if r.ok else None)),
    Metric("prompt", "Prompt tokens", ("prompt_tokens",), lambda r: _one(r.reply.prompt_tokens if r.ok else None)),
)  # fmt: skip

METRIC = {metric.key: metric for metric in METRICS}
STREAMED_METRICS = ("ttft", "visible", "tpot", "gap", "tail")
MAIN_METRICS = ("latency", "ttft", "tpot")  # those of groups, and of the steady window beside the whole run
# What --goodput sets limits on, in vLLM's words -> key of the metric.
GOODPUT_NAMES = {"ttft": "ttft", "tpot": "tpot", "e2el": "latency", "latency": "latency"}


def within(record: Record, key: str, limit_ms: float) -> bool:
    """Whether a success keeps a limit, judged to the us, as the CSV has it.

    What was not measured keeps none; but a reply of one token has no TPOT that could exceed it.
    """
    values = METRIC[key].read(record)
    if not values:
        return key == "tpot" and (record.reply.completion_tokens or 0) <= 1
    return round(values[0], 3) <= limit_ms


# Sums over all records, whatever their fate: field of the record -> the tally's counter.
COUNTED = ("reads", "kernel_reads", "content_reads", "merged_reads", "reconnects", "syn_resent", "late_gaps")
# What requests are told apart by, and how many such groups are reported at most; with more there are none.
GROUPINGS: Mapping[str, tuple[Callable[[Record], Optional[str]], int]] = {
    "label": (lambda r: r.reply.label, 12),
    "server": (lambda r: r.reply.server, 256),
    "turn": (lambda r: None if r.reply.turn is None else str(r.reply.turn), 100),
}


class Span:
    """How many times there were, and the first and the last of them, in seconds."""

    def __init__(self) -> None:
        self.n, self.first, self.last = 0, math.inf, -math.inf

    def add(self, at_s: Optional[float]) -> None:
        if at_s is not None:
            self.n, self.first, self.last = self.n + 1, min(self.first, at_s), max(self.last, at_s)

    @property
    def per_s(self) -> Optional[float]:
        return (self.n - 1) / (self.last - self.first) if self.last > self.first else None


class GroupTally:
    """Requests that have something in common: how they ended, some samples, and the share of cached tokens."""

    def __init__(self) -> None:
        self.ok = self.errors = self.prompt_tokens = self.cached_tokens = self.cache_told = 0
        self.first_error = ""
        self._samples = {metric: Sample() for metric in METRICS if metric.key in MAIN_METRICS}

    def add(self, record: Record) -> None:
        for metric, sample in self._samples.items():
            sample.extend(metric.read(record))
        reply = record.reply
        self.ok += record.ok
        self.errors += not record.ok and not record.aborted
        self.first_error = self.first_error or record.error
        if record.ok and reply.cached_tokens is not None:
            self.cache_told += 1
            self.cached_tokens += reply.cached_tokens
            self.prompt_tokens += reply.prompt_tokens or 0

    def summary(self) -> GroupSummary:
        share = _rate(self.cached_tokens, self.prompt_tokens) if self.cache_told else None
        distributions = {metric.key: sample.describe() for metric, sample in self._samples.items()}
        return GroupSummary(self.ok, self.errors, self.first_error, share, distributions)


class Tally:
    """The running sums and samples of a run, fed one record at a time; keeps numbers, never replies.

    `own_tokens`: of each prompt that the run cycles through, its length and its shared prefix as the corpus says.
    `goodput`: limits in ms, by the metric's key.
    """

    def __init__(self, own_tokens: Sequence[int] = (), goodput: Optional[Mapping[str, float]] = None) -> None:
        self._own_tokens = own_tokens
        self._goodput = goodput or {}
        self.good: Counter[str] = Counter()
        self.sent_s, self.done_s = array("d"), array("d")  # of each row; NaN: it was not sent, did not succeed
        self.last_index = -1
        self.ok = self.errors = self.aborted = self.prompt_tokens = self.completion_tokens = 0
        self.arriving_tokens = 0  # of replies under way, for the progress line
        self.busy_s = 0.0
        self.first_sent_s = math.inf
        self.last_done_s = -math.inf
        self.due, self.issued = Span(), Span()  # due and sending times, whatever became of the requests
        self.counts: Counter[str] = Counter()
        self.finish_reasons: Counter[str] = Counter()
        self.first_error_s: Optional[float] = None
        self.server: Mapping[str, Any] = {}  # what the server said of itself, once it has
        self.samples = {metric.key: Sample() for metric in METRICS}
        self.groups: dict[str, dict[str, GroupTally]] = {name: {} for name in GROUPINGS}
        self._failures: dict[tuple[str, str], list[Any]] = {}

    def add(self, record: Record) -> None:
        row, self.last_index = len(self.sent_s), max(self.last_index, record.job.index)
        reply, sent_s, done_s = record.reply, record.sent_s, record.done_s  # worked out once: this is on every request
        self.sent_s.append(math.nan if sent_s is None else sent_s)
        self.done_s.append(done_s if record.ok and done_s is not None else math.nan)
        for metric in METRICS:
            values = metric.read(record)
            if values and metric.pooled:
                self.samples[metric.key].extend(values)
            elif values:
                self.samples[metric.key].place(row, values[0])
        for name in COUNTED:
            self.counts[name] += getattr(reply, name)
        self.counts["new_connections"] += bool(reply.new_connection)
        self.counts["late_read"] += reply.late_gaps > 0
        self.busy_s += (record.busy_ms or 0) / 1e3
        if reply.turn:  # of those begun, the turns yet to come
            self.counts["sessions"] += reply.turn == 1
            self.counts["unsent_turns"] += reply.later_turns if reply.turn == 1 else -1
        if reply.turn in (None, 1):  # a rate is that of sessions
            self.due.add(record.job.due_s)
            self.issued.add(sent_s)
            self.counts["held_back"] += record.held_back_ms > HELD_BACK_MS  # a session keeps its permit
        self._add_to_groups(record)
        if record.aborted:
            self.aborted += 1
            return
        if sent_s is not None and done_s is not None:
            self.first_sent_s = min(self.first_sent_s, sent_s)
            self.last_done_s = max(self.last_done_s, done_s)
        if record.ok:
            self._add_success(record)
        else:
            self._add_failure(record)

    def _add_to_groups(self, record: Record) -> None:
        for name, (read, most) in GROUPINGS.items():
            group, groups = read(record), self.groups[name]
            if group is not None and len(groups) <= most:
                if group not in groups:
                    groups[group] = GroupTally()
                groups[group].add(record)

    def _add_success(self, record: Record) -> None:
        reply = record.reply
        self.ok += 1
        self.prompt_tokens += reply.prompt_tokens or 0
        self.completion_tokens += reply.completion_tokens or 0
        self.finish_reasons[reply.finish_reason or "none"] += 1
        if self._goodput:
            kept = [key for key, limit_ms in self._goodput.items() if within(record, key, limit_ms)]
            self.good.update(kept + ["all"] * (len(kept) == len(self._goodput)))
        counts = self.counts
        counts["cached_tokens"] += reply.cached_tokens or 0
        counts["cache_told"] += reply.cached_tokens is not None
        if not reply.has_usage:
            counts["without_usage"] += 1
            counts["chunk_counted"] += reply.completion_tokens is not None
        elif reply.chunks and not reply.late_gaps:
            counts["gap_ends"] += len(reply.gaps_ms) + 1
            counts["chunked_tokens"] += reply.completion_tokens or 0
        if reply.chunks:
            counts["streams"] += 1
            counts["first_merged"] += reply.with_first > 0
            counts["with_first"] += reply.with_first
            counts["late_first"] += reply.first_ns is None
            counts["one_piece"] += reply.first_ns == reply.last_ns and (reply.completion_tokens or 0) > 1
        if self._own_tokens and reply.prompt_tokens:
            at = 2 * record.job.index % len(self._own_tokens)
            length, prefix = self._own_tokens[at : at + 2]
            if length:
                counts["corpus_tokens"] += length
                counts["corpus_counted"] += reply.prompt_tokens
                counts["prefix_tokens"] += prefix

    def _add_failure(self, record: Record) -> None:
        self.errors += 1
        if record.ended_s is not None and (self.first_error_s is None or record.ended_s < self.first_error_s):
            self.first_error_s = record.ended_s
        group = self._failures.setdefault((record.status, record.error_kind), [0, record.error])
        group[0] += 1

    @property
    def elapsed_s(self) -> float:
        return max(0.0, self.last_done_s - self.first_sent_s) if self.ok + self.errors else 0.0

    def first_error(self) -> str:
        return next((f"{kind}: {text}" for (_, kind), (_, text) in self._failures.items()), "no reply")

    def error_groups(self) -> list[ErrorGroup]:
        groups = [ErrorGroup(status, kind, n, text) for (status, kind), (n, text) in self._failures.items()]
        return sorted(groups, key=lambda group: -group.count)

    def steady(self, wave: int) -> Optional[Steady]:
        """The steady window of a run whose first `wave` requests were sent at once; None without one."""
        sent_s = self.sent_s[:EXACT_SAMPLES]
        done = {row: at for row, at in enumerate(self.done_s[:EXACT_SAMPLES]) if at == at}
        ends = sorted(done.values())
        if not 0 < wave < len(ends):
            return None
        start, end = ends[wave - 1], max(s for s in sent_s if s == s)
        rows = [row for row, at in enumerate(sent_s) if start <= at <= end]
        if len(rows) < 2 * wave:
            return None
        ended = [row for row, at in done.items() if start < at <= end]
        before = [row for row in done if sent_s[row] < start]
        third = (end - start) / 3
        thirds = ([row for row in rows if sent_s[row] < start + third], [r for r in rows if sent_s[r] >= end - third])
        return Steady(
            start_s=start,
            end_s=end,
            sent=len(rows),
            ok=len(ended),
            prompt_tokens=int(sum(self.samples["prompt"].of_rows(ended))),
            completion_tokens=int(sum(self.samples["output"].of_rows(ended))),
            distributions={key: describe(self.samples[key].of_rows(rows)) for key in METRIC if not METRIC[key].pooled},
            opening={key: describe(self.samples[key].of_rows(before)) for key in MAIN_METRICS},
            drifts=drifts(*({key: list(self.samples[key].of_rows(part)) for key in MAIN_METRICS} for part in thirds)),
        )

    def summary(self, wave: int = 0) -> Summary:
        """`wave`: how many requests were in flight at the start, for the steady window."""
        steady = self.steady(wave)  # before the samples are described, which may take their values
        names = [item.name for item in dataclasses.fields(Summary)]
        values: dict[str, Any] = {name: getattr(self, name, self.counts[name]) for name in names}
        values.update(
            distributions={key: sample.describe() for key, sample in self.samples.items()},
            error_groups=self.error_groups(),
            groups={
                name: {group: tally.summary() for group, tally in self.groups[name].items()}
                for name, (_, most) in GROUPINGS.items()
                if 0 < len(self.groups[name]) <= most
            },
            finish_reasons=dict(self.finish_reasons),
            good={key: self.good[key] for key in (*self._goodput, "all")} if self._goodput else {},
            steady=steady,
            due_rate=self.due.per_s,
            issued_rate=self.issued.per_s,
        )
        return Summary(**values)


def drifts(first: Mapping[str, Sequence[float]], last: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """By how much TPOT's and latency's means changed, as a share; only what is more than DRIFT and more than chance."""
    found = {}
    for key in ("latency", "tpot"):
        before, after = describe(first[key]), describe(last[key])
        if before.mean is None or after.mean is None or before.std is None or after.std is None or before.mean <= 0:
            continue
        error = math.sqrt(before.std**2 / before.n + after.std**2 / after.n)
        if abs(after.mean - before.mean) > max(DRIFT * before.mean, DRIFT_ERRORS * error):
            found[key] = after.mean / before.mean - 1
    return found


def knee(throughputs: Mapping[float, Optional[float]]) -> Optional[float]:
    """The last level at which throughput still grew by more than KNEE_GROWTH per doubling; None of fewer than three.

    >>> knee({1: 10.0, 2: 20.0, 4: 39.0, 8: 40.0})
    4
    """
    known = [(level, rate) for level, rate in sorted(throughputs.items()) if level > 0 and rate]
    last = None
    for (load, rate), (more, new) in zip(known, known[1:]):
        if (new / rate) ** (1 / math.log2(more / load)) - 1 > KNEE_GROWTH:
            last = more
    return last if len(throughputs) > 2 else None


def gaps_are_of_tokens(summary: Summary) -> bool:
    """Whether a gap may be called inter-token latency.

    The gaps lie between as many ends as there are tokens (within 1 %), and few of them came together.
    """
    tokens = summary.chunked_tokens
    alone = summary.merged_reads <= MERGED_LIMIT * summary.content_reads
    return tokens > 0 and alone and abs(summary.gap_ends - tokens) <= max(tokens * 0.01, 2 * summary.ok)


def percent(part: float, whole: float) -> float:
    return 100 * part / whole if whole else 0.0


def in_flight_mean(health: Sequence[Health]) -> float:
    """Requests sent and unanswered, on average over the time, as counted while they were."""
    return _rate(sum(h.in_flight_s for h in health), max((h.flight_window_s for h in health), default=0.0))


# --- figures: all numbers of a summary, by the flat keys of the JSON; --slo and --assert know them by these names ---

Fared = Sequence[Health]  # one entry per process


def _per(amount: float, whole: Optional[float]) -> Optional[float]:
    return amount / whole if whole else None


def _price(config: Config, per_s: float) -> Optional[float]:
    """Of a million such tokens, all GPUs' cost laid on them."""
    return config.gpu_hour * (config.gpus or 1) / 3600 / per_s * 1e6 if config.gpu_hour and per_s else None


def input_per_s(summary: Summary) -> float:
    return _rate(summary.prompt_tokens, summary.elapsed_s)


def _share_kept(key: str, summary: Summary, config: Config, health: Fared) -> Optional[float]:
    return _per(summary.good[key], summary.ok + summary.errors) if key in summary.good else None


FIGURES: Mapping[str, Callable[[Summary, Config, Fared], Optional[float]]] = {
    "num_prompts": lambda s, c, h: s.ok + s.errors,
    "max_concurrency": lambda s, c, h: c.concurrency,
    "completed": lambda s, c, h: s.ok,
    "failed": lambda s, c, h: s.errors,
    "aborted": lambda s, c, h: s.aborted,
    "not_sent": lambda s, c, h: max(0, (c.total_requests or 0) - s.ok - s.errors - s.aborted - s.unsent_turns),
    "error_rate": lambda s, c, h: s.error_share,
    "aborted_rate": lambda s, c, h: _rate(s.aborted, s.ok + s.errors + s.aborted),
    "duration": lambda s, c, h: s.elapsed_s,
    "total_input_tokens": lambda s, c, h: s.prompt_tokens,
    "total_output_tokens": lambda s, c, h: s.completion_tokens,
    "total_cached_tokens": lambda s, c, h: s.cached_tokens,
    "request_throughput": lambda s, c, h: s.requests_per_s,
    "request_goodput": lambda s, c, h: _rate(s.good["all"], s.elapsed_s) if s.good else None,
    "goodput_share": lambda s, c, h: _per(s.good.get("all", 0), s.ok + s.errors) if s.good else None,
    **{f"goodput_share_{name}": partial(_share_kept, key) for name, key in GOODPUT_NAMES.items() if name != "latency"},
    "input_throughput": lambda s, c, h: input_per_s(s),
    "output_throughput": lambda s, c, h: s.generated_per_s,
    "total_token_throughput": lambda s, c, h: s.total_per_s,
    "total_throughput": lambda s, c, h: s.total_per_s,
    "output_throughput_per_gpu": lambda s, c, h: _per(s.generated_per_s, c.gpus),
    "total_token_throughput_per_gpu": lambda s, c, h: _per(s.total_per_s, c.gpus),
    "price_per_million_input_tokens": lambda s, c, h: _price(c, input_per_s(s)),
    "price_per_million_output_tokens": lambda s, c, h: _price(c, s.generated_per_s),
    "concurrency": lambda s, c, h: in_flight_mean(h),
    "max_concurrent_requests": lambda s, c, h: sum(one.peak_in_flight for one in h),
    "concurrency_by_littles_law": lambda s, c, h: _rate(s.busy_s, max((one.flight_window_s for one in h), default=0.0)),
    "steady_duration": lambda s, c, h: s.steady.end_s - s.steady.start_s if s.steady else None,
    "steady_start_s": lambda s, c, h: s.steady.start_s if s.steady else None,
    "steady_requests": lambda s, c, h: s.steady.sent if s.steady else None,
    "steady_request_throughput": lambda s, c, h: s.steady.rates[0] if s.steady else None,
    "steady_output_throughput": lambda s, c, h: s.steady.rates[1] if s.steady else None,
    "steady_total_token_throughput": lambda s, c, h: s.steady.rates[2] if s.steady else None,
}


class Stat(NamedTuple):
    """One number of a distribution: which, of which metric, over the steady window or the whole run."""

    metric: str
    name: str  # mean, median, std, max, n, or a percentile as p99
    steady: bool

    def sample(self, summary: Summary) -> Distribution:
        whole = summary.steady.distributions if self.steady and summary.steady else summary.distributions
        return Distribution(0) if self.steady and not summary.steady else whole[self.metric]

    @property
    def rank(self) -> Optional[float]:
        if self.name == "median":
            return 50.0
        return float(self.name[1:]) if self.name[0] == "p" else None

    def of(self, sample: Distribution) -> Optional[float]:
        rank = self.rank
        value: Optional[float] = getattr(sample, self.name) if rank is None else sample.percentiles.get(rank)
        return value

    def interval(self, summary: Summary) -> Optional[tuple[float, float]]:
        """Where it lies with 95 % confidence; None where that is not known."""
        sample, rank = self.sample(summary), self.rank
        if rank is not None:
            return sample.intervals.get(rank)
        if self.name != "mean" or sample.mean is None or sample.std is None:
            return None
        error = NORMAL_95 * sample.std / math.sqrt(sample.n)
        return sample.mean - error, sample.mean + error


def _stats() -> Iterator[tuple[str, Stat]]:
    names = ("mean", "median", "std", "max", "n", *(f"p{rank:g}" for rank in PERCENTILES))
    for steady, metric, name in itertools.product((False, True), METRICS, names):
        for stem in metric.stems:
            if not (steady and metric.pooled):
                # Only durations end in `_ms`.
                key = f"{stem.removesuffix('_ms')}_count" if name == "n" else f"{name}_{stem}"
                yield f"{'steady_' if steady else ''}{key}", Stat(metric.key, name, steady)


STATS: Mapping[str, Stat] = dict(_stats())


def figure_of(name: str, summary: Summary, config: Config, health: Fared) -> Optional[float]:
    """A figure by its key, also one of the server's own; None where it was not measured."""
    if name in STATS:
        return STATS[name].of(STATS[name].sample(summary))
    value = FIGURES[name](summary, config, health) if name in FIGURES else summary.server.get(name)
    return value if isinstance(value, (int, float)) else None


OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    "<": float.__lt__, "<=": float.__le__, ">": float.__gt__, ">=": float.__ge__,
}  # fmt: skip


class Limit(NamedTuple):
    name: str
    operator: str
    bound: float

    @classmethod
    def of(cls, text: str) -> Limit:
        """Raises ValueError with the reason.

        >>> Limit.of("p99_ttft_ms<500")
        Limit(name='p99_ttft_ms', operator='<', bound=500.0)
        """
        match = re.fullmatch(r"\s*([\w.]+)\s*(<=?|>=?)\s*([-+]?[\d.]+(?:e[-+]?\d+)?)\s*", text, re.IGNORECASE)
        if not match:
            raise ValueError("takes a figure, <, <=, > or >=, and a number, as in p99_ttft_ms<500")
        names = [*FIGURES, *STATS]
        if match[1] not in names and not match[1].startswith(("server_", "gpu_")):
            nearest = ", ".join(difflib.get_close_matches(match[1], names, 4, 0.5)) or "output_throughput, p99_ttft_ms"
            raise ValueError(f"knows no figure {plain(match[1], 60)!r}; nearest: {nearest}")
        return cls(match[1], match[2], float(match[3]))

    def holds(self, value: Optional[float]) -> bool:
        return value is not None and OPERATORS[self.operator](float(value), self.bound)

    def __str__(self) -> str:
        return f"{self.name} {self.operator} {self.bound:g}"


class Judged(NamedTuple):
    """A limit beside what was measured. `sure`: the confidence interval lies wholly on one side of the limit."""

    limit: Limit
    value: Optional[float]
    sure: bool = True
    needed: Optional[float] = None  # times as many requests as there were would make it sure

    @property
    def holds(self) -> bool:
        return self.limit.holds(self.value)


def judge(limit: Limit, summary: Summary, config: Config, health: Fared) -> Judged:
    value = figure_of(limit.name, summary, config, health)
    interval = STATS[limit.name].interval(summary) if limit.name in STATS else None
    if value is None or interval is None:
        return Judged(limit, value)
    sides = [limit.holds(end) for end in interval]
    if sides[0] == sides[1]:
        return Judged(limit, value)
    end = interval[sides.index(not limit.holds(value))]  # the one on the other side of the limit
    if math.isinf(end):
        least = math.log(INTERVAL_TAIL) / math.log((STATS[limit.name].rank or 50.0) / 100)  # until there is such an end
        return Judged(limit, value, False, max(2.0, least / STATS[limit.name].sample(summary).n))
    off = abs(value - limit.bound)  # an interval shrinks with the square root of the number of requests
    return Judged(limit, value, False, (abs(end - value) / off) ** 2 if off else math.inf)


def limits_of(config: Config) -> list[Limit]:
    """Those of --slo, and that hardly any request fails (unless they speak of errors themselves) or is cut off."""
    limits = [Limit.of(text) for text in config.slo]
    if limits and not {"error_rate", "failed", "completed"} & {limit.name for limit in limits}:
        limits.append(Limit("error_rate", "<=", TELLING_ERROR_SHARE))
    if limits and config.grace is not None:  # what it cuts off may be what would have failed
        limits.append(Limit("aborted_rate", "<=", TELLING_ERROR_SHARE))
    return limits


# --- warnings that qualify the figures: each rule looks at the summary and returns one, or None ---


class ReportWarning(NamedTuple):
    """Something that makes a figure mean less than it seems to, and what the user can do about it."""

    text: str
    cure: str = ""


def _late_reads(summary: Summary, health: Sequence[Health]) -> Optional[str]:
    """What was left out, but for pauses too short to move a TTFT, and for chunks that come together anyway."""
    pause = max((h.lag_max_ms for h in health), default=0.0)
    firsts = summary.late_first if pause > LAG_SHARE * (summary.distributions["ttft"].mean or 0.0) else 0
    gaps = summary.distributions["gap"].n + summary.late_gaps
    share = max(_rate(firsts, summary.streams), _rate(summary.late_gaps, gaps))
    if share * (1 - _rate(summary.merged_reads, summary.content_reads)) < LATE_SHARE:
        return None
    return (
        f"it was held up (for {pause:.0f} ms at most) and read late what had come meanwhile, of {summary.late_read}"
        f" requests: {summary.late_first} TTFTs and {summary.late_gaps} gaps are left out"
    )


def _late_stamps(summary: Summary, health: Sequence[Health]) -> Optional[str]:
    """Without the kernel's clock a late event loop is a late stamp."""
    median = summary.distributions["latency"].percentiles.get(50.0)
    stamped = [h for h in health if not h.kernel_clock or summary.kernel_reads < 0.95 * summary.reads]
    lag = max((h.lag_p99_ms for h in stamped), default=0.0)
    held_up = max((_rate(h.held_up_s, h.wall_s) for h in stamped), default=0.0)
    if median is None or (lag < max(LAG_FLOOR_MS, LAG_SHARE * median) and held_up < HELD_UP_SHARE):
        return None
    longest = max(h.lag_max_ms for h in stamped)
    return f"its event loop ran {lag:.1f} ms late (p99; {longest:.0f} ms at most), and no kernel clock corrects that"


def _slow_to_send(summary: Summary, health: Sequence[Health]) -> Optional[str]:
    queue, service = summary.distributions["queue"].mean, summary.distributions["latency"].mean
    if queue is None or service is None or queue < max(CLIENT_DELAY_SHARE * service, CLIENT_DELAY_FLOOR_MS):
        return None
    return (
        f"it sent requests {queue:.1f} ms after it could have ({percent(queue, service):.0f} % of their latency of"
        f" {service:.1f} ms), so the server had less to do than was asked"
    )


# The two halves of the verdict: are the figures true? was the load what was asked?
CLIENT_RULES = {"figures": (_late_reads, _late_stamps), "load": (_slow_to_send,)}


def client_doubts(summary: Summary, health: Sequence[Health], half: str) -> list[str]:
    """What this client did to one half of the verdict; judged by effect, so an idle core proves nothing."""
    return [reason for rule in CLIENT_RULES[half] for reason in [rule(summary, health)] if reason]


def client_bound(summary: Summary, health: Sequence[Health]) -> Optional[str]:
    """Why the figures may be this client's and not the server's; None when they are the server's."""
    return "; ".join(reason for half in CLIENT_RULES for reason in client_doubts(summary, health, half)) or None


def _client_cure(health: Sequence[Health]) -> str:
    """By what kept the client: no core, too much work for one, or a stop from outside."""
    told = [h for h in health if h.wall_s > TELLING_RUN_S]
    cores = os.cpu_count() or 1
    cures = []
    waiting = max((h.waiting_s / h.wall_s for h in told), default=0.0)
    if waiting > WAITING_SHARE:
        cures.append(f"a core of its own for this client (it waited for one {waiting:.0%} of the time)")
    if max(((h.cpu_s + h.waiting_s) / h.wall_s for h in told), default=0.0) > CLIENT_BUSY_SHARE:
        if any("uvloop" not in h.transport and h.transport.startswith("stopwatch") for h in health):
            cures.append("pip install httptools uvloop")
        if len(health) < cores and waiting <= WAITING_SHARE:
            cures.append(f"--processes {min(cores, 2 * len(health))}")
    if not cures and max((h.lag_max_ms for h in health), default=0.0) > LONG_PAUSE_MS:
        cures.append("let nothing stop this client while it measures (Ctrl-Z, a debugger, a suspended machine)")
    return ", or ".join(cures) or "a machine with more free cores, or a lower --concurrency"


def _warn_client(summary: Summary, config: Config, health: Sequence[Health]) -> Optional[ReportWarning]:
    reason = client_bound(summary, health)
    return ReportWarning(f"client-bound: {reason}", _client_cure(health)) if reason else None


def _warn_cut_off(summary: Summary, config: Config, health: Sequence[Health]) -> Optional[ReportWarning]:
    total = summary.ok + summary.errors + summary.aborted
    if config.grace is None or summary.aborted <= TELLING_ERROR_SHARE * total:
        return None
    text = (
        f"{summary.aborted} of {total} requests were cut off or not sent at the end, perhaps the slowest: they are in"
    )
    return ReportWarning(f"{text} no latency and no rate", "a longer --grace")


def _warn_usage(summary: Summary, config: Config, health: Sequence[Health]) -> Optional[ReportWarning]:
    how = "counted by their content chunks" if summary.chunk_counted else "counted as 0 tokens"
    text = f"{summary.without_usage} replies carried no usage, or one of 0 tokens: {how}, prompts without a count as 0"
    cure = "a server that sends `usage`; Req/s and the latencies are right without it"
    return ReportWarning(text, cure) if summary.without_usage else None


def _warn_prompt_length(summary: Summary, config: Config, health: Sequence[Health]) -> Optional[ReportWarning]:
    counted, asked = summary.distributions["prompt"].mean, config.prompt_tokens
    calibration = calibration_of(config)
    if config.requests_file or counted is None:
        return None
    if abs(counted - asked) <= max(PROMPT_LENGTH_TOLERANCE * asked, calibration.tokens_per_word):
        return None
    cure = "a corpus by generate_requests.py, which counts with the model's own tokenizer"
    if not config.prompt_calibration:
        cure = "a warm-up of two requests or more, whose counts calibrate the prompts"
    elif asked < calibration.constant_tokens:
        least = math.ceil(calibration.constant_tokens)
        cure = f"--prompt-tokens {least} or more: template, system prompt and a unique start take so many"
    text = f"the server counted {counted:.1f} prompt tokens on average, --prompt-tokens asked for {asked}"
    return ReportWarning(text, cure)


def _warn_short_replies(summary: Summary, config: Config, health: Sequence[Health]) -> Optional[ReportWarning]:
    mean = summary.distributions["output"].mean
    if config.requests_file or mean is None or mean >= 0.95 * config.output_tokens:
        return None
    text = f"replies of {mean:.1f} tokens on average, {config.output_tokens} allowed: the model ended them itself"
    return ReportWarning(text, """--extra-body '{"ignore_eos": true}' fixes the length (vLLM, SGLang)""")


def _warn_cache(summary: Summary, config: Config, health: Sequence[Health]) -> Optional[ReportWarning]:
    server = summary.server.get("server_prefix_cache_hit_rate")
    if summary.sessions:  # whose histories are cached on purpose
        text = "the server does not say how much of the sessions' histories it had cached"
        told = summary.cache_told or server is not None
        return None if told else ReportWarning(text, "vLLM tells with --enable-prompt-tokens-details")
    cached = max(summary.cached_tokens, (server or 0.0) * summary.prompt_tokens)
    template = 0.0 if config.requests_file else summary.ok * calibration_of(config).constant_tokens
    hit = percent(max(0.0, cached - template), summary.prompt_tokens)
    shared = percent(summary.prefix_tokens, summary.corpus_tokens)
    if hit < 1 and not summary.cache_told and server is None and shared >= 1:
        text = f"these prompts share {shared:.0f} % of their tokens; the server does not say how much it had cached"
        cure = "vLLM tells with --enable-prompt-tokens-details; or a corpus without a shared prefix"
        return ReportWarning(text, f"{cure}, if the cache is not what is to be measured")
    if hit < 1 or (shared >= 1 and hit <= shared + HIT_TOLERANCE):  # a corpus made to be found in the cache
        return None
    text = (
        f"{hit:.1f} % of the prompt tokens came from the server's prefix cache: these figures do not show their prefill"
    )
    cure = "send every prompt of the corpus once only" if config.requests_file else "leave out --seed"
    return ReportWarning(text, f"{cure}, or switch the server's prefix cache off")


def _warn_others(summary: Summary, config: Config, health: Sequence[Health]) -> Optional[ReportWarning]:
    """Where every request was served and counted, the server has counted the same."""
    kinds = (("prompt", summary.prompt_tokens), ("generated", summary.completion_tokens))
    both = [(summary.server.get(f"server_{kind}_tokens", ours), ours, kind) for kind, ours in kinds]
    off = [f"{theirs} {kind} tokens where this client counted {ours}" for theirs, ours, kind in both if theirs != ours]
    if not off or summary.errors + summary.aborted + summary.without_usage:
        return None
    text = f"the server has counted {' and '.join(off)}"
    if all(theirs >= ours for theirs, ours, _ in both):
        return ReportWarning(f"{text}: somebody else used it meanwhile", "a server that nobody else uses")
    cure = "--server-metrics with the page of each replica, or off"
    return ReportWarning(f"{text}: not every request went to the server whose figures were read", cure)


def _warn_server_queue(summary: Summary, config: Config, health: Sequence[Health]) -> Optional[ReportWarning]:
    server = summary.server
    waited, latency = server.get("server_mean_queue_ms"), server.get("server_mean_e2el_ms")
    waiting, running = (server.get(f"server_{name}_mean", 0.0) for name in ("waiting", "running"))
    share = _rate(waiting, waiting + running) if waited is None or latency is None else _rate(waited, latency)
    step = server.get("server_mean_itl_ms", server.get("server_mean_tpot_ms", 0.0))  # all requests wait for its end
    if share < SERVER_QUEUE_SHARE or (waited or math.inf) < step:
        return None
    text = f"requests waited in the server's queue: {waited:.1f} ms on average" if waited is not None else "it queued"
    if waiting:
        text += f", {waiting:.1f} waiting beside {running:.1f} running"
    return ReportWarning(f"the server queues: {text}", "a lower concurrency or rate; or read TTFT as queueing")


def _warn_kv_cache(summary: Summary, config: Config, health: Sequence[Health]) -> Optional[ReportWarning]:
    preempted, full = summary.server.get("server_preemptions", 0), summary.server.get("server_kv_cache_peak", 0.0)
    if not preempted and full < KV_CACHE_FULL:
        return None
    what = f"the server's KV cache was {full:.0%} full at its peak" if full else "the server's KV cache was full"
    text = f"{what}, {preempted} preemptions: what was preempted is computed again, within TPOT and latency"
    return ReportWarning(text, "a lower concurrency, shorter requests, or more memory for the KV cache")


def _warn_corpus(summary: Summary, config: Config, health: Sequence[Health]) -> Optional[ReportWarning]:
    off = _rate(summary.corpus_counted, summary.corpus_tokens)
    if not off or abs(off - 1) <= CORPUS_TOLERANCE:
        return None
    text = (
        f"the server counted {summary.corpus_counted} prompt tokens where the corpus says {summary.corpus_tokens}"
        f" ({100 * (off - 1):+.1f} %): a chat template or a system prompt was added, or the tokenizer is another"
    )
    return ReportWarning(text, "a corpus made for this endpoint, with the model's own tokenizer (generate_requests.py)")


def merged_figures(summary: Summary) -> list[str]:
    """The figures that chunks which came together have bent by more than MERGED_LIMIT.

    A first token that k later ones came with is late by about k TPOT, and TPOT's span is too short by as much.
    """
    ttft, tpot, output = (summary.distributions[key].mean or 0.0 for key in ("ttft", "tpot", "output"))
    ahead = _rate(summary.with_first, summary.streams)
    unseen = min(1.0, ahead / max(1.0, output - 1))  # share of the steps from token to token
    bent = {
        "TTFT": ahead and ahead * tpot >= MERGED_LIMIT * ttft * (1 - unseen),
        "TPOT": unseen > MERGED_LIMIT,
        "the chunk gaps": summary.merged_reads > MERGED_LIMIT * summary.content_reads,
    }
    return [name for name, is_bent in bent.items() if is_bent]


def _warn_merged(summary: Summary, config: Config, health: Sequence[Health]) -> Optional[ReportWarning]:
    figures = merged_figures(summary)
    if not figures:
        return None
    merged, first = percent(summary.merged_reads, summary.content_reads), percent(summary.first_merged, summary.streams)
    text = (
        f"{merged:.1f} % of the reads held several chunks, and {first:.1f} % of the first tokens came with later"
        f" ones: {', '.join(figures)} are those of packets, not of tokens"
    )
    cure = "where a proxy holds them back: `option http-no-delay` (HAProxy), `proxy_buffering off` (nginx)"
    return ReportWarning(text, f"{cure}; else the server sends them so" + ("" if "TPOT" in figures else "; read TPOT"))


def _warn_servers(summary: Summary, config: Config, health: Sequence[Health]) -> Optional[ReportWarning]:
    dead = [(name, got) for name, got in summary.groups.get("server", {}).items() if got.errors and not got.ok]
    said = "; ".join(f"{name}: {got.errors} requests, none answered: {got.first_error}" for name, got in dead)
    cure = "mend it, or leave its --api-base out: every figure is of the others alone"
    return ReportWarning(said, cure) if dead else None


def error_warning(summary: Summary) -> Optional[ReportWarning]:
    """The first line of a report whose run failed in part; None for a share of errors that changes no figure."""
    if summary.error_share <= TELLING_ERROR_SHARE:
        return None
    first = "" if summary.first_error_s is None else f", the first {summary.first_error_s:.3f} s after the start"
    total = summary.ok + summary.errors
    return ReportWarning(
        f"{summary.errors} of {total} requests failed ({percent(summary.errors, total):.1f} %){first}:"
        " the rates above are successes over the whole time, the latencies those of successes"
    )


def _warn_drift(summary: Summary, config: Config, health: Sequence[Health]) -> Optional[ReportWarning]:
    if not summary.steady or not summary.steady.drifts:
        return None
    moved = [f"{METRIC[key].label.partition(' (')[0]} {by:+.0%}" for key, by in summary.steady.drifts.items()]
    text = f"from the first to the last third of the steady window the means moved: {', '.join(moved)}"
    return ReportWarning(text, "a longer --warmup or run, or a load that the server can take for ever")


# Counts that are 0 in a good run: field of the summary -> what one that is not says.
COUNT_WARNINGS = {
    "held_back": ReportWarning(
        "--concurrency {concurrency} held the schedule back: {n} requests were due before a permit was free (sent up to"
        " {late:.0f} ms late), so the server had less to do than was asked",
        "read the response time, which counts from the due time; or no --concurrency, no cap",
    ),
    "one_piece": ReportWarning(
        "{n} replies of several tokens came all at once: they have no TPOT",
        "read the latency; a server or proxy that streams token by token gives the rest",
    ),
    "syn_resent": ReportWarning(
        "the first packet of connections had to be repeated {n} times, 1, 3, 7 s later: the server's listen queue was"
        " full, or the network lost it (connect_ms; in no latency)",
        "a longer listen queue there (its backlog, net.core.somaxconn), or kept connections",
    ),
    "reconnects": ReportWarning(
        "{n} requests were sent anew: the server had closed the kept connection",
        "a longer keep-alive time-out on the server (uvicorn: --timeout-keep-alive)",
    ),
}


def _warn_count(field: str, summary: Summary, config: Config, health: Fared) -> Optional[ReportWarning]:
    count, warning = getattr(summary, field), COUNT_WARNINGS[field]
    late = summary.distributions["late"].max or 0.0
    text = warning.text.format(n=count, concurrency=config.concurrency, late=late)
    return warning._replace(text=text) if count else None


WARNINGS: Sequence[Callable[[Summary, Config, Fared], Optional[ReportWarning]]] = (
    _warn_client, _warn_drift, partial(_warn_count, "held_back"), _warn_cut_off, _warn_servers, _warn_usage,
    _warn_prompt_length, _warn_short_replies, _warn_corpus, _warn_cache, _warn_others, _warn_server_queue,
    _warn_kv_cache, _warn_merged, *(partial(_warn_count, name) for name in ("one_piece", "syn_resent", "reconnects")),
)  # fmt: skip


def warnings_of(summary: Summary, config: Config, health: Sequence[Health]) -> list[ReportWarning]:
    found = (rule(summary, config, health) for rule in WARNINGS)
    return [warning for warning in found if warning]


# === 7. Text (pure) ===

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
        from_environ = [line.partition(":") for line in environ.get("OPENAI_CUSTOM_HEADERS", "").splitlines()]
        named = [value for name, value in config.headers.items() if not is_harmless(name, value)]
        cls.fields([config.extra_body, {name: value.strip() for name, _, value in from_environ}], found=named)
        proxies = [f"//{value.rpartition('//')[2]}" for name, value in environ.items() if name.lower()[-6:] == "_proxy"]
        urls = [config.api_base, *config.servers, *(config.server_metrics or []), *proxies]
        logins = [login for url in urls for raw in _LOGIN.findall(url) for login in (raw, unquote(raw))]
        basic = [base64.b64encode(login.encode()).decode() for login in logins]
        queries = [text for url in urls for _, name, text in _QUERY.findall(url) if _SECRET_NAME.search(name)]
        ends = [login.partition(":")[2] for login in logins] + [value.rpartition(" ")[2] for value in named]
        return cls([config.api_key, *logins, *basic, *queries, *map(unquote, queries), *named, *ends])

    def text(self, text: str) -> str:
        """Any text, a server's words above all, with every secret blanked, also one that is cut off at the end.

        >>> Redactor(["sk-1234567890"]).text("no key sk-1234567890, nor sk-1234567")
        'no key ***, nor ***'
        """
        text = self._replaced(text)
        for word in self._words:
            lengths = range(min(len(word), len(text)), LEAST_SECRET_CHARS - 1, -1)
            cut = next((length for length in lengths if text.endswith(word[:length])), 0)
            text = f"{text[:-cut]}***" if cut else text
        return text

    def _replaced(self, text: str) -> str:
        for word in self._words:
            text = text.replace(word, "***")
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
            elif option == "--header":
                header, said = split_header(text)
                text = f"{header}: {said if is_harmless(header, said) else '***'}"
            elif option == "--extra-body":
                with contextlib.suppress(ValueError):
                    text = json.dumps(self.fields(json.loads(text)))
            masked.append(self._replaced(self.url(f"{name}={text}" if equals else text)))
        return masked

    @staticmethod
    def config(config: Config) -> dict[str, Any]:
        options = {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
        return {
            **{name: "inf" if value == math.inf else value for name, value in options.items()},  # JSON has no infinity
            "api_base": Redactor.url(config.api_base),
            "servers": [Redactor.url(url) for url in config.servers] if len(config.servers) > 1 else None,
            "api_key": config.api_key if config.api_key in PLAIN_KEYS else "***",
            "headers": {name: v if is_harmless(name, v) else "***" for name, v in config.headers.items()} or None,
            "extra_body": Redactor.fields(config.extra_body),
            "server_metrics": config.server_metrics and [Redactor.url(url) for url in config.server_metrics],
        }


HARMLESS_HEADERS = ("accept", "accept-language", "openai-beta", "user-agent")


def is_harmless(name: str, value: str) -> bool:
    """Whether a header may be shown: by its name, or because its value is too short to keep anybody out."""
    plain_value = len(value) < LEAST_SECRET_CHARS or value in ("true", "false", *PLAIN_KEYS)
    return plain_value or name.lower() in HARMLESS_HEADERS


def split_header(text: str) -> tuple[str, str]:
    """
    >>> split_header("api-key: abc"), split_header("X-Tier=a:b")
    (('Api-Key', 'abc'), ('X-Tier', 'a:b'))
    """
    name, _, value = re.split("([:=])", text, maxsplit=1) if re.search("[:=]", text) else ("", "", "")
    return "-".join(part.capitalize() for part in name.strip().split("-")), value.strip()


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


def split_query(url: str) -> tuple[str, str]:
    """(the URL without its query, the query)

    >>> split_query("http://host:1/v1?api-version=2")
    ('http://host:1/v1', 'api-version=2')
    """
    parts = urlsplit(url)
    return urlunsplit(parts._replace(query="", fragment="")), parts.query


def _line_length(text: str) -> int:
    """How many characters of this text fit a line of the report; Chinese and Japanese ones take two columns."""
    return REPORT_COLUMNS if max(text, default="") < "\u1100" else REPORT_COLUMNS // 2


def shortened(text: str) -> str:
    return text if len(text) <= _line_length(text) else f"{text[: _line_length(text) - 3]}..."


def wrapped(text: str, indent: int) -> list[str]:
    """The text in lines of the report, the second and later ones indented."""
    return textwrap.wrap(text, _line_length(text), subsequent_indent=" " * indent, break_on_hyphens=False)


class Goal(NamedTuple):
    """When a run is done: after so many requests, or after so many seconds."""

    requests: Optional[int]
    seconds: Optional[float] = None

    def reached(self, done: int, elapsed_s: float) -> tuple[str, str, str]:
        """How far it is, in long and in short, and the time that is left; by the time where there is a limit to it."""
        total, seconds = self.requests or 0, self.seconds
        if seconds is not None:
            short = f"{done} in {elapsed_s:.0f}/{seconds:g}s"
            left = f"ETA: {max(0.0, seconds - elapsed_s):5.1f}s"
            return f"{short} ({min(100.0, percent(elapsed_s, seconds)):.1f}%)", short, left
        left = f"ETA: {elapsed_s / done * (total - done):5.1f}s" if done else "ETA: -"
        return f"{done}/{total} ({percent(done, total):.1f}%)", f"{done}/{total}", left


def progress_line(tally: Tally, goal: Goal, elapsed_s: float, columns: float = math.inf) -> str:
    """How far the run is, in the longest form that fits; errors and remaining time stand in each of them."""
    share, short, eta = goal.reached(tally.ok + tally.errors + tally.aborted, elapsed_s)
    requests = f"RPS(avg): {_rate(tally.ok, elapsed_s):.2f}"
    out = tally.completion_tokens + tally.arriving_tokens
    generated = f"Gen tok/s: {_rate(out, elapsed_s):.2f}"
    tokens = f"Total tok/s: {_rate(tally.prompt_tokens + out, elapsed_s):.2f}"
    end = f"Errors: {tally.errors} | {eta}"
    forms = (
        f"Progress: {share} | {requests} | {generated} | {tokens} | {end}",
        f"{share} | {requests} | {generated} | {end}",
        f"{share} | {end}",
        f"{short} | {end}",
    )
    return next((form for form in forms if len(form) <= columns), f"{tally.errors} err, {eta}")


def _ms(value: Optional[float]) -> str:
    return "-" if value is None else f"{value:.1f} ms"


def summary_block(summary: Summary, concurrency: Optional[int]) -> str:
    """The seven lines that scripts read."""
    latency = summary.distributions["latency"]
    return (
        f"Requests (ok/err): {summary.ok}/{summary.errors}  Concurrency: {concurrency or 'unlimited'}"
        f"  Elapsed: {summary.elapsed_s:.3f}s\n"
        f"Req/s: {summary.requests_per_s:.2f}\n"
        f"Generated tokens/s: {summary.generated_per_s:.2f}\n"
        f"Total tokens/s (in+out): {summary.total_per_s:.2f}\n"
        f"p50 latency: {_ms(latency.percentiles.get(50.0))}\n"
        f"p95 latency: {_ms(latency.percentiles.get(95.0))}\n"
        f"Avg latency: {_ms(latency.mean)}"
    )


def detail_blocks(
    summary: Summary, config: Config, health: Sequence[Health], notices: Sequence[ReportWarning] = (), truth: str = ""
) -> list[list[str]]:
    """What stands between the seven lines and the configuration: warnings, verdict, judging; table, circumstances.

    `notices`: warnings about the run itself, before those about its figures. `truth`: the demo's own line.
    """
    warnings = [line for item in (*notices, *warnings_of(summary, config, health)) for line in warning_lines(item)]
    verdict = [*wrapped(truth, 0), *wrapped(verdict_line(summary, health), 0)]
    judging = [part for line in judging_lines(summary, config, health) for part in wrapped(line, 4)]
    tables = [*distribution_table(summary), *(["", *interval_table(summary)] if config.verbose else [])]
    groups = [group_table(name, groups) for name, groups in summary.groups.items() if len(groups) > 1]
    how = [*circumstances(summary, config, health), *corpus_line(config.corpus)]
    return [warnings, verdict, judging, tables, *groups, how]


JUDGED_BLOCKS = 3  # of those before the table: of a sweep's levels only they are printed


def joined(blocks: Iterable[Sequence[str]]) -> list[str]:
    """The lines of these blocks, an empty one between any two."""
    return "\n\n".join("\n".join(block) for block in blocks if block).split("\n")


def warning_lines(warning: ReportWarning) -> list[str]:
    indent = len("WARNING: ")
    cure = wrapped(f"{'':{indent}}Cure: {plain(warning.cure)}", indent) if warning.cure else []
    return [*wrapped(f"WARNING: {plain(warning.text, 400)}", indent), *cure]


def verdict_line(summary: Summary, health: Sequence[Health]) -> str:
    """In one sentence: are the figures true, and was the load what was asked?"""
    if not health or not summary.ok:
        return ""
    late, slow = (client_doubts(summary, health, half) for half in ("figures", "load"))
    if late or slow:
        figures = "some of these figures are this client's" if late else "the figures are the server's"
        return f"Verdict: client-bound: {figures}, the load was {'less than' if slow else 'what was'} asked."
    cpu = max(percent(h.cpu_s, h.wall_s) for h in health)
    merged = merged_figures(summary)
    if merged:
        figures = ", ".join(merged)
        return f"Verdict: this client was not the bottleneck (CPU {cpu:.0f} %); {figures}: of packets, not of tokens."
    if not summary.kernel_reads:
        return f"Verdict: this client kept up (CPU {cpu:.0f} %); arrivals were stamped when read, not by the kernel."
    kernel = percent(summary.kernel_reads, summary.reads)
    return f"Verdict: this client was not the bottleneck (CPU {cpu:.0f} %, kernel clock {kernel:.3g} %)."


def judging_lines(summary: Summary, config: Config, health: Fared) -> list[str]:
    """What was asked of the figures, each limit with its verdict; goodput; what a GPU gave, and what it cost."""
    asked = [*(("Assert", Limit.of(text)) for text in config.asserts), *(("SLO", one) for one in limits_of(config))]
    lines = [judged_line(name, judge(limit, summary, config, health), config) for name, limit in asked]
    ended = summary.ok + summary.errors
    if config.goodput:
        shares = [(key, limit, percent(summary.good[key], ended)) for key, limit in config.goodput.items()]
        kept = ", ".join(f"{_short_label(METRIC[key])} <= {limit:g} ms {part:.1f} %" for key, limit, part in shares)
        rate, share_kept = _rate(summary.good["all"], summary.elapsed_s), percent(summary.good["all"], ended)
        lines.append(f"Goodput: {rate:.2f} req/s, {share_kept:.1f} % of the requests kept all limits ({kept})")
    if config.gpus:
        user = summary.distributions["user_rate"].percentiles.get(50.0)
        line = f"Per GPU: {summary.generated_per_s / config.gpus:.2f} generated tokens/s; a user gets {_figure(user)}"
        lines.append(f"{line} (p50)")
    prices = [_price(config, rate) for rate in (input_per_s(summary), summary.generated_per_s)]
    if config.gpu_hour:
        told = " of input, ".join("-" if price is None else f"{price:.4g}" for price in prices)
        lines.append(f"Price of a million tokens, the whole cost laid on them: {told} of output")
    return lines


def judged_line(name: str, judged: Judged, config: Config) -> str:
    verdict = "holds" if judged.holds else "FAILS"
    if judged.value is None:
        return f"{name}: {judged.limit}: {verdict}: it was not measured ({why_unmeasured(judged.limit.name, config)})"
    chance = "" if judged.sure else "; chance could turn that: the limit is within the 95 % confidence interval"
    return f"{name}: {judged.limit}: {verdict} ({judged.value:.6g}{chance})"


def why_unmeasured(name: str, config: Config) -> str:
    stat = STATS.get(name)
    if stat and stat.metric in STREAMED_METRICS and not config.stream:
        return "it takes --stream"
    if name.startswith("steady_"):
        return "there was no steady state"
    options = {"goodput": "--goodput", "per_gpu": "--gpus", "price": "--gpu-hour", "response": "--request-rate"}
    option = next((option for part, option in options.items() if part in name), "")
    return f"it takes {option}" if option else "no reply told it"


def _short_label(metric: Metric) -> str:
    """As within a sentence: TTFT, latency."""
    name = metric.label.partition(" (")[0]
    return name if name[1:2].isupper() else f"{name[:1].lower()}{name[1:]}"


def figure_words(name: str) -> tuple[str, str]:
    """(what a figure is called in a sentence, its unit)

    >>> figure_words("p99_ttft_ms"), figure_words("steady_mean_latency_ms"), figure_words("error_rate")
    (('p99 TTFT', ' ms'), ('steady mean latency', ' ms'), ('error rate', ''))
    """
    if name not in STATS:
        return name.replace("_", " "), ""
    stat = STATS[name]
    metric = METRIC[stat.metric]
    return f"{'steady ' * stat.steady}{stat.name} {_short_label(metric)}", " ms" * metric.label.endswith("(ms)")


# --- several points: a table with a line for each level, and what it shows in words ---


# figure -> the two lines of its heading
SWEEP_COLUMNS = {
    "request_throughput": ("req/s", ""), "output_throughput": ("out", "tok/s"),
    "median_tokens_per_s_per_user": ("tok/s", "/user"),
    "p50_ttft_ms": ("TTFT", "p50"), "p99_ttft_ms": ("TTFT", "p99"),
    "p50_tpot_ms": ("TPOT", "p50"), "p99_tpot_ms": ("TPOT", "p99"),
    "p50_latency_ms": ("latency", "p50"), "p95_latency_ms": ("latency", "p95"), "p99_latency_ms": ("latency", "p99"),
}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """One measured point: what a table and a verdict need of it."""

    level: float
    repeat: int
    config: Config
    summary: Summary
    health: Fared
    complete: bool = True  # False: a stop cut it short

    @property
    def values(self) -> tuple[Summary, Config, Fared]:
        return self.summary, self.config, self.health

    def figure(self, name: str) -> Optional[float]:
        return figure_of(name, *self.values)

    @property
    def client_bound(self) -> bool:
        return client_bound(self.summary, self.health) is not None


class Level:
    """The points of one level: its figures are their medians."""

    def __init__(self, points: Sequence[Measured], limits: Sequence[Limit], needed: float = 1.0) -> None:
        """`needed`: how many times as many requests it takes to be sure of the verdict."""
        self.points = points
        self.level = points[0].level
        self.needed = needed
        self.failed = [limit for limit in limits if not limit.holds(self.figure(limit.name))]
        self.resolved = needed <= 1 and all(point.complete for point in points)
        self.holds = self.resolved and not self.failed

    def values(self, name: str) -> list[float]:
        return sorted(value for value in (point.figure(name) for point in self.points) if value is not None)

    def figure(self, name: str) -> Optional[float]:
        values = self.values(name)
        return percentile(values, 50) if values else None

    def cell(self, name: str) -> str:
        starred = name in STATS and any(few(STATS[name].sample(p.summary), STATS[name].rank) for p in self.points)
        return brief(self.figure(name)) + "*" * (starred and bool(self.values(name)))

    def verdict(self, knee_level: Optional[float]) -> str:
        words = ["client-bound"] if any(point.client_bound for point in self.points) else []
        words += ["knee"] if self.level == knee_level else []
        words += [] if all(point.complete for point in self.points) else ["interrupted"]
        if self.points[0].config.slo and self.resolved:
            words += [f"fails {limit.name}" for limit in self.failed] or ["holds"]
        elif self.points[0].config.slo:
            words.append(f"seems to {'fail' if self.failed else 'hold'}")
        return ", ".join(words)


def levels_of(points: Iterable[Measured]) -> list[list[Measured]]:
    groups: dict[float, list[Measured]] = {}
    for point in points:
        groups.setdefault(point.level, []).append(point)
    return [groups[level] for level in sorted(groups)]


def brief(value: Optional[float]) -> str:
    """About four digits of a figure.

    >>> brief(1234.5), brief(123.45), brief(1.2345)
    ('1234', '123.5', '1.23')
    """
    return "-" if value is None else f"{value:.{0 if value >= 1000 else 1 if value >= 100 else 2}f}"


def undisturbed(levels: Sequence[Level]) -> list[Level]:
    """Those measured to their end, with hardly a failure: others do not show how throughput grows."""
    return [
        level
        for level in levels
        if all(point.complete and point.summary.error_share <= TELLING_ERROR_SHARE for point in level.points)
    ]


def sweep_knee(levels: Sequence[Level]) -> Optional[float]:
    """By generated tokens/s, or by requests/s where nobody counted tokens."""
    tokens = any(level.figure("output_throughput") for level in levels)
    name = "output_throughput" if tokens else "request_throughput"
    return knee({level.level: level.figure(name) for level in undisturbed(levels)})


def sweep_table(levels: Sequence[Level], unit: str, bend: Optional[float] = None) -> list[str]:
    """A line for each level; with repetitions its median, and the least and the greatest below. `bend`: the knee."""
    figures = [name for name in SWEEP_COLUMNS if any(level.values(name) for level in levels)]
    heads, below = ([SWEEP_COLUMNS[name][line] for name in figures] for line in (0, 1))
    rows = [[unit, *heads, "errors"], ["", *below, ""]]
    ends = ["verdict", ""]
    for level in levels:
        errors = sum(point.summary.errors for point in level.points)
        rows.append([f"{level.level:g}", *map(level.cell, figures), str(errors)])
        ends.append(level.verdict(None if bend is None or bend == undisturbed(levels)[-1].level else bend))
        for name, pick in (("min", 0), ("max", -1)) if len(level.points) > 1 else ():
            extremes = [values[pick] if values else None for values in map(level.values, figures)]
            rows.append([f"  {name}", *map(brief, extremes), ""])
            ends.append("")
    starred = any(cell.endswith("*") for row in rows for cell in row)
    note = ["* too few values for that percentile: more --requests-per-slot, or --total-requests"] * starred
    return [*(f"{row}  {end}".rstrip() for row, end in zip(table(rows), ends)), *note]


def sweep_sentences(levels: Sequence[Level], unit: str, bend: Optional[float]) -> list[str]:
    """The knee, and where this client was the limit."""
    lines = []
    if bend is not None and bend == undisturbed(levels)[-1].level:
        lines.append(f"No knee: at {bend:g} {unit} throughput still grew by more than {KNEE_GROWTH:.0%} per doubling")
    elif bend is None and len(undisturbed(levels)) > 2 and not levels[0].points[0].config.find_max:
        lines.append(f"No knee: nowhere did throughput grow by more than {KNEE_GROWTH:.0%} per doubling")
    elif bend is not None:
        lines.append(f"Knee: {bend:g} {unit}; beyond it throughput grows by less than {KNEE_GROWTH:.0%} per doubling")
    bound = [f"{level.level:g}" for level in levels if any(point.client_bound for point in level.points)]
    if bound:
        lines.append(f"At {', '.join(bound)} {unit} this client, not the server, was the limit")
    return lines


def capacity_sentence(levels: Sequence[Level], limits: Sequence[Limit], unit: str) -> str:
    """The highest level that holds the limits, and what is above it."""
    named = [(limit, *figure_words(limit.name)) for limit in limits]
    wanted = " and ".join(f"{called} {limit.operator} {limit.bound:g}{suffix}" for limit, called, suffix in named)
    best = next((level for level in reversed(levels) if level.holds), None)
    above = [level for level in levels if not level.holds and (best is None or level.level > best.level)]
    unsure, failing = ([level for level in above if level.resolved is told] for told in (False, True))
    ends = [*map(_why_unsure, unsure[-1:]), *map(_why_not, failing[:1])]
    if best is None:
        return "; ".join([f"no level {'is sure to hold' if unsure else 'holds'} {wanted}", *ends])
    holes = [f"{level.level:g}" for level in levels if level.resolved and not level.holds and level.level < best.level]
    but = f" (though {', '.join(holes)} did not)" if holes else ""
    rates = f"{brief(best.figure('request_throughput'))} req/s, {best.figure('output_throughput') or 0:,.0f} tok/s"
    told = f"up to {best.level:g} {unit} ({rates}) hold {wanted}{but}"
    return "; ".join([told, *(ends or [f"{best.level:g} is the highest that was tried"])])


def _why_unsure(level: Level) -> str:
    made = level.points[-1].summary.ok + level.points[-1].summary.errors
    if level.needed > 1 and any(point.client_bound for point in level.points):
        return f"{level.level:g} is unresolved, this client was the limit there"
    needs = f"needs about {made * level.needed:,.0f} requests" if 1 < level.needed < math.inf else "was not finished"
    return f"{level.level:g} is unresolved, it {needs}"


def _why_not(level: Level) -> str:
    told = []
    for limit in level.failed:
        (called, unit), value = figure_words(limit.name), level.figure(limit.name)
        told.append(f"{called} is {'not measured' if value is None else f'{value:.4g}{unit}'}")
    return f"at {level.level:g} {' and '.join(told)}"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell: the first to the left, the others to the right."""
    first, *widths = (max(map(len, column)) for column in zip(*rows))
    cells = ([row[0].ljust(first), *map(str.rjust, row[1:], widths)] for row in rows)
    return ["  ".join(line).rstrip() for line in cells]


def _shown(metric: Metric, summary: Summary) -> bool:
    other, factor = metric.above
    mean, than = summary.distributions[metric.key].mean, summary.distributions[other].mean if other else None
    return mean is not None and (than is None or mean > factor * than)


def _figure(value: Optional[float]) -> str:
    return "-" if value is None else f"{value:.{2 if value < 1e5 else 0}f}"


def few(sample: Distribution, rank: Optional[float]) -> bool:
    """Whether it takes more values for that percentile to be told from the maximum."""
    return sample.n < LEAST_SAMPLES.get(rank or 0.0, 0)


def distribution_table(summary: Summary) -> list[str]:
    """A row for each metric that says something; under some, that of the steady window."""
    rows = [["", "mean", *(f"p{rank:g}" for rank in SHOWN_PERCENTILES), "max", "n"]]
    for metric in METRICS:
        if not _shown(metric, summary):
            continue
        label = "ITL (ms)" if metric.key == "gap" and gaps_are_of_tokens(summary) else metric.label
        rows.append(_table_row(label, summary.distributions[metric.key]))
        if summary.steady and metric.key in MAIN_METRICS:
            rows.append(_table_row("  steady", summary.steady.distributions[metric.key]))
    notes = _few_note(summary, rows)
    if max(sample.n for sample in summary.distributions.values()) > EXACT_SAMPLES:
        notes.append(f"n above {EXACT_SAMPLES:,}: percentiles from a histogram, within {BUCKET_ERROR:.1%} of the value")
    return [*table(rows), *notes] if len(rows) > 1 else []


def _table_row(label: str, sample: Distribution) -> list[str]:
    shown = [(rank, sample.percentiles.get(rank)) for rank in SHOWN_PERCENTILES]
    cells = [_figure(value) + "*" * (value is not None and few(sample, rank)) for rank, value in shown]
    return [label, _figure(sample.mean), *cells, _figure(sample.max), str(sample.n)]


def _few_note(summary: Summary, rows: Sequence[Sequence[str]]) -> list[str]:
    starred = [name for name, *cells in zip(*rows) if any(cell.endswith("*") for cell in cells)]
    if not starred:
        return []
    needed = {f"p{rank:g}": least for rank, least in LEAST_SAMPLES.items()}
    least, n = needed[starred[-1]], summary.distributions["latency"].n
    made = summary.ok + summary.errors + summary.aborted
    advice = f"; --total-requests {math.ceil(least * made / n)} would do" if 0 < n < least else ""
    takes = ", ".join(f"{name} {needed[name]:,}" for name in starred)
    return wrapped(f"* too few values: hardly more than their maximum (least n: {takes}){advice}", 2)


def interval_table(summary: Summary) -> list[str]:
    """For --verbose: where the percentiles lie with 95 % confidence."""
    rows = [["95 % confidence", *(f"p{rank:g}" for rank in INTERVALS_SHOWN)]]
    for metric in METRICS:
        sample = summary.distributions[metric.key]
        if metric.key in MAIN_METRICS and sample.n:
            ends = [["?" if math.isinf(end) else _figure(end) for end in sample.intervals[r]] for r in INTERVALS_SHOWN]
            rows.append([metric.label, *map(" to ".join, ends)])
    return table(rows) if len(rows) > 1 else []


def steady_lines(summary: Summary) -> list[str]:
    """The steady window, and the opening burst where it is another story."""
    steady = summary.steady
    if steady is None:
        none = "Steady: no steady state: too few requests were sent after the first wave had ended"
        return [none] if summary.ok else []
    requests, generated, total = steady.rates
    lines = [
        f"Steady: {steady.end_s - steady.start_s:.3f} s from {steady.start_s:.3f} s on, {steady.sent} requests sent:"
        f" {requests:.2f} req/s, {generated:.2f} generated tokens/s, {total:.2f} in all"
    ]
    key = "ttft" if steady.opening["ttft"].n else "latency"
    first, then = steady.opening[key], steady.distributions[key]
    if first.n and then.n and abs(first.percentiles[50.0] / then.percentiles[50.0] - 1) > DRIFT:
        lines.append(
            f"Opening: of the {first.n} requests before, the median {_short_label(METRIC[key])} was"
            f" {first.percentiles[50.0]:.1f} ms; in steady state it was {then.percentiles[50.0]:.1f} ms"
        )
    return lines


def group_table(name: str, groups: Mapping[str, GroupSummary]) -> list[str]:
    """A row for each group; only what one of them has gets a column."""
    told = [key for key in MAIN_METRICS if any(got.distributions[key].n for got in groups.values())]
    figures = [(key, rank) for key in told for rank in (50.0, 99.0)]
    rows = [
        [
            name,
            "ok",
            "errors",
            *(f"{METRIC[key].label} p{rank:g}".replace(" (ms)", "") for key, rank in figures),
            "cached",
        ]
    ]
    for group, got in groups.items():
        cells = [_figure(got.distributions[key].percentiles.get(rank)) for key, rank in figures]
        share = "-" if got.cached_share is None else f"{got.cached_share:.1%}"
        rows.append([shortened(plain(group)), str(got.ok), str(got.errors), *cells, share])
    return table(rows)


def corpus_line(asked: Mapping[str, Any]) -> list[str]:
    """Which keys of the bodies came from the corpus."""
    if not asked or not (asked["keys"] or asked["not_sent"]):
        return []
    sent = ", ".join(f"{name} {count}" for name, count in asked["keys"].items())
    ignored = f"; not sent: {', '.join(asked['not_sent'])}" if asked["not_sent"] else ""
    return wrapped(plain(f"Corpus: lines that send {sent}{ignored}", 1000), len("Corpus: "))


def circumstances(summary: Summary, config: Config, health: Sequence[Health]) -> list[str]:
    """A few lines on how the run went: concurrency and rates, how replies ended, the clock, the client, errors."""
    lines = []
    if health:
        lines += wrapped(in_flight_line(summary, health), len("In flight: "))
    if summary.due_rate and summary.issued_rate:
        kind, done = ("Sessions", summary.sessions) if summary.sessions else ("Requests", summary.ok)
        asked, rates = config.request_rate, (summary.due_rate, summary.issued_rate, _rate(done, summary.elapsed_s))
        told = "" if math.isinf(asked) else f"asked {asked:g}, "
        lines.append(kind + "/s: {}due {:.2f}, issued {:.2f}, achieved {:.2f}".format(told, *rates))
    if summary.sessions:
        why = ": a turn before them failed, or the run ended" if summary.unsent_turns else ""
        lines.append(f"Sessions: {summary.sessions} begun; {summary.unsent_turns} of their turns were not sent{why}")
    lines += [part for line in steady_lines(summary) for part in wrapped(line, len("Steady: "))]
    if summary.aborted:
        lines += [f"Aborted: {summary.aborted} requests, cut off or not sent at the end: neither completed nor failed"]
    if summary.finish_reasons:
        reasons = sorted(summary.finish_reasons.items(), key=lambda item: -item[1])
        lines.append(shortened(plain("Finish reasons: " + ", ".join(f"{name} {count}" for name, count in reasons))))
    for line in (clock_line(summary, health), client_line(health), *server_lines(summary)):
        lines += wrapped(line, len("Client: "))
    for group in summary.error_groups[:ERROR_GROUPS_SHOWN]:
        message = plain(group.first_message)
        lines += wrapped(f"Errors: {group.count} x {group.status}/{group.kind}: {message}", len("Errors: "))
    if len(summary.error_groups) > ERROR_GROUPS_SHOWN:
        lines.append(f"Errors: {len(summary.error_groups) - ERROR_GROUPS_SHOWN} rarer kinds besides")
    return lines


def in_flight_line(summary: Summary, health: Sequence[Health]) -> str:
    """As counted, checked by Little's law: throughput x time in the server is the mean, or something is amiss."""
    counted = sum(h.in_flight_s for h in health)
    line = f"In flight: mean {in_flight_mean(health):.1f}, peak {sum(h.peak_in_flight for h in health)}"
    if not counted or abs(summary.busy_s / counted - 1) <= LITTLE_TOLERANCE:
        return line
    why = "processes that died had the rest"
    if summary.busy_s < counted:
        unread = sum(h.unread_s for h in health) > (counted - summary.busy_s) / 2
        why = "arrived replies waited to be read here" if unread else "replies were over before their connections ended"
    law = in_flight_mean(health) * summary.busy_s / counted
    return f"{line}; throughput x time in the server gives {law:.1f}: {why}"


def clock_line(summary: Summary, health: Sequence[Health]) -> str:
    if not summary.reads:
        return ""
    counted = any(h.transport.startswith("stopwatch") for h in health)
    opened = f"; {summary.new_connections} new connections" if counted else ""
    names = "/".join(sorted({h.transport for h in health})) or "-"
    kernel = percent(summary.kernel_reads, summary.reads)
    merged = percent(summary.merged_reads, summary.content_reads)
    late = f", read late {summary.late_read} requests" if summary.late_read else ""
    return f"Clock: kernel {kernel:.3g} %, merged {merged:.3g} %{late}; transport {names}{opened}"


def client_line(health: Sequence[Health]) -> str:
    if not health:
        return ""
    cpu, waiting = (max(percent(getattr(h, n), h.wall_s) for h in health) for n in ("cpu_s", "waiting_s"))
    lag, longest, pause = (max(getattr(h, n) for h in health) for n in ("lag_p99_ms", "lag_max_ms", "gc_pause_ms"))
    count = f"{len(health)} process{'es' if len(health) > 1 else ''}"
    return (
        f"Client: {count}, CPU {cpu:.0f} %, waiting {waiting:.0f} %,"
        f" loop lag p99 {lag:.1f} ms, max {longest:.0f} ms, gc pause max {pause:.1f} ms"
    )


# Figures of the server and its GPUs -> how the report says them; those that are not told are left out.
SERVER_PHRASES = {
    "server_running_mean": "running mean {:.1f}", "server_running_peak": "peak {:.0f}",
    "server_waiting_mean": "waiting mean {:.1f}", "server_waiting_peak": "peak {:.0f}",
    "server_mean_queue_ms": "queue time mean {:.1f} ms", "server_prefix_cache_hit_rate": "prefix cache hits {:.1%}",
    "server_kv_cache_peak": "KV cache peak {:.1%}", "server_preemptions": "preemptions {}",
    "server_acceptance_length_mean": "tokens per decoding step {:.2f}",
    "gpu_name": "{}", "gpu_count": "count {}", "gpu_driver": "driver {}",
    "gpu_utilization_mean": "utilisation mean {:.0f} %", "gpu_memory_peak_bytes": "memory peak {:.1f} GiB",
    "gpu_power_mean_w": "power mean {:.0f} W",
    "gpu_energy_per_output_token_j": "{:.3g} J per output token", "gpu_energy_per_request_j": "{:.3g} J per request",
}  # fmt: skip
SERVER_MEANS = (("ttft", "TTFT", "ttft"), ("tpot", "TPOT", "tpot"), ("itl", "ITL", "gap"), ("e2el", "E2E", "latency"))


def server_lines(summary: Summary) -> list[str]:
    """What the server and its GPUs say of themselves; the server's own means beside ours."""
    said: dict[str, list[str]] = {"server": [], "gpu": [], "means": []}
    for key, phrase in SERVER_PHRASES.items():
        if key in summary.server:
            value = summary.server[key]
            said[key.partition("_")[0]].append(phrase.format(value / 2**30 if key.endswith("_bytes") else value))
    for key, name, ours in SERVER_MEANS:
        if f"server_mean_{key}_ms" in summary.server:
            here = None if key == "itl" and not gaps_are_of_tokens(summary) else summary.distributions[ours].mean
            beside = "" if here is None else f" (here {_figure(here)})"
            said["means"].append(f"{name} {summary.server[f'server_mean_{key}_ms']:.2f} ms{beside}")
    heads = {"server": "Server", "means": "Server's means", "gpu": "GPU"}
    return [plain(f"{head}: {', '.join(said[kind])}", 400) for kind, head in heads.items() if said[kind]]


# Labels of the founding document's configuration block, spaces included: scripts may read it.
CONFIG_LABELS = (
    "     api_base", "      api_key", "        model", "   concurrency", " total_requests", " prompt_tokens",
    " output_tokens",
)  # fmt: skip


def config_block(config: Config, loads: Optional[Mapping[str, Any]] = None) -> str:
    """The seven options that every report shows, then those that differ from their default.

    `loads`: what stands in place of some options, where several points had several.
    """
    values = {**Redactor.config(config), "corpus": None, **(loads or {})}
    lines = [f"{label}: {_config_cell(values.pop(label.strip()))}" for label in CONFIG_LABELS]
    for name, value in values.items():
        usual = default_warmup(config.concurrency, config.total_requests)
        default = usual if name == "warmup" else "inf" if name == "request_rate" else DEFAULTS.get(name)
        if value != default and value not in (None, [], {}) and value is not False:
            lines.append(f"{name:>14}: {_config_cell(value)}")
    return "\n".join(("=== Benchmark Configuration ===", *map(shortened, lines)))


def _config_cell(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    if value is None:
        return "unlimited"
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
    """A strict-JSON object; what cannot be measured is left out. `run`: date, argv, versions and the like.

    Readers call float() on all that ends in `_ms`, and refuse repetitions whose keys differ.
    """
    stats = stats_of(summary.distributions)
    # These have no keys of their own: whether a connection has to be opened again is chance.
    connecting = {key: stats.pop(key) for key in list(stats) if STATS[key].metric == "connect"}
    steady = stats_of(summary.steady.distributions, steady=True) if summary.steady else {}
    told = ((name, figure_of(name, summary, config, health)) for name in FIGURES)
    requests = {"model_id": config.model, **{name: value for name, value in told if value is not None}}
    shares = {name: requests.pop(name) for name in list(requests) if name.startswith("goodput_share_")}
    nested = {"confidence_95": _intervals(summary.distributions), "goodput_shares": shares, "connecting": connecting}
    ours = {**nested, **_our_keys(summary, config, health)}  # nested: readers divide by all that has "tpot" in its name
    return {**(config.metadata or {}), **run, **requests, **stats, **steady, **summary.server, **ours}


def _our_keys(summary: Summary, config: Config, health: Sequence[Health]) -> dict[str, Any]:
    """What neither vLLM nor SGLang tells, and is no number."""
    judged = [judge(Limit.of(text), summary, config, health) for text in config.asserts]
    kept = [judge(limit, summary, config, health) for limit in limits_of(config)]
    rates = {"due_rate": summary.due_rate, "issued_rate": summary.issued_rate} if summary.due_rate else {}
    return {
        "asserts": {str(one.limit): one.holds for one in judged},
        "slos": {str(one.limit): one.holds for one in kept},
        "steady_drifts": dict(summary.steady.drifts) if summary.steady else {},
        "errors_by_kind": {f"{g.status}/{g.kind}": g.count for g in summary.error_groups},
        "error_messages": {f"{g.status}/{g.kind}": plain(g.first_message) for g in summary.error_groups},
        **{name: rate for name, rate in rates.items() if rate},
        "held_back_requests": summary.held_back,
        "finish_reasons": dict(summary.finish_reasons),
        "replies_without_usage": summary.without_usage,
        "gaps_are_of_tokens": gaps_are_of_tokens(summary),
        "kernel_stamped_share": _rate(summary.kernel_reads, summary.reads),
        "merged_read_share": _rate(summary.merged_reads, summary.content_reads),
        "merged_first_share": _rate(summary.first_merged, summary.streams),
        "late_read_requests": summary.late_read,
        "repeated_connection_packets": summary.syn_resent,
        "new_connections": summary.new_connections,
        "reconnects": summary.reconnects,
        "sessions": summary.sessions,
        "unsent_turns": summary.unsent_turns,
        "groups": {name: _group_json(groups) for name, groups in summary.groups.items()},
        "client_bound": client_bound(summary, health) or "",
        "client": [dataclasses.asdict(h) for h in health],
        "warnings": [". Cure: ".join(warning) for warning in warnings_of(summary, config, health)],
        "config": {name: value for name, value in Redactor.config(config).items() if value is not None},
    }


def _group_json(groups: Mapping[str, GroupSummary]) -> dict[str, Any]:
    told = {}
    for name, got in groups.items():
        shares = {} if got.cached_share is None else {"cached_share": got.cached_share}
        told[name] = {"completed": got.ok, "failed": got.errors, **shares, **stats_of(got.distributions)}
    return told


def stats_of(distributions: Mapping[str, Distribution], steady: bool = False) -> dict[str, Any]:
    """Every number of these distributions by its key; of a metric without values there is none."""
    told = {}
    for key, one in STATS.items():
        sample = distributions.get(one.metric, Distribution(0))
        if one.steady == steady and sample.n > (one.name == "std"):  # of one value it is 0, and readers divide by it
            told[key] = one.of(sample)
    return told


def _intervals(distributions: Mapping[str, Distribution]) -> dict[str, list[float]]:
    """Where percentiles lie with 95 % confidence; only those of which both ends are known."""
    found = {}
    for key, rank in itertools.product(MAIN_METRICS, INTERVALS_SHOWN):
        ends = distributions[key].intervals.get(rank, (math.inf,))
        if not any(map(math.isinf, ends)):
            found[f"p{rank:g}_{METRIC[key].stems[0]}"] = list(ends)
    return found


def result_name(result: Mapping[str, Any]) -> str:
    """The name of a result's own file, as vLLM names them: label or backend, rate, concurrency, model, date (UTC)."""
    words = [result.get("label") or result["backend"], f"{result['request_rate']}qps"]
    words += [f"concurrency{result['max_concurrency']}"] if "max_concurrency" in result else []
    words += [f"repeat{result['repeat']}"] if result["repeat"] > 1 else []
    words += [result["model_id"].rpartition("/")[2], result["date"]]
    return re.sub(r"[^\w.+-]+", "_", "-".join(map(str, words)))[:200]


def detail_lists(records: Sequence[Record]) -> dict[str, list[Any]]:
    """The per-request lists of --save-detailed, named as vLLM and SGLang name them, in order of the requests' numbers.

    Times are seconds, 0 where there is none, as there: readers take no null. What the run's own stop cut off is in
    none of them, and what only streams have only in those of streams.
    """
    kept = sorted((record for record in records if not record.aborted), key=lambda record: record.job.index)
    lists: dict[str, list[Any]] = {
        "input_lens": [record.reply.prompt_tokens or 0 for record in kept],
        "output_lens": [record.reply.completion_tokens or 0 if record.ok else 0 for record in kept],
        "start_times": [round(record.sent_s or 0.0, 6) for record in kept],
        "latencies": [round((record.latency_ms or 0.0) / 1e3, 6) for record in kept],
        "errors": [plain(record.error or record.error_kind) for record in kept],
    }
    if any(record.ttft_ms for record in kept):
        lists["ttfts"] = [round((record.ttft_ms or 0.0) / 1e3, 6) for record in kept]
        lists["itls"] = [[round(gap / 1e3, 6) for gap in record.reply.gaps_ms if record.ok] for record in kept]
    return lists


# === 8. Sinks (the only writers) ===


def _time(path: str, digits: int = 3) -> Callable[[Record], str]:
    """The cell of a time; `path`: the attribute of the record that holds it."""
    read = operator.attrgetter(path)
    return lambda record: "" if read(record) is None else f"{read(record):.{digits}f}"


def _count(path: str) -> Callable[[Record], str]:
    read = operator.attrgetter(path)
    return lambda record: "" if read(record) is None else str(int(read(record)))


def _tokens(path: str) -> Callable[[Record], str]:
    """A count of successes; failures enter no total."""
    count = _count(path)
    return lambda record: count(record) if record.ok else ""


def _cell(text: Optional[str]) -> str:
    """Server text as a cell: one line, and never a formula to a spreadsheet."""
    line = plain(text or "")
    return f"'{line}" if line[:1] in ("=", "+", "-", "@") else line


class Column(NamedTuple):
    """A column of --results-csv: what it says, for --help-columns, and how a record fills it."""

    meaning: str
    cell: Callable[[Record], str] = lambda record: ""  # the same in all rows of a point, as `CsvSink.begin` is told


CSV_COLUMNS: Mapping[str, Column] = {
    "index": Column("number of the request, from 0", lambda r: str(r.job.index)),
    "prompt_tokens": Column("as the server's usage counted them; successes only", _tokens("reply.prompt_tokens")),
    "completion_tokens": Column("likewise; a stream without usage: its chunks", _tokens("reply.completion_tokens")),
    "total_tokens": Column("their sum", _tokens("total_tokens")),
    "latency_ms": Column("sent -> last byte (streamed: last token); successes only", _time("latency_ms")),
    "status": Column("success, http_error (call failed), decode_error (incomplete answer)", lambda r: r.status),
    "error": Column(f"the first {ERROR_TEXT_CHARS} characters of what went wrong", lambda r: _cell(r.error)),
    "error_kind": Column("its class: http_429, timeout, connect_refused, cut, ...", lambda r: _cell(r.error_kind)),
    "scheduled_s": Column("when it was due, from the start; blank in a closed loop", _time("job.due_s", 6)),
    "sent_s": Column("when its last byte was handed to the socket, from the start", _time("sent_s", 6)),
    "ttft_ms": Column("sent -> first token (streamed)", _time("ttft_ms")),
    "tpot_ms": Column("(last - first token) / (completion_tokens - 1) (streamed)", _time("tpot_ms")),
    "response_ms": Column("due -> completion; blank in a closed loop", _time("response_ms")),
    "queue_ms": Column("permit free (or due) -> ready to write, without connecting; in no latency", _time("queue_ms")),
    "connect_ms": Column("opening its connection; blank on a kept one; in no latency", _time("connect_ms")),
    "e2e_ms": Column("permit free (or due) -> completion, queue and connecting included", _time("e2e_ms")),
    "tail_ms": Column("last token -> last byte of the reply (streamed)", _time("tail_ms")),
    "late_read": Column(
        "1 when chunks queued up in this client: their gaps, or ttft_ms, are left out",
        lambda r: str(int(r.reply.late_gaps > 0)) if r.reply.chunks is not None else "",
    ),
    "finish_reason": Column("stop, length, ...", lambda r: _cell(r.reply.finish_reason)),
    "chunks": Column("content chunks received (streamed)", _count("reply.chunks")),
    "cached_tokens": Column("prompt tokens from the server's prefix cache", _tokens("reply.cached_tokens")),
    "reasoning_tokens": Column("completion tokens spent on reasoning", _tokens("reply.reasoning_tokens")),
    "new_connection": Column("1 when a connection was opened for it", _count("reply.new_connection")),
    "http_status": Column("the HTTP status; blank when none came", _count("reply.http_status")),
    "label": Column("`label` or `custom_id` of its corpus line", lambda r: _cell(r.reply.label)),
    "session": Column("number of its session, from 0", _count("reply.session")),
    "turn": Column("number of its turn in the session, from 1", _count("reply.turn")),
    "server": Column("the --api-base it went to, where there are several", lambda r: _cell(r.reply.server)),
    "level": Column("the concurrency, or the request rate, of its point"),
    "repeat": Column("which measurement of that level, from 1"),
    "start_unix_s": Column("when its point began, in seconds since 1970: the start of all others"),
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
        self.path = path
        self.rows = 0
        self.lost = 0
        self.reason = ""
        self._text = io.StringIO()
        self._writer = csv.writer(self._text, lineterminator="\n")
        self._point: Mapping[str, str] = {}
        self._header = self._line(list(CSV_COLUMNS))
        taken = "" if append or overwrite else "exists; --append adds to it, --overwrite replaces it"
        if taken and os.path.exists(path):  # never opened: a pipe without a reader would wait for one
            raise UserError(f"--results-csv {path} {taken}")
        self._out = OutputFile(path, "--results-csv", taken and f"--results-csv {path} {taken}")
        self._replaces = overwrite and self._out.size() > 0
        try:
            self._prepare()
        except UserError:
            self.close()
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

    def begin(self, **point: str) -> None:
        """A point is about to be measured, `point` its own columns; now --overwrite drops the old rows.

        Raises UserError.
        """
        self._point = point
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
            cells = [self._point.get(name) or column.cell(record) for name, column in CSV_COLUMNS.items()]
            self._out.write(self._line(cells))
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
        """A run that measured nothing leaves no file in the way of the next."""
        self._out.close(-1 if self.rows else len(self._header))


class SummarySink:
    """A line of JSON for each point; opened before any load, so that nobody waits an hour for an error."""

    def __init__(self, path: str, new: bool = False, points: int = 1) -> None:
        """`new`: the file must not exist and takes one point; a directory takes a file for each. Raises UserError."""
        option = "--summary-json" if new else "--summary-jsonl"
        self.path = path
        self._out: Optional[OutputFile] = None
        self._ours = not os.path.isdir(path)
        if new and (path.endswith(("/", os.sep)) or not self._ours):
            with _writing(option, path):
                os.makedirs(path, exist_ok=True)
                os.rmdir(tempfile.mkdtemp(dir=path))
        elif points > 1 and new:
            raise UserError(f"{option} {path}: {points} points take a directory, {path}/")
        else:
            self._out = OutputFile(path, option, f"{option} {path} exists; name another or a directory" if new else "")
            self._out.share()

    def write(self, summary: Mapping[str, Any]) -> None:
        """Raises OSError or UserError."""
        out = self._out or self._next(os.path.join(self.path, result_name(summary)))
        line = json.dumps(summary, ensure_ascii=False, allow_nan=False) + "\n"
        out.write(line.encode("utf-8", "replace"))
        if not self._out:
            out.close()
        elif out.gone():
            raise FileNotFoundError(2, "it has been removed or replaced meanwhile")

    @staticmethod
    def _next(path: str) -> OutputFile:
        names = itertools.chain(("",), (f"-{number}" for number in itertools.count(2)))
        free = next(name for name in (f"{path}{end}.json" for end in names) if not os.path.lexists(name))
        return OutputFile(free, "--summary-json", f"{free} exists")

    def close(self) -> None:
        """A run that measured nothing leaves no file and no directory of its own."""
        if self._out:
            self._out.close(unused_bytes=0)
        elif self._ours:
            with contextlib.suppress(OSError):  # it holds results
                os.rmdir(self.path)


class LiveLine:
    """Progress on stderr: a terminal gets one line rewritten, a pipe a line now and then."""

    def __init__(
        self, tally: Tally, goal: Goal, clock: Callable[[], float], arriving: Callable[[], int] = lambda: 0
    ) -> None:
        """`arriving`: how many tokens of replies under way have come."""
        self._tally = tally
        self._goal = goal
        self._arriving = arriving
        self._clock = clock
        self._start_s = clock()
        self._tty = bool(sys.stderr and sys.stderr.isatty())
        self._task: Optional[asyncio.Future[None]] = None
        self.period_s = PROGRESS_TTY_S if self._tty else PROGRESS_PIPE_S

    def start(self) -> None:
        self._task = asyncio.ensure_future(self._keep())

    async def _keep(self) -> None:
        while True:
            self.show()
            await asyncio.sleep(self.period_s)

    def show(self, elapsed_s: Optional[float] = None) -> None:
        elapsed_s = elapsed_s or self._clock() - self._start_s
        self._tally.arriving_tokens = self._arriving()
        if self._tty:
            width = _columns() - 1
            _say("\r" + progress_line(self._tally, self._goal, elapsed_s, width)[:width].ljust(width), end="")
        else:
            _say(progress_line(self._tally, self._goal, elapsed_s))

    def finish(self) -> None:
        """The last state, over the report's own time, so that a log shows how it ended; an empty line after it."""
        if self._task:
            self._task.cancel()
        self._arriving = lambda: 0
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


# === 9. Stopwatch (the wire) ===

SO_TIMESTAMPNS = 35  # Linux, the common architectures; the socket module does not name it
_TIMESPEC = struct.Struct("@ll")
_TIMESPEC_BYTES, _unpack_timespec = _TIMESPEC.size, _TIMESPEC.unpack
_ANCILLARY_BYTES = 128 if sys.platform == "win32" else socket.CMSG_SPACE(_TIMESPEC.size)
_READABLE, _WRITABLE = selectors.EVENT_READ, selectors.EVENT_WRITE
_MESSAGE_END = b"\r\n\r\n"
OFFSET_LIMIT_NS = 20_000
TCP_UNACKNOWLEDGED, TCP_RESENT = 24, 100  # places in struct tcp_info: tcpi_unacked, tcpi_total_retrans
CLOCK_STEP_NS = 50_000  # a stamp further off than this is no stamp: the wall clock was set meanwhile


class CallError(Exception):
    """A call that failed below HTTP, or in it."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.failure = Failure("http_error", kind, message)


class NotSent(Exception):
    """The run ended before a prepared request had its permit: it leaves no record."""


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


Grant = Callable[[Optional[int]], None]  # told when the permit became free (ns), or None: it will not come


class Clock(NamedTuple):
    """What time it is, in ns of perf_counter, and how to sleep for some seconds; tests have another one."""

    now_ns: Callable[[], int] = time.perf_counter_ns
    nap: Callable[[float], None] = time.sleep


CLOCK = Clock()


class Alarm:
    """Calls `ring` at a given time, to some 0.1 ms: the event loop's own timers are up to 1.5 ms late.

    It wakes early and then looks again at every turn of the loop; between turns that had nothing to do, it naps.
    """

    def __init__(self, ring: Callable[[], None], clock: Clock) -> None:
        self._ring = ring
        self._clock = clock
        self._at_ns = self._looked_ns = 0
        self._handle: Optional[asyncio.Handle] = None

    def set(self, at_ns: int) -> None:
        self.cancel()
        self._at_ns = at_ns
        self._look()

    def cancel(self) -> None:
        if self._handle:
            self._handle.cancel()

    def _look(self) -> None:
        loop, now_ns = asyncio.get_running_loop(), self._clock.now_ns()
        left_s = (self._at_ns - now_ns) / 1e9
        if left_s <= 0:
            self._ring()
        elif left_s > TIMER_ERROR_S:
            self._handle = loop.call_later(left_s - TIMER_ERROR_S, self._look)
        else:
            if now_ns - self._looked_ns < IDLE_TURN_NS:
                self._clock.nap(min(left_s, NAP_S))
            self._looked_ns = self._clock.now_ns()
            self._handle = loop.call_soon(self._look)


class Permits:
    """The semaphore that bounds what is in flight: at most `total` requests (None: any number) are unanswered.

    Requests are prepared ahead and wait here with their bytes ready, first until they are due, then for a permit. One
    given back goes by a plain call to the one that has waited longest, so it is sent within microseconds of the reply
    that made room for it.
    """

    def __init__(self, total: Optional[int], taken: Callable[[], None] = lambda: None, clock: Clock = CLOCK) -> None:
        """`taken`: called after each request that has got its permit."""
        self.total = total
        self.is_open = False
        self._taken = taken
        self._alarm = Alarm(self._call_due, clock)
        self._clock = clock
        self._origin_ns = 0
        self._numbers = itertools.count()
        # A heap of those not yet due: due time, arrival, grant, since when it holds a permit.
        self._early: list[tuple[float, int, Grant, Optional[int]]] = []
        self.under_way: set[Call] = set()  # sent and unanswered
        self.peak_in_flight = 0
        self.in_flight_ns = 0  # their number, summed up over the time
        self.unread_ns = 0  # of it after their last bytes had arrived
        self.first_ns = self.changed_ns = 0  # when the first was sent, and when their number last changed
        self._closed = False
        self._free: deque[int] = deque()
        self._waiting: deque[Grant] = deque()
        self._enough: Optional[tuple[int, asyncio.Future[None]]] = None

    def acquire(self, grant: Grant, due_s: Optional[float] = None, held_ns: Optional[int] = None) -> None:
        """Call `grant` with the time at which its permit became free: now, or later; with None after `close`.

        `due_s`: not before so many seconds after the start of the run. `held_ns`: it has a permit, since then.
        """
        if self._closed:
            grant(None)
            return
        if due_s is None:
            self._queue(grant, held_ns)
        else:
            heapq.heappush(self._early, (due_s, next(self._numbers), grant, held_ns))
            if self._early[0][2] is grant:
                self._call_due()
        self._count_waiting()

    def _call_due(self) -> None:
        if not self.is_open:
            return
        now_s = (self._clock.now_ns() - self._origin_ns) / 1e9
        while self._early and self._early[0][0] <= now_s:
            self._queue(*heapq.heappop(self._early)[2:])
        if self._early:
            self._alarm.set(self._origin_ns + math.ceil(self._early[0][0] * 1e9))

    def _queue(self, grant: Grant, held_ns: Optional[int]) -> None:
        if held_ns is not None:
            grant(held_ns)
        elif self.total is None and self.is_open:
            self._give(grant, self._origin_ns)
        elif self._free:
            self._give(grant, self._free.popleft())
        else:
            self._waiting.append(grant)

    def _give(self, grant: Grant, free_ns: int) -> None:
        grant(free_ns)
        self._taken()

    def withdraw(self, grant: Grant) -> None:
        """It no longer waits."""
        self._early = [waiting for waiting in self._early if waiting[2] is not grant]
        heapq.heapify(self._early)
        with contextlib.suppress(ValueError):
            self._waiting.remove(grant)

    def release(self, free_ns: int) -> None:
        """A permit is free since `free_ns`."""
        if self._waiting and self.is_open:
            self._give(self._waiting.popleft(), free_ns)
        elif self.total is not None:
            self._free.append(free_ns)

    def sent(self, call: Call) -> None:
        """Its last byte was handed to the socket; `answered` follows when its reply has ended."""
        self._count_until(time.perf_counter_ns())
        self.under_way.add(call)
        self.peak_in_flight = max(self.peak_in_flight, len(self.under_way))

    def answered(self, call: Call, over_ns: Optional[int] = None) -> None:
        """`over_ns`: when the last byte arrived, where it ended the reply by itself."""
        if call in self.under_way:  # not one that failed before it was sent
            now_ns = time.perf_counter_ns()
            self._count_until(now_ns)
            self.unread_ns += now_ns - (over_ns or now_ns)
            self.under_way.remove(call)

    def _count_until(self, now_ns: int) -> None:
        self.first_ns = self.first_ns or now_ns
        self.in_flight_ns += len(self.under_way) * (now_ns - self.changed_ns)
        self.changed_ns = now_ns

    def arriving_tokens(self) -> int:
        """Content chunks, so far, of the replies under way."""
        return sum(call.chunks_so_far for call in self.under_way)

    async def ready(self, count: int) -> None:
        """Until `count` requests wait with their bytes ready."""
        self._enough = (count, asyncio.get_running_loop().create_future())
        self._count_waiting()
        await self._enough[1]

    def _count_waiting(self) -> None:
        waiting = len(self._waiting) + len(self._early)
        if self._enough and waiting >= self._enough[0] and not self._enough[1].done():
            self._enough[1].set_result(None)

    def open(self, origin_ns: int, from_s: Iterable[float] = ()) -> None:
        """Let the first requests out. `from_s`: when each permit may be used first, after now; all others at once."""
        self.is_open = True
        self._origin_ns, now_ns = origin_ns, self._clock.now_ns()
        for delay_s in itertools.islice(itertools.chain(from_s, itertools.repeat(0.0)), self.total or 0):
            if delay_s:
                asyncio.get_running_loop().call_later(delay_s, self.release, now_ns + int(delay_s * 1e9))
            else:
                self.release(now_ns)
        while self.total is None and self._waiting:
            self._give(self._waiting.popleft(), origin_ns)
        self._call_due()

    def close(self) -> None:
        """Nothing more is sent, but what may be sent by now: whoever waits, or will, is told."""
        self._call_due()
        self._closed = True
        self._alarm.cancel()
        waiting = [*self._waiting, *(grant for _, _, grant, _ in self._early)]
        self._waiting, self._early = deque(), []
        for grant in waiting:
            grant(None)


class Turn:
    """When one request may go: with a permit, and not before it is due. What is under way with it is the permits'."""

    def __init__(self, permits: Permits, due_s: Optional[float] = None, held_ns: Optional[int] = None) -> None:
        """`held_ns`: since when it holds a permit, where a turn of the same session has left one."""
        self.permits = permits
        self.held_ns = held_ns
        self.keeps = False  # the permit stays with the session, which goes on
        self._due_s = due_s

    def acquire(self, grant: Grant) -> None:
        self.permits.acquire(grant, self._due_s, self.held_ns)

    async def wait(self) -> int:
        """The same for a coroutine. Raises NotSent."""
        future: asyncio.Future[Optional[int]] = asyncio.get_running_loop().create_future()

        def grant(free_ns: Optional[int]) -> None:
            if not future.done():
                future.set_result(free_ns)
            elif free_ns is not None:
                self.release(free_ns)

        self.acquire(grant)
        free_ns = await future
        if free_ns is None:
            raise NotSent
        return free_ns

    def release(self, free_ns: int) -> None:
        """The request has ended; its permit is free since then."""
        self.held_ns = free_ns if self.keeps else None
        if not self.keeps:
            self.permits.release(free_ns)


class Call:
    """One request under way: the reply that is being filled in, and what matters only until it has ended."""

    def __init__(self, reader: Callable[[Reply], Reader], turn: Turn) -> None:
        self.reply = Reply()
        self.turn = turn
        self.permits = turn.permits
        self.payload = b""
        self.failure: Optional[Failure] = None  # decided by a limit of ours
        self.error_body = bytearray()
        self.retry_after = self.location = ""
        self.watchdog: Any = None  # set with the permit
        self.dropped = False  # the run ended before its permit came
        self.is_whole = False
        self.size = 0
        self.newest_ns: Optional[int] = None  # the newest arrival
        self.ended_ns: Optional[int] = None  # its permit was given back
        self._stamps: list[int] = []  # of the pieces of the body that the reader has not seen yet
        self._pieces: list[bytes] = []
        self._reader = reader(self.reply)
        self.late = self._reader.late  # filled in by whoever reads the socket
        self._inflate: Any = None

    @property
    def settled(self) -> bool:
        """Whether nothing that could still come, or fail to, would matter."""
        self._feed()
        return self.is_whole or (self._reader.complete and self.reply.http_status == 200)

    def may_be_unread(self) -> bool:
        """Whether a reset says that the server had closed the kept connection before it read the request."""
        reply = self.reply
        late = (time.perf_counter_ns() - (reply.sent_ns or 0)) / 1e9 > STALE_S
        return reply.new_connection is False and not reply.reads and not late

    def free_permit(self, since_ns: Optional[int] = None) -> None:
        """It has ended, with its last byte or, if broken, now. Its permit is free since its end was known, or now."""
        now_ns = time.perf_counter_ns()
        whole_ns = self.newest_ns if self.is_whole or self.settled else None
        self.ended_ns = whole_ns or now_ns
        self.turn.release(since_ns or now_ns)

    def head(self, status: int, encoding: str, retry_after: str, location: str) -> None:
        self.reply.http_status = status
        self.retry_after = retry_after
        self.location = location
        if encoding in ("gzip", "x-gzip", "deflate"):
            self._inflate = zlib.decompressobj(zlib.MAX_WBITS | 32)

    def body(self, stamp_ns: int, data: bytes) -> None:
        """Raises CallError for a reply that is too large or whose compression is broken."""
        self.size += len(data)
        if self._inflate is not None:
            data = self._inflated(data)
        if self.size > MAX_REPLY_BYTES:
            raise CallError("too_large", f"the reply is larger than {MAX_REPLY_BYTES >> 20} MB")
        if 200 <= (self.reply.http_status or 0) < 300:
            self._stamps.append(stamp_ns)
            self._pieces.append(data)
            if len(self._pieces) >= UNREAD_PIECES:
                self._feed()
        elif len(self.error_body) < ERROR_BODY_BYTES:
            self.error_body += data[:ERROR_BODY_BYTES]

    def plain_bodies(self, stamps_ns: Sequence[int], pieces: Sequence[bytes]) -> bool:
        """The same for many pieces at once; False where they need the careful way."""
        size = self.size + sum(map(len, pieces))
        if self._inflate is not None or size > MAX_REPLY_BYTES or not 200 <= (self.reply.http_status or 0) < 300:
            return False
        self.size = size
        self._stamps += stamps_ns
        self._pieces += pieces
        if len(self._pieces) >= UNREAD_PIECES:
            self._feed()
        return True

    def _inflated(self, data: bytes) -> bytes:
        try:
            plain_data: bytes = self._inflate.decompress(data, MAX_REPLY_BYTES - (self.size - len(data)) + 1)
        except zlib.error as error:
            raise CallError("bad_http", f"broken compression: {error}") from None
        self.size += max(0, len(plain_data) - len(data))
        return plain_data

    def _feed(self) -> None:
        if self._pieces:
            stamps, pieces, self._stamps, self._pieces = self._stamps, self._pieces, [], []
            self._reader.feed(stamps, pieces)

    @property
    def chunks_so_far(self) -> int:
        return self._reader.chunks_so_far(len(self._pieces))

    def end(self, failure: Optional[Failure]) -> Reply:
        """The call is over: decide what it came to."""
        reply = self.reply
        reply.end_ns = self.ended_ns or time.perf_counter_ns()
        failure = self.failure or failure
        if failure is None and reply.http_status is not None and not 200 <= reply.http_status < 300:
            failure = self._refusal(reply.http_status)
        elif failure is None:
            self._feed()
            self._reader.finish()
        reply.failure = failure or reply.failure
        return reply

    def _refusal(self, status: int) -> Failure:
        if self.location and 300 <= status < 400:
            text = f"HTTP {status}: redirects are not followed; Location: {Redactor.url(self.location)}"
            return Failure("http_error", f"http_{status}", plain(text))
        text = error_body_text(bytes(self.error_body)) or "no message"
        later = f" (Retry-After: {plain(self.retry_after, 40)})" if self.retry_after else ""
        return Failure("http_error", f"http_{status}", plain(f"HTTP {status}{later}: {text}"))


class StepQueue:
    """Admits one costly step per turn of the event loop, so that sockets are read between any two."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[tuple[asyncio.Future[Any], Any]] = deque()
        self._armed = False

    def queue(self, waiter: asyncio.Future[Any], result: Any = None) -> None:
        """Give `waiter` its result, or the exception that it is, when its turn comes."""
        self._waiting.append((waiter, result))
        if not self._armed:
            self._armed = True
            self._loop.call_soon(self._admit)

    async def turn(self) -> None:
        waiter = self._loop.create_future()
        self.queue(waiter)
        await waiter

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
        self.offset_ns = 0
        self.read_both()

    def read_both(self) -> None:
        """Again where something came between the two readings: it would shift a whole batch of stamps."""
        closest_ns = math.inf
        for _ in range(3):
            before = time.perf_counter_ns()
            wall = time.time_ns()
            after = time.perf_counter_ns()
            if after - before < closest_ns:
                closest_ns = after - before
                self.offset_ns = wall - (before + after) // 2
            if closest_ns < OFFSET_LIMIT_NS:
                return

    def stamp(self, ancillary: Sequence[Any], floor_ns: int) -> tuple[int, bool]:
        """(when a read's bytes arrived in ns of perf_counter, whether the kernel said so).

        Nothing arrives before `floor_ns` or after now: a stamp that says so, by more than the two readings may
        be apart, was made while the wall clock was set, and the time of the read has to do.
        """
        now_ns = time.perf_counter_ns()
        if not ancillary or len(ancillary[0][2]) != _TIMESPEC_BYTES:
            return now_ns, False
        seconds, nanoseconds = _unpack_timespec(ancillary[0][2])
        mapped = seconds * 1_000_000_000 + nanoseconds - self.offset_ns
        if floor_ns <= mapped <= now_ns:
            return mapped, True
        near = floor_ns - CLOCK_STEP_NS <= mapped <= now_ns + CLOCK_STEP_NS
        return (min(max(mapped, floor_ns), now_ns), True) if near else (now_ns, False)


def tcp_info(sock: socket.socket, place: int) -> Optional[int]:
    """The number at this place, in bytes, of the kernel's struct tcp_info; None where it does not tell (not Linux)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, place + 4)
            return int.from_bytes(info[place:], sys.byteorder)
    return None


class Tls:
    """TLS over the same socket: bytes in, bytes out, so that the kernel's stamps serve there too."""

    def __init__(self, context: ssl.SSLContext, host: str) -> None:
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._session = context.wrap_bio(self._in, self._out, server_hostname=host)

    async def handshake(self, loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
        while True:
            try:
                self._session.do_handshake()
            except ssl.SSLWantReadError:
                await loop.sock_sendall(sock, self._out.read())
                data = await loop.sock_recv(sock, READ_BUFFER_BYTES)
                if not data:
                    raise CallError("tls_error", "closed during the TLS handshake") from None
                self._in.write(data)
            else:
                await loop.sock_sendall(sock, self._out.read())
                return

    def seal(self, data: bytes) -> bytes:
        self._session.write(data)
        return self._out.read()

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
        except ssl.SSLWantReadError:
            return b"".join(pieces), False
        except ssl.SSLZeroReturnError:
            return b"".join(pieces), True


def tls_context(origin: Origin) -> ssl.SSLContext:
    """The system's trust store, or --ca-file, or no check at all. Raises UserError for a bad file."""
    try:
        context = ssl.create_default_context(cafile=origin.ca_file)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read --ca-file {origin.ca_file}: {error}") from None
    if origin.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class H11Parser:
    """h11, which comes with every openai, behind the interface of httptools.HttpResponseParser."""

    def __init__(self, h11: ModuleType, listener: Connection) -> None:
        self._h11 = h11
        self._listener = listener
        self._status = 0
        self._start = b""
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=READ_BUFFER_BYTES)
        self._http.send(h11.Request(method="POST", target="/", headers=[("Host", "-"), ("Content-Length", "0")]))
        self._http.send(h11.EndOfMessage())

    def get_status_code(self) -> int:
        return self._status

    def should_keep_alive(self) -> bool:
        return self._http.our_state is not self._h11.MUST_CLOSE

    def feed_data(self, data: bytes) -> None:
        """Raises h11.RemoteProtocolError, or ValueError for what does not begin as HTTP does."""
        h11, listener = self._h11, self._listener
        self._start = (self._start + data)[:5]
        if not b"HTTP/".startswith(self._start):  # h11 would wait for the end of a head
            raise ValueError(f"it begins with {self._start!r}")
        self._http.receive_data(data)
        while True:
            event = self._http.next_event()
            if isinstance(event, h11.Data):
                listener.on_body(bytes(event.data))
                if event.chunk_end:
                    listener.on_chunk_complete()
            elif isinstance(event, h11.InformationalResponse):
                continue
            elif isinstance(event, h11.Response):
                self._status = event.status_code
                for name, value in event.headers:
                    listener.on_header(name, value)
                listener.on_headers_complete()
            elif isinstance(event, h11.EndOfMessage):
                listener.on_message_complete()
                if self._http.trailing_data[0]:
                    listener.on_message_begin()
                return
            else:
                return


def http_parsers() -> Callable[[Connection], Any]:
    """Makes a parser of one HTTP/1.1 reply: httptools where it is installed, else h11."""
    try:
        parser: Callable[[Connection], Any] = importlib.import_module("httptools").HttpResponseParser
        return parser
    except ImportError:
        return partial(H11Parser, importlib.import_module("h11"))


_CHUNK_SIZES = {b"%x" % size: size for size in range(1, 4096)}  # as the usual servers write them


class Connection:
    """One kept socket and the reply that is arriving on it.

    Reads are kept as (stamp, bytes). Neither HTTP nor JSON is parsed until a message may have ended or enough
    reads have gathered; what gathers is different from connection to connection, so that streams in step are
    not parsed all at once.
    """

    def __init__(self, stopwatch: Stopwatch, sock: socket.socket, tls: Optional[Tls], number: int) -> None:
        self._stopwatch = stopwatch
        self.sock = sock
        self.receive = sock.recvmsg_into
        self.tls = tls
        self.call: Optional[Call] = None
        self.stamps: list[int] = []
        self.pieces: list[bytes] = []
        self.unstamped = 0
        self.closed = False
        self._first_hold = 1 + number % HELD_READS
        self._unsent: memoryview = memoryview(b"")
        self._refused = False  # the other side took no more bytes of the request
        self._parser: Any = None
        self._done: Optional[asyncio.Future[bool]] = None
        self._stamp_ns = 0
        self._expect_reply()

    def _expect_reply(self) -> None:
        self._headers: dict[bytes, bytes] = {}
        self._at_chunk = False  # the next byte begins a chunk
        self._chunked = self._delimited = self._keep = self._complete = False
        self.hold = 1  # reads to gather before they are parsed

    # --- sending ---

    def carry(self, call: Call, done: asyncio.Future[bool]) -> None:
        """Send; `done` becomes True for a whole reply, False for a request to send again, or a CallError."""
        self.call, self._done = call, done
        self._parser = self._stopwatch.new_parser(self)
        self._expect_reply()
        call.reply.http_status = None
        payload = self.tls.seal(call.payload) if self.tls else call.payload
        self._unsent = memoryview(payload)
        call.watchdog.start(call, self.give_up)
        if call.reply.ready_ns is None:  # of a request sent anew the first time counts: what came then was the server's
            call.reply.ready_ns = time.perf_counter_ns()
        self._push()

    def _push(self) -> None:
        call = self.call
        try:
            while self._unsent:
                if call:
                    call.reply.sent_ns = time.perf_counter_ns()
                self._unsent = self._unsent[self.sock.send(self._unsent) :]
            if call:
                call.permits.sent(call)
        except (BlockingIOError, InterruptedError):
            self._stopwatch.watch(self, _READABLE | _WRITABLE)
        except ConnectionError:  # it has stopped listening: perhaps it has said why
            self._refused = True
            self._stopwatch.watch(self, _READABLE)
        except OSError as error:
            self.broken(error)

    # --- receiving ---

    def ready(self, mask: int) -> None:
        """What is not the plain case: writable, encrypted, or nothing is expected."""
        if mask & _WRITABLE:
            self._stopwatch.watch(self, _READABLE)
            self._push()
        if not mask & _READABLE or self.closed:
            return
        try:
            data, stamp_ns, by_kernel = self._stopwatch.receive(self)
        except OSError as error:
            self.broken(error)
            return
        closed = not data
        if self.tls and data:
            try:
                data, closed = self.tls.open(data)
            except OSError as error:  # ssl.SSLError is one
                self.broken(error)
                return
        if data and self.call:
            self.keep(data, stamp_ns, by_kernel)
            self.parse()
        elif data:  # nobody has asked
            closed = True
        if closed:
            self.ended()

    def keep(self, data: bytes, stamp_ns: int, by_kernel: bool) -> None:
        self.stamps.append(stamp_ns)
        self.pieces.append(data)
        self.unstamped += not by_kernel
        if self.call:
            self.call.newest_ns = stamp_ns
            if self._stopwatch.held_up():
                self.call.late.add(stamp_ns)

    def parse(self) -> None:
        """Take what has gathered through HTTP; the call may end by it."""
        call, stamps, pieces = self.call, self.stamps, self.pieces
        self.stamps, self.pieces = [], []
        self.hold = HELD_READS if self._chunked else 1
        if call is not None:
            call.reply.reads += len(pieces)
            call.reply.kernel_reads += len(pieces) - self.unstamped
        self.unstamped = 0
        error: Optional[CallError] = None
        try:
            taken = self._one_chunk_each(call, stamps, pieces) if self._at_chunk and call else 0
            for self._stamp_ns, piece in zip(stamps[taken:], pieces[taken:]):
                if self._complete:  # more than one reply: the next call would get the rest of it
                    self._keep = False
                    break
                rest = self._whole_chunks(call, piece) if self._at_chunk and call else piece
                if rest:
                    self._at_chunk = False
                    self._parser.feed_data(rest)
        except CallError as raised:
            error = raised
        except Exception as raised:  # the parser's own errors, of a module that may be absent
            inner = raised.__context__
            error = inner if isinstance(inner, CallError) else CallError("bad_http", f"not an HTTP/1 reply: {raised}")
        if self._complete:
            self._keep = self._keep and error is None
            self._finish(None)
        elif error is not None:
            self._finish(error)

    def _one_chunk_each(self, call: Call, stamps: Sequence[int], pieces: Sequence[bytes]) -> int:
        """Take the reads at the start that are one whole HTTP chunk each; how many there were."""
        bodies = []
        for piece in pieces:
            line_end = piece.find(b"\r\n", 0, 10)
            size = _CHUNK_SIZES.get(piece[: max(0, line_end)])
            if not size or size != len(piece) - line_end - 4 or not piece.endswith(b"\r\n"):
                break
            bodies.append(piece[line_end + 2 : -2])
        return len(bodies) if bodies and call.plain_bodies(stamps[: len(bodies)], bodies) else 0

    def _whole_chunks(self, call: Call, piece: bytes) -> bytes:
        """Take whole HTTP chunks off the start of a read, without a parser; what is left is for the parser.

        A read of a stream is nearly always whole chunks, and one `find` costs a twentieth of a parser's calls
        (with h11 a fiftieth). The last chunk, trailers and anything odd stay with the parser, which stands
        between two chunks and so misses nothing.
        """
        at, length = 0, len(piece)
        while at < length:
            line_end = piece.find(b"\r\n", at, at + 10)
            digits = piece[at:line_end] if line_end > 0 else b""
            if not digits.isalnum():
                break
            try:
                end = line_end + 2 + int(digits, 16)
            except ValueError:
                break
            if end == line_end + 2 or piece[end : end + 2] != b"\r\n":
                break
            call.body(self._stamp_ns, piece[line_end + 2 : end])
            at = end + 2
        return piece[at:]

    # --- what the parser calls ---

    def on_message_begin(self) -> None:
        if self._complete:  # a second reply to one request: the next call would get it
            self._keep = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        call, status = self.call, self._parser.get_status_code()
        if call is None or status < 200 or self._complete:
            return
        headers = self._headers
        self._chunked = self._at_chunk = b"chunked" in headers.get(b"transfer-encoding", b"").lower()
        self._delimited = self._chunked or b"content-length" in headers or status in (204, 304)
        self._keep = self._delimited and self._parser.should_keep_alive()
        self.hold = self._first_hold if self._chunked else 1
        encoding, *others = (headers.get(name, b"").decode("latin-1").strip() for name in KEPT_HEADERS)
        call.head(status, encoding.lower(), *others)

    def on_body(self, data: bytes) -> None:
        self._at_chunk = False
        if self.call is not None and not self._complete:
            self.call.body(self._stamp_ns, data)

    def on_chunk_complete(self) -> None:
        self._at_chunk = True

    def on_message_complete(self) -> None:
        self._at_chunk = False
        if self._parser.get_status_code() < 200:
            self._headers = {}
        else:
            self._complete = True

    # --- ends ---

    def ended(self) -> None:
        """The other side has closed."""
        if self.call is not None and self.pieces:
            self.parse()
        call = self.call
        if call is None:
            self._stopwatch.discard(self)
        elif call.reply.http_status is not None and not self._delimited:
            self._finish(None)
        elif call.reply.reads == 0:
            self._stopwatch.ignore(self)
            self._closed_unanswered(call)
        else:
            self._finish(CallError("cut", f"the connection was closed within the reply, after {call.size} bytes"))

    def _closed_unanswered(self, call: Call) -> None:
        """Closed without a reply: by a server that had read the request, or by one that never will?

        One that has read everything ends its connection in order, however it fails. One that has not answers with a
        reset, within one round trip: at once, or right behind the end that was under way when the request was sent.
        """
        if self.call is not call:  # out of time meanwhile
            return
        taken = tcp_info(self.sock, TCP_UNACKNOWLEDGED) == 0
        reset = self._refused or self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0
        if reset or taken or not call.may_be_unread():
            why = "closed", "the server closed the connection without a reply"
            self._finish(CallError(*why), unread=reset and call.may_be_unread())
        else:
            self._stopwatch.loop.call_later(STALE_S / 200, self._closed_unanswered, call)

    def broken(self, error: OSError) -> None:
        """What the system said instead of reading or writing; that there is nothing to read is no trouble."""
        if isinstance(error, (BlockingIOError, InterruptedError)):
            return
        if self.call is not None and self.pieces:
            self.parse()
        if self.call is None:
            self._stopwatch.discard(self)
        else:
            failed = CallError(*classify(error))
            self._finish(failed, unread=failed.failure.kind == "reset" and self.call.may_be_unread())

    def _finish(self, error: Optional[CallError], unread: bool = False) -> None:
        """The reply has ended: the connection, and then the permit, go to whoever is next; an unread request, again."""
        call, done = self.call, self._done
        self.call = self._done = None
        if error is None and self._keep and not self._unsent:
            self._stopwatch.keep(self)
        else:
            self._stopwatch.discard(self)
        if call is None or done is None:
            return
        call.watchdog.stop()
        over_ns = call.newest_ns if self._complete else None  # else the end of the connection has ended it
        call.permits.answered(call, over_ns)
        if unread:
            self._stopwatch.steps.queue(done, False)
            return
        call.is_whole = error is None
        call.free_permit(over_ns if call.is_whole else None)
        self._stopwatch.steps.queue(done, error or True)

    def give_up(self, kind: str, message: str) -> None:
        """Out of time: whatever has arrived is read, and the connection closed."""
        if self.pieces:
            self.parse()
        if self.call is not None:
            self._finish(CallError(kind, message))

    def end_if_complete(self) -> None:
        """The end of the reply is overdue: it is not waited for where nothing of the answer can be missing."""
        if self.pieces:
            self.parse()
        if self.call is not None and self.call.settled:
            self._finish(CallError("no_end", "a complete reply without an end"))

    def abandon(self) -> None:
        """The caller has left."""
        if self.call is not None:
            self._finish(CallError("aborted", "stopped before the reply had ended"))


KEPT_HEADERS = (b"content-encoding", b"retry-after", b"location")


def _reason(error: BaseException) -> str:
    wrapped = getattr(error, "reason", None)  # by urllib
    error = wrapped if isinstance(wrapped, BaseException) else error
    return f"{getattr(error, 'strerror', None) or str(error) or type(error).__name__}"


class SelectorPoller(selectors.DefaultSelector):
    """Says which connections are ready."""

    def ready(self) -> list[tuple[Connection, int]]:
        return [(key.data, mask) for key, mask in self.select(0)]


class EpollPoller:
    """The same on Linux, at half the cost per event; its flags for reading and writing are its own."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._connections: dict[int, Connection] = {}
        self.fileno, self.close = self._epoll.fileno, self._epoll.close

    def register(self, sock: socket.socket, _: int, connection: Connection) -> None:
        self._epoll.register(sock, select.EPOLLIN)
        self._connections[sock.fileno()] = connection

    def modify(self, sock: socket.socket, mask: int, _: Connection) -> None:
        flags = (select.EPOLLIN if mask & _READABLE else 0) | (select.EPOLLOUT if mask & _WRITABLE else 0)
        self._epoll.modify(sock, flags)

    def unregister(self, sock: socket.socket) -> None:
        self._epoll.unregister(sock)
        del self._connections[sock.fileno()]

    def ready(self) -> list[tuple[Connection, int]]:
        found = self._connections
        return [(found[fd], _MASK_OF[flags]) for fd, flags in self._epoll.poll(0, len(found) or 1)]


# By epoll's flags, of which 4 is EPOLLOUT; trouble of any kind is found out by reading.
_MASK_OF = tuple((_WRITABLE if flags & 4 else 0) | (_READABLE if flags & ~4 else 0) for flags in range(64))


class Stopwatch:
    """Sends requests over kept sockets and keeps every arrival with the kernel's stamp.

    No coroutine wakes per packet: all sockets hang on one poller, which the event loop watches. When many
    streams are in flight it is looked at in ticks instead, because the stamps are the kernel's anyway.
    """

    def __init__(self, origin: Origin, timeouts: Timeouts, streamed: bool) -> None:
        self.loop = asyncio.get_running_loop()
        self.steps = StepQueue(self.loop)
        self.connections = 0  # opened so far
        self.new_parser = http_parsers()
        self._buffer = memoryview(bytearray(READ_BUFFER_BYTES))
        self._buffers = [self._buffer]
        self._clock = KernelClock()
        self._reads = 0
        self._origin = origin
        self._tls_context = tls_context(origin) if origin.tls else None
        self._timeouts = timeouts
        self._streamed = streamed
        self._poller: Any = EpollPoller() if hasattr(select, "epoll") else SelectorPoller()
        self._addresses: list[Any] = []
        self._connecting = asyncio.Semaphore(CONNECTS_AT_ONCE)
        self._idle: list[Connection] = []
        self._all: set[Connection] = set()
        self._opening = 0
        self._tick_s = 0.0
        self._window = (time.perf_counter(), 0)
        self._tick_handle: Optional[asyncio.TimerHandle] = None
        self._alive_ns = time.perf_counter_ns()  # when the event loop last was in time, as far as is known
        self._beat_handle = self.loop.call_later(BEAT_S, self._beat)
        self.loop.add_reader(self._poller.fileno(), self._read_ready)
        self._sweep_handle = self.loop.call_later(END_GRACE_S / 2, self._sweep)

    @staticmethod
    def missing() -> str:
        """What it lacks on this machine; empty when it can run."""
        able = hasattr(selectors.DefaultSelector, "fileno") and hasattr(socket.socket, "recvmsg_into")
        return "" if able else "a system with epoll or kqueue"

    # --- one call ---

    async def perform(self, call: Call) -> None:
        """Wait for the permit, send, wait for the whole reply. Raises CallError, or NotSent when the run ended."""
        if not call.permits.is_open and self.connections:
            await self._connect_ahead(call.permits.total or 0)
        done: asyncio.Future[bool] = self.loop.create_future()
        grant = partial(self._start, call, done)
        call.turn.acquire(grant)
        try:
            if await done:
                return
            call.reply.reconnects += 1
            again: asyncio.Future[bool] = self.loop.create_future()
            await self._connect_and_carry(call, again)
            await again
        except asyncio.CancelledError:
            call.permits.withdraw(grant)
            for connection in [connection for connection in self._all if connection.call is call]:
                connection.abandon()
            raise

    def _start(self, call: Call, done: asyncio.Future[bool], free_ns: Optional[int]) -> None:
        """Called with the permit: send at once where a connection is open."""
        if free_ns is None or done.done():
            if free_ns is not None:
                call.turn.release(free_ns)
            elif not done.done():
                call.dropped = True
                done.set_exception(NotSent())
            return
        call.reply.free_ns = free_ns
        call.watchdog = Watchdog(self.loop, self._timeouts)
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed:
                call.reply.new_connection = False
                connection.carry(call, done)
                return
        task = asyncio.ensure_future(self._connect_and_carry(call, done))
        done.add_done_callback(lambda _: task.cancel())

    async def _connect_and_carry(self, call: Call, done: asyncio.Future[bool]) -> None:
        call.reply.new_connection = True
        begun_ns = time.perf_counter_ns()
        try:
            connection = await self._connect()
        except BaseException as error:
            call.free_permit()
            if not isinstance(error, CallError):  # cancelled: the caller has left
                raise
            self.steps.queue(done, error)
            return
        call.reply.connect_ns = (call.reply.connect_ns or 0) + time.perf_counter_ns() - begun_ns
        call.reply.syn_resent += tcp_info(connection.sock, TCP_RESENT) or 0
        connection.carry(call, done)

    async def _connect_ahead(self, total: int) -> None:
        """Before the first permit: one of the connections that the run will need, where one is missing."""
        if len(self._all) + self._opening >= total:
            return
        self._opening += 1
        try:
            async with self._connecting:
                self._idle.insert(0, await self._connect())
        except CallError:
            pass  # its own attempt will say why
        finally:
            self._opening -= 1

    async def _connect(self) -> Connection:
        limit_s = min(self._timeouts.connect_s, self._timeouts.total_s)
        try:
            sock, tls = await asyncio.wait_for(self._open(), limit_s)
        except asyncio.TimeoutError:
            raise CallError("connect_timeout", f"no connection within {limit_s:g} s") from None
        except OSError as error:
            raise CallError(*classify(error)) from None
        connection = Connection(self, sock, tls, self.connections)
        self.connections += 1
        self._all.add(connection)
        self._poller.register(sock, _READABLE, connection)
        return connection

    async def _open(self) -> tuple[socket.socket, Optional[Tls]]:
        if not self._addresses:
            origin = self._origin
            self._addresses = await self.loop.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
        race = len(self._addresses) > 1
        sock = await (self._race(list(self._addresses)) if race else self._dial(self._addresses[0]))
        try:
            tls = None
            if self._tls_context is not None:
                tls = Tls(self._tls_context, self._origin.host)
                await tls.handshake(self.loop, sock)
            if sys.platform == "linux":  # elsewhere the time of the read has to do
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        except BaseException:
            sock.close()
            raise
        return sock, tls

    async def _race(self, addresses: Sequence[Any]) -> socket.socket:
        """The first connection of several addresses, each tried when the one before has failed or is slow to answer.

        Whichever answers is asked first from then on. (Event loops can do it, too, but uvloop cannot.)
        """
        waiting, refusal = list(addresses), OSError("no address")
        attempts: dict[asyncio.Future[socket.socket], Any] = {}
        try:
            while waiting or attempts:
                if waiting:
                    address = waiting.pop(0)
                    attempts[asyncio.ensure_future(self._dial(address))] = address
                limit_s = NEXT_ADDRESS_S if waiting else None
                done, _ = await asyncio.wait(attempts, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
                for attempt in done:
                    address = attempts.pop(attempt)
                    try:
                        sock: socket.socket = attempt.result()
                    except OSError as error:
                        refusal = error
                        continue
                    self._addresses = [address, *(other for other in addresses if other != address)]
                    return sock
            raise refusal
        finally:
            for attempt in attempts:
                attempt.add_done_callback(_close_what_came)
                attempt.cancel()

    async def _dial(self, address: Any) -> socket.socket:
        family, kind, proto, _, place = address
        sock = socket.socket(family, kind, proto)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self.loop.sock_connect(sock, place)
        except BaseException:
            sock.close()
            raise
        return sock

    # --- what connections ask for ---

    def watch(self, connection: Connection, mask: int) -> None:
        if not connection.closed:
            self._poller.modify(connection.sock, mask, connection)

    def keep(self, connection: Connection) -> None:
        self._idle.append(connection)

    def ignore(self, connection: Connection) -> None:
        """It has nothing more to say."""
        with contextlib.suppress(KeyError, ValueError, OSError):
            self._poller.unregister(connection.sock)

    def discard(self, connection: Connection) -> None:
        if connection.closed:
            return
        connection.closed = True
        self.ignore(connection)
        connection.sock.close()
        self._all.discard(connection)
        with contextlib.suppress(ValueError):
            self._idle.remove(connection)

    def receive(self, connection: Connection) -> tuple[bytes, int, bool]:
        """(bytes, stamp in ns of perf_counter, whether the kernel gave it); raises as recvmsg does."""
        count, ancillary, _, _ = connection.receive(self._buffers, _ANCILLARY_BYTES)
        call = connection.call
        floor_ns = (call.newest_ns or call.reply.sent_ns or 0) if call else 0
        return (bytes(self._buffer[:count]), *self._clock.stamp(ancillary, floor_ns))

    # --- reading ---

    def _read_ready(self) -> None:
        """Read every socket that has something, and only then parse what may have ended.

        Streams in step all speak at once: whatever is done between two reads keeps the later ones waiting, and a
        read that waits for a whole gap holds two tokens under one stamp. So the plain case is written out here.
        """
        looked_ns = time.perf_counter_ns()
        self._clock.read_both()
        ready = self._poller.ready()
        self._reads += len(ready)
        offset_ns, buffer, buffers, now = self._clock.offset_ns, self._buffer, self._buffers, time.perf_counter_ns
        unparsed, late_ns = [], self._alive_ns + LATE_READ_NS
        for connection, mask in ready:
            call = connection.call
            if mask != _READABLE or connection.tls is not None or call is None:
                connection.ready(mask)
                continue
            try:
                size, ancillary, _, _ = connection.receive(buffers, _ANCILLARY_BYTES)
            except OSError as error:
                connection.broken(error)
                continue
            if not size:
                connection.ended()
                continue
            data = bytes(buffer[:size])
            floor_ns = call.newest_ns or call.reply.sent_ns or 0
            stamp_ns = 0
            if ancillary and len(ancillary[0][2]) == _TIMESPEC_BYTES:
                seconds, nanoseconds = _unpack_timespec(ancillary[0][2])
                stamp_ns = seconds * 1_000_000_000 + nanoseconds - offset_ns
            now_ns = now()
            if not floor_ns <= stamp_ns <= now_ns:
                stamp_ns, by_kernel = self._clock.stamp(ancillary, floor_ns)
                connection.unstamped += not by_kernel
            call.newest_ns = stamp_ns
            if now_ns > late_ns:
                call.late.add(stamp_ns)
            connection.stamps.append(stamp_ns)
            connection.pieces.append(data)
            if (
                len(connection.pieces) >= connection.hold
                or data.endswith(_MESSAGE_END)
                or not len(_MESSAGE_END) <= size < LARGE_READ_BYTES
            ):
                unparsed.append(connection)
        self._alive_ns = looked_ns
        for connection in unparsed:
            connection.parse()
        self._adapt()

    def _beat(self) -> None:
        """Every few milliseconds: shows that the event loop is in time, also while nothing arrives."""
        self._beat_handle = self.loop.call_later(BEAT_S, self._beat)
        if self.held_up():
            self._read_ready()  # before the loop counts as being in time again
        self._alive_ns = time.perf_counter_ns()

    def held_up(self) -> bool:
        """Whether what is read now may have queued up, because the event loop had no time for it."""
        return time.perf_counter_ns() - self._alive_ns > LATE_READ_NS

    def _adapt(self) -> None:
        """Choose between reading at once and reading in ticks, by how often a stream speaks."""
        since, reads = self._window
        now = time.perf_counter()
        if now - since < RATE_WINDOW_S:
            return
        rate = (self._reads - reads) / (now - since)
        self._window = (now, self._reads)
        in_flight = len(self._all) - len(self._idle)
        gap_s = in_flight / rate if rate else 0.0
        lazy = self._streamed and in_flight >= LAZY_STREAMS
        tick_s = min(LAZY_TICK_S, gap_s / TICKS_PER_GAP) if lazy else 0.0
        self._set_tick(tick_s if tick_s >= LEAST_TICK_S else 0.0)

    def _set_tick(self, tick_s: float) -> None:
        was, self._tick_s = self._tick_s, tick_s
        if tick_s and not was:
            self.loop.remove_reader(self._poller.fileno())
            self._tick_handle = self.loop.call_later(tick_s, self._tick)
        elif was and not tick_s:
            if self._tick_handle:
                self._tick_handle.cancel()
            self.loop.add_reader(self._poller.fileno(), self._read_ready)

    def _tick(self) -> None:
        self._tick_handle = self.loop.call_later(self._tick_s, self._tick)
        self._read_ready()

    def _sweep(self) -> None:
        """End complete replies whose last chunk does not come: they would hold their permits until --timeout."""
        self._sweep_handle = self.loop.call_later(END_GRACE_S / 2, self._sweep)
        self._read_ready()  # a process that was stopped has it waiting in its sockets
        quiet_ns = time.perf_counter_ns() - int(END_GRACE_S * 1e9)
        for connection in list(self._all):
            if connection.call and connection.call.newest_ns and connection.call.newest_ns < quiet_ns:
                connection.end_if_complete()

    def close(self) -> None:
        self._sweep_handle.cancel()
        self._set_tick(0.0)
        self._beat_handle.cancel()
        self.loop.remove_reader(self._poller.fileno())
        for connection in list(self._all):
            self.discard(connection)
        self._poller.close()


def _close_what_came(attempt: asyncio.Future[socket.socket]) -> None:
    """A connection that came second."""
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().close()


class Watchdog:
    """Ends a call that takes too long: one timer, re-armed at the nearest of the limits."""

    def __init__(self, loop: asyncio.AbstractEventLoop, limits: Timeouts, end_grace_s: float = math.inf) -> None:
        """`end_grace_s`: how long a complete reply may owe its end; infinite where somebody else looks after that."""
        self._loop = loop
        self._limits = limits
        self._end_grace_s = end_grace_s
        self._deadline_s = loop.time() + limits.total_s
        # A limit that starts to run only later (the idle one, with the first byte) is met by looking again.
        self._look_again_s = min(limits.first_byte_s or math.inf, limits.idle_s or math.inf, end_grace_s)
        self._armed_s = loop.time()
        self._excused_ns: Optional[int] = -1  # the newest arrival when lateness was last excused
        self._handle: Optional[asyncio.TimerHandle] = None

    def start(self, call: Call, give_up: Callable[[str, str], None]) -> None:
        """Watch from now on; the whole time counts from when this watchdog was made."""
        self._give_up = give_up
        self._look(call)

    def _look(self, call: Call) -> None:
        now_s = self._loop.time()
        at_s, kind, message = self._deadline_s, "timeout", f"no complete reply within {self._limits.total_s:g} s"
        limit_s, since_ns = self._limits.idle_s, call.newest_ns
        name, what = "idle_timeout", "nothing more"
        if call.newest_ns is None:
            limit_s, since_ns = self._limits.first_byte_s, call.reply.sent_ns
            name, what = "first_byte_timeout", "no byte"
        if limit_s is not None and since_ns is not None:
            quiet_s = (time.perf_counter_ns() - since_ns) / 1e9
            if now_s + limit_s - quiet_s < at_s:
                at_s, kind, message = now_s + limit_s - quiet_s, name, f"{what} for {limit_s:g} s"
        quiet_since_ns = time.perf_counter_ns() - self._end_grace_s * 1e9
        if call.newest_ns is not None and call.newest_ns < quiet_since_ns and call.settled:
            at_s = now_s
        late = now_s - self._armed_s > LATE_LOOP_S and self._excused_ns != call.newest_ns
        if at_s > now_s:
            self._arm(min(at_s, now_s + self._look_again_s), call)
        elif late:  # a loop that was held up has not looked at its sockets either, and does so first
            self._excused_ns = call.newest_ns
            self._arm(now_s + LATE_LOOP_S, call)
        else:
            self._give_up(kind, message)

    def _arm(self, at_s: float, call: Call) -> None:
        self._armed_s = at_s
        self._handle = self._loop.call_at(at_s, self._look, call)

    def stop(self) -> None:
        if self._handle:
            self._handle.cancel()


# What an exception of any transport, or the class that it is one of, is called: an error class of ours.
_ERROR_CLASSES = {
    name: kind
    for kind, names in {
        "dns_error": "gaierror", "tls_error": "SSLError", "connect_refused": "ConnectionRefusedError",
        "connect_timeout": "ConnectTimeout", "connect_error": "ConnectError", "idle_timeout": "ReadTimeout",
        "reset": "ConnectionResetError BrokenPipeError ConnectionAbortedError ReadError",
        "timeout": "WriteTimeout PoolTimeout TimeoutError", "bad_http": "RemoteProtocolError",
    }.items()
    for name in names.split()
}  # fmt: skip
# What httpx says with one and the same class.
_BY_MESSAGE: tuple[tuple[str, str], ...] = (("disconnected without", "closed"), ("peer closed", "cut"))
_NO_FILE = "no free file descriptor: raise `ulimit -n`"
_CLIENT_LIMITS = {
    "EADDRNOTAVAIL": "no free local port: the machine's ephemeral ports are used up; lower --concurrency",
    "EMFILE": _NO_FILE,
    "ENFILE": _NO_FILE,
    "ENOBUFS": "no buffer space left in this machine's kernel; lower --concurrency",
}
_UNREACHABLE = ("ENETUNREACH", "EHOSTUNREACH", "ENETDOWN", "EHOSTDOWN")


def classify(error: BaseException) -> tuple[str, str]:
    """(class, one line) of a failed call; the deepest cause with a name of its own decides."""
    chain: list[BaseException] = []
    seen: Optional[BaseException] = error
    while seen is not None and seen not in chain:
        chain.append(seen)
        seen = seen.__cause__ or seen.__context__
    for cause in chain:
        if isinstance(cause, CallError):
            return cause.failure.kind, cause.failure.message
    if isinstance(chain[-1], (TimeoutError, asyncio.TimeoutError, asyncio.CancelledError)):
        chain = [cause for cause in chain if type(cause).__name__ == "ConnectTimeout"] or chain  # it says which
    for cause in reversed(chain):
        code = errno.errorcode.get(getattr(cause, "errno", None) or 0, "")
        if code in _CLIENT_LIMITS:
            return "client_limit", _CLIENT_LIMITS[code]
        if code in _UNREACHABLE:
            return "unreachable", _reason(cause)
        for base in type(cause).__mro__:
            kind = _ERROR_CLASSES.get(base.__name__)
            if kind:
                return next((told for words, told in _BY_MESSAGE if words in str(cause)), kind), _reason(cause)
    return "other", f"{type(error).__name__}: {_reason(error)}"


# === 10. Sender (how) ===


@dataclass(frozen=True)
class Dialect:
    """What the server takes, as far as the warm-up has found out."""

    limit_field: str = "max_tokens"
    include_usage: bool = True
    continuous_usage: bool = False

    @classmethod
    def before(cls, config: Config) -> Dialect:
        """What is tried first."""
        limit_field = "max_tokens" if config.max_tokens_field == "auto" else config.max_tokens_field
        return cls(limit_field, continuous_usage=config.continuous_usage)

    def __str__(self) -> str:
        usage = "usage in every chunk" if self.continuous_usage else "usage" if self.include_usage else "no usage"
        return f"{self.limit_field}, {usage}"


def request_body(config: Config, dialect: Dialect, request: Request) -> dict[str, Any]:
    """The JSON that is sent: what was asked for, and no field beyond; of two output limits only the nearer one."""
    ours: dict[str, Any] = {"model": config.model}
    if config.stream:
        ours["stream"] = True
        if dialect.include_usage:
            ours["stream_options"] = {"include_usage": True}
            if dialect.continuous_usage:
                ours["stream_options"]["continuous_usage_stats"] = True
    if not request.whole:
        limit = {dialect.limit_field: config.output_tokens}
        ours.update({**limit, "temperature": config.temperature, **config.extra_body})
    if request.output_tokens is not None:
        ours[dialect.limit_field] = request.output_tokens
    if any(name in request.fields for name in OUTPUT_LIMITS):
        ours = {name: value for name, value in ours.items() if name not in OUTPUT_LIMITS}
    return {**ours, **request.fields}


def concede(dialect: Dialect, config: Config, refusals: Sequence[ErrorGroup]) -> Optional[Dialect]:
    """The dialect to try after these refusals; None when they teach nothing.

    Usage is given up in two steps: first the counts in every chunk, which fewer servers know, then all.
    """
    other = {"limit_field": "max_completion_tokens" if config.max_tokens_field == "auto" else dialect.limit_field}
    less = {"continuous_usage": False, "include_usage": dialect.continuous_usage}
    lessons = ("max_tokens|max_completion_tokens", other), ("stream_options|include_usage|continuous_usage", less)
    for group in refusals:
        for words, change in lessons:
            taught = dataclasses.replace(dialect, **change)
            if group.kind in ("http_400", "http_422") and re.search(words, group.first_message) and taught != dialect:
                return taught
    return None


_CALL: contextvars.ContextVar[Call] = contextvars.ContextVar("call")


class Transport(Protocol):
    """How requests reach the server and how arrivals are stamped; the only part that speaks to the SDK."""

    kernel_clock: bool
    name: str

    @property
    def connections(self) -> int:
        """Opened so far."""

    async def exchange(self, body: Mapping[str, Any], turn: Turn) -> Reply:
        """Prepare the request, wait for its turn, send, read the whole reply. Raises NotSent when the run ended."""

    async def aclose(self) -> None: ...


async def settle(call: Call, exchange: Awaitable[None]) -> Reply:
    """Await the exchange and fill in how it ended; never raises for what a server does. Raises NotSent."""
    failure = None
    try:
        await exchange
    except asyncio.CancelledError:
        if call.reply.free_ns is None:
            raise NotSent from None
        if not call.settled:
            failure = Failure("http_error", "aborted", "stopped before the reply had ended")
    except Exception as error:  # whatever a transport raises, the request failed and the run goes on
        if call.dropped:
            raise NotSent from None
        answered = 200 <= (call.reply.http_status or 200) < 300  # else the status says what failed
        if not call.settled and (answered or isinstance(error, CallError)):
            kind, message = classify(error)
            failure = Failure("http_error", kind, plain(message))
    return call.end(failure)


def import_sdk() -> tuple[Any, ModuleType]:
    """(openai, the HTTP library it is built on: httpx for 1.x and 2.x, httpx2 from 3.x on). Raises UserError."""
    try:
        openai: Any = importlib.import_module("openai")
    except ImportError as error:
        raise UserError(f"cannot import openai ({error}): pip install openai") from None
    return openai, importlib.import_module(openai.Timeout.__init__.__module__.partition(".")[0])


class Sdk:
    """AsyncOpenAI, called so that it hands a prepared body on and parses no reply."""

    def __init__(self, config: Config, http_client: Any) -> None:
        openai, _ = import_sdk()
        api_base, login = split_login(config.api_base)
        api_base, query = split_query(api_base)
        # `Omit` leaves a field out; before openai 1.98 it has no public name.
        omit = getattr(openai, "Omit", None) or importlib.import_module("openai._types").Omit
        own_headers = {"Accept-Encoding": "identity", **login, **config.headers}
        self.client = client_class(openai)(
            api_key=config.api_key or "none",
            base_url=api_base,
            max_retries=0,  # retries would be hidden inside a latency
            timeout=config.timeout,
            http_client=http_client,
            default_headers=own_headers,
            default_query=dict(parse_qsl(query, keep_blank_values=True)),
        )
        endpoint = ENDPOINT_TYPES[config.endpoint_type]
        self._absent = {"model": omit(), endpoint.prompt_field: omit()}  # the prepared body has them
        self._left_out = {} if config.stream else {"stream": omit()}
        keyed = config.api_key or "Authorization" in own_headers
        self._no_key = {} if keyed else {"extra_headers": {"Authorization": omit()}}
        self._create = endpoint.create(self.client)

    async def create(self, body: Mapping[str, Any]) -> Any:
        """The SDK's stream object; `stream=True` is the SDK's way to leave the reply unparsed."""
        return await self._create(**self._absent, stream=True, extra_body={**body, **self._left_out}, **self._no_key)


def client_class(openai: Any) -> Any:
    """AsyncOpenAI that works out its URL and its headers once: they are the same for every request of a run.

    Both methods are the SDK's inner ones. They are overridden because that saves 107 us (URL) and 71 us (headers)
    of the 462 us that a request takes otherwise; in a version without them nothing is kept, and nothing breaks.
    """

    class Client(openai.AsyncOpenAI):  # type: ignore[misc]
        def _prepare_url(self, url: str) -> Any:
            kept = self.__dict__.setdefault("_kept", {})
            if url not in kept:
                kept[url] = super()._prepare_url(url)
            return kept[url]

        def _build_headers(self, options: Any, **more: Any) -> Any:
            kept = self.__dict__.setdefault("_kept", {})
            if "headers" not in kept:
                kept["headers"] = super()._build_headers(options, **more)
            return kept["headers"]

    return Client


class StopwatchTransport:
    """Sends what the SDK has built over sockets of our own, whose arrivals the kernel stamps."""

    def __init__(self, config: Config) -> None:
        self._reader = reader_of(config)
        self._stopwatch = Stopwatch(origin_of(config), timeouts_of(config), config.stream)
        self._sdk = Sdk(config, self._http_client())
        self.kernel_clock = sys.platform == "linux"
        self.name = f"stopwatch ({type(self._stopwatch.loop).__module__.partition('.')[0]})"

    @property
    def connections(self) -> int:
        return self._stopwatch.connections

    async def exchange(self, body: Mapping[str, Any], turn: Turn) -> Reply:
        await self._stopwatch.steps.turn()
        call = Call(self._reader, turn)
        _CALL.set(call)
        return await settle(call, self._sdk.create(body))

    def _http_client(self) -> Any:
        """An HTTP client of the SDK's own kind, two public methods overridden: to build a request, and to send it."""
        _, httpx = import_sdk()
        stopwatch = self._stopwatch
        kept: dict[Any, tuple[Any, Any, bytes]] = {}  # one entry: method, URL and headers are every request's

        class Client(httpx.AsyncClient):  # type: ignore[name-defined, misc]
            def build_request(self, method: str, url: Any, **parts: Any) -> Any:
                content, headers = parts.get("content"), parts.get("headers") or {}
                if content is None:
                    content = json.dumps(parts.get("json"), ensure_ascii=False, separators=(",", ":")).encode()
                pairs = headers if isinstance(headers, list) else list(headers.items())
                key = (method, url, tuple(pairs))  # the query is the client's own, and so the same for all
                if key not in kept:
                    kept.clear()
                    request = httpx.Request(method, url, params=parts.get("params"), headers=pairs)
                    head = http_head(method, str(request.url), pairs)
                    kept[key] = request, httpx.Response(200, request=request), head
                request, _, head = kept[key]
                _CALL.get().payload = b"%sContent-Length: %d\r\n\r\n%s" % (head, len(content), content)
                return request

            async def send(self, request: Any, **_: Any) -> Any:
                call = _CALL.get()
                await stopwatch.perform(call)
                status = call.reply.http_status or 0
                if 200 <= status < 300:
                    return next(iter(kept.values()))[1]
                return httpx.Response(status, content=bytes(call.error_body), request=request)

        return Client(timeout=None, trust_env=False)

    async def aclose(self) -> None:
        await self._sdk.client.close()
        self._stopwatch.close()


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
    """The SDK's own HTTP client, for proxies and for systems without epoll or kqueue.

    Stamps are those of the read, and a request is built when its permit is free, not before: its connection pool
    drops connections that have been idle for seconds.
    """

    kernel_clock = False
    name = "sdk (httpx)"

    def __init__(self, config: Config, concurrency: Optional[int], trust_env: bool) -> None:
        self.connections = 0
        self._reader = reader_of(config)
        self._timeouts = timeouts_of(config)
        origin = origin_of(config)
        _, httpx = import_sdk()
        bounds = dict.fromkeys(("max_connections", "max_keepalive_connections"), concurrency)
        limits = httpx.Limits(**bounds, keepalive_expiry=4.0)  # below the 5 s after which the usual servers close
        verify = tls_context(origin) if origin.tls else False
        options = {"limits": limits, "trust_env": trust_env, "follow_redirects": False, "verify": verify}
        self._sdk = Sdk(config, self._http_client(httpx)(**options))

    async def exchange(self, body: Mapping[str, Any], turn: Turn) -> Reply:
        call = Call(self._reader, turn)
        return await settle(call, asyncio.ensure_future(self._ask(call, body)))

    def _watch(self, call: Call) -> Watchdog:
        """From the permit on; the limits end the task that runs this."""
        asking = asyncio.current_task()

        def give_up(kind: str, message: str) -> None:
            if not call.settled:
                call.failure = Failure("http_error", kind, message)
            if asking:
                asking.cancel()

        watchdog = Watchdog(asyncio.get_running_loop(), self._timeouts, END_GRACE_S)
        watchdog.start(call, give_up)
        return watchdog

    async def _ask(self, call: Call, body: Mapping[str, Any]) -> None:
        _CALL.set(call)
        try:
            call.reply.free_ns = await call.turn.wait()
        except NotSent:
            call.dropped = True
            raise
        watchdog = self._watch(call)
        try:
            await self._read(call, await self._create(call, body))
        finally:
            watchdog.stop()
            call.permits.answered(call)
            call.free_permit()

    async def _create(self, call: Call, body: Mapping[str, Any]) -> Any:
        """The SDK's stream; asked for again as long as a kept connection turns out to have been closed before."""
        while True:
            try:
                return await self._sdk.create(body)
            except Exception as error:
                if classify(error)[0] != "reset" or not call.may_be_unread():
                    raise
                call.reply.reconnects += 1

    async def _trace(self, event: str, _: Mapping[str, Any]) -> None:
        """What the HTTP client tells of a request on its way: connecting, ready to write, written."""
        call, now_ns = _CALL.get(), time.perf_counter_ns()
        reply = call.reply
        if event == "connection.connect_tcp.started":
            self.connections += 1
            reply.new_connection = True
        elif event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            reply.connect_ns = now_ns - (reply.sent_ns or now_ns)  # as yet the time at which it was handed over
        elif event == "http11.send_request_headers.started" and not reply.reconnects:
            reply.ready_ns = now_ns
        elif event == "http11.send_request_body.complete":
            reply.sent_ns = now_ns
            call.permits.sent(call)

    def _http_client(self, httpx: ModuleType) -> Any:
        # Of its own time-outs only the one to connect: the watchdog has the others, as in the stopwatch.
        limits = {"connect": self._timeouts.connect_s, "read": None, "write": None, "pool": None}
        own = {"timeout": limits, "trace": self._trace}

        class Client(httpx.AsyncClient):  # type: ignore[name-defined, misc]
            async def send(self, request: Any, **options: Any) -> Any:
                call = _CALL.get()
                request.extensions = {**request.extensions, **own}
                call.reply.new_connection = False
                call.reply.ready_ns = call.reply.sent_ns = time.perf_counter_ns()
                response = await super().send(request, **{**options, "stream": True})
                call.newest_ns = time.perf_counter_ns()
                call.reply.reads += 1
                call.head(response.status_code, *(response.headers.get(name.decode(), "") for name in KEPT_HEADERS))
                if 200 <= response.status_code < 300:
                    return response
                call.error_body += await start_of(response)
                return httpx.Response(response.status_code, content=bytes(call.error_body), request=request)

        return Client

    async def _read(self, call: Call, stream: Any) -> None:
        arrivals = stream.response.aiter_raw()
        try:
            async for data in arrivals:
                call.newest_ns = stamp_ns = time.perf_counter_ns()
                call.reply.reads += 1
                call.body(stamp_ns, data)
            call.is_whole = True
        finally:  # else a reply that is not read to its end keeps its connection
            await arrivals.aclose()
            await stream.response.aclose()

    async def aclose(self) -> None:
        await self._sdk.client.close()


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


def origin_of(config: Config) -> Origin:
    return Origin.of(config.api_base, config.ca_file, config.insecure)


def timeouts_of(config: Config) -> Timeouts:
    return Timeouts(config.connect_timeout, config.first_byte_timeout, config.idle_timeout, config.timeout)


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
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class RoundRobin:
    """Several servers, asked in turn, each through a transport of its own."""

    def __init__(self, transports: Sequence[tuple[str, Transport]], first: int) -> None:
        """`first`: whose turn is first, so that several processes do not all begin at the same server."""
        self._transports = [transport for _, transport in transports]
        self._turn = itertools.islice(itertools.cycle(transports), first, None)
        self.kernel_clock = all(transport.kernel_clock for transport in self._transports)
        self.name = "/".join(sorted({transport.name for transport in self._transports}))

    @property
    def connections(self) -> int:
        return sum(transport.connections for transport in self._transports)

    async def exchange(self, body: Mapping[str, Any], turn: Turn) -> Reply:
        name, transport = next(self._turn)
        reply = await transport.exchange(body, turn)
        reply.server = name
        return reply

    async def aclose(self) -> None:
        for transport in self._transports:
            await transport.aclose()


def open_transport(config: Config, concurrency: Optional[int], first: int = 0) -> Transport:
    """The transport in force. Raises UserError when the one asked for cannot run here."""
    if len(config.servers) > 1:
        each = [dataclasses.replace(config, api_base=url, servers=[url]) for url in config.servers]
        return RoundRobin([(Redactor.url(one.api_base), open_transport(one, concurrency)) for one in each], first)
    proxy = proxy_for(config.api_base)
    missing = f"a direct way: {Redactor.url(proxy)} is the proxy" if proxy else Stopwatch.missing()
    if config.transport == "stopwatch" and missing:
        raise UserError(f"--transport stopwatch needs {missing}; --transport sdk does without")
    if config.transport == "sdk" or missing:
        return SdkTransport(config, concurrency, trust_env=proxy is not None)
    return StopwatchTransport(config)


_NOT_TLS = re.compile("wrong version number|record layer|packet length|closed during the TLS handshake", re.IGNORECASE)


def advice(failure: Failure, config: Config, environ: Mapping[str, str]) -> str:
    """What a user can do about a failure that an option explains; empty for any other."""
    if failure.kind == "http_404" and "/v" not in urlsplit(config.api_base).path:
        return "does --api-base lack its /v1?"
    if failure.kind in ("http_401", "http_403"):
        given = environ.get("OPENAI_API_KEY")
        source = "--api-key" if given or config.api_key != DEFAULT_API_KEY else "the default: no $OPENAI_API_KEY"
        return f"the key was that of {'$OPENAI_API_KEY' if config.api_key == given else source}"
    if failure.kind != "tls_error":
        return ""
    if _NOT_TLS.search(failure.message):
        return "the port seems not to speak TLS: http:// instead of https://?"
    return "" if config.insecure else "--ca-file FILE trusts a private authority, --insecure trusts anybody"


class Sender:
    """Asks the server one request at a time in the dialect it takes, and blanks secrets in what it says."""

    def __init__(self, config: Config, concurrency: Optional[int], first: int = 0) -> None:
        """`first`: at which of several servers it begins."""
        self.transport = open_transport(config, concurrency, first)
        self.dialect = Dialect.before(config)
        self._config = config
        self._redactor = Redactor.of(config, os.environ)

    async def __call__(self, request: Request, turn: Turn) -> Reply:
        body = request_body(self._config, self.dialect, request)
        reply = await self.transport.exchange(body, turn)
        reply.label, reply.session, reply.turn = request.label, request.session, request.turn
        reply.later_turns = len(request.turns) - (request.turn or 0)
        if reply.failure:
            reply.failure = reply.failure._replace(message=self._explained(reply.failure, body))
        if reply.finish_reason and reply.finish_reason not in ("stop", "length", "tool_calls"):
            reply.finish_reason = self._without_secrets(plain(reply.finish_reason, 40), body)
        return reply

    def _without_secrets(self, text: str, body: Mapping[str, Any]) -> str:
        named: list[str] = []
        Redactor.fields(body, found=named)
        return Redactor([*named, *(word.rpartition(" ")[2] for word in named)]).text(self._redactor.text(text))

    def _explained(self, failure: Failure, body: Mapping[str, Any]) -> str:
        """Without secrets, as some servers say which key they did not like; the cure behind, where there is one."""
        message, cure = self._without_secrets(failure.message, body), advice(failure, self._config, os.environ)
        return f"{message[: ERROR_TEXT_CHARS - len(cure) - 2]}; {cure}" if cure else message


# === 11. Server's own figures (parse pure, fetch not) ===

# What each server calls its figures on its metrics page, newest name first. Of counters the growth over the point
# counts, of gauges the value, of durations the growth of `_sum` over that of `_count`.
SERVER_DIALECTS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "vLLM": ("vllm:", {  # demo_server.py speaks it, too
        "prompt_tokens": "prompt_tokens_total", "generated_tokens": "generation_tokens_total",
        "cache_queries": "prefix_cache_queries_total gpu_prefix_cache_queries_total",
        "cache_hits": "prefix_cache_hits_total gpu_prefix_cache_hits_total", "preemptions": "num_preemptions_total",
        "drafts": "spec_decode_num_drafts_total", "accepted": "spec_decode_num_accepted_tokens_total",
        "running": "num_requests_running", "waiting": "num_requests_waiting",
        "kv_cache": "kv_cache_usage_perc gpu_cache_usage_perc",
        "queue": "request_queue_time_seconds", "ttft": "time_to_first_token_seconds",
        "tpot": "request_time_per_output_token_seconds",
        "itl": "inter_token_latency_seconds time_per_output_token_seconds", "e2el": "e2e_request_latency_seconds",
    }),
    "SGLang": ("sglang:", {
        "prompt_tokens": "prompt_tokens_total", "generated_tokens": "generation_tokens_total",
        "cache_queries": "prompt_tokens_total", "cache_hits": "cached_tokens_total",
        "preemptions": "num_retracted_requests_total", "acceptance_length": "spec_accept_length",
        "running": "num_running_reqs", "waiting": "num_queue_reqs", "kv_cache": "token_usage",
        "queue": "queue_time_seconds", "ttft": "time_to_first_token_seconds",
        "itl": "inter_token_latency_seconds time_per_output_token_seconds", "e2el": "e2e_request_latency_seconds",
    }),
    "TGI": ("tgi_", {
        "prompt_tokens": "request_input_length_sum", "generated_tokens": "request_generated_tokens_sum",
        "running": "batch_current_size", "waiting": "queue_size", "queue": "request_queue_duration",
        "tpot": "request_mean_time_per_token_duration", "e2el": "request_duration",
    }),
    "llama.cpp": ("llamacpp:", {
        "computed_prompt_tokens": "prompt_tokens_total",  # without those that its cache had
        "generated_tokens": "tokens_predicted_total", "kv_cache": "kv_cache_usage_ratio",
        "drafts": "spec_decode_num_drafts_total", "accepted": "spec_decode_num_accepted_tokens_total",
        "running": "requests_processing", "waiting": "requests_deferred",
    }),
    "TensorRT-LLM": ("trtllm_ trtllm:", {
        "prompt_tokens": "prompt_tokens_total", "generated_tokens": "generation_tokens_total",
        "cache_queries": "prompt_tokens_total", "cache_hits": "prompt_cached_tokens_total",
        "acceptance_length": "spec_decode_acceptance_length", "kv_cache": "kv_cache_utilization",
        "running": "num_requests_running", "waiting": "num_requests_waiting",
        "queue": "request_queue_time_seconds", "ttft": "time_to_first_token_seconds",
        "tpot": "time_per_output_token_seconds", "e2el": "e2e_request_latency_seconds",
    }),
    "Dynamo": ("dynamo_frontend_", {  # what it calls queued includes the prefill, so it is no waiting
        "prompt_tokens": "input_sequence_tokens_sum", "cache_queries": "input_sequence_tokens_sum",
        "generated_tokens": "output_tokens_total output_sequence_tokens_sum", "cache_hits": "cached_tokens_sum",
        "running": "active_requests inflight_requests", "ttft": "time_to_first_token_seconds",
        "itl": "inter_token_latency_seconds", "e2el": "request_duration_seconds",
    }),
}  # fmt: skip
SERVER_COUNTS = ("prompt_tokens", "computed_prompt_tokens", "generated_tokens", "preemptions")
SERVER_GAUGES = ("running", "waiting", "kv_cache", "acceptance_length")
SERVER_DURATIONS = ("queue", "ttft", "tpot", "itl", "e2el")
SERVER_SERIES = ("running", "waiting", "kv_cache", "acceptance_length", "generated_tokens")  # kept during the point
NOT_ADDED_UP = ("kv_cache", "acceptance_length")  # over engines and replicas: the greatest

_SAMPLE_LINE = re.compile(r'([a-zA-Z_:][\w:]*)(?:\{((?:[^"}]|"(?:[^"\\]|\\.)*")*)\})?[ \t]+(\S+)(?:[ \t]+-?\d+)?\s*')
_OTHER_RANK = re.compile(r'\b[tp]p_rank="[1-9]')  # of one engine: it repeats what rank 0 says


def parse_metrics(text: str) -> dict[str, list[float]]:
    """Every sample of a page in Prometheus's text format, by name: a value per set of labels. Raises ValueError.

    Strict, so that no other page passes for one; small, so that nothing has to be installed for it.

    >>> parse_metrics('# TYPE a counter\\na_total{model="x}",rank="0"} 2\\na_total{model="y"} 3 1700000000000')
    {'a_total': [2.0, 3.0]}
    """
    found: dict[str, list[float]] = {}
    for line in text.split("\n"):
        if line.strip() and not line.startswith("#"):
            match = _SAMPLE_LINE.fullmatch(line)
            if not match:
                raise ValueError(f"no Prometheus text: {plain(line, 40)!r}")
            value = float(match[3])
            if math.isfinite(value) and not _OTHER_RANK.search(match[2] or ""):
                found.setdefault(match[1], []).append(value)
    return found


def page_figures(text: str) -> tuple[str, dict[str, float]]:
    """(the dialect of a metrics page, its figures). Raises ValueError where none is known."""
    samples = parse_metrics(text)
    for dialect, (prefixes, figures) in SERVER_DIALECTS.items():
        found = {}
        for figure, names in figures.items():
            for part in ("_sum", "_count") if figure in SERVER_DURATIONS else ("",):
                known = (f"{prefix}{name}{part}" for name in names.split() for prefix in prefixes.split())
                values = next((samples[name] for name in known if name in samples), [])
                if values:
                    found[figure + part] = max(values) if figure in NOT_ADDED_UP else math.fsum(values)
        if found:
            return dialect, found
    raise ValueError(f"it has no figures of {', '.join(SERVER_DIALECTS)}")


def added_up(pages: Iterable[tuple[str, Mapping[str, float]]]) -> dict[str, float]:
    """Several pages as one. Pages of one dialect are replicas; those of another count the same requests again (a
    router and its engines), so a figure is taken from the dialect of the first page that has it."""
    dialects: dict[str, str] = {}
    total: dict[str, float] = {}
    for dialect, figures in pages:
        for figure, value in figures.items():
            if dialects.setdefault(figure, dialect) == dialect:
                before = total.get(figure, 0.0)
                total[figure] = max(before, value) if figure in NOT_ADDED_UP else before + value
    return total


def server_figures(samples: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The `server_*` figures of a point: the first sample was taken before it, the last one after it."""
    if len(samples) < 2:
        return {}
    grown = {name: samples[-1][name] - samples[0].get(name, 0.0) for name in samples[-1] if name not in SERVER_GAUGES}
    if min(grown.values(), default=0.0) < 0:  # it was started anew in between
        return {}
    found: dict[str, Any] = {f"server_{name}": round(grown[name]) for name in SERVER_COUNTS if name in grown}
    if grown.get("cache_queries"):
        found["server_prefix_cache_hit_rate"] = grown.get("cache_hits", 0.0) / grown["cache_queries"]
    if grown.get("drafts"):
        found["server_acceptance_length_mean"] = 1 + grown.get("accepted", 0.0) / grown["drafts"]
    for name in SERVER_DURATIONS:
        if grown.get(f"{name}_count"):
            found[f"server_mean_{name}_ms"] = 1e3 * grown[f"{name}_sum"] / grown[f"{name}_count"]
    for name in SERVER_GAUGES:
        during = [sample[name] for sample in samples[1:-1] if name in sample]
        if during:
            found[f"server_{name}_mean"], found[f"server_{name}_peak"] = math.fsum(during) / len(during), max(during)
    return found


NVIDIA_QUERY = "index,name,driver_version,utilization.gpu,memory.used,memory.total,power.draw"
ROCM_QUERY = "--showuse --showmeminfo vram --showpower --showproductname --showdriverversion --json"
GPU_FACTS = ("utilization", "memory", "memory_total", "power")  # percent, bytes, bytes, W


class GpuSample(NamedTuple):
    """What one GPU said at one time (seconds from the start); of GPU_FACTS what it tells."""

    at_s: float
    gpu: str
    name: str
    driver: str
    facts: Mapping[str, float]


def gpu_sample(at_s: float, words: tuple[str, str, str], cells: Iterable[Any], unit: float = 1.0) -> GpuSample:
    """`words`: number, name, driver; `cells`: GPU_FACTS, `unit` being that of memory; [N/A] and its like are absent."""
    facts: dict[str, float] = {}
    for name, cell in zip(GPU_FACTS, cells):
        with contextlib.suppress(ValueError, TypeError):
            facts[name] = float(cell) * (unit if name.startswith("memory") else 1.0)
    return GpuSample(at_s, *words, facts)


def nvidia_samples(text: str, at_s: float) -> list[GpuSample]:
    """One line of nvidia-smi's CSV. Raises ValueError."""
    number, name, driver, *cells = map(str.strip, text.split(","))
    return [gpu_sample(at_s, (number, name, driver), cells, 2.0**20)]


def rocm_samples(text: str, at_s: float) -> list[GpuSample]:
    """What `rocm-smi --json` says: an object for each card, and one for the system. Raises ValueError."""
    told, found = json.loads(text), []
    for key, card in told.items():
        if key.startswith("card"):
            power = next((value for name, value in card.items() if "Graphics Package Power (W)" in name), None)
            cells = [card.get(name) for name in ("GPU use (%)", "VRAM Total Used Memory (B)", "VRAM Total Memory (B)")]
            name = card.get("Card Series") or card.get("Card series") or card.get("Card model") or "AMD GPU"
            driver = told.get("system", {}).get("Driver version", "-")
            found.append(gpu_sample(at_s, (key[len("card") :], str(name), str(driver)), [*cells, power]))
    return found


def integral(points: Sequence[tuple[float, float]], begin: float, end: float) -> float:
    """Under a line through points (time, value); level before the first and after the last.

    >>> integral([(-1.0, 100.0), (1.0, 200.0), (9.0, 200.0)], 0.0, 2.0)
    350.0
    """
    held = [(begin, points[0][1]), *((min(max(at, begin), end), value) for at, value in points), (end, points[-1][1])]
    return math.fsum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in zip(held, held[1:]))


def gpu_figures(rows: Sequence[GpuSample], begin: float, end: float) -> dict[str, Any]:
    """The `gpu_*` figures between two times; memory, power and energy are those of all these GPUs together."""
    gpus = [[row for row in rows if row.gpu == gpu] for gpu in sorted({row.gpu for row in rows})]
    if not gpus or end <= begin:
        return {}
    names, drivers = ({getattr(row, word) for row in rows} for word in ("name", "driver"))
    found: dict[str, Any] = {"gpu_count": len(gpus), "gpu_name": ", ".join(names), "gpu_driver": ", ".join(drivers)}
    told = {name: [[(r.at_s, r.facts[name]) for r in some if name in r.facts] for some in gpus] for name in GPU_FACTS}
    used = [value for some in told["utilization"] for at, value in some if begin <= at <= end]
    if used:
        found["gpu_utilization_mean"] = math.fsum(used) / len(used)
    for name, key in (("memory", "gpu_memory_peak_bytes"), ("memory_total", "gpu_memory_total_bytes")):
        if all(told[name]):
            found[key] = round(sum(max(value for _, value in some) for some in told[name]))
    if all(told["power"]):
        found["gpu_energy_j"] = math.fsum(integral(some, begin, end) for some in told["power"])
        found["gpu_power_mean_w"] = found["gpu_energy_j"] / (end - begin)
    return found


def figures_over_time(
    samples: Sequence[tuple[float, Mapping[str, float]]], rows: Sequence[GpuSample]
) -> dict[str, Any]:
    """Lists of [seconds, value] for a picture, by result key; power is that of all GPUs, utilisation their mean."""
    found: dict[str, list[list[float]]] = {}
    for name in SERVER_SERIES[:-1]:
        found[f"server_{name}"] = [[at, figures[name]] for at, figures in samples if name in figures]
    made = [(at, figures[SERVER_SERIES[-1]]) for at, figures in samples if SERVER_SERIES[-1] in figures]
    steps = zip(made, made[1:])
    found["server_generated_tokens_per_s"] = [[b[0], _rate(b[1] - a[1], b[0] - a[0])] for a, b in steps]
    gpus = [[row for row in rows if row.gpu == gpu] for gpu in sorted({row.gpu for row in rows})]
    for name, key, share in (("power", "gpu_power_w", 1), ("utilization", "gpu_utilization", len(gpus))):
        told = [[(row.at_s, row.facts[name]) for row in some if name in row.facts] for some in gpus]
        found[key] = [[some[0][0], math.fsum(value for _, value in some) / share] for some in zip(*told)]
    return {name: values for name, values in found.items() if values}


def fetch(url: str, headers: Mapping[str, str], most_bytes: int, timeout_s: float, context: Any = None) -> bytes:
    """GET with the standard library alone; no redirect is followed. Raises OSError, ValueError or HTTPException."""
    request = importlib.import_module("urllib.request")
    url, login = split_login(url)
    proxies: Optional[dict[str, str]] = None if proxy_for(url) else {}
    straight = type("Straight", (request.HTTPRedirectHandler,), {"redirect_request": lambda *_: None})
    handlers = [request.ProxyHandler(proxies), straight, request.HTTPSHandler(context=context)]
    asked, body, until = request.Request(url, headers={**login, **headers}), bytearray(), time.monotonic() + timeout_s
    with request.build_opener(*handlers).open(asked, timeout=timeout_s) as response:
        for piece in iter(lambda: response.read1(READ_BUFFER_BYTES), b""):
            body += piece
            if len(body) > most_bytes or time.monotonic() > until:
                raise ValueError(f"more than {most_bytes >> 20} MB, or {timeout_s:g} s")
    return bytes(body)


class FigureReader:
    """Reads metrics pages and a GPU tool at intervals, by the orders of ServerFigures, whose process this is."""

    def __init__(self, orders: Mapping[str, Any]) -> None:
        self._orders = orders
        self._urls: Sequence[str] = orders["urls"]
        self._samples: list[tuple[float, Mapping[str, float]]] = []  # (seconds of perf_counter, figures)
        self._gpu_rows: list[GpuSample] = []
        self.tool: Any = None

    def _read(self, settled: Callable[[Mapping[str, float]], bool] = bool) -> str:
        """One sample, the first that is settled or that of METRICS_SETTLE_S later; else what was wrong with a page."""
        until = time.monotonic() + METRICS_SETTLE_S
        while True:
            at_s, pages = time.perf_counter(), []
            for url in self._urls:
                try:
                    context = tls_context(Origin.of(url, *self._orders["tls"])) if url.startswith("https") else None
                    page = fetch(url, {}, METRICS_BYTES, self._orders["timeout_s"], context)
                    pages.append(page_figures(page.decode()))
                except Exception as error:  # whatever a page may hold, the run goes on without it
                    return f"{Redactor.url(url)}: {_reason(error)}"
            figures = added_up(pages)
            if not figures or settled(figures) or time.monotonic() > until:
                self._samples += [(at_s, figures)] if figures else []
                return ""
            time.sleep(METRICS_RETRY_S)

    def before(self) -> str:
        """The sample before the point, as soon as nothing is running any more; what was wrong, if it was asked for."""
        wrong = self._read(lambda figures: not figures.get("running"))
        self._urls = [] if wrong else self._urls
        return wrong if self._orders["asked"] else ""

    def during(self, said: queue.SimpleQueue[str]) -> str:
        """A sample at every interval, until something is said."""
        due = time.monotonic()
        while True:
            due = max(due + self._orders["interval_s"], time.monotonic())
            with contextlib.suppress(queue.Empty):
                return said.get(timeout=max(0.0, due - time.monotonic()))
            if self._urls and not self._read():  # a line over time needs only some of it
                at_s, figures = self._samples[-1]
                self._samples[-1] = (at_s, {name: value for name, value in figures.items() if name in SERVER_SERIES})

    def after(self, point: Mapping[str, Any]) -> list[dict[str, Any]]:
        """[the figures of the point, those over time]; counters as soon as they are at what the client counted."""

        def caught_up(figures: Mapping[str, float]) -> bool:
            counted, start = point["counted"].items(), self._samples[0][1]
            return all(figures.get(name, math.inf) - start.get(name, 0.0) >= count for name, count in counted)

        if self._samples and self._read(caught_up):
            self._samples.clear()
        zero, chosen = point["origin_s"], self._orders["gpus"]
        worked = {row.gpu for row in self._gpu_rows if row.facts.get("utilization")}
        gpus = worked if chosen == "worked" else chosen.split(",")
        rows = [row._replace(at_s=row.at_s - zero) for row in self._gpu_rows if row.gpu in gpus or chosen == "all"]
        samples = [(at_s - zero, figures) for at_s, figures in self._samples]
        found = {**server_figures([figures for _, figures in samples]), **gpu_figures(rows, *point["between_s"])}
        for name, count in point["per"].items():
            if count and "gpu_energy_j" in found:
                found[f"gpu_energy_per_{name}_j"] = found["gpu_energy_j"] / count
        return [found, figures_over_time(samples[1:-1], rows)]

    def watch_gpus(self) -> None:
        """Rows of the GPU tool for as long as this process lives and the tool works."""
        name, interval_s = self._orders["tool"], self._orders["interval_s"]
        words, parse = [name, *ROCM_QUERY.split()], rocm_samples
        if name == "nvidia-smi":
            words, parse = [name, f"--query-gpu={NVIDIA_QUERY}", "--format=csv,noheader,nounits"], nvidia_samples
            words.append(f"--loop-ms={round(interval_s * 1e3)}")
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
            while name:
                pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
                self.tool = subprocess.Popen(words, stdin=nothing, stdout=pipe, stderr=nothing, text=True)
                for piece in self.tool.stdout if name == "nvidia-smi" else [self.tool.stdout.read()]:
                    self._gpu_rows += parse(piece, time.perf_counter())
                time.sleep(interval_s)


def figures_main() -> None:
    """The process that reads: its orders on stdin, then `begin`, then how the point went."""
    reader = FigureReader(json.loads(sys.stdin.readline()))
    threading.Thread(target=reader.watch_gpus, daemon=True).start()
    said: queue.SimpleQueue[str] = queue.SimpleQueue()
    if sys.stdin.readline():
        print(json.dumps(reader.before()), flush=True)
        threading.Thread(target=lambda: said.put(sys.stdin.readline()), daemon=True).start()
        point = reader.during(said)
        told = reader.after(json.loads(point)) if point else None
        if reader.tool:
            reader.tool.kill()
        print(json.dumps(told), flush=True)


class ServerFigures:
    """What the server and its GPUs say of one point, read by a process of its own.

    So neither a slow page, nor the parsing of a large one, nor starting a tool takes a turn from this event loop.
    """

    def __init__(self, config: Config) -> None:
        asked, bases = [url for url in config.server_metrics or [] if url != "off"], map(urlsplit, config.servers)
        roots = {urlunsplit((b.scheme, b.netloc.rpartition("@")[2], "/metrics", "", "")) for b in bases}
        near = all(is_loopback(urlsplit(root).hostname or "") for root in roots)
        gpus = config.gpu_metrics or ("worked" if near else "off")
        tool = next((name for name in ("nvidia-smi", "rocm-smi") if gpus != "off" and shutil.which(name)), "")
        self._asked_gpus = gpus if gpus not in ("worked", "off") else ""
        self.orders = {
            "urls": asked or (sorted(roots) if near and not config.server_metrics else []), "asked": bool(asked),
            "interval_s": config.metrics_interval, "timeout_s": METRICS_TIMEOUT_S, "gpus": gpus, "tool": tool,
            "tls": [config.ca_file, config.insecure],
        }  # fmt: skip
        self._process: Optional[asyncio.subprocess.Process] = None
        self.series: Mapping[str, Any] = {}  # by result key, lists of [seconds from the start of the timed part, value]

    async def start(self) -> None:
        """Let the process start, to be ready when the warm-up is over."""
        if self.orders["urls"] or self.orders["tool"]:
            pipe, nothing = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
            streams: dict[str, Any] = {"stdin": pipe, "stdout": pipe, "stderr": nothing, "limit": 1 << 28}
            command = (sys.executable, THIS_FILE, "--figures")
            with contextlib.suppress(OSError):
                self._process = await asyncio.create_subprocess_exec(*command, start_new_session=True, **streams)
            self._say(self.orders)

    async def begin(self) -> None:
        """The figures before the timed part, which waits for them, at most METRICS_PATIENCE_S."""
        self._say("begin")
        wrong = await self._answer() if self._process else ""
        if wrong or (wrong is None and self.orders["asked"]):
            note(f"--server-metrics {plain(wrong or 'cannot be read')}: measuring without")

    async def stop(self, tally: Tally, origin_ns: int) -> dict[str, Any]:
        """The figures after it, and all that follows from them, under the keys that the JSON has."""
        counted = {"prompt_tokens": tally.prompt_tokens, "generated_tokens": tally.completion_tokens}
        begun, between_s = bool(origin_ns and self._process), (tally.first_sent_s, tally.last_done_s)
        if begun:
            self._say({
                "origin_s": origin_ns / 1e9, "between_s": between_s if tally.elapsed_s else (0.0, 0.0),
                "counted": {} if tally.errors + tally.aborted else counted,
                "per": {"output_token": tally.completion_tokens, "request": tally.ok},
            })  # fmt: skip
        found, self.series = (await self._answer() if begun else None) or ({}, {})
        await self._end()
        if origin_ns and self._asked_gpus and "gpu_name" not in found:
            note(f"--gpu-metrics {self._asked_gpus}: neither nvidia-smi nor rocm-smi tells of it here")
        return found

    def _say(self, what: Any) -> None:
        """By pipe, never by argv: a URL may hold a login."""
        if self._process and self._process.stdin:
            with contextlib.suppress(OSError, RuntimeError):
                self._process.stdin.write(json.dumps(what).encode() + b"\n")

    async def _answer(self) -> Any:
        """The process's next line; None if it does not come in time, which ends the process."""
        if self._process and self._process.stdout:
            with contextlib.suppress(OSError, ValueError, asyncio.TimeoutError):
                return json.loads(await asyncio.wait_for(self._process.stdout.readline(), METRICS_PATIENCE_S))
            await self._end()
        return None

    async def _end(self) -> None:
        if self._process and self._process.stdin:
            self._process.stdin.close()
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
            self._process = None


# === 12. Runner ===


class Stop:
    """Two stages: first no new requests and a drain, then the end at once."""

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


SHEDDING = ("http_429", "http_503")  # by these a server says that it is busy, and serves others meanwhile


class Breaker:
    """Ends a run that fails everything, that nobody listens to any more, or that fails more than was allowed.

    By itself it does so only after a row of like failures, and when whatever was under way as the row began has ended,
    too: a server that refuses within milliseconds may be serving others all the while. What was under way is known by
    the permits: each has exactly one request that got it before that time and ended after it. Without a cap it is known
    by the requests' numbers: those up to the highest that have not ended.
    """

    def __init__(self, tally: Tally, stop: Stop, config: Config, first: int = 0) -> None:
        """`first`: the number of the first request."""
        concurrency = config.concurrency
        self._tally = tally
        self._stop = stop
        self._concurrency = concurrency
        self._most = config.stop_after_errors
        self._newest_ns = 0
        self._kind: Optional[str] = None  # of the row
        self._row = 0
        self._since_ns = 0  # when the row began, or went on
        self._heard = 0  # requests under way then that have ended
        self._under_way = concurrency or 0  # then
        self._begun, self._ended = first, first

    def add(self, record: Record) -> None:
        reply, kind = record.reply, record.error_kind
        self._newest_ns = max(self._newest_ns, reply.end_ns or 0)
        self._begun, self._ended = max(self._begun, record.job.index + 1), self._ended + 1
        if record.start_ns is not None and record.start_ns < self._since_ns <= (reply.end_ns or 0):
            self._heard += 1
        if record.aborted:
            return
        if record.ok:
            self._kind = None
            return
        if self._most is not None and self._tally.errors >= self._most:
            self._stop.end(f"stopped after {self._tally.errors} errors (--stop-after-errors)")
        if kind in SHEDDING:
            return
        if kind != self._kind:
            self._kind, self._row = kind, 0
        if self._row % (IDENTICAL_FAILURES_TO_STOP + 4 * self._under_way) == 0:
            # Anew from time to time: a process that had not begun yet had nothing under way.
            self._heard, self._since_ns = 1, self._newest_ns
            self._under_way = self._concurrency or self._begun - self._ended
        self._row += 1
        if self._row >= IDENTICAL_FAILURES_TO_STOP and self._heard >= self._under_way:
            self._judge(kind)

    def _judge(self, kind: str) -> None:
        if kind == "connect_refused":
            self._stop.end(f"stopped: {self._row} connections in a row were refused")
        elif not self._tally.ok:
            self._stop.end(f"stopped: nothing succeeded, and {self._row} requests in a row all failed alike")


@dataclass(frozen=True)
class Load:
    """One run of a schedule: which jobs, what to send, through what, how many at once, and who is told."""

    schedule: Schedule
    workload: Workload
    send: Send
    sinks: Sequence[Sink]
    concurrency: Optional[int]  # None: as many as the schedule has
    grace_s: Optional[float] = None  # for what is under way when the schedule's duration is over; None: no limit

    @property
    def ahead(self) -> int:
        """How many requests are prepared before their turn."""
        return self.concurrency if self.concurrency and not self.schedule.is_timed else PREPARED_AHEAD


class Pool:
    """Does the jobs of a schedule, each in a task of its own; permits bound what is in flight.

    A task has its request built and waits for its turn with the bytes ready. As its turn comes, the next task is begun.
    So a request goes out at once when it is due or a reply has ended, and few are kept in memory unsent.
    """

    def __init__(self, load: Load, stop: Stop, clock: Clock = CLOCK) -> None:
        self._load = load
        self._stop = stop
        self._clock = clock
        self._jobs = iter(load.schedule)
        self._origin_ns = 0
        self._closed_s = math.inf  # when it ended, from the start
        self._tasks: set[asyncio.Future[None]] = set()
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.permits = Permits(load.concurrency, self._begin_next, clock)

    def _begin_next(self) -> None:
        job = None if self._stop.draining.is_set() else next(self._jobs, None)
        if job is not None:
            task = asyncio.ensure_future(self._work(job))
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Future[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error and not self._over.done():
            self._over.set_exception(error)
        elif not self._tasks and not self._over.done():
            self._over.set_result(None)

    async def prepare(self) -> None:
        """Build the first requests; nothing is sent yet."""
        for _ in range(self._load.ahead):
            self._begin_next()
        if self._tasks:
            await self._until(self.permits.ready(len(self._tasks)), self._stop.draining.wait())

    async def drain(self, origin_ns: int) -> None:
        """Send, until every job is done, the duration is over or a stop; what is left unfinished then is aborted."""
        if not self._tasks and not self._over.done():
            return
        self._origin_ns = origin_ns
        draining, schedule = self._stop.draining, self._load.schedule
        if not draining.is_set():
            self.permits.open(origin_ns, schedule.permits_s(self._load.concurrency or 0))
        await self._until(draining.wait(), limit_s=schedule.duration_s - self._now_s() + TIMER_ERROR_S)
        self._closed_s = self._now_s() if self.permits.is_open else -math.inf
        self.permits.close()
        await self._until(draining.wait(), limit_s=self._load.grace_s)
        await self._until(self._stop.now.wait(), limit_s=DRAIN_GRACE_S if draining.is_set() else 0.0)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._over
        while any(map(self._abort, itertools.islice(self._jobs, 1))):
            pass  # the next one may be due as well

    def _now_s(self) -> float:
        return (self._clock.now_ns() - self._origin_ns) / 1e9

    async def _until(self, *others: Coroutine[Any, Any, Any], limit_s: Optional[float] = None) -> None:
        """Wait for all jobs, for one of the others, or for the time limit."""
        waiting: list[asyncio.Future[Any]] = [asyncio.ensure_future(other) for other in others]
        timeout = None if limit_s is None or math.isinf(limit_s) else max(0.0, limit_s)
        await asyncio.wait([self._over, *waiting], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        for future in waiting:
            future.cancel()

    async def _work(self, job: Optional[Job]) -> None:
        held_ns: Optional[int] = None
        while job is not None:
            turn = Turn(self.permits, job.due_s, held_ns)
            turn.keeps = self._load.schedule.goes_on(job)
            try:
                reply = await self._load.send(self._load.workload(job.index), turn)
            except NotSent:
                self._abort(job)
                return
            if reply.free_ns is None:  # it failed before its turn, which begins no other
                self._begin_next()
            job, held_ns = self._record(Record(job, reply, self._origin_ns)), turn.held_ns
        if held_ns is not None:
            self.permits.release(held_ns)

    def _record(self, record: Record) -> Optional[Job]:
        """Tell everybody; the job that takes over its place, where one does."""
        for sink in self._load.sinks:
            sink.add(record)
        return self._load.schedule.ended(record)

    def _abort(self, job: Job) -> bool:
        """A job that was due before the end, but for which no permit came, has its record; whether this is one."""
        due = job.due_s is not None and job.due_s < self._closed_s
        if due:
            failure = Failure("http_error", "aborted", "due, but not sent before the end: no permit was free")
            self._record(Record(job, Reply(failure=failure), self._origin_ns))
        return due


class ClientHealth:
    """Measures this process over the timed part: loop lag, CPU, waiting for a core, pauses of the collector."""

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

    def stop(self, permits: Permits, transport: Transport, connections: int) -> Health:
        wall, cpu, waiting = self._start
        health = Health(
            wall_s=time.perf_counter() - wall,
            cpu_s=time.process_time() - cpu,
            waiting_s=waiting_for_core_s() - waiting,
            lag_p99_ms=describe(self._lags_ms).percentiles.get(99.0, 0.0),
            lag_max_ms=max(self._lags_ms, default=0.0),
            held_up_s=sum(lag for lag in self._lags_ms if lag > LATE_LOOP_S * 1e3) / 1e3,
            gc_pause_ms=self._pause_ms,
            peak_in_flight=permits.peak_in_flight,
            in_flight_s=permits.in_flight_ns / 1e9,
            unread_s=permits.unread_ns / 1e9,
            flight_window_s=(permits.changed_ns - permits.first_ns) / 1e9,
            connections=connections,
            transport=transport.name,
            kernel_clock=transport.kernel_clock,
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


@dataclass(frozen=True)
class Lesson:
    """What a warm-up has taught: the dialect, and (words, prompt tokens counted) of each synthetic prompt."""

    dialect: Dialect
    counted: Sequence[Sequence[int]] = ()


def agreed(config: Config, lessons: Sequence[Lesson]) -> Lesson:
    """What all processes go by: every concession that one of them had to make, and all their counts."""
    first = dataclasses.asdict(Dialect.before(config))
    said = [item for lesson in lessons for item in dataclasses.asdict(lesson.dialect).items()]
    conceded = {name: value for name, value in said if value != first[name]}
    return Lesson(Dialect(**{**first, **conceded}), [pair for lesson in lessons for pair in lesson.counted])


@dataclass
class Part:
    """One process's part of a measured point: its jobs, its share of the concurrency, and where records go."""

    config: Config
    workload: Workload
    schedule: Schedule
    sinks: Sequence[Sink]
    stop: Stop
    # Told the start of the timed part, in ns of perf_counter, its options, and how to ask for the tokens on their way.
    begin: Callable[[int, Config, Callable[[], int]], None]
    before: Optional[Callable[[], Awaitable[None]]] = None  # awaited when all stand ready, before that start

    @property
    def concurrency(self) -> Optional[int]:
        whole = self.config.concurrency
        return None if whole is None else share(whole, self.schedule.shard, self.schedule.shards)

    @property
    def warmup(self) -> int:
        """Its share of the warm-up: at least one request to each server for each model, to open and to learn."""
        whole, asked = self.config.warmup, self.config
        each = len(asked.servers) * len(asked.corpus.get("models") or [asked.model])
        return max(each, share(whole, self.schedule.shard, self.schedule.shards)) if whole else 0

    def after(self, lesson: Lesson) -> Part:
        """The same with synthetic prompts of the length that the server counts."""
        config = calibrated(self.config, lesson.counted)
        changed = config.prompt_calibration != self.config.prompt_calibration
        return dataclasses.replace(self, config=config, workload=workload_of(config, None)) if changed else self


class Kept(list[Record]):
    """A sink that keeps its records: the few of a warm-up, or, for --save-detailed, all."""

    add = list.append


async def warm_up(part: Part, sender: Sender) -> Lesson:
    """Open every connection, learn what the server takes. Raises RunError when every call fails."""
    tally, kept = await _warm_up_once(part, sender)
    while refusing(tally):
        dialect = concede(sender.dialect, part.config, tally.error_groups())
        if dialect is None or part.stop.draining.is_set():
            break
        note(f"the server refused ({tally.first_error()}); trying {dialect}")
        sender.dialect = dialect
        tally, kept = await _warm_up_once(part, sender)
    if tally.errors and not part.stop.interrupted:
        if not tally.ok:
            what = "of the next level failed" if part.schedule.first else "failed, nothing was measured"
            raise RunError(f"the warm-up {what}: {tally.first_error()}")
        servers = [name for name, group in tally.groups["server"].items() if not group.ok]
        by = f", all of those to {', '.join(servers)}" if servers else ""
        note(f"{tally.errors} of {part.warmup} warm-up requests failed{by}: {tally.first_error()}")
    counts = ((warmup_words(part.config, record.job.index), record.reply.prompt_tokens) for record in kept if record.ok)
    return Lesson(sender.dialect, [(words, tokens) for words, tokens in counts if tokens])


def refusing(tally: Tally) -> bool:
    """Whether nobody, or one of several servers, has answered any request."""
    return bool(tally.errors) and (not tally.ok or any(not group.ok for group in tally.groups["server"].values()))


async def _warm_up_once(part: Part, sender: Sender) -> tuple[Tally, Kept]:
    """All at once, as the measured run will be, so that it finds its connections open."""
    tally, kept = Tally(), Kept()
    shard, shards = part.schedule.shard, part.schedule.shards
    schedule = Schedule(part.warmup * shards, first=part.schedule.first).part(shard, shards)
    load = Load(schedule, partial(warmup_request, part.config), sender, [tally, kept], part.concurrency)
    pool = Pool(load, part.stop)
    await pool.prepare()
    await pool.drain(time.perf_counter_ns())
    return tally, kept


class Peers:
    """Those who run at the same time: what all go by after the warm-up, and when all start. Here nobody else."""

    async def agree(self, lesson: Lesson) -> Lesson:
        return lesson

    async def start_ns(self, schedule: Schedule) -> int:
        return start_ns(schedule)


def start_ns(schedule: Schedule) -> int:
    """Now; where jobs are due at certain times, a little later."""
    return time.perf_counter_ns() + int(START_LEAD_S * 1e9) * schedule.is_timed


class Runner:
    """One process's way to the server, kept from point to point: its connections, and what it has learnt."""

    def __init__(self, config: Config, concurrency: Optional[int], peers: Peers, number: int = 0) -> None:
        """`concurrency`: the most that any point will have; `number`: of this process."""
        self._sender = Sender(config, concurrency, number)
        self._peers = peers

    async def measure(self, part: Part) -> list[Health]:
        """Warm up, agree on what it taught, prepare, start together; nothing when stopped before the timed part."""
        sender, peers = self._sender, self._peers
        lesson = await peers.agree(await warm_up(part, sender))
        sender.dialect, part = lesson.dialect, part.after(lesson)
        load = Load(part.schedule, part.workload, sender, part.sinks, part.concurrency, part.config.grace)
        pool = Pool(load, part.stop)
        await pool.prepare()
        if part.before:
            await part.before()
        origin_ns = await peers.start_ns(part.schedule)
        if part.stop.draining.is_set():
            await pool.drain(origin_ns)
            return []
        part.begin(origin_ns, part.config, pool.permits.arriving_tokens)
        client = ClientHealth()
        opened_before = sender.transport.connections
        client.start()
        try:
            await pool.drain(origin_ns)
        finally:
            opened = sender.transport.connections - opened_before
            health = client.stop(pool.permits, sender.transport, opened)
        return [health]

    async def aclose(self) -> None:
        await self._sender.transport.aclose()


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


def finish_on_first_signal(stop: Stop) -> None:
    """While the report is written, which is short: the first signal lets it end, the second ends it."""

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


# === 13. Shards ===

_REPLY_FIELDS = [item.name for item in dataclasses.fields(Reply)]


def record_line(record: Record) -> list[Any]:
    """A record as JSON values, for the way from one process to another."""
    reply = {name: getattr(record.reply, name) for name in _REPLY_FIELDS}
    reply["text"] = None  # of no use there
    reply["gaps_ms"] = base64.b64encode(array("f", record.reply.gaps_ms).tobytes()).decode()
    return [record.job.index, record.job.due_s, record.origin_ns, list(reply.values())]


def record_from(line: Sequence[Any]) -> Record:
    index, due_s, origin_ns, values = line
    reply = Reply(**dict(zip(_REPLY_FIELDS, values)))
    gaps = array("f")
    gaps.frombytes(base64.b64decode(values[_REPLY_FIELDS.index("gaps_ms")]))
    reply.gaps_ms = gaps
    reply.failure = Failure(*reply.failure) if reply.failure else None
    return Record(Job(index, due_s), reply, origin_ns)


class ParentSink:
    """A shard's records, to its parent: one JSON line each."""

    def add(self, record: Record) -> None:
        send_to_parent({"record": record_line(record)})


def send_to_parent(message: Mapping[str, Any]) -> None:
    """One whole line on stdout; without a parent to read it there is nobody to work for."""
    line = memoryview(json.dumps(message).encode() + b"\n")
    try:
        while line:  # a stopped and continued process may write less than it was given
            line = line[os.write(sys.stdout.fileno(), line) :]
    except OSError:
        os._exit(1)


async def shard_main(number: int) -> None:
    """One process of several: its configuration and its orders come on stdin, its records go to stdout."""
    for sign in STOP_SIGNALS:
        signal.signal(sign, signal.SIG_IGN)  # the parent decides
    orders, pipe = await _stdin_lines()
    stop, siblings = Stop(), Siblings()
    said = json.loads(await orders.readline())
    corpus: Optional[Corpus] = None
    listener = asyncio.ensure_future(follow_orders(orders, stop, siblings))
    runner: Optional[Runner] = None
    try:
        runner = Runner(Config(**said["config"]), said["concurrency"], siblings, number)
        while True:  # until the end of the orders
            point = await siblings.points.get()
            config = Config(**point["config"])
            if config.requests_file and not corpus:
                corpus = Corpus(config.requests_file, config.system_prompt, config.endpoint_type, config.history)
                corpus.open(check=bool(config.corpus.get("sessions")))
            await shard_point(runner, corpus, point, stop)
    except (UserError, RunError) as error:
        send_to_parent({"fatal": str(error)})
    finally:
        if runner:
            await runner.aclose()
        if corpus:
            corpus.close()
        listener.cancel()
        pipe.close()
        await asyncio.sleep(0)  # it closes a turn later


async def shard_point(runner: Runner, corpus: Optional[Corpus], point: Mapping[str, Any], stop: Stop) -> None:
    """One measured point, as the parent has ordered it."""
    config = Config(**point["config"])
    schedule = dataclasses.replace(schedule_of(config, corpus), **point["schedule"])
    telling: list[asyncio.Future[None]] = []

    def begin(origin_ns: int, config: Config, arriving: Callable[[], int]) -> None:
        telling.append(asyncio.ensure_future(tell_progress(arriving)))

    part = Part(config, workload_of(config, corpus), schedule, [ParentSink()], stop, begin)
    try:
        health = await runner.measure(part)
    finally:
        for task in telling:
            task.cancel()
    send_to_parent({"health": [dataclasses.asdict(one) for one in health]})


async def tell_progress(arriving: Callable[[], int]) -> None:
    while True:
        await asyncio.sleep(PROGRESS_TTY_S)
        send_to_parent({"arriving": arriving()})


async def _stdin_lines() -> tuple[asyncio.StreamReader, asyncio.BaseTransport]:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=1 << 26)
    pipe, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader, pipe


class Siblings(Peers):
    """The other processes of the same run, by way of the parent; `points` has what it orders."""

    def __init__(self) -> None:
        self.points: asyncio.Queue[Any] = asyncio.Queue()
        self.begin(None)

    def begin(self, point: Any) -> None:
        """The next point, for which nothing has been agreed."""
        loop = asyncio.get_running_loop()
        self.agreed: asyncio.Future[Lesson] = loop.create_future()
        self.go: asyncio.Future[int] = loop.create_future()
        if point is not None:
            self.points.put_nowait(point)

    async def agree(self, lesson: Lesson) -> Lesson:
        send_to_parent({"lesson": dataclasses.asdict(lesson)})
        return await self.agreed

    async def start_ns(self, schedule: Schedule) -> int:
        send_to_parent({"ready": True})
        return await self.go


def lesson_from(said: Mapping[str, Any]) -> Lesson:
    return Lesson(Dialect(**said["dialect"]), said["counted"])


async def follow_orders(orders: asyncio.StreamReader, stop: Stop, siblings: Siblings) -> None:
    """Orders of the parent: `point POINT`, `agreed LESSON`, `go ORIGIN_NS`, `press`, `end`; end of file ends all."""
    while True:
        order, _, value = (await orders.readline()).strip().partition(b" ")
        if not order:
            os._exit(1)
        if order == b"point":
            siblings.begin(json.loads(value))
        elif order == b"agreed":
            siblings.agreed.set_result(lesson_from(json.loads(value)))
        elif order == b"go":
            if not siblings.go.done():
                siblings.go.set_result(int(value))
        elif order == b"press":
            stop.press()
            if not siblings.go.done():
                siblings.go.set_result(0)
        else:
            stop.end("")


class Shard:
    """The parent's view of one of its processes."""

    def __init__(self, number: int, config: Config, concurrency: Optional[int]) -> None:
        """`config` and `concurrency`: what its connections need to know, for all points."""
        self._number = number
        self._said = json.dumps({"config": dataclasses.asdict(config), "concurrency": concurrency})
        self._process: Optional[asyncio.subprocess.Process] = None
        self._listening: Optional[asyncio.Future[None]] = None
        self.alive = True
        self._expect()

    def _expect(self) -> None:
        """What it will tell of a point: each of `told` once (None: it died before), of `newest` again and again."""
        future, names = asyncio.get_running_loop().create_future, ("lesson", "ready", "health")
        self.told: dict[str, asyncio.Future[Any]] = {name: future() for name in names}
        self.newest: dict[str, Any] = {"arriving": 0, "fatal": ""}
        self._seen = bytearray()  # 1: its record has come; by the place among this process's jobs

    async def start(self) -> None:
        command, pipe = (sys.executable, THIS_FILE, "--shard", str(self._number)), asyncio.subprocess.PIPE
        streams: dict[str, Any] = {"stdin": pipe, "stdout": pipe, "limit": 1 << 26}
        try:
            self._process = await asyncio.create_subprocess_exec(*command, start_new_session=True, **streams)
        except OSError as error:
            raise RunError(f"cannot start process {self._number}: {_reason(error)}; lower --processes") from None
        self.order(self._said)
        self._listening = asyncio.ensure_future(self._listen())

    def begin(self, part: Part) -> None:
        """The next point; `part`: what this process has to do, its records going to the parent's own sinks."""
        self._expect()
        self._part = part
        schedule = {name: getattr(part.schedule, name) for name in ("first", "shard", "shards")}
        self.order(f"point {json.dumps({'config': dataclasses.asdict(part.config), 'schedule': schedule})}")

    def order(self, line: str) -> None:
        """By pipe, never by argv: the key is among it."""
        if self._process and self._process.stdin and not self._process.stdin.is_closing():
            with contextlib.suppress(OSError, RuntimeError):
                self._process.stdin.write(line.encode() + b"\n")

    async def _listen(self) -> None:
        """Until its end; every record goes to the sinks as if it had been made here."""
        assert self._process is not None
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            try:
                message = json.loads(line)
            except ValueError:  # cut by its death
                break
            ((name, value),) = message.items()
            if name == "record":
                self._take(record_from(value))
            elif name in self.told:
                self.told[name].set_result(value)
            else:
                self.newest[name] = value
        self.alive = False
        for waiting in self.told.values():
            if not waiting.done():
                waiting.set_result(None)
        await self._process.wait()

    def _take(self, record: Record) -> None:
        schedule = self._part.schedule
        place = (schedule.number(record.job) - schedule.start) // schedule.shards
        self._seen.extend(bytes(max(0, place + 1 - len(self._seen))))
        self._seen[place] = 1
        for sink in self._part.sinks:
            sink.add(record)

    async def aclose(self) -> None:
        if self._process and self._process.stdin:
            self._process.stdin.close()
        if self._listening:
            await asyncio.gather(self._listening, return_exceptions=True)

    def kill(self) -> None:
        if self._process and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    def record_lost(self, origin_ns: int) -> None:
        """Jobs that died with it become records, too."""
        if self.told["health"].result() is not None:
            return
        lost = Failure("http_error", "process_lost", "the client process that had this request died")
        jobs, most = self._part.schedule, self._part.concurrency or 0
        known = jobs if jobs.count or jobs.is_timed else itertools.islice(jobs, len(self._seen) + most)
        seen = itertools.chain(self._seen, itertools.repeat(0))
        unfinished = [job for job, was in zip(known, seen) if not was]
        why = f"died ({self.newest['fatal']})" if self.newest["fatal"] else "died"
        note(f"process {self._number} {why}; its {len(unfinished)} unfinished requests count as errors")
        for job in unfinished:
            for sink in self._part.sinks:
                sink.add(Record(job, Reply(failure=lost), origin_ns))


class Crew:
    """Several processes, kept from point to point; a point of less concurrency has fewer of them."""

    def __init__(self, config: Config) -> None:
        """`config`: that of the highest level."""
        self._config = config
        self._concurrency = config.concurrency and -(-config.concurrency // config.processes)
        self._shards: list[Shard] = []

    async def _all(self) -> Sequence[Shard]:
        """All processes, those that have died replaced."""
        for number in range(self._config.processes):
            if number < len(self._shards) and self._shards[number].alive:
                continue
            self._shards[number : number + 1] = [Shard(number, self._config, self._concurrency)]
            await self._shards[number].start()
        return self._shards

    async def measure(self, part: Part) -> list[Health]:
        """The same as a runner's, by several, released together. Raises RunError when one could not begin."""
        count = part.config.processes
        shards = (await self._all())[:count]
        passing_on = asyncio.ensure_future(_pass_on(part.stop, shards))
        try:
            for number, shard in enumerate(shards):
                shard.begin(dataclasses.replace(part, schedule=part.schedule.part(number, count)))
            lessons = await _told("lesson", shards)
            fatal = next(filter(None, (shard.newest["fatal"] for shard in shards)), "")
            if fatal:
                raise RunError(fatal)
            lesson = agreed(part.config, [lesson_from(one) for one in lessons if one])
            for shard in shards:
                shard.order(f"agreed {json.dumps(dataclasses.asdict(lesson))}")
            await _told("ready", shards)
            if part.before:
                await part.before()
            origin_ns = start_ns(part.schedule)
            if not part.stop.draining.is_set():
                config = part.after(lesson).config
                part.begin(origin_ns, config, lambda: sum(shard.newest["arriving"] for shard in shards))
            for shard in shards:
                shard.order(f"go {origin_ns}")
            fared = await _told("health", shards)
            for shard in shards:
                shard.record_lost(origin_ns)
        finally:
            passing_on.cancel()
        return [Health(**health) for told in fared for health in told or ()]

    async def aclose(self) -> None:
        await asyncio.gather(*(shard.aclose() for shard in self._shards))


async def _told(name: str, shards: Sequence[Shard]) -> list[Any]:
    return await asyncio.gather(*(shard.told[name] for shard in shards))


async def _pass_on(stop: Stop, shards: Sequence[Shard]) -> None:
    for stage in (stop.draining, stop.now):
        await stage.wait()
        for shard in shards:
            shard.order("press" if stop.interrupted else "end")
    await asyncio.sleep(DRAIN_GRACE_S)
    for shard in shards:
        shard.kill()  # it does not follow


# === 14. Sweep (search pure, run not) ===


class Step(NamedTuple):
    """A point that is to be measured: the load, which repetition, and how many times as many requests as usual."""

    level: float
    repeat: int = 1
    factor: int = 1


class Answer(NamedTuple):
    """What a plan is told of its step: whether the limits held, and how many times as many requests would make it sure.

    `needed` is 1 where it is sure already.
    """

    holds: bool
    needed: float = 1.0

    @property
    def sure(self) -> bool:
        return self.needed <= 1


Plan = Generator[Step, Answer, None]  # which points are measured, each in the light of those before


def sweep_plan(levels: Sequence[float], repeats: int) -> Plan:
    """Every level, so many times each; of one level once it is a plain run."""
    for level in levels:
        for repeat in range(1, repeats + 1):
            yield Step(level, repeat)


def search_plan(low: float, high: float, whole: bool) -> Plan:
    """Double from `low` until a level fails, at most to `high`, then bisect. What the end rests on is made sure.

    On the way up a level that holds by its figures alone will do: a higher one that holds settles it. `whole`: levels
    are whole numbers.
    """
    held: list[tuple[float, Answer]] = []
    fails: Optional[float] = None
    level: Optional[float] = low
    while level is not None:
        answer = yield Step(level)
        if not (answer.sure or (answer.holds and fails is None)):
            answer = yield from _made_sure(level, answer)
        fails = _take(held, fails, level, answer)
        level = next_level(held[-1][0], fails, high, whole) if held else None
        while level is None and held and not held[-1][1].sure:
            best, answer = held.pop()
            answer = yield from _made_sure(best, answer)
            fails = _take(held, fails, best, answer._replace(holds=answer.holds and answer.sure))
            level = next_level(held[-1][0], fails, high, whole) if held else None


def _take(held: list[tuple[float, Answer]], fails: Optional[float], level: float, answer: Answer) -> Optional[float]:
    """File a level under those that hold or as the one that fails; what could not be made sure holds nothing."""
    if answer.holds and (answer.sure or fails is None):
        held.append((level, answer))
        return fails
    return level


def _made_sure(level: float, answer: Answer) -> Generator[Step, Answer, Answer]:
    """Repeat a level with more requests, twice at most, until its verdict is no chance."""
    factor, repeat = 1, 1
    while not answer.sure and factor < SEARCH_MOST and repeat <= SEARCH_REPEATS:
        factor = min(SEARCH_MOST, factor * math.ceil(min(SEARCH_MOST, max(2.0, 1.2 * answer.needed))))
        repeat += 1
        answer = yield Step(level, repeat, factor)
    return answer


def next_level(held: float, fails: Optional[float], high: float, whole: bool) -> Optional[float]:
    """The level to try next; None where those that hold and fail are near enough, or nothing is left above.

    >>> next_level(64, None, 100, True), next_level(64, 100, 100, True), next_level(64, 66, 100, True)
    (100, 82, None)
    """
    if fails is None:
        return min(high, 2 * held) if held < high else None
    if fails - held <= max(whole, SEARCH_PRECISION * held):
        return None
    middle = (held + fails) / 2
    return round(middle) if whole else float(f"{middle:.3g}")


EXIT_CODES = (130, 2, 1, 3, 0)  # where several apply, the first


def exit_code(codes: Iterable[int]) -> int:
    """
    >>> exit_code([0, 3, 1]), exit_code([])
    (1, 0)
    """
    found = {0, *codes}
    return next(code for code in EXIT_CODES if code in found)


def answer_of(point: Measured) -> Answer:
    """What a search is told of a point."""
    judged = [judge(limit, *point.values) for limit in limits_of(point.config)]
    unsure = [one.needed or math.inf for one in judged if not one.sure]
    if any(one.sure and not one.holds for one in judged):
        return Answer(False)  # whatever the others
    holds = all(one.holds for one in judged)
    unsure += [BOUND_REPEATS] if holds and point.client_bound else []  # less load than asked proves nothing
    return Answer(holds, max(unsure, default=1.0))


class Team(Protocol):
    """Who makes the requests of a point, in one process or in several, and is kept for the next."""

    async def measure(self, part: Part) -> Sequence[Health]: ...

    async def aclose(self) -> None: ...


class Point:
    """One measured point: its configuration, its tally, the live line that shows it, and how the client fared."""

    def __init__(self, config: Config, corpus: Optional[Corpus], step: Step, first: int) -> None:
        """`first`: the number of its first request."""
        self.config = config
        self.step = step
        self.tally = Tally(corpus.own_tokens if corpus else (), config.goodput)
        self.health: Sequence[Health] = ()
        self.origin_ns = 0
        self.start_unix_s = math.nan
        self.series: Mapping[str, Any] = {}  # the server's own figures over time
        self.kept = Kept()
        self._schedule = dataclasses.replace(schedule_of(config, corpus), first=first)
        self._workload = workload_of(config, corpus)
        self._requests_file = corpus.path if corpus else None

    async def measure(self, stop: Stop, csvs: Sequence[CsvSink], team: Team) -> None:
        """Raises RunError when the warm-up fails."""
        live: list[LiveLine] = []
        goal = Goal(self.config.total_requests, self.config.duration)

        def begin(origin_ns: int, config: Config, arriving: Callable[[], int]) -> None:
            self.origin_ns = origin_ns
            self.start_unix_s = time.time() - (time.perf_counter_ns() - origin_ns) / 1e9
            self.config = dataclasses.replace(config, requests_file=self.config.requests_file)  # as the user named it
            if not config.requests_file and not config.prompt_calibration and not self._schedule.first:
                note("prompt lengths are estimates: calibrating them takes two warm-up replies with usage")
            level, repeat = "" if self.level is None else f"{self.level:g}", str(self.step.repeat)
            for csv_sink in csvs:
                csv_sink.begin(level=level, repeat=repeat, start_unix_s=f"{self.start_unix_s:.6f}")
            if not self.config.no_progress:
                live.append(LiveLine(self.tally, goal, time.perf_counter, arriving))
                live[0].start()

        breaker = Breaker(self.tally, stop, self.config, self._schedule.first)  # after the tally
        kept = [self.kept] if self.config.save_detailed else []
        sinks: list[Sink] = [self.tally, *csvs, *kept, breaker]
        config = dataclasses.replace(self.config, requests_file=self._requests_file)  # where all processes find it
        figures = ServerFigures(config)
        part = Part(config, self._workload, self._schedule, sinks, stop, begin, figures.begin)
        await figures.start()
        try:
            self.health = await team.measure(part)
        finally:
            for line in live:
                line.finish()
            self.tally.server = await figures.stop(self.tally, self.origin_ns)
            self.series = figures.series

    @property
    def level(self) -> Optional[float]:
        """None of a trace without a cap, whose load is its own."""
        own = self.config.concurrency is None and math.isinf(self.config.request_rate)
        return None if own else self.step.level

    @property
    def made(self) -> int:
        """The number of the first request of the next point."""
        return max(self._schedule.first + (self.config.total_requests or 0), self.tally.last_index + 1)

    def measured(self, complete: bool) -> Measured:
        """What is kept of it: figures, no values of single requests."""
        wave = min(self.config.concurrency or math.inf, sum(health.peak_in_flight for health in self.health))
        summary = self.tally.summary(int(wave))
        return Measured(self.step.level, self.step.repeat, self.config, summary, self.health, complete)


class Sweep:
    """The points of one invocation, one after the other over the same connections; a plain run has one of them."""

    def __init__(self, plan: Plan, config_at: Callable[[Step, int], Config], corpus: Optional[Corpus]) -> None:
        """`config_at`: the options of a step, and how many requests have warmed the server up at once before."""
        self._plan = plan
        self._config_at = config_at
        self._corpus = corpus
        self._made = self._warmed = 0  # requests so far; the most that warmed the server up at once
        self.measured: list[Measured] = []
        self.failure: Optional[Exception] = None  # what ended it after a measured point

    async def run(
        self, stop: Stop, csvs: Sequence[CsvSink], team: Team, tell: Callable[[Point, Measured], None]
    ) -> None:
        """Until the plan has no more steps, or a stop; `tell` reports each point. Raises as the first point does."""
        try:
            step = next(self._plan)
            while not stop.draining.is_set():
                point = Point(self._config_of(step), self._corpus, step, self._made)
                self._announce(point.config, step.level)
                await point.measure(stop, csvs, team)
                self._made = point.made
                if not point.origin_ns:  # stopped in its warm-up
                    return
                self.measured.append(point.measured(not stop.draining.is_set()))
                tell(point, self.measured[-1])
                step = self._plan.send(answer_of(self.measured[-1]))
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(stop.draining.wait(), point.config.cooldown)
        except StopIteration:
            pass
        except (UserError, RunError) as error:
            if not self.measured:
                raise
            self.failure = error

    def _config_of(self, step: Step) -> Config:
        """With what the points before have taught."""
        config = self._config_at(step, self._warmed)
        self._warmed = max(self._warmed, self._warmed + config.warmup)
        learnt = self.measured[-1].config.prompt_calibration if self.measured else config.prompt_calibration
        return dataclasses.replace(config, prompt_calibration=learnt)

    def _announce(self, config: Config, level: float) -> None:
        prompts, more = self._corpus.requests if self._corpus else 0, config.total_requests
        if prompts and self._made <= prompts < self._made + (more or math.inf):
            total = self._made + more if more else "unlimited"
            note(
                f"{total} requests cycle through {prompts} prompts: repeated prompts"
                " are answered from the server's prefix cache and measure that"
            )
        if self.measured and not config.no_progress:
            note(f"point {len(self.measured) + 1}: level {level:g}" + (f", {more} requests" if more else ""))


# === 15. Command line (build pure, run not) ===


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


BadValue = argparse.ArgumentTypeError


def _checked(kind: Callable[[str], Any], holds: Callable[[Any], Any], wanted: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise BadValue(f"takes {wanted}, not {plain(text, 60)!r}")
        return value

    return parse


_positive = _checked(int, lambda n: n >= 1, "a whole number, 1 or more")
_count_or_none = _checked(int, lambda n: n >= 0, "a whole number, 0 or more")
_seconds = _checked(float, lambda x: 0 < x < math.inf, "a number of seconds above 0")
_pause = _checked(float, lambda x: 0 <= x < math.inf, "a number of seconds, 0 or more")
_limit_ms = _checked(float, lambda x: 0 < x < math.inf, "a number of ms above 0")
_above_0 = _checked(float, lambda x: x > 0, "a number above 0, or inf")
_price_of = _checked(float, lambda x: 0 < x < math.inf, "a price above 0")
_fraction = _checked(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")
_temperature = _checked(float, lambda x: 0 <= x < math.inf, "a number, 0 or more")
_processes = _checked(lambda text: 0 if text == "auto" else int(text), lambda n: 0 <= n <= 256, "a number or auto")
_gpus = _checked(str, partial(re.fullmatch, r"off|all|\d+(,\d+)*"), "all, off, or numbers of GPUs like 0,1")
_calibration = _checked(
    lambda text: [float(word) for word in text.split(",")],
    lambda told: len(told) == 2 and 0 < told[0] < math.inf and abs(told[1]) < math.inf,
    "two numbers, tokens per word and tokens besides, as a report shows them",
)
_range = _checked(
    lambda text: [float(word) for word in text.split(":")],
    lambda ends: len(ends) == 2 and 0 < ends[0] < ends[1] < math.inf,
    "the least and the greatest level as in 1:512",
)


def _text(text: str) -> str:
    """What was typed, as UTF-8 also where the locale is not."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _path(text: str) -> str:
    if not text:
        raise BadValue("takes a file name, not '': is a shell variable unset?")
    return text


def _url(text: str) -> str:
    try:
        parts = urlsplit(text)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        valid = False
    if not valid or re.search(r"\s", text):
        raise BadValue(
            f"takes a URL like {DEFAULT_API_BASE}, not {plain(Redactor.url(re.sub('.*@', '***@', text)), 80)!r}"
        )
    return urlunsplit(parts._replace(path=parts.path.rstrip("/"), fragment=""))


def _metrics_page(text: str) -> str:
    url = text if text == "off" else _url(text)
    return url if text == "off" or urlsplit(url).path else f"{url}/metrics"


def _api_key(text: str) -> str:
    if not text.isascii() or not text.isprintable():
        raise BadValue("takes printable ASCII characters only")
    return text.strip()


def _header(text: str) -> tuple[str, str]:
    name, value = split_header(text)
    sendable = value and value.isprintable() and value.isascii()
    if not sendable or not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name, re.ASCII):
        raise BadValue("takes 'Name: value' or Name=value, in printable ASCII")
    if name.lower() in ("host", "content-length", "content-type", "connection", "transfer-encoding"):
        raise BadValue(f"takes no {name}: HTTP itself sets it")
    return name, value


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(_text(text))
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise BadValue(f'takes a JSON object like {{"ignore_eos": true}} ({error})') from None
    if not isinstance(value, dict):
        raise BadValue('takes a JSON object like {"ignore_eos": true}')
    return value


def _extra_body(text: str) -> dict[str, Any]:
    value = _json_object(text)
    by = {"model": "--model", "messages": "--requests-file", "prompt": "--requests-file", "stream": "--stream"}
    for name, option in by.items():
        if name in value:
            raise BadValue(f"takes no {name}: {option} sets it")
    if value.get("n", 1) not in (1, None):
        raise BadValue(
            "takes no n but 1: first token, gaps and tokens of several choices in one reply cannot be told apart"
        )
    return value


def _pair(text: str) -> tuple[str, str]:
    name, sign, value = _text(text).partition("=")
    if not sign or not name.isidentifier():
        raise BadValue(f"takes NAME=VALUE, not {plain(text, 60)!r}")
    return name, value


def _engine(text: str) -> str:
    if not all(isinstance(value, (int, float)) and value >= 0 for value in _json_object(text).values()):
        raise BadValue('takes a JSON object of numbers like {"ttft_ms": 200}')
    return text


def _each_once(kind: Callable[[str], float], text: str) -> list[float]:
    levels = [kind(word) for word in text.split(",")]
    if len(set(levels)) < len(levels):
        raise BadValue(f"takes each level once, not {plain(text, 60)!r}: --repeat measures it again")
    return levels


_rates, _levels = partial(_each_once, _above_0), partial(_each_once, _positive)


def _limit(text: str) -> str:
    try:
        Limit.of(text)
    except ValueError as error:
        raise BadValue(str(error)) from None
    return text


def _goal(text: str) -> tuple[str, float]:
    name, _, limit = text.partition(":")
    if name not in GOODPUT_NAMES:
        raise BadValue(f"takes limits in ms, as in ttft:500 tpot:50 e2el:5000, not {plain(text, 60)!r}")
    value: float = _limit_ms(limit)
    return GOODPUT_NAMES[name], value


BACKENDS = {"chat": "openai-chat", "completions": "openai"}  # as vLLM's result files name them
TOKEN_FIELDS = ("auto", "max_tokens", "max_completion_tokens")
TRANSPORTS = ("auto", "stopwatch", "sdk")


def columns_help() -> str:
    width = max(map(len, CSV_COLUMNS))
    return "\n".join(
        (
            "Columns of --results-csv: one row per request, in order of completion; blank = not measured.\n",
            *(f"  {name:{width}}  {column.meaning}" for name, column in CSV_COLUMNS.items()),
            "\nExit codes:\n",
            "  0    done",
            "  1    nothing succeeded, more errors than --max-error-rate, or the run stopped itself",
            "  2    wrong usage; one line says what to do",
            "  3    an --assert or --slo does not hold; of a sweep's --slo: at no level",
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


AGAIN = {"action": "append"}
# Groups, and below each its options: how one is shown, how its value is read (None: a switch; words: one of them), its
# help, and what else argparse is to know.
OPTIONS: Sequence[Any] = (
    "Server",
    ("--api-base URL", _url,
     f"base URL; several: asked in turn (default: $OPENAI_BASE_URL, else {DEFAULT_API_BASE})", AGAIN),
    ("--api-key KEY", _api_key, "bearer token, never shown (default: $OPENAI_API_KEY, else vllm)"),
    ("--header N:V", _header, "sent with every request", {**AGAIN, "dest": "headers"}),
    ("--model MODEL", _text, "model name; required unless --demo is given or every corpus line has one"),
    ("--endpoint-type", (*ENDPOINT_TYPES,), "completions: plain prompts (default: %(default)s)"),
    ("--wait-ready S", _seconds, "wait up to so long until every server answers"),
    ("--ca-file FILE", _path, "trust the certificate authority in this PEM file"),
    ("--insecure", None, "do not check the server's TLS certificate"),
    "Load",
    ("--concurrency N[,N...]", _levels,
     "requests in flight; with a rate or a trace, at most (default: 128; there, no limit); a list is a sweep"),
    ("--total-requests N", _positive,
     "requests to make (default: 1024, or one per prompt given; with --duration, no limit)"),
    ("--duration S", _seconds, "seconds after which no more requests are sent"),
    ("--grace S", _pause, "seconds for what is in flight then (default: until all is done)"),
    ("--request-rate R[,R...]", _rates,
     "requests a second, answered or not (default: inf, no rate); a list is a sweep"),
    ("--burstiness B", _above_0,
     "of the rate: shape of gamma-distributed gaps; 1 Poisson, inf evenly spaced (default: 1)"),
    ("--ramp-up S", _seconds, "seconds in which rate or concurrency grow to their full value"),
    ("--speed X", _above_0, "replay a trace so many times as fast; inf: regardless of its times"),
    ("--timestamp-unit", (*TIMESTAMP_UNITS,), "of a trace's timestamps (default: ms)"),
    ("--warmup N", _count_or_none, "unmeasured requests before, all at once (default: as many as are in flight)"),
    ("--stream", None, "stream the replies: adds TTFT, TPOT and gaps between chunks"),
    ("--continuous-usage", None, "with --stream: token counts in every chunk (vLLM, SGLang)"),
    ("--temperature T", _temperature, "sampling temperature (default: %(default)s)"),
    ("--max-tokens-field", TOKEN_FIELDS, "name of the output limit (auto: whichever the warm-up accepts)"),
    ("--extra-body JSON", _extra_body, "object merged into every request body"),
    "Prompts",
    ("--prompt-tokens N", _positive, "length of generated prompts, by the server's count (default: %(default)s)"),
    ("--output-tokens N", _positive, "most tokens of a reply (default: 1024; with --demo 128)"),
    ("--requests-file FILE", _path, "JSONL: text, prompt, messages or turns; body fields"),
    ("--history", HISTORIES, "whose answers a later turn of a session holds (default: %(default)s)"),
    ("--system-prompt TEXT", _text, "system message before every prompt"),
    ("--seed N", int, "makes generated prompts repeatable (default: random, reported)"),
    ("--prompt-calibration A,B", _calibration,
     "tokens per word and tokens besides, for --prompt-tokens (default: learnt in the warm-up, reported)"),
    "Server's own figures",
    ("--server-metrics URL", _metrics_page,
     "read this metrics page, too, never with the key; repeatable; off (default: /metrics of a local server)", AGAIN),
    ("--metrics-interval S", _seconds, "seconds between two readings (default: %(default)s)"),
    ("--gpu-metrics GPUS", _gpus,
     "read this machine's GPUs: all, 0,1 or off (default: of a local server, those that work)"),
    "Output",
    ("--results-csv FILE", _path, "write one row per request; see --help-columns"),
    ("--append", None, "add to an existing --results-csv"),
    ("--overwrite", None, "replace an existing --results-csv, once the warm-up has succeeded"),
    ("--summary-jsonl FILE", _path, "append the results of the run as one line of JSON"),
    ("--summary-json PATH", _path, "write them to a new file; DIR/: to a new file in it"),
    ("--save-detailed", None, "add the per-request lists of vLLM and SGLang to both"),
    ("--metadata K=V", _pair, "add a key to both, such as gpu_type=H100", AGAIN),
    ("--report FILE", _path, "draw the results into an HTML page; needs bench_report.py"),
    ("--no-progress", None, "do not show the progress line"),
    ("--verbose", None, "confidence intervals, and all details of every level"),
    "Sweeps and limits",
    ("--requests-per-slot N", _positive,
     f"of a sweep over the concurrency: requests per level, N times the level (default: {REQUESTS_PER_SLOT})"),
    ("--repeat N", _positive, "measure each level N times (default: %(default)s)"),
    ("--cooldown S", _pause, "seconds between two points (default: %(default)s)"),
    ("--slo LIMIT", _limit, "exit 3 unless a level holds 'p99_ttft_ms<500'", AGAIN),
    ("--find-max LOW:HIGH", _range, "search the highest concurrency that holds every --slo"),
    ("--assert LIMIT", _limit, "exit 3 where it does not hold", {**AGAIN, "dest": "asserts"}),
    ("--goodput NAME:MS", _goal, "count requests within ttft:500 tpot:50 e2el:5000", {"nargs": "+"}),
    ("--gpus N", _positive, "GPUs of the server: throughput of each"),
    ("--gpu-hour PRICE", _price_of, "of one GPU: price of a million tokens"),
    "Client",
    ("--processes N", _processes, "client processes, or auto (default: %(default)s)"),
    ("--transport", TRANSPORTS, "stopwatch: arrivals stamped by the kernel; sdk: openai's HTTP client"),
    "Limits",
    ("--timeout S", _seconds, "seconds for one whole request (default: %(default)s)"),
    ("--connect-timeout S", _seconds, "seconds to connect (default: %(default)s)"),
    ("--first-byte-timeout S", _seconds, "seconds until a reply begins (default: no limit)"),
    ("--idle-timeout S", _seconds, "seconds between two reads of a reply (default: no limit)"),
    ("--max-error-rate F", _fraction, "exit 1 above this share of errors (default: %(default)s)"),
    ("--stop-after-errors N", _positive, "stop the run at this many errors"),
    "Demo",
    ("--demo", None, "start a simulated server and measure it"),
    ("--demo-engine JSON", _engine, 'its speed, e.g. {"ttft_ms": 200, "gap_ms": 10}'),
)  # fmt: skip


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
    for row in OPTIONS:
        if isinstance(row, str):
            add = parser.add_argument_group(row).add_argument
            continue
        shown, kind, text, *more = row
        name, _, metavar = shown.partition(" ")
        how: dict[str, Any] = {"type": kind, "metavar": metavar}
        if kind is None or isinstance(kind, tuple):
            how = {"choices": kind} if kind else {"action": "store_true"}
        add(name, help=text, **how, **dict(*more))
    add = parser.add_argument
    add("--help-columns", action="version", version=columns_help(), help="explain CSV columns and exit codes, and exit")
    add("--debug", action="store_true", help="show the traceback of an internal error")
    add("--version", action="version", version=f"%(prog)s {__version__}")
    add("--shard", type=int, help=argparse.SUPPRESS)
    add("--figures", action="store_true", help=argparse.SUPPRESS)
    # Given with a schedule, a concurrency is a cap.
    parser.set_defaults(**{**DEFAULTS, "concurrency": None, "request_rate": None})
    return parser


def _told_by_body(options: argparse.Namespace) -> dict[str, Any]:
    """Options that --extra-body overrides, so that the report says what is sent."""
    body = options.extra_body
    told = {name: body[name] for name in ("temperature",) if isinstance(body.get(name), (int, float))}
    for name in OUTPUT_LIMITS:
        if isinstance(body.get(name), int) and body[name] > 0:
            told.update(output_tokens=body[name], max_tokens_field=name)
    return told


class Axis(NamedTuple):
    """What a sweep or a search goes over, and its levels; a plain run has one."""

    by_rate: bool
    levels: Sequence[float]

    @classmethod
    def of(cls, options: argparse.Namespace) -> Axis:
        rates = [rate for rate in options.request_rate or () if rate < math.inf]
        by_rate = bool(rates) and len(options.concurrency or ()) < 2
        levels = rates if by_rate else options.concurrency or [DEFAULTS["concurrency"]]
        return cls(by_rate, options.find_max or levels)


def is_several(options: argparse.Namespace) -> bool:
    return bool(options.find_max) or len(Axis.of(options).levels) > 1 or options.repeat > 1


def requests_at(options: argparse.Namespace, prompts: int, trace: bool, level: float) -> Optional[int]:
    """How many requests a level has; None: as many as --duration has time for. `prompts`: of the corpus."""
    axis = Axis.of(options)
    if options.total_requests or (options.duration and not trace):
        total: Optional[int] = options.total_requests
        return total
    sweeping = not axis.by_rate and (len(axis.levels) > 1 or options.requests_per_slot)
    per_slot = (options.requests_per_slot or REQUESTS_PER_SLOT) * level
    return max(LEAST_PER_LEVEL, int(per_slot)) if sweeping else prompts or 1024


def build_config(
    options: argparse.Namespace, prompts: int, trace: bool = False, step: Optional[Step] = None, warmed: int = 0
) -> Config:
    """Options and what follows from them, at one step of a sweep.

    `prompts`: of the corpus, 0 without one; `trace`: it has timestamps. `warmed`: how many requests have warmed the
    server up at once before.
    """
    given = {**vars(options), **_told_by_body(options)}
    axis, step = Axis.of(options), step or Step(Axis.of(options).levels[-1])
    trace = trace and options.speed < math.inf
    total = requests_at(options, prompts, trace, step.level)
    cap = None if axis.by_rate or trace else int(step.level)
    concurrency = (options.concurrency or [cap])[0] if axis.by_rate or trace else cap
    total = total and total * step.factor
    warmup = default_warmup(concurrency, total) if options.warmup is None else options.warmup
    processes = options.processes or 1
    derived: dict[str, Any] = {
        "concurrency": concurrency,
        "request_rate": step.level if axis.by_rate else (options.request_rate or [math.inf])[0],
        "timestamp_unit": (options.timestamp_unit or "ms") if trace else None,
        "corpus": given.get("corpus") or {},
        "total_requests": total,
        "duration": options.duration and options.duration * step.factor,
        "output_tokens": given["output_tokens"] or (DEMO_OUTPUT_TOKENS if options.demo else 1024),
        "metadata": dict(options.metadata) if options.metadata else None,
        "warmup": max(0, warmup - warmed),
        "processes": min(concurrency or processes, total or processes, processes),
        "goodput": dict(given["goodput"] or ()),
        "slo": given["slo"] or [],
        "asserts": given["asserts"] or [],
    }
    names = [item.name for item in dataclasses.fields(Config)]
    values: dict[str, Any] = {**{name: given.get(name) for name in names}, **derived}
    return Config(**values)


def config_of(
    options: argparse.Namespace, corpus: Optional[Corpus], trace: bool, step: Step, warmed: int = 0
) -> Config:
    """The options at a step; of a corpus of sessions the numbers given count these, and become requests."""
    config = build_config(options, len(corpus) if corpus else 0, trace, step, warmed)
    if corpus and corpus.sessions and config.total_requests:
        return dataclasses.replace(config, total_requests=corpus.sessions.first(config.total_requests))
    return config


def plan_of(options: argparse.Namespace) -> Plan:
    axis = Axis.of(options)
    if options.find_max:
        low, high = axis.levels
        return search_plan(low, high, not axis.by_rate)
    return sweep_plan(axis.levels, options.repeat)


def loads_of(options: argparse.Namespace) -> dict[str, Any]:
    """What a report says of the load of several points; empty for a plain run."""
    if not is_several(options):
        return {}
    axis = Axis.of(options)
    levels = (":" if options.find_max else ",").join(f"{level:g}" for level in axis.levels)
    told = {} if axis.by_rate else {"total_requests": options.total_requests or "by level"}
    return {"request_rate" if axis.by_rate else "concurrency": levels, "warmup": options.warmup, **told}


def refuse(*rules: tuple[Any, str]) -> None:
    """Raises UserError with the reason of the first rule whose condition holds."""
    for wrong, why in rules:
        if wrong:
            raise UserError(why)


def check_options(options: argparse.Namespace) -> None:
    """Raises UserError for options that do not go together, or would do nothing, whatever the corpus."""
    axis, rates, levels = Axis.of(options), options.request_rate or (), options.concurrency or ()
    searching, lists = options.find_max, len(levels) > 1 or len(rates) > 1
    endless = axis.by_rate and is_several(options) and not (options.total_requests or options.duration)
    unseen = [name for name, _ in options.goodput or () if name in STREAMED_METRICS and not options.stream]
    kept = options.summary_json or options.summary_jsonl or options.report
    refuse(
        (options.append and options.overwrite, "--append and --overwrite exclude each other"),
        (options.demo_engine and not options.demo, "--demo-engine needs --demo"),
        (len(levels) > 1 < len(rates), "two lists at once: --concurrency or --request-rate, not both"),
        (searching and (lists or options.repeat > 1),
         "--find-max chooses levels and repeats them: no list, no --repeat"),
        (searching and levels and not axis.by_rate,
         "--find-max chooses how many are in flight: leave out --concurrency"),
        (len(rates) > 1 and math.inf in rates, "a list of rates takes numbers: inf is no rate"),
        (searching and not options.slo, "--find-max needs a limit that holds or not: --slo 'p99_ttft_ms<500'"),
        (not axis.by_rate and axis.levels != [int(n) for n in axis.levels], "--find-max is of whole numbers in flight"),
        (endless, "how long is each rate? --total-requests or --duration"),
        (options.total_requests and options.requests_per_slot,
         "--total-requests and --requests-per-slot exclude each other"),
        (unseen, f"--goodput {' '.join(unseen)} needs --stream: a whole reply does not tell it"),
        (options.endpoint_type == "completions" and options.system_prompt,
         "--system-prompt is of a chat; /completions takes plain prompts: --endpoint-type chat"),
        (options.save_detailed and not kept, "--save-detailed needs --summary-json, --summary-jsonl or --report"),
    )  # fmt: skip


def check_schedule(options: argparse.Namespace, prompts: int, trace: bool) -> None:
    """Raises UserError for options that do not go with this corpus, or with none."""
    rated = math.inf > min(options.request_rate or [math.inf])
    replayed = trace and options.speed < math.inf
    name, asked = options.requests_file, options.total_requests or 0
    refuse(
        (replayed and rated, f"--request-rate: {name} has timestamps, which say when; --speed inf leaves them aside"),
        (replayed and is_several(options), f"{name} has timestamps: it is replayed once, at its own load"),
        (replayed and options.ramp_up, f"--ramp-up: {name} has timestamps, which say when"),
        (replayed and asked > prompts, f"--total-requests {asked}: the trace {name} has {prompts}"),
        (not trace and options.speed != 1, "--speed is that of a trace: --requests-file needs timestamps"),
        (not trace and options.timestamp_unit, "--timestamp-unit is that of a trace: --requests-file needs timestamps"),
        (not rated and options.burstiness != 1, "--burstiness is that of a rate: add --request-rate"),
        (options.grace is not None and not options.duration, "--grace begins when --duration is over: add --duration"),
    )


def enough_processes(config: Config) -> int:
    """What --processes auto means: so many that each needs at most half a core, never more than the cores; said."""
    read_us, tokens, cap = read_cost_us(), config.output_tokens, config.concurrency
    busy = config.request_rate * tokens / AUTO_TOKENS_PER_S  # in flight by Little's law, where there is a rate
    concurrency = cap or DEFAULTS["concurrency"] if math.isinf(busy) else math.ceil(min(busy, cap or busy))
    requests_per_s = concurrency * AUTO_TOKENS_PER_S / tokens
    reads_per_s = requests_per_s * READS_PER_REQUEST + (concurrency * AUTO_TOKENS_PER_S if config.stream else 0)
    share_of_core = reads_per_s * read_us / 1e6
    enough = max(1, min(os.cpu_count() or 1, math.ceil(share_of_core / AUTO_CORE_SHARE)))
    costs = f"{read_us:.1f} us a chunk, {read_us * READS_PER_REQUEST:.0f} us a request here"
    asked = f"{concurrency} in flight at {AUTO_TOKENS_PER_S} tokens/s each"
    note(f"--processes auto: {enough}; {asked} would take {share_of_core:.0%} of a core ({costs})")
    return enough


def read_cost_us() -> float:
    """What one chunk of a stream costs here, received, kept and read; takes a few milliseconds."""
    event = b'data: {"choices":[{"index":0,"delta":{"content":" word"},"finish_reason":null}]}\n\n'
    near, far = socket.socketpair()
    buffers, pieces, stamps = [bytearray(READ_BUFFER_BYTES)], [], []
    with near, far:
        begun = time.perf_counter()
        for _ in range(2 * PLAIN_RUN):
            far.send(event)
            size = near.recv_into(buffers[0])
            stamps.append(time.perf_counter_ns())
            pieces.append(bytes(buffers[0][:size]))
        StreamReader(Reply()).feed(stamps, pieces)
        return (time.perf_counter() - begun) / len(pieces) * 1e6


def resolve_server(options: argparse.Namespace, environ: Mapping[str, str]) -> None:
    """Fill in base URLs, headers and key, from the environment where need be. Raises UserError for unusable values."""
    options.headers = dict(options.headers or ())
    has_key = any(name in options.headers for name in ("Api-Key", "X-Api-Key", "Authorization"))
    name = "OPENAI_BASE_URL"
    try:
        options.servers = options.api_base or [_url(environ.get(name) or DEFAULT_API_BASE)]
        options.api_base, name = options.servers[0], "OPENAI_API_KEY"
        if options.api_key is None:
            options.api_key = _api_key(environ.get(name) or ("" if has_key else DEFAULT_API_KEY))
    except BadValue as error:
        raise UserError(f"${name} {error}") from None


def list_of_models(config: Any) -> Any:
    """What /models says, by options or Config. Raises what `fetch` raises."""
    parts = urlsplit(config.api_base)
    url = urlunsplit(parts._replace(path=f"{parts.path}/models"))
    return fetch_json(url, config.api_key, headers=config.headers)


def require_model(options: argparse.Namespace) -> None:
    if options.model:
        return
    base = Redactor.url(options.api_base)
    redactor = Redactor.of(options, os.environ)
    try:
        names = ", ".join(str(model["id"]) for model in list_of_models(options)["data"][:20])
    except Exception as error:  # whatever a server may answer there, the user's way out is the same
        reason = redactor.text(plain(_reason(error), 100))
        raise UserError(f"--model is missing, and {base} does not tell its models ({reason})") from None
    raise UserError(f"--model is missing; {base} serves: {redactor.text(plain(names))}")


def keep_files_apart(options: argparse.Namespace) -> None:
    """Raises UserError when one file is named twice: the corpus would be overwritten, or results mixed."""
    named: dict[str, str] = {}
    for option in ("--requests-file", "--results-csv", "--summary-jsonl", "--summary-json", "--report"):
        path = getattr(options, option[2:].replace("-", "_"))
        other = named.setdefault(os.path.realpath(path), option) if path else option
        if other != option and os.path.realpath(path) != os.devnull:
            raise UserError(f"{option} and {other} name the same file: {path}")


def need_descriptors(concurrency: Optional[int]) -> None:
    """Raise the soft limit on open files as far as needed (None: as it goes). Raises UserError where it is too low."""
    try:
        resource = importlib.import_module("resource")
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = hard if concurrency is None else concurrency + SPARE_DESCRIPTORS
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


def notes_before(config: Config) -> Iterator[str]:
    """What a user should know before the figures come."""
    proxy = next(filter(None, map(proxy_for, config.servers)), None)
    if proxy:
        yield f"via proxy {Redactor.url(proxy)}"
    unknown = config.corpus.get("not_sent")
    if unknown:
        yield f"keys of the corpus that are not sent: {', '.join(unknown)} (`body` in a line sends anything)"
    if config.insecure:
        yield "--insecure: the server's certificate is not checked"
    if config.transport == "auto" and not proxy and Stopwatch.missing():
        yield f"no stopwatch without {Stopwatch.missing()}; measuring with the SDK's own HTTP client"


def versions() -> dict[str, str]:
    """What a result depends on, as far as it is installed and imported."""
    found = {"python": sys.version.split()[0], "online_bench": __version__}
    for name in ("openai", "httptools", "h11", "uvloop"):
        with contextlib.suppress(Exception):
            found[name] = importlib.import_module("importlib.metadata").version(name)
    return found


def fetch_json(
    url: str, api_key: Optional[str], timeout_s: float = 5.0, headers: Optional[Mapping[str, str]] = None
) -> Any:
    """What a page of the server says; the key is for this server only. Raises what `fetch` raises."""
    own = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    own = {**own, **split_login(url)[1], **(headers or {})}
    return json.loads(fetch(url, own, ERROR_BODY_BYTES * 1024, timeout_s))


async def one_token(config: Config) -> Optional[Failure]:
    """Ask for it; why there is no answer."""
    sender, permits = Sender(config, 1), Permits(1)
    permits.open(time.perf_counter_ns())
    try:
        return (await sender(dataclasses.replace(warmup_request(config, 0), output_tokens=1), Turn(permits))).failure
    finally:
        await sender.transport.aclose()


def not_ready(config: Config) -> str:
    """What keeps a server from answering; empty when it does, be it that it refuses what the warm-up will explain."""
    try:
        list_of_models(config)
    except Exception as error:
        if getattr(error, "code", 500) >= 500 and not isinstance(error, ValueError):  # else it has no such list
            return _reason(error)
    failure = run_loop(one_token(config))
    answered = not failure or failure.status == "decode_error" or failure.kind in REFUSALS
    return "" if answered or not failure else failure.message


def wait_until_ready(config: Config, limit_s: float) -> None:
    """Until every server lists its models and gives a token. Raises RunError with the last cause."""
    end_s = time.monotonic() + limit_s
    redactor = Redactor.of(config, os.environ)
    for url in config.servers:
        name, said = Redactor.url(url), ""
        while True:
            timeout = min(config.timeout, max(1.0, end_s - time.monotonic()))
            cause = not_ready(dataclasses.replace(config, api_base=url, servers=[url], timeout=timeout))
            if not cause:
                break
            cause, left_s = redactor.text(plain(cause)), end_s - time.monotonic()
            if left_s <= 0:
                raise RunError(f"{name} was not ready within {limit_s:g} s: {cause}")
            if cause != said:
                note(f"waiting for {name}: {cause}")
            said = cause
            time.sleep(min(READY_POLL_S, left_s))


class DemoServer:
    """demo_server.py, which stands beside this file, as a process that ends with this one, however that ends."""

    def __init__(self, engine: Optional[str]) -> None:
        """Raises UserError when the file is missing, RunError when it does not start."""
        path = os.path.join(os.path.dirname(THIS_FILE), "demo_server.py")
        if not os.path.exists(path):
            raise UserError(f"--demo needs demo_server.py: copy it to {os.path.dirname(THIS_FILE)}")
        command = [sys.executable, path, "--port", "0", "--until-stdin-closes", "--engine", engine or "{}"]
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True)
        except OSError as error:
            raise RunError(f"cannot start the demo server: {_reason(error)}") from None
        assert self._process.stdout is not None
        self.api_base: str = self._process.stdout.readline().decode().strip()
        if not self.api_base:
            raise RunError("the demo server did not start")

    def truth(self, since_ns: int) -> dict[str, Distribution]:
        """Latency and TTFT as the server saw them, of the requests that arrived from `since_ns` on."""
        said = fetch_json(f"{self.api_base[: -len('/v1')]}/truth?since_ns={since_ns}", None, timeout_s=60.0)
        measured = [dict(zip(said["fields"], row)) for row in said["requests"]]
        streamed = [row for row in measured if row["streamed"]]
        return {
            "latency": describe((row["last_ns"] - row["arrived_ns"]) / 1e6 for row in measured),
            "ttft": describe((row["first_ns"] - row["arrived_ns"]) / 1e6 for row in streamed),
        }

    def stop(self) -> None:
        self._process.communicate()  # its standard input ends by it


class Page:
    """--report: what is measured, kept in a folder until bench_report.py, beside this file, has drawn it."""

    def __init__(self, path: str) -> None:
        """Raises UserError when the page cannot be written, or would replace another file."""
        with _writing("--report", path):
            if os.path.exists(path) and b'content="bench_report.py"' not in Path(path).read_bytes()[:400]:
                raise UserError(f"--report {path} exists and is no report; name another file")
            os.rmdir(tempfile.mkdtemp(dir=os.path.dirname(path) or "."))
            self.folder = tempfile.mkdtemp(prefix="report-")
        self._path = path

    def draw(self, name: str) -> None:
        """A page that cannot be drawn costs one line, which says how to draw it later."""
        script = os.path.join(os.path.dirname(THIS_FILE), "bench_report.py")
        command = [sys.executable, script, "html", f"{name.replace('=', ' ')}={self.folder}", "-o", self._path]
        why = f"copy bench_report.py to {os.path.dirname(script)}"
        if os.path.exists(script):
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
            if done.returncode == 0:
                return note(f"report {done.stdout}")
            why = (done.stderr.strip() or "it was killed").splitlines()[-1]
        _say(f"WARNING: no --report: {plain(why)}; then: bench_report.py html {self.folder} -o {self._path}")
        self.folder = ""  # it stays

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class Invocation:
    """One command line: its outputs, opened before any load, its signals, and its exit code."""

    def __init__(self, config: Config, loads: Mapping[str, Any], argv: Sequence[str], ends: ExitStack) -> None:
        """`config`: that of the highest level; `loads`: what the report says of all; `ends` closes the outputs.

        Raises UserError when one cannot be opened.
        """
        self.config = config
        self._loads = loads
        self._several = bool(loads)
        self._unit = "req/s" if "request_rate" in loads else "in flight"
        self._argv = argv
        self._started = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        self._csvs: list[CsvSink] = []
        self._summaries: list[SummarySink] = []
        self._page: Optional[Page] = None
        ends.callback(self._close)
        self._open(config)

    def _close(self) -> None:
        sinks: list[Union[CsvSink, SummarySink]] = [*self._csvs, *self._summaries]
        for sink in sinks:
            sink.close()
        if self._page:
            self._page.close()

    def _open(self, config: Config) -> None:
        point = Point(dataclasses.replace(config, metadata=None), None, Step(1.0), 0)
        blank = point.measured(True)
        named = summary_json(*blank.values, self._facts(point, blank, Stop()))
        for name in config.metadata or ():
            if name in named or re.match(r"(mean|median|std|max|p\d*|server)_|gpu_(name|driver)$|.*_(count|ms)$", name):
                raise UserError(f"--metadata {name}: results have keys of such a name; choose another")
        if config.results_csv:
            self._csvs.append(CsvSink(config.results_csv, config.append, config.overwrite))
        if config.summary_jsonl:
            self._summaries.append(SummarySink(config.summary_jsonl))
        if config.summary_json:
            self._summaries.append(SummarySink(config.summary_json, new=True, points=1 + self._several))
        if config.report:
            self._page = Page(config.report)
            self._csvs.append(CsvSink(os.path.join(self._page.folder, "results.csv"), append=False, overwrite=False))
            self._summaries.append(SummarySink(os.path.join(self._page.folder, "results.jsonl")))

    def run(self, sweep: Sweep, demo: Optional[DemoServer]) -> int:
        """Measure and report; the exit code."""
        with signals_as_before():
            stop = run_loop(self._measure(sweep, demo))
            finish_on_first_signal(stop)
            code = self._finish(sweep, stop)
        if self._page and self._csvs[-1].rows:
            self._page.draw((self.config.metadata or {}).get("label", self.config.model))
        return code

    async def _measure(self, sweep: Sweep, demo: Optional[DemoServer]) -> Stop:
        stop, config = Stop(), self.config
        on_signals(stop)
        team: Team = Crew(config) if config.processes > 1 else Runner(config, config.concurrency, Peers())
        try:
            await sweep.run(stop, self._csvs, team, partial(self._tell, stop, demo))
        finally:
            await team.aclose()
        return stop

    def _tell(self, stop: Stop, demo: Optional[DemoServer], point: Point, measured: Measured) -> None:
        """What a point has given: everything in a plain run; of several points the table is in the JSON."""
        summary, config = measured.summary, measured.config
        if summary.ok + summary.errors + summary.aborted:
            failed = error_warning(summary)
            notices = [*([failed] if failed else []), *map(ReportWarning, self._notices(summary, config, stop))]
            truth = self._truth(summary, demo, point.origin_ns) if demo else ""
            blocks = detail_blocks(*measured.values, notices, truth)
            details = joined(blocks if config.verbose or not self._several else blocks[:JUDGED_BLOCKS])
            report(summary_block(summary, config.concurrency))
            report("\n" + "\n".join(details) + "\n")
            self._write_summary(point, measured, stop)

    def _finish(self, sweep: Sweep, stop: Stop) -> int:
        """The table of several points, the configuration, and the exit code."""
        measured = [one for one in sweep.measured if one.summary.ok + one.summary.errors + one.summary.aborted]
        if not measured:
            _say("Interrupted before the first measured request had ended: nothing to report.")
            return 130
        levels = self._levels(measured)
        bend = None if self.config.find_max else sweep_knee(levels)
        if self._several:
            table, sentences = (make(levels, self._unit, bend) for make in (sweep_table, sweep_sentences))
            report("\n".join([*table, "", *sentences, ""]))
        report(config_block(measured[-1].config, self._loads))
        limits = limits_of(self.config)
        if self._several and limits:
            report("\n" + capacity_sentence(levels, limits, self._unit))
        if sweep.failure:
            _say(f"{Path(__file__).name}: {plain(str(sweep.failure), 500)}")
        return exit_code(self._codes(sweep, measured, levels, stop))

    def _levels(self, measured: Sequence[Measured]) -> list[Level]:
        """A search goes by the newest point of each level, and by what chance could not turn."""
        limits, groups = limits_of(self.config), levels_of(measured)
        if not self.config.find_max:
            return [Level(points, limits) for points in groups]
        return [Level(points[-1:], limits, answer_of(points[-1]).needed) for points in groups]

    def _codes(self, sweep: Sweep, measured: Sequence[Measured], levels: Sequence[Level], stop: Stop) -> Iterator[int]:
        useless = [one.summary.ok == 0 or one.summary.error_share > one.config.max_error_rate for one in measured]
        if stop.interrupted:
            yield 130
        if sweep.failure:
            yield 2 if isinstance(sweep.failure, UserError) else 1
        if stop.reason or (all(useless) if self.config.find_max else any(useless)):
            yield 1
        judged = (judge(Limit.of(text), *one.values) for one in measured for text in one.config.asserts)
        if not all(one.holds for one in judged) or (self.config.slo and not any(level.holds for level in levels)):
            yield 3

    def _truth(self, summary: Summary, demo: DemoServer, since_ns: int) -> str:
        try:
            return truth_line(summary, demo.truth(since_ns))
        except Exception as error:  # it is dead or drowned: the report stands without it
            return f"WARNING: the demo server does not tell what it measured: {plain(_reason(error))}"

    def _notices(self, summary: Summary, config: Config, stop: Stop) -> Iterator[str]:
        if stop.interrupted or stop.reason:
            why, made = stop.reason or "interrupted", summary.ok + summary.errors + summary.aborted
            yield f"{why}: {made} of {config.total_requests or 'as many as possible'} requests were made"
        for sink in self._csvs:
            if sink.lost:
                yield f"{sink.lost} rows could not be written to {sink.path}: {sink.reason}"
            if sink.gone():
                yield f"{sink.path} has been removed or replaced: its {sink.rows} rows are lost"

    def _write_summary(self, point: Point, measured: Measured, stop: Stop) -> None:
        if not self._summaries:
            return
        lists = {**detail_lists(point.kept), **point.series} if point.config.save_detailed else {}
        result = {**summary_json(*measured.values, self._facts(point, measured, stop)), **lists}
        for sink in self._summaries:
            try:
                sink.write(result)
            except (OSError, UserError) as error:
                _say(f"WARNING: the summary could not be written to {sink.path}: {_reason(error)}")

    def _facts(self, point: Point, measured: Measured, stop: Stop) -> dict[str, Any]:
        """What the figures do not say of a point; its times on the wall clock end as far apart as it took."""
        config, tally = measured.config, point.tally
        times = [point.start_unix_s + at for at in (tally.first_sent_s, tally.last_done_s)]
        if not all(map(math.isfinite, times)):  # nothing has ended
            times = [point.start_unix_s] * 2
        return {
            "date": self._started,
            "benchmark_start_time_unix": times[0],
            "benchmark_end_time_unix": times[1],
            "endpoint_type": BACKENDS[config.endpoint_type],
            "backend": BACKENDS[config.endpoint_type],
            "dataset_name": "custom" if config.requests_file else "random",
            **({} if point.level is None else {"level": point.level}),
            "repeat": measured.repeat,
            "start_unix_s": point.start_unix_s,
            **{name: Redactor.config(config)[name] for name in ("request_rate", "burstiness")},
            "interrupted": stop.interrupted,
            "stop_reason": stop.reason,
            "versions": versions(),
            "argv": Redactor.of(config, os.environ).argv(self._argv),
        }


def benchmark(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Check everything, then load, then report. Raises UserError and RunError."""
    check_options(options)
    resolve_server(options, os.environ)
    if options.demo:
        options.model = options.model or "demo"
    if not options.requests_file:
        require_model(options)
    if options.ca_file or options.insecure:
        tls_context(Origin.of("https://localhost", options.ca_file, options.insecure))
    keep_files_apart(options)
    corpus, name = None, options.requests_file
    with ExitStack() as ends:
        if name:
            corpus = load_requests(name, options.system_prompt, options.endpoint_type, options.history)
            ends.callback(corpus.close)
        return benchmark_with(corpus, options, argv, ends)


def benchmark_with(corpus: Optional[Corpus], options: argparse.Namespace, argv: Sequence[str], ends: ExitStack) -> int:
    """The same from where the prompts are known; `ends` closes what is opened."""
    prompts = len(corpus) if corpus else 0
    trace = corpus is not None and corpus.is_trace
    check_schedule(options, prompts, trace)
    if corpus:
        options.model = options.model or corpus.own_model
        require_model(options)
        options.corpus = corpus.asked(options.model)
    options.seed = secrets.randbelow(1 << 32) if options.seed is None else options.seed
    most = Step(max(Axis.of(options).levels))
    options.processes = options.processes or enough_processes(config_of(options, corpus, trace, most))
    config = config_of(options, corpus, trace, most)
    # The simulated server inherits the limit and has every connection; of several servers each may have all.
    sockets = config.concurrency and config.concurrency * len(config.servers)
    need_descriptors(sockets if config.demo or sockets is None else -(-sockets // config.processes))
    invocation = Invocation(config, loads_of(options), argv, ends)
    demo = None
    if config.demo:
        demo = DemoServer(options.demo_engine)
        ends.callback(demo.stop)
        options.api_base, options.servers = demo.api_base, [demo.api_base]
        invocation.config = config = config_of(options, corpus, trace, most)
    if importlib.util.find_spec("openai") is None:  # before any socket is opened
        raise UserError("cannot import openai: pip install openai")
    if config.wait_ready:
        wait_until_ready(config, config.wait_ready)
    for line in notes_before(config):
        note(line)
    return invocation.run(Sweep(plan_of(options), partial(config_of, options, corpus, trace), corpus), demo)


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
    if options.figures:
        figures_main()
        return 0
    if options.shard is not None:
        run_loop(shard_main(options.shard))
        return 0
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
