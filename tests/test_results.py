"""Result files as strict readers need them, whole and streamed, and docs/results.md, which explains every key."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import online_bench_openai_async as bench
from tests.support.demo import Demo
from tests.support.program import ROOT, cli
from tests.support.records import make_config, make_record, summary_of
from tests.support.tables import json_lines

STEMS = {stem for metric in bench.METRICS for stem in metric.stems}
STREAMED = {"ttft_ms", "ttfv_ms", "tpot_ms", "itl_ms", "tail_ms"}
ALWAYS = {"e2el_ms", "e2e_latency_ms", "latency_ms", "e2e_ms", "client_queue_time_ms"}
ALWAYS |= {"tokens_per_s_per_user", "output_tokens", "prompt_tokens"}
STATISTICS = ("mean", "median", "std", "max", "p50", "p90", "p95", "p99", "p99.9")
SCHEDULED = {"response_ms", "late_send_ms"}
OPTIONS: Mapping[str, Sequence[str]] = {
    "whole": (),
    "streamed": ("--stream", "--save-detailed", "--metadata", "gpu_type=H100"),
    "rate": ("--request-rate", "200", "--goodput", "e2el:500", "--gpus", "2", "--gpu-hour", "2.5"),
}
SMALL = ("--concurrency", "2", "--total-requests", "8", "--output-tokens", "5")


@pytest.fixture(scope="module")
def server() -> Iterator[Demo]:
    started = Demo(ttft_ms=20, gap_ms=10)  # so that a busy machine still reads its chunks one by one
    yield started
    started.stop()


@pytest.fixture(scope="module")
def results(server: Demo, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Results of whole replies, of streams with details, and of a rate, from files of their own."""
    folder = tmp_path_factory.mktemp("results")
    found = {}
    for name, options in OPTIONS.items():
        path = folder / f"{name}.json"
        done = cli(*server.target, *SMALL, *options, "--summary-json", path)
        assert done.code == 0, done.err
        found[name] = json.loads(path.read_text(encoding="utf-8"))
    return found


def distributions(result: Mapping[str, Any]) -> set[str]:
    """The stems of which a result has figures, after a look that it has all of each."""
    stems = {stem for stem in STEMS if f"mean_{stem}" in result}
    for stem in stems:
        assert all(f"{name}_{stem}" in result for name in STATISTICS), stem
        assert isinstance(result[re.sub("_ms$", "", stem) + "_count"], int)
    return stems


def nulls(value: Any, path: str = "") -> list[str]:
    if isinstance(value, dict):
        return [found for key, item in value.items() for found in nulls(item, f"{path}/{key}")]
    if isinstance(value, list):
        return [found for item in value for found in nulls(item, path)]
    return [path] if value is None else []


def check(result: Mapping[str, Any]) -> None:
    """What every reader takes for granted."""
    assert not nulls(result)
    for key, value in result.items():
        if key.endswith("_ms"):
            assert math.isfinite(float(value)), key
        if "tpot" in key:
            assert 1000 / value > 0, key
    assert type(result["completed"]) is type(result["failed"]) is int
    assert result["completed"] + result["failed"] == result["num_prompts"]
    times = result["benchmark_end_time_unix"] - result["benchmark_start_time_unix"]
    assert times == pytest.approx(result["duration"], abs=1e-3)
    assert re.fullmatch(r"\d{8}-\d{6}", result["date"])


def test_what_a_configuration_cannot_measure_is_left_out(results: dict[str, dict[str, Any]]) -> None:
    for name, stems in (("whole", ALWAYS), ("streamed", ALWAYS | STREAMED), ("rate", ALWAYS | SCHEDULED)):
        check(results[name])
        assert distributions(results[name]) == stems
    assert results["streamed"]["gpu_type"] == "H100"


@pytest.mark.parametrize("count", [0, 1])
def test_of_nothing_and_of_one_no_reader_stumbles(count: int) -> None:
    told = bench.summary_json(summary_of(*(make_record(n) for n in range(count))), make_config(), [], {})
    assert not nulls(told)
    assert "std_tpot_ms" not in told
    assert any(key.endswith("_ms") for key in told) is bool(count)


