"""A key is never shown: not by us, not by a server that says it back, not in a process list."""

from __future__ import annotations

import base64
import csv
import json
import os
from pathlib import Path
from typing import Any, Optional

import pytest

import online_bench_openai_async as bench
from tests.support import program
from tests.support.faults import FAULTS, FaultServer, fault_prompt, streams
from tests.support.processes import command_line_of, is_alive, needs_proc, wait_until
from tests.support.replies import as_json, delta, piece, reply
from tests.support.server import Call
from tests.support.tables import write_corpus

pytest.importorskip("openai")

KEY = "sk-canary-0123456789abcdefghij"
LOGIN = "canary-user:canary-pass%40word"
FIELD = "canary-field-value-42"
HEADER = "canary-header-value-43"
BASIC = base64.b64encode(b"canary-user:canary-pass@word").decode()
NEEDLES = ("canary-0123", "canary-user", "canary-pass", "canary-field", "canary-header", "sk-canary", BASIC[:12])


def said_back(call: Call) -> str:
    """Everything that the request held, as a server might put it into its error."""
    body = json.loads(call.body)
    return f"denied: {call.authorization} / {KEY} / {body.get('api_key')} / {HEADER} / canary-pass@word"


def echo_status(call: Call) -> None:
    call.send(reply("401 No", as_json({"error": {"message": said_back(call)}}), f"Retry-After: {KEY}"))


def echo_text(call: Call) -> None:
    call.send(reply(f"403 {KEY}", f"<html>{said_back(call)}</html>".encode()))


def echo_200(call: Call) -> None:
    call.send(reply("200 OK", as_json({"error": said_back(call)})))


def echo_garbage(call: Call) -> None:
    call.send(reply("200 OK", said_back(call).encode()))


def echo_event(call: Call) -> None:
    streams(b"event: error\ndata: " + said_back(call).encode() + b"\n\n")(call)


def echo_finish(call: Call) -> None:
    streams(piece(delta(content="x")), piece(delta(finish=KEY)))(call)


def echo_cut(call: Call) -> None:
    """The key where our own limit on error texts cuts it."""
    call.send(reply("500 No", b"x" * (bench.ERROR_TEXT_CHARS - 30) + b" " + KEY.encode()))


def echo_protocol(call: Call) -> None:
    call.send(f"{KEY} is no status line\r\n\r\n".encode())
    call.close()


ECHOES = {
    act.__name__: act
    for act in (echo_status, echo_text, echo_200, echo_garbage, echo_event, echo_finish, echo_cut, echo_protocol)
}
SOME_FAULTS = ("status_400_object", "closes_without_reply", "null", "stream_error_event", "never_answers")


def run_script(words: list[str], folder: Path, env: Optional[dict[str, str]] = None) -> tuple[int, str]:
    """The exit code and every byte that was written, files included."""
    done = program.run_script(*words, cwd=folder, env=env)
    return done.code, written_by(done, folder)


def written_by(done: program.Outcome, folder: Path) -> str:
    files = [path.read_bytes().decode("utf-8", "replace") for path in sorted(folder.glob("*out*"))]
    return "\n".join([done.out, done.err, *files])


