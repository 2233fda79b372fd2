"""Section 6, Metrics: the numbers, against brute force and the standard library."""

from __future__ import annotations

import dataclasses
import doctest
import math
import random
import statistics
import tracemalloc
from array import array
from typing import Any

import pytest

import online_bench_openai_async as bench
from tests.support.records import closed_loop, health, make_config, make_record, summary_of


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(bench).failed == 0


@pytest.mark.parametrize("n", [2, 3, 10, 101, 1000])
def test_percentiles_are_the_inclusive_quantiles_of_the_standard_library(n: int) -> None:
    rng = random.Random(n)
    sample = sorted(rng.expovariate(1) for _ in range(n))
    cuts = statistics.quantiles(sample, n=100, method="inclusive")
    for rank in (1, 50, 90, 95, 99):
        assert bench.percentile(sample, rank) == pytest.approx(cuts[rank - 1])


def test_describe_agrees_with_the_standard_library() -> None:
    rng = random.Random(0)
    sample = [rng.gauss(100, 15) for _ in range(500)]
    told = bench.describe(sample)
    assert told.n == 500
    assert told.mean == pytest.approx(statistics.fmean(sample))
    assert told.std == pytest.approx(statistics.pstdev(sample))
    assert told.max == max(sample)


def test_a_run_counts_from_its_first_send_to_its_last_completion() -> None:
    summary = summary_of(make_record(0), make_record(1, sent_s=2.0, first_s=2.1, last_s=3.0, end_s=3.2))
    assert summary.elapsed_s == pytest.approx(2.0)
    assert summary.requests_per_s == pytest.approx(1.0)
    assert summary.generated_per_s == pytest.approx(5.0)
    assert summary.total_per_s == pytest.approx(15.0)


def test_failures_enter_no_latency_and_no_throughput() -> None:
    failed = make_record(1, status="http_error", error_kind="timeout", error="late", completion_tokens=99)
    summary = summary_of(make_record(0), failed)
    assert (summary.ok, summary.errors) == (1, 1)
    assert summary.distributions["latency"].n == 1
    assert summary.completion_tokens == 5
    assert summary.error_groups == [bench.ErrorGroup("http_error", "timeout", 1, "late")]


def test_nothing_measured_is_none_and_never_zero() -> None:
    summary = summary_of()
    for name in ("latency", "ttft", "tpot"):
        assert summary.distributions[name] == bench.Distribution(0)
    assert summary.requests_per_s == 0


def test_the_most_frequent_error_leads_with_its_first_message() -> None:
    records = [make_record(n, status="http_error", error_kind="http_503", error=f"busy {n}") for n in range(3)]
    records.append(make_record(9, status="decode_error", error_kind="truncated", error="cut"))
    groups = summary_of(*records).error_groups
    assert [(group.kind, group.count, group.first_message) for group in groups] == [
        ("http_503", 3, "busy 0"),
        ("truncated", 1, "cut"),
    ]


def test_chunk_gaps_are_pooled_over_all_replies() -> None:
    summary = summary_of(make_record(0), make_record(1, gaps_ms=(10.0, 20.0)))
    assert summary.distributions["gap"].n == 6
    assert summary.distributions["gap"].mean == pytest.approx(430 / 6)


def test_a_chunk_is_a_token_only_where_the_counts_agree() -> None:
    many = [make_record(n, completion_tokens=200, chunks=200, gaps_ms=[1.0] * 199) for n in range(5)]
    assert bench.gaps_are_of_tokens(summary_of(*many))
    merged = [make_record(n, completion_tokens=200, chunks=120, gaps_ms=[1.0] * 119) for n in range(5)]
    assert not bench.gaps_are_of_tokens(summary_of(*merged))
    unknown = [make_record(n, has_usage=False) for n in range(5)]
    assert not bench.gaps_are_of_tokens(summary_of(*unknown))


def test_replies_without_usage_are_counted_and_said() -> None:
    summary = summary_of(make_record(0, has_usage=False, prompt_tokens=None, completion_tokens=None))
    assert summary.without_usage == 1
    assert summary.completion_tokens == 0
    assert any("no usage" in warning.text for warning in bench.warnings_of(summary, make_config(), []))


