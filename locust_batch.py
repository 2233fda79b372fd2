#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = [
#     "locust",
# ]
# ///
"""Submit a JSONL corpus of prompts to an OpenAI-compatible server, from as many machines as it takes.

This one file is a Locust test: copy it to a machine with Python 3.9+ and `pip install locust`.
Every prompt is submitted once, as one chat completion, whole or streamed, whatever the number of users,
processes and machines, and every prompt that was sent becomes exactly one row of one CSV file. Of a session each turn
is such a prompt, sent after the one before it, by the same user.

    REQUESTS_FILE=requests.jsonl OPENAI_MODEL=my-model \\
    locust -f locust_batch.py --headless --host http://127.0.0.1:8000 -u 500 -r 500
    locust -f locust_batch.py --headless --host http://127.0.0.1:8000 -u 500 -r 500 --processes 4
    locust -f locust_batch.py --headless --host http://10.0.0.9:8000 -u 500 -r 500 --master --expect-workers 4
    locust -f locust_batch.py --worker --master-host 10.0.0.1    # elsewhere: needs only this file

`python locust_batch.py --help` lists the options; each is an environment variable, too: REQUESTS_FILE is
--requests-file. `python locust_batch.py ...` is `locust -f locust_batch.py ...`.

Sections, each using only sections above it:
    1. Constants                 5. Reply (pure)                  9. Results file
    2. Types                     6. Assignments (pure)           10. Connection
    3. Corpus (pure)             7. Metrics and text (pure)      11. Coordinator
    4. Request (pure)            8. Options                      12. Prompt source
                                                                 13. Locust

The CSV's columns are in docs/locust.md; a blank cell was not measured. Times count from the moment at which the
request's last byte is handed to the socket; status is success, http_error (the call failed) or decode_error (a 2xx
whose body or stream is no complete answer).

Exit codes: 0 every prompt was answered, 1 some prompt failed, was lost or was never sent
(--exit-code-on-error changes it), 2 wrong usage (nothing was sent, nothing was written).
"""

from locust import User, constant, events  # first of all: it has gevent patch what is imported next

# isort: split
import base64
import bisect
import csv
import errno
import gc
import io
import itertools
import json
import logging
import math
import os
import re
import socket
import ssl
import struct
import sys
import time
import zlib
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import IO, Any, NamedTuple, Optional
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

import gevent
import gevent.socket
import gevent.ssl
from gevent.event import Event
from geventhttpclient.response import HTTPParseError, HTTPResponse
from locust.argument_parser import get_parser
from locust.exception import RPCError, StopUser
from locust.runners import WORKER_REPORT_INTERVAL, MasterRunner, WorkerRunner
from locust.stats import CSV_STATS_INTERVAL_SEC

__version__ = "0.2.0"

# === 1. Constants ===

DEFAULT_TIMEOUT_S = 600.0
CONNECT_TIMEOUT_S = 30.0
STALE_S = 1.0  # a kept connection that is reset later than this after the sending had not been closed before it
DRAIN_GRACE_S = 5.0  # beyond --stop-timeout: for killing what is left and for the last rows to travel
IDLE_S = 10.0  # prompts are left, nobody holds one and nobody has asked for so long: the run is over
TICK_S = 0.2
END_GRACE_S = 0.5  # for the end of a stream that has said everything
BEAT_S = 0.002  # how often an event loop looks at its sockets, also while nothing arrives
LATE_READ_S = 0.004  # what is read after more than that since the last look but one may have queued up
FLUSH_S = 0.2  # how often a worker sends its rows: what a killed worker can take with it

IDENTICAL_FAILURES_TO_STOP = 100
SHED_LOAD = ("http_429", "http_503")  # a server that refuses some requests to serve others

ERROR_TEXT_CHARS = 300
ERROR_BODY_BYTES = 64 * 1024
ERROR_LEVELS = 8  # how deep an error message may hide in an error body
MAX_REPLY_BYTES = 256 * 2**20
STREAM_HEAD_BYTES = 4096  # of a body, kept to say what came when no event did
MOST_TOKENS = 2**40  # a count beyond it is no count
PLAIN_KEYS = ("vllm", "EMPTY")  # placeholders that hide nothing
LEAST_SECRET_CHARS = 4  # nobody is kept out by less, and words would be blanked
RECV_BYTES = 65536
PAIR_LIMIT_S = 20e-6
BATCH_BYTES = 256 * 1024  # one message: a few milliseconds of a worker's loop, far from a missed heartbeat
BATCH_PROMPTS = 500
BATCH_ROWS = 500
PARSE_LINES = 500  # lines parsed between two turns of the event loop
SWITCH_INTERVAL_S = 0.001  # how long finished requests may keep gevent from looking at the sockets

SUCCESS, HTTP_ERROR, DECODE_ERROR = "success", "http_error", "decode_error"
ABORTED_REASONS = ("abort", "error", "cancelled")  # finish reasons that mean: not finished
LOCAL = "local"  # the one worker of a run in one process
MESSAGE = "locust_batch."  # prefix of our own messages between master and workers

COLUMNS = (
    *("index", "prompt_tokens", "completion_tokens", "total_tokens", "latency_ms", "status", "error"),
    *("error_kind", "sent_s", "ttft_ms", "tpot_ms", "late_read", "finish_reason", "cached_tokens", "reasoning_tokens"),
    *("new_connection", "http_status", "session", "turn"),
)

IMPORTED_BY = os.getpid()  # with --processes, Locust forks its workers after importing this file
logger = logging.getLogger(__name__)


# === 2. Types ===


class UsageError(Exception):
    """The user can cure it: one line, exit code 2."""


class Prompt(NamedTuple):
    """One line of the corpus, as it stands there; it travels to the workers in this order."""

    number: int
    first: int  # index of its first request: the turns of sessions are numbered through
    line: str


@dataclass(frozen=True)
class Settings:
    """What options and environment ask for, checked; it travels to the workers as JSON."""

    requests_file: str
    results_csv: str
    system_prompt: str
    defaults: Mapping[str, Any]  # fields of every request body that its line and EXTRA_BODY may replace
    extra_body: Mapping[str, Any]
    api_key: str = field(repr=False)
    login: str = field(repr=False)  # user:password, of --host
    tls: bool
    host: str
    port: int
    path: str = field(repr=False)  # with the query
    timeout_s: float
    stream: bool
    history: str

    @property
    def authorization(self) -> str:
        if self.api_key or not self.login:
            return f"Bearer {self.api_key}" if self.api_key else ""
        return "Basic " + base64.b64encode(self.login.encode()).decode()

    @cached_property
    def secrets(self) -> list[str]:
        """What no server's words may bring back into a row, a log or the summary; longest first."""
        query = urlsplit(self.path).query
        pairs = [*parse_qsl(query), *(part.partition("=")[::2] for part in query.split("&"))]  # decoded, and as sent
        named = [value for pair in [*self.extra_body.items(), *pairs] for value in secret_values(*pair)]
        words = {self.api_key, self.login, self.login.partition(":")[2], self.authorization.partition(" ")[2], *named}
        hidden = (word for word in words if len(word) >= LEAST_SECRET_CHARS and word not in PLAIN_KEYS)
        return sorted(hidden, key=len, reverse=True)


@dataclass(frozen=True)
class Outcome:
    """What a reply, or the lack of one, amounts to; fields are CSV columns."""

    status: str
    error_kind: str = ""
    error: str = ""
    prompt_tokens: Optional[int] = None
    completion_tokens: Optional[int] = None
    finish_reason: str = ""
    cached_tokens: Optional[int] = None
    reasoning_tokens: Optional[int] = None
    http_status: Optional[int] = None

    @property
    def total_tokens(self) -> Optional[int]:
        if self.prompt_tokens is None and self.completion_tokens is None:
            return None
        return (self.prompt_tokens or 0) + (self.completion_tokens or 0)


@dataclass(frozen=True)
class Record:
    """A request that has ended: its outcome, and when, in seconds from the start of the run."""

    index: int
    outcome: Outcome
    sent_s: Optional[float] = None
    first_s: Optional[float] = None  # first token of a stream
    done_s: Optional[float] = None  # last token of a stream, last byte of anything else
    late_read: Optional[bool] = None  # chunks of the stream queued up while this process was held up
    late_ms: float = 0.0  # the longest that any of its bytes waited to be read
    by_kernel: bool = False  # all arrivals bear the kernel's stamp
    new_connection: Optional[bool] = None
    sent_again: bool = False
    session: Optional[int] = None
    turn: Optional[int] = None  # of its session, from 1

    def span_ms(self, start_s: Optional[float], end_s: Optional[float]) -> Optional[float]:
        good = self.outcome.status == SUCCESS and start_s is not None and end_s is not None
        return (end_s - start_s) * 1000 if good else None  # type: ignore[operator]

    @property
    def latency_ms(self) -> Optional[float]:
        return self.span_ms(self.sent_s, self.done_s)

    @property
    def ttft_ms(self) -> Optional[float]:
        return self.span_ms(self.sent_s, self.first_s)

    @property
    def tpot_ms(self) -> Optional[float]:
        """None, too, where all tokens came at once."""
        tokens = self.outcome.completion_tokens or 0
        span = self.span_ms(self.first_s, self.done_s) if tokens > 1 else None
        return span / (tokens - 1) if span else None

    def values(self) -> list[Any]:
        """As a message carries it; `Record.of` reads it back."""
        return [self.index, list(vars(self.outcome).values()), *list(vars(self).values())[2:]]

    @classmethod
    def of(cls, values: Sequence[Any]) -> "Record":
        return cls(values[0], Outcome(*values[1]), *values[2:])


@dataclass(frozen=True)
class Plan:
    """How a corpus is dealt out. one_each: as many users as prompts, or more, so nobody takes a second.

    A session is dealt out as one prompt.
    """

    prompts: int
    users: int
    workers: int = 1
    noun: str = "prompts"

    @property
    def one_each(self) -> bool:
        return self.users >= self.prompts

    @property
    def share(self) -> int:
        """Prompts that a worker's users will surely ask for: sent before they ask."""
        return min(self.users, self.prompts) // self.workers

    def sentence(self) -> str:
        what = "each takes the next one until none is left"
        if self.one_each:
            what = "one each" if self.users == self.prompts else "the extra users stop at once"
        return f"{self.prompts} {self.noun}, {self.users} users: {what}"


