"""Section 11, Server's own figures: metrics pages, GPUs, and that neither can hurt a run."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any, Callable

import pytest

import online_bench_openai_async as bench
from tests.support.demo import Demo
from tests.support.program import Outcome, cli
from tests.support.records import make_config, make_record, summary_of
from tests.support.replies import ANSWER, reply
from tests.support.server import Call, HttpServer

PAGES = {  # as each server writes them: dialect -> (page, some of what is in it)
    "vLLM": (
        """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a, \\"b\\" {c}"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 4.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.75
vllm:prompt_tokens_total{engine="0",model_name="m"} 1.5e+03
vllm:prompt_tokens_created{engine="0",model_name="m"} 1.7637e+09
vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf",model_name="m"} 4.0
vllm:time_to_first_token_seconds_count{engine="0",model_name="m"} 4.0
vllm:time_to_first_token_seconds_sum{engine="0",model_name="m"} 0.5
python_gc_objects_collected_total{generation="0"} NaN
""",
        {"running": 7.0, "kv_cache": 0.75, "prompt_tokens": 1500.0, "ttft_sum": 0.5, "ttft_count": 4.0},
    ),
    "SGLang": (
        """\
sglang:prompt_tokens_total{model_name="m"} 100.0
sglang:cached_tokens_total{model_name="m"} 40.0
sglang:num_running_reqs{model_name="m",tp_rank="0"} 5.0
sglang:num_running_reqs{model_name="m",tp_rank="1"} 5.0
sglang:token_usage{model_name="m",tp_rank="0"} 0.28
sglang:num_queue_reqs{model_name="m"} 2.0
""",
        {"prompt_tokens": 100.0, "cache_queries": 100.0, "cache_hits": 40.0, "running": 5.0, "waiting": 2.0},
    ),
    "TGI": (
        """\
# TYPE tgi_request_generated_tokens histogram
tgi_request_generated_tokens_sum 640
tgi_request_generated_tokens_count 10
tgi_queue_size 1
tgi_request_queue_duration_sum 2.5
tgi_request_queue_duration_count 10
""",
        {"generated_tokens": 640.0, "waiting": 1.0, "queue_sum": 2.5, "queue_count": 10.0},
    ),
    "llama.cpp": (
        """\
# HELP llamacpp:prompt_tokens_total Number of prompt tokens processed.
# TYPE llamacpp:prompt_tokens_total counter
llamacpp:prompt_tokens_total 70
llamacpp:tokens_predicted_total 30
llamacpp:requests_deferred 2
""",
        {"computed_prompt_tokens": 70.0, "generated_tokens": 30.0, "waiting": 2.0},
    ),
    "TensorRT-LLM": (
        """\
trtllm_generation_tokens_total{engine_type="trtllm",model_name="m"} 12.0
trtllm_kv_cache_utilization{engine_type="trtllm",model_name="m"} 0.5
trtllm_e2e_request_latency_seconds_sum{engine_type="trtllm",model_name="m"} 3.0
trtllm_e2e_request_latency_seconds_count{engine_type="trtllm",model_name="m"} 2.0
""",
        {"generated_tokens": 12.0, "kv_cache": 0.5, "e2el_sum": 3.0, "e2el_count": 2.0},
    ),
    "Dynamo": (
        """\
