"""What the tests share: a loop whose time jumps, the simulated server, and the script run as a user runs it."""

from __future__ import annotations

import asyncio
import csv
import dataclasses
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Optional

import pytest

import online_bench_openai_async as bench
from tests.wire import Script

# A shell that starts the tests in the background has them ignore Ctrl-C, and all that they start as well.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "online_bench_openai_async.py"


class _JumpingSelector:
    """Idle time passes at once."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._real = selectors.DefaultSelector()

    def select(self, timeout: Optional[float] = None) -> Any:
        assert timeout is not None, "a virtual loop that waits for nothing would wait for ever"
        self._loop.now += max(0.0, timeout)
        return self._real.select(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_JumpingSelector(self))  # type: ignore[arg-type]

    def time(self) -> float:
        return self.now


def in_virtual_time(main: Any) -> Any:
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(main)
    finally:
        asyncio.set_event_loop(None)
        loop.close()


@dataclass
class Outcome:
    """A run of the script: what it printed and how it ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """The command line in this process: a tenth of a process's cost, the same code from the parser on."""

    def run(*argv: str) -> Outcome:
        capsys.readouterr()
        code = bench.main(list(argv))
        printed = capsys.readouterr()
        return Outcome(code, printed.out, printed.err)

    return run


def run_script(*argv: str, env: Optional[Mapping[str, str]] = None, cwd: Optional[Path] = None) -> Outcome:
    """The command line as a process of its own."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *argv],
        capture_output=True,
        text=True,
        env={**os.environ, **(env or {})},
        cwd=cwd,
        timeout=120,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


class Demo:
    """The simulated server, in a process of its own, and what it knows."""

    def __init__(self, **engine: float) -> None:
        self._process = bench.DemoProcess(json.dumps(engine))
        self.url = self._process.api_base
        self.root = self.url[: -len("/v1")]

    def truth(self) -> dict[str, Any]:
        report = bench.fetch_json(self.root + "/truth", None)
        rows = [dict(zip(report["fields"], row)) for row in report["requests"]]
        return {**report, "requests": rows}

    def stop(self) -> None:
        self._process.stop()


@pytest.fixture
def demo() -> Iterator[Callable[..., Demo]]:
    """Starts simulated servers: `demo(ttft_ms=200, gap_ms=0)`."""
    started: list[Demo] = []

    def start(**engine: float) -> Demo:
        started.append(Demo(**engine))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture
def script() -> Iterator[Callable[..., Script]]:
    started: list[Script] = []

    def start(*answers: Callable[[socket.socket], bool]) -> Script:
        started.append(Script(*answers))
        return started[-1]

    yield start
    for server in started:
        server.stop()


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def make_record(index: int = 0, **changes: Any) -> bench.Record:
    """A success: sent at 1.0 s, first token at 1.1, last at 1.5; 5 tokens."""
    values: dict[str, Any] = {
        "index": index,
        "due_s": None,
        "ready_s": 0.999,
        "sent_s": 1.0,
        "first_s": 1.1,
        "visible_s": 1.1,
        "last_s": 1.5,
        "end_s": 1.6,
        "status": "success",
        "error_kind": "",
        "error": "",
        "http_status": 200,
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "cached_tokens": None,
        "reasoning_tokens": None,
        "has_usage": True,
        "finish_reason": "length",
        "chunks": 5,
        "gaps_ms": (100.0, 100.0, 100.0, 100.0),
        "new_connection": False,
        "reconnects": 0,
        "reads": 5,
        "kernel_reads": 5,
        "content_reads": 5,
        "merged_reads": 0,
    }
    return bench.Record(**{**values, **changes})


def make_config(**changes: Any) -> bench.Config:
    """A configuration as the command line would make it, with changes."""
    options = bench.build_parser().parse_args(["--model", "m", "--api-base", "http://127.0.0.1:9/v1", "--seed", "1"])
    options.api_key = "vllm"
    config = bench.build_config(options, 0)
    return dataclasses.replace(config, **changes)
