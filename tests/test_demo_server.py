"""demo_server.py from the outside: its replies, its /truth, its /metrics, its command line."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Callable, Optional

import pytest

import demo_server
from tests.support.processes import is_alive, needs_proc, wait_until

SERVER = Path(__file__).resolve().parent.parent / "demo_server.py"
QUICK = ("--ttft-ms", "1", "--gap-ms", "0")
MS = 1_000_000  # ns
ASK = {"model": "demo", "messages": [{"role": "user", "content": "one two three"}], "max_tokens": 5}


class Server:
    """One demo server in a process of its own."""

    def __init__(self, *options: str, script: Path = SERVER, python: str = sys.executable) -> None:
        command = [python, "-I", "-W", "error", str(script), "--port", "0", "--until-stdin-closes", *options]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=script.parent)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().decode().strip()
        self.root = self.url[: -len("/v1")]
        self.port = int(self.root.rpartition(":")[2])

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.root + path, timeout=20) as response:
            return str(response.read().decode())

    def post(self, body: Any, path: str = "/v1/chat/completions") -> bytes:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(self.root + path, data), timeout=20) as response:
            return bytes(response.read())

    def ask(self, **changes: Any) -> Any:
        """The whole reply to ASK with changes."""
        return json.loads(self.post({**ASK, **changes}))

    def events(self, body: Any, path: str = "/v1/chat/completions") -> list[Any]:
        """The stream's events, the final [DONE] checked and left out."""
        lines = self.post({**body, "stream": True}, path).decode().split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        return [json.loads(line[len("data: ") :]) for line in lines[:-2]]

    def truth(self, since_ns: Optional[int] = None) -> list[dict[str, int]]:
        report = json.loads(self.get("/truth" + (f"?since_ns={since_ns}" if since_ns is not None else "")))
        return [dict(zip(report["fields"], row)) for row in report["requests"]]

    def metric(self, name: str, more: str = "") -> float:
        labels = re.escape(f'engine="0",model_name="demo"{more}')
        found = re.search(rf"^vllm:{name}{{{labels}}} (\S+)$", self.get("/metrics"), re.MULTILINE)
        assert found, name
        return float(found[1])

    def stop(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        assert self.process.wait(timeout=10) == 0
        self.process.stdout.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    started: list[Server] = []

    def start(*options: str, **how: Any) -> Server:
        started.append(Server(*options, **how))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="module")
def quick() -> Iterator[Server]:
    """One for all tests that look at a reply and not at what was before it."""
    server = Server(*QUICK)
    yield server
    server.stop()


