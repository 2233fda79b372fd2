"""Section 10, Sender: what is sent, what a refusal teaches, and when a proxy is used."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any, Callable, Optional

import pytest

import online_bench_openai_async as bench
from tests.support.checked_runs import PATIENT, run
from tests.support.faults import ACTS, SUCCESS, FaultServer, fault_prompt
from tests.support.program import Outcome
from tests.support.records import make_config
from tests.support.replies import ANSWER, reply
from tests.support.server import Call, ScriptedServer, closed_port, says
from tests.support.tables import json_lines


def test_only_what_was_asked_for_is_sent() -> None:
    request = bench.Request({"messages": [{"role": "user", "content": "x"}]})
    body = bench.request_body(make_config(output_tokens=5), bench.Dialect(), request)
    assert body == {"model": "m", "messages": request.messages, "max_tokens": 5, "temperature": 0.0}


def test_streams_ask_for_usage_and_extra_fields_win() -> None:
    config = make_config(stream=True, extra_body={"ignore_eos": True, "temperature": 1})
    body = bench.request_body(config, bench.Dialect(), bench.Request({"messages": []}, output_tokens=7))
    assert body["stream_options"] == {"include_usage": True}
    assert (body["max_tokens"], body["ignore_eos"], body["temperature"]) == (7, True, 1)


def refusal(message: str, kind: str = "http_400") -> list[bench.ErrorGroup]:
    return [bench.ErrorGroup("http_error", kind, 1, message)]


def test_a_refusal_teaches_the_dialect() -> None:
    config, dialect = make_config(stream=True), bench.Dialect()
    newer = bench.concede(dialect, config, refusal("'max_tokens' is not supported, use 'max_completion_tokens'"))
    assert newer is not None
    assert newer.limit_field == "max_completion_tokens"
    assert str(newer) == "max_completion_tokens, usage"  # as the user is told
    silent = bench.concede(dialect, config, refusal("stream_options is not allowed"))
    assert silent is not None
    assert not silent.include_usage


def test_counts_in_every_chunk_are_given_up_before_all_counts_are() -> None:
    config = make_config(stream=True, continuous_usage=True)
    every = bench.Dialect(continuous_usage=True)
    for word in ("stream_options.continuous_usage_stats", "continuous_usage_stats", "stream_options"):
        fewer = bench.concede(every, config, refusal(f"{word}: not permitted"))
        assert fewer == bench.Dialect(include_usage=True)
        body = bench.request_body(config, fewer, bench.Request({"messages": []}))
        assert body["stream_options"] == {"include_usage": True}
    none = bench.concede(bench.Dialect(include_usage=True), config, refusal("stream_options: not permitted"))
    assert none is not None
    assert "stream_options" not in bench.request_body(config, none, bench.Request({"messages": []}))


def test_a_refusal_that_teaches_nothing_is_final() -> None:
    config = make_config()
    assert bench.concede(bench.Dialect(), config, refusal("no such model")) is None
    assert bench.concede(bench.Dialect(), config, refusal("max_tokens", "http_500")) is None
    fixed = make_config(max_tokens_field="max_tokens")
    assert bench.concede(bench.Dialect(), fixed, refusal("use max_completion_tokens")) is None
    already = bench.Dialect("max_completion_tokens")
    assert bench.concede(already, config, refusal("max_completion_tokens is too large")) is None


@pytest.mark.parametrize(
    ("url", "environ", "proxy"),
    [
        ("http://127.0.0.1:8000/v1", {"http_proxy": "http://p:1"}, None),
        ("http://localhost:8000/v1", {"all_proxy": "http://p:1"}, None),
        ("http://[::1]:8000/v1", {"http_proxy": "http://p:1"}, None),
        ("http://gpu.example/v1", {"http_proxy": "http://p:1"}, "http://p:1"),
        ("https://gpu.example/v1", {"http_proxy": "http://p:1"}, None),
        ("http://gpu.example/v1", {"http_proxy": "http://p:1", "no_proxy": "gpu.example"}, None),
        ("http://gpu.example/v1", {}, None),
    ],
)
def test_a_proxy_is_for_hosts_beyond_this_one(
    url: str, environ: dict[str, str], proxy: Optional[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert bench.proxy_for(url) == proxy


def failure(kind: str, message: str = "no") -> bench.Failure:
    return bench.Failure("http_error", kind, message)


@pytest.mark.parametrize(
    ("failed", "changes", "environ", "cure"),
    [
        (failure("http_404"), {"api_base": "http://h:1"}, {}, "does --api-base lack its /v1?"),
        (failure("http_404"), {}, {}, ""),
        (failure("http_401"), {}, {}, "the key was that of the default: no $OPENAI_API_KEY"),
        (failure("http_401"), {"api_key": "k"}, {}, "the key was that of --api-key"),
        (failure("http_403"), {"api_key": "k"}, {"OPENAI_API_KEY": "k"}, "the key was that of $OPENAI_API_KEY"),
        (failure("http_401"), {"api_key": "other"}, {"OPENAI_API_KEY": "k"}, "the key was that of --api-key"),
        (
            failure("tls_error", "[SSL: WRONG_VERSION_NUMBER] wrong version number"),
            {"insecure": True},
            {},
            "the port seems not to speak TLS: http:// instead of https://?",
        ),
        (failure("tls_error", "certificate verify failed"), {"insecure": True}, {}, ""),
        (failure("tls_error", "certificate verify failed"), {}, {}, "--ca-file FILE trusts a private authority,"),
        (failure("http_500"), {}, {}, ""),
    ],
)
def test_a_failure_that_an_option_explains_says_so(
    failed: bench.Failure, changes: dict[str, Any], environ: dict[str, str], cure: str
) -> None:
    told = bench.advice(failed, make_config(**changes), environ)
    assert told.startswith(cure)
    assert bool(told) == bool(cure)


@pytest.mark.parametrize("transport", ["stopwatch", "sdk"])
@pytest.mark.parametrize(
    "base", ["/v1?api-version=2024-10-21&key=canary-query", "/v1/?api-version=2024-10-21&key=canary-query"]
)
def test_the_query_of_the_base_url_stands_behind_the_path_and_its_secret_nowhere(
    cli: Callable[..., Outcome], script: Callable[..., ScriptedServer], tmp_path: Path, transport: str, base: str
) -> None:
    asked = []

    def answer(call: Call) -> None:
        asked.append(call.head.split(b"\r\n")[0].decode())
        if len(asked) < 4:
            call.send(reply("200 OK", ANSWER))
        else:
            call.send(reply("400 Bad Request", b"not with canary-query"))

    server = script(answer)
    words = ["--api-base", f"http://127.0.0.1:{server.port}{base}", "--model", "m", "--concurrency", "1"]
    words += ["--total-requests", "4", "--prompt-tokens", "8", "--transport", transport]
    words += ["--results-csv", str(tmp_path / "out.csv"), "--summary-jsonl", str(tmp_path / "out.jsonl")]
    done = cli(*words)
    assert set(asked) == {"POST /v1/chat/completions?api-version=2024-10-21&key=canary-query HTTP/1.1"}
    written = done.out + done.err + "".join(path.read_text() for path in tmp_path.iterdir())
    assert "canary-query" not in written
    assert "api-version=2024-10-21&key=***" in written
    assert "not with ***" in written


def test_the_models_are_asked_for_with_the_query(
    cli: Callable[..., Outcome], script: Callable[..., ScriptedServer]
) -> None:
    asked = []

    def answer(call: Call) -> None:
        asked.append(call.head.split()[1].decode())
        call.send(reply("200 OK", b'{"data": [{"id": "the-model"}]}'))

    done = cli("--api-base", f"{script(answer).api_base}?a=b")
    assert "serves: the-model" in done.err
    assert asked == ["/v1/models?a=b"]


@pytest.mark.parametrize("name", ["stream", "messages", "model"])
def test_a_body_that_would_belie_the_report_is_refused(cli: Callable[..., Outcome], name: str) -> None:
    done = cli("--model", "m", "--extra-body", f'{{"{name}": null}}')
    assert done.code == 2
    assert f"--extra-body: takes no {name}" in done.err


def test_a_limit_in_the_body_is_sent_and_reported(
    cli: Callable[..., Outcome], script: Callable[..., ScriptedServer], tmp_path: Path
) -> None:
    server = script(says(reply("200 OK", ANSWER)))
    words = ["--api-base", server.api_base, "--model", "m", "--concurrency", "1", "--total-requests", "2"]
    extra = '{"max_completion_tokens": 3, "temperature": 0.7}'
    done = cli(*words, "--warmup", "0", "--extra-body", extra, "--summary-jsonl", tmp_path / "s.jsonl")
    sent = json.loads(server.bodies[-1])
    assert (sent["max_completion_tokens"], sent["temperature"], "max_tokens" in sent) == (3, 0.7, False)
    assert "output_tokens: 3\n" in done.out
    assert "the model ended them itself" not in done.out
    (told,) = json_lines(tmp_path / "s.jsonl")
    assert (told["config"]["output_tokens"], told["config"]["temperature"]) == (3, 0.7)


def test_a_redirect_shows_where_to_and_no_secret(
    cli: Callable[..., Outcome], script: Callable[..., ScriptedServer]
) -> None:
    place = "Location: https://u:p@elsewhere/v1?token=canary"
    server = script(says(reply("307 Temporary Redirect", b"", place)))
    done = cli("--api-base", server.api_base, "--model", "m", "--concurrency", "1", "--total-requests", "1")
    assert "HTTP 307: redirects are not followed; Location: https://***@elsewhere/v1?token=***" in done.err
    assert "canary" not in done.err


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
@pytest.mark.parametrize("transport", ["stopwatch", "sdk"])
def test_unannounced_closes_cost_no_request_and_none_is_served_twice(
    monkeypatch: pytest.MonkeyPatch, transport: str, loop: str
) -> None:
    if loop == "asyncio":
        monkeypatch.setitem(sys.modules, "uvloop", None)
    name = "closes_after_each_reply"
    with FaultServer(ACTS) as server:
        got = run(server.api_base, [fault_prompt(name)] * 200, transport=transport, concurrency=8, **PATIENT)
        assert server.seen[name] == 200
    assert got.fates == {SUCCESS}


# --- corpus lines as requests, several servers, headers ---

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
SECRET, HEADER = "canary-in-a-body", "canary-in-a-header"
TOOL = {"type": "mcp", "server_label": "s", "headers": {"Authorization": f"Bearer {SECRET}"}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}
LINES: list[dict[str, Any]] = [
    {"text": "a", "tools": [TOOL], "tool_choice": "auto", "model": "one", "label": "tools", "id": 7},
    {"text": "b", "response_format": SCHEMA, "temperature": 0.5, "max_completion_tokens": 9, "label": "schema"},
    {"messages": [{"role": "user", "content": [IMAGE]}], "model": "two", "label": "image", "body": {"x_own": [1]}},
    {"custom_id": "r-1", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user"}]}},
]
WANTED = [
    {"model": "one", "messages": [{"role": "user", "content": "a"}], "tools": [TOOL], "tool_choice": "auto",
     "top_k": 5, "temperature": 0.0, "max_tokens": 16},
    {"model": "m", "messages": [{"role": "user", "content": "b"}], "response_format": SCHEMA,
     "top_k": 5, "temperature": 0.5, "max_tokens": 9},
    {"model": "two", "messages": [{"role": "user", "content": [IMAGE]}], "x_own": [1],
     "top_k": 5, "temperature": 0.0, "max_tokens": 16},
    {"model": "m", "messages": [{"role": "user"}]},
]  # fmt: skip


def echo_of(call: Call) -> bytes:
    """A refusal that says back all that was sent, for the first line; else an answer."""
    if b"canary-in-a-body" in call.body:
        return reply("500 No", b"denied: " + call.head[-400:] + call.body)
    return reply("200 OK", ANSWER)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("transport", ["stopwatch", "sdk"])
def test_each_body_arrives_as_its_line_says_and_no_secret_is_shown(
    cli: Callable[..., Outcome], script: Callable[..., ScriptedServer], tmp_path: Path, transport: str, processes: int
) -> None:
    calls: list[tuple[int, Call]] = []

    def answer(at: int, call: Call) -> None:
        calls.append((at, call))
        call.send(echo_of(call))

    servers = [script(functools.partial(answer, at)) for at in range(2)]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    words: list[Any] = [word for server in servers for word in ("--api-base", server.api_base)]
    words += ["--model", "m", "--requests-file", corpus, "--transport", transport, "--processes", processes]
    words += ["--concurrency", 2, "--output-tokens", 16, "--extra-body", '{"top_k": 5}', "--warmup", 1]
    words += ["--header", f"X-Gate: {HEADER}", "--header", "X-Tier=a1", "--api-key", ""]
    done = cli(*words, "--results-csv", tmp_path / "out.csv", "--summary-jsonl", tmp_path / "out.jsonl")
    assert done.code == 0, done.err

    def sorted_bodies(bodies: list[Any]) -> list[str]:
        return sorted(json.dumps(body, sort_keys=True) for body in bodies)

    measured = [body for _, call in calls for body in [json.loads(call.body)] if body in WANTED]
    assert sorted_bodies(measured) == sorted_bodies(WANTED)
    warm_up = [(at, json.loads(call.body)["model"]) for at, call in calls if json.loads(call.body) not in WANTED]
    assert sorted(warm_up) == sorted([(at, model) for at in range(2) for model in ("one", "m", "two")] * processes)
    heads = [call.head.lower() for _, call in calls]
    assert all(b"x-gate: canary-in-a-header" in head and b"x-tier: a1" in head for head in heads)
    assert not any(b"authorization" in head for head in heads)
    written = done.out + done.err + "".join(path.read_text() for path in tmp_path.glob("out*"))
    assert "canary" not in written
    assert "denied: ***" in written or "denied: " in written
    assert [row["label"] for row in done.rows] == ["tools", "schema", "image", "r-1"]
    assert {row["server"] for row in done.rows} == {server.api_base for server in servers}
    assert "not sent: id" in done.out
    assert '"X-Gate": "***", "X-Tier": "a1"' in done.out


def test_a_server_that_refuses_everything_is_named_and_others_are_measured(
    cli: Callable[..., Outcome], script: Callable[..., ScriptedServer]
) -> None:
    good = script(says(reply("200 OK", ANSWER)))
    with closed_port() as port:
        dead = f"http://127.0.0.1:{port}/v1"
        words = ["--api-base", good.api_base, "--api-base", dead, "--model", "m", "--concurrency", 2]
        done = cli(*words, "--total-requests", 8, "--max-error-rate", 1)
    assert f"requests failed, all of those to {dead}" in done.err
    warnings = " ".join(done.out.split("\n\n")[1].split())
    assert f"WARNING: {dead}: 4 requests, none answered: " in warnings
    rows = {line.split()[0]: line.split()[1:3] for line in done.out.splitlines() if line.startswith("http://")}
    assert rows == {good.api_base: ["4", "0"], dead: ["0", "4"]}


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_plain_completions(
    cli: Callable[..., Outcome], demo: Callable[..., Any], tmp_path: Path, streamed: bool
) -> None:
    server = demo(ttft_ms=1, gap_ms=2)
    words = [*server.target, "--endpoint-type", "completions", "--concurrency", 2, "--total-requests", 6]
    words += ["--output-tokens", 8, "--prompt-tokens", 40, "--summary-jsonl", tmp_path / "s.jsonl"]
    done = cli(*words, *(["--stream"] if streamed else []), "--results-csv", tmp_path / "out.csv")
    assert done.code == 0, done.err
    assert {row["completion_tokens"] for row in done.rows} == {"8"}
    (told,) = json_lines(tmp_path / "s.jsonl")
    assert told["endpoint_type"] == "openai"
    assert abs(told["mean_prompt_tokens"] - 40) <= 1
    if streamed:
        assert {row["chunks"] for row in done.rows} == {"8"}
        assert told["median_tpot_ms"] > 1


def test_a_chunk_of_a_plain_completion_is_told_without_json() -> None:
    chunk = b'data: {"id":"c","choices":[{"index":0,"text":" word","logprobs":null,"finish_reason":null}]}'
    assert bench.text_at(chunk)
    assert not bench.text_at(chunk.replace(b" word", b""))
    assert not bench.text_at(chunk.replace(b"null}]}", b'"stop"}]}'))


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--header", "no colon"], "--header: takes 'Name: value' or Name=value"),
        (["--header", "Na me: x"], "--header: takes 'Name: value' or Name=value"),
        (["--header", "Host: x"], "--header: takes no Host: HTTP itself sets it"),
        (["--api-base", "http://a/v1", "--api-base", "nowhere"], "--api-base: takes a URL like"),
        (["--endpoint-type", "completions", "--system-prompt", "x"], "--system-prompt is of a chat"),
        (["--wait-ready", "-1"], "--wait-ready: takes a number of seconds above 0"),
        (["--extra-body", '{"prompt": "x"}'], "--extra-body: takes no prompt"),
    ],
)
def test_what_cannot_be_sent_is_refused_in_one_line(
    cli: Callable[..., Outcome], words: list[str], complaint: str
) -> None:
    done = cli("--model", "m", *words)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert complaint in done.err


@pytest.mark.parametrize("line", ['{"messages": [{"role": "user", "content": "x"}]}', '{"turns": [{"content": "x"}]}'])
def test_a_chat_is_no_plain_prompt(cli: Callable[..., Outcome], tmp_path: Path, line: str) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(line)
    done = cli("--model", "m", "--endpoint-type", "completions", "--requests-file", corpus)
    assert done.code == 2
    assert "a chat, and /completions takes plain prompts: 'text' or 'prompt'" in done.err


def test_no_model_is_needed_where_every_line_has_one(
    cli: Callable[..., Outcome], script: Callable[..., ScriptedServer], tmp_path: Path
) -> None:
    server = script(says(reply("200 OK", ANSWER)))
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "x", "model": "lora"}\n')
    assert cli("--api-base", server.api_base, "--requests-file", corpus, "--concurrency", 1).code == 0
    assert {json.loads(body)["model"] for body in server.bodies if body} == {"lora"}
