"""Results read back: exact figures, honest comparisons, one page that needs nothing."""

from __future__ import annotations

import contextlib
import csv
import heapq
import itertools
import json
import os
import random
import re
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Callable, Optional

import pytest

from tests.support import program
from tests.support.program import ROOT, Outcome

np = pytest.importorskip("numpy")
import bench_report as report  # noqa: E402  (it needs numpy)

COLUMNS = (
    *("index", "prompt_tokens", "completion_tokens", "total_tokens", "latency_ms", "status", "error", "error_kind"),
    *("scheduled_s", "sent_s", "ttft_ms", "tpot_ms", "response_ms", "queue_ms", "finish_reason", "chunks"),
    *("cached_tokens", "level", "repeat", "start_unix_s", "label", "turn", "server"),
)


def simulated(
    seed: int, count: int = 600, concurrency: int = 16, slower: float = 1.0, **cells: Any
) -> list[dict[str, Any]]:
    """The rows of a closed loop against a server whose TTFT, pace and lengths are drawn from fixed laws."""
    draw = random.Random(seed)
    free = [0.0] * concurrency
    rows: list[dict[str, Any]] = []
    for index in range(count):
        sent = heapq.heappop(free)
        tokens = max(2, round(draw.gauss(64, 8)))
        ttft = draw.lognormvariate(3.6, 0.3) * slower
        tpot = max(1.0, draw.gauss(5, 0.6)) * slower
        latency = ttft + tpot * (tokens - 1)
        heapq.heappush(free, sent + latency / 1e3)
        row: dict[str, Any] = {
            "index": index,
            "prompt_tokens": 100,
            "completion_tokens": tokens,
        }
        row.update(latency_ms=round(latency, 3), status="success", sent_s=round(sent, 6), ttft_ms=round(ttft, 3))
        rows.append({**row, "tpot_ms": round(tpot, 3), "finish_reason": "stop", "chunks": tokens, **cells})
    return sorted(rows, key=lambda row: row["sent_s"] + row["latency_ms"] / 1e3)


def failure(index: int, sent_s: float, kind: str = "http_429", **cells: Any) -> dict[str, Any]:
    row = {"index": index, "status": "http_error", "error": f"HTTP {kind}", "error_kind": kind, "sent_s": sent_s}
    return {**row, **cells}


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = COLUMNS) -> str:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def summary(**changes: Any) -> dict[str, Any]:
    """A summary as online_bench_openai_async.py writes it, with changes."""
    figures = {"model_id": "m", "num_prompts": 100, "completed": 100, "failed": 0, "max_concurrency": 8}
    figures.update(duration=10.0, request_throughput=10.0, output_throughput=640.0, total_token_throughput=1640.0)
    for stem, value in (("ttft_ms", 40.0), ("tpot_ms", 5.0), ("e2el_ms", 355.0)):
        figures.update({f"{name}_{stem}": value for name in ("mean", "median", "p50", "p90", "p95", "p99")})
        figures[f"{stem[:-3]}_count"] = 100
    figures.update(median_tokens_per_s_per_user=180.0, warnings=[], config={"model": "m", "concurrency": 8})
    return {**figures, **changes}


def write_json(path: Path, *results: Mapping[str, Any]) -> str:
    path.write_text("".join(json.dumps(result) + "\n" for result in results), encoding="utf-8")
    return str(path)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """The command line in this process."""

    def run(*argv: str) -> Outcome:
        capsys.readouterr()
        try:
            code = report.main(list(argv))
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        printed = capsys.readouterr()
        return Outcome(code, printed.out, printed.err)

    return run


def level_of(rows: Sequence[Mapping[str, Any]], tmp_path: Path, name: str = "run") -> report.Level:
    points = report.read_csv(write_csv(tmp_path / f"{name}.csv", rows), report.Problems())
    return report.levels_of(points)[0]


# --- figures ---


