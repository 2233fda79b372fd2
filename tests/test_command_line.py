"""Section 15, Command line: the script as a user meets it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, Optional

import pytest

import online_bench_openai_async as bench
from tests.support.demo import Demo
from tests.support.program import ROOT, SCRIPT, Outcome, run_script
from tests.support.replies import ANSWER, GOOD_EVENTS, reply
from tests.support.server import Call, ScriptedServer, closed_port, says
from tests.support.tables import rows_of

SMALL = ["--concurrency", "4", "--total-requests", "12", "--prompt-tokens", "32", "--output-tokens", "5"]


# --- wrong usage: one line, exit code 2, before any request ---


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--nonsense"], "--nonsense"),
        (["--conc", "5"], "--conc"),
        (["--concurrency", "0"], "--concurrency: takes a whole number, 1 or more, not '0'"),
        (["--concurrency", "-3"], "--concurrency"),
        (["--concurrency", "many"], "not 'many'"),
        (["--total-requests", "0"], "--total-requests"),
        (["--prompt-tokens", "0"], "--prompt-tokens"),
        (["--output-tokens", "-1"], "--output-tokens"),
        (["--warmup", "-1"], "--warmup"),
        (["--timeout", "0"], "--timeout"),
        (["--timeout", "nan"], "--timeout"),
        (["--temperature", "inf"], "--temperature"),
        (["--max-error-rate", "2"], "--max-error-rate"),
        (["--api-base", "127.0.0.1:8000/v1"], "takes a URL like http://127.0.0.1:8000/v1"),
        (["--api-base", "ftp://host/v1"], "takes a URL"),
        (["--api-base", "http://host:99999/v1"], "takes a URL"),
        (["--api-key", "schlüssel"], "printable ASCII"),
        (["--api-key", "two\nlines"], "printable ASCII"),
        (["--extra-body", "[1]"], "takes a JSON object"),
        (["--extra-body", "{"], "takes a JSON object"),
        (["--extra-body", '{"a": NaN}'], "takes a JSON object"),
        (["--append", "--overwrite"], "exclude each other"),
        (["--requests-file", "/nowhere/corpus.jsonl"], "cannot read --requests-file"),
        (["--requests-file", "/"], "cannot read --requests-file"),
        (["--results-csv", "/nowhere/r.csv"], "cannot write --results-csv"),
        (["--results-csv", "/"], "--results-csv"),
        (["--summary-jsonl", "/nowhere/s.jsonl"], "cannot write --summary-jsonl"),
        (["--ca-file", "/nowhere/ca.pem", "--api-base", "https://localhost/v1"], "--ca-file"),
        (["--demo-engine", '{"ttft_ms": 1}'], "--demo-engine needs --demo"),
        (["--demo", "--demo-engine", '{"ttft_ms": "1"}'], "takes a JSON object of numbers"),
        (["--results-csv", ""], "--results-csv: takes a file name, not ''"),
        (["--summary-jsonl", ""], "--summary-jsonl: takes a file name"),
        (["--requests-file", ""], "--requests-file: takes a file name"),
        (["--processes", "-1"], "--processes"),
        (["--seed", "x"], "--seed"),
        (["--request-rate", "-1"], "--request-rate: takes a number above 0, or inf, not '-1'"),
        (["--request-rate", "nan"], "--request-rate"),
        (["--request-rate", "0"], "--request-rate"),
        (["--burstiness", "nan", "--request-rate", "5"], "--burstiness"),
        (["--burstiness", "2"], "add --request-rate"),
        (["--ramp-up", "-1"], "--ramp-up"),
        (["--duration", "inf"], "--duration"),
        (["--grace", "-1", "--duration", "5"], "--grace"),
        (["--grace", "1"], "add --duration"),
        (["--speed", "2"], "--requests-file needs timestamps"),
        (["--timestamp-unit", "s"], "--requests-file needs timestamps"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(cli: Callable[..., Outcome], argv: list[str], complaint: str) -> None:
    done = cli("--model", "m", "--api-base", "http://127.0.0.1:9/v1", *argv)
    assert done.code == 2
    assert done.out == ""
    assert complaint in done.err
    assert done.err.startswith("online_bench_openai_async.py: error: ")
    assert done.err.count("\n") == 1


STAMPED = ['{"text": "a", "timestamp": 0}', '{"text": "b", "timestamp": 1500.5}']


@pytest.mark.parametrize(
    ("lines", "argv", "complaint"),
    [
        (STAMPED, ["--request-rate", "5"], "--request-rate: "),
        (STAMPED, ["--ramp-up", "5"], "--ramp-up: "),
        (STAMPED, ["--total-requests", "3"], "--total-requests 3: the trace "),
        (STAMPED[::-1], [], "line 2: its timestamp is before that of the line above, 1500.5"),
        ([*STAMPED, '{"text": "c"}'], [], "line 3: no timestamp, unlike the lines above"),
        (['{"text": "c"}', *STAMPED], [], "line 2: a timestamp, unlike the lines above"),
        (['{"text": "a", "timestamp": "noon"}'], [], "line 1: the timestamp is not a number of 0 or more: 'noon'"),
        (['{"text": "a", "timestamp": -1}'], [], "line 1: the timestamp is not a number"),
        (['{"timestamp": 0, "input_length": 0, "output_length": 1}'], [], "line 1: input_length and output_length"),
        (['{"timestamp": 0, "input_length": 9, "output_length": 1, "hash_ids": [1, 2]}'], [], "line 1: hash_ids"),
    ],
)
def test_a_trace_that_cannot_be_replayed_is_one_line_and_exit_code_2(
    cli: Callable[..., Outcome], tmp_path: Path, lines: list[str], argv: list[str], complaint: str
) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(lines))
    done = cli("--model", "m", "--api-base", "http://127.0.0.1:9/v1", "--requests-file", str(path), *argv)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert complaint in done.err


@pytest.mark.parametrize("pair", [("--requests-file", "--results-csv"), ("--results-csv", "--summary-jsonl")])
def test_no_file_is_two_things(cli: Callable[..., Outcome], tmp_path: Path, pair: tuple[str, str]) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "a"}\n')
    done = cli("--model", "m", pair[0], str(path), pair[1], str(tmp_path / "." / "corpus.jsonl"), "--overwrite")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "name the same file" in done.err
    assert path.read_text() == '{"text": "a"}\n'


def test_without_the_client_the_way_out_is_named(tmp_path: Path) -> None:
    code = f"import sys; sys.modules['openai'] = None; sys.path.insert(0, {str(ROOT)!r})\n"
    code += "import online_bench_openai_async as b; sys.exit(b.main(['--demo']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "pip install openai" in done.stderr


def test_a_defect_of_ours_is_one_line_that_says_how_to_see_more(
    cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "build_config", lambda *_, **__: 1 / 0)
    done = cli("--model", "m")
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "internal error: ZeroDivisionError" in done.err
    assert "--debug shows where" in done.err
    shown = cli("--model", "m", "--debug")
    assert shown.code == 1
    assert shown.err.startswith("Traceback")
    assert "1 / 0" in shown.err


def test_wrong_usage_reaches_no_server(cli: Callable[..., Outcome], demo: Callable[..., Demo], tmp_path: Path) -> None:
    server = demo(ttft_ms=1, gap_ms=0)
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "a"}\nbroken\n')
    done = cli(*server.target, "--requests-file", str(corpus), "--results-csv", str(tmp_path / "r.csv"))
    assert done.code == 2
    assert "line 2" in done.err
    assert server.truth()["connections"] == 1  # the one that asks
    assert not (tmp_path / "r.csv").exists()


def test_a_bad_environment_is_named(cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "no-scheme")
    assert "$OPENAI_BASE_URL takes a URL" in cli("--model", "m").err


def test_without_a_model_the_served_ones_are_named(cli: Callable[..., Outcome], demo: Callable[..., Demo]) -> None:
    done = cli("--api-base", demo(ttft_ms=1).url)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "serves: demo" in done.err


def test_without_a_model_and_without_a_server(cli: Callable[..., Outcome]) -> None:
    done = cli("--api-base", "http://127.0.0.1:9/v1")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "--model is missing" in done.err


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["--nonsense"], ["--concurrency", "0"]])
def test_help_and_complaints_import_no_client(argv: list[str]) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['x', *{argv!r}]\n"
        "try: runpy.run_path(sys.path.pop(0) + '/online_bench_openai_async.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(*(n for n in ('openai', 'httpx', 'httpx2', 'aiohttp', 'uvloop') if n in sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr.splitlines()[-1] == ""


def test_help_costs_little_more_than_the_interpreter_and_asyncio() -> None:
    """Under 0.15 s here; as a ratio to what any asyncio program pays, so that a slow machine does not fail it."""

    def best(*argv: str) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            subprocess.run([sys.executable, *argv], capture_output=True, check=True)
            times.append(time.perf_counter() - start)
        return min(times)

    assert best(str(SCRIPT), "--help") < 5 * best("-c", "import argparse, asyncio, csv, dataclasses, json, random")


# --- a run ---


def test_the_demo_needs_nothing_and_says_how_true_it_was() -> None:
    done = run_script("--demo", *SMALL)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].startswith("Requests (ok/err): 12/0  Concurrency: 4  Elapsed: ")
    assert [line.split(":")[0] for line in lines[1:7]] == [
        "Req/s", "Generated tokens/s", "Total tokens/s (in+out)", "p50 latency", "p95 latency", "Avg latency",
    ]  # fmt: skip
    assert lines[7] == ""
    assert any(line.startswith("Measurement error: p50 ") for line in lines)
    assert "=== Benchmark Configuration ===" in lines
    assert "Progress: 12/12 (100.0%)" in done.err


def test_rows_totals_and_summary_agree(cli: Callable[..., Outcome], demo: Callable[..., Demo], tmp_path: Path) -> None:
    server, path, line = demo(ttft_ms=5, gap_ms=20), tmp_path / "r.csv", tmp_path / "s.jsonl"
    done = cli(*server.target, *SMALL, "--stream", "--results-csv", str(path), "--summary-jsonl", str(line))
    assert done.code == 0, done.err
    rows = rows_of(path)
    told = json.loads(line.read_text())
    measured = server.truth()["requests"][4:]
    assert len(rows) == told["completed"] == len(measured) == 12
    assert sum(int(row["completion_tokens"]) for row in rows) == told["total_output_tokens"] == 60
    assert sum(int(row["prompt_tokens"]) for row in rows) == sum(row["prompt_tokens"] for row in measured)
    assert told["total_input_tokens"] == sum(row["prompt_tokens"] for row in measured)
    assert all(float(row["ttft_ms"] or 0) <= float(row["latency_ms"]) for row in rows)  # blank where read late
    assert told["gaps_are_of_tokens"] is True
    cli(*server.target, *SMALL, "--summary-jsonl", str(line))
    assert len(line.read_text().splitlines()) == 2


def test_a_corpus_sets_the_number_of_requests_and_limits_per_line(
    cli: Callable[..., Outcome], demo: Callable[..., Demo], tmp_path: Path
) -> None:
    server, corpus, path = demo(ttft_ms=1, gap_ms=0), tmp_path / "corpus.jsonl", tmp_path / "r.csv"
    corpus.write_text(
        '{"text": "a", "max_tokens": 3}\n{"prompt": "b"}\n{"messages": [{"role":"user","content":"c"}]}\n'
    )
    target = [*server.target, "--requests-file", str(corpus), "--output-tokens", "7", "--concurrency", "2"]
    assert cli(*target, "--results-csv", str(path)).code == 0
    tokens = {row["index"]: row["completion_tokens"] for row in rows_of(path)}
    assert tokens == {"0": "3", "1": "7", "2": "7"}
    cycled = cli(*target, "--total-requests", "5")
    assert "5 requests cycle through 3 prompts" in cycled.err
    assert "Requests (ok/err): 5/0" in cycled.out


def test_an_existing_csv_stops_the_run_before_it_begins(
    cli: Callable[..., Outcome], demo: Callable[..., Demo], tmp_path: Path
) -> None:
    server, path = demo(ttft_ms=1, gap_ms=0), tmp_path / "r.csv"
    assert cli(*server.target, *SMALL, "--results-csv", str(path)).code == 0
    before = path.read_text()
    refused = cli(*server.target, *SMALL, "--results-csv", str(path))
    assert refused.code == 2
    assert "--append adds to it" in refused.err
    assert path.read_text() == before
    assert cli(*server.target, *SMALL, "--results-csv", str(path), "--append").code == 0
    assert len(rows_of(path)) == 24


def test_overwrite_keeps_the_old_rows_until_the_warm_up_has_succeeded(
    cli: Callable[..., Outcome], demo: Callable[..., Demo], tmp_path: Path
) -> None:
    path = tmp_path / "r.csv"
    path.write_text("index,old\n1,2\n")
    results = ["--results-csv", str(path), "--overwrite"]
    dead = ["--api-base", "http://127.0.0.1:9/v1", "--model", "m"]
    assert cli(*dead, *SMALL, *results).code == 1
    for wrong in (["--summary-jsonl", "/nowhere/s"], ["--requests-file", "/nowhere/c"], ["--extra-body", '{"n": 2}'],
                  ["--concurrency", "0"], ["--ca-file", "/nowhere/ca"], ["--transport", "none"]):  # fmt: skip
        assert cli(*dead, *SMALL, *results, *wrong).code == 2
    assert path.read_text() == "index,old\n1,2\n"
    assert cli(*demo(ttft_ms=1, gap_ms=0).target, *SMALL, *results).code == 0
    assert len(rows_of(path)) == 12


def test_a_warm_up_that_fails_stops_the_run_with_its_error(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    done = cli("--api-base", "http://127.0.0.1:9/v1", "--model", "m", *SMALL, "--results-csv", str(path))
    assert done.code == 1
    assert "the warm-up failed, nothing was measured: connect_refused" in done.err
    assert done.err.count("\n") == 1
    assert not path.exists()


def test_a_server_that_fails_everything_ends_with_1_and_a_report(cli: Callable[..., Outcome]) -> None:
    done = cli("--api-base", "http://127.0.0.1:9/v1", "--model", "m", *SMALL, "--warmup", "0")
    assert done.code == 1
    assert "Requests (ok/err): 0/12" in done.out
    assert "Errors: 12 x http_error/connect_refused" in done.out
    assert "p50 latency: -" in done.out


def test_one_seed_sends_the_same_prompts(cli: Callable[..., Outcome], demo: Callable[..., Demo]) -> None:
    counted = []
    for seed in ("5", "5", "6"):
        server = demo(ttft_ms=1, gap_ms=0)
        cli(*server.target, *SMALL, "--concurrency", "1", "--seed", seed)
        counted.append([row["prompt_tokens"] for row in server.truth()["requests"]])
    assert counted[0] == counted[1]


def test_a_failed_tls_check_tells_the_way_out(cli: Callable[..., Outcome], demo: Callable[..., Demo]) -> None:
    server = demo(ttft_ms=1)
    done = cli("--api-base", server.url.replace("http:", "https:"), "--model", "m", *SMALL)
    assert done.code == 1
    assert "tls_error" in done.err
    assert "http:// instead of https://?" in done.err
    assert "--insecure" not in done.err  # nothing would become better by it


def test_a_proxy_carries_requests_to_hosts_beyond_this_one_and_is_printed(
    cli: Callable[..., Outcome], script: Callable[..., ScriptedServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = script(says(reply("200 OK", ANSWER)))
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
    done = cli("--api-base", "http://gpu.example/v1", "--model", "m", *SMALL, "--warmup", "0")
    assert done.code == 0, done.err
    assert f"via proxy http://127.0.0.1:{proxy.port}" in done.err
    assert "transport sdk" in done.out
    assert proxy.requests == 12
    refused = cli("--api-base", "http://gpu.example/v1", "--model", "m", *SMALL, "--transport", "stopwatch")
    assert refused.code == 2
    assert "--transport sdk does without" in refused.err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--extra-body", '{"n": 2}'], "no n but 1"),
        (["--prompt-calibration", "1.1"], "takes two numbers"),
        (["--prompt-calibration", "0,8"], "takes two numbers"),
        (["--prompt-calibration", "1.1,nan"], "takes two numbers"),
    ],
)
def test_what_cannot_be_measured_is_refused(cli: Callable[..., Outcome], words: list[str], complaint: str) -> None:
    done = cli("--model", "m", *words)
    assert done.code == 2
    assert complaint in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("mode", "refused", "message", "learned"),
    [
        ([], "max_tokens", "Unsupported parameter: 'max_tokens'", "max_completion_tokens"),
        (["--stream"], "stream_options", "stream_options is not permitted", None),
    ],
)
def test_the_warm_up_learns_what_the_server_takes(
    cli: Callable[..., Outcome],
    script: Callable[..., ScriptedServer],
    mode: list[str],
    refused: str,
    message: str,
    learned: Optional[str],
) -> None:
    """Refusals cost warm-up requests only; the measured run is asked rightly from its first request on."""

    def answer(call: Call) -> None:
        if refused in json.loads(call.body):
            call.send(reply("400 Bad Request", json.dumps({"error": {"message": message}}).encode()))
        else:
            call.send(reply("200 OK", b"".join(GOOD_EVENTS) if mode else ANSWER))

    server = script(answer)
    done = cli(
        "--api-base",
        server.api_base,
        "--model",
        "m",
        *mode,
        "--concurrency",
        "1",
        "--total-requests",
        "3",
        "--warmup",
        "1",
        "--prompt-tokens",
        "16",
    )
    assert done.code == 0, done.err
    assert "Requests (ok/err): 3/0" in done.out
    sent = [json.loads(body) for body in server.bodies]
    assert [refused in body for body in sent] == [True, False, False, False, False]
    assert learned is None or all(learned in body for body in sent[1:])


# --- memory ---


def peak_kb(server: Demo, count: int) -> int:
    sizes = ["--concurrency", "32", "--total-requests", str(count), "--prompt-tokens", "64", "--output-tokens", "8"]
    command = [sys.executable, str(SCRIPT), *server.target, *sizes, "--no-progress"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kB on Linux only")
def test_memory_does_not_follow_the_number_of_requests(demo: Callable[..., Demo]) -> None:
    server = demo(ttft_ms=0, gap_ms=0)
    assert peak_kb(server, 5_000) - peak_kb(server, 500) < 3 * 4_500  # kB: 3 a request would be a record kept


def test_processes_auto_says_what_it_reckons_with(cli: Callable[..., Outcome], demo: Callable[..., Demo]) -> None:
    target = [*demo(ttft_ms=1, gap_ms=0).target, *SMALL, "--processes", "auto", "--stream"]
    done = cli(*target)
    assert done.code == 0, done.err
    said = re.search(
        r"--processes auto: (\d+); (\d+) in flight at 100 tokens/s each .* us a chunk, .* us a request", done.err
    )
    assert said, done.err
    assert 1 <= int(said[1]) <= (os.cpu_count() or 1)
    assert f"Client: {said[1]} process" in done.out


# --- waiting for a server ---


def test_a_server_that_is_still_loading_is_waited_for(
    cli: Callable[..., Outcome], script: Callable[..., ScriptedServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it lists its models, and then until it answers."""
    monkeypatch.setattr(bench, "READY_POLL_S", 0.01)
    loading, listed, good = reply("503 Loading", b"loading"), reply("200 OK", b'{"data": []}'), reply("200 OK", ANSWER)
    server = script(*map(says, (loading, listed, loading, listed, good, good)))
    words = ["--api-base", server.api_base, "--model", "m", "--concurrency", "1", "--total-requests", "1"]
    done = cli(*words, "--warmup", 0, "--wait-ready", 30)
    assert done.code == 0, done.err
    waits = [line for line in done.err.splitlines() if "waiting for" in line]
    assert len(waits) == 2
    assert "503" in waits[0]
    assert "503" in waits[1]
    bodies = [json.loads(body) for body in server.bodies if body]
    assert [body["max_tokens"] for body in bodies] == [1, 1, 1024]


def test_who_waits_in_vain_is_told_the_last_cause(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    with closed_port() as port:
        words = ["--api-base", f"http://127.0.0.1:{port}/v1", "--model", "m", "--wait-ready", "0.05"]
        done = cli(*words, "--results-csv", tmp_path / "r.csv")
    assert (done.code, done.out) == (1, "")
    assert f"http://127.0.0.1:{port}/v1 was not ready within 0.05 s: " in done.err
    assert "refused" in done.err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
