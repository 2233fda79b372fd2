"""One meaning in all scripts: the same corpus lines and replies, given to both, come to the same requests and rows.

The tables are what docs/method.md says under that heading. Each script runs as a user runs it; requests are
compared as the server saw them, rows as the CSV files have them.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Optional

import pytest

import online_bench_openai_async as bench
from tests.support.faults import FAULTS, GROUPS, body, streams
from tests.support.locust_runs import Bench, needs_locust
from tests.support.processes import free_port
from tests.support.program import ROOT, cli, run_script
from tests.support.replies import (
    COUNTS,
    DONE,
    FINISH,
    LAST_CHUNK,
    ONE,
    ROLE,
    STREAM_HEAD,
    TWO,
    USAGE,
    as_json,
    chunk,
    completion,
    piece,
    reply,
)
from tests.support.server import Act, Call, HttpServer
from tests.support.tables import rows_of

pytestmark = needs_locust

MODEL, KEY, SYSTEM = "some-model", "sk-contract", "be brief"
EXTRA = {"max_tokens": 7, "temperature": 0.5, "top_k": 3}
RUN_LIMIT = 1024  # where neither the line nor EXTRA says one
FIRST_COLUMNS = ["index", "prompt_tokens", "completion_tokens", "total_tokens", "latency_ms", "status", "error"]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


# --- corpus lines: what is sent for each, before any system prompt of the run, and the line's own limit ---


class Line(NamedTuple):
    raw: str
    messages: list[dict[str, Any]]
    limit: Optional[int] = None
    fields: Mapping[str, Any] = {}  # of the body besides; one of them may be a limit
    whole: bool = False  # the fields are the body, the model aside


def says(*, sends: Mapping[str, Any], **fields: Any) -> Line:
    """A line whose prompt is "a", and what it adds to the body."""
    return Line(json.dumps({"text": "a", **fields}), [user("a")], None, sends)


def batch(body: Mapping[str, Any], **fields: Any) -> Line:
    return Line(json.dumps({**fields, "body": body}), body["messages"], None, body, whole=True)


def line(sent: Any, limit: Optional[int] = None, /, **fields: Any) -> Line:
    return Line(json.dumps(fields), sent if isinstance(sent, list) else [user(sent)], limit)


OWN_SYSTEM = [{"role": "system", "content": "mine"}, user("a")]
OWN_DEVELOPER = [{"role": "developer", "content": "mine"}, user("a")]
LATE_SYSTEM = [user("a"), {"role": "system", "content": "late"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "é"}, {"type": "x", "n": 0.1, "big": 10**30}]}]

URL = "/v1/chat/completions"
CHAT = {"messages": [user("batched")]}
VALUES: Mapping[str, Any] = {"model": "some-lora", "temperature": 0.75, "response_format": {"type": "json_object"}}

ACCEPTED = {
    "text": line("a", text="a"),
    "prompt": line("a", prompt="a"),
    "messages": line([user("a")], messages=[user("a")]),
    "text before prompt": line("a", text="a", prompt="b"),
    "messages before text": line([user("a")], messages=[user("a")], text="b"),
    "messages before turns": line([user("a")], messages=[user("a")], turns=["b"]),
    "text null": line("b", text=None, prompt="b"),
    "messages null": line("b", messages=None, turns=None, text="b"),
    "all but messages null": line([user("a")], text=None, prompt=None, messages=[user("a")]),
    "max_tokens": line("a", 5, text="a", max_tokens=5),
    "max_completion_tokens": line("a", 5, text="a", max_completion_tokens=5),
    "output_tokens": line("a", 5, text="a", output_tokens=5),
    "max_tokens before output_tokens": line("a", 5, text="a", max_tokens=5, output_tokens=6),
    "max_completion_tokens before output_tokens": line("a", 5, text="a", max_completion_tokens=5, output_tokens=6),
    "max_tokens null": line("a", 6, text="a", max_tokens=None, output_tokens=6),
    "limits null": line("a", text="a", max_tokens=None, max_completion_tokens=None, output_tokens=None),
    "fields of the generator": line("a", 9, text="a", max_tokens=9, input_tokens=1, prefix_tokens=0, prefix_group=0),
    **{
        f"sends {name}": says(**{name: VALUES.get(name, [0.5])}, sends={name: VALUES.get(name, [0.5])})
        for name in sorted(bench.BODY_KEYS)
    },
    "keys of our own": says(sends={}, label="x", custom_id="y", hash_ids=[1], n=1, url="/x", method="GET"),
    "keys nobody knows": says(sends={}, id=3, category="b", request_id="c", system="d"),
    "null keys": says(sends={}, top_k=None, stream=None, n=None, body=None),
    "any body": says(sends={"x_own": {"y": 1}, "top_k": 2}, top_k=1, body={"x_own": {"y": 1}, "top_k": 2}),
    "a limit in the body": says(sends={"max_completion_tokens": 3}, max_tokens=4, body={"max_completion_tokens": 3}),
    "batch": batch(
        {"model": "other", **CHAT, "max_completion_tokens": 4, "id": 5}, custom_id="r-1", method="POST", url=URL
    ),
    "batch without a model": batch(CHAT, custom_id="r-2", url=URL, label="x"),
    "a body alone": batch({**CHAT, "top_k": None, "n": 1}),
    "own system message": line(OWN_SYSTEM, messages=OWN_SYSTEM),
    "own developer message": line(OWN_DEVELOPER, messages=OWN_DEVELOPER),
    "system message later": line(LATE_SYSTEM, messages=LATE_SYSTEM),
    "parts": line(PARTS, messages=PARTS),
    "white space": line(" \n", text=" \n"),
    "other alphabets": Line('{"text": "日本語 \\ud83d\\ude00 \\u0000"}', [user("日本語 \U0001f600 \0")]),
    "doubled key": Line('{"text": "a", "text": "b"}', [user("b")]),
    "white space around": Line('  {"text": "a"}\t\r', [user("a")]),
}

STREAMED = "'{}' in a line: the replies of a run are all streamed, or all whole"
REFUSED = {
    "cut": (b'{"text": ', "not JSON"),
    "NaN": (b'{"text": "a", "temperature": NaN}', "not JSON (NaN is no JSON)"),
    "Infinity": (b'{"text": "a", "x": [-Infinity]}', "not JSON (-Infinity is no JSON)"),
    "too large a number": (b'{"text": "a", "x": 1e999}', "not JSON (1e999 is too large a number)"),
    "nested too deeply": (b"[" * 100_000, "JSON nested too deeply"),
    "not UTF-8": (b'{"text": "\xff"}', "not UTF-8; save the corpus as UTF-8"),
    "lone surrogate": (b'{"text": "\\ud800"}', "half of a surrogate pair: no text that could be sent"),
    "byte order mark within": (b'\xef\xbb\xbf{"text": "a"}', "not JSON"),
    "a list": (b"[1]", "not a JSON object but list"),
    "a text": (b'"a"', "not a JSON object but str"),
    "no prompt": (b'{"other": 1}', "no prompt: neither 'messages', 'text' nor 'prompt'"),
    "null prompts": (b'{"text": null, "prompt": null}', "no prompt: neither 'messages', 'text' nor 'prompt'"),
    "empty text": (b'{"text": ""}', "the prompt is not a text, or an empty one"),
    "empty text before prompt": (b'{"text": "", "prompt": "a"}', "the prompt is not a text, or an empty one"),
    "number": (b'{"prompt": 5}', "the prompt is not a text, or an empty one"),
    "no messages": (b'{"messages": []}', "'messages' is not a list of messages"),
    "messages that are none": (b'{"messages": ["a"], "text": "a"}', "'messages' is not a list of messages"),
    "stream": (b'{"text": "a", "stream": false}', STREAMED.format("stream")),
    "stream options": (b'{"text": "a", "stream_options": {}}', STREAMED.format("stream_options")),
    "stream in a body": (b'{"body": {"messages": [{}], "stream": true}}', STREAMED.format("stream")),
    "several answers": (b'{"text": "a", "n": 2}', "'n' in a line: the times of several answers in one reply would mix"),
    "a body that is none": (b'{"text": "a", "body": [1]}', "'body' is not a JSON object"),
    "a body without messages": (b'{"body": {"prompt": "a"}}', "'messages' is not a list of messages"),
    "another resource": (
        b'{"url": "/v1/embeddings", "body": {"messages": [{}]}}',
        "'url' is /v1/embeddings, and this run asks /chat/completions",
    ),
    "limit of 0": (b'{"text": "a", "max_tokens": 0}', "the output limit is not a whole number of 1 or more: 0"),
    "limit of true": (
        b'{"text": "a", "output_tokens": true}',
        "the output limit is not a whole number of 1 or more: True",
    ),
    "limit of 1.5": (b'{"text": "a", "max_tokens": 1.5}', "the output limit is not a whole number of 1 or more: 1.5"),
    "a session without turns": (b'{"turns": []}', "a session without turns"),
    "turns that are none": (b'{"turns": ["a"]}', "turns or conversations are not a list of objects"),
    "a turn without content": (b'{"conversations": [{"from": "human", "value": ""}]}', "a turn without content"),
    "a delay below 0": (
        b'{"turns": [{"content": "a", "delay_ms": -1}]}',
        "delay_ms is not a number of 0 or more: -1",
    ),
    "a turn's limit of 0": (
        b'{"turns": [{"content": "a", "max_tokens": 0}]}',
        "the output limit is not a whole number of 1 or more: 0",
    ),
    "limit as text": (b'{"text": "a", "max_tokens": "5"}', "the output limit is not a whole number of 1 or more: '5'"),
}

LOAD_WITH_LOCUST = """
import json, sys
import locust_batch
for path in sys.argv[1:]:
    try:
        print(json.dumps(len(locust_batch.load_corpus(path))))
    except locust_batch.UsageError as error:
        print(json.dumps(str(error)))
