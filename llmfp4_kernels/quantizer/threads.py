"""Several layers at once, each with one thread of torch's."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch


def in_threads(function: Callable, jobs: Iterable[tuple], threads: int) -> Iterator:
    """function(*job) for each job, in order, at most `threads` at once; jobs are drawn as they are needed.

    With one thread everything runs in the caller's. The first exception ends it, after the calls under way.
    """
    if threads <= 1:
        yield from (function(*job) for job in jobs)
        return
    before = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        under_way: deque = deque()
        try:
            for job in jobs:
                under_way.append(pool.submit(function, *job))
                if len(under_way) > threads:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()
            torch.set_num_threads(before)
