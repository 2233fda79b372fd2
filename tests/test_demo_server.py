"""Room 10: the simulated server, from the outside."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import Any, Callable

import pytest

import online_bench_openai_async as bench
from tests.support.demo import Demo
from tests.support.program import SCRIPT


def post(demo: Demo, body: Any) -> Any:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return urllib.request.urlopen(urllib.request.Request(demo.url + "/chat/completions", data), timeout=10)


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as response:
        return str(response.read().decode())


ASK = {"model": "demo", "messages": [{"role": "user", "content": "one two three"}], "max_tokens": 5}


def test_a_whole_completion(demo: Callable[..., Demo]) -> None:
    with post(demo(ttft_ms=1, gap_ms=0), ASK) as response:
        reply = json.load(response)
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 5
    assert reply["choices"][0]["message"]["content"].split() == ["token"] * 5


def test_a_streamed_completion(demo: Callable[..., Demo]) -> None:
    asked = {**ASK, "stream": True, "stream_options": {"include_usage": True}}
    with post(demo(ttft_ms=1, gap_ms=1), asked) as response:
        answer = bench.read_reply(True, [(0, response.read())])
    assert answer.failure is None
    assert (answer.chunks, answer.completion_tokens) == (5, 5)


def test_models_health_and_metrics(demo: Callable[..., Demo]) -> None:
    server = demo(ttft_ms=1, gap_ms=0)
    post(server, ASK).close()
    assert json.loads(get(server.url + "/models"))["data"][0]["id"] == "demo"
    assert get(server.root + "/health") == ""
    metrics = get(server.root + "/metrics")
    assert 'vllm:generation_tokens_total{model_name="demo"} 5' in metrics
    assert "vllm:time_to_first_token_seconds_count" in metrics


@pytest.mark.parametrize("body", [b"{", b"[]", b"{}", b'{"messages": 5}', {**ASK, "max_tokens": 0}])
def test_a_bad_request_is_refused_with_the_reason(demo: Callable[..., Demo], body: Any) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(demo(ttft_ms=1), body)
    with caught.value as error:
        assert error.code == 400
        assert json.load(error)["error"]["message"]


def test_a_path_that_is_not_there(demo: Callable[..., Demo]) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(demo(ttft_ms=1).root + "/nothing")
    caught.value.close()
    assert caught.value.code == 404


def test_its_truth_has_the_stamps_of_every_request(demo: Callable[..., Demo]) -> None:
    server = demo(ttft_ms=50, gap_ms=10)
    before = time.perf_counter_ns()
    post(server, {**ASK, "stream": True}).read()
    (row,) = server.truth()["requests"]
    assert before < row["arrived_ns"] < row["first_ns"] < row["last_ns"] < time.perf_counter_ns()
    assert (row["first_ns"] - row["arrived_ns"]) / 1e6 >= 50
    assert (row["last_ns"] - row["arrived_ns"]) / 1e6 >= 50 + 4 * 10


def test_batching_saturates_as_a_gpu_does(cli: Callable[..., Any], demo: Callable[..., Demo]) -> None:
    """Throughput rises with concurrency while the batch has room, and stays where it has none."""
    rates = []
    for concurrency in (1, 8, 16):
        server = demo(step_ms=2, step_ms_per_sequence=0, max_batch=8)
        sizes = ["--concurrency", str(concurrency), "--total-requests", str(8 * concurrency), "--output-tokens", "16"]
        out = cli("--api-base", server.url, "--model", "demo", *sizes, "--prompt-tokens", "16").out
        rates.append(float(out.split("Generated tokens/s: ")[1].split()[0]))
    assert 5 < rates[1] / rates[0] < 9
    assert 0.8 < rates[2] / rates[1] < 1.2


def test_it_listens_on_loopback_only(demo: Callable[..., Demo]) -> None:
    port = int(demo(ttft_ms=1).url.split(":")[2].split("/")[0])
    for address in socket.gethostbyname_ex(socket.gethostname())[2]:
        if not address.startswith("127."):
            with socket.socket() as probe:
                probe.settimeout(1)
                assert probe.connect_ex((address, port)) != 0


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_it_ends_with_its_parent_even_if_that_is_killed() -> None:
    code = (
        "import online_bench_openai_async as b, sys, time\n"
        "d = b.DemoProcess(None); print(d._process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=SCRIPT.parent)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    os.kill(child, 0)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(200):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("the demo server outlived its parent by 10 s")


def test_a_server_in_the_foreground_serves_until_ctrl_c() -> None:
    process = subprocess.Popen([sys.executable, str(SCRIPT), "--demo-server", "0"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    url = process.stdout.readline().decode().strip()
    assert json.loads(get(url + "/models"))["data"]
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 0
    process.stdout.close()
