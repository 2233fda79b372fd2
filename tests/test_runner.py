"""Section 12, Runner: the pool in virtual time, then real servers' views of it."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Callable, Optional

import pytest

import online_bench_openai_async as bench
from tests.support.demo import Demo
from tests.support.program import Outcome, Running, run_script, words_of
from tests.support.program import cli as bench_cli
from tests.support.records import make_config, summary_of
from tests.support.replies import FINISH, as_json, completion, delta, head, piece, reply
from tests.support.server import Call, HttpServer, ScriptedServer, says
from tests.support.virtual_time import in_virtual_time, virtual_clock


class Collected:
    def __init__(self) -> None:
        self.records: list[bench.Record] = []

    def add(self, record: bench.Record) -> None:
        self.records.append(record)


class Server:
    """Answers in virtual time; knows how many were in flight."""

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self._seconds = seconds
        self.in_flight = 0
        self.peak = 0
        self.served = 0

    async def __call__(self, request: bench.Request, turn: bench.Turn) -> bench.Reply:
        loop = asyncio.get_running_loop()
        free_ns = await turn.wait()
        start = loop.time()
        self.in_flight += 1
        self.served += 1
        self.peak = max(self.peak, self.in_flight)
        failure = None
        try:
            await asyncio.sleep(self._seconds(int(request.messages[0]["content"])))
        except asyncio.CancelledError:
            failure = bench.Failure("http_error", "aborted", "stopped")
        finally:
            self.in_flight -= 1
            turn.release(int(loop.time() * 1e9))
        start_ns, end_ns = int(start * 1e9), int(loop.time() * 1e9)
        return bench.Reply(free_ns=free_ns, sent_ns=start_ns, end_ns=end_ns, failure=failure)


def numbered(index: int) -> bench.Request:
    return bench.Request({"messages": [{"role": "user", "content": str(index)}]})


def nothing_happens(stop: bench.Stop) -> None:
    """The run is left alone."""


def run_pool(
    jobs: int, concurrency: int, server: Server, script: Callable[[bench.Stop], None] = nothing_happens
) -> Any:
    """(records, virtual seconds taken); `script` may schedule what happens to the stop."""
    return run_load(bench.Load(bench.Schedule(jobs), numbered, server, [], concurrency), script)


def run_load(load: bench.Load, script: Callable[[bench.Stop], None] = nothing_happens) -> Any:
    """The same for any load, whose sinks are put in here."""

    async def main() -> Any:
        stop, sink = bench.Stop(), Collected()
        script(stop)
        pool = bench.Pool(dataclasses.replace(load, sinks=[sink]), stop, virtual_clock())
        await pool.prepare()
        assert sink.records == []
        await pool.drain(0)
        return sink.records, asyncio.get_running_loop().time()

    return in_virtual_time(main())


@pytest.mark.parametrize("concurrency", [1, 3, 8, 20])
def test_workers_keep_exactly_the_concurrency_in_flight(concurrency: int) -> None:
    server = Server(lambda index: 1.0)
    records, took = run_pool(16, concurrency, server)
    assert server.peak == min(concurrency, 16)
    assert took == pytest.approx(-(-16 // concurrency))
    assert sorted(record.job.index for record in records) == list(range(16))


def test_records_come_in_order_of_completion() -> None:
    records, _ = run_pool(3, 3, Server(lambda index: 3.0 - index))
    assert [record.job.index for record in records] == [2, 1, 0]


def at(seconds: float, *presses: str) -> Callable[[bench.Stop], None]:
    def script(stop: bench.Stop) -> None:
        loop = asyncio.get_running_loop()
        for number, press in enumerate(presses):
            loop.call_later(seconds + number, getattr(stop, press))

    return script


def test_the_first_stop_drains_what_is_in_flight() -> None:
    records, took = run_pool(100, 4, Server(lambda index: 2.0), at(3.0, "press"))
    assert len(records) == 8
    assert all(record.ok for record in records)
    assert took == pytest.approx(4.0)


def test_a_drain_has_its_limit_and_what_is_left_is_recorded() -> None:
    records, took = run_pool(100, 4, Server(lambda index: 60.0 if index == 1 else 2.0), at(3.0, "press"))
    assert took == pytest.approx(3.0 + bench.DRAIN_GRACE_S)
    aborted = [record for record in records if not record.ok]
    assert [(record.job.index, record.error_kind) for record in aborted] == [(1, "aborted")]
    assert aborted[0].busy_ms == pytest.approx(8000)


def test_the_second_stop_ends_at_once() -> None:
    records, took = run_pool(100, 4, Server(lambda index: 60.0), at(3.0, "press", "press"))
    assert took == pytest.approx(4.0)
    assert [record.error_kind for record in records] == ["aborted"] * 4


def test_a_run_that_only_fails_stops_by_itself() -> None:
    class Refusing(Server):
        async def __call__(self, request: bench.Request, turn: bench.Turn) -> bench.Reply:
            await turn.wait()
            free_ns = int(asyncio.get_running_loop().time() * 1e9)
            await asyncio.sleep(1.0)
            end_ns = int(asyncio.get_running_loop().time() * 1e9)
            turn.release(end_ns)
            self.served += 1
            return bench.Reply(free_ns=free_ns, end_ns=end_ns, failure=bench.Failure("http_error", "http_500", "no"))

    async def main() -> tuple[int, str]:
        stop, tally, server = bench.Stop(), bench.Tally(), Refusing(lambda index: 1.0)
        sinks: list[bench.Sink] = [tally, bench.Breaker(tally, stop, make_config(concurrency=10))]
        pool = bench.Pool(bench.Load(bench.Schedule(5000), numbered, server, sinks, 10), stop)
        await pool.prepare()
        await pool.drain(0)
        return server.served, stop.reason

    served, reason = in_virtual_time(main())
    assert bench.IDENTICAL_FAILURES_TO_STOP <= served <= bench.IDENTICAL_FAILURES_TO_STOP + 10
    assert "all failed alike" in reason


class Busy(Server):
    """The first 23 requests take 1 s and succeed; the others fail in 50 ms."""

    def __init__(self, kind: str) -> None:
        super().__init__(lambda index: 1.0 if index < 23 else 0.05 + index % 97 / 1e6)
        self._kind = kind

    async def __call__(self, request: bench.Request, turn: bench.Turn) -> bench.Reply:
        reply = await super().__call__(request, turn)
        if int(request.messages[0]["content"]) >= 23:
            reply.failure = bench.Failure("http_error", self._kind, "no")
        return dataclasses.replace(reply, free_ns=reply.sent_ns)


def run_broken(server: Server, jobs: int) -> tuple[bench.Tally, str]:
    async def main() -> tuple[bench.Tally, str]:
        stop, tally = bench.Stop(), bench.Tally()
        sinks: list[bench.Sink] = [tally, bench.Breaker(tally, stop, make_config(concurrency=64))]
        pool = bench.Pool(bench.Load(bench.Schedule(jobs), numbered, server, sinks, 64), stop)
        await pool.prepare()
        await pool.drain(0)
        return tally, stop.reason

    result: tuple[bench.Tally, str] = in_virtual_time(main())
    return result


@pytest.mark.parametrize("kind", ["http_429", "http_503", "http_500"])
def test_what_is_being_served_outlives_a_thousand_fast_refusals(kind: str) -> None:
    """A server that sheds load refuses within milliseconds what it will not serve, and serves the rest."""
    tally, reason = run_broken(Busy(kind), 1500)
    assert (tally.ok, tally.errors) == (23, 1477)
    assert reason == ""


@pytest.mark.parametrize(("kind", "stops"), [("connect_refused", True), ("http_500", False), ("http_503", False)])
def test_refused_connections_end_a_run_that_has_succeeded_before(kind: str, stops: bool) -> None:
    tally, reason = run_broken(Busy(kind), 2_500)
    assert tally.ok == 23
    assert ("connections in a row were refused" in reason) is stops
    assert (tally.errors < 2_477) is stops


def test_a_defect_of_ours_is_raised_and_not_swallowed() -> None:
    async def broken(request: bench.Request, turn: bench.Turn) -> bench.Reply:
        raise ZeroDivisionError

    async def main() -> None:
        pool = bench.Pool(bench.Load(bench.Schedule(3), numbered, broken, [], 2), bench.Stop())
        await pool.prepare()
        await pool.drain(0)

    with pytest.raises(ZeroDivisionError):
        in_virtual_time(main())


# --- schedules ---


def every(gap_s: float, count: Optional[int] = None, **changes: Any) -> bench.Schedule:
    return bench.Schedule(count, "rate", rate=1 / gap_s, burstiness=math.inf, **changes)


def test_requests_go_out_when_they_are_due_however_slow_the_server_is() -> None:
    server = Server(lambda index: 30.0)
    records, took = run_load(bench.Load(every(0.1, 300), numbered, server, [], None))
    assert [record.sent_s for record in records] == pytest.approx([0.1 * n for n in range(300)], abs=1e-4)
    assert server.peak == 300
    assert took == pytest.approx(0.1 * 299 + 30, abs=1e-3)
    assert max(record.queue_ms or 0 for record in records) == 0  # waiting for the due time is nobody's queue
    assert {record.start_ns for record in records} == {int(record.job.due_s * 1e9) for record in records}


def test_a_cap_holds_the_schedule_back_and_the_response_time_shows_it() -> None:
    records, _ = run_load(bench.Load(every(0.1, 40), numbered, Server(lambda index: 0.4 if index else 2.4), [], 4))
    assert {round(record.latency_ms or 0) for record in records} == {400, 2400}
    assert sum(record.held_back_ms > 1 for record in records) > 20
    summary = summary_of(*records)
    response, late = summary.distributions["response"], summary.distributions["late"]
    assert response.max == pytest.approx(2400)
    assert late.max == pytest.approx(max(record.held_back_ms for record in records))
    assert summary.held_back == sum(record.held_back_ms > 1 for record in records)
    assert "--concurrency 4 held the schedule back" in "".join(
        warning.text for warning in bench.warnings_of(summary, make_config(concurrency=4), [])
    )


@pytest.mark.parametrize("schedule", [every(0.1, duration_s=5.0), bench.Schedule(duration_s=5.0)])
def test_a_duration_ends_the_sending_and_what_is_in_flight_ends_by_itself(schedule: bench.Schedule) -> None:
    records, took = run_load(bench.Load(schedule, numbered, Server(lambda index: 1.5), [], 20))
    assert all(record.ok and record.sent_s < 5.0 for record in records)
    assert len(records) == (50 if schedule.is_timed else 80)
    assert took == pytest.approx(max(record.sent_s for record in records) + 1.5, abs=1e-3)


@pytest.mark.parametrize("schedule", [every(0.1, duration_s=5.0), bench.Schedule(duration_s=5.0)])
def test_what_outlives_the_grace_is_aborted(schedule: bench.Schedule) -> None:
    """So are requests that were due, but had no permit yet: nothing that was to be sent is left unsaid."""
    server = Server(lambda index: 1.0 if index < 20 else 3600.0)
    records, took = run_load(bench.Load(schedule, numbered, server, [], 10, grace_s=2.0))
    assert took == pytest.approx(7.0, abs=0.01)
    sent = [record for record in records if record.sent_s is not None]
    assert [sum(record.ok for record in sent), sum(record.aborted for record in sent)] == [20, 10]
    assert [record.job.index for record in records if record not in sent] == (
        list(range(30, 50)) if schedule.is_timed else []
    )
    assert len(records) == len(sent) + 20 * schedule.is_timed


def test_ctrl_c_in_an_open_loop_sends_nothing_more_and_reports_what_is_done() -> None:
    records, took = run_load(bench.Load(every(0.1), numbered, Server(lambda index: 2.0), [], None), at(3.05, "press"))
    assert [record.job.index for record in records] == list(range(31))
    assert all(record.ok for record in records)
    assert took == pytest.approx(5.0, abs=1e-3)


def test_the_concurrency_grows() -> None:
    schedule = bench.Schedule(200, ramp_up_s=10.0)
    records, _ = run_load(bench.Load(schedule, numbered, Server(lambda index: 1.0), [], 10))
    sent = [record.sent_s for record in records]
    assert [sum(second <= at < second + 1 for at in sent) for second in range(12)] == [*range(1, 11), 10, 10]


def test_a_job_that_follows_from_another_takes_over_its_place() -> None:
    """As the next turn of a session does, half a second after the one before it."""

    class Talks(bench.Schedule):
        def ended(self, record: bench.Record) -> Optional[bench.Job]:
            due_s = (record.ended_s or 0) + 0.5
            return bench.Job(record.job.index + 100, due_s) if record.job.index < 200 else None

    records, took = run_load(bench.Load(Talks(2), numbered, Server(lambda index: 1.0), [], 2))
    assert sorted(record.job.index for record in records) == [0, 1, 100, 101, 200, 201]
    assert took == pytest.approx(1.0 + 1.5 + 1.5, abs=1e-3)


@pytest.mark.parametrize("options", [{}, {"processes": 2}, {"transport": "sdk"}, {"concurrency": 64}], ids=str)
def test_a_rate_reaches_the_server_as_it_was_asked(
    cli: Callable[..., Outcome], demo: Callable[..., Demo], tmp_path: Path, options: dict[str, Any]
) -> None:
    server, path = demo(ttft_ms=300, gap_ms=0), tmp_path / "rows.csv"
    sizes = words_of(request_rate=100, duration=1, prompt_tokens=16, output_tokens=1, seed=7, **options)
    summary = tmp_path / "summary.jsonl"
    done = cli(*server.target, *sizes, "--results-csv", str(path), "--summary-jsonl", str(summary), "--warmup", "2")
    assert done.code == 0, done.err
    due = [job.due_s or 0.0 for job in bench.Schedule(None, "rate", duration_s=1.0, rate=100.0, seed=7)]
    assert len(done.rows) == len(due), [(row["index"], row["error"]) for row in done.rows][-6:]
    assert [float(row["scheduled_s"]) for row in done.rows] == pytest.approx(due, abs=1e-6)
    assert all(float(row["sent_s"]) >= float(row["scheduled_s"]) for row in done.rows)
    truth = server.truth()["requests"][-len(due) :]
    arrived = sorted(row["arrived_ns"] / 1e9 for row in truth)
    after = [at - when for at, when in zip(arrived, due)]
    assert statistics.median(after) - min(after) < 0.25  # of a box that may be busy
    found = json.loads(summary.read_text())
    assert (found["request_rate"], found["burstiness"], found["num_prompts"]) == (100.0, 1.0, len(due))
    assert found["p50_response_ms"] >= 300
    assert found.get("max_concurrency") == options.get("concurrency")
    assert "Late sends (ms)" in done.out
    assert f"Requests/s: asked 100, due {(len(due) - 1) / (due[-1] - due[0]):.2f}, issued " in done.out


# --- the server's view ---


@pytest.mark.parametrize(
    ("transport", "concurrency"),
    [*(("stopwatch", number) for number in (1, 64, 100, 101, 256, 1024)), ("sdk", 1), ("sdk", 101)],
)
def test_the_server_sees_exactly_the_concurrency(
    cli: Callable[..., Outcome], demo: Callable[..., Demo], concurrency: int, transport: str
) -> None:
    server = demo(ttft_ms=200 + 3 * concurrency if transport == "sdk" else 150 + concurrency, gap_ms=0)
    total = max(3, concurrency + concurrency // 2)
    sizes = ["--concurrency", str(concurrency), "--total-requests", str(total)]
    base = ["--api-base", server.url, "--model", "demo", "--prompt-tokens", "16", "--output-tokens", "1"]
    done = cli(*base, *sizes, "--transport", transport, "--no-progress")
    assert done.code == 0, done.err
    truth = server.truth()
    assert truth["peak_in_flight"] == concurrency
    assert truth["connections"] - 1 <= concurrency  # one of them asks for the truth
    assert truth["in_flight"] == 0
    assert len(truth["requests"]) == total + bench.default_warmup(concurrency, total)


def test_the_figures_are_the_servers(cli: Callable[..., Outcome], demo: Callable[..., Demo]) -> None:
    """A fixed delay of 200 ms at concurrency 64: percentiles within 2 ms of the server's, elapsed within 1 %."""
    server = demo(ttft_ms=200, gap_ms=0)
    base = ["--api-base", server.url, "--model", "demo", "--prompt-tokens", "64", "--output-tokens", "1"]
    done = cli(*base, "--concurrency", "64", "--total-requests", "512", "--no-progress")
    rows = server.truth()["requests"][64:]
    truth = bench.describe((row["last_ns"] - row["arrived_ns"]) / 1e6 for row in rows)
    window_s = (max(row["last_ns"] for row in rows) - min(row["arrived_ns"] for row in rows)) / 1e9

    def said(label: str) -> float:
        return float(done.out.split(label)[1].split()[0].rstrip("s"))

    assert abs(said("p50 latency: ") - truth.percentiles[50.0]) < 2
    assert abs(said("p95 latency: ") - truth.percentiles[95.0]) < 2
    assert said("Elapsed: ") == pytest.approx(window_s, rel=0.01)


