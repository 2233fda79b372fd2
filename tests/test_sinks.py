"""Section 8, Sinks: the writers."""

from __future__ import annotations

import csv
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

import online_bench_openai_async as bench
from tests.support.program import ROOT
from tests.support.records import make_record
from tests.support.tables import rows_of

TOOLKIT = ["index", "prompt_tokens", "completion_tokens", "total_tokens", "latency_ms", "status", "error"]


def test_the_columns_begin_with_the_toolkits() -> None:
    assert list(bench.CSV_COLUMNS)[:7] == TOOLKIT


def test_help_columns_explains_every_column_in_order_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(["--help-columns"])
    columns, codes = capsys.readouterr().out.split("Exit codes:")
    assert ended.value.code == 0
    assert re.findall(r"^  (\w+)  +\S", columns, re.MULTILINE) == list(bench.CSV_COLUMNS)
    assert re.findall(r"^  (\d+)  +\S", codes, re.MULTILINE) == ["0", "1", "2", "3", "130"]
    assert all(len(line) <= 100 for line in columns.splitlines())


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
    path.write_text(",".join(bench.CSV_COLUMNS) + "\n")
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


def test_old_rows_are_replaced_when_the_run_begins_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("anything,else\n1,2\n")
    never = bench.CsvSink(str(path), append=False, overwrite=True)
    never.close()
    assert path.read_text() == "anything,else\n1,2\n"
    new = bench.CsvSink(str(path), append=False, overwrite=True)
    assert path.read_text() == "anything,else\n1,2\n"
    new.begin()
    new.add(make_record(3))
    new.close()
    assert [row["index"] for row in rows_of(path)] == ["3"]


needs_locks = pytest.mark.skipif(sys.platform == "win32", reason="no flock")


@needs_locks
def test_a_run_that_fails_does_not_remove_the_file_that_another_writes_to(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    failing = bench.CsvSink(str(path), append=False, overwrite=False)
    other = bench.CsvSink(str(path), append=True, overwrite=False)
    failing.close()
    other.add(make_record(5))
    assert not other.gone()
    other.close()
    assert [row["index"] for row in rows_of(path)] == ["5"]


@needs_locks
def test_rows_that_another_run_is_writing_are_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    first = bench.CsvSink(str(path), append=False, overwrite=False)
    first.add(make_record(1))
    with pytest.raises(bench.UserError, match="another run is writing"):
        bench.CsvSink(str(path), append=False, overwrite=True)
    first.close()
    replacing = bench.CsvSink(str(path), append=False, overwrite=True)
    joined = bench.CsvSink(str(path), append=True, overwrite=False)  # while the other warms up
    with pytest.raises(bench.UserError, match="another run has begun to write"):
        replacing.begin()
    replacing.close()
    joined.close()
    assert [row["index"] for row in rows_of(path)] == ["1"]


def test_simultaneous_starts_write_one_header_and_lose_no_row(tmp_path: Path) -> None:
    """In processes, as runs are; started together by a line on stdin."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import online_bench_openai_async as b\n"
        "from tests.support.records import make_record\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "for n in range(20):\n"
        "    sink = b.CsvSink(sys.argv[1] + str(n), True, False); sink.begin()\n"
        "    if sys.argv[2] != '0': sink.add(make_record(int(sys.argv[2])))\n"
        "    sink.close()\n"
    )
    path = tmp_path / "r.csv"
    command = [sys.executable, "-c", code, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen([*command, str(number)], **pipes) for number in range(4)]  # type: ignore[call-overload]
    for run in runs:
        assert run.stdout.readline() == "ready\n"
    for run in runs:
        run.stdin.write("go\n")
        run.stdin.flush()
    assert [run.communicate(timeout=60) and run.returncode for run in runs] == [0] * 4
    for number in range(20):
        lines = Path(f"{path}{number}").read_text().splitlines()
        assert lines.count(",".join(bench.CSV_COLUMNS)) == 1
        assert lines[0].startswith("index,")
        assert sorted(line.partition(",")[0] for line in lines[1:]) == ["1", "2", "3"]


def test_other_columns_are_not_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(bench.UserError, match="other columns"):
        bench.CsvSink(str(path), append=True, overwrite=False)
    assert path.read_text() == "a,b\n1,2\n"


def test_an_older_files_missing_columns_are_named(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text(",".join(list(bench.CSV_COLUMNS)[:-2]) + "\n")
    missing = ", ".join(list(bench.CSV_COLUMNS)[-2:])
    with pytest.raises(bench.UserError, match=f"lacks the columns {missing}; name another file"):
        bench.CsvSink(str(path), append=True, overwrite=False)


def test_a_run_that_measured_nothing_leaves_no_file(tmp_path: Path) -> None:
    fresh, old = tmp_path / "fresh.csv", tmp_path / "old.csv"
    bench.CsvSink(str(fresh), append=False, overwrite=False).close()
    assert not fresh.exists()
    old.write_text(",".join(bench.CSV_COLUMNS) + "\n")
    bench.CsvSink(str(old), append=True, overwrite=False).close()
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
    path.write_text(",".join(bench.CSV_COLUMNS) + "\n")
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
    line = bench.LiveLine(tally, bench.Goal(10), lambda: 0.0)
    line.show()
    tally.add(make_record())
    line.show()
    line.finish()
    return stream.getvalue()


def test_a_terminal_gets_one_line_rewritten_within_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    text = live_line(monkeypatch, Terminal(), 24)
    assert text.endswith("\n\n")  # an empty line before the report
    assert text.count("\n") == 2
    assert {len(part.rstrip("\n")) for part in text.split("\r")[1:]} == {23}
    assert all("0 err" in part and "ETA" in part for part in text.split("\r")[1:])


def test_a_pipe_gets_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    text = live_line(monkeypatch, io.StringIO(), 20)
    assert "\r" not in text
    assert text.endswith("\n\n")
    assert all(line.startswith("Progress: ") and "ETA" in line for line in text.splitlines()[:-1])


def test_csv_text_survives_a_csv_reader(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    sink = bench.CsvSink(str(path), append=False, overwrite=False)
    sink.add(make_record(status="decode_error", error_kind="x", error='quote " comma , 日本語'))
    sink.close()
    with open(path, encoding="utf-8", newline="") as file:
        assert next(csv.DictReader(file))["error"] == 'quote " comma , 日本語'
