#!/usr/bin/env python3
"""What locust_batch.py costs beside plain Locust: CPU per request, and latency against the server's clock.

    python benchmarks/locust_cost.py [--users 200] [--delay-ms 200] [--seconds 8] [--rounds 3]

Both load the same local server (tests/support/locust_server.py) with the same body, as child processes of this
one, in turn, in the same run; plain Locust is a FastHttpUser with a two-line task. CPU is the child's own
(user and system, by wait4); two lengths of run are compared, so that starting up does not count.
Needs `pip install locust`. Prints one line per round and the medians.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TEXT = "word " * 100
PLAIN = f"""
from locust import FastHttpUser, task
BODY = {{"model": "m", "messages": [{{"role": "user", "content": "{TEXT}"}}]}}
class Plain(FastHttpUser):
    @task
    def chat(self):
        self.client.post("/v1/chat/completions", json=BODY)
"""


class Server:
    def __init__(self, delay_ms):
        command = [sys.executable, str(ROOT / "tests" / "support" / "locust_server.py"), "--delay-ms", str(delay_ms)]
        self.process: Any = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.url = f"http://127.0.0.1:{int(next(iter(self.process.stdout or ())))}"

    def truth(self):
        with urllib.request.urlopen(self.url + "/truth") as reply:
            return json.load(reply)

    def stop(self):
        self.process.stdin.close()
        self.process.wait()


def run(locustfile, options, seconds, folder, **environment):
    """One Locust process against a server of its own: (CPU seconds, the server's truth, stdout)."""
    server = Server(options.delay_ms)
    users = str(options.users)
    command = [sys.executable, "-m", "locust", "-f", str(locustfile), "--headless", "--host", server.url]
    command += ["-u", users, "-r", users, "-t", f"{seconds}s", "--only-summary", "--json", "-L", "ERROR"]
    with open(folder / "stdout", "w+") as stdout:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.DEVNULL,
        )
        _, _, usage = os.wait4(process.pid, 0)
        process.returncode = 0  # reaped above, for its usage
        stdout.seek(0)
        text = stdout.read()
    truth = server.truth()
    server.stop()
    return usage.ru_utime + usage.ru_stime, truth, text


def cpu_us_per_request(short, long):
    (cpu_short, truth_short), (cpu_long, truth_long) = short, long
    requests = truth_long["answered"] - truth_short["answered"]
    return (cpu_long - cpu_short) / requests * 1e6


def plain_round(options, folder):
    locustfile = folder / "plain_locustfile.py"
    locustfile.write_text(PLAIN, "utf-8")
    short = run(locustfile, options, 2, folder)
    cpu, truth, text = run(locustfile, options, 2 + options.seconds, folder)
    entry = next(entry for entry in json.loads(text) if entry["method"] == "POST")
    late = entry["total_response_time"] / entry["num_requests"] - truth["total_ms"] / truth["answered"]
    return cpu_us_per_request(short[:2], (cpu, truth)), late, truth["answered"]


def batch_round(options, folder):
    count = int(options.users * (4 + options.seconds) / max(options.delay_ms, 1) * 1000)
    texts = [f"{index} {TEXT}" for index in range(count)]
    (folder / "requests.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    results = folder / "results.csv"
    outcome = []
    for seconds in (2, 2 + options.seconds):
        results.unlink(missing_ok=True)
        environment = {"RESULTS_CSV": str(results), "SYSTEM_PROMPT": "", "OPENAI_API_KEY": ""}
        outcome.append(run(ROOT / "locust_batch.py", options, seconds, folder, **environment)[:2])
    truth = outcome[1][1]
    with results.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["status"] == "success"]
    late = [float(row["latency_ms"]) - truth["took_ms"][texts[int(row["index"])]] for row in rows]
    return cpu_us_per_request(*outcome), late, truth["answered"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=200)
    parser.add_argument("--delay-ms", type=float, default=200)
    parser.add_argument("--seconds", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    ratios = []
    with tempfile.TemporaryDirectory() as name:
        for _ in range(options.rounds):
            plain_us, plain_late, plain_n = plain_round(options, Path(name))
            batch_us, late, batch_n = batch_round(options, Path(name))
            ratios.append(batch_us / plain_us)
            cuts = statistics.quantiles(late, n=100, method="inclusive")
            print(
                f"CPU/request: plain {plain_us:.0f} us (n={plain_n}), batch {batch_us:.0f} us (n={batch_n}), "
                f"ratio {ratios[-1]:.2f} | latency - truth (ms): plain mean {plain_late:.2f}, "
                f"batch mean {statistics.mean(late):.2f} p50 {cuts[49]:.2f} p99 {cuts[98]:.2f}",
                flush=True,
            )
    print(f"median ratio {statistics.median(ratios):.2f} at {options.users} users, {options.delay_ms:g} ms")


if __name__ == "__main__":
    main()
