"""Room 6: what is printed, whole strings."""

from __future__ import annotations

import dataclasses
import json

import pytest

import online_bench_openai_async as bench
from tests.support.records import health, make_config, make_record, summary_of


def test_the_progress_line() -> None:
    tally = bench.Tally()
    for index in range(4):
        tally.add(make_record(index))
    tally.add(make_record(4, status="http_error", error_kind="timeout"))
    assert bench.progress_line(tally, 10, 2.0) == (
        "Progress: 5/10 (50.0%) | RPS(avg): 2.00 | Gen tok/s: 10.00 | Total tok/s: 30.00 | Errors: 1 | ETA:   2.0s"
    )


def test_the_progress_line_before_the_first_reply() -> None:
    assert bench.progress_line(bench.Tally(), 10, 0.0) == (
        "Progress: 0/10 (0.0%) | RPS(avg): 0.00 | Gen tok/s: 0.00 | Total tok/s: 0.00 | Errors: 0 | ETA:   0.0s"
    )


def test_the_block() -> None:
    summary = summary_of(make_record(0), make_record(1, last_s=1.7, end_s=1.7))
    assert bench.summary_block(summary, 128).splitlines() == [
        "Requests (ok/err): 2/0  Concurrency: 128  Elapsed: 0.700s",
        "Req/s: 2.86",
        "Generated tokens/s: 14.29",
        "Total tokens/s (in+out): 42.86",
        "p50 latency: 600.0 ms",
        "p95 latency: 690.0 ms",
        "Avg latency: 600.0 ms",
    ]


def test_the_block_of_a_run_without_a_success() -> None:
    summary = summary_of(make_record(status="http_error", error_kind="timeout"))
    assert bench.summary_block(summary, 1).splitlines()[4:] == ["p50 latency: -", "p95 latency: -", "Avg latency: -"]


def test_the_configuration_stands_on_one_column_and_hides_the_key() -> None:
    config = make_config(api_key="sk-canary", extra_body={"guided": {"api_key": "canary"}})
    lines = bench.config_block(config).splitlines()
    assert lines[0] == "=== Benchmark Configuration ==="
    assert len({line.index(": ") for line in lines[1:]}) == 1
    assert "     api_key: ***" in lines[2]
    assert "canary" not in "\n".join(lines)
    names = {line.split(":")[0].strip() for line in lines[1:]}
    assert names == {field.name for field in dataclasses.fields(bench.Config)}


@pytest.mark.parametrize("key", ["vllm", "EMPTY"])
def test_a_placeholder_key_is_shown(key: str) -> None:
    assert f"api_key: {key}" in bench.config_block(make_config(api_key=key))


def test_few_samples_star_their_p99() -> None:
    few = "\n".join(bench.distribution_table(summary_of(make_record())))
    assert "500.00*" in few
    assert "fewer than 100 samples" in few
    many = "\n".join(bench.distribution_table(summary_of(*(make_record(n) for n in range(100)))))
    assert "*" not in many


def test_a_gap_is_called_itl_only_where_one_chunk_is_one_token() -> None:
    exact = bench.distribution_table(summary_of(*(make_record(n) for n in range(100))))
    assert any(line.startswith("ITL (ms)") for line in exact)
    merged = summary_of(*(make_record(n, completion_tokens=50) for n in range(100)))
    assert any(line.startswith("Chunk gap (ms)") for line in bench.distribution_table(merged))


def test_the_first_visible_token_has_a_line_only_after_reasoning() -> None:
    plain = "\n".join(bench.distribution_table(summary_of(make_record())))
    assert "visible" not in plain
    reasoning = "\n".join(bench.distribution_table(summary_of(make_record(visible_s=1.3))))
    assert "Time to first visible token (ms)" in reasoning


def test_details_say_that_the_client_was_no_bottleneck_or_that_it_was() -> None:
    summary = summary_of(*(make_record(n) for n in range(100)))
    calm = bench.detail_lines(summary, make_config(), [health()])
    assert any(line.startswith("Client: 1 process") and line.endswith("not the bottleneck") for line in calm)
    starved = bench.detail_lines(summary, make_config(), [health(cpu_s=9.9)])
    assert any(line.startswith("WARNING: client-bound") and "--processes" in line for line in starved)
    assert not any("not the bottleneck" in line for line in starved)


@pytest.mark.parametrize(
    ("transport", "told"),
    [
        ("stopwatch (uvloop)", "transport stopwatch (uvloop) (sdk (httpx): about 6 times its CPU); 0 connections"),
        ("sdk (httpx)", "transport sdk (httpx) (stopwatch: about 1/6 of its CPU)"),
    ],
)
def test_the_transport_is_named_and_what_the_other_would_have_cost(transport: str, told: str) -> None:
    summary = summary_of(*(make_record(n) for n in range(100)))
    assert told in bench.clock_line(summary, [health(transport=transport)])


def test_server_text_is_made_harmless() -> None:
    record = make_record(status="http_error", error_kind="http_500", error="\x1b]0;own\x07bad\x1b[2J\nline")
    lines = bench.detail_lines(summary_of(record), make_config(), [])
    assert all(char.isprintable() for line in lines for char in line)


def test_the_summary_is_strict_json_in_the_keys_of_both_families() -> None:
    summary = summary_of(*(make_record(n) for n in range(10)))
    told = bench.summary_json(summary, make_config(), [health()], {"request_rate": "inf"})
    again = json.loads(json.dumps(told, allow_nan=False))
    for key in (
        "model_id", "num_prompts", "max_concurrency", "completed", "failed", "duration", "total_input_tokens",
        "total_output_tokens", "request_throughput", "output_throughput", "total_token_throughput", "mean_ttft_ms",
        "median_ttft_ms", "std_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "p99_itl_ms", "mean_e2el_ms", "p99_e2el_ms",
        "total_throughput", "mean_e2e_latency_ms", "median_e2e_latency_ms", "p95_e2e_latency_ms", "concurrency",
    ):  # fmt: skip
        assert again[key] is not None, key
    assert again["median_ttft_ms"] == pytest.approx(100)


def test_the_summary_of_nothing_is_null_and_not_nan() -> None:
    told = bench.summary_json(summary_of(), make_config(), [], {})
    assert json.loads(json.dumps(told, allow_nan=False))["mean_ttft_ms"] is None