def refused(act: Callable[[], object]) -> tuple[int, str]:
    """(HTTP status, message) of a call that must fail."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        act()
    with caught.value as error:
        return error.code, json.load(error)["error"]["message"]


def words(count: int, first: str = "w0") -> str:
    return " ".join([first, *(f"w{i}" for i in range(1, count))])


# --- replies ---


def test_a_whole_chat_completion(quick: Server) -> None:
    reply = quick.ask()
    (choice,) = reply["choices"]
    assert (reply["object"], reply["model"], choice["finish_reason"]) == ("chat.completion", "demo", "length")
    assert choice["message"] == {"role": "assistant", "content": " token" * 5}
    assert (reply["usage"]["completion_tokens"], reply["usage"]["total_tokens"]) == (5, 8 + 3 + 5)


def test_a_streamed_chat_completion(quick: Server) -> None:
    role, *tokens, finish, usage = quick.events({**ASK, "stream_options": {"include_usage": True}})
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [event["choices"][0]["delta"] for event in tokens] == [{"content": " token"}] * 5
    assert (finish["choices"][0]["delta"], finish["choices"][0]["finish_reason"]) == ({}, "length")
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 5)
    assert not any("usage" in event for event in [role, *tokens, finish])


def test_the_role_and_the_first_token_come_in_one_packet(serve: Callable[..., Server]) -> None:
    server = serve("--ttft-ms", "20", "--gap-ms", "200")
    body = json.dumps({**ASK, "stream": True, "max_tokens": 2}).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        first = sock.recv(1 << 16)
    assert first.count(b'"role":"assistant"') == first.count(b'" token"') == 1


def test_usage_in_every_event(quick: Server) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = quick.events({**ASK, "stream_options": options})
    assert [event["usage"]["completion_tokens"] for event in events] == [0, 1, 2, 3, 4, 5, 5, 5]


@pytest.mark.parametrize(("prompt", "tokens"), [("one two, three", 4), ([5, 6, 7], 3)])
def test_plain_completions(quick: Server, prompt: Any, tokens: int) -> None:
    asked = {"model": "demo", "prompt": prompt, "max_tokens": 2}
    whole = json.loads(quick.post(asked, "/v1/completions"))
    assert (whole["object"], whole["choices"][0]["text"]) == ("text_completion", " token token")
    assert (whole["usage"]["prompt_tokens"], whole["usage"]["completion_tokens"]) == (tokens, 2)
    streamed = quick.events({**asked, "stream_options": {"include_usage": True}}, "/v1/completions")
    assert [event["choices"][0]["text"] for event in streamed[:-1]] == [" token", " token", ""]
    assert streamed[-2]["choices"][0]["finish_reason"] == "length"
    assert streamed[-1]["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "image_url"}]}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}, {"role": "tool", "content": "y"}]},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": []}]},
        {"max_tokens": None, "max_completion_tokens": 5, "ignore_eos": True, "min_tokens": 5, "n": 1, "tools": []},
        {"model": "another"},
    ],
)
def test_what_real_servers_take_is_taken(quick: Server, changes: Any) -> None:
    assert quick.ask(**changes)["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"{", "JSONDecodeError"),
        (b"[]", "not a request"),
        (b"\xff", "not a request"),
        ({}, "messages"),
        ({**ASK, "messages": 5}, "messages must be a list"),
        ({**ASK, "messages": ["x"]}, "not a request"),
        ({**ASK, "max_tokens": 0}, "1 or more"),
        ({**ASK, "max_tokens": True}, "1 or more"),
        ({**ASK, "min_tokens": 9}, "at most max_tokens"),
        ({**ASK, "n": 2}, "n must be 1"),
        ({**ASK, "stream_options": {"include_usage": True}}, "stream: true"),
    ],
)
def test_a_bad_request_is_refused_with_the_reason(quick: Server, body: Any, complaint: str) -> None:
    code, message = refused(lambda: quick.post(body))
    assert (code, complaint in message) == (400, True), message
    assert quick.ask()["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize("prompt", [None, "", [], ["a", "b"], [[1], [2]], [True]])
def test_a_prompt_is_one_text_or_one_list_of_token_ids(quick: Server, prompt: Any) -> None:
    assert refused(lambda: quick.post({"prompt": prompt}, "/v1/completions"))[0] == 400


def test_pages(serve: Callable[..., Server]) -> None:
    server = serve("--model", "llama", *QUICK)
    assert json.loads(server.get("/v1/models"))["data"][0]["id"] == "llama"
    assert server.get("/health") == ""
    assert refused(lambda: server.get("/nothing"))[0] == 404
    assert refused(lambda: server.get("/truth?since=5"))[0] == 400
    assert refused(lambda: server.get("/truth?since_ns=x"))[0] == 400


# --- the wire ---


def test_requests_split_joined_and_broken_harm_nobody(quick: Server) -> None:
    body = json.dumps({**ASK, "max_tokens": 1}).encode()
    request = b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    with socket.create_connection(("127.0.0.1", quick.port), timeout=10) as sock:
        sock.sendall(request[:9])
        time.sleep(0.02)
        sock.sendall(request[9:-9])
        time.sleep(0.02)
        sock.sendall(request[-9:] + request + b"GET /health HTTP/1.1\r\n\r\n" * 2000)
        received = b""
        while received.count(b"HTTP/1.1 200 OK") < 2002:
            received += sock.recv(1 << 16)
    assert received.count(b'"finish_reason":"length"') == 2
    for garbage in (
        b"\x16\x03\x01\x02\x00",
        b"A" * 70_000,
        b"GET http://[ HTTP/1.1\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: " + b"9" * 6000 + b"\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", quick.port), timeout=10) as sock:
            sock.sendall(garbage)
            sock.shutdown(socket.SHUT_WR)
            answer = sock.recv(1 << 16)
            assert answer == b"" or answer[9:12] in (b"404", b"411")
    assert quick.ask()["usage"]["completion_tokens"] == 5


def test_a_slow_reader_gets_all_of_a_large_reply(quick: Server) -> None:
    body = json.dumps({**ASK, "max_tokens": 1_000_000}).encode()
    with socket.create_connection(("127.0.0.1", quick.port), timeout=10) as sock:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
        sock.sendall(head % len(body) + body)
        time.sleep(0.1)
        assert quick.ask(max_tokens=1)["usage"]["completion_tokens"] == 1  # meanwhile others are served
        received = b"".join(iter(lambda: sock.recv(1 << 20), b""))  # until it closes, as it was asked to
    assert received.count(b" token") == 1_000_000


def test_it_listens_on_loopback_only(quick: Server) -> None:
    port = quick.port
    for address in socket.gethostbyname_ex(socket.gethostname())[2]:
        if not address.startswith("127."):
            with socket.socket() as probe:
                probe.settimeout(1)
                assert probe.connect_ex((address, port)) != 0


# --- the truth ---


def test_the_stamps_lie_where_they_must(serve: Callable[..., Server]) -> None:
    server = serve("--ttft-ms", "50", "--gap-ms", "10")
    before = time.perf_counter_ns()
    server.events(ASK)
    (row,) = server.truth()
    assert before < row["arrived_ns"] < row["first_ns"] < row["last_ns"] < time.perf_counter_ns()
    assert row["first_due_ns"] - row["arrived_ns"] == 50 * MS
    assert row["last_due_ns"] - row["first_due_ns"] == 4 * 10 * MS
    assert row["first_ns"] >= row["first_due_ns"]
    assert row["last_ns"] >= row["last_due_ns"]
    assert (row["prompt_tokens"], row["emitted"], row["streamed"]) == (11, 5, True)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux stamps arrivals in the kernel")
def test_an_arrival_is_stamped_by_the_kernel_and_not_at_the_read(serve: Callable[..., Server]) -> None:
    server = serve(*QUICK)
    body = json.dumps(ASK).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\n\r\n")
        assert sock.recv(1 << 16)  # accepted
        server.process.send_signal(signal.SIGSTOP)
        sent_ns = time.perf_counter_ns()
        sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        time.sleep(0.1)
        woken_ns = time.perf_counter_ns()
        server.process.send_signal(signal.SIGCONT)
        assert sock.recv(1 << 16)
    (row,) = server.truth()
    assert sent_ns < row["arrived_ns"] < woken_ns - 50 * MS < woken_ns < row["last_ns"]


def test_since_leaves_out_what_arrived_before(serve: Callable[..., Server]) -> None:
    server = serve(*QUICK)
    numbers = [server.ask() and server.truth()[-1] for _ in range(3)]
    assert [row["number"] for row in server.truth(numbers[1]["arrived_ns"])] == [1, 2]
    assert server.truth(time.perf_counter_ns()) == []


def test_a_client_that_leaves_is_an_abort_and_frees_its_place(serve: Callable[..., Server]) -> None:
    server = serve("--step-ms", "5", "--max-batch", "1")
    body = json.dumps({**ASK, "stream": True, "max_tokens": 100_000}).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        assert sock.recv(1 << 16)
        assert json.loads(server.get("/truth"))["in_flight"] == 1
        assert server.metric("num_requests_running") == 1
    assert server.ask()["usage"]["completion_tokens"] == 5
    report = json.loads(server.get("/truth"))
    assert (report["aborted"], report["in_flight"], len(report["requests"])) == (1, 0, 1)
    assert server.metric("request_success_total", ',finished_reason="abort"') == 1


# --- the engine ---


def test_a_full_batch_queues(serve: Callable[..., Server]) -> None:
    """Steps, queue and prefill take what the settings say, to the nanosecond, by the server's own timetable."""
    options = ("--step-ms", "4", "--step-ms-per-sequence", "1", "--max-batch", "2", "--prefill-tokens-per-s", "11000")
    server = serve(*options)
    body = json.dumps({**ASK, "max_tokens": 40}).encode()
    with contextlib.ExitStack() as stack:
        connect = partial(socket.create_connection, ("127.0.0.1", server.port), timeout=20)
        socks = [stack.enter_context(connect()) for _ in range(6)]
        for sock in socks:
            sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        assert all(sock.recv(1 << 16) for sock in socks)
    rows = server.truth()
    for row in rows:
        batch = [other for other in rows if other["started_ns"] <= row["started_ns"] < other["last_due_ns"]]
        newcomers = [other for other in batch if other["started_ns"] == row["started_ns"]]
        assert 1 <= len(batch) <= 2
        assert row["first_due_ns"] - row["started_ns"] == (4 + len(batch) + len(newcomers)) * MS
        assert row["started_ns"] >= row["arrived_ns"]
    assert (
        max(row["started_ns"] - row["arrived_ns"] for row in rows) >= 2 * 40 * 5 * MS - 40 * 6 * MS
    )  # two turns before it, the first of which had begun
    assert json.loads(server.get("/truth"))["peak_in_flight"] == 6
    assert server.metric("request_queue_time_seconds_count") == 6
    queued_s = sum(row["started_ns"] - row["arrived_ns"] for row in rows) / 1e9
    assert server.metric("request_queue_time_seconds_sum") == pytest.approx(queued_s)


