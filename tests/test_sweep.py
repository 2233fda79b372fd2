"""Section 14, Sweep: plans as pure functions, then whole sweeps against the simulated server."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Callable

import pytest

import online_bench_openai_async as bench
from tests.support.demo import Demo
from tests.support.program import ROOT, Running, cli
from tests.support.records import closed_loop, health, make_config, make_record, summary_of
from tests.support.replies import as_json, completion, reply
from tests.support.server import Call, HttpServer, closed_port


def walked(plan: bench.Plan, answer: Callable[[bench.Step], bench.Answer]) -> list[bench.Step]:
    """The steps of a plan whose points are answered so."""
    steps = [next(plan)]
    try:
        while len(steps) < 100:
            steps.append(plan.send(answer(steps[-1])))
    except StopIteration:
        return steps
    raise AssertionError("no end")


def test_a_plain_run_is_a_sweep_of_one_point() -> None:
    assert walked(bench.sweep_plan([128], 1), lambda step: bench.Answer(True)) == [bench.Step(128)]


def test_a_sweep_repeats_each_level_before_the_next() -> None:
    steps = walked(bench.sweep_plan([1, 2], 3), lambda step: bench.Answer(False, 9.0))
    assert [(step.level, step.repeat) for step in steps] == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 31, 64, 96, 100, 255, 256, 257, 400, 511])
def test_a_search_that_is_sure_of_each_point_brackets_the_limit(limit: int) -> None:
    steps = walked(bench.search_plan(1, 512, True), lambda step: bench.Answer(step.level <= limit))
    held = max(step.level for step in steps if step.level <= limit)
    failed = min(step.level for step in steps if step.level > limit)
    assert held >= limit / 1.05
    assert failed - held <= max(1, 0.04 * held)
    assert len(steps) <= 16
    assert len({step.level for step in steps}) == len(steps)


def test_a_search_ends_at_its_bounds() -> None:
    assert [s.level for s in walked(bench.search_plan(4, 100, True), lambda s: bench.Answer(False))] == [4]
    levels = [s.level for s in walked(bench.search_plan(4, 100, True), lambda s: bench.Answer(True))]
    assert levels == [4, 8, 16, 32, 64, 100]


def test_a_search_over_rates_has_no_whole_numbers() -> None:
    steps = walked(bench.search_plan(0.1, 50, False), lambda step: bench.Answer(step.level <= 1.23))
    held = max(step.level for step in steps if step.level <= 1.23)
    assert held >= 1.23 / 1.05


def test_on_the_way_up_a_level_need_not_be_sure_but_the_last_that_holds_must() -> None:
    """Fewer than 368 requests are never sure of a p99."""

    def answer(step: bench.Step) -> bench.Answer:
        made = max(64, 8 * step.level) * step.factor
        return bench.Answer(True, 368 / made) if step.level <= 20 else bench.Answer(False)

    steps = walked(bench.search_plan(1, 512, True), answer)
    assert [step.level for step in steps][:6] == [1, 2, 4, 8, 16, 32]
    assert bench.Step(20, 2, 3) in steps  # 480 requests
    assert [step for step in steps if step.level < 16 and step.repeat > 1] == []


def test_a_level_that_chance_could_turn_is_repeated_up_to_a_bound_and_holds_nothing() -> None:
    def answer(step: bench.Step) -> bench.Answer:
        return bench.Answer(True, math.inf) if step.level == 3 else bench.Answer(step.level < 3)

    steps = walked(bench.search_plan(1, 64, True), answer)
    assert [(step.level, step.factor) for step in steps] == [(1, 1), (2, 1), (4, 1), (3, 1), (3, 16)]


def test_a_level_that_held_by_chance_sends_the_search_down_again() -> None:
    """8 seems to hold until it is measured with more requests."""

    def answer(step: bench.Step) -> bench.Answer:
        if step.level == 8:
            return bench.Answer(step.factor == 1, 2.0 if step.factor == 1 else 1.0)
        return bench.Answer(step.level <= 5)

    levels = [step.level for step in walked(bench.search_plan(1, 512, True), answer)]
    assert levels == [1, 2, 4, 8, 16, 12, 10, 9, 8, 6, 5]


class Queue:
    """A server of so many places, in virtual time: TTFT is 50 ms, and longer by what waits; with noise."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def point(self, step: bench.Step, limit: str) -> bench.Measured:
        config = make_config(concurrency=int(step.level), slo=[limit], stream=True)
        n = int(max(64, 8 * step.level)) * step.factor
        mean_s = 0.05 + max(0.0, step.level - 64) * 0.005
        records = closed_loop([mean_s * self._rng.gammavariate(100, 0.01) for _ in range(n)], int(step.level))
        return bench.Measured(step.level, step.repeat, config, summary_of(*records, wave=int(step.level)), [health()])


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_search_finds_the_level_at_which_a_law_crosses_its_limit(seed: int) -> None:
    """The 99th percentile of the law is 1.245 means: 249 ms at 94 in flight."""
    server, points = Queue(seed), []

    def answer(step: bench.Step) -> bench.Answer:
        points.append(server.point(step, "p99_latency_ms<249"))
        return bench.answer_of(points[-1])

    walked(bench.search_plan(1, 512, True), answer)
    groups = bench.levels_of(points)
    limits = bench.limits_of(points[0].config)
    levels = [bench.Level(group[-1:], limits, bench.answer_of(group[-1]).needed) for group in groups]
    best = max(level.level for level in levels if level.holds)
    assert 94 / 1.05 <= best <= 94 * 1.05
    assert len(points) <= 16
    assert f"up to {best:g} in flight" in bench.capacity_sentence(levels, limits, "in flight")


