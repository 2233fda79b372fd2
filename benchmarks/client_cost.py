#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = [
#     "openai[aiohttp]>=1.0",
#     "aiohttp>=3.9",
#     "httptools>=0.6",
#     "uvloop>=0.19",
# ]
# ///
"""What the benchmark itself costs, and how true its figures are, beside its peers.

A simulated server on a core of its own writes down when each request truly arrived and when each
token truly left. Every client makes the same requests from another core; its figures are set
against the server's for the same requests, and its CPU time is taken from the system.

    uv run benchmarks/client_cost.py                      # about 25 minutes
    uv run benchmarks/client_cost.py --quick              # about one: a first look, its CPU figures are rough
    uv run benchmarks/client_cost.py --cases 512x200 --clients ours,raw --rounds 5
    uv run benchmarks/client_cost.py --verdict            # is `client-bound` said when it is so, and only then?
    uv run benchmarks/client_cost.py --cases 128x100 --vllm vllm --tokenizer DIR --clients ours,vllm

Clients (--clients):

    ours          online_bench_openai_async.py with its CSV, its summary and its live line on a terminal
    alone         the same as `pip install openai` alone gives it: without httptools and uvloop
    metrics       ours, with its process that reads the server's own figures every second
    other         another version of it, named by --other FILE
    raw           aiohttp on uvloop: post, iterate, json.loads per event, perf_counter
    typed         AsyncOpenAI as it comes, on uvloop: `async for chunk in stream`
    typed-aiohttp the same with the SDK's aiohttp client
    vllm          `vllm bench serve`   these three where --vllm, --guidellm, --aiperf (or the PATH) name
    guidellm      `guidellm run`       them and --tokenizer a folder with a tokenizer; guidellm has no
    aiperf        `aiperf profile`     warm-up of a number of requests

A client that is not installed is skipped, with the reason.

How it is measured:

    CPU      user + system time of the client process (os.wait4), less that of the same command with one
             measured request (median of the rounds), per chunk or request more. Start-up, imports and the
             warm-up are in both.
    warm-up  every client first has each connection open: as many requests at once as will be in flight.
    truth    first token - arrival and last token - arrival, as the server wrote them down; its clock and
             the clients' are the machine's one perf_counter.
    rounds   the clients take turns within a round, in a rotating order; a figure is the median of the rounds,
             a ratio the median of the rounds' ratios.
    others   what other processes took of the client's core is printed: a machine in use is no place to measure.
    cores    client on the first core allowed, server on the last; this program sleeps meanwhile.

What it prints: a table per case, how busy the server was at most, and the list of requirements, each with
what was measured and whether it is met. --json writes all of it, every round included.

Exit codes: 0 all requirements met; 1 some are not; 2 wrong usage; 3 a client failed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import importlib
import importlib.util
import json
import math
import os
import pty
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Awaitable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

# === Constants ===

THIS_FILE = Path(__file__).resolve()
OURS = THIS_FILE.parent.parent / "online_bench_openai_async.py"
SERVER = THIS_FILE.parent.parent / "demo_server.py"
MODEL = "demo"
PROMPT_WORDS = 32
WARMUP_TOKENS = 8
RANKS = (50.0, 99.0)
CHILD_LIMIT_S = 180.0
SERVER_BUSY_SHARE = 0.8  # above this the server may be what is measured
OTHERS_SHARE = 0.05  # of the client's core, taken by other processes: above this the machine is not idle

STREAMING = {"ttft_ms": 100, "gap_ms": 10}
AT_ONCE = {"ttft_ms": 0, "gap_ms": 0}
SLOW = {"ttft_ms": 200, "gap_ms": 0}

# === Types ===

Figures = Mapping[str, Sequence[float]]  # "ttft", "latency" -> p50, p99 in ms


class Failed(Exception):
    """A client or the server did not do its part."""


@dataclass(frozen=True)
class Case:
    """One situation: the server's character, what is asked of it, and who shares the client's core."""

    key: str
    title: str
    engine: Mapping[str, float]
    streamed: bool
    in_flight: int
    tokens: int
    requests: int
    busy_loops: int = 0
    clients: Optional[Sequence[str]] = None  # None: all

    @property
    def unit(self) -> str:
        return "chunk" if self.streamed else "request"

    def units(self, requests: int) -> int:
        return requests * self.tokens if self.streamed else requests


@dataclass(frozen=True)
class Load:
    """What one client process is asked to do, and the folder for what it writes."""

    api_base: str
    streamed: bool
    in_flight: int
    tokens: int
    requests: int
    folder: Path


@dataclass(frozen=True)
class Findings:
    """What a client reported; `client_bound`: its own doubt, None where it has none or cannot doubt."""

    figures: Figures
    completed: int
    client_bound: Optional[str] = None
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One client process, from start to end."""

    cpu_s: float
    wall_s: float
    findings: Findings
    truth: Figures
    server_share: float
    others_share: float


@dataclass(frozen=True)
class Sample:
    """One client in one round of a case."""

    cost_us: float
    reported: Figures
    truth: Figures
    client_bound: Optional[str]
    notes: Mapping[str, Any]
    server_share: float
    others_share: float

    def error(self, name: str, rank: int) -> float:
        return self.reported[name][rank] - self.truth[name][rank]


@dataclass(frozen=True)
class Place:
    """Cores: None where they cannot be chosen."""

    client: Optional[int]
    server: Optional[int]

    @classmethod
    def here(cls) -> Place:
        if not hasattr(os, "sched_getaffinity"):
            return cls(None, None)
        cores = sorted(os.sched_getaffinity(0))
        return cls(cores[0], cores[-1])


class Check(NamedTuple):
    """A requirement and what was found."""

    text: str
    found: str
    met: bool


