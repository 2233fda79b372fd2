"""Runs with short time-outs against a server that misbehaves, checked for what no run may say on its way.

`run(api_base, prompts, ...)` is in this process, `run_as_process(...)` in one of its own, in Python's development
mode, where leaks and lost tasks are said on stderr. Both: 5 requests in flight, no warm-up, unless told otherwise.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

import pytest

import online_bench_openai_async as bench
from tests.support.faults import LIMIT
from tests.support.program import Outcome, cli, run_script, words_of
from tests.support.tables import write_corpus

CONCURRENCY = 5
# Short, and longer where the machine has more to do than it has cores: good replies must not meet them.
BUSY = min(8.0, max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)))
QUIET_S = 0.25 * BUSY  # first byte and idle
TOTAL_S = 0.75 * BUSY
CONNECT_S = 0.5 * BUSY
PATIENT: dict[str, Any] = {  # for servers whose fault needs no limit to end
    "timeout": 30,
    "connect_timeout": 30,
    "first_byte_timeout": None,
    "idle_timeout": None,
}
GOOD_PROMPT = "a good one"
BAD_WORDS = "Traceback|never retrieved|was destroyed|never awaited|ResourceWarning|Unclosed|asyncio:".split("|")

TRANSPORTS = ("stopwatch", "stopwatch-h11", "sdk")


@contextlib.contextmanager
def chosen(transport: str) -> Iterator[str]:
    """The value for --transport; the two parsers of HTTP are told apart by hiding one of them."""
    name, _, parser = transport.partition("-")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "MAX_REPLY_BYTES", LIMIT)
        if parser == "h11":
            patch.setitem(sys.modules, "httptools", None)
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
        "no_progress": True,
    }
    return words_of(**{**settings, **options})


def run(api_base: str, prompts: Optional[Sequence[str]] = None, **options: Any) -> Outcome:
    """The program in this process, all that it wrote kept: rows, streams, and what was logged, as if on stderr."""
    logged = io.StringIO()
    handler = logging.StreamHandler(logged)
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    with tempfile.TemporaryDirectory() as folder:
        if prompts:
            options["requests_file"] = write_corpus(Path(folder, "corpus.jsonl"), prompts)
        options.setdefault("results_csv", Path(folder, "rows.csv"))
        logging.getLogger().addHandler(handler)
        try:
            with contextlib.redirect_stderr(logged):
                outcome = cli(*arguments(api_base, **options))
                gc.collect()
        finally:
            logging.getLogger().removeHandler(handler)
    outcome.err += logged.getvalue()
    return checked(outcome)


def run_as_process(api_base: str, prompts: Sequence[str], *, folder: Path, **options: Any) -> Outcome:
    """The same in a process of its own, and those that it starts, in Python's development mode."""
    corpus = write_corpus(folder / "corpus.jsonl", prompts)
    words = arguments(api_base, requests_file=corpus, results_csv=folder / "rows.csv", **options)
    return checked(run_script(*words, flags=["-X", "dev"], env={"PYTHONDEVMODE": "1"}))


def checked(outcome: Outcome) -> Outcome:
    """The outcome, if nothing on stderr tells of a leak, a lost task or a defect."""
    for word in BAD_WORDS:
        assert word not in outcome.err, outcome.err
    return outcome
