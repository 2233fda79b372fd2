"""Faults of the box the benchmark runs on, signals, and when a run stops by itself: nothing finished is lost."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Callable

import pytest

import online_bench_openai_async as bench
from tests.support.checked_runs import CONCURRENCY, GOOD_PROMPT, PATIENT, checked, run
from tests.support.demo import Demo
from tests.support.faults import FAULTS, FaultServer, fault_prompt, good
from tests.support.processes import needs_proc
from tests.support.program import SCRIPT, Outcome, Running, run_script, words_of
from tests.support.replies import reply
from tests.support.server import Call, HttpServer
from tests.support.tables import assert_whole, fate, rows_of, write_corpus

pytest.importorskip("openai")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX files, signals and terminals")

SLOW_MS = 150


@pytest.fixture(scope="module")
def quick() -> Iterator[Demo]:
    """A simulated server that answers at once."""
    server = Demo(ttft_ms=0, gap_ms=0)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def slow() -> Iterator[Demo]:
    server = Demo(ttft_ms=SLOW_MS, gap_ms=0)
    yield server
    server.stop()


SIZES = {"prompt_tokens": 16, "output_tokens": 2, "concurrency": CONCURRENCY}
COLUMNS = len(bench.CSV_COLUMNS)


class Program(Running):
    """The script under small load, its stderr checked."""

    def __init__(self, server: Demo, folder: Path, *options: str, **popen: Any) -> None:
        super().__init__(folder, *server.target, *words_of(**SIZES), *options, **popen)

    def outcome(self) -> Outcome:
        return checked(super().outcome())

    def summary(self) -> Any:
        return json.loads(self.jsonl.read_text(encoding="utf-8"))


# --- disks and directories ---

needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


@needs_dev_full
def test_results_on_a_full_disk_are_refused_before_any_load(quick: Demo, tmp_path: Path) -> None:
    served = len(quick.truth()["requests"])
    got = Program(quick, tmp_path, "--results-csv", "/dev/full", "--overwrite").outcome()
    assert got.code == 2
    assert "No space left on device" in got.err
    assert len(quick.truth()["requests"]) == served


@needs_dev_full
def test_a_report_on_a_full_disk_is_told_and_the_files_stand(quick: Demo, tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        program = Program(quick, tmp_path, "--total-requests", "20", stdout=full)
        got = program.outcome()
    assert got.code == 0
    assert "WARNING: the report could not be written to stdout: No space left on device" in got.err
    assert len(got.rows) == program.summary()["completed"] == 20


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "tiny"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "none", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a tiny disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_keeps_whole_rows_and_the_run_says_what_it_lost(
    quick: Demo, tiny_disk: Path, tmp_path: Path
) -> None:
    program = Program(quick, tmp_path, "--total-requests", "300", "--results-csv", str(tiny_disk / "rows.csv"))
    got = program.outcome()
    assert got.code == 0
    kept = rows_of(tiny_disk / "rows.csv")
    assert_whole(tiny_disk / "rows.csv", COLUMNS)
    assert 0 < len(kept) < 300
    assert f"WARNING: {300 - len(kept)} rows could not be written" in got.out
    assert "Requests (ok/err): 300/0" in got.out


def test_an_output_directory_that_vanishes_is_told(slow: Demo, tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    program = Program(slow, folder, "--total-requests", "25")
    program.wait_for_rows(3)
    shutil.rmtree(folder)
    got = program.outcome()
    assert got.code == 0
    assert "rows.csv has been removed or replaced: its 25 rows are lost" in " ".join(got.out.split())  # wrapped
    assert "WARNING: the summary could not be written" in got.err
    assert "Requests (ok/err): 25/0" in got.out


# --- terminals, pipes, locales ---


def test_a_reader_that_leaves_after_one_line(quick: Demo, tmp_path: Path) -> None:
    program = Program(quick, tmp_path, "--total-requests", "20", "--no-progress")
    assert program.process.stdout is not None
    assert program.process.stdout.readline().startswith(b"Requests (ok/err): 20/0")
    program.process.stdout.close()
    program.process.stdout = None
    got = program.outcome()
    assert got.code == 0
    assert got.err == ""
    assert program.summary()["completed"] == 20


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)], ids=str)
def test_without_standard_streams(closed: Sequence[int], quick: Demo, tmp_path: Path) -> None:
    line = f'exec "$0" "$@" {" ".join(f"{number}>&-" for number in closed)}'
    outputs = {"results_csv": "rows.csv", "summary_jsonl": "s.jsonl"}
    words = [*quick.target, *words_of(**SIZES, **outputs, total_requests=20)]
    shell = ["sh", "-c", line, sys.executable, str(SCRIPT)]
    done = subprocess.run([*shell, *words], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert len(rows_of(tmp_path / "rows.csv")) == 20
    assert json.loads((tmp_path / "s.jsonl").read_text())["completed"] == 20
    assert_whole(tmp_path / "rows.csv", COLUMNS)


def test_a_terminal_of_20_columns(slow: Demo, tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    fcntl, termios, struct = (__import__(name) for name in ("fcntl", "termios", "struct"))
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 5, 20, 0, 0))
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    program = Program(slow, tmp_path, "--total-requests", "25", stderr=theirs, env=env)
    os.close(theirs)
    shown = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # the other side has closed
            break
        if not data:
            break
        shown += data
    os.close(ours)
    assert program.outcome().code == 0
    lines = [line for line in shown.decode().replace("\n", "\r").split("\r") if "ETA" in line]
    assert len(lines) >= 2
    assert all(len(line) < 20 for line in lines)


def test_a_locale_of_ascii(tmp_path: Path) -> None:
    """A prompt, a model, a file and an error that it cannot write: replaced, and no reason to stop."""
    env = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PATH": os.environ["PATH"]}
    corpus = tmp_path / "corpus.jsonl"
    prompts = ["\u65e5\u672c\u8a9e", fault_prompt("accents")]
    corpus.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in prompts), "utf-8")
    with FaultServer({"accents": accents}) as server:
        words = ["--api-base", server.api_base, "--model", "mod\u00e8le", "--requests-file", str(corpus)]
        words += ["--results-csv", str(tmp_path / "r\u00e9sultats.csv"), "--warmup", "0"]
        command = [sys.executable, str(SCRIPT), *words]
        done = subprocess.run(command, env=env, capture_output=True, timeout=60, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr
    assert b"refus?s?" in done.stdout
    assert [row["error"] for row in rows_of(tmp_path / "r\u00e9sultats.csv")].count("HTTP 400: refus\u00e9s\u2026") == 1


def accents(call: Any) -> None:
    data = json.dumps({"error": "refus\u00e9s\u2026"}).encode()
    call.send(b"HTTP/1.1 400 No\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data))


# --- limits of the system ---


def limited(soft: int, hard: int) -> Callable[[], None]:
    resource = pytest.importorskip("resource")
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_too_few_descriptors_are_refused_with_the_cure(quick: Demo, tmp_path: Path) -> None:
    got = Program(quick, tmp_path, "--concurrency", "1000", preexec_fn=limited(64, 64)).outcome()
    assert got.code == 2
    assert "--concurrency 1000 needs 1064 open files, 64 are allowed: `ulimit -Hn 1064`" in got.err
    assert not got.rows


def test_a_soft_limit_is_raised(quick: Demo, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    options = ("--concurrency", "150", "--total-requests", "300", "--processes", "2")
    got = Program(quick, tmp_path, *options, preexec_fn=limited(64, hard)).outcome()
    assert got.code == 0
    assert {fate(row) for row in got.rows} == {"success/"}
    assert len(got.rows) == 300


def test_a_demo_with_more_streams_than_one_process_may_open(tmp_path: Path) -> None:
    """The simulated server has the connections of all client processes."""
    resource = pytest.importorskip("resource")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    engine = ["--demo", "--demo-engine", '{"ttft_ms":50,"gap_ms":0}', "--processes", "4", "--timeout", "20"]
    words = [*engine, *words_of(**{**SIZES, "concurrency": 300, "total_requests": 300})]
    got = run_script(*words, preexec_fn=limited(150, hard))
    assert "Requests (ok/err): 300/0" in got.out, got.err
    assert got.code == 0


@pytest.mark.parametrize("target", ["asyncio.create_subprocess_exec", "subprocess.Popen"])
def test_out_of_processes(target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def impossible(*_: Any, **__: Any) -> Any:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(target, impossible)
    code = bench.main(["--demo"] if "Popen" in target else ["--model", "m", "--processes", "2"])
    assert code == 1
    assert "Resource temporarily unavailable" in capsys.readouterr().err


@pytest.mark.parametrize("step_s", [-3600, 0.5])
def test_a_clock_that_is_set_during_the_run(step_s: float, slow: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernel stamps are wall-clock; the durations must not notice."""
    started, true_time_ns = time.monotonic(), time.time_ns

    def stepped() -> int:
        return true_time_ns() + int(step_s * 1e9) * (time.monotonic() - started > 2 * SLOW_MS / 1e3)

    monkeypatch.setattr(time, "time_ns", stepped)
    got = run(slow.url, concurrency=CONCURRENCY, total_requests=25, prompt_tokens=16, output_tokens=2, stream=True)
    assert {fate(row) for row in got.rows} == {"success/"}
    for row in got.rows:
        if row["late_read"] == "0":  # else this machine is busy, and a first token may be left out
            assert SLOW_MS * 0.9 < float(row["ttft_ms"]) <= float(row["latency_ms"])
        assert float(row["latency_ms"]) < got.seconds * 1e3
        assert row["tpot_ms"] == "" or float(row["tpot_ms"]) > 0  # both tokens may have come at once