def test_warm_up_requests_enter_no_figure(cli: Callable[..., Outcome], demo: Callable[..., Demo]) -> None:
    server = demo(ttft_ms=1, gap_ms=0)
    base = ["--api-base", server.url, "--model", "demo", "--prompt-tokens", "16", "--output-tokens", "20"]
    done = cli(*base, "--concurrency", "4", "--total-requests", "10", "--warmup", "7", "--no-progress")
    assert "Requests (ok/err): 10/0" in done.out
    emitted = [row["emitted"] for row in server.truth()["requests"]]
    assert emitted == [8] * 7 + [20] * 10


def test_the_warm_up_is_no_larger_than_the_run(cli: Callable[..., Outcome], demo: Callable[..., Demo]) -> None:
    server = demo(ttft_ms=1, gap_ms=0)
    done = cli(*server.target, "--prompt-tokens", "16", "--output-tokens", "3", "--total-requests", "1")
    assert done.code == 0, done.err
    assert [row["emitted"] for row in server.truth()["requests"]] == [3, 3]  # nor longer in its replies


def test_the_warm_up_honours_what_the_body_demands(cli: Callable[..., Outcome], demo: Callable[..., Demo]) -> None:
    """As vLLM does, the server refuses a min_tokens above the limit: the warm-up's 8 tokens must not be that limit."""
    server = demo(ttft_ms=1, gap_ms=0)
    body = '{"min_tokens": 20, "ignore_eos": true}'
    sizes = ["--concurrency", "2", "--total-requests", "2", "--output-tokens", "30", "--prompt-tokens", "16"]
    done = cli(*server.target, *sizes, "--extra-body", body, "--no-progress")
    assert done.code == 0, done.err
    assert "refused" not in done.err
    assert [row["emitted"] for row in server.truth()["requests"]] == [20, 20, 30, 30]


