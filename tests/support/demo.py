"""The simulated server as a test starts it: in a process of its own, with what it knows of its requests."""

from __future__ import annotations

import json
from typing import Any

import online_bench_openai_async as bench


class Demo:
    """`Demo(ttft_ms=200, gap_ms=0)`: its figures are those of the simulated engine."""

    def __init__(self, **engine: float) -> None:
        self._process = bench.DemoServer(json.dumps(engine))
        self.url = self._process.api_base
        self.root = self.url[: -len("/v1")]

    @property
    def target(self) -> list[str]:
        """The words of a command line that send the load here."""
        return ["--api-base", self.url, "--model", "demo"]

    def truth(self) -> dict[str, Any]:
        """What the server saw by its own clock; `requests` has a dictionary for each request that it answered."""
        report = bench.fetch_json(self.root + "/truth", None)
        rows = [dict(zip(report["fields"], row)) for row in report["requests"]]
        return {**report, "requests": rows}

    def stop(self) -> None:
        self._process.stop()
