#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["locust"]
# ///
"""Submit a JSONL corpus of prompts to an OpenAI-compatible server, from as many machines as it takes.

This one file is a Locust test: copy it to a machine with Python 3.9+ and `pip install locust`.
Every prompt is sent exactly once, as one non-streaming chat completion, whatever the number of
users, processes and machines; every prompt that was sent becomes exactly one row of one CSV file.

    REQUESTS_FILE=requests.jsonl OPENAI_MODEL=my-model \\
    locust -f locust_batch.py --headless --host http://127.0.0.1:8000 -u 500 -r 500
    locust -f locust_batch.py --headless --host http://127.0.0.1:8000 -u 500 -r 500 --processes 4
    locust -f locust_batch.py --headless --host http://10.0.0.9:8000 -u 500 -r 500 --master --expect-workers 4
    locust -f locust_batch.py --worker --master-host 10.0.0.1    # elsewhere: needs only this file

Rooms, each using only rooms above it:
    1. Constants                 5. Reply (pure)                  9. Results file
    2. Types                     6. Ledger (pure)                10. Wire
    3. Corpus (parse: pure)      7. Metrics and text (pure)      11. Desk
    4. Request (pure)            8. Options                      12. Stations
                                                                 13. Locust

Environment (each is also an option: `python locust_batch.py --help`, which else is `locust -f` of it):
    REQUESTS_FILE         corpus, read on the master alone; default requests.jsonl
    OPENAI_ENDPOINT_PATH  joined to --host; default /v1/chat/completions
    OPENAI_API_KEY        bearer token; absent or empty: no Authorization header
    OPENAI_MODEL          default gpt-4o-mini
    SYSTEM_PROMPT         default "You are a helpful assistant."; empty: none is sent
    RESULTS_CSV           rows are appended, header when new, directory made; default results.csv
    MAX_TOKENS            absent: not sent; a line's own `max_tokens` or `output_tokens` wins
    TEMPERATURE           absent: not sent
    EXTRA_BODY            JSON object merged into every request
    REQUEST_TIMEOUT       seconds from the first byte sent to the last received; default 600

Corpus: one JSON object a line with `messages` (sent as they are), or else `text`, or else `prompt`.

CSV columns (blank: not measured):
    index                 the prompt's zero-based line in the corpus
    prompt_tokens, completion_tokens, total_tokens   the server's own usage
    latency_ms            first byte handed to the socket -> last byte of the body received; of a
                          failure: until it failed. Connecting is not in it: that is done before
    status                success | http_error (the call failed: refused, timed out, cut off, a
                          status outside 2xx) | decode_error (2xx, but no complete answer)
    error, error_kind     message; http_<status>, connect_refused, connect_timeout, dns_error,
                          timeout, reset, closed, tls_error, bad_json, not_utf8, no_choices,
                          error_body, empty, worker_lost, aborted, other
    sent_s                seconds from the start of the run to sending
    finish_reason, cached_tokens, reasoning_tokens   as the server says
    new_connection        1: the connection was opened for this request, 0: it was kept alive
    http_status           as received
    scheduled_s, ttft_ms, tpot_ms, response_ms, queue_ms, chunks   blank here (open loop, streaming)

When the first 100 requests, over all workers, have all failed alike (same status and error_kind), no
further prompt is handed out: what is in flight ends, then the run stops, exit code 1.

Exit codes: 0 every prompt was answered, 1 some prompt failed, was lost or was never sent
(--exit-code-on-error changes it), 2 wrong usage (nothing was sent, nothing was written).
"""

from locust import User, constant, events  # first of all: it has gevent patch what is imported next

# isort: split
import base64
import csv
import gc
import io
import json
import logging
import math
import os
import re
import socket
import ssl
import sys
import time
import zlib
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Optional
from urllib.parse import quote, unquote, urlsplit

import gevent
import gevent.socket
import gevent.ssl
from gevent.event import Event
from geventhttpclient.response import HTTPParseError, HTTPResponse
from locust.argument_parser import get_parser
from locust.exception import RPCError, StopUser
from locust.runners import WORKER_REPORT_INTERVAL, MasterRunner, WorkerRunner
from locust.stats import CSV_STATS_INTERVAL_SEC

__version__ = "1.0.0"

# === 1. Constants ===

DEFAULT_TIMEOUT_S = 600.0
CONNECT_TIMEOUT_S = 60.0
DRAIN_GRACE_S = 5.0  # beyond --stop-timeout: for killing what is left and for the last rows to travel
IDLE_S = 10.0  # prompts are left, nobody holds one and nobody has asked for so long: the run is over
TICK_S = 0.2
FLUSH_S = 0.2  # what a killed worker can take with it

HOPELESS = 100  # so many requests, all failed alike and none answered: no more are sent

MAX_ERROR_CHARS = 200
MAX_BODY_BYTES = 64 * 2**20
MAX_TOKEN_COUNT = 2**53  # what a server may claim and still be believed, and travel as a number
RECV_BYTES = 65536
BATCH_BYTES = 256 * 1024  # one message: a few milliseconds of a worker's loop, far from a missed heartbeat
BATCH_PROMPTS = 500
BATCH_ROWS = 500
PARSE_LINES = 500  # lines parsed between two turns of the event loop
SWITCH_INTERVAL_S = 0.001  # how long finished requests may keep gevent from looking at the sockets

SUCCESS, HTTP_ERROR, DECODE_ERROR = "success", "http_error", "decode_error"
NOT_AN_ENDING = ("error", "abort")  # finish reasons with which a server says that it gave up
LOCAL = "local"  # the one worker of a run in one process
MESSAGE = "locust_batch."  # prefix of our own messages between master and workers

COLUMNS = (
    *("index", "prompt_tokens", "completion_tokens", "total_tokens", "latency_ms", "status", "error"),
    *("error_kind", "scheduled_s", "sent_s", "ttft_ms", "tpot_ms", "response_ms", "queue_ms"),
    *("finish_reason", "chunks", "cached_tokens", "reasoning_tokens", "new_connection", "http_status"),
)

IMPORTED_BY = os.getpid()  # with --processes, Locust forks its workers after importing this file
logger = logging.getLogger(__name__)


# === 2. Types ===


class UsageError(Exception):
    """The user can cure it: one line, exit code 2."""


@dataclass(frozen=True)
class Prompt:
    """One line of the corpus; `content` is JSON: a string (the user's text) or a list (the messages)."""

    index: int
    content: bytes
    max_tokens: Optional[int] = None


@dataclass(frozen=True)
class Settings:
    requests_file: str
    results_csv: str
    system_prompt: str
    fields: Mapping[str, Any]  # of the body, all but the messages
    authorization: Optional[str] = field(repr=False)
    secret: str = field(repr=False)  # never to be shown
    tls: bool
    host: str
    port: int
    path: str
    timeout_s: float


@dataclass(frozen=True)
class Answer:
    """What came back over the wire, not yet understood."""

    http_status: int
    body: bytes
    encoding: str = ""
    retry_after: str = ""


@dataclass(frozen=True)
class Outcome:
    """What an answer, or the lack of one, amounts to."""

    status: str
    error_kind: Optional[str] = None
    error: Optional[str] = None
    prompt_tokens: Optional[int] = None
    completion_tokens: Optional[int] = None
    total_tokens: Optional[int] = None
    finish_reason: Optional[str] = None
    cached_tokens: Optional[int] = None
    reasoning_tokens: Optional[int] = None
    http_status: Optional[int] = None


