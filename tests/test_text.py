"""Section 7, Text: what is printed, whole strings."""

from __future__ import annotations

import json
import unicodedata

import pytest

import online_bench_openai_async as bench
from tests.support.records import health, make_config, make_record, summary_of


def test_the_progress_line() -> None:
    tally = bench.Tally()
    for index in range(4):
        tally.add(make_record(index))
    tally.add(make_record(4, status="http_error", error_kind="timeout"))
    assert bench.progress_line(tally, bench.Goal(10), 2.0) == (
        "Progress: 5/10 (50.0%) | RPS(avg): 2.00 | Gen tok/s: 10.00 | Total tok/s: 30.00 | Errors: 1 | ETA:   2.0s"
    )


def test_the_progress_line_counts_tokens_as_they_arrive() -> None:
    tally = bench.Tally()
    tally.arriving_tokens = 50
    assert "Gen tok/s: 25.00 | Total tok/s: 25.00" in bench.progress_line(tally, bench.Goal(10), 2.0)


def test_the_progress_line_before_the_first_reply() -> None:
    assert bench.progress_line(bench.Tally(), bench.Goal(10), 0.0) == (
        "Progress: 0/10 (0.0%) | RPS(avg): 0.00 | Gen tok/s: 0.00 | Total tok/s: 0.00 | Errors: 0 | ETA: -"
    )


def test_with_a_duration_the_progress_line_counts_time() -> None:
    tally = bench.Tally()
    for index in range(3):
        tally.add(make_record(index))
    line = bench.progress_line(tally, bench.Goal(None, 30.0), 12.0)
    assert line.startswith("Progress: 3 in 12/30s (40.0%) | RPS(avg): 0.25 | ")
    assert line.endswith(" | Errors: 0 | ETA:  18.0s")
    assert "ETA:   0.0s" in bench.progress_line(tally, bench.Goal(None, 30.0), 31.0, 30)


@pytest.mark.parametrize("columns", [*range(24, 130), 1000])
def test_a_narrow_terminal_gets_a_shorter_form_that_keeps_errors_and_eta(columns: int) -> None:
    tally = bench.Tally()
    for index in range(100):
        tally.add(make_record(index, status="http_error", error_kind="timeout"))
    line = bench.progress_line(tally, bench.Goal(1000), 12.0, columns)
    assert len(line) <= columns
    assert "100 err" in line or "Errors: 100 " in line
    assert line.endswith("ETA: 108.0s")
    assert line.startswith("Progress: ") is (columns >= len(bench.progress_line(tally, bench.Goal(1000), 12.0)))


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


FOUNDING_DOCUMENT = """\
=== Benchmark Configuration ===
     api_base: http://127.0.0.1:8000/v1
      api_key: vllm
        model: qwen2.5-32b-instruct
   concurrency: 128
 total_requests: 1024
 prompt_tokens: 1024
 output_tokens: 1024"""


def test_the_configuration_of_a_plain_run_is_the_founding_documents() -> None:
    config = make_config(api_base="http://127.0.0.1:8000/v1", model="qwen2.5-32b-instruct")
    block = bench.config_block(config)
    assert block.startswith(FOUNDING_DOCUMENT + "\n")
    assert block[len(FOUNDING_DOCUMENT) :].split() == ["seed:", "1"]  # the one thing that no default gives


def test_what_differs_from_its_default_stands_below_and_no_secret() -> None:
    config = make_config(api_key="sk-canary", extra_body={"guided": {"api_key": "canary"}}, warmup=0, timeout=5.0)
    lines = bench.config_block(config).splitlines()
    assert lines[2] == "      api_key: ***"
    assert {line.split(":")[0].strip() for line in lines[8:]} == {"seed", "extra_body", "warmup", "timeout"}
    assert "canary" not in "\n".join(lines)


@pytest.mark.parametrize("key", ["vllm", "EMPTY"])
def test_a_placeholder_key_is_shown(key: str) -> None:
    assert f"api_key: {key}" in bench.config_block(make_config(api_key=key))


def test_few_samples_star_their_p99() -> None:
    few = "\n".join(bench.distribution_table(summary_of(make_record())))
    assert "500.00*" in few
    assert "* too few values: hardly more than their maximum (least n: p90 64, p95 130, p99 662)" in few
    assert "--total-requests 662 would" in few
    for n, starred in ((63, 3), (64, 2), (130, 1), (661, 1), (662, 0)):
        lines = bench.distribution_table(summary_of(*(make_record(number) for number in range(n))))
        assert next(line for line in lines if line.startswith("Latency")).count("*") == starred


