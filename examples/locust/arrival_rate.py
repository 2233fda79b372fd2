"""An arrival rate instead of a number of users, by Locust's own means: a load shape, and users who keep a pace.

    RATES=10,20,40 STEP_S=60 REQUESTS_FILE=requests.jsonl OPENAI_MODEL=my-model STREAM=1 PYTHONPATH=. \\
    locust -f examples/locust/arrival_rate.py --headless --host http://127.0.0.1:8000 --processes 4

Ten requests a second for a minute, then twenty, then forty until the corpus has been submitted. The shape has as many
users as make up the rate; each sends a request every PERIOD_S seconds, from a random moment of its first period on. So
a new rate is reached after one period, and requests come as those of many strangers do. (`constant_throughput` keeps
the same pace, but counts from where a user is made: those that are made together send together.)

An answer that takes longer than PERIOD_S holds up its user: keep it well above the latency. The corpus has to be longer
than the number of users, and the rate above one request in 10 s: a run that is idle for longer is over.
"""

import math
import os
import random
import time

from locust import LoadTestShape

import locust_batch

RATES = [float(rate) for rate in os.environ.get("RATES", "10").split(",")]  # requests a second
STEP_S = float(os.environ.get("STEP_S", "60"))  # for each of them but the last
PERIOD_S = float(os.environ.get("PERIOD_S", "10"))


class PacedUser(locust_batch.BatchUser):
    def on_start(self) -> None:
        super().on_start()
        self.due_s = time.perf_counter() + random.uniform(0, PERIOD_S)
        time.sleep(self.due_s - time.perf_counter())

    def wait_time(self) -> float:
        self.due_s += PERIOD_S
        return max(0.0, self.due_s - time.perf_counter())


class Steps(LoadTestShape):
    def tick(self) -> tuple[int, float]:
        rate = RATES[min(int(self.get_run_time() / STEP_S), len(RATES) - 1)]
        users = math.ceil(rate * PERIOD_S)
        return users, users
