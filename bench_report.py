#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = [
#     "numpy>=1.22",
#     "plotly>=5.18",
# ]
# ///
"""Read benchmark results back: print them again, compare runs, draw one HTML page.

    python bench_report.py show results.csv summary.jsonl
    python bench_report.py compare before.csv after.csv --fail-if 'p99_ttft_ms > +10%'
    python bench_report.py html old=old.jsonl new=new.jsonl -o report.html

It reads the CSV and the JSON or JSON Lines that online_bench_openai_async.py and locust_batch.py write,
and the result files of vLLM (`vllm bench serve --save-result`), SGLang (`bench_serving`) and guidellm.
Needs numpy; `html` needs plotly as well; `openai` is not needed.

An argument is a file, a directory of result files, or several joined by commas: `[NAME=]FILE[,FILE...]`, one run.
Rows of a run with the same level and repetition are one measured point; its percentiles are exact.
What cannot be read costs one line on stderr and exit code 2; the rest is still reported.

Sections of this file; each uses only sections above it:

     1. Constants
     2. Types
     3. Statistics
     4. Requests
     5. Files
     6. Runs
     7. Text
     8. Comparison
     9. Pictures
    10. Page
    11. Command line

Exit codes: 0 done; 2 wrong usage, or a file or a part of one that could not be read; 3 a --fail-if holds.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import csv
import dataclasses
import difflib
import gc
import html
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional
from urllib.parse import unquote

try:
    import numpy as np
    from numpy.typing import NDArray
except ImportError:
    print("bench_report.py needs numpy: pip install numpy plotly", file=sys.stderr)
    raise SystemExit(2) from None

# === 1. Constants ===

__version__ = "0.2.0"

RANKS = (50.0, 90.0, 95.0, 99.0, 99.9)
# The least n at which, with 99 % confidence, the second-largest value bounds the percentile from above.
LEAST_N = {90.0: 64, 95.0: 130, 99.0: 662, 99.9: 6636}
STATUSES = ("success", "http_error", "decode_error")
CHUNK_ROWS = 5_000  # CSV rows turned into arrays at a time

CONFIDENCE = 0.99
# What differs between two runs of one unchanged server, as a standard deviation of the logarithm of a figure.
# A single run cannot show it, so it is assumed where there are no repetitions.
BETWEEN_RUNS = 0.005
ROUNDS = 400  # bootstrap resamples
MOST_RESAMPLED = 5_000  # requests per resample
LEAST_BLOCKS = 4
SAME_LENGTH = 0.02  # runs whose mean lengths differ by more are not comparable
SEED = 20251

TELLING_ERROR_SHARE = 0.01  # above it throughput says nothing of the load
KNEE_GROWTH = 0.05  # of throughput per doubling of the level
MOST_DOTS = 4_000  # per time strip
MOST_CURVES = 10  # per distribution picture
BINS = 240  # of a time strip
MOST_GROUPS = 12  # labels, turns or servers shown row by row
TEXT_CHARS = 300
GENERATOR = '<meta name="generator" content="bench_report.py">'

# === 2. Types ===

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


class UserError(Exception):
    """Wrong usage: one line for a person, exit code 2."""


class Metric(NamedTuple):
    """A per-request figure: the stem of its result keys, its label, its CSV column."""

    stem: str
    label: str
    column: str

    @property
    def short(self) -> str:
        """The label without its unit."""
        return self.label.partition(" (")[0]

    @property
    def words(self) -> str:
        """The same within a sentence."""
        return self.short if self.short.isupper() else self.short.lower()


METRICS = (
    Metric("e2el_ms", "Latency (ms)", "latency_ms"),
    Metric("response_ms", "Response time (ms)", "response_ms"),
    Metric("e2e_ms", "E2E (ms)", "e2e_ms"),
    Metric("ttft_ms", "TTFT (ms)", "ttft_ms"),
    Metric("tpot_ms", "TPOT (ms)", "tpot_ms"),
    Metric("itl_ms", "Chunk gap (ms)", ""),
    Metric("ttfv_ms", "First visible token (ms)", ""),
    Metric("late_send_ms", "Late sends (ms)", ""),
    Metric("connect_ms", "Connect (ms)", "connect_ms"),
    Metric("tail_ms", "Tail (ms)", "tail_ms"),
    Metric("client_queue_time_ms", "Client queue (ms)", "queue_ms"),
    Metric("tokens_per_s_per_user", "Tokens/s per user", "tokens_per_s_per_user"),
    Metric("output_tokens", "Output tokens", "completion_tokens"),
    Metric("prompt_tokens", "Prompt tokens", "prompt_tokens"),
)
BY_STEM = {metric.stem: metric for metric in METRICS}
HIDDEN_STEMS = (
    "client_queue_time_ms",
    "connect_ms",
    "late_send_ms",
    "tail_ms",
    "ttfv_ms",
)  # in the table only with --verbose


@dataclass(eq=False)
class Requests:
    """The requests of one point in order of completion: one entry each, NaN where not measured.

    `columns` by the CSV's names, times in ms or, `*_s`, in seconds from the start; `groups` holds text columns
    (label, server, error_kind) as one string each. `gaps_ms` and `token_s` exist only where every chunk was kept.
    """

    columns: dict[str, Floats]
    ok: Bools
    groups: dict[str, NDArray[np.object_]] = field(default_factory=dict)
    gaps_ms: Optional[Floats] = None
    token_s: Optional[Floats] = None

    def __len__(self) -> int:
        return len(self.ok)

    def column(self, name: str) -> Floats:
        """A column of all requests; NaN throughout where it was not measured."""
        found = self.columns.get(name)
        return np.full(len(self), np.nan) if found is None else found

    def sample(self, name: str) -> Floats:
        """The finite values of the successes."""
        values = self.column(name)
        return values[self.ok & np.isfinite(values)]

    def has(self, name: str) -> bool:
        return name in self.columns and bool(np.isfinite(self.columns[name]).any())

    def take(self, chosen: NDArray[Any]) -> Requests:
        columns = {name: values[chosen] for name, values in self.columns.items()}
        groups = {name: values[chosen] for name, values in self.groups.items()}
        return Requests(columns, self.ok[chosen], groups)


@dataclass(eq=False)
class Point:
    """One measured point: a server under one load, once. `figures` has the flat result keys of vLLM, and ours."""

    run: str
    tool: str
    figures: dict[str, Any]
    sources: list[str]
    requests: Optional[Requests] = None
    note: str = ""

    def figure(self, name: str) -> Optional[float]:
        """A figure by its result key; None where it was not measured."""
        kind, _, stem = name.partition("_")
        other = {"p50": f"median_{stem}", "median": f"p50_{stem}"}.get(kind, name)
        value = next((v for v in (_finite(self.figures.get(key)) for key in (name, other)) if v is not None), None)
        if value is None and name == "error_rate":
            ended = self.count("completed") + self.count("failed")
            return self.count("failed") / ended if ended else None
        if value is None and self.requests is not None and stem in BY_STEM and re.fullmatch(r"p\d+(\.\d+)?", kind):
            sample = sample_of(self.requests, BY_STEM[stem])
            return float(np.percentile(sample, float(kind[1:]))) if len(sample) and float(kind[1:]) <= 100 else None
        return value

    def count(self, name: str) -> int:
        return int(_finite(self.figures.get(name)) or 0)

    @property
    def config(self) -> Mapping[str, Any]:
        config = self.figures.get("config")
        return config if isinstance(config, dict) else {}

    @property
    def by_rate(self) -> bool:
        """Whether the level is a request rate rather than a number in flight."""
        return _finite(self.figures.get("request_rate")) is not None

    @property
    def level(self) -> Optional[float]:
        keys = ("level", "request_rate" if self.by_rate else "max_concurrency", "max_concurrent_requests")
        values = (_finite(self.figures.get(key)) for key in keys)
        return next((value for value in values if value is not None), None)

    @property
    def warnings(self) -> list[str]:
        given = self.figures.get("warnings")
        return [plain(str(line)) for line in given] if isinstance(given, list) else []

    @property
    def client_bound(self) -> str:
        """Why the client, not the server, was the limit; empty where it was not."""
        value = self.figures.get("client_bound")
        if not value and "client-bound" in str(self.figures.get("verdict", "")):
            value = self.figures["verdict"]
        return ("the client was the limit" if value is True else plain(str(value))) if value else ""


class Slo(NamedTuple):
    """A limit on a figure, as in `p99_ttft_ms<500`."""

    name: str
    op: str
    limit: float

    def holds(self, value: Optional[float]) -> bool:
        return value is not None and OPERATORS[self.op](value, self.limit)


OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}


def _finite(value: Any) -> Optional[float]:
    """A number as a float; None for anything else, and for what is not finite."""
    if isinstance(value, bool) or value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def plain(text: str, limit: int = TEXT_CHARS) -> str:
    """One line without control characters: text of a server may end up on a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * limit]).split())[:limit]


# === 3. Statistics (pure) ===


def describe(sample: Floats) -> dict[str, float]:
    """Mean, population standard deviation, least, greatest and percentiles; empty for an empty sample.

    Percentile p of the sorted sample x[0..n-1]: with r = (n-1)p/100 and k = floor(r), x[k] + (x[k+1] - x[k])(r - k)
    (linear interpolation, the default of numpy.percentile; type 7 of Hyndman and Fan, 1996).
    """
    if not len(sample):
        return {}
    values = np.percentile(sample, RANKS)
    ranks = {f"p{rank:g}": float(value) for rank, value in zip(RANKS, values)}
    spread = {"std": float(sample.std()), "min": float(sample.min()), "max": float(sample.max())}
    return {"mean": float(sample.mean()), "median": ranks["p50"], **spread, **ranks}


def student_t(dof: float) -> float:
    """Two-sided 99 % quantile of Student's t; Abramowitz and Stegun 26.7.5, tabled where that is coarse (dof < 4)."""
    if dof < 4:
        return (math.inf, 63.657, 9.925, 5.841)[max(0, int(dof))]
    z = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + float(sum(term / dof ** (power + 1) for power, term in enumerate(terms)))


class Noise(NamedTuple):
    """How far chance moves the logarithm of a figure: standard error and degrees of freedom."""

    log_se: float
    dof: float


def noise_of_repetitions(values: Sequence[float]) -> Noise:
    """Standard error of the mean logarithm over two repetitions or more."""
    logs = np.log(np.asarray(values))
    return Noise(float(logs.std(ddof=1) / math.sqrt(len(logs))), len(logs) - 1)