def test_a_gap_is_called_itl_only_where_one_chunk_is_one_token() -> None:
    exact = bench.distribution_table(summary_of(*(make_record(n) for n in range(100))))
    assert any(line.startswith("ITL (ms)") for line in exact)
    merged = summary_of(*(make_record(n, completion_tokens=50) for n in range(100)))
    assert any(line.startswith("Chunk gap (ms)") for line in bench.distribution_table(merged))


def test_tail_connecting_and_queue_have_a_line_only_where_they_matter() -> None:
    def labels(**changes: float) -> set[str]:
        lines = bench.distribution_table(summary_of(*(make_record(n, **changes) for n in range(100))))
        return {line.split("  ")[0] for line in lines} & {"Tail (ms)", "Connect (ms)", "Client queue (ms)", "E2E (ms)"}

    assert labels(end_s=1.501) == set()
    assert labels(end_s=1.6) == {"Tail (ms)"}
    assert labels(end_s=1.501, free_s=0.9, connect_ns=100_000_000) == {"E2E (ms)", "Connect (ms)"}
    assert labels(end_s=1.501, free_s=0.9) == {"E2E (ms)", "Client queue (ms)"}


def test_shares_are_plain_numbers() -> None:
    summary = summary_of(*(make_record(n, merged_reads=5, late_gaps=n % 2) for n in range(100)))
    assert bench.clock_line(summary, [health()]).startswith("Clock: kernel 100 %, merged 100 %, read late 50 requests;")


def test_the_first_visible_token_has_a_line_only_after_reasoning() -> None:
    plain = "\n".join(bench.distribution_table(summary_of(make_record())))
    assert "visible" not in plain
    reasoning = "\n".join(bench.distribution_table(summary_of(make_record(visible_s=1.3))))
    assert "First visible token (ms)" in reasoning


def test_the_verdict_says_whose_the_figures_are() -> None:
    summary = summary_of(*(make_record(n) for n in range(100)))
    calm = bench.joined(bench.detail_blocks(summary, make_config(), [health()]))
    assert calm[0] == "WARNING: the server counted 10.0 prompt tokens on average, --prompt-tokens asked for 1024"
    assert "Verdict: this client was not the bottleneck (CPU 30 %, kernel clock 100 %)." in calm
    slow = summary_of(*(make_record(n, free_s=0.8) for n in range(100)))
    starved = bench.joined(bench.detail_blocks(slow, make_config(), [health(cpu_s=9.9)]))
    assert starved[0].startswith("WARNING: client-bound: it sent requests 200.0 ms after it could have (40 %")
    assert starved[2] == f"{'':9}Cure: {cure_of(starved)}"
    assert "Verdict: client-bound: the figures are the server's, the load was less than asked." in starved
    assert not any("not the bottleneck" in line for line in starved)


def cure_of(lines: list[str]) -> str:
    return next(line.partition("Cure: ")[2] for line in lines if "Cure: " in line)


def test_without_the_kernels_clock_the_verdict_says_so() -> None:
    summary = summary_of(*(make_record(n, kernel_reads=0) for n in range(100)))
    lines = bench.joined(
        bench.detail_blocks(summary, make_config(), [health(transport="sdk (httpx)", kernel_clock=False)])
    )
    assert not any("not the bottleneck" in line for line in lines)
    assert any(line.startswith("Verdict: this client kept up") and "not by the kernel" in line for line in lines)
    assert any(line == "Clock: kernel 0 %, merged 0 %; transport sdk (httpx)" for line in lines)


def test_the_report_is_ordered_warnings_verdict_table_circumstances() -> None:
    bad = make_record(100, status="http_error", error_kind="http_503", error="busy")
    cut = make_record(101, status="http_error", error_kind="aborted", error="stopped")
    summary = summary_of(*(make_record(n) for n in range(100)), bad, cut)
    notice = bench.ReportWarning("interrupted: 101 of 200 requests were made")
    lines = bench.joined(
        bench.detail_blocks(summary, make_config(), [health()], [notice], "Measurement error: p50 +0.01 ms")
    )
    starts = ["WARNING: interrupted", "WARNING: the server", "Measurement error", "Verdict", "Latency (ms)",
              "In flight", "Aborted: 1", "Finish reasons", "Clock", "Client",
              "Errors: 1 x http_error/http_503: busy"]  # fmt: skip
    places = [next(at for at, line in enumerate(lines) if line.startswith(start)) for start in starts]
    assert places == sorted(places)
    assert places[-1] == len(lines) - 1