# --- the length of synthetic prompts ---


def counts_in_its_own_way(call: Call) -> None:
    """A server whose tokens are no words: one more for each word above four letters, and a template of 31."""
    words = str(json.loads(call.body)["messages"]).split()
    tokens = 31 + sum(1 + (len(word) > 4) for word in words)
    usage = {"prompt_tokens": tokens, "completion_tokens": 3, "total_tokens": tokens + 3}
    call.send(reply("200 OK", as_json(completion(usage=usage))))


def counted(done: Outcome) -> float:
    """The mean of the prompts' lengths, as the server told it."""
    assert done.code == 0, done.err
    return sum(int(row["prompt_tokens"]) for row in done.rows) / len(done.rows)


def calibration_in(done: Outcome) -> str:
    return done.out.split("prompt_calibration: ")[1].split()[0]


@pytest.mark.parametrize("asked", [58, 1000])
@pytest.mark.parametrize("more", [[], ["--system-prompt", "Be brief."]], ids=["", "system"])
def test_prompts_have_the_length_that_was_asked_for_by_the_servers_own_count(
    script: Callable[..., ScriptedServer], tmp_path: Path, asked: int, more: list[str]
) -> None:
    server = script(counts_in_its_own_way)
    sizes = ["--concurrency", "16", "--total-requests", "64", "--prompt-tokens", str(asked), "--seed", "7", *more]
    run = ["--api-base", server.api_base, "--model", "m", *sizes, "--no-progress", "--summary-jsonl", tmp_path / "s"]
    done = bench_cli(*run, "--results-csv", tmp_path / "1.csv")
    told = calibration_in(done)
    per_word = float(told.split(",")[0])
    assert abs(counted(done) - asked) <= max(0.02 * asked, per_word)
    assert "counted" not in done.out
    kept = json.loads((tmp_path / "s").read_text())["config"]["prompt_calibration"]
    assert told == ",".join(map(str, kept))

    sent = set(server.bodies[-64:])
    again = bench_cli(*run, "--results-csv", tmp_path / "2.csv", "--warmup", "0", "--prompt-calibration", told)
    assert again.code == 0, again.err
    assert set(server.bodies[-64:]) == sent