dynamo_frontend_inflight_requests{model="m"} 6
dynamo_frontend_queued_requests{model="m"} 6
dynamo_frontend_output_tokens_total{model="m"} 500
dynamo_frontend_input_sequence_tokens_sum{model="m"} 900
""",
        {"running": 6.0, "generated_tokens": 500.0, "prompt_tokens": 900.0},
    ),
}


@pytest.mark.parametrize("dialect", PAGES)
def test_every_dialect_is_read(dialect: str) -> None:
    page, wanted = PAGES[dialect]
    told, figures = bench.page_figures(page)
    assert told == dialect
    assert {name: figures[name] for name in wanted} == wanted
    assert "waiting" not in figures or dialect != "Dynamo"  # what it calls queued includes the prefill


def test_the_table_knows_only_figures_that_are_used() -> None:
    known = {"cache_queries", "cache_hits", "drafts", "accepted"}
    known |= {*bench.SERVER_COUNTS, *bench.SERVER_GAUGES, *bench.SERVER_DURATIONS}
    assert {figure for _, names in bench.SERVER_DIALECTS.values() for figure in names} == known
    assert set(PAGES) == set(bench.SERVER_DIALECTS)


@pytest.mark.parametrize(
    ("old", "figure"),
    [
        ('vllm:gpu_cache_usage_perc{model_name="m"} 0.5', "kv_cache"),
        ("vllm:gpu_prefix_cache_hits_total 5", "cache_hits"),
        ("vllm:time_per_output_token_seconds_sum 5", "itl_sum"),
        ("sglang:time_per_output_token_seconds_count 5", "itl_count"),
        ("trtllm:request_queue_time_seconds_sum 5", "queue_sum"),
        ("dynamo_frontend_output_sequence_tokens_sum 5", "generated_tokens"),
    ],
)
def test_names_of_older_versions_are_known(old: str, figure: str) -> None:
    assert figure in bench.page_figures(old)[1]


@pytest.mark.parametrize(
    "page",
    [
        "<html>not found</html>",
        '{"error": "Unauthorized"}',
        "vllm:prompt_tokens_total",
        "vllm:prompt_tokens_total many",
        'vllm:prompt_tokens_total{model_name="m} 3',
        "vllm:prompt_tokens_total 3 4 5",
        "process_cpu_seconds_total 4.5",
        "",
    ],
)
def test_a_page_of_something_else_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match=r"Prometheus|float|no figures"):
        bench.page_figures(page)


def test_a_hostile_line_takes_no_time() -> None:
    started = time.perf_counter()
    for line in ('a{b="' + '\\"' * 50_000, "a{" + '"x"' * 50_000 + " 1", "a" * 100_000, "a 1" + " " * 100_000 + "x"):
        with pytest.raises(ValueError, match="Prometheus"):
            bench.parse_metrics(line)
    assert time.perf_counter() - started < 5


def test_replicas_are_added_up_and_a_router_is_not_counted_again() -> None:
    engine = {"generated_tokens": 10.0, "kv_cache": 0.4, "waiting": 2.0}
    pages = [
        ("vLLM", engine),
        ("vLLM", {**engine, "kv_cache": 0.6}),
        ("Dynamo", {"generated_tokens": 20.0, "e2el_sum": 1.0}),
    ]
    assert bench.added_up(pages) == {"generated_tokens": 20.0, "kv_cache": 0.6, "waiting": 4.0, "e2el_sum": 1.0}


def test_a_points_figures_are_differences_means_and_peaks() -> None:
    before = {"generated_tokens": 100.0, "cache_queries": 10.0, "cache_hits": 5.0, "ttft_sum": 1.0, "ttft_count": 1.0}
    during = [{"running": 4.0, "kv_cache": 0.5}, {"running": 8.0, "kv_cache": 0.7}]
    after = {"generated_tokens": 300.0, "cache_queries": 30.0, "cache_hits": 6.0, "ttft_sum": 2.0, "ttft_count": 5.0}
    after.update(drafts=10.0, accepted=15.0, running=0.0)  # counters with labels appear with their first event
    assert bench.server_figures([before, *during, after]) == {
        "server_generated_tokens": 200,
        "server_prefix_cache_hit_rate": pytest.approx(0.05),
        "server_acceptance_length_mean": pytest.approx(2.5),
        "server_mean_ttft_ms": pytest.approx(250.0),
        "server_running_mean": 6.0,
        "server_running_peak": 8.0,
        "server_kv_cache_mean": pytest.approx(0.6),
        "server_kv_cache_peak": 0.7,
    }
    assert bench.server_figures([after, before]) == {}  # started anew in between
    assert bench.server_figures([before]) == {}


# --- which pages are read, and when ---


@pytest.mark.parametrize(
    ("servers", "given", "urls"),
    [
        (["http://127.0.0.1:8000/v1"], None, ["http://127.0.0.1:8000/metrics"]),
        (["http://me:secret@localhost:8000/openai/v1?key=1"], None, ["http://localhost:8000/metrics"]),
        (["http://[::1]:1/v1", "http://[::1]:2/v1"], None, ["http://[::1]:1/metrics", "http://[::1]:2/metrics"]),
        (["http://127.0.0.1:8000/v1", "http://10.0.0.1:8000/v1"], None, []),  # half of the counts would be none
        (["http://127.0.0.1:8000/v1"], ["off"], []),
        (["https://api.openai.com/v1"], None, []),
        (["https://api.openai.com/v1"], ["http://box:1/metrics"], ["http://box:1/metrics"]),
    ],
)
def test_only_local_servers_pages_are_read_unasked(servers: list[str], given: Any, urls: list[str]) -> None:
    config = make_config(api_base=servers[0], servers=servers, server_metrics=given, gpu_metrics="off")
    orders: Any = bench.ServerFigures(config).orders
    assert orders["urls"] == urls
    assert orders["tool"] == ""


def test_a_page_can_be_named_by_its_server() -> None:
    parse = bench.build_parser().parse_args
    options = parse(["--server-metrics", "http://box:1", "--server-metrics", "http://box:2/prometheus/metrics/"])
    assert options.server_metrics == ["http://box:1/metrics", "http://box:2/prometheus/metrics"]
    for bad in (["--server-metrics", "box:1"], ["--gpu-metrics", "first"], ["--metrics-interval", "0"]):
        with pytest.raises(bench.UserError, match=bad[0]):
            parse(bad)


# --- against a server ---


def bench_json(folder: Path, *words: Any) -> tuple[Outcome, dict[str, Any]]:
    """A run that reads the local server's metrics page, and its JSON line."""
    path = folder / "summary.jsonl"
    done = cli(*words, "--metrics-interval", 0.1, "--summary-jsonl", path, "--no-progress")
    return done, json.loads(path.read_text().splitlines()[-1])