# === Numbers (pure) ===


def percentile(values: Sequence[float], rank: float) -> float:
    """Linear interpolation between order statistics.

    >>> percentile([4, 1, 3, 2], 50)
    2.5
    """
    ordered = sorted(values)
    at = (len(ordered) - 1) * rank / 100
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def figures_of(samples: Mapping[str, Sequence[float]]) -> Figures:
    return {name: [percentile(values, rank) for rank in RANKS] for name, values in samples.items() if values}


def median(values: Iterable[float]) -> float:
    return statistics.median(list(values))


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


# === Processes ===


def pinned(command: Sequence[str], core: Optional[int], **options: Any) -> subprocess.Popen[bytes]:
    """Start a process on one core: it inherits the affinity that this thread has for the moment."""
    if core is None:
        return subprocess.Popen(command, **options)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        return subprocess.Popen(command, **options)
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def busy_loops(count: int, core: Optional[int]) -> Iterator[None]:
    """Company on the client's core."""
    loops = [pinned([sys.executable, "-c", "while True: pass"], core) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


class TruthServer:
    """The simulated server in a process of its own; it ends with this one, however that ends."""

    def __init__(self, engine: Mapping[str, float], core: Optional[int]) -> None:
        options = ["--port", "0", "--until-stdin-closes", "--engine", json.dumps(engine)]
        command = [sys.executable, str(SERVER), *options]
        self._process = pinned(command, core, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        assert self._process.stdout is not None
        self.api_base = self._process.stdout.readline().decode().strip()
        if not self.api_base:
            raise Failed("the truth server did not start")

    def __enter__(self) -> TruthServer:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def cpu_s(self) -> float:
        """CPU time so far (Linux; else 0)."""
        try:
            return int(Path(f"/proc/{self._process.pid}/schedstat").read_text().split()[0]) / 1e9
        except (OSError, ValueError, IndexError):
            return 0.0

    def rows(self) -> list[dict[str, Any]]:
        """Every finished request, in order of arrival."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(self.api_base[: -len("/v1")] + "/truth", timeout=30) as response:
            truth = json.load(response)
        return sorted((dict(zip(truth["fields"], row)) for row in truth["requests"]), key=lambda row: row["number"])


def truth_figures(rows: Sequence[Mapping[str, Any]], streamed: bool) -> Figures:
    samples = {"latency": [(row["last_ns"] - row["arrived_ns"]) / 1e6 for row in rows]}
    if streamed:
        samples["ttft"] = [(row["first_ns"] - row["arrived_ns"]) / 1e6 for row in rows]
    return figures_of(samples)


class Terminal:
    """A terminal for a child's stderr, read so that it never blocks: a live line costs what it costs."""

    def __init__(self) -> None:
        self._ours, self.theirs = pty.openpty()
        self._said: list[bytes] = []
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):  # the last writer has gone
            while True:
                self._said.append(os.read(self._ours, 65536))

    def close(self) -> str:
        os.close(self.theirs)
        self._thread.join(timeout=5)
        os.close(self._ours)
        return b"".join(self._said).decode("utf-8", "replace")


def run_child(command: Sequence[str], core: Optional[int], folder: Path) -> tuple[float, float]:
    """(CPU seconds, wall seconds) of a command and of what it waited for. Raises Failed."""
    terminal = Terminal()
    start = time.perf_counter()
    with open(folder / "stdout.txt", "wb") as output:
        child = pinned(command, core, stdout=output, stderr=terminal.theirs, cwd=folder, start_new_session=True)
    alarm = threading.Timer(CHILD_LIMIT_S, os.killpg, (child.pid, signal.SIGKILL))
    alarm.start()
    try:
        _, status, used = os.wait4(child.pid, 0)
    except BaseException:
        os.killpg(child.pid, signal.SIGKILL)
        raise
    finally:
        alarm.cancel()
    wall_s = time.perf_counter() - start
    said = terminal.close()
    child.returncode = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
    if child.returncode:
        raise Failed(f"{Path(command[0]).name} ended with {child.returncode}: {last_words(folder, said)}")
    return used.ru_utime + used.ru_stime, wall_s


def last_words(folder: Path, said: str) -> str:
    lines = (folder / "stdout.txt").read_text(errors="replace").splitlines() + said.splitlines()
    return " | ".join(line.strip() for line in lines[-6:] if line.strip())[-800:]


def busy_s(core: Optional[int]) -> float:
    """Seconds that a core has been busy since the start of the machine (Linux; else 0)."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return 0.0
    ticks = next(([int(item) for item in line.split()[1:]] for line in lines if line.startswith(f"cpu{core} ")), [])
    return (sum(ticks[:8]) - sum(ticks[3:5])) / os.sysconf("SC_CLK_TCK") if ticks else 0.0


# === Reference clients (run in a process of their own, by --client) ===


class Stamps(NamedTuple):
    """One request, in seconds of perf_counter."""

    sent: float
    first: float
    last: float


Ask = Callable[[str, int], Awaitable[Stamps]]  # (prompt, tokens)


def question(load: Load, prompt: str, tokens: int) -> dict[str, Any]:
    """The same fields for every client here, and those that ours sends."""
    body: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], "max_tokens": tokens}
    if load.streamed:
        body.update(stream=True, stream_options={"include_usage": True})
    return {**body, "temperature": 0.0}


@contextlib.asynccontextmanager
async def raw_client(load: Load) -> Any:
    aiohttp = importlib.import_module("aiohttp")
    url = load.api_base + "/chat/completions"

    async def whole(prompt: str, tokens: int) -> Stamps:
        sent = time.perf_counter()
        async with session.post(url, json=question(load, prompt, tokens)) as response:
            json.loads(await response.read())
        now = time.perf_counter()
        return Stamps(sent, now, now)

    async def streamed(prompt: str, tokens: int) -> Stamps:
        first = last = 0.0
        rest = b""
        sent = time.perf_counter()
        async with session.post(url, json=question(load, prompt, tokens)) as response:
            async for data in response.content.iter_any():
                *events, rest = (rest + data).split(b"\n\n")
                for event in events:
                    if event == b"data: [DONE]":
                        continue
                    choices = json.loads(event[len(b"data: ") :])["choices"]
                    if choices and choices[0]["delta"].get("content"):
                        last = time.perf_counter()
                        first = first or last
        return Stamps(sent, first, last)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        yield streamed if load.streamed else whole


@contextlib.asynccontextmanager
async def typed_client(load: Load, http_client: str = "") -> Any:
    openai: Any = importlib.import_module("openai")
    options = {"http_client": getattr(openai, http_client)()} if http_client else {}
    client = openai.AsyncOpenAI(api_key="none", base_url=load.api_base, max_retries=0, **options)
    create = client.chat.completions.create

    async def whole(prompt: str, tokens: int) -> Stamps:
        sent = time.perf_counter()
        await create(**question(load, prompt, tokens))
        now = time.perf_counter()
        return Stamps(sent, now, now)

    async def streamed(prompt: str, tokens: int) -> Stamps:
        first = last = 0.0
        sent = time.perf_counter()
        async for chunk in await create(**question(load, prompt, tokens)):
            if chunk.choices and chunk.choices[0].delta.content:
                last = time.perf_counter()
                first = first or last
        return Stamps(sent, first, last)

    async with client:
        yield streamed if load.streamed else whole


REFERENCES: Mapping[str, Callable[[Load], Any]] = {
    "raw": raw_client,
    "typed": typed_client,
    "typed-aiohttp": lambda load: typed_client(load, "DefaultAioHttpClient"),
}


async def reference_main(key: str, load: Load) -> None:
    """Warm up, keep `in_flight` requests going, write down what was seen."""
    filler = " word" * (PROMPT_WORDS - 1)
    async with REFERENCES[key](load) as ask:
        await gather_all(ask, [f"{number}{filler}" for number in range(load.in_flight)], load.in_flight, WARMUP_TOKENS)
        prompts = [f"{number}{filler}" for number in range(load.requests)]
        stamps = await gather_all(ask, prompts, load.in_flight, load.tokens)
    samples = {"latency": [(item.last - item.sent) * 1e3 for item in stamps]}
    if load.streamed:
        samples["ttft"] = [(item.first - item.sent) * 1e3 for item in stamps]
    (load.folder / "samples.json").write_text(json.dumps(samples))


async def gather_all(ask: Ask, prompts: Sequence[str], in_flight: int, tokens: int) -> list[Stamps]:
    waiting = iter(prompts)
    stamps: list[Stamps] = []

    async def work() -> None:
        for prompt in waiting:
            stamps.append(await ask(prompt, tokens))

    await asyncio.gather(*(work() for _ in range(min(in_flight, len(prompts)))))
    return stamps


def run_reference(key: str, load: Load) -> int:
    uvloop: Any = importlib.import_module("uvloop")
    loop = uvloop.new_event_loop()
    loop.run_until_complete(reference_main(key, load))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()
    return 0


# === The table of clients ===


@dataclass(frozen=True)
class Programs:
    """Where programs that are not ours are, by the client's key, and a tokenizer for them."""

    paths: Mapping[str, Optional[str]]
    tokenizer: Optional[str]


@dataclass(frozen=True)
class Client:
    """A way to make a case's requests: why it cannot here (empty: it can), its command, what it reported."""

    label: str
    missing: Callable[[Programs], str]
    command: Callable[[Programs, Load], list[str]]
    read: Callable[[Path], Findings]


def needs_modules(*names: str) -> Callable[[Programs], str]:
    def missing(_: Programs) -> str:
        absent = [name for name in names if importlib.util.find_spec(name) is None]
        return f"pip install {' '.join(absent)}" if absent else ""

    return missing


def needs_program(key: str) -> Callable[[Programs], str]:
    def missing(programs: Programs) -> str:
        if not programs.paths.get(key):
            return f"no {key} on the PATH and none named by --{key}"
        return "" if programs.tokenizer else "--tokenizer DIR is missing"

    return missing


def needs_file(key: str) -> Callable[[Programs], str]:
    return lambda programs: "" if programs.paths.get(key) else f"no file named by --{key}"


QUIET = ("--server-metrics", "off", "--gpu-metrics", "off")  # as the others run


def ours_options(load: Load) -> list[str]:
    sizes = {
        "--concurrency": load.in_flight,
        "--total-requests": load.requests,
        "--warmup": load.in_flight,
        "--output-tokens": load.tokens,
        "--prompt-tokens": PROMPT_WORDS,
        "--results-csv": load.folder / "rows.csv",
        "--summary-jsonl": load.folder / "summary.jsonl",
    }
    options = [str(part) for pair in sizes.items() for part in pair] + ["--stream"] * load.streamed
    return ["--api-base", load.api_base, "--model", MODEL, *options]


def ours_command(_: Programs, load: Load) -> list[str]:
    return [sys.executable, str(OURS), *ours_options(load), *QUIET]


def metrics_command(_: Programs, load: Load) -> list[str]:
    return [sys.executable, str(OURS), *ours_options(load)]


def alone_command(_: Programs, load: Load) -> list[str]:
    """As after `pip install openai` and nothing else: httptools and uvloop are hidden."""
    hide = "import runpy, sys; sys.modules.update(httptools=None, uvloop=None); del sys.argv[0]"
    return [
        sys.executable,
        "-c",
        f"{hide}; runpy.run_path(sys.argv[0], run_name='__main__')",
        str(OURS),
        *ours_options(load),
        *QUIET,
    ]


def other_command(programs: Programs, load: Load) -> list[str]:
    return [sys.executable, str(programs.paths["other"]), *ours_options(load)]


def ours_read(folder: Path) -> Findings:
    summary = json.loads((folder / "summary.jsonl").read_text())
    names = {"ttft": "ttft_ms", "latency": "e2el_ms"}
    found = {name: [summary[f"p{rank:g}_{key}"] for rank in RANKS] for name, key in names.items()}
    health = summary["client"][0]
    notes = {key: summary[key] for key in ("kernel_stamped_share", "merged_read_share", "new_connections")}
    notes.update({key: health[key] for key in ("cpu_s", "wall_s", "waiting_s", "lag_p99_ms", "gc_pause_ms")})
    figures = {name: values for name, values in found.items() if None not in values}
    return Findings(figures, summary["completed"], summary["client_bound"] or None, notes)


def reference_command(key: str) -> Callable[[Programs, Load], list[str]]:
    def command(_: Programs, load: Load) -> list[str]:
        order = {**dataclasses.asdict(load), "folder": str(load.folder)}
        return [sys.executable, str(THIS_FILE), "--client", key, "--load", json.dumps(order)]

    return command


def reference_read(folder: Path) -> Findings:
    samples = json.loads((folder / "samples.json").read_text())
    return Findings(figures_of(samples), len(samples["latency"]))


def vllm_command(programs: Programs, load: Load) -> list[str]:
    options = {
        "--backend": "openai-chat",
        "--base-url": load.api_base[: -len("/v1")],
        "--endpoint": "/v1/chat/completions",
        "--model": MODEL,
        "--tokenizer": programs.tokenizer,
        "--dataset-name": "random",
        "--random-input-len": PROMPT_WORDS,
        "--random-output-len": load.tokens,
        "--num-prompts": load.requests,
        "--num-warmups": load.in_flight,
        "--max-concurrency": load.in_flight,
        "--percentile-metrics": "ttft,e2el",
        "--metric-percentiles": ",".join(f"{rank:g}" for rank in RANKS),
        "--result-dir": load.folder,
        "--result-filename": "result.json",
    }
    parts = [str(part) for pair in options.items() for part in pair]
    return [str(programs.paths["vllm"]), "bench", "serve", *parts, "--save-result"]


def vllm_read(folder: Path) -> Findings:
    result = json.loads((folder / "result.json").read_text())
    names = {"ttft": "ttft_ms", "latency": "e2el_ms"}
    figures = {name: [result[f"p{rank:g}_{key}"] for rank in RANKS] for name, key in names.items()}
    return Findings(figures, result["completed"])


def guidellm_command(programs: Programs, load: Load) -> list[str]:
    def fields(values: Mapping[str, Any]) -> str:
        return ",".join(f"{name}={value}" for name, value in values.items())

    base = load.api_base[: -len("/v1")]
    options = {
        "--backend": fields({"kind": "openai_http", "target": base, "model": MODEL, "stream": load.streamed}),
        "--profile": fields({"kind": "concurrent", "streams": load.in_flight}),
        "--constraint": fields({"kind": "max_requests", "count": load.requests}),
        "--tokenizer": fields({"kind": "huggingface_auto", "model": programs.tokenizer}),
        "--data": fields({"kind": "synthetic_text", "prompt_tokens": PROMPT_WORDS, "output_tokens": load.tokens}),
        "--output": fields({"kind": "json", "path": load.folder / "result.json"}),
    }
    parts = [str(part) for pair in options.items() for part in pair]
    return [str(programs.paths["guidellm"]), "run", *parts]


def guidellm_read(folder: Path) -> Findings:
    result = json.loads((folder / "result.json").read_text())
    requests = result["benchmarks"][0]["requests"]["successful"]
    samples = {
        "ttft": [item["time_to_first_token_ms"] for item in requests if item["time_to_first_token_ms"]],
        "latency": [item["request_latency"] * 1e3 for item in requests],
    }
    return Findings(figures_of(samples), len(requests))


def aiperf_command(programs: Programs, load: Load) -> list[str]:
    options = {
        "--model": MODEL,
        "--url": load.api_base[: -len("/v1")],
        "--endpoint-type": "chat",
        "--tokenizer": programs.tokenizer,
        "--concurrency": load.in_flight,
        "--request-count": load.requests,
        "--warmup-request-count": load.in_flight,
        "--num-dataset-entries": load.in_flight,
        "--synthetic-input-tokens-mean": PROMPT_WORDS,
        "--output-tokens-mean": load.tokens,
        "--output-artifact-dir": load.folder / "aiperf",
        "--ui": "none",
    }
    parts = [str(part) for pair in options.items() for part in pair] + ["--streaming"] * load.streamed
    return [str(programs.paths["aiperf"]), "profile", *parts, "--no-server-metrics", "--no-gpu-telemetry"]


def aiperf_read(folder: Path) -> Findings:
    result = json.loads((folder / "aiperf" / "profile_export_aiperf.json").read_text())
    names = {"ttft": "time_to_first_token", "latency": "request_latency"}
    figures = {name: [result[key][f"p{rank:g}"] for rank in RANKS] for name, key in names.items() if result.get(key)}
    return Findings(figures, int(result["request_count"]["avg"]))


AIOHTTP = ("aiohttp", "uvloop")
SDK = ("openai", "uvloop")

CLIENTS: Mapping[str, Client] = {
    "ours": Client("this benchmark", needs_modules("openai", "httptools", "uvloop"), ours_command, ours_read),
    "alone": Client("this, openai alone", needs_modules("openai"), alone_command, ours_read),
    "metrics": Client("this, and /metrics", needs_modules("openai", "httptools", "uvloop"), metrics_command, ours_read),
    "other": Client("its other version", needs_file("other"), other_command, ours_read),
    "raw": Client("raw aiohttp", needs_modules(*AIOHTTP), reference_command("raw"), reference_read),
    "typed": Client("typed SDK", needs_modules(*SDK), reference_command("typed"), reference_read),
    "typed-aiohttp": Client(
        "typed SDK, aiohttp", needs_modules(*SDK, "aiohttp"), reference_command("typed-aiohttp"), reference_read
    ),
    "vllm": Client("vllm bench serve", needs_program("vllm"), vllm_command, vllm_read),
    "guidellm": Client("guidellm", needs_program("guidellm"), guidellm_command, guidellm_read),
    "aiperf": Client("aiperf", needs_program("aiperf"), aiperf_command, aiperf_read),
}
PROGRAMS = ("vllm", "guidellm", "aiperf")

# === Cases ===


def streamed_case(in_flight: int, tokens: int, waves: int) -> Case:
    title = f"{in_flight} streams of {tokens} tokens at 100 tokens/s each"
    return Case(f"{in_flight}x{tokens}", title, STREAMING, True, in_flight, tokens, in_flight * waves)


CASES: Sequence[Case] = (
    streamed_case(128, 100, 8),
    streamed_case(128, 200, 3),
    streamed_case(256, 100, 3),
    streamed_case(256, 200, 2),
    streamed_case(512, 100, 2),
    streamed_case(512, 200, 2),
    streamed_case(1000, 100, 2),
    Case("starved", "256 streams of 100 tokens, a busy loop on the core", STREAMING, True, 256, 100, 768, 1, ("ours",)),
    Case("64-at-once", "64 whole requests in flight, answered at once", AT_ONCE, False, 64, 16, 4096),
    Case("256-at-200ms", "256 whole requests in flight, answered after 200 ms", SLOW, False, 256, 16, 2560),
)
QUICK_CASES = ("128x100", "512x200", "64-at-once", "256-at-200ms")
QUICK_CLIENTS = ("ours", "raw", "typed")


def shorter(case: Case) -> Case:
    return dataclasses.replace(case, requests=max(case.in_flight, case.requests // 4))


# --- for --verdict: loads that leave the client at ease, and loads that cannot ---

MODEST: Sequence[Case] = (
    Case("16x50", "16 streams", STREAMING, True, 16, 50, 32),
    Case("64x50", "64 streams", STREAMING, True, 64, 50, 128),
    Case("16-at-200ms", "16 whole requests in flight at 200 ms", SLOW, False, 16, 16, 96),
    Case("64-at-200ms", "64 whole requests in flight at 200 ms", SLOW, False, 64, 16, 384),
)
STARVED: Sequence[Case] = (
    Case("256x100+1", "256 streams, one busy loop", STREAMING, True, 256, 100, 512, 1),
    Case("128x50+2", "128 streams, two busy loops", STREAMING, True, 128, 50, 256, 2),
    Case(
        "64-at-once+1", "64 whole requests in flight answered at once, one busy loop", AT_ONCE, False, 64, 16, 1024, 1
    ),
    Case("256-at-200ms+2", "256 whole requests in flight at 200 ms, two busy loops", SLOW, False, 256, 16, 1024, 2),
)
MODEST_RUNS, STARVED_RUNS = 50, 20
TRIES_PER_RUN = 3  # a run beside which others used the core says nothing of an idle machine


# === Measuring ===


@dataclass(frozen=True)
class Bench:
    """Everything a measurement needs but the case and the client."""

    place: Place
    programs: Programs
    rounds: int


def run_client(bench: Bench, case: Case, server: TruthServer, order: tuple[str, int]) -> Run:
    """One process of a client (its key, the number of measured requests). Raises Failed."""
    key, requests = order
    client = CLIENTS[key]
    known = len(server.rows())
    with tempfile.TemporaryDirectory() as name:
        load = Load(server.api_base, case.streamed, case.in_flight, case.tokens, requests, Path(name))
        before_s, core_s = server.cpu_s(), busy_s(bench.place.client)
        cpu_s, wall_s = run_child(client.command(bench.programs, load), bench.place.client, load.folder)
        server_s, core_s = server.cpu_s() - before_s, busy_s(bench.place.client) - core_s
        findings = client.read(load.folder)
    if findings.completed != requests:
        raise Failed(f"{client.label}: {findings.completed} of {requests} requests succeeded")
    rows = server.rows()
    truth = truth_figures(rows[-requests:], case.streamed)
    span_s = (max(row["last_ns"] for row in rows[known:]) - rows[known]["arrived_ns"]) / 1e9
    return Run(
        cpu_s=cpu_s,
        wall_s=wall_s,
        findings=findings,
        truth=truth,
        server_share=server_s / span_s if span_s else 0.0,
        others_share=max(0.0, core_s - cpu_s) / wall_s,
    )


def samples_of(case: Case, pairs: Sequence[tuple[Run, Run]]) -> list[Sample]:
    """Rounds of (start alone, everything); the start's cost is the median over the rounds, for it varies less."""
    start_s = median(start.cpu_s for start, _ in pairs) if pairs else 0.0
    units = case.units(case.requests) - case.units(1)
    return [
        Sample(
            cost_us=(run.cpu_s - start_s) / units * 1e6,
            reported=run.findings.figures,
            truth=run.truth,
            client_bound=run.findings.client_bound,
            notes={**run.findings.notes, "start_cpu_s": start.cpu_s, "run_cpu_s": run.cpu_s, "run_wall_s": run.wall_s},
            server_share=run.server_share,
            others_share=run.others_share,
        )
        for start, run in pairs
    ]


def measure_case(bench: Bench, case: Case, keys: Sequence[str]) -> dict[str, list[Sample]]:
    """Clients take turns; who begins changes from round to round. A client that fails is left out, and named."""
    pairs: dict[str, list[tuple[Run, Run]]] = {key: [] for key in keys}
    failed: set[str] = set()
    with TruthServer(case.engine, bench.place.server) as server, busy_loops(case.busy_loops, bench.place.client):
        for number in range(bench.rounds):
            turn = number % len(keys)
            for key in (*keys[turn:], *keys[:turn]):
                if key in failed:
                    continue
                note(f"{case.key}: round {number + 1} of {bench.rounds}, {CLIENTS[key].label}")
                try:
                    start = run_client(bench, case, server, (key, 1))
                    pairs[key].append((start, run_client(bench, case, server, (key, case.requests))))
                except (Failed, OSError, ValueError, KeyError) as error:
                    note(f"{case.key}: {CLIENTS[key].label} failed: {type(error).__name__}: {error}")
                    failed.add(key)
    return {key: samples_of(case, taken) for key, taken in pairs.items() if taken and key not in failed}


def note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# === Reporting (pure) ===

Results = Mapping[str, Mapping[str, Sequence[Sample]]]  # case -> client -> a sample per round


def cost_ratio(samples: Mapping[str, Sequence[Sample]], key: str, other: str) -> Optional[float]:
    """The median of the rounds' ratios; None where one of the two did not run."""
    if not samples.get(key) or not samples.get(other):
        return None
    return median(mine.cost_us / theirs.cost_us for mine, theirs in zip(samples[key], samples[other]))


def middle(samples: Sequence[Sample], name: str, rank: int) -> str:
    """`reported / true`, medians of the rounds."""
    if any(name not in sample.reported for sample in samples):
        return "-"
    reported = median(sample.reported[name][rank] for sample in samples)
    return f"{reported:.2f} / {median(sample.truth[name][rank] for sample in samples):.2f}"


def case_table(case: Case, samples: Mapping[str, Sequence[Sample]]) -> str:
    names = ("ttft", "latency") if case.streamed else ("latency",)
    columns = [(name, rank) for name in names for rank in range(len(RANKS))]
    heads = [f"{'TTFT' if name == 'ttft' else name} p{RANKS[rank]:g} / true, ms" for name, rank in columns]
    rows = [["", f"CPU us/{case.unit}", "to raw", "to typed", *heads, "client-bound"]]
    for key, taken in samples.items():
        ratios = (cost_ratio(samples, key, other) for other in ("raw", "typed"))
        said = sum(sample.client_bound is not None for sample in taken)
        rows.append(
            [
                CLIENTS[key].label,
                f"{median(sample.cost_us for sample in taken):.1f}",
                *("-" if ratio is None else f"{ratio:.3f}" for ratio in ratios),
                *(middle(taken, name, rank) for name, rank in columns),
                f"{said} of {len(taken)}" if key == "ours" else "-",
            ]
        )
    busiest = max(sample.server_share for taken in samples.values() for sample in taken)
    judged = "never the bottleneck" if busiest < SERVER_BUSY_SHARE else "perhaps the bottleneck"
    others = median(sample.others_share for taken in samples.values() for sample in taken)
    foot = f"server: {busiest:.0%} of its core at most, {judged}; other processes: {others:.0%} of the client's core"
    return f"{case.title}\n{table(rows)}\n{foot}"


# --- the requirements: what must hold for a case, by its key ---


def truth_check(
    name: str, rank: int, floor_ms: float, share: float, key: str = "ours"
) -> Callable[[Case, Any], Optional[Check]]:
    """Reported against true: within `floor_ms`, or within a share of the true figure."""

    def check(case: Case, samples: Mapping[str, Sequence[Sample]]) -> Optional[Check]:
        if key not in samples:
            return None
        taken = [sample for sample in samples[key] if name in sample.reported]
        if not taken:  # every one was read late
            return Check(f"{case.key}: {name} p{RANKS[rank]:g}", "not measured", False)
        error = median(sample.error(name, rank) for sample in taken)
        allowed = max(floor_ms, share * median(sample.truth[name][rank] for sample in taken))
        who = "" if key == "ours" else f" ({CLIENTS[key].label})"
        text = f"{case.key}: {name} p{RANKS[rank]:g} within {allowed:.2f} ms of the server's{who}"
        return Check(text, f"{error:+.2f} ms", abs(error) <= allowed)

    return check


def ratio_check(other: str, limit: float) -> Callable[[Case, Any], Optional[Check]]:
    def check(case: Case, samples: Mapping[str, Sequence[Sample]]) -> Optional[Check]:
        ratio = cost_ratio(samples, "ours", other)
        if ratio is None:
            return None
        text = f"{case.key}: CPU per {case.unit} at most {limit:.3f} of {CLIENTS[other].label}"
        return Check(text, f"{ratio:.3f}", ratio <= limit)

    return check


def reported_check(limit_ms: float) -> Callable[[Case, Any], Optional[Check]]:
    def check(case: Case, samples: Mapping[str, Sequence[Sample]]) -> Optional[Check]:
        if "ours" not in samples:
            return None
        found = median(sample.reported["latency"][0] for sample in samples["ours"])
        return Check(f"{case.key}: latency p50 reported below {limit_ms:g} ms", f"{found:.3f} ms", found < limit_ms)

    return check


def merged_check(limit: float) -> Callable[[Case, Any], Optional[Check]]:
    """Reads that held more than one chunk, of all content reads."""

    def check(case: Case, samples: Mapping[str, Sequence[Sample]]) -> Optional[Check]:
        if "ours" not in samples:
            return None
        share = median(sample.notes["merged_read_share"] for sample in samples["ours"])
        return Check(f"{case.key}: reads merged below {limit:.0%}", f"{share:.2%}", share < limit)

    return check


def doubt_check(wanted: bool) -> Callable[[Case, Any], Optional[Check]]:
    def check(case: Case, samples: Mapping[str, Sequence[Sample]]) -> Optional[Check]:
        taken = samples.get("ours", ())
        said = sum(sample.client_bound is not None for sample in taken)
        text = f"{case.key}: {'always' if wanted else 'never'} said to be client-bound"
        return Check(text, f"{said} of {len(taken)}", said == (len(taken) if wanted else 0)) if taken else None

    return check


LATENCY_CHECKS = (truth_check("latency", 0, 2.0, 0.01), truth_check("latency", 1, 2.0, 0.01))
STREAM_CHECKS = (truth_check("ttft", 0, 1.0, 0.01), truth_check("ttft", 1, 1.0, 0.01), *LATENCY_CHECKS)
CROWD_CHECKS = (truth_check("ttft", 0, 0.5, 0.0), truth_check("ttft", 1, 1.0, 0.0), *LATENCY_CHECKS)
THOUSAND_CHECKS = (truth_check("ttft", 0, 0.5, 0.0), truth_check("ttft", 1, 5.0, 0.0), *LATENCY_CHECKS)
WHOLE_COST_CHECKS = (ratio_check("typed", 1 / 3), ratio_check("raw", 3.5))

REQUIREMENTS: Mapping[str, Sequence[Callable[[Case, Any], Optional[Check]]]] = {
    "128x100": (*STREAM_CHECKS, truth_check("ttft", 1, 1.0, 0.01, "metrics"), ratio_check("raw", 0.8)),
    "128x200": STREAM_CHECKS,
    "256x100": (*CROWD_CHECKS, merged_check(0.03)),
    "256x200": (*CROWD_CHECKS, merged_check(0.03)),
    "512x100": CROWD_CHECKS,
    "512x200": (*CROWD_CHECKS, merged_check(0.03), ratio_check("raw", 0.45), ratio_check("typed", 1 / 8)),
    "1000x100": (*THOUSAND_CHECKS, merged_check(0.03)),
    "starved": (*STREAM_CHECKS, doubt_check(True)),
    "64-at-once": (reported_check(0.5), *WHOLE_COST_CHECKS),
    "256-at-200ms": (truth_check("latency", 0, 0.5, 0.0), truth_check("latency", 1, 2.0, 0.0), *WHOLE_COST_CHECKS),
}


def checks_of(cases: Sequence[Case], results: Results) -> list[Check]:
    found = [rule(case, results[case.key]) for case in cases for rule in REQUIREMENTS[case.key]]
    return [check for check in found if check]


def checks_text(checks: Sequence[Check]) -> str:
    rows = [["requirement", "found", ""]]
    rows += [[check.text, check.found, "met" if check.met else "NOT MET"] for check in checks]
    return table(rows)


# === Modes ===


def cost_mode(bench: Bench, cases: Sequence[Case], keys: Sequence[str]) -> tuple[list[Check], dict[str, Any]]:
    """All cases by all clients. Raises Failed when ours fails."""
    results: dict[str, dict[str, list[Sample]]] = {}
    tables: list[str] = []
    for case in cases:
        taking_part = [key for key in keys if case.clients is None or key in case.clients]
        if not taking_part:
            results[case.key] = {}
            continue
        results[case.key] = measure_case(bench, case, taking_part)
        if "ours" in taking_part and "ours" not in results[case.key]:
            raise Failed(f"{case.key}: this benchmark failed")
        if results[case.key]:
            shown = case_table(case, results[case.key])
            print(f"\n{shown}", flush=True)
            tables.append(f"```\n{shown}\n```\n")
    plain = {
        case: {key: [dataclasses.asdict(sample) for sample in taken] for key, taken in samples.items()}
        for case, samples in results.items()
    }
    return checks_of(cases, results), {"cases": plain, "tables": tables}


def verdict_mode(bench: Bench) -> tuple[list[Check], dict[str, Any]]:
    """Modest runs must not be called client-bound; starved ones must."""
    groups = (("modest", MODEST, MODEST_RUNS, False), ("starved", STARVED, STARVED_RUNS, True))
    checks: list[Check] = []
    told: dict[str, Any] = {}
    for name, cases, runs, wanted in groups:
        verdicts = [doubt for case in cases for doubt in verdicts_on(bench, case, share_of(runs, cases, case))]
        counted = [doubt for doubt in verdicts if doubt["counted"]]
        wrong = [doubt for doubt in counted if (doubt["client_bound"] is not None) != wanted]
        said = sum(doubt["client_bound"] is not None for doubt in counted)
        told[name] = verdicts
        text = f"{runs} {name} runs: {'always' if wanted else 'never'} said to be client-bound"
        found = f"{said} of {len(counted)}, {len(verdicts) - len(counted)} not counted"
        checks.append(Check(text, found, not wrong and len(counted) == runs))
        for doubt in wrong:
            print(f"wrong: {doubt['case']}: {doubt['client_bound'] or 'said not to be the bottleneck'}")
    return checks, {"verdicts": told}


def share_of(runs: int, cases: Sequence[Case], case: Case) -> int:
    at = list(cases).index(case)
    return runs // len(cases) + (at < runs % len(cases))


def verdicts_on(bench: Bench, case: Case, runs: int) -> list[dict[str, Any]]:
    """Until `runs` count: without company of ours on the core, a run counts only if others kept off it, too."""
    verdicts: list[dict[str, Any]] = []
    counted = 0
    with TruthServer(case.engine, bench.place.server) as server, busy_loops(case.busy_loops, bench.place.client):
        while counted < runs and len(verdicts) < TRIES_PER_RUN * runs:
            note(f"{case.title}: {counted} of {runs}, {len(verdicts) - counted} not counted")
            run = run_client(bench, case, server, ("ours", case.requests))
            counts = bool(case.busy_loops) or run.others_share <= OTHERS_SHARE
            counted += counts
            findings = run.findings
            verdict = {"case": case.key, "counted": counts, "others_share": run.others_share}
            verdicts.append({**verdict, "client_bound": findings.client_bound, **findings.notes})
    return verdicts


# === Command line ===


def parser() -> argparse.ArgumentParser:
    summary = str(__doc__).partition("\n")[0]
    options = argparse.ArgumentParser(description=summary, epilog="The head of the file is the manual.")
    options.add_argument("--quick", action="store_true", help="one round of four cases, three clients")
    options.add_argument("--verdict", action="store_true", help="judge the verdict client-bound instead of the cost")
    options.add_argument("--cases", metavar="A,B", help=f"some of: {', '.join(case.key for case in CASES)}")
    options.add_argument("--clients", metavar="A,B", help=f"some of: {', '.join(CLIENTS)}")
    options.add_argument("--rounds", type=int, metavar="N", help="rounds of each case (3; with --quick 1)")
    options.add_argument("--into", metavar="FILE", help="put the tables between the marks of this Markdown page")
    options.add_argument("--json", metavar="FILE", help="write every figure of every round")
    for key in PROGRAMS:
        options.add_argument(f"--{key}", metavar="PROGRAM", help="its path (from the PATH)")
    options.add_argument("--other", metavar="FILE", help="another version of this benchmark, to lay beside this one")
    options.add_argument("--tokenizer", metavar="DIR", help="a tokenizer's folder, for these programs")
    options.add_argument("--client", choices=tuple(REFERENCES), help=argparse.SUPPRESS)
    options.add_argument("--load", help=argparse.SUPPRESS)
    return options


def put_tables(page: Path, facts: Mapping[str, Any], tables: Sequence[str]) -> None:
    """Replace what stands between the two marks by the tables, with the command and the day."""
    start, end = "<!-- tables -->\n", "<!-- end of tables -->\n"
    text = page.read_text(encoding="utf-8")
    command = " ".join(["python", "benchmarks/client_cost.py", *sys.argv[1:]])
    about = ", ".join(f"{name} {value}" for name, value in facts.items())
    head = f"`{command}` on {time.strftime('%Y-%m-%d')}; {about}.\n\n"
    before, _, rest = text.partition(start)
    page.write_text(
        before + start + "\n" + head + "\n".join(tables) + "\n" + end + rest.partition(end)[2], encoding="utf-8"
    )


def chosen(text: Optional[str], known: Iterable[str], default: Iterable[str]) -> list[str]:
    """Names in the order of `known`. Raises ValueError for one that is not."""
    known = list(known)
    wanted = list(default) if text is None else text.split(",")
    strange = [name for name in wanted if name not in known]
    if strange:
        raise ValueError(f"{', '.join(strange)}: choose from {', '.join(known)}")
    return [name for name in known if name in wanted]


def able(keys: Sequence[str], programs: Programs) -> list[str]:
    """Those that can run here; of the others, why not."""
    for key in keys:
        reason = CLIENTS[key].missing(programs)
        if reason:
            note(f"skipped: {CLIENTS[key].label}: {reason}")
    return [key for key in keys if not CLIENTS[key].missing(programs)]


def about(bench: Bench) -> dict[str, Any]:
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    place = dataclasses.asdict(bench.place)
    return {"python": sys.version.split()[0], "cores": place, "rounds": bench.rounds, "load_average_at_start": load}


def start_bench(options: argparse.Namespace) -> Bench:
    found = {key: getattr(options, key) or shutil.which(key) for key in PROGRAMS}
    found["other"] = options.other
    tokenizer = str(Path(options.tokenizer).resolve()) if options.tokenizer else None
    return Bench(Place.here(), Programs(found, tokenizer), options.rounds or (1 if options.quick else 3))


def main(argv: Optional[Sequence[str]] = None) -> int:
    options = parser().parse_args(argv)
    if options.client:
        order = json.loads(options.load)
        return run_reference(options.client, Load(**{**order, "folder": Path(order["folder"])}))
    bench = start_bench(options)
    try:
        names = chosen(
            options.cases, (case.key for case in CASES), QUICK_CASES if options.quick else (case.key for case in CASES)
        )
        keys = chosen(options.clients, CLIENTS, QUICK_CLIENTS if options.quick else CLIENTS)
    except ValueError as error:
        note(str(error))
        return 2
    facts = about(bench)
    print(" ".join(f"{name}={value}" for name, value in facts.items()), flush=True)
    try:
        if options.verdict:
            checks, details = verdict_mode(bench)
        else:
            cases = [shorter(case) if options.quick else case for case in CASES if case.key in names]
            checks, details = cost_mode(bench, cases, able(keys, bench.programs))
    except Failed as error:
        note(str(error))
        return 3
    print(f"\n{checks_text(checks)}")
    if options.into:
        put_tables(Path(options.into), facts, [*details.get("tables", ()), f"```\n{checks_text(checks)}\n```\n"])
    if options.json:
        told = [check._asdict() for check in checks]
        Path(options.json).write_text(json.dumps({**facts, "requirements": told, **details}, indent=1) + "\n")
    return 0 if all(check.met for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