NO_CLOCK: dict[str, Any] = {"kernel_clock": False, "transport": "sdk (httpx)"}


@pytest.mark.parametrize(
    ("client", "reply", "figures", "load"),
    [
        ({}, {}, False, False),
        # Evidence alone proves nothing: with the kernel's clock a busy or waiting client has true figures.
        ({"cpu_s": 9.5}, {}, False, False),
        ({"waiting_s": 5.0}, {}, False, False),
        ({"lag_p99_ms": 12.0, "lag_max_ms": 2000.0}, {}, False, False),
        ({"lag_p99_ms": 12.0, **NO_CLOCK}, {"kernel_reads": 0}, True, False),
        ({"lag_max_ms": 2000.0, "held_up_s": 2.0, **NO_CLOCK}, {"kernel_reads": 0}, True, False),
        ({"lag_p99_ms": 12.0}, {"kernel_reads": 0}, True, False),  # the kernel gave no stamps
        ({}, {"late_gaps": 2, "first_s": None}, True, False),
        ({}, {"late_gaps": 1}, True, False),
        ({}, {"late_gaps": 1, "merged_reads": 4}, False, False),  # most chunks come together anyway
        ({}, {"merged_reads": 5, "with_first": 1}, False, False),  # not this client's doing
        ({}, {"free_s": 0.8}, False, True),  # 200 ms before each send of 500 ms
        ({}, {"free_s": 0.8, "connect_ns": 199_000_000}, False, False),  # the server was slow to accept
        ({}, {"free_s": 0.8, "sent_s": 1.19, "ready_s": 0.801}, False, False),  # and slow to read
        ({}, {"free_s": 0.5, "due_s": 0.999}, False, False),  # it was due no earlier
    ],
)
def test_the_verdict_judges_by_effect_in_two_halves(
    client: dict[str, Any], reply: dict[str, Any], figures: bool, load: bool
) -> None:
    summary, fared = summary_of(*(make_record(n, **reply) for n in range(10))), [health(**client)]
    assert bool(bench.client_doubts(summary, fared, "figures")) is figures
    assert bool(bench.client_doubts(summary, fared, "load")) is load
    assert (bench.client_bound(summary, fared) is not None) is (figures or load)
    assert bench.verdict_line(summary, fared).startswith("Verdict: client-bound") is (figures or load)


@pytest.mark.parametrize(("pause_ms", "doubted"), [(1.9, False), (30.0, True)])
def test_first_tokens_left_out_count_where_the_pause_could_have_moved_them(pause_ms: float, doubted: bool) -> None:
    """A tenth of the first tokens, of 100 ms, came late with one gap: 1 in 40."""
    records = [make_record(n, **({"late_gaps": 1, "first_s": None} if n % 10 == 0 else {})) for n in range(40)]
    assert bool(bench.client_doubts(summary_of(*records), [health(lag_max_ms=pause_ms)], "figures")) is doubted


def test_failures_do_not_bind_the_client() -> None:
    bad = [make_record(n, free_s=0.0, status="http_error", error_kind="timeout") for n in range(10)]
    assert bench.client_bound(summary_of(*bad, *(make_record(n) for n in range(10, 20))), [health()]) is None


