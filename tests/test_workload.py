"""Section 4, Workload: what is asked."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any, Callable

import pytest

import online_bench_openai_async as bench
from tests.support.demo import Demo
from tests.support.processes import needs_proc, wait_until
from tests.support.program import SCRIPT, Outcome
from tests.support.records import make_config
from tests.support.tables import rows_of


def prompts(seed: int, count: int = 1024) -> list[str]:
    config = make_config(seed=seed, prompt_tokens=64)
    return [bench.synthetic_request(config, index).messages[-1]["content"] for index in range(count)]


def test_no_two_prompts_share_their_first_16_characters() -> None:
    assert len({prompt[:16] for prompt in prompts(seed=1)}) == 1024


def test_two_runs_share_no_start() -> None:
    assert not {prompt[:16] for prompt in prompts(seed=1)} & {prompt[:16] for prompt in prompts(seed=2)}


def test_one_seed_one_set_of_prompts() -> None:
    assert prompts(seed=3) == prompts(seed=3)


def test_the_warm_up_shares_no_start_with_the_run() -> None:
    config = make_config(seed=1)
    warm = {bench.warmup_request(config, index).messages[-1]["content"][:16] for index in range(1024)}
    assert len(warm) == 1024
    assert not warm & {prompt[:16] for prompt in prompts(seed=1)}


def test_there_is_a_word_for_every_byte() -> None:
    assert len(set(bench.WORDS)) == 256


@pytest.mark.parametrize("tokens", [16, 100, 1024, 8192])
def test_without_calibration_a_prompt_has_a_word_or_full_stop_per_token(tokens: int) -> None:
    prompt = bench.synthetic_request(make_config(prompt_tokens=tokens), 0).messages[-1]["content"]
    pieces = len(prompt.split()) - 2 + prompt.count(".") + bench.UNCALIBRATED.constant_tokens
    assert abs(pieces - tokens) <= max(1, 0.01 * tokens)


@pytest.mark.parametrize(
    "counted",
    [[], [(16, 30)], [(16, 30), (16, 31)], [(4, 7), (16, 7)], [(4, 30), (16, 7)]],
    ids=["nothing", "one reply", "one length", "always the same", "less for more"],
)
def test_what_calibrates_nothing(counted: list[tuple[int, int]]) -> None:
    assert bench.calibrated(make_config(), counted).prompt_calibration is None


def test_what_the_user_says_goes_before_what_was_counted() -> None:
    config = make_config(prompt_calibration=[1.5, 20.0])
    assert bench.calibrated(config, [(4, 15), (16, 30)]) == config


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({}, 8),
        ({"output_tokens": 3}, 3),
        ({"extra_body": {"min_tokens": 100}}, 100),
        ({"extra_body": {"min_tokens": 3}}, 8),
        ({"extra_body": {"max_tokens": 5}}, 5),
        ({"extra_body": {"max_tokens": 300, "min_tokens": 200}, "output_tokens": 100}, 200),
        ({"extra_body": {"max_tokens": -1, "min_tokens": "7"}}, 8),
        ({"extra_body": {"min_tokens": 128}, "output_tokens": 64}, 64),
    ],
)
def test_warm_up_replies_are_short_within_what_the_body_allows(changes: dict[str, Any], limit: int) -> None:
    assert bench.warmup_request(make_config(**changes), 0).output_tokens == limit


def test_making_a_prompt_is_cheap_beside_a_loop_of_known_length() -> None:
    """Under 0.3 ms for 1,024 tokens here; as a ratio, so that a slow machine does not fail it."""

    def best(call: object) -> float:
        times = []
        for _ in range(20):
            start = time.perf_counter()
            call()  # type: ignore[operator]
            times.append(time.perf_counter() - start)
        return min(times)

    yardstick = best(lambda: [str(number) for number in range(2000)])
    assert best(lambda: bench.synthetic_prompt("key", 1024)) < yardstick


@pytest.mark.parametrize(
    ("line", "content", "limit"),
    [
        ('{"text": "hello"}', "hello", None),
        ('{"prompt": "hello", "max_tokens": 7}', "hello", 7),
        ('{"text": "hello", "output_tokens": 9}', "hello", 9),
        ('{"messages": [{"role": "user", "content": "hello"}]}', "hello", None),
    ],
)
def test_corpus_lines(line: str, content: str, limit: int) -> None:
    request = bench.parse_request(line, None)
    assert request.messages[-1]["content"] == content
    assert request.output_tokens == limit


def test_the_system_prompt_comes_first() -> None:
    for line in ('{"text": "x"}', '{"messages": [{"role": "user", "content": "x"}]}'):
        assert bench.parse_request(line, "be brief").messages[0] == {"role": "system", "content": "be brief"}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        (b'{"text": "a"}\n\n{"other": 1}\n', "line 3: no prompt"),
        (b'{"text": ""}\n', "line 1: the prompt is not a text, or an empty one"),
        (b'{"text": 5}\n', "line 1: the prompt is not a text"),
        (b'{"messages": []}\n', "line 1: 'messages' is not a list of messages"),
        (b"[1]\n", "line 1: not a JSON object"),
        (b'{"text": "a", "max_tokens": 0}\n', "line 1: the output limit"),
        (b'{"text": "a", "max_tokens": true}\n', "line 1: the output limit"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "line 2: not UTF-8"),
        (b"[" * 100_000 + b"\n", "line 1: JSON nested too deeply"),
        (b'{"turns": []}\n', "line 1: a session without turns"),
        (b'{"turns": ["a"]}\n', "line 1: turns or conversations are not a list of objects"),
        (b'{"turns": [{"content": ""}]}\n', "line 1: a turn without content"),
        (b'{"turns": [{"content": "a", "delay_ms": -1}]}\n', "line 1: delay_ms is not a number of 0 or more: -1"),
        (b'{"turns": [{"content": "a", "max_tokens": 0}]}\n', "line 1: the output limit"),
        (b'{"text": "a", "model": 5}\n', "line 1: 'model' is not a text"),
        (b"", "holds no prompt"),
        (b"\n \n", "holds no prompt"),
    ],
)
def test_a_broken_corpus_names_its_line(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(content)
    with pytest.raises(bench.UserError) as caught:
        bench.load_requests(str(path), None)
    assert complaint in str(caught.value)


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    assert bench.load_requests(str(path), None)[0].messages[-1]["content"] == "a"


def test_a_corpus_is_cycled() -> None:
    corpus = [bench.parse_request(f'{{"text": "{name}"}}', None) for name in "abc"]
    workload = bench.workload_of(make_config(), corpus)
    assert [workload(index).messages[-1]["content"] for index in range(5)] == list("abcab")


def corpus_of(path: Path, texts: list[str]) -> Path:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return path


def test_lines_are_found_again_between_empty_ones_and_after_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(
        '\ufeff\n\n{"text": "erste"}\n \u3000 \n{"text": "zweite \u00fc"}\r\n\n{"text": "dritte"}'.encode()
    )
    for check in (True, False):
        corpus = bench.Corpus(str(path), None).open(check)
        assert [request.messages[0]["content"] for request in map(corpus.__getitem__, range(3))] == [
            "erste",
            "zweite \u00fc",
            "dritte",
        ]
        assert len(corpus) == 3
        corpus.close()


def test_a_corpus_costs_offsets_and_no_copy(tmp_path: Path) -> None:
    path = corpus_of(tmp_path / "corpus.jsonl", ["x" * 2000 + str(n) for n in range(5_000)])
    tracemalloc.start()
    try:
        corpus = bench.load_requests(str(path), None)
        assert tracemalloc.get_traced_memory()[0] < path.stat().st_size / 20
    finally:
        tracemalloc.stop()
    assert corpus[4_999].messages[0]["content"].endswith("x4999")
    corpus.close()


def test_a_corpus_that_changes_during_the_run_is_told(tmp_path: Path) -> None:
    path = corpus_of(tmp_path / "corpus.jsonl", ["one", "two"])
    corpus = bench.load_requests(str(path), None)
    path.write_text("")
    with pytest.raises(bench.RunError, match="has changed during the run"):
        corpus[1]
    corpus.close()


def test_a_corpus_that_is_replaced_during_the_run_stays_what_it_was(tmp_path: Path) -> None:
    path = corpus_of(tmp_path / "corpus.jsonl", ["one", "two"])
    corpus = bench.load_requests(str(path), None)
    corpus_of(tmp_path / "other", ["three"]).rename(path)
    assert corpus[1].messages[0]["content"] == "two"
    corpus.close()


@pytest.mark.skipif(not Path("/dev/stdin").exists(), reason="needs /dev/stdin")
@pytest.mark.parametrize(("way", "processes"), [("pipe", 1), ("substitution", 2), ("file", 2)])
def test_prompts_that_can_be_read_only_once_reach_every_process(
    demo: Callable[..., Demo], tmp_path: Path, processes: int, way: str
) -> None:
    """`--requests-file <(...)` and /dev/stdin, a pipe or a file; what had to be copied is gone afterwards."""
    corpus = corpus_of(tmp_path / "corpus.jsonl", ["one", "two", "three", "four"])
    (tmp_path / "tmp").mkdir()
    words = [
        sys.executable,
        str(SCRIPT),
        *demo(ttft_ms=1, gap_ms=0).target,
        "--concurrency",
        "2",
        "--output-tokens",
        "2",
    ]
    words += ["--processes", str(processes), "--results-csv", str(tmp_path / "r.csv"), "--warmup", "0"]
    given = {"pipe": "cat C | P /dev/stdin", "substitution": "P <(cat C)", "file": "P /dev/stdin < C"}[way]
    line = given.replace("C", shlex.quote(str(corpus))).replace("P ", f"{shlex.join(words)} --requests-file ")
    env = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=env, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(int(row["index"]) for row in rows_of(tmp_path / "r.csv")) == [0, 1, 2, 3]
    assert "online-bench-" not in done.stdout + done.stderr
    assert not list((tmp_path / "tmp").iterdir())


@needs_proc
def test_killed_while_it_copies_a_pipe_it_leaves_nothing_behind(tmp_path: Path) -> None:
    words = [sys.executable, str(SCRIPT), "--model", "m", "--requests-file", "/dev/stdin"]
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env) as process:
        places = Path(f"/proc/{process.pid}/fd")
        wait_until(lambda: any("online-bench-" in os.readlink(place) for place in places.iterdir()))
        process.kill()
    assert not list(tmp_path.iterdir())


# --- traces ---

TRACE = [
    {"timestamp": 27_000, "input_length": 1100, "output_length": 3, "hash_ids": [1, 2, 3]},
    {"timestamp": 29_000, "input_length": 1500, "output_length": 0, "hash_ids": [1, 2, 4]},
    {"timestamp": 31_000, "input_length": 600, "output_length": 2, "hash_ids": [2]},
    {"timestamp": 33_000, "input_length": 1090, "output_length": 2, "hash_ids": [1, 2, 3]},
]


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_mooncake_trace_has_its_lengths_its_shared_blocks_and_its_times(
    cli: Callable[..., Outcome], demo: Callable[..., Demo], tmp_path: Path, processes: str
) -> None:
    server, path, rows = demo(ttft_ms=5, gap_ms=0), tmp_path / "trace.jsonl", tmp_path / "rows.csv"
    path.write_text("\n".join(map(json.dumps, TRACE)))
    words = ["--requests-file", str(path), "--speed", "10", "--results-csv", str(rows), "--processes", processes]
    done = cli(*server.target, *words, "--warmup", "2", "--concurrency", "8")
    assert done.code == 0, done.err
    assert [float(row["scheduled_s"]) for row in done.rows] == [0.0, 0.2, 0.4, 0.6]
    assert [row["completion_tokens"] for row in done.rows] == ["3", "1", "2", "2"]
    truth = server.truth()["requests"][-4:]
    assert sorted(row["prompt_tokens"] for row in truth) == pytest.approx([600, 1090, 1100, 1500], abs=1)
    if processes == "1":  # else they may overtake each other
        assert [row["cached_tokens"] for row in truth] == [0, 1008, 0, 1072]  # whole 16s of texts of 1016 and 1082


def test_at_infinite_speed_a_traces_times_are_left_aside() -> None:
    options = bench.build_parser().parse_args(["--model", "m", "--api-base", "http://127.0.0.1:9/v1", "--speed", "inf"])
    config = bench.build_config(options, 4, True)
    assert (config.timestamp_unit, config.concurrency, config.total_requests) == (None, 128, 4)
    assert not bench.Schedule.of(config).is_timed


def test_a_prompt_of_a_trace_is_another_in_every_run_and_calibrated_where_that_is_known() -> None:
    line = json.dumps({"timestamp": 0, "input_length": 1000, "output_length": 9})

    def text(index: int = 0, **changes: Any) -> str:
        asked = bench.with_text(bench.parse_request(line, None), make_config(**changes), index)
        return str(asked.messages[0]["content"])

    assert text() == text()
    assert len({text()[:20], text(1)[:20], text(seed=2)[:20]}) == 3
    assert len(text(prompt_calibration=(2.0, 100.0)).split()) == pytest.approx(450, abs=2)
