"""locust_batch.py against a server that misbehaves on purpose: every row under its right name, nothing lost."""

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.faults import ACTS, DOORS, FAULTS, GROUPS, MEGABYTE, SUCCESS, FaultServer, fault_prompt, good
from tests.support.locust_runs import Bench, forked, needs_locust
from tests.support.processes import wait_until
from tests.support.program import Outcome
from tests.support.replies import as_json, completion, reply
from tests.support.server import Call, behind_tls, closed_port, full_queue, server_context
from tests.support.tables import fate

pytestmark = needs_locust

TURNS = 3  # of each fault, and as many good requests between them
USERS = 5
TIMEOUT_S = 2
PATIENCE_S = 30  # where nothing is to time out, however busy the machine is
GOOD_PROMPT = "a good one"

# Names of the benchmark for limits that locust_batch does not have.
NAMES = {"first_byte_timeout": "timeout", "idle_timeout": "timeout"}
OWN_READINGS = {
    "closes_on_reuse": {SUCCESS, "http_error/closed"},  # it had read the request: that is not sent again
    "gzip_bomb": {"decode_error/empty_body"},  # the limit is higher than this bomb: blanks only
    "body_beyond_the_limit": {SUCCESS},  # likewise
}
RESETS = ("resets_without_reply", "resets_within_body")  # after reading: not to be told from one that has not read
WHOLE = [
    name
    for group in ("silence", "connection", "status", "body")
    for name, fault in GROUPS[group].items()
    if fault.whole
]