@pytest.mark.parametrize(
    ("client", "cure"),
    [
        ({"waiting_s": 5.0}, "a core of its own for this client"),
        ({"cpu_s": 9.9, "transport": "stopwatch (asyncio)"}, "pip install httptools uvloop"),
        ({"cpu_s": 9.9}, "--processes 2"),
        ({"lag_max_ms": 2000.0}, "let nothing stop this client"),
        ({}, "a machine with more free cores"),
    ],
)
def test_the_cure_fits_the_cause(client: dict[str, Any], cure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    slow = summary_of(*(make_record(n, free_s=0.8) for n in range(10)))
    first = bench.warnings_of(slow, make_config(prompt_tokens=10, output_tokens=5), [health(**client)])[0]
    assert first.text.startswith("client-bound: it sent requests 200.0 ms after")
    assert first.cure.startswith(cure)


def warned(summary: bench.Summary, **options: Any) -> str:
    config = make_config(**{"prompt_tokens": 10, "output_tokens": 5, **options})
    return "\n".join(f"{w.text} / {w.cure}" for w in bench.warnings_of(summary, config, [health()]))


def test_merged_reads_name_every_figure_that_they_bend() -> None:
    gaps = summary_of(*(make_record(n, merged_reads=2) for n in range(20)))
    assert bench.merged_figures(gaps) == ["the chunk gaps"]
    assert "read TPOT" in warned(gaps)
    assert not bench.gaps_are_of_tokens(gaps)
    first = summary_of(*(make_record(n, merged_reads=5, with_first=1) for n in range(20)))
    assert bench.merged_figures(first) == ["TTFT", "TPOT", "the chunk gaps"]
    said = warned(first)
    assert "100.0 % of the first tokens came with later ones: TTFT, TPOT, the chunk gaps are" in said
    assert "http-no-delay" in said
    assert "proxy_buffering off" in said
    assert "read TPOT" not in said
    assert "TTFT, TPOT, the chunk gaps" in bench.verdict_line(first, [health()])


def test_a_few_first_tokens_with_one_more_chunk_bend_nothing() -> None:
    """TTFT 100 ms, TPOT 6.3 ms: a tenth of the TTFTs late by as much is below 1 %. Twenty chunks each are not."""
    for chunks, bent in ((1, []), (20, ["TTFT"]), (40, ["TTFT", "TPOT"])):
        records = [make_record(n, completion_tokens=64, with_first=chunks * (n % 10 == 0)) for n in range(40)]
        assert bench.merged_figures(summary_of(*records)) == bent


def test_a_reply_that_came_all_at_once_has_no_tpot_and_that_is_said() -> None:
    record = make_record(last_s=1.1, completion_tokens=50, chunks=1, gaps_ms=())
    assert record.tpot_ms is None
    assert "1 replies of several tokens came all at once: they have no TPOT" in warned(summary_of(record))


def test_a_full_listen_queue_is_named_and_no_process_is_advised() -> None:
    summary = summary_of(*(make_record(n, syn_resent=1, connect_ns=10**9, free_s=0.0) for n in range(5)))
    said = warned(summary)
    assert "repeated 5 times" in said
    assert "listen queue" in said
    assert "--processes" not in said
    assert bench.client_bound(summary, [health()]) is None


@pytest.mark.parametrize(("counted", "warns"), [(1000, False), (1030, True), (980, True)])
def test_the_corpus_own_count_is_compared_with_the_servers(counted: int, warns: bool) -> None:
    tally = bench.Tally([990, 0, 1010, 0])
    for index in range(6):
        tally.add(make_record(index, prompt_tokens=counted))
    said = warned(tally.summary(), requests_file="c.jsonl")
    assert ("the corpus says 6000" in said) is warns
    assert (f"server counted {6 * counted}" in said) is warns


@pytest.mark.parametrize(
    ("cached", "said"),
    [(None, "these prompts share 90 %"), (0, ""), (9, ""), (10, "100.0 % of the prompt tokens")],  # 9 are shared
)
def test_a_cache_that_the_server_does_not_tell_is_inferred_from_the_corpus(cached: Any, said: str) -> None:
    tally = bench.Tally([10, 9])
    tally.add(make_record(cached_tokens=cached))
    assert warned(tally.summary(), requests_file="c.jsonl").startswith(said)


def test_a_cached_chat_template_is_no_repeated_prompt() -> None:
    summary = summary_of(make_record(prompt_tokens=100, cached_tokens=20))
    assert "prefix cache" not in warned(summary, prompt_calibration=[1.1, 20.0])
    assert "10.0 % of the prompt tokens" in warned(summary, prompt_calibration=[1.1, 10.0])


def test_what_the_stop_cut_off_is_neither_completed_nor_failed() -> None:
    cut = make_record(1, status="http_error", error_kind="aborted", end_s=9.0, last_s=None)
    summary = summary_of(make_record(0), cut)
    assert (summary.ok, summary.errors, summary.aborted) == (1, 0, 1)
    assert summary.error_groups == []
    assert summary.elapsed_s == pytest.approx(0.5)  # nor does it lengthen the run


def test_what_grace_cut_off_is_said_and_holds_no_limit() -> None:
    cut = [make_record(n, status="http_error", error_kind="aborted", end_s=9.0, last_s=None) for n in (1, 2)]
    summary = summary_of(make_record(0), *cut)
    assert "2 of 3 requests were cut off or not sent at the end" in warned(summary, grace=1.0)
    assert "cut off" not in warned(summary)
    limits = bench.limits_of(make_config(slo=["p99_latency_ms<9999"], grace=1.0))
    judged = [bench.judge(limit, summary, make_config(), []) for limit in limits]
    assert [one.holds for one in judged] == [True, True, False]


def test_turns_of_a_session_are_not_held_back_by_the_concurrency() -> None:
    late = make_record(0, due_s=0.1, free_s=0.5)
    turn = dataclasses.replace(late, reply=dataclasses.replace(late.reply, turn=2))
    assert (summary_of(late).held_back, summary_of(turn).held_back) == (1, 0)


def test_a_wait_for_the_end_of_a_step_is_no_queue() -> None:
    told = {"server_mean_e2el_ms": 30.0, "server_mean_itl_ms": 4.0}
    for waited, said in ((2.5, False), (4.5, True)):
        summary = dataclasses.replace(summary_of(make_record()), server={**told, "server_mean_queue_ms": waited})
        assert ("the server queues" in warned(summary)) is said


def test_littles_law_checks_the_count_and_says_why_it_fails() -> None:
    summary = summary_of(*(make_record(n) for n in range(10)))  # 10 x 0.6 s
    sound = {"in_flight_s": 6.0, "flight_window_s": 2.0, "peak_in_flight": 4}
    assert bench.in_flight_line(summary, [health(**sound)]) == "In flight: mean 3.0, peak 4"
    unread = bench.in_flight_line(summary, [health(**{**sound, "in_flight_s": 7.0, "unread_s": 0.9})])
    assert unread == (
        "In flight: mean 3.5, peak 4; throughput x time in the server gives 3.0: arrived replies waited to be read here"
    )
    assert "connections ended" in bench.in_flight_line(summary, [health(**{**sound, "in_flight_s": 7.0})])
    assert "died" in bench.in_flight_line(summary, [health(**{**sound, "in_flight_s": 3.0})])


def test_short_replies_and_long_prompts_are_pointed_out_with_their_cure() -> None:
    config = make_config(output_tokens=50, prompt_tokens=20)
    found = bench.warnings_of(summary_of(make_record()), config, [])
    assert [warning.text.split(",")[0] for warning in found] == [
        "the server counted 10.0 prompt tokens on average",
        "replies of 5.0 tokens on average",
    ]
    assert "warm-up" in found[0].cure
    assert "ignore_eos" in found[1].cure


def test_prompts_below_the_template_are_told_the_least() -> None:
    config = make_config(prompt_tokens=20, prompt_calibration=[1.1, 31.5])
    found = bench.warnings_of(summary_of(make_record(prompt_tokens=32)), config, [])
    assert found[0].cure.startswith("--prompt-tokens 32 or more")
    assert not bench.warnings_of(summary_of(make_record(prompt_tokens=21)), config, [])[0].text.startswith("the server")


def test_every_warning_says_what_to_do() -> None:
    """All rules at once: a bad run, and each line of it with a cure."""
    bad = make_record(
        has_usage=False, cached_tokens=50, merged_reads=3, reconnects=1, free_s=0.5, syn_resent=1, due_s=0.1
    )
    at_once = make_record(1, last_s=1.1)
    dead = make_record(2, status="http_error", error_kind="connect_refused", error="refused", server="http://b")
    cut = make_record(3, status="http_error", error_kind="aborted", end_s=9.0, last_s=None)
    tally = bench.Tally([5, 0])
    for record in (bad, at_once, dead, cut):
        tally.add(record)
    tally.server = {"server_mean_queue_ms": 60.0, "server_mean_e2el_ms": 100.0, "server_preemptions": 1}
    config = make_config(output_tokens=50, prompt_tokens=20, grace=1.0)
    drifting = summary_of(*closed_loop([1.0 + n / 50 for n in range(100)], 4), wave=4).steady
    summary = dataclasses.replace(tally.summary(), steady=drifting)
    found = bench.warnings_of(summary, config, [health()])
    sound = dataclasses.replace(summary_of(make_record()), server={"server_generated_tokens": 9})  # needs all counted
    found += [warning for warning in bench.warnings_of(sound, config, []) if "somebody else" in warning.text]
    assert len(found) == len(bench.WARNINGS)
    assert all(warning.cure for warning in found)


def sample_of(values: list[float], most: int) -> bench.Sample:
    sample = bench.Sample(most)
    for at in range(0, len(values), 100):
        sample.extend(array("f", values[at : at + 100]))
    sample.extend(())  # a request without this metric
    return sample


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e7])
def test_beyond_the_values_kept_percentiles_are_within_their_error(scale: float) -> None:
    rng = random.Random(1)
    values = list(array("f", [scale * rng.lognormvariate(0, 2) for _ in range(50_000)]))
    exact, told = bench.describe(values), sample_of(values, 1_000).describe()
    assert told.n == exact.n
    assert told.max == exact.max
    assert told.mean == pytest.approx(exact.mean, rel=1e-9)
    assert told.std == pytest.approx(exact.std, rel=1e-6)
    for rank, value in exact.percentiles.items():
        assert told.percentiles[rank] == pytest.approx(value, rel=1.001 * bench.BUCKET_ERROR)


