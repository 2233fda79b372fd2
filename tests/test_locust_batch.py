"""locust_batch.py: its pure sections in this process, and real Locust processes against a real-socket server."""

import ast
import contextlib
import doctest
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import time
import types
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.support.locust_runs import SCRIPT, WAIT_S, Bench, LocustServer, forked, needs_locust, without_locust
from tests.support.processes import free_port, wait_until
from tests.support.program import ROOT
from tests.support.replies import DONE, FINISH, LAST_CHUNK, ONE, ROLE, STREAM_HEAD, THREE, TWO, chunk
from tests.support.server import Call, HttpServer
from tests.support.tables import rows_of

CANARY = "sk-canary-9f3b7c"


# --- The pure sections: imported without Locust, which would patch this whole process for gevent ---


@pytest.fixture(scope="module")
def lb():
    with without_locust() as module:
        yield module


@pytest.fixture
def settings(lb):
    def make(host="http://127.0.0.1:8000", **given):
        return lb.settings_from(types.SimpleNamespace(**{**{n: d for n, d, _ in lb.OPTIONS}, **given}), host)

    return make


def test_no_global_is_a_generic_alias(lb):
    """On Python 3.9 those pass for classes, and Locust asks every class of the file whether it is a user."""
    assert [name for name, value in vars(lb).items() if isinstance(value, types.GenericAlias)] == []


def test_doctests(lb):
    result = doctest.testmod(lb)
    assert result.attempted >= 6
    assert result.failed == 0


def test_percentile_is_the_inclusive_quantile_of_the_statistics_module(lb):
    rng = random.Random(5)
    for size in (2, 3, 10, 99, 500):
        values = sorted(rng.uniform(0, 1000) for _ in range(size))
        expected = statistics.quantiles(values, n=100, method="inclusive")
        assert [lb.percentile(values, q) for q in range(1, 100)] == pytest.approx(expected)
    assert lb.percentile([7.0], 99) == 7.0


def body_of(lb, settings, line, **given):
    wanted = settings(**given)
    return lb.request_head(wanted).decode(), json.loads(lb.Talk(wanted, lb.Prompt(0, 0, json.dumps(line))).body())


def test_request_holds_what_was_asked_for_and_nothing_else(lb, settings):
    head, body = body_of(lb, settings, {"text": 'say "\ud83d\ude00"'})
    assert head.startswith("POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:8000\r\n")
    assert head.endswith("\r\nContent-Length: ")
    assert "authorization" not in head.lower()
    assert body == {
        "model": "gpt-4o-mini",
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": 'say "\U0001f600"'},
        ],
    }


def test_request_options(lb, settings):
    given = {"system_prompt": "", "max_tokens": "16", "temperature": "0", "openai_api_key": " k\n"}
    extra = {"extra_body": '{"temperature": 1, "min_p": 0.1}', "openai_endpoint_path": "x y"}
    head, body = body_of(lb, settings, {"text": "hi", "output_tokens": 3}, host="https://h/base/", **given, **extra)
    assert head.startswith("POST /base/x%20y HTTP/1.1\r\nHost: h\r\n")
    assert "\r\nAuthorization: Bearer k\r\n" in head
    assert body.pop("messages") == [{"role": "user", "content": "hi"}]
    assert body == {"model": "gpt-4o-mini", "max_tokens": 3, "temperature": 1, "min_p": 0.1}


def test_a_batch_line_gains_a_missing_model_and_what_a_stream_needs(lb, settings):
    line: dict[str, Any] = {"custom_id": "a", "body": {"messages": [{"role": "user", "content": "hi"}], "top_k": 1}}
    _, body = body_of(lb, settings, line, stream=True, max_tokens="5", extra_body='{"min_p": 1}')
    asked = {"model": "gpt-4o-mini", "stream": True, "stream_options": {"include_usage": True}}
    assert body == {**asked, **line["body"]}


def test_a_query_of_the_host_goes_to_the_end_of_the_path(lb, settings):
    wanted = settings("https://me:p%40ss@h/openai/?api-version=2&key=SECRET%2B1", openai_endpoint_path="/chat?a=b")
    assert lb.request_head(wanted).startswith(b"POST /openai/chat?api-version=2&key=SECRET%2B1&a=b HTTP/1.1\r\n")
    assert lb.masked(wanted.path) == "/openai/chat?api-version=2&key=***&a=b"
    assert {"SECRET+1", "SECRET%2B1", "p@ss", "me:p@ss"} <= set(wanted.secrets)
    assert "2" not in wanted.secrets


def test_what_a_server_repeats_of_a_secret_is_blanked(lb, settings):
    wanted = settings(
        "http://h?sig=QUERY-SECRET", openai_api_key=CANARY, extra_body='{"a": [{"auth": "EXTRA-SECRET"}]}'
    )
    said = f"no {CANARY}, QUERY-SECRET or EXTRA-SECRET"
    for status, reply in ((401, {"error": said}), (200, {"error": {"message": said}})):
        outcome = lb.read_reply(lb.Reply(status, json.dumps(reply).encode()), wanted.secrets)
        assert outcome.error.endswith("no ***, *** or ***")


