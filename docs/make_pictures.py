#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["openai>=1.0"]
# ///
"""Draw docs/terminal.svg and docs/sweep.svg from real runs against demo_server.py.

    python docs/make_pictures.py

Takes about two minutes. Both pictures show what the runs printed and measured on this machine, and nothing else. A run
whose client was the limit, or of one level with a warning, is made again, up to three times; then this ends with exit
code 1 and the old pictures stay.
"""

from __future__ import annotations

import html
import json
import math
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Optional

ROOT = Path(__file__).resolve().parent.parent
SHOWN = "--demo --stream --concurrency 32 --total-requests 768 --prompt-tokens 128"
LEVELS = (1, 2, 4, 8, 16, 32, 64, 128)
SWEPT = [
    "--demo", "--demo-engine", '{"step_ms": 10, "max_batch": 32}', "--stream",
    "--output-tokens", "32", "--concurrency", ",".join(map(str, LEVELS)),
]  # fmt: skip
TRIES = 3
GROWTH = 1.05  # of the throughput per doubling; what grows less has passed the knee

COLUMNS = 100
CELL, LINE, PAD = 8.0, 17.0, 16.0  # px: a character's width, a line's height, the margin
FONT = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace"
COLOURS = (
    (r"^\$ ", "prompt"),
    (r"^(WARNING|Cure| {9}\S)", "warning"),
    (r"^Verdict: client-bound", "warning"),
    (r"^(Verdict|Measurement error)", "good"),
    (r"^ {20,}mean ", "dim"),
    (r"^Progress", "dim"),
)


def measured(argv: Sequence[str], doubt: str) -> subprocess.CompletedProcess[str]:
    """One run of the benchmark whose report does not hold this word."""
    command = [sys.executable, "online_bench_openai_async.py", *argv]
    for _ in range(TRIES):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"make_pictures.py: {' '.join(command)} ended with {done.returncode}: {done.stderr}")
        if doubt not in done.stdout:
            return done
    sys.exit(f"make_pictures.py: {doubt!r} in the report, three times; make room on this machine and try again")


# --- the terminal ---