def block_bootstrap(columns: Sequence[Floats], block: int, figure: Callable[..., Floats]) -> Optional[Noise]:
    """Noise of a figure of one run by the circular block bootstrap over its requests (Politis and Romano, 1992).

    Requests that were under way together share their luck, so whole blocks of `block` neighbours are drawn. `figure`
    maps arrays (resamples x requests) to one value a resample. A long run is resampled at m of its n requests, and
    the standard error scaled by sqrt(m / n). None where fewer than LEAST_BLOCKS blocks fit.
    """
    n = len(columns[0])
    blocks = n // max(1, block)
    if blocks < LEAST_BLOCKS:
        return None
    drawn = max(LEAST_BLOCKS, min(n, max(MOST_RESAMPLED, LEAST_BLOCKS * block)) // block)
    random = np.random.default_rng(SEED)
    at_once = max(1, 2_000_000 // (drawn * block))
    values: list[Floats] = []
    for first in range(0, ROUNDS, at_once):
        starts = random.integers(0, n, (min(at_once, ROUNDS - first), drawn, 1))
        chosen = ((starts + np.arange(block)) % n).reshape(len(starts), -1)
        values.append(figure(*(column[chosen] for column in columns)))
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(np.concatenate(values))
    if not np.isfinite(logs).all():
        return None
    scale = math.sqrt(drawn * block / n) * math.sqrt(blocks / (blocks - 1))
    return Noise(float(logs.std()) * scale, blocks - 1)


def half_width(noises: Sequence[Noise]) -> float:
    """Half the 99 % interval of a sum of independent parts: Welch's t (1947), degrees of freedom rounded down."""
    squares = sum(noise.log_se**2 for noise in noises)
    if not squares:
        return 0.0
    dof = squares**2 / sum(noise.log_se**4 / noise.dof for noise in noises)
    return student_t(math.floor(min(dof, 1e6) + 1e-9)) * math.sqrt(squares)


def mean_rate(starts: Floats, ends: Floats, weights: Floats, edges: Floats) -> Floats:
    """Mean over each bin of the sum of `weights` (per second) of the intervals that are open: a weight of 1 each
    gives the number in flight. The integral of that step function is piecewise linear, hence read off exactly."""
    times = np.concatenate((starts, ends))
    order = np.argsort(times, kind="stable")
    times = times[order]
    slopes = np.cumsum(np.concatenate((weights, -weights))[order])
    integral = np.concatenate(([0.0], np.cumsum(slopes[:-1] * np.diff(times))))
    rates: Floats = np.diff(np.interp(edges, times, integral)) / np.diff(edges)
    return rates


def thin(order_by: Floats, values: Floats, most: int) -> NDArray[np.int64]:
    """Indices of at most about `most` points: of each stretch the least, the greatest and the first."""
    order = np.argsort(order_by, kind="stable")
    if len(order) <= most:
        return order
    size = math.ceil(3 * len(order) / most)
    starts = np.arange(0, len(order), size)
    kept = set(starts.tolist())
    for first in starts.tolist():
        stretch = values[order[first : first + size]]
        kept |= {first + int(np.argmin(stretch)), first + int(np.argmax(stretch))}
    return order[sorted(kept)]


def ecdf(sample: Floats) -> tuple[Floats, Floats]:
    """(value, share of the sample at or below it), thinned; both tails are kept value by value."""
    ordered = np.sort(sample)
    n = len(ordered)
    tail = np.unique(np.geomspace(1, n, 120).astype(int)) - 1
    ranks = np.unique(np.concatenate((np.linspace(0, n - 1, 240).astype(int), tail, n - 1 - tail)))
    return ordered[ranks], (ranks + 1.0) / n


# === 4. Requests (pure) ===


def sample_of(requests: Requests, metric: Metric) -> Floats:
    """The sample that a metric describes: one value a success, or, of the gaps, one a chunk."""
    if metric.stem == "itl_ms":
        return np.empty(0) if requests.gaps_ms is None else requests.gaps_ms
    return requests.sample(metric.column)


def complete_columns(requests: Requests) -> Requests:
    """Adds what follows from other columns: `done_s` (completion) and tokens/s per user."""
    columns = requests.columns
    columns["done_s"] = requests.column("sent_s") + requests.column("latency_ms") / 1e3
    with np.errstate(divide="ignore", invalid="ignore"):
        speed = requests.column("completion_tokens") / (requests.column("latency_ms") / 1e3)
    columns["tokens_per_s_per_user"] = np.where(np.isfinite(speed), speed, np.nan)
    return requests


def summarize(requests: Requests) -> dict[str, Any]:
    """The flat result keys that requests alone can give. Elapsed: first send to last completion of a success, or to
    the last send of a failure, whose end no file tells."""
    aborted = requests.groups["error_kind"] == "aborted" if "error_kind" in requests.groups else ~requests.ok & False
    completed, cut = int(requests.ok.sum()), int(aborted.sum())
    failed = len(requests) - completed - cut
    figures: dict[str, Any] = {"completed": completed, "failed": failed, "num_prompts": completed + failed}
    if cut:
        figures["aborted"] = cut
    totals = {
        "total_input_tokens": float(requests.sample("prompt_tokens").sum()),
        "total_output_tokens": float(requests.sample("completion_tokens").sum()),
    }
    figures.update(totals)
    if requests.has("cached_tokens"):
        figures["total_cached_tokens"] = float(requests.sample("cached_tokens").sum())
    done = requests.sample("done_s")
    if len(done):
        end_s = max(float(done.max()), float(np.nanmax(requests.column("sent_s")[~aborted], initial=-np.inf)))
        figures.update(_rates(requests, end_s, completed, totals))
    for metric in METRICS:
        sample = sample_of(requests, metric)
        figures.update({f"{name}_{metric.stem}": value for name, value in describe(sample).items()})
        if len(sample):
            figures[count_key(metric.stem)] = len(sample)
    return figures


def _rates(requests: Requests, end_s: float, completed: int, totals: Mapping[str, float]) -> dict[str, Any]:
    elapsed = end_s - float(np.nanmin(requests.column("sent_s")))
    if elapsed <= 0:
        return {}
    spans = under_way(requests)
    changes = np.concatenate((np.ones(len(spans[0])), -np.ones(len(spans[1]))))
    # A kept worker's next request is no second one in flight, though the file's microseconds may overlap by rounding.
    order = np.lexsort((changes, np.concatenate((spans[0], spans[1] - 2e-6))))
    return {
        "duration": elapsed,
        "request_throughput": completed / elapsed,
        "output_throughput": totals["total_output_tokens"] / elapsed,
        "total_token_throughput": sum(totals.values()) / elapsed,
        "concurrency": float((spans[1] - spans[0]).sum()) / elapsed,
        "max_concurrent_requests": int(np.cumsum(changes[order]).max()),
    }


def under_way(requests: Requests) -> tuple[Floats, Floats]:
    """(send, completion) in seconds of the requests of which both are known."""
    sent, done = requests.column("sent_s"), requests.column("done_s")
    known = np.isfinite(sent) & np.isfinite(done)
    return sent[known], done[known]


def count_key(stem: str) -> str:
    return f"{stem[:-3] if stem.endswith('_ms') else stem}_count"


def steady_window(requests: Requests, concurrency: float) -> Optional[tuple[float, float]]:
    """(start, end) in seconds: from the end of the first wave, as many completions as the concurrency, to the last
    send. None where fewer than twice the concurrency were sent within it."""
    done, sent = np.sort(requests.sample("done_s")), requests.column("sent_s")
    wave = max(1, int(concurrency))
    if len(done) <= wave:
        return None
    start, end = float(done[wave - 1]), float(np.nanmax(sent))
    inside = int(((sent >= start) & (sent <= end)).sum())
    return (start, end) if inside >= 2 * wave else None


def generated(requests: Requests) -> tuple[Floats, Floats, Floats]:
    """(first token, last token, tokens per second between) of each streamed success: its tokens evenly spread."""
    sent, first, last = (requests.column(name) for name in ("sent_s", "ttft_ms", "done_s"))
    start, tokens = sent + first / 1e3, requests.column("completion_tokens")
    span = last - start
    known = requests.ok & np.isfinite(span) & np.isfinite(tokens) & (span > 0)
    return start[known], last[known], tokens[known] / span[known]


# === 5. Files ===


class Problems:
    """What could not be read: one line each on stderr, and exit code 2 at the end."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, path: str, reason: str) -> None:
        self.count += 1
        print(f"bench_report: {plain(path)}: {plain(reason, 400)}", file=sys.stderr)


NUMBER_COLUMNS = (
    *("index", "prompt_tokens", "completion_tokens", "latency_ms", "scheduled_s", "sent_s", "ttft_ms", "tpot_ms"),
    *("response_ms", "queue_ms", "cached_tokens", "level", "repeat", "start_unix_s", "e2e_ms", "connect_ms"),
    *("tail_ms", "turn"),
)
TEXT_COLUMNS = ("status", "error_kind", "label", "server", "finish_reason")
POINT_COLUMNS = ("level", "repeat", "start_unix_s")


class Sheet:
    """A results CSV being read: rows come in chunks and leave as arrays."""

    def __init__(self, header: Sequence[str]) -> None:
        places = {name: place for place, name in enumerate(header)}
        self.width = len(header)
        self.header = list(header)
        self.numbers = {name: places[name] for name in NUMBER_COLUMNS if name in places}
        self.texts = {name: places[name] for name in TEXT_COLUMNS if name in places}
        self.number_parts: dict[str, list[Floats]] = {name: [] for name in self.numbers}
        self.text_parts: dict[str, list[NDArray[np.int32]]] = {name: [] for name in self.texts}
        self.words: dict[str, dict[str, int]] = {name: {} for name in self.texts}
        self.damaged = 0

    def add(self, rows: list[list[str]]) -> None:
        """Takes rows in; those with too few or too many cells are counted as damaged, repeated headers skipped."""
        whole = [row for row in rows if len(row) == self.width]
        self.damaged += sum(1 for row in rows if row and len(row) != self.width) if len(whole) < len(rows) else 0
        whole = [row for row in whole if row != self.header] if self.header in whole else whole
        if not whole:
            return
        cells = list(zip(*whole))
        for name, place in self.numbers.items():
            self.number_parts[name].append(_floats(cells[place]))
        for name, place in self.texts.items():
            words, column = self.words[name], cells[place]
            for word in set(column):
                words.setdefault(word, len(words))
            self.text_parts[name].append(np.fromiter(map(words.__getitem__, column), np.int32, len(column)))

    def requests(self) -> Requests:
        """All sound rows; a row without index, status or, of a success, latency is damaged."""
        columns = {name: np.concatenate(parts or [np.empty(0)]) for name, parts in self.number_parts.items()}
        columns = {name: values for name, values in columns.items() if np.isfinite(values).any() or name == "index"}
        groups: dict[str, NDArray[np.object_]] = {}
        for name, parts in self.text_parts.items():
            words = np.array([plain(word, 80) for word in self.words[name]] or [""], dtype=object)
            groups[name] = words[np.concatenate(parts or [np.empty(0, dtype=np.int32)])]
        status = groups.pop("status")
        ok: Bools = np.asarray(status == "success", dtype=bool)
        latency = columns.get("latency_ms", np.full(len(ok), np.nan))
        sound = np.isfinite(columns["index"]) & np.isin(status, STATUSES) & (~ok | np.isfinite(latency))
        self.damaged += int((~sound).sum())
        groups["status"] = status
        requests = Requests(columns, ok, groups)
        return requests if sound.all() else requests.take(sound)


def _floats(cells: Sequence[str]) -> Floats:
    """Numbers of a column; NaN for a blank cell and for one that is no number."""
    if cells[0] == cells[-1] and cells.count(cells[0]) == len(cells):  # blank, or a configured length: most columns are
        only = _finite(cells[0])
        return np.full(len(cells), math.nan if only is None else only)
    try:
        values = np.fromiter(map(float, [cell or "nan" for cell in cells] if "" in cells else cells), float, len(cells))
    except ValueError:
        found = (_finite(cell) if cell else None for cell in cells)
        values = np.array([math.nan if value is None else value for value in found])
    return np.where(np.isfinite(values), values, np.nan)


def read_csv(path: str, problems: Problems) -> list[Point]:
    """The points of a results CSV: one for each level, repetition and start in it."""
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.reader(file)
        try:
            header = next(reader, [])
        except csv.Error:
            header = []
        if not {"index", "latency_ms", "status"} <= set(header):
            problems.add(path, "is no results CSV of this project (columns index, latency_ms and status are missing)")
            return []
        sheet = Sheet(header)
        collects = gc.isenabled()
        gc.disable()  # a million rows are no garbage, and looking for it takes as long as reading them
        try:
            _take_rows(path, reader, sheet, problems)
        finally:
            if collects:
                gc.enable()
    requests = sheet.requests()
    if sheet.damaged:
        problems.add(path, f"{sheet.damaged} damaged rows left out (a cell is missing or no number)")
    if not len(requests):
        problems.add(path, "holds no requests")
        return []
    return [_csv_point(path, part) for part in split_points(requests)]


def _take_rows(path: str, reader: Iterator[list[str]], sheet: Sheet, problems: Problems) -> None:
    """Feeds the sheet; the last row is left out where its line was never ended."""
    rows: list[list[str]] = []
    try:
        for row in reader:
            rows.append(row)
            if len(rows) > CHUNK_ROWS:
                sheet.add(rows[:CHUNK_ROWS])
                del rows[:CHUNK_ROWS]
    except csv.Error as error:
        problems.add(path, f"unreadable from row {sum(map(len, sheet.number_parts['index'])) + len(rows) + 1}: {error}")
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) not in b"\r\n" and rows:
            problems.add(path, "its last row is half-written and left out")
            rows.pop()
    sheet.add(rows)


def split_points(requests: Requests) -> Iterator[Requests]:
    """Apart by level, repetition and start; where an index comes again, a further run was appended."""
    code = np.zeros(len(requests), dtype=np.int64)
    for name in POINT_COLUMNS:
        if name in requests.columns:
            code = code * (len(requests) + 1) + _codes(requests.columns[name])
            code = _codes(code)
    code = code * (len(requests) + 1) + _appended(code, requests.columns["index"])
    for value in np.unique(code):
        chosen = code == value
        yield requests if chosen.all() else requests.take(chosen)


def _codes(values: NDArray[Any]) -> NDArray[np.int64]:
    codes: NDArray[np.int64] = np.unique(values, return_inverse=True)[1].astype(np.int64).reshape(-1)
    return codes


def _appended(code: NDArray[np.int64], index: Floats) -> NDArray[np.int64]:
    """0 for the rows of the first run, 1 for the next: a run ends before the row whose index it has had already."""
    order = np.lexsort((np.arange(len(index)), index, code))
    same = (np.diff(code[order]) == 0) & (np.diff(index[order]) == 0)
    previous = np.full(len(index), -1)
    previous[order[1:][same]] = order[:-1][same]
    runs = np.zeros(len(index), dtype=np.int64)
    while (again := np.flatnonzero(previous >= 0)).size:
        runs[again[0] :] += 1
        previous[previous < again[0]] = -1
    return runs


def _csv_point(path: str, requests: Requests) -> Point:
    return refreshed(Point(run_name(path), "", {}, [path], complete_columns(requests)))


def refreshed(point: Point) -> Point:
    """The point with its figures worked out from its requests."""
    requests = point.requests
    assert requests is not None
    point.figures = summarize(requests)
    for name, key in (("level", "level"), ("repeat", "repeat"), ("start_unix_s", "benchmark_start_time_unix")):
        if requests.has(name):
            point.figures[key] = float(np.nanmin(requests.columns[name]))
    due = np.sort(requests.column("scheduled_s")[~(requests.column("turn") > 1)])
    level = point.figures.get("level")
    if level and len(due) > 1 and 0.4 < (len(due) - 1) / (due[-1] - due[0] or np.nan) / level < 2.5:
        point.figures["request_rate"] = level  # a level is a rate where requests were due at about that rate
    return point


def run_name(path: str) -> str:
    return plain(Path(path).stem, 60)


# --- result files in JSON: a table of readers ---


class Reader(NamedTuple):
    """Result files of one tool: how to tell them, how to read them, and what its figures mean differently."""

    tool: str
    knows: Callable[[Mapping[str, Any]], bool]
    points: Callable[[Mapping[str, Any]], Iterator[Point]]
    note: str


ALIASES = (
    (re.compile(r"_e2e_latency_ms$"), "_e2el_ms"),
    (re.compile(r"^(p[\d.]+|mean|median|std|min|max)_latency_ms$"), r"\1_e2el_ms"),
    (re.compile(r"^n_(\w+?)(_ms)?$"), r"\1_count"),
    (re.compile(r"^total_throughput$"), "total_token_throughput"),
)


def canonical(name: str) -> str:
    """A result key under the name used here: vLLM's, where tools call one figure by several names."""
    for pattern, replacement in ALIASES:
        name = pattern.sub(replacement, name)
    return name


def read_flat(result: Mapping[str, Any]) -> Iterator[Point]:
    """A result of flat keys: ours, vLLM's, SGLang's; with the lists of --save-detailed, its requests as well."""
    connecting = result.get("connecting")
    every = {**result, **(connecting if isinstance(connecting, dict) else {})}
    figures = {canonical(key): value for key, value in every.items() if value is not None}
    if isinstance(figures.get("request_rate"), str):  # vLLM writes "inf" for a closed loop
        figures["request_rate"] = _finite(figures["request_rate"])
    requests = detailed_requests(result)
    for key in DETAIL_KEYS:
        figures.pop(key, None)
    computed = summarize(requests) if requests is not None else {}
    run = result.get("label") or result.get("tag") or ""
    yield Point(plain(str(run), 60), "", {**computed, **figures}, [], requests)


DETAIL_KEYS = ("ttfts", "itls", "latencies", "input_lens", "output_lens", "errors", "start_times", "generated_texts")


def detailed_requests(result: Mapping[str, Any]) -> Optional[Requests]:
    """Requests from the lists of --save-detailed (times in seconds, one entry a request, failures included).

    Raises ValueError or TypeError where the lists are damaged.
    """
    given = {name: result[name] for name in DETAIL_KEYS if isinstance(result.get(name), list) and result[name]}
    if "ttfts" not in given and "latencies" not in given:
        return None
    count = len(given.get("ttfts") or given["latencies"])
    if any(len(values) != count for values in given.values()):
        raise ValueError("its per-request lists differ in length")
    ttft, itls = np.array(given.get("ttfts", [math.nan] * count), dtype=float), given.get("itls", [[]] * count)
    latency = np.array(given["latencies"], dtype=float) if "latencies" in given else ttft + [sum(gaps) for gaps in itls]
    ok = np.array([not error for error in given.get("errors", [""] * count)], dtype=bool) & (latency > 0)
    if int(ok.sum()) != result.get("completed"):  # which of them failed is not told
        return None
    columns = {"index": np.arange(count, dtype=float), "latency_ms": latency * 1e3}
    for name, column in (("input_lens", "prompt_tokens"), ("output_lens", "completion_tokens")):
        if name in given:
            columns[column] = np.array(given[name], dtype=float)
    ttft = np.where(ttft > 0, ttft, np.nan)  # 0: not known
    columns["ttft_ms"] = ttft * 1e3
    if "completion_tokens" in columns:
        more = columns["completion_tokens"] - 1
        columns["tpot_ms"] = np.where(more > 0, (latency - ttft) * 1e3 / np.maximum(more, 1), np.nan)
    requests = Requests(columns, ok)
    if "itls" in given:
        requests.gaps_ms = np.array([gap * 1e3 for gaps, good in zip(itls, ok) if good for gap in gaps], dtype=float)
    if "start_times" in given:
        sent = np.array(given["start_times"], dtype=float)
        columns["sent_s"] = sent - sent.min()
        if "itls" in given:
            stamps = [np.cumsum([sent[i] + ttft[i], *itls[i]]) for i in range(count) if ok[i] and ttft[i] > 0]
            requests.token_s = np.concatenate(stamps or [np.empty(0)]) - sent.min()
    complete_columns(requests)
    order = np.argsort(requests.column("done_s"), kind="stable")
    sorted_ = requests.take(order)
    sorted_.gaps_ms, sorted_.token_s = requests.gaps_ms, requests.token_s
    return sorted_


GUIDELLM_METRICS = {
    "request_latency": ("e2el_ms", 1e3),
    "time_to_first_token_ms": ("ttft_ms", 1.0),
    "inter_token_latency_ms": ("tpot_ms", 1.0),
    "prompt_token_count": ("prompt_tokens", 1.0),
    "output_token_count": ("output_tokens", 1.0),
}
GUIDELLM_RATES = {
    "requests_per_second": "request_throughput",
    "output_tokens_per_second": "output_throughput",
    "tokens_per_second": "total_token_throughput",
}
GUIDELLM_REQUEST = {
    "request_start_time": ("sent_s", 1.0),
    "request_latency": ("latency_ms", 1e3),
    "time_to_first_token_ms": ("ttft_ms", 1.0),
    "inter_token_latency_ms": ("tpot_ms", 1.0),
    "prompt_tokens": ("prompt_tokens", 1.0),
    "output_tokens": ("completion_tokens", 1.0),
}


def read_guidellm(report: Mapping[str, Any]) -> Iterator[Point]:
    """One point for each benchmark of a report; the figures of its successful requests."""
    for item in report["benchmarks"]:
        metrics, config = item["metrics"], item.get("config", {})
        totals = metrics.get("request_totals", {})
        figures: dict[str, Any] = {"completed": totals.get("successful", 0), "failed": totals.get("errored", 0)}
        figures["num_prompts"] = figures["completed"] + figures["failed"]
        for name, (stem, scale) in GUIDELLM_METRICS.items():
            figures.update(_guidellm_distribution(metrics.get(name, {}).get("successful") or {}, stem, scale))
        for name, key in GUIDELLM_RATES.items():
            figures[key] = (metrics.get(name, {}).get("successful") or {}).get("mean")
        figures.update(_guidellm_load(config), duration=item.get("duration"))
        figures["benchmark_start_time_unix"] = item.get("start_time")
        figures = {key: value for key, value in figures.items() if value is not None}
        requests = _guidellm_requests(item.get("requests") or {}, figures["completed"])
        computed = summarize(requests) if requests is not None else {}
        yield Point("", "", {**computed, **figures}, [], requests)


def _guidellm_distribution(summary: Mapping[str, Any], stem: str, scale: float) -> dict[str, float]:
    if not summary.get("count") or not summary.get("max"):  # an absent figure is a row of zeros there
        return {}
    percentiles = summary.get("percentiles", {})
    values = {"mean": summary.get("mean"), "median": summary.get("median"), "std": summary.get("std_dev")}
    values["max"] = summary.get("max")
    values.update({f"p{rank:g}": percentiles.get(f"p{rank:g}".replace(".", "")) for rank in RANKS})
    found = {f"{name}_{stem}": value * scale for name, value in values.items() if value is not None}
    return {**found, count_key(stem): summary["count"]}


def _guidellm_load(config: Mapping[str, Any]) -> dict[str, Any]:
    strategy = config.get("strategy") or {}
    backend = config.get("backend") or {}
    return {
        "request_rate": strategy.get("rate"),
        "max_concurrency": strategy.get("streams") or (1 if strategy.get("type_") == "synchronous" else None),
        "model_id": backend.get("model"),
        "config": {f"strategy.{key}": value for key, value in strategy.items()},
    }


def _guidellm_requests(requests: Mapping[str, Any], completed: int) -> Optional[Requests]:
    """All requests, unless the report keeps but a sample of them."""
    rows, failed = requests.get("successful") or [], requests.get("errored") or []
    if not rows or len(rows) != completed:
        return None
    every = [*rows, *failed]
    columns = {"index": np.arange(len(every), dtype=float)}
    for name, (column, scale) in GUIDELLM_REQUEST.items():
        cells = [_finite(row.get(name)) for row in every]
        columns[column] = np.array([math.nan if cell is None else cell * scale for cell in cells])
    columns["sent_s"] -= np.nanmin(columns["sent_s"])
    found = complete_columns(Requests(columns, np.arange(len(every)) < len(rows)))
    return found.take(np.argsort(found.column("done_s"), kind="stable"))


READERS = (
    Reader(
        "guidellm",
        lambda r: isinstance(r.get("benchmarks"), list) and all("metrics" in item for item in r["benchmarks"]),
        read_guidellm,
        "TPOT is its inter-token latency, weighted by tokens; percentiles are not interpolated",
    ),
    Reader("", lambda r: "request_throughput" in r and isinstance(r.get("config"), dict), read_flat, ""),
    Reader(
        "SGLang",
        lambda r: "request_throughput" in r and "mean_e2e_latency_ms" in r,
        read_flat,
        "TTFT and latency include connecting; its duration includes a call after the run",
    ),
    Reader(
        "vLLM",
        lambda r: "request_throughput" in r and "completed" in r,
        read_flat,
        "reasoning_content is no token; a stream that an error cut off is a success",
    ),
)


def read_json(path: str, problems: Problems) -> list[Point]:
    """The points of a JSON file: one result, a list of them, a guidellm report, or one result a line."""
    text = Path(path).read_text(encoding="utf-8-sig", errors="replace")
    try:
        loaded = json.loads(text)
        objects = list(enumerate(loaded if isinstance(loaded, list) else [loaded], 1))
    except ValueError:
        objects = _json_lines(path, text, problems)
    points: list[Point] = []
    for number, result in objects:
        where = f"result {number}: " if len(objects) > 1 else ""
        reader = next((r for r in READERS if isinstance(result, dict) and r.knows(result)), None)
        if reader is None:
            problems.add(path, f"{where}no benchmark result of a known tool")
            continue
        try:
            points += [dataclasses.replace(point, tool=reader.tool, sources=[path]) for point in reader.points(result)]
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            problems.add(path, f"{where}a damaged result of {reader.tool or 'this project'} ({error})")
    for point in points:
        point.note = next(reader.note for reader in READERS if reader.tool == point.tool)
        point.run = point.run or run_name(path)
    return points


def _json_lines(path: str, text: str, problems: Problems) -> list[tuple[int, Any]]:
    objects: list[tuple[int, Any]] = []
    damaged: list[int] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                objects.append((number, json.loads(line)))
            except ValueError:
                damaged.append(number)
    if not any(isinstance(result, dict) for _, result in objects):
        problems.add(path, "is no JSON: damaged, half-written, or something else")
        return []
    if damaged:
        numbers = ", ".join(map(str, damaged[:5])) + (", ..." if damaged[5:] else "")
        problems.add(path, f"damaged or half-written and left out: line {numbers}")
    return objects


def read_file(path: str, problems: Problems) -> list[Point]:
    """All points of a file or of the result files in a directory; what is unreadable is said."""
    if os.path.isdir(path):
        inside = sorted(p for p in Path(path).iterdir() if p.suffix in (".json", ".jsonl", ".csv"))
        if not inside:
            problems.add(path, "holds no .json, .jsonl or .csv file")
        return [point for file in inside for point in read_file(str(file), problems)]
    try:
        with open(path, "rb") as raw:
            head = raw.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
        if not head:
            problems.add(path, "is empty")
            return []
        return (read_json if head[:1] in (b"{", b"[") else read_csv)(path, problems)
    except OSError as error:
        problems.add(path, f"cannot be read: {error.strerror or error}")
        return []
    except RecursionError:
        problems.add(path, "is no benchmark result (nested too deeply)")
        return []


# === 6. Runs (pure but for the reading) ===


@dataclass(eq=False)
class Level:
    """The repetitions of one run at one level; a figure is their median."""

    run: str
    level: Optional[float]
    points: list[Point]

    def values(self, name: str) -> list[float]:
        return [value for point in self.points if (value := point.figure(name)) is not None]

    def figure(self, name: str) -> Optional[float]:
        values = self.values(name)
        return statistics.median(values) if values else None

    def few(self, stem: str, rank: float) -> bool:
        """Whether the sample is too small for this percentile; False where its size is unknown."""
        count = self.figure(count_key(stem)) if stem.endswith("_ms") else None
        return count is not None and count < LEAST_N.get(rank, 0)

    @property
    def label(self) -> str:
        return "-" if self.level is None else f"{self.level:g}"

    @property
    def by_rate(self) -> bool:
        return self.points[0].by_rate

    @property
    def title(self) -> str:
        return f"{self.run} at {self.label} {'req/s' if self.by_rate else 'in flight'}"

    def title_of(self, point: Point) -> str:
        """The title, with the repetition where there are several."""
        repeat = _finite(point.figures.get("repeat")) or self.points.index(point) + 1
        return f"{self.title}, repetition {repeat:g}" if len(self.points) > 1 else self.title

    @property
    def errors(self) -> int:
        return sum(point.count("failed") for point in self.points)

    @property
    def client_bound(self) -> str:
        return next((point.client_bound for point in self.points if point.client_bound), "")

    @property
    def gpus(self) -> Optional[float]:
        figures = self.points[0].figures
        known = (_finite(figures.get(key)) for key in ("gpus", "num_gpus", "tensor_parallel_size"))
        return next((number for number in known if number), _finite(self.points[0].config.get("gpus")))


def parse_argument(argument: str) -> tuple[str, list[str]]:
    """(name or '', paths) of `[NAME=]FILE[,FILE...]`; a file of exactly that name comes first."""
    if os.path.exists(argument):
        return "", [argument]
    name, sign, rest = argument.partition("=")
    rest = rest if sign else argument
    paths = [rest] if os.path.exists(rest) else [path for path in rest.split(",") if path]
    return (plain(name, 60) if sign else ""), paths


def read_runs(arguments: Sequence[str], one_each: bool, problems: Problems) -> list[Point]:
    """The points of all arguments, those of one run under one name. `one_each`: an argument is one run, whatever
    labels it holds. A CSV and a summary of the same measurement become one point."""
    points: list[Point] = []
    for argument in arguments:
        name, paths = parse_argument(argument)
        found = [point for path in paths for point in read_file(path, problems)]
        if len(paths) == 1 and os.path.isdir(paths[0]):
            folder = run_name(os.path.abspath(paths[0]))
            for point in found:
                point.run = folder if point.run == run_name(point.sources[0]) else point.run
        if name or (one_each and found) or len(paths) > 1:
            for point in found:
                point.run = name or found[0].run
        points += found
    merged = with_summaries(join(with_summaries(points)))
    _tell_apart(merged)
    return merged


def join(points: list[Point]) -> list[Point]:
    """CSV parts of one point, from several processes or machines, as one: same run, level and repetition, and, where
    their clocks are known, overlapping in time."""
    joined: list[Point] = []
    for point in points:
        partner = next((other for other in joined if _one_point(other, point)), None)
        if partner is None:
            joined.append(point)
        else:
            _absorb(partner, point)
    return joined


def _one_point(one: Point, other: Point) -> bool:
    if one.requests is None or other.requests is None or one.tool or other.tool or one.config or other.config:
        return False
    same = all(one.figures.get(key) == other.figures.get(key) for key in ("level", "repeat"))
    if one.run != other.run or set(one.sources) & set(other.sources) or not same:
        return False
    spans = [_wall_span(point) for point in (one, other)]
    if spans[0] is None or spans[1] is None:
        return True
    return spans[0][0] <= spans[1][1] and spans[1][0] <= spans[0][1]


def _wall_span(point: Point) -> Optional[tuple[float, float]]:
    start, length = point.figures.get("benchmark_start_time_unix"), point.figures.get("duration")
    return None if start is None or length is None else (start, start + length)


def _absorb(point: Point, part: Point) -> None:
    """Adds another part's requests, its clock set to the first's where both are known."""
    ours, theirs = point.requests, part.requests
    assert ours is not None
    assert theirs is not None
    starts = [p.figures.get("benchmark_start_time_unix") for p in (point, part)]
    shift = 0.0 if starts[0] is None or starts[1] is None else starts[1] - starts[0]
    both: dict[str, Floats] = {}
    for name in {**ours.columns, **theirs.columns}:
        moved = theirs.column(name) + (shift if name.endswith("_s") and name != "start_unix_s" else 0.0)
        both[name] = np.concatenate((ours.column(name), moved))
    both.pop("tokens_per_s_per_user", None)
    blank = [np.full(len(part_), "", dtype=object) for part_ in (ours, theirs)]
    groups = {
        name: np.concatenate((ours.groups.get(name, blank[0]), theirs.groups.get(name, blank[1])))
        for name in {**ours.groups, **theirs.groups}
    }
    merged = complete_columns(Requests(both, np.concatenate((ours.ok, theirs.ok)), groups))
    point.requests = merged.take(np.argsort(merged.column("done_s"), kind="stable"))
    point.sources += part.sources
    refreshed(point)


def with_summaries(points: Sequence[Point]) -> list[Point]:
    """A CSV's requests go to the summary of the same measurement: same completions, tokens and mean latency."""
    summaries = [point for point in points if point.config and not point.tool]
    kept: list[Point] = []
    for point in points:
        bare = point.requests is not None and not point.tool and not point.config
        mate = next((s for s in summaries if _same_measurement(s, point)), None) if bare else None
        if mate is None:
            kept.append(point)
            continue
        assert point.requests is not None
        if mate.requests is not None:
            point.requests.gaps_ms, point.requests.token_s = mate.requests.gaps_ms, mate.requests.token_s
        mate.requests = point.requests
        mate.figures = {**point.figures, **mate.figures}
        mate.sources = mate.sources + point.sources
        summaries.remove(mate)
    return kept


def _same_measurement(summary: Point, point: Point) -> bool:
    for key, tolerance in (("completed", 0.0), ("total_output_tokens", 0.0), ("mean_e2el_ms", 0.01)):
        ours, theirs = summary.figure(key), point.figure(key)
        if ours is None or theirs is None or abs(ours - theirs) > tolerance:
            return False
    return True


def _tell_apart(points: Sequence[Point]) -> None:
    """Two files of one name get their folder's, two models of one run the model's."""
    models: dict[str, set[str]] = {}
    files: dict[str, set[str]] = {}
    for point in points:
        models.setdefault(point.run, set()).update(
            [str(point.figures["model_id"])] if "model_id" in point.figures else []
        )
        if point.run == run_name(point.sources[0]):
            files.setdefault(point.run, set()).add(os.path.abspath(point.sources[0]))
    for point in points:
        run = point.run
        if len(files.get(run, ())) > 1:
            point.run = plain(str(Path(point.sources[0]).with_suffix("")), 60)
        if len(models[run]) > 1:
            point.run += f" ({plain(str(point.figures.get('model_id', 'model unknown')), 40)})"


def levels_of(points: Sequence[Point]) -> list[Level]:
    """Points by run, in the order given, and within a run by level."""
    levels: dict[tuple[str, Optional[float], bool], Level] = {}
    runs = list(dict.fromkeys(point.run for point in points))
    for point in points:
        key = (point.run, point.level, point.by_rate)
        levels.setdefault(key, Level(point.run, point.level, [])).points.append(point)
    return sorted(levels.values(), key=lambda level: (runs.index(level.run), level.by_rate, level.level or 0.0))


def by_run(levels: Sequence[Level]) -> dict[str, list[Level]]:
    runs: dict[str, list[Level]] = {}
    for level in levels:
        runs.setdefault(level.run, []).append(level)
    return runs


def undisturbed(levels: Sequence[Level]) -> list[Level]:
    """Those with hardly a failure: others do not show how throughput grows."""
    return [level for level in levels if (level.figure("error_rate") or 0.0) <= TELLING_ERROR_SHARE]


def knee(levels: Sequence[Level]) -> Optional[Level]:
    """The last level at which output tokens/s (else requests/s) still grew by more than 5 % per doubling."""
    levels = undisturbed(levels)
    if len({level.by_rate for level in levels}) != 1 or len(levels) < 3:
        return None
    name = "output_throughput" if levels[0].figure("output_throughput") else "request_throughput"
    known = [(level, level.level, level.figure(name)) for level in levels]
    rising = [(level, load, rate) for level, load, rate in known if load and rate and load > 0 and rate > 0]
    last = None
    for (_, load, rate), (level, more, new) in zip(rising, rising[1:]):
        if (new / rate) ** (1 / math.log2(more / load)) - 1 > KNEE_GROWTH:
            last = level
    return last


def parse_slo(text: str) -> Slo:
    """A limit as in `p99_ttft_ms<500`. Raises UserError."""
    match = re.fullmatch(r"\s*([\w.]+)\s*(<=?|>=?)\s*([-+]?[\d.]+(?:e[-+]?\d+)?)\s*", text)
    limit = _finite(match[3]) if match else None
    if match is None or limit is None:
        raise UserError(f"--slo {plain(text)!r}: write it as 'p99_ttft_ms<500'")
    return Slo(canonical(match[1]), match[2], limit)


def slos_of(given: Sequence[str], points: Sequence[Point]) -> list[Slo]:
    """The limits of the command line, else those of the measured configuration."""
    if given:
        return [parse_slo(text) for text in given]
    found: dict[Slo, None] = {}
    for point in points:
        limits = point.config.get("slo")
        for text in limits if isinstance(limits, list) else [limits] if isinstance(limits, str) else []:
            with contextlib.suppress(UserError):
                found[parse_slo(str(text))] = None
    return list(found)


def highest_passing(levels: Sequence[Level], slos: Sequence[Slo]) -> Optional[Level]:
    passing = [level for level in levels if all(slo.holds(level.figure(slo.name)) for slo in slos)]
    return passing[-1] if slos and passing else None


# === 7. Text (pure) ===


class Column(NamedTuple):
    """A column of the sweep table: heading, result key, decimals; stem and rank where it is a percentile."""

    heading: str
    key: str
    decimals: int
    stem: str = ""
    rank: float = 50.0


SWEEP_COLUMNS = (
    Column("req/s", "request_throughput", 2),
    Column("out tok/s", "output_throughput", 1),
    Column("tok/s/user", "median_tokens_per_s_per_user", 1),
    Column("TTFT p50", "p50_ttft_ms", 1, "ttft_ms"),
    Column("TTFT p99", "p99_ttft_ms", 1, "ttft_ms", 99.0),
    Column("TPOT p50", "p50_tpot_ms", 2, "tpot_ms"),
    Column("TPOT p99", "p99_tpot_ms", 2, "tpot_ms", 99.0),
    Column("latency p50", "p50_e2el_ms", 1, "e2el_ms"),
    Column("latency p95", "p95_e2el_ms", 1, "e2el_ms", 95.0),
    Column("latency p99", "p99_e2el_ms", 1, "e2el_ms", 99.0),
    Column("server queue", "server_mean_queue_ms", 1),
    Column("J/token", "gpu_energy_per_output_token_j", 3),
)


def number(value: Optional[float], decimals: int = 1) -> str:
    return "-" if value is None else f"{value:,.{decimals}f}"


def sweep_rows(levels: Sequence[Level], slos: Sequence[Slo]) -> list[list[str]]:
    """Heading and one row a level (with repetitions: median, and least and greatest below); empty columns left out."""
    rows = []
    for name, run_levels in by_run(levels).items():
        bend = knee(run_levels)
        bend = None if bend is run_levels[-1] else bend
        for level in run_levels:
            repeated = f" x{len(level.points)}" if len(level.points) > 1 else ""
            head = [name, f"{level.label}{' req/s' if level.by_rate else ''}{repeated}"]
            ends = [str(level.errors), verdict(level, level is bend, slos)]
            rows.append([*head, *(_sweep_cell(level, column) for column in SWEEP_COLUMNS), *ends])
            if repeated:
                rows += _extremes(level)
    heading = ["run", "level", *(column.heading for column in SWEEP_COLUMNS), "errors", "verdict"]
    kept = [place for place in range(len(heading)) if any(row[place] not in ("-", "") for row in rows)]
    if len(by_run(levels)) == 1:
        kept.remove(0)
    return [[row[place] for place in kept] for row in [heading, *rows]]


def _sweep_cell(level: Level, column: Column) -> str:
    value = level.figure(column.key)
    star = "*" if value is not None and column.stem and level.few(column.stem, column.rank) else ""
    return number(value, column.decimals) + star


def _extremes(level: Level) -> list[list[str]]:
    rows = []
    for name, pick in (("min", min), ("max", max)):
        values = [level.values(column.key) for column in SWEEP_COLUMNS]
        cells = [number(pick(found) if found else None, c.decimals) for found, c in zip(values, SWEEP_COLUMNS)]
        rows.append(["", name, *cells, "", ""])
    return rows


def verdict(level: Level, bend: bool, slos: Sequence[Slo]) -> str:
    words = ["client-bound"] if level.client_bound else []
    words += ["knee"] if bend else []
    failed = [slo for slo in slos if not slo.holds(level.figure(slo.name))]
    words += [f"fails {slo.name}" for slo in failed] or (["passes"] if slos else [])
    return ", ".join(words)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns padded to their widest cell: numbers right, their stars beyond; first column and words left."""
    starred = [any(cell.endswith("*") for cell in column) for column in zip(*rows)]
    hung = [[c if not star or c.endswith("*") else f"{c} " for c, star in zip(row, starred)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*hung)]
    last_is_text = rows[0][-1] == "verdict"
    lines = []
    for row in hung:
        cells = [cell.rjust(width) for cell, width in zip(row, widths)]
        cells[0] = row[0].ljust(widths[0])
        cells[-1] = row[-1] if last_is_text else cells[-1]
        lines.append("  ".join(cells).rstrip())
    return lines


def summary_block(point: Point) -> list[str]:
    """The seven lines that scripts read, as online_bench_openai_async.py prints them."""

    def text(name: str, form: str) -> str:
        value = point.figure(name)
        return "-" if value is None else form.format(value)

    counts = f"Requests (ok/err): {point.count('completed')}/{point.count('failed')}"
    return [
        f"{counts}  Concurrency: {text('max_concurrency', '{:g}')}  Elapsed: {text('duration', '{:.3f}s')}",
        f"Req/s: {text('request_throughput', '{:.2f}')}",
        f"Generated tokens/s: {text('output_throughput', '{:.2f}')}",
        f"Total tokens/s (in+out): {text('total_token_throughput', '{:.2f}')}",
        f"p50 latency: {text('p50_e2el_ms', '{:.1f} ms')}",
        f"p95 latency: {text('p95_e2el_ms', '{:.1f} ms')}",
        f"Avg latency: {text('mean_e2el_ms', '{:.1f} ms')}",
    ]


def distribution_rows(point: Point, verbose: bool) -> list[list[str]]:
    """Heading and a row for each metric that has figures."""
    rows = [["", "mean", *(f"p{rank:g}" for rank in RANKS), "max", "n"]]
    level = Level("", None, [point])
    for metric in METRICS:
        if metric.stem in HIDDEN_STEMS and not verbose:
            continue
        names = ["mean", *(f"p{rank:g}" for rank in RANKS), "max"]
        cells = [number(level.figure(f"{name}_{metric.stem}"), 2).replace(",", "") for name in names]
        if all(cell == "-" for cell in cells):
            continue
        stars = ["", *("*" if level.few(metric.stem, rank) else "" for rank in RANKS), ""]
        cells = [cell if cell == "-" else cell + star for cell, star in zip(cells, stars)]
        count = point.figure(count_key(metric.stem))
        label = "ITL (ms)" if metric.stem == "itl_ms" and point.figures.get("gaps_are_of_tokens") else metric.label
        rows.append([label, *cells, "-" if count is None else f"{count:.0f}"])
    return rows


def group_rows(requests: Requests) -> Iterator[list[list[str]]]:
    """A table for labels, servers and turns each, where there are 2 to 12 of them."""
    keys: dict[str, NDArray[Any]] = {
        name: requests.groups[name] for name in ("label", "server") if name in requests.groups
    }
    if requests.has("turn"):
        keys["turn"] = requests.columns["turn"]
    for name, values in keys.items():
        distinct = sorted({value for value in values.tolist() if value not in ("", None) and value == value})
        if not 2 <= len(distinct) <= MOST_GROUPS:
            continue
        rows = [[name, "ok", "errors", "TTFT p50", "TTFT p99", "latency p50", "latency p99", "cached %"]]
        for value in distinct:
            chosen = requests.take(values == value)
            ranks = [_percentile(chosen, column, rank) for column in ("ttft_ms", "latency_ms") for rank in (50, 99)]
            prompt = chosen.sample("prompt_tokens").sum()
            cached = (
                chosen.sample("cached_tokens").sum() / prompt * 100 if prompt and chosen.has("cached_tokens") else None
            )
            ok = int(chosen.ok.sum())
            label = f"{value:g}" if isinstance(value, float) else str(value)
            rows.append([label, str(ok), str(len(chosen) - ok), *map(number, ranks), number(cached)])
        yield rows


def _percentile(requests: Requests, column: str, rank: float) -> Optional[float]:
    sample = requests.sample(column)
    return float(np.percentile(sample, rank)) if len(sample) else None


def error_lines(point: Point) -> list[str]:
    """Failures by class, the most frequent first."""
    if point.requests is not None and "error_kind" in point.requests.groups:
        failed = ~point.requests.ok
        groups = point.requests.groups
        kinds = [f"{s}/{k}" for s, k in zip(groups["status"][failed], groups["error_kind"][failed])]
        counts = Counter(kinds)
    else:
        given = point.figures.get("errors_by_kind")
        given = given if isinstance(given, dict) else {}
        counts = Counter({str(kind): int(_finite(count) or 0) for kind, count in given.items()})
    return [f"Errors: {count} x {plain(str(kind))}" for kind, count in counts.most_common()]


def side_figures(point: Point) -> dict[str, str]:
    """What the server and the GPU said, one value each."""
    names = sorted(name for name in point.figures if name.startswith(("server_", "gpu_")))
    values = {name: point.figures[name] for name in names}
    return {name: _cell(value) for name, value in values.items() if not isinstance(value, (list, dict))}


def config_of(point: Point) -> dict[str, str]:
    """Every option in force, as text."""
    given = {key: point.figures[key] for key in ("model_id", "date", "stop_reason") if point.figures.get(key)}
    return {key: _cell(value) for key, value in {**given, **point.config}.items()}


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return plain(json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else str(value))


def report_lines(point: Point, verbose: bool) -> list[str]:
    """All that is known of one point: seven lines, tables, errors, warnings, configuration."""
    lines = [*summary_block(point), ""]
    rows = distribution_rows(point, verbose)
    lines += table(rows) if len(rows) > 1 else []
    if any(cell.endswith("*") for row in rows for cell in row):
        lines.append("* too few requests for this percentile")
    for groups in group_rows(point.requests) if point.requests is not None else ():
        lines += ["", *table(groups)]
    if point.requests is not None and not point.requests.has("sent_s"):
        lines.append("No send times in the file: rates and numbers in flight are left out")
    lines += error_lines(point)
    lines += [f"{name}: {value}" for name, value in side_figures(point).items()]
    lines += [f"WARNING: {line}" for line in point.warnings]
    config = config_of(point)
    if config:
        width = max(map(len, config))
        lines += ["", "=== Benchmark Configuration ===", *(f"{name:>{width}}: {config[name]}" for name in config)]
    return lines


def table_note(rows: Sequence[Sequence[str]]) -> str:
    few = any(cell.endswith("*") for row in rows for cell in row)
    return "Latencies in ms." + (" * too few requests for this percentile." if few else "")


def sweep_lines(levels: Sequence[Level], slos: Sequence[Slo]) -> list[str]:
    """The sweep table, what it shows in words, and the warnings."""
    rows = sweep_rows(levels, slos)
    warnings = [f"WARNING: {line}" for line in warning_lines(levels)]
    return [*table(rows), table_note(rows), "", *findings(levels, slos), *warnings]


def warning_lines(levels: Sequence[Level]) -> list[str]:
    """Each warning once, as the last point that has it words it, and where else it holds."""
    alike: dict[str, list[tuple[str, str]]] = {}
    points = [(level.title_of(point), point) for level in levels for point in level.points]
    for title, point in points:
        for line in (line for line in point.warnings if not line.startswith("client-bound")):  # said by findings()
            alike.setdefault(re.sub(r"[\d.]+", "", line), []).append((title, line))
    lines = []
    for found in alike.values():
        elsewhere = list(dict.fromkeys(title for title, _ in found[:-1]))
        also = f" (likewise: {', '.join(elsewhere[:4])}{', ...' if elsewhere[4:] else ''})" if elsewhere else ""
        lines.append((f"{found[-1][0]}: " if len(points) > 1 else "") + found[-1][1] + also)
    return lines


def findings(levels: Sequence[Level], slos: Sequence[Slo]) -> list[str]:
    """What the runs show, a sentence each: where the client was the limit, most throughput and knee, the highest
    passing level, tools that count otherwise."""
    lines = []
    for name, run_levels in by_run(levels).items():
        unit = "req/s" if run_levels[0].by_rate else "in flight"
        bound = [(level.label, level.client_bound) for level in run_levels if level.client_bound]
        if bound:
            where = f" at {', '.join(label for label, _ in bound)} {unit}" if len(run_levels) > 1 else ""
            lines.append(f"{name} is client-bound{where}: {bound[-1][1]}")
        lines += _peak(name, run_levels, unit) if len(run_levels) > 1 else []
        lines += [f"{name}: {_limits_kept(run_levels, slos)}"] if slos else []
    notes = dict.fromkeys((point.tool, point.note) for level in levels for point in level.points if point.note)
    return lines + [f"{tool} counts otherwise: {note}" for tool, note in notes]


def _limits_kept(levels: Sequence[Level], slos: Sequence[Slo]) -> str:
    """The highest level within all limits, and whether those below are."""
    limits = " and ".join(f"{slo.name} {slo.op} {slo.limit:g}" for slo in slos)
    best = highest_passing(levels, slos)
    if len(levels) == 1:
        return f"{limits} {'held' if best else 'not held'}"
    if best is None:
        return f"none holds {limits}"
    unit = "req/s" if best.by_rate else "in flight"
    below = levels[: list(levels).index(best)]
    failing = [level.label for level in below if highest_passing([level], slos) is None]
    if failing:
        return f"{best.label} {unit} is the highest to hold {limits}, but {', '.join(failing)} did not"
    return f"up to {best.label} {unit} hold {limits}"


def _peak(name: str, levels: Sequence[Level], unit: str) -> list[str]:
    levels = undisturbed(levels) or levels
    best = max(levels, key=lambda level: level.figure("output_throughput") or 0.0)
    if not best.figure("output_throughput"):
        return []
    line = f"{name}: most output {number(best.figure('output_throughput'), 0)} tokens/s, at {best.label} {unit}"
    bend = knee(levels)
    if bend is not None and bend is levels[-1]:
        return [f"{line}; still growing there"]
    return [line + (f"; knee at {bend.label} {unit} (beyond it less than 5 % more per doubling)" if bend else "")]


def histogram(sample: Floats, width: int, ascii_only: bool) -> list[str]:
    """Bars of equal bins from the least value to p99, one more for the rest; counts beside."""
    top = float(np.percentile(sample, 99)) if len(sample) >= 100 else float(sample.max())
    low = float(sample.min())
    edges = np.linspace(low, top if top > low else low + max(abs(low), 1.0) * 1e-3, 13)
    counts = np.histogram(sample, edges)[0].tolist()
    labels = [f"{a:.1f} - {b:.1f}" for a, b in zip(edges, edges[1:])]
    beyond = len(sample) - sum(counts)
    if beyond:
        counts.append(beyond)
        labels.append(f"{edges[-1]:.1f} - {sample.max():.1f}")
    label_width, count_width = max(map(len, labels)), len(str(max(counts)))
    room = max(5, width - label_width - count_width - 4)
    bars = [_bar(count / max(counts) * room, ascii_only) for count in counts]
    return [f"{label:>{label_width}}  {count:>{count_width}}  {bar}" for label, count, bar in zip(labels, counts, bars)]


def _bar(length: float, ascii_only: bool) -> str:
    if ascii_only:
        return "#" * (round(length) or (1 if length else 0))
    eighths = max(1, round(length * 8)) if length else 0
    parts: list[str] = ["", *"▏▎▍▌▋▊▉"]
    return "█" * (eighths // 8) + parts[eighths % 8]


# === 8. Comparison (pure) ===


class Compared(NamedTuple):
    """A figure that runs are compared by: result key, words, whether more is better."""

    key: str
    words: str
    more_is_better: bool = False


COMPARED = (
    Compared("output_throughput", "output tokens/s", True),
    Compared("request_throughput", "requests/s", True),
    Compared("median_tokens_per_s_per_user", "tokens/s per user p50", True),
    Compared("p50_ttft_ms", "TTFT p50"),
    Compared("p99_ttft_ms", "TTFT p99"),
    Compared("p50_tpot_ms", "TPOT p50"),
    Compared("p99_tpot_ms", "TPOT p99"),
    Compared("p50_e2el_ms", "latency p50"),
    Compared("p99_e2el_ms", "latency p99"),
)
RATE_COLUMNS = {"output_throughput": "completion_tokens", "request_throughput": ""}


class Difference(NamedTuple):
    """A figure in two runs; `ratio` is b / a, `plus_minus` half its 99 % interval, None where noise is unknown."""

    what: Compared
    a: float
    b: float
    plus_minus: Optional[float]

    @property
    def ratio(self) -> float:
        return self.b / self.a

    @property
    def within_noise(self) -> Optional[bool]:
        """Whether chance explains it at the 99 % level; None where noise is unknown."""
        if self.plus_minus is None:
            return None
        return abs(math.log(self.ratio)) <= math.log1p(self.plus_minus / self.ratio)

    @property
    def times(self) -> str:
        """`1.18 ± 0.03`: the greater over the lesser."""
        ratio, scale = max(self.ratio, 1 / self.ratio), max(1.0, 1 / self.ratio**2)
        return f"{ratio:.2f}" + ("" if self.plus_minus is None else f" ± {self.plus_minus * scale:.2f}")

    @property
    def verdict(self) -> str:
        if self.within_noise is None:
            return "noise unknown"
        if self.within_noise:
            return "within noise"
        return f"{self.times} times {self.direction}"

    @property
    def direction(self) -> str:
        return "faster" if (self.ratio > 1) == self.what.more_is_better else "slower"


def noises_of(level: Level, what: Compared) -> list[Noise]:
    """The independent parts of a figure's noise: over repetitions where there are any, else over the requests, and
    the assumed difference between runs. Empty where neither is known: what a client that was the limit adds to one
    run, its requests do not show."""
    values = [value for value in level.values(what.key) if value > 0]
    if len(values) > 1:
        return [noise_of_repetitions(values)]
    if level.client_bound:
        return []
    noise = _noise_within(level.points[0], what.key)
    return [] if noise is None else [noise, Noise(BETWEEN_RUNS, math.inf)]


def _noise_within(point: Point, key: str) -> Optional[Noise]:
    requests = point.requests
    if requests is None or not requests.ok.any():
        return None
    n, wave = int(requests.ok.sum()), point.figure("max_concurrent_requests") or 1
    block = int(max(wave, min(2 * wave, n / 20), n ** (1 / 3)))
    if key in RATE_COLUMNS:
        return _rate_noise(requests, RATE_COLUMNS[key], block)
    rank, _, stem = key.replace("median_", "p50_").partition("_")
    sample = sample_of(requests, BY_STEM[stem])
    if len(sample) < max(1, LEAST_N.get(float(rank[1:]), 0)):
        return None
    return block_bootstrap([sample], block, lambda drawn: np.percentile(drawn, float(rank[1:]), axis=1))


def _rate_noise(requests: Requests, column: str, block: int) -> Optional[Noise]:
    """A rate is a sum of amounts over a time. In a closed loop that time is the sum of the latencies over the mean
    number in flight (Little, 1961), which the concurrency fixes; in an open loop, the sum of the times between
    completions, the first wave and the last left out: there nothing ends, or nothing begins."""
    done = requests.column("done_s")
    chosen = requests.ok & np.isfinite(done)
    amounts = (requests.column(column) if column else np.ones(len(requests)))[chosen]
    times = requests.column("latency_ms")[chosen]
    if requests.has("scheduled_s"):
        amounts, times = amounts[block:-block], np.diff(done[chosen])[block - 1 : -block]
    if not len(amounts):
        return None
    return block_bootstrap([amounts, times], block, lambda n, t: n.sum(axis=1) / t.sum(axis=1))


def differences(a: Level, b: Level, compared: Sequence[Compared] = COMPARED) -> list[Difference]:
    """Every figure that both have; of repetitions the geometric mean."""
    found = []
    for what in compared:
        values = [[value for value in level.values(what.key) if value > 0] for level in (a, b)]
        if not all(values):
            continue
        means = [statistics.geometric_mean(each) for each in values]
        noises = [noises_of(level, what) for level in (a, b)]
        plus_minus = None
        if all(noises):
            plus_minus = means[1] / means[0] * math.expm1(min(half_width([*noises[0], *noises[1]]), 50.0))
        found.append(Difference(what, means[0], means[1], plus_minus))
    return found


def sentence(name: str, found: Sequence[Difference]) -> str:
    """`B is 1.18 ± 0.03 times faster in output tokens/s; TTFT p99 differs within noise`. Requests/s only where there
    are no tokens/s, whose story it repeats."""
    told = [d for d in found if d.what.key != "request_throughput"] or list(found)
    real = [f"{d.times} times {d.direction} in {d.what.words}" for d in told if d.within_noise is False]
    same = [d.what.words for d in told if d.within_noise]
    unknown = [d.what.words for d in told if d.within_noise is None]
    parts = [f"{name} is {_listed(real)}"] if real else []
    parts += [f"{_listed(same)} {'differs' if len(same) == 1 else 'differ'} within noise"] if same else []
    parts += [f"noise unknown for {_listed(unknown)}"] if unknown else []
    return "; ".join(parts) or f"{name}: no figure in common"


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def not_comparable(a: Level, b: Level) -> list[str]:
    """Why figures of the two mean different things; one line each."""
    one, two = a.points[0], b.points[0]
    lines = []
    for key, words in (("model_id", "model"), ("endpoint_type", "endpoint")):
        values = [plain(str(point.figures.get(key)), 60) for point in (one, two) if point.figures.get(key)]
        if len(values) == 2 and values[0] != values[1]:
            lines.append(f"another {words}: {values[0]}, {values[1]}")
    if a.by_rate != b.by_rate or a.level != b.level:
        lines.append(f"another load: {a.title}, {b.title}")
    for stem, words in (("prompt_tokens", "prompt"), ("output_tokens", "output")):
        lengths = [level.figure(f"mean_{stem}") for level in (a, b)]
        if lengths[0] and lengths[1] and abs(lengths[1] / lengths[0] - 1) > SAME_LENGTH:
            lines.append(f"other {words} lengths: {lengths[0]:.1f} and {lengths[1]:.1f} tokens on average")
    if (a.figure("p50_ttft_ms") is None) != (b.figure("p50_ttft_ms") is None):
        lines.append("one was streamed, the other not")
    notes = {point.tool: point.note for point in (one, two) if one.tool != two.tool and point.note}
    return lines + [f"{tool} counts otherwise: {note}" for tool, note in notes.items()]


def distrusted(level: Level) -> list[str]:
    """What stands between a run's figures and its server."""
    rate = level.figure("error_rate")
    lines = [f"{level.run} measured its client, not the server: {level.client_bound}"] if level.client_bound else []
    lines += [f"{level.run}: {rate:.1%} of its requests failed and are in no figure"] if rate else []
    cut = sum(point.count("aborted") for point in level.points)
    return lines + ([f"{level.run}: {cut} of its requests were cut off and are in no figure"] if cut else [])


def pairs_of(base: Sequence[Level], other: Sequence[Level]) -> list[tuple[Level, Level]]:
    """Levels that both runs have; two single points are compared whatever their level."""
    if len(base) == 1 and len(other) == 1:
        return [(base[0], other[0])]
    known = {(level.level, level.by_rate): level for level in base}
    return [(known[key], level) for level in other if (key := (level.level, level.by_rate)) in known]


def comparison_lines(a: Level, b: Level) -> list[str]:
    """What is not comparable, the figures side by side, and the difference in words."""
    found = differences(a, b)
    lines = [f"Not comparable: {line}" for line in [*not_comparable(a, b), *distrusted(a), *distrusted(b)]]
    heading = ["", a.run, b.run, "ratio", "±", "verdict"]
    rows = [
        [d.what.words, number(d.a, 2), number(d.b, 2), f"{d.ratio:.3f}", number(d.plus_minus, 3), d.verdict]
        for d in found
    ]
    lines += table([heading, *rows])
    return [*lines, f"{sentence(b.run, found)}."]


class FailIf(NamedTuple):
    """A condition on a change from the first run: `p99_ttft_ms > +10%`, or `error_rate > +0.01` (no %: absolute)."""

    text: str
    name: str
    op: str
    change: float
    relative: bool

    def verdict(self, a: Level, b: Level) -> tuple[bool, str]:
        """(holds, one line); a figure that was not measured counts as holding, for a gate must not pass unseen."""
        values = [level.figure(self.name) for level in (a, b)]
        if values[0] is None or values[1] is None:
            return True, f"{self.text}: FAILED, not measured in {a.run if values[0] is None else b.run}"
        if self.relative and not values[0]:
            return True, f"{self.text}: FAILED, it is 0 in {a.run}"
        change = (values[1] / values[0] - 1) * 100 if self.relative else values[1] - values[0]
        holds = OPERATORS[self.op](change, self.change)
        unit = "%" if self.relative else ""
        word = "FAILED" if holds else "passed"
        return holds, f"{self.text}: {word}, {number(values[0], 3)} -> {number(values[1], 3)} ({change:+.2f}{unit})"


KNOWN_RATES = (
    *("output_throughput", "request_throughput", "total_token_throughput", "request_goodput", "error_rate"),
    *("duration", "completed", "failed"),
)


def parse_fail_if(text: str, points: Sequence[Point]) -> FailIf:
    """Raises UserError where the form is wrong or the figure has a name that nothing has."""
    match = re.fullmatch(r"\s*([\w.]+)\s*(<=?|>=?)\s*([-+]?\d+(?:\.\d+)?)\s*(%?)\s*", text)
    if match is None:
        raise UserError(f"--fail-if {plain(text)!r}: write it as 'p99_ttft_ms > +10%'")
    name = canonical(match[1])
    stems = "|".join(BY_STEM)
    measured = {key for point in points for key, value in point.figures.items() if _finite(value) is not None}
    formed = re.fullmatch(rf"(mean|median|std|min|max|p\d+(\.\d+)?)_({stems})", name)
    if not formed and name not in measured and name not in KNOWN_RATES:
        names = [*measured, *KNOWN_RATES, *(what.key for what in COMPARED)]
        near = ", ".join(difflib.get_close_matches(name, sorted(set(names)), 3, 0.3))
        raise UserError(f"--fail-if {plain(text)!r}: no figure is called {match[1]}; nearest: {near}")
    return FailIf(plain(text), name, match[2], float(match[3]), bool(match[4]))


# === 9. Pictures (pure) ===
#
# A picture is a plotly figure as plain data. "@name" stands for a colour of the theme, which the page fills in.


@dataclass
class Picture:
    """A figure with a heading that says what to see. `wide`: it takes the whole width of the page."""

    key: str
    title: str
    caption: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    height: int = 420
    wide: bool = False


SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")
HUES = len(SYMBOLS)
CORNERS = ("top right", "bottom left")  # of a point, where its label stands: clear of its falling line
SHADES = 10  # of one run's levels, from low to high
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")


def shown(text: str) -> str:
    """Text for plotly, which reads tags in it: a server could have written it."""
    return html.escape(text, quote=False)


def numbers(values: Iterable[float], digits: int = 6) -> list[Optional[float]]:
    """Floats for JSON, rounded to so many significant digits; None where not finite."""
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in values]


def trace(mode: str, x: Sequence[Any], y: Sequence[Any], colour: str, hover: str) -> dict[str, Any]:
    """A scatter trace of one colour."""
    look = {"line": {"color": colour, "width": 2}, "marker": {"color": colour, "size": 8}}
    return {"type": "scatter", "mode": mode, "x": x, "y": y, "hovertemplate": f"{hover}<extra></extra>", **look}


def axis(title: str, **more: Any) -> dict[str, Any]:
    look = {"gridcolor": "@grid", "linecolor": "@grid", "zerolinecolor": "@grid", "automargin": True}
    steps = (
        {"dtick": "D2", "tickformat": ",~r"} if more.get("type") == "log" and "tickvals" not in more else {}
    )  # 1, 2, 5
    return {"title": {"text": title, "standoff": 8}, **look, **steps, **more}


def value_axis(title: str, values: Floats) -> dict[str, Any]:
    """From 0; logarithmic where the greatest value would press the others flat."""
    above = values[values > 0]
    spread = len(above) > 0 and float(above.max()) > 30 * float(np.median(above))
    return axis(title, type="log") if spread else axis(title, rangemode="tozero")


def note_at(text: str, colour: str = "@ink", **where: Any) -> dict[str, Any]:
    """Words in a picture, left-aligned, above the place they are put at."""
    look = {"showarrow": False, "xanchor": "left", "yanchor": "bottom", "font": {"color": colour, "size": 12}}
    return {"text": text, "xref": "paper", "x": 0, **look, **where}


def layout(**more: Any) -> dict[str, Any]:
    hover = {"bgcolor": "@paper", "bordercolor": "@grid", "font": {"color": "@ink"}}
    return {
        "paper_bgcolor": "@paper",
        "plot_bgcolor": "@paper",
        "hovermode": "closest",
        "hoverlabel": hover,
        "font": {"color": "@ink", "family": "system-ui, sans-serif", "size": 13},
        "margin": {"l": 8, "r": 12, "t": 28, "b": 8},  # the button to save a picture stands above it
        "legend": {"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"},
        **more,
    }


def pareto(levels: Sequence[Level]) -> Optional[Picture]:
    """Throughput of the server, per GPU where known, against the speed that each user sees; a line for each run."""
    per_gpu = all(level.gpus for level in levels)
    by_tpot = not all(level.figure("median_tokens_per_s_per_user") for level in levels)
    known = [level for level in levels if _user_speed(level, by_tpot) and level.figure("output_throughput")]
    if len(known) < 2:
        return None
    data = []
    for place, (name, run_levels) in enumerate(by_run(known).items()):
        x = numbers(_user_speed(level, by_tpot) or 0.0 for level in run_levels)
        totals = [(level.figure("output_throughput") or 0.0, level.gpus if per_gpu else 1.0) for level in run_levels]
        y = numbers(total / (gpus or 1.0) for total, gpus in totals)
        hover = f"{shown(name)} at %{{text}}: %{{y:,.0f}} tokens/s in all, %{{x:.1f}} each"
        line = trace("lines+markers+text", x, y, f"@c{place % HUES}", hover)
        line["marker"]["symbol"] = SYMBOLS[place % HUES]
        words = {
            "text": [level.label for level in run_levels],
            "textposition": CORNERS[place % len(CORNERS)],
            "cliponaxis": False,
        }
        data.append({**line, **words, "name": shown(name), "textfont": {"color": f"@c{place % HUES}", "size": 12}})
    user = "1000 / median TPOT" if by_tpot else "median over requests of output tokens / latency"
    load_words = "request rate" if levels[0].by_rate else "requests in flight"
    axes = {
        "xaxis": axis("tokens/s per user", rangemode="tozero"),
        "yaxis": axis(f"output tokens/s {'per GPU' if per_gpu else 'of the server'}", rangemode="tozero"),
    }
    title = "Throughput against speed per user: up and to the right is better"
    caption = f"Each point is one load, labelled with its {load_words}. Tokens/s per user: {user}."
    return Picture("pareto", title, caption, data, layout(**axes, showlegend=len(data) > 1), 480, True)


def _user_speed(level: Level, by_tpot: bool) -> Optional[float]:
    tpot = level.figure("median_tpot_ms")
    if by_tpot:
        return 1e3 / tpot if tpot else None
    return level.figure("median_tokens_per_s_per_user")


def against_load(levels: Sequence[Level], metric: Metric, slos: Sequence[Slo]) -> Optional[Picture]:
    """p50 and p99 of a metric against the level, limits as lines. None where no run has two levels."""
    key = f"p50_{metric.stem}"
    runs = by_run([level for level in levels if level.figure(key) and level.level])
    if not any(len(run_levels) > 1 for run_levels in runs.values()):
        return None
    lines = [(place, run_levels, rank) for place, run_levels in enumerate(runs.values()) for rank in (50, 99)]
    data = [_load_trace(run_levels, metric, place, rank) for place, run_levels, rank in lines]
    limits = [slo for slo in slos if slo.name.endswith(f"_{metric.stem}")]
    values = [value for line in data for value in line["y"] if value] + [slo.limit for slo in limits if slo.limit > 0]
    log = max(values) / min(values) > 20
    ticks = sorted({level.level for run_levels in runs.values() for level in run_levels if level.level})
    roomy = [tick for place, tick in enumerate(ticks) if not place or tick / ticks[place - 1] > 1.25]
    unit = "request rate (1/s)" if levels[0].by_rate else "requests in flight"
    rule = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "line": {"color": "@limit", "width": 2, "dash": "dot"}}
    made = layout(
        xaxis=axis(unit, type="log", tickvals=roomy, ticktext=[f"{tick:g}" for tick in roomy]),
        yaxis=axis(metric.label, **({"type": "log"} if log else {"rangemode": "tozero"})),
        shapes=[{**rule, "y0": slo.limit, "y1": slo.limit} for slo in limits],
        annotations=[_limit_words(slo, log) for slo in limits],
    )
    caption = "Solid: p50, dashed: p99." + (" Dotted: the limits." if limits else "")
    return Picture(f"load-{metric.stem}", _load_title(runs, metric, limits, slos), caption, data, made)


