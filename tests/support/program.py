"""The benchmark run as a user runs it: to its end, or started, watched and disturbed; or in this process.

- `run_script(...)`: a process of its own, to its end. Where the process matters: streams, environment, `-X dev`.
- `Running(...)`: a process of its own that the test talks to while it runs. For signals, rows on the way, children.
- `cli(...)`: the same command line in this process: a tenth of the cost. Wherever a process is not the point.

All three end in an `Outcome`. Unless told otherwise, they read no metrics page: it costs a process, and a server that
answers by script would take the question for its next request.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Optional

import online_bench_openai_async as bench
from tests.support.processes import children_of, wait_until
from tests.support.tables import fate, rows_of

# A shell that starts the tests in the background has them ignore Ctrl-C, and all that they start as well.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "online_bench_openai_async.py"


@dataclass
class Outcome:
    """A run: its exit code, what it printed, the rows of its CSV in order of index, the seconds it took."""

    code: int
    out: str
    err: str
    rows: list[dict[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def fates(self) -> set[str]:
        return {fate(row) for row in self.rows}


def words_of(**options: Any) -> list[str]:
    """`words_of(total_requests=5, stream=True, seed=None)` is `--total-requests 5 --stream`."""
    words = []
    for name, value in options.items():
        if value is not None and value is not False:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


def alone(words: Sequence[str]) -> list[str]:
    """The same command line, reading no metrics page unless it names one or asks for an interval."""
    quiet = not any(word.startswith(("--server-metrics", "--metrics-interval")) for word in words)
    return [*words, *(["--server-metrics", "off"] if quiet and {"--model", "--demo"} & set(words) else [])]


def results_of(argv: Sequence[str], folder: Optional[Path] = None) -> list[dict[str, str]]:
    """The rows that a command line has left in its --results-csv, in order of index."""
    if "--results-csv" not in argv:
        return []
    path = Path(folder or ".", argv[argv.index("--results-csv") + 1])
    return sorted(rows_of(path), key=lambda row: int(row["index"])) if path.is_file() else []


def run_script(
    *argv: Any,
    env: Optional[Mapping[str, str]] = None,
    cwd: Optional[Path] = None,
    flags: Sequence[str] = (),
    preexec_fn: Optional[Callable[[], Any]] = None,
) -> Outcome:
    """The command line as a process of its own, to its end; `env` is added to ours, `flags` are the interpreter's."""
    words = [str(word) for word in argv]
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, *flags, str(SCRIPT), *alone(words)],
        capture_output=True,
        env={**os.environ, **(env or {})},
        cwd=cwd,
        preexec_fn=preexec_fn,
        timeout=120,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    seconds = time.monotonic() - started
    out, err = (stream.decode("utf-8", "replace") for stream in (done.stdout, done.stderr))
    return Outcome(done.returncode, out, err, results_of(words, cwd), seconds)


def cli(*argv: Any) -> Outcome:
    """The command line in this process: the same code from the parser on."""
    words = [str(word) for word in argv]
    out, err = io.StringIO(), io.StringIO()
    started = time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = bench.main(alone(words))
        except SystemExit as end:  # --help and --version
            code = int(end.code or 0)
    seconds = time.monotonic() - started
    return Outcome(code, out.getvalue(), err.getvalue(), results_of(words), seconds)


class Running:
    """The script in a process of its own, to be looked at, and disturbed, while it runs.

    Its CSV is `folder/rows.csv` and its JSON line `folder/summary.jsonl` where the options name no others.
    """

    def __init__(self, folder: Path, *options: Any, **popen: Any) -> None:
        words = [str(option) for option in options]
        self.jsonl = folder / "summary.jsonl"
        if "--results-csv" not in words:
            words += ["--results-csv", str(folder / "rows.csv")]
        if "--summary-jsonl" not in words:
            words += ["--summary-jsonl", str(self.jsonl)]
        self.words = words
        self.csv = Path(words[words.index("--results-csv") + 1])
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        self.process = subprocess.Popen([sys.executable, str(SCRIPT), *alone(words)], **{**pipes, **popen})

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def children(self) -> list[int]:
        return children_of(self.pid)

    def finished_rows(self) -> int:
        return max(0, self.csv.read_bytes().count(b"\n") - 1) if self.csv.is_file() else 0

    def wait_until(self, condition: Callable[[], Any]) -> None:
        """Until it is so; the program must not end before."""

        def so() -> Any:
            assert self.process.poll() is None, self.outcome()
            return condition()

        wait_until(so)

    def wait_for_rows(self, count: int) -> None:
        """Until so many requests have been finished."""
        self.wait_until(lambda: self.finished_rows() >= count)

    def send(self, name: str, times: int = 1) -> None:
        """A signal, by name, and again after a moment."""
        for _ in range(times):
            self.process.send_signal(getattr(signal, name))
            time.sleep(0.01)

    def outcome(self) -> Outcome:
        """How it ended, once it has."""
        started = time.monotonic()
        try:
            out, err = self.process.communicate(timeout=60)
        finally:
            self.process.kill()
        printed, said = ((stream or b"").decode("utf-8", "replace") for stream in (out, err))
        rows = results_of(self.words)
        return Outcome(self.process.returncode, printed, said, rows, time.monotonic() - started)