def terminal_lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What a terminal showed: the command, the last progress line, and the report down to its configuration."""
    progress = [line for line in done.stderr.splitlines() if line.startswith("Progress:")]
    report = done.stdout.partition("\n=== ")[0].rstrip().splitlines()
    return [f"$ python online_bench_openai_async.py {SHOWN}", *progress[-1:], "", *report]


def colour(line: str) -> str:
    return next((name for pattern, name in COLOURS if re.search(pattern, line)), "text")


def terminal_svg(lines: Sequence[str]) -> str:
    """Lines of text on a dark window, each stretched to the grid, so that columns stand whatever the font."""
    columns = max(COLUMNS, *(len(line) for line in lines))
    width, height = columns * CELL + 2 * PAD, len(lines) * LINE + 2 * PAD + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img"'
        ' aria-label="A run of the benchmark in a terminal">',
        f"<style>text{{font:13px {FONT};white-space:pre}}.text{{fill:#d7dae0}}.prompt{{fill:#fff;font-weight:bold}}"
        ".warning{fill:#e5c07b}.good{fill:#98c379}.dim{fill:#8b93a1}</style>",
        f'<rect width="{width:g}" height="{height:g}" rx="8" fill="#1e222a"/>',
        *(f'<circle cx="{PAD + 6 + 18 * i:g}" cy="18" r="5" fill="#4b5263"/>' for i in range(3)),
    ]
    for number, line in enumerate(lines, start=1):
        bare = line.lstrip(" ")
        if bare:
            x, y = PAD + CELL * (len(line) - len(bare)), 24 + PAD + LINE * number - 4
            parts.append(
                f'<text class="{colour(line)}" x="{x:g}" y="{y:g}" textLength="{len(bare) * CELL:g}"'
                f' xml:space="preserve">{html.escape(bare)}</text>'
            )
    return "\n".join([*parts, "</svg>", ""])


# --- the sweep ---


def sweep() -> list[dict[str, Any]]:
    """The summary of each level."""
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder, "sweep.jsonl")
        measured([*SWEPT, "--no-progress", "--summary-jsonl", str(kept)], "client-bound")
        lines = kept.read_text(encoding="utf-8").splitlines()[-len(LEVELS) :]  # of the last try
        return [json.loads(line) for line in lines]


def knee(points: Sequence[dict[str, Any]]) -> int:
    """The last level at which the throughput still grew by more than 5 % per doubling."""
    rates = [point["output_throughput"] for point in points]
    grew = [level for level, before, now in zip(LEVELS[1:], rates, rates[1:]) if now > before * GROWTH]
    return grew[-1] if grew else LEVELS[0]


class Panel:
    """One diagram: levels evenly spaced along x; y linear from 0, or by powers of ten."""

    def __init__(self, left: float, top: float, highest: float, lowest: Optional[float] = None) -> None:
        self.left, self.top, self.width, self.height = left, top, 350.0, 210.0
        self.highest, self.lowest = highest, lowest
        self.parts: list[str] = []

    def x(self, index: int) -> float:
        return self.left + self.width * index / (len(LEVELS) - 1)

    def y(self, value: float) -> float:
        share = value / self.highest
        if self.lowest is not None:
            share = math.log(value / self.lowest) / math.log(self.highest / self.lowest)
        return self.top + self.height * (1 - share)

    def text(self, at: tuple[float, float], words: str, kind: str = "label", anchor: str = "start") -> None:
        x, y = at
        self.parts.append(
            f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>'
        )

    def axes(self, title: str, ticks: Iterable[float]) -> None:
        self.text((self.left, self.top - 16), title, "head")
        for tick in ticks:
            y = self.y(tick)
            self.parts.append(
                f'<line class="grid" x1="{self.left:g}" x2="{self.left + self.width:g}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
            self.text((self.left - 8, y + 4), f"{tick:,.0f}", anchor="end")
        for index, level in enumerate(LEVELS):
            self.text((self.x(index), self.top + self.height + 20), str(level), anchor="middle")
        self.text((self.left + self.width / 2, self.top + self.height + 40), "requests in flight", anchor="middle")

    def curve(self, values: Sequence[float], kind: str, name: str = "") -> None:
        at = [(self.x(index), self.y(value)) for index, value in enumerate(values)]
        self.parts.append(f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in at)}"/>')
        self.parts += [f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in at]
        self.text((at[-1][0] + 8, at[-1][1] + (-4 if kind == "b" else 12)), name, f"{kind} name")

    def mark(self, index: int) -> None:
        x = self.x(index)
        self.parts.append(
            f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{self.top:g}" y2="{self.top + self.height:g}"/>'
        )


def round_ticks(highest: float) -> list[float]:
    """About four round values from 0 to at least the highest."""
    power = 10 ** math.floor(math.log10(highest / 4))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor * 5 >= highest)
    return [step * number for number in range(math.ceil(highest / step) + 1)]


STYLE = """<style>
text{font:13px system-ui,-apple-system,'Segoe UI',Helvetica,Arial,'DejaVu Sans',sans-serif;fill:#24292f}
.title{font-size:17px;font-weight:600}.head{font-weight:600}.card{fill:#fff;stroke:#d0d7de}.label{fill:#57606a}
.grid{stroke:#d8dee4}.mark{stroke:#57606a;stroke-dasharray:4 4}polyline{fill:none;stroke-width:2}
polyline.a{stroke:#0072b2}circle.a,text.a{fill:#0072b2}polyline.b{stroke:#c04a00}circle.b,text.b{fill:#c04a00}
.name{font-weight:600}.small{font-size:10.5px}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.card{fill:#161b22;stroke:#30363d}.label{fill:#9da7b3}
.grid{stroke:#30363d}.mark{stroke:#9da7b3}polyline.a{stroke:#56b4e9}circle.a,text.a{fill:#56b4e9}
polyline.b{stroke:#e69f00}circle.b,text.b{fill:#e69f00}}
</style>"""


def sweep_svg(points: Sequence[dict[str, Any]]) -> str:
    """Throughput and time to first token against the concurrency."""
    best = knee(points)
    rates = [point["output_throughput"] for point in points]
    medians, tails = ([point[f"{key}_ttft_ms"] for point in points] for key in ("median", "p99"))
    decades = [10.0**power for power in range(math.floor(math.log10(min(medians))), 8)]
    until = next(number for number, value in enumerate(decades) if value >= max(tails))
    left, right = Panel(80, 96, round_ticks(max(rates))[-1]), Panel(530, 96, decades[until], decades[0])
    left.axes("Output tokens/s", round_ticks(max(rates)))
    right.axes("Time to first token, ms", decades[: until + 1])
    for panel in (left, right):
        panel.mark(LEVELS.index(best))
    left.curve(rates, "a")
    right.curve(tails, "b", "p99")
    right.curve(medians, "a", "p50")
    left.text(
        (32, 40), f"Up to {best} requests in flight more load gives more tokens/s; beyond, only more waiting", "title"
    )
    left.text((32, 394), f"python online_bench_openai_async.py {shlex.join(SWEPT)}", "label small")
    label = "Output tokens per second and time to first token against the requests in flight"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 940 410" role="img" aria-label="{label}">',
            STYLE,
            '<rect class="card" x="0.5" y="0.5" width="939" height="409" rx="8"/>',
            *left.parts,
            *right.parts,
            "</svg>",
            "",
        ]
    )


def main() -> int:
    pictures = {
        "terminal.svg": terminal_svg(terminal_lines(measured(SHOWN.split(), "WARNING"))),
        "sweep.svg": sweep_svg(sweep()),
    }
    for name, text in pictures.items():
        (ROOT / "docs" / name).write_text(text, encoding="utf-8")
        print(f"docs/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