@dataclass(frozen=True)
class Record:
    """One row. Field names are column names; the values travel between processes in this order."""

    index: int
    status: str
    error_kind: Optional[str] = None
    error: Optional[str] = None
    prompt_tokens: Optional[int] = None
    completion_tokens: Optional[int] = None
    total_tokens: Optional[int] = None
    finish_reason: Optional[str] = None
    cached_tokens: Optional[int] = None
    reasoning_tokens: Optional[int] = None
    http_status: Optional[int] = None
    latency_ms: Optional[float] = None
    sent_s: Optional[float] = None
    new_connection: Optional[int] = None


@dataclass(frozen=True)
class Plan:
    """How a corpus is dealt out. one_each: as many users as prompts, or more, so nobody takes a second."""

    prompts: int
    users: int
    workers: int = 1

    @property
    def one_each(self) -> bool:
        return self.users >= self.prompts

    @property
    def share(self) -> int:
        """Prompts that a worker's users will surely ask for: dealt before they ask."""
        return min(self.users, self.prompts) // self.workers

    def sentence(self) -> str:
        if self.users == self.prompts:
            return f"{self.prompts} prompts, {self.users} users: one each"
        if self.one_each:
            return f"{self.prompts} prompts, {self.users} users: the extra users stop at once"
        return f"{self.prompts} prompts, {self.users} users: each takes the next prompt until none is left"


# === 3. Corpus (parse: pure) ===


def parse_line(index: int, line: bytes) -> Prompt:
    """The prompt on one line; ValueError says what is wrong with it.

    >>> parse_line(0, b'{"text": "Hi", "output_tokens": 5}')
    Prompt(index=0, content=b'"Hi"', max_tokens=5)
    """
    try:
        item = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from None
    if not isinstance(item, dict):
        raise ValueError("is not a JSON object")
    key = next((key for key in ("messages", "text", "prompt") if item.get(key) is not None), None)
    if key is None:
        raise ValueError("has no `text`, `prompt` or `messages`")
    content = item[key]
    if key == "messages":
        if not (isinstance(content, list) and content and all(isinstance(turn, dict) for turn in content)):
            raise ValueError("has `messages` that are not a list of objects")
    elif not isinstance(content, str):
        raise ValueError(f"has a `{key}` that is not a string")
    return Prompt(index, json_bytes(content), line_max_tokens(item))


def line_max_tokens(item: Mapping[str, Any]) -> Optional[int]:
    for key in ("max_tokens", "output_tokens"):
        value = item.get(key)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < MAX_TOKEN_COUNT:
                raise ValueError(f"has a `{key}` that is not a positive whole number")
            return value
    return None


def json_bytes(value: Any) -> bytes:
    """JSON in UTF-8, short; half a surrogate pair has no UTF-8, so it travels as an escape."""
    try:
        return json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(value).encode("ascii")


def parse_corpus(lines: Iterable[bytes], name: str) -> Iterator[Prompt]:
    """Prompts by line; blank lines are skipped, yet counted, so that an index is always a line."""
    for index, line in enumerate(lines):
        stripped = line.strip().removeprefix(b"\xef\xbb\xbf")
        if stripped:
            try:
                yield parse_line(index, stripped)
            except ValueError as error:
                raise UsageError(f"{name}: line {index + 1} {error}") from None


# === 4. Request (pure) ===


class Template:
    """All of a request that does not depend on the prompt, made once; `payload` adds the prompt."""

    def __init__(self, settings: Settings) -> None:
        name = f"[{settings.host}]" if ":" in settings.host else settings.host
        is_default_port = settings.port == (443 if settings.tls else 80)
        lines = [
            f"POST {settings.path} HTTP/1.1",
            f"Host: {name}" if is_default_port else f"Host: {name}:{settings.port}",
            f"User-Agent: locust_batch/{__version__}",
            "Accept: application/json",
            "Content-Type: application/json",
        ]
        if settings.authorization:
            lines.append(f"Authorization: {settings.authorization}")
        self.head = "\r\n".join([*lines, "Content-Length: "]).encode("latin-1")
        self.fields = dict(settings.fields)
        self.opening = self.body_opening(None)
        system = {"role": "system", "content": settings.system_prompt}
        self.before_text = (json_bytes([system])[:-1] + b", " if settings.system_prompt else b"[") + (
            b'{"role": "user", "content": '
        )

    def body_opening(self, max_tokens: Optional[int]) -> bytes:
        own = {} if max_tokens is None else {"max_tokens": max_tokens}
        return json_bytes({**self.fields, **own})[:-1] + b', "messages": '

    def payload(self, prompt: Prompt) -> bytes:
        """The whole request, head and body, ready for one send."""
        opening = self.opening if prompt.max_tokens is None else self.body_opening(prompt.max_tokens)
        if prompt.content.startswith(b"["):
            body = opening + prompt.content + b"}"
        else:
            body = opening + self.before_text + prompt.content + b"}]}"
        return self.head + b"%d\r\n\r\n" % len(body) + body


# === 5. Reply (pure) ===

ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
UNPRINTABLE = re.compile("[\x00-\x20\x7f-\xa0\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]+")


def plain(text: str, secret: str = "") -> str:
    """Text of a server made fit for a terminal, a log and a cell: one line, no escapes, no secret.

    >>> plain("a\\x1b[31mred\\n key sk-1", "sk-1")
    'ared key ***'
    """
    line = UNPRINTABLE.sub(" ", ESCAPES.sub("", text[: 50 * MAX_ERROR_CHARS])).strip()
    return (line.replace(secret, "***") if secret else line)[:MAX_ERROR_CHARS]


def read_answer(answer: Answer, secret: str = "") -> Outcome:
    """Never raises: whatever a server sends amounts to an outcome."""
    status = answer.http_status
    try:
        body = decompressed(answer.body, answer.encoding)
        text = body.decode("utf-8")
        reply = json.loads(text) if text.strip() else None
        problem = None
    except zlib.error as error:
        text, reply, problem = "", None, ("other", f"broken {answer.encoding} body: {error}")
    except UnicodeDecodeError as error:
        text, reply = body.decode("utf-8", "replace"), None
        problem = ("not_utf8", f"the body is not UTF-8: {error.reason} at byte {error.start}")
    except (ValueError, RecursionError) as error:
        reply, problem = None, ("bad_json", f"the body is not JSON: {error}")
    if not 200 <= status <= 299:
        after = f" (Retry-After: {answer.retry_after})" if answer.retry_after else ""
        said = plain(f"HTTP {status}{after}: {error_message(reply) or text}", secret)
        return Outcome(HTTP_ERROR, f"http_{status}", said, http_status=status)
    if problem is None:
        problem = reply_problem(reply) if text.strip() else ("empty", "the body is empty")
    if problem:
        return Outcome(DECODE_ERROR, problem[0], plain(problem[1], secret), http_status=status)
    return answered(reply, status, secret)