LOAD = ["--concurrency", 4, "--total-requests", 12, "--prompt-tokens", 64, "--output-tokens", 24, "--warmup", 4]


@pytest.mark.parametrize("processes", [1, 2])
def test_the_servers_totals_are_the_clients(demo: Callable[..., Demo], tmp_path: Path, processes: int) -> None:
    server = demo(ttft_ms=20, gap_ms=4)
    done, said = bench_json(tmp_path, *server.target, *LOAD, "--stream", "--processes", processes)
    assert done.code == 0
    assert said["server_prompt_tokens"] == said["total_input_tokens"] == 12 * 64
    assert said["server_generated_tokens"] == said["total_output_tokens"] == 12 * 24
    assert said["server_prefix_cache_hit_rate"] == 0
    assert 0 < said["server_running_peak"] <= 4
    assert said["server_mean_ttft_ms"] >= 20
    assert "Server: running mean" in done.out
    assert f"Server's means: TTFT {said['server_mean_ttft_ms']:.2f} ms (here " in done.out
    assert not [line for line in said["warnings"] if "somebody" in line]


def test_a_second_client_is_noticed(demo: Callable[..., Demo], tmp_path: Path) -> None:
    server, over = demo(ttft_ms=5, gap_ms=5), threading.Event()

    def ask() -> None:
        body = json.dumps({"model": "demo", "messages": [{"role": "user", "content": "me, too"}], "max_tokens": 4})
        while not over.is_set():
            asked = urllib.request.Request(
                f"{server.url}/chat/completions", body.encode(), {"Content-Type": "text/json"}
            )
            urllib.request.urlopen(asked).close()

    other = threading.Thread(target=ask)
    other.start()
    _, said = bench_json(tmp_path, *server.target, *LOAD)
    over.set()
    other.join()
    assert any("somebody else used it meanwhile" in line for line in said["warnings"]), said["warnings"]
    assert said["server_generated_tokens"] > said["total_output_tokens"]