def test_what_was_cut_off_or_never_sent_is_neither_completed_nor_failed() -> None:
    cut = {"status": "http_error", "error_kind": "aborted", "error": "x"}
    records = [make_record(0), make_record(1, status="http_error", error_kind="http_500"), make_record(2, **cut)]
    told = bench.summary_json(summary_of(*records), make_config(total_requests=10), [], {})
    counts = [told[key] for key in ("completed", "failed", "num_prompts", "aborted", "not_sent")]
    assert counts == [1, 1, 2, 1, 7]
    assert bench.detail_lists(records)["errors"] == ["", "http_500"]


def test_a_connection_opened_again_adds_no_key() -> None:
    kept, opened = (
        summary_of(make_record(new_connection=new, connect_ns=2_000_000 if new else None)) for new in (0, 1)
    )
    told = [bench.summary_json(summary, make_config(), [], {}) for summary in (kept, opened)]
    assert set(told[0]) == set(told[1])
    assert told[1]["connecting"]["max_connect_ms"] == 2.0


def test_the_details_are_those_of_the_requests(results: dict[str, dict[str, Any]]) -> None:
    told = results["streamed"]
    names = ("input_lens", "output_lens", "start_times", "latencies", "errors", "ttfts", "itls")
    assert {len(told[name]) for name in names} == {8}
    assert not {"ttfts", "itls"} & set(results["whole"])
    assert sum(told["output_lens"]) == told["total_output_tokens"]
    records = [make_record(2), make_record(1, status="http_error", error_kind="cut", error="gone"), make_record(0)]
    lists = bench.detail_lists(records)
    assert lists == {
        "input_lens": [10, 10, 10],
        "output_lens": [5, 0, 5],
        "start_times": [1.0, 1.0, 1.0],
        "latencies": [0.5, 0.0, 0.5],
        "errors": ["", "gone", ""],
        "ttfts": [0.1, 0.0, 0.1],
        "itls": [[0.1] * 4, [], [0.1] * 4],
    }
    whole = bench.detail_lists([make_record(n, first_s=None, last_s=None, gaps_ms=()) for n in (1, 0)])
    assert "ttfts" not in whole


# --- the files ---


def test_a_directory_gets_a_file_for_each_run_and_a_file_takes_one(server: Demo, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "results"
    for _ in range(2):
        assert cli(*server.target, *SMALL, "--summary-json", f"{folder}/", "--metadata", "label=a b").code == 0
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 2
    assert all(re.match(r"a_b-infqps-concurrency2-demo-\d{8}-\d{6}(-2)?\.json$", name) for name in names)
    file = folder / names[0]
    refused = cli(*server.target, *SMALL, "--summary-json", file)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "exists; name another or a directory" in refused.err
    assert len(json_lines(file)) == 1


def test_several_points_take_a_directory(tmp_path: Path) -> None:
    with pytest.raises(bench.UserError, match="2 points take a directory"):
        bench.SummarySink(str(tmp_path / "x.json"), new=True, points=2)
    bench.SummarySink(str(tmp_path), new=True, points=2).close()
    assert tmp_path.is_dir()
    result = {
        "backend": "b",
        "request_rate": 2.5,
        "max_concurrency": 8,
        "model_id": "org/m:1",
        "date": "d",
        "repeat": 3,
    }
    assert bench.result_name(result) == "b-2.5qps-concurrency8-repeat3-m_1-d"


def test_a_run_that_measures_nothing_leaves_no_file_and_no_directory(tmp_path: Path) -> None:
    dead = ("--api-base", "http://127.0.0.1:9/v1", "--model", "m", "--total-requests", "2")
    for path in ("x.json", "folder/"):
        assert cli(*dead, "--summary-json", f"{tmp_path}/{path}", "--report", tmp_path / "r.html").code == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--metadata", "model_id=x"], "results have keys of such a name"),
        (["--metadata", "p99_ttft=x"], "results have keys of such a name"),
        (["--metadata", "wait_ms=5"], "results have keys of such a name"),
        (["--metadata", "gpu"], "takes NAME=VALUE"),
        (["--save-detailed"], "--save-detailed needs --summary-json"),
        (["--summary-json", "/nowhere/x.json"], "cannot write --summary-json"),
        (["--report", "/nowhere/r.html"], "cannot write --report"),
        (["--report", __file__], "exists and is no report"),
    ],
)
def test_wrong_usage(argv: list[str], complaint: str) -> None:
    done = cli("--model", "m", "--api-base", "http://127.0.0.1:9/v1", *argv)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert complaint in done.err