def _load_trace(levels: Sequence[Level], metric: Metric, place: int, rank: int) -> dict[str, Any]:
    name = shown(f"{levels[0].run} p{rank}")
    values = [level.figure(f"p{rank}_{metric.stem}") for level in levels]
    y = numbers(math.nan if value is None else value for value in values)
    hover = f"{name} at %{{x:g}}: %{{y:,.1f}} ms"
    line = trace("lines+markers", [level.level for level in levels], y, f"@c{place % HUES}", hover)
    line["line"]["dash"] = "solid" if rank == 50 else "dash"
    line["marker"]["symbol"] = SYMBOLS[place % HUES] + ("" if rank == 50 else "-open")
    return {**line, "name": name}


def _limit_words(slo: Slo, log: bool) -> dict[str, Any]:
    place = math.log10(slo.limit) if log and slo.limit > 0 else slo.limit
    words = shown(f"{slo.name.partition('_')[0]} {slo.op} {slo.limit:g} ms")
    return note_at(words, "@limit", x=0.02, y=place, bgcolor="@paper")


def _load_title(runs: Mapping[str, Sequence[Level]], metric: Metric, limits: Sequence[Slo], slos: Sequence[Slo]) -> str:
    """What to see: the highest load that keeps the limits, else from where to where p99 goes."""
    first = next(iter(runs.values()))
    unit = "req/s" if first[0].by_rate else "in flight"
    if limits:
        best = {name: highest_passing(run_levels, slos) for name, run_levels in runs.items()}
        words = [f"{f'{name}: ' if len(best) > 1 else ''}{p.label if p else 'none'}" for name, p in best.items()]
        return f"{metric.short} against load: highest load within all limits is {', '.join(words)} {unit}"
    if len(runs) > 1:
        return f"{metric.short} against load: lower and flatter is better"
    ends = [f"{number(level.figure(f'p99_{metric.stem}'))} ms at {level.label}" for level in (first[0], first[-1])]
    return f"{metric.short} against load: p99 {' and '.join(ends)} {unit}"