# --- signals ---

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


@pytest.mark.parametrize(
    ("name", "times", "processes"),
    [("SIGINT", 1, 1), ("SIGTERM", 1, 1), ("SIGHUP", 1, 1), ("SIGINT", 2, 1), ("SIGINT", 1, 2), ("SIGTERM", 2, 2)],
)
def test_a_signal_under_load(name: str, times: int, processes: int, slow: Demo, tmp_path: Path) -> None:
    """Once: what is in flight is waited for. Twice: it is recorded as aborted. Reported either way."""
    served = len(slow.truth()["requests"])
    program = Program(slow, tmp_path, "--total-requests", "100000", "--processes", str(processes))
    program.wait_for_rows(6)
    before = program.finished_rows()
    program.send(name, times)
    got = program.outcome()
    assert got.code == 130
    assert len(got.rows) >= before
    assert_whole(program.csv, COLUMNS)
    ok = [fate(row) for row in got.rows].count("success/")
    aborted = [fate(row) for row in got.rows].count("http_error/aborted")
    assert ok + aborted == len(got.rows)
    assert aborted <= (CONCURRENCY if times > 1 else 0)
    assert f"Requests (ok/err): {ok}/0" in got.out
    assert (f"Aborted: {aborted} requests" in got.out) is (aborted > 0)
    assert f"WARNING: interrupted: {len(got.rows)} of 100000 requests were made" in got.out
    if times == 1:  # everything that was sent was waited for, the warm-up included
        truth = slow.truth()
        assert (len(truth["requests"]) - served, truth["in_flight"]) == (ok + CONCURRENCY, 0)
    summary = program.summary()
    told = [summary[name] for name in ("completed", "failed", "aborted", "interrupted")]
    assert told == [ok, 0, aborted, True]