@pytest.mark.parametrize(
    "given",
    [
        {"host": None},
        {"host": "127.0.0.1:8000"},
        {"host": "http://"},
        {"host": "http://h:99999"},
        {"host": "http://h\x00"},
        {"max_tokens": "many"},
        {"max_tokens": "0"},
        {"temperature": "nan"},
        {"temperature": "-1"},
        {"request_timeout": "0"},
        {"extra_body": "{"},
        {"extra_body": "[]"},
        {"extra_body": '{"stream": true}', "stream": True},
        {"extra_body": '{"messages": []}'},
        {"extra_body": '{"a": NaN}'},
        {"extra_body": '{"a": "\\ud800"}'},
        {"openai_api_key": "a\r\nX-Evil: 1"},
    ],
    ids=str,
)
def test_wrong_settings_are_refused(lb, settings, given):
    with pytest.raises(lb.UsageError):
        settings(**given)


@pytest.mark.parametrize("history", ["server", "corpus"])
def test_a_session_says_all_that_was_said_before(lb, settings, history):
    turns = [
        {"role": "user", "content": "one", "max_tokens": 3},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "two", "delay_ms": 250},
    ]
    line = json.dumps({"turns": turns, "system": "mine", "output_tokens": 9, "top_k": 1})
    talk = lb.Talk(settings(history=history), lb.Prompt(4, 17, line))
    first, place = json.loads(talk.body()), talk.place
    assert (talk.index, place, talk.goes_on()) == (17, {"session": 4, "turn": 1}, True)
    assert talk.go_on("\ud83d" + "\ude00 \udc00") == 0.25
    second = json.loads(talk.body())
    assert (talk.index, talk.place, talk.goes_on()) == (18, {"session": 4, "turn": 2}, False)
    assert (first["max_tokens"], second["max_tokens"], first["top_k"]) == (3, 9, 1)
    assert [message["content"] for message in first["messages"]] == ["mine", "one"]
    answer = "A" if history == "corpus" else "\U0001f600 ?"
    assert second["messages"] == [
        *first["messages"],
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "two"},
    ]


def test_a_session_that_has_begun_is_not_given_back(lb):
    assignments = lb.Assignments(range(3), lb.Plan(3, 3))
    assignments.grant("a", 3, 0)
    assert assignments.note("a", 1, 0)
    assert not assignments.note("a", 1, 0)
    assert assignments.note("a", 1, 1)
    assert assignments.release("a") == 2
    assert list(assignments.unsent) == [0, 2]


def test_of_a_session_that_is_lost_with_its_worker_one_turn_has_a_row(lb, settings):
    session = {"turns": [{"content": "a"}, {"content": "b"}, {"content": "c"}]}
    lines = [json.dumps(line).encode() for line in (session, {"text": "x"}, session, {"text": "y"}, session)]
    *_, corpus = lb.read_corpus(lines, "corpus")
    assignments = lb.Assignments(range(5), lb.Plan(5, 4))
    results = types.SimpleNamespace(add=lambda records: None)
    run = lb.Run(1, settings(), corpus, assignments, results, 0.0, 0.0)
    assignments.grant("killed", 4, 0)
    begun = [lb.Record(index, lb.Outcome("success")) for index in (0, 1, 3)]
    assert [run.is_fresh("killed", record) for record in begun] == [True] * 3
    assert not run.is_fresh("killed", begun[0]), "its row is written"
    run.keep(begun)
    assert assignments.close("killed", 1)
    lost = run.lost()
    assert [(row.index, row.session, row.turn) for row in lost] == [(2, 0, 3), (4, 2, 1), (7, None, None)]
    assert {row.outcome.error_kind for row in lost} == {"process_lost"}
    run.keep(lost)
    assert run.unsent() == (3, 2), "the last session, and two turns of the one before it"