# --- secrets ---

SECRET_NAME = re.compile(r"key|token\b|secret|passw|auth|cookie|credential|bearer|\bsig", re.IGNORECASE)
SECRET_IN_URL = re.compile(rf"(//)[^/?#]*(?=@)|([?&][^=&]*(?:{SECRET_NAME.pattern})[^=&]*=)[^&]*", re.IGNORECASE)


def secret_values(name: str, value: Any) -> Iterator[str]:
    """Every text in a JSON value that stands under a name which looks secret.

    >>> list(secret_values("a", {"api_key": ["x"], "max_tokens": 5}))
    ['x']
    """
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else (("", item) for item in value):
            yield from secret_values(f"{name} {key}", item)
    elif isinstance(value, str) and SECRET_NAME.search(name):
        yield value


def masked(url: str) -> str:
    """A URL or path without the login and the secret-looking values in it.

    >>> masked("https://me:pw@host/v1?api-version=2&api-key=x")
    'https://***@host/v1?api-version=2&api-key=***'
    """
    return SECRET_IN_URL.sub(r"\1\2***", url)


# === 3. Corpus (pure) ===


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
LIMITS = ("max_tokens", "max_completion_tokens")


class Turn(NamedTuple):
    """What the user says in one turn of a session; the answer is the corpus's own, where it has one."""

    content: Any
    limit: Optional[int] = None
    delay_ms: float = 0.0  # think time before it, from the end of the turn before
    answer: Optional[str] = None


class Asked(NamedTuple):
    """What a line asks for: fields of the body, its output limit, whether nothing of ours but a model is added, and
    of a session its turns, the first one included."""

    fields: dict[str, Any]
    limit: Optional[int] = None
    whole: bool = False
    turns: Sequence[Turn] = ()


def parse_line(line: str, system_prompt: str = "") -> Asked:
    """One corpus line; ValueError says what is wrong with it.

    >>> parse_line('{"text": "Hi", "output_tokens": 5, "top_k": 1, "id": 7}')
    Asked(fields={'top_k': 1, 'messages': [{'role': 'user', 'content': 'Hi'}]}, limit=5, whole=False, turns=())
    """
    try:
        row = json.loads(line, parse_constant=not_a_number, parse_float=finite)
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
    return asked_by({key: value for key, value in row.items() if value is not None}, system_prompt)


def asked_by(row: Mapping[str, Any], system_prompt: str) -> Asked:
    """`row`: without nulls. A `body` without a prompt beside it, as in OpenAI's batch lines, is the whole request."""
    body = row.get("body", {})
    if not isinstance(body, dict):
        raise ValueError("'body' is not a JSON object")
    refuse_fields({**row, **body})
    if "body" in row and not any(key in row for key in PROMPT_KEYS):
        url = str(row.get("url", "/chat/completions"))
        if not url.endswith("/chat/completions"):
            raise ValueError(f"'url' is {url:.80}, and this run asks /chat/completions")
        messages_of({"messages": body.get("messages", ())}, "")
        return Asked(body, whole=True)
    turns: Sequence[Turn] = ()
    if next((key for key in PROMPT_KEYS if key in row), "") in ("turns", "conversations"):
        turns, system = session_of(row)
        row = {**row, "messages": [{"role": "user", "content": turns[0].content}]}
        system_prompt = system or system_prompt
    fields = {key: value for key, value in row.items() if key in BODY_KEYS}
    limit = limit_of(row)
    own_limit = any(name in body for name in LIMITS)
    fields = {**fields, "messages": messages_of(row, system_prompt), **body}
    return Asked(fields, None if own_limit else limit, turns=turns)


ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def session_of(row: Mapping[str, Any]) -> tuple[list[Turn], str]:
    """(turns, system prompt) of `turns`, or of ShareGPT's `conversations`; what an assistant says answers the turn."""
    turns: list[Turn] = []
    system, said = row.get("system"), row.get("turns", row.get("conversations"))
    if not isinstance(said, list) or not all(isinstance(item, dict) for item in said):
        raise ValueError("turns or conversations are not a list of objects")
    for item in said:
        role = ROLES.get(str(item.get("from", item.get("role", "user"))))
        content = item.get("value", item.get("content"))
        if role == "user":
            turns.append(turn_of(item, content))
        elif role == "assistant" and turns and isinstance(content, str):
            turns[-1] = turns[-1]._replace(answer=content)
        elif role == "system":
            system = content
    if not turns:
        raise ValueError("a session without turns")
    return turns, system if isinstance(system, str) else ""


def turn_of(item: Mapping[str, Any], content: Any) -> Turn:
    delay_ms = item.get("delay_ms") or 0
    if not content or not isinstance(content, (str, list)):
        raise ValueError("a turn without content")
    if isinstance(delay_ms, bool) or not isinstance(delay_ms, (int, float)) or delay_ms < 0:
        raise ValueError(f"delay_ms is not a number of 0 or more: {delay_ms!r:.40}")
    return Turn(content, limit_of({key: value for key, value in item.items() if value is not None}), delay_ms)


def refuse_fields(fields: Mapping[str, Any]) -> None:
    for name in ("stream", "stream_options"):
        if fields.get(name) is not None:
            raise ValueError(f"'{name}' in a line: the replies of a run are all streamed, or all whole")
    if fields.get("n") not in (None, 1):
        raise ValueError("'n' in a line: the times of several answers in one reply would mix")


def not_a_number(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def finite(text: str) -> float:
    if math.isinf(float(text)):
        raise ValueError(f"{text:.40} is too large a number")
    return float(text)


def messages_of(row: Mapping[str, Any], system_prompt: str) -> list[dict[str, Any]]:
    """`messages` comes before `text` and `prompt`."""
    key = next((key for key in ("messages", "text", "prompt") if key in row), None)
    if key is None:
        raise ValueError("no prompt: neither 'messages', 'text' nor 'prompt'")
    messages = row[key]
    if key != "messages":
        if not isinstance(messages, str) or not messages:
            raise ValueError("the prompt is not a text, or an empty one")
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, list) or not messages or not all(isinstance(item, dict) for item in messages):
        raise ValueError("'messages' is not a list of messages")
    if not system_prompt or messages[0].get("role") in ("system", "developer"):
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def limit_of(row: Mapping[str, Any]) -> Optional[int]:
    limit = next((row[name] for name in (*LIMITS, "output_tokens") if name in row), None)
    if limit is None:
        return None
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ValueError(f"the output limit is not a whole number of 1 or more: {limit!r:.40}")
    return limit


class Corpus:
    """The lines of all prompts, and where the requests of each begin: a session has one for each turn."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.starts = array("Q", [0])
        self.unanswered = 0  # sessions that lack the answer to a turn

    def add(self, line: str) -> None:
        turns = parse_line(line).turns
        self.lines.append(line)
        self.starts.append(self.starts[-1] + max(1, len(turns)))
        self.unanswered += any(turn.answer is None for turn in turns[:-1])

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def requests(self) -> int:
        return self.starts[-1]

    def requests_of(self, number: int) -> int:
        return self.starts[number + 1] - self.starts[number]

    def prompt(self, number: int) -> Prompt:
        return Prompt(number, self.starts[number], self.lines[number])

    def number(self, index: int) -> int:
        """The line that a request is of."""
        return bisect.bisect_right(self.starts, index) - 1


def read_corpus(lines: Iterable[bytes], name: str) -> Iterator[Corpus]:
    """The corpus as it grows, each line checked; blank ones are skipped. UsageError names the line at fault."""
    corpus = Corpus()
    for number, raw in enumerate(lines, 1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            if line.strip():
                corpus.add(line)
                yield corpus
        except UnicodeDecodeError:
            raise UsageError(f"{name}, line {number}: not UTF-8; save the corpus as UTF-8") from None
        except ValueError as error:
            raise UsageError(f"{name}, line {number}: {error}") from None


# === 4. Request (pure) ===


def request_head(settings: Settings) -> bytes:
    """Request line and headers, up to the value of Content-Length."""
    name = f"[{settings.host}]" if ":" in settings.host else settings.host
    is_default_port = settings.port == (443 if settings.tls else 80)
    lines = [
        f"POST {settings.path} HTTP/1.1",
        f"Host: {name}" if is_default_port else f"Host: {name}:{settings.port}",
        f"User-Agent: locust_batch/{__version__}",
        "Accept: application/json",
        "Content-Type: application/json",
        *([f"Authorization: {settings.authorization}"] if settings.authorization else []),
        "Content-Length: ",
    ]
    return "\r\n".join(lines).encode("latin-1")


class Talk:
    """The requests that a line asks for, one after the other: of a session each with all that was said before."""

    def __init__(self, settings: Settings, prompt: Prompt, turn: int = 0) -> None:
        self.settings, self.prompt, self.turn = settings, prompt, turn
        self.asked = parse_line(prompt.line, settings.system_prompt)
        self.said = list(self.asked.fields["messages"])

    @property
    def index(self) -> int:
        return self.prompt.first + self.turn

    @property
    def place(self) -> dict[str, Any]:
        """The columns `session` and `turn`."""
        return {"session": self.prompt.number, "turn": self.turn + 1} if self.asked.turns else {}

    def body(self) -> bytes:
        """What the line asks for goes before EXTRA_BODY, and that before our own defaults; one limit, not two."""
        fields, limit, whole, turns = self.asked
        settings, limit = self.settings, (turns[self.turn].limit if turns else None) or limit
        ours = {**settings.defaults, **settings.extra_body}
        name_of_limit = next((name for name in LIMITS if name in settings.extra_body), LIMITS[0])
        if whole:
            ours = {name: ours[name] for name in ("model", "stream", "stream_options") if name in ours}
        if limit is not None or any(name in fields for name in LIMITS):
            ours = {name: value for name, value in ours.items() if name not in LIMITS}
        if limit is not None and not any(name in fields for name in LIMITS):
            ours[name_of_limit] = limit
        body = {**ours, **fields, "messages": self.said}
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()

    def goes_on(self) -> bool:
        return self.turn + 1 < len(self.asked.turns)

    def go_on(self, answered: str) -> float:
        """To the next turn; what it is to wait, in s."""
        answer = self.asked.turns[self.turn].answer if self.settings.history == "corpus" else answered
        self.turn += 1
        turn = self.asked.turns[self.turn]
        # Halves of surrogate pairs may have come apart in a stream; one without its other half cannot be sent.
        text = (answer or "").encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
        sendable = text.encode("utf-8", "replace").decode()
        self.said += [{"role": "assistant", "content": sendable}, {"role": "user", "content": turn.content}]
        return turn.delay_ms / 1000


# === 5. Reply (pure) ===

CONTROL = re.compile(
    "\x1b\\[[0-9;?]*[ -/]*[@-~]|[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]+"
)
TAGS = re.compile(r"<(script|style).*?</\1>|<[^>]*>", re.DOTALL | re.IGNORECASE)


SEVERAL_CHOICES = "several answers in one reply, whose times would mix: ask for one (n = 1)"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def plain(text: str, limit: int = ERROR_TEXT_CHARS, secrets: Iterable[str] = ()) -> str:
    """Text of a server as one line that is safe to print: no terminal escapes, no control characters, no secrets.

    >>> plain("a\\x1b[31mred\\n key sk-1", secrets=["sk-1"])
    'a red key ***'
    """
    line = " ".join(CONTROL.sub(" ", text[:ERROR_BODY_BYTES]).split())
    for secret in secrets:
        line = line.replace(secret, "***")
    return line[:limit].rstrip()


class Said(NamedTuple):
    """What a body comes to: why it is no complete answer (error_kind, message), and what it tells all the same."""

    problem: Optional[tuple[str, str]]
    finish: str = ""
    counts: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Reply:
    """What came back over the connection, not yet understood: a body, or the reader that a stream has gone to."""

    http_status: int
    body: bytes
    retry_after: str = ""
    location: str = ""
    stream: Optional["StreamReader"] = None
    size: int = 0


def read_reply(reply: Reply, secrets: Iterable[str] = ()) -> Outcome:
    """What a reply amounts to. Never raises, whatever a server sends."""
    status = reply.http_status
    if not 200 <= status <= 299:
        return Outcome(HTTP_ERROR, f"http_{status}", plain(http_error_text(reply), secrets=secrets), http_status=status)
    said = reply.stream.said() if reply.stream else read_whole(reply.body)
    finish = plain(said.finish, 40, secrets)
    if said.problem:
        kind, message = said.problem
        return Outcome(DECODE_ERROR, kind, plain(message, secrets=secrets), finish_reason=finish, http_status=status)
    return Outcome(SUCCESS, finish_reason=finish, http_status=status, **said.counts)


def content_of(reply: Reply) -> str:
    """What a complete answer says to the user, without reasoning."""
    if reply.stream:
        return "".join(reply.stream.texts)
    return str(json.loads(reply.body)["choices"][0]["message"].get("content") or "")


def http_error_text(reply: Reply) -> str:
    message = error_body_text(reply.body) or "no message"
    if reply.location and 300 <= reply.http_status <= 399:
        message = f"redirects are not followed; Location: {plain(masked(reply.location))}"
    later = f" (Retry-After: {plain(reply.retry_after, 40)})" if reply.retry_after else ""
    return f"HTTP {reply.http_status}{later}: {message}"


def error_body_text(body: bytes) -> str:
    """One line out of an error body: JSON's message, else its text, tags dropped."""
    text = body[:ERROR_BODY_BYTES].decode("utf-8", "replace")
    try:
        message = error_text(json.loads(text))
    except (ValueError, RecursionError):
        message = None
    return plain(message or TAGS.sub(" ", text))


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