def decompressed(body: bytes, encoding: str) -> bytes:
    """The body of a server that compressed it though nobody asked; at most MAX_BODY_BYTES."""
    if encoding not in ("gzip", "x-gzip", "deflate"):
        return body
    unpacking = zlib.decompressobj(47 if "gzip" in encoding else 15)
    unpacked = unpacking.decompress(body, MAX_BODY_BYTES)
    if unpacking.unconsumed_tail:
        raise zlib.error(f"it is larger than {MAX_BODY_BYTES // 2**20} MiB")
    return unpacked


def error_message(reply: Any) -> str:
    """The message inside an error object, in any of the forms that servers use."""
    error = reply.get("error", reply) if isinstance(reply, dict) else None
    message = error.get("message", error.get("detail")) if isinstance(error, dict) else error
    return message if isinstance(message, str) else json.dumps(message) if message else ""


def reply_problem(reply: Any) -> Optional[tuple[str, str]]:
    """Why a JSON reply is not a complete answer, as (kind, message); None when it is one."""
    if not isinstance(reply, dict):
        return "no_choices", f"the body is JSON, but a {type(reply).__name__}"
    if reply.get("error") or reply.get("object") == "error":
        return "error_body", error_message(reply) or "an error object"
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return "no_choices", "the reply has no choices"
    if choices[0].get("finish_reason") in NOT_AN_ENDING:
        return "error_body", f"the server gave up: finish_reason {choices[0]['finish_reason']}"
    message = choices[0].get("message")
    if not isinstance(message, dict):
        return "no_choices", "a choice without a message"
    said = any(message.get(key) for key in ("content", "reasoning_content", "reasoning", "refusal", "tool_calls"))
    if not said and not count(reply, "usage", "completion_tokens"):
        return "empty", "the answer is empty"
    return None


def answered(reply: Any, status: int, secret: str) -> Outcome:
    tokens_in, tokens_out = count(reply, "usage", "prompt_tokens"), count(reply, "usage", "completion_tokens")
    total = count(reply, "usage", "total_tokens")
    if total is None and tokens_in is not None and tokens_out is not None:
        total = tokens_in + tokens_out
    reason = reply["choices"][0].get("finish_reason")
    return Outcome(
        SUCCESS,
        prompt_tokens=tokens_in,
        completion_tokens=tokens_out,
        total_tokens=total,
        finish_reason=plain(reason, secret) if isinstance(reason, str) else None,
        cached_tokens=count(reply, "usage", "prompt_tokens_details", "cached_tokens"),
        reasoning_tokens=count(reply, "usage", "completion_tokens_details", "reasoning_tokens"),
        http_status=status,
    )


def count(reply: Any, *path: str) -> Optional[int]:
    """A count of the server's, or None for anything that is not one."""
    for key in path:
        reply = reply.get(key) if isinstance(reply, dict) else None
    if isinstance(reply, bool) or not isinstance(reply, int) or not 0 <= reply < MAX_TOKEN_COUNT:
        return None
    return reply


def failed_call(error: BaseException, connecting: bool, secret: str = "") -> Outcome:
    """A call that got no answer, under its own name."""
    kind = failure_kind(error, connecting)
    said = {
        "connect_timeout": "no connection in time",
        "timeout": "no answer in time",
        "aborted": "stopped before the answer came",
    }.get(kind, "")
    return Outcome(HTTP_ERROR, kind, plain(said or f"{type(error).__name__}: {error}", secret))


def failure_kind(error: BaseException, connecting: bool) -> str:
    if isinstance(error, gevent.GreenletExit):
        return "aborted"
    if isinstance(error, (gevent.Timeout, TimeoutError, socket.timeout)):
        return "connect_timeout" if connecting else "timeout"
    if isinstance(error, EOFError):
        return "closed"
    for family, kind in (
        (socket.gaierror, "dns_error"),
        (ssl.SSLError, "tls_error"),
        (ConnectionRefusedError, "connect_refused"),
        (ConnectionError, "reset"),
    ):
        if isinstance(error, family):
            return kind
    return "other"


# === 6. Ledger (pure) ===


class Ledger:
    """Where every prompt is: unsent, held by one worker, or closed. It never goes to a second worker
    once a first may have sent it.

    >>> ledger = Ledger(range(4), Plan(prompts=4, users=4, workers=2))
    >>> ledger.grant("a", urgent=0, spare=9), ledger.grant("b", urgent=3, spare=9), ledger.close("a", 0)
    ([0, 1], [2, 3], True)
    >>> ledger.close("a", 0), ledger.close("b", 1), ledger.release("a"), list(ledger.unsent)
    (False, False, 1, [1])
    """

    def __init__(self, indices: Iterable[int], plan: Plan) -> None:
        self.plan = plan
        self.unsent = deque(indices)
        self.held: dict[str, set[int]] = {}
        self.granted: Counter[str] = Counter()

    def grant(self, worker: str, urgent: int, spare: int) -> list[int]:
        """`urgent`: users are waiting; `spare`: so that the next ones need not wait."""
        urgent = min(urgent, len(self.unsent))
        spare = min(spare, self.spare_limit(worker, urgent))
        taken = [self.unsent.popleft() for _ in range(urgent + spare)]
        self.held.setdefault(worker, set()).update(taken)
        self.granted[worker] += len(taken)
        return taken

    def spare_limit(self, worker: str, urgent: int) -> int:
        """One each: no more than this worker's users will take. Else ever less towards the end, so that
        no worker sits on prompts while another's users have none."""
        rest = len(self.unsent) - urgent
        if self.plan.one_each:
            return max(0, min(rest, self.plan.share - self.granted[worker] - urgent))
        return rest // (2 * self.plan.workers)

    def close(self, worker: str, index: int) -> bool:
        """False: not held there, so its row is already written."""
        held = self.held.get(worker, set())
        if index not in held:
            return False
        held.remove(index)
        return True

    def release(self, worker: str) -> int:
        """A worker has given back what it never sent."""
        given_back = sorted(self.held.pop(worker, ()), reverse=True)
        self.unsent.extendleft(given_back)
        return len(given_back)

    def holders(self) -> list[str]:
        return [worker for worker, held in self.held.items() if held]

    def lost(self) -> list[int]:
        """All that is still held, of whoever; it is closed with this."""
        indices = sorted(index for held in self.held.values() for index in held)
        self.held.clear()
        return indices


# === 7. Metrics and text (pure) ===


def percentile(values: Sequence[float], q: float) -> Optional[float]:
    """Linear interpolation between order statistics, as numpy.percentile and pandas do; sorted input.

    >>> percentile([10.0, 20.0, 30.0, 40.0], 50), percentile([10.0, 20.0], 99), percentile([], 50)
    (25.0, 19.9, None)
    """
    if not values:
        return None
    rank = (len(values) - 1) * q / 100
    low = math.floor(rank)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (rank - low)


