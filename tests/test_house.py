"""The order of the house: one file that runs alone, sections in order, docs that agree with the code."""

from __future__ import annotations

import argparse
import ast
import functools
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import online_bench_openai_async as bench
from tests.support.program import ROOT, SCRIPT

SOURCE = SCRIPT.read_text(encoding="utf-8")
SCRIPTS = sorted(ROOT.glob("*.py"))
PURE = re.compile(r"# === (\d+)\. .*\(pure\) ===")
BANNER = re.compile(r"^# === (\d+)\. ([A-Z][\w' ]*?)(?: \(.*\))? ===$", re.MULTILINE)


@functools.cache
def sections() -> list[tuple[int, str, int]]:
    """(number, name, first line) of each banner."""
    return [(int(m[1]), m[2], SOURCE[: m.start()].count("\n") + 1) for m in BANNER.finditer(SOURCE)]


def section_at(line: int) -> int:
    return max(number for number, _, first in sections() if first <= line)


def defined() -> dict[str, int]:
    """Every name that the module defines at its top level, with its section."""
    names: dict[str, int] = {}
    for node in ast.parse(SOURCE).body:
        if node.lineno < sections()[0][2]:
            continue
        targets = []
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            targets = [node.name]
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                targets += [leaf.id for leaf in ast.walk(target) if isinstance(leaf, ast.Name)]
        names.update({name: section_at(node.lineno) for name in targets})
    return names


def evaluated(node: ast.AST) -> list[ast.Name]:
    """Names in a tree, annotations aside: those are never evaluated."""
    found: list[ast.Name] = []
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns"):
            continue
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, ast.Name):
                found.append(item)
            if isinstance(item, ast.AST):
                found += evaluated(item)
    return found


def bound_in(node: ast.AST) -> set[str]:
    """Parameters and local names of a definition: they hide the module's."""
    stored = {leaf.id for leaf in ast.walk(node) if isinstance(leaf, ast.Name) and isinstance(leaf.ctx, ast.Store)}
    return stored | {leaf.arg for leaf in ast.walk(node) if isinstance(leaf, ast.arg)}


def test_the_banners_number_the_sections_in_order() -> None:
    assert [number for number, _, _ in sections()] == list(range(1, 16))


def test_a_section_uses_only_sections_above_it() -> None:
    home = defined()
    below = {
        f"line {name.lineno}: section {section_at(name.lineno)} uses {name.id} of section {home[name.id]}"
        for node in ast.parse(SOURCE).body
        if node.lineno >= sections()[0][2]
        for name in evaluated(node)
        if name.id in home and home[name.id] > section_at(name.lineno) and name.id not in bound_in(node)
    }
    assert not below


def test_the_docstring_lists_the_sections_as_the_banners_do() -> None:
    listed = re.findall(r"^ +(\d+)\. (.+)$", bench.__doc__ or "", re.MULTILINE)
    assert [(int(number), name) for number, name in listed] == [(number, name) for number, name, _ in sections()]


def test_every_section_but_the_constants_has_its_test_file() -> None:
    for _, name, _ in sections()[1:]:
        words = name.lower().replace("'", "").split()
        assert (ROOT / "tests" / f"test_{'_'.join(words)}.py").exists(), name


def test_pure_sections_touch_nothing() -> None:
    pure = {int(match[1]) for match in PURE.finditer(SOURCE)}
    assert {3, 5, 6, 7} <= pure
    forbidden = {"open", "print", "time", "asyncio", "sys", "subprocess", "socket"}
    touched = [
        f"line {name.lineno}: {name.id}"
        for name in evaluated(ast.parse(SOURCE))
        if name.id in forbidden and section_at(name.lineno) in pure
    ]
    assert not touched


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_functions_are_short_and_take_few_parameters(script: Path) -> None:
    long = []
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name != "build_parser":
            lines = (node.end_lineno or 0) - node.lineno + 1
            parameters = [arg.arg for arg in node.args.args + node.args.kwonlyargs if arg.arg not in ("self", "cls")]
            if lines > 50 or len(parameters) > 5:
                long.append(f"{node.name}: {lines} lines, {len(parameters)} parameters")
    assert not long


def block_of(script: Path) -> dict[str, list[str]]:
    """requires-python and dependencies of a script's PEP 723 block."""
    text = script.read_text(encoding="utf-8")
    match = re.search(r"^# /// script\n(.*?)^# ///$", text, re.MULTILINE | re.DOTALL)
    assert match, f"{script.name} has no PEP 723 block"
    lines = "".join(line[2:] for line in match[1].splitlines(keepends=True))
    listed = re.search(r"^dependencies = (\[.*?\])$", lines, re.MULTILINE | re.DOTALL)
    return {
        "dependencies": ast.literal_eval(listed[1]) if listed else [],
        "requires": re.findall(r'^requires-python = "(.+)"$', lines, re.MULTILINE),
    }