def test_more_waiting_than_allowed_are_refused(serve: Callable[..., Server]) -> None:
    server = serve("--step-ms", "600", "--max-batch", "1", "--max-waiting", "1")

    def status(_: int) -> int:
        try:
            server.ask(max_tokens=1)
        except urllib.error.HTTPError as error:
            with error:
                return error.code
        return 200

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(status, range(4))) == [200, 200, 429, 429]


@pytest.mark.parametrize("engine", [("--ttft-ms", "30", "--gap-ms", "10"), ("--step-ms", "10")])
def test_a_stall_comes_once(serve: Callable[..., Server], engine: tuple[str, ...]) -> None:
    server = serve("--stall-once-at", "0.1", "--stall-s", "0.3", *engine)
    durations = []
    for _ in range(2):
        server.events({**ASK, "max_tokens": 20})
        durations.append(server.truth()[-1]["last_due_ns"] - server.truth()[-1]["first_due_ns"])
    assert durations[0] - durations[1] == 300 * MS
    assert server.metric("inter_token_latency_seconds_count") == 2 * 19
    assert server.metric("inter_token_latency_seconds_sum") == pytest.approx(sum(durations) / 1e9)


def test_the_first_wave_can_be_slow(serve: Callable[..., Server]) -> None:
    server = serve("--ttft-ms", "400", "--gap-ms", "0", "--first-wave-extra-ms", "100")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(server.ask)
        time.sleep(0.2)
        second = pool.submit(server.ask)
        assert first.result()
        assert second.result()
    assert [row["first_due_ns"] - row["arrived_ns"] for row in server.truth()] == [500 * MS, 400 * MS]


