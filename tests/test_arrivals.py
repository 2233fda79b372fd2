"""Room 3: who does which job."""

from __future__ import annotations

import pytest

import online_bench_openai_async as bench


@pytest.mark.parametrize("shards", [1, 2, 3, 7])
def test_processes_share_out_every_job_once(shards: int) -> None:
    dealt = [job.index for shard in range(shards) for job in bench.closed_loop(20, shard, shards)]
    assert sorted(dealt) == list(range(20))


@pytest.mark.parametrize(("total", "shards"), [(128, 1), (100, 3), (7, 4), (2, 5)])
def test_shares_of_the_concurrency_add_up(total: int, shards: int) -> None:
    parts = [bench.share(total, shard, shards) for shard in range(shards)]
    assert sum(parts) == total
    assert max(parts) - min(parts) <= 1


def test_closed_loop_jobs_are_due_at_once() -> None:
    assert {job.due_s for job in bench.closed_loop(5)} == {None}