def test_errors_count_against_a_level_unless_its_limits_speak_of_them() -> None:
    def names(*slo: str) -> list[str]:
        return [str(limit) for limit in bench.limits_of(make_config(slo=list(slo)))]

    assert names() == []
    assert names("p99_ttft_ms<500") == ["p99_ttft_ms < 500", "error_rate <= 0.01"]
    assert names("error_rate<0.5") == ["error_rate < 0.5"]


# --- the table and its words ---


def measured(level: float, latency_s: float = 1.0, **changes: Any) -> bench.Measured:
    summary = summary_of(*closed_loop([latency_s] * int(8 * level), int(level)))
    summary = changes.pop("summary", summary)
    values = {"repeat": 1, "config": make_config(slo=["p99_latency_ms<1500"]), "health": [health()], **changes}
    return bench.Measured(level, summary=summary, **values)


def levels(*points: bench.Measured) -> list[bench.Level]:
    limits = bench.limits_of(points[0].config)
    return [bench.Level(group, limits) for group in bench.levels_of(points)]


@pytest.mark.parametrize(
    ("throughputs", "knee"),
    [
        ({1: 10.0, 2: 20.0, 4: 40.0, 8: 41.0}, 4),
        ({1: 10.0, 2: 20.0, 4: 40.0}, 4),
        ({1: 10.0, 4: 10.9, 16: 11.0}, None),  # 4.4 % per doubling
        ({1: 10.0, 4: 11.1, 16: 11.0}, 4),  # 5.4 %
        ({1: 10.0, 2: 20.0}, None),  # two levels show none
        ({1: 10.0, 2: None, 4: 40.0}, 4),
    ],
)
def test_the_knee_is_the_last_level_with_growth(throughputs: Mapping[float, Any], knee: Any) -> None:
    assert bench.knee(throughputs) == knee


def table_of(found: list[bench.Level]) -> list[str]:
    return bench.sweep_table(found, "in flight", bench.sweep_knee(found))


def sentences_of(found: list[bench.Level]) -> list[str]:
    return bench.sweep_sentences(found, "in flight", bench.sweep_knee(found))


def test_the_table_of_a_sweep() -> None:
    points = [measured(1), measured(2), measured(4), measured(8, 2.0)]
    lines = table_of(levels(*points))
    assert lines[0].split()[:5] == ["in", "flight", "req/s", "out", "tok/s"]
    assert [line.split()[0] for line in lines[2:6]] == ["1", "2", "4", "8"]
    assert [line.split("0  ")[-1] for line in lines[2:6]] == ["holds", "holds", "knee, holds", "fails p99_latency_ms"]
    assert lines[6].startswith("* too few values")
    assert max(map(len, lines)) <= 120


def test_the_words_of_a_sweep() -> None:
    bound = {"health": [health(kernel_clock=False, lag_p99_ms=900.0)]}
    told = levels(measured(1), measured(2), measured(4), measured(8, 2.0, **bound))
    assert sentences_of(told) == [
        "Knee: 4 in flight; beyond it throughput grows by less than 5% per doubling",
        "At 8 in flight this client, not the server, was the limit",
    ]
    assert "No knee: at 4 in flight" in sentences_of(told[:3])[0]


