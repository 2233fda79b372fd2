"""Every fault under its right name, no row lost, good requests unharmed, nothing left behind, in time."""

from __future__ import annotations

import asyncio
import errno
import functools
import os
import socket
import ssl
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.support.checked_runs import (
    CONCURRENCY,
    CONNECT_S,
    GOOD_PROMPT,
    PATIENT,
    TOTAL_S,
    TRANSPORTS,
    chosen,
    run,
    run_as_process,
)
from tests.support.faults import (
    ACTS,
    DOORS,
    FAULTS,
    GROUPS,
    MEGABYTE,
    SUCCESS,
    Fault,
    FaultServer,
    fault_prompt,
    flood,
    refuse_early,
)
from tests.support.program import Outcome
from tests.support.server import behind_tls, closed_port, full_queue, server_context
from tests.support.tables import fate

pytest.importorskip("openai")

REQUESTS = 20  # per fault: every second one is good


def readings(fault: Fault, transport: str, streamed: bool) -> set[str]:
    wanted = fault.stream if streamed else fault.whole
    if transport != "stopwatch" and fault.sdk:
        wanted += f"|{fault.sdk}"
    return set(wanted.split("|"))


def faults_of(group: str, streamed: bool, transport: str) -> list[str]:
    return [
        name
        for name, fault in GROUPS[group].items()
        if (fault.stream if streamed else fault.whole) and not (fault.spoils and transport != "stopwatch")
    ]


class GroupRun(NamedTuple):
    outcome: Outcome
    seen: Counter[str]
    left_open: int
    rows_of: dict[str, list[dict[str, str]]]  # name of the fault -> its rows


@functools.cache
def tried(group: str, streamed: bool, transport: str) -> Any:
    """The run, or why there is none: a broken one is not to be repeated for each of its faults."""
    try:
        return group_run(group, streamed, transport)
    except Exception as error:
        return error


def run_of(group: str, streamed: bool, transport: str) -> GroupRun:
    outcome = tried(group, streamed, transport)
    if isinstance(outcome, Exception):
        raise outcome
    assert isinstance(outcome, GroupRun)
    return outcome


def group_run(group: str, streamed: bool, transport: str) -> GroupRun:
    """All faults of a group in one run: 20 requests each, good and bad by turns, 5 in flight (10 where they wait)."""
    names = faults_of(group, streamed, transport)
    patience = {"concurrency": 2 * CONCURRENCY} if group == "silence" else PATIENT  # these wait, and cost nothing
    with chosen(transport) as value, FaultServer(ACTS) as server:
        outcome = run(server.api_base, turns(names), stream=streamed, transport=value, **patience)
        left = server.left_open()
        seen = Counter(server.seen)
    return GroupRun(outcome, seen, left, by_fault(outcome, names))