"""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory) -> Mapping[str, tuple[str, str, str]]:
    """Name of a bad line -> (what is to be said, what the benchmark says, what Locust says)."""
    folder = tmp_path_factory.mktemp("refused")
    paths = {}
    for number, (name, (raw, _)) in enumerate(REFUSED.items()):
        paths[name] = folder / f"{number}.jsonl"
        paths[name].write_bytes(b'{"text": "good"}\n\n' + raw + b"\n")
    command = [sys.executable, "-c", LOAD_WITH_LOCUST, *map(str, paths.values())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    by_locust = dict(zip(paths, map(json.loads, done.stdout.splitlines())))
    said = {}
    for name, path in paths.items():
        outcome = cli("--model", MODEL, "--api-base", "http://127.0.0.1:9/v1", "--requests-file", path)
        assert (outcome.code, outcome.out) == (2, "")
        said[name] = (f"{path}, line 3: {REFUSED[name][1]}", outcome.err, by_locust[name])
    return said


@pytest.mark.parametrize("name", REFUSED)
def test_a_line_that_cannot_be_sent_is_refused_by_both_in_the_same_words(refusals, name):
    wanted, by_benchmark, by_locust = refusals[name]
    assert wanted in by_locust
    assert by_locust in by_benchmark


# --- replies: sent to both; what counts is that their rows agree, and the status here ---

DETAILS = {"prompt_tokens_details": {"cached_tokens": 4}, "completion_tokens_details": {"reasoning_tokens": 1}}


def said(text: Any = "x", finish: Any = "stop", **changes: Any) -> dict[str, Any]:
    message = text if isinstance(text, dict) else {"role": "assistant", "content": text}
    return completion(choices=[{"index": 0, "message": message, "finish_reason": finish}], **changes)


def counted(**usage: Any) -> dict[str, Any]:
    return said(usage=usage)


REPLIES: dict[str, Act] = {
    "usage in detail": body(counted(prompt_tokens=7, completion_tokens=3, total_tokens=10, **DETAILS)),
    "a total of its own": body(counted(prompt_tokens=7, completion_tokens=3, total_tokens=99)),
    "prompt tokens alone": body(counted(prompt_tokens=7, total_tokens=10)),
    "completion tokens alone": body(counted(completion_tokens=3)),
    "usage of zeros": body(counted(prompt_tokens=0, completion_tokens=0, total_tokens=0, **DETAILS)),
    "zero completion tokens": body(counted(prompt_tokens=7, completion_tokens=0)),
    "counts that are none": body(counted(prompt_tokens=True, completion_tokens=2, prompt_tokens_details=[1])),
    "at the limit of counts": body(counted(prompt_tokens=2**40, completion_tokens=2**40 + 1)),
    "no finish reason": body(said(finish=None)),
    "finish reason of a stranger": body(said(finish="\x1b[31mred " + "x" * 100)),
    "finish reason as a formula": body(said(finish="=1+1")),
    "abort": body(said(finish="abort")),
    "error": body(said(finish="error")),
    "cancelled": body(said(finish="cancelled")),
    "abort without a message": body(completion(choices=[{"finish_reason": "abort"}])),
    "reasoning": body(said({"content": None, "reasoning_content": "hm"}, usage=None)),
    "refusal": body(said({"content": None, "refusal": "no"}, usage=None)),
    "tool call": body(said({"content": None, "tool_calls": [{}]}, usage=None)),
    "function call": body(said({"content": "", "function_call": {"name": "f"}}, usage=None)),
    "nothing but counts": body(said("", usage={"prompt_tokens": 7, "completion_tokens": 3})),
    "error beside choices": body({**completion(), "error": {"message": "no"}}),
    "error of null": body({**completion(), "error": None}),
    "message beside choices": body({**completion(), "message": "hello"}),
    "error object": body({"object": "error", "message": "no", "code": 400}),
    "detail": body({"detail": [{"loc": ["body"], "msg": "no"}]}),
    "errors in a list": body([{"error": {"message": "no"}}]),
    "an error without words": body({"error": {"code": 5}}),
    "error as a formula": body({"error": "=cmd|' /C calc'!A0"}),
    "error in colour": body({"error": {"message": "\x1b[31mred\x1b[0m\r\nnext\tline \u2028 end"}}),
    "a long error": body({"error": {"message": "long " * 1000}}),
    "choices as text": body(completion(choices="x")),
    "two choices": body(completion(choices=[{"message": {"content": "x"}, "finish_reason": "stop"}] * 2)),
    "status 201": body(completion(), status="201 Created"),
    "status 500 in colour": body({"error": {"message": "\x1b[1mbold\x1b[0m\nline"}}, status="500 No"),
    "status 400 with choices": body({**completion(), "message": "no"}, status="400 No"),
    **{name: fault.act for group in ("status", "body") for name, fault in GROUPS[group].items() if not fault.spoils},
    "cut": GROUPS["connection"]["closes_within_head"].act,
    "closed": GROUPS["connection"]["closes_without_reply"].act,
    "interim": GROUPS["connection"]["interim_102_103"].act,
    "no content": GROUPS["connection"]["no_content_204"].act,
    "not HTTP": GROUPS["connection"]["speaks_http_2"].act,
}
STREAMS: dict[str, Act] = {
    name[len("stream_") :]: fault.act
    for name, fault in FAULTS.items()
    if name.startswith("stream_") and not fault.stream.endswith("timeout")
}
STREAMS.update({
    "usage in detail": streams(ROLE, ONE, TWO, FINISH, piece([], usage={**USAGE, **DETAILS}), DONE),
    "counts of zero": streams(ONE, TWO, FINISH, piece([], usage={"prompt_tokens": 7, "completion_tokens": 0}), DONE),
    "usage alone": streams(ROLE, FINISH, COUNTS, DONE),
    "two choices": streams(ONE, piece([{"index": 1, "delta": {"content": "y"}}]), FINISH, DONE),
    "done before finish": streams(ROLE, ONE, DONE, FINISH, COUNTS),
    "byte order mark": streams(b"\xef\xbb\xbf" + ONE, FINISH, DONE),
    "several lines of data": streams(ROLE, ONE.replace(b'"choices"', b'\ndata: "choices"'), FINISH, DONE),
    "refused": body({"error": {"message": "no"}}, status="400 No"),
    "cut": GROUPS["connection"]["closes_within_head"].act,
})  # fmt: skip
OWN_WORDS = ("bad_http", "reset", "closed", "http_401", "http_403")  # of other libraries, or naming the key's source
MEASURED = ("latency_ms", "sent_s", "ttft_ms", "tpot_ms", "late_read", "new_connection")


class Script(NamedTuple):
    """What a script made of a corpus: the requests that the server saw, and its CSV."""

    calls: list[Call]
    columns: list[str]
    rows: list[dict[str, str]]


def by_benchmark(
    folder: Path, port: int, corpus: Path, system: str = "", extra: Any = None, stream: bool = False
) -> None:
    done = run_script(
        *("--api-base", f"http://127.0.0.1:{port}/v1", "--api-key", KEY, "--model", MODEL, "--requests-file", corpus),
        *("--concurrency", 1, "--warmup", 0, "--results-csv", folder / "benchmark.csv", "--no-progress"),
        *("--system-prompt", system, "--extra-body", json.dumps(extra or {}), "--max-tokens-field", "max_tokens"),
        *(["--stream"] if stream else []),
    )
    assert done.code in (0, 1), done.err


def by_locust(folder: Path, port: int, corpus: Path, system: str = "", extra: Any = None, stream: bool = False) -> None:
    bench = Bench(folder)
    asked = {"OPENAI_MODEL": MODEL, "OPENAI_API_KEY": KEY, "REQUESTS_FILE": str(corpus), "SYSTEM_PROMPT": system}
    given = {"MAX_TOKENS": str(RUN_LIMIT), "TEMPERATURE": "0", "EXTRA_BODY": json.dumps(extra or {})}
    given["STREAM"] = str(int(stream))
    load = ("--headless", "--host", f"http://127.0.0.1:{port}", "-u", 1, "-r", 1)
    try:
        code, _, err = bench.finish(bench.start(*load, **asked, **given, RESULTS_CSV=str(folder / "locust.csv")))
    finally:
        bench.close()
    assert code in (0, 1), err


SCRIPTS = {"benchmark": by_benchmark, "locust": by_locust}


def both(folder: Path, corpus: bytes, act: Act, **asked: Any) -> dict[str, Script]:
    """The corpus through both scripts, each against a server of its own; `asked`: system, extra, stream."""
    path = folder / "corpus.jsonl"
    path.write_bytes(corpus)

    def one(name: str) -> Script:
        calls: list[Call] = []

        def answer(call: Call) -> None:
            calls.append(call)
            act(call)

        with HttpServer(answer) as server:
            SCRIPTS[name](folder, server.port, path, **asked)
        header = (folder / f"{name}.csv").read_text("utf-8").partition("\n")[0].split(",")
        return Script(calls, header, sorted(rows_of(folder / f"{name}.csv"), key=lambda row: int(row["index"])))

    with ThreadPoolExecutor() as pool:
        return dict(zip(SCRIPTS, pool.map(one, SCRIPTS)))


GOOD: Act = body(completion())


@pytest.fixture(scope="module", params=["plain", "system prompt and extra body"])
def lines(request, tmp_path_factory) -> tuple[str, Mapping[str, Any], dict[str, Script]]:
    """(the system prompt, the extra body, what both scripts made of the accepted lines)."""
    system, extra = ("", {}) if request.param == "plain" else (SYSTEM, EXTRA)
    raw = "\ufeff\n" + "\n \n".join(item.raw for item in ACCEPTED.values()) + "\n\u3000\n"
    return system, extra, both(tmp_path_factory.mktemp("lines"), raw.encode(), GOOD, system=system, extra=extra)


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_sent_for_each_line(lines, script):
    system, extra, scripts = lines
    wanted = {}
    for name, item in ACCEPTED.items():
        own_system = item.messages[0]["role"] in ("system", "developer")
        messages = (
            item.messages if own_system or not system else [{"role": "system", "content": system}, *item.messages]
        )
        defaults = {"model": MODEL, "max_tokens": RUN_LIMIT, "temperature": 0.0, "messages": messages, **extra}
        if "max_completion_tokens" in item.fields:
            del defaults["max_tokens"]
        own = {} if item.limit is None else {"max_tokens": item.limit}
        wanted[name] = {**({"model": MODEL} if item.whole else defaults), **own, **item.fields}
    assert dict(zip(ACCEPTED, [json.loads(call.body) for call in scripts[script].calls])) == wanted


def test_both_know_the_same_keys_and_the_document_lists_them():
    command = [sys.executable, "-c", "import locust_batch; print(*sorted(locust_batch.BODY_KEYS))"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert set(done.stdout.split()) == bench.BODY_KEYS
    listed = (ROOT / "docs" / "method.md").read_text("utf-8").split("<!-- keys of a line -->")[1]
    assert set(re.findall(r"`(\w+)`", listed)) == bench.BODY_KEYS


def test_every_parameter_of_the_sdk_is_known():
    openai = pytest.importorskip("openai")
    parameters: set[str] = set()
    for resource in (openai.resources.chat.completions, openai.resources.completions):
        parameters |= set(inspect.signature(resource.AsyncCompletions.create).parameters)
    ours = {"self", "messages", "prompt", "stream", "stream_options", "n", "timeout", *bench.OUTPUT_LIMITS}
    assert parameters - ours - {"extra_body", "extra_headers", "extra_query"} <= bench.BODY_KEYS


def test_both_ask_the_same_resource_with_the_same_key(lines):
    for script in lines[2].values():
        assert {call.head.partition(b"\r\n")[0] for call in script.calls} == {b"POST /v1/chat/completions HTTP/1.1"}
        assert {call.authorization for call in script.calls} == {f"Bearer {KEY}"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_index_counts_prompts_and_not_lines(lines, script):
    assert [row["index"] for row in lines[2][script].rows] == [str(number) for number in range(len(ACCEPTED))]


def test_the_columns_of_one_are_among_the_others_in_the_same_order(lines):
    benchmarks, locusts = (lines[2][name].columns for name in SCRIPTS)
    assert benchmarks[:7] == locusts[:7] == FIRST_COLUMNS
    assert [column for column in benchmarks if column in locusts] == locusts


def replies_of(folder: Path, acts: Mapping[str, Act], stream: bool) -> dict[str, Script]:
    def by_prompt(call: Call) -> None:
        acts[json.loads(call.body)["messages"][-1]["content"]](call)

    corpus = "".join(json.dumps({"text": name}) + "\n" for name in acts).encode()
    return both(folder, corpus, by_prompt, stream=stream)


@pytest.fixture(scope="module")
def replies(tmp_path_factory) -> dict[str, Script]:
    return replies_of(tmp_path_factory.mktemp("replies"), REPLIES, stream=False)


@pytest.fixture(scope="module")
def streamed(tmp_path_factory) -> dict[str, Script]:
    return replies_of(tmp_path_factory.mktemp("streams"), STREAMS, stream=True)


def same_rows(scripts: Mapping[str, Script], at: int, own_words: bool = False) -> list[dict[str, str]]:
    """The row of both scripts; their cells agree, but for what is measured and for errors in words of their own."""
    rows = benchmarks, locusts = [scripts[script].rows[at] for script in SCRIPTS]
    left_out = {*MEASURED, *(["error"] if own_words or benchmarks["error_kind"] in OWN_WORDS else [])}
    compared = [column for column in scripts["locust"].columns if column not in left_out]
    assert {column: locusts[column] for column in compared} == {column: benchmarks[column] for column in compared}
    for row in rows:
        good = row["status"] == "success"
        assert bool(row["latency_ms"]) == good
        assert good or row["prompt_tokens"] == row["completion_tokens"] == row["total_tokens"] == ""
        assert bool(row["error"]) != good
        total = int(row["prompt_tokens"] or 0) + int(row["completion_tokens"] or 0)
        assert row["total_tokens"] == (str(total) if row["prompt_tokens"] or row["completion_tokens"] else "")
    return rows


@pytest.mark.parametrize("name", REPLIES)
def test_a_reply_comes_to_the_same_row_in_both(replies, name):
    for row in same_rows(replies, list(REPLIES).index(name), name.startswith("redirect")):
        assert row["ttft_ms"] == row["tpot_ms"] == row["late_read"] == ""


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_comes_to_the_same_row_in_both(streamed, name):
    rows = same_rows(streamed, list(STREAMS).index(name), own_words=name == "gzip_unasked")
    text = rows[0]["status"] == "success" and name != "usage alone"
    assert [bool(row["ttft_ms"]) or (text and row["late_read"] == "1") for row in rows] == [text] * 2


@pytest.mark.parametrize("script", SCRIPTS)
def test_how_streams_are_asked_for(streamed, script):
    for call in streamed[script].calls:
        sent = json.loads(call.body)
        assert (sent["stream"], sent["stream_options"]) == (True, {"include_usage": True})


# --- sessions ---

THINK_S = 0.2
ANSWER = '\u00e9\n"quoted" \U0001f600 to '
SESSIONS = [
    {"turns": [{"content": "a0", "max_tokens": 3}, {"content": "a1", "delay_ms": THINK_S * 1e3}, {"content": "a2"}],
     "system": "mine", "output_tokens": 9, "top_k": 2},
    {"text": "alone"},
    {"id": "x", "conversations": [
        {"from": "system", "value": "theirs"}, {"from": "human", "value": "b0"}, {"from": "gpt", "value": "B"},
        {"from": "human", "value": "b1"}, {"from": "tool", "value": "ignored"}],
     "body": {"max_completion_tokens": 4}},
    {"turns": [{"content": "c0"}, {"content": "c1 fails"}, {"content": "never"}], "model": "other"},
    {"turns": [{"content": [{"type": "text", "text": "d0"}]}, {"role": "assistant", "content": "D"}, {"content": "d1"}],
     "text": "ignored"},
]  # fmt: skip
TURNS_SENT = [("a0", 0, 1), ("a1", 0, 2), ("a2", 0, 3), ("alone", "", ""), ("b0", 2, 1), ("b1", 2, 2), ("c0", 3, 1),
              ("c1 fails", 3, 2), ("d0", 4, 1), ("d1", 4, 2)]  # fmt: skip


def last_text(sent: Mapping[str, Any]) -> str:
    content = sent["messages"][-1]["content"]
    return str(content if isinstance(content, str) else content[0]["text"])


@pytest.fixture(scope="module", params=[False, True], ids=["whole", "streamed"])
def talks(request, tmp_path_factory) -> tuple[dict[str, Script], dict[int, tuple[float, float]]]:
    """What both scripts made of the sessions; and of each call when it came, and when it was answered."""
    times: dict[int, tuple[float, float]] = {}

    def answer(call: Call) -> None:
        came_s, sent = time.perf_counter(), json.loads(call.body)
        text = last_text(sent)
        if text.endswith("fails"):
            act = body({"error": "no"}, status="500 No")
        elif sent.get("stream"):
            words = [*re.findall("...|.+", ANSWER, re.S), text]
            hm = [{"index": 0, "delta": {"reasoning_content": "hm", "content": None}}]
            said = (piece([{"index": 0, "delta": {"content": word}, "finish_reason": None}]) for word in words)
            act = streams(ROLE, piece(hm), *said, FINISH, COUNTS, DONE)
        else:
            message = {"role": "assistant", "content": ANSWER + text, "reasoning_content": "hm"}
            act = body(completion(choices=[{"index": 0, "message": message, "finish_reason": "stop"}]))
        act(call)
        times[id(call)] = came_s, time.perf_counter()

    corpus = "".join(json.dumps(line) + "\n" for line in SESSIONS).encode()
    return both(tmp_path_factory.mktemp("sessions"), corpus, answer, stream=request.param, system=SYSTEM), times


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_turn_of_a_session_is_asked_with_all_that_was_said_before(talks, script):
    said: list[Any] = []
    bodies = [json.loads(call.body) for call in talks[0][script].calls]
    assert [last_text(sent) for sent in bodies] == [text for text, *_ in TURNS_SENT]
    for sent, (text, _, turn) in zip(bodies, TURNS_SENT):
        system = {"a": "mine", "b": "theirs"}.get(text[0] * (text != "alone"), SYSTEM)
        said = [{"role": "system", "content": system}] if turn in ("", 1) else said
        assert sent["messages"][:-1] == said
        said = [*sent["messages"], {"role": "assistant", "content": ANSWER + text}]
    limits = [(sent.get("max_tokens"), sent.get("max_completion_tokens")) for sent in bodies]
    assert limits == [(3, None), (9, None), (9, None), (RUN_LIMIT, None), *[(None, 4)] * 2, *[(RUN_LIMIT, None)] * 4]


def test_a_session_comes_to_the_same_requests_and_rows_in_both(talks):
    benchmarks, locusts = ([json.loads(call.body) for call in talks[0][name].calls] for name in SCRIPTS)
    assert benchmarks == locusts
    for at, (text, session, turn) in enumerate(TURNS_SENT):
        for row in same_rows(talks[0], at):
            assert (row["session"], row["turn"]) == (str(session), str(turn))
            assert row["error_kind"] == ("http_500" if text.endswith("fails") else "")
    assert [row["index"] for row in talks[0]["locust"].rows] == [*"01234567", "9", "10"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_turn_comes_after_its_think_time(talks, script):
    scripts, times = talks
    first, second = (times[id(call)] for call in scripts[script].calls[:2])
    assert second[0] - first[0] > THINK_S * 0.95, "counted here from before the answer on"


@pytest.mark.parametrize("script", SCRIPTS)
def test_nobody_there(tmp_path, script):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "a"}\n')
    SCRIPTS[script](tmp_path, free_port(), corpus)
    (row,) = rows_of(tmp_path / f"{script}.csv")
    assert (row["status"], row["error_kind"], row["latency_ms"], row["sent_s"]) == (
        "http_error",
        "connect_refused",
        "",
        "",
    )


# --- when latency begins ---

LARGE = 12_000_000


class SlowReader:
    """A socket that is read slowly; `began` and `ended` say when, by the clock of this process."""

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self.began = self.ended = 0.0

    def recv(self, size: int) -> bytes:
        data: bytes = self._sock.recv(size)
        self.ended = time.perf_counter()
        self.began = self.began or self.ended
        time.sleep(0.002)
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


@pytest.mark.parametrize("script", SCRIPTS)
def test_latency_begins_when_the_last_byte_is_handed_over(tmp_path, script):
    """While a large request is still being taken, no latency passes: the server takes long to read it."""
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(json.dumps({"text": "x" * LARGE}) + "\n")
    readings = []

    def answer(call: Call) -> None:
        readings.append((call.sock.ended - call.sock.began) * 1000)
        call.send(reply("200 OK", as_json(completion())))

    with HttpServer(answer, SlowReader) as server:
        SCRIPTS[script](tmp_path, server.port, corpus)
    (row,) = rows_of(tmp_path / f"{script}.csv")
    assert float(row["latency_ms"]) < readings[0] * 0.75, "what still lay in the kernel's buffers, and no more"


# --- when the first token comes ---

WAIT_S = 0.15  # from the role chunk to the first token, and from there to the last


@pytest.mark.parametrize("script", SCRIPTS)
def test_ttft_ends_with_the_first_token_and_not_with_the_role(tmp_path, script):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "a"}\n')
    stamps = []

    def answer(call: Call) -> None:
        stamps.append(time.perf_counter())
        call.send(STREAM_HEAD + chunk(ROLE))
        for event in (ONE, TWO):
            time.sleep(WAIT_S)
            stamps.append(time.perf_counter())
            call.send(chunk(event))
        time.sleep(WAIT_S)
        call.send(chunk(FINISH + piece([], usage={"prompt_tokens": 7, "completion_tokens": 5}) + DONE) + LAST_CHUNK)

    with HttpServer(answer) as server:
        SCRIPTS[script](tmp_path, server.port, corpus, stream=True)
    (row,) = rows_of(tmp_path / f"{script}.csv")
    asked, first, last = stamps
    assert float(row["ttft_ms"]) == pytest.approx((first - asked) * 1000, abs=WAIT_S * 500)
    assert float(row["tpot_ms"]) == pytest.approx((last - first) * 1000 / 4, abs=WAIT_S * 125)
    assert float(row["latency_ms"]) == pytest.approx((last - asked) * 1000, abs=WAIT_S * 500)
