"""Room 12: several processes, one run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from array import array
from pathlib import Path
from typing import Any, Callable

import pytest

import online_bench_openai_async as bench
from tests.conftest import SCRIPT, Demo, make_record, rows_of, run_script


def test_a_record_crosses_the_pipe_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(bench, "tell", told.append)
    record = make_record(3, gaps_ms=array("f", [1.5, 2.5]), first_s=None)
    bench.PipeSink().add(record)
    (message,) = told
    again = bench.record_from(json.loads(json.dumps(message))["record"])
    assert again == record


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("mode", [[], ["--stream"]])
def test_any_number_of_processes_makes_the_same_run(
    demo: Callable[..., Demo], tmp_path: Path, processes: int, mode: list[str]
) -> None:
    server = demo(ttft_ms=20, gap_ms=1)
    path = tmp_path / "r.csv"
    sizes = ["--concurrency", "10", "--total-requests", "50", "--prompt-tokens", "32", "--output-tokens", "6"]
    target = ["--api-base", server.url, "--model", "demo", "--seed", "5", "--results-csv", str(path), *mode]
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


def children_of(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in listed.stdout.split()]


def start_sharded(url: str, path: Path) -> subprocess.Popen[str]:
    sizes = ["--concurrency", "8", "--total-requests", "400", "--prompt-tokens", "16", "--output-tokens", "1"]
    target = ["--api-base", url, "--model", "demo", "--results-csv", str(path), "--processes", "2", *sizes]
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *target], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_rows(path: Path, count: int) -> None:
    for _ in range(600):
        if path.exists() and len(path.read_bytes().splitlines()) > count:
            return
        time.sleep(0.05)
    pytest.fail(f"{count} rows did not come within 30 s")


@pytest.mark.skipif(sys.platform != "linux", reason="needs ps --ppid")
def test_a_process_that_dies_is_reported_and_its_jobs_are_errors(demo: Callable[..., Demo], tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    process = start_sharded(demo(ttft_ms=50, gap_ms=0).url, path)
    wait_for_rows(path, 20)
    os.kill(children_of(process.pid)[0], signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    rows = rows_of(path)
    assert sorted(int(row["index"]) for row in rows) == list(range(400))
    lost = [row for row in rows if row["error_kind"] == "process_lost"]
    assert 0 < len(lost) < 200
    assert len({int(row["index"]) % 2 for row in lost}) == 1  # the stripe of the one that died
    assert f"Requests (ok/err): {400 - len(lost)}/{len(lost)}" in out
    assert "died" in err
    assert "Traceback" not in err


@pytest.mark.skipif(sys.platform != "linux", reason="needs ps --ppid")
def test_ctrl_c_drains_all_processes_and_leaves_none(demo: Callable[..., Demo], tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    process = start_sharded(demo(ttft_ms=100, gap_ms=0).url, path)
    wait_for_rows(path, 20)
    children = children_of(process.pid)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    rows = rows_of(path)
    assert 20 <= len(rows) < 400
    assert {row["status"] for row in rows} == {"success"}
    assert f"Requests (ok/err): {len(rows)}/0" in out
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)


def test_a_key_is_in_no_process_list(demo: Callable[..., Demo], tmp_path: Path) -> None:
    if not Path("/proc/self/cmdline").exists():
        pytest.skip("needs /proc")
    path = tmp_path / "r.csv"
    env = {**os.environ, "OPENAI_API_KEY": "sk-canary"}
    sizes = ["--concurrency", "4", "--total-requests", "100", "--prompt-tokens", "16", "--output-tokens", "1"]
    target = ["--api-base", demo(ttft_ms=50, gap_ms=0).url, "--model", "demo", "--results-csv", str(path)]
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *target, *sizes, "--processes", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )
    wait_for_rows(path, 4)
    shown = b"".join(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children_of(process.pid))
    assert b"--shard" in shown
    assert b"canary" not in shown
    out, err = process.communicate(timeout=60)
    assert "canary" not in out + err + path.read_text()
