"""The documents: links resolve, and what a reader would paste runs, in small, against the simulated server."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import online_bench_openai_async as bench
from tests.support import program
from tests.support.demo import Demo
from tests.support.documents import DOCUMENTS, Block, blocks_of, commands_of, without_comments
from tests.support.program import ROOT

BENCHMARK = "online_bench_openai_async.py"
BLOCKS = [block for document in DOCUMENTS if document.name != "README.ja.md" for block in blocks_of(document)]
# Sizes are cut to these; of a list of levels two are kept.
MOST = {
    "--concurrency": 4, "--total-requests": 8, "--requests-per-slot": 2, "--request-rate": 50, "--duration": 0.2,
    "--prompt-tokens": 64, "--output-tokens": 8, "--processes": 2, "--repeat": 2, "--cooldown": 0, "--ramp-up": 0.1,
}  # fmt: skip


def named(blocks: Sequence[Block], language: str, word: str = "") -> list[object]:
    """Parameters of a test: the blocks of a language that hold a word."""
    return [
        pytest.param(block, id=block.where) for block in blocks if block.language == language and word in block.text
    ]


# --- links ---


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()).replace(" ", "-")


def anchors(document: Path) -> set[str]:
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(document: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        if re.match(r"https?://|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (document.parent / name).resolve() if name else document
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


# --- both languages ---


def test_both_readmes_have_the_same_code_blocks() -> None:
    """Apart from comments, and in whatever order."""
    english, japanese = (
        sorted(without_comments(block) for block in blocks_of(ROOT / name)) for name in ("README.md", "README.ja.md")
    )
    assert english == japanese


# --- commands ---


def in_small(words: Sequence[str], server: str) -> list[str]:
    """The words of a command of the benchmark, with sizes that a test has time for, sent to the simulated server."""
    small: list[str] = []
    for option, word in zip(["", *words], words):
        if option in MOST and re.fullmatch(r"[\d.,]+", word):
            levels = word.split(",")[:2]
            word = ",".join(f"{min(float(level), MOST[option] * (n + 1)):g}" for n, level in enumerate(levels))
        elif option == "--find-max":
            word = "1:2"
        elif option == "--slo":
            word = word.replace("p99", "p50")  # which needs fewer requests
        elif option == "--api-base":
            word = server + word[word.find("?") :] if "?" in word else server
        small.append(word)
    if "--requests-file" not in small:
        small += [] if "--total-requests" in small or "--duration" in small else ["--total-requests", "8"]
        small += [] if "--output-tokens" in small else ["--output-tokens", "8"]
    loads = {"--concurrency", "--request-rate", "--find-max"}
    return small + ([] if loads & set(small) else ["--concurrency", "4"])


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    demo = Demo(ttft_ms=2, gap_ms=0.5)
    yield demo.url
    demo.stop()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str) -> Path:
    """An empty folder with the files that the documents name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_BASE_URL", server)
    for name in ("corpus.jsonl", "requests.jsonl", "examples/corpus.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / "examples" / "corpus.jsonl", tmp_path / name)
    trace = [{"timestamp": 10 * n, "input_length": 30, "output_length": 2, "hash_ids": [n]} for n in range(8)]
    (tmp_path / "trace.jsonl").write_text("".join(json.dumps(line) + "\n" for line in trace))
    return tmp_path


@pytest.mark.parametrize("block", named(BLOCKS, "bash", BENCHMARK))
def test_commands_of_the_benchmark_run(block: Block, folder: Path, server: str) -> None:
    once = {re.sub(r"\d+", "N", " ".join(command)): command for command in commands_of(block)}  # of a loop, its last
    for command in once.values():
        if command[:2] == ["python", BENCHMARK] or command[:3] == ["uv", "run", BENCHMARK]:
            done = program.cli(*in_small(command[command.index(BENCHMARK) + 1 :], server))
            assert done.code in (0, 3), f"{command}\n{done.err}{done.out}"  # 3: a limit that this server does not hold


@pytest.mark.parametrize("block", named(BLOCKS, "bash", "generate_requests.py"))
def test_commands_of_the_generator_are_understood(block: Block, folder: Path) -> None:
    generator = importlib.import_module("generate_requests")
    for command in commands_of(block):
        if "generate_requests.py" in command[:3]:
            words = command[command.index("generate_requests.py") + 1 :]
            options = generator.build_parser().parse_args(words, generator.Options())
            if not (options.approx_input_tokens or options.from_trace):  # paragraphs, without a tokenizer
                with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                    assert generator.main(words) == 0


def lay_out(words: Sequence[str], results: Path) -> list[str]:
    """The words of a command of bench_report.py, the result files that they name being there."""
    there = []
    for option, word in zip(["", *words], (word.replace("*", "1") for word in words)):
        for name in word.rpartition("=")[2].split(","):
            kept = results / {".csv": "results.csv", ".json": "summary.json"}.get(Path(name).suffix, "summary.jsonl")
            if Path(name).suffix in (".csv", ".json", ".jsonl") and not Path(name).exists():
                shutil.copy(kept, name)
            elif name.endswith("/") and option not in ("--png", "--svg"):
                Path(name).mkdir(exist_ok=True)
                shutil.copy(kept, Path(name, "point.json"))
        there.append(word)
    return there


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, server: str) -> Path:
    """The CSV and the summary of a streamed run."""
    made = tmp_path_factory.mktemp("results")
    files = ["--results-csv", made / "results.csv", "--summary-jsonl", made / "summary.jsonl"]
    sizes = ["--concurrency", "4", "--total-requests", "40", "--output-tokens", "8", "--prompt-tokens", "32"]
    assert program.cli("--api-base", server, "--model", "m", "--stream", *sizes, *files).code == 0
    shutil.copy(made / "summary.jsonl", made / "summary.json")
    return made


@pytest.mark.parametrize("block", named(BLOCKS, "bash", "bench_report.py"))
def test_commands_of_the_report_run(block: Block, folder: Path, results: Path) -> None:
    pytest.importorskip("numpy")
    report = importlib.import_module("bench_report")
    for command in commands_of(block):
        if "bench_report.py" in command[:2]:
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                assert report.main(lay_out(command[2:], results)) in (0, 3), said.getvalue()


@pytest.mark.parametrize("block", named(BLOCKS, "bash", "demo_server.py"))
def test_commands_of_the_simulated_server_are_understood(block: Block) -> None:
    demo_server = importlib.import_module("demo_server")
    for command in commands_of(block):
        if "demo_server.py" in command[:2]:
            demo_server.build_parser().parse_args(command[2:])


@pytest.mark.parametrize("block", named(BLOCKS, "json"))
def test_corpus_lines_are_read(block: Block) -> None:
    for line in block.text.splitlines():
        assert bench.parse_request(line, None)


@pytest.mark.parametrize("block", named(BLOCKS, "python"))
def test_python_blocks_are_python(block: Block) -> None:
    compile(block.text, block.where, "exec")
