"""One prediction at a time, and a bounded number of requests that wait for their turn."""

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

_MEMORY = 0.8  # share of the earlier mean in the running mean of the seconds


class QueueFullError(Exception):
    """More requests wait than are allowed. `retry_after` is the estimate, in whole seconds, until a turn is free."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} requests are waiting already: try again in {retry_after} s")
        self.retry_after = retry_after


class PredictionQueue:
    """The turns of requests, first come, first served.

    Args:
        limit: Requests that may wait beside the one that is computed.

    Attributes:
        pending: Requests that are computed or wait.
        refused: Requests that were refused so far.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.pending, self.refused = limit, 0, 0
        self._seconds = 1.0  # running mean of a turn
        self._lock = asyncio.Lock()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for the turn, which lasts as long as the block.

        Raises:
            QueueFullError: `limit` requests are waiting.
        """
        if self.pending > self.limit:
            self.refused += 1
            raise QueueFullError(self.limit, max(1, math.ceil(self._seconds * self.pending)))
        self.pending += 1
        try:
            async with self._lock:
                start = time.perf_counter()
                yield
                self._seconds = _MEMORY * self._seconds + (1 - _MEMORY) * (time.perf_counter() - start)
        finally:
            self.pending -= 1