def test_zeros_and_equal_values_survive_the_buckets() -> None:
    told = sample_of([0.0] * 600 + [20.0] * 400, 200).describe()
    assert told.percentiles[50.0] < 1e-5
    assert told.percentiles[95.0] == pytest.approx(20.0, rel=bench.BUCKET_ERROR)
    assert told.std == pytest.approx(bench.describe([0.0] * 600 + [20.0] * 400).std)
    assert sample_of([7.0] * 1000, 200).describe().std == pytest.approx(0.0, abs=1e-9)


def test_up_to_the_values_kept_everything_is_exact() -> None:
    values = [float(n % 97) for n in range(5_000)]
    assert sample_of(values, 5_000).describe() == bench.describe(values)


def test_memory_ends_with_the_values_kept() -> None:
    """Ten times as many gaps, no more memory; the report says that percentiles are of a histogram then."""
    rng = random.Random(2)
    sample, gaps = bench.Sample(10_000), array("f", [rng.uniform(1, 50) for _ in range(10_000)])
    tracemalloc.start()
    try:
        sizes = []
        for _ in range(11):
            sample.extend(gaps)
            sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert sizes[-1] - sizes[1] < 20_000
    assert sample.describe().n == 110_000


def test_a_report_of_a_histogram_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    summary = summary_of(*(make_record(n) for n in range(3)))
    assert not any("histogram" in line for line in bench.distribution_table(summary))
    monkeypatch.setattr(bench, "EXACT_SAMPLES", 10)
    assert "n above 10: percentiles from a histogram, within 0.1% of the value" in bench.distribution_table(summary)


