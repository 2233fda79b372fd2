"""Section 10, Sender: what is sent, what a refusal teaches, and when a proxy is used."""

from __future__ import annotations

from typing import Optional

import pytest

import online_bench_openai_async as bench
from tests.support.records import make_config


def test_only_what_was_asked_for_is_sent() -> None:
    request = bench.Request([{"role": "user", "content": "x"}])
    body = bench.request_body(make_config(output_tokens=5), bench.Dialect(), request)
    assert body == {"model": "m", "messages": request.messages, "max_tokens": 5, "temperature": 0.0}


def test_streams_ask_for_usage_and_extra_fields_win() -> None:
    config = make_config(stream=True, extra_body={"ignore_eos": True, "temperature": 1})
    body = bench.request_body(config, bench.Dialect(), bench.Request([], output_tokens=7))
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
