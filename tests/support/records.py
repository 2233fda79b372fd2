"""Records, configurations and client health as a run would make them, with changes by keyword."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import online_bench_openai_async as bench


def make_record(index: int = 0, **changes: Any) -> bench.Record:
    """A success: permit free at 0.999 s, sent at 1.0, first token at 1.1, last at 1.5, end at 1.6; 5 tokens.

    Keywords are fields of Reply, stamps also as seconds from the start (`sent_s`), and `due_s`, `status`,
    `error_kind`, `error`.
    """
    values: dict[str, Any] = {
        "free_s": 0.999,
        "ready_s": 1.0,
        "sent_s": 1.0,
        "first_s": 1.1,
        "visible_s": 1.1,
        "last_s": 1.5,
        "end_s": 1.6,
        "http_status": 200,
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "has_usage": True,
        "finish_reason": "length",
        "chunks": 5,
        "gaps_ms": (100.0, 100.0, 100.0, 100.0),
        "new_connection": False,
        "reads": 5,
        "kernel_reads": 5,
        "content_reads": 5,
        **changes,
    }
    due_s = values.pop("due_s", None)
    status, kind, error = (values.pop(name, "") for name in ("status", "error_kind", "error"))
    failure = bench.Failure(status, kind, error) if status not in ("", "success") else None
    for name in [name for name in values if name.endswith("_s")]:
        seconds = values.pop(name)
        values[f"{name[:-2]}_ns"] = None if seconds is None else round(seconds * 1e9)
    return bench.Record(bench.Job(index, due_s), bench.Reply(failure=failure, **values), 0)


def closed_loop(latencies_s: Sequence[float], concurrency: int, **changes: Any) -> list[bench.Record]:
    """The records of a closed loop whose requests take so long, one after the other, in order of completion."""
    free_s = [0.0] * concurrency
    ends = []
    for index, latency_s in enumerate(latencies_s):
        slot = free_s.index(min(free_s))
        sent_s, free_s[slot] = free_s[slot], free_s[slot] + latency_s
        end_s = free_s[slot]
        stamps = {"free_s": sent_s, "ready_s": sent_s, "sent_s": sent_s, "last_s": end_s, "end_s": end_s}
        first = {"first_s": sent_s + latency_s / 5, "visible_s": sent_s + latency_s / 5}
        ends.append((end_s, index, make_record(index, **{**stamps, **first, **changes})))
    return [record for _, _, record in sorted(ends, key=lambda end: end[:2])]


def summary_of(*records: bench.Record, wave: int = 0, goodput: Optional[Mapping[str, float]] = None) -> bench.Summary:
    """The summary of a run that left these records, the first `wave` of them sent at once."""
    tally = bench.Tally(goodput=goodput)
    for record in records:
        tally.add(record)
    return tally.summary(wave)


def make_config(**changes: Any) -> bench.Config:
    """A configuration as the command line would make it, with changes."""
    options = bench.build_parser().parse_args(["--model", "m", "--api-base", "http://127.0.0.1:9/v1", "--seed", "1"])
    bench.resolve_server(options, {})
    config = bench.build_config(options, 0)
    return dataclasses.replace(config, **changes)


def health(**changes: Any) -> bench.Health:
    """A client that was no bottleneck: 30 % of a core, 1 ms of event-loop lag at p99."""
    calm = bench.Health(
        wall_s=10.0, cpu_s=3.0, waiting_s=0.1, lag_p99_ms=1.0, lag_max_ms=2.0, held_up_s=0.0, gc_pause_ms=0.5,
        peak_in_flight=64, in_flight_s=640.0, unread_s=0.0, flight_window_s=10.0, connections=0,
        transport="stopwatch (uvloop)", kernel_clock=True,
    )  # fmt: skip
    return dataclasses.replace(calm, **changes)