def test_levels_that_failed_or_were_cut_short_say_nothing_of_the_knee() -> None:
    failed = [make_record(n, status="http_error", error_kind="http_500", error="x") for n in range(60)]
    broken = summary_of(make_record(), *failed)
    told = levels(measured(1), measured(2), measured(4), measured(8, summary=broken), measured(16, complete=False))
    assert "No knee: at 4 in flight" in sentences_of(told)[0]
    assert not any("knee" in line for line in table_of(told))
    assert sentences_of(levels(measured(1), measured(2), measured(4, summary=broken))) == []
    searched = {"config": make_config(slo=["p99_latency_ms<1500"], find_max=[1.0, 8.0])}
    assert bench.sweep_sentences(levels(*(measured(n, **searched) for n in (1, 2, 4))), "in flight", None) == []


def test_repetitions_give_the_median_with_the_least_and_the_greatest() -> None:
    points = [measured(2, seconds, repeat=n) for n, seconds in enumerate((1.0, 1.2, 1.1), 1)]
    lines = table_of(levels(*points))
    assert [line.split()[0] for line in lines[2:5]] == ["2", "min", "max"]
    column = lines[1].split().index("p95") + 1
    assert [line.split()[column + 1] for line in lines[3:5]] == ["1000", "1200"]
    assert "1100" in lines[2]


@pytest.mark.parametrize(
    ("latencies", "told"),
    [
        (
            {1: 1.0, 2: 1.0, 4: 1.6},
            "up to 2 in flight (2.00 req/s, 10 tok/s) hold p99 latency < 1500 ms and error rate <= 0.01;"
            " at 4 p99 latency is 1600 ms",
        ),
        ({1: 1.0, 2: 1.2}, "; 2 is the highest that was tried"),
        ({1: 1.6, 2: 1.7}, "no level holds p99 latency < 1500 ms and error rate <= 0.01; at 1 p99 latency is 1600 ms"),
        ({1: 1.0, 2: 1.6, 4: 1.0}, "(though 2 did not); 4 is the highest that was tried"),
    ],
)
def test_the_end_is_one_sentence(latencies: Mapping[int, float], told: str) -> None:
    found = levels(*(measured(level, seconds) for level, seconds in latencies.items()))
    assert told in bench.capacity_sentence(found, bench.limits_of(found[0].points[0].config), "in flight")


def test_what_is_not_sure_is_called_unresolved_and_told_its_need() -> None:
    limits = bench.limits_of(measured(1).config)
    held, unsure = bench.Level([measured(8)], limits), bench.Level([measured(16)], limits, needed=5.0)
    sentence = bench.capacity_sentence([held, unsure], limits, "in flight")
    assert sentence.endswith("16 is unresolved, it needs about 640 requests")
    assert bench.capacity_sentence([unsure], limits, "in flight").startswith("no level is sure to hold")
    cut = bench.Level([dataclasses.replace(measured(16), complete=False)], limits)
    assert bench.capacity_sentence([held, cut], limits, "in flight").endswith("16 is unresolved, it was not finished")
    assert "interrupted" in cut.verdict(None)


@pytest.mark.parametrize(("codes", "wins"), [([3, 1, 2, 130], 130), ([1, 3, 2], 2), ([3, 1], 1), ([0, 3], 3), ([], 0)])
def test_where_several_exit_codes_apply_one_wins(codes: list[int], wins: int) -> None:
    assert bench.exit_code(codes) == wins


# --- whole sweeps ---

SIZES = ["--prompt-tokens", "16", "--output-tokens", "9", "--no-progress", "--server-metrics", "off"]


class Watching(HttpServer):
    """Answers after a while; knows each prompt, and how many requests were in flight when it came."""

    def __init__(self, seconds: Callable[[int], float], dies_at: float = math.inf) -> None:
        """`seconds`: of the request with that number, warm-ups aside; `dies_at`: it closes its port with that one."""
        self.prompts: list[str] = []
        self.peaks: list[int] = []
        self._in_flight = 0
        self._seconds = seconds
        self._dies_at = dies_at
        self._mutex = threading.Lock()
        super().__init__(self._answer_one)

    def _answer_one(self, call: Call) -> None:
        asked = json.loads(call.body)
        with self._mutex:
            measured = asked["max_tokens"] == 9  # of a warm-up 8
            number = len(self.prompts)
            self._in_flight += 1
            if measured:
                self.prompts.append(asked["messages"][0]["content"])
                self.peaks.append(self._in_flight)
        if measured and number >= self._dies_at:
            self.stop()
        time.sleep(self._seconds(number) if measured else 0.001)
        with self._mutex:
            self._in_flight -= 1
        call.send(reply("200 OK", as_json(completion())))


