"""Section 3, Schedule: which jobs there are, when they are due, and who does them."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Any, Optional

import pytest

import online_bench_openai_async as bench
from tests.support.records import make_config, make_record, summary_of


def poisson(count: int = 20_000, **changes: Any) -> bench.Schedule:
    return bench.Schedule(count, "rate", rate=50.0, seed=3, **changes)


def due(schedule: bench.Schedule) -> list[float]:
    return [job.due_s for job in schedule if job.due_s is not None]


def gaps(times: list[float]) -> list[float]:
    return [later - earlier for earlier, later in zip(times, times[1:])]


SCHEDULES = {
    "closed": bench.Schedule(20),
    "poisson": poisson(20),
    "bursty": poisson(20, burstiness=0.3, ramp_up_s=1.0),
    "trace": bench.Schedule(20, "trace", stamp_s=lambda index: index**2 / 4),
}


@pytest.mark.parametrize("shards", [1, 2, 3, 7])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_parts_of_several_processes_are_the_whole_schedule(kind: str, shards: int) -> None:
    whole = SCHEDULES[kind]
    dealt = [job for shard in range(shards) for job in whole.part(shard, shards)]
    assert sorted(dealt, key=lambda job: job.index) == list(whole)
    assert [job.index for job in whole] == list(range(20))


@pytest.mark.parametrize(("total", "shards"), [(128, 1), (100, 3), (7, 4), (2, 5)])
def test_shares_of_the_concurrency_add_up(total: int, shards: int) -> None:
    parts = [bench.share(total, shard, shards) for shard in range(shards)]
    assert sum(parts) == total
    assert max(parts) - min(parts) <= 1


def test_closed_loop_jobs_are_due_at_once() -> None:
    assert {job.due_s for job in bench.Schedule(5)} == {None}


@pytest.mark.parametrize("schedule", [bench.Schedule(10**12), bench.Schedule(), poisson(10**12)])
def test_millions_of_jobs_cost_nothing_before_they_are_taken(schedule: bench.Schedule) -> None:
    assert next(iter(schedule.part(1, 3))).index == 1


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 4.0, math.inf])
def test_the_gaps_of_a_rate_have_its_mean_and_its_burstiness(burstiness: float) -> None:
    """A gamma distribution of shape k has a coefficient of variation of 1 / sqrt(k); Poisson's is 1."""
    found = gaps(due(poisson(burstiness=burstiness)))
    assert statistics.fmean(found) == pytest.approx(1 / 50, rel=0.03)
    assert statistics.pstdev(found) / statistics.fmean(found) == pytest.approx(burstiness**-0.5, abs=0.03)


def test_evenly_spaced_times_are_multiples_of_the_gap_however_many_there_are() -> None:
    last = due(bench.Schedule(1_000_001, "rate", rate=300.0, burstiness=math.inf))[-1]
    assert last == pytest.approx(1_000_000 / 300, rel=1e-15)


def test_the_seed_alone_decides_the_times() -> None:
    assert due(poisson(50)) == due(poisson(50))
    assert due(poisson(50)) != due(bench.Schedule(50, "rate", rate=50.0, seed=4))
    assert gaps(due(bench.Schedule(50, "rate", rate=100.0, seed=3))) == pytest.approx(
        [gap / 2 for gap in gaps(due(poisson(50)))]
    )


def test_a_duration_ends_a_schedule_that_has_no_number() -> None:
    schedule = bench.Schedule(None, "rate", duration_s=2.0, rate=50.0, burstiness=math.inf)
    assert len(list(schedule)) == 100


def test_a_rate_grows_linearly() -> None:
    """At 100/s after 4 s of growth, 200 t**2 / 16 requests are due by t."""
    times = due(bench.Schedule(1000, "rate", rate=100.0, burstiness=math.inf, ramp_up_s=4.0))
    assert [sum(at < second for at in times) for second in (1, 2, 3, 4, 5, 6)] == [13, 50, 113, 200, 300, 400]


