"""What the machine can do, measured in the run that is judged by it: bytes read and operations, per second."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

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


@functools.cache
def _read_bandwidth(log2_bytes: int, threads: int) -> float:
    data = torch.ones(1 << (log2_bytes - 2))
    halves, rows, one = data.view(2, -1), data.view(-1, 4096), torch.ones(4096)
    readers = (lambda: torch.dot(halves[0], halves[1]), lambda: torch.mv(rows, one), data.sum)
    with torch.inference_mode():
        return data.numel() * 4 / min(_best(reader) for reader in readers)


def read_bandwidth(footprint: int) -> float:
    """Bytes/s of reading a float32 tensor of about `footprint` bytes again and again, with torch's threads.

    The best of three readers: the dot product of its halves, a matrix-vector product, a sum. A C loop of 2 to 16
    streams with software prefetch was no faster than the dot product. The footprint decides: on a virtual Xeon that
    reports 300 MB of cache, one thread reads 24 GB/s from 64 MB and 15 GB/s from 128 MB.
    """
    return _read_bandwidth(min(max(footprint.bit_length(), 20), 30), torch.get_num_threads())


UNITS = ("int8", "bf16", "fp32")


@functools.cache
def _peak(unit: str, threads: int) -> float:
    module = native.module()
    isas = [isa for isa, row in native.cpu_kernels().items() if row["supported"]]
    return max(module.peak(isa, unit, threads, 0.2) for isa in isas)


def peak(unit: str) -> float:
    """Operations/s of this CPU's best instruction in a unit, on registers only, with torch's threads.

    "float" is for kernels that may multiply fp32 numbers as such or as bf16 parts.
    """
    units = ("bf16", "fp32") if unit == "float" else ("fp32",) if unit == "fp16" else (unit,)
    return max(_peak(name, torch.get_num_threads()) for name in units)


def ceilings(m: int, n: int, k: int, contender, copies: int) -> dict:
    """{read_gbps, peak_gflops, roofline_seconds} of one product; the footprint is that of all copies of the weight."""
    moved = contender.weight_bytes + (m * k + m * n) * contender.x_dtype.itemsize
    reading = read_bandwidth(contender.weight_bytes * copies)
    operations = peak(contender.unit)
    bound = max(moved / reading, 2 * m * n * k / operations)
    return {"read_gbps": reading / 1e9, "peak_gflops": operations / 1e9, "roofline_seconds": bound, "bytes": moved}