def test_figures_are_numpys_over_the_successes(tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    rows = [*simulated(1, 400), failure(400, 0.5, latency_ms=99999), failure(401, 0.6)]
    point = report.read_csv(write_csv(tmp_path / "r.csv", rows), report.Problems())[0]
    good = [row for row in rows if row["status"] == "success"]
    for column, stem in (("latency_ms", "e2el_ms"), ("ttft_ms", "ttft_ms"), ("completion_tokens", "output_tokens")):
        values = [row[column] for row in good]
        for rank in (50, 90, 95, 99, 99.9):
            assert point.figure(f"p{rank:g}_{stem}") == pytest.approx(np.percentile(values, rank), rel=1e-12)
        assert point.figure(f"mean_{stem}") == pytest.approx(np.mean(values))
        assert point.figure(f"std_{stem}") == pytest.approx(np.std(values))
    elapsed = max(row["sent_s"] + row["latency_ms"] / 1e3 for row in good)
    assert point.figure("duration") == pytest.approx(elapsed)
    assert point.figure("output_throughput") == pytest.approx(sum(row["completion_tokens"] for row in good) / elapsed)
    assert (point.figure("completed"), point.figure("failed")) == (400, 2)
    assert point.figure("max_concurrent_requests") == 16 + 1  # of the failures, one says how long it took
    assert point.figure("p97.5_ttft_ms") == pytest.approx(np.percentile([row["ttft_ms"] for row in good], 97.5))
    out = cli("show", str(tmp_path / "r.csv")).out
    assert "Requests (ok/err): 400/2" in out
    assert "Errors: 2 x http_error/http_429" in out


def test_a_failure_after_the_last_success_lengthens_the_run(tmp_path: Path) -> None:
    rows = simulated(1, 100)
    cut = failure(101, 1000.0, kind="aborted")
    for more, duration in (
        ([], None),
        ([failure(100, 60.0)], 60.0 - min(row["sent_s"] for row in rows)),
        ([cut], None),
    ):
        told = level_of([*rows, *more], tmp_path).figure("duration")
        whole = duration or level_of(rows, tmp_path).figure("duration")
        assert told == pytest.approx(whole)


def test_the_benchmarks_own_files_give_its_own_seven_lines(tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    results, lines = str(tmp_path / "r.csv"), str(tmp_path / "s.jsonl")
    options = ["--demo", "--stream", "--concurrency", "4", "--total-requests", "12", "--output-tokens", "8"]
    measured = program.cli(*options, "--results-csv", results, "--summary-jsonl", lines)
    assert measured.code == 0, measured.err
    own = measured.out[measured.out.index("Requests (ok/err)") :].splitlines()[:7]
    both = cli("show", results, lines)
    assert both.code == 0, both.err
    assert both.out.splitlines()[:7] == own
    alone = cli("show", results).out.splitlines()[:7]
    assert [line for line in own if "latency" in line] == [line for line in alone if "latency" in line]


def test_mean_rate_is_the_exact_integral() -> None:
    draw = random.Random(5)
    starts = np.array([draw.uniform(0, 10) for _ in range(200)])
    ends = starts + np.array([draw.uniform(0.01, 3) for _ in range(200)])
    weights = np.array([draw.uniform(0, 50) for _ in range(200)])
    edges = np.linspace(0, 13, 40)
    got = report.mean_rate(starts, ends, weights, edges)
    for low, high, value in zip(edges, edges[1:], got):
        overlap = np.clip(np.minimum(ends, high) - np.maximum(starts, low), 0, None)
        assert value == pytest.approx((overlap * weights).sum() / (high - low))


def test_a_kept_workers_next_request_is_no_second_one_in_flight(tmp_path: Path) -> None:
    rows = [{**simulated(1, 1)[0], "index": i, "sent_s": float(i), "latency_ms": 1000.0} for i in range(5)]
    assert level_of(rows, tmp_path).figure("max_concurrent_requests") == 1


def test_steady_window_is_from_the_end_of_the_first_wave_to_the_last_send(tmp_path: Path) -> None:
    rows = simulated(3, 200, 8)
    requests = level_of(rows, tmp_path).points[0].requests
    assert requests is not None
    window = report.steady_window(requests, 8)
    assert window is not None
    assert window[0] == pytest.approx(sorted(row["sent_s"] + row["latency_ms"] / 1e3 for row in rows)[7])
    assert window[1] == pytest.approx(max(row["sent_s"] for row in rows))
    assert report.steady_window(requests, 100) is None


# --- joining ---


def test_parts_of_a_run_are_joined_exactly(tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    rows = simulated(2, 300)
    whole = cli("show", write_csv(tmp_path / "whole.csv", rows)).out
    parts = [write_csv(tmp_path / f"part{i}.csv", rows[i::3]) for i in range(3)]
    assert cli("show", "--join", *parts).out == whole
    assert cli("show", ",".join(parts)).out == whole
    apart = cli("show", *parts)
    assert "part0" in apart.out
    assert "part2" in apart.out


def test_clocks_of_parts_are_set_by_their_starts(tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    rows = simulated(2, 300, start_unix_s=1000.0)
    later = [{**row, "sent_s": row["sent_s"] - 0.5, "start_unix_s": 1000.5} for row in rows[1::2]]
    parts = [write_csv(tmp_path / "a.csv", rows[0::2]), write_csv(tmp_path / "b.csv", later)]
    whole = cli("show", write_csv(tmp_path / "whole.csv", rows)).out
    assert cli("show", "--join", *parts).out == whole


def test_runs_one_after_the_other_are_repetitions_not_parts(tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    first = write_csv(tmp_path / "a.csv", simulated(1, 200, start_unix_s=1000.0, level=16))
    second = write_csv(tmp_path / "b.csv", simulated(2, 200, start_unix_s=2000.0, level=16))
    out = cli("show", "--join", first, second).out
    assert "16 x2" in out
    assert re.search(r"^ *min .*\n *max ", out, re.MULTILINE)


def test_an_appended_run_is_told_by_its_index(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "r.csv", simulated(1, 50) + simulated(2, 60))
    points = report.read_csv(path, report.Problems())
    assert [point.count("completed") for point in points] == [50, 60]


def test_two_csvs_poured_together_are_read(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", simulated(1, 50))
    path2 = write_csv(tmp_path / "b.csv", [{**row, "index": row["index"] + 50} for row in simulated(2, 50)])
    poured = tmp_path / "c.csv"
    poured.write_text(Path(path).read_text() + Path(path2).read_text())
    problems = report.Problems()
    assert [point.count("completed") for point in report.read_csv(str(poured), problems)] == [100]
    assert problems.count == 0


def test_levels_and_repetitions_make_the_sweep_table(tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    rows = []
    for level, repeat in itertools.product((4, 16), (1, 2, 3)):
        rows += simulated(level * 10 + repeat, 80, level, level=level, repeat=repeat, start_unix_s=level * 100 + repeat)
    path = write_csv(tmp_path / "sweep.csv", rows)
    points = report.read_csv(path, report.Problems())
    assert len(points) == 6
    out = cli("show", path).out
    for level in (4, 16):
        values = sorted(p.figures["output_throughput"] for p in points if p.level == level)
        line = next(line for line in out.splitlines() if line.startswith(f"{level} x3"))
        assert f"{values[1]:,.1f}" in line
    assert "min" in out


def test_a_csv_and_its_summary_are_one_point(tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    path = write_csv(tmp_path / "r.csv", simulated(4, 100))
    figures = report.read_csv(path, report.Problems())[0].figures
    keys = ("completed", "total_output_tokens", "mean_e2el_ms", "duration")
    mine = summary(**{key: figures[key] for key in keys}, max_concurrency=16, warnings=["of its own"])
    out = cli("show", path, write_json(tmp_path / "s.jsonl", mine)).out
    assert "Concurrency: 16" in out
    assert "WARNING: of its own" in out
    assert "tokens/s per user" in out.lower()
    other = write_json(tmp_path / "t.jsonl", {**mine, "mean_e2el_ms": mine["mean_e2el_ms"] + 1})
    assert "run " in cli("show", path, other).out


# --- other tools ---

VLLM = {
    "backend": "vllm",
    "model_id": "llama",
    "num_prompts": 4,
    "request_rate": "inf",
    "max_concurrency": 2,
    "duration": 2.0,
    "completed": 3,
    "failed": 1,
    "request_throughput": 1.5,
    "output_throughput": 4.5,
    "total_token_throughput": 20.0,
    "mean_ttft_ms": 20.0,
    "median_ttft_ms": 20.0,
    "p99_ttft_ms": 29.8,
}
DETAIL = {
    "input_lens": [10, 10, 10, 10],
    "output_lens": [3, 3, 3, 0],
    "ttfts": [0.01, 0.02, 0.03, 0.0],
    "itls": [[0.1, 0.2], [0.1, 0.1], [0.3, 0.1], []],
    "errors": ["", "", "", "boom"],
    "start_times": [100.0, 100.1, 100.2, 100.3],
}


def test_vllm_with_its_details(tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    path = write_json(tmp_path / "v.json", {**VLLM, **DETAIL})
    point = report.read_json(path, report.Problems())[0]
    assert point.tool == "vLLM"
    assert point.level == 2
    assert point.figure("p50_e2el_ms") == pytest.approx(310.0)
    assert point.figure("p50_tpot_ms") == pytest.approx(150.0)
    assert point.figure("p90_itl_ms") == pytest.approx(np.percentile([100, 200, 100, 100, 300, 100], 90))
    assert point.figure("p50_ttft_ms") == 20.0  # the tool's own figure stands
    assert "vLLM counts otherwise" in cli("show", path, "--slo", "p99_ttft_ms<30").out


def test_a_first_token_that_is_not_known_gives_no_tpot(tmp_path: Path) -> None:
    """As --save-detailed has it of a reply that was read late; of its connections, `connecting` tells."""
    detail = {**DETAIL, "ttfts": [0.0, 0.02, 0.03, 0.0], "latencies": [0.31, 0.22, 0.43, 0.0]}
    ours = summary(**detail, completed=3, connecting={"p99_connect_ms": 2.5, "connect_count": 1})
    point = report.read_json(write_json(tmp_path / "s.jsonl", ours), report.Problems())[0]
    assert point.requests is not None
    assert sorted(point.requests.sample("tpot_ms")) == pytest.approx([100, 200])
    assert point.figure("p99_connect_ms") == 2.5


def test_sglang_line_with_infinity(tmp_path: Path) -> None:
    line = {"backend": "sglang", "request_rate": float("inf"), "max_concurrency": 32, "completed": 10}
    line.update(request_throughput=3.0, output_throughput=9.0, total_throughput=12.0, mean_e2e_latency_ms=500.0)
    path = write_json(tmp_path / "s.jsonl", {**line, "p99_e2e_latency_ms": 700.0, "median_ttft_ms": 12.0})
    point = report.read_json(path, report.Problems())[0]
    assert (point.tool, point.level, point.by_rate) == ("SGLang", 32, False)
    assert point.figure("p99_e2el_ms") == 700.0
    assert point.figure("total_token_throughput") == 12.0
    assert point.figure("p50_ttft_ms") == 12.0


def guidellm() -> dict[str, Any]:
    def summed(value: float, count: int = 2) -> dict[str, Any]:
        ranks = dict.fromkeys(("p50", "p90", "p95", "p99", "p999"), value)
        values = {"mean": value, "median": value, "std_dev": 0.0, "max": value, "count": count}
        return {"successful": {**values, "percentiles": ranks}}

    metrics = {"request_totals": {"successful": 2, "errored": 1, "incomplete": 0, "total": 3}}
    metrics.update(request_latency=summed(0.5), time_to_first_token_ms=summed(20.0), inter_token_latency_ms=summed(5.0))
    metrics.update(requests_per_second=summed(4.0), output_tokens_per_second=summed(400.0))
    request = {"request_start_time": 1e9, "request_latency": 0.5, "time_to_first_token_ms": 20.0}
    requests = {"successful": [request, {**request, "request_start_time": 1e9 + 0.1}], "errored": [], "incomplete": []}
    config = {"strategy": {"type_": "concurrent", "streams": 6}, "backend": {"model": "m"}}
    one = {"metrics": metrics, "config": config, "requests": requests, "start_time": 1e9, "duration": 0.6}
    return {"metadata": {"version": 2}, "benchmarks": [one, {**one, "config": {"strategy": {"rate": 7.5}}}]}


def test_guidellm_report(tmp_path: Path) -> None:
    points = report.read_json(write_json(tmp_path / "g.json", guidellm()), report.Problems())
    assert [(point.level, point.by_rate) for point in points] == [(6, False), (7.5, True)]
    assert points[0].figure("p99_e2el_ms") == 500.0
    assert points[0].figure("p99.9_ttft_ms") == 20.0
    assert points[0].figure("p50_tpot_ms") == 5.0
    assert points[0].figure("request_throughput") == 4.0
    assert points[0].figure("failed") == 1
    assert points[0].requests is not None


def test_runs_of_several_tools_stand_side_by_side(tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    ours = write_json(tmp_path / "ours.jsonl", summary())
    done = cli("show", ours, write_json(tmp_path / "v.json", VLLM), write_json(tmp_path / "g.json", guidellm()))
    assert done.code == 0, done.err
    for name in ("ours", "v", "g"):
        assert re.search(rf"^{name} ", done.out, re.MULTILINE)


# --- damaged files ---


def damaged(kind: str, tmp_path: Path) -> str:
    path = tmp_path / f"{kind}.bad"
    text = Path(write_csv(tmp_path / "whole.csv", simulated(9, 40))).read_text()
    line = json.dumps(summary(label="kept")) + "\n"
    deep = "[" * 100_000
    contents: dict[str, bytes] = {
        "empty": b"",
        "blank": b"\n \n",
        "foreign": b"Type,Name,Request Count\nGET,/,3\n",
        "binary": bytes(range(256)) * 40,
        "header": text.splitlines()[0].encode() + b"\n",
        "half_row": text[:-30].encode(),
        "torn": (text.replace("success", "succ", 1)).encode(),
        "few_cells": (text + "17,3\n").encode(),
        "half_line": (line + line[:200]).encode(),
        "half_json": json.dumps(summary(), indent=1)[:300].encode(),
        "unknown": b'{"hello": 1}',
        "deep": deep.encode(),
        "lists": json.dumps({**VLLM, **DETAIL, "itls": [[1.0]]}).encode(),
        "words": json.dumps({**VLLM, **DETAIL, "ttfts": ["a", "b", "c", "d"]}).encode(),
    }
    path.write_bytes(contents[kind])
    return str(path)


DAMAGED = (
    *("empty", "blank", "foreign", "binary", "header", "half_row", "torn", "few_cells", "half_line", "half_json"),
    *("unknown", "deep", "lists", "words"),
)


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_is_damaged_costs_one_line_and_the_rest_is_read(
    kind: str, tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    good = write_json(tmp_path / "good.jsonl", summary(label="good"))
    done = cli("show", damaged(kind, tmp_path), good)
    assert done.code == 2
    assert len(done.err.splitlines()) == 1, done.err
    assert f"{kind}.bad" in done.err
    assert "Traceback" not in done.err
    assert "640" in done.out  # the good file's throughput
    if kind in ("half_row", "torn", "few_cells"):
        assert re.search(rf"^{kind} ", done.out, re.MULTILINE)
    if kind == "half_line":
        assert re.search(r"^kept ", done.out, re.MULTILINE)


ODD: tuple[Any, ...] = (None, "", "x", True, -1, 0, 1e308, [], [1, "a"], {}, {"a": [1]}, [[0, 1], [1, None]])


@pytest.mark.parametrize("place", range(len(ODD)))
def test_no_value_in_a_result_ends_in_a_traceback(place: int, tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    """Each key in turn with a value of a wrong kind: read, or one line; never an exception."""
    detailed = summary(**DETAIL, completed=3, errors_by_kind={"a": 1}, client_bound="", label="l", repeat=1)
    keys = [key for key in detailed if "tpot" not in key and "e2el" not in key]
    keys += ["level", "request_rate", "slo", "server_x", "verdict", "tensor_parallel_size"]
    path = write_json(tmp_path / "odd.jsonl", *({**detailed, key: ODD[place]} for key in keys))
    other = write_json(tmp_path / "other.jsonl", detailed, summary())
    assert cli(("show", "compare")[place % 2], path, other).code in (0, 2)
    if place % 3 == 0:
        levels = report.levels_of(report.read_json(path, report.Problems()))
        assert report.page_html(levels, [report.parse_slo("p99_ttft_ms<1")], "t", "")


def test_nothing_readable_is_said(tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    done = cli("show", str(tmp_path / "absent.csv"))
    assert done.code == 2
    assert "No such file" in done.err
    assert "nothing to report" in done.err
    assert done.out == ""
    assert cli("show", str(tmp_path)).code == 2


def test_a_directory_is_one_run(tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    folder = tmp_path / "h100"
    folder.mkdir()
    for level in (1, 2, 4):
        write_json(folder / f"{level}.json", {**VLLM, "max_concurrency": level, "output_throughput": 100.0 * level})
    done = cli("show", str(folder))
    assert done.code == 0, done.err
    assert "h100: most output 400 tokens/s, at 4 in flight" in done.out


# --- what a sweep shows ---


def sweep(tmp_path: Path, name: str = "sweep", **changes: Any) -> str:
    points = []
    for level, rate, ttft in ((1, 100, 20), (2, 195, 22), (4, 380, 30), (8, 400, 90), (16, 405, 300)):
        figures = {"max_concurrency": level, "output_throughput": float(rate), "p99_ttft_ms": float(ttft)}
        points.append(summary(**figures, median_tokens_per_s_per_user=100.0 / level**0.5, **changes))
    return write_json(tmp_path / f"{name}.jsonl", *points)


def test_knee_and_highest_passing_level_are_named(tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    done = cli("show", sweep(tmp_path), "--slo", "p99_ttft_ms<100")
    assert "most output 405 tokens/s, at 16 in flight; knee at 8 in flight" in done.out
    assert "up to 8 in flight hold p99_ttft_ms < 100" in done.out
    assert "fails p99_ttft_ms" in next(line for line in done.out.splitlines() if line.startswith("16 "))
    assert cli("show", sweep(tmp_path), "--slo", "p99_ttft_ms=100").code == 2


def test_a_level_that_failed_is_no_knee_and_no_most(tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    rates = ((1, 100, 0), (2, 195, 0), (4, 380, 0), (8, 900, 50))
    points = [summary(max_concurrency=n, output_throughput=float(r), failed=bad, completed=100) for n, r, bad in rates]
    done = cli("show", write_json(tmp_path / "broken.jsonl", *points))
    assert "broken: most output 380 tokens/s, at 4 in flight; still growing there" in done.out


def test_the_level_of_a_csv_is_a_rate_where_requests_were_due_at_it(tmp_path: Path) -> None:
    for level, by_rate in ((50, True), (4, False)):
        rows = [{**row, "scheduled_s": row["index"] / 50, "level": level} for row in simulated(1, 100)]
        assert level_of(rows, tmp_path).by_rate is by_rate
    assert not level_of(simulated(1, 100, level=50), tmp_path).by_rate


def test_a_lower_level_that_fails_is_not_passed_over(tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    points = [
        summary(max_concurrency=n, p99_ttft_ms=ttft) for n, ttft in ((1, 20.0), (2, 150.0), (4, 90.0), (8, 300.0))
    ]
    out = cli("show", write_json(tmp_path / "s.jsonl", *points), "--slo", "p99_ttft_ms<100").out
    assert "4 in flight is the highest to hold p99_ttft_ms < 100, but 2 did not" in out


def test_limits_come_from_the_measured_configuration(tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    assert "hold p99_ttft_ms < 25" in cli("show", sweep(tmp_path, config={"slo": ["p99_ttft_ms<25"]})).out


def test_histograms_keep_to_the_width_and_to_the_locale(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "r.csv", simulated(1, 200))
    command = [sys.executable, str(ROOT / "bench_report.py"), "show", "--histogram", path]
    for encoding, bar in (("ascii", "#"), ("utf-8", "█")):
        env = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "70"}
        done = subprocess.run(command, capture_output=True, env=env, timeout=60, check=True)
        lines = done.stdout.decode(encoding).split("TTFT (ms), ")[1].splitlines()[1:14]
        assert all(len(line) <= 70 for line in lines)
        assert sum(int(line.split()[3]) for line in lines if line) == 200
        assert any(line.endswith(bar * 20) for line in lines)


def test_labels_and_turns_are_shown_row_by_row(tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    rows = simulated(1, 100)
    for row in rows:
        row.update(turn=row["index"] % 3 + 1, label=("chat", "code")[row["index"] % 2], cached_tokens=50)
    out = cli("show", write_csv(tmp_path / "r.csv", rows)).out
    chat = [row["ttft_ms"] for row in rows if row["label"] == "chat"]
    assert re.search(rf"^chat +50 +0 +{np.median(chat):.1f} .* 50\.0$", out, re.MULTILINE)
    assert re.search(r"^3 +33 ", out, re.MULTILINE)


def test_text_of_a_server_cannot_steer_the_terminal(tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    rows = [*simulated(1, 20), failure(20, 0.1, kind="\x1b[31mred")]
    out = cli("show", write_csv(tmp_path / "r.csv", rows)).out
    assert "red" in out
    assert "\x1b" not in out


# --- comparison ---

TOKENS = report.COMPARED[:1]


@pytest.mark.parametrize(("slower", "different"), [(1.0, False), (1.05, True)], ids=["same", "5_percent"])
def test_runs_are_told_apart_by_more_than_noise(slower: float, different: bool, tmp_path: Path) -> None:
    right = 0
    for seed in range(20):
        a = level_of(simulated(2 * seed), tmp_path)
        b = level_of(simulated(2 * seed + 1, slower=slower), tmp_path)
        found = report.differences(a, b, TOKENS)[0]
        right += found.within_noise is not different
    assert right >= 18


def test_an_open_loops_rate_is_judged_by_its_arrivals(tmp_path: Path) -> None:
    """Latency varies a lot, the schedule fixes the rate: no more noise than the lengths have."""
    draw = random.Random(3)
    rows = simulated(1, 2000, 64)
    for place, row in enumerate(sorted(rows, key=lambda row: row["index"])):
        row.update(
            sent_s=place * 0.02, scheduled_s=place * 0.02, latency_ms=row["latency_ms"] * draw.lognormvariate(0, 1)
        )
    rows.sort(key=lambda row: row["sent_s"] + row["latency_ms"] / 1e3)
    noises = report.noises_of(level_of(rows, tmp_path), TOKENS[0])
    assert noises[0].log_se < 0.02


def test_repetitions_speak_for_themselves(tmp_path: Path) -> None:
    """Each run alone is precise, but runs of one server differ by 10 %: that is the noise."""
    levels: list[list[dict[str, Any]]] = [[], []]
    for run, repeat in itertools.product((0, 1), range(3)):
        slower = (1.0, 1.1, 0.9)[repeat] * (1.03 if run else 1.0)
        rows = simulated(10 * run + repeat, 400, slower=slower, level=16, repeat=repeat, start_unix_s=repeat * 1000)
        levels[run] += rows
    a, b = (level_of(rows, tmp_path) for rows in levels)
    assert len(a.points) == 3
    assert report.differences(a, b, TOKENS)[0].within_noise is True
    assert report.noises_of(a, TOKENS[0])[0].dof == 2


def test_student_t_is_the_tables() -> None:
    for dof, value in (
        (1, 63.657),
        (2, 9.925),
        (3, 5.841),
        (4, 4.604),
        (5, 4.032),
        (10, 3.169),
        (30, 2.750),
        (1e6, 2.576),
    ):
        assert report.student_t(dof) == pytest.approx(value, rel=0.003)


def test_compare_in_plain_words(tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    a = write_csv(tmp_path / "before.csv", simulated(1, 1000))
    b = write_csv(tmp_path / "after.csv", simulated(2, 1000, slower=0.8))
    out = cli("compare", a, b).out
    assert re.search(r"^after is 1\.2\d ± 0\.\d\d times faster in output tokens/s, ", out, re.MULTILINE)
    same = cli("compare", a, write_csv(tmp_path / "again.csv", simulated(3, 1000))).out
    assert re.search(r"^output tokens/s, .* differ within noise\.$", same, re.MULTILINE)


def test_what_is_not_comparable_is_said_first(tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    a = write_json(tmp_path / "a.jsonl", summary(mean_output_tokens=128.0, mean_prompt_tokens=100.0))
    changes = {"model_id": "other", "mean_output_tokens": 64.0, "max_concurrency": 9, "failed": 50, "aborted": 3}
    b = write_json(tmp_path / "b.jsonl", summary(**changes, client_bound="it waited for a core"))
    out = cli("compare", a, b).out
    head = out[: out.index("ratio")]
    told = (
        "another model: m, other",
        "other output lengths",
        "another load",
        "measured its client",
        "33.3%",
        "3 of its",
    )
    for words in told:
        assert words in head
    assert "noise unknown for output tokens/s" in out


@pytest.mark.parametrize(
    ("condition", "code"),
    [
        ("p99_ttft_ms > +10%", 3),
        ("p99_ttft_ms > +60%", 0),
        ("p99_latency_ms > +10%", 0),
        ("p99_ttft_ms>+5", 3),
        ("output_throughput < -5%", 0),
        ("error_rate > +0.01", 0),
        ("p99_itl_ms > +10%", 3),
        ("p99_ttfft_ms > +10%", 2),
        ("p99_ttft_ms", 2),
        ("p99_ttft_ms > ten", 2),
    ],
)
def test_fail_if(condition: str, code: int, tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    a = write_json(tmp_path / "a.jsonl", summary())
    b = write_json(tmp_path / "b.jsonl", summary(p99_ttft_ms=60.0))
    done = cli("compare", a, b, "--fail-if", condition)
    assert done.code == code, done.out + done.err
    if code == 2:
        assert len(done.err.splitlines()) == 1
    if "ttfft" in condition:
        assert "p99_ttft_ms" in done.err
    if "itl" in condition:
        assert "not measured" in done.out


def test_compare_by_level_and_its_usage(tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    a, b = sweep(tmp_path, "a"), sweep(tmp_path, "b", p99_tpot_ms=9.0)
    assert cli("compare", a, b).out.count("===\n") == 5
    assert cli("compare", a).code == 2
    assert cli("compare", a, write_json(tmp_path / "c.jsonl", summary(max_concurrency=3), summary())).code == 0
    assert cli("compare", a, f"other={a}").code == 0


# --- the page ---

HOSTILE = '</script><img src=x onerror="window.hacked=1">"@ink"<b>'


def pages(tmp_path: Path, cli: Callable[..., Outcome]) -> dict[str, Path]:
    """A single run, a sweep with limits, and three runs overlaid; names and errors as hostile as a server's may be."""
    rows = [*simulated(1, 300, label=HOSTILE), failure(300, 0.4, kind=HOSTILE), failure(301, 0.5)]
    single = write_csv(tmp_path / "single.csv", rows)
    inputs: dict[str, list[str]] = {"single": [single], "sweep": [], "three": []}
    swept = [row for n in (1, 4, 16) for row in simulated(n, 60 + n, n, level=n, start_unix_s=n * 100)]
    inputs["sweep"] = [write_csv(tmp_path / "sweep.csv", swept), "--slo", "p99_ttft_ms<80"]
    for run in range(2):
        rows = [r for n in (2, 8) for r in simulated(n, 80, n, 1 + run / 4, level=n, start_unix_s=n * 100)]
        inputs["three"].append(f"<b>{run}={write_csv(tmp_path / f'{run}.csv', rows)}")
    words = {"model_id": HOSTILE, "warnings": [HOSTILE], "client_bound": HOSTILE, "config": {HOSTILE: HOSTILE}}
    inputs["three"].append(sweep(tmp_path, "third", label=HOSTILE, server_name=HOSTILE, **words))
    made = {}
    for name, files in inputs.items():
        made[name] = tmp_path / f"{name}.html"
        done = cli("html", *files, "-o", str(made[name]))
        assert done.code == 0, done.err
    return made


def test_the_page_asks_the_network_for_nothing(tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    pytest.importorskip("plotly")
    for page in pages(tmp_path, cli).values():
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=", text[: text.index("<script>/*")])
        assert "default-src 'none'" in text
        assert 'window.hacked=1">' not in text.replace("&quot;", "")
        assert "<img" not in text[: text.index("<script>/*")]


def test_every_picture_is_one_that_plotly_knows(tmp_path: Path) -> None:
    graph = pytest.importorskip("plotly.graph_objects")
    levels = []
    for run, n in itertools.product("ab", (2, 8)):
        levels.append(level_of([*simulated(n, 60, n, level=n), failure(60, 0.1, level=n)], tmp_path, run))
    figures = {"server_running": [[0, 1], [1, 2]], "gpu_power_w": {"gpu 0": [[0, 300.0], [1, 310.0]]}}
    levels[0].points[0].figures.update(figures)
    slos = [report.parse_slo("p99_ttft_ms<50"), report.parse_slo("p99_tpot_ms<6")]
    pictures, strips = report.pictures_of(levels, slos)
    keys = {picture.key for picture in pictures}
    assert keys == {
        "pareto",
        "load-ttft_ms",
        "load-tpot_ms",
        "load-e2el_ms",
        "ecdf-e2el_ms",
        "ecdf-ttft_ms",
        "ecdf-tpot_ms",
    }
    assert len(strips) == 4
    for picture in [*pictures, *(picture for _, picture in strips)]:
        graph.Figure(report.light_figure(picture))  # raises where a property is unknown
    headings = [note["text"] for note in strips[0][1].layout["annotations"]]
    assert {"<b>server_running</b>", "<b>gpu 0</b>", "<b>errors: 1</b>"} <= set(headings)


def test_thinning_hides_no_extreme_and_is_said(tmp_path: Path) -> None:
    rows = simulated(1, 9000, 64)
    rows[4321]["ttft_ms"] = 9999.0
    rows[77]["ttft_ms"] = 0.01
    picture = report.over_time(level_of(rows, tmp_path).points[0], "t")
    assert picture is not None
    dots = next(line for line in picture.data if line["mode"] == "markers")
    assert len(dots["y"]) <= report.MOST_DOTS * 1.1
    assert (max(dots["y"]), min(dots["y"])) == (9999.0, 0.01)
    assert f"{len(dots['y']):,} of 9,000 requests drawn" in picture.caption


def test_a_distribution_runs_from_its_least_to_its_greatest() -> None:
    sample = np.random.default_rng(1).lognormal(3, 1, 100_000)
    x, y = report.ecdf(sample)
    assert (x[0], x[-1], y[-1]) == (sample.min(), sample.max(), 1.0)
    assert len(x) < 600
    places = np.searchsorted(np.sort(sample), x, side="right") / len(sample)
    assert np.allclose(places, y)


def test_throughput_is_per_gpu_where_all_say_how_many(tmp_path: Path) -> None:
    points = report.read_json(sweep(tmp_path, tensor_parallel_size="4"), report.Problems())
    picture = report.pareto(report.levels_of(points))
    assert picture is not None
    assert picture.data[0]["y"][0] == 25.0
    assert "per GPU" in picture.layout["yaxis"]["title"]["text"]


def test_a_report_is_written_anew_but_no_other_file(tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    pytest.importorskip("plotly")
    source = sweep(tmp_path)
    page = str(tmp_path / "r.html")
    assert cli("html", source, "-o", page).code == 0
    assert cli("html", source, "-o", page).code == 0
    before = Path(source).read_text()
    refused = cli("html", source, "-o", source)
    assert refused.code == 2
    assert Path(source).read_text() == before
    assert cli("html", source, "-o", str(tmp_path / "no" / "r.html")).code == 2
    assert cli("html", source, "-o", str(tmp_path)).code == 2


def test_without_plotly_the_cure_is_said(
    tmp_path: Path, cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("plotly", "plotly.offline"):
        monkeypatch.setitem(sys.modules, name, None)
    done = cli("html", sweep(tmp_path), "-o", str(tmp_path / "r.html"))
    assert (done.code, done.err) == (2, "bench_report: html needs plotly: pip install plotly\n")
    assert not (tmp_path / "r.html").exists()
    assert cli("show", sweep(tmp_path)).code == 0


def test_the_document_names_every_option() -> None:
    text = (ROOT / "docs" / "bench_report.md").read_text(encoding="utf-8")
    for verb in report.build_parser()._subparsers._group_actions[0].choices.values():  # type: ignore[union-attr]
        for action in verb._actions:
            assert not action.option_strings or action.option_strings[-1] in text or "--help" in action.option_strings


# --- in a browser ---


class Browser:
    """Headless Chromium, driven over a pipe by its DevTools protocol: what a page asks, throws and shows."""

    def __init__(self, program: str, folder: Path) -> None:
        inward, self._write = os.pipe()
        self._read, outward = os.pipe()
        options = ["--headless", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe", "--no-first-run"]
        options += ["--disable-extensions", "--disable-background-networking", "--disable-component-update"]
        options += ["--no-sandbox"] if os.geteuid() == 0 else []
        places = f'exec "$0" "$@" 3<&{inward} 4>&{outward}'  # it reads descriptor 3 and writes 4
        self._process = subprocess.Popen(
            ["bash", "-c", places, program, *options, f"--user-data-dir={folder}", "about:blank"],
            pass_fds=(inward, outward),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(inward)
        os.close(outward)
        self._number = 0
        self._buffer = b""
        self._session: Optional[str] = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            assert select.select([self._read], [], [], 60)[0], "the browser is silent"
            data = os.read(self._read, 1 << 20)
            assert data, "the browser has ended"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        loaded: dict[str, Any] = json.loads(message)
        return loaded

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        session = {"sessionId": self._session} if self._session else {}
        os.write(
            self._write,
            json.dumps({"id": self._number, "method": method, "params": params, **session}).encode() + b"\0",
        )
        while (message := self._message()).get("id") != self._number:
            self.events.append(message)
        assert "error" not in message, message
        result: dict[str, Any] = message["result"]
        return result

    def value(self, expression: str) -> Any:
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        return found["result"].get("value")

    def open(self, page: Path, width: int, dark: bool) -> None:
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[theme])
        self.call("Page.navigate", url=page.as_uri())
        while not self.named("Page.loadEventFired"):
            self.events.append(self._message())

    def named(self, *methods: str) -> list[dict[str, Any]]:
        return [event["params"] for event in self.events if event.get("method") in methods]

    def close(self) -> None:
        self._session = None
        with contextlib.suppress(AssertionError, OSError):
            self.call("Browser.close")
        self._process.wait(20)
        os.close(self._read)
        os.close(self._write)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    program = report.find_browser()
    if program is None or os.name != "posix" or not shutil.which("bash"):
        pytest.skip("no Chromium browser is installed")
    started = Browser(program, tmp_path / "profile")
    yield started
    started.close()


OPEN_ALL = """new Promise(done => { document.querySelectorAll("details").forEach(part => { part.open = true; });
    setTimeout(done, 50); })"""
SEEN = "[...document.querySelectorAll('figure')].map(figure => !!figure.querySelector('.trace'))"
BACK = "getComputedStyle(document.body).backgroundColor"


def test_the_page_in_a_browser(tmp_path: Path, cli: Callable[..., Outcome], browser: Browser) -> None:
    pytest.importorskip("plotly")
    expected = {"single": (4, 1400, True), "sweep": (10, 400, False), "three": (11, 400, True)}
    for name, page in pages(tmp_path, cli).items():
        figures, width, dark = expected[name]
        browser.open(page, width, dark)
        browser.value(OPEN_ALL)
        assert browser.value(SEEN) == [True] * figures, name
        assert browser.value("document.documentElement.scrollWidth") <= width
        back = browser.value(BACK)
        assert (back == "rgb(13, 17, 23)") is dark
        assert browser.value("window.hacked") is None
        asked = [params["request"]["url"] for params in browser.named("Network.requestWillBeSent")]
        assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
        assert not browser.named("Runtime.exceptionThrown", "Log.entryAdded")
    browser.value("document.querySelector('button').click()")
    assert browser.value(BACK) != back
    assert browser.value(SEEN) == [True] * figures
    assert not browser.named("Runtime.exceptionThrown", "Log.entryAdded")


def test_pictures_as_files(tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    pytest.importorskip("plotly")
    if report.find_browser() is None:
        pytest.skip("no Chromium browser is installed")
    source = write_csv(tmp_path / "r.csv", simulated(1, 60))
    folders = ("--png", str(tmp_path / "png"), "--svg", str(tmp_path / "svg"))
    done = cli("html", source, "-o", str(tmp_path / "r.html"), *folders)
    assert done.code == 0, done.err
    for kind, head in (("png", b"\x89PNG"), ("svg", b"<svg")):
        made = sorted((tmp_path / kind).iterdir())
        assert [path.stem for path in made] == ["ecdf-e2el_ms", "ecdf-tpot_ms", "ecdf-ttft_ms", "time-0"]
        assert all(path.read_bytes().startswith(head) for path in made)