# --- the prefix cache ---


def cached(reply: Any) -> int:
    return int(reply["usage"]["prompt_tokens_details"]["cached_tokens"])


def plain(server: Server, prompt: Any) -> int:
    return cached(json.loads(server.post({"prompt": prompt, "max_tokens": 1}, "/v1/completions")))


def test_whole_blocks_of_an_equal_beginning_are_cached(serve: Callable[..., Server]) -> None:
    server = serve(*QUICK)
    assert plain(server, words(40)) == 0
    assert plain(server, words(40)) == 32
    assert plain(server, words(32)) == 16  # one token at least is left to compute
    assert plain(server, words(40) + " and more") == 32
    assert plain(server, words(40, "other")) == 0
    assert plain(server, list(range(64))) == 0
    assert plain(server, list(range(65))) == 64
    queries, hits = server.metric("prefix_cache_queries_total"), server.metric("prefix_cache_hits_total")
    assert (queries, hits) == (40 + 40 + 32 + 42 + 40 + 64 + 65, 32 + 16 + 32 + 64)
    assert sum(row["cached_tokens"] for row in server.truth()) == hits
    server.post(b"", "/reset_prefix_cache")
    assert plain(server, words(40)) == 0


def test_a_session_finds_its_own_history(serve: Callable[..., Server]) -> None:
    """The server's answers are part of it; a client that strips them changes nothing."""
    server, messages, shares = serve(*QUICK), [], []
    for turn in range(4):
        messages.append({"role": "user", "content": words(20, f"turn{turn}")})
        reply = server.ask(messages=messages, max_tokens=30)
        shares.append(cached(reply) / reply["usage"]["prompt_tokens"])
        messages.append({"role": "assistant", "content": reply["choices"][0]["message"]["content"].strip()})
    assert shares[0] == 0
    assert shares == sorted(set(shares))
    assert cached(reply) == (3 * 50) // 16 * 16


