"""Section 13, Sweep: plans as pure functions, then whole sweeps against the simulated server."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping
from typing import Any, Callable

import pytest

import online_bench_openai_async as bench
from tests.support.records import closed_loop, health, make_config, summary_of


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
    assert sentence.endswith("16 is unresolved, it needs about 5,120 requests")
    assert bench.capacity_sentence([unsure], limits, "in flight").startswith("no level is sure to hold")
    cut = bench.Level([dataclasses.replace(measured(16), complete=False)], limits)
    assert bench.capacity_sentence([held, cut], limits, "in flight").endswith("16 is unresolved, it was not finished")
    assert "interrupted" in cut.verdict(None)


@pytest.mark.parametrize(("codes", "wins"), [([3, 1, 2, 130], 130), ([1, 3, 2], 2), ([3, 1], 1), ([0, 3], 3), ([], 0)])
def test_where_several_exit_codes_apply_one_wins(codes: list[int], wins: int) -> None:
    assert bench.exit_code(codes) == wins