@pytest.fixture
def watching() -> Iterator[Callable[..., Watching]]:
    """Starts servers that are stopped at the end of the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *given, **named: stack.enter_context(Watching(*given, **named))


def target(server: HttpServer) -> list[str]:
    return ["--api-base", server.api_base, "--model", "m", "--warmup", "3", *SIZES]


@pytest.mark.parametrize("more", [[], ["--transport", "sdk"], ["--processes", "2"]], ids=["", "sdk", "processes"])
def test_level_by_level_the_server_sees_the_concurrency_and_no_prompt_twice(
    watching: Callable[..., Watching], tmp_path: Path, more: list[str]
) -> None:
    server = watching(lambda number: 0.3 if number in {0, *range(64, 67), *range(128, 136)} else 0.005)
    files = ["--results-csv", tmp_path / "r.csv", "--summary-jsonl", tmp_path / "s.jsonl"]
    done = cli(*target(server), "--concurrency", "1,3,8", "--requests-per-slot", "8", "--seed", "5", *files, *more)
    assert done.code == 0, done.err
    assert len(set(server.prompts)) == len(server.prompts) == 3 * 64
    assert [max(server.peaks[at : at + 64]) for at in (0, 64, 128)] == [1, 3, 8]
    assert [int(row["index"]) for row in done.rows] == list(range(192))
    assert [row["level"] for row in done.rows] == ["1"] * 64 + ["3"] * 64 + ["8"] * 64
    assert {row["repeat"] for row in done.rows} == {"1"}
    assert len({row["start_unix_s"] for row in done.rows}) == 3
    starts = {level: min(float(row["sent_s"]) for row in done.rows if row["level"] == level) for level in "138"}
    assert max(starts.values()) < 0.5, starts  # it begins anew at each point
    told = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [(one["level"], one["max_concurrency"], one["completed"]) for one in told] == [
        (1, 1, 64),
        (3, 3, 64),
        (8, 8, 64),
    ]
    assert done.out.count("Requests (ok/err): 64/0") == done.out.count("Avg latency: ") == 3
    assert done.out.count("=== Benchmark Configuration ===") == 1
    assert "   concurrency: 1,3,8\n" in done.out
    took = told[-1]["start_unix_s"] + told[-1]["duration"] - told[0]["start_unix_s"]
    assert took - sum(one["duration"] for one in told) < 1.0


@pytest.mark.usefixtures("unbound")
def test_a_sweep_finds_the_batch_limit_and_a_search_the_load_that_a_limit_allows(demo: Callable[..., Demo]) -> None:
    """8 places, 4 steps of 5 ms: beyond 8 in flight a request waits for the batch before it."""
    server = demo(step_ms=5, step_ms_per_sequence=0, max_batch=8)
    asked = [*server.target, *SIZES, "--output-tokens", "4", "--stream"]
    swept = cli(*asked, "--concurrency", "2,8,16,32")
    assert swept.code == 0, swept.err
    assert re.search(r"^(Knee: (8|16) in flight|No knee: at 32)", swept.out, re.MULTILINE)  # where the box is busy
    found = cli(*asked, "--find-max", "8:32", "--slo", "p90_ttft_ms<38")
    assert found.code == 0, found.err
    assert "\nup to " in found.out
    best = int(found.out.split("\nup to ")[1].split()[0])
    assert 8 <= best <= 20  # with one batch before it TTFT is 25 to 30 ms, with two 45 to 50


@pytest.fixture
def unbound(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine of the test is, the client is not to blame."""
    monkeypatch.setattr(bench, "client_doubts", lambda *_: [])