def read_whole(body: bytes) -> Said:
    """A body that is one JSON object."""
    if not body.strip():
        return Said(("empty_body", "an empty body"))
    try:
        return read_completion(json.loads(body.decode("utf-8")))
    except UnicodeDecodeError:
        return Said(("not_utf8", "the body is not UTF-8"))
    except (ValueError, RecursionError) as error:
        return Said(("bad_json", f"the body is not JSON ({error}): {body[:80].decode('utf-8', 'replace')}"))


def read_completion(answer: Any) -> Said:
    message = error_text(answer)
    if message:
        return Said(("error_body", message))
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return Said(("no_choices", f"no choices in {glimpse(answer)[:120]}"))
    if len(choices) > 1:
        return Said(("several_choices", SEVERAL_CHOICES))
    said, finish = choices[0].get("message"), finish_of(choices[0])
    if not isinstance(said, dict):
        return Said(("no_choices", "a choice without a message"), finish)
    counts = usage_of(answer.get("usage"))
    return Said(verdict(finish, says_something(said), counts), finish, counts)


def says_something(message: Mapping[str, Any]) -> bool:
    """Whether a message, or a chunk's delta, holds anything of an answer."""
    texts = ("content", "refusal", "tool_calls", "function_call", "reasoning_content", "reasoning")
    return any(message.get(key) for key in texts)


def finish_of(choice: Mapping[str, Any]) -> str:
    finish = choice.get("finish_reason")
    return finish if isinstance(finish, str) else ""


def verdict(finish: str, has_text: bool, counts: Mapping[str, Any]) -> Optional[tuple[str, str]]:
    """Why an answer that has come to its end is none after all; None when it is one."""
    if finish in ABORTED_REASONS:
        return "aborted_by_server", f"finish_reason {finish}"
    if not has_text and not counts.get("completion_tokens"):
        return "empty", "a reply without a token"
    return None


def usage_of(usage: Any) -> dict[str, Any]:
    """Token counts of a usage object, as Outcome's fields; none from one that counts nothing or is malformed."""
    usage = usage if isinstance(usage, dict) else {}
    prompt, completion = whole_number(usage, "prompt_tokens"), whole_number(usage, "completion_tokens")
    if not prompt and not completion:
        return {}
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion or None,  # 0 beside a text is no count
        "cached_tokens": whole_number(usage.get("prompt_tokens_details"), "cached_tokens"),
        "reasoning_tokens": whole_number(usage.get("completion_tokens_details"), "reasoning_tokens"),
    }


def whole_number(counts: Any, name: str) -> Optional[int]:
    value = counts.get(name) if isinstance(counts, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_TOKENS else None


# --- streams ---


def event_fields(event: bytes) -> tuple[bytes, bytes]:
    """(data, event name) of one server-sent event whose lines end in LF; comments and other fields are dropped.

    >>> event_fields(b": ping\\nevent: error\\ndata: a\\ndata:b")
    (b'a\\nb', b'error')
    """
    data, name = [], b""
    for line in event.split(b"\n"):
        field_name, _, value = line.partition(b":")
        value = value[1:] if value.startswith(b" ") else value
        if field_name in (b"data", b"error"):
            data.append(value)
        if field_name in (b"event", b"error"):
            name = value if field_name == b"event" else field_name
    return b"\n".join(data), name


class StreamReader:
    """Reads server-sent events, however they are cut into packets; an event bears the stamp of its last byte."""

    complete = False  # nothing that could still come would matter
    first_s: Optional[float] = None  # None, too, where it was read late, together with the next
    last_s: Optional[float] = None
    late_read = opened = after_cr = False
    chunks = 0
    stamp_s = 0.0
    head = b""
    choice: Any = None
    finish = ""
    counts: Mapping[str, Any] = {}
    problem: Optional[tuple[str, str]] = None

    def __init__(self) -> None:
        self.tail = bytearray()
        self.texts: list[str] = []

    def feed(self, data: bytes, stamp_s: float, late: bool) -> None:
        """`late`: what this read holds may have queued up, and its stamp is that of its last byte."""
        self.stamp_s, chunks = stamp_s, self.chunks
        if len(self.head) < STREAM_HEAD_BYTES:
            self.head = (self.head + data)[:STREAM_HEAD_BYTES]
        seam = max(0, len(self.tail) - 1)
        self.tail += self.with_plain_ends(data)
        if not self.opened and (len(self.tail) >= len(BYTE_ORDER_MARK) or not BYTE_ORDER_MARK.startswith(self.tail)):
            self.opened, self.tail = True, self.tail[len(BYTE_ORDER_MARK) * self.tail.startswith(BYTE_ORDER_MARK) :]
        if self.tail.find(b"\n\n", seam) >= 0:  # so that an event of megabytes is not looked through once a packet
            *events, tail = bytes(self.tail).split(b"\n\n")
            self.tail = bytearray(tail)
            for event in events:
                self.event(event.lstrip(b"\n"))
        if late and self.chunks > chunks + 1:
            self.late_read = True
            self.first_s = self.first_s if chunks else None

    def with_plain_ends(self, data: bytes) -> bytes:
        """Lines may end in CR LF or in CR; the two of a CR LF may come apart."""
        if self.after_cr and data.startswith(b"\n"):
            data = data[1:]
        self.after_cr = data.endswith(b"\r")
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in data else data

    def event(self, event: bytes) -> None:
        data, name = event_fields(event)
        if data == b"[DONE]":
            self.complete = bool(self.finish)
        elif data:
            self.payload(data, name == b"error")

    def payload(self, data: bytes, is_error: bool) -> None:
        try:
            body = json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError):
            text = data[:120].decode("utf-8", "replace")
            self.fail(*(("stream_error", text) if is_error else ("bad_event", f"an event that is not JSON: {text}")))
            return
        message = error_text(body)
        if message or is_error:
            self.fail("stream_error", message or glimpse(body))
        elif not isinstance(body, dict):
            self.fail("bad_event", f"an event that is no JSON object: {data[:120]!r}")
        else:
            usage, choices = usage_of(body.get("usage")), body.get("choices")
            self.counts = usage or self.counts
            for choice in choices if isinstance(choices, list) else ():
                if isinstance(choice, dict):
                    self.take_choice(choice)
            self.complete = self.complete or bool(usage and self.finish)  # some servers never send [DONE]

    def take_choice(self, choice: Mapping[str, Any]) -> None:
        index, delta = choice.get("index") or 0, choice.get("delta")
        self.choice = index if self.choice is None else self.choice
        if index != self.choice:
            self.fail("several_choices", SEVERAL_CHOICES)
        if isinstance(delta, dict) and says_something(delta):
            self.first_s = self.first_s if self.chunks else self.stamp_s
            self.last_s = self.stamp_s
            self.chunks += 1
            if isinstance(delta.get("content"), str):
                self.texts.append(delta["content"])
        self.finish = finish_of(choice) or self.finish

    def fail(self, kind: str, message: str) -> None:
        self.problem = self.problem or (kind, message)

    def last_words(self, tail: bytes) -> None:
        """What stood before the end without a blank line: kept when it is whole, else the stream was cut."""
        data = event_fields(tail)[0]
        try:
            whole = data in (b"", b"[DONE]") or isinstance(json.loads(data), dict)
        except (ValueError, RecursionError):
            whole = False
        self.event(tail) if whole else self.fail("truncated", "the stream ended within an event")

    def said(self) -> Said:
        """The body has ended."""
        tail, self.tail = bytes(self.tail).strip(b"\n"), bytearray()
        if tail:
            self.last_words(tail)
        counts = dict(self.counts)
        if self.chunks:  # a count of 0 beside a text is none
            counts["completion_tokens"] = counts.get("completion_tokens") or self.chunks
        return Said(self.problem or self.ending(), self.finish, counts)

    def ending(self) -> Optional[tuple[str, str]]:
        if self.finish:
            return verdict(self.finish, self.chunks > 0, self.counts)
        if self.chunks or self.counts:
            return "truncated", f"the stream ended without a finish_reason, after {self.chunks} chunks"
        if not self.head.strip():
            return "empty_body", "an empty body"
        if b"data:" in self.head:
            return "truncated", "a stream without a token and without a finish_reason"
        return "not_a_stream", f"no server-sent events but: {error_body_text(self.head)}"


