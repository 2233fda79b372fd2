"""Every fault under its right name, no row lost, good requests unharmed, nothing left behind, in time."""

from __future__ import annotations

import contextlib
import csv
import functools
import gc
import io
import json
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import pytest

import online_bench_openai_async as bench
from tests.fault_server import ACTS, DOORS, FAULTS, GROUPS, LIMIT, SUCCESS, Fault, FaultServer, fault_prompt

openai = pytest.importorskip("openai")

REQUESTS = 20  # per fault: every second one is good
CONCURRENCY = 5
QUIET_S = 0.25  # first byte and idle
TOTAL_S = 1.0
CONNECT_S = 0.5
GOOD_PROMPT = "a good one"
BAD_WORDS = (
    "Traceback",
    "never retrieved",
    "was destroyed",
    "never awaited",
    "ResourceWarning",
    "Unclosed",
    "asyncio:",
)

TRANSPORTS = ("stopwatch", "sdk-aiohttp", "sdk-httpx")


def has_aiohttp() -> bool:
    try:
        return type(openai.DefaultAioHttpClient).__name__ != "NoneType" and bool(__import__("aiohttp"))
    except (AttributeError, ImportError):
        return False


@contextlib.contextmanager
def chosen(transport: str) -> Iterator[str]:
    """The value for --transport; the SDK's two clients are told apart by hiding one of them."""
    name, _, client = transport.partition("-")
    if name == "stopwatch" and bench.StopwatchWire.missing():
        pytest.skip(f"the stopwatch needs {bench.StopwatchWire.missing()}")
    if client == "aiohttp" and not has_aiohttp():
        pytest.skip("this environment has no aiohttp, or an openai that does not know it")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "MAX_REPLY_BYTES", LIMIT)
        if client == "httpx":
            patch.setattr(openai, "DefaultAioHttpClient", None, raising=False)
        yield name


def arguments(api_base: str, **options: Any) -> list[str]:
    """A command line with short time-outs; an option of None is left out, one of True has no value."""
    settings = {
        "api_base": api_base,
        "model": "m",
        "concurrency": CONCURRENCY,
        "warmup": 0,
        "timeout": TOTAL_S,
        "connect_timeout": CONNECT_S,
        "first_byte_timeout": QUIET_S,
        "idle_timeout": QUIET_S,
        **options,
    }
    words = []
    for name, value in settings.items():
        if value is not None and value is not False:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


class Outcome(NamedTuple):
    """What one run left behind."""

    code: int
    rows: list[dict[str, str]]
    out: str
    err: str
    seconds: float


def run(api_base: str, prompts: Optional[Sequence[str]] = None, **options: Any) -> Outcome:
    """The program in this process, all that it wrote kept: rows in order of index, streams, logs."""
    out, err = io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(err)
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    with tempfile.TemporaryDirectory() as folder:
        if prompts:
            options["requests_file"] = Path(folder, "corpus.jsonl")
            options["requests_file"].write_text("".join(json.dumps({"text": prompt}) + "\n" for prompt in prompts))
        options.setdefault("results_csv", Path(folder, "rows.csv"))
        logging.getLogger().addHandler(handler)
        started = time.monotonic()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = bench.main(arguments(api_base, no_progress=True, **options))
                seconds = time.monotonic() - started
                gc.collect()
        finally:
            logging.getLogger().removeHandler(handler)
        rows = rows_of(options["results_csv"])
    for word in BAD_WORDS:
        assert word not in err.getvalue(), err.getvalue()
    return Outcome(code, sorted(rows, key=lambda row: int(row["index"])), out.getvalue(), err.getvalue(), seconds)


