"""Section 2, Types: records hold stamps, durations are derived, absent is None."""

from __future__ import annotations

import pytest

from tests.support.records import make_record


def test_durations_follow_from_the_stamps() -> None:
    record = make_record()
    assert record.latency_ms == pytest.approx(500)  # to the last token, not to the usage chunk after it
    assert record.ttft_ms == pytest.approx(100)
    assert record.tpot_ms == pytest.approx(100)  # 400 ms over the 4 tokens after the first
    assert record.queue_ms == pytest.approx(1)
    assert record.tokens_per_s == pytest.approx(10)
    assert record.total_tokens == 15


def test_a_whole_reply_lasts_until_its_last_byte() -> None:
    record = make_record(first_s=None, visible_s=None, last_s=None)
    assert record.latency_ms == pytest.approx(600)
    assert record.ttft_ms is None
    assert record.tpot_ms is None


def test_a_failure_has_no_latency() -> None:
    record = make_record(status="http_error", error_kind="timeout")
    assert record.latency_ms is None
    assert record.ttft_ms is None
    assert record.tpot_ms is None
    assert record.tokens_per_s is None


@pytest.mark.parametrize("tokens", [None, 0, 1])
def test_one_token_has_no_time_per_further_token(tokens: int) -> None:
    assert make_record(completion_tokens=tokens).tpot_ms is None


def test_response_time_counts_from_the_due_time() -> None:
    assert make_record(due_s=0.5).response_ms == pytest.approx(1000)
    assert make_record().response_ms is None


def test_tokens_nobody_counted_are_none() -> None:
    assert make_record(prompt_tokens=None, completion_tokens=None).total_tokens is None
    assert make_record(prompt_tokens=None).total_tokens == 5