# --- calls that failed ---


class ConnectionFailed(Exception):
    """A call that failed, where the cause has a name of its own: (error_kind, message)."""


class UnreadRequest(Exception):
    """A request on a kept connection that the server cannot have read: it may be sent again."""


CLIENT_LIMITS = {
    errno.EADDRNOTAVAIL: "no free local port: this machine's ephemeral ports are used up; use fewer users here",
    errno.EMFILE: "no free file descriptor: raise `ulimit -n`",
    errno.ENFILE: "no free file descriptor: raise `ulimit -n`",
    errno.ENOBUFS: "no buffer space left in this machine's kernel; use fewer users",
}
UNREACHABLE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN)
ERROR_KINDS = (
    (socket.gaierror, "dns_error"),
    (ssl.SSLError, "tls_error"),
    (ConnectionRefusedError, "connect_refused"),
    (ConnectionError, "reset"),
    (HTTPParseError, "bad_http"),
)


def failed_call(error: BaseException, http_status: Optional[int], secrets: Iterable[str]) -> Outcome:
    """The outcome of a call that raised, perhaps after the head of a reply had come."""
    kind, message = failure_of(error)
    return Outcome(HTTP_ERROR, kind, plain(message, secrets=secrets), http_status=http_status)


def failure_of(error: BaseException) -> tuple[str, str]:
    if isinstance(error, ConnectionFailed):
        return error.args[0], error.args[1]
    if isinstance(error, gevent.GreenletExit):
        return "aborted", "stopped before the reply had ended"
    code = getattr(error, "errno", None)
    reason = str(getattr(error, "strerror", None) or error or type(error).__name__)
    if code in CLIENT_LIMITS:
        return "client_limit", CLIENT_LIMITS[code]
    if code in UNREACHABLE:
        return "unreachable", reason
    for family, kind in ERROR_KINDS:
        if isinstance(error, family):
            return kind, f"not an HTTP/1 reply: {reason}" if kind == "bad_http" else reason
    return "other", f"{type(error).__name__}: {reason}"


# === 6. Assignments (pure) ===


class Assignments:
    """Where every prompt is: unsent, held by one worker, or closed. It never goes to a second worker
    once a first may have sent it.

    >>> prompts = Assignments(range(4), Plan(prompts=4, users=4, workers=2))
    >>> prompts.grant("a", urgent=0, spare=9), prompts.grant("b", urgent=3, spare=9), prompts.note("a", 0, 0)
    ([0, 1], [2, 3], True)
    >>> prompts.note("a", 0, 0), prompts.close("b", 1), prompts.close("a", 0), prompts.release("a"), [*prompts.unsent]
    (False, False, True, 1, [1])
    """

    def __init__(self, numbers: Iterable[int], plan: Plan) -> None:
        self.plan = plan
        self.unsent = deque(numbers)
        self.held: dict[str, dict[int, int]] = {}  # by worker: its prompts, and how many requests of each have ended
        self.granted: Counter[str] = Counter()

    def grant(self, worker: str, urgent: int, spare: int) -> list[int]:
        """`urgent`: users are waiting; `spare`: so that the next ones need not wait."""
        urgent = min(urgent, len(self.unsent))
        spare = min(spare, self.spare_limit(worker, urgent))
        taken = [self.unsent.popleft() for _ in range(urgent + spare)]
        self.held.setdefault(worker, {}).update(dict.fromkeys(taken, 0))
        self.granted[worker] += len(taken)
        return taken

    def spare_limit(self, worker: str, urgent: int) -> int:
        """One each: no more than this worker's users will take. Else ever less towards the end, so that
        no worker sits on prompts while another's users have none."""
        rest = len(self.unsent) - urgent
        if self.plan.one_each:
            return max(0, min(rest, self.plan.share - self.granted[worker] - urgent))
        return rest // (2 * self.plan.workers)

    def note(self, worker: str, number: int, turn: int) -> bool:
        """A request of this prompt has ended, `turn` from 0; False: its row is already written."""
        held = self.held.get(worker, {})
        if held.get(number) != turn:
            return False
        held[number] += 1
        return True

    def close(self, worker: str, number: int) -> bool:
        """False: not held there."""
        return self.held.get(worker, {}).pop(number, None) is not None

    def release(self, worker: str) -> int:
        """A worker has given back what it never sent; a session that has begun ends there."""
        given_back = sorted((number for number, ended in self.held.pop(worker, {}).items() if not ended), reverse=True)
        self.unsent.extendleft(given_back)
        return len(given_back)

    def holders(self) -> list[str]:
        return [worker for worker, held in self.held.items() if held]

    def lost(self) -> list[tuple[int, int]]:
        """All that is still held, of whoever, and how many requests of each have ended; it is closed with this."""
        lost = sorted(item for held in self.held.values() for item in held.items())
        self.held.clear()
        return lost


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


SAMPLED = {"latency_ms": "Latency", "ttft_ms": "TTFT", "tpot_ms": "TPOT"}  # of the successes


@dataclass
class Tally:
    """The exact figures of a run, fed one record at a time."""

    successes: int = 0
    without_usage: int = 0
    sent_again: int = 0
    sessions: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    first_sent_s: float = math.inf
    last_done_s: float = -math.inf
    by_kernel: int = 0
    late_ms: "array[float]" = field(default_factory=lambda: array("d"))
    late_read: int = 0
    samples: dict[str, "array[float]"] = field(default_factory=lambda: {name: array("d") for name in SAMPLED})
    failures: "Counter[tuple[str, str]]" = field(default_factory=Counter)  # by status and error_kind
    first_errors: dict[str, str] = field(default_factory=dict)  # by error_kind

    def add(self, record: Record) -> None:
        outcome = record.outcome
        self.sent_again += record.sent_again
        self.sessions += record.turn == 1
        if record.sent_s is not None and record.done_s is not None:
            self.first_sent_s = min(self.first_sent_s, record.sent_s)
            self.last_done_s = max(self.last_done_s, record.done_s)
        if outcome.status != SUCCESS:
            self.failures[outcome.status, outcome.error_kind] += 1
            self.first_errors.setdefault(outcome.error_kind, outcome.error)
            return
        self.successes += 1
        self.without_usage += outcome.prompt_tokens is None or outcome.completion_tokens is None
        self.tokens_in += outcome.prompt_tokens or 0
        self.tokens_out += outcome.completion_tokens or 0
        self.by_kernel += record.by_kernel
        self.late_ms.append(record.late_ms)
        self.late_read += bool(record.late_read)
        for name, sample in self.samples.items():
            value = getattr(record, name)
            if value is not None:
                sample.append(value)

    @property
    def rows(self) -> int:
        return self.successes + sum(self.failures.values())

    @property
    def identical_failures(self) -> int:
        """How many requests failed, if none succeeded and all failed alike, and not for too much load; else 0."""
        if self.successes or len(self.failures) != 1:
            return 0
        (((_, kind), times),) = self.failures.items()
        return 0 if kind in SHED_LOAD else times

    @property
    def elapsed_s(self) -> Optional[float]:
        elapsed = self.last_done_s - self.first_sent_s
        return elapsed if 0 < elapsed < math.inf else None

    def rate(self, amount: int) -> Optional[float]:
        return amount / self.elapsed_s if self.elapsed_s else None


NOTES = (  # what of a run needs saying where there is any of it: its name in Tally, and in words
    ("without_usage", "replies without usage", "of a stream the content chunks are counted, of a whole reply nothing"),
    ("late_read", "streams read late", "chunks queued up here; where the first was among them there is no TTFT"),
    ("sent_again", "sent again", "the server had closed the kept connection, unannounced"),
)


def summary_text(tally: Tally, unsent: int, unsent_turns: int, results: str) -> str:
    """`unsent`: requests whose turn never came; `unsent_turns`: those of sessions that had begun."""
    asked = tally.rows + unsent + unsent_turns
    lines = [("Total time (s)", shown(tally.elapsed_s), "first request sent to last reply")]
    lines.append(("Requests/s", shown(tally.rate(tally.successes), 2), ""))
    tokens_in, tokens_out = tally.tokens_in, tally.tokens_out
    for name, tokens in (("In", tokens_in), ("Out", tokens_out), ("Total", tokens_in + tokens_out)):
        lines.append((f"{name} tokens/s", shown(tally.rate(tokens), 2), f"{tokens} tokens"))
    for name, title in SAMPLED.items():
        sample = sorted(tally.samples[name])
        for q in (50, 90, 99) if sample or name == "latency_ms" else ():
            lines.append((f"{title} p{q} (ms)", shown(percentile(sample, q)), f"exact, n={len(sample)}"))
    for (_, kind), times in tally.failures.most_common():
        lines.append((f"! {kind}", str(times), f"first: {tally.first_errors[kind]}"))
    if unsent:
        lines.append(("! never sent", str(unsent), "the run ended before their turn"))
    if unsent_turns:
        why = f"of the {tally.sessions} sessions begun: a turn before them failed, or the run ended"
        lines.append(("! turns not sent", str(unsent_turns), why))
    lines += [(f"! {title}", str(getattr(tally, name)), why) for name, title, why in NOTES if getattr(tally, name)]
    if tally.successes:
        p50, p99, most = (shown(percentile(sorted(tally.late_ms), q), 1) for q in (50, 99, 100))
        late = f"of the replies; their bytes waited here for up to p50 {p50}, p99 {p99}, max {most} ms"
        lines.append(("Stamped by kernel", f"{tally.by_kernel / tally.successes:.0%}", late))
    lines.append(("Rows", str(tally.rows), f"in {results}"))
    head = f"=== locust_batch: {tally.successes} of {asked} prompts answered, {asked - tally.successes} not ==="
    return "\n".join([head, *(f"  {name:<22}{value:>14}  {note}".rstrip() for name, value, note in lines)])