@dataclass
class Tally:
    """The exact figures of a run, fed one record at a time."""

    rows: int = 0
    successes: int = 0
    without_usage: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    tokens_total: int = 0
    first_sent_s: float = math.inf
    last_done_s: float = -math.inf
    latencies_ms: "array[float]" = field(default_factory=lambda: array("d"))
    errors: "Counter[str]" = field(default_factory=Counter)
    first_errors: dict[str, str] = field(default_factory=dict)
    fates: set[str] = field(default_factory=set)

    def add(self, record: Record) -> None:
        self.rows += 1
        if record.sent_s is not None and record.latency_ms is not None:
            self.first_sent_s = min(self.first_sent_s, record.sent_s)
            self.last_done_s = max(self.last_done_s, record.sent_s + record.latency_ms / 1000)
        if record.status != SUCCESS:
            kind = record.error_kind or "other"
            self.errors[kind] += 1
            self.first_errors.setdefault(kind, record.error or "")
            self.fates.add(f"{record.status}/{kind}")
            return
        self.successes += 1
        self.without_usage += record.total_tokens is None
        self.tokens_in += record.prompt_tokens or 0
        self.tokens_out += record.completion_tokens or 0
        self.tokens_total += record.total_tokens or 0
        if record.latency_ms is not None:
            self.latencies_ms.append(record.latency_ms)

    @property
    def hopeless(self) -> bool:
        """So many requests, and all have failed alike."""
        return self.rows >= HOPELESS and not self.successes and len(self.fates) == 1

    @property
    def elapsed_s(self) -> Optional[float]:
        elapsed = self.last_done_s - self.first_sent_s
        return elapsed if 0 < elapsed < math.inf else None


def summary_text(tally: Tally, unsent: int, results: str) -> str:
    asked = tally.rows + unsent
    missed = asked - tally.successes
    lines = [f"=== locust_batch: {tally.successes} of {asked} prompts answered, {missed} not ==="]
    elapsed = tally.elapsed_s

    def rate(amount: int) -> str:
        return "-" if elapsed is None else f"{amount / elapsed:.2f}"

    def line(name: str, value: str, note: str = "") -> None:
        lines.append(f"  {name:<22}{value:>14}  {note}".rstrip())

    line("Total time (s)", "-" if elapsed is None else f"{elapsed:.3f}", "first request sent to last reply")
    line("Requests/s", rate(tally.successes))
    for name, tokens in (("In", tally.tokens_in), ("Out", tally.tokens_out), ("Total", tally.tokens_total)):
        line(f"{name} tokens/s", rate(tokens), f"{tokens} tokens")
    latencies = sorted(tally.latencies_ms)
    for q in (50, 90, 99):
        value = percentile(latencies, q)
        line(f"Latency p{q} (ms)", "-" if value is None else f"{value:.3f}", f"exact, n={len(latencies)}")
    for kind, times in tally.errors.most_common():
        line(f"! {kind}", str(times), f"first: {tally.first_errors[kind]}")
    if unsent:
        line("! never sent", str(unsent), "the run ended before their turn")
    if tally.without_usage:
        line("! replies without usage", str(tally.without_usage), "their tokens are in no total")
    line("Rows", str(tally.rows), f"in {results}")
    return "\n".join(lines)


def csv_row(record: Record) -> list[str]:
    """Cells in the order of COLUMNS; text that a spreadsheet would run is made text again."""
    cells = {name: value for name, value in vars(record).items() if value is not None}
    row = []
    for column in COLUMNS:
        cell = str(cells.get(column, ""))
        hostile = isinstance(cells.get(column), str) and cell[:1] in tuple("=+-@|%\t")
        row.append("'" + cell if hostile else cell)
    return row


# === 8. Options ===

OPTIONS = (
    ("requests_file", "requests.jsonl", "corpus, one JSON object a line: text, prompt or messages"),
    ("openai_endpoint_path", "/v1/chat/completions", "path, joined to --host"),
    ("openai_api_key", "", "bearer token; better in the environment: a process list shows options"),
    ("openai_model", "gpt-4o-mini", "model name"),
    ("system_prompt", "You are a helpful assistant.", "system message before each text; empty: none"),
    ("results_csv", "results.csv", "rows are appended here"),
    ("max_tokens", "", "limit of each answer; empty: not sent"),
    ("temperature", "", "empty: not sent"),
    ("extra_body", "", "JSON object merged into every request"),
    ("request_timeout", f"{DEFAULT_TIMEOUT_S:g}", "seconds that one request may take"),
)


def add_options(parser: Any, **_: Any) -> None:
    group = parser.add_argument_group("locust_batch: one chat completion per line of a corpus")
    for name, default, text in OPTIONS:
        action = group.add_argument(
            "--" + name.replace("_", "-"),
            env_var=name.upper(),
            default=default,
            metavar="<text>",
            help=f"{text} (environment: {name.upper()}" + (f"; default: {default})" if default else ")"),
        )
        action.include_in_web_ui = name != "openai_api_key"


def settings_from(options: Any, host: Optional[str]) -> Settings:
    """Checks everything that can be wrong before anything is read or sent."""
    given = {name: str(getattr(options, name, None) or "") or default for name, default, _ in OPTIONS}
    given["system_prompt"] = str(options.system_prompt)  # the one whose emptiness means something
    target = urlsplit(target_url(host))
    secret = given["openai_api_key"].strip()
    if not secret.isprintable() or not secret.isascii():
        raise UsageError("--openai-api-key holds a character that no header can carry")
    userinfo = unquote(target.netloc.rpartition("@")[0])
    basic = "Basic " + base64.b64encode(userinfo.encode()).decode() if userinfo else None
    endpoint = given["openai_endpoint_path"].strip().lstrip("/")
    tls = target.scheme == "https"
    return Settings(
        requests_file=given["requests_file"],
        results_csv=given["results_csv"],
        system_prompt=given["system_prompt"],
        fields=body_fields(given),
        authorization=f"Bearer {secret}" if secret else basic,
        secret=secret,
        tls=tls,
        host=target.hostname or "",
        port=target.port or (443 if tls else 80),
        path=quote(target.path.rstrip("/") + "/" + endpoint, safe="/?&=%:@,;+$!*'()~"),
        timeout_s=number(given, "request_timeout", float, 0.001) or DEFAULT_TIMEOUT_S,
    )


def target_url(host: Optional[str]) -> str:
    if not host:
        raise UsageError("no server: give it with --host, e.g. --host http://127.0.0.1:8000")
    try:
        target = urlsplit(host)
        name = target.hostname or ""
        if target.scheme in ("http", "https") and target.port != 0 and re.fullmatch(r"[^\s\x00-\x1f/]+", name):
            name.encode("idna")
            return host
    except ValueError:
        pass
    raise UsageError("--host is not a URL like http://127.0.0.1:8000 or https://api.example.com")


def body_fields(given: Mapping[str, str]) -> dict[str, Any]:
    fields_: dict[str, Any] = {"model": given["openai_model"]}
    limit, temperature = number(given, "max_tokens", int, 1), number(given, "temperature", float, 0)
    if limit is not None:
        fields_["max_tokens"] = limit
    if temperature is not None:
        fields_["temperature"] = temperature
    try:
        extra = json.loads(given["extra_body"].strip() or "{}")
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--extra-body is not JSON: {error}") from None
    if not isinstance(extra, dict):
        raise UsageError("--extra-body is not a JSON object")
    if "messages" in extra or extra.get("stream"):
        raise UsageError("--extra-body may not hold `messages` (they come from the corpus) or `stream`")
    return {**fields_, **extra}


def number(given: Mapping[str, str], name: str, kind: type, least: float) -> Any:
    """None when not given."""
    text = given[name].strip()
    try:
        value = kind(text) if text else None
        if value is None or (math.isfinite(value) and value >= least):
            return value
    except ValueError:
        pass
    option = "--" + name.replace("_", "-")
    raise UsageError(f"{option} is not a {'whole ' if kind is int else ''}number of at least {least:g}")