@pytest.mark.parametrize("shards", [1, 3])
def test_a_concurrency_grows_linearly(shards: int) -> None:
    schedule = bench.Schedule(1000, ramp_up_s=8.0)
    parts = [schedule.part(n, shards).permits_s(bench.share(16, n, shards)) for n in range(shards)]
    opened = sorted(itertools.chain.from_iterable(parts))
    assert opened == pytest.approx([0.5 * number for number in range(16)], abs=0.6)


def test_a_traces_times_count_from_its_first_line_in_its_unit_and_at_its_speed() -> None:
    config = make_config(timestamp_unit="ms", speed=10.0, total_requests=3)
    assert due(bench.Schedule.of(config, [5_000.0, 6_000.0, 9_000.0].__getitem__)) == [0.0, 0.1, 0.4]
    config = make_config(timestamp_unit="s", total_requests=2)
    assert due(bench.Schedule.of(config, [5.0, 6.5].__getitem__)) == [0.0, 1.5]


# --- sessions ---


def session(*delays_ms: float, **fields: Any) -> bench.Request:
    """A line whose turns are named by their numbers, each after its think time."""
    turns = [bench.SessionTurn(str(turn), None, delay, f"own {turn}") for turn, delay in enumerate(delays_ms)]
    return bench.Request({"messages": [{"role": "user", "content": "0"}], **fields}, turns=turns)


def sessions(*lines: bench.Request, history: str = "server") -> bench.Sessions:
    starts = list(itertools.accumulate((max(1, len(line.turns)) for line in lines), initial=0))
    return bench.Sessions(lines, starts, history)


def test_the_turns_of_a_session_are_numbered_one_after_the_other() -> None:
    three = sessions(session(0, 0, 0), bench.Request({}), session(0, 0))
    assert [three.first(number) for number in range(5)] == [0, 3, 4, 6, 9]
    assert [three.place(index) for index in range(7)] == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1), (3, 0)]
    assert [index for index in range(12) if three.goes_on(index)] == [0, 1, 4, 6, 7, 10]
    schedule = bench.Schedule(5, sessions=three)
    assert [job.index for shard in range(2) for job in schedule.part(shard, 2)] == [0, 4, 9, 3, 6]


@pytest.mark.parametrize("history", ["server", "corpus"])
def test_a_turn_follows_from_the_reply_before_it(history: str) -> None:
    talk = sessions(session(0, 0, 250), history=history)
    said = []
    job: Optional[bench.Job] = bench.Job(0)
    while job:
        request = talk.request(job.index)
        said.append([message["content"] for message in request.messages])
        record = make_record(job.index, end_s=2.0, text=f"reply {job.index}" + ("\ud83d" if job.index else ""))
        job = talk.after(record)
        if job and job.index == 2:
            assert job.due_s == 2.25
    answers = ["own 0", "own 1"] if history == "corpus" else ["reply 0", "reply 1?"]
    assert said == [["0"], ["0", answers[0], "1"], ["0", answers[0], "1", answers[1], "2"]]


def test_a_turn_that_failed_ends_its_session() -> None:
    talk = sessions(session(0, 0))
    talk.request(0)
    assert talk.after(make_record(0, status="http_error", error_kind="http_500")) is None


def test_the_turns_that_were_not_sent_are_counted() -> None:
    done = [make_record(turn, session=0, turn=turn + 1, later_turns=2 - turn) for turn in range(3)]
    failed = make_record(3, session=1, turn=1, later_turns=2, status="http_error", error_kind="http_500")
    summary = summary_of(*done, failed)
    assert (summary.sessions, summary.unsent_turns) == (2, 2)
    assert list(summary.groups["turn"]) == ["1", "2", "3"]
    assert summary.groups["turn"]["1"].errors == 1
    assert any(
        "how much of the sessions' histories" in told.text for told in bench.warnings_of(summary, make_config(), [])
    )