class Panel(NamedTuple):
    """One strip of the picture over time, from top to bottom: heading, trace, its axis, and a note for the caption."""

    heading: str
    line: dict[str, Any]
    axis: dict[str, Any]
    note: str = ""


def over_time(point: Point, key: str) -> Optional[Picture]:
    """In flight, tokens/s, a dot for each request, errors, and what the server said, on one time axis."""
    requests = point.requests
    if requests is None or not len(requests.sample("done_s")):
        return None
    start, end = float(np.nanmin(requests.column("sent_s"))), float(requests.sample("done_s").max())
    edges = np.linspace(start, end, BINS + 1)
    made = [in_flight_panel(requests, edges), tokens_panel(requests, edges), dots_panel(requests)]
    panels = [panel for panel in [*made, errors_panel(requests), *series_panels(point)] if panel is not None]
    at_once = (point.figure("max_concurrency"), point.figure("max_concurrent_requests"))
    window = steady_window(requests, min((number for number in at_once if number), default=1))
    shaded = "Shaded: the steady window, from the end of the first wave to the last send." if window else ""
    notes = [shaded, *(panel.note for panel in panels)]
    notes += ["" if made[1] else "Tokens over time are left out: the replies were not streamed."]
    steady = f"steady for {window[1] - window[0]:.1f} of {end - start:.1f} s" if window else "no steady state"
    failed = point.count("failed")
    title = f"Over time: {steady}, {failed if failed else 'no'} error{'' if failed == 1 else 's'}"
    caption = " ".join(note for note in notes if note)
    frame = stacked(panels, window, (start, end))
    return Picture(key, title, caption, [panel.line for panel in panels], frame, 150 + 165 * len(panels), True)