def load_corpus(path: str) -> dict[int, Prompt]:
    """Every prompt by its index; turns the event loop now and then, so that no heartbeat is missed."""
    corpus: dict[int, Prompt] = {}
    try:
        with open(path, "rb") as file:
            for prompt in parse_corpus(file, path):
                corpus[prompt.index] = prompt
                if len(corpus) % PARSE_LINES == 0:
                    gevent.sleep(0)
    except OSError as error:
        raise UsageError(f"--requests-file {path}: {error.strerror or error}") from None
    if not corpus:
        raise UsageError(f"--requests-file {path}: holds no prompt")
    return corpus


# === 9. Results file ===


class Sheet:
    """The CSV, opened before any load; whole rows only, flushed with every delivery."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.unwritten = 0
        try:
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            self.file: IO[str] = open(path, "a+", newline="", encoding="utf-8")  # noqa: SIM115
            self.start()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"--results-csv {path}: {reason}") from None

    def start(self) -> None:
        if not self.file.seekable() or self.file.tell() == 0:
            self.write([COLUMNS])
            return
        self.file.seek(0)
        header = next(csv.reader([self.file.readline()]), [])
        if tuple(header) != COLUMNS:
            self.file.close()
            raise ValueError("has other columns; name a new file, or move this one away")
        last = self.file.seek(0, os.SEEK_END)
        with open(self.path, "rb") as tail:
            tail.seek(last - 1)
            if tail.read(1) != b"\n":  # a run before this one was cut off inside a row
                self.write([[]])

    def write(self, rows: Iterable[Sequence[str]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        self.file.write(text.getvalue() or "\n")
        self.file.flush()

    def add(self, records: Sequence[Record]) -> None:
        try:
            self.write([csv_row(record) for record in records])
        except (OSError, ValueError) as error:
            if not self.unwritten:
                logger.error("cannot write to %s: %s; the run goes on without", self.path, error)
            self.unwritten += len(records)

    def close(self) -> None:
        try:
            self.file.close()
        except OSError:
            logger.error("cannot close %s", self.path)


# === 10. Wire ===


class ReplyParser(HTTPResponse):  # type: ignore[misc,unused-ignore]
    """Keeps the first final message; a 1xx is not one, and what follows it is not ours."""

    answer: Optional[Answer] = None
    reusable = False
    received = 0

    def _on_message_begin(self) -> None:
        super()._on_message_begin()
        if self.answer is not None:  # the rest of it would be taken for the next answer
            self.reusable = False

    def _on_message_complete(self) -> None:
        super()._on_message_complete()
        if self.answer is None and self.get_code() >= 200:
            self.answer = Answer(
                self.get_code(),
                bytes(self._body_buffer),
                str(self.get("content-encoding") or "").strip().lower(),
                str(self.get("retry-after") or "").strip(),
            )
            self.reusable = self.should_keep_alive()

    def take(self, data: bytes) -> bool:
        """Feed what arrived (nothing: the server has closed); True when the answer is complete."""
        self.received += len(data)
        try:
            self.feed(data)
        except HTTPParseError:
            if self.answer is None and not data:
                raise EOFError("the connection was closed inside the reply") from None
            if self.answer is None:
                raise
            self.reusable = False
        if self.answer is None and not data:
            raise EOFError("the connection was closed before a reply")
        if self.received > MAX_BODY_BYTES:  # counted with headers and interim answers, which may be endless, too
            raise ValueError(f"the reply is larger than {MAX_BODY_BYTES // 2**20} MiB")
        return self.answer is not None


class Wire:
    """One user's connection. It is opened before the clock starts; nothing is ever sent twice."""

    def __init__(self, settings: Settings, context: Any) -> None:
        self.settings = settings
        self.context = context
        self.sock: Any = None
        self.fresh: Optional[bool] = None
        self.sent: Optional[float] = None
        self.done: Optional[float] = None

    def call(self, payload: bytes) -> Answer:
        """One request and its answer; `sent` and `done` are stamped as near to the socket as can be."""
        self.fresh = self.sent = self.done = None
        reused = self.sock is not None and not self.is_stale()
        if not reused:
            self.close()
            self.open()
        self.fresh = not reused
        parser = ReplyParser("POST")
        try:
            with gevent.Timeout(self.settings.timeout_s):
                self.sent = time.perf_counter()
                self.sock.sendall(payload)
                finished = False
                while not finished:
                    data = self.sock.recv(RECV_BYTES)
                    self.done = time.perf_counter()
                    finished = parser.take(data)
                    if len(data) == RECV_BYTES and not finished:
                        gevent.sleep(0)  # more is there already: else neither others nor the time-out had a turn
        except BaseException:
            self.done = time.perf_counter()
            self.close()
            raise
        if not parser.reusable:
            self.close()
        assert parser.answer is not None
        return parser.answer

    def open(self) -> None:
        address = (self.settings.host, self.settings.port)
        with gevent.Timeout(min(CONNECT_TIMEOUT_S, self.settings.timeout_s)):
            sock = gevent.socket.create_connection(address)
            try:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self.context is not None:
                    sock = self.context.wrap_socket(sock, server_hostname=self.settings.host)
            except BaseException:
                sock.close()
                raise
        self.sock = sock

    def is_stale(self) -> bool:
        """The server has closed the idle connection, or sent what nobody asked for."""
        self.sock.settimeout(0.0)
        try:
            self.sock.recv(1)
        except (BlockingIOError, ssl.SSLWantReadError):
            return False
        except OSError:
            return True
        finally:
            self.sock.settimeout(None)
        return True

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()
            self.sock = None


# === 11. Desk ===


@dataclass
class Run:
    """One run of one corpus, seen from where its results are kept."""

    number: int
    settings: Settings
    corpus: dict[int, Prompt]
    ledger: Ledger
    sheet: Sheet
    zero: float
    heard: float
    tally: Tally = field(default_factory=Tally)
    ramped: bool = False
    given_up: bool = False
    ending: bool = False
    closed: bool = False

    @property
    def dealing(self) -> bool:
        """Prompts are still handed out."""
        return not (self.given_up or self.ending)


