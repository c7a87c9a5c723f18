"""Reading ahead in threads, while a device computes."""

import collections
import concurrent.futures
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
Read = TypeVar("Read")

# Read at a time, and as many more that wait: what bounds the memory, beside what is being computed.
THREADS = min(os.cpu_count() or 1, 16)


def read_ahead(read: Callable[[Item], Read], items: Iterable[Item]) -> Iterator[Read]:
    """`read` of each item, in order, run in threads before it is asked for. Raises what `read` raises."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        window: collections.deque[concurrent.futures.Future[Read]] = collections.deque()
        try:
            for item in items:
                window.append(pool.submit(read, item))
                if len(window) == 2 * THREADS:
                    yield window.popleft().result()
            while window:
                yield window.popleft().result()
        finally:  # after an error nobody waits for the rest
            pool.shutdown(cancel_futures=True)