@pytest.mark.parametrize(
    ("name", "times", "processes"), [("SIGINT", 1, 1), ("SIGTERM", 2, 1), ("SIGHUP", 1, 2), ("SIGINT", 2, 2)]
)
def test_a_signal_during_the_warm_up(name: str, times: int, processes: int, tmp_path: Path) -> None:
    server = Demo(ttft_ms=1500, gap_ms=0)
    try:
        program = Program(server, tmp_path, "--processes", str(processes))
        program.wait_until(lambda: server.truth()["in_flight"] > 0)
        program.send(name, times)
        got = program.outcome()
        assert server.truth()["peak_in_flight"] <= CONCURRENCY
    finally:
        server.stop()
    assert (got.code, got.out) == (130, "")
    assert "nothing to report" in got.err
    assert not program.csv.exists()
    assert not program.jsonl.exists()


@pytest.mark.parametrize("name", SIGNALS)
def test_a_second_signal_ends_the_drain(name: str, tmp_path: Path) -> None:
    server = Demo(ttft_ms=4000, gap_ms=0)
    try:
        program = Program(server, tmp_path, "--warmup", "0")
        program.wait_until(lambda: server.truth()["in_flight"] == CONCURRENCY)
        program.send(name)
        time.sleep(0.2)
        assert program.process.poll() is None  # it drains
        program.send(name)
        got = program.outcome()
        assert not server.truth()["requests"]  # no reply was waited for
    finally:
        server.stop()
    assert got.code == 130
    assert [fate(row) for row in got.rows] == ["http_error/aborted"] * CONCURRENCY


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_during_the_report_lets_it_end(name: str, quick: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)
    block = bench.summary_block

    def interrupted(*args: Any) -> str:
        os.kill(os.getpid(), number)
        return block(*args)

    monkeypatch.setattr(bench, "summary_block", interrupted)
    try:
        got = run(quick.url, total_requests=10, prompt_tokens=16, output_tokens=2)
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert got.code == 130
    assert len(got.rows) == 10
    assert "=== Benchmark Configuration ===" in got.out