def takes_few_tokens(call: Call) -> None:
    """Ten tokens a word, and a context of 4,000."""
    tokens = 10 * len(json.loads(call.body)["messages"][0]["content"].split())
    usage = {"prompt_tokens": tokens, "completion_tokens": 3, "total_tokens": tokens + 3}
    refusal = reply("400 Bad Request", as_json({"error": {"message": "longer than the context"}}))
    call.send(refusal if tokens > 4000 else reply("200 OK", as_json(completion(usage=usage))))


def test_prompts_that_are_too_long_until_calibrated_do_not_stop_it(
    script: Callable[..., ScriptedServer], tmp_path: Path
) -> None:
    server = script(takes_few_tokens)
    sizes = ["--concurrency", "1", "--total-requests", "10", "--prompt-tokens", "3500", "--no-progress"]
    target = ["--api-base", server.api_base, "--model", "m", "--results-csv", tmp_path / "r.csv"]
    assert counted(bench_cli(*target, *sizes)) == pytest.approx(3500, rel=0.02)


def test_several_processes_calibrate_alike(demo: Callable[..., Demo], tmp_path: Path) -> None:
    """One of them has only a long prompt in its warm-up, the other only a short one."""
    server = demo(ttft_ms=1, gap_ms=0)
    sizes = ["--concurrency", "2", "--total-requests", "20", "--output-tokens", "1", "--prompt-tokens", "300"]
    done = run_script(*server.target, *sizes, "--processes", "2", "--results-csv", tmp_path / "r.csv")
    assert counted(done) == pytest.approx(300, rel=0.02)
    assert calibration_in(done)