def test_no_line_is_wider_than_100_columns() -> None:
    def columns(line: str) -> int:
        return len(line) + sum(unicodedata.east_asian_width(char) in "WF" for char in line)

    long = {"text": "word " * 100, "japanese": "\u6e2c\u5b9a" * 200, "path": "/deep" * 50}
    slow = {"last_s": 4e5, "end_s": 4e5, "visible_s": 3.0, "gaps_ms": (3e8, 1.0)}
    records = [make_record(n, **slow, finish_reason=f"reason {n} {'x' * 30}") for n in range(50)]
    records += [
        make_record(n, status="http_error", error_kind=kind, error=text) for n, (kind, text) in enumerate(long.items())
    ]
    config = make_config(extra_body=long, system_prompt=long["japanese"], model="m" * 200, requests_file=long["path"])
    summary = summary_of(*records)
    notice = bench.ReportWarning(long["text"], long["japanese"])
    lines = bench.joined(bench.detail_blocks(summary, config, [health()] * 9, [notice], long["text"]))
    lines += bench.summary_block(summary, 999_999).splitlines() + bench.config_block(config).splitlines()
    assert max(map(columns, lines)) <= 100
    assert " ".join(lines).count("word") >= 80 + 100 + 60  # wrapped, not cut: the notice, the truth, the error
    assert "..." in bench.config_block(config)


def test_the_rarest_kinds_of_errors_are_counted_only() -> None:
    records = [make_record(n, status="http_error", error_kind=f"http_{500 + n}", error="x") for n in range(9)]
    lines = bench.circumstances(summary_of(*records), make_config(), [])
    assert len([line for line in lines if " x http_error/" in line]) == 5
    assert lines[-1] == "Errors: 4 rarer kinds besides"


# --- secrets ---


def test_the_redactor_knows_every_secret_of_a_run() -> None:
    config = make_config(
        api_base="https://me:p%40ssword@host/v1?api-version=2&api-key=query%2Fsecret",
        api_key="sk-0123456789",
        extra_body={"deep": [{"auth": {"value": "body-secret"}}], "stop": "word"},
    )
    environ = {"OPENAI_CUSTOM_HEADERS": "X-Token: Bearer head-secret\nX-Plain: seen", "https_proxy": "u:prox1@p:1"}
    redactor = bench.Redactor.of(config, environ)
    secrets = ("sk-0123456789", "me:p%40ssword", "p@ssword", "query/secret", "query%2Fsecret", "body-secret",
               "head-secret", "prox1", "bWU6cEBzc3dvcmQ=")  # fmt: skip
    for secret in secrets:
        assert redactor.text(f"a {secret} b") == "a *** b", secret
        assert secret[:-1] not in redactor.text(f"cut off {secret[:-1]}"), secret
    assert redactor.text("a word seen by me") == "a word seen by me"
    argv = [
        "--api-key",
        "sk-0123456789",
        "--api-key=x",
        "--extra-body",
        '{"api_key": "y"}',
        config.api_base,
        "head-secret",
    ]
    assert redactor.argv(argv) == ["--api-key", "***", "--api-key=***", "--extra-body", '{"api_key": "***"}',
                                   "https://***@host/v1?api-version=2&api-key=***", "***"]  # fmt: skip
    told = redactor.config(config)
    assert (told["api_key"], told["api_base"]) == ("***", "https://***@host/v1?api-version=2&api-key=***")
    assert told["extra_body"] == {"deep": [{"auth": {"value": "***"}}], "stop": "word"}


def test_server_text_is_made_harmless() -> None:
    record = make_record(status="http_error", error_kind="http_500", error="\x1b]0;own\x07bad\x1b[2J\nline")
    lines = bench.joined(bench.detail_blocks(summary_of(record), make_config(), []))
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


def test_the_summary_of_nothing_leaves_out_and_is_not_nan() -> None:
    told = bench.summary_json(summary_of(), make_config(), [], {})
    assert "mean_ttft_ms" not in json.loads(json.dumps(told, allow_nan=False))