@pytest.mark.parametrize("processes", [1, 2])
def test_what_is_killed_has_lost_no_finished_row(processes: int, slow: Demo, tmp_path: Path) -> None:
    program = Program(slow, tmp_path, "--total-requests", "100000", "--processes", str(processes))
    program.wait_for_rows(21)
    program.process.kill()
    program.process.wait()
    served = [row["number"] for row in slow.truth()["requests"]]
    assert served
    got = program.outcome()
    assert got.code == -signal.SIGKILL
    assert len(got.rows) > 20
    assert_whole(program.csv, COLUMNS)
    assert {fate(row) for row in got.rows} == {"success/"}


@needs_proc
def test_a_process_that_does_not_obey_is_ended(slow: Demo, tmp_path: Path) -> None:
    program = Program(slow, tmp_path, "--total-requests", "100000", "--processes", "2")
    program.wait_for_rows(6)
    os.kill(program.children[0], signal.SIGSTOP)
    program.send("SIGINT", 2)
    got = program.outcome()
    assert got.code == 130
    assert "process 0 died" in got.err
    assert "Requests (ok/err):" in got.out


@needs_proc
def test_a_demo_server_that_dies_is_an_error_and_no_crash(tmp_path: Path) -> None:
    engine = ["--demo", "--demo-engine", '{"ttft_ms": 100, "gap_ms": 0}', "--total-requests", "100000"]
    program = Running(tmp_path, *engine, *words_of(**SIZES))
    program.wait_for_rows(6)
    os.kill(program.children[0], signal.SIGKILL)
    program.wait_until(lambda: "connect_refused" in program.csv.read_text(encoding="utf-8"))
    program.send("SIGINT")
    got = program.outcome()
    assert got.code == 130
    assert "Traceback" not in got.err
    assert "does not tell what it measured" in got.out
    assert "connect_refused" in got.out
    assert_whole(program.csv, COLUMNS)


def test_under_nohup_a_run_outlives_its_terminal(slow: Demo, tmp_path: Path) -> None:
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        program = Program(slow, tmp_path, "--total-requests", "25")
    finally:
        signal.signal(signal.SIGHUP, ignored)
    program.wait_for_rows(6)
    program.send("SIGHUP")
    got = program.outcome()
    assert got.code == 0, got.err
    assert "Requests (ok/err): 25/0" in got.out


# --- when a run stops by itself ---

ACTS = {name: FAULTS[name].act for name in ("status_400_object", "status_503_retry_after")}
BAD, WORSE = map(fault_prompt, ACTS)


@pytest.mark.parametrize(("rate", "code"), [(1.0, 0), (0.5, 0), (0.49, 1), (0.0, 1)])
def test_the_most_errors_that_are_no_failure(rate: float, code: int) -> None:
    with FaultServer(ACTS) as server:
        assert run(server.api_base, [GOOD_PROMPT, BAD] * 10, max_error_rate=rate).code == code


def test_nothing_but_errors_is_a_failure_whatever_was_allowed() -> None:
    with FaultServer(ACTS) as server:
        assert run(server.api_base, [BAD] * 10, max_error_rate=1.0).code == 1


def test_stop_after_errors() -> None:
    with FaultServer(ACTS) as server:
        got = run(server.api_base, [GOOD_PROMPT, BAD] * 500, stop_after_errors=7)
        asked = sum(server.seen[name] for name in ("good", *ACTS))
        assert server.left_open() == 0
    assert got.code == 1
    assert 14 - CONCURRENCY <= asked <= 14 + 2 * CONCURRENCY
    assert 7 <= [fate(row) for row in got.rows].count("http_error/http_400") <= 7 + CONCURRENCY
    assert "WARNING: stopped after 7 errors (--stop-after-errors)" in got.out
    assert all(fate(row) in ("success/", "http_error/http_400", "http_error/aborted") for row in got.rows)


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("transport", ["stopwatch", "sdk"])
def test_a_server_that_fails_everything_is_not_hammered(streamed: bool, transport: str) -> None:
    with FaultServer(ACTS) as server:
        got = run(server.api_base, [BAD] * 1000, stream=streamed, transport=transport)
        asked = server.seen["status_400_object"]
    assert got.code == 1
    assert bench.IDENTICAL_FAILURES_TO_STOP <= asked <= bench.IDENTICAL_FAILURES_TO_STOP + 2 * CONCURRENCY
    assert len(got.rows) <= asked + CONCURRENCY
    assert "WARNING: stopped: nothing succeeded, and 100 requests in a row all failed alike" in got.out


