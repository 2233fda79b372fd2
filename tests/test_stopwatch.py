"""Section 9, Stopwatch: the kernel's clock, and what happens on the wire."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, Callable, ClassVar, Optional, cast

import pytest

import online_bench_openai_async as bench
from tests.support.server import (
    Call,
    ScriptedServer,
    behind_tls,
    closed_port,
    full_queue,
    read_request,
    says,
    server_context,
)

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux stamps arrivals in the kernel")


class Arrivals(bench.WholeReader):
    """A reader that keeps what it is fed."""

    made: ClassVar[list[Arrivals]] = []

    def __init__(self, reply: bench.Reply) -> None:
        super().__init__(reply)
        self.reply = reply
        self.fed: list[tuple[int, bytes]] = []
        self.made.append(self)

    def feed(self, stamps_ns: Sequence[int], pieces: Sequence[bytes]) -> None:
        self.fed += zip(stamps_ns, pieces)

    def chunks_so_far(self, unread: int) -> int:
        return len(self.fed) + unread

    def finish(self) -> None:
        """It only keeps."""

    @property
    def body(self) -> bytes:
        return b"".join(data for _, data in self.fed)


@pytest.fixture(params=["httptools", "h11"], autouse=True)
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds with either parser of HTTP."""
    Arrivals.made.clear()
    if request.param == "h11":
        monkeypatch.setitem(sys.modules, "httptools", None)
    else:
        pytest.importorskip("httptools")


LIMITS = bench.Timeouts(connect_s=5, first_byte_s=None, idle_s=None, total_s=10)


def exchange_with(
    port: int,
    count: int = 1,
    limits: bench.Timeouts = LIMITS,
    meanwhile: Optional[Callable[[], Any]] = None,
    origin: Optional[bench.Origin] = None,
    payload: bytes = b"{}",
    permits: Optional[bench.Permits] = None,
) -> tuple[list[Arrivals], list[Optional[bench.Failure]]]:
    """`count` requests one after the other over one stopwatch; what arrived, and how each failed."""

    async def main() -> list[Optional[bench.Failure]]:
        stopwatch = bench.Stopwatch(origin or bench.Origin("127.0.0.1", port, False), limits, streamed=True)
        shared = permits or bench.Permits(1)
        shared.open(time.perf_counter_ns())
        failures: list[Optional[bench.Failure]] = []
        for _ in range(count):
            call = bench.Call(cast(Any, Arrivals), bench.Turn(shared))
            call.payload = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(payload), payload)
            if meanwhile:
                asyncio.get_running_loop().call_later(0.01, meanwhile)
            try:
                await stopwatch.perform(call)
                failures.append(call.end(None).failure)
            except bench.CallError as error:
                failures.append(call.end(error.failure).failure)
        stopwatch.close()
        return failures

    failures = asyncio.run(main())
    return list(Arrivals.made), failures


@linux_only
def test_a_blocked_event_loop_does_not_move_the_stamps(script: Callable[..., ScriptedServer]) -> None:
    """The loop sleeps through all five chunks; the kernel does not."""
    chunks = [b"5\r\n%d.abc\r\n" % n for n in range(5)]
    server = script(says(CHUNKED, *chunks, b"0\r\n\r\n", gap_s=0.02))
    permits = bench.Permits(1)

    def block() -> None:
        if permits.under_way:
            time.sleep(0.3)
        else:
            asyncio.get_running_loop().call_later(0.002, block)

    (exchange,), errors = exchange_with(server.port, meanwhile=block, permits=permits)
    assert errors == [None]
    stamps = [stamp for stamp, data in exchange.fed]
    # read after 300 ms, in one piece or a few: never stamped with the time of that read
    assert exchange.reply.sent_ns is not None
    assert (stamps[-1] - exchange.reply.sent_ns) / 1e6 < 250
    assert exchange.reply.kernel_reads == exchange.reply.reads
    assert stamps[-1] in exchange.late