def stacked(
    panels: Sequence[Panel], window: Optional[tuple[float, float]], span: tuple[float, float]
) -> dict[str, Any]:
    """The layout of the panels, one above the other; each trace is bound to its axis here."""
    gap = 0.26 / len(panels)
    height = (1 - gap * (len(panels) - 0.4)) / len(panels)
    bottom = axis("seconds from the start", anchor=f"y{len(panels)}", range=list(span))
    made = layout(xaxis=bottom, showlegend=False, annotations=[])
    for place, panel in enumerate(panels):
        top = 1 - gap * 0.6 - place * (height + gap)
        panel.line.update(yaxis=f"y{place + 1}", xaxis="x")
        made[f"yaxis{place + 1 if place else ''}"] = {**panel.axis, "domain": [max(0.0, top - height), top]}
        made["annotations"].append(note_at(f"<b>{panel.heading}</b>", yref="paper", y=top))
    if window:
        band = {"type": "rect", "xref": "x", "yref": "paper", "x0": window[0], "x1": window[1], "y0": 0, "y1": 1}
        made["shapes"] = [{**band, "fillcolor": "@band", "line": {"width": 0}, "layer": "below"}]
    return made


def area(edges: Floats, values: Floats, colour: str, unit: str) -> dict[str, Any]:
    middle = numbers((edges[:-1] + edges[1:]) / 2)
    line = trace("lines", middle, numbers(values), colour, f"%{{x:.2f}} s: %{{y:,.1f}} {unit}")
    return {**line, "fill": "tozeroy", "line": {"color": colour, "width": 1.5, "shape": "hvh"}}