def test_nor_by_several_processes(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", [BAD])
    with FaultServer(ACTS) as server:
        words = ["--api-base", server.api_base, "--model", "m", "--requests-file", corpus, "--warmup", "0"]
        got = run_script(*words, "--total-requests", "100000", "--processes", "2", "--concurrency", "8")
        asked = server.seen["status_400_object"]
    assert got.code == 1
    assert "all failed alike" in got.out
    assert 100 <= asked < 50_000  # the order to end takes its time, the load does not go on


@pytest.mark.parametrize(
    "prompts", [[GOOD_PROMPT, *[BAD] * 150], [*[BAD, WORSE] * 75]], ids=["one-success", "two-kinds"]
)
def test_a_server_that_fails_in_part_is_measured_to_the_end(prompts: list[str]) -> None:
    with FaultServer(ACTS) as server:
        got = run(server.api_base, prompts, concurrency=1)
    assert len(got.rows) == len(prompts)
    assert got.code == 1  # more errors than --max-error-rate allows


def test_a_warm_up_that_fails_measures_nothing() -> None:
    with FaultServer({}) as server:
        dead = server.api_base
    got = run(dead, total_requests=10, warmup=CONCURRENCY)
    assert got.code == 1
    assert not got.rows
    assert "the warm-up failed, nothing was measured: connect_refused" in got.err


def shed_or_serve(call: Call) -> None:
    """Three of a kind are served, slowly; whatever comes meanwhile is refused at once."""
    if call.number:
        call.send(reply("503 Service Unavailable", b"busy"))
        return
    with SERVED:
        served = next(COUNT) < 3
    if served:
        time.sleep(0.3)
        good(call)
    else:
        call.send(reply("503 Service Unavailable", b"busy"))


SERVED, COUNT = threading.Lock(), itertools.count()


def test_a_server_that_sheds_load_serves_what_it_took() -> None:
    """Hundreds of fast 503s beside three slow replies: nothing that the server serves is cut off."""
    with HttpServer(shed_or_serve) as server:
        got = run(server.api_base, [GOOD_PROMPT] * 400, concurrency=16, **PATIENT)
    assert len(got.rows) == 400
    assert {fate(row) for row in got.rows} == {"success/", "http_error/http_503"}
    assert [fate(row) for row in got.rows].count("success/") == 3
    lines = got.out.splitlines()
    assert "Avg latency" in lines[6]
    assert lines[8].startswith("WARNING: 397 of 400 requests failed (99.2 %), the first 0.")
    assert got.code == 1


@pytest.mark.parametrize("processes", [1, 2])
def test_a_server_that_goes_away_ends_the_run_and_its_errors_come_first(processes: int, tmp_path: Path) -> None:
    with FaultServer(ACTS) as server:
        words = [*("--api-base", server.api_base, "--model", "m", "--warmup", "0", "--total-requests", "100000")]
        program = Running(tmp_path, *words, "--concurrency", "8", "--processes", str(processes), "--prompt-tokens", "8")
        program.wait_for_rows(50)
    got = program.outcome()
    assert got.code == 1
    assert "WARNING: stopped: " in got.out
    assert "connections in a row were refused" in got.out
    assert 150 <= len(got.rows) < 100_000
    first = got.out.splitlines()[8]
    assert re.match(r"WARNING: \d+ of \d+ requests failed \(\d+\.\d %\), the first \d+\.\d{3} s after the start", first)


@pytest.mark.parametrize(("bad", "said"), [(1, False), (2, True)])
def test_more_errors_than_one_in_a_hundred_are_said_first(bad: int, said: bool) -> None:
    with FaultServer(ACTS) as server:
        got = run(server.api_base, [*[BAD] * bad, *[GOOD_PROMPT] * (100 - bad)])
    assert got.code == 0
    assert (f"WARNING: {bad} of 100 requests failed ({bad}.0 %)" in got.out.splitlines()[8]) is said


def test_more_failures_than_successes_are_a_failure_by_default() -> None:
    with FaultServer(ACTS) as server:
        assert run(server.api_base, [*[BAD] * 11, *[GOOD_PROMPT] * 9]).code == 1
        assert run(server.api_base, [*[BAD] * 11, *[GOOD_PROMPT] * 9], max_error_rate=0.6).code == 0