def test_a_quiet_server_is_no_late_client(
    script: Callable[..., ScriptedServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "LATE_READ_NS", 600_000_000)
    server = script(says(CHUNKED, b"2\r\nhi\r\n", b"0\r\n\r\n", gap_s=0.8))
    (exchange,), _ = exchange_with(server.port)
    assert exchange.late == set()


def record_of(exchange: Arrivals) -> bench.Record:
    return bench.Record(bench.Job(0), exchange.reply, 0)


@pytest.mark.parametrize("head", [b"HTTP/1.0 200 OK\r\n\r\nhi", b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhi"])
def test_waiting_for_the_servers_close_is_not_the_clients_queue(
    script: Callable[..., ScriptedServer], head: bytes
) -> None:
    permits = bench.Permits(1)
    first, second = exchange_with(script(says(head, gap_s=0.2, keep=False)).port, count=2, permits=permits)[0]
    assert second.reply.free_ns is not None
    assert first.reply.end_ns is not None
    assert (second.reply.free_ns - first.reply.end_ns) / 1e6 > 150  # until then nothing could be sent
    assert (record_of(first).busy_ms or 0) < 150 < (permits.changed_ns - permits.first_ns) / 1e6
    assert permits.unread_ns < 150e6  # nor did this client leave anything unread


def slow_to_read(call_s: float) -> Callable[[Any], Any]:
    def door(sock: socket.socket) -> socket.socket:
        time.sleep(call_s)
        return sock

    return door


def test_a_server_that_is_slow_to_read_is_not_the_clients_queue(script: Callable[..., ScriptedServer]) -> None:
    permits = bench.Permits(1)
    server = script(says(HEAD + b"Content-Length: 2\r\n\r\nhi"), door=slow_to_read(0.3))
    (exchange,), errors = exchange_with(server.port, payload=b"x" * 8_000_000, permits=permits)
    reply = exchange.reply
    assert errors == [None]
    assert reply.ready_ns is not None
    assert reply.sent_ns is not None
    assert permits.first_ns >= reply.sent_ns  # what is still being sent is not in flight
    assert (reply.sent_ns - reply.ready_ns) / 1e6 > 200
    assert (record_of(exchange).queue_ms or 0) < 200


def test_requests_that_are_still_connecting_are_not_in_flight() -> None:
    permits = bench.Permits(1)
    with full_queue() as port:
        _, (error,) = exchange_with(port, limits=bench.Timeouts(0.2, None, None, 9), permits=permits)
    assert error is not None
    assert error.kind == "connect_timeout"
    assert permits.peak_in_flight == 0


@linux_only
def test_a_full_listen_queue_shows_in_repeated_packets() -> None:
    """Room is made after the first packet was dropped; the second comes a second after the first."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, contextlib.ExitStack() as waiting:

        def accept() -> None:
            time.sleep(0.3)
            while True:
                sock = waiting.enter_context(listener.accept()[0])
                request = read_request(sock)
                if request:
                    sock.sendall(HEAD + b"Content-Length: 2\r\n\r\nhi")
                    return

        filler = socket.create_connection(listener.getsockname())
        threading.Thread(target=accept, daemon=True).start()
        threading.Timer(0.2, filler.close).start()
        (exchange,), (error,) = exchange_with(listener.getsockname()[1])
    assert error is None
    assert exchange.reply.syn_resent >= 1
    assert (record_of(exchange).connect_ms or 0) > 900
    assert (record_of(exchange).queue_ms or 0) < 900


@linux_only
def test_stamps_lie_between_sending_and_reading(script: Callable[..., ScriptedServer]) -> None:
    server = script(says(CHUNKED + b"2\r\nhi\r\n", b"2\r\nho\r\n0\r\n\r\n", gap_s=0.02))
    (exchange,), _ = exchange_with(server.port)
    stamps = [stamp for stamp, data in exchange.fed]
    assert exchange.reply.sent_ns is not None
    assert exchange.reply.sent_ns < stamps[0] < stamps[-1] < time.perf_counter_ns()
    assert (stamps[-1] - stamps[0]) / 1e6 >= 20


@linux_only
@pytest.mark.parametrize("step_s", [3600, -3600])
def test_a_stepped_clock_falls_back_to_the_time_of_the_read(
    script: Callable[..., ScriptedServer], step_s: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: true() + step_s * 1_000_000_000)
    server = script(says(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"))
    (exchange,), errors = exchange_with(server.port)
    assert errors == [None]
    assert exchange.reply.kernel_reads == 0
    assert exchange.reply.sent_ns is not None
    assert exchange.reply.end_ns is not None
    assert exchange.reply.sent_ns < exchange.reply.end_ns < time.perf_counter_ns()


@pytest.mark.parametrize(
    "packets",
    [
        (CHUNKED, b"2\r\nhi\r\n", b"0\r\n\r\n"),
        (CHUNKED + b"2\r\nhi\r\n0\r\n\r\n",),
        (CHUNKED, b"2\r\nhi\r\n0\r\n", b"\r\n"),
        (CHUNKED, b"2\r\nhi\r\n0", b"\r\n\r\n"),
        (CHUNKED, b"2;ext=1\r\nhi\r\n", b"0\r\nX-Trailer: 1\r\n\r\n"),
        (HEAD + b"Content-Length: 2\r\n\r\n", b"h", b"i"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", HEAD + b"Content-Length: 2\r\n\r\nhi"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + b"Content-Length: 2\r\n\r\nhi",),
        tuple(bytes([byte]) for byte in CHUNKED + b"2\r\nhi\r\n0\r\n\r\n"),
    ],
)
def test_a_reply_is_whole_however_it_is_cut_and_its_connection_is_kept(
    script: Callable[..., ScriptedServer], packets: tuple[bytes, ...]
) -> None:
    server = script(says(*packets, gap_s=0.001))
    exchanges, errors = exchange_with(server.port, count=2)
    assert errors == [None, None]
    assert [exchange.body for exchange in exchanges] == [b"hi", b"hi"]
    assert [exchange.reply.new_connection for exchange in exchanges] == [True, False]
    assert server.connections == 1


@pytest.mark.parametrize(
    "answer",
    [
        says(b"HTTP/1.0 200 OK\r\n\r\nhi", keep=False),
        says(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhi", keep=False),
        says(HEAD + b"Connection: close\r\nContent-Length: 2\r\n\r\nhi", keep=False),
    ],
)
def test_a_reply_that_ends_with_its_connection(script: Callable[..., ScriptedServer], answer: Any) -> None:
    server = script(answer)
    exchanges, errors = exchange_with(server.port, count=2)
    assert errors == [None, None]
    assert [exchange.body for exchange in exchanges] == [b"hi", b"hi"]
    assert server.connections == 2


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (says(CHUNKED + b"5\r\nhi", keep=False), "cut"),
        (says(HEAD + b"Content-Length: 10\r\n\r\nhi", keep=False), "cut"),
        (says(HEAD, keep=False), "cut"),
        (says(keep=False), "closed"),
        (says(b"SSH-2.0-OpenSSH\r\n"), "bad_http"),
        (says(CHUNKED + b"zz\r\nhi\r\n"), "bad_http"),
    ],
)
def test_what_breaks_on_the_wire_is_said(script: Callable[..., ScriptedServer], answer: Any, kind: str) -> None:
    server = script(answer)
    _, (error,) = exchange_with(server.port)
    assert error is not None
    assert (error.status, error.kind) == ("http_error", kind)


GOOD = says(HEAD + b"Content-Length: 2\r\n\r\nhi")


def good_then_unread(call: Call) -> None:
    """The next request on this connection arrives, and is closed upon unread."""
    GOOD(call)
    call.sock.recv(1, socket.MSG_PEEK)
    call.close()


def test_a_stale_connection_costs_one_counted_reconnect(script: Callable[..., ScriptedServer]) -> None:
    """The server closes the kept connection as the second request arrives, unread: sent again on a new one."""
    server = script(good_then_unread, GOOD)
    exchanges, errors = exchange_with(server.port, count=2)
    assert errors == [None, None]
    assert [exchange.reply.reconnects for exchange in exchanges] == [0, 1]
    assert (server.requests, server.connections) == (2, 2)


def test_a_server_that_keeps_closing_is_tried_twice_and_no_more(script: Callable[..., ScriptedServer]) -> None:
    server = script(good_then_unread, says(keep=False))
    _, errors = exchange_with(server.port, count=2)
    assert errors[0] is None
    assert errors[1] is not None
    assert errors[1].kind == "closed"
    assert (server.requests, server.connections) == (2, 2)


def test_a_request_that_was_read_goes_out_once(script: Callable[..., ScriptedServer]) -> None:
    """The server closes the kept connection after it has read the request: it may have served it."""
    server = script(GOOD, says(keep=False), GOOD)
    exchanges, errors = exchange_with(server.port, count=2)
    assert errors[1] is not None
    assert errors[1].kind == "closed"
    assert exchanges[1].reply.reconnects == 0
    assert server.requests == 2


# --- names with several addresses ---


def test_a_silent_address_gives_way_to_the_next(
    script: Callable[..., ScriptedServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once: whoever answered is asked first from then on."""
    server = script(GOOD)
    dialled = []
    with full_queue() as silent:
        places = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in (silent, server.port)]

        async def both(*_: Any, **__: Any) -> Any:
            return list(places)

        dial = bench.Stopwatch._dial

        async def watched(self: bench.Stopwatch, address: Any) -> socket.socket:
            dialled.append(address[4][1])
            return await dial(self, address)

        monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", both)
        monkeypatch.setattr(bench.Stopwatch, "_dial", watched)
        server_keeps_nothing = says(HEAD + b"Connection: close\r\nContent-Length: 2\r\n\r\nhi", keep=False)
        server._scripts[:] = [server_keeps_nothing]
        _, errors = exchange_with(server.port, count=3)
    assert errors == [None] * 3
    assert dialled == [silent, server.port, server.port, server.port]


def test_when_no_address_answers_the_last_refusal_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with closed_port() as first, closed_port() as second:

        async def both(*_: Any, **__: Any) -> Any:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in (first, second)]

        monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", both)
        _, (error,) = exchange_with(first)
    assert error is not None
    assert error.kind == "connect_refused"


@pytest.mark.parametrize(
    ("limits", "answer", "kind"),
    [
        (bench.Timeouts(5, None, None, 0.2), says(CHUNKED, b"2\r\nhi\r\n", gap_s=0.5), "timeout"),
        (bench.Timeouts(5, 0.2, None, 9), says(b"", gap_s=0.5), "first_byte_timeout"),
        (bench.Timeouts(5, None, 0.2, 9), says(CHUNKED, b"2\r\nhi\r\n", gap_s=0.5), "idle_timeout"),
    ],
)
def test_each_time_limit_holds_and_has_its_name(
    script: Callable[..., ScriptedServer], limits: bench.Timeouts, answer: Any, kind: str
) -> None:
    server = script(answer)
    _, (error,) = exchange_with(server.port, limits=limits)
    assert error is not None
    assert error.kind == kind


def test_a_slow_but_steady_stream_meets_no_idle_limit(script: Callable[..., ScriptedServer]) -> None:
    chunks = [b"2\r\nhi\r\n"] * 8
    server = script(says(CHUNKED, *chunks, b"0\r\n\r\n", gap_s=0.08))
    _, errors = exchange_with(server.port, limits=bench.Timeouts(5, None, 0.4, 9))
    assert errors == [None]


def test_a_refused_connection_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    _, (error,) = exchange_with(port)
    assert error is not None
    assert error.kind == "connect_refused"


def test_a_reply_without_an_end_is_an_error_and_not_an_exhaustion(
    script: Callable[..., ScriptedServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "MAX_REPLY_BYTES", 1 << 20)
    server = script(says(CHUNKED, *[b"10000\r\n" + b"x" * 65536 + b"\r\n"] * 64))
    _, (error,) = exchange_with(server.port)
    assert error is not None
    assert error.kind == "too_large"


def test_compression_nobody_asked_for_is_undone(script: Callable[..., ScriptedServer]) -> None:
    import gzip

    data = gzip.compress(b"hi")
    head = HEAD + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(data)
    server = script(says(head + data))
    (exchange,), errors = exchange_with(server.port)
    assert errors == [None]
    assert exchange.body == b"hi"


def test_the_step_queue_admits_one_per_turn_of_the_loop() -> None:
    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        steps = bench.StepQueue(loop)
        turn = 0
        admitted: list[int] = []

        def count() -> None:
            nonlocal turn
            turn += 1
            if len(admitted) < 5:
                loop.call_soon(count)

        async def visitor() -> None:
            await steps.turn()
            admitted.append(turn)

        loop.call_soon(count)
        await asyncio.gather(*(visitor() for _ in range(5)))
        return admitted

    turns = asyncio.run(main())
    assert len(set(turns)) == 5


@pytest.mark.parametrize("trust", ["ca_file", "insecure", "nobody"])
def test_tls_over_the_same_socket(script: Callable[..., ScriptedServer], tmp_path: Any, trust: str) -> None:
    context: Any = server_context(tmp_path, "localhost")
    certificate = context.ca_file
    packets = (CHUNKED, b"2\r\nhi\r\n", b"0\r\n\r\n")
    server = script(says(*packets, gap_s=0.01), door=behind_tls(context))

    ca_file = certificate if trust == "ca_file" else None
    origin = bench.Origin("127.0.0.1", server.port, True, ca_file, trust == "insecure")
    exchanges, errors = exchange_with(server.port, count=2, origin=origin)
    if trust == "nobody":
        assert errors[0] is not None
        assert errors[0].kind == "tls_error"
        return
    assert errors == [None, None]
    assert [exchange.body for exchange in exchanges] == [b"hi", b"hi"]
    assert server.connections == 1
    if sys.platform == "linux":
        assert exchanges[1].reply.kernel_reads == exchanges[1].reply.reads
