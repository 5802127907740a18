"""Calls on a GPU as one CUDA graph that is replayed: no time of Python's, launches as dense as the GPU takes them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch

SIDE_STREAM = functools.cache(torch.cuda.Stream)


class GraphTurns:
    """One graph of all calls in turn; warmed up on the stream that captures it, so that what they keep is made before.

    Raises what a call raises that cannot be captured.
    """

    def __init__(self, calls: list[Callable], x: torch.Tensor):
        self.count, self.x, self.graph, stream = len(calls), x, torch.cuda.CUDAGraph(), SIDE_STREAM()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call(x)
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph, stream=stream):
            for call in calls:
                self.y = call(x)

    def once(self) -> torch.Tensor:
        """The result of the last call, after a replay."""
        self.graph.replay()
        torch.cuda.synchronize()
        return self.y

    def replayed(self, times: int) -> float:
        """Seconds of so many replays."""
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        for _ in range(times):
            self.graph.replay()
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended) / 1e3

    def seconds(self, budget: float) -> float:
        """Per call: as many replays as one replay's time says fit into `budget`, at least one."""
        times = max(1, math.ceil(budget / self.replayed(1)))
        return self.replayed(times) / times / self.count


class Stopwatch:
    """What times calls on a GPU; tests put another one in its place."""

    turns = staticmethod(GraphTurns)

    def __init__(self, device: torch.device):
        self.device = device

    def wait(self) -> None:
        """Raises what has gone wrong on the GPU."""
        torch.cuda.synchronize(self.device)

    def copies(self, size: int, most: int = 64) -> int:
        """Of `size` bytes, that exceed twice the L2 cache."""
        return min(most, -(-2 * torch.cuda.get_device_properties(self.device).L2_cache_size // size))
