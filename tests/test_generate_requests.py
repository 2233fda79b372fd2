"""generate_requests.py from outside: run as a user runs it, its files read back and counted with the bare libraries."""

import ast
import hashlib
import importlib
import inspect
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest

import generate_requests as gen

pytest.importorskip("transformers")
from tests.support.tokenizer_shelf import BUILDERS, CHAT_TEMPLATE, LATIN, TokenizerShelf, spaced_text

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "generate_requests.py"
SOURCE = SCRIPT.read_text(encoding="utf-8")
FULL_MATRIX = os.environ.get("GENERATOR_MATRIX") == "full"
FAMILIES = ["byte-level", "metaspace-bpe", "metaspace-unigram", "wordpiece"]
SECRET = "hf_neverShowThisToAnyone"


@pytest.fixture(scope="session")
def shelf(tmp_path_factory):
    return TokenizerShelf(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch):
    for name in (*gen.TOKEN_VARIABLES, "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    kept = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, kept)


def run(*args, flags=(), **keywords):
    """The script as a process of its own."""
    command = [sys.executable, *flags, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **keywords)


def corpus_in(directory):
    """The lines and the manifest of the only corpus in a directory, where nothing else may lie."""
    path = next(Path(directory).glob("*.jsonl"))
    manifest = path.with_name(path.stem + ".meta.json")
    assert sorted(each.name for each in Path(directory).iterdir()) == sorted([path.name, manifest.name])
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return lines, json.loads(manifest.read_text(encoding="utf-8"))


def generate(output, *args, fresh=False):
    seed = [] if fresh or "--seed" in args else ["--seed", "11"]
    assert gen.main(["--output", str(output), *seed, *map(str, args)]) == 0
    return corpus_in(output)


def one_line_error(capsys_or_result, code=None):
    text = capsys_or_result.stderr if code is None else capsys_or_result.readouterr().err
    lines = [line for line in text.splitlines() if not line.startswith(f"{gen.PROGRAM}: tokenizer:")]
    assert len(lines) == 1, text
    assert lines[0].startswith(f"{gen.PROGRAM}: error: ")
    assert " - " in lines[0], "an error names the way out"
    return lines[0]


def common(sequences):
    """How many leading ids all sequences share, by comparing each place."""
    return sum(1 for _ in itertools.takewhile(lambda place: len(set(place)) == 1, zip(*sequences)))


def texts_of(lines):
    return [line["text"] for line in lines]


def encoded(tokenizer, lines):
    return [found.ids for found in tokenizer.encode_batch(texts_of(lines), add_special_tokens=False)]


# --- the file itself ---------------------------------------------------------------------------------------


def test_it_runs_alone_with_nothing_but_python(tmp_path):
    shutil.copy(SCRIPT, tmp_path / "x.py")
    command = [sys.executable, "-I", "-S", "x.py", "--count", "3"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    lines, _ = corpus_in(tmp_path / "outputs")
    assert len(lines) == 3


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["--count", "none"]], ids=lambda args: args[0])
def test_it_answers_as_fast_as_what_it_must_import(args):
    """Under 0.15 s here; as a ratio, so that a slow machine does not fail it."""

    def best(call):
        elapsed = []
        for _ in range(5):
            started = time.perf_counter()
            call()
            elapsed.append(time.perf_counter() - started)
        return min(elapsed)

    least = [sys.executable, "-I", "-S", "-c", "import argparse, dataclasses, hashlib, json, random, unicodedata"]
    yardstick = best(lambda: subprocess.run(least, check=True))
    assert best(lambda: run(*args, flags=["-I", "-S"])) < 10 * yardstick