class Pages(HttpServer):
    """A chat server whose metrics page is what the test says; keeps the heads of what was asked."""

    def __init__(self, metrics: Callable[[Call], None]) -> None:
        self.heads: list[bytes] = []
        self._metrics = metrics
        super().__init__(self._serve)

    def _serve(self, call: Call) -> None:
        if call.head.startswith(b"GET"):
            self.heads.append(call.head)
            self._metrics(call)
        else:
            call.send(reply("200 OK", ANSWER, "Content-Type: application/json"))


def fifty_megabytes(call: Call) -> None:
    call.send(b"HTTP/1.1 200 OK\r\nContent-Length: 52428800\r\n\r\n")
    for _ in range(800):
        call.send(b"vllm:prompt_tokens_total 1\n" * 2427)
    call.close()


def drip(call: Call) -> None:
    call.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(1000):
        call.send(b"#")
        time.sleep(0.05)


HOSTILE: dict[str, Callable[[Call], None]] = {
    "hangs": Call.stall,
    "drips": drip,
    "garbage": lambda call: call.send(reply("200 OK", bytes(range(256)) * 40)),
    "other": lambda call: call.send(reply("200 OK", b"process_cpu_seconds_total 4.5\n")),
    "401": lambda call: call.send(reply("401 Unauthorized", b'{"error":"Unauthorized"}')),
    "redirect": lambda call: call.send(reply("302 Found", b"", "Location: http://127.0.0.1:1/metrics")),
    "huge": fifty_megabytes,
    "resets": Call.reset,
}


@pytest.mark.parametrize(
    ("fault", "asked"),
    [*((fault, False) for fault in HOSTILE), ("hangs", True), ("401", True)],
)
def test_a_page_that_misbehaves_costs_the_run_nothing(
    fault: str, asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "METRICS_TIMEOUT_S", 0.5)
    with Pages(HOSTILE[fault]) as server:
        words = [
            "--api-base",
            server.api_base,
            "--model",
            "m",
            "--total-requests",
            5,
            "--warmup",
            1,
            "--api-key",
            "sk-s3cret",
        ]
        url = f"http://127.0.0.1:{server.port}/metrics"
        done, said = bench_json(tmp_path, *words, *(["--server-metrics", url] if asked else []))
    assert (done.code, said["completed"]) == (0, 5)
    assert said["duration"] < 2
    assert not [key for key in said if key.startswith("server_")]
    assert len(server.heads) == 1  # and is not read again
    assert b"s3cret" not in b"".join(server.heads)
    notes = [line for line in done.err.splitlines() if "metrics" in line]
    assert len(notes) == asked, done.err
    assert not asked or f"--server-metrics {url}: " in notes[0]


def test_a_page_that_hangs_after_the_start_costs_nothing_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "METRICS_TIMEOUT_S", 0.5)
    calls: list[Call] = []

    def once(call: Call) -> None:
        calls.append(call)
        page = PAGES["llama.cpp"][0].encode()
        call.send(reply("200 OK", page, "Connection: close")) if len(calls) == 1 else call.stall()

    with Pages(once) as server:
        done, said = bench_json(tmp_path, "--api-base", server.api_base, "--model", "m", "--total-requests", 5)
    assert (done.code, said["completed"]) == (0, 5)
    assert not [key for key in said if key.startswith("server_")]


def test_the_password_of_a_page_is_sent_there_and_shown_nowhere(tmp_path: Path) -> None:
    page = PAGES["llama.cpp"][0].encode()
    with Pages(lambda call: call.send(reply("200 OK", page, "Connection: close"))) as server:
        url = f"http://me:s3cretword@127.0.0.1:{server.port}/metrics?token=t0kenword"
        words = ["--api-base", server.api_base, "--model", "m", "--total-requests", 5, "--server-metrics", url]
        done, _ = bench_json(tmp_path, *words)
    assert b"Authorization: Basic" in server.heads[0]
    shown = done.out + done.err + (tmp_path / "summary.jsonl").read_text()
    assert "s3cretword" not in shown
    assert "t0kenword" not in shown
    assert "server_metrics: http://***@127.0.0.1" in done.out


# --- what it means for the figures ---