def rows_of(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def fate(row: dict[str, str]) -> str:
    return f"{row['status']}/{row['error_kind']}"


def readings(fault: Fault, transport: str, streamed: bool) -> set[str]:
    wanted = fault.stream if streamed else fault.whole
    if transport != "stopwatch" and fault.sdk:
        wanted += f"|{fault.sdk}"
    return set(wanted.split("|"))


def faults_of(group: str, streamed: bool, transport: str) -> list[str]:
    return [
        name
        for name, fault in GROUPS[group].items()
        if (fault.stream if streamed else fault.whole) and not (fault.spoils and transport != "stopwatch")
    ]


class GroupRun(NamedTuple):
    outcome: Outcome
    seen: Counter[str]
    left_open: int
    rows_of: dict[str, list[dict[str, str]]]  # name of the fault -> its rows


@functools.lru_cache(maxsize=None)
def tried(group: str, streamed: bool, transport: str) -> Any:
    """The run, or why there is none: a broken one is not to be repeated for each of its faults."""
    try:
        return group_run(group, streamed, transport)
    except Exception as error:
        return error


def run_of(group: str, streamed: bool, transport: str) -> GroupRun:
    outcome = tried(group, streamed, transport)
    if isinstance(outcome, Exception):
        raise outcome
    assert isinstance(outcome, GroupRun)
    return outcome


def group_run(group: str, streamed: bool, transport: str, processes: int = 1) -> GroupRun:
    """All faults of a group in one run: 20 requests for each, good and bad by turns, 5 in flight."""
    names = faults_of(group, streamed, transport)
    prompts = [prompt for name in names for prompt in (GOOD_PROMPT, fault_prompt(name)) * (REQUESTS // 2)]
    with chosen(transport) as value, FaultServer(ACTS) as server:
        options = {"stream": streamed, "transport": value, "processes": processes}
        outcome = run(server.api_base, prompts, **options)
        left = server.left_open()
        seen = Counter(server.seen)
    rows: dict[str, list[dict[str, str]]] = {"good": []}
    for row in outcome.rows:
        at = int(row["index"])
        rows.setdefault(names[at // REQUESTS] if at % 2 else "good", []).append(row)
    return GroupRun(outcome, seen, left, rows)


RUNS = [
    pytest.param(group, streamed, transport, id=f"{group}-{'stream' if streamed else 'whole'}-{transport}")
    for group in GROUPS
    for streamed in (False, True)
    for transport in TRANSPORTS
    if faults_of(group, streamed, transport)
]
CASES = [
    pytest.param(group, streamed, transport, name, id=f"{name}-{'stream' if streamed else 'whole'}-{transport}")
    for group in GROUPS
    for streamed in (False, True)
    for transport in TRANSPORTS
    for name in faults_of(group, streamed, transport)
]


def test_the_table_holds_what_was_promised() -> None:
    assert len(FAULTS) + len(DOORS) >= 60


@pytest.mark.parametrize(("group", "streamed", "transport", "name"), CASES)
def test_fault(group: str, streamed: bool, transport: str, name: str) -> None:
    rows = run_of(group, streamed, transport).rows_of[name]
    assert len(rows) == REQUESTS // 2
    assert {fate(row) for row in rows} <= readings(FAULTS[name], transport, streamed), rows[0]
    assert all(bool(row["error"]) == (row["status"] != "success") for row in rows)
    assert all(bool(row["latency_ms"]) == (row["status"] == "success") for row in rows)


@pytest.mark.parametrize(("group", "streamed", "transport"), RUNS)
def test_good_requests_are_unharmed(group: str, streamed: bool, transport: str) -> None:
    got = run_of(group, streamed, transport)
    good = got.rows_of["good"]
    assert {fate(row) for row in good} == {SUCCESS}
    assert {(row["prompt_tokens"], row["completion_tokens"], row["finish_reason"]) for row in good} == {
        ("7", "3", "stop")
    }
    assert len(good) == len(got.outcome.rows) / 2
    assert got.seen["good"] == len(good)
    assert got.outcome.code == 0


@pytest.mark.parametrize(("group", "streamed", "transport"), RUNS)
def test_nothing_is_left_behind_and_time_is_bounded(group: str, streamed: bool, transport: str) -> None:
    got = run_of(group, streamed, transport)
    indices = [int(row["index"]) for row in got.outcome.rows]
    assert indices == list(range(REQUESTS * len(faults_of(group, streamed, transport))))
    assert got.left_open == 0
    assert got.outcome.seconds < len(indices) / CONCURRENCY * (TOTAL_S + CONNECT_S)
