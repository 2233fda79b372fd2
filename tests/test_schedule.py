"""Section 3, Schedule: which jobs there are and who does them."""

from __future__ import annotations

import pytest

import online_bench_openai_async as bench


@pytest.mark.parametrize("shards", [1, 2, 3, 7])
def test_processes_share_out_every_job_once(shards: int) -> None:
    dealt = [job.index for shard in range(shards) for job in bench.ClosedLoop(20).part(shard, shards)]
    assert sorted(dealt) == list(range(20))


@pytest.mark.parametrize(("total", "shards"), [(128, 1), (100, 3), (7, 4), (2, 5)])
def test_shares_of_the_concurrency_add_up(total: int, shards: int) -> None:
    parts = [bench.share(total, shard, shards) for shard in range(shards)]
    assert sum(parts) == total
    assert max(parts) - min(parts) <= 1


def test_closed_loop_jobs_are_due_at_once() -> None:
    assert {job.due_s for job in bench.ClosedLoop(5)} == {None}


def test_millions_of_jobs_cost_nothing_before_they_are_taken() -> None:
    schedule = bench.ClosedLoop(10**12).part(1, 3)
    assert len(schedule) == 333333333333
    assert next(iter(schedule)) == bench.Job(1)