def in_flight_panel(requests: Requests, edges: Floats) -> Panel:
    starts, ends = under_way(requests)
    line = area(edges, mean_rate(starts, ends, np.ones(len(starts)), edges), "@c0", "in flight")
    return Panel(
        "in flight", line, axis("", rangemode="tozero"), f"Each step is a mean over {edges[1] - edges[0]:.2g} s."
    )


def tokens_panel(requests: Requests, edges: Floats) -> Optional[Panel]:
    """Exact where every chunk was kept; else each streamed reply's tokens evenly from its first to its last."""
    if requests.token_s is not None and len(requests.token_s):
        values = np.histogram(requests.token_s, edges)[0] / np.diff(edges)
        return Panel("output chunks/s", area(edges, values, "@c2", "chunks/s"), axis("", rangemode="tozero"))
    starts, ends, speed = generated(requests)
    if not len(starts):
        return None
    line = area(edges, mean_rate(starts, ends, speed, edges), "@c2", "tokens/s")
    note = "Tokens/s: each reply's tokens spread evenly from its first to its last."
    return Panel("output tokens/s", line, axis("", rangemode="tozero"), note)


def dots_panel(requests: Requests) -> Panel:
    """A dot for each request's TTFT, or latency where it was not streamed; thinned, extremes kept, and said."""
    metric = BY_STEM["ttft_ms" if len(requests.sample("ttft_ms")) else "e2el_ms"]
    known = requests.ok & np.isfinite(requests.column(metric.column)) & np.isfinite(requests.column("sent_s"))
    sent, values = requests.column("sent_s")[known], requests.column(metric.column)[known]
    kept = thin(sent, values, MOST_DOTS)
    hover = f"sent at %{{x:.2f}} s: {metric.short} %{{y:,.1f}} ms"
    dots = trace("markers", numbers(sent[kept]), numbers(values[kept], 5), "@c0", hover)
    dots["marker"].update(size=4 if len(kept) > 500 else 6, opacity=0.6)
    thinned = f"{len(kept):,} of {len(values):,} requests drawn: of each stretch the least, the greatest and one more."
    note = thinned if len(kept) < len(values) else ""
    return Panel(f"{metric.label}, a dot a request", dots, value_axis("", values), note)