def test_a_request_costs_at_most_100_bytes_of_the_tally() -> None:
    tally, record = bench.Tally(), make_record(gaps_ms=(), due_s=0.5, label="chat", server="a")
    tracemalloc.start()  # arrays that grow count as a whole
    try:
        for _ in range(6_000):
            tally.add(record)
        grown = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert grown < 100 * 6_000


# --- confidence, the steady window, judging ---


def test_the_least_samples_are_where_the_second_largest_bounds_the_percentile() -> None:
    for rank, told in bench.LEAST_SAMPLES.items():
        share = rank / 100
        misses = [n for n in range(2, 8_000) if share**n + n * share ** (n - 1) * (1 - share) > 0.01]
        assert max(misses) + 1 == told


@pytest.mark.parametrize(("rank", "n"), [(95.0, 400), (50.0, 100)])
def test_a_95_percent_interval_holds_the_truth_in_95_percent_of_the_runs(rank: float, n: int) -> None:
    """Of 400 runs of a known law."""
    rng = random.Random(3)
    truth = -math.log(1 - rank / 100)
    intervals = [bench.describe(rng.expovariate(1) for _ in range(n)).intervals[rank] for _ in range(400)]
    assert 0.92 <= sum(low <= truth <= high for low, high in intervals) / 400 <= 0.98