def turns(names: Sequence[str]) -> list[str]:
    return [prompt for name in names for prompt in (GOOD_PROMPT, fault_prompt(name)) * (REQUESTS // 2)]


def by_fault(outcome: Outcome, names: Sequence[str]) -> dict[str, list[dict[str, str]]]:
    rows: dict[str, list[dict[str, str]]] = {"good": []}
    for row in outcome.rows:
        at = int(row["index"])
        rows.setdefault(names[at // REQUESTS] if at % 2 else "good", []).append(row)
    return rows


RUNS = [
    pytest.param(group, streamed, transport, id=f"{group}-{'stream' if streamed else 'whole'}-{transport}")
    for group in GROUPS
    for streamed in (False, True)
    for transport in TRANSPORTS
    if faults_of(group, streamed, transport)
]
CASES = [
    pytest.param(group, streamed, transport, name, id=f"{name}-{'stream' if streamed else 'whole'}-{transport}")
    for group in GROUPS
    for streamed in (False, True)
    for transport in TRANSPORTS
    for name in faults_of(group, streamed, transport)
]


@pytest.mark.parametrize(("group", "streamed", "transport", "name"), CASES)
def test_fault(group: str, streamed: bool, transport: str, name: str) -> None:
    rows = run_of(group, streamed, transport).rows_of[name]
    assert len(rows) == REQUESTS // 2
    assert {fate(row) for row in rows} <= readings(FAULTS[name], transport, streamed), rows[0]
    assert all(bool(row["error"]) == (row["status"] != "success") for row in rows)
    assert all(bool(row["latency_ms"]) == (row["status"] == "success") for row in rows)


@pytest.mark.parametrize(("group", "streamed", "transport"), RUNS)
def test_good_requests_are_unharmed(group: str, streamed: bool, transport: str) -> None:
    got = run_of(group, streamed, transport)
    good = got.rows_of["good"]
    assert {fate(row) for row in good} == {SUCCESS}
    assert {(row["prompt_tokens"], row["completion_tokens"], row["finish_reason"]) for row in good} == {
        ("7", "3", "stop")
    }
    assert len(good) == len(got.outcome.rows) / 2
    assert got.seen["good"] == len(good)
    assert got.outcome.code == 0


@pytest.mark.parametrize(("group", "streamed", "transport"), RUNS)
def test_nothing_is_left_behind_and_time_is_bounded(group: str, streamed: bool, transport: str) -> None:
    got = run_of(group, streamed, transport)
    indices = [int(row["index"]) for row in got.outcome.rows]
    assert indices == list(range(REQUESTS * len(faults_of(group, streamed, transport))))
    assert got.left_open == 0
    assert got.outcome.seconds < len(indices) / CONCURRENCY * (TOTAL_S + CONNECT_S)


@pytest.mark.parametrize(
    ("group", "streamed", "transport"),
    [
        ("silence", True, "stopwatch"),
        ("connection", False, "stopwatch"),
        ("stream", True, "stopwatch"),
        ("stream", True, "sdk"),
    ],
)
def test_two_processes_fare_alike(group: str, streamed: bool, transport: str, tmp_path: Path) -> None:
    names = faults_of(group, streamed, transport)[:: 2 if group == "silence" else 4]
    options = {"processes": 2, "concurrency": 2 * CONCURRENCY, "transport": transport, "stream": streamed}
    options.update({} if group == "silence" else PATIENT)
    with FaultServer(ACTS) as server:
        got = run_as_process(server.api_base, turns(names), folder=tmp_path, **options)
        assert server.left_open() == 0
    assert [int(row["index"]) for row in got.rows] == list(range(REQUESTS * len(names)))
    for name, rows in by_fault(got, names).items():
        wanted = {SUCCESS} if name == "good" else readings(FAULTS[name], transport, streamed)
        assert {fate(row) for row in rows} <= wanted, (name, rows[0])
    assert got.code == 0


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_retry_after_is_kept_and_never_slept_on(transport: str) -> None:
    got = run_of("status", False, transport)
    for number in (429, 503):
        texts = {row["error"] for row in got.rows_of[f"status_{number}_retry_after"]}
        assert texts == {f"HTTP {number} (Retry-After: 60): refused"}
    assert got.outcome.seconds < 60


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_complete_reply_is_not_kept_waiting_for_its_end(transport: str) -> None:
    """[DONE], or the counts after a finish_reason, and then no last chunk: the permit is free long before a limit."""
    names = ("stream_stall_after_done", "stream_stall_after_counts")
    prompts = [fault_prompt(name) for name in names for _ in range(2)] + [GOOD_PROMPT]
    with chosen(transport) as value, FaultServer(ACTS) as server:
        got = run(server.api_base, prompts, concurrency=2, transport=value, stream=True, **PATIENT)
        assert server.left_open() == 0
    assert {fate(row) for row in got.rows} == {SUCCESS}
    assert {row["completion_tokens"] for row in got.rows} == {"3"}
    assert got.seconds < PATIENT["timeout"]


# --- faults that strike before there is a request ---


def all_fail(api_base: str, transport: str, streamed: bool, **options: Any) -> set[str]:
    """The fates of a run in which nothing can succeed."""
    with chosen(transport) as value:
        options = {"concurrency": REQUESTS, "transport": value, "stream": streamed, **options}
        got = run(api_base, [GOOD_PROMPT] * REQUESTS, **options)
    assert [int(row["index"]) for row in got.rows] == list(range(REQUESTS))
    assert got.code == 1
    assert got.seconds < 20 * (TOTAL_S + CONNECT_S)
    assert all(row["error"] and not row["latency_ms"] for row in got.rows)
    return {fate(row) for row in got.rows}


EVERY_WAY = pytest.mark.parametrize(
    ("transport", "streamed"),
    [("stopwatch", False), ("stopwatch", True), ("stopwatch-h11", True), ("sdk", False), ("sdk", True)],
)


@EVERY_WAY
@pytest.mark.parametrize("name", DOORS)
def test_nobody_gets_in(name: str, transport: str, streamed: bool) -> None:
    door, wanted = DOORS[name]
    if transport == "sdk":
        wanted += "|http_error/other"  # anyio asks a socket that is already gone for its peer: an AttributeError
    with FaultServer(ACTS, door) as server:
        limits = {} if name == "never_reads" else PATIENT
        assert all_fail(server.api_base, transport, streamed, **limits) <= set(wanted.split("|"))
        assert server.left_open() == 0


@EVERY_WAY
def test_refused(transport: str, streamed: bool) -> None:
    with closed_port() as port:
        fates = all_fail(f"http://127.0.0.1:{port}/v1", transport, streamed, **PATIENT)
        assert fates == {"http_error/connect_refused"}


@EVERY_WAY
def test_no_connection_in_time(transport: str, streamed: bool) -> None:
    with full_queue() as port:
        limits = {**PATIENT, "connect_timeout": CONNECT_S}
        fates = all_fail(f"http://127.0.0.1:{port}/v1", transport, streamed, **limits)
        assert fates == {"http_error/connect_timeout"}


@EVERY_WAY
def test_a_name_that_nobody_knows(transport: str, streamed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", unknown_later)
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert all_fail("http://nowhere.invalid/v1", transport, streamed, **PATIENT) == {"http_error/dns_error"}


async def unknown_later(*_: Any, **__: Any) -> Any:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        (errno.EADDRNOTAVAIL, "http_error/client_limit"),
        (errno.EMFILE, "http_error/client_limit"),
        (errno.ENETUNREACH, "http_error/unreachable"),
        (errno.EHOSTUNREACH, "http_error/unreachable"),
    ],
    ids=errno.errorcode.get,
)
@EVERY_WAY
def test_the_box_cannot_connect(
    transport: str, streamed: bool, code: int, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ephemeral ports, descriptors or the route have run out."""

    async def impossible(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(asyncio.selector_events.BaseSelectorEventLoop, "sock_connect", impossible)
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert all_fail("http://127.0.0.1:9/v1", transport, streamed, **PATIENT) == {wanted}


# --- TLS ---


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ssl.SSLContext]:
    """Host names to server contexts with a certificate for that name, self-signed."""
    folder = tmp_path_factory.mktemp("tls")
    return {name: server_context(folder, name) for name in ("localhost", "elsewhere.invalid")}


@EVERY_WAY
def test_tls_where_plain_is_spoken(transport: str, streamed: bool) -> None:
    with FaultServer(ACTS) as server:
        fates = all_fail(f"https://localhost:{server.port}/v1", transport, streamed, first_byte_timeout=None)
        assert fates <= {"http_error/tls_error", "http_error/connect_timeout"}
        assert server.left_open() == 0


@EVERY_WAY
def test_plain_where_tls_is_spoken(transport: str, streamed: bool, certificates: dict[str, ssl.SSLContext]) -> None:
    with FaultServer(ACTS, behind_tls(certificates["localhost"])) as server:
        fates = all_fail(f"http://localhost:{server.port}/v1", transport, streamed, **PATIENT)
        assert fates <= {"http_error/bad_http", "http_error/closed", "http_error/reset"}
        assert server.left_open() == 0


@EVERY_WAY
def test_a_certificate_that_nobody_signed(
    transport: str, streamed: bool, certificates: dict[str, ssl.SSLContext]
) -> None:
    with FaultServer(ACTS, behind_tls(certificates["localhost"])) as server:
        fates = all_fail(f"https://localhost:{server.port}/v1", transport, streamed, **PATIENT)
        assert fates == {"http_error/tls_error"}


@EVERY_WAY
def test_a_certificate_of_another_name(transport: str, streamed: bool, certificates: dict[str, ssl.SSLContext]) -> None:
    context = certificates["elsewhere.invalid"]
    with FaultServer(ACTS, behind_tls(context)) as server:
        base = f"https://localhost:{server.port}/v1"
        trusted: Any = context
        fates = all_fail(base, transport, streamed, ca_file=trusted.ca_file, **PATIENT)
        assert fates == {"http_error/tls_error"}


@EVERY_WAY
@pytest.mark.parametrize("trust", ["ca_file", "insecure"])
def test_tls_trusted(transport: str, streamed: bool, trust: str, certificates: dict[str, ssl.SSLContext]) -> None:
    """Faults over TLS as without it; the connections opened ahead survive what TLS itself sends on them."""
    context = certificates["localhost"]
    options = {"ca_file": context.ca_file} if trust == "ca_file" else {"insecure": True}  # type: ignore[attr-defined]
    names = ("status_400_object", "never_answers", "stream_cut_within_chunk")
    with chosen(transport) as value, FaultServer(ACTS, behind_tls(context)) as server:
        base = f"https://localhost:{server.port}/v1"
        got = run(base, turns(names), transport=value, stream=streamed, warmup=CONCURRENCY, **options)
        assert server.left_open() == 0
    for name, rows in by_fault(got, names).items():
        wanted = {SUCCESS} if name == "good" else readings(FAULTS[name], transport, streamed)
        assert {fate(row) for row in rows} <= wanted | ({"http_error/cut"} if "cut" in name else set()), rows[0]
    assert got.rows[0]["new_connection"] in ("0", "")


# --- replies of uncommon size ---


def test_a_body_of_200_megabytes(tmp_path: Path) -> None:
    with FaultServer({"flood": flood(200 * MEGABYTE)}) as server:
        options = {"timeout": 60, "first_byte_timeout": None, "idle_timeout": None}
        got = run(server.api_base, [GOOD_PROMPT, fault_prompt("flood"), GOOD_PROMPT], **options)
    assert [fate(row) for row in got.rows] == [SUCCESS] * 3


@EVERY_WAY
def test_a_refusal_before_the_request_is_read(transport: str, streamed: bool) -> None:
    """As gateways refuse a large body: they answer, and close with it unread."""
    with FaultServer(ACTS, refuse_early) as server, chosen(transport) as value:
        got = run(server.api_base, ["x" * 900_000] * 4, transport=value, stream=streamed, **PATIENT)
    allowed = {"http_error/http_413"} if transport == "stopwatch" else {"http_error/http_413", "http_error/reset"}
    assert {fate(row) for row in got.rows} <= allowed