def shown(value: Optional[float], digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def cell(value: Any, digits: int = 3) -> str:
    """A value as the CSV shows it; text that a spreadsheet would run is made text again.

    >>> cell(None), cell(True), cell(1.5), cell("=1+1")
    ('', '1', '1.500', "'=1+1")
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return f"'{value}" if value[:1] in ("=", "+", "-", "@") else value
    return f"{value:.{digits}f}" if isinstance(value, float) else str(int(value))


def csv_row(record: Record) -> list[str]:
    """Cells in the order of COLUMNS."""

    def value(column: str) -> Any:
        return getattr(record if hasattr(record, column) else record.outcome, column)

    return [cell(value(column), 6 if column == "sent_s" else 3) for column in COLUMNS]


# === 8. Options ===

OPTIONS: tuple[tuple[str, Any, str], ...] = (
    ("requests_file", "requests.jsonl", "corpus, one JSON object a line: text, prompt, messages or turns; max_tokens"),
    ("openai_endpoint_path", "/v1/chat/completions", "path, joined to --host"),
    ("openai_api_key", "", "bearer token; better in the environment: a process list shows options"),
    ("openai_model", "gpt-4o-mini", "model name"),
    ("system_prompt", "You are a helpful assistant.", "system message before each prompt without one; empty: none"),
    ("results_csv", "results.csv", "rows are appended here"),
    ("max_tokens", "", "limit of each answer; a line's own limit wins; empty: not sent"),
    ("temperature", "", "sampling temperature; empty: not sent"),
    ("extra_body", "", "JSON object merged into every request; what a line asks for wins"),
    ("request_timeout", f"{DEFAULT_TIMEOUT_S:g}", "seconds that one request may take"),
    ("stream", False, "stream the answers, and measure TTFT and TPOT"),
    ("history", "server", "whose answers a later turn of a session holds: server or corpus"),
)


def add_options(parser: Any, **_: Any) -> None:
    group = parser.add_argument_group("locust_batch: one chat completion per line of a corpus")
    for name, default, text in OPTIONS:
        action = group.add_argument(
            "--" + name.replace("_", "-"),
            env_var=name.upper(),
            default=default,
            help=f"{text} (environment: {name.upper()}" + (f"; default: {default})" if default else ")"),
            **({"action": "store_true"} if default is False else {"metavar": "<text>"}),
        )
        action.include_in_web_ui = name not in ("openai_api_key", "extra_body")  # secrets may stand in both


def settings_from(options: Any, host: Optional[str]) -> Settings:
    """Checks everything that can be wrong before anything is read or sent; raises UsageError."""
    given = {name: utf8(getattr(options, name, None)) or str(default) for name, default, _ in OPTIONS}
    given["system_prompt"] = utf8(options.system_prompt)  # the one whose emptiness means something
    target = target_of(host)
    api_key = given["openai_api_key"].strip()
    if not api_key.isprintable() or not api_key.isascii():
        raise UsageError("--openai-api-key holds a character that no header can carry")
    if given["history"] not in HISTORIES:
        raise UsageError("--history is neither server nor corpus")
    tls = target.scheme == "https"
    return Settings(
        requests_file=given["requests_file"],
        results_csv=given["results_csv"],
        system_prompt=given["system_prompt"],
        defaults={**default_fields(given), **(STREAM_FIELDS if options.stream else {})},
        extra_body=parsed_extra_body(given["extra_body"].strip() or "{}"),
        api_key=api_key,
        login=unquote(target.netloc.rpartition("@")[0]),
        tls=tls,
        host=target.hostname or "",
        port=target.port or (443 if tls else 80),
        path=joined_path(target.path, given["openai_endpoint_path"].strip(), target.query),
        timeout_s=number_of(given, "request_timeout", float, 0.001) or DEFAULT_TIMEOUT_S,
        stream=bool(options.stream),
        history=given["history"],
    )


def utf8(value: Any) -> str:
    """What was given, as UTF-8 also where the locale is not; empty for nothing."""
    return str(value or "").encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def target_of(host: Optional[str]) -> SplitResult:
    if not host:
        raise UsageError("no server: give it with --host, e.g. --host http://127.0.0.1:8000")
    try:
        target = urlsplit(host)
        name = target.hostname or ""
        if target.scheme in ("http", "https") and target.port != 0 and re.fullmatch(r"[^\s\x00-\x1f/]+", name):
            name.encode("idna")
            return target
    except ValueError:
        pass
    raise UsageError("--host is not a URL like http://127.0.0.1:8000 or https://api.example.com")


def joined_path(base: str, endpoint: str, query: str) -> str:
    """The path of --host, then the endpoint's, then the queries of both.

    >>> joined_path("/openai/", "/v1/chat/completions", "api-version=2")
    '/openai/v1/chat/completions?api-version=2'
    """
    path, _, own_query = endpoint.lstrip("/").partition("?")
    queries = "&".join(part for part in (query, own_query) if part)
    return quote(f"{base.rstrip('/')}/{path}" + (f"?{queries}" if queries else ""), safe="/?&=%:@,;+$!*'()~")


HISTORIES = ("server", "corpus")
STREAM_FIELDS: Mapping[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}


def default_fields(given: Mapping[str, str]) -> dict[str, Any]:
    limit, temperature = number_of(given, "max_tokens", int, 1), number_of(given, "temperature", float, 0)
    fields = {"model": given["openai_model"], "max_tokens": limit, "temperature": temperature}
    return {name: value for name, value in fields.items() if value is not None}


def parsed_extra_body(text: str) -> dict[str, Any]:
    try:
        extra = json.loads(text)
        json.dumps(extra, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--extra-body is not JSON that can be sent: {error}") from None
    if not isinstance(extra, dict):
        raise UsageError("--extra-body is not a JSON object")
    if "messages" in extra or "stream" in extra:
        raise UsageError("--extra-body may not hold `messages` (they come from the corpus) or `stream` (use --stream)")
    return extra


def number_of(given: Mapping[str, str], name: str, kind: type, least: float) -> Any:
    """None when not given."""
    text = given[name].strip()
    try:
        value = kind(text) if text else None
        if value is None or (math.isfinite(value) and value >= least):
            return value
    except (ValueError, OverflowError):
        pass
    option = "--" + name.replace("_", "-")
    raise UsageError(f"{option} is not a {'whole ' if kind is int else ''}number of at least {least:g}")


def load_corpus(path: str, history: str = "server") -> Corpus:
    """The checked corpus; turns the event loop now and then, so that no heartbeat is missed."""
    corpus = Corpus()
    try:
        with open(path, "rb") as file:
            for corpus in read_corpus(file, path):
                if len(corpus) % PARSE_LINES == 0:
                    gevent.sleep(0)
    except OSError as error:
        raise UsageError(f"cannot read --requests-file {path}: {error.strerror or error}") from None
    if not corpus:
        raise UsageError(f"{path} holds no prompt; one JSON object per line with 'text', 'prompt' or 'messages'")
    if history == "corpus" and corpus.unanswered:
        raise UsageError(f"--history corpus: {corpus.unanswered} sessions of {path} lack the answer to a turn")
    return corpus


# === 9. Results file ===


class ResultsFile:
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
            missing = ", ".join(column for column in COLUMNS if column not in header)
            differs = f"lacks the columns {missing}" if missing else "has other columns"
            raise ValueError(f"{differs}; name a new file, or move this one away")
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


# === 10. Connection ===


TOO_LARGE = f"the reply is larger than {MAX_REPLY_BYTES >> 20} MB"


class ReplyParser(HTTPResponse):  # type: ignore[misc,unused-ignore]
    """Reads HTTP; keeps the first final message: a 1xx is not one, and what follows it is not ours."""

    status: Optional[int] = None  # of the final message
    ended = reusable = False
    received = size = 0

    def __init__(self, streamed: bool) -> None:
        super().__init__("POST")
        self.stream = StreamReader() if streamed else None
        self.pieces: list[bytes] = []  # of the body, where no stream takes them
        self.inflate: Any = None

    @property
    def complete(self) -> bool:
        """Nothing that could still come would matter."""
        return self.ended or bool(self.stream and self.stream.complete)

    def reply(self) -> Reply:
        assert self.status is not None
        return Reply(self.status, b"".join(self.pieces), self.retry_after, self.location, self.stream, self.size)

    def _on_message_begin(self) -> None:
        super()._on_message_begin()
        if self.ended:  # the rest of it would be taken for the next reply
            self.reusable = False

    def _on_headers_complete(self) -> Any:
        skips_body = super()._on_headers_complete()
        if self.status is None and self.get_code() >= 200:
            self.status = self.get_code()
            names = ("content-encoding", "retry-after", "location")
            encoding, self.retry_after, self.location = (str(self.get(name) or "").strip() for name in names)
            if encoding.lower() in ("gzip", "x-gzip", "deflate"):  # though nobody asked for it
                self.inflate = zlib.decompressobj(zlib.MAX_WBITS | 32)
        return skips_body

    def _on_body(self, data: bytearray) -> None:
        if not self.ended:
            super()._on_body(data)

    def _on_message_complete(self) -> None:
        super()._on_message_complete()
        if not self.ended and self.get_code() >= 200:
            self.ended, self.reusable = True, self.should_keep_alive()

    def take(self, data: bytes, stamp_s: float, late: bool) -> None:
        """Feed what arrived (nothing: the server has closed) and hand the body on."""
        self.received += len(data)
        try:
            self.feed(data)
        except HTTPParseError:
            if not self.ended and data:
                raise
            self.reusable = False
        if self._body_buffer:
            self.take_body(bytes(self._body_buffer), stamp_s, late)
            self._body_buffer.clear()
        if not self.ended and not data:
            if self.received:
                raise ConnectionFailed("cut", f"the connection was closed within the reply, after {self.size} bytes")
            raise ConnectionFailed("closed", "the server closed the connection without a reply")
        if self.received > MAX_REPLY_BYTES:  # counted with headers and interim replies, which may be endless, too
            raise ConnectionFailed("too_large", TOO_LARGE)

    def take_body(self, data: bytes, stamp_s: float, late: bool) -> None:
        if self.inflate:
            try:
                data = self.inflate.decompress(data, MAX_REPLY_BYTES + 1 - self.size)
            except zlib.error as error:
                raise ConnectionFailed("bad_http", f"broken compression: {error}") from None
        self.size += len(data)
        if self.size > MAX_REPLY_BYTES:
            raise ConnectionFailed("too_large", TOO_LARGE)
        if self.stream and 200 <= (self.status or 0) <= 299:
            self.stream.feed(data, stamp_s, late)
        else:
            self.pieces.append(data)


SO_TIMESTAMPNS = 35  # Linux, the common architectures; the socket module does not name it
TIMESPEC = struct.Struct("@ll")
ANCILLARY_BYTES = 64


def kernel_age_s(ancillary: Iterable[Any], wall_ns: int) -> Optional[float]:
    """How long ago, by the wall clock, the kernel received what was read with this; None where it does not say."""
    for level, kind, stamp in ancillary:
        if (level, kind, len(stamp)) == (socket.SOL_SOCKET, SO_TIMESTAMPNS, TIMESPEC.size):
            seconds, nanoseconds = TIMESPEC.unpack(stamp)
            return float(wall_ns - seconds * 10**9 - nanoseconds) / 1e9
    return None


def clock_pair() -> tuple[float, int]:
    """(perf_counter in s, wall clock in ns) of one moment; read again where something came between the two."""
    for _ in range(3):
        now_s, wall_ns = time.perf_counter(), time.time_ns()
        if time.perf_counter() - now_s < PAIR_LIMIT_S:
            break
    return now_s, wall_ns


class LoopWatch:
    """When the event loop last looked at its sockets: every BEAT_S at least, unless it is held up."""

    def __init__(self) -> None:
        self.before_s = self.looked_s = time.perf_counter()
        loop = gevent.get_hub().loop
        self.watchers = loop.check(ref=False, priority=2), loop.timer(BEAT_S, BEAT_S, ref=False)
        self.watchers[0].start(self.on_look)
        self.watchers[1].start(lambda: None)

    def on_look(self) -> None:
        self.before_s, self.looked_s = self.looked_s, time.perf_counter()

    def away_s(self, now_s: float) -> float:
        """For how long, at most, what is read now has been waiting: since the look before the last one."""
        return now_s - self.before_s


class Connection:
    """One user's connection, opened before the clock starts and kept for the user's next prompt."""

    def __init__(self, settings: Settings, context: Any, watch: LoopWatch) -> None:
        self.settings = settings
        self.context = context
        self.watch = watch
        self.sock: Any = None
        self.stamped = False  # by the kernel
        self.refused = False  # the server's side took no more bytes of the request
        self.reset_call()

    def reset_call(self) -> None:
        """What is known of one call: stamps of time.perf_counter."""
        self.sent: Optional[float] = None
        self.done: Optional[float] = None
        self.by_kernel = True  # every arrival's stamp so far
        self.late_s = 0.0  # the longest that an arrival waited to be read; without the kernel's stamp, at most
        self.is_new: Optional[bool] = None
        self.http_status: Optional[int] = None  # of a reply that did not become complete
        self.sent_again = False

    def call(self, payload: bytes) -> Reply:
        """One request and its reply. A request goes out a second time only if the server cannot have read it."""
        self.reset_call()
        if self.sock is not None and not self.is_stale():
            self.is_new = False
            try:
                return self.exchange(payload)
            except UnreadRequest:
                self.sent_again = True
        self.close()
        self.open()
        self.is_new = True
        return self.exchange(payload)

    def exchange(self, payload: bytes) -> Reply:
        parser = ReplyParser(self.settings.stream)
        try:
            with gevent.Timeout(self.settings.timeout_s) as limit:
                self.send(payload)
                self.receive(parser)
        except BaseException as error:
            self.done = time.perf_counter()
            self.http_status = parser.status
            unread = not self.is_new and not parser.received and self.was_reset(error)
            self.close()
            if unread:
                raise UnreadRequest from None
            if error is limit:
                raise ConnectionFailed("timeout", f"no complete reply within {self.settings.timeout_s:g} s") from None
            raise
        if not parser.reusable:
            self.close()
        return parser.reply()

    def send(self, payload: bytes) -> None:
        """Stamps `sent` before each piece is handed over, so that in the end it is the last byte's."""
        rest = memoryview(payload)
        self.refused = False
        self.sock.settimeout(0.0)  # else gevent would wait for room after the stamp
        try:
            while rest:
                self.sent = time.perf_counter()
                try:
                    count = self.sock.send(rest)
                except BlockingIOError:
                    count = 0
                rest = rest[count:]
                if not count:
                    gevent.socket.wait_write(self.sock.fileno())
        except (ConnectionError, ssl.SSLEOFError):
            self.refused = True  # it has stopped listening: perhaps it has said why
        finally:
            self.sock.settimeout(None)

    def receive(self, parser: ReplyParser) -> None:
        """Stamps `done` with every arrival. A stream that has said everything is not waited for for long."""
        while not parser.ended:
            if parser.complete:
                self.sock.settimeout(END_GRACE_S)
            try:
                data, late = self.read()
                parser.take(data, self.done or 0.0, late)
            except (OSError, HTTPParseError, ConnectionFailed):
                if parser.ended or not parser.complete:
                    raise
                return
            if len(data) == RECV_BYTES and not parser.ended:
                gevent.sleep(0)  # more is there already: else neither others nor the time-out had a turn

    def read(self) -> tuple[bytes, bool]:
        """What has arrived, and whether it may have queued up. `done` is the kernel's stamp where it has one, else now.

        The kernel has one on Linux, without TLS.
        """
        ancillary: Iterable[Any] = ()
        if self.stamped:
            data, ancillary, _, _ = self.sock.recvmsg(RECV_BYTES, ANCILLARY_BYTES)
        else:
            data = self.sock.recv(RECV_BYTES)
        now_s, wall_ns = clock_pair()
        away_s, age_s = self.watch.away_s(now_s), kernel_age_s(ancillary, wall_ns)
        by_kernel = age_s is not None and 0 <= age_s <= now_s - (self.sent or 0.0)  # else the wall clock was set
        self.done = now_s - (age_s or 0.0) * by_kernel
        if data:
            self.by_kernel = self.by_kernel and by_kernel
            self.late_s = max(self.late_s, now_s - self.done if by_kernel else away_s)
        return data, away_s > LATE_READ_S

    def was_reset(self, error: BaseException) -> bool:
        """Whether the server's side has refused the request: it was closed before it had read all of it.

        A server that has read everything ends its connection in order, however it fails. One that has not
        answers with a reset, within one round trip: at once, or right behind the end that was under way.
        """
        ended = isinstance(error, ConnectionFailed) and error.args[0] == "closed"
        reset = self.refused or isinstance(error, ConnectionError)
        while (ended or reset) and time.perf_counter() - (self.sent or 0.0) < STALE_S:
            if reset or self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                return True
            gevent.sleep(STALE_S / 200)
        return False

    def open(self) -> None:
        address = (self.settings.host, self.settings.port)
        limit_s = min(CONNECT_TIMEOUT_S, self.settings.timeout_s)
        too_late = ConnectionFailed("connect_timeout", f"no connection within {limit_s:g} s")
        with gevent.Timeout(limit_s, too_late):
            sock = gevent.socket.create_connection(address)
            try:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self.context is not None:
                    sock = self.context.wrap_socket(sock, server_hostname=self.settings.host)
            except BaseException:
                sock.close()
                raise
        self.sock = sock
        self.stamped = sys.platform == "linux" and self.context is None
        if self.stamped:
            sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)

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


