"""Readers under random bytes: they say what was wrong and raise nothing, however the bytes are cut.

HYPOTHESIS_EXAMPLES sets how many examples each property gets.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import gzip
import itertools
import json
import os
import socket
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import online_bench_openai_async as bench
from tests.support.replies import (
    ANSWER,
    COUNTS,
    DONE,
    FINISH,
    GOOD_EVENTS,
    ONE,
    ROLE,
    STREAM_HEAD,
    TWO,
    chunk,
    completion,
    delta,
    head,
    piece,
    read_reply,
    reply,
)

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

settings = hypothesis.settings(
    max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "300")),
    deadline=None,
    database=None,
    derandomize="HYPOTHESIS_EXAMPLES" not in os.environ,
    suppress_health_check=list(hypothesis.HealthCheck),
)
STATUSES = ("success", "http_error", "decode_error")

# Bytes that look like the real thing until they do not.
SCRAPS = (
    *(ROLE, ONE, TWO, FINISH, COUNTS, DONE, b"data: ", b"data:", b"event: error\n", b"error: x\n", b": ping\n", b"\n"),
    *(b"\n\n", b"\r\n", b"\r", b"\xef\xbb\xbf", b"\xff", "\u00e9\u2028\U0001f600".encode(), b'{"error":', b"[" * 300),
    *(b'{"choices":[', b'"delta":{"content":"', b'"finish_reason":null', b'"usage":{', b"]", b"}", b"null", b"1e999"),
    *(b"NaN", b'"\\ud800"', b"9" * 5000, b"[DONE]", b"id: 1\n", b"retry: 5\n"),
)
SOUP = st.lists(st.one_of(st.sampled_from(SCRAPS), st.binary(max_size=12)), max_size=14).map(b"".join)
REAL = st.lists(st.sampled_from((ROLE, ONE, TWO, FINISH, COUNTS, DONE, b": ping\n\n")), max_size=10).map(b"".join)
LINE_ENDS = st.sampled_from((b"\n", b"\r\n", b"\r"))
VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.floats(),
        st.text(max_size=6),
        st.sampled_from([-1, 0, 3, 10**400, "stop", "abort", "length"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                (
                    *("choices", "message", "delta", "content", "finish_reason", "usage", "error", "detail", "msg"),
                    *("prompt_tokens", "completion_tokens", "prompt_tokens_details", "cached_tokens", "reasoning"),
                    *("reasoning_content", "tool_calls", "refusal", "text", "prompt", "messages", "max_tokens"),
                )
            ),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)


def cuts(data: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[start:end] for start, end in zip(ends, ends[1:])]


def comparable(answer: bench.Reply) -> Any:
    """All but what depends on the packets: how many there were."""
    return dataclasses.replace(answer, gaps_ms=list(answer.gaps_ms), content_reads=0, merged_reads=0)


def assert_sound(answer: bench.Reply) -> None:
    assert answer.failure is None or answer.failure.status in STATUSES[1:]
    assert answer.failure is None or answer.failure.kind
    assert answer.failure is None or "\n" not in answer.failure.message
    for count in (answer.prompt_tokens, answer.completion_tokens, answer.cached_tokens, answer.reasoning_tokens):
        assert count is None or 0 <= count <= bench.MOST_TOKENS
    # What follows in a run must take it, too.
    record = bench.Record(bench.Job(0), dataclasses.replace(answer, sent_ns=1, end_ns=2), 0)
    tally = bench.Tally()
    tally.add(record)
    tally.summary()
    assert all("\n" not in column.cell(record) for column in bench.CSV_COLUMNS.values())


@settings
@hypothesis.given(data=st.one_of(SOUP, VALUES.map(lambda value: json.dumps(value).encode()), st.binary(max_size=99)))
def test_a_whole_reply_is_read_or_refused(data: bytes) -> None:
    assert_sound(read_reply(False, [(1, data)]))


@settings
@hypothesis.given(value=VALUES)
def test_any_json_is_an_answer_or_a_failure(value: Any) -> None:
    for body in (value, completion(choices=[value], usage=value)):
        assert_sound(read_reply(False, [(1, json.dumps(body).encode())]))
    assert_sound(read_reply(True, [(1, b"data: " + json.dumps(value).encode() + b"\n\n")]))
    assert_sound(read_reply(True, [(1, piece([value], usage=value) + piece(delta(finish="stop")))]))


@settings
@hypothesis.given(
    data=st.one_of(REAL, SOUP), end=LINE_ENDS, mark=st.booleans(), places=st.lists(st.integers(0, 1 << 20), max_size=12)
)
def test_a_stream_says_the_same_however_it_is_cut(data: bytes, end: bytes, mark: bool, places: list[int]) -> None:
    data = (b"\xef\xbb\xbf" if mark else b"") + data.replace(b"\n", end)
    whole = read_reply(True, [(7, data)])
    assert_sound(whole)
    assert comparable(read_reply(True, [(7, part) for part in cuts(data, places)])) == comparable(whole)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["lf", "crlf", "cr"])
def test_a_stream_says_the_same_cut_anywhere(end: bytes) -> None:
    """Every one and every two cuts of a short stream, and byte by byte."""
    data = (b": hi\n" + ONE + b"event: x\n" + TWO + FINISH + DONE).replace(b"\n", end)
    whole = comparable(read_reply(True, [(7, data)]))
    assert whole.finish_reason == "stop"
    assert whole.chunks == 2
    for place in range(len(data)):
        assert comparable(read_reply(True, [(7, data[:place]), (7, data[place:])])) == whole
    seams = [at for at in range(len(data)) if data[at : at + 1] in b"\r\n:{"]
    for places in itertools.combinations(seams, 2):
        assert comparable(read_reply(True, [(7, part) for part in cuts(data, list(places))])) == whole
    assert comparable(read_reply(True, [(7, data[at : at + 1]) for at in range(len(data))])) == whole


SAID = st.one_of(
    st.text(max_size=6), st.sampled_from(["\n", '"', "\\", "日本", 'x","finish_reason":null', "\x01", "\0"])
)


@settings
@hypothesis.given(
    texts=st.lists(SAID, min_size=1, max_size=12),
    odd=st.lists(st.sampled_from([ROLE, FINISH, COUNTS, DONE, b": ping\n\n", b"\n", b"\0", b"\1"]), max_size=3),
    ascii_only=st.booleans(),
    places=st.lists(st.integers(0, 1 << 20), max_size=6),
    together=st.lists(st.integers(1, 5), min_size=1, max_size=40),
)
def test_pieces_fed_together_say_what_they_say_one_by_one(
    texts: list[str], odd: list[bytes], ascii_only: bool, places: list[int], together: list[int]
) -> None:
    """Whole events in pieces of their own, a few cut anywhere, some under one stamp: equal to the last stamp."""
    events = [
        b"data: " + json.dumps(body, ensure_ascii=ascii_only, separators=(",", ":")).encode() + b"\n\n"
        for body in ({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]} for text in texts)
    ]
    pieces = [*events[:3], *odd, *events[3:], FINISH, DONE]
    for place in places:
        at = place % len(pieces)
        cut = place % (len(pieces[at]) or 1)
        pieces[at : at + 1] = [pieces[at][:cut], pieces[at][cut:]]
    stamps = list(itertools.accumulate(itertools.islice(itertools.cycle([*together, 0]), len(pieces))))
    batch, single = bench.Reply(), bench.Reply()
    reader = bench.StreamReader(batch)
    reader.feed(stamps, pieces)
    reader.finish()
    reader = bench.StreamReader(single)
    for stamp, piece_ in zip(stamps, pieces):
        reader.feed([stamp], [piece_])
    reader.finish()
    assert batch == single
    assert batch == read_reply(True, zip(stamps, pieces))


def test_an_event_bears_the_stamp_of_its_last_byte() -> None:
    data = ONE + TWO
    parts = [(at, data[at : at + 1]) for at in range(len(data))]
    answer = read_reply(True, parts)
    assert (answer.first_ns, answer.last_ns) == (len(ONE) - 1, len(data) - 1)


def test_a_large_event_in_small_packets_is_looked_through_once() -> None:
    """Time that grows with the square of its size would be minutes here."""
    event = piece(delta(content="x" * 4_000_000))
    parts = [(1, event[at : at + 100]) for at in range(0, len(event), 100)]
    assert read_reply(True, [*parts, (2, FINISH)]).chunks == 1


DELTA = st.one_of(st.just({}), st.fixed_dictionaries({"content": st.text(max_size=5)}))
ENDING = {"finish_reason": st.sampled_from([None, "stop", "length"]), "logprobs": st.none()}
CHAT_CHOICE = st.fixed_dictionaries({"index": st.integers(0, 1), "delta": DELTA}, optional=ENDING)
TEXT_CHOICE = st.fixed_dictionaries({"index": st.integers(0, 1), "text": st.text(max_size=5)}, optional=ENDING)


@settings
@hypothesis.given(
    choices=st.one_of(st.lists(CHAT_CHOICE, max_size=3), st.lists(TEXT_CHOICE, max_size=3)),
    more=st.fixed_dictionaries(
        {},
        optional={
            "usage": st.sampled_from([None, {}, {"prompt_tokens": 1, "completion_tokens": 2}]),
            "error": st.sampled_from([None, "x"]),
            "note": st.sampled_from(
                ['"finish_reason":null', '"usage":{', '"error"', '"delta":{"content":"', '"text":"']
            ),
        },
    ),
    first=st.booleans(),
)
def test_the_fast_scan_tells_only_what_json_would(choices: list[Any], more: dict[str, Any], first: bool) -> None:
    body = {**more, "choices": choices} if first else {"choices": choices, **more}
    event = b"data: " + json.dumps(body, separators=(",", ":")).encode()
    if not bench.text_at(event):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "text_at", lambda event: 0)
        said = read_reply(True, [(1, event + b"\n\n")])
    assert (said.chunks, said.finish_reason, said.has_usage) == (1, None, False)
    assert said.visible_ns == 1


@settings
@hypothesis.given(texts=st.lists(st.text(max_size=6), max_size=12), ascii_only=st.booleans(), data=st.data())
def test_what_a_stream_says_is_kept_whole_however_it_is_cut(texts: list[str], ascii_only: bool, data: Any) -> None:
    dump = functools.partial(json.dumps, ensure_ascii=ascii_only, separators=(",", ":"))
    body = b"".join(b"data: %s\n\n" % dump({"choices": delta(content=text)}).encode() for text in texts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=6)))
    pieces = [body[start:end] for start, end in zip([0, *cuts], [*cuts, len(body)])]
    said = bench.Reply()
    reader = bench.StreamReader(said, keeps_text=True)
    for pieces_at_once in (pieces, [FINISH]):
        reader.feed(list(range(len(pieces_at_once))), pieces_at_once)
    reader.finish()
    assert said.text == "".join(texts)


def test_the_fast_scan_is_used_at_all() -> None:
    assert bench.text_at(ONE.rstrip(b"\n"))


@settings
@hypothesis.given(
    line=st.one_of(st.text(max_size=60), VALUES.map(json.dumps), SOUP.map(lambda data: data.decode("utf-8", "replace")))
)
def test_a_corpus_line_is_a_request_or_a_value_error(line: str) -> None:
    try:
        request = bench.parse_request(line, None)
    except ValueError:
        return
    assert request.messages
    sent = json.dumps(request.messages, ensure_ascii=False, allow_nan=False).encode()
    assert json.loads(sent) == request.messages


@pytest.mark.parametrize(
    "line",
    ['{"text": "\\ud800"}', '{"messages": [{"role": "user", "content": NaN}]}', "[" * 5000, '{"a":' * 5000, "9" * 9999],
    ids=["half-a-pair", "nan", "lists", "objects", "number"],
)
def test_a_corpus_line_that_cannot_be_sent_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        bench.parse_request(line, None)


# --- the stopwatch's use of the parser ---

HTTP_SCRAPS = (
    *(b"HTTP/1.1 200 OK\r\n", b"HTTP/1.0 500 No\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 101 Up\r\n"),
    *(b"Content-Length: 5\r\n", b"Content-Length: 99999999999999999999\r\n", b"Transfer-Encoding: chunked\r\n"),
    *(b"Connection: close\r\n", b"Content-Encoding: gzip\r\n", b"Retry-After: 1\r\n", b"\r\n", b"5\r\nabcde\r\n"),
    *(b"0\r\n\r\n", b"FFFFFFFFFFFFFFFFF\r\n", b"Upgrade: h2c\r\nConnection: upgrade\r\n", gzip.compress(ANSWER)),
    *(reply("200 OK", ANSWER), STREAM_HEAD, chunk(ONE), chunk(FINISH), head("204 No Content"), b"X: " + b"y" * 9_000),
)
REPLIES = st.lists(st.one_of(st.sampled_from(HTTP_SCRAPS), st.binary(max_size=9)), min_size=1, max_size=7).map(b"".join)


class OnePair(bench.Stopwatch):
    """A stopwatch whose connections are pairs of sockets: what the far end says is already there, then it closes."""

    said: list[bytes]
    far: set[socket.socket]

    async def _open(self) -> tuple[socket.socket, None]:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.loop.call_soon(self._say, theirs)
        self.far.add(theirs)
        return ours, None

    def _say(self, theirs: socket.socket) -> None:
        with theirs, contextlib.suppress(BrokenPipeError):  # ours may have gone
            for data in self.said:
                theirs.sendall(data)


@pytest.fixture(params=["httptools", "h11"])
def parser(request: pytest.FixtureRequest) -> Iterator[None]:
    """Either parser of HTTP."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "h11":
            patch.setitem(sys.modules, "httptools", None)
        else:
            pytest.importorskip("httptools")
        yield


