"""Room 7: the writers."""

from __future__ import annotations

import csv
import io
import re
import sys
from pathlib import Path

import pytest

import online_bench_openai_async as bench
from tests.support.records import make_record
from tests.support.tables import rows_of

TOOLKIT = ["index", "prompt_tokens", "completion_tokens", "total_tokens", "latency_ms", "status", "error"]


def test_the_columns_begin_with_the_toolkits() -> None:
    assert list(bench.CSV_COLUMNS)[:7] == TOOLKIT


def test_the_docstring_explains_every_column_in_order() -> None:
    section = bench.__doc__.split("--results-csv, one row")[1] if bench.__doc__ else ""
    assert re.findall(r"^    (\w+)  +\S", section, re.MULTILINE) == list(bench.CSV_COLUMNS)


def test_a_row_is_on_the_disk_before_the_next_is_made(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    sink = bench.CsvSink(str(path), append=False, overwrite=False)
    for index in range(3):
        sink.add(make_record(index))
        assert len(rows_of(path)) == index + 1
    sink.close()


def test_a_row_says_what_the_record_says(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    sink = bench.CsvSink(str(path), append=False, overwrite=False)
    sink.add(make_record(7, cached_tokens=3))
    sink.add(make_record(8, status="http_error", error_kind="http_429", error="slow down", prompt_tokens=None,
                         completion_tokens=None, http_status=429, sent_s=None))  # fmt: skip
    sink.close()
    good, bad = rows_of(path)
    assert (good["index"], good["latency_ms"], good["total_tokens"], good["status"]) == (
        "7",
        "500.000",
        "15",
        "success",
    )
    assert (good["ttft_ms"], good["tpot_ms"], good["cached_tokens"]) == ("100.000", "100.000", "3")
    assert (bad["status"], bad["error_kind"], bad["http_status"]) == ("http_error", "http_429", "429")
    assert bad["latency_ms"] == bad["total_tokens"] == bad["sent_s"] == ""


@pytest.mark.parametrize("start", ["=", "+", "-", "@"])
def test_a_servers_text_is_no_formula_and_no_second_line(tmp_path: Path, start: str) -> None:
    path = tmp_path / "r.csv"
    sink = bench.CsvSink(str(path), append=False, overwrite=False)
    sink.add(make_record(status="http_error", error_kind="x", error=f"{start}cmd|' /C calc'!A0\n,\"second\" line"))
    sink.close()
    assert len(path.read_text().splitlines()) == 2
    assert not rows_of(path)[0]["error"].startswith(start)


def test_an_existing_file_is_refused_appended_to_or_replaced(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    bench.CsvSink(str(path), append=False, overwrite=False).close()
    with pytest.raises(bench.UserError, match="--append adds to it, --overwrite replaces it"):
        bench.CsvSink(str(path), append=False, overwrite=False)
    more = bench.CsvSink(str(path), append=True, overwrite=False)
    more.add(make_record(1))
    more.close()
    assert [row["index"] for row in rows_of(path)] == ["1"]
    again = bench.CsvSink(str(path), append=True, overwrite=False)
    again.add(make_record(2))
    again.close()
    assert [row["index"] for row in rows_of(path)] == ["1", "2"]
    new = bench.CsvSink(str(path), append=False, overwrite=True)
    new.close()
    assert rows_of(path) == []


def test_other_columns_are_not_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(bench.UserError, match="other columns"):
        bench.CsvSink(str(path), append=True, overwrite=False)
    assert path.read_text() == "a,b\n1,2\n"


def test_a_run_that_measured_nothing_leaves_no_file(tmp_path: Path) -> None:
    fresh, old = tmp_path / "fresh.csv", tmp_path / "old.csv"
    bench.CsvSink(str(fresh), append=False, overwrite=False).discard_if_empty()
    assert not fresh.exists()
    old.write_text(",".join(bench.CSV_COLUMNS) + "\n")
    bench.CsvSink(str(old), append=True, overwrite=False).discard_if_empty()
    assert old.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told_before_any_load() -> None:
    with pytest.raises(bench.UserError, match="No space left on device"):
        bench.CsvSink("/dev/full", append=False, overwrite=True)


def test_a_disk_that_fills_up_loses_rows_but_spoils_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit on a file's size stands for the disk's: it, too, cuts a row within."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "r.csv"
    sink = bench.CsvSink(str(path), append=False, overwrite=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    sink.add(make_record(0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, hard))
    try:
        sink.add(make_record(1))
        sink.add(make_record(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    sink.add(make_record(3))
    sink.close()
    assert (sink.rows, sink.lost, sink.reason) == (4, 2, "File too large")
    assert [row["index"] for row in rows_of(path)] == ["0", "3"]
    assert b"\0" not in path.read_bytes()


def test_rows_that_are_added_begin_on_a_line_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    bench.CsvSink(str(path), append=False, overwrite=False).close()
    with open(path, "ab") as file:
        file.write(b"7,1,2")  # where another writer was killed
    sink = bench.CsvSink(str(path), append=True, overwrite=False)
    sink.add(make_record(8))
    sink.close()
    assert [row["index"] for row in rows_of(path)] == ["7", "8"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def live_line(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, columns: int) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", str(columns))
    tally = bench.Tally()
    line = bench.LiveLine(tally, 10, lambda: 0.0)
    line.show()
    tally.add(make_record())
    line.show()
    line.finish()
    return stream.getvalue()


def test_a_terminal_gets_one_line_rewritten_within_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    text = live_line(monkeypatch, Terminal(), 20)
    assert text.count("\n") == 1
    assert {len(part.rstrip("\n")) for part in text.split("\r")[1:]} == {19}


def test_a_pipe_gets_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    text = live_line(monkeypatch, io.StringIO(), 20)
    assert "\r" not in text
    assert all(line.startswith("Progress: ") and "ETA" in line for line in text.splitlines())


def test_csv_text_survives_a_csv_reader(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    sink = bench.CsvSink(str(path), append=False, overwrite=False)
    sink.add(make_record(status="decode_error", error_kind="x", error='quote " comma , 日本語'))
    sink.close()
    with open(path, encoding="utf-8", newline="") as file:
        assert next(csv.DictReader(file))["error"] == 'quote " comma , 日本語'
