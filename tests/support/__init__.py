"""What the tests share. Which helper is for what:

program.py       run the benchmark: `cli` in this process, `run_script` as a process to its end, `Running` to start it
                 and talk to it while it runs; all end in an `Outcome` (code, out, err, rows, seconds)
checked_runs.py  `run`: the same with short time-outs against a fault server, its stderr checked for leaks
demo.py          `Demo`: the simulated server in a process of its own, and its own truth about what it served
server.py        `ScriptedServer(says(b"..."))`: a small HTTP server that answers with the very bytes and packets of
                 the test; reading of requests, TLS, ports that nobody answers on
faults.py        `FaultServer(ACTS)`: the table of faults, a prompt names the one it wants
replies.py       the pieces of good answers: JSON bodies, server-sent events, chunks
records.py       `make_record`, `make_config`, `summary_of`, `health`: values of the pure sections, with changes
virtual_time.py  `in_virtual_time(coroutine)`: an event loop in which nobody waits
tables.py        CSV rows, JSON lines and corpora, read and written
processes.py     children, command lines and ports of processes; `wait_until` in place of a sleep
locust.py        Locust processes in a directory of their own, and the server that counts what they send
                 (locust_server.py, a program)
tokenizer_shelf.py  small tokenizers of every family, trained on the spot

Fixtures stand in tests/conftest.py, and nothing else does. A test imports helpers from here and never from another
test module. Time: compare with the server's own clock, or use virtual time; wait with `wait_until`.
"""