@pytest.mark.parametrize(
    ("judging", "code", "told"),
    [
        (["--assert", "p95_latency_ms<9e3", "--assert", "error_rate<=0"], 0, "Assert: error_rate <= 0: holds (0)"),
        (["--assert", "p50_latency_ms<1", "--assert", "failed<1"], 3, "Assert: p50_latency_ms < 1: FAILS ("),
        (["--assert", "p99_ttft_ms<500"], 3, "FAILS: it was not measured (it takes --stream)"),
        (["--assert", "request_goodput>1"], 3, "FAILS: it was not measured (it takes --goodput)"),
        (["--slo", "p50_latency_ms<1"], 3, "SLO: p50_latency_ms < 1: FAILS ("),
        (["--slo", "p50_latency_ms<9e3"], 0, "SLO: error_rate <= 0.01: holds (0)"),
        (["--slo", "mean_latency_ms<200", "--concurrency", "1,8"], 0, "up to 1 in flight"),
        (["--slo", "mean_latency_ms<1", "--concurrency", "1,8"], 3, "no level holds mean latency < 1 ms"),
        (["--find-max", "2:8", "--slo", "mean_latency_ms<1"], 3, "no level holds mean latency < 1 ms"),
    ],
)
@pytest.mark.usefixtures("unbound")
def test_figures_are_judged_and_the_exit_code_says_so(
    watching: Callable[..., Watching], judging: list[str], code: int, told: str
) -> None:
    server = watching(lambda number: 0.005 if number < 16 else 0.3)
    size = ["--total-requests", "16"] + (
        [] if {"--concurrency", "--find-max"} & set(judging) else ["--concurrency", "8"]
    )
    done = cli(*target(server), *size, *judging)
    assert done.code == code, done.err
    assert told in done.out + done.err


def test_goodput_and_the_steady_window_are_those_of_the_csv(watching: Callable[..., Watching], tmp_path: Path) -> None:
    """The first wave is slow by construction: the whole run's p99 shows it, the steady window's does not."""
    server = watching(lambda number: 0.5 if number < 4 else 0.02 + 0.01 * (number % 2))
    files = ["--results-csv", tmp_path / "r.csv", "--summary-jsonl", tmp_path / "s.jsonl"]
    size = ["--concurrency", "4", "--total-requests", "80", "--goodput", "e2el:35"]
    done = cli(*target(server), *size, *files)
    assert done.code == 0, done.err
    told = json.loads((tmp_path / "s.jsonl").read_text())
    latency = [float(row["latency_ms"]) for row in done.rows]
    sent = [float(row["sent_s"]) for row in done.rows]
    ends = sorted(s + ms / 1e3 for s, ms in zip(sent, latency))
    assert told["request_goodput"] == pytest.approx(sum(ms <= 35 for ms in latency) / told["duration"])
    assert told["goodput_shares"]["goodput_share_e2el"] == told["goodput_share"] == sum(ms <= 35 for ms in latency) / 80
    steady = sorted(ms for s, ms in zip(sent, latency) if ends[3] <= s <= max(sent))
    assert told["p99_latency_ms"] == pytest.approx(bench.percentile(sorted(latency), 99), abs=0.001)
    assert told["steady_p99_latency_ms"] == pytest.approx(bench.percentile(steady, 99), abs=0.001)
    assert told["steady_p99_latency_ms"] < 400 < told["p99_latency_ms"]
    assert told["steady_request_throughput"] == pytest.approx(
        sum(ends[3] < end <= max(sent) for end in ends) / (max(sent) - ends[3]), rel=0.001
    )
    assert "Opening: of the " in done.out


def test_repetitions_are_points_of_their_own(watching: Callable[..., Watching], tmp_path: Path) -> None:
    server, path = watching(lambda number: 0.002), tmp_path / "s.jsonl"
    files = ["--results-csv", tmp_path / "r.csv", "--summary-jsonl", path]
    done = cli(*target(server), "--concurrency", "4", "--total-requests", "10", "--repeat", "3", *files)
    assert done.code == 0, done.err
    assert len(set(server.prompts)) == 30
    assert [row["repeat"] for row in done.rows] == ["1"] * 10 + ["2"] * 10 + ["3"] * 10
    assert [json.loads(line)["repeat"] for line in path.read_text().splitlines()] == [1, 2, 3]
    assert [line.split()[0] for line in done.out.split("\nin flight")[1].splitlines()[2:5]] == ["4", "min", "max"]


def test_a_corpus_goes_on_from_level_to_level_and_says_when_it_cycles(
    watching: Callable[..., Watching], tmp_path: Path
) -> None:
    server, corpus = watching(lambda number: 0.002), tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"prompt {n}", "max_tokens": 9}) + "\n" for n in range(40)))
    sizes = ["--concurrency", "1,2,3", "--total-requests", "16", "--requests-file", corpus]
    done = cli(*target(server), *sizes)
    assert done.code == 0, done.err
    assert server.prompts[:40] == [f"prompt {n}" for n in range(40)] or len(set(server.prompts[:40])) == 40
    assert done.err.count("48 requests cycle through 40 prompts") == 1


