"""Locust as a user runs it: processes in a directory of their own, and a server that knows what they sent."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import types
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import free_port, wait_until
from tests.support.program import ROOT
from tests.support.tables import rows_of, write_corpus

SCRIPT = ROOT / "locust_batch.py"
SERVER = Path(__file__).resolve().parent / "locust_server.py"
WAIT_S = 50

needs_locust = pytest.mark.skipif(importlib.util.find_spec("locust") is None, reason="locust is not installed")


class LocustServer:
    """tests/support/locust_server.py in a process of its own, and the latest truth it told."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, str(SERVER), *arguments]
        pipe = subprocess.PIPE
        self.process: Any = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self.url = f"http://127.0.0.1:{int(next(iter(self.process.stdout or ())))}"

    def ask(self, what: str) -> Any:
        with urllib.request.urlopen(f"{self.url}/{what}", timeout=WAIT_S) as reply:
            return json.load(reply)

    def truth(self) -> Any:
        return self.ask("truth")

    def wait_for(self, requests: int) -> None:
        wait_until(lambda: sum(self.truth()["texts"].values()) >= requests, WAIT_S, pause_s=0.05)

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait(WAIT_S)
        self.process.stdout.close()


class Bench:
    """A directory with a corpus, and Locust processes started in it."""

    command = ("-m", "locust", "-f", str(SCRIPT))

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results = path / "out" / "results.csv"
        self.started: list[Any] = []

    def corpus(self, texts: Any) -> None:
        write_corpus(self.path / "requests.jsonl", texts)

    def start(self, *arguments: Any, **environment: str) -> Any:
        home = {name: value for name, value in os.environ.items() if "PROXY" not in name.upper()}
        number = len(self.started)
        with (self.path / f"{number}.out").open("wb") as out, (self.path / f"{number}.err").open("wb") as err:
            process = subprocess.Popen(
                [sys.executable, *self.command, *map(str, arguments)],
                cwd=self.path,
                env={**home, "RESULTS_CSV": str(self.results), **environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )
        self.started.append(process)
        return process

    def finish(self, process: Any) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)"""
        code = process.wait(WAIT_S)
        number = self.started.index(process)
        out, err = ((self.path / f"{number}.{name}").read_text("utf-8") for name in ("out", "err"))
        return code, out, err

    def run(self, server: Any, users: int, *arguments: Any, **environment: str) -> tuple[int, str, str]:
        load = ("--headless", "--host", server.url, "-u", users, "-r", users)
        return self.finish(self.start(*load, *arguments, **environment))

    def rows(self) -> list[dict[str, str]]:
        return rows_of(self.results)

    def close(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.kill()
                process.wait()


def forked(processes: Any) -> tuple[Any, ...]:
    """The options of a run in so many forked workers, on a port of their own."""
    port = free_port()
    return "--processes", processes, "--master-bind-port", port, "--master-port", port


# --- The script without Locust ---


class Anything:
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()

    def __call__(self, *args, **kwargs):
        return self


def stand_ins() -> dict[str, Any]:
    contents: dict[str, dict[str, Any]] = {
        "locust": {"User": type("User", (), {}), "constant": Anything(), "events": Anything()},
        "locust.argument_parser": {"get_parser": Anything()},
        "locust.exception": {"RPCError": Exception, "StopUser": Exception},
        "locust.runners": {"MasterRunner": Anything, "WorkerRunner": Anything, "WORKER_REPORT_INTERVAL": 3.0},
        "locust.stats": {"CSV_STATS_INTERVAL_SEC": 1},
        "gevent": {name: type(name, (BaseException,), {}) for name in ("GreenletExit", "Timeout")},
        "gevent.socket": {},
        "gevent.ssl": {},
        "gevent.event": {"Event": Anything},
        "geventhttpclient": {},
        "geventhttpclient.response": {
            "HTTPParseError": type("HTTPParseError", (Exception,), {}),
            "HTTPResponse": type("HTTPResponse", (), {"__init__": lambda self, method: None}),
        },
    }
    modules = {name: types.ModuleType(name) for name in contents}
    for name, module in modules.items():
        vars(module).update(contents[name])
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    return modules


@contextlib.contextmanager
def without_locust() -> Iterator[Any]:
    """The script imported without Locust, which would patch this whole process for gevent: for its pure sections."""
    spec: Any = importlib.util.spec_from_file_location("locust_batch_without_locust", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in stand_ins().items():
            patch.setitem(sys.modules, name, stand_in)
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module