async def performed(parts: list[bytes], streamed: bool) -> list[bench.Reply]:
    """Two requests, one after the other: what the first reply leaves behind must not end the second badly."""
    timeouts = bench.Timeouts(1.0, 0.5, 0.5, 1.0)
    stopwatch = OnePair(bench.Origin("127.0.0.1", 9, False), timeouts, streamed)
    stopwatch.said, stopwatch.far = parts, set()
    permits = bench.Permits(1)
    permits.open(0)
    replies = []
    try:
        for _ in range(2):
            call = bench.Call(bench.READERS[streamed], bench.Turn(permits))
            call.payload = b"POST / HTTP/1.1\r\n\r\n"
            failure = None
            try:
                await stopwatch.perform(call)
            except bench.CallError as error:
                failure = error.failure
            replies.append(call.end(failure))
    finally:
        stopwatch.close()
        for sock in stopwatch.far:
            sock.close()
    return replies


@settings
@hypothesis.given(data=REPLIES, places=st.lists(st.integers(0, 1 << 20), max_size=4), streamed=st.booleans())
def test_the_stopwatch_raises_nothing_but_its_own(parser: None, data: bytes, places: list[int], streamed: bool) -> None:
    unasked = []
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda _, context: unasked.append(context))
    try:
        for reply_ in loop.run_until_complete(performed(cuts(data, places), streamed)):
            assert_sound(reply_)
    finally:
        loop.close()
    assert not unasked


def test_the_stopwatch_reads_a_stream_cut_anywhere(parser: None) -> None:
    """Held packets, digested at whatever place, say what the reader alone says."""
    data = STREAM_HEAD + b"".join(map(chunk, GOOD_EVENTS)) + b"0\r\n\r\n"
    loop = asyncio.new_event_loop()
    try:
        for place in range(1, len(data), 17):
            first = loop.run_until_complete(performed([data[:place], data[place:]], True))[0]
            assert (first.failure, first.chunks, first.prompt_tokens) == (None, 3, 7)
    finally:
        loop.close()
