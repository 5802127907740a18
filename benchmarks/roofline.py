"""What the machine can do, measured in the run that is judged by it: bytes read and operations, per second."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import torch
from bench import Contender, CpuTurns

from llmfp4_kernels import native


def _best(call: Callable, seconds: float = 0.4) -> float:
    """Least seconds of a call, of all that fit into `seconds` and at least five."""
    call()
    times, started = [], time.perf_counter()
    while len(times) < 5 or time.perf_counter() - started < seconds:
        before = time.perf_counter()
        call()
        times.append(time.perf_counter() - before)
    return min(times)


class Reading:
    """Reads 2^log2_bytes of float32 numbers again and again, with torch's threads, by the fastest of `_readers`."""

    def __init__(self, log2_bytes: int):
        self.bytes, self.rates = 1 << log2_bytes, []
        self.reader = _fastest(log2_bytes, torch.get_num_threads())

    def once_more(self, budget: float) -> None:
        """One more of `rates`, bytes/s, over about `budget` seconds."""
        self.rates.append(self.bytes / CpuTurns([lambda x: self.reader()], None).seconds(budget))

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)


@functools.cache
def _readers(log2_bytes: int) -> tuple[Callable, ...]:
    """The dot product of two halves, a matrix-vector product, a sum.

    A C loop of 2 to 16 streams with software prefetch was no faster than the dot product.
    """
    data = torch.ones(1 << (log2_bytes - 2))
    halves, rows, one = data.view(2, -1), data.view(-1, 4096), torch.ones(4096)
    return lambda: torch.dot(*halves), lambda: torch.mv(rows, one), data.sum


@functools.cache
def _fastest(log2_bytes: int, threads: int) -> Callable:
    with torch.inference_mode():
        return min(_readers(log2_bytes), key=_best)


def footprint(contender: Contender) -> int:
    """log2 of about the bytes of all copies of a weight, 20 to 30.

    It decides: on a virtual Xeon that reports 300 MB of cache, one thread reads 24 GB/s from 64 MB and 15 GB/s from
    128 MB.
    """
    return min(max((contender.weight_bytes * len(contender.calls)).bit_length(), 20), 30)


UNITS = ("int8", "bf16", "fp32")


@functools.cache
def _peak(unit: str, threads: int) -> float:
    module = native.module()
    isas = [isa for isa, row in native.cpu_kernels().items() if row["supported"]]
    return max(module.peak(isa, unit, threads, 0.2) for isa in isas)


def peak(unit: str) -> float:
    """Operations/s of this CPU's best instruction for a unit, on registers only, with torch's threads.

    "float" is for kernels that may multiply fp32 numbers as such or as bf16 parts. A CPU without an instruction for
    bf16 multiplies bf16 numbers as fp32.
    """
    instructions = {"int8": ("int8",), "bf16": ("bf16", "fp32"), "float": ("bf16", "fp32")}.get(unit, ("fp32",))
    return max(_peak(name, torch.get_num_threads()) for name in instructions)


def ceilings(m: int, n: int, k: int, contender: Contender, rate: float) -> dict:
    """{read_gbps, peak_gflops, roofline_seconds} of one product where `rate` bytes/s are read."""
    moved = contender.weight_bytes + (m * k + m * n) * contender.x_dtype.itemsize
    operations = peak(contender.unit)
    bound = max(moved / rate, 2 * m * n * k / operations)
    return {"read_gbps": rate / 1e9, "peak_gflops": operations / 1e9, "roofline_seconds": bound, "bytes": moved}
