"""Section 10, Sender: what is sent, what a refusal teaches, and when a proxy is used."""

from __future__ import annotations

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
from tests.support.server import Call, ScriptedServer, says
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