def test_the_places_of_an_interval_are_the_binomials() -> None:
    for n, share in ((10, 0.5), (130, 0.95), (700, 0.99), (20_000, 0.9)):
        low, high = bench.interval_places(n, share)
        weights = [math.exp(log_binomial(n, share, k)) for k in range(n + 1)]
        assert sum(weights[:low]) <= bench.INTERVAL_TAIL < sum(weights[: low + 1])
        assert sum(weights[high:]) <= bench.INTERVAL_TAIL < sum(weights[high - 1 :])


def log_binomial(n: int, share: float, k: int) -> float:
    ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return ways + k * math.log(share) + (n - k) * math.log(1 - share)


def test_too_few_values_have_no_upper_end() -> None:
    assert bench.describe(range(367)).intervals[99.0][1] == math.inf
    assert bench.describe(range(368)).intervals[99.0][1] == 367


SLOW_START = [3.0] * 8 + [1.0] * 72


def test_the_steady_window_leaves_the_opening_burst_out() -> None:
    summary = summary_of(*closed_loop(SLOW_START, 8), wave=8)
    steady = summary.steady
    assert steady is not None
    assert (steady.start_s, steady.end_s) == pytest.approx((3.0, 11.0))
    assert steady.sent == 72
    assert steady.rates[0] == pytest.approx(8.0)  # eight slots of a second, though the whole run has fewer
    assert summary.requests_per_s == pytest.approx(80 / 12)
    assert steady.distributions["latency"].max == pytest.approx(1000)
    assert steady.opening["latency"].percentiles[50.0] == pytest.approx(3000)
    assert summary.distributions["latency"].percentiles[99.0] == pytest.approx(3000)
    assert steady.distributions["ttft"].percentiles[99.0] == pytest.approx(200)
    assert "gap" not in steady.distributions
    told = "\n".join(bench.steady_lines(summary))
    assert "Opening: of the 8 requests before, the median TTFT was 600.0 ms; in steady state it was 200.0 ms" in told


@pytest.mark.parametrize("requests", [8, 16, 23])
def test_a_short_run_has_no_steady_state_and_says_so(requests: int) -> None:
    summary = summary_of(*closed_loop([1.0] * requests, 8), wave=8)
    assert summary.steady is None
    assert "no steady state" in bench.steady_lines(summary)[0]
    assert summary_of(*closed_loop([1.0] * 24, 8), wave=8).steady is not None


def test_the_steady_figures_are_those_of_the_rows_sent_in_the_window() -> None:
    """Against brute force, with failures, replies without a first token, and what was cut off."""
    rng = random.Random(5)
    records = closed_loop([rng.uniform(0.5, 2.0) for _ in range(200)], 10)
    fates: list[dict[str, Any]] = [{"status": "http_error", "error_kind": "cut"}, {"first_s": None}, {}, {}, {}, {}]
    records = [make_record(r.job.index, **{**stamps_of(r), **rng.choice(fates)}) for r in records]
    steady = summary_of(*records, wave=10).steady
    assert steady is not None
    good = [record for record in records if record.ok]
    done = sorted(record.done_s or 0 for record in good)
    start, end = done[9], max(record.sent_s or 0 for record in records)
    assert (steady.start_s, steady.end_s) == pytest.approx((start, end))
    inside = [record for record in records if start <= (record.sent_s or 0) <= end]
    assert steady.sent == len(inside)
    assert steady.ok == sum(start < (record.done_s or 0) <= end for record in good)
    for key, metric in bench.METRIC.items():
        if not metric.pooled:
            assert close(steady.distributions[key], bench.describe(v for r in inside for v in metric.read(r))), key


def stamps_of(record: bench.Record) -> dict[str, Any]:
    names = ("free", "ready", "sent", "first", "visible", "last", "end")
    values = {f"{name}_s": getattr(record.reply, f"{name}_ns") for name in names}
    return {name: None if value is None else value / 1e9 for name, value in values.items()}


def close(one: bench.Distribution, other: bench.Distribution) -> bool:
    """Within the precision of the values kept."""
    if one.n != other.n or not one.n:
        return one.n == other.n
    near = all(one.percentiles[rank] == pytest.approx(value, rel=1e-6) for rank, value in other.percentiles.items())
    return near and one.mean == pytest.approx(other.mean, rel=1e-6)