class Desk:
    """Corpus, ledger, results and summary: in the one process of a small run, or on the master."""

    def __init__(self, environment: Any) -> None:
        self.environment = environment
        self.runner = environment.runner
        self.options = environment.parsed_options
        self.distributed = isinstance(self.runner, MasterRunner)
        self.prepared: Optional[tuple[Settings, dict[int, Prompt], Sheet]] = None
        self.run: Optional[Run] = None
        self.runs = 0
        self.greeted: set[str] = set()  # workers that can take our messages: Locust counts them in earlier
        if self.distributed:
            self.runner.register_message(MESSAGE + "hello", lambda msg, **_: self.greeted.add(msg.node_id))
            self.runner.register_message(MESSAGE + "want", self.on_want)
            self.runner.register_message(MESSAGE + "rows", self.on_rows)
            self.runner.register_message(MESSAGE + "released", self.on_released)
        gevent.spawn(self.tick)

    def prepare(self) -> tuple[Settings, dict[int, Prompt], Sheet]:
        """Everything that can fail, in an order that writes nothing if it does."""
        settings = settings_from(self.options, self.environment.host)
        corpus = load_corpus(settings.requests_file)
        return settings, corpus, Sheet(settings.results_csv)

    def begin(self) -> None:
        """A run starts: deal each worker the prompts that its users will surely ask for."""
        settings, corpus, sheet = self.prepared or self.prepare()
        self.prepared = None
        self.runs += 1
        workers = self.live_workers()
        plan = Plan(len(corpus), self.runner.target_user_count, max(1, len(workers)))
        logger.info(plan.sentence())
        self.environment.process_exit_code = None
        now = time.perf_counter()
        self.run = Run(self.runs, settings, corpus, Ledger(corpus, plan), sheet, zero=now, heard=now)
        if self.distributed:
            for worker in self.greeted.intersection(workers):
                self.deal(worker, {"ticket": 0, "urgent": 0, "spare": self.stock()})

    def stock(self) -> int:
        """Prompts that a worker keeps at hand; with one each, what a second of the ramp-up needs."""
        assert self.run is not None
        plan = self.run.ledger.plan
        rate = getattr(self.runner, "spawn_rate", None) or self.options.spawn_rate or 1
        return min(plan.share, math.ceil(rate / plan.workers)) if plan.one_each else plan.share

    def live_workers(self) -> list[str]:
        if not self.distributed:
            return [LOCAL]
        return [node.id for node in self.runner.clients.all if node.state != "missing"]

    # Dealing

    def on_want(self, environment: Any, msg: Any, **_: Any) -> None:
        if self.run is not None:
            self.run.heard = time.perf_counter()
        self.deal(msg.node_id, msg.data)

    def deal(self, worker: str, want: Mapping[str, int]) -> None:
        """Answer a worker, in messages of bounded size; the last one says that it is the answer."""
        run = self.run
        indices: list[int] = []
        if run is not None and run.dealing:
            indices = run.ledger.grant(worker, want["urgent"], want["spare"])
        for part in self.parts(indices):
            self.runner.send_message(MESSAGE + "prompts", self.header(part, -1, 1), worker)
        left = len(run.ledger.unsent) if run is not None and run.dealing else 0
        more = left if len(indices) >= want["urgent"] + want["spare"] else 0
        answer = {**self.header([], want["ticket"], left), "more": more}
        self.runner.send_message(MESSAGE + "prompts", answer, worker)

    def header(self, prompts: list[list[Any]], ticket: int, left: int) -> dict[str, Any]:
        run = self.run
        if run is None or not run.dealing:
            return {"run": 0, "prompts": [], "ticket": ticket, "left": 0, "more": 0, "ramped": False}
        return {
            "run": run.number,
            "at_s": time.perf_counter() - run.zero,
            "one_each": run.ledger.plan.one_each,
            "stock": self.stock(),
            "prompts": prompts,
            "ticket": ticket,
            "left": left,
            "more": 1,
            "ramped": run.ramped,
        }

    def parts(self, indices: Iterable[int]) -> Iterator[list[list[Any]]]:
        assert self.run is not None or not indices
        part: list[list[Any]] = []
        size = 0
        for index in indices:
            prompt = self.run.corpus[index] if self.run else None
            assert prompt is not None
            part.append([prompt.index, prompt.content, prompt.max_tokens])
            size += len(prompt.content)
            if size >= BATCH_BYTES or len(part) >= BATCH_PROMPTS:
                yield part
                part, size = [], 0
        if part:
            yield part

    # Collecting

    def on_rows(self, environment: Any, msg: Any, **_: Any) -> None:
        if self.run is not None and msg.data["run"] == self.run.number:
            self.add(msg.node_id, [Record(*values) for values in msg.data["rows"]])

    def on_released(self, environment: Any, msg: Any, **_: Any) -> None:
        if self.run is not None and msg.data["run"] == self.run.number:
            self.run.ledger.release(msg.node_id)
            self.run.heard = time.perf_counter()

    def add(self, worker: str, records: Sequence[Record]) -> None:
        run = self.run
        if run is None or run.closed:
            return
        run.heard = time.perf_counter()
        fresh = [record for record in records if run.ledger.close(worker, record.index)]
        if fresh:
            run.sheet.add(fresh)
            for record in fresh:
                run.tally.add(record)
            if not run.ledger.unsent and not run.ledger.holders():
                self.end()
            elif run.dealing and run.tally.hopeless:
                self.give_up(run)

    # Ending

    def give_up(self, run: Run) -> None:
        """No new prompts; `tick` ends the run when nothing is in flight any more."""
        run.given_up = True
        (fate,) = run.tally.fates
        logger.error("stopped: the first %d requests all failed alike (%s)", run.tally.rows, fate)
        if self.distributed:
            self.halt(run, CONNECT_TIMEOUT_S + run.settings.timeout_s)

    def halt(self, run: Run, grace_s: float) -> None:
        """Workers take no more prompts, and give back what they have not sent."""
        self.runner.send_message(MESSAGE + "halt", {"run": run.number, "grace_s": grace_s})

    def tick(self) -> None:
        while True:
            gevent.sleep(TICK_S)
            if self.run is not None and not self.run.ending and self.is_over(self.run):
                self.end()

    def is_over(self, run: Run) -> bool:
        """Nobody who is alive holds a prompt, and none is left, or none is dealt, or nobody is left to take one."""
        live = self.live_workers()
        if any(worker in live for worker in run.ledger.holders()):
            return False
        return not run.ledger.unsent or run.given_up or (run.ramped and time.perf_counter() - run.heard > IDLE_S)

    def end(self) -> None:
        if self.run is not None and not self.run.ending:
            self.run.ending = True
            gevent.spawn(self.leave)

    def leave(self) -> None:
        if self.options.headless and self.options.csv_prefix:  # Locust writes them now and then, not at the end
            gevent.sleep(CSV_STATS_INTERVAL_SEC * 1.5 + (WORKER_REPORT_INTERVAL if self.distributed else 0))
        if self.options.headless:
            self.runner.quit()
        else:
            self.runner.stop()

    def on_stopping(self) -> None:
        """Before Locust stops anyone: workers finish or give up what they have begun, and send the rows."""
        run = self.run
        if run is None or run.closed:
            return
        run.ending = True
        if not self.distributed or not run.ledger.holders():
            return
        self.halt(run, self.environment.stop_timeout)
        deadline = time.perf_counter() + self.environment.stop_timeout + DRAIN_GRACE_S
        try:
            while time.perf_counter() < deadline:
                live = self.live_workers()
                if not any(worker in live for worker in run.ledger.holders()):
                    return
                gevent.sleep(TICK_S / 4)
        except KeyboardInterrupt:
            logger.warning("interrupted again: not waiting for the workers")

    def close(self) -> None:
        """The last rows, the summary, the exit code; once per run."""
        run = self.run
        if run is None or run.closed:
            return
        if not self.distributed:
            run.ledger.release(LOCAL)
        lost = [
            Record(index, HTTP_ERROR, "worker_lost", "its worker did not report it; the server may have seen it")
            for index in run.ledger.lost()
        ]
        run.closed = run.ending = True
        if lost:
            run.sheet.add(lost)
        for record in lost:
            run.tally.add(record)
        run.sheet.close()
        unsent = len(run.ledger.unsent)
        if run.tally.errors or unsent or run.sheet.unwritten:
            self.environment.process_exit_code = self.options.exit_code_on_error
        self.show(run, unsent)
        if self.distributed and self.options.headless and not self.live_workers():
            gevent.spawn(self.runner.quit)  # Locust alone would wait for a worker to come back

    def show(self, run: Run, unsent: int) -> None:
        text = summary_text(run.tally, unsent, run.sheet.path)
        if run.sheet.unwritten:
            text += f"\n  ! {run.sheet.unwritten} rows could not be written"
        try:
            print(text, file=sys.stderr if self.options.json else sys.stdout, flush=True)
        except OSError:  # nobody reads it any more; Python shall not complain at exit either
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115


