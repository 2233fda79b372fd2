"""Section 13, Shards: several processes, one run."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from array import array
from pathlib import Path
from typing import Any, Callable, cast

import pytest

import online_bench_openai_async as bench
from tests.support.demo import Demo
from tests.support.processes import children_of, command_line_of, needs_proc, wait_until
from tests.support.program import Running, run_script
from tests.support.records import make_config, make_record
from tests.support.replies import ANSWER, as_json, reply
from tests.support.server import Call, ScriptedServer
from tests.support.tables import rows_of


@pytest.mark.parametrize("failed", [{}, {"status": "http_error", "error_kind": "timeout", "error": "late"}])
def test_a_record_crosses_the_pipe_unchanged(failed: dict[str, str]) -> None:
    record = make_record(3, gaps_ms=array("f", [1.5, 2.5]), first_s=None, **failed)
    again = bench.record_from(json.loads(json.dumps(bench.record_line(record))))
    assert again == record


@pytest.mark.parametrize(("mode", "processes"), [([], 1), (["--stream"], 2), ([], 3)])
def test_any_number_of_processes_makes_the_same_run(
    demo: Callable[..., Demo], tmp_path: Path, processes: int, mode: list[str]
) -> None:
    server = demo(ttft_ms=60, gap_ms=1)
    path = tmp_path / "r.csv"
    sizes = ["--concurrency", "10", "--total-requests", "50", "--prompt-tokens", "32", "--output-tokens", "6"]
    target = [*server.target, "--seed", "5", "--results-csv", str(path), *mode]
    done = run_script(*target, *sizes, "--processes", str(processes))
    assert done.code == 0, done.err
    rows = rows_of(path)
    assert sorted(int(row["index"]) for row in rows) == list(range(50))
    assert sum(int(row["completion_tokens"]) for row in rows) == 300
    assert "Requests (ok/err): 50/0  Concurrency: 10" in done.out
    truth = server.truth()
    assert len(truth["requests"]) == 60  # with the warm-up
    assert truth["peak_in_flight"] == 10
    assert f"Client: {processes} process" in done.out or "client-bound" in done.out
    for name in ("p50", "p95"):
        column = sorted(float(row["latency_ms"]) for row in rows)
        exact = bench.percentile(column, float(name[1:]))
        assert float(done.out.split(f"{name} latency: ")[1].split()[0]) == pytest.approx(exact, abs=0.06)


class Picky(ScriptedServer):
    """Answers `refusals` requests that carry max_tokens with a 400, then takes it."""

    def __init__(self, refusals: int) -> None:
        self._left = refusals
        super().__init__(self._pick)

    def _pick(self, call: Call) -> None:
        with self._lock:
            refused = self._left > 0 and b'"max_tokens"' in call.body
            self._left -= refused
        message = as_json({"error": {"message": "Unsupported parameter: 'max_tokens'"}})
        call.send(reply("400 Bad Request", message) if refused else reply("200 OK", ANSWER))


@pytest.mark.parametrize("refusals", [100, 1], ids=["to all processes", "to one of them"])
def test_what_one_process_learns_all_know_before_the_timed_part(refusals: int) -> None:
    sizes = ["--concurrency", "2", "--total-requests", "12", "--processes", "2", "--warmup", "1"]
    with Picky(refusals) as server:
        done = run_script("--api-base", server.api_base, "--model", "m", *sizes)
        asked = [json.loads(body) for body in server.bodies]
    assert done.code == 0, done.err
    assert "Requests (ok/err): 12/0" in done.out
    assert all("max_completion_tokens" in body for body in asked[-12:])
    assert len(asked) == 12 + 2 + min(2, refusals)  # each process was warmed up, and sent again what was refused


@pytest.mark.parametrize(("warmup", "each"), [(0, [0, 0, 0]), (1, [1, 1, 1]), (4, [2, 1, 1]), (9, [3, 3, 3])])
def test_each_process_has_a_part_of_the_warm_up(warmup: int, each: list[int]) -> None:
    config = make_config(warmup=warmup)
    jobs = bench.Schedule(9)
    whole = bench.Part(config, bench.workload_of(config, ()), jobs, [], cast(Any, None), lambda *_: None)
    assert [dataclasses.replace(whole, schedule=jobs.part(n, 3)).warmup for n in range(3)] == each


def test_processes_that_learnt_different_things_agree_on_all_of_them() -> None:
    config = make_config(stream=True)
    usual = bench.Dialect()
    lessons = [
        bench.Lesson(usual, [(4, 15)]),
        bench.Lesson(dataclasses.replace(usual, include_usage=False), [(16, 30)]),
        bench.Lesson(dataclasses.replace(usual, limit_field="max_completion_tokens")),
    ]
    assert bench.agreed(config, lessons) == bench.Lesson(
        bench.Dialect("max_completion_tokens", include_usage=False), [(4, 15), (16, 30)]
    )
    assert bench.agreed(config, []) == bench.Lesson(usual, [])


def start_sharded(server: Demo, folder: Path, *options: str, **popen: Any) -> Running:
    sizes = ["--concurrency", "8", "--total-requests", "400", "--prompt-tokens", "16", "--output-tokens", "1"]
    return Running(folder, *server.target, *sizes, "--processes", "2", *options, **popen)


@needs_proc
def test_a_process_that_dies_is_reported_and_its_jobs_are_errors(demo: Callable[..., Demo], tmp_path: Path) -> None:
    program = start_sharded(demo(ttft_ms=50, gap_ms=0), tmp_path)
    program.wait_for_rows(21)
    os.kill(program.children[0], signal.SIGKILL)
    done = program.outcome()
    assert [int(row["index"]) for row in done.rows] == list(range(400))
    lost = [row for row in done.rows if row["error_kind"] == "process_lost"]
    assert 0 < len(lost) < 200
    assert len({int(row["index"]) % 2 for row in lost}) == 1  # the stripe of the one that died
    assert f"Requests (ok/err): {400 - len(lost)}/{len(lost)}" in done.out
    assert "died" in done.err
    assert "Traceback" not in done.err


@needs_proc
def test_ctrl_c_drains_all_processes_and_leaves_none(demo: Callable[..., Demo], tmp_path: Path) -> None:
    program = start_sharded(demo(ttft_ms=100, gap_ms=0), tmp_path)
    program.wait_for_rows(21)
    children = program.children
    program.send("SIGINT")
    done = program.outcome()
    assert done.code == 130, done.err
    assert 20 <= len(done.rows) < 400
    assert {row["status"] for row in done.rows} == {"success"}
    assert f"Requests (ok/err): {len(done.rows)}/0" in done.out
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)


@needs_proc
def test_a_key_is_in_no_process_list(demo: Callable[..., Demo], tmp_path: Path) -> None:
    env = {**os.environ, "OPENAI_API_KEY": "sk-canary"}
    program = start_sharded(demo(ttft_ms=50, gap_ms=0), tmp_path, "--total-requests", "100", env=env)
    program.wait_for_rows(4)
    shown = " ".join(map(command_line_of, children_of(program.pid)))
    assert "--shard" in shown
    assert "canary" not in shown
    done = program.outcome()
    assert "canary" not in done.out + done.err + program.csv.read_text()


def stands_still(pid: int) -> bool:
    """Whether a process has needed no CPU for a while: here, because nobody reads what it writes."""

    def used() -> list[str]:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]

    before = used()
    time.sleep(0.3)
    return used() == before


@needs_proc
def test_a_run_that_is_suspended_and_continued_loses_nothing(demo: Callable[..., Demo], tmp_path: Path) -> None:
    """As SLURM suspends: the parent first, so that its processes stand in a write that is cut by the next stop."""
    long = ["--output-tokens", "3000", "--stream", "--total-requests", "60", "--concurrency", "8"]
    program = start_sharded(demo(ttft_ms=0, gap_ms=0.1), tmp_path, *long)
    program.wait_for_rows(4)
    tree = [program.pid, *program.children]
    os.kill(program.pid, signal.SIGSTOP)
    wait_until(lambda: all(map(stands_still, tree[1:])))
    for child in tree[1:]:
        os.kill(child, signal.SIGSTOP)
    for pid in reversed(tree):
        os.kill(pid, signal.SIGCONT)
    done = program.outcome()
    assert done.code == 0, done.err
    assert [int(row["index"]) for row in done.rows] == list(range(60))
    assert done.fates == {"success/"}
    assert "died" not in done.err