GOOD = {"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}]}


@pytest.mark.parametrize("bad", [None, -1, 1.5, "7", True, [], 10**30])
def test_a_count_that_is_none_is_left_blank(lb, bad):
    reply = {**GOOD, "usage": {"prompt_tokens": bad, "completion_tokens": 2, "total_tokens": bad}}
    outcome = lb.read_reply(lb.Reply(200, json.dumps(reply).encode()))
    assert (outcome.prompt_tokens, outcome.completion_tokens, outcome.total_tokens) == (None, 2, 2)


def test_failures_count_as_identical_while_nothing_else_has_happened(lb):
    success = lb.Outcome("success")
    refused, timed_out, shed = (
        lb.Outcome("http_error", kind, "x") for kind in ("connect_refused", "timeout", "http_429")
    )

    def identical(*outcomes):
        tally = lb.Tally()
        for outcome in outcomes:
            tally.add(lb.Record(0, outcome))
        return tally.identical_failures

    assert identical(*[refused] * 100) == 100
    assert identical(*[refused] * 200, timed_out) == 0
    assert identical(success, *[refused] * 200) == 0
    assert identical(*[shed] * 200) == 0, "it refuses some to serve others"


def test_a_compressed_reply_beyond_the_limit(lb, monkeypatch):
    monkeypatch.setattr(lb, "MAX_REPLY_BYTES", 2**20)
    parser = lb.ReplyParser(streamed=False)
    parser.inflate = lb.zlib.decompressobj()
    with pytest.raises(lb.ConnectionFailed) as failed:
        parser.take_body(lb.zlib.compress(b" " * (lb.MAX_REPLY_BYTES + 10**6)), 0.0, False)
    assert failed.value.args[0] == "too_large"


@pytest.mark.parametrize(
    ("reads", "first", "late_read"),
    [
        ([(ROLE, False), (ONE + TWO, False)], 2, False),  # merged on the way, not by us
        ([(ROLE, True), (ONE, True), (TWO, True)], 2, False),  # each alone: its stamp is its own
        ([(ROLE, False), (ONE + TWO, True), (THREE, False)], None, True),
        ([(ROLE + ONE, True), (TWO + THREE, True)], 1, True),
    ],
    ids=["merged", "late, one by one", "the first not alone", "the first alone"],
)
def test_the_first_token_of_chunks_that_queued_up_here_has_no_time(lb, reads, first, late_read):
    reader = lb.StreamReader()
    for stamp, (data, late) in enumerate([*reads, (FINISH + DONE, True)], 1):
        reader.feed(data, stamp, late)
    assert reader.said().problem is None
    assert (reader.first_s, reader.last_s, reader.late_read) == (first, len(reads), late_read)
    record = lb.Record(0, lb.Outcome("success", completion_tokens=3), 0.5, reader.first_s, reader.last_s)
    assert record.ttft_ms == (first and (first - 0.5) * 1000)
    assert record.tpot_ms == ((len(reads) - first) * 500 if first and len(reads) > first else None)


def test_text_of_a_server_is_one_line_without_secret_or_escape(lb):
    said = lb.plain("x\x1b[2Jy\u202e\r\n\tz\x00 sk-1 \ud800", secrets=["sk-1"])
    assert said == "x y z ***"
    assert len(lb.plain("x" * 10**6)) == lb.ERROR_TEXT_CHARS


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x"])
def test_a_cell_is_never_a_formula(lb, text):
    record = lb.Record(3, lb.Outcome("http_error", "other", text, finish_reason=text), sent_s=1.5, done_s=2.0)
    row = dict(zip(lb.COLUMNS, lb.csv_row(record)))
    assert row["error"] == row["finish_reason"] == "'" + text
    assert (row["index"], row["sent_s"], row["latency_ms"]) == ("3", "1.500000", "")


def test_assignments_gives_every_prompt_to_one_worker_at_a_time(lb):
    rng = random.Random(1)
    for _ in range(200):
        prompts, workers = rng.randrange(1, 60), rng.randrange(1, 6)
        plan = lb.Plan(prompts, rng.randrange(1, 80), workers)
        assignments = lb.Assignments(range(prompts), plan)
        holder: dict[int, int] = {}
        closed = []
        while assignments.unsent or holder:
            worker = rng.randrange(workers)
            if rng.random() < 0.05:
                back = [index for index, owner in holder.items() if owner == worker]
                assert assignments.release(worker) == len(back)
                holder = {index: owner for index, owner in holder.items() if owner != worker}
            for index in assignments.grant(worker, rng.randrange(3), rng.randrange(9)):
                assert index not in holder
                assert index not in closed
                holder[index] = worker
            for index in rng.sample(sorted(holder), min(2, len(holder))):
                assert assignments.note(holder[index], index, 0)
                assert not assignments.note(holder[index], index, 0)
                assert assignments.close(holder[index], index)
                assert not assignments.close(holder.pop(index), index)
                closed.append(index)
        assert sorted(closed) == list(range(prompts))


def test_assignments_with_one_each_never_deals_a_worker_more_than_its_users_take(lb):
    for prompts, users, workers in ((500, 500, 3), (10, 50, 4), (3, 3, 5), (500, 600, 7)):
        plan = lb.Plan(prompts, users, workers)
        assignments = lb.Assignments(range(prompts), plan)
        dealt = [len(assignments.grant(worker, 0, 10_000)) for worker in range(workers)]
        assert max(dealt) <= plan.share <= users // workers
        taken = sum(
            len(assignments.grant(worker, users // workers + 1 - dealt[worker], 0)) for worker in range(workers)
        )
        assert sum(dealt) + taken == prompts


def test_the_document_has_every_setting_and_every_column(lb):
    text = (ROOT / "docs" / "locust.md").read_text("utf-8")
    for name, default, _ in lb.OPTIONS:
        row = f"| `{name.upper()}` | `--{name.replace('_', '-')}` | " + (f"`{default}` |" if default else "no")
        assert row in text
    for column in lb.COLUMNS:
        assert f"`{column}`" in text


def sections():
    source = SCRIPT.read_text("utf-8")
    banners = [
        (number, re.findall(r"^# === (\d+)\. (.+) ===$", line)[0])
        for number, line in enumerate(source.splitlines(), 1)
        if line.startswith("# ===")
    ]
    return source, banners


def test_sections_are_the_docstring_s_and_use_only_sections_above():
    source, banners = sections()
    tree = ast.parse(source)
    part = (ast.get_docstring(tree) or "").split("Sections,")[1].split("\n\n")[0]
    listed = re.findall(r"(\d+)\. (.+?)(?:  |\n|$)", part)
    assert sorted(listed, key=lambda section: int(section[0])) == [banner for _, banner in banners]

    def section(line):
        return sum(start <= line for start, _ in banners)

    homes = {
        target.id if isinstance(target, ast.Name) else target.name: section(node.lineno)
        for node in tree.body
        for target in getattr(node, "targets", [node])
        if isinstance(target, (ast.Name, ast.FunctionDef, ast.ClassDef))
    }
    used = [(node.id, section(node.lineno)) for node in ast.walk(tree) if isinstance(node, ast.Name)]
    assert [(name, where) for name, where in used if homes.get(name, 0) > where] == []
    pure = [name for name, where in used if "pure" in banners[where - 1][1][1]]
    assert {"open", "print", "time", "os", "sys"}.isdisjoint(pure)


# --- Real Locust processes ---


@contextlib.contextmanager
def set_up(folder):
    """(a Bench in this folder, what starts a server for it); all are stopped in the end."""
    bench, servers = Bench(folder), []

    def start(*arguments):
        servers.append(LocustServer(*arguments))
        return servers[-1]

    try:
        yield bench, start
    finally:
        bench.close()
        for server in servers:
            server.stop()


AT_ONCE = 3
RUNS: dict[str, Any] = {}


def at_once(run):
    """A test that mostly waits, and runs beside the others of its kind: `run(bench, serve)`."""
    RUNS[run.__name__] = run

    def test(runs):
        runs[run.__name__].result()

    return needs_locust(test)


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """Name -> future of each run that was asked for."""

    def one(name, folder):
        with set_up(folder) as tools:
            RUNS[name](*tools)

    names = [name for name in RUNS if name in {item.name for item in request.session.items}]
    folders = {name: tmp_path_factory.mktemp("run") for name in names}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return {name: pool.submit(one, name, folder) for name, folder in folders.items()}


@pytest.fixture
def tools(tmp_path):
    with set_up(tmp_path) as tools:
        yield tools


@pytest.fixture
def bench(tools):
    return tools[0]


@pytest.fixture
def serve(tools):
    return tools[1]


TEXTS = [f"prompt {index} " + "word " * (index % 5) for index in range(500)]


def check_complete(bench, server, texts, summary):
    """Every prompt once, in the file and at the server; totals and percentiles that follow from the rows."""
    rows, truth = bench.rows(), server.truth()
    assert sorted(int(row["index"]) for row in rows) == list(range(len(texts)))
    assert {row["status"] for row in rows} == {"success"}
    assert truth["texts"] == dict.fromkeys(texts, 1)
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert sum(int(row[name]) for row in rows) == truth["tokens"][name]
        assert all(int(row[name]) == truth["usage"][texts[int(row["index"])]][name] for row in rows)
    check_percentiles(rows, "latency_ms", "Latency", summary)
    assert f"{len(texts)} of {len(texts)} prompts answered, 0 not" in summary
    return rows, truth


def check_percentiles(rows, column, title, summary):
    values = [float(row[column]) for row in rows if row[column]]
    quantiles = statistics.quantiles(values, n=100, method="inclusive")
    for q in (50, 90, 99):
        (shown,) = re.findall(rf"{title} p{q} \(ms\) +([\d.]+)  exact, n={len(values)}\n", summary)
        assert float(shown) == pytest.approx(quantiles[q - 1], abs=0.0011)


def late_by(rows, truth_ms, texts, column="latency_ms"):
    return [float(row[column]) - truth_ms[texts[int(row["index"])]] for row in rows if row[column]]


@needs_locust
def test_one_process(bench, serve):
    server = serve("--delay-ms", "200", "--together", "500")
    bench.corpus(TEXTS)
    code, out, err = bench.run(server, 500, "--csv", bench.path / "own", OPENAI_API_KEY=CANARY)
    rows, truth = check_complete(bench, server, TEXTS, out)
    assert (code, "Traceback" in err, "ERROR" in err) == (0, False, False)
    assert truth["most"] == 500, "all prompts are in flight at once when users = prompts"
    assert truth["authorization"] == {f"Bearer {CANARY}": 500}
    assert all(row["new_connection"] == "1" and row["cached_tokens"] == "2" for row in rows)
    assert all(row["error"] == "" for row in rows)
    late = late_by(rows, truth["took_ms"], TEXTS)
    assert min(late) > -1
    assert statistics.median(late) < statistics.median(truth["took_ms"].values()) / 2
    own = {row["Name"]: row for row in rows_of(bench.path / "own_stats.csv")}
    assert {name: int(row["Request Count"]) for name, row in own.items()} == {
        "/v1/chat/completions": 500,
        "prompt_tokens": 500,
        "completion_tokens": 500,
        "Aggregated": 500,
    }


@needs_locust
def test_forked_workers(bench, serve):
    server = serve()
    bench.corpus(TEXTS)
    code, out, err = bench.run(server, 500, *forked(3))
    check_complete(bench, server, TEXTS, out)
    assert (code, "Traceback" in err) == (0, False)


def start_many(bench, server, users, workers, *arguments, **environment):
    port = free_port()
    master = bench.start(
        *("--headless", "--host", server.url, "-u", users, "-r", users, "--master", "--master-bind-host"),
        *("127.0.0.1", "--master-bind-port", port, "--expect-workers", workers, *arguments),
        **environment,
    )
    return master, [start_worker(bench, port) for _ in range(workers)], port


def start_worker(bench, port):
    nowhere = {"REQUESTS_FILE": "/nonexistent", "RESULTS_CSV": "/nonexistent/results.csv"}
    return bench.start("--worker", "--master-host", "127.0.0.1", "--master-port", port, **nowhere)


@needs_locust
def test_workers_started_by_hand_stream(bench, serve):
    server = serve("--delay-ms", "300")
    bench.corpus(TEXTS)
    master, workers, _ = start_many(bench, server, 500, 4, OPENAI_API_KEY=CANARY, STREAM="1")
    code, out, err = bench.finish(master)
    rows, truth = check_complete(bench, server, TEXTS, out)
    assert truth["authorization"] == {f"Bearer {CANARY}": 500}
    assert (code, "Traceback" in err) == (0, False)
    assert [worker.wait(WAIT_S) for worker in workers] == [0] * 4
    assert all(row["ttft_ms"] or row["late_read"] == "1" for row in rows)
    check_percentiles(rows, "ttft_ms", "TTFT", out)
    check_percentiles(rows, "tpot_ms", "TPOT", out)
    late = late_by(rows, truth["first_ms"], TEXTS, "ttft_ms")
    assert min(late) > -1, "the role chunk is no token"
    (share,) = re.findall(r"Stamped by kernel +(\d+)%  of the replies; their bytes waited here for up to p50", out)
    assert int(share) > 80 or sys.platform != "linux"


@needs_locust
def test_one_worker_comes_late_one_is_told_to_leave_and_one_is_killed(bench, serve):
    server = serve("--delay-ms", "100")
    texts = TEXTS[:300]
    bench.corpus(texts)
    master, workers, port = start_many(bench, server, 16, 4, "--stop-timeout", 5, STREAM="1")
    server.wait_for(20)
    server.ask("pause")  # however long the late one takes to start
    late = start_worker(bench, port)
    wait_until(lambda: "(index 4) reported as ready" in (bench.path / "0.err").read_text("utf-8"), WAIT_S)
    server.ask("resume")
    workers[1].send_signal(signal.SIGTERM)
    assert workers[1].wait(WAIT_S) == 0
    server.wait_for(150)
    workers[0].kill()
    code, out, err = bench.finish(master)
    assert "Traceback" not in bench.finish(late)[2]
    rows, truth = bench.rows(), server.truth()
    assert sorted(int(row["index"]) for row in rows) == list(range(300))
    kinds = Counter(row["error_kind"] for row in rows)
    assert set(kinds) == {"", "process_lost"}
    assert 1 <= kinds["process_lost"] <= 20, "what the killed one held, and no more"
    assert max(truth["texts"].values()) == 1
    answered = {texts[int(row["index"])] for row in rows if row["status"] == "success"}
    assert answered <= truth["texts"].keys()
    assert f"{300 - kinds['process_lost']} of 300 prompts answered" in out
    assert re.search(rf"! process_lost +{kinds['process_lost']}  ", out)
    assert (code, "Traceback" in err) == (1, False)


@needs_locust
def test_fewer_and_more_users_than_prompts(bench, serve):
    server, texts = serve("--delay-ms", "5"), TEXTS[:50]
    bench.corpus(texts)
    code, out, err = bench.run(server, 3)
    rows, truth = check_complete(bench, server, texts, out)
    assert "each takes the next one until none is left" in err
    assert (code, truth["most"], truth["connections"]) == (0, 3, 3 + 1)
    assert min(late_by(rows, truth["took_ms"], texts)) > -1
    assert Counter(row["new_connection"] for row in rows) == {"1": 3, "0": 47}

    server = serve("--delay-ms", "5")
    bench.results.unlink()
    code, out, err = bench.run(server, 80)
    check_complete(bench, server, texts, out)
    assert "the extra users stop at once" in err
    assert code == 0


@at_once
def test_the_example_of_an_arrival_rate(bench, serve):
    server, texts = serve("--delay-ms", "5"), TEXTS[:60]
    bench.corpus(texts)
    bench.command = ("-m", "locust", "-f", str(ROOT / "examples" / "locust" / "arrival_rate.py"))
    code, out, err = bench.run(server, 1, RATES="40", PERIOD_S="0.5", STREAM="1", PYTHONPATH=str(ROOT))
    rows, _ = check_complete(bench, server, texts, out)
    assert (code, "Traceback" in err) == (0, False)
    sent = sorted(float(row["sent_s"]) for row in rows)
    assert sent[-1] - sent[0] > 0.95, "20 users, each once in half a second"
    assert {"prompt_tokens", "completion_tokens", "ttft_ms", "tpot_ms"} <= set(
        re.findall(r"^METRIC +(\w+) ", err, re.M)
    )


FAULTS = {
    "http_429": "http_429",
    "http_500": "http_500",
    "http_302": "http_302",
    "reset": "reset",
    "closed": "closed",
    "truncated": "cut",
    "garbage": "bad_http",
    "bad_json": "bad_json",
    "not_utf8": "not_utf8",
    "no_choices": "no_choices",
    "null": "no_choices",
    "error_body": "error_body",
    "empty": "empty_body",
    "hang": "timeout",
    "no_usage": "",
    "mad_usage": "",
    "gzip": "",
    "no_length": "",
    "interim": "",
    "says_close": "",
}


@needs_locust
def test_faults_are_counted_under_their_names_and_show_no_secret(bench, serve):
    server = serve()
    texts = [f"[fault:{fault}] {n}" for n in range(3) for fault in [*FAULTS, ""]]
    bench.corpus(texts)
    code, out, err = bench.run(
        server,
        3,
        "--html",
        bench.path / "r.html",
        OPENAI_API_KEY=CANARY,
        REQUEST_TIMEOUT="0.7",
        SYSTEM_PROMPT="",
    )
    rows = bench.rows()
    assert sorted(int(row["index"]) for row in rows) == list(range(len(texts)))
    for row in rows:
        fault = [*FAULTS, ""][int(row["index"]) % (len(FAULTS) + 1)]
        kind = FAULTS.get(fault, "")
        outside = kind.startswith("http_") or kind in ("reset", "closed", "cut", "bad_http", "timeout")
        assert (row["error_kind"], fault) == (kind, fault)
        assert row["status"] == ("success" if not kind else "http_error" if outside else "decode_error")
        assert (row["total_tokens"] == "") == (bool(kind) or "usage" in fault)
        assert not re.search(r"[\x00-\x1f\x7f]", row["error"])
        assert (row["latency_ms"] == "") == bool(kind)
    assert "(Retry-After: 7)" in next(row["error"] for row in rows if row["error_kind"] == "http_429")
    assert next(row["error"] for row in rows if row["error_kind"] == "error_body").startswith("'=cmd")
    assert re.search(r"! http_429 +3  first: HTTP 429 \(Retry-After: 7\): refused Bearer \*\*\* red line\n", out)
    assert (code, "Traceback" in err) == (1, False)
    assert server.truth()["authorization"].keys() == {f"Bearer {CANARY}"}
    assert [path.name for path in bench.path.rglob("*") if path.is_file() and CANARY in path.read_text("utf-8")] == []


CALLS = """
import gevent, json, sys, time, types
import locust_batch as lb

def connection_to(url, **given):
    settings = lb.settings_from(types.SimpleNamespace(**{**{n: d for n, d, _ in lb.OPTIONS}, **given}), url)
    connection = lb.Connection(settings, None, lb.LoopWatch())

    def call(text):
        body = lb.Talk(settings, lb.Prompt(0, 0, json.dumps({"text": text}))).body()
        return connection.call(lb.request_head(settings) + b"%d\\r\\n\\r\\n" % len(body) + body).stream

    return connection, call

def hold_up():
    gevent.sleep(0.1)
    until = time.perf_counter() + 0.4
    while time.perf_counter() < until:
        pass

connection, call = connection_to(sys.argv[1])
new = []
for text in ("[fault:just_closes]", "a", "b"):
    call(text)
    new.append(connection.is_new)
    time.sleep(0.3)

connection, call = connection_to(sys.argv[2], stream=True)
late = []
for text in ("a", "b", "c"):
    blocker = gevent.spawn(hold_up) if text != "a" else None
    stream = call(text)
    last_ms = (stream.last_s - connection.sent) * 1000
    late.append([stream.late_read, stream.first_s is None, connection.late_s > 0.1, connection.by_kernel, last_ms])
print(json.dumps([new, late]))
"""


@at_once
def test_connections_that_the_server_has_closed_and_streams_that_are_read_late(bench, serve):
    """The loop of the second and third call is held up from 0.1 to 0.5 s."""
    waits = iter([[0.2, 0.1], [0.2, 0.1], [0.2]])

    def answer(call: Call) -> None:
        call.send(STREAM_HEAD + chunk(ROLE))
        for wait in next(waits):
            time.sleep(wait)
            call.send(chunk(ONE))
        time.sleep(0.4)
        call.send(chunk(FINISH + DONE) + LAST_CHUNK)

    with HttpServer(answer) as server:
        command = [sys.executable, "-c", CALLS, serve().url, f"http://127.0.0.1:{server.port}"]
        out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=WAIT_S).stdout
    new, late = json.loads(out)
    assert new == [True, True, False]
    assert [fate[:2] for fate in late] == [[False, False], [True, True], [False, False]]
    if sys.platform == "linux":
        assert any(fate[2] for fate in late[1:])
        assert all(fate[3] for fate in late[1:])
        assert late[2][4] < 400, "read at 500 ms; by the kernel's stamp it had come at 200"


@at_once
def test_no_server_at_all(bench, serve):
    bench.corpus(TEXTS[:5])
    nobody = types.SimpleNamespace(url=f"http://127.0.0.1:{free_port()}")
    code, out, err = bench.run(nobody, 5)
    assert [(row["error_kind"], row["latency_ms"], row["sent_s"]) for row in bench.rows()] == [
        ("connect_refused", "", "")
    ] * 5
    assert "0 of 5 prompts answered, 5 not" in out
    assert (code, "Traceback" in err) == (1, False)


BAD_INPUT = {
    "missing corpus": ({"REQUESTS_FILE": "nothing.jsonl"}, "nothing.jsonl: No such file"),
    "empty corpus": ({"REQUESTS_FILE": "empty.jsonl"}, "empty.jsonl holds no prompt"),
    "broken corpus": ({"REQUESTS_FILE": "broken.jsonl"}, "broken.jsonl, line 2: not JSON"),
    "no host": ({"HOST": ""}, "no server: give it with --host"),
    "bad host": ({"HOST": "localhost"}, "--host is not a URL"),
    "bad JSON": ({"EXTRA_BODY": "{"}, "--extra-body is not JSON"),
    "not a number": ({"MAX_TOKENS": "lots"}, "--max-tokens is not a whole number"),
    "unwritable results": ({"RESULTS_CSV": "empty.jsonl/r.csv"}, "--results-csv empty.jsonl/r.csv"),
    "other results": ({"RESULTS_CSV": "broken.jsonl"}, "broken.jsonl: lacks the columns index, prompt_tokens"),
    "forked": ({"REQUESTS_FILE": "nothing.jsonl", "PROCESSES": "2"}, "nothing.jsonl: No such file"),
}


@needs_locust
def test_bad_input_is_one_line_and_writes_nothing(bench, serve):
    bench.corpus(["a"])
    (bench.path / "empty.jsonl").write_text("\n\n", "utf-8")
    (bench.path / "broken.jsonl").write_text('{"text": "a"}\n{"text"\n', "utf-8")
    before = sorted(path.name for path in bench.path.iterdir())
    started = []
    for environment, complaint in BAD_INPUT.values():
        environment = {"HOST": "http://127.0.0.1:1", **environment}
        host, processes = environment.pop("HOST"), environment.pop("PROCESSES", 0)
        options = (["--host", host] if host else []) + (list(forked(processes)) if processes else [])
        started.append((bench.start("--headless", "-L", "ERROR", *options, **environment), complaint))
    for process, complaint in started:
        code, out, err = bench.finish(process)
        ours = [line for line in err.splitlines() if line and "missing file descriptor" not in line]
        assert (code, out, len(ours), complaint in ours[0]) == (2, "", 1, True), err
        assert ours[0].startswith("locust_batch: error: ")
    names = sorted(path.name for path in bench.path.iterdir() if not re.match(r"\d+\.(out|err)$", path.name))
    assert names == before


@at_once
def test_run_time_aborts_what_is_in_flight_and_leaves_the_rest_unsent(bench, serve):
    server = serve("--fault", "hang")
    bench.corpus(TEXTS[:50])
    code, out, err = bench.run(server, 4, "--run-time", "2s", *forked(2))
    assert [row["error_kind"] for row in bench.rows()] == ["aborted"] * 4
    assert all(row["latency_ms"] == "" and float(row["sent_s"]) > 0 for row in bench.rows())
    assert re.search(r"! never sent +46  ", out)
    assert (code, "Traceback" in err) == (1, False)


@at_once
def test_run_time_with_stop_timeout_lets_what_is_in_flight_finish(bench, serve):
    server = serve("--delay-ms", "800")
    bench.corpus(TEXTS[:50])
    code, out, _ = bench.run(server, 4, "--run-time", "1s", "--stop-timeout", "20s", *forked(2))
    rows = bench.rows()
    assert {row["status"] for row in rows} == {"success"}
    assert len(rows) == sum(server.truth()["texts"].values())
    assert f"{len(rows)} of 50 prompts answered, {50 - len(rows)} not" in out
    assert code == 1


@needs_locust
@pytest.mark.parametrize("workers", [0, 2])
def test_interrupt_keeps_the_rows_and_prints_the_summary(bench, serve, workers):
    server = serve("--delay-ms", "100")
    bench.corpus(TEXTS)
    if workers:
        process, _, _ = start_many(bench, server, 10, workers)
    else:
        process = bench.start("--headless", "--host", server.url, "-u", 10, "-r", 10)
    server.wait_for(60)
    process.send_signal(signal.SIGINT)
    code, out, err = bench.finish(process)
    rows = bench.rows()
    kinds = Counter(row["error_kind"] for row in rows)
    assert len({row["index"] for row in rows}) == len(rows)
    assert kinds[""] >= 40
    assert set(kinds) <= {"", "aborted"}
    assert len(rows) == sum(server.truth()["texts"].values()), "a row for everything that was sent"
    assert f"{kinds['']} of 500 prompts answered" in out
    assert (code, "Traceback" in err) == (1, False)


@at_once
def test_a_stop_ends_sessions_after_the_turn_under_way(bench, serve):
    """Of sessions of three turns, some think long before the last one, others before the second: nobody waits."""
    server = serve("--delay-ms", "10")
    delays = {number: (0, 0, 60_000) if number % 2 else (0, 60_000, 0) for number in range(8)}
    lines = [
        json.dumps({"turns": [{"content": f"{number}/{turn}", "delay_ms": delay} for turn, delay in enumerate(row)]})
        for number, row in delays.items()
    ]
    (bench.path / "requests.jsonl").write_text("\n".join(lines), "utf-8")
    load = ("--headless", "--host", server.url, "-u", 6, "-r", 6, "--stop-timeout", 10 * WAIT_S)
    process = bench.start(*load, *forked(2))
    server.wait_for(9)
    process.send_signal(signal.SIGINT)
    code, out, err = bench.finish(process)
    rows = sorted((int(row["session"]), int(row["turn"]), int(row["index"]), row["status"]) for row in bench.rows())
    turns = [(number, turn) for number in range(6) for turn in ((1, 2) if number % 2 else (1,))]
    assert rows == [(number, turn, 3 * number + turn - 1, "success") for number, turn in turns]
    assert sum(server.truth()["texts"].values()) == 9
    assert "8 sessions, 6 users: each takes the next one" in err
    assert "9 of 24 prompts answered, 15 not" in out
    assert re.search(r"! never sent +6  ", out)
    assert re.search(r"! turns not sent +9  of the 6 sessions begun: a turn before them failed, or the run ended", out)
    assert (code, "Traceback" in err) == (1, False)


@at_once
def test_a_second_interrupt_does_not_wait(bench, serve):
    server = serve("--fault", "hang")
    bench.corpus(TEXTS[:9])
    process = bench.start("--headless", "--host", server.url, "-u", 4, "-r", 4, "--stop-timeout", 10 * WAIT_S)
    server.wait_for(4)
    process.send_signal(signal.SIGINT)
    time.sleep(1)  # it is waiting for its requests by now; were it not, the test would still hold
    process.send_signal(signal.SIGINT)
    code, out, err = bench.finish(process)
    assert [row["error_kind"] for row in bench.rows()] == ["aborted"] * 4
    assert re.search(r"! never sent +5  ", out)
    assert (code, "Traceback" in err) == (1, False)


@at_once
def test_forked_workers_end_with_a_master_that_is_killed(bench, serve):
    server = serve("--fault", "hang")
    bench.corpus(TEXTS[:4])
    users = ("--headless", "--host", server.url, "-u", 4, "-r", 4)
    process = bench.start(*users, *forked(2))
    server.wait_for(4)
    process.kill()
    wait_until(lambda: server.truth()["now_open"] == 1)  # this very question


@needs_locust
def test_a_second_run_appends_and_heals_a_row_cut_short(bench, serve):
    server = serve()
    bench.corpus(TEXTS[:3])
    assert bench.run(server, 3)[0] == 0
    with bench.results.open("a", encoding="utf-8") as file:
        file.write("7,12")
    assert bench.run(server, 3)[0] == 0
    lines = bench.results.read_text("utf-8").splitlines()
    assert [line.split(",")[0] for line in lines].count("index") == 1
    assert Counter(line.split(",")[0] for line in lines) == {"index": 1, "0": 2, "1": 2, "2": 2, "7": 1}


def post(url, **form):
    with urllib.request.urlopen(url, urllib.parse.urlencode(form).encode(), timeout=WAIT_S) as reply:
        return json.load(reply)


def stop(url):
    try:
        return post(url + "/stop")
    except urllib.error.HTTPError:  # a GET on the Locust that runs on Python 3.9
        with urllib.request.urlopen(url + "/stop", timeout=WAIT_S) as reply:
            return json.load(reply)


def web_names(url):
    with urllib.request.urlopen(url + "/stats/requests", timeout=WAIT_S) as reply:
        return {row["name"] for row in json.load(reply)["stats"]}


@needs_locust
def test_web_ui_starts_stops_and_starts_again(bench, serve):
    server = serve("--delay-ms", "200")
    bench.corpus(TEXTS[:40])
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    host = f"{server.url}?api-version=2&key={CANARY}"
    process = bench.start("--host", host, "--web-port", port, "--web-host", "127.0.0.1", OPENAI_API_KEY=CANARY)
    wait_until(lambda: web_names(url) == {"Aggregated"})

    def summaries():
        return (bench.path / "0.out").read_text("utf-8").count("=== locust_batch: ")

    with urllib.request.urlopen(url, timeout=WAIT_S) as reply:
        page = reply.read().decode()
    assert "requests_file" in page
    assert CANARY not in page
    assert "openai_api_key" not in page
    shown = f"{server.url}?api-version=2&key=***"
    assert shown.replace("&", "\\u0026") in page or shown in page

    assert post(url + "/swarm", user_count=2, spawn_rate=2)["success"]
    server.wait_for(4)
    assert stop(url)["success"]
    wait_until(lambda: summaries() == 1)
    first = len(bench.rows())
    assert 4 <= first < 40

    before = sum(server.truth()["texts"].values())
    assert post(url + "/swarm", user_count=40, spawn_rate=40, max_tokens=9, host=shown)["success"]
    wait_until(lambda: summaries() == 2)
    assert len(bench.rows()) == first + 40
    assert sum(server.truth()["texts"].values()) - before == 40
    path = "/v1/chat/completions?api-version=2&key=***"
    wait_until(lambda: web_names(url) == {path, "prompt_tokens", "completion_tokens", "Aggregated"})

    assert post(url + "/swarm", user_count=1, spawn_rate=1, requests_file="gone.jsonl")["success"]
    wait_until(lambda: "gone.jsonl: No such file" in (bench.path / "0.err").read_text("utf-8"))
    process.send_signal(signal.SIGINT)
    _, out, err = bench.finish(process)
    assert summaries() == 2
    assert "40 of 40 prompts answered, 0 not" in out
    assert CANARY not in out + err
    assert "Traceback" not in err


@at_once
def test_help_lists_the_options_and_shows_no_key(bench, serve):
    bench.command = (str(SCRIPT),)
    code, out, _ = bench.finish(bench.start("--help", OPENAI_API_KEY=CANARY))
    assert code == 0
    assert CANARY not in out
    for option in ("--requests-file", "--openai-api-key", "--extra-body", "--request-timeout", "--stream"):
        assert option in out
