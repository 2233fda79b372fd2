"""A server that misbehaves on purpose, between good answers.

A request whose prompt says `fault:NAME;` gets that fault, any other a good answer, so that one run sees
both and every row's fate is known beforehand. A fault is an entry of FAULTS: what is done to the request, and
what the benchmark must call it. Faults that strike before a request can be read are in DOORS: they befall
every connection to their port.
"""

from __future__ import annotations

import contextlib
import gzip
import re
import socket
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Callable, Optional

from tests.support.replies import (
    ANSWER,
    COUNTS,
    DONE,
    FINISH,
    GOOD_EVENTS,
    LAST_CHUNK,
    ONE,
    ROLE,
    STREAM_HEAD,
    THREE,
    TWO,
    USAGE,
    as_json,
    chunk,
    completion,
    delta,
    head,
    piece,
    reply,
)
from tests.support.server import Act, Call, Door, HttpServer, reset_on_close, says

SUCCESS = "success/"
MEGABYTE = 1 << 20
_NAME = re.compile(rb"fault:(\w+);")


def fault_prompt(name: str) -> str:
    return f"meet the fault:{name};"


class FaultServer(HttpServer):
    """Does to each request the fault that its prompt names; `seen` counts them by name, the good ones as `good`."""

    def __init__(self, acts: Mapping[str, Act], door: Optional[Door] = None) -> None:
        self._acts = acts
        self.seen: Counter[str] = Counter()
        super().__init__(self._by_name, door)

    def _by_name(self, call: Call) -> None:
        named = _NAME.search(call.body)
        name = named.group(1).decode() if named else "good"
        with self._lock:
            self.seen[name] += 1
        (self._acts[name] if named else good)(call)


def good(call: Call) -> None:
    if call.streamed:
        call.send(STREAM_HEAD + b"".join(map(chunk, GOOD_EVENTS)) + LAST_CHUNK)
    else:
        call.send(reply("200 OK", as_json(completion())))


# --- the ways of a fault ---


def sends(*pieces: bytes, close: bool = False) -> Act:
    """These bytes as the whole reply, then perhaps the end of the connection."""
    return says(*pieces, gap_s=0.001 if len(pieces) > 1 else 0.0, keep=not close)


def sends_then_stalls(*pieces: bytes) -> Act:
    def act(call: Call) -> None:
        call.send(*pieces)
        call.stall()

    return act


def sends_then_resets(*pieces: bytes) -> Act:
    def act(call: Call) -> None:
        call.send(*pieces)
        time.sleep(0.02)  # a reset would overtake them
        call.reset()

    return act


def body(value: Any, *headers: str, status: str = "200 OK") -> Act:
    data = value if isinstance(value, bytes) else as_json(value)
    return sends(reply(status, data, *headers))


def streams(*events: bytes, close: bool = False) -> Act:
    """A well-framed stream of these events, a packet each."""
    return sends(STREAM_HEAD, *map(chunk, events), LAST_CHUNK, close=close)


def then_good(*pieces: bytes) -> Act:
    def act(call: Call) -> None:
        call.send(*pieces)
        good(call)

    return act


def good_then_unread(call: Call) -> None:
    """As a server does whose keep-alive time-out and our next request have crossed: it closes with that unread."""
    good(call)
    call.sock.settimeout(0.05)
    with contextlib.suppress(OSError):
        call.sock.recv(1, socket.MSG_PEEK)
    call.close()


def close_on_reuse(call: Call) -> None:
    """As a server does that fails at a request: what it had read may not be sent to it again."""
    if call.number:
        call.close()
    else:
        good(call)


def close_after_good(call: Call) -> None:
    good(call)
    call.close()


def answer_and_a_half(call: Call) -> None:
    """The rest of a second answer comes when the next request may be under way."""
    second = reply("200 OK", ANSWER)
    call.send(reply("200 OK", ANSWER) + second[:60])
    time.sleep(0.01)
    call.send(second[60:])


def half_close(call: Call) -> None:
    call.sock.shutdown(socket.SHUT_WR)
    call.stall()