# --- what ends a sweep early ---


@pytest.mark.parametrize(
    ("search", "more"), [(False, []), (True, []), (False, ["--processes", "2"])], ids=["sweep", "search", "processes"]
)
def test_ctrl_c_ends_it_after_the_level_and_reports_everything(
    watching: Callable[..., Watching], tmp_path: Path, search: bool, more: list[str]
) -> None:
    server = watching(lambda number: 0.01)
    plan = ["--find-max", "2:64", "--slo", "p50_latency_ms<2000"] if search else ["--concurrency", "2,4,8,16"]
    program = Running(tmp_path, *target(server), *plan, "--requests-per-slot", "16", *more)
    program.wait_for_rows(70)  # the second level has begun
    program.send("SIGINT")
    done = program.outcome()
    assert done.code == 130, done.err
    told = [json.loads(line) for line in program.jsonl.read_text().splitlines()]
    assert [one["level"] for one in told] == [2, 4]
    assert [one["interrupted"] for one in told] == [False, True]
    assert len(done.rows) == len({row["index"] for row in done.rows}) == sum(one["completed"] for one in told) < 128
    assert done.out.count("Req/s: ") == 2
    assert "interrupted" in done.out.split("\nin flight")[1]


def test_ctrl_c_while_it_cools_down_reports_what_was_measured(
    watching: Callable[..., Watching], tmp_path: Path
) -> None:
    server = watching(lambda number: 0.001)
    sizes = ["--concurrency", "1,2", "--total-requests", "5", "--cooldown", "60"]
    program = Running(tmp_path, *target(server), *sizes)
    program.wait_until(lambda: program.jsonl.is_file() and program.jsonl.read_text().count("\n") == 1)
    program.send("SIGINT")
    done = program.outcome()
    assert (done.code, len(done.rows)) == (130, 5), done.err


@pytest.mark.parametrize("more", [[], ["--processes", "2"]], ids=["", "processes"])
def test_a_server_that_dies_at_the_third_level_loses_nothing_measured(
    watching: Callable[..., Watching], tmp_path: Path, more: list[str]
) -> None:
    server = watching(lambda number: 0.002, dies_at=64 + 128 + 30)
    files = ["--results-csv", tmp_path / "r.csv", "--summary-jsonl", tmp_path / "s.jsonl"]
    done = cli(*target(server), "--concurrency", "1,2,4,8", "--requests-per-slot", "64", *files, *more)
    assert done.code == 1, done.err
    told = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [one["level"] for one in told] == [1, 2, 4]
    assert told[2]["stop_reason"]
    assert len(done.rows) == sum(one["completed"] + one["failed"] + one["aborted"] for one in told)
    assert "\nin flight" in done.out
    assert "Traceback" not in done.err