def test_without_counts_the_lengths_are_estimates_and_called_so(
    cli: Callable[..., Outcome], script: Callable[..., ScriptedServer]
) -> None:
    server = script(says(reply("200 OK", as_json(completion(usage=None)))))
    done = cli("--api-base", server.api_base, "--model", "m", "--total-requests", "4", "--no-progress")
    assert done.code == 0, done.err
    assert "prompt lengths are estimates" in done.err
    assert "prompt_calibration" not in done.out


def test_no_warm_up_is_none(cli: Callable[..., Outcome], demo: Callable[..., Demo]) -> None:
    server = demo(ttft_ms=1, gap_ms=0)
    base = ["--api-base", server.url, "--model", "demo", "--prompt-tokens", "16", "--output-tokens", "20"]
    cli(*base, "--concurrency", "4", "--total-requests", "10", "--warmup", "0", "--no-progress")
    assert len(server.truth()["requests"]) == 10


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux stamps arrivals in the kernel")
def test_a_paused_client_says_so_and_its_figures_stay_true(demo: Callable[..., Demo], tmp_path: Path) -> None:
    """Stopped for half a second: whatever queued up meanwhile is out of the gaps, and first tokens in it are blank."""
    server = demo(ttft_ms=100, gap_ms=20)
    sizes = ["--concurrency", "8", "--total-requests", "64", "--prompt-tokens", "16", "--output-tokens", "20"]
    program = Running(tmp_path, *server.target, *sizes, "--stream", "--warmup", "8")
    program.wait_for_rows(8)
    program.send("SIGSTOP")
    time.sleep(0.5)
    program.send("SIGCONT")
    done = program.outcome()
    summary = json.loads(program.jsonl.read_text())
    late = [row for row in done.rows if row["late_read"] == "1"]
    assert len(late) >= 8
    assert summary["late_read_requests"] == len(late)
    assert f"read late {len(late)} requests" in done.out
    truth = bench.describe((row["first_ns"] - row["arrived_ns"]) / 1e6 for row in server.truth()["requests"][8:])
    assert max(float(row["ttft_ms"]) for row in done.rows if row["ttft_ms"]) < (truth.max or 0) + 50
    assert summary["max_itl_ms"] < 400
    assert summary["client"][0]["lag_max_ms"] > 400