def test_the_least_recently_used_is_forgotten(serve: Callable[..., Server]) -> None:
    server = serve("--kv-cache-tokens", "64", *QUICK)
    prompts = [words(33, name) for name in ("a", "b", "c")]
    assert [plain(server, prompt) for prompt in (prompts[0], prompts[1], prompts[0])] == [0, 0, 32]
    assert [plain(server, prompt) for prompt in (prompts[2], prompts[0], prompts[1])] == [0, 32, 0]


def test_cached_tokens_cost_no_prefill_and_the_cache_can_be_off(serve: Callable[..., Server]) -> None:
    options = ("--step-ms", "1", "--step-ms-per-sequence", "0", "--prefill-tokens-per-s", "1000")
    for off, second in (((), 1 + 8 + 1), (("--no-enable-prefix-caching",), 1 + 8 + 33)):
        server = serve(*options, *off)
        for _ in range(2):
            server.ask(messages=[{"role": "user", "content": words(33)}], max_tokens=1)
        took = [(row["first_due_ns"] - row["started_ns"]) / MS for row in server.truth()]
        assert took == [1 + 8 + 33, second]
        assert server.metric("prefix_cache_queries_total") == (0 if off else 2 * 41)


# --- metrics ---


def test_the_metrics_agree_with_the_truth(serve: Callable[..., Server]) -> None:
    server = serve("--ttft-ms", "15", "--gap-ms", "2")
    for stream in (True, False, True):
        server.post({**ASK, "stream": stream})
    rows = server.truth()
    assert server.metric("prompt_tokens_total") == sum(row["prompt_tokens"] for row in rows) == 33
    assert server.metric("generation_tokens_total") == sum(row["emitted"] for row in rows) == 15
    assert server.metric("request_success_total", ',finished_reason="length"') == 3
    for name, begin, end in (
        ("time_to_first_token", "arrived_ns", "first_ns"),
        ("e2e_request_latency", "arrived_ns", "last_ns"),
        ("request_decode_time", "first_ns", "last_ns"),
    ):
        total_s = sum(row[end] - row[begin] for row in rows) / 1e9
        assert server.metric(f"{name}_seconds_sum") == pytest.approx(total_s)
        assert server.metric(f"{name}_seconds_count") == 3
    buckets = re.findall(r"^vllm:time_to_first_token_seconds_bucket{.*} (\d+)$", server.get("/metrics"), re.MULTILINE)
    counts = [int(count) for count in buckets]
    assert counts == sorted(counts)
    assert (counts[0], counts[3], counts[-1]) == (
        0,
        sum(row["first_ns"] - row["arrived_ns"] <= 20 * MS for row in rows),
        3,
    )
    assert server.metric("time_per_output_token_seconds_count") == server.metric("inter_token_latency_seconds_count")
    assert server.metric("inter_token_latency_seconds_sum") == pytest.approx(3 * 4 * 0.002)


def test_every_metric_has_its_help_and_its_type_once(quick: Server) -> None:
    text = quick.get("/metrics")
    families = re.findall(r"^# TYPE (\S+) \w+$", text, re.MULTILINE)
    assert families == re.findall(r"^# HELP (\S+) .+$", text, re.MULTILINE)
    assert len(set(families)) == len(families) > 15
    for line in text.splitlines():
        if line[0] != "#":
            name = re.match(r"[\w:]+", line)
            assert name
            assert re.sub(r"_(bucket|sum|count)$", "", name[0]) in families
            float(line.rpartition(" ")[2])