def test_only_the_standard_library_is_imported_at_the_top():
    imported = {
        (name or "").split(".")[0]
        for node in ast.parse(SOURCE).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    if sys.version_info >= (3, 10):
        assert imported <= sys.stdlib_module_names
    inner = [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert len(inner) == len([n for n in ast.parse(SOURCE).body if isinstance(n, (ast.Import, ast.ImportFrom))])


def test_the_script_block_names_what_is_imported_lazily():
    block = SOURCE.split("# /// script\n")[1].split("# ///\n")[0]
    named = set(re.findall(r'"([a-z0-9_-]+)>=', block))
    lazily = set(re.findall(r'(?:need|import_module)\("(\w+)', SOURCE))
    by_transformers = {"tokenizers", "huggingface_hub"}  # brought along
    for_transformers = {"protobuf", "sentencepiece"}  # looked for by it, when a model has a *.model file alone
    assert named == lazily - by_transformers | for_transformers
    assert 'requires-python = ">=3.9"' in block


def test_sections_use_only_sections_above():
    titles = re.findall(r"^# === (\d+)\. (.+?)(?: \(pure\))? ===$", SOURCE, re.M)
    listed = re.findall(r"(\d+)\. ([A-Z][a-z]+(?: [a-z]+)*)", gen.__doc__.partition("Sections")[2])
    assert sorted(titles, key=lambda t: int(t[0])) == sorted(listed, key=lambda t: int(t[0])) == titles
    starts = [SOURCE[: found.start()].count("\n") for found in re.finditer(r"^# === \d+\.", SOURCE, re.M)]

    def section(line):
        return sum(start < line for start in starts)

    tree = ast.parse(SOURCE)
    home = {}
    for node in tree.body:
        names = [node.name] if hasattr(node, "name") else []
        names += [t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)]
        home.update(dict.fromkeys(names, section(node.lineno)))
    for name in ast.walk(tree):
        if isinstance(name, ast.Name) and name.id in home:
            assert home[name.id] <= section(name.lineno), f"line {name.lineno} reaches down for {name.id}"


# --- wrong usage -------------------------------------------------------------------------------------------

WRONG = {
    "overlap above 1": ["--prefix-overlap", "1.01"],
    "overlap below 0": ["--prefix-overlap", "-0.1"],
    "overlap nan": ["--prefix-overlap", "nan"],
    "overlap huge exponent": ["--prefix-overlap", "1e999999999"],
    "overlap text": ["--prefix-overlap", "half"],
    "count 0": ["--count", "0"],
    "count text": ["--count", "many"],
    "groups 0": ["--prefix-groups", "0"],
    "more groups than prompts": ["--count", "2", "--prefix-groups", "3"],
    "target 0": ["--approx-input-tokens", "0"],
    "target too large": ["--approx-input-tokens", "10000001"],
    "identical prompts": ["--prefix-overlap", "1.0"],
    "identical prompts in groups": ["--prefix-overlap", "1", "--count", "4", "--prefix-groups", "2"],
    "min above max": "--approx-input-tokens 9 --input-tokens-stdev 2 --min-input-tokens 8 --max-input-tokens 7".split(),
    "target below min": "--approx-input-tokens 9 --input-tokens-stdev 2 --min-input-tokens 10".split(),
    "target above max": "--approx-input-tokens 9 --input-tokens-stdev 2 --max-input-tokens 8".split(),
    "bounds without spread": "--approx-input-tokens 9 --min-input-tokens 3".split(),
    "spread without target": ["--input-tokens-stdev", "3"],
    "negative spread": ["--approx-input-tokens", "9", "--input-tokens-stdev", "-1"],
    "spread of identical": "--approx-input-tokens 9 --prefix-overlap 1 --count 1 --input-tokens-stdev 2".split(),
    "chat without target": ["--count-as", "chat"],
    "unknown way to count": ["--count-as", "words"],
    "negative tolerance": ["--approx-input-tokens", "9", "--token-tolerance", "-1"],
    "output tokens 0": ["--output-tokens", "0"],
    "output tokens text": ["--output-tokens", "9,a"],
    "output tokens beyond all bounds": ["--output-tokens", "1e308,1e308"],
    "output tokens nan": ["--output-tokens", "nan"],
    "spread beyond all bounds": ["--approx-input-tokens", "9", "--input-tokens-stdev", "1e308"],
    "spread infinite": ["--approx-input-tokens", "9", "--input-tokens-stdev", "inf"],
    "unknown language": ["--language", "fr"],
    "language of the tokenizer's words": ["--approx-input-tokens", "9", "--language", "ja"],
    "turns 0": ["--turns", "0"],
    "pause without turns": ["--delay-ms", "5"],
    "negative pause": ["--turns", "2", "--delay-ms", "-5"],
    "length of later turns without turns": ["--approx-input-tokens", "9", "--turn-tokens", "5"],
    "length of later turns alone": ["--turns", "2", "--turn-tokens", "5"],
    "later turns too long": ["--approx-input-tokens", "9", "--turns", "2", "--turn-tokens", "10000001"],
    "trace that is not there": ["--from-trace", "nowhere.jsonl"],
    "trace with a length": ["--from-trace", "nowhere.jsonl", "--approx-input-tokens", "9"],
    "trace with turns": ["--from-trace", "nowhere.jsonl", "--turns", "2"],
    "trace that is a directory": ["--from-trace", "."],
    "blocks without a trace": ["--block-tokens", "16"],
    "negative seed": ["--seed", "-1"],
    "unknown option": ["--tokens", "5"],
    "abbreviated option": ["--approx", "5"],
    "option without value": ["--count"],
    "stray argument": ["stray"],
}


@pytest.mark.parametrize("args", WRONG.values(), ids=WRONG)
def test_wrong_usage_is_one_line_and_exit_2(args, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert gen.main(args) == 2
    one_line_error(capsys, 2)
    assert list(tmp_path.iterdir()) == []


def test_wrong_usage_from_a_process():
    result = run("--count", "0")
    assert (result.returncode, result.stdout) == (2, "")
    assert "at least 1" in one_line_error(result)


def test_a_misspelt_option_does_not_show_its_value(capsys):
    assert gen.main(["--hugingface-token", SECRET]) == 2
    assert gen.main([f"--hugingface-token={SECRET}"]) == 2
    captured = capsys.readouterr()
    assert SECRET not in captured.err
    assert "--hugingface-token" in captured.err


@pytest.mark.parametrize("below", [".", "deep/er"])
def test_an_output_that_is_a_file(below, tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("mine")
    assert gen.main(["--output", str(blocked / below)]) == 2
    one_line_error(capsys, 2)
    assert blocked.read_text() == "mine"


# --- paragraphs --------------------------------------------------------------------------------------------


def test_paragraphs_load_no_package(tmp_path):
    probe = (
        "import sys, generate_requests as g; g.main(sys.argv[1:]); "
        "bad = {'transformers', 'tokenizers', 'tiktoken', 'huggingface_hub', 'jinja2'} & set(sys.modules); "
        "assert not bad, bad"
    )
    command = [sys.executable, "-c", probe, "--output", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("overlap", ["0", "0.25", "0.99"])
def test_paragraphs_read_like_paragraphs_and_share_what_was_asked(overlap, tmp_path):
    options = ["--count", 60, "--prefix-overlap", overlap, "--prefix-groups", 3, "--output-tokens", 7]
    lines, manifest = generate(tmp_path, *options)
    assert len({line["text"] for line in lines}) == 60
    assert all(set(line) == {"text", "prefix_group", "max_tokens"} for line in lines)
    assert manifest["input_tokens"] is None
    assert manifest["tokenizer"] is None
    shared = int(Decimal(overlap) * 120)
    for group in range(3):
        words = [line["text"].split() for line in lines if line["prefix_group"] == group]
        assert len(words) == 20
        assert common(words) == shared
        assert {len(w) for w in words} == {120} if shared else {len(w) for w in words} <= set(range(80, 161))
    for line in lines:
        assert re.fullmatch(r"([A-Z][\w,' -]*\.\s+)*[A-Z][\w,' -]*\.", line["text"]), line["text"]
    if overlap == "0":
        assert all("\n\n" in line["text"] for line in lines)


@pytest.mark.parametrize("words", range(1, 12))
def test_an_english_sentence_has_as_many_words_as_asked(words):
    for seed in range(50):
        made = gen.LANGUAGES["en"].sentence(words, gen.stream(seed))
        assert len(made.split()) == words
        assert made[0].isupper()
        assert made.endswith(".")


@pytest.mark.parametrize("overlap", ["0", "0.5"])
def test_japanese_paragraphs(overlap, tmp_path):
    options = ["--count", 40, "--prefix-overlap", overlap, "--prefix-groups", 2, "--language", "ja"]
    lines, manifest = generate(tmp_path, *options)
    assert "_ja_" in manifest["file"]
    assert manifest["options"]["language"] == "ja"
    texts = [line["text"] for line in lines]
    assert len(set(texts)) == 40
    letters = re.compile(r"[々\u3041-\u3096\u30a0-\u30ff\u4e00-\u9fff0-9]+")
    for text in texts:
        assert text.endswith("。")
        assert all(letters.fullmatch(part) for part in re.split("[。、\n]+", text[:-1])), text
    for group in range(2):
        own = texts[group::2]
        if overlap == "0":
            assert all("\n\n" in text for text in own)
            continue
        shared = common(own) / (sum(map(len, own)) / 20)
        assert 0.4 < shared < 0.6
    assert texts[0][0] != texts[1][0], "groups differ from their first letter on"


# --- exactness ---------------------------------------------------------------------------------------------


def check(lines, tokenizer, target, overlap, groups=1):
    """What is promised of a corpus, counted anew with the bare library."""
    ids = encoded(tokenizer, lines)
    prefix = int(Decimal(str(overlap)) * target)
    assert {len(one) for one in ids} == {target}
    assert {line["input_tokens"] for line in lines} == {target}
    assert {line["prefix_tokens"] for line in lines} == {prefix}
    assert len({line["text"] for line in lines}) == len(lines) == len(set(map(tuple, ids)))
    sizes = Counter(line["prefix_group"] for line in lines)
    assert sorted(sizes) == list(range(groups))
    assert max(sizes.values()) - min(sizes.values()) <= 1
    firsts = []
    for group in range(groups):
        own = [one for one, line in zip(ids, lines) if line["prefix_group"] == group]
        assert common(own) == prefix
        firsts.append({one[0] for one in own})
    assert sum(map(len, firsts)) == len(set().union(*firsts)), "groups differ from their first token on"
    added = set(tokenizer.get_added_tokens_decoder())
    used = {each for one in ids for each in one}
    assert not used & added
    assert not any(re.fullmatch(r"<0x..>", tokenizer.id_to_token(each)) for each in used)
    text = "".join(line["text"] for line in lines)
    assert text.isprintable()
    assert "\ufffd" not in text
    assert all(line["text"] == line["text"].strip() and "  " not in line["text"] for line in lines)


@pytest.mark.parametrize("overlap", ["0", "0.3", "0.9"])
@pytest.mark.parametrize("target", [16, 100, 512, 4096])
@pytest.mark.parametrize("family", FAMILIES)
def test_matrix(family, target, overlap, shelf, tmp_path):
    count = 1000 if FULL_MATRIX or target <= 100 else 24 if target > 1000 else 100
    options = ["--count", count, "--approx-input-tokens", target, "--prefix-overlap", overlap]
    lines, manifest = generate(tmp_path, *options, "--tokenizer-model", shelf.path(family))
    assert manifest["exact_prompts"] == len(lines) == count
    check(lines, shelf.load(shelf.path(family)), target, overlap)


@pytest.mark.parametrize("family", sorted(set(BUILDERS) - set(FAMILIES)))
def test_odd_vocabularies(family, shelf, tmp_path):
    tokenizer = shelf.load(shelf.path(family))
    for target, overlap, count in ((40, "0", 300), (97, "0.5", 300), (600, "0.9", 40), (4000, "0", 5)):
        options = ["--count", count, "--approx-input-tokens", target, "--prefix-overlap", overlap]
        output = tmp_path / str(target)
        lines, _ = generate(output, *options, "--tokenizer-model", shelf.path(family), "--token-tolerance", 0)
        check(lines, tokenizer, target, overlap)


@pytest.mark.parametrize("family", ["byte-level", "wordpiece", "byte-level-bilingual", "byte-level-japanese"])
def test_text_is_made_of_words_of_the_main_alphabet(family, shelf, tmp_path):
    model = shelf.path(family)
    lines, _ = generate(tmp_path, "--approx-input-tokens", 60, "--tokenizer-model", model)
    words = [word for line in lines for word in line["text"].split()]
    alphabets = Counter(map(gen.alphabet, words))
    assert len(alphabets) == 1, alphabets
    assert all(word.isalpha() for word in words)
    assert sum(map(len, words)) / len(words) >= 2
    assert len(set(words)) > 100


@pytest.mark.parametrize("overlap", ["0", "0.5", "0.29"])
def test_any_two_prompts_of_a_group_part_right_after_the_prefix(overlap, shelf, tmp_path):
    options = ["--count", 150, "--approx-input-tokens", 100, "--prefix-overlap", overlap]
    lines, _ = generate(tmp_path, *options, "--tokenizer-model", shelf.path("byte-level"))
    prefix = int(Decimal(overlap) * 100)
    ids = encoded(shelf.load(shelf.path("byte-level")), lines)
    assert len({one[prefix] for one in ids}) == 150


def test_an_overlap_is_taken_as_typed():
    assert int(0.29 * 100) == 28, "what floats would make of it"
    assert gen.exact_floor(Decimal("0.29"), 100) == 29
    assert gen.exact_floor(gen.fraction("1e-999999999"), 100) == 0


@pytest.mark.parametrize(("count", "groups"), [(100, 7), (20, 20)])
def test_groups(count, groups, shelf, tmp_path):
    options = ["--count", count, "--prefix-groups", groups, "--approx-input-tokens", 64, "--prefix-overlap", 0.5]
    model = shelf.path("metaspace-bpe")
    lines, _ = generate(tmp_path, *options, "--tokenizer-model", model)
    ids = encoded(shelf.load(model), lines)
    assert {len(one) for one in ids} == {64}
    if groups < count:
        check(lines, shelf.load(model), 64, "0.5", groups)
    else:
        assert len({one[0] for one in ids}) == count


def test_groups_without_a_prefix_differ_from_the_first_token(shelf, tmp_path):
    options = ["--count", 90, "--prefix-groups", 3, "--approx-input-tokens", 20]
    lines, _ = generate(tmp_path, *options, "--tokenizer-model", shelf.path("wordpiece"))
    check(lines, shelf.load(shelf.path("wordpiece")), 20, 0, 3)


def test_overlap_1_where_every_prompt_is_its_own_group(shelf, tmp_path):
    options = ["--count", 9, "--prefix-groups", 9, "--approx-input-tokens", 33, "--prefix-overlap", "1.0"]
    lines, _ = generate(tmp_path, *options, "--tokenizer-model", shelf.path("byte-level"))
    ids = encoded(shelf.load(shelf.path("byte-level")), lines)
    assert [len(one) for one in ids] == [33] * 9
    assert {line["prefix_tokens"] for line in lines} == {33}
    assert len({one[0] for one in ids}) == 9


def test_prompts_of_one_token(shelf, tmp_path):
    options = ["--count", 100, "--approx-input-tokens", 1, "--tokenizer-model", shelf.path("metaspace-bpe")]
    lines, _ = generate(tmp_path, *options)
    check(lines, shelf.load(shelf.path("metaspace-bpe")), 1, 0)


def test_more_prompts_than_there_are_texts(shelf, tmp_path, capsys):
    model = shelf.path("bytes-only")
    options = ["--count", "100", "--approx-input-tokens", "1", "--tokenizer-model", str(model)]
    assert gen.main([*options, "--output", str(tmp_path / "out"), "--token-tolerance", "0"]) == 1
    assert "tell 100 prompts apart" in one_line_error(capsys, 1)
    assert not (tmp_path / "out").exists()


def test_a_spread_of_lengths(shelf, tmp_path):
    options = "--count 400 --approx-input-tokens 100 --input-tokens-stdev 20 --max-input-tokens 130".split()
    model = shelf.path("byte-level")
    lines, manifest = generate(tmp_path, *options, "--prefix-overlap", 0.5, "--tokenizer-model", model)
    ids = encoded(shelf.load(model), lines)
    lengths = [len(one) for one in ids]
    assert lengths == [line["input_tokens"] for line in lines]
    assert 51 <= min(lengths) < 70
    assert 120 < max(lengths) <= 130
    mean = sum(lengths) / 400
    assert 92 < mean < 104
    assert manifest["input_tokens"] == manifest["asked_tokens"]
    assert manifest["input_tokens"]["mean"] == pytest.approx(mean)
    assert manifest["exact_prompts"] == 400
    assert common(ids) == 50 == manifest["prefix_tokens"]
    assert len(set(map(tuple, ids))) == 400


def test_a_least_length_within_the_prefix_is_refused(shelf, tmp_path, capsys):
    options = "--approx-input-tokens 100 --input-tokens-stdev 20 --min-input-tokens 40 --prefix-overlap 0.5".split()
    assert gen.main([*options, "--tokenizer-model", str(shelf.path("byte-level")), "--output", str(tmp_path)]) == 1
    assert "50 of them shared" in one_line_error(capsys, 1)
    assert list(tmp_path.iterdir()) == []


def test_output_tokens(tmp_path):
    fixed, _ = generate(tmp_path / "fixed", "--output-tokens", "64")
    assert {line["max_tokens"] for line in fixed} == {64}
    spread, _ = generate(tmp_path / "spread", "--output-tokens", "64,40", "--count", 500)
    drawn = [line["max_tokens"] for line in spread]
    assert min(drawn) >= 1
    assert len(set(drawn)) > 60
    assert 55 < sum(drawn) / 500 < 75


class TwoTokensAWord:
    """A tokenizer that cannot make an odd number of tokens."""

    about = {"kind": "test", "name": "pairs", "vocabulary": 400}  # noqa: RUF012
    names = ["".join(letters) for letters in itertools.product("bdfgklmn", "aeiou", "bdfgklmn", "a")]  # noqa: RUF012

    def encode(self, texts):
        places = {name: place for place, name in enumerate(self.names)}
        return [
            [each for word in text.split() for each in (2 * places.get(word, -1), 2 * places.get(word, -1) + 1)]
            for text in texts
        ]

    def decode(self, sequences):
        return [" ".join(self.names[each // 2] for each in ids[::2] if each >= 0) for ids in sequences]

    def ids(self):
        return list(range(2 * len(self.names)))

    def pieces(self, ids):
        return [self.names[each // 2] if each >= 0 else None for each in ids]


@pytest.mark.parametrize(("tolerance", "code"), [("1", 0), ("0", 1)])
def test_what_cannot_be_exact_is_reported_or_refused(tolerance, code, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gen, "load_tokenizer", lambda options: TwoTokensAWord())
    options = ["--count", "20", "--approx-input-tokens", "11", "--token-tolerance", tolerance]
    assert gen.main([*options, "--output", str(tmp_path)]) == code
    if code:
        one_line_error(capsys, code)
        assert list(tmp_path.iterdir()) == []
        return
    lines, manifest = corpus_in(tmp_path)
    assert {line["input_tokens"] for line in lines} <= {10, 12}
    assert manifest["exact_prompts"] == 0
    assert "exact: 0 of 20" in capsys.readouterr().out


def test_the_nth_sequence_of_words_is_another_for_each_n():
    words = [gen.Word(text, tuple(range(cost))) for text, cost in (("a", 1), ("b", 2), ("c", 2), ("d", 3))]
    supply = gen.Supply(words)
    cost = {word.text: len(word.ids) for word in words}
    for tokens in range(7):
        brute = {
            tried
            for length in range(tokens + 1)
            for tried in itertools.product("abcd", repeat=length)
            if sum(cost[text] for text in tried) == tokens
        }
        assert {tuple(supply.nth(n, tokens)) for n in range(supply.ways(tokens))} == brute
        assert supply.ways(tokens) == len(brute)
        assert sum(cost[text] for text in supply.fill(tokens, gen.stream(1))) == tokens


# --- sessions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count_as", ["raw", "chat"])
def test_sessions_of_turns_of_an_exact_length(count_as, shelf, tmp_path, capsys):
    model = shelf.chat("byte-level")
    options = ["--count", 40, "--turns", 4, "--approx-input-tokens", 80, "--turn-tokens", 13, "--delay-ms", 250]
    options += ["--prefix-overlap", 0.5, "--count-as", count_as, "--output-tokens", "20,5", "--prefix-groups", 2]
    lines, manifest = generate(tmp_path, *options, "--tokenizer-model", model)
    assert all(set(line) == {"turns", "turn_tokens", "prefix_tokens", "prefix_group"} for line in lines)
    assert {tuple(line["turn_tokens"]) for line in lines} == {(80, 13, 13, 13)}
    first = [line["turns"][0]["content"] for line in lines]
    later = [turn["content"] for line in lines for turn in line["turns"][1:]]
    if count_as == "chat":
        first = [f"<|start|>user\n{text}<|end|>\n<|start|>assistant\n" for text in first]
    tokenizer = shelf.load(model)
    ids, later_ids = ([one.ids for one in tokenizer.encode_batch(t, add_special_tokens=False)] for t in (first, later))
    assert {len(one) for one in ids} == {80}
    assert [common(ids[group::2]) for group in range(2)] == [40, 40]
    assert {len(one) for one in later_ids} == {13}
    assert len({one[0] for one in later_ids}) == 120, "no two turns begin alike"
    assert {tuple(turn) for line in lines for turn in line["turns"][:1]} == {("content", "max_tokens")}
    assert {turn["delay_ms"] for line in lines for turn in line["turns"][1:]} == {250}
    assert len({turn["max_tokens"] for line in lines for turn in line["turns"]}) > 10
    assert manifest["exact_prompts"] == 160
    assert manifest["later_turn_tokens"]["max"] == 13
    assert "exact: 160 of 160" in capsys.readouterr().out


def test_sessions_of_paragraphs(tmp_path):
    lines, manifest = generate(tmp_path, "--count", 6, "--turns", 3)
    assert all(set(line) == {"turns", "prefix_group"} for line in lines)
    contents = [turn.pop("content") for line in lines for turn in line["turns"]]
    assert len(set(contents)) == 18
    assert all(turn == {} for line in lines for turn in line["turns"])
    assert "_turns3_" in manifest["file"]


# --- traces -----------------------------------------------------------------------------------------------

BLOCK = 16


def write_trace(path, requests):
    """(input length, hash ids) of each request, as lines of Mooncake's."""
    rows = [
        {"timestamp": 100 * n, "input_length": tokens, "output_length": n, "hash_ids": ids}
        for n, (tokens, ids) in enumerate(requests)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def random_trace(count):
    """Requests that go on from what earlier ones had, as conversations do."""
    rng = random.Random(5)
    chains: list[list[int]] = [[]]
    requests, fresh = [], itertools.count()
    for _ in range(count):
        base = rng.choice(chains)
        ids = base[: rng.randint(0, len(base))] + [next(fresh) for _ in range(rng.randint(1, 4))]
        tokens = BLOCK * (len(ids) - 1) + rng.randint(6, BLOCK)
        chains.append(ids if tokens % BLOCK == 0 else ids[:-1])
        requests.append((tokens, ids))
    return requests


@pytest.mark.parametrize(
    "family", ["byte-level", "metaspace-bpe", "wordpiece", "metaspace-japanese", "byte-level-small"]
)
def test_a_trace_is_made_of_shared_blocks(family, shelf, tmp_path, capsys):
    requests = random_trace(200)
    model = shelf.path(family)
    options = ["--from-trace", write_trace(tmp_path / "mooncake.jsonl", requests), "--block-tokens", BLOCK]
    lines, manifest = generate(tmp_path / "out", *options, "--tokenizer-model", model)
    ids = encoded(shelf.load(model), lines)
    assert [len(one) for one in ids] == [tokens for tokens, _ in requests] == [line["input_tokens"] for line in lines]
    assert [line["timestamp"] for line in lines] == [100 * n for n in range(200)]
    assert [line["max_tokens"] for line in lines] == [max(1, n) for n in range(200)]
    for n, (one, (_, hashes)) in enumerate(zip(ids, requests)):
        most = 0
        for earlier, (_, others) in zip(ids[:n], requests):
            alike = BLOCK * common([hashes, others])
            found = common([one, earlier])
            most = max(most, found)
            extra = 1 if family == "metaspace-japanese" else 0  # there, every word begins with a space of its own
            assert min(alike, len(one), len(earlier)) <= found <= alike + extra
        assert most - 1 <= lines[n]["prefix_tokens"] <= most
    assert manifest["exact_prompts"] == 200
    assert re.search(r"shared with earlier lines: \d+\.\d%", capsys.readouterr().out)
    assert manifest["file"].startswith("requests_200_trace_mooncake_")
    assert set(lines[0]) == {"text", "input_tokens", "prefix_tokens", "timestamp", "max_tokens"}


def test_a_trace_counted_in_the_chat_template(shelf, tmp_path):
    requests = [(48, [1, 2, 3]), (64, [1, 2, 4, 5]), (33, [1, 2, 6]), (48, [1, 2, 3]), (25, [7, 8]), (48, [])]
    model = shelf.chat("byte-level")
    options = ["--from-trace", write_trace(tmp_path / "t", requests), "--block-tokens", BLOCK, "--count-as", "chat"]
    lines, _ = generate(tmp_path / "out", *options, "--tokenizer-model", model)
    sent = [f"<|start|>user\n{line['text']}<|end|>\n<|start|>assistant\n" for line in lines]
    ids = [one.ids for one in shelf.load(model).encode_batch(sent, add_special_tokens=False)]
    assert [len(one) for one in ids] == [tokens for tokens, _ in requests]
    assert common(ids[:2]) == 32 == lines[1]["prefix_tokens"]
    assert ids[0] == ids[3]
    assert lines[3]["prefix_tokens"] == 48
    head = common([ids[0], ids[4]])
    assert head == lines[4]["prefix_tokens"] == lines[5]["prefix_tokens"] < BLOCK
    tail = common([ids[0][::-1], ids[4][::-1]])
    assert common([ids[0], ids[2]]) == 33 - tail == lines[2]["prefix_tokens"]


def test_the_first_requests_of_a_trace_and_the_same_bytes_for_a_seed(shelf, tmp_path, monkeypatch):
    trace = write_trace(tmp_path / "t", random_trace(50))
    options = ["--from-trace", trace, "--block-tokens", BLOCK, "--tokenizer-model", shelf.path("byte-level")]
    all_lines, manifest = generate(tmp_path / "all", *options)
    monkeypatch.setattr(gen, "BATCH_TOKENS", 1)
    assert generate(tmp_path / "again", *options)[1]["sha256"] == manifest["sha256"]
    some, _ = generate(tmp_path / "some", *options, "--count", 20)
    assert texts_of(some) == texts_of(all_lines)[:20]


BAD_TRACES = {
    "no JSON": "timestamp",
    "no object": "[1]",
    "no timestamp": '{"input_length": 5, "output_length": 1}',
    "no length": '{"timestamp": 5, "output_length": 1}',
    "length 0": '{"timestamp": 5, "input_length": 0, "output_length": 1}',
    "length as text": '{"timestamp": 5, "input_length": "5", "output_length": 1}',
    "length true": '{"timestamp": 5, "input_length": true, "output_length": 1}',
    "negative timestamp": '{"timestamp": -5, "input_length": 5, "output_length": 1}',
    "timestamp nan": '{"timestamp": NaN, "input_length": 5, "output_length": 1}',
    "backwards": "\n".join(f'{{"timestamp": {t}, "input_length": 5, "output_length": 1}}' for t in (5, 4)),
    "too many blocks": '{"timestamp": 5, "input_length": 512, "output_length": 1, "hash_ids": [1, 2]}',
    "too few blocks": '{"timestamp": 5, "input_length": 1537, "output_length": 1, "hash_ids": [1, 2]}',
    "blocks of no list": '{"timestamp": 5, "input_length": 512, "output_length": 1, "hash_ids": "12"}',
    "empty": "\n\n",
    "too long": '{"timestamp": 5, "input_length": 10000001, "output_length": 1}',
}


@pytest.mark.parametrize("text", BAD_TRACES.values(), ids=BAD_TRACES)
def test_a_bad_trace_is_one_line_and_exit_2(text, tmp_path, capsys):
    (tmp_path / "trace").write_text(text)
    assert gen.main(["--from-trace", str(tmp_path / "trace"), "--output", str(tmp_path / "out")]) == 2
    assert str(tmp_path / "trace") in one_line_error(capsys, 2)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_joins_words_is_refused_for_a_trace(shelf, tmp_path, capsys):
    trace = write_trace(tmp_path / "t", [(3000, [1, 2, 3, 4, 5, 6])])
    options = ["--from-trace", str(trace), "--tokenizer-model", str(shelf.path("metaspace-across-words"))]
    assert gen.main([*options, "--output", str(tmp_path / "out")]) == 1
    assert "joins words across spaces" in one_line_error(capsys, 1)
    assert not (tmp_path / "out").exists()


# --- chat --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES[:3])
@pytest.mark.parametrize("overlap", ["0", "0.5"])
def test_chat_counts_what_the_template_makes_of_it(family, overlap, shelf, tmp_path):
    model = shelf.chat(family)
    options = ["--count", 60, "--approx-input-tokens", 80, "--count-as", "chat", "--prefix-overlap", overlap]
    lines, _ = generate(tmp_path, *options, "--tokenizer-model", model)
    sent = [f"<|start|>user\n{line['text']}<|end|>\n<|start|>assistant\n" for line in lines]
    ids = [one.ids for one in shelf.load(model).encode_batch(sent, add_special_tokens=False)]
    assert {len(one) for one in ids} == {80} == {line["input_tokens"] for line in lines}
    assert {common(ids)} == {line["prefix_tokens"] for line in lines}
    head = len(shelf.load(model).encode("<|start|>user\n", add_special_tokens=False).ids)
    assert common(ids) == 40 if overlap == "0.5" else common(ids) >= head
    assert len(set(map(tuple, ids))) == 60


def write_template(shelf, directory, template, **files):
    directory.mkdir()
    shutil.copy(shelf.path("byte-level") / "tokenizer.json", directory)
    config = {"chat_template": template, "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (directory / name.replace("_jinja", ".jinja")).write_text(text)
    return directory


TEMPLATES = {
    "message parts": "{% for m in messages %}{% for p in m['content'] if p['type'] is defined %}"
    "[{{ p['text'] }}]{% endfor %}{% endfor %}",
    "generation block": "{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% generation %}{{ eos_token }}{% endgeneration %}",
    "helpers": "{% if not messages %}{{ raise_exception('none') }}{% endif %}{{ strftime_now('%Y') }}"
    "{% for m in messages %}{{ [1] | tojson }}{{ m.content }}{% break %}{% endfor %}!",
    "several": [
        {"name": "tool_use", "template": "x"},
        {"name": "default", "template": "U {{ messages[0].content }} A"},
    ],
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_chat_templates_as_they_come(template, shelf, tmp_path):
    model = write_template(shelf, tmp_path / "model", template)
    options = ["--count", 10, "--approx-input-tokens", 50, "--count-as", "chat", "--tokenizer-model", model]
    lines, manifest = generate(tmp_path / "out", *options)
    assert manifest["exact_prompts"] == 10
    bare = [len(one) for one in encoded(shelf.load(model), lines)]
    assert max(bare) < 50


def test_a_template_file_goes_before_the_configuration(shelf, tmp_path):
    model = write_template(shelf, tmp_path / "model", "wrong", chat_template_jinja="{{ messages[0].content }}")
    options = ["--count", 4, "--approx-input-tokens", 30, "--count-as", "chat", "--tokenizer-model", model]
    lines, _ = generate(tmp_path / "out", *options)
    check(lines, shelf.load(model), 30, 0)


@pytest.mark.parametrize("template", ["constant", "{{ raise_exception('no') }}", "{% if %}", None])
def test_templates_that_cannot_be_used(template, shelf, tmp_path, capsys):
    model = write_template(shelf, tmp_path / "model", template)
    options = ["--approx-input-tokens", "50", "--count-as", "chat", "--tokenizer-model", str(model)]
    assert gen.main([*options, "--output", str(tmp_path / "out")]) == 1
    assert "--count-as raw" in one_line_error(capsys, 1)
    assert not (tmp_path / "out").exists()


def test_a_target_within_the_template(shelf, tmp_path, capsys):
    options = ["--approx-input-tokens", "8", "--count-as", "chat", "--tokenizer-model", str(shelf.chat("byte-level"))]
    assert gen.main([*options, "--output", str(tmp_path)]) == 1
    assert "closing the chat template" in one_line_error(capsys, 1)


# --- tokenizers --------------------------------------------------------------------------------------------


@pytest.fixture
def small_openai_encoding(shelf, monkeypatch):
    """gpt-3.5-turbo with a vocabulary trained here, put where tiktoken keeps what it has loaded."""
    tiktoken = pytest.importorskip("tiktoken")
    from tokenizers import pre_tokenizers

    visible = sorted(pre_tokenizers.ByteLevel.alphabet(), key=ord)
    printable = [b for b in range(256) if chr(b) in visible]
    byte_of = {chr(b): b for b in printable}
    byte_of.update({chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in printable)})
    vocabulary = shelf.load(shelf.path("byte-level")).get_vocab(with_added_tokens=False)
    words = sorted((i, name) for name, i in vocabulary.items() if not name.startswith("<"))
    ranks = {bytes(byte_of[char] for char in name): rank for rank, (_, name) in enumerate(words)}
    pattern = r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s+"""
    encoding = tiktoken.Encoding(
        "cl100k_base", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks) + 3}
    )
    import tiktoken.registry

    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "cl100k_base", encoding)
    return encoding


@pytest.mark.parametrize("overlap", ["0", "0.3", "0.9"])
def test_openai_names(overlap, small_openai_encoding, tmp_path, capsys):
    options = ["--count", 200, "--approx-input-tokens", 90, "--prefix-overlap", overlap]
    lines, manifest = generate(tmp_path, *options, "--tokenizer-model", "gpt-3.5-turbo")
    ids = [small_openai_encoding.encode_ordinary(line["text"]) for line in lines]
    assert {len(one) for one in ids} == {90}
    assert common(ids) == int(Decimal(overlap) * 90)
    assert len(set(map(tuple, ids))) == 200
    assert manifest["tokenizer"]["name"] == "cl100k_base"
    assert "cl100k_base (tiktoken" in capsys.readouterr().err


def test_openai_chat_is_counted_by_the_published_formula(small_openai_encoding, tmp_path):
    options = ["--count", 20, "--approx-input-tokens", 50, "--count-as", "chat", "--tokenizer-model", "gpt-3.5-turbo"]
    lines, _ = generate(tmp_path, *options)
    assert {len(small_openai_encoding.encode_ordinary(line["text"])) + 7 for line in lines} == {50}


def refuse_to_download(place):
    raise OSError(f"a test may not download {place}")


@pytest.mark.parametrize(("model", "name"), [("gpt-3.5-turbo", "cl100k_base"), ("gpt-4o", "o200k_base")])
def test_real_openai_encodings(model, name, tmp_path, monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")
    try:
        with monkeypatch.context() as patch:
            patch.setattr("tiktoken.load.read_file", refuse_to_download)
            encoding = tiktoken.get_encoding(name)
    except OSError:
        pytest.skip(f"{name} is not in tiktoken's cache, and tests download nothing")
    for target, overlap in itertools.product((16, 100, 512, *[4096] * FULL_MATRIX), ("0", "0.3", "0.9")):
        options = ["--count", 1000 if FULL_MATRIX else 100, "--approx-input-tokens", target]
        output = tmp_path / f"{target}-{overlap}"
        lines, _ = generate(output, *options, "--prefix-overlap", overlap, "--tokenizer-model", model)
        ids = encoding.encode_ordinary_batch([line["text"] for line in lines])
        assert {len(one) for one in ids} == {target}
        assert common(ids) == int(Decimal(overlap) * target)
        assert len(set(map(tuple, ids))) == len(lines)


def fill_hub_cache(home, name, source):
    """What the Hub's client leaves behind after a download."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    for path in source.iterdir():
        shutil.copy(path, snapshot)
    (snapshot / "config.json").write_text('{"model_type": "gpt2"}')


NO_NETWORK = """
import socket, sys
def refuse(*args, **kwargs):
    print("touched the network", file=sys.stderr)
    raise OSError("this machine has no network")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""


@pytest.fixture
def no_network(tmp_path):
    """An environment in which every Python process that reaches for the network says so and fails."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NO_NETWORK)
    return {**os.environ, "HF_HOME": str(tmp_path), "PYTHONPATH": str(tmp_path / "site")}


@pytest.mark.parametrize("offline", ["1", "0"])
def test_a_cached_hub_model_needs_no_network(offline, no_network, shelf, tmp_path):
    fill_hub_cache(tmp_path, "some/model", shelf.chat("byte-level"))
    options = ["--approx-input-tokens", 64, "--count", 10, "--count-as", "chat", "--tokenizer-model", "some/model"]
    result = run(*options, "--output", tmp_path / "out", env={**no_network, "HF_HUB_OFFLINE": offline})
    assert result.returncode == 0, result.stderr
    assert "asking the Hugging Face Hub" not in result.stderr
    assert offline == "0" or "touched the network" not in result.stderr
    _, manifest = corpus_in(tmp_path / "out")
    assert manifest["tokenizer"]["kind"] == "huggingface"
    assert manifest["exact_prompts"] == 10


def test_a_local_path_never_touches_the_network(no_network, shelf, tmp_path):
    options = ["--approx-input-tokens", 64, "--count-as", "chat", "--tokenizer-model", shelf.chat("byte-level")]
    result = run(*options, "--output", tmp_path / "out", env={**no_network, "HF_HUB_OFFLINE": "0"})
    assert result.returncode == 0
    assert result.stderr.startswith(f"{gen.PROGRAM}: tokenizer: ")
    assert result.stderr.count("\n") == 1


def test_a_path_goes_before_an_openai_name(shelf, tmp_path, monkeypatch):
    shutil.copytree(shelf.path("byte-level"), tmp_path / "gpt-4")
    monkeypatch.chdir(tmp_path)
    _, manifest = generate(tmp_path / "out", "--approx-input-tokens", 20, "--tokenizer-model", "gpt-4")
    assert manifest["tokenizer"]["kind"] == "path"
    _, manifest = generate(tmp_path / "2", "--approx-input-tokens", 20, "--tokenizer-model", "gpt-4/tokenizer.json")
    assert manifest["tokenizer"]["kind"] == "path"


@pytest.mark.parametrize("name", ["no/such-model", "/no/such/path", "no such name", "gpt2", ""])
def test_a_tokenizer_that_is_nowhere(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    options = ["--approx-input-tokens", "9", "--tokenizer-model", name, "--output", str(tmp_path / "out")]
    assert gen.main(options) == 1
    message = one_line_error(capsys, 1)
    for part in ("no such path", "Hugging Face", "HF_HUB_OFFLINE", "--huggingface-token", "tiktoken"):
        assert part in message or not name
    assert SECRET not in message
    assert not (tmp_path / "out").exists()


def test_an_openai_encoding_that_cannot_be_downloaded(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tiktoken")
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.setattr("tiktoken.load.read_file", refuse_to_download)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    options = ["--approx-input-tokens", "9", "--tokenizer-model", "gpt-4o", "--output", str(tmp_path / "out")]
    assert gen.main(options) == 1
    message = one_line_error(capsys, 1)
    assert "OpenAI" in message
    assert "TIKTOKEN_CACHE_DIR" in message


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}'])
def test_a_damaged_tokenizer(content, tmp_path, capsys):
    (tmp_path / "tokenizer.json").write_text(content)
    options = ["--approx-input-tokens", "9", "--tokenizer-model", str(tmp_path), "--output", str(tmp_path / "out")]
    assert gen.main(options) == 1
    one_line_error(capsys, 1)
    assert not (tmp_path / "out").exists()


def test_a_directory_without_a_tokenizer(tmp_path, capsys):
    assert gen.main(["--approx-input-tokens", "9", "--tokenizer-model", str(tmp_path)]) == 1
    assert "tokenizer.json" in one_line_error(capsys, 1)


def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys, shelf):
    monkeypatch.setitem(sys.modules, "transformers", None)
    options = ["--approx-input-tokens", "9", "--tokenizer-model", str(shelf.path("byte-level"))]
    assert gen.main([*options, "--output", str(tmp_path / "out")]) == 1
    assert "pip install transformers" in one_line_error(capsys, 1)


def test_where_the_token_comes_from(monkeypatch, tmp_path):
    """From the option, else from the variable that only this script knows, else the Hub's client looks for it."""
    seen = []

    def load(name, token, **about):
        seen.append(token)
        raise OSError("not there")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", load)
    asked = ["--approx-input-tokens", "9", "--tokenizer-model", "gated/model", "--output", str(tmp_path / "out")]
    assert gen.main(asked) == 1
    monkeypatch.setenv("HUGGINGFACE_TOKEN", "from the environment")
    assert gen.main(asked) == 1
    assert gen.main([*asked, "--huggingface-token", SECRET]) == 1
    assert seen == [None, "from the environment", SECRET]
    assert SECRET not in repr(gen.parsed(["--huggingface-token", SECRET]))


def test_the_token_reaches_no_output(shelf, tmp_path):
    options = ["--approx-input-tokens", 20, "--tokenizer-model", shelf.path("byte-level")]
    result = run(*options, "--huggingface-token", SECRET, "--output", tmp_path)
    assert result.returncode == 0
    written = "".join(path.read_text() for path in tmp_path.iterdir())
    assert SECRET not in result.stdout + result.stderr + written


@pytest.mark.parametrize("variable", [None, *gen.TOKEN_VARIABLES])
def test_the_token_is_struck_out_of_what_a_library_says(variable, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise ValueError(f"401 for {SECRET}")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    options = ["--approx-input-tokens", "9", "--tokenizer-model", "gated/model", "--output", str(tmp_path / "out")]
    if variable:
        monkeypatch.setenv(variable, SECRET)
    else:
        options += ["--huggingface-token", SECRET]
    assert gen.main(options) == 1
    assert "401 for ***" in one_line_error(capsys, 1)


def sentencepiece_model(shelf, directory, file_name, tokenizer_class, kind):
    """A directory as older models have it: a SentencePiece file, and no tokenizer.json."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    directory.mkdir()
    (directory / "text").write_text("\n".join(spaced_text(LATIN)))
    layout = {"vocab_size": 600, "model_type": kind, "minloglevel": 2, "pad_id": 3, "byte_fallback": kind == "bpe"}
    trainer.train(input=str(directory / "text"), model_prefix=str(directory / "m"), **layout)
    (directory / "m.model").rename(directory / file_name)
    (directory / "text").unlink()
    (directory / "config.json").write_text('{"model_type": "gpt2"}')
    config = {"tokenizer_class": tokenizer_class, "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("count_as", ["raw", "chat"])
def test_a_slow_tokenizer(count_as, shelf, tmp_path):
    """One that transformers has no compiled form of; counted anew by transformers itself."""
    transformers = importlib.import_module("transformers")
    model = sentencepiece_model(shelf, tmp_path / "slow", "spiece.model", "GPTSw3Tokenizer", "unigram")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(model))
    assert not tokenizer.is_fast
    options = ["--count", 30, "--approx-input-tokens", 60, "--prefix-overlap", 0.5, "--count-as", count_as]
    lines, manifest = generate(tmp_path / "out", *options, "--tokenizer-model", model)
    texts = [line["text"] for line in lines]
    if count_as == "chat":
        texts = [f"<|start|>user\n{text}<|end|>\n<|start|>assistant\n" for text in texts]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert {len(one) for one in ids} == {60} == {line["input_tokens"] for line in lines}
    assert common(ids) == 30
    assert len(set(map(tuple, ids))) == 30
    assert manifest["tokenizer"]["fast"] is False


def test_a_model_with_a_sentencepiece_file_alone(shelf, tmp_path):
    pytest.importorskip("google.protobuf", reason="protobuf is not installed")
    transformers = importlib.import_module("transformers")
    model = sentencepiece_model(shelf, tmp_path / "llama", "tokenizer.model", "LlamaTokenizer", "bpe")
    (model / "config.json").write_text('{"model_type": "llama"}')
    lines, _ = generate(tmp_path / "out", "--count", 30, "--approx-input-tokens", 60, "--tokenizer-model", model)
    ids = transformers.AutoTokenizer.from_pretrained(str(model))(texts_of(lines), add_special_tokens=False)["input_ids"]
    assert {len(one) for one in ids} == {60}


def test_code_of_a_repository_is_run_only_when_told(shelf, tmp_path, capsys):
    model = shutil.copytree(shelf.path("byte-level"), tmp_path / "own code")
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    (model / "own.py").write_text("from transformers import PreTrainedTokenizerFast as Own\nOwn.is_own = True\n")
    asked = ["--approx-input-tokens", "20", "--tokenizer-model", str(model), "--output"]
    assert gen.main([*asked, str(tmp_path / "out")]) == 1
    assert "--trust-remote-code" in one_line_error(capsys, 1)


# --- the file that is written ------------------------------------------------------------------------------


def test_the_manifest_describes_the_file(shelf, tmp_path, capsys):
    options = ["--count", 30, "--approx-input-tokens", 40, "--prefix-overlap", 0.25, "--seed", 5]
    lines, manifest = generate(tmp_path, *options, "--tokenizer-model", shelf.path("byte-level"), "--output-tokens", 8)
    data = (tmp_path / manifest["file"]).read_bytes()
    assert manifest["sha256"] == hashlib.sha256(data).hexdigest()
    assert manifest["bytes"] == len(data)
    assert manifest["options"]["seed"] == 5
    assert manifest["options"]["token_tolerance"] == 5
    assert manifest["options"]["prefix_overlap"] == 0.25
    assert manifest["prompts"] == manifest["exact_prompts"] == len(lines) == 30
    assert manifest["input_tokens"] == {"min": 40, "mean": 40, "max": 40, "stdev": 0}
    assert manifest["prefix_tokens"] == 10
    assert manifest["tokenizer"]["transformers"]
    assert len(manifest["tokenizer"]["vocabulary_sha256"]) == 64
    assert manifest["generator"]["version"] == gen.__version__
    out = capsys.readouterr().out
    assert "exact: 30 of 30 (100.0%)" in out
    assert "asked 10 tokens, reached 10" in out
    assert "seed: 5" in out
    assert set(lines[0]) == {"text", "input_tokens", "prefix_tokens", "prefix_group", "max_tokens"}


def test_the_name_says_what_is_in_it(shelf, tmp_path):
    _, manifest = generate(tmp_path / "a", "--count", 3, "--tokenizer-model", "Qwen/Qwen3-8B")
    assert manifest["file"] == "requests_3_tokensnatural_overlap0.0_Qwen-Qwen3-8B_seed11.jsonl"
    model = shelf.path("byte-level")
    options = ["--approx-input-tokens", 20, "--prefix-overlap", ".5", "--tokenizer-model", model]
    _, manifest = generate(tmp_path / "b", *options)
    assert manifest["file"].startswith("requests_100_tokens20_overlap0.5_")
    assert manifest["file"].endswith("byte-level_seed11.jsonl")
    assert re.fullmatch(r"[\w.-]+", manifest["file"])


def test_other_options_make_another_file(tmp_path, monkeypatch, capsys):
    """Corpora that differ do not collide; one that is asked for again does."""
    monkeypatch.setattr(gen, "maker_of", lambda options: (gen.Paragraphs(options), None))
    base = ["--count", "4", "--approx-input-tokens", "60", "--output", str(tmp_path)]
    others = ["--count-as chat", "--input-tokens-stdev 9", "--input-tokens-stdev 9 --min-input-tokens 50"]
    others += ["--input-tokens-stdev 9 --max-input-tokens 70", "--seed 0", "--seed 1", "--prefix-groups 2"]
    others += ["--output-tokens 8", "--output-tokens 8,2", "", "--count-as chat --seed 1"]
    for other in others:
        assert gen.main([*base, *other.split()]) == 0, other
    assert len(list(tmp_path.glob("*.jsonl"))) == len(others)
    names = {path.name.partition("gpt2")[2] for path in tmp_path.glob("*.jsonl")}
    assert {".jsonl", "_chat_seed1.jsonl", "_stdev9_max70.jsonl", "_output8-2.jsonl", "_seed0.jsonl"} <= names
    assert gen.main([*base, "--count-as", "chat"]) == 2


@pytest.mark.parametrize("name", ["../../etc/passwd", "a" * 300, "日本" * 100, "..", "x\ny"])
def test_any_tokenizer_name_makes_a_safe_file_name(name, tmp_path):
    _, manifest = generate(tmp_path, "--count", 1, "--tokenizer-model", name)
    assert re.fullmatch(r"requests_1_tokensnatural_overlap0\.0_\w[\w.-]*_seed11\.jsonl", manifest["file"])


def test_nothing_is_overwritten(shelf, tmp_path, monkeypatch, capsys):
    lines, _ = generate(tmp_path, "--seed", 1)
    monkeypatch.setattr(gen, "maker_of", lambda options: pytest.fail("work was begun"))
    capsys.readouterr()
    assert gen.main(["--output", str(tmp_path), "--seed", "1"]) == 2
    assert "never overwritten" in one_line_error(capsys, 2)
    assert corpus_in(tmp_path)[0] == lines


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_a_file_that_appears_meanwhile_is_not_overwritten(links, tmp_path, monkeypatch, capsys):
    def no_link(source, target):
        raise OSError(1, "no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", no_link)
    make = gen.Paragraphs.make
    name = "requests_100_tokensnatural_overlap0.0_gpt2.jsonl"

    def meanwhile(self, numbers):
        (tmp_path / name).write_text("mine")
        return make(self, numbers)

    monkeypatch.setattr(gen.Paragraphs, "make", meanwhile)
    assert gen.main(["--output", str(tmp_path)]) != 0
    one_line_error(capsys, 2)
    assert (tmp_path / name).read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


def test_same_seed_same_bytes(shelf, tmp_path, monkeypatch):
    options = ["--count", 80, "--approx-input-tokens", 50, "--prefix-overlap", 0.4, "--prefix-groups", 3]
    options += ["--input-tokens-stdev", 9, "--output-tokens", "20,5", "--tokenizer-model", shelf.path("byte-level")]
    first = generate(tmp_path / "1", *options, "--seed", 4)[1]
    monkeypatch.setattr(gen, "BATCH_TOKENS", 250)
    again = generate(tmp_path / "2", *options, "--seed", 4)[1]
    other = generate(tmp_path / "3", *options, "--seed", 5)[1]
    assert first["sha256"] == again["sha256"] != other["sha256"]
    fresh = [generate(tmp_path / name, "--count", 5, fresh=True)[1] for name in "45"]
    assert fresh[0]["options"]["seed"] != fresh[1]["options"]["seed"]
    repeated = generate(tmp_path / "6", "--count", 5, "--seed", fresh[0]["options"]["seed"])[1]
    assert repeated["sha256"] == fresh[0]["sha256"]


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def no_link(source, target):
        raise OSError(1, "no hard links here")

    monkeypatch.setattr(os, "link", no_link)
    lines, _ = generate(tmp_path, "--count", 5)
    assert len(lines) == 5


def test_same_bytes_whatever_the_hash_seed_of_the_process(shelf, tmp_path):
    options = ["--count", 50, "--approx-input-tokens", 30, "--prefix-overlap", 0.4, "--prefix-groups", 5]
    hashes = set()
    for hash_seed in "12":
        output = tmp_path / hash_seed
        model = ["--tokenizer-model", shelf.path("byte-level-small")]
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        result = run(*options, *model, "--seed", 1, "--output", output, env=environment)
        assert result.returncode == 0, result.stderr
        hashes.add(corpus_in(output)[1]["sha256"])
    assert len(hashes) == 1


def test_the_bytes_of_a_seed_are_the_same_everywhere(tmp_path):
    """Paragraphs depend on no library: this hash holds on every Python and every machine."""
    _, manifest = generate(tmp_path, "--seed", 1, "--count", 20, "--prefix-overlap", 0.3, "--output-tokens", "50,9")
    assert manifest["sha256"] == "4f8223007b0bc0f981f7ea34ad61512a784fbb6e72cbcd26c356c9688377196f"


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_stopped_run_leaves_nothing_under_the_final_name(stop, tmp_path):
    command = [sys.executable, str(SCRIPT), "--count", "10000000", "--output", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not any(part.stat().st_size for part in (tmp_path / "out").glob(".*.part")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(stop)
    _, errors = process.communicate(timeout=30)
    assert "Traceback" not in errors
    if stop == signal.SIGKILL:
        assert not list((tmp_path / "out").glob("requests*"))
    else:
        assert process.returncode == 130
        assert errors.splitlines()[-1].startswith(f"{gen.PROGRAM}: error: interrupted")
        assert not (tmp_path / "out").exists()


def test_a_disk_that_fills(tmp_path):
    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    result = run("--count", 1000, "--output", tmp_path / "out", preexec_fn=small_files)
    assert result.returncode == 1
    assert "File too large" in one_line_error(result)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_may_not_be_written(tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert gen.main(["--output", str(tmp_path)]) == 2
    assert "Permission denied" in one_line_error(capsys, 2)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_count(shelf, tmp_path):
    """Read by the process itself: the peak that wait4 tells begins with that of the process it was forked from."""
    probe = (
        "import sys, generate_requests as g; assert g.main(sys.argv[1:]) == 0; "
        "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
    )
    peaks = []
    for count in (1000, 8000):
        options = [
            "--count",
            count,
            "--approx-input-tokens",
            64,
            "--prefix-overlap",
            0.3,
            "--output",
            tmp_path / str(count),
        ]
        command = [sys.executable, "-c", probe, *map(str, options), "--tokenizer-model", str(shelf.path("byte-level"))]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        peaks.append(int(result.stdout.splitlines()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 12


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_summary_nobody_can_read_is_no_failure(tmp_path):
    with open("/dev/full", "w") as full:
        command = [sys.executable, str(SCRIPT), "--output", str(tmp_path)]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert result.returncode == 0
    assert result.stderr.count("\n") == 1
    assert "the corpus is written" in result.stderr
    assert len(corpus_in(tmp_path)[0]) == 100


def test_progress_is_shown_only_for_longer_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tqdm")
    generate(tmp_path / "short", "--count", 10)
    assert "prompt" not in capsys.readouterr().err
    make = gen.Paragraphs.make
    monkeypatch.setattr(gen.Paragraphs, "batch", 2)

    def slowly(self, numbers):
        time.sleep(0.3)
        return make(self, numbers)

    monkeypatch.setattr(gen.Paragraphs, "make", slowly)
    generate(tmp_path / "long", "--count", 10)
    assert "10/10" in capsys.readouterr().err


def test_an_unexpected_error_is_one_line(tmp_path, monkeypatch, capsys):
    def broken(self, numbers):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(gen.Paragraphs, "make", broken)
    assert gen.main(["--output", str(tmp_path)]) == 1
    assert "RuntimeError: first line" in one_line_error(capsys, 1)
    assert list(tmp_path.iterdir()) == []


# --- the manual --------------------------------------------------------------------------------------------


def test_a_name_of_openai_asks_for_its_own_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken.model", None)
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(gen.Refused, match="pip install tiktoken"):
        gen.is_openai("gpt-3.5-turbo")
    assert not gen.is_openai("Qwen/Qwen3-8B")


def test_the_manual_lists_every_option():
    text = (ROOT / "docs" / "generate_requests.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(--[a-z-]+)`\s*\|([^|]*)\|(.*)\|$", text, re.M)
    actions = [action for action in gen.build_parser()._actions if action.dest != "help"]
    assert [row[0] for row in rows] == [action.option_strings[-1] for action in actions]
    for row, action in zip(rows, actions):
        default = getattr(gen.Options, action.dest, None)
        shown = row[1].strip().strip("`")
        assert shown == str(default) or (not shown and not default), row[0]


def test_the_docstring_is_the_manual():
    result = run("--help", flags=["-I", "-S"])
    assert result.returncode == 0
    for line in (inspect.getdoc(gen) or "").splitlines():
        assert line in result.stdout