def errors_panel(requests: Requests) -> Optional[Panel]:
    sent = requests.column("sent_s")
    failed = np.flatnonzero(~requests.ok & np.isfinite(sent))
    if not len(failed):
        return None
    places = failed[:: max(1, math.ceil(len(failed) / MOST_DOTS))]
    names = requests.groups.get("error_kind", np.full(len(requests), "error", dtype=object))
    frequent = {kind for kind, _ in Counter(names[failed].tolist()).most_common(5)}
    kinds = [shown(str(names[place])) if names[place] in frequent else "other" for place in places]
    marks = trace("markers", numbers(sent[places]), kinds, "@limit", "%{y} at %{x:.2f} s")
    marks["marker"]["symbol"] = "x"
    return Panel(f"errors: {int((~requests.ok).sum()):,}", marks, axis("", type="category"))


def series_panels(point: Point) -> list[Panel]:
    """What the server or the GPU said over time: `server_*` and `gpu_*` lists of [seconds, value], six at most."""
    panels = []
    for name, given in sorted(point.figures.items()):
        if not name.startswith(("server_", "gpu_")):
            continue
        for label, pairs in given.items() if isinstance(given, dict) else [(name, given)]:
            rows = pairs if isinstance(pairs, list) else []
            stamps = [[_finite(cell) for cell in pair] for pair in rows if isinstance(pair, list) and len(pair) == 2]
            drawn = [(pair[0], pair[1]) for pair in stamps if None not in pair]
            if len(drawn) > 1:
                x, y = zip(*drawn)
                line = trace("lines", list(x), list(y), "@c3", "%{x:.1f} s: %{y:,.4~g}")
                panels.append(Panel(shown(plain(str(label), 60)), line, axis("", rangemode="tozero")))
    return panels[:6]


def distributions(levels: Sequence[Level]) -> Iterator[Picture]:
    """Empirical distribution functions, a picture for each metric, a curve for each point."""
    known = [level for level in levels if any(point.requests is not None for point in level.points)]
    runs = by_run(known)
    if len(runs) > 1:  # each at its highest load, which all have where there is one
        common = set.intersection(*({level.level for level in run_levels} for run_levels in runs.values()))
        chosen = [[lv for lv in run if lv.level in common or not common][-1] for run in runs.values()][:MOST_CURVES]
    else:
        chosen = [known[p] for p in sorted({round(p) for p in np.linspace(0, len(known) - 1, MOST_CURVES)}) if known]
    for stem in ("e2el_ms", "ttft_ms", "tpot_ms", "itl_ms"):
        curves = [(level, pooled(level, BY_STEM[stem])) for level in chosen]
        curves = [(level, sample) for level, sample in curves if len(sample)]
        if curves:
            yield _ecdf_picture(BY_STEM[stem], curves, len(known) - len(chosen))


def pooled(level: Level, metric: Metric) -> Floats:
    samples = [sample_of(point.requests, metric) for point in level.points if point.requests is not None]
    return np.concatenate(samples or [np.empty(0)])


def _ecdf_picture(metric: Metric, curves: Sequence[tuple[Level, Floats]], left_out: int) -> Picture:
    runs = by_run([level for level, _ in curves])
    data = []
    for place, (level, sample) in enumerate(curves):
        x, y = ecdf(sample)
        name, colour, dash = _curve_look(runs, level, place)
        line = trace("lines", numbers(x, 5), numbers(y * 100, 5), colour, f"{name}: %{{y:.2f}} % within %{{x:,.1f}} ms")
        line["line"].update(dash=dash, shape="hv")
        data.append({**line, "name": name})
    unit = "req/s" if curves[0][0].by_rate else "in flight"
    caption = "Read up from a time to the share that took no longer."
    if len(runs) > 1:
        caption += f" At {', '.join(dict.fromkeys(level.label for level, _ in curves))} {unit}."
    elif len(curves) > 1:
        caption += f" A curve for each load ({unit})"
        caption += f"; {left_out} between are left out." if left_out else "."
    across = {**value_axis(metric.label, np.concatenate([sample for _, sample in curves])), "rangemode": "normal"}
    upward = axis(f"% of {'gaps' if metric.stem == 'itl_ms' else 'requests'}", range=[0, 101])
    made = layout(xaxis=across, yaxis=upward, showlegend=len(data) > 1)
    if len(curves) > 1:
        title = f"How {metric.words} spreads: further left and steeper is better"
    else:
        middle, high = (number(float(value)) for value in np.percentile(curves[0][1], [50, 99]))
        title = f"How {metric.words} spreads: half within {middle} ms, 99 % within {high} ms"
    return Picture(f"ecdf-{metric.stem}", title, caption, data, made)


def _curve_look(runs: Mapping[str, Sequence[Level]], level: Level, place: int) -> tuple[str, str, str]:
    """(name, colour, dash): the levels of one run from a scale, several runs a hue and a dash each."""
    if len(runs) == 1:
        last = len(runs[level.run]) - 1
        return shown(level.label), f"@s{round(place / last * (SHADES - 1))}" if last else "@c0", "solid"
    return shown(level.run), f"@c{place % HUES}", DASHES[place % len(DASHES)]


def pictures_of(levels: Sequence[Level], slos: Sequence[Slo]) -> tuple[list[Picture], list[tuple[str, Picture]]]:
    """(pictures of the page, (title, picture over time) of each point of a sweep)."""
    points = [(level.title_of(point), point) for level in levels for point in level.points]
    made = [(title, over_time(point, f"time-{place}")) for place, (title, point) in enumerate(points)]
    strips = [(title, picture) for title, picture in made if picture is not None]
    loads = [against_load(levels, BY_STEM[stem], slos) for stem in ("ttft_ms", "tpot_ms", "e2el_ms")]
    single = [picture for _, picture in strips] if len(points) == 1 else []
    found = [picture for picture in [pareto(levels), *loads, *single] if picture is not None]
    return [*found, *distributions(levels)], [] if single else strips


def left_out_of(levels: Sequence[Level]) -> list[str]:
    """What is not drawn, and which option of the benchmark would bring it."""
    requests = [point.requests for level in levels for point in level.points]
    if not any(requests):
        return ["No requests in the files: distributions and pictures over time need the --results-csv."]
    if all(each is None or each.gaps_ms is None for each in requests):
        return ["Gaps between chunks, and tokens as they arrived, are kept only by --save-detailed: left out."]
    return []


# === 10. Page ===

COLOURS = "ink soft grid paper back band limit c0 c1 c2 c3 c4 c5 s0 s1 s2 s3 s4 s5 s6 s7 s8 s9".split()
# Hues after Okabe and Ito (2008), darkened or lightened for 3:1 on their paper; shades after viridis.
LIGHT = "#1f2328 #59636e #d8dee4 #ffffff #f6f8fa rgba(0,114,178,0.09) #b3261e"
LIGHT += " #0072b2 #d55e00 #00805d #b0508a #8a6d00 #555555"
LIGHT += " #440154 #482878 #3e4a89 #31688e #26828e #1f9e89 #35a85f #5cae3c #8fae1e #b8a800"
DARK = "#e6edf3 #9aa5b1 #3a424c #161b22 #0d1117 rgba(86,180,233,0.13) #ff8a80"
DARK += " #56b4e9 #ff9148 #2fcb9b #e69ac4 #f0d442 #bbbbbb"
DARK += " #8c7ae6 #6f8be8 #5a9fe0 #3fb1d3 #2cc0b8 #39cc96 #66d673 #9bde55 #cde24a #f7e96b"
THEMES = {"light": dict(zip(COLOURS, LIGHT.split())), "dark": dict(zip(COLOURS, DARK.split()))}

STYLE = """
:root { color-scheme: light; LIGHT }
@media (prefers-color-scheme: dark) { :root:not([data-theme]) { color-scheme: dark; DARK } }
:root[data-theme=dark] { color-scheme: dark; DARK }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1320px; margin: 0 auto; padding: 20px 16px 48px; }
header { display: flex; gap: 12px; align-items: flex-start; justify-content: space-between; }
h1, h2, p, li, summary, figcaption { overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 1.05rem; line-height: 1.35; margin: 0 0 2px; }
p { margin: 4px 0 8px; } .soft, figcaption { color: var(--soft); font-size: .87rem; }
button { font: inherit; font-size: .85rem; color: var(--ink); background: var(--paper); border: 1px solid var(--grid);
  border-radius: 6px; padding: 4px 10px; cursor: pointer; white-space: nowrap; }
section, details { background: var(--paper); border: 1px solid var(--grid); border-radius: 8px;
  padding: 14px 16px; margin-top: 16px; min-width: 0; }
details { padding: 9px 16px; margin-top: 8px; }
summary { cursor: pointer; font-weight: 600; }
details h2 { margin-top: 14px; }
ul { margin: 4px 0; padding-left: 20px; }
.good { border-left: 5px solid var(--c2); } .bad { border-left: 5px solid var(--limit); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(125px, 1fr)); gap: 12px; margin-top: 16px; }
.card { background: var(--paper); border: 1px solid var(--grid); border-radius: 8px; padding: 10px 12px; }
.card b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: .82rem; }
.grid { display: flex; flex-wrap: wrap; gap: 0 16px; }
.grid section { flex: 1 1 min(100%, 480px); } .grid .wide { flex-basis: 100%; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; }
th, td { text-align: right; padding: 4px 7px; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child { text-align: left; padding-left: 0; }
.words td:not(:first-child) { white-space: normal; text-align: left; overflow-wrap: anywhere; min-width: 8em; }
.verdict :is(th, td):last-child { white-space: normal; text-align: left; min-width: 8.5em; }
figure { margin: 0; }
@media (max-width: 560px) { h1 { font-size: 1.2rem; } main { padding: 14px 10px 32px; }
  .verdict :is(th, td):last-child { white-space: nowrap; } }
"""

SCRIPT = """
"use strict";
const dark = () => (document.documentElement.dataset.theme
  || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
function filled(box) {
  const theme = THEMES[dark() ? "dark" : "light"];
  return JSON.parse(box.querySelector("script").textContent.replace(/"@(\\w+)"/g,
    (whole, name) => name in theme ? JSON.stringify(theme[name]) : whole));
}
function draw(box) {
  const plot = box.querySelector(".plot"), figure = filled(box), narrow = plot.clientWidth < 560;
  if (narrow) {
    figure.layout.font.size = 11;
    figure.layout.dragmode = false;
    for (const note of figure.layout.annotations || []) note.font.size = 11;
  }
  box.dataset.drawn = "1";
  Plotly.react(plot, figure.data, figure.layout,
    {responsive: true, displaylogo: false, displayModeBar: !narrow, modeBarButtons: [["toImage"]]});
}
const boxes = () => [...document.querySelectorAll("figure")];
const again = () => boxes().filter(box => box.dataset.drawn).forEach(draw);
boxes().filter(box => !box.closest("details")).forEach(draw);
document.querySelectorAll("details").forEach(part => part.addEventListener("toggle", () => {
  if (part.open) boxes().filter(box => box.closest("details") === part && !box.dataset.drawn).forEach(draw);
}));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
document.querySelector("button").addEventListener("click", () => {
  document.documentElement.dataset.theme = dark() ? "light" : "dark";
  again();
});
"""

# The browser itself is told to refuse whatever the page might ask of the network.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def json_in_page(value: Any) -> str:
    """JSON that cannot end the element it stands in."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def style() -> str:
    text = STYLE
    for theme, colours in THEMES.items():
        text = text.replace(theme.upper(), " ".join(f"--{name}: {colour};" for name, colour in colours.items()))
    return text


def figure_html(picture: Picture) -> str:
    data = json_in_page({"data": picture.data, "layout": {**picture.layout, "height": picture.height}})
    return (
        f'<figure id="{picture.key}"><h2>{escape(picture.title)}</h2><figcaption>{escape(picture.caption)}</figcaption>'
        f'<div class="plot" style="min-height:{picture.height}px"></div>'
        f'<script type="application/json">{data}</script></figure>'
    )


def table_html(rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table with a heading row; of kind `words`, its cells wrap."""
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in rows[0])]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows[1:]]
    kind = kind or ("verdict" if rows[0][-1] == "verdict" else "")
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table class="{kind}">{body}</table></div>'