# --- the command line ---


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--engine", "{"], "not JSON"),
        (["--engine", "[]"], "must be a JSON object"),
        (["--engine", '{"speed": 1}'], "no engine setting is called 'speed'"),
        (["--engine", '{"ttft_ms": NaN}'], "ttft_ms must be a number"),
        (["--engine", '{"ttft_ms": "1"}'], "ttft_ms must be a number"),
        (["--engine", '{"ttft_ms": 1, "max_batch": 2}'], "there is no max_batch"),
        (["--ttft-ms", "nan"], "not a number"),
        (["--ttft-ms", "inf"], "not a number"),
        (["--ttft-ms", "-1"], "0 or more"),
        (["--gap-ms", "5"], "give ttft_ms too"),
        (["--max-batch", "1.5"], "whole number"),
        (["--prefill-tokens-per-s", "0"], "more than 0"),
        (["--ttft-ms", "1", "--max-waiting", "5"], "no queue"),
        (["--port", "65536"], "0 to 65535"),
        (["--port", "x"], "whole number"),
        (["--host", "203.0.113.1", "--port", "0"], "cannot listen on 203.0.113.1"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], argv: list[str], complaint: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        demo_server.main(argv)
    out, err = capsys.readouterr()
    assert (caught.value.code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("demo_server.py: error: ")
    assert complaint in err


def test_a_port_that_is_taken_is_named_with_the_way_out(quick: Server) -> None:
    command = [sys.executable, str(SERVER), "--port", str(quick.port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--port 0 takes a free port" in done.stderr


def test_an_option_wins_over_the_same_setting_as_json(serve: Callable[..., Server]) -> None:
    server = serve("--engine", '{"ttft_ms": 5000, "gap_ms": 0}', "--ttft-ms", "1")
    server.ask()
    assert server.truth()[0]["first_due_ns"] - server.truth()[0]["arrived_ns"] == MS


def test_a_server_in_the_foreground_serves_until_ctrl_c() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen([sys.executable, str(SERVER), "--port", "0"], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"http://127.0.0.1:")
        process.send_signal(number)
        assert process.wait(timeout=10) == 0
        process.stdout.close()


def test_whoever_started_it_may_have_gone_before_it_serves() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = subprocess.run(
            [sys.executable, str(SERVER), "--port", "0"], stdout=writer, stderr=subprocess.PIPE, timeout=30, check=False
        )
    finally:
        os.close(writer)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_until_stdin_closes_means_just_that(serve: Callable[..., Server]) -> None:
    server = serve(*QUICK)
    server.process.send_signal(signal.SIGINT)
    assert server.ask()["usage"]["completion_tokens"] == 5  # and the fixture sees it end with stdin
    command = [sys.executable, str(SERVER), "--port", "0", "--until-stdin-closes"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@needs_proc
def test_it_ends_with_its_parent_even_if_that_is_killed() -> None:
    options = [str(SERVER), "--port", "0", "--until-stdin-closes"]
    code = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, *{options!r}], stdin=subprocess.PIPE)\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    lines = sorted(parent.stdout.readline() for _ in range(2))  # the child's address, its number
    child = int(lines[0])
    assert is_alive(child)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not is_alive(child), 10)


# --- alone ---


def interpreter(version: str) -> str:
    """A Python of this version: of pyenv's where that is installed, else the one on the path."""
    if shutil.which("pyenv"):
        root = subprocess.run(["pyenv", "root"], capture_output=True, text=True, check=True).stdout.strip()
        found = sorted(Path(root, "versions").glob(f"{version}.*/bin/python"))
        if found:
            return str(found[-1])
    on_path = shutil.which(f"python{version}")
    if on_path is None:
        pytest.skip(f"no Python {version} here")
    return on_path


@pytest.mark.parametrize("version", ["3.9", "3.13"])
def test_it_runs_alone_on_the_oldest_and_the_newest_python(
    serve: Callable[..., Server], tmp_path: Path, version: str
) -> None:
    alone = Path(shutil.copy(SERVER, tmp_path))
    server = serve("--step-ms", "1", script=alone, python=interpreter(version))
    assert server.ask()["usage"]["completion_tokens"] == 5
    assert len(server.events(ASK)) == 7
    assert [row["emitted"] for row in server.truth()] == [5, 5]
    assert os.listdir(tmp_path) == ["demo_server.py"]


def test_it_imports_nothing_but_the_standard_library() -> None:
    known = getattr(sys, "stdlib_module_names", None)
    if known is None:
        pytest.skip("Python 3.9 does not list its standard library")
    for node in ast.walk(ast.parse(SERVER.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert all(name.partition(".")[0] in known or name == "__future__" for name in names), names


def test_the_help_and_the_document_name_every_option() -> None:
    done = subprocess.run([sys.executable, str(SERVER), "--help"], capture_output=True, text=True, check=True)
    options = set(re.findall(r"^  (?:-h, )?(--[\w-]+)", done.stdout, re.MULTILINE)) - {"--help"}
    assert len(options) > 12
    document = (SERVER.parent / "docs" / "demo_server.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(--[\w-]+)", document, re.MULTILINE)) == options