# === 11. Coordinator ===


@dataclass
class Run:
    """One run of one corpus, seen from where its results are kept."""

    number: int
    settings: Settings
    corpus: Corpus
    assignments: Assignments
    results: ResultsFile
    zero: float
    heard: float  # when a worker last sent anything
    tally: Tally = field(default_factory=Tally)
    informed: set[str] = field(default_factory=set)  # workers that have got the settings
    all_users_started: bool = False
    given_up: bool = False
    ending: bool = False
    closed: bool = False

    @property
    def dealing(self) -> bool:
        """Prompts are still handed out."""
        return not (self.given_up or self.ending)

    def is_fresh(self, worker: str, record: Record) -> bool:
        number = self.corpus.number(record.index)
        return self.assignments.note(worker, number, record.index - self.corpus.starts[number])

    def keep(self, records: Sequence[Record]) -> None:
        if records:
            self.results.add(records)
        for record in records:
            self.tally.add(record)

    def lost(self) -> list[Record]:
        """One for each prompt that a worker did not report: of a session the turn that it may have been at."""
        outcome = Outcome(HTTP_ERROR, "process_lost", "its worker did not report it; the server may have seen it")
        lost = (Talk(self.settings, self.corpus.prompt(number), at) for number, at in self.assignments.lost())
        return [Record(talk.index, outcome, **talk.place) for talk in lost]

    def unsent(self) -> tuple[int, int]:
        """(requests of prompts that were not begun, turns that are left of sessions that were)"""
        waiting = sum(map(self.corpus.requests_of, self.assignments.unsent))
        return waiting, self.corpus.requests - self.tally.rows - waiting