def assert_silent(text: str) -> None:
    for needle in NEEDLES:
        assert needle not in text, text[max(0, text.find(needle) - 200) :][:400]
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("way", "transport", "streamed"),
    [
        ("option", "stopwatch", False),
        ("environment", "stopwatch", True),
        ("environment", "sdk", False),
        ("option", "sdk", True),
    ],
)
def test_no_secret_is_ever_written(way: str, transport: str, streamed: bool, tmp_path: Path) -> None:
    """Every fault that could say a secret, and some that happen anyhow, in two processes."""
    acts = {**ECHOES, **{name: FAULTS[name].act for name in SOME_FAULTS}}
    prompts = [prompt for name in acts for prompt in ("a good one", fault_prompt(name))]
    write_corpus(tmp_path / "corpus.jsonl", prompts)
    with FaultServer(acts) as server:
        base = f"http://{LOGIN}@127.0.0.1:{server.port}/v1"
        words = ["--model", "m", "--requests-file", "corpus.jsonl", "--concurrency", "4", "--transport", transport]
        words += ["--results-csv", "out.csv", "--summary-jsonl", "out.jsonl", "--extra-body"]
        words += [json.dumps({"api_key": FIELD, "deep": [{"auth": {"value": FIELD}}]}), "--system-prompt", "hello"]
        words += ["--first-byte-timeout", "0.3", "--timeout", "5", "--processes", "2"]
        env = {"OPENAI_CUSTOM_HEADERS": f"X-Secret-Token: {HEADER}\nCookie: c={HEADER}"}
        if way == "option":
            words += ["--api-key", KEY, "--api-base", base]
        else:
            env.update(OPENAI_API_KEY=KEY, OPENAI_BASE_URL=base)
        if streamed:
            words.append("--stream")
        code, text = run_script(words, tmp_path, env)
    assert code == 0, text
    assert "***" in text
    assert text.count("denied: ") >= 3  # the errors are shown, but for the secrets
    assert_silent(text)


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["--apikey", KEY, "--model", "m"],
        [f"--apikey={KEY}", "--model", "m"],
        ["--model", "m", KEY],
        ["--model", "m", "--api-key", f"{KEY}\n"],
        ["--model", "m", "--api-base", "ftp://canary-user:canary-pass@host/v1"],
        ["--model", "m", "--api-base", "http://canary-user:canary/pass@host/v1"],
        ["--model", "m", "--api-base", "canary-user:canary-pass@host:80/v1"],
        ["--model", "m", "--extra-body", f'"{FIELD}"'],
        ["--model", "m", "--extra-body", f'{{"api_key": "{FIELD}"'],
        ["--model", "m", "--extra-body", f'["{FIELD}"]'],
        ["--api-base", "http://canary-user:canary-pass@127.0.0.1:1/v1", "--api-key", KEY],
    ],
    ids=lambda words: words[-1][:12] if len(words) < 4 else f"{words[-2]}-{words[-1][:6]}",
)
def test_no_message_about_the_command_line_shows_one(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://{LOGIN}@127.0.0.1:1/v1")
    monkeypatch.chdir(tmp_path)
    done = program.cli(*words)
    assert done.code == (0 if words[0] in ("--help", "--version") else 2)
    assert_silent(written_by(done, tmp_path))


@pytest.mark.parametrize("status", ["401 no", "302 Elsewhere"])
def test_the_list_of_models_shows_none_and_is_asked_of_no_other_server(status: str, tmp_path: Path) -> None:
    def models(sock: Any) -> None:
        request = sock.recv(65536).decode()
        text = f"{KEY} {request}"
        location = f"Location: http://127.0.0.1:{other.port}/stolen"
        sock.sendall(reply(f"{status} {KEY}", as_json({"data": [{"id": text}], "error": text}), location))

    with FaultServer({}) as other, FaultServer({}, models) as server:
        base = f"http://{LOGIN}@127.0.0.1:{server.port}/v1"
        code, text = run_script(["--api-base", base, "--api-key", KEY], tmp_path)
        assert other.connections == 0
    assert code == 2
    assert "--model is missing" in text
    assert_silent(text)


def test_the_login_of_the_url_is_sent_by_every_transport(tmp_path: Path) -> None:
    heard = []

    def listen(call: Call) -> None:
        heard.append(call.authorization)
        call.send(reply("401 No", b""))

    write_corpus(tmp_path / "corpus.jsonl", [fault_prompt("listen")])
    with FaultServer({"listen": listen}) as server:
        for transport in ("stopwatch", "sdk"):
            words = ["--model", "m", "--requests-file", "corpus.jsonl", "--warmup", "0", "--transport", transport]
            run_script([*words, "--api-base", f"http://{LOGIN}@127.0.0.1:{server.port}/v1"], tmp_path)
    assert heard == [f"Basic {BASIC}"] * 2


# --- the processes that we start ---


@needs_proc
def test_children_carry_no_key_listen_on_loopback_and_end_with_their_parent(tmp_path: Path) -> None:
    """SIGKILL leaves the parent no chance to clear up: the leash does."""
    words = ["--demo", "--demo-engine", '{"ttft_ms": 200, "gap_ms": 0}', "--processes", "2", "--concurrency", "4"]
    words += ["--total-requests", "100000", "--output-tokens", "2", "--api-key", KEY]
    parent = program.Running(tmp_path, *words, "--extra-body", json.dumps({"api_key": FIELD}))
    try:
        parent.wait_for_rows(5)
        pids = parent.children
        lines = [command_line_of(pid) for pid in pids]
        assert sum("--shard" in line for line in lines) == 2
        assert sum("demo_server.py" in line for line in lines) == 1
        for line in lines:
            assert_silent(line)
        server = next(pid for pid, line in zip(pids, lines) if "demo_server.py" in line)
        assert listening_addresses(server) == {"127.0.0.1"}
    finally:
        parent.process.kill()
        parent.outcome()
    wait_until(lambda: not any(map(is_alive, pids)))
    assert parent.csv.read_bytes().endswith(b"\n")


def listening_addresses(pid: int) -> set[str]:
    """Local addresses of the listening TCP sockets of a process."""
    links = {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir() if entry.is_symlink()}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in links:
                word = bytes.fromhex(fields[1].partition(":")[0])
                found.add(".".join(map(str, word[::-1])) if table == "tcp" else "::")
    return found


# --- server text in files and on terminals ---

NASTY = ("=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "\t=1", "\r\n=1,2\n3", "\x1b]0;title\x07=1", "\x1b[2J\x9b31mred")


def test_server_text_is_harmless_cells_and_no_command_to_a_terminal(tmp_path: Path) -> None:
    def asked(call: Call) -> bytes:
        return as_json({"error": NASTY[int(json.loads(call.body)["messages"][-1]["content"].split()[-1])]})

    def as_status(call: Call) -> None:
        call.send(reply("400 No", asked(call)))

    def as_answer(call: Call) -> None:
        call.send(reply("200 OK", asked(call)))

    acts = {"as_status": as_status, "as_answer": as_answer}
    prompts = [f"{fault_prompt(name)} {at}" for name in acts for at in range(len(NASTY))]
    write_corpus(tmp_path / "corpus.jsonl", prompts)
    with FaultServer(acts) as server:
        words = ["--api-base", server.api_base, "--model", "m", "--requests-file", "corpus.jsonl", "--warmup", "0"]
        _, written = run_script([*words, "--results-csv", "out.csv", "--summary-jsonl", "out.jsonl"], tmp_path)
    lines = (tmp_path / "out.csv").read_bytes().split(b"\n")
    assert len(lines) == 1 + len(prompts) + 1  # a header, a line for each, nothing behind the last
    assert not any(code in written for code in ("\x1b", "\x07", "\x9b", "\r"))
    for row in csv.reader(line.decode() for line in lines[1:-1]):
        assert not any(cell[:1] in ("=", "+", "-", "@") for cell in row if cell)
