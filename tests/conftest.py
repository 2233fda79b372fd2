"""Fixtures: servers that end with their test. Everything else that tests share is in tests/support/."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Callable

import pytest

from tests.support import program
from tests.support.demo import Demo
from tests.support.server import ScriptedServer


@pytest.fixture
def cli() -> Callable[..., program.Outcome]:
    """The command line in this process."""
    return program.cli


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
def script() -> Iterator[Callable[..., ScriptedServer]]:
    """Starts servers that answer to the byte: `script(says(b"HTTP/1.1 ..."))`."""
    started: list[ScriptedServer] = []

    def start(*scripts: Any, **options: Any) -> ScriptedServer:
        started.append(ScriptedServer(*scripts, **options))
        return started[-1]

    yield start
    for server in started:
        server.stop()