class Coordinator:
    """Deals out the corpus and collects the results: in the one process of a small run, or on the master."""

    def __init__(self, environment: Any) -> None:
        self.environment = environment
        self.runner = environment.runner
        self.options = environment.parsed_options
        self.distributed = isinstance(self.runner, MasterRunner)
        self.prepared: Optional[tuple[Settings, Corpus, ResultsFile]] = None
        self.run: Optional[Run] = None
        self.runs = 0
        self.host = ""
        self.listening: set[str] = set()  # workers that can take our messages: Locust counts them in earlier
        self.server_url()
        for name in ("hello", "want", "rows", "released"):
            self.runner.register_message(MESSAGE + name, getattr(self, f"on_{name}"))
        gevent.spawn(self.watch_for_the_end)

    def server_url(self) -> str:
        """What was given as --host. Locust, whose pages and reports show it, is left with a masked form."""
        given = self.environment.host or ""
        if given != masked(self.host):
            self.host = given
        if self.host:
            self.environment.host = masked(self.host)
        return self.host

    def prepare(self) -> tuple[Settings, Corpus, ResultsFile]:
        """Everything that can fail, in an order that writes nothing if it does."""
        settings = settings_from(self.options, self.server_url())
        corpus = load_corpus(settings.requests_file, settings.history)
        return settings, corpus, ResultsFile(settings.results_csv)

    def begin(self) -> None:
        """A run starts: send each worker the prompts that its users will surely ask for."""
        settings, corpus, results = self.prepared or self.prepare()
        self.prepared = None
        self.runs += 1
        workers = self.live_workers()
        noun = "sessions" if corpus.requests > len(corpus) else "prompts"
        plan = Plan(len(corpus), self.runner.target_user_count, max(1, len(workers)), noun)
        logger.info(plan.sentence())
        self.environment.process_exit_code = None
        now = time.perf_counter()
        assignments = Assignments(range(len(corpus)), plan)
        self.run = Run(self.runs, settings, corpus, assignments, results, zero=now, heard=now)
        for worker in self.listening.intersection(workers):
            self.deal(worker, {"ask": 0, "urgent": 0, "spare": self.stock()})

    def stock(self) -> int:
        """Prompts that a worker keeps at hand; with one each, what a second of the ramp-up needs."""
        assert self.run is not None
        plan = self.run.assignments.plan
        rate = getattr(self.runner, "spawn_rate", None) or self.options.spawn_rate or 1
        return min(plan.share, math.ceil(rate / plan.workers)) if plan.one_each else plan.share

    def live_workers(self) -> list[str]:
        if not self.distributed:
            return [LOCAL]
        return [node.id for node in self.runner.clients.all if node.state != "missing"]

    def live_holders(self, run: Run) -> set[str]:
        return set(run.assignments.holders()).intersection(self.live_workers())

    # Dealing

    def on_hello(self, environment: Any, msg: Any, **_: Any) -> None:
        self.listening.add(msg.node_id)

    def on_want(self, environment: Any, msg: Any, **_: Any) -> None:
        if self.run is not None:
            self.run.heard = time.perf_counter()
        self.deal(msg.node_id, msg.data)

    def deal(self, worker: str, want: Mapping[str, int]) -> None:
        """Answer a worker, in messages of bounded size; the last one says that it is the answer."""
        run = self.run if self.run is not None and self.run.dealing else None
        if run is None:
            nothing = {"run": 0, "prompts": [], "ask": want["ask"], "left": 0, "more": 0, "all_users_started": False}
            self.runner.send_message(MESSAGE + "prompts", nothing, worker)
            return
        indices = run.assignments.grant(worker, want["urgent"], want["spare"])
        left = len(run.assignments.unsent)
        for part in self.parts(run, indices):
            self.send_prompts(run, worker, {"prompts": part, "ask": 0, "left": 1, "more": 1})
        more = left if len(indices) >= want["urgent"] + want["spare"] else 0
        self.send_prompts(run, worker, {"prompts": [], "ask": want["ask"], "left": left, "more": more})

    def send_prompts(self, run: Run, worker: str, answer: Mapping[str, Any]) -> None:
        """The first message of a run brings the settings along."""
        header: dict[str, Any] = {
            "run": run.number,
            "at_s": time.perf_counter() - run.zero,
            "one_each": run.assignments.plan.one_each,
            "stock": self.stock(),
            "all_users_started": run.all_users_started,
        }
        if worker not in run.informed:
            run.informed.add(worker)
            header["settings"] = json.dumps(asdict(run.settings))
        self.runner.send_message(MESSAGE + "prompts", {**header, **answer}, worker)

    def parts(self, run: Run, indices: Iterable[int]) -> Iterator[list[Prompt]]:
        part: list[Prompt] = []
        size = 0
        for index in indices:
            part.append(run.corpus.prompt(index))
            size += len(part[-1].line)
            if size >= BATCH_BYTES or len(part) >= BATCH_PROMPTS:
                yield part
                part, size = [], 0
        if part:
            yield part

    # Collecting

    def on_rows(self, environment: Any, msg: Any, **_: Any) -> None:
        if self.run is not None and msg.data["run"] == self.run.number:
            self.add(msg.node_id, [Record.of(values) for values in msg.data["rows"]], msg.data["ended"])

    def on_released(self, environment: Any, msg: Any, **_: Any) -> None:
        if self.run is not None and msg.data["run"] == self.run.number:
            self.run.assignments.release(msg.node_id)
            self.run.heard = time.perf_counter()

    def add(self, worker: str, records: Iterable[Record], ended: Iterable[int]) -> None:
        """`ended`: prompts of which no more is sent, each after its last record."""
        run = self.run
        if run is None or run.closed:
            return
        run.heard = time.perf_counter()
        run.keep([record for record in records if run.is_fresh(worker, record)])
        for number in ended:
            run.assignments.close(worker, number)
        if not run.assignments.unsent and not run.assignments.holders():
            self.end()
        elif run.dealing and run.tally.identical_failures >= IDENTICAL_FAILURES_TO_STOP:
            self.give_up(run)

    # Ending

    def give_up(self, run: Run) -> None:
        """No new prompts; the run ends when nothing is in flight any more."""
        run.given_up = True
        (failure,) = run.tally.failures
        logger.error("stopped: the first %d requests all failed alike (%s)", run.tally.rows, "/".join(failure))
        self.halt(run, CONNECT_TIMEOUT_S + run.settings.timeout_s)

    def halt(self, run: Run, grace_s: float) -> None:
        """Workers take no more prompts, and give back what they have not sent."""
        self.runner.send_message(MESSAGE + "halt", {"run": run.number, "grace_s": grace_s})

    def watch_for_the_end(self) -> None:
        while True:
            gevent.sleep(TICK_S)
            if self.run is not None and not self.run.ending and self.is_over(self.run):
                self.end()

    def is_over(self, run: Run) -> bool:
        """Nobody who is alive holds a prompt, and none is left, or none is dealt, or nobody is left to take one."""
        if self.live_holders(run):
            return False
        idle = run.all_users_started and time.perf_counter() - run.heard > IDLE_S
        return not run.assignments.unsent or run.given_up or idle

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
        if not run.assignments.holders():
            return
        self.halt(run, self.environment.stop_timeout)
        deadline = time.perf_counter() + self.environment.stop_timeout + DRAIN_GRACE_S
        try:
            while self.live_holders(run) and time.perf_counter() < deadline:
                gevent.sleep(TICK_S / 4)
        except KeyboardInterrupt:
            logger.warning("interrupted again: not waiting for what is in flight")
            self.environment.stop_timeout = 0.0

    def close(self) -> None:
        """The last rows, the summary, the exit code; once per run."""
        run = self.run
        if run is None or run.closed:
            return
        run.keep(run.lost())
        run.closed = run.ending = True
        run.results.close()
        if run.tally.successes < run.corpus.requests or run.results.unwritten:
            self.environment.process_exit_code = self.options.exit_code_on_error
        self.print_summary(run)
        if self.distributed and self.options.headless and not self.live_workers():
            gevent.spawn(self.runner.quit)  # Locust alone would wait for a worker to come back

    def print_summary(self, run: Run) -> None:
        text = summary_text(run.tally, *run.unsent(), run.results.path)
        if run.results.unwritten:
            text += f"\n  ! {run.results.unwritten} rows could not be written"
        try:
            print(text, file=sys.stderr if self.options.json else sys.stdout, flush=True)
        except OSError:  # nobody reads it any more; Python shall not complain at exit either
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115


# === 12. Prompt source ===


class PromptSource:
    """Where a process's users get their prompts and leave their records.

    Both travel in Locust's own messages, sent by one greenlet; in a run of one process Locust hands them to
    the coordinator at once. Nothing here relies on Locust's events at the start of a run: for a late worker,
    they come too early. Users who find no prompt at hand wait until the coordinator has answered their ask.
    New prompts are asked for before the last is taken, so that in the steady state nobody waits.
    """

    settings: Settings
    head: bytes
    context: Any = None
    one_each = False
    zero = 0.0
    run = in_flight = stock = left = more = asks = asks_sent = asks_answered = 0

    def __init__(self, environment: Any) -> None:
        self.runner = environment.runner
        self.at_hand: deque[Prompt] = deque()
        self.halted = Event()
        self.watch = LoopWatch()
        self.rows: list[Record] = []
        self.ended: list[int] = []  # prompts of which no more is sent
        self.rows_at_once = BATCH_ROWS if isinstance(self.runner, WorkerRunner) else 1
        self.all_users_started = Event()  # who has finished a prompt may take another, or leave
        self.prompts_arrived = Event()
        self.something_to_send = Event()
        self.runner.register_message(MESSAGE + "prompts", self.on_prompts)
        self.runner.register_message(MESSAGE + "halt", self.on_halt)
        self.own_key = utf8(environment.parsed_options.openai_api_key).strip()
        self.runner.send_message(MESSAGE + "hello")
        gevent.spawn(self.send_messages)

    def begin(self, header: Mapping[str, Any]) -> None:
        """The first message of a run; time is counted from the coordinator's start of it, on our own clock."""
        self.run, self.one_each, self.stock = header["run"], header["one_each"], header["stock"]
        self.zero = time.perf_counter() - header["at_s"]
        self.at_hand.clear()
        self.halted.clear()
        self.all_users_started.clear()
        settings = Settings(**json.loads(header["settings"]))
        self.settings = replace(settings, api_key=settings.api_key or self.own_key)
        self.head = request_head(self.settings)
        self.context = gevent.ssl.create_default_context() if settings.tls else None
        gc.collect()
        gc.freeze()  # no collection during the run walks through the corpus and through Locust

    def on_prompts(self, environment: Any, msg: Any, **_: Any) -> None:
        data = msg.data
        if data["run"] and data["run"] != self.run:
            self.begin(data)
        self.at_hand.extend(Prompt(*values) for values in data["prompts"])
        self.left, self.more = data["left"], data["more"]
        self.asks_answered = max(self.asks_answered, data["ask"])
        if data["all_users_started"]:
            self.all_users_started.set()
        self.wake_waiting_users()

    def wake_waiting_users(self) -> None:
        arrived, self.prompts_arrived = self.prompts_arrived, Event()
        arrived.set()

    def take(self) -> Optional[Prompt]:
        """The next prompt; None when there is none for this user."""
        while not self.halted.is_set():
            if self.at_hand:
                prompt = self.at_hand.popleft()
                if self.more and len(self.at_hand) <= self.stock // 2:
                    self.something_to_send.set()
                return prompt
            self.asks += 1
            own_ask = self.asks
            self.something_to_send.set()
            while self.asks_answered < own_ask and not self.halted.is_set():
                self.prompts_arrived.wait()
            if not self.at_hand and not self.left:
                return None
        return None

    def deliver(self, record: Record) -> None:
        self.rows.append(record)
        if len(self.rows) >= self.rows_at_once:
            self.something_to_send.set()

    def close_prompt(self, prompt: Prompt) -> None:
        """No more of it is sent."""
        self.ended.append(prompt.number)

    def send_messages(self) -> None:
        while True:
            self.something_to_send.wait(FLUSH_S)
            self.something_to_send.clear()
            try:
                self.send_rows()
                self.ask_for_prompts()
            except RPCError as error:
                logger.error("no way to the master for now: %s", error)

    def ask_for_prompts(self) -> None:
        low = self.more and len(self.at_hand) <= self.stock // 2
        spare = max(0, self.stock - len(self.at_hand)) if low else 0
        urgent = self.asks - self.asks_sent
        if urgent or spare:
            self.more = 0  # until the answer says otherwise
            self.asks_sent = self.asks
            self.runner.send_message(MESSAGE + "want", {"ask": self.asks, "urgent": urgent, "spare": spare})

    def send_rows(self) -> None:
        while self.rows or self.ended:
            rows = self.rows[:BATCH_ROWS]
            ended = self.ended[: len(self.ended) if rows == self.rows else 0]  # after their last rows
            data = {"run": self.run, "rows": [row.values() for row in rows], "ended": ended}
            self.runner.send_message(MESSAGE + "rows", data)
            del self.rows[: len(rows)], self.ended[: len(ended)]

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
        """Users on their way out get out: Locust stumbles over greenlets that have just died."""
        self.halted.set()
        self.wake_waiting_users()
        self.all_users_started.set()
        until = time.perf_counter() + TICK_S
        while self.runner.user_greenlets and time.perf_counter() < until:
            gevent.sleep(TICK_S / 10)

    def release(self) -> None:
        """All rows, then: what the coordinator still has under our name was never sent."""
        try:
            self.send_rows()
            self.runner.send_message(MESSAGE + "released", {"run": self.run})
        except RPCError as error:
            logger.error("no way to the master: %s", error)
        self.at_hand.clear()


