"""What a reader of the documents would paste: their code blocks, and the commands in them as a shell expands them."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from tests.support.program import ROOT

DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("examples/**/*.md"))]

# Every command that bash does not know is written down and not run; so the PATH is empty.
RECORDER = """
command_not_found_handle() { printf '%s\\0' "$@" $'\\1' >> "$RECORD"; }
cd() { :; }
"""


class Block(NamedTuple):
    """A fenced block: its document, the line on which it begins, its language, and its text."""

    document: Path
    line: int
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def blocks_of(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(document, text[: match.start()].count("\n") + 1, match[1], match[2]) for match in found]


def without_comments(block: Block) -> str:
    """What stays when a block is translated."""
    lines = [re.sub(r"(^|\s+)# .*$", "", line) for line in block.text.splitlines()]
    return "\n".join(line for line in lines if line.strip())


def commands_of(block: Block) -> list[list[str]]:
    """Its commands, each as the words that the program would be given: loops, quotes and variables worked out."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder, "record")
        record.touch()
        env = {"PATH": folder, "HOME": folder, "RECORD": str(record), "LC_ALL": "C.UTF-8", "AZURE_KEY": "secret-key"}
        bash = next(path for path in ("/bin/bash", "/usr/bin/bash", "/usr/local/bin/bash") if os.path.exists(path))
        done = subprocess.run(
            [bash, "--norc", "-c", RECORDER + block.text],
            cwd=folder,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert "syntax error" not in done.stderr, done.stderr
        calls = record.read_text(encoding="utf-8").split("\0\1\0")[:-1]
        return [call.split("\0") for call in calls]