@pytest.mark.parametrize(
    ("latencies", "drifts"),
    [
        ([1.0] * 200, set()),
        ([1.0 + n / 400 for n in range(200)], {"latency", "tpot"}),
        ([1.0 + n / 4000 for n in range(200)], set()),  # by 5 %
        ([(1.0, 9.0)[n * 7919 % 13 == 0] for n in range(200)], set()),  # by chance
    ],
)
def test_a_trend_in_the_steady_window_is_said(latencies: list[float], drifts: set[str]) -> None:
    summary = summary_of(*closed_loop(latencies, 5), wave=5)
    assert summary.steady is not None
    assert set(summary.steady.drifts) == drifts
    assert ("the means moved" in warned(summary)) is bool(drifts)


def test_goodput_counts_what_keeps_every_limit_to_the_microsecond() -> None:
    records = [
        make_record(0),  # TTFT 100, TPOT 100, latency 500
        make_record(1, first_s=1.1000004),  # 100 in the CSV as well
        make_record(2, first_s=1.101),
        make_record(3, last_s=1.6),
        make_record(4, completion_tokens=1, first_s=1.05),  # no TPOT that could exceed it
        make_record(5, first_s=None),  # its TTFT is not known
        make_record(6, status="http_error", error_kind="cut"),
    ]
    summary = summary_of(*records, goodput={"ttft": 100.0, "tpot": 100.0, "latency": 500.0})
    assert summary.good == {"ttft": 4, "tpot": 4, "latency": 5, "all": 3}
    told = {name: bench.figure_of(name, summary, make_config(), []) for name in bench.FIGURES if "goodput" in name}
    assert told["request_goodput"] == pytest.approx(3 / summary.elapsed_s)
    assert told["goodput_share"] == pytest.approx(3 / 7)
    assert told["goodput_share_ttft"] == pytest.approx(4 / 7)


def test_a_figure_has_one_value_under_each_of_its_names() -> None:
    summary = summary_of(*closed_loop(SLOW_START, 8), wave=8)
    for name, value in (("p95", 3000), ("median", 1000), ("steady_p99", 1000), ("max", 3000)):
        for stem in ("latency_ms", "e2el_ms", "e2e_latency_ms"):
            figure = bench.figure_of(f"{name}_{stem}", summary, make_config(), [])
            assert figure == pytest.approx(value, rel=0.01)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("p95_latncy_ms<5", "nearest: p95_latency_ms"),
        ("output_throughputs>5", "nearest: output_throughput"),
        ("xyzzy<1", "knows no figure 'xyzzy'"),
        ("p99_ttft_ms", "as in p99_ttft_ms<500"),
        ("p99_ttft_ms<fast", "as in p99_ttft_ms<500"),
        ("p99_ttft_ms=5", "as in p99_ttft_ms<500"),
    ],
)
def test_an_unknown_figure_names_its_nearest(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        bench.Limit.of(text)


@pytest.mark.parametrize(
    ("bound", "n", "holds", "sure"),
    [(500, 400, True, True), (120, 400, False, True), (499, 200, True, False), (396, 400, False, False)],
)
def test_a_verdict_is_sure_where_its_whole_interval_is(bound: float, n: int, holds: bool, sure: bool) -> None:
    summary = summary_of(*(make_record(number, last_s=1.1 + 0.3 * number / n) for number in range(n)))
    judged = bench.judge(bench.Limit.of(f"p99_latency_ms<{bound}"), summary, make_config(), [])
    assert (judged.holds, judged.sure) == (holds, sure)
    assert (judged.needed or 0) > 1 or sure


def test_gpus_share_the_throughput_and_bear_the_price() -> None:
    summary = summary_of(*(make_record(n) for n in range(3)))  # 30 tokens/s out, 60 in
    config = make_config(gpus=2, gpu_hour=3.6)
    told = [bench.figure_of(name, summary, config, []) for name in bench.FIGURES if "gpu" in name or "price" in name]
    assert told == [pytest.approx(value) for value in (15.0, 45.0, 2e-3 / 60 * 1e6, 2e-3 / 30 * 1e6)]