# --- the page ---


def test_the_page_is_drawn_of_what_was_just_measured(server: Demo, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    page, rows = tmp_path / "r.html", tmp_path / "r.csv"
    rows.write_text(",".join(bench.CSV_COLUMNS) + "\n0" + "," * (len(bench.CSV_COLUMNS) - 1) + "\n")
    options = ("--results-csv", rows, "--append", "--report", page, "--metadata", "label=the=name")
    done = cli(*server.target, *SMALL, "--stream", *options)
    assert done.code == 0
    assert f"report {page}" in done.err
    text = page.read_text(encoding="utf-8")
    assert "the name" in text
    assert len(re.findall("<figure", text)) == 4  # of one point, not of the row that was there before


@pytest.mark.parametrize("missing", ["script", "package"])
def test_without_the_sibling_or_plotly_the_run_stands(
    server: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    if missing == "script":
        monkeypatch.setattr(bench, "THIS_FILE", str(tmp_path / "online_bench_openai_async.py"))
    else:
        (tmp_path / "plotly.py").write_text("raise ImportError")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    done = cli(*server.target, *SMALL, "--report", tmp_path / "r.html")
    assert (done.code, "Requests (ok/err): 8/0" in done.out) == (0, True)
    warning = done.err.splitlines()[-1]
    assert warning.startswith("WARNING: no --report: ")
    assert ("copy bench_report.py to" if missing == "script" else "pip install plotly") in warning
    kept = re.search(r"bench_report\.py html (\S+) -o", warning)
    assert kept
    assert sorted(path.name for path in Path(kept[1]).iterdir()) == ["results.csv", "results.jsonl"]


# --- docs/results.md ---


def documented(heading: str) -> list[str]:
    """The names in the first cells of the table below a heading."""
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    section = re.split(r"^#+ ", text[text.index(f"# {heading}\n") + 2 :], flags=re.MULTILINE)[0]
    cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`([\w.]+)`", cell)]


def test_the_document_names_every_key_and_column(results: dict[str, dict[str, Any]]) -> None:
    told = documented("`--save-detailed`")
    lists = [name for name in told if not name.startswith(("server_", "gpu_"))]
    sample = dict.fromkeys(bench.SERVER_SERIES, 1.0)
    rows = [bench.GpuSample(at, "0", "name", "driver", dict.fromkeys(bench.GPU_FACTS, 1.0)) for at in (0.0, 1.0)]
    assert set(told) - set(lists) == set(bench.figures_over_time([(0.0, sample), (1.0, sample)], rows))
    named = {f"{name}_{stem}" for stem in STEMS for name in STATISTICS}
    named |= {re.sub("_ms$", "", stem) + "_count" for stem in STEMS}
    named |= {f"steady_{name}" for name in named}
    assert documented("The summary") == [key for key in results["rate"] if key not in named]
    more = set(results["rate"]) - set(results["whole"]) - named
    assert {name for name in more if not re.search("goodput|_gpu$|^price", name)} == {"due_rate", "issued_rate"}
    assert sorted(documented("Distributions")) == sorted(STEMS)
    assert lists == [key for key in results["streamed"] if key in lists]
    assert set(results["streamed"]) - set(results["whole"]) - named == {*lists, "gpu_type"}
    assert documented("The CSV") == list(bench.CSV_COLUMNS)