# === 12. Stations ===


class Station:
    """Where a process's users get their prompts and leave their records."""

    def __init__(self, environment: Any) -> None:
        self.environment = environment
        self.ramped = Event()  # all users are there: who has finished a prompt may take another, or leave
        self.settings: Optional[Settings] = None
        self.template: Optional[Template] = None
        self.context: Any = None
        self.zero = 0.0
        self.in_flight = 0

    def configure(self, settings: Settings) -> None:
        self.settings = settings
        self.template = Template(settings)
        self.context = gevent.ssl.create_default_context() if settings.tls else None
        gc.collect()
        gc.freeze()  # no collection during the run walks through the corpus and through Locust

    @property
    def one_each(self) -> bool:
        raise NotImplementedError

    def take(self) -> Optional[Prompt]:
        """The next prompt; None when there is none for this user."""
        raise NotImplementedError

    def close(self) -> None:
        """Users on their way out get out: Locust stumbles over greenlets that have just died."""
        self.ramped.set()
        users = self.environment.runner.user_greenlets
        until = time.perf_counter() + TICK_S
        while users and time.perf_counter() < until:
            gevent.sleep(TICK_S / 10)

    def deliver(self, record: Record) -> None:
        raise NotImplementedError


class LocalStation(Station):
    """At the desk itself."""

    def __init__(self, environment: Any, desk: Desk) -> None:
        super().__init__(environment)
        self.desk = desk

    @property
    def one_each(self) -> bool:
        return self.desk.run is not None and self.desk.run.ledger.plan.one_each

    def take(self) -> Optional[Prompt]:
        run = self.desk.run
        if run is None or not run.dealing:
            return None
        granted = run.ledger.grant(LOCAL, urgent=1, spare=0)
        return run.corpus[granted[0]] if granted else None

    def deliver(self, record: Record) -> None:
        self.desk.add(LOCAL, [record])


class RemoteStation(Station):
    """On a worker: prompts and rows travel in Locust's own messages, sent by one greenlet, the courier.
    Nothing here relies on Locust's events at the start of a run: for a late worker, they come too early.

    A user who finds the pool empty draws a ticket and waits until the desk has answered it. The pool is
    refilled before it is empty, so that in the steady state nobody waits.
    """

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        self.runner = environment.runner
        self.run = 0
        self.each = False
        self.pool: deque[Prompt] = deque()
        self.stock = self.left = self.more = 0
        self.tickets = self.asked = self.answered = 0
        self.halted = False
        self.outbox: list[Record] = []
        self.news = Event()
        self.errand = Event()
        self.runner.register_message(MESSAGE + "prompts", self.on_prompts)
        self.runner.register_message(MESSAGE + "halt", self.on_halt)
        self.own_key = environment.parsed_options.openai_api_key
        self.runner.send_message(MESSAGE + "hello")
        gevent.spawn(self.courier)

    @property
    def one_each(self) -> bool:
        return self.each

    def begin(self, header: Mapping[str, Any]) -> None:
        """The first message of a run; time is counted from the desk's start of it, on our own clock."""
        self.run, self.each, self.stock = header["run"], header["one_each"], header["stock"]
        self.zero = time.perf_counter() - header["at_s"]
        self.pool.clear()
        self.settings = None
        self.halted = False
        self.ramped.clear()

    def configure_as_told(self) -> None:
        """The first user is here, so Locust has brought the master's options."""
        options = self.environment.parsed_options
        options.openai_api_key = options.openai_api_key or self.own_key
        self.configure(settings_from(options, self.environment.host))

    def on_prompts(self, environment: Any, msg: Any, **_: Any) -> None:
        data = msg.data
        if data["run"] and data["run"] != self.run:
            self.begin(data)
        self.pool.extend(Prompt(*values) for values in data["prompts"])
        self.left, self.more = data["left"], data["more"]
        self.answered = max(self.answered, data["ticket"])
        if data["ramped"]:
            self.ramped.set()
        self.tell()

    def tell(self) -> None:
        told, self.news = self.news, Event()
        told.set()

    def take(self) -> Optional[Prompt]:
        while not self.halted:
            if self.pool:
                if self.settings is None:
                    self.configure_as_told()
                prompt = self.pool.popleft()
                if self.more and len(self.pool) <= self.stock // 2:
                    self.errand.set()
                return prompt
            self.tickets += 1
            ticket = self.tickets
            self.errand.set()
            while self.answered < ticket and not self.halted:
                self.news.wait()
            if not self.pool and not self.left:
                return None
        return None

    def deliver(self, record: Record) -> None:
        self.outbox.append(record)
        if len(self.outbox) >= BATCH_ROWS:
            self.errand.set()

    def courier(self) -> None:
        while True:
            self.errand.wait(FLUSH_S)
            self.errand.clear()
            try:
                self.flush()
                self.ask()
            except RPCError as error:
                logger.error("no way to the master for now: %s", error)

    def ask(self) -> None:
        spare = max(0, self.stock - len(self.pool)) if self.more and len(self.pool) <= self.stock // 2 else 0
        tickets = self.tickets
        if tickets == self.asked and not spare:
            return
        self.more = 0  # until the answer says otherwise
        want = {"ticket": tickets, "urgent": tickets - self.asked, "spare": spare}
        self.runner.send_message(MESSAGE + "want", want)
        self.asked = tickets

    def flush(self) -> None:
        while self.outbox:
            rows = self.outbox[:BATCH_ROWS]
            message = {"run": self.run, "rows": [list(vars(record).values()) for record in rows]}
            self.runner.send_message(MESSAGE + "rows", message)
            del self.outbox[: len(rows)]

    def on_halt(self, environment: Any, msg: Any, **_: Any) -> None:
        if msg.data["run"] == self.run:
            gevent.spawn(self.halt, msg.data["grace_s"])

    def halt(self, grace_s: float) -> None:
        """Take no more; finish what is in flight within the time given, abort the rest; then report."""
        self.close()
        deadline = time.perf_counter() + grace_s
        while self.in_flight and time.perf_counter() < deadline:
            gevent.sleep(TICK_S / 4)
        self.runner.user_greenlets.kill(block=True, timeout=DRAIN_GRACE_S / 2)
        self.release()

    def close(self) -> None:
        self.halted = True
        self.tell()
        super().close()

    def release(self) -> None:
        """All rows, then: what the desk still has under our name was never sent."""
        try:
            self.flush()
            self.runner.send_message(MESSAGE + "released", {"run": self.run})
        except RPCError as error:
            logger.error("no way to the master: %s", error)
        self.pool.clear()