# === 13. Locust ===


class BatchUser(User):  # type: ignore[misc,unused-ignore]
    """Submits one prompt, then leaves; with fewer users than prompts, one after the other."""

    wait_time = constant(0)

    source: PromptSource
    connection: Optional[Connection] = None

    def on_start(self) -> None:
        while not hasattr(self.environment, "prompt_source"):  # a late worker has users before its init event
            gevent.sleep(TICK_S / 10)
        self.source = self.environment.prompt_source

    def on_stop(self) -> None:
        if self.connection is not None:
            self.connection.close()

    def next_prompt(self) -> None:
        prompt = self.source.take()
        if prompt is None:
            raise StopUser()
        try:
            self.talk(Talk(self.source.settings, prompt))
        finally:
            self.source.close_prompt(prompt)
        if self.source.one_each:
            self.source.all_users_started.wait()  # else Locust would replace us while it is still adding users

    tasks = [next_prompt]  # noqa: RUF012

    def talk(self, talk: Talk) -> None:
        """One request; of a session one turn after the other, until one fails or the run ends."""
        while True:
            self.source.in_flight += 1
            try:
                answer = self.submit(talk)
            except Exception as error:  # ours, not the server's: but no request goes without its row
                logger.exception("request %d", talk.index)
                outcome, answer = Outcome(HTTP_ERROR, "other", plain(repr(error))), None
                self.source.deliver(Record(talk.index, outcome, **talk.place))
            finally:
                self.source.in_flight -= 1
            if answer is None or not talk.goes_on():
                return
            done_s = self.connection.done if self.connection else None
            due_s = talk.go_on(answer) + (done_s or time.perf_counter())
            if self.source.halted.wait(max(0.0, due_s - time.perf_counter())):
                return

    def submit(self, talk: Talk) -> Optional[str]:
        """Whatever happens from here on, the request gets exactly one record. The content of a complete answer."""
        source, secrets = self.source, self.source.settings.secrets
        body = talk.body()
        connection = self.connection = self.connection or Connection(source.settings, source.context, source.watch)
        reply, stopped, began = None, None, time.perf_counter()
        try:
            reply = connection.call(source.head + b"%d\r\n\r\n" % len(body) + body)
            gevent.sleep(0)  # others' replies are stamped before this one is understood
        except (Exception, gevent.GreenletExit) as error:
            stopped = error if isinstance(error, gevent.GreenletExit) else None
            outcome = failed_call(error, connection.http_status, secrets)
        if reply is not None:
            outcome = read_reply(reply, secrets)
        record = self.record(talk, outcome, reply.stream if reply else None)
        self.report_to_locust(record, began, reply.size if reply else 0)
        source.deliver(record)
        if stopped is not None:
            raise stopped
        return content_of(reply) if reply is not None and outcome.status == SUCCESS and talk.goes_on() else None

    def record(self, talk: Talk, outcome: Outcome, stream: Optional[StreamReader]) -> Record:
        connection, zero = self.connection, self.source.zero
        assert connection is not None
        done = connection.done or time.perf_counter()
        stamps = connection.sent, *((stream.first_s, stream.last_s or done) if stream else (None, done))
        sent_s, first_s, done_s = (stamp and stamp - zero if connection.sent else None for stamp in stamps)
        late, late_ms = stream.late_read if stream else None, connection.late_s * 1000
        about = late, late_ms, connection.by_kernel, connection.is_new, connection.sent_again
        return Record(talk.index, outcome, sent_s, first_s, done_s, *about, **talk.place)

    def report_to_locust(self, record: Record, began: float, length: int) -> None:
        """Locust's own statistics. Its METRIC rows are logged past its total, which is of requests alone."""
        connection, outcome = self.connection, record.outcome
        if connection is None or outcome.error_kind == "aborted":
            return
        took_s = (connection.done or time.perf_counter()) - (connection.sent or began)
        self.environment.events.request.fire(
            request_type="POST",
            name=masked(self.source.settings.path),
            response_time=took_s * 1000 if record.latency_ms is None else record.latency_ms,
            response_length=length,
            exception=RuntimeError(outcome.error_kind) if outcome.error_kind else None,
            context={},
        )
        entries = self.environment.stats.entries
        for name in ("prompt_tokens", "completion_tokens", "ttft_ms", "tpot_ms"):
            value = getattr(outcome if hasattr(outcome, name) else record, name)
            if value is not None:
                entries[(name, "METRIC")].log(value, 0)


def on_init(environment: Any, runner: Any, **_: Any) -> None:
    """Locust is ready: one coordinator for the run, and a prompt source where there are users."""
    gevent.setswitchinterval(SWITCH_INTERVAL_S)
    coordinator = None if isinstance(runner, WorkerRunner) else Coordinator(environment)
    options = environment.parsed_options
    if coordinator and (options.headless or options.autostart):
        try:
            coordinator.prepared = coordinator.prepare()
        except UsageError as error:
            leave(runner, options, error)
    if not isinstance(runner, MasterRunner):
        set_up_source(environment)  # before the coordinator: rows are delivered before the run is closed
    if coordinator:
        set_up_coordinator(environment, coordinator)


def leave(runner: Any, options: Any, error: UsageError) -> None:
    """Wrong usage: one line, exit code 2; and no worker of ours is left waiting for a master."""
    print(f"locust_batch: error: {error}", file=sys.stderr, flush=True)
    deadline = time.perf_counter() + DRAIN_GRACE_S
    while len(getattr(runner, "clients", ())) < (options.processes or 0) and time.perf_counter() < deadline:
        gevent.sleep(TICK_S / 4)
    gevent.sleep(TICK_S * 2 if options.processes else 0)  # Locust's worker cannot leave while still arriving
    runner.quit()
    raise SystemExit(2)


def set_up_coordinator(environment: Any, coordinator: Coordinator) -> None:
    def on_test_start(**_: Any) -> None:
        coordinator.run = None
        try:
            coordinator.begin()
        except UsageError as error:
            logger.error("locust_batch: %s", error)
            gevent.spawn_later(TICK_S, environment.runner.stop)

    def on_spawning_complete(**_: Any) -> None:
        if coordinator.run is not None:
            coordinator.run.all_users_started = True

    def on_quitting(**_: Any) -> None:
        if coordinator.run is None or coordinator.run.closed:
            return
        try:
            environment.runner.stop(**({"send_stop_to_client": False} if coordinator.distributed else {}))
        except KeyboardInterrupt:
            environment.stop_timeout = 0.0
            environment.runner.user_greenlets.kill(timeout=DRAIN_GRACE_S)
            environment.events.test_stop.fire(environment=environment)

    environment.events.test_start.add_listener(on_test_start)
    environment.events.spawning_complete.add_listener(on_spawning_complete)
    environment.events.test_stopping.add_listener(lambda **_: coordinator.on_stopping())
    environment.events.test_stop.add_listener(lambda **_: coordinator.close())
    environment.events.quitting.add_listener(on_quitting)


def leave_with_parent(runner: Any) -> None:
    """A worker forked by --processes ends with the process that forked it, however that ended."""
    while os.getppid() == IMPORTED_BY:
        gevent.sleep(1)
    runner.quit()


def set_up_source(environment: Any) -> None:
    source = environment.prompt_source = PromptSource(environment)
    environment.events.spawning_complete.add_listener(lambda **_: source.all_users_started.set())
    environment.events.test_stopping.add_listener(lambda **_: source.close())
    environment.events.test_stop.add_listener(lambda **_: source.release())
    if isinstance(environment.runner, WorkerRunner):  # told to go: its prompts go back before Locust says goodbye
        environment.events.quitting.add_listener(lambda **_: environment.runner.stop())
        if os.getpid() != IMPORTED_BY:
            gevent.spawn(leave_with_parent, environment.runner)


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