def byte_by_byte(call: Call) -> None:
    data = STREAM_HEAD + b"".join(map(chunk, GOOD_EVENTS)) + LAST_CHUNK
    for at in range(len(data)):
        call.sock.sendall(data[at : at + 1])


def drip(call: Call) -> None:
    """Never quiet for long, and never done."""
    call.send(STREAM_HEAD)
    while True:
        call.send(chunk(ONE))
        time.sleep(0.02)


def flood(size: int) -> Act:
    """A body of white space, then an answer: `size` bytes before the point."""

    def act(call: Call) -> None:
        answer = as_json(completion())
        call.send(head("200 OK", f"Content-Length: {size + len(answer)}"))
        blank = b" " * MEGABYTE
        for _ in range(size // MEGABYTE):
            call.sock.sendall(blank)
        call.send(answer)

    return act


def echo_key(call: Call) -> None:
    """A helpful server: it says which key it did not like."""
    text = f"no such key: {call.authorization}, \x1b[31mreally\x1b[0m\nnot"
    call.send(reply("401 Unauthorized", as_json({"error": {"message": text}})))


@dataclass(frozen=True)
class Fault:
    """What is done, and how the row must read: `status/error_kind`, several where a transport cannot tell."""

    act: Act
    whole: str = ""  # empty: makes no sense for whole replies
    stream: str = ""
    sdk: str = ""  # other readings allowed with the SDK's transports
    spoils: bool = False  # the SDK's clients let it spoil the next request on the connection, too


def both(act: Act, expected: str, sdk: str = "") -> Fault:
    return Fault(act, expected, expected, sdk)


def status_faults() -> dict[str, Fault]:
    """Every error status that gateways send, in the bodies that they send."""
    forms = {
        "object": as_json({"error": {"message": "refused", "type": "x", "code": None}}),
        "string": as_json({"error": "refused"}),
        "detail": as_json({"detail": [{"loc": ["body"], "msg": "refused"}]}),
        "message": as_json({"message": "refused", "code": "400"}),
        "html": b"<html><head><style>b{}</style></head><body><h1>refused</h1></body></html>",
        "empty": b"",
        "not_utf8": b"\xff\xfe refused",
        "huge": b"refused " * (MEGABYTE // 2),
    }
    numbers = (
        *(400, 401, 402, 403, 404, 405, 406, 408, 409, 410, 411, 412, 413, 414, 415, 418, 421, 422, 423, 424, 425),
        *(426, 428, 431, 451, 499, 500, 501, 502, 504, 505, 507, 508, 511, 520, 521, 522, 523, 524, 529, 530),
    )
    names = list(forms)
    faults = {}
    for at, number in enumerate(numbers):
        form = names[at % len(names)]
        headers = ("Retry-After: 60",) if number in (408, 413) else ()
        act = body(forms[form], *headers, status=f"{number} No")
        faults[f"status_{number}_{form}"] = both(act, f"http_error/http_{number}")
    for number in (429, 503):
        act = body(forms["object"], "Retry-After: 60", status=f"{number} Later")
        faults[f"status_{number}_retry_after"] = both(act, f"http_error/http_{number}")
    for number in (300, 301, 302, 303, 307, 308):
        act = body(b"", "Location: http://127.0.0.1:9/elsewhere", status=f"{number} Elsewhere")
        faults[f"redirect_{number}"] = both(act, f"http_error/http_{number}")
    return faults


CUT = "http_error/cut"
EMPTY_200 = reply("200 OK", b"")
GZIPPED = gzip.compress(ANSWER)
LIMIT = 8 * MEGABYTE  # of a reply, in the tests: its own is 256 MB
BOMB = gzip.compress(b" " * (4 * LIMIT), 1)
DEEP = 400

CONNECTION_FAULTS = {
    "never_answers": both(Call.stall, "http_error/first_byte_timeout"),
    "closes_without_reply": both(Call.close, "http_error/closed"),
    "resets_without_reply": both(Call.reset, "http_error/reset", "http_error/closed"),
    "half_closes": both(half_close, "http_error/closed"),
    "closes_within_head": both(sends(b"HTTP/1.1 200 OK\r\nConte", close=True), CUT, "http_error/closed"),
    "stalls_within_head": both(
        sends_then_stalls(b"HTTP/1.1 200 OK\r\nConte"), "http_error/idle_timeout", "http_error/first_byte_timeout"
    ),
    "resets_within_body": both(sends_then_resets(reply("200 OK", ANSWER)[:-9]), "http_error/reset", CUT),
    "closes_after_each_reply": both(close_after_good, SUCCESS),
    "closes_on_reuse": both(close_on_reuse, f"{SUCCESS}|http_error/closed"),
    "leaves_the_next_unread": both(good_then_unread, SUCCESS),
    "says_connection_close": Fault(
        sends(reply("200 OK", ANSWER, "Connection: close"), close=True), SUCCESS, "decode_error/not_a_stream"
    ),
    "speaks_ssh": both(sends(b"SSH-2.0-OpenSSH_9.6\r\n", close=True), "http_error/bad_http", "http_error/closed"),
    "speaks_http_2": both(sends(b"\0\0\x12\x04\0\0\0\0\0\0\x03\0\0\0d", close=True), "http_error/bad_http"),
    "switches_protocols": both(
        sends(head("101 Switching", "Upgrade: h2c", "Connection: upgrade"), close=True),
        "http_error/bad_http",
        "http_error/http_101|http_error/closed",
    ),
    "interim_100": both(then_good(head("100 Continue")), SUCCESS),
    "interim_102_103": both(then_good(head("102 Processing"), head("103 Hints", "Link: </x>")), SUCCESS),
    "no_content_204": both(sends(head("204 No Content")), "decode_error/empty_body"),
    "not_modified_304": both(sends(head("304 Not Modified")), "http_error/http_304"),
}

BODY_FAULTS = {
    "truncated_json": Fault(body(ANSWER[:-9]), "decode_error/bad_json", "decode_error/not_a_stream"),
    "length_too_long": both(sends(reply("200 OK", ANSWER)[:-9], close=True), CUT),
    "length_too_long_stall": both(sends_then_stalls(reply("200 OK", ANSWER)[:-9]), "http_error/idle_timeout"),
    "length_too_short": Fault(
        sends(head("200 OK", f"Content-Length: {len(ANSWER) - 9}") + ANSWER),
        "decode_error/bad_json",
        "decode_error/not_a_stream",
        spoils=True,
    ),
    "two_replies": Fault(sends(reply("200 OK", ANSWER) * 2), SUCCESS, "decode_error/not_a_stream", spoils=True),
    "answer_and_a_half": Fault(answer_and_a_half, SUCCESS, "decode_error/not_a_stream", spoils=True),
    "html_200": Fault(body(b"<html><body>Welcome</body></html>"), "decode_error/bad_json", "decode_error/not_a_stream"),
    "nothing_200": both(sends(EMPTY_200), "decode_error/empty_body"),
    "not_utf8": Fault(body(b'{"choices": "\xff\xfe"}'), "decode_error/not_utf8", "decode_error/not_a_stream"),
    "null": Fault(body(None), "decode_error/no_choices", "decode_error/not_a_stream"),
    "list": Fault(body([1, 2]), "decode_error/no_choices", "decode_error/not_a_stream"),
    "number": Fault(body(b"17"), "decode_error/no_choices", "decode_error/not_a_stream"),
    "no_choices": Fault(body({"id": "c"}), "decode_error/no_choices", "decode_error/not_a_stream"),
    "empty_choices": Fault(body(completion(choices=[])), "decode_error/no_choices"),
    "choices_of_null": Fault(body(completion(choices=[None])), "decode_error/no_choices"),
    "no_message": Fault(body(completion(choices=[{"finish_reason": "stop"}])), "decode_error/no_choices"),
    "nothing_said": Fault(
        body(completion(usage=None, choices=[{"message": {"content": None}, "finish_reason": "stop"}])),
        "decode_error/empty",
    ),
    "error_object_200": Fault(body({"error": {"message": "no"}}), "decode_error/error_body"),
    "error_string_200": Fault(body({"error": "no"}), "decode_error/error_body"),
    "error_nested_200": Fault(
        body(b'{"error":' * DEEP + b'{"message":"x"}' + b"}" * DEEP), "decode_error/error_body|decode_error/bad_json"
    ),
    "nested_lists": Fault(body(b"[" * DEEP + b"]" * DEEP), "decode_error/no_choices|decode_error/bad_json"),
    "usage_missing": Fault(body(completion(usage={})), SUCCESS),
    "usage_null": Fault(body(completion(usage=None)), SUCCESS),
    "usage_negative": Fault(body(completion(usage={"prompt_tokens": -1, "completion_tokens": -5})), SUCCESS),
    "usage_strings": Fault(body(completion(usage={"prompt_tokens": "7", "completion_tokens": "3"})), SUCCESS),
    "usage_list": Fault(body(completion(usage=[1])), SUCCESS),
    "usage_astronomic": Fault(
        body(completion(usage={"prompt_tokens": 10**400, "completion_tokens": 10**400})), SUCCESS
    ),
    "finish_reason_number": Fault(
        body(completion(choices=[{"message": {"content": "x"}, "finish_reason": 5}])), SUCCESS
    ),
    "gzip_unasked": Fault(body(GZIPPED, "Content-Encoding: gzip"), SUCCESS),
    "gzip_broken": Fault(body(GZIPPED[:20] + b"????" + GZIPPED[24:], "Content-Encoding: gzip"), "http_error/bad_http"),
    "gzip_bomb": Fault(body(BOMB, "Content-Encoding: gzip"), "http_error/too_large"),
    "body_below_the_limit": Fault(flood(LIMIT // 2), SUCCESS),
    "body_beyond_the_limit": Fault(flood(2 * LIMIT), "http_error/too_large"),
    "chunked_with_trimmings": Fault(
        sends(
            head("200 OK", "Transfer-Encoding: chunked"),
            b"%x;name=value\r\n%s\r\n" % (20, ANSWER[:20]),
            b'%X;a="b c"\r\n%s\r\n' % (len(ANSWER) - 20, ANSWER[20:]),
            b"0;last\r\nX-Checksum: 1\r\nX-Other: 2\r\n\r\n",
        ),
        SUCCESS,
    ),
    "http_1_0": Fault(sends(b"HTTP/1.0 200 OK\r\nContent-Type: a/b\r\n\r\n" + ANSWER, close=True), SUCCESS),
    "headers_of_60_kb": Fault(body(ANSWER, *(f"X-{at}: {'v' * 1000}" for at in range(60))), SUCCESS),
    "headers_odd": Fault(
        sends(f"HTTP/1.1 200 OK\r\ncOnTeNt-LeNgTh:{len(ANSWER)}\r\nX-A: 1\r\nX-A: 2\r\nX-E:\r\n\r\n".encode() + ANSWER),
        SUCCESS,
    ),
}

STREAM_FAULTS = {
    "role_only": (streams(ROLE, DONE), "decode_error/truncated"),
    "no_token": (streams(ROLE, FINISH, DONE), "decode_error/empty"),
    "done_only": (streams(DONE), "decode_error/truncated"),
    "no_done": (streams(ROLE, ONE, FINISH, COUNTS), SUCCESS),
    "no_finish_reason": (streams(ROLE, ONE, TWO, COUNTS, DONE), "decode_error/truncated"),
    "cut_within_chunk": (sends(STREAM_HEAD, chunk(ROLE), chunk(ONE)[:-9], close=True), CUT),
    "cut_between_chunks": (sends(STREAM_HEAD, chunk(ROLE), chunk(ONE), close=True), CUT),
    "cut_after_finish": (sends(STREAM_HEAD, *map(chunk, (ONE, FINISH)), close=True), CUT),
    "cut_after_done": (sends(STREAM_HEAD, *map(chunk, (ONE, FINISH, DONE)), close=True), SUCCESS),
    "reset_within": (sends_then_resets(STREAM_HEAD, chunk(ONE)), "http_error/reset"),
    "ends_within_event": (streams(ROLE, ONE, TWO[:-20]), "decode_error/truncated"),
    "ends_within_character": (
        streams(ROLE, 'data: {"choices":[{"delta":{"content":"\u00e9'.encode()[:-1]),
        "decode_error/truncated",
    ),
    "clean_end": (streams(ROLE, ONE, TWO), "decode_error/truncated"),
    "error_event": (
        streams(ROLE, b'data: {"error":{"message":"no","code":500}}\n\n', DONE),
        "decode_error/stream_error",
    ),
    "error_event_named": (streams(ONE, b'event: error\ndata: {"detail":"no"}\n\n', DONE), "decode_error/stream_error"),
    "error_event_plain": (streams(ONE, b"event: error\ndata: no\n\n"), "decode_error/stream_error"),
    "error_event_object": (
        streams(ONE, b'data: {"object":"error","message":"no","code":400}\n\n', DONE),
        "decode_error/stream_error",
    ),
    "error_field": (streams(ONE, b'error: {"message":"no"}\n\n'), "decode_error/stream_error"),
    "error_nested": (
        streams(b'data: {"error":' + b"[" * DEEP + b"]" * DEEP + b"}\n\n"),
        "decode_error/stream_error|decode_error/bad_event",
    ),
    "garbage_event": (streams(ONE, b"data: !!garbage!!\n\n", FINISH, DONE), "decode_error/bad_event"),
    "event_of_null": (streams(ONE, b"data: null\n\n", FINISH, DONE), "decode_error/bad_event"),
    "choices_of_null": (streams(piece([None]), ONE, piece("x"), FINISH, DONE), SUCCESS),
    "stall_after_first": (sends_then_stalls(STREAM_HEAD, chunk(ROLE), chunk(ONE)), "http_error/idle_timeout"),
    "stall_after_head": (sends_then_stalls(STREAM_HEAD), "http_error/idle_timeout"),
    "stall_after_done": (sends_then_stalls(STREAM_HEAD, *map(chunk, GOOD_EVENTS)), SUCCESS),
    "stall_after_counts": (sends_then_stalls(STREAM_HEAD, *map(chunk, (ONE, TWO, THREE, FINISH, COUNTS))), SUCCESS),
    "drips_for_ever": (drip, "http_error/timeout"),
    "one_byte_per_packet": (byte_by_byte, SUCCESS),
    "everything_in_one_packet": (sends(STREAM_HEAD + b"".join(map(chunk, GOOD_EVENTS)) + LAST_CHUNK), SUCCESS),
    "event_of_2_mb": (streams(ROLE, piece(delta(content="x" * (2 * MEGABYTE))), FINISH, DONE), SUCCESS),
    "lines_without_event": (streams(b": ping\n" * 50_000, ONE, FINISH, DONE), SUCCESS),
    "comments": (streams(b": keep-alive 1/1\n\n", ROLE, b": x\n" + ONE, b":\n\n", TWO, FINISH, DONE), SUCCESS),
    "crlf": (streams(*(event.replace(b"\n", b"\r\n") for event in GOOD_EVENTS)), SUCCESS),
    "cr_only": (streams(*(event.replace(b"\n", b"\r") for event in GOOD_EVENTS)), SUCCESS),
    "no_space": (streams(*(event.replace(b"data: ", b"data:") for event in GOOD_EVENTS)), SUCCESS),
    "reasoning_only": (streams(ROLE, piece(delta(reasoning_content="hm")), FINISH, COUNTS, DONE), SUCCESS),
    "tool_calls_only": (streams(ROLE, piece(delta(tool_calls=[{"index": 0}])), FINISH, COUNTS, DONE), SUCCESS),
    "usage_everywhere": (
        streams(*(piece(delta(content="x"), usage=USAGE) for _ in range(3)), piece(delta(finish="stop"), usage=USAGE)),
        SUCCESS,
    ),
    "usage_in_finish": (streams(ONE, TWO, THREE, piece(delta(finish="stop"), usage=USAGE), DONE), SUCCESS),
    "usage_never": (streams(ONE, TWO, THREE, FINISH, DONE), SUCCESS),
    "usage_astronomic": (
        streams(ONE, FINISH, piece([], usage={"prompt_tokens": 10**400, "completion_tokens": 10**400}), DONE),
        SUCCESS,
    ),
    "aborted": (streams(ROLE, ONE, piece(delta(finish="abort")), DONE), "decode_error/aborted_by_server"),
    "plain_json": (body(ANSWER), "decode_error/not_a_stream"),
    "gzip_unasked": (
        sends(reply("200 OK", gzip.compress(b"".join(GOOD_EVENTS)), "Content-Encoding: gzip")),
        SUCCESS,
    ),
    "http_1_0": (sends(b"HTTP/1.0 200 OK\r\n\r\n", *GOOD_EVENTS, close=True), SUCCESS),
    "with_length": (sends(reply("200 OK", b"".join(GOOD_EVENTS))), SUCCESS),
    "junk_after_the_end": (
        sends(STREAM_HEAD, *map(chunk, GOOD_EVENTS), LAST_CHUNK + b"junk"),
        SUCCESS,
    ),
}

SDK_READINGS = {"reset_within": CUT}
SPOILING = ("junk_after_the_end",)

FAULTS: dict[str, Fault] = {
    **CONNECTION_FAULTS,
    **status_faults(),
    **BODY_FAULTS,
    **{
        f"stream_{name}": Fault(act, "", kind, SDK_READINGS.get(name, ""), name in SPOILING)
        for name, (act, kind) in STREAM_FAULTS.items()
    },
}
# What only a limit on silence, or on the whole, ends: the one group that is run with short ones.
SILENCES = (
    *("never_answers", "stalls_within_head", "length_too_long_stall", "stream_stall_after_first"),
    *("stream_stall_after_head", "stream_stall_after_done", "stream_stall_after_counts", "stream_drips_for_ever"),
)


def group_of(name: str) -> str:
    if name in SILENCES:
        return "silence"
    if name in CONNECTION_FAULTS:
        return "connection"
    if name in BODY_FAULTS:
        return "body"
    return "stream" if name.startswith("stream_") else "status"


GROUPS: dict[str, dict[str, Fault]] = {}
for _name, _fault in FAULTS.items():
    GROUPS.setdefault(group_of(_name), {})[_name] = _fault
ACTS: dict[str, Act] = {name: fault.act for name, fault in FAULTS.items()}


# --- faults that strike before there is a request ---


def reset_at_once(sock: socket.socket) -> None:
    reset_on_close(sock)


def close_at_once(sock: socket.socket) -> None:
    """The caller closes what it gets no socket for."""


def never_read(sock: socket.socket) -> None:
    """Wait for the client to go; its bytes stay in the kernel."""
    sock.settimeout(30)
    while sock.recv(1, socket.MSG_PEEK):
        time.sleep(0.02)
        if _gone(sock):
            return


def _gone(sock: socket.socket) -> bool:
    closing_states = (7, 8)  # CLOSE, CLOSE_WAIT
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] in closing_states


def refuse_early(sock: socket.socket) -> None:
    """Answer after the first bytes, and stop reading."""
    sock.recv(65536)
    sock.sendall(reply("413 Too Large", b'{"error":"too large"}', "Connection: close"))
    time.sleep(0.05)


DOORS: dict[str, tuple[Callable[[socket.socket], Any], str]] = {
    "resets_at_once": (reset_at_once, "http_error/reset|http_error/closed"),
    "closes_at_once": (close_at_once, "http_error/closed|http_error/reset"),
    "never_reads": (never_read, "http_error/first_byte_timeout"),
}
