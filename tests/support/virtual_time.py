"""An event loop whose clock jumps over every wait: an hour of a run passes at once."""

from __future__ import annotations

import asyncio
import selectors
from typing import Any, Optional

import online_bench_openai_async as bench


class _JumpingSelector:
    """Idle time passes at once."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._real = selectors.DefaultSelector()

    def select(self, timeout: Optional[float] = None) -> Any:
        assert timeout is not None, "a virtual loop that waits for nothing would wait for ever"
        self._loop.now += max(0.0, timeout)
        return self._real.select(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_JumpingSelector(self))  # type: ignore[arg-type]

    def time(self) -> float:
        return self.now


def virtual_clock() -> bench.Clock:
    """The running virtual loop's time for a pool, where a nap passes at once."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)

    def nap(seconds: float) -> None:
        loop.now += seconds

    return bench.Clock(lambda: round(loop.now * 1e9), nap)


def in_virtual_time(main: Any) -> Any:
    """The result of a coroutine; `asyncio.get_running_loop().time()` tells it the virtual seconds since its start."""
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(main)
    finally:
        asyncio.set_event_loop(None)
        loop.close()