def warned(summary: bench.Summary, **server: Any) -> str:
    said = bench.warnings_of(dataclasses.replace(summary, server=server), make_config(requests_file="c.jsonl"), [])
    return "; ".join(warning.text for warning in said)


def test_what_the_server_says_is_held_against_the_run() -> None:
    summary = summary_of(make_record())  # 10 prompt tokens, 5 generated
    assert not warned(summary, server_prompt_tokens=10, server_generated_tokens=5, server_prefix_cache_hit_rate=0.009)
    more = warned(summary, server_prompt_tokens=12, server_generated_tokens=5)
    assert (
        more == "the server has counted 12 prompt tokens where this client counted 10: somebody else used it meanwhile"
    )
    assert "not every request went to the server" in warned(summary, server_generated_tokens=4)
    uncounted = summary_of(make_record(), make_record(1, has_usage=False))
    assert "the server has counted" not in warned(uncounted, server_generated_tokens=7)
    assert "these figures do not show their prefill" in warned(summary, server_prefix_cache_hit_rate=0.02)
    queued = {"server_mean_queue_ms": 60.0, "server_mean_e2el_ms": 1000.0}
    assert "60.0 ms on average" in warned(summary, **queued)
    assert not warned(summary, server_mean_queue_ms=4.0, server_mean_e2el_ms=1000.0)
    assert "4.0 waiting beside 8.0 running" in warned(summary, server_waiting_mean=4.0, server_running_mean=8.0)
    assert "3 preemptions" in warned(summary, server_preemptions=3, server_kv_cache_peak=0.8)
    assert "100% full" in warned(summary, server_preemptions=0, server_kv_cache_peak=1.0)


@pytest.mark.parametrize(("hit", "warns"), [(0.9, False), (0.2, False), (0.95, True)])
def test_hits_that_the_corpus_was_made_for_are_no_warning(hit: float, warns: bool) -> None:
    tally = bench.Tally([10, 9])  # nine tenths shared
    tally.add(make_record(cached_tokens=None))
    assert ("prefix cache" in warned(tally.summary(), server_prefix_cache_hit_rate=hit)) is warns


# --- GPUs ---


def fake_tool(folder: Path, name: str, body: str, patch: pytest.MonkeyPatch, only: bool = True) -> None:
    tool = folder / name
    tool.write_text(f"#!/bin/sh\n{body}\n")
    tool.chmod(0o755)
    patch.setenv("PATH", f"{folder}:/usr/bin:/bin")


NVIDIA = """\
echo "$@" > "$(dirname "$0")/asked"
while true; do
  echo "0, NVIDIA H100 80GB HBM3, 570.124.06, 90, 70000, 81559, 500.00"
  echo "1, NVIDIA H100 80GB HBM3, 570.124.06, 0, 4, 81559, [N/A]"
  sleep 0.05
done"""