def test_the_mean_in_flight_is_counted_and_never_above_the_peak(
    cli: Callable[..., Outcome], demo: Callable[..., Demo], tmp_path: Path
) -> None:
    server = demo(ttft_ms=50, gap_ms=2)
    path = tmp_path / "s.jsonl"
    sizes = ["--concurrency", "6", "--total-requests", "60", "--prompt-tokens", "16", "--output-tokens", "5"]
    cli(*server.target, *sizes, "--stream", "--no-progress", "--summary-jsonl", path)
    told = json.loads(path.read_text())
    assert told["max_concurrent_requests"] == 6
    assert 3 < told["concurrency"] <= 6
    assert told["concurrency"] == pytest.approx(told["concurrency_by_littles_law"], rel=0.5)


def test_the_progress_of_a_stream_shows_tokens_as_they_arrive(
    cli: Callable[..., Outcome], demo: Callable[..., Demo], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "PROGRESS_PIPE_S", 0.1)
    server = demo(ttft_ms=20, gap_ms=5)
    sizes = ["--concurrency", "2", "--total-requests", "2", "--prompt-tokens", "16", "--output-tokens", "150"]
    done = cli(*server.target, *sizes, "--stream", "--warmup", "1")
    rates = [float(line.split("Gen tok/s: ")[1].split()[0]) for line in done.err.splitlines() if " 0/2 " in line]
    assert max(rates) > 0
    assert "Generated tokens/s: 0.00" not in done.out