def endless(start: bytes, more: bytes) -> Any:
    """Bytes without end, faster than they can be read."""

    def act(call: Call) -> None:
        call.send(start)
        while True:
            call.sock.sendall(more * (65536 // len(more)))

    return act


def long_winded(call: Call) -> None:
    """A good reply, after more blank lines than any reply may have bytes."""
    for _ in range(257):
        call.sock.sendall(b"\r\n" * (MEGABYTE // 2))
    good(call)


ENDLESS = {
    "endless_interim": endless(b"", b"HTTP/1.1 102 Processing\r\n\r\n"),
    "endless_headers": endless(b"HTTP/1.1 200 OK\r\n", b"X-A: " + b"v" * 1000 + b"\r\n"),
    "endless_body": endless(b"HTTP/1.1 200 OK\r\n\r\n", b" " * 1000),
    "long_winded": long_winded,
}
UNREADABLE = {"http_error/timeout", "http_error/too_large"}  # too long or too large, whichever comes first
OWN_READINGS["endless_interim"] = {"http_error/timeout"}  # so slow to read that nothing but the clock ends it


def readings(name: str) -> set[str]:
    if name in OWN_READINGS or name in ENDLESS:
        return OWN_READINGS.get(name, UNREADABLE)
    fates = (fate.split("/") for fate in FAULTS[name].whole.split("|"))
    return {f"{status}/{NAMES.get(kind, kind)}" for status, kind in fates}


def run(folder: Path, url: str, prompts: list[str], users: int, *arguments: Any, **environment: str) -> Outcome:
    """A headless run; what every run owes: one row for each prompt, no traceback, an error where there was one."""
    folder.mkdir()
    bench = Bench(folder)
    bench.corpus(prompts)
    load = ("--headless", "--host", url, "-u", users, "-r", users, *arguments)
    try:
        code, out, err = bench.finish(bench.start(*load, **{"REQUEST_TIMEOUT": str(TIMEOUT_S), **environment}))
    finally:
        bench.close()
    rows = sorted(bench.rows(), key=lambda row: int(row["index"]))
    assert [int(row["index"]) for row in rows] == list(range(len(prompts))), err
    assert "Traceback" not in err + out
    assert all(bool(row["error"]) == (row["status"] != "success") for row in rows)
    return Outcome(code, out, err, rows)


def turns(names: list[str]) -> list[str]:
    return [prompt for name in names for prompt in (GOOD_PROMPT, fault_prompt(name)) * TURNS]


# --- Faults of requests: good and bad by turns, in three runs at once ---

TIMING_OUT = [name for name in WHOLE if readings(name) == {"http_error/timeout"}]
ENDING = [name for name in WHOLE if name not in TIMING_OUT]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Name of the run -> (its faults, its outcome, what the server saw, connections left open)."""
    folder = tmp_path_factory.mktemp("mixed")

    def one(name: str, names: list[str], users: int, timeout_s: int, *arguments: Any) -> Any:
        with FaultServer({**ACTS, **ENDLESS}) as server:
            url = f"http://127.0.0.1:{server.port}"
            outcome = run(folder / name, url, turns(names), users, *arguments, REQUEST_TIMEOUT=str(timeout_s))
            return names, outcome, server.seen.copy(), server.left_open()

    with ThreadPoolExecutor() as pool:
        futures = {
            "one process": pool.submit(one, "one", ENDING, USERS, PATIENCE_S),
            "two workers": pool.submit(one, "two", ENDING[::6], USERS, PATIENCE_S, *forked(2)),
            "without end": pool.submit(one, "endless", [*TIMING_OUT, *ENDLESS], 3 * USERS, TIMEOUT_S),
        }
        return {name: future.result() for name, future in futures.items()}


MIXED = pytest.mark.parametrize("name", ["one process", "two workers", "without end"])


@MIXED
def test_every_fault_has_its_name(mixed, name):
    names, outcome, _, _ = mixed[name]
    bad = outcome.rows[1::2]
    wrong = [
        (fault, fate(row), row["error"])
        for at, fault in enumerate(names)
        for row in bad[at * TURNS : (at + 1) * TURNS]
        if fate(row) not in readings(fault)
    ]
    assert wrong == []
    assert outcome.code == 1


@MIXED
def test_good_requests_are_unharmed_and_none_that_was_read_is_sent_twice(mixed, name):
    names, outcome, seen, left_open = mixed[name]
    between = outcome.rows[::2]
    assert {(fate(row), row["total_tokens"], row["finish_reason"]) for row in between} == {(SUCCESS, "10", "stop")}
    for fault in RESETS:
        assert seen.pop(fault, TURNS) <= 2 * TURNS
    assert seen == {"good": len(names) * TURNS, **dict.fromkeys(set(names) - set(RESETS), TURNS)}
    assert left_open == 0


# --- Faults before there is a request, and TLS ---


@pytest.fixture(scope="module")
def closed_doors(tmp_path_factory):
    """Name -> (outcome, what it may be called); nobody can get in, except where the certificate is trusted."""
    folder = tmp_path_factory.mktemp("doors")
    context = server_context(folder, "localhost")

    def one(name: str, url: str, **environment: str) -> Outcome:
        return run(folder / name, url, [GOOD_PROMPT] * 2 * USERS, USERS, **environment)

    def served(name: str, scheme: str, acts: Any, door: Any = None, **environment: str) -> Outcome:
        with FaultServer(acts, door) as server:
            outcome = one(name, f"{scheme}://localhost:{server.port}", **environment)
            assert server.left_open() == 0
            return outcome

    tls = behind_tls(context)
    with ThreadPoolExecutor(5) as pool, closed_port() as closed, full_queue() as full:
        futures = {name: pool.submit(served, name, "http", ACTS, door) for name, (door, _) in DOORS.items()}
        futures["refused"] = pool.submit(one, "refused", f"http://127.0.0.1:{closed}")
        futures["queue_full"] = pool.submit(one, "queue_full", f"http://127.0.0.1:{full}")
        futures["plain_to_tls"] = pool.submit(served, "plain_to_tls", "http", ACTS, tls)
        futures["tls_to_plain"] = pool.submit(served, "tls_to_plain", "https", ACTS, reply_in_plain)
        futures["self_signed"] = pool.submit(served, "self_signed", "https", ACTS, tls)
        trusting = {"SSL_CERT_FILE": str(getattr(context, "ca_file", ""))}
        futures["trusted"] = pool.submit(served, "trusted", "https", ACTS, tls, **trusting)
        return {name: future.result() for name, future in futures.items()}


def reply_in_plain(sock: Any) -> None:
    """What a plain server makes of a TLS greeting."""
    sock.recv(65536)
    sock.sendall(reply("400 Bad Request", b"", "Connection: close"))


CLOSED_DOORS = {
    "resets_at_once": {"http_error/reset", "http_error/closed"},
    "closes_at_once": {"http_error/closed", "http_error/reset"},
    "never_reads": {"http_error/timeout"},
    "refused": {"http_error/connect_refused"},
    "queue_full": {"http_error/connect_timeout"},
    "plain_to_tls": {"http_error/reset", "http_error/closed"},
    "tls_to_plain": {"http_error/tls_error"},
    "self_signed": {"http_error/tls_error"},
    "trusted": {SUCCESS},
}


@pytest.mark.parametrize("name", CLOSED_DOORS)
def test_nobody_gets_in(closed_doors, name):
    outcome = closed_doors[name]
    assert outcome.fates <= CLOSED_DOORS[name]
    assert outcome.code == (0 if name == "trusted" else 1)


def test_a_server_that_closes_after_each_reply_unannounced(tmp_path):
    """A request that crosses the end of its connection is sent again, and none is served twice."""
    fault = "closes_after_each_reply"
    with FaultServer(ACTS) as server:
        outcome = run(tmp_path / "race", f"http://127.0.0.1:{server.port}", [fault_prompt(fault)] * 200, USERS)
        assert server.seen[fault] == 200
    assert outcome.fates == {SUCCESS}
    assert outcome.code == 0


def slow_to_fail(call: Call) -> None:
    """Ends a kept connection without a reply, long after it has read the request."""
    time.sleep(1.2 if call.number else 0)
    if call.number:
        call.reset()
    else:
        call.send(reply("200 OK", as_json(completion())))


def test_a_request_that_was_under_way_for_long_is_not_sent_again(tmp_path):
    with FaultServer({"slow": slow_to_fail}) as server:
        prompts = [fault_prompt("slow")] * 2
        url = f"http://127.0.0.1:{server.port}"
        outcome = run(tmp_path / "slow", url, prompts, 1, REQUEST_TIMEOUT=str(PATIENCE_S))
        assert server.seen["slow"] == 2
    assert [fate(row) for row in outcome.rows] == [SUCCESS, "http_error/reset"]


def test_a_redirect_says_where_it_leads_and_that_it_is_not_followed(tmp_path):
    with FaultServer(ACTS) as server:
        outcome = run(tmp_path / "redirect", f"http://127.0.0.1:{server.port}", [fault_prompt("redirect_307")], 1)
    (row,) = outcome.rows
    assert row["error"] == "HTTP 307: redirects are not followed; Location: http://127.0.0.1:9/elsewhere"


# --- A server that fails everything ---

ENOUGH = 100
PROMPTS = 3000


@pytest.mark.parametrize("workers", [0, 2])
def test_a_server_that_fails_everything_is_not_hammered(tmp_path, workers):
    """It answers a hundred, and holds the rest until the run has said that it stops: those end, no more come."""
    numbers, said, overdue = itertools.count(), threading.Event(), threading.Event()

    def fails(call: Call) -> None:
        if next(numbers) >= ENOUGH and not said.wait(PATIENCE_S):
            overdue.set()
        call.send(reply("500 No", as_json({"error": {"message": "out of order"}})))

    bench = Bench(tmp_path)
    bench.corpus([fault_prompt("fails")] * PROMPTS)
    with FaultServer({"fails": fails}) as server:
        load = ("--headless", "--host", f"http://127.0.0.1:{server.port}", "-u", 4, "-r", 4)
        process = bench.start(*load, *(forked(workers) if workers else ()))
        try:
            wait_until(lambda: "all failed alike" in (tmp_path / "0.err").read_text("utf-8") or overdue.is_set())
            time.sleep(0.3)  # for the message to reach the workers; were it late, a few more would be sent
            said.set()
            code, out, err = bench.finish(process)
        finally:
            said.set()
            bench.close()
        came = server.seen["fails"]
    rows = bench.rows()
    assert not overdue.is_set(), "a hundred failures over all workers are enough"
    assert ENOUGH <= came < PROMPTS / 10
    assert {fate(row) for row in rows} == {"http_error/http_500"}, "what was in flight has ended, not been cut off"
    assert len({row["index"] for row in rows}) == len(rows) == came
    assert err.count("all failed alike (http_error/http_500)") == 1
    assert f"! never sent{PROMPTS - came:>24}  " in out
    assert (code, "Traceback" in err) == (1, False)


def test_one_answer_is_hope(tmp_path):
    """Failures alike, but for one answer at the start: the run goes on to its end."""

    def fails(call: Call) -> None:
        call.send(reply("500 No", b""))

    def answers(call: Call) -> None:
        call.send(reply("200 OK", as_json(completion())))

    with FaultServer({"fails": fails, "answers": answers}) as server:
        prompts = [fault_prompt("answers"), *[fault_prompt("fails")] * (2 * ENOUGH)]
        outcome = run(tmp_path / "hope", f"http://127.0.0.1:{server.port}", prompts, 1)
    assert [fate(row) for row in outcome.rows] == [SUCCESS] + ["http_error/http_500"] * (2 * ENOUGH)
    assert "all failed alike" not in outcome.err
    assert outcome.code == 1