def test_nvidia_smi_gives_energy_per_token(
    demo: Callable[..., Demo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tool(tmp_path, "nvidia-smi", NVIDIA, monkeypatch)
    done, said = bench_json(tmp_path, *demo(ttft_ms=20, gap_ms=4).target, *LOAD)
    assert (said["gpu_name"], said["gpu_driver"]) == ("NVIDIA H100 80GB HBM3", "570.124.06")
    assert said["gpu_count"] == 1  # the other one did nothing
    assert said["gpu_utilization_mean"] == 90
    assert said["gpu_power_mean_w"] == pytest.approx(500)
    assert said["gpu_energy_j"] == pytest.approx(500 * said["duration"], rel=0.1)
    assert said["gpu_energy_per_output_token_j"] == pytest.approx(said["gpu_energy_j"] / said["total_output_tokens"])
    assert said["gpu_energy_per_request_j"] == pytest.approx(said["gpu_energy_j"] / said["completed"])
    assert said["gpu_memory_peak_bytes"] == 70000 << 20
    assert "GPU: NVIDIA H100 80GB HBM3, count 1, driver 570.124.06, utilisation mean 90 %, memory peak" in done.out
    assert "--loop-ms=100" in (tmp_path / "asked").read_text()


@pytest.mark.parametrize("body", ["exit 9", "echo NVIDIA-SMI has failed; sleep 60"])
def test_a_tool_that_does_not_work_is_silent_unless_asked_for(
    body: str, demo: Callable[..., Demo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tool(tmp_path, "nvidia-smi", body, monkeypatch)
    server = demo(ttft_ms=1, gap_ms=1)
    done, said = bench_json(tmp_path, *server.target, *LOAD)
    assert (done.code, "gpu" in done.err.lower()) == (0, False)
    assert not [key for key in said if key.startswith("gpu_") and key != "gpu_metrics"]
    asked, _ = bench_json(tmp_path, *server.target, *LOAD, "--gpu-metrics", "all")
    assert "--gpu-metrics all: neither nvidia-smi nor rocm-smi tells of it here" in asked.err


def test_rocm_smi_is_read_by_both_names_of_its_power() -> None:
    cards = {
        "card0": {"GPU use (%)": "97", "VRAM Total Memory (B)": "206141652992", "Card Series": "Instinct MI300X",
                  "VRAM Total Used Memory (B)": "1000", "Current Socket Graphics Package Power (W)": "550.0"},
        "card1": {"GPU use (%)": 0, "Average Graphics Package Power (W)": "N/A"},
        "system": {"Driver version": "6.10.5"},
    }  # fmt: skip
    first, second = bench.rocm_samples(json.dumps(cards), 7.0)
    facts = {"utilization": 97.0, "memory": 1000.0, "memory_total": 206141652992.0, "power": 550.0}
    assert first == bench.GpuSample(7.0, "0", "Instinct MI300X", "6.10.5", facts)
    assert second == bench.GpuSample(7.0, "1", "AMD GPU", "6.10.5", {"utilization": 0.0})


def test_rocm_smi_is_asked_at_every_interval(
    demo: Callable[..., Demo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = {"GPU use (%)": "50", "Average Graphics Package Power (W)": "200", "Card series": "MI250"}
    fake_tool(tmp_path, "rocm-smi", f"echo '{json.dumps({'card0': card})}'", monkeypatch)
    _, said = bench_json(tmp_path, *demo(ttft_ms=20, gap_ms=4).target, *LOAD, "--gpu-metrics", "0")
    assert (said["gpu_name"], said["gpu_power_mean_w"]) == ("MI250", pytest.approx(200))
    assert "gpu_memory_peak_bytes" not in said


def rows(gpu: str, *powers: float) -> list[bench.GpuSample]:
    facts = {"utilization": 50.0, "memory": 1.0}
    return [bench.GpuSample(at, gpu, "G", "d", {**facts, "power": power}) for at, power in enumerate(powers)]


def test_energy_is_power_integrated_over_the_point() -> None:
    both = [*rows("0", 100.0, 300.0, 300.0), *rows("1", 50.0, 50.0, 50.0)]
    found = bench.gpu_figures(both, 0.0, 2.0)
    assert found["gpu_energy_j"] == pytest.approx(200 + 300 + 100)
    assert found["gpu_power_mean_w"] == pytest.approx(300)
    untold = bench.GpuSample(0.0, "2", "G", "d", {})
    assert "gpu_energy_j" not in bench.gpu_figures([*both, untold], 0.0, 2.0)  # of two of three it would not be all
    assert bench.gpu_figures([], 0.0, 2.0) == {}


def test_what_is_drawn_over_time_is_lists_of_seconds_and_values() -> None:
    samples = [(0.5, {"running": 4.0, "generated_tokens": 10.0}), (1.0, {"running": 5.0, "generated_tokens": 40.0})]
    assert bench.figures_over_time(samples, [*rows("0", 100.0, 300.0), *rows("1", 50.0, 50.0, 50.0)]) == {
        "server_running": [[0.5, 4.0], [1.0, 5.0]],
        "server_generated_tokens_per_s": [[1.0, 60.0]],
        "gpu_power_w": [[0, 150.0], [1, 350.0]],
        "gpu_utilization": [[0, 50.0], [1, 50.0]],
    }
    assert bench.figures_over_time([], []) == {}