def test_several_answers_to_one_request_are_refused_with_the_reason(cli: Callable[..., Outcome]) -> None:
    done = cli("--model", "m", "--extra-body", '{"n": 2}')
    assert done.code == 2
    assert "takes no n but 1" in done.err
    assert "cannot be told apart" in done.err


# --- sessions ---


@pytest.mark.parametrize("rate", [math.inf, 100.0])
def test_a_session_holds_its_permit_while_it_thinks(rate: float) -> None:
    """Two at once, three turns of a second each, a second of thought between: 5 s a session, one after the other."""
    turns = [bench.SessionTurn("1", None, 1000.0 * (turn > 0)) for turn in range(3)]
    line = bench.Request({"messages": [{"role": "user", "content": "1"}]}, turns=turns)
    talk = bench.Sessions([line], [0, 3], "server")
    kind = "closed" if math.isinf(rate) else "rate"
    schedule = bench.Schedule(4, kind, rate=rate, burstiness=math.inf, sessions=talk)
    server = Server(lambda index: 1.0)
    records, took = run_load(bench.Load(schedule, talk.request, server, [], 2))
    assert took == pytest.approx(10.0, abs=0.05)
    assert server.peak == 2
    assert sorted(record.job.index for record in records) == list(range(12))
    first = sorted(record.sent_s for record in records if record.job.index in (0, 3, 6, 9))
    assert first == pytest.approx([0, 0, 5, 5], abs=0.05)


def test_a_stop_ends_sessions_after_the_turn_under_way() -> None:
    turns = [bench.SessionTurn("2")] * 100
    line = bench.Request({"messages": [{"role": "user", "content": "2"}]}, turns=turns)
    talk = bench.Sessions([line], [0, 100], "server")
    load = bench.Load(bench.Schedule(4, sessions=talk), talk.request, Server(lambda index: 2.0), [], 2)
    records, took = run_load(load, at(3.0, "press"))
    assert (len(records), took) == (4, pytest.approx(4.0))


def test_the_end_of_the_duration_ends_sessions_after_the_turn_under_way() -> None:
    turns = [bench.SessionTurn("1", None, 1000.0 * (turn > 0)) for turn in range(9)]
    line = bench.Request({"messages": [{"role": "user", "content": "1"}]}, turns=turns)
    talk = bench.Sessions([line], [0, 9], "server")
    schedule = bench.Schedule(None, duration_s=4.5, sessions=talk)
    records, took = run_load(bench.Load(schedule, talk.request, Server(lambda index: 1.0), [], 2))
    assert sorted(record.job.index for record in records) == [0, 1, 2, 9, 10, 11]
    assert took == pytest.approx(5.0, abs=0.05)