def list_html(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def verdict_html(levels: Sequence[Level], slos: Sequence[Slo]) -> str:
    """What can be trusted, what was found, and what limits it."""
    points = [point for level in levels for point in level.points]
    bound = [point for point in points if point.client_bound]
    judged = any("client_bound" in point.figures or "verdict" in point.figures for point in points)
    errors, ended = sum(level.errors for level in levels), sum(point.count("completed") for point in points)
    head = f"{errors:,} of {errors + ended:,} requests failed" if errors else f"None of {ended:,} requests failed"
    if bound:
        head += f"; {'all' if len(bound) == len(points) else 'some'} of this measures the client, not the server"
    else:
        head += "; the client was not the limit" if judged else "; whether the client was the limit is not in the files"
    found = [*findings(levels, slos), *against_the_first(levels)]
    warnings = warning_lines(levels)
    more = f"<h2>Warnings</h2>{list_html(warnings)}" if warnings else ""
    missed = slos and any(highest_passing(run_levels, slos) is None for run_levels in by_run(levels).values())
    kind = "bad" if bound or errors or missed else "good"
    return f'<section class="{kind}" id="verdict"><h2>{escape(head)}</h2>{list_html(found)}{more}</section>'


def against_the_first(levels: Sequence[Level]) -> Iterator[str]:
    """Each other run against the first at the highest level that both have."""
    runs = list(by_run(levels).values())
    for other in runs[1:]:
        for a, b in pairs_of(runs[0], other)[-1:]:
            yield from (f"Not comparable: {line}" for line in not_comparable(a, b))
            yield f"Against {a.title}: {sentence(b.run, differences(a, b))}."


CARDS = (
    ("output tokens/s", "output_throughput", 0),
    ("requests/s", "request_throughput", 2),
    ("tokens/s per user", "median_tokens_per_s_per_user", 1),
    ("TTFT p50, ms", "p50_ttft_ms", 1),
    ("TTFT p99, ms", "p99_ttft_ms", 1),
    ("TPOT p50, ms", "p50_tpot_ms", 2),
    ("latency p50, ms", "p50_e2el_ms", 1),
    ("latency p99, ms", "p99_e2el_ms", 1),
)


def cards_html(level: Level) -> str:
    values = [(label, level.figure(key), decimals) for label, key, decimals in CARDS]
    made = [f"<b>{number(v, decimals)}</b><span>{label}</span>" for label, v, decimals in values if v is not None]
    return '<div class="cards">' + "".join(f'<div class="card">{card}</div>' for card in made) + "</div>"


def details_html(levels: Sequence[Level], strips: Sequence[tuple[str, Picture]]) -> Iterator[str]:
    """What is folded away: pictures over time, all figures, configuration."""
    each = (f"<details><summary>{escape(title)}</summary>{figure_html(picture)}</details>" for title, picture in strips)
    if strips:
        few = " open" if len(strips) <= 8 else ""
        yield f"<details{few}><summary>Over time, load by load</summary>{''.join(each)}</details>"
    points = [(level.title_of(point), point) for level in levels for point in level.points]
    opened = " open" if len(points) == 1 else ""
    yield f"<details{opened}><summary>All figures</summary>"
    for title, point in points:
        rows = distribution_rows(point, True)
        tables = [*([rows] if len(rows) > 1 else []), *(group_rows(point.requests) if point.requests else [])]
        extra = [*error_lines(point), *(f"{name}: {value}" for name, value in side_figures(point).items())]
        yield f"<h2>{escape(title)}</h2>" + "".join(map(table_html, tables)) + (list_html(extra) if extra else "")
    yield "</details>"
    configs = {title: config_of(point) for title, point in points}
    names = list(dict.fromkeys(name for config in configs.values() for name in config))
    if names:
        same = len({tuple(config.items()) for config in configs.values()}) == 1
        columns = dict(list(configs.items())[:1]) if same else configs
        rows = [["option", *columns], *([name, *(c.get(name, "-") for c in columns.values())] for name in names)]
        yield f"<details><summary>Configuration</summary>{table_html(rows, 'words')}</details>"


def page_html(levels: Sequence[Level], slos: Sequence[Slo], title: str, plotly_js: str) -> str:
    """The whole page: one file that asks the network for nothing, and may not."""
    pictures, strips = pictures_of(levels, slos)
    sources = [source for level in levels for point in level.points for source in point.sources]
    files = list(dict.fromkeys(os.path.basename(source) for source in sources))
    named = ", ".join(files[:6]) + (f" and {len(files) - 6} more" if files[6:] else "")
    boxes = "".join(f'<section class="{"wide" if p.wide else ""}">{figure_html(p)}</section>' for p in pictures)
    left_out = left_out_of(levels)
    rows = sweep_rows(levels, slos)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{GENERATOR}'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{style()}</style></head><body><main>"
        f'<header><div><h1>{escape(title)}</h1><p class="soft">{escape(named)}</p></div><button>light / dark</button>'
        "</header><noscript><p>The pictures need JavaScript; the tables do not.</p></noscript>"
        f"{verdict_html(levels, slos)}{cards_html(levels[0]) if len(levels) == 1 else ''}"
        f'<section id="table">{table_html(rows)}<p class="soft">{table_note(rows)}</p></section>'
        f'<div class="grid">{boxes}</div><p class="soft">{escape(" ".join(left_out))}</p>'
        + "".join(details_html(levels, strips))
        + f"</main><script>{plotly_js}</script><script>const THEMES = {json_in_page(THEMES)};{SCRIPT}</script>"
        "</body></html>\n"
    )


# --- pictures as files ---

BROWSERS = (
    *("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge", "msedge"),
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)

EXPORT = """
(async () => {
  const made = [];
  for (const format of FORMATS) for (const figure of FIGURES)
    made.push(await Plotly.toImage(figure, {format, width: figure.layout.width, height: figure.layout.height,
      scale: format === "png" ? 2 : 1}));
  document.body.innerHTML = "<pre></pre>";
  document.querySelector("pre").textContent = made.join("\\n") + "\\nEND";
})();
"""


def find_browser() -> Optional[str]:
    """An installed browser of Chromium's family."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


def light_figure(picture: Picture) -> dict[str, Any]:
    """The picture in the light theme, its title in it."""
    title = {"text": shown(picture.title), "x": 0, "xref": "container", "pad": {"l": 12}, "font": {"size": 16}}
    size = {"width": 1160 if picture.wide else 760, "height": picture.height + 50, "title": title}
    made = {**picture.layout, **size, "margin": {"l": 12, "r": 16, "t": 56, "b": 12}}
    text = json.dumps({"data": picture.data, "layout": made})
    figure: dict[str, Any] = json.loads(
        re.sub(r'"@(\w+)"', lambda match: json.dumps(THEMES["light"].get(match[1], match[0][1:-1])), text)
    )
    return figure


def images(pictures: Sequence[Picture], kinds: Sequence[str], plotly_js: str) -> Iterator[bytes]:
    """The pictures as PNG or SVG, kind by kind, by an installed browser, else by kaleido. Raises UserError where
    neither can."""
    told = " and ".join(f"--{kind}" for kind in kinds)
    figures = [light_figure(picture) for picture in pictures]
    browser = find_browser()
    if browser is None:
        try:
            import plotly.io

            for kind in kinds:
                yield from (plotly.io.to_image(each, format=kind, scale=2 if kind == "png" else 1) for each in figures)
            return
        except Exception as error:  # kaleido absent, or without a browser of its own: it raises many kinds
            reason = plain(str(error), 120)
            raise UserError(f"{told} needs a Chromium browser or kaleido (pip install kaleido): {reason}") from None
    script = f"const FIGURES = {json_in_page(figures)}, FORMATS = {json.dumps(kinds)};{EXPORT}"
    page = f"<!doctype html><meta charset=utf-8><body><script>{plotly_js}</script><script>{script}</script>"
    lines = re.search(r"<pre>(.*)\nEND</pre>", in_browser(browser, page), re.DOTALL)
    if lines is None:
        raise UserError(f"{told}: {browser} drew nothing")
    yield from map(_decoded, lines[1].split("\n"))


def _decoded(url: str) -> bytes:
    head, _, body = html.unescape(url).partition(",")
    return base64.b64decode(body) if head.endswith("base64") else unquote(body).encode("utf-8")


def in_browser(browser: str, page: str) -> str:
    """The document that a headless browser makes of a page. Raises UserError where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "page.html")
        path.write_text(page, encoding="utf-8")
        options = ["--headless", "--disable-gpu", f"--user-data-dir={folder}/profile", "--virtual-time-budget=60000"]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            options.append("--no-sandbox")  # Chromium refuses root otherwise; the page is ours
        try:
            done = subprocess.run(
                [browser, *options, "--dump-dom", path.as_uri()], capture_output=True, timeout=180, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UserError(f"{browser} failed: {plain(str(error), 120)}") from None
    return done.stdout.decode("utf-8", "replace")


# === 11. Command line ===


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench_report.py",
        description="Read benchmark results back: print, compare, draw.",
        epilog="FILE: a CSV, JSON or JSON Lines file of this project, a result file of vLLM, SGLang or guidellm, or a"
        " directory of them. [NAME=]FILE[,FILE...] is one run.",
    )
    parser.add_argument("--version", action="version", version=f"bench_report.py {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    show = verbs.add_parser("show", help="print the report of one point, or the table of several")
    compare = verbs.add_parser(
        "compare", help="the first run against each other one, and whether it is more than noise"
    )
    page = verbs.add_parser("html", help="one HTML file with pictures, which needs no network")
    for verb in (show, compare, page):
        verb.add_argument("files", nargs="+", metavar="FILE", help="[NAME=]FILE[,FILE...]: one run")
    for verb in (show, page):
        verb.add_argument("--join", action="store_true", help="all files are parts of one run (processes, machines)")
        verb.add_argument("--slo", action="append", default=[], metavar="LIMIT", help="a limit: 'p99_ttft_ms<500'")
    show.add_argument("--verbose", action="store_true", help="the whole report of each point, every metric")
    show.add_argument("--histogram", action="store_true", help="distributions as bars")
    compare.add_argument(
        "--fail-if", action="append", default=[], metavar="COND", help="exit 3 where it holds: 'p99_ttft_ms > +10%%'"
    )
    page.add_argument("-o", "--output", default="report.html", metavar="FILE", help="the page (report.html)")
    page.add_argument("--title", default="", help="its heading")
    page.add_argument("--png", metavar="DIR", help="each picture as a PNG file, too")
    page.add_argument("--svg", metavar="DIR", help="each picture as an SVG file, too")
    return parser


def load(options: argparse.Namespace, problems: Problems) -> list[Point]:
    """The points of the command line. Raises UserError where there is nothing at all."""
    files = options.files
    if getattr(options, "join", False):
        files = [",".join(file for argument in files for file in parse_argument(argument)[1])]
    points = read_runs(files, options.verb == "compare", problems)
    if not points:
        raise UserError("nothing to report: no result could be read")
    return points


def show_command(options: argparse.Namespace, problems: Problems) -> int:
    for text in options.slo:
        parse_slo(text)
    points = load(options, problems)
    levels = levels_of(points)
    if len(points) == 1 or options.verbose:
        for place, point in enumerate(points):
            lines = [f"=== {Level(point.run, point.level, [point]).title} ==="] if len(points) > 1 else []
            say([*([""] if place else []), *lines, *report_lines(point, options.verbose)])
    slos = slos_of(options.slo, points)
    if len(points) > 1 or slos:
        say([*([""] if options.verbose else []), *sweep_lines(levels, slos)])
    if options.histogram:
        say(histograms(levels))
    return 0


def histograms(levels: Sequence[Level]) -> Iterator[str]:
    width = shutil.get_terminal_size().columns
    encoding = sys.stdout.encoding or "ascii"
    try:
        "█▏▎▍▌▋▊▉".encode(encoding)
        ascii_only = False
    except (UnicodeEncodeError, LookupError):
        ascii_only = True
    for level in levels:
        for metric in METRICS[:6]:
            sample = pooled(level, metric)
            if len(sample):
                yield from ("", f"{metric.label}, {level.title}: {len(sample)}")
                yield from histogram(sample, min(width, 120), ascii_only)
    if all(point.requests is None for level in levels for point in level.points):
        yield "No requests in the files: a histogram needs the --results-csv"


def compare_command(options: argparse.Namespace, problems: Problems) -> int:
    if len(options.files) < 2:
        raise UserError("compare needs two runs or more: bench_report.py compare before.csv after.csv")
    points = load(options, problems)
    conditions = [parse_fail_if(text, points) for text in options.fail_if]
    runs = list(by_run(levels_of(points)).values())
    if len(runs) < 2:
        raise UserError("compare needs two runs; the files hold one (give each a name: old=FILE new=FILE)")
    failed = False
    for other in runs[1:]:
        pairs = pairs_of(runs[0], other)
        if not pairs:
            raise UserError(f"{runs[0][0].run} and {other[0].run} have no level in common")
        for a, b in pairs:
            say(["", f"=== {b.title} against {a.title} ===", *comparison_lines(a, b)])
            verdicts = [condition.verdict(a, b) for condition in conditions]
            say(line for _, line in verdicts)
            failed = failed or any(holds for holds, _ in verdicts)
    say(["", how_noise_is_judged(runs)])
    return 3 if failed else 0


def how_noise_is_judged(runs: Sequence[Sequence[Level]]) -> str:
    if all(len(level.points) > 1 for run in runs for level in run):
        return "±: 99 % interval over the repetitions."
    return (
        "±: 99 % interval over the requests of each run, with what two runs of one server are assumed to differ by"
        f" ({BETWEEN_RUNS:.1%}; --repeat measures it). Unknown: no requests in the files, too few (p99 takes 662),"
        " or a client that was the limit."
    )


def html_command(options: argparse.Namespace, problems: Problems) -> int:
    for text in options.slo:
        parse_slo(text)
    keep_foreign_files(options.output)
    plotly_js = load_plotly()
    points = load(options, problems)
    levels, slos = levels_of(points), slos_of(options.slo, points)
    title = options.title or f"Benchmark of {', '.join(list(by_run(levels))[:4])}"
    write_whole(options.output, page_html(levels, slos, plain(title), plotly_js).encode("utf-8"))
    say([f"{options.output}: {os.path.getsize(options.output) / 1e6:.1f} MB"])
    folders = {kind: folder for kind, folder in (("png", options.png), ("svg", options.svg)) if folder}
    pictures, strips = pictures_of(levels, slos) if folders else ([], [])
    every = [*pictures, *(picture for _, picture in strips)]
    files = [os.path.join(folder, f"{picture.key}.{kind}") for kind, folder in folders.items() for picture in every]
    for file, data in zip(files, images(every, list(folders), plotly_js)):
        os.makedirs(os.path.dirname(file), exist_ok=True)
        write_whole(file, data)
    say(f"{folder}: {len(every)} pictures" for folder in folders.values())
    return 0


def keep_foreign_files(path: str) -> None:
    """A report may be written anew; any other file is not ours to replace. Raises UserError."""
    if os.path.isdir(path):
        raise UserError(f"-o {path} is a directory; name a file in it")
    if os.path.exists(path):
        with open(path, "rb") as file:
            if GENERATOR.encode() not in file.read(400):
                raise UserError(f"-o {path} exists and is no report of this script; name another file")
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise UserError(f"-o {path}: there is no such directory")


def load_plotly() -> str:
    """plotly's JavaScript. Raises UserError where plotly is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError("html needs plotly: pip install plotly") from None
    return str(get_plotlyjs())


def write_whole(path: str, data: bytes) -> None:
    """All of the file or none of it. Raises UserError."""
    part = f"{path}.part"
    try:
        Path(part).write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def say(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


COMMANDS = {"show": show_command, "compare": compare_command, "html": html_command}


def main(argv: Optional[Sequence[str]] = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    options = build_parser().parse_args(argv)
    problems = Problems()
    try:
        code = COMMANDS[options.verb](options, problems)
        sys.stdout.flush()
    except UserError as error:
        print(f"bench_report: {plain(str(error), 400)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 2 if problems.count else code


if __name__ == "__main__":
    raise SystemExit(main())
