"""A small HTTP server on loopback whose answers are written by the test, to the byte and to the packet.

`HttpServer` accepts, reads requests and keeps count; `ScriptedServer` answers with a list of scripts, one request
after the other; the fault server (tests/support/faults.py) by what the prompt asks for.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Callable, Optional

import pytest


class Call:
    """One request, and the connection on which to answer it, well or badly."""

    def __init__(self, sock: Any, head: bytes, body: bytes, number: int) -> None:
        self.sock = sock
        self.head = head
        self.body = body
        self.number = number  # of this request on its connection, from 0
        self.authorization = header_of(head, b"authorization")
        self.over = False  # whether the connection is to be closed

    @property
    def streamed(self) -> bool:
        return b'"stream":true' in self.body.replace(b" ", b"")

    def send(self, *pieces: bytes, gap_s: float = 0.001) -> None:
        """Each piece in a packet of its own, as far as the kernel lets us."""
        for piece in pieces:
            self.sock.sendall(piece)
            if len(pieces) > 1:
                time.sleep(gap_s)

    def close(self) -> None:
        self.over = True

    def reset(self) -> None:
        reset_on_close(self.sock)
        self.over = True

    def stall(self) -> None:
        """Say nothing more until the client gives up."""
        with contextlib.suppress(OSError):
            while self.sock.recv(65536):
                pass
        self.over = True


Act = Callable[[Call], None]  # what is done to one request
Door = Callable[[socket.socket], Optional[Any]]  # what is done to a connection: its socket from then on, None: the end


class HttpServer:
    """Listens on loopback, a thread for each connection; counts what arrived and what is still open."""

    def __init__(self, answer: Act, door: Optional[Door] = None) -> None:
        self._answer = answer
        self._door = door
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port: int = self._listener.getsockname()[1]
        self.connections = 0
        self.bodies: list[bytes] = []
        self.open: set[socket.socket] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def api_base(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def requests(self) -> int:
        return len(self.bodies)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in list(self.open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def left_open(self, patience_s: float = 5.0) -> int:
        """Connections that the client has not closed, after it was given time to."""
        until = time.monotonic() + patience_s
        while self.open and time.monotonic() < until:
            time.sleep(0.005)
        return len(self.open)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                with self._lock:
                    self.connections += 1
                    self.open.add(sock)
                threading.Thread(target=self._converse, args=(sock,), daemon=True).start()

    def _converse(self, raw: socket.socket) -> None:
        sock: Any = raw
        try:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock = self._door(raw) if self._door else raw
            number = 0
            while sock is not None and self._answered(sock, number):
                number += 1
        except OSError:
            pass
        finally:
            with contextlib.suppress(OSError):
                (sock or raw).close()
            raw.close()
            with self._lock:
                self.open.discard(raw)

    def _answered(self, sock: Any, number: int) -> bool:
        """Answer the next request; whether the connection is to be kept."""
        request = read_request(sock)
        if request is None:
            return False
        call = Call(sock, *request, number)
        with self._lock:
            self.bodies.append(call.body)
        self._answer(call)
        return not call.over


class ScriptedServer(HttpServer):
    """Answers its requests, on whichever connection, with one script after the other, then with the last again."""

    def __init__(self, *scripts: Act, door: Optional[Door] = None) -> None:
        self._scripts = list(scripts)
        super().__init__(self._next, door)

    def _next(self, call: Call) -> None:
        with self._lock:
            act = self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]
        act(call)


def says(*packets: bytes, gap_s: float = 0.0, keep: bool = True) -> Act:
    """These packets, each followed by a pause; then the connection is kept or closed."""

    def act(call: Call) -> None:
        for packet in packets:
            call.sock.sendall(packet)
            time.sleep(gap_s)
        call.over = not keep

    return act


# --- requests ---


def read_request(sock: Any) -> Optional[tuple[bytes, bytes]]:
    """(head, body) of the next request; None at the end of the connection."""
    received = b""
    while b"\r\n\r\n" not in received:
        data = sock.recv(65536)
        if not data:
            return None
        received += data
    head, _, rest = received.partition(b"\r\n\r\n")
    length = int(header_of(head, b"content-length") or 0)
    pieces, size = [rest], len(rest)
    while size < length:
        data = sock.recv(65536)
        if not data:
            return None
        pieces.append(data)
        size += len(data)
    return head, b"".join(pieces)


def header_of(head: bytes, name: bytes) -> str:
    """The value of the first header of that (lower-case) name, empty where there is none."""
    for line in head.split(b"\r\n")[1:]:
        key, _, value = line.partition(b":")
        if key.strip().lower() == name:
            return value.strip().decode("latin-1")
    return ""


def reset_on_close(sock: socket.socket) -> None:
    """Let the end of this connection be a TCP reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


# --- TLS, and ports that nobody answers on ---


def server_context(folder: Path, name: str) -> ssl.SSLContext:
    """A context with a self-signed certificate for this host name (localhost: its address, too); `.ca_file` is it."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl to make certificates with")
    key, certificate = folder / f"{name}.key", folder / f"{name}.pem"
    words = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    names = f"subjectAltName=DNS:{name}" + (",IP:127.0.0.1" if name == "localhost" else "")
    words += ["-subj", f"/CN={name}", "-addext", names, "-keyout", str(key)]
    subprocess.run([*words, "-out", str(certificate)], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    context.ca_file = str(certificate)  # type: ignore[attr-defined]
    return context


def behind_tls(context: ssl.SSLContext) -> Door:
    return partial(context.wrap_socket, server_side=True)


@contextlib.contextmanager
def full_queue() -> Iterator[int]:
    """The port of a listener whose queue is full: a connection is neither made nor refused."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        time.sleep(0.05)
        yield listener.getsockname()[1]


@contextlib.contextmanager
def closed_port() -> Iterator[int]:
    """A port that is bound and not listening: nobody else can take it meanwhile."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]