def test_a_process_that_dies_is_replaced_for_the_next_level(watching: Callable[..., Watching], tmp_path: Path) -> None:
    server = watching(lambda number: 0.01)
    sizes = ["--concurrency", "4,8", "--total-requests", "200", "--processes", "2", "--max-error-rate", "1"]
    program = Running(tmp_path, *target(server), *sizes)
    program.wait_for_rows(20)
    os.kill(program.children[0], signal.SIGKILL)
    done = program.outcome()
    assert done.code == 0, done.err
    lost = [row for row in done.rows if row["error_kind"] == "process_lost"]
    assert {row["level"] for row in lost} == {"4"}
    assert sum(row["level"] == "8" and row["status"] == "success" for row in done.rows) == 200


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--concurrency", "1,2,1"], "takes each level once"),
        (["--concurrency", "1,,2"], "takes a whole number"),
        (["--find-max", "1:8"], "--find-max needs a limit"),
        (["--find-max", "8:1", "--slo", "p99_ttft_ms<5"], "takes the least and the greatest level as in 1:512"),
        (["--find-max", "1:8", "--slo", "p99_ttft_ms<5", "--concurrency", "1,2"], "no list, no --repeat"),
        (["--find-max", "1:8", "--slo", "p99_ttft_ms<5", "--repeat", "2"], "no --repeat"),
        (["--find-max", "1:8", "--slo", "p99_ttft_ms<5", "--concurrency", "4"], "leave out --concurrency"),
        (["--total-requests", "5", "--requests-per-slot", "5"], "exclude each other"),
        (["--request-rate", "1,inf", "--duration", "5"], "inf is no rate"),
        (["--slo", "p99_tfft_ms<5"], "nearest: p99_ttft_ms"),
        (["--assert", "p99_ttft_ms"], "as in p99_ttft_ms<500"),
        (["--concurrency", "1,2", "--request-rate", "1,2"], "two lists at once"),
        (["--request-rate", "1,2"], "how long is each rate?"),
        (["--find-max", "1:8", "--request-rate", "1", "--slo", "p99_ttft_ms<5"], "how long is each rate?"),
        (["--find-max", "1:8.5", "--slo", "p99_ttft_ms<5"], "whole numbers in flight"),
        (["--goodput", "ttft:500"], "--goodput ttft needs --stream"),
        (["--goodput", "ttfb:500"], "as in ttft:500 tpot:50 e2el:5000"),
        (["--goodput", "ttft:-1", "--stream"], "a number of ms above 0"),
        (["--gpus", "0"], "--gpus"),
        (["--gpu-hour", "nan"], "takes a price above 0"),
        (["--cooldown", "-1"], "--cooldown"),
        (["--repeat", "0"], "--repeat"),
    ],
)
def test_what_does_not_go_together_is_one_line(argv: list[str], complaint: str) -> None:
    done = cli("--model", "m", "--api-base", "http://127.0.0.1:9/v1", *argv)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1), done.err
    assert complaint in done.err


# --- in the shell ---

BIN = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def shell(*words: Any, **env: str) -> subprocess.CompletedProcess[str]:
    named = {**os.environ, "PATH": BIN, **env}
    return subprocess.run([str(w) for w in words], capture_output=True, text=True, env=named, timeout=60, check=False)


def test_the_sweep_in_the_shell_goes_on_where_it_was_stopped(watching: Callable[..., Watching], tmp_path: Path) -> None:
    server = watching(lambda number: 0.001)
    (tmp_path / "concurrency-2.csv").write_text("made before\n")
    options = {"LEVELS": "1 2 3", "OPTIONS": " ".join([*SIZES, "--warmup", "1", "--server-metrics", "off"])}
    done = shell(ROOT / "examples" / "sweep.sh", "m", server.api_base, tmp_path, **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Requests (ok/err): 8/0")
    assert "concurrency 2: done before" in done.stderr
    assert len(server.prompts) == 8 + 24
    assert len((tmp_path / "summary.jsonl").read_text().splitlines()) == 2
    again = shell(ROOT / "examples" / "sweep.sh", "m", server.api_base, tmp_path, **options)
    assert (again.returncode, again.stdout, len(server.prompts)) == (0, "", 32)


@pytest.mark.parametrize(("limits", "code"), [("p50_latency_ms<9e3", 0), ("p50_latency_ms<0.001", 3)])
def test_the_gate_for_ci_says_by_its_exit_code(demo: Callable[..., Demo], limits: str, code: int) -> None:
    server = demo(ttft_ms=1, gap_ms=0)
    options = {"LIMITS": limits, "WAIT_READY": "5", "OPTIONS": f"{' '.join(SIZES)} --concurrency 2 --total-requests 8"}
    done = shell(ROOT / "examples" / "ci_gate.sh", "demo", server.url, **options)
    assert done.returncode == code, done.stderr
    assert f"SLO: {limits.replace('<', ' < ').replace('9e3', '9000')}: " in done.stdout


def test_the_gate_for_ci_waits_for_a_server_and_gives_up() -> None:
    with closed_port() as port:
        done = shell(ROOT / "examples" / "ci_gate.sh", "m", f"http://127.0.0.1:{port}/v1", WAIT_READY="1")
    assert done.returncode == 1


@pytest.mark.parametrize("readme", ["README.md", "README.ja.md"])
def test_ctrl_c_in_a_loop_of_the_readme_ends_the_loop(readme: str) -> None:
    """The benchmark's exit code is 130 then, which by itself ends no loop."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", (ROOT / readme).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    loops = [block for block in blocks if re.search(r"^done", block, re.MULTILINE)]
    assert loops
    for loop in loops:
        done = shell("bash", "-c", f"python() {{ echo run; return 130; }}\n{loop}")
        assert done.stdout == "run\n"