ANSWERED = 'say "\u00e9\\n" \U0001f600 to '


class Talker(HttpServer):
    """Answers what it was asked with a text that JSON has to escape, some reasoning before it; knows all requests."""

    def __init__(self) -> None:
        self.said: list[list[dict[str, Any]]] = []
        super().__init__(self._reply)

    def _reply(self, call: Call) -> None:
        body = json.loads(call.body)
        self.said.append(body["messages"])
        text = ANSWERED + str(body["messages"][-1]["content"])
        if text.endswith("fails"):
            call.send(reply("500 No", b"no"))
        elif body.get("stream"):
            words = [text[at : at + 3] for at in range(0, len(text), 3)]
            chunks = [piece(delta(reasoning_content="hm")), *(piece(delta(content=word)) for word in words)]
            call.send(head("200 OK", "Connection: close"), b"".join([*chunks[:4]]), *chunks[4:], FINISH, gap_s=0)
            call.close()
        else:
            message = {"role": "assistant", "content": text, "reasoning_content": "hm"}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            call.send(reply("200 OK", as_json(completion(choices=[choice]))))


SESSION_LINES: list[dict[str, Any]] = [
    {"turns": [{"content": f"{name}{turn}", "delay_ms": 5} for turn in range(4)], "system": f"be {name}", "label": name}
    for name in "abc"
]
SESSION_LINES += [
    {"id": "x", "conversations": [{"from": "human", "value": "d0"}, {"from": "gpt", "value": "A"},
                                  {"from": "human", "value": "d1"}]},
    {"text": "alone"},
    {"turns": [{"content": "e0"}, {"content": "e1 fails"}, {"content": "never"}]},
]  # fmt: skip


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("transport", "processes"), [("stopwatch", 1), ("sdk", 1), ("stopwatch", 2)])
def test_the_server_sees_each_history_complete_and_in_order(
    tmp_path: Path, transport: str, processes: int, streamed: bool
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(line) + "\n" for line in SESSION_LINES))
    with Talker() as server:
        words = ["--api-base", server.api_base, "--model", "m", "--requests-file", corpus, "--warmup", "0"]
        words += ["--transport", transport, "--processes", processes, "--concurrency", 4]
        done = bench_cli(*words, *(["--stream"] if streamed else []), "--results-csv", tmp_path / "r.csv")
    assert done.code == 0, done.err
    wanted = []
    for line in SESSION_LINES:
        said = [{"role": "system", "content": line["system"]}] if "system" in line else []
        texts = [item.get("value", item.get("content")) for item in line.get("turns", line.get("conversations", ()))]
        for text in [text for text in texts if text not in ("A", "never")] or [line["text"]]:
            said = [*said, {"role": "user", "content": text}]
            wanted.append(said)
            said = [*said, {"role": "assistant", "content": ANSWERED + text}]
    assert sorted(map(json.dumps, server.said)) == sorted(map(json.dumps, wanted))
    rows = [(row["session"], row["turn"], row["label"], row["status"]) for row in done.rows]
    assert rows[:4] == [("0", str(turn), "a", "success") for turn in range(1, 5)]
    assert rows[-3:] == [("", "", "", "success"), ("5", "1", "", "success"), ("5", "2", "", "http_error")]
    assert "Sessions: 5 begun; 1 of their turns were not sent: a turn before them failed" in done.out


def test_a_history_of_the_corpus(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(json.dumps(SESSION_LINES[3]))
    with Talker() as server:
        words = ["--api-base", server.api_base, "--model", "m", "--requests-file", corpus, "--concurrency", 1]
        assert bench_cli(*words, "--history", "corpus", "--warmup", 0).code == 0
        corpus.write_text(json.dumps(SESSION_LINES[0]))
        refused = bench_cli(*words, "--history", "corpus")
    assert [message["content"] for message in server.said[-1]] == ["d0", "A", "d1"]
    assert refused.code == 2
    assert "--history corpus: 1 sessions of" in refused.err