def test_requirements_are_those_of_the_scripts() -> None:
    wanted: list[str] = []
    for script in SCRIPTS:
        wanted += block_of(script)["dependencies"]
    listed = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert sorted(listed) == sorted(set(wanted))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_runs_alone(script: Path, tmp_path: Path) -> None:
    if script.name.startswith("locust") and importlib.util.find_spec("locust") is None:
        pytest.skip("locust is not installed")
    alone = tmp_path / script.name
    shutil.copy(script, alone)
    command = [sys.executable, "-I", str(alone), "--help"]
    if script.name.startswith("locust"):
        command = [sys.executable, "-m", "locust", "-f", str(alone), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_imports_no_other(script: Path) -> None:
    others = {path.stem for path in SCRIPTS} - {script.stem}
    imported = set()
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    assert not imported & others


def test_the_benchmark_imports_nothing_but_the_standard_library_at_its_top() -> None:
    stdlib = getattr(sys, "stdlib_module_names", None)
    if stdlib is None:
        pytest.skip("Python 3.9 does not list its standard library")
    for node in ast.walk(ast.parse(SOURCE)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert all(name.partition(".")[0] in stdlib for name in names), names


# --- the documents ---


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def fenced(name: str) -> list[str]:
    return re.findall(r"^```.*?^```$", read(name), re.MULTILINE | re.DOTALL)


def option_rows(text: str) -> dict[str, str]:
    """The options of a table, in order, each with the cell of its default."""
    return dict(re.findall(r"^\| `(--[\w-]+)` \|([^|]*)\|", text, re.MULTILINE))


def option_table(name: str) -> dict[str, str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return option_rows(text.split("<!-- options of online_bench_openai_async.py -->")[1].split("<!-- end -->")[0])


@pytest.mark.parametrize("name", ["docs/options.md", "README.ja.md"])
def test_the_table_of_options_is_the_parsers(name: str) -> None:
    actions = [action for action in bench.build_parser()._actions if action.help != argparse.SUPPRESS]
    rows = option_table(name)
    assert list(rows) == [action.option_strings[-1] for action in actions if action.dest != "help"]
    for action in actions:
        default = bench.DEFAULTS.get(action.dest)
        if default not in (None, {}):
            shown = f"{default:g}" if isinstance(default, float) else str(default)
            assert shown in re.split(r"[^\w.]+", rows[action.option_strings[-1]].replace("0.0", "0")), action.dest


def test_the_options_in_the_readme_are_rows_of_the_table() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Options\n")[1].split("\n## ")[0]
    rows, table = option_rows(section), option_table("docs/options.md")
    assert len(rows) >= 8
    assert {option: cell for option, cell in table.items() if option in rows} == rows


@pytest.mark.parametrize("name", ["README.md", "README.ja.md"])
def test_every_option_in_a_command_exists(name: str) -> None:
    known = {option for action in bench.build_parser()._actions for option in action.option_strings}
    for block in fenced(name):
        for command in re.findall(r"online_bench_openai_async\.py((?:[^\n]*\\\n)*[^\n]*)", block):
            used = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", command))
            assert used <= known, used - known


def test_the_method_defines_every_metric_and_every_column() -> None:
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    for metric in bench.METRICS:
        assert metric.label.partition(" (")[0].lower() in text.lower(), metric.label
    for column in bench.CSV_COLUMNS:
        assert f"`{column}`" in text, column


# --- working on it ---


def test_make_does_what_ci_and_the_readme_do() -> None:
    """`make check` are the linters of .ci/run, `make test` is the README's test command."""
    rules = {}
    for rule in re.split(r"\n(?=[.\w]+:)", (ROOT / "Makefile").read_text(encoding="utf-8")):
        name, _, recipe = rule.partition(":")
        rules[name] = re.findall(r"^\t(.+)$", recipe, re.MULTILINE)
    linters = re.findall(r"^\.venv/bin/(?:ruff|mypy) .+$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert rules["check"] == linters
    (command,) = rules["test"]
    assert any(command in block.splitlines() for block in fenced("README.md"))


def test_contributing_lists_every_section_with_its_tests() -> None:
    rows = re.findall(r"^\| [^|]+ \| ([A-Z][\w' ]+?)(?: \(.*?\))? \| (.+?) \|$", read("CONTRIBUTING.md"), re.MULTILINE)
    tests = {section: cell.strip("`") for section, cell in rows}
    names = [name for _, name, _ in sections()]
    assert list(tests) == names
    assert all((ROOT / tests[name]).exists() for name in names[1:]), tests
    for table in re.findall(r"the table `(\w+)`", read("CONTRIBUTING.md")):
        assert hasattr(bench, table), table


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_the_shell_scripts_are_clean() -> None:
    scripts = [str(path) for path in (ROOT / "examples").rglob("*.sh")]
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def test_the_scripts_have_the_version_of_the_change_log() -> None:
    newest = re.search(r"^## (\S+)$", read("CHANGELOG.md"), re.MULTILINE)
    texts = [script.read_text(encoding="utf-8") for script in SCRIPTS]
    assert newest
    assert {version for text in texts for version in re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE)} == {
        newest[1]
    }
