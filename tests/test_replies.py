"""Section 5, Replies: what a reply means. Each form was seen from a real server."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Optional

import pytest

import online_bench_openai_async as bench
from tests.support.replies import read_reply


def event(delta: dict[str, Any], finish: Optional[str] = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    body = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice], **more}
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def usage(prompt: int = 10, completion: int = 3, **more: Any) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion, **more}


ROLE = event({"role": "assistant", "content": ""})
TOKENS = [event({"content": text}) for text in ("a", "b", "c")]
FINISH = event({}, "stop")
USAGE = b"data: " + json.dumps({"choices": [], "usage": usage()}).encode() + b"\n\n"
DONE = b"data: [DONE]\n\n"
WHOLE_STREAM = [ROLE, *TOKENS, FINISH, USAGE, DONE]


def stream(*events: bytes) -> bench.Reply:
    """Each event in a packet of its own, 10 ms apart, the first at 10 ms."""
    return read_reply(True, [((n + 1) * 10_000_000, data) for n, data in enumerate(events)])


def test_a_stream_is_timed_from_its_first_token_to_its_last() -> None:
    answer = stream(*WHOLE_STREAM)
    assert answer.failure is None
    assert (answer.first_ns, answer.last_ns) == (20_000_000, 40_000_000)  # neither the role nor the usage chunk
    assert list(answer.gaps_ms) == [10.0, 10.0]
    assert (answer.chunks, answer.finish_reason) == (3, "stop")
    assert (answer.prompt_tokens, answer.completion_tokens, answer.has_usage) == (10, 3, True)


@pytest.mark.parametrize("key", ["content", "reasoning_content", "reasoning", "refusal"])
def test_every_kind_of_token_stops_the_first_token_clock(key: str) -> None:
    answer = stream(ROLE, event({key: "x"}), FINISH, USAGE, DONE)
    assert answer.first_ns == 20_000_000
    assert answer.failure is None


def test_a_tool_call_is_a_token() -> None:
    call = event({"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": ""}}]})
    assert stream(ROLE, call, event({}, "tool_calls"), USAGE).first_ns == 20_000_000


def test_reasoning_comes_first_and_the_visible_token_later() -> None:
    answer = stream(ROLE, event({"reasoning": "hm"}), event({"content": "a"}), FINISH, USAGE)
    assert (answer.first_ns, answer.visible_ns) == (20_000_000, 30_000_000)


def test_the_finishing_chunk_may_carry_the_last_text() -> None:
    answer = stream(ROLE, TOKENS[0], event({"content": "z"}, "length"), USAGE)
    assert (answer.last_ns, answer.chunks, answer.finish_reason) == (30_000_000, 2, "length")


def test_usage_may_come_in_every_chunk_or_in_the_finishing_one() -> None:
    every = [event({"content": "a"}, usage=usage(10, n)) for n in (1, 2, 3)]
    assert stream(*every, FINISH).completion_tokens == 3
    assert stream(*TOKENS, event({}, "stop", usage=usage(5, 9))).completion_tokens == 9


def test_counts_in_every_chunk_turn_gaps_of_chunks_into_gaps_of_tokens() -> None:
    counts = [(1, 1), (4, 3), (5, 1)]  # completion tokens so far, tokens in this chunk
    answer = stream(*(event({"content": "a" * tokens}, usage=usage(10, n)) for n, tokens in counts), FINISH)
    assert list(answer.gaps_ms) == pytest.approx([10 / 3, 10 / 3, 10 / 3, 10])
    assert answer.chunks == 3


def test_a_count_in_the_finishing_chunk_alone_spreads_nothing() -> None:
    answer = stream(TOKENS[0], event({"content": "z"}, "length", usage=usage(10, 50)))
    assert list(answer.gaps_ms) == [10.0]


@pytest.mark.parametrize("bad", [None, usage(0, 0), {"prompt_tokens": -1, "completion_tokens": "7"}, "many", []])
def test_a_usage_that_counts_nothing_is_none(bad: Any) -> None:
    answer = stream(*TOKENS, event({}, "stop", usage=bad))
    assert answer.failure is None
    assert not answer.has_usage
    assert (answer.prompt_tokens, answer.completion_tokens) == (None, 3)  # the content chunks


def test_no_done_is_no_failure_but_no_finish_reason_is() -> None:
    assert stream(*TOKENS, FINISH).failure is None
    for ending in ((), (DONE,), (USAGE, DONE)):
        failure = stream(*TOKENS, *ending).failure
        assert failure is not None
        assert (failure.status, failure.kind) == ("decode_error", "truncated")


@pytest.mark.parametrize(
    ("events", "kind"),
    [
        ([], "empty_body"),
        ([b"\n\n"], "empty_body"),
        ([DONE], "truncated"),
        ([ROLE], "truncated"),
        ([ROLE, FINISH, DONE], "empty"),
        ([b'{"id": "x", "choices": [{"message": {"content": "a"}, "finish_reason": "stop"}]}'], "not_a_stream"),
        ([b"<html>Bad gateway</html>"], "not_a_stream"),
        ([*TOKENS, b'data: {"error": {"message": "gone", "code": 500}}\n\n', DONE], "stream_error"),
        ([*TOKENS, b'event: error\ndata: {"detail": "gone"}\n\n'], "stream_error"),
        ([*TOKENS, b'data: {"object": "error", "message": "gone", "code": 400}\n\n', DONE], "stream_error"),
        ([*TOKENS, b"error: gone\n\n"], "stream_error"),
        ([*TOKENS, b"data: {broken\n\n", FINISH], "bad_event"),
        ([*TOKENS, b"data: 5\n\n", FINISH], "bad_event"),
        ([*TOKENS, FINISH[:40]], "truncated"),
        ([*TOKENS, event({}, "abort"), DONE], "aborted_by_server"),
    ],
)
def test_what_is_no_complete_stream(events: list[bytes], kind: str) -> None:
    failure = stream(*events).failure
    assert failure is not None
    assert (failure.status, failure.kind) == ("decode_error", kind)
    assert failure.message


def test_a_reply_of_special_tokens_only_has_no_first_token_but_counts() -> None:
    answer = stream(ROLE, FINISH, USAGE, DONE)
    assert answer.failure is None
    assert answer.first_ns is None
    assert answer.completion_tokens == 3


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 100, 100_000])
def test_packets_and_line_ends_change_nothing(newline: bytes, size: int) -> None:
    extra = b": keep-alive\n\nid: 7\nevent: message\nretry: 10\n"
    data = b"\xef\xbb\xbf" + extra + b"".join(WHOLE_STREAM).replace(b'"a"', '"日"'.encode())
    data = data.replace(b"\n", newline)
    cut = read_reply(True, [(5, data[at : at + size]) for at in range(0, len(data), size)])
    whole = read_reply(True, [(5, data)])
    assert whole.failure is None
    assert whole.chunks == 3
    forget: dict[str, Any] = {"content_reads": 0, "merged_reads": 0}
    assert dataclasses.replace(cut, **forget) == dataclasses.replace(whole, **forget)


def test_an_event_over_several_data_lines_is_one() -> None:
    broken_up = b'data: {"choices":[{"delta":\ndata: {"content":"a"},\ndata: "finish_reason":null}]}\n\n'
    assert stream(broken_up, FINISH).chunks == 1


def test_an_event_of_two_megabytes_is_one_token() -> None:
    answer = stream(event({"content": "x" * 2_000_000}), FINISH)
    assert (answer.chunks, answer.failure) == (1, None)


def test_several_tokens_in_one_read_are_counted_as_merged() -> None:
    answer = stream(ROLE, b"".join(TOKENS), FINISH)
    assert (answer.content_reads, answer.merged_reads) == (1, 1)
    assert list(answer.gaps_ms) == [0.0, 0.0]


def read_late(*reads: tuple[bool, bytes]) -> bench.Record:
    """(whether it was read late, bytes), 10 ms apart, the request sent at 0."""
    reply = bench.Reply(free_ns=0, sent_ns=0)
    reader = bench.StreamReader(reply)
    stamps = [number * 10_000_000 for number in range(1, len(reads) + 1)]
    reader.late.update(stamp for stamp, (late, _) in zip(stamps, reads) if late)
    reader.feed(stamps, [data for _, data in reads])
    reader.finish()
    return bench.Record(bench.Job(0), reply, 0)


def test_a_first_token_that_queued_up_with_later_ones_is_blank_and_so_are_the_gaps() -> None:
    record = read_late((False, ROLE), (True, TOKENS[0] + TOKENS[1]), (False, TOKENS[2]), (False, FINISH + USAGE))
    assert record.ok
    assert (record.ttft_ms, record.visible_ms, record.tpot_ms) == (None, None, None)
    assert list(record.reply.gaps_ms) == [10.0]  # from the queue's last chunk, whose stamp is true
    assert record.latency_ms == 40 - 10
    assert (record.reply.late_gaps, record.reply.merged_reads, record.reply.with_first) == (1, 0, 0)


def test_chunks_that_queued_up_later_leave_the_first_token_alone() -> None:
    queued = b"".join(event({"content": text}, usage=usage(10, 4 + n)) for n, text in enumerate("xyz"))
    start = event({"content": "a"}, usage=usage(10, 1))
    record = read_late((False, start), (True, queued), (False, TOKENS[0] + FINISH))
    assert record.ttft_ms == 10
    assert list(record.reply.gaps_ms) == [10.0]  # one before the queue, spread over tokens, is gone, and two within
    assert record.reply.late_gaps == 3


def test_a_late_read_of_one_chunk_bears_its_true_stamp() -> None:
    record = read_late((True, TOKENS[0]), (True, TOKENS[1]), (False, TOKENS[2] + FINISH + USAGE))
    assert (record.ttft_ms, record.reply.late_gaps) == (10, 0)
    assert list(record.reply.gaps_ms) == [10.0, 10.0]


def test_a_first_token_that_the_server_or_a_proxy_sent_with_later_ones_is_told() -> None:
    assert read_late((False, ROLE + TOKENS[0] + TOKENS[1]), (False, FINISH)).reply.with_first == 1
    assert read_late((False, TOKENS[0]), (False, TOKENS[1] + TOKENS[2]), (False, FINISH)).reply.with_first == 0


def of_choice(index: int, data: bytes) -> bytes:
    return data.replace(b'"index":0', b'"index":%d' % index)


@pytest.mark.parametrize("start", [(ROLE,), ()])
@pytest.mark.parametrize("second", [TOKENS[1], FINISH])
def test_several_choices_in_one_stream_are_no_answer_whose_times_mean_anything(
    start: tuple[bytes, ...], second: bytes
) -> None:
    failure = stream(*start, TOKENS[0], of_choice(1, second), TOKENS[2], FINISH, USAGE, DONE).failure
    assert failure is not None
    assert failure.kind == "several_choices"


def test_the_only_choice_may_have_another_number() -> None:
    answer = stream(*(of_choice(1, data) for data in WHOLE_STREAM))
    assert (answer.failure, answer.chunks) == (None, 3)


def test_a_count_of_no_tokens_beside_text_is_not_believed() -> None:
    answer = stream(*TOKENS, FINISH, b"data: " + json.dumps({"choices": [], "usage": usage(10, 0)}).encode() + b"\n\n")
    assert (answer.failure, answer.completion_tokens, answer.has_usage) == (None, 3, False)
    assert answer.prompt_tokens == 10
    answer = whole(completion(usage=usage(10, 0)))
    assert (answer.failure, answer.completion_tokens, answer.has_usage) == (None, None, False)


def test_an_empty_finish_reason_is_none() -> None:
    failure = stream(event({"content": "a"}, ""), DONE).failure
    assert failure is not None
    assert failure.kind == "truncated"


@pytest.mark.parametrize(
    "data",
    [
        TOKENS[0],
        ROLE,
        FINISH,
        USAGE,
        DONE,
        event({"content": "a", "role": "assistant"}),
        event({"content": 'quote " and "delta":{"content":"x'}),
        event({"content": "a"}, usage=usage()),
        event({"content": "a"}, error={"message": "x"}),
        event({"content": ""}),
        event({"content": "last"}, "stop"),
    ],
)
def test_the_fast_scan_agrees_with_json(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = stream(data, FINISH)
    monkeypatch.setattr(bench, "text_at", lambda event: 0)
    assert stream(data, FINISH) == fast


def test_the_fast_scan_is_used_for_the_usual_chunk() -> None:
    assert bench.text_at(TOKENS[0].rstrip())
    assert not bench.text_at(ROLE.rstrip())


def whole(body: Any) -> bench.Reply:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return read_reply(False, [(1, data[:5]), (2, data[5:])])


def completion(**changes: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": "a"}, "finish_reason": "stop"}
    return {"id": "1", "choices": [choice], "usage": usage(), **changes}


def test_a_whole_reply() -> None:
    details: dict[str, Any] = {
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
    answer = whole(completion(usage=usage(**details)))
    assert answer.failure is None
    assert (answer.prompt_tokens, answer.completion_tokens) == (10, 3)
    assert (answer.cached_tokens, answer.reasoning_tokens, answer.finish_reason) == (4, 2, "stop")


def test_a_whole_reply_without_usage_counts_nothing() -> None:
    answer = whole(completion(usage=None))
    assert answer.failure is None
    assert answer.completion_tokens is None


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", "empty_body"),
        (b'{"choices": [', "bad_json"),
        (b"<html></html>", "bad_json"),
        (b'{"a": "\xff"}', "not_utf8"),
        (b"null", "no_choices"),
        ([], "no_choices"),
        ({"choices": []}, "no_choices"),
        ({"choices": [{"finish_reason": "stop"}]}, "no_choices"),
        ({"error": {"message": "overloaded"}}, "error_body"),
        ({"detail": "nope"}, "error_body"),
        (completion(choices=[{"message": {"content": ""}, "finish_reason": "stop"}], usage=usage(10, 0)), "empty"),
        (completion(choices=[{"message": {"content": "a"}, "finish_reason": "abort"}]), "aborted_by_server"),
        (completion(choices=[{"message": {"content": "a"}, "finish_reason": "stop"}] * 2), "several_choices"),
        (b"[" * 100_000, "bad_json"),
    ],
)
def test_what_is_no_complete_reply(body: Any, kind: str) -> None:
    failure = whole(body).failure
    assert failure is not None
    assert (failure.status, failure.kind) == ("decode_error", kind)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"error": {"message": "no model", "code": 404}}', "no model"),
        (b'{"error": "Unauthorized"}', "Unauthorized"),
        (b'{"detail": [{"loc": ["body"], "msg": "field required"}]}', "field required"),
        (b'{"message": "too long", "type": "x", "code": "400"}', "too long"),
        (b"Internal Server Error", "Internal Server Error"),
        (b"<html><style>p{}</style><h1>502</h1>Bad Gateway</html>", "502 Bad Gateway"),
        (b"\xff\xfe", "��"),
        (b"", ""),
    ],
)
def test_error_bodies_of_every_form_become_one_line(body: bytes, text: str) -> None:
    assert bench.error_body_text(body) == text
