"""Records, configurations and client health as a run would make them, with changes by keyword."""

from __future__ import annotations

import dataclasses
from typing import Any

import online_bench_openai_async as bench


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


def summary_of(*records: bench.Record) -> bench.Summary:
    """The summary of a run that left these records."""
    tally = bench.Tally()
    for record in records:
        tally.add(record)
    return tally.summary()


def make_config(**changes: Any) -> bench.Config:
    """A configuration as the command line would make it, with changes."""
    options = bench.build_parser().parse_args(["--model", "m", "--api-base", "http://127.0.0.1:9/v1", "--seed", "1"])
    options.api_key = "vllm"
    config = bench.build_config(options, 0)
    return dataclasses.replace(config, **changes)


def health(**changes: Any) -> bench.Health:
    """A client that was no bottleneck: 30 % of a core, 1 ms of event-loop lag at p99."""
    calm = bench.Health(10.0, 3.0, 0.1, 1.0, 2.0, 0.5, 64, 0, "stopwatch (uvloop)", True)
    return dataclasses.replace(calm, **changes)