# === 13. Locust ===


class BatchUser(User):  # type: ignore[misc,unused-ignore]
    """Submits one prompt, then leaves; with fewer users than prompts, one after the other."""

    wait_time = constant(0)

    station: Station
    wire: Optional[Wire] = None

    def on_start(self) -> None:
        while not hasattr(self.environment, "batch_station"):  # a late worker has users before its init event
            gevent.sleep(TICK_S / 10)
        self.station = self.environment.batch_station

    def on_stop(self) -> None:
        if self.wire is not None:
            self.wire.close()

    def next_prompt(self) -> None:
        prompt = self.station.take()
        if prompt is None:
            raise StopUser()
        self.station.in_flight += 1
        try:
            self.submit(prompt)
        except Exception as error:  # ours, not the server's: but no prompt goes without its row
            logger.exception("prompt %d", prompt.index)
            self.station.deliver(Record(prompt.index, HTTP_ERROR, "other", plain(repr(error))))
        finally:
            self.station.in_flight -= 1
        if self.station.one_each:
            self.station.ramped.wait()  # else Locust would replace us while it is still adding users

    tasks = [next_prompt]  # noqa: RUF012

    def submit(self, prompt: Prompt) -> None:
        """Whatever happens from here on, the prompt gets exactly one record."""
        station, settings = self.station, self.station.settings
        assert settings is not None
        assert station.template is not None
        payload = station.template.payload(prompt)
        wire = self.wire = self.wire or Wire(settings, station.context)
        answer, stopped, began = None, None, time.perf_counter()
        try:
            answer = wire.call(payload)
            gevent.sleep(0)  # others' answers are stamped before this one is understood
        except gevent.GreenletExit as error:
            stopped = error
        except (Exception, gevent.Timeout) as error:
            outcome = failed_call(error, wire.sent is None, settings.secret)
        if answer is not None:
            outcome = read_answer(answer, settings.secret)
        elif stopped is not None:
            outcome = failed_call(stopped, wire.sent is None)
        took_ms = ((wire.done or time.perf_counter()) - (wire.sent or began)) * 1000
        self.tell_locust(outcome, took_ms, len(answer.body) if answer else 0)
        station.deliver(self.record(prompt.index, outcome, took_ms))
        if stopped is not None:
            raise stopped

    def record(self, index: int, outcome: Outcome, took_ms: float) -> Record:
        assert self.wire is not None
        sent = self.wire.sent
        return Record(
            index,
            **vars(outcome),
            latency_ms=None if sent is None else round(took_ms, 3),
            sent_s=None if sent is None else round(sent - self.station.zero, 6),
            new_connection=None if self.wire.fresh is None else int(self.wire.fresh),
        )

    def tell_locust(self, outcome: Outcome, took_ms: float, length: int) -> None:
        """Locust's own statistics. Token rows are logged past its total, which is of requests alone."""
        assert self.station.settings is not None
        if outcome.error_kind == "aborted":
            return
        self.environment.events.request.fire(
            request_type="POST",
            name=self.station.settings.path,
            response_time=took_ms,
            response_length=length,
            exception=RuntimeError(outcome.error_kind) if outcome.error_kind else None,
            context={},
        )
        entries = self.environment.stats.entries
        for name in ("prompt_tokens", "completion_tokens"):
            tokens = getattr(outcome, name)
            if tokens is not None:
                entries[(name, "METRIC")].log(tokens, 0)


def on_init(environment: Any, runner: Any, **_: Any) -> None:
    gevent.setswitchinterval(SWITCH_INTERVAL_S)
    if isinstance(runner, WorkerRunner):
        set_up_worker(environment)
        return
    desk = Desk(environment)
    environment.batch_station = LocalStation(environment, desk)
    options = environment.parsed_options
    if options.headless or options.autostart:
        try:
            desk.prepared = desk.prepare()
        except UsageError as error:
            leave(runner, options, error)
    set_up_desk(environment, desk)


def leave(runner: Any, options: Any, error: UsageError) -> None:
    """Wrong usage: one line, exit code 2; and no worker of ours is left waiting for a master."""
    print(f"locust_batch: error: {error}", file=sys.stderr, flush=True)
    deadline = time.perf_counter() + DRAIN_GRACE_S
    while len(getattr(runner, "clients", ())) < (options.processes or 0) and time.perf_counter() < deadline:
        gevent.sleep(TICK_S / 4)
    gevent.sleep(TICK_S * 2 if options.processes else 0)  # Locust's worker cannot leave while still arriving
    runner.quit()
    raise SystemExit(2)


def set_up_desk(environment: Any, desk: Desk) -> None:
    station = environment.batch_station

    def on_test_start(**_: Any) -> None:
        desk.run = None
        station.ramped.clear()
        try:
            desk.begin()
        except UsageError as error:
            logger.error("locust_batch: %s", error)
            gevent.spawn_later(TICK_S, environment.runner.stop)
            return
        assert desk.run is not None
        station.zero = desk.run.zero
        station.configure(desk.run.settings)

    def on_spawning_complete(**_: Any) -> None:
        station.ramped.set()
        if desk.run is not None:
            desk.run.ramped = True

    def on_test_stopping(**_: Any) -> None:
        desk.on_stopping()
        station.close()

    def on_quitting(**_: Any) -> None:
        if desk.run is None or desk.run.closed:
            return
        try:
            if desk.distributed:
                environment.runner.stop(send_stop_to_client=False)
            else:
                environment.runner.stop()
        except KeyboardInterrupt:
            environment.stop_timeout = 0.0
            environment.runner.user_greenlets.kill(timeout=DRAIN_GRACE_S)
            desk.close()

    environment.events.test_start.add_listener(on_test_start)
    environment.events.spawning_complete.add_listener(on_spawning_complete)
    environment.events.test_stopping.add_listener(on_test_stopping)
    environment.events.test_stop.add_listener(lambda **_: desk.close())
    environment.events.quitting.add_listener(on_quitting)


def leave_with_parent(runner: Any) -> None:
    """A worker forked by --processes ends with the process that forked it, however that ended."""
    while os.getppid() == IMPORTED_BY:
        gevent.sleep(1)
    runner.quit()


def set_up_worker(environment: Any) -> None:
    station = environment.batch_station = RemoteStation(environment)
    if os.getpid() != IMPORTED_BY:
        gevent.spawn(leave_with_parent, environment.runner)

    def on_quitting(**_: Any) -> None:
        """This worker alone is told to go: its unsent prompts go back, before Locust says goodbye."""
        if station.run:
            environment.runner.stop()
            station.release()

    environment.events.spawning_complete.add_listener(lambda **_: station.ramped.set())
    environment.events.test_stopping.add_listener(lambda **_: station.close())
    environment.events.quitting.add_listener(on_quitting)


def main(arguments: list[str]) -> None:
    """`python locust_batch.py ...` is `locust -f locust_batch.py ...`, and its --help knows our options."""
    if {"-h", "--help"} & set(arguments):
        get_parser().parse_args(["--help"])
    os.execv(sys.executable, [sys.executable, "-m", "locust", "-f", __file__, *arguments])


listen: Any = events
listen.init_command_line_parser.add_listener(add_options)
listen.init.add_listener(on_init)
if __name__ == "__main__":
    main(sys.argv[1:])
