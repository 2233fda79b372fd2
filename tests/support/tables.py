"""The files of a run, read and written: CSV rows, JSON lines, corpora."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV; none where there is no file."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def fate(row: dict[str, str]) -> str:
    """What became of a request: `status/error_kind`, `success/` where all was well."""
    return f"{row['status']}/{row['error_kind']}"


def json_lines(path: Path) -> list[Any]:
    """Every line of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_corpus(path: Path, prompts: Iterable[str]) -> Path:
    """A corpus of these prompts, a line each."""
    path.write_text("".join(json.dumps({"text": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
    return path


def assert_whole(path: Path, columns: int) -> None:
    """Every line of the CSV ends and has every cell; no index stands in it twice."""
    data = path.read_bytes()
    assert data.endswith(b"\n")
    rows = list(csv.reader(data.decode("utf-8").splitlines()))
    assert {len(row) for row in rows} == {columns}
    assert len({row[0] for row in rows}) == len(rows)
