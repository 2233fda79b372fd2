"""A server that says exactly the bytes it is told to, packet by packet."""

from __future__ import annotations

import socket
import threading
import time
from typing import Callable


class Script:
    """A server that answers each connection's requests with the next of its scripts; counts connections."""

    def __init__(self, *answers: Callable[[socket.socket], bool]) -> None:
        self._answers = list(answers)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._listener.getsockname()[1]
        self.connections = 0
        self.requests = 0
        self.bodies: list[bytes] = []
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._open.append(sock)
            threading.Thread(target=self._talk, args=(sock,), daemon=True).start()

    def _talk(self, sock: socket.socket) -> None:
        try:
            while self._request(sock):
                self.requests += 1
                answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
                if not answer(sock):
                    sock.close()
                    return
        except OSError:
            return

    def _request(self, sock: socket.socket) -> bool:
        data = b""
        while b"\r\n\r\n" not in data:
            more = sock.recv(65536)
            if not more:
                return False
            data += more
        head, _, body = data.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        while len(body) < length:
            body += sock.recv(65536)
        self.bodies.append(body)
        return True

    def stop(self) -> None:
        self._listener.close()
        for sock in self._open:
            sock.close()


def says(*packets: bytes, gap_s: float = 0.0, keep: bool = True) -> Callable[[socket.socket], bool]:
    def answer(sock: socket.socket) -> bool:
        for packet in packets:
            sock.sendall(packet)
            time.sleep(gap_s)
        return keep

    return answer
